import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gsrq_jax.errors import InputError
from gsrq_jax.residual import decode, encode, fit
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
    # So many points that no rate fits them to the last bit.
    x = normal(2048, dim) * jnp.exp(-jnp.arange(dim) / dim)
    # Fitted at the highest rate once: a fit of fewer stages differs in its random draws only.
    fitted, _ = fit(KEY, x, specs[-1], iterations=3, warmup=2)
    assert fitted.shape == specs[-1].codebook_shape
    x, fitted, errors = np.asarray(x), np.asarray(fitted), []
    for bits, spec in zip(rates, specs, strict=True):
        words = fitted[:, : spec.stages]
        assert words.shape == spec.codebook_shape
        codes = encode(x, words)
        assert codes.shape == (2048, spec.groups, spec.stages)
        assert codes.size * spec.code_bits / x.size == bits
        y = jax.jit(decode)(codes, words)
        assert y.shape == x.shape
        errors.append(np.sum((x - y) ** 2) / np.sum(x**2))
    assert all(later < earlier for earlier, later in itertools.pairwise(errors))


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
    with pytest.raises(InputError, match="chunk must be at least 1, got 0"):
        encode(jnp.zeros((5, 8)), jnp.zeros((1, 2, 4, 8)), chunk=0)


@pytest.mark.parametrize(("codewords", "stages", "groups"), [(16, 9, 1), (4, 17, 2), (64, 3, 1)])
def test_stages_scored_together_are_the_same_codes(monkeypatch, codewords, stages, groups):
    """As on a GPU, where several stages of few codewords share one product."""
    rng = np.random.default_rng(codewords)
    x = rng.normal(size=(2, 500, 32)).astype(np.float32)
    words = rng.normal(size=(2, groups, stages, codewords, 32 // groups)) * stages**-0.5
    want = encode(x, words.astype(np.float32))
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    got = jax.jit(lambda x, w: encode(x, w, chunk=128))(x, words.astype(np.float32))
    np.testing.assert_array_equal(got, want)
    assert got.dtype == want.dtype == np.uint8


def test_fused_passes_give_the_same_codewords(plain_kernels):
    """Two problems, odd length, a point of weight 0 that holds NaN, stages refitted."""
    spec = ResidualSpec(dim=64, group=64, stages=2, codewords=16)
    x, w = normal(2, 203, 64).at[0, 5].set(jnp.nan), jnp.ones((2, 203)).at[0, 5].set(0)
    fused, xla = (quick(KEY, x, spec, w, refits=1, implementation=i) for i in ("mosaic_gpu", "xla"))
    np.testing.assert_allclose(fused[0], xla[0], atol=1e-5)
    np.testing.assert_allclose(fused[1].error, xla[1].error, rtol=1e-5)
