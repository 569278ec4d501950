"""Parities of signs as further planes: the search, and what a fit leaves."""

import importlib.util
import itertools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

FOLDER = pathlib.Path(__file__).parents[2] / "benchmarks"


@pytest.fixture(scope="module")
def benchmark():
    sys.path.insert(0, str(FOLDER))
    spec = importlib.util.spec_from_file_location("parities", FOLDER / "parities.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["parities"] = module
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(FOLDER))


def test_features(benchmark):
    signs = np.array([[1, -1, -1, 1]], np.float32)
    found = np.asarray(benchmark.features(jnp.asarray(signs), 4)).reshape(4, 4)
    for r, (own, before, earlier) in enumerate([(1, 0, 0), (-1, 1, 0), (-1, -1, 1), (1, -1, -1)]):
        np.testing.assert_array_equal(
            found[r], [own, own * before, own * earlier, own * before * earlier]
        )


@pytest.mark.parametrize("planes", [1, 2, 4])
def test_a_beam_that_holds_everything_finds_the_best(benchmark, planes):
    x = jax.random.normal(jax.random.key(0), (40, 3))
    vectors = jax.random.normal(jax.random.key(1), (5 * planes, 3))
    offset = jnp.array([0.3, -0.2, 0.1])
    every = jnp.array(list(itertools.product((-1.0, 1.0), repeat=5)))
    sums = offset + benchmark.features(every, planes) @ vectors
    best = jnp.square(x[:, None] - sums).sum(-1).min(1)
    # The search adds the noise times the number of planes that are not 0: the same for all codes.
    signs = benchmark.encode(x, offset, vectors, jnp.float32(1e-3), planes=planes, beam=32)
    found = offset + benchmark.features(signs, planes) @ vectors
    np.testing.assert_allclose(jnp.square(x - found).sum(-1), best, rtol=1e-3, atol=1e-4)


def test_more_planes_leave_less(benchmark):
    x, held_out = jnp.split(jax.random.normal(jax.random.key(2), (3000, 8)), [2000])
    config = benchmark.Config(beam=4, rounds=8)
    left = [benchmark.left_over(config, x, held_out, 4, planes) for planes in (1, 2, 4)]
    assert left[0] < 0.75  # half a bit a number
    assert left[2] < 0.97 * left[0]
