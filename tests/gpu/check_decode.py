"""On a Hopper GPU: the fused decode kernel against float64.

    python tests/gpu/check_decode.py                    # everything
    python tests/gpu/check_decode.py --part 0/4         # every fourth case

Every case has sinks, the remainder of its last block in a ring, and new tokens that are exact, in
the same softmax (of one new token in the same kernel), and NaN in everything that is not there.
Prints the largest relative error of an output vector, by case; exits with 1 if one is above the
bound, or a second run or one in bfloat16 gives something else.
"""

import argparse
import dataclasses
import functools
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_checks import recent_of

from gsrq_jax.kernels import mosaic_gpu, reference, tiles

BOUND = 1e-3
SINKS = 4


@dataclasses.dataclass(frozen=True)
class Case:
    """B sequences, T queries, H KV heads, q query heads each, N blocks of b tokens at most.

    ``R`` stages of ``K`` codewords for keys, ``S`` of 16 for values. ``scale`` is about the spread
    of the scores in nats; ``kind`` is "random", "one" (a coded token with all the mass), "flat"
    (all scores alike), "sink" (a sink far above everything) or "mean" (a mean key with a few large
    channels, rotated as in a model). ``lengths`` are cycled over the sequences, sinks not counted.
    """

    B: int = 4
    T: int = 1
    H: int = 8
    q: int = 4
    N: int = 16
    b: int = 256
    d: int = 128
    R: int = 32
    K: int = 16
    S: int = 32
    scale: float = 1.0
    kind: str = "random"
    lengths: tuple[int, ...] = ()
    bf16: bool = True
    every: int | None = 1  # tokens between the knots of the mean key; None: there is none
    fills: int = 1  # parts of a block, each of which is coded once it has filled

    @property
    def part(self) -> int:
        """Tokens that are coded together."""
        return self.b // self.fills

    def __str__(self) -> str:
        bits = (self.R * (4 if self.K == 16 else 8) + self.S * 4) / 2 / self.d
        return (
            f"{self.kind:6} spread {self.scale:<4g} {bits:5.3g} bit K={self.K:<3} d={self.d:<3} "
            f"b={self.b:<3} N={self.N:<4} B={self.B:<2} T={self.T} H={self.H} q={self.q}"
            + ("" if self.every else " no mean key")
            + (f" knots {self.every}" if self.every and self.every > 1 else "")
            + (f" parts {self.fills}" if self.fills > 1 else "")
        )


def ragged(b: int, n: int) -> tuple[int, ...]:
    primes = (2, 131, 257, 509, 1021, 2039, 3583)
    return (0, 1, b - 1, b, b + 1, n * b, n * b - 1, *(p for p in primes if p < n * b))


CASES = [
    Case(),
    Case(lengths=ragged(256, 16), B=14),
    Case(kind="one"),
    Case(kind="sink"),
    Case(kind="flat"),
    Case(kind="mean"),
    Case(scale=0.3),
    Case(scale=2.0),
    Case(scale=4.0),
    Case(B=1, H=2, N=512, scale=0.0, kind="flat"),
    Case(B=1, H=2, N=512),
    Case(B=1, H=2, N=512, kind="one"),
    Case(b=128, N=33, lengths=ragged(128, 33), B=14),
    Case(b=512, N=8, lengths=ragged(512, 8), B=12),
    Case(d=64, R=16, S=16, lengths=ragged(256, 16), B=12),
    Case(d=64, R=4, S=4, B=2),
    Case(d=64, R=32, S=32, B=2),
    Case(R=8, S=8, B=2),
    Case(R=12, S=12, B=2),
    Case(R=16, S=16, B=2),
    Case(R=64, S=64, B=2),
    Case(R=16, K=256, B=2, lengths=ragged(256, 16)),
    Case(R=32, K=256, S=64, B=2),
    Case(R=4, K=256, S=8, d=128, b=128, B=2),
    Case(d=64, R=8, K=256, S=16, B=2),
    *(Case(q=q, B=3, N=8, lengths=(2048, 1021, 256)) for q in (1, 2, 3, 5, 8)),
    Case(T=4, B=2, N=8, lengths=(2048, 700)),
    Case(T=3, q=3, H=3, B=2, N=8),
    Case(B=64, N=8, lengths=ragged(256, 8)),
    Case(B=1, H=1, N=1),
    Case(every=None),
    Case(every=None, b=128, N=5, B=2),
    Case(every=16, b=512, N=8, lengths=ragged(512, 8), B=12),
    Case(every=16, b=512, N=8, kind="mean"),
    Case(every=16, b=512, N=256, B=1, H=2),
    Case(every=32, b=128, N=33, lengths=ragged(128, 33), B=14),
    Case(every=64, R=16, K=256, B=2, lengths=ragged(256, 16)),
    Case(B=32, H=8, N=4, bf16=False),
    Case(every=16, b=512, N=64, B=16),
    Case(every=16, b=512, N=8, fills=2, lengths=ragged(256, 16), B=14),
    Case(every=16, b=1024, N=4, fills=4, lengths=ragged(256, 16), B=14),
    Case(every=16, b=1024, N=4, fills=4, kind="one", lengths=(4096, 3583, 256)),
]


