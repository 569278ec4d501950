"""The one exception for bad input."""

from gsrq_jax.kernels.errors import InputError

__all__ = ["InputError"]
