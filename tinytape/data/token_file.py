"""Texts of any length: read line by line, numbered once, and then looked at through a memory map."""

from __future__ import annotations

import hashlib
import os
import secrets
from collections.abc import Iterable, Iterator
from itertools import islice
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError
from .text import Vocabulary, reading
from .words import WordVocabulary, words

__all__ = ["map_tokens", "read_lines"]

LINES = 1 << 16  # that are numbered at a time


def read_lines(path: str | PathLike[str]) -> Iterator[str]:
    """The lines of a file of UTF-8 text, one after the other, each with its newline.

    A byte-order mark is dropped, and all kinds of line ends become a newline. At no time is more than a line in memory.

    Raises
    ------
    InputError
        If `path` is missing, unreadable, a directory, or not UTF-8 text.
    """
    with reading(path), open(path, encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if "\0" in line:
                raise InputError(
                    f"path: {str(path)!r} is binary (line {number} has a NUL), text is needed",
                    "give a plain text file in UTF-8",
                )
            yield line


def map_tokens(
    path: str | PathLike[str], vocabulary: Vocabulary | WordVocabulary, cache: str | PathLike[str]
) -> npt.NDArray[np.unsignedinteger]:
    """The numbers of a text's characters or words, in a file that is mapped and not read.

    The file is made at the first call, and again when the text's length or date, or the vocabulary, is another. It is
    written under another name first, so that one that is there is whole.

    Parameters
    ----------
    path : path
        Text in UTF-8.
    vocabulary : Vocabulary or WordVocabulary
        With words, lines are split at white space and end in ``<eos>``.
    cache : path
        The folder for the file; made if there is none.

    Returns
    -------
    array of shape (n,)
        Read-only, uint16 or, for more than 65,536 symbols, uint32. `streams` and `windows` give views of it.

    Raises
    ------
    InputError
        If the text cannot be read, has a character that is not in the vocabulary, or is empty, or the folder cannot
        be written.
    """
    with reading(path):
        facts = os.stat(path)
    described = f"{vocabulary.to_json()} {os.path.realpath(path)} {facts.st_size} {facts.st_mtime_ns}"
    digest = hashlib.sha256(described.encode("utf-8", "surrogateescape")).hexdigest()[:16]
    dtype = np.dtype("<u2" if len(vocabulary) <= 1 << 16 else "<u4")
    place = Path(cache) / f"{Path(path).stem}.{digest}.{dtype.str[1:]}"
    if not place.exists():
        _make(place, (part.astype(dtype) for part in _encoded(read_lines(path), vocabulary)))
    if not place.stat().st_size:
        raise InputError(f"path: {str(path)!r} is empty", "give a longer text")
    return np.memmap(place, dtype, "r")


def _encoded(lines: Iterator[str], vocabulary: Vocabulary | WordVocabulary) -> Iterator[npt.NDArray[np.int64]]:
    while part := list(islice(lines, LINES)):
        if isinstance(vocabulary, Vocabulary):
            yield vocabulary.encode("".join(part))
        else:
            yield vocabulary.encode(words(part))


def _make(place: Path, parts: Iterable[npt.NDArray[np.unsignedinteger]]) -> None:
    beside = place.with_name(f"{place.name}.{os.getpid()}.{secrets.token_hex(4)}.tmp")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(beside, "xb") as file:
                for part in parts:
                    file.write(part.data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, place)
        finally:
            beside.unlink(missing_ok=True)
    except OSError as error:
        raise InputError(
            f"cache: {str(place)!r} cannot be written: {error.strerror}", "give a folder with space in it"
        ) from error
