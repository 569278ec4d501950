"""The benchmark of decoding: at toy sizes on a CPU, and what it makes of numbers that are known."""

import contextlib
import itertools
import json
import os
import sys
import time
import types

import jax
import jax.numpy as jnp
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


def test_a_program_runs_every_layer_in_every_round(benchmark):
    ran = []

    def attend(query, number):
        shape = jax.ShapeDtypeStruct((), number.dtype)
        return query + jax.pure_callback(lambda x: ran.append(int(x)) or x, shape, number)

    def number(key):
        return jax.random.randint(key, (), 0, 99)

    way = benchmark.Way("counts", 16, number, attend, lambda key: (number(key),))
    config, sizes = toy(benchmark, repeat=3), (2, 2**18)
    assert benchmark.rounds_within(*sizes) == 2
    program = benchmark.chained(way, config, *sizes)
    layers = [(jnp.int32(x),) for x in (5, 7, 9)]
    jax.block_until_ready(program(jnp.int32(0), layers, jnp.int32(3)))
    assert sorted(ran) == sorted([5, 7, 9] * 6)


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
    speed = data["memory"]["bytes_per_second"]
    assert exact["floor_microseconds"] == pytest.approx(2 * 256 * 2 * 2 * 64 * 2 / speed * 1e6)
    assert data["memory"]["of"] == "the best read measured here"
    assert 1e8 < speed < 1e12  # of a CPU, whose caches are quick
    for what in ("bf16", "1 bit"):
        assert rows["model", what, "int8"]["tokens_per_second"] > 0
        assert rows["model", what, "int8"]["bytes"] > 1e5
    table = file.with_suffix(".md").read_text()
    assert "| 2 × 256 | 1 bit | " in table
    assert "TB/s (the best read measured here)" in table
    assert "| batch × context | best bf16 | best fp8 | 1 bit |" in table
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
    bars = config.pairs[:4]
    assert set(shapes[:first]) == set(bars)
    short = [s for s, r in zip(shapes, rows, strict=True) if r["part"] == "attention"][first:]
    assert set(short) == {(1, 4096), (8, 4096), (1, 8192), (1, 32768)}
    of_model = {(*shape, r["what"]) for shape, r in zip(shapes, rows, strict=True)} - set()
    ahead = rows[first : first + 10]
    assert {r["weights"] for r in ahead} == {"bf16"}
    assert {r["what"] for r in ahead} == {"bf16", "1 bit"}
    assert [s for s in shapes[first : first + 8] if s not in bars] == []
    largest = [(r["what"], r["batch"]) for r in ahead[8:] if r["context"] == 32768]
    assert dict(largest)["1 bit"] > 6 * dict(largest)["bf16"]
    for batch, context in itertools.product(config.batches, config.contexts):
        assert {(batch, context, what) for what in ("bf16", "1 bit", "0.5 bit")} <= of_model
    assert (1, 2**20, "1 bit") in of_model
    eights = [s for s, r in zip(shapes, rows, strict=True) if r.get("weights") == "int8"]
    assert set(eights) == set(bars)
    assert len([r for r in rows if r["part"] == "prefill"]) == 6


def test_what_cannot_fit_is_not_compiled(benchmark):
    config = benchmark.Config(memory=80e9, part="model", batches=(32,), contexts=(131072,))
    found = {m.row["what"]: m for m in benchmark.planned(config) if m.row["batch"] == 32}
    assert found["bf16"].prepare() is None
    assert found["bf16"].measure(None) == {"error": "does not fit"}


