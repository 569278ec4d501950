"""What the checks that run on a GPU have in common."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


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
