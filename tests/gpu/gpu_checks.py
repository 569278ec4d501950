"""What the checks that run on a GPU have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from gsrq_jax.kernels.reference import Recent


def exit_code(cases: Sequence[Any], too_large: Callable[[Any, int], list[str]]) -> int:
    """1 if any case, each with a seed of its own, has errors that are too large or fails."""
    print(jax.__version__, jax.devices()[0].device_kind, flush=True)
    bad = False
    for seed, case in enumerate(cases):
        try:
            found = too_large(case, seed)
        except Exception as error:  # the other cases still say something
            found = [f"{type(error).__name__}: {str(error)[:300]}"]
        if found:
            print(case, "| TOO LARGE:", *found, flush=True)
        bad |= bool(found)
    return int(bad)


def recent_of(
    keys: np.ndarray,
    values: np.ndarray,
    ring: int,
    dtype: Any,
    *,
    sinks: np.ndarray,
    first: np.ndarray,
    held: np.ndarray,
    new: np.ndarray,
) -> Recent:
    """Of arrays ``[B, H, n, d]``: slots of sinks, those of a ring, and new tokens, as many as the
    most of ``new``, at least one. NaN in what does not hold a token.

    Args:
        keys: of all.
        values: likewise.
        ring: slots.
        dtype: of both.
        sinks: as `Recent` has them, like all that follow.
        first: likewise.
        held: likewise.
        new: likewise.
    """
    tokens = max(1, int(new.max()))
    most = keys.shape[2] - ring - tokens
    slot = (np.arange(ring) - first[:, None]) % ring
    there = np.concatenate(
        [
            np.arange(most) < sinks[:, None],
            slot < held[:, None],
            np.arange(tokens) < new[:, None],
        ],
        axis=1,
    )
    arrays: list[np.ndarray] = []
    for x in (keys, values):
        x = np.where(there[:, None, :, None], x, np.nan).astype(dtype)
        few, window, own = np.split(x, (most, most + ring), axis=2)
        arrays += [few, window, np.swapaxes(own, 1, 2)]
    return Recent(*arrays, *(np.asarray(x, np.int32) for x in (sinks, first, held, new)))
