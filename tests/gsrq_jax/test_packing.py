import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from gsrq_jax.errors import InputError
from gsrq_jax.packing import code_dtype, pack, unpack

SHAPES = ((1,), (7,), (3, 5), (2, 4, 6))  # few: each is compiled anew for each number of bits
compiled = jax.jit(pack, static_argnums=1), jax.jit(unpack, static_argnums=(1, 2))


@st.composite
def coded(draw):
    bits = draw(st.integers(1, 16))
    shape = draw(st.sampled_from(SHAPES))
    dtype = np.uint8 if bits <= 8 else np.uint16
    return draw(hnp.arrays(dtype, shape, elements=st.integers(0, 2**bits - 1))), bits


@given(coded())
@settings(max_examples=60, deadline=None)
def test_round_trip_and_stream(case):
    codes, bits = case
    n, (pack, unpack) = codes.shape[-1], compiled
    packed = np.asarray(pack(jnp.asarray(codes), bits))
    assert packed.shape == (*codes.shape[:-1], -(-n * bits // 8))
    unpacked = unpack(jnp.asarray(packed), n, bits)
    assert unpacked.dtype == code_dtype(bits) == codes.dtype
    np.testing.assert_array_equal(unpacked, codes)
    row, first = packed.reshape(-1, packed.shape[-1])[0], codes.reshape(-1, n)[0]
    stream = sum(int(code) << (i * bits) for i, code in enumerate(first))
    assert int.from_bytes(row.tobytes(), "little") == stream


@pytest.mark.parametrize("bits", [3, 4, 8, 11])
def test_jit(bits):
    codes = (85 * jnp.arange(24).reshape(2, 12) % 2**bits).astype(code_dtype(bits))
    packed = compiled[0](codes, bits)
    np.testing.assert_array_equal(packed, pack(codes, bits))
    np.testing.assert_array_equal(compiled[1](packed, 12, bits), codes)
    np.testing.assert_array_equal(unpack(packed, 12, bits), codes)


def test_high_bits_are_dropped():
    np.testing.assert_array_equal(pack(jnp.uint8([0xF1, 0xF2]), 4), [0x21])


def test_bad_input():
    codes = jnp.zeros((2, 5), jnp.uint8)
    for bits in (0, 17):
        with pytest.raises(InputError, match="1 to 16 bits"):
            pack(codes, bits)
    with pytest.raises(InputError, match="uint8 is needed here, got int32"):
        pack(codes.astype(jnp.int32), 4)
    with pytest.raises(InputError, match="uint16 is needed here, got uint8"):
        pack(codes, 11)
    with pytest.raises(InputError, match="uint8 is needed here, got uint16"):
        unpack(codes.astype(jnp.uint16), 5, 11)
    with pytest.raises(InputError, match="take 3 bytes"):
        unpack(codes, 5, 4)
