"""A cache on a mesh is the cache of one device: what is attended to, and what is stored."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import programs
import pytest
from jax.sharding import Mesh, NamedSharding

from gsrq_jax import attention, cache, sharded
from gsrq_jax.baselines.uniform import Uniform, UniformSpec
from gsrq_jax.cache import Turn
from gsrq_jax.codebook import Codebooks
from gsrq_jax.codec import decoded
from gsrq_jax.errors import InputError
from gsrq_jax.kernels import reference
from gsrq_jax.spec import QuantSpec

HEADS, GROUP, DIM, BLOCK = 8, 2, 8, 8
LENGTHS = np.array([0, 1, BLOCK - 1, BLOCK, BLOCK + 1, 29, 70])
PROMPT, STEPS, ROOM = 70, 18, 100
SPEC = QuantSpec.from_bits(1, DIM, codewords=16, block=BLOCK, window=0, sinks=0)
SPECS = {
    "codes": SPEC,
    "window and sinks": dataclasses.replace(SPEC, window=5, sinks=2),
    "outliers": dataclasses.replace(SPEC, outliers=5, window=3, sinks=1),
    "pre": dataclasses.replace(SPEC, frame="pre", sinks=3),
    "heads together": QuantSpec.from_bits(
        1, DIM, codewords=16, heads=2, block=BLOCK, window=4, sinks=0
    ),
}
MESHES = ((8, 1), (2, 4))  # tests/models/test_sharded_decode.py has the others


def make_mesh(data, model):
    return Mesh(np.reshape(jax.devices()[: data * model], (data, model)), ("data", "model"))


def codebooks(spec):
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=(HEADS, *shape)), jnp.float32)

    return Codebooks(
        key=normal(*spec.key.codebook_shape),
        value=normal(*spec.value.codebook_shape),
        key_mean=normal(DIM),
        inv_freq=jnp.asarray(100.0 ** -(np.arange(0, DIM, 2) / DIM), jnp.float32),
        spec=spec,
    )


def run(codec, spec, mesh=None, tokens=1):
    """Prompts of LENGTHS, then STEPS new tokens, ``tokens`` at a time: outputs and the cache."""
    on = (lambda one, _: one) if mesh is None else lambda _, many: functools.partial(many, mesh)
    rng = np.random.default_rng(1)
    shape = len(LENGTHS), PROMPT + STEPS, HEADS
    k, v = jnp.asarray(rng.normal(size=(2, *shape, DIM)), jnp.float32)
    q = jnp.asarray(rng.normal(size=(*shape[:2], HEADS * GROUP, DIM)), jnp.float32)
    empty = on(cache.init_cache, sharded.init_cache)(
        spec, batch=len(LENGTHS), kv_heads=HEADS, head_dim=DIM, max_length=ROOM, dtype=jnp.float32
    )
    append = on(cache.append, sharded.append)
    attend = on(attention.attend, sharded.attend)

    @jax.jit
    def loop(start, q, k, v):
        held = append(start, k[:, :PROMPT], v[:, :PROMPT], codec, jnp.asarray(LENGTHS))

        def step(held, x):
            return append(held, *x[1:], codec), attend(*x, held, codec)

        def split(x):  # [B, STEPS, …] to [STEPS / tokens, B, tokens, …]
            x = x[:, PROMPT:]
            return jnp.moveaxis(x.reshape(len(x), -1, tokens, *x.shape[2:]), 1, 0)

        return jax.lax.scan(step, held, (split(q), split(k), split(v)))

    held, out = loop(empty, q, k, v)
    return np.asarray(out), held


@functools.cache
def one(name, tokens=1):
    spec = SPECS[name]
    return run(codebooks(spec), spec, tokens=tokens)


def in_order(codes, devices):
    """Blocks ``[B, H, N, …]`` in the order of the sequence."""
    turns = [Turn(i, devices).blocks(codes.shape[2] // devices) for i in range(devices)]
    return np.asarray(codes)[:, :, np.argsort(np.concatenate(turns))]


def agree(many, one, mesh):
    np.testing.assert_allclose(many[0], one[0], atol=1e-5)
    held, want = many[1], one[1]
    assert held.blocks % mesh.shape["data"] == 0
    np.testing.assert_array_equal(held.length, want.length)
    filled = np.asarray(cache.blocks_after(want.spec, want.length))
    assert filled.max() > 8
    data, model = mesh.shape["data"], mesh.shape["model"]
    codes = [jax.tree.leaves((x.key_codes, x.value_codes)) for x in (held, want)]
    for a, b in zip(*codes, strict=True):
        part = a.shape[1] // model, a.shape[2] // data
        assert a.sharding.shard_shape(a.shape)[1:3] == part
        a = in_order(a, data)
        for row, n in enumerate(filled):
            np.testing.assert_allclose(a[row, :, :n], b[row, :, :n], rtol=1e-6)
    if want.outliers is not None:
        for a, b in zip(held.outliers, want.outliers, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "shape"),
    [("codes", shape) for shape in MESHES] + [(name, (4, 2)) for name in list(SPECS)[1:]],
)
def test_is_the_cache_of_one_device(name, shape):
    mesh = make_mesh(*shape)
    agree(run(codebooks(SPECS[name]), SPECS[name], mesh), one(name), mesh)


@pytest.mark.parametrize(("name", "tokens"), [("outliers", 1), ("codes", 3)])
def test_some_blocks_at_a_time(name, tokens, monkeypatch):
    """Of 12 blocks, 3 a device, 5 and 2 at a time: as codes, or decoded for several tokens."""
    spec, want = SPECS[name], one(name, tokens)
    block = BLOCK if tokens > 1 else attention._floats_of_codes(spec)
    for mesh, few, heads in ((None, 5, HEADS), (make_mesh(4, 2), 2, HEADS // 2)):
        floats = few * len(LENGTHS) * tokens * GROUP * heads * block
        monkeypatch.setattr(attention, "_FLOATS", floats)
        got = run(codebooks(spec), spec, mesh, tokens)
        np.testing.assert_allclose(got[0], want[0], atol=1e-5)


def test_encodes_where_a_block_fills_and_nowhere_else():
    """As on one device, for which tests/gsrq_jax/test_cache.py has it."""
    mesh, spec = make_mesh(4, 2), SPECS["window and sinks"]
    made = sharded.init_cache(
        mesh, spec, batch=1, kv_heads=HEADS, head_dim=DIM, max_length=ROOM, dtype=jnp.float32
    )
    k = jnp.zeros((1, 1, HEADS, DIM))

    def loop(held, k, books, steps):
        return jax.lax.fori_loop(
            0, steps, lambda i, held: sharded.append(mesh, held, k + i, k - i, books), held
        )

    compiled = jax.jit(loop, donate_argnums=0).lower(made, k, codebooks(spec), 5).compile()
    assert programs.outside(compiled.as_text(), "flush") == []


def test_codecs_without_arrays_and_full_precision():
    mesh = make_mesh(2, 4)
    spec = UniformSpec.kivi(2, DIM, group=BLOCK, block=BLOCK, window=4)
    agree(run(Uniform(spec), spec, mesh), run(Uniform(spec), spec), mesh)
    np.testing.assert_allclose(run(None, None, mesh)[0], run(None, None)[0], atol=1e-5)


@pytest.mark.filterwarnings("ignore:the fused GPU kernel", "ignore:the fused TPU kernel")
@pytest.mark.parametrize("layout", ["tiles", "words", "planes"])
def test_codes_in_layouts_of_kernels(layout):
    """Over KV heads, over blocks of which one has one more, and over both."""
    code = SPEC.key
    if layout == "planes":  # two heads share each code
        code = dataclasses.replace(code, stages=32, codewords=2, heads=2)
    spec = dataclasses.replace(
        SPEC, key=code, value=code, block=128, mean_every=16, layout=layout, sinks=3
    )
    k, v = jnp.asarray(np.random.default_rng(3).normal(size=(2, 1, 420, HEADS, DIM)), jnp.float32)
    q = jnp.concatenate([k, v], axis=2)[:, -1:]

    def attended(mesh=None):
        on = (lambda one, _: one) if mesh is None else lambda _, many: functools.partial(many, mesh)
        held = on(cache.init_cache, sharded.init_cache)(
            spec, batch=1, kv_heads=HEADS, head_dim=DIM, max_length=600, dtype=jnp.float32
        )
        append, attend = on(cache.append, sharded.append), on(attention.attend, sharded.attend)

        @jax.jit
        def step(held, books):
            held = append(held, k, v, books)
            return attend(q, k[:, :1], v[:, :1], held, books, implementation="codes")

        return step(held, codebooks(spec))

    want = attended()
    for shape in ((1, 8), (8, 1), (2, 4))[layout != "tiles" :]:
        np.testing.assert_allclose(attended(make_mesh(*shape)), want, atol=1e-5)


def test_a_growing_context_is_shared_evenly():
    """At every length each block is in one slot, and no device has more than one above another."""
    for blocks in range(30):
        filled = [int(Turn(i, 8).filled(jnp.asarray(blocks))) for i in range(8)]
        assert sum(filled) == blocks
        assert max(filled) - min(filled) <= 1
        held = [Turn(i, 8).blocks(4)[:n].tolist() for i, n in enumerate(filled)]
        assert sorted(itertools.chain(*held)) == list(range(blocks))
    block = jnp.arange(-1, 40)
    for i in range(8):
        slots = np.asarray(Turn(i, 8).slot(block, 4)).tolist()
        want = {n: slot for slot, n in enumerate(Turn(i, 8).blocks(4).tolist())}
        assert slots == [want.get(n, 4) for n in block.tolist()]


def test_merging_over_devices():
    """Where some or all parts are empty."""
    rng = np.random.default_rng(2)
    out = jnp.asarray(rng.normal(size=(4, 3, 5)), jnp.float32)
    lse = jnp.asarray(rng.normal(size=(4, 3)), jnp.float32).at[:2, 0].set(-jnp.inf)
    lse = lse.at[:, 1].set(-jnp.inf)
    want = reference.merge(list(zip(out, lse, strict=True)))
    got = jax.vmap(functools.partial(reference.merge_over, axis_name="x"), axis_name="x")(
        (out, lse)
    )
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, jnp.broadcast_to(b, a.shape), rtol=1e-5, atol=1e-6)
    assert not np.asarray(want[0][1]).any()
    assert np.isneginf(want[1][1])


def test_what_cannot_be_spread():
    mesh = make_mesh(2, 4)
    sizes = {"batch": 1, "head_dim": DIM, "max_length": 64}
    with pytest.raises(InputError, match="6 KV heads cannot be shared evenly by 4 devices"):
        sharded.init_cache(mesh, SPEC, kv_heads=6, **sizes)
    tiled = dataclasses.replace(SPEC, block=256, frame_blocks=2, layout="tiles")
    with pytest.raises(InputError, match="the 2 blocks of a frame cannot be spread over devices"):
        sharded.init_cache(mesh, tiled, kv_heads=8, **sizes)
    codec = decoded(codebooks(SPEC))
    with pytest.raises(InputError, match="a cache of Decoded cannot be spread over devices"):
        sharded.codec_axes(codec, stacked=False)


def test_it_is_made_where_it_lives():
    mesh = make_mesh(4, 2)
    made = sharded.init_cache(
        mesh, SPECS["outliers"], kv_heads=8, layers=3, batch=2, head_dim=DIM, max_length=ROOM
    )
    single = cache.init_cache(
        SPECS["outliers"], kv_heads=8, layers=3, batch=2, head_dim=DIM, max_length=ROOM
    )
    assert made.capacity >= single.capacity
    axes = sharded.cache_axes(SPECS["outliers"], stacked=True)
    assert made.key_codes.sharding.is_equivalent_to(NamedSharding(mesh, axes.key_codes), 6)
    assert made.outliers.error.sharding.is_equivalent_to(NamedSharding(mesh, axes.outliers), 4)
    assert made.key_codes.shape == (3, 2, 8, 12, BLOCK, 1)
    np.testing.assert_array_equal(made.outliers.error, single.outliers.error)
