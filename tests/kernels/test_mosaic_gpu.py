"""The GPU kernel without a GPU: run on numpy lanes, refused where it must be, assembled."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import Lanes, run_kernel
from lowering import (
    HOW,
    exact,
    modules,
    mosaic_module,
    on_abstract,
    operation,
    shapes,
    supported,
)
from test_mosaic_gpu_recent import some as some_recent
from test_reference import check, decode, expected

from gsrq_jax.kernels import devices, mosaic_gpu, mosaic_gpu_recent, pieces, reference, tiles
from gsrq_jax.kernels.errors import InputError


@dataclasses.dataclass(frozen=True)
class Shape:
    """B sequences, T queries, H KV heads, q query heads each, N blocks of b; R, S stages."""

    B: int = 1
    T: int = 1
    H: int = 1
    q: int = 4
    N: int = 2
    b: int = 256
    d: int = 64
    R: int = 8
    K: int = 16
    S: int = 8
    blocks: tuple[int, ...] = (2,)
    every: int | None = 1  # tokens between knots; None: no mean key
    first: int = 4
    stride: int = 1
    fills: int = 1  # parts of a block, which `blocks` then counts


to_key_tiles = jax.jit(tiles.keys_to_tiles, static_argnums=1)
to_value_tiles = jax.jit(tiles.values_to_tiles)
from_key_tiles = jax.jit(tiles.keys_from_tiles, static_argnums=(1, 2))
from_value_tiles = jax.jit(tiles.values_from_tiles, static_argnums=1)


def make(shape, seed=0, scale=1.0):
    """Arrays for attend_tiles; any codes in blocks that are not valid."""
    s, rng = shape, np.random.default_rng(seed)

    def normal(*size):
        return rng.normal(size=size).astype(np.float32)

    query = normal(s.B, s.T, s.H, s.q, s.d) * np.float32(scale / np.sqrt(s.d))
    key_codes = rng.integers(0, s.K, (s.B, s.H, s.N, s.b, s.R)).astype(np.uint8)
    value_codes = rng.integers(0, 16, (s.B, s.H, s.N, s.b, s.S)).astype(np.uint8)
    return {
        "query": query,
        "mean": None if s.every is None else normal(s.H, s.d),
        "inv_freq": 10_000.0 ** -np.linspace(0, 1, s.d // 2, dtype=np.float32),
        "key_tiles": np.asarray(to_key_tiles(key_codes, s.K)),
        "value_tiles": np.asarray(to_value_tiles(value_codes)),
        "key_codewords": normal(s.H, 1, s.R, s.K, s.d) * np.float32(s.R**-0.5),
        "value_codewords": normal(s.H, 1, s.S, 16, s.d),
        "blocks": np.array(s.blocks, np.int32),
    }


def options(shape):
    where = {"first": shape.first, "every": shape.every or 1, "stride": shape.stride}
    return where | {"fills": shape.fills}


def turned(x, positions, inv_freq):
    """Rotated in float64, by angles in float32."""
    angle = np.float64(np.float32(positions)[..., None] * inv_freq)
    a, b = np.split(np.float64(x), 2, axis=-1)
    cos, sin = np.cos(angle), np.sin(angle)
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def shifts(mean, b, inv_freq, every):
    """``[H, 1, b, d]``, channel by channel a line between knots, of the pairs that are slow."""
    fast = np.tile(inv_freq * every > np.pi, 2) & (every > 1)
    knots = np.arange(0, b + 1, every)
    at_knots = turned(np.where(fast, 0, mean)[:, None], knots, inv_freq)
    line = np.vectorize(lambda y: np.interp(np.arange(b), knots, y), signature="(k)->(b)")
    return np.swapaxes(line(np.swapaxes(at_knots, -1, -2)), -1, -2)[:, None]


def in_float64(shape, x):
    s = shape
    keys = from_key_tiles(x["key_tiles"], s.R, s.K)[..., None, :]
    values = from_value_tiles(x["value_tiles"], s.S)[..., None, :]
    keys = decode(np.asarray(keys), x["key_codewords"])
    if s.every is not None:
        keys += shifts(x["mean"], s.b, x["inv_freq"], s.every)
    start = s.first + s.stride * s.b * np.arange(s.N)
    query = np.repeat(turned(x["query"][..., None, :], -start, x["inv_freq"]), s.fills, axis=-2)
    values = decode(np.asarray(values), x["value_codewords"])
    of_parts = s.B, s.H, s.N * s.fills, s.b // s.fills, s.d
    return expected(query, keys.reshape(of_parts), values.reshape(of_parts), x["blocks"])


def on_lanes(x, config=None, **how):
    """`attend_tiles` with the kernel run by numpy."""
    problem, made = run_on_lanes(x, config, **how)
    after = jax.jit(functools.partial(mosaic_gpu.put_together, problem))
    return after(made["histogram"], made["scale"], x["value_codewords"])


def run_on_lanes(x, config=None, first=4, every=1, stride=1, fills=1, recent=None):
    """The kernel run by numpy: the shapes, and all that it writes."""
    problem = mosaic_gpu.problem_of(**x, every=every, stride=stride, fills=fills)
    exact = recent and mosaic_gpu_recent.problem_of(x["query"], recent)
    problem = dataclasses.replace(problem, recent=exact)
    config = config or mosaic_gpu.choose_config(problem)

    @jax.jit
    def before(query, mean, inv_freq, words, value_words):
        return mosaic_gpu.score_inputs(problem, query, mean, inv_freq, words, value_words, first)

    names = "query", "mean", "inv_freq", "key_codewords", "value_codewords"
    inputs = before(*(x[name] for name in names))
    inputs += mosaic_gpu_recent.arrays_of(recent) if recent else ()
    made = mosaic_gpu.outputs(problem, config)
    outputs = [
        np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else 2**30, dtype)
        for shape, dtype in made.values()
    ]
    layout = mosaic_gpu.Memory.of(problem, config)
    assert layout.nbytes <= mosaic_gpu.SHARED_BYTES

    def program(warp, *places):
        at = mosaic_gpu.Addresses.of(problem, *places)
        mosaic_gpu.FusedKernel(problem, config, warp, at).run()

    blocks, warps = problem.pairs * config.splits, mosaic_gpu.COUNTERS + config.scorers
    arrays = x["key_tiles"], x["value_tiles"], x["blocks"], *inputs
    written = run_kernel(program, blocks, warps, layout.nbytes, arrays, outputs)
    return problem, dict(zip(made, written, strict=True))


Config = mosaic_gpu.Config
RUNS = {
    "one block": (Shape(N=1, blocks=(1,)), None),
    "no mean key": (Shape(N=2, R=4, S=4, blocks=(2,), every=None), None),
    "no mean key, half chunks": (
        Shape(b=128, N=3, R=4, K=256, S=4, blocks=(3,), every=None),
        None,
    ),
    "knots": (Shape(B=2, H=2, b=512, N=2, R=4, S=4, blocks=(2, 1), every=16), None),
    "many knots": (Shape(N=2, R=4, S=4, blocks=(2,), every=4), None),
    "every third block, knots": (
        Shape(b=512, N=3, R=4, S=4, blocks=(3,), every=64, first=1028, stride=3),
        None,
    ),
    "every other half chunk": (
        Shape(b=128, N=3, R=4, S=4, blocks=(3,), first=132, stride=2),
        None,
    ),
    "few knots of half chunks": (Shape(b=128, N=3, R=4, S=4, blocks=(3,), every=64), None),
    "nothing coded, all coded": (Shape(B=2, N=2, blocks=(0, 2)), Config(8, 2, 2, 1)),
    "1 bit, head_dim 128": (Shape(d=128, R=32, S=32, N=2, blocks=(2,)), None),
    "2 bits": (Shape(d=128, R=64, S=64, N=2, blocks=(2,)), None),
    "quarter of a bit, head_dim 64": (Shape(R=4, S=4, N=1, blocks=(1,)), None),
    "blocks of half a chunk, an odd one": (Shape(b=128, N=5, blocks=(5,)), Config(4, 1, 1, 1)),
    "three eighths of a bit": (Shape(d=128, b=128, R=12, S=12, N=3, blocks=(3,)), None),
    "blocks of two chunks, more than warps": (
        Shape(b=512, N=6, R=4, blocks=(5,)),
        Config(4, 1, 1, 2),
    ),
    "a chunk at a time": (Shape(b=512, N=3, R=4, S=4, blocks=(3,)), Config(4, 1, 2, 1)),
    "ring of two": (Shape(N=19, R=4, S=4, blocks=(19,)), Config(4, 2, 1, 1)),
    "two buffers": (Shape(N=23, R=4, S=4, blocks=(23,)), Config(4, 1, 1, 1, buffers=2)),
    "two buffers, knots, two chunks a table": (
        Shape(b=512, N=11, R=4, S=4, blocks=(11,), every=16),
        Config(4, 2, 1, 2, buffers=2),
    ),
    "ring of three, two buffers, two chunks a table, two parts": (
        Shape(b=512, N=15, R=4, S=4, blocks=(15,), every=16),
        Config(4, 3, 2, 2, buffers=2),
    ),
    "half a block is valid": (
        Shape(b=512, N=6, R=4, S=4, blocks=(9,), every=16, fills=2),
        Config(4, 1, 1, 2),
    ),
    "half a block is valid, of a full round": (
        Shape(b=512, N=8, R=4, S=4, blocks=(15,), fills=2),
        Config(4, 2, 1, 2),
    ),
    "a quarter of a block is valid, two parts": (
        Shape(b=1024, N=6, R=4, S=4, blocks=(21,), every=16, fills=4),
        Config(4, 2, 2, 4, buffers=2),
    ),
    "some of a block is valid, parts of several sequences": (
        Shape(B=4, b=1024, N=2, R=4, S=4, blocks=(0, 1, 6, 8), fills=4),
        Config(8, 1, 3, 2),
    ),
    "parts, some empty": (Shape(N=5, R=4, S=4, blocks=(5,)), Config(4, 1, 4, 1)),
    "heads and sequences": (Shape(B=2, H=2, q=3, b=128, N=3, R=4, S=4, blocks=(3, 1)), None),
    "one query head": (Shape(H=2, q=1, N=1, R=4, S=4, blocks=(1,)), None),
    "two groups of rows": (Shape(B=2, T=1, q=8, N=1, R=4, S=4, blocks=(1, 1)), None),
    "three tokens of three heads": (Shape(T=3, q=3, b=128, N=2, R=4, S=4, blocks=(2,)), None),
    "256 codewords": (Shape(N=2, R=4, K=256, blocks=(2,)), None),
    "256 codewords, half chunks": (Shape(b=128, N=3, R=6, K=256, S=24, blocks=(3,)), None),
}


@pytest.mark.parametrize(("shape", "config"), RUNS.values(), ids=RUNS.keys())
def test_on_numpy_lanes(shape, config):
    x = make(shape)
    out, lse = on_lanes(x, config, **options(shape))
    want, want_lse = in_float64(shape, x)
    error = np.linalg.norm(out - want) / np.linalg.norm(want)
    print(error)
    assert error < 1e-3
    check((lse,), (want_lse,), atol=1e-3)


SMALL = {"N": 2, "R": 4, "S": 4}
WITH_RECENT = {  # shape, layout, slots of sinks and window; sinks, first, held, new
    "full, wrapped, some thread blocks have none": (
        Shape(**SMALL, d=128, blocks=(2,)),
        Config(4, 1, 5, 1),
        (4, 200),
        ([4], [777], [200], [1]),
    ),
    "eight query heads, one without codes, one part": (
        Shape(**SMALL, B=2, q=8, blocks=(1, 0), every=16),
        Config(8, 1, 1, 1),
        (4, 131),
        ([4, 3], [5, 130], [131, 67], [1, 1]),
    ),
    "three query heads, nothing at all, no sinks": (
        Shape(**SMALL, B=2, H=2, q=3, blocks=(2, 0)),
        Config(4, 1, 2, 1),
        (0, 70),
        ([0, 0], [3, 0], [70, 0], [1, 0]),
    ),
}


@pytest.mark.parametrize("case", WITH_RECENT.values(), ids=WITH_RECENT.keys())
def test_exact_tokens_in_the_same_kernel(case):
    """They are the reference's, and no bit of what is coded is another."""
    shape, config, slots, counts = case
    x = make(shape)
    sizes = mosaic_gpu_recent.Problem(shape.B, shape.H, shape.q, shape.d, *slots)
    _, recent = some_recent(sizes, *counts)
    _, made = run_on_lanes(x, config, recent=recent, **options(shape))
    _, alone = run_on_lanes(x, config, **options(shape))
    for name, coded in alone.items():
        np.testing.assert_array_equal(made[name], coded)
    parts = mosaic_gpu_recent.in_parts(made["recent"], made["recent_lse"])
    got = reference.merge(list(zip(*parts, strict=True)))
    want = (a[0] for a in reference.attend_recent(x["query"], recent))
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=5e-5)


