"""Specs: derived sizes, rates that exist, messages of those that do not."""

import dataclasses
import json
import math
import re

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gsrq_jax.errors import InputError
from gsrq_jax.spec import FRAMES, MOST_BEAM, QuantSpec, ResidualSpec


@st.composite
def residual_specs(draw, dim: int | None = None):
    group = draw(st.sampled_from([1, 2, 4, 8, 16]))
    dim = group * draw(st.integers(1, 8)) if dim is None else dim
    return ResidualSpec(dim, group, draw(st.integers(1, 40)), 2 ** draw(st.integers(1, 16)))


@st.composite
def quant_specs(draw):
    return QuantSpec(
        key=draw(residual_specs(dim=16)),
        value=draw(residual_specs(dim=16)),
        frame=draw(st.sampled_from(FRAMES)),
        block=draw(st.integers(1, 256)),
        window=draw(st.integers(0, 256)),
        sinks=draw(st.integers(0, 8)),
        beam=draw(st.integers(1, MOST_BEAM)),
    )


@settings(max_examples=50, deadline=None)
@given(spec=residual_specs())
def test_sizes_of_one_vector(spec):
    assert spec.groups * spec.group == spec.dim
    assert 2**spec.code_bits == spec.codewords
    assert spec.codes == spec.groups * spec.stages
    assert spec.bits * spec.dim == pytest.approx(spec.codes * spec.code_bits)
    assert 0 <= spec.nbytes * 8 - spec.codes * spec.code_bits < 8
    groups, stages, codewords, group = spec.codebook_shape
    assert (groups * group, stages, codewords) == (spec.dim, spec.stages, spec.codewords)


@settings(max_examples=50, deadline=None)
@given(spec=residual_specs())
def test_from_bits_inverts_bits(spec):
    again = ResidualSpec.from_bits(spec.bits, spec.dim, codewords=spec.codewords, group=spec.group)
    assert again == spec


@pytest.mark.parametrize(
    ("bits", "dim", "codewords", "stages"),
    [(1, 128, 256, 16), (0.25, 128, 256, 4), (1, 64, 16, 16), (2, 128, 16, 64), (0.5, 64, 256, 4)],
)
def test_rates_of_whole_heads(bits, dim, codewords, stages):
    spec = ResidualSpec.from_bits(bits, dim, codewords=codewords)
    assert (spec.stages, spec.groups, spec.bits) == (stages, 1, bits)


@pytest.mark.parametrize(
    ("bits", "says"),
    [
        (0.3, "the nearest rates are 0.25 and 0.375"),
        (0.01, "the lowest rate is 0.125"),
        (0, "the lowest rate is 0.125"),
        (-1, "the lowest rate is 0.125"),
        (math.nan, "the lowest rate is 0.125"),
        (math.inf, "the lowest rate is 0.125"),
        (-math.inf, "the lowest rate is 0.125"),
    ],
)
def test_rates_that_cannot_be_had_name_those_that_can(bits, says):
    with pytest.raises(InputError) as error:
        ResidualSpec.from_bits(bits, 64)
    assert str(error.value).startswith(f"{bits:g} bits cannot be had")
    assert str(error.value).endswith(says)
    for rate in re.findall(r"\d[\d.]*", says):
        assert ResidualSpec.from_bits(float(rate), 64).bits == float(rate)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"group": 3}, "group 3 does not divide the head size 8"),
        ({"group": 0}, "group 0 does not divide"),
        ({"dim": 0}, "head size 0"),
        ({"stages": 0}, "stages must be at least 1, got 0"),
        ({"stages": 2.0}, "stages must be a whole number, got 2.0"),
        ({"codewords": 1}, "got 1"),
        ({"codewords": 24}, "power of two from 2 to 65536, got 24"),
        ({"codewords": 131072}, "got 131072"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"heads": 2}, "codes of 2 heads are for whole heads; leave out the group or heads"),
    ],
)
def test_residual_specs_that_do_not_fit(fields, says):
    with pytest.raises(InputError, match=says) as error:
        ResidualSpec(**({"dim": 8, "group": 4, "stages": 1, "codewords": 16} | fields))
    assert "\n" not in str(error.value)


