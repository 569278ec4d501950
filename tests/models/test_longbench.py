"""LongBench's tasks, rows and prompts."""

import hashlib
import json
import zipfile

import datasets
import huggingface_hub
import pytest
import tiny

from gsrq_jax.errors import InputError
from gsrq_jax.models import longbench, tokenizer
from gsrq_jax.models.longbench import GROUPS, TASKS, load, prompt, room, select, stops

CHAT = "{{ bos_token }}[{% for m in messages %}{{ m.content }}{% endfor %}]"


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return tokenizer.from_folder(tiny.make_model_folder(tmp_path_factory.mktemp("plain")))


@pytest.fixture(scope="module")
def chat(tmp_path_factory):
    folder = tiny.make_model_folder(tmp_path_factory.mktemp("chat"))
    (folder / "chat_template.jinja").write_text(CHAT)
    return tokenizer.from_folder(folder)


def row(task="qasper", **changes):
    data = {
        "input": "Who?",
        "context": "Somebody did.",
        "answers": ["Somebody"],
        "length": 2,
        "dataset": task,
        "language": "en",
        "all_classes": None,
        "_id": "a0",
    }
    return data | changes


def write(folder, task, *rows):
    folder.mkdir(exist_ok=True)
    lines = "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in rows)
    (folder / f"{task}.jsonl").write_text(lines, encoding="utf-8")
    return str(folder)


# Tasks


def test_the_tasks_there_are():
    assert {name: len(tasks) for name, tasks in GROUPS.items()} == {"en": 16, "zh": 5, "e": 13}
    assert len(TASKS) == 34
    assert sum(task.max_new_tokens for task in TASKS.values() if not task.extended) == 3168
    for name, task in TASKS.items():
        assert "{context}" in task.prompt
        assert task.extended == name.endswith("_e")
        if task.extended:
            base = TASKS[name[:-2]]
            assert (base.prompt, base.metric, base.max_new_tokens) == (
                *(task.prompt, task.metric, task.max_new_tokens),
            )
    unchatty = {"trec", "triviaqa", "samsum", "lsht", "lcc", "repobench-p"}
    assert {x for x, task in TASKS.items() if not task.chat and not task.extended} == unchatty
    assert [x for x, task in TASKS.items() if task.stop_at_newline] == ["samsum", "samsum_e"]


def test_prompts_are_those_of_longbench():
    """SHA-256 of LongBench's config/dataset2prompt.json, keys sorted, at commit 2e00731."""
    prompts = {name: task.prompt for name, task in TASKS.items() if not task.extended}
    text = json.dumps(prompts, sort_keys=True, ensure_ascii=False)
    assert hashlib.sha256(text.encode()).hexdigest() == (
        "e7d865d712fe45e2455f5e864ac474001d7758d68d349e76ffbcdd382483358f"
    )


def test_selection():
    assert [task.name for task in select(["zh", "lcc", "lsht"])] == ["lcc", *GROUPS["zh"]]
    assert len(select(["en", "zh", "e"])) == 34
    with pytest.raises(InputError, match="unknown task 'sums'; choose from en, zh, e"):
        select(["sums"])
    with pytest.raises(InputError, match="no task is named"):
        select([])


# Rows


def test_rows_of_a_folder_an_archive_and_the_hub(tmp_path, monkeypatch):
    written = [row(_id=str(i), input=f"第{i}?") for i in range(3)]
    folder = write(tmp_path / "data", "qasper", *written)
    wanted = load(folder, select(["qasper"]))
    assert [x.fields["input"] for x in wanted] == ["第0?", "第1?", "第2?"]
    assert wanted[0].answers == ("Somebody",)
    assert load(folder, select(["qasper"]), limit=2) == wanted[:2]

    with zipfile.ZipFile(tmp_path / "data.zip", "w") as archive:
        archive.write(f"{folder}/qasper.jsonl", "data/qasper.jsonl")
    assert load(str(tmp_path / "data.zip"), select(["qasper"])) == wanted

    asked = []

    def download(repo, file, *, repo_type):
        asked.append((repo, file, repo_type))
        return str(tmp_path / "data.zip")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    assert load(longbench.HUB_ID, select(["qasper"])) == wanted
    assert asked == [("THUDM/LongBench", "data.zip", "dataset")]


