"""A cache on a mesh: KV heads over one axis of devices, coded blocks over the other (ours).

`gsrq_jax.attention` and `gsrq_jax.cache` with ``axis_name`` are what each device does; here they
are mapped over a mesh, for code that is not. Of a sequence's blocks each device along ``data`` has
every n-th of n (`gsrq_jax.cache.Turn`): a context that grows gives all of them as much to read at
any length, where contiguous ranges would fill one device after the other. Which device has a block
changes nothing but that. Sinks, window and outliers are on all of them; a new block is encoded by
the one that has it. What devices exchange in a step is one softmax's worth a query: output,
log-sum-exp and maximum. No codes, codebooks, keys or values.

Shapes: as in `gsrq_jax.cache`; B sequences are on all devices.
"""

import dataclasses
import functools
from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int

from gsrq_jax import attention
from gsrq_jax import cache as single
from gsrq_jax.cache import KVCache, new_tokens, outliers_kept
from gsrq_jax.calibration import DATA, MODEL
from gsrq_jax.codebook import Codebooks
from gsrq_jax.codec import Codec
from gsrq_jax.errors import InputError
from gsrq_jax.spec import CacheSpec

VECTORS = P(None, None, MODEL)
"""Axes of queries, keys and values ``[B, T, heads, d]``."""


def cache_axes(spec: CacheSpec | None, *, stacked: bool) -> KVCache:
    """The axes of a cache's arrays, as a prefix of its pytree.

    Args:
        spec: of the cache.
        stacked: whether it is one of all layers.
    """
    lead = (None,) if stacked else ()
    exact: Any = P(*lead, None, MODEL)
    codes: Any = P(*lead, None, MODEL, DATA)
    everywhere: Any = P()
    return KVCache(
        sink_key=exact,
        sink_value=exact,
        window_key=exact,
        window_value=exact,
        key_codes=codes,
        value_codes=codes,
        length=everywhere,
        outliers=exact if outliers_kept(spec) else None,
        spec=spec,
    )


def codec_axes(codec: Codec | None, *, stacked: bool) -> Any:
    """The axes of a codec's arrays: heads are spread, everything else is on all devices.

    Raises:
        InputError: for a codec whose arrays it does not know.
    """
    if isinstance(codec, Codebooks):
        heads: Any = P(*((None,) if stacked else ()), MODEL)
        everywhere: Any = P()
        return dataclasses.replace(
            codec,
            key=heads,
            value=heads,
            key_mean=heads,
            inv_freq=everywhere,
            key_metric=None if codec.key_metric is None else heads,
            value_metric=None if codec.value_metric is None else heads,
        )
    if jax.tree.leaves(codec):
        raise InputError(
            f"a cache of {type(codec).__name__} cannot be spread over devices; use codebooks, or "
            "one device"
        )
    return codec


def init_cache(
    mesh: Mesh, spec: CacheSpec | None, *, kv_heads: int, layers: int | None = None, **sizes: Any
) -> KVCache:
    """`gsrq_jax.cache.init_cache`, every array made where it lives.

    There is room for a multiple of the mesh's ``data`` in blocks.

    Raises:
        InputError: as that does, or if devices cannot share the heads evenly.
    """
    devices = mesh.shape[MODEL]
    if kv_heads % devices:
        raise InputError(
            f"{kv_heads} KV heads cannot be shared evenly by {devices} devices along {MODEL}"
        )
    part = functools.partial(
        single.init_cache,
        spec,
        kv_heads=kv_heads // devices,
        layers=layers,
        axis_name=DATA,
        **sizes,
    )
    axes = cache_axes(spec, stacked=layers is not None)
    return jax.jit(jax.shard_map(part, mesh=mesh, in_specs=(), out_specs=axes))()


def attend(
    mesh: Mesh,
    q: Float[Array, "B T Q d"],
    k: Float[Array, "B T H d"],
    v: Float[Array, "B T H d"],
    cache: KVCache,
    codec: Codec | None = None,
    count: Int[ArrayLike, " B"] | None = None,
    **options: Any,
) -> Float[Array, "B T Q d"]:
    """`gsrq_jax.attention.attend` over one layer of a cache of `init_cache`'s kind."""
    part: Any = functools.partial(attention.attend, axis_name=DATA, **options)
    mapped = jax.shard_map(
        part,
        mesh=mesh,
        in_specs=(
            *(VECTORS,) * 3,
            cache_axes(cache.spec, stacked=False),
            codec_axes(codec, stacked=False),
            P(),
        ),
        out_specs=VECTORS,
    )
    return mapped(q, k, v, cache, codec, new_tokens(count, *k.shape[-4:-2]))


def causal(
    mesh: Mesh,
    q: Float[Array, "B T Q d"],
    k: Float[Array, "B T H d"],
    v: Float[Array, "B T H d"],
) -> Float[Array, "B T Q d"]:
    """`gsrq_jax.attention.causal`, heads spread."""
    mapped = jax.shard_map(attention.causal, mesh=mesh, in_specs=(VECTORS,) * 3, out_specs=VECTORS)
    return mapped(q, k, v)


def append(
    mesh: Mesh,
    cache: KVCache,
    k: Float[Array, "*L B T H d"],
    v: Float[Array, "*L B T H d"],
    codec: Codec | None = None,
    count: Int[ArrayLike, " B"] | None = None,
) -> KVCache:
    """`gsrq_jax.cache.append` to a cache of `init_cache`'s kind; growth is the caller's to check.

    Donate the cache under ``jit``.
    """
    stacked = cache.length.ndim == 2
    axes = cache_axes(cache.spec, stacked=stacked)
    vectors = P(*(None,) * stacked, *VECTORS)
    mapped = jax.shard_map(
        functools.partial(single.append, axis_name=DATA),
        mesh=mesh,
        in_specs=(axes, vectors, vectors, codec_axes(codec, stacked=stacked), P()),
        out_specs=axes,
    )
    return mapped(cache, k, v, codec, new_tokens(count, *k.shape[-4:-2]))
