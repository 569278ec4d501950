"""LongBench: its tasks, their rows, prompts and scores.

As LongBench's own ``pred.py`` has it (THUDM/LongBench, MIT; prompts and lengths are its data, in
``longbench_tasks.json`` beside this file), down to what it leaves out: a prompt that is too long
loses its middle, and code and few-shot tasks get no chat template. What differs: the template is
the model's own instead of one for each of LongBench's eight models, and answers of some of those
are not cleaned of their names.
"""

import dataclasses
import functools
import importlib.resources
import json
import pathlib
import zipfile
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import huggingface_hub

from gsrq_jax.errors import InputError, at_least
from gsrq_jax.models import longbench_metrics
from gsrq_jax.models.tokenizer import Tokenizer

HUB_ID = "THUDM/LongBench"


@dataclasses.dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        name: of its data; with the suffix ``_e`` if it is one of LongBench-E.
        language: ``en`` or ``zh``.
        extended: it is one of LongBench-E, whose scores are given by length.
        metric: a name in `longbench_metrics.METRICS`.
        max_new_tokens: that an answer may have.
        chat: the prompt goes into the model's chat template, if it has one.
        first_line: only the answer's first line is scored.
        stop_at_newline: a newline ends the answer, which has one token at least.
        prompt: a format with ``{context}`` and mostly ``{input}``.
    """

    name: str
    language: str
    extended: bool
    metric: str
    max_new_tokens: int
    chat: bool
    first_line: bool
    stop_at_newline: bool
    prompt: str

    def score(
        self, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None
    ) -> float:
        """From 0 to 1, against the best of the answers."""
        return longbench_metrics.score(
            self.metric, prediction, answers, all_classes, first_line=self.first_line
        )


def _tasks() -> dict[str, Task]:
    file = importlib.resources.files(__package__) / "longbench_tasks.json"
    tasks = {}
    for name, facts in json.loads(file.read_text("utf-8"))["tasks"].items():
        too = facts.pop("extended")
        tasks[name] = Task(name=name, extended=False, **facts)
        if too:
            tasks[name + "_e"] = Task(name=name + "_e", extended=True, **facts)
    return tasks


TASKS = _tasks()
"""All tasks by name."""

GROUPS = {
    "en": tuple(x for x, t in TASKS.items() if t.language == "en" and not t.extended),
    "zh": tuple(x for x, t in TASKS.items() if t.language == "zh"),
    "e": tuple(x for x, t in TASKS.items() if t.extended),
}
"""The 16 English tasks, the five Chinese ones, the 13 of LongBench-E."""


def select(names: Iterable[str]) -> tuple[Task, ...]:
    """The tasks of these names and groups, each once, in LongBench's order of languages.

    Raises:
        InputError: for a name that is neither, or none at all.
    """
    wanted: set[str] = set()
    for name in names:
        if name not in TASKS and name not in GROUPS:
            raise InputError(
                f"unknown task {name!r}; choose from {', '.join(GROUPS)} (all of a kind) or "
                f"{', '.join(TASKS)}"
            )
        wanted.update(GROUPS.get(name, (name,)))
    if not wanted:
        raise InputError("no task is named; choose some by --tasks")
    return tuple(task for name, task in TASKS.items() if name in wanted)


# --- rows -----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Row:
    """One question.

    Attributes:
        id: of the row, unique in its task.
        task: it belongs to.
        fields: of the prompt.
        answers: each of which is right.
        all_classes: of a classification.
        length: of the question, in LongBench's count of words.
    """

    id: str
    task: Task
    fields: dict[str, str]
    answers: tuple[str, ...]
    all_classes: tuple[str, ...] | None
    length: int


def load(data: str, tasks: Sequence[Task], *, limit: int | None = None) -> list[Row]:
    """The rows of tasks, in the order of the data, or the first ``limit`` of each.

    Args:
        data: a folder of ``<task>.jsonl``; LongBench's ``data.zip``; or a hub id. On the hub
            LongBench is that archive beside a loading script, which `datasets` 4 and later do not
            run: the archive is fetched. A hub id without one is read by `datasets`, a configuration
            a task. (Tested against stand-ins for the hub; not run against the hub itself.)
        tasks: to read.
        limit: rows a task.

    Raises:
        InputError: for data that is not there or cannot be read, a row that lacks what its task
            needs, or a limit below 1.
    """
    at_least(1, "--", limit=limit)
    read = _reader(data)
    rows: list[Row] = []
    for task in tasks:
        found: dict[str, Row] = {}
        for number, data_of_row in enumerate(read(task.name), 1):
            if limit is not None and len(found) == limit:
                break
            row = _row(task, data_of_row, f"row {number} of {task.name}")
            if row.id in found:
                raise InputError(
                    f"row {number} of {task.name} has the _id {row.id!r} of another; "
                    "take LongBench's own rows"
                )
            found[row.id] = row
        if not found:
            raise InputError(f"{data} has no rows of {task.name}; leave the task out")
        rows += found.values()
    return rows


def _reader(data: str) -> Callable[[str], Iterable[Any]]:
    path = pathlib.Path(data).expanduser()
    if path.is_dir():
        return functools.partial(_read_folder, path)
    if path.is_file():
        return functools.partial(_read_archive, path)
    if path.is_absolute() or data.count("/") != 1 or data.startswith("."):
        raise InputError(
            f"there is no folder {data}; give one with <task>.jsonl, LongBench's data.zip, or a "
            f"hub id such as {HUB_ID}"
        )
    try:
        archive = huggingface_hub.hf_hub_download(data, "data.zip", repo_type="dataset")
    except huggingface_hub.errors.EntryNotFoundError:
        return functools.partial(_read_dataset, data)
    except Exception as error:  # the hub's client passes on those of its HTTP library of the day
        raise InputError(
            f"{data} is no folder here and cannot be fetched from the Hugging Face hub "
            f"({type(error).__name__}: {_first_line(error)}); check the name and the network, or "
            "give a folder with <task>.jsonl"
        ) from error
    return functools.partial(_read_archive, pathlib.Path(archive))


def _read_folder(folder: pathlib.Path, name: str) -> Iterable[Any]:
    file = folder / f"{name}.jsonl"
    try:
        with file.open(encoding="utf-8") as lines:
            yield from _parse(lines, file)
    except FileNotFoundError as error:
        raise InputError(
            f"{folder} has no {file.name}; add it, or leave the task out of --tasks"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read ({error}); fetch it again") from error


def _read_archive(file: pathlib.Path, name: str) -> Iterable[Any]:
    try:
        with zipfile.ZipFile(file) as archive:
            inside = [x for x in archive.namelist() if pathlib.PurePath(x).name == f"{name}.jsonl"]
            if not inside:
                raise InputError(f"{file} has no {name}.jsonl; leave the task out of --tasks")
            with archive.open(inside[0]) as lines:
                yield from _parse((line.decode("utf-8") for line in lines), file)
    except (OSError, zipfile.BadZipFile, UnicodeDecodeError) as error:
        raise InputError(f"{file} cannot be read ({error}); fetch it again") from error


def _read_dataset(hub_id: str, name: str) -> Iterable[Any]:
    import datasets  # slow to import, and needed here only

    try:
        return datasets.load_dataset(hub_id, name, split="test")
    except Exception as error:  # of whatever library reads that kind of file
        raise InputError(
            f"cannot read {name} of the data set {hub_id} ({_first_line(error)}); "
            "give a folder with <task>.jsonl"
        ) from error


def _parse(lines: Iterable[str], file: pathlib.Path) -> Iterable[Any]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                yield json.loads(line)
            except ValueError as error:
                raise InputError(
                    f"line {number} of {file.name} is not JSON ({error}); fetch the file again"
                ) from error


def _row(task: Task, data: Any, where: str) -> Row:
    def refuse(lack: str) -> InputError:
        return InputError(f"{where} {lack}; take LongBench's own rows, or leave the task out")

    if not isinstance(data, dict):
        raise refuse("is no JSON object")
    answers = data.get("answers")
    if not isinstance(answers, list) or not answers or not all(isinstance(x, str) for x in answers):
        raise refuse("has no answers")
    classes = data.get("all_classes")
    if task.metric == "classification" and not classes:
        raise refuse("has no all_classes")
    if not data.get("_id") or not isinstance(data.get("length"), int):
        raise refuse("has no _id or no length")
    fields = {name: data.get(name) for name in ("context", "input")}
    if not all(isinstance(x, str) for x in fields.values()):
        raise refuse("has no context or no input")
    row = Row(
        id=str(data["_id"]),
        task=task,
        fields=fields,  # type: ignore[arg-type]
        answers=tuple(answers),
        all_classes=tuple(classes) if classes else None,
        length=data["length"],
    )
    try:
        for answer in row.answers:
            if task.metric.startswith("retrieval"):
                longbench_metrics.METRICS[task.metric]("", answer, None)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error
    return row


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or ["no reason given"])[0]


# --- prompts --------------------------------------------------------------------------------------


def prompt(row: Row, tokenizer: Tokenizer, max_length: int) -> list[int]:
    """Token ids of the prompt as ``pred.py`` makes it.

    A text of more than ``max_length`` tokens is put together again from the text of its first and
    its last ``max_length // 2`` ones; then comes the chat template, then the tokenizer once more.
    So the prompt can be longer by what the template and the joint add.
    """
    text = row.task.prompt.format(**row.fields)
    ids = tokenizer.encode(text)
    if len(ids) > max_length:
        half = max_length // 2
        text = tokenizer.decode(ids[:half]) + tokenizer.decode(ids[-half:])
    elif not _templated(row.task, tokenizer):
        return ids
    if _templated(row.task, tokenizer):
        said = tokenizer.chat([{"role": "user", "content": text}])
        return tokenizer.encode(said, add_bos=False)
    return tokenizer.encode(text)


def room(task: Task, tokenizer: Tokenizer, context: int) -> int:
    """The largest ``max_length`` with which prompt and answer surely fit into a context."""
    template = 0
    if _templated(task, tokenizer):
        said = tokenizer.chat([{"role": "user", "content": ""}])
        template = len(tokenizer.encode(said, add_bos=False))
    return context - task.max_new_tokens - template - _JOINT


def stops(task: Task, tokenizer: Tokenizer) -> tuple[int, ...]:
    """Tokens that end an answer of this task, beside those that end any."""
    return (tokenizer.encode("\n", add_bos=False)[-1],) if task.stop_at_newline else ()


def _templated(task: Task, tokenizer: Tokenizer) -> bool:
    return task.chat and tokenizer.has_chat_template


_JOINT = 16  # tokens by which a text can grow where its middle was cut or a template begins