@pytest.mark.parametrize("shape", [Shape(N=3, R=4, S=4, blocks=(3,), every=16), Shape(b=128, N=3)])
def test_many_chunks_give_the_same_bits(monkeypatch, shape):
    """Of which each tile has a body of its own."""
    x, how = make(shape), options(shape)
    problem = mosaic_gpu.problem_of(**x, every=shape.every)
    assert mosaic_gpu.work(problem, mosaic_gpu.choose_config(problem))[0] <= mosaic_gpu.FEW
    few = on_lanes(x, **how)
    monkeypatch.setattr(mosaic_gpu, "FEW", 0)
    for a, b in zip(few, on_lanes(x, **how), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("spread", [0.0, 0.3, 1.0, 2.0])
def test_error_by_the_spread_of_scores(spread):
    shape = Shape(d=128, R=32, S=4, N=4, blocks=(4,))
    x = make(shape, seed=3, scale=spread)
    out, lse = on_lanes(x, Config(4, 2, 1, 1))
    want, want_lse = in_float64(shape, x)
    error = np.linalg.norm(out - want, axis=-1) / np.linalg.norm(want, axis=-1)
    assert error.max() < 1e-3
    check((lse,), (want_lse,), atol=1e-3)


@pytest.mark.parametrize(
    "shape",
    [
        Shape(B=2, b=128, N=3, R=4, S=4, blocks=(1, 2)),
        Shape(B=2, b=512, N=3, R=4, S=4, blocks=(1, 4), fills=2),
    ],
)
def test_nothing_of_the_invalid_is_read(shape):
    """Codes with all bits set change no bit of the result."""
    x = make(shape)
    y = {name: np.copy(a) for name, a in x.items()}
    for row, n in enumerate(shape.blocks):
        for name in ("key_tiles", "value_tiles"):
            of_tiles = y[name].reshape(*y[name].shape[:2], -1, y[name].shape[-1])  # a view
            of_tiles[row, :, n * shape.b // shape.fills // tiles.TILE :] = 0xFFFFFFFF
    how = options(shape)
    for a, b in zip(on_lanes(x, **how), on_lanes(y, **how), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_query_that_is_not_finite_shows(monkeypatch):
    """Also without the kernels, whose results for it mean nothing."""
    shape = Shape(B=3, q=2, N=1, R=4, S=4, blocks=(1, 1, 0))
    x = make(shape)
    for row, bad in enumerate((np.nan, 1e6, np.inf)):
        x["query"][row, 0, 0, 1, 5] = bad
    monkeypatch.setattr(devices, "check_hopper", lambda: None)
    histogram, scale = np.zeros((3, 1, 4, 4, 16), np.float32), np.zeros((3, 1, 4), np.int32)
    histogram[:2, ..., 0] = 1e-9  # the third sequence has nothing coded
    monkeypatch.setattr(mosaic_gpu, "fused_kernel", lambda *_: lambda *_: (histogram, scale))
    out, lse = mosaic_gpu.attend_tiles(**jax.tree.map(jnp.asarray, x))
    fine = [True, False, True, False, True, True]
    assert np.isfinite(out).all(axis=-1).ravel().tolist() == fine
    assert (~np.isnan(lse)).ravel().tolist() == fine


# --- around the kernel ----------------------------------------------------------------------------


def test_the_reference_reads_the_same_layout():
    for every, stride, fills in ((1, 1, 1), (16, 2, 1), (None, 1, 1), (16, 1, 2)):
        b, blocks = 128 * fills, (3 + fills, 0)
        shape = Shape(
            *(2, 1, 2, 3, 4, b),
            K=256,
            R=4,
            S=12,
            blocks=blocks,
            every=every,
            stride=stride,
            fills=fills,
        )
        x = make(shape)
        attend = functools.partial(reference.attend_tiles, **options(shape))
        check(jax.jit(attend)(**x), in_float64(shape, x))


@pytest.mark.parametrize("stages", [4, 12, 32, 64])
def test_a_finished_table_is_what_the_kernel_makes(stages):
    rng = np.random.default_rng(stages)
    key = pieces.KeyTable(stages, 16)
    raw = rng.normal(size=(4, stages, 16)).astype(np.float16).astype(np.float32)
    table, steps, offsets = mosaic_gpu.finished_table(key, jnp.asarray(raw).reshape(4, -1))
    warp = Lanes()
    place, facts = warp.integer(0x3000), warp.integer(0x1000)
    pieces.table(warp, key, warp.put(raw.astype(np.float16)), place, facts)
    made = warp.shared[0x1000:0x1020].view(np.float32)
    made = made * np.repeat([pieces.COUNT / pieces.SCORE, 1 / pieces.SCORE], 4)
    np.testing.assert_allclose(made[4:], offsets, rtol=1e-5)
    if stages % 8 == 0:  # a narrower strip counts its copies here
        np.testing.assert_allclose(made[:4], steps, rtol=1e-5)
    for strip in range(len(tiles.strips(stages))):
        for code in range(16):
            at = 0x3000 + key.strip_offset(strip) + code * key.code_bytes
            row = warp.shared[at : at + 128].view(np.uint16).reshape(16, 4)
            want = np.asarray(table)[code, 16 * strip : 16 * strip + 16] * (steps / made[:4])
            np.testing.assert_allclose(row, want, atol=1.01)


def test_put_together_weighs_parts_by_their_scales():
    problem = mosaic_gpu.problem_of(**make(Shape(H=2, q=2, N=1, S=3, R=4, blocks=(1,))))
    rng = np.random.default_rng(0)
    codewords = rng.normal(size=(2, 1, 3, 16, 64)).astype(np.float32)
    p = rng.integers(1, 2**pieces.PROBABILITY_BITS, (2, 3, 6, 4))  # [pair, part, token, row]
    codes = rng.integers(0, 16, (2, 3, 6, 3))
    scale = rng.integers(-3, 3, (2, 3, 4)).astype(np.int32)
    scale[:, 2] = mosaic_gpu.EMPTY
    p[:, 2] = 0
    histogram = np.zeros((2, 3, 4, 3, 16), np.float32)
    for at in np.ndindex(2, 3, 6, 3):
        histogram[at[0], at[1], :, at[3], codes[at]] += p[at[:3]] * pieces.LAST_BIT
    out, lse = mosaic_gpu.put_together(problem, histogram, scale, codewords)
    weight = p * 2.0 ** scale[:, :, None].astype(np.float64)  # EMPTY ones are 0
    values = sum(codewords[np.arange(2)[:, None, None], 0, r, codes[..., r]] for r in range(3))
    want = np.einsum("hptr,hptd->hrd", weight, values) / weight.sum((1, 2))[..., None]
    np.testing.assert_allclose(out[0, 0], want[:, :2], rtol=1e-4, atol=1e-5)
    bits = pieces.PROBABILITY_BITS - pieces.HEADROOM
    np.testing.assert_allclose(
        lse[0, 0], np.log(weight.sum((1, 2)) * 2.0**-bits)[:, :2], rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"every": 16},
        {"R": 64, "S": 64},
        {"R": 32, "K": 256, "S": 64},
        {"b": 128, "N": 99, "B": 64},
        {"every": 16, "recent": 1},
        {"R": 64, "S": 64, "recent": 1},
    ],
)
def test_the_layout_fits_and_nothing_overlaps(sizes):
    problem = problem_of(sizes)
    config = mosaic_gpu.choose_config(problem)
    m = mosaic_gpu.Memory.of(problem, config)
    assert m.nbytes <= mosaic_gpu.SHARED_BYTES
    starts = [m.tables, m.staged, m.knots, m.slots, m.facts, m.scales, m.recent, m.arrived]
    starts += [m.full, m.free]
    assert starts == sorted(starts)
    assert m.table_bytes % 4096 == m.staged % 16 == m.slots % 16 == m.slot_bytes % 16 == 0
    assert m.facts % 16 == m.scales % 16 == m.recent % 16 == m.arrived % 8 == 0


# --- which layout is chosen -----------------------------------------------------------------------


def tuning_of(problem, **changes):
    row = mosaic_gpu.rate_of(problem) | dataclasses.asdict(mosaic_gpu.Tuning()) | changes
    return {"NVIDIA H100 80GB HBM3": {"rates": [row]}}


def test_what_was_tuned_is_taken_on_that_device_alone(monkeypatch):
    problem = mosaic_gpu.problem_of(**shapes(b=1024), every=16)
    other = mosaic_gpu.problem_of(**shapes(b=1024, R=16, S=16), every=16)
    data = tuning_of(problem, depth=1, buffers=2, table_time=0.0, start_time=1e6)
    monkeypatch.setattr(mosaic_gpu, "_tuned", lambda: data)
    estimated = mosaic_gpu.choose_config(problem)
    assert estimated == mosaic_gpu.choose_config(problem, mosaic_gpu.Tuning())
    with on_abstract():
        chosen = mosaic_gpu.choose_config(problem)
        assert (chosen.scorers, chosen.depth, chosen.buffers) == (8, 1, 2)
        assert mosaic_gpu.work(problem, chosen)[2] == 1  # starting is what takes time
        assert mosaic_gpu.tuned(other) == mosaic_gpu.Tuning()
    with on_abstract("NVIDIA H200"):
        assert mosaic_gpu.choose_config(problem) == estimated


def test_chunks_of_a_short_sequence_are_spread():
    """As one scorer's chunk takes less than eight scorers' at once."""
    problem = mosaic_gpu.problem_of(**shapes(B=1, N=16, b=512), every=16)
    config = mosaic_gpu.choose_config(problem, mosaic_gpu.Tuning())
    assert problem.pairs * config.splits > devices.PROCESSORS / 2
    of_all, of_two = (
        mosaic_gpu.work(problem, dataclasses.replace(config, splits=n, span=1)) for n in (4, 16)
    )
    assert of_all == (1, 1, 1)
    assert of_two == (mosaic_gpu.LEAST, 1, 1)


def test_a_tuned_layout_that_does_not_fit_is_not_taken(monkeypatch):
    problem = mosaic_gpu.problem_of(**shapes(R=64, S=64))
    monkeypatch.setattr(mosaic_gpu, "_tuned", lambda: tuning_of(problem, depth=9))
    with on_abstract():
        config = mosaic_gpu.choose_config(problem)
    assert mosaic_gpu.Memory.of(problem, config).nbytes <= mosaic_gpu.SHARED_BYTES
    assert config == mosaic_gpu.choose_config(problem)


def test_what_is_kept_can_be_had():
    """Each row of the file that is installed names a rate and a layout that the kernel has."""
    for device, made in mosaic_gpu._tuned().items():
        assert made["rates"], device
        for row in made["rates"]:
            sizes = {"d": row["dim"], "R": row["key_stages"], "K": row["key_codewords"]}
            shaped = shapes(**sizes, S=row["value_stages"], b=1024)
            problem = mosaic_gpu.problem_of(**shaped, every=16)  # as they are measured
            with on_abstract(device):
                tuning, config = mosaic_gpu.tuned(problem), mosaic_gpu.choose_config(problem)
            assert dataclasses.asdict(tuning).items() <= row.items()
            assert min(tuning.table_time, tuning.start_time) >= 0
            assert config.depth == tuning.depth
            mosaic_gpu.check_config(problem, config)


# --- what is refused ------------------------------------------------------------------------------

BAD = {
    "head_dim": ({"d": 96}, "64 or 128 as head_dim, got 96"),
    "group": ({"q": 9}, "1 to 8 as query heads per KV head, got 9"),
    "block": ({"b": 384}, "128 or a multiple of 256 as tokens of a block, got 384"),
    "stages": ({"R": 65}, "1 to 64 as stages of keys, got 65"),
    "parts": ({"fills": 2}, "parts of a multiple of 256 tokens as parts of a block, got 2"),
}


@pytest.mark.parametrize(("sizes", "message"), BAD.values(), ids=BAD.keys())
def test_sizes_that_are_not_supported(sizes, message):
    sizes, how = parted(sizes)
    with pytest.raises(InputError, match=message):
        mosaic_gpu.attend_tiles(**shapes(**sizes), **how)


S = jax.ShapeDtypeStruct
BAD_ARRAYS = {
    "keys of 64 codewords": (
        {"key_codewords": S((8, 1, 32, 64, 128), jnp.bfloat16)},
        "16 or 256 as codewords of a stage of keys, got 64",
    ),
    "values of 256 codewords": (
        {"value_codewords": S((8, 1, 16, 256, 128), jnp.bfloat16)},
        "takes 16 as codewords of a stage of values, got 256",
    ),
    "split heads": (
        {"key_codewords": S((8, 2, 16, 16, 64), jnp.bfloat16)},
        r"whole heads, \(8, 1, R, K, 128\) as codewords of keys",
    ),
    "float16 codewords": (
        {"value_codewords": S((8, 1, 32, 16, 128), jnp.float16)},
        "bfloat16 or float32 as dtype of the codewords of values, got float16",
    ),
    "a mean key of all heads": (
        {"mean": S((128,), jnp.float32)},
        r"takes \(8, 128\) as mean key, got \(128,\)",
    ),
    "frequencies of whole heads": (
        {"inv_freq": S((128,), jnp.float32)},
        r"takes \(64,\) as rotary frequencies, got \(128,\)",
    ),
    "bytes": (
        {"key_tiles": S((2, 8, 16, 2, 2048), jnp.uint8)},
        r"uint32 \(2, 8, 16, 2, 512\) as key tiles, got uint8 \(2, 8, 16, 2, 2048\)",
    ),
    "a cache of other values": (
        {"value_tiles": S((2, 8, 16, 2, 256), jnp.uint32)},
        r"uint32 \(2, 8, 16, 2, 512\) as value tiles",
    ),
    "a bfloat16 query": (
        {"query": S((2, 1, 8, 4, 128), jnp.bfloat16)},
        "float32 as dtype of the query, got bfloat16",
    ),
    "blocks of another batch": (
        {"blocks": S((3,), jnp.int32)},
        r"integers \(2,\) as blocks, got int32 \(3,\)",
    ),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_arrays_that_are_not_supported(arrays, message):
    with pytest.raises(InputError, match=message):
        mosaic_gpu.attend_tiles(**(shapes() | arrays))


def test_knots_that_are_not_supported():
    with pytest.raises(InputError, match=r"1 or 4 or .* as tokens between knots .*, got 2"):
        mosaic_gpu.attend_tiles(**shapes(), every=2)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(8, 8, 1, 1), r"takes \d+ bytes of shared memory, and there are 230400"),
        (Config(6, 1, 1, 1), "must have 4 or 8 scorers"),
        (Config(8, 1, 0, 1), "splits of at least 1"),
        (Config(4, 1, 1, 1, 3), "must have 1 or 2 buffers"),
        (Config(8, 1, 1, 3), "a span that divides the 4 chunks of a block"),
    ],
)
def test_layouts_that_cannot_be(monkeypatch, config, message):
    monkeypatch.setattr(devices, "check_hopper", lambda: None)
    with pytest.raises(InputError, match=message):
        mosaic_gpu.attend_tiles(**shapes(b=1024), config=config)


