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
    leaves: list[Any] = []
    _gather(tree, leaves.append)
    return leaves


def _gather(tree: Any, add: Callable[[Any], None]) -> None:
    if not isinstance(tree, _BRANCHES):
        if tree is not None:
            add(tree)
    elif isinstance(tree, dict):
        branch = cast(dict[Any, Any], tree)
        for key in _keys(branch):
            _gather(branch[key], add)
    else:
        for item in cast("list[Any]", tree):
            _gather(item, add)


def unflatten(tree: Any, leaves: Iterable[Any]) -> Any:
    """A tree of the structure of `tree` with other leaves.

    Raises
    ------
    InputError
        If there are more or fewer leaves than the structure has.
    """
    given = list(leaves)
    if not isinstance(tree, _BRANCHES) and tree is not None and len(given) == 1:  # so it is for most carries
        return given[0]
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


def map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`function` applied leaf by leaf to trees of one structure."""
    return unflatten(tree, [function(*leaves) for leaves in zip(flatten(tree), *map(flatten, others), strict=True)])


def _build(tree: Any, leaves: Iterator[Any]) -> Any:
    if not isinstance(tree, _BRANCHES):
        return None if tree is None else next(leaves)
    if isinstance(tree, dict):
        branch = cast(dict[Any, Any], tree)
        built = {key: _build(branch[key], leaves) for key in _keys(branch)}
        return {key: built[key] for key in branch}
    branch = cast(Any, tree)
    items = [_build(item, leaves) for item in branch]
    return branch.__class__(*items) if hasattr(branch, "_fields") else branch.__class__(items)  # a named tuple, or not


def _keys(branch: dict[Any, Any]) -> list[Any]:
    try:
        return sorted(branch)
    except TypeError:  # keys of several types
        return sorted(branch, key=lambda key: (type(key).__name__, str(key)))
