"""Codes as the fused TPU kernel reads them: eight of a token in a word, tokens in lanes.

A pure function each way, so that the reference reads the same cache. A block of ``b`` tokens is
``b / 128 · W`` rows of 128 words, W words a token: those of 128 tokens follow each other. As many
bytes as codes have, if they are a multiple of 8. All of it is ours.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int32, UInt8

from gsrq_jax.kernels.errors import InputError

LANES = 128
"""Tokens of a row."""
PER_WORD = 8
"""Codes in one word."""
CODEWORDS = 16
"""That a code may choose from."""


def words_of(codes: int) -> int:
    """Words of a token that has so many codes."""
    return -(-codes // PER_WORD)


def to_words(codes: UInt8[Array, "*lead b G R"]) -> Int32[Array, "*lead rows 128"]:
    """Codes of 4 bits in the kernel's order.

    Row ``run·W + word`` has the tokens ``128·run + lane``; code ``8·word + i`` of the G·R takes
    bits ``4·i`` to ``4·i + 3``. What a code has above 4 bits is dropped, and codes that fill up
    the last word are 0.

    Raises:
        InputError: if ``b`` is not a multiple of 128.
    """
    *lead, b, G, R = codes.shape
    if b % LANES:
        raise InputError(f"blocks of {b} tokens are not whole rows of {LANES}")
    count = words_of(G * R)
    flat = codes.reshape(*lead, b, G * R) & 15
    flat = jnp.pad(flat, [(0, 0)] * (flat.ndim - 1) + [(0, count * PER_WORD - G * R)])
    flat = flat.reshape(*lead, -1, LANES, count, PER_WORD).astype(jnp.uint32)
    packed = jnp.sum(flat << _shifts(), axis=-1, dtype=jnp.uint32)
    rows = jnp.swapaxes(packed, -1, -2).reshape(*lead, -1, LANES)
    return jax.lax.bitcast_convert_type(rows, jnp.int32)


def from_words(
    words: Int32[Array, "*lead rows 128"], groups: int, stages: int
) -> UInt8[Array, "*lead b G R"]:
    """The inverse of `to_words`."""
    *lead, _, _ = words.shape
    count = words_of(groups * stages)
    packed = jax.lax.bitcast_convert_type(words, jnp.uint32)
    packed = jnp.swapaxes(packed.reshape(*lead, -1, count, LANES), -1, -2)
    codes = ((packed[..., None] >> _shifts()) & 15).astype(jnp.uint8)
    codes = codes.reshape(*lead, -1, count * PER_WORD)[..., : groups * stages]
    return codes.reshape(*lead, -1, groups, stages)


def _shifts() -> Array:
    return 4 * jnp.arange(PER_WORD, dtype=jnp.uint32)
