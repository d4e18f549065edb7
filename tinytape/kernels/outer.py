"""Outer products summed over rows, as in the gradients of weights: C = A.T @ B."""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

from .compiler import kernel
from .lanes import size_of
from .multiply import AHEAD, BLOCK, begin_of_part, part_count
from .packing import copy_strips, pack_steps, packed_columns, panel_columns
from .tiles import ROWS, tile

__all__ = ["block_tiles", "multiply_block", "multiply_outer", "scratch_of_outer"]

_DEPTH = 512  # rows of A and B for which C is gone over once
_ALIGNMENT = 64  # bytes


@kernel(inline="always")
def _strip_columns(zero):
    """How many columns a packed strip of A has: as many whole vectors as hold `ROWS`."""
    return packed_columns(zero, ROWS)


@kernel(inline="always")
def _strip_tiles(zero):
    """How many tiles lie side by side in a strip."""
    return _strip_columns(zero) // ROWS


@kernel(inline="always")
def block_tiles(zero, depth, m):
    """How many tiles of A are packed at a time, in whole strips if there are so many."""
    strips = max(1, BLOCK // (max(1, depth) * _strip_columns(zero) * size_of(zero)))
    return min(part_count(m, ROWS), strips * _strip_tiles(zero))


@kernel
def scratch_of_outer(zero, k, m, n):
    """How many elements of scratch outer products over up to k rows need: of a shallow one, more strips are packed."""
    depth, columns = min(k, _DEPTH), _strip_columns(zero)
    all_strips = part_count(part_count(m, ROWS), _strip_tiles(zero)) * depth * columns
    strips = min(all_strips, max(BLOCK // size_of(zero), depth * columns))
    return depth * packed_columns(zero, n) + strips + _ALIGNMENT // size_of(zero)


@kernel
def multiply_block(zero, steps, rows, m, n, a, a_step, a_row, packed, panels, c, c_row, start, start_row):
    """Pack some columns of A in strips, and multiply them with all panels: ``C = S + A.T @ B``, S at `start`."""
    size, panel, columns, per_strip = size_of(zero), panel_columns(zero), _strip_columns(zero), _strip_tiles(zero)
    k = steps * rows
    tiles = part_count(m, ROWS)
    height = (m + tiles - 1) // tiles
    strip = per_strip * height
    whole = m // max(1, strip)
    rest = m - whole * strip
    copy_strips(zero, steps, rows, whole, strip, a, a_step, a_row, strip, packed, columns, k * columns)
    end = a + whole * strip * size, packed + whole * k * columns * size
    copy_strips(zero, steps, rows, 1, rest, end[0], a_step, a_row, 0, end[1], columns, 0)
    for column in range(0, n, panel):
        width = min(panel, n - column)
        row_bytes = packed_columns(zero, width) * size
        b = panels + column * k * size
        for t in range(tiles):
            to = c + (t * height * c_row + column) * size
            count = min(height, m - t * height)
            from_ = packed + (t // per_strip * k * columns + t % per_strip * height) * size
            first = start + (t * height * start_row + column) * size if start else 0
            tile(zero, count, width, k, from_, 1, columns, b, to, c_row, first, start_row, AHEAD, row_bytes)


@kernel
def multiply_outer(zero, steps, rows, m, n, a, a_step, a_row, b, b_step, b_row, c, c_row, add, scratch):
    """``C[m, n] = (C if add else 0) + A.T @ B`` over all rows of A[steps * rows, m] and B[steps * rows, n].

    Goes over C once for so many rows, either some whole steps or part of one. B's panels for these rows are packed,
    and A in blocks of columns that stay in the second-level cache while the panels go by.
    """
    size = size_of(zero)
    if rows == 1:
        steps, rows, a_row, b_row = 1, steps, a_step, b_step
    elif a_step == rows * a_row and b_step == rows * b_row:
        steps, rows = 1, steps * rows
    panels = (scratch + _ALIGNMENT - 1) // _ALIGNMENT * _ALIGNMENT
    step_parts = part_count(steps, max(1, _DEPTH // max(1, rows)))
    row_parts = part_count(rows, _DEPTH)
    block = ROWS * block_tiles(zero, min(steps * rows, _DEPTH), m)
    for part in range(step_parts * row_parts):
        s, r = part // row_parts, part % row_parts
        step = begin_of_part(steps, step_parts, s)
        row = begin_of_part(rows, row_parts, r)
        step_count = begin_of_part(steps, step_parts, s + 1) - step
        row_count = begin_of_part(rows, row_parts, r + 1) - row
        pack_steps(zero, step_count, row_count, n, b + (step * b_step + row * b_row) * size, b_step, b_row, panels)
        packed = panels + step_count * row_count * packed_columns(zero, n) * size
        for first in range(0, m, block):
            to = c + first * c_row * size
            multiply_block(
                zero,
                step_count,
                row_count,
                min(block, m - first),
                n,
                a + (step * a_step + row * a_row + first) * size,
                a_step,
                a_row,
                packed,
                panels,
                to,
                c_row,
                to if part or add else 0,
                c_row,
            )
