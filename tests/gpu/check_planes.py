"""On a Hopper GPU: the fused kernel of bit planes against float64, and its time.

    python tests/gpu/check_planes.py                    # every case
    python tests/gpu/check_planes.py --part 0/4         # every fourth case
    python tests/gpu/check_planes.py --time             # microseconds, beside bf16 by cuDNN

Every case has sinks, the remainder of its last block in a ring, and new tokens that are exact, in
the same softmax, and NaN in everything that is not there; codes that are not valid are random.
Prints the largest relative error of an output vector, by case; exits with 1 if one is above the
bound, or if a second run or one in bfloat16 gives something else.
"""

import argparse
import dataclasses
import functools
import math
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from check_decode import BOUND, SINKS, exact_of, frequencies, ragged, shifts, turned
from gpu_checks import recent_of

from gsrq_jax.kernels import mosaic_gpu_planes, planes


@dataclasses.dataclass(frozen=True)
class Case:
    """B sequences, T queries, H KV heads (each s share codes), q query heads each, N blocks of b.

    R stages of keys and S of values. ``scale`` is about the spread of the scores in nats; ``kind``
    is "random", "one" (a coded token with nearly all the mass), "flat" (equal scores) or "mean"
    (a mean key with a few large channels). ``lengths`` are cycled over the sequences, sinks not
    counted.
    """

    B: int = 4
    T: int = 1
    H: int = 8
    s: int = 1
    q: int = 4
    N: int = 4
    b: int = 1024
    d: int = 128
    R: int = 128
    S: int = 128
    scale: float = 1.0
    kind: str = "random"
    lengths: tuple[int, ...] = ()
    every: int | None = 16  # tokens between the knots of the mean key; None: there is none
    fills: int = 4  # parts of a block; each is coded once it has filled
    stride: int = 1

    @property
    def part(self) -> int:
        """Tokens that are coded together."""
        return self.b // self.fills

    def __str__(self) -> str:
        return (
            f"{self.kind:6} spread {self.scale:<4g} R={self.R:<3} S={self.S:<3} s={self.s} "
            f"d={self.d:<3} b={self.b:<4} N={self.N:<3} B={self.B:<2} T={self.T} H={self.H} "
            f"q={self.q} parts {self.fills} knots {self.every} stride {self.stride}"
        )


CASES = [
    Case(),
    Case(lengths=ragged(256, 16), B=14),
    Case(kind="one"),
    Case(kind="flat"),
    Case(kind="mean"),
    Case(scale=0.3),
    Case(scale=2.0),
    Case(scale=4.0),
    Case(B=1, H=2, N=128),
    Case(B=1, H=2, N=128, scale=4.0),
    Case(B=1, H=1, N=1),
    Case(B=64, N=2, lengths=ragged(256, 8)),
    Case(R=64, S=64, lengths=ragged(256, 16), B=14),
    Case(R=32, S=32, B=2),
    Case(R=96, S=160, B=2),
    Case(R=160, S=96, B=2),
    Case(R=256, S=256, B=2),
    Case(R=256, S=256, s=2, lengths=ragged(256, 16), B=14),
    Case(R=512, S=512, s=4, B=2),
    Case(R=128, S=128, s=4, B=2),
    Case(d=64, R=64, S=64, lengths=ragged(256, 16), B=14),
    Case(d=64, R=128, S=32, B=2),
    Case(d=256, R=256, S=256, B=2),
    Case(d=256, R=512, S=512, B=2),
    Case(d=256, R=64, S=64, B=2),
    *(Case(q=q, B=3, N=2, lengths=(2048, 1021, 256)) for q in (1, 2, 3, 5, 8)),
    Case(T=4, B=2, N=2, lengths=(2048, 700)),
    Case(T=8, q=8, H=2, B=2, N=2),
    Case(every=None),
    Case(every=1, B=2),
    Case(every=4, B=2),
    Case(every=8, B=2),
    Case(every=32, B=2),
    Case(every=64, B=2, R=512, S=512, H=2),
    Case(b=256, N=16, fills=1, lengths=ragged(256, 16), B=14),
    Case(b=128, N=33, fills=1, lengths=ragged(128, 33), B=14),
    Case(b=512, N=8, fills=2, stride=3, lengths=ragged(256, 16), B=14),
]


