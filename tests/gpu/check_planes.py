"""On a Hopper GPU: the kernel of bit planes against float64.

    python tests/gpu/check_planes.py

Every case has sinks, the remainder of its last block in a ring, and new tokens that are exact, in
the same softmax, and NaN in everything that is not there. Prints the largest relative error of an
output vector, by case; exits with 1 if one is above the bound, or a second run gives other bits.
"""

import dataclasses
import functools
import sys
from typing import Any

import check_decode
import jax
import jax.numpy as jnp
import numpy as np
from check_decode import BOUND, SINKS, frequencies, ragged
from gpu_checks import exit_code, recent_of

from gsrq_jax.kernels import decode, planes


@dataclasses.dataclass(frozen=True)
class Case:
    """Sizes as in `gsrq_jax.kernels.reference`; ``scale`` of the queries, ``share`` heads a code."""

    B: int = 2
    T: int = 1
    H: int = 8
    q: int = 4
    N: int = 3
    b: int = 1024
    d: int = 128
    R: int = 128
    S: int = 128
    share: int = 1
    every: int | None = 16
    fills: int = 4
    scale: float = 2.0
    lengths: tuple[int, ...] | None = None
    implementation: str = "fused"


CASES = [
    Case(),
    Case(B=5, lengths=ragged(256, 12)[:5]),
    Case(R=64, S=64),
    Case(R=32, S=32),
    Case(R=96, S=160, fills=2),
    Case(R=256, S=256),
    Case(R=256, S=256, share=2),
    Case(R=256, S=256, share=4, H=4),
    Case(q=1),
    Case(q=8, T=2),
    Case(q=4, T=8, N=1),
    Case(q=3, T=5, N=1),
    Case(d=64, R=64, S=64, q=3, H=3),
    Case(d=256, R=256, S=256, q=2, H=4),
    Case(b=256, fills=1, N=9),
    Case(b=256, fills=2, N=9, every=32),
    Case(every=None),
    Case(every=64),
    Case(scale=5.6),
    Case(B=1, N=64),
    Case(B=1, N=16, H=2, scale=4.0),
]


def make(case: Case, seed: int) -> dict[str, Any]:
    """Arguments of attend_planes."""
    c, rng = case, np.random.default_rng(seed)
    part = c.b // c.fills
    lengths = np.resize(np.array(c.lengths or (c.N * c.b, c.N * c.b // 2 + 77)), c.B)

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def bits(stages: int) -> Any:
        return rng.integers(0, 2, (c.B, c.H // c.share, c.N, c.b, stages), np.uint8)

    def words(stages: int) -> Any:
        return jnp.asarray(normal(c.H, 1, stages, 2, c.d) * stages**-0.5).astype(jnp.bfloat16)

    exact_keys, exact_values = normal(2, c.B, c.H, SINKS + part + c.T, c.d)
    new = rng.integers(0, 2, c.B) if c.T == 1 else np.full(c.B, c.T)
    counts = {
        "sinks": np.full(c.B, SINKS),
        "first": rng.integers(0, 10**6, c.B),
        "held": lengths % part,
        "new": new,
    }
    return {
        "query": jnp.asarray(normal(c.B, c.T, c.H, c.q, c.d) * np.float32(c.scale * c.d**-0.5)),
        "mean": None if c.every is None else jnp.asarray(normal(c.H, c.d)),
        "inv_freq": jnp.asarray(frequencies(c.d)),
        "key_planes": jax.jit(planes.keys_to_planes)(bits(c.R)),
        "value_planes": jax.jit(planes.values_to_planes)(bits(c.S)),
        "key_codewords": words(c.R),
        "value_codewords": words(c.S),
        "blocks": jnp.asarray(lengths // part, jnp.int32),
        "recent": recent_of(exact_keys, exact_values, part, jnp.bfloat16, **counts),
    }


def plane_codes(coded: dict[str, Any]) -> tuple[Any, Any]:
    """Bits ``[B, H, N, b, R]`` of keys and values, for each head."""
    share = coded["query"].shape[2] // coded["key_planes"].shape[1]
    keys = planes.keys_from_planes(coded["key_planes"])
    values = planes.values_from_planes(coded["value_planes"])
    return jnp.repeat(keys, share, axis=1), jnp.repeat(values, share, axis=1)


@functools.partial(jax.jit, static_argnames=("every", "fills", "implementation"))
def attend(given: dict[str, Any], *, every: int, fills: int, implementation: Any) -> Any:
    """The operation under test."""
    how = {"first": SINKS, "every": every, "fills": fills, "implementation": implementation}
    return decode.attend_planes(**given, **how)


def too_large(case: Case, seed: int) -> list[str]:
    """What is wrong with the largest relative error of an output vector, the log-sum-exp, or a
    second run."""
    given = make(case, seed)
    how: Any = {"every": case.every or 1, "fills": case.fills}
    run = functools.partial(attend, given, implementation=case.implementation, **how)
    out, lse = jax.tree.map(np.asarray, run())
    want, want_lse = check_decode.in_float64(given, codes_of=plane_codes, **how)
    error = np.linalg.norm(out - want, axis=-1) / np.linalg.norm(want, axis=-1)
    worst, of_lse = float(error.max()), float(np.abs(lse - want_lse).max())
    same = np.array_equal(out, np.asarray(run()[0]))
    print(
        f"{case} | max {worst:.2e} rms {np.sqrt((error**2).mean()):.2e} lse {of_lse:.1e} "
        + ("same bits again" if same else "DIFFERS AGAIN"),
        flush=True,
    )
    bounds = {"output": worst, "log-sum-exp": of_lse}
    found = [f"{name} {x:.2e}" for name, x in bounds.items() if not x <= BOUND]
    return found + ["another run gave other bits"] * (not same)


if __name__ == "__main__":
    sys.exit(exit_code(CASES, too_large))
