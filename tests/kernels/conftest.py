"""Kernels for a GPU are compiled without one: `lowering.py` in a process that sees a stand-in."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest


def installed(module):
    """Its spec, or None if it or a package that it is in is not there."""
    try:
        return importlib.util.find_spec(module)
    except ModuleNotFoundError:
        return None


@pytest.fixture(scope="module")
def without_a_gpu(tmp_path_factory):
    """``run(what, sizes)``: what lowering.py prints in a process that sees a stand-in of a GPU."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the stand-in of the CUDA driver")
    if installed("jax_plugins.xla_cuda13") is None:
        pytest.skip("jax is installed without CUDA 13")
    cuda = installed("nvidia.cu13")
    places = [Path(p) / "bin" for p in cuda.submodule_search_locations] if cuda else []
    if not any((p / "ptxas").exists() for p in places) and shutil.which("ptxas") is None:
        pytest.skip("ptxas is not installed")
    folder = tmp_path_factory.mktemp("cuda")
    here = Path(__file__).parent
    command = [compiler, "-shared", "-fPIC", "-w", "-o", folder / "libcuda.so.1"]
    subprocess.run([*command, here / "fake_cuda.c"], check=True)
    environment = os.environ | {
        "LD_LIBRARY_PATH": str(folder),
        "JAX_PLATFORMS": "cpu",
        "MOSAIC_GPU_DUMP_PTXAS": "1",
    }

    def run(what, sizes):
        numbers = [f"{k}={v}" for k, v in sizes.items()]
        command = [sys.executable, here / "lowering.py", what, *numbers]
        done = subprocess.run(command, capture_output=True, env=environment, check=False)
        return (done.stdout + done.stderr).decode(errors="replace")

    return run
