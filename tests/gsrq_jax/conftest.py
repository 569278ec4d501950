import pytest

from gsrq_jax.kernels import cluster as plain
from gsrq_jax.kernels import devices, mosaic_gpu_cluster


@pytest.fixture
def plain_kernels(monkeypatch):
    """The kernels' functions in plain jnp, where a GPU would have the kernels."""
    monkeypatch.setattr(devices, "check_hopper", lambda: None)
    for name in ("nearest", "cell_sums"):
        monkeypatch.setattr(mosaic_gpu_cluster, name, getattr(plain, name))
