"""Compiling the routines that matrix kernels call, all of them together for each kind of float."""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from llvmlite import ir

# Modules that have routines: what is kept on disk has all of them, whatever a process happens to need.
from . import native, objects, packing, sums, tiles  # noqa: F401
from .compiler import usable
from .lanes import Lanes, bodies, function_type
from .value import Value

__all__ = ["load"]


def _written(dtype: np.dtype[Any]) -> ir.Module:
    """All routines for one kind of float."""
    module = ir.Module(f"routines of {dtype.name}")
    element = ir.FloatType() if dtype == np.float32 else ir.DoubleType()
    for name, body in sorted(bodies.items()):
        function = ir.Function(module, function_type(body), native.symbol(name, dtype.name))
        builder = ir.IRBuilder(function.append_basic_block())
        body(Lanes(builder, element), *(Value(builder, argument) for argument in function.args))
        builder.ret_void()
    return module


@cache
def load(dtype: type[np.floating[Any]]) -> None:
    """Compile all routines for one kind of float, or take them from the cache, and bind their symbols.

    Parameters
    ----------
    dtype : type
        ``np.float32`` or ``np.float64``.
    """
    if not usable():
        return
    kind = np.dtype(dtype)
    symbols = [native.symbol(name, kind.name) for name in sorted(bodies)]
    native.share(kind.name, symbols, lambda: objects.of_module(_written(kind), symbols))
