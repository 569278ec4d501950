"""The key-value cache: an immutable pytree of exact sinks, coded blocks and an exact window.

Positions of a sequence, oldest first: ``sinks`` exact tokens, full blocks of ``block`` tokens as
codes, the window. After ``n`` tokens ``max(0, n - sinks - window) // block`` blocks are coded, so
the window holds ``window`` to ``window + block - 1`` exact tokens. A token is encoded once, with
its block, and never again. A cache without a spec holds everything exactly.

Shapes: L layers, B sequences, T new tokens, H KV heads, d head_dim, S sinks, C ring slots, N
blocks of b tokens.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple, Self, TypeGuard

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from gsrq_jax.codebook import Codebooks, errors
from gsrq_jax.codec import Codec, Codes
from gsrq_jax.errors import InputError, at_least, known
from gsrq_jax.kernels import reference
from gsrq_jax.spec import CacheSpec, QuantSpec, ResidualSpec


class Outliers(NamedTuple):
    """Coded tokens that are exact as well, the same number in each KV head, not the same tokens.

    Slots hold the tokens with the largest errors so far, in falling order; those of the slots that
    are not filled yet are −∞, and nothing else of them is read.

    Attributes:
        key, value: ``[B, H, E, d]``, keys rotated.
        position: int32 ``[B, H, E]``.
        error: float32 ``[B, H, E]``, `gsrq_jax.codebook.errors` of their codes.
    """

    key: Array
    value: Array
    position: Array
    error: Array


class Turn(NamedTuple):
    """Which blocks of a sequence lie in the slots of a cache: ``first + step·i`` in slot i.

    One device has them all, in order. Where the blocks are spread over devices each has every
    ``step``-th, so that all have as many, give or take one, however long a sequence is.
    """

    first: Array | int = 0
    step: int = 1

    @classmethod
    def of(cls, axis_name: str | None) -> "Turn":
        """This device's, blocks being spread over that mapped axis."""
        if axis_name is None:
            return cls()
        return cls(jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name))

    def blocks(self, slots: int) -> Int[Array, " slots"]:
        """The block in each slot."""
        return self.first + self.step * jnp.arange(slots)

    def slot(self, block: Int[Array, "..."], slots: int) -> Int[Array, "..."]:
        """Where a block lies, ``slots`` if it is not one of these."""
        slot = (block - self.first) // self.step
        ours = ((block - self.first) % self.step == 0) & (slot >= 0)
        return jnp.where(ours, jnp.minimum(slot, slots), slots)

    def filled(self, blocks: Int[Array, "..."]) -> Int[Array, "..."]:
        """How many slots the first so many blocks of a sequence fill."""
        return jnp.maximum(blocks - self.first + self.step - 1, 0) // self.step


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens so far. Stacked over layers, every array has a leading L.

    Invariants: keys are rotated (after RoPE) where they are exact. Position ``p >= S`` that is not
    yet in a block lives in ring slot ``(p - S) % C``. Slots, sinks and blocks beyond ``length``
    hold anything at all and are never read.

    Attributes:
        sink_key, sink_value: ``[B, H, S, d]``, the first tokens.
        window_key, window_value: ``[B, H, C, d]``, a ring of ``window + block`` slots; heads first,
            so that the products of attention read it where it is.
        key_codes, value_codes: the codec's codes, arrays ``[B, H, N, *shape]``; for residual codes
            the shapes of their layout, packed uint8 ``[B, H, N, b, bytes]``; where heads share
            codes once for all that do. Where the spec gives layers stages of their own, a stack has
            no axis of layers here but a pool of units, ``[P, B, H, N, *unit]``: all units of the
            first layer, then those of the second, and so on, so that a layer's codes are one run of
            memory. A unit is what the layout says, packed a byte of every token, uint8 ``[P, B, H,
            N, b]``. `layer_views` takes them apart.
        length: int32 ``[B]``, tokens so far.
        outliers: `Outliers`, or None where the spec has none.
        spec: the quantisation, or None for a cache at full precision (S = N = 0).
    """

    sink_key: Array
    sink_value: Array
    window_key: Array
    window_value: Array
    key_codes: Codes
    value_codes: Codes
    length: Array
    outliers: Outliers | None
    spec: CacheSpec | None = dataclasses.field(metadata={"static": True})

    @property
    def blocks(self) -> int:
        """Coded blocks that a sequence can hold."""
        return jax.tree.leaves(self.key_codes)[0].shape[self.length.ndim + 1]

    @property
    def capacity(self) -> int:
        """Tokens that a sequence can hold."""
        if self.spec is None:
            return self.window_key.shape[-2]
        return self.spec.sinks + self.spec.window + (self.blocks + 1) * self.spec.block - 1

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, window and sinks included, codebooks not."""
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(self))

    def replace(self, **arrays: Any) -> Self:
        """A copy with some arrays changed."""
        return dataclasses.replace(self, **arrays)


