"""Series over time: reading them from CSV and Parquet, saying what is wrong with them, and splitting them in time."""

from __future__ import annotations

import csv
import importlib
import io
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError
from .stamps import find_grid, parse_stamps
from .text import read_text

__all__ = ["Series", "Split", "fill_gaps", "read_series", "split_in_time"]

Floats = npt.NDArray[np.float64]
Column = list[str] | npt.NDArray[Any]
Duplicates = Literal["refuse", "first", "last", "mean"]

MISSING = {"", "na", "n/a", "nan", "null", "none", ".", "?", "-"}
TIME_NAMES = ("time", "date", "datetime", "timestamp", "ds", "stamp", "month", "week", "day", "hour", "year")


@dataclass(frozen=True, eq=False)
class Series:
    """Values at equal steps in time.

    Attributes
    ----------
    name : str
    values : float64 array of shape (n,)
        NaN where a value is missing.
    stamps : array of shape (n,), or None
        datetime64[s] or float64; None where there were none.
    step : str
        The step in words.
    notes : tuple of str
        What was found, and done about it, when the series was read.
    """

    name: str
    values: Floats
    stamps: npt.NDArray[Any] | None = None
    step: str = "1 row"
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.values)

    def __str__(self) -> str:
        """A line that says what the series is, and what it lacks."""
        ends = "" if self.stamps is None else f" from {_shown(self.stamps[0])} to {_shown(self.stamps[-1])}"
        missing = np.isnan(self.values)
        gaps = "none missing"
        if missing.any():
            start, length = _longest(missing)
            where = f"row {start + 1}" if self.stamps is None else _shown(self.stamps[start])
            gaps = f"{missing.sum():,} missing ({missing.mean():.1%}), at most {length} in a row (from {where})"
        return "; ".join([f"{self.name}: {len(self):,} values{ends}, every {self.step}", gaps, *self.notes])


class Split(NamedTuple):
    """Where the training part of a series ends, where the validation part ends, and where the series ends."""

    train: int
    valid: int
    end: int


def read_series(
    path: str | PathLike[str],
    columns: str | Sequence[str] | None = None,
    time: str | None = None,
    by: str | None = None,
    *,
    sort: bool = False,
    duplicates: Duplicates = "refuse",
) -> list[Series]:
    """Read one series or many from a CSV or Parquet file with a header.

    Nothing is repaired in silence: a step that is left out becomes a missing value, and what was found is in
    ``str(series)``; what cannot be read one way only is refused.

    Parameters
    ----------
    path : path
        Comma, semicolon or tab between fields. A name that ends in ``.parquet`` needs pyarrow.
    columns : str or list of str, optional
        What to read. Default: all columns but `time` and `by` that hold numbers, half of them at least: a single word
        among numbers is refused, not passed over.
    time : str, optional
        The column of time stamps. Default: the first one called time, date, ds, month or the like, if there is one.
    by : str, optional
        The column that says which series a row belongs to, where many lie below each other.
    sort : bool
        Put rows in the order of their stamps, instead of refusing them. Default False.
    duplicates : {"refuse", "first", "last", "mean"}
        What to do with rows of equal stamps. Default "refuse".

    Raises
    ------
    InputError
        If the file or a column is missing, a column is empty, holds text or infinity, or the stamps cannot be read,
        are not in order, occur twice, are irregular, or leave out nearly everything.
    """
    if duplicates not in ("refuse", "first", "last", "mean"):
        raise InputError(f"duplicates: got {duplicates!r}.", "pass 'refuse', 'first', 'last' or 'mean'.")
    table = _read_parquet(path) if str(path).lower().endswith((".parquet", ".pq")) else _read_csv(path)
    named = [columns] if isinstance(columns, str) else columns
    for name in [*(named or ()), *(n for n in (time, by) if n is not None)]:
        if name not in table:
            raise InputError(f"{path}: there is no column {name!r}.", f"there are: {_listed(table)}.")
    if time is None:
        time = next((name for want in TIME_NAMES for name in table if name.strip().lower() == want), None)
        time = None if named is not None and time in named else time
    if named is None:
        named = [name for name in table if name not in (time, by) and name.strip() and _holds_numbers(table[name])]
    if not named:
        raise InputError(f"{path}: there is no column of numbers.", f"there are: {_listed(table)}.")
    stamps = None if time is None else _stamps(table[time], time)
    groups = _groups(table[by]) if by is not None else {"": slice(None)}
    found: list[Series] = []
    for group, rows in groups.items():
        for name in named:
            values = _numbers(table[name], f"column {name!r}")[rows]
            label = " ".join(part for part in (group, name if len(named) > 1 or not group else "") if part)
            found.append(_series(label, values, None if stamps is None else (time, stamps[rows]), sort, duplicates))
    return found


