"""Codes of 1 to 16 bits as a dense stream of bytes."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, UInt, UInt8

from gsrq_jax.errors import InputError


def code_dtype(bits: int) -> jnp.dtype:
    """The type of unpacked codes: uint8 for codes of up to 8 bits, uint16 for longer ones."""
    return jnp.dtype(jnp.uint8 if bits <= 8 else jnp.uint16)


def pack(codes: UInt[Array, "*lead n"], bits: int) -> UInt8[Array, "*lead bytes"]:
    """Codes as one little-endian bit stream a row, ``ceil(n·bits/8)`` bytes.

    Code ``i`` takes bits ``i·bits`` to ``(i + 1)·bits − 1`` of the stream, lowest bit first; what a
    code has above ``bits`` bits is dropped, and the last byte is filled up with zeros.

    Args:
        codes: ``[*lead, n]`` of `code_dtype`, each below ``2**bits``.
        bits: bits of a code, 1 to 16, static.

    Returns:
        ``[*lead, ceil(n·bits/8)]`` uint8.

    Raises:
        InputError: if ``bits`` is out of range or the codes are of another type.
    """
    _check(codes, bits, code_dtype(bits))
    if bits == 8:
        return codes
    octets = jax.lax.bitcast_convert_type(codes, jnp.uint8).reshape(*codes.shape, -1)
    stream = jnp.unpackbits(octets, axis=-1, count=bits, bitorder="little")
    stream = stream.reshape(*codes.shape[:-1], codes.shape[-1] * bits)
    return jnp.packbits(stream, axis=-1, bitorder="little")


def unpack(packed: UInt8[Array, "*lead bytes"], n: int, bits: int) -> UInt[Array, "*lead n"]:
    """The ``n`` codes of each row that ``pack`` wrote.

    Args:
        packed: ``[*lead, ceil(n·bits/8)]`` uint8.
        n: codes of a row, static.
        bits: bits of a code, 1 to 16, static.

    Returns:
        ``[*lead, n]`` of `code_dtype`.

    Raises:
        InputError: if ``bits`` is out of range, or the rows are not as long as ``n`` codes take.
    """
    _check(packed, bits, jnp.dtype(jnp.uint8))
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
    octets = jnp.packbits(stream, axis=-1, bitorder="little")
    if bits < 8:
        return octets[..., 0]
    return jax.lax.bitcast_convert_type(octets, jnp.uint16)


def _check(array: Array, bits: int, dtype: jnp.dtype) -> None:
    if not 1 <= bits <= 16:
        raise InputError(f"a code has 1 to 16 bits, got bits={bits}")
    if array.dtype != dtype:
        raise InputError(f"{dtype.name} is needed here, got {array.dtype}; convert it first")
