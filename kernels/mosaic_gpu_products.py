"""Products of queries with key codewords and the mean key, on Hopper GPUs: the first part of the
decode kernel (ours).

A thread block makes what its own scores take: for each of its blocks of tokens the products of four
query rows with all codewords, in the frame of that block, and the mean key's share at the block's
knots. Both are products of tensor cores, 16 rows at a time: four blocks of four rows. The left
operands are made once, in shared memory; a warp then takes a few codewords or knots, keeps them in
its registers, and goes through all rows. What comes out is written to global memory, where scorers
read it as they need it, from the second-level cache.

The mean key's share ``⟨row, R_t mean⟩``: a pair of channels (a, b) of a row in its block's frame
gives ``(q_a k_a + q_b k_b) cos θt + (q_b k_a - q_a k_b) sin θt``. What is in front are amplitudes
of the row; the cosines and sines at the knots are waves, the same for all blocks.

A lane has, with ``t = lane % 4``, channels ``8 t + 32 j …`` of a row: what order they are
contracted in does not matter, so that 16 bytes are read at a time.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
from jaxtyping import Array, Float

from gsrq_jax.kernels import rotary
from gsrq_jax.kernels.pieces import LN2, ROWS
from gsrq_jax.kernels.precision import in_pieces

if TYPE_CHECKING:
    from gsrq_jax.kernels import mosaic_gpu, mosaic_gpu_planes, mosaic_gpu_recent

FRAMES = 4
"""Blocks of a left operand: with `ROWS` each its 16 rows."""
WORDS = 32
"""Codewords that a warp takes at a time: two stages, four right operands."""
STAGES = WORDS // 16
KNOTS = 8
"""Knots that a warp takes at a time: one right operand."""
LEAD = 3
"""Numbers before a block's share where knots are apart, such that what tensor cores make of it is
aligned: all but the first knot."""
STEP_BYTES = 32 * 16
"""Of 16 channels of a left operand: four words a lane."""


def knot_units(problem: "mosaic_gpu.Problem") -> int:
    """Units of a block's knots, 0 if there is no mean key."""
    return -(-problem.frame_knots // KNOTS)


def waves(
    problem: "mosaic_gpu.Problem", inv_freq: Float[Array, " d/2"]
) -> Float[Array, "knots 2 d"]:
    """Cosines and sines of the angles from a block's start to its knots, in float16: upper and
    lower parts.

    Up to a multiple of `KNOTS`. Where they are apart, from the second to that at the next block's
    start; the first has no angle.
    """
    p = problem
    knots = jnp.arange(knot_units(p) * KNOTS) + (p.every > 1)
    both = jnp.concatenate(rotary.turns(p.every * knots, inv_freq), axis=-1)
    return jnp.stack(in_pieces(both, 2, jnp.float16), axis=1)


@dataclasses.dataclass(frozen=True)
class Layout:
    """Shared memory of this part.

    Attributes:
        of: the shapes.
        nbytes: that there are.
    """

    of: "mosaic_gpu.Problem"
    nbytes: int

    @property
    def steps(self) -> int:
        """Of 16 channels."""
        return self.of.dim // 16

    @property
    def parts(self) -> int:
        """Left operands of the same rows: themselves, amplitudes' upper and lower parts."""
        return self.of.key.shared + 2 * (self.of.every > 0)

    @property
    def tile_bytes(self) -> int:
        """Of the left operands of four blocks."""
        return self.parts * self.steps * STEP_BYTES

    @property
    def tiles(self) -> int:
        """Of four blocks, that fit."""
        return self.nbytes // self.tile_bytes


class Rows:
    """Four query rows of a KV head and a sequence, said to a warp."""

    def __init__(
        self,
        problem: "mosaic_gpu.Problem | mosaic_gpu_planes.Problem | mosaic_gpu_recent.Problem",
        warp: Any,
        pair: Any,
    ):
        self.problem, self.warp, self.pair = problem, warp, pair
        self.head = pair // (problem.batch * problem.row_groups)
        self.sequence = pair // problem.row_groups % problem.batch

    def row(self, i: Any) -> tuple[Any, Any]:
        """The row of all rows of the KV head that is row ``i`` here, and whether it is there."""
        warp, p = self.warp, self.problem
        rows = p.tokens * p.group
        row = self.pair % p.row_groups * ROWS + i
        return warp.unsigned_min(row, rows - 1), warp.less(row, rows)

    def place(self, row: Any) -> Any:
        """Where a row of the KV head lies in arrays ``[B, T, H, q]``."""
        warp, p = self.warp, self.problem
        of_token = (self.sequence * p.tokens + row // p.group) * p.heads + self.head
        return warp.wide(of_token * p.group + row % p.group)


class Products:
    """What one warp does, said to that warp."""

    def __init__(
        self,
        problem: "mosaic_gpu.Problem",
        layout: Layout,
        warp: Any,
        at: "mosaic_gpu.Addresses",
        base: Any,
        warps: int,
        rows: Rows,
        first: Any,
        count: Any,
    ):
        """Of some rows in blocks ``first`` to ``first + count``, with shared memory from ``base``
        on; ``warps`` of the thread block do the same."""
        self.problem, self.layout, self.warp, self.at = problem, layout, warp, at
        self.base, self.warps, self.rows, self.first, self.count = base, warps, rows, first, count
        self.row, self.channel = warp.lane // 4, warp.lane % 4 * 8
        self.pair, self.head = rows.pair, rows.head
        self.own = warp.lane * 16  # of four words a lane

    def run(self) -> None:
        """All products of the blocks, as many blocks at a time as fit; then all warps see them."""
        warp, most = self.warp, self.layout.tiles
        tiles = (self.count + (FRAMES - 1)) // FRAMES
        times = (tiles + (most - 1)) // most
        each = (tiles + times - 1) // warp.signed_max(times, warp.integer(1))

        def of_some(i: Any, _: list) -> list:
            begin = i * each
            here = warp.unsigned_min(tiles - begin, each)
            # By the last warps first, which have the fewest units.
            last = warp.integer(self.warps - 1) - warp.index
            self._each(here * 2, last, lambda i, n: self._left(begin, n // 2, n % 2))
            units = warp.integer(knot_units(self.problem) + self._words)
            self._each(units, warp.index, lambda i, n: self._unit(n, begin, here, i))
            # Who has a unit has waited when its right operands were on their way.
            warp.when(warp.less(units, warp.index + 1), warp.sync_block)
            warp.copies_fence()
            warp.sync_block()
            return []

        warp.loop(times, [], of_some)

    def _each(self, count: Any, index: Any, body: Any) -> None:
        """``body(i, n)`` for each n of so many, which the warps share by their index: the warp's
        ``i``-th."""
        rounds = (count + (self.warps - 1) - index) // self.warps

        def turn(i: Any, _: list) -> list:
            body(i, i * self.warps + index)
            return []

        self.warp.loop(rounds, [], turn)

    @property
    def _words(self) -> int:
        """Units of codewords."""
        return -(-self.problem.key.stages // STAGES) if self.problem.key.shared else 0

    # Left operands.

    def _left(self, begin: Any, tile: Any, upper: Any) -> None:
        """Rows g, or g + 8, of four blocks in their frames, and their amplitudes, to shared
        memory.

        Cost, head_dim 128: 28 loads and 24 stores of 16 and 8 bytes, some 300 others.
        """
        warp, p = self.warp, self.problem
        own = self.base + tile * self.layout.tile_bytes + self.own + upper * 8
        here = self._here(begin + tile) + upper * 2
        block = self.first + warp.unsigned_min(here, self.count - 1)
        number, there = self.rows.row(self.row % ROWS)
        query = self.at.query + self.rows.place(number) * (p.dim * 4)
        starts = range(0, p.dim // 2, 32)
        channels = [*starts, *(i + p.dim // 2 for i in starts)]
        # Everything is on its way before anything is waited for.
        row = [x for i in channels for x in self._numbers(query, i)]
        angles = warp.wide(block * (p.dim * 2))
        cos, sin = (
            [x for i in starts for x in self._numbers(place + angles, i)]
            for place in (self.at.cos, self.at.sin)
        )
        row = [warp.select(there, x * (1 / LN2), 0.0) for x in row]
        row = self._turned(row, cos, sin)
        if p.key.shared:
            self._put(own, 0, channels, self._halves(row))
        if not p.every:
            return
        mean = self.at.mean + warp.wide(self.head * (p.dim * 4))
        mean = [x for i in channels for x in self._numbers(mean, i)]
        if p.every > 1:
            mean = self._slow(mean, starts)
        # As if the mean key were an angle: its channels are in place of cosine and sine.
        amplitudes = self._turned(row, *self._split(mean))
        for n, piece in enumerate(self._in_pieces(amplitudes)):
            self._put(own, p.key.shared + n, channels, piece)
        if p.every > 1:
            share = warp.floating(0.0)
            for x in self._split(amplitudes)[0]:
                share = share + x
            self._put_first(begin + tile, upper, share)

    @staticmethod
    def _split(numbers: list) -> tuple[list, list]:
        """The first of each pair of channels, and the second."""
        return numbers[: len(numbers) // 2], numbers[len(numbers) // 2 :]

    def _turned(self, row: list, cos: list, sin: list) -> list:
        """Pairs (a, b) of channels as ``a cos + b sin`` and ``b cos - a sin``."""
        pairs = list(zip(*self._split(row), cos, sin, strict=True))
        first = [self.warp.fma(a, c, b * s) for a, b, c, s in pairs]
        return first + [b * c - a * s for a, b, c, s in pairs]

    def _slow(self, mean: list, channels: Any) -> list:
        """`rotary.slow`; what is not negative is compared as integers are."""
        warp = self.warp
        most, zero = warp.bits_of(warp.floating(math.pi)), warp.floating(0.0)
        angles = [
            x * float(self.problem.every)
            for i in channels
            for x in self._numbers(self.at.inv_freq, i)
        ]
        fast = [warp.less(most, warp.bits_of(x)) for x in angles]
        return [warp.select(f, zero, x) for f, x in zip(fast * 2, mean, strict=True)]

    def _numbers(self, place: Any, channel: int) -> list:
        """Eight of the lane's channels, from that one of the first lane's on."""
        place = place + self.warp.wide(self.channel * 4)
        halves = (self.warp.load_global(place, channel * 4 + at, 4, "f") for at in (0, 16))
        return [x for half in halves for x in half]

    def _halves(self, numbers: list) -> list:
        """Words of two float16 each."""
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        return [self.warp.to_halves(x, y) for x, y in pairs]

    def _in_pieces(self, numbers: list) -> tuple[list, list]:
        """Upper and lower parts, words of two float16."""
        upper = self._halves(numbers)
        near = [x for word in upper for x in self.warp.halves(word)]
        return upper, self._halves([x - y for x, y in zip(numbers, near, strict=True)])

    def _put(self, own: Any, part: int, channels: list[int], words: list) -> None:
        """Eights of channels of a row: two of the four words of two steps each."""
        for n, channel in enumerate(channels):
            at = (part * self.layout.steps + channel // 16) * STEP_BYTES
            for i in range(2):
                two = words[4 * n + 2 * i : 4 * n + 2 * i + 2]
                self.warp.store_shared(own, two, at + i * STEP_BYTES)

    def _operand(self, place: Any, part: int, step: int) -> list:
        """A left operand, as products take it."""
        at = (part * self.layout.steps + step) * STEP_BYTES
        low, low_after, high, high_after = self.warp.load_shared(place + self.own, at, 4)
        return [low, high, low_after, high_after]

    # Right operands, and products.

    def _unit(self, number: Any, begin: Any, tiles: Any, turn: Any) -> None:
        """Of so many tiles of blocks: the knots of a unit, or its codewords, which come after.

        In a warp's first turn left operands are waited for, by all warps.
        """
        warp, shares = self.warp, knot_units(self.problem)

        def ready() -> None:
            warp.when(warp.equal(turn, 0), warp.sync_block)

        def knots() -> None:
            self._knots(number, begin, tiles, ready)

        def words() -> None:
            self._codewords(number - shares, begin, tiles, ready)

        if self._words and shares:
            warp.either(warp.less(number, shares), knots, words)
        else:
            (knots if shares else words)()

    def _right(self, place: Any) -> list[list]:
        """The lane's channels of its column, two words a step."""
        words = []
        for channel in range(0, self.problem.dim, 32):
            place_of_lane = place + self.warp.wide(self.channel * 2)
            four = self.warp.load_global(place_of_lane, channel * 2, 4)
            words += [four[:2], four[2:]]
        return words

    def _codewords(self, unit: Any, begin: Any, tiles: Any, ready: Callable[[], None]) -> None:
        """Products with the codewords of two stages, with left operands that are there when
        ``ready`` returns.

        Columns are codewords in such an order that a lane gets eight in a row. Cost of a tile,
        head_dim 128: 8 LDS of 16 bytes, 32 products, 8 conversions, 2 stores of 16 bytes; 16 loads
        of 16 bytes and 192 conversions before.
        """
        warp, p = self.warp, self.problem
        columns, operands = p.key.stages * 16, WORDS // 8
        words = self.at.words + warp.wide(self.head) * (columns * p.dim * 2)
        right = []
        for n in range(operands):
            column = unit * WORDS + self.row // 2 * 8 + self.row % 2 + 2 * n
            column = warp.unsigned_min(column, columns - 1)
            right.append(self._right(words + warp.wide(column * (p.dim * 2))))
        ready()
        if p.short_words:
            right = [
                [[warp.to_halves(*warp.bfloat16s(x)) for x in step] for step in operand]
                for operand in right
            ]
        column = unit * WORDS + warp.lane % 4 * 8
        count = warp.select(warp.less(column, columns), self.count, 0)
        of_row, here = columns * 2, self._here(begin)
        block = warp.wide(self.pair) * p.blocks + warp.wide(self.first + here)
        to = self.at.products + (block * ROWS + warp.wide(self.row % ROWS)) * of_row
        to = to + warp.wide(column * 2)

        def of_tile(tile: Any, _: list) -> list:
            place = self.base + tile * self.layout.tile_bytes
            sums: list = [None] * operands
            for step in range(self.layout.steps):
                left = self._operand(place, 0, step)
                sums = [
                    warp.float16_product(left, operand[step], so_far)
                    for operand, so_far in zip(right, sums, strict=True)
                ]
            row = to + warp.wide(tile * (FRAMES * ROWS * of_row))
            for later in (0, 2):  # rows g, and g + 8, whose block is two later
                four = [warp.to_halves(*x[later:][:2]) for x in sums]
                there = warp.less(here + tile * FRAMES, count - later)
                warp.store_global(row, four, later * ROWS * of_row, there)
            return []

        warp.loop(tiles, [], of_tile)

    def _knots(self, unit: Any, begin: Any, tiles: Any, ready: Callable[[], None]) -> None:
        """The mean key's shares at some knots, to 20 bits or so: upper parts with upper and lower
        ones, and lower with upper.

        Cost of a tile, head_dim 128: 16 LDS of 16 bytes, 24 products, 8 FADD, 2 stores of 8 bytes;
        8 loads of 16 bytes before.
        """
        warp, p = self.warp, self.problem
        knot = unit * KNOTS + self.row
        place = self.at.waves + warp.wide(knot * (2 * p.dim * 2))
        right = [self._right(place), self._right(place + warp.wide(warp.integer(p.dim * 2)))]
        ready()
        part = int(p.key.shared)
        knot = unit * KNOTS + warp.lane % 4 * 2
        count = warp.select(warp.less(knot, p.frame_knots), self.count, 0)
        here, of_tile_bytes = self._here(begin), FRAMES * self._share_bytes
        lead = LEAD + 1 if p.every > 1 else 0
        to = self._share_of(here) + warp.wide((knot + lead) * 4)

        def of_tile(tile: Any, _: list) -> list:
            place = self.base + tile * self.layout.tile_bytes
            sums: list = [None] * 3
            for step in range(self.layout.steps):
                upper, lower = (self._operand(place, part + i, step) for i in range(2))
                sums = [
                    warp.float16_product(left, of_step[step], so_far)
                    for left, of_step, so_far in zip(
                        (lower, upper, upper), (right[0], right[1], right[0]), sums, strict=True
                    )
                ]
            share = [a + b + c for a, b, c in zip(*sums, strict=True)]
            row = to + warp.wide(tile * of_tile_bytes)
            for later in (0, 2):  # rows g, and g + 8
                there = warp.less(here + tile * FRAMES, count - later)
                warp.store_global(row, share[later:][:2], later * self._share_bytes, there)
            return []

        warp.loop(tiles, [], of_tile)

    def _put_first(self, tile: Any, upper: Any, share: Any) -> None:
        """At the start of a block that does not follow another in its chunk: of the lane's
        channels."""
        warp = self.warp
        for mask in (1, 2):
            share = share + warp.from_lane_xor(share, mask)
        here = self._here(tile) + upper * 2
        one = warp.equal(here % self.problem.blocks_of_chunk + warp.lane % 4, 0)
        own = warp.less(warp.select(one, here, self.count), self.count)
        warp.store_global(self._share_of(here), [share], LEAD * 4, where=own)

    @property
    def _share_bytes(self) -> int:
        """From a block's share to the next one's; where a chunk has two, half of what it has."""
        return ROWS * self.problem.unit_knots * 4 // self.problem.blocks_of_chunk

    def _share_of(self, here: Any) -> Any:
        """Where the share of the lane's row of such a block starts."""
        warp, p = self.warp, self.problem
        of_chunk = p.blocks_of_chunk
        unit = warp.wide(self.pair) * p.share_units + warp.wide((self.first + here) // of_chunk)
        place = self.at.share + (unit * ROWS + warp.wide(self.row % ROWS)) * (p.unit_knots * 4)
        return place + warp.wide(here % of_chunk * (p.frame_knots * 4))

    def _here(self, tile: Any) -> Any:
        """Which of the blocks here the lane's row g of a tile is of; row g + 8 is two later."""
        return tile * FRAMES + self.row // ROWS
