"""Tables and pictures of what is inspected."""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from typing import Any

from ..engine.errors import InputError

__all__ = ["chosen", "new_figure", "save", "table", "tell"]

_log = logging.getLogger("tinytape.inspect")


def table(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    """Lines of a table, columns to the right."""
    cells = [[*map(str, heads)], *[[c if isinstance(c, str) else f"{c:.3g}" for c in row] for row in rows]]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells]


def chosen(count: int, most: int = 12) -> list[int]:
    """Which of `count` rows a table shows: all, or some at equal distances and the last."""
    every = -(-count // most)
    return sorted({*range(0, count, every), count - 1})


def tell(cost: str) -> None:
    """Say what is about to be computed, to whoever listens to the logger ``tinytape.inspect``."""
    _log.info("tinytape: %s", cost)


def new_figure(columns: int = 1) -> Any:
    """An empty figure, and its axes side by side.

    Raises
    ------
    InputError
        If matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise InputError("draw: matplotlib is not installed.", "pip install matplotlib.") from None
    figure = Figure(figsize=(6.4 * columns, 4.2), layout="constrained")
    return figure, figure.subplots(1, columns)


def save(figure: Any, path: str | os.PathLike[str]) -> None:
    """Write a figure to a file; the ending of its name says in which format."""
    figure.savefig(path, dpi=120)
