"""The cases of check_planes.py: on a Hopper GPU by the kernel, and without one by the reference."""

import dataclasses

import check_planes
import pytest
from test_check_decode import on_hopper


@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and jax 0.11 or 0.12")
def test_the_kernel_against_float64():
    for seed, case in enumerate(check_planes.CASES):
        assert check_planes.too_large(case, seed) == []


@pytest.mark.parametrize("share", [1, 2])
def test_the_reference_against_float64(share):
    small = {"H": 2, "q": 2, "N": 3, "b": 128, "d": 64, "R": 32, "S": 64, "fills": 2}
    case = check_planes.Case(**small, share=share, implementation="reference")
    assert check_planes.too_large(case, 0) == []
    assert check_planes.too_large(dataclasses.replace(case, every=None, T=3), 1) == []
