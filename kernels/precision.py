"""Float32 numbers as sums of shorter ones, which tensor cores multiply."""

import jax.numpy as jnp
from jax import lax
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def in_pieces(x: Float[Array, "*n"], count: int, dtype: DTypeLike) -> list[Float[Array, "*n"]]:
    """``count`` numbers of ``dtype`` that add up to each, as nearly as so many can."""
    kind, pieces = jnp.finfo(dtype), []
    x = x.astype(jnp.float32)
    for _ in range(count - 1):
        # Not two conversions: XLA would take one for the inverse of the other, and the rest for 0.
        piece = lax.reduce_precision(x, exponent_bits=kind.nexp, mantissa_bits=kind.nmant)
        pieces.append(piece.astype(dtype))
        x = x - piece
    return [*pieces, x.astype(dtype)]
