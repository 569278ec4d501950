"""Stages for keys and values of each layer under a budget (ours).

What a code costs the model is taken to be linear in its distortion: ``loss[r] = slope ·
distortion[r]`` after ``r`` stages, with a slope measured for each side of each layer. Stages then
go one by one to where the next one saves most, which is the best there is where distortions are
convex, as those of residual codes about are.
"""

from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from gsrq_jax.errors import InputError

Allocation = Literal["uniform", "sides", "layers"]


def slopes(
    loss_low: Float[np.ndarray, "*n"],
    loss_high: Float[np.ndarray, "*n"],
    distortion_low: Float[np.ndarray, "*n"],
    distortion_high: Float[np.ndarray, "*n"],
) -> Float[np.ndarray, "*n"]:
    """Loss a unit of distortion, from the losses at few (``low``) and at many stages.

    Slopes that noise makes smaller than a hundredth of the mean are that: every side can be worth a
    stage. They are 0 where there is no less distortion.
    """
    fall = distortion_low - distortion_high
    found = np.where(fall > 0, loss_low - loss_high, 0) / np.where(fall > 0, fall, 1)
    return np.maximum(found, 0.01 * max(found.mean(), 0))


def allocate(
    loss: Float[np.ndarray, "n stages+1"], total: int, *, least: int = 1
) -> Int[np.ndarray, " n"]:
    """Stages of each of ``n`` codes, ``total`` together, so that their losses' sum is small.

    Of codes that would gain alike the one with fewest stages goes first.

    Args:
        loss: of each code after 0, 1 … stages.
        total: to give.
        least: stages that each gets at any rate.

    Raises:
        InputError: if ``total`` is less than ``least`` each, or more than there are.
    """
    codes, most = len(loss), loss.shape[1] - 1
    if not codes * least <= total <= codes * most:
        raise InputError(
            f"{total} stages cannot be given to {codes} codes of {least} to {most} stages each"
        )
    saved = loss[:, :-1] - loss[:, 1:]
    stages = np.full(codes, least)
    for _ in range(total - codes * least):
        following = np.minimum(stages, most - 1)
        gains = np.where(stages < most, saved[np.arange(codes), following], -np.inf)
        stages[np.lexsort((stages, -gains))[0]] += 1
    return stages
