"""VQLLM: the repository's choices one by one, what its author reports, the codec in the cache."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsrq_jax import attention, cache, packing
from gsrq_jax.baselines import vqllm
from gsrq_jax.baselines.vqllm import VQLLM, FitOptions, VQLLMSpec
from gsrq_jax.calibration import LayerSamples
from gsrq_jax.errors import InputError
from gsrq_jax.rope import rotate

H, D = 2, 16
N = 600
INV_FREQ = jnp.float32(50.0) ** (-jnp.arange(D // 2) * 2 / D)
SPEC = VQLLMSpec(D, group=8, stages=4, codewords=16, block=8, window=8, sinks=2)
FEW = FitOptions(steps=30, sequences=2, length=100, start=400, start_iterations=5)


def samples_of(k, v):
    ones = np.ones(k.shape[:2], np.float32)
    return LayerSamples(k, v, ones, ones, np.arange(len(k), dtype=np.int32))


@pytest.fixture(scope="module")
def samples():
    """Keys whose rotary pairs differ in size, as a model's do; heads of different sizes too."""
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(2, N, H, D)).astype(np.float32)
    k *= np.tile(np.geomspace(0.2, 3, D // 2), 2) * np.array([[1.0], [5.0]])
    return samples_of(rotate(k, np.arange(N)[:, None], INV_FREQ), v)


@pytest.fixture(scope="module")
def fitted(samples):
    return vqllm.fit(jax.random.key(0), samples, INV_FREQ, SPEC, options=FEW)


def random_codec(spec, layers=None, seed=0):
    lead = () if layers is None else (layers,)
    shape = (*lead, spec.stages, spec.codewords, spec.group)
    key, value = np.random.default_rng(seed).normal(size=(2, *shape)).astype(np.float32)
    freq = jnp.broadcast_to(INV_FREQ, (*lead, D // 2))
    return VQLLM(jnp.asarray(key), jnp.asarray(value), freq, spec)


@jax.jit
def through(codec, k, v):
    at = jnp.arange(k.shape[-3])
    return codec.decode(*codec.encode(k, v, at), at)


def error(codec, samples):
    """Relative error of keys and of values."""
    back = through(codec, jnp.asarray(samples.k), jnp.asarray(samples.v))
    return [
        float(np.sum(np.square(x - y)) / np.sum(np.square(x)))
        for x, y in zip((samples.k, samples.v), back, strict=True)
    ]


# --- what is reported -----------------------------------------------------------------------------


def test_reported_compression():
    """5.5 times smaller than half precision: 8 codes of 11 bits on 32 channels, and a scale."""
    spec = VQLLMSpec(128)
    assert spec.bits == 2.75
    assert spec.stored_bits == 2.75 + 16 / 128
    assert 5.5 < 16 / spec.stored_bits < 5.6


@pytest.mark.parametrize(
    ("bits", "codewords", "stages"),
    [(0.25, 256, 1), (0.5, 256, 2), (0.75, 256, 3), (1, 256, 4), (2, 256, 8), (2.75, 2048, 8)],
)
def test_rates(bits, codewords, stages):
    spec = VQLLMSpec.from_bits(bits, 64, codewords=codewords, window=32)
    assert spec == VQLLMSpec(64, 32, stages, codewords, window=32)
    assert (spec.bits, spec.stored_bits) == (bits, bits + 16 / 64)
    assert VQLLMSpec.from_bits(1, 16).group == 16


def test_deeper_is_better(samples, fitted):
    """The paper's depth ablation. Stages are learned one behind the other: cutting is training."""
    errors = []
    for stages in range(1, 5):
        spec = dataclasses.replace(SPEC, stages=stages)
        cut = VQLLM(fitted.key[:stages], fitted.value[:stages], INV_FREQ, spec)
        errors.append(error(cut, samples))
    assert (np.diff(errors, axis=0) < -0.02).all(), errors


def test_strided_groups_code_keys_better(samples, fitted):
    """The paper's grouping ablation: strided groups share out the large channels."""
    spec = dataclasses.replace(SPEC, key_groups="contiguous")
    contiguous = vqllm.fit(jax.random.key(0), samples, INV_FREQ, spec, options=FEW)
    strided, other = error(fitted, samples), error(contiguous, samples)
    assert strided[0] < 0.9 * other[0]
    assert strided[1] == other[1]  # values are grouped alike


# --- the repository's choices ---------------------------------------------------------------------


@pytest.mark.parametrize(("dim", "group"), [(64, 32), (128, 32), (16, 8), (32, 32)])
def test_key_groups_are_strided_over_interleaved_pairs(dim, group):
    spec = VQLLMSpec(dim, group, 1)
    groups = dim // group
    for j, members in enumerate(spec.key_order.reshape(groups, group)):
        half, pair = members // (dim // 2), members % (dim // 2)
        np.testing.assert_array_equal((2 * pair + half) % groups, j)  # place among paired channels
    contiguous = dataclasses.replace(spec, key_groups="contiguous").key_order
    pairs = contiguous.reshape(groups, group) % (dim // 2)
    np.testing.assert_array_equal(
        pairs // (group // 2), np.arange(groups)[:, None] + np.zeros_like(pairs)
    )
    for order in (spec.key_order, contiguous):
        np.testing.assert_array_equal(np.sort(order), np.arange(dim))


def test_codes_by_definition(fitted):
    """Before RoPE, over the rounded standard deviation, greedily, one codebook for all groups."""
    rng = np.random.default_rng(1)
    k, v = (3 + 2 * rng.normal(size=(2, 5, H, D))).astype(np.float32)
    at = jnp.arange(7, 12)
    keys, values = fitted.encode(jnp.asarray(k), jnp.asarray(v), at)
    decoded = fitted.decode(keys, values, at)

    def bare(x):
        return rotate(x, -at[:, None], INV_FREQ)[..., SPEC.key_order]

    for x, coded, words, back in (
        (bare(k), keys, fitted.key, bare(decoded[0])),
        (v, values, fitted.value, decoded[1]),
    ):
        x, words = np.asarray(x, np.float64), np.asarray(words, np.float64)
        codes = packing.unpack(coded.codes, SPEC.code.codes, 4).reshape(H, 5, 2, 4)
        for t, h in np.ndindex(5, H):
            scale = float(coded.scale[h, t])
            assert scale == pytest.approx(x[t, h].std(ddof=1), rel=2**-8)
            for group in range(2):
                channels = slice(8 * group, 8 * group + 8)
                left = x[t, h, channels] / scale
                for r in range(4):
                    nearest = np.square(left - words[r]).sum(-1).argmin()
                    assert codes[h, t, group, r] == nearest
                    left = left - words[r, nearest]
                expected = x[t, h, channels] - scale * left
                np.testing.assert_allclose(back[t, h, channels], expected, atol=1e-4)


def test_scale_follows_the_vector(fitted, samples):
    k, v = jnp.asarray(samples.k[:8]), jnp.asarray(samples.v[:8])
    at = jnp.arange(8)
    for one, eight in zip(fitted.encode(k, v, at), fitted.encode(8 * k, 8 * v, at), strict=True):
        np.testing.assert_array_equal(one.codes, eight.codes)
        np.testing.assert_array_equal(8 * one.scale, eight.scale)
    zeros, _ = fitted.encode(jnp.zeros_like(k), v, at)
    np.testing.assert_array_equal(zeros.scale, jnp.ones((H, 8)))


def moving_average(points, words, average, steps, decay, eps):
    """The repository's updates over all points, in float64."""
    words, average = np.array(words, np.float64), np.array(average, np.float64)
    for _ in range(steps):
        left, fresh = np.array(points, np.float64), words.copy()
        for r, codebook in enumerate(words):
            code = np.square(left[:, None] - codebook).sum(-1).argmin(-1)
            one_hot = np.eye(len(codebook))[code]
            sums = np.concatenate([one_hot.T @ left, one_hot.sum(0)[:, None]], 1)
            average[r] = decay * average[r] + (1 - decay) * sums
            size, total = average[r][:, -1], average[r][:, -1].sum()
            smooth = (size + eps) / (total + len(size) * eps) * total
            fresh[r] = (average[r][:, :-1] / smooth[:, None]).clip(-100, 100)
            left = left - codebook[code]
        words = fresh
    return words


def test_updates_are_moving_averages(samples):
    """A step here sees every token once, so that their order does not matter."""
    part = samples_of(samples.k[:60], samples.v[:60])
    options = FitOptions(steps=0, sequences=3, length=20, decay=0.6, epsilon=0.1, start=100)
    longer = dataclasses.replace(options, steps=2, sequences=1, length=1000)
    fit = functools.partial(vqllm.fit, jax.random.key(1), part, INV_FREQ, SPEC)
    start = fit(options=options)
    scale = np.asarray(jnp.asarray(part.v.std(-1, ddof=1)).astype(jnp.bfloat16), np.float32)
    points = (part.v / scale[..., None]).reshape(-1, 8)
    ones = np.ones((*start.value.shape[:-1], 1))
    average = np.concatenate([start.value, ones], -1)
    expected = moving_average(points, start.value, average, 2, 0.6, 0.1)
    for learned in (fit(options=dataclasses.replace(options, steps=2)), fit(options=longer)):
        np.testing.assert_allclose(learned.value, expected, atol=1e-4)
    assert np.abs(learned.value - start.value).max() > 0.1


def test_learning_goes_over_all_tokens(samples):
    """From a start on few tokens, updates bring the error down to that of a start on all."""
    fit = functools.partial(vqllm.fit, jax.random.key(2), samples, INV_FREQ, SPEC)
    few, none = (dataclasses.replace(FEW, start=32, steps=steps) for steps in (30, 0))
    all_tokens = dataclasses.replace(FEW, start=100_000, steps=0)
    learned, start, whole = (
        np.array(error(fit(options=o), samples)) for o in (few, none, all_tokens)
    )
    assert (learned < 0.9 * start).all()
    assert (learned < 1.15 * whole).all()


# --- the codec ------------------------------------------------------------------------------------

SPECS = {
    "nibbles": SPEC,
    "11 bits": VQLLMSpec(D, group=8, stages=3, block=8, window=5, sinks=1),
    "whole head": VQLLMSpec(D, group=16, stages=2, codewords=4, block=4, window=0, sinks=0),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


@specs
@pytest.mark.parametrize("lead", [(), (3, 2)])
def test_codes_have_the_shapes_of_the_spec(spec, lead):
    codec = random_codec(spec)
    x = jax.ShapeDtypeStruct((*lead, spec.block, H, D), jnp.bfloat16)
    at = jax.ShapeDtypeStruct((*lead, spec.block), jnp.int32)
    found = jax.eval_shape(VQLLM.encode, codec, x, x, at)
    expected = jax.tree.map(
        lambda s: jax.ShapeDtypeStruct((*lead, H, *s.shape), s.dtype), spec.code_shapes()
    )
    assert found == expected
    for y in jax.eval_shape(VQLLM.decode, codec, *found, at):
        assert (y.shape, y.dtype) == (x.shape, jnp.float32)


@specs
def test_cache_of_stacked_layers(spec):
    """Prompts of unequal length, then single tokens, on two layers under jit, vmap and scan."""
    rng = np.random.default_rng(3)
    codec, layers, batch = random_codec(spec, layers=2), 2, 2
    k, v = rng.normal(size=(2, layers, batch, 40, H, D)).astype(np.float32)
    q = rng.normal(size=(layers, batch, 1, 2 * H, D)).astype(np.float32)
    state = cache.init_cache(
        spec, batch=batch, kv_heads=H, head_dim=D, max_length=40, layers=layers, dtype=jnp.float32
    )
    coded = jax.tree.leaves((state.key_codes, state.value_codes))
    blocks = (40 - spec.sinks - spec.window) // spec.block
    numbers = 2 * layers * batch * H * blocks * spec.block * D
    assert 8 * sum(x.nbytes for x in coded) == spec.stored_bits * numbers
    count = jnp.array([21, 30])
    prompt = [np.where((np.arange(30) < count[:, None])[..., None, None], x[:, :, :30], np.nan)
              for x in (k, v)]  # fmt: skip
    append = jax.jit(cache.append)
    state = append(state, *map(jnp.asarray, prompt), codec, count)
    for step in range(9):
        rows = np.arange(batch), count + step
        state = append(state, *(jnp.asarray(x[:, *rows][:, :, None]) for x in (k, v)), codec)

    def layer(_, xs):
        q, k, v, one, codec = xs
        return None, (attention.attend(q, k, v, one, codec), cache.materialize(one, codec))

    new = np.stack([x[:, np.arange(batch), count + 9][:, :, None] for x in (k, v)])
    _, (out, seen) = jax.jit(lambda *xs: jax.lax.scan(layer, None, xs))(q, *new, state, codec)
    np.testing.assert_array_equal(seen[2].sum(-1), np.broadcast_to(count + 9, (2, 2)))
    apart = jax.vmap(lambda c, k, v: through(c, k, v))(codec, k, v)
    for i, row in np.ndindex(layers, batch):
        n = int(count[row]) + 9
        end = max(0, n - spec.sinks - spec.window) // spec.block * spec.block + spec.sinks
        memory = []
        for x, old in zip((k, v), apart, strict=True):
            x = np.array(x[i, row, : n + 1], np.float64)
            x[spec.sinks : end] = old[i, row, spec.sinks : end]
            memory.append(x)
        scores = np.einsum("hqd,nhd->hqn", q[i, row, 0].reshape(H, 2, D), memory[0]) / np.sqrt(D)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        expected = np.einsum("hqn,nhd->hqd", weights, memory[1]).reshape(2 * H, D)
        np.testing.assert_allclose(out[i, row, 0], expected, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"group": 5}, "group 5 does not divide the head size 16"),
        ({"group": 32}, "group 32 does not divide the head size 16"),
        ({"stages": 0}, "stages must be at least 1"),
        ({"codewords": 1000}, "power of two from 2 to 65536, got 1000"),
        ({"dim": 15, "group": 5}, "even head size, got 15"),
        ({"key_groups": "random"}, "unknown key_groups 'random'; choose strided or contiguous"),
        ({"block": 0}, "block must be at least 1"),
    ],
)
def test_specs_that_do_not_fit(fields, says):
    with pytest.raises(InputError, match=says):
        dataclasses.replace(SPEC, **fields)


def test_bad_input(samples):
    with pytest.raises(InputError, match=r"the nearest rates are 0\.25 and 0\.5"):
        VQLLMSpec.from_bits(0.375, 64)
    few = samples_of(samples.k[:3], samples.v[:3])
    with pytest.raises(InputError, match="16 codewords need as many points, got 12"):
        vqllm.fit(jax.random.key(0), few, INV_FREQ, SPEC)
    narrow = samples_of(samples.k[..., :8], samples.v[..., :8])
    with pytest.raises(InputError, match="spec is for 16 channels, but the samples have 8"):
        vqllm.fit(jax.random.key(0), narrow, INV_FREQ[:4], SPEC)


def test_str_and_json():
    assert str(VQLLMSpec(64)) == (
        "VQLLM 2.75 bit and a scale, 8 stages × 2048 codewords × 2 groups, keys strided, head 64, "
        "blocks of 128, window 128, sinks 4"
    )
    assert VQLLMSpec(**SPEC.to_json()) == SPEC
