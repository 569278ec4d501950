"""The kernels of k-means without a GPU: one interpreted, one run on numpy lanes, both assembled."""

import contextlib
import dataclasses
import functools
import math
import re
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interpreter import products_from_registers
from jax.sharding import AbstractDevice, AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from lanes import run_kernel
from lowering import on_abstract, supported

from gsrq_jax import kmeans
from gsrq_jax.kernels import cluster, devices, mosaic_gpu, mosaic_gpu_cluster
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.mosaic_gpu_cluster import Problem


def normal(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def some(problem, seed=0):
    """Points and codewords."""
    p = problem
    points = normal(p.problems, p.points, p.channels, seed=seed)
    return points, normal(p.problems, p.codewords, p.channels, seed=seed + 1)


def exact_scores(points, codewords):
    points, codewords = np.float64(points), np.float64(codewords)
    products = 2 * np.einsum("...nd,...kd->...nk", points, codewords)
    return products - np.square(codewords).sum(-1)[..., None, :]


# --- the nearest codeword -------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("unit", "config"))
def interpreted(points, codewords, unit=False, config=None):
    from jax.experimental.pallas import mosaic_gpu as plgpu

    return mosaic_gpu_cluster.nearest(
        points, codewords, unit=unit, config=config, interpret=plgpu.InterpretGPUParams()
    )


def run_nearest(problem, points, words, unit=False, **given):
    config = mosaic_gpu_cluster.choose_nearest(problem, splits=1, **given)
    with products_from_registers():
        found = interpreted(points, words, unit=unit, config=config)
        return [np.asarray(x) for x in jax.block_until_ready(found)]


NEAREST = {
    "odd lengths, groups of codewords": (
        Problem(2, 70, 64, 21),
        False,
        {"codewords": 16, "warpgroups": 1, "depth": 2},
    ),
    "directions, two tiles each": (Problem(1, 200, 64, 16), True, {"warpgroups": 2, "depth": 1}),
}


@supported
@pytest.mark.parametrize(("problem", "unit", "given"), NEAREST.values(), ids=NEAREST.keys())
def test_nearest_against_float64(problem, unit, given):
    points, codewords = some(problem)
    points[0, 3] = 0
    code, score, square = run_nearest(problem, points, codewords, unit, **given)
    length = np.linalg.norm(np.float64(points), axis=-1)
    shape = points / np.maximum(length, 1e-30)[..., None] if unit else points
    scores = exact_scores(shape, codewords)
    # Without the products of lower pieces: 2^-16 of a term.
    scale = np.linalg.norm(shape, axis=-1) * np.linalg.norm(codewords, axis=-1).max()
    close = np.maximum(scale, 1) * 2.0**-15
    assert (np.abs(score - scores.max(-1)) <= close).all()
    own = np.take_along_axis(scores, code[..., None], -1)[..., 0]
    assert (scores.max(-1) - own <= 2 * close).all()
    assert (code == scores.argmax(-1)).mean() > 0.99
    np.testing.assert_allclose(square, np.square(length), rtol=1e-5)
    plain = cluster.nearest(jnp.asarray(points), jnp.asarray(codewords), unit=unit)
    np.testing.assert_array_equal(plain[0], scores.argmax(-1))
    np.testing.assert_allclose(plain[1], scores.max(-1), rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(plain[2], square, rtol=1e-5)


@supported
def test_problems_that_are_mapped_go_to_one_kernel():
    """Of points that are not finite the code is 0."""
    problem = Problem(2, 64, 64, 16)
    points, codewords = some(problem)
    points[1, 5, 7] = np.nan
    config = mosaic_gpu_cluster.choose_nearest(problem, splits=1, warpgroups=1, depth=1)
    one = functools.partial(interpreted, config=config)
    with products_from_registers():
        found = jax.vmap(lambda x: one(x[None], codewords[:1]))(points)
        code, score, _ = (np.asarray(x)[:, 0] for x in jax.block_until_ready(found))
    scores = exact_scores(points, codewords[:1])
    whole = np.isfinite(points).all(-1)
    np.testing.assert_array_equal(code[whole], scores.argmax(-1)[whole])
    assert code[~whole] == 0
    assert not np.isfinite(score[~whole])


# --- sums over the cells --------------------------------------------------------------------------


def run_sums(problem, points, code, factors, numbers, **given):
    """The kernel's sums, by numpy lanes; whatever it must not read is NaN."""
    p, kinds = problem, factors.shape[1]
    config = mosaic_gpu_cluster.choose_sums(p, kinds, **({"splits": 1} | given))
    mosaic_gpu_cluster.check_sums(p, kinds, config)
    layout = mosaic_gpu_cluster.SumsMemory.of(p, kinds, config)
    warps = mosaic_gpu_cluster.warps_of(kinds, config)
    sums = np.full((p.problems, config.splits, kinds, p.codewords, p.channels), np.nan, np.float32)
    counted = np.full((p.problems, config.splits, p.codewords, 2), np.nan, np.float32)
    inputs = mosaic_gpu_cluster.sums_inputs(config, code, factors, numbers)

    def program(warp, *places):
        at = mosaic_gpu_cluster.SumsAddresses(*places)
        mosaic_gpu_cluster.SumsKernel(p, kinds, config, warp, at).run()

    parts = p.problems * config.splits * p.channels // config.width
    made = run_kernel(program, parts, warps, layout.nbytes, (points, *inputs), (sums, counted))
    sums, counted = (x.sum(axis=1) for x in made)
    return sums, np.swapaxes(counted, 1, 2)


SUMS = {
    "copies, splits": (Problem(1, 100, 64, 16), 1, {"splits": 2}),
    "two problems of two kinds, odd lengths": (Problem(2, 75, 64, 21), 2, {}),
    "channels apart": (Problem(1, 67, 64, 30), 2, {"width": 32, "copies": 1, "depth": 3}),
    "batches of 8, more splits than tiles": (
        Problem(1, 90, 64, 5),
        1,
        {"batch": 8, "copies": 2, "tile": 32, "splits": 5},
    ),
}


@pytest.mark.parametrize(("problem", "kinds", "given"), SUMS.values(), ids=SUMS.keys())
def test_sums_against_float64(problem, kinds, given):
    p, rng = problem, np.random.default_rng(1)
    points, _ = some(p)
    code = rng.integers(0, p.codewords, (p.problems, p.points)).astype(np.int32)
    factors, numbers = (normal(p.problems, i, p.points, seed=i) for i in (kinds, 2))
    sums, counted = run_sums(p, points, code, factors, numbers, **given)
    hot = np.float64(code[..., None] == np.arange(p.codewords))
    exact = np.einsum("pnk,pfn,pnd->pfkd", hot, factors, points)
    np.testing.assert_allclose(sums, exact, atol=2e-5)
    exact_counted = np.einsum("pnk,pfn->pfk", hot, numbers)
    np.testing.assert_allclose(counted, exact_counted, atol=2e-5)
    arrays = (jnp.asarray(x) for x in (points, code, factors, numbers))
    plain = cluster.cell_sums(*arrays, p.codewords)
    np.testing.assert_allclose(plain[0], exact, atol=2e-5)
    np.testing.assert_allclose(plain[1], exact_counted, atol=2e-5)


def test_sums_of_a_batch_of_one_code():
    """What is written last holds all of them."""
    p = Problem(1, 64, 64, 2)
    points, _ = some(p)
    code = np.ones((1, 64), np.int32)
    ones = np.ones((1, 2, 64), np.float32)
    sums, counted = run_sums(p, points, code, ones[:, :1], ones)
    np.testing.assert_allclose(sums[0, 0, 1], points[0].sum(0, dtype=np.float64), atol=2e-5)
    np.testing.assert_array_equal(sums[0, 0, 0], 0)
    np.testing.assert_array_equal(counted[0], [[0, 64], [0, 64]])


# --- layouts, and what is refused -----------------------------------------------------------------


@pytest.mark.parametrize("channels", [64, 128, 192, 256])
@pytest.mark.parametrize("codewords", [1, 16, 100, 256, 1024])
@pytest.mark.parametrize(("problems", "points"), [(1, 2**20), (512, 2**14), (3, 64)])
def test_chosen_layouts_fit(problems, points, channels, codewords):
    p = Problem(problems, points, channels, codewords)
    config = mosaic_gpu_cluster.choose_nearest(p)
    assert config.nbytes(channels) <= mosaic_gpu.SHARED_BYTES
    assert config.codewords % 16 == 0
    groups = -(-codewords // config.codewords)
    assert 0 <= groups * config.codewords - codewords < 16 * groups
    sums = mosaic_gpu_cluster.choose_sums(p, 1)
    mosaic_gpu_cluster.check_sums(p, 1, sums)
    blocks = problems * channels // sums.width * sums.splits
    if problems * points >= 2**20:
        waves = blocks / devices.PROCESSORS
        assert waves / math.ceil(waves) > 0.9  # few processors wait for the last thread blocks


REFUSED = {
    "channels": (Problem(1, 100, 96, 16), "multiples of 64 up to 256 as channels, got 96"),
    "codewords": (Problem(1, 100, 64, 2000), "1 to 1024 as codewords, got 2000"),
    "points": (Problem(1, 10, 64, 8), "at least 64 as number of points, got 10"),
}


@pytest.mark.parametrize(("problem", "match"), REFUSED.values(), ids=REFUSED.keys())
def test_other_shapes_are_refused(problem, match):
    points, codewords = some(problem)
    with pytest.raises(InputError, match=match):
        mosaic_gpu_cluster.nearest(points, codewords)
    with pytest.raises(InputError, match="float32 as dtype of the points, got float16"):
        mosaic_gpu_cluster.nearest(np.float16(points), codewords)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"width": 48}, "whole 32s"),
        ({"tile": 48}, "tiles of whole 32s"),
        ({"batch": 8, "copies": 8, "tile": 32}, "divide a copy's part"),
        ({"depth": 1}, "depth of at least 2"),
        ({"depth": 40}, "bytes of shared memory"),
    ],
)
def test_other_layouts_are_refused(change, match):
    p = Problem(1, 1000, 128, 16)
    config = dataclasses.replace(mosaic_gpu_cluster.choose_sums(p, 1), **change)
    with pytest.raises(InputError, match=match):
        mosaic_gpu_cluster.check_sums(p, 1, config)


