"""What gets installed, what importing it pulls in, and which way imports point."""

import ast
import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = {  # package: folder of the checkout
    "gsrq_jax": ROOT / "gsrq_jax",
    "gsrq_jax.models": ROOT / "models",
    "gsrq_jax.kernels": ROOT / "kernels",
}


def test_library_needs_no_model_code_nor_heavy_packages():
    """Every module of the library and the kernels, imported in a process of its own."""
    script = """
import importlib, pkgutil, sys
import gsrq_jax, gsrq_jax.kernels
for package in (gsrq_jax, gsrq_jax.kernels):
    for module in pkgutil.iter_modules(package.__path__, package.__name__ + "."):
        if module.name != "gsrq_jax.models":
            importlib.import_module(module.name)
assert "gsrq_jax.codebook" in sys.modules and "gsrq_jax.kernels.reference" in sys.modules
unwanted = ("gsrq_jax.models", "torch", "transformers", "matplotlib", "datasets", "flax", "gguf")
print(*(name for name in unwanted if name in sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == []


def imports(folder: Path) -> set[str]:
    """Modules of this project that the Python files of a folder import, anywhere in them."""
    found = set()
    for file in folder.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{file} imports relatively"
                found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("gsrq_jax", "models", "kernels")}


def test_imports_point_one_way():
    library, models, kernels = (
        imports(SOURCES[name]) for name in ("gsrq_jax", "gsrq_jax.models", "gsrq_jax.kernels")
    )
    assert all(name.startswith("gsrq_jax.") for name in library | models | kernels)
    assert not {name for name in library if name.startswith("gsrq_jax.models")}
    assert not {name for name in kernels if not name.startswith("gsrq_jax.kernels.")}
    assert "gsrq_jax.kernels.reference" in library
    assert any(name.startswith("gsrq_jax.models.") for name in models)


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    pytest.importorskip("setuptools", minversion="77", reason="setuptools 77 builds the wheel")
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for path in (
        *SOURCES.values(),
        *map(ROOT.joinpath, ("pyproject.toml", "README.md", "LICENSE")),
    ):
        if path.is_dir():
            ignore = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, source / path.name, ignore=ignore)
        else:
            shutil.copy(path, source)
    script = f"from setuptools.build_meta import build_wheel; build_wheel({str(folder)!r})"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=source, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = folder.glob("*.whl")
    return zipfile.ZipFile(file)


def test_wheel_brings_one_name_and_every_module(wheel):
    names = set(wheel.namelist())
    version = importlib.metadata.version("gsrq-jax")
    assert {name.split("/")[0] for name in names} == {"gsrq_jax", f"gsrq_jax-{version}.dist-info"}
    for package, folder in SOURCES.items():
        assert {f"{package.replace('.', '/')}/{file.name}" for file in folder.glob("*.py")} <= names
    assert {"gsrq_jax/py.typed", "gsrq_jax/models/longbench_tasks.json"} <= names
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_wheel_metadata(wheel):
    (entry_points,) = (n for n in wheel.namelist() if n.endswith("entry_points.txt"))
    text = wheel.read(entry_points).decode()
    for line in filter(lambda line: "=" in line, text.splitlines()):
        module = line.split("=")[1].split(":")[0].strip()
        assert f"{module.replace('.', '/')}.py" in wheel.namelist()
    (metadata,) = (n for n in wheel.namelist() if n.endswith("dist-info/METADATA"))
    lines = wheel.read(metadata).decode().splitlines()
    for extra in ("cuda12", "cuda13", "tpu"):
        assert f"Provides-Extra: {extra}" in lines
        assert f'Requires-Dist: jax[{extra}]; extra == "{extra}"' in lines
    assert not any(line.startswith(("Requires-Dist: torch", "Requires-Dist: tr")) for line in lines)
