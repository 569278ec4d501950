"""Samples to codebooks: frames, means, weights, and the files that hold samples."""

import dataclasses
import json
import resource

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsrq_jax import calibration
from gsrq_jax.calibration import FitOptions, Moments, SampleStore
from gsrq_jax.codec import respec
from gsrq_jax.errors import InputError
from gsrq_jax.rope import rotate
from gsrq_jax.spec import QuantSpec, ResidualSpec

N, H, D = 256, 2, 8
CODE = ResidualSpec(D, D, stages=2, codewords=16)
SPEC = QuantSpec(key=CODE, value=CODE, block=16, window=0, sinks=4)
INV_FREQ = jnp.asarray(100.0 ** -(np.arange(0, D, 2) / D), jnp.float32)
MEAN = 3 * np.random.default_rng(0).standard_normal((H, D)).astype(np.float32)
FEW = FitOptions(iterations=3, warmup=1)


@pytest.fixture(scope="module")
def samples():
    """Rotated keys around `MEAN`, values, positions of two sequences."""
    rng = np.random.default_rng(1)
    positions = jnp.tile(jnp.arange(N // 2, dtype=jnp.int32) + SPEC.sinks, 2)
    noise = rng.standard_normal((2, N, H, D)).astype(np.float32)
    centred = noise[0] - noise[0].mean(axis=0)
    return rotate(MEAN + centred, positions[:, None], INV_FREQ), jnp.asarray(noise[1]), positions


def fit(samples, spec=SPEC, options=FEW, **norms):
    return calibration.fit_layer(
        jax.random.key(0), *samples, INV_FREQ, spec, options=options, **norms
    )


def relative_error(x, y):
    return np.sum(np.square(x - y), axis=(0, 2)) / np.sum(np.square(x), axis=(0, 2))


@pytest.mark.parametrize("frame", ["block", "pre", "post"])
def test_codebooks_code_what_the_cache_will_give_them(samples, frame):
    """The error that the fit reports is the one that the cache's own encoder makes."""
    k, v, positions = samples
    spec = dataclasses.replace(SPEC, frame=frame)
    books, report = fit(samples, spec)
    assert books.spec == spec
    np.testing.assert_allclose(books.key_mean, MEAN, atol=1e-4)
    decoded_k, decoded_v = books.decode(*books.encode(k, v, positions), positions)
    # Rotations keep lengths: what the mean leaves of a key is the same in every frame.
    left = k - rotate(jnp.broadcast_to(MEAN, k.shape), positions[:, None], INV_FREQ)
    error = np.sum(np.square(k - decoded_k), (0, 2)) / np.sum(np.square(left), (0, 2))
    np.testing.assert_allclose(report.key.error[:, 0, -1], error, rtol=1e-3)
    np.testing.assert_allclose(
        report.value.error[:, 0, -1], relative_error(v, decoded_v), rtol=1e-3
    )
    assert error.max() < 0.6


def test_beam_and_refits(samples):
    """The spec's beam trains and encodes; refits help; the report is of what comes out."""
    k, v, positions = samples
    greedy, _ = fit(samples)
    spec = dataclasses.replace(SPEC, beam=4)
    books, report = fit(samples, spec, dataclasses.replace(FEW, refits=2))
    assert books.spec.beam == 4
    errors = {}
    for name, b in (("greedy", greedy), ("beam", respec(greedy, beam=4)), ("refits", books)):
        _, decoded = b.decode(*b.encode(k, v, positions), positions)
        errors[name] = relative_error(v, decoded)
    np.testing.assert_allclose(report.value.error[:, 0, -1], errors["refits"], rtol=1e-3)
    assert (errors["beam"] < errors["greedy"]).all()
    assert (errors["refits"] < 0.97 * errors["beam"]).all()
    with pytest.raises(InputError, match="refits must be at least 0, got -1"):
        fit(samples, options=dataclasses.replace(FEW, refits=-1))
    with pytest.raises(InputError, match="multiples of 64 up to 256 as channels, got 8"):
        fit(samples, options=dataclasses.replace(FEW, implementation="mosaic_gpu"))


def test_what_heads_have_in_common_is_coded_once(samples):
    """Two heads that hold the same: together they are coded as well as one at twice the bits."""
    k, v, positions = samples
    v = jnp.concatenate([v[:, :1], v[:, :1]], axis=1)
    weights = jnp.asarray(np.random.default_rng(2).uniform(size=v.shape[:2]), jnp.float32)

    def found(**code):
        spec = dataclasses.replace(SPEC, value=dataclasses.replace(CODE, **code))
        return fit((k, v, positions), spec, v_norms=weights)

    apart, separate = found()
    shared, together = found(stages=4, heads=2)
    assert shared.spec.bits == apart.spec.bits
    assert shared.value.shape == (2, 1, 4, 16, D)
    np.testing.assert_allclose(shared.value[0], shared.value[1], atol=1e-5)
    assert together.value.error.shape == (2, 1, 4)
    np.testing.assert_array_equal(together.value.error[0], together.value.error[1])
    assert (together.value.error[:, 0, -1] < 0.8 * separate.value.error[:, 0, -1]).all()
    codes = shared.encode(k, v, positions)
    assert codes[1].shape == (1, N, 2)
    _, old = shared.decode(*codes, positions)
    _, old_apart = apart.decode(*apart.encode(k, v, positions), positions)
    assert (relative_error(v, old) < 0.8 * relative_error(v, old_apart)).all()
    with pytest.raises(InputError, match=r"2 KV heads .* multiple of the 3 that share codes"):
        found(heads=3)


def test_keys_that_are_not_centred(samples):
    k, v, positions = samples
    spec = dataclasses.replace(SPEC, frame="pre")
    books, report = fit(samples, spec, dataclasses.replace(FEW, center=False))
    np.testing.assert_array_equal(books.key_mean, np.zeros((H, D)))
    decoded, _ = books.decode(*books.encode(k, v, positions), positions)
    np.testing.assert_allclose(report.key.error[:, 0, -1], relative_error(k, decoded), rtol=1e-3)


def test_mean_key_is_that_before_rope(samples):
    k, _, positions = samples
    np.testing.assert_allclose(calibration.mean_key(k, positions, INV_FREQ), MEAN, atol=1e-4)
    assert np.abs(k.mean(axis=0) - MEAN).max() > 1  # the rotated keys' own is another
    half = calibration.mean_key(k.astype(jnp.bfloat16), positions, INV_FREQ)
    assert half.dtype == jnp.float32


def test_heavy_tokens_are_coded_better(samples):
    k, v, positions = samples
    heavy = np.arange(N) % 8 == 0
    norms = jnp.asarray(np.where(heavy, 1e4, 1e-4)[:, None].repeat(H, 1), jnp.float32)
    plain, _ = fit(samples)
    weighted, _ = fit(samples, k_norms=norms, v_norms=norms)

    def errors(books):
        decoded = books.decode(*books.encode(k, v, positions), positions)
        return [
            float(jnp.sum(jnp.square(x - y)[heavy])) for x, y in zip((k, v), decoded, strict=True)
        ]

    for ours, other in zip(errors(weighted), errors(plain), strict=True):
        assert ours < 0.7 * other


def test_each_half_has_its_own_weights(samples):
    rng = np.random.default_rng(2)
    norms = jnp.asarray(rng.lognormal(sigma=2, size=(N, H)), jnp.float32)
    plain, _ = fit(samples)
    keys, _ = fit(samples, k_norms=norms)
    values, _ = fit(samples, v_norms=norms)
    np.testing.assert_array_equal(keys.value, plain.value)
    np.testing.assert_array_equal(values.key, plain.key)
    assert np.abs(keys.key - plain.key).max() > 0.01
    assert np.abs(values.value - plain.value).max() > 0.01
    # Equal norms weigh all alike.
    same, _ = fit(samples, k_norms=jnp.full((N, H), 7.0))
    np.testing.assert_allclose(same.key, plain.key, atol=1e-4)


# Metrics


def moments(seed=3):
    """Of a few strong directions of each head, other ones for keys and values."""
    rng = np.random.default_rng(seed)
    strong = rng.standard_normal((2, H, D, 2)).astype(np.float32) * 10
    weak = 0.1 * np.eye(D, dtype=np.float32)
    key, value = strong @ np.swapaxes(strong, -1, -2) + weak
    query = rng.lognormal(sigma=2, size=(H, D // 2)).astype(np.float32)
    return Moments(*map(jnp.asarray, (key, value, query)))


def in_metric(x, decoded, moment):
    return float(jnp.einsum("nhd,hde,nhe->", x - decoded, moment, x - decoded))


@pytest.mark.parametrize(
    ("options", "side"),
    [
        ({"key_metric": "gradient"}, 0),
        ({"key_metric": "queries"}, 0),
        ({"value_metric": "gradient"}, 1),
        ({"value_metric": "output"}, 1),
    ],
)
def test_error_is_less_where_a_metric_weighs_it(samples, options, side):
    k, v, positions = samples
    spec = dataclasses.replace(SPEC, frame="pre")  # moments are those before RoPE
    found = moments()
    of_queries = jnp.tile(found.query, 2)[..., None] * jnp.eye(D)
    moment = {"queries": of_queries, "output": found.key}.get(
        next(iter(options.values())), found[side]
    )
    few = dataclasses.replace(FEW, **options, metric_power=1.0)
    plain, _ = fit(samples, spec)
    weighed, report = fit(samples, spec, few, moments=found, output=found.key)
    metrics = weighed.key_metric, weighed.value_metric
    assert metrics[side].shape == (H, D, D)
    assert metrics[1 - side] is None

    def error(books):
        decoded = books.decode(*books.encode(k, v, positions), positions)
        x, y = (k, v)[side], decoded[side]
        if side == 0:  # keys as they are before RoPE
            x, y = (rotate(z, -positions[:, None], INV_FREQ) for z in (x, y))
        return in_metric(x, y, moment)

    assert error(weighed) < 0.6 * error(plain)
    assert (report[side].error[..., -1] < 0.6).all()


def test_a_metric_turns_with_the_frame(samples):
    """In blocks the gradients' moment is the mean over the offsets of a block."""
    options = dataclasses.replace(FEW, key_metric="gradient", metric_power=1.0)
    books, _ = fit(samples, options=options, moments=moments())
    turned = []
    for offset in range(SPEC.block):
        basis = rotate(jnp.eye(D), jnp.full(D, offset), INV_FREQ).T  # R, column by column
        turned.append(jnp.einsum("de,hef,gf->hdg", basis, moments().key, basis))
    want = jnp.mean(jnp.stack(turned), axis=0)
    got = jnp.einsum("hde,hdf->hef", books.key_metric, books.key_metric)

    def scaled(m):
        return m * D / jnp.trace(m, axis1=-2, axis2=-1)[:, None, None]

    np.testing.assert_allclose(got, 0.98 * scaled(want) + 0.02 * np.eye(D), atol=1e-4)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"key_metric": "gradient"}, "key_metric gradient needs the moments"),
        ({"value_metric": "output"}, "value_metric output needs the moments or projection"),
        ({"key_metric": "output"}, "unknown key_metric 'output'; choose one of none, gradient"),
        ({"metric_power": 1.5}, "metric_power must be from 0 to 1, got 1.5"),
    ],
)
def test_metrics_that_cannot_be(samples, options, says):
    with pytest.raises(InputError, match=says):
        fit(samples, options=dataclasses.replace(FEW, **options))


