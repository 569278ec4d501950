"""The key-value cache: an immutable pytree of exact sinks, coded blocks and an exact window.

Positions of a sequence, oldest first: ``sinks`` exact tokens, full blocks of ``block`` tokens as
codes, the window. After ``n`` tokens ``max(0, n - sinks - window) // block`` blocks are coded, so
the window holds ``window`` to ``window + block - 1`` exact tokens. A token is encoded once, with
its block, and never again. A cache without a spec holds everything exactly.

Shapes: L layers, B sequences, T new tokens, H KV heads, d head_dim, S sinks, C ring slots, N
blocks of b tokens.
"""

import dataclasses
import math
from typing import Any, Self

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from gsrq_jax import packing, residual
from gsrq_jax.codebook import Codebooks
from gsrq_jax.errors import InputError
from gsrq_jax.rope import rotate
from gsrq_jax.spec import QuantSpec, ResidualSpec


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far. Stacked over layers, every array has a leading L.

    Invariants: keys are rotated (after RoPE) where they are exact. Position ``p >= S`` that is not
    yet in a block lives in ring slot ``(p - S) % C``. Slots, sinks and blocks beyond ``length``
    hold anything at all and are never read.

    Attributes:
        sink_key, sink_value: ``[B, S, H, d]``, the first tokens.
        window_key, window_value: ``[B, C, H, d]``, a ring of ``window + block`` slots.
        key_codes, value_codes: uint8 ``[B, H, N, b, bytes]``, packed codes.
        length: int32 ``[B]``, tokens so far.
        spec: the quantisation, or None for a cache at full precision (S = N = 0).
    """

    sink_key: Array
    sink_value: Array
    window_key: Array
    window_value: Array
    key_codes: Array
    value_codes: Array
    length: Array
    spec: QuantSpec | None = dataclasses.field(metadata={"static": True})

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can hold."""
        if self.spec is None:
            return self.window_key.shape[-3]
        blocks, block = self.key_codes.shape[-3:-1]
        return self.spec.sinks + self.spec.window + (blocks + 1) * block - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, window and sinks included, codebooks not."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def replace(self, **arrays: Any) -> Self:
        """A copy with some arrays changed."""
        return dataclasses.replace(self, **arrays)


