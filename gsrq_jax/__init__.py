"""Gain-shape residual quantization of key-value caches in JAX.

What a model needs is here: `fit_layer` learns codebooks; `init_cache`, `append` and `attend` are
the cache; `attend_as_cached` shows what it costs. Of the modules `codebook` saves and loads,
`distill` refines, `sharded` is the cache on a mesh; to be imported by name are `calibration` (many
layers, more samples than memory), `residual` and `kmeans` (codes of any vectors), `baselines` (the
peers). `gsrq_jax.models` holds a Flax LLaMA that uses all this.
"""

from gsrq_jax import codebook, distill, sharded
from gsrq_jax.attention import attend, attend_as_cached, causal
from gsrq_jax.cache import (
    KVCache,
    append,
    init_cache,
    layer_views,
    materialize,
    stack_layers,
)
from gsrq_jax.calibration import FitOptions, fit_layer
from gsrq_jax.codebook import Codebooks
from gsrq_jax.codec import respec
from gsrq_jax.errors import InputError
from gsrq_jax.residual import decode, encode, fit
from gsrq_jax.spec import QuantSpec, ResidualSpec

__all__ = [
    "Codebooks",
    "FitOptions",
    "InputError",
    "KVCache",
    "QuantSpec",
    "ResidualSpec",
    "append",
    "attend",
    "attend_as_cached",
    "causal",
    "codebook",
    "decode",
    "distill",
    "encode",
    "fit",
    "fit_layer",
    "init_cache",
    "layer_views",
    "materialize",
    "respec",
    "sharded",
    "stack_layers",
]
