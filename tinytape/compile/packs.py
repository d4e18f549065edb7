"""Weights as the tiles of a product read them, kept until the weights are written."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ..engine.tree import Array
from ..kernels import native
from ..kernels.address import address_of
from .program import Value
from .recipes import Invariants

__all__ = ["Matrix", "Panels", "products"]

ALIGN = 64


class Panels(NamedTuple):
    """A packed matrix, and where it lies."""

    address: int
    memory: Array


@cache
def products(dtype: np.dtype[Any]) -> SimpleNamespace:
    """The kernels for products of a dtype that are called from here."""

    def origin() -> dict[str, Any]:
        from ..kernels.product import bind

        return vars(bind(dtype.type))

    parameters = {"packed_size": 2, "pack": 6, "outer_scratch": 3}
    return SimpleNamespace(**native.functions(f"product.{dtype.name}", parameters, origin))


class Matrix:
    """An invariant matrix that products read in panels.

    Parameters
    ----------
    value : Value
    dtype : dtype
    """

    def __init__(self, value: Value, dtype: np.dtype[Any]) -> None:
        self.value, self.dtype = value, dtype
        self.owner, self.transposed = owner_of(value)
        self.form = "panels", self.transposed, dtype.char

    def panels(self, invariants: Invariants) -> Panels:
        """The panels; those of a tensor from outside are kept until something is written there."""
        found = invariants.made.get(self)
        if found is None:
            found = invariants.made[self] = self._panels(invariants)
        return found

    def _panels(self, invariants: Invariants) -> Panels:
        raw, storage = invariants.sources.get(self.owner, (None, None))
        if raw is None or storage is None:
            return _pack(invariants[self.value].astype(self.dtype, copy=False))
        known = storage.derived
        if known is None:
            known = storage.derived = {}
        last: _Packed | None = known.get(self.form)
        if last is None or last.matrix is not raw or last.written != storage.written:
            # Others may share the storage, such as the other half of it.
            place = *self.form, raw.shape, raw.strides, address_of(raw)
            last = known.get(place)
            if last is None or last.written != storage.written:
                written = storage.written  # as it is before the values are read
                panels = _pack(invariants[self.value].astype(self.dtype, copy=False))
                last = known[place] = _Packed(written, raw, panels)
            known[self.form] = last._replace(matrix=raw)
        return last.panels


class _Packed(NamedTuple):
    """What was made of a matrix, and when that had been written."""

    written: int
    matrix: Array
    panels: Panels


def owner_of(value: Value) -> tuple[Any, bool]:
    """The key of the tensor from outside that a matrix is, or is the transpose of; and whether it is transposed."""
    transposed = False
    while value.recipe.op is not None:
        if value.recipe.op.name != "transpose" or len(value.shape) != 2:
            return None, False
        axes = value.recipe.options["axes"]
        turned = axes is None or axes[0] % 2 == 1  # and not its two axes in their order
        value, transposed = value.recipe.args[0], transposed != turned
    return value.recipe.captured, transposed


def _pack(matrix: Array) -> Panels:
    kernels = products(matrix.dtype)
    k, n = matrix.shape
    panels = aligned(kernels.packed_size(k, n), matrix.dtype)
    row, column = (s // matrix.itemsize for s in matrix.strides)
    address = address_of(panels)
    kernels.pack(k, n, address_of(matrix), row, column, address)
    return Panels(address, panels)


def aligned(size: int, dtype: np.dtype[Any]) -> Array:
    """An array that begins at a multiple of 64 bytes."""
    raw = np.empty(size * dtype.itemsize + ALIGN, np.uint8)
    start = -raw.__array_interface__["data"][0] % ALIGN
    return raw[start : start + size * dtype.itemsize].view(dtype)
