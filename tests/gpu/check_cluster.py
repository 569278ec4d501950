"""On a Hopper GPU: the kernels of k-means against float64.

    python tests/gpu/check_cluster.py

Prints for each case how many codes are not those of float64, what they lose, and relative errors of
scores and sums; exits with 1 if something is above its bound.
"""

import dataclasses
import sys

import jax
import numpy as np

from gsrq_jax.kernels import mosaic_gpu_cluster

BOUNDS = {
    "other codes": 5e-5,  # of three of four products of bfloat16 pieces: some 7 in a million differ
    "lost": 1e-5,  # by those, of the score's scale ‖x‖·‖c‖
    "score": 1e-5,  # likewise
    "square": 1e-5,
    "sums": 1e-5,
    "numbers": 1e-5,
}


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
    """What `BOUNDS` bounds; infinite where a code is out of range or a second run differs."""
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


def too_large(errors: dict[str, float]) -> list[str]:
    """Names of the errors that are not within their bounds."""
    return [name for name, bound in BOUNDS.items() if not errors[name] <= bound]


def main() -> int:
    print(jax.__version__, jax.devices()[0].device_kind, flush=True)
    bad = False
    for i, case in enumerate(CASES):
        try:
            found = too_large(check(case, seed=i))
        except Exception as error:  # the other cases still say something
            found = [f"{type(error).__name__}: {str(error)[:300]}"]
        if found:
            print("TOO LARGE:", *found, flush=True)
        bad |= bool(found)
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
