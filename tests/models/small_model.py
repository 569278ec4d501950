"""A model small enough to be recomputed at every step, and what a cache must make of it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

from gsrq_jax.codebook import Codebooks
from gsrq_jax.models import llama
from gsrq_jax.models.config import LlamaConfig
from gsrq_jax.spec import QuantSpec

CONFIG = LlamaConfig(
    family="llama",
    vocab_size=61,
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_length=128,
    rope_theta=100.0,
)
SPEC = QuantSpec.from_bits(1, CONFIG.head_dim, codewords=16, block=8, window=8, sinks=2)


@functools.cache
def model(config: LlamaConfig = CONFIG):
    """Graph and float32 parameters, with queries and keys sharp enough for the past to matter."""
    graphdef, shapes = llama.abstract(config)
    rng = np.random.default_rng(0)

    def draw(path, shape):
        name, x = jax.tree_util.keystr(path), rng.standard_normal(shape.shape)
        if "norm" in name:
            return jnp.asarray(1 + 0.1 * x, jnp.float32)
        if "embed" in name:
            return jnp.asarray(x, jnp.float32)
        sharp = 1.5 if "q_proj" in name or "k_proj" in name else 1
        return jnp.asarray(sharp * x / shape.shape[-2] ** 0.5, jnp.float32)

    return graphdef, jax.tree_util.tree_map_with_path(draw, shapes)


def codebooks(spec: QuantSpec = SPEC, seed: int = 1, config: LlamaConfig = CONFIG) -> Codebooks:
    """Codewords drawn at the size of keys and values: coarse, so that codes are seen to be used."""
    rng = np.random.default_rng(seed)
    lead = (config.layers, config.kv_heads)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(*lead, *shape)), jnp.float32)

    return Codebooks(
        key=normal(*spec.key.codebook_shape),
        value=normal(*spec.value.codebook_shape),
        key_mean=normal(config.head_dim),
        inv_freq=jnp.broadcast_to(config.inv_freq, (config.layers, config.head_dim // 2)),
        spec=spec,
    )


@functools.partial(jax.jit, static_argnames="every")
def read_through_cache(params, tokens, held, codebooks, *, every=None):
    """The whole sequence in one pass, each query over the T × T keys that a cache shows it.

    Args:
        params: of `model`.
        tokens: ``[B, T]``.
        held: ``[B, T]``, tokens that were in the cache when token i was read: i where it was
            decoded, 0 where it was part of the first prompt.
        codebooks: stacked; None for a cache at full precision.
        every: tokens coded at a time if not a block.

    Returns:
        Logits ``[B, T, V]``; keys and values ``[L, B, T, H, d]`` as they were given to the cache.
    """
    position = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    def attention(q, k, v, books):
        group = q.shape[2] // k.shape[2]
        new, old = (k, v), (k, v)
        coded = jnp.zeros((*tokens.shape, tokens.shape[1]), bool)
        if books is not None:
            spec = books.spec
            old = books.decode(*books.encode(k, v, position), position)
            block = spec.block if every is None else every
            past = jnp.maximum(held - spec.sinks - spec.window, 0) // block * block
            key = jnp.arange(tokens.shape[1])
            coded = (key >= spec.sinks) & (key < spec.sinks + past[..., None])
        (new_k, new_v), (old_k, old_v) = (
            [jnp.repeat(x, group, axis=2) for x in pair] for pair in (new, old)
        )
        coded = coded[:, None]
        scores = jnp.where(
            coded,
            jnp.einsum("biqd,bjqd->bqij", q, old_k),
            jnp.einsum("biqd,bjqd->bqij", q, new_k),
        ) / np.sqrt(q.shape[-1])
        scores = jnp.where(position[:, None, :, None] >= position[:, None, None], scores, -jnp.inf)
        weights = jax.nn.softmax(scores, axis=-1)
        out = jnp.einsum("bqij,bjqd->biqd", weights * coded, old_v)
        out += jnp.einsum("bqij,bjqd->biqd", weights * ~coded, new_v)
        return out, (k, v)

    graphdef, _ = model()
    hidden, kv = llama.apply(graphdef, params, tokens, position, attention, codebooks)
    return llama.logits(graphdef, params, hidden), kv
