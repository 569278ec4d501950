"""Whole runs of LongBench on a tiny model: answers, resumption, tables, bad input."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny

from gsrq_jax import codebook, codec
from gsrq_jax.errors import InputError
from gsrq_jax.models import commands, generation, loading, longbench, longbench_metrics
from gsrq_jax.models.longbench_report import interval
from gsrq_jax.models.longbench_run import Runner, batches

TASKS = ("hotpotqa", "samsum", "lcc", "passage_retrieval_en_e")


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Rows of four tasks, some beyond the tiny model's context of 512 bytes."""
    folder = tmp_path_factory.mktemp("longbench")
    rng = np.random.default_rng(0)
    for task in TASKS:
        lines = []
        for i in range(3):
            words = " ".join(rng.choice(["one", "two", "three\n", "four"], size=30 + 60 * i))
            lines.append(
                {
                    "input": "Which?",
                    "context": words,
                    "answers": ["Paragraph 3", "Paragraph 4"],
                    "length": 3990 + 10 * i,
                    "dataset": task,
                    "language": "en",
                    "all_classes": None,
                    "_id": f"{task}{i}",
                }
            )
        text = "".join(json.dumps(x) + "\n" for x in lines)
        (folder / f"{task}.jsonl").write_text(text)
    return folder


@pytest.fixture(scope="module")
def flags(tiny_model, tiny_run, data):
    """Full precision and trained codebooks, which are of blocks of 8 with 2 sinks."""
    return [
        *("--model", str(tiny_model), "--data", str(data), "--tasks", *TASKS),
        *("--method", "full", "--method", str(tiny_run / "codebooks")),
        *("--window", "8", "--sinks", "2", "--batch", "4", "--buckets", "1"),
        *("--max-length", "300", "--dtype", "float32"),
    ]


