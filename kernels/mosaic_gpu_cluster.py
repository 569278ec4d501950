"""A sweep of k-means on Hopper GPUs, fused: Pallas Mosaic GPU (ours).

`nearest` finds the codeword of each point: a warpgroup takes 64 points at a time into registers,
cuts them into bfloat16 pieces there, multiplies them with codewords that stay in shared memory, and
takes the largest of the scores, which never leave its registers. `cell_sums` adds up the points of
each cell: a warp owns 32 channels of all cells in shared memory and adds point after point.

What limits them, for 2²⁰ points of 128 channels on an H100 (132 processors of 1.76 GHz, 3.35 TB/s;
an H200 reads in 0.11 ms what takes 0.16 there):

- `nearest` reads 512 bytes a point: 0.16 ms. Three products of pieces (high·high, high·low,
  low·high, which leave out 2⁻¹⁶ of a term) with 256 codewords are 0.2 TFLOP, 0.21 ms at the most
  that tensor cores do; the largest of 256 scores is 12 cycles of a processor, beside 48 of the
  products. With 16 codewords reading is all.
- `cell_sums` reads the points again, 0.16 ms. Shared memory moves 13 rows of 128 bytes a point
  (sum, sum, point, of four warps): 0.06 ms. A product with one-hots on tensor cores would take as
  long as the scores, and its sums as many registers as a processor has: reading twice is cheaper.
  There are no float atomics in shared memory, and none are needed, for each sum has one owner; so
  the order of additions is fixed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from gsrq_jax.kernels import devices
from gsrq_jax.kernels.devices import PROCESSORS
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.mosaic_gpu import SHARED_BYTES
from gsrq_jax.kernels.precision import in_pieces

ROWS = 64
"""Points that a warpgroup takes at a time: what its matrix instruction has."""
EIGHT = 8
"""Points come in eights, as they lie in shared memory; `nearest` copies points of another number to
fill the last eight."""
NORMS = 16
"""Terms of the product that subtracts half the squared lengths: one step of the instruction."""
MOST_CODEWORDS, MOST_CHANNELS = 1024, 256
FARTHEST = -1e30
"""Score of a codeword that only fills up their number."""
TINY = float(jnp.finfo(jnp.float32).tiny)
UNDER_WAY = 3 * 2**13
"""Bytes that a processor must have under way to read as fast as it can, at the least."""
NUMBERS = 2
"""Numbers of each point that are added up beside the vectors."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call."""

    problems: int
    points: int
    channels: int
    codewords: int


def problem_of(points: Any, codewords: int) -> Problem:
    """The shapes of a call with ``[P, n, d]`` points, checked.

    Raises:
        InputError: naming what was given and what is supported.
    """
    problems, n, d = points.shape

    def refuse(what: str, given: Any, supported: str) -> None:
        raise InputError(
            f"the fused k-means kernels take {supported} as {what}, got {given}; use another "
            "implementation"
        )

    if points.dtype != jnp.float32:
        refuse("dtype of the points", points.dtype, "float32")
    if d % 64 or not 64 <= d <= MOST_CHANNELS:
        refuse("channels", d, f"multiples of 64 up to {MOST_CHANNELS}")
    if not 1 <= codewords <= MOST_CODEWORDS:
        refuse("codewords", codewords, f"1 to {MOST_CODEWORDS}")
    if n < ROWS:
        refuse("number of points", n, f"at least {ROWS}")
    return Problem(problems, n, d, codewords)


def check_supported(points: Any, codewords: int) -> Problem:
    """The shapes of a call that can be made here.

    Raises:
        InputError: naming what was given and what is supported.
    """
    problem = problem_of(points, codewords)
    devices.check_hopper()
    if jax.config.read("jax_enable_x64"):  # an attribute that type checkers do not see
        raise InputError(
            "the fused k-means kernels are written for numbers of 32 bits; turn jax_enable_x64 off "
            "or use another implementation"
        )
    return problem


def splits_of(blocks: int, tiles: int, start: float) -> int:
    """Thread blocks that share the tiles of each of so many others, for the least time.

    Time is counted in tiles; a thread block takes ``start`` more, and they run in waves.
    """

    def time(splits: int) -> float:
        waves = math.ceil(blocks * splits / PROCESSORS)
        return waves * (math.ceil(tiles / splits) + start)

    return min(range(1, min(tiles, PROCESSORS) + 1), key=time)


