"""The TPU kernel over bit planes in TPU interpret mode against the reference, and compiled."""

import dataclasses
import functools
import importlib.util

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from gsrq_jax.kernels import decode, devices, mosaic_tpu_planes, planes, reference
from gsrq_jax.kernels.errors import InputError


@dataclasses.dataclass(frozen=True)
class Shape:
    """B sequences, T queries, H KV heads, q query heads each, N blocks of b, R and S stages."""

    B: int = 2
    T: int = 1
    H: int = 2
    q: int = 4
    N: int = 3
    b: int = 256
    d: int = 64
    R: int = 64
    S: int = 64
    shared: tuple[int, int] = (1, 1)  # by this many heads: keys, values
    blocks: tuple[int, ...] = (3, 1)
    every: int = 1
    fills: int = 1
    scale: float = 0.3


SHAPES = {
    "1 bit, an empty sequence": Shape(d=128, R=128, S=128, blocks=(0, 2), every=32),
    "parts of frames": Shape(b=512, N=2, R=32, S=96, fills=16, blocks=(19, 1), every=16),
    "two steps": Shape(B=3, H=1, N=34, R=160, S=64, blocks=(33, 34, 0)),
    "one query head": Shape(q=1, R=96, S=32),
    "eight": Shape(q=8, H=1, R=288, S=128, scale=20.0),
    "rows twice, heads together": Shape(q=3, T=3, H=4, shared=(2, 4), R=224, S=320),
    "four heads together": Shape(q=2, H=4, shared=(4, 4), R=512, S=512, N=1, blocks=(1, 1)),
    "three heads together": Shape(B=1, q=1, H=3, shared=(3, 3), R=64, S=160, blocks=(2,)),
    "two steps of words, apart": Shape(B=1, H=1, N=1, R=256, S=256, blocks=(1,)),
    "two steps of words, side by side": Shape(B=1, H=1, q=8, N=1, R=256, blocks=(1,)),
    "eight query tokens": Shape(B=1, T=8, q=2, H=2, shared=(2, 2), blocks=(3,)),
}


