"""Models from files: a Hugging Face folder or hub id, a GGUF file, or the demo model."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.typing import DTypeLike
from safetensors import SafetensorError, safe_open

from gsrq_jax.errors import InputError
from gsrq_jax.models import demo, gguf, tokenizer
from gsrq_jax.models.config import LlamaConfig, RopeScaling
from gsrq_jax.models.int8 import from_dense
from gsrq_jax.models.llama import Llama, abstract

FAMILIES = {
    "LlamaForCausalLM": "llama",
    "MistralForCausalLM": "mistral",
    "Qwen3ForCausalLM": "qwen3",
}
"""Architectures that load, as a Hugging Face config names them."""

ROPE_TYPES = ("default", "linear", "llama3")
DTYPES = ("bfloat16", "float32")

_HUB_FILES = ("*.json", "model*.safetensors", "tokenizer*", "chat_template*")


@dataclasses.dataclass(frozen=True, eq=False)
class LoadedModel:
    """A model ready for use.

    Attributes:
        config: its sizes.
        graphdef: static half of the NNX model.
        params: its parameters, layers stacked on a leading axis.
        tokenizer: as :mod:`gsrq_jax.models.tokenizer` makes it; None if the files hold none.
        fingerprint: see :func:`fingerprint`.
        name: for people: the hub id, or the name of the folder or file.
    """

    config: LlamaConfig
    graphdef: nnx.GraphDef[Llama]
    params: nnx.State
    tokenizer: Any
    fingerprint: dict[str, Any]
    name: str

    def needed_tokenizer(self) -> Any:
        """The tokenizer.

        Raises:
            InputError: if the files hold none.
        """
        if self.tokenizer is None:
            raise InputError(f"{self.name} comes without a tokenizer; add its tokenizer.json")
        return self.tokenizer


Shardings = Callable[[LlamaConfig, nnx.State], nnx.State | None]
"""Of a config and its parameters' shapes: the sharding of each, or None for the default device."""


def load(
    path_or_id: str | Path | None = None,
    *,
    dtype: DTypeLike = jnp.bfloat16,
    int8: bool = False,
    shardings: Shardings | None = None,
) -> LoadedModel:
    """Load a model and its tokenizer.

    Args:
        path_or_id: a folder with ``config.json`` and safetensors weights (one file, or shards with
            their index), a ``.gguf`` file, a hub id such as ``meta-llama/Llama-3.1-8B``, or
            ``demo`` (or None) for the small demo model.
        dtype: of the parameters, ``bfloat16`` or ``float32``.
        int8: round the weights of linear layers to 8 bits (`gsrq_jax.models.int8`).
        shardings: where the parameters are put.

    Raises:
        InputError: if it cannot be found, read, or is not of a supported family.
    """
    if jnp.dtype(dtype).name not in DTYPES:
        raise InputError(f"models load as {' or '.join(DTYPES)}, not {jnp.dtype(dtype).name}")
    if path_or_id is None or str(path_or_id) == "demo":
        return _load_gguf(Path(demo.path()), dtype, int8, shardings)
    path = Path(path_or_id).expanduser()
    if path.is_dir():
        return _load_folder(path, path.resolve().name, dtype, int8, shardings)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise InputError(f"no such file: {path}")
        return _load_gguf(path, dtype, int8, shardings)
    if path.exists():
        raise InputError(f"{path} is not a model; give a folder, a .gguf file or a hub id")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(path_or_id)):
        raise InputError(
            f"no such folder: {path}; give a folder, a .gguf file, a hub id such as "
            "owner/model, or demo"
        )
    name = str(path_or_id)
    _read_config(_download(name, ["config.json", "generation_config.json"]))
    return _load_folder(_download(name, list(_HUB_FILES)), name, dtype, int8, shardings)


