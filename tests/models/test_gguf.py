"""GGUF files written here and the demo model's, as Hugging Face would have them."""

import gguf as ggml
import numpy as np
import pytest

from gsrq_jax.errors import InputError
from gsrq_jax.models import gguf, loading
from gsrq_jax.models.config import RopeScaling

LAYERS, HIDDEN, INNER, VOCAB = 2, 64, 96, 40
HEADS, KV_HEADS, HEAD_DIM = 4, 2, 32  # heads · head_dim is not hidden

PARTS = {
    "attn_norm.weight": ("input_layernorm.weight", (HIDDEN,)),
    "ffn_norm.weight": ("post_attention_layernorm.weight", (HIDDEN,)),
    "attn_q.weight": ("self_attn.q_proj.weight", (HEADS * HEAD_DIM, HIDDEN)),
    "attn_k.weight": ("self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_v.weight": ("self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)),
    "attn_output.weight": ("self_attn.o_proj.weight", (HIDDEN, HEADS * HEAD_DIM)),
    "ffn_gate.weight": ("mlp.gate_proj.weight", (INNER, HIDDEN)),
    "ffn_up.weight": ("mlp.up_proj.weight", (INNER, HIDDEN)),
    "ffn_down.weight": ("mlp.down_proj.weight", (HIDDEN, INNER)),
}
QWEN_PARTS = {
    "attn_q_norm.weight": ("self_attn.q_norm.weight", (HEAD_DIM,)),
    "attn_k_norm.weight": ("self_attn.k_norm.weight", (HEAD_DIM,)),
}
BIASES = {
    f"attn_{short}.bias": (f"self_attn.{short[0]}_proj.bias", (rows,))
    for short, rows in {
        "q": HEADS * HEAD_DIM,
        "k": KV_HEADS * HEAD_DIM,
        "v": KV_HEADS * HEAD_DIM,
        "output": HIDDEN,
    }.items()
}


def weights(parts=PARTS, *, tied=True) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Names llama.cpp → Hugging Face, and random weights by the latter."""
    names = {"token_embd.weight": "model.embed_tokens.weight", "output_norm.weight": "model.norm"}
    names["output_norm.weight"] += ".weight"
    shapes = {"model.embed_tokens.weight": (VOCAB, HIDDEN), "model.norm.weight": (HIDDEN,)}
    if not tied:
        names["output.weight"] = "lm_head.weight"
        shapes["lm_head.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        for ours, (theirs, shape) in parts.items():
            names[f"blk.{layer}.{ours}"] = f"model.layers.{layer}.{theirs}"
            shapes[f"model.layers.{layer}.{theirs}"] = shape
    rng = np.random.default_rng(0)
    return names, {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """llama.cpp's order, row by row: channel ``i`` of the halves to ``2i`` and ``2i + 1``."""
    half = len(rows) // heads // 2
    out = np.empty_like(rows)
    for head in range(heads):
        for second in (0, 1):
            for i in range(half):
                out[head * 2 * half + 2 * i + second] = rows[head * 2 * half + second * half + i]
    return out


def write(
    path,
    architecture="llama",
    *,
    parts=PARTS,
    tied=True,
    quantise=None,
    fields=None,
    change=None,
    extra=None,
    permuted=None,
):
    """Write a file; returns the weights it should be read as.

    ``fields`` replace metadata (None drops one), ``change`` maps tensors by llama.cpp's name.
    """
    names, values = weights(parts, tied=tied)
    writer = ggml.GGUFWriter(path, architecture)
    metadata = {
        "block_count": LAYERS,
        "context_length": 512,
        "embedding_length": HIDDEN,
        "feed_forward_length": INNER,
        "attention.head_count": HEADS,
        "attention.head_count_kv": KV_HEADS,
        "attention.key_length": HEAD_DIM,
        "attention.value_length": HEAD_DIM,
        "rope.freq_base": 5e5,
        "attention.layer_norm_rms_epsilon": 1e-5,
    } | (fields or {})
    for key, value in metadata.items():
        add = {
            int: writer.add_uint32,
            float: writer.add_float32,
            str: writer.add_string,
            list: writer.add_array,
        }
        if value is not None:
            add[type(value)](f"{architecture}.{key}", value)
    kind = ggml.GGMLQuantizationType
    if permuted is None:
        permuted = architecture == "llama"
    for ours, theirs in names.items():
        value = values[theirs]
        if quantise and value.ndim == 2:
            data = ggml.quants.quantize(value, quantise)
            values[theirs] = ggml.quants.dequantize(data, quantise)
        else:
            data = value
        for part, heads in (("attn_q.", HEADS), ("attn_k.", KV_HEADS)):
            if part in ours and permuted:
                data = permute(data, heads)
        if change and ours in change:
            data = change[ours](data)
        if data is not None:
            quantised = quantise if data.dtype == np.uint8 else None
            writer.add_tensor(ours, data, raw_dtype=quantised and kind(quantised))
    for name, data in (extra or {}).items():
        writer.add_tensor(name, data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return values


def check(read, expected):
    assert set(read) == set(expected)
    assert len(read) == len(expected)
    for name, value in expected.items():
        assert read[name].dtype == np.float32
        np.testing.assert_array_equal(read[name], value, err_msg=name)


@pytest.mark.parametrize("quantise", [None, "F16", "BF16", "Q8_0", "Q4_0", "Q4_1"])
def test_llama_in_every_kind_of_storage(tmp_path, quantise):
    kind = quantise and ggml.GGMLQuantizationType[quantise]
    expected = write(tmp_path / "a.gguf", quantise=kind)
    config, tensors, tokenizer = gguf.read(tmp_path / "a.gguf")
    check(tensors, expected)
    assert tokenizer is None
    assert (config.family, config.vocab_size, config.layers) == ("llama", VOCAB, LAYERS)
    assert (config.hidden_size, config.intermediate_size) == (HIDDEN, INNER)
    assert (config.heads, config.kv_heads, config.head_dim) == (HEADS, KV_HEADS, HEAD_DIM)
    assert (config.max_length, config.norm_eps, config.rope_theta) == (512, 1e-5, 5e5)
    assert config.rope_scaling is None
    assert config.tied_embeddings
    assert (config.qk_norm, config.attention_bias, config.mlp_bias) == (False, False, False)


def test_untied_head_and_biases(tmp_path):
    expected = write(tmp_path / "a.gguf", parts=PARTS | BIASES, tied=False)
    config, tensors, _ = gguf.read(tmp_path / "a.gguf")
    check(tensors, expected)  # biases of q and k are permuted like their rows
    assert config.attention_bias
    assert not config.tied_embeddings
    loading.params_from_hf(config, tensors)


def test_qwen3_is_not_permuted_and_has_head_norms(tmp_path):
    expected = write(tmp_path / "a.gguf", "qwen3", parts=PARTS | QWEN_PARTS)
    config, tensors, _ = gguf.read(tmp_path / "a.gguf")
    check(tensors, expected)
    assert config.family == "qwen3"
    assert config.qk_norm
    loading.params_from_hf(config, tensors)


def test_defaults_of_llama_cpp(tmp_path):
    """Old files name neither the head's size nor the base, and no KV heads without GQA."""
    fields = {"attention.key_length": None, "attention.value_length": None, "rope.freq_base": None}
    write(tmp_path / "a.gguf", fields=fields | {"attention.head_count_kv": None})
    config, *_ = gguf.read(tmp_path / "a.gguf")
    assert (config.head_dim, config.rope_theta, config.kv_heads) == (HIDDEN // HEADS, 1e4, HEADS)


def llama3_factors(head_dim: int, theta: float, factor: float) -> np.ndarray:
    """The table as llama.cpp's converter computes it."""
    factors = []
    for i in range(0, head_dim, 2):
        wavelength = 2 * np.pi * theta ** (i / head_dim)
        if wavelength < 8192 / 4:
            factors.append(1.0)
        elif wavelength > 8192 / 1:
            factors.append(factor)
        else:
            smooth = (8192 / wavelength - 1) / (4 - 1)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_from_its_factors(tmp_path, factor):
    extra = {"rope_freqs.weight": llama3_factors(HEAD_DIM, 5e5, factor)}
    assert len(np.unique(extra["rope_freqs.weight"])) > 2  # the interpolated part is in it
    expected = write(tmp_path / "a.gguf", extra=extra)
    config, tensors, _ = gguf.read(tmp_path / "a.gguf")
    assert config.rope_scaling == RopeScaling(factor, 1.0, 4.0, 8192)
    check(tensors, expected)


def test_other_factors_are_refused(tmp_path):
    extra = {"rope_freqs.weight": np.linspace(1, 8, HEAD_DIM // 2, dtype=np.float32)}
    write(tmp_path / "a.gguf", extra=extra)
    with pytest.raises(InputError, match=r"factors in rope_freqs\.weight are not LLaMA 3's"):
        gguf.read(tmp_path / "a.gguf")


def test_linear_scaling(tmp_path):
    write(tmp_path / "a.gguf", fields={"rope.scaling.type": "linear", "rope.scaling.factor": 4.0})
    assert gguf.read(tmp_path / "a.gguf")[0].rope_scaling == 4.0


def test_a_sliding_window_cuts_the_context(tmp_path):
    write(tmp_path / "a.gguf", fields={"attention.sliding_window": 128})
    assert gguf.read(tmp_path / "a.gguf")[0].max_length == 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"architecture": "gemma"}, "architecture 'gemma' is not supported, only llama, qwen3"),
        ({"fields": {"rope.scaling.type": "yarn"}}, "scaling of the type 'yarn' is not supported"),
        ({"fields": {"rope.dimension_count": 16}}, "dimension_count is 16 where heads have 32"),
        ({"fields": {"attention.value_length": 64}}, "value_length is 64 where heads have 32"),
        ({"fields": {"block_count": None}}, r"llama\.block_count is missing"),
        ({"fields": {"attention.head_count_kv": [2, 1]}}, r"is \[2, 1\], not one number"),
        ({"fields": {"attention.head_count": 3}}, "3 query heads cannot share"),
        ({"change": {"token_embd.weight": lambda x: None}}, "token_embd.weight is missing"),
        (
            {"extra": {"blk.0.ffn_gate_inp.weight": np.ones((8, HIDDEN), np.float32)}},
            r"blk\.0\.ffn_gate_inp\.weight belongs to no dense LLaMA-family decoder",
        ),
        (
            {"extra": {"blk.0.attn_q.weight.x": np.ones(4, np.int32)}},
            "of the type I32, which cannot be read",
        ),
    ],
)
def test_files_that_cannot_be_used(tmp_path, arguments, message):
    write(tmp_path / "a.gguf", **arguments)
    with pytest.raises(InputError, match=message) as raised:
        gguf.read(tmp_path / "a.gguf")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"blk.1.ffn_up.weight": lambda x: x[:-1]}, "mlp.up_proj.weight has shape"),
        ({"blk.1.ffn_up.weight": lambda x: None}, "missing tensor model.layers.1.mlp.up_proj"),
        ({"blk.0.attn_q.weight": lambda x: x[:-3]}, "projection of 4 heads has 125 rows"),
    ],
)
def test_weights_that_do_not_fit_the_config(tmp_path, change, message):
    write(tmp_path / "a.gguf", change=change)
    with pytest.raises(InputError, match=message):
        loading.load(tmp_path / "a.gguf")


