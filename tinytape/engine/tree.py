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


def flatten(tree: Any) -> list[Any]:
    """The leaves of a tree, in order (dicts in the order of their sorted keys). None is an empty tree."""
    if isinstance(tree, dict):
        branch = cast(dict[Any, Any], tree)
        return [leaf for key in _keys(branch) for leaf in flatten(branch[key])]
    if isinstance(tree, list | tuple):
        return [leaf for item in cast("list[Any] | tuple[Any, ...]", tree) for leaf in flatten(item)]
    return [] if tree is None else [tree]


def unflatten(tree: Any, leaves: Iterable[Any]) -> Any:
    """A tree of the structure of `tree` with other leaves.

    Raises
    ------
    InputError
        If there are more or fewer leaves than the structure has.
    """
    given = list(leaves)
    wanted = len(flatten(tree))
    if len(given) != wanted:
        raise InputError(f"unflatten: {len(given)} leaves for a tree of {wanted}.", "pass one for each leaf.")
    return _build(tree, iter(given))


def map_leaves(function: Callable[..., Any], tree: Any, *others: Any) -> Any:
    """`function` applied leaf by leaf to trees of one structure."""
    return unflatten(tree, [function(*leaves) for leaves in zip(flatten(tree), *map(flatten, others), strict=True)])


def _build(tree: Any, leaves: Iterator[Any]) -> Any:
    if isinstance(tree, dict):
        branch = cast(dict[Any, Any], tree)
        built = {key: _build(branch[key], leaves) for key in _keys(branch)}
        return {key: built[key] for key in branch}
    if isinstance(tree, list | tuple):
        branch = cast(Any, tree)
        items = [_build(item, leaves) for item in branch]
        return type(branch)(*items) if hasattr(branch, "_fields") else type(branch)(items)  # a named tuple, or not
    return None if tree is None else next(leaves)


def _keys(branch: dict[Any, Any]) -> list[Any]:
    try:
        return sorted(branch)
    except TypeError:  # keys of several types
        return sorted(branch, key=lambda key: (type(key).__name__, str(key)))
