"""The report of a training run: `report.json`, and Markdown and a picture made from it."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from gsrq_jax import results
from gsrq_jax.cache import init_cache
from gsrq_jax.calibration import LayerReport
from gsrq_jax.codebook import Codebooks
from gsrq_jax.models.distillation import Refinement
from gsrq_jax.models.evaluation import Fidelity
from gsrq_jax.models.loading import LoadedModel

CONTEXTS = (8_192, 131_072)


def cache_rows(codebooks: Codebooks) -> list[dict[str, Any]]:
    """Bytes of the cache of one sequence at `CONTEXTS`, beside bf16, from real arrays.

    At full precision arrays of one layer are made and counted; the others are of the same shapes.
    """
    spec, layers = codebooks.spec, codebooks.layers or 1
    shape: dict[str, Any] = {
        "batch": 1,
        "kv_heads": codebooks.kv_heads,
        "head_dim": spec.head_dim,
    }
    rows = []
    for context in CONTEXTS:
        ours = init_cache(spec, max_length=context, layers=layers, **shape).nbytes
        full = layers * init_cache(None, max_length=context, **shape).nbytes
        rows.append(
            {
                "context": context,
                "bytes": ours,
                "bf16_bytes": full,
                "ratio": full / ours,
                "bits_effective": 16 * ours / full,
                "bytes_a_token": ours / context,
                "codebook_bytes": codebooks.nbytes,
            }
        )
    return rows


def fit_rows(layers: LayerReport) -> list[dict[str, Any]]:
    """Distortion and cosine of every layer and stage on the calibration samples, mean of heads.

    Of hundreds of stages some `_LISTED`, evenly spaced, the last among them.
    """
    rows = []
    for part, found in (("key", layers.key), ("value", layers.value)):
        error, cosine, dead = (np.asarray(x) for x in (found.error, found.cosine, found.dead))
        step = -(-error.shape[-1] // _LISTED)
        for layer in range(len(error)):
            for stage in range(error.shape[-1])[::-step][::-1]:
                rows.append(
                    {
                        "part": part,
                        "layer": layer,
                        "stage": stage + 1,
                        "distortion": float(error[layer, ..., stage].mean()),
                        "cosine": float(cosine[layer, ..., stage].mean()),
                        "dead": int(dead[layer, ..., stage].sum()),
                    }
                )
    return rows


_LISTED = 32  # stages of a code at most


def write(
    folder: pathlib.Path,
    *,
    config: dict[str, Any],
    model: LoadedModel,
    codebooks: Codebooks,
    layers: LayerReport,
    measured: Mapping[str, Fidelity],
    length: int,
    tokens: int,
    refinement: Refinement | None = None,
    allocation: dict[str, Any] | None = None,
    seconds: float | None = None,
) -> None:
    """Write ``report.json``, whole or not at all; `render` makes the rest from it.

    Args:
        folder: of the run.
        config: the run's flags, as JSON holds them.
        model: that the codebooks are for.
        codebooks: of all layers.
        layers: what fitting found, stacked over layers.
        measured: what was found by the name of a text: the held-out one first, then others.
        length: of a sequence of theirs.
        tokens: that were calibrated on.
        refinement: what distillation found, if there was any.
        allocation: sensitivities that stages were given by, if they were.
        seconds: that the run took, measuring included; None if it was interrupted.
    """
    spec = codebooks.spec
    caches = cache_rows(codebooks)
    common = {
        "model": model.name,
        "method": _method(config),
        "preset": str(spec),
        "bits": spec.bits,
        "bits_effective": caches[0]["bits_effective"],
        "window": spec.window,
        "sinks": spec.sinks,
    }
    rows = [
        {
            **common,
            "dataset": dataset,
            "length": length,
            "n": found.n,
            "metric": metric,
            "value": value,
            "full_precision": full,
        }
        for dataset, found in measured.items()
        for metric, value, full in (
            ("perplexity", found.perplexity, found.full_precision),
            ("kl", found.kl, 0.0),
            ("top1", found.top1, 1.0),
        )
    ]
    results.write_result(
        folder / "report.json",
        rows,
        command=results.command_line(),
        config=config,
        spec=spec.to_json(),
        summary=str(spec),
        calibration_tokens=tokens,
        cache=caches,
        fit=fit_rows(layers),
        distillation=None if refinement is None else _distillation(refinement),
        allocation=allocation,
        seconds=seconds,
    )


def _distillation(found: Refinement) -> dict[str, Any]:
    checks = [
        check._asdict() | {"train": None if check.step == 0 else check.train}
        for check in found.checks
    ]
    return dataclasses.asdict(found) | {"checks": checks}


def render(folder: pathlib.Path) -> dict[str, Any]:
    """``report.md`` and ``report.png`` from ``report.json``, whose content is returned."""
    data = json.loads((folder / "report.json").read_text(encoding="utf-8"))
    (folder / "report.md").write_text(markdown(data), encoding="utf-8")
    picture(data).savefig(folder / "report.png", dpi=120)
    return data


def datasets(data: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Rows by the text that was measured on, in their order, and by metric."""
    found: dict[str, dict[str, Any]] = {}
    for row in data["rows"]:
        found.setdefault(row["dataset"], {})[row["metric"]] = row
    return found


