"""The kernel of the left operands, without a GPU: on numpy lanes, and assembled."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import Memory, run_block
from lowering import prepare_module, supported

from gsrq_jax.kernels import mosaic_gpu, mosaic_gpu_prepare, rotary
from gsrq_jax.kernels.mosaic_gpu import LN2
from gsrq_jax.kernels.mosaic_gpu_prepare import WARPS, Addresses, PrepareKernel, Problem


@dataclasses.dataclass(frozen=True)
class Shape:
    B: int = 1
    T: int = 1
    H: int = 1
    q: int = 4
    N: int = 3
    d: int = 128
    every: int = 16  # 0: no mean key

    @property
    def problem(self):
        return mosaic_gpu.Problem(
            batch=self.B,
            tokens=self.T,
            heads=self.H,
            group=self.q,
            blocks=self.N,
            block=256,
            dim=self.d,
            key=None,
            value_stages=4,
            every=self.every,
        )


def some(shape, seed=0):
    """Arguments of `prepare`; NaN at angles that are not of blocks."""
    rng, x = np.random.default_rng(seed), shape
    query = rng.normal(size=(x.B, x.T, x.H, x.q, x.d)).astype(np.float32)
    mean = rng.normal(size=(x.H, x.d)).astype(np.float32) if x.every else None
    inv_freq = 500_000.0 ** -np.linspace(0, 1, x.d // 2, dtype=np.float32)
    angles = rotary.turns(4 + 1024 * np.arange(x.N + 2), inv_freq)
    cos, sin = (np.array(a) for a in angles)
    cos[x.N :], sin[x.N :] = np.nan, np.nan
    return query, mean, inv_freq, cos, sin


def run(shape, query, mean, inv_freq, cos, sin):
    """The kernel by numpy lanes, which writes its results and nothing else."""
    p, memory = Problem(shape.problem), Memory()
    framed = np.full((shape.H, p.of.pairs // shape.H, shape.N, 4, shape.d), 7, np.float16)
    amplitudes = np.full((p.of.pairs * 4, 3, shape.d), 7, np.float16)
    arrays = (query, cos, sin, framed)
    if shape.every:
        arrays = (query, cos, sin, mean, inv_freq, framed, amplitudes)
    places = [memory.put(x) for x in arrays]
    memory.put(np.full(1024, np.nan, np.float32))
    at, before = Addresses.of(p.of, *places), memory.octets.copy()

    def program(warp):
        PrepareKernel(p, warp, at).run()

    for block in range(p.parts):
        run_block(memory, WARPS, block, 0, 16, program)
    results = []
    for place, x in ((at.framed, framed), (at.amplitudes, amplitudes)):
        if place is None:
            results.append(None)
            continue
        results.append(memory.get(place, x.shape, x.dtype).copy())
        first = int(place[0])
        memory.octets[first : first + x.nbytes] = before[first : first + x.nbytes]
    np.testing.assert_array_equal(memory.octets, before)
    return results


def in_float64(shape, query, mean, inv_freq, cos, sin):
    """Rows in the frames of blocks, amplitudes, and the bound of each product of them."""
    x, p = shape, shape.problem
    rows = np.moveaxis(np.float64(query) / np.log(2), 2, 0).reshape(x.H, x.B, x.T * x.q, x.d)
    rows = np.pad(rows, ((0, 0), (0, 0), (0, -x.T * x.q % 4), (0, 0)))
    a, b = np.split(rows.reshape(x.H, -1, 1, 4, x.d), 2, axis=-1)
    c, s = (np.float64(y[: x.N, None]) for y in (cos, sin))
    framed = np.concatenate([a * c + b * s, b * c - a * s], axis=-1)
    if mean is None:
        return framed, None, None
    kept = np.float64(mean)
    if x.every > 1:
        kept = np.where(np.tile(inv_freq * x.every > np.pi, 2), 0, kept)
    k_a, k_b = np.split(kept[:, None, None], 2, axis=-1)
    a, b = np.split(rows, 2, axis=-1)
    amplitudes = np.concatenate([a * k_a + b * k_b, b * k_a - a * k_b], axis=-1)
    bound = np.abs(a * k_a) + np.abs(b * k_b), np.abs(b * k_a) + np.abs(a * k_b)
    assert len(amplitudes.reshape(-1, x.d)) == p.pairs * 4
    return framed, amplitudes.reshape(-1, x.d), np.concatenate(bound, -1).reshape(-1, x.d)


CASES = {
    "one sequence": (Shape(H=2), None),
    "a knot at every token": (Shape(H=2, every=1), None),
    "few knots": (Shape(d=64, every=64), None),
    "no mean key": (Shape(every=0), None),
    "no mean key, head_dim 64": (Shape(d=64, N=5, H=3, every=0), None),
    "one block": (Shape(N=1, B=2, q=1), None),
    "one block, head_dim 64": (Shape(N=1, d=64, q=2), None),
    "groups of rows with spare ones": (Shape(B=2, T=3, q=5, H=2, N=2, d=64), None),
    "eight heads": (Shape(q=8, B=2, N=2), None),
    "more blocks than warps": (Shape(N=11), 4),
    "more blocks than warps, head_dim 64": (Shape(N=37, d=64, H=2), 4),
    "more groups than thread blocks of amplitudes": (Shape(B=3, H=3, N=1, d=64), 9),
}


@pytest.mark.parametrize(("shape", "warps"), CASES.values(), ids=CASES.keys())
def test_is_the_reference(monkeypatch, shape, warps):
    if warps:  # on the GPU
        monkeypatch.setattr(mosaic_gpu_prepare, "RESIDENT", warps)
        monkeypatch.setattr(mosaic_gpu_prepare, "PROCESSORS", 1)
    given = some(shape)
    framed, amplitudes = run(shape, *given)
    want, want_amplitudes, bound = in_float64(shape, *given)
    # One rounding to float16 after some to float32.
    np.testing.assert_allclose(framed, want, rtol=2**-11 + 2**-20, atol=2**-19)
    plain, plain_amplitudes = mosaic_gpu.prepare(shape.problem, *given)
    assert (framed.shape, framed.dtype) == (plain.shape, plain.dtype)
    np.testing.assert_allclose(framed, np.float64(plain), rtol=2**-10, atol=2**-19)
    assert (amplitudes is None) == (plain_amplitudes is None) == (shape.every == 0)
    if shape.every:
        np.testing.assert_array_equal(amplitudes[:, 0], amplitudes[:, 2])
        for x in amplitudes, np.asarray(plain_amplitudes):
            error = np.abs(np.float64(x)[:, :2].sum(axis=1) - want_amplitudes)
            assert (error <= 2**-21 * bound + 2**-25).all()
        assert amplitudes.shape == plain_amplitudes.shape
    spare = shape.problem.row_groups * 4 - shape.T * shape.q
    if spare:
        last = framed.reshape(shape.H, shape.B, shape.problem.row_groups, shape.N, 4, shape.d)
        assert (last[:, :, -1, :, -spare:] == 0).all()


@pytest.mark.parametrize("value", [np.nan, np.inf, 1e6, 3e38])
def test_what_float16_does_not_hold_stays_in_its_row(value):
    """The end of attention flags it."""
    shape = Shape(H=2, q=3)
    query, *others = some(shape)
    query[0, 0, 1, 2, 77] = value
    want = mosaic_gpu.prepare(shape.problem, query, *others)
    for x, y in zip(run(shape, query, *others), want, strict=True):
        assert (np.isfinite(x) == np.isfinite(y)).all()
        assert np.isfinite(x).sum() < x.size


@supported
@pytest.mark.parametrize("sizes", [{}, {"B": 155, "N": 64}, {"d": 64, "T": 3, "every": 0}])
def test_assembles_without_a_gpu(sizes, without_a_gpu):
    assert "attend_prepare" in str(prepare_module(**sizes))
    said = without_a_gpu("prepare", sizes)
    assert "for 'sm_90a'" in said, said[-2000:]
    (registers,) = map(int, re.findall(r"Used (\d+) registers", said))
    assert registers * 32 * mosaic_gpu_prepare.RESIDENT <= 65536
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}


def test_all_blocks_have_a_warp():
    for sizes in ({}, {"B": 155, "N": 64, "H": 8}, {"N": 1}, {"d": 64, "N": 7, "H": 8}):
        p = Problem(Shape(**sizes).problem)
        assert p.splits % WARPS == 0
        assert p.framing * WARPS == p.of.pairs * p.splits
        assert p.splits <= math.ceil(p.of.blocks / p.together / WARPS) * WARPS


def test_powers_of_2():
    shape = Shape(every=0)
    query, *others = some(shape)
    framed, _ = jax.jit(lambda *x: mosaic_gpu.prepare(shape.problem, *x))(query, *others)
    norm = jnp.linalg.norm(framed.astype(jnp.float32), axis=-1)[0, 0]
    want = np.linalg.norm(query[0, 0, 0], axis=-1) / LN2
    np.testing.assert_allclose(norm, np.broadcast_to(want, norm.shape), rtol=1e-3)
