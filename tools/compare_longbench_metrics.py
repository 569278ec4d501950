"""Our metrics beside LongBench's own on the same predictions: every float must be the same.

    python tools/compare_longbench_metrics.py CHECKOUT --python ENV/bin/python --rows FOLDER

CHECKOUT is the folder of LongBench that holds its ``metrics.py`` and ``eval.py``; ENV has its
requirements for them (``rouge``, ``jieba``, ``fuzzywuzzy``, ``numpy``). FOLDER holds rows of
LongBench (``<task>.jsonl``), whose answers are added to made-up ones; it may be left out. With
``--golden FILE`` LongBench's scores of short made-up predictions are kept for the tests.
"""

import argparse
import collections
import json
import pathlib
import random
import subprocess
import sys
import tempfile

from gsrq_jax import results
from gsrq_jax.models import longbench, longbench_metrics

# Runs in LongBench's environment, calling its functions as deep as its eval.py does.
DRIVER = """
import importlib.metadata, json, sys, warnings
warnings.filterwarnings("ignore")
sys.path.insert(0, sys.argv[1])
import eval as theirs, jieba
jieba.setLogLevel(60)
cases = json.load(open(sys.argv[2]))

def one(task, prediction, answer, classes):
    return theirs.dataset2metric[task](prediction, answer, all_classes=classes)

singles, wholes = [], []
for case in cases:
    task, classes = case["task"], case["all_classes"]
    for prediction, answers in zip(case["predictions"], case["answers"]):
        for answer in answers:
            singles.append(float(one(task, prediction, answer, classes)))
    three = (task, case["predictions"], case["answers"])
    wholes.append([
        float(theirs.scorer(*three, classes)),
        {k: float(v) for k, v in theirs.scorer_e(*three, case["lengths"], classes).items()},
    ])
names = ("rouge", "jieba", "fuzzywuzzy", "python-Levenshtein", "Levenshtein", "rapidfuzz", "numpy")
installed = {x.metadata["Name"].lower(): x.version for x in importlib.metadata.distributions()}
packages = [f"{x} {installed.get(x.lower(), 'absent')}" for x in names]
json.dump([sys.version.split()[0], packages, singles, wholes], open(sys.argv[3], "w"))
"""

ENGLISH = (
    "The quick brown fox jumps over the lazy dog. A paragraph, an answer; the year 1984! "
    "Paragraph 3 of 12 is 'unanswerable'. Yes no 5 percent-points e.g. U.S. co-operation"
)
CHINESE = [
    *"我来到北京清华大学，他说：“段落3”是正确的。《红楼梦》共有12个段落！体育新闻，经济、教育；答案是",
    "段落12",
    "ABC",
    " ",
    "人民日报",
]
ODD = [
    "",
    " ",
    "\n",
    "\n\n",
    ".",
    "...",
    " . . ",
    "`",
    "# a",
    "// b",
    "ß İ ﬁ",
    "a\u00a0b\u3000c",
    "é́",
]
CODE = [
    "x = foo(a, b)",
    "    return self.x",
    "# comment",
    "```python",
    "// note",
    "for i in y:",
    "",
]
CLASSES_EN = [
    "Food",
    "Date",
    "Person",
    "Individual",
    "Group of people",
    "people",
    "Group",
    "of",
    "p",
]
CLASSES_ZH = ["体育", "经济", "体育新闻", "新闻", "教育", "体"]


def made_up(rng: random.Random, task: longbench.Task, answer: str) -> str:
    """A prediction: right, nearly right, random, odd or empty."""
    words = CHINESE if task.language == "zh" else ENGLISH.split()
    words = CODE if task.metric == "code_sim" else words
    classes = CLASSES_ZH if task.language == "zh" else CLASSES_EN
    joint = "" if task.language == "zh" else rng.choice([" ", " ", "\n", ". "])
    some = joint.join(rng.choices(words, k=rng.randrange(40)))
    letters = list(answer)
    if letters:
        for _ in range(rng.randrange(1, 6)):
            letters[rng.randrange(len(letters))] = rng.choice([*words, ""])
    return rng.choice(
        [
            answer,
            "\n\n" + answer + "\n" + some,
            answer[: rng.randrange(len(answer) + 1)],
            "".join(letters),
            some,
            f"{some} {answer}",
            joint.join(rng.choices(classes, k=rng.randrange(1, 5))),
            " ".join(str(rng.randrange(30)) for _ in range(rng.randrange(5)))
            + " Paragraph 3 段落3",
            answer.upper() + "。",
            rng.choice(ODD),
            "".join(chr(rng.randrange(32, 0x3100)) for _ in range(rng.randrange(30))),
        ]
    )


def made_up_answer(rng: random.Random, task: longbench.Task) -> str:
    if task.metric == "classification":
        return rng.choice(CLASSES_ZH if task.language == "zh" else CLASSES_EN)
    if task.metric == "count":
        return str(rng.randrange(30))
    if task.metric.startswith("retrieval"):
        return f"{'段落' if task.language == 'zh' else 'Paragraph '}{rng.randrange(30)}"
    if task.metric == "code_sim":
        return rng.choice([*CODE, *ODD])
    words = CHINESE if task.language == "zh" else ENGLISH.split()
    made = ("" if task.language == "zh" else " ").join(rng.choices(words, k=rng.randrange(60)))
    return rng.choice([made, made, made, rng.choice(ODD)])


