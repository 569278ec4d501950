"""Methods by name, and the command that measures them, on a tiny random model."""

import dataclasses
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from gsrq_jax import codebook
from gsrq_jax.baselines import vqllm
from gsrq_jax.cache import append, init_cache, materialize
from gsrq_jax.codec import decoded
from gsrq_jax.errors import InputError
from gsrq_jax.models import commands, fidelity, loading, methods
from gsrq_jax.models.methods import Calibration

CALIBRATION = Calibration(tokens=1280, length=256)
NAMES = (
    "full",
    "int8",
    "int4",
    "kivi2",
    "kivi1",
    "vqllm@0.5",
    "vqllm@0.25",
    "cq@1",
    "cq-unweighted@1",
    "kmeans@0.25",
    "spherical@0.25",
    "gsrq@0.5",
    "gsrq@0.25",
)


@pytest.fixture(scope="module", autouse=True)
def _quick():
    """Fewer passes than theirs; what methods learn is not tested here."""
    few = vqllm.FitOptions(steps=4, sequences=1, length=256)
    quick = {
        "vqllm": {"fit": functools.partial(vqllm.fit, options=few)},
        "cq": {"fit": functools.partial(methods._coupled, weighted=True, iterations=3)},
        "cq-unweighted": {"fit": functools.partial(methods._coupled, weighted=False, iterations=3)},
    }
    for name in ("kmeans", "spherical", "gsrq"):
        options = methods.FAMILIES[name].options
        quick[name] = {"options": dataclasses.replace(options, iterations=3, warmup=1)}
    with pytest.MonkeyPatch.context() as patch:
        for name, change in quick.items():
            family = dataclasses.replace(methods.FAMILIES[name], **change)
            patch.setitem(methods.FAMILIES, name, family)
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tiny.make_model_folder(tmp_path_factory.mktemp("model"), head_dim=32)


@pytest.fixture(scope="module")
def model(folder):
    return loading.load(str(folder))


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    return tmp_path_factory.mktemp("work")


@pytest.fixture(scope="module")
def codecs(model, work):
    return methods.resolve(NAMES, model, CALIBRATION, work, window=8, sinks=2)


def test_all_are_there_and_their_bits_are_counted(codecs):
    assert tuple(codecs) == NAMES
    assert codecs["full"] is None
    got = {name: (c.spec.bits, c.spec.stored_bits) for name, c in codecs.items() if c}
    assert got == {
        "int8": (8, 9),
        "int4": (4, 5),
        "kivi2": (2, 3),
        "kivi1": (1, 2),
        "vqllm@0.5": (0.5, 1),
        "vqllm@0.25": (0.25, 0.75),
        "cq@1": (1, 1),
        "cq-unweighted@1": (1, 1),
        "kmeans@0.25": (0.25, 0.25),
        "spherical@0.25": (0.25, 0.25),
        "gsrq@0.5": (0.5, 0.5),
        "gsrq@0.25": (0.25, 0.25),
    }
    assert {(c.spec.window, c.spec.sinks) for c in codecs.values() if c} == {(8, 2)}


@pytest.mark.parametrize("name", NAMES[1:])
def test_in_the_real_cache(codecs, name, model):
    """What the cache gives back is what the codec makes of each block, and `decoded` the same."""
    layer = jax.tree.map(lambda x: x[1], codecs[name])
    spec, tokens = layer.spec, 2 + 8 + 2 * 128 + 3
    rng = np.random.default_rng(0)
    k, v = (jnp.asarray(rng.normal(size=(2, tokens, 2, 32)), jnp.float32) for _ in "kv")
    count = jnp.array([tokens, 2 + 8 + 128])
    padded = jnp.arange(tokens)[:, None, None] >= count[:, None, None, None]
    k, v = (jnp.where(padded, jnp.nan, x) for x in (k, v))

    def held(codec):
        cache = init_cache(
            codec.spec, batch=2, kv_heads=2, head_dim=32, max_length=tokens, dtype=jnp.float32
        )
        return materialize(append(cache, k, v, codec, count), codec)

    keys, values, there = jax.jit(held)(layer)
    assert there.sum(axis=1).tolist() == count.tolist()
    at = spec.sinks + jnp.arange(128)
    block = slice(spec.sinks, spec.sinks + 128)
    codes = layer.encode(k[:, block], v[:, block], jnp.broadcast_to(at, (2, 128)))
    shapes = jax.tree.map(lambda x: (x.shape[2:], x.dtype), codes)
    assert shapes == jax.tree.map(lambda s: (s.shape, s.dtype), spec.code_shapes())
    old = layer.decode(*codes, jnp.broadcast_to(at, (2, 128)))
    first = slice(spec.sinks + spec.ring, spec.sinks + spec.ring + 128)
    for got, want in zip((keys, values), old, strict=True):
        np.testing.assert_allclose(got[:, first], want, atol=1e-4)
    *kept, still_there = jax.jit(held)(decoded(layer))
    np.testing.assert_array_equal(still_there, there)
    for got, want in zip(kept, (keys, values), strict=True):
        np.testing.assert_allclose(got[there], want[there], atol=1e-4)


