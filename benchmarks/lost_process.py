"""Codebooks by several processes of one host, one of which is killed on the way, and by one.

    python benchmarks/lost_process.py --model MODEL --text TEXT

Runs `train_codebooks.py` five times: *one* process on one device; *together*, one process on
all; *apart*, several processes of one device each; *lost*, the same, whose last process is
killed after some layers, which the others have to notice; and *resumed*, the same command again.
The first four run beside each other: nothing here is a time of training. Compares their codebooks:
*resumed* is to be what *apart* is, and all what *one* is but for rounding. Writes
`results/lost-process.json`; ``--table`` prints what is there. On GPUs XLA's choice of algorithms by
time is switched off, so that rounding does not depend on it.
"""

import dataclasses
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from typing import Any

import numpy as np

from gsrq_jax import codebook
from gsrq_jax.errors import InputError, at_least
from gsrq_jax.models import commands
from gsrq_jax.results import repeated, write_result

ROOT = pathlib.Path(__file__).parent.parent


@dataclasses.dataclass(frozen=True)
class Config:
    """The experiment.

    Attributes:
        model: as `train_codebooks.py` takes it, and ``text``.
        text: as there.
        flags: of the training, in one string.
        processes: of *apart* and *lost*.
        devices: numbers of the GPUs to be used, at least as many as processes.
        layers: that are fitted before a process is killed.
        timeout: seconds after which a process is lost, as ``GSRQ_PROCESS_TIMEOUT``.
        limit: seconds that a training may take.
        work: folder for the runs; a temporary one by default.
        out: folder under which ``results`` lies.
        table: only print what was measured.
    """

    model: str = "demo"
    text: str = "python"
    flags: str = "--tokens 16384 --length 1024 --eval-sequences 1 --fit.iterations 4 --fit.warmup 2"
    processes: int = 2
    devices: tuple[int, ...] = (0, 1)
    layers: int = 3
    timeout: float = 10.0
    limit: float = 600.0
    work: pathlib.Path | None = None
    out: pathlib.Path = ROOT
    table: bool = False


