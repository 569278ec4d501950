"""The cases of check_decode.py: on a Hopper GPU by the kernel, and without one by the reference."""

import dataclasses
import functools

import check_decode
import pytest

from gsrq_jax.kernels import decode, devices, mosaic_gpu
from gsrq_jax.kernels.errors import InputError


def on_hopper():
    try:
        devices.check_hopper()
    except InputError:
        return False
    return True


@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and jax 0.11 or 0.12")
def test_the_kernel_against_float64():
    errors = {str(case): check_decode.check(case, i) for i, case in enumerate(check_decode.CASES)}
    assert not {case: error for case, error in errors.items() if not error <= check_decode.BOUND}


@pytest.mark.parametrize("kind", ["random", "one", "flat", "sink", "mean"])
def test_the_reference_against_float64(monkeypatch, kind):
    plain = functools.partial(decode.attend_tiles, implementation="reference")
    monkeypatch.setattr(mosaic_gpu, "attend_tiles", plain)
    check_decode.fused.clear_cache()
    small = {"H": 2, "q": 2, "N": 3, "b": 128, "d": 64, "R": 4, "S": 4}
    lengths = check_decode.ragged(128, 3)
    bf16 = kind != "sink"  # with it queries have 16 bits, of a score of 40
    case = check_decode.Case(B=len(lengths), kind=kind, lengths=lengths, bf16=bf16, **small)
    assert check_decode.check(case, 0) < 1e-5
    for every in (None, 16):
        assert check_decode.check(dataclasses.replace(case, every=every, B=2), 1) < 1e-5
    lengths = check_decode.ragged(64, 6)
    parts = dataclasses.replace(case, every=16, fills=2, B=len(lengths), lengths=lengths)
    assert check_decode.check(parts, 2) < 1e-5