@pytest.mark.parametrize(("high", "low"), [("gsrq@0.5", "gsrq@0.25"), ("vqllm@0.5", "vqllm@0.25")])
def test_a_lower_rate_is_the_same_alone(codecs, model, high, low):
    """One fit serves all rates of a family: the result does not depend on the others."""
    alone = methods.resolve([low], model, CALIBRATION, window=8, sinks=2)[low]
    assert alone.spec == codecs[low].spec
    for got, want in zip(jax.tree.leaves(alone), jax.tree.leaves(codecs[low]), strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (got, want)), atol=2e-2)
    assert codecs[high].key.shape[-3] == 2 * alone.key.shape[-3]


def test_a_beam_is_another_encoder_for_the_same_codebooks(codecs, model, work, monkeypatch):
    monkeypatch.setattr(
        methods.training, "key_value_samples", pytest.fail
    )  # nothing is fitted anew
    names = ["gsrq@0.25+beam8", "gsrq@0.5", "kmeans@0.25+beam2"]
    found = methods.resolve(names, model, CALIBRATION, work, window=8, sinks=2)
    assert tuple(found) == tuple(names)
    assert [c.spec.beam for c in found.values()] == [8, 1, 2]
    for name, ours in found.items():
        base = codecs[name.partition("+")[0]]
        assert dataclasses.replace(ours.spec, beam=1) == base.spec
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(ours), jax.tree.leaves(base))
    assert methods.title("gsrq@0.25+beam8") == "GSRQ, beam 8"


OPTIONS = {
    "gsrq@0.25+k16+pre+uncentred": {"codewords": (16, 16), "frame": "pre", "block": 128},
    "gsrq@0.5+k16+pre+uncentred": {"codewords": (16, 16), "frame": "pre", "block": 128},
    "gsrq@0.5+block64+refits1+beam2+vk16": {"codewords": (256, 16), "frame": "block", "block": 64},
    "gsrq@0.25+kqueries+voutput+power1": {"codewords": (256, 256), "frame": "block", "block": 128},
}


def test_options(model, work):
    """Each is a fit of its own that has what was asked for; rates share those that are nested."""
    found = methods.resolve(OPTIONS, model, CALIBRATION, work, window=8, sinks=2)
    for name, want in OPTIONS.items():
        spec = found[name].spec
        codewords = spec.key.codewords, spec.value.codewords
        assert dict(codewords=codewords, frame=spec.frame, block=spec.block) == want
        assert spec.bits == float(name.partition("@")[2].partition("+")[0])
    low, high, refitted, metrics = found.values()
    np.testing.assert_array_equal(low.key, high.key[..., :2, :, :])
    assert not low.key_mean.any()
    assert high.key_metric is None
    assert refitted.spec.beam == 2
    assert refitted.key_mean.any()
    assert metrics.key_metric.shape == metrics.value_metric.shape == (2, 2, 32, 32)
    off = metrics.key_metric * (1 - np.eye(32))
    assert abs(off).max() < 1e-6  # of the queries: pairs alone
    assert methods.title(list(OPTIONS)[2]) == "GSRQ, block64, refits1, vk16, beam 2"


def test_two_codewords_a_stage_are_fitted_for_each_rate_and_beam(model, work):
    names = ["gsrq@1+k2+beam2", "gsrq@0.5+k2+beam2", "gsrq@0.5+k2"]
    books = methods.resolve(names, model, CALIBRATION, work, window=8, sinks=2)
    whole, half, greedy = (np.asarray(books[name].key, np.float32) for name in names)
    assert whole.shape[-3] == 2 * half.shape[-3]
    assert np.abs(whole[..., : half.shape[-3], :, :] - half).max() > 0.01
    assert np.abs(greedy - half).max() > 1e-3


