"""Text: reading it, numbering its characters, and laying tokens of any kind out as streams and windows."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Generator, Iterator
from os import PathLike
from pathlib import Path

import numpy as np
import numpy.typing as npt
from numpy.lib.stride_tricks import as_strided

from ..engine.errors import InputError

__all__ = ["Vocabulary", "default_text", "read_text", "reading", "streams", "windows"]

Integers = npt.NDArray[np.integer]


def read_text(path: str | PathLike[str], minimum: int = 1000) -> str:
    """Read a file of UTF-8 text.

    A byte-order mark is dropped, and all kinds of line ends become a newline.

    Parameters
    ----------
    path : str or PathLike
        The file.
    minimum : int, default 1000
        The least length accepted, in characters.

    Raises
    ------
    InputError
        If `path` is missing, unreadable, a directory, empty, not UTF-8 text, or shorter than `minimum`.
    """
    name = repr(str(path))
    with reading(path):
        raw = Path(path).read_bytes()
        if not raw:
            raise InputError(f"path: {name} is empty, at least {minimum} characters are needed", "give a longer text")
        if b"\0" in raw:
            raise InputError(
                f"path: {name} is binary (byte {raw.index(0)} is NUL), text is needed",
                "give a plain text file in UTF-8",
            )
        text = raw.decode("utf-8-sig")
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    if len(text) < minimum:
        raise InputError(
            f"path: {name} holds {len(text)} characters, at least {minimum} are needed", "give a longer text"
        )
    return text


@contextlib.contextmanager
def reading(path: str | PathLike[str]) -> Generator[None]:
    """Around reading a file of text: what goes wrong becomes an error that says what to do."""
    name = repr(str(path))
    try:
        yield
    except FileNotFoundError:
        raise InputError(f"path: there is no file {name}", "check the spelling, or give a full path") from None
    except OSError as error:
        if Path(path).is_dir():  # what error a directory gives depends on the system
            raise InputError(f"path: {name} is a directory", "give one text file inside it") from None
        raise InputError(
            f"path: {name} cannot be read ({error.strerror})", "check its permissions, or give another file"
        ) from None
    except UnicodeDecodeError as error:
        raise InputError(
            f"path: {name} is not UTF-8 text (byte {error.start} is 0x{error.object[error.start]:02x})",
            "convert it first, for instance with `iconv -f latin1 -t utf-8`",
        ) from None


def default_text() -> str:
    """Give the help topics of Python itself: about 465,000 characters of English, wherever Python is.

    They are joined in the order of their names. The text differs a little from one Python version to the next,
    so compare scores of one version only.
    """
    from pydoc_data.topics import topics  # half a megabyte, so not when this module is imported

    return "\n\n".join(topics[name].strip("\n") for name in sorted(topics)) + "\n"


class Vocabulary:
    """A fixed set of characters, numbered from 0.

    Parameters
    ----------
    symbols : str
        The characters, each once; their order is their numbering. `Vocabulary.of` takes them from a text.

    Raises
    ------
    InputError
        If `symbols` is empty or holds a character twice.
    """

    def __init__(self, symbols: str) -> None:
        if not symbols:
            raise InputError("symbols: got 0 characters, at least 1 is needed", "use Vocabulary.of(text)")
        codes = _codes(symbols)
        self._order = np.argsort(codes, kind="stable").astype(np.int64)
        self._sorted = codes[self._order]
        again = np.flatnonzero(self._sorted[1:] == self._sorted[:-1])
        if again.size:
            symbol = chr(int(self._sorted[again[0]]))
            raise InputError(
                f"symbols: {symbol!r} occurs {symbols.count(symbol)} times, each must occur 1 time",
                "use Vocabulary.of(text) to take the characters from a text",
            )
        self.symbols = symbols

    @classmethod
    def of(cls, text: str) -> Vocabulary:
        """Take the characters that occur in `text`, in the order of their code points."""
        return cls("".join(sorted(set(text))))

    def __len__(self) -> int:
        return len(self.symbols)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Vocabulary) and self.symbols == other.symbols

    def __hash__(self) -> int:
        return hash(self.symbols)

    def __repr__(self) -> str:
        return f"Vocabulary({self.symbols!r})"

    def encode(self, text: str, instead: str | None = None) -> npt.NDArray[np.int64]:
        """Turn a text into the numbers of its characters, shape (len(text),).

        Parameters
        ----------
        text : str
        instead : str, optional
            A character of the vocabulary that stands for all that are not in it; "" leaves them out. Default: they
            are refused.

        Raises
        ------
        InputError
            If a character is not in the vocabulary; the message names the first one and its position.
        """
        codes = _codes(text)
        place = np.minimum(np.searchsorted(self._sorted, codes), len(self) - 1)
        unknown = np.flatnonzero(self._sorted[place] != codes)
        if unknown.size and instead is not None:
            known = "".join([symbol if symbol in self.symbols else instead for symbol in text])
            return self.encode(known)
        if unknown.size:
            at = int(unknown[0])
            raise InputError(
                f"text: character {text[at]!r} at position {at} is not among the {len(self)} of the vocabulary",
                "remove or replace it, or take the vocabulary from a text that has it",
            )
        return self._order[place]

    def decode(self, numbers: npt.ArrayLike) -> str:
        """Turn numbers, shape (n,), back into a text.

        Raises
        ------
        InputError
            If `numbers` is not a vector of integers, or one is not in [0, len(self)).
        """
        array = np.asarray(numbers)
        if not array.size:
            return ""
        _check_vector("numbers", array)
        bad = np.flatnonzero((array < 0) | (array >= len(self)))
        if bad.size:
            raise InputError(
                f"numbers: {array[bad[0]]} at position {bad[0]} is not in 0 to {len(self) - 1}",
                "decode with the vocabulary that encoded",
            )
        return "".join([self.symbols[i] for i in array.tolist()])

    def to_json(self) -> str:
        """Write the vocabulary as a JSON string, in ASCII, to be kept beside a model's weights."""
        return json.dumps(self.symbols)

    @classmethod
    def from_json(cls, stored: str) -> Vocabulary:
        """Read what `to_json` wrote.

        Raises
        ------
        InputError
            If `stored` is not a JSON string of distinct characters.
        """
        advice = "pass what Vocabulary.to_json returned"
        try:
            symbols: object = json.loads(stored)
        except ValueError as error:
            raise InputError(f"stored: not JSON ({error})", advice) from None
        if not isinstance(symbols, str):
            raise InputError(f"stored: holds a {type(symbols).__name__}, a string is needed", advice)
        return cls(symbols)


