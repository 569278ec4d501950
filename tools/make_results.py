"""Make docs/results.md and results.png from results/: ``python tools/make_results.py``.

With ``--check`` nothing is written; the exit code says whether the page is that of the files.
"""

import itertools
import json
import math
import pathlib
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import matplotlib
from matplotlib.figure import Figure
from matplotlib.ticker import NullFormatter

ROOT = pathlib.Path(__file__).parents[1]
RIVALS = ("vqllm", "cq", "kmeans", "commvq")
BARS = {1: 0.008, 0.75: 0.014, 0.5: 0.025, 0.375: 0.04, 0.25: 0.06}  # of the rise at W = 128
BARS_1 = {32: 0.02, 0: 0.10}  # of the rise at 1 bit, by the window
ELSEWHERE = 1.5  # so many times the rise in `BARS` is the most in another domain
ELSEWHERES = {"Python source": "second-domain", "dialogues": "dialogues"}  # text, its results
POINT = 1.0  # of LongBench's average that may be lost
Row = dict[str, Any]


def files(*patterns: str) -> list[dict[str, Any]]:
    """Result files by name, sorted."""
    found = sorted(path for p in patterns for path in (ROOT / "results").glob(p))
    return [json.loads(path.read_text(encoding="utf-8")) for path in found]


def fidelity_rows(data: Iterable[dict[str, Any]]) -> list[Row]:
    """One row a method, length and window, its metrics together, most bits first."""
    rows: dict[tuple[Any, ...], Row] = {}
    for content in data:
        for row in content["rows"]:
            key = (row["method"], row["length"], row["window"])
            here = rows.setdefault(key, row | {"command": content["command"]})
            here[row["metric"]] = row["value"]
            if row["metric"] == "perplexity":
                here["rise"] = row["value"] / row["full_precision"] - 1
                here["exact"] = row["full_precision"]
    return sorted(
        rows.values(), key=lambda r: (-r["length"], -r["bits_stored"], r["title"], -r["window"])
    )


def fidelity_table(rows: list[Row]) -> str:
    """Rise of perplexity, KL and agreement, a line a method, a column a window."""
    windows = sorted({row["window"] for row in rows}, reverse=True)
    cells = {(row["method"], row["window"]): row for row in rows}
    head = " | ".join(f"W = {w}: rise | KL | top-1" for w in windows)
    lines = [
        f"| method | bits | stored | {head} |",
        "| --- | --- | --- |" + " --- | --- | --- |" * len(windows),
    ]
    for row in {r["method"]: r for r in rows}.values():
        parts = []
        for window in windows:
            cell = cells.get((row["method"], window))
            parts.append(
                f"{_rise(cell['rise'])} | {cell['kl']:.4f} | {cell['top1']:.1%}"
                if cell
                else "– | – | –"
            )
        lines.append(
            f"| {row['title']} | {row['bits']:.3g} | {row['bits_stored']:.3g} | "
            + " | ".join(parts)
            + " |"
        )
    return "\n".join(lines)


def _rise(rise: float) -> str:
    return f"{rise:+.2%}" if rise < 10 else f"× {rise + 1:.0f}"


def standing(rows: list[Row]) -> str:
    """GSRQ beside each peer at the peer's stored bits or the next fewer that GSRQ has."""
    lines = []
    ours = [r for r in rows if r["method"].startswith("gsrq@")]
    worse = 0
    pairs = 0
    for row in rows:
        if row["method"].partition("@")[0] not in (*RIVALS, "kivi2"):
            continue
        fewer = [
            r
            for r in ours
            if r["window"] == row["window"] and r["bits_stored"] <= row["bits_stored"]
        ]
        if row["method"] == "kivi2":
            fewer = [r for r in fewer if r["bits"] == 1]
        if not fewer:
            continue
        best = max(fewer, key=lambda r: r["bits_stored"])
        pairs += 1
        if best["perplexity"] >= row["perplexity"]:
            worse += 1
            lines.append(
                f"- {row['title']} at {row['bits_stored']:.3g} bits, W = {row['window']}: "
                f"{_rise(row['rise'])}; GSRQ at {best['bits_stored']:.3g}: {_rise(best['rise'])}"
            )
    if not pairs:
        return "There is nothing to compare with yet."
    first = (
        f"Of {pairs} pairs of a peer and GSRQ at the same window and at most the peer's stored "
        f"bits (KIVI-2: GSRQ at 1 bit), GSRQ has the lower perplexity in {pairs - worse}"
    )
    return first + (". The others:\n\n" + "\n".join(lines) if lines else ".")