def test_fits_are_kept(codecs, model, work, monkeypatch):
    monkeypatch.setattr(methods.training, "key_value_samples", pytest.fail)
    again = methods.resolve(["gsrq@0.5"], model, CALIBRATION, work, window=8, sinks=2)
    for got, want in zip(
        jax.tree.leaves(again["gsrq@0.5"]), jax.tree.leaves(codecs["gsrq@0.5"]), strict=True
    ):
        np.testing.assert_array_equal(np.asarray(got), np.asarray(want))
    other = dataclasses.replace(CALIBRATION, seed=1)
    with pytest.raises(
        InputError, match="a run with another --calibration; choose another --work, or remove it"
    ):
        methods.resolve(["gsrq@0.5"], model, other, work, window=8, sinks=2)


def test_a_folder_of_codebooks(codecs, model, tmp_path):
    codebook.save(tmp_path / "books", codecs["gsrq@0.5"], model=model.fingerprint)
    name = str(tmp_path / "books")
    assert methods.title(name) == "books"
    assert methods.resolve([name], model)[name].spec == codecs["gsrq@0.5"].spec
    beam = methods.resolve([f"{name}+beam4"], model)[f"{name}+beam4"]
    assert beam.spec == dataclasses.replace(codecs["gsrq@0.5"].spec, beam=4)
    assert methods.title(f"{name}+beam4") == "books, beam 4"
    outliers = methods.resolve([f"{name}+beam2+outliers5"], model)
    spec = dataclasses.replace(codecs["gsrq@0.5"].spec, beam=2, outliers=5)
    assert outliers[f"{name}+beam2+outliers5"].spec == spec
    assert methods.title("gsrq@1+outliers5") == "GSRQ, outliers 5"
    with pytest.raises(InputError, match=r"no option \+k16; there are \+beamN, \+outliersN$"):
        methods.resolve([f"{name}+k16"], model)
    (tmp_path / "run+1" / "codebooks").parent.mkdir()
    codebook.save(tmp_path / "run+1" / "codebooks", codecs["gsrq@0.5"], model=model.fingerprint)
    assert methods.title(str(tmp_path / "run+1" / "codebooks+beam4")) == "run+1, beam 4"
    wide = methods.resolve([name], model, window=64)[name]
    assert (wide.spec.window, wide.spec.sinks) == (64, 2)
    codebook.save(tmp_path / "others", codecs["gsrq@0.5"], model={"name": "another"})
    with pytest.raises(InputError, match="another"):
        methods.resolve([str(tmp_path / "others")], model)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gzip", "unknown method 'gzip'; choose full, int8"),
        ("gsrq", "write gsrq@1 for one bit"),
        ("gsrq@one", "write gsrq@1 for one bit"),
        ("kivi2@3", "kivi2 has 2 bits"),
        ("gsrq@0.3", "0.3 bits cannot be had"),
        ("cq@4", "take at most 2 bits"),
        ("gsrq@1+beam", r"has no option \+beam; there are \+beamN, \+outliersN, .*\+kN, .*\+pre,"),
        ("gsrq@1+pre2", r"has no option \+pre2; there are"),
        ("gsrq@1+k1.5", r"\+k1.5 in the method 'gsrq@1\+k1.5' needs a whole number"),
        ("gsrq@1+power3", "metric_power must be from 0 to 1, got 3"),
        ("gsrq@1+k3", "codewords must be a power of two"),
        ("gsrq@1+beam64", r"beam must be from 1 .* to 32, got 64"),
        ("gzip+beam8", "unknown method 'gzip'"),
        ("full+beam8", "'full' takes no options; kmeans, spherical, gsrq do, and folders"),
        ("cq@1+beam8", "'cq@1' takes no options"),
    ],
)
def test_refused(model, name, message, work):
    with pytest.raises(InputError, match=message):
        methods.resolve([name], model, CALIBRATION, work, window=8, sinks=2)


