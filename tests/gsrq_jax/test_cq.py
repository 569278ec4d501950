"""Coupled channels: rates, what the paper derives and reports, and Fisher weights."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsrq_jax.baselines import cq
from gsrq_jax.calibration import LayerSamples
from gsrq_jax.codebook import validate
from gsrq_jax.errors import InputError
from gsrq_jax.rope import rotate
from gsrq_jax.spec import QuantSpec

H, D, N = 2, 16, 1500
INV_FREQ = jnp.float32(50.0) ** (-jnp.arange(D // 2) * 2 / D)
AT = np.arange(N, dtype=np.int32)
quick = functools.partial(cq.fit, jax.random.key(0), iterations=6)


def samples_of(bare_k, v):
    """Of keys before RoPE."""
    ones = np.ones(v.shape[:2], np.float32)
    return LayerSamples(rotate(bare_k, AT[: len(v), None], INV_FREQ), v, ones, ones, AT[: len(v)])


@pytest.fixture(scope="module")
def coupled():
    """Neighbouring channels that depend on each other, as the paper finds them in models."""
    rng = np.random.default_rng(0)
    mix = np.eye(D) + 0.8 * (np.eye(D, k=1) + np.eye(D, k=2) + np.eye(D, k=3))
    k, v = (rng.normal(size=(2, N, H, D)) @ mix).astype(np.float32)
    return samples_of(k, v)


@jax.jit
def through(codec, k, v):
    return codec.decode(*codec.encode(k, v, jnp.arange(len(k))), jnp.arange(len(k)))


def squared_errors(codec, samples):
    """``[N, H, d]`` of keys before RoPE and of values."""
    keys, values = through(codec, samples.k, samples.v)
    bare = rotate(keys - samples.k, -AT[: len(keys), None], INV_FREQ)
    return np.square(bare), np.square(values - samples.v)


# --- what is reported -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bits", "code_bits", "channels"),
    [(4, 8, 2), (2, 8, 4), (1, 8, 8), (1.25, 10, 8), (0.75, 12, 16), (0.5, 8, 16), (0.25, 8, 32)],
)
@pytest.mark.parametrize("head_dim", [64, 128])
def test_rates(bits, code_bits, channels, head_dim):
    """CQ-<c>c<b>b is b/c bits, and nothing is stored beside the codes."""
    spec = cq.spec(bits, head_dim, code_bits=code_bits, window=32)
    assert (spec.key.group, spec.key.codewords, spec.key.stages) == (channels, 2**code_bits, 1)
    assert spec.value == spec.key
    assert (spec.frame, spec.window) == ("pre", 32)
    assert spec.bits == spec.stored_bits == bits


def test_coupling_more_channels_at_one_bit_lowers_the_error(coupled):
    """The paper's first figure, 1c1b to 8c8b; it says less where channels are independent."""
    independent = np.random.default_rng(1).normal(size=(2, N, H, D)).astype(np.float32)
    bare = rotate(coupled.k, -AT[:, None], INV_FREQ)
    k, v = (np.concatenate(x, 1) for x in zip((bare, coupled.v), independent, strict=True))
    samples, sizes = samples_of(k, v), [np.square(x).sum((0, 2)) for x in (k, v)]
    relative = []
    for channels in (1, 2, 4, 8):
        spec = cq.spec(1, D, code_bits=channels)
        errors = squared_errors(quick(samples, INV_FREQ, spec, weighted=False), samples)
        relative.append([e.sum((0, 2)) / s for e, s in zip(errors, sizes, strict=True)])
    relative = np.moveaxis(relative, 0, -1)  # [key or value, head, channels]
    dependent, other = relative[:, :H], relative[:, H:]
    np.testing.assert_allclose(relative[..., 0], 1 - 2 / np.pi, atol=0.03)  # of a normal number
    assert (dependent[..., 1:] < 0.95 * dependent[..., :-1]).all(), dependent
    assert (dependent[..., 3] < 0.8 * other[..., 3]).all(), relative


def test_without_fisher_weights_what_matters_is_lost():
    """Rare keys far from the others decide what attention reads, and only weights keep them.

    Weights are the Fisher information of the attention's output, by the gradient of random sums
    of it; groups of channels get weights of their own.
    """
    rng = np.random.default_rng(2)
    k, v = rng.normal(size=(2, N, H, D)).astype(np.float32)
    rare, kind = rng.permutation(N)[:40], rng.choice(6, 40)
    for x in (k, v):
        x[rare] = 0.3 * x[rare] + 4 * rng.normal(size=(6, H, D))[kind]
    query = jnp.asarray(0.9 * k[rng.choice(rare, 64)] + rng.normal(size=(64, H, D)), jnp.float32)
    samples = samples_of(k, v)

    def output(k, v):
        weights = jax.nn.softmax(jnp.einsum("qhd,nhd->hqn", query, k) / 4, -1)
        return jnp.einsum("hqn,nhd->qhd", weights, v)

    @jax.jit
    def fisher(k, v):
        draws = jax.random.normal(jax.random.key(1), (16, *query.shape))
        loss = jax.vmap(
            jax.grad(lambda k, v, r: jnp.sum(r * output(k, v)), argnums=(0, 1)), (None, None, 0)
        )
        return [jnp.square(g).mean(0).reshape(N, H, 2, -1).sum(-1) for g in loss(k, v, draws)]

    k_fisher, v_fisher = fisher(k, v)
    spec = cq.spec(0.5, D, code_bits=4)
    with_weights = quick(samples, INV_FREQ, spec, k_fisher=k_fisher, v_fisher=v_fisher)
    without = quick(samples, INV_FREQ, spec, k_fisher=k_fisher, v_fisher=v_fisher, weighted=False)
    exact, outputs, errors = output(k, v), {}, {}
    for name, codec in (("with", with_weights), ("without", without)):
        keys, values = through(codec, samples.k, samples.v)
        outputs[name] = output(rotate(keys, -AT[:, None], INV_FREQ), values)
        errors[name] = squared_errors(codec, samples)
    lost = {
        n: float(np.square(o - exact).sum() / np.square(exact).sum()) for n, o in outputs.items()
    }
    assert lost["with"] < 0.5 * lost["without"], lost
    for side, weights in enumerate((k_fisher, v_fisher)):
        by_group = {n: e[side].reshape(N, H, 2, -1).sum(-1) for n, e in errors.items()}
        assert np.sum(weights * by_group["with"]) < 0.5 * np.sum(weights * by_group["without"])
        assert by_group["with"].sum() > 1.1 * by_group["without"].sum()  # the price


