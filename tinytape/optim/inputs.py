"""What the optimisers, clips and schedules accept: numbers in a range, and parameters however they are given."""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np

from ..engine.errors import DTypeError, InputError
from ..engine.tensor import Tensor

__all__ = ["named", "within"]


def within(
    what: str, name: str, value: Any, low: float = -math.inf, high: float = math.inf,
    *, ends: str = "[)",
) -> float:  # fmt: skip
    """A number from an interval, as a float; NaN lies in none.

    Parameters
    ----------
    what, name : str
        Who asks, and for which argument: for the message.
    ends : str
        The interval's brackets: "[" and "]" take the end in, "(" and ")" leave it out.

    Raises
    ------
    DTypeError
        If `value` is not a number.
    InputError
        If it lies outside.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | np.integer | np.floating):
        raise DTypeError(f"{what}: {name} is {value!r}, a {type(value).__name__} and not a number.", "pass a float.")
    number = float(cast(float, value))
    above = number >= low if ends[0] == "[" else number > low
    below = number <= high if ends[1] == "]" else number < high
    if not (above and below):
        raise InputError(
            f"{what}: {name} is {value}; it must be in {ends[0]}{low:g}, {high:g}{ends[1]}.",
            f"choose another {name}.",
        )
    return number


def named(params: Any, what: str) -> list[tuple[str, Tensor]]:
    """(name, tensor) of parameters given as a Module, a dict, tensors or pairs; those without a name are counted.

    Raises
    ------
    DTypeError
        If they are not Tensors in an ordered collection.
    """
    kind = type(params).__name__
    items = getattr(params, "named_parameters", None) or getattr(params, "items", None)
    entries: Any = params if items is None else items()
    if isinstance(params, Tensor | str | set | frozenset) or not hasattr(entries, "__iter__"):
        raise DTypeError(
            f"{what}: params is a {kind}; parameters come in an ordered collection.",
            "pass a Module, model.parameters(), a list of Tensors, or a list of dicts with a 'params' entry each.",
        )
    found: list[tuple[str, Tensor]] = []
    for i, entry in enumerate(entries):
        pair = cast("tuple[Any, ...]", entry) if isinstance(entry, tuple) else (str(i), entry)
        name, value = (*pair, None, None)[:2]
        if len(pair) != 2 or not isinstance(name, str) or not isinstance(value, Tensor):
            raise DTypeError(
                f"{what}: params[{i}] is {entry!r:.60}, not a Tensor or a (name, Tensor) pair.",
                "make parameters with tt.tensor(..., requires_grad=True).",
            )
        found.append((name, value))
    return found
