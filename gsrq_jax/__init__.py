"""Gain-shape residual quantization of key-value caches in JAX."""
