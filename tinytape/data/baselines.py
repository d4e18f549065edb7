"""Forecasts that any model has to beat.

All take the values before the origin, an array of shape (n,) in time order, and how many steps to look ahead, and give
an array of shape (horizon,) in the units of the series. They raise InputError where there are gaps (`fill_gaps` fills
them) or too few values.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError

__all__ = ["LinearAR", "drift", "error_quantiles", "naive", "seasonal_naive"]

Floats = npt.NDArray[np.float64]
Forecast = Callable[[Floats, int], Floats]


def naive(history: npt.ArrayLike, horizon: int) -> Floats:
    """The last value, for all times."""
    return np.full(horizon, _history("naive", history, 1)[-1])


def seasonal_naive(history: npt.ArrayLike, horizon: int, season: int) -> Floats:
    """The last season, of so many steps, again and again."""
    if season < 1:
        raise InputError(f"seasonal_naive: season is {season}.", "pass 1 or more.")
    return np.resize(_history("seasonal_naive", history, season)[-season:], horizon)


def drift(history: npt.ArrayLike, horizon: int) -> Floats:
    """On along the straight line from the first value to the last: a random walk with drift."""
    values = _history("drift", history, 2)
    slope = (values[-1] - values[0]) / (len(values) - 1)
    return values[-1] + slope * np.arange(1, horizon + 1)


class LinearAR:
    """A linear autoregression ``x[t] = c + a_1 x[t-1] + ... + a_p x[t-p]``, by least squares, iterated.

    The order is the one of least AICc (Hurvich & Tsai 1989) among all from 1 to `longest`, each fitted to the same
    rows. One QR decomposition serves them all, since their design matrices are nested.

    Parameters
    ----------
    train : array of shape (n,)
        The training part, without gaps.
    longest : int
        The largest order; never more than a quarter of the training part.

    Attributes
    ----------
    order : int
    intercept : float
    weights : array of shape (order,)
        For the last value, the one before it, and so on.
    """

    def __init__(self, train: npt.ArrayLike, longest: int) -> None:
        values = _history("LinearAR", train, 8)
        longest = max(1, min(longest, len(values) // 4))
        self._center = float(values.mean())  # the columns would else be nearly parallel to the constant one
        centered = values - self._center
        rows = len(values) - longest
        lags = np.lib.stride_tricks.sliding_window_view(centered[:-1], longest)[:, ::-1]
        target = centered[longest:]
        q, r = np.linalg.qr(np.column_stack([np.ones(rows), lags]))
        found = q.T @ target
        left = np.maximum(target @ target - np.cumsum(found**2), 1e-12 * max(float(target @ target), 1e-300))[1:]
        count = np.arange(1, longest + 1) + 2.0  # weights, intercept and variance
        aicc = rows * np.log(left / rows) + 2 * count * rows / np.maximum(rows - count - 1, 1)
        independent = np.abs(np.diag(r))[1:] > 1e-9 * np.abs(r).max()
        usable = np.logical_and.accumulate(independent)
        self.order = int(np.argmin(np.where(usable, aicc, math.inf))) + 1 if usable.any() else 0
        solved = np.linalg.solve(r[: self.order + 1, : self.order + 1], found[: self.order + 1])
        self.intercept, self.weights = float(solved[0] + self._center * (1 - solved[1:].sum())), solved[1:]

    def __call__(self, history: npt.ArrayLike, horizon: int) -> Floats:
        """Forecast from the values before the origin."""
        values = _history("LinearAR", history, self.order)
        recent = np.concatenate([values[len(values) - self.order :], np.empty(horizon)])
        backwards = self.weights[::-1].copy()
        for t in range(self.order, self.order + horizon):
            recent[t] = self.intercept + backwards @ recent[t - self.order : t]
        return recent[self.order :]


def error_quantiles(
    forecast: Forecast, train: npt.ArrayLike, horizon: int, levels: Sequence[float], shortest: int, count: int = 100
) -> Floats:
    """Quantiles of a forecast's errors at each step ahead, over origins spread over the training part.

    Added to its forecasts, they give any method intervals.

    Parameters
    ----------
    forecast : callable
        ``forecast(history, horizon)``.
    train : array of shape (n,)
    horizon : int
    levels : sequence of float
    shortest : int
        The least history that the forecast needs.
    count : int
        How many origins, at most. Default 100.

    Returns
    -------
    array of shape (horizon, levels)
    """
    values = _history("error_quantiles", train, shortest + horizon)
    last = len(values) - horizon
    origins = np.unique(np.linspace(max(shortest, min(last, len(values) // 4)), last, count).astype(int))
    errors = np.stack([values[o : o + horizon] - forecast(values[:o], horizon) for o in origins])
    return np.quantile(errors, levels, axis=0).T


def _history(what: str, history: npt.ArrayLike, least: int) -> Floats:
    values = np.asarray(history, float)
    if values.ndim != 1 or len(values) < least or not np.isfinite(values).all():
        raise InputError(
            f"{what}: history has shape {values.shape} and {np.sum(~np.isfinite(values))} values that are not finite.",
            f"give a vector of {least} or more; fill_gaps fills what is missing.",
        )
    return values
