"""The commands: flags to a frozen config, bad input to one line and exit code 2."""

import contextlib
import dataclasses
import itertools
import math
import os
import pathlib
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal, TypeVar

import jax
import tyro
from flax import nnx
from jax.sharding import Mesh

from gsrq_jax import codebook, codec
from gsrq_jax.errors import InputError, at_least
from gsrq_jax.layouts import LayoutName
from gsrq_jax.models import (
    fidelity,
    generation,
    llama,
    loading,
    longbench_run,
    needle,
    processes,
    sharding,
    text,
    training,
)
from gsrq_jax.models.config import LlamaConfig
from gsrq_jax.spec import QuantSpec

Config = TypeVar("Config")


def run(
    config: type[Config],
    action: Callable[[Config], Any],
    arguments: list[str] | None,
    after: str = "",
    default: Config | None = None,
) -> None:
    """Parse ``arguments`` (None: the command line) into a ``config`` and act on it.

    Exits with code 2 and one line on stderr for bad input or a failing disk, 130 when interrupted.
    """
    program = os.path.basename(sys.argv[0])
    try:
        with _interruptible():
            if default is None:
                action(tyro.cli(config, prog=program, args=arguments))
            else:
                action(tyro.cli(config, prog=program, args=arguments, default=default))
    except (InputError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from error
    except KeyboardInterrupt:
        print(f"\ninterrupted{after}", file=sys.stderr)
        if arguments is None:  # JAX stopped amid compiling crashes Python's orderly end
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(130)
        raise SystemExit(130) from None


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C is not lost where Python drops what is raised, as in callbacks of garbage collections.

    JAX has such a callback, and after a long compilation it is often the first Python code to run,
    so that the interrupt which came meanwhile is raised there. It is sent again a little later.
    """
    before = sys.unraisablehook
    # A signal to the thread: `_thread.interrupt_main` would not wake it from a system call.
    again = (threading.main_thread().ident, signal.SIGINT)

    def dropped(what: Any) -> None:
        if what.exc_type is KeyboardInterrupt:
            threading.Timer(0.05, signal.pthread_kill, again).start()
        else:
            before(what)

    sys.unraisablehook = dropped
    try:
        yield
    finally:
        sys.unraisablehook = before


def train(arguments: list[str] | None = None) -> None:
    """``gsrq-train`` and ``train_codebooks.py``; one process of a run or the only one."""
    run(
        training.TrainConfig,
        processes.joined()(training.train),
        arguments,
        "; the same command goes on from here",
        default=_preset(sys.argv[1:] if arguments is None else arguments),
    )


def _preset(arguments: list[str]) -> training.TrainConfig:
    """The defaults that ``--preset`` asks for; one that is not known is refused with the flags."""
    name = "demo"
    for flag, value in itertools.pairwise([*arguments, ""]):
        if flag == "--preset":
            name = value
        elif flag.startswith("--preset="):
            name = flag.partition("=")[2]
    return next((c for key, c in training.PRESETS.items() if key == name), training.TrainConfig())


def longbench(arguments: list[str] | None = None) -> None:
    """``gsrq-longbench`` and ``eval_longbench.py``."""
    after = "; the same command goes on from here"
    run(longbench_run.LongBenchConfig, longbench_run.evaluate, arguments, after)


def measure_fidelity(arguments: list[str] | None = None) -> None:
    """``gsrq-fidelity``."""
    run(fidelity.FidelityConfig, fidelity.measure, arguments)


def measure_needle(arguments: list[str] | None = None) -> None:
    """``gsrq-needle``."""
    run(needle.NeedleConfig, needle.measure, arguments)


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """Write text with a full or a quantised KV cache.

    Attributes:
        prompt: what to continue, or what to say to a chat model.
        context: text file to put before the prompt.
        model: folder with config.json and safetensors, .gguf file, hub id, or ``demo``.
        codebooks: folder that training wrote; without it the cache is exact.
        layout: of the codes: ``packed``; ``tiles`` for the fused GPU kernel of 16 codewords a
            stage, ``planes`` for that of two, also the quickest on a CPU; ``words`` for the TPU's;
            by default as the codebooks have it.
        compare: write with the exact cache, too.
        max_new_tokens: at most so many tokens.
        max_length: tokens that the cache must hold; by default what is needed.
        temperature: 0 takes the most likely token.
        top_p: sample among the most likely tokens of this total probability.
        seed: of the sampling.
        chat: use the model's chat template: ``auto`` where it has one, ``yes`` or ``no``.
        dtype: of the model.
        int8: round the model's weights to 8 bits, so that a token reads half as many bytes of them
            as in bfloat16.
        unroll: compile the layers one after the other, not as a loop: it takes some times as long,
            and decoding on a GPU less (docs/kernels.md).
        mesh: devices over which the past, and heads, are spread, such as ``4 2``; by default all of
            several processes (docs/pods.md), but one device of a single process.
        chunk: tokens of the prompt that are read at a time, over the cache that those before them
            left; by default all are read at once, exactly.
    """

    prompt: tyro.conf.Positional[str]
    context: pathlib.Path | None = None
    model: str = "demo"
    codebooks: pathlib.Path | None = None
    layout: LayoutName | None = None
    compare: bool = False
    max_new_tokens: int = 128
    max_length: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    chat: Literal["auto", "yes", "no"] = "auto"
    dtype: Literal["float32", "bfloat16"] = "float32"
    int8: bool = False
    unroll: bool = False
    mesh: tuple[int, int] | None = None
    chunk: int | None = None


def generate(arguments: list[str] | None = None) -> None:
    """``gsrq-generate``."""
    run(GenerateConfig, processes.joined()(_generate), arguments)


def _generate(config: GenerateConfig) -> None:
    sampler = generation.Sampler(config.temperature, config.top_p)
    at_least(1, "--", max_new_tokens=config.max_new_tokens)
    generation.check_seed(config.seed, "--")
    for flag, given in (("--compare", config.compare), ("--layout", config.layout is not None)):
        if given and config.codebooks is None:
            raise InputError(f"{flag} needs --codebooks")

    together = 1
    if config.codebooks is not None:
        spec = QuantSpec.from_json(codebook.read_metadata(config.codebooks)["spec"])
        together = math.lcm(*spec.code_heads)

    def mesh_for(found: LlamaConfig) -> Mesh | None:
        if config.mesh is None and jax.process_count() == 1:
            return None
        if found.kv_heads % together:  # another model's codebooks, which will be refused as such
            return sharding.make_mesh(found.kv_heads, config.mesh)
        return sharding.make_mesh(found.kv_heads, config.mesh, together=together)

    def shardings(found: LlamaConfig, params: nnx.State) -> nnx.State | None:
        mesh = mesh_for(found)
        return None if mesh is None else sharding.shardings(mesh, params)

    model = loading.load(config.model, dtype=config.dtype, int8=config.int8, shardings=shardings)
    tokenizer = model.needed_tokenizer()
    words = config.prompt
    if config.context is not None:
        words = "\n\n".join([*text.read(str(config.context)), words])
    if config.chat == "yes" or (config.chat == "auto" and tokenizer.has_chat_template):
        said = tokenizer.chat([{"role": "user", "content": words}])
        prompt = tokenizer.encode(said, add_bos=False)
    else:
        prompt = tokenizer.encode(words)
    needed = len(prompt) + config.max_new_tokens
    length = needed if config.max_length is None else config.max_length
    if needed > model.config.max_length:
        raise InputError(
            f"a prompt of {len(prompt)} tokens with {config.max_new_tokens} new ones is beyond the "
            f"model's context of {model.config.max_length}; shorten it or ask for fewer"
        )
    ways: list[codebook.Codebooks | None] = []
    if config.codebooks is None or config.compare:
        ways.append(None)
    if config.codebooks is not None:
        trained = codebook.load(config.codebooks, model=model.fingerprint)
        if config.layout is not None:
            trained = codec.respec(trained, layout=config.layout)
        ways.append(trained)
    params: llama.Params = model.params
    if config.unroll:
        if mesh_for(model.config) is not None:
            raise InputError("--unroll is for one device; leave out --mesh")
        params = llama.unrolled(model.graphdef, model.params)
        model = dataclasses.replace(model, params=nnx.State({}))  # not twice on the device
    for books in ways:
        print(f"--- {'full precision' if books is None else books.spec}", flush=True)
        generator = generation.Generator(
            *(model.graphdef, params, books, sampler, model.config.eos_tokens),
            mesh=mesh_for(model.config),
            chunk=config.chunk,
        )
        _stream(generator, tokenizer, prompt, length, config)


def _stream(
    generator: generation.Generator,
    tokenizer: Any,
    prompt: list[int],
    length: int,
    config: GenerateConfig,
) -> None:
    """Print text as it comes, then speed and bytes."""
    arrived: list[tuple[float, int]] = []  # when how many tokens were there
    state = None

    def ids():
        nonlocal state
        shown = 0
        for state in generator(
            [prompt],
            max_new_tokens=config.max_new_tokens,
            max_length=length,
            seed=config.seed,
            stride=_STRIDE,
        ):
            tokens = jax.device_get(state.tokens)[0]
            count = int(state.count[0])
            arrived.append((time.perf_counter(), count))
            for token in tokens[shown:count].tolist():
                if token not in generator.eos:
                    yield token
            shown = count

    for piece in tokenizer.stream(ids()):
        print(piece, end="", flush=True)
    print()
    assert state is not None
    # The first step also compiles: it does not count where there is a later one.
    (begin, first), (end, last) = arrived[min(1, len(arrived) - 1)], arrived[-1]
    speed = (
        f"{(last - first) / (end - begin):.1f} tokens/s" if last > first else "too short to time"
    )
    print(
        f"[{len(prompt)} + {last} tokens, {speed}, cache {state.cache.nbytes:,} bytes "
        f"for up to {state.cache.capacity:,} tokens]",
        flush=True,
    )


_STRIDE = 8  # tokens between looks at the device