def table(data: dict[str, Any]) -> str:
    """The few lines that matter: what the cache weighs and what it costs."""
    lines = ["| | full precision | quantised | |", "| --- | --- | --- | --- |"]
    for index, (dataset, row) in enumerate(datasets(data).items()):
        on = f" on {dataset}" if index else ""
        exact, ours = row["perplexity"]["full_precision"], row["perplexity"]["value"]
        lines += [
            f"| perplexity{on} | {exact:.3f} | {ours:.3f} | {ours / exact - 1:+.2%} |",
            f"| KL, nats a token{on} | 0 | {row['kl']['value']:.4f} | |",
            f"| same top token{on} | 100 % | {row['top1']['value']:.1%} | |",
        ]
    lines.append(f"| bits a number, nominal | 16 | {data['rows'][0]['bits']:g} | |")
    for row in data["cache"]:
        name = f"cache at {row['context']:,} tokens"
        lines += [
            f"| {name} | {_bytes(row['bf16_bytes'])} | {_bytes(row['bytes'])} "
            f"| {row['ratio']:.1f} × smaller, {row['bits_effective']:.2f} bits effective |",
        ]
    lines.append(f"| codebooks, once | | {_bytes(data['cache'][0]['codebook_bytes'])} | |")
    return "\n".join(lines)


