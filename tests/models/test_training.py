"""The main job on a tiny model: end to end, stopped and resumed, its samples and sensitivities."""

import json
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import random_weights
import tiny
import tyro
from safetensors.numpy import load_file, save_file

from gsrq_jax import codebook
from gsrq_jax.attention import causal
from gsrq_jax.calibration import SampleStore
from gsrq_jax.errors import InputError
from gsrq_jax.models import (
    commands,
    distillation,
    evaluation,
    generation,
    llama,
    loading,
    text,
    training,
)
from gsrq_jax.models.distillation import DistillConfig
from gsrq_jax.spec import QuantSpec, ResidualSpec

SEQUENCES = 8  # that `tiny.FLAGS` asks for


@pytest.fixture(scope="module")
def model(tiny_model):
    return loading.load(tiny_model, dtype=jnp.float32)


def equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


# End to end (report.json, report.md and report.png: test_report.py)


def test_codebooks_are_the_models(tiny_run, model):
    books = codebook.load(tiny_run / "codebooks", model=model.fingerprint)
    code = ResidualSpec(8, 8, stages=2, codewords=16)
    assert books.spec == QuantSpec(key=code, value=code, block=8, window=8, sinks=2)
    assert (books.layers, books.kv_heads, books.key.dtype) == (2, 2, jnp.bfloat16)
    np.testing.assert_array_equal(books.inv_freq, np.tile(model.config.inv_freq, (2, 1)))
    assert np.abs(books.key_mean).max() > 0.1
    extra = codebook.read_metadata(tiny_run / "codebooks")["extra"]
    assert extra["tokens"] == 64 * SEQUENCES
    assert extra["config"]["codewords"] == 16


def test_folder_of_a_finished_run(tiny_run):
    found = {entry.name for entry in tiny_run.iterdir()}
    assert found == {"run.json", "codebooks", "report.json", "report.md", "report.png"}


def test_perplexity_is_that_of_held_out_text(tiny_run, model):
    """Full precision's, computed here from logits on the text after what was calibrated on."""
    ids = text.tokens(text.read("python"), model.tokenizer, count=SEQUENCES * 63 + 2 * 47)
    rows = np.concatenate([np.zeros((2, 1), np.int32), ids[SEQUENCES * 63 :].reshape(2, 47)], 1)
    positions = jnp.broadcast_to(jnp.arange(48), rows.shape)
    hidden, _ = llama.apply(
        model.graphdef, model.params, rows, positions, lambda q, k, v, _: (causal(q, k, v), None)
    )
    logs = jax.nn.log_softmax(llama.logits(model.graphdef, model.params, hidden[:, :-1]))
    nll = -np.take_along_axis(np.asarray(logs), rows[:, 1:, None], -1).mean()
    data = json.loads((tiny_run / "report.json").read_text())
    assert data["calibration_tokens"] == SEQUENCES * 64
    perplexity = data["rows"][0]
    np.testing.assert_allclose(perplexity["full_precision"], np.exp(nll), rtol=1e-4)
    assert perplexity["value"] != perplexity["full_precision"]


# Texts


def config(**changes):
    given = {"tokens": 480, "length": 64, "eval_length": 48, "eval_sequences": 2} | changes
    return training.TrainConfig(**given)


def texts(model, **changes):
    """Sequences to calibrate on, and to measure on."""
    asked = config(**changes)
    found = training._texts(asked, asked.spec(8, 2), model)
    return found.calibration, next(iter(found.measured.values()))


def test_the_beam_is_the_caches():
    assert config(beam=8).spec(8, 2).beam == 8
    with pytest.raises(InputError, match=r"beam must be from 1 .* to 32, got 0"):
        config(beam=0).spec(8, 2)


@pytest.mark.parametrize("length", [48, 64, 100])
def test_held_out_tokens_follow_those_calibrated_on(model, length):
    rows, held_out = texts(model, eval_length=length)
    assert rows.shape == (SEQUENCES, 64)
    assert held_out.shape == (2, length)
    assert not rows[:, 0].any()  # BOS
    assert not held_out[:, 0].any()
    both = np.concatenate([rows[:, 1:].reshape(-1), held_out[:, 1:].reshape(-1)])
    stream = text.tokens(text.read("python"), model.tokenizer, count=len(both))
    np.testing.assert_array_equal(both, stream)


