"""Gradient norms to weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gsrq_jax.errors import InputError
from gsrq_jax.sensitivity import log_smooth


def test_against_the_formula_by_hand():
    norms = np.array([[0.0, 1.0, 2.0, 3.0, 14.0], [10.0, 20.0, 30.0, 50.0, 40.0]])
    expected = np.log(1 + norms / np.array([[2.0], [30.0]]))
    weights = log_smooth(norms)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(log_smooth)(norms), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(log_smooth)(jnp.asarray(norms)), expected, rtol=1e-6)


def test_each_row_has_its_own_median():
    norms = jnp.array([[1.0, 2.0, 4.0], [0.0, 0.0, 9.0], [0.0, 0.0, 0.0]])
    weights = log_smooth(norms)
    np.testing.assert_allclose(weights[0], np.log1p([0.5, 1, 2]), rtol=1e-6)
    np.testing.assert_array_equal(weights[1:], 1)


@settings(max_examples=30, deadline=None)
@given(
    norms=hnp.arrays(np.float32, 7, elements=st.floats(2.0**-10, 2.0**10, width=32)),
    power=st.integers(-20, 20),
)
def test_scale_free_ordered_and_positive(norms, power):
    weights = np.asarray(log_smooth(norms))
    np.testing.assert_allclose(log_smooth(norms * np.float32(2.0) ** power), weights, rtol=1e-6)
    assert (np.diff(weights[np.argsort(norms)]) >= 0).all()
    assert (weights > 0).all()
    np.testing.assert_allclose(np.median(weights), np.log(2), rtol=1e-6)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -1.0])
def test_unusable_norms(bad):
    norms = jnp.array([1.0, bad, 2.0])
    with pytest.raises(InputError, match="finite and at least 0"):
        log_smooth(norms)
    with pytest.raises(InputError, match="finite and at least 0"):  # constants of a trace, too
        jax.jit(lambda: log_smooth(norms))()


def test_bfloat16_norms_give_float32_weights():
    norms = jnp.array([1.0, 3.0, 5.0], jnp.bfloat16)
    weights = log_smooth(norms)
    assert weights.dtype == jnp.float32
    np.testing.assert_allclose(weights, np.log1p([1 / 3, 1, 5 / 3]), rtol=1e-6)
