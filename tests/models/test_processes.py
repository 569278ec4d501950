"""Several processes of one run, on loopback."""

import json
import os
import pathlib
import re
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
import tiny

from gsrq_jax import calibration, codebook
from gsrq_jax.errors import InputError
from gsrq_jax.models import commands, distillation, processes, training

WORKER = pathlib.Path(__file__).with_name("process_worker.py")


def run(count, what, folder, *flags, devices=8):
    """Exit codes and stderr of so many processes, which run to their ends."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    started = [
        subprocess.Popen(
            [sys.executable, WORKER, what, folder, *flags],
            env=os.environ
            | {
                "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}"),
                "GSRQ_PROCESS_TIMEOUT": "10",
            },
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for index in range(count)
    ]
    ends = [process.communicate(timeout=300)[1] for process in started]
    return [process.returncode for process in started], ends


def test_lost_resumed_and_equal(tiny_model, tiny_run, tmp_path):
    """Four processes lose one after the first layer; two go on, to one process's codebooks."""
    out = tmp_path / "run"
    flags = ("--model", tiny_model, "--out", out, *tiny.FLAGS)
    codes, said = run(4, "die", tmp_path, *flags)
    assert codes == [1, 1, 1, -9], said
    for text in said[:3]:
        assert "error: process 3 of 4 is lost: nothing was heard of it for 10 s" in text
    assert (out / "work" / "layer-000.npz").exists()
    assert not (out / "work" / "layer-001.npz").exists()

    codes, said = run(2, "train", tmp_path, *flags)
    assert codes == [2, 2], said
    assert "error: process 1 stopped: the second one has had enough" in said[0]
    assert "error: the second one has had enough" in said[1]
    assert {x.name for x in out.iterdir()} == {"run.json", "codebooks", "report.json"}

    found, one = (codebook.load(x / "codebooks") for x in (out, tiny_run))
    assert found.spec == one.spec
    # Many vectors of the first layer are equal, as they depend on the token alone, and so become
    # codewords; rounding decides which of two equal ones goes. Its means are left to compare, and
    # all of the second layer. (tests/gsrq_jax/test_sharded.py has vectors without equals.)
    np.testing.assert_allclose(found.key_mean, one.key_mean, rtol=1e-4, atol=1e-5)
    for name in ("key", "value"):
        a, b = (np.asarray(getattr(books, name)[1], np.float32) for books in (found, one))
        np.testing.assert_allclose(a, b, rtol=0.01, atol=1e-3)  # stored in bfloat16
    of_found, of_one = (
        [
            row["distortion"]
            for row in json.loads((folder / "report.json").read_text())["fit"]
            if row["layer"] == 1
        ]
        for folder in (out, tiny_run)
    )
    np.testing.assert_allclose(of_found, of_one, rtol=1e-3)

    refused = [json.loads((tmp_path / f"refused-{i}.json").read_text()) for i in range(2)]
    for said in refused:
        for expected, found in zip(
            (
                r"process 1 has another seed than process 0 \(1, not 0\); start all",
                r"process 1 has another jax than process 0 \(0.11, not 0.10\); start all",
                r"process 1 does not see what process 0 wrote to .*only-.; give a folder on a disk",
                "2 processes cannot share 9 sequences evenly; choose --tokens so",
                "2 processes cannot share 1 sequences evenly; choose --tokens so",
                "a mesh of 5 × 1 does not fit 16 devices",
                "the heads of a token stay in one process, so 2 must divide its 1 devices; choose",
                "2 devices cannot share 7 samples evenly; choose --tokens so",
                ".*No such file",
            ),
            said,
            strict=True,
        ):
            assert re.match(expected, found), found


