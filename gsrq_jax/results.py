"""Files of measured results: one a command, with what is needed to run it again."""

import datetime
import importlib.metadata
import json
import os
import pathlib
import platform
import shlex
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Any

import jax

_PACKAGES = ("jax", "jaxlib", "flax", "numpy")


def write_result(
    path: str | os.PathLike[str], rows: Sequence[Mapping[str, Any]], *, command: str, **fields: Any
) -> pathlib.Path:
    """Writes ``{"command", "device", "versions", "date", "commit", **fields, "rows"}`` as JSON.

    The file appears whole or not at all; folders on the way are made.

    Args:
        path: the file, by custom ``results/<what>.json``.
        rows: one mapping of plain values each.
        command: the command line, as a user would type it.
        fields: more facts about the whole run.

    Returns:
        The path.
    """
    path = pathlib.Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "command": command,
        "device": device(),
        "versions": versions(),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        **fields,
        "rows": [dict(row) for row in rows],
    }
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    return path


def write_whole(path: pathlib.Path, text: str) -> None:
    """Writes a file such that it appears whole or not at all."""
    with tempfile.NamedTemporaryFile(
        "w", dir=path.parent, prefix=path.name, suffix=".part", delete=False, encoding="utf-8"
    ) as file:
        part = pathlib.Path(file.name)
        try:
            file.write(text)
        except BaseException:
            part.unlink()
            raise
    part.chmod(0o644)
    part.replace(path)


def command_line() -> str:
    """How this process was started, as a user would type it."""
    program = sys.argv[0]
    if program.endswith(".py"):
        return shlex.join(["python", *sys.argv])
    return shlex.join([pathlib.PurePath(program).name, *sys.argv[1:]])  # an installed command


def repeated(program: str, *, instead: Mapping[str, Any], without: Sequence[str] = ()) -> str:
    """This process's command line for one of its results, which does not depend on the others.

    Args:
        program: its name.
        instead: flags, with dashes, and the one value that each has now.
        without: flags that the result does not depend on, left out.
    """
    kept, skipping = [], False
    for word in sys.argv[1:]:
        if word.startswith("--"):
            skipping = word in instead or word in without
        if not skipping:
            kept.append(word)
    chosen = [str(x) for pair in instead.items() for x in pair]
    return shlex.join([program, *chosen, *kept])


def device() -> str:
    """What jax computes on here, such as ``8 × NVIDIA H100`` or ``cpu (2 cores, x86_64)``."""
    devices = jax.devices()
    if devices[0].platform == "cpu":
        return f"cpu ({os.cpu_count()} cores, {platform.machine()})"
    count = f"{len(devices)} × " if len(devices) > 1 else ""
    return count + devices[0].device_kind


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on."""
    return {"python": platform.python_version()} | {
        name: importlib.metadata.version(name) for name in _PACKAGES
    }


def commit() -> str | None:
    """This checkout's commit, ``+changes`` if tracked code differs from it; None outside one."""

    def git(*arguments: str) -> str:
        where = pathlib.Path(__file__).parent
        run = ["git", "-C", str(where), *arguments]
        return subprocess.run(run, check=True, capture_output=True, text=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/*.py")
        return git("rev-parse", "--short=12", "HEAD") + ("+changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None
