"""The kernel of exact tokens without a GPU: run on numpy lanes, and assembled."""

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lanes import run_kernel
from lowering import on_abstract, recent_module, supported

from gsrq_jax.kernels import decode, mosaic_gpu_recent, reference
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.mosaic_gpu_recent import WARPS, Addresses, Problem, RecentKernel


def some(p, sinks, first, held, new, seed=0):
    """Arguments of `attend_recent`; what may not be read is NaN."""
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
    return query, *(x.astype(ml_dtypes.bfloat16) for x in arrays), *counts


def run(p, query, *others):
    """The kernel's parts, by numpy lanes, merged."""
    *arrays, sinks, first, held, new = others
    out = np.full((p.batch, p.heads, p.parts, p.group, p.dim), np.nan, np.float32)
    lse = np.full(out.shape[:-1], np.nan, np.float32)
    counts = np.stack([sinks, new, first, held], axis=1)

    def program(warp, *places):
        RecentKernel(p, warp, Addresses(*places)).run()

    parts = p.batch * p.heads * p.parts
    arrays = query, *arrays, counts
    out, lse = run_kernel(program, parts, WARPS, p.nbytes, arrays, (out, lse))
    return reference.merge([(out[:, None, :, i], lse[:, None, :, i]) for i in range(p.parts)])


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
    query, *others = some(p, *counts)
    want, want_lse = (x[0] for x in reference.attend_recent(query, *others))
    if not p.sinks:
        others[0], others[3] = others[2], others[5]
    out, lse = run(p, query, *others)
    empty = np.asarray(counts).sum(axis=0) == counts[1]  # first is no number of tokens
    np.testing.assert_allclose(out[~empty], want[~empty], rtol=0, atol=5e-5)
    np.testing.assert_allclose(lse[~empty], want_lse[~empty], rtol=0, atol=5e-5)
    assert (out[empty] == 0).all()
    assert (lse[empty] == -np.inf).all()


def test_parts():
    assert Problem(1, 8, 4, 128, 4, 640).parts == 10  # at least 64 tokens each
    assert Problem(8, 8, 4, 128, 4, 640).parts == 5  # enough for two on each processor
    assert Problem(64, 8, 4, 128, 4, 640).parts == 1
    assert Problem(1, 8, 4, 128, 0, 1).parts == 1


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
    others = sink, window, key, sink, window, key, count, count, count, count + 1
    with pytest.raises(InputError, match=words):
        decode.attend_recent(query, *others, implementation="fused")
    out, _ = decode.attend_recent(query, *others)  # by the reference, silently
    assert out.shape == (1, *shape)


def test_values_that_are_not_as_keys():
    query, arrays = jnp.zeros((1, 1, 1, 4, 64)), [jnp.zeros((1, 1, 8, 64), jnp.bfloat16)] * 6
    wide, short = arrays[5].astype(jnp.float32), arrays[5][:, :, :7]
    with pytest.raises(InputError, match="some of float32"):
        mosaic_gpu_recent.problem_of(query, *arrays[:5], wide)
    with pytest.raises(InputError, match=r"values as keys, \(1, 1, 8, 64\), got values \(1, 1, 7"):
        mosaic_gpu_recent.problem_of(query, *arrays[:5], short)


@supported
@pytest.mark.parametrize("dim", [64, 128])
def test_lowers(dim):
    assert "attend_recent" in str(recent_module(d=dim))


@supported
def test_is_taken_where_it_is_supported():
    s, bfloat16, count = jax.ShapeDtypeStruct, jnp.bfloat16, jax.ShapeDtypeStruct((1,), jnp.int32)
    stored = s((1, 2, 4, 64), bfloat16), s((1, 2, 70, 64), bfloat16), s((1, 1, 2, 64), bfloat16)
    arrays = s((1, 1, 2, 4, 64), jnp.float32), *stored, *stored, *(count,) * 4
    with on_abstract():
        traced = jax.jit(lambda *x: decode.attend_recent(*x)).trace(*arrays)
    assert "mosaic_gpu" in traced.lower(lowering_platforms=("cuda",)).as_text()
