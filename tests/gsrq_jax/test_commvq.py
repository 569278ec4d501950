"""CommVQ: rates, what commutes, EM and search against plain definitions, the codec in a cache."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsrq_jax import attention, cache, residual
from gsrq_jax.baselines import commvq
from gsrq_jax.baselines.commvq import CommVQ, CommVQSpec, FitOptions
from gsrq_jax.calibration import LayerSamples
from gsrq_jax.errors import InputError
from gsrq_jax.rope import rotate

H, D, N, C = 3, 16, 500, 8
INV_FREQ = jnp.float32(50.0) ** (-jnp.arange(D // 2) * 2 / D)
AT = np.arange(N, dtype=np.int32)
FIELDS = {"block": 8, "window": 4, "sinks": 2}
ONE = CommVQSpec.from_bits(1, D, H, words=C, **FIELDS)
TWO = CommVQSpec.from_bits(2, D, H, words=C, **FIELDS)
QUICK = FitOptions(steps=12, rounds=4, chunk=200)


@pytest.fixture(scope="module")
def samples():
    """Correlated channels with a mean; keys before RoPE, rotated at their positions."""
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(2, H * D, H * D)) * 0.6 ** np.arange(H * D)[:, None]
    k, v = (rng.normal(size=(2, N, H * D)) @ mix + 0.3).reshape(2, N, H, D).astype(np.float32)
    ones = np.ones((N, H), np.float32)
    rotated = np.asarray(rotate(k, AT[:, None], INV_FREQ))
    return LayerSamples(rotated.astype(jnp.bfloat16), v.astype(jnp.bfloat16), ones, ones, AT)


@pytest.fixture(scope="module")
def fitted(samples):
    return {
        s: commvq.fit(jax.random.key(0), samples, INV_FREQ, s, options=QUICK) for s in (ONE, TWO)
    }


append = jax.jit(cache.append)
materialize = jax.jit(cache.materialize)


@jax.jit
def encode(codec, k, v, positions):
    return codec.encode(k, v, positions)


@jax.jit
def decode(codec, key_codes, value_codes, positions):
    return codec.decode(key_codes, value_codes, positions)


def blocks_of(samples, spec):
    """All whole blocks ``[n, b, H, d]`` and their positions."""
    count = N // spec.block

    def split(x):
        return jnp.asarray(x[: count * spec.block]).reshape(count, spec.block, *x.shape[1:])

    return split(samples.k), split(samples.v), split(samples.positions)


def relative_errors(codec, samples):
    k, v, at = blocks_of(samples, codec.spec)
    back = decode(codec, *encode(codec, k, v, at), at)
    return [
        float(np.square(new - old).sum() / np.square(np.float32(old)).sum())
        for new, old in zip(back, (k, v), strict=True)
    ]


# --- what is reported -----------------------------------------------------------------------------


def test_bits_of_the_authors_model():
    """LLaMA-3.1-8B, 8 heads of 128: 1.03 and 2.00; a cut of 87.5 % from FP16 at 2 bits."""
    one, two = (CommVQSpec.from_bits(bits, 128, 8) for bits in (1, 2))
    assert (one.stages, two.stages) == (11, 21)
    assert (one.words, one.stage_bits) == (64, 12)
    assert round(one.stored_bits, 2) == 1.03
    assert two.stored_bits == 2.0
    assert 1 - two.stored_bits / 16 == 0.875
    keys, values = two.code_shapes()
    assert keys.codes.size * 8 == 128 * 21 * 12
    assert values.codes.size * 8 == 128 * 128 * 2
    assert keys.scale.size == values.scale.size == 128 // 8


@pytest.mark.parametrize(("bits", "stages", "nominal"), [(1, 5, 31 / 32), (2, 11, 65 / 32)])
def test_bits_on_heads_of_64(bits, stages, nominal):
    spec = CommVQSpec.from_bits(bits, 64, 3, window=32)
    assert (spec.stages, spec.value_bits, spec.window) == (stages, 64 * bits, 32)
    assert spec.bits == nominal
    # A scale of 16 bits for the three heads of a token; 128 of them are 43 a head.
    assert spec.stored_bits == pytest.approx(nominal + 16 * 43 / (128 * 64))


def test_rotation_commutes_with_decoding(fitted):
    """R(p)·decode(words) is decode(R(p)·words): codewords are complex multiples."""
    words = fitted[TWO].key
    codes = jax.random.randint(jax.random.key(1), (H, 50, TWO.stages, 2), 0, C).astype(jnp.uint8)

    def difference(decode):
        decode = jax.jit(decode)
        outside = rotate(decode(codes, words), 37, INV_FREQ)
        inside = decode(codes, rotate(words, 37, INV_FREQ))
        return float(np.abs(inside - outside).max() / np.abs(outside).max())

    def with_another_second_word(codes, words):  # mirrored instead of turned
        first, second = (residual.decode(codes[..., None, :, i], words[:, None]) for i in (0, 1))
        return first + jnp.flip(second, -1)

    assert difference(commvq.decode_key) < 1e-5
    assert difference(with_another_second_word) > 0.1


def test_codewords_are_the_blocks_of_the_paper():
    """z_A + i·z_B, pair by pair, against [[x, y], [-y, x]] in the repository's convention."""
    words = np.random.default_rng(2).normal(size=(C, D)).astype(np.float32)
    a, b = 5, 3
    codes = jnp.array([a, b], jnp.uint8).reshape(1, 1, 1, 2)
    found = np.asarray(commvq.decode_key(codes, jnp.asarray(words)[None, None]))[0, 0]
    x, y = words[:, : D // 2], words[:, D // 2 :]
    np.testing.assert_allclose(found[: D // 2], x[a] - y[b], rtol=1e-6)
    np.testing.assert_allclose(found[D // 2 :], x[b] + y[a], rtol=1e-6)


def test_two_bits_are_better_than_one(fitted, samples):
    one, two = (relative_errors(fitted[s], samples) for s in (ONE, TWO))
    for low, high in zip(one, two, strict=True):
        assert high < 0.6 * low
        assert 0.001 < low < 0.4


# --- learning keys --------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames="chunk")
def em(rng, x, weights, temperatures, chunk=200):
    return commvq.em(rng, x, weights, C, temperatures, chunk=chunk)


@pytest.fixture(scope="module")
def points():
    rng = np.random.default_rng(3)
    x = rng.normal(size=(N, D)) * 0.8 ** np.arange(D)
    return jnp.asarray(0.1 * x, jnp.float32)


def hard_error(x, words, weights):
    distances = np.square(x[:, None] - every_codeword(words)).sum(-1)
    return float(weights @ distances.min(1))


def every_codeword(words):
    x, y = np.split(np.asarray(words, np.float64), 2, axis=-1)
    pair = np.stack([x[:, None] - y[None], y[:, None] + x[None]], axis=-2)  # [A, B, 2, pairs]
    return pair.reshape(C * C, -1)


def test_em_never_grows_the_error_once_assignments_are_hard(points):
    weights = jnp.ones(N)
    _, errors = em(jax.random.key(0), points, weights, jnp.full(25, 1e-12))
    errors = np.asarray(errors)
    assert (np.diff(errors) <= 1e-6 * errors[0]).all()
    assert errors[-1] < 0.8 * errors[0]


def test_em_keeps_the_best_iterate(points):
    """Too hot at the end: the last iterate is not the best."""
    weights = jnp.asarray(np.random.default_rng(4).uniform(0.5, 2, N), jnp.float32)
    temperatures = jnp.concatenate([jnp.geomspace(1e-3, 1e-5, 19), jnp.array([1.0, 1e-5] * 3)])
    words, errors = em(jax.random.key(0), points, weights, temperatures)
    assert errors[-1] > 1.2 * errors.min()
    assert hard_error(np.asarray(points), words, np.asarray(weights)) == pytest.approx(
        float(errors.min()), rel=1e-4
    )


def test_em_does_not_mind_chunks(points):
    weights, falling = jnp.ones(N), jnp.geomspace(1e-2, 1e-3, 25)
    _, whole = em(jax.random.key(0), points, weights, falling, chunk=N)
    _, parts = em(jax.random.key(0), points, weights, falling, chunk=200)
    np.testing.assert_allclose(parts, whole, rtol=1e-4)


def test_m_step_is_weighted_least_squares():
    """Against the repository's design matrix of 2C² × 2C, solved in float64."""
    rng = np.random.default_rng(5)
    count = rng.uniform(1, 5, size=(C, C))
    means = rng.normal(size=(C, C, D))
    assigned = commvq.Assigned(
        *(
            jnp.asarray(x, jnp.float32)
            for x in (count, (count[..., None] * means).sum(1), (count[..., None] * means).sum(0))
        ),
        jnp.zeros(()),
    )
    design = np.zeros((C, C, 2, C, 2))
    for a in range(C):
        for b in range(C):
            design[a, b, 0, a, 0] += 1
            design[a, b, 0, b, 1] -= 1
            design[a, b, 1, b, 0] += 1
            design[a, b, 1, a, 1] += 1
    root = np.sqrt(np.repeat(count.reshape(-1), 2))[:, None]
    pairs = means.reshape(C, C, 2, D // 2)
    best, *_ = np.linalg.lstsq(
        root * design.reshape(2 * C * C, -1), root * pairs.reshape(2 * C * C, -1), rcond=None
    )
    best = best.reshape(C, D)
    found = jnp.zeros((C, D))
    for _ in range(4):  # it holds words a little; steps that go on arrive
        found = commvq.maximize(assigned, found)
    np.testing.assert_allclose(found, best, atol=1e-3 * np.abs(best).max())


def test_words_without_points_stay():
    count = np.zeros((C, C), np.float32)
    count[:2, :2] = 10
    sums = jnp.zeros((C, D)).at[:2].set(20.0)
    words = jnp.asarray(np.random.default_rng(6).normal(size=(C, D)), jnp.float32)
    new = commvq.maximize(commvq.Assigned(jnp.asarray(count), sums, sums, jnp.zeros(())), words)
    np.testing.assert_allclose(new[2:], words[2:], rtol=1e-5)
    assert np.abs(new[:2] - words[:2]).max() > 0.1


def test_keys_take_the_nearest_codeword_of_each_stage(fitted, samples):
    codec = fitted[ONE]
    k, v, at = blocks_of(samples, ONE)
    coded, _ = encode(codec, k, v, at)
    bare = np.asarray(rotate(np.float32(k), -at[..., None], INV_FREQ), np.float64)
    scale = np.linalg.norm(bare.reshape(*bare.shape[:2], -1), axis=-1)
    kept = np.asarray(codec._gather(coded.scale))
    np.testing.assert_allclose(kept, scale, rtol=2**-8)
    back, _ = decode(codec, *encode(codec, k, v, at), at)
    found = np.asarray(rotate(back, -at[..., None], INV_FREQ)) / kept[..., None, None]
    for head in range(H):
        left = (bare[:, :, head] / kept[..., None]).reshape(-1, D)
        target = left.copy()
        for stage in range(ONE.stages):
            words = every_codeword(codec.key[head, stage])
            left -= words[np.square(left[:, None] - words).sum(-1).argmin(1)]
        expected = (target - left).reshape(found.shape[0], ONE.block, D)
        wrong = np.abs(found[:, :, head] - expected).max(-1) > 1e-4
        assert wrong.mean() < 0.01  # ties, in float32


def test_keys_are_coded_in_chunks(points, fitted, monkeypatch):
    words = fitted[ONE].key[0]
    whole = jax.jit(lambda x: commvq._encode_key(x, words))(points)
    monkeypatch.setattr(commvq, "CHUNK", 150)
    parts = jax.jit(lambda x: commvq._encode_key(x, words))(points)
    np.testing.assert_array_equal(parts, whole)


# --- learning values ------------------------------------------------------------------------------


def test_search_never_grows_the_error_and_ends_at_a_best_pair():
    rng = np.random.default_rng(7)
    words = jnp.asarray(rng.normal(size=(10, 12)), jnp.float32)
    target = jnp.asarray(rng.normal(size=(60, 12)), jnp.float32)
    bits = jnp.asarray(rng.integers(0, 2, (60, 10)), jnp.float32)
    search = jax.jit(commvq.search, static_argnums=3)

    def errors(bits):
        return np.square(np.asarray(target - bits @ words)).sum(-1)

    history = [errors(search(target, bits, words, n)) for n in (0, 1, 2, 30)]
    np.testing.assert_allclose(history[0], errors(bits), rtol=1e-5)
    assert all((after <= before + 1e-4).all() for before, after in itertools.pairwise(history))
    assert history[-1].sum() < 0.7 * history[0].sum()
    final = search(target, bits, words, 30)
    assert set(np.unique(final)) == {0.0, 1.0}
    for pair in range(5):
        for new in ([0, 0], [0, 1], [1, 0], [1, 1]):
            other = final.at[:, 2 * pair : 2 * pair + 2].set(jnp.array(new, jnp.float32))
            assert (errors(other) >= history[-1] - 1e-4).all()


def test_alternation_lowers_the_error_of_values(samples):
    x = jnp.asarray(samples.v, jnp.float32).reshape(N, -1)
    weights = jnp.asarray(np.random.default_rng(8).uniform(0.5, 2, N), jnp.float32)
    words, guess, errors = jax.jit(commvq.value_words, static_argnames=("bits", "rounds", "chunk"))(
        jax.random.key(0), x, weights, bits=H * D, rounds=5, chunk=200
    )
    errors = np.asarray(errors)
    assert (np.diff(errors) < 1e-3 * errors[0]).all()  # but for the ridge
    assert errors[-1] < 0.85 * errors[0]
    guessed = commvq._guess(x, guess)
    guessed_error, searched = (
        float(weights @ jnp.square(x - commvq.search(x, guessed, words, n) @ words).sum(-1))
        for n in (0, 4)
    )
    energy = float(weights @ jnp.square(x).sum(-1))
    assert searched < guessed_error < 0.6 * energy


def test_sweeps_of_the_spec_are_those_of_the_encoder(fitted, samples):
    errors = [
        relative_errors(
            dataclasses.replace(fitted[ONE], spec=dataclasses.replace(ONE, sweeps=sweeps)), samples
        )[1]
        for sweeps in (0, ONE.sweeps)
    ]
    assert errors[0] > 1.1 * errors[1]


def test_a_zero_token_stays_zero(fitted, samples):
    k, v, at = blocks_of(samples, ONE)
    k, v = k.at[0, 2].set(0), v.at[0, 2].set(0)
    back_k, back_v = decode(fitted[ONE], *encode(fitted[ONE], k, v, at), at)
    for back in (back_k, back_v):
        assert not back[0, 2].any()
        assert np.isfinite(back).all()


# --- the codec ------------------------------------------------------------------------------------


@pytest.mark.parametrize("spec", [ONE, TWO], ids=["one", "two"])
def test_code_shapes_are_what_encode_gives(fitted, samples, spec):
    k, v, at = blocks_of(samples, spec)
    found = encode(fitted[spec], k, v, at)
    expected = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((len(k), H, *s.shape), s.dtype), spec.code_shapes()
    )
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), found) == expected
    # 8 tokens of three heads' scales are 3 a head: 9 places, one of them spare
    assert expected[0].scale.shape[-1] == 3
    for x in decode(fitted[spec], *found, at):
        assert (x.shape, x.dtype) == (k.shape, jnp.float32)


def test_fitted_arrays(fitted, samples):
    codec = fitted[TWO]
    assert codec.key.shape == (H, TWO.stages, C, D)
    assert codec.value.shape == (H * TWO.value_bits, H * D)
    assert codec.value_guess.shape == (H * D + 1, H * TWO.value_bits)
    np.testing.assert_allclose(
        codec.value_scale, np.abs(np.float32(samples.v)).mean(0).reshape(-1), rtol=1e-4
    )
    assert all(np.isfinite(x).all() and x.dtype == jnp.float32 for x in jax.tree.leaves(codec))
    again = commvq.fit(jax.random.key(0), samples, INV_FREQ, TWO, options=QUICK)
    jax.tree.map(np.testing.assert_array_equal, codec, again)


def stacked(fitted):
    """Two layers, the second with other words."""
    one = fitted[ONE]
    other = dataclasses.replace(one, key=one.key[:, :, ::-1] * 0.9, value=one.value * 1.1)
    return one, other, jax.tree.map(lambda a, b: jnp.stack([a, b]), one, other)


def test_stacked_layers_under_vmap_and_scan(fitted, samples):
    one, other, layers = stacked(fitted)
    k, v, at = blocks_of(samples, ONE)

    def through(codec, k, v):
        codes = codec.encode(k, v, at)
        return codes, codec.decode(*codes, at)

    each = []
    for codec in (one, other):
        codes = encode(codec, k, v, at)
        each.append((codes, decode(codec, *codes, at)))
    expected = jax.tree.map(lambda *x: np.stack(x), *each)
    mapped = jax.jit(jax.vmap(through, (0, None, None)))(layers, k, v)
    scanned = jax.jit(lambda c: jax.lax.scan(lambda _, c: (None, through(c, k, v)), None, c))(
        layers
    )
    for found in (mapped, scanned[1]):
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4),
            jax.tree.map(np.float32, found),
            jax.tree.map(np.float32, expected),
        )


def run_cache(codec, k, v, *, nan: bool):
    """Two sequences of 30 and 21 tokens, as a prompt with padding and then token by token."""
    counts, most = np.array([26, 17]), 26
    empty = cache.init_cache(ONE, batch=2, kv_heads=H, head_dim=D, max_length=32, dtype=jnp.float32)
    beyond = np.arange(most)[None, :, None, None] >= counts[:, None, None, None]
    fill = np.nan if nan else 0.0
    prompt = [jnp.where(beyond, fill, x[:, :most]) for x in (k, v)]
    held = append(empty, *prompt, codec, jnp.asarray(counts))
    row = np.arange(2)
    for step in range(4):
        at = counts + step
        held = append(held, k[row, at][:, None], v[row, at][:, None], codec)
    return held


@pytest.fixture(scope="module")
def sequences():
    rng = np.random.default_rng(9)
    k, v = rng.normal(size=(2, 2, 32, H, D)).astype(np.float32)
    return jnp.asarray(k), jnp.asarray(v)


def test_attention_over_the_cache_is_that_over_what_it_decodes_to(fitted, sequences):
    codec, (k, v) = fitted[ONE], sequences
    held = run_cache(codec, k, v, nan=True)
    rng = np.random.default_rng(10)
    query = jnp.asarray(rng.normal(size=(2, 1, 2 * H, D)), jnp.float32)
    new_k, new_v = (jnp.asarray(x, jnp.float32) for x in rng.normal(size=(2, 2, 1, H, D)))
    found = jax.jit(attention.attend)(query, new_k, new_v, held, codec)
    at = ONE.sinks + jnp.arange(3 * ONE.block).reshape(3, ONE.block)
    at = jnp.broadcast_to(at, (2, *at.shape))
    split = (x[:, ONE.sinks :][:, : 3 * ONE.block].reshape(*at.shape, H, D) for x in (k, v))
    old_k, old_v = decode(codec, *encode(codec, *split, at), at)
    for row, length in enumerate((30, 21)):
        coded = (length - ONE.sinks - ONE.window) // ONE.block
        assert coded >= 1
        end = ONE.sinks + coded * ONE.block
        old = old_k[row, :coded], old_v[row, :coded]
        keys, values = (
            np.concatenate([x[row, : ONE.sinks], o.reshape(-1, H, D), x[row, end:length], n[row]])
            for x, o, n in zip((k, v), old, (new_k, new_v), strict=True)
        )
        assert np.abs(keys[ONE.sinks : end] - k[row, ONE.sinks : end]).max() > 0.1  # lossy
        q = np.asarray(query, np.float64)[row, 0].reshape(H, 2, D)
        scores = np.einsum("hqd,nhd->hqn", q, keys) / np.sqrt(D)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("hqn,nhd->hqd", weights, values).reshape(2 * H, D)
        np.testing.assert_allclose(found[row, 0], expected, atol=2e-5)


def test_padding_is_not_read(fitted, sequences):
    clean, poisoned = (run_cache(fitted[ONE], *sequences, nan=nan) for nan in (False, True))
    done = np.array([3, 1])
    for a, b in zip(jax.tree.leaves(clean), jax.tree.leaves(poisoned), strict=True):
        if a.ndim == 4 and a.shape[1] == H:  # codes: whole blocks only
            for row in range(2):
                np.testing.assert_array_equal(a[row, :, : done[row]], b[row, :, : done[row]])
    for a, b in zip(*(materialize(c, fitted[ONE]) for c in (clean, poisoned)), strict=True):
        assert np.isfinite(np.float32(a)).all()
        np.testing.assert_array_equal(a, b)


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: CommVQSpec(15, 2, 1, 16), "even head size, got 15"),
        (lambda: CommVQSpec(16, 0, 1, 16), "heads must be at least 1"),
        (lambda: CommVQSpec(16, 2, 0, 16), "stages must be at least 1"),
        (lambda: CommVQSpec(16, 2, 1, 0), "value_bits must be at least 1"),
        (lambda: CommVQSpec(16, 2, 1, 16, sweeps=-1), "sweeps must be at least 0"),
        (lambda: CommVQSpec(16, 3, 1, 15), "come in pairs"),
        (lambda: CommVQSpec(16, 2, 1, 16, words=48), "power of two from 2 to 256, got 48"),
        (lambda: CommVQSpec(16, 2, 1, 16, window=-1), "window must be at least 0"),
        (lambda: CommVQSpec.from_bits(0.05, 64, 3), "0.05 bits cannot be had"),
        (lambda: CommVQSpec.from_bits(1.01, 64, 3), "1.01 bits cannot be had"),
        (lambda: CommVQSpec.from_bits(float("nan"), 64, 3), "nan bits cannot be had"),
        (lambda: CommVQSpec.from_bits(float("inf"), 64, 3), "inf bits cannot be had"),
    ],
)
def test_bad_specs(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_other_rates():
    assert [CommVQSpec.from_bits(b, 64, 3).stages for b in (0.25, 0.375, 0.5, 0.75)] == [1, 2, 3, 4]


def test_samples_of_another_model(samples):
    fit = functools.partial(commvq.fit, jax.random.key(0), options=QUICK)
    with pytest.raises(InputError, match="2 heads of 16 channels, but the samples have keys"):
        fit(samples, INV_FREQ, dataclasses.replace(ONE, heads=2))
    few = LayerSamples(*(x[: C - 1] for x in samples[:5]))
    with pytest.raises(InputError, match="8 words need as many tokens, got 7"):
        fit(few, INV_FREQ, ONE)


def test_tokens_that_are_no_block(fitted, samples):
    with pytest.raises(InputError, match="no block of 8 tokens and 3 heads of 16 channels"):
        fitted[ONE].encode(samples.k[:7], samples.v[:7], AT[:7])
    with pytest.raises(InputError, match="no block of 8 tokens"):
        fitted[ONE].encode(samples.k[:8, :2], samples.v[:8, :2], AT[:8])


def test_spec_says_what_it_is():
    assert "CommVQ 1 bit" in str(dataclasses.replace(TWO, stages=2, value_bits=20))
    assert CommVQSpec(**ONE.to_json()) == ONE
    assert isinstance(jax.tree.structure(ONE), jax.tree_util.PyTreeDef)
    assert CommVQ.__dataclass_fields__["spec"].metadata["static"]