def make(case: Case, seed: int) -> dict[str, Any]:
    """Arguments of attend_planes."""
    c, rng = case, np.random.default_rng(seed)
    lengths = np.resize(np.array(c.lengths or (c.N * c.b,)), c.B)
    blocks = lengths // c.part

    def normal(*shape: int) -> np.ndarray:
        return rng.normal(size=shape).astype(np.float32)

    def bits(stages: int) -> np.ndarray:
        return rng.integers(0, 2, (c.B, c.H // c.s, c.N, c.b, stages)).astype(np.uint8)

    query = normal(c.B, c.T, c.H, c.q, c.d) * np.float32(c.scale * c.d**-0.5)
    mean, inv_freq = normal(c.H, c.d), frequencies(c.d)
    keys, values = (
        normal(c.H, 1, stages, 2, c.d) * np.float32(size)
        for stages, size in ((c.R, c.R**-0.5), (c.S, 1.0))
    )
    key_bits, value_bits = bits(c.R), bits(c.S)
    exact_keys, exact_values = normal(2, c.B, c.H, SINKS + c.part + c.T, c.d)
    if c.kind == "flat":
        query = np.zeros_like(query)
    if c.kind == "mean":
        mean *= 0.3
        mean[:, rng.integers(c.d // 4, c.d // 2, 3)] = 20  # of slow pairs
    if c.kind == "one":  # bit 0 is set for one token alone, and adds much along the query
        direction = normal(c.H, c.d)
        keys[:, 0, 0, 1] = keys[:, 0, 0, 0] + direction * 12
        key_bits[..., 0] = 0
        for row, n in enumerate(blocks):
            block, within = divmod(n // 2, c.fills)
            start = SINKS + block * c.b * c.stride
            toward = np.asarray(turned(jnp.asarray(direction), start, inv_freq))
            query[row] = toward[:, None] * (3 * c.d**-0.5)
            if n:
                key_bits[row, :, block, within * c.part + c.part // 3, 0] = 1
    held, first = lengths % c.part, rng.integers(0, 10**6, c.B)
    new = rng.integers(0, 2, c.B) if c.T == 1 else np.full(c.B, c.T)
    counts = {"sinks": np.full(c.B, SINKS), "first": first, "held": held, "new": new}
    recent = recent_of(exact_keys, exact_values, c.part, jnp.bfloat16, **counts)
    return {
        "query": jnp.asarray(query),
        "mean": None if c.every is None else jnp.asarray(mean),
        "inv_freq": jnp.asarray(inv_freq),
        "key_planes": jax.jit(planes.keys_to_planes)(key_bits),
        "value_planes": jax.jit(planes.values_to_planes)(value_bits),
        "key_codewords": jnp.asarray(keys, jnp.bfloat16),
        "value_codewords": jnp.asarray(values, jnp.bfloat16),
        "blocks": jnp.asarray(blocks, jnp.int32),
        "recent": recent,
    }


@functools.partial(jax.jit, static_argnames=("every", "fills", "stride", "dtype"))
def fused(given: dict[str, Any], *, dtype: Any, **how: int) -> tuple[Any, Any]:
    """The operation under test."""
    return mosaic_gpu_planes.attend_planes(**given, **how, first=SINKS, dtype=dtype)


def in_float64(given: dict[str, Any], *, every: int, fills: int, stride: int) -> tuple[Any, Any]:
    """Softmax attention over decoded keys and values, all of it in float64."""

    def written_out(bits: Any, codewords: Any) -> Any:  # [B H/s N b R], [H 1 R 2 d]
        words = codewords[:, 0].astype(jnp.float64)
        together = len(words) // bits.shape[1]
        bits = jnp.repeat(bits.astype(jnp.float64), together, axis=1)
        steps = words[:, :, 1] - words[:, :, 0]
        vectors = jnp.einsum("BHNbR,HRd->BHNbd", bits, steps)
        return vectors + words[:, :, 0].sum(axis=1)[:, None, None]

    @jax.jit
    def run(given: dict[str, Any]) -> tuple[Any, Any]:
        keys = written_out(planes.keys_from_planes(given["key_planes"]), given["key_codewords"])
        n, b = keys.shape[2:4]
        if given["mean"] is not None:
            keys += shifts(given["mean"].astype(jnp.float64), b, given["inv_freq"], every)
        bits = planes.values_from_planes(given["value_planes"])
        values = written_out(bits, given["value_codewords"])
        there = jnp.arange(n * b).reshape(n, b) < (given["blocks"] * (b // fills))[:, None, None]
        start = SINKS + stride * b * jnp.arange(n)
        query = given["query"].astype(jnp.float64)
        old = jnp.einsum(
            "BTHqNd,BHNbd->BTHqNb", turned(query[..., None, :], -start, given["inv_freq"]), keys
        )
        old = jnp.where(there[:, None, None, None], old, -jnp.inf)
        new_keys, new_values, mask = exact_of(given["recent"])
        new = jnp.einsum("BTHqd,BHnd->BTHqn", query, new_keys)
        new = jnp.where(mask[:, :, None, None], new, -jnp.inf)
        scores = jnp.concatenate([old.reshape(*old.shape[:4], -1), new], axis=-1)
        weights = jax.nn.softmax(scores, axis=-1)
        split = weights.shape[-1] - new.shape[-1]
        coded = weights[..., :split].reshape(old.shape)
        out = jnp.einsum("BTHqNb,BHNbd->BTHqd", coded, values)
        out += jnp.einsum("BTHqn,BHnd->BTHqd", weights[..., split:], new_values)
        return out, jax.nn.logsumexp(scores, axis=-1)

    with jax.enable_x64(True):
        return jax.tree.map(np.asarray, run(given))


def check(case: Case, seed: int) -> float:
    """The largest relative error of an output vector; infinite if runs differ."""
    given = make(case, seed)
    how = {"every": case.every or 1, "fills": case.fills, "stride": case.stride}
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


# --- time -----------------------------------------------------------------------------------------

SHAPES = ((8, 131072), (8, 32768), (1, 131072), (32, 8192), (1, 8192), (1, 4096))
RATES = {"R=128": (128, 1), "R=64": (64, 1), "2 heads, R=256": (256, 2)}
HEADS, GROUP, DIM, FRAME, FILLS, EVERY = 8, 4, 128, 1024, 4, 16
DISTINCT = 2**29
"""Bytes of the inputs that are gone through in turn, more than the second-level cache holds."""
OPERATIONS = 16
"""Of a program, one after the other, in each of its rounds."""
WINDOW = 384


def planes_layer(batch: int, context: int, stages: int, together: int, seed: int) -> tuple:
    """What a layer has, drawn at random."""
    keys = iter(jax.random.split(jax.random.key(seed), 12))
    codes = batch, HEADS // together, context // FRAME, FRAME // 32, stages
    words = HEADS, 1, stages, 2, DIM

    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(next(keys), shape, jnp.bfloat16)

    drawn = [jax.random.bits(next(keys), codes, jnp.uint32) for _ in range(2)]
    stored = (
        normal(batch, HEADS, SINKS, DIM),
        normal(batch, HEADS, WINDOW, DIM),
        normal(batch, 1, HEADS, DIM),
    )
    counts = [jnp.full(batch, n, jnp.int32) for n in (SINKS, 0, WINDOW // 2, 1)]
    recent = mosaic_gpu_planes.Recent(*stored, *stored, *counts)
    mean = normal(HEADS, DIM).astype(jnp.float32)
    return mean, *drawn, normal(*words) * stages**-0.5, normal(*words) * stages**-0.5, recent


def attend_layer(query: Any, mean: Any, *layer: Any, config: Any = None) -> Any:
    """The whole operation: all that a layer's attention takes."""
    *codes, recent = layer
    blocks = jnp.full(query.shape[0], codes[0].shape[2] * FILLS, jnp.int32)
    how = {"first": SINKS, "every": EVERY, "fills": FILLS, "dtype": jnp.bfloat16}
    given = query, mean, jnp.asarray(frequencies(DIM)), *codes, blocks
    return mosaic_gpu_planes.attend_planes(*given, **how, recent=recent, config=config)[0]


def exact_layer(batch: int, context: int, seed: int) -> tuple:
    """Keys and values in bfloat16."""
    keys = jax.random.split(jax.random.key(seed), 2)
    shape = batch, context, HEADS, DIM
    return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys)


def attend_exact(query: Any, key: Any, value: Any) -> Any:
    """The best bf16 attention that jax has."""
    query = query.astype(jnp.bfloat16).reshape(query.shape[0], 1, -1, DIM)
    return jax.nn.dot_product_attention(query, key, value, implementation="cudnn")


def program(attend: Callable[..., Any], count: int) -> Any:
    """`OPERATIONS` of them, one after the other, in ``rounds`` rounds; ``count`` layers in turn."""

    def run(query: Any, layers: Sequence[Any], rounds: Any) -> Any:
        made = jax.eval_shape(attend, query, *layers[0])

        def again(_: Any, given: Any) -> Any:
            last, query, layers = given
            for i in range(OPERATIONS):
                query, layer, last = jax.lax.optimization_barrier((query, layers[i % count], last))
                last = attend(query, *layer)
            return last, query, layers

        start = jnp.zeros(made.shape, made.dtype), query, layers
        return jax.lax.fori_loop(0, rounds, again, start)[0]

    return jax.jit(run)


def microseconds(attend: Callable[..., Any], layer: Callable[[int], Any], query: Any) -> float:
    """Median of the time of one operation, of the whole program by the host's clock."""
    one = jax.eval_shape(lambda: layer(0))
    nbytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(one))
    count = min(OPERATIONS, max(2, math.ceil(DISTINCT / nbytes)))
    layers = [jax.block_until_ready(jax.jit(layer, static_argnums=0)(i)) for i in range(count)]
    run = program(attend, count)

    def took(rounds: int) -> float:
        start = time.perf_counter()
        jax.block_until_ready(run(query, layers, jnp.int32(rounds)))
        return time.perf_counter() - start

    took(1)
    rounds = max(2, math.ceil(0.03 / took(1)))
    return statistics.median(took(rounds) for _ in range(7)) / (rounds * OPERATIONS) * 1e6


def print_times(shapes: Sequence[tuple[int, int]], config: Any = None) -> None:
    """Microseconds by shape: planes, bf16, and how many times as fast planes are."""
    for batch, context in shapes:
        query = jax.random.normal(jax.random.key(0), (batch, 1, HEADS, GROUP, DIM)) * DIM**-0.5

        def timed(attend: Any, layer: Any, query: Any = query) -> float:
            try:
                return microseconds(attend, layer, query)
            except Exception as error:  # the other numbers still say something
                print(f"FAILED {type(error).__name__}: {str(error)[:300]}", flush=True)
                return math.nan

        exact = timed(attend_exact, functools.partial(exact_layer, batch, context))
        line = [f"({batch}, {context // 1024}k) bf16 {exact:.1f}"]
        for name, (stages, together) in RATES.items():
            attend = functools.partial(attend_layer, config=config)
            layer = functools.partial(planes_layer, batch, context, stages, together)
            found = timed(attend, layer)
            line.append(f"{name} {found:.1f} ({exact / found:.2f} x)")
        print(" | ".join(line), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--part", default="", metavar="I/N", help="every N-th case")
    parser.add_argument("--time", action="store_true", help="print times instead")
    parser.add_argument(
        "--shapes", type=int, default=len(SHAPES), help="number of them, the first ones"
    )
    parser.add_argument("--config", default="", help="warps,depth,tiles,splits instead of chosen")
    args = parser.parse_args()
    print(jax.__version__, jax.devices()[0].device_kind, flush=True)
    if args.time:
        numbers = map(int, args.config.split(",")) if args.config else ()
        config = mosaic_gpu_planes.Config(*numbers) if args.config else None
        print_times(SHAPES[: args.shapes], config)
        return 0
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
