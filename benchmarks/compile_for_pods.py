"""What the TPU's own compiler makes of our steps on pods: memory, work and traffic of each chip.

    pip install 'jax[tpu]'
    JAX_PLATFORMS=cpu python benchmarks/compile_for_pods.py

Compiles the step that captures keys, values and sensitivities, the one that fits a layer's
codebooks, the reading of a prompt in chunks and the decode loop over a coded cache, for shapes of
LLaMA 3 on the topologies named, without a TPU. Writes `results/compiled-for-pods.json` (for
``--layout words``, in which decoding is the fused kernel's, `compiled-for-pods-fused.json`), and
ends with exit code 1 if a chip's memory does not suffice or points, codes or codebooks are
gathered, and exit code 2 if libtpu is not there. `docs/pods.md` has the tables.
"""

import collections
import dataclasses
import functools
import importlib.metadata
import importlib.util
import math
import pathlib
import re
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from gsrq_jax import sharded
from gsrq_jax.calibration import DATA, MODEL, FitOptions, LayerSamples
from gsrq_jax.codebook import Codebooks
from gsrq_jax.errors import InputError
from gsrq_jax.layouts import LayoutName
from gsrq_jax.models import generation, llama, sharding, training
from gsrq_jax.models.config import LLAMA_3_8B, LlamaConfig
from gsrq_jax.models.generation import DecodeState, Sampler
from gsrq_jax.results import repeated, write_result
from gsrq_jax.spec import QuantSpec

ROOT = pathlib.Path(__file__).parent.parent
GIB = 2**30
MEMORY = {"v5e": 16, "v5p": 95, "v6e": 32}
"""GiB of a chip, by the first part of a topology's name."""

