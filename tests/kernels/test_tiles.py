"""The kernel's layout of codes against its definition, token by token, and back."""

import jax
import numpy as np
import pytest

from gsrq_jax.kernels import tiles
from gsrq_jax.kernels.errors import InputError

STAGES = [1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64]


def codes_of(seed, shape, codewords):
    return np.random.default_rng(seed).integers(0, codewords, shape).astype(np.uint8)


@pytest.mark.parametrize("stages", STAGES)
def test_strips_cover_the_stages_in_powers_of_two(stages):
    parts = tiles.strips(stages)
    assert [r for first, w in parts for r in range(first, first + w)] == list(range(stages))
    assert all(w in (1, 2, 4, 8, 16) and first % w == 0 for first, w in parts)


@pytest.mark.parametrize("codewords", [16, 256])
@pytest.mark.parametrize("stages", STAGES)
def test_keys_there_and_back(stages, codewords):
    codes = codes_of(stages, (2, 3, 2 * tiles.TILE, stages), codewords)
    words = jax.jit(tiles.keys_to_tiles, static_argnums=1)(codes, codewords)
    assert words.shape == (2, 3, 2, tiles.key_words(stages, codewords))
    assert words.dtype == np.uint32
    bits = stages * (4 if codewords == 16 else 8)
    assert words[0, 0, 0].nbytes == tiles.TILE * -(-bits // 16) * 2  # no bit more than 16 allow
    back = jax.jit(tiles.keys_from_tiles, static_argnums=(1, 2))(words, stages, codewords)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize("stages", STAGES)
def test_values_there_and_back(stages):
    codes = codes_of(stages, (3, 2, tiles.TILE, stages), 16)
    words = jax.jit(tiles.values_to_tiles)(codes)
    assert words.shape == (3, 2, 1, tiles.value_words(stages))
    assert words[0, 0].nbytes == tiles.TILE * stages // 2
    back = jax.jit(tiles.values_from_tiles, static_argnums=1)(words, stages)
    assert back.dtype == np.uint8
    np.testing.assert_array_equal(back, codes)


@pytest.mark.parametrize(("stages", "codewords"), [(32, 16), (12, 16), (16, 256), (3, 256)])
def test_a_key_is_where_the_definition_says(stages, codewords):
    codes = codes_of(0, (tiles.TILE, stages), codewords)
    stored = np.asarray(tiles.keys_to_tiles(codes, codewords))[0].tobytes()
    bits, (units, width) = tiles.key_bits(codewords), tiles.key_unit(stages, codewords)
    for t in (0, 1, 7, 16, 31, 32, 77, 127):
        step = 0
        for first, w in tiles.strips(stages):
            for s in range(w):
                unit, low = divmod(step * bits, width)
                at = (unit * tiles.TILE + t) * width // 8
                word = int.from_bytes(stored[at : at + width // 8], "little")
                assert word >> low & (codewords - 1) == codes[t, first + (s ^ t % w)]
                step += 1
    assert units * width * tiles.TILE // 8 == len(stored)


@pytest.mark.parametrize("stages", [8, 16, 24, 32])
def test_lanes_never_meet_in_a_bank(stages):
    """16 neighbours look up 16 different places of a row at every step."""
    order = tiles._step_to_stage(stages)
    step = 0
    for first, w in tiles.strips(stages):
        for s in range(w):
            for t in range(0, tiles.TILE, 16):
                place = (np.arange(16) ^ s) % 16  # of the strip's row, which has copies if w < 16
                np.testing.assert_array_equal(order[t : t + 16, step], first + place % w)
                assert len(set(place)) == 16
            step += 1


def test_a_value_is_where_the_definition_says():
    codes = codes_of(1, (tiles.TILE, 12), 16)
    words = np.asarray(tiles.values_to_tiles(codes))[0].reshape(12, 4, 4)
    for t, r, p in [(0, 0, 0), (31, 3, 1), (32, 3, 2), (127, 11, 3), (64, 5, 0)]:
        assert words[r, t // 32, p] >> (t % 32) & 1 == codes[t, r] >> p & 1


def test_what_has_no_layout_is_refused():
    with pytest.raises(InputError, match="16 or 256 codewords a stage, got 64"):
        tiles.keys_to_tiles(np.zeros((128, 4), np.uint8), 64)
    with pytest.raises(InputError, match="blocks of 100 tokens are not whole tiles of 128"):
        tiles.values_to_tiles(np.zeros((100, 4), np.uint8))
    with pytest.raises(InputError, match="whole tiles"):
        tiles.keys_to_tiles(np.zeros((2, 64, 4), np.uint8), 16)
