"""Sorting: positions are constants, and values are taken from where they were."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.errors import InputError
from ..engine.op import Operand, op
from ..engine.tensor import FUNCTIONS, Tensor
from .index import axis_of, integer, take_along_axis

__all__ = ["argsort", "sort", "topk"]


@op(kind="constant")
def argsort(x: Operand, /, axis: int | None = -1) -> Any:
    """The positions along `axis` (None: of the flattened `x`) in rising order of value; ties in their own order."""
    return np.argsort(x, axis, kind="stable")


def sort(x: Operand, axis: int | None = -1) -> Any:
    """`x` in rising order along `axis` (None: flattened). Equal elements keep their order, and so their gradients."""
    x = x if isinstance(x, Tensor) else np.asarray(x)
    return take_along_axis(x, argsort(x, axis), axis)


def topk(x: Operand, k: int, axis: int = -1) -> tuple[Any, Any]:
    """The `k` largest elements along `axis`, in falling order, and their positions.

    NaN counts as larger than any number; of equal elements the first comes first.

    Returns
    -------
    values, indices : Tensor
        Of x's shape, with `k` along `axis`. The indices are constants.

    Raises
    ------
    InputError
        If `k` is negative or larger than the axis.
    """
    x = x if isinstance(x, Tensor) else np.asarray(x)
    axis = axis_of(axis, x.ndim, "topk")
    n, k = x.shape[axis], integer(k, "topk: k")
    if not 0 <= k <= n:
        raise InputError(f"topk: k is {k}, the axis has {n} elements.", f"use a k from 0 to {n}.")
    indices = largest(x, k, axis)
    return take_along_axis(x, indices, axis), indices


@op(kind="constant")
def largest(x: Operand, /, k: int, axis: int) -> Any:
    """The positions of the `k` largest elements."""
    n = x.shape[axis]
    # Sorting the reversed array and reading it backwards puts the first of equal elements first.
    falling = np.flip(n - 1 - np.argsort(np.flip(x, axis), axis, kind="stable"), axis)
    return falling[(slice(None),) * axis + (slice(k),)]


def _numpy_sort(a: Any, axis: int | None = -1, kind: Any = None, order: None = None, *, stable: Any = None) -> Any:
    return sort(a, axis)


def _numpy_argsort(a: Any, axis: int | None = -1, kind: Any = None, order: None = None, *, stable: Any = None) -> Any:
    return argsort(a, axis)


FUNCTIONS[np.sort] = _numpy_sort
FUNCTIONS[np.argsort] = _numpy_argsort