def test_a_hub_id_without_an_archive(tmp_path, monkeypatch):
    folder = write(tmp_path / "data", "qasper", row(), row(_id="a1"))
    real = datasets.load_dataset

    def nothing(*arguments, **options):
        raise huggingface_hub.errors.EntryNotFoundError("404")

    def stand_in(hub_id, name, *, split):
        assert (hub_id, split) == ("some/copy", "test")
        cache = str(tmp_path / "cache")
        return real("json", data_files=f"{folder}/{name}.jsonl", split="train", cache_dir=cache)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", nothing)
    monkeypatch.setattr(datasets, "load_dataset", stand_in)
    assert load("some/copy", select(["qasper"])) == load(folder, select(["qasper"]))
    with pytest.raises(InputError, match=r"cannot read lcc of the data set some/copy \("):
        load("some/copy", select(["lcc"]))


def test_a_hub_that_cannot_be_reached(monkeypatch):
    def fail(*arguments, **options):
        raise ConnectionError("no network\nat all")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    with pytest.raises(InputError, match=r"hub \(ConnectionError: no network\); check the name"):
        load(longbench.HUB_ID, select(["qasper"]))


@pytest.mark.parametrize(
    ("task", "changes", "words"),
    [
        ("qasper", {"answers": []}, "row 2 of qasper has no answers; take LongBench's own rows"),
        ("qasper", {"answers": None}, "row 2 of qasper has no answers"),
        ("qasper", {"answers": "Somebody"}, "row 2 of qasper has no answers"),
        ("qasper", {"answers": [3]}, "row 2 of qasper has no answers"),
        ("qasper", {"context": None}, "row 2 of qasper has no context or no input"),
        ("qasper", {"_id": None}, "row 2 of qasper has no _id or no length"),
        ("qasper", {"_id": "a0"}, "row 2 of qasper has the _id 'a0' of another"),
        ("qasper", {"length": "2"}, "row 2 of qasper has no _id or no length"),
        ("trec", {"all_classes": None}, "row 2 of trec has no all_classes"),
        ("passage_retrieval_en", {"answers": ["third"]}, "'third' names no paragraph"),
    ],
)
def test_rows_that_cannot_be_scored(tmp_path, task, changes, words):
    good = {"answers": ["Paragraph 3"], "all_classes": ["a"]}
    folder = write(tmp_path, task, row(**good), row(**(good | {"_id": "a1"} | changes)))
    with pytest.raises(InputError, match=words):
        load(folder, select([task]))


