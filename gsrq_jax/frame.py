"""The rotary frame in which keys are quantised (block-local: ours)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gsrq_jax.rope import rotate
from gsrq_jax.spec import QuantSpec


def origin(spec: QuantSpec, positions: Int[Array, "..."]) -> Int[Array, "..."]:
    """Position up to which a key's rotation is undone before it is quantised."""
    match spec.frame:
        case "block":
            return positions - (positions - spec.sinks) % spec.block
        case "pre":
            return positions
        case "post":
            return jnp.zeros_like(positions)


def to_frame(
    key: Float[Array, "... T H d"],
    positions: Int[Array, "... T"],
    spec: QuantSpec,
    mean: Float[Array, "H d"],
    inv_freq: Float[Array, " d/2"],
) -> Float[Array, "... T H d"]:
    """Rotated keys as they are quantised, float32: ``R(-origin) k - R(p - origin) mean``."""
    start, at = origin(spec, positions)[..., None], positions[..., None]
    shift = rotate(jnp.broadcast_to(mean, key.shape), at - start, inv_freq)
    return rotate(key.astype(jnp.float32), -start, inv_freq) - shift


def from_frame(
    framed: Float[Array, "... T H d"],
    positions: Int[Array, "... T"],
    spec: QuantSpec,
    mean: Float[Array, "H d"],
    inv_freq: Float[Array, " d/2"],
) -> Float[Array, "... T H d"]:
    """The inverse of `to_frame`: rotated keys, float32."""
    start, at = origin(spec, positions)[..., None], positions[..., None]
    shift = rotate(jnp.broadcast_to(mean, framed.shape), at, inv_freq)
    return rotate(framed, start, inv_freq) + shift
