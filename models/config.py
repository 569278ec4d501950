"""What a LLaMA-family model is, without its weights."""

import dataclasses


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
