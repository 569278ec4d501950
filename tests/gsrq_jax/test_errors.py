"""Checks of numbers."""

import pytest

from gsrq_jax.errors import InputError, at_least


def test_numbers_that_are_too_small():
    at_least(0, window=0, sinks=4, chunk=None)
    with pytest.raises(InputError, match=r"^a_b must be at least 2, got 1$"):
        at_least(2, first=2, a_b=1, last=0)
    with pytest.raises(InputError, match=r"^--distill\.check-every must be at least 1, got 0$"):
        at_least(1, "--distill.", check_every=0)
    with pytest.raises(InputError, match=r"^the model's kv_heads must be at least 1, got -3$"):
        at_least(1, "the model's ", kv_heads=-3)