def test_devices_that_are_not_supported(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.12.3")
    with pytest.raises(InputError, match=r"compute capability 9.0 \(H100, H200\), this is cpu"):
        mosaic_gpu.attend_tiles(**shapes())


@pytest.mark.parametrize("version", ["0.10.2", "0.13.0", "1.11.0"])
def test_versions_of_jax_that_are_not_supported(monkeypatch, version):
    monkeypatch.setattr(jax, "__version__", version)
    with pytest.raises(InputError, match=f"for jax 0.11 and 0.12, this is {version}"):
        mosaic_gpu.attend_tiles(**shapes())


# --- for a GPU that is not there ------------------------------------------------------------------

FORMS = {
    "1 bit": {},
    "blocks of 128, 8 heads, 3 tokens": {"b": 128, "q": 8, "T": 3},
    "blocks of 512, head_dim 64": {"b": 512, "d": 64, "R": 16, "S": 16},
    "2 bits": {"R": 64, "S": 64},
    "256 codewords": {"R": 16, "K": 256},
    "knots": {"b": 512, "every": 16},
    "half of a block valid": {"b": 512, "every": 16, "fills": 2},
    "many chunks": {"b": 1024, "every": 16, "fills": 4, "B": 8, "N": 128},
    "exact tokens": {"b": 1024, "every": 16, "fills": 4, "recent": 1},
    "exact tokens, 8 heads, head_dim 64": {"q": 8, "d": 64, "R": 64, "S": 64, "recent": 1},
}


def parted(sizes):
    """Those of `shapes`, and how."""
    how = {name: x for name, x in sizes.items() if name in HOW}
    return {name: x for name, x in sizes.items() if name not in HOW}, how


def problem_of(sizes):
    sizes, how = parted(sizes)
    recent = how.pop("recent", 0)
    problem = mosaic_gpu.problem_of(**shapes(**sizes), **how)
    if not recent:
        return problem
    given = shapes(**sizes)["query"], exact(**sizes)
    return dataclasses.replace(problem, recent=mosaic_gpu_recent.problem_of(*given))


@supported
@pytest.mark.parametrize("sizes", FORMS.values(), ids=FORMS.keys())
def test_lowers_without_a_gpu(sizes):
    assert len(mosaic_module(sizes)) > 10_000


@supported
@pytest.mark.parametrize(
    ("sizes", "kernels"),
    [
        ({"b": 512, "every": 16, "recent": 1}, 2),
        ({"R": 64, "S": 64, "every": 16, "recent": 1, "b": 1024}, 3),  # no room for them
        ({"b": 512, "every": 16, "recent": 1, "T": 2}, 2),  # by XLA
        ({"b": 512, "every": 16, "recent": 1, "N": 0}, 0),
    ],
)
def test_who_attends_to_exact_tokens(sizes, kernels):
    assert len(modules(*operation(sizes))) == kernels


@supported
def test_other_gpus_are_refused_when_lowered_for():
    with (
        on_abstract("NVIDIA A100-SXM4-80GB"),
        pytest.raises(InputError, match="this is NVIDIA A100"),
    ):
        mosaic_gpu.attend_tiles(**shapes())


@supported
@pytest.mark.parametrize("sizes", FORMS.values(), ids=FORMS.keys())
def test_assembles_without_a_gpu(sizes, without_a_gpu):
    said = without_a_gpu("assemble", sizes)
    assert "Compiling entry function" in said, said[-2000:]
    assert "for 'sm_90a'" in said
    (registers,) = set(re.findall(r"Used (\d+) registers", said))
    config = mosaic_gpu.choose_config(problem_of(sizes))
    assert int(registers) * 32 * (mosaic_gpu.COUNTERS + config.scorers) <= 65536
    assert max(map(int, re.findall(r"(\d+) bytes spill stores", said))) <= 32


@supported
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"b": 128, "q": 8, "T": 3},
        {"R": 16, "K": 256},
        {"b": 512, "every": 16},
        {"b": 512, "every": 16, "recent": 1},
    ],
)
def test_compiles_for_a_gpu_without_one(sizes, without_a_gpu):
    """XLA copies nothing large and, but for finished tables, has nothing to do but angles of
    positions; what is made of the query stays in the kernel."""
    hlo = without_a_gpu("compile", sizes)
    entry = hlo[hlo.index("\nENTRY") :]
    assert entry.count('custom_call_target="mosaic_gpu') == 2, hlo[-2000:]
    assert " copy(" not in entry
    fusions = re.findall(r" fusion\((.*?)\)", entry)
    if sizes.get("K", 16) == 16:
        of_counts = [given for given in fusions if "recent___held" in given]
        assert len(of_counts) == sizes.get("recent", 0), fusions
        others = [given for given in fusions if given not in of_counts]
        assert others
        assert all(re.fullmatch(r"%x__inv_freq__\S*", given) for given in others)
        assert not re.search(r" dot\(|cublas", hlo)


