"""The search for layouts of the decode kernel, over a kernel and times that are made up here."""

import dataclasses
import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scripts import script

from gsrq_jax.kernels import devices, mosaic_gpu
from gsrq_jax.kernels.mosaic_gpu import Tuning

tune = script("benchmarks", "tune_decode")
TRUE = Tuning(8, 3, 1, table_time=0.7, start_time=3.0)


def fake_kernel(problem, layout, skew=0.0):
    """Gives the same probability by code whatever the layout, in as many parts as it has."""

    def run(keys, values, blocks, *inputs):
        parts = layout.splits * layout.teams(problem.value_stages)
        shape = (problem.pairs, parts, 4, problem.value_stages, 16)
        codes = 1 + jnp.arange(16) + skew * layout.splits * jnp.arange(16) ** 2
        counts = jnp.broadcast_to(codes.astype(jnp.float32) * (1 + blocks[0]), shape) / parts
        return counts, jnp.zeros(shape[:3], jnp.int32)

    return run


def time_of(problem, layout):
    """Microseconds by a model that the estimates do not know."""
    base = TRUE.time(mosaic_gpu.work(problem, layout)) * 1.5
    kind = layout.scorers, layout.depth, layout.buffers
    return base * {(8, 3, 1): 0.8, (8, 2, 1): 1.0}.get(kind, 1.1)


@pytest.fixture
def on_fake_gpu(tune, monkeypatch, tmp_path):
    """Call with a kernel: what is measured on is that and `time_of`, what is kept a file here."""

    def put(kernel=fake_kernel):
        monkeypatch.setattr(devices, "check_hopper", lambda: None)
        monkeypatch.setattr(mosaic_gpu, "fused_kernel", kernel)
        monkeypatch.setattr(tune, "_CACHE", 1)
        monkeypatch.setattr(tune.decode_speed, "MODELS", {"llama-3-8b": tune.decode_speed.TOY})

        def measure(self, program, layout, config):
            took = {"microseconds": time_of(self.problem, layout), "spread": 0.0}
            return self.sizes | dataclasses.asdict(layout) | took

        monkeypatch.setattr(tune.Call, "measure", measure)
        kept = tmp_path / "tuned.json"
        kept.write_text("{}")
        monkeypatch.setattr(mosaic_gpu, "TUNED", kept)
        return kept

    return put


def config(tune, tmp_path):
    shapes = ("2x16384", "64x4096")
    return tune.Config(bits=(1.0,), shapes=shapes, jobs=2, at_least=0, save=True, out=tmp_path)


def test_finds_the_layout_and_the_times_that_are_so(tune, on_fake_gpu, tmp_path):
    kept = on_fake_gpu()
    tune.main(config(tune, tmp_path))
    (found,) = json.loads(kept.read_text()).values()
    (rate,) = found["rates"]
    assert [rate[name] for name in ("scorers", "depth", "buffers")] == [8, 3, 1]
    assert rate["table_time"] == pytest.approx(TRUE.table_time, abs=1e-3)
    assert rate["start_time"] == pytest.approx(TRUE.start_time, abs=1e-3)
    assert rate["times_as_fast_as_estimated"] > 1.2
    assert rate["times_as_long_as_the_quickest"] == pytest.approx(1, abs=0.02)

    (file,) = (tmp_path / "results" / "decode-speed").glob("layouts-*.json")
    rows = json.loads(file.read_text())["rows"]
    names = [f.name for f in dataclasses.fields(mosaic_gpu.Config)]
    tried = [(r["batch"], *(r[name] for name in names)) for r in rows]
    assert len(set(tried)) == len(tried) > 20
    assert {row["why"] for row in rows} >= {"estimate", "split", "layout"}


def test_layouts_that_cannot_be_taken_are_said_and_not_kept(tune, on_fake_gpu, tmp_path):
    """One that gives something else, though it is the quickest, and one that does not compile."""

    def kernel(problem, layout):
        kind = layout.scorers, layout.depth, layout.buffers
        if kind == (8, 4, 1):
            raise ValueError("too many registers")
        return fake_kernel(problem, layout, skew=0.01 * (kind == (8, 3, 1)))

    kept = on_fake_gpu(kernel)
    with pytest.raises(SystemExit, match="4 layouts could not be taken"):
        tune.main(config(tune, tmp_path))
    ((rate,),) = (made["rates"] for made in json.loads(kept.read_text()).values())
    assert [rate[name] for name in ("scorers", "depth", "buffers")] == [8, 2, 1]
    (file,) = (tmp_path / "results" / "decode-speed").glob("layouts-*.json")
    errors = {
        (r["depth"], r["error"]) for r in json.loads(file.read_text())["rows"] if "error" in r
    }
    assert (4, "ValueError: too many registers") in errors
    assert any(depth == 3 and "off the first" in error for depth, error in errors)


def test_the_fit_leaves_out_what_would_be_below_zero(tune):
    work = [(8, 8, 1), (16, 8, 2), (4, 2, 4), (64, 32, 3)]
    assert tune.fitted(work, [2.0 * c + 5 * s for c, _, s in work]) == pytest.approx((0, 2.5))
    table, start = tune.fitted(work, [2.0 * c - 0.1 * t + 5 * s for c, t, s in work])
    assert table == 0 < start < math.inf


def test_splittings_differ_in_their_work(tune, on_fake_gpu):
    on_fake_gpu()
    call = tune.Call.of(1.0, 1, 16384)
    layouts = tune.some_splittings(call.problem, (8, 2, 1), 3)
    for span in {x.span for x in layouts}:
        works = [mosaic_gpu.work(call.problem, x) for x in layouts if x.span == span]
        assert 1 <= len(works) <= 3
        assert len(set(works)) == len(works)


def test_what_is_compared_is_of_all_parts(tune, on_fake_gpu):
    on_fake_gpu()
    call = tune.Call.of(1.0, 2, 2048)
    shares, masses = call.found(call.compiled(mosaic_gpu.Config(8, 2, 3, 1), 0))
    expected = np.broadcast_to((1 + np.arange(16)) / 136, shares.shape)
    np.testing.assert_allclose(shares, expected, rtol=1e-6)
    valid = int(call.beside[0][0])
    np.testing.assert_allclose(masses, np.log2(136 * (1 + valid)), rtol=1e-6)


def test_a_program_runs_every_layer_in_every_round(tune, on_fake_gpu):
    ran = []

    def kernel(problem, layout):
        def run(keys, *rest):
            made = fake_kernel(problem, layout)(keys, *rest)
            first = keys.reshape(-1)[0]
            shape = jax.ShapeDtypeStruct(first.shape, first.dtype)
            seen = jax.pure_callback(lambda x: ran.append(int(x)) or x, shape, first)
            return made[0] + 0 * seen.astype(jnp.float32), made[1]

        return run

    on_fake_gpu(kernel)
    call = tune.Call.of(1.0, 2, 2048)
    program = call.compiled(mosaic_gpu.Config(8, 2, 3, 1), seconds := 4e-5)
    jax.block_until_ready(program(call.codes, call.beside))
    firsts = [int(keys.reshape(-1)[0]) for keys, _ in call.codes]
    assert len(set(firsts)) == len(firsts) > 1
    assert call.rounds(seconds) > 1
    assert sorted(ran) == sorted(firsts * call.rounds(seconds))
