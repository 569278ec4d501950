"""Text from files, data sets or Python itself to token sequences."""

import pathlib
import pydoc_data.topics
from collections.abc import Iterator

import numpy as np

from gsrq_jax.errors import InputError
from gsrq_jax.models.tokenizer import Tokenizer

PYTHON_TOPICS = "python"  # the name of the text that every Python carries


def read(name: str, *, column: str = "text", split: str = "train") -> Iterator[str]:
    """Pieces of text.

    Args:
        name: ``python`` (the help topics of this Python), a text file, or a data set's hub id or
            folder, ``name`` or ``name:config``, streamed through `datasets`.
        column: of a data set's rows.
        split: of a data set.

    Raises:
        InputError: if it cannot be found or read, or has no such column.
    """
    if name == PYTHON_TOPICS:
        yield from pydoc_data.topics.topics.values()
        return
    path = pathlib.Path(name)
    if path.is_file():
        try:
            yield path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"cannot read {name} as UTF-8 text ({error})") from error
        return
    if path.suffix in (".txt", ".md"):
        raise InputError(f"there is no file {name}; correct the path")
    import datasets  # slow to import, and needed here only

    dataset, _, config = name.partition(":")
    try:
        rows = iter(datasets.load_dataset(dataset, config or None, split=split, streaming=True))
    except Exception as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot open the data set {name!r} ({reason}); give a hub id, a folder or --text FILE"
        ) from error
    for row in rows:
        if not isinstance(row.get(column), str):
            raise InputError(
                f"the data set {name!r} has no text column {column!r}; it has {', '.join(row)}"
            )
        yield row[column]


def sequences(
    pieces: Iterator[str], tokenizer: Tokenizer, *, length: int, count: int, name: str
) -> np.ndarray:
    """The first ``count`` sequences of ``length`` tokens, int32 ``[count, length]``.

    Pieces are joined by blank lines; each sequence starts with the beginning-of-text token where
    the tokenizer adds one. Fewer come back where the text is short.

    Raises:
        InputError: if the text does not fill one sequence.
    """
    start = tokenizer.encode("")
    room = length - len(start)
    ids: list[int] = []
    for piece in pieces:
        ids += tokenizer.encode(piece.strip() + "\n\n", add_bos=False) if piece.strip() else []
        if len(ids) >= count * room:
            break
    if len(ids) < room:
        raise InputError(
            f"the text {name!r} has {len(ids)} tokens, too few for one sequence of {length}; "
            "give more text or a smaller --length"
        )
    whole = min(count, len(ids) // room)
    rows = np.asarray(ids[: whole * room], np.int32).reshape(whole, room)
    return np.concatenate([np.tile(np.asarray(start, np.int32), (whole, 1)), rows], axis=1)