def config_from_hf(data: Mapping[str, Any]) -> LlamaConfig:
    """The config that a Hugging Face ``config.json`` describes, old style or transformers 5.

    Mistral attends within a sliding window, which is not modelled: ``max_length`` is cut to the
    window instead, and up to there the two agree.

    Raises:
        InputError: if the architecture or its rotary scaling is not supported, the weights are
            quantised, or a field is missing.
    """
    names = data.get("architectures") or [f"{str(data.get('model_type')).title()}ForCausalLM"]
    family = FAMILIES.get(names[0])
    if family is None:
        raise InputError(
            f"architecture {names[0]} is not supported; supported are {', '.join(FAMILIES)}"
        )
    if data.get("quantization_config"):
        raise InputError(
            "the checkpoint's weights are quantised (quantization_config in config.json); "
            "give the original checkpoint or a GGUF file"
        )
    if data.get("hidden_act", "silu") != "silu":
        raise InputError(f"activation {data['hidden_act']} is not supported; supported is silu")
    theta, scaling = _rope(data)
    try:
        max_length = data["max_position_embeddings"]
        if data.get("sliding_window") and (family == "mistral" or data.get("use_sliding_window")):
            max_length = min(max_length, data["sliding_window"])
        hidden, heads = data["hidden_size"], data["num_attention_heads"]
        eos = data.get("eos_token_id")
        return LlamaConfig(
            family=family,
            vocab_size=data["vocab_size"],
            hidden_size=hidden,
            intermediate_size=data["intermediate_size"],
            layers=data["num_hidden_layers"],
            heads=heads,
            kv_heads=data.get("num_key_value_heads") or heads,
            head_dim=data.get("head_dim") or hidden // heads,
            max_length=max_length,
            norm_eps=data.get("rms_norm_eps", 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            tied_embeddings=data.get("tie_word_embeddings", False),
            qk_norm=family == "qwen3",
            attention_bias=data.get("attention_bias", False),
            mlp_bias=data.get("mlp_bias", False),
            bos_token=data.get("bos_token_id"),
            eos_tokens=() if eos is None else tuple(eos) if isinstance(eos, list) else (eos,),
        )
    except KeyError as error:
        raise InputError(f"the model's config.json lacks {error}") from error
    except (TypeError, ZeroDivisionError) as error:
        raise InputError(f"the model's config.json holds unusable values: {error}") from error


def params_from_hf(
    config: LlamaConfig,
    tensors: Mapping[str, np.ndarray],
    dtype: DTypeLike = jnp.bfloat16,
    shardings: Shardings | None = None,
    *,
    int8: bool = False,
) -> nnx.State:
    """Parameters of :class:`Llama` from tensors named and laid out as Hugging Face does.

    Each tensor is read when its turn comes, so a lazy mapping keeps the peak at the model's size
    plus one stack of layers.

    Args:
        config: sizes of the model.
        tensors: by name. Rotary buffers are ignored, and so is an output projection beside tied
            embeddings.
        dtype: of the parameters.
        shardings: where they are put; each device gets its part alone.
        int8: as for `load`.

    Raises:
        InputError: for a tensor that is missing, unexpected, of a wrong shape or not of floats.
    """
    _, params = abstract(config, dtype)
    flat = {path: leaf.get_value() for path, leaf in nnx.to_flat_state(params)}
    placed = None if shardings is None else shardings(config, params)
    places = dict(nnx.to_flat_state(placed)) if placed is not None else {}
    wanted = {path: _hf_names(path, config.layers) for path in flat}

    found = {name for name in tensors if not name.endswith("rotary_emb.inv_freq")}
    if config.tied_embeddings:
        found.discard("lm_head.weight")
    known = [name for names in wanted.values() for name in names]
    _report("missing", [name for name in known if name not in found])
    _report("unexpected", sorted(found.difference(known)))

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        tensor = tensors[name]
        if tensor.shape != shape:
            raise InputError(
                f"tensor {name} has shape {tensor.shape} where the config asks for {shape}"
            )
        if tensor.dtype.name not in ("float16", "bfloat16", "float32", "float64"):
            raise InputError(
                f"tensor {name} holds {tensor.dtype.name}; weights are read as 16- to 64-bit floats"
            )
        return tensor

    def gather(path: tuple, leaf) -> jnp.ndarray:
        names = wanted[path]
        host = np.empty(leaf.shape, leaf.dtype)
        # One row a layer, or the whole array as a single row.
        rows = host if path[0] == "layers" else host[None]
        for name, row in zip(names, rows, strict=True):
            target = row.T if path[-1] == "kernel" else row
            target[...] = read(name, target.shape)
        if path not in places:
            return jnp.asarray(host)
        return jax.make_array_from_callback(host.shape, places[path].get_value(), host.__getitem__)

    made = (
        (path, leaf.replace(gather(path, flat[path]))) for path, leaf in nnx.to_flat_state(params)
    )
    if not int8:
        return nnx.from_flat_state(list(made))
    rounded = from_dense(made)
    where = None if shardings is None else shardings(config, rounded)
    return rounded if where is None else jax.device_put(rounded, where)


def fingerprint(config: LlamaConfig, tensors: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """What codebooks depend on: the shape of the cache and the weights that write it.

    ``weights`` is the SHA-256 of every layer's ``k_proj`` and ``v_proj`` in float32, so it does
    not depend on the dtype that the model is loaded as.
    """
    digest = hashlib.sha256()
    for layer in range(config.layers):
        for projection in ("k_proj", "v_proj"):
            tensor = tensors[f"model.layers.{layer}.self_attn.{projection}.weight"]
            digest.update(np.ascontiguousarray(tensor, np.float32).data)
    scaling = config.rope_scaling
    return {
        "family": config.family,
        "layers": config.layers,
        "kv_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "rope_theta": config.rope_theta,
        "rope_scaling": (
            dataclasses.asdict(scaling) if isinstance(scaling, RopeScaling) else scaling
        ),
        "weights": digest.hexdigest(),
    }


class SafetensorsFolder(Mapping[str, np.ndarray]):
    """The tensors of a folder's ``model.safetensors`` or of its shards, each read when asked for.

    Raises:
        InputError: if there are none, or a file is missing or unreadable.
    """

    def __init__(self, folder: Path):
        single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
        if single.is_file():
            files = [single]
        elif index.is_file():
            weight_map = _read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise InputError(f"{index} has no weight_map; fetch the checkpoint again")
            files = [folder / name for name in sorted(set(weight_map.values()))]
        else:
            raise InputError(
                f"{folder} has neither {single.name} nor {index.name}; "
                "weights are read from safetensors or GGUF files"
            )
        self._file_of: dict[str, tuple[Path, Any]] = {}
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is missing; fetch the checkpoint again")
            try:
                opened = safe_open(file, framework="np")
            except (SafetensorError, OSError) as error:
                raise InputError(
                    f"{file} cannot be read ({error}); fetch the checkpoint again"
                ) from error
            self._file_of.update((name, (file, opened)) for name in opened.keys())  # noqa: SIM118

    def __getitem__(self, name: str) -> np.ndarray:
        file, opened = self._file_of[name]
        try:
            return opened.get_tensor(name)
        except (SafetensorError, AttributeError, TypeError, OSError) as error:
            # AttributeError: numpy has no such dtype (8-bit floats and smaller).
            raise InputError(f"tensor {name} of {file} cannot be read ({error})") from error

    def __iter__(self):
        return iter(self._file_of)

    def __len__(self) -> int:
        return len(self._file_of)


def _load_folder(
    folder: Path, name: str, dtype: DTypeLike, int8: bool, shardings: Shardings | None
) -> LoadedModel:
    config = _read_config(folder)
    tensors = SafetensorsFolder(folder)
    return _assemble(config, tensors, tokenizer.from_folder(folder), name, dtype, int8, shardings)


def _load_gguf(
    path: Path, dtype: DTypeLike, int8: bool, shardings: Shardings | None
) -> LoadedModel:
    config, tensors, tokens = gguf.read(path)
    return _assemble(config, tensors, tokens, path.stem, dtype, int8, shardings)


def _assemble(
    config, tensors, tokenizer, name: str, dtype: DTypeLike, int8: bool, shardings: Shardings | None
) -> LoadedModel:
    graphdef, _ = abstract(config, dtype, int8=int8)
    return LoadedModel(
        config=config,
        graphdef=graphdef,
        params=params_from_hf(config, tensors, dtype, shardings, int8=int8),
        tokenizer=tokenizer,
        fingerprint=fingerprint(config, tensors),
        name=name,
    )


def _read_config(folder: Path) -> LlamaConfig:
    if not (folder / "config.json").is_file():
        raise InputError(f"{folder} has no config.json; give the folder of a Hugging Face model")
    data = _read_json(folder / "config.json")
    if (folder / "generation_config.json").is_file():
        # Chat models end their turns with tokens that only this file names.
        for key, value in _read_json(folder / "generation_config.json").items():
            if key in ("bos_token_id", "eos_token_id") and value is not None:
                data[key] = value
    return config_from_hf(data)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error})") from error
    if not isinstance(data, dict):
        raise InputError(f"{path} does not hold a JSON object")
    return data


