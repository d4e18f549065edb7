"""The innermost part of a matrix product: a tile of the result that is kept in registers.

A tile has up to `ROWS` rows and `VECTORS` vectors of columns. For every k, the vectors of B's row are loaded once and
each number of A's column is spread over a vector, so a step of an R x V tile is R V multiply-adds for R + V loads.
"""

# pyright: basic

from __future__ import annotations

from functools import partial
from typing import NamedTuple

from .lanes import Lanes, Variable, routine
from .processor import WIDTH
from .value import Value, fma

__all__ = ["ROWS", "VECTORS", "tile"]

# The sums, a row of B and a number of A must fit the 32 registers of AVX-512, or the 16 of AVX2 and of SSE, which has
# no fused multiply-add and needs one for the product. Of tiles with as many sums, one that is nearly square has the
# least to load: 10 times for 24 multiply-adds, where 12 x 2 would have 14. That counts where others, on the same core
# or around it, load too.
ROWS, VECTORS = {64: (6, 4), 32: (6, 2), 16: (4, 2)}[WIDTH]

_IN_FLIGHT = 8  # sums that run side by side, to hide the latency of an addition: two units of four cycles
_LINE = 64  # bytes of a cache line


class _Left(NamedTuple):
    """A: where it begins, and its strides in bytes."""

    address: Value
    row: Value
    column: Value


class _Panel(NamedTuple):
    """A panel of B, and what is prefetched with its rows: where that begins, and bytes from one to the next."""

    address: Value
    ahead: Value
    pace: Value


@routine
def tile(
    lanes: Lanes,
    rows: Value,
    width: Value,
    k: Value,
    a: Value,
    a_row: Value,
    a_column: Value,
    b: Value,
    c: Value,
    c_row: Value,
    start: Value,
    start_row: Value,
    ahead: Value,
    pace: Value,
) -> None:
    """``C = S + A @ B`` for `rows` x k numbers of A and a packed panel of B.

    S begins at `start`: it may be C itself, one row for all (`start_row` is 0), or nothing (`start` is 0). The panel
    has k rows of as many whole vectors as `width` columns need. C is written in `width` columns only. With each row of
    B a row's length of memory is prefetched, `ahead` bytes after B at first and `pace` bytes on each time.
    """
    left = _Left(a, a_row * lanes.size, a_column * lanes.size)
    panel = _Panel(b, b + ahead, pace)
    c_row, start_row = c_row * lanes.size, start_row * lanes.size

    def write(shape: tuple[int, int]) -> None:
        rows, vectors = shape
        for row in range(rows):  # C is wanted when the sums are ready
            for line in range(0, vectors * lanes.bytes, _LINE):
                lanes.prefetch(c + c_row * row + line)
        _finish(lanes, _multiply(lanes, shape, k, left, panel), width, c, c_row, start, start_row)

    shapes = [(r, v) for r in range(1, ROWS + 1) for v in range(1, VECTORS + 1)]
    lanes.switch(rows * VECTORS + lanes.vectors(width), {r * VECTORS + v: partial(write, (r, v)) for r, v in shapes})


def _multiply(lanes: Lanes, shape: tuple[int, int], k: Value, a: _Left, b: _Panel) -> list[list[Value]]:
    """The product of one tile.

    A small tile has too few sums to hide the latency of an addition, so it has several sets of them for successive k.
    """
    rows, vectors = shape
    sets = 1
    while sets * rows * vectors < _IN_FLIGHT:
        sets *= 2
    sums = [[[Variable(lanes.zero()) for _ in range(vectors)] for _ in range(rows)] for _ in range(sets)]

    # Three rows share a base: the processor adds once or twice the stride to an address at no cost.
    bases = [a.address + a.row * row for row in range(0, rows, 3)]
    offsets = [lanes.integer(0), a.row, a.row * 2]

    def step(i: Value, sums: list[list[Variable]]) -> None:
        begin = b.address + i * (vectors * lanes.bytes)
        row_of_b = [lanes.load(begin + v * lanes.bytes) for v in range(vectors)]
        for line in range(0, vectors * lanes.bytes, _LINE):
            lanes.prefetch(b.ahead + i * b.pace + line)
        column = i * a.column
        for row in range(rows):
            number = lanes.repeat(bases[row // 3] + column + offsets[row % 3])
            for total, vector in zip(sums[row], row_of_b, strict=True):
                total.value = fma(number, vector, total.value)

    rounds = lanes.quotient(k, sets)
    with lanes.loop(rounds) as i:
        for which in range(sets):
            step(i * sets + which, sums[which])
    if sets > 1:
        with lanes.loop(k, start=rounds * sets) as i:
            step(i, sums[0])
    return [[_total([s[row][v].value for s in sums]) for v in range(vectors)] for row in range(rows)]


def _total(values: list[Value]) -> Value:
    """The sum of a power of two of values, added in pairs."""
    while len(values) > 1:
        values = [x + y for x, y in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def _finish(
    lanes: Lanes, totals: list[list[Value]], width: Value, c: Value, c_row: Value, start: Value, start_row: Value
) -> None:
    """Write a tile's sums, added to what they start from, if anything. A whole tile needs no masks."""
    vectors = range(len(totals[0]))

    def write(masks: list[Value | None], adds: bool) -> None:
        for row, values in enumerate(totals):
            for v, value in enumerate(values):
                if adds:
                    value = lanes.load(start + start_row * row + v * lanes.bytes, masks[v]) + value
                lanes.store(value, c + c_row * row + v * lanes.bytes, masks[v])

    def write_whole() -> None:
        masks: list[Value | None] = [None for _ in vectors]
        lanes.choose(start.differs(0), partial(write, masks, True), partial(write, masks, False))

    def write_ragged() -> None:
        masks: list[Value | None] = [lanes.first(width - v * lanes.count) for v in vectors]
        lanes.choose(start.differs(0), partial(write, masks, True), partial(write, masks, False))

    lanes.choose(width.equals(len(vectors) * lanes.count), write_whole, write_ragged)
