"""Sizes of models whose weights are not at hand."""

from gsrq_jax.models.config import LlamaConfig

LLAMA_3_8B = LlamaConfig(
    family="llama",
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    max_length=8192,
    rope_theta=500_000.0,
)
