"""On a Hopper GPU: the kernels of k-means against float64.

    python tests/gpu/check_cluster.py

Prints for each case how many codes are not those of float64, what they lose, and relative errors of
scores and sums; exits with 1 if something is above its bound.
"""

import dataclasses
import sys

import jax
import numpy as np
from gpu_checks import exit_code

from gsrq_jax.kernels import mosaic_gpu_cluster

BOUNDS = {
    "other codes": 5e-5,  # of three of four products of bfloat16 pieces: some 7 in a million differ
    "lost": 1e-5,  # by those, of the score's scale ‖x‖·‖c‖
    "square": 1e-5,
    "sums": 1e-5,
    "numbers": 1e-5,
}


def score_bound(channels: int) -> float:
    """How far a score ``2⟨x, c⟩ − ‖c‖²`` may be off, of its scale ‖x‖·‖c‖.

    Two sources, of which the first is the larger one (8.2e-6 together for 64 channels, 5.0e-6 for
    256). The number of codewords is in neither, for only the best score of a point is compared.

    - Of each ``x_i c_i`` the product of lower pieces is left out, and what two pieces do not hold.
      Rounding is evenly spread over half a unit of the eighth bit, as root mean square 0.378 × 2⁻⁸
      of a number; so these three are (0.378 × 2⁻⁸)² = 2.2e-6 of ``x_i c_i`` each, of either sign,
      3.8e-6 together, and those of d channels 7.6e-6 / √d in a score. Of 10,000 points one has five
      times as much; the bound is eight times. (With all signs alike it would be 6e-5.)
    - Tensor cores cut sums off at 24 bits, always towards zero. The d / 16 steps of upper pieces
      have sums up to those of the nearest codeword, five times ‖x‖·‖c‖ / √d, and lose up to 2⁻²³ of
      them: twice that is 7.5e-8 √d in a score. The squared length comes last and is cut off once,
      by up to 2⁻²³ ‖c‖², which the margin above covers for ‖c‖ up to 8 ‖x‖. (When it came first, 3
      d / 16 steps were cut off as numbers of its size: 1.3e-5 for d = 192, ‖x‖ = 1 and ‖c‖ = 8.)
    """
    return 8 * 7.6e-6 / channels**0.5 + 7.5e-8 * channels**0.5


@dataclasses.dataclass(frozen=True)
class Case:
    """P problems of n points of d channels and K codewords, and so many kinds of sums.

    ``unit`` scores directions.
    """

    P: int
    n: int
    d: int
    K: int
    unit: bool = False
    kinds: int = 1


CASES = [
    Case(2, 10_007, 128, 256),
    Case(1, 20_000, 128, 16, unit=True, kinds=2),
    Case(3, 4_099, 64, 40, kinds=2),
    Case(1, 6_001, 256, 300),
    Case(1, 65, 64, 16),
    Case(1, 9_973, 192, 1024, unit=True),
]


def check(case: Case, seed: int) -> dict[str, float]:
    """What `too_large` bounds; infinite where a code is out of range or a second run differs."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(case.P, case.n, case.d)).astype(np.float32)
    c = (rng.normal(size=(case.P, case.K, case.d)) / 2).astype(np.float32)
    factors = rng.uniform(size=(case.P, case.kinds, case.n)).astype(np.float32)
    numbers = rng.uniform(size=(case.P, 2, case.n)).astype(np.float32)

    def nearest(x, c):
        return mosaic_gpu_cluster.nearest(x, c, unit=case.unit)

    def sums(*arrays):
        return mosaic_gpu_cluster.cell_sums(*arrays, case.K)

    code, score, square = map(np.asarray, jax.jit(nearest)(x, c))
    points, words = np.float64(x), np.float64(c)
    if case.unit:
        points /= np.linalg.norm(points, axis=-1, keepdims=True)
    exact = 2 * points @ np.swapaxes(words, 1, 2) - np.square(words).sum(-1)[:, None]
    best = exact.argmax(-1)
    scale = np.linalg.norm(points, axis=-1) * np.linalg.norm(words, axis=-1).max()
    own = np.take_along_axis(exact, np.clip(code, 0, case.K - 1)[..., None], -1)[..., 0]

    arrays = x, best.astype(np.int32), factors, numbers
    found = jax.tree.map(np.asarray, jax.jit(sums)(*arrays))
    again = jax.tree.map(np.asarray, jax.jit(sums)(*arrays))
    total = np.zeros((case.P, case.kinds, case.K, case.d))
    counted = np.zeros((case.P, 2, case.K))
    for p in range(case.P):
        for i in range(case.kinds):
            np.add.at(total[p, i], best[p], np.float64(factors[p, i])[:, None] * np.float64(x[p]))
        for i in range(2):
            np.add.at(counted[p, i], best[p], np.float64(numbers[p, i]))
    errors = {
        "other codes": np.mean(code != best),
        "lost": ((exact.max(-1) - own) / scale).max(),
        "score": (np.abs(score - exact.max(-1)) / scale).max(),
        "square": np.abs(square / np.square(np.float64(x)).sum(-1) - 1).max(),
        "sums": np.abs(found[0] - total).max() / np.abs(total).max(),
        "numbers": np.abs(found[1] - counted).max() / counted.max(),
    }
    if not jax.tree.all(jax.tree.map(np.array_equal, found, again)):
        errors["sums"] = np.inf
    if not ((code >= 0) & (code < case.K)).all():
        errors["other codes"] = np.inf
    print(case, "|", ", ".join(f"{name} {error:.1e}" for name, error in errors.items()), flush=True)
    return {name: float(error) for name, error in errors.items()}


def too_large(case: Case, errors: dict[str, float]) -> list[str]:
    """Names of the errors that are not within their bounds."""
    bounds = BOUNDS | {"score": score_bound(case.d)}
    return [name for name, bound in bounds.items() if not errors[name] <= bound]


def main() -> int:
    return exit_code(CASES, lambda case, seed: too_large(case, check(case, seed)))


if __name__ == "__main__":
    sys.exit(main())
