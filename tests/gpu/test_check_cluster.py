"""The cases of check_cluster.py: on a Hopper GPU by the kernels, and without one in plain jnp."""

import check_cluster
import pytest
from test_check_decode import on_hopper

from gsrq_jax.kernels import cluster, mosaic_gpu_cluster


@pytest.mark.skipif(not on_hopper(), reason="needs a Hopper GPU and jax 0.11 or 0.12")
def test_the_kernels_against_float64():
    found = {case: check_cluster.check(case, i) for i, case in enumerate(check_cluster.CASES)}
    bad = {case: check_cluster.too_large(case, errors) for case, errors in found.items()}
    assert not any(bad.values()), bad


def test_plain_functions_against_float64(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_cluster, "nearest", cluster.nearest)
    monkeypatch.setattr(mosaic_gpu_cluster, "cell_sums", cluster.cell_sums)
    case = check_cluster.Case(2, 207, 64, 16, unit=True, kinds=2)
    assert not check_cluster.too_large(case, check_cluster.check(case, 0))
    monkeypatch.setattr(mosaic_gpu_cluster, "nearest", wrong)
    assert check_cluster.too_large(case, check_cluster.check(case, 0)) == ["other codes", "lost"]


def wrong(points, codewords, unit):
    code, *others = cluster.nearest(points, codewords, unit=unit)
    return code.at[0, 5].add(1) % codewords.shape[1], *others