@pytest.mark.parametrize(("size", "rows", "held_out"), [(1000, 12, (4, 48)), (200, 2, (1, 48))])
def test_short_texts_keep_a_part_to_measure_on(model, tmp_path, size, rows, held_out):
    file = tmp_path / "short.txt"
    rng = np.random.default_rng(0)
    file.write_text("".join(map(chr, rng.integers(97, 123, size))))
    got, measured = texts(model, text=str(file), tokens=10_000, eval_sequences=9)
    assert (len(got), measured.shape) == (rows, held_out)
    stream = model.tokenizer.encode(file.read_text() + "\n\n", add_bos=False)
    np.testing.assert_array_equal(got[:, 1:].reshape(-1), stream[: rows * 63])
    left = measured[:, 1:].reshape(-1).tolist()
    start = next(i for i in range(len(stream)) if stream[i : i + len(left)] == left)
    assert start >= rows * 63


def test_text_of_its_own_to_measure_on(model, tmp_path):
    file = tmp_path / "eval.txt"
    file.write_text("x" * 100)
    rows, held_out = texts(model, eval_text=str(file))
    assert len(rows) == SEQUENCES
    np.testing.assert_array_equal(held_out[:, 1:], np.full((2, 47), held_out[0, 1]))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 0}, "--tokens must be at least 1, got 0"),
        ({"eval_sequences": 0}, "--eval-sequences must be at least 1"),
        ({"length": 5}, "--length must be at least 6"),
        ({"eval_length": 2}, "--eval-length must be at least 3"),
        ({"length": 513}, "--length 513 is beyond the context of tiny, 512 tokens"),
        ({"eval_length": 600}, "--eval-length 600 is beyond the context of tiny, 512 tokens"),
        ({"text": "/no/such.txt"}, r"there is no file /no/such\.txt"),
        ({"dataset": "/no/such"}, "cannot read the data set '/no/such'"),
        ({"eval_text": "/no/such.txt"}, r"there is no file /no/such\.txt"),
        ({"second_text": "/no/such.txt"}, r"there is no file /no/such\.txt"),
        ({"second_text": "python"}, "--second-text python is to be another text than the others"),
    ],
)
def test_sizes_and_texts_that_cannot_be(model, changes, words):
    with pytest.raises(InputError, match=words):
        texts(model, **changes)


def test_text_that_is_too_short(model, tmp_path):
    file = tmp_path / "short.txt"
    for size in (0, 10, 120):
        file.write_text("x" * size)
        with pytest.raises(InputError, match=r"too few for one sequence of 64 and another.*give"):
            texts(model, text=str(file))


def test_second_domain(model, tmp_path):
    def measured(**changes):
        asked = config(**changes)
        return training._texts(asked, asked.spec(8, 2), model).measured

    both = measured(eval_length=64)
    assert list(both) == ["held out of the calibration text", "python-source"]
    source = text.tokens(text.read("python-source"), model.tokenizer, count=2 * 63)
    np.testing.assert_array_equal(both["python-source"][:, 1:].reshape(-1), source)

    for name, letter in (("own.txt", "x"), ("other.txt", "y")):
        (tmp_path / name).write_text(letter * 1000)
    own, other = (str(tmp_path / name) for name in ("own.txt", "other.txt"))
    both = measured(eval_text=own, second_text=other)
    assert list(both) == [own, other]
    assert (both[own][:, 1:] != both[other][:, 1:]).all()
    distilled = DistillConfig(text=("sampled", own))
    for same in ({"eval_text": own}, {"text": own}, {"distill": distilled}):
        with pytest.raises(InputError, match=r"own\.txt is to be another text than the others"):
            measured(second_text=own, **same)


