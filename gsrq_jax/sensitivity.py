"""How much each key or value vector matters: gradient norms to weights of the codebook training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from gsrq_jax.errors import InputError


def log_smooth(norms: Float[Array, "*shape N"]) -> Float[Array, "*shape N"]:
    """Weights ``log(1 + s / median(s))`` over the last axis; all ones where the median is 0.

    Log-smoothed gradient norms are the paper's; this formula is ours. The median makes weights
    independent of the loss's scale (a typical vector weighs log 2), the logarithm keeps a few
    vectors with huge gradients from owning the codebook.

    Args:
        norms: ``s``, norms of the loss's gradient with respect to each vector, at least 0.

    Returns:
        float32 weights of the same shape.

    Raises:
        InputError: if a norm is negative or not finite (not noticed under ``jit``).
    """
    norms = jnp.asarray(norms, jnp.float32)
    if not isinstance(norms, jax.core.Tracer) and not bool(
        ((norms >= 0) & (norms < jnp.inf)).all()
    ):
        raise InputError(
            "gradient norms must be finite and at least 0; "
            "look for overflow in the loss (scale it down or use float32)"
        )
    median = jnp.median(norms, axis=-1, keepdims=True)
    ratio = norms / jnp.where(median > 0, median, 1)
    return jnp.where(median > 0, jnp.log1p(ratio), 1)
