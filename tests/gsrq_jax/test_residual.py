import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gsrq_jax.errors import InputError
from gsrq_jax.residual import decode, encode, fit, refit
from gsrq_jax.spec import ResidualSpec

KEY = jax.random.key(3)
SMALL = ResidualSpec(dim=8, group=4, stages=3, codewords=16)
quick = functools.partial(fit, iterations=4, warmup=3, chunk=256)


def normal(*shape, seed=0):
    return jax.random.normal(jax.random.key(seed), shape)


def random_codewords(*lead, spec=SMALL):
    return normal(*lead, *spec.codebook_shape, seed=5)


def greedy(x, codewords):
    """One vector at a time, in float64."""
    groups, stages, _, group = codewords.shape
    codes = np.zeros((len(x), groups, stages), int)
    for i, g in np.ndindex(len(x), groups):
        left = np.asarray(x[i, g * group : (g + 1) * group], np.float64)
        for r in range(stages):
            words = np.asarray(codewords[g, r], np.float64)
            codes[i, g, r] = ((left - words) ** 2).sum(-1).argmin()
            left = left - words[codes[i, g, r]]
    return codes


def test_encode_is_greedy():
    x, codewords = normal(2, 3, 20, 8), random_codewords(2, 3)
    codes = encode(x, codewords)
    assert (codes.dtype, codes.shape) == (jnp.uint8, (2, 3, 20, 2, 3))
    for i, j in np.ndindex(2, 3):
        np.testing.assert_array_equal(codes[i, j], greedy(x[i, j], codewords[i, j]))


