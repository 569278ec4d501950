"""How much vectors matter, and directions in them: gradient norms to weights, second moments to
metrics.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float

from gsrq_jax.errors import InputError, known
from gsrq_jax.kmeans import AxisName


def log_smooth(
    norms: Float[Array, "*shape N"], *, axis_name: AxisName = None
) -> Float[Array, "*shape N"]:
    """Weights ``log(1 + s / median(s))`` over the last axis; all ones where the median is 0.

    Log-smoothed gradient norms are the paper's; this formula is ours. The median makes weights
    independent of the loss's scale (a typical vector weighs log 2), the logarithm keeps a few
    vectors with huge gradients from owning the codebook.

    Args:
        norms: ``s``, norms of the loss's gradient with respect to each vector, at least 0.
        axis_name: mapped axis or axes over which the vectors are spread, the same number each.

    Returns:
        float32 weights of the same shape.

    Raises:
        InputError: if a norm is negative or not finite (not noticed under ``jit``).
    """
    given, norms = known(norms), jnp.asarray(norms, jnp.float32)
    if given is not None and not ((given >= 0) & (given < np.inf)).all():
        raise InputError(
            "gradient norms must be finite and at least 0; "
            "look for overflow in the loss (scale it down or use float32)"
        )
    median = _median(norms, axis_name)[..., None]
    ratio = norms / jnp.where(median > 0, median, 1)
    return jnp.where(median > 0, jnp.log1p(ratio), 1)


def _median(x: Float[Array, "*shape N"], axis_name: AxisName) -> Float[Array, "*shape"]:
    """Of numbers that are at least 0, over the last axis and over devices.

    Spread over devices it is exact, too, and none sees the numbers of another: they are ordered as
    their bits are, so the two in the middle are found bit by bit, by counting what is below.
    """
    if axis_name is None:
        return jnp.median(x, axis=-1)
    bits = lax.bitcast_convert_type(jnp.abs(x), jnp.uint32)
    size = x.shape[-1] * lax.axis_size(axis_name)
    ranks = jnp.asarray([(size - 1) // 2, size // 2])

    def settle(step: Array, found: Array) -> Array:
        tried = found | (jnp.uint32(1) << (31 - step).astype(jnp.uint32))
        below = lax.psum(jnp.sum(bits[..., None, :] < tried[..., None], axis=-1), axis_name)
        return jnp.where(below <= ranks, tried, found)

    nothing = lax.psum(jnp.zeros_like(bits[..., :1]), axis_name)
    found = lax.fori_loop(0, 32, settle, jnp.broadcast_to(nothing, (*x.shape[:-1], 2)))
    return lax.bitcast_convert_type(found, jnp.float32).mean(axis=-1)


def metric(moment: Float[Array, "*lead d d"], power: float = 0.5) -> Float[Array, "*lead d d"]:
    """The factor ``A`` of a distance ``‖A(x − c)‖`` from a second moment of what an error meets.

    ``AᵀA`` is ``moment`` to the power ``power``, scaled to a mean eigenvalue of 1, and mixed with
    2 % of the identity so that ``A`` can be inverted. The moment itself, power 1, would be right
    if errors were small and codes free to follow it; but few tokens and directions make it up
    (docs/moments.md) and then take all stages. Half the power was chosen over 0 and 1 by the
    divergence of SmolLM2, in an exploration of which no result file is kept (ours).

    Args:
        moment: ``E[g gᵀ]``, symmetric, of gradients, queries or an output projection.
        power: from 0, the Euclidean distance, to 1.

    Returns:
        float32, symmetric; the identity where the moment is 0.
    """
    moment = jnp.asarray(moment, jnp.float32)
    scale = jnp.trace(moment, axis1=-2, axis2=-1)[..., None, None] / moment.shape[-1]
    eye = jnp.broadcast_to(jnp.eye(moment.shape[-1], dtype=moment.dtype), moment.shape)
    values, vectors = jnp.linalg.eigh(jnp.where(scale > 0, moment / scale, eye))
    values = jnp.maximum(values, _LEAST) ** power
    values = (1 - _MIXED) * values / values.mean(-1, keepdims=True) + _MIXED
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum(
        "...ij,...j,...kj->...ik", vectors, jnp.sqrt(values), vectors, precision=exact
    )


_LEAST = 1e-6  # eigenvalue of a moment of mean 1, against rounding below 0
_MIXED = 0.02  # share of the identity