def test_the_implementation_is_chosen():
    assert not cluster.fused("xla", 1000, 128, 16)
    assert not cluster.fused(None, 1000, 128, 16)  # on a CPU
    with pytest.raises(InputError, match="choose one of xla, mosaic_gpu"):
        cluster.fused("cuda", 1000, 128, 16)
    with pytest.raises(InputError, match=r"the fused GPU kernel is for"):
        cluster.fused("mosaic_gpu", 1000, 128, 16)


NOT_TAKEN = {
    "channels": ((1000, 100, 16), "multiples of 64 up to 256 as channels, got 100"),
    "codewords": ((5000, 128, 2000), "1 to 1024 as codewords, got 2000"),
    "points": ((40, 128, 16), "at least 64 as number of points, got 40"),
}


@pytest.mark.parametrize(("shape", "match"), NOT_TAKEN.values(), ids=NOT_TAKEN.keys())
def test_kernels_are_taken_where_they_are_not_refused(shape, match):
    with mock.patch.object(devices, "check_hopper"):
        assert cluster.fused(None, 1000, 128, 16)
        assert not cluster.fused(None, *shape)
        with pytest.raises(InputError, match=match):
            cluster.fused("mosaic_gpu", *shape)


def test_kernels_are_not_taken_with_numbers_of_64_bits():
    with mock.patch.object(devices, "check_hopper"), jax.enable_x64(True):
        assert not cluster.fused(None, 1000, 128, 16)
        with pytest.raises(InputError, match="turn jax_enable_x64 off"):
            cluster.fused("mosaic_gpu", 1000, 128, 16)


