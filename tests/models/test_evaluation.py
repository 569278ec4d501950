"""Fidelity against float64 sums over full logits, which come from recomputing with T × T masks."""

import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, SPEC, codebooks, model, read_through_cache

from gsrq_jax.errors import InputError
from gsrq_jax.models.evaluation import (
    Fidelity,
    cached_hidden,
    divergence,
    exact_hidden,
    fidelity,
    streamed_hidden,
)

T = 38  # 37 predictions
SEQUENCES = np.random.default_rng(0).integers(0, CONFIG.vocab_size, (3, T)).astype(np.int32)
BOOKS = codebooks()
HUGE_WINDOW = dataclasses.replace(BOOKS, spec=dataclasses.replace(SPEC, window=T))


def log_softmax(logits):
    x = np.asarray(logits, np.float64)
    x -= x.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


@functools.cache
def direct(every):
    """For each prediction ``[3, T - 1]``: nll_full, nll, kl, agree."""
    params = model()[1]
    held = np.broadcast_to(np.arange(T), SEQUENCES.shape)
    full, _ = read_through_cache(params, SEQUENCES, held, None)
    ours, _ = read_through_cache(params, SEQUENCES, held, BOOKS, every=every)
    a, b = (log_softmax(x)[:, :-1] for x in (full, ours))
    target = SEQUENCES[:, 1:, None]
    return {
        "nll_full": -np.take_along_axis(a, target, -1)[..., 0],
        "nll": -np.take_along_axis(b, target, -1)[..., 0],
        "kl": (np.exp(a) * (a - b)).sum(-1),
        "agree": (a.argmax(-1) == b.argmax(-1)).astype(float),
    }


@pytest.mark.parametrize(
    ("every", "chunk"), [(1, 128), (1, 8), (1, 37), (SPEC.block, 36), (SPEC.block, 1)]
)
def test_sums_do_not_depend_on_the_chunk(every, chunk):
    tokens = jnp.asarray(SEQUENCES)
    full, ours = exact_hidden(*model(), tokens), cached_hidden(*model(), tokens, BOOKS, every=every)
    got = divergence(*model(), tokens, full, ours, chunk=chunk)
    want = direct(every)
    assert got.keys() == want.keys()
    for name, value in want.items():
        np.testing.assert_allclose(got[name], value.sum(), rtol=2e-5, err_msg=name)
    assert 0 < want["agree"].mean() < 1
    assert want["kl"].mean() > 0.05


def test_coding_later_is_another_number():
    """``every`` does something: blocks leave more tokens exact than the worst case."""
    assert direct(SPEC.block)["kl"].sum() < direct(1)["kl"].sum()


def test_fidelity_is_the_mean_over_all_predictions():
    got = fidelity(*model(), SEQUENCES, BOOKS)
    want = {name: value.mean() for name, value in direct(1).items()}
    assert got.n == 3 * (T - 1)
    np.testing.assert_allclose(got.full_precision, np.exp(want["nll_full"]), rtol=2e-5)
    np.testing.assert_allclose(got.perplexity, np.exp(want["nll"]), rtol=2e-5)
    np.testing.assert_allclose(got.kl, want["kl"], rtol=2e-5)
    np.testing.assert_allclose(got.top1, want["agree"], rtol=1e-6)
    np.testing.assert_allclose(got.rise, got.perplexity / got.full_precision - 1, rtol=1e-12)
    assert all(isinstance(x, float) for x in dataclasses.astuple(got)[1:])


def test_a_window_over_everything_is_full_precision():
    got = fidelity(*model(), SEQUENCES[:1], HUGE_WINDOW)
    np.testing.assert_allclose(got.perplexity, got.full_precision, rtol=1e-6)
    assert abs(got.kl) < 1e-6
    assert got.top1 == 1
    assert abs(got.rise) < 1e-6


def test_another_window_and_known_hidden_states():
    exact = [exact_hidden(*model(), jnp.asarray(s)[None]) for s in SEQUENCES[:2]]
    got = fidelity(*model(), SEQUENCES[:2], BOOKS, window=3, exact=exact)
    narrow = dataclasses.replace(BOOKS, spec=dataclasses.replace(SPEC, window=3))
    want = fidelity(*model(), SEQUENCES[:2], narrow)
    np.testing.assert_allclose(dataclasses.astuple(got), dataclasses.astuple(want), rtol=1e-6)
    assert got.kl != fidelity(*model(), SEQUENCES[:2], BOOKS).kl


def test_one_prediction():
    got = fidelity(*model(), SEQUENCES[:1, :2], BOOKS)
    nll = direct(1)["nll_full"][0, 0]
    assert got.n == 1
    np.testing.assert_allclose([got.full_precision, got.perplexity], np.exp(nll), rtol=1e-5)


def test_nothing_to_predict():
    for sequences in ([], SEQUENCES[:, :1]):
        with pytest.raises(InputError, match="nothing to predict; give at least one sequence"):
            fidelity(*model(), sequences, BOOKS)


@pytest.mark.parametrize("implementation", ["codes", "decoded"])
def test_a_real_cache_token_by_token_is_the_pass_that_codes_whole_blocks(implementation):
    tokens = jnp.asarray(SEQUENCES)
    got = streamed_hidden(*model(), tokens, BOOKS, implementation=implementation, step=1)
    want = cached_hidden(*model(), tokens, BOOKS, every=SPEC.block)
    np.testing.assert_allclose(got, want, atol=2e-4)


def test_several_tokens_a_step_see_a_cache_that_is_coded_later():
    tokens = jnp.asarray(SEQUENCES)
    got = streamed_hidden(*model(), tokens, HUGE_WINDOW, implementation="codes", step=8)
    np.testing.assert_allclose(got, exact_hidden(*model(), tokens), atol=2e-4)  # 38 tokens: padded
    streamed = fidelity(*model(), SEQUENCES, BOOKS, streamed="codes")
    in_one = fidelity(*model(), SEQUENCES, BOOKS, every=SPEC.block)
    assert streamed.full_precision == in_one.full_precision
    assert 0 < streamed.kl < in_one.kl


def test_rise():
    assert Fidelity(n=1, full_precision=8.0, perplexity=10.0, kl=0.1, top1=0.5).rise == 0.25
