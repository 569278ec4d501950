"""The reconstruction study: what its numbers are, and that its documents say the same."""

import functools
import json
import pathlib
import re
import subprocess
import sys

import jax
import numpy as np
import pytest
from scripts import ROOT, script

from gsrq_jax.errors import InputError
from gsrq_jax.kmeans import kmeans

BENCHMARKS = ROOT / "benchmarks"


study = script("benchmarks", "reconstruction")


@pytest.fixture(scope="module")
def config(study, tiny_model, tmp_path_factory):
    return study.Config(
        model=str(tiny_model),
        layers=1,
        dims=(16,),
        codewords=(8,),
        points=(32,),
        tokens=90,
        held_out=30,
        length=34,
        start=2,
        iterations=4,
        out=tmp_path_factory.mktemp("study"),
    )


@pytest.fixture(scope="module")
def data(study, config):
    """What one run wrote."""
    study.main(config)
    return json.loads((config.out / "results" / "reconstruction.json").read_text())


def test_every_case_is_there_once(study, data):
    found = study.Found(data["rows"])
    assert len(found.rows) == len(data["rows"]) == 2 * 2 * 2 * 4 * 2
    assert found.points == [32, 90]
    assert data["held_out"] == 30
    assert {row["problems"] for row in data["rows"]} == {1}  # two heads of eight channels in one
    assert all(np.isfinite([row[m] for m in study.MEANING]).all() for row in data["rows"])


def test_numbers_are_those_of_the_library_on_the_models_vectors(study, config, data):
    learned, held = study.samples(config)
    assert learned["value"].shape == (1, 90, 2, 8)
    assert np.abs(learned["key"].mean(1)).max() < 1e-5
    row = study.Found(data["rows"]).rows[
        "value", "original", 16, 8, 90, study.KMEANS, study.SAMPLES[1]
    ]
    rng = jax.random.split(jax.random.split(jax.random.key(config.seed), 2)[1], 2)[0]
    x, y = (np.asarray(a["value"]).reshape(-1, 16) for a in (learned, held))
    centroids = np.asarray(kmeans(rng, x, 8, iterations=6).centroids)
    distance = ((y[:, None] - centroids) ** 2).sum(-1)
    assert row["mse"] == pytest.approx(distance.min(1).sum() / (y**2).sum(), rel=1e-4)
    assert row["left"] == pytest.approx(row["mse"], rel=1e-5)
    nearest = centroids[distance.argmin(1)]
    cosine = (y * nearest).sum(1) / np.linalg.norm(y, axis=1) / np.linalg.norm(nearest, axis=1)
    assert row["cosine"] == pytest.approx(cosine.mean(), rel=1e-4)


def test_heads_are_put_side_by_side_and_cut_into_groups(study):
    x = np.arange(2 * 3 * 2 * 8).reshape(2, 3, 2, 8)  # layers, tokens, heads, channels
    np.testing.assert_array_equal(study.split(x, 16, 9), x.reshape(2, 3, 16))
    np.testing.assert_array_equal(study.split(x, 8, 9)[3], x[1, :, 1])
    groups = study.split(x, 4, 2)  # the first and the last group of each layer
    np.testing.assert_array_equal(groups[1], x[0, :, 1, 4:])
    assert groups.shape == (4, 3, 4)


def test_the_rules_on_clusters_that_are_known(study):
    """Points around 3 far centres: every rule finds them, and what it leaves has no clusters."""
    rng = np.random.default_rng(0)
    centres = 10 * np.linalg.qr(rng.normal(size=(16, 16)))[0][:3]

    def draw(n):
        return (centres[rng.integers(3, size=(2, n))] + rng.normal(size=(2, n, 16))).astype("f")

    # The shapes and options of `config`: nothing more to compile.
    found = jax.device_get(
        study.study(jax.random.key(0), draw(90), draw(30), codewords=8, start=2, iterations=4)
    )
    for by_sample in found.values():
        seen, held = (by_sample[s] for s in study.SAMPLES)
        np.testing.assert_allclose(held["mse"][:, 0], 16 / 116, rtol=0.3)
        assert (held["cosine"][:, 0] > 0.88).all()
        assert (seen["mse"] < held["mse"]).all()
        assert (held["mse"][:, 1] > 0.8).all()  # noise that was not learned from
        np.testing.assert_allclose(held["left"][:, 0], held["mse"][:, 0], rtol=1e-5)
        np.testing.assert_allclose(held["left"][:, 1], held["mse"].prod(1), rtol=1e-4)
    started, raw, unit = (
        found[m]["held-out"]["mse"][:, 0] for m in (study.STARTED, study.RAW, study.UNIT)
    )
    np.testing.assert_allclose(raw, started, rtol=1e-4)
    assert (np.abs(unit / started - 1) > 1e-5).all()


def test_documents_say_what_the_numbers_say(study, config, data):
    written = (config.out / "docs" / "reconstruction.md").read_text()
    assert (config.out / "docs" / "reconstruction.png").read_bytes().startswith(b"\x89PNG")
    found = study.Found(data["rows"])
    setting = ("key", 16, 8)
    seen, held = (
        found.value("cosine", setting, "residual", 90, study.UNIT, s) for s in study.SAMPLES
    )
    table = written.split("## By size: cosine")[1].split("\n## ")[0]
    (line,) = (x for x in table.splitlines() if x.startswith("| key residual | 16 | 8 |"))
    assert line.split(" | ")[3 + 4 + 2] == f"{seen:.3f} → {held:.3f}"
    ratios = [
        found.value("left", s, "original", 32, study.UNIT, "held-out")
        / found.value("left", s, "original", 32, study.KMEANS, "held-out")
        for s in found.settings
    ]
    assert len(ratios) == 2
    (line,) = re.findall(r"\| less error \| original \| GSKM, unit .*? / k-means \|.*", written)
    good = sum(r < 1 for r in ratios)
    assert line.split(" | ")[4] == f"{100 * (np.mean(ratios) - 1):+.2f} % ({good} of 2)"


def test_documents_can_be_made_again_alone_from_any_folder(data, config, tmp_path):
    docs = config.out / "docs"
    before = (docs / "reconstruction.md").read_text()
    (docs / "reconstruction.md").unlink()
    script = [sys.executable, str(BENCHMARKS / "reconstruction.py"), "--render"]
    subprocess.run([*script, "--out", str(config.out)], check=True, cwd=tmp_path)
    assert (docs / "reconstruction.md").read_text() == before


def test_the_command_repeats_the_run_and_names_no_folder(study, config, data):
    command = data["command"]
    assert command.startswith(f"python benchmarks/reconstruction.py --model {config.model[-4:]}")
    assert "--dims 16 --codewords 8 --points 32 --tokens 90 --held-out 30" in command
    assert "--seed" not in command
    assert str(pathlib.Path(config.model).parent) not in json.dumps(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dims": (5,)}, "5 channels are neither a part of a head of 8"),
        ({"dims": (32,)}, "nor several of the 2 heads"),
        ({"layers": 3}, "--layers must be from 1 to 2"),
        ({"length": 513}, "--length must be from 5 to 512"),
        ({"length": 4}, "--length must be from 5 to 512"),
        ({"codewords": (100_000,)}, "too few to learn 100000 codewords"),
        ({"points": (8,)}, "8 points are too few for 8 codewords"),
        ({"render": True, "out": pathlib.Path("nowhere")}, "run without --render first"),
    ],
)
def test_bad_input(study, config, changes, message):
    bad = functools.partial(study.Config, **(vars(config) | changes))
    with pytest.raises(InputError, match=message):
        study.main(bad())
