"""A run of LongBench: prompts read once, answered with each method's cache, scored, tabled.

`eval_longbench.py` is this with its flags. One folder a run: ``run.json`` (what was asked for),
``<method>-w<window>/<task>.jsonl`` (predictions as LongBench's own ``eval.py`` reads them, appended
as they are made), ``report.json``, and ``report.md`` and ``report.png`` made from it. A run that
was stopped goes on where it was, in the same batches; methods and windows can be added to a
finished one.
"""

import dataclasses
import functools
import hashlib
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from jaxtyping import Array, Bool
from tqdm import tqdm

from gsrq_jax import codec as codecs
from gsrq_jax.cache import KVCache
from gsrq_jax.codec import Codec
from gsrq_jax.errors import InputError, at_least
from gsrq_jax.models import (
    fidelity,
    generation,
    loading,
    longbench,
    longbench_metrics,
    longbench_report,
    methods,
)
from gsrq_jax.models.generation import DecodeState, Sampler
from gsrq_jax.models.longbench import Row
from gsrq_jax.models.methods import Calibration
from gsrq_jax.models.runfolder import WORK, Lines, claim, plain, writing


@dataclasses.dataclass(frozen=True)
class LongBenchConfig:
    """Run LongBench with full and quantised KV caches.

    Attributes:
        method: ``full``, ``gsrq@1``, ``kivi2`` …, or folders of codebooks, ``+`` options as in
            ``gsrq@1+k16+beam8``; an unknown method or option names them all. Prompts are read once
            for all of them.
        model: folder with config.json and safetensors, .gguf file, hub id, or ``demo``.
        data: folder of ``<task>.jsonl``, LongBench's data.zip, or a hub id.
        tasks: their names, or ``en``, ``zh``, ``e`` (LongBench-E) for all of a kind.
        max_length: tokens of a prompt, longer ones lose their middle; by default as many as the
            model's context leaves room for.
        window: numbers of recent tokens that stay exact, one result each.
        sinks: first tokens that stay exact.
        batch: prompts at a time.
        buckets: lengths that prompts are padded to; each is compiled for every method.
        limit: rows a task, the first ones; all by default.
        keep: what the cache keeps of a coded block: ``codes``, or what they decode to, which
            attends alike.
        calibration: what methods that learn are fitted to.
        work: folder where fitted methods are kept for the next run; by default ``work`` in ``out``.
        seed: of the bootstrap.
        dtype: of the model.
        out: folder of the run.
    """

    method: tyro.conf.UseAppendAction[tuple[str, ...]]
    model: str = "demo"
    data: str = longbench.HUB_ID
    tasks: tuple[str, ...] = ("en",)
    max_length: int | None = None
    window: tuple[int, ...] = (128,)
    sinks: int = 4
    batch: int = 8
    buckets: int = 4
    limit: int | None = None
    keep: Literal["codes", "decoded"] = "codes"
    calibration: Calibration = dataclasses.field(default_factory=Calibration)
    work: pathlib.Path | None = None
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    out: pathlib.Path = pathlib.Path("runs/longbench")


