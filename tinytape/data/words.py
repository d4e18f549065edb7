"""Text as words: splitting it, and numbering the words that are frequent."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError

__all__ = ["END_OF_LINE", "UNKNOWN", "WordVocabulary", "split_words", "words"]

UNKNOWN = "<unk>"
END_OF_LINE = "<eos>"

_WORD = re.compile(r"\w+|[^\w\s]")


def split_words(text: str) -> str:
    """Bring running text into the form of word corpora: lower case, a space between words and punctuation marks.

    Words are runs of letters, digits and underscores; every other mark is a word of its own. Lines stay lines,
    empty ones are left out.
    """
    lines = (" ".join(_WORD.findall(line.lower())) for line in text.split("\n"))
    return "".join([f"{line}\n" for line in lines if line])


def words(lines: Iterable[str]) -> Iterator[str]:
    """The words of lines, which are split at white space, and ``<eos>`` at the end of each line."""
    return chain.from_iterable((*line.split(), END_OF_LINE) for line in lines)


class WordVocabulary:
    """A fixed set of words, numbered from 0; whatever else there is counts as ``<unk>``.

    Parameters
    ----------
    words : sequence of str
        Each once; their order is their numbering. `WordVocabulary.of` takes them from a corpus.

    Attributes
    ----------
    words : tuple of str

    Raises
    ------
    InputError
        If a word occurs twice, or ``<unk>`` is not among them.
    """

    def __init__(self, words: Sequence[str]) -> None:
        self.words = tuple(words)
        self._numbers = {word: i for i, word in enumerate(self.words)}
        if len(self._numbers) < len(self.words):
            word, count = Counter(self.words).most_common(1)[0]
            raise InputError(
                f"words: {word!r} occurs {count} times, each must occur 1 time", "use WordVocabulary.of(words)"
            )
        if UNKNOWN not in self._numbers:
            raise InputError(f"words: {UNKNOWN!r} is not among the {len(self)}", "use WordVocabulary.of(words)")
        self._unknown = self._numbers[UNKNOWN]

    @classmethod
    def of(cls, words: Iterable[str], size: int | None = None) -> WordVocabulary:
        """Take the most frequent words, and ``<unk>``, by falling frequency; of equal ones the first in Unicode.

        Parameters
        ----------
        words : iterable of str
            A corpus.
        size : int, optional
            How many at most, ``<unk>`` among them. Default: all.

        Raises
        ------
        InputError
            If `size` is below 2, or there are no words.
        """
        if size is not None and size < 2:
            raise InputError(f"size: got {size}, at least 2 are needed", "10,000 is usual")
        counts = Counter(words)
        if not counts:
            raise InputError("words: got 0, at least 1 is needed", "give a longer text")
        rare = counts.pop(UNKNOWN, 0)
        ranked = sorted(counts, key=lambda word: (-counts[word], word))[: None if size is None else size - 1]
        rare += counts.total() - sum(counts[word] for word in ranked)
        place = sum(counts[word] >= rare for word in ranked)
        return cls([*ranked[:place], UNKNOWN, *ranked[place:]])

    def __len__(self) -> int:
        return len(self.words)

    def __contains__(self, word: object) -> bool:
        return word in self._numbers

    def __eq__(self, other: object) -> bool:
        return isinstance(other, WordVocabulary) and self.words == other.words

    def __hash__(self) -> int:
        return hash(self.words)

    def __repr__(self) -> str:
        first = ", ".join(map(repr, self.words[:3]))
        return f"WordVocabulary([{first}{', ...' if len(self) > 3 else ''}], {len(self):,} words)"

    def encode(self, words: Iterable[str]) -> npt.NDArray[np.int64]:
        """Turn words into numbers, shape (n,); those that are not in the vocabulary into that of ``<unk>``."""
        get, unknown = self._numbers.get, self._unknown
        return np.array([get(word, unknown) for word in words], np.int64)

    def decode(self, numbers: npt.ArrayLike) -> list[str]:
        """Turn numbers, shape (n,), back into words.

        Raises
        ------
        InputError
            If one is not in [0, len(self)).
        """
        array = np.asarray(numbers, np.int64).reshape(-1)
        bad = np.flatnonzero((array < 0) | (array >= len(self)))
        if bad.size:
            raise InputError(
                f"numbers: {array[bad[0]]} at position {bad[0]} is not in 0 to {len(self) - 1}",
                "decode with the vocabulary that encoded",
            )
        return [self.words[i] for i in array.tolist()]

    def to_json(self) -> str:
        """Write the vocabulary as a JSON list, in ASCII, to be kept beside a model's weights."""
        return json.dumps(self.words)

    @classmethod
    def from_json(cls, stored: str) -> WordVocabulary:
        """Read what `to_json` wrote.

        Raises
        ------
        InputError
            If `stored` is not a JSON list of distinct words.
        """
        advice = "pass what WordVocabulary.to_json returned"
        try:
            found: Any = json.loads(stored)
        except ValueError as error:
            raise InputError(f"stored: not JSON ({error})", advice) from None
        if not isinstance(found, list) or not all(isinstance(word, str) for word in cast("list[Any]", found)):
            raise InputError("stored: not a list of strings", advice)
        return cls(cast("list[str]", found))
