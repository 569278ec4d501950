"""Time of decode attention, and of whole decode steps, over a coded cache and over a bf16 one.

    python benchmarks/decode_speed.py                          # all of it, on this machine's device
    python benchmarks/decode_speed.py --part attention --quick # minutes instead of an hour

``attention`` is one layer's operation at LLaMA-3-8B's shapes, timed in a program of several layers
one after the other, as a decode step has them; random codes. ``model`` is a decode loop of a model
of these shapes with random weights, over a cache that is filled with random numbers; ``prefill`` is
that model reading a prompt. Writes
`results/decode-speed/<device>.json`, and beside it a table and a plot. ``--render FILE`` writes
only these again.
"""

import collections
import dataclasses
import functools
import glob
import itertools
import json
import math
import os
import pathlib
import re
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory, too

import jax
import jax.numpy as jnp
import matplotlib
import numpy as np
import uniform_attention
from flax import nnx

from gsrq_jax.baselines.uniform import UniformSpec
from gsrq_jax.cache import init_cache
from gsrq_jax.codebook import Codebooks
from gsrq_jax.kernels import decode
from gsrq_jax.kernels.reference import scale_of
from gsrq_jax.models import commands, generation, llama
from gsrq_jax.models.config import LLAMA_3_8B, LlamaConfig
from gsrq_jax.results import write_result
from gsrq_jax.spec import QuantSpec

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).parent.parent
TOY = dataclasses.replace(
    LLAMA_3_8B,
    vocab_size=64,
    hidden_size=64,
    intermediate_size=64,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=64,
)
MODELS = {"llama-3-8b": LLAMA_3_8B, "toy": TOY}
FULL = "bf16"


@dataclasses.dataclass(frozen=True)
class Config:
    """The experiment.

    Attributes:
        part: ``attention``, ``model``, ``prefill`` or all.
        quick: the first shape, the first batch and context, and fewer layers and repetitions.
        shapes: batch x context of attention.
        bits: rates of the codes.
        peers: uniformly rounded caches, ``int8`` and ``kivi2``, whose attention XLA compiles.
        block: tokens of a block; by default 1024 for contexts from 64k tokens on, else 512.
        mean_every: tokens between knots of the mean key.
        repeat: layers of a program of attention.
        at_least: seconds that a program of attention takes, so that its start counts for little.
        times: programs that are timed.
        model: whose shapes.
        layers: of the model's loop; 0 for all.
        batches: sequences of the model's loop.
        contexts: tokens in its cache at the end.
        steps: tokens that are decoded.
        prompts: tokens of prompts that are read and encoded.
        only_coded: leave out the model's loop in bf16.
        largest: also the largest batch that fits, by context, and the longest context of one
            sequence.
        out: folder under which ``results`` lies.
        render: only write table and plot of this result file again.
    """

    part: Literal["attention", "model", "prefill", "all"] = "all"
    quick: bool = False
    shapes: tuple[str, ...] = ("8x131072", "8x32768", "1x131072", "32x8192")
    bits: tuple[float, ...] = (1.0, 0.5)
    peers: tuple[Literal["int8", "kivi2"], ...] = ("int8", "kivi2")
    block: int | None = None
    mean_every: int = 16
    repeat: int = 8
    at_least: float = 0.03
    times: int = 15
    model: Literal["llama-3-8b", "toy"] = "llama-3-8b"
    layers: int = 0
    batches: tuple[int, ...] = (1, 8, 32)
    contexts: tuple[int, ...] = (8192, 32768, 131072)
    steps: int = 32
    prompts: tuple[int, ...] = (8192, 32768)
    only_coded: bool = False
    largest: bool = False
    out: pathlib.Path = ROOT
    render: pathlib.Path | None = None

    @property
    def sizes(self) -> LlamaConfig:
        """Of the model."""
        sizes = MODELS[self.model]
        return dataclasses.replace(sizes, layers=self.layers) if self.layers else sizes

    def spec(self, bits: float, context: int) -> QuantSpec:
        """Of a cache at this rate for so many tokens."""
        return QuantSpec.from_bits(
            bits,
            self.sizes.head_dim,
            codewords=16,
            block=self.block or (1024 if context >= 65536 else 512),
            mean_every=self.mean_every,
            layout="tiles",
        )


