"""Checkpoints written here, loaded, and compared with transformers (tools/make_goldens.py)."""

import dataclasses
import functools
import json
from pathlib import Path

import huggingface_hub
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import random_weights
from safetensors.numpy import save_file

from gsrq_jax.errors import InputError
from gsrq_jax.models import demo, gguf, llama
from gsrq_jax.models.config import RopeScaling
from gsrq_jax.models.loading import config_from_hf, load, params_from_hf

GOLDENS = Path(__file__).parent / "goldens"
SMALL = random_weights.CONFIGS["llama3"]


def write(folder, config, tensors=None, *, shards=1):
    tensors = random_weights.tensors(config) if tensors is None else tensors
    (folder / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, folder / "model.safetensors")
        return folder
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = names[i::shards]
        save_file({name: tensors[name] for name in part}, folder / file)
        weight_map |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def causal(q, k, v, x_layer):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), None


def logits_of(graphdef, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)

    with jax.default_matmul_precision("highest"):
        return np.asarray(forward(graphdef, params, tokens, positions))


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens, positions):
    hidden, _ = llama.apply(graphdef, params, tokens, positions, causal)
    return llama.logits(graphdef, params, hidden)


def relative(got, want):
    return np.abs(got - want).max() / np.abs(want).max()


@pytest.mark.parametrize("name", random_weights.CONFIGS)
def test_logits_equal_transformers(name, tmp_path):
    golden = np.load(GOLDENS / f"{name}.npz")
    config = random_weights.CONFIGS[name]
    shards = 3 if name in ("llama3.1", "qwen3") else 1
    loaded = load(write(tmp_path, config, shards=shards), dtype=jnp.float32)
    assert loaded.name == tmp_path.name
    assert loaded.tokenizer is None
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.float32)}
    np.testing.assert_allclose(loaded.config.inv_freq, golden["inv_freq"], rtol=3e-7)
    got = logits_of(loaded.graphdef, loaded.params, golden["tokens"])
    assert relative(got, golden["logits"]) <= 1e-4
    # The same config as transformers 5 writes it.
    assert config_from_hf(json.loads((GOLDENS / f"{name}.json").read_text())) == loaded.config


@pytest.mark.parametrize("name", ["llama2-linear-rope", "llama3.1", "llama3.2"])
def test_goldens_notice_rotary_scaling(name):
    golden = np.load(GOLDENS / f"{name}.npz")
    data = random_weights.CONFIGS[name]
    config = dataclasses.replace(config_from_hf(data), rope_scaling=None)
    params = params_from_hf(config, random_weights.tensors(data), jnp.float32)
    graphdef, _ = llama.abstract(config)
    assert relative(logits_of(graphdef, params, golden["tokens"]), golden["logits"]) > 1e-2


def test_bfloat16_is_the_default_and_close(tmp_path):
    golden = np.load(GOLDENS / "llama3.npz")
    loaded = load(write(tmp_path, SMALL))
    assert {leaf.dtype for leaf in jax.tree.leaves(loaded.params)} == {jnp.dtype(jnp.bfloat16)}
    got = logits_of(loaded.graphdef, loaded.params, golden["tokens"])
    assert np.linalg.norm(got - golden["logits"]) / np.linalg.norm(golden["logits"]) < 0.05


def test_weights_in_half_precision_files(tmp_path):
    tensors = random_weights.tensors(SMALL)
    loaded = {}
    for dtype in (np.float16, ml_dtypes.bfloat16):
        folder = tmp_path / np.dtype(dtype).name
        folder.mkdir()
        write(folder, SMALL, {k: t.astype(dtype) for k, t in tensors.items()})
        loaded[dtype] = load(folder, dtype=jnp.float32)
        name = "model.layers.2.mlp.down_proj.weight"
        got = loaded[dtype].params["layers"]["mlp"]["down_proj"]["kernel"][2]
        np.testing.assert_array_equal(got, tensors[name].astype(dtype).astype(np.float32).T)


def test_fingerprint_knows_weights_and_not_dtypes(tmp_path):
    first = load(write(tmp_path, SMALL), dtype=jnp.float32).fingerprint
    assert first == load(tmp_path, dtype=jnp.bfloat16).fingerprint
    assert json.loads(json.dumps(first)) == first
    assert (first["family"], first["layers"], first["kv_heads"]) == ("llama", 3, 2)

    tensors = random_weights.tensors(SMALL)
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1
    assert load(write(tmp_path, SMALL, tensors)).fingerprint == first
    tensors["model.layers.2.self_attn.v_proj.weight"][0, 0] += 1
    assert load(write(tmp_path, SMALL, tensors)).fingerprint != first
    scaled = SMALL | {"rope_scaling": random_weights.CONFIGS["llama3.1"]["rope_scaling"]}
    scaled_fingerprint = load(write(tmp_path, scaled)).fingerprint
    assert json.loads(json.dumps(scaled_fingerprint)) == scaled_fingerprint
    assert scaled_fingerprint != first
    assert scaled_fingerprint["weights"] == first["weights"]