def repeats(rows: list[Row], again: list[Row]) -> str:
    """What the same commands gave on another card: how much of a difference is chance."""
    first = {(r["method"], r["window"]): r for r in rows}
    pairs = [
        f"{r['title']} at {r['bits']:.3g}, W = {r['window']}: {_rise(r['rise'])} "
        f"instead of {_rise(first[r['method'], r['window']]['rise'])}"
        for r in again
    ]
    return (
        "The same commands once more on another card, from the fit on, where sums differ in their "
        "roundings: " + "; ".join(pairs) + "."
    )


def scores_table(rows: list[Row]) -> str:
    """LongBench's averages, a line a method, a column a window."""
    rows = [row for row in rows if row["dataset"] == "average"]
    cells = {(r["method"], r["window"]): r for r in rows}

    def cell(method: str, window: int) -> str:
        found = cells.get((method, window), cells.get((method, None)))
        return f"{found['value']:.2f} [{found['low']:.1f}, {found['high']:.1f}]" if found else "–"

    return _table(rows, {f"W = {w}": w for w in _windows(rows)}, cell)


def tasks_table(rows: list[Row], window: int) -> str:
    """LongBench's scores at one window, a line a method, a column a task."""
    rows = [row for row in rows if row["window"] in (window, None)]
    tasks = {r["dataset"]: r["n"] for r in rows if r["dataset"] != "average"}
    cells = {(r["method"], r["dataset"]): r for r in rows}

    def cell(method: str, task: str) -> str:
        found = cells.get((method, task))
        return f"{found['value']:.2f}" if found else "–"

    return _table(rows, {f"{task} ({n})": task for task, n in tasks.items()}, cell)


def needle_table(rows: list[Row]) -> str:
    """Right answers over all depths, and their log-probability: a line a method, a column a W."""
    found = _needles(rows)

    def cell(method: str, window: int) -> str:
        both = found.get((method, window if method != "full" else 0))
        return "–" if both is None else f"{both['needle']:.0%} · {both['logp']:.2f}"

    windows = _windows([row for row in rows if row["method"] != "full"])
    return _table(rows, {f"W = {w}": w for w in windows}, cell)


def _needles(rows: list[Row]) -> dict[tuple[str, int], dict[str, float]]:
    """Means over all depths, by method and window."""
    found: dict[tuple[str, int], dict[str, list[float]]] = {}
    for row in rows:
        both = found.setdefault((row["method"], row["window"]), {"needle": [], "logp": []})
        both[row["metric"]].append(row["value"])
    return {
        key: {metric: statistics.fmean(values) for metric, values in both.items()}
        for key, both in found.items()
    }


def _table(rows: list[Row], columns: dict[str, Any], cell: Callable[[str, Any], str]) -> str:
    """A line a method, most stored bits first, with ``cell(method, column)`` in its columns."""
    lines = [
        "| method | bits | stored | " + " | ".join(columns) + " |",
        "| --- " * (3 + len(columns)) + "|",
    ]
    methods = {row["method"]: row for row in rows}
    for row in sorted(methods.values(), key=lambda r: (-r["bits_stored"], r["title"])):
        cells = " | ".join(cell(row["method"], column) for column in columns.values())
        lines.append(f"| {row['title']} | {row['bits']:.3g} | {row['bits_stored']:.3g} | {cells} |")
    return "\n".join(lines)


def _windows(rows: list[Row]) -> list[int]:
    return sorted({row["window"] for row in rows if row["window"] is not None}, reverse=True)


