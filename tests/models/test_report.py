"""What the report says, from numbers that are known."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gsrq_jax.cache import init_cache
from gsrq_jax.calibration import LayerReport
from gsrq_jax.codebook import load
from gsrq_jax.models import report
from gsrq_jax.residual import FitReport

PNG = b"\x89PNG\r\n\x1a\n"
# DESIGN, "Measuring": what every row of a fidelity result says.
ROW = "model method preset bits bits_effective window sinks dataset length n metric value"


def layers():
    """Two layers, three heads, one group, two stages, with different numbers everywhere."""
    error = jnp.arange(12.0).reshape(2, 3, 1, 2)
    dead = jnp.arange(12, dtype=jnp.int32).reshape(2, 3, 1, 2)
    half = FitReport(error=error, cosine=-error, dead=dead)
    return LayerReport(half, jax.tree.map(lambda x: 100 + x, half))


def test_rows_by_layer_and_stage_are_means_of_heads():
    rows = {(r["part"], r["layer"], r["stage"]): r for r in report.fit_rows(layers())}
    assert len(rows) == 8
    key = rows["key", 1, 2]  # heads hold 7, 9, 11
    assert (key["distortion"], key["cosine"], key["dead"]) == (9.0, -9.0, 27)
    value = rows["value", 0, 1]  # 100, 102, 104
    assert (value["distortion"], value["cosine"], value["dead"]) == (102.0, 98.0, 306)


def test_of_hundreds_of_stages_some_are_listed():
    error = jnp.arange(2.0 * 3 * 384).reshape(2, 3, 1, 384)
    half = FitReport(error=error, cosine=-error, dead=error.astype(jnp.int32))
    stages = [r["stage"] for r in report.fit_rows(LayerReport(half, half)) if r["layer"] == 0]
    assert stages == 2 * list(range(12, 385, 12))


def test_bytes_are_those_of_arrays(tiny_run):
    books = load(tiny_run / "codebooks")
    found = {row["context"]: row for row in report.cache_rows(books)}
    assert set(found) == {8_192, 131_072}
    shape = {"batch": 1, "kv_heads": 2, "head_dim": 8, "layers": 2}
    for context, row in found.items():
        cache, full = (init_cache(s, max_length=context, **shape) for s in (books.spec, None))
        assert row["bytes"] == sum(np.asarray(x).nbytes for x in jax.tree.leaves(cache))
        assert row["bf16_bytes"] == full.nbytes
        assert row["bf16_bytes"] >= 2 * 2 * 2 * 8 * context * 2  # layers, k and v, heads, d, bf16
        assert row["bits_effective"] == pytest.approx(16 / row["ratio"])
        assert row["bytes_a_token"] == row["bytes"] / context
        assert row["codebook_bytes"] == sum(x.nbytes for x in jax.tree.leaves(books))
    # 1 bit and the exact parts: 2 sinks and a ring of 16 of 2 · 2 · 2 · 8 bf16 numbers, a length.
    assert found[8_192]["bytes"] - 8_176 * 2 * 2 * 2 == (2 + 16) * 128 + 2 * 4


def test_run_has_its_three_files(tiny_run, tiny_model):
    data = json.loads((tiny_run / "report.json").read_text())
    assert {"command", "device", "versions", "date", "commit", "rows"} <= set(data)
    texts = ["held out of the calibration text", "python-source"]
    assert [row["metric"] for row in data["rows"]] == ["perplexity", "kl", "top1"] * 2
    assert [row["dataset"] for row in data["rows"]] == [x for x in texts for _ in range(3)]
    assert data["rows"][0]["value"] != data["rows"][3]["value"]
    assert data["distillation"] is None
    for row in data["rows"]:
        assert set(row) == {*ROW.split(), "full_precision"}
        assert (row["model"], row["method"], row["bits"]) == (tiny_model.name, "GSRQ", 1.0)
        assert (row["window"], row["sinks"], row["length"], row["n"]) == (8, 2, 48, 2 * 47)
        assert row["bits_effective"] == data["cache"][0]["bits_effective"]
    assert len(data["fit"]) == 2 * 2 * 2  # parts, layers, stages
    for part in ("key", "value"):
        for layer in range(2):
            one, two = (r for r in data["fit"] if (r["part"], r["layer"]) == (part, layer))
            assert 0 < two["distortion"] < one["distortion"] < 1
            assert 0 < one["cosine"] < two["cosine"] < 1
    assert (tiny_run / "report.png").read_bytes().startswith(PNG)


def rows_of(markdown, heading):
    """Cells of the table under a heading."""
    lines = markdown.split(f"## {heading}\n")[1].split("\n## ")[0].splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    return table[2:]


def test_tables_hold_what_the_json_holds(tiny_run):
    data = json.loads((tiny_run / "report.json").read_text())
    written = (tiny_run / "report.md").read_text()
    assert report.table(data) in written
    for at, on in ((0, ""), (3, " on python-source")):
        perplexity, kl, top1 = data["rows"][at : at + 3]
        exact, ours = perplexity["full_precision"], perplexity["value"]
        line = f"| perplexity{on} | {exact:.3f} | {ours:.3f} | {ours / exact - 1:+.2%} |"
        assert line in written
        assert f"| KL, nats a token{on} | 0 | {kl['value']:.4f} | |" in written
        assert f"| same top token{on} | 100 % | {top1['value']:.1%} | |" in written
    assert "94 predictions (held out of the calibration text) and 94 predictions (py" in written
    assert "## Distillation" not in written
    assert "](report.png)" in written

    fit = {(r["part"], r["layer"], r["stage"]): r for r in data["fit"]}
    by_layer = rows_of(written, "By layer")
    assert [row[0] for row in by_layer] == ["0", "1"]
    assert by_layer[1][1:3] == ["2", f"{fit['key', 1, 2]['distortion']:.3f}"]
    assert by_layer[0][6] == f"{fit['value', 0, 2]['cosine']:.3f}"
    by_stage = rows_of(written, "By stage")
    assert [row[0] for row in by_stage] == ["1", "2"]
    mean = np.mean([fit["value", layer, 1]["distortion"] for layer in range(2)])
    assert by_stage[0][3] == f"{mean:.3f}"


def test_methods_have_their_names():
    def name(rule, weights, codewords=256):
        config = {"fit": {"rule": rule}, "weights": weights, "codewords": codewords}
        return report._method(config)

    assert name("gskm", "gradient") == "GSRQ"
    assert name("kmeans", "gradient") == "kmeans residual codes, gradient weights"
    assert name("gskm", "none") == "gskm residual codes, no weights"
    assert name("gskm", "gradient", 2) == "joint residual codes, gradient weights"


def test_flags_of_the_run_are_in_the_report(tiny_run, tiny_model):
    config = json.loads((tiny_run / "report.json").read_text())["config"]
    assert config["model"] == str(tiny_model)
    flags = dict(zip(tiny.FLAGS[::2], tiny.FLAGS[1::2], strict=True))
    assert config["length"] == int(flags["--length"])
    assert config["fit"]["iterations"] == int(flags["--fit.iterations"])