def peer_spec(name: str, dim: int) -> UniformSpec:
    """Of a peer's cache."""
    make = {"int8": (UniformSpec.rounded, 8), "kivi2": (UniformSpec.kivi, 2)}
    of, bits = make[name]
    return of(bits, dim, block=128)


def on_gpu() -> bool:
    """Whether the device is one."""
    return jax.devices()[0].platform == "gpu"


def _made(make: Callable[..., Any], *arguments: Any) -> Any:
    """Arrays from one compiled program, finished."""
    return jax.block_until_ready(jax.jit(make)(*arguments))


def microseconds(run: Callable[[], Any], count: int, times: int) -> dict[str, float]:
    """Median and interquartile range of ``run``'s time over ``count``."""
    jax.block_until_ready(run())
    took = []
    for _ in range(times):
        start = time.perf_counter()
        jax.block_until_ready(run())
        took.append((time.perf_counter() - start) / count * 1e6)
    quarters = np.percentile(took, [25, 50, 75])
    return {"microseconds": float(quarters[1]), "spread": float(quarters[2] - quarters[0])}


def bandwidth(times: int) -> float:
    """Bytes a second that the device's memory gives a program that reads and writes as much."""
    x = _made(lambda: jnp.ones((2**28 if on_gpu() else 2**20,), jnp.float32))
    flip = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda i, x: x * jnp.float32(i), x))
    return 2 * x.nbytes / microseconds(lambda: flip(x), 20, times)["microseconds"] * 1e6


# --- attention ------------------------------------------------------------------------------------


def coded_layer(
    key: jax.Array, config: Config, bits: float, batch: int, context: int
) -> tuple[Any, ...]:
    """What `gsrq_jax.kernels.decode.attend_tiles` takes after the query, random."""
    c, spec = config.sizes, config.spec(bits, context)
    blocks, at = context // spec.block, jax.random.split(key, 5)
    keys, values = (
        jax.random.bits(k, (batch, c.kv_heads, blocks, *s.shape), s.dtype)
        for k, s in zip(at, spec.code_shapes(), strict=False)
    )
    words, value_words = (
        jax.random.normal(k, (c.kv_heads, *code.codebook_shape)).astype(jnp.bfloat16)
        for k, code in ((at[2], spec.key), (at[3], spec.value))
    )
    mean = jax.random.normal(at[4], (c.kv_heads, c.head_dim))
    words *= jnp.bfloat16(spec.key.stages**-0.5)
    inv_freq, full = jnp.asarray(c.inv_freq), jnp.full((batch,), blocks, jnp.int32)
    return mean, inv_freq, keys, values, words, value_words, full


def exact_layer(
    key: jax.Array, config: Config, batch: int, context: int
) -> tuple[jax.Array, jax.Array]:
    """Random keys and values in bfloat16."""
    c = config.sizes
    shape = (batch, context, c.kv_heads, c.head_dim)
    k, v = (jax.random.normal(at, shape, jnp.bfloat16) for at in jax.random.split(key))
    return k, v


def rounded_layer(
    key: jax.Array, spec: UniformSpec, heads: int, batch: int, context: int
) -> tuple[Any, Any]:
    """Random codes of keys and values, and random grids."""
    lead = (batch, heads, context // spec.block)

    def draw(key: jax.Array, of: Any) -> jax.Array:
        shape = (*lead, *of.shape)
        if of.dtype == jnp.uint8:
            return jax.random.bits(key, shape, jnp.uint8)
        return (0.01 * jax.random.normal(key, shape)).astype(of.dtype)

    leaves, tree = jax.tree.flatten(spec.code_shapes())
    keys = jax.random.split(key, len(leaves))
    return jax.tree.unflatten(tree, list(map(draw, keys, leaves)))


def exact_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, lengths: jax.Array | None = None
) -> jax.Array:
    """The bf16 attention that jax has for this device."""
    return jax.nn.dot_product_attention(
        q,
        k,
        v,
        key_value_seq_lengths=lengths,
        implementation="cudnn" if on_gpu() else "xla",
    )


