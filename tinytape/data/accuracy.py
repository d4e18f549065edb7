"""How good forecasts are: of points, and of quantiles.

Targets may hold NaN where a value is missing; it is passed over. Arrays are (..., horizon), forecasts of quantiles
have one more axis at the end. Each score is one number, the mean over all targets; shapes that do not fit raise
ShapeError, and InputError says that no target is known.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError, ShapeError

__all__ = ["coverage", "mase", "pinball", "rmse", "smape"]

Floats = npt.NDArray[np.float64]


def mase(target: npt.ArrayLike, forecast: npt.ArrayLike, scale: npt.ArrayLike) -> float:
    """Mean absolute scaled error (Hyndman & Koehler 2006).

    Parameters
    ----------
    target, forecast : array
    scale : float, or array that broadcasts
        The mean absolute error of the seasonal naive forecast within the training part: ``Scaler.fit(train,
        "seasonal", season).scale``. 1 is what that forecast has there, one season ahead.
    """
    y, f = _pair("mase", target, forecast)
    return _mean("mase", np.abs(y - f) / np.asarray(scale, float))


def smape(target: npt.ArrayLike, forecast: npt.ArrayLike) -> float:
    """Symmetric mean absolute percentage error, ``200 |y - f| / (|y| + |f|)``: 0 to 200, as in the M4 competition."""
    y, f = _pair("smape", target, forecast)
    total = np.abs(y) + np.abs(f)
    return _mean("smape", 200 * np.abs(y - f) / np.where(total == 0, 1.0, total))


def rmse(target: npt.ArrayLike, forecast: npt.ArrayLike) -> float:
    """Root of the mean squared error, in the units of the series."""
    y, f = _pair("rmse", target, forecast)
    return math.sqrt(_mean("rmse", np.square(y - f)))


def pinball(
    target: npt.ArrayLike, quantiles: npt.ArrayLike, levels: Sequence[float], scale: npt.ArrayLike = 1.0
) -> float:
    """Mean pinball loss over all levels: what quantile forecasts are fitted to, and the fair score for them.

    Parameters
    ----------
    target : array (..., horizon)
    quantiles : array (..., horizon, levels)
    levels : sequence of float
    scale : float, or array that broadcasts with target
        Divided by, so that series of different units can be averaged. Default 1.
    """
    y, q = _pair("pinball", target, quantiles, len(levels))
    error, level = y[..., None] - q, np.asarray(levels, float)
    loss = np.maximum(level * error, (level - 1) * error)
    return _mean("pinball", loss.mean(-1) / np.asarray(scale, float))


def coverage(target: npt.ArrayLike, low: npt.ArrayLike, high: npt.ArrayLike) -> float:
    """The share of targets from `low` to `high`, to be set beside the share that the interval promises."""
    y, a = _pair("coverage", target, low)
    _, b = _pair("coverage", target, high)
    return _mean("coverage", np.where(np.isnan(y), np.nan, (y >= a) & (y <= b)))


def _mean(what: str, scores: Floats) -> float:
    known = ~np.isnan(scores)
    if not known.any():
        raise InputError(f"{what}: all {scores.size} targets are missing.", "give some that are known.")
    return float(scores[known].mean())


def _pair(what: str, target: Any, forecast: Any, levels: int | None = None) -> tuple[Floats, Floats]:
    y, f = np.asarray(target, float), np.asarray(forecast, float)
    wanted = y.shape if levels is None else (*y.shape, levels)
    if f.shape != wanted:
        raise ShapeError(f"{what}: forecasts have shape {f.shape}, targets {y.shape}.", f"give {wanted}.")
    return y, f
