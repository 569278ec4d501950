"""Rotary position embedding in Hugging Face's layout."""

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int


def rotate(
    x: Float[ArrayLike, "*n d"],
    positions: Int[ArrayLike, "*m"],
    inv_freq: Float[ArrayLike, " half"],
) -> Float[Array, "*n d"]:
    """Rotate channel pairs ``(i, i + d/2)`` by ``positions · inv_freq[i]`` radians.

    Args:
        x: vectors, any floating dtype.
        positions: integers that broadcast against ``x.shape[:-1]``; a negative one turns back, so
            ``rotate(rotate(x, p, f), -p, f)`` is ``x`` up to rounding.
        inv_freq: angular frequency of each pair, ``d/2`` of them.

    Returns:
        The rotated vectors in the dtype of ``x``; angles and products are computed in float32.
    """
    x = jnp.asarray(x)
    angles = jnp.asarray(positions, jnp.float32)[..., None] * jnp.asarray(inv_freq, jnp.float32)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
