"""The exception for bad input, and what checks of numbers can see."""

from typing import Any

import jax
import numpy as np

from gsrq_jax.kernels.errors import InputError

__all__ = ["InputError", "known"]


def known(x: Any) -> np.ndarray | None:
    """The numbers of an array, for a check; None while a function of it is traced, or where other
    processes have some.

    By NumPy, for under ``jit`` what `jax.numpy` makes even of a concrete array is traced.
    """
    if isinstance(x, jax.core.Tracer | jax.ShapeDtypeStruct):
        return None
    if isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated):
        return None
    return np.asarray(x)
