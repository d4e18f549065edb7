"""Products with a packed matrix: tiles put together."""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

from .compiler import kernel
from .lanes import size_of
from .packing import packed_columns, panel_columns
from .processor import WIDTH
from .tiles import ROWS, tile

__all__ = ["AHEAD", "BLOCK", "begin_of_part", "multiply", "multiply_steps", "part_count"]

BLOCK = 128 * 1024
"""Bytes of A that are multiplied with all panels in turn: they stay in the second-level cache, unless rows are long."""

_ROWS = 64  # that a block may have, however long: B is read once for each block, and from further away

AHEAD = 2048
"""Bytes by which B is prefetched while it is read."""

_PANEL = 512 * WIDTH  # bytes of a panel that several tiles use in turn: they stay in the first-level cache
_LONG = 48 * WIDTH  # numbers of A that one tile uses in a panel: they stay there until the next
_FAR = 1024 * 1024  # bytes of B that may not stay in the second-level cache from one product to the next


@kernel(inline="always")
def begin_of_part(total, count, i):
    """Where the i-th of some nearly equal parts begins."""
    return total * i // count


@kernel(inline="always")
def part_count(total, most):
    """How many parts of at most so many there are; at least one."""
    return max(1, (total + most - 1) // most)


@kernel
def multiply(zero, rows, n, k, a, a_row, packed, c, c_row, start, start_row):
    """``C[rows, n] = S + A[rows, k] @ B``, where `packed` holds B's panels.

    S begins at `start`: it may be C itself, one row for all (`start_row` is 0), or nothing (`start` is 0).

    Many rows are taken in blocks. A panel is cut in depth if several tiles use it, or if a tile's rows of A are long.
    Where B comes from far, each of several tiles prefetches its share of what follows, or else the first would wait
    for memory while the others leave it idle.
    """
    size, panel = size_of(zero), panel_columns(zero)
    blocks = part_count(rows, max(_ROWS, BLOCK // (max(1, k) * size)))
    is_far = k * n * size > _FAR
    for i in range(blocks):
        top = begin_of_part(rows, blocks, i)
        height = begin_of_part(rows, blocks, i + 1) - top
        tiles = part_count(height, ROWS)
        depths = part_count(k, _PANEL // (panel * size) if tiles > 1 else _LONG // max(1, height))
        shares = tiles if is_far else 1
        for column in range(0, n, panel):
            width = min(panel, n - column)
            row_bytes = packed_columns(zero, width) * size
            for d in range(depths):
                begin = begin_of_part(k, depths, d)
                depth = begin_of_part(k, depths, d + 1) - begin
                b = packed + column * k * size + begin * row_bytes
                for t in range(tiles):
                    row = top + begin_of_part(height, tiles, t)
                    count = top + begin_of_part(height, tiles, t + 1) - row
                    from_ = a + (row * a_row + begin) * size
                    to = c + (row * c_row + column) * size
                    first, first_row = start, start_row
                    if d:
                        first, first_row = to, c_row
                    elif start:
                        first = start + (row * start_row + column) * size
                    ahead = AHEAD if shares == 1 else (shares + t) * depth * row_bytes // shares
                    pace = row_bytes // shares
                    tile(zero, count, width, depth, from_, a_row, 1, b, to, c_row, first, first_row, ahead, pace)


@kernel
def multiply_steps(zero, steps, rows, n, k, a, a_step, a_row, packed, c, c_step, c_row, add):
    """``C = (C if add else 0) + A @ B`` as in `multiply`, for rows on two levels."""
    size = size_of(zero)
    if rows == 1:
        steps, rows, a_row, c_row = 1, steps, a_step, c_step
    elif a_step == rows * a_row and c_step == rows * c_row:
        steps, rows = 1, steps * rows
    for t in range(steps):
        to = c + t * c_step * size
        multiply(zero, rows, n, k, a + t * a_step * size, a_row, packed, to, c_row, to if add else 0, c_row)