def profile(run: Callable[[], Any], count: int) -> dict[str, float]:
    """Microseconds of the device over ``count``, by operation; empty where no device reports it."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (file,) = glob.glob(f"{folder}/**/*.xplane.pb", recursive=True)
        data = jax.profiler.ProfileData.from_file(file)
        found: dict[str, float] = collections.defaultdict(float)
        for plane in data.planes:
            if "GPU" not in plane.name:
                continue
            for line in plane.lines:
                for event in line.events if "Stream" in line.name else ():
                    found[event.name] += event.duration_ns / 1e3 / count
    return dict(sorted(found.items(), key=lambda x: -x[1]))


def by_part(profile: Mapping[str, float]) -> dict[str, float]:
    """A profile's ``kernel``, ``products`` (of XLA) and ``rest``."""
    parts = {"products": 0.0, "rest": 0.0}
    for name, took in profile.items():
        if "mosaic" in name:
            parts["kernel"] = parts.get("kernel", 0.0) + took
        elif re.search(r"gemm|gemv|nvjet|cutlass|dot", name):
            parts["products"] += took
        else:
            parts["rest"] += took
    return parts if profile else {}


@dataclasses.dataclass(frozen=True)
class Way:
    """One attention that is timed.

    Attributes:
        what: its name.
        bits: of a stored number.
        dtype: of its query.
        attend: ``(query, *layer)`` to the output.
        layer: makes one layer's arrays from a key.
    """

    what: str
    bits: float
    dtype: Any
    attend: Callable[..., jax.Array]
    layer: Callable[[jax.Array], tuple[Any, ...]]


def ways(config: Config, batch: int, context: int) -> list[Way]:
    """All that jax runs: bf16, the peers, then each rate."""
    c = config.sizes
    group, scale = c.heads // c.kv_heads, scale_of(c.head_dim)

    def rounded(query: jax.Array, key: Any, value: Any, spec: UniformSpec) -> jax.Array:
        of_heads = query.reshape(batch, c.kv_heads, group, c.head_dim) * scale
        return uniform_attention.attend(of_heads, key, value, spec).reshape(query.shape)

    def coded(query: jax.Array, *layer: Any) -> jax.Array:
        framed = query.reshape(batch, 1, c.kv_heads, group, c.head_dim) * scale
        out, _ = decode.attend_tiles(framed, *layer, first=4, every=config.mean_every)
        return out.reshape(query.shape)

    size: dict[str, Any] = {"batch": batch, "context": context}
    exact = functools.partial(exact_layer, config=config, **size)
    name = f"{FULL}, jax ({'cuDNN' if on_gpu() else 'XLA'})"
    found = [Way(name, 16, jnp.bfloat16, exact_attention, exact)]
    for name in config.peers:
        spec = peer_spec(name, c.head_dim)
        layer = functools.partial(rounded_layer, spec=spec, heads=c.kv_heads, **size)
        attend = functools.partial(rounded, spec=spec)
        found.append(Way(f"{name}, XLA", spec.stored_bits, jnp.float32, attend, layer))
    for bits in config.bits:
        layer = functools.partial(coded_layer, config=config, bits=bits, **size)
        found.append(Way(f"{bits:g} bit", bits, jnp.float32, coded, layer))
    return found


def chained(way: Way, config: Config, batch: int) -> Any:
    """A query through all layers so many times, changed a little by each of them; compiled."""
    c, attend = config.sizes, jax.jit(way.attend)  # traced once

    def through(query: jax.Array, layers: list[Any]) -> jax.Array:
        for layer in layers:
            query = query + (attend(query, *layer) * 1e-3).astype(query.dtype)
        return query

    def run(query: jax.Array, layers: list[Any], rounds: jax.Array) -> jax.Array:
        def again(_: Any, query: jax.Array) -> jax.Array:  # nothing of it once for all rounds
            return through(*jax.lax.optimization_barrier((query, layers)))

        return jax.lax.fori_loop(0, rounds, again, query)

    query = jax.ShapeDtypeStruct((batch, 1, c.heads, c.head_dim), way.dtype)
    layer = jax.eval_shape(way.layer, jax.random.key(0))
    return jax.jit(run).lower(query, [layer] * config.repeat, jnp.int32(1)).compile()


