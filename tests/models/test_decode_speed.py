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


@pytest.fixture
def torch(benchmark, monkeypatch):
    """So much of torch that its attentions can be told from each other."""
    torch = types.ModuleType("torch")
    torch.int32 = np.int32
    torch.arange, torch.full = (
        lambda *a, make=make, device, **given: make(*a, **given) for make in (np.arange, np.full)
    )
    torch.cuda = types.SimpleNamespace(is_available=lambda: True)
    monkeypatch.setattr(benchmark, "on_gpu", lambda: True)
    monkeypatch.setitem(sys.modules, "torch", torch)
    for name in ("flash_attn_interface", "vllm"):
        monkeypatch.setitem(sys.modules, name, None)
    return torch


def test_attention_by_torch(benchmark, monkeypatch, torch):
    """FlashAttention-3 is there if it is installed, and takes the arrays in its order."""
    assert list(benchmark.torch_attentions()) == ["torch SDPA"]
    flash = types.ModuleType("flash_attn_interface")
    flash.flash_attn_with_kvcache = lambda query, key, value: (query, key, value)
    monkeypatch.setitem(sys.modules, "flash_attn_interface", flash)
    found = benchmark.torch_attentions()
    assert found["FlashAttention-3"](1, 2, 3) == (1, 2, 3)
    monkeypatch.setattr(benchmark, "on_gpu", lambda: False)
    assert benchmark.torch_attentions() == {}


@pytest.mark.parametrize("slow", [0.0, 0.02], ids=["slow graph", "fast graph"])
@pytest.mark.parametrize("captures", [True, False])
def test_torch_is_timed_with_and_without_a_graph(benchmark, torch, slow, captures, capsys):
    """The faster counts; what cannot be captured is called from Python."""

    class Tensor(np.ndarray):
        def transpose(self, *axes):
            return np.swapaxes(self, *axes)

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

    def randn(*shape, dtype, device):
        return np.zeros(shape[0] if len(shape) == 1 else shape).view(Tensor)

    torch.bfloat16, torch.randn = None, randn
    names = {"OutOfMemoryError": MemoryError, "CUDAGraph": Graph, "graph": capture}
    for name in ("synchronize", "empty_cache"):
        names[name] = lambda: None
    vars(torch.cuda).update(names)
    took = benchmark.measure_torch(attend, toy(benchmark, at_least=1e-6), 2, 30)["microseconds"]
    assert (took > 5000) == (slow > 0 and not captures)  # two layers a round
    assert ("for a test" in capsys.readouterr().err) == (not captures)


def test_flash_attention_of_vllm(benchmark, monkeypatch, torch, tmp_path):
    """A folder of its files is enough, and its plan is made once for all layers."""
    folder = tmp_path / "vllm" / "vllm_flash_attn"
    folder.mkdir(parents=True)
    (folder / "flash_attn_interface.py").write_text(
        "plans = 0\n"
        "def get_scheduler_metadata(batch, queries, tokens, heads, kv_heads, dim, used,"
        " cu_seqlens_q):\n"
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
    with pytest.raises(ImportError, match="for a test"):  # when it is measured
        benchmark.torch_attentions()["FlashAttention-3"](1, 2, 3)
    extension.write_text("")
    attend = benchmark.torch_attentions()["FlashAttention-3"]
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
