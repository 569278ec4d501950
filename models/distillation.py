"""Codebooks refined so that the model over its cache predicts what it does at full precision.

A part of the text is only looked at: what is kept is the state with the least divergence there.
"""

import dataclasses
import functools
import math
import pathlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from gsrq_jax import calibration, distill
from gsrq_jax.codebook import Codebooks
from gsrq_jax.codec import respec
from gsrq_jax.errors import InputError, at_least
from gsrq_jax.models import evaluation, generation, processes, sharding, text
from gsrq_jax.models.loading import LoadedModel
from gsrq_jax.models.text import SAMPLED, SOURCE
from gsrq_jax.models.tokenizer import Tokenizer
from gsrq_jax.spec import check_beam

CALIBRATION = "calibration"


@dataclasses.dataclass(frozen=True)
class DistillConfig:
    """End-to-end refinement of codewords by the divergence of the model's predictions.

    Attributes:
        steps: of Adam, each some six forward passes of its batch; 0 is no refinement.
        batch: sequences of a step.
        accumulate: parts of the batch that are computed one after the other, to save memory.
        rate: highest learning rate, in units of each stage's RMS codeword entry.
        warmup: steps in which the rate rises to that; afterwards it falls to 0 by a cosine.
        b2: decay of Adam's squared gradients.
        ema: decay of an average of the codewords that is checked and kept instead of the last
            ones; 0 is none.
        copies: passages of each sequence that come a second time in it.
        beam: of the encoder while codewords move; the cache keeps its own, which then finds codes
            at least as near.
        windows: numbers of recent exact tokens that steps take in turn, and checks all of; by
            default the cache's alone.
        check_every: steps from one check on held-out sequences to the next.
        text: ``calibration``, the end of which is then not calibrated on but checked on; or texts
            that share ``tokens`` evenly: files, ``python``, ``source`` for the text that is
            calibrated on, but what is held out of it to measure on, and ``sampled`` for what the
            model writes itself.
        tokens: to read, and to sample.
    """

    steps: int = 0
    batch: int = 4
    accumulate: int = 1
    rate: float = 0.01
    warmup: int = 0
    b2: float = 0.99
    ema: float = 0.0
    copies: int = 4
    beam: int = 1
    windows: tuple[int, ...] = ()
    check_every: int = 20
    text: tuple[str, ...] = (CALIBRATION,)
    tokens: int = 65_536

    @property
    def on_calibration(self) -> bool:
        """Whether it is to be on the text that codebooks are fitted to."""
        return self.steps > 0 and CALIBRATION in self.text


class Check(NamedTuple):
    """Divergences in nats a token: on pieces since the last check (NaN at step 0), held out."""

    step: int
    train: float
    held_out: float


@dataclasses.dataclass(frozen=True)
class Refinement:
    """What a refinement found.

    Attributes:
        kept: step whose codewords were kept.
        sequences: that pieces were cut from.
        held_out: sequences that were kept out of them.
        checks: at step 0, every ``check_every`` steps and after the last one.
    """

    kept: int
    sequences: int
    held_out: int
    checks: list[Check]


