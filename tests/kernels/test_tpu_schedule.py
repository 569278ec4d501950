"""Reading the TPU compiler's schedule, and that the docs say what it said."""

import importlib.util
import json

import pytest
from scripts import ROOT, script

SCHEDULE = """\
= control target key start
LH: loop header
= control target key end

     0   :  { %7 = vsyncpa [#allocation3], 0 }
   0x1   :  { %8 = dma.hbm_to_vmem [thread:$0]  /*hbm=*/%s15_s11 /*
base_bounds: (64, 1, 1)
strides: (1, 1, 1) */ }
   0x2 LB: > { %s154_s1 = sshll.u32 %s294_s0, 3 } /* Start region 45 */
   0x3   : > {}
   0x4 LB: >> { %v53_v1 = vld [vmem:[%s52_s22] sm:$0xff] }
   0x5   : >> { %v54_v2 = vand.u32 15, %v53_v1 }
   0x6   : >> { %48 = sbr.rel (!%p46_p2) target = $region45 }
   0x7 PF: > { %v123_v3 = vld [vmem:[%s52_s22] sm:$0xff] }
   0x8   :  { %139 = vsyncpa [#allocation3], 1 }
"""


command = script("benchmarks", "tpu_schedule")


def test_bundles_by_loop(command):
    assert command.bundles(SCHEDULE) == {0: 3, 1: 3, 2: 3}


def test_times(command):
    """LLaMA-3-8B in bfloat16 on v5e: 4096 bytes, 5 ns, 7.5 cycles a token and layer."""
    found = command.times(command.CHIPS["v5e"], 0.5, 512)
    assert found["bytes"] == 4096
    assert found["cycles"] == 4
    assert found["hbm_cycles"] == pytest.approx(7.5, abs=0.01)
    assert found["hbm_nanoseconds"] == pytest.approx(5, abs=0.01)


def test_without_libtpu_it_says_so(command, monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        command.main(command.Config())
    assert stop.value.code == 2
    assert "libtpu" in capsys.readouterr().err


PROGRAM = """\
HloModule jit_encode

%body.1 (arg: (s32[], f32[8])) -> (s32[], f32[8]) {
  %fusion.1 = f32[8] fusion(%a), backend_config={"window_config":{"estimated_cycles":"100"}}
  %gather.1 = f32[8] fusion(%b), kind=kCustom
  ROOT %fusion.2 = f32[8] fusion(%c), backend_config={"window_config":{"estimated_cycles":"20"}}
}

%cond.2 (arg: (s32[], f32[8])) -> pred[] {
  ROOT %lt = pred[] compare(%i, %n), backend_config={"window_config":{"estimated_cycles":"7"}}
}

ENTRY %main.3 (x: f32[8]) -> f32[8] {
  %copy = f32[8] copy(%x), backend_config={"window_config":{"estimated_cycles":"3"}}
  ROOT %while.9 = (s32[], f32[8]) while(%copy), condition=%cond.2, body=%body.1, metadata={}
}
"""


def test_cycles_that_xla_estimates(command):
    assert command.estimated(PROGRAM, 32) == 3 + 32 * 120


def test_the_docs_have_the_results(command):
    rows = json.loads((ROOT / "results" / "tpu-schedule.json").read_text())["rows"]
    text = (ROOT / "docs" / "kernels-tpu.md").read_text()
    names = {"v5e": "v5e", "v5p": "v5p (two cores)", "v6e": "v6e"}

    def cells(rows):
        return " | ".join(f"{row['cycles']:.2f} / {row['hbm_cycles']:.2f}" for row in rows)

    for chip, name in names.items():
        decoding, encoding = (
            [row for row in rows if row["chip"] == chip and row["what"] == what]
            for what in (command.DECODING, command.ENCODING)
        )
        at = {(row["bits"], row["block"]): row for row in decoding if row["bits"] < 16}
        found = [row for row in decoding if row["bits"] == 16]
        found += [at[key] for key in ((1, 256), (1, 512), (0.5, 512))]
        assert f"| {name} | {cells(found)} |" in text
        if chip != "v5p":  # the aim: at 1 bit less than bfloat16's memory alone
            assert max(row["cycles"] for row in found[2:]) < found[0]["hbm_cycles"]
        assert f"| {name} | {cells(encoding)} |" in text
        for kernel, plain in zip(encoding[::2], encoding[1::2], strict=True):
            assert kernel["codewords"] == plain["codewords"]
            assert kernel["cycles"] < plain["cycles"]


def test_the_docs_have_the_results_of_planes(command):
    rows = json.loads((ROOT / "results" / "tpu-schedule-planes.json").read_text())["rows"]
    text = (ROOT / "docs" / "kernels-tpu.md").read_text()
    names = {"v5e": "v5e", "v5p": "v5p (two cores)", "v6e": "v6e"}
    for chip, name in names.items():
        for bits in (1, 0.5):
            of_both = [
                [row["cycles"] for row in rows if (row["chip"], row["bits"], row["block"]) == at]
                for at in ((chip, bits, 256), (chip, bits, 512))
            ]
            cells = " | ".join(f"{x:.2f}" for found in of_both for x in found)
            assert f"| {name}, {bits} bit | {cells} |" in text
            for words, *planes in of_both:  # the aim: fewer cycles than words of as many bits
                assert max(planes) < words
