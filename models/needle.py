"""Retrieval of a number from a long text through a quantised cache, by depth and length.

RULER's "multi-key needle in a haystack" in plain text (arXiv 2404.06654): sentences "The special
magic number for WORD is NUMBER." stand in a running text; one of them, at a chosen depth, is asked
for, the others, at random depths, distract. Protocol:

1. the context is read exactly and the same for every method; its keys and values go into each
   method's cache by `append`, so all that is neither sink nor window is coded;
2. the question, which ends in "The special magic number for WORD is", is read over that cache
   (`generation.extend`), so that the answer depends on the codes;
3. the answer's tokens are read one by one over the cache, as the decode loop does. ``logp`` is the
   mean log-probability of a token of the true answer, ``needle`` the share of answers whose every
   token is the most likely one: those that greedy decoding writes. Tokens that follow a wrong one
   are never judged, so decoding freely would score the same.

Retrieval alone proves nothing about a cache: read it beside perplexity.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from flax import nnx
from jaxtyping import Array, Bool, Float, Float32, Int
from matplotlib.figure import Figure
from tqdm import tqdm

from gsrq_jax.cache import blocks_after
from gsrq_jax.codec import Codec, respec
from gsrq_jax.errors import InputError, at_least
from gsrq_jax.models import fidelity, generation, loading, methods, text, training
from gsrq_jax.models.methods import Calibration
from gsrq_jax.models.runfolder import claim, writing
from gsrq_jax.models.tokenizer import Tokenizer
from gsrq_jax.results import repeated, write_result

HEAD = "Special magic numbers are hidden in the following text. Remember them."
NEEDLE = " The special magic number for {word} is {number}."
QUESTION = "\n\nWhat is the special magic number for {word}? The special magic number for {word} is"
_NOUNS = """
apple anchor basket beaver bottle bridge butter button camera candle canyon carpet castle cellar
cheese cherry circus coffee copper cotton cradle dragon engine falcon feather flower forest garden
ginger guitar hammer harbor helmet honey island jacket jungle kettle ladder lantern lemon lizard
magnet marble meadow mirror monkey needle ocean orange oyster palace pencil pepper pillow planet
pocket potato rabbit ribbon river saddle salmon shadow silver spider statue sugar tablet temple
ticket timber tunnel turtle valley velvet violin walnut wagon window winter zebra
"""
WORDS = tuple(_NOUNS.split())
METRICS = {
    "needle": "answers that greedy decoding writes without a fault",
    "logp": "mean log-probability of a token of the true answer, nats",
}


@dataclasses.dataclass(frozen=True)
class NeedleConfig:
    """Ask for numbers hidden in a long text, over full and quantised caches.

    Attributes:
        method: ``gsrq@1``, ``kivi2`` …, or folders of codebooks, ``+`` options as in
            ``gsrq@1+k16+beam8``; an unknown method or option names them all. The exact cache is
            always asked, too.
        model: folder with config.json and safetensors, .gguf file, hub id, or ``demo``.
        text: text file to hide numbers in, or ``python`` for Python's help topics; no part of it
            should be what methods are fitted to.
        lengths: tokens of context, question and answer together.
        depths: shares of the text before the number that is asked for, from 0 to 1.
        samples: questions for each length and depth.
        keys: numbers in a text, all but one of them to distract.
        window: numbers of recent tokens that stay exact, one result each.
        sinks: first tokens that stay exact.
        batch: texts at a time.
        calibration: what methods that learn are fitted to.
        work: folder where fitted methods are kept for the next run.
        dtype: of the model; the exact parts of caches are bfloat16.
        seed: of texts, words and numbers.
        out: folder of the run, one JSON file a method, a table and a picture; methods can be added
            to what is there.
    """

    method: tyro.conf.UseAppendAction[tuple[str, ...]]
    model: str = "demo"
    text: str = text.PYTHON_TOPICS
    lengths: tuple[int, ...] = (2048, 4096, 8192)
    depths: tuple[float, ...] = (0.0, 0.25, 0.5, 0.75, 1.0)
    samples: int = 10
    keys: int = 4
    window: tuple[int, ...] = (128,)
    sinks: int = 4
    batch: int = 4
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    work: pathlib.Path | None = None
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    seed: int = 0
    out: pathlib.Path = pathlib.Path("runs/needle")


# --- texts ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Samples:
    """Texts of one length with their questions.

    Attributes:
        length: tokens of context, question and answer together, at most.
        depth: ``[n]``.
        context: int32 ``[n, C]``, without padding.
        question: int32 ``[n, Q]``, padded on the right.
        asked: int32 ``[n]``, tokens of each question.
        answer: int32 ``[n, A]``, padded on the right.
        told: int32 ``[n]``, tokens of each answer.
    """

    length: int
    depth: np.ndarray
    context: np.ndarray
    question: np.ndarray
    asked: np.ndarray
    answer: np.ndarray
    told: np.ndarray

    def take(self, rows: Int[np.ndarray, " m"]) -> "Samples":
        """Some of them."""
        arrays = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        length = arrays.pop("length")
        return Samples(length=length, **{name: x[rows] for name, x in arrays.items()})


def sentences(pieces: Iterable[str], tokenizer: Tokenizer) -> list[list[int]]:
    """Token ids of a text cut before the space or newline that ends a sentence or paragraph."""
    whole = "\n\n".join(piece.strip() for piece in pieces)
    parts = re.findall(r"\s*\S.*?(?:[.!?](?=\s)|(?=\n\s*\n)|$)", whole, flags=re.DOTALL)
    return [tokenizer.encode(part, add_bos=False) for part in parts]


def make_samples(
    filler: Sequence[Sequence[int]],
    tokenizer: Tokenizer,
    *,
    lengths: Sequence[int],
    depths: Sequence[float],
    samples: int,
    keys: int,
    seed: int,
) -> list[Samples]:
    """Texts with their questions, for each length ``len(depths)·samples``, depth by depth.

    Words, numbers, the text's start and the distractors' places are drawn for each sample; the
    same seed gives the same ones at every length. All questions have one padded size.

    Raises:
        InputError: if numbers and question leave less than half of a length to the text.
    """
    count = len(depths) * samples
    drawn = [np.random.default_rng([seed, i]) for i in range(count)]
    needles, questions, answers = [], [], []
    for rng in drawn:
        words = rng.choice(WORDS, keys, replace=False)
        numbers = 1_000_000 + rng.choice(9_000_000, keys, replace=False)
        pairs = [{"word": w, "number": n} for w, n in zip(words, numbers, strict=True)]
        needles.append([tokenizer.encode(NEEDLE.format(**p), add_bos=False) for p in pairs])
        question = QUESTION.format(**pairs[0])
        asked = tokenizer.encode(question, add_bos=False)
        both = tokenizer.encode(f"{question} {numbers[0]}", add_bos=False)
        # The tokens that the two share: the space may belong to the answer's first one.
        same = next(
            (i for i, (a, b) in enumerate(zip(asked, both, strict=False)) if a != b), len(asked)
        )
        questions.append(both[:same])
        answers.append(both[same:])
    asked_of, told_of = _padded(questions), _padded(answers)
    head = tokenizer.encode(HEAD)
    found = []
    for length in lengths:
        context = length - asked_of[0].shape[1] - told_of[0].shape[1]
        rooms = [context - len(head) - sum(map(len, n)) for n in needles]
        if min(rooms) < length / 2:
            raise InputError(
                f"of {length} tokens, {keys} numbers and the question leave {min(rooms)} to the "
                "text, less than half; choose longer --lengths or fewer --keys"
            )
        contexts = [
            head
            + _hidden(
                np.random.default_rng([seed, i, 1]), filler, room, needle, depths[i // samples]
            )
            for i, (room, needle) in enumerate(zip(rooms, needles, strict=True))
        ]
        found.append(
            Samples(
                length=length,
                depth=np.repeat(np.asarray(depths), samples),
                context=np.asarray(contexts, np.int32),
                question=asked_of[0],
                asked=asked_of[1],
                answer=told_of[0],
                told=told_of[1],
            )
        )
    return found


def _hidden(
    rng: np.random.Generator,
    filler: Sequence[Sequence[int]],
    room: int,
    needles: Sequence[Sequence[int]],
    depth: float,
) -> list[int]:
    """``room`` tokens of filler from amid a random sentence on, the first needle at ``depth``."""
    begin = int(rng.integers(len(filler)))
    parts: list[list[int]] = []
    excess = -room
    while excess < 0:
        parts.append(list(filler[(begin + len(parts)) % len(filler)]))
        excess += len(parts[-1])
    while excess >= len(parts[0]):
        excess -= len(parts.pop(0))
    parts[0] = parts[0][excess:]
    ends = np.cumsum([0, *map(len, parts)])  # filler tokens before each place between sentences
    goals = [depth, *rng.random(len(needles) - 1)]
    places = [int(np.abs(ends - goal * room).argmin()) for goal in goals]
    ids: list[int] = []
    for place in range(len(ends)):
        for needle, mine in zip(needles, places, strict=True):
            if mine == place:
                ids += needle
        if place < len(parts):
            ids += parts[place]
    return ids


def _padded(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    count = np.asarray([len(row) for row in rows], np.int32)
    ids = np.zeros((len(rows), count.max()), np.int32)
    for to, row in zip(ids, rows, strict=True):
        to[: len(row)] = row
    return ids, count


# --- answers --------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnums=0, static_argnames=("max_length", "dtype"))
def answers(
    graphdef: nnx.GraphDef,
    params: nnx.State,
    codec: Codec | None,
    k: Float[Array, "L B C H d"],
    v: Float[Array, "L B C H d"],
    question: Int[Array, "B Q"],
    asked: Int[Array, " B"],
    answer: Int[Array, "B A"],
    told: Int[Array, " B"],
    *,
    max_length: int,
    dtype: jax.typing.DTypeLike = jnp.bfloat16,
) -> tuple[Float32[Array, " B"], Bool[Array, " B"]]:
    """How likely the true answers are over the cache that ``codec`` makes of a context.

    Args:
        graphdef: of the model.
        params: of the model.
        codec: stacked; None for an exact cache.
        k: rotated keys of the context, from position 0.
        v: its values.
        question: padded on the right.
        asked: tokens of each question.
        answer: padded on the right.
        told: tokens of each answer.
        max_length: tokens that the cache must hold.
        dtype: of the exact parts of the cache.

    Returns:
        Mean log-probability of an answer's tokens, and whether each of them is the most likely one.
    """
    cache = generation.refilled(k, v, codec, max_length=max_length, dtype=dtype)
    logits, cache = generation.extend(graphdef, params, question, asked, cache, codec)

    def step(carry, xs):
        logits, cache = carry
        token, at = xs
        picked = jnp.take_along_axis(jax.nn.log_softmax(logits), token[:, None], axis=-1)[:, 0]
        real = at < told
        judged = jnp.where(real, picked, 0), (logits.argmax(-1) == token) | ~real
        more = (at + 1 < told).astype(jnp.int32)
        logits, cache = generation.extend(graphdef, params, token[:, None], more, cache, codec)
        return (logits, cache), judged

    xs = (answer.T, jnp.arange(answer.shape[1]))
    _, (picked, first) = jax.lax.scan(step, (logits, cache), xs)
    return picked.sum(0) / told, first.all(0)


Answered = dict[Any, tuple[np.ndarray, np.ndarray]]


def ask(
    model: loading.LoadedModel, samples: Samples, caches: Mapping[Any, Codec | None], *, batch: int
) -> Answered:
    """`answers` of every sample over each cache; a context is read once for all of them.

    Returns:
        For each cache float32 ``[n]`` and bool ``[n]``.
    """
    n = len(samples.context)
    found: dict[Any, list[tuple[np.ndarray, np.ndarray]]] = {name: [] for name in caches}
    with tqdm(total=n * len(caches), desc=f"{samples.length} tokens", unit="answer") as bar:
        for start in range(0, n, batch):
            # The last batch is filled up with the last sample: one shape for all of them.
            part = samples.take(np.minimum(np.arange(start, start + batch), n - 1))
            k, v, *_ = training.key_value_samples(
                model.config,
                model.graphdef,
                model.params,
                jnp.asarray(part.context),
                first=0,
                weigh=False,
            )
            for name, codec in caches.items():
                result = answers(
                    model.graphdef,
                    model.params,
                    codec,
                    k,
                    v,
                    *map(jnp.asarray, (part.question, part.asked, part.answer, part.told)),
                    max_length=samples.length,
                )
                found[name].append(jax.device_get(result))
                bar.update(min(batch, n - start))
    return {
        name: (
            np.concatenate([logp for logp, _ in parts])[:n],
            np.concatenate([right for _, right in parts])[:n],
        )
        for name, parts in found.items()
    }


# --- the command ----------------------------------------------------------------------------------


def measure(config: NeedleConfig) -> pathlib.Path:
    """Ask, write a file for each method and what is made from them; returns the folder.

    Raises:
        InputError: for whatever in ``config`` cannot be used; nothing is written then.
    """
    _check(config)
    model = loading.load(config.model, dtype=config.dtype)
    tokenizer = model.needed_tokenizer()
    if max(config.lengths) > model.config.max_length:
        raise InputError(
            f"--lengths {max(config.lengths)} is beyond the context of {model.name}, "
            f"{model.config.max_length} tokens; choose a smaller one"
        )
    filler = sentences(text.read(config.text), tokenizer)
    if not filler:
        raise InputError(f"the text {config.text!r} is empty; give another one")
    texts = make_samples(
        filler,
        tokenizer,
        lengths=config.lengths,
        depths=config.depths,
        samples=config.samples,
        keys=config.keys,
        seed=config.seed,
    )
    contexts = b"".join(samples.context.tobytes() for samples in texts)
    flags = ("lengths", "depths", "samples", "keys", "sinks", "dtype", "seed")
    asked = {name: getattr(config, name) for name in flags} | {
        "model": model.fingerprint,
        "text": hashlib.sha256(contexts).hexdigest(),
        "calibration": dataclasses.asdict(config.calibration),
    }
    with writing(config.out):
        claim(config.out, "needle", asked, begin=False)
    names = list(dict.fromkeys((methods.FULL, *config.method)))
    learned = methods.resolve(names, model, config.calibration, config.work, sinks=config.sinks)
    caches: dict[tuple[str, int], Codec | None] = {}
    shortest = min(samples.context.shape[1] for samples in texts)
    for name, fitted in learned.items():
        for window in config.window if fitted is not None else (0,):
            one = None if fitted is None else respec(fitted, window=window)
            caches[name, window] = one
            if one is not None and not blocks_after(one.spec, jnp.int32(shortest)):
                raise InputError(
                    f"a context of {shortest} tokens fits into the sinks and the window of {name}, "
                    "so that nothing of it would be coded; choose longer --lengths"
                )
    with writing(config.out):
        claim(config.out, "needle", asked)
        found = [ask(model, samples, caches, batch=config.batch) for samples in texts]
        for name in learned:
            rows = [
                row
                for samples, answered in zip(texts, found, strict=True)
                for cache in caches
                if cache[0] == name
                for row in _rows(config, model, samples, cache, caches[cache], answered)
            ]
            file = config.out / f"{fidelity.file_name(name)}.json"
            command = repeated("gsrq-needle", instead={"--method": name}, without=("--work",))
            write_result(file, rows, command=command)
        print(render(config.out))
    return config.out


def _check(config: NeedleConfig) -> None:
    at_least(1, "--", samples=config.samples, keys=config.keys, batch=config.batch)
    at_least(0, "--", seed=config.seed)
    if config.keys > len(WORDS):
        raise InputError(f"--keys must be at most {len(WORDS)}, got {config.keys}")
    if not (config.lengths and config.depths and config.window):
        raise InputError("give at least one of --lengths, --depths and --window each")
    if min(config.window) < 0:
        raise InputError("--window takes numbers from 0 up")
    for depth in config.depths:
        if not 0 <= depth <= 1:
            raise InputError(f"--depths must be from 0 to 1, got {depth}")


def _rows(
    config: NeedleConfig,
    model: loading.LoadedModel,
    samples: Samples,
    cache: tuple[str, int],
    codec: Codec | None,
    answered: Answered,
) -> list[dict[str, Any]]:
    """One cache's row for each depth and metric."""
    name, window = cache
    spec = None if codec is None else codec.spec
    facts = {
        **fidelity.facts(model, name, spec, samples.length),
        "window": window,
        "sinks": 0 if spec is None else spec.sinks,
        "dataset": f"{config.keys} numbers in {pathlib.Path(config.text).stem}",
    }

    def mean(cache: tuple[str, int], metric: str, depth: float) -> float:
        logp, right = answered[cache]
        return float((right if metric == "needle" else logp)[samples.depth == depth].mean())

    return [
        facts
        | {"depth": depth, "n": int((samples.depth == depth).sum()), "metric": metric}
        | {
            "value": mean(cache, metric, depth),
            "full_precision": mean((methods.FULL, 0), metric, depth),
        }
        for depth in dict.fromkeys(samples.depth.tolist())
        for metric in METRICS
    ]


