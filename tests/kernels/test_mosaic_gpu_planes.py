"""The kernel of bit planes without a GPU: run on numpy lanes, lowered, refused."""

import functools

import jax.numpy as jnp
import numpy as np
import pytest
from lanes import run_kernel

from gsrq_jax.kernels import mosaic_gpu_planes, planes, reference
from gsrq_jax.kernels.errors import InputError
from gsrq_jax.kernels.mosaic_gpu_planes import Config

INV_FREQ = 1 / 10000.0 ** (np.arange(0, 64, 2) / 64)


def make(
    *,
    batch=1,
    tokens=1,
    heads=2,
    group=4,
    shared=1,
    n=3,
    b=256,
    dim=64,
    key_stages=128,
    value_stages=128,
    blocks=(3,),
    spread=2.0,
    dtype=jnp.bfloat16,
    seed=0,
):
    """Arguments of `attend_planes`: random codes, and codewords by which scores spread so far."""
    rng = np.random.default_rng(seed)

    def words(stages):
        x = rng.normal(size=(heads, 1, stages, 2, dim)) / stages**0.5
        return jnp.asarray(x, dtype)

    def bits(stages):
        return rng.integers(0, 2, (batch, heads // shared, n, b, stages), np.uint8)

    query = spread * rng.normal(size=(batch, tokens, heads, group, dim)) / dim**0.5
    return (
        jnp.asarray(query, jnp.float32),
        jnp.asarray(rng.normal(size=(heads, dim)), jnp.float32),
        jnp.asarray(INV_FREQ[: dim // 2], jnp.float32),
        planes.keys_to_planes(jnp.asarray(bits(key_stages))),
        planes.values_to_planes(jnp.asarray(bits(value_stages))),
        words(key_stages),
        words(value_stages),
        jnp.asarray(blocks, jnp.int32),
    )


def by_lanes(arguments, config, *, first=0, **options):
    """What the kernel makes of them, on numpy lanes."""
    p = mosaic_gpu_planes.problem_of(*arguments, **options)
    query, mean, inv_freq, key_planes, value_planes, key_words, value_words, blocks = arguments
    inputs = mosaic_gpu_planes.score_inputs(p, query, mean, inv_freq, key_words, first)

    def program(warp, *places):
        at = mosaic_gpu_planes.Addresses.of(p, *places)
        mosaic_gpu_planes.PlanesKernel(p, config, warp, at).run()

    made = mosaic_gpu_planes.outputs(p, config).values()
    results = run_kernel(
        program,
        p.pairs * config.splits,
        config.warps,
        config.nbytes(p),
        (key_planes, value_planes, blocks, *inputs),
        [np.full(shape, np.nan, kind) for shape, kind in made],
    )
    return mosaic_gpu_planes.finish(p, query, value_words, *map(jnp.asarray, results))


CASES = {
    "as LLaMA-3 has it": (dict(), dict(every=16)),
    "no mean key": (dict(mean=None), dict()),
    "half a bit": (dict(key_stages=32, value_stages=32), dict(every=32)),
    "odd words": (dict(key_stages=96, value_stages=96), dict(every=16)),
    "two bits": (dict(key_stages=160, value_stages=256, heads=1), dict(every=64)),
    "two heads together": (
        dict(heads=4, shared=2, key_stages=256, value_stages=64, n=1, blocks=(1,)),
        dict(every=16),
    ),
    "ragged": (dict(batch=3, heads=1, blocks=(0, 3, 1)), dict(every=128)),
    "parts of a block": (dict(batch=2, heads=1, b=512, blocks=(3, 5)), dict(every=16, fills=2)),
    "one query head": (dict(group=1, heads=1), dict(every=16)),
    "several tokens of six heads": (dict(group=6, tokens=3, heads=1, n=1, blocks=(1,)), dict()),
    "scores that spread by 4 nats": (dict(spread=3.4, heads=1), dict(every=16)),
    "first and stride": (dict(heads=1), dict(every=16, first=4, stride=3)),
    "codewords in float32": (dict(dtype=jnp.float32, heads=1), dict(every=16)),
}


@pytest.mark.parametrize(("given", "options"), CASES.values(), ids=CASES.keys())
def test_is_the_reference(given, options):
    given = dict(given)
    without_mean = given.pop("mean", 0) is None or "every" not in options
    arguments = make(**given)
    if without_mean:
        arguments = (arguments[0], None, *arguments[2:])
    warps = 8 if max(given.get("key_stages", 0), given.get("value_stages", 0)) > 128 else 4
    out, lse = by_lanes(arguments, Config(warps, 2), **options)
    want, want_lse = reference.attend_planes(*arguments, **options)
    scale = float(jnp.sqrt(jnp.mean(jnp.square(want))))
    np.testing.assert_allclose(out, want, rtol=0, atol=2e-3 * scale)
    np.testing.assert_allclose(lse, want_lse, rtol=0, atol=2e-3)
    relative = jnp.linalg.norm(out - want) / jnp.linalg.norm(want)
    assert relative < 1e-3


def test_the_layout_of_work_changes_nothing_but_rounding():
    arguments = make(heads=1, blocks=(3,))
    first, first_lse = by_lanes(arguments, Config(4, 1), every=16)
    for config in (Config(8, 1), Config(4, 3)):
        out, lse = by_lanes(arguments, config, every=16)
        np.testing.assert_allclose(out, first, atol=1e-4)
        np.testing.assert_allclose(lse, first_lse, atol=1e-5)


def test_what_is_not_valid_is_not_read():
    arguments = make(batch=2, heads=1, blocks=(1, 0))
    want = by_lanes(arguments, Config(4, 1), every=16)
    query, mean, inv_freq, keys, values, *rest = arguments
    keys, values = (x.at[:, :, 1:].set(0xFFFFFFFF).at[1].set(0x55555555) for x in (keys, values))
    same = by_lanes((query, mean, inv_freq, keys, values, *rest), Config(4, 1), every=16)
    for a, b in zip(want, same, strict=True):
        np.testing.assert_array_equal(a, b)
    assert (np.asarray(want[0][1]) == 0).all()
    assert (np.asarray(want[1][1]) == -np.inf).all()


def test_a_nan_stays_in_its_row():
    arguments = make(heads=1)
    clean, _ = by_lanes(arguments, Config(4, 1), every=16)
    query = arguments[0].at[0, 0, 0, 1, 3].set(jnp.nan)
    out, lse = by_lanes((query, *arguments[1:]), Config(4, 1), every=16)
    assert np.isnan(out[0, 0, 0, 1]).all()
    assert np.isnan(lse[0, 0, 0, 1])
    others = np.array([0, 2, 3])
    np.testing.assert_allclose(out[0, 0, 0, others], clean[0, 0, 0, others], atol=1e-6)


@pytest.mark.parametrize(
    ("given", "options", "said"),
    [
        (dict(key_stages=288), dict(), "multiples of 32 up to 256 as stages of keys, got 288"),
        (dict(group=9), dict(), "1 to 8 as query heads a KV head, got 9"),
        (dict(tokens=9), dict(), "1 to 8 as query tokens, got 9"),
        (dict(b=96), dict(), "a multiple of 128 as tokens of a block, got 96"),
        (dict(b=256), dict(every=8), "a multiple of 16 .* as tokens between knots"),
        (dict(b=256), dict(fills=4), "a multiple of 128 as tokens of a block, got 64"),
    ],
)
def test_refused(given, options, said):
    with pytest.raises(InputError, match=said):
        mosaic_gpu_planes.problem_of(*make(**given), **({"every": 16} | options))


def test_work_fills_the_processors():
    problem = functools.partial(mosaic_gpu_planes.Problem, every=16)
    choose = mosaic_gpu_planes.choose_config

    def llama(batch, blocks, stages, shared=1):
        return problem(batch, 1, 8, 4, shared, blocks, 1024, 128, stages, stages)

    assert choose(llama(8, 128, 128)) == Config(16, 2)
    assert choose(llama(1, 128, 128)) == Config(16, 16)
    assert choose(llama(32, 8, 128)) == Config(16, 1)
    assert choose(llama(8, 128, 256, 2)) == Config(8, 2)
    assert choose(llama(1, 4, 128)) == Config(16, 2)  # a warp a chunk
    for stages in (32, 128, 256):
        p = llama(8, 128, stages)
        assert choose(p).nbytes(p) <= mosaic_gpu_planes.SHARED_BYTES
