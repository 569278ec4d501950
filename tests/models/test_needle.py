"""Needles: texts, answers against recomputation and against the decode loop, the command."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from small_model import CONFIG, codebooks, model, read_through_cache

from gsrq_jax import codebook
from gsrq_jax.cache import init_cache
from gsrq_jax.errors import InputError
from gsrq_jax.models import commands, generation, loading, needle
from gsrq_jax.models.needle import NEEDLE, QUESTION, WORDS

# DESIGN, "Measuring": what every row of a fidelity result says.
ROW = "model method preset bits bits_effective window sinks dataset length n metric value"
TEXT = " ".join(f"Sentence number {i} is about nothing." for i in range(400))


@pytest.fixture(scope="session")
def roomy_model(tmp_path_factory):
    """The tiny model with a context that holds needles: a token is a byte."""
    folder = tmp_path_factory.mktemp("needle") / "tiny"
    return tiny.make_model_folder(folder, max_position_embeddings=1024)


@pytest.fixture(scope="session")
def haystack(tmp_path_factory):
    file = tmp_path_factory.mktemp("needle") / "text.txt"
    file.write_text(TEXT)
    return file


@pytest.fixture(scope="session")
def loaded(roomy_model):
    return loading.load(roomy_model, dtype="float32")


@pytest.fixture(scope="session")
def texts(loaded):
    """Two samples at each of three depths, for two lengths."""
    filler = needle.sentences([TEXT], loaded.tokenizer)
    return needle.make_samples(
        filler,
        loaded.tokenizer,
        lengths=(700, 900),
        depths=(0.0, 0.5, 1.0),
        samples=2,
        keys=3,
        seed=0,
    )


# --- texts ----------------------------------------------------------------------------------------


def written(loaded, samples, i):
    """Context, question and answer of a sample as text."""
    decode = loaded.tokenizer.decode
    return (
        decode(samples.context[i]),
        decode(samples.question[i, : samples.asked[i]]),
        decode(samples.answer[i, : samples.told[i]]),
    )


def test_every_text_hides_its_answer_once_at_its_depth(loaded, texts):
    for samples in texts:
        size = samples.question.shape[1] + samples.answer.shape[1]
        assert samples.context.shape == (6, samples.length - size)
        assert samples.depth.tolist() == [0, 0, 0.5, 0.5, 1, 1]
        for i, depth in enumerate(samples.depth):
            context, question, answer = written(loaded, samples, i)
            (word,) = [w for w in WORDS if question == QUESTION.format(word=w)]
            assert len(answer) == 8
            assert answer[0] == " "
            hidden = NEEDLE.format(word=word, number=int(answer))
            assert context.count(hidden) == 1
            assert context.count("The special magic number for") == 3
            rest = len(context) - len(needle.HEAD) - 3 * len(hidden)
            before = context.index(hidden) - len(needle.HEAD)
            others = context[: context.index(hidden)].count("special magic number for")
            at = (before - others * len(hidden)) / rest
            assert at == pytest.approx(depth, abs=0.08)  # to the nearest sentence
            assert context[: context.index(hidden)].endswith((".", needle.HEAD[-1]))


def test_texts_differ_between_samples_but_not_between_runs(loaded, texts):
    again = needle.make_samples(
        needle.sentences([TEXT], loaded.tokenizer),
        loaded.tokenizer,
        lengths=(900,),
        depths=(0.0, 0.5, 1.0),
        samples=2,
        keys=3,
        seed=0,
    )[0]
    for name in ("context", "question", "answer"):
        np.testing.assert_array_equal(getattr(again, name), getattr(texts[1], name))
    assert len({row.tobytes() for row in again.context}) == 6
    assert len({row.tobytes() for row in again.answer}) == 6
    np.testing.assert_array_equal(texts[0].answer, texts[1].answer)


def test_sentences_are_the_text(loaded):
    words = "One is 3.5 long. Two?\nstill two\n\n  Three has no end"
    parts = [
        loaded.tokenizer.decode(x) for x in needle.sentences([words, "Four."], loaded.tokenizer)
    ]
    assert parts == [
        "One is 3.5 long.",
        " Two?",
        "\nstill two",
        "\n\n  Three has no end",
        "\n\nFour.",
    ]


# --- answers --------------------------------------------------------------------------------------

C, Q, A = 60, 7, 9  # context, question and answer of the small model, of which blocks of 8 fill


def parts(seed=5):
    rng = np.random.default_rng(seed)
    context, question, answer = (rng.integers(0, CONFIG.vocab_size, (2, n)) for n in (C, Q, A))
    return context, question, np.array([Q, Q - 2]), answer, np.array([A - 3, A])


def judged(codec, context, question, asked, answer, told):
    graphdef, params = model()
    _, (k, v) = jax.jit(read_through_cache)(params, context, np.zeros((2, C), int), None)
    found = needle.answers(
        graphdef,
        params,
        codec,
        k,
        v,
        *map(jnp.asarray, (question, asked, answer, told)),
        max_length=C + Q + A,
        dtype=jnp.float32,
    )
    return jax.device_get(found)


@pytest.mark.parametrize("coded", [False, True])
def test_answers_against_recomputing_everything(coded):
    codec = codebooks() if coded else None
    context, question, asked, answer, told = parts()
    logp, right = judged(codec, context, question, asked, answer, told)
    for i in range(2):
        row = np.concatenate([context[i], question[i, : asked[i]], answer[i, : told[i]]])
        begun = C + asked[i]
        held = np.concatenate([np.zeros(C), np.full(asked[i], C), np.arange(begun, len(row))])
        logits, _ = read_through_cache(model()[1], row[None], held[None].astype(int), codec)
        step = np.asarray(jax.nn.log_softmax(logits[0, begun - 1 : -1]))
        want = step[np.arange(told[i]), answer[i, : told[i]]]
        assert logp[i] == pytest.approx(want.mean(), abs=2e-4)
        assert right[i] == (step.argmax(1) == answer[i, : told[i]]).all()


def test_a_right_answer_is_what_greedy_decoding_writes():
    codec = codebooks()
    graphdef, params = model()
    context, question, asked, _, told = parts()
    options = {"sampler": generation.Sampler(), "eos": ()}

    @jax.jit
    def write(params):
        _, cache = generation.prefill(
            graphdef, params, context, np.full(2, C), codec, max_length=C + Q + A, dtype="float32"
        )
        logits, cache = generation.extend(graphdef, params, question, asked, cache, codec)
        state = generation.start(cache, logits, jax.random.key(0), max_new_tokens=A, **options)
        return generation.decode(graphdef, params, codec, state, jnp.int32(A), **options).tokens

    greedy = np.array(write(params))
    _, right = judged(codec, context, question, asked, greedy, told)
    assert right.tolist() == [True, True]
    greedy[0, told[0]] += 1  # padding
    greedy[1, told[1] - 1] = (greedy[1, told[1] - 1] + 1) % CONFIG.vocab_size
    _, right = judged(codec, context, question, asked, greedy, told)
    assert right.tolist() == [True, False]


def test_a_context_is_read_once_and_batches_do_not_matter(loaded, texts, monkeypatch):
    reads = []
    real = needle.training.key_value_samples
    monkeypatch.setattr(
        needle.training,
        "key_value_samples",
        lambda *a, **o: reads.append(a[3].shape) or real(*a, **o),
    )
    rows = texts[0].take(np.arange(3))
    codecs = {"full": None, "twice": None}
    pairs = needle.ask(loaded, rows, codecs, batch=2)
    assert reads == [(2, rows.context.shape[1])] * 2
    np.testing.assert_array_equal(pairs["full"][0], pairs["twice"][0])
    assert [x.shape for x in pairs["full"]] == [(3,), (3,)]
    single = needle.ask(loaded, rows.take(np.arange(2, 3)), {"full": None}, batch=2)
    np.testing.assert_allclose(pairs["full"][0][2], single["full"][0][0], atol=1e-3)


# --- the command ----------------------------------------------------------------------------------

FLAGS = ("--lengths", "600", "--depths", "0", "1", "--samples", "1", "--keys", "2", "--batch", "2")


@pytest.fixture(scope="session")
def flags(roomy_model, haystack, tiny_run):
    """Of a run over the codebooks of the tiny run, with two windows."""
    return (
        *("--model", str(roomy_model), "--text", str(haystack), "--dtype", "float32", *FLAGS),
        *("--method", str(tiny_run / "codebooks"), "--sinks", "2", "--window", "8", "40"),
    )


@pytest.fixture(scope="session")
def run(flags, tmp_path_factory):
    """The folder of a run, to which another method was added."""
    out = tmp_path_factory.mktemp("needle") / "run"
    commands.measure_needle([*flags, "--out", str(out)])
    commands.measure_needle([*flags[:-7], "--method", "int8", *flags[-5:-1], "--out", str(out)])
    return out


@pytest.fixture(scope="session")
def results(run):
    files = [x for x in run.glob("*.json") if x.name != "run.json"]
    return {x.stem: json.loads(x.read_text()) for x in files}


def test_rows_are_what_was_measured(results, tiny_run):
    assert len(results) == 3
    assert {"full", "int8"} < set(results)
    books = codebook.load(tiny_run / "codebooks")
    shape = {"batch": 1, "kv_heads": 2, "head_dim": 8, "max_length": 600}
    full = {(r["depth"], r["metric"]): r["value"] for r in results["full"]["rows"]}
    assert len(full) == len(results["full"]["rows"]) == 4
    seen = {}
    for name, data in results.items():
        assert {"command", "device", "versions", "date", "commit"} <= set(data)
        for row in data["rows"]:
            assert set(ROW.split()) - {"preset"} <= set(row)
            assert (row["length"], row["n"]) == (600, 1)
            assert row["full_precision"] == full[row["depth"], row["metric"]]
            value = row["value"]
            assert (0 <= value <= 1) if row["metric"] == "needle" else value < 0
            if row["metric"] == "logp" and row["depth"] == 0:
                seen[name, row["window"]] = value
            spec = None
            if name not in ("full", "int8"):
                spec = dataclasses.replace(books.spec, window=row["window"])
                assert (row["bits"], row["sinks"]) == (1, 2)
            if name != "int8":
                bits = 8 * init_cache(spec, **shape).nbytes / (2 * 600 * 2 * 8)
                assert row["bits_effective"] == pytest.approx(bits)
    assert len(seen) == len(set(seen.values())) == 4  # no two caches answer alike
    assert abs(seen["int8", 8] - seen["full", 0]) < 0.01


def test_documents_say_what_the_rows_say(run, results):
    document = (run / "needle.md").read_text()
    assert (run / "needle.png").read_bytes().startswith(b"\x89PNG")
    assert needle.render(run) == document
    rows = results["full"]["rows"]
    share, logp = (
        np.mean([r["value"] for r in rows if r["metric"] == m]) for m in ("needle", "logp")
    )
    bits = rows[0]["bits_effective"]
    cell = f"{share:.0%} · {logp:.2f}"
    assert f"| full precision | 16 | {bits:.2f} | all | {cell} |" in document
    by_depth = document.split("## 600 tokens, by depth")[1]
    for window in (8, 40):
        assert len(re.findall(rf"\| tiny \| 1 \| {window} \|", by_depth)) == 1
    (line,) = (x for x in by_depth.splitlines() if x.startswith("| int8"))
    at_end = next(
        r["value"] for r in results["int8"]["rows"] if (r["depth"], r["metric"]) == (1, "logp")
    )
    assert line.endswith(f"· {at_end:.2f} |")
    for data in results.values():
        assert data["command"].count("--method") == 1
        assert f"- `{data['command']}` on" in document


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--lengths", "1025"), "1025 is beyond the context of tiny, 1024 tokens"),
        (("--lengths", "300"), "less than half"),
        (("--keys", "8"), "less than half"),
        (("--keys", "1000"), f"at most {len(WORDS)}"),
        (("--keys", "0"), "--keys must be at least 1"),
        (("--samples", "0"), "--samples must be at least 1"),
        (("--seed", "-1"), "--seed must be at least 0, got -1"),
        (("--window", "-1"), "--window takes numbers from 0 up"),
        (("--depths", "1.5"), "--depths must be from 0 to 1, got 1.5"),
        (("--depths",), "at least one of"),
        (("--method", "nonesuch"), "unknown method 'nonesuch'"),
        (("--window", "590"), "nothing of it would be coded"),
        (("--text", "nowhere.txt"), "nowhere.txt"),
        (("--text", "/dev/null"), "/dev/null"),
        (("--seed", "1"), "another"),
    ],
)
def test_bad_input(flags, run, more, message, capsys):
    before = {x.name: x.read_bytes() for x in run.iterdir()}
    capsys.readouterr()
    with pytest.raises(SystemExit) as caught:
        commands.measure_needle([*flags, *more, "--out", str(run)])
    assert caught.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
    assert {x.name: x.read_bytes() for x in run.iterdir()} == before


def test_an_empty_text(roomy_model, tmp_path):
    (tmp_path / "text").write_text("\n")
    config = needle.NeedleConfig(
        method=("full",), model=str(roomy_model), text=str(tmp_path / "text"), lengths=(600,)
    )
    with pytest.raises(InputError, match="empty"):
        needle.measure(config)
