"""Scaling of series, fitted on the training part."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError

__all__ = ["Scaler"]

Floats = npt.NDArray[np.float64]


@dataclass(frozen=True)
class Scaler:
    """``(x - center) / scale`` and back, with two numbers that were taken from a training part.

    Examples
    --------
    >>> split = tt.data.split_in_time(len(series), test=0.2)
    >>> scaler = tt.data.Scaler.fit(series.values[: split.train])
    >>> scaled = scaler.transform(series.values)
    """

    center: float
    scale: float

    @classmethod
    def fit(
        cls, train: npt.ArrayLike, kind: Literal["standard", "robust", "seasonal"] = "standard", season: int = 1
    ) -> Scaler:
        """Take centre and scale from a training part; missing values (NaN) are passed over.

        Parameters
        ----------
        train : array of shape (n,)
        kind : {"standard", "robust", "seasonal"}
            Mean and standard deviation; median and the range between the quartiles; mean, and the mean absolute
            difference between values that lie a season apart, which is what MASE is measured in.
        season : int
            For "seasonal".

        Raises
        ------
        InputError
            If there is nothing to take a scale from: no values, constant ones, or none a season apart; or if `kind` or
            `season` is out of range.
        """
        values = np.asarray(train, float)
        advice = "leave the series out, or give a longer training part."
        if values.ndim != 1 or np.isnan(values).all():
            raise InputError(f"Scaler.fit: train has shape {values.shape} and no values in it.", advice)
        if kind == "standard":
            center, scale = np.nanmean(values), np.nanstd(values)
        elif kind == "robust":
            low, center, high = np.nanpercentile(values, [25, 50, 75])
            scale = high - low
        elif kind == "seasonal":
            if season < 1:
                raise InputError(f"Scaler.fit: season is {season}.", "pass 1 or more.")
            apart = np.abs(values[season:] - values[:-season])
            if np.isnan(apart).all():
                raise InputError(f"Scaler.fit: no two of {len(values)} values lie {season} steps apart.", advice)
            center, scale = np.nanmean(values), np.nanmean(apart)
        else:
            raise InputError(f"Scaler.fit: kind is {kind!r}.", "pass 'standard', 'robust' or 'seasonal'.")
        if not scale > 0:
            what = "constant" if np.nanmin(values) == np.nanmax(values) else f"without any {kind} variation"
            raise InputError(f"Scaler.fit: the training part ({len(values)} values) is {what}.", advice)
        return cls(float(center), float(scale))

    def transform(self, values: npt.ArrayLike) -> Floats:
        """From the units of the series to scaled ones."""
        return (np.asarray(values, float) - self.center) / self.scale

    def inverse(self, scaled: npt.ArrayLike) -> Floats:
        """From scaled units back to those of the series."""
        return np.asarray(scaled, float) * self.scale + self.center

    def state_dict(self) -> dict[str, float]:
        """For `tt.io.save_state`, so that a model is never parted from the scale of its data."""
        return {"center": self.center, "scale": self.scale}

    @classmethod
    def from_state_dict(cls, state_dict: Mapping[str, Any]) -> Scaler:
        """The inverse of `state_dict`."""
        return cls(float(state_dict["center"]), float(state_dict["scale"]))
