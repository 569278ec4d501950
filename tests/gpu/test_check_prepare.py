"""The cases of check_prepare.py: on a Hopper GPU by the kernels, and without one in plain jnp."""

import check_prepare
import jax.numpy as jnp
import pytest
from test_check_decode import on_hopper

from gsrq_jax.kernels import mosaic_gpu, mosaic_gpu_prepare


@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and jax 0.11 or 0.12")
def test_the_kernels_against_float64():
    found = {case: check_prepare.check(case, i) for i, case in enumerate(check_prepare.CASES)}
    assert not {case: error for case, error in found.items() if not error <= 1}


@pytest.fixture
def plain(monkeypatch):
    for name in ("prepare", "waves"):
        monkeypatch.setattr(mosaic_gpu_prepare, name, getattr(mosaic_gpu, name))


@pytest.mark.usefixtures("plain")
@pytest.mark.parametrize("index", [0, 2, 5, 6, 7])
def test_the_references_against_float64(index):
    assert check_prepare.check(check_prepare.CASES[index], index) <= 1


@pytest.mark.usefixtures("plain")
def test_errors_show(monkeypatch, capsys):
    case = check_prepare.Case(B=1, H=1, N=2)
    monkeypatch.setattr(check_prepare, "CASES", [case])

    def one_later(problem, inv_freq, first):
        return mosaic_gpu.waves(problem, inv_freq, first + 1)

    def no_nan(problem, query, *others):
        return mosaic_gpu.prepare(problem, jnp.nan_to_num(query), *others)

    assert check_prepare.main() == 0
    monkeypatch.setattr(mosaic_gpu_prepare, "waves", one_later)
    assert check_prepare.main() == 1
    monkeypatch.setattr(mosaic_gpu_prepare, "waves", mosaic_gpu.waves)
    monkeypatch.setattr(mosaic_gpu_prepare, "prepare", no_nan)
    assert check_prepare.main() == 1
    assert capsys.readouterr().out.count("TOO LARGE: error") == 2