def _rope(data: Mapping[str, Any]) -> tuple[float, RopeScaling | float | None]:
    rope = data.get("rope_parameters") or data.get("rope_scaling") or {}
    if not isinstance(rope, dict):
        raise InputError(f"the config's rotary scaling is no JSON object: {rope}")
    kind = rope.get("rope_type") or rope.get("type") or "default"
    if kind not in ROPE_TYPES:
        raise InputError(
            f"rotary scaling {kind!r} is not supported; supported are {', '.join(ROPE_TYPES)}"
        )
    partial = rope.get("partial_rotary_factor") or data.get("partial_rotary_factor") or 1
    if partial != 1:
        raise InputError(f"rotation of a part of a head ({partial}) is not supported")
    scaling: RopeScaling | float | None = None
    try:
        theta = float(rope.get("rope_theta") or data.get("rope_theta") or 10_000.0)
        if kind == "linear":
            scaling = float(rope["factor"])
        if kind == "llama3":
            scaling = RopeScaling(
                factor=float(rope["factor"]),
                low_factor=float(rope["low_freq_factor"]),
                high_factor=float(rope["high_freq_factor"]),
                original_length=int(rope["original_max_position_embeddings"]),
            )
    except KeyError as error:
        raise InputError(f"the config's {kind} rotary scaling lacks {error}") from error
    except (TypeError, ValueError) as error:
        raise InputError(f"the config's rotary scaling holds unusable values: {error}") from error
    return theta, scaling


def _hf_names(path: tuple, layers: int) -> list[str]:
    """Names of the tensors behind one parameter: its layers', or its own."""
    *modules, leaf = path
    name = ".".join([*modules, "bias" if leaf == "bias" else "weight"])
    if modules[0] == "lm_head":
        return [name]
    if modules[0] == "layers":
        rest = name.removeprefix("layers.")
        return [f"model.layers.{layer}.{rest}" for layer in range(layers)]
    return [f"model.{name}"]


def _report(what: str, names: list[str]) -> None:
    if names:
        more = f" and {len(names) - 1} more" if len(names) > 1 else ""
        raise InputError(
            f"{what} tensor {names[0]}{more}; the weights do not fit the model's config"
        )


def _download(name: str, patterns: list[str]) -> Path:
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=patterns))
    except Exception as error:  # the hub's client passes on those of its HTTP library of the day
        reason = str(error).strip().splitlines()
        raise InputError(
            f"{name} is no folder here and cannot be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {reason[0] if reason else 'no reason given'}); "
            "check the name, the network and, for gated models, your login, or give a folder"
        ) from error
