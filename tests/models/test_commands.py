"""The commands: what bad input, a full disk and Ctrl-C look like to the one who typed them."""

import contextlib
import dataclasses
import gc
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from safetensors.numpy import load_file, save_file

from gsrq_jax import codebook
from gsrq_jax.calibration import SampleStore
from gsrq_jax.models import commands, evaluation, generation
from gsrq_jax.spec import ResidualSpec

ROOT = Path(__file__).parents[2]


@pytest.fixture
def refused(capsys):
    """``refused(command, *flags)``: the message, after checks of exit code and stderr."""

    def run(command, *flags, lines=1):
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            command([str(flag) for flag in flags])
        assert caught.value.code == 2
        written = capsys.readouterr().err.splitlines()
        if lines is not None:
            assert len(written) == lines, written
        assert written[-1].startswith("error: ")
        assert "Traceback" not in "".join(written)
        return written[-1]

    return run


@contextlib.contextmanager
def full_disk(limit):
    """No file grows beyond ``limit`` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def edit(folder, name, change):
    """Change one tensor of a model folder."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file(tensors | {name: change(tensors[name])}, file)


def holed(x):
    x = x.copy()
    x.flat[-1] = np.nan
    return x


# Training: what is wrong is said before anything is begun


def no_weights(folder):
    (folder / "model.safetensors").unlink()


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def wrong_shape(folder):
    edit(folder, "model.layers.1.self_attn.v_proj.weight", lambda x: x[:-1])


def unknown_architecture(folder):
    tiny_config = tiny.model_config(architectures=["FalconForCausalLM"])
    (folder / "config.json").write_text(json.dumps(tiny_config))


def no_tokenizer(folder):
    (folder / "tokenizer.json").unlink()


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (no_weights, "has neither model.safetensors nor"),
        (truncated, "model.safetensors cannot be read"),
        (wrong_shape, "v_proj.weight has shape (15, 32) where the config asks for (16, 32)"),
        (unknown_architecture, "architecture FalconForCausalLM is not supported; supported are"),
        (no_tokenizer, "comes without a tokenizer; add its tokenizer.json"),
    ],
)
def test_unusable_models(refused, tiny_model, tmp_path, damage, words):
    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_model, folder)
    damage(folder)
    assert words in refused(commands.train, "--model", folder, "--out", out, *tiny.FLAGS)
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--bits", "0.7"], "0.7 bits cannot be had with 16 codewords on groups of 8 channels"),
        (["--group", "3"], "group 3 does not divide the head size 8; choose a group that does"),
        (["--codewords", "100"], "codewords must be a power of two"),
        (["--window", "-1"], "window must be at least 0"),
        (
            ["--tokens", "64", "--codewords", "64", "--stages", "1"],
            "64 codewords need as many points, got 62; give",
        ),
        (["--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["--fit.warmup", "0"], "warmup must be at least 1, got 0"),
        (["--fit.iterations", "0"], "iterations must be at least 1, got 0"),
        (["--eval-length", "513"], "--eval-length 513 is beyond the context of tiny, 512 tokens"),
        (["--text", "/no/such.txt"], "there is no file /no/such.txt; correct the path"),
        (["--text", os.devnull], "there is no file /dev/null"),
        (["--dataset", "/no/such/data"], "cannot read the data set '/no/such/data'"),
        (["--second-text", "/no/such.txt"], "there is no file /no/such.txt; correct the path"),
        (["--second-text", "python"], "--second-text python is to be another text than the other"),
        (
            ["--distill.steps", "2", "--distill.accumulate", "3"],
            "--distill.accumulate must be a divisor of --distill.batch (4), got 3",
        ),
        (["--model", "/no/such/model"], "no such folder: /no/such/model; give a folder"),
    ],
)
def test_unusable_flags(refused, tiny_model, tmp_path, flags, words):
    out = tmp_path / "run"
    args = ("--model", tiny_model, "--out", out, *tiny.FLAGS, *flags)
    assert words in refused(commands.train, *args)
    assert not out.exists()


