"""What TPU's own compiler says that attention over codes and encoding cost, without a TPU.

    python benchmarks/tpu_schedule.py
    python benchmarks/tpu_schedule.py --planes

Needs `libtpu`. Compiles the decode kernel for LLaMA-3-8B's shapes, and JAX's own paged and ragged
paged attention in bfloat16 beside it, counts the instruction bundles of the compiler's static
schedule, one a cycle; the same for the encoding kernel, beside the estimates that XLA gives of the
operations of our encoder in plain jnp. Writes `results/tpu-schedule.json`; with ``--planes`` only
the kernel over bit planes, beside the one over words of as many bits, and
`results/tpu-schedule-planes.json`. These are estimates:
waiting for memory is not in them; what memory takes is the column beside them, bytes by bandwidth.
Nothing here ran on a TPU.
"""

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import pathlib
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import tyro
from jax.experimental import topologies
from jax.experimental.pallas.ops.tpu.paged_attention import paged_attention
from jax.experimental.pallas.ops.tpu.ragged_paged_attention import ragged_paged_attention
from jax.sharding import Mesh, SingleDeviceSharding

from gsrq_jax import residual
from gsrq_jax.kernels import devices, mosaic_tpu, mosaic_tpu_encode, mosaic_tpu_planes
from gsrq_jax.kernels.words import words_of
from gsrq_jax.results import write_result

ROOT = pathlib.Path(__file__).parent.parent
DECODING, ENCODING = "decode attention, a token and layer", "encoding, a token and layer"
HEADS, GROUP, DIM = 8, 4, 128
"""KV heads, query heads of each, channels: LLaMA-3-8B."""


@dataclasses.dataclass(frozen=True)
class Chip:
    """What is not in the compiler's report.

    Attributes:
        topology: its smallest slice by the compiler's name.
        cores: that share a chip's KV heads; a schedule is one core's.
        ghz: clock. v5e and v5p: peak bfloat16 rate over four MXUs of 128 × 128. v6e: assumed, the
            peak over four of 256 × 256.
        gbps: memory bandwidth of a chip, as Google publishes it.
    """

    topology: str
    cores: int
    ghz: float
    gbps: float


CHIPS = {
    "v5e": Chip("v5e:2x2", 1, 1.5, 819),
    "v5p": Chip("v5p:2x2x1", 2, 1.75, 2765),
    "v6e": Chip("v6e:2x2", 1, 1.75, 1640),
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Shapes to compile.

    Attributes:
        chips: names of `CHIPS`.
        blocks: tokens of a block.
        stages: of keys and of values, with 16 codewords each; 32 are one bit.
        context: tokens of a sequence.
        page: tokens of a page of the bfloat16 baseline.
        span: tokens that the baseline takes at a time.
        codes: stages and codewords of what is encoded; each is one bit.
        vectors: of a KV head that are encoded.
        planes: whether bit planes are looked at, and nothing else.
        together: KV heads that share planes, each number in turn.
        out: folder under which ``results`` lies.
    """

    chips: tuple[str, ...] = tuple(CHIPS)
    blocks: tuple[int, ...] = (256, 512)
    stages: tuple[int, ...] = (32, 16)
    context: int = 131_072
    page: int = 512
    span: int = 2048
    codes: tuple[tuple[int, int], ...] = ((32, 16), (16, 256))
    vectors: int = 8192
    planes: bool = False
    together: tuple[int, ...] = (1, 2)
    out: pathlib.Path = ROOT


def bundles(text: str) -> dict[int, int]:
    """Bundles of a schedule by the number of loops that they are in.

    Each counts once, also those of branches that are seldom taken.
    """
    count: dict[int, int] = {}
    for line in text.splitlines():
        if found := re.match(r"\s*(?:0x[0-9a-f]+|0)\s+(?:\w\w)?\s*:\s*([> ]*)\{", line):
            depth = found.group(1).count(">")
            count[depth] = count.get(depth, 0) + 1
    return count


def schedule(
    dump: pathlib.Path, kernel: str, function: Callable, shapes: tuple, chip: Chip
) -> dict[int, int]:
    """Bundles of the kernel whose name begins with ``kernel``, once compiled for ``chip``."""
    shutil.rmtree(dump, ignore_errors=True)
    compiled(function, shapes, chip)
    (file,) = (
        path
        for path in dump.rglob(f"*-{kernel}*final_bundles.txt")
        if "schedule-analysis" not in path.name
    )
    return bundles(file.read_text())


def compiled(function: Callable, shapes: tuple, chip: Chip) -> Any:
    """The function of arrays of these shapes, compiled for one device."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip.topology).devices[0]
    sharding = SingleDeviceSharding(device)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), shapes
    )
    # Some of JAX's kernels ask what chip they are for.
    with jax.sharding.use_abstract_mesh(Mesh([device], ("chip",)).abstract_mesh):
        lowered = jax.jit(function).lower(*shapes)
    return lowered.compile()