def test_data_that_is_not_there(tmp_path):
    folder = write(tmp_path / "data", "qasper", row())
    with pytest.raises(InputError, match=r"data has no lcc\.jsonl; add it, or leave the task"):
        load(folder, select(["qasper", "lcc"]))
    with pytest.raises(InputError, match="there is no folder /no/such; give one"):
        load("/no/such", select(["qasper"]))
    with pytest.raises(InputError, match="there is no folder nothing; give one"):
        load("nothing", select(["qasper"]))
    with pytest.raises(InputError, match="--limit must be at least 1, got 0"):
        load(folder, select(["qasper"]), limit=0)
    (tmp_path / "data" / "lcc.jsonl").write_text("\n")
    with pytest.raises(InputError, match="has no rows of lcc; leave the task out"):
        load(folder, select(["lcc"]))
    (tmp_path / "data" / "lcc.jsonl").write_text('{"a": 1}\n{')
    with pytest.raises(InputError, match="row 1 of lcc has no answers"):
        load(folder, select(["lcc"]))
    (tmp_path / "data" / "lcc.jsonl").write_text("{\n")
    with pytest.raises(InputError, match=r"line 1 of lcc\.jsonl is not JSON"):
        load(folder, select(["lcc"]))
    (tmp_path / "data" / "lcc.jsonl").write_text("[]\n")
    with pytest.raises(InputError, match="row 1 of lcc is no JSON object"):
        load(folder, select(["lcc"]))
    (tmp_path / "data" / "lcc.jsonl").write_bytes(b"\xff\n")
    with pytest.raises(InputError, match="cannot be read"):
        load(folder, select(["lcc"]))
    (tmp_path / "bad.zip").write_text("no archive")
    with pytest.raises(InputError, match=r"bad\.zip cannot be read"):
        load(str(tmp_path / "bad.zip"), select(["lcc"]))
    with zipfile.ZipFile(tmp_path / "bad.zip", "w") as archive:
        archive.write(f"{folder}/qasper.jsonl", "data/qasper_e.jsonl")
    with pytest.raises(InputError, match=r"bad\.zip has no qasper\.jsonl"):
        load(str(tmp_path / "bad.zip"), select(["qasper"]))


# Prompts


def rows_of(tmp_path, task, **changes):
    (found,) = load(write(tmp_path, task, row(**changes)), select([task]))
    return found


def test_a_short_prompt(tmp_path, plain, chat):
    asked = rows_of(tmp_path, "qasper")
    text = asked.task.prompt.replace("{context}", "Somebody did.").replace("{input}", "Who?")
    ids = prompt(asked, plain, 10_000)
    assert (ids[0], plain.decode(ids)) == (0, text)
    ids = prompt(asked, chat, 10_000)
    assert (ids.count(0), chat.decode(ids)) == (1, f"[{text}]")
    unchatty = rows_of(tmp_path, "lcc")
    assert prompt(unchatty, chat, 10_000) == prompt(unchatty, plain, 10_000)
    assert chat.decode(prompt(unchatty, chat, 10_000)).startswith("Please complete the code")


def test_a_long_prompt_loses_its_middle(tmp_path, plain, chat):
    """A byte a token; the beginning-of-text token is one of the first half and then lost."""
    asked = rows_of(tmp_path, "qasper", context="0123456789" * 50)
    text = asked.task.prompt.format(**asked.fields)
    assert len(text) > 500
    for tokens in (100, 101):
        ids = prompt(asked, plain, tokens)
        assert plain.decode(ids) == text[:49] + text[-50:]
        assert len(ids) == 100
    assert chat.decode(prompt(asked, chat, 100)) == f"[{text[:49]}{text[-50:]}]"
    whole = len(text) + 1
    assert plain.decode(prompt(asked, plain, whole)) == text
    assert len(prompt(asked, plain, whole - 1)) == whole - whole % 2 - (whole % 2 == 0) * 2


def test_a_character_cut_in_two(tmp_path, plain):
    """What is left of it becomes U+FFFD, three tokens instead of one or two: more than asked."""
    asked = rows_of(tmp_path, "lcc", context="界" * 200)
    lengths = {n: len(prompt(asked, plain, n)) for n in range(150, 156)}
    assert any(found > n for n, found in lengths.items())
    assert all(found <= n + longbench._JOINT for n, found in lengths.items())


def test_room_for_prompt_template_and_answer(tmp_path, plain, chat):
    assert room(TASKS["qasper"], plain, 1000) == 1000 - 128 - longbench._JOINT
    assert room(TASKS["qasper"], chat, 1000) == room(TASKS["qasper"], plain, 1000) - 3
    assert room(TASKS["lcc"], chat, 1000) == 1000 - 64 - longbench._JOINT


def test_what_ends_an_answer(plain):
    assert stops(TASKS["samsum"], plain) == (plain.encode("\n", add_bos=False)[0],)
    assert stops(TASKS["qasper"], plain) == ()