def measure_attention(
    config: Config, batch: int, context: int, before: Callable[[], Any] = lambda: None
) -> Iterator[dict[str, Any]]:
    """Rows of one shape; the first are bf16's. ``before`` is called when all is compiled."""
    c = config.sizes
    programs = [(way, chained(way, config, batch)) for way in ways(config, batch, context)]
    before()
    per_token = 2 * c.kv_heads * c.head_dim / 8 / bandwidth(config.times) * 1e6

    def row(way: str, bits: float, took: dict[str, Any]) -> dict[str, Any]:
        found = {"part": "attention", "what": way, "batch": batch, "context": context}
        found |= {"bits": bits} | took
        print({name: x for name, x in found.items() if name != "operations"}, flush=True)
        return found | {"floor_microseconds": batch * context * bits * per_token}

    def timed(way: Way, program: Callable[..., Any]) -> dict[str, Any]:
        make = jax.jit(way.layer)
        layers = [make(key) for key in jax.random.split(jax.random.key(0), config.repeat)]
        query = jax.random.normal(jax.random.key(1), (batch, 1, c.heads, c.head_dim), way.dtype)
        run = functools.partial(program, query, layers)
        once = microseconds(lambda: run(jnp.int32(1)), 1, 3)["microseconds"]
        rounds = math.ceil(config.at_least * 1e6 / once)
        count = rounds * config.repeat
        took = microseconds(lambda: run(jnp.int32(rounds)), count, config.times)
        operations = profile(lambda: run(jnp.int32(1)), config.repeat)
        if operations:
            took["device_microseconds"] = sum(operations.values())
        return row(way.what, way.bits, took | by_part(operations) | {"operations": operations})

    rows = [timed(*programs[0])]
    if (took := torch_microseconds(config, batch, context)) is not None:
        rows.append(row(f"{FULL}, torch SDPA", 16, took))
    base = min(r["microseconds"] for r in rows)
    rest = (timed(*program) for program in programs[1:])
    for found in itertools.chain(rows, rest):
        yield found | {
            "times": base / found["microseconds"],
            **({"times_kernel": base / found["kernel"]} if "kernel" in found else {}),
        }


def torch_microseconds(config: Config, batch: int, context: int) -> dict[str, float] | None:
    """The same attention by torch, if there is one that sees the device and has the memory.

    Two layers in turn: at the sizes that are timed, each is more than the second-level cache holds.
    """
    try:
        import torch
        from torch.nn.functional import scaled_dot_product_attention
    except ImportError:
        return None
    if not (on_gpu() and torch.cuda.is_available()):
        return None
    c, kind = config.sizes, {"dtype": torch.bfloat16, "device": "cuda"}
    past = (batch, c.kv_heads, context, c.head_dim)

    def measure() -> dict[str, float]:
        query = torch.randn(batch, c.heads, 1, c.head_dim, **kind)
        layers = [(torch.randn(past, **kind), torch.randn(past, **kind)) for _ in range(2)]

        def run() -> None:
            for i in range(config.repeat):
                scaled_dot_product_attention(query, *layers[i % 2], enable_gqa=True)
            torch.cuda.synchronize()

        return microseconds(run, config.repeat, config.times)

    try:
        return measure()
    except torch.cuda.OutOfMemoryError as error:
        print(f"{FULL}, torch SDPA at {batch} x {context}: {error}", flush=True)
        return None
    finally:
        torch.cuda.empty_cache()


# --- a model's decode loop ------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=(1, 2))
def _drawn(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -1, 1) * dtype.type(shape[-1] ** -0.5)