def test_kernels_are_not_taken_where_a_partitioner_may_spread_the_points():
    def fused(implementation, points):
        asked.append(cluster.fused(implementation, len(points), 128, 16))
        return points

    asked, points = [], jnp.zeros((512, 1))
    with mock.patch.object(devices, "check_hopper"):
        for kind in (AxisType.Auto, AxisType.Explicit):
            with jax.sharding.use_abstract_mesh(AbstractMesh((4,), ("x",), axis_types=(kind,))):
                fused(None, points)
                fused("mosaic_gpu", points)
        assert asked == [False, True] * 2
        mesh = AbstractMesh((4,), ("x",), axis_types=(AxisType.Auto,))
        spread = jax.shard_map(
            lambda x: fused(None, x), mesh=mesh, in_specs=P("x"), out_specs=P("x")
        )
        jax.eval_shape(spread, points)
    assert asked[-1]


# --- for a GPU that is not there ------------------------------------------------------------------


def lowered(function, *arguments, platform="cuda", kind=None):
    """Kernels in a function that is lowered for such a GPU, or with its arguments' mesh."""
    with on_abstract(kind) if kind else contextlib.nullcontext():
        traced = jax.jit(function).trace(*arguments)
        text = traced.lower(lowering_platforms=(platform,)).as_text()
    return text.count("stablehlo.custom_call @mosaic_gpu")