@pytest.fixture(scope="module")
def finished(flags, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "longbench"
    commands.longbench([*flags, "--out", str(out)])
    return out


def answers(out):
    """Every file of answers, by its path in the run's folder."""
    return {str(x.relative_to(out)): x.read_text() for x in sorted(out.rglob("*.jsonl"))}


def ours(out):
    """The folder of the codebooks' answers."""
    (found,) = (x for x in out.iterdir() if x.name.endswith("-w8"))
    return found


@pytest.fixture
def refused(capsys):
    def run(*arguments):
        with pytest.raises(SystemExit) as caught:
            commands.longbench([str(x) for x in arguments])
        assert caught.value.code == 2
        message = capsys.readouterr().err.splitlines()[-1]
        assert message.startswith("error: ")
        return message

    return run


def test_every_answer_is_there_in_the_format_of_longbench(finished, data):
    found = answers(finished)
    assert len(found) == 2 * len(TASKS)
    for name, text in found.items():
        asked = [json.loads(x) for x in (data / Path(name).name).read_text().splitlines()]
        told = {x["_id"]: x for x in map(json.loads, text.splitlines())}
        assert told.keys() == {x["_id"] for x in asked}
        limit = longbench.TASKS[Path(name).stem].max_new_tokens
        for row in asked:
            line = told[row["_id"]]
            for key in ("answers", "all_classes", "length"):
                assert line[key] == row[key]
            assert isinstance(line["pred"], str)
            assert 1 <= line["new_tokens"] <= limit
            assert line["prompt_tokens"] <= 300
    assert found["full/lcc.jsonl"] != (ours(finished) / "lcc.jsonl").read_text()


@pytest.mark.parametrize("coded", [False, True])
def test_answers_are_those_of_plain_generation(finished, tiny_model, tiny_run, data, coded):
    """One prompt at a time, prefilled by `generation.prefill` itself, no batch, no bucket."""
    model = loading.load(tiny_model, dtype="float32")
    books = None
    if coded:
        books = codec.respec(codebook.load(tiny_run / "codebooks"), window=8, sinks=2)
    folder = ours(finished) if coded else finished / "full"
    generate = generation.Generator(
        model.graphdef, model.params, books, eos=model.config.eos_tokens
    )
    rows = longbench.load(str(data), longbench.select(["hotpotqa", "lcc"]))
    for row in rows:
        prompt = longbench.prompt(row, model.tokenizer, 300)
        for state in generate(
            [prompt], max_new_tokens=row.task.max_new_tokens, max_length=300 + 64
        ):
            tokens, count = np.asarray(state.tokens), int(state.count[0])
        lines = (folder / f"{row.task.name}.jsonl").read_text().splitlines()
        (told,) = (x for x in map(json.loads, lines) if x["_id"] == row.id)
        assert told["new_tokens"] == count
        assert told["pred"] == model.tokenizer.decode(tokens[0, :count].tolist())


def test_newline_ends_an_answer_but_not_at_once(tiny_model):
    """SAMSum: the first token is neither newline nor end, whatever the model wants."""
    model = loading.load(tiny_model, dtype="float32")
    (newline,) = model.tokenizer.encode("\n", add_bos=False)
    runner = Runner(model, batch=2, max_new_tokens=128)
    fields = {"context": "", "input": "x"}
    rows = [
        longbench.Row("a", longbench.TASKS[task], fields, ("x",), None, 1)
        for task in ("samsum", "lcc")
    ]
    exact = runner.read([[0, 5, 6], [0, 5, 6]], 128)
    for wanted in (newline, *model.config.eos_tokens):
        logits = exact.logits.at[:, wanted].set(1e9)
        told = runner.answer(type(exact)(logits, exact.cache), rows, None)
        assert told[0][0] not in (newline, *model.config.eos_tokens)
        assert told[1][0] == wanted
        assert newline not in told[0][:-1]


def test_batches_are_alike_and_complete():
    lengths = [100, 900, 300, 1000, 520, 130, 990, 20]
    limits = [32, 32, 64, 512, 64, 32, 512, 64]
    plan = batches(lengths, limits, size=2, buckets=2)
    assert sorted(i for batch in plan for i in batch.rows) == list(range(8))
    assert {batch.length for batch in plan} == {512, 1024}
    for batch in plan:
        assert max(lengths[i] for i in batch.rows) <= batch.length
    assert plan[0].rows == (3, 6)  # the longest answers together
    assert [len(batch.rows) for batch in plan] == [2, 2, 2, 2]
    (one,) = batches([5], [32], size=4, buckets=3)
    assert one.length == 128


def test_table_is_of_the_scores(finished, data):
    report = json.loads((finished / "report.json").read_text())
    rows = {(r["method"], r["dataset"], r["part"]): r for r in report["rows"]}
    method = next(r["method"] for r in report["rows"] if r["method"] != "full")
    for folder, name in (("full", "full"), (ours(finished).name, method)):
        means = []
        for task in TASKS:
            lines = (finished / folder / f"{task}.jsonl").read_text().splitlines()
            told = {x["_id"]: x for x in map(json.loads, lines)}
            kind = longbench.TASKS[task]
            scores = [
                kind.score(told[f"{task}{i}"]["pred"], ["Paragraph 3", "Paragraph 4"], None)
                for i in range(3)
            ]
            row = rows[name, task, ""]
            assert row["value"] == longbench_metrics.percent(scores)
            assert row["n"] == 3
            assert row["low"] <= row["value"] <= row["high"]
            assert row["full_precision"] == rows["full", task, ""]["value"]
            if not kind.extended:
                means.append(np.mean(scores))
        assert rows[name, "average", ""]["value"] == pytest.approx(100 * np.mean(means), abs=0.006)
        assert rows[name, "passage_retrieval_en_e", "0-4k"]["n"] == 1
        assert rows[name, "passage_retrieval_en_e", "4-8k"]["n"] == 2
        assert (name, "passage_retrieval_en_e", "8k+") not in rows
        assert (name, "average_e", "") in rows
    assert rows["full", "average", ""]["bits"] == 16
    assert rows[method, "average", ""]["bits"] == 1
    assert 1 < rows[method, "average", ""]["bits_effective"] < 16
    assert max(rows["full", task, ""]["value"] for task in TASKS) > 0
    written = (finished / "report.md").read_text()
    assert "| passage_retrieval_en_e 4-8k | 2 |" in written
    assert f"| {method} | 8 | 1 | 1 |" in written
    assert (finished / "report.png").stat().st_size > 10_000


def test_interval():
    low, high = interval([[0.0, 1.0] * 50], seed=0)
    assert low == pytest.approx(40.2, abs=2)
    assert high == pytest.approx(59.8, abs=2)
    assert interval([[0.5] * 3], seed=0) == (50, 50)
    wide, narrow = interval([[0.0, 1.0]], seed=0), interval([[0.0, 1.0]] * 9, seed=0)
    assert wide == (0, 100)
    assert 0 < narrow[0] < narrow[1] < 100


def test_interrupted_run_goes_on(finished, flags, tmp_path, monkeypatch, capsys):
    """Stopped twice, the second time while a line is written; nothing is asked twice."""
    out = tmp_path / "run"
    asked = []
    real = Runner.answer

    def answer(self, exact, rows, codec):
        asked.append((codec is None, tuple(row.id for row in rows)))
        if len(asked) in (3, 5):
            raise KeyboardInterrupt
        return real(self, exact, rows, codec)

    monkeypatch.setattr(Runner, "answer", answer)
    for _ in range(2):
        with pytest.raises(SystemExit) as caught:
            commands.longbench([*flags, "--out", str(out)])
        assert caught.value.code == 130
        assert "the same command goes on from here" in capsys.readouterr().err
    lines = {x: x.read_bytes() for x in out.rglob("*.jsonl")}
    cut = max(lines, key=lambda x: len(lines[x]))
    cut.write_bytes(lines[cut][:-20])
    commands.longbench([*flags, "--out", str(out)])
    assert {k: sorted(v.splitlines()) for k, v in answers(out).items()} == {
        k: sorted(v.splitlines()) for k, v in answers(finished).items()
    }
    batches_asked = [x for i, x in enumerate(asked, 1) if i not in (3, 5)]
    assert len(batches_asked) == len(set(batches_asked)) + 1  # that of the line that was cut
    before, report = (json.loads((x / "report.json").read_text())["rows"] for x in (finished, out))
    assert before == report

    count = len(asked)
    commands.longbench([*flags, "--out", str(out)])
    assert len(asked) == count


def test_methods_and_windows_can_be_added(finished, flags, tmp_path, monkeypatch):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    before = answers(out)
    real, asked = Runner.answer, []

    def answer(self, exact, rows, codec):
        asked.append(codec.spec.window)
        return real(self, exact, rows, codec)

    monkeypatch.setattr(Runner, "answer", answer)
    at = flags.index("--window")
    commands.longbench([*flags[: at + 1], "8", "0", *flags[at + 2 :], "--out", str(out)])
    assert set(asked) == {0}
    after = answers(out)
    assert before.items() <= after.items()
    assert len(after) == 3 * len(TASKS)


def test_kept_decoded_it_answers_alike(finished, flags, tmp_path):
    out = tmp_path / "run"
    at = flags.index("full") - 1
    arguments = [*flags[:at], *flags[at + 2 :], "--keep", "decoded", "--buckets", "2"]
    commands.longbench([*arguments, "--out", str(out)])
    for name, text in answers(out).items():
        told, wanted = (
            {x["_id"]: x["pred"] for x in map(json.loads, y.splitlines())}
            for y in (text, answers(finished)[name])
        )
        assert told == wanted


# Bad input


def test_damaged_line_amid_a_file(finished, flags, tmp_path, refused):
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    file = out / "full" / "lcc.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text(lines[0][:-9] + "\n" + "".join(lines[1:]))
    message = refused(*flags, "--out", out)
    assert "lcc.jsonl is damaged" in message
    assert "remove it to do it anew" in message


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--batch", "2"], "holds a run with another --batch; choose another --out"),
        (["--limit", "1"], "holds a run with another --data, --limit; choose"),
        (["--max-length", "200"], "holds a run with another --data, --max-length; choose"),
        (["--tasks", "lcc"], "holds a run with another --data, --tasks; choose"),
        (["--sinks", "4"], "holds a run with another --sinks; choose"),
        (["--keep", "decoded"], "holds a run with another --keep; choose"),
        (["--calibration.tokens", "99"], "holds a run with another --calibration; choose"),
    ],
)
def test_folder_of_another_run(finished, flags, refused, changes, words):
    before = {x: x.read_bytes() for x in finished.rglob("*") if x.is_file()}
    assert words in refused(*flags, "--out", finished, *changes)
    assert before == {x: x.read_bytes() for x in finished.rglob("*") if x.is_file()}


