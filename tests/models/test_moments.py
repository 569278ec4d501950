"""The study of second moments: its numbers on moments that are known, and its document."""

import json

import numpy as np
import pytest
from scripts import ROOT, script

from gsrq_jax.errors import InputError

study = script("benchmarks", "moments")


def test_known_moments(study):
    flat, sharp = np.eye(4), np.diag([1.0, 0, 0, 0])
    assert study.spectrum(flat) == {"direction": 0.25, "rank": 4.0}
    assert study.spectrum(np.stack([flat, sharp])) == {"direction": 0.625, "rank": 2.5}
    norms = np.ones(100)
    assert study.concentration(norms) == pytest.approx({"tokens_1": 0.01, "tokens_10": 0.1})
    norms[7] = np.sqrt(99)
    assert study.concentration(norms) == pytest.approx({"tokens_1": 0.5, "tokens_10": 108 / 198})


def test_document_says_what_was_measured(study, tiny_model, tmp_path):
    config = study.Config(
        model=str(tiny_model), sequences=2, length=48, sinks=2, out=tmp_path / "new"
    )
    study.main(config)
    data = json.loads((tmp_path / "new/results/moments.json").read_text())
    assert [r["metric"] for r in data["rows"]] == [*study.METRICS] * 2
    assert data["command"].endswith("--model tiny --text python --sequences 2 --length 48")
    assert all(r["value"] > 0 for r in data["rows"])
    rank = data["rows"][3]["value"]
    document = (tmp_path / "new/docs/moments.md").read_text()
    assert f"| {rank:.1f} | {data['rows'][8]['value']:.1f} |" in document
    with pytest.raises(InputError, match="--sequences must be an even number from 2 up, got 3"):
        study.run(study.Config(sequences=3))
    (tmp_path / "short").write_text("few words")
    with pytest.raises(InputError, match="too few for one sequence"):
        study.run(study.Config(model=str(tiny_model), text=str(tmp_path / "short"), length=48))


def test_committed_document_is_that_of_the_file(study):
    data = json.loads((ROOT / "results/moments.json").read_text())
    assert (ROOT / "docs/moments.md").read_text() == study.markdown(data)
