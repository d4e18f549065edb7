"""An audit for leaks: whether what a model is given depends on what it may not know."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError

__all__ = ["Leak", "LeakReport", "audit_leaks"]

Floats = npt.NDArray[np.float64]
Prepare = Callable[[list[Floats]], Mapping[str, Any]]


@dataclass(frozen=True)
class Leak:
    """A number that changes when a value changes which may not be known yet."""

    array: str
    """What `prepare` calls the array it is in."""
    index: tuple[int, ...]
    """Where in it."""
    series: int
    step: int
    """The last step of the series that it depends on."""
    late: int
    """How many steps that is beyond what is known: 0 is the first unknown one."""

    def __str__(self) -> str:
        place = f"{self.array}[{', '.join(map(str, self.index))}]"
        return f"{place} depends on step {self.step} of series {self.series}, {self.late + 1} past what is known"


@dataclass(frozen=True)
class LeakReport:
    """What `audit_leaks` found; true if nothing leaks."""

    numbers: int
    """How many numbers were watched."""
    leaks: tuple[Leak, ...]
    """One for each array and series that leak."""

    def __bool__(self) -> bool:
        return not self.leaks

    def __str__(self) -> str:
        if not self.leaks:
            return f"no leak: none of {self.numbers:,} numbers depends on a value that is not known yet"
        return "\n".join([f"{len(self.leaks)} leaks:", *(f"  {leak}" for leak in self.leaks)])

    def check(self) -> None:
        """Raise InputError if anything leaks."""
        if self.leaks:
            raise InputError(str(self), "compute it from the training part, or from what lies before the origin.")


def audit_leaks(prepare: Prepare, series: Sequence[npt.ArrayLike], known: Sequence[int]) -> LeakReport:
    """Prove of what `prepare` makes of these series that no number in it depends on what is not known.

    All values from step ``known[i]`` of series i on are replaced, in four ways: by their mirror image, by far larger
    ones, by zeros, and by NaN. What stays the same to the last bit does not depend on them. What does not is traced
    back to the last step that it depends on. Two uses:

    - *Training*: `prepare` gives the training windows, the scaler's numbers, all that is made before the test part may
      be looked at; `known` is where each series' training part ends.
    - *Forecasts*: `prepare` gives what the network sees at one origin; `known` is that origin.

    Parameters
    ----------
    prepare : callable
        From a list of arrays, as long as those in `series`, to a dict of arrays. It draws the same random numbers each
        time, if any, and gives arrays of the same shapes.
    series : sequence of float arrays (n_i,)
    known : sequence of int

    Raises
    ------
    InputError
        If `prepare` gives other arrays for the same series, or `known` does not fit.
    """
    arrays = [np.array(values, float) for values in series]
    if len(known) != len(arrays) or any(not 0 <= k < len(a) for k, a in zip(known, arrays, strict=False)):
        raise InputError(
            f"audit_leaks: known is {list(known)[:4]}..., for {len(arrays)} series.",
            "give each series a step at which something is still unknown.",
        )
    before = _prepared(prepare, arrays)
    if _differing(before, _prepared(prepare, arrays)):
        raise InputError(
            "audit_leaks: prepare gives other numbers when it is called again.", "start its generator anew in it."
        )
    leaks: dict[tuple[str, int], Leak] = {}
    for i, k in enumerate(known):
        for change in (_mirrored, _larger, np.zeros_like, _missing):
            for name, index in _differing(before, _changed(prepare, arrays, i, k, change)).items():
                step = _last_step(prepare, arrays, before, i, k, change, name)
                if (name, i) not in leaks or leaks[name, i].step < step:
                    leaks[name, i] = Leak(name, index, i, step, step - k)
    return LeakReport(sum(array.size for array in before.values()), tuple(leaks.values()))


def _prepared(prepare: Prepare, arrays: list[Floats]) -> dict[str, npt.NDArray[Any]]:
    return {name: np.array(array) for name, array in prepare([a.copy() for a in arrays]).items()}


def _changed(prepare: Prepare, arrays: list[Floats], i: int, start: int, change: Any) -> dict[str, npt.NDArray[Any]]:
    """What comes out when series i is changed from a step on."""
    other = list(arrays)
    other[i] = np.concatenate([arrays[i][:start], change(arrays[i][start:])])
    return _prepared(prepare, other)


def _last_step(prepare: Prepare, arrays: list[Floats], before: Any, i: int, low: int, change: Any, name: str) -> int:
    """The last step from which on a change still shows, by halving."""
    high = len(arrays[i])
    while high - low > 1:
        middle = (low + high) // 2
        if name in _differing(before, _changed(prepare, arrays, i, middle, change)):
            low = middle
        else:
            high = middle
    return low


def _differing(before: Mapping[str, Any], after: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Arrays that differ, each with the first place where it does. A shape that differs counts too."""
    found: dict[str, tuple[int, ...]] = {}
    for name, array in before.items():
        other = after.get(name)
        if other is None or other.shape != array.shape:
            found[name] = ()
        elif (differs := np.argwhere((array != other) & ~((array != array) & (other != other)))).size:
            found[name] = tuple(int(x) for x in differs[0])
        elif array.ndim == 0 and not np.array_equal(array, other, equal_nan=array.dtype.kind == "f"):
            found[name] = ()
    return found


def _mirrored(values: Floats) -> Floats:
    return 1.0 - values[::-1] * 1.7


def _larger(values: Floats) -> Floats:
    return np.where(np.isnan(values), 1.0, values) * 1e3 + 1e6


def _missing(values: Floats) -> Floats:
    return np.full_like(values, np.nan)
