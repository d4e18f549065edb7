"""Tensors that stand in for a module's own for a while.

What runs a part of a function again later, in a backward walk, asks for `stand_ins` when that part is recorded and
puts them up again: else it would find the module's own tensors, and gradients would miss those that were given.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeAlias

__all__ = ["Place", "stand_ins", "standing_in"]

Place: TypeAlias = tuple[dict[str, Any], str, Any]
"""A module's members, a name among them, and what stands there."""

_active: ContextVar[tuple[Place, ...]] = ContextVar("tinytape_stand_ins", default=())


def stand_ins() -> tuple[Place, ...]:
    """What stands in now, in this thread."""
    return _active.get()


@contextmanager
def standing_in(places: Sequence[Place]) -> Generator[None]:
    """Put each value into its place; what was there returns at the end."""
    before = [(members, name, members[name]) for members, name, _ in places]
    token = _active.set((*_active.get(), *places))
    try:
        for members, name, value in places:
            members[name] = value
        yield
    finally:
        for members, name, value in before:
            members[name] = value
        _active.reset(token)