# --- documents ------------------------------------------------------------------------------------


def render(folder: pathlib.Path) -> str:
    """``needle.md`` and ``needle.png`` from the files of all methods; returns the former."""
    files = sorted(x for x in folder.glob("*.json") if x.name != "run.json")
    data = [json.loads(file.read_text(encoding="utf-8")) for file in files]
    data.sort(key=lambda x: (-x["rows"][0]["bits"], x["rows"][0]["method"]))
    written = table(data)
    (folder / "needle.md").write_text(written, encoding="utf-8")
    picture(data).savefig(folder / "needle.png", dpi=120)
    return written


def _read(
    data: Sequence[Mapping[str, Any]],
) -> tuple[dict[tuple, float], list[tuple[str, int]], list[int], list[float]]:
    """Values by cache, length, depth and metric; and the first three of these, in order."""
    values = {
        ((row["method"], row["window"]), row["length"], row["depth"], row["metric"]): row["value"]
        for x in data
        for row in x["rows"]
    }
    caches, lengths, depths, _ = (list(dict.fromkeys(x)) for x in zip(*values, strict=True))
    return values, caches, lengths, depths


def _cell(values: Mapping[tuple, float], cache: Any, length: int, depths: Sequence[float]) -> str:
    share, logp = (np.mean([values[cache, length, d, m] for d in depths]) for m in METRICS)
    return f"{share:.0%} · {logp:.2f}"


