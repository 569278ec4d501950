"""Codebooks refined so that the model over its cache predicts what it does at full precision."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from gsrq_jax import calibration, distill
from gsrq_jax.codebook import Codebooks
from gsrq_jax.models import evaluation
from gsrq_jax.models.loading import LoadedModel


def refine(
    model: LoadedModel,
    codebooks: Codebooks,
    tokens: Int[np.ndarray, "n T"],
    *,
    steps: int,
    batch: int,
    rate: float,
    copies: int,
    seed: int,
    work: pathlib.Path,
) -> Codebooks:
    """Distil for ``steps`` steps of Adam on pieces of ``tokens``; codewords in float32.

    Each step reads ``batch`` sequences cut anywhere from the text, in each of which ``copies``
    passages come a second time: copying from far back is what coded keys break first, and little
    text asks for it. The loss is the mean KL divergence of the next-token predictions, each
    position seeing the cache as `gsrq_jax.attention.attend_as_cached` shows it. The rate falls to 0
    by a cosine. An interrupted run goes on from ``work``.

    Args:
        model: whose predictions count.
        codebooks: where to begin.
        tokens: calibration sequences.
        steps: of the optimizer.
        batch: sequences of a step, of the length of those of ``tokens``.
        rate: first learning rate, in units of each stage's RMS codeword entry.
        copies: passages repeated in each sequence.
        seed: of the pieces.
        work: folder for the state.
    """

    def loss(books: Codebooks, rows: Int[Array, "B T"]) -> Float[Array, ""]:
        sums = evaluation.compare(model.graphdef, model.params, rows, books, remat=True)
        return sums["kl"] / (rows.shape[0] * (rows.shape[1] - 1))

    optimizer = optax.adam(optax.cosine_decay_schedule(rate, steps), b2=0.99)
    step = jax.jit(functools.partial(distill.step, loss, optimizer), donate_argnums=1)
    state = distill.init(optimizer, codebooks)
    file = work / "distill.npz"
    done = 0
    if file.exists():
        *leaves, count = map(jnp.asarray, calibration.load_leaves(file))
        state, done = jax.tree.unflatten(jax.tree.structure(state), leaves), int(count)

    start = 0 if model.tokenizer is None else len(model.tokenizer.encode(""))
    bar = tqdm(range(done, steps), initial=done, total=steps, desc="distil", unit="step")
    for index in bar:
        rows = _pieces(tokens, start, batch, copies, (seed, index))
        state, value = step(codebooks, state, rows)
        bar.set_postfix(kl=f"{float(value):.4f}")
        if (index + 1) % _SAVE_EVERY == 0 or index + 1 == steps:
            calibration.save_leaves(file, (state, index + 1))
    return distill.moved(codebooks, state.moves)


_SAVE_EVERY = 16


def _pieces(
    tokens: Int[np.ndarray, "n T"], start: int, batch: int, copies: int, seed: tuple[int, int]
) -> Int[np.ndarray, "batch T"]:
    """Sequences cut anywhere from the text behind ``tokens``, passages of it repeated.

    The first ``start`` tokens are those that every sequence begins with.
    """
    rng = np.random.default_rng(seed)
    text = tokens[:, start:].reshape(-1)
    room = tokens.shape[1] - start
    begins = rng.integers(0, len(text) - room + 1, batch)
    rows = np.stack([text[begin : begin + room] for begin in begins])
    for row in rows:
        for _ in range(copies):
            length = int(rng.integers(room // 64, room // 8 + 1))
            origin, target = sorted(rng.integers(0, room - length + 1, 2))
            row[target : target + length] = row[origin : origin + length].copy()
    return np.concatenate([np.tile(tokens[0, :start], (batch, 1)), rows], axis=1)
