"""Cross-entropy over rows of logits, and its gradient, without an array of probabilities in between.

`x` has a row of logits for each position. `classes` has the class of each row, negative where the row does not count.
A row's target is `own` at its class plus, with label smoothing, `spread` at every class (else `spread` is empty).
All arrays are in C order and of one float dtype, `classes` of int64.
"""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from . import float32, float64, threads
from .arithmetic import greater, where
from .compiler import kernel
from .maths import exp, log
from .memory import store
from .value import select
from .vector import _reduction, only, total

__all__ = ["gradient", "losses"]

inlined = register_jitable(forceinline=True)

SHARE = 1 << 17  # logits: fewer are not worth waking a thread


def losses(x, classes, own, spread):
    """The cross-entropy of each row; 0 for those that do not count."""
    sums, found = np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
    weight = spread.sum()
    _deal(x, lambda rows: _losses(x[rows], classes[rows], own[rows], spread, weight, sums[rows], found[rows]))
    return found


def gradient(x, classes, own, spread, scale, found):
    """Write `scale` of each row times the derivative of its loss to `found`, an array like `x`."""
    weight = spread.sum()
    _deal(x, lambda rows: _gradient(x[rows], classes[rows], own[rows], spread, weight, scale[rows], found[rows]))


def _deal(x, work):
    """Call `work` with slices of the rows, each in a thread."""
    count = min(threads.get_num_threads(), x.size // SHARE, len(x))
    if count <= 1:
        work(slice(None))
    else:
        cuts = [len(x) * k // count for k in range(count + 1)]
        threads.run(lambda k: work(slice(cuts[k], cuts[k + 1])), count)


# ---- one row: an address, a number of entries, and 0 of their dtype --------------------------------------------------


def _load(row, j, m, zero):
    raise NotImplementedError


@overload(_load, jit_options={"forceinline": True})
def _(row, j, m, zero):
    """`m` entries from `j` on as a vector, whose other lanes are zero."""
    load = {types.float32: float32.load, types.float64: float64.load}[zero]
    return lambda row, j, m, zero: load(row, j, m)


def _lanes(zero):
    raise NotImplementedError


@overload(_lanes, jit_options={"forceinline": True})
def _(zero):
    lanes = {types.float32: float32.LANES, types.float64: float64.LANES}[zero]
    return lambda zero: lanes


@inlined
def _larger(a, b):
    return where(greater(a, b), a, b)


_largest = _reduction("_largest", lambda a, b: select(a > b, a, b), "The largest of a vector's lanes.")


@inlined
def _top(row, n, zero):
    """The largest entry. A NaN may be passed over, which spares most of the time; it shows in the sum that follows."""
    lanes = _lanes(zero)
    rest = n % lanes
    a = b = only(_load(row, n - rest, rest, zero), rest, zero - np.inf)
    for j in range(0, n - rest - lanes, 2 * lanes):  # two, as each step waits for the one before
        a = _larger(_load(row, j, lanes, zero), a)
        b = _larger(_load(row, j + lanes, lanes, zero), b)
    if (n - rest) % (2 * lanes):
        a = _larger(_load(row, n - rest - lanes, lanes, zero), a)
    return _largest(_larger(a, b))


@inlined
def _sum_exp(row, n, top, zero):
    """The sum of exp(x - top)."""
    lanes = _lanes(zero)
    rest = n % lanes
    sums = only(exp(_load(row, n - rest, rest, zero) - top), rest, zero)
    for j in range(0, n - rest, lanes):
        sums += exp(_load(row, j, lanes, zero) - top)
    return total(sums)


@inlined
def _put_exp(row, n, top, found, zero):
    """Write exp(x - top) to another row, and return the sum."""
    lanes = _lanes(zero)
    rest = n % lanes
    e = exp(_load(row, n - rest, rest, zero) - top)
    store(found, n - rest, e, rest)
    sums = only(e, rest, zero)
    for j in range(0, n - rest, lanes):
        e = exp(_load(row, j, lanes, zero) - top)
        store(found, j, e, lanes)
        sums += e
    return total(sums)


@inlined
def _dot_less(row, n, top, other, zero):
    """The sum of (x - top) * y over two rows."""
    lanes = _lanes(zero)
    rest = n % lanes
    sums = (_load(row, n - rest, rest, zero) - top) * _load(other, n - rest, rest, zero)
    for j in range(0, n - rest, lanes):
        sums += (_load(row, j, lanes, zero) - top) * _load(other, j, lanes, zero)
    return total(sums)


# ---- all rows -------------------------------------------------------------------------------------------------------
# No views are made of the rows: each would count references, with atomic instructions that hold up the processor.


@kernel
def _losses(x, classes, own, spread, weight, sums, found):
    zero, (rows, n) = x.dtype.type(0), x.shape
    for i in range(rows):
        c, row = classes[i], x.ctypes.data + i * n * x.itemsize
        sums[i], found[i] = 1, 0
        if c >= 0:
            top = _top(row, n, zero)
            sums[i] = _sum_exp(row, n, top, zero)
            found[i] = (top - x[i, c]) * own[i]
            if spread.size:
                found[i] -= _dot_less(row, n, top, spread.ctypes.data, zero)
    lanes = _lanes(zero)
    for i in range(0, rows, lanes):  # one logarithm costs as much as a vector of them
        m = min(lanes, rows - i)
        own_and_weight = _load(own.ctypes.data, i, m, zero) + weight
        loss = _load(found.ctypes.data, i, m, zero) + log(_load(sums.ctypes.data, i, m, zero)) * own_and_weight
        store(found.ctypes.data, i, loss, m)


@kernel
def _gradient(x, classes, own, spread, weight, scale, found):
    zero, (rows, n) = x.dtype.type(0), x.shape
    for i in range(rows):
        c, at = classes[i], i * n * x.itemsize
        if c < 0:
            for j in range(n):
                found[i, j] = 0
            continue
        row = x.ctypes.data + at
        sums = _put_exp(row, n, _top(row, n, zero), found.ctypes.data + at, zero)
        factor = (own[i] + weight) * scale[i] / sums
        for j in range(n):
            found[i, j] *= factor
        for j in range(spread.size):
            found[i, j] -= spread[j] * scale[i]
        found[i, c] -= own[i] * scale[i]
