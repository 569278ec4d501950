"""GGUF files (llama.cpp's): config, weights by their Hugging Face names, tokenizer."""

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from gsrq_jax.errors import InputError
from gsrq_jax.models import tokenizer
from gsrq_jax.models.config import LlamaConfig, RopeScaling, inverse_frequencies

ARCHITECTURES = ("llama", "qwen3")

_NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
_LAYER_NAMES = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_ROPE_FACTORS = "rope_freqs.weight"


class Weights(Mapping[str, np.ndarray]):
    """Weights by their Hugging Face names, float32, each dequantised whenever it is asked for."""

    def __init__(self, tensors: Mapping[str, gguf.ReaderTensor], heads: Mapping[str, int]):
        """``heads``: of those projections whose rows llama.cpp permuted, by their name's end."""
        self._tensors = tensors
        self._heads = heads

    def __getitem__(self, name: str) -> np.ndarray:
        tensor = self._tensors[name]
        rows = np.asarray(tensor.data)
        if heads := self._heads.get(name.split(".")[-2]):
            rows = _unpermute(rows, heads)
        return gguf.quants.dequantize(np.ascontiguousarray(rows), tensor.tensor_type)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def _unpermute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows [heads·d, …] from llama.cpp's order to Hugging Face's.

    llama.cpp rotates channels ``(2i, 2i + 1)`` of a head where Hugging Face rotates
    ``(i, i + d/2)``; a row holds its quantised blocks whole, so rows can be moved as bytes.
    """
    if rows.shape[0] % (2 * heads):
        raise InputError(
            f"a projection of {heads} heads has {rows.shape[0]} rows; download the file again"
        )
    half = rows.shape[0] // heads // 2
    return rows.reshape(heads, half, 2, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)


def read(
    path: str | Path,
) -> tuple[LlamaConfig, Mapping[str, np.ndarray], tokenizer.Tokenizer | None]:
    """What a GGUF file holds: the config, the weights and, if it has one, the tokenizer.

    Weights have Hugging Face's names, shapes and order of rows; a tied output projection is left
    out. They stay in the file, mapped into memory, until asked for (see ``Weights``). Whether all
    are there and fit the config is for ``loading.params_from_hf`` to check. A sliding window cuts
    ``max_length``, as in ``loading.config_from_hf``.

    Args:
        path: of the file; architectures ``llama`` (LLaMA, Mistral, TinyLlama, SmolLM2, …) and
            ``qwen3``, tensor types that the ``gguf`` package can dequantise.

    Raises:
        InputError: if the file is missing, damaged or of another kind.
    """
    path = Path(path)
    values, tensors = _open(path)
    try:
        for tensor in tensors.values():
            _check_type(tensor)
        factors = tensors.pop(_ROPE_FACTORS, None)
        named = {_rename(name): tensor for name, tensor in tensors.items()}
        config = _config(values, named, None if factors is None else np.asarray(factors.data))
        heads = {"q_proj": config.heads, "k_proj": config.kv_heads}
        permuted = heads if config.family == "llama" else {}
        return config, Weights(named, permuted), tokenizer.from_gguf(values)
    except InputError as error:
        raise InputError(f"{path}: {error}") from error


def _open(path: Path) -> tuple[dict[str, Any], dict[str, gguf.ReaderTensor]]:
    """Metadata as plain values, and tensors by llama.cpp's names."""
    try:
        with path.open("rb") as file:
            magic = file.read(4)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    if magic != b"GGUF":
        raise InputError(f"{path} is not a GGUF file: it begins with {magic!r}; fetch it again")
    try:
        reader = gguf.GGUFReader(path)
        values = {name: field.contents() for name, field in reader.fields.items()}
    except (ValueError, IndexError, KeyError, TypeError, OverflowError) as error:
        # What the reader runs into when bytes are missing or make no sense.
        raise InputError(
            f"{path} is cut off, damaged or too new ({error}); download it again"
        ) from error
    if reader.byte_order != "I":
        raise InputError(f"{path} is a big-endian GGUF file; get the little-endian one")
    return values, {tensor.name: tensor for tensor in reader.tensors}


def _check_type(tensor: gguf.ReaderTensor) -> None:
    kind = tensor.tensor_type
    _, size = gguf.GGML_QUANT_SIZES[kind]
    try:
        gguf.quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except NotImplementedError as error:
        raise InputError(
            f"tensor {tensor.name} is of the type {kind.name}, which cannot be read; "
            "get a file with another quantisation, such as Q4_K_M or Q8_0"
        ) from error


