"""Distillation on a small random model: it helps, never harms, and goes on where it stopped."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from gsrq_jax.attention import causal
from gsrq_jax.codebook import Codebooks
from gsrq_jax.errors import InputError
from gsrq_jax.models import distillation, evaluation, llama, text
from gsrq_jax.models.config import LlamaConfig
from gsrq_jax.models.distillation import Check, DistillConfig
from gsrq_jax.models.llama import Llama
from gsrq_jax.models.loading import LoadedModel
from gsrq_jax.spec import QuantSpec

CONFIG = LlamaConfig("llama", 64, 32, 64, 2, 4, 2, 8, 256)
SPEC = QuantSpec.from_bits(1, 8, codewords=16, window=4, sinks=1, block=4)


@pytest.fixture(scope="module")
def model():
    graphdef, params = nnx.split(Llama(CONFIG, rngs=nnx.Rngs(0)))
    return LoadedModel(CONFIG, graphdef, params, None, {}, "tiny")


@pytest.fixture(scope="module")
def books():
    keys = jax.random.split(jax.random.key(0))
    shape = (CONFIG.layers, CONFIG.kv_heads, *SPEC.key.codebook_shape)
    return Codebooks(
        key=(0.1 * jax.random.normal(keys[0], shape)).astype(jnp.bfloat16),
        value=0.1 * jax.random.normal(keys[1], shape),
        key_mean=jnp.zeros((CONFIG.layers, CONFIG.kv_heads, CONFIG.head_dim)),
        inv_freq=jnp.tile(CONFIG.inv_freq, (CONFIG.layers, 1)),
        spec=SPEC,
    )


TOKENS = np.random.default_rng(0).integers(0, 64, (17, 40)).astype(np.int32)
OPTIONS = DistillConfig(steps=6, batch=2, rate=30.0, ema=0.5, copies=2, check_every=2)


def refine(model, books, folder, config=OPTIONS, **options):
    folder.mkdir(exist_ok=True)
    return distillation.refine(model, books, TOKENS, config, seed=0, work=folder, **options)


def kl(model, books, rows):
    return evaluation.fidelity(model.graphdef, model.params, rows, books).kl


def same(a, b):
    for name in (f.name for f in dataclasses.fields(a) if f.name != "spec"):
        np.testing.assert_array_equal(getattr(a, name), getattr(b, name))


@pytest.mark.parametrize("outliers", [0, 3])
def test_the_divergence_falls(model, books, tmp_path, outliers):
    spec = dataclasses.replace(SPEC, outliers=outliers)
    books = dataclasses.replace(books, spec=spec)
    config = DistillConfig(steps=60, batch=5, rate=0.05, copies=0, check_every=25)
    refined, found = refine(model, books, tmp_path, config)
    fresh = np.random.default_rng(1).integers(0, 64, (8, 40)).astype(np.int32)
    assert kl(model, refined, fresh) < 0.9 * kl(model, books, fresh)
    for name in ("key_mean", "inv_freq"):
        np.testing.assert_array_equal(getattr(refined, name), getattr(books, name))

    assert (found.sequences, found.held_out) == (15, 2)
    assert [check.step for check in found.checks] == [0, 25, 50, 60]
    first, *later = found.checks
    assert math.isnan(first.train)
    assert first.held_out == kl(model, books, TOKENS[-2:])
    assert found.kept == min(later, key=lambda check: check.held_out).step
    assert min(check.held_out for check in later) == kl(model, refined, TOKENS[-2:])
    assert later[-1].train < 0.9 * later[0].train


def test_what_only_harms_is_not_kept(model, books, tmp_path):
    refined, found = refine(model, books, tmp_path)
    assert found.kept == 0
    assert min(check.held_out for check in found.checks[1:]) > found.checks[0].held_out
    same(refined, books)


def test_windows_in_turn_and_an_encoder_of_its_own(model, books, tmp_path, monkeypatch):
    seen, real = [], distillation._step

    def step(graphdef, config, mesh, params, begun, state, parts, window):
        seen.append((int(window), begun.spec.beam))
        return real(graphdef, config, mesh, params, begun, state, parts, window)

    monkeypatch.setattr(distillation, "_step", step)
    cached = dataclasses.replace(books, spec=dataclasses.replace(SPEC, beam=4))
    config = DistillConfig(steps=3, batch=2, rate=0.05, copies=0, beam=2, windows=(8, 0))
    refined, found = refine(model, cached, tmp_path, config)
    assert seen == [(8, 2), (0, 2), (8, 2)]
    assert refined.spec == cached.spec
    beam = dataclasses.replace(books, spec=dataclasses.replace(SPEC, beam=2))
    alone = [
        evaluation.fidelity(model.graphdef, model.params, TOKENS[-2:], beam, window=w).kl
        for w in (8, 0)
    ]
    assert alone[0] < alone[1]
    np.testing.assert_allclose(found.checks[0].held_out, np.mean(alone), rtol=1e-6)


def test_pieces_are_not_cut_from_what_is_held_out(model, books, tmp_path, monkeypatch):
    seen, real = [], distillation._pieces

    def pieces(rows, *arguments):
        seen.append(rows)
        return real(rows, *arguments)

    monkeypatch.setattr(distillation, "_pieces", pieces)
    refine(model, books, tmp_path)
    assert len(seen) == 6
    for rows in seen:
        np.testing.assert_array_equal(rows, TOKENS[:15])


def test_held_out_sequences_repeat_passages_too(model, books, tmp_path, monkeypatch):
    seen, real = [], evaluation.fidelity

    def fidelity(graphdef, params, rows, *arguments, **options):
        seen.append(rows)
        return real(graphdef, params, rows, *arguments, **options)

    monkeypatch.setattr(evaluation, "fidelity", fidelity)
    refine(model, books, tmp_path)
    assert len(seen) == 4
    for rows in seen:
        np.testing.assert_array_equal(rows, seen[0])
        changed = (rows != TOKENS[15:]).sum(axis=1)
        assert (changed > 0).all()
        assert (changed <= 2 * 5).all()


def test_an_interrupted_run_goes_on_to_the_same_result(model, books, tmp_path, monkeypatch):
    """The best state, too, is that of before the interruption."""
    seen, real = [], distillation._pieces
    measured, real_fidelity = [0.5, 0.1, 0.3, 0.2], evaluation.fidelity
    left = iter(measured)

    def fidelity(*arguments, **options):
        return dataclasses.replace(real_fidelity(*arguments, **options), kl=next(left))

    def stop_at_five(rows, start, batch, copies, seed):
        seen.append(seed[1])
        if seed[1] == 5 and len(seen) == 6:
            raise KeyboardInterrupt
        return real(rows, start, batch, copies, seed)

    monkeypatch.setattr(evaluation, "fidelity", fidelity)
    whole, expected = refine(model, books, tmp_path / "whole")
    assert expected.kept == 2
    assert [check.held_out for check in expected.checks] == measured
    assert (whole.key != books.key).any()
    assert (whole.key.dtype, whole.value.dtype) == (jnp.bfloat16, jnp.float32)

    left = iter(measured)
    monkeypatch.setattr(distillation, "_pieces", stop_at_five)
    with pytest.raises(KeyboardInterrupt):
        refine(model, books, tmp_path / "parts")
    for _ in range(2):  # and once more when it was already done
        parts, found = refine(model, books, tmp_path / "parts")
        same(parts, whole)
        assert found.kept == expected.kept
        np.testing.assert_array_equal(np.asarray(found.checks), np.asarray(expected.checks))
    assert seen == [0, 1, 2, 3, 4, 5, 4, 5]


def test_devices_and_parts_agree_with_one(model, books, tmp_path, monkeypatch):
    books = dataclasses.replace(books, key=books.key.astype(jnp.float32))
    config = DistillConfig(steps=3, batch=8, accumulate=2, rate=0.03, check_every=2)
    devices, real = set(), distillation._step

    def step(*arguments):
        devices.add(len(arguments[-2].sharding.device_set))
        return real(*arguments)

    monkeypatch.setattr(distillation, "_step", step)
    plain = dataclasses.replace(config, accumulate=1)
    one, expected = refine(model, books, tmp_path / "one", plain, devices=jax.devices()[:1])
    many, found = refine(model, books, tmp_path / "many", config)
    assert devices == {1, 4}  # of eight, those that share four sequences evenly
    np.testing.assert_allclose(np.asarray(found.checks), np.asarray(expected.checks), rtol=1e-4)
    for name in ("key", "value"):
        moved = np.abs(getattr(one, name) - getattr(books, name))
        assert moved.max() > 1e-3
        np.testing.assert_allclose(getattr(many, name), getattr(one, name), atol=1e-4)


def test_the_rate_rises_and_falls():
    config = DistillConfig(steps=10, rate=0.5, warmup=3)
    optimizer = distillation._optimizer(config)
    state, steps = optimizer.init(jnp.zeros(())), []
    for _ in range(10):
        update, state = optimizer.update(jnp.ones(()), state)
        steps.append(-float(update))  # Adam's, for a constant gradient, is the rate
    np.testing.assert_allclose(steps[:4], [0.125, 0.25, 0.375, 0.5], rtol=1e-4)
    assert (np.diff(steps[3:]) < 0).all()
    assert 0 < steps[-1] < 0.05


def test_pieces_of_the_text_with_repeated_passages():
    tokens = np.arange(4 * 129).reshape(4, 129)
    tokens[:, 0] = -1  # what every sequence begins with
    plain = distillation._pieces(tokens, 1, 6, 0, (0, 0))
    assert plain.shape == (6, 129)
    assert (plain[:, 0] == -1).all()
    source = tokens[:, 1:].reshape(-1).tolist()
    places = [source.index(row[1]) for row in plain]
    assert len(set(places)) > 3
    for row, place in zip(plain, places, strict=True):
        assert row[1:].tolist() == source[place : place + 128]

    copied = distillation._pieces(tokens, 1, 6, 3, (0, 0))
    for row, place in zip(copied, places, strict=True):
        changed = np.flatnonzero(row[1:] != source[place : place + 128])
        assert 0 < len(changed) <= 3 * 16
        assert set(row.tolist()) <= {-1, *source[place : place + 128]}
    assert (copied != distillation._pieces(tokens, 1, 6, 3, (0, 1))).any()


# Texts


def test_the_model_writes_what_it_thinks_likely(model, tmp_path):
    """The mean surprise at what it wrote is the mean entropy of its predictions."""
    rows = distillation.sample(model, 40, length=40, seed=0, work=tmp_path, name="own")
    assert rows.shape == (40, 40)
    assert rows.dtype == np.int32
    assert len(set(rows[:, 0].tolist())) > 16  # first tokens are drawn from all 64
    positions = jnp.broadcast_to(jnp.arange(40), rows.shape)
    hidden, _ = llama.apply(
        model.graphdef, model.params, rows, positions, lambda q, k, v, _: (causal(q, k, v), None)
    )
    logs = np.asarray(jax.nn.log_softmax(llama.logits(model.graphdef, model.params, hidden)))
    surprise = -np.take_along_axis(logs[:, :-1], rows[:, 1:, None], axis=-1).mean()
    entropy = -(np.exp(logs) * logs)[:, :-1].sum(axis=-1).mean()
    assert entropy < math.log(64) - 0.2  # so that tokens at random are more surprising
    assert -logs[:, :-1].mean() > entropy + 0.4
    assert abs(surprise - entropy) < 0.1


def test_sampling_goes_on_where_it_stopped(model, tmp_path, monkeypatch):
    monkeypatch.setattr(distillation, "_TOGETHER", 2)

    def sample(name="own"):
        return distillation.sample(model, 4, length=12, seed=3, work=tmp_path, name=name)

    whole = sample()
    assert whole.shape == (4, 12)
    assert len(np.unique(whole, axis=0)) == 4
    first, second = sorted(tmp_path.iterdir())
    before = first.stat().st_mtime_ns
    second.unlink()  # as if stopped before it was written
    np.testing.assert_array_equal(sample(), whole)
    assert first.stat().st_mtime_ns == before
    assert (sample("others") != whole).mean() > 0.5


class Letters:
    """A tokenizer of a token a letter, and 0 before each text."""

    def encode(self, text, *, add_bos=True):
        return [0] * add_bos + [ord(x) % 64 for x in text]


NONE = np.zeros((0, 40), np.int32)  # sequences of the calibration text


def test_texts_to_distil_on(tmp_path):
    source = np.full((2, 40), 7)

    def found(**options):
        asked = DistillConfig(steps=1, **options)
        return distillation.sequences(asked, Letters(), source, length=40, calibrated=3)

    def read(pieces, count):
        return text.sequences(pieces, Letters(), length=40, count=count, name="")

    rows, written = found()
    assert (rows.shape, written) == ((0, 40), 0)
    rows, written = found(text=("sampled",), tokens=81)
    assert (rows.shape, written) == ((0, 40), 3)
    file, other = tmp_path / "text.txt", tmp_path / "other.txt"
    file.write_text("abc" * 200)
    other.write_text("de" * 200)
    rows, written = found(text=(str(file),), tokens=100)
    np.testing.assert_array_equal(rows, read(["abc" * 200], 3))
    assert not written
    rows, written = found(text=(str(file), "sampled", str(other)), tokens=240)
    np.testing.assert_array_equal(rows[::2], read(["abc" * 200], 2))
    np.testing.assert_array_equal(rows[1::2], read(["de" * 200], 2))
    assert written == 2
    rows, written = found(text=("sampled", "source"), tokens=120)
    np.testing.assert_array_equal(rows, source)
    assert written == 2


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": 0}, "--distill.batch must be at least 1, got 0"),
        ({"check_every": 0}, "--distill.check-every must be at least 1, got 0"),
        ({"steps": -1}, "--distill.steps must be at least 0, got -1"),
        ({"ema": 1.0}, "--distill.ema must be from 0 to below 1, got 1.0"),
        ({"b2": -0.1}, "--distill.b2 must be from 0 to below 1"),
        ({"rate": 0.0}, "--distill.rate must be a number above 0, got 0.0"),
        ({"rate": math.nan}, "--distill.rate must be a number above 0, got nan"),
        ({"warmup": 3}, r"--distill.warmup must be below --distill.steps \(3\), got 3"),
        ({"accumulate": 3}, r"--distill.accumulate must be a divisor of --distill.batch \(4\)"),
        ({"text": ("sampled",), "tokens": 40}, "two sequences of 40 .* or --distill.tokens"),
        ({"windows": (8, -1)}, r"--distill.windows must be at least 0 each, got \(8, -1\)"),
        ({"beam": 33}, "beam must be from 1 .* to 32, got 33"),
        ({"text": ("sampled", "/no/such.txt")}, r"there is no file /no/such\.txt"),
        ({"text": ()}, "--distill.text must be calibration or texts .* got none"),
        ({"text": ("sampled", "calibration")}, "other than that, got sampled calibration"),
    ],
)
def test_what_cannot_be(options, words):
    config = DistillConfig(**{"steps": 3} | options)
    with pytest.raises(InputError, match=words):
        distillation.sequences(config, Letters(), NONE, length=40, calibrated=3)


def test_one_sequence_is_too_few():
    with pytest.raises(InputError, match=r"two sequences of 40 tokens or more.* or --tokens"):
        distillation.sequences(DistillConfig(steps=1), Letters(), NONE, length=40, calibrated=1)


def test_the_first_of_equals_is_kept():
    checks = [Check(0, math.nan, 0.2), Check(4, 0.3, 0.1), Check(8, 0.2, 0.1)]
    assert distillation._kept(checks) == 4
    assert distillation._kept([Check(0, math.nan, 0.2), Check(4, 0.3, math.nan)]) == 0
