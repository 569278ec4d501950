"""The TPU kernel in TPU interpret mode against the reference, and compiled without a TPU."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from gsrq_jax.kernels import decode, mosaic_tpu, reference
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.mosaic_tpu import Tiling
from gsrq_jax.kernels.words import from_words, to_words


@dataclasses.dataclass(frozen=True)
class Shape:
    """B sequences, T queries, H KV heads, q query heads each, N blocks of b; codes of K and V."""

    B: int
    T: int
    H: int
    q: int
    N: int
    b: int
    key: tuple[int, int, int]  # G, R, K
    value: tuple[int, int, int]
    d: int
    blocks: tuple[int, ...]
    tiling: Tiling
    scale: float = 0.3


SHAPES = {
    # One split of two steps, the second of them half outside; two parts a tile.
    "ragged": Shape(
        3, 1, 2, 4, 7, 256, (1, 9, 16), (2, 3, 16), 24, (7, 0, 5), Tiling(2, 1, 4, 2, 2, 1)
    ),
    # Two splits, one of them empty for a sequence; eight rows and one part.
    "splits": Shape(
        2, 2, 1, 4, 17, 128, (1, 4, 8), (1, 2, 5), 16, (17, 3), Tiling(1, 1, 8, 2, 2, 2)
    ),
    # One row, so four parts a tile, two tiles a block.
    "one head": Shape(
        1, 1, 1, 1, 1, 1024, (2, 2, 16), (1, 1, 2), 8, (1,), Tiling(8, 1, 1, 1, 1, 1)
    ),
    "large scores": Shape(
        1, 1, 1, 3, 2, 512, (1, 3, 16), (1, 2, 16), 16, (2,), Tiling(2, 2, 2, 1, 1, 1), 20.0
    ),
}


def make(shape, seed=0):
    """Arguments of attend_codes, float32 and uint8."""
    s, rng = shape, np.random.default_rng(seed)

    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    def codes(G, R, K):
        return rng.integers(0, K, (s.B, s.H, s.N, s.b, G, R)).astype(np.uint8)

    return {
        "query": s.scale * normal(s.B, s.T, s.H, s.q, s.N, s.d),
        "shift": normal(s.H, 1, s.b, s.d),
        "key_codes": codes(*s.key),
        "value_codes": codes(*s.value),
        "key_codewords": normal(s.H, *s.key, s.d // s.key[0]),
        "value_codewords": normal(s.H, *s.value, s.d // s.value[0]),
        "blocks": np.array(s.blocks, np.int32),
    }


def poison(x):
    """All bits set and NaN beyond the valid blocks."""
    x = {name: a.copy() for name, a in x.items()}
    for row, n in enumerate(x["blocks"]):
        x["key_codes"][row, :, n:] = x["value_codes"][row, :, n:] = 255
        x["query"][row, :, :, :, n:] = np.nan
    return x


@functools.partial(jax.jit, static_argnames=("tiling", "pieces"))
def attend(key_codes, value_codes, **x):
    codes = {"key_words": to_words(key_codes), "value_words": to_words(value_codes)}
    return mosaic_tpu.attend_codes(**x, **codes, interpret=True)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_is_the_reference(shape):
    """With three pieces to 1e-5 of the scores' size, over poisoned padding."""
    x = make(shape)
    want = reference.attend_codes(**x)
    got = attend(**poison(x), tiling=shape.tiling, pieces=3)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, shape.scale), rtol=1e-5)
    assert np.isneginf(got[1])[np.array(shape.blocks) == 0].all()


def test_two_pieces_are_close_and_merge_with_a_window():
    shape = dataclasses.replace(SHAPES["ragged"], B=1, H=1, blocks=(5,))
    x, rng = make(shape, seed=1), np.random.default_rng(2)
    x["query"][:] = x["query"][..., :1, :]
    keys, values = rng.normal(size=(2, 1, 1, 9, shape.d)).astype(np.float32)
    mask = np.arange(9) < rng.integers(1, 9, (1, 1, 1))
    exact = reference.attend_exact(x["query"][..., 0, :], keys, values, mask)
    want = reference.merge([reference.attend_codes(**x), exact])
    coded = attend(**poison(x), tiling=shape.tiling, pieces=2)
    for a, b in zip(reference.merge([coded, exact]), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("G", "R"), [(1, 32), (3, 3), (1, 1), (2, 12)])