@supported
def test_lower_pieces_stay_without_a_gpu(without_a_gpu):
    """XLA keeps the lower parts of float16 operands."""
    hlo = without_a_gpu("pieces", {})
    split = re.findall(r"= f32\S* subtract\(%(\S+), %(\S+)\)", hlo)
    assert split, hlo[-2000:]
    assert all(a != b for a, b in split)


@supported
def test_a_decode_loop_reads_codes_where_they_are(without_a_gpu):
    """No layer's codes or weights are cut out of the stack, no codes are copied, nor the window of
    all layers, and no product with weights is made twice."""
    hlo = without_a_gpu("loop", {})
    assert "mosaic_gpu" in hlo, hlo[-2000:]
    codes = r"u32\[(?:1,|3,)?8,2,7,4,512\]"
    made = re.findall(rf"%(\S+) = {codes}\S* (?:fusion|copy|copy-start|slice)\(", hlo)
    assert len(made) == 2, made  # keys' and values', written once a block
    assert all("scatter" in name for name in made), made
    window = r"bf16\[3,8,(?:2,640,128|640,2,128|2,128,640)\]"
    made = re.findall(rf"%(\S+) = {window}\S* (?:fusion|copy|copy-start|transpose)\(", hlo)
    assert len(made) == 2, made  # keys and values, of which each step writes one
    assert all("scatter" in name for name in made), made
    assert re.search(r"= bf16\[3,256,1024\]", hlo)
    assert not re.search(r"= bf16\[(?:1,)?(?:256|1024),(?:256|1024)\]\S* fusion\(", hlo)
    products = re.findall(r"__cublas.*while/body/while/body/[^,\"]*/dot_general\"", hlo)
    of_weights = [p for p in products if "->" not in p]  # the others are named by an einsum
    assert len(of_weights) == 7


@supported
def test_weights_of_8_bits_are_read_where_they_are(without_a_gpu):
    """By products of integers; nothing makes a copy of them or other numbers of them."""
    hlo = without_a_gpu("int8", {})
    products = re.findall(r"= \(s32\[16,\d+\]\S* \S+ custom-call\(.*__cublas", hlo)
    assert len(products) == 8, hlo[-2000:]  # seven of a layer, and the logits'
    weight = r"(?:1,|3,)?(?:256|512|1024),(?:256|1024)"
    assert re.search(rf"= s8\[{weight}\]", hlo)
    assert not re.search(rf"= (?:s8|bf16|f32)\[{weight}\]\S* (?:fusion|copy|convert)", hlo)


@supported
def test_encoding_changes_residuals_in_place(without_a_gpu):
    """Once for four stages of 16 codewords."""
    hlo = without_a_gpu("encode", {})
    stage = re.search(r"^%\S+ \(arg_tuple(?:.*\n)*?^\}", hlo, re.M).group()
    assert "f32[2,4096,64]" in stage
    assert len(re.findall(r"= f32\[2,1,4096,128\]\S* fusion\(", stage)) == 1
    assert " copy(" not in stage
