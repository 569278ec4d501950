"""Fill the tables of README.md from results/*.json: ``python tools/make_tables.py``.

With ``--check`` nothing is written; the exit code says whether the tables are those of the files.
"""

import json
import pathlib
import re
import sys
from typing import Any

from gsrq_jax.models import report

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
        by_metric = {row["metric"]: row for row in data["rows"]}
        perplexity = by_metric["perplexity"]
        exact, ours = perplexity["full_precision"], perplexity["value"]
        ratios = " / ".join(f"{row['ratio']:.1f} ×" for row in data["cache"])
        steps = data["config"].get("distill_steps", 0)
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


def filled(readme: str) -> str:
    """The README with its tables as the files have them."""
    for name, content in (("demo", demo()), ("results", runs())):
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
