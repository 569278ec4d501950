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


def test_planes_of_other_numbers_of_stages():
    """Fewer are the first ones; where there come more, they are 0."""
    spec = dataclasses.replace(SPECS["planes"], layout="planes")
    layout, codes, whole = spec.arrangement, some_codes(spec), (spec.key, spec.value)
    few = dataclasses.replace(spec.key, stages=32), spec.value
    stored = layout.pack(*codes, spec)
    narrow = layout.restaged(*stored, whole, few)
    for x, y in zip(narrow, layout.pack(codes[0][..., :32], codes[1], spec), strict=True):
        np.testing.assert_array_equal(x, y)
    wide, _ = layout.unpack(*layout.restaged(*narrow, few, whole), spec)
    np.testing.assert_array_equal(wide, codes[0].at[..., 32:].set(0))
