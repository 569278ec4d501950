"""What of gain-shape k-means is left on real keys and values that it has not learned from.

    python benchmarks/reconstruction.py --text FILE

Keys (before RoPE, their mean removed) and values of a model, and what one stage of the same rule
leaves of them, clustered by k-means, k-means from a spherical start, and GSKM with both shape
rules; in-sample and on held-out sequences of the same text, against the number of points. Writes
`results/reconstruction.json`, and from it `docs/reconstruction.md` and `docs/reconstruction.png`;
`--render` makes only these again.
"""

import concurrent.futures
import dataclasses
import functools
import itertools
import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure
from shrinkage import METRICS, SAMPLES, measure
from tqdm import tqdm

from gsrq_jax.errors import InputError
from gsrq_jax.kmeans import assign, gskm, kmeans
from gsrq_jax.models import commands, loading, text, training
from gsrq_jax.results import write_result
from gsrq_jax.rope import rotate

ROOT = pathlib.Path(__file__).parent.parent
SINKS = 4  # first tokens of a sequence, which a cache keeps exact
PARTS = ("key", "value")
STAGES = ("original", "residual")
KMEANS, STARTED, UNIT, RAW = METHODS = (
    "k-means",
    "k-means, spherical start",
    "GSKM, unit (paper)",
    "GSKM, raw (figure code)",
)
MEANING = METRICS | {"left": "mean squared error / mean ‖x‖² of what the first stage was given"}
BETTER = {"shrinkage": 1, "cosine": 1, "mse": -1, "left": -1}  # shrinkage is below 1


@dataclasses.dataclass(frozen=True)
class Config:
    """Reconstruction of real keys and values by four centroid rules.

    Attributes:
        model: folder with config.json and safetensors, .gguf file, hub id, or ``demo``.
        text: text file to take keys and values from, or ``python`` for Python's help topics.
        layers: layers, spread over the depth.
        problems: at most so many heads or groups of channels a layer, spread over it.
        dims: channels clustered together: groups within a head, a head, several heads.
        codewords: centroids.
        points: numbers of points to learn from; all that there are come on top.
        tokens: tokens to learn from, at most; less where the text is short.
        held_out: tokens to measure on, at most; of a short text a fifth.
        length: tokens of a sequence.
        start: passes of the spherical start.
        iterations: passes after the start; k-means from random points gets ``start`` more.
        seed: of the choice of points and of the initial centroids.
        dtype: of the model.
        out: folder under which ``results`` and ``docs`` lie.
        render: only make the documents again from ``results/reconstruction.json``.
    """

    model: str = "demo"
    text: str = text.PYTHON_TOPICS
    layers: int = 6
    problems: int = 6
    dims: tuple[int, ...] = (8, 32, 64, 192)
    codewords: tuple[int, ...] = (256, 1024)
    points: tuple[int, ...] = (2_048, 8_192, 32_768)
    tokens: int = 65_536
    held_out: int = 16_384
    length: int = 1024
    start: int = 5
    iterations: int = 10
    seed: int = 0
    dtype: str = "float32"
    out: pathlib.Path = ROOT
    render: bool = False


# --- keys and values ------------------------------------------------------------------------------


