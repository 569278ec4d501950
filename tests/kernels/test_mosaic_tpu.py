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

from gsrq_jax.kernels import mosaic_tpu, reference
from gsrq_jax.kernels.mosaic_tpu import Tiling


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


attend = jax.jit(
    functools.partial(mosaic_tpu.attend_codes, interpret=True),
    static_argnames=("tiling", "pieces"),
)


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
    keys, values = rng.normal(size=(2, 1, 9, 1, shape.d)).astype(np.float32)
    mask = np.arange(9) < rng.integers(1, 9, (1, 1, 1))
    exact = reference.attend_exact(x["query"][..., 0, :], keys, values, mask)
    want = reference.merge([reference.attend_codes(**x), exact])
    coded = attend(**poison(x), tiling=shape.tiling, pieces=2)
    for a, b in zip(reference.merge([coded, exact]), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("G", "R", "parts"), [(1, 32, 2), (3, 3, 4), (1, 1, 1), (2, 12, 8)])
def test_words_hold_every_code(G, R, parts):
    codes = np.random.default_rng(3).integers(0, 16, (2, 3, 2, 1024, G, R)).astype(np.uint8)
    words = mosaic_tpu.to_words(codes, parts)
    assert words.nbytes == codes.size // (G * R) * 4 * -(-G * R // 8)
    np.testing.assert_array_equal(mosaic_tpu.from_words(words, parts, codes.shape), codes)


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
    with pytest.raises(NotImplementedError, match="1 to 8 query rows a KV head, not 9"):
        mosaic_tpu.tiling_of(9, 1, 128)
    with pytest.raises(NotImplementedError, match="multiple of 128 tokens, not 64"):
        mosaic_tpu.tiling_of(4, 1, 64)
    with pytest.raises(NotImplementedError, match="at most 2048 tokens for 4 rows, not 4096"):
        mosaic_tpu.tiling_of(4, 1, 4096)
    with pytest.raises(NotImplementedError, match="at most 16 codewords a stage, not 256"):
        mosaic_tpu.attend_codes(**x | {"value_codewords": np.zeros((1, 1, 2, 256, 16), "f")})
    with pytest.raises(NotImplementedError, match="one shift for all blocks"):
        mosaic_tpu.attend_codes(**x | {"shift": np.zeros((1, 17, 128, 16), "f")})


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
        jax.jit(functools.partial(mosaic_tpu.attend_words, tiling=tiling))
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
