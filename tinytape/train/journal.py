"""A run's log: a JSON object a line, and the same for TensorBoard."""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np

from ..engine.errors import InputError
from .checkpoint import LOG

__all__ = ["Journal", "Means", "read_log"]


def read_log(folder: str | PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a run's log, each a dict with "step", "epoch", "seconds" and what was logged.

    Raises
    ------
    InputError
        If there is no log in the folder, or it is damaged.
    """
    path = Path(folder) / LOG
    try:
        text = path.read_text("utf-8")
        whole = text[: text.rfind("\n") + 1]  # a kill may have cut the last line short
        return [json.loads(line) for line in whole.splitlines()]
    except OSError as error:
        raise InputError(f"read_log: {str(path)!r} cannot be read: {error.strerror}.", "give a run's folder.") from None
    except ValueError as error:  # of JSON, or of UTF-8
        raise InputError(f"read_log: {str(path)!r} is damaged: {error}.", "mend or delete that line.") from None


class Journal:
    """Writes the log; a checkpoint notes how far it was, and a resumed run goes on from there."""

    def __init__(self, folder: Path, tensorboard: bool) -> None:
        self._folder = folder
        self._file: Any = None  # opened when there is something to write
        self._board: Any = None
        self._make_board: Any = _board_maker() if tensorboard else None
        self._first = 0  # the step that TensorBoard goes on from

    def _lines(self) -> Any:
        """The file, open."""
        if self._file is None:
            try:
                self._file = open(self._folder / LOG, "ab")  # noqa: SIM115 - open as long as the run
            except OSError as error:
                raise InputError(
                    f"Run: nothing can be written in {str(self._folder)!r}: {error.strerror}.", "give another folder."
                ) from None
        return self._file

    def write(self, line: Mapping[str, Any], step: int) -> None:
        """Append a line."""
        plain = {name: _plain(value) for name, value in line.items()}
        self._lines().write(json.dumps(plain).encode() + b"\n")
        if self._make_board is None:
            return
        if self._board is None:
            self._board = self._make_board(str(self._folder / "tensorboard"), purge_step=self._first)
        for name, value in plain.items():
            if isinstance(value, int | float) and name != "step":
                self._board.add_scalar(name, value, step)

    def sync(self) -> int:
        """Bring the log to the disk; how long it is."""
        file = self._lines()
        file.flush()
        os.fsync(file.fileno())
        if self._board is not None:
            self._board.flush()
        return file.tell()

    def rewind(self, length: int, step: int) -> None:
        """Drop what was written after a checkpoint."""
        self.close()
        path = self._folder / LOG
        if path.exists() and path.stat().st_size > length:
            os.truncate(path, length)
        self._first = step + 1

    def history(self, name: str) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        """Steps and values of what was logged under a name."""
        if self._file is not None:
            self._file.flush()
        lines = [line for line in read_log(self._folder) if line.get(name) is not None]
        return np.array([line["step"] for line in lines], np.int64), np.array([line[name] for line in lines])

    def close(self) -> None:
        """Write all and let the files go."""
        for file in (self._file, self._board):
            if file is not None:
                file.close()
        self._file = self._board = None


class Means:
    """Means of numbers by name, over as many steps as each was told in.

    Attributes
    ----------
    sums : dict of [float, int]
        The sum, and of how many numbers.
    """

    def __init__(self) -> None:
        self.sums: dict[str, list[float]] = {}

    def add(self, told: Mapping[str, float]) -> None:
        """Take a step's numbers in."""
        for name, value in told.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = [total + float(value), count + 1]

    def take(self) -> dict[str, float]:
        """The means so far, to begin anew."""
        means = {name: total / count for name, (total, count) in self.sums.items()}
        self.sums = {}
        return means


def _plain(value: Any) -> Any:
    """A value that JSON has; it has no NaN and no infinity."""
    if value is None or isinstance(value, str | bool | int):
        return value
    number = float(value)
    return number if math.isfinite(number) else None


def _board_maker() -> Any:
    try:
        return importlib.import_module("tensorboardX").SummaryWriter
    except ImportError:
        raise InputError(
            "Run: tensorboardX is not installed.", "pip install 'tinytape[tensorboard]', or leave it out."
        ) from None
