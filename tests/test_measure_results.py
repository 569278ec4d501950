"""The tool that measures everything: jobs in order, each once, again after a failure."""

import dataclasses
import json
import shlex

import pytest
import tyro
from scripts import ROOT, script

from gsrq_jax.models import commands, training
from gsrq_jax.models.runfolder import plain

TRAINED = sorted((ROOT / "results" / "training").glob("*.json"))


tool = script("tools", "measure_results")


def test_every_job_once(tool, tmp_path):
    """Jobs wait for what they need, memory is never given twice, what ended is not run again."""

    def job(name, code, **fields):
        return tool.Job(name, ("-c", f"import os, pathlib; {code}"), **fields)

    note = "print(os.environ['CUDA_VISIBLE_DEVICES'], os.environ['XLA_PYTHON_CLIENT_MEM_FRACTION'])"
    jobs = [
        job("user", f"assert pathlib.Path('made').exists(); {note}", needs=("made",)),
        job("maker", f"pathlib.Path('made').write_text('x'); {note}", keep=("made", "a/b.json")),
        job("broken", "raise SystemExit(3)"),
        job("waits", "pass", needs=("never",)),
    ]
    results = tmp_path / "results"
    failed = tool.run(jobs, tmp_path, results, ["5"], 46.0)  # room for one at a time
    assert failed == ["broken", "waits"]
    assert (results / "a" / "b.json").read_text() == "x"
    assert (tmp_path / "user.log").read_text() == "5 0.500\n"
    mended = [*jobs[:2], job("broken", "print('well')"), dataclasses.replace(jobs[3], needs=())]
    assert tool.run(mended, tmp_path, results, ["5"], 100.0) == []
    assert (tmp_path / "broken.log").read_text() == "well\n"
    assert (tmp_path / "user.log").read_text() == "5 0.500\n"


def test_another_run_has_it(tool, tmp_path):
    """A job that another process runs is left to it."""
    held = tool._locked(tmp_path / "one.lock")
    jobs = [tool.Job("one", ("-c", "pass")), tool.Job("two", ("-c", "pass"))]
    assert tool.run(jobs, tmp_path, tmp_path, ["0"], 100.0) == []
    assert not (tmp_path / "one.done").exists()
    assert (tmp_path / "two.done").exists()
    held.close()


def test_patterns_give_the_order(tool):
    jobs = [tool.Job(name, ()) for name in ("a-1", "b-1", "a-2", "c-1")]
    found = tool.selected(jobs, ["b-*", "*-1", "a-*"])
    assert [job.name for job in found] == ["b-1", "a-1", "c-1", "a-2"]


def test_jobs_of_the_tables(tool):
    """Each has a name of its own; who needs a fit is not the one that makes it."""
    inputs = tool.Inputs("m.gguf", "a.txt", "b.txt", "d")
    every = [job for make in tool.SETS.values() for job in make(inputs)]
    assert len({job.name for job in every}) == len(every)
    made = {job.keep[0] for job in every if job.keep is not None}
    assert all(set(job.needs) <= made for job in tool.trained(inputs) if job.name[-4:] != "gsrq")
    fits = {"work-gsrq/gsrq@2.npz"}
    assert all(set(job.needs) <= made | fits for job in tool.outliers(inputs))
    jobs = list(tool.peers(inputs))
    makers = {job.command[job.command.index("--work") + 1] for job in jobs if not job.needs}
    for job in jobs:
        work = job.command[job.command.index("--work") + 1]
        assert work in makers
        assert all(need.startswith(f"{work}/") for need in job.needs)


def test_the_folder_of_the_jobs(tool, tmp_path):
    """What they read is there by name, with the text of dialogues made of LongBench's rows."""
    bench = tmp_path / "bench"
    bench.mkdir()
    for task, contexts in {"qmsum": ["A: one", "B: two"], "samsum": ["C: three"]}.items():
        rows = [json.dumps({"context": x, "input": "not this"}) for x in contexts]
        (bench / f"{task}.jsonl").write_text("\n".join(rows) + "\n")
    (tmp_path / "m.gguf").write_text("m")
    given = {"model": "m.gguf", "calibrate": "m.gguf", "test": "m.gguf", "longbench": "bench"}
    work = tmp_path / "work"
    for _ in range(2):  # once more changes nothing
        inputs = tool.prepare(work, **{name: str(tmp_path / x) for name, x in given.items()})
        assert inputs == tool.Inputs(**given)
        assert (work / "dialogues.txt").read_text() == "A: one\n\nB: two\n\nC: three"
        assert (work / "m.gguf").read_text() == "m"
        assert (work / "train_codebooks.py").is_file()
    with pytest.raises(SystemExit, match="there is no"):
        tool.prepare(tmp_path / "other", **{name: str(tmp_path / "none") for name in given})


def asked(flags):
    """The config that ``train_codebooks.py`` makes of flags."""
    return tyro.cli(training.TrainConfig, args=flags, default=commands._preset(flags))


def kept(path):
    """The flags of a result file, and its config with the defaults of those that came later."""
    data, default = json.loads(path.read_text()), plain(training.TrainConfig())
    nested = {
        part: default[part] | {k: v for k, v in data["config"][part].items() if v is not None}
        for part in ("fit", "distill")
    }
    return shlex.split(data["command"])[2:], default | data["config"] | nested


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_commands_of_results_mean_what_they_meant(path):
    flags, then = kept(path)
    assert plain(asked(flags)) == then


@pytest.mark.parametrize("path", TRAINED, ids=lambda path: path.stem)
def test_presets_are_what_was_measured(tool, path):
    """Of the model, whose layers have three KV heads, and with the calibration text by its name."""
    _, then = kept(path)
    inputs = tool.Inputs(then["model"], then["text"], then["eval_text"], "")
    (job,) = (job for job in tool.trained(inputs) if job.name == f"train-{path.stem}")
    then["heads"] = training.TrainConfig(heads=then["heads"]).shared_heads(3)
    now = asked(job.command[1:])
    now = plain(dataclasses.replace(now, heads=now.shared_heads(3)))
    for one in (then, now):
        names = one["distill"]["text"]
        one["distill"]["text"] = [one["text"] if x == "source" else x for x in names]
    assert now | {"preset": then["preset"]} == then