CODE = ResidualSpec(dim=8, group=4, stages=1, codewords=16)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"value": ResidualSpec(dim=16, group=4, stages=1)}, "keys have 8 channels and values 16"),
        ({"frame": "rotated"}, "unknown frame 'rotated'; choose one of block, pre, post"),
        ({"block": 0}, "block must be at least 1, got 0"),
        ({"window": -1}, "window must be at least 0, got -1"),
        ({"sinks": -1}, "sinks must be at least 0, got -1"),
        ({"outliers": -1}, "outliers must be at least 0, got -1"),
        ({"beam": 0}, r"beam must be from 1 \(greedy\) to 32, got 0"),
        ({"beam": 33}, "got 33"),
    ],
)
def test_quant_specs_that_do_not_fit(fields, says):
    with pytest.raises(InputError, match=says):
        QuantSpec(**({"key": CODE, "value": CODE} | fields))


@settings(max_examples=50, deadline=None)
@given(spec=quant_specs())
def test_json_round_trip_keeps_equality_and_hash(spec):
    again = QuantSpec.from_json(json.loads(json.dumps(spec.to_json())))
    assert again == spec
    assert hash(again) == hash(spec)
    assert again.bits == (spec.key.bits + spec.value.bits) / 2
    assert again.ring == spec.window + spec.block


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data.pop("key"),
        lambda data: data.update(colour="red"),
        lambda data: data["value"].update(colour="red"),
        lambda data: data.update(key=3),
    ],
)
def test_json_that_is_no_spec(change):
    data = QuantSpec(CODE, CODE).to_json()
    change(data)
    with pytest.raises(InputError, match="not a quantisation spec"):
        QuantSpec.from_json(data)


def test_json_with_an_unusable_number():
    data = QuantSpec(CODE, CODE).to_json()
    data["block"] = 0
    with pytest.raises(InputError, match="block must be at least 1"):
        QuantSpec.from_json(data)


def test_json_from_before_there_was_a_beam_or_a_layout():
    data = QuantSpec(CODE, CODE, beam=8).to_json()
    for name in ("beam", "mean_every", "frame_blocks", "layout"):
        del data[name]
    for side in ("key", "value"):
        del data[side]["heads"]
    assert QuantSpec.from_json(data) == QuantSpec(CODE, CODE)


def test_from_bits_passes_fields_on_and_prints():
    spec = QuantSpec.from_bits(1, 128, codewords=16, window=64, frame="pre")
    assert (spec.window, spec.frame, spec.head_dim, spec.bits) == (64, "pre", 128, 1)
    text = "1 bit, 32 stages × 16 codewords, head 128, frame pre, blocks of 128, window 64, sinks 4"
    assert str(spec) == text
    assert str(dataclasses.replace(spec, beam=8)) == f"{text}, beam 8"
    assert str(dataclasses.replace(spec, outliers=3)) == f"{text}, 3 outliers exact"
    framed = dataclasses.replace(spec, frame="block", frame_blocks=4)
    assert str(framed).endswith("sinks 4, 4 blocks to a frame")
    assert framed.frame_tokens == 512
    together = QuantSpec.from_bits(1, 64, heads=3)
    assert (together.key.stages, together.bits, together.stored_bits) == (24, 1, 1)
    assert together.code_heads == (3, 3)
    assert "24 stages × 256 codewords for 3 heads together, head 64" in str(together)
    mixed = str(QuantSpec(CODE, ResidualSpec(dim=8, group=8, stages=2, codewords=16)))
    assert "keys 1 stages × 16 codewords × 2 groups, values 2 stages × 16 codewords" in mixed


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"mean_every": 0}, "at least 1 and divide the block of 128 tokens, got 0"),
        ({"mean_every": 48}, "at least 1 and divide the block of 128 tokens, got 48"),
        ({"mean_every": 16, "frame": "post"}, "for frame 'block'; in frame 'post' it must be 1"),
        ({"frame_blocks": 0}, "frame_blocks must be at least 1, got 0"),
        ({"frame_blocks": 2, "frame": "pre"}, "for frame 'block'; in frame 'pre' it must be 1"),
    ],
)
def test_frames_and_knots_that_cannot_be(fields, says):
    with pytest.raises(InputError, match=says):
        QuantSpec(CODE, CODE, **fields)


