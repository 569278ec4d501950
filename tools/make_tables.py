"""Fill the tables of README.md from results/*.json: ``python tools/make_tables.py``.

With ``--check`` nothing is written; the exit code says whether the tables are those of the files.
"""

import json
import pathlib
import re
import sys
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


def heads() -> str:
    """KV heads that share codes, beside the recipe, as docs/results.md has them."""
    changed = make_results.fidelity_rows(make_results.files("ablation/2048/*heads3*-w*.json"))
    rows = make_results.fidelity_rows(make_results.files("fidelity/2048/gsrq@*-w*.json"))
    return make_results.ablations(changed, rows)[-1]


def filled(readme: str) -> str:
    """The README with its tables as the files have them."""
    tables = {"demo": demo, "results": runs, "presets": presets, "heads": heads, "peers": peers}
    for name, make in tables.items():
        content = make()
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        pattern = re.compile(f"{begin}.*?{end}", re.DOTALL)
        readme, found = pattern.subn(lambda _, c=content, b=begin, e=end: f"{b}\n{c}\n{e}", readme)
        if found != 1:
            raise SystemExit(f"error: README.md has no {begin} … {end}")
    return readme


if __name__ == "__main__":
    path = ROOT / "README.md"
    old = path.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" in sys.argv:
        sys.exit(new != old)
    path.write_text(new, encoding="utf-8")