def _rename(name: str) -> str:
    """Hugging Face's name of a tensor of llama.cpp's."""
    base, _, end = name.rpartition(".")
    if layer := re.fullmatch(r"blk\.(\d+)\.(\w+)", base):
        number, part = layer.groups()
        new = f"model.layers.{number}.{_LAYER_NAMES[part]}" if part in _LAYER_NAMES else None
    else:
        new = _NAMES.get(base)
    if not new:
        raise InputError(
            f"tensor {name} belongs to no dense LLaMA-family decoder; such models are not supported"
        )
    return f"{new}.{end}"


def _config(
    values: Mapping[str, Any], tensors: Mapping[str, gguf.ReaderTensor], factors: np.ndarray | None
) -> LlamaConfig:
    architecture = values.get("general.architecture")
    if architecture not in ARCHITECTURES:
        raise InputError(
            f"the architecture {architecture!r} is not supported, only {', '.join(ARCHITECTURES)}"
        )

    def number(key: str, default: float | None = None):
        value = values.get(f"{architecture}.{key}", default)
        if not isinstance(value, int | float):
            problem = "is missing" if value is None else f"is {value!r}, not one number"
            raise InputError(f"{architecture}.{key} {problem}; download the file again")
        # The shortest decimal of a stored float32 is the number that was meant.
        return float(str(np.float32(value))) if isinstance(value, float) else value

    if "model.embed_tokens.weight" not in tensors:
        raise InputError("tensor token_embd.weight is missing; download the file again")
    hidden, heads = number("embedding_length"), number("attention.head_count")
    head_dim = number("attention.key_length", hidden // heads)
    for key in ("attention.value_length", "rope.dimension_count"):
        if number(key, head_dim) != head_dim:
            raise InputError(
                f"{architecture}.{key} is {number(key)} where heads have {head_dim} channels; "
                "such models are not supported"
            )
    ends = (values.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom"))
    theta = number("rope.freq_base", 10_000.0)
    length = number("context_length")
    return LlamaConfig(
        family=architecture,
        vocab_size=_shape(tensors["model.embed_tokens.weight"])[0],
        hidden_size=hidden,
        intermediate_size=number("feed_forward_length"),
        layers=number("block_count"),
        heads=heads,
        kv_heads=number("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_length=min(length, number("attention.sliding_window", 0) or length),
        norm_eps=number("attention.layer_norm_rms_epsilon"),
        rope_theta=theta,
        rope_scaling=(
            _linear_scaling(architecture, values)
            if factors is None
            else _llama3_scaling(factors, head_dim, theta)
        ),
        tied_embeddings="lm_head.weight" not in tensors,
        qk_norm=architecture == "qwen3",
        attention_bias="model.layers.0.self_attn.q_proj.bias" in tensors,
        mlp_bias="model.layers.0.mlp.up_proj.bias" in tensors,
        bos_token=values.get("tokenizer.ggml.bos_token_id"),
        eos_tokens=tuple(dict.fromkeys(end for end in ends if end is not None)),
    )


def _linear_scaling(architecture: str, values: Mapping[str, Any]) -> float | None:
    kind = values.get(f"{architecture}.rope.scaling.type", "none")
    if kind not in ("none", "linear"):
        raise InputError(f"RoPE scaling of the type {kind!r} is not supported")
    factor = float(values.get(f"{architecture}.rope.scaling.factor", 1)) if kind == "linear" else 1
    return None if factor == 1 else factor


def _llama3_scaling(factors: np.ndarray, head_dim: int, theta: float) -> RopeScaling | None:
    """LLaMA 3's scaling from its table of factors, which is all of it that llama.cpp stores.

    Wavelengths past the original length are slowed by the whole factor, so it is the largest; the
    other three numbers are those of every LLaMA 3.x.
    """
    if np.all(factors == 1):
        return None
    scaling = RopeScaling(
        factor=float(factors.max()), low_factor=1.0, high_factor=4.0, original_length=8192
    )
    expected = inverse_frequencies(head_dim, theta) / inverse_frequencies(head_dim, theta, scaling)
    if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-3):
        raise InputError(
            f"the factors in {_ROPE_FACTORS} are not LLaMA 3's; such models are not supported"
        )
    return scaling


def _shape(tensor: gguf.ReaderTensor) -> tuple[int, ...]:
    return tuple(int(n) for n in reversed(tensor.shape))
