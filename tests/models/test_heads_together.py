"""The study of codes that heads share: what it writes at a toy size, and what it refuses."""

import json

import pytest
from scripts import ROOT, script

from gsrq_jax.errors import InputError

study = script("benchmarks", "heads_together")


def test_document_says_what_was_measured(study, tiny_model, tmp_path):
    config = study.Config(
        model=str(tiny_model),
        sequences=2,
        held_out=1,
        length=48,
        layers=(1,),
        bits=(1.0,),
        codewords=16,
        out=tmp_path,
    )
    study.main(config)
    data = json.loads((tmp_path / "results/heads-together.json").read_text())
    assert [(r["side"], r["heads"], r["stages"]) for r in data["rows"]] == [
        ("keys", 1, 2),
        ("values", 1, 2),
        ("keys", 2, 4),
        ("values", 2, 4),
    ]
    assert all(0 < r["in_sample"] < r["held_out"] < 1 for r in data["rows"])
    assert data["command"].endswith(
        "--text python --sequences 2 --held-out 1 --length 48 --layers 1 --bits 1.0 --codewords 16"
    )
    document = (tmp_path / "docs/heads-together.md").read_text()
    each, together = (data["rows"][i]["held_out"] for i in (0, 2))
    assert f"| 1 | keys | 1 | {each:.3f} (" in document
    assert f"| {together / each:.2f} |" in document


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"layers": (2,)}, r"--layers must be from 0 to 1, got \(2,\)"),
        ({"layers": ()}, "--layers must be from 0 to 1"),
        ({"held_out": 0, "layers": (0,)}, "at least one each"),
        ({"text": "short", "layers": (0,)}, "too few for one sequence"),
    ],
)
def test_what_cannot_be(study, tiny_model, tmp_path, changes, says):
    (tmp_path / "short").write_text("few words")
    if "text" in changes:
        changes = changes | {"text": str(tmp_path / "short")}
    with pytest.raises(InputError, match=says):
        next(study.run(study.Config(model=str(tiny_model), length=48, **changes)))


def test_committed_document_is_that_of_the_file(study):
    data = json.loads((ROOT / "results/heads-together.json").read_text())
    assert (ROOT / "docs/heads-together.md").read_text() == study.markdown(data)
