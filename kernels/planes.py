"""How the GPU kernel stores codes of one bit a stage: tiles of 32 tokens as words of 32 bits.

A tile of R stages has R words. The words lie as the tensor cores' operands do, so that a warp
multiplies them without rearranging a bit. Pure functions, both ways, in plain jnp; a cache in this
layout is moved, sharded and saved like any other array.

Below, lane ``4 g + t`` (g < 8, t < 4) is the one of a warp that reads a word.
"""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, UInt8, UInt32

from gsrq_jax.kernels.errors import InputError

TILE = 32
"""Tokens of a tile."""
UNIT = 32
"""Stages are a multiple of this."""
STEP = 128
"""Stages of keys that one product takes."""
SPAN = 64
"""Stages of values that a lane's two words have."""


def check_stages(stages: int, what: str) -> None:
    """Refuse a number of stages that is not whole words.

    Args:
        stages: of a code.
        what: the side that has them, for the message: ``keys`` or ``values``.

    Raises:
        InputError: if there are none, or not a multiple of `UNIT`.
    """
    if stages < UNIT or stages % UNIT:
        raise InputError(
            f"{what} of {stages} stages are not whole words: choose a multiple of {UNIT}"
        )


def keys_to_planes(bits: UInt8[Array, "*lead b R"]) -> UInt32[Array, "*lead tiles R"]:
    """Store keys in steps of up to `STEP` stages.

    In step s, of ``n = min(4, R / 32 − 4 s)`` words a token, word ``128 s + 4 (n g + t) + w`` is
    of token ``8 w + g``. Its bit i is stage ``128 s + 32 t + i``. Ours.

    Args:
        bits: 0 or 1; ``b`` a multiple of `TILE`, R of `UNIT`.

    Raises:
        InputError: if ``b`` or R does not fit.
    """
    *lead, _, stages = bits.shape
    tiles = _tiles(bits, "keys")
    # Token 8 w + g, word of it, bit.
    split = bits.reshape(*lead, tiles, 4, 8, stages // 32, 32)
    words = jnp.moveaxis(_packed(split, 32), -3, -1)  # [g, word, w]
    return jnp.concatenate(
        [
            lax.collapse(words[..., first : first + 4, :], len(lead) + 1)
            for first in range(0, stages // 32, 4)
        ],
        axis=-1,
    )


def keys_from_planes(words: UInt32[Array, "*lead tiles R"]) -> UInt8[Array, "*lead b R"]:
    """Invert `keys_to_planes`."""
    *lead, tiles, stages = words.shape
    check_stages(stages, "keys")
    steps = []
    for first in range(0, stages, STEP):
        count = min(STEP, stages - first) // 32
        step = words[..., first : first + STEP].reshape(*lead, tiles, 8, count, 4)  # [g, t, w]
        steps.append(jnp.moveaxis(step, -1, -3))
    bits = _bit(jnp.concatenate(steps, axis=-1)[..., None], jnp.arange(32, dtype=jnp.uint32))
    return bits.reshape(*lead, tiles * TILE, stages)


def values_to_planes(bits: UInt8[Array, "*lead b R"]) -> UInt32[Array, "*lead tiles R"]:
    """Store values in spans of `SPAN` stages, and a last one of 32 if R is an odd number of 32.

    In span m, bit ``8 j + i`` of word ``64 m + 2 (4 g + t) + k`` is stage ``64 m + 8 i + g`` of
    token ``8 j + 4 k + t``. In a last span of 32 stages, bit ``8 j + 4 k + i`` of word ``64 m +
    4 g + t`` is this stage of this token. Ours.

    Args:
        bits: 0 or 1; ``b`` a multiple of `TILE`, R of `UNIT`.

    Raises:
        InputError: if ``b`` or R does not fit.
    """
    *lead, _, stages = bits.shape
    tiles = _tiles(bits, "values")
    bits = bits.reshape(*lead, tiles, 4, 2, 4, stages)  # [j, k, t, stages]
    whole, end = divmod(stages, SPAN)
    axes = len(lead) + 1
    parts = []
    if whole:
        split = bits[..., : whole * SPAN].reshape(*lead, tiles, 4, 2, 4, whole, 8, 8)
        words = _packed(_moved(split, axes, "jktmig", "mgtkji"), 8, 4)
        parts.append(words.reshape(*lead, tiles, whole * SPAN))
    if end:
        split = bits[..., whole * SPAN :].reshape(*lead, tiles, 4, 2, 4, 4, 8)
        split = _moved(split, axes, "jktig", "gtjki").reshape(*lead, tiles, 8, 4, 4, 8)
        parts.append(_packed(split, 8, 4).reshape(*lead, tiles, 32))
    return jnp.concatenate(parts, axis=-1)


def values_from_planes(words: UInt32[Array, "*lead tiles R"]) -> UInt8[Array, "*lead b R"]:
    """Invert `values_to_planes`."""
    *lead, tiles, stages = words.shape
    check_stages(stages, "values")
    whole, end = divmod(stages, SPAN)
    axes = len(lead) + 1
    place = jnp.arange(4, dtype=jnp.uint32)[:, None] * 8 + jnp.arange(8, dtype=jnp.uint32)
    parts = []
    if whole:
        split = words[..., : whole * SPAN].reshape(*lead, tiles, whole, 8, 4, 2)
        bits = _bit(split[..., None, None], place)
        bits = _moved(bits, axes, "mgtkji", "jktmig")
        parts.append(bits.reshape(*lead, tiles * TILE, whole * SPAN))
    if end:
        split = words[..., whole * SPAN :].reshape(*lead, tiles, 8, 4)
        bits = _bit(split[..., None, None], place).reshape(*lead, tiles, 8, 4, 4, 2, 4)
        bits = _moved(bits, axes, "gtjki", "jktig")
        parts.append(bits.reshape(*lead, tiles * TILE, 32))
    return jnp.concatenate(parts, axis=-1)


def _tiles(bits: Array, what: str) -> int:
    """Tiles of a block."""
    *_, tokens, stages = bits.shape
    if tokens % TILE:
        raise InputError(
            f"blocks of {tokens} tokens are not whole tiles: choose a multiple of {TILE}"
        )
    check_stages(stages, what)
    return tokens // TILE


def _packed(bits: Array, *sizes: int) -> Array:
    """Words of the bits of the last axes, of these sizes from the last one; 32 in all."""
    bits = bits.reshape(*bits.shape[: -len(sizes)], 32).astype(jnp.uint32)
    return (bits << jnp.arange(32, dtype=jnp.uint32)).sum(axis=-1, dtype=jnp.uint32)


def _bit(words: Array, place: Array) -> Array:
    return ((words >> place) & 1).astype(jnp.uint8)


def _moved(x: Array, lead: int, old: str, new: str) -> Array:
    """Axes after the first ``lead``, which have one letter each, in a new order."""
    return jnp.transpose(x, (*range(lead), *(lead + old.index(letter) for letter in new)))
