"""Whether kernels can be compiled here, and how the hand-written ones are declared."""

# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import cache
from typing import Any

__all__ = ["kernel", "usable"]


@cache
def usable() -> bool:
    """Whether Numba can be imported and compiles, which ``NUMBA_DISABLE_JIT=1`` forbids.

    Imports it, unless it has compiled kernels here before: for this version of itself, on this machine.
    """
    try:
        if "NUMBA_DISABLE_JIT" not in os.environ and "numba" not in sys.modules and _has_compiled():
            return True
        from numba import config
    except ImportError:
        return False
    return not config.DISABLE_JIT


def _has_compiled() -> bool:
    from . import folder
    from .fingerprint import SETTINGS_FILE, fingerprint

    return not SETTINGS_FILE.exists() and folder.holds(fingerprint(), "*.native")


def kernel(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    """``numba.njit`` for kernels: without the GIL, with NumPy's division, and kept on disk.

    Parameters
    ----------
    function : callable
    **options
        More of ``njit``'s own.
    """
    if function is None:
        return lambda function: kernel(function, **options)
    from numba import njit

    from .store import keep

    return keep(njit(nogil=True, error_model="numpy", **options)(function))
