"""Comparing a saved state with the one that is wanted, so that an error can list everything that does not fit."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.tree import is_array

__all__ = ["differences"]


def differences(found: Any, wanted: Any, path: str) -> list[str]:
    """Where two trees of dicts, lists, arrays and numbers differ in names, kinds, shapes and dtypes.

    Numbers are not compared, and of a list of names only which they are, not their order.
    """
    names = _names(wanted)
    if names and _names(found):
        found, wanted = _names(found), names
    if _kind(found) != _kind(wanted):
        return [f"{path}: {_kind(found)}, but {_kind(wanted)} here"]
    rows: list[str] = []
    if hasattr(wanted, "keys"):
        rows += [f"{path}/{key}: missing" for key in wanted if key not in found]
        rows += [f"{path}/{key}: not known here" for key in found if key not in wanted]
        both = [key for key in wanted if key in found]
    else:
        both = range(len(wanted)) if hasattr(wanted, "append") else ()
    return rows + [row for key in both for row in differences(found[key], wanted[key], f"{path}/{key}")]


def _names(value: Any) -> dict[str, None] | None:
    """A list of strings as the keys of a dict."""
    items: list[Any] = value if hasattr(value, "append") else []
    return dict.fromkeys(items) if items and all(isinstance(item, str) for item in items) else None


def _kind(value: Any) -> str:
    if hasattr(value, "keys"):
        return "a dict"
    if is_array(value):
        return f"{value.dtype}{list(value.shape)}"
    if isinstance(value, bool):
        return "a bool"
    if isinstance(value, int | float | np.integer | np.floating):
        return "a number"
    return f"a list of {len(value)}" if hasattr(value, "append") else f"a {type(value).__name__}"