def is_refined(row: Row) -> bool:
    """Whether a row is of codebooks that ``train_codebooks.py`` wrote, not of a method's name."""
    return "/codebooks" in row["method"]


def refined_table(rows: list[Row], elsewhere: dict[str, list[Row]]) -> str:
    """Rises of trained codebooks beside the paper's recipe at the same bits, by text."""
    texts = {"": rows, **elsewhere}
    found = {t: {(r["method"], r["window"]): r["rise"] for r in x} for t, x in texts.items()}
    columns = [("", w) for w in sorted({r["window"] for r in rows}, reverse=True)]
    columns += [(text, 128) for text in elsewhere]
    titles = [f"{text + ', ' if text else ''}W = {window}" for text, window in columns]
    lines = [
        f"| bits | codebooks, encoder | {' | '.join(titles)} |",
        "| --- " * (2 + len(columns)) + "|",
    ]
    titles_of = {r["method"]: r["title"] for x in texts.values() for r in x}
    rates = {f"{row['bits']:g}" for row in rows if is_refined(row)}
    for bits in sorted(rates, key=float, reverse=True):
        refined = [r["method"] for r in rows if is_refined(r) and f"{r['bits']:g}" == bits]
        recipes = [m for m in titles_of if re.fullmatch(rf"gsrq@{bits}([+]outliers\d+)?", m)]
        for method in (*recipes, *dict.fromkeys(refined)):
            title = titles_of[method].replace("GSRQ", "the paper's recipe")
            title += "" if "beam" in title else ", greedy"
            rises = (found[text].get((method, window)) for text, window in columns)
            cells = ["–" if rise is None else _rise(rise) for rise in rises]
            lines.append(f"| {bits} | {title} | {' | '.join(cells)} |")
    return "\n".join(lines)


class Aim(NamedTuple):
    """One that the project set itself.

    Attributes:
        name: of it.
        bits: of the codebooks.
        window: of the cache.
        values: what was measured, by method and window.
        limit: that they are to keep.
        show: a value as it is shown.
        points: of a unit of the values.
        least: whether the limit is the least, not the most.
    """

    name: str
    bits: float
    window: int
    values: dict[tuple[str, int | None], float]
    limit: float
    show: Callable[[float], str] = _rise
    points: float = 100
    least: bool = False


def aims(
    rows: list[Row], elsewhere: dict[str, list[Row]], scores: list[Row], needles: list[Row]
) -> str:
    """Whether trained codebooks keep each of the limits that the project set itself."""
    here, *there = (
        {(r["method"], r["window"]): r["rise"] for r in x} for x in (rows, *elsewhere.values())
    )
    averages = {(r["method"], r["window"]): r["value"] for r in scores if r["dataset"] == "average"}
    right = {key: both["needle"] for key, both in _needles(needles).items()}
    wanted = [
        *(Aim(f"{bits:g} bit, W = 128", bits, 128, here, most) for bits, most in BARS.items()),
        *(Aim(f"1 bit, W = {window}", 1, window, here, most) for window, most in BARS_1.items()),
        *(
            Aim(f"{bits:g} bit, W = 128, {text}", bits, 128, of_text, ELSEWHERE * most)
            for text, of_text in zip(elsewhere, there, strict=True)
            for bits, most in BARS.items()
        ),
        Aim(
            *("1 bit, W = 128, LongBench", 1, 128, averages, averages["full", None] - POINT),
            *("{:.2f}".format, 1, True),
        ),
        Aim(
            *("1 bit, W = 128, needles", 1, 128, right, right["full", 0]),
            *("{:.0%}".format, 100, True),
        ),
    ]
    refined = [r for r in rows if "/codebooks+beam8" in r["method"]]
    bits_of = {r["method"]: r["bits"] for r in refined}
    names = {r["method"]: r["title"].replace(", beam 8", "") for r in refined}

    def kept(aim: Aim, method: str) -> str:
        value = aim.values[method, aim.window]
        missed = aim.points * (aim.limit - value if aim.least else value - aim.limit)
        by = f"**missed by {missed:.2f} points**" if missed > 0 else "met"
        return f"{aim.show(value)}, {by}"

    lines = ["| aim | limit | kept by |", "| --- | --- | --- |"]
    for aim in wanted:
        bound = "at least" if aim.least else "at most"
        cells = [
            f"{names[method]}: {kept(aim, method)}"
            for method, bits in bits_of.items()
            if math.isclose(bits, aim.bits) and (method, aim.window) in aim.values
        ]
        found = "; ".join(cells) or "not measured"
        lines.append(f"| {aim.name} | {bound} {aim.show(aim.limit)} | {found} |")
    return "\n".join(lines)


