"""LongBench's metrics: its own scores of made-up predictions, and each oddity by hand."""

import json
import math
import sys
from pathlib import Path

import pytest

from gsrq_jax.errors import InputError
from gsrq_jax.models import longbench, longbench_metrics
from gsrq_jax.models.longbench_metrics import METRICS, percent, percent_by_length, score

GOLDEN = Path(__file__).parent / "goldens" / "longbench_metrics.json"


def test_scores_of_longbench_itself():
    """Made by tools/compare_longbench_metrics.py --golden with LongBench's own code."""
    cases = json.loads(GOLDEN.read_text("utf-8"))
    assert {case[0] for case in cases} == {x for x, t in longbench.TASKS.items() if not t.extended}
    above = set()
    for name, prediction, answer, classes, wanted in cases:
        metric = longbench.TASKS[name].metric
        assert METRICS[metric](prediction, answer, classes) == wanted, (name, prediction, answer)
        above |= {metric} if wanted > 0 else set()
    assert above == set(METRICS)


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "wanted"),
    [
        ("qa_f1", "The cat, a CAT!", "cat", 2 / 3),
        ("qa_f1", "theme an", "them", 0.0),
        ("qa_f1", "", "", 0.0),
        ("qa_f1", "don’t", "dont", 0.0),  # no ASCII apostrophe
        ("qa_f1_zh", "《北京》", "北京", 2 * (1 / 2) * 1 / (3 / 2)),  # 《 is a word
        ("qa_f1_zh", "北京。", "北京", 1.0),
        ("count", "5, not 05 or 5", "5", 2 / 3),
        ("count", "five", "5", 0.0),
        ("retrieval", "Paragraph 3", "Paragraph 3", 1.0),
        ("retrieval", "3 4 4", "Paragraph 4", 2 / 3),
        ("retrieval_zh", "段落7 8", "段落7", 0.5),
        ("code_sim", "# a\n```\n// b\nx = 1\ny", "x = 1", 1.0),
        ("code_sim", "", "", 1.0),
        ("code_sim", "# only a comment", "x", 0.0),
        ("code_sim", "ab", "abc", 0.8),
        ("rouge", "", "a", 0.0),
        ("rouge", "...", "a", 0.0),
        ("rouge", " ", " ", 2 / (2 + 1e-8)),  # one empty word each
        ("rouge", "a a a b", "a b", 2 / (2 + 1e-8)),  # words count once
        ("rouge", "b a", "a b", 2 * (0.25 / (1 + 1e-8))),
        ("rouge_zh", "北京。", "北京。", 2 / (2 + 1e-8)),
    ],
)
def test_by_hand(metric, prediction, answer, wanted):
    assert METRICS[metric](prediction, answer, None) == pytest.approx(wanted, abs=0, rel=1e-15)


def test_classes_that_are_parts_of_the_answer():
    def found(prediction, answer, classes):
        return METRICS["classification"](prediction, answer, classes)

    assert found("Group of people", "Group of people", ["Group of people", "people"]) == 1
    # Removed from the list that is walked through, so that the next one is not looked at.
    assert found("abc", "abc", ["a", "b", "abc"]) == 1 / 2
    assert found("abc", "abc", ["a", "x", "b", "abc"]) == 1 / 2
    assert found("abc", "abc", ["a", "abc", "b"]) == 1
    assert found("Food or Date", "Food", ["Food", "Date"]) == 1 / 2
    assert found("Date", "Food", ["Food", "Date"]) == 0


def test_sentences_too_long_for_recursion():
    words = [f"w{i}" for i in range(991)]
    assert METRICS["rouge"](" ".join(words[:990]), " ".join(words[:990]), None) > 0.99
    assert METRICS["rouge"](" ".join(words), " ".join(words), None) == 0
    half = " ".join(words[:500]) + ". " + " ".join(words[500:])
    assert METRICS["rouge"](half, half, None) > 0.99
    # A comma is a word of its own, and in the path once more.
    assert METRICS["rouge_zh"]("甲，" * 494, "甲，" * 494, None) > 0.99
    assert METRICS["rouge_zh"]("甲，" * 495, "甲，" * 495, None) == 0


def test_best_answer_and_first_line():
    assert score("qa_f1", "a dog", ["cat", "dog", "big dog"]) == 1
    assert score("qa_f1", "\n\ndog\ncat", ["dog"], first_line=True) == 1
    assert score("qa_f1", "\n\ndog\ncat", ["dog"]) < 1
    first = {name for name, task in longbench.TASKS.items() if task.first_line}
    assert first == {"trec", "triviaqa", "samsum", "lsht", "trec_e", "triviaqa_e", "samsum_e"}


def test_rounding():
    assert percent([1, 0, 0]) == 33.33
    assert percent([0.00125, 0.0]) == 0.06  # 0.0625 %
    assert percent_by_length([1.0, 0.0, 0.5], [3999, 3998, 8000]) == pytest.approx(
        {"0-4k": 50.0, "4-8k": math.nan, "8k+": 50.0}, nan_ok=True
    )
    assert [longbench_metrics.bucket(n) for n in (0, 3999, 4000, 7999, 8000)] == [
        *("0-4k", "0-4k", "4-8k", "4-8k", "8k+")
    ]


def test_without_jieba(monkeypatch):
    monkeypatch.setitem(sys.modules, "jieba", None)
    longbench_metrics._jieba.cache_clear()
    try:
        for metric in METRICS.keys() - {"qa_f1_zh", "rouge_zh"}:
            longbench_metrics.require(metric)
        for metric in ("qa_f1_zh", "rouge_zh"):
            with pytest.raises(InputError, match=r"pip install 'gsrq-jax\[longbench\]'"):
                longbench_metrics.require(metric)
    finally:
        longbench_metrics._jieba.cache_clear()


def test_answers_without_a_paragraph():
    with pytest.raises(InputError, match="names no paragraph"):
        METRICS["retrieval"]("Paragraph 3", "third", None)
