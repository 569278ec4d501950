"""What the products before attention over codes take, on Hopper GPUs: Pallas Mosaic GPU (ours).

A query meets the codewords in the frame of each block, and the mean key in its pairs of channels:
two left operands, both made of the query alone and both in float16, by one kernel. A warp has the
four rows of a group, eight pairs of channels a lane, and goes through some blocks with them in its
registers; other warps make the amplitudes. The right operand of the mean key's product, waves at
all knots, follows from positions alone, as do the angles of the frames: another kernel, which
layers share. XLA's program of the same is four kernels.

What limits them: starting them, or with many sequences or tokens the bytes that they write.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gsrq_jax.kernels import mosaic_gpu
from gsrq_jax.kernels.mosaic_gpu import LN2, PROCESSORS
from gsrq_jax.kernels.pieces import ROWS

WARPS = 4
PAIRS = 8
"""Pairs of channels of a lane: 16 bytes of float16, twice."""
AHEAD = 2
"""Blocks of a warp whose angles are under way together."""
QUARTER = 1.57079637050628662109375
"""Of a turn, in float32."""
SINE = [(-1) ** i / math.factorial(2 * i + 1) for i in range(1, 5)]
COSINE = [(-1) ** i / math.factorial(2 * i) for i in range(1, 6)]
"""Of Taylor's series, in the square of an angle, but for the first terms."""
LONGEST = 2**21
"""Tokens up to which the kernel's angles are as exact as XLA's, of frequencies of at most 1."""
RESIDENT = 24
"""Warps that a processor has at a time, of up to 80 registers a lane."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call."""

    of: mosaic_gpu.Problem

    @property
    def lanes(self) -> int:
        """Of a row."""
        return self.of.dim // (2 * PAIRS)

    @property
    def together(self) -> int:
        """Blocks that a warp has at a time."""
        return 32 // (ROWS * self.lanes)

    @property
    def splits(self) -> int:
        """Warps that share the blocks of a group of rows, all those of a thread block: enough to
        fill the GPU."""
        wanted = math.ceil(RESIDENT * PROCESSORS / self.of.pairs)
        most = math.ceil(self.of.blocks / self.together)
        return math.ceil(min(wanted, most) / WARPS) * WARPS

    @property
    def framing(self) -> int:
        """Thread blocks that turn rows."""
        return self.of.pairs * self.splits // WARPS

    @property
    def waving(self) -> int:
        """Thread blocks that make waves."""
        return math.ceil(self.of.share_length * self.lanes / (WARPS * 32))

    @property
    def parts(self) -> int:
        """Thread blocks of queries; the last make amplitudes, a warp for a group of rows."""
        return self.framing + math.ceil(self.of.pairs / WARPS) * (self.of.every > 0)


def waves(
    problem: mosaic_gpu.Problem, inv_freq: Float[Array, " d/2"], first: int | Int[Array, ""]
) -> tuple[Float[Array, "N d/2"], Float[Array, "N d/2"], Float[Array, "share_length 3 d"] | None]:
    """`gsrq_jax.kernels.mosaic_gpu.waves`.

    By XLA where there is no mean key, which leaves a few angles, or there are more tokens than
    `LONGEST`.
    """
    p = problem
    if not p.every or p.stride * p.block * p.blocks > LONGEST:
        return mosaic_gpu.waves(problem, inv_freq, first)
    start = jnp.asarray(first, jnp.int32).reshape(1)
    return waves_kernel(Problem(problem))(inv_freq.astype(jnp.float32), start)


def prepare(
    problem: mosaic_gpu.Problem,
    query: Float[Array, "B T H q d"],
    mean: Float[Array, "H d"] | None,
    inv_freq: Float[Array, " d/2"],
    cos: Float[Array, "N d/2"],
    sin: Float[Array, "N d/2"],
) -> tuple[Float[Array, "H rows/4 N 4 d"], Float[Array, "H*rows 3 d"] | None]:
    """`gsrq_jax.kernels.mosaic_gpu.prepare`."""
    of_mean = [] if mean is None else [x.astype(jnp.float32) for x in (mean, inv_freq)]
    framed, *amplitudes = prepare_kernel(Problem(problem))(query, cos, sin, *of_mean)
    return framed, amplitudes[0] if amplitudes else None