def test_the_command(folder, work, tmp_path, capsys, monkeypatch):
    (tmp_path / "held.txt").write_text("the dog and the cat and the dog again. " * 40)
    out = tmp_path / "out"
    arguments = [
        *("--model", str(folder), "--eval-text", str(tmp_path / "held.txt"), "--length", "300"),
        *("--method", "full", "--method", "gsrq@0.5", "--method", "kivi1", "--window", "0", "300"),
        *("--sequences", "3", "--sinks", "2", "--out", str(out), "--work", str(work)),
        *("--calibration.tokens", "1280", "--calibration.length", "256"),
    ]
    monkeypatch.setattr("sys.argv", ["gsrq-fidelity", *arguments])
    commands.measure_fidelity(arguments)
    assert "gsrq@0.5, window 0: perplexity" in capsys.readouterr().out
    names = {f"{m}-w{w}.json" for m in ("gsrq@0.5", "kivi1") for w in (0, 300)} | {"run.json"}
    assert {x.name for x in (out / "300").iterdir()} == names
    narrow, wide = (json.loads((out / f"300/kivi1-w{w}.json").read_text()) for w in (0, 300))
    assert [r["metric"] for r in narrow["rows"]] == ["perplexity", "kl", "top1"]
    assert {r["n"] for r in narrow["rows"]} == {3 * 299}
    assert narrow["rows"][1]["value"] > 1e-4
    assert abs(wide["rows"][1]["value"]) < 1e-6
    assert narrow["rows"][0]["bits_stored"] == 2
    assert narrow["command"].startswith("gsrq-fidelity --method kivi1 --window 0 --model")
    assert narrow["command"].count("--method") == narrow["command"].count("--window") == 1

    # What is there is not measured again; another run is not mixed with it.
    monkeypatch.setattr(fidelity.evaluation, "fidelity", None)
    commands.measure_fidelity(arguments)
    assert "kivi1, window 300: perplexity" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        commands.measure_fidelity([*arguments, "--sequences", "2"])
    assert "holds a run with another --eval-text" in capsys.readouterr().err


def test_over_a_real_cache(folder, work, tmp_path, capsys):
    (tmp_path / "held.txt").write_text("the dog and the cat and the dog again. " * 40)
    arguments = [
        *("--model", str(folder), "--eval-text", str(tmp_path / "held.txt"), "--length", "300"),
        *("--window", "0", "--sequences", "1", "--sinks", "2", "--out", str(tmp_path / "out")),
        *("--calibration.tokens", "1280", "--calibration.length", "256", "--attention", "codes"),
        *("--work", str(work), "--method"),
    ]
    commands.measure_fidelity([*arguments, "gsrq@1+k16+block128"])
    (file,) = (tmp_path / "out/300").glob("*-w0-codes.json")
    rows = json.loads(file.read_text())["rows"]
    assert {r["attention"] for r in rows} == {"codes"}
    assert rows[0]["value"] != rows[0]["full_precision"]
    commands.measure_fidelity([*arguments, "gsrq@1+k2+block32"])
    assert "gsrq@1+k2+block32, window 0: perplexity" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        commands.measure_fidelity([*arguments, "gsrq@1+k4+block32"])
    said = capsys.readouterr().err
    assert "layout 'tiles' takes" in said
    assert "; or layout 'planes' takes" in said
    with pytest.raises(SystemExit):
        commands.measure_fidelity([*arguments, "kivi1"])
    assert "only window, sinks can change after fitting here" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(SystemExit):  # and then no run is begun
        commands.measure_fidelity([*arguments, "kivi1"])
    assert not (tmp_path / "out").exists()


def test_overlapping_sequences_count_once(model, tmp_path):
    path = tmp_path / "held.txt"
    path.write_text("the dog and the cat and the dog again. " * 10)
    config = fidelity.FidelityConfig(
        ("kivi1",), str(path), length=101, stride=60, sequences=3, out=tmp_path, model=""
    )
    rows = fidelity._sequences(config, model)
    assert rows.shape == (3, 101)
    np.testing.assert_array_equal(rows[1, 1:41], rows[0, 61:])
    got = fidelity.evaluation.fidelity(
        model.graphdef, model.params, rows, methods.resolve(["kivi1"], model)["kivi1"], stride=60
    )
    assert got.n == 100 + 2 * 60


@pytest.mark.parametrize("named", [(), ("--method", "full")])
def test_nothing_to_measure(folder, tmp_path, capsys, named):
    out = tmp_path / "out"
    with pytest.raises(SystemExit):
        commands.measure_fidelity(
            ["--model", str(folder), "--eval-text", "python", "--out", str(out), *named]
        )
    assert "no method to measure is named; give at least one" in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--length", "600"), "--length must be from 2 to the context"),
        (("--length", "100", "--stride", "100"), "--stride must be from 1 to 99"),
        (("--window", "-1"), "--window takes numbers from 0 up"),
        (
            ("--length", "512"),
            "too few for a sequence of 512; give more text or a smaller --length",
        ),
        (("--sequences", "0"), "--sequences must be at least 1, got 0"),
        (("--length", "4", "--method", "x/y", "--method", "x-y"), "would share a file; rename one"),
    ],
)
def test_bad_flags(folder, tmp_path, capsys, flags, message):
    (tmp_path / "held.txt").write_text("the dog")
    with pytest.raises(SystemExit):
        commands.measure_fidelity(
            [
                "--model",
                str(folder),
                "--eval-text",
                str(tmp_path / "held.txt"),
                "--method",
                "int8",
                *flags,
            ]
        )
    assert message in capsys.readouterr().err
