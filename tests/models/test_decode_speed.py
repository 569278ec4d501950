"""The benchmark of decoding: at toy sizes on a CPU, and what it makes of numbers that are known."""

import itertools
import json
import sys
import types

import jax
import numpy as np
import pytest
from scripts import script

from gsrq_jax.baselines.uniform import Uniform, UniformSpec
from gsrq_jax.kernels import reference
from gsrq_jax.models import llama

benchmark = script("benchmarks", "decode_speed")


def toy(benchmark, **changes):
    small = {
        "model": "toy",
        "shapes": ("2x256",),
        "bits": (1.0,),
        "block": 128,
        "repeat": 2,
        "times": 2,
        "batches": (2,),
        "contexts": (256,),
        "prompts": (140,),
        "long": 0,
        "weights": ("int8",),
        "steps": 3,
        "jobs": 2,
    }
    return benchmark.Config(**(small | changes))


@pytest.mark.filterwarnings("ignore:the fused GPU kernel")
def test_toy_sizes(benchmark, tmp_path, monkeypatch, capsys):
    config = toy(benchmark, out=tmp_path)
    benchmark.main(config)
    (file,) = (tmp_path / "results/decode-speed").glob("*.json")
    data = json.loads(file.read_text())
    rows = {(r["part"], r["what"], r.get("weights")): r for r in data["rows"]}
    assert len(rows) == len(data["rows"]) == 8
    assert rows["prefill", "1 bit", None]["microseconds"] > 0
    for what, bits in (("int8, XLA", 8.5), ("kivi2, XLA", 3)):  # with their grids
        assert rows["attention", what, None]["bits"] == bits
    exact, coded = (rows["attention", what, None] for what in ("bf16, jax (XLA)", "1 bit"))
    assert exact["times"] == 1
    assert coded["times"] == pytest.approx(exact["microseconds"] / coded["microseconds"])
    ratio = exact["floor_microseconds"] / coded["floor_microseconds"]
    assert ratio == pytest.approx(16)
    for what in ("bf16", "1 bit"):
        assert rows["model", what, "int8"]["tokens_per_second"] > 0
        assert rows["model", what, "int8"]["bytes"] > 1e5
    table = file.with_suffix(".md").read_text()
    assert "| 2 × 256 | 1 bit | " in table
    assert "| 2 × 256 | bf16 | int8 | " in table
    assert "| 140 | bf16 | " in table
    assert file.with_suffix(".png").stat().st_size > 10_000

    # Cut off, it goes on from the rows that are there; a row that failed is tried again.
    kept, (failed, missing) = data["rows"][:-2], data["rows"][-2:]
    kept[0]["microseconds"] = 1e9
    data["rows"] = [*kept, failed | {"error": "once"}]
    file.write_text(json.dumps(data))
    capsys.readouterr()
    monkeypatch.setattr(benchmark, "measure_model", lambda *_: {"tokens_per_second": 7, "bytes": 8})
    benchmark.main(config)
    again = json.loads(file.read_text())["rows"]
    assert capsys.readouterr().out.count("'part'") == 2
    assert again[0]["microseconds"] == 1e9
    assert [(r["what"], r["weights"], r["tokens_per_second"]) for r in again[-2:]] == [
        (r["what"], r["weights"], 7) for r in (failed, missing)
    ]
    # Another command does not.
    assert benchmark.earlier(file, json.loads(file.read_text())["config"]) == again
    assert not benchmark.earlier(file, {"part": "attention"})


def test_what_matters_comes_first(benchmark):
    config = benchmark.Config(memory=80e9)
    rows = [m.row for m in benchmark.planned(config)]
    assert len({json.dumps(row) for row in rows}) == len(rows)
    shapes = [(r["batch"], r["context"]) for r in rows]
    first = 4 * 5  # bf16, int8, KIVI-2, 1 and 0.5 bit; torch is not there
    assert all(row["part"] == "attention" for row in rows[:first])
    of_model = {(*shape, r["what"]) for shape, r in zip(shapes, rows, strict=True)} - set()
    ahead = rows[first : first + 10]
    assert {r["weights"] for r in ahead} == {"bf16"}
    assert {r["what"] for r in ahead} == {"bf16", "1 bit"}
    assert [s for s in shapes[first : first + 8] if s not in config.pairs] == []
    largest = [(r["what"], r["batch"]) for r in ahead[8:] if r["context"] == 32768]
    assert dict(largest)["1 bit"] > 6 * dict(largest)["bf16"]
    for batch, context in itertools.product(config.batches, config.contexts):
        assert {(batch, context, what) for what in ("bf16", "1 bit", "0.5 bit")} <= of_model
    assert (1, 2**20, "1 bit") in of_model
    eights = [s for s, r in zip(shapes, rows, strict=True) if r.get("weights") == "int8"]
    assert set(eights) <= set(config.pairs)
    assert len([r for r in rows if r["part"] == "prefill"]) == 6


def test_what_cannot_fit_is_not_compiled(benchmark):
    config = benchmark.Config(memory=80e9, part="model", batches=(32,), contexts=(131072,))
    found = {m.row["what"]: m for m in benchmark.planned(config) if m.row["batch"] == 32}
    assert found["bf16"].prepare() is None
    assert found["bf16"].measure(None) == {"error": "does not fit"}