H100, A100 = "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB"


@supported
@pytest.mark.parametrize("implementation", ["mosaic_gpu", None])
def test_fits_lower_without_a_gpu(implementation):
    """Mapped over problems, and with the points spread over devices."""
    s = jax.ShapeDtypeStruct
    how = {"codewords": 32, "iterations": 2, "implementation": implementation}
    rngs = jax.eval_shape(lambda: jax.random.split(jax.random.key(0), 3))
    fit = jax.vmap(lambda rng, x: kmeans.gskm(rng, x, **how).centroids)
    points = s((3, 1000, 64), jnp.bfloat16)
    assert lowered(fit, rngs, points, kind=H100) == 4  # of each of two rules two

    device = AbstractDevice(H100, 132, "gpu")
    mesh = AbstractMesh((2,), ("x",), axis_types=(AxisType.Auto,), abstract_device=device)
    rng = jax.eval_shape(lambda: jax.random.key(0))
    fit = jax.shard_map(
        lambda rng, x: kmeans.kmeans(rng, x, axis_name="x", **how).centroids,
        mesh=mesh,
        in_specs=(P(), P("x")),
        out_specs=P(),
    )
    assert lowered(fit, rng, s((1000, 64), jnp.float32)) == 2


@supported
def test_what_is_not_for_such_a_gpu_lowers_without_kernels():
    """Another GPU, another platform of a machine that has one, another shape, other numbers."""

    def fit(rng, x):
        return kmeans.gskm(rng, x, 16, iterations=2).centroids, kmeans.assign(x, x[:16])

    rng = jax.eval_shape(lambda: jax.random.key(0))
    points = jax.ShapeDtypeStruct((1000, 64), jnp.float32)
    assert lowered(fit, rng, points, kind=H100) == 5
    assert lowered(fit, rng, points, kind=A100) == 0
    for platform in ("cpu", "tpu", "rocm"):
        assert lowered(fit, rng, points, platform=platform, kind=H100) == 0
    assert lowered(fit, rng, jax.ShapeDtypeStruct((1000, 48), jnp.float32), kind=H100) == 0
    with jax.enable_x64(True):
        assert lowered(fit, rng, points, kind=H100) == 0


@supported
def test_assembles_without_a_gpu(without_a_gpu):
    said = without_a_gpu("cluster", {})
    assert said.count("for 'sm_90a'") == 2, said[-2000:]
    assert "serialized" not in said  # products that wait for each other
    spilled = [int(x) for x in re.findall(r"stack frame, (\d+) bytes spill stores", said)]
    assert spilled[0] <= 64
    assert spilled[1] == 0