def share(config: DistillConfig, *, length: int) -> int:
    """Sequences of ``length`` tokens that each of the texts is to give."""
    return -(-config.tokens // (length * len(config.text)))


def sequences(
    config: DistillConfig,
    tokenizer: Tokenizer,
    source: Int[np.ndarray, "s T"],
    *,
    length: int,
    calibrated: int,
) -> tuple[Int[np.ndarray, "m T"], int]:
    """What there is to read, and how many sequences `sample` is to write beside it.

    None of either if the ``calibrated`` ones are to be distilled on. ``source`` are those that the
    text of this name has, at most `share`.

    Raises:
        InputError: if there are fewer than two, or ``config`` cannot be.
    """
    _validate(config)
    rows, written, count = np.zeros((0, length), np.int32), 0, calibrated
    if not config.on_calibration:
        each = share(config, length=length)
        written = each * config.text.count(SAMPLED)
        parts = [
            source
            if x == SOURCE
            else text.sequences(text.read(x), tokenizer, length=length, count=each, name=x)
            for x in config.text
            if x != SAMPLED
        ]
        rows = text.interleaved([rows, *parts])
        count = len(rows) + written
    if count < 2:
        more = "--tokens" if config.on_calibration else "--distill.tokens"
        raise InputError(
            f"distillation needs two sequences of {length} tokens or more, one to check on; "
            f"give more text or {more}, or a smaller --length"
        )
    return rows, written


def held_out(sequences: int) -> int:
    """How many of these a refinement keeps to check on: an eighth, from 1 to 8."""
    return min(max(sequences // 8, 1), 8)


def _validate(config: DistillConfig) -> None:
    def refuse(name: str, must: str) -> None:
        raise InputError(f"--distill.{name} must be {must}, got {getattr(config, name)}")

    positive = ("batch", "accumulate", "check_every", "tokens")
    at_least(1, "--distill.", **{name: getattr(config, name) for name in positive})
    at_least(0, "--distill.", steps=config.steps, copies=config.copies, warmup=config.warmup)
    check_beam(config.beam)
    if not config.text or (CALIBRATION in config.text and len(config.text) > 1):
        raise InputError(
            f"--distill.text must be {CALIBRATION} or texts other than that, got "
            f"{' '.join(config.text) or 'none'}"
        )
    if min(config.windows, default=0) < 0:
        refuse("windows", "at least 0 each")
    for name in ("b2", "ema"):
        if not 0 <= getattr(config, name) < 1:
            refuse(name, "from 0 to below 1")
    if not 0 < config.rate < math.inf:
        refuse("rate", "a number above 0")
    if config.warmup >= config.steps > 0:
        refuse("warmup", f"below --distill.steps ({config.steps})")
    if config.batch % config.accumulate:
        refuse("accumulate", f"a divisor of --distill.batch ({config.batch})")


def sample(
    model: LoadedModel,
    count: int,
    *,
    length: int,
    seed: int,
    work: pathlib.Path,
    name: str,
    mesh: Mesh | None = None,
) -> Int[np.ndarray, "count T"]:
    """Sequences that the model writes at full precision and temperature 1.

    Each begins as the tokenizer begins a text; where it adds nothing, with a token drawn uniformly
    from the vocabulary (as LLM-QAT does, arXiv 2305.17888). The model writes on after an
    end-of-text token, as in text packed for training. Finished batches are kept in ``work`` under
    ``name``, of which sequences of other names are independent. Several processes write together,
    on the ``mesh`` of the model.
    """
    start = _start(model)
    generator = generation.Generator(
        model.graphdef,
        model.params,
        sampler=generation.Sampler(temperature=1.0),
        dtype=jax.tree.leaves(model.params)[0].dtype,
        mesh=mesh,
    )
    rows: list[np.ndarray] = []
    with tqdm(total=count * length, desc="sample", unit="tok") as bar:
        for index, first in enumerate(range(0, count, _TOGETHER)):
            size = min(_TOGETHER, count - first)
            file = work / f"{name}-{index:03}.npz"
            if not processes.agreed(file.exists()):
                rng = np.random.default_rng((seed, index, *name.encode()))
                drawn = rng.integers(model.config.vocab_size, size=(size, 0 if start else 1))
                prompts = [[*start, *row] for row in drawn.tolist()]
                new = length - len(prompts[0])
                for state in generator(
                    prompts,
                    max_new_tokens=new,
                    max_length=length,
                    seed=int(rng.integers(2**31)),
                    stride=_STRIDE,
                ):
                    done = int(state.count[0])
                    bar.n = (first * length) + size * done
                    bar.refresh()
                made = np.concatenate([np.asarray(prompts), np.asarray(state.tokens)], axis=1)
                made = made.astype(np.int32)
                processes.once(functools.partial(calibration.save_leaves, file, made))
            rows += calibration.load_leaves(file)
            bar.n = (first + size) * length
            bar.refresh()
    return np.concatenate(rows)


_TOGETHER = 128  # sequences sampled at a time
_STRIDE = 64  # tokens between looks at the device


def refine(
    model: LoadedModel,
    codebooks: Codebooks,
    rows: Int[np.ndarray, "m T"],
    config: DistillConfig,
    *,
    seed: int,
    work: pathlib.Path,
    devices: Sequence[jax.Device] | None = None,
) -> tuple[Codebooks, Refinement]:
    """Codebooks that are better on held-out sequences, in the dtype of those given.

    Each step reads ``batch`` sequences cut anywhere from the text, in each of which ``copies``
    passages come a second time: copying from far back is what coded keys break first, and little
    text asks for it. The loss is the mean KL divergence of the next-token predictions, each
    position seeing the cache as `gsrq_jax.attention.attend_as_cached` shows it.

    The last sequences, `held_out` says how many, are kept out of the pieces, with passages repeated
    likewise; ``codebooks`` should not be fitted to them. Before the first step, every
    ``check_every`` steps and after the last one the divergence is measured there; the codewords
    with the least one are returned. The state is saved with each check: an interrupted run goes on
    from ``work`` to the same result.

    Args:
        model: whose predictions count.
        codebooks: where to begin.
        rows: at least two sequences.
        config: how.
        seed: of the pieces.
        work: folder for the state.
        devices: that share the sequences of a step, see `sharing`; None is all local ones. Each
            holds the whole model.

    Raises:
        InputError: if several processes cannot share the sequences of a step evenly.
    """
    kept, codebooks = codebooks, respec(codebooks, beam=config.beam)
    held = held_out(len(rows))
    start = len(_start(model))
    source, checked = rows[:-held], rows[-held:].copy()
    _repeat(checked[:, start:], config.copies, np.random.default_rng(seed))

    windows = config.windows or (codebooks.spec.window,)
    devices = sharing(config, jax.local_devices() if devices is None else devices)
    mesh = Mesh(np.array(devices), ("data",))
    everywhere, split = NamedSharding(mesh, P()), NamedSharding(mesh, P(None, "data"))
    if jax.process_count() == 1:
        params = jax.device_put(model.params, everywhere)
    else:
        params = sharding.replicated(mesh, model.params)
    begun = jax.device_put(codebooks, everywhere)
    exact = [
        evaluation.exact_hidden(model.graphdef, model.params, jnp.asarray(x)[None]) for x in checked
    ]

    file = work / "distill.npz"
    state = distill.init(_optimizer(config), codebooks)
    best: distill.Moves = state.average
    checks: list[Check] = []

    def check(state: distill.DistillState, done: int, losses: list[float]) -> None:
        """Notes the divergence on held-out sequences, and the state if it is the best."""
        nonlocal best
        average = jax.tree.map(np.array, state.average)
        books = _settled(codebooks, average)
        divergences = [
            evaluation.fidelity(
                model.graphdef, model.params, checked, books, window=window, exact=exact
            ).kl
            for window in windows
        ]
        train = float(np.mean(losses)) if losses else math.nan
        checks.append(Check(done, train, float(np.mean(divergences))))
        if _kept(checks) == done:
            best = average
        noted = state, best, np.asarray(checks)
        processes.once(functools.partial(calibration.save_leaves, file, noted))

    if processes.agreed(file.exists()):
        *leaves, table = calibration.load_leaves(file)
        state, best = jax.tree.unflatten(jax.tree.structure((state, best)), leaves)
        checks = [Check(int(step), train, held_out) for step, train, held_out in table.tolist()]
    else:
        check(state, 0, [])
    state = jax.device_put(state, everywhere)

    losses: list[float] = []
    first = checks[-1].step
    bar = tqdm(
        range(first, config.steps), initial=first, total=config.steps, desc="distil", unit="step"
    )
    for index in bar:
        pieces = _pieces(source, start, config.batch, config.copies, (seed, index))
        parts = pieces.reshape(config.accumulate, -1, rows.shape[1])
        state, loss = _step(
            model.graphdef,
            config,
            mesh,
            params,
            begun,
            state,
            jax.device_put(parts, split),
            jnp.int32(windows[index % len(windows)]),
        )
        losses.append(float(loss))
        if (index + 1) % config.check_every == 0 or index + 1 == config.steps:
            check(state, index + 1, losses)
            losses = []
        shown = losses[-1] if losses else checks[-1].train
        bar.set_postfix(kl=f"{shown:.4f}", held_out=f"{checks[-1].held_out:.4f}")
    found = Refinement(_kept(checks), len(source), held, checks)
    return _settled(kept, best), found


def sharing(config: DistillConfig, devices: Sequence[jax.Device]) -> list[jax.Device]:
    """Those of the devices that share the sequences of a step: as many as divide them evenly.

    Raises:
        InputError: if that leaves out some of several processes' devices.
    """
    rows = config.batch // config.accumulate
    share = math.gcd(rows, len(devices))
    if share < len(devices) and jax.process_count() > 1:
        raise InputError(
            f"{len(devices)} devices of {jax.process_count()} processes cannot share {rows} "
            "sequences of a step of distillation evenly; choose --distill.batch so that, over "
            "--distill.accumulate, it is a multiple of the devices"
        )
    return list(devices[:share])


def _optimizer(config: DistillConfig) -> optax.GradientTransformation:
    low = config.rate / (config.warmup + 1)
    rate = optax.warmup_cosine_decay_schedule(low, config.rate, config.warmup, config.steps)
    return optax.adam(rate, b2=config.b2)


@functools.partial(jax.jit, static_argnames=("graphdef", "config", "mesh"), donate_argnames="state")
def _step(
    graphdef: nnx.GraphDef,
    config: DistillConfig,
    mesh: Mesh,
    params: nnx.State,
    codebooks: Codebooks,
    state: distill.DistillState,
    parts: Int[Array, "A B T"],
    window: Int[Array, ""],
) -> tuple[distill.DistillState, Float[Array, ""]]:
    """`distill.step`, the sequences of each part shared by the devices of ``mesh``."""

    @functools.partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=(P(), P(), P(), P("data")),
        out_specs=P(),
        check_vma=False,
    )
    def loss(params: nnx.State, window: Array, books: Codebooks, rows: Array) -> Float[Array, ""]:
        sums = evaluation.compare(graphdef, params, rows, books, window=window, remat=True)
        return jax.lax.pmean(sums["kl"] / (rows.shape[0] * (rows.shape[1] - 1)), "data")

    return distill.step(
        functools.partial(loss, params, window),
        _optimizer(config),
        codebooks,
        state,
        parts,
        ema=config.ema,
    )


def _settled(codebooks: Codebooks, moves: distill.Moves) -> Codebooks:
    """The codebooks after ``moves``, in their own dtype."""
    new = distill.moved(codebooks, moves)
    key, value = new.key.astype(codebooks.key.dtype), new.value.astype(codebooks.value.dtype)
    return dataclasses.replace(new, key=key, value=value)


def _kept(checks: list[Check]) -> int:
    """The step of the least held-out divergence, the first of several."""
    return min(checks, key=lambda check: check.held_out).step


def _start(model: LoadedModel) -> list[int]:
    """The tokens that every sequence begins with."""
    return [] if model.tokenizer is None else list(model.tokenizer.encode(""))


def _pieces(
    rows: Int[np.ndarray, "n T"], start: int, batch: int, copies: int, seed: tuple[int, int]
) -> Int[np.ndarray, "batch T"]:
    """Sequences cut anywhere from the text behind ``rows``, passages of it repeated.

    The first ``start`` tokens are those that every sequence begins with.
    """
    rng = np.random.default_rng(seed)
    source = rows[:, start:].reshape(-1)
    room = rows.shape[1] - start
    begins = rng.integers(0, len(source) - room + 1, batch)
    pieces = np.stack([source[begin : begin + room] for begin in begins])
    _repeat(pieces, copies, rng)
    return np.concatenate([np.tile(rows[0, :start], (batch, 1)), pieces], axis=1)


def _repeat(pieces: Int[np.ndarray, "batch n"], copies: int, rng: np.random.Generator) -> None:
    """Writes ``copies`` passages of each sequence, up to an eighth of it, over later ones."""
    room = pieces.shape[1]
    for row in pieces:
        for _ in range(copies):
            length = int(rng.integers(room // 64, room // 8 + 1))
            origin, target = sorted(rng.integers(0, room - length + 1, 2))
            row[target : target + length] = row[origin : origin + length].copy()