# The layout of the fused kernel

NIBBLES = ResidualSpec(dim=64, group=64, stages=3, codewords=16)
TILED = QuantSpec(NIBBLES, NIBBLES, block=256, mean_every=16, layout="tiles")


def test_tiles():
    assert str(TILED).endswith("sinks 4, mean key at every 16 tokens, codes in tiles")
    assert QuantSpec.from_json(json.loads(json.dumps(TILED.to_json()))) == TILED
    keys, values = TILED.code_shapes()
    assert keys.shape == (2, 64)  # codes of 3 × 4 bits in 16
    assert values.shape == (2, 48)
    assert keys.dtype == values.dtype == jnp.uint32
    assert TILED.stored_bits == (16 + 12) / 2 / 64
    assert dataclasses.replace(TILED, layout="packed").stored_bits == 16 / 64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"layout": "columns"}, "unknown layout 'columns'; choose one of packed, tiles, words"),
        ({"frame": "pre", "mean_every": 1}, "takes block as frame, got pre"),
        ({"block": 192}, "takes 0 as block modulo 128 tokens, got 64"),
        (
            {"block": 128, "frame_blocks": 2},
            "takes 0 as block modulo 256 tokens where several have one frame, got 128",
        ),
        ({"outliers": 2}, "takes 0 as outliers, got 2"),
        ({"key_stages": (3, 1), "value_stages": (3, 3)}, "takes None as stages by layer"),
        ({"key": ResidualSpec(64, 64, 3, 64)}, "16 or 256 as codewords of a stage of keys, got 64"),
        ({"value": ResidualSpec(64, 64, 3, 256)}, "16 as codewords of a stage of values, got 256"),
        ({"value": ResidualSpec(64, 32, 3, 16)}, "takes 1 as groups of channels, got 2"),
    ],
)
def test_what_tiles_cannot_hold(change, says):
    with pytest.raises(InputError, match=says):
        dataclasses.replace(TILED, **change)


def test_words():
    """For the TPU kernel: 9 codes are two words of 8, and channels may be in groups."""
    key, value = ResidualSpec(64, 64, 9, 16), ResidualSpec(64, 32, 2, 8)
    spec = QuantSpec(key, value, block=256, layout="words")
    assert str(spec).endswith("codes in words")
    keys, values = spec.code_shapes()
    assert (keys.shape, values.shape) == ((4, 128), (2, 128))
    assert keys.dtype == values.dtype == jnp.int32
    assert spec.stored_bits == (64 + 32) / 2 / 64


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"frame": "post", "mean_every": 1}, "takes block as frame, got post"),
        ({"block": 64}, "takes 0 as block modulo 128 tokens, got 64"),
        ({"frame_blocks": 2}, "takes 1 as blocks to a frame, got 2"),
        ({"key": ResidualSpec(64, 64, 3, 32)}, "2 or 4 or 8 or 16 as codewords of a stage of keys"),
        ({"value": ResidualSpec(64, 64, 3, 16, 2)}, "takes 1 as heads of a code of values, got 2"),
    ],
)
def test_what_words_cannot_hold(change, says):
    with pytest.raises(InputError, match=f"layout .words. .*{says}"):
        dataclasses.replace(TILED, layout="words", **change)


PLANES = QuantSpec.from_bits(1, 64, codewords=2, block=64, layout="planes")


