"""Attention over coded keys and values in plain jnp: what every kernel is compared with.

Shapes: B sequences, T query tokens, H KV heads, q query heads a KV head, d head_dim = G·g, N blocks
of b tokens, R stages, K codewords. Each function attends only to the coded past and returns the
output with its log-sum-exp, so that exact parts can be merged into one softmax.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Int, Int32, UInt8, UInt32

from gsrq_jax.kernels import planes, rotary, tiles, words
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.precision import in_pieces


def attend_codes(
    query: Float[Array, "B T H q N d"],
    shift: Float[Array, "H M b d"],
    key_codes: UInt8[Array, "B H N b G R"],
    value_codes: UInt8[Array, "B H N b G R"],
    key_codewords: Float[Array, "H G R K g"],
    value_codewords: Float[Array, "H G R K g"],
    blocks: Int[Array, " B"],
    skip: Bool[Array, "B H N b"] | None = None,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """Scores from tables of query · codeword, values from a histogram of probability (ours).

    Nothing of the size context × head_dim is formed but the shift's share of the scores, which is
    one product a block.

    Args:
        query: scaled queries in each block's frame, float32.
        shift: what the mean key adds to the keys of each block (M = N), or of any (M = 1).
        key_codes: codeword indices of the keys.
        value_codes: codeword indices of the values.
        key_codewords: of this layer.
        value_codewords: of this layer.
        blocks: valid blocks of each sequence; the others are not read.
        skip: tokens that are not attended to here, because they are exact elsewhere.

    Returns:
        The softmax-weighted values (0 where there are no blocks) and the log-sum-exp of the scores
        (-inf there).
    """
    batch, tokens, heads, group = query.shape[:4]
    n, b = key_codes.shape[2:4]
    _, G, R, K, g = key_codewords.shape
    exact = jax.lax.Precision.HIGHEST
    table = jnp.einsum(
        "BTHqNGg,HGRKg->BHNGRTqK",
        query.reshape(*query.shape[:-1], G, g),
        key_codewords.astype(jnp.float32),
        precision=exact,
    )
    table = table.reshape(batch, heads, n, G * R, tokens * group, K)
    codes = jnp.moveaxis(key_codes.reshape(batch, heads, n, b, G * R), -1, -2)
    looked_up = jnp.take_along_axis(table, codes[..., None, :].astype(jnp.int32), axis=-1)
    scores = looked_up.sum(axis=3).reshape(batch, heads, n, tokens, group, b)
    by_block = jnp.transpose(query, (0, 2, 4, 1, 3, 5)).reshape(
        batch, heads, n, tokens * group, G * g
    )
    shared = jnp.matmul(by_block, jnp.swapaxes(shift, -1, -2), precision=exact)
    scores += shared.reshape(batch, heads, n, tokens, group, b)
    weights, total, top = _softmax_parts(scores, blocks, skip)

    # Histogram of probability over codewords, then one product with the codebook.
    G, R, K, g = value_codewords.shape[1:]
    flat = jnp.moveaxis(weights, 2, -2).reshape(batch, heads, tokens, group, n * b)
    codes = jnp.moveaxis(value_codes.reshape(batch, heads, n * b, G * R), -1, 2)

    def histogram(p: Array, code: Array) -> Array:  # p [T, q, n b], code [G R, n b]
        def one(c: Array) -> Array:
            return jnp.zeros((K, tokens, group)).at[c].add(jnp.moveaxis(p, -1, 0))

        return jax.vmap(one)(code)

    mass = jax.vmap(jax.vmap(histogram))(flat, codes).reshape(batch, heads, G, R, K, tokens, group)
    out = jnp.einsum(
        "BHGRKTq,HGRKg->BTHqGg", mass, value_codewords.astype(jnp.float32), precision=exact
    ).reshape(batch, tokens, heads, group, G * g)
    return _finish(out, total, top)


def attend_tiles(
    query: Float[Array, "B T H q d"],
    mean: Float[Array, "H d"] | None,
    inv_freq: Float[Array, " d/2"],
    key_tiles: UInt32[Array, "B H N tiles kw"],
    value_tiles: UInt32[Array, "B H N tiles vw"],
    key_codewords: Float[Array, "H 1 R K d"],
    value_codewords: Float[Array, "H 1 S 16 d"],
    blocks: Int[Array, " B"],
    *,
    first: int | Int[Array, ""] = 0,
    stride: int = 1,
    every: int = 1,
    fills: int = 1,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """`attend_codes` on codes in the GPU kernel's layout (see `gsrq_jax.kernels.tiles`).

    The kernel, `gsrq_jax.kernels.mosaic_gpu.attend_tiles`, has this signature.

    Args:
        query: scaled queries, rotated at their own positions, float32.
        mean: mean key before RoPE; None is one of zeros.
        inv_freq: rotary frequencies.
        key_tiles: codes of the keys, in the frames of their blocks.
        value_tiles: codes of the values.
        key_codewords: of this layer.
        value_codewords: of this layer.
        blocks: valid blocks of each sequence; the others are not read.
        first: position of the first token of block 0.
        stride: blocks of the sequence from one of these to the next: block n starts at ``first + n
            stride b``.
        every: tokens between the knots of `gsrq_jax.kernels.rotary.shift`.
        fills: equal parts of a block that are valid one by one; ``blocks`` counts these.
    """
    key_stages, codewords = key_codewords.shape[2:4]
    keys = tiles.keys_from_tiles(key_tiles, key_stages, codewords)[..., None, :]
    values = tiles.values_from_tiles(value_tiles, value_codewords.shape[2])[..., None, :]
    books = key_codewords, value_codewords
    skip = None
    if fills > 1:
        n, b = keys.shape[2:4]
        skip = jnp.arange(n * b).reshape(n, b) >= (blocks * (b // fills))[:, None, None, None]
        blocks = -(-blocks // fills)
    return _attend_blocks(
        query, mean, inv_freq, keys, values, *books, blocks, first, stride, every, skip
    )


def attend_words(
    query: Float[Array, "B T H q d"],
    mean: Float[Array, "H d"] | None,
    inv_freq: Float[Array, " d/2"],
    key_words: Int32[Array, "B H N n 128"],
    value_words: Int32[Array, "B H N m 128"],
    key_codewords: Float[Array, "H G R K g"],
    value_codewords: Float[Array, "H G R K g"],
    blocks: Int[Array, " B"],
    *,
    first: int | Int[Array, ""] = 0,
    stride: int = 1,
    every: int = 1,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """`attend_tiles` on codes in the TPU kernel's layout (see `gsrq_jax.kernels.words`).

    The kernel, `gsrq_jax.kernels.mosaic_tpu.attend_words`, has this signature.
    """
    keys, values = (
        words.from_words(codes, *codewords.shape[1:3])
        for codes, codewords in ((key_words, key_codewords), (value_words, value_codewords))
    )
    books = key_codewords, value_codewords
    return _attend_blocks(query, mean, inv_freq, keys, values, *books, blocks, first, stride, every)


def attend_planes(
    query: Float[Array, "B T H q d"],
    mean: Float[Array, "H d"] | None,
    inv_freq: Float[Array, " d/2"],
    key_planes: UInt32[Array, "B H/s N tiles R"],
    value_planes: UInt32[Array, "B H/s N tiles S"],
    key_codewords: Float[Array, "H 1 R 2 d"],
    value_codewords: Float[Array, "H 1 S 2 d"],
    blocks: Int[Array, " B"],
    *,
    first: int | Int[Array, ""] = 0,
    stride: int = 1,
    every: int = 1,
    fills: int = 1,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """Attend to codes of two codewords a stage by two products with their bits (ours).

    Such a code is a sum of first codewords and, for every bit that is 1, the difference to the
    second. So a score is a constant of the query and its products with the differences, where bits
    are 1; an output is the mean of the bits, multiplied once by the differences. Bits are unpacked
    for some blocks at a time.

    Args:
        query: scaled queries, rotated at their own positions, float32.
        mean: mean key before RoPE; None is one of zeros.
        inv_freq: rotary frequencies.
        key_planes: codes of the keys, in the frames of their blocks, for every s heads that share
            them; see `gsrq_jax.kernels.planes`.
        value_planes: codes of the values, for heads that share them.
        key_codewords: of this layer, for each head.
        value_codewords: of this layer, for each head.
        blocks: valid blocks of each sequence; the others are not read.
        first: position of the first token of block 0.
        stride: blocks of the sequence from one of these to the next.
        every: tokens between the knots of `gsrq_jax.kernels.rotary.shift`.
        fills: equal parts of a block that are valid one by one; ``blocks`` counts these.

    Returns:
        The softmax-weighted values (0 where there are no blocks) and the log-sum-exp of the scores
        (-inf there).

    Raises:
        InputError: if KV heads cannot share the codes, or the codes do not have the codewords'
            stages.
    """
    _check_planes(query.shape[2], key_planes, value_planes, key_codewords, value_codewords)
    batch, tokens, heads, group, dim = query.shape
    of_keys, b = key_planes.shape[1], key_planes.shape[3] * planes.TILE
    of_values, stages = value_planes.shape[1], value_planes.shape[-1]
    exact = jax.lax.Precision.HIGHEST
    key_base, key_steps = _base_and_steps(key_codewords)
    value_base, value_steps = _base_and_steps(value_codewords)
    if mean is None:
        mean = jnp.zeros((heads, dim))
    always = rotary.shift(mean[:, None], jnp.arange(b), inv_freq, every) + key_base[:, None]
    tokens_held = blocks * (b // fills)

    def part(codes: tuple[Array, Array], at: Array | int, held: Array) -> tuple[Array, Array]:
        keys, values = codes
        count = keys.shape[2]
        start = first + stride * b * (at + jnp.arange(count))
        framed = rotary.rotate(query[..., None, :], -start, inv_freq)
        rows = jnp.transpose(framed, (0, 2, 4, 1, 3, 5))
        rows = rows.reshape(batch, heads, count, tokens * group, dim)
        table = jnp.einsum("BHNrd,HRd->BHNrR", rows, key_steps, precision=exact)
        bits = planes.keys_from_planes(keys).astype(jnp.float32)  # [B, H/s, N, b, R]
        scores = jnp.einsum(
            "BhsNrR,BhNbR->BhsNrb",
            table.reshape(batch, of_keys, heads // of_keys, *table.shape[2:]),
            bits,
            precision=exact,
        ).reshape(batch, heads, count, tokens * group, b)
        scores += jnp.einsum("BHNrd,Hbd->BHNrb", rows, always, precision=exact)
        skip = jnp.arange(count * b).reshape(count, b) >= held[:, None, None, None]
        weights, total, top = _softmax_parts(
            scores.reshape(batch, heads, count, tokens, group, b), jnp.full(batch, count), skip
        )
        bits = planes.values_from_planes(values).astype(jnp.float32)
        mass = jnp.einsum(
            "BhsNrb,BhNbR->BhsrR",
            weights.reshape(batch, of_values, heads // of_values, count, tokens * group, b),
            bits,
            precision=exact,
        ).reshape(batch, heads, tokens * group, stages)
        out = jnp.einsum("BHrR,HRd->BHrd", mass, value_steps, precision=exact)
        out = jnp.swapaxes(out.reshape(batch, heads, tokens, group, dim), 1, 2)
        out += total[..., None] * value_base[:, None]
        return _finish(out, total, top)

    return by_blocks(
        lambda codes, at, held: part(codes, at, jnp.minimum(tokens_held - at * b, held * b)),
        (key_planes, value_planes),
        -(-blocks // fills),
        max(1, STEP // b),
    )


STEP = 4096
"""Tokens of a sequence whose bits are written out at a time."""


def _check_planes(
    heads: int, keys: Array, values: Array, key_codewords: Array, value_codewords: Array
) -> None:
    """Refuse codes that are not those of the codewords."""
    for what, codes, codewords in (
        ("keys", keys, key_codewords),
        ("values", values, value_codewords),
    ):
        if heads % codes.shape[1]:
            raise InputError(
                f"{heads} KV heads cannot share the codes of {codes.shape[1]} {what}: choose a "
                f"divisor of {heads}"
            )
        if codewords.shape[3] != 2 or codewords.shape[2] != codes.shape[-1]:
            raise InputError(
                f"{what} have codes of {codes.shape[-1]} stages and codewords of "
                f"{codewords.shape[2]} stages, {codewords.shape[3]} each: planes take as many "
                "stages of 2"
            )


def _base_and_steps(
    codewords: Float[Array, "H 1 R 2 d"],
) -> tuple[Float[Array, "H d"], Float[Array, "H R d"]]:
    """The sum of all first codewords, and what each second one differs."""
    zero, one = jnp.moveaxis(codewords[:, 0].astype(jnp.float32), 2, 0)
    return zero.sum(axis=1), one - zero


def by_blocks(
    part: Callable[[Any, Array | int, Array], tuple[Array, Array]],
    codes: Any,
    blocks: Int[Array, " B"],
    few: int,
) -> tuple[Array, Array]:
    """Attention over coded blocks, some at a time, and only as far as any sequence goes.

    Args:
        part: attention ``part(codes, first, blocks)`` over blocks from ``first`` on, with its
            log-sum-exp.
        codes: pytree of arrays ``[B, H, N, …]``.
        blocks: valid blocks of each sequence.
        few: blocks at a time.
    """
    slots = jax.tree.leaves(codes)[0].shape[2]
    if few >= slots:
        return part(codes, 0, blocks)
    few = -(-slots // -(-slots // few))
    last = slots - few

    def attend_from(first: Array | int, until: int) -> tuple[Array, Array]:
        some = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, first, few, axis=2), codes)
        return part(some, first, jnp.minimum(blocks, until) - first)

    def further(i: Array, sofar: tuple[Array, Array]) -> tuple[Array, Array]:
        return merge([sofar, attend_from(i * few, last)])

    # The last few, then those before them, whose number the steps need not divide: no copy is made.
    rounds = -(-jnp.minimum(blocks.max(), last) // few)
    return lax.fori_loop(0, rounds, further, attend_from(last, slots))


def _attend_blocks(
    query: Float[Array, "B T H q d"],
    mean: Float[Array, "H d"] | None,
    inv_freq: Float[Array, " d/2"],
    keys: UInt8[Array, "B H N b G R"],
    values: UInt8[Array, "B H N b G R"],
    key_codewords: Float[Array, "H G R K g"],
    value_codewords: Float[Array, "H G R K g"],
    blocks: Int[Array, " B"],
    first: int | Int[Array, ""],
    stride: int,
    every: int,
    skip: Bool[Array, "B 1 N b"] | None = None,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """`attend_codes` of queries that are rotated at their own positions."""
    heads, n, b = keys.shape[1:4]
    if mean is None:
        mean = jnp.zeros((heads, query.shape[-1]))
    return attend_codes(
        rotary.rotate(query[..., None, :], -(first + stride * b * jnp.arange(n)), inv_freq),
        rotary.shift(mean[:, None, None], jnp.arange(b), inv_freq, every),
        keys,
        values,
        key_codewords,
        value_codewords,
        blocks,
        skip,
    )


def attend_decoded(
    query: Float[Array, "B T H q N d"],
    keys: Float[Array, "B H N b d"],
    values: Float[Array, "B H N b d"],
    blocks: Int[Array, " B"],
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """The same attention over keys (in each block's frame, shift added) and values written out."""
    exact = jax.lax.Precision.HIGHEST
    scores = jnp.einsum("BTHqNd,BHNbd->BHNTqb", query, keys, precision=exact)
    weights, total, top = _softmax_parts(scores, blocks)
    # A product a block, then their sum: one over all tokens would keep a few cores busy alone.
    of_blocks = jnp.einsum("BHNTqb,BHNbd->BHNTqd", weights, values, precision=exact)
    out = jnp.moveaxis(of_blocks.sum(axis=2), 1, 2)
    return _finish(out, total, top)


def _softmax_parts(
    scores: Float[Array, "B H N T q b"],
    blocks: Int[Array, " B"],
    skip: Bool[Array, "B H N b"] | None = None,
) -> tuple[Float[Array, "B H N T q b"], Float[Array, "B T H q"], Float[Array, "B T H q"]]:
    """Unnormalised weights, their sum and the maximum, over the valid blocks."""
    n = scores.shape[2]
    valid = (jnp.arange(n) < blocks[:, None])[:, None, :, None, None, None]
    if skip is not None:
        valid = valid & ~skip[:, :, :, None, None]
    scores = jnp.where(valid, scores, -jnp.inf)
    top = jnp.max(scores, axis=(2, 5), initial=-jnp.inf)  # [B, H, T, q]
    safe = jnp.where(jnp.isfinite(top), top, 0)
    weights = jnp.where(valid, jnp.exp(scores - safe[:, :, None, :, :, None]), 0)
    total = weights.sum(axis=(2, 5))
    return weights, jnp.moveaxis(total, 1, 2), jnp.moveaxis(top, 1, 2)


def _finish(out: Array, total: Array, top: Array) -> tuple[Array, Array]:
    some = total != 0  # NaN, from scores that are no numbers, stays
    out = jnp.where(some[..., None], out, 0) / jnp.where(some, total, 1)[..., None]
    return out, jnp.where(
        some, jnp.where(some, top, 0) + jnp.log(jnp.where(some, total, 1)), -jnp.inf
    )


def merge(
    parts: list[tuple[Float[Array, "*s d"], Float[Array, "*s"]]],
) -> tuple[Float[Array, "*s d"], Float[Array, "*s"]]:
    """One softmax over disjoint sets of keys from each set's output and log-sum-exp.

    A set may be empty, and so may be all.
    """
    out, lse = (jnp.stack(x) for x in zip(*parts, strict=True))
    return _merged(out, lse, lambda x: jnp.max(x, axis=0), lambda x: jnp.sum(x, axis=0))


def with_beside(
    part: tuple[Float[Array, "*s d"], Float[Array, "*s"]],
    beside: tuple[Float[Array, "P *s d"], Float[Array, "P *s"]] | None,
    dtype: DTypeLike = jnp.float32,
) -> tuple[Float[Array, "*s d"], Float[Array, "*s"]]:
    """`merge` of a part and others, stacked, if there are any; the output in ``dtype``."""
    out, lse = part if beside is None else merge([part, *zip(*beside, strict=True)])
    return out.astype(dtype), lse


def merge_over(
    part: tuple[Float[Array, "*s d"], Float[Array, "*s"]], axis_name: str
) -> tuple[Float[Array, "*s d"], Float[Array, "*s"]]:
    """`merge` of the parts of all devices of a mapped axis, the same on each of them."""
    most, total = (functools.partial(f, axis_name=axis_name) for f in (lax.pmax, lax.psum))
    return _merged(*part, most, total)


def _merged(
    out: Array, lse: Array, most: Callable[[Array], Array], total: Callable[[Array], Array]
) -> tuple[Array, Array]:
    top = most(lse)
    share = jnp.exp(lse - jnp.where(jnp.isfinite(top), top, 0))
    return _finish(total(share[..., None] * out), total(share), top)


Exact = tuple[Float[Array, "B H n d"], Float[Array, "B H n d"], Bool[Array, "B T n"]]
"""Exact keys and values, and where each query sees them."""


def attend_exact(
    query: Float[Array, "B T H q d"],
    keys: Float[Array, "B H n d"],
    values: Float[Array, "B H n d"],
    mask: Bool[Array, "B T n"],
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """Attention over exact keys where ``mask[B, T, n]``, with its log-sum-exp.

    Keys and values that no query sees may be NaN.
    """
    return attend_sets(query, [(keys, values, mask)])


def attend_sets(
    query: Float[Array, "B T H q d"], sets: Sequence[Exact]
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """`attend_exact` over several sets in one softmax, none of them copied."""
    batch, tokens, heads, group, dim = query.shape
    by_head = jnp.swapaxes(query, 1, 2)  # [B, H, T, q, d]
    # Scores stay rows of queries throughout: a TPU would copy them to tell tokens from groups.
    rows = by_head.reshape(batch, heads, tokens * group, dim)
    scores, ends = [], [0]
    for keys, _, mask in sets:
        seen = jnp.repeat(mask, group, axis=1)[:, None]  # [B, 1, T q, n]
        scores.append(jnp.where(seen, _times(rows, keys, "BHrd,BHnd->BHrn"), -jnp.inf))
        ends.append(ends[-1] + keys.shape[2])
    together = jnp.concatenate(scores, axis=-1)
    top = jnp.max(together, axis=-1, initial=-jnp.inf)
    weights = jnp.exp(together - jnp.where(jnp.isfinite(top), top, 0)[..., None])
    out = jnp.zeros_like(rows)
    for (_, values, mask), first, end in zip(sets, ends, ends[1:], strict=False):
        values = jnp.where(mask.any(axis=1)[:, None, :, None], values, 0)
        out += _times(weights[..., first:end], values, "BHrn,BHnd->BHrd")
    out, lse = _finish(out, weights.sum(axis=-1), top)
    out, lse = out.reshape(by_head.shape), lse.reshape(by_head.shape[:-1])
    return jnp.swapaxes(out, 1, 2), jnp.swapaxes(lse, 1, 2)


class Recent(NamedTuple):
    """What a cache keeps exact, and the new tokens.

    Attributes:
        sink_key: of the first tokens.
        window_key: a ring of slots.
        key: of the new tokens.
        sink_value: like ``sink_key``.
        window_value: like ``window_key``.
        value: like ``key``.
        sinks: slots of sinks that are held; slots that are not may be NaN.
        first: token j of the window lies in slot ``(first + j) % C``.
        held: tokens of the window.
        new: new tokens that are real; those after them may be NaN, and their outputs mean nothing.
    """

    sink_key: Float[Array, "B H S d"]
    window_key: Float[Array, "B H C d"]
    key: Float[Array, "B T H d"]
    sink_value: Float[Array, "B H S d"]
    window_value: Float[Array, "B H C d"]
    value: Float[Array, "B T H d"]
    sinks: Int[Array, " B"]
    first: Int[Array, " B"]
    held: Int[Array, " B"]
    new: Int[Array, " B"]


def attend_recent(
    query: Float[Array, "B T H q d"], recent: Recent
) -> tuple[Float[Array, "1 B T H q d"], Float[Array, "1 B T H q"]]:
    """Attention over what a cache keeps exact, and causally over new tokens, with log-sum-exp.

    The kernel, `gsrq_jax.kernels.mosaic_gpu_recent.attend_recent`, has this signature and may
    return more parts, which are to be merged.

    Args:
        query: scaled queries, float32.
        recent: keys and values.
    """
    r = recent
    batch, tokens, slots = *query.shape[:2], r.window_key.shape[2]
    step = jnp.arange(tokens)
    themselves = (step[:, None] >= step) & (step < r.new[:, None])[:, None]  # [B, T, T]
    in_sinks = jnp.arange(r.sink_key.shape[2]) < r.sinks[:, None]
    in_window = in_ring(slots, r.first, r.held)

    def seen(there: Array) -> Array:
        return jnp.broadcast_to(there[:, None], (batch, tokens, there.shape[1]))

    # The new ones join the sinks, which are as few: two products less.
    both = (
        jnp.concatenate([r.sink_key, jnp.swapaxes(r.key, 1, 2)], axis=2),
        jnp.concatenate([r.sink_value, jnp.swapaxes(r.value, 1, 2)], axis=2),
        jnp.concatenate([seen(in_sinks), themselves], axis=2),
    )
    out, lse = attend_sets(query, [both, (r.window_key, r.window_value, seen(in_window))])
    return out[None], lse[None]


def in_ring(slots: int, first: Int[Array, " B"], held: Int[Array, " B"]) -> Bool[Array, "B slots"]:
    """Which slots of a ring hold its ``held`` tokens, the first in slot ``first % slots``."""
    return (jnp.arange(slots) - first[:, None]) % slots < held[:, None]


def _times(left: Float[Array, "B H r m"], right: Float[Array, "..."], equation: str) -> Array:
    """A product in float32; one with bfloat16, which is not converted, to 16 bits of ``left``."""
    if right.dtype != jnp.bfloat16:
        exact = jax.lax.Precision.HIGHEST
        return jnp.einsum(equation, left, right.astype(left.dtype), precision=exact)
    # Batch, rows, columns: the only order in which XLA for CPUs multiplies bfloat16.
    both = jnp.stack(in_pieces(left, 2, jnp.bfloat16), axis=2)
    equation = equation.replace("BHr", "BHpr")
    return jnp.einsum(equation, both, right, preferred_element_type=jnp.float32).sum(axis=2)


def scale_of(dim: int) -> float:
    """Scale of the scores for heads of ``dim`` channels."""
    return 1 / math.sqrt(dim)