def test_what_distillation_checks_on_is_not_calibrated_on(model):
    def calibrated(**options):
        asked = config(distill=DistillConfig(**options), tokens=1024)
        found = training._texts(asked, asked.spec(8, 2), model)
        assert not len(found.distillation)
        assert found.to_distil == (32 if "text" in options else 0)
        return found.calibrated(asked)

    assert calibrated() == 16
    assert calibrated(steps=1) == 14
    assert calibrated(steps=1, text=("sampled",), tokens=2048) == 16


def test_mixed_texts(model, tmp_path):
    for letter in "xyz":
        (tmp_path / letter).write_text(letter * 2000)
    x, y, z = (str(tmp_path / letter) for letter in "xyz")

    def found(*mix, **changes):
        asked = config(text=x, mix=mix, eval_text=z, tokens=12 * 64, **changes)
        return training._texts(asked, asked.spec(8, 2), model), asked

    mixed, _ = found(y)
    letters = "".join(model.tokenizer.decode([row[1]]) for row in mixed.calibration.tolist())
    assert letters == "xyxyxyxyxyxy"
    with_own, asked = found(y, "sampled", distill=DistillConfig(steps=1))
    assert (len(with_own.calibration), with_own.written) == (8, 4)
    assert with_own.calibrated(asked) == 12 - 1
    with pytest.raises(InputError, match="is to be another text than the others"):
        found(y, second_text=y)
    parts = [np.full((n, 2), n) for n in (1, 2, 4)]
    assert text.interleaved(parts)[:, 0].tolist() == [4, 2, 4, 1, 4, 2, 4]


def test_codebooks_from_what_the_model_writes(tiny_model, tmp_path, monkeypatch):
    """Written sequences are fitted to and refined on beside the others, and found again."""
    seen, real = {}, training.capture

    def capture(model, tokens, *arguments, **options):
        seen["fitted"] = tokens
        return real(model, tokens, *arguments, **options)

    def refine(model, codebooks, rows, *arguments, **options):
        seen["refined"] = rows
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "capture", capture)
    monkeypatch.setattr(distillation, "refine", refine)
    flags = ["--model", str(tiny_model), "--out", str(tmp_path / "run"), *tiny.FLAGS]
    with pytest.raises(SystemExit):
        commands.train([*flags, "--mix", "sampled", "--distill.steps", "1"])
    fitted, refined = seen["fitted"], seen["refined"]
    np.testing.assert_array_equal(fitted, refined[:-1])
    given = text.tokens(text.read("python"), loading.load(tiny_model).tokenizer, count=4 * 63)
    np.testing.assert_array_equal(refined[::2, 1:].reshape(-1), given)
    written = refined[1::2]
    assert len({row.tobytes() for row in written}) == 4
    with pytest.raises(SystemExit):
        commands.train([*flags, "--mix", "sampled", "--distill.steps", "1"])
    np.testing.assert_array_equal(seen["refined"], refined)


def test_data_set_to_calibrate_on(model, tmp_path):
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps({"prose": "y" * 300}) for _ in range(9)))
    rows, _ = texts(model, dataset=str(tmp_path), column="prose")
    assert (rows[0, 1:] == rows[0, 1]).all()
    with pytest.raises(InputError, match="no text column 'text'; it has prose"):
        texts(model, dataset=str(tmp_path))


# Keys, values and sensitivities


def rms(x, scale):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-5) * scale