def prepare_kernel(problem: Problem) -> Any:
    """The kernel as a function of query, cosines and sines, and if there is a mean key of that and
    the rotary frequencies."""
    from gsrq_jax.kernels.warp import Warp, warp_kernel

    p = problem.of

    def run(warp: Warp, *places: Any) -> None:
        PrepareKernel(problem, warp, Addresses.of(p, *places[:-1])).run()

    rows, half = p.pairs * ROWS, jnp.float16
    framed = jax.ShapeDtypeStruct((p.heads, p.pairs // p.heads, p.blocks, ROWS, p.dim), half)
    amplitudes = jax.ShapeDtypeStruct((rows, 3, p.dim), half)
    return warp_kernel(
        run,
        outputs=[framed, amplitudes] if p.every else [framed],
        nbytes=16,  # none is used
        parts=problem.parts,
        warps=WARPS,
        name="attend_prepare",
    )


def waves_kernel(problem: Problem) -> Any:
    """The kernel as a function of the rotary frequencies and where block 0 starts."""
    from gsrq_jax.kernels.warp import Warp, warp_kernel

    p = problem.of

    def run(warp: Warp, *places: Any) -> None:
        WavesKernel(problem, warp, *places[:-1]).run()

    angles = jax.ShapeDtypeStruct((p.blocks, p.dim // 2), jnp.float32)
    return warp_kernel(
        run,
        outputs=[angles, angles, jax.ShapeDtypeStruct((p.share_length, 3, p.dim), jnp.float16)],
        nbytes=16,  # none is used
        parts=problem.waving,
        warps=WARPS,
        name="attend_waves",
    )


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Where the arrays lie; what belongs to the mean key may be missing."""

    query: Any
    cos: Any
    sin: Any
    mean: Any
    inv_freq: Any
    framed: Any
    amplitudes: Any

    @classmethod
    def of(cls, problem: mosaic_gpu.Problem, *places: Any) -> "Addresses":
        """In the order of the kernel's arguments."""
        if problem.every:
            return cls(*places)
        query, cos, sin, framed = places
        return cls(query, cos, sin, None, None, framed, None)


class PairsKernel:
    """What is said to a warp whose lanes have some pairs of channels each."""

    def __init__(self, problem: Problem, warp: Any):
        self.problem, self.warp = problem, warp
        self.channel = warp.lane % problem.lanes * PAIRS

    def _numbers(self, place: Any, offset: int = 0) -> list:
        """One for each of the lane's pairs."""
        place = place + self.warp.wide(self.channel * 4)
        halves = (self.warp.load_global(place, offset + at, 4, "f") for at in (0, 16))
        return [x for half in halves for x in half]

    def _write(self, place: Any, a: list, b: list, offset: int = 0, where: Any = None) -> None:
        """Both channels of each of the lane's pairs, words of two float16."""
        place = place + self.warp.wide(self.channel * 2)
        self.warp.store_global(place, a, offset, where)
        self.warp.store_global(place, b, offset + self.problem.of.dim, where)

    def _halves(self, numbers: list) -> list:
        """Words of two float16 each."""
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return [self.warp.to_halves(x, y) for x, y in pairs]

    def _in_pieces(self, numbers: list) -> tuple[list, list]:
        """Upper and lower parts, words of two float16."""
        upper = self._halves(numbers)
        near = [x for word in upper for x in self.warp.halves(word)]
        return upper, self._halves([x - y for x, y in zip(numbers, near, strict=True)])


class PrepareKernel(PairsKernel):
    """What one warp of one thread block does with queries, said to that warp."""

    def __init__(self, problem: Problem, warp: Any, at: Addresses):
        super().__init__(problem, warp)
        self.at, self.row = at, warp.lane // problem.lanes % ROWS

    def run(self) -> None:
        """A group's rows in the frames of some blocks, or its amplitudes."""
        warp, framing = self.warp, self.problem.framing
        if not self.problem.of.every:
            self._turn()
            return
        warp.either(warp.less(warp.block, framing), self._turn, self._multiply_by_mean)

    def _query(self, pair: Any) -> tuple[list, list]:
        """The lane's pairs of channels of its row of a group, in units in which 2 is the base."""
        warp, p = self.warp, self.problem.of
        rows = p.tokens * p.group
        row = pair % p.row_groups * ROWS + self.row
        there = warp.less(row, rows)
        safe = warp.unsigned_min(row, rows - 1)
        head, sequence = pair // (p.batch * p.row_groups), pair // p.row_groups % p.batch
        of_token = (sequence * p.tokens + safe // p.group) * p.heads + head
        place = self.at.query + warp.wide(of_token * p.group + safe % p.group) * (p.dim * 4)
        a, b = (
            [warp.select(there, x * (1 / LN2), 0.0) for x in half] for half in self._pairs(place)
        )
        return a, b

    def _pairs(self, place: Any) -> tuple[list, list]:
        """Both channels of each of the lane's pairs."""
        return self._numbers(place), self._numbers(place, self.problem.of.dim * 2)

    def _turn(self) -> None:
        """The rows of a group in the frames of every so many blocks."""
        warp, p, together = self.warp, self.problem.of, self.problem.together
        number = warp.block * WARPS + warp.index
        pair, part = number // self.problem.splits, number % self.problem.splits
        a, b = self._query(pair)
        first = part * together + warp.lane // (ROWS * self.problem.lanes)
        step = self.problem.splits * together
        rounds = math.ceil(p.blocks / step)
        ahead = min(AHEAD, rounds)

        def further(i: Any, _: list) -> list:
            blocks = [first + (i * ahead + j) * step for j in range(ahead)]
            turns = [self._turns(warp.unsigned_min(block, p.blocks - 1)) for block in blocks]
            for block, (cos, sin) in zip(blocks, turns, strict=True):
                pairs = list(zip(a, b, cos, sin, strict=True))
                row = (warp.wide(pair) * p.blocks + warp.wide(block)) * ROWS + warp.wide(self.row)
                self._write(
                    self.at.framed + row * (p.dim * 2),
                    self._halves([warp.fma(x, c, y * s) for x, y, c, s in pairs]),
                    self._halves([y * c - x * s for x, y, c, s in pairs]),
                    where=warp.less(block, p.blocks),
                )
            return []

        warp.loop(warp.integer(math.ceil(rounds / ahead)), [], further)

    def _turns(self, block: Any) -> tuple[list, list]:
        """Cosines and sines of the lane's pairs at the start of a block."""
        place = self.warp.wide(block * (self.problem.of.dim * 2))
        return self._numbers(self.at.cos + place), self._numbers(self.at.sin + place)

    def _multiply_by_mean(self) -> None:
        """The amplitudes of a group: each number in two pieces, the upper one twice."""
        warp, p = self.warp, self.problem.of
        pair = (warp.block - self.problem.framing) * WARPS + warp.index
        there = warp.less(pair, p.pairs)
        pair = warp.unsigned_min(pair, p.pairs - 1)
        a, b = self._query(pair)
        head = pair // (p.batch * p.row_groups)
        k_a, k_b = self._pairs(self.at.mean + warp.wide(head * (p.dim * 4)))
        if p.every > 1:  # as `rotary.slow`; what is not negative is compared as integers are
            angles = [x * float(p.every) for x in self._numbers(self.at.inv_freq)]
            most = warp.bits_of(warp.floating(math.pi))
            fast = [warp.less(most, warp.bits_of(x)) for x in angles]
            k_a, k_b = (
                [warp.select(f, warp.floating(0.0), k) for f, k in zip(fast, half, strict=True)]
                for half in (k_a, k_b)
            )
        pairs = list(zip(a, b, k_a, k_b, strict=True))
        first = self._in_pieces([warp.fma(x, k, y * m) for x, y, k, m in pairs])
        second = self._in_pieces([y * k - x * m for x, y, k, m in pairs])
        place = self.at.amplitudes + warp.wide(pair * ROWS + self.row) * (3 * p.dim * 2)
        lanes = warp.less(warp.lane, ROWS * self.problem.lanes)
        for i, piece in enumerate((0, 1, 0)):
            self._write(place, first[piece], second[piece], i * p.dim * 2, there & lanes)


class WavesKernel(PairsKernel):
    """What one warp of one thread block does with positions, said to that warp."""

    def __init__(
        self, problem: Problem, warp: Any, inv_freq: Any, first: Any, cos: Any, sin: Any, waves: Any
    ):
        super().__init__(problem, warp)
        self.inv_freq, self.first, self.starts, self.waves = inv_freq, first, (cos, sin), waves

    def run(self) -> None:
        """The waves at a knot, and where it is a block's first the angles there."""
        warp, p, lanes = self.warp, self.problem.of, self.problem.lanes
        knot = (warp.block * WARPS + warp.index) * (32 // lanes) + warp.lane // lanes
        there = warp.less(knot, p.share_length)
        block, ahead = knot // p.block_knots, knot % p.block_knots
        (first,) = warp.load_global(self.first)
        inv_freq = self._numbers(self.inv_freq)
        start = self._turns(first + block * (p.stride * p.block), inv_freq)
        pairs = list(zip(*start, *self._turns(ahead * p.every, inv_freq), strict=True))
        cos = self._in_pieces([warp.fma(c, c_on, s * s_on * -1.0) for c, s, c_on, s_on in pairs])
        sin = self._in_pieces([warp.fma(s, c_on, c * s_on) for c, s, c_on, s_on in pairs])
        place = self.waves + warp.wide(knot) * (3 * p.dim * 2)
        for i, piece in enumerate((0, 0, 1)):
            self._write(place, cos[piece], sin[piece], i * p.dim * 2, there)
        own = warp.equal(ahead, 0) & warp.less(block, p.blocks)
        place = warp.wide(block * (p.dim // 2) + self.channel) * 4
        for at, numbers in zip(self.starts, start, strict=True):
            for i in range(0, PAIRS, 4):
                warp.store_global(at + place, numbers[i : i + 4], i * 4, own)

    def _turns(self, position: Any, inv_freq: list) -> tuple[list, list]:
        """Cosines and sines of the lane's pairs at a position, to 2**-23.

        Of the angle, rounded to float32, less so many quarters of a turn: the first difference is
        exact, and what is left is at most 1 for angles of up to `LONGEST`.
        """
        warp, number = self.warp, self.warp.floating
        position = warp.to_float(position)
        cosines: list[Any] = []
        sines: list[Any] = []
        for frequency in inv_freq:
            angle = position * frequency
            quarters = warp.floor(warp.fma(angle, number(2 / math.pi), number(0.5)))
            rest = warp.fma(warp.to_float(quarters), number(-QUARTER), angle)
            rest = warp.fma(warp.to_float(quarters), number(QUARTER - math.pi / 2), rest)
            square = rest * rest
            sine = self._series(square, SINE)
            sine = warp.fma(sine, rest * square, rest)
            cosine = warp.fma(self._series(square, COSINE), square, number(1.0))
            odd = warp.equal(quarters & 1, 1)
            # Signs of the quarters: + + - - of the sine, + - - + of the cosine.
            for out, x, y, shift in ((sines, cosine, sine, 0), (cosines, sine, cosine, 1)):
                sign = ((quarters + shift) & 2) << 30
                out.append(warp.from_bits(warp.bits_of(warp.select(odd, x, y)) ^ sign))
        return cosines, sines

    def _series(self, x: Any, coefficients: list[float]) -> Any:
        total = self.warp.floating(coefficients[-1])
        for c in coefficients[-2::-1]:
            total = self.warp.fma(total, x, self.warp.floating(c))
        return total
