"""Attention of a new token over what a cache keeps exact, on Hopper GPUs: Pallas Mosaic GPU (ours).

Sinks, the new token itself and the window are one list of tokens, cut into parts of equal length;
a thread block has one part, and four query rows, of one KV head of one sequence. A key is read by
``d / 8`` lanes, 16 bytes each, so that a warp has ``256 / d`` keys at a time, and `AHEAD` times as
many under way; a value likewise, into sums that stay in registers. Nothing is read that is not
there, and no weight, mask or score is ever written: XLA's program of the same takes some thirteen
small kernels, one of which copies all values of the window to put zeros into slots that no token
holds.

`gsrq_jax.kernels.mosaic_gpu` has it done by the warps that count, which have nothing else to do
until the first chunk is scored; the kernel here is for caches whose codes are in no layout of a
kernel, or spread over devices.

What limits it: the bytes of the keys and values that are there. Beside them there are, for each key
and lane, 16 q multiplications and ``q log2(d / 8)`` shuffles.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from gsrq_jax.kernels import devices
from gsrq_jax.kernels.devices import PROCESSORS
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.mosaic_gpu_products import Rows
from gsrq_jax.kernels.pieces import LN2, ROWS
from gsrq_jax.kernels.reference import Recent

if TYPE_CHECKING:
    from gsrq_jax.kernels import mosaic_gpu, mosaic_gpu_planes

WARPS = 4
AHEAD = 2
"""Keys of a group of lanes whose bytes are under way together."""
CHANNELS = 8
"""Of a lane: 16 bytes of bfloat16."""
LEAST = 64
"""Tokens of a part, so that starting it does not take longer than reading it."""
NOTHING = -1e30
"""Maximum of no scores; the score of what is not there is twice as low."""
ARRAYS = "sink_key", "window_key", "key", "sink_value", "window_value", "value", "counts"
"""What is read beside the query, as `arrays_of` gives it."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call: B, H, q, d, slots of sinks and of the window."""

    batch: int
    heads: int
    group: int
    dim: int
    sinks: int
    ring: int
    tokens: int = 1  # that are new, which is all there is

    @property
    def row_groups(self) -> int:
        """Groups of four query heads of a KV head."""
        return -(-self.group // ROWS)

    @property
    def pairs(self) -> int:
        """(KV head, sequence, group of query heads)."""
        return self.heads * self.batch * self.row_groups

    def parts(self, blocks: int) -> int:
        """Those of so many thread blocks that share the tokens."""
        return min(blocks, math.ceil((self.sinks + 1 + self.ring) / LEAST))

    @property
    def own_parts(self) -> int:
        """In a kernel of its own: enough for two on each processor."""
        return self.parts(math.ceil(2 * PROCESSORS / self.pairs))

    def nbytes(self, warps: int) -> int:
        """Shared memory of so many warps: sums of each, their maximum and total, of each row."""
        return warps * min(ROWS, self.group) * (self.dim + 4) * 4

    def outputs(self, parts: int) -> dict[str, tuple[tuple[int, ...], DTypeLike]]:
        """Shapes and dtypes of what so many parts write."""
        rows = self.batch, self.heads, parts, self.group
        return {"recent": ((*rows, self.dim), jnp.float32), "recent_lse": (rows, jnp.float32)}


def problem_of(query: Any, recent: Recent) -> Problem:
    """The shapes of a call.

    Raises:
        InputError: naming what the kernel does not have.
    """
    batch, tokens, heads, group, dim = query.shape

    def refuse(what: str, given: Any, supported: str) -> None:
        raise InputError(f"the kernel of exact tokens has {supported}, got {what} {given}")

    if tokens != 1:
        refuse("new tokens", tokens, "one new token")
    if dim not in (64, 128):
        refuse("channels of a head", dim, "heads of 64 or 128 channels")
    if group > 8:
        refuse("query heads a KV head", group, "at most 8 query heads a KV head")
    for x in recent[:6]:
        if x.dtype != jnp.bfloat16:
            refuse("some of", x.dtype, "keys and values in bfloat16")
    for x, y in zip(recent[:3], recent[3:6], strict=True):
        if x.shape != y.shape:
            refuse("values", y.shape, f"values as keys, {x.shape}")
    return Problem(batch, heads, group, dim, recent.sink_key.shape[2], recent.window_key.shape[2])


def check_supported(query: Any, recent: Recent) -> Problem:
    """The shapes of a call that can be made here.

    Raises:
        InputError: naming what was given and what is supported.
    """
    problem = problem_of(query, recent)
    devices.check_hopper()
    return problem


def supported(query: Any, recent: Recent) -> Problem | None:
    """`check_supported`, None instead of the error."""
    try:
        return check_supported(query, recent)
    except InputError:
        return None


def attend_recent(
    query: Float[Array, "B 1 H q d"], recent: Recent
) -> tuple[Float[Array, "P B 1 H q d"], Float[Array, "P B 1 H q"]]:
    """`gsrq_jax.kernels.reference.attend_recent` on a Hopper GPU, in P parts to be merged.

    Args:
        query: scaled queries, float32; d 64 or 128, at most 8 query heads a KV head.
        recent: of one new token, keys and values in bfloat16.

    Returns:
        The softmax-weighted values of each part (0 where it has no tokens) and the log-sum-exp of
        its scores (-inf there).

    Raises:
        InputError: if the shapes, dtypes, the device or the version of jax are not supported.
    """
    p = check_supported(query, recent)
    return in_parts(*recent_kernel(p)(query, *arrays_of(recent)))


def in_parts(
    out: Float[Array, "B H P q d"], lse: Float[Array, "B H P q"]
) -> tuple[Float[Array, "P B 1 H q d"], Float[Array, "P B 1 H q"]]:
    """What kernels write, as `attend_recent` returns it."""
    return jnp.moveaxis(out, 2, 0)[:, :, None], jnp.moveaxis(lse, 2, 0)[:, :, None]


def arrays_of(recent: Recent) -> tuple[Array, ...]:
    """`ARRAYS`: keys and values, and sinks, new tokens, first slot and held ones ``[B, 4]``."""
    r = recent
    counts = jnp.stack([x.astype(jnp.int32) for x in (r.sinks, r.new, r.first, r.held)], axis=1)
    if not r.sink_key.shape[2]:  # nothing can be made of no bytes
        r = r._replace(sink_key=r.key, sink_value=r.value)
    return *r[:6], counts


def recent_kernel(problem: Problem) -> Any:
    """The kernel as a function of the query and `ARRAYS`; its results are `Problem.outputs`."""
    from gsrq_jax.kernels.warp import warp_kernel

    p, parts = problem, problem.own_parts
    return warp_kernel(
        functools.partial(one_part, p),
        outputs=[jax.ShapeDtypeStruct(*x) for x in p.outputs(parts).values()],
        nbytes=p.nbytes(WARPS) + 16,
        parts=p.pairs * parts,
        warps=WARPS,
        name="attend_recent",
    )


def one_part(problem: Problem, warp: Any, *places: Any) -> None:
    """What one warp of that kernel does."""
    *arrays, shared = places
    parts = problem.own_parts
    RecentTokens(
        problem,
        warp,
        Addresses(*arrays),
        Rows(problem, warp, warp.block // parts),
        (shared + 15) & 0xFFFFFFF0,
        warps=WARPS,
        part=warp.block % parts,
        parts=parts,
        sync=warp.sync_block,
    ).run()


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Where the arrays lie, in the order of the kernel's arguments and results."""

    query: Any
    sink_key: Any
    window_key: Any
    key: Any
    sink_value: Any
    window_value: Any
    value: Any
    counts: Any
    recent: Any
    recent_lse: Any


class RecentTokens:
    """What one of some warps of a thread block does, said to that warp."""

    def __init__(
        self,
        problem: Problem,
        warp: Any,
        at: "Addresses | mosaic_gpu.Addresses | mosaic_gpu_planes.Addresses",
        rows: Rows,
        base: Any,
        *,
        warps: int,
        part: Any,
        parts: int,
        sync: Callable[[], None],
    ):
        """One part of the tokens for four rows, by the first ``warps`` of the thread block, for
        which ``sync`` waits; they have `Problem.nbytes` of shared memory from ``base`` on."""
        self.problem, self.warp, self.at, self.rows = problem, warp, at, rows
        self.base, self.warps, self.part, self.parts, self.sync = base, warps, part, parts, sync
        p = problem
        self.count = min(ROWS, p.group)  # of rows, some of which may be none
        self.lanes = p.dim // CHANNELS  # of a key
        self.keys = 32 // self.lanes  # of a warp
        self.head = rows.sequence * p.heads + rows.head  # of all sequences
        self.channel = warp.lane % self.lanes * CHANNELS
        counts = at.counts + warp.wide(rows.sequence) * 16
        self.sinks, new, self.first, held = warp.load_global(counts, n=4)
        self.exact = self.sinks + new  # tokens before those of the window
        total = self.exact + held
        each = (total + (parts - 1)) // parts
        self.start = part * each
        self.stop = warp.unsigned_min(self.start + each, total)

    def run(self) -> None:
        """All keys and values of this warp, those of all warps together, out to global memory."""
        warp, count = self.warp, self.count
        query = self._query()
        step = self.warps * self.keys * AHEAD
        tokens = warp.signed_max(self.stop - self.start, warp.integer(0))
        none = [warp.floating(0.0)]
        carry = [warp.floating(NOTHING)] * count + none * (count + count * CHANNELS)

        def further(i: Any, carry: list) -> list:
            first = self.start + i * step + warp.index * (self.keys * AHEAD)
            return self._add(query, first + warp.lane // self.lanes, carry)

        top, total, sums = self._split(warp.loop((tokens + (step - 1)) // step, carry, further))
        self._together(*self._of_warp(top, total, sums))

    def _split(self, carry: list) -> tuple[list, list, list[list]]:
        """Maxima, totals and sums of each row."""
        n = self.count
        sums = [carry[i : i + CHANNELS] for i in range(2 * n, (2 + CHANNELS) * n, CHANNELS)]
        return carry[:n], carry[n : 2 * n], sums

    def _query(self) -> list[list]:
        """The lane's channels of each row, in units in which 2 is the base."""
        warp, query = self.warp, []
        for i in range(self.count):
            row, _ = self.rows.row(warp.integer(i))
            place = self.at.query + self.rows.place(row) * (self.problem.dim * 4)
            place = place + warp.wide(self.channel * 4)
            halves = [warp.load_global(place, half * 4, 4, "f") for half in range(0, CHANNELS, 4)]
            query.append([x * (1 / LN2) for half in halves for x in half])
        return query

    def _place(self, i: Any, sink: Any, own: Any, window: Any) -> Any:
        """Where the lane's channels of token ``i`` of all are, which must be there."""
        warp, p = self.warp, self.problem
        slot = (self.first + i - self.exact) % p.ring
        head, nbytes = warp.wide(self.head), p.dim * 2
        in_window = window + (head * p.ring + warp.wide(slot)) * nbytes
        in_sinks = sink + (head * max(p.sinks, 1) + warp.wide(i)) * nbytes
        before = warp.select(warp.less(i, self.sinks), in_sinks, own + head * nbytes)
        place = warp.select(warp.less(i, self.exact), before, in_window)
        return place + warp.wide(self.channel * 2)

    def _numbers(self, words: list) -> list:
        """Eight bfloat16 as float32."""
        return [y for x in words for y in self.warp.bfloat16s(x)]

    def _add(self, query: list[list], first: Any, carry: list) -> list:
        """`AHEAD` keys of the lane's group, from ``first`` on, and their values."""
        warp, at = self.warp, self.at
        top, total, sums = self._split(carry)
        index = [first + i * self.keys for i in range(AHEAD)]
        there = [warp.less(i, self.stop) for i in index]
        safe = [warp.select(t, i, self.start) for t, i in zip(there, index, strict=True)]
        keys = [
            warp.load_global(self._place(i, at.sink_key, at.key, at.window_key), n=4) for i in safe
        ]
        values = [
            warp.load_global(self._place(i, at.sink_value, at.value, at.window_value), n=4)
            for i in safe
        ]
        scores = [self._scores(query, self._numbers(words)) for words in keys]
        values = [
            self._numbers([warp.select(t, word, 0) for word in words])
            for t, words in zip(there, values, strict=True)
        ]
        for i in range(self.count):
            found = [warp.select(t, x[i], 2 * NOTHING) for t, x in zip(there, scores, strict=True)]
            most = top[i]
            for x in found:
                most = warp.fmax(most, x)
            scale = warp.exp2(top[i] - most)
            weights = [warp.exp2(x - most) for x in found]
            top[i], total[i] = most, total[i] * scale
            sums[i] = [x * scale for x in sums[i]]
            for weight, value in zip(weights, values, strict=True):
                total[i] = total[i] + weight
                sums[i] = [warp.fma(weight, y, x) for x, y in zip(sums[i], value, strict=True)]
        return top + total + [x for each in sums for x in each]

    def _scores(self, query: list[list], key: list) -> list:
        """Of a key with each row, in all lanes that have a part of it."""
        warp = self.warp
        scores = []
        for row in query:
            score = row[0] * key[0]
            for a, b in zip(row[1:], key[1:], strict=True):
                score = warp.fma(a, b, score)
            scores.append(score)
        mask = self.lanes // 2
        while mask:
            scores = [x + warp.from_lane_xor(x, mask) for x in scores]
            mask //= 2
        return scores

    def _of_warp(self, top: list, total: list, sums: list[list]) -> tuple[list, list, list[list]]:
        """What the groups of lanes of a warp have together, in each of them."""
        warp, mask = self.warp, self.lanes
        while mask < 32:
            for i in range(self.count):
                other = warp.from_lane_xor(top[i], mask)
                most = warp.fmax(top[i], other)
                mine, others = warp.exp2(top[i] - most), warp.exp2(other - most)

                def both(x: Any, mine: Any = mine, others: Any = others, mask: int = mask) -> Any:
                    return warp.fma(x, mine, warp.from_lane_xor(x, mask) * others)

                top[i], total[i], sums[i] = most, both(total[i]), [both(x) for x in sums[i]]
            mask *= 2
        return top, total, sums

    def _together(self, top: list, total: list, sums: list[list]) -> None:
        """The sums of all warps to shared memory, from where a warp takes those of its row."""
        warp, dim = self.warp, self.problem.dim
        of_row = (dim + 4) * 4
        place = self.base + warp.index * (self.count * of_row)
        writes, first = warp.less(warp.lane, self.lanes), warp.equal(warp.lane, 0)
        for i in range(self.count):
            for half in range(0, CHANNELS, 4):
                four = sums[i][half : half + 4]
                warp.store_shared(place + self.channel * 4, four, i * of_row + half * 4, writes)
            warp.store_shared(place, [top[i], total[i]], i * of_row + dim * 4, first)
        self.sync()
        warp.when(warp.less(warp.index, self.count), lambda: self._write(warp.index))

    def _write(self, i: Any) -> None:
        """Row ``i`` of all warps."""
        warp, p = self.warp, self.problem
        of_row, n = (p.dim + 4) * 4, p.dim // 32
        own, of_warp = self.base + i * of_row, self.count * of_row
        each = [warp.load_shared(own, w * of_warp + p.dim * 4, 2, "f") for w in range(self.warps)]
        most = each[0][0]
        for top, _ in each[1:]:
            most = warp.fmax(most, top)
        place = own + warp.lane * (n * 4)
        total, sums = warp.floating(0.0), [warp.floating(0.0)] * n
        for w, (top, part) in enumerate(each):
            scale = warp.exp2(top - most)
            total = warp.fma(part, scale, total)
            read = warp.load_shared(place, w * of_warp, n, "f")
            sums = [warp.fma(x, scale, y) for x, y in zip(read, sums, strict=True)]
        some = warp.less(self.start, self.stop)
        inverse = warp.reciprocal(warp.select(some, total, 1.0))
        row, there = self.rows.row(i)
        at = warp.wide((self.head * self.parts + self.part) * p.group + row)
        out = self.at.recent + at * (p.dim * 4) + warp.wide(warp.lane * (n * 4))
        warp.store_global(out, [x * inverse for x in sums], where=there)
        lse = warp.select(some, (most + warp.log2(total)) * LN2, -math.inf)
        first = warp.less(warp.select(there, warp.lane, 1), 1)
        warp.store_global(self.at.recent_lse + at * 4, [lse], where=first)