CODEBOOKS = {  # trained ones that show what a part is worth, by that part
    "Codewords of a stage": "k[0-9]+",
    "Stages by measured sensitivity": "fast|sides|layers",
}
GROUPS = {  # options of a method's name, by what they change
    "Codewords of a stage": ("k", "vk"),
    "Stages by measured sensitivity": (),
    "Rotary frame of keys": ("pre", "post", "block", "frame", "uncentred", "every"),
    "Metric by which codes are chosen": ("kgradient", "kqueries", "vgradient", "voutput", "power"),
    "KV heads that share codes": ("heads",),
    "Tokens kept exact": ("outliers",),
    "Encoder and refits": ("beam", "refits"),
}


def _natural(name: str) -> list[str | int]:
    """A key that sorts numbers in names by their size."""
    return [int(x) if x.isdigit() else x for x in re.split(r"(\d+)", name)]


def ablations(changed: list[Row], rows: list[Row]) -> list[str]:
    """For each part of the recipe a table of what changing it does, the recipe itself first."""
    found = {(r["method"], r["length"], r["window"]): r for r in [*rows, *changed]}
    windows = sorted({r["window"] for r in changed}, reverse=True)
    lengths = sorted({r["length"] for r in changed})

    def group(method: str) -> str:
        words = {re.sub("[0-9.]+$", "", option) for option in method.split("+")[1:]}
        return next(title for title, options in GROUPS.items() if words & set(options))

    parts = []
    for title in GROUPS:
        names = [r["method"] for r in changed if group(r["method"]) == title]
        trained = {
            (-r["bits"], r["method"])
            for r in rows
            if title in CODEBOOKS and re.match(f"gsrq-({CODEBOOKS[title]})-", r["method"])
        }
        if not names and not trained:
            continue
        by_base: dict[str, list[str]] = {}
        for name in sorted(set(names), key=_natural):
            by_base.setdefault(name.partition("+")[0], []).append(name)
        shown = [m for base in sorted(by_base, reverse=True) for m in (base, *by_base[base])]
        shown += [m for _, m in sorted(trained, key=lambda x: (x[0], _natural(x[1])))]
        columns = [
            (length, window)
            for length in lengths
            for window in windows
            if any((name, length, window) in found for name in names or shown)
        ]
        lines = [
            "| method | bits | " + " | ".join(f"{n}, W = {w}" for n, w in columns) + " |",
            "| --- | --- |" + " --- |" * len(columns),
        ]
        for method in shown:
            cells = [found.get((method, *column)) for column in columns]
            row = next(cell for cell in cells if cell)
            rises = " | ".join(_rise(cell["rise"]) if cell else "–" for cell in cells)
            lines.append(f"| {row['title']} | {row['bits']:.3g} | {rises} |")
        parts += [f"### {title}", "\n".join(lines)]
    return parts


def commands(data: Iterable[dict[str, Any]]) -> str:
    """Every file's command, card, versions and date; ``W`` is the window of a measurement."""

    def line(content: dict[str, Any]) -> str:
        command = content["command"]
        if "train_codebooks.py" not in command:
            command = re.sub("--window [0-9]+", "--window W", command)
        jax = content["versions"]["jax"]
        return f"- `{command}` ({content['device']}, jax {jax}, {content['date'][:10]})"

    lines = map(line, data)
    return "\n".join(dict.fromkeys(lines))


