"""The end of attention over codes, on Hopper GPUs, in one kernel: Pallas Mosaic GPU (ours).

The kernel of codes leaves, for each query head and each thread block that had a part of the past, a
histogram of probabilities over value codewords. What is left is their sum, its product with the
codewords, and one softmax with the keys and values that are exact. A thread block has one query
head, or the four of a group where there are enough groups to fill the GPU; XLA's program of the
same takes some twelve small kernels.

What limits it: histograms and codewords come from the second-level cache, one after the other.
"""

import dataclasses
import itertools
import math
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int

from gsrq_jax.kernels import mosaic_gpu, pieces
from gsrq_jax.kernels.devices import PROCESSORS
from gsrq_jax.kernels.mosaic_gpu import MOST_QUERY
from gsrq_jax.kernels.mosaic_gpu_products import Rows
from gsrq_jax.kernels.pieces import LN2, ROWS

if TYPE_CHECKING:
    from gsrq_jax.kernels import mosaic_gpu_planes

WARPS = 16
AHEAD = 8
"""Codewords whose bytes are under way together."""
PARTS = 16
"""Parts of a histogram, likewise."""
CHANNELS = 8
"""Of a codeword, of a lane."""
NOTHING = -1e30
"""Instead of the logarithm of no mass, where one is subtracted from another."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call."""

    of: "mosaic_gpu.Problem | mosaic_gpu_planes.Problem"
    parts: int  # of the histogram
    beside: int  # other parts of the softmax
    short: bool = False  # whether the output is in bfloat16

    @property
    def together(self) -> int:
        """Query heads of a thread block."""
        if self.of.pairs * ROWS <= 2 * PROCESSORS:
            return 1
        return min(ROWS, WARPS * 32 // self.of.dim)  # a number of the output for each thread

    @property
    def codewords(self) -> int:
        """Of all stages."""
        return self.of.value_stages * self.of.value_codewords

    @property
    def rows(self) -> int:
        """Query heads and tokens of a KV head."""
        return self.of.tokens * self.of.group

    @property
    def ends(self) -> list[int]:
        """Where in shared memory each of weights, maxima, flags, mass and sums ends, in bytes."""
        n = self.together
        numbers = n * self.parts, n, n, n * self.codewords, WARPS * n * self.of.dim
        return list(itertools.accumulate(-(-4 * x // 16) * 16 for x in numbers))

    @property
    def nbytes(self) -> int:
        """Shared memory of a thread block."""
        return self.ends[-1] + 16


def supports(words: Any) -> bool:
    """Whether the kernel takes value codewords of this dtype."""
    return words.dtype == jnp.bfloat16


def finish(
    problem: "mosaic_gpu.Problem | mosaic_gpu_planes.Problem",
    query: Float[Array, "B T H q d"],
    blocks: Int[Array, " B"],
    histogram: Float[Array, "pairs parts 4 S 16"],
    scale: Int[Array, "pairs parts 4"],
    value_codewords: Float[Array, "H 1 S K d"],
    beside: tuple[Float[Array, "P B T H q d"], Float[Array, "P B T H q"]] | None = None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """`gsrq_jax.kernels.mosaic_gpu.finish`, for value codewords in bfloat16."""
    others = 0 if beside is None else len(beside[0])
    p = Problem(problem, histogram.shape[1], others, dtype == jnp.bfloat16)
    parts = [jnp.zeros((1,))] * 2
    if beside is not None:
        parts = [jnp.moveaxis(x, (0, 3), (2, 1)) for x in beside]  # [B, H, P, T, q, …]
    arrays = query, blocks.astype(jnp.int32), histogram, scale, value_codewords, *parts
    out, lse = finish_kernel(p)(*arrays)
    return out.astype(dtype), lse


def finish_kernel(problem: Problem) -> Any:
    """The kernel as a function of query, blocks, histogram, scale, codewords and the other parts
    ``[B, H, P, T, q, …]``."""
    from gsrq_jax.kernels.warp import Warp, warp_kernel

    def run(warp: Warp, *places: Any) -> None:
        FinishKernel(problem, warp, Addresses(*places)).run()

    p = problem.of
    rows = p.batch, p.tokens, p.heads, p.group
    return warp_kernel(
        run,
        outputs=[
            jax.ShapeDtypeStruct((*rows, p.dim), jnp.bfloat16 if problem.short else jnp.float32),
            jax.ShapeDtypeStruct(rows, jnp.float32),
        ],
        nbytes=problem.nbytes,
        parts=p.pairs * ROWS // problem.together,
        warps=WARPS,
        name="attend_finish",
    )


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Where the arrays lie, in the order of the kernel's arguments, and its shared memory."""

    query: Any
    blocks: Any
    histogram: Any
    scale: Any
    words: Any
    other: Any
    other_lse: Any
    out: Any
    lse: Any
    shared: Any


class FinishKernel:
    """What one warp of one thread block does, said to that warp."""

    def __init__(self, problem: Problem, warp: Any, at: Addresses):
        self.problem, self.warp, self.at = problem, warp, at
        p = problem.of
        base = (at.shared + 15) & 0xFFFFFFF0
        self.weights = base
        self.tops, self.flags, self.mass, self.sums = (base + n for n in problem.ends[:4])
        blocks = ROWS // problem.together
        self.pair = warp.block // blocks
        self.first = warp.block % blocks * problem.together  # of four rows
        self.rows = Rows(p, warp, self.pair)
        self.head, self.sequence = self.rows.head, self.rows.sequence
        self.thread = warp.index * 32 + warp.lane

    def run(self) -> None:
        """Weights of the parts, their sum, its product with the codewords, one softmax."""
        warp, count = self.warp, self.problem.together
        warp.when(warp.less(warp.index, count), self._weigh)
        # By other warps: both wait for memory.
        other = warp.select(warp.less(warp.index, count), warp.integer(WARPS), warp.index)
        warp.when(warp.less(other, 2 * count), self._look)
        warp.sync_block()
        words = self._read(warp.integer(0))  # what does not depend on them is under way meanwhile
        other = self._others()
        self._add_up()
        warp.sync_block()
        self._multiply(words)
        warp.sync_block()
        self._write(other)

    def _row(self, i: Any) -> tuple[Any, Any]:
        """The row of all rows of the KV head that is row ``i`` here, and whether it is there."""
        return self.rows.row(self.first + i)

    def _weigh(self) -> None:
        """The weight of each part of the warp's row."""
        warp, parts = self.warp, self.problem.parts
        place = self.at.scale + warp.wide(self.pair) * (parts * ROWS * 4)
        place = place + warp.wide((self.first + warp.index) * 4)
        found = []
        for start in range(0, parts, 32):
            part = warp.lane + start
            there = warp.less(part, parts)
            safe = warp.unsigned_min(part, parts - 1)
            (scale,) = warp.load_global(place + warp.wide(safe * (ROWS * 4)))
            found.append((part, there, scale))
        top = found[0][2]  # the same as another where it is not there
        for _, _, scale in found[1:]:
            top = warp.signed_max(top, scale)
        top = warp.all_max(top)
        weights = self.weights + warp.index * (parts * 4)
        for part, there, scale in found:
            weight = warp.exp2(warp.to_float(scale - top))
            warp.store_shared(weights + part * 4, [weight], where=there)
        warp.store_shared(self.tops + warp.index * 4, [top], where=warp.equal(warp.lane, 0))

    def _look(self) -> None:
        """Whether all of the warp's query can be had in float16, where there is what it asks."""
        warp, p = self.warp, self.problem.of
        i = warp.index - self.problem.together
        row, _ = self._row(i)
        n = p.dim // 32
        place = self.at.query + self.rows.place(row) * (p.dim * 4) + warp.wide(warp.lane * (n * 4))
        most = warp.bits_of(warp.floating(MOST_QUERY))
        large = warp.integer(0)
        for x in warp.load_global(place, n=n, kind="f"):
            small = warp.less(warp.bits_of(x) & 0x7FFFFFFF, most)
            large = warp.select(small, large, 1)
        (blocks,) = warp.load_global(self.at.blocks + warp.wide(self.sequence * 4))
        large = warp.select(warp.less(blocks, 1), warp.integer(0), large)
        large = warp.all_max(large)
        warp.store_shared(self.flags + i * 4, [large], where=warp.equal(warp.lane, 0))

    def _add_up(self) -> None:
        """The sum of all parts of the histogram, four numbers a thread."""
        warp, p = self.warp, self.problem
        vectors = p.codewords // 4
        for start in range(0, p.together * vectors, WARPS * 32):
            vector = self.thread + start
            there = warp.less(vector, p.together * vectors)
            warp.when(there, lambda vector=vector: self._add_vector(vector))

    def _add_vector(self, vector: Any) -> None:
        warp, p = self.warp, self.problem
        nbytes = ROWS * p.codewords * 4  # of a part
        place = self.at.histogram + warp.wide(self.pair) * (p.parts * nbytes)
        # Rows of a part lie one after the other, as the vectors of those here do.
        place = place + warp.wide(self.first * (p.codewords * 4) + vector * 16)
        weights = self.weights + vector // (p.codewords // 4) * (p.parts * 4)
        ahead = min(PARTS, p.parts)

        def further(i: Any, sums: list) -> list:
            parts = [i * ahead + j for j in range(ahead)]
            safe = [warp.unsigned_min(part, p.parts - 1) for part in parts]
            read = [
                warp.load_global(place + warp.wide(part) * nbytes, n=4, kind="f") for part in safe
            ]
            for part, at, numbers in zip(parts, safe, read, strict=True):
                (weight,) = warp.load_shared(weights + at * 4, kind="f")
                weight = warp.select(warp.less(part, p.parts), weight, 0.0)
                sums = [warp.fma(x, weight, y) for x, y in zip(numbers, sums, strict=True)]
            return sums

        rounds = warp.integer(-(-p.parts // ahead))
        sums = warp.loop(rounds, [warp.floating(0.0)] * 4, further)
        warp.store_shared(self.mass + vector * 16, sums)

    @property
    def _lanes(self) -> int:
        """That have a codeword."""
        return self.problem.of.dim // CHANNELS

    @property
    def _groups(self) -> int:
        """Of lanes that have codewords, of the thread block."""
        return WARPS * (32 // self._lanes)

    @property
    def _ahead(self) -> int:
        """Codewords of a group at a time."""
        return 4 if self.problem.codewords < 8 * self._groups else AHEAD

    def _first(self, round_: Any) -> Any:
        """The first of the codewords of the lane's group in a round."""
        own = self.warp.index * (32 // self._lanes) + self.warp.lane // self._lanes
        return (round_ * self._groups + own) * self._ahead

    def _read(self, round_: Any) -> list:
        """Words of the lane's channels of the codewords of a round, of the first if it has none."""
        warp, p, dim = self.warp, self.problem, self.problem.of.dim
        first = self._first(round_)
        first = warp.select(warp.less(first, p.codewords), first, 0)
        place = self.at.words + warp.wide(self.head) * (p.codewords * dim * 2)
        place = place + warp.wide(first * (dim * 2) + warp.lane % self._lanes * (CHANNELS * 2))
        return [x for j in range(self._ahead) for x in warp.load_global(place, j * dim * 2, n=4)]

    def _multiply(self, words: list) -> None:
        """Sums of codewords, those of a warp in shared memory; ``words`` are the first round's."""
        warp, p, dim = self.warp, self.problem, self.problem.of.dim
        lanes, groups, ahead = self._lanes, self._groups, self._ahead
        channel = warp.lane % lanes * CHANNELS

        def further(i: Any, carry: list) -> list:
            words, sums = carry[: 4 * ahead], carry[4 * ahead :]
            following = self._read(i + 1)
            first = self._first(i)
            there = warp.less(first, p.codewords)
            first = warp.select(there, first, 0)
            masses = [
                [
                    warp.select(there, x, 0.0)
                    for j in range(0, ahead, 4)
                    for x in warp.load_shared(
                        self.mass + first * 4, (row * p.codewords + j) * 4, 4, "f"
                    )
                ]
                for row in range(p.together)
            ]
            for j in range(ahead):
                word = [y for x in words[4 * j : 4 * j + 4] for y in warp.bfloat16s(x)]
                for row in range(p.together):
                    start, mass = row * CHANNELS, masses[row][j]
                    for c in range(CHANNELS):
                        sums[start + c] = warp.fma(mass, word[c], sums[start + c])
            return following + sums

        rounds = warp.integer(-(-p.codewords // (groups * ahead)))
        sums = [warp.floating(0.0)] * (p.together * CHANNELS)
        sums = warp.loop(rounds, words + sums, further)[4 * ahead :]
        mask = lanes
        while mask < 32:
            sums = [x + warp.from_lane_xor(x, mask) for x in sums]
            mask *= 2
        place = self.sums + warp.index * (p.together * dim * 4) + channel * 4
        writes = warp.less(warp.lane, lanes)
        for row in range(p.together):
            for half in range(0, CHANNELS, 4):
                four = sums[row * CHANNELS + half : row * CHANNELS + half + 4]
                warp.store_shared(place, four, (row * dim + half) * 4, writes)

    @property
    def _channel(self) -> tuple[Any, Any]:
        """The thread's row here, and its channel; there may be none."""
        return self.thread // self.problem.of.dim, self.thread % self.problem.of.dim

    def _write(self, other: list) -> None:
        """A channel of a row each, by one thread."""
        warp, (i, channel) = self.warp, self._channel
        row, there = self._row(i)
        numbers = self.problem.together * self.problem.of.dim  # at most one for each thread
        there = warp.less(warp.select(there, self.thread, numbers), numbers)
        warp.when(there, lambda: self._write_number(self.thread, i, row, channel, other))

    def _write_number(self, number: Any, i: Any, row: Any, channel: Any, other: list) -> None:
        warp, p, dim = self.warp, self.problem, self.problem.of.dim
        out = warp.floating(0.0)
        for w in range(WARPS):
            (x,) = warp.load_shared(self.sums + number * 4, w * p.together * dim * 4, kind="f")
            out = out + x
        total = warp.floating(0.0)
        count = min(4, p.of.value_codewords)
        for j in range(0, p.of.value_codewords, count):  # any stage has all of it
            for x in warp.load_shared(self.mass + i * (p.codewords * 4), j * 4, count, "f"):
                total = total + x
        (top,) = warp.load_shared(self.tops + i * 4)
        some = warp.less(warp.integer(0), warp.bits_of(total))  # as they are not negative
        unit = math.log2(pieces.LAST_BIT) + pieces.PROBABILITY_BITS - pieces.HEADROOM
        out = warp.select(some, out * warp.reciprocal(warp.select(some, total, 1.0)), 0.0)
        log = warp.to_float(top) + warp.log2(total) - unit  # of the mass, to the base 2
        log = warp.select(some, log, -math.inf)
        if p.beside:
            out, log = self._merged(out, log, other)
        (large,) = warp.load_shared(self.flags + i * 4)
        usable, nan = warp.equal(large, 0), warp.from_bits(warp.integer(0x7FC00000))
        at = self.rows.place(row)
        value = warp.select(usable, out, nan)
        if p.short:  # two channels of two lanes a word
            word = warp.to_bfloat16s(value, warp.from_lane_xor(value, 1))
            place = self.at.out + at * (dim * 2) + warp.wide(channel * 2)
            warp.store_global(place, [word], where=warp.equal(channel & 1, 0))
        else:
            warp.store_global(self.at.out + at * (dim * 4) + warp.wide(channel * 4), [value])
        lse = warp.select(usable, log * LN2, nan)
        warp.store_global(self.at.lse + at * 4, [lse], where=warp.equal(channel, 0))

    def _others(self) -> list:
        """Log-sum-exp and value of each other part of the softmax, for the thread's channel."""
        warp, p, (i, channel) = self.warp, self.problem, self._channel
        row, _ = self._row(warp.unsigned_min(i, p.together - 1))
        of_head = warp.wide(self.sequence * p.of.heads + self.head) * (p.beside * p.rows)
        first = of_head + warp.wide(row)
        place = self.at.other + first * (p.of.dim * 4) + warp.wide(channel * 4)
        return [
            (
                warp.load_global(self.at.other_lse + first * 4, n * p.rows * 4, kind="f")[0],
                warp.load_global(place, n * p.rows * p.of.dim * 4, kind="f")[0],
            )
            for n in range(p.beside)
        ]

    def _merged(self, out: Any, log: Any, other: list) -> tuple[Any, Any]:
        """One softmax with what is beside; logarithms have the base 2."""
        warp = self.warp
        logs = [log, *(lse * (1 / LN2) for lse, _ in other)]
        outs = [out, *(value for _, value in other)]
        top = warp.floating(NOTHING)
        for x in logs:
            top = warp.fmax(top, x)
        total = sums = warp.floating(0.0)
        for x, value in zip(logs, outs, strict=True):
            share = warp.exp2(x - top)
            total, sums = total + share, warp.fma(share, value, sums)
        some = warp.less(warp.integer(0), warp.bits_of(total))
        safe = warp.select(some, total, 1.0)
        out = warp.select(some, sums * warp.reciprocal(safe), 0.0)
        return out, warp.select(some, top + warp.log2(safe), -math.inf)
