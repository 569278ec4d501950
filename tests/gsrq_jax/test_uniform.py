"""Uniform rounding against numpy in float64, and what KIVI's authors say of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsrq_jax.baselines.uniform import Grid, Uniform, UniformSpec
from gsrq_jax.errors import InputError

SPECS = {
    "int8": UniformSpec.rounded(8, 64),
    "int4": UniformSpec.rounded(4, 64, group=32),
    "kivi2": UniformSpec.kivi(2, 64),
    "kivi1": UniformSpec.kivi(1, 64),
    "odd": UniformSpec(12, Grid(3, "tokens", 5), Grid(5, "channels", 4), block=10),
}
specs = pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())


def vectors(spec, *lead, seed=0):
    rng = np.random.default_rng(seed)
    shape = (*lead, spec.block, 3, spec.dim)
    k, v = (jnp.asarray(rng.normal(size=shape), jnp.float32) for _ in "kv")
    return k, v, jnp.broadcast_to(jnp.arange(spec.block), (*lead, spec.block))


def by_hand(x, grid):
    """One block ``[b, H, d]`` in float64."""
    x = np.asarray(x, np.float64)
    if grid.along == "tokens":
        return np.stack([by_hand_rows(x[:, h].T, grid).T for h in range(x.shape[1])], axis=1)
    return np.stack([by_hand_rows(x[:, h], grid) for h in range(x.shape[1])], axis=1)


def by_hand_rows(rows, grid):
    out = np.empty_like(rows)
    for i, row in enumerate(rows):
        for j in range(0, len(row), grid.group):
            part = row[j : j + grid.group]
            low = float(np.float16(part.min()))
            step = float(np.float16((part.max() - low) / (2**grid.bits - 1)))
            out[i, j : j + grid.group] = low + step * np.clip(
                np.round((part - low) / step), 0, 2**grid.bits - 1
            )
    return out


@specs
def test_numbers_and_shapes(spec):
    codec = Uniform(spec)
    k, v, at = vectors(spec, 2)
    codes = jax.jit(codec.encode)(k, v, at)
    got = jax.tree.map(lambda a: (a.shape[2:], a.dtype), codes)
    assert got == jax.tree.map(lambda s: (s.shape, s.dtype), spec.code_shapes())
    assert jax.tree.leaves(codes)[0].shape[:2] == (2, 3)
    decoded = jax.jit(codec.decode)(*codes, at)
    for x, grid, old in zip((k, v), (spec.key, spec.value), decoded, strict=True):
        want = np.stack([by_hand(block, grid) for block in x])
        # A number half-way between two grid points may fall to either in float32.
        wrong = np.abs(np.asarray(old) - want) > 1e-5
        assert wrong.mean() < 1e-3
        assert old.dtype == jnp.float32


def test_bits():
    """KIVI's 3 bits at 2 with groups of 32, and the others' by the same count."""
    want = {"int8": 8.5, "int4": 5.0, "kivi2": 3.0, "kivi1": 2.0}
    assert {name: SPECS[name].stored_bits for name in want} == want


def test_keys_with_large_channels_want_groups_along_tokens():
    """The observation KIVI rests on: outlier channels spoil a token's grid, not a channel's."""
    spec = SPECS["kivi2"]
    k, v, at = vectors(spec)
    k = k.at[..., 3].add(20.0)
    tokens = UniformSpec(64, spec.value, spec.value)

    def error(spec):
        old, _ = Uniform(spec).decode(*Uniform(spec).encode(k, v, at), at)
        return float(jnp.mean(jnp.square(old - k)))

    assert error(spec) < error(tokens) / 4


def test_constant_groups_come_back():
    spec = SPECS["kivi1"]
    k = jnp.full((spec.block, 1, 64), 0.5)
    old, _ = Uniform(spec).decode(*Uniform(spec).encode(k, k, None), None)
    np.testing.assert_array_equal(old, k)


@pytest.mark.parametrize(
    ("key", "message"),
    [
        (Grid(2, "tokens", 48), "groups of 48 do not divide 128 tokens"),
        (Grid(2, "channels", 48), "groups of 48 do not divide 64 channels"),
        (Grid(9, "channels", 32), "1 to 8 bits, got 9"),
        (Grid(2, "heads", 32), "along channels or tokens, not 'heads'"),
    ],
)
def test_refused(key, message):
    with pytest.raises(InputError, match=message):
        UniformSpec(64, key, Grid(2, "channels", 32))
