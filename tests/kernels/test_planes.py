"""The layout of bit planes against its definition, bit by bit, and back."""

import jax
import numpy as np
import pytest

from gsrq_jax.kernels import planes
from gsrq_jax.kernels.errors import InputError

STAGES = [32, 64, 96, 128, 160, 256, 288, 512]
both = pytest.mark.parametrize(
    ("there", "back"),
    [
        (planes.keys_to_planes, planes.keys_from_planes),
        (planes.values_to_planes, planes.values_from_planes),
    ],
    ids=["keys", "values"],
)


def bits_of(seed, *shape):
    return np.random.default_rng(seed).integers(0, 2, shape).astype(np.uint8)


@both
@pytest.mark.parametrize("stages", STAGES)
def test_there_and_back(there, back, stages):
    bits = bits_of(stages, 2, 3, 2 * planes.TILE, stages)
    words = jax.jit(there)(bits)
    assert words.shape == (2, 3, 2, stages)
    assert words.dtype == np.uint32
    again = jax.jit(back)(words)
    assert again.dtype == np.uint8
    np.testing.assert_array_equal(again, bits)


@both
def test_every_bit_has_a_place(there, back):
    words = bits_of(0, 3, 96) * np.uint32(1) << 31
    np.testing.assert_array_equal(there(back(words)), words)


@pytest.mark.parametrize("stages", STAGES)
def test_a_key_is_where_the_definition_says(stages):
    bits = bits_of(stages, 2 * planes.TILE, stages)
    words = np.asarray(planes.keys_to_planes(bits))
    for token in range(2 * planes.TILE):
        tile, (w, g) = token // 32, divmod(token % 32, 8)
        for word in range(stages // 32):
            s, t = divmod(word, 4)
            n = min(4, stages // 32 - 4 * s)
            stored = words[tile, 128 * s + 4 * (n * g + t) + w]
            want = bits[token, 32 * word : 32 * word + 32]
            np.testing.assert_array_equal(stored >> np.arange(32, dtype=np.uint32) & 1, want)


@pytest.mark.parametrize("stages", STAGES)
def test_a_value_is_where_the_definition_says(stages):
    bits = bits_of(stages, planes.TILE, stages)
    (words,) = np.asarray(planes.values_to_planes(bits))
    for token in range(planes.TILE):
        j, k, t = token // 8, token // 4 % 2, token % 4
        for stage in range(stages):
            m, i, g = stage // 64, stage // 8 % 8, stage % 8
            if stages - 64 * m >= 64:
                word, bit = 64 * m + 2 * (4 * g + t) + k, 8 * j + i
            else:
                word, bit = 64 * m + 4 * g + t, 8 * j + 4 * k + i
            assert words[word] >> bit & 1 == bits[token, stage]


def test_what_has_no_layout_is_refused():
    with pytest.raises(InputError, match=r"blocks of 40 tokens .* choose a multiple of 32"):
        planes.keys_to_planes(np.zeros((2, 40, 64), np.uint8))
    with pytest.raises(InputError, match=r"keys of 48 stages .* choose a multiple of 32"):
        planes.keys_to_planes(np.zeros((32, 48), np.uint8))
    with pytest.raises(InputError, match=r"values of 100 stages .* choose a multiple of 32"):
        planes.values_to_planes(np.zeros((64, 100), np.uint8))
    with pytest.raises(InputError, match="values of 0 stages"):
        planes.values_from_planes(np.zeros((1, 0), np.uint32))