def cases_of(rng: random.Random, task: longbench.Task, rows: pathlib.Path | None, n: int) -> dict:
    """``n`` predictions with their answers; long sentences around `rouge`'s limit among them."""
    classes = CLASSES_ZH if task.language == "zh" else CLASSES_EN
    answers, lengths = [], []
    if rows is not None and (rows / f"{task.name}.jsonl").is_file():
        lines = (rows / f"{task.name}.jsonl").read_text("utf-8").splitlines()
        real = [json.loads(line) for line in lines]
        classes = real[0]["all_classes"] or classes
        for row in real:
            answers += [row["answers"]] * 12
            lengths += [row["length"]] * 12
    while len(answers) < n:
        answers.append([made_up_answer(rng, task) for _ in range(rng.randrange(1, 4))])
        lengths.append(rng.choice([10, 3999, 4000, 7999, 8000, 20_000]))
    predictions = [made_up(rng, task, rng.choice(x)) for x in answers]
    if task.metric.startswith("rouge"):
        word = "，甲" if task.language == "zh" else " w"
        for count in (980, *range(987, 994), 1000):
            text = word * (count // 2) if task.language == "zh" else (word * count).strip()
            predictions += [text, text]
            answers += [[text], ["甲，" * 300 if task.language == "zh" else "w " * 300]]
            lengths += [1, 5000]
    return {
        "task": task.name,
        "predictions": predictions,
        "answers": answers,
        "lengths": lengths,
        "all_classes": classes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("checkout", type=pathlib.Path)
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--rows", type=pathlib.Path)
    parser.add_argument("--n", type=int, default=300, help="predictions a task")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=pathlib.Path, default="results/longbench-metrics.json")
    parser.add_argument("--golden", type=pathlib.Path)
    flags = parser.parse_args()

    rng = random.Random(flags.seed)
    tasks = [task for task in longbench.TASKS.values() if not task.extended]
    cases = [cases_of(rng, task, flags.rows, flags.n) for task in tasks]
    with tempfile.TemporaryDirectory() as folder:
        asked, given = pathlib.Path(folder, "cases.json"), pathlib.Path(folder, "scores.json")
        asked.write_text(json.dumps(cases))
        driver = pathlib.Path(folder, "driver.py")
        driver.write_text(DRIVER)
        command = [flags.python, driver, flags.checkout.resolve(), asked, given]
        subprocess.run(command, check=True, cwd=folder)
        python, packages, singles, wholes = json.loads(given.read_text())

    theirs = iter(singles)
    rows: list[dict] = []
    golden: list[list] = []
    shown: collections.Counter[str] = collections.Counter()
    for task, case, (whole, by_length) in zip(tasks, cases, wholes, strict=True):
        classes = case["all_classes"]
        compared = different = full = 0
        scores = []
        for prediction, answers in zip(case["predictions"], case["answers"], strict=True):
            for answer in answers:
                ours = longbench_metrics.METRICS[task.metric](prediction, answer, classes)
                wanted = next(theirs)
                golden.append([task.name, prediction, answer, classes, wanted])
                compared += 1
                full += wanted > 0
                if ours != wanted:
                    different += 1
                    if shown[task.name] < 3:
                        print(task.name, repr(prediction), repr(answer), ours, wanted, sep="\n  ")
                    shown[task.name] += 1
            scores.append(task.score(prediction, answers, classes))
        ours_by_length = longbench_metrics.percent_by_length(scores, case["lengths"])
        whole_differs = longbench_metrics.percent(scores) != whole
        # repr, because NaN is not itself
        by_length_differs = repr(ours_by_length) != repr(by_length)
        rows.append(
            {
                "task": task.name,
                "metric": task.metric,
                "compared": compared,
                "above_zero": full,
                "different": different,
                "scorer_different": int(whole_differs),
                "scorer_e_different": int(by_length_differs),
            }
        )
        print(
            f"{task.name}: {compared} compared, {full} above 0, {different} different; "
            f"scorer {'differs' if whole_differs else 'same'} ({whole}), "
            f"scorer_e {'differs' if by_length_differs else 'same'}"
        )
    if flags.golden:
        short = [x for x in golden if len(x[1]) + len(x[2]) < 300]
        lines = ",\n".join(json.dumps(x, ensure_ascii=False) for x in short)
        flags.golden.write_text(f"[\n{lines}\n]\n", encoding="utf-8")
        return
    bad = sum(r["different"] + r["scorer_different"] + r["scorer_e_different"] for r in rows)
    total = sum(row["compared"] for row in rows)
    print(f"{total} compared, {bad} different; LongBench on Python {python}")
    results.write_result(
        flags.out,
        rows,
        command=f"python tools/compare_longbench_metrics.py CHECKOUT --n {flags.n} "
        f"--seed {flags.seed}" + (" --rows FOLDER" if flags.rows else ""),
        longbench=f"Python {python}, {', '.join(packages)}",
        compared=total,
        different=bad,
    )
    raise SystemExit(bool(bad))


if __name__ == "__main__":
    main()
