"""Weights as the tiles of a product read them, kept until the weights are written."""

from __future__ import annotations

import weakref
from typing import Any, NamedTuple

import numpy as np

from ..engine.tape import Storage
from ..engine.tree import Array
from .program import Value
from .recipes import Invariants

__all__ = ["Panels", "packed", "products"]

ALIGN = 64


class Panels(NamedTuple):
    """A packed matrix, and where it lies."""

    address: int
    memory: Array


_kept: weakref.WeakKeyDictionary[Storage, dict[Any, tuple[int, tuple[int, ...], Panels]]] = weakref.WeakKeyDictionary()


def products(dtype: np.dtype[Any]) -> Any:
    """The kernels for products of a dtype."""
    if dtype == np.float32:
        from ..kernels import product32 as found
    else:
        from ..kernels import product64 as found
    return found


def packed(value: Value, invariants: Invariants, dtype: np.dtype[Any]) -> Panels:
    """An invariant matrix in panels; those of a tensor from outside are kept until something is written there."""
    owner, transposed = invariants.source(value)
    if owner is None:
        return _pack(invariants[value].astype(dtype, copy=False))
    kept = _kept.setdefault(owner, {})
    known = kept.get((transposed, dtype))
    if known is not None and known[0] == owner.written and known[1] == value.shape:
        return known[2]
    panels = _pack(invariants[value].astype(dtype, copy=False))
    kept[transposed, dtype] = owner.written, value.shape, panels
    return panels


def _pack(matrix: Array) -> Panels:
    kernels = products(matrix.dtype)
    k, n = matrix.shape
    panels = aligned(int(kernels.packed_size(k, n)), matrix.dtype)
    row, column = (s // matrix.itemsize for s in matrix.strides)
    address = panels.__array_interface__["data"][0]
    kernels.pack(k, n, matrix.__array_interface__["data"][0], row, column, address)
    return Panels(address, panels)


def aligned(size: int, dtype: np.dtype[Any]) -> Array:
    """An array that begins at a multiple of 64 bytes."""
    raw = np.empty(size * dtype.itemsize + ALIGN, np.uint8)
    start = -raw.__array_interface__["data"][0] % ALIGN
    return raw[start : start + size * dtype.itemsize].view(dtype)
