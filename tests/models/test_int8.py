"""Linear layers of 8-bit weights: the product, a model of them, on a mesh, over a cache, loaded."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import small_model
from flax import nnx
from jax.sharding import PartitionSpec as P

from gsrq_jax.models import int8, llama, loading, sharding
from gsrq_jax.models.generation import Generator

CONFIG = dataclasses.replace(small_model.CONFIG, heads=16, kv_heads=8, attention_bias=True)


def drawn(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


@pytest.mark.parametrize("n_in", [1, 37, 1536])
def test_weights_are_rounded_to_half_a_step(n_in):
    kernel = drawn(n_in, 2, n_in, 5) * np.float32([1e-6, 1, 3, 1e4, 0])
    weight, scale = int8.rounded(kernel)
    assert weight.shape == (2, 5, n_in)
    assert weight.dtype == jnp.int8
    got = np.asarray(weight, np.float64) * np.asarray(scale)[..., None]
    error = np.abs(got - kernel.swapaxes(1, 2))
    assert (error <= 0.5001 * np.asarray(scale)[..., None] * np.any(got, -1, keepdims=True)).all()
    largest = np.abs(np.asarray(weight, np.int32)).max(-1)
    assert (largest == [127, 127, 127, 127, 0]).all()


@pytest.mark.parametrize("rows", [(1,), (3, 7), (int8.FEW,), (int8.FEW + 1,)])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_product_is_exact_in_the_weights(rows, dtype):
    n_in, n_out = 333, 20
    weight = np.random.default_rng(0).integers(-127, 128, (n_out, n_in), np.int8)
    scale = np.abs(drawn(1, n_out)) + 0.1
    x = jnp.asarray(drawn(2, *rows, n_in) * np.exp(drawn(3, *rows, 1)), dtype)
    exact = np.asarray(x, np.float64)
    want = exact @ (weight * scale[:, None].astype(np.float64)).T
    got = jax.jit(int8.product)(x, weight, scale)
    assert got.dtype == jnp.float32
    # Errors of a row's numbers, as if each were the largest that it may be, and independent.
    largest = np.abs(exact).max(-1, keepdims=True)
    norm = np.linalg.norm(weight.astype(np.float64), axis=1) * scale
    error = np.abs(got - want) / (largest * norm)
    assert error.max() < 5 * 0.5 / 127 / 254


def test_rows_that_are_zero_or_not_finite():
    weight = np.random.default_rng(0).integers(-127, 128, (4, 6), np.int8)
    x = drawn(1, 4, 6)
    x[1], x[2, 3], x[3, 0] = 0, np.nan, np.inf
    got = np.asarray(int8.product(jnp.asarray(x), weight, np.ones(4, np.float32)))
    assert np.isfinite(got[0]).all()
    assert (got[1] == 0).all()
    assert np.isnan(got[2:]).all()


@functools.cache
def model():
    """The small model in float32, the same rounded, and the same with its kernels rounded back."""
    graphdef, params = small_model.model(CONFIG)
    rounded = int8.from_dense(nnx.to_flat_state(params))
    found = dict(nnx.to_flat_state(rounded))

    def back(path, leaf):
        if path[-1] != "kernel":
            return leaf
        weight, scale = (found[*path[:-1], name].get_value() for name in ("weight", "weight_scale"))
        return leaf.replace(jnp.swapaxes(weight * scale[..., None], -2, -1))

    flat = nnx.to_flat_state(params)
    dense = nnx.from_flat_state([(path, back(path, leaf)) for path, leaf in flat])
    return graphdef, dense, llama.abstract(CONFIG, int8=True)[0], rounded


def test_the_rounded_model_is_one_of_int8_layers():
    *_, rounded = model()
    _, shapes = llama.abstract(CONFIG, int8=True)
    assert jax.tree.structure(shapes) == jax.tree.structure(rounded)
    for want, got in zip(jax.tree.leaves(shapes), jax.tree.leaves(rounded), strict=True):
        assert (want.shape, want.dtype) == (got.shape, got.dtype)
    eights = [x for x in jax.tree.leaves(rounded) if x.dtype == jnp.int8]
    assert len(eights) == 8  # seven of all layers, and lm_head


def causal(q, k, v, _):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), None


@functools.partial(jax.jit, static_argnums=0)
def logits_of(graphdef, params, tokens):
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    hidden, _ = llama.apply(graphdef, params, tokens, positions, causal)
    return llama.logits(graphdef, params, hidden)


def test_logits_are_those_of_the_model_rounded_back():
    graphdef, dense, *rounded = model()
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, 23)))
    want, got = logits_of(graphdef, dense, tokens), logits_of(*rounded, tokens)
    assert np.linalg.norm(got - want) < 2e-4 * np.linalg.norm(want)


def test_a_mesh_writes_the_same_text():
    """Over a coded cache."""
    prompts = [np.random.default_rng(0).integers(0, CONFIG.vocab_size, 34).tolist()]
    books, found = small_model.codebooks(config=CONFIG), []
    for mesh in (None, sharding.make_mesh(CONFIG.kv_heads, (4, 2))):
        generator = Generator(*model()[2:], books, dtype=jnp.float32, mesh=mesh)
        *_, state = generator(prompts, max_new_tokens=20, max_length=64)
        found.append(np.asarray(state.tokens))
    np.testing.assert_array_equal(*found)
    assert len(np.unique(found[0])) > 5


def test_where_parameters_live():
    mesh = sharding.make_mesh(CONFIG.kv_heads, (4, 2))
    *_, rounded = model()
    placed = sharding.shardings(mesh, rounded)
    attention = placed["layers"]["self_attn"]
    for name, weight, scale in (
        ("q_proj", P(None, "model", "data"), P(None, "model")),
        ("o_proj", P(None, "data", "model"), P(None, "data")),
    ):
        assert attention[name]["weight"].get_value().spec == weight
        assert attention[name]["weight_scale"].get_value().spec == scale


def test_loaded(tiny_model):
    """The same numbers, whole and on a mesh; the fingerprint is the model's."""

    def shardings(config, params):
        return sharding.shardings(sharding.make_mesh(config.kv_heads, (4, 1)), params)

    dense = loading.load(tiny_model, dtype=jnp.float32)
    want = int8.from_dense(nnx.to_flat_state(dense.params))
    for where in (None, shardings):
        loaded = loading.load(tiny_model, dtype=jnp.float32, int8=True, shardings=where)
        assert loaded.fingerprint == dense.fingerprint
        assert loaded.graphdef == llama.abstract(loaded.config, int8=True)[0]
        jax.tree.map(np.testing.assert_array_equal, loaded.params, want)
    weight = loaded.params["layers"]["mlp"]["up_proj"]["weight"].get_value()
    assert not weight.sharding.is_fully_replicated


@pytest.mark.demo_model
def test_the_demo_model_hardly_notices(read_demo_model):
    config, tensors, tokenizer = read_demo_model
    words = "The old library stood at the end of the street. Nobody had opened its doors since the "
    tokens = jnp.asarray(tokenizer.encode(words + "war, and yet a light was seen in it at night."))
    params = loading.params_from_hf(config, tensors, jnp.float32)
    rounded = int8.from_dense(nnx.to_flat_state(params))
    want, got = (
        jax.nn.log_softmax(logits_of(llama.abstract(config, int8=eight)[0], x, tokens[None])[0])
        for eight, x in ((False, params), (True, rounded))
    )
    divergence = (jnp.exp(want) * (want - got)).sum(-1)
    assert 0 < divergence.mean() < 0.01
