"""Decode attention over uniformly rounded caches (int8, KIVI) without writing numbers back out.

The peers of `decode_speed.py`: grids are folded into queries, scores and probabilities, so that the
products take codes as they are, converted to bfloat16 in registers if XLA fuses that. Plain jnp
that XLA compiles, not a kernel by hand; formats are those of `gsrq_jax.baselines.uniform`.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from gsrq_jax.baselines.uniform import Grid, UniformSpec
from gsrq_jax.codec import Codes


def attend(
    query: Float[Array, "B H q d"], key: Codes, value: Codes, spec: UniformSpec
) -> Float[Array, "B H q d"]:
    """Softmax attention over all blocks.

    Args:
        query: scaled, of one token.
        key: codes of the keys, ``[B, H, N, …]`` as `UniformSpec.code_shapes` has them.
        value: of the values, whose groups go along channels.
        spec: of the cache, with codes of 1, 2, 4 or 8 bits.

    Returns:
        In bfloat16.
    """
    scores = (_scores_by_tokens if spec.key.along == "tokens" else _scores_by_channels)(
        query.astype(jnp.bfloat16), key, spec.key
    )
    weights = jax.nn.softmax(scores.reshape(*query.shape[:3], -1), axis=-1)
    return _summed(weights.reshape(scores.shape), value, spec.value)


def _parts(codes: UInt8[Array, "*n bytes"], grid: Grid) -> list[Array]:
    """The first number of each byte, the second, …, in bfloat16."""
    return [
        ((codes >> shift) & (2**grid.bits - 1)).astype(jnp.bfloat16)
        for shift in range(0, 8, grid.bits)
    ]


def _product(equation: str, *arrays: Array) -> Array:
    return jnp.einsum(equation, *arrays, preferred_element_type=jnp.float32)


def _scores_by_tokens(query: Array, key: Codes, grid: Grid) -> Float[Array, "B H q N b"]:
    """Channel c of group g: ``least + width · code``, whose width goes to the query."""
    codes, least, width = key["codes"], key["least"], key["width"]
    batch, heads, n, dim, groups = width.shape
    wide = (query[:, :, :, None, :, None] * width[:, :, None]).astype(jnp.bfloat16)
    codes = codes.reshape(batch, heads, n, dim, groups, -1)
    parts = [_product("BHqNcg,BHNcgy->BHqNgy", wide, x) for x in _parts(codes, grid)]
    scores = jnp.stack(parts, axis=-1).reshape(*query.shape[:3], n, groups, -1)
    scores += _product("BHqc,BHNcg->BHqNg", query, least.astype(jnp.bfloat16))[..., None]
    return scores.reshape(*query.shape[:3], n, -1)


def _scores_by_channels(query: Array, key: Codes, grid: Grid) -> Float[Array, "B H q N b"]:
    """Group g of a token: ``least + width · code``, which goes to the scores."""
    codes, least, width = key["codes"], key["least"], key["width"]
    groups, per = width.shape[-1], 8 // grid.bits
    split = query.reshape(*query.shape[:3], groups, -1, per)
    codes = codes.reshape(*width.shape, -1)
    scores = sum(
        _product("BHqgy,BHNtgy->BHqNtg", split[..., j], x)
        for j, x in enumerate(_parts(codes, grid))
    )
    total = split.sum(axis=(-2, -1), dtype=jnp.float32)[:, :, :, None, None]  # [B, H, q, 1, 1, g]
    return (scores * width[:, :, None] + total * least[:, :, None]).sum(axis=-1)


def _summed(weights: Array, value: Codes, grid: Grid) -> Float[Array, "B H q d"]:
    """Groups along channels: ``Σ p least + Σ (p width) code``."""
    codes, least, width = value["codes"], value["least"], value["width"]
    codes = codes.reshape(*width.shape, -1)  # [B, H, N, b, g, bytes]
    wide = (weights[..., None] * width[:, :, None]).astype(jnp.bfloat16)  # [B, H, q, N, b, g]
    parts = [_product("BHqNtg,BHNtgy->BHqgy", wide, x) for x in _parts(codes, grid)]
    low = _product("BHqNt,BHNtg->BHqg", weights, least.astype(jnp.float32))
    out = jnp.stack(parts, axis=-1) + low[..., None, None]
    return out.reshape(*weights.shape[:3], -1).astype(jnp.bfloat16)
