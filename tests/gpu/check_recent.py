"""On a Hopper GPU: attention of a new token over sinks, itself and the window, against float64.

    python tests/gpu/check_recent.py

Prints for each case the largest error of outputs and log-sum-exps, for outputs over the size of
values; exits with 1 if one is above its bound. Slots that hold nothing are NaN.
"""

import dataclasses
import sys

import jax
import jax.numpy as jnp
import numpy as np
from gpu_checks import exit_code, recent_of

from gsrq_jax.kernels import mosaic_gpu_recent, reference

BOUND = 1e-5  # float32 sums of products of bfloat16, and powers of 2 to two bits in the last place


@dataclasses.dataclass(frozen=True)
class Case:
    """B sequences, H KV heads of q query heads, S sinks and C slots, all filled or at random."""

    B: int = 2
    H: int = 8
    q: int = 4
    d: int = 128
    S: int = 4
    C: int = 640
    full: bool = False


CASES = [
    Case(),
    Case(B=1, full=True),
    Case(B=9, d=64, q=3, H=3, C=257),
    Case(B=40, full=True),
    Case(B=3, q=8, d=64, C=131),
    Case(B=3, q=1, S=0, C=101),
    Case(B=1, H=2, C=40_000, S=4),
]


def arguments(case: Case, seed: int) -> tuple[np.ndarray, reference.Recent]:
    """Of `attend_recent`; NaN in all that may not be read. A sequence has nothing but itself, and
    if there are three, one not even that."""
    rng = np.random.default_rng(seed)
    B, H, d = case.B, case.H, case.d
    held = np.full(B, case.C) if case.full else rng.integers(0, case.C + 1, B)
    sinks = np.full(B, case.S) if case.full else rng.integers(0, case.S + 1, B)
    first, new = rng.integers(0, 10**6, B), np.ones(B)
    if not case.full and B > 1:
        held[-1] = sinks[-1] = 0
    if not case.full and B > 2:
        new[-2] = held[-2] = sinks[-2] = 0
    keys, values = rng.normal(size=(2, B, H, case.S + case.C + 1, d))
    query = 3 * rng.normal(size=(B, 1, H, case.q, d)) / d**0.5
    counts = {"sinks": sinks, "first": first, "held": held, "new": new}
    return query.astype(np.float32), recent_of(keys, values, case.C, jnp.bfloat16, **counts)


def exact(query: np.ndarray, recent: reference.Recent) -> tuple[np.ndarray, np.ndarray]:
    """The same in float64, one sequence after the other."""
    *arrays, sinks, first, held, new = recent
    out, lse = np.zeros(query.shape), np.full(query.shape[:-1], -np.inf)
    for b in range(len(query)):
        slots = (first[b] + np.arange(held[b])) % arrays[1].shape[2]

        keys, values = (
            np.concatenate([np.float64(x) for x in parts], axis=1)
            for parts in (
                (few[b, :, : sinks[b]], np.swapaxes(own[b], 0, 1)[:, : new[b]], ring[b][:, slots])
                for few, ring, own in (arrays[:3], arrays[3:])
            )
        )
        if not keys.shape[1]:
            continue
        scores = np.float64(query[b, 0]) @ np.swapaxes(keys, 1, 2)
        top = scores.max(-1, keepdims=True)
        weights = np.exp(scores - top)
        total = weights.sum(-1, keepdims=True)
        out[b, 0], lse[b, 0] = weights @ values / total, (top + np.log(total))[..., 0]
    return out, lse


def check(case: Case, seed: int) -> float:
    """The largest error; infinite where something is not finite that should be."""
    given = arguments(case, seed)

    def whole(*arrays):
        return reference.merge(list(zip(*mosaic_gpu_recent.attend_recent(*arrays), strict=True)))

    out, lse = map(np.asarray, jax.jit(whole)(*given))
    want, want_lse = exact(*given)
    some = np.isfinite(want_lse)
    off = np.abs(np.where(some, lse - np.where(some, want_lse, 0), 0))
    off = np.where(some | (lse == -np.inf), off, np.inf)
    error = max(np.abs(out - want).max(), off.max())
    error = float(error) if np.isfinite(error) else np.inf
    print(case, "|", f"error {error:.1e}", flush=True)
    return error


def main() -> int:
    return exit_code(CASES, lambda case, seed: [] if check(case, seed) <= BOUND else ["error"])


if __name__ == "__main__":
    sys.exit(main())
