"""On a Hopper GPU: the fused decode kernel against float64, and its time against cuDNN's bf16.

    python tests/gpu/check_decode.py                    # everything
    python tests/gpu/check_decode.py --part 0/4         # every fourth case, no timing
    python tests/gpu/check_decode.py --timing-only

Every case has sinks and a remainder of its last block at full precision, merged into the same
softmax, and NaN in everything beyond a sequence's length. Prints the largest relative error of an
output vector, by case; exits with 1 if one is above the bound.
"""

import argparse
import dataclasses
import functools
import json
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

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
    shifted: bool = True

    def __str__(self) -> str:
        bits = (self.R * (4 if self.K == 16 else 8) + self.S * 4) / 2 / self.d
        return (
            f"{self.kind:6} spread {self.scale:<4g} {bits:5.3g} bit K={self.K:<3} d={self.d:<3} "
            f"b={self.b:<3} N={self.N:<4} B={self.B:<2} T={self.T} H={self.H} q={self.q}"
            + ("" if self.shifted else " no mean key")
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
    Case(shifted=False),
    Case(shifted=False, b=128, N=5, B=2),
    Case(B=32, H=8, N=4, bf16=False),
]


def rotated(key: np.ndarray, b: int) -> np.ndarray:
    """A key at the b positions of a block, as LLaMA 3 rotates it."""
    half = key.shape[-1] // 2
    angle = np.arange(b)[:, None] * 500_000.0 ** (-np.arange(half) / half)
    cos, sin = np.cos(angle), np.sin(angle)
    first, second = key[..., :half], key[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def make(case: Case, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """Arguments of attend_tiles, and those of attend_exact."""
    c, rng = case, np.random.default_rng(seed)
    lengths = np.resize(np.array(c.lengths or (c.N * c.b,)), c.B)
    blocks = lengths // c.b

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    query = normal(c.B, c.T, c.H, c.q, c.N, c.d) * np.float32(c.scale * c.d**-0.5)
    shift = normal(c.H, 1, c.b, c.d) if c.shifted else None
    keys, values = (
        normal(c.H, 1, c.R, c.K, c.d) * np.float32(c.R**-0.5),
        normal(c.H, 1, c.S, 16, c.d),
    )
    key_codes = rng.integers(0, c.K, (c.B, c.H, c.N, c.b, c.R)).astype(np.uint8)
    value_codes = rng.integers(0, 16, (c.B, c.H, c.N, c.b, c.S)).astype(np.uint8)
    exact_query = query[..., 0, :].copy()
    exact_keys, exact_values = normal(2, c.B, SINKS + c.b, c.H, c.d)
    if c.kind == "flat":
        query, exact_query = np.zeros_like(query), np.zeros_like(exact_query)
    if c.kind == "mean":
        mean = 0.3 * rng.normal(size=(c.H, 1, 1, c.d))
        mean[..., rng.integers(0, c.d, 3)] = 20
        shift = rotated(mean, c.b).astype(np.float32)
    if c.kind == "one":  # codeword 0 of stage 0 is for one token alone, and far along the query
        direction = normal(c.H, c.d)
        query[:] = direction[:, None, None] * (3 * c.d**-0.5)
        exact_query = query[..., 0, :].copy()
        keys[:, 0, 0, 0] = direction * 12
        key_codes[..., 0] = np.maximum(key_codes[..., 0], 1)
        for row, n in enumerate(blocks):
            if n:
                key_codes[row, :, n // 2, c.b // 3, 0] = 0
    if c.kind == "sink":  # e**40 times anything else
        exact_keys[:, 1] = 0
        toward = exact_query[:, 0, :, 0]
        exact_keys[:, 1] = toward * (40 / (toward**2).sum(-1, keepdims=True))
    there = np.arange(SINKS + c.b) < (SINKS + lengths % c.b)[:, None]
    exact_keys[~there], exact_values[~there] = np.nan, np.nan
    for row, n in enumerate(blocks):
        query[row, ..., n:, :] = np.nan
    kind = jnp.bfloat16 if c.bf16 else jnp.float32
    coded = {
        "query": jnp.asarray(query),
        "shift": None if shift is None else jnp.asarray(shift),
        "key_tiles": jax.jit(tiles.keys_to_tiles, static_argnums=1)(key_codes, c.K),
        "value_tiles": jax.jit(tiles.values_to_tiles)(value_codes),
        "key_codewords": jnp.asarray(keys).astype(kind),
        "value_codewords": jnp.asarray(values).astype(kind),
        "blocks": jnp.asarray(blocks, jnp.int32),
    }
    exact = {
        "query": jnp.asarray(exact_query),
        "keys": jnp.asarray(exact_keys),
        "values": jnp.asarray(exact_values),
        "mask": jnp.asarray(np.broadcast_to(there[:, None], (c.B, c.T, SINKS + c.b))),
    }
    return coded, exact


@jax.jit
def fused(coded: dict[str, Any], exact: dict[str, Any]) -> tuple[Any, Any]:
    """The operation under test: the kernel, merged with what is exact."""
    return reference.merge([mosaic_gpu.attend_tiles(**coded), reference.attend_exact(**exact)])


def in_float64(coded: dict[str, Any], exact: dict[str, Any]) -> tuple[Any, Any]:
    """Softmax attention over decoded keys and values, all of it in float64."""

    def written_out(codes: Any, codewords: Any) -> Any:  # [B H N b R], [H 1 R K d]
        words = codewords[:, 0].astype(jnp.float64)

        def add(r: Any, total: Any) -> Any:
            stage = jax.vmap(lambda c, w: w[c], (1, 0), 1)(codes[..., r], words[:, r])
            return total + stage

        start = jnp.zeros((*codes.shape[:-1], words.shape[-1]), jnp.float64)
        return jax.lax.fori_loop(0, codes.shape[-1], add, start)

    @jax.jit
    def run(coded: dict[str, Any], exact: dict[str, Any]) -> tuple[Any, Any]:
        key_words, value_words = coded["key_codewords"], coded["value_codewords"]
        keys = tiles.keys_from_tiles(coded["key_tiles"], *key_words.shape[2:4])
        values = tiles.values_from_tiles(coded["value_tiles"], value_words.shape[2])
        keys = written_out(keys, key_words)
        if coded["shift"] is not None:
            keys += coded["shift"].astype(jnp.float64)
        values = written_out(values, value_words)
        there = jnp.arange(keys.shape[2]) < coded["blocks"][:, None]
        query = jnp.where(there[:, None, None, None, :, None], coded["query"], 0)
        old = jnp.einsum("BTHqNd,BHNbd->BTHqNb", query.astype(jnp.float64), keys)
        old = jnp.where(there[:, None, None, None, :, None], old, -jnp.inf)
        seen = exact["mask"][:, 0, :, None, None]
        new_keys, new_values = (
            jnp.where(seen, exact[name], 0).astype(jnp.float64) for name in ("keys", "values")
        )
        new = jnp.einsum("BTHqd,BnHd->BTHqn", exact["query"].astype(jnp.float64), new_keys)
        new = jnp.where(exact["mask"][:, :, None, None], new, -jnp.inf)
        scores = jnp.concatenate([old.reshape(*old.shape[:4], -1), new], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)
        split = weights.shape[-1] - new.shape[-1]
        out = jnp.einsum(
            "BTHqNb,BHNbd->BTHqd", weights[..., :split].reshape(old.shape), values
        ) + jnp.einsum("BTHqn,BnHd->BTHqd", weights[..., split:], new_values)
        return out, jax.nn.logsumexp(scores, axis=-1)

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(coded, exact))


def check(case: Case, seed: int) -> float:
    """The largest relative error of an output vector (or absolute one of the log-sum-exp)."""
    coded, exact = make(case, seed)
    out, lse = jax.tree.map(np.asarray, fused(coded, exact))
    want, want_lse = in_float64(coded, exact)
    error = np.linalg.norm(out - want, axis=-1) / np.linalg.norm(want, axis=-1)
    worst = float(error.max())
    again = np.asarray(fused(coded, exact)[0])
    same = "same bits again" if np.array_equal(out, again) else "DIFFERS AGAIN"
    print(
        f"{case} | max {worst:.2e} rms {np.sqrt((error**2).mean()):.2e} "
        f"lse {np.abs(lse - want_lse).max():.1e} {same}",
        flush=True,
    )
    return worst if same.startswith("same") else np.inf


# --- time -----------------------------------------------------------------------------------------

SHAPES = "8x32768,8x131072,1x131072,32x8192"
FORMS = {"1 bit": (32, 32), "0.5 bit": (16, 16)}


def median_microseconds(f: Any, sets: list, repeats: int = 15) -> tuple[float, float]:
    """Of one call, in a program that makes one for each set of arguments; and the spread."""
    program = jax.jit(lambda sets: [f(*s) for s in sets])
    jax.block_until_ready(program(sets))
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        jax.block_until_ready(program(sets))
        times.append((time.perf_counter() - start) / len(sets) * 1e6)
    return float(np.median(times)), float(np.subtract(*np.percentile(times, [75, 25])))


def time_shape(batch: int, context: int, b: int, share: str, forms: list[str]) -> list[dict]:
    """Rows of microseconds: cuDNN in bf16, then each form of the kernel, whole and by part."""
    H, q, d, count = 8, 4, 128, 6
    key = jax.random.key(0)
    rows = []

    def bf16_sets(n: int) -> list:
        kv = functools.partial(jax.random.normal, shape=(batch, context, H, d), dtype=jnp.bfloat16)
        return [
            (
                jax.random.normal(jax.random.fold_in(key, i), (batch, 1, H * q, d), jnp.bfloat16),
                kv(jax.random.fold_in(key, 100 + i)),
                kv(jax.random.fold_in(key, 200 + i)),
            )
            for i in range(n)
        ]

    attention = functools.partial(jax.nn.dot_product_attention, implementation="cudnn")
    base, spread = median_microseconds(attention, bf16_sets(3))
    row = {"what": "cudnn bf16", "batch": batch, "context": context}
    rows.append(row | {"microseconds": base, "spread": spread})

    n = context // b
    for name in forms:
        R, S = FORMS[name]
        sets = []
        for i in range(count):
            at = jax.random.split(jax.random.fold_in(key, i), 6)
            words = tiles.key_words(R, 16), tiles.value_words(S)
            sets.append(
                (
                    jax.random.normal(at[0], (batch, 1, H, q, n, d)) * d**-0.5,
                    jax.random.normal(at[1], (H, 1, b, d)) if share != "none" else None,
                    jax.random.bits(at[2], (batch, H, n, b // 128, words[0]), jnp.uint32),
                    jax.random.bits(at[3], (batch, H, n, b // 128, words[1]), jnp.uint32),
                    (jax.random.normal(at[4], (H, 1, R, 16, d)) * R**-0.5).astype(jnp.bfloat16),
                    jax.random.normal(at[5], (H, 1, S, 16, d)).astype(jnp.bfloat16),
                    jnp.full((batch,), n, jnp.int32),
                )
            )
        problem = mosaic_gpu.problem_of(*sets[0])
        config = dataclasses.replace(mosaic_gpu.choose_config(problem), wide=share != "narrow")

        def inputs(
            query: Any, shift: Any, words: Any, problem: Any = problem, config: Any = config
        ) -> Any:
            rows = mosaic_gpu.query_rows(problem, query)
            return mosaic_gpu.score_inputs(problem, config, rows, shift, words)

        kernel = mosaic_gpu.fused_kernel(problem, config)
        made = jax.jit(lambda sets: [inputs(s[0], s[1], s[4]) for s in sets])(sets)
        ready = [(s[2], s[3], *m, s[6]) for s, m in zip(sets, made, strict=True)]
        run = jax.jit(kernel)
        parts = [run(*r) for r in ready]
        results = {
            "whole": median_microseconds(
                functools.partial(mosaic_gpu.attend_tiles, config=config), sets
            ),
            "kernel": median_microseconds(kernel, ready),
            "tables": median_microseconds(inputs, [(s[0], s[1], s[4]) for s in sets]),
            "merge": median_microseconds(
                functools.partial(mosaic_gpu.put_together, problem),
                [(*part, s[5]) for part, s in zip(parts, sets, strict=True)],
            ),
        }
        floor = batch * H * context * (R + S) / 2 / 3.07e6
        for what, (took, spread) in results.items():
            rows.append(
                {
                    "what": f"{name} {what}",
                    "batch": batch,
                    "context": context,
                    "block": b,
                    "microseconds": took,
                    "spread": spread,
                    "times_bf16": base / took,
                    "floor_microseconds": floor,
                    "splits": config.splits,
                    "share": share,
                }
            )
        del sets, made, ready, parts
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="", metavar="I/N", help="every N-th case, no timing")
    parser.add_argument("--timing-only", action="store_true")
    parser.add_argument("--blocks", default="512,256", help="block sizes to time")
    parser.add_argument("--shapes", default=SHAPES, help="batch x context to time")
    parser.add_argument("--forms", default=",".join(FORMS), help="rates to time")
    parser.add_argument("--share", default="wide", choices=("wide", "narrow", "none"))
    parser.add_argument("--json", help="write the rows of times there")
    args = parser.parse_args()
    print(jax.__version__, jax.devices()[0].device_kind, flush=True)
    worst = 0.0
    if not args.timing_only:
        first, step = map(int, args.part.split("/")) if args.part else (0, 1)
        for i in range(first, len(CASES), step):
            try:
                worst = max(worst, check(CASES[i], seed=i))
            except Exception as error:  # the other cases still say something
                print(f"{CASES[i]} | FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
                worst = np.inf
        print(f"worst {worst:.2e}, bound {BOUND:g}", flush=True)
    if not args.part:
        rows = []
        for b in map(int, args.blocks.split(",")):
            for shape in args.shapes.split(","):
                batch, context = map(int, shape.split("x"))
                new = time_shape(batch, context, b, args.share, args.forms.split(","))
                for row in new:
                    print(*(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}"
                            for k, v in row.items()), flush=True)  # fmt: skip
                rows += new
        if args.json:
            with open(args.json, "w") as file:
                json.dump(rows, file, indent=1)
    return int(not worst <= BOUND)


if __name__ == "__main__":
    sys.exit(main())
