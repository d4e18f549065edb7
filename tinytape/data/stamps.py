"""Time stamps: reading them, finding their step, and what a calendar says about them."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError

__all__ = ["Grid", "calendar_features", "find_grid", "parse_stamps"]

Stamps = npt.NDArray[Any]
Floats = npt.NDArray[np.float64]

_DAY = 86_400
_SPARSE = 100  # as many places as this for each stamp are no series, but a stamp that is mistyped
_COMPACT = re.compile(r"(\d{4})(\d\d)(\d\d)")


class Grid(NamedTuple):
    """Stamps as places on a grid of equal steps."""

    places: npt.NDArray[np.int64]
    """Where each stamp stands, from 0; what is left out is a gap."""
    stamps: Stamps
    """The stamps of all places, gaps included."""
    step: str
    """The step in words, such as "7 days"."""


def parse_stamps(texts: Sequence[str], name: str = "time") -> Stamps:
    """Read time stamps: dates and times as in ISO 8601 (``/`` for ``-`` will do), ``YYYYMMDD``, or plain numbers.

    Returns
    -------
    array of datetime64[s], or of float64 for plain numbers

    Raises
    ------
    InputError
        If one cannot be read; the message names its row, counted from 1 without the header.
    """
    stripped = [text.strip() for text in texts]
    if all(_is_compact(text) for text in stripped):
        stripped = [_COMPACT.sub(r"\1-\2-\3", text) for text in stripped]
    else:
        numbers = [_number(text) for text in stripped]
        if all(map(math.isfinite, numbers)):
            return np.array(numbers)
    return np.array([_moment(text, name, row) for row, text in enumerate(stripped, 1)], "datetime64[s]")


def find_grid(stamps: Stamps, name: str = "time") -> Grid:
    """Lay rising stamps on a grid of equal steps, which may be months.

    Raises
    ------
    InputError
        If the steps are irregular: if one is not a multiple of the usual one; or if so many are left out that a stamp
        must be wrong.
    """
    if stamps.dtype.kind != "M":
        return _numeric_grid(stamps, name)
    seconds = stamps.astype(np.int64)
    usual = _usual(np.diff(seconds))
    places, rest = np.divmod(seconds - seconds[0], usual)
    if not rest.any():
        _check_sparse(places, stamps, name)
        return Grid(places, stamps[0] + np.arange(places[-1] + 1) * np.timedelta64(usual, "s"), _in_words(usual))
    months = stamps.astype("datetime64[M]")
    within = seconds - months.astype("datetime64[s]").astype(np.int64)
    to_end = (months + 1).astype("datetime64[s]").astype(np.int64) - seconds
    for offset, from_end in ((within, False), (to_end, True)):
        usual_months = _usual(np.diff(months.astype(np.int64)))
        places, rest = np.divmod(months.astype(np.int64) - int(months[0].astype(np.int64)), max(usual_months, 1))
        if (offset == offset[0]).all() and usual_months > 0 and not rest.any():
            first = int(months[0].astype(np.int64)) + int(from_end)
            count: Any = first + usual_months * np.arange(int(places[-1]) + 1)
            starts = count.astype("datetime64[M]").astype("datetime64[s]")
            moved = starts - offset[0] if from_end else starts + offset[0]
            return Grid(places, moved, _count(usual_months, "month"))
    raise _irregular(stamps, np.diff(seconds), usual, _in_words, name)


def _numeric_grid(stamps: Floats, name: str) -> Grid:
    steps = np.diff(stamps)
    usual = float(np.quantile(steps, 0.5, method="lower"))  # one that occurs
    length = float(stamps[-1] - stamps[0])
    usual = length / max(round(length / usual), 1)  # rounding, as of a twelfth, is averaged out
    exact = (stamps - stamps[0]) / usual
    places = np.rint(exact).astype(np.int64)
    if np.abs(exact - places).max() > 0.05 or (np.diff(places) < 1).any():
        raise _irregular(stamps, steps, usual, "{:.6g}".format, name)
    _check_sparse(places, stamps, name)
    return Grid(places, stamps[0] + usual * np.arange(places[-1] + 1), f"{usual:.6g}")


def _check_sparse(places: npt.NDArray[np.int64], stamps: Stamps, name: str) -> None:
    gaps = np.diff(places)
    if places[-1] >= _SPARSE * len(places):
        at = int(np.argmax(gaps))
        raise InputError(
            f"{name}: {places[-1] + 1 - len(places):,} steps are left out, {gaps[at] - 1:,} of them from row {at + 1} "
            f"({stamps[at]}) to row {at + 2} ({stamps[at + 1]}), for {len(places):,} stamps.",
            "correct the stamp, or cut the series there.",
        )


def _irregular(stamps: Stamps, steps: Any, usual: Any, words: Any, name: str) -> InputError:
    ratio = steps / usual
    odd = np.flatnonzero(np.abs(ratio - np.rint(ratio)) > 1e-3)
    at = int(odd[0]) if odd.size else int(np.argmax(np.abs(ratio - 1)))
    return InputError(
        f"{name}: the steps are irregular: {words(usual)} as a rule, but {words(steps[at])} from row {at + 1} "
        f"({stamps[at]}) to row {at + 2} ({stamps[at + 1]}); {max(odd.size, 1)} of {len(steps)} do not fit.",
        "resample the series to equal steps first; whole steps that are left out are fine.",
    )


def calendar_features(stamps: Stamps, seasons: Sequence[int]) -> Floats:
    """What is known about any moment, past or to come: sines and cosines of where it stands in its cycles.

    Parameters
    ----------
    stamps : array of shape (n,)
        Dates give the time of day, the day of the week and the day of the year, as far as they vary between stamps.
        Plain numbers are taken as counts of steps, and give their place in each of `seasons`.
    seasons : sequence of int

    Returns
    -------
    array of shape (n, features)
    """
    if stamps.dtype.kind == "M":
        seconds = stamps.astype(np.int64).astype(float)
        day, step = seconds / _DAY, float(np.median(np.diff(seconds))) / _DAY if len(stamps) > 1 else 1.0
        start = stamps.astype("datetime64[Y]").astype("datetime64[s]").astype(np.int64)
        after = (stamps.astype("datetime64[Y]") + 1).astype("datetime64[s]").astype(np.int64)
        cycles = [(1.0, day), (7.0, (day - 3) / 7), (365.0, (seconds - start) / (after - start))]  # 1970-01-04: Sunday
        phases = [phase for length, phase in cycles if step <= length / 2]
    else:
        phases = [stamps / season for season in seasons]
    angles = 2 * math.pi * np.array(phases).reshape(len(phases), len(stamps)).T
    return np.concatenate([np.sin(angles), np.cos(angles)], axis=1)


def _is_compact(text: str) -> bool:
    found = _COMPACT.fullmatch(text)
    return bool(found) and 1500 < int(found[1]) < 2500 and 1 <= int(found[2]) <= 12 and 1 <= int(found[3]) <= 31


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        return math.nan


def _moment(text: str, name: str, row: int) -> np.datetime64:
    iso = re.sub(r"^(\d{4})/(\d{1,2})(/(\d{1,2}))?", _with_dashes, text).removesuffix("Z").replace(" ", "T", 1)
    try:
        if re.match(r"\d{4}-", iso) and not re.search(r"T.*[+-]", iso):
            return np.datetime64(iso, "s")
    except ValueError:
        pass
    raise InputError(
        f"{name}: row {row} holds {text!r}, which is no time stamp.",
        "write dates as 2024-03-31 or 2024-03-31 14:00 (no time zone), or number the rows.",
    )


def _with_dashes(found: re.Match[str]) -> str:
    return "-".join(part.zfill(2) for part in (found[1], found[2], found[4]) if part)


def _usual(steps: npt.NDArray[np.int64]) -> int:
    kinds, counts = np.unique(steps, return_counts=True)
    return int(kinds[np.argmax(counts)])


def _in_words(seconds: Any) -> str:
    for unit, length in (("day", _DAY), ("hour", 3600), ("minute", 60)):
        if seconds % length == 0:
            return _count(int(seconds) // length, unit)
    return _count(int(seconds), "second")


def _count(number: int, unit: str) -> str:
    return f"{number} {unit}" if number == 1 else f"{number} {unit}s"
