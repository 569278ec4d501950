"""Attention of a new token over what a cache keeps exact, on Hopper GPUs: Pallas Mosaic GPU (ours).

Sinks, the new token itself and the window are one list of tokens, cut into parts of equal length;
a thread block has one part of one KV head of one sequence. A key is read by ``d / 8`` lanes, 16
bytes each, so that a warp has ``256 / d`` keys at a time, and `AHEAD` times as many under way; a
value likewise, into sums that stay in registers. Nothing is read that is not there, and no weight,
mask or score is ever written: XLA's program of the same takes some thirteen small kernels, one of
which copies all values of the window to put zeros into slots that no token holds.

What limits it: the bytes of the keys and values that are there. Beside them there are, for each key
and lane, 16 q multiplications and ``q log2(d / 8)`` shuffles.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gsrq_jax.kernels import mosaic_gpu
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.mosaic_gpu import PROCESSORS

WARPS = 4
AHEAD = 4
"""Keys of a group of lanes whose bytes are under way together."""
CHANNELS = 8
"""Of a lane: 16 bytes of bfloat16."""
LEAST = 64
"""Tokens of a part, so that starting it does not take longer than reading it."""
NOTHING = -1e30
"""Maximum of no scores; the score of what is not there is twice as low."""


@dataclasses.dataclass(frozen=True)
class Problem:
    """The shapes of a call: B, H, q, d, slots of sinks and of the window."""

    batch: int
    heads: int
    group: int
    dim: int
    sinks: int
    ring: int

    @property
    def parts(self) -> int:
        """Thread blocks that share the tokens of a KV head of a sequence: enough for two on each
        processor."""
        wanted = math.ceil(2 * PROCESSORS / (self.batch * self.heads))
        return max(1, min(wanted, (self.sinks + 1 + self.ring) // LEAST))

    @property
    def nbytes(self) -> int:
        """Shared memory of a thread block: sums of each warp, their maximum and total."""
        return WARPS * self.group * (self.dim + 2) * 4 + 16


def problem_of(query: Any, *arrays: Any) -> Problem:
    """The shapes of a call, from the first seven arguments of `attend_recent`.

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
    for x in arrays:
        if x.dtype != jnp.bfloat16:
            refuse("some of", x.dtype, "keys and values in bfloat16")
    sinks, window, _, *values = arrays
    for x, y in zip(arrays, values, strict=False):
        if x.shape != y.shape:
            refuse("values", y.shape, f"values as keys, {x.shape}")
    return Problem(batch, heads, group, dim, sinks.shape[2], window.shape[2])


def check_supported(*arrays: Any) -> Problem:
    """The shapes of a call that can be made here, from the same arguments.

    Raises:
        InputError: naming what was given and what is supported.
    """
    problem = problem_of(*arrays)
    mosaic_gpu.check_device()
    return problem


def attend_recent(
    query: Float[Array, "B 1 H q d"],
    sink_key: Float[Array, "B H S d"],
    window_key: Float[Array, "B H C d"],
    key: Float[Array, "B 1 H d"],
    sink_value: Float[Array, "B H S d"],
    window_value: Float[Array, "B H C d"],
    value: Float[Array, "B 1 H d"],
    sinks: Int[Array, " B"],
    first: Int[Array, " B"],
    held: Int[Array, " B"],
    new: Int[Array, " B"],
) -> tuple[Float[Array, "P B 1 H q d"], Float[Array, "P B 1 H q"]]:
    """`gsrq_jax.kernels.reference.attend_recent` on a Hopper GPU, in P parts to be merged.

    Args:
        query: scaled queries, float32; d 64 or 128, at most 8 query heads a KV head.
        sink_key: bfloat16, as all keys and values.
        window_key: a ring of slots.
        key: of the new token.
        sink_value: like ``sink_key``.
        window_value: like ``window_key``.
        value: like ``key``.
        sinks: slots of sinks that are held; slots that are not are never read.
        first: token j of the window lies in slot ``(first + j) % C``.
        held: tokens of the window.
        new: 1, or 0 where the new token is none.

    Returns:
        The softmax-weighted values of each part (0 where it has no tokens) and the log-sum-exp of
        its scores (-inf there).

    Raises:
        InputError: if the shapes, dtypes, the device or the version of jax are not supported.
    """
    arrays = query, sink_key, window_key, key, sink_value, window_value, value
    p = check_supported(*arrays)
    counts = jnp.stack([x.astype(jnp.int32) for x in (sinks, new, first, held)], axis=1)
    if not p.sinks:  # nothing can be made of no bytes
        arrays = query, key, window_key, key, value, window_value, value
    out, lse = recent_kernel(p)(*arrays, counts)
    return jnp.moveaxis(out, 2, 0)[:, :, None], jnp.moveaxis(lse, 2, 0)[:, :, None]


def recent_kernel(problem: Problem) -> Any:
    """The kernel as a function of seven arrays and counts ``[B, 4]``, the parts third in its
    results."""
    from gsrq_jax.kernels.warp import Warp, warp_kernel

    def run(warp: Warp, *places: Any) -> None:
        RecentKernel(problem, warp, Addresses(*places)).run()

    p = problem
    rows = (p.batch, p.heads, p.parts, p.group)
    return warp_kernel(
        run,
        outputs=[
            jax.ShapeDtypeStruct((*rows, p.dim), jnp.float32),
            jax.ShapeDtypeStruct(rows, jnp.float32),
        ],
        nbytes=p.nbytes,
        parts=p.batch * p.heads * p.parts,
        warps=WARPS,
        name="attend_recent",
    )


@dataclasses.dataclass(frozen=True)
class Addresses:
    """Where the arrays lie, in the order of the kernel's arguments, and its shared memory."""

    query: Any
    sink_key: Any
    window_key: Any
    key: Any
    sink_value: Any
    window_value: Any
    value: Any
    counts: Any
    out: Any
    lse: Any
    shared: Any