def samples(config: Config) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """``[layers, tokens, H, d]`` keys and values to learn from, shuffled, and held-out ones.

    Raises:
        InputError: if the text or the model is too small for what is asked.
    """
    model = loading.load(config.model, dtype=config.dtype)
    sizes = model.config
    tokenizer = model.needed_tokenizer()
    if not SINKS < config.length <= sizes.max_length:
        raise InputError(
            f"--length must be from {SINKS + 1} to {sizes.max_length}, the context of "
            f"{model.name}, got {config.length}"
        )
    if not 1 <= config.layers <= sizes.layers:
        raise InputError(f"--layers must be from 1 to {sizes.layers}, got {config.layers}")
    for dim in config.dims:
        if sizes.kv_heads * sizes.head_dim % dim or (sizes.head_dim % dim and dim % sizes.head_dim):
            raise InputError(
                f"{dim} channels are neither a part of a head of {sizes.head_dim} nor several of "
                f"the {sizes.kv_heads} heads; choose other --dims"
            )
    room = config.length - SINKS
    wanted, kept = -(-config.tokens // room), -(-config.held_out // room)
    pieces = text.read(config.text)
    rows = text.sequences(
        pieces, tokenizer, length=config.length, count=wanted + kept, name=config.text
    )
    if len(rows) < wanted + kept:
        kept = min(kept, max(len(rows) // 5, 1))
    least = max(config.codewords)
    if (len(rows) - kept) * room <= least:
        raise InputError(
            f"the text {config.text!r} gives {len(rows)} sequences of {config.length} tokens, too "
            f"few to learn {least} codewords and to measure; give more text or a shorter --length"
        )
    layers = np.linspace(0, sizes.layers - 1, config.layers).round().astype(int)
    inv_freq = jnp.asarray(sizes.inv_freq)
    positions = SINKS + jnp.arange(room)
    found: dict[str, list[np.ndarray]] = {part: [] for part in PARTS}
    for row in tqdm(rows, desc="capture", unit="seq"):
        k, v, *_ = training.key_value_samples(
            sizes, model.graphdef, model.params, jnp.asarray(row)[None], first=SINKS, weigh=False
        )
        k, v = (x[layers, 0].astype(jnp.float32) for x in (k, v))
        found["key"].append(np.asarray(rotate(k, -positions[:, None], inv_freq)))
        found["value"].append(np.asarray(v))

    # Whole sequences are held out, evenly over the text, so that both are about the same things.
    out = np.zeros(len(rows), bool)
    out[np.linspace(0, len(rows) - 1, kept + 2).round().astype(int)[1:-1]] = True
    order = np.random.default_rng(config.seed).permutation(room * int((~out).sum()))
    learned, held = {}, {}
    for part, sequences in found.items():
        whole = np.stack(sequences, axis=1)  # [L, rows, room, H, d]
        flat = (len(layers), -1, *whole.shape[3:])
        learned[part] = whole[:, ~out].reshape(flat)[:, order][:, : config.tokens]
        held[part] = whole[:, out].reshape(flat)[:, : config.held_out]
    mean = learned["key"].mean(axis=1, keepdims=True)
    learned["key"], held["key"] = learned["key"] - mean, held["key"] - mean
    return learned, held


def split(x: np.ndarray, dim: int, problems: int) -> np.ndarray:
    """``[L, n, H, d]`` to ``[P, n, dim]``: consecutive channels, ``problems`` of them a layer."""
    groups = x.reshape(*x.shape[:2], -1, dim)
    count = groups.shape[2]
    chosen = np.linspace(0, count - 1, min(problems, count)).round().astype(int)
    return np.moveaxis(groups[:, :, chosen], 2, 1).reshape(-1, x.shape[1], dim)


# --- clustering -----------------------------------------------------------------------------------


def _started(rng, x, codewords, start, iterations):
    # One pass judges the start and goes no further: directions times the mean norms of their cells.
    first = gskm(rng, x, codewords, warmup=start, iterations=1).centroids
    return kmeans(rng, x, codewords, init=first, iterations=iterations)


def _gskm(shape_update, rng, x, codewords, start, iterations):
    options: dict[str, Any] = {"warmup": start, "iterations": iterations}
    return gskm(rng, x, codewords, shape_update=shape_update, **options)


RULES = {
    KMEANS: lambda rng, x, k, start, more: kmeans(rng, x, k, iterations=start + more),
    STARTED: _started,
    UNIT: functools.partial(_gskm, "unit"),
    RAW: functools.partial(_gskm, "raw"),
}


@functools.partial(jax.jit, static_argnames=("codewords", "start", "iterations"))
def study(rng, learned, held, *, codewords, start, iterations):
    """Every rule on points ``[P, n, d]``, then on what it left of them; held-out ones likewise.

    Returns:
        ``{method: {sample: {metric: [P, stages]}}}`` float32.
    """

    def energy(x):
        return jnp.maximum(jnp.sum(jnp.square(x)), 1e-30)

    def problem(rule, rng, *points):
        def stage(points, rng):
            centroids = rule(rng, points[0], codewords, start, iterations).centroids
            found = {}
            for sample, x, whole in zip(SAMPLES, points, energies, strict=True):
                found[sample] = measure(x, centroids)
                found[sample]["left"] = found[sample]["mse"] * energy(x) / whole
            return tuple(x - centroids[assign(x, centroids)[0]] for x in points), found

        energies = [energy(x) for x in points]
        return jax.lax.scan(stage, points, jax.random.split(rng, len(STAGES)))[1]

    rngs = jax.random.split(rng, len(learned))
    return {
        method: jax.vmap(functools.partial(problem, rule))(rngs, learned, held)
        for method, rule in RULES.items()
    }


def run(config: Config, learned: dict[str, Any], held: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows: mean and standard deviation over layers and heads of every number.

    Raises:
        InputError: if there are no more points than codewords.
    """
    total = learned["key"].shape[1]
    counts = sorted({n for n in config.points if n < total} | {total})
    if counts[0] <= max(config.codewords):
        raise InputError(
            f"{counts[0]} points are too few for {max(config.codewords)} codewords; "
            "take more points, fewer codewords or more text"
        )
    cases = list(itertools.product(config.dims, config.codewords, counts))

    def case(dim, codewords, count):
        # Keys, then values, side by side in one program.
        def both(x):
            return np.concatenate([split(x[p], dim, config.problems) for p in PARTS])

        arguments = jax.random.key(config.seed), both(learned)[:, :count], both(held)
        found = study(
            *arguments, codewords=codewords, start=config.start, iterations=config.iterations
        )
        return jax.device_get(found)

    # Compiling takes most of a GPU's time, and several programs compile side by side.
    with concurrent.futures.ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool:
        found = list(
            tqdm(pool.map(lambda c: case(*c), cases), total=len(cases), desc="fit", unit="case")
        )
    return [
        {"part": part, "stage": stage, "dim": dim, "codewords": codewords, "points": count}
        | {"method": method, "sample": sample}
        | _summary(result, method, sample, i, s)
        for (dim, codewords, count), result in zip(cases, found, strict=True)
        for (i, part), (s, stage) in itertools.product(enumerate(PARTS), enumerate(STAGES))
        for method, sample in itertools.product(METHODS, SAMPLES)
    ]


def _summary(result, method, sample, part, stage):
    """Means and spreads of one part and stage."""
    numbers: dict[str, float] = {}
    for metric in MEANING:
        values = np.asarray(result[method][sample][metric], np.float64)
        ours = values.reshape(len(PARTS), -1, len(STAGES))[part, :, stage]
        numbers |= {metric: ours.mean(), f"{metric}_spread": ours.std()}
    return {"problems": len(ours)} | {name: float(f"{x:.6g}") for name, x in numbers.items()}


# --- documents ------------------------------------------------------------------------------------


class Found:
    """The rows of a result, by what they are about."""

    KEYS = ("part", "stage", "dim", "codewords", "points", "method", "sample")

    def __init__(self, rows: list[dict[str, Any]]):
        self.rows = {tuple(row[k] for k in self.KEYS): row for row in rows}
        self.parts, self.stages, self.dims, self.codewords, self.points, *_ = (
            list(dict.fromkeys(at)) for at in zip(*self.rows, strict=True)
        )
        self.settings = list(itertools.product(self.parts, self.dims, self.codewords))

    def value(self, metric: str, setting, stage, points, method, sample) -> float:
        """A mean, for a setting ``(part, dim, codewords)``."""
        part, dim, codewords = setting
        return self.rows[part, stage, dim, codewords, points, method, sample][metric]

    def changes(self, metric: str, method, other, stage, points, sample, settings=None):
        """Relative changes of the mean from another rule's, one a setting."""
        return np.array(
            [
                self.value(metric, s, stage, points, method, sample)
                / max(self.value(metric, s, stage, points, other, sample), 1e-30)
                - 1
                for s in settings or self.settings
            ]
        )


def table(data: dict[str, Any]) -> str:
    """The rows as Markdown, with what they say."""
    found, config = Found(data["rows"]), data["config"]
    lines = [
        "# Reconstruction of real keys and values",
        "",
        f"`{data['command']}` on {data['device']}, jax {data['versions']['jax']}: keys (before "
        f"RoPE, their mean removed) and values of {config['model']} on {config['text']}. "
        f"{config['layers']} layers spread over the depth; up to {found.points[-1]:,} points of "
        f"each head to learn from, {data['held_out']:,} of other sequences of the same text held "
        "out. A residual is what one stage of the same rule left. Passes: "
        f"{config['start']} of the spherical start and {config['iterations']} of the rule, "
        f"{config['start'] + config['iterations']} of k-means from random points. Written by the "
        "command from `results/reconstruction.json`; `--render` writes it again.",
        "",
        *(f"- **{metric}**: {meaning}" for metric, meaning in MEANING.items()),
        "",
        "## What of the claim survives on held-out points",
        "",
        *_statement(found),
        "",
        "![change from k-means by number of points](reconstruction.png)",
        "",
    ]
    for metric in MEANING:
        lines += [f"## By size: {metric}, in-sample → held-out", "", *_by_size(found, metric), ""]
    lines += [
        "## All numbers",
        "",
        "Mean ± standard deviation over layers and heads or groups.",
        "",
    ]
    for part, stage in itertools.product(found.parts, found.stages):
        lines += _numbers(found, part, stage)
    return "\n".join(lines).rstrip() + "\n"


def _percent(x: float) -> str:
    return f"{100 * x:+.2f} %"


def _statement(found: Found) -> list[str]:
    """The claim, part by part, in numbers."""
    least, most = found.points[0], found.points[-1]
    claims = {"shrinkage": "longer centroids", "cosine": "better direction", "left": "less error"}
    heads = [f"{sample}, {n:,} points" for n in dict.fromkeys((least, most)) for sample in SAMPLES]
    lines = [
        "The claim is that centroids of k-means are too short in high dimension, and that GSKM "
        "keeps them longer, so that they point better and err less. By length is meant shrinkage, "
        f"by direction cosine, by error left. Change of the mean, over {len(found.settings)} "
        "settings (keys and values, channels, codewords), and in how many of them it is for the "
        "better:",
        "",
        "| claim | points are | rules | " + " | ".join(heads) + " |",
        "| --- | --- | --- |" + " --- |" * len(heads),
    ]
    for metric, claim in claims.items():
        pairs = ((STARTED, KMEANS), (UNIT, KMEANS), (UNIT, STARTED))
        for stage, (method, other) in itertools.product(found.stages, pairs):
            cells = []
            for points, sample in itertools.product(dict.fromkeys((least, most)), SAMPLES):
                change = found.changes(metric, method, other, stage, points, sample)
                good = int(np.sum(BETTER[metric] * change > 0))
                cells.append(f"{_percent(change.mean())} ({good} of {len(change)})")
            lines.append(f"| {claim} | {stage} | {method} / {other} | {' | '.join(cells)} |")
    lines.append("")

    wide = max(found.codewords)
    short = {
        dim: np.mean(
            [
                found.value("shrinkage", (p, dim, wide), found.stages[0], most, KMEANS, SAMPLES[1])
                for p in found.parts
            ]
        )
        for dim in found.dims
    }
    lines.append(
        f"- Length of k-means centroids over their held-out members', {wide:,} codewords, "
        f"{most:,} points: "
        + ", ".join(f"{short[dim]:.3f} at {dim} channels" for dim in found.dims)
        + "."
    )
    for stage in found.stages:
        parts = []
        for metric, claim in claims.items():
            gain = found.changes(metric, UNIT, KMEANS, stage, most, SAMPLES[1]).mean()
            start = found.changes(metric, STARTED, KMEANS, stage, most, SAMPLES[1]).mean()
            if BETTER[metric] * gain > 0:
                share = f"of {_percent(gain)} the start alone gives {_percent(start)}"
            else:
                share = f"not seen ({_percent(gain)}; the start alone {_percent(start)})"
            parts.append(f"{claim}: {share}")
        lines.append(
            f"- {UNIT} against {KMEANS} on held-out {stage} points, {most:,} to learn from: "
            + "; ".join(parts)
            + "."
        )
    for points in dict.fromkeys((least, most)):
        ratios = [
            np.mean(
                [
                    found.value("mse", (p, d, k), found.stages[0], points, KMEANS, SAMPLES[1])
                    / max(
                        found.value("mse", (p, d, k), found.stages[0], points, KMEANS, SAMPLES[0]),
                        1e-30,
                    )
                    for p, d in itertools.product(found.parts, found.dims)
                ]
            )
            for k in found.codewords
        ]
        lines.append(
            f"- Held-out error of k-means over its in-sample error at {points:,} points: "
            + ", ".join(
                f"{ratio:.2f} with {k:,} codewords"
                for k, ratio in zip(found.codewords, ratios, strict=True)
            )
            + "."
        )
    apart = {
        stage: max(
            np.abs(found.changes(metric, RAW, STARTED, stage, points, sample)).max()
            for metric, points, sample in itertools.product(claims, found.points, SAMPLES)
        )
        for stage in found.stages
    }
    lines.append(
        f"- {RAW} and {STARTED} make the same steps up to rounding; the largest relative "
        "difference between any of their means is "
        + ", ".join(f"{x:.2g} on {stage} points" for stage, x in apart.items())
        + ". Where points are few, many cells have one member, of which nothing is left but "
        "rounding noise, and the directions of noise mean nothing: in-sample changes on residual "
        "points are to be read at the largest number of points only."
    )
    return lines


def _by_size(found: Found, metric: str) -> list[str]:
    """One metric of all rules, fewest and most points, in-sample and held-out."""
    counts = list(dict.fromkeys((found.points[0], found.points[-1])))
    columns = list(itertools.product(counts, METHODS))
    lines = [
        "| points are | channels | codewords | "
        + " | ".join(f"{method}, {n:,}" for n, method in columns)
        + " |",
        "| --- | --- | --- |" + " --- |" * len(columns),
    ]
    stages = [s for s in found.stages if metric != "left" or s != STAGES[0]]
    for stage, setting in itertools.product(stages, found.settings):
        cells = [
            " → ".join(f"{found.value(metric, setting, stage, n, m, s):.3f}" for s in SAMPLES)
            for n, m in columns
        ]
        part, dim, codewords = setting
        lines.append(f"| {part} {stage} | {dim} | {codewords} | {' | '.join(cells)} |")
    return lines


def _numbers(found: Found, part: str, stage: str) -> list[str]:
    """Everything about one kind of points, folded."""
    # Of the original points, as much is left as the error says.
    metrics = [m for m in MEANING if m != "left" or stage != STAGES[0]]
    heads = [f"{metric}, {sample}" for metric in metrics for sample in SAMPLES]
    lines = [
        f"<details><summary>{part} {stage}</summary>",
        "",
        "| channels | codewords | points | rule | " + " | ".join(heads) + " |",
        "| --- | --- | --- | --- |" + " --- |" * len(heads),
    ]
    for dim, codewords, points, method in itertools.product(
        found.dims, found.codewords, found.points, METHODS
    ):
        cells = []
        for metric, sample in itertools.product(metrics, SAMPLES):
            row = found.rows[part, stage, dim, codewords, points, method, sample]
            cells.append(f"{row[metric]:.4f} ± {row[f'{metric}_spread']:.3f}")
        lines.append(f"| {dim} | {codewords} | {points:,} | {method} | {' | '.join(cells)} |")
    return [*lines, "", "</details>", ""]


def picture(data: dict[str, Any]) -> Figure:
    """What is left by number of points, and its and the cosine's change from k-means."""
    found, config = Found(data["rows"]), data["config"]
    wide = max(found.codewords)
    figure = Figure(figsize=(max(8, 3.2 * len(found.dims)), 8), layout="constrained")
    axes = figure.subplots(3, len(found.dims), sharex=True, squeeze=False)
    styles = dict(zip(SAMPLES, (":", "-"), strict=True))
    colours = {KMEANS: "#444444", STARTED: "#e08a1e", UNIT: "#1f4e8c"}
    for (column, dim), (method, colour), (sample, style) in itertools.product(
        enumerate(found.dims), colours.items(), styles.items()
    ):
        settings = [(part, dim, wide) for part in found.parts]

        def left(n, method, sample, settings):
            at = itertools.product(settings, found.stages)
            return np.mean([found.value("left", s, t, n, method, sample) for s, t in at])

        def change(metric, n, method, sample, settings):
            at = [found.changes(metric, method, KMEANS, t, n, sample, settings) for t in STAGES]
            return 100 * np.mean(at)

        curves: tuple[Callable[..., float], ...] = (
            left,
            functools.partial(change, "left"),
            functools.partial(change, "cosine"),
        )
        for axis, of in zip(axes[:, column], curves, strict=True):
            values = [of(n, method, sample, settings) for n in found.points]
            label = f"{method}, {sample}"
            axis.plot(found.points, values, style, color=colour, marker=".", label=label)
    for column, dim in enumerate(found.dims):
        axes[0, column].set_title(f"{dim} channels")
        axes[2, column].set_xlabel("points to learn from")
        for axis in axes[:, column]:
            axis.set_xscale("log", base=2)
            axis.set_xticks(found.points, [f"{n / 1024:.3g}k" for n in found.points])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("error left / energy")
    axes[1, 0].set_ylabel("error left:\nchange from k-means, %")
    axes[2, 0].set_ylabel("cosine:\nchange from k-means, %")
    handles = axes[0, 0].get_legend_handles_labels()
    figure.legend(*handles, loc="outside lower center", ncols=3, fontsize="small", frameon=False)
    figure.suptitle(
        f"{config['model']}: {wide:,} codewords, mean over keys, values and their residuals",
        fontsize="medium",
    )
    return figure


def render(out: pathlib.Path) -> str:
    """The documents from the result file; returns the Markdown."""
    path = out / "results" / "reconstruction.json"
    if not path.is_file():
        raise InputError(f"there is no {path} to make documents from; run without --render first")
    data = json.loads(path.read_text(encoding="utf-8"))
    docs = out / "docs"
    docs.mkdir(exist_ok=True)
    written = table(data)
    (docs / "reconstruction.md").write_text(written, encoding="utf-8")
    picture(data).savefig(docs / "reconstruction.png", dpi=110)
    return written


def _name(given: str) -> str:
    """Of a file or folder only its name; anything else as it was given."""
    path = pathlib.Path(given).expanduser()
    return path.name if path.exists() else given


def _command(config: Config) -> tuple[str, dict[str, Any]]:
    """The command line, and the numbers behind it."""
    fields = dataclasses.asdict(config)
    del fields["out"], fields["render"]
    fields |= {"model": _name(config.model), "text": _name(config.text)}
    flags = ""
    for field in dataclasses.fields(Config):
        value = fields.get(field.name, field.default)
        if field.name in fields and value != field.default:
            several = isinstance(value, tuple)
            shown = " ".join(map(str, value)) if several else value
            flags += f" --{field.name.replace('_', '-')} {shown}"
    return "python benchmarks/reconstruction.py" + flags, fields


def main(config: Config) -> None:
    """Measures, writes the result file, and the documents from it."""
    if not config.render:
        learned, held = samples(config)
        command, fields = _command(config)
        write_result(
            config.out / "results" / "reconstruction.json",
            run(config, learned, held),
            command=command,
            config=fields,
            held_out=held["key"].shape[1],
        )
    print(render(config.out).split("![")[0])


if __name__ == "__main__":
    commands.run(Config, main, None)
