"""Distillation on a small random model: it helps, and it goes on where it stopped."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsrq_jax.codebook import Codebooks
from gsrq_jax.models import distillation, evaluation
from gsrq_jax.models.config import LlamaConfig
from gsrq_jax.models.llama import Llama
from gsrq_jax.models.loading import LoadedModel
from gsrq_jax.spec import QuantSpec

CONFIG = LlamaConfig("llama", 64, 32, 64, 2, 4, 2, 8, 256)
SPEC = QuantSpec.from_bits(1, 8, codewords=16, window=4, sinks=1, block=4)


@pytest.fixture(scope="module")
def model():
    graphdef, params = nnx.split(Llama(CONFIG, rngs=nnx.Rngs(0)))
    return LoadedModel(CONFIG, graphdef, params, None, {}, "tiny")


@pytest.fixture(scope="module")
def books():
    keys = jax.random.split(jax.random.key(0))
    shape = (CONFIG.layers, CONFIG.kv_heads, *SPEC.key.codebook_shape)
    return Codebooks(
        key=0.1 * jax.random.normal(keys[0], shape),
        value=0.1 * jax.random.normal(keys[1], shape),
        key_mean=jnp.zeros((CONFIG.layers, CONFIG.kv_heads, CONFIG.head_dim)),
        inv_freq=jnp.tile(CONFIG.inv_freq, (CONFIG.layers, 1)),
        spec=SPEC,
    )


TOKENS = np.random.default_rng(0).integers(0, 64, (5, 40)).astype(np.int32)


def test_the_divergence_falls(model, books, tmp_path):
    refined = distillation.refine(
        model, books, TOKENS, steps=60, batch=5, rate=0.05, copies=1, seed=0, work=tmp_path
    )

    def kl(b):
        return evaluation.fidelity(model.graphdef, model.params, TOKENS, b).kl

    assert kl(refined) < 0.85 * kl(books)
    for name in ("key_mean", "inv_freq"):
        np.testing.assert_array_equal(getattr(refined, name), getattr(books, name))


def test_an_interrupted_run_goes_on_to_the_same_result(model, books, tmp_path, monkeypatch):
    options = {"steps": 6, "batch": 2, "rate": 0.03, "copies": 2, "seed": 0}
    monkeypatch.setattr(distillation, "_SAVE_EVERY", 2)
    folders = [tmp_path / name for name in ("whole", "parts")]
    for folder in folders:
        folder.mkdir()
    whole = distillation.refine(model, books, TOKENS, **options, work=folders[0])

    seen, real = [], distillation._pieces

    def stop_at_five(tokens, start, batch, copies, seed):
        seen.append(seed[1])
        if seed[1] == 5 and len(seen) == 6:
            raise KeyboardInterrupt
        return real(tokens, start, batch, copies, seed)

    monkeypatch.setattr(distillation, "_pieces", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        distillation.refine(model, books, TOKENS, **options, work=folders[1])
    parts = distillation.refine(model, books, TOKENS, **options, work=folders[1])
    assert seen == [0, 1, 2, 3, 4, 5, 4, 5]
    for name in (f.name for f in dataclasses.fields(books) if f.name != "spec"):
        np.testing.assert_array_equal(getattr(parts, name), getattr(whole, name))


def test_pieces_of_the_text_with_repeated_passages():
    tokens = np.arange(4 * 129).reshape(4, 129)
    tokens[:, 0] = -1  # what every sequence begins with
    plain = distillation._pieces(tokens, 1, 6, 0, (0, 0))
    assert plain.shape == (6, 129)
    assert (plain[:, 0] == -1).all()
    text = tokens[:, 1:].reshape(-1).tolist()
    places = [text.index(row[1]) for row in plain]
    assert len(set(places)) > 3
    for row, place in zip(plain, places, strict=True):
        assert row[1:].tolist() == text[place : place + 128]

    copied = distillation._pieces(tokens, 1, 6, 3, (0, 0))
    for row, place in zip(copied, places, strict=True):
        changed = np.flatnonzero(row[1:] != text[place : place + 128])
        assert 0 < len(changed) <= 3 * 16
        assert set(row.tolist()) <= {-1, *text[place : place + 128]}
    assert (copied != distillation._pieces(tokens, 1, 6, 3, (0, 1))).any()
