"""LongBench's metrics, to the last digit of its own ``metrics.py`` and ``eval.py``.

Written anew from LongBench (THUDM/LongBench, MIT): its oddities are part of the measure and are
kept, each named where it is. `tools/compare_longbench_metrics.py` runs both side by side. Chinese
text is cut into words by `jieba`, as there; it comes with ``gsrq-jax[longbench]``. Of `rouge` 1.0.1
and fuzzywuzzy 0.18.0, which are no longer maintained, what LongBench uses is below.
"""

import collections
import difflib
import functools
import re
import string
from collections.abc import Callable, Sequence
from types import ModuleType

import numpy as np

from gsrq_jax.errors import InputError

Metric = Callable[[str, str, Sequence[str] | None], float]
"""``(prediction, answer, all_classes) -> score`` from 0 to 1."""


def score(
    metric: str,
    prediction: str,
    answers: Sequence[str],
    all_classes: Sequence[str] | None = None,
    *,
    first_line: bool = False,
) -> float:
    """The best score of a prediction against any of its answers, from 0 to 1.

    Args:
        metric: a name in `METRICS`.
        prediction: what the model wrote.
        answers: each of which is right.
        all_classes: of a classification.
        first_line: only the prediction's first line counts, newlines before it aside.

    Raises:
        InputError: if the metric cuts Chinese words and `jieba` is not there.
    """
    if first_line:
        prediction = prediction.lstrip("\n").split("\n")[0]
    return max((METRICS[metric](prediction, x, all_classes) for x in answers), default=0.0)


def percent(scores: Sequence[float]) -> float:
    """The score of a task as LongBench gives it: percent, two decimals."""
    total = 0.0
    for x in scores:  # not sum(), which Python 3.12 rounds differently
        total += x
    return round(100 * total / len(scores), 2)


def percent_by_length(scores: Sequence[float], lengths: Sequence[int]) -> dict[str, float]:
    """The scores of a LongBench-E task by the rows' ``length`` in words; NaN where there are none.

    Rounded as numpy rounds, which is not always as Python does.
    """
    parts: dict[str, list[float]] = {name: [] for name in LENGTHS}
    for x, length in zip(scores, lengths, strict=True):
        parts[bucket(length)].append(x)
    return {
        name: float(np.round(100 * np.mean(part), 2)) if part else float("nan")
        for name, part in parts.items()
    }


LENGTHS = ("0-4k", "4-8k", "8k+")
"""LongBench-E's buckets of lengths."""


def bucket(length: int) -> str:
    """The one of `LENGTHS` that a row of so many words is in."""
    return LENGTHS[(length >= 4000) + (length >= 8000)]


# --- question answering ---------------------------------------------------------------------------


def qa_f1(prediction: str, answer: str, all_classes: object = None) -> float:
    """F1 of the words, without case, ASCII punctuation and articles."""
    return _f1(_words(prediction), _words(answer))


def qa_f1_zh(prediction: str, answer: str, all_classes: object = None) -> float:
    """F1 of `jieba`'s words, punctuation left out after the cut."""
    return _f1(_words_zh(prediction), _words_zh(answer))


def _words(text: str) -> list[str]:
    text = "".join(x for x in text.lower() if x not in _PUNCTUATION)
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def _words_zh(text: str) -> list[str]:
    bare = ("".join(x for x in word.lower() if x not in _PUNCTUATION_ZH) for word in _cut(text))
    return [word for word in ("".join(x.split()) for x in bare) if word]


def _f1(prediction: list[str], answer: list[str]) -> float:
    common = collections.Counter(prediction) & collections.Counter(answer)
    same = sum(common.values())
    if not same:
        return 0.0
    precision, recall = same / len(prediction), same / len(answer)
    return (2 * precision * recall) / (precision + recall)


_PUNCTUATION = frozenset(string.punctuation)
_PUNCTUATION_ZH = _PUNCTUATION | frozenset(
    "！？｡。＂＃＄％＆＇（）＊＋，－／：；＜＝＞＠［＼］＾＿｀｛｜｝～｟｠｢｣､、〃》「」『』【】〔〕〖〗〘〙〚〛〜〝〞"
    "〟〰〾〿–—‘’‛“”„‟…‧﹏"  # 《 is not among them
)


# --- summaries ------------------------------------------------------------------------------------


def rouge(prediction: str, answer: str, all_classes: object = None) -> float:
    """F of ROUGE-L over sentences, as `rouge` 1.0.1 computes it.

    Its oddities: sentences end at every full stop, a blank one is one empty word, and words count
    once, however often they occur. What makes it fail scores 0: a text without a sentence, and a
    pair of sentences that is too long for its recursion.
    """
    return _rouge(prediction, answer, _DEEPEST)


