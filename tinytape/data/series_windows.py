"""Windows over many series: what a forecast may know, and what it is to say."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError
from .series import fill_gaps

if TYPE_CHECKING:
    from ..random import Generator

__all__ = ["SeriesWindows", "WindowBatch"]

Floats = npt.NDArray[np.float64]
Integers = npt.NDArray[np.int64]


class WindowBatch(NamedTuple):
    """Windows: each a context, which a forecast is made from, and the targets that follow it."""

    series: Integers
    """(B,): which series."""
    origins: Integers
    """(B,): the step of the first target, counted in the series."""
    context: Floats
    """(B, context): the values before the origin. Gaps are filled from before them."""
    targets: Floats
    """(B, horizon): the values from the origin on. NaN where missing."""


class SeriesWindows:
    """All windows of many series that lie within a stretch of each.

    Parameters
    ----------
    series : sequence of arrays (n_i,)
        NaN where a value is missing.
    context, horizon : int
        How many values a forecast sees, and how many it says.
    start : sequence of int, optional
        The first origin allowed in each series. Default: as soon as the context is full.
    stop : sequence of int, optional
        Where the last target allowed ends. For training windows the end of the training part. Default: the end.
    season : int
        For filling gaps; see `fill_gaps`. Default 1.

    Raises
    ------
    InputError
        If a series is too short for one window; the message says which.
    """

    def __init__(
        self,
        series: Sequence[npt.ArrayLike],
        context: int,
        horizon: int,
        start: Sequence[int] | None = None,
        stop: Sequence[int] | None = None,
        season: int = 1,
    ) -> None:
        if not series or context < 1 or horizon < 1:
            raise InputError(
                f"SeriesWindows: {len(series)} series, context {context}, horizon {horizon}.", "all are 1 or more."
            )
        arrays = [np.asarray(values, float) for values in series]
        lengths = np.array([len(values) for values in arrays])
        self.context, self.horizon = context, horizon
        self.first = np.full(len(arrays), context) if start is None else np.maximum(np.asarray(start), context)
        ends = lengths if stop is None else np.minimum(np.asarray(stop), lengths)
        self.last = ends - horizon
        short = np.flatnonzero(self.last < self.first)
        if short.size:
            i = int(short[0])
            raise InputError(
                f"SeriesWindows: series {i} has {ends[i]} values up to where targets end; a context of {context} and "
                f"a horizon of {horizon} from step {self.first[i]} on need {self.first[i] + horizon}.",
                "shorten the context or the horizon, or leave short series out.",
            )
        self._starts = np.concatenate([[0], np.cumsum(lengths)[:-1]])
        self._raw = np.concatenate(arrays)
        self._filled = np.concatenate([fill_gaps(values, season) for values in arrays])

    def __len__(self) -> int:
        """How many windows there are."""
        return int(np.sum(self.last - self.first + 1))

    def take(self, series: npt.ArrayLike, origins: npt.ArrayLike) -> WindowBatch:
        """Windows by series and origin.

        Raises
        ------
        InputError
            If an origin lies outside of what is allowed in its series.
        """
        chosen, at = np.atleast_1d(np.asarray(series, np.int64)), np.atleast_1d(np.asarray(origins, np.int64))
        outside = np.flatnonzero((at < self.first[chosen]) | (at > self.last[chosen]))
        if outside.size:
            i = int(outside[0])
            raise InputError(
                f"SeriesWindows: origin {at[i]} in series {chosen[i]} is outside of {self.first[chosen[i]]} to "
                f"{self.last[chosen[i]]}.",
                "draw windows, or walk over all of them.",
            )
        places = (self._starts[chosen] + at)[:, None]
        context = self._filled[places + np.arange(-self.context, 0)]
        return WindowBatch(chosen, at, context, self._raw[places + np.arange(self.horizon)])

    def draw(self, count: int, generator: Generator) -> WindowBatch:
        """Windows at random: each series is as likely as any other, however long, and so is each origin in it."""
        chosen = np.asarray(generator.integers(0, len(self.first), count), np.int64)
        part = generator.uniform((count,), dtype=np.float64)
        room = self.last[chosen] - self.first[chosen] + 1
        return self.take(chosen, self.first[chosen] + np.minimum((part * room).astype(np.int64), room - 1))

    def walk(self, every: int = 1) -> WindowBatch:
        """All windows whose origins lie `every` steps apart, counted back from the last origin of each series."""
        if every < 1:
            raise InputError(f"SeriesWindows.walk: every is {every}.", "pass 1 or more.")
        bounds = zip(self.first.tolist(), self.last.tolist(), strict=True)
        origins: list[Integers] = [np.arange(last, first - 1, -every)[::-1] for first, last in bounds]
        series = np.repeat(np.arange(len(origins)), [len(found) for found in origins])
        return self.take(series, np.concatenate(origins))