def test_planes():
    """Codes of two codewords a stage, also for heads that share them and layers with their own."""
    assert str(PLANES).endswith("window 128, sinks 4, codes in planes")
    assert QuantSpec.from_json(json.loads(json.dumps(PLANES.to_json()))) == PLANES
    keys, values = PLANES.code_shapes()
    assert keys.shape == values.shape == (2, 64)
    assert keys.dtype == values.dtype == jnp.uint32
    assert PLANES.stored_bits == PLANES.bits == 1
    code = ResidualSpec(64, 64, 96, 2, heads=3)
    shared = dataclasses.replace(
        PLANES, key=code, value=code, key_stages=(96, 32), value_stages=(64, 96), frame_blocks=3
    )
    assert [s.shape for s in shared.code_shapes()] == [(2, 96), (2, 96)]
    assert shared.stored_bits == shared.bits == (64 + 80) / 2 / 3 / 64
    assert shared.blocks_together == 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"frame": "post"}, "takes block as frame, got post"),
        ({"block": 48}, "takes 0 as block modulo 32 tokens, got 16"),
        ({"outliers": 2}, "takes 0 as outliers, got 2"),
        ({"key": ResidualSpec(64, 64, 64, 4)}, "takes 2 as codewords of a stage of keys, got 4"),
        ({"value": ResidualSpec(64, 32, 32, 2)}, "takes 1 as groups of channels, got 2"),
        ({"key": ResidualSpec(64, 64, 48, 2)}, "takes 32 or 64 as stages of keys, got 48"),
        ({"value": ResidualSpec(64, 64, 8, 2)}, "takes 32 as stages of values, got 8"),
        (
            {"key_stages": (64, 40), "value_stages": (64, 64)},
            "takes 32 or 64 as stages of keys, got 40",
        ),
    ],
)
def test_what_planes_cannot_hold(change, says):
    with pytest.raises(InputError, match=f"layout .planes. {says}"):
        dataclasses.replace(PLANES, **change)


# Stages by layer

WHOLE = ResidualSpec(16, 16, 4, 256)
BY_LAYER = QuantSpec(key=WHOLE, value=WHOLE, key_stages=(4, 1, 2), value_stages=(1, 4, 3))


def test_stages_by_layer():
    assert QuantSpec.from_json(json.loads(json.dumps(BY_LAYER.to_json()))) == BY_LAYER
    assert hash(BY_LAYER) == hash(dataclasses.replace(BY_LAYER))
    assert BY_LAYER.bits == BY_LAYER.stored_bits == 8 * (7 / 3 + 8 / 3) / 2 / 16
    keys, values = BY_LAYER.layer_codes
    assert [c.stages for c in keys] == [4, 1, 2]
    assert [c.stages for c in values] == [1, 4, 3]
    assert "1 to 4 stages × 256 codewords" in str(BY_LAYER)
    assert [s.shape for s in BY_LAYER.code_shapes()] == [(128, 4), (128, 4)]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"value_stages": None}, "given together or not at all"),
        ({"value_stages": (4, 4)}, "key_stages are of 3 layers and value_stages of 2"),
        ({"key_stages": (3, 1, 2)}, "the most of them key.stages, 4, got"),
        ({"value_stages": (4, 0, 2)}, "value_stages must be at least 1"),
        ({"key": ResidualSpec(16, 8, 4, 256)}, "only for whole heads"),
    ],
)
def test_stages_by_layer_that_cannot_be(change, says):
    with pytest.raises(InputError, match=says):
        dataclasses.replace(BY_LAYER, **change)


def test_any_integers_and_sequences_of_stages_make_the_same_spec():
    number = np.int64
    whole = ResidualSpec(number(8), number(8), number(2), number(16), number(1))
    spec = QuantSpec(
        key=whole, value=whole, window=number(5), key_stages=[2, number(1)], value_stages=[1, 2]
    )
    code = ResidualSpec(8, 8, 2, 16)
    assert spec == QuantSpec(key=code, value=code, window=5, key_stages=(2, 1), value_stages=(1, 2))
    assert hash(spec) == hash(QuantSpec.from_json(json.loads(json.dumps(spec.to_json()))))
    with pytest.raises(InputError, match=r"window must be a whole number, got 2\.5"):
        dataclasses.replace(spec, window=2.5)