def table(data: Sequence[Mapping[str, Any]]) -> str:
    """Shares and log-probabilities by method and length, then by depth; then the commands."""
    values, caches, lengths, depths = _read(data)
    facts = {(r["method"], r["window"]): r for x in data for r in x["rows"]}  # of the last length
    first = data[0]["rows"][0]
    lines = [
        "# Needles",
        "",
        f"{first['model']}, {first['dataset']}, one of them asked for; questions for each "
        f"length and depth: {first['n']}. The context is read exactly and put into each method's "
        "cache; question and answer are read over that. Each cell: "
        f"{METRICS['needle']} · "
        f"{METRICS['logp']}.",
        "",
        "| method | bits | effective | window | "
        + " | ".join(f"{n:,} tokens" for n in lengths)
        + " |",
        "| --- | --- | --- | --- |" + " --- |" * len(lengths),
    ]
    for cache in caches:
        row = facts[cache]
        cells = " | ".join(_cell(values, cache, n, depths) for n in lengths)
        lines.append(
            f"| {row['title']} | {row['bits']:g} | {row['bits_effective']:.2f} "
            f"| {_window(cache)} | {cells} |"
        )
    lines += [
        "",
        f"Bits: of a number's codes; effective: all arrays of the cache at {lengths[-1]:,} tokens.",
        "",
        "![by length and depth](needle.png)",
        "",
    ]
    for length in lengths:
        lines += [
            f"## {length:,} tokens, by depth",
            "",
            "| method | bits | window | " + " | ".join(f"{d:g}" for d in depths) + " |",
            "| --- | --- | --- |" + " --- |" * len(depths),
        ]
        for cache in caches:
            cells = " | ".join(_cell(values, cache, length, [d]) for d in depths)
            row = facts[cache]
            lines.append(f"| {row['title']} | {row['bits']:g} | {_window(cache)} | {cells} |")
        lines.append("")
    lines += ["## Commands", ""]
    lines += [f"- `{x['command']}` on {x['device']}, {x['date'][:10]}" for x in data]
    return "\n".join(lines) + "\n"