def random_params(shapes: Any) -> Any:
    """Parameters of these shapes, small enough for numbers to stay finite."""
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    drawn = [_drawn(k, x.shape, jnp.dtype(x.dtype)) for k, x in zip(keys, leaves, strict=True)]
    return jax.tree.unflatten(tree, drawn)


def compiled(program: Any, *arguments: Any) -> tuple[Callable[..., Any], float]:
    """It, compiled for the arguments, and the most bytes that it has at a time."""
    done = program.lower(*arguments).compile(compiler_options=generation.loop_options())
    m = done.memory_analysis()
    held = m.argument_size_in_bytes + m.output_size_in_bytes - m.alias_size_in_bytes
    return done, float(held + m.temp_size_in_bytes)


def random_books(key: jax.Array, c: LlamaConfig, spec: QuantSpec) -> Codebooks:
    """Codebooks of all layers."""
    at = jax.random.split(key, 3)
    lead = (c.layers, c.kv_heads)
    words, value_words = (
        (0.3 * jax.random.normal(k, (*lead, *code.codebook_shape))).astype(jnp.bfloat16)
        for k, code in ((at[0], spec.key), (at[1], spec.value))
    )
    mean = jax.random.normal(at[2], (*lead, c.head_dim))
    inv_freq = jnp.broadcast_to(c.inv_freq, (c.layers, c.head_dim // 2))
    return Codebooks(words, value_words, mean, inv_freq, spec)


@dataclasses.dataclass(frozen=True)
class Loop:
    """A decode loop: ``carry = step(*given, carry, steps)``, compiled before its arrays are made.

    Attributes:
        step: the loop.
        nbytes: the most bytes that it has at a time.
        make: ``(given, carry)``.
    """

    step: Callable[..., Any]
    nbytes: float
    make: Callable[[], tuple[tuple[Any, ...], Any]]


def coded_loop(config: Config, bits: float, batch: int, context: int) -> Loop:
    """`gsrq_jax.models.generation.decode`."""
    c, spec = config.sizes, config.spec(bits, context)
    graphdef, shapes = llama.abstract(c, jnp.bfloat16)
    room = 2 * config.steps + 2

    def state(key: jax.Array) -> generation.DecodeState:
        cache = init_cache(
            spec,
            batch=batch,
            kv_heads=c.kv_heads,
            head_dim=c.head_dim,
            max_length=context + spec.block,
            layers=c.layers,
        )
        keys, values = (
            jax.lax.map(
                lambda k, of=of: jax.random.bits(k, of.shape[1:], of.dtype),
                jax.random.split(k, c.layers),
            )
            for k, of in zip(
                jax.random.split(key), (cache.key_codes, cache.value_codes), strict=True
            )
        )
        length = jnp.full_like(cache.length, context - room)
        return generation.DecodeState(
            cache=cache.replace(key_codes=keys, value_codes=values, length=length),
            token=jnp.zeros(batch, jnp.int32),
            done=jnp.zeros(batch, bool),
            tokens=jnp.zeros((batch, room), jnp.int32),
            count=jnp.zeros(batch, jnp.int32),
            key=jax.random.key(0),
        )

    books = functools.partial(random_books, c=c, spec=spec)
    loop = functools.partial(generation.decode, graphdef, sampler=generation.Sampler(), eos=())
    keys = jax.random.split(jax.random.key(1))
    given = shapes, jax.eval_shape(books, keys[0])
    now = jax.eval_shape(state, keys[1])
    step, nbytes = compiled(jax.jit(loop, donate_argnums=2), *given, now, jnp.int32(1))

    def make() -> tuple[tuple[Any, ...], Any]:
        return (random_params(shapes), _made(books, keys[0])), _made(state, keys[1])

    return Loop(step, nbytes, make)


def exact_loop(config: Config, batch: int, context: int) -> Loop:
    """The same over keys and values in bf16, by the best attention that jax has.

    Layers are unrolled, each with weights and a cache of its own, which is updated in place: no
    array is ever cut out of a stack.
    """
    c = config.sizes
    graphdef, shapes = llama.abstract(dataclasses.replace(c, layers=1), jnp.bfloat16)
    blocks, _ = nnx.split(nnx.merge(graphdef, shapes).layers)
    of_layer = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype),
        nnx.state(nnx.merge(graphdef, shapes).layers),
    )
    of_cache = functools.partial(exact_layer, config=config, batch=batch, context=context)
    start = jnp.int32(context - 2 * config.steps - 2), jnp.zeros(batch, jnp.int32)

    def token(params: Any, layers: Any, carry: Any) -> Any:
        at, tokens, caches = carry
        model = nnx.merge(graphdef, params)
        h = model.embed_tokens(tokens[:, None])
        lengths, new = jnp.full((batch,), at + 1), []
        for layer, (keys, values) in zip(layers, caches, strict=True):

            def attention(
                q: Any, k: Any, v: Any, _: Any, keys: Any = keys, values: Any = values
            ) -> Any:
                put = functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1)
                keys, values = put(keys, k, start_index=at), put(values, v, start_index=at)
                return exact_attention(q, keys, values, lengths), (keys, values)

            positions = jnp.full((batch, 1), at)
            h, cache = nnx.merge(blocks, layer)(h, positions, attention, None)
            new.append(cache)
        logits = model.logits(model.norm(h))[:, 0]
        return at + 1, jnp.argmax(logits, axis=-1).astype(jnp.int32), new

    def loop(params: Any, layers: Any, carry: Any, steps: Any) -> Any:
        return jax.lax.fori_loop(0, steps, lambda _, x: token(params, layers, x), carry)

    keys = jax.random.split(jax.random.key(0), c.layers)
    now = (*start, [jax.eval_shape(of_cache, keys[0])] * c.layers)
    given = shapes, [of_layer] * c.layers
    step, nbytes = compiled(jax.jit(loop, donate_argnums=2), *given, now, jnp.int32(1))

    def make() -> tuple[tuple[Any, ...], Any]:
        layers = [random_params(of_layer) for _ in range(c.layers)]
        made = jax.jit(of_cache)
        return (random_params(shapes), layers), (*start, [made(key) for key in keys])

    return Loop(step, nbytes, make)


