"""The kernel of exact tokens without a GPU: run on numpy lanes, and assembled."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lanes import run_kernel
from lowering import exact, on_abstract, recent_module, supported

from gsrq_jax.kernels import decode, mosaic_gpu_recent, reference
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.mosaic_gpu_recent import WARPS, Problem


def some(p, sinks, first, held, new, seed=0):
    """Arguments of `attend_recent`: the query, and a `Recent` whose unread slots are NaN."""
    rng = np.random.default_rng(seed)

    def normal(*shape):
        return rng.normal(size=shape)

    stored = [(p.heads, n, p.dim) for n in (p.sinks, p.ring)]
    arrays = []
    for _ in range(2):
        few, ring, own = (
            *(normal(p.batch, *shape) for shape in stored),
            normal(p.batch, 1, p.heads, p.dim),
        )
        for b in range(p.batch):
            few[b, :, sinks[b] :] = np.nan
            ring[b, :, (first[b] + np.arange(held[b], p.ring)) % p.ring] = np.nan
            own[b, new[b] :] = np.nan
        arrays += [few, ring, own]
    query = (2 * normal(p.batch, 1, p.heads, p.group, p.dim) / p.dim**0.5).astype(np.float32)
    counts = [np.asarray(x, np.int32) for x in (sinks, first, held, new)]
    return query, reference.Recent(*(x.astype(ml_dtypes.bfloat16) for x in arrays), *counts)


def run(p, query, recent):
    """The kernel's parts, by numpy lanes, merged."""
    arrays = [np.asarray(x) for x in mosaic_gpu_recent.arrays_of(recent)]
    made = p.outputs(p.own_parts).values()
    outputs = [np.full(shape, np.nan, dtype) for shape, dtype in made]

    def program(warp, *places):
        mosaic_gpu_recent.one_part(p, warp, *places)

    nbytes, blocks = p.nbytes(WARPS) + 16, p.pairs * p.own_parts
    made = run_kernel(program, blocks, WARPS, nbytes, (query, *arrays), outputs)
    return reference.merge(list(zip(*mosaic_gpu_recent.in_parts(*made), strict=True)))


CASES = {
    "full, wrapped": (Problem(1, 1, 4, 128, 4, 200), [4], [777], [200], [1]),
    "two sequences, odd lengths": (
        *(Problem(2, 2, 3, 64, 4, 131), [4, 4], [5, 130], [131, 67], [1, 1]),
    ),
    "nothing but itself, and nothing": (
        *(Problem(2, 1, 2, 64, 4, 70), [0, 0], [0, 0], [0, 0], [1, 0]),
    ),
    "sinks not all, none new": (Problem(2, 1, 1, 128, 4, 64), [3, 1], [0, 9], [0, 1], [1, 0]),
    "eight query heads": (Problem(1, 1, 8, 64, 4, 96), [4], [95], [33], [1]),
    "no sinks": (Problem(1, 2, 4, 64, 0, 65), [0], [64], [65], [1]),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_the_reference(case):
    p, *counts = case
    query, recent = some(p, *counts)
    want, want_lse = (x[0] for x in reference.attend_recent(query, recent))
    out, lse = run(p, query, recent)
    empty = np.asarray(counts).sum(axis=0) == counts[1]  # first is no number of tokens
    np.testing.assert_allclose(out[~empty], want[~empty], rtol=0, atol=5e-5)
    np.testing.assert_allclose(lse[~empty], want_lse[~empty], rtol=0, atol=5e-5)
    assert (out[empty] == 0).all()
    assert (lse[empty] == -np.inf).all()


def test_parts():
    assert Problem(1, 8, 4, 128, 4, 640).own_parts == 11  # of at most 64 tokens
    assert Problem(8, 8, 4, 128, 4, 640).own_parts == 5  # enough for two on each processor
    assert Problem(64, 8, 4, 128, 4, 640).own_parts == 1
    assert Problem(1, 8, 4, 128, 0, 1).own_parts == 1
    assert Problem(1, 8, 4, 128, 4, 640).parts(3) == 3


@pytest.mark.parametrize(
    ("shape", "dtype", "words"),
    [
        ((1, 2, 1, 4, 64), jnp.bfloat16, "new tokens 2"),
        ((1, 1, 1, 4, 96), jnp.bfloat16, "channels of a head 96"),
        ((1, 1, 1, 9, 64), jnp.bfloat16, "query heads a KV head 9"),
        ((1, 1, 1, 4, 64), jnp.float32, "some of float32"),
    ],
)
def test_refused(shape, dtype, words):
    batch, tokens, heads, _, dim = shape
    query = jnp.zeros(shape)
    sink, window, key = (
        jnp.zeros(s, dtype)
        for s in ((batch, heads, 4, dim), (batch, heads, 70, dim), (batch, tokens, heads, dim))
    )
    count = jnp.zeros(batch, jnp.int32)
    recent = reference.Recent(sink, window, key, sink, window, key, *(count,) * 3, count + 1)
    with pytest.raises(InputError, match=words):
        decode.attend_recent(query, recent, implementation="fused")
    out, _ = decode.attend_recent(query, recent)  # by the reference, silently
    assert out.shape == (1, *shape)


def test_values_that_are_not_as_keys():
    query, same = jnp.zeros((1, 1, 1, 4, 64)), jnp.zeros((1, 1, 8, 64), jnp.bfloat16)
    recent = reference.Recent(*(same,) * 6, *(jnp.ones(1, jnp.int32),) * 4)
    wide, short = same.astype(jnp.float32), same[:, :, :7]
    with pytest.raises(InputError, match="some of float32"):
        mosaic_gpu_recent.problem_of(query, recent._replace(value=wide))
    with pytest.raises(InputError, match=r"values as keys, \(1, 1, 8, 64\), got values \(1, 1, 7"):
        mosaic_gpu_recent.problem_of(query, recent._replace(value=short))


@supported
@pytest.mark.parametrize("dim", [64, 128])
def test_lowers(dim):
    assert "attend_recent" in str(recent_module(d=dim))


@supported
def test_is_taken_where_it_is_supported():
    query = jax.ShapeDtypeStruct((1, 1, 2, 4, 64), jnp.float32)
    with on_abstract():
        traced = jax.jit(lambda *x: decode.attend_recent(*x)).trace(query, exact(1, 1, 2, 64))
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
