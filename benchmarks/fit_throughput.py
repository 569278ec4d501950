"""How fast codebooks are learned: points × codewords a second, beside torch and flash-kmeans.

    python benchmarks/fit_throughput.py

Random points, float32 in and out of every implementation. *assign* finds the nearest codeword of
each point; *sweep* is a whole pass of Lloyd's, with new centroids; *layer* is all that
`gsrq_jax.calibration.fit_layer` does for a layer of LLaMA-3-8B's shapes, and what 32 of them take.
Ours are XLA's program and, on Hopper GPUs, the fused kernels. torch and flash-kmeans (Triton) are
measured where they can be imported. Writes
`results/fit-throughput.json`; ``--table`` prints what is there.
"""

import dataclasses
import functools
import importlib.util
import json
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

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
SWEEPS = 8  # whose time, less that of none, is divided by their number


class Way(NamedTuple):
    """What is timed.

    Attributes:
        part: ``assign`` or ``sweep``.
        name: of the implementation.
        run: does it; for a sweep 1 + `SWEEPS` of them.
        start: for a sweep, does one, whatever else comes with it.
    """

    part: str
    name: str
    run: Run
    start: Run | None = None


@dataclasses.dataclass(frozen=True)
class Config:
    """The experiment.

    Attributes:
        shapes: ``problems x points x channels x codewords`` of assignments and sweeps.
        parts: what is measured.
        implementations: of ours; what cannot be had here is left out.
        others: whether torch and flash-kmeans are measured, where they are.
        tokens: of the layer.
        bits: of the layer's codes.
        repeats: timed runs of each, of which the median counts.
        out: folder under which ``results`` lies.
        table: only print what was measured.
    """

    shapes: tuple[str, ...] = (
        "1x1048576x128x256",
        "1x1048576x128x16",
        "512x16384x128x256",
        "512x16384x128x16",
    )
    parts: tuple[Literal["assign", "sweep", "layer"], ...] = ("assign", "sweep", "layer")
    implementations: tuple[Implementation, ...] = ("xla", "mosaic_gpu")
    others: bool = True
    tokens: int = 1_048_576
    bits: float = 1.0
    repeats: int = 5
    out: pathlib.Path = ROOT
    table: bool = False


def seconds(run: Run, repeats: int, wait: Callable[[Any], Any]) -> tuple[float, float]:
    """Median of ``repeats`` runs after one that does not count, and the interquartile range."""
    wait(run())
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        wait(run())
        times.append(time.perf_counter() - start)
    return float(np.median(times)), float(np.subtract(*np.percentile(times, [75, 25])))


# --- implementations: names, and runs of the parts -----------------------------------------------


def ours(implementation: Implementation, x: np.ndarray, centroids: np.ndarray) -> Iterator[Way]:
    """k-means and GSKM of `gsrq_jax.kmeans`."""
    if not available(implementation, *x.shape[1:], centroids.shape[1]):
        return
    points, words = jax.device_put(x), jax.device_put(centroids)
    rng = jax.random.split(jax.random.key(0), len(x))
    rules = ("kmeans", "gskm")

    def sweeps(rule: str, count: int) -> Callable[..., Any]:
        fit = functools.partial(
            getattr(kmeans, rule), codewords=centroids.shape[1], implementation=implementation
        )
        return lambda r, x, c: fit(r, x, init=c, iterations=count).centroids

    programs = [(lambda _, x, c: kmeans.assign(x, c, implementation=implementation))]
    programs += [sweeps(rule, count) for rule in rules for count in (1 + SWEEPS, 1)]
    lowered = [jax.jit(jax.vmap(f)).lower(rng, points, words) for f in programs]
    with ThreadPoolExecutor() as pool:  # compiled beside each other
        compiled = list(pool.map(lambda program: program.compile(), lowered))
    assign, *runs = [functools.partial(run, rng, points, words) for run in compiled]
    yield Way("assign", f"gsrq_jax ({implementation})", assign)
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


def of_torch(x: np.ndarray, centroids: np.ndarray) -> Iterator[Way]:
    """Chunked products and ``index_add``, with TF32 as torch has it by default (off)."""
    import torch

    points, words = torch.from_numpy(x).cuda(), torch.from_numpy(centroids).cuda()
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

    yield Way("assign", "torch", assign)
    yield Way("sweep", "torch, kmeans", lambda: [sweep() for _ in range(1 + SWEEPS)], sweep)


def of_flash_kmeans(x: np.ndarray, centroids: np.ndarray) -> Iterator[Way]:
    """flash-kmeans; its Triton kernels multiply float32 as TF32."""
    import flash_kmeans
    import torch
    from flash_kmeans.assign_euclid_triton import euclid_assign_triton

    points, words = torch.from_numpy(x).cuda(), torch.from_numpy(centroids).cuda()
    squares = points.square().sum(-1)
    k = words.shape[1]
    yield Way("assign", "flash-kmeans", lambda: euclid_assign_triton(points, words, squares))
    fit = functools.partial(
        flash_kmeans.batch_kmeans_Euclid, points, k, init_centroids=words, tol=-1.0
    )
    yield Way(
        "sweep",
        "flash-kmeans, kmeans",
        lambda: fit(max_iters=1 + SWEEPS),
        lambda: fit(max_iters=1),
    )


def implementations(config: Config) -> dict[str, tuple[Callable, Callable[[Any], Any]]]:
    """Those that can be had here, and how to wait for what they return."""
    found = {
        name: (functools.partial(ours, name), jax.block_until_ready)
        for name in config.implementations
    }
    if config.others and importlib.util.find_spec("torch"):
        import torch

        if torch.cuda.is_available():
            found["torch"] = (of_torch, lambda _: torch.cuda.synchronize())
            if importlib.util.find_spec("flash_kmeans"):
                found["flash-kmeans"] = (of_flash_kmeans, lambda _: torch.cuda.synchronize())
    return found


# --- measuring ------------------------------------------------------------------------------------


def measure(config: Config) -> Iterator[dict[str, Any]]:
    """Rows, as they are found."""
    at_least(1, "--", repeats=config.repeats)
    for implementation in config.implementations:
        if "layer" in config.parts:
            yield from layer(config, implementation)
    for shape in config.shapes if set(config.parts) - {"layer"} else ():
        problems, n, d, k = _numbers(shape)
        at = jax.random.split(jax.random.key(0))
        x = np.asarray(jax.random.normal(at[0], (problems, n, d)))
        centroids = np.asarray(jax.random.normal(at[1], (problems, k, d)))
        for implementation, wait in implementations(config).values():
            for way in implementation(x, centroids):
                if way.part not in config.parts:
                    continue
                took, spread = seconds(way.run, config.repeats, wait)
                if way.start is not None:
                    took = (took - seconds(way.start, config.repeats, wait)[0]) / SWEEPS
                    spread /= SWEEPS
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
                }


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
    took, spread = seconds(
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
        lines.append(
            f"| {part} | {size} | "
            f"{row['codewords']} | {row['implementation']} | {row['seconds'] * 1e3:,.2f} | "
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
