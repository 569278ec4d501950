"""The kernel of the left operands, without a GPU: on numpy lanes, and assembled."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import run_kernel
from lowering import prepare_module, supported, waves_module
from scripts import script

from gsrq_jax.kernels import mosaic_gpu, mosaic_gpu_prepare, rotary
from gsrq_jax.kernels.mosaic_gpu import LN2
from gsrq_jax.kernels.mosaic_gpu_prepare import (
    WARPS,
    Addresses,
    PrepareKernel,
    Problem,
    WavesKernel,
)

check = script("tests/gpu", "check_prepare")


@dataclasses.dataclass(frozen=True)
class Shape:
    B: int = 1
    T: int = 1
    H: int = 1
    q: int = 4
    N: int = 3
    d: int = 128
    every: int = 16  # 0: no mean key
    b: int = 256
    stride: int = 1

    @property
    def problem(self):
        return mosaic_gpu.Problem(
            batch=self.B,
            tokens=self.T,
            heads=self.H,
            group=self.q,
            blocks=self.N,
            block=self.b,
            dim=self.d,
            key=None,
            value_stages=4,
            every=self.every,
            stride=self.stride,
        )


def some(shape, seed=0):
    """Arguments of `prepare`."""
    rng, x = np.random.default_rng(seed), shape
    query = rng.normal(size=(x.B, x.T, x.H, x.q, x.d)).astype(np.float32)
    mean = rng.normal(size=(x.H, x.d)).astype(np.float32) if x.every else None
    inv_freq = 500_000.0 ** -np.linspace(0, 1, x.d // 2, dtype=np.float32)
    cos, sin = rotary.turns(4 + 1024 * np.arange(x.N), inv_freq)
    return query, mean, inv_freq, np.asarray(cos), np.asarray(sin)


def run(shape, query, mean, inv_freq, cos, sin):
    """The kernel of queries."""
    p = Problem(shape.problem)
    of_mean = [mean, inv_freq] if shape.every else []
    outputs = [
        np.full((shape.H, p.of.pairs // shape.H, shape.N, 4, shape.d), 7, np.float16),
        np.full((p.of.pairs * 4, 3, shape.d), 7, np.float16),
    ][: 1 + bool(shape.every)]

    def program(warp, *places):
        PrepareKernel(p, warp, Addresses.of(p.of, *places[:-1])).run()

    arrays = [query, cos, sin, *of_mean]
    framed, *amplitudes = run_kernel(program, p.parts, WARPS, 16, arrays, outputs)
    return framed, amplitudes[0] if amplitudes else None


def run_waves(shape, inv_freq, first):
    """The kernel of positions."""
    p, start = Problem(shape.problem), np.array([first], np.int32)
    angles = np.full((shape.N, shape.d // 2), 7, np.float32)
    outputs = [angles, angles, np.full((p.of.share_length, 3, shape.d), 7, np.float16)]

    def program(warp, *places):
        WavesKernel(p, warp, *places[:-1]).run()

    return run_kernel(program, p.waving, WARPS, 16, [inv_freq, start], outputs)


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
def test_is_the_reference(monkeypatch, shape, warps, check):
    if warps:  # on the GPU
        monkeypatch.setattr(mosaic_gpu_prepare, "RESIDENT", warps)
        monkeypatch.setattr(mosaic_gpu_prepare, "PROCESSORS", 1)
    given = some(shape)
    framed, amplitudes = run(shape, *given)
    (want, _), *of_mean = check.left(shape, *given)
    # One rounding to float16 after some to float32.
    np.testing.assert_allclose(framed, want, rtol=2**-11 + 2**-20, atol=2**-19)
    plain, plain_amplitudes = mosaic_gpu.prepare(shape.problem, *given)
    assert (framed.shape, framed.dtype) == (plain.shape, plain.dtype)
    np.testing.assert_allclose(framed, np.float64(plain), rtol=2**-10, atol=2**-19)
    assert (amplitudes is None) == (plain_amplitudes is None) == (shape.every == 0)
    if shape.every:
        np.testing.assert_array_equal(amplitudes[:, 0], amplitudes[:, 2])
        want, bound = (x.reshape(-1, shape.d) for x in of_mean[0])
        assert len(want) == shape.problem.pairs * 4
        for x in amplitudes, np.asarray(plain_amplitudes):
            error = np.abs(np.float64(x)[:, :2].sum(axis=1) - want)
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


WAVES = {
    "knots": (Shape(N=2), 4),
    "knots of head_dim 64, an odd number of blocks": (Shape(N=3, d=64, every=64), 4),
    "every token": (Shape(N=1, every=1, b=128), 4),
    "half chunks": (Shape(N=3, b=128, every=32), 4),
    "every third block": (Shape(N=2, b=512, stride=3, every=64), 1028),
    "a million tokens": (Shape(N=2, b=1024, stride=512, every=64), 1_000_003),
    "two million, the first of its blocks": (Shape(N=1, every=64), 2**21 - 256),
}


@pytest.mark.parametrize(("shape", "first"), WAVES.values(), ids=WAVES.keys())
def test_waves_are_the_reference(shape, first):
    p = shape.problem
    inv_freq = 500_000.0 ** -np.linspace(0, 1, shape.d // 2, dtype=np.float32)
    cos, sin, waves = run_waves(shape, inv_freq, first)
    plain = mosaic_gpu.waves(p, inv_freq, first)
    for x, y in zip((cos, sin, waves), plain, strict=True):
        assert (x.shape, x.dtype) == (y.shape, y.dtype)
    knots = np.arange(p.share_length)
    start = first + shape.stride * shape.b * (knots // p.block_knots)
    # Angles are products in float32, of numbers that float32 holds.
    start, on = (
        np.float64(np.float32(n)[:, None] * inv_freq)
        for n in (start, knots % p.block_knots * shape.every)
    )
    own = start[:: p.block_knots][: shape.N]
    for x, want in ((cos, np.cos(own)), (sin, np.sin(own))):
        np.testing.assert_allclose(x, want, rtol=0, atol=2**-23)
    want = np.concatenate([np.cos(start + on), np.sin(start + on)], axis=-1)
    for x in waves, np.asarray(plain[2]):
        np.testing.assert_array_equal(x[:, 0], x[:, 1])
        np.testing.assert_allclose(np.float64(x)[:, 1:].sum(axis=1), want, rtol=0, atol=2**-21)


def test_xla_makes_a_few_angles_and_very_large_ones(monkeypatch):
    inv_freq = 500_000.0 ** -np.linspace(0, 1, 64, dtype=np.float32)
    monkeypatch.setattr(mosaic_gpu_prepare, "LONGEST", 511)
    for shape in (Shape(N=2, every=0), Shape(N=2, every=16)):
        got = mosaic_gpu_prepare.waves(shape.problem, inv_freq, 4)
        want = mosaic_gpu.waves(shape.problem, inv_freq, 4)
        assert (got[2] is None) == (shape.every == 0)
        jax.tree.map(np.testing.assert_array_equal, got, want)


@supported
def test_lowers():
    for every in (0, 16):
        assert "attend_prepare" in str(prepare_module(every=every))
    assert "attend_waves" in str(waves_module())


@supported
@pytest.mark.parametrize("sizes", [{}, {"B": 155, "N": 64}, {"d": 64, "T": 3, "every": 0}])
def test_assembles_without_a_gpu(sizes, without_a_gpu):
    assert assembled(without_a_gpu("prepare", sizes)) * 32 * mosaic_gpu_prepare.RESIDENT <= 65536


@supported
@pytest.mark.parametrize("sizes", [{"N": 128}, {"d": 64, "every": 1}])
def test_waves_assemble_without_a_gpu(sizes, without_a_gpu):
    assert assembled(without_a_gpu("waves", sizes)) <= 128


def assembled(said):
    """Registers of a kernel that spills none, from what ptxas says."""
    assert "for 'sm_90a'" in said, said[-2000:]
    assert set(re.findall(r"(\d+) bytes spill", said)) == {"0"}
    (registers,) = map(int, re.findall(r"Used (\d+) registers", said))
    return registers


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