def draw(rows: list[Row]) -> Figure:
    """KL from full precision, which is above 0 even where perplexity falls, against stored bits."""
    windows = sorted({row["window"] for row in rows}, reverse=True)
    figure = Figure(figsize=(4.2 * len(windows) + 2, 4), layout="constrained")
    titles = list(dict.fromkeys(row["title"] for row in rows))
    for axis, window in zip(
        figure.subplots(1, len(windows), squeeze=False)[0], windows, strict=True
    ):
        for index, title in enumerate(titles):
            line = sorted(
                (r["bits_stored"], r["kl"])
                for r in rows
                if r["title"] == title and r["window"] == window and r["rise"] < 10
            )
            if line:
                thick = 2.5 if title == "GSRQ" else 1.2
                colour = matplotlib.colormaps["tab10"](index % 10)
                style = ("o-", "s--", "^:")[index // 10]
                axis.plot(*zip(*line, strict=True), style, c=colour, label=title, lw=thick, ms=4)
        axis.set(
            xscale="log", yscale="log", title=f"window {window}", xlabel="stored bits a number"
        )
        axis.set_xticks([0.25, 0.5, 1, 2, 4, 8], ["¼", "½", "1", "2", "4", "8"])
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3)
    figure.axes[0].set_ylabel("KL from full precision, nats a token")
    drawn = {line.get_label(): line for axis in figure.axes for line in axis.lines}
    legend = [drawn[title] for title in titles if title in drawn]
    figure.legend(handles=legend, loc="outside right", fontsize="small")
    return figure