def test_empty_text(refused, tiny_model, tmp_path):
    (tmp_path / "empty.txt").touch()
    args = ("--model", tiny_model, "--text", tmp_path / "empty.txt", "--out", tmp_path / "run")
    message = refused(commands.train, *args, *tiny.FLAGS)
    assert "empty.txt' has 0 tokens, too few for one sequence of 64" in message
    assert not (tmp_path / "run").exists()


def test_flags_that_do_not_exist(capsys):
    for command, prompt in ((commands.train, []), (commands.generate, ["A prompt"])):
        with pytest.raises(SystemExit) as caught:
            command([*prompt, "--no-such-flag", "1"])
        assert caught.value.code == 2
        assert "--no-such-flag" in capsys.readouterr().err


# Training: folders


def test_folders_of_others(refused, tiny_model, tmp_path):
    args = ("--model", tiny_model, *tiny.FLAGS, "--out")
    (tmp_path / "file").touch()
    assert "file is a file; choose another --out" in refused(
        commands.train, *args, tmp_path / "file"
    )
    other = tmp_path / "other"
    other.mkdir()
    (other / "thesis.tex").write_text("precious")
    words = f"{other} exists and holds something else (thesis.tex); choose another --out"
    assert words in refused(commands.train, *args, other)
    (other / "run.json").write_text("not ours")
    assert "holds something else (run.json)" in refused(commands.train, *args, other)
    (other / "run.json").write_text('{"speed": 3}')
    assert "holds something else (run.json)" in refused(commands.train, *args, other)
    assert {x.name for x in other.iterdir()} == {"thesis.tex", "run.json"}


def test_folder_of_another_run(refused, tiny_run, tiny_model):
    before = {x: x.read_bytes() for x in tiny_run.rglob("*") if x.is_file()}
    args = ("--model", tiny_model, "--out", tiny_run, *tiny.FLAGS)
    message = refused(commands.train, *args, "--bits", "0.5", "--eval-sequences", "1")
    assert "holds a run with another --bits, --eval-sequences; choose another --out" in message
    assert before == {x: x.read_bytes() for x in tiny_run.rglob("*") if x.is_file()}


def test_folder_of_another_kind_of_run(refused, tiny_run, tiny_model):
    text = tiny_model / "config.json"
    flags = ("--model", tiny_model, "--text", text, "--lengths", "500", "--keys", "1")
    message = refused(commands.measure_needle, *flags, "--out", tiny_run)
    assert f"{tiny_run} holds a run of another kind (train); choose another --out" in message


def test_finished_run_without_its_codebooks(refused, tiny_run, tiny_model, tmp_path):
    out = tmp_path / "run"
    shutil.copytree(tiny_run, out)
    shutil.rmtree(out / "codebooks")
    asked = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(asked | {"out": str(out)}))
    args = ("--model", tiny_model, "--out", out, *tiny.FLAGS)
    assert "finished run whose codebooks are gone" in refused(commands.train, *args)


def test_folder_that_cannot_be_made(refused, tiny_model, tmp_path):
    (tmp_path / "file").touch()
    args = ("--model", tiny_model, *tiny.FLAGS, "--out")
    message = refused(commands.train, *args, tmp_path / "file" / "below" / "run")
    assert message == f"error: {tmp_path / 'file'} is a file; choose another --out"
    message = refused(commands.train, *args, "/proc/run")
    assert "cannot write to /proc/run (No such file or directory); make room or choose" in message


# Training: trouble on the way


def test_weights_that_are_not_finite(refused, tiny_model, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_model, folder)
    edit(folder, "model.layers.1.self_attn.k_proj.weight", holed)
    args = ("--model", folder, "--out", out, *tiny.FLAGS)
    message = refused(commands.train, *args, lines=None)
    assert "gave a k that is not finite in sequence 0; check the weights" in message
    assert not (out / "codebooks").exists()
    assert not list((out / "work").glob("layer-*"))
    # With other weights that is another run.
    shutil.copy(tiny_model / "model.safetensors", folder)
    words = f"the model changed since the run in {out} began; choose another --out, or remove it"
    assert words in refused(commands.train, *args)