def test_extras_that_checkpoints_carry_are_ignored(tmp_path):
    config = random_weights.CONFIGS["smollm2"]
    tensors = random_weights.tensors(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(4, np.float32)
    tensors["lm_head.weight"] = np.zeros((1, 1), np.float32)
    assert "lm_head" not in load(write(tmp_path, config, tensors)).params


def test_generation_config_names_the_ends(tmp_path):
    write(tmp_path, SMALL)
    assert load(tmp_path).config.eos_tokens == (2, 3)
    (tmp_path / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [5, 6, 7], "bos_token_id": None, "temperature": 0.6})
    )
    config = load(tmp_path).config
    assert (config.bos_token, config.eos_tokens) == (1, (5, 6, 7))


# Configs


def test_published_configs():
    # LLaMA 3.1 8B, Mistral 7B v0.1 and Qwen3 0.6B as their repositories have them, in short.
    llama31 = config_from_hf(
        {
            "architectures": ["LlamaForCausalLM"],
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 131072,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-05,
            "rope_scaling": {
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
                "rope_type": "llama3",
            },
            "rope_theta": 500000.0,
            "vocab_size": 128256,
        }
    )
    assert llama31.rope_scaling == RopeScaling(8.0, 1.0, 4.0, 8192)
    assert (llama31.head_dim, llama31.max_length) == (128, 131072)
    mistral = config_from_hf(
        {
            "model_type": "mistral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "max_position_embeddings": 32768,
            "num_attention_heads": 32,
            "num_hidden_layers": 32,
            "num_key_value_heads": 8,
            "sliding_window": 4096,
            "vocab_size": 32000,
        }
    )
    assert (mistral.family, mistral.max_length, mistral.rope_theta) == ("mistral", 4096, 10000.0)
    qwen = config_from_hf(
        {
            "architectures": ["Qwen3ForCausalLM"],
            "head_dim": 128,
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "max_position_embeddings": 40960,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-06,
            "rope_theta": 1000000,
            "sliding_window": None,
            "tie_word_embeddings": True,
            "use_sliding_window": False,
            "vocab_size": 151936,
        }
    )
    assert (qwen.qk_norm, qwen.tied_embeddings, qwen.max_length) == (True, True, 40960)
    assert llama.count(llama.abstract(qwen)[1]) == 596_049_920


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"architectures": ["FalconForCausalLM"]}, "FalconForCausalLM is not supp.*Qwen3ForCausal"),
        ({"architectures": None, "model_type": "gpt2"}, "Gpt2ForCausalLM is not supported"),
        ({"rope_scaling": {"type": "yarn", "factor": 4}}, "'yarn' is not supported.*llama3"),
        ({"rope_parameters": {"rope_type": "dynamic"}}, "'dynamic' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "linear rotary scaling lacks 'factor'"),
        ({"rope_parameters": "llama3"}, "no JSON object: llama3"),
        ({"rope_scaling": {"type": "linear", "factor": "x"}}, "scaling holds unusable values"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "part of a head"),
        ({"quantization_config": {"quant_method": "gptq"}}, "weights are quantised"),
        ({"hidden_act": "gelu"}, "activation gelu is not supported"),
        ({"num_attention_heads": 0}, "unusable values"),
        ({"num_hidden_layers": "many"}, "unusable values"),
    ],
)
def test_configs_that_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        config_from_hf(SMALL | changes)


def test_config_without_a_field():
    with pytest.raises(InputError, match=r"config\.json lacks 'vocab_size'"):
        config_from_hf({k: v for k, v in SMALL.items() if k != "vocab_size"})


# Weights


