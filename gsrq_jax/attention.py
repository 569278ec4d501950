"""Attention: of new tokens over a cache, and of whole sequences as a cache would have shown them.

All of it takes rotated queries and keys. Shapes: B sequences, T new tokens, Q query heads, H KV
heads (Q = H·q), d head_dim.
"""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from gsrq_jax.cache import (
    KVCache,
    Turn,
    block_positions,
    blocks_after,
    check_spec,
    check_vectors,
    coded_tokens,
    exact_counts,
    new_tokens,
    outlier_slots,
)
from gsrq_jax.codebook import Codebooks, errors, indices
from gsrq_jax.codec import Codec, remembered
from gsrq_jax.errors import InputError
from gsrq_jax.frame import origin
from gsrq_jax.kernels import decode, reference, rotary
from gsrq_jax.rope import rotate
from gsrq_jax.spec import CacheSpec, QuantSpec

Implementation = Literal["fused", "codes", "decoded"]
FEW = 8
"""New tokens up to which codes in a fused kernel's layout are attended to as codes."""


@jax.named_scope("attend")
def attend(
    q: Float[Array, "B T Q d"],
    k: Float[Array, "B T H d"],
    v: Float[Array, "B T H d"],
    cache: KVCache,
    codec: Codec | None = None,
    count: Int[ArrayLike, " B"] | None = None,
    *,
    implementation: Implementation | None = None,
    axis_name: str | None = None,
) -> Float[Array, "B T Q d"]:
    """Attention of new tokens over the cached past and, causally, over themselves.

    Exact sinks and window, coded past and the new tokens share one softmax. `append` the new
    tokens afterwards.

    Args:
        q: queries rotated at positions ``cache.length … + T - 1``.
        k: keys of the same tokens, rotated.
        v: values of the same tokens.
        cache: one layer's cache.
        codec: that layer's codebooks, or another codec; None for a cache without a spec.
        count: new tokens of each sequence, at most T; keys and values after them are padding, never
            read (they may be NaN), and outputs after them mean nothing. None means T each.
        implementation: ``fused`` is the GPU's or the TPU's kernel, for codebooks and a cache whose
            codes are in its layout (``QuantSpec.layout``); ``codes``, in plain jnp, scores through
            tables and sums values through histograms as they do, in any layout; ``decoded`` writes
            keys and values out, for every codec. None chooses: in a kernel's layout, for up to
            `FEW` new tokens, ``fused`` where it is supported, else ``codes`` with a warning that
            says why, once; otherwise ``codes`` for one new token and codebooks whose frame shares
            its tables between the tokens of a block.
        axis_name: mapped axis over which the cache's blocks are spread: each of its devices
            attends to its own, and the softmax is one over all.

    Returns:
        In the dtype of q.

    Raises:
        InputError: if specs or shapes do not fit, or ``fused`` or ``codes`` is asked for where it
            cannot be had.
    """
    if cache.length.ndim != 1:
        raise InputError(
            "attend takes one layer's cache; scan or vmap over the layers of a stacked one"
        )
    q, k, v = jnp.asarray(q), jnp.asarray(k), jnp.asarray(v)
    check_vectors(cache, k, v)
    check_spec(cache, codec)
    batch, tokens, heads, dim = _check_queries(q, k, v)
    if not tokens:
        return q
    query = q.astype(jnp.float32).reshape(batch, tokens, heads, -1, dim) * reference.scale_of(dim)

    new = new_tokens(count, batch, tokens)
    held, first, window = exact_counts(cache)
    recent = reference.Recent(
        *(cache.sink_key, cache.window_key, k, cache.sink_value, cache.window_value, v),
        *(held, first, window, new),
    )
    exact_by: decode.Implementation | None = (
        None if implementation in (None, "fused") else "reference"
    )
    parts: list[decode.Part] = []
    alone = True  # whether exact tokens are still to be attended to
    if codec is not None and cache.blocks:
        books = codec if isinstance(codec, Codebooks) and codec.spec.frame != "pre" else None
        laid_out = books is not None and books.spec.arrangement.kernel is not None
        if implementation is None and not (laid_out and tokens <= FEW):
            implementation = "codes" if tokens == 1 and books is not None else "decoded"
        rows, turn = math.prod(query.shape[:-1]), Turn.of(axis_name)
        match implementation:
            case "fused" | "codes" | None if books is not None and laid_out:
                alone = axis_name is not None
                dtype = query.dtype if alone else q.dtype  # of a part, or of all of it
                exact = None if alone else recent
                coded = _attend_laid_out(query, cache, books, turn, implementation, exact, dtype)
            case "codes" if books is not None:
                floats = rows * _floats_of_codes(books.spec)
                coded = _by_blocks(_attend_codes, query, cache, books, turn, floats)
                if cache.outliers is not None:
                    parts.append(_attend_outliers(query, cache))
            case "fused":
                raise InputError(
                    "implementation 'fused' is for a cache whose codes are in its layout; give the "
                    "codebooks a spec of layout 'tiles' or 'planes' for GPUs, 'words' for TPUs "
                    "(gsrq_jax.codec.respec)"
                )
            case "codes":
                raise InputError(
                    "implementation 'codes' is for codebooks in frame 'block' or 'post' (in frame "
                    "'pre' every token has a table of its own); use 'decoded'"
                )
            case "decoded":
                floats = rows * codec.spec.block
                coded = _by_blocks(_attend_decoded, query, cache, codec, turn, floats)
            case _:
                raise InputError(
                    f"unknown implementation {implementation!r}; choose 'fused', 'codes' or "
                    "'decoded'"
                )
        # What is exact is on all devices, so it joins what they have together, and counts once.
        parts.append(coded if axis_name is None else reference.merge_over(coded, axis_name))
    if alone:
        parts += zip(*decode.attend_recent(query, recent, implementation=exact_by), strict=True)
    out, _ = reference.merge(parts) if len(parts) > 1 else parts[0]
    return out.reshape(q.shape).astype(q.dtype)


