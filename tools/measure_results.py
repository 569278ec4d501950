"""Measure all that docs/results.md shows, many commands at a time on each of several GPUs.

``python tools/measure_results.py --model M.gguf --calibrate valid.txt --test test.txt --longbench
FOLDER --gpus 0 1``; with ``--list`` jobs are only named; ``--only PATTERN …`` takes some of them,
in the order of the patterns. Results go to ``results/``, all else to ``runs/measure/``. What has
run is not run again, what was stopped goes on: start the same line once more; a second one, with
other GPUs, takes jobs from the first.
"""

import argparse
import dataclasses
import fcntl
import fnmatch
import functools
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import IO, NamedTuple

ROOT = pathlib.Path(__file__).parents[1]
RATES = (2, 1, 0.75, 0.5, 0.375, 0.25)
WINDOWS = ("128", "32", "0")
SEQUENCES = {8192: 8, 2048: 24}  # by their length
FIDELITY, NEEDLE = "measure_fidelity", "measure_needle"


@dataclasses.dataclass(frozen=True)
class Job:
    """One command.

    Attributes:
        name: of it and its log; ``--only`` selects by it.
        command: arguments behind ``python``, or behind the entry of `gsrq_jax.models.commands` that
            ``entry`` names.
        entry: such as ``measure_fidelity``; empty for a script.
        needs: files of the work folder that other jobs make.
        memory: of a GPU, GB.
        precision: of products of float32.
        keep: file of the work folder, and the one under ``results/`` that it becomes.
    """

    name: str
    command: tuple[str, ...]
    entry: str = ""
    needs: tuple[str, ...] = ()
    memory: float = 23
    precision: str = "highest"
    keep: tuple[str, str] | None = None


@dataclasses.dataclass(frozen=True)
class Inputs:
    """Names that what the jobs read has in their folder."""

    model: str
    calibrate: str
    test: str
    longbench: str

    @property
    def common(self) -> tuple[str, ...]:
        """Flags of every measurement."""
        calibration = ("--calibration.text", self.calibrate, "--calibration.tokens", "98304")
        return ("--model", self.model, *calibration)


