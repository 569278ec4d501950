"""Text from files, data sets and Python itself to token sequences."""

import inspect
import json
import pydoc_data.topics

import datasets
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest

from gsrq_jax.errors import InputError
from gsrq_jax.models import text, tokenizer

ROWS = [{"id": i, "body": f"row {i}", "text": f"text {i}"} for i in range(5)]


@pytest.fixture(scope="module")
def bytewise(tiny_model):
    return tokenizer.from_folder(tiny_model)


def ids_of(words):
    """Ids in the tiny model's vocabulary, from what its documentation says: letters in order."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    written = ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(words)
    return [2 + letters.index(c) for part, _ in written for c in part]


def test_files_and_python(tmp_path):
    file = tmp_path / "notes"
    file.write_text("Grüße\nzwei", encoding="utf-8")
    assert list(text.read(str(file))) == ["Grüße\nzwei"]
    assert list(text.read("python")) == list(pydoc_data.topics.topics.values())
    modules = list(text.read("python-source"))
    assert inspect.getsource(inspect) in modules
    assert len(modules) > 50


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(InputError, match=r"there is no file /no/such\.txt; correct the path"):
        next(text.read("/no/such.txt"))
    with pytest.raises(InputError, match=r"there is no file .*folders are for --dataset"):
        next(text.read(str(tmp_path)))
    (tmp_path / "latin1.txt").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match=r"cannot read .*latin1\.txt as UTF-8 text .*; give"):
        next(text.read(str(tmp_path / "latin1.txt")))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_data_sets_in_folders(tmp_path, kind):
    if kind == "jsonl":
        (tmp_path / "train.jsonl").write_text("\n".join(map(json.dumps, ROWS)))
    else:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(ROWS), tmp_path / "train.parquet")
    assert list(text.read_dataset(str(tmp_path))) == [row["text"] for row in ROWS]
    found = text.read_dataset(str(tmp_path), column="body")
    assert next(found) == "row 0"
    for column in ("prose", "id"):
        with pytest.raises(InputError, match=f"no text column '{column}'; it has id, body, text"):
            next(text.read_dataset(str(tmp_path), column=column))
    with pytest.raises(InputError, match=r"cannot read the data set .*'test'|cannot.*Bad split"):
        next(text.read_dataset(str(tmp_path), split="test"))


def test_data_sets_that_cannot_be_read(tmp_path, monkeypatch):
    with pytest.raises(InputError, match=r"cannot read the data set '/no/such/folder' \(.*; give"):
        next(text.read_dataset("/no/such/folder"))
    (tmp_path / "train.jsonl").write_text('{"text": "whole"}\n{"text": broken')
    with pytest.raises(InputError, match=r"cannot read the data set") as caught:
        list(text.read_dataset(str(tmp_path)))
    assert "\n" not in str(caught.value)

    def load_dataset(*arguments, **options):
        raise ConnectionError("no route\nlong explanation")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(InputError, match=r"'owner/name:small' \(no route\); give a hub id or"):
        next(text.read_dataset("owner/name:small"))


def test_names_of_data_sets_carry_their_config(monkeypatch):
    asked = []

    def load_dataset(path, name, *, split, streaming):
        asked.append((path, name, split, streaming))
        return iter(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert next(text.read_dataset("owner/name:small", split="test")) == "text 0"
    assert next(text.read_dataset("owner/name")) == "text 0"
    assert asked == [("owner/name", "small", "test", True), ("owner/name", None, "train", True)]


def test_pieces_are_joined_by_blank_lines(bytewise):
    got = text.tokens(["ab\n", "  ", "", "é"], bytewise)
    np.testing.assert_array_equal(got, ids_of("ab\n\né\n\n"))
    assert got.dtype == np.int32
    np.testing.assert_array_equal(text.tokens(["ab", "cd"], bytewise, count=3), got[:3])


def test_no_more_is_read_than_needed(bytewise):
    def pieces():
        yield "abcdefgh"
        raise AssertionError("read on")

    assert len(text.tokens(pieces(), bytewise, count=10)) == 10


def test_sequences_follow_each_other_and_begin_with_bos(bytewise):
    words = "The quick brown fox jumps over the lazy dog."
    rows = text.sequences([words], bytewise, length=10, count=3, name="fox")
    assert rows.dtype == np.int32
    np.testing.assert_array_equal(rows[:, 0], [0, 0, 0])
    np.testing.assert_array_equal(rows[:, 1:].reshape(-1), ids_of(words[:27]))
    assert len(text.sequences([words], bytewise, length=10, count=99, name="fox")) == 46 // 9
    with pytest.raises(InputError, match="'fox' has 46 tokens, too few for one sequence of 48"):
        text.sequences([words], bytewise, length=48, count=1, name="fox")
    with pytest.raises(InputError, match="'nothing' has 0 tokens"):
        text.sequences(["", " \n"], bytewise, length=8, count=1, name="nothing")