def numpy_llama(folder, tokens, add=None):
    """The tiny LLaMA by hand in float64: summed loss of the next tokens, rotated keys, values.

    ``add`` is ``(part, layer, position, head, channel, amount)``: added to a key or a value.
    """
    data = tiny.model_config()
    w = {
        name: random_weights.tensor(f"0 {name}", x.shape).astype(np.float64)
        for name, x in random_weights.tensors(data).items()
    }
    n, half = len(tokens), 4
    angles = np.arange(n)[:, None] * 10000.0 ** (-np.arange(half) / half)

    def rotated(x):  # [n, heads, 8]
        c, s = np.cos(angles)[:, None], np.sin(angles)[:, None]
        a, b = x[..., :half], x[..., half:]
        return np.concatenate([a * c - b * s, b * c + a * s], -1)

    h, keys, values = w["model.embed_tokens.weight"][tokens], [], []
    for layer in range(2):

        def at(x, name, layer=layer):
            return x @ w[f"model.layers.{layer}.{name}.weight"].T

        x = rms(h, w[f"model.layers.{layer}.input_layernorm.weight"])
        q = rotated(at(x, "self_attn.q_proj").reshape(n, 4, 8))
        kv = {
            "k": rotated(at(x, "self_attn.k_proj").reshape(n, 2, 8)),
            "v": at(x, "self_attn.v_proj").reshape(n, 2, 8),
        }
        if add is not None and add[1] == layer:
            kv[add[0]][add[2:5]] += add[5]
        keys.append(kv["k"])
        values.append(kv["v"])
        k, v = (np.repeat(x, 2, axis=1) for x in kv.values())
        scores = np.einsum("ihd,jhd->hij", q, k) / np.sqrt(8)
        scores = np.where(np.tri(n, dtype=bool), scores, -np.inf)
        p = np.exp(scores - scores.max(-1, keepdims=True))
        out = np.einsum("hij,jhd->ihd", p / p.sum(-1, keepdims=True), v).reshape(n, -1)
        h = h + at(out, "self_attn.o_proj")
        x = rms(h, w[f"model.layers.{layer}.post_attention_layernorm.weight"])
        gate = at(x, "mlp.gate_proj")
        h = h + at(gate / (1 + np.exp(-gate)) * at(x, "mlp.up_proj"), "mlp.down_proj")
    logits = rms(h, w["model.norm.weight"]) @ w["lm_head.weight"].T
    logs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    loss = -logs[np.arange(n - 1), tokens[1:]].sum()
    return loss, np.stack(keys), np.stack(values)


TOKENS = np.random.default_rng(5).integers(2, 258, 12).astype(np.int32)


@pytest.fixture(scope="module")
def sampled(model):
    """Of `TOKENS` from position 3, with and without gradients."""
    args = (model.config, model.graphdef, model.params, jnp.asarray(TOKENS)[None])
    with jax.default_matmul_precision("highest"):
        return {w: training.key_value_samples(*args, first=3, weigh=w)[:4] for w in (True, False)}


def test_keys_and_values_are_those_of_the_model(sampled, tiny_model):
    _, keys, values = numpy_llama(tiny_model, TOKENS)
    for k, v, *_ in sampled.values():
        np.testing.assert_allclose(k[:, 0], keys[:, 3:], atol=2e-5)
        np.testing.assert_allclose(v[:, 0], values[:, 3:], atol=2e-5)


def test_keys_are_what_a_cache_gets(sampled, model):
    _, cache = generation.prefill(
        model.graphdef,
        model.params,
        jnp.asarray(TOKENS)[None],
        jnp.asarray([12]),
        None,
        max_length=12,
        dtype=jnp.float32,
    )
    k, v, *_ = sampled[True]
    keys, values = (jnp.swapaxes(x, 2, 3) for x in (cache.window_key, cache.window_value))
    np.testing.assert_allclose(k, keys[:, :, 3:], atol=1e-5)
    np.testing.assert_allclose(v, values[:, :, 3:], atol=1e-5)


@pytest.mark.parametrize("part", ["k", "v"])
@pytest.mark.parametrize(("layer", "position", "head"), [(0, 3, 0), (0, 7, 1), (1, 5, 1)])
def test_sensitivities_are_finite_differences(sampled, tiny_model, part, layer, position, head):
    step, gradient = 1e-5, []
    for channel in range(8):
        up, down = (
            numpy_llama(tiny_model, TOKENS, (part, layer, position, head, channel, s * step))[0]
            for s in (1, -1)
        )
        gradient.append((up - down) / (2 * step))
    norms = sampled[True][2 if part == "k" else 3]
    assert norms.shape == (2, 1, 9, 2)
    np.testing.assert_allclose(
        norms[layer, 0, position - 3, head], np.linalg.norm(gradient), rtol=1e-3
    )


def test_nothing_depends_on_the_last_token(sampled):
    for norms in sampled[True][2:]:
        assert not norms[:, :, -1].any()
        assert norms[:, :, :-1].min() > 0