def evaluate(config: LongBenchConfig) -> pathlib.Path:
    """Run what is not done yet, then score all of it; returns the path of ``report.json``.

    Raises:
        InputError: for whatever in ``config`` cannot be used, and for a disk that is full or not
            ours to write. No answer is written if ``config`` was at fault.
    """
    at_least(1, "--", batch=config.batch, buckets=config.buckets)
    at_least(0, "--", seed=config.seed)
    if min(config.window, default=-1) < 0:
        raise InputError("--window takes numbers from 0 up, at least one")
    if not config.method:
        raise InputError(f"no method is named; give at least --method {methods.FULL}")
    tasks = longbench.select(config.tasks)
    for task in tasks:
        longbench_metrics.require(task.metric)
    rows = longbench.load(config.data, tasks, limit=config.limit)
    model = loading.load(config.model, dtype=config.dtype)
    prompts = _prompts(config, model, rows)
    asked = _asked(config, model, rows, prompts)
    out = config.out
    with writing(out):
        claim(out, "longbench", asked, begin=False)
        ways = _ways(config, model)
        claim(out, "longbench", asked)
        for way in ways:
            way.claim(out)
        done = {
            way: {task.name: Lines(out / way.name / f"{task.name}.jsonl") for task in tasks}
            for way in ways
        }
        _answer(config, model, rows, prompts, done)
        found = longbench_report.write(
            out,
            config=plain(config),
            model=model,
            rows=rows,
            length=max(map(len, prompts)),
            ways=[
                (
                    way.method,
                    None if way.codec is None else way.codec.spec,
                    {(task, x["_id"]): x["pred"] for task, y in lines.items() for x in y.rows},
                )
                for way, lines in done.items()
            ],
            seed=config.seed,
        )
    print(f"\n{longbench_report.summary(found)}\n\nreport: {out / 'report.md'}")
    return out / "report.json"


# --- what is asked --------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, eq=False)
class Way:
    """A method with its window.

    Attributes:
        method: as it was named.
        name: of its folder.
        codec: stacked; None for full precision.
    """

    method: str
    name: str
    codec: Codec | None

    def claim(self, out: pathlib.Path) -> None:
        """Make its folder, or find that its answers are those of this codec."""
        try:
            claim(out / self.name, "method", {"codec": self.digest()})
        except InputError as error:
            raise InputError(
                f"{out / self.name} holds answers over another codec than {self.method} is now, or "
                "something else; choose another --out, or remove it to start anew"
            ) from error

    def digest(self) -> str:
        """Changes with whatever its answers depend on."""
        digest = hashlib.sha256(repr(self.codec and self.codec.spec).encode())
        for leaf in jax.tree.leaves(self.codec):
            digest.update(np.ascontiguousarray(leaf).tobytes())
        return digest.hexdigest()


def _ways(config: LongBenchConfig, model: loading.LoadedModel) -> list[Way]:
    found = methods.resolve(
        config.method,
        model,
        config.calibration,
        config.work or config.out / WORK,
        window=config.window[0],
        sinks=config.sinks,
    )
    ways = []
    for method, codec in found.items():
        name = fidelity.file_name(method)
        if codec is None:
            ways.append(Way(method, name, None))
            continue
        for window in dict.fromkeys(config.window):
            ways.append(Way(method, f"{name}-w{window}", codecs.respec(codec, window=window)))
    names = [way.name for way in ways]
    if len(set(names)) < len(names):
        raise InputError(f"two of {', '.join(config.method)} would share a folder; rename one")
    return ways


def _prompts(
    config: LongBenchConfig, model: loading.LoadedModel, rows: Sequence[Row]
) -> list[list[int]]:
    tokenizer, context = model.needed_tokenizer(), model.config.max_length
    prompts = []
    for row in rows:
        room = longbench.room(row.task, tokenizer, context)
        length = room if config.max_length is None else config.max_length
        if length < 2:
            raise InputError(
                f"the context of {model.name}, {context} tokens, has no room for a prompt of "
                f"{row.task.name} and {row.task.max_new_tokens} new tokens; leave the task out"
                if config.max_length is None
                else f"--max-length must be at least 2, got {length}"
            )
        ids = longbench.prompt(row, tokenizer, length)
        if len(ids) + row.task.max_new_tokens > context:
            raise InputError(
                f"the prompt of {row.task.name} {row.id}, {len(ids)} tokens, with "
                f"{row.task.max_new_tokens} new ones is beyond the context of {model.name}, "
                f"{context} tokens; choose a smaller --max-length"
            )
        prompts.append(ids)
    return prompts


