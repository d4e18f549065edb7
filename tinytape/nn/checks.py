"""Refusing what does not fit, before anything is computed. Each check costs about a microsecond."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.tensor import Tensor

_ARRAYS = (Tensor, np.ndarray)  # a union of types is slower to look through
__all__ = ["check_array", "check_choice", "check_dtype", "check_features", "check_sizes"]


def check_sizes(what: str, minimum: int = 1, **sizes: Any) -> None:
    """Every size is an integer of at least `minimum`."""
    for name, size in sizes.items():
        if not isinstance(size, int | np.integer) or isinstance(size, bool) or size < minimum:
            raise InputError(f"{what}: {name} is {size!r}.", f"pass an integer of {minimum} or more.")


def check_choice(what: str, name: str, value: Any, choices: tuple[str, ...]) -> None:
    """An option is one of its choices."""
    if value not in choices:
        raise InputError(f"{what}: {name} is {value!r}.", f"use {' or '.join(map(repr, choices))}.")


def check_array(what: str, name: str, value: Any) -> None:
    """`value` is a Tensor or an array."""
    if not isinstance(value, _ARRAYS):
        raise DTypeError(f"{what}: {name} is a {type(value).__name__}.", "pass a Tensor or an array.")


def check_dtype(what: str, name: str, value: Any, dtype: np.dtype[Any], beside: str = "the parameters are") -> None:
    """`value` is a Tensor or an array of `dtype`: float64 never creeps into a float32 model, nor the other way."""
    check_array(what, name, value)
    if value.dtype != dtype:
        raise DTypeError(
            f"{what}: {name} is {value.dtype}, {beside} {dtype}.",
            f"pass {name}.astype({str(dtype)!r}), or cast the model with to(dtype).",
        )


def check_features(what: str, x: Any, features: int, named: str, dtype: np.dtype[Any]) -> None:
    """The last axis of `x` has `features` entries, and its dtype is the parameters'."""
    check_dtype(what, "x", x, dtype)
    if x.ndim == 0 or x.shape[-1] != features:
        found = x.shape[-1] if x.ndim else "none"
        raise ShapeError(
            f"{what}: x has shape {x.shape}; its last axis must be {named} = {features}, got {found}.",
            f"pass x of shape (..., {features}), or build {what} with {named}={found}.",
        )
