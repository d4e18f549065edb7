"""Large matrix products of arrays, over several threads.

The result is cut into parts along its longest sides, and the sums too where they are much longer than these. Each part
packs what it needs into memory of its own, so threads share nothing and wait for nobody.

Sums are taken in an order that depends on the sizes, on which arguments are transposed and on the number of threads.
"""

# pyright: basic

from __future__ import annotations

import itertools
import math
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from . import native, threads, workspace
from .address import address_of

__all__ = ["is_quicker", "matmul"]

Matrix = npt.NDArray[np.floating[Any]]

_WORK = 1 << 24  # floating-point operations: less is not worth waking a thread
_SHARES = 4  # parts for each thread, so that one that is held up has less to do
_SIDE = 128  # rows or columns: in a smaller part, packing would count
_SUM_SIDE = 4  # a cut through the sums costs as much as one through a side that is so many times shorter
_PANEL = 64  # columns: no machine has wider panels
_ALONE = 1 << 18  # multiplications that OpenBLAS does without waking threads (its interface/gemm.c)
_NARROW = 16  # rows, columns or depth: below, packing takes longer than multiplying


def is_quicker(m: int, k: int, n: int) -> bool:
    """Whether `matmul` is to take A[m, k] and B[k, n], where kernels run, rather than OpenBLAS, as NumPy brings it.

    From some size on OpenBLAS wakes its own threads. They go on spinning for 2**26 cycles, 20 ms, after they are done,
    and take the processors from ours: a language model's step then takes half as long again. Smaller products stay
    with OpenBLAS, which a call of costs less; so do narrow ones.
    """
    return min(m, k, n) >= _NARROW and m * k * n > _ALONE


def matmul(a: Matrix, b: Matrix, bias: Matrix | None = None) -> Matrix:
    """``a @ b``, or ``bias + a @ b``, as a new array in C order that owns its memory.

    Parameters
    ----------
    a : array, shape (m, k)
    b : array, shape (k, n)
        Not empty, of one dtype: float32 or float64 in native byte order. Transposed matrices cost nothing extra.
    bias : array, shape (n,), optional
        Of the same dtype. The sums start from it, so that the result is gone over no more than without.
    """
    a, b, bias = _readable(a), _readable(b), None if bias is None else np.ascontiguousarray(_readable(bias))
    if a.itemsize not in a.strides:
        a = np.ascontiguousarray(a)
    out = np.empty((len(a), b.shape[1]), a.dtype)
    if out.size * len(b) < _WORK:  # not enough for two parts
        _multiply(a, b, bias, out)
        return out
    row_cuts, column_cuts, sum_cuts = _cuts(*out.shape, len(b))
    block = workspace.take((len(sum_cuts) - 1) * out.nbytes)
    sums = [out, *block.array(out.dtype, (len(sum_cuts) - 1, *out.shape))]
    starts = [bias, *[None] * (len(sum_cuts) - 1)]
    parts = list(itertools.product(zip(sums, starts, sum_cuts, strict=True), column_cuts, row_cuts))

    def work(index):
        (target, start, depths), columns, rows = parts[index]
        start = None if start is None else start[columns]
        _multiply(a[rows, depths], b[depths, columns], start, target[rows, columns])

    threads.run(work, len(parts))
    for other in sums[1:]:
        out += other
    return out


def _readable(x):
    """The array, or a copy if kernels could not read it where it lies."""
    is_plain = x.flags.aligned and not any(stride % x.itemsize for stride in x.strides)
    return x if is_plain else np.ascontiguousarray(x)


def _cuts(m, n, k):
    """Slices of the rows, of the columns and of the sums: the longest side is halved until there are enough parts."""
    count = threads.get_num_threads()
    wanted = min(2 * m * n * k // _WORK, _SHARES * count) if count > 1 else 1
    sides, cuts = [m, n, k / _SUM_SIDE], [1, 1, 1]
    while 2 * math.prod(cuts) <= wanted and max(sides) >= 2 * _SIDE:
        longest = sides.index(max(sides))
        sides[longest] /= 2
        cuts[longest] *= 2
    return _slices(m, cuts[0], 1), _slices(n, cuts[1], _PANEL), _slices(k, cuts[2], 1)


def _slices(length, count, multiple):
    """Nearly equal slices that begin at multiples of a number."""
    units = -(-length // multiple)
    ends = [min(length, units * i // count * multiple) for i in range(count + 1)]
    return [slice(*pair) for pair in itertools.pairwise(ends)]


def _multiply(a, b, bias, out):
    """Write one part."""
    scratch = workspace.take(_scratch_size())
    steps = [stride // x.itemsize for x in (a, b, out) for stride in x.strides]
    start = 0 if bias is None else address_of(bias)
    _part(a.dtype)(*out.shape, len(b), *map(address_of, (a, b, out)), *steps[:-1], start, scratch.address)
    scratch.release()


@cache
def _scratch_size():
    """How many bytes a part works in."""
    return native.module("part", scratch_of_part=0).scratch_of_part()


@cache
def _part(dtype):
    """The kernel for a dtype."""

    def origin():
        from . import part, routines

        routines.load(dtype.type)
        return vars(part)

    return native.functions(f"part.{dtype.name}", {"multiply_part": 13}, origin, dtype.name)["multiply_part"]