def test_text_of_two_processes_is_that_of_one(tiny_model, tiny_run, tmp_path, capsys):
    """On a mesh of both, two devices each, a prompt in chunks."""
    flags = ["--model", str(tiny_model), "--codebooks", str(tiny_run / "codebooks")]
    flags += ["--max-new-tokens", "40", "--chunk", "16", "the past is " + "long " * 12]
    commands.generate(flags)
    want = capsys.readouterr().out
    assert " tokens/s, cache " in want
    codes, said = run(2, "write", tmp_path, *flags, "--mesh", "2", "2", devices=2)
    assert codes == [0, 0], said
    found, nothing = ((tmp_path / f"written-{i}").read_text() for i in range(2))
    assert not nothing

    def text(said):
        return re.sub(r"^\[.*\]$", "", said, flags=re.MULTILINE)

    assert text(found) == text(want)


def test_two_processes_sample_and_distil_as_one(tiny_model, tiny_run, tmp_path, monkeypatch):
    """On text that the model writes, from the same codebooks; a step's sequences are shared."""
    out, books = tmp_path / "run", codebook.load(tiny_run / "codebooks")
    flags = ["--model", str(tiny_model), "--out", str(out), *tiny.FLAGS, "--tokens", "256"]
    flags += ["--distill.text", "sampled", "--distill.tokens", "192", "--distill.steps", "2"]
    flags += ["--distill.check-every", "1", "--distill.batch", "2"]

    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "capture", lambda *_, **__: None)
    monkeypatch.setattr(training, "_learn", lambda *_: (books, None, None))
    monkeypatch.setattr(codebook, "save", stopped)
    with pytest.raises(SystemExit, match="130"):
        commands.train(flags)
    work, one = out / "work", tmp_path / "one"
    one.mkdir()
    for name in ("distil-000.npz", "distill.npz"):
        (work / name).rename(one / name)
    codes, said = run(2, "distil", tiny_run / "codebooks", *flags, devices=1)
    assert codes == [130, 130], said
    for name, tolerance in (("distil-000.npz", 0), ("distill.npz", 1e-3)):
        *_, a = calibration.load_leaves(one / name)
        *_, b = calibration.load_leaves(work / name)
        np.testing.assert_allclose(b, a, rtol=tolerance)
    assert b.shape == (3, 3)  # step, divergence of its sequences and on held-out ones


def test_sequences_of_a_step_that_processes_cannot_share(monkeypatch):
    config = distillation.DistillConfig(steps=1, batch=6, accumulate=2)
    devices = jax.devices()[:4]
    assert distillation.sharing(config, devices) == devices[:1]
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    assert distillation.sharing(config, devices[:3]) == devices[:3]
    with pytest.raises(InputError, match="4 devices of 2 processes cannot share 3 sequences of a"):
        distillation.sharing(config, devices)


def test_a_process_of_its_own():
    assert processes.cluster({}) is None
    assert processes.cluster({"SLURM_NTASKS": "1"}) is None
    assert processes.exchange([1, "a"]) == [[1, "a"]]
    with pytest.raises(OSError, match="full"):
        processes.once(lambda: (_ for _ in ()).throw(OSError("full")))


def test_what_environments_describe():
    slurm = {"SLURM_NTASKS": "4", "SLURM_STEP_NODELIST": "a[0-3]"}
    address = {"JAX_COORDINATOR_ADDRESS": "a:1234"}
    assert processes.cluster(slurm) == {}  # JAX knows
    assert processes.cluster(slurm | address) == {"coordinator_address": "a:1234"}
    own = address | {"JAX_NUM_PROCESSES": "4", "JAX_PROCESS_ID": "3"}
    assert processes.cluster(own) == {
        "coordinator_address": "a:1234",
        "num_processes": 4,
        "process_id": 3,
    }


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, "JAX_NUM_PROCESSES is not; set it to a number"),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "two"},
            "JAX_NUM_PROCESSES is two; set it to a number",
        ),
        (
            {
                "JAX_COORDINATOR_ADDRESS": "a",
                "JAX_NUM_PROCESSES": "2",
                "JAX_PROCESS_ID": "0",
            },
            "a has no port; give host:port",
        ),
        ({"JAX_PROCESS_ID": "0"}, "but JAX_COORDINATOR_ADDRESS is not"),
    ],
)
def test_environments_that_lack_something(environment, words):
    with pytest.raises(InputError, match=words):
        processes.cluster(environment)
