"""How fast codebooks are learned: points × codewords a second, beside torch and flash-kmeans.

    python benchmarks/fit_throughput.py

Random points, float32 in and out of every implementation. *assign* finds the nearest codeword of
each point; *sweep* is a whole pass of Lloyd's, with new centroids; *layer* is all that
`gsrq_jax.calibration.fit_layer` does for a layer of LLaMA-3-8B's shapes, and what 32 of them take.
Ours are the fused kernels, on Hopper GPUs, and XLA's program. torch and flash-kmeans (Triton) are
measured where they can be imported. The time of an assignment or a sweep is that of eight more of
them, one after the other; what an assignment takes alone, from the call until its result is waited
for, stands beside it. Writes `results/fit-throughput.json` row by row; ``--table`` prints
what is there.
"""

import dataclasses
import functools
import importlib.util
import json
import math
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from gsrq_jax import kmeans
from gsrq_jax.calibration import FitOptions, fit_layer
from gsrq_jax.errors import InputError, at_least
from gsrq_jax.kernels import cluster as kernels
from gsrq_jax.kernels.cluster import Implementation
from gsrq_jax.models import commands
from gsrq_jax.models.config import LLAMA_3_8B
from gsrq_jax.results import repeated, write_result
from gsrq_jax.spec import QuantSpec, ResidualSpec

ROOT = pathlib.Path(__file__).parent.parent
Run = Callable[[], Any]
MORE = 8  # assignments or sweeps than one: the difference in time is theirs


class Way(NamedTuple):
    """What is timed.

    Attributes:
        part: ``assign`` or ``sweep``.
        name: of the implementation.
        run: does 1 + `MORE` of them.
        one: does one, whatever else comes with it.
    """

    part: str
    name: str
    run: Run
    one: Run


@dataclasses.dataclass(frozen=True)
class Config:
    """The experiment.

    Attributes:
        shapes: ``problems x points x channels x codewords`` of assignments and sweeps.
        parts: what is measured.
        implementations: of ours, one after the other; what cannot be had here is left out.
        others: whether torch and flash-kmeans are measured beside the first, where they are.
        tokens: of the layer.
        bits: of the layer's codes.
        repeats: timed runs of each, of which the median counts.
        seconds: after which nothing more is begun.
        out: folder under which ``results`` lies.
        table: only print what was measured.
    """

    shapes: tuple[str, ...] = (
        "1x1048576x128x256",
        "512x16384x128x256",
        "1x1048576x128x16",
        "512x16384x128x16",
    )
    parts: tuple[Literal["assign", "sweep", "layer"], ...] = ("assign", "sweep", "layer")
    implementations: tuple[Implementation, ...] = ("mosaic_gpu", "xla")
    others: bool = True
    tokens: int = 1_048_576
    bits: float = 1.0
    repeats: int = 5
    seconds: float = math.inf
    out: pathlib.Path = ROOT
    table: bool = False


def timed(run: Run, repeats: int, wait: Callable[[Any], Any]) -> tuple[float, float]:
    """Median of ``repeats`` runs after one that does not count, and the interquartile range."""
    wait(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times)), float(np.subtract(*np.percentile(times, [75, 25])))


def repeat(run: Run) -> Run:
    """1 + `MORE` of them, begun one after the other; the last one's result."""
    return lambda: [run() for _ in range(1 + MORE)][-1]


# --- implementations: names, and runs of the parts -----------------------------------------------


def ours(implementation: Implementation, x: Array, centroids: Array) -> Iterator[Way]:
    """k-means and GSKM of `gsrq_jax.kmeans`."""
    k = centroids.shape[1]
    if not available(implementation, *x.shape[1:], k):
        return
    rng = jax.random.split(jax.random.key(0), len(x))
    rules = ("kmeans", "gskm")

    def sweeps(rule: str, count: int) -> Callable[..., Any]:
        fit = functools.partial(getattr(kmeans, rule), codewords=k, implementation=implementation)
        return lambda r, x, c: fit(r, x, init=c, iterations=count).centroids

    programs = [(lambda x, c: kmeans.assign(x, c, implementation=implementation), (x, centroids))]
    programs += [
        (sweeps(rule, count), (rng, x, centroids)) for rule in rules for count in (1 + MORE, 1)
    ]
    lowered = [jax.jit(jax.vmap(f)).lower(*arrays) for f, arrays in programs]
    with ThreadPoolExecutor() as pool:  # compiled beside each other
        compiled = list(pool.map(lambda program: program.compile(), lowered))
    assign, *runs = (
        functools.partial(f, *arrays) for f, (_, arrays) in zip(compiled, programs, strict=True)
    )
    yield Way("assign", f"gsrq_jax ({implementation})", repeat(assign), assign)
    for index, rule in enumerate(rules):
        name = f"gsrq_jax ({implementation}), {rule}"
        yield Way("sweep", name, *runs[2 * index : 2 * index + 2])