def test_without_weights_norms_are_ones(sampled):
    for norms in sampled[False][2:]:
        np.testing.assert_array_equal(norms, np.ones((2, 1, 9, 2)))


# Stopped and resumed


@pytest.fixture
def counted(monkeypatch):
    """Counts steps; ``counted.stop`` names one and how many of them go well before Ctrl-C."""

    class Counted(Counter):
        stop = ("", 0)

    calls = Counted()

    def watch(owner, name):
        real = getattr(owner, name)

        def step(*arguments, **options):
            if calls.stop == (name, calls[name]):
                raise KeyboardInterrupt
            calls[name] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, step)

    watch(training, "key_value_samples")
    watch(SampleStore, "_mark")  # the end of storing a sequence, or of a new store
    watch(SampleStore, "layer")  # the beginning of fitting a layer
    watch(codebook, "save")
    watch(evaluation, "divergence")
    watch(loading, "load")
    return calls


def test_stopped_anywhere_and_resumed(tiny_run, tiny_model, tmp_path, counted, capsys):
    out = tmp_path / "run"
    command = ["--model", str(tiny_model), "--out", str(out), *tiny.FLAGS]

    def run(stop):
        counted.clear()
        counted.stop = stop
        if not stop[0]:
            return commands.train(command)
        with pytest.raises(SystemExit) as caught:
            commands.train(command)
        assert caught.value.code == 130
        assert "the same command goes on from here" in capsys.readouterr().err
        assert not (out / "report.json").exists()

    run(("key_value_samples", 3))
    assert counted["key_value_samples"] == 3
    run(("_mark", 2))  # two more are stored, the third is written but does not count
    assert counted["key_value_samples"] == 3
    run(("layer", 1))
    assert counted["key_value_samples"] == SEQUENCES - 5
    run(("save", 0))
    assert (counted["key_value_samples"], counted["layer"]) == (0, 1)
    assert not (out / "codebooks").exists()
    run(("divergence", 1))
    assert (counted["layer"], counted["save"]) == (0, 1)
    run(("", 0))
    assert (counted["key_value_samples"], counted["layer"], counted["divergence"]) == (0, 0, 4)

    equal(codebook.load(out / "codebooks"), codebook.load(tiny_run / "codebooks"))
    ours, other = (json.loads((x / "report.json").read_text()) for x in (out, tiny_run))
    assert ours["rows"] == other["rows"]
    assert ours["fit"] == other["fit"]
    assert ours["seconds"] is None
    assert other["seconds"] > 0
    assert {x.name for x in out.iterdir()} == {x.name for x in tiny_run.iterdir()}


def test_finished_run_is_only_shown(tiny_run, tiny_model, counted, capsys):
    before = {x: x.stat().st_mtime_ns for x in (tiny_run / "codebooks").rglob("*")}
    (tiny_run / "report.md").unlink()
    commands.train(["--model", str(tiny_model), "--out", str(tiny_run), *tiny.FLAGS])
    assert not counted
    printed = capsys.readouterr().out
    assert "| perplexity |" in printed
    assert f"codebooks: {tiny_run / 'codebooks'}\nreport: {tiny_run / 'report.md'}" in printed
    assert "| perplexity |" in (tiny_run / "report.md").read_text()
    assert before == {x: x.stat().st_mtime_ns for x in (tiny_run / "codebooks").rglob("*")}


