"""The kernel that ends attention over codes, without a GPU: on numpy lanes, and assembled."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lanes import run_kernel
from lowering import finish_module, supported

from gsrq_jax.kernels import mosaic_gpu, pieces
from gsrq_jax.kernels.mosaic_gpu_finish import WARPS, Addresses, FinishKernel, Problem


@dataclasses.dataclass(frozen=True)
class Shape:
    B: int = 1
    T: int = 1
    H: int = 1
    q: int = 4
    d: int = 128
    S: int = 8
    parts: int = 3
    beside: int = 0
    short: bool = False

    @property
    def problem(self):
        of = mosaic_gpu.Problem(
            batch=self.B,
            tokens=self.T,
            heads=self.H,
            group=self.q,
            blocks=2,
            block=256,
            dim=self.d,
            key=None,
            value_stages=self.S,
            every=0,
        )
        return Problem(of, self.parts, self.beside, self.short)


def some(shape, empty=(), seed=0):
    """Arguments of `finish`; sequences that are empty have nothing, and queries that are NaN."""
    rng, x = np.random.default_rng(seed), shape
    p = x.problem
    query = rng.normal(size=(x.B, x.T, x.H, x.q, x.d)).astype(np.float32)
    counts = rng.integers(0, 2**pieces.PROBABILITY_BITS, (p.of.pairs, x.parts, 4, x.S, 16))
    # Any stage has all the mass.
    total = counts[..., :1, :].sum(-1, keepdims=True)
    histogram = (counts * (total / counts.sum(-1, keepdims=True))).astype(np.float32)
    histogram *= pieces.LAST_BIT
    scale = rng.integers(-3, 3, (p.of.pairs, x.parts, 4)).astype(np.int32)
    blocks = np.full(x.B, 2, np.int32)
    nothing = rng.integers(0, 2, (p.of.pairs, x.parts, 1)).astype(bool)
    nothing[:, 0] = False
    of_pair = np.arange(p.of.pairs) // p.of.row_groups % x.B
    for b in empty:
        query[b], blocks[b] = np.nan, 0
        nothing[of_pair == b] = True
    scale = np.where(nothing, mosaic_gpu.EMPTY, scale).astype(np.int32)
    histogram[np.broadcast_to(nothing, scale.shape)] = 0
    words = rng.normal(size=(x.H, 1, x.S, 16, x.d)).astype(ml_dtypes.bfloat16)
    beside = None
    if x.beside:
        rows = (x.beside, x.B, x.T, x.H, x.q)
        out, lse = rng.normal(size=(*rows, x.d)), 3 * rng.normal(size=rows)
        lse[x.beside // 2], out[x.beside // 2] = -np.inf, 0
        beside = out.astype(np.float32), lse.astype(np.float32)
    return query, blocks, histogram, scale, words, beside


def run(shape, query, blocks, histogram, scale, words, beside):
    """The kernel by numpy lanes."""
    p = shape.problem
    others = [np.zeros(1, np.float32)] * 2
    if beside is not None:
        others = [np.ascontiguousarray(np.moveaxis(x, (0, 3), (2, 1))) for x in beside]
    out = np.full(query.shape, 7, ml_dtypes.bfloat16 if shape.short else np.float32)
    lse = np.full(query.shape[:-1], 7, np.float32)

    def program(warp, *places):
        FinishKernel(p, warp, Addresses(*places)).run()

    arrays = query, blocks, histogram, scale, words, *others
    parts = p.of.pairs * 4 // p.together
    return run_kernel(program, parts, WARPS, p.nbytes, arrays, (out, lse))


CASES = {
    "one sequence": (Shape(), ()),
    "stages that fill no vector of warps": (Shape(H=2, S=12, d=64, parts=9), ()),
    "an odd number of stages": (Shape(S=5, d=64, q=2), ()),
    "one is empty": (Shape(B=2, H=1, q=3, parts=40, beside=3), (1,)),
    "two tokens, seven rows": (Shape(T=7, q=1, beside=2), ()),
    "four rows together": (Shape(B=34, H=2, q=4, d=64, S=4, parts=2, beside=1), (33,)),
    "more mass than threads": (Shape(B=67, q=3, d=64, S=36, parts=1), ()),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_the_reference(case):
    shape, empty = case
    given = some(shape, empty)
    assert (shape.B > 30) == (shape.problem.together == 4)
    want, want_lse = map(np.asarray, mosaic_gpu.finish(shape.problem.of, *given))
    out, lse = run(shape, *given)
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-4)  # of the reference's product
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=2e-5)
    assert np.isfinite(out).all()
    if empty and not shape.beside:
        assert (out[list(empty)] == 0).all()


@pytest.mark.parametrize("case", ["one is empty", "four rows together"])
def test_output_in_bfloat16(case):
    shape, empty = CASES[case]
    given = some(shape, empty)
    out, lse = run(shape, *given)
    short, same = run(dataclasses.replace(shape, short=True), *given)
    assert short.dtype == ml_dtypes.bfloat16
    np.testing.assert_array_equal(short, out.astype(ml_dtypes.bfloat16))
    np.testing.assert_array_equal(same, lse)
    want, _ = mosaic_gpu.finish(shape.problem.of, *given, jnp.bfloat16)
    assert want.dtype == jnp.bfloat16


@pytest.mark.parametrize("value", [np.nan, np.inf, -mosaic_gpu.MOST_QUERY])
def test_what_float16_does_not_hold_is_nan(value):
    shape = Shape(H=2, beside=1)
    query, *others = some(shape)
    query[0, 0, 1, 2, 77] = value
    out, lse = run(shape, query, *others)
    want, want_lse = mosaic_gpu.finish(shape.problem.of, query, *others)
    bad = np.zeros(lse.shape, bool)
    bad[0, 0, 1, 2] = True
    for x, y in ((lse, want_lse), (out.sum(-1), want.sum(-1))):
        assert (np.isnan(x) == bad).all()
        assert (np.isnan(y) == bad).all()


@supported
@pytest.mark.parametrize("batch", [1, 64])
def test_lowers(batch):
    for short in range(2):
        assert "attend_finish" in str(finish_module(B=batch, short=short))


def test_together():
    assert Shape(B=8, H=8).problem.together == 1
    assert Shape(B=9, H=8).problem.together == 4
    assert jax.eval_shape(lambda *x: mosaic_gpu.finish(Shape().problem.of, *x), *some(Shape()))[
        0
    ].shape == (1, 1, 1, 4, 128)
    assert jnp.isfinite(mosaic_gpu.finish(Shape().problem.of, *some(Shape()))[0]).all()
