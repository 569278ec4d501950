"""The report of a LongBench run: `report.json`, and tables and a picture made from it."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gsrq_jax import results
from gsrq_jax.errors import InputError
from gsrq_jax.models import fidelity, longbench_metrics
from gsrq_jax.models.loading import LoadedModel
from gsrq_jax.models.longbench import Row
from gsrq_jax.spec import CacheSpec

AVERAGE = "average"


def interval(
    scores: Sequence[Sequence[float]], *, seed: int, draws: int = 2000
) -> tuple[float, float]:
    """Bootstrap 95 % interval of the mean of the means of groups, in percent.

    Rows are drawn within each group (one group: a task; several: an average over tasks). It says
    how far the score would move with other rows of the same kind, not with another model.
    """
    rng = np.random.default_rng(seed)
    means = np.zeros(draws)
    for group in scores:
        x = np.asarray(group)
        means += x[rng.integers(len(x), size=(draws, len(x)))].mean(axis=1) / len(scores)
    low, high = np.quantile(means, (0.025, 0.975))
    return round(100 * float(low), 2), round(100 * float(high), 2)


def write(
    folder: pathlib.Path,
    *,
    config: dict[str, Any],
    model: LoadedModel,
    rows: Sequence[Row],
    length: int,
    ways: Sequence[tuple[str, CacheSpec | None, Mapping[tuple[str, str], str]]],
    seed: int,
) -> dict[str, Any]:
    """Score everything, write ``report.json`` and what is made from it; returns its content.

    Args:
        folder: of the run.
        config: the run's flags, as JSON holds them.
        model: that answered.
        rows: that were asked, in the order of the data.
        length: tokens of the longest prompt.
        ways: method, spec of its cache, and predictions by task and id of the row.
        seed: of the bootstrap.
    """
    measured = []
    full: dict[tuple[str, str], float] = {}
    for method, spec, predictions in sorted(ways, key=lambda x: x[1] is not None):  # full first
        common = {
            **fidelity.facts(model, method, spec, length),
            "window": spec.window if spec else None,
            "sinks": spec.sinks if spec else None,
        }
        for dataset, part, n, value, low, high in _scores(rows, predictions, seed):
            if spec is None:
                full[dataset, part] = value
            measured.append(
                {
                    **common,
                    "dataset": dataset,
                    "part": part,
                    "n": n,
                    "metric": "longbench",
                    "value": value,
                    "low": low,
                    "high": high,
                    "full_precision": full.get((dataset, part)),
                }
            )
    results.write_result(
        folder / "report.json",
        measured,
        command=results.command_line(),
        config=config,
        interval="95 %, bootstrap over rows",
        data="LongBench (THUDM/LongBench, MIT), its prompts and metrics",
    )
    return render(folder)


def _scores(
    rows: Sequence[Row], predictions: Mapping[tuple[str, str], str], seed: int
) -> list[tuple[str, str, int, float, float, float]]:
    """``(task, part, n, score, low, high)`` of each task, its lengths, and the averages."""
    scores: dict[str, list[float]] = {}
    lengths: dict[str, list[int]] = {}
    extended = {row.task.name: row.task.extended for row in rows}
    for row in rows:
        name = row.task.name
        score = row.task.score(predictions[name, row.id], row.answers, row.all_classes)
        scores.setdefault(name, []).append(score)
        lengths.setdefault(name, []).append(row.length)
    found = []
    for name, x in scores.items():
        found.append((name, "", len(x), longbench_metrics.percent(x), *interval([x], seed=seed)))
        if not extended[name]:
            continue
        by_length = longbench_metrics.percent_by_length(x, lengths[name])
        for part, value in by_length.items():
            some = [
                s
                for s, length in zip(x, lengths[name], strict=True)
                if longbench_metrics.bucket(length) == part
            ]
            if some:
                found.append((name, part, len(some), value, *interval([some], seed=seed)))
    for title, kind in ((AVERAGE, False), (f"{AVERAGE}_e", True)):
        groups = [x for name, x in scores.items() if extended[name] == kind]
        if groups:
            mean = round(100 * float(np.mean([np.mean(x) for x in groups])), 2)
            n = sum(map(len, groups))
            found.append((title, "", n, mean, *interval(groups, seed=seed)))
    return found


def render(folder: pathlib.Path) -> dict[str, Any]:
    """``report.md`` and ``report.png`` from ``report.json``, whose content is returned."""
    try:
        data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder} holds no report ({error}); run eval_longbench.py") from error
    (folder / "report.md").write_text(markdown(data), encoding="utf-8")
    picture(data).savefig(folder / "report.png", dpi=120)
    return data


def summary(data: dict[str, Any]) -> str:
    """One line a method: bits and the average over tasks."""
    lines = [
        "| method | window | bits | stored | whole cache | average | 95 % interval |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in data["rows"]:
        if not row["dataset"].startswith(AVERAGE):
            continue
        name = row["method"] + (" (LongBench-E)" if row["dataset"] != AVERAGE else "")
        window = "" if row["window"] is None else row["window"]
        lines.append(
            f"| {name} | {window} | {row['bits']:.3g} | {row['bits_stored']:.3g} "
            f"| {row['bits_effective']:.3g} | {row['value']:.2f} "
            f"| {row['low']:.1f} – {row['high']:.1f} |"
        )
    return "\n".join(lines)


def by_task(data: dict[str, Any]) -> str:
    """One line a task, one column a method: score and interval."""
    ways = list(dict.fromkeys(map(_way, data["rows"])))
    lines = [
        f"| task | n | {' | '.join(ways)} |",
        "| --- | --- |" + " --- |" * len(ways),
    ]
    by: dict[tuple[str, str], dict[str, Any]] = {}
    for row in data["rows"]:
        by.setdefault((row["dataset"], row["part"]), {})[_way(row)] = row
    for (dataset, part), found in by.items():
        cells = [
            f"{row['value']:.2f} ({row['low']:.1f} – {row['high']:.1f})"
            for row in (found[way] for way in ways)
        ]
        n = next(iter(found.values()))["n"]
        lines.append(f"| {dataset} {part}".rstrip() + f" | {n} | {' | '.join(cells)} |")
    return "\n".join(lines)


def markdown(data: dict[str, Any]) -> str:
    """`report.md` from what `report.json` holds."""
    first = data["rows"][0]
    sinks = ", ".join(sorted({str(r["sinks"]) for r in data["rows"] if r["sinks"] is not None}))
    exact = f", the first {sinks} tokens and the window exact" if sinks else ""
    return "\n".join(
        [
            f"# LongBench: {first['model']}",
            "",
            summary(data),
            "",
            f"{data['data']}; prompts of at most {first['length']:,} tokens, read with exact "
            f"attention, greedy answers over the cache{exact}. Bits a number: of the codes; stored "
            "with their scales; of the whole cache of the longest prompt, window included. "
            f"Intervals: {data['interval']} within each task. One run of "
            f"`{data['command']}` on {data['device']}, {data['date']}.",
            "",
            "![average by method, scores by task](report.png)",
            "",
            "## By task",
            "",
            by_task(data),
            "",
        ]
    )


def picture(data: dict[str, Any]) -> Figure:
    """Averages with their intervals, and the score of every task, by method."""
    ways = list(dict.fromkeys(map(_way, data["rows"])))
    whole = [row for row in data["rows"] if not row["part"]]
    averages = [row for row in whole if row["dataset"].startswith(AVERAGE)]
    tasks = list(dict.fromkeys(r["dataset"] for r in whole if not r["dataset"].startswith(AVERAGE)))
    figure = Figure(figsize=(13, 2.5 + 0.35 * len(ways)), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2), sharey=True)
    for name in dict.fromkeys(row["dataset"] for row in averages):
        rows = {_way(row): row for row in averages if row["dataset"] == name}
        value, low, high = (
            np.array([rows[way][x] for way in ways]) for x in ("value", "low", "high")
        )
        spread = np.maximum([value - low, high - value], 0)
        left.errorbar(value, range(len(ways)), xerr=spread, fmt="o", capsize=3, label=name)
    left.set_yticks(range(len(ways)), ways)
    left.invert_yaxis()
    left.set_xlabel("score, 95 % interval")
    left.grid(alpha=0.3)
    left.legend(fontsize="small")
    cells = {(_way(row), row["dataset"]): row["value"] for row in whole}
    grid = [[cells[way, task] for task in tasks] for way in ways]
    right.imshow(grid, aspect="auto", cmap="viridis", vmin=0)
    right.set_xticks(range(len(tasks)), tasks, rotation=45, ha="right")
    dark = np.max(grid) / 2
    for i, row in enumerate(grid):
        for j, value in enumerate(row):
            colour = "white" if value <= dark else "black"
            right.text(j, i, f"{value:.0f}", ha="center", va="center", color=colour, fontsize=8)
    figure.suptitle(f"LongBench, {data['rows'][0]['model']}", fontsize="medium")
    return figure


def _way(row: Mapping[str, Any]) -> str:
    return row["method"] if row["window"] is None else f"{row['method']}, W = {row['window']}"
