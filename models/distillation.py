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
    seed: int,
    work: pathlib.Path,
) -> Codebooks:
    """Distil for ``steps`` steps of Adam on random batches of ``tokens``; codewords in float32.

    The loss is the mean KL divergence of the next-token predictions, each position seeing the
    cache as `gsrq_jax.attention.attend_as_cached` shows it. The rate falls to 0 by a cosine. An
    interrupted run goes on from ``work``.

    Args:
        model: whose predictions count.
        codebooks: where to begin.
        tokens: calibration sequences.
        steps: of the optimizer.
        batch: sequences of a step.
        rate: first learning rate, in units of each stage's RMS codeword entry.
        seed: of the order of the sequences.
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

    bar = tqdm(range(done, steps), initial=done, total=steps, desc="distil", unit="step")
    for index in bar:
        state, value = step(codebooks, state, tokens[_rows(len(tokens), batch, index, seed)])
        bar.set_postfix(kl=f"{float(value):.4f}")
        if (index + 1) % _SAVE_EVERY == 0 or index + 1 == steps:
            calibration.save_leaves(file, (state, index + 1))
    return distill.moved(codebooks, state.moves)


_SAVE_EVERY = 16


def _rows(sequences: int, batch: int, step: int, seed: int) -> Int[np.ndarray, " batch"]:
    """Sequences of a step: every one is used once before any is used again."""
    places = np.arange(step * batch, (step + 1) * batch)
    orders = {
        epoch: np.random.default_rng((seed, epoch)).permutation(sequences)
        for epoch in set((places // sequences).tolist())
    }
    return np.asarray([orders[place // sequences][place % sequences] for place in places.tolist()])
