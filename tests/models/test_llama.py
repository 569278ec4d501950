"""The model's mechanics; its numbers are compared with transformers in test_loading.py."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsrq_jax.errors import InputError
from gsrq_jax.models import llama
from gsrq_jax.models.config import LLAMA_3_8B, LlamaConfig, RopeScaling, inverse_frequencies
from gsrq_jax.models.int8 import from_dense
from gsrq_jax.rope import turns

TINY = LlamaConfig(
    family="llama",
    vocab_size=50,
    hidden_size=32,
    intermediate_size=48,
    layers=3,
    heads=4,
    kv_heads=2,
    head_dim=8,
    max_length=64,
)


def causal(q, k, v, x_layer):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), None


@functools.cache
def tiny(dtype=jnp.float32, **changes):
    """A graph and parameters drawn in numpy, which spares the initialisers' compilation."""
    graphdef, shapes = llama.abstract(dataclasses.replace(TINY, **changes), dtype)
    rng = np.random.default_rng(0)

    def draw(path, shape):
        x = rng.standard_normal(shape.shape)
        x = 1 + 0.1 * x if "norm" in jax.tree_util.keystr(path) else x / shape.shape[-1] ** 0.5
        return jnp.asarray(x, shape.dtype)

    return graphdef, jax.tree_util.tree_map_with_path(draw, shapes)


@functools.partial(jax.jit, static_argnums=(0, 4))
def forward(graphdef, params, tokens, positions, attention=causal):
    return llama.apply(graphdef, params, tokens, positions, attention)


def positions_of(tokens):
    return jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)


@pytest.fixture
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 12), 0, TINY.vocab_size)


def test_llama_3_8b_traces_with_its_parameter_count():
    graphdef, params = llama.abstract(LLAMA_3_8B, jnp.bfloat16)
    assert llama.count(params) == 8_030_261_248
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype(jnp.bfloat16)}
    assert {leaf.shape[0] for leaf in jax.tree.leaves(params["layers"])} == {32}

    def trace(params, tokens):
        hidden, y = llama.apply(
            graphdef,
            params,
            tokens,
            positions_of(tokens),
            lambda q, k, v, x: (causal(q, k, v, x)[0], (k, v)),
        )
        return hidden, llama.logits(graphdef, params, hidden), y

    tokens = jax.ShapeDtypeStruct((2, 256), jnp.int32)
    hidden, logits, (k, v) = jax.eval_shape(trace, params, tokens)
    assert (hidden.shape, hidden.dtype) == ((2, 256, 4096), jnp.bfloat16)
    assert (logits.shape, logits.dtype) == ((2, 256, 128256), jnp.float32)
    assert k.shape == v.shape == (32, 2, 256, 8, 128)


def test_a_new_model_is_what_abstract_promises():
    graphdef, params = nnx.split(llama.Llama(TINY, rngs=nnx.Rngs(0)))
    abstract_graphdef, abstract_params = llama.abstract(TINY)
    assert graphdef == abstract_graphdef
    shapes = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype), params)
    assert jax.tree.leaves(shapes) == jax.tree.leaves(abstract_params)
    assert jax.tree.structure(shapes) == jax.tree.structure(abstract_params)
    kernel = params["layers"]["mlp"]["up_proj"]["kernel"][...]
    assert not np.allclose(kernel[0], kernel[1])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float32])
def test_dtypes(tokens, dtype):
    graphdef, params = tiny(dtype)
    seen = []

    def attention(q, k, v, x_layer):
        seen.extend([q.dtype, k.dtype, v.dtype])
        return causal(q, k, v, x_layer)[0].astype(jnp.float32), None

    hidden, _ = forward(graphdef, params, tokens, positions_of(tokens), attention)
    assert hidden.dtype == dtype
    assert set(seen) == {jnp.dtype(dtype)}
    assert llama.logits(graphdef, params, hidden).dtype == jnp.float32


def test_bfloat16_follows_float32(tokens):
    graphdef, params = tiny()
    low_graphdef, low = tiny(jnp.bfloat16)
    want, _ = forward(graphdef, params, tokens, positions_of(tokens))
    got, _ = forward(low_graphdef, low, tokens, positions_of(tokens))
    error = np.linalg.norm(got.astype(jnp.float32) - want) / np.linalg.norm(want)
    assert error < 0.03


