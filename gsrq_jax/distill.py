"""Refinement of codebooks end to end: codes by the encoder, gradient into the codewords (ours).

The loss is any differentiable function of the codebooks, by custom the Kullback-Leibler divergence
of the model over its quantised cache from the model at full precision. Codewords move relative to
the root mean square of their stage, so that one learning rate serves keys and values, first and
last stages.
"""

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
        optimizer: optax's state.
    """

    moves: Moves
    optimizer: optax.OptState


def init(optimizer: optax.GradientTransformation, codebooks: Codebooks) -> DistillState:
    """The state before the first step."""
    moves = {
        "key": jnp.zeros(codebooks.key.shape, jnp.float32),
        "value": jnp.zeros(codebooks.value.shape, jnp.float32),
    }
    return DistillState(moves, optimizer.init(moves))


def moved(codebooks: Codebooks, moves: Moves) -> Codebooks:
    """The codebooks after ``moves``, codewords in float32."""

    def add(words: Array, move: Array) -> Array:
        words = words.astype(jnp.float32)
        rms = jnp.sqrt(jnp.mean(jnp.square(words), axis=(-2, -1), keepdims=True))
        return words + rms * move

    return Codebooks(
        key=add(codebooks.key, moves["key"]),
        value=add(codebooks.value, moves["value"]),
        key_mean=codebooks.key_mean,
        inv_freq=codebooks.inv_freq,
        spec=codebooks.spec,
    )


def step(
    loss: Callable[[Codebooks, Any], Float[Array, ""]],
    optimizer: optax.GradientTransformation,
    codebooks: Codebooks,
    state: DistillState,
    batch: Any,
) -> tuple[DistillState, Float[Array, ""]]:
    """One step of the optimizer; jit it with ``loss`` and ``optimizer`` bound.

    Args:
        loss: of the codebooks on a batch; differentiable in the codewords, as
            `gsrq_jax.attention.attend_as_cached` is (codes carry no gradient).
        optimizer: from optax.
        codebooks: where the refinement began.
        state: so far.
        batch: what ``loss`` takes.

    Returns:
        The next state, and the loss before the step.
    """
    value, gradient = jax.value_and_grad(lambda m: loss(moved(codebooks, m), batch))(state.moves)
    updates, new = optimizer.update(gradient, state.optimizer, state.moves)
    return DistillState(optax.apply_updates(state.moves, updates), new), value