MODELS = {
    "llama-3-8b": LLAMA_3_8B,
    "llama-3-70b": dataclasses.replace(
        LLAMA_3_8B, hidden_size=8192, intermediate_size=28_672, layers=80, heads=64
    ),
}
STEPS = ("capture", "fit", "prefill", "decode")
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compiled.

    Attributes:
        cases: topology and model of each, such as ``v5e:16x16=llama-3-70b``.
        steps: of `STEPS`.
        length: tokens of a sequence, of which each step captures one for each part of the mesh's
            ``data`` axis.
        sequences: that a layer is fitted to.
        bits: nominal bits a number.
        codewords: of a stage of codebooks that are fitted.
        contexts: tokens of the caches that are read into and decoded from.
        chunk: tokens of a prompt that are read at a time.
        block: tokens of a cache's block.
        cache_codewords: of a stage of a cache's codes.
        layout: of these codes; in ``words`` decoding is the fused TPU kernel's.
        out: folder under which ``results`` lies.
    """

    cases: tuple[str, ...] = (
        "v5e:2x2=llama-3-8b",
        "v5e:4x4=llama-3-8b",
        "v5e:16x16=llama-3-8b",
        "v5e:16x16=llama-3-70b",
        "v5p:4x4x4=llama-3-70b",
        "v6e:16x16=llama-3-70b",
    )
    steps: tuple[str, ...] = STEPS
    length: int = 2048
    sequences: int = 512
    bits: float = 1.0
    codewords: int = 256
    contexts: tuple[int, ...] = (131_072, 1_048_576)
    chunk: int = 2048
    block: int = 256
    cache_codewords: int = 16
    layout: LayoutName = "packed"
    out: pathlib.Path = ROOT


@dataclasses.dataclass(frozen=True)
class Collective:
    """One kind of exchange in a program: its shapes with how many there are of each."""

    kind: str
    shape: str
    count: int
    nbytes: int


def collectives(hlo: str) -> list[Collective]:
    """Those of a compiled program, by kind and shape of what comes out; largest first."""
    found: collections.Counter[tuple[str, str]] = collections.Counter()
    for line in hlo.splitlines():
        match = re.search(rf"= (.*?) ({'|'.join(COLLECTIVES)})(?:-start)?\(", line)
        if match:
            shapes = re.findall(r"[a-z]\w*\[[\d,]*\]", match[1])
            if f"{match[2]}-start(" in line and match[2] != "all-reduce":
                shapes = shapes[len(shapes) // 2 :]  # of what goes in and what comes out
            found[match[2], " ".join(shapes)] += 1
    rows = [
        Collective(kind, shape, count, sum(map(_nbytes, shape.split())))
        for (kind, shape), count in found.items()
    ]
    return sorted(rows, key=lambda row: -row.nbytes)


def _nbytes(shape: str) -> int:
    kind, _, sizes = shape.rstrip("]").partition("[")
    bits = 8 if kind == "pred" else int(re.findall(r"\d+", kind)[0])
    return math.prod(int(n) for n in sizes.split(",") if n) * bits // 8


def captured(model: LlamaConfig, mesh: Mesh, length: int) -> Any:
    """The capture step of bfloat16 parameters, lowered."""
    graphdef, params = llama.abstract(model, jnp.bfloat16)
    step = training.sharded_samples(mesh, model, graphdef, params, first=4, weigh=True)
    tokens = jax.ShapeDtypeStruct((mesh.shape[DATA], length), jnp.int32)
    return step.lower(params, tokens)


def fitted(model: LlamaConfig, mesh: Mesh, tokens: int, spec: QuantSpec) -> Any:
    """The step that fits one layer's codebooks to so many tokens, lowered."""

    spread = functools.partial(shape_of, mesh)
    heads, dim = model.kv_heads, model.head_dim
    vectors = spread((tokens, heads, dim), jnp.bfloat16, DATA, MODEL)
    norms = spread((tokens, heads), jnp.float32, DATA, MODEL)
    positions = spread((tokens,), jnp.int32, DATA)
    return training.fit_layer_compiled.lower(
        spread((), jax.random.key(0).dtype),
        LayerSamples(vectors, vectors, norms, norms, positions),
        spread((dim // 2,), jnp.float32),
        spread((heads, dim, dim), jnp.float32),
        spec,
        options=FitOptions(),
        weigh=True,
        mesh=mesh,
    )


def shape_of(mesh: Mesh, shape: tuple[int, ...], dtype: Any, *axes: Any) -> jax.ShapeDtypeStruct:
    """An array that is spread like that."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))


def placed(mesh: Mesh, axes: Any, tree: Any) -> Any:
    """Shapes of a pytree, of which ``axes`` are a prefix, with where they live."""

    def of(axes: P, part: Any) -> Any:
        return jax.tree.map(lambda x: shape_of(mesh, x.shape, x.dtype, *axes), part)

    return jax.tree.map(of, axes, tree, is_leaf=lambda x: isinstance(x, P))


def on_mesh(mesh: Mesh, sizes: LlamaConfig) -> tuple[Any, Any]:
    """A bfloat16 model and the shapes of its parameters where they live."""
    graphdef, shapes = llama.abstract(sizes, jnp.bfloat16)
    put = functools.partial(jax.tree.map, lambda x, w: shape_of(mesh, x.shape, x.dtype, *w.spec))
    return graphdef, put(shapes, sharding.shardings(mesh, shapes))


def books_on(mesh: Mesh, sizes: LlamaConfig, spec: QuantSpec) -> Codebooks:
    """Shapes of a model's codebooks where they live."""
    of, heads = jax.ShapeDtypeStruct, (sizes.layers, sizes.kv_heads)
    books: Any = Codebooks(
        key=of((*heads, *spec.key.codebook_shape), jnp.bfloat16),
        value=of((*heads, *spec.value.codebook_shape), jnp.bfloat16),
        key_mean=of((*heads, sizes.head_dim), jnp.float32),
        inv_freq=of((sizes.layers, sizes.head_dim // 2), jnp.float32),
        spec=spec,
    )
    return placed(mesh, sharded.codec_axes(books, stacked=True), books)


def prefilled(model: LlamaConfig, mesh: Mesh, spec: QuantSpec, context: int, chunk: int) -> Any:
    """The reading of one prompt that fills the cache, lowered."""
    graphdef, params = on_mesh(mesh, model)
    books = books_on(mesh, model, spec)
    tokens, count = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((1, context), (1,)))
    step = functools.partial(generation.read, graphdef, chunk=chunk, max_length=context, mesh=mesh)
    tokens, count = placed(mesh, P(), (tokens, count))
    return jax.jit(step).lower(params, tokens, count, books)


def decoded(model: LlamaConfig, mesh: Mesh, spec: QuantSpec, context: int) -> Any:
    """The loop that writes one sequence greedily, lowered."""
    graphdef, params = on_mesh(mesh, model)
    books = books_on(mesh, model, spec)
    sampler = Sampler()

    def state() -> DecodeState:
        cache = sharded.init_cache(
            mesh,
            spec,
            batch=1,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            max_length=context,
            layers=model.layers,
        )
        logits, key = jnp.zeros((1, model.vocab_size)), jax.random.key(0)
        return generation.start(cache, logits, key, max_new_tokens=256, sampler=sampler, eos=())

    whole = jax.eval_shape(state)
    axes = sharded.cache_axes(spec, stacked=True)
    rest = placed(mesh, P(), whole.replace(cache=None))
    step = functools.partial(generation.decode, graphdef, sampler=sampler, eos=(), mesh=mesh)
    return jax.jit(step, donate_argnums=2).lower(
        *(params, books, rest.replace(cache=placed(mesh, axes, whole.cache))),
        placed(mesh, P(), jax.ShapeDtypeStruct((), jnp.int32)),
    )


def measured(lowered: Any, memory: int) -> dict[str, Any]:
    """What the compiler says of a step, for one chip of so many GiB.

    FLOP and bytes are as it counts them: the body of a loop once.
    """
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
        text = compiled.as_text()  # a libtpu much newer than jaxlib may write what it cannot read
    except jax.errors.JaxRuntimeError as error:
        return {"problem": str(error).splitlines()[0][:300]}
    seconds = time.perf_counter() - begin
    used, cost = compiled.memory_analysis(), compiled.cost_analysis()
    total = (
        used.argument_size_in_bytes
        + used.output_size_in_bytes
        + used.temp_size_in_bytes
        + used.generated_code_size_in_bytes
        - used.alias_size_in_bytes
    )
    row = {
        "hbm_gib": round(total / GIB, 3),
        "memory_gib": memory,
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "compile_seconds": round(seconds, 1),
        "collectives": [dataclasses.asdict(x) for x in collectives(text)],
    }
    if total > memory * GIB:
        row["problem"] = f"{total / GIB:.1f} GiB do not fit a chip of {memory}"
    return row


def gathered(row: dict[str, Any], whole: Callable[[str, int], bool]) -> dict[str, str]:
    """The problem that something is exchanged whole, if it is: ``whole(shape, bytes)`` judges.

    Sums of floating numbers may be exchanged always.
    """
    for x in row.get("collectives", []):
        shapes = x["shape"].split()
        if x["kind"] == "all-reduce":
            # Codes are bytes or words; a few words are where the largest logits are.
            codes = [shape for shape in shapes if shape.startswith(("u8[", "u32[", "s32["))]
            wrong = any(_nbytes(shape) > 64 for shape in codes)
        else:
            wrong = any(whole(shape, x["nbytes"]) for shape in shapes)
        if wrong:
            return {"problem": f"unexpected {x['kind']} of {x['shape']}, {x['nbytes']:,} bytes"}
    return {}


def compiled(
    case: str, config: Config, fits: dict[tuple[str, int, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of one case, a step each; the fit of a layer is one that models share, by ``fits``."""
    topology, _, name = case.partition("=")
    chip = topology.partition(":")[0]
    if name not in MODELS or chip not in MEMORY:
        raise InputError(
            f"cannot compile {case}; give a topology of {', '.join(MEMORY)}, =, and a model of "
            f"{', '.join(MODELS)}"
        )
    if not set(config.steps) <= set(STEPS):
        raise InputError(f"there are the steps {', '.join(STEPS)}, got {', '.join(config.steps)}")
    model = MODELS[name]
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        raise InputError(f"libtpu does not give the topology {topology} ({error})") from error
    mesh = sharding.make_mesh(model.kv_heads, devices=devices)
    assert mesh is not None
    heads = model.kv_heads // mesh.shape[MODEL]
    rows = []

    def note(
        step: str, tokens: int, row: dict[str, Any], whole: Callable[[str, int], bool]
    ) -> None:
        facts = {"topology": topology, "model": name, "mesh": dict(mesh.shape)}
        rows.append(facts | {"step": step, "tokens": tokens} | row | gathered(row, whole))
        show(rows[-1])

    spec = QuantSpec.from_bits(config.bits, model.head_dim, codewords=config.codewords)
    if "capture" in config.steps:
        lengths = config.length, config.length - spec.sinks

        # Parameters are gathered, layer by layer; keys and values stay with their sequences.
        def samples(shape: str, _: int) -> bool:
            return shape.endswith(tuple(f",{n},{heads},{model.head_dim}]" for n in lengths))

        row = measured(captured(model, mesh, config.length), MEMORY[chip])
        note("capture", mesh.shape[DATA] * config.length, row, samples)
    if "fit" in config.steps:
        # Of a fit scores of draws are gathered; points, codes and codebooks are not.
        def more_than_scores(_: str, nbytes: int) -> bool:
            return nbytes > 4 * heads * config.codewords * mesh.shape[DATA]

        tokens = config.sequences * (config.length - spec.sinks)
        shape = (topology, model.kv_heads, model.head_dim)
        if shape not in fits:
            fits[shape] = measured(fitted(model, mesh, tokens, spec), MEMORY[chip])
        note("fit", tokens, fits[shape], more_than_scores)
    spec = QuantSpec.from_bits(
        config.bits,
        model.head_dim,
        codewords=config.cache_codewords,
        block=config.block,
        layout=config.layout,
    )
    # Generation exchanges sums alone: no weights either.
    for context in config.contexts:
        if "prefill" in config.steps:
            row = measured(prefilled(model, mesh, spec, context, config.chunk), MEMORY[chip])
            note("prefill", context, row, lambda *_: True)
        if "decode" in config.steps:
            row = measured(decoded(model, mesh, spec, context), MEMORY[chip])
            note("decode", context, row, lambda *_: True)
    return rows


def show(row: dict[str, Any]) -> None:
    """One row, for people."""
    mesh = " × ".join(f"{n} {axis}" for axis, n in row["mesh"].items())
    print(f"{row['topology']} {row['model']} {row['step']}, {mesh}, {row['tokens']:,} tokens")
    if "hbm_gib" in row:
        print(
            f"  {row['hbm_gib']} of {row['memory_gib']} GiB, {row['flops']:.3g} FLOP, "
            f"{row['bytes_accessed']:.3g} bytes, compiled in {row['compile_seconds']} s"
        )
        for x in row["collectives"][:6]:
            print(f"  {x['count']} × {x['kind']} {x['shape'][:100]}: {x['nbytes']:,} bytes")
    print(f"  PROBLEM: {row['problem']}" if "problem" in row else "  fits", flush=True)


def table_row(row: dict[str, Any]) -> str:
    """One row of the table in docs/pods.md."""
    exchanged = sum(x["count"] * x["nbytes"] for x in row["collectives"])
    mesh = " × ".join(str(n) for n in row["mesh"].values())
    return (
        f"| {row['topology']} ({mesh}) | {row['model']} | {row['step']} | {row['tokens']:,} | "
        f"{row['hbm_gib']:.2f} of {row['memory_gib']} | {row['flops']:.2e} | "
        f"{row['bytes_accessed']:.2e} | {exchanged:,} |"
    )


def main(config: Config) -> None:
    """Compiles all cases and writes the result file."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "libtpu is not installed; pip install 'jax[tpu]', and set JAX_PLATFORMS=cpu"
        )
    fits: dict[tuple[str, int, int], dict[str, Any]] = {}
    rows: list[dict[str, Any]] = []
    names = {"words": "-fused"}
    for case in config.cases:
        rows += compiled(case, config, fits)
        write_result(
            config.out / "results" / f"compiled-for-pods{names.get(config.layout, '')}.json",
            rows,
            command="JAX_PLATFORMS=cpu python "
            + repeated("benchmarks/compile_for_pods.py", instead={}, without=("--out",)),
            compiler=importlib.metadata.version("libtpu"),
        )
    if any("problem" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main(tyro.cli(Config, description=__doc__))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from error
