"""Codes in every layout and out of it again."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gsrq_jax.layouts import LAYOUTS
from gsrq_jax.spec import QuantSpec, ResidualSpec

SPECS = {
    "packed": QuantSpec(ResidualSpec(16, 16, 3, 32), ResidualSpec(16, 8, 2, 4), block=24),
    "tiles": QuantSpec(ResidualSpec(16, 16, 3, 256), ResidualSpec(16, 16, 5, 16), block=256),
    "words": QuantSpec(ResidualSpec(16, 16, 9, 16), ResidualSpec(16, 8, 2, 8), block=256),
    "planes": QuantSpec(ResidualSpec(16, 16, 96, 2, 2), ResidualSpec(16, 16, 32, 2), block=64),
}


def some_codes(spec):
    rng = np.random.default_rng(0)
    return [
        jnp.asarray(rng.integers(0, c.codewords, (3, 2, spec.block, c.groups, c.stages)), jnp.uint8)
        for c in (spec.key, spec.value)
    ]


def test_every_layout_is_tried():
    assert SPECS.keys() == LAYOUTS.keys()


@pytest.mark.parametrize("name", LAYOUTS)
def test_there_and_back(name):
    spec = dataclasses.replace(SPECS[name], layout=name)
    codes = some_codes(spec)
    stored = jax.jit(lambda *x: spec.arrangement.pack(*x, spec))(*codes)
    for x, shape in zip(stored, spec.code_shapes(), strict=True):
        assert (x.shape, x.dtype) == ((3, 2, *shape.shape), shape.dtype)
    back = jax.jit(lambda *x: spec.arrangement.unpack(*x, spec))(*stored)
    for x, y in zip(back, codes, strict=True):
        assert x.dtype == jnp.uint8
        np.testing.assert_array_equal(x, y)


@pytest.mark.parametrize("name", ["packed", "planes"])
def test_codes_are_their_units(name):
    spec = dataclasses.replace(SPECS[name], layout=name)
    layout = spec.arrangement
    stored = layout.pack(*some_codes(spec), spec)
    for x, code in zip(stored, (spec.key, spec.value), strict=True):
        units = layout.to_units(x)
        assert len(units) == layout.units(code)
        np.testing.assert_array_equal(layout.from_units(units), x)


def test_a_unit_of_planes_is_32_stages():
    """So a layer that has fewer stages reads its own in the first units of one that has more."""
    spec = dataclasses.replace(SPECS["planes"], layout="planes")
    layout, codes = spec.arrangement, some_codes(spec)
    keys, _ = layout.pack(*codes, spec)
    first, _ = layout.pack(codes[0][..., :32], codes[1], spec)
    np.testing.assert_array_equal(layout.from_units(layout.to_units(keys)[:1]), first)