# --- choices --------------------------------------------------------------------------------------


def test_nearest_centroid_of_each_group_before_rope(coupled):
    spec = cq.spec(1, D, code_bits=4, block=8)
    codec = quick(coupled, INV_FREQ, spec, weighted=False)
    validate(jax.tree.map(lambda x: x[None], codec))
    assert isinstance(codec.spec, QuantSpec)
    np.testing.assert_array_equal(codec.key_mean, np.zeros((H, D)))
    keys, values = through(codec, coupled.k[:50], coupled.v[:50])
    bare = (rotate(x, -AT[:50, None], INV_FREQ) for x in (coupled.k[:50], keys))
    for x, back, words in ((*bare, codec.key), (coupled.v[:50], values, codec.value)):
        for t, h, g in np.ndindex(50, H, 4):
            group = np.asarray(x)[t, h, 4 * g : 4 * g + 4]
            choices = np.asarray(words)[h, g, 0]
            nearest = choices[np.square(group - choices).sum(-1).argmin()]
            np.testing.assert_allclose(
                np.asarray(back)[t, h, 4 * g : 4 * g + 4], nearest, atol=1e-4
            )


def test_weights_of_finer_parts_add_up(coupled):
    fisher = np.random.default_rng(3).exponential(size=(2, N, H, 8)).astype(np.float32) ** 4
    spec = cq.spec(1, D, code_bits=4)
    fine = quick(coupled, INV_FREQ, spec, k_fisher=fisher[0], v_fisher=fisher[1])
    added = fisher.reshape(2, N, H, 4, 2).sum(-1)
    coarse = jax.jit(quick, static_argnums=2)(
        coupled, INV_FREQ, spec, k_fisher=added[0], v_fisher=added[1]
    )
    uniform = quick(coupled, INV_FREQ, spec, weighted=False)
    for name in ("key", "value"):
        np.testing.assert_allclose(getattr(fine, name), getattr(coarse, name), atol=1e-5)
        assert np.abs(getattr(fine, name) - getattr(uniform, name)).max() > 0.1


def test_samples_of_no_weight_may_be_anything(coupled):
    k, v = coupled.k.at[::3].set(jnp.nan), coupled.v.copy()
    v[::3] = np.nan
    fisher = np.ones((N, H, 4), np.float32)
    fisher[::3] = 0
    codec = quick(
        coupled._replace(k=k, v=v), INV_FREQ, cq.spec(1, D, code_bits=4),
        k_fisher=fisher, v_fisher=fisher,
    )  # fmt: skip
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(codec))


# --- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [0.75, 3, 0, -1, float("nan"), 16])
def test_rates_that_cannot_be_had(bits):
    with pytest.raises(
        InputError, match=r"the rates are 8, 4, 2, 1, 0\.5, 0\.25, 0\.125$"
    ) as error:
        cq.spec(bits, 64)
    assert str(error.value).startswith(f"no group of channels has {bits:g} bits a number")


def test_bad_input(coupled):
    spec = cq.spec(1, D, code_bits=4)
    fisher = jnp.ones((N, H, 4))
    with pytest.raises(InputError, match="give k_fisher and v_fisher, or weighted=False"):
        cq.fit(jax.random.key(0), coupled, INV_FREQ, spec, k_fisher=fisher)
    for wrong in (fisher[:-1], fisher[..., 0], fisher[..., :3]):
        with pytest.raises(InputError, match=r"do not fit samples of shape .* in 4 groups"):
            cq.fit(jax.random.key(0), coupled, INV_FREQ, spec, k_fisher=wrong, v_fisher=fisher)
    for other in (QuantSpec.from_bits(1, D, codewords=16, frame="pre"),
                  QuantSpec.from_bits(1, D, codewords=16, group=4)):  # fmt: skip
        with pytest.raises(InputError, match=r"make its spec by cq\.spec"):
            cq.fit(jax.random.key(0), coupled, INV_FREQ, other, weighted=False)
    few = samples_of(np.zeros((10, H, D), np.float32), np.zeros((10, H, D), np.float32))
    with pytest.raises(InputError, match="16 codewords need as many points, got 10"):
        cq.fit(jax.random.key(0), few, INV_FREQ, spec, weighted=False)
