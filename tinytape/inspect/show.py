"""Tables and pictures of what is inspected."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from typing import Any, cast

from ..engine.errors import InputError, ShapeError

__all__ = ["chosen", "finished", "panels", "table", "tell"]

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


def panels(count: int, axes: Any = None) -> list[Any]:
    """The Axes to draw in, side by side: those that are given, or those of a new figure.

    Raises
    ------
    InputError
        If matplotlib is not installed.
    ShapeError
        If there are not `count` of them.
    """
    if axes is None:
        try:
            from matplotlib.figure import Figure
        except ImportError:
            raise InputError("plot: matplotlib is not installed.", "pip install 'tinytape[models]'.") from None
        figure = Figure(figsize=(6.4 * count, 4.2), layout="constrained")
        return list(figure.subplots(1, count, squeeze=False)[0])
    found = list(cast("Iterable[Any]", axes)) if isinstance(axes, Iterable) else [axes]
    if len(found) != count:
        raise ShapeError(f"plot: {len(found)} axes are given; it takes {count}.", f"pass {count}, or none.")
    return found


def finished(axes: Any, path: str | os.PathLike[str] | None) -> Any:
    """The figure of some Axes, written to a file if there is a path; the ending of its name says in which format."""
    figure = axes.figure
    if path is not None:
        figure.savefig(path, dpi=120)
    return figure
