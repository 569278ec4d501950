"""Rotary position embedding in Hugging Face's layout."""

from gsrq_jax.kernels.rotary import rotate, turned, turns

__all__ = ["rotate", "turned", "turns"]
