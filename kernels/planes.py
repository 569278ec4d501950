"""Codes of two codewords a stage as bit planes: tiles of 32 tokens, stages in units of 32.

A pure function each way. A block of ``b`` tokens is ``b / TILE`` tiles, one after the other, each a
row of as many words of 32 bits as there are stages, the words of a unit together. No more bits than
codes have. All of it is ours.
"""

import jax.numpy as jnp
from jaxtyping import Array, UInt8, UInt32

from gsrq_jax.kernels.errors import InputError

TILE = 32
"""Tokens of a tile."""
UNIT = 32
"""Stages of a unit."""


def keys_to_planes(bits: UInt8[Array, "*lead b R"]) -> UInt32[Array, "*lead b/32 R"]:
    """Put keys into words of one token: ``[units, TILE]`` a tile.

    Bit ``i`` of word ``(unit, t)`` is the code of stage ``UNIT·unit + i`` of token ``t``.

    Args:
        bits: codeword indices, 0 or 1.

    Raises:
        InputError: if ``b`` or ``R`` is not a multiple of 32.
    """
    words = _joined(_tiled(bits).reshape(*bits.shape[:-2], -1, TILE, bits.shape[-1] // UNIT, UNIT))
    return jnp.swapaxes(words, -1, -2).reshape(*words.shape[:-2], -1)


def keys_from_planes(words: UInt32[Array, "*lead tiles R"]) -> UInt8[Array, "*lead 32*tiles R"]:
    """Take the codes out again: the inverse of `keys_to_planes`."""
    *lead, count, stages = words.shape
    by_token = jnp.swapaxes(words.reshape(*lead, count, stages // UNIT, TILE), -1, -2)
    return _apart(by_token).reshape(*lead, count * TILE, stages)


def values_to_planes(bits: UInt8[Array, "*lead b R"]) -> UInt32[Array, "*lead b/32 R"]:
    """Put values into words of one stage: bit ``t`` of word ``r`` is that of token ``t``.

    Args:
        bits: codeword indices, 0 or 1.

    Raises:
        InputError: if ``b`` or ``R`` is not a multiple of 32.
    """
    return _joined(jnp.swapaxes(_tiled(bits), -1, -2))


def values_from_planes(words: UInt32[Array, "*lead tiles R"]) -> UInt8[Array, "*lead 32*tiles R"]:
    """Take the codes out again: the inverse of `values_to_planes`."""
    *lead, count, stages = words.shape
    return jnp.swapaxes(_apart(words), -1, -2).reshape(*lead, count * TILE, stages)


def _tiled(bits: Array) -> Array:
    *lead, tokens, stages = bits.shape
    if tokens % TILE:
        raise InputError(f"blocks of {tokens} tokens are not whole tiles of {TILE}")
    if stages % UNIT:
        raise InputError(f"{stages} stages are not whole words of {UNIT}")
    return bits.reshape(*lead, tokens // TILE, TILE, stages)


def _joined(bits: Array) -> Array:
    """``[..., 32]`` bits to words."""
    place = jnp.arange(32, dtype=jnp.uint32)
    return ((bits.astype(jnp.uint32) & 1) << place).sum(axis=-1, dtype=jnp.uint32)


def _apart(words: Array) -> Array:
    """The inverse of `_joined`."""
    return ((words[..., None] >> jnp.arange(32, dtype=jnp.uint32)) & 1).astype(jnp.uint8)
