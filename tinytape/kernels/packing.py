"""Packing: a matrix laid out in the order in which a product reads it.

B[k, n] becomes panels of `panel_columns` columns, each a block of k contiguous rows. The last panel is as many whole
vectors wide as its columns need, filled up with zeros. The panel of column j starts at element ``k * j``.
"""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

from functools import partial

from .compiler import kernel
from .lanes import Lanes, lanes_of, routine, size_of
from .tiles import VECTORS
from .value import Value, select

__all__ = ["copy_strips", "pack", "pack_steps", "packed_columns", "panel_columns"]

_ROWS = 8  # copied at a time: rows a power of two apart share one set of the cache, which has no more places
_AHEAD = 256  # bytes by which each of these rows is prefetched: they are too many for the processor to see them coming


@routine
def copy_strips(
    lanes: Lanes,
    steps: Value,
    rows: Value,
    strips: Value,
    width: Value,
    source: Value,
    source_step: Value,
    source_row: Value,
    source_strip: Value,
    target: Value,
    target_row: Value,
    target_strip: Value,
) -> None:
    """Cut steps x rows contiguous rows into strips of `width` columns, at most a panel, and put each strip by itself.

    Whole vectors are written, filled up with zeros.
    """
    source_step, source_row, source_strip = (s * lanes.size for s in (source_step, source_row, source_strip))
    target_row, target_strip = target_row * lanes.size, target_strip * lanes.size
    target_step = rows * target_row

    def copy(masks: list[Value | None]) -> None:
        with lanes.loop(steps) as t, lanes.loop(rows, step=_ROWS) as first:
            begin, goal = source + t * source_step, target + t * target_step
            last = select(first + _ROWS < rows, first + _ROWS, rows)
            with lanes.loop(strips) as j, lanes.loop(last, start=first) as i:
                from_ = begin + j * source_strip + i * source_row
                to = goal + j * target_strip + i * target_row
                for v, mask in enumerate(masks):
                    lanes.prefetch(from_ + (v * lanes.bytes + _AHEAD))
                    lanes.store(lanes.load(from_ + v * lanes.bytes, mask), to + v * lanes.bytes)

    def copy_ragged(vectors: int) -> None:
        copy([None] * (vectors - 1) + [lanes.first(width - (vectors - 1) * lanes.count)])

    lanes.choose(
        width.equals(VECTORS * lanes.count),
        partial(copy, [None] * VECTORS),
        lambda: lanes.switch(lanes.vectors(width), {v: partial(copy_ragged, v) for v in range(1, VECTORS + 1)}),
    )


@routine
def transpose_strip(
    lanes: Lanes, k: Value, width: Value, source: Value, source_column: Value, target: Value, target_row: Value
) -> None:
    """Turn at most a vector of columns, each contiguous, into k rows of a whole vector, filled up with zeros."""
    source_column, target_row = source_column * lanes.size, target_row * lanes.size
    lines = range(lanes.count)

    def transposed(start: Value, masks: list[Value | None]) -> list[Value]:
        begin = source + start * lanes.size
        return lanes.transpose([lanes.load(begin + source_column * i, masks[i]) for i in lines])

    whole = select(width.equals(lanes.count), lanes.quotient(k, lanes.count) * lanes.count, 0)
    with lanes.loop(whole, step=lanes.count) as start:
        for i, row in enumerate(transposed(start, [None for _ in lines])):
            lanes.store(row, target + (start + i) * target_row)
    with lanes.loop(k, start=whole, step=lanes.count) as start:
        height = k - start
        masks: list[Value | None] = [lanes.first(select(width > i, height, 0)) for i in lines]
        for i, row in enumerate(transposed(start, masks)):
            with lanes.builder.if_then((height > i).raw):
                lanes.store(row, target + (start + i) * target_row)


@routine
def gather_strip(
    lanes: Lanes,
    k: Value,
    width: Value,
    source: Value,
    source_row: Value,
    source_column: Value,
    target: Value,
    target_row: Value,
) -> None:
    """Copy at most a vector of columns of any strides to k rows of a whole vector, filled up with zeros."""
    source_row, source_column, target_row = (s * lanes.size for s in (source_row, source_column, target_row))
    with lanes.loop(k) as i:
        lanes.store(lanes.zero(), target + i * target_row)
        with lanes.loop(width) as j:
            lanes.put(lanes.get(source + i * source_row + j * source_column), target + i * target_row + j * lanes.size)


@kernel(inline="always")
def panel_columns(zero):
    """How many columns a panel has."""
    return VECTORS * lanes_of(zero)


@kernel(inline="always")
def packed_columns(zero, n):
    """How many columns the panels of `n` columns have, zeros included."""
    lanes = lanes_of(zero)
    return (n + lanes - 1) // lanes * lanes


@kernel
def pack_steps(zero, steps, rows, n, b, b_step, b_row, packed):
    """Pack n columns of steps x rows contiguous rows."""
    size, panel = size_of(zero), panel_columns(zero)
    k = steps * rows
    whole = n // panel
    copy_strips(zero, steps, rows, whole, panel, b, b_step, b_row, panel, packed, panel, k * panel)
    done = whole * panel
    rest = n - done
    columns = packed_columns(zero, rest)
    copy_strips(zero, steps, rows, 1, rest, b + done * size, b_step, b_row, 0, packed + done * k * size, columns, 0)


@kernel
def pack(zero, k, n, b, b_row, b_column, packed):
    """Pack B[k, n] of any strides."""
    size, lanes, panel = size_of(zero), lanes_of(zero), panel_columns(zero)
    if b_column == 1:
        pack_steps(zero, 1, k, n, b, 0, b_row, packed)
        return
    for start in range(0, n, panel):
        columns = packed_columns(zero, min(panel, n - start))
        for column in range(start, min(start + columns, n), lanes):
            width = min(lanes, n - column)
            source = b + column * b_column * size
            target = packed + (start * k + column - start) * size
            if b_row == 1:
                transpose_strip(zero, k, width, source, b_column, target, columns)
            else:
                gather_strip(zero, k, width, source, b_row, b_column, target, columns)