def _check_queries(q: Array, k: Array, v: Array) -> tuple[int, int, int, int]:
    """``B, T, H, d`` of queries ``[B, T, Q, d]`` and their keys and values ``[B, T, H, d]``.

    Raises:
        InputError: if they do not fit each other.
    """
    fit = q.ndim == k.ndim == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2]
    if not fit or q.shape[3] != k.shape[3] or q.shape[2] % k.shape[2]:
        raise InputError(
            f"queries {q.shape}, keys {k.shape} and values {v.shape} do not fit; they are "
            "[B, T, Q, d], [B, T, H, d] and [B, T, H, d], Q a multiple of H"
        )
    batch, tokens, heads, dim = k.shape
    return batch, tokens, heads, dim


def _attend_laid_out(
    query: Array,
    cache: KVCache,
    codebooks: Codebooks,
    turn: Turn,
    implementation: Implementation | None,
    recent: reference.Recent | None,
    dtype: jnp.dtype,
) -> tuple[Array, Array]:
    spec = codebooks.spec
    kernels: dict[Implementation | None, decode.Implementation | None] = {
        "fused": "fused",
        "codes": "reference",
    }
    return spec.arrangement.attend(
        query,
        codebooks,
        cache.key_codes,
        cache.value_codes,
        turn.filled(blocks_after(spec, cache.length)),
        first=spec.sinks + spec.block * turn.first,
        stride=turn.step,
        recent=recent,
        dtype=dtype,
        implementation=kernels.get(implementation),
    )


