"""What a run is given, looked through."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from ..engine.errors import InputError

__all__ = ["END", "check_options", "rest"]

T = TypeVar("T")

END: Any = object()
"""What stands for the end of an iterable."""


def rest(batches: Iterable[T], done: int) -> Iterator[T]:
    """What is left of an iterable."""
    if isinstance(batches, Sequence):
        known = batches
        return (known[i] for i in range(done, len(known)))
    left = iter(batches)
    for _ in range(done):
        next(left, None)
    return left


def check_options(better: Any, patience: Any, save_every: Any, log_every: Any) -> None:
    """Refuse options of `Run` that are out of range."""
    if better not in ("lower", "higher"):
        raise InputError(f"Run: better is {better!r}.", "pass 'lower' or 'higher'.")
    for name, value in (("patience", patience), ("log_every", log_every)):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise InputError(f"Run: {name} is {value!r}.", "pass a whole number of 1 or more.")
    if not isinstance(save_every, int | float) or not save_every >= 0:
        raise InputError(f"Run: save_every is {save_every!r}.", "pass seconds, 0 or more.")
