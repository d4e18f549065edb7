"""Weights as the tiles of a product read them, kept until the weights are written."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from ..engine.tree import Array
from ..kernels import native
from ..kernels.address import address_of
from ..kernels.workspace import Chunk
from .program import Value
from .recipes import Invariants

__all__ = ["Matrix", "products"]


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

    def panels(self, invariants: Invariants) -> Chunk:
        """The panels; those of a tensor from outside are kept until something is written there."""
        found = invariants.made.get(self)
        if found is None:
            found = invariants.made[self] = self._panels(invariants)
        return found

    def _panels(self, invariants: Invariants) -> Chunk:
        raw, storage = invariants.sources.get(self.owner, (None, None))
        if raw is None or storage is None:
            return _pack(invariants[self.value].astype(self.dtype, copy=False))
        known = storage.derived
        if known is None:
            known = storage.derived = {}
        last: _Packed | None = known.get(self.form)
        if last is None or last.matrix is not raw or last.written != storage.written:
            # Several matrices may be views of one storage: the last one asked for is found at once, others by place.
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
    panels: Chunk


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


def _pack(matrix: Array) -> Chunk:
    kernels = products(matrix.dtype)
    k, n = matrix.shape
    panels = Chunk(kernels.packed_size(k, n) * matrix.itemsize)
    row, column = (s // matrix.itemsize for s in matrix.strides)
    kernels.pack(k, n, address_of(matrix), row, column, panels.address)
    return panels