def test_per_layer_goes_in_by_layer_and_y_comes_out_stacked(tokens):
    graphdef, params = tiny()
    scale = jnp.arange(1.0, 4.0)
    extra = jnp.ones((3, 2, 12, 2, 8))

    def attention(q, k, v, x_layer):
        out, _ = causal(q, k, v + x_layer["v"], None)
        return out, {"number": x_layer["scale"] * 10, "k": k, "v": v}

    @jax.jit
    def run(params, per_layer):
        return llama.apply(graphdef, params, tokens, positions_of(tokens), attention, per_layer)

    hidden, y = run(params, {"scale": scale, "v": 0 * extra})
    plain, none = forward(graphdef, params, tokens, positions_of(tokens))
    assert none is None
    np.testing.assert_allclose(hidden, plain, atol=1e-5)
    np.testing.assert_array_equal(y["number"], scale * 10)
    assert y["k"].shape == y["v"].shape == (3, 2, 12, 2, 8)
    # What is added in the last layer alone leaves the earlier layers' values as they were.
    changed, y2 = run(params, {"scale": scale, "v": extra.at[:2].set(0)})
    assert np.abs(changed - plain).max() > 1e-2
    np.testing.assert_allclose(y2["v"], y["v"], atol=1e-5)


@pytest.mark.parametrize("int8", [False, True])
def test_unrolled_layers_have_one_product_of_an_input_and_say_the_same(tokens, int8):
    """With biases and head norms, too, which checkpoints of other families have."""
    biases = {"attention_bias": True, "mlp_bias": True, "qk_norm": True}
    graphdef, params = tiny(**biases)
    if int8:
        params = from_dense(nnx.to_flat_state(params))
        graphdef, _ = llama.abstract(dataclasses.replace(TINY, **biases), jnp.float32, int8=True)
    apart = jax.jit(llama.unrolled, static_argnums=0)(graphdef, params)
    names = {path[-2] for path, _ in nnx.to_flat_state(apart.others[0])}
    assert names >= {"qkv_proj", "gate_up_proj", "o_proj", "down_proj"}
    assert not names & {"q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"}
    assert len(apart.others) == TINY.layers - 1
    assert llama.count(apart) == llama.count(params)
    got, expected = (forward(graphdef, p, tokens, positions_of(tokens))[0] for p in (apart, params))
    assert np.abs(expected).max() > 0.1
    # Sums in another order flip roundings of int8's inputs, each 1.5e-5 of a row's largest.
    np.testing.assert_allclose(got, expected, atol=3e-4 if int8 else 1e-5)


def test_scan_equals_layers_one_by_one(tokens):
    graphdef, params = tiny()

    @jax.jit
    def unrolled(params):
        model = nnx.merge(graphdef, params)
        stacked, state = nnx.split(model.layers)
        h = model.embed_tokens(tokens)
        turn = turns(positions_of(tokens)[..., None], TINY.inv_freq)
        for i in range(TINY.layers):
            layer = nnx.merge(stacked, jax.tree.map(lambda a, i=i: a[i], state))
            h, _ = layer(h, turn, causal, None)
        return model.norm(h)

    got, _ = forward(graphdef, params, tokens, positions_of(tokens))
    np.testing.assert_allclose(got, unrolled(params), atol=1e-5)


@pytest.mark.parametrize("pad_left", [0, 5])
def test_padding_leaves_valid_positions_alone(tokens, pad_left):
    graphdef, params = tiny()
    alone, _ = forward(graphdef, params, tokens, positions_of(tokens))

    width = 20
    index = jnp.arange(width) - pad_left
    valid = (index >= 0) & (index < tokens.shape[1])
    padded = jnp.where(valid, tokens[:, jnp.clip(index, 0, tokens.shape[1] - 1)], 3)

    def masked(q, k, v, x_layer):
        mask = valid[None, None, None, :] & (index[None, :] <= index[:, None])[None, None]
        mask = jnp.broadcast_to(mask, (1, 1, width, width))
        return jax.nn.dot_product_attention(q, k, v, mask=mask), None

    positions = jnp.broadcast_to(index, padded.shape)
    got, _ = forward(graphdef, params, padded, positions, masked)
    np.testing.assert_allclose(got[:, np.asarray(valid)], alone, atol=1e-5)


