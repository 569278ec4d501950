"""Finds how the decode kernel's thread blocks are best laid out on this machine's GPU.

    python benchmarks/tune_decode.py --save    # how `kernels/tuned.json` is made

The kernel is timed alone, at LLaMA-3-8B's shapes with random codes: first in the layout that is
tried first without tuning, its work split in several ways, to which the times of
`gsrq_jax.kernels.mosaic_gpu.Tuning` are fitted; then in other layouts, split in the way that was
quickest. Of each rate the layout is kept that is quickest over all shapes, and timed as it is split
by what was fitted. What does not give what the first gives is not taken.

Writes ``results/decode-speed/layouts-<device>.json``; with ``--save``, what is quicker than the
estimates to ``kernels/tuned.json``.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import math
import os
import pathlib
import time
import traceback
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import decode_speed
import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize

from gsrq_jax.kernels import devices, mosaic_gpu
from gsrq_jax.kernels.mosaic_gpu import Config as Layout
from gsrq_jax.kernels.mosaic_gpu import Problem, Tuning
from gsrq_jax.models import commands
from gsrq_jax.results import command_line, commit, versions, write_result, write_whole

OTHERS = (
    *((8, 2, 2), (8, 3, 1), (8, 3, 2), (8, 4, 1), (8, 4, 2), (8, 1, 2)),
    *((4, 4, 1), (4, 4, 2), (4, 2, 2)),
)
"""Scorers, depth and buffers of the layouts that are tried, those that promise most first."""


@dataclasses.dataclass(frozen=True)
class Config:
    """The experiment.

    Attributes:
        bits: rates.
        shapes: batch x context.
        splits: ways to split the work, for each span, that times are fitted to.
        at_least: seconds that a timed program takes, about.
        times: programs that are timed.
        seconds: after which no further layout is tried; 0 for no end.
        jobs: programs that are compiled at a time.
        save: keep what was found for the library.
        out: folder under which ``results`` lies.
    """

    bits: tuple[float, ...] = (1.0, 0.5)
    shapes: tuple[str, ...] = ("8x131072", "8x32768", "1x131072", "32x8192")
    splits: int = 3
    at_least: float = 0.02
    times: int = 7
    seconds: float = 0
    jobs: int = os.cpu_count() or 1
    save: bool = False
    out: pathlib.Path = decode_speed.ROOT


@dataclasses.dataclass(frozen=True)
class Call:
    """One call of the kernel.

    Attributes:
        bits: of a number.
        batch: sequences.
        context: tokens of each.
        problem: the shapes.
        beside: what the kernel takes beside codes.
        codes: of some layers, more than the second-level cache holds.
    """

    bits: float
    batch: int
    context: int
    problem: Problem
    beside: tuple[jax.Array, ...]
    codes: list[tuple[jax.Array, ...]]

    @classmethod
    def of(cls, bits: float, batch: int, context: int) -> "Call":
        """Of random numbers."""
        how = decode_speed.Config(bits=(bits,))
        c, every = how.sizes, how.mean_every
        make = functools.partial(
            decode_speed.coded_layer, config=how, bits=bits, batch=batch, context=context
        )
        at = jax.random.key(0)
        mean, keys, values, words, value_words, blocks = jax.eval_shape(make, at)
        sizes = (batch, 1, c.kv_heads, c.heads // c.kv_heads, c.head_dim)
        query = jax.ShapeDtypeStruct(sizes, jnp.float32)
        inv_freq = jnp.asarray(c.inv_freq)
        problem = mosaic_gpu.problem_of(
            *(query, mean, inv_freq, keys, values, words, value_words, blocks),
            every=every,
            fills=how.spec(bits, context).frame_blocks,
        )

        def beside(key: jax.Array) -> tuple[jax.Array, ...]:
            mean, _, _, words, value_words, blocks = make(key)
            query = jax.random.normal(key, sizes) * decode_speed.scale_of(c.head_dim)
            inputs = mosaic_gpu.score_inputs(problem, query, mean, inv_freq, words, value_words, 0)
            return blocks, *inputs

        nbytes = keys.size * 4 + values.size * 4
        count = max(2, _CACHE // nbytes + 1)
        coded = jax.jit(lambda key: make(key)[1:3])
        codes = list(map(coded, jax.random.split(at, count)))
        return cls(bits, batch, context, problem, jax.jit(beside)(at), codes)

    def rounds(self, seconds: float) -> int:
        """Of all layers, so that a program takes about as long."""
        nbytes = sum(x.nbytes for x in jax.tree.leaves(self.codes))
        return max(1, round(seconds / max(nbytes / _SPEED, 5e-6 * len(self.codes))))

    def compiled(self, layout: Layout, seconds: float) -> Any:
        """The kernel over all layers, in so many `rounds`; returns what it gives of each."""
        fused = mosaic_gpu.fused_kernel(self.problem, layout)
        kernel = jax.jit(lambda *given: fused(*given)[:2])  # lowered once

        def once(_: Any, given: Any) -> Any:
            made, codes, beside = given
            last, new = made[-1], []
            for layer in codes:
                # Nothing is found once for all rounds, and one comes after the other.
                layer, beside, last = jax.lax.optimization_barrier((layer, beside, last))
                last = kernel(*layer, *beside)
                new.append(last)
            return new, codes, beside

        def run(codes: Any, beside: Any) -> Any:
            # What no one reads would not be made, and the number of rounds is known: else the host
            # asks after each whether it was the last.
            first = [jax.tree.map(jnp.zeros_like, made) for _ in codes]
            return jax.lax.fori_loop(0, self.rounds(seconds), once, (first, codes, beside))[0]

        made = jax.eval_shape(kernel, *self.codes[0], *self.beside)
        return jax.jit(run).lower(self.codes, self.beside).compile()

    def measure(self, program: Any, layout: Layout, config: Config) -> dict[str, Any]:
        """Its row."""
        count = self.rounds(config.at_least) * len(self.codes)
        run = functools.partial(program, self.codes, self.beside)
        took = decode_speed.microseconds(run, count, config.times)
        return self.sizes | dataclasses.asdict(layout) | took

    @property
    def sizes(self) -> dict[str, Any]:
        """Of its rows."""
        return {"bits": self.bits, "batch": self.batch, "context": self.context}

    def found(self, program: Any) -> tuple[np.ndarray, np.ndarray]:
        """Of the last layer, all parts together: the share of each code in the probability, and
        the logarithm to base 2 of that."""
        given = program(self.codes, self.beside)[-1]
        histogram, scale = (np.asarray(x, np.float64) for x in given)
        top = scale.max(axis=1, keepdims=True)
        mass = (histogram * np.exp2(scale - top)[..., None, None]).sum(axis=1)
        total = mass[:, :, 0].sum(axis=-1)
        return mass / total[..., None, None], np.log2(total) + top[:, 0]


_CACHE = 2**28  # bytes, more than any GPU's second-level cache
_SPEED = 1.5e12  # bytes of codes a second that the kernel takes, about


def some_splittings(problem: Problem, layout: tuple[int, int, int], count: int) -> list[Layout]:
    """Of each span the ``count`` that are estimated to be quickest, each of other work."""
    by = Tuning()
    chosen = []
    every = sorted(mosaic_gpu.splittings(problem, *layout), key=lambda x: (x.span, x.splits))
    for _, of_span in itertools.groupby(every, key=lambda x: x.span):
        first = {mosaic_gpu.work(problem, x): x for x in reversed(list(of_span))}
        chosen += sorted(first.values(), key=lambda x: by.time(mosaic_gpu.work(problem, x)))[:count]
    return chosen


def fits(problem: Problem, layout: Layout) -> bool:
    """Whether its shared memory is there."""
    return mosaic_gpu.Memory.of(problem, layout).nbytes <= mosaic_gpu.SHARED_BYTES


def fitted(work: Sequence[tuple[float, int, int]], took: Sequence[float]) -> tuple[float, float]:
    """Times of a table and of a start, in those of a chunk and not below 0, to which relative
    errors are least; those of `Tuning` if a chunk would take none."""
    x = np.asarray(work, float) / np.asarray(took)[:, None]
    (chunk, table, start), _ = scipy.optimize.nnls(x, np.ones(len(x)))
    if not chunk:
        return Tuning.table_time, Tuning.start_time
    return table / chunk, start / chunk


class Rate:
    """The search at one rate.

    Attributes:
        calls: the kernel's, of each shape.
        rows: what was measured for each of them, by layout.
        kept: for the library, after `search`.
    """

    kept: dict[str, Any]

    def __init__(self, config: Config, bits: float, end: float):
        shapes = [map(int, x.split("x")) for x in config.shapes]
        self.config, self.end = config, end
        self.calls = [Call.of(bits, *shape) for shape in shapes]
        self.rows: list[dict[Layout, dict[str, Any]]] = [{} for _ in self.calls]
        self._expected: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def search(self) -> Iterator[dict[str, Any]]:
        """Rows as they are measured; `kept` then says what was found, and how good it is."""
        begin, problems = Tuning(), [call.problem for call in self.calls]
        first = begin.scorers, begin.depth, begin.buffers
        estimated = [(i, mosaic_gpu.choose_config(p, begin)) for i, p in enumerate(problems)]
        yield from self._measure(estimated, "estimate", math.inf)
        split = [
            (i, layout)
            for i, p in enumerate(problems)
            for layout in some_splittings(p, first, self.config.splits)
        ]
        yield from self._measure(split, "split")
        so_far = [
            (p, x, row)
            for p, rows in zip(problems, self.rows, strict=True)
            for x, row in rows.items()
        ]
        times = fitted(
            [mosaic_gpu.work(p, x) for p, x, _ in so_far],
            [row["microseconds"] for _, _, row in so_far],
        )
        best = [self.quickest(i, first) for i in range(len(problems))]
        others = [
            (i, Layout(scorers, depth, x.splits, x.span, buffers))
            for scorers, depth, buffers in OTHERS
            for i, x in enumerate(best)
        ]
        yield from self._measure(others, "layout")
        of_all = set.intersection(*({kind_of(x) for x in rows} for rows in self.rows))
        kind = min(
            (k for k in (first, *OTHERS) if k in of_all),
            key=lambda k: self.mean([(i, self.quickest(i, k)) for i in range(len(best))]),
        )
        tuning = Tuning(*kind, *(round(x, 3) for x in times))
        tuned = [(i, mosaic_gpu.choose_config(p, tuning)) for i, p in enumerate(problems)]
        yield from self._measure(tuned, "tuned", math.inf)
        gain = self.mean(estimated) / self.mean(tuned)
        least = self.mean([(i, self.quickest(i)) for i in range(len(best))])
        took = min(self.mean(tuned), self.mean(estimated))
        self.kept = mosaic_gpu.rate_of(problems[0]) | {
            **dataclasses.asdict(tuning if gain > 1 else begin),
            "times_as_fast_as_estimated": max(gain, 1.0),
            "times_as_long_as_the_quickest": took / least,
        }

    def quickest(self, i: int, kind: tuple[int, ...] = ()) -> Layout:
        """Of those measured for a call, of this kind if one is given."""
        rows = self.rows[i]
        some = [x for x in rows if not kind or kind_of(x) == kind]
        return min(some, key=lambda x: rows[x]["microseconds"])

    def mean(self, layouts: Iterable[tuple[int, Layout]]) -> float:
        """Geometric mean of the times of calls in layouts."""
        return math.exp(np.mean([math.log(self.rows[i][x]["microseconds"]) for i, x in layouts]))

    def _measure(
        self, wanted: list[tuple[int, Layout]], why: str, end: float | None = None
    ) -> Iterator[dict[str, Any]]:
        """Rows of calls and layouts that have none and fit; nothing is begun after the end."""
        end, some = end or self.end, 2 * self.config.jobs
        here = [(self.calls[i].problem, i, x) for i, x in dict.fromkeys(wanted)]
        new = [(i, x) for p, i, x in here if x not in self.rows[i] and fits(p, x)]
        with concurrent.futures.ThreadPoolExecutor(self.config.jobs) as pool:
            for start in range(0, len(new), some):
                if time.monotonic() > end:
                    return
                now = new[start : start + some]
                made = [
                    pool.submit(self.calls[i].compiled, x, self.config.at_least) for i, x in now
                ]
                concurrent.futures.wait(made)
                for (i, layout), program in zip(now, made, strict=True):
                    yield self._row(i, layout, program) | {"why": why}

    def _row(self, i: int, layout: Layout, made: concurrent.futures.Future[Any]) -> dict[str, Any]:
        """What is measured, or why it cannot be taken."""
        call = self.calls[i]
        try:
            program = made.result()
            found = call.found(program)
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            return call.sizes | dataclasses.asdict(layout) | {"error": reason}
        first = self._expected.setdefault(i, found)
        # Shares in the probability, and powers of 2 that parts were added up at.
        for got, expected, most in zip(found, first, (1e-5, 1e-4), strict=True):
            apart = float(np.abs(got - expected).max())
            if not apart <= most:
                reason = f"{apart:.1e} off the first"
                return call.sizes | dataclasses.asdict(layout) | {"error": reason}
        self.rows[i][layout] = call.measure(program, layout, self.config)
        return self.rows[i][layout]


def kind_of(layout: Layout) -> tuple[int, int, int]:
    """Scorers, depth and buffers."""
    return layout.scorers, layout.depth, layout.buffers


def main(config: Config) -> None:
    """Measures, writes the result file and, if it is to, what is kept."""
    devices.check_hopper()
    begun = time.monotonic()
    file = config.out / "results" / "decode-speed" / f"layouts-{decode_speed.card()}.json"
    rows: list[dict[str, Any]] = []
    rates: list[dict[str, Any]] = []
    for n, bits in enumerate(config.bits, 1):
        share = config.seconds * n / len(config.bits) or math.inf
        rate = Rate(config, bits, begun + share)
        for row in rate.search():
            rows.append(row)
            print(row, flush=True)
            write_result(file, rows, command=command_line(), rates=rates)
        rates.append(rate.kept)
        print(rate.kept, flush=True)
        write_result(file, rows, command=command_line(), rates=rates)
    wrong = [row for row in rows if "error" in row]
    if config.save:
        path = pathlib.Path(mosaic_gpu.__file__).parent / mosaic_gpu.TUNED
        devices_known = json.loads(path.read_text(encoding="utf-8"))
        made = {"command": command_line(), "versions": versions(), "commit": commit()}
        devices_known[devices.device().device_kind] = made | {"rates": rates}
        write_whole(path, json.dumps(devices_known, indent=1) + "\n")
    if wrong:
        raise SystemExit(f"error: {len(wrong)} layouts could not be taken; {file} says why")


if __name__ == "__main__":
    commands.run(Config, main, None)
