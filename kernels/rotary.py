"""Rotation of queries and keys by their positions, and the mean key that keys are centred with."""

import math

import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Array, Float, Int


def turns(
    positions: Int[ArrayLike, "*m"], inv_freq: Float[ArrayLike, " half"]
) -> tuple[Float[Array, "*m half"], Float[Array, "*m half"]]:
    """Cosines and sines of ``positions · inv_freq``, float32."""
    angles = jnp.asarray(positions, jnp.float32)[..., None] * jnp.asarray(inv_freq, jnp.float32)
    return jnp.cos(angles), jnp.sin(angles)


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
    return turned(x, *turns(positions, inv_freq))


def turned(
    x: Float[ArrayLike, "*n d"], cos: Float[Array, "*m half"], sin: Float[Array, "*m half"]
) -> Float[Array, "*n d"]:
    """`rotate` by what `turns` gave."""
    x = jnp.asarray(x)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


def slow(
    mean: Float[Array, "*n d"], inv_freq: Float[Array, " half"], every: int
) -> Float[Array, "*n d"]:
    """The mean key without the pairs that make more than half a turn from knot to knot.

    All of it where every token is a knot.
    """
    if every == 1:
        return mean
    return jnp.where(jnp.tile(inv_freq * every <= math.pi, 2), mean, 0)


def shift(
    mean: Float[Array, "*n d"],
    offset: Int[Array, "*m"],
    inv_freq: Float[Array, " half"],
    every: int = 1,
) -> Float[Array, "*n d"]:
    """What the mean key adds to keys ``offset`` tokens into their block, in the block's frame.

    At every so many tokens, the knots, it is the mean key (what is `slow` of it) rotated so far,
    and between two knots it is interpolated linearly. With a knot at every token it is
    ``rotate(mean, offset)``. Ours.

    Args:
        mean: mean key before RoPE.
        offset: integers that broadcast against ``mean.shape[:-1]``.
        inv_freq: rotary frequencies.
        every: tokens from knot to knot, static.
    """
    if every == 1:
        return rotate(mean, offset, inv_freq)
    mean, knot = slow(mean, inv_freq, every), offset // every * every
    before, after = (rotate(mean, k, inv_freq) for k in (knot, knot + every))
    return before + (after - before) * ((offset - knot) / every)[..., None].astype(jnp.float32)
