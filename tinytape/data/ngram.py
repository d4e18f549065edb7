"""Interpolated n-gram models of characters: what a neural model of characters has to beat.

An n-gram model predicts a symbol from the n - 1 before it, its context. Let c(w) be the count of symbol w after
a context in the training text, C the sum of c over the symbols, N(j) the number of symbols with c = j. Every
smoothing here has the form, with D(0) = 0,

    p(w | context) = (c(w) - D(c(w)) + F p(w | context less its first symbol)) / (C + A),  F = A + sum of D(c)

Below order 1 stands the uniform distribution, which gives unseen symbols their mass; a context that was never
seen leaves the answer to the shorter one. The smoothings differ in what is counted and in what is free:

======================  =======================================  ==================================
smoothing               c below the top order                    free at each order
======================  =======================================  ==================================
modified Kneser-Ney     different symbols before (context, w)    D(1), D(2), D(3 and more), A
absolute discounting    occurrences of (context, w)              D(1), D(2), D(3 and more), A
Witten-Bell             occurrences of (context, w)              A / (N(1) + N(2) + ...); D = 0
======================  =======================================  ==================================

`best_ngrams` chooses the smoothing and its free numbers *on the very text that is scored*. That favours the
n-grams, on purpose: nobody need wonder whether they were tuned well enough.

Sources: Witten & Bell 1991 (method C); Ney, Essen & Kneser 1994; Chen & Goodman 1999 (interpolated modified
Kneser-Ney). The constant A beside discounts is the strength of the Pitman-Yor process of Teh 2006.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError

__all__ = ["NgramResult", "Ngrams", "Smoothing", "best_ngrams"]

Integers = npt.NDArray[np.integer]
Indices = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_FIRST_TRY = {
    "modified Kneser-Ney": (0.5, 1.0, 1.5, 0.5, 0.0),
    "absolute discounting": (0.5, 1.0, 1.5, 0.5, 0.0),
    "Witten-Bell": (0.0, 0.0, 0.0, 0.0, 1.0),
}


class Smoothing(NamedTuple):
    """A smoothing and all its numbers."""

    name: str
    """"modified Kneser-Ney", "absolute discounting" or "Witten-Bell"."""
    numbers: Floats
    """Shape (order, 5), a row for each order from 1 up: D(1), D(2), D(3 and more), the constant part of A, and
    the part of A for each symbol seen in the context. 0 <= D(j) <= j, the rest not negative."""


class NgramResult(NamedTuple):
    """The best n-gram model of one order."""

    order: int
    smoothing: Smoothing
    bits: float
    """Mean bits per symbol of the scored text, its first symbol left out."""


class _Table(NamedTuple):
    """All n-grams of one length, as parallel arrays in the order of their keys."""

    keys: Indices  # number of the context, an n-gram one shorter, times V, plus the last symbol
    occurrences: Indices
    befores: Indices  # how many different symbols stand before it


class _Seen(NamedTuple):
    """What the training text holds for each scored position, at one order."""

    symbol: Floats  # (positions,): c(w)
    context: Floats  # (4, positions): N(1), N(2), N(3 and more), C


class Ngrams:
    """The n-grams of a training text, counted.

    Parameters
    ----------
    tokens : integer array of shape (n,)
        The text, numbers in [0, vocabulary_size).
    order : int
        Length of the longest n-gram.
    vocabulary_size : int
        Number of symbols, V.

    Raises
    ------
    InputError
        If `order` is below 1, or `tokens` is not a vector of at least `order` integers in range.
    """

    def __init__(self, tokens: Integers, order: int, vocabulary_size: int) -> None:
        if order < 1:
            raise InputError(f"order: got {order}, at least 1 is needed", "order 1 counts single symbols")
        _check("tokens", tokens, order, vocabulary_size)
        self.order = order
        self.vocabulary_size = vocabulary_size
        self._tables: list[_Table] = []
        shorter = np.zeros(len(tokens) + 1, np.int64)  # number of the n-gram one shorter that starts there
        for length in range(1, order + 1):
            keys, first, number, occurrences = np.unique(
                shorter[:-1] * vocabulary_size + tokens[length - 1 :],
                return_index=True,
                return_inverse=True,
                return_counts=True,
            )
            if length > 1:  # each n-gram tells of one symbol that stands before its own tail
                below = self._tables[-1]
                befores = np.bincount(shorter[first + 1], minlength=len(below.keys))
                self._tables[-1] = below._replace(befores=befores)
            self._tables.append(_Table(keys, occurrences, occurrences))
            shorter = number

    def probabilities(self, tokens: Integers, smoothing: Smoothing) -> Floats:
        """Give the probability of each of `tokens` after those before it, read as one stream.

        Parameters
        ----------
        tokens : integer array of shape (n,)
            Numbers in [0, vocabulary_size).
        smoothing : Smoothing
            Its numbers may have fewer rows than the order counted: a model of lower order.

        Returns
        -------
        float64 array of shape (n,)

        Raises
        ------
        InputError
            If `tokens` or `smoothing` does not fit what was counted.
        """
        _check("tokens", tokens, 1, self.vocabulary_size)
        seen = self._look_up(tokens, smoothing)
        levels = [_level(s, row) for s, row in zip(seen, smoothing.numbers, strict=True)]
        return _interpolate(levels, self.vocabulary_size, len(tokens))

    def tune(self, scored: Integers, start: Smoothing) -> NgramResult:
        """Change the numbers of a smoothing for the fewest bits on `scored`, by coordinate descent.

        Parameters
        ----------
        scored : integer array of shape (n,)
            Numbers in [0, vocabulary_size), at least two. The first is not scored: nothing stands before it, so a
            recurrent network could not be asked for it.
        start : Smoothing
            Where to start. It settles the order too.

        Raises
        ------
        InputError
            If `scored` or `start` does not fit what was counted.
        """
        _check("scored", scored, 2, self.vocabulary_size)
        seen = [_Seen(s.symbol[1:], s.context[:, 1:]) for s in self._look_up(scored, start)]
        numbers, bits = _tune(seen, start.numbers, self.vocabulary_size)
        return NgramResult(len(numbers), Smoothing(start.name, numbers), bits)

    def _look_up(self, tokens: Integers, smoothing: Smoothing) -> list[_Seen]:
        """Find what the training text holds for each of `tokens`, at each order of the smoothing."""
        order = len(smoothing.numbers)
        if smoothing.name not in _FIRST_TRY or not 1 <= order <= self.order:
            raise InputError(
                f"smoothing: got {smoothing.name!r} of order {order}, n-grams are counted up to {self.order}",
                f"count to a higher order; the names are {', '.join(_FIRST_TRY)}",
            )
        levels: list[_Seen] = []
        shorter = np.zeros(len(tokens) + 1, np.int64)  # as above; -1 where it does not occur in training
        shorter_number = 1
        for length, table in enumerate(self._tables[:order], 1):
            kneser_ney = smoothing.name == "modified Kneser-Ney" and length < order
            counts = table.befores if kneser_ney else table.occurrences
            contexts = table.keys // self.vocabulary_size
            # One column more than there are contexts: all zero, and what -1 finds.
            kinds = [
                np.bincount(contexts, weights, shorter_number + 1)
                for weights in (counts == 1, counts == 2, counts >= 3, counts)
            ]
            asked = shorter[:-1] * self.vocabulary_size + tokens[length - 1 :]
            place = np.minimum(np.searchsorted(table.keys, asked), len(table.keys) - 1)
            found = (shorter[:-1] >= 0) & (table.keys[place] == asked)
            head = min(length - 1, len(tokens))  # at the start of the stream the context is too short
            symbol = np.where(found, counts[place], 0).astype(np.float64)
            context = np.array(kinds, np.float64)[:, shorter[:-1]]
            levels.append(_Seen(np.pad(symbol, (head, 0)), np.pad(context, ((0, 0), (head, 0)))))
            shorter, shorter_number = np.where(found, place, -1), len(table.keys)
        return levels


def best_ngrams(train: Integers, scored: Integers, vocabulary_size: int, order: int = 6) -> list[NgramResult]:
    """Find the best n-gram model of each order from 1 to `order`, counted on one text and scored on another.

    Each order has a smoothing of its own with numbers of its own, chosen for the fewest bits on `scored`: three
    smoothings, each tuned by coordinate descent. Some seconds for 400,000 symbols counted and 30,000 scored.

    Parameters
    ----------
    train, scored : integer arrays of shape (n,)
        Numbers in [0, vocabulary_size). `scored` is read as one stream; its first symbol is not scored.
    vocabulary_size : int
        Number of symbols, V.
    order : int, default 6
        Length of the longest n-gram.

    Returns
    -------
    list of NgramResult, by order

    Raises
    ------
    InputError
        If a text is too short or holds numbers out of range, or `order` is below 1.
    """
    ngrams = Ngrams(train, order, vocabulary_size)
    found: dict[str, NgramResult] = {}
    results: list[NgramResult] = []
    for length in range(1, order + 1):
        for name, first in _FIRST_TRY.items():
            # What was found for the order below is a good start for the lower part of this one.
            lower = found[name].smoothing.numbers if length > 1 else np.zeros((0, 5))
            found[name] = ngrams.tune(scored, Smoothing(name, np.vstack([lower, first])))
        results.append(min(found.values(), key=lambda result: result.bits))
    return results


def _level(seen: _Seen, numbers: Floats) -> tuple[Floats, Floats]:
    """Give what one order adds to the probability, and its factor of what the shorter ones say."""
    discounts = np.append(0.0, numbers[:3])
    a = numbers[3] + numbers[4] * seen.context[:3].sum(0)
    f = a + numbers[:3] @ seen.context[:3]
    known = seen.context[3] > 0
    total = np.where(known, seen.context[3] + a, 1.0)
    own = seen.symbol - discounts[np.minimum(seen.symbol, 3).astype(np.int64)]
    return own / total, np.where(known, f, 1.0) / total


def _interpolate(levels: list[tuple[Floats, Floats]], vocabulary_size: int, positions: int) -> Floats:
    """Go up the orders, from the uniform distribution."""
    probability = np.full(positions, 1 / vocabulary_size)
    for own, factor in levels:
        probability = own + factor * probability
    return probability


def _tune(seen: list[_Seen], numbers: Floats, vocabulary_size: int) -> tuple[Floats, float]:
    """Move each number up or down while that lowers the bits per symbol, by steps that shrink.

    Only one order is worked out anew at each try: while the others are held, the probability is linear in it.
    """
    numbers = numbers.copy()
    positions = len(seen[0].symbol)
    levels = [_level(s, row) for s, row in zip(seen, numbers, strict=True)]
    bits = _bits(_interpolate(levels, vocabulary_size, positions))
    for step in (0.4, 0.2, 0.1, 0.05):
        before = np.inf
        while before - bits > 1e-5:
            before = bits
            for j, row in enumerate(numbers):
                below = _interpolate(levels[:j], vocabulary_size, positions)
                above, share = np.zeros(positions), np.ones(positions)
                for own, factor in reversed(levels[j + 1 :]):
                    above, share = above + share * own, share * factor
                for trial in _trials(row, step):
                    level = _level(seen[j], trial)
                    if (found := _bits(above + share * (level[0] + level[1] * below))) < bits:
                        bits, row[:], levels[j] = found, trial, level
    return numbers, bits


def _trials(row: Floats, step: float) -> Iterator[Floats]:
    """Change the free numbers of one order one by one. `row` may change meanwhile: the next trial sees it."""
    for k in (4,) if row[4] else (0, 1, 2, 3):
        for sign in (1, -1):
            trial = row.copy()
            if k < 3:
                trial[k] = np.clip(row[k] + sign * step * (k + 1), 0, k + 1)
            else:  # A may be of any size, so it moves by a factor, and never becomes 0
                trial[k] = row[k] * (1 + 2 * step) ** sign
            yield trial


def _bits(probability: Floats) -> float:
    return -float(np.log2(probability).mean())


def _check(name: str, tokens: Integers, least: int, vocabulary_size: int) -> None:
    advice = "pass what Vocabulary.encode returns, and len(vocabulary)"
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu":
        raise InputError(
            f"{name}: got shape {tokens.shape} and dtype {tokens.dtype}, a vector of integers is needed", advice
        )
    if len(tokens) < least:
        raise InputError(f"{name}: got {len(tokens)} symbols, at least {least} are needed", "give a longer text")
    if tokens.min() < 0 or tokens.max() >= vocabulary_size:
        raise InputError(
            f"{name}: numbers from {tokens.min()} to {tokens.max()}, vocabulary_size = {vocabulary_size} "
            f"allows 0 to {vocabulary_size - 1}",
            advice,
        )