def streams(tokens: Integers, batch_size: int) -> Integers:
    """Lay a text out as streams to be read side by side, one in each column.

    A column starts with the token that the one before it ends with, which is only a target there and only an
    input here. So every token but the first is a target once, except the fewer than `batch_size` at the end of
    the text that do not fill a row.

    Parameters
    ----------
    tokens : integer array of shape (n,)
        The text.
    batch_size : int
        Number of streams.

    Returns
    -------
    array of shape (1 + (n - 1) // batch_size, batch_size), of the dtype of `tokens`
        Of a memory map a read-only view, so that only what is used is read; else a copy.

    Raises
    ------
    InputError
        If `tokens` is not a vector of integers, or too short for an input and a target in each stream.
    """
    _check_vector("tokens", tokens)
    if batch_size < 1:
        raise InputError(f"batch_size: got {batch_size}, at least 1 is needed", "16 to 64 is usual")
    if len(tokens) <= batch_size:
        raise InputError(
            f"tokens: got {len(tokens)}, at least {batch_size + 1} are needed for batch_size = {batch_size}",
            "give a longer text, or a smaller batch_size",
        )
    steps = (len(tokens) - 1) // batch_size
    (stride,) = tokens.strides
    columns = as_strided(tokens, (steps + 1, batch_size), (stride, steps * stride), writeable=False)
    return columns if isinstance(tokens, np.memmap) else np.ascontiguousarray(columns)


def windows(columns: Integers, length: int) -> Iterator[tuple[Integers, Integers]]:
    """Walk down streams, giving inputs and targets: the targets are the inputs one step later.

    The windows follow each other without gap or overlap, and all have the same width, so a carried state fits.
    The last may be shorter than the others.

    Parameters
    ----------
    columns : integer array of shape (steps, batch)
        What `streams` returns.
    length : int
        Steps in a window, T.

    Returns
    -------
    iterator over pairs of views, each of shape (T, batch)

    Raises
    ------
    InputError
        If `length` is below 1, or `columns` has fewer than two steps.
    """
    if length < 1:
        raise InputError(f"length: got {length}, at least 1 is needed", "32 to 128 is usual")
    if columns.ndim != 2 or len(columns) < 2:
        raise InputError(
            f"columns: got shape {columns.shape}, (2 or more steps, batch) is needed", "use what streams returns"
        )
    last = len(columns) - 1
    ends = [(start, min(start + length, last)) for start in range(0, last, length)]
    return ((columns[start:end], columns[start + 1 : end + 1]) for start, end in ends)


def _codes(text: str) -> npt.NDArray[np.uint32]:
    """Give the code points of a text."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32)


def _check_vector(name: str, array: npt.NDArray[np.generic]) -> None:
    if array.ndim != 1 or array.dtype.kind not in "iu":
        raise InputError(
            f"{name}: got shape {array.shape} and dtype {array.dtype}, a vector of integers is needed",
            "use what Vocabulary.encode returns",
        )
