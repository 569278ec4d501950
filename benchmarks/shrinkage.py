"""How much shorter than its members a centroid is, and what that does to direction and error.

    python benchmarks/shrinkage.py

Gaussian points, clustered by k-means, k-means from a spherical start, and GSKM with both shape
rules; every number in-sample and on held-out points. Writes `results/shrinkage.json`, and from it
`docs/shrinkage.md` and `docs/shrinkage.png`.
"""

import dataclasses
import json
import pathlib

import jax
import jax.numpy as jnp
import matplotlib
import tyro

from gsrq_jax.kmeans import assign, gskm, kmeans
from gsrq_jax.results import write_result

matplotlib.use("Agg")
import matplotlib.pyplot as plt

ROOT = pathlib.Path(__file__).parent.parent
SAMPLES = ("in-sample", "held-out")
METRICS = {
    "shrinkage": "‖centroid‖ / mean norm of its members",
    "cosine": "mean cosine of a point to its centroid",
    "mse": "mean squared error / mean ‖x‖²",
}


@dataclasses.dataclass(frozen=True)
class Config:
    """Numbers of the experiment.

    Attributes:
        dim: channels.
        codewords: centroids.
        points: points to learn from, and as many held out.
        start: passes of the spherical start.
        iterations: passes after the start; k-means from random points gets ``start`` more.
        seeds: repetitions with new points.
        out: folder under which ``results`` and ``docs`` lie.
    """

    dim: int = 128
    codewords: int = 256
    points: int = 16_384
    start: int = 5
    iterations: int = 15
    seeds: int = 2
    out: pathlib.Path = ROOT


def fits(rng, x, config):
    """Centroids by name of the method."""
    k, warmup, iterations = config.codewords, config.start, config.iterations
    # One pass judges the start and goes no further.
    start = gskm(rng, x, k, warmup=warmup, iterations=1).centroids
    return {
        "k-means": kmeans(rng, x, k, iterations=warmup + iterations),
        "k-means, spherical start": kmeans(rng, x, k, init=start, iterations=iterations),
        "GSKM, unit (paper)": gskm(rng, x, k, init=start, iterations=iterations),
        "GSKM, raw (figure code)": gskm(
            rng, x, k, init=start, iterations=iterations, shape_update="raw"
        ),
    }


def measure(x, centroids):
    """Shrinkage over occupied cells weighted by members, cosine and relative error.

    Points that are as good as zero, such as residuals of cells of one, have no direction and do
    not count in the first two. Works under ``jit`` and ``vmap``.
    """
    code, error = assign(x, centroids)
    norms, lengths = jnp.linalg.norm(x, axis=-1), jnp.linalg.norm(centroids, axis=-1)
    least = 1e-4 * jnp.sqrt(jnp.mean(norms**2))
    members = jnp.bincount(code, length=len(centroids))
    mean_norm = jnp.bincount(code, norms, length=len(centroids)) / jnp.maximum(members, 1)
    members = jnp.where(mean_norm > least, members, 0)
    ratio = lengths / jnp.maximum(mean_norm, least)
    cosine = jnp.sum(x * centroids[code], -1) / jnp.maximum(norms * lengths[code], 1e-30)
    return {
        "shrinkage": jnp.sum(members * ratio) / jnp.maximum(members.sum(), 1),
        "cosine": jnp.mean(cosine, where=norms > least),
        "mse": error.sum() / jnp.maximum(jnp.sum(norms**2), 1e-30),
    }


def run(config):
    """Rows, the mean and spread over seeds of every number."""
    found = {}
    for seed in range(config.seeds):
        draw, rng = jax.random.split(jax.random.key(seed))
        x = jax.random.normal(draw, (2, config.points, config.dim))
        for method, result in fits(rng, x[0], config).items():
            for sample, points in zip(SAMPLES, x, strict=True):
                for metric, value in measure(points, result.centroids).items():
                    found.setdefault((method, sample, metric), []).append(float(value))
    return [
        {
            "method": method,
            "sample": sample,
            "metric": metric,
            "value": sum(values) / len(values),
            "spread": max(values) - min(values),
        }
        for (method, sample, metric), values in found.items()
    ]


