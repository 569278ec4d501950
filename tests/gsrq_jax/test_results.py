import json

import jax
import pytest

from gsrq_jax.results import command_line, write_result


def test_round_trip(tmp_path):
    rows = [{"what": "‖x‖", "value": 1.5}, {"what": "y", "value": None}]
    path = write_result(tmp_path / "new" / "a.json", rows, command="python a.py", config={"k": 2})
    data = json.loads(path.read_text(encoding="utf-8"))
    assert list(data) == ["command", "device", "versions", "date", "commit", "config", "rows"]
    assert data["rows"] == rows
    assert data["command"] == "python a.py"
    assert data["versions"]["jax"] == jax.__version__
    assert [p.name for p in path.parent.iterdir()] == ["a.json"]


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = write_result(tmp_path / "a.json", [{"value": 1}], command="a")
    before = path.read_text()
    for bad in (float("nan"), object()):
        with pytest.raises((ValueError, TypeError)):
            write_result(path, [{"value": bad}], command="a")
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]


def test_the_command_is_as_it_was_typed(monkeypatch):
    monkeypatch.setattr("sys.argv", ["train_codebooks.py", "--text", "a text.txt"])
    assert command_line() == "python train_codebooks.py --text 'a text.txt'"
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/gsrq-train", "--bits", "1"])
    assert command_line() == "gsrq-train --bits 1"
