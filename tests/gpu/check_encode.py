"""On a Hopper GPU: the kernel that encodes greedily, against scores in float64.

    python tests/gpu/check_encode.py [--time]

Prints for each case the largest loss of a code, of what it may lose (`losses`), and how many codes
are not those of the best score; exits with 1 if one loses more, or a second run differs. With
``--time``, then the microseconds of an encoding, by the kernel and by XLA.
"""

import dataclasses
import functools
import statistics
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
from gpu_checks import exit_code

from gsrq_jax import residual
from gsrq_jax.kernels import mosaic_gpu_encode

UNIT = 2.0**-23  # what tensor cores cut a sum off at, of its largest term
XLA = functools.partial(residual._encode, beam=1, chunk=None)
LOOKED_AT = 1000  # vectors of a problem, from the first to the last


@dataclasses.dataclass(frozen=True)
class Case:
    """P problems of n vectors of G groups of g channels, R stages of K codewords."""

    P: int = 8
    n: int = 8192
    G: int = 1
    R: int = 32
    K: int = 16
    g: int = 128


CASES = [
    Case(),
    Case(P=3, n=1001, R=7),
    Case(P=1, n=1),
    Case(P=2, n=515, G=2, g=64, R=16),
    Case(P=2, n=2049, R=16, K=256),
    Case(P=1, n=777, g=64, R=5, K=40),
    Case(P=70, n=130, R=24),
]


def arguments(case: Case, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Vectors ``[P, n, G g]``, one of them NaN if there are more, and bfloat16 codewords that get
    smaller from stage to stage as residuals do."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(case.P, case.n, case.G * case.g)).astype(np.float32)
    if case.n > 1:
        x[0, case.n // 2] = np.nan
    size = 0.97 ** np.arange(case.R)[:, None, None] * min(1, (np.log2(case.K) / case.g) ** 0.5)
    codewords = size * rng.normal(size=(case.P, case.G, case.R, case.K, case.g))
    return x, np.asarray(codewords, jnp.bfloat16)


def losses(x: np.ndarray, codewords: np.ndarray, codes: np.ndarray) -> tuple[np.ndarray, ...]:
    """How much worse than the best score each code's is, and how much it may be, ``[P, n, G, R]``.

    Scores ⟨residual, c⟩ − ½‖c‖² are in float64, of the residuals that the codes themselves leave. A
    code may lose twice the error of a score. With u = 2⁻²³ and a = Σ|residual_i c_i|, which no term
    and no partial sum exceeds, that is the sum of

    - 18 u a for each of the g / 16 steps of the product of first pieces: 17 terms cut off, and
      their sum; the products of the other pieces are 2⁻⁷ of it in twice as many steps;
    - g u / 2 of ½‖c‖², a sum of g terms in float32, and u (a + ½‖c‖²) for additions;
    - Σ|e_i c_i| for what the residual is off: a subtraction cuts two terms and their sum off, 3 u
      of |residual_i| + |c_i| at the most.
    """
    *lead, n, _ = x.shape
    groups, stages, _, group = codewords.shape[-4:]
    left = np.moveaxis(np.float64(x).reshape(*lead, n, groups, group), -2, -3)  # [P, G, n, g]
    words = np.float64(codewords)
    off = np.zeros_like(left)
    steps = group / 16
    lost, may = [], []
    for r in range(stages):
        c, code = words[..., r, :, :], np.int64(np.swapaxes(codes[..., r], -1, -2))
        across = np.swapaxes(c, -1, -2)
        half = np.square(c).sum(-1)[..., None, :] / 2
        scores, terms = left @ across - half, np.abs(left) @ np.abs(across)
        error = 18 * UNIT * terms * steps * (1 + 2 * 2**-7) + group / 2 * UNIT * half
        error += UNIT * (terms + half) + off @ np.abs(across)
        own = np.take_along_axis(scores, code[..., None], -1)[..., 0]
        lost.append(scores.max(-1) - own)
        may.append(2 * error.max(-1))
        chosen = np.take_along_axis(c, code[..., None], -2)
        off += 3 * UNIT * (np.abs(left) + np.abs(chosen))
        left = left - chosen
    return tuple(np.moveaxis(np.stack(x, -1), -3, -2) for x in (lost, may))


def check(case: Case, seed: int) -> float:
    """The largest loss over what it may be; infinite if a code is none or a second run differs."""
    x, codewords = arguments(case, seed)
    run = jax.jit(lambda *arrays: mosaic_gpu_encode.encode(*arrays))
    codes, again = np.asarray(run(x, codewords)), np.asarray(run(x, codewords))
    if codes.max() >= case.K or codes.dtype != np.uint8 or not np.array_equal(codes, again):
        return np.inf
    some = np.unique(np.linspace(0, case.n - 1, LOOKED_AT).astype(int))
    x = x[:, some]
    lost, may = losses(x, codewords, codes[:, some])
    there = np.isfinite(x).all(-1)
    worst = float((lost / may)[there].max())
    print(case, "|", f"{worst:.2g} of the bound, {np.mean(lost[there] > 0):.1e} others", flush=True)
    return worst


def microseconds(case: Case, calls: int = 4, repeats: int = 7) -> dict[str, float]:
    """Of an encoding by the kernel and by XLA, from programs of several; the median."""
    _, codewords = arguments(case, 0)
    shape = (case.P, case.n, case.G * case.g)
    xs = [jax.random.normal(jax.random.key(i), shape) for i in range(calls)]
    words, found = jnp.asarray(codewords), {}
    for name, encode in (("kernel", mosaic_gpu_encode.encode), ("XLA", XLA)):
        run = jax.jit(lambda xs, words, encode=encode: [encode(x, words) for x in xs])
        jax.block_until_ready(run(xs, words))
        times = []
        for _ in range(repeats):
            start = time.perf_counter()
            jax.block_until_ready(run(xs, words))
            times.append((time.perf_counter() - start) / calls)
        found[name] = 1e6 * statistics.median(times)
        print(case, "|", f"{name}: {found[name]:.0f} µs", flush=True)
    return found


def main(arguments: list[str]) -> int:
    code = exit_code(CASES, lambda case, seed: [] if check(case, seed) <= 1 else ["loss"])
    if "--time" in arguments:
        for case in (Case(), Case(R=16, K=256)):
            microseconds(case)
    return code


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