class Run:
    """Processes of one training, on devices of their own each.

    Args:
        config: the experiment.
        name: of the run and its folder in ``work``.
        devices: of each process.
    """

    def __init__(self, config: Config, work: pathlib.Path, name: str, devices: list[list[int]]):
        self.name, self.folder = name, work / name.partition(" ")[0]
        self.log = [work / f"{name.replace(' ', '-')}-{i}.log" for i in range(len(devices))]
        with socket.socket() as free:
            free.bind(("localhost", 0))
            port = free.getsockname()[1]
        # train_codebooks.py, also where the package is only on PYTHONPATH.
        train = "from gsrq_jax.models import commands; commands.train()"
        program = [sys.executable, "-P", "-c", train, "--out", self.folder]
        program += ["--model", config.model, "--text", config.text, *shlex.split(config.flags)]
        self.started = []
        for index, own in enumerate(devices):
            environment = os.environ | _environment(own)
            if len(devices) > 1:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                    "JAX_NUM_PROCESSES": str(len(devices)),
                    "JAX_PROCESS_ID": str(index),
                    "GSRQ_PROCESS_TIMEOUT": str(config.timeout),
                }
            with self.log[index].open("w") as log:
                process = subprocess.Popen(
                    program, env=environment, stdout=subprocess.DEVNULL, stderr=log
                )
            self.started.append(process)

    def ended(self, limit: float) -> list[int]:
        """Exit codes; what runs longer than ``limit`` seconds is ended."""
        until = time.monotonic() + limit
        for process in self.started:
            try:
                process.wait(max(0.1, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return [process.returncode for process in self.started]

    def errors(self) -> list[str]:
        """The last that each process said of an error, maybe behind a bar of progress."""
        said = [re.findall("error: .*", x.read_text(errors="replace")) for x in self.log]
        return [x[-1] if x else "" for x in said]


def _environment(devices: list[int]) -> dict[str, str]:
    """Variables of a process on these devices; on a CPU all processes share its cores."""
    flags = os.environ.get("XLA_FLAGS", "").split()
    if os.environ.get("JAX_PLATFORMS") == "cpu":
        flags = [x for x in flags if "device_count" not in x]
        flags.append(f"--xla_force_host_platform_device_count={len(devices)}")
        return {"XLA_FLAGS": " ".join(flags)}
    return {
        "CUDA_VISIBLE_DEVICES": ",".join(map(str, devices)),
        "XLA_FLAGS": " ".join([*flags, "--xla_gpu_autotune_level=0"]),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }


def killed(run: Run, config: Config) -> dict[str, Any]:
    """Kills the last process of a run after some layers; how the others end."""
    mark = run.folder / "work" / f"layer-{config.layers - 1:03}.npz"
    until = time.monotonic() + config.limit
    while not mark.exists():
        if time.monotonic() > until or any(p.poll() is not None for p in run.started):
            raise InputError(f"run {run.name} ended before {mark.name}: {run.errors()}")
        time.sleep(0.01)
    *others, last = run.started
    last.send_signal(signal.SIGKILL)
    start, after = time.monotonic(), []
    for process in others:
        try:
            process.wait(config.limit)
        except subprocess.TimeoutExpired:
            process.kill()
        after.append(time.monotonic() - start)
    codes = run.ended(1)
    return {
        "exit_codes": codes,
        "seconds_until_all_ended": max(after),
        "timeout": config.timeout,
        "errors": run.errors()[:-1],
        "layers_done": len(list((run.folder / "work").glob("layer-*.npz"))),
    }


def difference(a: pathlib.Path, b: pathlib.Path) -> dict[str, Any]:
    """Of two runs' codebooks and what fitting them found.

    Vectors of a first layer depend on the token alone, so many are equal and become codewords;
    rounding decides which of two equal ones goes. It counts apart from the others.
    """
    books = [codebook.load(x / "codebooks") for x in (a, b)]
    reports = [json.loads((x / "report.json").read_text()) for x in (a, b)]
    rest, first = [], []
    for name in ("key", "value"):
        x, y = (np.asarray(getattr(part, name), np.float32) for part in books)
        size = np.sqrt(np.mean(np.square(y), axis=tuple(range(1, y.ndim))))
        off = np.abs(x - y).max(axis=tuple(range(1, y.ndim))) / size
        first.append(off[0])
        rest.append(off[1:].max())
    fits = [
        np.asarray([row["distortion"] for row in x["fit"] if row["layer"] > 0]) for x in reports
    ]
    measured = [[r["value"] for r in x["rows"] if r["metric"] == "perplexity"] for x in reports]
    return {
        "first_layer": float(max(first)),
        "other_layers": float(max(rest)),
        "distortion": float(np.abs(fits[0] / fits[1] - 1).max()),
        "perplexity": float(np.abs(np.divide(*measured) - 1).max()),
        "equal": all(
            np.array_equal(getattr(books[0], n), getattr(books[1], n)) for n in ("key", "value")
        ),
    }


def measure(config: Config, work: pathlib.Path) -> list[dict[str, Any]]:
    """Rows of all runs.

    Raises:
        InputError: if a run that should not fail did.
    """
    devices, n = list(config.devices), config.processes
    if n < 2 or len(devices) < n:
        raise InputError(f"{n} processes need 2 or more, and as many devices; got {devices}")
    at_least(1, "--", layers=config.layers)
    each = [[x] for x in devices[:n]]
    lost = Run(config, work, "lost", each)
    runs = [
        lost,
        Run(config, work, "one", [devices[:1]]),
        Run(config, work, "together", [devices]),
        Run(config, work, "apart", each),
    ]
    rows = []
    try:
        rows.append({"run": "lost", "processes": n} | killed(lost, config))
        again = Run(config, work, "lost resumed", each)
        runs.append(again)
        for run in runs[1:]:
            if any(codes := run.ended(config.limit)):
                raise InputError(f"run {run.name} ended with {codes}: {run.errors()}")
    finally:
        for run in runs:
            run.ended(0)
    folders = {run.name: run.folder for run in runs[1:]}
    for name, like in (
        ("together", "one"),
        ("apart", "one"),
        ("lost resumed", "apart"),
    ):
        used = {"processes": n, "devices": n}
        if name == "together":
            used = {"processes": 1, "devices": len(devices)}
        found = difference(folders[name], folders[like])
        rows.append({"run": name} | used | {"compared_with": like} | found)
    return rows


def table(data: Mapping[str, Any]) -> str:
    """The rows as text."""
    lines = []
    for r in data["rows"]:
        if r["run"] == "lost":
            lines.append(
                f"killed after {r['layers_done']} layers: the others ended after "
                f"{r['seconds_until_all_ended']:.1f} s (a process is lost after "
                f"{r['timeout']:g} s) with exit codes {r['exit_codes'][:-1]}: {r['errors'][0]}"
            )
            continue
        lines.append(
            f"{r['run']} ({r['processes']} processes, {r['devices']} devices) beside "
            f"{r['compared_with']}: "
            + (
                "the same codebooks"
                if r["equal"]
                else f"codewords differ by at most {r['other_layers']:.1e} of their size "
                f"({r['first_layer']:.1e} in the first layer), distortions behind the first layer "
                f"by {r['distortion']:.1e}"
                + (f", perplexities by {r['perplexity']:.1e}" if "perplexity" in r else "")
            )
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    """Runs, compares, writes and prints."""
    file = config.out / "results" / "lost-process.json"
    if not config.table:
        with tempfile.TemporaryDirectory() as folder:
            work = config.work or pathlib.Path(folder)
            shutil.rmtree(work, ignore_errors=True)
            work.mkdir(parents=True)
            rows = measure(config, work)
        names = {f"--{x}": pathlib.Path(getattr(config, x)).name for x in ("model", "text")}
        program = repeated("benchmarks/lost_process.py", instead=names, without=("--out", "--work"))
        write_result(file, rows, command=f"python {program}")
    print(table(json.loads(file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    commands.run(Config, main, None)