def test_distilled_on_text_of_the_models_own(tiny_run, tiny_model, tmp_path, monkeypatch):
    out = tmp_path / "run"
    flags = ("--distill.steps", "3", "--distill.batch", "2", "--distill.check-every", "2")
    sampled = ("--distill.text", "sampled", "--distill.tokens", "192", "--distill.rate", "0.05")
    command = ["--model", str(tiny_model), "--out", str(out), *tiny.FLAGS, *flags, *sampled]
    seen, real = [], distillation.refine

    def refine(model, codebooks, rows, *arguments, **options):
        seen.append(rows)
        equal(codebooks, codebook.load(tiny_run / "codebooks"))
        return real(model, codebooks, rows, *arguments, **options)

    monkeypatch.setattr(distillation, "refine", refine)
    commands.train(command)
    assert seen[0].shape == (3, 64)
    assert not seen[0][:, 0].any()  # BOS
    data = json.loads((out / "report.json").read_text())
    found = data["distillation"]
    assert (found["sequences"], found["held_out"]) == (2, 1)
    assert [check["step"] for check in found["checks"]] == [0, 2, 3]
    assert found["checks"][0]["train"] is None
    best = min(found["checks"], key=lambda check: check["held_out"])
    assert found["kept"] == best["step"] > 0
    books, plain = (codebook.load(x / "codebooks") for x in (out, tiny_run))
    assert books.key.dtype == jnp.bfloat16
    assert (books.key != plain.key).any()
    written = (out / "report.md").read_text()
    assert f"after step {best['step']}." in written
    for check in found["checks"][1:]:
        line = f"| {check['step']} | {check['train']:.4f} | {check['held_out']:.4f} |"
        assert line in written


# Stages by sensitivity, metrics


