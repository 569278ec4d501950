"""Rotation against complex numbers, and its algebra."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsrq_jax.rope import rotate

FREQ = 10_000.0 ** -(np.arange(0, 16, 2) / 16)


def complex_rotate(x, positions, inv_freq):
    half = x.shape[-1] // 2
    z = (x[..., :half] + 1j * x[..., half:]) * np.exp(1j * positions[..., None] * inv_freq)
    return np.concatenate([z.real, z.imag], -1)


@pytest.fixture
def x():
    return np.random.default_rng(0).standard_normal((2, 5, 3, 16))


def test_pairs_turn_as_complex_numbers(x):
    positions = np.array([[0, 1, 2, 50, 1000], [-3, 7, 7, 0, 123]])[:, :, None]
    got = rotate(x.astype(np.float32), positions, FREQ.astype(np.float32))
    np.testing.assert_allclose(got, complex_rotate(x, positions, FREQ), atol=2e-4)


def test_positions_broadcast_from_a_scalar_up(x):
    x = x.astype(np.float32)
    full = rotate(x, np.full((2, 5, 3), 9), FREQ)
    np.testing.assert_array_equal(rotate(x, 9, FREQ), full)
    np.testing.assert_array_equal(rotate(x, np.full((5, 1), 9), FREQ), full)


def test_negative_positions_turn_back(x):
    x = x.astype(np.float32)
    positions = np.arange(5)[:, None] * 100
    back = rotate(rotate(x, positions, FREQ), -positions, FREQ)
    np.testing.assert_allclose(back, x, atol=1e-5)


def test_scores_depend_on_distance_alone(x):
    q, k = x[0].astype(np.float32), x[1].astype(np.float32)
    near = (rotate(q, 12, FREQ) * rotate(k, 5, FREQ)).sum(-1)
    far = (rotate(q, 2012, FREQ) * rotate(k, 2005, FREQ)).sum(-1)
    np.testing.assert_allclose(near, far, atol=5e-3)
    assert np.abs(near - (rotate(q, 12, FREQ) * rotate(k, 6, FREQ)).sum(-1)).max() > 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_dtype_is_kept_and_angles_are_float32(x, dtype):
    low = jnp.asarray(x, dtype)
    got = jax.jit(rotate)(low, jnp.int32(100_003), FREQ.astype(np.float32))
    assert got.dtype == dtype
    # A position that bfloat16 cannot hold: only float32 angles land near the exact rotation.
    exact = complex_rotate(np.asarray(low, np.float64), np.array(100_003.0), FREQ)
    tolerance = 0.02 + 4 * float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(np.asarray(got, np.float64), exact, atol=tolerance)
