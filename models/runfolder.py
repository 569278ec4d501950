"""The folder of a run that can be interrupted: whose it is, what it was asked, what it wrote."""

import contextlib
import dataclasses
import json
import os
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from gsrq_jax.errors import InputError

_RECORD, _NEW_RECORD = "run.json", ".run.json.new"
_INPUTS = "inputs"

WORK = "work"
"""Folder in that of a run, for what is made on the way, be it before the run is begun."""


def claim(
    out: pathlib.Path,
    kind: str,
    asked: Mapping[str, Any],
    *,
    inputs: Mapping[str, str] | None = None,
    begin: bool = True,
    flag: str = "--out",
) -> None:
    """Make ``out`` the folder of this run, or find that it is.

    Args:
        out: the folder; made if it is not there.
        kind: of run, such as ``longbench``.
        asked: plain values that must be the same whenever the run goes on, by flag.
        inputs: checksums, such as ``text``, of what flags stood for when the run was begun, which
            must be the same, too.
        begin: if the folder is free, write what the run was asked for; otherwise only look.
        flag: by which the folder was given, for messages.

    Raises:
        InputError: if it is a file, holds something else, or a run that was asked for otherwise or
            whose inputs changed.
    """
    there = next(place for place in (out, *out.absolute().parents) if place.exists())
    if not there.is_dir():
        raise InputError(f"{there} is a file; choose another {flag}")
    record = json.loads(json.dumps({"kind": kind, **asked}))
    given = dict(inputs or {})
    before = _read(out)
    if before is None:
        ours = (WORK, _NEW_RECORD)
        entries = out.iterdir() if out.exists() else ()
        found = sorted(x.name for x in entries if x.name not in ours)
        if found:
            raise InputError(
                f"{out} exists and holds something else ({found[0]}); choose another {flag}"
            )
        if not begin:
            return
        out.mkdir(parents=True, exist_ok=True)
        (out / _NEW_RECORD).write_text(json.dumps(record | {_INPUTS: given}, indent=1))
        os.replace(out / _NEW_RECORD, out / _RECORD)
        return
    if before["kind"] != kind:
        raise InputError(
            f"{out} holds a run of another kind ({before['kind']}); choose another {flag}"
        )
    if changed := [x for x in record if x not in before or record[x] != before[x]]:
        names = ", ".join("--" + x.replace("_", "-") for x in changed)
        raise InputError(
            f"{out} holds a run with another {names}; choose another {flag}, or remove it to "
            "start anew"
        )
    if changed := [x for x in given if before[_INPUTS].get(x) != given[x]]:
        raise InputError(
            f"the {' and the '.join(changed)} changed since the run in {out} began; "
            f"choose another {flag}, or remove it to start anew"
        )


def _read(out: pathlib.Path) -> dict[str, Any] | None:
    """What ``run.json`` holds, if it is there and ours."""
    try:
        record = json.loads((out / _RECORD).read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return None
    return record if isinstance(record, dict) and "kind" in record else None


def plain(config: Any) -> dict[str, Any]:
    """A config dataclass as JSON holds it."""
    return json.loads(json.dumps(dataclasses.asdict(config), default=str))


@contextlib.contextmanager
def writing(out: pathlib.Path) -> Iterator[None]:
    """A failing disk is bad input."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"cannot write to {out} ({error.strerror or error}); make room or choose another "
            "--out. What is done is kept: the same command goes on from there"
        ) from error


class Lines:
    """A file of JSON objects, one a line, that grows as they are made.

    A last line that was cut while it was written is dropped.

    Raises:
        InputError: if another line is damaged.
    """

    def __init__(self, path: pathlib.Path):
        self.path = path
        self.rows: list[dict[str, Any]] = []
        if not path.exists():
            return
        data = path.read_bytes()
        whole = data[: data.rfind(b"\n") + 1]
        try:
            self.rows = [json.loads(line) for line in whole.splitlines()]
        except ValueError as error:
            raise InputError(f"{path} is damaged ({error}); remove it to do it anew") from error
        if len(whole) < len(data):
            os.truncate(path, len(whole))

    def add(self, rows: list[dict[str, Any]]) -> None:
        """Append rows; they are on the disk when this returns."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            file.write("".join(json.dumps(x, ensure_ascii=False) + "\n" for x in rows).encode())
            file.flush()
            os.fsync(file.fileno())
        self.rows += rows
