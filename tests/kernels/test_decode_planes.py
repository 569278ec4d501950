"""Which implementation of bit planes is taken, and what is said about it."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import planes_shapes
from test_mosaic_gpu_recent import some as some_recent
from test_reference_planes import Case, check, expected, make

from gsrq_jax.kernels import decode, devices, mosaic_gpu_planes, mosaic_gpu_recent, reference
from gsrq_jax.kernels.errors import InputError

CASE = Case(d=64, every=16)


@pytest.fixture(autouse=True)
def nothing_said_yet():
    decode._say.cache_clear()


def test_without_a_gpu_the_reference_is_taken():
    x, bits, how = make(CASE)
    attend = functools.partial(decode.attend_planes, **how)
    with pytest.warns(UserWarning, match="the reference is used"):
        check(jax.jit(lambda x: attend(**x))(x), expected(CASE, x, bits))
    check(jax.jit(lambda x: attend(**x, implementation="reference"))(x), expected(CASE, x, bits))


def test_exact_tokens_are_in_the_same_softmax():
    x, _, how = make(CASE)
    attend = functools.partial(decode.attend_planes, **x, **how, implementation="reference")
    sizes = mosaic_gpu_recent.Problem(CASE.B, CASE.H, CASE.q, CASE.d, 4, 9)
    _, exact = some_recent(sizes, [4, 1], [3, 0], [9, 0], [1, 0])
    out, lse = attend(recent=exact)
    want, want_lse = reference.merge(
        [attend(), tuple(y[0] for y in reference.attend_recent(x["query"], exact))]
    )
    np.testing.assert_allclose(out, want, atol=1e-5)
    np.testing.assert_allclose(lse, want_lse, atol=1e-5)
    short, _ = attend(recent=exact, dtype=jnp.bfloat16)
    np.testing.assert_array_equal(short, out.astype(jnp.bfloat16))


def test_the_kernel_is_taken_where_it_is_supported(monkeypatch):
    taken = []
    monkeypatch.setattr(devices, "check_hopper", lambda: None)
    kernel = "attend_planes"
    monkeypatch.setattr(mosaic_gpu_planes, kernel, lambda *arrays, **_: taken.append(arrays))
    decode.attend_planes(**planes_shapes())
    assert len(taken) == 1
    with pytest.warns(UserWarning, match="64, 128 or 256 as head_dim, got 96"):
        jax.eval_shape(lambda x: decode.attend_planes(**x), planes_shapes(d=96))
    assert len(taken) == 1
    with pytest.raises(InputError, match="unknown implementation 'triton'"):
        decode.attend_planes(**planes_shapes(), implementation="triton")