def split_in_time(length: int, test: float, valid: float = 0.0) -> Split:
    """Cut a series into a training, a validation and a test part, in this order in time.

    Parameters
    ----------
    length : int
        Of the series.
    test, valid : float or int
        How much goes to the parts at the end: a number of steps if it is 1 or more, else a fraction.

    Raises
    ------
    InputError
        If nothing is left to train on.
    """
    sizes = [int(part) if part >= 1 else int(part * length) for part in (test, valid)]
    if min(test, valid) < 0 or sum(sizes) >= length:
        raise InputError(
            f"split_in_time: test = {test} and valid = {valid} leave nothing of {length} steps to train on.",
            "give fractions that sum to less than 1, or numbers of steps.",
        )
    end = length - sizes[0]
    return Split(end - sizes[1], end, length)


def fill_gaps(values: npt.ArrayLike, season: int = 1) -> Floats:
    """Fill missing values from what came before them, never from what came after.

    A gap goes on from the last value with the changes of a season before; in the first season, which has none before
    it, it keeps the last value. What is missing at the start takes the first value there is: the one look ahead.

    Parameters
    ----------
    values : array of shape (n,)
        NaN where missing.
    season : int
        In steps. Default 1: a gap goes on in a straight line.

    Returns
    -------
    float64 array of shape (n,)
        A copy.

    Raises
    ------
    InputError
        If all values are missing, or `season` is below 1.
    """
    if season < 1:
        raise InputError(f"fill_gaps: season is {season}.", "pass 1 or more.")
    filled = np.array(values, float)
    known = np.flatnonzero(~np.isnan(filled))
    if not known.size:
        raise InputError(f"fill_gaps: all {filled.size} values are missing.", "give a series that has some.")
    filled[: known[0]] = filled[known[0]]
    for t in np.flatnonzero(np.isnan(filled)):
        change = filled[t - season] - filled[t - season - 1] if t > season else 0.0
        filled[t] = filled[t - 1] + change
    return filled


# ---- tables ---------------------------------------------------------------------------------------------------------


def _read_csv(path: str | PathLike[str]) -> dict[str, Column]:
    text = read_text(path, 1).strip("\n")
    separator = max(",;\t", key=text.partition("\n")[0].count)
    try:
        rows = list(csv.reader(io.StringIO(text), delimiter=separator))
    except csv.Error as error:
        raise InputError(f"{path}: this is no CSV file ({error}).", "is there a quotation mark too many?") from None
    header, body = (rows[0], rows[1:]) if rows else ([], [])
    if len(header) > 1:
        body = [row for row in body if row]
    if not header:
        raise InputError(f"{path}: there is nothing in it.", "give a file with a header and rows below it.")
    if all(_to_float(name) is not None and name.strip().lower() not in MISSING for name in header):
        raise InputError(f"{path}: the first line holds numbers.", "write the names of the columns above them.")
    if len(set(header)) < len(header):
        twice = next(name for name in header if header.count(name) > 1)
        raise InputError(f"{path}: {header.count(twice)} columns are called {twice!r}.", "give each a name of its own.")
    for number, row in enumerate(body, 1):
        if len(row) != len(header):
            raise InputError(
                f"{path}: row {number} has {len(row)} fields, the header has {len(header)}.",
                "each row needs a field for each column; write NA for a missing value.",
            )
    if len(body) < 2:
        raise InputError(
            f"{path}: got {len(body)} rows below the header, at least 2 are needed.", "give a longer file."
        )
    return {name: [row[i] for row in body] for i, name in enumerate(header)}


def _read_parquet(path: str | PathLike[str]) -> dict[str, Column]:
    try:
        parquet: Any = importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise InputError(
            f"{path}: pyarrow is needed to read Parquet, and is not installed.", "pip install pyarrow, or give a CSV."
        ) from None
    if not Path(path).is_file():
        raise InputError(f"path: there is no file {str(path)!r}", "check the spelling, or give a full path")
    try:
        table = parquet.read_table(path)
    except (OSError, ValueError) as error:  # pyarrow's own errors are ValueErrors
        raise InputError(
            f"{path}: this is no Parquet file ({str(error).splitlines()[0]}).", "check the file."
        ) from None
    columns: dict[str, Column] = {}
    for name in table.column_names:
        column: list[Any] = table.column(name).to_pylist()
        columns[name] = ["" if value is None else str(value) for value in column]
    return columns


def _groups(column: Column) -> dict[str, Any]:
    """Rows of each group, in the order in which the groups first occur."""
    rows: dict[str, list[int]] = {}
    for i, key in enumerate(column):
        rows.setdefault(str(key), []).append(i)
    return {key: np.array(found) for key, found in rows.items()}


