"""Codes as the fused kernel reads them: tiles of 128 tokens, keys by bank, values as bit planes.

A pure function each way, so that the reference reads the same cache. A block of ``b`` tokens is
``b / TILE`` tiles, one after the other, each a row of 32-bit words. As many bits as codes have, but
for keys whose tokens do not fill 16 bits each (see `key_words`). All of it is ours.

Keys are looked up in tables whose entries lie side by side, stage by stage; lanes that looked up
the same stage at the same time would meet in one memory bank. So the codes of a token are stored in
an order of its own: the stages are cut into *strips* of 16 and then 8, 4, 2, 1, and step ``s`` of
token ``t`` in a strip of ``w`` stages is its stage ``s ^ (t mod w)``: at every step, 16
consecutive tokens look up 16 different stages (or copies of them, where the strip is narrower).

Values are summed by matrix products over single bits, whose operand is 32 tokens of one bit of the
codes of one stage: that is the word that is stored.
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8, UInt32

from gsrq_jax.kernels.errors import InputError

TILE = 128
"""Tokens of a tile: four groups of 32, one token a lane."""
STRIP = 16
"""Stages of the widest strip: 16 entries of 8 bytes are all 32 banks once."""
PLANES = 4
"""Bits of a value code."""


def strips(stages: int) -> tuple[tuple[int, int], ...]:
    """``(first stage, stages)`` of each strip: 16s, then the binary digits of what is left."""
    widths = [STRIP] * (stages // STRIP)
    widths += [1 << i for i in reversed(range(4)) if stages % STRIP >> i & 1]
    return tuple((sum(widths[:i]), w) for i, w in enumerate(widths))


def key_bits(codewords: int) -> int:
    """Bits of a key code: 4 or 8.

    Raises:
        InputError: for any other number of codewords.
    """
    if codewords not in (16, 256):
        raise InputError(
            f"the kernel's layout is for keys of 16 or 256 codewords a stage, got {codewords}"
        )
    return codewords.bit_length() - 1


def key_unit(stages: int, codewords: int) -> tuple[int, int]:
    """``(units, bits)``: a token's codes are so many words of 32 bits, or of 16 if those fit."""
    bits = stages * key_bits(codewords)
    return (bits // 32, 32) if bits % 32 == 0 else (-(-bits // 16), 16)


def key_words(stages: int, codewords: int) -> int:
    """Words of a tile of keys."""
    units, bits = key_unit(stages, codewords)
    return units * bits * TILE // 32


def value_words(stages: int) -> int:
    """Words of a tile of values."""
    return stages * PLANES * TILE // 32


def _step_to_stage(stages: int) -> np.ndarray:
    """``[TILE, stages]``: the stage that each token has at each step."""
    token = np.arange(TILE)[:, None]
    return np.concatenate(
        [first + (np.arange(w) ^ (token & (w - 1))) for first, w in strips(stages)], axis=1
    )


def keys_to_tiles(
    codes: UInt8[Array, "*lead b R"], codewords: int
) -> UInt32[Array, "*lead tiles words"]:
    """Keys in the kernel's order: ``[units, TILE]`` a tile, unit ``u`` of all tokens together.

    The nibbles or bytes of a token, step by step, fill its units from the lowest bits up.

    Args:
        codes: codeword indices, whole heads; ``b`` a multiple of `TILE`.
        codewords: of a stage, 16 or 256, static.

    Raises:
        InputError: if ``b`` or ``codewords`` do not fit.
    """
    *lead, tokens, stages = codes.shape
    bits = key_bits(codewords)
    units, width = key_unit(stages, codewords)
    tiled = _tiled(codes)
    order = jnp.broadcast_to(_step_to_stage(stages), tiled.shape)
    steps = jnp.take_along_axis(tiled, order, axis=-1)
    steps = jnp.pad(steps, [(0, 0)] * (steps.ndim - 1) + [(0, units * width // bits - stages)])
    steps = steps.reshape(*lead, -1, TILE, units, width // bits).astype(jnp.uint32)
    place = jnp.arange(width // bits, dtype=jnp.uint32) * bits
    filled = jnp.swapaxes((steps << place).sum(axis=-1, dtype=jnp.uint32), -1, -2)
    return _words(filled, width).reshape(*lead, tokens // TILE, key_words(stages, codewords))


def keys_from_tiles(
    words: UInt32[Array, "*lead tiles words"], stages: int, codewords: int
) -> UInt8[Array, "*lead b R"]:
    """The inverse of `keys_to_tiles`."""
    *lead, tiles, _ = words.shape
    bits = key_bits(codewords)
    units, width = key_unit(stages, codewords)
    filled = words[..., None] >> (jnp.arange(32 // width, dtype=jnp.uint32) * width)
    filled = jnp.swapaxes(filled.reshape(*lead, tiles, units, TILE), -1, -2)
    place = jnp.arange(width // bits, dtype=jnp.uint32) * bits
    steps = (filled[..., None] >> place) & (codewords - 1)
    steps = steps.reshape(*lead, tiles, TILE, -1)[..., :stages].astype(jnp.uint8)
    inverse = jnp.broadcast_to(np.argsort(_step_to_stage(stages), axis=-1), steps.shape)
    codes = jnp.take_along_axis(steps, inverse, axis=-1)
    return codes.reshape(*lead, tiles * TILE, stages)


def values_to_tiles(codes: UInt8[Array, "*lead b R"]) -> UInt32[Array, "*lead tiles words"]:
    """Values in the kernel's order: ``[R, 4, PLANES]`` a tile.

    Bit ``i`` of word ``(r, q, p)`` is bit ``p`` of the code of stage ``r`` of token ``32 q + i``.

    Args:
        codes: codeword indices below 16, whole heads; ``b`` a multiple of `TILE`.

    Raises:
        InputError: if ``b`` does not fit.
    """
    *lead, tokens, stages = codes.shape
    tiled = _tiled(codes).reshape(*lead, tokens // TILE, 4, 32, stages)
    bits = (tiled[..., None] >> jnp.arange(PLANES, dtype=jnp.uint8)) & 1
    place = jnp.arange(32, dtype=jnp.uint32)[:, None, None]
    words = (bits.astype(jnp.uint32) << place).sum(axis=-3, dtype=jnp.uint32)  # [4, R, PLANES]
    return jnp.swapaxes(words, -3, -2).reshape(*lead, tokens // TILE, value_words(stages))


def values_from_tiles(
    words: UInt32[Array, "*lead tiles words"], stages: int
) -> UInt8[Array, "*lead b R"]:
    """The inverse of `values_to_tiles`."""
    *lead, tiles, _ = words.shape
    planes = jnp.swapaxes(words.reshape(*lead, tiles, stages, 4, PLANES), -3, -2)
    bits = (planes[..., None, :, :] >> jnp.arange(32, dtype=jnp.uint32)[:, None, None]) & 1
    codes = (bits << jnp.arange(PLANES, dtype=jnp.uint32)).sum(axis=-1).astype(jnp.uint8)
    return codes.reshape(*lead, tiles * TILE, stages)


def _tiled(codes: Array) -> Array:
    *lead, tokens, stages = codes.shape
    if tokens % TILE:
        raise InputError(f"blocks of {tokens} tokens are not whole tiles of {TILE}")
    return codes.reshape(*lead, tokens // TILE, TILE, stages)


def _words(units: Array, width: int) -> Array:
    """``[..., units, TILE]`` of 32 or 16 bits each to words, the lower token in the lower bits."""
    pairs = units.reshape(*units.shape[:-1], TILE * width // 32, 32 // width)
    place = jnp.arange(32 // width, dtype=jnp.uint32) * width
    return (pairs << place).sum(axis=-1, dtype=jnp.uint32)
