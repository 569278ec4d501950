"""Two codewords a stage: signs chosen together, stages fitted together."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from gsrq_jax import distill, joint
from gsrq_jax.errors import InputError
from gsrq_jax.residual import decode, encode, fit
from gsrq_jax.spec import ResidualSpec

KEY = jax.random.key(0)


def random_words(stages, dim, seed=1, *lead):
    words = jax.random.normal(jax.random.key(seed), (*lead, stages, 2, dim))
    return words * 0.9 ** jnp.arange(stages)[:, None, None]


def correlated(n, dim, seed=2, rate=0.7):
    mix = jax.random.normal(jax.random.key(seed), (dim, dim)) * rate ** jnp.arange(dim)
    return jax.random.normal(jax.random.key(seed + 1), (n, dim)) @ mix.T


def errors(x, bits, words):
    left = np.asarray(x, np.float64) - plainly_decoded(bits, words)
    return np.sum(left**2, axis=-1)


def plainly_decoded(bits, words):
    words, bits = np.asarray(words, np.float64), np.asarray(bits)
    return sum(words[r, bits[:, r]] for r in range(len(words)))


def test_offset_and_vectors_are_the_codewords():
    words = random_words(5, 3)
    offset, vectors = joint.signed(words)
    bits = np.array(list(itertools.product((0, 1), repeat=5)), np.uint8)
    sums = np.asarray(offset + (2.0 * bits - 1) @ np.asarray(vectors))
    np.testing.assert_allclose(sums, plainly_decoded(bits, words), atol=1e-5)
    same = plainly_decoded(bits, joint.codewords_of(offset, vectors))
    np.testing.assert_allclose(same, plainly_decoded(bits, words), atol=1e-5)
    np.testing.assert_allclose(joint.decode(jnp.asarray(bits), words), sums, atol=1e-5)


def test_a_beam_that_holds_everything_finds_the_best():
    words, x = random_words(6, 4), correlated(37, 4)
    every = np.array(list(itertools.product((0, 1), repeat=6)), np.uint8)
    best = ((np.asarray(x, np.float64)[:, None] - plainly_decoded(every, words)) ** 2).sum(-1)
    bits = joint.encode(x, words, beam=32)
    np.testing.assert_allclose(errors(x, bits, words), best.min(axis=1), rtol=1e-4)


def searched(x, words, beam):
    """The M-algorithm in float64, a vector at a time, on the same regularised equations."""
    offset, vectors = (np.asarray(a, np.float64) for a in joint.signed(words))
    stages, dim = vectors.shape
    noise = (vectors**2).sum() / dim * 4.0 ** (-stages / dim) / (1 - 4.0 ** (-stages / dim))
    # QR of the vectors, the last stage first, so that the first is decided first.
    matrix = np.concatenate([vectors[::-1].T, np.sqrt(noise) * np.eye(stages)])
    q, r = np.linalg.qr(matrix)
    found = []
    for point in np.asarray(x, np.float64):
        target = q.T @ np.concatenate([point - offset, np.zeros(stages)])
        paths = [(0.0, ())]
        for stage in range(stages):
            row = stages - 1 - stage
            longer = []
            for error, signs in paths:
                known = sum(r[row, stages - 1 - i] * s for i, s in enumerate(signs))
                longer += [
                    (error + (target[row] - known - s * r[row, row]) ** 2, (*signs, s))
                    for s in (1, -1)
                ]
            paths = sorted(longer, key=lambda path: path[0])[:beam]
        found.append(paths[0][1])
    return (np.array(found) > 0).astype(np.uint8)


@pytest.mark.parametrize(("stages", "beam"), [(8, 1), (13, 3), (24, 4)])
def test_the_search_is_the_m_algorithm(stages, beam):
    words, x = random_words(stages, 12), correlated(40, 12)
    found, expected = np.asarray(joint.encode(x, words, beam=beam)), searched(x, words, beam)
    same = (found == expected).all(axis=1)  # but where two beginnings have one error up to rounding
    assert same.mean() > 0.95
    ours, theirs = errors(x, found, words), errors(x, expected, words)
    np.testing.assert_allclose(ours.mean(), theirs.mean(), rtol=0.02)


def test_elimination_is_the_factor_of_lapack():
    vectors = jax.random.normal(KEY, (20, 12))
    gram = vectors @ vectors.T + 0.1 * jnp.eye(20)
    for ours, theirs in zip(
        joint._eliminated(gram, vectors), joint._by_lapack(gram, vectors), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, atol=1e-4)


def test_a_wider_beam_errs_less_and_chunks_change_nothing():
    words, x = random_words(24, 12), correlated(301, 12)
    means = []
    for beam in (1, 2, 8, 32):
        bits = joint.encode(x, words, beam=beam)
        np.testing.assert_array_equal(bits, joint.encode(x, words, beam=beam, chunk=50))
        means.append(errors(x, bits, words).mean())
    assert means == sorted(means, reverse=True)
    assert means[-1] < 0.9 * means[0]


def test_stages_of_zeros_change_nothing_before_them():
    words, x = random_words(8, 6), correlated(50, 6)
    padded = jnp.pad(words, ((0, 5), (0, 0), (0, 0)))
    before, after = (joint.encode(x, w, beam=4) for w in (words, padded))
    # The estimated noise differs, so a few signs may; what is coded may hardly err more.
    more = errors(x, after, padded).mean() / errors(x, before, words).mean()
    assert more < 1.05


def test_encode_and_decode_of_many_problems():
    words = random_words(8, 4, 1, 2, 3)  # [2, groups of 3, 8 stages, 2, 4]
    x = jax.random.normal(KEY, (2, 21, 12))
    codes = encode(x, words, beam=2)
    assert (codes.shape, codes.dtype) == ((2, 21, 3, 8), jnp.uint8)
    back = decode(codes, words)
    for lead, group in np.ndindex(2, 3):
        part = x[lead, :, 4 * group : 4 * group + 4]
        expected = joint.encode(part, words[lead, group], beam=2)
        np.testing.assert_array_equal(codes[lead, :, group], expected)
        sums = plainly_decoded(expected, words[lead, group])
        np.testing.assert_allclose(back[lead, :, 4 * group : 4 * group + 4], sums, atol=1e-5)


def test_rounds_lower_the_error_of_points_that_it_has_not_seen():
    x = correlated(6000, 8, rate=0.9)
    x, held_out = jnp.split(jnp.sign(x) * jnp.abs(x) ** 1.3, [4000])  # not of Gaussian numbers
    spec = ResidualSpec(8, 8, stages=8, codewords=2)
    left = []
    for rounds in (1, 4, 16):
        words, report = fit(KEY, x, spec, iterations=rounds, beam=4)
        error = errors(x, encode(x, words, beam=4)[:, 0], words[0])
        relative = error.sum() / np.sum(np.asarray(x, np.float64) ** 2)
        np.testing.assert_allclose(report.error[0, -1], relative, rtol=1e-4)
        left.append(errors(held_out, encode(held_out, words, beam=4)[:, 0], words[0]).mean())
    assert left[1] < left[0]
    assert left[2] < 0.95 * left[0]
    assert (np.asarray(report.dead) == 0).all()
    lengths = np.linalg.norm(joint.signed(words[0])[1], axis=-1)
    assert (np.diff(lengths) <= 0).all()


def test_more_stages_than_channels_and_fewer():
    x = correlated(1000, 6)
    errs = [
        fit(KEY, x, ResidualSpec(6, 6, stages=n, codewords=2), iterations=4, beam=2)[1].error[0, -1]
        for n in (2, 6, 24, 48)
    ]
    assert errs[0] > 2 * errs[1] > 8 * errs[2] > 40 * errs[3] > 0


def test_the_least_squares_are_weighted_and_what_weighs_nothing_is_not_read():
    x = correlated(600, 6)
    weights = jax.random.uniform(jax.random.key(9), (600,)).at[::7].set(0)
    spec = ResidualSpec(6, 6, stages=6, codewords=2)
    words, report = fit(KEY, x, spec, weights, iterations=3, beam=2)
    spoilt = x.at[::7].set(jnp.nan)
    same, _ = fit(KEY, spoilt, spec, weights, iterations=3, beam=2)
    np.testing.assert_allclose(same, words, atol=1e-5)
    assert report.error.shape == (1, 6)


def test_codewords_solve_the_weighted_least_squares():
    x, weights = correlated(600, 6), jax.random.uniform(jax.random.key(9), (600,))
    bits = np.random.default_rng(0).integers(0, 2, (600, 4), np.uint8)
    words = joint._least_squares(x, weights, jnp.asarray(bits), lambda total: total)
    root = np.sqrt(np.asarray(weights, np.float64))[:, None]
    signs = root * np.concatenate([2.0 * bits - 1, np.ones((600, 1))], axis=1)
    expected = np.linalg.lstsq(signs, root * np.asarray(x, np.float64), rcond=None)[0]
    order = np.argsort(-np.linalg.norm(expected[:-1], axis=1))
    offset, vectors = joint.signed(words)
    np.testing.assert_allclose(vectors, expected[:-1][order], atol=1e-3)
    np.testing.assert_allclose(offset, expected[-1], atol=1e-3)


def test_devices_that_share_the_points_fit_the_same():
    x = correlated(2048, 6)
    weights = jax.random.uniform(jax.random.key(9), (2048,))
    spec = ResidualSpec(6, 6, stages=9, codewords=2)
    alone, report = fit(KEY, x, spec, weights, iterations=4, beam=2)
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",))
    share = functools.partial(fit, spec=spec, iterations=4, beam=2, axis_name="data")
    mapped = jax.shard_map(
        lambda x, weights: share(KEY, x, weights=weights),
        mesh=mesh,
        in_specs=(P("data"), P("data")),
        out_specs=P(),
    )
    words, spread = mapped(x, weights)
    np.testing.assert_allclose(words, alone, atol=1e-4)
    np.testing.assert_allclose(spread.error, report.error, rtol=1e-4)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"refits": 1}, "leave out refits"),
        ({"stages": 49}, "at most 8 stages a channel, got 49 for 6 channels"),
        ({"n": 1}, "two points or more"),
    ],
)
def test_what_cannot_be_fitted_jointly(given, said):
    x = jnp.ones((given.pop("n", 20), 6))
    refits = given.pop("refits", 0)
    spec = ResidualSpec(6, 6, **({"stages": 4} | given), codewords=2)
    with pytest.raises(InputError, match=said):
        fit(KEY, x, spec, refits=refits)


def test_the_mean_of_a_stage_moves_in_the_first_alone():
    words = random_words(3, 4, 1, 1, 1, 1)  # [L, H, G, R, 2, d]
    move = jnp.ones_like(words)
    books = distill.moved_words(words, move)
    offset, vectors = joint.signed(words[0, 0, 0])
    new_offset, new_vectors = joint.signed(books[0, 0, 0])
    first = jnp.sqrt(jnp.mean(jnp.square(words[0, 0, 0, 0])))
    np.testing.assert_allclose(new_offset - offset, jnp.full(4, first), rtol=1e-4)
    np.testing.assert_allclose(new_vectors, vectors, atol=1e-6)