def test_words_hold_every_code(G, R):
    codes = np.random.default_rng(3).integers(0, 16, (2, 3, 2, 384, G, R)).astype(np.uint8)
    words = to_words(codes)
    assert words.shape == (2, 3, 2, 3 * -(-G * R // 8), 128)
    np.testing.assert_array_equal(from_words(words, G, R), codes)
    with pytest.raises(InputError, match="blocks of 192 tokens are not whole rows of 128"):
        to_words(codes[..., :192, :, :])


def laid_out(T=1, q=4, K=16, stride=1):
    """Arguments of attend_words; the second sequence has fewer blocks."""
    rng = np.random.default_rng(4)
    B, H, N, b, d, G, R = 2, 2, 3, 256, 16, 2, 5

    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    def codes():
        return to_words(rng.integers(0, K, (B, H, N, b, G, R)).astype(np.uint8))

    arrays = {
        "query": 0.3 * normal(B, T, H, q, d),
        "mean": normal(H, d),
        "inv_freq": 100.0 ** -np.linspace(0, 1, d // 2, dtype=np.float32),
        "key_words": codes(),
        "value_words": codes(),
        "key_codewords": normal(H, G, R, K, d // G),
        "value_codewords": normal(H, G, R, K, d // G),
        "blocks": np.array([3, 1], np.int32),
    }
    return arrays, {"first": 4, "stride": stride, "every": 16}


def test_of_a_cache_is_the_reference():
    """More rows than the kernel takes at a time, and blocks that do not follow each other."""
    x, options = laid_out(T=3, q=3, stride=2)
    want = reference.attend_words(**x, **options)
    attend = functools.partial(mosaic_tpu.attend_words, interpret=True, **options)
    for a, b in zip(jax.jit(lambda x: attend(**x))(x), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_which_is_taken(monkeypatch):
    x, options = laid_out()
    decode._say.cache_clear()
    with pytest.warns(UserWarning, match="fused TPU kernel is for TPUs, this is cpu; use"):
        got = decode.attend_words(**x, **options)
    want = decode.attend_words(**x, **options, implementation="reference")
    np.testing.assert_array_equal(got[0], want[0])
    with pytest.raises(InputError, match="fused TPU kernel is for TPUs, this is cpu"):
        decode.attend_words(**x, **options, implementation="fused")
    taken = []
    monkeypatch.setattr(mosaic_tpu, "check_device", lambda: None)

    def attend_words(*_, **how):
        taken.append(how)
        return want

    monkeypatch.setattr(mosaic_tpu, "attend_words", attend_words)
    got = decode.attend_words(**x, **options)
    assert taken == [options]
    np.testing.assert_array_equal(got[0], want[0])
    with pytest.warns(UserWarning, match="1 to 8 as query rows of a KV head, got 9"):
        decode.attend_words(**laid_out(q=9)[0], **options)


def test_tilings():
    eight_b = mosaic_tpu.tiling_of(4, 512, 256)
    assert (eight_b.parts, eight_b.tiles, eight_b.rows) == (2, 1, 4)
    assert eight_b.chunk * eight_b.steps == 512
    assert mosaic_tpu.tiling_of(8, 10, 128).parts == 1
    cases = [(1, 33, 512, 3), (3, 100, 384, 7), (8, 1, 128, 4), (8, 11, 384, 1), (1, 9, 1024, 2)]
    for rows, blocks, block, splits in cases:
        t = mosaic_tpu.tiling_of(rows, blocks, block, splits)
        assert t.parts * t.tiles * 128 == block
        assert t.rows >= rows
        assert t.chunk % t.group == 0
        whole = t.chunk == blocks
        assert whole or (t.chunk * t.rows % 8, t.chunk * t.tiles * t.parts % 8) == (0, 0)
        assert t.splits <= splits
        assert (t.splits - 1) * t.steps * t.chunk < blocks <= t.splits * t.steps * t.chunk


def test_says_what_it_does_not_have():
    x = make(SHAPES["splits"])
    with pytest.raises(InputError, match="1 to 8 as query rows of a KV head, got 9"):
        mosaic_tpu.tiling_of(9, 1, 128)
    with pytest.raises(InputError, match="a multiple of 128 as tokens of a block, got 64"):
        mosaic_tpu.tiling_of(4, 1, 64)
    with pytest.raises(InputError, match="at most 2048 as tokens of a block for 4 query rows"):
        mosaic_tpu.tiling_of(4, 1, 4096)
    with pytest.raises(InputError, match="at most 16 as codewords of a stage, got 256"):
        attend(**x | {"value_codewords": np.zeros((1, 1, 2, 256, 16), "f")})
    with pytest.raises(InputError, match="one for all blocks as shifts of the mean key, got 17"):
        attend(**x | {"shift": np.zeros((1, 17, 128, 16), "f")})


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, TPU's compiler, is not installed"
)
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_compiles_for_tpus(chip):
    """LLaMA-3-8B's attention at 1 bit over 32k tokens."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    B, H, q, d, N, b, R = 1, 8, 4, 128, 128, 256, 32
    tiling = mosaic_tpu.tiling_of(q, N, b)

    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    compiled = (
        jax.jit(functools.partial(mosaic_tpu.fused_kernel, tiling=tiling))
        .lower(
            of(B, H, N * q, d),
            of(H, b, d),
            of(B, H, N * b * R // 8 // 128, 128, dtype=jnp.int32),
            of(B, H, N * b * R // 8 // 128, 128, dtype=jnp.int32),
            of(H, 16 * R, d),
            of(B, dtype=jnp.int32),
        )
        .compile()
    )
    assert "tpu_custom_call" in compiled.as_text()
    # Nothing of the size context × head_dim is there beside the codes.
    assert compiled.memory_analysis().temp_size_in_bytes < N * b * d
