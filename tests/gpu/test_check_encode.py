"""The cases of check_encode.py: on a Hopper GPU by the kernel, and without one by XLA."""

import check_encode
import pytest
from test_check_decode import on_hopper

from gsrq_jax.kernels import mosaic_gpu_encode

SMALL = check_encode.Case(P=2, n=37, G=2, g=64, R=5)


@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and jax 0.11 or 0.12")
def test_the_kernel_against_float64():
    found = {case: check_encode.check(case, i) for i, case in enumerate(check_encode.CASES)}
    assert not {case: worst for case, worst in found.items() if not worst <= 1}


def test_xla_against_float64(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_encode, "encode", check_encode.XLA)
    assert check_encode.check(SMALL, 0) <= 1
    monkeypatch.setattr(mosaic_gpu_encode, "encode", one_wrong)
    assert not check_encode.check(SMALL, 0) <= 1


def one_wrong(x, codewords):
    return check_encode.XLA(x, codewords).at[1, 30, 1, 3].add(1) % codewords.shape[-2]


def test_times_both(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_encode, "encode", check_encode.XLA)
    found = check_encode.microseconds(SMALL, calls=1, repeats=1)
    assert min(found.values()) > 0
    assert found.keys() == {"kernel", "XLA"}
