"""The GPU kernel of bit planes without a GPU: on numpy lanes, its refusals, assembled."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from lanes import run_kernel
from lowering import (
    HOW,
    modules,
    on_abstract,
    planes_module,
    planes_operation,
    planes_shapes,
    supported,
)
from test_mosaic_gpu_recent import some as some_recent
from test_reference_planes import Case, expected, make

from gsrq_jax.kernels import (
    devices,
    mosaic_gpu_finish,
    mosaic_gpu_planes,
    mosaic_gpu_recent,
    planes,
    reference,
)
from gsrq_jax.kernels.errors import InputError

Config = mosaic_gpu_planes.Config
SMALL = Case(B=1, H=1, q=4, N=2, b=256, d=64, R=32, S=32, blocks=(2,), first=4, every=16)


def case_of(**what):
    return dataclasses.replace(SMALL, **what)


def arguments(case, seed=0):
    """`make`, with vectors of about unit variance and scores that spread by ``scale``."""
    arrays, bits, how = make(case, seed)
    arrays["query"] = arrays["query"] * np.float32(np.sqrt(2 * case.R / case.d))
    arrays["key_codewords"] = arrays["key_codewords"] * np.float32(case.R**-0.5)
    arrays["value_codewords"] = arrays["value_codewords"] * np.float32(case.S**-0.5)
    if case.mean:
        arrays["mean"] = arrays["mean"] * np.float32(0.3)
    for side in ("key_codewords", "value_codewords"):
        arrays[side] = arrays[side].astype(jnp.bfloat16)
    return arrays, bits, how


def on_lanes(x, config=None, first=0, every=1, stride=1, fills=1, recent=None):
    """`attend_planes` with the kernel run by numpy, and the end in plain jnp."""
    problem = mosaic_gpu_planes.problem_of(**x, every=every, stride=stride, fills=fills)
    exact = recent and mosaic_gpu_recent.problem_of(x["query"], recent)
    problem = dataclasses.replace(problem, recent=exact)
    config = config or mosaic_gpu_planes.choose_config(problem)

    @jax.jit
    def before(query, mean, inv_freq, words):
        return mosaic_gpu_planes.score_inputs(problem, query, mean, inv_freq, words, first)

    inputs = before(*(x[name] for name in ("query", "mean", "inv_freq", "key_codewords")))
    inputs += mosaic_gpu_recent.arrays_of(recent) if recent else ()
    made = mosaic_gpu_planes.outputs(problem, config)
    outputs = [
        np.full(shape, np.nan if np.issubdtype(dtype, np.floating) else 2**30, dtype)
        for shape, dtype in made.values()
    ]

    def program(warp, *places):
        at = mosaic_gpu_planes.Addresses.of(problem, *places)
        mosaic_gpu_planes.PlanesKernel(problem, config, warp, at).run()

    arrays = x["key_planes"], x["value_planes"], x["blocks"], *inputs
    nbytes = mosaic_gpu_planes.Memory.of(problem, config).nbytes
    blocks = problem.pairs * config.splits
    written = run_kernel(program, blocks, config.warps, nbytes, arrays, outputs)
    written = dict(zip(made, written, strict=True))
    beside = None
    if recent:
        beside = mosaic_gpu_recent.in_parts(written["recent"], written["recent_lse"])
    return ended(problem, config, x, written, beside)


def ended(problem, config, x, written, beside):
    """What the kernel that follows makes of it, by numpy lanes, too."""
    others = [np.zeros(1, np.float32)] * 2
    if beside is not None:
        others = [np.ascontiguousarray(np.moveaxis(y, (0, 3), (2, 1))) for y in beside]
    end = mosaic_gpu_finish.Problem(problem, config.splits, 0 if beside is None else len(beside[0]))
    outputs = (
        np.full(x["query"].shape, 7, np.float32),
        np.full(x["query"].shape[:-1], 7, np.float32),
    )

    def program(warp, *places):
        at = mosaic_gpu_finish.Addresses(*places)
        mosaic_gpu_finish.FinishKernel(end, warp, at).run()

    made = written["histogram"], written["scale"], x["value_codewords"]
    arrays = x["query"], x["blocks"], *made, *others
    blocks = problem.pairs * 4 // end.together
    return run_kernel(program, blocks, mosaic_gpu_finish.WARPS, end.nbytes, arrays, outputs)


RUNS = {
    "small": (SMALL, Config(8, 3, 4, 1)),
    "two parts, one head": (case_of(q=1, blocks=(1,)), Config(8, 2, 2, 2)),
    "1 bit": (case_of(d=128, R=128, S=128), None),
    "half a bit, ragged": (
        case_of(B=3, R=64, S=64, N=4, blocks=(3, 0, 4), every=8),
        Config(8, 3, 4, 2),
    ),
    "a ring that goes round": (case_of(N=11, b=512, blocks=(11,)), Config(8, 3, 4, 1)),
    "chunks of two tiles": (case_of(R=96, S=160, N=3, blocks=(3,)), Config(8, 2, 2, 1)),
    "two heads together": (case_of(H=2, s=2, R=256, S=256, N=1, blocks=(1,)), None),
    "four heads together": (case_of(H=4, s=4, R=160, S=96, N=1, blocks=(1,)), None),
    "most stages": (case_of(R=512, S=512, N=1, blocks=(1,)), None),
    "wide heads": (case_of(d=256, R=64, S=64, N=1, blocks=(1,)), None),
    "queries of two tokens, parts of blocks": (
        case_of(T=2, q=3, b=512, fills=2, blocks=(3,)),
        None,
    ),
    "every token a knot": (case_of(every=1), None),
    "knots of 4": (case_of(every=4), None),
    "knots of 32, strided": (case_of(every=32, stride=3), None),
    "no mean key": (case_of(mean=False), None),
    "nothing coded": (case_of(blocks=(0,)), None),
    "scores that spread by 4 nats": (case_of(d=128, R=128, S=128, scale=2.8), None),
}
runs = pytest.mark.parametrize(("case", "config"), RUNS.values(), ids=RUNS.keys())


def check(got, want):
    """Output vectors to 1e-3 of their length, as on a GPU, and the log-sum-exp to 2e-3."""
    (out, lse), (right, right_lse) = got, want
    error = np.linalg.norm(out - right, axis=-1)
    assert (error <= 1e-3 * np.linalg.norm(right, axis=-1)).all(), error.max()
    np.testing.assert_allclose(lse, right_lse, atol=2e-3)


@runs
def test_kernel_on_lanes(case, config):
    x, bits, how = arguments(case)
    check(on_lanes(x, config, **how), expected(case, x, bits))


@pytest.mark.parametrize("config", [Config(8, 3, 4, 1), Config(16, 2, 4, 3)])
def test_exact_tokens_on_lanes(config):
    case = case_of(B=2, q=3, N=3, blocks=(3, 0))
    x, _, how = arguments(case)
    sizes = mosaic_gpu_recent.Problem(case.B, case.H, case.q, case.d, 4, 200)
    _, recent = some_recent(sizes, [4, 2], [777, 3], [130, 0], [1, 1])
    got = on_lanes(x, config, recent=recent, **how)
    part = reference.attend_planes(**x, **how)
    check(got, reference.with_beside(part, reference.attend_recent(x["query"], recent)))


@pytest.mark.parametrize(
    "case",
    [
        case_of(B=2, q=1, b=128, N=3, blocks=(1, 2)),
        case_of(B=2, q=1, b=512, fills=2, blocks=(1, 3)),
    ],
)
def test_nothing_of_the_invalid_is_read(case):
    """Codes that are not valid have no part in any bit of the result."""
    x, _, how = arguments(case)
    x |= {name: np.array(x[name]) for name in ("key_planes", "value_planes")}
    y = {name: np.copy(x[name]) for name in ("key_planes", "value_planes")}
    for row, n in enumerate(case.blocks):
        for name in y:
            of_tiles = y[name].reshape(*y[name].shape[:2], -1, y[name].shape[-1])  # a view
            of_tiles[row, :, n * case.b // case.fills // planes.TILE :] ^= 0xFFFFFFFF
    assert (y["key_planes"] != x["key_planes"]).any()
    for a, b in zip(on_lanes(x, **how), on_lanes(x | y, **how), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_query_that_is_not_finite_shows():
    x, _, how = arguments(case_of(B=3, q=2, N=1, blocks=(1, 1, 0)))
    for row, bad in enumerate((np.nan, 1e6, np.inf)):
        x["query"][row, 0, 0, 1, 5] = bad
    with np.errstate(all="ignore"):
        out, lse = on_lanes(x, **how)
    fine = [True, False, True, False, True, True]  # the third sequence has nothing coded
    assert np.isfinite(out).all(axis=-1).ravel().tolist() == fine
    assert (~np.isnan(lse)).ravel().tolist() == fine


# --- which layout is chosen -----------------------------------------------------------------------


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_a_layout_fits_for_every_number_of_stages(dim):
    stages = range(32, mosaic_gpu_planes.MOST_STAGES + 1, 32)
    for R, S, every in itertools.product(stages, stages, (0, *mosaic_gpu_planes.KNOTS)):
        problem = problem_of({"N": 128, "d": dim, "R": R, "S": S}, every)
        config = mosaic_gpu_planes.choose_config(problem)
        memory = mosaic_gpu_planes.Memory.of(problem, config)
        assert memory.nbytes <= mosaic_gpu_planes.SHARED_BYTES, problem
        assert memory.slot % 16 == memory.rest % 128 == memory.sums % 4 == 0
        used = memory.nbytes - 128
        slots = config.warps * config.depth * config.tokens * (R + S) // 8
        sums = config.warps * mosaic_gpu_planes.ROWS * (S + 2) * 4
        assert max(slots, sums) <= used
        # Products are made while all slots but each warp's last one are filled.
        assert slots // config.depth * (config.depth - 1) <= memory.rest < used


LLAMA = {"H": 8, "q": 4, "d": 128, "b": 1024}
"""LLaMA-3-8B, its blocks as the frames of gsrq-kernel-1."""


@pytest.mark.parametrize(
    ("sizes", "config"),
    [
        ({"B": 1, "N": 8}, Config(16, 3, 4, 11)),
        ({"B": 1, "N": 128}, Config(16, 3, 4, 16)),
        ({"B": 8, "N": 32}, Config(16, 3, 4, 2)),
        ({"B": 8, "N": 128}, Config(16, 3, 4, 2)),
        ({"B": 8, "N": 128, "R": 64, "S": 64}, Config(16, 3, 4, 2)),
        ({"B": 32, "N": 32}, Config(16, 3, 4, 1)),
        ({"B": 8, "N": 128, "s": 2, "R": 256, "S": 256}, Config(8, 3, 4, 2)),
        ({"B": 8, "N": 128, "s": 4, "R": 512, "S": 512}, Config(8, 3, 2, 2)),
    ],
)
def test_layouts_of_llama(sizes, config):
    problem = problem_of(LLAMA | sizes, 16)
    assert mosaic_gpu_planes.choose_config(problem) == config


# --- what is refused ------------------------------------------------------------------------------

A = jax.ShapeDtypeStruct
BAD = {
    "head_dim": ({"d": 96}, "64, 128 or 256 as head_dim, got 96;"),
    "group": ({"q": 9}, "1 to 8 as query heads per KV head, got 9;"),
    "tokens": ({"T": 9}, "1 to 8 as query tokens, got 9;"),
    "3 heads together": (
        {"H": 9, "s": 3},
        "1, 2 or 4 as KV heads that share a code, got 9 KV heads and codes of 3;",
    ),
    "8 heads together": ({"s": 8}, "share a code, got 8 KV heads and codes of 1;"),
    "block": ({"b": 160}, "a multiple of 128 as tokens of a block, .*, got 160 in 1;"),
    "parts": ({"b": 512, "fills": 8}, "a multiple of 128 as tokens of .*, got 512 in 8;"),
    "no parts": ({"fills": 0}, "a multiple of 128 as tokens of a block, .*, got 1024 in 0;"),
    "knots": ({"every": 2}, "1 or 4 or 8 or .* as tokens between knots of the mean key, got 2;"),
    "few stages": ({"R": 16}, "a multiple of 32 up to 512 as stages of keys, got 16;"),
    "odd stages": ({"S": 100}, "a multiple of 32 up to 512 as stages of values, got 100;"),
    "many stages": ({"S": 544}, "a multiple of 32 up to 512 as stages of values, got 544;"),
}


@pytest.mark.parametrize(("sizes", "message"), BAD.values(), ids=BAD.keys())
def test_sizes_that_are_not_supported(sizes, message):
    how = {name: x for name, x in sizes.items() if name in HOW}
    given = planes_shapes(**{name: x for name, x in sizes.items() if name not in HOW})
    with pytest.raises(InputError, match=message) as refused:
        mosaic_gpu_planes.attend_planes(**given, **how)
    assert "\n" not in str(refused.value)


BAD_ARRAYS = {
    "a mean key of all heads": (
        {"mean": A((128,), jnp.float32)},
        r"takes \(8, 128\) as mean key, got \(128,\)",
    ),
    "frequencies of whole heads": (
        {"inv_freq": A((128,), jnp.float32)},
        r"takes \(64,\) as rotary frequencies, got \(128,\)",
    ),
    "16 codewords": (
        {"key_codewords": A((8, 1, 128, 16, 128), jnp.bfloat16)},
        r"whole heads, \(8, 1, R, 2, 128\) as codewords of keys, got \(8, 1, 128, 16, 128\)",
    ),
    "split heads": (
        {"value_codewords": A((8, 2, 128, 2, 64), jnp.bfloat16)},
        r"\(8, 1, R, 2, 128\) as codewords of values, got \(8, 2, 128, 2, 64\)",
    ),
    "float32 codewords": (
        {"value_codewords": A((8, 1, 128, 2, 128), jnp.float32)},
        "bfloat16 as dtype of the codewords of values, got float32",
    ),
    "codes of other keys": (
        {"key_planes": A((2, 8, 16, 32, 64), jnp.uint32)},
        r"uint32 \(2, 8, 16, 32, 128\) as codes of keys, got uint32 \(2, 8, 16, 32, 64\)",
    ),
    "bytes": (
        {"value_planes": A((2, 8, 16, 32, 128), jnp.uint8)},
        r"uint32 \(2, 8, 16, 32, 128\) as codes of values, got uint8",
    ),
    "a bfloat16 query": (
        {"query": A((2, 1, 8, 4, 128), jnp.bfloat16)},
        "float32 as dtype of the query, got bfloat16",
    ),
    "blocks of another batch": (
        {"blocks": A((3,), jnp.int32)},
        r"integers \(2,\) as blocks, got int32 \(3,\)",
    ),
    "blocks that are no integers": (
        {"blocks": A((2,), jnp.float32)},
        r"integers \(2,\) as blocks, got float32 \(2,\)",
    ),
}


@pytest.mark.parametrize(("arrays", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_arrays_that_are_not_supported(arrays, message):
    with pytest.raises(InputError, match=message) as refused:
        mosaic_gpu_planes.attend_planes(**(planes_shapes() | arrays))
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (Config(16, 4, 4, 1), r"takes \d+ bytes of shared memory, and there are 230400"),
        (Config(4, 2, 4, 1), "must have 8 or 16 warps"),
        (Config(8, 1, 4, 1), "a depth of at least 2"),
        (Config(8, 2, 3, 1), "2 or 4 tiles"),
        (Config(8, 2, 4, 0), "splits of at least 1"),
    ],
)
def test_layouts_that_cannot_be(monkeypatch, config, message):
    monkeypatch.setattr(devices, "check_hopper", lambda: None)
    with pytest.raises(InputError, match=message):
        mosaic_gpu_planes.attend_planes(**planes_shapes(), config=config)


def test_devices_that_are_not_supported(monkeypatch):
    monkeypatch.setattr(jax, "__version__", "0.12.3")
    with pytest.raises(InputError, match=r"compute capability 9.0 \(H100, H200\), this is cpu"):
        mosaic_gpu_planes.attend_planes(**planes_shapes())


# --- for a GPU that is not there ------------------------------------------------------------------

FRAMES = {"every": 16, "fills": 4}
FORMS = {
    "1 bit": ({**FRAMES, "recent": 1}, 0),
    "half a bit": ({**FRAMES, "recent": 1, "R": 64, "S": 64}, 0),
    "head_dim 64, blocks of 128": ({"d": 64, "b": 128, "R": 32, "S": 32}, 0),
    "more stages of keys": ({"R": 256, "S": 128, "every": 8, "recent": 1}, 0),
    "two heads together": ({**FRAMES, "recent": 1, "s": 2, "R": 256, "S": 256}, 0),
    "four heads together": ({**FRAMES, "s": 4, "R": 512, "S": 512}, 32),
    "wide heads, two tokens": ({"d": 256, "T": 2, "q": 8, "R": 96, "S": 160, "every": 4}, 32),
}
"""Sizes, and bytes that ptxas may spill at most."""


def problem_of(sizes, every=1):
    """The shapes of a call without exact tokens; without a mean key where ``every`` is 0."""
    given = planes_shapes(**sizes)
    if not every:
        given["mean"] = None
    return mosaic_gpu_planes.problem_of(**given, every=every or 1)


@supported
@pytest.mark.parametrize(("sizes", "spilled"), FORMS.values(), ids=FORMS.keys())
def test_lowers_without_a_gpu(sizes, spilled):
    del spilled
    assert len(planes_module(**sizes)) > 10_000


@supported
@pytest.mark.parametrize(
    ("sizes", "kernels"),
    [
        ({"recent": 1}, 2),
        ({"recent": 1, "T": 2}, 2),  # exact tokens by XLA
        ({"recent": 1, "d": 256}, 2),  # likewise
        ({"recent": 1, "N": 0}, 0),
    ],
)
def test_how_many_kernels(sizes, kernels):
    assert len(modules(*planes_operation(FRAMES | sizes))) == kernels


@supported
def test_other_gpus_are_refused_when_lowered_for():
    with (
        on_abstract("NVIDIA A100-SXM4-80GB"),
        pytest.raises(InputError, match="this is NVIDIA A100"),
    ):
        mosaic_gpu_planes.attend_planes(**planes_shapes())


@supported
@pytest.mark.parametrize(("sizes", "spilled"), FORMS.values(), ids=FORMS.keys())
def test_assembles_without_a_gpu(sizes, spilled, without_a_gpu):
    said = without_a_gpu("planes", sizes)
    assert "Compiling entry function" in said, said[-2000:]
    assert "for 'sm_90a'" in said
    (registers,) = set(re.findall(r"Used (\d+) registers", said))
    shaped = {name: x for name, x in sizes.items() if name not in HOW}
    config = mosaic_gpu_planes.choose_config(problem_of(shaped, sizes.get("every", 1)))
    assert int(registers) * 32 * config.warps <= 65536
    assert max(map(int, re.findall(r"(\d+) bytes spill stores", said))) <= spilled


@supported
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {**FRAMES, "recent": 1},
        {**FRAMES, "recent": 1, "s": 2, "R": 256, "S": 256},
        {"b": 256, "q": 8, "T": 3},
    ],
)
def test_compiles_for_a_gpu_without_one(sizes, without_a_gpu):
    """XLA copies nothing large, and makes nothing but angles of positions and counts of exact
    tokens; what is made of the query stays in the kernel."""
    hlo = without_a_gpu("compile_planes", sizes)
    entry = hlo[hlo.index("\nENTRY") :]
    assert entry.count('custom_call_target="mosaic_gpu') == 2, hlo[-2000:]
    assert " copy(" not in entry
    fusions = re.findall(r" fusion\((.*?)\)", entry)
    of_counts = [given for given in fusions if "recent___held" in given]
    assert len(of_counts) == sizes.get("recent", 0), fusions
    others = [given for given in fusions if given not in of_counts]
    assert others
    assert all(re.fullmatch(r"%x__inv_freq__\S*", given) for given in others), others
    assert not re.search(r" dot\(|cublas", hlo)