def _by_blocks(
    part: Callable[..., tuple[Array, Array]],
    query: Array,
    cache: KVCache,
    codec: Codec,
    turn: Turn,
    floats: int,
) -> tuple[Array, Array]:
    """``part(query, cache, codec, turn, filled)``, which holds so many floats a block, over some
    blocks at a time, and only as far as any sequence goes."""

    def some(codes: Any, first: Array | int, filled: Array) -> tuple[Array, Array]:
        keys, values = codes
        held = cache.replace(key_codes=keys, value_codes=values)
        start = Turn(turn.first + first * turn.step, turn.step)
        return part(query, held, codec, start, filled)

    filled = turn.filled(blocks_after(codec.spec, cache.length))
    codes = cache.key_codes, cache.value_codes
    return reference.by_blocks(some, codes, filled, max(1, _FLOATS // floats))


def _floats_of_codes(spec: QuantSpec) -> int:
    """What `_attend_codes` holds of a block for each query: tables, and what is looked up."""
    return max(c.codes * (spec.block + c.codewords) for c in (spec.key, spec.value))


def _attend_codes(
    query: Array, cache: KVCache, codebooks: Codebooks, turn: Turn, filled: Array
) -> tuple[Array, Array]:
    spec = codebooks.spec
    position = block_positions(spec, turn.blocks(cache.blocks))
    start = origin(spec, position[:, 0])
    framed = rotate(query[..., None, :], -start, codebooks.inv_freq)  # [B, T, H, q, N, d]
    alike = spec.frame == "block" and spec.frame_blocks == 1  # one row of offsets for all blocks
    ahead = (position - start[:, None])[: 1 if alike else None]
    mean = codebooks.key_mean[:, None, None]
    shift = rotary.shift(mean, ahead, codebooks.inv_freq, spec.mean_every)
    skip = None
    if cache.outliers is not None:
        shape = (len(query), cache.blocks, spec.block, query.shape[2])
        at = outlier_slots(cache, shape, turn)
        skip = jnp.moveaxis(jnp.zeros(shape, bool).at[at].set(True, mode="drop"), 3, 1)
    return reference.attend_codes(
        framed,
        shift,
        *indices(codebooks, cache.key_codes, cache.value_codes, axis=1),
        codebooks.key,
        codebooks.value,
        filled,
        skip,
    )


def _attend_outliers(query: Array, cache: KVCache) -> tuple[Array, Array]:
    assert cache.outliers is not None
    there = cache.outliers.error[:, None, 0] > -jnp.inf  # every head has as many
    seen = jnp.broadcast_to(there, (*query.shape[:2], there.shape[2]))
    return reference.attend_exact(query, cache.outliers.key, cache.outliers.value, seen)


def _attend_decoded(
    query: Array, cache: KVCache, codec: Codec, turn: Turn, filled: Array
) -> tuple[Array, Array]:
    keys, values = coded_tokens(cache, codec, turn)
    query = query[..., None, :]
    return reference.attend_decoded(
        jnp.broadcast_to(query, (*query.shape[:-2], cache.blocks, query.shape[-1])),
        jnp.moveaxis(keys, 3, 1),
        jnp.moveaxis(values, 3, 1),
        filled,
    )


def causal(
    q: Float[Array, "B T Q d"], k: Float[Array, "B T H d"], v: Float[Array, "B T H d"]
) -> Float[Array, "B T Q d"]:
    """Exact causal attention of a whole sequence from position 0.

    Never a matrix of all tokens by all: by cuDNN's flash attention in half precision on GPUs that
    have it, else by some queries at a time.

    Raises:
        InputError: if shapes do not fit.
    """
    _check_queries(q, k, v)
    if _has_flash_attention(q.dtype, q.shape[-1]):
        return jax.nn.dot_product_attention(q, k, v, is_causal=True, implementation="cudnn")
    if q.shape[1] <= 2 * _QUERY_CHUNK:
        return jax.nn.dot_product_attention(q, k, v, is_causal=True)

    def rows(query: Array, at: Array) -> Array:
        mask = (at[:, None] >= jnp.arange(k.shape[1]))[None, None]
        return jax.nn.dot_product_attention(query, k, v, mask=mask)

    return _by_query_chunks(rows, q)


def _has_flash_attention(dtype: jnp.dtype, dim: int) -> bool:
    """Whether cuDNN has it here: Ampere or later, half precision, heads of up to 128 channels."""
    capability = str(getattr(jax.devices()[0], "compute_capability", ""))
    return (
        capability[:1].isdigit()  # of a GPU of another maker it is not
        and float(capability) >= 8
        and dtype in (jnp.bfloat16, jnp.float16)
        and dim <= 128
        and dim % 8 == 0
    )


def was_coded(
    spec: CacheSpec,
    query: Int[Array, " T"],
    key: Int[Array, " n"],
    *,
    every: int,
    window: Int[Array, ""] | None = None,
) -> Bool[Array, "T n"]:
    """Whether a cache that encodes ``every`` tokens at a time shows key j as a code to query i.

    At query i the cache holds i tokens; i's own key is exact. ``every = spec.block`` is the decode
    loop, ``every = 1`` its worst case: exactly ``window`` past tokens exact. ``window``: instead of
    the spec's.
    """
    exact = spec.sinks + (spec.window if window is None else window)
    coded = spec.sinks + jnp.maximum(query - exact, 0) // every * every
    return (key >= spec.sinks) & (key < coded[:, None])


def attend_as_cached(
    q: Float[Array, "B T Q d"],
    k: Float[Array, "B T H d"],
    v: Float[Array, "B T H d"],
    codec: Codec,
    *,
    every: int = 1,
    window: Int[Array, ""] | None = None,
) -> Float[Array, "B T Q d"]:
    """Causal attention of a whole sequence, each query seeing what a cache would show it.

    One teacher-forced pass for measuring fidelity. Each past key and value is exact or its decoded
    code by `was_coded`, ``every`` and ``window`` as there, and by whether it was an outlier then.

    Returns:
        In the dtype of q.

    Raises:
        InputError: if shapes do not fit.
    """
    batch, tokens, heads, dim = _check_queries(q, k, v)
    position = jnp.arange(tokens)
    old_k, old_v = remembered(k, v, codec)
    stays = None
    if isinstance(codec, Codebooks) and codec.spec.outliers:
        at = jnp.broadcast_to(position, (batch, tokens))
        error = errors(codec, k.astype(jnp.float32), v.astype(jnp.float32), old_k, old_v, at)
        stays = _outlier_until(error, codec.spec)  # [B, H, n]

    def by_head(x: Array) -> Array:  # [B, n, H, d] -> [B, H, n, d]
        return jnp.swapaxes(x.astype(jnp.float32), 1, 2)

    exact_k, exact_v, old_k, old_v = map(by_head, (k, v, old_k, old_v))

    # Scores are made anew in a backward pass: kept, they would be copied from layout to layout.
    @jax.checkpoint
    def rows(query: Array, at: Array) -> Array:
        count = query.shape[1]
        query = by_head(query) * reference.scale_of(dim)  # [B, Q, T, d]
        query = query.reshape(batch, heads, -1, dim)
        coded = was_coded(codec.spec, at, position, every=every, window=window)
        if stays is not None:
            # The last coded token tells how far the cache had come.
            last = jnp.max(jnp.where(coded, position, -1), axis=-1)  # [T]
            kept = last[:, None] < stays[:, :, None, None]  # [B, H, 1, T, n]
            coded = coded & ~kept

        def scores(keys: Array) -> Array:
            found = jnp.einsum("BHsd,BHnd->BHsn", query, keys)
            return found.reshape(batch, heads, -1, count, tokens)

        def summed(weights: Array, values: Array) -> Array:
            weights = weights.reshape(batch, heads, -1, tokens)
            return jnp.einsum("BHsn,BHnd->BHsd", weights, values)

        seen = at[:, None] >= position
        found = jnp.where(coded, scores(old_k), scores(exact_k))
        weights = jax.nn.softmax(jnp.where(seen, found, -jnp.inf), axis=-1)
        out = summed(jnp.where(coded, 0, weights), exact_v)
        out += summed(jnp.where(coded, weights, 0), old_v)
        out = out.reshape(batch, -1, count, dim)
        return jnp.swapaxes(out, 1, 2).astype(q.dtype)

    return _by_query_chunks(rows, q)


def _outlier_until(error: Float[Array, "B T H"], spec: QuantSpec) -> Int[Array, "B H T"]:
    """The position whose coding takes away each token's place among the outliers.

    A token has it from when it is coded until as many tokens with larger errors are, too.
    """
    tokens = error.shape[1]
    position = jnp.arange(tokens)
    error = jnp.where(position[:, None] < spec.sinks, -jnp.inf, error)

    def one(token: tuple[Array, Array]) -> Array:  # errors [B, H] and position of one token
        own, at = token
        # A compiler may compute the same error twice, with other roundings.
        larger = (error > own[:, None]) & (position != at)[:, None]
        full = jnp.cumsum(larger, axis=1) >= spec.outliers  # [B, T, H]
        return jnp.where(full.any(axis=1), jnp.argmax(full, axis=1), tokens)

    each = jnp.moveaxis(error, 1, 0), position
    return jnp.moveaxis(jax.lax.map(one, each, batch_size=_OUTLIER_CHUNK), 0, -1)


_OUTLIER_CHUNK = 128  # tokens whose errors are compared with all others at a time
_FLOATS = 2**26  # that attention over coded blocks holds at a time
_QUERY_CHUNK = 512  # rows of scores that exist at a time


def _by_query_chunks(
    rows: Callable[[Array, Array], Array], q: Float[Array, "B T Q d"]
) -> Float[Array, "B T Q d"]:
    """``rows(q[:, part], positions[part])`` over parts of the queries, one after the other."""
    batch, tokens, heads, dim = q.shape
    chunk = min(_QUERY_CHUNK, tokens)
    parts = -(-tokens // chunk)
    padded = jnp.pad(q, ((0, 0), (0, parts * chunk - tokens), (0, 0), (0, 0)))
    split = jnp.moveaxis(padded.reshape(batch, parts, chunk, heads, dim), 1, 0)
    at = jnp.arange(parts * chunk).reshape(parts, chunk)
    out = jax.lax.map(lambda part: rows(*part), (split, at))
    return jnp.moveaxis(out, 0, 1).reshape(batch, parts * chunk, heads, dim)[:, :tokens]
