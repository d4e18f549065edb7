"""Waiting for another thread without going to sleep: for a time that is shorter than waking up takes."""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from .compiler import kernel

__all__ = ["wait_for_change"]

_WORD = ir.IntType(64)
_PAUSE = "llvm.x86.sse2.pause" if llvm.get_default_triple().startswith(("x86_64", "i386", "i686")) else None


@intrinsic
def _look(typing_context, address):
    """The word at an address as another thread left it, after a pause of 40 to 140 cycles."""

    def generate(context, builder, signature, arguments):
        if _PAUSE:
            nothing = ir.FunctionType(ir.VoidType(), [])
            builder.call(cgutils.get_or_insert_function(builder.module, nothing, _PAUSE), [])
        pointer = builder.inttoptr(arguments[0], _WORD.as_pointer())
        return builder.load_atomic(pointer, ordering="acquire", align=8)

    return types.int64(types.int64), generate


@kernel
def wait_for_change(address, value, patience):
    """Return when the word at `address` is not `value` any more, or after so many looks."""
    for _ in range(patience):
        if _look(address) != value:
            return
