"""The machine that Numba generates code for: its vectors, its features, and its treatment of denormals."""

# pyright: basic, reportAttributeAccessIssue=false, reportCallIssue=false

from __future__ import annotations

import llvmlite.binding as llvm
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils, config
from numba.core.codegen import get_host_cpu_features
from numba.extending import intrinsic

__all__ = ["FUSED", "LANES", "WIDTH", "features", "flush_denormals", "name", "restore_denormals"]


def name() -> str:
    """The processor's name as LLVM spells it, such as ``"znver4"`` or ``"haswell"``."""
    return config.CPU_NAME or llvm.get_host_cpu_name()


def features() -> frozenset[str]:
    """The features that generated code may use, as LLVM spells them.

    These are the host's, unless ``NUMBA_CPU_FEATURES`` (a list such as ``"+avx2,+fma"``) says otherwise, as in Numba
    itself. ``NUMBA_CPU_NAME=generic`` means none, and ``NUMBA_ENABLE_AVX=0`` takes AVX away.
    """
    text = get_host_cpu_features() if config.CPU_FEATURES is None else config.CPU_FEATURES
    return frozenset(word[1:] for word in text.split(",") if word.startswith("+"))


def _vector_bytes(available: frozenset[str]) -> int:
    if "avx512f" in available:
        return 64
    return 32 if "avx" in available else 16


_IS_X86 = llvm.get_default_triple().startswith(("x86_64", "i386", "i686"))

WIDTH = _vector_bytes(features())
"""Bytes of a vector."""

LANES = {4: WIDTH // 4, 8: WIDTH // 8}
"""Elements of a vector, by the size of one in bytes."""

FUSED = not _IS_X86 or not features().isdisjoint({"fma", "avx512f"})
"""Whether multiply-and-add is one instruction; where it is not, LLVM would call the C library for each element."""

# ---- denormals ------------------------------------------------------------------------------------------------------

_FLUSH = 0x8040  # flush results to zero (bit 15), take arguments as zero (bit 6)
_WORD = ir.IntType(32)


def _call_on_control_word(builder: ir.IRBuilder, instruction: str, slot: ir.Value) -> None:
    pointer = ir.IntType(8).as_pointer()
    signature = ir.FunctionType(ir.VoidType(), [pointer])
    function = cgutils.get_or_insert_function(builder.module, signature, f"llvm.x86.sse.{instruction}")
    # An empty statement that touches all memory keeps LLVM from moving loads and stores to the other side.
    builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)
    builder.call(function, [builder.bitcast(slot, pointer)])
    builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], side_effect=True)


@intrinsic
def _control_word(typing_context):
    def generate(context, builder, signature, arguments):
        if not _IS_X86:
            return ir.Constant(_WORD, 0)
        slot = cgutils.alloca_once(builder, _WORD)
        _call_on_control_word(builder, "stmxcsr", slot)
        return builder.load(slot)

    return types.uint32(), generate


@intrinsic
def _set_control_word(typing_context, word):
    def generate(context, builder, signature, arguments):
        if _IS_X86:
            slot = cgutils.alloca_once(builder, _WORD)
            builder.store(arguments[0], slot)
            _call_on_control_word(builder, "ldmxcsr", slot)
        return context.get_dummy_value()

    return types.void(types.uint32), generate


@njit(cache=True, nogil=True)
def flush_denormals():
    """Let this thread take denormal numbers for zero; gives the state to hand to `restore_denormals`.

    Arithmetic on denormals can cost a hundred times as much as on other numbers. Does nothing but on x86.
    """
    before = _control_word()
    _set_control_word(types.uint32(before | types.uint32(_FLUSH)))
    return before


@njit(cache=True, nogil=True)
def restore_denormals(before):
    """Put back what `flush_denormals` found."""
    _set_control_word(types.uint32(before))
