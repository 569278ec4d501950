"""The demo model in full precision against transformers' logits and greedy continuations."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsrq_jax.models import llama, loading

LENGTH = 96  # of every padded sequence: one compilation


def causal(q, k, v, x_layer):
    return jax.nn.dot_product_attention(q, k, v, is_causal=True), None


@functools.partial(jax.jit, static_argnums=0)
def forward(graphdef, params, tokens):
    """Logits [LENGTH, vocab] of one sequence."""
    hidden, _ = llama.apply(graphdef, params, tokens[None], jnp.arange(LENGTH)[None], causal)
    return llama.logits(graphdef, params, hidden[0])


@pytest.fixture(scope="module")
def model(demo_model):
    return loading.load(demo_model, dtype=jnp.float32)


@pytest.mark.demo_model
@pytest.mark.parametrize("kind", ["plain", "chat"])
def test_greedy_continuation_is_that_of_transformers(model, gguf_goldens, kind):
    golden = np.load(gguf_goldens / "generation.npz")
    prompt, new = golden[f"{kind}_prompt"], golden[f"{kind}_new"]
    assert model.tokenizer.encode(str(golden[f"{kind}_text"])) == prompt.tolist()

    # If every token of the golden is the likeliest after those before it, then taking the
    # likeliest each time, from the prompt on, gives the golden: one pass settles it.
    tokens = np.concatenate([prompt, new])
    padded = np.pad(tokens, (0, LENGTH - len(tokens)))
    logits = np.asarray(forward(model.graphdef, model.params, padded))
    predicted = logits[len(prompt) - 1 : len(tokens) - 1].argmax(-1)
    assert predicted.tolist() == new.tolist()

    first = logits[len(prompt) - 1].astype(np.float64)
    kept = first[slice(*golden["vocabulary"])]
    np.testing.assert_allclose(kept, golden[f"{kind}_logits"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(first.max(), golden[f"{kind}_max"], rtol=0, atol=2e-4)
    total = np.logaddexp.reduce(first)
    np.testing.assert_allclose(total, golden[f"{kind}_logsumexp"], rtol=0, atol=2e-4)
