"""The benchmark of decoding: at toy sizes on a CPU, and what it makes of numbers that are known."""

import importlib
import json
import pathlib

import jax
import numpy as np
import pytest

from gsrq_jax.baselines.uniform import Uniform, UniformSpec
from gsrq_jax.kernels import reference
from gsrq_jax.models import llama

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture(scope="module")
def benchmark():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield importlib.import_module("decode_speed")


@pytest.mark.filterwarnings("ignore:the fused GPU kernel")
def test_toy_sizes(benchmark, tmp_path):
    config = benchmark.Config(
        model="toy",
        shapes=("2x256",),
        bits=(1.0,),
        block=128,
        repeat=2,
        times=2,
        batches=(2,),
        contexts=(300,),
        prompts=(140,),
        steps=3,
        out=tmp_path,
    )
    benchmark.main(config)
    (file,) = (tmp_path / "results/decode-speed").glob("*.json")
    data = json.loads(file.read_text())
    rows = {(r["part"], r["what"]): r for r in data["rows"]}
    assert len(rows) == len(data["rows"]) == 8
    assert rows["prefill", "1 bit"]["microseconds"] > 0
    for what, bits in (("int8, XLA", 8.5), ("kivi2, XLA", 3)):  # with their grids
        assert rows["attention", what]["bits"] == bits
    exact, coded = rows["attention", "bf16, jax (XLA)"], rows["attention", "1 bit"]
    assert exact["times"] == 1
    assert coded["times"] == pytest.approx(exact["microseconds"] / coded["microseconds"])
    ratio = exact["floor_microseconds"] / coded["floor_microseconds"]
    assert ratio == pytest.approx(16)
    for what in ("bf16", "1 bit"):
        assert rows["model", what]["tokens_per_second"] > 0
        assert rows["model", what]["bytes"] > 1e6
    table = file.with_suffix(".md").read_text()
    assert "| 2 × 256 | 1 bit | " in table
    assert "| 2 × 300 | bf16 | " in table
    assert "| 140 | bf16 | " in table
    assert file.with_suffix(".png").stat().st_size > 10_000


def test_the_largest_that_fits(benchmark):
    config = benchmark.Config()
    memory = 80e9
    weights = 2 * llama.count(llama.abstract(config.sizes)[1])
    for what in ("bf16", "1 bit", "0.5 bit"):
        batch, context = benchmark.fits(config, what, memory, 32768)
        assert context == 32768
        held = weights + benchmark.cache_bytes(config, what, batch, context)
        more = weights + benchmark.cache_bytes(config, what, batch + 1, context)
        assert held <= 0.9 * memory < more
        one, longest = benchmark.fits(config, what, memory, None)
        assert one == 1
        held = weights + benchmark.cache_bytes(config, what, 1, longest)
        assert held <= 0.9 * memory < held * 1.2
        if what == "1 bit":
            assert longest > 4_000_000


def test_parts_of_a_profile(benchmark):
    parts = benchmark.by_part(
        {"body_mosaic_gpu_kernel": 200.0, "nvjet_sm90_hsh": 30.0, "gemm_fusion_dot_5": 6.0, "x": 2}
    )
    assert parts == {"kernel": 200.0, "products": 36.0, "rest": 2.0}
    assert benchmark.by_part({"x": 2.0}) == {"products": 0.0, "rest": 2.0}
    assert benchmark.by_part({}) == {}
    x = jax.numpy.ones(3)
    assert benchmark.profile(lambda: x + 1, 1) == {}  # of a CPU


@pytest.mark.parametrize(
    "spec",
    [
        UniformSpec.rounded(8, 16, block=8),
        UniformSpec.rounded(4, 16, group=8, block=8),
        UniformSpec.kivi(2, 16, group=8, block=16),
        UniformSpec.kivi(1, 16, group=8, block=16),
    ],
    ids=str,
)
def test_attention_over_rounded_numbers(benchmark, spec):
    """Grids in queries and probabilities are the attention over decoded keys and values."""
    rng = np.random.default_rng(0)
    batch, heads, blocks = 2, 3, 4
    k, v = rng.normal(size=(2, batch, blocks, spec.block, heads, 16)).astype(np.float32)
    query = (rng.normal(size=(batch, heads, 2, 16)) / 4).astype(np.float32)
    positions = np.zeros((batch, blocks, spec.block), np.int32)  # that it does not look at
    codes = Uniform(spec).encode(k, v, positions)
    old = Uniform(spec).decode(*codes, positions)
    old_k, old_v = (np.reshape(x, (batch, -1, heads, 16)) for x in old)
    seen = np.ones((batch, 1, blocks * spec.block), bool)
    want, _ = reference.attend_exact(query[:, None], old_k, old_v, seen)
    by_head = jax.tree.map(lambda x: np.moveaxis(x, 2, 1), codes)
    got = benchmark.uniform_attention.attend(query, *by_head, spec)
    np.testing.assert_allclose(got.astype(np.float32), want[:, 0], atol=0.03)
    assert np.abs(want).max() > 0.5
