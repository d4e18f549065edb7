"""Where the data of NumPy's arrays lie."""

# pyright: basic

from __future__ import annotations

import ctypes
import sys
from typing import Any

import numpy as np

__all__ = ["HEAD", "address_of"]


def _head() -> int:
    """How far behind the beginning of an array object NumPy keeps the address of the data; 0 if that is not known.

    To ask an array for its address takes a microsecond, as much as a small kernel. In CPython it is the first word
    after the head of every object, as NumPy fixes it for programs in C.
    """
    if sys.implementation.name != "cpython":
        return 0
    head = object.__basicsize__
    samples = np.arange(12.0).reshape(3, 4), np.zeros(1, np.uint8), np.empty((2, 3), np.float32).T
    views = [view for a in samples for view in (a, a[1:], a[::-1])]
    right = all(ctypes.c_void_p.from_address(id(a) + head).value == a.ctypes.data for a in views)
    return head if right else 0


HEAD = _head()

_word_at = ctypes.c_void_p.from_address


def address_of(array: Any) -> int:
    """Where an array begins."""
    if HEAD:
        return _word_at(id(array) + HEAD).value or 0
    return array.__array_interface__["data"][0]