def test_a_batch_that_proves_too_large_gets_smaller(benchmark, monkeypatch):
    """Arrays of what failed are gone by then, and the row is not measured again."""
    config = toy(benchmark, part="model", memory=4e7, weights=("bf16",), bits=())
    tried = []

    def measure(loop, _, batch):
        held = jax.block_until_ready(jax.numpy.ones(12345))
        assert sum(x.shape == held.shape for x in jax.live_arrays()) == 1
        tried.append((batch, loop))
        if len(tried) < fail:
            raise RuntimeError("RESOURCE_EXHAUSTED: for a test")
        return {"tokens_per_second": 1.0, "bytes": 2.0}

    monkeypatch.setattr(benchmark, "measure_model", measure)
    monkeypatch.setattr(benchmark, "loop_of", lambda *size: size[2])
    (m,) = (m for m in benchmark.planned(config) if "estimate" in m.row and m.row["context"] == 256)
    monkeypatch.setattr(benchmark, "planned", lambda _: [m])
    estimate = m.row["estimate"]
    sizes = [estimate]
    for _ in range(4):
        sizes.append(sizes[-1] * 19 // 20)
    assert sizes == sorted(set(sizes), reverse=True)
    fail = 3
    (row,) = benchmark.run(config)
    assert tried == [(n, n) for n in sizes[:3]]
    assert (row["batch"], row["estimate"], row["bytes"]) == (sizes[2], estimate, 2.0)
    assert list(benchmark.run(config, [row])) == []
    tried.clear()
    fail = 9
    (row,) = benchmark.run(config, [row | {"estimate": estimate + 1}])
    assert [n for n, _ in tried] == sizes
    assert (row["batch"], row["error"]) == (sizes[-1], "does not fit")


@pytest.mark.parametrize(
    ("part", "torch", "want"),
    [("model", True, None), ("attention", True, "false"), ("all", False, None)],
)
def test_memory_is_left_to_torch_alone(benchmark, monkeypatch, part, torch, want):
    monkeypatch.setenv("XLA_PYTHON_CLIENT_PREALLOCATE", "as it is found again")
    monkeypatch.delenv("XLA_PYTHON_CLIENT_PREALLOCATE")
    monkeypatch.setattr(benchmark.importlib.util, "find_spec", lambda _: torch or None)
    monkeypatch.setattr(benchmark.jax, "devices", None)  # the first use of a device
    with pytest.raises(TypeError):
        benchmark.main(toy(benchmark, part=part))
    assert os.environ.get("XLA_PYTHON_CLIENT_PREALLOCATE") == want


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
        step = 8 if batch >= 64 else 1
        assert batch % step == 0
        more = weights + benchmark.cache_bytes(config, what, batch + step, context)
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
            "attend_codes_mosaic_gpu_kernel | attend/mpmd_map": 200.0,
            "attend_recent_mosaic_gpu_kernel": 40.0,
            "cudnn_generated_fort_native_sdpa": 60.0,
            "void cudnn::fusion::lean_reduction_kernel": 3.0,
            "nvjet_sm90_hsh | dot_general": 30.0,
            "void cublasLt::splitKreduce_kernel": 50.0,
            "input_reduce_fusion_6 | dot_general": 100.0,
            "gemm_fusion_dot_5": 6.0,
            "nvjet_sm90_hsh | attend/dot_general": 5.0,
            "loop_add | append/vmap(encode)/add": 4.0,
            "x": 2,
        }
    )
    want = {"kernel": 200.0, "products": 186.0, "rest": 2.0, "attend": 108.0, "append": 4.0}
    assert parts == want
    assert benchmark.by_part({"x": 2.0}) == {"products": 0.0, "rest": 2.0}
    assert benchmark.by_part({}) == {}
    x = jax.numpy.ones(3)
    assert benchmark.profile(lambda: x + 1, 1, "") == {}  # of a CPU


class Made:  # as jax.profiler.ProfileData is
    def __init__(self, name, **fields):
        self.name = name
        vars(self).update(fields)


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

    def event(name, op):
        return Made(name, duration_ns=4000.0, stats=[("hlo_op", op), ("other", 1)])

    line = Made("Stream #7", events=[event("nvjet", "slices.3"), event("copy", "unknown")])
    data = Made("", planes=[Made("/device:GPU:0", lines=[line, Made("Steps", events=[1])])])
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda _: data, raising=False)
    found = benchmark.profile(lambda: jax.numpy.ones(3), 2, hlo)
    assert found == {"nvjet | attend/dot_general": 2.0, "copy": 2.0}