def init_cache(
    spec: QuantSpec | None,
    *,
    batch: int,
    kv_heads: int,
    head_dim: int,
    max_length: int,
    layers: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> KVCache:
    """An empty cache.

    Args:
        spec: how old tokens are coded; None keeps everything exact.
        batch: sequences.
        kv_heads: key and value heads of a layer.
        head_dim: channels of a head; must be the spec's.
        max_length: tokens that a sequence must be able to hold.
        layers: leading axis of a stacked cache; None for one layer.
        dtype: of the exact parts.

    Raises:
        InputError: if ``head_dim`` is not the spec's or ``max_length`` is not positive.
    """
    if max_length < 1:
        raise InputError(f"max_length must be at least 1, got {max_length}")
    if spec is not None and head_dim != spec.head_dim:
        raise InputError(
            f"the spec is for heads of {spec.head_dim} channels, the model's have {head_dim}; "
            "train codebooks for this model"
        )
    lead = () if layers is None else (layers,)

    def exact(slots: int) -> Array:
        return jnp.zeros((*lead, batch, slots, kv_heads, head_dim), dtype)

    def coded(code: ResidualSpec | None) -> Array:
        if spec is None or code is None:
            return jnp.zeros((*lead, batch, kv_heads, 0, 1, 1), jnp.uint8)
        blocks = max(0, max_length - spec.sinks - spec.window) // spec.block
        return jnp.zeros((*lead, batch, kv_heads, blocks, spec.block, code.nbytes), jnp.uint8)

    sinks, ring = (0, max_length) if spec is None else (spec.sinks, spec.ring)
    return KVCache(
        sink_key=exact(sinks),
        sink_value=exact(sinks),
        window_key=exact(ring),
        window_value=exact(ring),
        key_codes=coded(spec.key if spec else None),
        value_codes=coded(spec.value if spec else None),
        length=jnp.zeros((*lead, batch), jnp.int32),
        spec=spec,
    )


def blocks_after(spec: QuantSpec | None, length: Int[Array, "..."]) -> Int[Array, "..."]:
    """Coded blocks once ``length`` tokens are in the cache."""
    if spec is None:
        return jnp.zeros_like(length)
    return jnp.maximum(length - spec.sinks - spec.window, 0) // spec.block


# --- the frame of the keys ------------------------------------------------------------------------


def origin(spec: QuantSpec, positions: Int[Array, "..."]) -> Int[Array, "..."]:
    """Position up to which a key's rotation is undone before it is quantised."""
    match spec.frame:
        case "block":
            return positions - (positions - spec.sinks) % spec.block
        case "pre":
            return positions
        case "post":
            return jnp.zeros_like(positions)


def to_frame(
    key: Float[Array, "... T H d"],
    positions: Int[Array, "... T"],
    spec: QuantSpec,
    mean: Float[Array, "H d"],
    inv_freq: Float[Array, " d/2"],
) -> Float[Array, "... T H d"]:
    """Rotated keys as they are quantised, float32: ``R(-origin) k - R(p - origin) mean``."""
    start, at = origin(spec, positions)[..., None], positions[..., None]
    shift = rotate(jnp.broadcast_to(mean, key.shape), at - start, inv_freq)
    return rotate(key.astype(jnp.float32), -start, inv_freq) - shift


def from_frame(
    framed: Float[Array, "... T H d"],
    positions: Int[Array, "... T"],
    spec: QuantSpec,
    mean: Float[Array, "H d"],
    inv_freq: Float[Array, " d/2"],
) -> Float[Array, "... T H d"]:
    """The inverse of `to_frame`: rotated keys, float32."""
    start, at = origin(spec, positions)[..., None], positions[..., None]
    shift = rotate(jnp.broadcast_to(mean, framed.shape), at, inv_freq)
    return rotate(framed, start, inv_freq) + shift


# --- vectors to packed codes and back -------------------------------------------------------------


def _encode(
    x: Float[Array, "... H d"], codewords: Float[Array, "H G R K g"], code: ResidualSpec
) -> UInt8[Array, "... H bytes"]:
    heads = x.shape[-2]
    points = jnp.moveaxis(x, -2, 0).reshape(heads, math.prod(x.shape[:-2]), code.dim)
    codes = residual.encode(points, codewords)
    packed = packing.pack(codes.reshape(*codes.shape[:-2], code.codes), code.code_bits)
    return jnp.moveaxis(packed.reshape(heads, *x.shape[:-2], code.nbytes), 0, -2)


def unpack(packed: UInt8[Array, "... bytes"], code: ResidualSpec) -> UInt8[Array, "... G R"]:
    """Codeword indices of packed vectors."""
    codes = packing.unpack(packed, code.codes, code.code_bits)
    return codes.reshape(*codes.shape[:-1], code.groups, code.stages)


def encode_tokens(
    k: Float[Array, "... T H d"],
    v: Float[Array, "... T H d"],
    positions: Int[Array, "... T"],
    codebooks: Codebooks,
) -> tuple[UInt8[Array, "... T H kb"], UInt8[Array, "... T H vb"]]:
    """Packed codes of rotated keys and of values, with one layer's codebooks."""
    spec = codebooks.spec
    framed = to_frame(k, positions, spec, codebooks.key_mean, codebooks.inv_freq)
    keys = _encode(framed, codebooks.key, spec.key)
    return keys, _encode(v.astype(jnp.float32), codebooks.value, spec.value)


def decode_tokens(
    key_codes: UInt8[Array, "... T H kb"],
    value_codes: UInt8[Array, "... T H vb"],
    positions: Int[Array, "... T"],
    codebooks: Codebooks,
) -> tuple[Float[Array, "... T H d"], Float[Array, "... T H d"]]:
    """Rotated keys and values, float32, that packed codes stand for."""
    spec = codebooks.spec

    def decode(packed: Array, codewords: Array, code: ResidualSpec) -> Array:
        codes = jnp.moveaxis(unpack(packed, code), -3, 0)  # [H, ..., T, G, R]
        flat = codes.reshape(codes.shape[0], math.prod(codes.shape[1:-2]), *codes.shape[-2:])
        x = residual.decode(flat, codewords)
        return jnp.moveaxis(x.reshape(*codes.shape[:-2], code.dim), 0, -2)

    framed = decode(key_codes, codebooks.key, spec.key)
    keys = from_frame(framed, positions, spec, codebooks.key_mean, codebooks.inv_freq)
    return keys, decode(value_codes, codebooks.value, spec.value)


def check_spec(cache: KVCache, codebooks: Codebooks | None) -> None:
    """Refuse codebooks of another spec than the cache's.

    Raises:
        InputError: naming both.
    """
    ours = codebooks.spec if codebooks is not None else None
    if ours != cache.spec:
        raise InputError(
            f"the cache was made for [{cache.spec or 'full precision'}], the codebooks for "
            f"[{ours or 'full precision'}]; use one spec"
        )


# --- append ---------------------------------------------------------------------------------------


def append(
    cache: KVCache,
    k: Float[Array, "*L B T H d"],
    v: Float[Array, "*L B T H d"],
    codebooks: Codebooks | None = None,
    count: Int[Array, " B"] | None = None,
) -> KVCache:
    """The cache with new tokens: one token, a prompt, or anything between, at any length so far.

    Blocks that have filled are encoded, the rest goes to the window. Works on one layer or on a
    stack of layers, under jit, vmap and scan. For fewer new tokens than a block the encoder runs
    only in the calls in which some sequence fills one (under an outer vmap over caches it always
    runs).

    Args:
        cache: what there is; donate it where it is not needed any more.
        k: new keys, rotated at their positions ``length … length + T - 1``.
        v: new values.
        codebooks: of this layer, or stacked like the cache; None for a cache without a spec.
        count: new tokens of each sequence, at most T; the rest of k and v is padding and may be
            NaN. None means T each.

    Raises:
        InputError: if shapes or specs do not fit, or, where lengths are concrete, if a sequence
            would outgrow the cache. Inside jit growth is the caller's to check
            (`KVCache.capacity`): tokens beyond it corrupt that sequence.
    """
    spec = cache.spec
    batch, tokens, heads, dim = k.shape[-4:]
    expected = (*cache.length.shape, tokens, heads, dim)
    held = (*cache.window_key.shape[:-3], tokens, *cache.window_key.shape[-2:])
    if k.shape != v.shape or k.shape != expected or k.shape != held:
        raise InputError(
            f"keys {k.shape} and values {v.shape} do not fit this cache, which takes {held}"
        )
    check_spec(cache, codebooks)
    if not tokens:
        return cache
    new = jnp.full((batch,), tokens, jnp.int32) if count is None else count.astype(jnp.int32)
    before = cache.length
    after = before + new
    if not isinstance(after, jax.core.Tracer) and int(after.max()) > cache.capacity:
        raise InputError(
            f"the cache holds {cache.capacity} tokens and {int(after.max())} are needed; "
            "make it with a larger max_length"
        )

    if cache.key_codes.shape[-3] and spec is not None and codebooks is not None:
        stacked = cache.length.ndim == 2
        flush = jax.vmap(_encode_blocks, (0, 0, 0, 0, None)) if stacked else _encode_blocks
        filled = blocks_after(spec, after) > blocks_after(spec, before)
        # Zero rounds or one: XLA updates a loop's carry in place, a conditional's it would copy.
        rounds = 1 if tokens >= spec.block else filled.any().astype(jnp.int32)
        key_codes, value_codes = jax.lax.fori_loop(
            0,
            rounds,
            lambda _, codes: flush(
                cache.replace(key_codes=codes[0], value_codes=codes[1]), k, v, codebooks, new
            ),
            (cache.key_codes, cache.value_codes),
        )
        cache = cache.replace(key_codes=key_codes, value_codes=value_codes)
    write = jax.vmap(_write_exact, (0, 0, 0, None)) if cache.length.ndim == 2 else _write_exact
    return write(cache, k, v, new).replace(length=after)


def _write_exact(cache: KVCache, k: Array, v: Array, count: Array) -> KVCache:
    """One layer: the new tokens that stay exact, into sinks and ring."""
    sinks, ring = cache.sink_key.shape[1], cache.window_key.shape[1]
    step = jnp.arange(k.shape[1])
    position = cache.length[:, None] + step  # [B, T]
    real = step < count[:, None]
    coded = blocks_after(cache.spec, cache.length + count) * cache.key_codes.shape[-2]
    recent = real & (position >= sinks + coded[:, None])
    sink_slot = jnp.where(real & (position < sinks), position, sinks)
    ring_slot = jnp.where(recent, (position - sinks) % ring, ring)
    row = jnp.arange(k.shape[0])[:, None]

    def put(array: Array, slot: Array, new: Array) -> Array:
        if not array.shape[1]:
            return array
        return array.at[row, slot].set(new.astype(array.dtype), mode="drop")

    return cache.replace(
        sink_key=put(cache.sink_key, sink_slot, k),
        sink_value=put(cache.sink_value, sink_slot, v),
        window_key=put(cache.window_key, ring_slot, k),
        window_value=put(cache.window_value, ring_slot, v),
    )


def _encode_blocks(
    cache: KVCache, k: Array, v: Array, codebooks: Codebooks, count: Array
) -> tuple[Array, Array]:
    """One layer: codes with the blocks added that fill once ``count`` new tokens have come."""
    spec = codebooks.spec
    tokens, ring, blocks = k.shape[1], cache.window_key.shape[1], cache.key_codes.shape[2]
    most = min(-(-tokens // spec.block), blocks)  # the window held window + block - 1 at most
    first = blocks_after(spec, cache.length)[:, None]
    index = first + jnp.arange(most)  # [B, M]
    offset = index[..., None] * spec.block + jnp.arange(spec.block)  # [B, M, b] position - sinks
    position = offset + spec.sinks
    from_ring = position < cache.length[:, None, None]
    new = jnp.clip(position - cache.length[:, None, None], 0, tokens - 1)
    row = jnp.arange(k.shape[0])[:, None, None]

    def gather(window: Array, fresh: Array) -> Array:  # [B, M, b, H, d]
        old, late = window[row, offset % ring], fresh[row, new].astype(window.dtype)
        return jnp.where(from_ring[..., None, None], old, late)

    key_codes, value_codes = encode_tokens(
        gather(cache.window_key, k), gather(cache.window_value, v), position, codebooks
    )
    done = index < blocks_after(spec, cache.length + count)[:, None]
    target = jnp.where(done, index, blocks)

    def put(codes: Array, fresh: Array) -> Array:  # fresh [B, M, b, H, bytes]
        moved = jnp.moveaxis(fresh, 3, 2)  # [B, M, H, b, bytes]
        return codes.at[row[..., 0], :, target].set(moved, mode="drop")

    return put(cache.key_codes, key_codes), put(cache.value_codes, value_codes)


# --- reading --------------------------------------------------------------------------------------


def exact_tokens(
    cache: KVCache,
) -> tuple[Float[Array, "B E H d"], Float[Array, "B E H d"], Bool[Array, "B E"]]:
    """One layer's sinks and window: keys, values (0 where there is none) and which are there."""
    sinks, ring = cache.sink_key.shape[1], cache.window_key.shape[1]
    length = cache.length[:, None]
    first = blocks_after(cache.spec, length) * cache.key_codes.shape[-2]
    slot = jnp.arange(ring)
    offset = first + (slot - first) % ring  # the one position - sinks that slot can hold now
    there = jnp.concatenate([jnp.arange(sinks) < length, offset < length - sinks], axis=1)

    def join(sink: Array, window: Array) -> Array:
        return jnp.where(there[..., None, None], jnp.concatenate([sink, window], axis=1), 0)

    keys = join(cache.sink_key, cache.window_key)
    return keys, join(cache.sink_value, cache.window_value), there


def materialize(
    cache: KVCache, codebooks: Codebooks | None = None
) -> tuple[Float[Array, "B n H d"], Float[Array, "B n H d"], Bool[Array, "B n"]]:
    """One layer's cache written out: rotated keys, values, and which entries are tokens.

    Order: sinks, ring slots, blocks; attention does not mind. Float32. For tests and for looking
    at what a cache remembers; attention does not need it.
    """
    keys, values, there = exact_tokens(cache)
    keys, values = keys.astype(jnp.float32), values.astype(jnp.float32)
    if cache.spec is None or codebooks is None:
        return keys, values, there
    batch, _, blocks, block, _ = cache.key_codes.shape
    position = cache.spec.sinks + jnp.arange(blocks * block)

    def flat(codes: Array) -> Array:  # [B, H, N, b, bytes] -> [B, N b, H, bytes]
        return jnp.moveaxis(codes, 1, 3).reshape(batch, blocks * block, codes.shape[1], -1)

    old_keys, old_values = decode_tokens(
        flat(cache.key_codes), flat(cache.value_codes), position, codebooks
    )
    coded = jnp.arange(blocks * block) < (blocks_after(cache.spec, cache.length) * block)[:, None]
    return (
        jnp.concatenate([keys, old_keys], axis=1),
        jnp.concatenate([values, old_values], axis=1),
        jnp.concatenate([there, coded], axis=1),
    )
