"""Updates and norms by compiled kernels: each array in one pass, all arrays dealt out to the threads."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from ..engine.tree import Array

__all__ = ["block_squares", "find", "run", "sum_of_squares"]

LEAST = 1 << 19  # numbers: from here on the time that it takes to load or compile kernels is soon paid back
SHARE = 1 << 18  # numbers: fewer are not worth waking a thread
BLOCK = 1 << 12  # numbers that a partial sum of squares covers: fixed, so that threads do not change the sums


def find(names: tuple[str, ...], arrays: Sequence[Array]) -> Any:
    """The kernels of that (first) name, by dtype, if there are some and they pay for such arrays, else None."""
    if not names or not _pays(arrays) or not all(x.flags.c_contiguous for x in arrays):
        return None
    return {dtype: _kernel(names[0], len(names) + 3, dtype) for dtype in {x.dtype for x in arrays}}


def _kernel(name: str, parameters: int, dtype: np.dtype[Any]) -> Any:
    from ..kernels.native import function

    return function("update", name, parameters, dtype.name)


def run(kernels: Any, arrays: Sequence[tuple[Array, ...]]) -> None:
    """Run `kernels` (by dtype) on each of `arrays`: a parameter, its gradient, slots of its size or empty, numbers."""
    from ..kernels.address import address_of

    arrays = [(w, np.ascontiguousarray(g, w.dtype), *others) for w, g, *others in arrays]
    addresses = [[address_of(x) if x.size else 0 for x in each] for each in arrays]

    def work(i: int, start: int, stop: int) -> None:
        *flat, numbers = addresses[i]
        dtype = arrays[i][0].dtype
        skip = start * dtype.itemsize
        kernels[dtype](stop - start, *[x + skip if x else 0 for x in flat], numbers)

    _deal([w.size for w, *_ in arrays], 64, work)


def sum_of_squares(arrays: Sequence[Array]) -> float | None:
    """Of all entries together, in float64 and in an order that depends on the sizes alone. None if it does not pay."""
    found = block_squares(arrays)
    return None if found is None else float(np.sum(found[0]))


def block_squares(arrays: Sequence[Array]) -> tuple[Array, list[int]] | None:
    """The sums of squares of all arrays' blocks, and where each array's begin and the last one's end."""
    if not _pays(arrays):
        return None
    from ..kernels.address import address_of

    flat = [np.ascontiguousarray(x).reshape(-1) for x in arrays]
    kernels = {dtype: _kernel("squares", 4, dtype) for dtype in {x.dtype for x in arrays}}
    addresses = [address_of(x) for x in flat]
    sizes = [x.size for x in flat]
    first = [0, *accumulate(-(-size // BLOCK) for size in sizes)]
    sums = np.empty(first[-1])
    sums_at = address_of(sums)

    def work(i: int, start: int, stop: int) -> None:
        dtype, into = flat[i].dtype, sums_at + 8 * (first[i] + start // BLOCK)
        kernels[dtype](stop - start, addresses[i] + start * dtype.itemsize, BLOCK, into)

    _deal(sizes, BLOCK, work)
    return sums, first


def _pays(arrays: Sequence[Array]) -> bool:
    if sum(x.size for x in arrays) < LEAST and "tinytape.kernels.native" not in sys.modules:
        return False
    if any(x.dtype.char not in "fd" or not x.dtype.isnative for x in arrays):
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