@pytest.fixture(scope="module")
def deaf(tmp_path_factory):
    """A model whose first layer makes nothing of what its attention reads."""
    folder = tiny.make_model_folder(tmp_path_factory.mktemp("models") / "deaf")
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.o_proj.weight"][:] = 0
    save_file(tensors, folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def allocated(deaf, tmp_path_factory):
    """The folder of a run that gives each layer stages of its own, and its flags."""
    out = tmp_path_factory.mktemp("allocated") / "run"
    flags = [
        *("--model", str(deaf), "--out", str(out), *tiny.FLAGS, "--bits", "2"),
        *("--allocate", "layers"),
        *("--fit.key-metric", "gradient", "--fit.value-metric", "output"),
    ]
    commands.train(flags)
    return out, flags


def test_stages_go_where_they_are_missed(allocated, deaf):
    out, _ = allocated
    found = json.loads((out / "report.json").read_text())
    model = loading.load(deaf, dtype=jnp.float32)
    books = codebook.load(out / "codebooks", model=model.fingerprint)
    spec = books.spec
    assert spec.bits == spec.stored_bits == 2
    assert (spec.key_stages[0], spec.value_stages[0]) == (2, 2)  # of four bits: a byte
    assert spec.key_stages[1] + spec.value_stages[1] == 2 * 2 * 4 - 4
    measured = found["allocation"]
    assert (measured["low"], measured["high"], measured["most"]) == (2, 6, 8)
    assert np.shape(measured["kl_low"]) == np.shape(measured["kl_high"]) == (2, 2)
    np.testing.assert_allclose(measured["kl_low"][0], measured["kl_high"][0], rtol=1e-5)
    assert (np.asarray(measured["kl_low"][1]) > measured["kl_high"][1]).all()
    assert f"| 1 | {spec.key_stages[1]} |" in (out / "report.md").read_text()
    assert "Stages were given by sensitivity" in (out / "report.md").read_text()

    assert books.key_metric.shape == books.value_metric.shape == (2, 2, 8, 8)
    output = llama.output_moments(model.graphdef, model.params)[1]
    metric = jnp.einsum("Hde,Hdf->Hef", books.value_metric[1], books.value_metric[1])
    both = jnp.einsum("Hde,Hef->Hdf", metric, output)  # symmetric where both share their axes
    np.testing.assert_allclose(both, jnp.swapaxes(both, -1, -2), atol=1e-3 * jnp.abs(both).max())


def test_sides_alone_of_heads_together(tiny_model, tmp_path, model):
    flags = ["--model", str(tiny_model), "--out", str(tmp_path), *tiny.FLAGS]
    commands.train([*flags, "--allocate", "sides", "--bits", "2", "--heads", "2"])
    spec = codebook.load(tmp_path / "codebooks", model=model.fingerprint).spec
    assert spec.key_stages is None
    assert spec.code_heads == (2, 2)
    assert spec.key.stages + spec.value.stages == 2 * 8
    assert spec.bits == spec.stored_bits == 2


def test_planes_that_their_layout_does_not_take_stay_packed(tiny_model, tmp_path):
    flags = ["--model", str(tiny_model), "--out", str(tmp_path / "run"), *tiny.FLAGS]
    commands.train([*flags, "--codewords", "2"])  # 8 stages, and blocks of 8 tokens
    assert codebook.load(tmp_path / "run" / "codebooks").spec.layout == "packed"


def test_two_codewords_a_stage_are_fitted_for_each_number_of_stages(tmp_path):
    """Bit planes: 64 stages for two heads of 32 channels together, given a word at a time."""
    folder = tiny.make_model_folder(tmp_path / "model", head_dim=32)
    flags = ["--model", str(folder), "--out", str(tmp_path / "run"), *tiny.FLAGS, "--heads", "2"]
    flags += ["--codewords", "2", "--allocate", "layers", "--beam", "2", "--block", "32"]
    commands.train([*flags, "--distill.steps", "2", "--distill.batch", "1"])
    books = codebook.load(tmp_path / "run" / "codebooks")
    spec = books.spec
    assert (spec.bits, spec.code_heads, spec.beam, spec.layout) == (1, (2, 2), 2, "planes")
    given = np.array([spec.key_stages, spec.value_stages])
    assert (given % 32 == 0).all()
    assert given.sum() == 4 * 64
    found = json.loads((tmp_path / "run" / "report.json").read_text())
    assert (found["allocation"]["low"], found["allocation"]["high"]) == (40, 88)
    for side, stages in (("key", spec.key_stages), ("value", spec.value_stages)):
        for layer, count in enumerate(stages):
            words = np.asarray(getattr(books, side)[layer, :, 0], np.float32)
            assert (words[:, count:] == 0).all()
            assert (np.abs(words[:, :count]).sum(axis=(-1, -2)) > 0).all()


@pytest.mark.parametrize("heads", ["3", "0", "4"])
def test_heads_that_cannot_be_together(tiny_model, tmp_path, capsys, heads):
    out = tmp_path / "run"
    with pytest.raises(SystemExit, match="2"):
        commands.train(["--model", str(tiny_model), "--out", str(out), "--heads", heads])
    said = f"--heads must divide the 2 KV heads of the model, got {heads}"
    assert said in capsys.readouterr().err
    assert not out.exists()


def test_allocation_goes_on_where_it_was(allocated, tmp_path, monkeypatch):
    """Probes that were measured are not measured again, and the result is the same."""
    out, flags = allocated
    again = [str(tmp_path / "run") if x == str(out) else x for x in flags]
    counted = Counter()
    fidelity = evaluation.fidelity

    def watched(*args, **kwargs):
        counted["fidelity"] += 1
        if counted["fidelity"] == 4:
            raise KeyboardInterrupt
        return fidelity(*args, **kwargs)

    monkeypatch.setattr(training.evaluation, "fidelity", watched)
    with pytest.raises(SystemExit):
        commands.train(again)
    commands.train(again)
    # Of 2 layers × 2 sides × 2 numbers of stages three were there; two texts are measured.
    assert counted["fidelity"] == 4 + (8 - 3) + 2
    ours, theirs = (codebook.load(x / "codebooks") for x in (tmp_path / "run", out))
    equal(ours, theirs)


def test_moments_are_those_of_the_gradients(model):
    """Against gradients of the same loss, formed for each sequence alone."""
    rng = np.random.default_rng(0)
    tokens = jnp.asarray(rng.integers(2, 200, (2, 24)))
    args = model.config, model.graphdef, model.params
    found = training.key_value_samples(*args, tokens, first=3, weigh=True, splits=1, moments=True)
    *_, k_norms, v_norms, moments = found
    plain = training.key_value_samples(*args, tokens, first=3, weigh=True)
    assert plain[4] is None
    for got, want in zip(found[:4], plain[:4], strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-6)
    for got, norms in ((moments.key, k_norms), (moments.value, v_norms)):
        assert got.shape == (2, 2, 2, 8, 8)
        np.testing.assert_allclose(
            jnp.trace(got, axis1=-2, axis2=-1), jnp.square(norms).mean(axis=2), rtol=1e-3
        )

    def layer(q, k, v, _):
        return causal(q, k, v), q

    positions = jnp.broadcast_to(jnp.arange(24), (2, 24))
    _, q = llama.apply(model.graphdef, model.params, tokens, positions, layer)
    pairs = jnp.square(q).reshape(2, 2, 24, 2, 2, 2, 4)  # [L, B, T, H, query heads, half, pair]
    np.testing.assert_allclose(moments.query, pairs.mean(axis=(2, 4, 5)), rtol=1e-4)


def test_presets():
    with pytest.raises(SystemExit):
        commands.train(["--preset", "finest"])
    for name, config in training.PRESETS.items():
        assert config.preset == name
        assert commands._preset(["--bits", "2", "--preset", name]) == config
        assert commands._preset([f"--preset={name}"]) == config
    assert training.PRESETS["demo"] == training.TrainConfig()
    assert commands._preset([]).preset == "demo"


def asked(*flags):
    """The config that ``train_codebooks.py`` makes of flags."""
    return tyro.cli(training.TrainConfig, args=flags, default=commands._preset([*flags]))


def test_flags_count_beside_a_preset():
    config = asked("--preset", "best", "--heads", "2", "--mix", "--distill.text", "calibration")
    assert (config.heads, config.mix, config.distill.text) == (2, (), ("calibration",))
    assert config.distill.steps == training.PRESETS["best"].distill.steps
    assert asked("--preset", "balanced", "--distill.windows").distill.windows == ()
    assert asked("--preset", "best").heads == asked("--heads", "auto").heads == "auto"


def test_heads_that_share_codes():
    found = {n: config(heads="auto").shared_heads(n) for n in (1, 2, 3, 5, 6, 8, 9, 10)}
    assert found == {1: 1, 2: 2, 3: 3, 5: 1, 6: 3, 8: 4, 9: 3, 10: 2}
    assert config(heads="auto").spec(8, 2).key.heads == 2
    for heads in (0, 3):
        with pytest.raises(InputError, match=f"--heads must divide the 8 KV heads.* got {heads}"):
            config(heads=heads).spec(8, 8)
    with pytest.raises(InputError, match="--allocate layers is for whole heads"):
        config(bits=2, group=4, allocate="layers").spec(8, 8)


@pytest.mark.parametrize("own", [True, False])
def test_distilled_on_the_text_that_is_calibrated_on(model, tmp_path, own):
    """By the name ``source`` or its own; what is measured on is in neither."""
    file, other = tmp_path / "text.txt", tmp_path / "eval.txt"
    rng = np.random.default_rng(0)
    for path in (file, other):
        path.write_text("".join(map(chr, rng.integers(97, 123, 63 * 20))))

    def found(tokens, **changes):
        distill = DistillConfig(
            steps=1, text=(str(file) if own else "source", "sampled"), tokens=2 * 64 * tokens
        )
        given = {"text": str(file), "tokens": 4 * 64, "distill": distill} | changes
        asked = config(**given)
        return training._texts(asked, asked.spec(8, 2), model)

    def letters(rows):
        return model.tokenizer.decode(rows[:, 1:].reshape(-1).tolist())

    whole = file.read_text()
    for tokens, rows in ((10, 10), (3, 3), (50, 18)):
        texts = found(tokens)
        held_out = next(iter(texts.measured.values()))
        assert letters(texts.calibration) == whole[: 4 * 63]
        assert letters(texts.distillation) == whole[: rows * 63]
        assert texts.to_distil == tokens
        assert letters(held_out) in whole[63 * max(rows, 4) :] + "\n\n"
        assert texts.calibrated(config()) == 4
    texts = found(50, eval_text=str(other))
    assert letters(texts.distillation) == whole
    assert letters(next(iter(texts.measured.values()))) == other.read_text()[: 2 * 47]
    texts = found(50, mix=("sampled",))
    assert (len(texts.calibration), texts.written, len(texts.distillation)) == (2, 2, 18)
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.jsonl").write_text(json.dumps({"text": whole}))
    if not own:
        texts = found(10, dataset=str(tmp_path / "set"))
        assert letters(texts.distillation) == whole[: 10 * 63]
