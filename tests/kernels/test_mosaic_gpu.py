"""The GPU kernel without a GPU: run on numpy lanes, refused where it must be, assembled."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import Memory, run_block
from test_reference import check, decode, expected

from gsrq_jax.kernels import mosaic_gpu, tiles
from gsrq_jax.kernels.errors import InputError


@dataclasses.dataclass(frozen=True)
class Shape:
    """B sequences, T queries, H KV heads, q query heads each, N blocks of b; stages and codewords."""

    B: int = 1
    T: int = 1
    H: int = 1
    q: int = 4
    N: int = 2
    b: int = 256
    d: int = 64
    R: int = 8
    K: int = 16
    S: int = 8
    blocks: tuple[int, ...] = (2,)


def make(shape, seed=0, scale=1.0):
    """Arguments of attend_tiles; NaN and any codes in blocks that are not valid."""
    s, rng = shape, np.random.default_rng(seed)

    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    query = normal(s.B, s.T, s.H, s.q, s.N, s.d) * np.float32(scale / np.sqrt(s.d))
    for row, n in enumerate(s.blocks):
        query[row, ..., n:, :] = np.nan
    key_codes = rng.integers(0, s.K, (s.B, s.H, s.N, s.b, s.R)).astype(np.uint8)
    value_codes = rng.integers(0, 16, (s.B, s.H, s.N, s.b, s.S)).astype(np.uint8)
    return {
        "query": query,
        "shift": normal(s.H, 1, s.b, s.d),
        "key_tiles": np.asarray(tiles.keys_to_tiles(key_codes, s.K)),
        "value_tiles": np.asarray(tiles.values_to_tiles(value_codes)),
        "key_codewords": normal(s.H, 1, s.R, s.K, s.d) * np.float32(s.R**-0.5),
        "value_codewords": normal(s.H, 1, s.S, 16, s.d),
        "blocks": np.array(s.blocks, np.int32),
    }


def in_float64(shape, x):
    s = shape
    keys = tiles.keys_from_tiles(x["key_tiles"], s.R, s.K)[..., None, :]
    values = tiles.values_from_tiles(x["value_tiles"], s.S)[..., None, :]
    keys = decode(np.asarray(keys), x["key_codewords"]) + np.float64(x["shift"])
    return expected(
        x["query"], keys, decode(np.asarray(values), x["value_codewords"]), x["blocks"]
    )


def on_lanes(x, config=None):
    """`attend_tiles` with the kernel run by numpy."""
    problem = mosaic_gpu.problem_of(**x)
    config = config or mosaic_gpu.choose_config(problem)
    inputs = mosaic_gpu.score_inputs(
        problem,
        config,
        mosaic_gpu.query_rows(problem, jnp.asarray(x["query"])),
        jnp.asarray(x["shift"]),
        jnp.asarray(x["key_codewords"]),
    )
    memory = Memory()
    parts = problem.pairs, config.splits
    histogram = np.full((*parts, problem.value_stages, 16, 4), np.nan, np.float32)
    scale = np.full((*parts, 4), 2**30, np.int32)
    arrays = [x["key_tiles"], x["value_tiles"], *inputs, x["blocks"], histogram, scale]
    places = [memory.put(np.asarray(a)) for a in arrays]
    layout = mosaic_gpu.Memory.of(problem, config)
    assert layout.nbytes <= mosaic_gpu.SHARED_BYTES
    start = 1024

    def program(warp):
        at = mosaic_gpu.Addresses(*places, shared=warp.integer(start))
        mosaic_gpu.FusedKernel(problem, config, warp, at).run()

    for block in range(np.prod(parts)):
        warps = mosaic_gpu.COUNTERS + config.scorers
        run_block(memory, warps, block, start, layout.nbytes, program)
    histogram = memory.get(places[-2], histogram.shape, np.float32)
    scale = memory.get(places[-1], scale.shape, np.int32)
    return mosaic_gpu.put_together(problem, histogram, scale, jnp.asarray(x["value_codewords"]))


Config = mosaic_gpu.Config
RUNS = {
    "one block": (Shape(N=1, blocks=(1,)), None),
    "a narrow share": (Shape(N=2, R=4, S=4, blocks=(2,)), Config(4, 1, 1, wide=False)),
    "narrow shares of half chunks": (
        Shape(b=128, N=3, R=4, S=4, blocks=(3,)),
        Config(4, 1, 1, wide=False),
    ),
    "nothing coded, all coded": (Shape(B=2, N=2, blocks=(0, 2)), Config(8, 2, 2)),
    "1 bit, head_dim 128": (Shape(d=128, R=32, S=32, N=2, blocks=(2,)), None),
    "2 bits": (Shape(d=128, R=64, S=64, N=2, blocks=(2,)), None),
    "quarter of a bit, head_dim 64": (Shape(R=4, S=4, N=1, blocks=(1,)), None),
    "blocks of half a chunk, an odd one": (Shape(b=128, N=5, blocks=(5,)), Config(4, 1, 1)),
    "three eighths of a bit": (Shape(d=128, b=128, R=12, S=12, N=3, blocks=(3,)), None),
    "blocks of two chunks, more than warps": (Shape(b=512, N=6, R=4, blocks=(5,)), Config(4, 1, 1)),
    "ring of two": (Shape(N=19, R=4, S=4, blocks=(19,)), Config(4, 2, 1)),
    "parts, some empty": (Shape(N=5, R=4, S=4, blocks=(5,)), Config(4, 1, 4)),
    "heads and sequences": (Shape(B=2, H=2, q=3, b=128, N=3, R=4, S=4, blocks=(3, 1)), None),
    "one query head": (Shape(H=2, q=1, N=1, R=4, S=4, blocks=(1,)), None),
    "two groups of rows": (Shape(B=2, T=1, q=8, N=1, R=4, S=4, blocks=(1, 1)), None),
    "three tokens of three heads": (Shape(T=3, q=3, b=128, N=2, R=4, S=4, blocks=(2,)), None),
    "256 codewords": (Shape(N=2, R=4, K=256, blocks=(2,)), None),
    "256 codewords, half chunks": (Shape(b=128, N=3, R=6, K=256, S=24, blocks=(3,)), None),
}


@pytest.mark.parametrize(("shape", "config"), RUNS.values(), ids=RUNS.keys())
def test_on_numpy_lanes(shape, config):
    x = make(shape)
    out, lse = on_lanes(x, config)
    want, want_lse = in_float64(shape, x)
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    print(error)
    assert error < 1e-3
    check((lse,), (want_lse,), atol=1e-3)