def measure_model(
    config: Config,
    what: str,
    batch: int,
    context: int,
    before: Callable[[], Any] = lambda: None,
) -> dict[str, Any]:
    """Tokens a second of all sequences together, or why there are none.

    ``before`` is called when the loop is compiled.
    """
    row = {"part": "model", "what": what, "batch": batch, "context": context}
    row |= {"layers": config.sizes.layers, "steps": config.steps}
    try:
        if what == FULL:
            loop = exact_loop(config, batch, context)
        else:
            loop = coded_loop(config, float(what.split()[0]), batch, context)
        before()
        given, carry = loop.make()

        def run(steps: int) -> Any:
            nonlocal carry
            carry = loop.step(*given, carry, jnp.int32(steps))
            return jax.block_until_ready(carry)

        run(2)
        start = time.perf_counter()
        run(config.steps)
        took = time.perf_counter() - start
        row |= {"tokens_per_second": batch * config.steps / took, "bytes": loop.nbytes}
        operations = profile(lambda: run(config.steps), config.steps)
        row |= by_part(operations) | {"operations": operations}
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        row["error"] = "does not fit"
    print({name: x for name, x in row.items() if name != "operations"}, flush=True)
    return row


def measure_prefill(
    config: Config, what: str, context: int, before: Callable[[], Any] = lambda: None
) -> dict[str, Any]:
    """Time to read one prompt of so many tokens, and to encode it greedily, layer by layer."""
    c = config.sizes
    graphdef, shapes = llama.abstract(c, jnp.bfloat16)
    spec = None if what == FULL else config.spec(float(what.split()[0]), context)

    def books() -> Codebooks | None:
        return None if spec is None else random_books(jax.random.key(1), c, spec)

    tokens, count = jnp.zeros((1, context), jnp.int32), jnp.full(1, context)
    read = functools.partial(generation.prefill, graphdef, max_length=context)
    given = shapes, tokens, count, jax.eval_shape(books)
    program = jax.jit(read).lower(*given).compile()
    before()
    params, codec = random_params(shapes), _made(books)
    run = functools.partial(program, params, tokens, count, codec)
    took = microseconds(run, 1, 3)
    operations = profile(run, 1)
    row = {"part": "prefill", "what": what, "batch": 1, "context": context, "layers": c.layers}
    row |= took | by_part(operations) | {"operations": operations}
    print({name: x for name, x in row.items() if name != "operations"}, flush=True)
    return row


