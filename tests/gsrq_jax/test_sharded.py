"""One layer's codebooks from many devices are those from one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from gsrq_jax import calibration
from gsrq_jax.calibration import FitOptions, Moments
from gsrq_jax.errors import InputError
from gsrq_jax.sensitivity import log_smooth
from gsrq_jax.spec import QuantSpec, ResidualSpec

N, H, D = 256, 2, 8
CODE = ResidualSpec(D, D, stages=2, codewords=16)
SPEC = QuantSpec(key=CODE, value=CODE, block=16, window=0, sinks=4)
INV_FREQ = jnp.asarray(100.0 ** -(np.arange(0, D, 2) / D), jnp.float32)
FEW = FitOptions(iterations=2, warmup=1)
KEY = jax.random.key(0)
_RNG = np.random.default_rng(1)
K, V = jnp.asarray(_RNG.normal(size=(2, N, H, D)) + 1, jnp.float32)
NORMS = jnp.asarray(np.exp(_RNG.normal(size=(N, H))), jnp.float32)
POSITIONS = jnp.arange(N, dtype=jnp.int32)


def make_mesh(**axes):
    auto = (jax.sharding.AxisType.Auto,) * len(axes)
    devices = jax.devices()[: int(np.prod([*axes.values()]))]
    return jax.make_mesh(tuple(axes.values()), tuple(axes), axis_types=auto, devices=devices)


def fit(mesh=None, *, spec=SPEC, options=FEW, **more):
    how = (
        calibration.fit_layer if mesh is None else functools.partial(calibration.fit_sharded, mesh)
    )
    run = jax.jit(functools.partial(how, spec=spec, options=options, **more))
    return run(KEY, K, V, POSITIONS, INV_FREQ, k_norms=NORMS, v_norms=NORMS)


@pytest.fixture(scope="module")
def one():
    return fit()


def agree(many, one):
    assert jax.tree.structure(many) == jax.tree.structure(one)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), many, one)


@pytest.mark.parametrize(("data", "model"), [(1, 1), (2, 1), (2, 2), (4, 2)])
def test_devices_agree_with_one(one, data, model):
    books, report = fit(make_mesh(data=data, model=model))
    agree((books, report), one)
    assert books.key.sharding.shard_shape(books.key.shape)[0] == H // model


def test_by_pmap(one):
    """Every device holds a share of the tokens and ends with the same codebooks."""

    def share(k, v, positions, norms):
        return calibration.fit_layer(
            *(KEY, k, v, positions, INV_FREQ, SPEC),
            k_norms=norms,
            v_norms=norms,
            options=FEW,
            axis_name="data",
        )

    shares = [x.reshape(4, N // 4, *x.shape[1:]) for x in (K, V, POSITIONS, NORMS)]
    many = jax.pmap(share, axis_name="data", devices=jax.devices()[:4])(*shares)
    for device in range(4):
        agree(jax.tree.map(lambda x, i=device: x[i], many), one)


def test_layers_and_heads_over_the_rest_of_the_mesh():
    """Problems of two layers and two heads on four devices, the points of each on two."""
    keys, k = jax.random.split(KEY, 2), jnp.stack([K, V])

    def of_layer(key, k, **axes):
        fitted = calibration.fit_layer(
            key, k, k, POSITIONS[: len(k)], INV_FREQ, SPEC, options=FEW, **axes
        )
        return fitted[0].value, fitted[1].value

    def share(keys, k):
        return jax.vmap(functools.partial(of_layer, axis_name="data", head_axis="head"))(keys, k)

    mapped = jax.shard_map(
        share,
        mesh=make_mesh(data=2, layer=2, head=2),
        in_specs=(P("layer"), P("layer", "data", "head")),
        out_specs=P("layer", "head"),
    )
    agree(jax.jit(mapped)(keys, k), jax.jit(jax.vmap(of_layer))(keys, k))


def test_metrics():
    """That of keys after RoPE depends on the first and last position of all tokens."""
    spec = dataclasses.replace(SPEC, frame="post")
    options = dataclasses.replace(FEW, key_metric="gradient", value_metric="output")
    square = np.asarray(_RNG.normal(size=(H, D, D)), np.float32)
    moment = square @ square.swapaxes(-1, -2)
    moments = Moments(moment, moment, np.ones((H, D // 2), np.float32))
    more = {"spec": spec, "options": options, "moments": moments, "output": moment}
    agree(fit(make_mesh(data=2, model=2), **more), fit(**more))


@pytest.mark.parametrize("size", [8, 24])
@pytest.mark.parametrize("many_zeros", [False, True])
def test_median_over_devices(size, many_zeros):
    norms = np.exp(np.random.default_rng(size).normal(size=(3, size))).astype(np.float32)
    norms[0, :2] = 0
    if many_zeros:
        norms[1, : size // 2 + 1] = 0
    mapped = jax.shard_map(
        functools.partial(log_smooth, axis_name="data"),
        mesh=make_mesh(data=4),
        in_specs=P(None, "data"),
        out_specs=P(None, "data"),
    )
    np.testing.assert_allclose(jax.jit(mapped)(norms), log_smooth(norms), rtol=1e-6)


@pytest.mark.parametrize(
    ("axes", "words"),
    [
        ({"data": 3, "model": 1}, "256 tokens cannot be shared evenly by 3 devices along data"),
        ({"data": 1, "model": 4}, "2 KV heads cannot be shared evenly by 4 devices along model"),
    ],
)
def test_a_mesh_that_does_not_divide(axes, words):
    with pytest.raises(InputError, match=words):
        fit(make_mesh(**axes))
