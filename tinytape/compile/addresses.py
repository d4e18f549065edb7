"""Where arrays lie in memory, as kernels are told."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..engine.tree import Array
from ..kernels.table import HEAD

__all__ = ["address_of", "bases_of"]


def bases_of(arrays: Sequence[Array], addresses: Sequence[int]) -> Array:
    """What `kernels.table.addressed` takes: arrays, which must live on, and after them addresses."""
    if HEAD:
        return np.array([len(arrays), *map(id, arrays), *addresses], np.int64)
    return np.array([0, *map(address_of, arrays), *addresses], np.int64)


def address_of(array: Any) -> int:
    """Where an array begins."""
    if HEAD:
        return _word_at(id(array) + HEAD).value or 0
    return array.__array_interface__["data"][0]


_word_at = ctypes.c_void_p.from_address
