"""Nested dicts, lists and tuples of tensors, taken apart and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeGuard, cast

import numpy as np

from .errors import InputError

__all__ = ["Array", "flatten", "is_array", "map_leaves", "unflatten"]

Array = np.ndarray[Any, np.dtype[Any]]


def is_array(value: Any) -> TypeGuard[Array]:
    """Whether it is a NumPy array."""
    return isinstance(value, np.ndarray)


_BRANCHES = (dict, list, tuple)


def flatten(tree: Any) -> list[Any]:
    """The leaves of a tree, in order (dicts in the order of their sorted keys). None is an empty tree."""
    if not isinstance(tree, _BRANCHES):
        return [] if tree is None else [tree]
    leaves: list[Any] = []
    _gather(tree, leaves)
    return leaves


def _gather(branch: Any, leaves: list[Any]) -> None:
    for item in _items(branch) if isinstance(branch, dict) else branch:
        if isinstance(item, _BRANCHES):
            _gather(item, leaves)
        elif item is not None:
            leaves.append(item)


def _items(branch: Any) -> list[Any]:
    return [branch[key] for key in _keys(branch)]


def unflatten(tree: Any, leaves: Iterable[Any]) -> Any:
    """A tree of the structure of `tree` with other leaves.

    Raises
    ------
    InputError
        If there are more or fewer leaves than the structure has.
    """
    given = list(leaves)
    if not isinstance(tree, _BRANCHES):
        if len(given) == (tree is not None):
            return given[0] if given else None
    elif type(cast(Any, tree)) is tuple and _is_flat(cast(Any, tree), len(given)):  # as most are
        return tuple(given)
    else:
        rest = iter(given)
        try:
            built = _build(tree, rest)
        except StopIteration:
            pass
        else:
            if next(rest, _END) is _END:
                return built
    raise InputError(f"unflatten: {len(given)} leaves for a tree of {len(flatten(tree))}.", "pass one for each leaf.")


_END = object()


def _is_flat(branch: tuple[Any, ...], count: int) -> bool:
    """Whether it has so many leaves, and nothing else."""
    for item in branch:
        if item is None or isinstance(item, _BRANCHES):
            return False
    return len(branch) == count


def map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`function` applied leaf by leaf to trees of one structure."""
    return unflatten(tree, [function(*leaves) for leaves in zip(flatten(tree), *map(flatten, others), strict=True)])


def _build(branch: Any, leaves: Iterator[Any]) -> Any:
    items: list[Any] = []
    for item in _items(branch) if isinstance(branch, dict) else branch:
        items.append(_build(item, leaves) if isinstance(item, _BRANCHES) else None if item is None else next(leaves))
    if isinstance(branch, dict):
        built = dict(zip(_keys(cast("dict[Any, Any]", branch)), items, strict=True))
        return {key: built[key] for key in cast("dict[Any, Any]", branch)}
    return branch.__class__(*items) if hasattr(branch, "_fields") else branch.__class__(items)  # a named tuple, or not


def _keys(branch: dict[Any, Any]) -> list[Any]:
    try:
        return sorted(branch)
    except TypeError:  # keys of several types
        return sorted(branch, key=lambda key: (type(key).__name__, str(key)))