def test_not_a_gguf_file(tmp_path):
    with pytest.raises(InputError, match=r"cannot read .*: No such file"):
        gguf.read(tmp_path / "none.gguf")
    for content in (b"", b"PK\3\4 a wheel"):
        (tmp_path / "a.gguf").write_bytes(content)
        with pytest.raises(InputError, match="is not a GGUF file: it begins with"):
            gguf.read(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(b"GGUF" + (99).to_bytes(4, "little") + bytes(64))
    with pytest.raises(InputError, match=r"cut off, damaged or too new .*version 99"):
        gguf.read(tmp_path / "a.gguf")


def test_truncated_anywhere(tmp_path):
    write(tmp_path / "whole.gguf", quantise=ggml.GGMLQuantizationType.Q8_0)
    whole = (tmp_path / "whole.gguf").read_bytes()
    tensor = ggml.GGUFReader(tmp_path / "whole.gguf").tensors[-1]
    end = tensor.data_offset + tensor.n_bytes
    for length in (*range(4, 2000, 97), end // 2, end - 1):
        (tmp_path / "a.gguf").write_bytes(whole[:length])
        with pytest.raises(InputError, match="cut off, damaged or too new"):
            gguf.read(tmp_path / "a.gguf")
    (tmp_path / "a.gguf").write_bytes(whole[:end])
    gguf.read(tmp_path / "a.gguf")


@pytest.mark.demo_model
def test_demo_model_as_transformers_reads_it(read_demo_model, gguf_goldens):
    config, tensors, tokenizer = read_demo_model
    golden = np.load(gguf_goldens / "weights.npz")
    for name in (name for name in golden.files if ":" not in name):
        weight = tensors[name]
        assert weight.shape == tuple(golden[f"{name}:shape"])
        rows = weight.reshape(len(weight), -1)[:: max(1, len(weight) // 32), :8]
        np.testing.assert_array_equal(rows, golden[name], err_msg=name)
        norm = np.linalg.norm(weight.astype(np.float64))
        np.testing.assert_allclose(norm, golden[f"{name}:norm"], rtol=1e-12)
    assert (config.layers, config.kv_heads, config.head_dim) == (30, 3, 64)
    assert (config.norm_eps, config.rope_theta, config.max_length) == (1e-5, 1e5, 8192)
    assert (config.bos_token, config.eos_tokens) == (1, (2,))
    assert config.tied_embeddings
    assert tokenizer.has_chat_template
