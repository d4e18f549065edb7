"""The table of addresses, lengths and strides that a generated kernel works from."""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

import sys

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

__all__ = ["HEAD", "addressed"]


@intrinsic
def _word_at(typing_context, address):
    """The 8 bytes at an address, as an integer."""

    def generate(context, builder, signature, raw):
        return builder.load(builder.inttoptr(raw[0], ir.IntType(64).as_pointer()))

    return types.int64(types.int64), generate


@njit(nogil=True)
def addressed(template, positions, sources, bases):
    """The table of a run: `template`, with addresses added to its entries at `positions`.

    Parameters
    ----------
    template, positions, sources : (n,), (m,), (m,) int64
        Entry ``positions[i]`` is the distance from base ``sources[i]``.
    bases : int64
        How many of the bases are known by where Python keeps their array objects; these; and the addresses of the rest.
    """
    table = template.copy()
    objects = bases[0]
    for i in range(len(positions)):
        source = sources[i]
        base = bases[1 + source]
        table[positions[i]] += _word_at(base + HEAD) if source < objects else base
    return table


def _head() -> int:
    """How far behind the beginning of an array object NumPy keeps the address of the data; 0 if that is not known.

    To ask an array for its address takes a microsecond, as much as a small kernel. In CPython it is the first word
    after the head of every object, as NumPy fixes it for programs in C.
    """
    import ctypes

    if sys.implementation.name != "cpython":
        return 0
    head = object.__basicsize__
    samples = np.arange(12.0).reshape(3, 4), np.zeros(1, np.uint8), np.empty((2, 3), np.float32).T
    views = [view for a in samples for view in (a, a[1:], a[::-1])]
    right = all(ctypes.c_void_p.from_address(id(a) + head).value == a.ctypes.data for a in views)
    return head if right else 0


HEAD = _head()