def page() -> str:
    """The whole page."""
    data = files("fidelity/*/*-w*.json")
    rows = fidelity_rows(data)
    model = rows[0]["model"]
    parts = [
        "# Results",
        "Made by `python tools/make_results.py` from the files in `results/`; each was written by "
        "the command beside it.",
        f"Model: {model}. *bits* are those of the codes, *stored* count scales and all else that a "
        "coded token keeps; window, sinks and codebooks come on top (`bits_effective` in the files "
        "counts window and sinks). Sinks and exactly W recent tokens are exact, the worst case of "
        "the cache. All methods that learn are fitted to the same text, never to the one measured "
        "on.",
    ]
    for length in sorted({row["length"] for row in rows}):
        of_length = [row for row in rows if row["length"] == length and not is_refined(row)]
        count = of_length[0]["n"] // (length - 1)
        parts += [
            f"## Perplexity, {count} × {length} tokens of {of_length[0]['dataset']}",
            f"Full precision: {of_length[0]['exact']:.3f}. *Rise* is over that; KL in nats a "
            "token; *top-1* is how often the most likely token is the same.",
            fidelity_table(of_length),
            standing(of_length),
        ]
        again = fidelity_rows(files(f"repeats/{length}/*.json"))
        if again:
            parts.append(repeats(of_length, again))
        if length == 2048:
            parts.append(
                "![rate and distortion](results.png)\n\n"
                "What makes perplexity more than eleven times as high is not drawn."
            )
    scores = files("longbench/*.json")
    of_tasks = [row for content in scores for row in content["rows"]]
    needles = [content for content in files("needle/*.json") if "rows" in content]
    asked = [row for content in needles for row in content["rows"]]
    trained, repeated = files("training/*.json"), files("repeats/*/*.json")
    ablated = files("ablation/*/*-w*.json")
    elsewhere = {text: files(f"{folder}/*/*-w*.json") for text, folder in ELSEWHERES.items()}
    if trained:
        exact = [r for r in fidelity_rows(ablated) if "+outliers" in r["method"]]
        short = [r for r in [*rows, *exact] if r["length"] == 2048]
        second = {text: fidelity_rows(x) for text, x in elsewhere.items()}
        parts += [
            "## Beyond the paper",
            "Codebooks of `train_codebooks.py`: gsrq-windows-1 is what `--preset balanced` does "
            "now, gsrq-trained what `--preset best` does; the commands, which are older, spell it "
            "out. The README says what that is; the others differ by the flags of their "
            "commands: gsrq-sampled is distilled on what the model writes alone, gsrq-epoch on so "
            "much of it that no step reads a text twice, gsrq-outliers with 64 tokens of a "
            "sequence kept exact in training as in the cache, gsrq-kernel has the 16 codewords "
            "that the fused kernel takes; gsrq-fast, gsrq-sides and gsrq-layers are told below. "
            "With *outliers* the cache keeps as many tokens of a sequence exact, those whose "
            "codes err most; at 2048 tokens 64 of them come to half a bit a "
            "number more, at 32,768 to a thirtieth of one. Rise of perplexity on the sequences of "
            "2048 tokens above, and on text of other domains that was not learned from: modules of "
            "Python's standard library, and meetings and chats. The encoder's beam is of the "
            "cache; training was greedy.",
            refined_table(short, second),
            "### The aims that the project set itself",
            "With a beam of 8 in the cache; codebooks that a row does not name were not measured "
            "there. A limit of another domain is "
            f"{ELSEWHERE:g} times the one at that rate, LongBench's is full precision less "
            f"{POINT:g}, the needles' is full precision.",
            aims(short, second, of_tasks, asked),
            "Where codebooks miss Python's limit it is not for want of text: gsrq-epoch, with "
            "three times as much, loses there what gsrq-sampled does. Code repeats names and "
            "layout from far back, for which single tokens have to be right: keeping the 64 "
            "tokens exact that err most, 3 % of a sequence, takes a quarter to a third of the "
            "loss away, of dialogues' likewise; less is gained by distilling with them "
            "(gsrq-outliers, measured with greedy encoding alone). Codebooks with as many stages "
            "in all layers (gsrq-k256) lose several times as much there as those with stages by "
            "layer and heads that share codes.",
            "### How they were trained",
            "On H200 up to six of them ran at the same time, on four GPUs; gsrq-fast-0.5, "
            "gsrq-sides, gsrq-layers and gsrq-outliers up to three at a time on one H100.",
            commands(trained),
        ]
    if ablated:
        parts += [
            "## What each part is worth",
            "The paper's recipe with one part changed: rise of perplexity by tokens of a sequence "
            "and window. Without distillation, but for gsrq-k16, gsrq-k64 and gsrq-k256, which are "
            "codebooks of `--preset balanced` with as many stages in all layers. gsrq-fast is what "
            "`--preset fast` does, with as many stages everywhere; gsrq-sides gives keys and "
            "values, and gsrq-layers each of them in each layer, as many as lose least by what "
            "was measured. That is measured with the window: without one (W = 0) it costs instead.",
            *ablations(fidelity_rows(ablated), rows),
        ]
    parts += [
        "## LongBench",
        "Average over tasks with a bootstrap 95 % interval over samples. Prompts are read at full "
        "precision, answers written over the cache.",
        scores_table(of_tasks),
        "### Scores of each task, W = 128",
        "In brackets the number of samples.",
        tasks_table(of_tasks, 128),
        "## Needle retrieval",
        f"{asked[0]['dataset']}, {asked[0]['length']:,} tokens, one of them asked for, "
        f"{asked[0]['n']} times at each of five depths. The context is read exactly and put into "
        "each method's cache; question and answer are read over that. Each cell: answers that "
        "greedy decoding writes without a fault · mean log-probability of a token of the true "
        "answer, nats. By depth: [needle.md](../results/needle/needle.md).",
        needle_table(asked),
    ]
    parts += [
        "## Commands",
        commands(itertools.chain(data, repeated, *elsewhere.values(), ablated, scores, needles)),
    ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    path = ROOT / "docs" / "results.md"
    new = page()
    if "--check" in sys.argv:
        sys.exit(not path.exists() or path.read_text(encoding="utf-8") != new)
    path.write_text(new, encoding="utf-8")
    short = fidelity_rows(files("fidelity/2048/*-w*.json"))
    # One line of trained codebooks for the rates of a recipe, with a beam of 8.
    refined = [
        r | {"title": re.sub("-[0-9.]+", "", r["method"].partition("/")[0])}
        for r in short
        if is_refined(r) and r["method"].endswith("+beam8")
    ]
    draw([*(r for r in short if not is_refined(r)), *refined]).savefig(
        ROOT / "docs" / "results.png", dpi=110
    )