def test_no_time(benchmark, tmp_path, capsys):
    benchmark.main(toy(benchmark, part="model", seconds=1e-9, out=tmp_path))
    assert not list(tmp_path.rglob("*.json"))
    assert "goes on from here" in capsys.readouterr().out


def test_a_failure_is_a_row(benchmark, monkeypatch, capsys):
    def fail(*_):
        raise ValueError("for a test\nof two lines")

    monkeypatch.setattr(benchmark, "prefill_of", fail)
    rows = list(benchmark.run(toy(benchmark, part="prefill")))
    assert [r["error"] for r in rows] == 2 * ["ValueError: for a test"]
    assert "Traceback" in capsys.readouterr().err


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
        {
            "body_mosaic_gpu_kernel | attend/mpmd_map": 200.0,
            "nvjet_sm90_hsh | dot_general": 30.0,
            "gemm_fusion_dot_5": 6.0,
            "nvjet_sm90_hsh | attend/dot_general": 5.0,
            "loop_add | append/vmap(encode)/add": 4.0,
            "x": 2,
        }
    )
    assert parts == {"kernel": 200.0, "products": 36.0, "rest": 2.0, "attend": 5.0, "append": 4.0}
    assert benchmark.by_part({"x": 2.0}) == {"products": 0.0, "rest": 2.0}
    assert benchmark.by_part({}) == {}
    x = jax.numpy.ones(3)
    assert benchmark.profile(lambda: x + 1, 1, {}) == {}  # of a CPU


def test_profiles_know_where_operations_come_from(benchmark, monkeypatch):
    hlo = """
%fused (p: f32[2]) -> f32[2] {
  %p = f32[2]{0} parameter(0)
  ROOT %gemm.1 = f32[2]{0} custom-call(%p), metadata={op_name="jit(f)/body/attend/dot_general"}
}

ENTRY %main (a: f32[2]) -> f32[2] {
  %a = f32[2]{0} parameter(0), metadata={op_name="a"}
  %slices.3 = f32[2]{0} fusion(%a), kind=kCustom, calls=%fused, metadata={scheduling_name="x"}
  ROOT %add.7 = f32[2]{0} add(%a, %slices.3), metadata={op_name="jit(f)/jit(main)/append/add"}
}
"""
    scopes = benchmark.scopes_of(hlo)
    assert scopes["slices.3"] == scopes["gemm.1"] == "attend/dot_general"
    assert scopes["add.7"] == "append/add"

    class Made:  # as jax.profiler.ProfileData is
        def __init__(self, name, **fields):
            self.name = name
            vars(self).update(fields)

    def event(name, op):
        return Made(name, duration_ns=4000.0, stats=[("hlo_op", op), ("other", 1)])

    line = Made("Stream #7", events=[event("nvjet", "slices.3"), event("copy", "unknown")])
    data = Made("", planes=[Made("/device:GPU:0", lines=[line, Made("Steps", events=[1])])])
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda _: data, raising=False)
    found = benchmark.profile(lambda: jax.numpy.ones(3), 2, scopes)
    assert found == {"nvjet | attend/dot_general": 2.0, "copy": 2.0}


def test_scopes_of_a_decode_loop(benchmark):
    """The operations of attention and of the cache's growth are known by the library's scopes."""
    loop = benchmark.coded_loop(toy(benchmark), 1.0, 2, 256, "bf16")
    scopes = set(benchmark.scopes_of(loop.step.as_text()).values())
    assert any(s.startswith("attend/") and s.endswith("dot_general") for s in scopes)
    assert any(s.startswith("append/") and "encode" in s for s in scopes)
    assert "dot_general" in scopes  # with weights


def test_attention_by_torch(benchmark, monkeypatch):
    """FlashAttention-3 is there if it is installed, and takes the arrays in its order."""
    assert benchmark.torch_attentions() == {}  # without a GPU

    class Cuda:
        @staticmethod
        def is_available():
            return True

    flash = types.ModuleType("flash_attn_interface")
    flash.flash_attn_with_kvcache = lambda query, key, value: (query, key, value)
    torch = types.ModuleType("torch")
    torch.cuda = Cuda
    monkeypatch.setattr(benchmark, "on_gpu", lambda: True)
    monkeypatch.setitem(sys.modules, "torch", torch)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", None)
    assert list(benchmark.torch_attentions()) == ["torch SDPA"]
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash)
    found = benchmark.torch_attentions()
    assert found["FlashAttention-3"](1, 2, 3) == (1, 2, 3)


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
    old_k, old_v = (np.swapaxes(np.reshape(x, (batch, -1, heads, 16)), 1, 2) for x in old)
    seen = np.ones((batch, 1, blocks * spec.block), bool)
    want, _ = reference.attend_exact(query[:, None], old_k, old_v, seen)
    by_head = jax.tree.map(lambda x: np.moveaxis(x, 2, 1), codes)
    got = benchmark.uniform_attention.attend(query, *by_head, spec)
    np.testing.assert_allclose(got.astype(np.float32), want[:, 0], atol=0.03)
    assert np.abs(want).max() > 0.5
