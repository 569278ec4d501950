"""The benchmarks of several GPUs at toy sizes, on CPU devices."""

import dataclasses
import json
import shutil

import jax.numpy as jnp
import numpy as np
import pytest
from scripts import ROOT, script

from gsrq_jax import codebook
from gsrq_jax.errors import InputError

scaling = script("benchmarks", "scaling")
lost_process = script("benchmarks", "lost_process")


@pytest.mark.filterwarnings("ignore:the fused GPU kernel")
def test_rows_and_table(scaling, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["scaling.py", "--model", "toy", "--out", "x"])
    sizes = {"layers": 1, "contexts": (768,), "steps": 2, "block": 128, "repeats": 1}
    sizes |= {"parts": ("agree", "decode", "capture"), "captured": 1, "length": 16}
    config = scaling.Config(model="toy", meshes=("2x1",), out=tmp_path, **sizes)
    scaling.main(config)
    data = json.loads((tmp_path / "results/scaling-cpu-8.json").read_text())
    assert data["command"] == "python benchmarks/scaling.py --model toy"
    rows = data["rows"]
    assert [(r["part"], r.get("what")) for r in rows] == [
        ("agree", "1 bit"),
        ("decode", "1 bit"),
        ("decode", "bf16"),
        ("capture", None),
    ]
    agree, coded, exact, capture = rows
    assert agree["error"] < 1e-5
    assert coded["tokens_per_second"] == pytest.approx(2 / coded["seconds"])
    # A device's half of 768 tokens; coded, 3 blocks of 2 bytes a token, and sinks and window.
    assert exact["cache_bytes"] == 2 * 384 * 4 * 16 * 2
    ring = 4 + 128 + 128
    assert coded["cache_bytes"] == pytest.approx(2 * ring * 4 * 16 * 2 + 2 * 3 * 4 * 128 * 2, abs=8)
    assert capture["tokens"] == 2 * 16
    assert f"| {agree['error']:.1e} |" in capsys.readouterr().out
    assert f"| 2 × 1 | 32 | {capture['seconds']:.3f} | – |" in scaling.table(rows)
    one = capture | {"mesh": "1x1", "devices": 1, "seconds": 4 * capture["seconds"]}
    assert "| 4.00 × |" in scaling.table([*rows, one])


def test_what_is_fitted(scaling):
    """As many tokens on every mesh, or as many for each device along ``data``."""
    config = scaling.Config(model="toy", parts=("fit",), meshes=("1x2", "2x1"), tokens=64)
    made = [(on["mesh"], make.args[2:]) for on, make in scaling.jobs(config)]
    assert made == [
        ("1x2", (64, "strong")),
        ("2x1", (64, "strong")),
        ("2x1", (128, "weak")),
    ]
    job = scaling.fit(dataclasses.replace(config, bits=0.25), scaling.mesh_of("2x1"), 64, "strong")
    assert job.facts == {"part": "fit", "what": "strong", "tokens": 64, "stages": 1}
    (lowered,) = job.lowered
    assert "all_reduce" in lowered.as_text()


@pytest.mark.parametrize("mesh", ["4", "axb", "0x1", "4x4"])
def test_meshes_that_cannot_be(scaling, mesh):
    with pytest.raises(
        InputError, match=f"--meshes takes .*, got {mesh}|a mesh of {mesh} does not"
    ):
        scaling.mesh_of(mesh)


def test_the_docs_have_the_results(scaling):
    text = (ROOT / "docs" / "several-gpus.md").read_text()
    files = sorted((ROOT / "results").glob("scaling-[0-9]*.json"))
    assert scaling.table([r for f in files for r in json.loads(f.read_text())["rows"]]) in text


def test_the_docs_have_what_cpu_devices_did(scaling):
    text = (ROOT / "docs" / "pods.md").read_text()
    data = json.loads((ROOT / "results" / "scaling-cpu-8.json").read_text())
    assert scaling.table(data["rows"]).strip() in text
    assert data["command"].removeprefix("python ") in " ".join(text.split())


def test_what_differs_between_runs(lost_process, tiny_run, tmp_path):
    found = lost_process.difference(tiny_run, tiny_run)
    assert found == {
        "first_layer": 0,
        "other_layers": 0,
        "distortion": 0,
        "perplexity": 0,
        "equal": True,
    }
    other = tmp_path / "other"
    shutil.copytree(tiny_run, other)
    books = codebook.load(other / "codebooks")
    model = codebook.read_metadata(other / "codebooks")["model"]
    value = books.value.at[1].multiply(jnp.bfloat16(1.5))
    changed = dataclasses.replace(books, value=value)
    codebook.save(other / "codebooks", changed, model=model)
    found = lost_process.difference(other, tiny_run)
    size = np.asarray(books.value[1], np.float32)
    assert found["other_layers"] == pytest.approx(
        0.5 * np.abs(size).max() / np.sqrt(np.mean(size**2)), rel=1e-2
    )
    assert (found["first_layer"], found["equal"]) == (0, False)


def test_runs_that_cannot_be(lost_process, tmp_path):
    for fields, words in (
        ({"processes": 1}, "1 processes need 2 or more, and as many devices"),
        ({"processes": 3}, r"3 processes need 2 or more, and as many devices; got \[0, 1\]"),
        ({"layers": 0}, "--layers must be at least 1, got 0"),
    ):
        with pytest.raises(InputError, match=words):
            lost_process.measure(lost_process.Config(**fields), tmp_path)