def test_kernels_of_graphs_are_known_by_name(benchmark, monkeypatch):
    """As XLA names them; not guessed where equal instructions of two places share one."""
    hlo = """
%body (p: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %wrapped_add = f32[] fusion(%p), metadata={op_name="jit(f)/while/body/attend/add"}
  %loop_add_fusion.1 = f32[] fusion(%p), metadata={op_name="jit(f)/body/attend/add"}
  %loop_mul-fusion.4 = f32[] fusion(%p), metadata={op_name="jit(f)/attend/jit(g)/mul"}
  ROOT %loop_sub_fusion = f32[] fusion(%p), metadata={op_name="jit(f)/append/sub"}
}

ENTRY %main (a: f32[]) -> f32[] {
  %a = f32[] parameter(0), metadata={op_name="a"}
  %loop_add_fusion.2 = f32[] fusion(%a), metadata={op_name="attend/e" SAME="loop_add_fusion.1"}
  %loop_sub_fusion.9 = f32[] fusion(%a), metadata={op_name="jit(f)/mul" SAME="loop_sub_fusion"}
  ROOT %loop_unknown_fusion.3 = f32[] fusion(%a), metadata={SAME="wrapped_add"}
}
""".replace("SAME", "deduplicated_name")
    assert benchmark.kernels_of(hlo) == {
        "a": "a",
        "loop_add_fusion_1": "attend",
        "loop_add_fusion_2": "attend/e",
        "loop_mul_fusion_4": "attend/mul",
        "loop_sub_fusion_9": "mul",
    }

    names = ("loop_add_fusion_1", "loop_sub_fusion", "nvjet")
    events = [Made(name, duration_ns=1000.0, stats=[]) for name in names]
    data = Made("", planes=[Made("GPU", lines=[Made("Stream", events=events)])])
    monkeypatch.setattr(jax.profiler.ProfileData, "from_file", lambda _: data, raising=False)
    found = benchmark.profile(lambda: jax.numpy.ones(3), 1, hlo)
    assert found == {"loop_add_fusion_1 | attend": 1.0, "loop_sub_fusion": 1.0, "nvjet": 1.0}
    assert benchmark.by_part(found) == {"products": 1.0, "rest": 1.0, "attend": 1.0}


def test_scopes_of_a_decode_loop(benchmark):
    """The operations of attention and of the cache's growth are known by the library's scopes."""
    loop = benchmark.coded_loop(toy(benchmark), 1.0, 2, 256, "bf16")
    scopes = set(benchmark.scopes_of(loop.step.as_text()).values())
    assert any(s.startswith("attend/") and s.endswith("dot_general") for s in scopes)
    assert any(s.startswith("append/") and "encode" in s for s in scopes)
    assert "dot_general" in scopes  # with weights


class Tensor(np.ndarray):
    """So much of a tensor as the benchmark uses."""

    def transpose(self, *axes):
        return np.swapaxes(self, *axes)

    def to(self, dtype):
        del dtype
        return self

    def float(self):
        return self

    cpu = float

    def numpy(self):
        return np.asarray(self)


