"""Beam search over the stages, training with it, and the joint refit."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P
from test_residual import KEY, SMALL, greedy, normal, quick, random_codewords

from gsrq_jax.errors import InputError
from gsrq_jax.residual import _top_of_rows, decode, encode, fit, refit
from gsrq_jax.spec import ResidualSpec


def squared_errors(x, codes, codewords):
    """``[*lead, n, groups]``"""
    groups, group = codes.shape[-2], codewords.shape[-1]
    left = np.asarray(x - decode(codes, codewords), np.float64)
    return (left.reshape(*left.shape[:-1], groups, group) ** 2).sum(-1)


TINY_SPEC = ResidualSpec(dim=4, group=2, stages=3, codewords=4)


def every_error(x, codewords):
    """Of every code of `TINY_SPEC`: ``[n, groups, 4, 4, 4]``, float64."""
    words = np.asarray(codewords, np.float64)
    a, b, c = (words[:, r] for r in range(3))
    sums = a[:, :, None, None] + b[:, None, :, None] + c[:, None, None, :]
    return ((np.asarray(x, np.float64).reshape(-1, 2, 1, 1, 1, 2) - sums) ** 2).sum(-1)


def test_a_beam_that_holds_everything_finds_the_best():
    x, codewords = normal(50, 4), random_codewords(spec=TINY_SPEC)
    errors = every_error(x, codewords)
    codes = encode(x, codewords, beam=16)  # 4 × 4 sums of two stages
    best = errors.reshape(50, 2, -1).argmin(-1)
    np.testing.assert_array_equal(codes, np.stack(np.unravel_index(best, (4, 4, 4)), -1))
    assert (squared_errors(x, encode(x, codewords), codewords) > errors.min((2, 3, 4)) + 0.01).any()


def beam_search(x, codewords, beam):
    """One vector at a time, in float64."""
    groups, stages, _, group = codewords.shape
    words = np.asarray(codewords, np.float64)
    codes = np.zeros((len(x), groups, stages), int)
    for i, g in np.ndindex(len(x), groups):
        point = np.asarray(x[i, g * group : (g + 1) * group], np.float64)

        def error(path, point=point, g=g):
            return ((point - sum(words[g, r, c] for r, c in enumerate(path))) ** 2).sum()

        paths = [()]
        for _ in range(stages):
            longer = [(*p, c) for p in paths for c in range(words.shape[2])]
            paths = sorted(longer, key=error)[:beam]
        codes[i, g] = min(paths[0], tuple(greedy(x[i : i + 1], codewords)[0, g]), key=error)
    return codes


@pytest.mark.parametrize("beam", [2, 5])
def test_the_beam_is_that_of_a_plain_search(beam):
    x, codewords = normal(2, 12, 8), random_codewords(2)
    codes = encode(x, codewords, beam=beam)
    assert (codes.dtype, codes.shape) == (jnp.uint8, (2, 12, 2, 3))
    for i in range(2):
        np.testing.assert_array_equal(codes[i], beam_search(x[i], codewords[i], beam))


@pytest.mark.parametrize("beam", [2, 8, 32])
def test_no_code_is_worse_than_the_greedy_one(beam):
    """Of stages that shrink little, where a narrow beam alone sometimes loses the greedy path."""
    x, codewords = normal(4, 500, 8), normal(4, 2, 6, 16, 4, seed=5)
    ours, base = (squared_errors(x, encode(x, codewords, beam=b), codewords) for b in (beam, 1))
    assert (ours <= base + 1e-4).all()
    assert ours.mean() < 0.8 * base.mean()


def test_ties_go_to_the_better_sum_and_the_lower_codeword():
    words = jnp.asarray([[[[1.0], [-1.0]], [[1.0], [-1.0]]]])  # one group, two stages
    for beam in (2, 4):  # 0 = 1 − 1 = −1 + 1
        codes = encode(jnp.zeros((1, 1)), words, beam=beam)
        np.testing.assert_array_equal(codes[0, 0], [0, 1])
    same = jnp.zeros((1, 3, 16, 2))
    np.testing.assert_array_equal(encode(normal(5, 2), same, beam=8), np.zeros((5, 1, 3)))


def test_the_top_of_long_rows_is_that_of_all_of_them():
    x = jnp.round(4 * normal(3, 5, 2048)).at[:, :, 7].set(-jnp.inf)  # few values, so many ties
    x = x.at[0, 1].set(-jnp.inf).at[2, 4, 100:].set(-jnp.inf)
    for k in (1, 8, 16):
        want = jax.lax.top_k(x, k)
        for got in (jax.vmap(lambda x: _top_of_rows(x, k))(x), _top_of_rows(x.reshape(15, -1), k)):  # noqa: B023
            for a, b in zip(got, want, strict=True):
                np.testing.assert_array_equal(a.reshape(b.shape), b)


def test_chunks_do_not_change_beams():
    x, codewords = normal(2, 30, 8), random_codewords(2)
    whole = encode(x, codewords, beam=4)
    np.testing.assert_array_equal(encode(x, codewords, beam=4, chunk=7), whole)
    np.testing.assert_array_equal(
        jax.vmap(functools.partial(encode, beam=4, chunk=7))(x, codewords), whole
    )


@pytest.mark.parametrize("beam", [8, 32])
def test_many_vectors_take_bounded_memory(beam):
    """32768 vectors by 256 codewords and the beam would be 288 MiB to 1 GiB of scores."""
    x = jax.ShapeDtypeStruct((2**15, 8), jnp.float32)
    words = jax.ShapeDtypeStruct((1, 2, 256, 8), jnp.float32)
    compiled = encode.lower(x, words, beam=beam).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4 * 2**26


def test_bad_vectors_spoil_only_their_own_codes():
    x, codewords = normal(20, 8), random_codewords()
    codes = encode(x, codewords, beam=4)
    spoilt = encode(x.at[3].set(jnp.nan).at[7].set(jnp.inf), codewords, beam=4)
    others = np.delete(np.arange(20), [3, 7])
    np.testing.assert_array_equal(spoilt[others], codes[others])
    assert spoilt.max() < 16


def test_beams_carry_no_gradient():
    x, codewords = normal(10, 8), random_codewords()

    def loss(c, codes=None):
        codes = encode(x, c, beam=4) if codes is None else codes
        return jnp.sum((x - decode(codes, c)) ** 2)

    codes = encode(x, codewords, beam=4)
    np.testing.assert_allclose(
        jax.grad(loss)(codewords), jax.grad(loss)(codewords, codes), atol=1e-5
    )


def test_the_beam_trains_and_the_report_is_what_it_encodes():
    x = normal(2, 500, 8)
    weights = jax.random.uniform(KEY, (2, 500)).at[:, ::5].set(0)
    x = x.at[:, ::5].set(jnp.nan)
    words, report = quick(KEY, x, SMALL, weights, rule="kmeans", beam=4, refits=2)
    x = jnp.nan_to_num(x)
    energy = squared_errors(x, encode(x, words), jnp.zeros_like(words))
    w = weights[..., None]
    for stages in range(1, 4):
        first = words[:, :, :stages]
        codes = encode(x, first, beam=4)
        error = (w * squared_errors(x, codes, first)).sum(1) / (w * energy).sum(1)
        np.testing.assert_allclose(report.error[..., stages - 1], error, rtol=1e-4)
    dead = [
        16 - len(np.unique(codes[i][weights[i] > 0][:, g, -1])) for i in range(2) for g in range(2)
    ]
    np.testing.assert_array_equal(report.dead[..., -1].reshape(-1), dead)


# Refit


def least_squares(x, codes, words, weights, ridge):
    """In float64 from the whole design matrix."""
    stages, k, _ = words.shape
    hot = np.zeros((len(x), stages, k))
    hot[np.arange(len(x))[:, None], np.arange(stages), codes] = 1
    hot = hot.reshape(len(x), -1)
    gram = hot.T @ (weights[:, None] * hot)
    pull = ridge * gram.diagonal().mean()
    words = words.reshape(stages * k, -1).astype(np.float64)
    right = hot.T @ (weights[:, None] * x) + pull * words
    return np.linalg.solve(gram + pull * np.eye(len(gram)), right).reshape(stages, k, -1)


@pytest.mark.parametrize("chunk", [100, 1000])
def test_refit_is_weighted_least_squares(chunk):
    x, words = normal(2, 250, 8), random_codewords(2)
    weights = jax.random.uniform(KEY, (2, 250, 2)).at[:, ::5].set(0)
    codes = encode(x, words)
    codes = jnp.where(codes == 3, 0, codes)  # codeword 3 of every stage is unused
    new = refit(x.at[:, ::5].set(jnp.nan), codes, words, weights, ridge=0.01, chunk=chunk)
    assert (new.shape, new.dtype) == (words.shape, jnp.float32)
    for i, g in np.ndindex(2, 2):
        points = np.asarray(x[i, :, 4 * g : 4 * g + 4], np.float64)
        w = np.asarray(weights[i, :, g], np.float64)
        expected = least_squares(
            points, np.asarray(codes[i, :, g]), np.asarray(words[i, g]), w, 0.01
        )
        np.testing.assert_allclose(new[i, g], expected, atol=1e-3)
        np.testing.assert_array_equal(new[i, g, :, 3], words[i, g, :, 3])


def test_a_refit_is_never_worse():
    x, words = normal(300, 8), random_codewords()
    codes, weights = encode(x, words), jax.random.uniform(KEY, (300, 2))

    def objective(words):
        return (weights * squared_errors(x, codes, words)).sum(0)

    for _ in range(4):
        new = refit(x, codes, words, weights)
        assert (objective(new) <= objective(words)).all()
        words = new
    # Nothing to gain, in either way: codewords stay as they are.
    exact = decode(codes, words)
    np.testing.assert_array_equal(refit(exact, codes, words, weights), words)
    np.testing.assert_array_equal(refit(x, codes, words, jnp.zeros((300, 2))), words)


def test_the_product_of_accelerators_is_the_sum_of_rows(monkeypatch):
    x, words = normal(300, 8), random_codewords()
    codes = encode(x, words)
    rows = refit(x, codes, words)
    monkeypatch.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
    product = jax.jit(lambda *args: refit.__wrapped__(*args))(x, codes, words)
    np.testing.assert_allclose(product, rows, atol=1e-4)


def test_refits_spread_over_devices():
    x = normal(640, 8)
    options = {"rule": "kmeans", "beam": 3, "refits": 1}
    one, one_report = quick(KEY, x, SMALL, **options)
    codes = encode(x, one)
    anew = refit(x, codes, one)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))

    def share(x, codes):
        return quick(KEY, x, SMALL, axis_name="data", **options), refit(
            x, codes, one, axis_name="data"
        )

    mapped = jax.shard_map(share, mesh=mesh, in_specs=P("data"), out_specs=P())
    (many, report), again = jax.jit(mapped)(x, codes)
    np.testing.assert_allclose(many, one, atol=1e-4)
    np.testing.assert_allclose(report.error, one_report.error, rtol=1e-4)
    np.testing.assert_array_equal(report.dead, one_report.dead)
    np.testing.assert_allclose(again, anew, atol=1e-4)


def test_bad_input_to_beams_and_refits():
    x, words = normal(100, 8), random_codewords()
    codes = encode(x, words)
    for beam in (0, 33):
        with pytest.raises(InputError, match=rf"beam must be from 1 .* to 32, got {beam}"):
            encode(x, words, beam=beam)
        with pytest.raises(InputError, match=rf"beam must be from 1 .* to 32, got {beam}"):
            fit(KEY, x, SMALL, beam=beam)
    with pytest.raises(InputError, match="refits must be at least 0, got -1"):
        fit(KEY, x, SMALL, refits=-1)
    for call in (
        lambda: fit(KEY, x, SMALL, refits=1, ridge=0.0),
        lambda: refit(x, codes, words, ridge=0.0),
    ):
        with pytest.raises(InputError, match=r"ridge must be above 0, got 0\.0"):
            call()
    with pytest.raises(InputError, match="5 stages of 4096 codewords are too many"):
        fit(KEY, normal(5000, 4), ResidualSpec(4, 4, 5, 4096), refits=1)
    for bad in (
        (x[:99], codes, words),
        (x, codes[:, :1], words),
        (x, codes, words[:, :2]),
        (x[None], codes, words),
    ):
        with pytest.raises(InputError, match="do not fit codes of shape"):
            refit(*bad)
    with pytest.raises(InputError, match=r"weights must have the shape \(100,\)"):
        refit(x, codes, words, jnp.ones(3))