def _asked(
    config: LongBenchConfig,
    model: loading.LoadedModel,
    rows: Sequence[Row],
    prompts: Sequence[list[int]],
) -> dict[str, Any]:
    """What may not change between the parts of one run: content rather than paths."""
    digest = hashlib.sha256()
    for row, ids in zip(rows, prompts, strict=True):
        digest.update(json.dumps([row.task.name, row.id, row.answers, ids]).encode())
    asked = plain(config)
    for name in ("out", "work", "method", "window", "seed"):
        del asked[name]
    return asked | {"model": [model.name, model.fingerprint["weights"]], "data": digest.hexdigest()}


# --- answers --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Batch:
    """Prompts that are read together.

    Attributes:
        rows: indices of them.
        length: tokens that they are padded to.
    """

    rows: tuple[int, ...]
    length: int


def batches(
    lengths: Sequence[int], limits: Sequence[int], *, size: int, buckets: int
) -> list[Batch]:
    """All prompts in batches of ``size``, in few lengths, the longest first.

    Args:
        lengths: tokens of each prompt.
        limits: new tokens that each may have; alike ones go together.
        size: of a batch; a bucket's last one may have fewer.
        buckets: at most so many padded lengths, in equal steps up to the longest prompt's.
    """
    longest = max(lengths)
    edges = [-(-longest * (i + 1) // buckets // _STEP) * _STEP for i in range(buckets)]
    edges[-1] = -(-longest // _STEP) * _STEP
    groups: dict[int, list[int]] = {edge: [] for edge in reversed(edges)}
    for i in sorted(range(len(lengths)), key=lambda i: (-limits[i], -lengths[i])):
        groups[next(edge for edge in edges if lengths[i] <= edge)].append(i)
    return [
        Batch(tuple(group[start : start + size]), edge)
        for edge, group in groups.items()
        for start in range(0, len(group), size)
    ]


_STEP = 128  # padded lengths are multiples of it


def _answer(
    config: LongBenchConfig,
    model: loading.LoadedModel,
    rows: Sequence[Row],
    prompts: Sequence[list[int]],
    done: Mapping[Way, Mapping[str, Lines]],
) -> None:
    """Predictions for all rows that have none, in each way."""
    known = {
        way: {(task, x["_id"]) for task, y in lines.items() for x in y.rows}
        for way, lines in done.items()
    }

    def missing(way: Way, batch: Batch) -> list[int]:
        return [i for i in batch.rows if (rows[i].task.name, rows[i].id) not in known[way]]

    limits = [row.task.max_new_tokens for row in rows]
    runner = Runner(model, batch=config.batch, max_new_tokens=max(limits))
    plan = batches(list(map(len, prompts)), limits, size=config.batch, buckets=config.buckets)
    total = len(rows) * len(done)
    left = sum(len(missing(way, batch)) for batch in plan for way in done)
    with tqdm(total=total, initial=total - left, desc="answer", unit="row") as bar:
        for batch in plan:
            todo = {way: x for way in done if (x := missing(way, batch))}
            if not todo:
                continue
            here = [rows[i] for i in batch.rows]
            exact = runner.read([prompts[i] for i in batch.rows], batch.length)
            for way, indices in todo.items():
                codec = way.codec
                if codec is not None and config.keep == "decoded":
                    codec = codecs.decoded(codec)
                answers = dict(zip(batch.rows, runner.answer(exact, here, codec), strict=True))
                new: dict[str, list[dict[str, Any]]] = {}
                for i in indices:
                    record = _record(rows[i], prompts[i], answers[i], model)
                    new.setdefault(rows[i].task.name, []).append(record)
                for task, records in new.items():
                    done[way][task].add(records)
                bar.update(len(indices))


def _record(
    row: Row, prompt: list[int], answer: list[int], model: loading.LoadedModel
) -> dict[str, Any]:
    """A line that LongBench's ``eval.py`` can read."""
    return {
        "_id": row.id,
        "pred": model.tokenizer.decode(answer),
        "answers": row.answers,
        "all_classes": row.all_classes,
        "length": row.length,
        "prompt_tokens": len(prompt),
        "new_tokens": len(answer),
    }


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Exact:
    """Prompts that were read: what every method's cache is made of.

    Attributes:
        logits: float32 ``[B, V]`` after each prompt's last token.
        cache: exact, of all layers.
    """

    logits: Array
    cache: KVCache


@dataclasses.dataclass(frozen=True, eq=False)
class Runner:
    """Prefill once, then a cache and a decode loop for each method, compiled once a shape.

    Attributes:
        model: that answers.
        batch: prompts at a time.
        max_new_tokens: that any answer may have.
    """

    model: loading.LoadedModel
    batch: int
    max_new_tokens: int

    @property
    def eos(self) -> tuple[int, ...]:
        """Tokens that end any answer."""
        known = self.model.tokenizer.eos
        return self.model.config.eos_tokens or (() if known is None else (known,))

    def read(self, prompts: Sequence[list[int]], length: int) -> Exact:
        """Prefill up to a batch of prompts, padded to ``length`` tokens."""
        tokens = np.zeros((self.batch, length), np.int32)
        count = np.ones(self.batch, np.int32)
        for i, ids in enumerate(prompts):
            tokens[i, : len(ids)] = ids
            count[i] = len(ids)
        model = self.model
        logits, cache = _prefill(
            model.graphdef, model.params, tokens, count, None, max_length=length
        )
        return Exact(logits, cache)

    def answer(self, exact: Exact, rows: Sequence[Row], codec: Codec | None) -> list[list[int]]:
        """Greedy answers to prompts that were read, with the cache of ``codec`` (None: exact)."""
        model = self.model
        stops = [longbench.stops(row.task, model.tokenizer) for row in rows]
        limits = np.zeros(self.batch, np.int32)
        limits[: len(rows)] = [row.task.max_new_tokens for row in rows]
        banned = np.zeros(exact.logits.shape, bool)
        for i, tokens in enumerate(stops):
            banned[i, list(tokens + self.eos) if tokens else []] = True
        new, eos = self.max_new_tokens, self.eos
        capacity = exact.cache.capacity + new
        state = _begin(exact, codec, banned, capacity=capacity, new=new, eos=eos)
        reached = 1
        for limit in sorted(set(limits[: len(rows)].tolist())):
            state = state.replace(done=state.done | (limits <= reached))
            steps = jnp.int32(limit - reached)
            state = _decode(
                model.graphdef, model.params, codec, state, steps, sampler=Sampler(), eos=eos
            )
            reached = limit
        tokens, count = jax.device_get((state.tokens, state.count))
        return [_until(tokens[i, : count[i]].tolist(), stops[i]) for i in range(len(rows))]


def _until(tokens: list[int], stops: tuple[int, ...]) -> list[int]:
    """Up to the first stop, it included: what follows was written in vain."""
    end = next((i for i, token in enumerate(tokens) if token in stops), len(tokens))
    return tokens[: end + 1]


_prefill = jax.jit(generation.prefill, static_argnums=0, static_argnames="max_length")
_decode = jax.jit(
    generation.decode, static_argnums=0, static_argnames=("sampler", "eos"), donate_argnums=3
)


@functools.partial(jax.jit, static_argnames=("capacity", "new", "eos"))
def _begin(
    exact: Exact,
    codec: Codec | None,
    banned: Bool[Array, "B V"],
    *,
    capacity: int,
    new: int,
    eos: tuple[int, ...],
) -> DecodeState:
    """The state from which a method decodes: its cache of the prompts, the first token chosen."""
    cache = generation.recoded(exact.cache, codec, max_length=capacity)
    logits = jnp.where(banned, -jnp.inf, exact.logits)
    return generation.start(
        cache, logits, jax.random.key(0), max_new_tokens=new, sampler=Sampler(), eos=eos
    )
