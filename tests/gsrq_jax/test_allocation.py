"""Stages under a budget: against every way of giving them."""

import itertools

import numpy as np
import pytest

from gsrq_jax import allocation
from gsrq_jax.errors import InputError


@pytest.mark.parametrize("total", [3, 5, 8, 12])
@pytest.mark.parametrize("seed", range(3))
def test_best_of_all_for_convex_losses(seed, total):
    rng = np.random.default_rng(seed)
    falls = -np.sort(-(rng.random((3, 4)) ** 3))  # each stage saves less than the one before
    loss = 10 - np.pad(falls.cumsum(axis=1), ((0, 0), (1, 0)))
    got = allocation.allocate(loss, total)

    def cost(stages):
        return loss[np.arange(3), np.asarray(stages)].sum()

    every = [s for s in itertools.product(range(1, 5), repeat=3) if sum(s) == total]
    assert got.sum() == total
    assert cost(got) == pytest.approx(min(map(cost, every)))


def test_all_alike_share_alike():
    loss = np.tile(0.5 ** np.arange(9.0), (6, 1))
    assert allocation.allocate(loss, 24).tolist() == [4] * 6
    assert allocation.allocate(np.zeros((6, 9)), 25).tolist() == [5, 4, 4, 4, 4, 4]


@pytest.mark.parametrize("total", [2, 25])
def test_budget_that_cannot_be_given(total):
    with pytest.raises(InputError, match=f"{total} stages cannot be given to 3 codes of 1 to 8"):
        allocation.allocate(np.ones((3, 9)), total)


def test_slopes_with_a_floor_for_noise():
    got = allocation.slopes(*map(np.asarray, ([3.0, 0.9], [1.0, 1.0], [0.5, 0.5], [0.25, 0.25])))
    np.testing.assert_allclose(got, [8.0, 0.038])  # mean of 8 and −0.4, a hundredth of it
    nothing = allocation.slopes(*np.zeros((4, 2)))
    np.testing.assert_array_equal(nothing, 0)
