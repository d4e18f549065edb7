"""Sums over rows, as in the gradients of biases."""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

from .compiler import kernel
from .lanes import Lanes, Variable, lanes_of, routine, size_of
from .value import Value

__all__ = ["sum_columns"]

_STRIP = 4  # vectors of columns that are summed side by side


@routine
def sum_strip(
    lanes: Lanes,
    steps: Value,
    rows: Value,
    width: Value,
    a: Value,
    a_step: Value,
    a_row: Value,
    out: Value,
    add: Value,
) -> None:
    """``out[width] = (out if add else 0)`` plus sums of columns, of `_STRIP` whole vectors or at most one.

    Each step is summed apart, which keeps rounding errors small.
    """
    a_step, a_row = a_step * lanes.size, a_row * lanes.size

    def write(vectors: int, mask: Value | None) -> None:
        places = [out + v * lanes.bytes for v in range(vectors)]
        totals = [Variable(lanes.zero()) for _ in places]
        with lanes.loop(steps) as t:
            parts = [Variable(lanes.zero()) for _ in places]
            with lanes.loop(rows) as i:
                for v, part in enumerate(parts):
                    part.value += lanes.load(a + t * a_step + i * a_row + v * lanes.bytes, mask)
            for total, part in zip(totals, parts, strict=True):
                total.value += part.value
        with lanes.builder.if_then(add.differs(0).raw):
            for total, place in zip(totals, places, strict=True):
                total.value += lanes.load(place, mask)
        for total, place in zip(totals, places, strict=True):
            lanes.store(total.value, place, mask)

    lanes.choose(
        width > lanes.count,
        lambda: write(_STRIP, None),
        lambda: write(1, lanes.first(width)),
    )


@kernel
def sum_columns(zero, steps, rows, n, a, a_step, a_row, out, add):
    """``out[n] = (out if add else 0)`` plus the sum of all rows of A."""
    size, lanes = size_of(zero), lanes_of(zero)
    column = 0
    while column < n:
        width = _STRIP * lanes if n - column >= _STRIP * lanes else min(lanes, n - column)
        sum_strip(zero, steps, rows, width, a + column * size, a_step, a_row, out + column * size, add)
        column += width