def over_problems(function: Callable) -> Callable:
    """Of arrays whose first axis are problems: under ``vmap``, all of them are one call's."""

    @jax.custom_batching.custom_vmap
    def call(*arrays: Array) -> Any:
        return function(*arrays)

    @call.def_vmap
    def batched(size: int, mapped: list[bool], *arrays: Array) -> Any:
        arrays = tuple(
            a if there else jnp.broadcast_to(a, (size, *a.shape))
            for a, there in zip(arrays, mapped, strict=True)
        )
        found = call(*(a.reshape(-1, *a.shape[2:]) for a in arrays))
        found = jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), found)
        return found, jax.tree.map(lambda _: True, found)

    return call


def varying_as(made: Any, *arrays: Array) -> Any:
    """What a kernel made, over the axes of a `jax.shard_map` over which its arguments vary."""
    axes = tuple(sorted(frozenset().union(*(jax.typeof(x).mat.varying for x in arrays))))

    def vary(x: Array) -> Array:
        missing = tuple(a for a in axes if a not in jax.typeof(x).mat.varying)
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, made)


# --- the nearest codeword -------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class NearestConfig:
    """How a thread block finds codewords.

    Attributes:
        warpgroups: of a thread block, each with points of its own.
        depth: tiles of 64 points that are on their way to each of them.
        codewords: that a thread block has, a multiple of 16; where there are more, others have
            them, and the best of each are compared afterwards.
        splits: thread blocks that share the points of a problem.
    """

    warpgroups: int
    depth: int
    codewords: int
    splits: int

    def nbytes(self, channels: int) -> int:
        """Shared memory of a thread block."""
        words = self.codewords * (2 * channels + NORMS) * 2
        tiles = self.warpgroups * ROWS * (self.depth * channels + 3) * 4
        return words + tiles + 1024

    def registers(self, channels: int) -> int:
        """Of a thread, at the least: scores, pieces of its points, and what is always needed."""
        return self.codewords // 2 + channels // 2 + 48