def available(implementation: Implementation, n: int, d: int, k: int) -> bool:
    """Whether it can be had here for such a problem; if not, the reason is printed."""
    try:
        kernels.fused(implementation, n, d, k)
    except InputError as error:
        print(f"without {implementation}: {error}", file=sys.stderr)
        return False
    return True


def of_torch(x: Array, centroids: Array) -> Iterator[Way]:
    """Chunked products and ``index_add``, with TF32 as torch has it by default (off)."""
    import torch

    points, words = (torch.tensor(np.asarray(a), device="cuda") for a in (x, centroids))
    problems, n, d = points.shape
    k = words.shape[1]
    chunk = max(1, min(n, 2**26 // (k * problems)))

    def assign() -> Any:
        half = words.square().sum(-1)[:, None] / 2
        codes = [
            torch.argmax(torch.baddbmm(-half, part, words.mT), dim=-1)
            for part in points.split(chunk, dim=1)
        ]
        return torch.cat(codes, dim=1)

    first = torch.arange(problems, device="cuda")[:, None] * k

    def sweep() -> Any:
        code = (assign() + first).reshape(-1)
        sums = torch.zeros(problems * k, d, device="cuda")
        sums.index_add_(0, code, points.reshape(-1, d))
        count = torch.bincount(code, minlength=problems * k).clamp(min=1)
        return sums / count[:, None]

    yield Way("assign", "torch", repeat(assign), assign)
    yield Way("sweep", "torch, kmeans", repeat(sweep), sweep)


def of_flash_kmeans(x: Array, centroids: Array) -> Iterator[Way]:
    """flash-kmeans; its Triton kernels multiply float32 as TF32."""
    import flash_kmeans
    import torch
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    points, words = (torch.tensor(np.asarray(a), device="cuda") for a in (x, centroids))
    squares = points.square().sum(-1)
    k = words.shape[1]
    assign = functools.partial(euclid_assign_triton, points, words, squares)
    yield Way("assign", "flash-kmeans", repeat(assign), assign)
    fit = functools.partial(
        flash_kmeans.batch_kmeans_Euclid, points, k, init_centroids=words, tol=-1.0
    )
    yield Way(
        "sweep",
        "flash-kmeans, kmeans",
        lambda: fit(max_iters=1 + MORE),
        lambda: fit(max_iters=1),
    )


def others() -> dict[Callable, Callable[[Any], Any]]:
    """Those that can be had here, and how to wait for what they return."""
    if not importlib.util.find_spec("torch"):
        return {}
    import torch

    if not torch.cuda.is_available():
        return {}
    found = [of_torch] + [of_flash_kmeans] * bool(importlib.util.find_spec("flash_kmeans"))
    return dict.fromkeys(found, lambda _: torch.cuda.synchronize())


# --- measuring ------------------------------------------------------------------------------------


def measure(config: Config) -> Iterator[dict[str, Any]]:
    """Rows, as they are found."""
    at_least(1, "--", repeats=config.repeats)
    begin = time.perf_counter()

    def late() -> bool:
        return time.perf_counter() - begin > config.seconds

    shapes = [_numbers(shape) for shape in config.shapes] if set(config.parts) - {"layer"} else []
    beside = others() if config.others else {}
    for implementation in config.implementations:
        ways: dict[Callable, Callable[[Any], Any]]
        ways = {functools.partial(ours, implementation): jax.block_until_ready} | beside
        for shape in shapes:
            for way, wait in ways.items():
                if not late():
                    yield from rows_of(config, shape, way, wait)
        if "layer" in config.parts and not late():
            yield from layer(config, implementation)
        beside = {}


def rows_of(
    config: Config, shape: tuple[int, int, int, int], ways: Callable, wait: Callable[[Any], Any]
) -> Iterator[dict[str, Any]]:
    """Assignments and sweeps of one implementation."""
    problems, n, d, k = shape
    centroids = jax.random.normal(jax.random.key(1), (problems, k, d))
    for way in ways(random_points(problems, n, d), centroids):
        if way.part not in config.parts:
            continue
        took, spread = timed(way.run, config.repeats, wait)
        alone = timed(way.one, config.repeats, wait)[0]
        took, spread = (took - alone) / MORE, spread / MORE
        yield {
            "part": way.part,
            "implementation": way.name,
            "problems": problems,
            "points": n,
            "channels": d,
            "codewords": k,
            "seconds": took,
            "spread": spread,
            "rate": problems * n * k / took,
        } | ({"alone_seconds": alone} if way.part == "assign" else {})


@functools.lru_cache(2)
def random_points(problems: int, n: int, d: int) -> Array:
    """Kept for other numbers of codewords, for their way to torch by the host takes long."""
    return jax.random.normal(jax.random.key(0), (problems, n, d))


def layer(config: Config, implementation: Implementation) -> Iterator[dict[str, Any]]:
    """One layer of LLaMA-3-8B's shapes, fitted to random keys and values."""
    model = LLAMA_3_8B
    heads, d = model.kv_heads, model.head_dim
    code = ResidualSpec.from_bits(config.bits, d)
    spec = QuantSpec(key=code, value=code)
    if not available(implementation, config.tokens, d, code.codewords):
        return
    keys = jax.random.split(jax.random.key(0), 3)
    shape = (config.tokens, heads, d)
    k, v = (jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:2])
    norms = jnp.exp(jax.random.normal(keys[2], shape[:2]))
    positions = jnp.arange(config.tokens) % 2048
    options = FitOptions(implementation=implementation)
    fit = jax.jit(
        lambda rng, k, v, norms: (
            fit_layer(
                rng,
                k,
                v,
                positions,
                model.inv_freq,
                spec,
                k_norms=norms,
                v_norms=norms,
                options=options,
            )[0].key
        )
    )
    took, spread = timed(
        lambda: fit(keys[0], k, v, norms), min(config.repeats, 2), jax.block_until_ready
    )
    passes = options.warmup + options.iterations
    work = 2 * heads * config.tokens * code.stages * code.codewords * passes
    yield {
        "part": "layer",
        "implementation": f"gsrq_jax ({implementation}), gskm",
        "problems": 2 * heads,
        "points": config.tokens,
        "channels": d,
        "codewords": code.codewords,
        "stages": code.stages,
        "passes": passes,
        "seconds": took,
        "spread": spread,
        "rate": work / took,
        "model_layers": model.layers,
        "model_seconds": took * model.layers,
    }


def _numbers(shape: str) -> tuple[int, int, int, int]:
    try:
        problems, n, d, k = map(int, shape.split("x"))
    except ValueError:
        raise InputError(
            f"--shapes takes problems x points x channels x codewords, such as 1x65536x128x256, "
            f"got {shape}"
        ) from None
    if min(problems, n, d, k) < 1 or k > n:
        raise InputError(
            f"--shapes takes numbers from 1 up, and no more codewords than points, got {shape}"
        )
    return problems, n, d, k


def table(data: Mapping[str, Any]) -> str:
    """The rows as Markdown; a rate is in 10⁹ points × codewords a second."""
    lines = [
        "| part | problems × points × channels | codewords | implementation | ms | 10⁹ a second |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in data["rows"]:
        size = f"{row['problems']} × {row['points']:,} × {row['channels']}"
        part = row["part"]
        if part == "layer":
            part += f" ({row['model_layers']} take {row['model_seconds']:,.0f} s)"
        ms = f"{row['seconds'] * 1e3:,.2f}"
        if "alone_seconds" in row:
            ms += f" (alone {row['alone_seconds'] * 1e3:,.2f})"
        lines.append(
            f"| {part} | {size} | "
            f"{row['codewords']} | {row['implementation']} | {ms} | "
            f"{row['rate'] / 1e9:,.0f} |"
        )
    return "\n".join(lines)


def main(config: Config) -> None:
    """Measures and writes, and prints the table."""
    file = config.out / "results" / "fit-throughput.json"
    if not config.table:
        rows = []
        program = "benchmarks/fit_throughput.py"
        command = f"python {repeated(program, instead={}, without=('--out',))}"
        for row in measure(config):
            print(json.dumps(row), flush=True)
            rows.append(row)
            write_result(file, rows, command=command)
        if not rows:
            raise InputError("nothing that was asked for can be measured here")
    print(table(json.loads(file.read_text(encoding="utf-8"))))


if __name__ == "__main__":
    commands.run(Config, main, None)
