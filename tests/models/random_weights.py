"""Small models whose weights follow from their tensors' names: used by the goldens and the tests.

Plain numpy, so that it runs beside torch and beside JAX alike.
"""

import hashlib

import numpy as np

LENGTH = 40
"""Tokens of the goldens' sequences."""

_SMALL = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 96,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# Shrunk like the models: the frequencies of a head of 16 fall into all three bands (kept,
# interpolated, slowed).
_LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 48,
}

_LLAMA3 = _SMALL | {"hidden_size": 64, "rope_theta": 500000.0, "eos_token_id": [2, 3]}

CONFIGS = {
    "llama2": _SMALL | {"num_key_value_heads": 4},
    "llama2-linear-rope": _SMALL | {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "llama2-biases": _SMALL | {"attention_bias": True, "mlp_bias": True},
    "llama3": _LLAMA3,
    "llama3.1": _LLAMA3 | {"rope_scaling": _LLAMA3_ROPE},
    "llama3.2": _LLAMA3 | {"rope_scaling": _LLAMA3_ROPE, "tie_word_embeddings": True},
    "tinyllama": _SMALL | {"num_attention_heads": 8, "num_key_value_heads": 1, "hidden_size": 64},
    "smollm2": _SMALL
    | {"num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 72}
    | {"rope_theta": 100000.0, "tie_word_embeddings": True},
    "mistral": _SMALL
    | {"architectures": ["MistralForCausalLM"], "model_type": "mistral", "sliding_window": 128},
    "qwen3": _SMALL
    | {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "head_dim": 20}
    | {"rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True}
    | {"attention_bias": False},
}


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The float32 tensor of that name: norms near 1, matrices that keep the size of vectors."""
    rng = np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big"))
    x = rng.standard_normal(shape)
    if name.endswith("bias"):
        x = 0.3 * x
    elif "norm" in name:
        x = 1 + 0.2 * x
    elif "embed_tokens" not in name:
        # Sharper queries and keys: attention far from uniform, so that positions matter.
        x *= (2.0 if "q_proj" in name or "k_proj" in name else 1.0) / np.sqrt(shape[-1])
    else:
        x *= 0.3
    return x.astype(np.float32)


def tensors(config: dict) -> dict[str, np.ndarray]:
    """All tensors of a checkpoint with that config, by name."""
    hidden, heads = config["hidden_size"], config["num_attention_heads"]
    d = config.get("head_dim") or hidden // heads
    wide, narrow, inside = heads * d, config["num_key_value_heads"] * d, config["intermediate_size"]
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config["vocab_size"], hidden),
        "model.norm.weight": (hidden,),
    }
    if not config["tie_word_embeddings"]:
        shapes["lm_head.weight"] = (config["vocab_size"], hidden)
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}"
        for norm in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{at}.{norm}.weight"] = (hidden,)
        attention = {"q": (wide, hidden), "k": (narrow, hidden), "v": (narrow, hidden)}
        for p, shape in (attention | {"o": (hidden, wide)}).items():
            shapes[f"{at}.self_attn.{p}_proj.weight"] = shape
            if config.get("attention_bias"):
                shapes[f"{at}.self_attn.{p}_proj.bias"] = shape[:1]
        for p, shape in {
            "gate": (inside, hidden),
            "up": (inside, hidden),
            "down": (hidden, inside),
        }.items():
            shapes[f"{at}.mlp.{p}_proj.weight"] = shape
            if config.get("mlp_bias"):
                shapes[f"{at}.mlp.{p}_proj.bias"] = shape[:1]
        if config["model_type"] == "qwen3":
            shapes[f"{at}.self_attn.q_norm.weight"] = (d,)
            shapes[f"{at}.self_attn.k_norm.weight"] = (d,)
    return {name: tensor(name, shape) for name, shape in shapes.items()}


def tokens(config: dict) -> np.ndarray:
    """``[2, LENGTH]`` token ids."""
    return np.random.default_rng(7).integers(0, config["vocab_size"], (2, LENGTH), np.int32)
