"""Which implementation is taken, and what is said about it."""

import functools
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lowering import shapes
from test_mosaic_gpu import Shape, in_float64, make, options
from test_mosaic_gpu_recent import some as some_recent
from test_reference import check

from gsrq_jax.kernels import decode, devices, mosaic_gpu, mosaic_gpu_recent
from gsrq_jax.kernels.errors import InputError


@pytest.fixture(autouse=True)
def nothing_said_yet():
    decode._say.cache_clear()


def test_without_a_gpu_the_reference_is_taken_and_said_once():
    shape = Shape(B=2, N=2, b=128, R=4, S=4, blocks=(1, 2))
    x = make(shape)
    attend = functools.partial(decode.attend_tiles, **options(shape))
    with pytest.warns(UserWarning, match=r"the fused GPU kernel is for .*the reference is used"):
        got = jax.jit(lambda x: attend(**x))(x)
    check(got, in_float64(shape, x))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again = jax.jit(attend)(**x)
        asked = jax.jit(lambda x: attend(**x, implementation="reference"))(x)
    for a, b, c in zip(got, again, asked, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)
        np.testing.assert_allclose(a, c, atol=1e-5)


def test_values_come_in_the_dtype_that_is_asked_for():
    shape = Shape(B=2, N=2, b=128, R=4, S=4, blocks=(1, 0))
    x = make(shape)
    attend = functools.partial(decode.attend_tiles, **options(shape), implementation="reference")
    sizes = mosaic_gpu_recent.Problem(shape.B, shape.H, shape.q, shape.d, 4, 9)
    _, exact = some_recent(sizes, [4, 1], [3, 0], [9, 0], [1, 0])
    for recent in (None, exact):
        want, _ = attend(**x, recent=recent)
        short, lse = attend(**x, recent=recent, dtype=jnp.bfloat16)
        assert (want.dtype, short.dtype, lse.dtype) == (jnp.float32, jnp.bfloat16, jnp.float32)
        np.testing.assert_array_equal(short, want.astype(jnp.bfloat16))


def test_the_kernel_is_taken_where_it_is_supported(monkeypatch):
    taken = []
    monkeypatch.setattr(devices, "check_hopper", lambda: None)
    monkeypatch.setattr(mosaic_gpu, "attend_tiles", lambda *arrays, **_: taken.append(arrays))
    decode.attend_tiles(**shapes())
    decode.attend_tiles(**shapes(d=96), implementation="fused")
    assert len(taken) == 2
    with pytest.warns(UserWarning, match="64 or 128 as head_dim, got 96"):
        jax.eval_shape(lambda x: decode.attend_tiles(**x), shapes(d=96))
    assert len(taken) == 2


def test_what_was_asked_for_is_not_replaced():
    with pytest.raises(InputError, match="the fused GPU kernel is for"):
        decode.attend_tiles(**shapes(), implementation="fused")
    with pytest.raises(InputError, match="unknown implementation 'triton'; choose 'fused' or"):
        decode.attend_tiles(**shapes(), implementation="triton")
