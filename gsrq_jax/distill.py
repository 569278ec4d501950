"""Refinement of codebooks end to end: codes by the encoder, gradient into the codewords (ours).

The loss is any differentiable function of the codebooks, by custom the Kullback-Leibler divergence
of the model over its quantised cache from the model at full precision. Codewords move relative to
the root mean square of their stage, so that one learning rate serves keys and values, first and
last stages.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from gsrq_jax.codebook import Codebooks

Moves = dict[str, Array]


class DistillState(NamedTuple):
    """What changes from step to step.

    Attributes:
        moves: float32, ``key`` and ``value`` as in `Codebooks`, in units of a stage's RMS.
        average: exponential moving average of the moves, from where they began.
        optimizer: optax's state.
    """

    moves: Moves
    average: Moves
    optimizer: optax.OptState


def init(optimizer: optax.GradientTransformation, codebooks: Codebooks) -> DistillState:
    """The state before the first step."""

    def zeros() -> Moves:
        return {
            "key": jnp.zeros(codebooks.key.shape, jnp.float32),
            "value": jnp.zeros(codebooks.value.shape, jnp.float32),
        }

    return DistillState(zeros(), zeros(), optimizer.init(zeros()))


def moved(codebooks: Codebooks, moves: Moves) -> Codebooks:
    """The codebooks after ``moves``, codewords in float32."""
    key = moved_words(codebooks.key, moves["key"])
    value = moved_words(codebooks.value, moves["value"])
    return dataclasses.replace(codebooks, key=key, value=value)


def moved_words(
    words: Float[Array, "*lead R K g"], move: Float[Array, "*lead R K g"]
) -> Float[Array, "*lead R K g"]:
    """Codewords after a move, float32; of two a stage the mean moves in the first stage alone."""
    words = words.astype(jnp.float32)
    rms = jnp.sqrt(jnp.mean(jnp.square(words), axis=(-2, -1), keepdims=True))
    if words.shape[-2] == 2:
        later = jnp.arange(words.shape[-3])[:, None, None] > 0
        move = move - jnp.where(later, move.mean(axis=-2, keepdims=True), 0)
    return words + rms * move


def step(
    loss: Callable[[Codebooks, Any], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    codebooks: Codebooks,
    state: DistillState,
    parts: Any,
    *,
    ema: float = 0.0,
) -> tuple[DistillState, Float[Array, ""]]:
    """One step of the optimizer; jit it with ``loss`` and ``optimizer`` bound.

    Args:
        loss: of the codebooks on a part of the batch; differentiable in the codewords, as
            `gsrq_jax.attention.attend_as_cached` is (codes carry no gradient).
        optimizer: from optax.
        codebooks: where the refinement began.
        state: so far.
        parts: what ``loss`` takes, stacked on a leading axis; the step is by the mean of their
            losses, whose activations exist for one part at a time.
        ema: decay of ``state.average`` in a step; 0 makes it the moves themselves.

    Returns:
        The next state, and the loss before the step.
    """

    def add(total: tuple[Array, Moves], part: Any):
        new = jax.value_and_grad(lambda m: loss(moved(codebooks, m), part))(state.moves)
        return jax.tree.map(jnp.add, total, new), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, state.moves))
    total, _ = jax.lax.scan(add, zero, parts)
    count = len(jax.tree.leaves(parts)[0])
    value, gradient = jax.tree.map(lambda x: x / count, total)
    updates, optimizer_state = optimizer.update(gradient, state.optimizer, state.moves)
    moves = optax.apply_updates(state.moves, updates)
    average = jax.tree.map(lambda old, new: ema * old + (1 - ema) * new, state.average, moves)
    return DistillState(moves, average, optimizer_state), value