def test_missing_tensor(tmp_path):
    tensors = random_weights.tensors(SMALL)
    del tensors["model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(InputError, match=r"missing tensor model\.layers\.1\.self_attn\.k_proj\.w"):
        load(write(tmp_path, SMALL, tensors))


def test_unexpected_tensor(tmp_path):
    tensors = random_weights.tensors(SMALL)
    with pytest.raises(InputError, match=r"unexpected tensor model\.layers\.2\..* and 8 more"):
        load(write(tmp_path, SMALL | {"num_hidden_layers": 2}, tensors))


def test_wrong_shape(tmp_path):
    tensors = random_weights.tensors(SMALL)
    tensors["model.layers.0.mlp.up_proj.weight"] = np.zeros((64, 80), np.float32)
    words = r"mlp\.up_proj\.weight has shape \(64, 80\) where the config asks for \(80, 64\)"
    with pytest.raises(InputError, match=words):
        load(write(tmp_path, SMALL, tensors))


def test_integer_weights(tmp_path):
    tensors = random_weights.tensors(SMALL)
    tensors["model.norm.weight"] = np.ones(64, np.int8)
    with pytest.raises(InputError, match=r"model\.norm\.weight holds int8"):
        load(write(tmp_path, SMALL, tensors))


def test_eight_bit_floats(tmp_path):
    file = write(tmp_path, SMALL) / "model.safetensors"
    raw = file.read_bytes()
    size = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + size])
    header["model.norm.weight"] |= {"dtype": "F8_E4M3", "shape": [256]}
    header = json.dumps(header).encode()
    file.write_bytes(len(header).to_bytes(8, "little") + header + raw[8 + size :])
    with pytest.raises(InputError, match=r"model\.norm\.weight of .* cannot be read"):
        load(tmp_path)


def test_truncated_file(tmp_path):
    file = write(tmp_path, SMALL) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match=r"model\.safetensors cannot be read"):
        load(tmp_path)


def test_missing_shard(tmp_path):
    (write(tmp_path, SMALL, shards=3) / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(InputError, match=r"model-00002-of-00003\.safetensors is missing"):
        load(tmp_path)


def test_no_weights_and_broken_index(tmp_path):
    (write(tmp_path, SMALL) / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"has neither model\.safetensors nor"):
        load(tmp_path)
    (tmp_path / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(InputError, match="has no weight_map"):
        load(tmp_path)


# Names


def test_folder_without_or_with_a_broken_config(tmp_path):
    with pytest.raises(InputError, match=r"has no config\.json"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config\.json cannot be read"):
        load(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(InputError, match="does not hold a JSON object"):
        load(tmp_path)


def test_unusable_names_and_dtypes(tmp_path):
    with pytest.raises(InputError, match="no such folder: /no/such/model"):
        load("/no/such/model")
    with pytest.raises(InputError, match=r"no such file: .*model\.gguf"):
        load(tmp_path / "model.gguf")
    (tmp_path / "model.bin").touch()
    with pytest.raises(InputError, match=r"model\.bin is not a model"):
        load(tmp_path / "model.bin")
    with pytest.raises(InputError, match="bfloat16 or float32, not float16"):
        load(tmp_path, dtype=jnp.float16)


def test_hub_id_is_fetched_config_first(tmp_path, monkeypatch):
    write(tmp_path, SMALL)
    asked = []

    def snapshot_download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(tmp_path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert load("owner/small-model").name == "owner/small-model"
    assert [name for name, _ in asked] == ["owner/small-model"] * 2
    assert asked[0][1] == ["config.json", "generation_config.json"]
    assert "model*.safetensors" in asked[1][1]


def test_hub_out_of_reach(monkeypatch):
    def snapshot_download(name, allow_patterns):
        raise ConnectionError("no route\nlong explanation")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(InputError, match=r"owner/model is no folder here.*no route") as caught:
        load("owner/model")
    assert "\n" not in str(caught.value)


def test_gguf_files_and_the_demo_model_go_to_their_reader(tmp_path, monkeypatch):
    file = tmp_path / "small-Q8_0.gguf"
    file.touch()
    read = []

    def reader(path):
        read.append(path)
        return config_from_hf(SMALL), random_weights.tensors(SMALL), "its tokenizer"

    monkeypatch.setattr(gguf, "read", reader)
    monkeypatch.setattr(demo, "path", lambda: file)
    for name in (file, str(file), "demo", None):
        loaded = load(name)
        assert (loaded.name, loaded.tokenizer) == ("small-Q8_0", "its tokenizer")
    assert read == [file] * 4


@pytest.mark.demo_model
def test_demo_model_knows_a_capital():
    loaded = load("demo")
    assert llama.count(loaded.params) == 134_515_008
    tokens = np.array([loaded.tokenizer.encode("The capital of France is")])
    logits = logits_of(loaded.graphdef, loaded.params, tokens)
    assert loaded.tokenizer.decode([int(logits[0, -1].argmax())]) == " Paris"