def cache_bytes(config: Config, what: str, batch: int, context: int) -> int:
    """Of a model's cache, without making it."""
    c = config.sizes
    if what == FULL:
        return 4 * batch * context * c.layers * c.kv_heads * c.head_dim
    spec = config.spec(float(what.split()[0]), context)
    make = functools.partial(
        init_cache,
        spec,
        batch=batch,
        kv_heads=c.kv_heads,
        head_dim=c.head_dim,
        max_length=context + spec.block,
        layers=c.layers,
    )
    return jax.eval_shape(make).nbytes


def fits(config: Config, what: str, memory: float, context: int | None) -> tuple[int, int]:
    """Batch and context of the largest cache, by estimate: one of the two is sought.

    A tenth of the memory is left for what is on the way.
    """
    _, shapes = llama.abstract(config.sizes, jnp.bfloat16)
    left = 0.9 * memory - 2 * llama.count(shapes)
    if context is not None:
        one, two = (cache_bytes(config, what, n, context) for n in (1, 2))
        return max(1, math.floor(1 + (left - one) / (two - one))), context
    step = 64 * 1024
    one, two = (cache_bytes(config, what, 1, n * step) for n in (1, 2))
    return 1, max(1, math.floor(1 + (left - one) / (two - one))) * step


# --- the command ----------------------------------------------------------------------------------


def run(config: Config) -> Iterator[dict[str, Any]]:
    """All rows, as they are measured."""
    if config.part in ("all", "attention"):
        for shape in config.shapes:
            batch, context = map(int, shape.split("x"))
            yield from measure_attention(config, batch, context)
    whats = [f"{bits:g} bit" for bits in config.bits]
    if config.part in ("all", "prefill"):
        for context in config.prompts:
            for what in [FULL, *whats]:
                yield measure_prefill(config, what, context)
    if config.part in ("all", "model"):
        whats = whats if config.only_coded else [FULL, *whats]
        for context in config.contexts:
            for batch in config.batches:
                for what in whats:
                    yield measure_model(config, what, batch, context)
        stats = jax.devices()[0].memory_stats() or {}
        if config.largest and "bytes_limit" in stats:
            for longest in (*config.contexts, None):
                for what in whats:
                    sizes = fits(config, what, stats["bytes_limit"], longest)
                    yield measure_model(config, what, *sizes)


