"""The cases of check_recent.py: on a Hopper GPU by the kernel, and without one in plain jnp."""

import check_recent
import pytest
from test_check_decode import on_hopper

from gsrq_jax.kernels import mosaic_gpu_recent, reference


@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and jax 0.11 or 0.12")
def test_the_kernel_against_float64():
    found = {case: check_recent.check(case, i) for i, case in enumerate(check_recent.CASES)}
    assert not {case: error for case, error in found.items() if not error <= check_recent.BOUND}


def test_the_reference_against_float64(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_recent, "attend_recent", reference.attend_recent)
    case = check_recent.Case(B=4, H=2, q=2, d=64, S=3, C=37)
    assert check_recent.check(case, 0) <= 10 * check_recent.BOUND  # weights have 16 bits there
    monkeypatch.setattr(mosaic_gpu_recent, "attend_recent", one_too_few)
    assert not check_recent.check(case, 0) <= 10 * check_recent.BOUND


def one_too_few(query, recent):
    return reference.attend_recent(query, recent._replace(held=recent.held - 1))


def test_says_which_case_is_too_large(monkeypatch, capsys):
    case = check_recent.Case(B=1, H=1, q=1, d=64, S=1, C=9)
    monkeypatch.setattr(check_recent, "CASES", [case, case])
    monkeypatch.setattr(mosaic_gpu_recent, "attend_recent", one_too_few)
    assert check_recent.main() == 1
    assert capsys.readouterr().out.count("TOO LARGE: error") == 2
    monkeypatch.setattr(check_recent, "check", lambda case, seed: 0.0)
    assert check_recent.main() == 0
