"""Cross-entropy over rows of logits, and its gradient: the kernels behind `softmax`.

They take a zero of the dtype and then, as integers, the number of rows, the number of classes, and addresses: of the
logits `x`; of the class of each row, negative where the row does not count; of `own`, what a row's target has at its
class; of `whole`, the sum of its target; and of `spread`, what all targets have at each class, or 0 if nothing.

Nothing is allocated, so Numba need not count references, which it could not do where it is not loaded.
"""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

import numpy as np
from numba import types
from numba.extending import overload, register_jitable

from . import float32, float64
from .arithmetic import greater, where
from .compiler import kernel
from .lanes import size_of
from .maths import exp, log
from .memory import array_at, store
from .value import select
from .vector import only, reduction, total

__all__ = ["gradients", "losses"]

# Exponentials are taken relative to the logit of the row's class, which spares a search for the largest. Their sum is
# 1 or more, and 1 over the probability of the class. From here on (or if it is NaN) they are taken again relative to
# the largest: the differences would be rounded too coarsely, and in the end exponentials would overflow.
_FAR = 1 << 23

inlined = register_jitable(forceinline=True)


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


_largest = reduction("_largest", lambda a, b: select(a > b, a, b), "The largest of a vector's lanes.")


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


@kernel(_nrt=False)
def losses(zero, rows, n, x, classes, own, whole, spread, sums, found):
    """Write the loss of each row to `found`, 0 where it does not count; `sums` is room for as many numbers."""
    class_of, own_of = array_at(np.int64(0), classes, rows), array_at(zero, own, rows)
    sum_of, loss_of = array_at(zero, sums, rows), array_at(zero, found, rows)
    for i in range(rows):
        c, row = class_of[i], x + i * n * size_of(zero)
        sum_of[i], loss_of[i] = 1, 0
        if c >= 0:
            own_logit = shift = array_at(zero, row, n)[c]
            sum_of[i] = _sum_exp(row, n, shift, zero)
            if not sum_of[i] < _FAR:
                shift = _top(row, n, zero)
                sum_of[i] = _sum_exp(row, n, shift, zero)
                loss_of[i] = (shift - own_logit) * own_of[i]
            if spread != 0:
                loss_of[i] -= _dot_less(row, n, shift, spread, zero)
    lanes = _lanes(zero)
    for i in range(0, rows, lanes):  # one logarithm costs as much as a vector of them
        m = min(lanes, rows - i)
        loss = _load(found, i, m, zero) + log(_load(sums, i, m, zero)) * _load(whole, i, m, zero)
        store(found, i, loss, m)


@kernel(_nrt=False)
def gradients(zero, rows, n, x, classes, own, whole, spread, scale, found):
    """Write the derivative of each row's loss, times its number of `scale`, to `found`, a matrix like `x`."""
    class_of, own_of = array_at(np.int64(0), classes, rows), array_at(zero, own, rows)
    whole_of, scale_of = array_at(zero, whole, rows), array_at(zero, scale, rows)
    common = array_at(zero, spread, n)
    for i in range(rows):
        c, at = class_of[i], i * n * size_of(zero)
        out = array_at(zero, found + at, n)
        if c < 0:
            for j in range(n):
                out[j] = 0
            continue
        row = x + at
        sums = _put_exp(row, n, array_at(zero, row, n)[c], found + at, zero)
        if not sums < _FAR:
            sums = _put_exp(row, n, _top(row, n, zero), found + at, zero)
        factor = whole_of[i] * scale_of[i] / sums
        for j in range(n):
            out[j] *= factor
        for j in range(common.size):
            out[j] -= common[j] * scale_of[i]
        out[c] -= own_of[i] * scale_of[i]
