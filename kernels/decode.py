"""Attention over tiles of codes by whatever can do it here."""

import functools
import warnings
from typing import Any, Literal

from jaxtyping import Array, Float, Int, UInt32

from gsrq_jax.kernels import mosaic_gpu, reference
from gsrq_jax.kernels.errors import InputError

Implementation = Literal["mosaic_gpu", "reference"]


def attend_tiles(
    query: Float[Array, "B T H q d"],
    mean: Float[Array, "H d"] | None,
    inv_freq: Float[Array, " d/2"],
    key_tiles: UInt32[Array, "B H N tiles kw"],
    value_tiles: UInt32[Array, "B H N tiles vw"],
    key_codewords: Float[Array, "H 1 R K d"],
    value_codewords: Float[Array, "H 1 S 16 d"],
    blocks: Int[Array, " B"],
    *,
    first: int | Int[Array, ""] = 0,
    stride: int = 1,
    every: int = 1,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """`gsrq_jax.kernels.reference.attend_tiles`, by the implementation of that name.

    Args:
        query: scaled queries, rotated at their own positions, float32.
        mean: mean key before RoPE; None is one of zeros.
        inv_freq: rotary frequencies.
        key_tiles: see `gsrq_jax.kernels.tiles.keys_to_tiles`.
        value_tiles: see `gsrq_jax.kernels.tiles.values_to_tiles`.
        key_codewords: of this layer.
        value_codewords: of this layer.
        blocks: valid blocks of each sequence; the others are not read.
        first: position of the first token of block 0.
        stride: blocks of the sequence from one of these to the next.
        every: tokens between the knots of `gsrq_jax.kernels.rotary.shift`.
        implementation: ``mosaic_gpu``, the fused kernel, or ``reference``, plain jnp. None takes
            the kernel where it is supported, and else the reference with a warning that says why,
            once for each reason.

    Raises:
        InputError: if the implementation asked for is unknown or does not support this.
    """
    arrays = (query, mean, inv_freq, key_tiles, value_tiles, key_codewords, value_codewords, blocks)
    where: dict[str, Any] = {"first": first, "stride": stride}
    match implementation:
        case "mosaic_gpu":
            return mosaic_gpu.attend_tiles(*arrays, **where, every=every)
        case "reference":
            return reference.attend_tiles(*arrays, **where, every=every)
        case None:
            try:
                mosaic_gpu.check_supported(*arrays, stride=stride, every=every)
            except InputError as error:
                _say(str(error))
                return reference.attend_tiles(*arrays, **where, every=every)
            return mosaic_gpu.attend_tiles(*arrays, **where, every=every)
    raise InputError(
        f"unknown implementation {implementation!r}; choose 'mosaic_gpu' or 'reference'"
    )


@functools.cache
def _say(reason: str) -> None:
    warnings.warn(f"{reason} (the reference is used)", stacklevel=3)
