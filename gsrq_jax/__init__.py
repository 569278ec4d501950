"""Gain-shape residual quantization of key-value caches in JAX.

The functions that a model needs are here; `gsrq_jax.models` holds a Flax LLaMA that uses them and
is not imported with this package.
"""

from gsrq_jax.attention import attend, attend_as_cached, causal
from gsrq_jax.cache import (
    KVCache,
    append,
    init_cache,
    layer_views,
    materialize,
    stack_layers,
)
from gsrq_jax.codebook import Codebooks
from gsrq_jax.errors import InputError
from gsrq_jax.residual import decode, encode, fit
from gsrq_jax.spec import QuantSpec, ResidualSpec

__all__ = [
    "Codebooks",
    "InputError",
    "KVCache",
    "QuantSpec",
    "ResidualSpec",
    "append",
    "attend",
    "attend_as_cached",
    "causal",
    "decode",
    "encode",
    "fit",
    "init_cache",
    "layer_views",
    "materialize",
    "stack_layers",
]
