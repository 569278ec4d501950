"""Fill the tables of README.md and docs/ from results: ``python tools/make_tables.py``.

With ``--check`` nothing is written; the exit code says whether the tables are those of the files.
"""

import functools
import json
import pathlib
import re
import sys
from collections.abc import Callable
from typing import Any

import make_results

from gsrq_jax.models import report, training

PEERS = (
    *("int4", "kivi2", "vqllm@1", "commvq@1", "cq@1", "kmeans@1", "gsrq@1"),
    *("vqllm@0.5", "gsrq@0.5", "cq@0.25", "kmeans@0.25", "gsrq@0.25"),
)
ROOT = pathlib.Path(__file__).parents[1]
RUNS = ("smollm2-1bit", "smollm2-1bit-sinks64", "smollm2-1bit-distilled")


def load(name: str) -> dict[str, Any]:
    """A result file."""
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


def source(name: str) -> str:
    """Where the numbers of a file come from."""
    data = load(name)
    return (
        f"[results/{name}.json](results/{name}.json): `{data['command']}` on {data['device']}, "
        f"jax {data['versions']['jax']}, {data['date'][:10]}."
    )


def runs() -> str:
    """One row a measured run, the sources below."""
    lines = [
        "| cache | sinks | full precision | quantised | rise | KL, nats | same top token "
        "| smaller at 8k / 128k tokens |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for data in map(load, RUNS):
        by_metric = next(iter(report.datasets(data).values()))
        perplexity = by_metric["perplexity"]
        exact, ours = perplexity["full_precision"], perplexity["value"]
        ratios = " / ".join(f"{row['ratio']:.1f} ×" for row in data["cache"])
        config = data["config"]
        steps = config.get("distill", {}).get("steps", 0) or config.get("distill_steps", 0)
        refined = f", {steps} steps of distillation" if steps else ""
        lines.append(
            f"| {perplexity['bits']:g} bit, window {perplexity['window']}{refined} "
            f"| {perplexity['sinks']} "
            f"| {exact:.3f} | {ours:.3f} | {ours / exact - 1:+.2%} "
            f"| {by_metric['kl']['value']:.4f} | {by_metric['top1']['value']:.1%} | {ratios} |"
        )
    return "\n".join([*lines, "", *(f"- {source(name)}" for name in RUNS)])


def demo() -> str:
    """The table that the demo ends with."""
    return f"{report.table(load('demo'))}\n\n{source('demo')}"


def peers() -> str:
    """GSRQ beside its peers at a window of 128, most stored bits first."""
    rows = make_results.fidelity_rows(make_results.files("fidelity/2048/*-w128.json"))
    lines = [
        "| method | bits | stored | perplexity | KL, nats | same top token |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {r['title']} | {r['bits']:.3g} | {r['bits_stored']:.3g} | {r['rise']:+.2%} "
        f"| {r['kl']:.4f} | {r['top1']:.1%} |"
        for r in rows
        if r["method"] in PEERS
    ]
    return "\n".join(lines)


MEASURED = {"fast": "gsrq-fast-1", "balanced": "gsrq-windows-1", "best": "gsrq-trained-1"}
"""Result file in ``results/training`` of each preset at 1 bit."""


def presets() -> str:
    """A line a preset: what it does, how long that takes, and what it costs at 1 bit."""
    found = make_results.fidelity_rows(make_results.files("fidelity/2048/*-w*.json"))
    rows = {(r["method"], r["window"]): r for r in found}
    windows = (128, 32, 0)
    lines = [
        "| `--preset` | codes shared by | metrics | stages by | distillation | training | bits | "
        + " | ".join(f"W = {w}" for w in windows)
        + " |",
        "| --- " * (7 + len(windows)) + "|",
    ]
    for name, file in MEASURED.items():
        config = training.PRESETS[name]
        distill = config.distill
        shared = {1: "–", "auto": "up to 4 heads"}[config.heads]
        metrics = f"{config.fit.key_metric}, {config.fit.value_metric}"
        steps = f"{distill.steps} steps, W = {', '.join(map(str, distill.windows))}"
        cells = [shared, metrics, {"uniform": "–"}.get(config.allocate, config.allocate)]
        cells.append(steps if distill.steps else "–")
        if (ROOT / "results" / "training" / f"{file}.json").exists():
            data = load(f"training/{file}")
            cells += [f"{data['seconds']:.0f} s, {data['device']}", f"{config.bits:g}"]
        else:
            cells += ["not measured", f"{config.bits:g}"]
        for window in windows:
            both = [rows.get((f"{file}/codebooks{beam}", window)) for beam in ("", "+beam8")]
            cells.append(" / ".join(f"{r['rise']:+.2%}" for r in both if r) or "not measured")
        lines.append(f"| `{name}` | {' | '.join(cells)} |")
    sources = [x for x in MEASURED.values() if (ROOT / f"results/training/{x}.json").exists()]
    return "\n".join([*lines, "", *(f"- {source(f'training/{x}')}" for x in sources)])


PLANES = ("planes-1", "gsrq-kernel-1", "gsrq-windows-1", "planes-heads-1", "gsrq-trained-1")
"""Trained codebooks at 1 bit: planes beside the codes that each is to replace."""


def planes() -> str:
    """A line a set of codebooks: its code, its training, and what it costs with a beam of 8."""
    texts = {"fidelity": (128, 32, 0), "second-domain": (128,)}
    cells: dict[str, list[str]] = {name: [] for name in PLANES}
    for folder, windows in texts.items():
        found = make_results.fidelity_rows(make_results.files(f"{folder}/2048/*-w*.json"))
        rises = {(r["method"], r["window"]): r["rise"] for r in found}
        for name, window in ((name, w) for name in PLANES for w in windows):
            cells[name].append(f"{rises[f'{name}/codebooks+beam8', window]:+.2%}")
    lines = [
        "| codebooks | codewords a stage | heads a code | stages by | steps of distillation | "
        "W = 128 | W = 32 | W = 0 | Python source, W = 128 |",
        "| --- " * 9 + "|",
    ]
    for name in PLANES:
        config = load(f"training/{name}")["config"]
        code = (
            config["codewords"],
            config.get("heads", 1),
            config["allocate"],
            config["distill"]["steps"],
        )
        lines.append(f"| {name} | {' | '.join(map(str, code))} | {' | '.join(cells[name])} |")
    sources = [
        f"- {source(f'training/{x}')}".replace("(results/", "(../results/") for x in PLANES[::3]
    ]
    return "\n".join([*lines, "", *sources])


def parities() -> str:
    """A line a layer and side: what is left with one, two and four planes a stage."""
    found: dict[tuple[Any, ...], dict[tuple[float, int], float]] = {}
    for row in load("parities")["rows"]:
        key = row["part"], row["layer"]
        found.setdefault(key, {})[row["bits"], row["planes"]] = row["left"]
    columns = list(next(iter(found.values())))
    names = [f"{bits:g} bit, {n} plane{'s' * (n > 1)}" for bits, n in columns]
    lines = [f"| vectors | {' | '.join(names)} |", "| --- " * (1 + len(names)) + "|"]
    layers = {0: "first", 1: "middle", 2: "last"}
    for (part, layer), left in found.items():
        cells = " | ".join(f"{left[column]:.3f}" for column in columns)
        lines.append(f"| {part}s, {layers[layer]} layer | {cells} |")
    where = source("parities").replace("(results/", "(../results/")
    return "\n".join([*lines, "", f"- {where}"])


def heads() -> str:
    """KV heads that share codes, beside the recipe, as docs/results.md has them."""
    changed = make_results.fidelity_rows(make_results.files("ablation/2048/*heads3*-w*.json"))
    rows = make_results.fidelity_rows(make_results.files("fidelity/2048/gsrq@*-w*.json"))
    return make_results.ablations(changed, rows)[-1]


BARS = {  # (batch, context): times as fast as bf16, of the kernel and of all, at 1 bit and at 0.5
    (8, 131072): ((9, 7.5), (13, 10)),
    (8, 32768): ((7.5, 5.5), (10, 7)),
    (1, 131072): ((6, 4.5), (8, 6)),
    (32, 8192): ((4, 3), (5, 3.5)),
}
SPEED = "decode-speed/nvidia-h100"
NOW = "decode-speed/nvidia-h200"
"""Of the kernel as it is; the other is of the one that products were made before."""


def _speed(part: str, file: str = SPEED) -> dict[tuple[Any, ...], dict[str, Any]]:
    """Rows of a part of the benchmark by batch, context, what, and for a model its weights."""
    rows = [r for r in load(file)["rows"] if r["part"] == part]
    return {(r["batch"], r["context"], r["what"], r.get("weights")): r for r in rows}


def _length(tokens: int) -> str:
    return f"{tokens // 2**20}M" if tokens >= 2**20 else f"{tokens // 1024}k"


def attention() -> str:
    """Microseconds of a layer's attention beside the bars; what meets its bar is bold."""
    rows = _speed("attention")
    lines = [
        "| batch × context | best bf16, µs | 1 bit: kernel, all | times as fast | bars "
        "| 0.5 bit: kernel, all | times as fast | bars |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (batch, context), both in BARS.items():
        here = {k[2]: r for k, r in rows.items() if k[:2] == (batch, context)}
        best = min(r["microseconds"] for what, r in here.items() if what.startswith("bf16"))
        cells = [f"{batch} × {_length(context)}", f"{best:.0f}"]
        for what, bars in zip(("1 bit", "0.5 bit"), both, strict=True):
            took = here[what]["kernel"], here[what]["microseconds"]
            times = [
                f"**{best / t:.1f}**" if best / t >= bar else f"{best / t:.1f}"
                for t, bar in zip(took, bars, strict=True)
            ]
            cells += [", ".join(f"{t:.0f}" for t in took), ", ".join(times)]
            cells.append(", ".join(f"{bar:g}" for bar in bars))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def layer() -> str:
    """Microseconds of a layer's attention, of the kernel and of all, beside bf16's."""
    rows = _speed("attention", NOW)
    lines = [
        "| batch × context | best bf16, µs | 1 bit: kernel, all | times as fast "
        "| 0.5 bit: kernel, all | times as fast |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for batch, context in dict.fromkeys(k[:2] for k in rows):
        here = {k[2]: r for k, r in rows.items() if k[:2] == (batch, context)}
        best = min(r["microseconds"] for what, r in here.items() if what.startswith("bf16"))
        cells = [f"{batch} × {_length(context)}", f"{best:.1f}"]
        for what in ("1 bit", "0.5 bit"):
            took = here[what]["kernel"], here[what]["microseconds"]
            cells.append(", ".join(f"{t:.1f}" for t in took))
            cells.append(", ".join(f"{best / t:.2f}" for t in took))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def loops(file: str = SPEED) -> str:
    """Tokens a second of the decode loop, and where the time of a step at 1 bit goes."""
    rows = _speed("model", file)
    lines = [
        "| batch × context | weights | bf16 cache, tokens/s | 0.5 bit | times as fast | 1 bit "
        "| times as fast | memory, GB | of a step, ms: the kernel | products | all else |",
        "| --- " * 11 + "|",
    ]
    for (batch, context, what, weights), row in rows.items():
        if what != "1 bit" or "error" in row or "estimate" in row:
            continue  # as many sequences as fit have a table of their own
        full = rows.get((batch, context, "bf16", weights), {})
        known = full.get("tokens_per_second")
        half = rows.get((batch, context, "0.5 bit", weights), {})
        times = []
        for r in (half, row):
            speed = r.get("tokens_per_second")
            times.append(f"{speed:.0f}" if speed else "not measured")
            times.append(f"{speed / known:.2f}" if speed and known else "–")
        rest = sum(row.get(name, 0.0) for name in ("attend", "append", "rest"))
        cells = [
            *(f"{batch} × {_length(context)}", weights),
            f"{known:.0f}" if known else full.get("error", "not measured"),
            *times,
            f"{row['bytes'] / 1e9:.1f}",
            *(f"{x / 1e3:.2f}" for x in (row["kernel"], row["products"], rest)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _most(context: int) -> dict[str, dict[str, Any]]:
    """Rows of as many sequences as fit, by what is measured."""
    rows = [r for r in load(SPEED)["rows"] if "estimate" in r and "tokens_per_second" in r]
    return {r["what"]: r for r in rows if r["context"] == context}


def most() -> str:
    """As many sequences as fit, of either cache, and how many times bf16's tokens a second."""
    lines = [
        "| tokens of each | bf16 cache: sequences, tokens/s | 1 bit | times as fast | 0.5 bit "
        "| times as fast |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for context in (8192, 32768, 131072):
        here = _most(context)
        full = here.get("bf16", {}).get("tokens_per_second")
        cells = [_length(context)]
        for what in ("bf16", "1 bit", "0.5 bit"):
            r = here.get(what)
            cells.append(f"{r['batch']}, {r['tokens_per_second']:.0f}" if r else "not measured")
            if what != "bf16":
                cells.append(f"{r['tokens_per_second'] / full:.1f}" if r and full else "–")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


SHOWN = ((8, 32768), (32, 8192), (1, 131072), (8, 131072), (1, 2**20), (1, 8192))


def speed() -> str:
    """The decode loop over both caches, as a user sees it, with weights in bfloat16."""
    rows = _speed("model", NOW)
    lines = [
        "| sequences × tokens | bf16 cache: tokens/s, GB in all | 1 bit: tokens/s, GB in all |",
        "| --- | --- | --- |",
    ]
    for batch, context in SHOWN:
        cells = []
        for what in ("bf16", "1 bit"):
            r = rows[batch, context, what, "bf16"]
            cells.append(r.get("error") or f"{r['tokens_per_second']:.0f}, {r['bytes'] / 1e9:.0f}")
        lines.append(f"| {batch} × {_length(context)} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", f"- {source(NOW)}"])


def prompts(file: str = SPEED) -> str:
    """Time of reading a prompt into both caches."""
    rows = _speed("prefill", file)
    lines = [
        "| tokens | bf16, ms | 1 bit, ms | of the device's time, what bf16 does not take |",
        "| --- | --- | --- | --- |",
    ]
    for (batch, context, what, _), row in rows.items():
        if what == "1 bit":
            full = rows[batch, context, "bf16", None]
            share = 1 - full["device_microseconds"] / row["device_microseconds"]
            both = (f"{r['microseconds'] / 1e3:.0f}" for r in (full, row))
            lines.append(f"| {_length(context)} | {' | '.join(both)} | {share:.0%} |")
    return "\n".join(lines)


TABLES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {
        "demo": demo,
        "results": runs,
        "presets": presets,
        "heads": heads,
        "peers": peers,
        "speed": speed,
    },
    "docs/planes.md": {"planes": planes, "parities": parities},
    "docs/kernels.md": {
        "layer": layer,
        "loops now": functools.partial(loops, NOW),
        "prompts now": functools.partial(prompts, NOW),
        "attention": attention,
        "loops": loops,
        "most": most,
        "prompts": prompts,
    },
}


def filled(name: str, text: str) -> str:
    """A page with its tables as the files have them."""
    for table, make in TABLES[name].items():
        content = make()
        begin, end = f"<!-- {table} -->", f"<!-- end {table} -->"
        pattern = re.compile(f"{begin}.*?{end}", re.DOTALL)
        text, found = pattern.subn(lambda _, c=content, b=begin, e=end: f"{b}\n{c}\n{e}", text)
        if found != 1:
            raise SystemExit(f"error: {name} has no {begin} … {end}")
    return text


if __name__ == "__main__":
    pages = {name: (ROOT / name).read_text(encoding="utf-8") for name in TABLES}
    new = {name: filled(name, text) for name, text in pages.items()}
    if "--check" in sys.argv:
        sys.exit(new != pages)
    for name, text in new.items():
        (ROOT / name).write_text(text, encoding="utf-8")