def test_predictions_that_are_not_finite(refused, tiny_model, tmp_path):
    folder, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(tiny_model, folder)
    edit(folder, "lm_head.weight", holed)
    args = ("--model", folder, "--out", out, *tiny.FLAGS, "--weights", "none")
    message = refused(commands.train, *args, lines=None)
    assert "the predictions of model are not finite; check its weights" in message
    assert not (out / "report.json").exists()


def test_text_that_changed_under_a_run(refused, tiny_model, tmp_path, monkeypatch):
    file, out = tmp_path / "text.txt", tmp_path / "run"
    file.write_text("a day " * 200)
    args = ("--model", tiny_model, "--text", file, "--out", out, *tiny.FLAGS)

    def interrupted(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(SampleStore, "put", interrupted)
    with pytest.raises(SystemExit) as caught:
        commands.train([str(x) for x in args])
    assert caught.value.code == 130
    file.write_text("a dog " * 200)
    assert "the text changed since the run" in refused(commands.train, *args)


def test_full_disk_and_room_again(refused, tiny_run, tiny_model, tmp_path, monkeypatch):
    out = tmp_path / "run"
    args = ("--model", tiny_model, "--out", out, *tiny.FLAGS)
    real_save, real_divergence = codebook.save, evaluation.divergence

    with full_disk(100):
        message = refused(commands.train, *args, lines=None)
    assert f"cannot write to {out} (File too large); make room or" in message
    assert not (out / "run.json").exists()

    with full_disk(8_000):
        message = refused(commands.train, *args, lines=None)
    assert f"cannot write to {out} (File too large); make room or" in message
    assert json.loads((out / "work/samples/progress.json").read_text())["done"] < 8

    def save(*arguments, **options):
        with full_disk(200):
            real_save(*arguments, **options)

    monkeypatch.setattr(codebook, "save", save)
    message = refused(commands.train, *args, lines=None)
    assert f"could not write the codebooks to {out / 'codebooks'} (" in message
    assert {x.name for x in out.iterdir()} == {"run.json", "work"}

    # Codebooks are there, and the disk is full when they are written again.
    def divergence(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(codebook, "save", real_save)
    monkeypatch.setattr(evaluation, "divergence", divergence)
    with pytest.raises(SystemExit):
        commands.train([str(x) for x in args])
    monkeypatch.setattr(evaluation, "divergence", real_divergence)
    monkeypatch.setattr(codebook, "save", save)
    refused(commands.train, *args, lines=None)
    books = codebook.load(out / "codebooks")

    monkeypatch.setattr(codebook, "save", real_save)
    commands.train([str(x) for x in args])
    wanted = codebook.load(tiny_run / "codebooks")
    for got in (books, codebook.load(out / "codebooks")):
        for name in ("key", "value", "key_mean"):
            np.testing.assert_array_equal(getattr(got, name), getattr(wanted, name))


def test_script_itself():
    """Nothing but its exit code, stdout and stderr is known here."""
    command = [sys.executable, ROOT / "train_codebooks.py", "--model", "/no/such/model"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT / "tests", timeout=120)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: no such folder: /no/such/model; ")
    assert done.stderr.count("\n") == 1
    assert not (ROOT / "tests" / "runs").exists()


def test_interrupt_of_the_script_itself(tiny_model, tmp_path):
    """Amid the compilation for the first sequence, where JAX is least ready for it."""
    # Background jobs of some shells ignore Ctrl-C, and so would a child of this test.
    code = (
        "import runpy, signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler); "
        "sys.argv = sys.argv[1:]; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    flags = ("--model", tiny_model, *tiny.FLAGS, "--out", tmp_path / "run")
    progress = tmp_path / "run/work/samples/progress.json"
    with subprocess.Popen(
        [sys.executable, "-c", code, ROOT / "train_codebooks.py", *flags],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"XLA_FLAGS": ""},  # the user's compiler: these tests' is too soon done
    ) as run:
        for _ in range(600):
            if progress.exists() or run.poll() is not None:
                break
            time.sleep(0.1)
        time.sleep(0.4)
        run.send_signal(signal.SIGINT)
        _, written = run.communicate(timeout=120)
    assert run.returncode == 130, written
    assert written.endswith("interrupted; the same command goes on from here\n")
    assert json.loads(progress.read_text())["done"] < 8


@pytest.mark.parametrize("where", ["of the collection", "of a weak reference"])
def test_an_interrupt_in_a_callback(where, capsys):
    """Python would drop it there: "Exception ignored in"."""

    @dataclasses.dataclass(frozen=True)
    class Nothing:
        pass

    def callback(*_):
        if not reached:
            reached.append(where)
            signal.raise_signal(signal.SIGINT)

    def action(config):
        if where == "of the collection":
            gc.callbacks.append(callback)
            gc.collect(0)  # soon done: a signal just before a system call would not end that
        else:
            thing = Nothing()
            reference = weakref.ref(thing, callback)
            del thing
            assert reference() is None
        time.sleep(10)

    reached: list[str] = []
    began = time.monotonic()
    hook, before = sys.unraisablehook, signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(SystemExit, match="130"):
            commands.run(Nothing, action, [])
    finally:
        signal.signal(signal.SIGINT, before)
        if callback in gc.callbacks:
            gc.callbacks.remove(callback)
    assert reached
    assert time.monotonic() - began < 5  # and not after what it interrupts
    assert sys.unraisablehook is hook
    assert capsys.readouterr().err == "\ninterrupted\n"


# Generation


def test_generation_with_both_caches(tiny_run, tiny_model, capsys):
    args = ["--model", str(tiny_model), "--codebooks", str(tiny_run / "codebooks"), "--compare"]
    commands.generate([*args, "--max-new-tokens", "24", "A prompt of some length"])
    full, ours = capsys.readouterr().out.split("--- ")[1:]
    assert full.startswith("full precision\n")
    assert ours.startswith("1 bit, 2 stages × 16 codewords, head 8, frame block")
    sizes = [int(x.split(" bytes for")[0].split(" ")[-1].replace(",", "")) for x in (full, ours)]
    assert sizes[0] > sizes[1] > 0
    assert "[24 + " in full  # BOS and 23 bytes
    assert "[24 + " in ours


def test_generation_with_unrolled_layers(tiny_run, tiny_model, capsys, refused):
    args = ["--model", str(tiny_model), "--codebooks", str(tiny_run / "codebooks")]
    args += ["--max-new-tokens", "8", "A prompt of some length"]
    texts = []
    for more in ([], ["--unroll"]):
        commands.generate([*args, *more])
        texts.append(capsys.readouterr().out.partition("\n[")[0])
    assert texts[0] == texts[1]
    assert "--unroll is for one device" in refused(
        commands.generate, *args, "--unroll", "--mesh", "2", "1"
    )


def test_generation_in_layouts_of_kernels(tiny_run, tiny_model, tmp_path, capsys, refused):
    """Codebooks that a layout cannot hold are refused, others need no training for it."""
    flags = ["--layout", "tiles", "--max-new-tokens", "3", "x" * 200]
    args = ["--model", tiny_model, "--codebooks", tiny_run / "codebooks", *flags]
    assert "takes 0 as block modulo 128 tokens, got 8" in refused(commands.generate, *args)
    books = codebook.load(tiny_run / "codebooks")
    spec = dataclasses.replace(books.spec, block=128)
    metadata = codebook.read_metadata(tiny_run / "codebooks")
    coarse = dataclasses.replace(books, spec=spec)
    codebook.save(tmp_path / "coarse", coarse, model=metadata["model"])
    args[3] = tmp_path / "coarse"
    commands.generate([str(x) for x in args])
    assert "blocks of 128, window 8, sinks 2, codes in tiles" in capsys.readouterr().out
    args[5] = "planes"
    said = refused(commands.generate, *args)
    assert "takes 2 as codewords of a stage of keys, got 16; use layout 'packed' or other" in said

    code = ResidualSpec(spec.head_dim, spec.head_dim, 32, 2)
    words = jnp.ones((books.layers, books.kv_heads, *code.codebook_shape))
    spec = dataclasses.replace(spec, key=code, value=code, block=32)
    of_bits = dataclasses.replace(books, key=words, value=words, spec=spec)
    codebook.save(tmp_path / "bits", of_bits, model=metadata["model"])
    args[3] = tmp_path / "bits"
    commands.generate([str(x) for x in args])
    assert "blocks of 32, window 8, sinks 2, codes in planes" in capsys.readouterr().out


def test_generation_on_a_mesh_with_heads_that_share_codes(
    tiny_run, tiny_model, tmp_path, capsys, refused
):
    """Heads that share codes stay together; what a mesh would have to divide is said."""
    books = codebook.load(tiny_run / "codebooks")
    key, value = (dataclasses.replace(x, heads=2) for x in (books.spec.key, books.spec.value))
    shared = dataclasses.replace(books, spec=dataclasses.replace(books.spec, key=key, value=value))
    metadata = codebook.read_metadata(tiny_run / "codebooks")
    codebook.save(tmp_path / "shared", shared, model=metadata["model"])
    args = ["--model", str(tiny_model), "--codebooks", str(tmp_path / "shared")]
    args += ["--max-new-tokens", "8", "A prompt of some length", "--mesh"]
    said = refused(commands.generate, *args, "1", "2")
    assert "2 devices cannot share 2 KV heads, of which 2 share codes, evenly" in said
    texts = []
    for mesh in (["2", "1"], ["1", "1"]):
        commands.generate([*args, *mesh])
        texts.append(capsys.readouterr().out.partition("\n[")[0])
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--temperature", "-1"], "temperature must be"),
        (["--top-p", "0"], "top_p must be above 0"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be at least 1, got 0"),
        (["--compare"], "--compare needs --codebooks"),
        (["--layout", "tiles"], "--layout needs --codebooks"),
        (["--max-length", "16"], "does not fit into a cache of 16; shorten it or ask for a longer"),
        (["--max-new-tokens", "600"], "beyond the model's context of 512; shorten it or ask"),
        (["--codebooks", "/no/such/books"], "there are no codebooks at /no/such/books; train them"),
        (["--codebooks", os.path.dirname(__file__)], "is not a codebook checkpoint or is damaged"),
        (["--chat", "yes"], "no chat template; give a plain prompt"),
        (["--seed", "-1"], "--seed must be from 0 to 4294967295, got -1"),
        (["--seed", "4294967296"], "--seed must be from 0 to 4294967295, got 4294967296"),
    ],
)
def test_unusable_flags_of_generation(refused, tiny_model, flags, words):
    assert words in refused(commands.generate, "--model", tiny_model, *flags, "A prompt")


def test_interrupt_of_generation(tiny_model, monkeypatch, capsys):
    def interrupted(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(generation.Generator, "__call__", interrupted)
    with pytest.raises(SystemExit) as caught:
        commands.generate(["--model", str(tiny_model), "A prompt"])
    assert caught.value.code == 130
    assert capsys.readouterr().err == "\ninterrupted\n"


def test_prompt_beyond_the_context(refused, tiny_model):
    message = refused(commands.generate, "--model", tiny_model, "x" * 500)
    assert "a prompt of 501 tokens with 128 new ones is beyond the model's context" in message


def test_codebooks_of_another_model(refused, tiny_run, tmp_path):
    other = tiny.make_model_folder(tmp_path / "other", seed=1)
    books = tiny_run / "codebooks"
    message = refused(commands.generate, "--model", other, "--codebooks", books, "A prompt")
    assert f"the codebooks in {books} were trained for another model: weights is" in message


def test_folder_of_a_run_for_its_codebooks(refused, tiny_run, tiny_model):
    message = refused(commands.generate, "--model", tiny_model, "--codebooks", tiny_run, "A prompt")
    assert f"{tiny_run} is the folder of a run; its codebooks are {tiny_run}/codebooks" in message
    file = tiny_run / "report.json"
    message = refused(commands.generate, "--model", tiny_model, "--codebooks", file, "A prompt")
    assert "damaged (Could not recognize the checkpoint at" in message
    assert len(message) < 300 + 3 * len(str(file))


def test_help_names_the_command(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["/somewhere/bin/gsrq-generate"])
    with pytest.raises(SystemExit):
        commands.generate(["--help"])
    assert capsys.readouterr().out.startswith("usage: gsrq-generate [-h]")
