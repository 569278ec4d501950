"""The exception for bad input, and what checks of numbers can see."""

from typing import Any

import jax
import numpy as np

from gsrq_jax.kernels.errors import InputError

__all__ = ["InputError", "at_least", "known"]


def at_least(least: float, prefix: str = "", /, **given: float | None) -> None:
    """Refuse the first of some numbers that is less than ``least``; None stands for one not given.

    Args:
        least: that they may be.
        prefix: before a number's name in the message; ``--`` where it is a flag of a command.
        given: the numbers by name.

    Raises:
        InputError: if there is one.
    """
    for name, number in given.items():
        if number is not None and number < least:
            shown = name.replace("_", "-") if prefix.startswith("--") else name
            raise InputError(f"{prefix}{shown} must be at least {least}, got {number}")


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