def test_folder_of_another_model(finished, flags, data, tmp_path, refused):
    other = tiny.make_model_folder(tmp_path / "tiny", seed=1)
    arguments = ["--model", other, *flags[2 : flags.index("--method")], "--method", "full"]
    arguments += flags[flags.index("--window") :]
    assert "holds a run with another --model" in refused(*arguments, "--out", finished)


def test_folder_of_other_codebooks(finished, flags, tiny_run, tmp_path, refused):
    """A folder of the same name, trained anew."""
    out, books = tmp_path / "run", tmp_path / "codebooks"
    shutil.copytree(finished, out)
    trained = codebook.load(tiny_run / "codebooks")
    fingerprint = loading.load(flags[1], dtype="float32").fingerprint
    codebook.save(books, codec.respec(trained), model=fingerprint)
    changed = tmp_path / "changed"
    codebook.save(changed, _moved(trained), model=fingerprint)
    name = ours(out).name
    shutil.move(out / name, out / f"{_file_name(books)}-w8")
    arguments = list(flags)
    arguments[flags.index(str(tiny_run / "codebooks"))] = str(books)
    commands.longbench([*arguments, "--out", str(out)])
    shutil.rmtree(books)
    shutil.move(changed, books)
    assert "holds answers over another codec than" in refused(*arguments, "--out", out)


