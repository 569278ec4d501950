"""Attention over tiles of codes by whatever can do it here."""

import functools
import warnings
from typing import Literal

from jaxtyping import Array, Float, Int, UInt32

from gsrq_jax.kernels import mosaic_gpu, reference
from gsrq_jax.kernels.errors import InputError

Implementation = Literal["mosaic_gpu", "reference"]


def attend_tiles(
    query: Float[Array, "B T H q N d"],
    shift: Float[Array, "H M b d"] | None,
    key_tiles: UInt32[Array, "B H N tiles kw"],
    value_tiles: UInt32[Array, "B H N tiles vw"],
    key_codewords: Float[Array, "H 1 R K d"],
    value_codewords: Float[Array, "H 1 S 16 d"],
    blocks: Int[Array, " B"],
    *,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, "B T H q d"], Float[Array, "B T H q"]]:
    """`gsrq_jax.kernels.reference.attend_tiles`, by the implementation of that name.

    Args:
        query: scaled queries in each block's frame, float32.
        shift: what the mean key adds to the keys of each block (M = N) or of any (M = 1).
        key_tiles: see `gsrq_jax.kernels.tiles.keys_to_tiles`.
        value_tiles: see `gsrq_jax.kernels.tiles.values_to_tiles`.
        key_codewords: of this layer.
        value_codewords: of this layer.
        blocks: valid blocks of each sequence; the others are not read.
        implementation: ``mosaic_gpu``, the fused kernel, or ``reference``, plain jnp. None takes
            the kernel where it is supported, and else the reference with a warning that says why,
            once for each reason.

    Raises:
        InputError: if the implementation asked for is unknown or does not support this.
    """
    arrays = (query, shift, key_tiles, value_tiles, key_codewords, value_codewords, blocks)
    match implementation:
        case "mosaic_gpu":
            return mosaic_gpu.attend_tiles(*arrays)
        case "reference":
            return reference.attend_tiles(*arrays)
        case None:
            try:
                mosaic_gpu.check_supported(*arrays)
            except InputError as error:
                _say(str(error))
                return reference.attend_tiles(*arrays)
            return mosaic_gpu.attend_tiles(*arrays)
    raise InputError(
        f"unknown implementation {implementation!r}; choose 'mosaic_gpu' or 'reference'"
    )


@functools.cache
def _say(reason: str) -> None:
    warnings.warn(f"{reason} (the reference is used)", stacklevel=3)