def init_cache(
    spec: CacheSpec | None,
    *,
    batch: int,
    kv_heads: int,
    head_dim: int,
    max_length: int,
    layers: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
    axis_name: str | None = None,
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
        axis_name: mapped axis over which the blocks are spread; then this device's part.

    Raises:
        InputError: if ``head_dim`` is not the spec's, its codes are for another number of heads, a
            size is not positive, or ``dtype`` is not a floating type.
    """
    at_least(1, batch=batch, kv_heads=kv_heads, head_dim=head_dim, max_length=max_length)
    at_least(1, layers=layers)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise InputError(f"dtype must be a floating type, got {jnp.dtype(dtype).name}")
    if spec is not None and head_dim != spec.head_dim:
        raise InputError(
            f"the spec is for heads of {spec.head_dim} channels, the model's have {head_dim}; "
            "train codebooks for this model"
        )
    lead = () if layers is None else (layers,)
    shares = (1, 1) if spec is None else spec.code_heads
    if any(kv_heads % n for n in shares):
        raise InputError(
            f"the spec is for codes that {max(shares)} KV heads share, and there are {kv_heads}; "
            "train codebooks for this model"
        )

    def exact(slots: int) -> Array:
        return jnp.zeros((*lead, batch, kv_heads, slots, head_dim), dtype)

    if spec is None:
        sinks, ring, blocks = 0, max_length, 0
        shapes: tuple[Codes, Codes] = (jax.ShapeDtypeStruct((), jnp.uint8),) * 2
    else:
        sinks, ring = spec.sinks, spec.ring
        blocks = max(0, max_length - spec.sinks - spec.window) // spec.block
        step, together = Turn.of(axis_name).step, spec.blocks_together
        if step > 1 and together > 1 and isinstance(spec, QuantSpec):
            raise InputError(
                f"in layout {spec.layout!r} the {together} blocks of a frame cannot be spread over "
                "devices; use layout 'packed' or codebooks with one block to a frame"
            )
        blocks = -(-blocks // (step * together)) * together
        shapes = spec.code_shapes()
    if layers is not None and _by_layer(spec):
        units = (jax.eval_shape(spec.arrangement.to_units, shape) for shape in shapes)
        key_codes, value_codes = (
            jnp.zeros((len(of), batch, kv_heads // n, blocks, *unit.shape[1:]), unit.dtype)
            for of, n, unit in zip(_units(spec, layers), shares, units, strict=True)
        )
    else:
        key_codes, value_codes = (
            jax.tree.map(
                lambda s, n=n: jnp.zeros((*lead, batch, kv_heads // n, blocks, *s.shape), s.dtype),
                shape,
            )
            for shape, n in zip(shapes, shares, strict=True)
        )
    outliers = None
    if (kept := outliers_kept(spec)) > 0:
        slots = (*lead, batch, kv_heads, kept)
        # Types are named: weak ones would not be those that `append` gives.
        none = jnp.zeros(slots, jnp.int32), jnp.full(slots, -jnp.inf, jnp.float32)
        outliers = Outliers(exact(kept), exact(kept), *none)
    return KVCache(
        sink_key=exact(sinks),
        sink_value=exact(sinks),
        window_key=exact(ring),
        window_value=exact(ring),
        key_codes=key_codes,
        value_codes=value_codes,
        length=jnp.zeros((*lead, batch), jnp.int32),
        outliers=outliers,
        spec=spec,
    )


def outliers_kept(spec: CacheSpec | None) -> int:
    """Slots of `Outliers`."""
    return spec.outliers if isinstance(spec, QuantSpec) else 0


def blocks_after(spec: CacheSpec | None, length: Int[Array, "..."]) -> Int[Array, "..."]:
    """Coded blocks once ``length`` tokens are in the cache."""
    if spec is None:
        return jnp.zeros_like(length)
    return jnp.maximum(length - spec.sinks - spec.window, 0) // spec.block


def block_positions(spec: CacheSpec, blocks: Int[Array, " N"]) -> Int[Array, "N b"]:
    """Positions of the tokens of these blocks."""
    return spec.sinks + spec.block * blocks[:, None] + jnp.arange(spec.block)


def check_spec(cache: KVCache, codec: Codec | None) -> None:
    """Refuse a codec of another spec than the cache's, or codebooks of other layers or heads.

    Raises:
        InputError: naming both.
    """
    ours = codec.spec if codec is not None else None
    if ours != cache.spec:
        raise InputError(
            f"the cache was made for [{cache.spec or 'full precision'}], the codec for "
            f"[{ours or 'full precision'}]; use one spec"
        )
    if not isinstance(codec, Codebooks):
        return
    layers = cache.length.shape[0] if cache.length.ndim == 2 else None
    if codec.layers != layers:
        of_codec, of_cache = (
            "one layer" if n is None else f"a stack of {n} layers" for n in (codec.layers, layers)
        )
        raise InputError(
            f"the codebooks are of {of_codec}, the cache of {of_cache}; take the same of both "
            "(a layer's codebooks are jax.tree.map(lambda x: x[i], codebooks))"
        )
    if codec.kv_heads != (heads := cache.window_key.shape[-3]):
        raise InputError(
            f"the codebooks are of {codec.kv_heads} KV heads, the cache of {heads}; "
            "train codebooks for this model"
        )


def check_vectors(cache: KVCache, k: Array, v: Array) -> None:
    """Refuse keys and values ``[*L, B, T, H, d]`` that are not alike or not the cache's.

    Raises:
        InputError: naming the shapes.
    """
    *lead, heads, _, dim = cache.window_key.shape
    if k.shape != v.shape or (*k.shape[:-3], *k.shape[-2:]) != (*lead, heads, dim):
        takes = ", ".join(map(str, (*lead, "T", heads, dim)))
        raise InputError(
            f"keys {k.shape} and values {v.shape} do not fit this cache, which takes ({takes})"
        )


def new_tokens(count: Int[ArrayLike, " B"] | None, batch: int, tokens: int) -> Int[Array, " B"]:
    """How many of ``tokens`` new ones each sequence has, int32; None means all.

    Raises:
        InputError: if there is not one number for each sequence or, where they are concrete, one is
            not from 0 to ``tokens``.
    """
    if count is None:
        return jnp.full((batch,), tokens, jnp.int32)
    new = jnp.asarray(count, jnp.int32)
    if new.shape != (batch,):
        raise InputError(
            f"count must have the shape {(batch,)}, a number for each sequence, got {new.shape}"
        )
    given = known(count)
    if given is not None and not ((given >= 0) & (given <= tokens)).all():
        raise InputError(f"count must be from 0 to the {tokens} new tokens, got {given.tolist()}")
    return new


# --- append ---------------------------------------------------------------------------------------


@jax.named_scope("append")
def append(
    cache: KVCache,
    k: Float[Array, "*L B T H d"],
    v: Float[Array, "*L B T H d"],
    codec: Codec | None = None,
    count: Int[ArrayLike, " B"] | None = None,
    *,
    axis_name: str | None = None,
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
        codec: codebooks of this layer, or stacked like the cache, or another codec; None for a
            cache without a spec.
        count: new tokens of each sequence, at most T; the rest of k and v is padding and may be
            NaN. None means T each.
        axis_name: mapped axis over which the cache's blocks are spread; each of its devices is
            given the same tokens, and encodes the blocks that are its own.

    Raises:
        InputError: if shapes or specs do not fit, or, where numbers are concrete, if a count is not
            from 0 to T or a sequence would outgrow the cache. Inside jit growth is the caller's to
            check (`KVCache.capacity`): tokens beyond it corrupt that sequence.
    """
    spec, k, v = cache.spec, jnp.asarray(k), jnp.asarray(v)
    check_vectors(cache, k, v)
    check_spec(cache, codec)
    batch, tokens = k.shape[-4:-2]
    if not tokens:
        return cache
    new = new_tokens(count, batch, tokens)
    before = cache.length
    after = before + new
    needed = known(after)
    if needed is not None and needed.max() > cache.capacity:
        raise InputError(
            f"the cache holds {cache.capacity} tokens and {needed.max()} are needed; "
            "make it with a larger max_length"
        )

    if spec is not None and codec is not None and cache.blocks:
        filled = blocks_after(spec, after) > blocks_after(spec, before)
        # Zero rounds or one: XLA updates a loop's carry in place, a conditional's it would copy.
        rounds = 1 if tokens >= spec.block else filled.any().astype(jnp.int32)
        turn = Turn.of(axis_name)

        @jax.named_scope("flush")
        def flush(i: Array, cache: KVCache) -> KVCache:
            # What is the same in every round XLA would compute before the loop, and so in every
            # call: the encoder. All that it reads is tied to the round. The exact tokens are
            # carried, too: `_write_exact` would else have to change a copy of them.
            cache, keys, values, books, count = jax.tree.map(
                lambda x: jax.lax.optimization_barrier((x, i))[0], (cache, k, v, codec, new)
            )
            key_codes, value_codes, outliers = _flush(cache, keys, values, books, count, turn)
            return cache.replace(key_codes=key_codes, value_codes=value_codes, outliers=outliers)

        cache = jax.lax.fori_loop(0, rounds, flush, cache)
    write = jax.vmap(_write_exact, (0, 0, 0, None)) if cache.length.ndim == 2 else _write_exact
    written = write(cache.replace(key_codes=None, value_codes=None), k, v, new)
    return written.replace(key_codes=cache.key_codes, value_codes=cache.value_codes, length=after)


def _write_exact(cache: KVCache, k: Array, v: Array, count: Array) -> KVCache:
    """One layer: the new tokens that stay exact, into sinks and ring."""
    sinks, ring = cache.sink_key.shape[2], cache.window_key.shape[2]
    step = jnp.arange(k.shape[1])
    position = cache.length[:, None] + step  # [B, T]
    real = step < count[:, None]
    coded = _coded(cache.spec, cache.length + count)
    recent = real & (position >= sinks + coded[:, None])
    sink_slot = jnp.where(real & (position < sinks), position, sinks)
    ring_slot = jnp.where(recent, (position - sinks) % ring, ring)
    row = jnp.arange(k.shape[0])[:, None]

    def put(array: Array, slot: Array, new: Array) -> Array:
        if not array.shape[2]:
            return array
        return array.at[row, :, slot].set(new.astype(array.dtype), mode="drop")

    return cache.replace(
        sink_key=put(cache.sink_key, sink_slot, k),
        sink_value=put(cache.sink_value, sink_slot, v),
        window_key=put(cache.window_key, ring_slot, k),
        window_value=put(cache.window_value, ring_slot, v),
    )


def _flush(
    cache: KVCache, k: Array, v: Array, codec: Codec, count: Array, turn: Turn
) -> tuple[Codes, Codes, Outliers | None]:
    """Codes with the blocks added that fill once ``count`` new tokens have come, and outliers."""
    exact, blocks = cache.replace(key_codes=None, value_codes=None), cache.blocks
    encode = functools.partial(_encoded_blocks, blocks=blocks, turn=turn)

    def put(codes: Array, fresh: Array, target: Array) -> Array:  # [B, H, N, …], [B, M, H, …]
        row = jnp.arange(codes.shape[0])[:, None]
        return codes.at[row, :, target].set(fresh.astype(codes.dtype), mode="drop")

    stacked = cache.length.ndim == 2
    if stacked:
        put = jax.vmap(put)

        def of_layer(layer: tuple[KVCache, Array, Array, Codec]) -> Any:
            exact, k, v, codec = layer
            return encode(exact, k, v, codec, count)

        (keys, values), target, outliers = jax.lax.map(
            of_layer, (exact, k, v, codec), batch_size=_layers_at_once(k, codec.spec)
        )
    else:
        (keys, values), target, outliers = encode(exact, k, v, codec, count)
    of_keys = of_values = target
    if stacked and _by_layer(cache.spec):
        of_keys, of_values = (target[units[:, 0]] for units in _units(cache.spec, len(target)))
        keys, values = _pools(cache.spec, keys, values)

    def put_all(codes: Codes, fresh: Codes, target: Array) -> Codes:
        return jax.tree.map(lambda codes, new: put(codes, new, target), codes, fresh)

    return (
        put_all(cache.key_codes, keys, of_keys),
        put_all(cache.value_codes, values, of_values),
        outliers,
    )


def _layers_at_once(k: Float[Array, "L B T H d"], spec: CacheSpec) -> int:
    """How many layers are encoded together, so that what it needs does not grow with the batch
    times the layers; a divisor of L."""
    layers, batch, tokens, heads, dim = k.shape
    floats = batch * -(-tokens // spec.block) * spec.block * heads * dim
    fitting = [n for n in range(1, layers + 1) if layers % n == 0 and n * floats <= _FLOATS]
    return max(fitting, default=1)


_FLOATS = 2**26  # keys that are encoded together


def _encoded_blocks(
    cache: KVCache, k: Array, v: Array, codec: Codec, count: Array, *, blocks: int, turn: Turn
) -> tuple[tuple[Codes, Codes], Array, Outliers | None]:
    """One layer: codes ``[B, M, H, …]`` of blocks that may have filled, the slots ``[B, M]`` that
    they go to, ``blocks`` where they have not, and the outliers with these blocks among them."""
    spec = codec.spec
    tokens, ring = k.shape[1], cache.window_key.shape[2]
    # Of these blocks only; but who keeps outliers must know the errors of all.
    ours = turn if cache.outliers is None else Turn()
    most = -(-tokens // spec.block)  # the window held window + block - 1 at most
    most = min(-(-most // ours.step), blocks * (turn.step // ours.step))
    first = blocks_after(spec, cache.length)[:, None]
    index = first + (ours.first - first) % ours.step + ours.step * jnp.arange(most)  # [B, M]
    offset = index[..., None] * spec.block + jnp.arange(spec.block)  # [B, M, b] position - sinks
    position = offset + spec.sinks
    from_ring = position < cache.length[:, None, None]
    new = jnp.clip(position - cache.length[:, None, None], 0, tokens - 1)
    row = jnp.arange(k.shape[0])[:, None, None]

    def gather(window: Array, fresh: Array) -> Array:  # [B, M, b, H, d]
        old, late = window[row, :, offset % ring], fresh[row, new].astype(window.dtype)
        return jnp.where(from_ring[..., None, None], old, late)

    keys, values = gather(cache.window_key, k), gather(cache.window_value, v)
    fresh = codec.encode(keys, values, position)
    done = index < blocks_after(spec, cache.length + count)[:, None]
    outliers = cache.outliers
    if outliers is not None and isinstance(codec, Codebooks):
        error = errors(codec, keys, values, *codec.decode(*fresh, position), position)
        new_ones = Outliers(
            keys,
            values,
            jnp.broadcast_to(position[..., None], error.shape),
            jnp.where(done[..., None, None], error, -jnp.inf),
        )
        outliers = _worst(outliers, new_ones)
    return fresh, jnp.where(done, turn.slot(index, blocks), blocks), outliers


def _worst(old: Outliers, new: Outliers) -> Outliers:
    """As many of ``old`` and of ``new`` ``[B, M, b, H, …]`` as there are slots; the old before the
    new and the early before the late where errors are equal."""

    def join(a: Array, b: Array) -> Array:
        by_head = jnp.swapaxes(b.reshape(len(b), -1, *b.shape[3:]), 1, 2)
        return jnp.concatenate([a, by_head.astype(a.dtype)], axis=2)

    both = jax.tree.map(join, old, new)
    _, at = jax.lax.top_k(both.error, old.error.shape[2])

    def take(x: Array) -> Array:
        return jnp.take_along_axis(x, at.reshape(*at.shape, *(1,) * (x.ndim - 3)), axis=2)

    return jax.tree.map(take, both)


def _coded(spec: CacheSpec | None, length: Array) -> Array:
    """Coded tokens once ``length`` tokens are in the cache."""
    return blocks_after(spec, length) * (1 if spec is None else spec.block)


# --- layers with stages of their own --------------------------------------------------------------


def _by_layer(spec: CacheSpec | None) -> TypeGuard[QuantSpec]:
    return isinstance(spec, QuantSpec) and spec.key_stages is not None


def _units(spec: QuantSpec, layers: int) -> tuple[np.ndarray, np.ndarray]:
    """Layer, and number in it, of each unit of a stack's keys, and of its values: ``[P, 2]``.

    Raises:
        InputError: if the spec is for another number of layers.
    """
    if len(spec.layer_codes[0]) != layers:
        raise InputError(
            f"the spec is for {len(spec.layer_codes[0])} layers, the model has {layers}; "
            "train codebooks for this model"
        )
    count = spec.arrangement.units
    keys, values = (
        np.asarray([(i, unit) for i, code in enumerate(codes) for unit in range(count(code))])
        for codes in spec.layer_codes
    )
    return keys, values


def _kinds(spec: QuantSpec) -> tuple[list[tuple[ResidualSpec, ResidualSpec]], np.ndarray]:
    """Codes of a key and of a value that layers have, and which of these each layer has."""
    pairs = list(zip(*spec.layer_codes, strict=True))
    kinds = list(dict.fromkeys(pairs))
    return kinds, np.asarray([kinds.index(pair) for pair in pairs])


def _pools(spec: QuantSpec, keys: Array, values: Array) -> tuple[Array, Array]:
    """Codes ``[L, *lead, *shape]`` of most stages each to pools ``[P, *lead, *unit]``."""
    layout, (kinds, kind_of) = spec.arrangement, _kinds(spec)
    parts: tuple[list[Array], list[Array]] = [], []
    for i, own in enumerate(kinds):
        some_keys, some_values = keys[kind_of == i], values[kind_of == i]
        if not layout.nested:
            most = spec.key, spec.value
            some_keys, some_values = layout.restaged(some_keys, some_values, most, own)
        for part, x, code in zip(parts, (some_keys, some_values), own, strict=True):
            of_layers = jnp.swapaxes(layout.to_units(x)[: layout.units(code)], 0, 1)
            part.append(of_layers.reshape(-1, *of_layers.shape[2:]))
    by_kind = np.argsort(kind_of, kind="stable")  # layers as they lie in these parts

    def in_order(part: list[Array], units: np.ndarray) -> Array:
        at = np.concatenate([np.flatnonzero(units[:, 0] == layer) for layer in by_kind])
        return jnp.concatenate(part)[np.argsort(at)]

    of_keys, of_values = _units(spec, len(keys))
    return in_order(parts[0], of_keys), in_order(parts[1], of_values)


def stack_layers(cache: KVCache) -> KVCache:
    """A stack from the caches of single layers stacked by ``scan``, ``vmap`` or ``map``."""
    if not _by_layer(cache.spec):
        return cache
    keys, values = _pools(cache.spec, cache.key_codes, cache.value_codes)
    return cache.replace(key_codes=keys, value_codes=values)


def layer_views(cache: KVCache) -> tuple[Any, Callable[[Any], KVCache]]:
    """What to scan over a stack for, and what makes one layer's cache of each slice.

    ``views, view = layer_views(cache)``, then ``view(x)`` for each ``x`` that a scan over ``views``
    hands out. Layers read as many units as the one with most stages; the codes behind a layer's
    own are its neighbour's or 0, and its codewords for them are 0. All layers hold as many tokens
    as the first, so that what follows from their number alone is found once, not in each.
    """
    spec, length = cache.spec, cache.length[0]
    if not _by_layer(spec):
        return cache.replace(length=None), lambda x: x.replace(length=length)
    layout, most = spec.arrangement, (spec.key, spec.value)
    (kinds, kind_of), pools = _kinds(spec), (cache.key_codes, cache.value_codes)
    where = (
        *(
            np.searchsorted(units[:, 0], range(len(kind_of)))
            for units in _units(spec, len(kind_of))
        ),
        kind_of,
    )

    def view(x: tuple[KVCache, tuple[Array, Array, Array]]) -> KVCache:
        exact, (*starts, kind) = x
        keys, values = (
            layout.from_units(pool.at[start + jnp.arange(layout.units(code))].get(mode="clip"))
            for pool, start, code in zip(pools, starts, most, strict=True)
        )
        if not layout.nested:
            ways = [functools.partial(layout.restaged, old=own, new=most) for own in kinds]
            keys, values = jax.lax.switch(kind, ways, keys, values)
        return exact.replace(key_codes=keys, value_codes=values, length=length)

    exact = cache.replace(key_codes=None, value_codes=None, length=None)
    return (exact, jax.tree.map(jnp.asarray, where)), view


# --- reading --------------------------------------------------------------------------------------


def exact_counts(cache: KVCache) -> tuple[Int[Array, " B"], Int[Array, " B"], Int[Array, " B"]]:
    """One layer's sinks that are held; the slot of the window's first token, modulo the ring; and
    the window's tokens."""
    sinks = cache.sink_key.shape[2]
    first = _coded(cache.spec, cache.length)
    window = jnp.maximum(cache.length - sinks - first, 0)
    return jnp.minimum(cache.length, sinks), first, window


def exact_tokens(
    cache: KVCache,
) -> list[tuple[Float[Array, "B H E d"], Float[Array, "B H E d"], Bool[Array, "B E"]]]:
    """One layer's sinks, and its window: keys, values and which of them are there."""
    sinks, ring = cache.sink_key.shape[2], cache.window_key.shape[2]
    held, first, window = exact_counts(cache)
    return [
        (cache.sink_key, cache.sink_value, jnp.arange(sinks) < held[:, None]),
        (cache.window_key, cache.window_value, reference.in_ring(ring, first, window)),
    ]


def outlier_slots(cache: KVCache, shape: tuple[int, ...], turn: Turn) -> tuple[Array, ...]:
    """One layer's indices of the outliers in arrays ``[B, N, b, H]`` of the blocks that ``turn``
    says; out of bounds for those of other blocks and for slots that are not filled."""
    assert cache.spec is not None
    assert cache.outliers is not None
    there = cache.outliers.error > -jnp.inf
    offset = cache.outliers.position - cache.spec.sinks
    block = jnp.where(there, turn.slot(offset // cache.spec.block, shape[1]), shape[1])
    row, head = jnp.arange(shape[0])[:, None, None], jnp.arange(shape[3])[:, None]
    return row, block, offset % cache.spec.block, head


def coded_tokens(
    cache: KVCache, codec: Codec, turn: Turn | None = None
) -> tuple[Float[Array, "B N b H d"], Float[Array, "B N b H d"]]:
    """One layer's blocks written out, float32, outliers exact; those beyond the length mean
    nothing. ``turn`` says which blocks they are; None means all."""
    turn = turn or Turn()
    position = block_positions(codec.spec, turn.blocks(cache.blocks))
    position = jnp.broadcast_to(position, (cache.length.shape[0], *position.shape))
    keys, values = jax.tree.map(
        lambda x: jnp.swapaxes(x, 1, 2), (cache.key_codes, cache.value_codes)
    )
    keys, values = codec.decode(keys, values, position)
    if cache.outliers is not None:
        at = outlier_slots(cache, keys.shape, turn)
        keys = keys.at[at].set(cache.outliers.key.astype(jnp.float32), mode="drop")
        values = values.at[at].set(cache.outliers.value.astype(jnp.float32), mode="drop")
    return keys, values


def materialize(
    cache: KVCache, codec: Codec | None = None
) -> tuple[Float[Array, "B n H d"], Float[Array, "B n H d"], Bool[Array, "B n"]]:
    """One layer's cache written out: rotated keys, values, and which entries are tokens.

    Order: sinks, ring slots, blocks; attention does not mind. Float32. For tests and for looking
    at what a cache remembers; attention does not need it.
    """
    check_spec(cache, codec)
    firsts, seconds, where = zip(*exact_tokens(cache), strict=True)
    keys, values = (jnp.swapaxes(jnp.concatenate(x, axis=2), 1, 2) for x in (firsts, seconds))
    there = jnp.concatenate(where, axis=1)
    keys, values = (
        jnp.where(there[..., None, None], x, 0).astype(jnp.float32) for x in (keys, values)
    )
    if codec is None:
        return keys, values, there

    def flat(x: Array) -> Array:  # [B, N, b, H, d] -> [B, N b, H, d]
        return x.reshape(x.shape[0], -1, *x.shape[3:])

    old_keys, old_values = map(flat, coded_tokens(cache, codec))
    coded = jnp.arange(old_keys.shape[1]) < _coded(cache.spec, cache.length)[:, None]
    return (
        jnp.concatenate([keys, old_keys], axis=1),
        jnp.concatenate([values, old_values], axis=1),
        jnp.concatenate([there, coded], axis=1),
    )
