"""The GPU kernel of bit planes without a GPU: run on numpy lanes, refused where it must be."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import run_kernel
from test_mosaic_gpu_recent import some as some_recent
from test_reference_planes import Case, expected, make

from gsrq_jax.kernels import (
    mosaic_gpu_finish,
    mosaic_gpu_planes,
    mosaic_gpu_recent,
    reference,
)

Config = mosaic_gpu_planes.Config
SMALL = Case(B=1, H=1, q=4, N=2, b=256, d=64, R=32, S=32, blocks=(2,), first=4, every=16)


def case_of(**what):
    return dataclasses.replace(SMALL, **what)


def arguments(case, seed=0):
    """`make`, with vectors of about unit variance and scores that spread by ``scale``."""
    arrays, bits, how = make(case, seed)
    arrays["query"] = arrays["query"] * np.float32(np.sqrt(2 * case.R / case.d))
    arrays["key_codewords"] = arrays["key_codewords"] * np.float32(case.R**-0.5)
    arrays["value_codewords"] = arrays["value_codewords"] * np.float32(case.S**-0.5)
    if case.mean:
        arrays["mean"] = arrays["mean"] * np.float32(0.3)
    for side in ("key_codewords", "value_codewords"):
        arrays[side] = arrays[side].astype(jnp.bfloat16)
    return arrays, bits, how


def on_lanes(x, config=None, first=0, every=1, stride=1, fills=1, recent=None):
    """`attend_planes` with the kernel run by numpy, and the end in plain jnp."""
    problem = mosaic_gpu_planes.problem_of(**x, every=every, stride=stride, fills=fills)
    exact = recent and mosaic_gpu_recent.problem_of(x["query"], recent)
    problem = dataclasses.replace(problem, recent=exact)
    config = config or mosaic_gpu_planes.choose_config(problem)

    @jax.jit
    def before(query, mean, inv_freq, words):
        return mosaic_gpu_planes.score_inputs(problem, query, mean, inv_freq, words, first)

    inputs = before(*(x[name] for name in ("query", "mean", "inv_freq", "key_codewords")))
    inputs += mosaic_gpu_recent.arrays_of(recent) if recent else ()
    made = mosaic_gpu_planes.outputs(problem, config)
    outputs = [
        np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else 2**30, dtype)
        for shape, dtype in made.values()
    ]

    def program(warp, *places):
        at = mosaic_gpu_planes.Addresses.of(problem, *places)
        mosaic_gpu_planes.PlanesKernel(problem, config, warp, at).run()

    arrays = x["key_planes"], x["value_planes"], x["blocks"], *inputs
    nbytes = mosaic_gpu_planes.Memory.of(problem, config).nbytes
    blocks = problem.pairs * config.splits
    written = run_kernel(program, blocks, config.warps, nbytes, arrays, outputs)
    written = dict(zip(made, written, strict=True))
    beside = None
    if recent:
        beside = mosaic_gpu_recent.in_parts(written["recent"], written["recent_lse"])
    return ended(problem, config, x, written, beside)


def ended(problem, config, x, written, beside):
    """What the kernel that follows makes of it, by numpy lanes, too."""
    others = [np.zeros(1, np.float32)] * 2
    if beside is not None:
        others = [np.ascontiguousarray(np.moveaxis(y, (0, 3), (2, 1))) for y in beside]
    end = mosaic_gpu_finish.Problem(problem, config.splits, 0 if beside is None else len(beside[0]))
    outputs = (
        np.full(x["query"].shape, 7, np.float32),
        np.full(x["query"].shape[:-1], 7, np.float32),
    )

    def program(warp, *places):
        at = mosaic_gpu_finish.Addresses(*places)
        mosaic_gpu_finish.FinishKernel(end, warp, at).run()

    made = written["histogram"], written["scale"], x["value_codewords"]
    arrays = x["query"], x["blocks"], *made, *others
    blocks = problem.pairs * 4 // end.together
    return run_kernel(program, blocks, mosaic_gpu_finish.WARPS, end.nbytes, arrays, outputs)


RUNS = {
    "small": (SMALL, Config(8, 3, 4, 1)),
    "two parts, one head": (case_of(q=1, blocks=(1,)), Config(8, 2, 2, 2)),
    "1 bit": (case_of(d=128, R=128, S=128), None),
    "half a bit, ragged": (
        case_of(B=3, R=64, S=64, N=4, blocks=(3, 0, 4), every=8),
        Config(8, 3, 4, 2),
    ),
    "a ring that goes round": (case_of(N=11, b=512, blocks=(11,)), Config(8, 3, 4, 1)),
    "chunks of two tiles": (case_of(R=96, S=160, N=3, blocks=(3,)), Config(8, 2, 2, 1)),
    "two heads together": (case_of(H=2, s=2, R=256, S=256, N=1, blocks=(1,)), None),
    "four heads together": (case_of(H=4, s=4, R=160, S=96, N=1, blocks=(1,)), None),
    "most stages": (case_of(R=512, S=512, N=1, blocks=(1,)), None),
    "wide heads": (case_of(d=256, R=64, S=64, N=1, blocks=(1,)), None),
    "queries of two tokens, parts of blocks": (
        case_of(T=2, q=3, b=512, fills=2, blocks=(3,)),
        None,
    ),
    "every token a knot": (case_of(every=1), None),
    "knots of 4": (case_of(every=4), None),
    "knots of 32, strided": (case_of(every=32, stride=3), None),
    "no mean key": (case_of(mean=False), None),
    "nothing coded": (case_of(blocks=(0,)), None),
    "scores that spread by 4 nats": (case_of(d=128, R=128, S=128, scale=2.8), None),
}
runs = pytest.mark.parametrize(("case", "config"), RUNS.values(), ids=RUNS.keys())


def check(got, want):
    """Output vectors to 1e-3 of their length, as on a GPU, and the log-sum-exp to 2e-3."""
    (out, lse), (right, right_lse) = got, want
    error = np.linalg.norm(out - right, axis=-1)
    assert (error <= 1e-3 * np.linalg.norm(right, axis=-1)).all(), error.max()
    np.testing.assert_allclose(lse, right_lse, atol=2e-3)


@runs
def test_kernel_on_lanes(case, config):
    x, bits, how = arguments(case)
    check(on_lanes(x, config, **how), expected(case, x, bits))


@pytest.mark.parametrize("config", [Config(8, 3, 4, 1), Config(16, 2, 4, 3)])
def test_exact_tokens_on_lanes(config):
    case = case_of(B=2, q=3, N=3, blocks=(3, 0))
    x, _, how = arguments(case)
    sizes = mosaic_gpu_recent.Problem(case.B, case.H, case.q, case.d, 4, 200)
    _, recent = some_recent(sizes, [4, 2], [777, 3], [130, 0], [1, 1])
    got = on_lanes(x, config, recent=recent, **how)
    part = reference.attend_planes(**x, **how)
    check(got, reference.with_beside(part, reference.attend_recent(x["query"], recent)))