def choose_nearest(problem: Problem, **given: int) -> NearestConfig:
    """As few groups of codewords as shared memory and registers allow, then as much on its way.

    Args:
        problem: the shapes.
        given: attributes of the config that are not to be chosen.
    """
    p = problem
    sizes = range(256, 0, -16) if "codewords" not in given else [given.pop("codewords")]
    for size in sizes:
        groups = -(-p.codewords // size)
        size = -(-p.codewords // (16 * groups)) * 16
        for warpgroups in [given["warpgroups"]] if "warpgroups" in given else [3, 2]:
            depths = [given["depth"]] if "depth" in given else [3, 2, 1]
            for depth in depths:
                config = NearestConfig(warpgroups, depth, size, 1)
                most = min(255, 65536 // (128 * warpgroups) // 8 * 8)
                if config.nbytes(p.channels) > SHARED_BYTES or config.registers(p.channels) > most:
                    continue
                tiles = -(-p.points // (ROWS * warpgroups))
                splits = given.get("splits") or splits_of(p.problems * groups, tiles, 4)
                return dataclasses.replace(config, splits=splits)
    raise InputError(f"no layout of {given} fits {p}; leave the choice to choose_nearest")


def nearest(
    points: Float[Array, "P n d"],
    codewords: Float[Array, "P K d"],
    *,
    unit: bool = False,
    config: NearestConfig | None = None,
    interpret: Any = None,
) -> tuple[Int[Array, "P n"], Float[Array, "P n"], Float[Array, "P n"]]:
    """The nearest codeword of each point, its score and the point's squared length.

    Under ``vmap`` the problems of all calls go to one kernel. See
    `gsrq_jax.kernels.cluster.nearest` for what it is in plain jnp.

    Args:
        points: float32, d a multiple of 64 up to 256, at least 64 points.
        codewords: at most 1024.
        unit: whether scores are those of the points' directions.
        config: instead of the one chosen.
        interpret: parameters of Pallas' GPU interpreter, to run without a GPU.

    Returns:
        Codes (int32), scores ``2⟨x, c⟩ − ‖c‖²`` and ``‖x‖²``. A point that is not finite has code
        0 and a score that is not finite.

    Raises:
        InputError: if the shapes, the dtype, the device or the version of jax are not supported.
    """
    check = problem_of if interpret else check_supported
    check(points, codewords.shape[1])

    def of_problems(points: Array, codewords: Array) -> tuple[Array, Array, Array]:
        n = points.shape[1]
        points = jnp.pad(points, ((0, 0), (0, -n % EIGHT), (0, 0)))
        problem = problem_of(points, codewords.shape[1])
        chosen = config or choose_nearest(problem)
        high, low, norms = _codeword_pieces(codewords, chosen.codewords)
        kernel = _nearest_kernel(problem, chosen, unit, interpret)
        code, score, square = kernel(points, high, low, norms)
        code, score, square = code[..., :n], score[..., :n], square[:, 0, :n]
        if code.shape[1] == 1:
            return code[:, 0], score[:, 0], square
        group = jnp.argmax(score, axis=1)[:, None]
        code = jnp.take_along_axis(code, group, 1) + group * chosen.codewords
        return code[:, 0], jnp.take_along_axis(score, group, 1)[:, 0], square

    return varying_as(over_problems(of_problems)(points, codewords), points, codewords)


def _codeword_pieces(
    codewords: Float[Array, "P K d"], group: int
) -> tuple[Float[Array, "P G k d"], Float[Array, "P G k d"], Float[Array, "P G k 16"]]:
    """Upper and lower pieces of codewords in groups, and minus half their squared lengths."""
    problems, k, _ = codewords.shape
    codewords = codewords.astype(jnp.float32)
    halves = jnp.sum(jnp.square(codewords), axis=-1, keepdims=True) / -2
    more = ((0, 0), (0, -k % group), (0, 0))
    halves = jnp.pad(halves, more, constant_values=FARTHEST)
    norms = jnp.concatenate(in_pieces(halves, 3, jnp.bfloat16), axis=-1)
    norms = jnp.pad(norms, ((0, 0), (0, 0), (0, NORMS - 3)))
    high, low = in_pieces(jnp.pad(codewords, more), 2, jnp.bfloat16)
    high, low, norms = (x.reshape(problems, -1, group, x.shape[-1]) for x in (high, low, norms))
    return high, low, norms


def two_pieces(x: Float[Array, "*n"]) -> tuple[Float[Array, "*n"], Float[Array, "*n"]]:
    """Two bfloat16 that add up to a float32, to 2⁻¹⁷ of it.

    Rounded by integers: back from bfloat16 to float32 the compiler would go number by number, by an
    instruction that takes eight times as long as the one that rounds a pair.
    """
    bits = lax.bitcast_convert_type(x, jnp.int32)
    rounded = lax.bitcast_convert_type((bits + 0x8000) & -0x10000, jnp.float32)
    return rounded.astype(jnp.bfloat16), (x - rounded).astype(jnp.bfloat16)


def _nearest_kernel(problem: Problem, config: NearestConfig, unit: bool, interpret: Any) -> Any:
    """The kernel as a function of points and `_codeword_pieces`; its outputs are whole tiles."""
    from jax.experimental import pallas as pl
    from jax.experimental.pallas import mosaic_gpu

    # To type checkers its transforms are abstract.
    plgpu: Any = mosaic_gpu
    d, k = problem.channels, config.codewords
    warpgroups, depth = config.warpgroups, config.depth
    groups = -(-problem.codewords // k)
    tiles = -(-problem.points // ROWS)
    stride = config.splits * warpgroups
    registers = plgpu.Layout.WGMMA

    def body(
        point_ref,  # [P, n, d]
        high_ref,  # [P, G, k, d] bfloat16
        low_ref,  # [P, G, k, d] bfloat16
        norm_ref,  # [P, G, k, 16] bfloat16
        code_ref,  # [P, G, tiles · 64]
        score_ref,  # [P, G, tiles · 64]
        square_ref,  # [P, G, tiles · 64], the same in all groups
        tile,  # [warpgroups, depth, 64, d], of points
        high,  # [k, d]
        low,  # [k, d]
        norm,  # [k, 16]
        code,  # [warpgroups, 64]
        score,  # [warpgroups, 64]
        square,  # [warpgroups, 64]
        arrived,  # a barrier for each tile
        ready,  # and one for the codewords
    ):
        place = lax.axis_index("problem"), lax.axis_index("group")
        own = lax.axis_index("warpgroup")
        first = lax.axis_index("split") * warpgroups + own
        count = lax.div(tiles - first + (stride - 1), stride)

        def fetch(step: Any, slot: Any) -> None:
            at = pl.ds((first + step * stride) * ROWS, ROWS)
            barrier = arrived.at[own * depth + slot]
            plgpu.copy_gmem_to_smem(point_ref.at[place[0], at], tile.at[own, slot], barrier)

        for slot in range(depth):
            pl.when(slot < count)(functools.partial(fetch, slot, slot))

        @pl.when(own == 0)
        def _() -> None:
            for source, to in ((high_ref, high), (low_ref, low), (norm_ref, norm)):
                plgpu.copy_gmem_to_smem(source.at[place], to, ready)

        plgpu.barrier_wait(ready)

        def of_tile(step: Any, _: None) -> None:
            slot = lax.rem(step, jnp.int32(depth))
            plgpu.barrier_wait(arrived.at[own * depth + slot])
            x = plgpu.load(tile.at[own, slot], layout=registers)
            squared = jnp.sum(x * x, axis=1)
            if unit:
                inverse = 1 / jnp.maximum(jnp.sqrt(squared), TINY)
                x = x * lax.broadcast_in_dim(inverse, x.shape, [0])
            upper, lower = two_pieces(x)
            # All of the tile is in registers: the next one may come.
            pl.when(step + depth < count)(lambda: fetch(step + depth, slot))

            def products(scores: Any) -> Any:
                ones = plgpu.layout_cast(jnp.full((ROWS, NORMS), 1, jnp.bfloat16), registers)
                # Tensor cores cut off what does not fit beside the largest term or the sum so far,
                # always towards zero: the small products come first, the lengths last.
                for left, right in ((lower, high), (upper, low), (upper, high), (ones, norm)):
                    plgpu.wgmma(scores, left, right.transpose((1, 0)))
                return scores[...]

            scores = pl.run_scoped(products, plgpu.ACC((ROWS, k), jnp.float32))
            best = scores.max(axis=1)
            column = plgpu.broadcasted_iota(jnp.int32, (ROWS, k), 1, layout=registers)
            there = scores == lax.broadcast_in_dim(best, scores.shape, [0])
            found = jnp.where(there, column, k).min(axis=1)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            code[own] = jnp.where(found == k, 0, found)
            score[own] = 2 * best
            square[own] = squared
            plgpu.commit_smem()
            at = (*place, pl.ds((first + step * stride) * ROWS, ROWS))
            for source, to in ((code, code_ref), (score, score_ref), (square, square_ref)):
                plgpu.copy_smem_to_gmem(source.at[own], to.at[at])

        lax.fori_loop(0, count, of_tile, None)
        plgpu.wait_smem_to_gmem(0)

    def tiled(dtype: Any, swizzle: int) -> dict[str, Any]:
        width = swizzle * 8 // jnp.finfo(dtype).bits
        return {
            "dtype": dtype,
            "transforms": (plgpu.TilingTransform((8, width)), plgpu.SwizzleTransform(swizzle)),
        }

    each = problem.problems, groups, tiles * ROWS
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(each, t) for t in (jnp.int32, jnp.float32, jnp.float32)],
        scratch_types=[
            plgpu.SMEM((warpgroups, depth, ROWS, d), **tiled(jnp.float32, 128)),
            plgpu.SMEM((k, d), **tiled(jnp.bfloat16, 128)),
            plgpu.SMEM((k, d), **tiled(jnp.bfloat16, 128)),
            plgpu.SMEM((k, NORMS), **tiled(jnp.bfloat16, 32)),
            plgpu.SMEM((warpgroups, ROWS), jnp.int32),
            plgpu.SMEM((warpgroups, ROWS), jnp.float32),
            plgpu.SMEM((warpgroups, ROWS), jnp.float32),
            plgpu.Barrier(num_barriers=warpgroups * depth),
            plgpu.Barrier(num_arrivals=3),
        ],
        grid=(problem.problems, groups, config.splits),
        grid_names=("problem", "group", "split"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        kernel_name="nearest_codeword",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Lane),
        **({"interpret": interpret} if interpret else {}),
    )


# --- sums over the cells --------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class SumsConfig:
    """How a thread block adds up.

    Attributes:
        width: channels that it has, a multiple of 32 that divides all; other thread blocks have the
            others.
        copies: of the sums, each of warps that take a part of a tile's points; put together at the
            end.
        tile: points that are copied at a time, a multiple of 32.
        depth: tiles in shared memory: one that is added up, the others on their way.
        batch: points whose sums a warp reads, adds to and writes at a time; divides a copy's part.
        splits: thread blocks that share the points of a problem.
    """

    width: int
    copies: int
    tile: int
    depth: int
    batch: int
    splits: int


@dataclasses.dataclass(frozen=True)
class SumsMemory:
    """Shared memory of a thread block of `cell_sums`: offsets in bytes from a multiple of 16.

    Attributes:
        sums: ``[copies][kinds][K][width]``.
        numbers: ``[copies][K][2]``.
        tiles: ``[depth]``, of points, codes and ``kinds + 2`` rows each.
        nbytes: all of it, with what alignment may take.
    """

    sums: int
    numbers: int
    tiles: int
    nbytes: int
    sum_bytes: int
    number_bytes: int
    point_bytes: int
    row_bytes: int
    tile_bytes: int

    @classmethod
    def of(cls, problem: Problem, kinds: int, config: SumsConfig) -> "SumsMemory":
        """Laid out one after the other."""
        sums = kinds * problem.codewords * config.width * 4
        numbers = -(-problem.codewords * NUMBERS // 4) * 16
        points, row = config.tile * config.width * 4, config.tile * 4
        tile = points + (1 + kinds + NUMBERS) * row
        first = config.copies * sums
        tiles = first + config.copies * numbers
        nbytes = tiles + config.depth * tile + 16
        return cls(0, first, tiles, nbytes, sums, numbers, points, row, tile)


def warps_of(kinds: int, config: SumsConfig) -> int:
    """Warps of a thread block of `cell_sums`, whole warpgroups: owners of sums, and what is left
    over for 4, which only copies."""
    owners = config.copies * (kinds * config.width // 32 + 1)
    return -(-owners // 4) * 4


def choose_sums(problem: Problem, kinds: int, **given: int) -> SumsConfig:
    """As many channels as leave room for tiles, and copies where sums are few.

    A warp is busy for 60 cycles or so with a batch of 4 points, most of them waiting for shared
    memory; copies give a processor more of them.

    Args:
        problem: the shapes.
        kinds: sums of each cell.
        given: attributes of the config that are not to be chosen.

    Raises:
        InputError: if no layout fits.
    """
    p = problem
    widths = [w for w in range(p.channels, 0, -32) if p.channels % w == 0]
    for width in [given["width"]] if "width" in given else widths:
        for copies in [given["copies"]] if "copies" in given else [4, 2, 1]:
            tile = given.get("tile", 64 if copies > 1 else 32)
            depth = 1
            config = SumsConfig(width, copies, tile, depth, given.get("batch", 4), 1)
            memory = SumsMemory.of(p, kinds, config)
            if warps_of(kinds, config) > 24 or (copies > 1 and memory.tiles > 100 * 1024):
                continue
            room = (SHARED_BYTES - memory.tiles - 16) // memory.tile_bytes
            depth = given.get("depth", min(8, room))
            short = (depth - 1) * memory.tile_bytes < UNDER_WAY and "depth" not in given
            if depth > room or short:
                continue
            blocks = p.problems * (p.channels // width)
            splits = given.get("splits") or splits_of(blocks, -(-p.points // tile), 16)
            return dataclasses.replace(config, depth=depth, splits=splits)
    raise InputError(f"the sums of {kinds} kinds over the cells of {p} fit in no shared memory")


def check_sums(problem: Problem, kinds: int, config: SumsConfig) -> None:
    """Refuse a layout that the kernel cannot have.

    Raises:
        InputError: naming what does not fit.
    """
    nbytes = SumsMemory.of(problem, kinds, config).nbytes
    if nbytes > SHARED_BYTES:
        raise InputError(f"{config} takes {nbytes} bytes of shared memory of {SHARED_BYTES}")
    if config.width % 32 or problem.channels % config.width:
        raise InputError(f"{config} must have a width of whole 32s that divides the channels")
    if config.tile % 32 or config.tile % (4 * config.copies) or config.batch not in (4, 8):
        raise InputError(f"{config} must have tiles of whole 32s and batches of 4 or 8")
    if config.tile % (config.copies * config.batch):
        raise InputError(f"{config} must have batches that divide a copy's part of a tile")
    if config.depth < 2 or config.splits < 1 or warps_of(kinds, config) > 32:
        raise InputError(f"{config} must have a depth of at least 2 and at most 32 warps")


def cell_sums(
    points: Float[Array, "P n d"],
    code: Int[Array, "P n"],
    factors: Float[Array, "P F n"],
    numbers: Float[Array, "P 2 n"],
    codewords: int,
    *,
    config: SumsConfig | None = None,
) -> tuple[Float[Array, "P F K d"], Float[Array, "P 2 K"]]:
    """Sums over the cells of points times factors, and of two numbers of each point.

    Under ``vmap`` the problems of all calls go to one kernel. Sums are float32, in an order that
    depends on the shapes alone. See `gsrq_jax.kernels.cluster.cell_sums` for what it is in plain
    jnp.

    Args:
        points: float32, d a multiple of 64 up to 256, at least 64 points; finite, where factors
            are 0 too.
        code: the cell of each point, below K.
        factors: of each kind of sums, one or two.
        numbers: added up as they are.
        codewords: cells, K, at most 1024.
        config: instead of the one chosen.

    Raises:
        InputError: if the shapes, the dtype, the device or the version of jax are not supported.
    """
    check_supported(points, codewords)

    def of_problems(points: Array, code: Array, factors: Array, numbers: Array) -> Any:
        problem, kinds = problem_of(points, codewords), factors.shape[1]
        try:
            chosen = config or choose_sums(problem, kinds)
        except InputError:
            if kinds == 1:
                raise
            parts = [
                of_problems(points, code, factors[:, i : i + 1], numbers) for i in range(kinds)
            ]
            return jnp.concatenate([part[0] for part in parts], axis=1), parts[0][1]
        check_sums(problem, kinds, chosen)
        kernel = sums_kernel(problem, kinds, chosen)
        sums, counted = kernel(points, *sums_inputs(chosen, code, factors, numbers))
        return sums.sum(axis=1), jnp.swapaxes(counted.sum(axis=1), 1, 2)

    arrays = points, code, factors, numbers
    return varying_as(over_problems(of_problems)(*arrays), *arrays)


def sums_inputs(
    config: SumsConfig,
    code: Int[Array, "P n"],
    factors: Float[Array, "P F n"],
    numbers: Float[Array, "P 2 n"],
) -> tuple[Array, Array]:
    """Codes ``[P, m]`` and rows ``[P, F + 2, m]`` of whole tiles; those beyond n add zeros."""
    more = -code.shape[1] % config.tile
    rows = jnp.concatenate([factors, numbers], axis=1)
    return jnp.pad(code, ((0, 0), (0, more))), jnp.pad(rows, ((0, 0), (0, 0), (0, more)))


def sums_kernel(problem: Problem, kinds: int, config: SumsConfig) -> Any:
    """The kernel as a function of points and `sums_inputs`; parts of the sums come from it."""
    from gsrq_jax.kernels.warp import Warp, warp_kernel

    def run(warp: Warp, *places: Any) -> None:
        SumsKernel(problem, kinds, config, warp, SumsAddresses(*places)).run()

    p, parts = problem, (problem.problems, config.splits)
    return warp_kernel(
        run,
        outputs=[
            jax.ShapeDtypeStruct((*parts, kinds, p.codewords, p.channels), jnp.float32),
            jax.ShapeDtypeStruct((*parts, p.codewords, NUMBERS), jnp.float32),
        ],
        nbytes=SumsMemory.of(problem, kinds, config).nbytes,
        parts=p.problems * config.splits * (p.channels // config.width),
        warps=warps_of(kinds, config),
        name="cell_sums",
    )


@dataclasses.dataclass(frozen=True)
class SumsAddresses:
    """Where the arrays lie, in the order of the kernel's arguments, and its shared memory."""

    points: Any
    code: Any
    rows: Any
    sums: Any
    numbers: Any
    shared: Any


class SumsKernel:
    """What one warp of one thread block does, said to that warp."""

    def __init__(
        self, problem: Problem, kinds: int, config: SumsConfig, warp: Any, at: SumsAddresses
    ):
        self.problem, self.kinds, self.config, self.warp, self.at = problem, kinds, config, warp, at
        self.memory = SumsMemory.of(problem, kinds, config)
        self.base = (at.shared + 15) & 0xFFFFFFF0
        self.warps = warps_of(kinds, config)
        self.tiles = -(-problem.points // config.tile)
        self.rows = kinds + NUMBERS
        # Thread blocks of the same points are neighbours.
        slices = problem.channels // config.width
        self.slice = warp.block % slices
        self.part = warp.block // slices
        self.of_problem = self.part // config.splits
        self.split = self.part % config.splits
        last = warp.integer(self.tiles + config.splits - 1)
        self.count = (last - self.split) // config.splits

    def run(self) -> None:
        """Zeros, tile after tile, and what was added up out to global memory."""
        warp, depth = self.warp, self.config.depth
        self._clear()
        for step in range(depth - 1):
            self._fetch(warp.integer(step), warp.integer(step))

        def of_tile(step: Any, _: list) -> list:
            warp.copies_wait(depth - 2)
            warp.sync_block()  # all see the tile, and none is at the one before it
            following = step + (depth - 1)
            self._fetch(following, following % depth)
            self._add(self.base + self.memory.tiles + step % depth * self.memory.tile_bytes)
            return []

        warp.loop(self.count, [], of_tile)
        warp.sync_block()
        self._write()

    def _shares(self, number: int, body: Callable[[Any], None]) -> None:
        """``body(i)`` for i below the number, each in one lane of the thread block."""
        warp, threads = self.warp, 32 * self.warps

        def each(step: Any, _: list) -> list:
            i = step * threads + (warp.index * 32 + warp.lane)
            warp.when(warp.less(i, number), lambda: body(i))
            return []

        warp.loop(warp.integer(-(-number // threads)), [], each)

    def _clear(self) -> None:
        zeros = [self.warp.floating(0.0)] * 4
        self._shares(
            self.memory.tiles // 16, lambda i: self.warp.store_shared(self.base + i * 16, zeros)
        )

    # Copies.

    def _fetch(self, step: Any, slot: Any) -> None:
        """Start to copy this split's tile of that number, if there is one: a group of copies."""
        warp, p, c, memory = self.warp, self.problem, self.config, self.memory
        to = self.base + memory.tiles + slot * memory.tile_bytes
        first = (self.split + step * c.splits) * c.tile
        of_points = c.tile * c.width // 128  # steps of a warp
        lane = warp.lane

        def points(turn: Any) -> None:
            chunk = turn * 32 + lane
            row, column = chunk // (c.width // 4), chunk % (c.width // 4)
            there = warp.less(first + row, p.points)
            point = warp.wide(self.of_problem) * p.points + warp.wide(first + row)
            source = point * (p.channels * 4) + warp.wide(self.slice * (c.width * 4) + column * 16)
            source = warp.select(there, self.at.points + source, self.at.points)
            warp.copy_16_to_shared(to + chunk * 16, source, there)

        def others(turn: Any) -> None:
            """Codes, then the rows."""
            chunk = (turn - of_points) * 32 + lane
            row, column = chunk // (c.tile // 4), chunk % (c.tile // 4)
            places = self.tiles * c.tile
            own = warp.wide(first * 4 + column * 16)
            code = self.at.code + warp.wide(self.of_problem) * (places * 4) + own
            number = warp.wide(self.of_problem) * self.rows + warp.wide(row)
            # Row 0 are the codes: the number of what follows is one too large.
            others = self.at.rows + number * (places * 4) + own - places * 4
            source = warp.select(warp.equal(row, 0), code, others)
            place = to + memory.point_bytes + chunk * 16
            there = warp.less(chunk, (1 + self.rows) * (c.tile // 4))
            warp.when(there, lambda: warp.copy_16_to_shared(place, source, there))

        total = of_points + -(-(c.tile // 4 * (1 + self.rows)) // 32)

        def all_of_it() -> None:
            for i in range(-(-total // self.warps)):
                turn = warp.index + i * self.warps
                if (i + 1) * self.warps <= of_points:
                    points(turn)
                    continue
                warp.either(
                    warp.less(turn, of_points),
                    functools.partial(points, turn),
                    functools.partial(others, turn),
                )

        warp.when(warp.less(step, self.count), all_of_it)
        warp.copies_end_group()

    # Sums.

    def _add(self, tile: Any) -> None:
        """This warp's sums of a tile's points."""
        warp, c = self.warp, self.config
        blocks = c.width // 32
        each = self.kinds * blocks + 1
        copy, role = warp.index // each, warp.index % each
        vectors = warp.less(role, self.kinds * blocks)
        there = warp.less(copy, c.copies)
        warp.when(
            there,
            lambda: warp.either(
                vectors,
                lambda: self._add_vectors(tile, copy, role // blocks, role % blocks),
                lambda: warp.when(warp.equal(self.slice, 0), lambda: self._add_numbers(tile, copy)),
            ),
        )

    def _add_vectors(self, tile: Any, copy: Any, kind: Any, block: Any) -> None:
        warp, c, memory = self.warp, self.config, self.memory
        channel = (block * 32 + warp.lane) * 4
        own = c.tile // c.copies
        first = copy * own
        point = tile + first * (c.width * 4) + channel
        factor = tile + memory.point_bytes + (kind + 1) * memory.row_bytes + first * 4
        sums = self.base + memory.sums + copy * memory.sum_bytes
        sums = sums + kind * (self.problem.codewords * c.width * 4) + channel

        def values(i: int) -> list:
            factors = self._row(factor, i)
            return [
                warp.load_shared(point, (i + j) * c.width * 4, kind="f")[0] * factors[j]
                for j in range(c.batch)
            ]

        self._add_batches(tile + memory.point_bytes + first * 4, values, sums, c.width * 4)

    def _add_numbers(self, tile: Any, copy: Any) -> None:
        """Each of the first lanes one of the numbers."""
        warp, c, memory = self.warp, self.config, self.memory
        number = warp.lane & (NUMBERS - 1)  # in the other lanes an address that is there
        first = copy * (c.tile // c.copies) * 4
        row = tile + memory.point_bytes + (number + (1 + self.kinds)) * memory.row_bytes + first
        sums = self.base + memory.numbers + copy * memory.number_bytes + number * 4
        code = tile + memory.point_bytes + first
        self._add_batches(code, lambda i: self._row(row, i), sums, NUMBERS * 4)

    def _row(self, at: Any, first: int, kind: str = "f") -> list:
        """Numbers of a batch's points."""
        return [
            x
            for i in range(first, first + self.config.batch, 4)
            for x in self.warp.load_shared(at, i * 4, 4, kind)
        ]

    def _add_batches(
        self, code: Any, values: Callable[[int], list], sums: Any, stride: int
    ) -> None:
        """Values added to the sums of their codes, batch after batch.

        All sums of a batch are read before one is written: points of the same code are added up
        first, and what is written last holds them all. The next batch is read meanwhile.
        """
        warp, batch = self.warp, self.config.batch
        starts = range(0, self.config.tile // self.config.copies, batch)
        following = self._row(code, 0, "r"), values(0)
        for i in starts:
            codes, added = following
            places = [sums + c * stride for c in codes]
            before = [warp.load_shared(place, kind="f")[0] for place in places]
            if i + batch in starts:
                following = self._row(code, i + batch, "r"), values(i + batch)
            each = list(added)
            for j in range(batch):
                for earlier in range(j):
                    each[j] = warp.add_where_equal(
                        each[j], added[earlier], codes[j], codes[earlier]
                    )
            for place, x, y in zip(places, before, each, strict=True):
                warp.store_shared(place, [x + y])

    # Out.

    def _write(self) -> None:
        """The sums of all copies together."""
        warp, p, c, memory = self.warp, self.problem, self.config, self.memory

        def together(at: Any, stride: int, n: int) -> list:
            parts = [warp.load_shared(at, i * stride, n, "f") for i in range(c.copies)]
            return [functools.reduce(lambda x, y: x + y, x) for x in zip(*parts, strict=True)]

        def sums(i: Any) -> None:
            row, column = i // (c.width // 4), i % (c.width // 4)
            found = together(self.base + memory.sums + i * 16, memory.sum_bytes, 4)
            place = warp.wide(self.part) * (self.kinds * p.codewords) + warp.wide(row)
            place = place * (p.channels * 4)
            place = place + warp.wide(self.slice * (c.width * 4) + column * 16)
            warp.store_global(self.at.sums + place, found)

        def numbers(i: Any) -> None:
            found = together(self.base + memory.numbers + i * 8, memory.number_bytes, NUMBERS)
            place = warp.wide(self.part) * (p.codewords * NUMBERS * 4) + warp.wide(i * 8)
            warp.store_global(self.at.numbers + place, found)

        self._shares(self.kinds * p.codewords * c.width // 4, sums)
        warp.when(warp.equal(self.slice, 0), lambda: self._shares(p.codewords, numbers))