def frequencies(d: int) -> np.ndarray:
    """Of LLaMA 3."""
    return (500_000.0 ** (-np.arange(d // 2) / (d // 2))).astype(np.float32)


def turned(x: Any, positions: Any, inv_freq: Any) -> Any:
    """Rotated in the precision of ``x``, by angles in float32, as models have them."""
    angle = jnp.asarray(positions, jnp.float32)[..., None] * jnp.asarray(inv_freq, jnp.float32)
    cos, sin = jnp.cos(angle.astype(x.dtype)), jnp.sin(angle.astype(x.dtype))
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def shifts(mean: Any, b: int, inv_freq: Any, every: int) -> Any:
    """``[H, 1, b, d]``: what the mean key adds, in the precision of ``mean``."""
    if every > 1:
        mean = jnp.where(jnp.tile(inv_freq * every > np.pi, 2), 0, mean)
    token = jnp.arange(b)
    knot = token // every * every
    before, after = (turned(mean[:, None], at, inv_freq) for at in (knot, knot + every))
    way = ((token - knot) / every).astype(mean.dtype)[:, None]
    return ((1 - way) * before + way * after)[:, None]


def make(case: Case, seed: int) -> dict[str, Any]:
    """Arguments of attend_tiles."""
    c, rng = case, np.random.default_rng(seed)
    lengths = np.resize(np.array(c.lengths or (c.N * c.b,)), c.B)
    blocks = lengths // c.part

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    query = normal(c.B, c.T, c.H, c.q, c.d) * np.float32(c.scale * c.d**-0.5)
    mean, inv_freq = normal(c.H, c.d), frequencies(c.d)
    keys, values = (
        normal(c.H, 1, c.R, c.K, c.d) * np.float32(c.R**-0.5),
        normal(c.H, 1, c.S, 16, c.d),
    )
    key_codes = rng.integers(0, c.K, (c.B, c.H, c.N, c.b, c.R)).astype(np.uint8)
    value_codes = rng.integers(0, 16, (c.B, c.H, c.N, c.b, c.S)).astype(np.uint8)
    exact_keys, exact_values = normal(2, c.B, c.H, SINKS + c.part + c.T, c.d)
    if c.kind == "flat":
        query = np.zeros_like(query)
    if c.kind == "mean":
        mean *= 0.3
        mean[:, rng.integers(c.d // 4, c.d // 2, 3)] = 20  # of slow pairs
    if c.kind == "one":  # codeword 0 of stage 0 is for one token alone, and far along the query
        direction = normal(c.H, c.d)
        keys[:, 0, 0, 0] = direction * 12
        key_codes[..., 0] = np.maximum(key_codes[..., 0], 1)
        for row, n in enumerate(blocks):
            block, within = divmod(n // 2, c.fills)
            start = SINKS + block * c.b
            toward = np.asarray(turned(jnp.asarray(direction), start, inv_freq))
            query[row] = toward[:, None] * (3 * c.d**-0.5)
            if n:
                key_codes[row, :, block, within * c.part + c.part // 3, 0] = 0
    if c.kind == "sink":  # e**40 times anything else
        exact_keys[:, :, 1] = 0
        toward = query[:, 0, :, 0]
        exact_keys[:, :, 1] = toward * (40 / (toward**2).sum(-1, keepdims=True))
    held, first = lengths % c.part, rng.integers(0, 10**6, c.B)
    new = rng.integers(0, 2, c.B) if c.T == 1 else np.full(c.B, c.T)
    kind = jnp.bfloat16 if c.bf16 else jnp.float32
    counts = {"sinks": np.full(c.B, SINKS), "first": first, "held": held, "new": new}
    recent = recent_of(exact_keys, exact_values, c.part, kind, **counts)
    return {
        "query": jnp.asarray(query),
        "mean": None if c.every is None else jnp.asarray(mean),
        "inv_freq": jnp.asarray(inv_freq),
        "key_tiles": jax.jit(tiles.keys_to_tiles, static_argnums=1)(key_codes, c.K),
        "value_tiles": jax.jit(tiles.values_to_tiles)(value_codes),
        "key_codewords": jnp.asarray(keys).astype(kind),
        "value_codewords": jnp.asarray(values).astype(kind),
        "blocks": jnp.asarray(blocks, jnp.int32),
        "recent": recent,
    }


@functools.partial(jax.jit, static_argnames=("every", "fills", "dtype"))
def fused(given: dict[str, Any], *, every: int, fills: int, dtype: Any) -> tuple[Any, Any]:
    """The operation under test."""
    how = {"first": SINKS, "every": every, "fills": fills, "dtype": dtype}
    return mosaic_gpu.attend_tiles(**given, **how)


def exact_of(r: reference.Recent) -> tuple[Any, Any, Any]:
    """Keys and values ``[B, H, n, d]`` in float64, zeros where there are none, and where each new
    token sees them ``[B, T, n]``."""
    tokens, ring = r.key.shape[1], r.window_key.shape[2]
    step, slot = jnp.arange(tokens), jnp.arange(ring)
    inside = (slot - r.first[:, None]) % ring < r.held[:, None]
    own = (step <= step[:, None]) & (step < r.new[:, None, None])
    whole = (len(r.new), tokens)
    mask = jnp.concatenate(
        [
            jnp.ones((*whole, SINKS), bool),
            jnp.broadcast_to(inside[:, None], (*whole, ring)),
            own,
        ],
        axis=2,
    )
    arrays = []
    for sinks, window, new in (r[:3], r[3:6]):
        x = jnp.concatenate([sinks, window, jnp.swapaxes(new, 1, 2)], axis=2)
        arrays.append(jnp.where(mask.any(axis=1)[:, None, :, None], x, 0).astype(jnp.float64))
    return *arrays, mask


def in_float64(coded: dict[str, Any], *, every: int, fills: int) -> tuple[Any, Any]:
    """Softmax attention over decoded keys and values, all of it in float64."""

    def written_out(codes: Any, codewords: Any) -> Any:  # [B H N b R], [H 1 R K d]
        words = codewords[:, 0].astype(jnp.float64)

        def add(r: Any, total: Any) -> Any:
            stage = jax.vmap(lambda c, w: w[c], (1, 0), 1)(codes[..., r], words[:, r])
            return total + stage

        start = jnp.zeros((*codes.shape[:-1], words.shape[-1]), jnp.float64)
        return jax.lax.fori_loop(0, codes.shape[-1], add, start)

    @jax.jit
    def run(coded: dict[str, Any]) -> tuple[Any, Any]:
        key_words, value_words = coded["key_codewords"], coded["value_codewords"]
        keys = tiles.keys_from_tiles(coded["key_tiles"], *key_words.shape[2:4])
        values = tiles.values_from_tiles(coded["value_tiles"], value_words.shape[2])
        keys = written_out(keys, key_words)
        n, b = keys.shape[2:4]
        if coded["mean"] is not None:
            mean = coded["mean"].astype(jnp.float64)
            keys += shifts(mean, b, coded["inv_freq"], every)
        values = written_out(values, value_words)
        there = jnp.arange(n * b).reshape(n, b) < (coded["blocks"] * (b // fills))[:, None, None]
        start = SINKS + b * jnp.arange(n)
        query = coded["query"].astype(jnp.float64)[..., None, :]
        query = turned(query, -start, coded["inv_freq"])
        old = jnp.einsum("BTHqNd,BHNbd->BTHqNb", query, keys)
        old = jnp.where(there[:, None, None, None], old, -jnp.inf)
        new_keys, new_values, mask = exact_of(coded["recent"])
        new = jnp.einsum("BTHqd,BHnd->BTHqn", coded["query"].astype(jnp.float64), new_keys)
        new = jnp.where(mask[:, :, None, None], new, -jnp.inf)
        scores = jnp.concatenate([old.reshape(*old.shape[:4], -1), new], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)
        split = weights.shape[-1] - new.shape[-1]
        out = jnp.einsum(
            "BTHqNb,BHNbd->BTHqd", weights[..., :split].reshape(old.shape), values
        ) + jnp.einsum("BTHqn,BHnd->BTHqd", weights[..., split:], new_values)
        return out, jax.nn.logsumexp(scores, axis=-1)

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(coded))


def check(case: Case, seed: int) -> float:
    """The largest relative error of an output vector (or absolute one of the log-sum-exp)."""
    given = make(case, seed)
    how: Any = {"every": case.every or 1, "fills": case.fills}
    run = functools.partial(fused, given, **how)
    out, lse = jax.tree.map(np.asarray, run(dtype=jnp.float32))
    want, want_lse = in_float64(given, **how)
    error = np.linalg.norm(out - want, axis=-1) / np.linalg.norm(want, axis=-1)
    worst = float(error.max())
    again = np.asarray(run(dtype=jnp.float32)[0])
    short = np.asarray(run(dtype=jnp.bfloat16)[0])
    same = "same bits again" if np.array_equal(out, again) else "DIFFERS AGAIN"
    if not np.array_equal(out.astype(jnp.bfloat16), short, equal_nan=True):
        same = "DIFFERS IN BFLOAT16"
    print(
        f"{case} | max {worst:.2e} rms {np.sqrt((error**2).mean()):.2e} "
        f"lse {np.abs(lse - want_lse).max():.1e} {same}",
        flush=True,
    )
    return worst if same.startswith("same") else np.inf


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="", metavar="I/N", help="every N-th case")
    args = parser.parse_args()
    print(jax.__version__, jax.devices()[0].device_kind, flush=True)
    worst = 0.0
    first, step = map(int, args.part.split("/")) if args.part else (0, 1)
    for i in range(first, len(CASES), step):
        try:
            worst = max(worst, check(CASES[i], seed=i))
        except Exception as error:  # the other cases still say something
            print(f"{CASES[i]} | FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
            worst = np.inf
    print(f"worst {worst:.2e}, bound {BOUND:g}", flush=True)
    return int(not worst <= BOUND)


if __name__ == "__main__":
    sys.exit(main())