def table(data):
    """The rows as Markdown, with what they say."""
    rows, config = data["rows"], data["config"]
    value = {(r["method"], r["sample"], r["metric"]): r["value"] for r in rows}
    spread = max(r["spread"] for r in rows)
    methods = list(dict.fromkeys(r["method"] for r in rows))
    heads = [f"{metric}, {sample}" for metric in METRICS for sample in SAMPLES]
    lines = [
        "# Shrinkage of centroids",
        "",
        f"`{data['command']}` on {data['device']}, jax {data['versions']['jax']}: Gaussian points, "
        f"{config['dim']} channels, {config['codewords']} codewords, {config['points']} points to "
        f"learn from and as many held out, mean of {config['seeds']} seeds (largest spread of any "
        f"number {spread:.4f}). Written by the command from `results/shrinkage.json`.",
        "",
        "| method | " + " | ".join(heads) + " |",
        "| --- |" + " --- |" * len(heads),
    ]
    for method in methods:
        cells = [f"{value[method, s, m]:.4f}" for m in METRICS for s in SAMPLES]
        lines.append(f"| {method} | " + " | ".join(cells) + " |")
    lines += ["", *(f"- **{metric}**: {text}" for metric, text in METRICS.items()), ""]
    lines += ["## What holds on held-out points", ""]

    def against(method, other):
        return f"- {method}, against {other}: " + ", ".join(
            f"{m} {100 * (value[method, 'held-out', m] / value[other, 'held-out', m] - 1):+.2f} %"
            for m in METRICS
        )

    plain, started, paper, _ = methods
    lines += [against(method, plain) for method in methods[1:]]
    lines += [against(paper, started), ""]
    gain = {m: value[m, "held-out", "cosine"] - value[plain, "held-out", "cosine"] for m in methods}
    lost = {m: value[m, "in-sample", "cosine"] - value[m, "held-out", "cosine"] for m in methods}
    lines += [
        f"Of what {paper} gains in held-out cosine over {plain} ({gain[paper]:.4f}), plain "
        f"k-means has {100 * gain[started] / gain[paper]:.0f} % from the spherical start alone. "
        f"From learned to held-out points the cosine falls by {lost[plain]:.4f} ({plain}) and "
        f"{lost[paper]:.4f} ({paper}). Centroids are still "
        f"{100 * (1 - value[paper, 'held-out', 'shrinkage']):.0f} % shorter than their held-out "
        f"members ({paper}; {plain} {100 * (1 - value[plain, 'held-out', 'shrinkage']):.0f} %): "
        "the gain with the least error is about the norm times the cosine, whatever the rule.",
    ]
    lines += ["", "![the same numbers as bars](shrinkage.png)", ""]
    return "\n".join(lines)


def picture(data, path):
    """The rows as bars."""
    rows = data["rows"]
    methods = list(dict.fromkeys(r["method"] for r in rows))
    figure, axes = plt.subplots(1, len(METRICS), figsize=(13, 4), sharey=True)
    for axis, (metric, text) in zip(axes, METRICS.items(), strict=True):
        for i, (sample, colour) in enumerate(zip(SAMPLES, ("#9db8d9", "#1f4e8c"), strict=True)):
            values = [r["value"] for r in rows if (r["sample"], r["metric"]) == (sample, metric)]
            places = [m + 0.38 * (i - 0.5) for m in range(len(methods))]
            bars = axis.barh(places, values, 0.36, label=sample, color=colour)
            axis.bar_label(bars, fmt="%.3f", padding=3, fontsize=8)
        axis.set_xlabel(text)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_yticks(range(len(methods)), methods)
    axes[0].invert_yaxis()
    config = data["config"]
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="lower right", ncols=2, frameon=False)
    figure.suptitle(
        f"Gaussian points, {config['dim']} channels, {config['codewords']} codewords, "
        f"{config['points']} points"
    )
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(path, dpi=130)


def main(config: Config) -> None:
    """Measures, writes the result file, and the table and picture from it."""
    fields = dataclasses.asdict(config)
    fields.pop("out")
    flags = [
        f" --{f.name} {fields[f.name]}"
        for f in dataclasses.fields(Config)
        if f.name in fields and fields[f.name] != f.default
    ]
    path = write_result(
        config.out / "results" / "shrinkage.json",
        run(config),
        command="python benchmarks/shrinkage.py" + "".join(flags),
        config=fields,
    )
    data = json.loads(path.read_text())
    docs = config.out / "docs"
    docs.mkdir(exist_ok=True)
    (docs / "shrinkage.md").write_text(table(data))
    picture(data, docs / "shrinkage.png")
    print(table(data))


if __name__ == "__main__":
    main(tyro.cli(Config, description=__doc__))