def product_attention(query, key, value, enable_gqa):
    """torch's SDPA in numpy: ``[B,H,T,d]``."""
    assert enable_gqa
    group = query.shape[1] // key.shape[1]
    k, v = (np.repeat(np.asarray(x), group, axis=1) for x in (key, value))
    scores = np.asarray(query) @ np.swapaxes(k, 2, 3) / np.sqrt(query.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return (weights / weights.sum(-1, keepdims=True) @ v).view(Tensor)


def test_fp8_by_jax(benchmark, monkeypatch):
    """Its program is lowered without a GPU; the output's scale is one that fp8 can hold."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91900)
    query, key = (
        jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn)
        for shape in ((8, 1, 32, 128), (8, 4096, 8, 128))
    )
    traced = jax.jit(benchmark.fp8_attention).trace(query, key, key)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert "@__cudnn$fmhaSoftmaxF8" in text
    assert "1.024000e+03" in text

    keys, values = benchmark.fp8_layer(jax.random.key(0), toy(benchmark), 2, 4096)
    assert keys.dtype == values.dtype == jnp.float8_e4m3fn
    query = jax.random.normal(jax.random.key(1), (2, 1, 4, 64))
    exact = benchmark.exact_attention(query, *(x.astype(jnp.float32) for x in (keys, values)))
    scaled = exact * benchmark.output_scale(4096)
    got = scaled.astype(jnp.float8_e4m3fn).astype(jnp.float32)
    assert 0 < benchmark.checked(np.asarray(got), np.asarray(scaled))["relative_error"] < 0.04
    with pytest.raises(benchmark.RivalError, match="wrong: its output is nan"):
        benchmark.checked(np.full(3, np.nan), np.ones(3))


@pytest.fixture
def torch(benchmark, monkeypatch):
    """So much of torch that its attentions can be told from each other."""
    torch = types.ModuleType("torch")
    rng = np.random.default_rng(0)

    def randn(*shape, dtype, device):
        return rng.normal(size=shape).view(Tensor)

    def on_device(make):
        return lambda *a, device, **given: make(*a, **given)

    torch.int32, torch.uint8 = np.int32, np.uint8
    torch.bfloat16, torch.float8_e4m3fn = "bf16", "fp8"
    torch.randn = randn
    torch.arange, torch.full, torch.zeros = map(on_device, (np.arange, np.full, np.zeros))
    functional = types.SimpleNamespace(scaled_dot_product_attention=product_attention)
    torch.nn = types.SimpleNamespace(functional=functional)
    torch.cuda = types.SimpleNamespace(
        is_available=lambda: True,
        synchronize=lambda: None,
        empty_cache=lambda: None,
        OutOfMemoryError=MemoryError,
    )
    monkeypatch.setattr(benchmark, "on_gpu", lambda: True)
    monkeypatch.setitem(sys.modules, "torch", torch)
    for name in ("flash_attn_interface", "vllm", "flashinfer", "flashinfer.decode"):
        monkeypatch.setitem(sys.modules, name, None)
    return torch


def test_attentions_by_torch(benchmark, monkeypatch, torch, capsys):
    """Each has its rows, whether it is there or not."""
    names = ["torch SDPA", "FlashAttention-3", "FlashInfer", "FlashInfer XQA"]
    assert list(benchmark.torch_attentions()) == [f"bf16, {name}" for name in names]
    found = benchmark.torch_attentions(fp8=True)
    assert [name for name in found if "fp8" in name] == [f"fp8, {name}" for name in names[1:]]
    for name, rival in found.items():
        assert rival.bits == (8 if "fp8" in name else 16)
        assert rival.query8 == (name == "fp8, FlashAttention-3")
    config = toy(benchmark, part="attention", bits=(), peers=())
    planned = [m.row["what"] for m in benchmark.planned(config)]
    assert planned == [
        *("bf16, jax (cuDNN)", *(name for name in found if "bf16" in name)),
        *("fp8, jax (cuDNN)", *(name for name in found if "fp8" in name)),
    ]
    config = benchmark.dataclasses.replace(config, without=(planned[0], planned[-1]))
    assert [m.row["what"] for m in benchmark.planned(config)] == planned[1:-1]
    flash = types.ModuleType("flash_attn_interface")
    flash.flash_attn_with_kvcache = lambda query, key, value: (query, key, value)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash)
    assert benchmark.loaded(found["fp8, FlashAttention-3"])(1, 2, 3) == (1, 2, 3)
    torch.cuda.is_available = lambda: False
    assert benchmark.torch_attentions() == {}
    monkeypatch.setitem(sys.modules, "torch", None)
    assert benchmark.torch_attentions() == {}
    assert capsys.readouterr().out.count("torch's attentions are left out: ") == 2
    monkeypatch.setattr(benchmark, "on_gpu", lambda: False)
    assert benchmark.torch_attentions() == {}


def test_a_rival_that_is_missing_or_wrong_is_a_row(benchmark, torch, capsys):
    """Its row says why, in one line; nothing is timed."""
    config = toy(benchmark, part="attention")

    def compile_fails():
        raise RuntimeError("nvcc: for a test\nand more")

    rivals = {
        "bf16, missing": benchmark.Rival(benchmark.flashinfer_xqa, paged=True),
        "bf16, broken": benchmark.Rival(compile_fails),
        "bf16, wrong": benchmark.Rival(lambda: lambda query, key, value: 2 * query),
    }
    outcomes = {
        name: benchmark._outcome(lambda r=rival: benchmark.measure_torch(r, config, 2, 128))
        for name, rival in rivals.items()
    }
    assert outcomes["bf16, missing"] == {"error": "not installed: no module 'flashinfer.decode'"}
    assert outcomes["bf16, broken"] == {"error": "does not load: RuntimeError: nvcc: for a test"}
    (wrong,) = outcomes["bf16, wrong"].values()
    assert wrong.startswith("wrong: its output is ")
    assert "Traceback" not in capsys.readouterr().err


def pages_of(key, numbers):
    """Pages of one sequence as ``[1,H,T,d]``."""
    chosen = np.asarray(key)[numbers]
    return np.swapaxes(chosen, 0, 1).reshape(1, chosen.shape[1], -1, chosen.shape[3])


def test_flash_infer(benchmark, monkeypatch, torch):
    """Both its kernels read the pages of the right sequence; a plan is made once for all layers."""
    flashinfer, decoder = types.ModuleType("flashinfer"), types.ModuleType("flashinfer.decode")
    plans = []

    def by_pages(query, cache, numbers):
        sequences = [
            product_attention(q[None, :, None], *(pages_of(x, n) for x in cache), enable_gqa=True)
            for q, n in zip(np.asarray(query), numbers, strict=True)
        ]
        return np.concatenate(sequences)[:, :, 0].view(Tensor)

    class Wrapper:
        def __init__(self, work, layout, use_tensor_cores, backend):
            assert (layout, use_tensor_cores, backend) == ("HND", True, "fa2")

        def plan(self, starts, indices, last, *sizes, q_data_type, kv_data_type):
            assert sizes == (4, 2, 64, 64)
            assert (q_data_type, kv_data_type) == ("bf16", "float64")
            np.testing.assert_array_equal(last, [64, 64])
            self.numbers = [indices[a:b] for a, b in itertools.pairwise(starts)]
            plans.append(self.numbers)

        def run(self, query, cache):
            return by_pages(query, cache, self.numbers)

    def xqa(query, cache, work, table, lengths, longest, bmm1_scale, kv_layout):
        assert (longest, bmm1_scale, kv_layout) == (192, 1 / 8, "HND")
        np.testing.assert_array_equal(lengths, [192, 192])
        return by_pages(query, cache, table)

    flashinfer.BatchDecodeWithPagedKVCacheWrapper = Wrapper
    decoder.xqa_batch_decode_with_kv_cache = xqa
    monkeypatch.setitem(sys.modules, "flashinfer", flashinfer)
    monkeypatch.setitem(sys.modules, "flashinfer.decode", decoder)
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 1, 4, 64)).view(Tensor)
    key, value = rng.normal(size=(2, 6, 2, 64, 64)).view(Tensor)
    want = benchmark.sdpa(query, *(benchmark.in_rows(x, 2) for x in (key, value)))
    assert want.shape == query.shape
    for name in ("bf16, FlashInfer", "bf16, FlashInfer XQA"):
        attend = benchmark.loaded(benchmark.rivals(fp8=True)[name])
        for _ in range(2):
            np.testing.assert_allclose(attend(query, key, value), want, rtol=1e-6)
    assert len(plans) == 1


@pytest.mark.parametrize("slow", [0.0, 0.02], ids=["slow graph", "fast graph"])
@pytest.mark.parametrize("captures", [True, False])
def test_torch_is_timed_with_and_without_a_graph(benchmark, torch, slow, captures, capsys):
    """The faster counts; what cannot be captured is called from Python."""

    class Graph:
        def replay(self):
            time.sleep(0.02 - slow)

    @contextlib.contextmanager
    def capture(graph, capture_error_mode):
        yield
        if not captures:
            raise RuntimeError("for a test")

    def attend(query, key, value):
        assert query.shape == (2, 1, 4, 64)
        assert key.shape == value.shape == (2, 30, 2, 64)
        time.sleep(slow / 2)
        return benchmark.sdpa(query, key, value)

    vars(torch.cuda).update({"CUDAGraph": Graph, "graph": capture})
    rival = benchmark.Rival(lambda: attend)
    took = benchmark.measure_torch(rival, toy(benchmark, at_least=1e-6), 2, 30)
    assert took["relative_error"] == 0
    assert (took["microseconds"] > 5000) == (slow > 0 and not captures)  # two layers a round
    assert ("for a test" in capsys.readouterr().err) == (not captures)


def row(what, batch, context, microseconds, **more):
    given = {"part": "attention", "what": what, "batch": batch, "context": context}
    return given | {"bits": 16.0, "microseconds": microseconds} | more


def test_the_table_of_bars(benchmark):
    """Codes beside the best bf16 and the best fp8 of the same shape."""
    rows = benchmark.compared(
        [
            row("bf16, jax (cuDNN)", 8, 131072, 940.0),
            row("bf16, FlashInfer", 8, 131072, 920.0),
            row("fp8, FlashInfer XQA", 8, 131072, 460.0),
            row("fp8, FlashAttention-3", 8, 131072, 500.0) | {"error": "wrong"},
            row("1 bit", 8, 131072, 100.0, kernel=92.0),
            row("1 bit, 2 heads together", 8, 131072, 0.0) | {"error": "too large"},
            row("bf16, torch SDPA", 1, 4096, 12.0),
            row("1 bit", 1, 4096, 6.0),
        ]
    )
    assert rows[4]["times"] == pytest.approx(9.2)
    assert rows[4]["times_kernel"] == pytest.approx(10)
    assert rows[4]["times_fp8"] == pytest.approx(4.6)
    table = benchmark.bars(rows)
    assert table[2:6] == [
        "| batch × context | best bf16 | best fp8 | 1 bit | 1 bit, 2 heads together |",
        "| --- | --- | --- | --- | --- |",
        "| 8 × 131,072 | 920.0 (FlashInfer) | 460.0 (FlashInfer XQA) | 100.0: 9.2 ×, 4.6 × "
        "| too large |",
        "| 1 × 4,096 | 12.0 (torch SDPA) | – | 6.0: 2.0 ×, – | – |",
    ]
    assert benchmark.bars(rows[:4]) == []


def test_floors_are_the_vendors(benchmark, monkeypatch):
    """Also in a file whose floors are of a copy that was measured."""
    device = types.SimpleNamespace(device_kind="NVIDIA H200")
    monkeypatch.setattr(benchmark.jax, "devices", lambda: [device])
    assert benchmark.bandwidth(3) == (4.8e12, "the vendor's data sheet")
    old = row("bf16, torch SDPA", 8, 131072, 924.0, floor_microseconds=1153.0)
    data = {"device": "NVIDIA H200", "config": {"model": "llama-3-8b"}, "rows": [old]}
    (new,), said = benchmark.floored(data)
    assert new["floor_microseconds"] == pytest.approx(894.8, abs=0.1)
    assert "4.8 TB/s (the vendor's data sheet)" in said
    (same,), said = benchmark.floored(data | {"device": "other"})
    assert same == old
    assert "TB/s" not in said


@pytest.mark.filterwarnings("ignore:the fused GPU kernel")
@pytest.mark.parametrize("exact", [0, 32])
def test_planes(benchmark, monkeypatch, exact):
    """Rows of planes, of one head and of two together, with and without an exact part."""

    def attend_planes(query, mean, inv_freq, keys, values, words, value_words, blocks, **given):
        batch, _, heads, _, dim = query.shape
        stages = keys.shape[-1]
        assert keys.shape == values.shape == (batch, heads * 64 // stages, 2, 4, stages)
        assert words.shape == value_words.shape == (heads, 1, stages, 2, dim)
        assert (keys.dtype, given["first"], given["every"], given["fills"]) == ("uint32", 4, 16, 1)
        if exact:
            assert given["recent"].window_key.shape == (batch, heads, exact, dim)
            assert given["recent"].key.shape == (batch, 1, heads, dim)
        else:
            assert given["recent"] is None
        return jnp.zeros_like(query), jnp.zeros(query.shape[:-1])

    if not hasattr(benchmark.decode, "attend_planes"):
        monkeypatch.setattr(benchmark.decode, "attend_planes", attend_planes, raising=False)
    given = {"part": "attention", "layout": "planes", "bits": (0.5, 1.0), "exact": exact}
    config = toy(benchmark, peers=(), **given)
    if not exact:
        assert benchmark.coded_rates(config) == [(1.0, 1), (1.0, 2), (0.5, 1)]
    config = benchmark.dataclasses.replace(config, bits=(1.0,))
    rows = list(benchmark.run(config))
    assert [r["what"] for r in rows] == ["bf16, jax (XLA)", "1 bit", "1 bit, 2 heads together"]
    assert all(r["microseconds"] > 0 for r in rows)


@pytest.mark.filterwarnings("ignore:the fused GPU kernel")
def test_tiles_with_an_exact_part(benchmark):
    config = toy(benchmark, part="attention", peers=(), exact=32)
    assert benchmark.coded_rates(config) == [(1.0, 1)]
    _, coded = benchmark.run(config)
    assert coded["microseconds"] > 0


def test_flash_attention_of_vllm(benchmark, monkeypatch, torch, tmp_path):
    """A folder of its files is enough, and its plan is made once for all layers."""
    folder = tmp_path / "vllm" / "vllm_flash_attn"
    folder.mkdir(parents=True)
    (folder / "flash_attn_interface.py").write_text(
        "plans = 0\n"
        "def get_scheduler_metadata(batch, queries, tokens, heads, kv_heads, dim, used, qkv_dtype,"
        " cu_seqlens_q):\n"
        "    assert qkv_dtype == 'float64'\n"
        "    global plans\n"
        "    plans += 1\n"
        "    return batch, queries, tokens, heads, kv_heads, dim\n"
        "def flash_attn_varlen_func(q, k, v, **given):\n"
        "    assert given.pop('fa_version') == 3\n"
        "    flash_attn_varlen_func.given = given\n"
        "    return q\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "vllm")
    extension = folder / "_vllm_fa3_C.py"
    extension.write_text("raise ImportError('undefined symbol: for a test')")
    rival = benchmark.torch_attentions()["bf16, FlashAttention-3"]
    with pytest.raises(benchmark.RivalError, match=r"does not load: ImportError: .*for a test"):
        benchmark.loaded(rival)
    extension.write_text("")
    attend = benchmark.loaded(rival)
    query, key = np.ones((3, 1, 8, 4)), np.ones((3, 50, 2, 4))
    for _ in range(2):
        assert attend(query, key, key).shape == query.shape
    flash = sys.modules["vllm.vllm_flash_attn.flash_attn_interface"]
    given = flash.flash_attn_varlen_func.given
    assert flash.plans == 1
    assert (given["max_seqlen_q"], given["max_seqlen_k"]) == (1, 50)
    assert given["scheduler_metadata"] == (3, 1, 50, 8, 2, 4)
    np.testing.assert_array_equal(given["cu_seqlens_q"], [0, 1, 2, 3])
    np.testing.assert_array_equal(given["seqused_k"], [50, 50, 50])
    for name in [name for name in sys.modules if name.startswith("vllm")]:
        monkeypatch.delitem(sys.modules, name)


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
