"""On a Hopper GPU: what the products before attention over codes take, against float64.

    python tests/gpu/check_prepare.py

Prints for each case the largest error of rows in blocks' frames, amplitudes and waves, each in
parts of its bound (`exact`); exits with 1 if one is above 1.
"""

import dataclasses
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_checks import exit_code

from gsrq_jax.kernels import mosaic_gpu, mosaic_gpu_prepare


@dataclasses.dataclass(frozen=True)
class Case:
    """B sequences, T queries, H KV heads, q query heads each, N blocks of b tokens."""

    B: int = 2
    T: int = 1
    H: int = 8
    q: int = 4
    N: int = 16
    b: int = 512
    d: int = 128
    every: int = 16
    first: int = 4
    stride: int = 1

    @property
    def problem(self) -> mosaic_gpu.Problem:
        """Its shapes."""
        c = self
        return mosaic_gpu.Problem(
            batch=c.B,
            tokens=c.T,
            heads=c.H,
            group=c.q,
            blocks=c.N,
            block=c.b,
            dim=c.d,
            key=None,  # type: ignore[arg-type]
            value_stages=4,
            every=c.every,
            stride=c.stride,
        )


CASES = [
    Case(),
    Case(B=1, N=128, b=1024),
    Case(B=3, T=3, H=3, q=5, N=7, d=64, every=64),
    Case(B=1, H=2, q=1, N=3, b=128, every=1),
    Case(B=64, N=8, q=8),
    Case(N=5, d=64, first=1028, stride=3),
    Case(B=1, N=2, b=1024, stride=512, every=64, first=1_000_003),
    Case(B=3, H=1, N=9, every=0),
]


def arguments(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Queries, one of them with a NaN, mean key and frequencies."""
    rng, c = np.random.default_rng(seed), case
    query = rng.normal(size=(c.B, c.T, c.H, c.q, c.d)).astype(np.float32)
    query[-1, 0, -1, -1, 3] = np.nan
    mean = rng.normal(size=(c.H, c.d)).astype(np.float32) if c.every else None
    return query, mean, 500_000.0 ** -np.linspace(0, 1, c.d // 2, dtype=np.float32)


def left(
    case: Any, query: np.ndarray, mean: np.ndarray | None, inv_freq: np.ndarray, *angles: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rows in blocks' frames and amplitudes in float64, and of each the sizes of its two terms.

    ``angles`` are cosines and sines at the starts of blocks.
    """
    c = case
    rows = np.moveaxis(np.float64(query) / np.log(2), 2, 0).reshape(c.H, c.B, -1, c.d)
    rows = np.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % 4), (0, 0)))
    a, b = np.split(rows.reshape(c.H, -1, 1, 4, c.d), 2, axis=-1)
    cos, sin = (np.float64(x)[:, None] for x in angles)
    framed = np.concatenate([a * cos + b * sin, b * cos - a * sin], -1)
    found = [(framed, np.tile(np.abs(a) + np.abs(b), 2))]
    if mean is None:
        return found
    kept = np.where(np.tile(inv_freq * c.every > np.pi, 2) & (c.every > 1), 0, np.float64(mean))
    k_a, k_b = np.split(kept[:, None, None], 2, axis=-1)
    a, b = np.split(rows, 2, axis=-1)
    amplitudes = np.concatenate([a * k_a + b * k_b, b * k_a - a * k_b], -1)
    size = [np.abs(x) + np.abs(y) for x, y in ((a * k_a, b * k_b), (b * k_a, a * k_b))]
    found.append((amplitudes, np.concatenate(size, -1)))
    return found


def exact(
    case: Case, query: np.ndarray, mean: np.ndarray | None, inv_freq: np.ndarray
) -> list[tuple[np.ndarray, np.ndarray]]:
    """`left` and waves in float64, and a bound of the error of each.

    Rows are rounded to float16 once, which holds numbers from 2⁻²⁴ on, after products with cosines
    that are right to 2⁻²²; the other two are in two pieces.
    """
    c, p = case, case.problem

    def turns(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        angles = np.float64(np.float32(positions)[:, None] * inv_freq)  # as models have them
        return np.cos(angles), np.sin(angles)

    starts = turns(c.first + c.stride * c.b * np.arange(c.N))
    (framed, size), *amplitudes = left(case, query, mean, inv_freq, *starts)
    found = [(framed, 2.0**-11 * np.abs(framed) + 2.0**-21 * size + 2.0**-25)]
    if mean is None:
        return found
    found += [(x, 2.0**-21 * size + 2.0**-25) for x, size in amplitudes]
    block, knot = np.divmod(np.arange(p.share_length), p.block_knots)
    cos, sin = turns(c.first + c.stride * c.b * block)
    cos_on, sin_on = turns(knot * c.every)
    waves = np.concatenate([cos * cos_on - sin * sin_on, sin * cos_on + cos * sin_on], -1)
    found.append((waves, np.full(waves.shape, 2.0**-20)))
    return [(x.reshape(-1, c.d), y.reshape(-1, c.d)) if x.ndim > 3 else (x, y) for x, y in found]


def check(case: Case, seed: int) -> float:
    """The largest error over its bound; infinite where NaN is not where it has to be."""
    given = arguments(case, seed)

    @jax.jit
    def run(query, mean, inv_freq, first):
        cos, sin, waves = mosaic_gpu_prepare.waves(case.problem, inv_freq, first)
        made = mosaic_gpu_prepare.prepare(case.problem, query, mean, inv_freq, cos, sin)
        return *made, waves

    framed, amplitudes, waves = run(*given, jnp.int32(case.first))
    got = [np.float64(framed)]
    if amplitudes is not None:
        pieces = np.float64(amplitudes), np.float64(waves)
        if not np.array_equal(pieces[0][:, 0], pieces[0][:, 2], equal_nan=True):
            return np.inf
        if not np.array_equal(pieces[1][:, 0], pieces[1][:, 1]):
            return np.inf
        got += [pieces[0][:, :2].sum(1), pieces[1][:, 1:].sum(1)]
    worst = []
    for x, (want, bound) in zip(got, exact(case, *given), strict=True):
        x, there = x.reshape(want.shape), np.isfinite(want)
        same = np.array_equal(np.isfinite(x), there)
        worst.append(float((np.abs(x - want) / bound)[there].max()) if same else np.inf)
    print(case, "|", *(f"{x:.2g}" for x in worst), flush=True)
    return max(worst)


def main() -> int:
    return exit_code(CASES, lambda case, seed: [] if check(case, seed) <= 1 else ["error"])


if __name__ == "__main__":
    sys.exit(main())