def ours(dump: pathlib.Path, chip: Chip, config: Config, block: int, stages: int) -> dict[str, Any]:
    """One row: the kernel over codes."""
    of, blocks = jax.ShapeDtypeStruct, config.context // block
    tiling = mosaic_tpu.tiling_of(GROUP, blocks, block)
    words = words_of(stages)
    codes = of((1, HEADS, config.context * words // 128, 128), jnp.int32)
    found = schedule(
        dump,
        "attend_codes",
        functools.partial(mosaic_tpu.fused_kernel, tiling=tiling),
        (
            of((1, HEADS, blocks * tiling.rows, DIM), jnp.float32),
            of((HEADS, block, DIM), jnp.float32),
            codes,
            codes,
            of((HEADS, words * 128, DIM), jnp.float32),
            of((1,), jnp.int32),
        ),
        chip,
    )
    step = found[1] + found.get(2, 0) * (tiling.chunk // tiling.group)
    query_bytes = 4 * tiling.rows * DIM / block
    return {
        "implementation": "kernels/mosaic_tpu.py",
        "bits": 4 * stages / DIM,
        "block": block,
        **{"bundles_a_step": step, "tokens_a_step": tiling.chunk * block},
        **times(chip, step / (tiling.chunk * block), 2 * 4 * words + query_bytes),
    }


def bit_planes(
    dump: pathlib.Path, chip: Chip, config: Config, block: int, bits: float, together: int
) -> dict[str, Any]:
    """One row: the kernel over planes of heads that share them."""
    of, blocks, stages = jax.ShapeDtypeStruct, config.context // block, int(bits * DIM * together)
    tiling = mosaic_tpu_planes.tiling_of(GROUP, together, blocks, block)
    programs, rows = HEADS // tiling.heads, tiling.heads * tiling.rows
    wide = tiling.heads * DIM
    pairs = mosaic_tpu_planes.paired(stages, tiling.parts)
    contracted = len(mosaic_tpu_planes.key_rows(stages, pairs)[0])
    codes = of((1, HEADS // together, config.context // 32, stages), jnp.int32)
    found = schedule(
        dump,
        "attend_planes",
        functools.partial(mosaic_tpu_planes.fused_kernel, tiling=tiling),
        (
            of((1, programs, blocks * rows, DIM), jnp.float32),
            of((programs, block, wide), jnp.float32),
            codes,
            codes,
            of((programs, contracted, wide), jnp.float32),
            of((1,), jnp.int32),
        ),
        chip,
    )
    step, tokens = found[1], tiling.chunk * block
    nbytes = programs * (2 * stages / 8 + 4 * rows * DIM / block)  # a token, all heads
    return {
        "implementation": "kernels/mosaic_tpu_planes.py",
        "bits": bits,
        "block": block,
        "heads_together": together,
        **{"bundles_a_step": step, "tokens_a_step": tokens},
        **times(chip, step / tokens * programs / HEADS, nbytes / HEADS),
    }


def bfloat16(dump: pathlib.Path, chip: Chip, config: Config) -> dict[str, Any]:
    """One row: JAX's paged attention."""
    of, pages = jax.ShapeDtypeStruct, config.context // config.page
    cache = of((HEADS, pages, config.page, DIM), jnp.bfloat16)
    found = schedule(
        dump,
        "paged_attention",
        functools.partial(paged_attention, pages_per_compute_block=config.span // config.page),
        (
            of((1, HEADS * GROUP, DIM), jnp.bfloat16),
            cache,
            cache,
            of((1,), jnp.int32),
            of((1, pages), jnp.int32),
        ),
        chip,
    )
    return {
        "implementation": "jax.experimental.pallas.ops.tpu.paged_attention",
        "bits": 16,
        "block": config.page,
        **{"bundles_a_step": found[2], "tokens_a_step": config.span},
        **times(chip, found[2] / config.span, 2 * 2 * DIM),
    }


def ragged(dump: pathlib.Path, chip: Chip, config: Config) -> dict[str, Any]:
    """One row: JAX's ragged paged attention, which takes all KV heads at once, on one core."""
    of, pages = jax.ShapeDtypeStruct, config.context // config.page
    found = schedule(
        dump,
        "ragged_paged_attention",
        functools.partial(
            ragged_paged_attention,
            num_kv_pages_per_block=config.span // config.page,
            num_queries_per_block=1,
            vmem_limit_bytes=48 * 2**20,
        ),
        (
            of((1, HEADS * GROUP, DIM), jnp.bfloat16),
            of((pages, config.page, 2 * HEADS, DIM), jnp.bfloat16),
            of((1,), jnp.int32),
            of((1, pages), jnp.int32),
            of((2,), jnp.int32),
            of((1,), jnp.int32),
        ),
        chip,
    )
    step = found[max(found)]  # loops that are run through once are none in the schedule
    return {
        "implementation": "jax.experimental.pallas.ops.tpu.ragged_paged_attention",
        "bits": 16,
        "block": config.page,
        **{"bundles_a_step": step, "tokens_a_step": config.span},
        **times(chip, step / config.span / HEADS * chip.cores, 2 * 2 * DIM),
    }


def encoded(
    dump: pathlib.Path, chip: Chip, config: Config, stages: int, codewords: int
) -> list[dict[str, Any]]:
    """Two rows: encoding keys and values by the kernel, and by our encoder through XLA."""
    of = jax.ShapeDtypeStruct
    words = of((HEADS, 1, stages, codewords, DIM), jnp.float32)
    found = schedule(
        dump,
        "encode",
        mosaic_tpu_encode.encode,
        (of((HEADS, config.vectors, DIM), jnp.float32), words),
        chip,
    )
    step = found[1] + found[2] * stages
    kernel = step / mosaic_tpu_encode.TOKENS
    few = config.vectors // 4  # all of which XLA takes at once
    with mock.patch.object(devices, "on_tpu", return_value=False):  # not the kernel
        hlo = compiled(residual.encode, (of((HEADS, few, DIM), jnp.float32), words), chip).as_text()
    plain = estimated(hlo, stages) / (HEADS * few) * chip.cores  # XLA's are of a chip
    facts = {"bits": stages * (codewords.bit_length() - 1) / DIM, "codewords": codewords}
    read = 4 * DIM  # and codes written: words by the kernel, bytes by XLA
    return [
        {"implementation": "kernels/mosaic_tpu_encode.py"}
        | facts
        | {"bundles_a_step": step, "tokens_a_step": mosaic_tpu_encode.TOKENS}
        | dict(times(chip, 2 * kernel, 2 * (read + 4 * stages))),
        {"implementation": "gsrq_jax.residual.encode (XLA)"}
        | facts
        | dict(times(chip, 2 * plain, 2 * (read + stages))),
    ]


def estimated(hlo: str, trips: int) -> int:
    """Cycles that XLA estimates for a program whose one loop is run through so many times.

    Operations of which it gives no estimate, gathers above all, are not in it.
    """
    parts: dict[str, str] = {}
    for part in re.split(r"\n(?=%|ENTRY )", hlo):
        parts[part.split(" ", 2)[1 if part.startswith("ENTRY") else 0]] = part
    (entry,) = (part for part in parts.values() if part.startswith("ENTRY"))
    (body,) = re.findall(r" while\(.*body=(%[\w.-]+)", entry)

    def cycles(part: str) -> int:
        return sum(map(int, re.findall(r'"estimated_cycles":"(\d+)"', part)))

    return cycles(entry) + trips * cycles(parts[body])


def times(chip: Chip, cycles: float, nbytes: float) -> Mapping[str, float]:
    """Cycles of the schedule and of memory, a token and layer, from those of one KV head."""
    cycles, nbytes = cycles * HEADS / chip.cores, nbytes * HEADS
    return {
        "cycles": round(cycles, 2),
        "nanoseconds": round(cycles / chip.ghz, 3),
        "bytes": nbytes,
        "hbm_cycles": round(nbytes / chip.gbps * chip.ghz, 2),
        "hbm_nanoseconds": round(nbytes / chip.gbps, 3),
    }


def planes_beside_words(dump: pathlib.Path, chip: Chip, config: Config) -> Iterator[dict[str, Any]]:
    """Rows at each rate and size of blocks: words, then planes by heads together."""
    for stages in config.stages:
        for block in config.blocks:
            row = ours(dump, chip, config, block, stages)
            yield {"what": DECODING, "heads_together": 1} | row
            for together in config.together:
                row = bit_planes(dump, chip, config, block, 4 * stages / DIM, together)
                yield {"what": DECODING} | row


def say(chip: str, row: Mapping[str, Any]) -> None:
    """Print a row."""
    size = f"{row['block']} tokens a block" if "block" in row else row["codewords"]
    together = f"  {row['heads_together']} together" if "heads_together" in row else ""
    print(
        f"{chip}  {row['what']}  {row['bits']:>5g} bits  {size}{together}  "
        f"{row['cycles']:5.2f} cycles  {row['hbm_cycles']:5.2f} of memory  "
        f"{row['implementation']}",
        flush=True,
    )


def main(config: Config) -> None:
    if importlib.util.find_spec("libtpu") is None:
        print("error: libtpu, TPU's compiler, is missing; install jax[tpu]", file=sys.stderr)
        sys.exit(2)
    jax.config.update("jax_platforms", "cpu")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        dump = pathlib.Path(folder) / "dump"
        os.environ["LIBTPU_INIT_ARGS"] = f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true"
        os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")  # there is no TPU host to ask
        for name in config.chips:
            chip = CHIPS[name]
            if config.planes:
                for row in planes_beside_words(dump, chip, config):
                    rows.append({"chip": name} | row)
                    say(name, row)
                continue
            found = [bfloat16(dump, chip, config), ragged(dump, chip, config)]
            found += [
                ours(dump, chip, config, block, stages)
                for stages in config.stages
                for block in config.blocks
            ]
            found = [{"what": DECODING} | row for row in found]
            found += [
                {"what": ENCODING} | row
                for code in config.codes
                for row in encoded(dump, chip, config, *code)
            ]
            for row in found:
                rows.append({"chip": name} | row)
                say(name, row)
    write_result(
        config.out / "results" / f"tpu-schedule{'-planes' if config.planes else ''}.json",
        rows,
        command="python benchmarks/tpu_schedule.py" + (" --planes" if config.planes else ""),
        compiler=f"libtpu {importlib.metadata.version('libtpu')}",
        estimate="bundles of the compiler's static schedule, one a cycle; nothing ran on a TPU",
        model="LLaMA-3-8B: 8 KV heads, 32 query heads, head_dim 128",
        context=config.context,
        chips={name: dataclasses.asdict(CHIPS[name]) for name in config.chips},
    )


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
