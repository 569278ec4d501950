"""The cases of check_planes.py: on a Hopper GPU by the kernel, and without one by the reference."""

import dataclasses

import check_planes
import pytest
from test_check_decode import on_hopper

from gsrq_jax.kernels import mosaic_gpu_planes, reference


@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and jax 0.11 or 0.12")
def test_the_kernel_against_float64():
    errors = {str(case): check_planes.check(case, i) for i, case in enumerate(check_planes.CASES)}
    assert not {case: error for case, error in errors.items() if not error <= check_planes.BOUND}


@pytest.mark.parametrize("kind", ["random", "one", "flat", "mean"])
def test_the_reference_against_float64(monkeypatch, kind):
    monkeypatch.setattr(mosaic_gpu_planes, "attend_planes", reference_with_exact)
    check_planes.fused.clear_cache()
    small = {"H": 2, "q": 2, "N": 3, "b": 256, "d": 64, "R": 32, "S": 64, "fills": 2}
    lengths = check_planes.ragged(128, 6)
    case = check_planes.Case(B=len(lengths), kind=kind, lengths=lengths, **small)
    for how in ({}, {"every": None, "B": 2}, {"s": 2, "stride": 3, "B": 2}):
        error = check_planes.check(dataclasses.replace(case, **how), 0)
        assert error < (5e-5 if kind == "one" else 1e-5)  # of a score of 40 in float32


def reference_with_exact(*, recent, dtype, **given):
    """`reference.attend_planes` and exact tokens in one softmax."""
    beside = reference.attend_recent(given["query"], recent)
    return reference.with_beside(reference.attend_planes(**given), beside, dtype)