def _window(cache: tuple[str, int]) -> str:
    name, window = cache
    return "all" if name == methods.FULL else str(window)


def picture(data: Sequence[Mapping[str, Any]]) -> Figure:
    """A heat map for each length and metric: caches by depth."""
    values, caches, lengths, depths = _read(data)
    facts = {(r["method"], r["window"]): r for x in data for r in x["rows"]}
    names = [
        facts[c]["title"]
        + ("" if c[0] == methods.FULL else f", {facts[c]['bits']:g} bit, W {c[1]}")
        for c in caches
    ]
    size = (5 + (1 + 0.7 * len(depths)) * len(lengths), 3 + 0.6 * len(caches))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(METRICS), len(lengths), sharex=True, sharey=True, squeeze=False)
    labels = ("right answers", "log-probability of a token, nats")
    for line, metric, label in zip(axes, METRICS, labels, strict=True):
        grids = [[[values[c, n, d, metric] for d in depths] for c in caches] for n in lengths]
        least = 0.0 if metric == "needle" else min(-1e-9, float(np.min(grids)))
        most = 1.0 if metric == "needle" else 0.0
        for axis, grid, length in zip(line, grids, lengths, strict=True):
            drawn = axis.imshow(grid, vmin=least, vmax=most, cmap="viridis", aspect="auto")
            for y, row in enumerate(grid):
                for x, value in enumerate(row):
                    shade = "black" if value > (least + most) / 2 else "white"
                    shown = f"{value:.0%}" if metric == "needle" else f"{value:.2f}"
                    axis.text(x, y, shown, ha="center", va="center", color=shade, fontsize=7)
            axis.set_xticks(range(len(depths)), [f"{d:g}" for d in depths])
            axis.set_yticks(range(len(caches)), names)
            if metric == "needle":
                axis.set_title(f"{length:,} tokens", fontsize="medium")
            else:
                axis.set_xlabel("depth")
        figure.colorbar(drawn, ax=list(line)).set_label(label, fontsize="small")
    return figure
