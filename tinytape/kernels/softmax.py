"""Cross-entropy over rows of logits, and its gradient, without an array of probabilities in between.

`x` has a row of logits for each position. `classes` has the class of each row, negative where the row does not count.
A row's target is `own` at its class plus, with label smoothing, `spread` at every class (else `spread` is empty).
All arrays are in C order and of one float dtype, `classes` of int64.
"""

# pyright: basic

from __future__ import annotations

from functools import cache

import numpy as np

from . import threads
from .address import address_of
from .native import function

__all__ = ["gradient", "losses"]

SHARE = 1 << 17  # logits: fewer are not worth waking a thread

_PARAMETERS = 9  # of either kernel, besides the zero


def losses(x, classes, own, spread):
    """The cross-entropy of each row; 0 for those that do not count."""
    sums, found = np.empty(len(x), x.dtype), np.empty(len(x), x.dtype)
    _run("losses", x, classes, own, spread, sums, found)
    return found


def gradient(x, classes, own, spread, scale, found):
    """Write `scale` of each row times the derivative of its loss to `found`, an array like `x`."""
    _run("gradients", x, classes, own, spread, scale, found)


def _run(name, x, classes, own, spread, *others):
    """Call a kernel of `entropy` for some rows at a time, each in a thread."""
    run = _kernel(name, x.dtype)
    rows, width = x.shape
    whole = own + spread.sum() if spread.size else own
    arrays = x, classes, own, whole, *others
    addresses, apart = [address_of(a) for a in arrays], [a.strides[0] for a in arrays]
    common = address_of(spread) if spread.size else 0
    count = max(1, min(threads.get_num_threads(), x.size // SHARE, rows))

    def work(k):
        first, last = rows * k // count, rows * (k + 1) // count
        at = [address + first * step for address, step in zip(addresses, apart, strict=True)]
        run(last - first, width, *at[:4], common, *at[4:])

    threads.run(work, count)


@cache
def _kernel(name, dtype):
    return function("entropy", name, _PARAMETERS, dtype.name)
