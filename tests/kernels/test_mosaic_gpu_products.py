"""What the decode kernel makes first, as its warps on numpy lanes write it."""

import jax.numpy as jnp
import numpy as np
import pytest
from test_mosaic_gpu import Config, Shape, make, options, run_on_lanes, turned

from gsrq_jax.kernels import mosaic_gpu, mosaic_gpu_products

LN2 = np.log(2)
CASES = {
    "one block": (Shape(N=1, d=128, R=4, S=4, blocks=(1,), every=16), None),
    "an odd number of stages": (Shape(N=2, R=3, S=4, blocks=(2,), every=None), None),
    "many stages": (Shape(N=1, d=128, R=64, S=4, blocks=(1,), every=64), None),
    "a knot at every token, half chunks": (Shape(N=3, b=128, R=4, S=4, blocks=(3,)), None),
    "knots of half chunks": (Shape(N=4, b=128, R=4, S=4, blocks=(4,), every=32), None),
    "few knots of half chunks, an odd number": (
        Shape(N=3, b=128, R=4, S=4, blocks=(3,), every=64),
        None,
    ),
    "more blocks than fit at a time": (
        Shape(N=21, R=2, S=4, blocks=(21,), every=4),
        Config(4, 1, 1, 1),
    ),
    "blocks that several share": (
        Shape(N=3, b=1024, R=4, S=4, blocks=(3,), every=16, stride=2),
        Config(4, 1, 6, 1),
    ),
    "rows that are not there": (
        Shape(B=2, T=3, q=5, H=2, N=2, R=4, S=4, blocks=(2, 1), every=16),
        None,
    ),
    "tables made before": (Shape(N=2, R=4, K=256, S=4, blocks=(2,), every=16), None),
}


def rows_of(shape, x):
    """``[pairs, N, 4, d]`` in the frames of blocks, in powers of 2, float64."""
    s = shape
    start = s.first + s.stride * s.b * np.arange(s.N)
    rows = np.moveaxis(x["query"], 2, 0).reshape(s.H, s.B, -1, s.d) / LN2
    rows = np.pad(rows, ((0, 0), (0, 0), (0, -rows.shape[2] % 4), (0, 0)))
    rows = rows.reshape(-1, 1, 4, s.d)
    return turned(rows, -start[:, None], x["inv_freq"])


@pytest.mark.parametrize(("shape", "config"), CASES.values(), ids=CASES.keys())
@pytest.mark.parametrize("short", [True, False], ids=["bfloat16", "float32"])
def test_are_those_in_float64(shape, config, short):
    s, x = shape, make(shape)
    if short:
        x["key_codewords"] = np.asarray(jnp.asarray(x["key_codewords"], jnp.bfloat16))
    problem, made = run_on_lanes(x, config, **options(s))
    rows = rows_of(s, x)
    head = np.arange(problem.pairs) // (s.B * problem.row_groups)
    sequence = np.arange(problem.pairs) // problem.row_groups % s.B
    there = np.arange(s.N) < np.array(s.blocks)[sequence, None]
    if s.K == 16:
        words = np.float64(x["key_codewords"][:, 0].reshape(s.H, -1, s.d))
        want = np.einsum("pnrd,pcd->pnrc", rows, words[head])
        size = (
            np.linalg.norm(rows, axis=-1)[..., None] * np.linalg.norm(words, axis=-1).max() + 1e-30
        )
        error = np.abs(made["products"].astype(np.float64) - want) / size
        assert error[there].max() < 2**-10
        assert np.isnan(made["products"][~there]).all()
    if s.every is None:
        return
    knots = np.arange(0, s.b + (s.every > 1), s.every)
    mean = np.where(np.tile(x["inv_freq"] * s.every > np.pi, 2) & (s.every > 1), 0, x["mean"])
    mean = turned(mean[:, None], knots, x["inv_freq"])
    want = np.einsum("pnrd,pkd->pnrk", rows, mean[head])
    lead = mosaic_gpu_products.LEAD if s.every > 1 else 0
    of_chunk, own = problem.blocks_of_chunk, problem.frame_knots
    size = np.linalg.norm(rows, axis=-1).max() * np.linalg.norm(mean, axis=-1).max()
    for block in range(s.N):
        first = lead + block % of_chunk * own
        got = made["share"][:, block // of_chunk, :, first : first + len(knots)]
        error = np.abs(got - want[:, block]) / size
        assert error[there[:, block]].max(initial=0) < 1e-6
        if of_chunk == 1:
            assert np.isnan(got[~there[:, block]]).all()


def test_few_at_a_time_are_the_same_bits(monkeypatch):
    shape = Shape(N=11, R=4, S=4, blocks=(11,), every=16)
    x = make(shape)
    _, all_at_once = run_on_lanes(x, Config(4, 1, 1, 1), **options(shape))
    monkeypatch.setattr(mosaic_gpu_products.Layout, "tiles", 2)
    _, some = run_on_lanes(x, Config(4, 1, 1, 1), **options(shape))
    for name, numbers in all_at_once.items():
        np.testing.assert_array_equal(some[name], numbers)


def test_a_query_of_no_number_stays_in_its_row():
    shape = Shape(q=3, N=1, R=4, S=4, blocks=(1,), every=16)
    x = make(shape)
    x["query"][0, 0, 0, 1, 5] = np.nan
    _, made = run_on_lanes(x, **options(shape))
    for numbers in (made["products"], made["share"][..., 3:20]):
        finite = np.isfinite(numbers).all(axis=(0, 1, 3))
        assert finite.tolist() == [True, False, True, True]


def test_left_operands_fit_any_layout():
    for sizes in ({"R": 1, "S": 1}, {"R": 64, "S": 64}):
        shape = Shape(d=128, N=1, blocks=(1,), every=16, **sizes)
        problem = mosaic_gpu.problem_of(**make(shape), every=16)
        memory = mosaic_gpu.Memory.of(problem, Config(4, 1, 1, 1))
        assert mosaic_gpu_products.Layout(problem, memory.nbytes - 4096).tiles >= 1