def test_metrics_are_for_whole_heads(samples):
    spec = dataclasses.replace(SPEC, key=ResidualSpec(D, D // 2, 1, 16))
    with pytest.raises(InputError, match="key_metric gradient is for whole heads; leave out"):
        fit(samples, spec, dataclasses.replace(FEW, key_metric="gradient"), moments=moments())


# Stages by layer


def test_by_layer_widened_and_first_stages(samples):
    few = dataclasses.replace(CODE, stages=1)
    narrow, report = fit(samples, dataclasses.replace(SPEC, key=few))
    spec = calibration.by_layer(SPEC, [2, 1], [1, 2])
    assert (spec.key_stages, spec.value_stages) == ((2, 1), (1, 2))
    books, wide = calibration.widened(narrow, report, spec)
    assert books.spec == spec
    np.testing.assert_array_equal(books.key[..., 1, :, :], 0)
    np.testing.assert_array_equal(books.key[..., :1, :, :], narrow.key)
    np.testing.assert_array_equal(wide.key.error[..., 1], report.key.error[..., 0])
    np.testing.assert_array_equal(wide.key.dead[..., 1], 0)
    k, v, positions = samples
    for got, want in zip(
        books.decode(*books.encode(k, v, positions), positions),
        narrow.decode(*narrow.encode(k, v, positions), positions),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, atol=1e-6)

    assert calibration.by_layer(spec, [3, 3], [1, 1]) == dataclasses.replace(
        SPEC, key=dataclasses.replace(CODE, stages=3), value=few
    )
    stack = jax.tree.map(lambda x: jnp.stack([x, x]), fit(samples)[0])
    part = calibration.first_stages(stack, [2, 1], [1, 2])
    np.testing.assert_array_equal(part.key[0], stack.key[0])
    np.testing.assert_array_equal(part.key[1], stack.key[1].at[..., 1, :, :].set(0))
    np.testing.assert_array_equal(part.value[0], stack.value[0].at[..., 1, :, :].set(0))


def test_fewer_tokens_than_codewords(samples):
    with pytest.raises(InputError, match="16 codewords need as many points, got 15"):
        fit([x[:15] for x in samples])


# The store

SIZES = {"layers": 2, "sequences": 3, "tokens": 5, "heads": 2, "dim": 4, "first": 4}


def sequence(seed):
    rng = np.random.default_rng(seed)
    vectors = rng.standard_normal((2, 2, 5, 2, 4)).astype(jnp.bfloat16).astype(np.float32)
    return [*vectors, *rng.random((2, 2, 5, 2)).astype(np.float32)]


def test_store_gives_back_each_layer(tmp_path):
    store = SampleStore.open(tmp_path / "samples", **SIZES)
    stored = [sequence(i) for i in range(3)]
    for i, arrays in enumerate(stored):
        assert store.done == i
        store.put(i, *(jnp.asarray(x) for x in arrays))
    assert store.done == 3
    for layer in range(2):
        got = store.layer(layer)
        assert got.k.dtype == got.v.dtype == jnp.bfloat16
        for x, part in zip(got[:4], zip(*stored, strict=True), strict=True):
            np.testing.assert_array_equal(
                x.astype(np.float32), np.concatenate([y[layer] for y in part])
            )
        np.testing.assert_array_equal(got.positions, [4, 5, 6, 7, 8] * 3)


def test_store_gives_back_mean_moments(tmp_path):
    store = SampleStore.open(tmp_path, **SIZES, moments=True)
    rng = np.random.default_rng(0)
    shapes = (2, 2, 4, 4), (2, 2, 4, 4), (2, 2, 2)
    stored = [Moments(*(rng.random(s).astype(np.float32) for s in shapes)) for _ in range(3)]
    for i, found in enumerate(stored):
        store.put(i, *sequence(i), found)
    for layer in range(2):
        for got, parts in zip(store.layer(layer).moments, zip(*stored, strict=True), strict=True):
            np.testing.assert_allclose(got, np.mean([p[layer] for p in parts], axis=0), rtol=1e-6)
    np.testing.assert_array_equal(store.layer(1).v_norms[:5], sequence(0)[3][1])


def test_store_is_found_again_but_not_by_others(tmp_path):
    SampleStore.open(tmp_path, **SIZES).put(0, *sequence(0))
    again = SampleStore.open(tmp_path, **SIZES)
    assert again.done == 1
    with pytest.raises(InputError, match=r"holds samples of .*'sequences': 3.* not .*: 4"):
        SampleStore.open(tmp_path, **SIZES | {"sequences": 4})
    again.put(1, *sequence(1))
    np.testing.assert_array_equal(again.layer(0).v[5:10].astype(np.float32), sequence(1)[1][0])


@pytest.mark.parametrize(("part", "name"), [(0, "k"), (1, "v"), (2, "k_norms"), (3, "v_norms")])
@pytest.mark.parametrize("number", [np.nan, np.inf])
def test_store_refuses_what_is_not_finite(tmp_path, part, name, number):
    store = SampleStore.open(tmp_path, **SIZES)
    store.put(0, *sequence(0))
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    arrays = sequence(1)
    arrays[part].flat[-1] = number
    with pytest.raises(InputError, match=f"gave a {name} that is not finite in sequence 1; check"):
        store.put(1, *arrays)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_full_disk_does_not_count_as_stored(tmp_path):
    sizes = SIZES | {"tokens": 2000, "sequences": 1}
    rng = np.random.default_rng(0)
    arrays = [*rng.random((2, 2, 2000, 2, 4)), *rng.random((2, 2, 2000, 2))]
    store = SampleStore.open(tmp_path, **sizes)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(OSError, match="File too large"):
            store.put(0, *arrays)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert store.done == 0
    assert json.loads((tmp_path / "progress.json").read_text())["done"] == 0
    store.put(0, *arrays)
    np.testing.assert_array_equal(store.layer(1).k_norms, arrays[2][1].astype(np.float32))


@pytest.mark.parametrize("x64", [False, True])
def test_types_of_codebooks_are_those_of_the_docstring(x64):
    """Whatever jax_enable_x64 says and numpy holds; traced only."""
    spec = dataclasses.replace(SPEC, beam=2)
    options = dataclasses.replace(FEW, refits=1, key_metric="queries", value_metric="output")
    moments = Moments(None, None, np.ones((H, D // 2)))

    def fitted(rng, k, norms):
        at = np.arange(N)
        return calibration.fit_layer(
            *(rng, k, k, at, np.asarray(INV_FREQ, float), spec),
            k_norms=norms,
            v_norms=None,
            moments=moments,
            output=np.ones((H, D, D)),
            options=options,
        )

    with jax.enable_x64(x64):
        books, report = jax.eval_shape(
            fitted, jax.random.key(0), np.ones((N, H, D)), np.ones((N, H))
        )
    assert {x.dtype.name for x in jax.tree.leaves(books)} == {"float32"}
    for side in report:
        assert (side.error.dtype, side.dead.dtype) == (jnp.float32, jnp.int32)


@pytest.mark.parametrize("field", ["iterations", "warmup"])
def test_options_out_of_range(samples, field):
    with pytest.raises(InputError, match=f"{field} must be at least 1, got 0"):
        fit(samples, options=dataclasses.replace(FEW, **{field: 0}))


def test_samples_that_do_not_fit_each_other(samples):
    k, v, positions = samples
    for name, wrong in (
        ("keys", (k[..., :4], v, positions)),
        ("values", (k, v[:, :1], positions)),
        ("positions", (k, v, positions[:5])),
    ):
        with pytest.raises(InputError, match=f"{name} have the shape"):
            fit(wrong)
    with pytest.raises(InputError, match=r"k_norms have the shape \(256,\); \(256, 2\)"):
        fit(samples, k_norms=jnp.ones(N))