def markdown(data: dict[str, Any]) -> str:
    """`report.md` from what `report.json` holds."""
    texts = " and ".join(
        f"{row['perplexity']['n']:,} predictions ({dataset})"
        for dataset, row in datasets(data).items()
    )
    lines = [
        f"# Codebooks for {data['rows'][0]['model']}",
        "",
        f"{data['summary']}; {data['calibration_tokens']:,} calibration tokens.",
        "",
        table(data),
        "",
        f"Measured on {texts}, teacher forced, sinks and exactly {data['rows'][0]['window']} past "
        "tokens exact. Bytes are those of real arrays of one sequence, window and sinks included, "
        f"bf16 where exact. One run of `{data['command']}` on {data['device']}, {data['date']}"
        + (f", {data['seconds']:.0f} s." if data.get("seconds") else "."),
        "",
        "![distortion and cosine](report.png)",
        "",
        "## By layer",
        "",
        "On the calibration samples, mean over heads, after the last stage: residual energy over "
        "the energy of what is coded, and cosine.",
        "",
        "| layer | key stages | distortion | cosine | value stages | distortion | cosine |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    spec = data["spec"]
    last = {(r["part"], r["layer"]): r for r in data["fit"]}  # the last stage's stay
    layers = 1 + max(row["layer"] for row in data["fit"])
    for layer in range(layers):
        key, value = last["key", layer], last["value", layer]
        cells = [str(layer)]
        for part, row in (("key", key), ("value", value)):
            by_layer = spec.get(f"{part}_stages")
            cells.append(str(spec[part]["stages"] if by_layer is None else by_layer[layer]))
            cells += [f"{row['distortion']:.3f}", f"{row['cosine']:.3f}"]
        lines.append(f"| {' | '.join(cells)} |")
    if found := data.get("allocation"):
        lines += [
            "",
            f"Stages were given by sensitivity: the KL divergence on {found['sequences']} "
            f"sequences with {found['low']} and with {found['high']} stages in one code at a time. "
            f"The most that a code could get is {found['most']}.",
        ]
    lines += [
        "",
        "## By stage",
        "",
        "Mean over layers and heads.",
        "",
        "| stages | key distortion | key cosine | value distortion | value cosine | dead cells |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for stage in sorted({row["stage"] for row in data["fit"]}):
        cells = []
        rows = [r for r in data["fit"] if r["stage"] == stage]
        for part in ("key", "value"):
            ours = [r for r in rows if r["part"] == part]
            for what in ("distortion", "cosine"):
                cells.append(f"{np.mean([r[what] for r in ours]):.3f}" if ours else "")
        lines.append(f"| {stage} | {' | '.join(cells)} | {sum(r['dead'] for r in rows)} |")
    lines += _distillation_lines(data.get("distillation"))
    return "\n".join(lines) + "\n"


def _distillation_lines(found: dict[str, Any] | None) -> list[str]:
    if found is None:
        return []
    lines = [
        "",
        "## Distillation",
        "",
        f"KL divergence, nats a token: on pieces of {found['sequences']} sequences, mean since the "
        f"row before, and on {found['held_out']} held out of them. Kept are the codewords after "
        f"step {found['kept']}.",
        "",
        "| step | pieces | held out |",
        "| --- | --- | --- |",
    ]
    for check in found["checks"]:
        train = "" if check["train"] is None else f"{check['train']:.4f}"
        lines.append(f"| {check['step']} | {train} | {check['held_out']:.4f} |")
    return lines


def picture(data: dict[str, Any]) -> Figure:
    """Distortion and cosine, keys and values, by layer and stage."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    axes = figure.subplots(2, 2, sharex=True, sharey="row")
    stages = max(row["stage"] for row in data["fit"])
    colour = matplotlib.colormaps["viridis_r"]
    for column, part in enumerate(("key", "value")):
        for stage in sorted({row["stage"] for row in data["fit"] if row["part"] == part}):
            rows = [r for r in data["fit"] if r["part"] == part and r["stage"] == stage]
            at = [r["layer"] for r in rows]
            label = f"{stage}" if stage in (1, stages) or stages <= 8 else None
            for axis, what in zip(axes[:, column], ("distortion", "cosine"), strict=True):
                axis.plot(
                    at, [r[what] for r in rows], color=colour(stage / stages), label=label, lw=1.5
                )
        axes[0, column].set_title(f"{part}s")
        axes[1, column].set_xlabel("layer")
        for axis in axes[:, column]:
            axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("residual energy / energy")
    axes[1, 0].set_ylabel("cosine to the original")
    axes[0, 1].legend(title="stages", fontsize="small", ncols=2)
    figure.suptitle(f"{data['rows'][0]['model']}: {data['summary']}", fontsize="medium")
    return figure


def _method(config: dict[str, Any]) -> str:
    rule, weights = config["fit"]["rule"], config["weights"]
    if config["codewords"] == 2:
        rule = "joint"
    if (rule, weights) == ("gskm", "gradient"):
        return "GSRQ"
    return f"{rule} residual codes, {'gradient' if weights == 'gradient' else 'no'} weights"


def _bytes(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"