def rouge_zh(prediction: str, answer: str, all_classes: object = None) -> float:
    """`rouge` of `jieba`'s words. Chinese full stops end no sentence."""
    return _rouge(" ".join(_cut(prediction)), " ".join(_cut(answer)), _DEEPEST - 1)


_DEEPEST = 990
"""Steps through a table of subsequences after which `rouge` exceeds Python's 1,000 frames.

In LongBench's ``eval.py`` run by CPython 3.11; one frame fewer is left where it calls itself for
Chinese.
"""


def _rouge(prediction: str, answer: str, deepest: int) -> float:
    ours, theirs = _sentences(prediction), _sentences(answer)
    if not ours or not theirs:
        return 0.0
    shared: set[str] = set()
    for reference in theirs:
        for sentence in ours:
            words = _common(reference, sentence, deepest)
            if words is None:
                return 0.0
            shared |= words
    precision = len(shared) / len({word for sentence in ours for word in sentence})
    recall = len(shared) / len({word for sentence in theirs for word in sentence})
    return 2.0 * ((precision * recall) / (precision + recall + 1e-8))


def _sentences(text: str) -> list[list[str]]:
    return [sentence.split() or [""] for sentence in text.split(".") if sentence]


def _common(x: list[str], y: list[str], deepest: int) -> set[str] | None:
    """Words of a longest common subsequence; None if it is more than ``deepest`` steps to find."""
    rows = [[0] * (len(y) + 1)]
    for a in x:
        above, row = rows[-1], [0]
        for j, b in enumerate(y):
            row.append(above[j] + 1 if a == b else max(above[j + 1], row[j]))
        rows.append(row)
    i, j, steps, words = len(x), len(y), 0, set()
    while i and j:
        if x[i - 1] == y[j - 1]:
            words.add(x[i - 1])
            i, j = i - 1, j - 1
        elif rows[i - 1][j] > rows[i][j - 1]:
            i -= 1
        else:
            j -= 1
        steps += 1
    return None if steps > deepest else words


# --- classes, numbers, code -----------------------------------------------------------------------


def classification(prediction: str, answer: str, all_classes: Sequence[str] | None) -> float:
    """1 over the classes that the prediction names, if the answer is among them.

    Classes that are a part of the answer's name do not count, but of such ones named next to each
    other every second one does: LongBench removes them from the list that it walks through.
    """
    named = [name for name in all_classes or () if name in prediction]
    for name in named:
        if name in answer and name != answer:
            named.remove(name)
    return 1.0 / len(named) if answer in named else 0.0


def count(prediction: str, answer: str, all_classes: object = None) -> float:
    """Share of the numbers in the prediction that are the answer, as they are written."""
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(str(answer)) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str, all_classes: object = None) -> float:
    """`count` of the number in an answer such as ``Paragraph 3``."""
    return count(prediction, _number(r"Paragraph (\d+)", answer))


def retrieval_zh(prediction: str, answer: str, all_classes: object = None) -> float:
    """`count` of the number in an answer such as ``段落3``."""
    return count(prediction, _number(r"段落(\d+)", answer))


def _number(pattern: str, answer: str) -> str:
    found = re.search(pattern, answer)
    if not found:
        raise InputError(
            f"the answer {answer!r} names no paragraph ({pattern}); take LongBench's own rows"
        )
    return found[1]


def code_sim(prediction: str, answer: str, all_classes: object = None) -> float:
    """Similarity to the prediction's first line without a backtick or the sign of a comment.

    fuzzywuzzy 0.18.0's ``ratio`` as LongBench's requirements install it, without
    python-Levenshtein: of `difflib`, in whole percents; 1 for two empty texts.
    """
    lines = prediction.lstrip("\n").split("\n")
    line = next((x for x in lines if not any(sign in x for sign in ("`", "#", "//"))), "")
    return round(100 * difflib.SequenceMatcher(None, line, answer).ratio()) / 100


# --- names ----------------------------------------------------------------------------------------

METRICS: dict[str, Metric] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge": rouge,
    "rouge_zh": rouge_zh,
    "classification": classification,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": count,
    "code_sim": code_sim,
}


def require(metric: str) -> None:
    """Refuse a metric whose library is not there, before anything is run for it.

    Raises:
        InputError: naming what to install.
    """
    if metric.endswith("f1_zh") or metric == "rouge_zh":
        _jieba()


def _cut(text: str) -> list[str]:
    return list(_jieba().cut(text, cut_all=False))


@functools.cache
def _jieba() -> ModuleType:
    try:
        import jieba
    except ImportError as error:
        raise InputError(
            "the Chinese metrics need jieba; pip install 'gsrq-jax[longbench]'"
        ) from error
    jieba.setLogLevel("WARNING")
    return jieba
