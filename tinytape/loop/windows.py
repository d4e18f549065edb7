"""The windows of a stream: how long they are, and how far back their losses reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError
from ..random import Generator

__all__ = ["Reach", "Report", "Start", "Window", "deviation", "lengths", "new_steps"]

Integers = npt.NDArray[np.int64]
LINES = 12


class Start(NamedTuple):
    """Where a run of the layer may begin: a step, and the state before it, cut off; None: the layer's own."""

    step: int
    state: Any


class Reach(NamedTuple):
    """A window: the inputs start, ..., stop - 1 are run, and the losses from `first` on count.

    `rows` is None for a single sequence; `reset` has, for each step from start on, the rows that are zeroed before.
    """

    start: int
    first: int
    stop: int
    rows: int | None
    reset: npt.NDArray[np.bool_] | None

    def first_inputs(self) -> Integers:
        """For each loss, the first input that it reaches: (steps, B), or (steps,)."""
        steps, rows = self.stop - self.start, () if self.rows is None else (self.rows,)
        if self.reset is None:
            return np.full((self.stop - self.first, *rows), self.start, np.int64)
        at = np.arange(self.start, self.stop).reshape(steps, *(1 for _ in rows))
        return np.maximum.accumulate(np.where(self.reset, at, self.start))[self.first - self.start :]

    def counts(self) -> Integers:
        """How many losses reach 0, 1, 2, ... inputs, their own step's counted."""
        if self.reset is None:
            found = np.zeros(self.stop - self.start + 1, np.int64)
            found[self.first - self.start + 1 :] = 1 if self.rows is None else self.rows
            return found
        first = self.first_inputs()
        at = np.arange(self.first, self.stop).reshape(-1, *(1,) * (first.ndim - 1))
        return np.bincount((at - first + 1).ravel())


@dataclass(frozen=True, eq=False)
class Window:
    """The losses' part of a window, and what it stands on.

    Attributes
    ----------
    y : Tensor, or nest of Tensors
        The layer's outputs of the last `steps` steps.
    targets
        Those of the same steps; None if there are none.
    start, stop : int
        The inputs that the losses can reach, counted from the first ever: start, ..., stop - 1.
    steps : int
        How many of them are new, and have their outputs in `y`.
    state : nest of Tensors
        The state after the last step, cut off.
    """

    y: Any
    targets: Any
    start: int
    stop: int
    steps: int
    state: Any
    _reach: Reach

    @property
    def reach(self) -> Integers:
        """The first input that each loss's gradient reaches: (steps, B), or (steps,) for a single sequence.

        It is `start`, or the step at which the row was last reset.
        """
        return self._reach.first_inputs()


class Report:
    """How many inputs back the losses reached, over many windows. To be printed.

    Attributes
    ----------
    windows, steps : int
        How many there were.
    counts : array of int64
        ``counts[n]`` losses, one for each step and row, reached n inputs: their own step's and the n - 1 before.
    """

    def __init__(self, name: str) -> None:
        self.name, self.windows, self.steps = name, 0, 0
        self.counts: Integers = np.zeros(1, np.int64)

    def add(self, reach: Reach) -> None:
        """Count a window in."""
        found = reach.counts()
        few, many = sorted((self.counts, found), key=len)
        total = many.copy()
        total[: len(few)] += few
        self.counts = total
        self.windows += 1
        self.steps += reach.stop - reach.first

    def copy(self) -> Report:
        """One that does not go on counting."""
        made = Report(self.name)
        made.windows, made.steps, made.counts = self.windows, self.steps, self.counts.copy()
        return made

    @property
    def mean(self) -> float:
        """How many inputs a loss reached on average; 0 if there was none."""
        return float(self.counts @ np.arange(len(self.counts)) / max(self.counts.sum(), 1))

    def __str__(self) -> str:
        total, found = int(self.counts.sum()), np.flatnonzero(self.counts)
        head = f"{self.name}: {self.windows:,} windows, {self.steps:,} steps, {total:,} losses"
        if not total:
            return head
        least, most = int(found[0]), int(found[-1])
        rows: list[tuple[Any, ...]] = [("inputs reached", "losses", "share", "so many or more")]
        for low, high in _ranges(least, most):
            here, beyond = int(self.counts[low : high + 1].sum()), int(self.counts[low:].sum())
            if here:
                span = f"{low}" if low == high else f"{low}-{high}"
                rows.append((span, f"{here:,}", f"{here / total:.1%}", f"{beyond / total:.1%}"))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = ["  ".join(map(str.rjust, row, widths)) for row in rows]
        return "\n".join([head, *lines, f"least {least}, mean {self.mean:.1f}, most {most}"])


def _ranges(least: int, most: int) -> list[tuple[int, int]]:
    """At most LINES ranges of equal width (but the last) that cover least, ..., most."""
    width = -(-(most - least + 1) // LINES)
    return [(low, min(low + width - 1, most)) for low in range(least, most + 1, width)]


def lengths(k1: Any, k2: Any) -> tuple[int, int]:
    """What is meant by `k1` and `k2`: both are numbers of steps, and k2 is no less, k1 by default."""
    k2 = k1 if k2 is None else k2
    for name, value in (("k1", k1), ("k2", k2)):
        if not isinstance(value, int | np.integer) or isinstance(value, bool) or value < 1:
            raise InputError(f"truncated: {name} is {value!r}.", "pass a number of steps, 1 or more.")
    if k2 < k1:
        raise InputError(
            f"truncated: k2 = {k2} is less than k1 = {k1}.",
            "a window has k2 steps, of which k1 are new: k2 is k1 or more.",
        )
    return int(k1), int(k2)


def deviation(jitter: Any) -> float:
    """What is meant by `jitter`."""
    if not _is_number(jitter) or not 0 <= jitter < math.inf:
        raise InputError(f"truncated: jitter is {jitter!r}.", "pass a standard deviation in steps, or 0 for none.")
    return float(jitter)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number)


def new_steps(k1: int, jitter: float, generator: Generator) -> int:
    """How many new steps a window has, drawn as in AWD-LSTM."""
    middle = k1 if generator.uniform(dtype=np.float64) < 0.95 else k1 / 2
    drawn = round(float(generator.normal((), middle, jitter, np.float64)))
    return min(max(drawn, min(5, k1)), k1 + math.ceil(4 * jitter))
