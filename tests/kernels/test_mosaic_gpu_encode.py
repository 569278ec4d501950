"""The kernel that encodes greedily, without a GPU: run on numpy lanes, and assembled."""

import functools
import types

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from lanes import Lanes, run_kernel
from lowering import encode_module, on_abstract, supported
from scripts import script

from gsrq_jax import residual
from gsrq_jax.kernels import devices, mosaic_gpu_encode
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.mosaic_gpu import SHARED_BYTES
from gsrq_jax.kernels.mosaic_gpu_encode import (
    Addresses,
    Config,
    EncodeKernel,
    Problem,
    choose_config,
)

check = script("tests/gpu", "check_encode")


def some(p, seed=0):
    """Vectors and codewords as ``gpu/check_encode.py`` has them; no vector is NaN."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(p.problems, p.points, p.groups * p.channels)).astype(np.float32)
    size = 0.9 ** np.arange(p.stages)[:, None, None] / 4
    shape = (p.problems, p.groups, p.stages, p.codewords, p.channels)
    return x, (size * rng.normal(size=shape)).astype(ml_dtypes.bfloat16)


def run(p, config, x, codewords):
    """Codes by numpy lanes; what lies around the arrays is NaN."""
    words, halves = map(np.asarray, mosaic_gpu_encode._prepared(p, codewords))
    codes = np.full((p.problems, p.points, p.groups, p.code_bytes), 255, np.uint8)

    def program(warp, *places):
        EncodeKernel(p, config, warp, Addresses(*places)).run()

    parts, arrays = p.problems * p.groups * config.parts, (x, words, halves)
    (codes,) = run_kernel(program, parts, config.warps, config.nbytes(p), arrays, [codes])
    return codes[..., : p.stages]


CASES = {
    "two rounds, a ragged end": (Problem(1, 75, 1, 6, 16, 64), Config(4, 6, 1)),
    "all shapes of a head": (Problem(1, 20, 1, 4, 16, 128), Config(4, 4, 1)),
    "parts, loads, problems": (Problem(2, 40, 1, 5, 16, 64), Config(4, 2, 2)),
    "groups, less than a tile": (Problem(1, 5, 2, 3, 16, 64), Config(4, 3, 1)),
    "two columns": (Problem(1, 17, 1, 3, 32, 128), Config(4, 2, 1)),
    "codewords that fill no columns": (Problem(1, 16, 1, 2, 37, 64), Config(8, 2, 1)),
    "one vector": (Problem(1, 1, 1, 1, 16, 64), Config(4, 1, 1)),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_is_the_best_code(case, check):
    p, config = case
    x, codewords = some(p)
    codes = run(p, config, x, codewords)
    assert codes.max() < p.codewords
    lost, may = check.losses(x, codewords, codes)
    assert (lost <= may).all()
    # Codes differ from the encoder's first where its own were in doubt too.
    want = np.asarray(residual.encode(x, codewords))
    differs = codes != want
    first = differs & (np.cumsum(differs, axis=-1) == 1)
    assert (check.losses(x, codewords, want)[0] <= may)[first].all()


def test_equal_codewords_are_decided_for_the_lower():
    p = Problem(1, 33, 1, 3, 32, 64)
    x, codewords = some(p)
    codewords[..., 5, :] = codewords[..., 3, :]  # of another lane, of the same, of other columns
    codewords[..., 7, :] = codewords[..., 6, :]
    codewords[..., 28, :] = codewords[..., 11, :]
    codes = run(p, Config(4, 3, 1), x, codewords)
    assert {3, 6, 11} <= set(codes.flat)
    assert not {5, 7, 28} & set(codes.flat)


def test_vectors_that_are_no_numbers():
    p = Problem(1, 32, 1, 4, 16, 64)
    x, codewords = some(p)
    poisoned = x.copy()
    poisoned[0, 3], poisoned[0, 17, 5], poisoned[0, 30, 63] = np.nan, np.inf, -np.inf
    found, want = (run(p, Config(4, 4, 1), a, codewords) for a in (poisoned, x))
    assert found.max() < 16
    others = np.isfinite(poisoned).all(-1)
    np.testing.assert_array_equal(found[others], want[others])


def test_pieces_are_the_number():
    rng = np.random.default_rng(0)
    x, y = (rng.normal(size=32) * 10.0 ** rng.integers(-20, 20, 32) for _ in range(2))
    x, y = x.astype(np.float32), y.astype(np.float32)
    kernel = types.SimpleNamespace(warp=Lanes())
    words = EncodeKernel._pieces(kernel, x, y)
    assert len(words) == mosaic_gpu_encode.PIECES
    sums = sum(word.view(ml_dtypes.bfloat16).reshape(32, 2).astype(np.float64) for word in words)
    np.testing.assert_array_equal(sums, np.stack([x, y], 1).astype(np.float64))


def test_no_bank_conflicts():
    """The 8 rows of a matrix are in different banks, whatever the step."""
    for channels in (64, 128):
        p = Problem(1, 16, 1, 2, 16, channels)
        warp = Lanes()
        places = Addresses(*[None] * 4, shared=warp.integer(1032))
        kernel = EncodeKernel(p, Config(4, 2, 1), warp, places)
        for step in range(channels // 16):
            stage = kernel.words + p.columns * p.row_bytes
            address = (stage + kernel.matrices) ^ np.uint32(32 * step)
            banks = address.reshape(4, 8) % 128 // 16
            assert (np.sort(banks, axis=1) == np.arange(8)).all()


@pytest.mark.parametrize(
    ("K", "stages", "warps"), [(16, 32, 16), (32, 26, 8), (256, 3, 8)], ids=str
)
def test_config(K, stages, warps):
    p = Problem(8, 8192, 1, stages if K == 16 else 17, K, 128)
    config = choose_config(p)
    assert config.nbytes(p) <= SHARED_BYTES
    assert config.warps == warps
    assert config.stages == min(stages, p.stages)
    assert config.parts == 16
    assert choose_config(Problem(1, 1, 1, 1, 16, 64)).parts == 1


def arguments(lead=(2,), n=40, G=1, R=3, K=16, g=64, words=jnp.bfloat16, dtype=jnp.float32):
    s = jax.ShapeDtypeStruct
    return s((*lead, n, G * g), dtype), s((*lead, G, R, K, g), words)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"g": 96}, "64 or 128 as channels of a group, got 96"),
        ({"K": 257}, "1 to 256 as codewords of a stage, got 257"),
        ({"words": jnp.float32}, "bfloat16 as dtype of the codewords, got float32"),
        ({"dtype": jnp.int32}, "float32 or shorter as dtype of the vectors, got int32"),
        ({"n": 0}, "at least one of each as vectors and stages"),
    ],
)
def test_refused(given, words):
    with pytest.raises(InputError, match=words):
        mosaic_gpu_encode.problem_of(*arguments(**given))


def test_refuses_vectors_that_do_not_fit():
    _, words = arguments()
    with pytest.raises(InputError, match=r"\(2, 'n', 64\) as vectors, got \(3, 40, 64\)"):
        mosaic_gpu_encode.problem_of(jax.ShapeDtypeStruct((3, 40, 64), jnp.float32), words)


@supported
@pytest.mark.parametrize("sizes", [{}, {"g": 64, "R": 5}, {"K": 256, "R": 4}], ids=str)
def test_lowers(sizes):
    assert "encode_residual" in str(encode_module(n=100, **sizes))


@supported
def test_assembles_without_spills(without_a_gpu):
    for sizes in ({}, {"g": 64, "K": 64}, {"K": 256, "R": 16}):
        said = without_a_gpu("greedy", sizes)
        assert "0 bytes spill stores, 0 bytes spill loads" in said, said


PLAIN = functools.partial(residual._encode, beam=1, chunk=None)


def plain_kernel(problem, config):
    """Instead of `encode_kernel`: the encoder, its codes filled up to whole words."""
    more = (0, problem.code_bytes - problem.stages)

    def kernel(x, words, halves):
        assert halves.shape == words.shape[:-1]
        return [jnp.pad(PLAIN(x, words), ((0, 0),) * 3 + (more,))]

    return kernel


@supported
def test_leading_axes(monkeypatch):
    monkeypatch.setattr(mosaic_gpu_encode, "encode_kernel", plain_kernel)
    monkeypatch.setattr(devices, "check_hopper", lambda: None)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.normal(size=(2, 3, 4, 5, 128)), jnp.bfloat16)
    words = jnp.asarray(rng.normal(size=(3, 4, 2, 3, 16, 64)), jnp.bfloat16)
    want = jax.vmap(PLAIN, in_axes=(0, None))(x, words)
    np.testing.assert_array_equal(
        jax.vmap(mosaic_gpu_encode.encode, in_axes=(0, None))(x, words), want
    )
    np.testing.assert_array_equal(mosaic_gpu_encode.encode(x[1], words), want[1])
    one = mosaic_gpu_encode.encode(x[1, 2, 3], words[2, 3])
    np.testing.assert_array_equal(one, want[1, 2, 3])
    assert one.dtype == jnp.uint8


def calls(function, *arguments, platform="cuda"):
    """How often the kernel stands in what a function is lowered to for an H100."""
    with on_abstract():
        traced = jax.jit(lambda *x: function(*x)).trace(*arguments)  # anew
        return traced.lower(lowering_platforms=(platform,)).as_text().count("@mosaic_gpu")


@supported
def test_is_taken_where_it_may_be():
    encode = residual.encode.__wrapped__  # not what was traced before
    assert calls(encode, *arguments()) == 1
    assert calls(encode, *arguments(), platform="cpu") == 0
    assert calls(encode, *arguments(words=jnp.float32)) == 0
    assert calls(functools.partial(encode, beam=2), *arguments()) == 0
    residual.encode(*(jnp.zeros(a.shape, a.dtype) for a in arguments()))  # no GPU: by XLA


@supported
def test_lowers_where_caches_encode():
    x, words = arguments(lead=(5, 2, 3))

    def of_layer(x, words):
        return jax.vmap(residual.encode.__wrapped__, in_axes=(0, None))(x, words)

    def of_layers(x, words):
        return jax.lax.map(lambda x: jax.lax.cond(x.sum() > 0, of_layer, later, x, words), x)

    def later(x, words):
        return jnp.zeros((*x.shape[:-1], 1, 3), jnp.uint8)

    words = jax.ShapeDtypeStruct(words.shape[2:], words.dtype)
    assert calls(of_layers, x, words) == 1
