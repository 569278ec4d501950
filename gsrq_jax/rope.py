"""Rotary position embedding in Hugging Face's layout."""

from gsrq_jax.kernels.rotary import rotate

__all__ = ["rotate"]
