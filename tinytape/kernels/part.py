"""One part of a large matrix product, as `matmul` cuts it."""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

from .compiler import kernel
from .lanes import size_of
from .multiply import BLOCK, begin_of_part, multiply, part_count
from .outer import block_tiles, multiply_block
from .packing import pack, panel_columns
from .tiles import ROWS

__all__ = ["multiply_part", "scratch_of_part"]

_DEPTH = 256  # of a slice: rows of B that are packed at a time
_CHUNK = 2 * BLOCK  # bytes of B that are packed at a time


@kernel
def scratch_of_part():
    """How many bytes of scratch `multiply_part` needs."""
    return _CHUNK + BLOCK


@kernel
def multiply_part(zero, m, n, k, a, b, c, a_row, a_column, b_row, b_column, c_row, bias, scratch):
    """``C[m, n] = bias[n] + A[m, k] @ B[k, n]`` where the rows or the columns of A are contiguous, and the rows of C.

    There is no bias where its address is 0.

    Takes its sums in slices, and in each goes through B in chunks that stay in the second-level cache while A goes by.
    """
    size, panel = size_of(zero), panel_columns(zero)
    slices = part_count(k, _DEPTH)
    for s in range(slices):
        begin = begin_of_part(k, slices, s)
        depth = begin_of_part(k, slices, s + 1) - begin
        chunk = _CHUNK // (depth * panel * size) * panel
        block = ROWS * block_tiles(zero, depth, m)
        left = a + begin * a_column * size
        for column in range(0, n, chunk):
            width = min(chunk, n - column)
            right = b + (begin * b_row + column * b_column) * size
            target = c + column * size
            start, start_row = target, c_row
            if s == 0:
                start, start_row = (bias + column * size if bias else 0), 0
            pack(zero, depth, width, right, b_row, b_column, scratch)
            if a_column == 1:
                multiply(zero, m, width, depth, left, a_row, scratch, target, c_row, start, start_row)
                continue
            packed = scratch + _CHUNK
            for row in range(0, m, block):
                height = min(block, m - row)
                from_, to = left + row * size, target + row * c_row * size
                first = start + row * start_row * size if start else 0
                multiply_block(
                    zero, 1, depth, height, width, from_, 0, a_column, packed, scratch, to, c_row, first, start_row
                )
