"""The benchmark of fits at toy sizes: what it writes, and what it refuses."""

import json

import pytest
from scripts import ROOT, script

from gsrq_jax.errors import InputError

benchmark = script("benchmarks", "fit_throughput")


def test_rows_and_table(benchmark, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fit_throughput.py", "--repeats", "2", "--out", "x"])
    monkeypatch.setattr(
        benchmark,
        "LLAMA_3_8B",
        benchmark.dataclasses.replace(benchmark.LLAMA_3_8B, kv_heads=1, head_dim=8, layers=3),
    )
    config = benchmark.Config(shapes=("2x64x8x16",), tokens=256, repeats=2, out=tmp_path)
    benchmark.main(config)
    data = json.loads((tmp_path / "results/fit-throughput.json").read_text())
    assert data["command"] == "python benchmarks/fit_throughput.py --repeats 2"
    rows = [r for r in data["rows"] if r["implementation"].startswith("gsrq_jax")]
    assert [r["part"] for r in rows] == ["assign", "sweep", "sweep", "layer"]
    assign, *_, layer = rows
    assert assign["alone_seconds"] > 0
    assert assign["rate"] == pytest.approx(2 * 64 * 16 / assign["seconds"])
    assert (layer["problems"], layer["stages"]) == (2, 1)
    assert layer["model_seconds"] == 3 * layer["seconds"]
    assert layer["rate"] == pytest.approx(2 * 256 * 256 * layer["passes"] / layer["seconds"])
    printed = capsys.readouterr().out
    each, alone = (f"{assign[x] * 1e3:,.2f}" for x in ("seconds", "alone_seconds"))
    assert f"| 2 × 64 × 8 | 16 | gsrq_jax (xla) | {each} (alone {alone}) |" in printed
    benchmark.main(benchmark.dataclasses.replace(config, table=True))
    assert capsys.readouterr().out.strip() == benchmark.table(data)


def test_the_docs_have_the_results(benchmark):
    text = (ROOT / "docs" / "several-gpus.md").read_text()
    data = json.loads((ROOT / "results" / "fit-throughput.json").read_text())
    assert benchmark.table(data) in text
    assert data["command"] in " ".join(text.split())


@pytest.mark.parametrize("shape", ["8", "1x2x3", "axbxcxd", "1x8x8x16", "0x8x8x8"])
def test_shapes_that_cannot_be(benchmark, shape):
    with pytest.raises(InputError, match=f"--shapes takes .*, got {shape}"):
        next(benchmark.measure(benchmark.Config(shapes=(shape,), parts=("assign",))))
