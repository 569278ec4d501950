"""What the TPU's own compiler makes of training on pods: memory, work and traffic of each chip.

    pip install 'jax[tpu]'
    JAX_PLATFORMS=cpu python benchmarks/compile_for_pods.py

Compiles the step that captures keys, values and sensitivities, and the one that fits a layer's
codebooks, for shapes of LLaMA 3 on the topologies named, without a TPU. Writes
`results/compiled-for-pods.json`, or ends with exit code 1 if a chip's memory does not suffice, or
points, codes or codebooks are gathered, and exit code 2 if libtpu is not there.
"""

import collections
import dataclasses
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

from gsrq_jax.calibration import DATA, MODEL, FitOptions, LayerSamples
from gsrq_jax.errors import InputError
from gsrq_jax.models import llama, sharding, training
from gsrq_jax.models.config import LLAMA_3_8B, LlamaConfig
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
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compiled.

    Attributes:
        cases: topology and model of each, such as ``v5e:16x16=llama-3-70b``.
        length: tokens of a sequence, of which each step captures one for each part of the mesh's
            ``data`` axis.
        sequences: that a layer is fitted to.
        bits: nominal bits a number.
        codewords: of a stage.
        out: folder under which ``results`` lies.
    """

    cases: tuple[str, ...] = (
        "v5e:2x2=llama-3-8b",
        "v5e:16x16=llama-3-8b",
        "v5e:16x16=llama-3-70b",
        "v5p:4x4x4=llama-3-70b",
        "v6e:16x16=llama-3-70b",
    )
    length: int = 2048
    sequences: int = 512
    bits: float = 1.0
    codewords: int = 256
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

    def spread(shape: tuple[int, ...], dtype: Any, *axes: str) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*axes)))

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


def measured(lowered: Any, memory: int) -> dict[str, Any]:
    """What the compiler says of a step, for one chip of so many GiB.

    FLOP and bytes are as it counts them: the body of a loop once.
    """
    begin = time.perf_counter()
    try:
        compiled = lowered.compile()
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
        "collectives": [dataclasses.asdict(x) for x in collectives(compiled.as_text())],
    }
    if total > memory * GIB:
        row["problem"] = f"{total / GIB:.1f} GiB do not fit a chip of {memory}"
    return row


def gathered(row: dict[str, Any], whole: Callable[[str, int], bool]) -> dict[str, str]:
    """The problem that something is exchanged whole, if it is: ``whole(shape, bytes)`` judges."""
    for x in row.get("collectives", []):
        if x["kind"] != "all-reduce" and any(
            whole(shape, x["nbytes"]) for shape in x["shape"].split()
        ):
            return {"problem": f"unexpected {x['kind']} of {x['shape']}, {x['nbytes']:,} bytes"}
    return {}


def compiled(
    case: str, config: Config, fits: dict[tuple[str, int, int], dict[str, Any]]
) -> list[dict[str, Any]]:
    """Rows of one case: the capture, and the fit of a layer, which models share by ``fits``."""
    topology, _, name = case.partition("=")
    chip = topology.partition(":")[0]
    if name not in MODELS or chip not in MEMORY:
        raise InputError(
            f"cannot compile {case}; give a topology of {', '.join(MEMORY)}, =, and a model of "
            f"{', '.join(MODELS)}"
        )
    model = MODELS[name]
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:
        raise InputError(f"libtpu does not give the topology {topology} ({error})") from error
    mesh = sharding.make_mesh(model.kv_heads, devices=devices)
    assert mesh is not None
    spec = QuantSpec.from_bits(config.bits, model.head_dim, codewords=config.codewords)
    tokens = config.sequences * (config.length - spec.sinks)
    heads = model.kv_heads // mesh.shape[MODEL]
    facts = {"topology": topology, "model": name, "mesh": dict(mesh.shape)}

    # Parameters are gathered, layer by layer; keys and values stay with their sequences.
    def samples(shape: str, _: int) -> bool:
        return shape.endswith(tuple(f",{n},{heads},{model.head_dim}]" for n in lengths))

    lengths = config.length, config.length - spec.sinks
    row = measured(captured(model, mesh, config.length), MEMORY[chip])
    sizes = {"step": "capture", "tokens": mesh.shape[DATA] * config.length}
    rows = [facts | sizes | row | gathered(row, samples)]
    show(rows[-1])

    # Of a fit scores of draws are gathered; points, codes and codebooks are not.
    def more_than_scores(_: str, nbytes: int) -> bool:
        return nbytes > 4 * heads * config.codewords * mesh.shape[DATA]

    shape = (topology, model.kv_heads, model.head_dim)
    if shape not in fits:
        fits[shape] = measured(fitted(model, mesh, tokens, spec), MEMORY[chip])
    row = fits[shape]
    rows.append(facts | {"step": "fit", "tokens": tokens} | row | gathered(row, more_than_scores))
    show(rows[-1])
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


def main(config: Config) -> None:
    """Compiles all cases and writes the result file."""
    if importlib.util.find_spec("libtpu") is None:
        raise InputError(
            "libtpu is not installed; pip install 'jax[tpu]', and set JAX_PLATFORMS=cpu"
        )
    fits: dict[tuple[str, int, int], dict[str, Any]] = {}
    rows = [row for case in config.cases for row in compiled(case, config, fits)]
    write_result(
        config.out / "results" / "compiled-for-pods.json",
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
