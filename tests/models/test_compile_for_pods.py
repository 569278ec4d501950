"""What the command reads from compiled programs, and, where libtpu is, that it compiles."""

import dataclasses
import importlib.util
import json
import os
import subprocess
import sys

import pytest
from scripts import ROOT, script

from gsrq_jax.errors import InputError

BENCHMARKS = ROOT / "benchmarks"
HLO = """
  %a = f32[4,256]{1,0:T(8,128)} all-reduce(%x), channel_id=1
  %b = f32[4,256]{1,0} all-reduce(%y), channel_id=2
  %c = (bf16[2,8]{1,0}, bf16[16,8]{1,0}) all-gather-start(%z), dimensions={0}
  %d = bf16[16,8]{1,0} all-gather-done(%c)
  %e = (f32[], pred[7]{0}) all-reduce(%u, %v), to_apply=%sum
  %f = f32[4] fusion(%all-reduce.1), calls=%g
"""


command = script("benchmarks", "compile_for_pods")


def test_collectives_of_a_program(command):
    assert [dataclasses.astuple(x) for x in command.collectives(HLO)] == [
        ("all-reduce", "f32[4,256]", 2, 4096),
        ("all-gather", "bf16[16,8]", 1, 256),
        ("all-reduce", "f32[] pred[7]", 1, 11),
    ]


def test_what_should_not_be_gathered(command):
    row = {"collectives": [dataclasses.asdict(x) for x in command.collectives(HLO)]}
    assert command.gathered(row, lambda shape, nbytes: nbytes > 256) == {}
    assert command.gathered(row, lambda shape, nbytes: shape == "bf16[16,8]") == {
        "problem": "unexpected all-gather of bf16[16,8], 256 bytes"
    }


def test_codes_are_not_gathered_as_sums_either(command):
    for shape, wrong in (
        ("u8[4,256]", True),
        ("f32[4] s32[64]", True),
        ("f32[4,256] s32[8]", False),
    ):
        hlo = f"  %a = ({shape.replace(' ', ', ')}) all-reduce(%x), channel_id=1"
        row = {"collectives": [dataclasses.asdict(x) for x in command.collectives(hlo)]}
        assert bool(command.gathered(row, lambda *_: True)) == wrong


@pytest.mark.parametrize("case", ["v9:2x2=llama-3-8b", "v5e:2x2=llama-9", "v5e:2x2"])
def test_cases_that_there_are_not(command, case):
    with pytest.raises(InputError, match=f"cannot compile {case}; give a topology of v5e, v5p"):
        command.compiled(case, command.Config(), {})


def test_steps_that_there_are_not(command):
    with pytest.raises(InputError, match="there are the steps capture, fit, prefill, decode, got"):
        command.compiled("v5e:2x2=llama-3-8b", command.Config(steps=("decode", "dance")), {})


@pytest.mark.parametrize("name", ["compiled-for-pods", "compiled-for-pods-fused"])
def test_the_docs_have_the_results(command, name):
    found = json.loads((BENCHMARKS.parent / "results" / f"{name}.json").read_text())
    text = (BENCHMARKS.parent / "docs" / "pods.md").read_text()
    rows = {(r["topology"], r["model"], r["step"], r["tokens"]): r for r in found["rows"]}
    assert not any("problem" in row for row in rows.values())
    assert {case[:2] for case in rows} == {tuple(c.split("=")) for c in command.Config().cases}
    for row in rows.values():
        assert command.table_row(row) in text.splitlines()


def test_compiled_by_the_tpus_compiler(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu, the TPU's compiler, is not installed")
    options = ("--cases", "v5e:2x2=llama-3-8b", "--bits", "0.125", "--sequences", "16")
    options += ("--contexts", "8192", "--layout", "words")
    subprocess.run(
        [sys.executable, BENCHMARKS / "compile_for_pods.py", *options, "--out", tmp_path],
        env=os.environ | {"JAX_PLATFORMS": "cpu"},
        check=True,
    )
    file = tmp_path / "results" / "compiled-for-pods-fused.json"
    rows = json.loads(file.read_text())["rows"]
    assert [row["step"] for row in rows] == ["capture", "fit", "prefill", "decode"]
    assert all(0 < row["hbm_gib"] < row["memory_gib"] for row in rows)
