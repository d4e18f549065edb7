"""The lag matrix: how strongly the loss of each step depends on the state of each step before."""

from __future__ import annotations

import os
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError
from . import show
from .verdict import Verdict, judge

__all__ = ["LagMatrix"]

Norms = npt.NDArray[np.float64]


class LagMatrix(NamedTuple):
    """Norms of dL_t/dh_k.

    Attributes
    ----------
    steps : array of int, (n,)
        The steps t whose losses were taken.
    norms : dict of (str, str) to array (n, T)
        By run and leaf of the state; entry (i, k) is the norm of ``dL[steps[i]]/dh[k]``.
    reverse : dict of str to bool
        By run: whether its loop goes backwards, so that losses depend on later states.
    """

    steps: npt.NDArray[np.int64]
    norms: dict[tuple[str, str], Norms]
    reverse: dict[str, bool]

    def by_lag(self, run: str | None = None, leaf: str | None = None) -> Norms:
        """The root mean square over t of the norm of dL_t/dh_(t - lag), for lag 0, 1, 2, and so on."""
        found, reverse = self._norms(run, leaf)
        count = found.shape[1]
        total, seen = np.zeros(count), np.zeros(count)
        for t, row in zip(self.steps, found, strict=True):
            back = row[t:] if reverse else row[t::-1]
            total[: len(back)] = np.hypot(total[: len(back)], back)
            seen[: len(back)] += 1
        return total[seen > 0] / np.sqrt(seen[seen > 0])

    def verdict(self, run: str | None = None, leaf: str | None = None) -> Verdict:
        """What becomes of a gradient with the lag."""
        return judge(np.log2(self.by_lag(run, leaf)))

    def _norms(self, run: str | None, leaf: str | None) -> tuple[Norms, bool]:
        for (a, b), found in self.norms.items():
            if run in (None, a) and leaf in (None, b):
                return found, self.reverse[a]
        there = ", ".join(f"{a} {b}" for a, b in self.norms)
        raise InputError(f"lag matrix: there is no {run!r}, {leaf!r}.", f"there are {there}.")

    def __str__(self) -> str:
        columns = {key: self.by_lag(*key) for key in self.norms}
        count = max(map(len, columns.values()))
        heads = ["lag", *(f"{run} {leaf}" for run, leaf in columns)]
        rows: list[list[Any]] = [
            [str(lag), *(c[lag] if lag < len(c) else "" for c in columns.values())] for lag in show.chosen(count)
        ]
        lines = [f"norms of dL_t/dh_(t - lag), from {len(self.steps)} backward walks", *show.table(heads, rows), ""]
        return "\n".join([*lines, *(f"{run} {leaf}: {self.verdict(run, leaf)}" for run, leaf in columns)])

    def plot(
        self,
        path: str | os.PathLike[str] | None = None,
        axes: Any = None,
        *,
        run: str | None = None,
        leaf: str | None = None,
    ) -> Any:
        """Draw the matrix as an image, on a logarithmic scale.

        Parameters
        ----------
        path : path, optional
            Where to save the picture.
        axes : Axes of matplotlib, optional
            Where to draw. Default: a new figure.
        run, leaf : str, optional
            Default: the first run, and the first leaf of its state.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        InputError
            If matplotlib is not installed.
        """
        found, _ = self._norms(run, leaf)
        (axes,) = show.panels(1, axes)
        with np.errstate(divide="ignore"):
            image = np.where(found > 0, np.log10(found), np.nan)
        shown = axes.imshow(
            image, origin="lower", aspect="auto", extent=(-0.5, found.shape[1] - 0.5, 0, len(found)), cmap="viridis"
        )
        ticks = show.chosen(len(self.steps), 6)
        axes.set_yticks([i + 0.5 for i in ticks], [str(self.steps[i]) for i in ticks])
        axes.set(xlabel="state of step k", ylabel="loss of step t", title="log10 of the norm of dL_t/dh_k")
        axes.figure.colorbar(shown, ax=axes)
        return show.finished(axes, path)