class RecentKernel:
    """What one warp of one thread block does, said to that warp."""

    def __init__(self, problem: Problem, warp: Any, at: Addresses):
        self.problem, self.warp, self.at = problem, warp, at
        p = problem
        self.base = (at.shared + 15) & 0xFFFFFFF0
        self.lanes = p.dim // CHANNELS  # of a key
        self.keys = 32 // self.lanes  # of a warp
        self.head = warp.block // p.parts  # of all sequences
        self.channel = warp.lane % self.lanes * CHANNELS
        counts = warp.wide(self.head // p.heads) * 16
        self.sinks, new, self.first, held = warp.load_global(at.counts + counts, n=4)
        self.exact = self.sinks + new  # tokens before those of the window
        total = self.exact + held
        each = (total + (p.parts - 1)) // p.parts
        self.start = warp.block % p.parts * each
        self.stop = warp.unsigned_min(self.start + each, total)

    def run(self) -> None:
        """All keys and values of this warp, those of all warps together, out to global memory."""
        warp, group = self.warp, self.problem.group
        query = self._query()
        step = WARPS * self.keys * AHEAD
        count = warp.signed_max(self.stop - self.start, warp.integer(0))
        none = [warp.floating(0.0)]
        carry = [warp.floating(NOTHING)] * group + none * (group + group * CHANNELS)

        def further(i: Any, carry: list) -> list:
            first = self.start + i * step + warp.index * (self.keys * AHEAD)
            return self._add(query, first + warp.lane // self.lanes, carry)

        top, total, sums = self._split(warp.loop((count + (step - 1)) // step, carry, further))
        self._share(*self._of_warp(top, total, sums))
        warp.sync_block()
        self._write()

    def _split(self, carry: list) -> tuple[list, list, list[list]]:
        """Maxima, totals and sums of each query head."""
        group = self.problem.group
        sums = [carry[i : i + CHANNELS] for i in range(2 * group, (2 + CHANNELS) * group, CHANNELS)]
        return carry[:group], carry[group : 2 * group], sums

    def _query(self) -> list[list]:
        """The lane's channels of each query head, in units in which 2 is the base."""
        warp, p = self.warp, self.problem
        place = self.at.query + warp.wide(self.head) * (p.group * p.dim * 4)
        place = place + warp.wide(self.channel * 4)
        return [
            [
                x * math.log2(math.e)
                for half in range(0, CHANNELS, 4)
                for x in warp.load_global(place, (i * p.dim + half) * 4, 4, "f")
            ]
            for i in range(p.group)
        ]

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
        for i in range(self.problem.group):
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
        """Of a key with each query head, in all lanes that have a part of it."""
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
            for i in range(self.problem.group):
                other = warp.from_lane_xor(top[i], mask)
                most = warp.fmax(top[i], other)
                mine, others = warp.exp2(top[i] - most), warp.exp2(other - most)

                def both(x: Any, mine: Any = mine, others: Any = others, mask: int = mask) -> Any:
                    return warp.fma(x, mine, warp.from_lane_xor(x, mask) * others)

                top[i], total[i], sums[i] = most, both(total[i]), [both(x) for x in sums[i]]
            mask *= 2
        return top, total, sums

    def _share(self, top: list, total: list, sums: list[list]) -> None:
        """The warp's sums, maxima and totals to shared memory."""
        warp, p = self.warp, self.problem
        row = p.dim * 4
        place = self.base + warp.index * (p.group * row) + self.channel * 4
        other = self.base + WARPS * p.group * row + warp.index * (p.group * 8)
        writes, first = warp.less(warp.lane, self.lanes), warp.equal(warp.lane, 0)
        for i in range(p.group):
            for half in range(0, CHANNELS, 4):
                four = sums[i][half : half + 4]
                warp.store_shared(place, four, i * row + half * 4, writes)
            warp.store_shared(other, [top[i], total[i]], i * 8, first)

    def _write(self) -> None:
        """A query head after the other, each by one warp."""
        for i in range(-(-self.problem.group // WARPS)):
            head = self.warp.index + i * WARPS
            there = self.warp.less(head, self.problem.group)
            self.warp.when(there, lambda head=head: self._write_head(head))

    def _write_head(self, head: Any) -> None:
        warp, p = self.warp, self.problem
        row, n = p.dim * 4, p.dim // 32
        place = self.base + head * row + warp.lane * (n * 4)
        other = self.base + WARPS * p.group * row + head * 8
        each = [warp.load_shared(other, w * p.group * 8, 2, "f") for w in range(WARPS)]
        most = each[0][0]
        for top, _ in each[1:]:
            most = warp.fmax(most, top)
        scales = [warp.exp2(top - most) for top, _ in each]
        total, sums = warp.floating(0.0), [warp.floating(0.0)] * n
        for w, (scale, (_, part)) in enumerate(zip(scales, each, strict=True)):
            total = warp.fma(part, scale, total)
            read = warp.load_shared(place, w * p.group * row, n, "f")
            sums = [warp.fma(x, scale, y) for x, y in zip(read, sums, strict=True)]
        some = warp.less(self.start, self.stop)
        inverse = warp.reciprocal(warp.select(some, total, 1.0))
        at = warp.wide(warp.block * p.group + head)
        out = self.at.out + at * row + warp.wide(warp.lane * (n * 4))
        warp.store_global(out, [x * inverse for x in sums])
        lse = (most + warp.log2(total)) * math.log(2)
        lse = warp.select(some, lse, -math.inf)
        warp.store_global(self.at.lse + at * 4, [lse], where=warp.equal(warp.lane, 0))
