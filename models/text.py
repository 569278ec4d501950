"""Text from files, data sets or Python itself to token sequences."""

import itertools
import pathlib
import pydoc_data.topics
import sysconfig
from collections.abc import Iterable, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Int32

from gsrq_jax.errors import InputError
from gsrq_jax.models import processes
from gsrq_jax.models.tokenizer import Tokenizer

PYTHON_TOPICS = "python"  # names of the two texts that every Python carries
PYTHON_SOURCE = "python-source"
SAMPLED = "sampled"  # what a model writes itself, where that is offered
SOURCE = "source"  # the text that codebooks are calibrated on, likewise


def read(name: str) -> Iterator[str]:
    """The text of a file; with ``python`` the help topics of this Python, one at a time, with
    ``python-source`` the modules of its standard library.

    Raises:
        InputError: if there is no such file, or it is not UTF-8 text.
    """
    if name == PYTHON_TOPICS:
        yield from pydoc_data.topics.topics.values()
        return
    if name == PYTHON_SOURCE:
        for module in sorted(pathlib.Path(sysconfig.get_path("stdlib")).glob("[a-z]*.py")):
            yield module.read_text(encoding="utf-8")
        return
    path = pathlib.Path(name).expanduser()
    if not path.is_file():
        raise InputError(
            f"there is no file {name}; correct the path (data sets and folders are for --dataset, "
            "where a command has it)"
        )
    try:
        yield path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(
            f"cannot read {name} as UTF-8 text ({error}); give another file"
        ) from error


def read_dataset(name: str, *, column: str = "text", split: str = "train") -> Iterator[str]:
    """The texts of a data set, streamed through `datasets`.

    Args:
        name: hub id or folder (of jsonl, parquet, text files …), ``name`` or ``name:config``.
        column: of its rows.
        split: of the data set.

    Raises:
        InputError: if it cannot be found or read, or has no such column.
    """
    import datasets  # slow to import, and needed here only

    path, _, config = name.partition(":")
    try:
        rows = datasets.load_dataset(path, config or None, split=split, streaming=True)
        for row in rows:
            if not isinstance(row.get(column), str):
                raise InputError(
                    f"the data set {name!r} has no text column {column!r}; it has {', '.join(row)}"
                )
            yield row[column]
    except InputError:
        raise
    except Exception as error:  # of whatever library reads that kind of file
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot read the data set {name!r} ({reason}); give a hub id or a folder, "
            "or a file by --text"
        ) from error


def source(file: str, dataset: str | None, *, column: str, split: str) -> tuple[str, Iterator[str]]:
    """Name and texts of the data set, or where there is none of the file.

    Raises:
        InputError: as `read` and `read_dataset` do.
    """
    if dataset is None:
        return file, read(file)
    return dataset, read_dataset(dataset, column=column, split=split)


def tokens(
    pieces: Iterable[str], tokenizer: Tokenizer, *, count: int | None = None
) -> Int32[np.ndarray, " n"]:
    """The first ``count`` token ids of a text whose pieces are joined by blank lines (None: all).

    No beginning-of-text token is among them; fewer come back where the text is short. Of several
    processes, which all call it, each encodes its share of the pieces, and all get all tokens.
    """
    ids: list[int] = []
    first, step = jax.process_index(), jax.process_count()
    mine = itertools.islice(pieces, first, None, step)
    while count is None or len(ids) < count:
        read = [
            tokenizer.encode(piece.strip() + "\n\n", add_bos=False) if piece.strip() else []
            for piece in itertools.islice(mine, 1 if step == 1 else _PIECES)
        ]
        shares = processes.exchange(read)
        if not shares[0]:
            break
        for row in itertools.zip_longest(*shares, fillvalue=[]):
            ids += itertools.chain.from_iterable(row)
    return np.asarray(ids[:count], np.int32)


_PIECES = 64  # that each of several processes encodes before they exchange tokens


def cut(
    ids: Int32[np.ndarray, " n"], tokenizer: Tokenizer, *, length: int
) -> Int32[np.ndarray, "rows length"]:
    """As many whole sequences of ``length`` as ``ids`` fill, one after the other.

    Each starts with the beginning-of-text token where the tokenizer adds one.
    """
    start = np.asarray(tokenizer.encode(""), np.int32)
    room = length - len(start)
    rows = ids[: len(ids) // room * room].reshape(-1, room)
    return np.concatenate([np.tile(start, (len(rows), 1)), rows], axis=1)


def sequences(
    pieces: Iterable[str], tokenizer: Tokenizer, *, length: int, count: int, name: str
) -> Int32[np.ndarray, "rows length"]:
    """The first ``count`` sequences of ``length`` tokens of a text; fewer where it is short.

    Raises:
        InputError: if the text, called ``name``, does not fill one sequence.
    """
    room = length - len(tokenizer.encode(""))
    ids = tokens(pieces, tokenizer, count=count * room)
    if len(ids) < room:
        raise InputError(
            f"the text {name!r} has {len(ids)} tokens, too few for one sequence of {length}; "
            "give more text or shorter sequences"
        )
    return cut(ids, tokenizer, length=length)


def interleaved(parts: Sequence[Int32[np.ndarray, "_ length"]]) -> Int32[np.ndarray, "rows length"]:
    """All rows of ``parts``, each part's in their order and spread evenly over the whole."""
    place = np.concatenate([(np.arange(len(rows)) + 0.5) / len(rows) for rows in parts])
    return np.concatenate(parts)[np.argsort(place, kind="stable")]
