"""Arrays as kernels take them, and memory for what kernels leave to a user."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..engine.tree import Array
from ..kernels import workspace

__all__ = ["maker", "whole_rows"]

LARGE = 1 << 20  # bytes: from here on arrays come from the pool, where they begin at whole cache lines


def maker(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Callable[[], Array]:
    """What makes arrays that are not cleared; large ones go back to the pool when nobody has them any more."""
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < LARGE:
        return partial(np.empty, shape, dtype)
    return lambda: np.asarray(_Held(workspace.take(nbytes, counted=False), shape, dtype))


class _Held:
    """Memory of the pool in the form of an array, which keeps it: no view of another array, so a leaf may take it."""

    __slots__ = ("__array_interface__", "block")

    def __init__(self, block: workspace.Block, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.block = block
        self.__array_interface__ = {
            "version": 3, "typestr": dtype.str, "shape": shape, "data": (block.address, False),
        }  # fmt: skip


def whole_rows(array: Array, dtype: np.dtype[Any], rank: int) -> Array:
    """In the program's dtype; the last `rank` axes, which are within a row, in C order, others at whole elements."""
    if array.dtype != dtype:
        return np.ascontiguousarray(array, dtype)
    if array.flags.c_contiguous:
        return array
    unit = dtype.itemsize
    if any(stride % unit for stride in array.strides):  # as of a field of a structured array
        return np.ascontiguousarray(array)
    for i in range(array.ndim - 1, array.ndim - 1 - rank, -1):
        if array.shape[i] != 1 and array.strides[i] != unit:
            return np.ascontiguousarray(array)
        unit *= array.shape[i]
    return array