def _to_float(text: str) -> float | None:
    """A number; NaN for what means "missing"; None for other text."""
    text = text.strip()
    if text.lower() in MISSING:
        return math.nan
    try:
        return float(text)
    except ValueError:
        return None


def _holds_numbers(column: Column) -> bool:
    """Whether at least half of what a column holds are numbers; also where it holds nothing."""
    held = [number for number in (_to_float(str(text)) for text in column) if number is None or number == number]
    return 2 * sum(number is not None for number in held) >= len(held)


def _numbers(column: Column, what: str) -> Floats:
    found = [_to_float(str(text)) for text in column]
    for row, number in enumerate(found, 1):
        if number is None:
            raise InputError(
                f"{what}: row {row} holds {str(column[row - 1])!r}, a number is needed.",
                "correct it, or leave the field empty if the value is missing.",
            )
        if math.isinf(number):
            raise InputError(f"{what}: row {row} is infinite.", "leave the field empty if the value is missing.")
    values = np.array(found, float)
    if np.isnan(values).all():
        raise InputError(f"{what} is empty: all {len(values)} values are missing.", "name another column.")
    return values


# ---- time -----------------------------------------------------------------------------------------------------------


def _stamps(column: Column, name: str) -> npt.NDArray[Any]:
    texts = [str(text) for text in column]
    for row, text in enumerate(texts, 1):
        if text.strip().lower() in MISSING:
            raise InputError(f"{name}: row {row} has no time stamp.", "complete it, or delete the row.")
    return parse_stamps(texts, name)


def _series(name: str, values: Floats, timed: tuple[Any, Any] | None, sort: bool, duplicates: str) -> Series:
    """A series on a grid of equal steps; `timed` is the name of the column of stamps, and they."""
    if np.isnan(values).all():
        raise InputError(f"{name} is empty: all {len(values)} values are missing.", "leave it out.")
    if timed is None:
        return Series(name, values)
    time, stamps = timed
    notes: list[str] = []
    back = np.flatnonzero(np.diff(stamps) < np.zeros(1, np.diff(stamps).dtype))
    if back.size:
        row = int(back[0])
        if not sort:
            raise InputError(
                f"{name}: the time stamps (column {time!r}) are not sorted: row {row + 2} ({_shown(stamps[row + 1])}) "
                f"is before row {row + 1} ({_shown(stamps[row])}); {back.size} such places.",
                "sort the file, ask for sort, or name another column of time stamps.",
            )
        order = np.argsort(stamps, kind="stable")
        values, stamps = values[order], stamps[order]
        notes.append(f"sorted by time ({back.size} places were out of order)")
    firsts, counts = np.unique(stamps, return_index=True, return_counts=True)[1:]
    if (counts > 1).any():
        if duplicates == "refuse":
            worst = int(np.argmax(counts > 1))
            raise InputError(
                f"{name}: the time stamp {_shown(stamps[firsts[worst]])} occurs {counts[worst]} times; "
                f"{(counts > 1).sum()} stamps are duplicates.",
                "remove the duplicates, or ask for the first, last or mean of them.",
            )
        values, stamps = _merged(values, firsts, counts, duplicates), stamps[firsts]
        notes.append(f"{(counts > 1).sum()} duplicate stamps, of which the {duplicates} was taken")
    if len(stamps) < 3:
        raise InputError(f"{name}: got {len(stamps)} time stamps, at least 3 are needed.", "give a longer series.")
    grid = find_grid(stamps, name)
    placed = np.full(len(grid.stamps), np.nan)
    placed[grid.places] = values
    if left_out := len(placed) - len(values):
        notes.append(f"{left_out:,} of them because the step is left out in the file")
    return Series(name, placed, grid.stamps, grid.step, tuple(notes))


def _merged(values: Floats, firsts: Any, counts: Any, how: str) -> Floats:
    if how == "mean":
        known = ~np.isnan(values)
        sums = np.add.reduceat(np.where(known, values, 0.0), firsts)
        with np.errstate(invalid="ignore"):  # 0/0 is NaN: all were missing
            return sums / np.add.reduceat(known.astype(float), firsts)
    return values[firsts if how == "first" else firsts + counts - 1]


def _longest(missing: npt.NDArray[np.bool_]) -> tuple[int, int]:
    """Start and length of the longest run."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], missing, [False]]).astype(np.int8)))
    starts, lengths = edges[::2], edges[1::2] - edges[::2]
    return int(starts[lengths.argmax()]), int(lengths.max())


def _shown(stamp: Any) -> str:
    if isinstance(stamp, float):
        return f"{stamp:.10g}"
    return str(stamp).removesuffix("T00:00:00").replace("T", " ")


def _listed(table: Mapping[str, Column]) -> str:
    names = [repr(name) for name in table]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
