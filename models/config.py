"""What a LLaMA-family model is, without its weights."""

import dataclasses

import numpy as np
from jaxtyping import Float32

from gsrq_jax.errors import InputError, at_least


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """LLaMA 3.1's frequency scaling (`rope_type: llama3` in a Hugging Face config).

    Wavelengths above ``original_length / low_factor`` are slowed ``factor`` times, those below
    ``original_length / high_factor`` are left alone, between them it is interpolated.
    """

    factor: float
    low_factor: float
    high_factor: float
    original_length: int


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """A LLaMA-family decoder: RMSNorm, RoPE, grouped-query attention, SwiGLU.

    Attributes:
        family: ``llama``, ``mistral`` or ``qwen3``: the architecture's name in its files.
        vocab_size: rows of the embedding.
        hidden_size: channels of the residual stream.
        intermediate_size: channels inside the MLP.
        layers: decoder layers.
        heads: query heads.
        kv_heads: key and value heads; divides ``heads``.
        head_dim: channels of a head.
        max_length: positions that the model was trained for.
        norm_eps: epsilon of RMSNorm.
        rope_theta: base of the rotary frequencies.
        rope_scaling: LLaMA 3.1's scaling, a linear factor, or None.
        tied_embeddings: the output projection is the embedding.
        qk_norm: RMSNorm on each query and key head before RoPE (Qwen3).
        attention_bias: biases on q, k, v (and o) projections.
        mlp_bias: biases in the MLP.
        bos_token / eos_tokens: token ids, where the files name them.

    Raises:
        InputError: if the numbers do not fit each other.
    """

    family: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    max_length: int
    norm_eps: float = 1e-5
    rope_theta: float = 10_000.0
    rope_scaling: RopeScaling | float | None = None
    tied_embeddings: bool = False
    qk_norm: bool = False
    attention_bias: bool = False
    mlp_bias: bool = False
    bos_token: int | None = None
    eos_tokens: tuple[int, ...] = ()

    def __post_init__(self):
        sizes = ("vocab_size", "hidden_size", "intermediate_size", "layers", "heads", "kv_heads")
        named = {name: getattr(self, name) for name in (*sizes, "head_dim", "max_length")}
        at_least(1, "the model's ", **named)
        if self.heads % self.kv_heads:
            raise InputError(
                f"{self.heads} query heads cannot share {self.kv_heads} key and value heads evenly"
            )
        if self.head_dim % 2:
            raise InputError(f"rotary positions need an even head_dim, got {self.head_dim}")

    @property
    def inv_freq(self) -> Float32[np.ndarray, " half"]:
        """Rotary frequencies of the channel pairs of a head."""
        return inverse_frequencies(self.head_dim, self.rope_theta, self.rope_scaling)


def inverse_frequencies(
    head_dim: int, theta: float, scaling: RopeScaling | float | None = None
) -> Float32[np.ndarray, " half"]:
    """``theta^(-2i / head_dim)``, scaled; in float32 step by step, as transformers computes it.

    Args:
        head_dim: channels of a head, even.
        theta: base of the frequencies.
        scaling: LLaMA 3.1's, or the factor of linear scaling, or None.
    """
    exponents = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    plain = np.float32(1) / np.power(np.float32(theta), exponents)
    if scaling is None:
        return plain
    if not isinstance(scaling, RopeScaling):
        return plain / np.float32(scaling)
    slowed = plain / np.float32(scaling.factor)
    turns = np.float32(scaling.original_length) / (np.float32(2 * np.pi) / plain)
    span = np.float32(scaling.high_factor - scaling.low_factor)
    smooth = np.clip((turns - np.float32(scaling.low_factor)) / span, 0, 1)
    return (1 - smooth) * slowed + smooth * plain


LLAMA_3_8B = LlamaConfig(
    family="llama",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    layers=32,
    heads=32,
    kv_heads=8,
    head_dim=128,
    max_length=8192,
    rope_theta=500_000.0,
)
"""The sizes of a model whose weights may not be at hand, to trace and compile for."""
