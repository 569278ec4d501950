"""The rotary frame in which keys are quantised (block-local: ours)."""

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from gsrq_jax.kernels.rotary import rotate, shift
from gsrq_jax.spec import QuantSpec


def origin(spec: QuantSpec, positions: Int[Array, "..."]) -> Int[Array, "..."]:
    """Position up to which a key's rotation is undone before it is quantised."""
    match spec.frame:
        case "block":
            return positions - (positions - spec.sinks) % spec.frame_tokens
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
    """Rotated keys as they are quantised, float32: ``R(-origin) k`` less what the mean key adds,
    `gsrq_jax.kernels.rotary.shift` at ``p - origin``."""
    start, at = origin(spec, positions)[..., None], positions[..., None]
    turned = rotate(key.astype(jnp.float32), -start, inv_freq)
    return turned - shift(mean, at - start, inv_freq, spec.mean_every)


def from_frame(
    framed: Float[Array, "... T H d"],
    positions: Int[Array, "... T"],
    spec: QuantSpec,
    mean: Float[Array, "H d"],
    inv_freq: Float[Array, " d/2"],
) -> Float[Array, "... T H d"]:
    """The inverse of `to_frame`: rotated keys, float32."""
    start, at = origin(spec, positions)[..., None], positions[..., None]
    return rotate(framed + shift(mean, at - start, inv_freq, spec.mean_every), start, inv_freq)