def make(shape, seed=0):
    """Arguments of attend_planes."""
    s, rng = shape, np.random.default_rng(seed)

    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    def words(share, stages):
        size = (s.B, s.H // share, s.N, s.b // planes.TILE, stages)
        return rng.integers(0, 2**32, size, np.uint32)

    arrays = {
        "query": s.scale * normal(s.B, s.T, s.H, s.q, s.d),
        "mean": normal(s.H, s.d),
        "inv_freq": 100.0 ** -np.linspace(0, 1, s.d // 2, dtype=np.float32),
        "key_planes": words(s.shared[0], s.R),
        "value_planes": words(s.shared[1], s.S),
        "key_codewords": normal(s.H, 1, s.R, 2, s.d) / np.float32(np.sqrt(s.R)),
        "value_codewords": normal(s.H, 1, s.S, 2, s.d) / np.float32(np.sqrt(s.S)),
        "blocks": np.array(s.blocks, np.int32),
    }
    return arrays, {"first": 4, "stride": 2, "every": s.every, "fills": s.fills}


def poisoned(x, fills):
    """All bits set beyond the valid blocks."""
    x = {name: a.copy() for name, a in x.items()}
    for row, n in enumerate(x["blocks"]):
        frames, rest = divmod(n, fills)
        for name in ("key_planes", "value_planes"):
            tiles = x[name].shape[3] // fills
            x[name][row, :, frames + (rest > 0) :] = 2**32 - 1
            if rest:
                x[name][row, :, frames, rest * tiles :] = 2**32 - 1
    return x


def attended(x, how, **options):
    attend = functools.partial(mosaic_tpu_planes.attend_planes, interpret=True, **how, **options)
    return jax.block_until_ready(jax.jit(lambda x: attend(**x))(x))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_is_the_reference(shape):
    """With three pieces to 1e-5 of the scores' size, over poisoned padding."""
    x, how = make(shape)
    want = jax.block_until_ready(reference.attend_planes(**x, **how))
    got = attended(poisoned(x, shape.fills), how, pieces=3)
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5 * max(1, shape.scale), rtol=1e-5)
    assert np.isneginf(got[1])[np.array(shape.blocks) == 0].all()
    assert not np.asarray(got[0])[np.array(shape.blocks) == 0].any()


def test_two_pieces_are_close():
    x, how = make(Shape(B=1, H=1, blocks=(2,)), seed=1)
    want = jax.block_until_ready(reference.attend_planes(**x, **how))
    for a, b in zip(attended(x, how), want, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4, rtol=1e-4)


def test_queries_of_a_sequence_stay_its_own():
    """NaN in the queries and codewords of others is not seen."""
    x, how = make(Shape(B=2, H=2, N=1, blocks=(1, 1)), seed=2)
    want = jax.block_until_ready(reference.attend_planes(**x, **how))
    x["query"][1] = x["query"][:, :, 1] = np.nan
    x["key_codewords"][1] = x["value_codewords"][1] = x["mean"][1] = np.nan
    for a, b in zip(attended(x, how, pieces=3), want, strict=True):
        np.testing.assert_allclose(a[0, :, 0], b[0, :, 0], atol=1e-5, rtol=1e-5)
        assert np.isnan(a[0, :, 1]).all()
        assert np.isnan(a[1]).all()


def test_without_blocks():
    x, how = make(Shape(N=0, blocks=(0, 0)))
    out, lse = attended(x, how)
    assert not np.asarray(out).any()
    assert np.isneginf(lse).all()


@pytest.mark.parametrize("stages", [32, 64, 96, 128, 160, 512])
def test_bits_are_where_the_layout_has_them(stages):
    """What lanes, shifts and masks select of a tile's words is the bit of that stage and token."""
    rng = np.random.default_rng(stages)
    bits = rng.integers(0, 2, (2, 128, stages)).astype(np.uint8)
    keys = np.asarray(planes.keys_to_planes(bits))  # [run, tile, words]
    stage, unit = mosaic_tpu_planes.key_rows(stages)
    token = mosaic_tpu_planes.token_of_lane()
    assert sorted(token) == list(range(128))
    lanes = mosaic_tpu_planes.key_lanes(stages)
    for row, of in enumerate(stage):
        step, place, sublane, byte = np.unravel_index(row, (len(lanes), 8, 8, 4))
        if np.isinf(unit[row]):
            continue
        run = sublane // 4
        words = keys[run, np.arange(128) // 32, 128 * step + lanes[step, sublane]]
        found = words >> place // 4 * 4 >> 8 * byte & 1 << place % 4
        np.testing.assert_array_equal(found, bits[run][token, of] * unit[row])
    values = np.asarray(planes.values_to_planes(bits))
    lanes, shift, mask = (np.concatenate(x, 1) for x in mosaic_tpu_planes.value_lanes(stages))
    stage, unit = mosaic_tpu_planes.value_stages(stages), mosaic_tpu_planes.value_unit(stages)
    assert sorted(stage[stage >= 0]) == list(range(stages))
    there = stage >= 0
    first = np.arange(len(stage)) // 128 * 128
    for row in range(32):
        sublane, byte = divmod(row, 4)
        words = values[0, 0, np.where(there, first + lanes[sublane], 0)]
        found = (words >> shift[sublane] & mask[sublane]) >> 8 * byte & 255
        want = bits[0][token[row], np.maximum(stage, 0)] * unit * there
        np.testing.assert_array_equal(found.astype(np.uint8).astype(np.int8), want)


def test_which_is_taken(monkeypatch):
    shape = Shape(H=1, N=1, blocks=(1, 0))
    x, how = make(shape)
    decode._say.cache_clear()
    want = decode.attend_planes(**x, **how)
    with pytest.raises(InputError, match="the fused GPU kernel takes bfloat16"):  # not the TPU's
        decode.attend_planes(**x, **how, implementation="fused")
    with pytest.raises(InputError, match="fused TPU kernel is for TPUs, this is cpu; use"):
        mosaic_tpu_planes.attend_planes(**x, **how)
    monkeypatch.setattr(devices, "on_tpu", lambda: True)
    taken = []

    def attend_planes(*_, **how):
        taken.append(how)
        return want

    monkeypatch.setattr(mosaic_tpu_planes, "attend_planes", attend_planes)
    got = decode.attend_planes(**x, **how)
    assert taken == [how]
    np.testing.assert_array_equal(got[0], want[0])
    with pytest.warns(UserWarning, match="1 to 8 as query rows of a KV head, got 9"):
        decode.attend_planes(**make(dataclasses.replace(shape, q=9))[0], **how)
    assert taken == [how]


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        (Shape(q=9), "1 to 8 as query rows of a KV head, got 9"),
        (Shape(b=128), "a multiple of 256 as tokens of a block, got 128"),
        (Shape(b=8192, N=1), "at most 4096 as tokens of a block, got 8192"),
        (Shape(d=96), "64 or 128 as head_dim, got 96"),
        (Shape(R=544), "at most 512 as stages of keys, got 544"),
        (Shape(S=544), "at most 512 as stages of values, got 544"),
        (Shape(S=48), "values of 48 stages are not whole words: choose a multiple of 32"),
    ],
)
def test_says_what_it_does_not_have(shape, message):
    x, how = make(shape)
    with pytest.raises(InputError, match=message) as refused:
        attended(x, how)
    assert "\n" not in str(refused.value)