def markdown(data: Mapping[str, Any]) -> str:
    """The tables."""
    lines = [
        f"`{data['command']}` on {data['device']}, jax {data['versions']['jax']}, "
        f"{data['date'][:10]}.",
        "",
    ]
    rows = [r for r in data["rows"] if r["part"] == "attention"]
    if rows:
        lines += [
            "| batch × context | attention | µs | on the device | of it the kernel | floor "
            "| times bf16 | the kernel alone |",
            "| --- | --- | --- | --- | --- | --- | --- | --- |",
        ]
    for r in rows:
        device, kernel = (
            f"{r[name]:.1f}" if name in r else "–" for name in ("device_microseconds", "kernel")
        )
        alone = f"{r['times_kernel']:.1f} ×" if r.get("times_kernel") else "–"
        lines.append(
            f"| {r['batch']} × {r['context']:,} | {r['what']} | {r['microseconds']:.1f} "
            f"| {device} | {kernel} | {r['floor_microseconds']:.1f} | {r['times']:.1f} × "
            f"| {alone} |"
        )
    rows = [r for r in data["rows"] if r["part"] == "model"]
    if rows:
        lines += [
            "",
            f"Decode loop of {data['config']['model']}'s shapes, {rows[0]['layers']} layers, "
            "random weights in bf16, random cache:",
            "",
            "| batch × context | cache | tokens/s | memory, GB |",
            "| --- | --- | --- | --- |",
        ]
    for r in rows:
        speed = f"{r['tokens_per_second']:.0f}" if "error" not in r else r["error"]
        memory = f"{r['bytes'] / 1e9:.1f}" if "error" not in r else "–"
        lines.append(f"| {r['batch']} × {r['context']:,} | {r['what']} | {speed} | {memory} |")
    rows = [r for r in data["rows"] if r["part"] == "prefill"]
    if rows:
        lines += [
            "",
            f"Reading one prompt, {rows[0]['layers']} layers, exact attention, each layer's keys "
            "and values encoded greedily:",
            "",
            "| tokens | cache | ms | more than bf16 |",
            "| --- | --- | --- | --- |",
        ]
    exact = {r["context"]: r["microseconds"] for r in rows if r["what"] == FULL}
    for r in rows:
        more = r["microseconds"] / exact.get(r["context"], math.nan) - 1
        lines.append(
            f"| {r['context']:,} | {r['what']} | {r['microseconds'] / 1e3:.1f} | {more:+.1%} |"
        )
    return "\n".join([*lines, ""])


def picture(data: Mapping[str, Any], path: pathlib.Path) -> None:
    """Microseconds of attention by shape, against the floor of their bytes."""
    rows = [r for r in data["rows"] if r["part"] == "attention"]
    shapes = list(dict.fromkeys((r["batch"], r["context"]) for r in rows))
    whats = list(dict.fromkeys(r["what"] for r in rows))
    figure, axis = plt.subplots(figsize=(8, 4))
    for i, what in enumerate(whats):
        found = {(r["batch"], r["context"]): r for r in rows if r["what"] == what}
        places = [n + 0.8 * (i / len(whats) - 0.5) for n, s in enumerate(shapes) if s in found]
        took = [found[s]["microseconds"] for s in shapes if s in found]
        bars = axis.bar(places, took, 0.8 / len(whats), align="edge", label=what)
        axis.bar_label(bars, fmt="%.0f", fontsize=7)
        floor = [found[s]["floor_microseconds"] for s in shapes if s in found]
        width = 0.8 / len(whats)
        axis.hlines(floor, places, [p + width for p in places], colors="black", lw=1)
    axis.set_yscale("log")
    axis.set_ylabel("µs a layer; the line: its bytes alone")
    axis.set_xticks(range(len(shapes)), [f"{b} × {n:,}" for b, n in shapes])
    axis.legend(frameon=False, fontsize=8)
    axis.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=130)


def main(config: Config) -> None:
    """Measures, writes the result file, and table and plot from it."""
    if config.quick:
        config = dataclasses.replace(
            config,
            shapes=config.shapes[:1],
            batches=config.batches[:1],
            contexts=config.contexts[:1],
            prompts=config.prompts[:1],
            layers=min(4, config.sizes.layers),
            repeat=min(3, config.repeat),
            times=min(5, config.times),
        )
    card = re.sub(r"[^a-z0-9]+", "-", jax.devices()[0].device_kind.lower()).strip("-")
    file = config.render or config.out / "results" / "decode-speed" / f"{card}.json"
    if config.render is None:
        fields = dataclasses.asdict(config)
        fields.pop("out")
        command = shlex.join(["python", "benchmarks/decode_speed.py", *sys.argv[1:]])
        rows: list[dict[str, Any]] = []
        for row in run(config):
            rows.append(row)
            write_result(file, rows, command=command, config=fields)
    data = json.loads(file.read_text(encoding="utf-8"))
    table = markdown(data)
    file.with_suffix(".md").write_text(table, encoding="utf-8")
    if any(r["part"] == "attention" for r in data["rows"]):
        picture(data, file.with_suffix(".png"))
    print(table)


if __name__ == "__main__":
    commands.run(Config, main, None)