def _methods(names: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(x for name in names for x in ("--method", name))


def _longbench(
    inputs: Inputs,
    tag: str,
    names: tuple[str, ...],
    *flags: str,
    needs: tuple[str, ...],
) -> Job:
    out = f"longbench-{tag}"
    return Job(
        out,
        (
            *("eval_longbench.py", *inputs.common, "--data", inputs.longbench),
            *("--max-length", "7500", "--buckets", "1", "--batch", "20", "--keep", "decoded"),
            *(*flags, "--out", out, *_methods(names)),
        ),
        needs=needs,
        keep=(f"{out}/report.json", f"longbench/{tag}.json"),
    )


def _needle(
    inputs: Inputs, tag: str, names: tuple[str, ...], *flags: str, needs: tuple[str, ...]
) -> Job:
    command = (
        *(*inputs.common, "--text", inputs.test, "--lengths", "8192", "--batch", "10"),
        *(*flags, "--out", "results/needle", *_methods(names)),
    )
    return Job(f"needle-{tag}", command, NEEDLE, needs, memory=14)


def _fidelity(
    inputs: Inputs,
    name: str,
    names: tuple[str, ...],
    *flags: str,
    out: str,
    text: str,
    length: int = 2048,
    needs: tuple[str, ...] = (),
) -> Job:
    count = SEQUENCES[length]
    command = (
        *(*inputs.common, "--eval-text", text, "--length", str(length)),
        *("--sequences", str(count), *flags, "--out", f"results/{out}", *_methods(names)),
    )
    return Job(name, command, FIDELITY, needs, memory=20)


def _three(
    inputs: Inputs, tag: str, names: tuple[str, ...], fits: tuple[str, ...], *, first: bool = True
) -> Iterator[Job]:
    """LongBench, needle and perplexity at both lengths, of methods that share fits, which the
    ``first`` ones with these make."""
    kept = ("--work", str(pathlib.PurePath(fits[0]).parent), "--window", *WINDOWS)
    yield _longbench(inputs, tag, names, *kept, needs=() if first else fits)
    coded = tuple(name for name in names if name != "full")
    yield _needle(inputs, tag, coded, *kept, needs=fits)
    for length in SEQUENCES:
        yield _fidelity(
            *(inputs, f"fidelity-{length}-{tag}", coded, *kept),
            out="fidelity",
            text=inputs.test,
            length=length,
            needs=fits,
        )


def peers(inputs: Inputs) -> Iterator[Job]:
    """All methods of the tables, those first whose fits take longest."""

    def rates(family: str, bits: tuple[float, ...]) -> tuple[str, ...]:
        return tuple(f"{family}@{x:g}" for x in bits)

    for bits, exact in ((1, 0.96875), (2, 2.03125)):
        fits = (f"work-commvq-{bits}/commvq@{exact:g}.npz",)
        yield from _three(inputs, f"commvq-{bits}", rates("commvq", (bits,)), fits)
    for tag, names in {
        "cq-2": rates("cq", (2, 1)),
        "cq-0.5": rates("cq", (0.5, 0.25)),
        "cq-unweighted": ("cq-unweighted@1",),
    }.items():
        yield from _three(inputs, tag, names, tuple(f"work-{tag}/{name}.npz" for name in names))
    others = {("gsrq", 2): ("full", "int8"), ("vqllm", 0.25): ("int4", "kivi2", "kivi1")}
    for first in (True, False):
        for family in ("gsrq", "kmeans", "spherical", "vqllm"):
            known = tuple(x for x in RATES if (family, x) != ("vqllm", 0.375))
            for i in range(0, len(known), 2):
                if (i == 0) == first:
                    names = others.get((family, known[i]), ()) + rates(family, known[i : i + 2])
                    fits = (f"work-{family}/{family}@2.npz",)
                    tag = f"{family}-{known[i]:g}"
                    yield from _three(inputs, tag, names, fits, first=first)


ABLATIONS = {
    "encoder": ("gsrq@1+beam2", "gsrq@1+beam8", "gsrq@1+beam32", "gsrq@0.5+beam8"),
    "refits": ("gsrq@1+refits2+beam8", "gsrq@0.5+refits2+beam8"),
    "key-metrics": ("gsrq@1+kgradient", "gsrq@1+kqueries"),
    "value-metrics": ("gsrq@1+vgradient", "gsrq@1+voutput"),
    "metrics": ("gsrq@1+kgradient+voutput", "gsrq@1+kgradient+voutput+power1"),
    "frames": ("gsrq@1+pre", "gsrq@1+post", "gsrq@1+uncentred"),
    "short-blocks": ("gsrq@1+block32", "gsrq@1+block64"),
    "long-blocks": ("gsrq@1+block256", "gsrq@1+block512", "gsrq@1+block512+uncentred"),
    "uncentred-blocks": tuple(f"gsrq@1+block{b}+uncentred" for b in (32, 64, 256)),
    "codewords-16": ("gsrq@0.75+k16", "gsrq@0.75+k16+beam8", "gsrq@0.75+k16+refits2+beam8"),
    "codewords-64": ("gsrq@0.75+k64", "gsrq@0.75+k64+beam8", "gsrq@0.75+k64+refits2+beam8"),
    "codewords-256": ("gsrq@0.75+beam8", "gsrq@0.75+refits2+beam8"),
    "codewords-values": ("gsrq@0.75+vk16", "gsrq@0.75+vk16+beam8"),
    "codewords-keys": ("gsrq@0.75+k16+vk256", "gsrq@0.75+k16+vk256+beam8"),
    "heads": ("gsrq@1+heads3", "gsrq@1+heads3+beam8", "gsrq@0.5+heads3", "gsrq@0.5+heads3+beam8"),
    "outliers": ("gsrq@1+outliers16", "gsrq@1+outliers64"),
}


def ablations(inputs: Inputs) -> Iterator[Job]:
    """The recipe with one part changed, and frames at the longer length, too."""
    for tag, names in ABLATIONS.items():
        for length in SEQUENCES:
            if length == 2048 or tag == "frames" or tag.endswith("-blocks"):
                name = f"ablation-{length}-{tag}"
                flags = ("--work", f"work-{name}", "--window", *WINDOWS)
                yield _fidelity(
                    *(inputs, name, names, *flags), out="ablation", text=inputs.test, length=length
                )


PLANES = (
    *("--codewords", "2", "--beam", "8", "--fit.iterations", "24", "--distill.beam", "4"),
    *("--block", "256", "--frame-blocks", "4", "--mean-every", "16"),
    *("--distill.steps", "140", "--distill.check-every", "35"),
)
TRAINED: dict[str, tuple[str, ...]] = {
    "gsrq-fast-1": ("--preset", "fast", "--bits", "1"),
    "gsrq-windows-1": ("--preset", "balanced", "--bits", "1"),
    **{f"gsrq-trained-{x:g}": ("--preset", "best", "--bits", f"{x:g}") for x in RATES[1:]},
    # No text but what the model writes: for text that nobody thought of.
    **{
        f"gsrq-sampled-{x:g}": ("--preset", "best", "--bits", f"{x:g}", "--distill.text", "sampled")
        for x in (1, 0.75, 0.5)
    },
    # With tokens kept exact in training as in the cache.
    "gsrq-outliers-1": ("--preset", "best", "--bits", "1", "--outliers", "64"),
    # So much of it that no step reads anything twice.
    **{
        f"gsrq-epoch-{x:g}": (
            *("--preset", "best", "--bits", f"{x:g}", "--distill.text", "sampled"),
            *("--distill.tokens", "1720320"),
        )
        for x in (1, 0.75, 0.5)
    },
    # Codewords of a stage, distilled: at this rate all have whole stages.
    **{
        f"gsrq-k{k}-0.75": (
            *("--preset", "balanced", "--bits", "0.75", "--allocate", "uniform"),
            *("--codewords", f"{k}"),
        )
        for k in (16, 64, 256)
    },
    # Stages by measured sensitivity, without distillation.
    "gsrq-fast-0.5": ("--preset", "fast", "--bits", "0.5"),
    **{
        f"gsrq-{kind}-{x:g}": ("--preset", "fast", "--bits", f"{x:g}", "--allocate", kind)
        for kind in ("sides", "layers")
        for x in (1, 0.5)
    },
    # What the fused kernel for GPUs takes.
    "gsrq-kernel-1": (
        *("--preset", "balanced", "--bits", "1", "--allocate", "uniform"),
        *("--codewords", "16", "--block", "256", "--mean-every", "16"),
    ),
    # Two codewords a stage.
    "planes-1": ("--preset", "balanced", "--bits", "1", *PLANES),
    "planes-heads-1": ("--preset", "best", "--bits", "1", *PLANES),
    "gsrq-trained-1-window0": (
        *("--preset", "best", "--bits", "1", "--allocate", "uniform", "--window", "0"),
        *("--distill.windows", "0"),
    ),
}


def _elsewhere() -> dict[str, Callable[..., Job]]:
    """Perplexity on text of other domains, by the folder of the results."""
    texts = {"second-domain": "python-source", "dialogues": DIALOGUES}
    return {out: functools.partial(_fidelity, out=out, text=x) for out, x in texts.items()}


def outliers(inputs: Inputs) -> Iterator[Job]:
    """Tokens whose codes err most kept exact, in all domains, by the recipe and by codebooks."""
    texts = {"fidelity": functools.partial(_fidelity, out="fidelity", text=inputs.test)}
    texts |= _elsewhere()
    recipe = ("gsrq@1", ("--work", "work-gsrq"), "work-gsrq/gsrq@2.npz")
    books = [
        (f"{name}/codebooks+beam8", (), f"{name}/report.json")
        for name in TRAINED
        if re.fullmatch(r"gsrq-(epoch|trained)-[0-9.]+", name)
    ]
    for method, flags, need in (recipe, *books):
        names = tuple(f"{method}+outliers{n}" for n in (16, 64))
        for out, of_text in texts.items():
            if (out, method) != ("fidelity", "gsrq@1"):  # an ablation has that
                name = f"outliers-{out}-{method.partition('/')[0]}"
                yield of_text(inputs, name, names, *flags, "--window", "128", needs=(need,))


def trained(inputs: Inputs) -> Iterator[Job]:
    """Codebooks of the presets, all that is measured of them, and the recipe's second domain."""
    elsewhere = _elsewhere()
    for out, of_text in elsewhere.items():
        yield of_text(
            *(inputs, f"{out}-gsrq", tuple(f"gsrq@{x:g}" for x in RATES)),
            *("--work", "work-gsrq", "--window", "128"),
            needs=("work-gsrq/gsrq@2.npz",),
        )
    for name, flags in TRAINED.items():
        books = f"{name}/codebooks"
        texts = ("--text", inputs.calibrate, "--eval-text", inputs.test, "--eval-sequences", "2")
        yield Job(
            f"train-{name}",
            (
                *("train_codebooks.py", "--model", inputs.model, *texts),
                *(*flags, "--out", name),
            ),
            memory=60,
            precision="tensorfloat32",
            keep=(f"{name}/report.json", f"training/{name}.json"),
        )
        # Its report is there when all of the run is.
        needs, beam = (f"{name}/report.json",), (f"{books}+beam8",)
        both, here = (books, *beam), ("--window", "128")
        yield _fidelity(
            *(inputs, f"fidelity-{name}", both, "--window", *WINDOWS),
            out="fidelity",
            text=inputs.test,
            needs=needs,
        )
        for out, of_text in elsewhere.items():
            yield of_text(inputs, f"{out}-{name}", both, *here, needs=needs)
        yield _longbench(inputs, name, beam, *here, needs=needs)
        yield _needle(inputs, name, beam, *here, needs=needs)


class Running(NamedTuple):
    """A job that was started."""

    job: Job
    gpu: str
    process: subprocess.Popen[bytes]
    lock: IO[bytes]


def run(
    jobs: list[Job], work: pathlib.Path, results: pathlib.Path, gpus: list[str], memory: float
) -> list[str]:
    """Run jobs in order as what they need and the ``memory`` of each GPU, GB, allow.

    Returns:
        Names of those that did not come to their end.
    """
    running: list[Running] = []
    left, failed = list(jobs), []
    while True:
        for one in [x for x in running if x.process.poll() is not None]:
            running.remove(one)
            if not _finish(one, work, results):
                failed.append(one.job.name)
        for job in list(left):
            free = {
                g: memory - sum(x.job.memory + _BESIDE for x in running if x.gpu == g) for g in gpus
            }
            gpu = max(free, key=lambda g: free[g])
            if free[gpu] < job.memory + _BESIDE:
                break
            if all((work / need).exists() for need in job.needs):
                left.remove(job)
                lock = _locked(work / f"{job.name}.lock")
                if lock is not None and not (work / f"{job.name}.done").exists():
                    share = min(job.memory / memory, 0.9)
                    running.append(Running(job, gpu, _start(job, work, gpu, share), lock))
        if not running:
            return failed + [job.name for job in left]
        time.sleep(0.2)


_BESIDE = 1.5  # GB that a process has on a GPU beside what JAX allots


def _locked(file: pathlib.Path) -> IO[bytes] | None:
    """The file, ours as long as it is open, or None if it is another one's."""
    handle = open(file, "ab")  # noqa: SIM115
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        handle.close()
        return None
    return handle


def _start(job: Job, work: pathlib.Path, gpu: str, share: float) -> subprocess.Popen[bytes]:
    print(time.strftime("%X"), f"{job.name} on GPU {gpu}", flush=True)
    code = f"from gsrq_jax.models.commands import {job.entry} as main; main()"
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": gpu,
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share:.3f}",
        "JAX_DEFAULT_MATMUL_PRECISION": job.precision,
    }
    with open(work / f"{job.name}.log", "ab") as log:
        return subprocess.Popen(
            [sys.executable, *(("-c", code) if job.entry else ()), *job.command],
            cwd=work,
            env=environment,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def _finish(one: Running, work: pathlib.Path, results: pathlib.Path) -> bool:
    job, code = one.job, one.process.returncode
    print(
        time.strftime("%X"), job.name, "is done" if code == 0 else f"ended with {code}", flush=True
    )
    if code == 0:
        if job.keep is not None:
            target = results / job.keep[1]
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(work / job.keep[0], target)
        (work / f"{job.name}.done").touch()
    one.lock.close()
    return code == 0


DIALOGUES = "dialogues.txt"


def dialogues(longbench: pathlib.Path) -> str:
    """Text of a domain that no job learns from: meetings and chats, contexts of LongBench tasks."""
    rows = [
        json.loads(line)
        for task in ("qmsum", "samsum")
        for line in (longbench / f"{task}.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    return "\n\n".join(row["context"] for row in rows)


def prepare(work: pathlib.Path, **paths: str) -> Inputs:
    """The folder that jobs run in, with what they read and where their results go."""
    work.mkdir(parents=True, exist_ok=True)
    links = {pathlib.Path(path).name: pathlib.Path(path).resolve() for path in paths.values()}
    links["results"] = ROOT / "results"
    for script in ("eval_longbench.py", "train_codebooks.py"):
        shutil.copyfile(ROOT / script, work / script)
    for name, target in links.items():
        if not target.exists():
            raise SystemExit(f"error: there is no {target}")
        (work / name).unlink(missing_ok=True)
        (work / name).symlink_to(target)
    text = dialogues(pathlib.Path(paths["longbench"]))
    (work / DIALOGUES).write_text(text, encoding="utf-8")
    return Inputs(**{field: pathlib.Path(path).name for field, path in paths.items()})


def selected(jobs: list[Job], patterns: list[str]) -> list[Job]:
    """Those that a pattern names, in the order of patterns."""
    left, found = list(jobs), []
    for pattern in patterns:
        found += [job for job in left if fnmatch.fnmatch(job.name, pattern)]
        left = [job for job in left if not fnmatch.fnmatch(job.name, pattern)]
    return found


SETS: dict[str, Callable[[Inputs], Iterator[Job]]] = {
    "peers": peers,
    "trained": trained,
    "outliers": outliers,
    "ablations": ablations,
}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    for field in dataclasses.fields(Inputs):
        parser.add_argument(f"--{field.name}", required=True)
    parser.add_argument("--gpus", nargs="+", default=["0"])
    parser.add_argument(
        "--memory", type=float, help="of each GPU, GB; by default what the first has"
    )
    parser.add_argument("--only", nargs="+", default=["*"])
    parser.add_argument("--work", type=pathlib.Path, default=ROOT / "runs" / "measure")
    parser.add_argument("--list", action="store_true")
    given = parser.parse_args()
    inputs = prepare(
        given.work, **{f.name: getattr(given, f.name) for f in dataclasses.fields(Inputs)}
    )
    jobs = [
        job
        for make in SETS.values()
        for job in sorted(make(inputs), key=lambda job: (bool(job.needs), -job.memory))
    ]
    jobs = selected(jobs, given.only)
    if given.list:
        print(*(f"{job.name}: {' '.join(job.command)}" for job in jobs), sep="\n")
        return
    failed = run(jobs, given.work, ROOT / "results", given.gpus, given.memory or _memory())
    if failed:
        raise SystemExit(f"error: not done: {', '.join(failed)}; their logs are in {given.work}")


def _memory() -> float:
    asked = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        found = subprocess.run(asked, check=True, capture_output=True, text=True).stdout
    except (OSError, subprocess.CalledProcessError):
        raise SystemExit("error: nvidia-smi names no GPU here; give --memory") from None
    return float(found.split()[0]) * 2**20 / 1e9


if __name__ == "__main__":
    main()