def test_decode_sums_codewords():
    codewords = random_codewords(2)
    codes = jax.random.randint(KEY, (2, 9, 2, 3), 0, 16).astype(jnp.uint8)
    x = decode(codes, codewords)
    for lead, n, g in np.ndindex(2, 9, 2):
        words = [np.asarray(codewords[lead, g, r, codes[lead, n, g, r]]) for r in range(3)]
        np.testing.assert_allclose(x[lead, n, 4 * g : 4 * g + 4], sum(words), atol=1e-6)
    half = decode(codes, codewords.astype(jnp.bfloat16), jnp.bfloat16)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(half, x, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_chunks_do_not_change_codes(chunk):
    x, codewords = normal(2, 30, 8), random_codewords(2)
    np.testing.assert_array_equal(encode(x, codewords, chunk=chunk), encode(x, codewords))


def test_jit_and_vmap():
    x, codewords = normal(4, 30, 8), random_codewords(4)
    codes = jax.jit(encode)(x, codewords)
    np.testing.assert_array_equal(codes, encode(x, codewords))
    np.testing.assert_array_equal(jax.vmap(encode)(x, codewords), codes)
    np.testing.assert_allclose(jax.jit(decode)(codes, codewords), decode(codes, codewords))


def test_gradient_reaches_the_codewords_used():
    codewords = random_codewords()
    codes = encode(normal(20, 8), codewords)
    slope = normal(20, 8, seed=9)
    gradient = jax.grad(lambda c: jnp.sum(slope * decode(codes, c)))(codewords)
    expected = np.zeros(codewords.shape)
    for n, g, r in np.ndindex(20, 2, 3):
        expected[g, r, codes[n, g, r]] += slope[n, 4 * g : 4 * g + 4]
    np.testing.assert_allclose(gradient, expected, atol=1e-5)


def test_stages_never_fall_back_and_report_is_what_decoding_gives():
    x = normal(2, 500, 8)
    weights = jax.random.uniform(KEY, (2, 500)).at[:, ::5].set(0)
    x = x.at[:, ::5].set(jnp.nan)
    codewords, report = quick(KEY, x, SMALL, weights)
    assert codewords.shape == (2, *SMALL.codebook_shape)
    assert codewords.dtype == jnp.float32
    assert (np.diff(report.error, axis=-1) < 0).all()
    assert (np.diff(report.cosine, axis=-1) > 0).all()
    x = jnp.nan_to_num(x)
    for stages in range(1, 4):
        first = codewords[:, :, :stages]
        y = decode(encode(x, first), first).reshape(2, 500, 2, 4)
        points = x.reshape(2, 500, 2, 4)
        w = weights[:, :, None]
        error = jnp.sum(w * jnp.sum((points - y) ** 2, -1), 1)
        error /= jnp.sum(w * jnp.sum(points**2, -1), 1)
        lengths = jnp.linalg.norm(points, axis=-1) * jnp.linalg.norm(y, axis=-1)
        cosine = jnp.sum(points * y, -1) / jnp.maximum(lengths, 1e-30)
        cosine = jnp.sum(w * cosine, 1) / jnp.sum(w, 1)
        np.testing.assert_allclose(report.error[..., stages - 1], error, rtol=1e-4)
        np.testing.assert_allclose(report.cosine[..., stages - 1], cosine, rtol=1e-4)


def test_weights_pull_the_codewords():
    x = normal(2, 500, 8)
    favoured = jnp.broadcast_to(jnp.arange(500) < 100, (2, 500))
    even, _ = quick(KEY, x, SMALL, jnp.ones((2, 500)))
    pulled, _ = quick(KEY, x, SMALL, jnp.where(favoured, 20.0, 1.0))

    def error(codewords):
        return jnp.sum((x - decode(encode(x, codewords), codewords))[:, :100] ** 2)

    assert error(pulled) < 0.8 * error(even)


def test_weights_of_groups_are_those_of_each_groups_own_problem():
    x, weights = normal(2, 300, 8), jax.random.uniform(KEY, (2, 300, 2)).at[:, ::7].set(0)
    x = x.at[:, ::7].set(jnp.nan)
    words, report = quick(KEY, x, SMALL, weights)
    for group in range(2):
        alone, alone_report = quick(KEY, x, SMALL, weights[..., group])
        np.testing.assert_allclose(words[:, group], alone[:, group], atol=1e-5)
        np.testing.assert_allclose(report.error[:, group], alone_report.error[:, group], rtol=1e-4)
    assert np.abs(words[:, 0] - quick(KEY, x, SMALL, weights[..., 1])[0][:, 0]).max() > 0.1


def test_more_than_256_codewords():
    x, words = normal(40, 4), normal(2, 3, 2048, 2, seed=5)
    codes = encode(x, words)
    assert codes.dtype == jnp.uint16
    assert codes.max() > 255
    np.testing.assert_array_equal(codes, greedy(np.asarray(x), np.asarray(words)))
    picked = np.asarray(words)[np.arange(2)[:, None], np.arange(3), np.asarray(codes)]
    np.testing.assert_allclose(decode(codes, words), picked.sum(-2).reshape(40, 4), atol=1e-5)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_batches_do_not_change_the_result(batch_size):
    x = normal(2, 500, 8)
    together, _ = quick(KEY, x, SMALL)
    batched, _ = quick(KEY, x, SMALL, batch_size=batch_size)
    np.testing.assert_allclose(batched, together, atol=1e-5)


def test_points_spread_over_devices():
    x = normal(640, 8)
    one, one_report = quick(KEY, x, SMALL)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    share = functools.partial(quick, KEY, spec=SMALL, axis_name="data")
    mapped = jax.shard_map(share, mesh=mesh, in_specs=P("data"), out_specs=P())
    many, report = jax.jit(mapped)(x)
    np.testing.assert_allclose(many, one, atol=1e-4)
    np.testing.assert_allclose(report.error, one_report.error, rtol=1e-4)


@pytest.mark.parametrize("rule", ["kmeans", "spherical"])
def test_other_rules(rule):
    codewords, report = quick(KEY, normal(300, 8), SMALL, rule=rule)
    assert np.isfinite(codewords).all()
    assert report.error[:, 0].max() < (0.5 if rule == "kmeans" else 0.9)


@pytest.mark.parametrize(
    ("dim", "codewords", "rates"),
    [
        (64, 256, (0.25, 0.375, 0.5, 0.75, 1, 1.5, 2)),
        (64, 16, (0.25, 0.375, 0.5, 0.75, 1, 1.5, 2)),
        (128, 256, (0.25, 0.375, 0.5, 0.75, 1, 1.5, 2)),
        (128, 16, (0.25, 0.375, 0.5, 0.75, 1, 1.5, 2)),
    ],
)
def test_nominal_rates(dim, codewords, rates):
    """Stages are fitted in turn, so the highest rate's codewords hold those of all the others."""
    specs = [ResidualSpec.from_bits(bits, dim, codewords=codewords) for bits in rates]
    x = normal(1024, dim) * jnp.exp(-jnp.arange(dim) / dim)
    # Fitted at the highest rate once: a fit of fewer stages differs in its random draws only.
    fitted, _ = fit(KEY, x, specs[-1], iterations=3, warmup=2)
    assert fitted.shape == specs[-1].codebook_shape
    errors = []
    for bits, spec in zip(rates, specs, strict=True):
        words = fitted[:, : spec.stages]
        assert words.shape == spec.codebook_shape
        codes = encode(x, words)
        assert codes.shape == (1024, spec.groups, spec.stages)
        assert codes.size * spec.code_bits / x.size == bits
        y = decode(codes, words)
        assert y.shape == x.shape
        errors.append(float(jnp.sum((x - y) ** 2) / jnp.sum(x**2)))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


# Beam


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


@pytest.mark.parametrize("chunk", [1, 7, 30])
def test_chunks_do_not_change_beams(chunk):
    x, codewords = normal(2, 30, 8), random_codewords(2)
    whole = encode(x, codewords, beam=4)
    np.testing.assert_array_equal(encode(x, codewords, beam=4, chunk=chunk), whole)
    np.testing.assert_array_equal(
        jax.vmap(functools.partial(encode, beam=4, chunk=chunk))(x, codewords), whole
    )


@pytest.mark.parametrize("beam", [1, 8, 32])
def test_many_vectors_take_bounded_memory(beam):
    """32768 vectors by 256 codewords and the beam would be 32 MiB to 1 GiB of scores."""
    x = jax.ShapeDtypeStruct((2**15, 8), jnp.float32)
    words = jax.ShapeDtypeStruct((1, 2, 256, 8), jnp.float32)
    compiled = encode.lower(x, words, beam=beam).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 5 * 2**26


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

    # Greedy, trained with the beam, and refitted: each better than the one before.
    plain, _ = quick(KEY, x, SMALL, weights, rule="kmeans")
    codes = encode(x, plain, beam=4)
    before = (w * squared_errors(x, codes, plain)).sum(1) / (w * energy).sum(1)
    assert (report.error[..., -1] < 0.9 * before).all()


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
    weights = jax.random.uniform(KEY, (2, 250)).at[:, ::5].set(0)
    codes = encode(x, words, beam=4)
    codes = jnp.where(codes == 3, 0, codes)  # codeword 3 of every stage is unused
    new = refit(x.at[:, ::5].set(jnp.nan), codes, words, weights, ridge=0.01, chunk=chunk)
    assert (new.shape, new.dtype) == (words.shape, jnp.float32)
    for i, g in np.ndindex(2, 2):
        points = np.asarray(x[i, :, 4 * g : 4 * g + 4], np.float64)
        w = np.asarray(weights[i], np.float64)
        expected = least_squares(points, codes[i, :, g], np.asarray(words[i, g]), w, 0.01)
        np.testing.assert_allclose(new[i, g], expected, atol=1e-3)
        np.testing.assert_array_equal(new[i, g, :, 3], words[i, g, :, 3])
    each = refit(x, codes, words, jnp.stack([weights, jnp.ones_like(weights)], -1), ridge=0.01)
    np.testing.assert_allclose(each[:, 0], new[:, 0], atol=1e-4)
    assert np.abs(each[:, 1] - new[:, 1]).max() > 0.01


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
    np.testing.assert_array_equal(refit(exact, codes, words), words)
    np.testing.assert_array_equal(refit(x, codes, words, jnp.zeros(300)), words)


def test_the_product_of_accelerators_is_the_sum_of_rows(monkeypatch):
    x, words = normal(300, 8), random_codewords()
    codes = encode(x, words)
    rows = refit(x, codes, words)
    with monkeypatch.context() as m:
        m.setattr(jax.lax, "platform_dependent", lambda *args, cpu, default: default(*args))
        jax.clear_caches()
        product = refit(x, codes, words)
    jax.clear_caches()
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


def test_bad_input():
    with pytest.raises(InputError, match="spec is for 8 channels, but the points have 6"):
        fit(KEY, normal(100, 6), SMALL)
    for shape in ((99,), (100, 3), (100, 1)):
        says = rf"shape \(100,\), one a point, or \(100, 2\), .* got {re.escape(str(shape))}"
        with pytest.raises(InputError, match=says):
            fit(KEY, normal(100, 8), SMALL, jnp.ones(shape))
    with pytest.raises(InputError, match="16 codewords need as many points, got 10"):
        fit(KEY, normal(10, 8), SMALL)
    with pytest.raises(InputError, match="unknown rule 'median'"):
        fit(KEY, normal(100, 8), SMALL, rule="median")
    for x, codewords in (
        (normal(5, 6), random_codewords()),
        (normal(2, 5, 8), random_codewords(3)),
        (normal(5, 8), jnp.zeros((2, 1, 65537, 4))),
    ):
        with pytest.raises(InputError, match="cannot encode"):
            encode(x, codewords)
    with pytest.raises(InputError, match="do not fit codes"):
        decode(jnp.zeros((5, 2, 2), jnp.uint8), random_codewords())
