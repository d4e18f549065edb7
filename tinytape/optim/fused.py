"""Updates and norms by compiled kernels: each array in one pass, all arrays dealt out to the threads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from ..engine.tree import Array

__all__ = ["block_squares", "find", "run", "sum_of_squares"]

LEAST = 1 << 19  # numbers: from here on the half second that it takes to load Numba is soon paid back
SHARE = 1 << 18  # numbers: fewer are not worth waking a thread


def find(names: tuple[str, ...], arrays: Sequence[Array]) -> Any:
    """The kernel of that (first) name if there is one and it pays for such arrays, else None."""
    if not names or not _pays(arrays):
        return None
    from ..kernels import update

    return getattr(update, names[0])


def run(kernel: Any, arrays: Sequence[tuple[Array, ...]]) -> None:
    """Call ``kernel(*arrays[i][:-1], arrays[i][-1])`` for each i; all but the last may be cut into pieces."""

    def work(i: int, start: int, stop: int) -> None:
        *flat, numbers = arrays[i]
        if stop - start < flat[0].size:
            flat = [x[start:stop] for x in flat]
        kernel(*flat, numbers)

    _deal([flat[0].size for flat in arrays], 64, work)


def sum_of_squares(arrays: Sequence[Array]) -> float | None:
    """Of all entries together, in float64 and in an order that depends on the sizes alone. None if it does not pay."""
    found = block_squares(arrays)
    return None if found is None else float(np.sum(found[0]))


def block_squares(arrays: Sequence[Array]) -> tuple[Array, list[int]] | None:
    """The sums of squares of all arrays' blocks, and where each array's begin and the last one's end."""
    if not _pays(arrays):
        return None
    from ..kernels.update import BLOCK, squares

    flat = [x.reshape(-1) for x in arrays]
    sizes = [x.size for x in flat]
    first = [0, *accumulate(-(-size // BLOCK) for size in sizes)]
    sums = np.empty(first[-1])

    def work(i: int, start: int, stop: int) -> None:
        squares(flat[i][start:stop], sums[first[i] + start // BLOCK : first[i] - (-stop // BLOCK)])

    _deal(sizes, BLOCK, work)
    return sums, first


def _pays(arrays: Sequence[Array]) -> bool:
    if sum(x.size for x in arrays) < LEAST and "numba" not in sys.modules:
        return False
    if any(x.dtype.char not in "fd" for x in arrays):
        return False
    from ..kernels.compiler import usable

    return usable()


def _deal(sizes: Sequence[int], grain: int, work: Callable[[int, int, int], None]) -> None:
    """Call ``work(i, start, stop)`` for pieces of arrays of these sizes, in threads; cuts are multiples of `grain`."""
    from ..kernels import threads

    count = min(threads.get_num_threads(), sum(sizes) // SHARE)
    if count <= 1:
        for i, size in enumerate(sizes):
            work(i, 0, size)
        return
    shares = _shares(sizes, grain, count)

    def task(k: int) -> None:
        for i, start, stop in shares[k]:
            work(i, start, stop)

    threads.run(task, count)


def _shares(sizes: Sequence[int], grain: int, count: int) -> list[list[tuple[int, int, int]]]:
    """For each of `count` threads its pieces (array, start, stop), about as many numbers as the others'."""
    shares: list[list[tuple[int, int, int]]] = [[] for _ in range(count)]
    goal = -(-sum(sizes) // count)
    k, room = 0, goal
    for i, size in enumerate(sizes):
        start = 0
        while start < size:
            length = size - start
            if length > room and k + 1 < count:
                length = min(length, -(-room // grain) * grain)
            shares[k].append((i, start, start + length))
            start += length
            room -= length
            if room <= 0 and k + 1 < count:
                k, room = k + 1, goal
    return shares
