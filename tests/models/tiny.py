"""A model folder small enough to train and generate with in a test: two layers, a byte a token."""

import json
from pathlib import Path
from typing import Any

import random_weights
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

BOS, EOS = "<s>", "</s>"  # ids 0 and 1; the 256 bytes follow

_ARCHITECTURES = {"llama": "Llama", "mistral": "Mistral", "qwen3": "Qwen3"}


def model_config(family: str = "llama", **overrides: Any) -> dict[str, Any]:
    """Its ``config.json``: 2 layers, 4 query heads on 2 KV heads of 8 channels, context 512."""
    return {
        "architectures": [f"{_ARCHITECTURES[family]}ForCausalLM"],
        "model_type": family,
        "vocab_size": 258,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-5,
        "hidden_act": "silu",
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
    } | overrides


def make_model_folder(
    path: str | Path, *, seed: int = 0, family: str = "llama", **config_overrides: Any
) -> Path:
    """Write ``config.json``, ``model.safetensors`` and a tokenizer into ``path``; returns it.

    Args:
        path: folder, made if it is not there.
        seed: of the weights.
        family: ``llama``, ``mistral`` or ``qwen3``.
        config_overrides: fields of ``config.json``, by its names.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    config = model_config(family, **config_overrides)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {
        name: random_weights.tensor(f"{seed} {name}", x.shape)
        for name, x in random_weights.tensors(config).items()
    }
    save_file(tensors, folder / "model.safetensors")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([BOS, EOS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([BOS, EOS])
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": BOS, "eos_token": EOS, "add_bos_token": True}
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


FLAGS = (
    *("--tokens", "480", "--length", "64", "--eval-length", "48", "--eval-sequences", "2"),
    *("--codewords", "16", "--block", "8", "--window", "8", "--sinks", "2"),
    *("--fit.iterations", "2", "--fit.warmup", "1"),
)
"""Of a training run that takes seconds: 8 sequences of 64 tokens of Python's help, 1 bit."""
