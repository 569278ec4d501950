"""What the products before attention over codes take, on Hopper GPUs, in one kernel: Pallas Mosaic
GPU (ours).

A query meets the codewords in the frame of each block, and the mean key in its pairs of channels:
two left operands, both made of the query alone and both in float16. A warp has the four rows of a
group, eight pairs of channels a lane, and goes through some blocks with them in its registers;
other warps make the amplitudes. XLA's program of the same is two kernels.

What limits it: starting it, or with many sequences the bytes that it writes.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gsrq_jax.kernels import mosaic_gpu
from gsrq_jax.kernels.mosaic_gpu import LN2, PROCESSORS
from gsrq_jax.kernels.pieces import ROWS

WARPS = 4
PAIRS = 8
"""Pairs of channels of a lane: 16 bytes of float16, twice."""
AHEAD = 2
"""Blocks of a warp whose angles are under way together."""
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
    def parts(self) -> int:
        """Thread blocks; those that make amplitudes, a warp for a group of rows, are the last."""
        return self.framing + math.ceil(self.of.pairs / WARPS) * (self.of.every > 0)


def prepare(
    problem: mosaic_gpu.Problem,
    query: Float[Array, "B T H q d"],
    mean: Float[Array, "H d"] | None,
    inv_freq: Float[Array, " d/2"],
    cos: Float[Array, "n d/2"],
    sin: Float[Array, "n d/2"],
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


class PrepareKernel:
    """What one warp of one thread block does, said to that warp."""

    def __init__(self, problem: Problem, warp: Any, at: Addresses):
        self.problem, self.warp, self.at = problem, warp, at
        self.row = warp.lane // problem.lanes % ROWS
        self.channel = warp.lane % problem.lanes * PAIRS

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

    def _numbers(self, place: Any, offset: int = 0) -> list:
        """One for each of the lane's pairs."""
        place = place + self.warp.wide(self.channel * 4)
        halves = (self.warp.load_global(place, offset + at, 4, "f") for at in (0, 16))
        return [x for half in halves for x in half]

    def _pairs(self, place: Any) -> tuple[list, list]:
        """Both channels of each of the lane's pairs."""
        return self._numbers(place), self._numbers(place, self.problem.of.dim * 2)

    def _write(self, place: Any, a: list, b: list, offset: int = 0, where: Any = None) -> None:
        """Both channels of each of the lane's pairs, words of two float16."""
        place = place + self.warp.wide(self.channel * 2)
        self.warp.store_global(place, a, offset, where)
        self.warp.store_global(place, b, offset + self.problem.of.dim, where)

    def _halves(self, numbers: list) -> list:
        """Words of two float16 each."""
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return [self.warp.to_halves(x, y) for x, y in pairs]

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

    def _in_pieces(self, numbers: list) -> tuple[list, list]:
        """Upper and lower parts, words of two float16."""
        upper = self._halves(numbers)
        near = [x for word in upper for x in self.warp.halves(word)]
        return upper, self._halves([x - y for x, y in zip(numbers, near, strict=True)])