def test_only_differences_of_positions_matter(tokens):
    graphdef, params = tiny()
    positions = positions_of(tokens)
    here, _ = forward(graphdef, params, tokens, positions)
    there, _ = forward(graphdef, params, tokens, positions + 1000)
    np.testing.assert_allclose(here, there, atol=1e-3)
    stretched, _ = forward(graphdef, params, tokens, positions * 3)
    assert np.abs(stretched - here).max() > 1e-2


def test_remat_leaves_gradients_as_they_are(tokens):
    graphdef, params = tiny()
    zeros = jnp.zeros((3, 2, 12, 2, 8))

    def attention(q, k, v, x_layer):
        return causal(q, k + x_layer, v + x_layer, None)

    def loss(params, zeros, remat):
        hidden, _ = llama.apply(
            graphdef, params, tokens, positions_of(tokens), attention, zeros, remat=remat
        )
        logits = llama.logits(graphdef, params, hidden)[:, :-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[:, 1:, None], axis=-1).mean()

    gradient = jax.jit(jax.grad(loss, argnums=(0, 1)), static_argnums=2)
    plain, again = gradient(params, zeros, False), gradient(params, zeros, True)
    for a, b in zip(jax.tree.leaves(plain), jax.tree.leaves(again), strict=True):
        assert np.abs(a).max() > 0
        np.testing.assert_allclose(a, b, atol=1e-6)

    def kept(remat):
        """Bytes that the layers' forward pass leaves for the backward pass."""
        _, backward = jax.eval_shape(lambda p: jax.vjp(lambda p: loss(p, zeros, remat), p), params)
        return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(backward))

    assert kept(True) < 0.7 * kept(False)


def test_tied_logits_come_from_the_embedding(tokens):
    graphdef, params = tiny(tied_embeddings=True)
    assert "lm_head" not in params
    hidden, _ = forward(graphdef, params, tokens, positions_of(tokens))
    want = hidden @ params["embed_tokens"]["embedding"][...].T
    np.testing.assert_allclose(llama.logits(graphdef, params, hidden), want, atol=1e-5)


def test_logits_of_one_row_are_those_of_it_among_others():
    graphdef, params = tiny()
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    hidden = jax.random.normal(jax.random.key(0), (3, TINY.hidden_size), jnp.bfloat16)
    want = llama.logits(graphdef, params, hidden)[:1]
    for shape in ((1, -1), (1, 1, -1)):
        got = llama.logits(graphdef, params, hidden[:1].reshape(shape))
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got.reshape(want.shape), want, rtol=1e-6, atol=1e-6)


def test_a_token_outside_the_vocabulary_is_not_silent():
    graphdef, params = tiny()
    tokens = jnp.array([[1, TINY.vocab_size]])
    hidden, _ = forward(graphdef, params, tokens, positions_of(tokens))
    assert np.isnan(hidden[0, 1]).all()


def test_scaled_frequencies_keep_interpolate_and_slow():
    plain = inverse_frequencies(16, 10_000.0)
    np.testing.assert_allclose(plain, 10_000.0 ** -(np.arange(0, 16, 2) / 16), rtol=1e-6)
    assert plain.dtype == np.float32
    np.testing.assert_allclose(inverse_frequencies(16, 10_000.0, 4.0), plain / 4)
    scaled = inverse_frequencies(16, 10_000.0, RopeScaling(8.0, 1.0, 4.0, 100))
    assert scaled.dtype == np.float32
    length = 2 * np.pi / plain
    np.testing.assert_array_equal(scaled[length < 25], plain[length < 25])
    np.testing.assert_allclose(scaled[length > 100], plain[length > 100] / 8)
    between = (length > 25) & (length < 100)
    assert between.any()
    assert (scaled[between] < plain[between]).all()
    assert (scaled[between] > plain[between] / 8).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"kv_heads": 3}, "4 query heads cannot share 3"),
        ({"head_dim": 7}, "even head_dim, got 7"),
        ({"layers": 0}, "layers must be at least 1, got 0"),
    ],
)
def test_configs_that_do_not_fit(changes, words):
    with pytest.raises(InputError, match=words):
        dataclasses.replace(TINY, **changes)