def test_tilings():
    at_1_bit = mosaic_tpu_planes.tiling_of(4, 1, 512, 256)
    assert (at_1_bit.heads, at_1_bit.rows, at_1_bit.parts, at_1_bit.chunk) == (1, 4, 2, 32)
    together = mosaic_tpu_planes.tiling_of(4, 2, 512, 256)
    assert (together.heads, together.rows, together.parts) == (2, 4, 1)
    cases = [(1, 1, 7, 256), (3, 3, 33, 512), (1, 6, 9, 1024), (8, 4, 3, 4096), (2, 4, 12, 768)]
    for rows, share, blocks, block in cases:
        t = mosaic_tpu_planes.tiling_of(rows, share, blocks, block)
        assert t.block == block
        assert share % t.heads == 0
        assert t.rows >= rows
        assert t.parts * t.heads * t.rows == 8
        assert (t.steps - 1) * t.chunk < blocks <= t.steps * t.chunk
        assert t.chunk == blocks or t.chunk * t.heads * t.rows % 8 == 0


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, TPU's compiler, is not installed"
)
@pytest.mark.parametrize("chip", ["v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
@pytest.mark.parametrize(
    ("share", "T", "R", "S"), [(1, 1, 128, 128), (2, 1, 256, 256), (1, 2, 32, 96)]
)
def test_compiles_for_tpus(chip, share, T, R, S):
    """LLaMA-3-8B's attention over 32k tokens."""
    device = topologies.get_topology_desc(platform="tpu", topology_name=chip).devices[0]
    B, H, q, d, N, b = 1, 8, 4, 128, 128, 256

    def of(*shape, dtype=jnp.float32):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=SingleDeviceSharding(device))

    def attend(*arrays):
        return mosaic_tpu_planes.attend_planes(*arrays, every=32, fills=2)

    arrays = (
        of(B, T, H, q, d),
        of(H, d),
        of(d // 2),
        of(B, H // share, N, b // 32, R, dtype=jnp.uint32),
        of(B, H // share, N, b // 32, S, dtype=jnp.uint32),
        of(H, 1, R, 2, d),
        of(H, 1, S, 2, d),
        of(B, dtype=jnp.int32),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(devices, "on_tpu", lambda: True)
        compiled = jax.jit(attend).lower(*arrays).compile()
    assert "tpu_custom_call" in compiled.as_text()
    # Nothing of the size context × head_dim is there beside the codes.
    assert compiled.memory_analysis().temp_size_in_bytes < 2 * H * N * b * d


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="libtpu, TPU's compiler, is not installed"
)
def test_compiles_on_a_mesh():
    """KV heads over four chips, each with the kernel for its own."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices
    mesh = Mesh(np.array(devices).reshape(4), ("heads",))
    x, _ = make(Shape(B=1, H=8, N=2, d=128, R=128, S=128, blocks=(2,)))
    axis = {"query": 2, "mean": 0, "key_planes": 1, "value_planes": 1}
    axis |= {"key_codewords": 0, "value_codewords": 0}
    specs = {name: P(*(None,) * axis[name], "heads") if name in axis else P() for name in x}
    shapes = {
        name: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=NamedSharding(mesh, specs[name]))
        for name, a in x.items()
    }
    out = P(None, None, "heads")
    attend = jax.shard_map(
        lambda x: decode.attend_planes(**x, implementation="fused"),
        mesh=mesh,
        in_specs=(specs,),
        out_specs=(out, out),
    )
    assert "tpu_custom_call" in jax.jit(attend).lower(shapes).compile().as_text()