def _moved(books):
    import dataclasses

    return dataclasses.replace(books, key=books.key * 1.5)


def _file_name(path):
    from gsrq_jax.models import fidelity

    return fidelity.file_name(str(path))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["--tasks", "sums"], "unknown task 'sums'; choose from en, zh, e"),
        (["--tasks"], "no task is named"),
        (["--method", "magic"], "unknown method 'magic'; choose full, "),
        (["--method", "gsrq"], "the method 'gsrq' has no such rate"),
        (["--window", "-1"], "--window takes numbers from 0 up"),
        (["--window"], "--window takes numbers from 0 up, at least one"),
        (["--batch", "0"], "--batch must be at least 1, got 0"),
        (["--seed", "-1"], "--seed must be at least 0, got -1"),
        (["--buckets", "0"], "--buckets must be at least 1, got 0"),
        (["--max-length", "1"], "--max-length must be at least 2, got 1"),
        (["--max-length", "480"], "new ones is beyond the context of tiny, 512 tokens; choose a"),
        (["--data", "/no/such"], "there is no folder /no/such"),
        (["--model", "/no/such/model"], "no such folder: /no/such/model"),
    ],
)
def test_unusable_flags(flags, tmp_path, refused, changes, words):
    out = tmp_path / "run"
    assert words in refused(*flags, "--out", out, *changes)
    assert not out.exists()


def test_no_method(flags, tmp_path, refused):
    arguments = flags[: flags.index("--method")]
    assert "no method is named; give at least --method full" in refused(
        *arguments, "--out", tmp_path / "run"
    )


def test_codebooks_of_another_model(flags, tmp_path, refused):
    other = tiny.make_model_folder(tmp_path / "other", seed=1)
    message = refused("--model", other, *flags[2:], "--out", tmp_path / "run")
    assert "were trained for another model" in message
    assert not (tmp_path / "run").exists()


def test_answers_longer_than_the_context(data, tiny_model, tmp_path, refused):
    rows = (data / "lcc.jsonl").read_text().replace("lcc", "gov_report")
    (tmp_path / "gov_report.jsonl").write_text(rows)
    message = refused(
        *("--model", tiny_model, "--data", tmp_path, "--tasks", "gov_report"),
        *("--method", "full", "--out", tmp_path / "run"),
    )
    assert "has no room for a prompt of gov_report and 512 new tokens" in message


def test_folders_of_others(flags, tmp_path, refused):
    (tmp_path / "file").touch()
    assert "file is a file; choose another --out" in refused(*flags, "--out", tmp_path / "file")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("precious")
    message = refused(*flags, "--out", tmp_path / "other")
    assert "holds something else (thesis.tex); choose another --out" in message
    message = refused(*flags, "--out", tmp_path / "file" / "run")
    assert "file is a file; choose another --out" in message


def test_report_of_nothing(tmp_path):
    from gsrq_jax.models import longbench_report

    with pytest.raises(InputError, match="holds no report"):
        longbench_report.render(tmp_path)
