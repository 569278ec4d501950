"""Codes of fewer than eight bits as a dense stream of bytes."""

import jax.numpy as jnp
from jaxtyping import Array, UInt8

from gsrq_jax.errors import InputError


def pack(codes: UInt8[Array, "*lead n"], bits: int) -> UInt8[Array, "*lead bytes"]:
    """Codes as one little-endian bit stream a row, ``ceil(n·bits/8)`` bytes.

    Code ``i`` takes bits ``i·bits`` to ``(i + 1)·bits − 1`` of the stream, lowest bit first; what a
    code has above ``bits`` bits is dropped, and the last byte is filled up with zeros.

    Args:
        codes: ``[*lead, n]`` uint8, each below ``2**bits``.
        bits: bits of a code, 1 to 8, static.

    Returns:
        ``[*lead, ceil(n·bits/8)]`` uint8.

    Raises:
        InputError: if ``bits`` is out of range or the codes are not uint8.
    """
    _check(codes, bits)
    if bits == 8:
        return codes
    stream = jnp.unpackbits(codes[..., None], axis=-1, count=bits, bitorder="little")
    stream = stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    return jnp.packbits(stream, axis=-1, bitorder="little")


def unpack(packed: UInt8[Array, "*lead bytes"], n: int, bits: int) -> UInt8[Array, "*lead n"]:
    """The ``n`` codes of each row that ``pack`` wrote.

    Args:
        packed: ``[*lead, ceil(n·bits/8)]`` uint8.
        n: codes of a row, static.
        bits: bits of a code, 1 to 8, static.

    Returns:
        ``[*lead, n]`` uint8.

    Raises:
        InputError: if ``bits`` is out of range, or the rows are not as long as ``n`` codes take.
    """
    _check(packed, bits)
    length = -(-n * bits // 8)
    if packed.shape[-1] != length:
        raise InputError(
            f"{n} codes of {bits} bits take {length} bytes, but the rows have "
            f"{packed.shape[-1]}; give the n and bits that they were packed with"
        )
    if bits == 8:
        return packed
    stream = jnp.unpackbits(packed, axis=-1, count=n * bits, bitorder="little")
    stream = stream.reshape(*packed.shape[:-1], n, bits)
    return jnp.packbits(stream, axis=-1, bitorder="little")[..., 0]


def _check(array: Array, bits: int) -> None:
    if not 1 <= bits <= 8:
        raise InputError(f"a code has 1 to 8 bits, got bits={bits}")
    if array.dtype != jnp.uint8:
        raise InputError(f"codes are uint8, got {array.dtype}; convert them first")
