"""What matrix kernels are written with: instructions on vectors of one kind of float, and routines made of them.

A *routine* is a plain LLVM function of integers. It is compiled once for each kind of float and bound to a symbol, so
that kernels which use it link a call and not a copy: Numba optimises and generates all callees again in every caller.
"""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from . import native, processor
from .value import Value, splat
from .vector import valid_lanes

__all__ = ["Lanes", "Variable", "bodies", "function_type", "lanes_of", "routine", "size_of"]

_BYTE = ir.IntType(8)
_WORD = ir.IntType(32)
_INTEGER = ir.IntType(64)
_NOTHING = ir.VoidType()


class Variable:
    """A vector that can be assigned to. LLVM keeps it in a register."""

    def __init__(self, start: Value) -> None:
        self._builder = start.builder
        self._slot = cgutils.alloca_once(start.builder, start.raw.type)
        self.value = start

    @property
    def value(self) -> Value:
        return Value(self._builder, self._builder.load(self._slot))

    @value.setter
    def value(self, value: Value) -> None:
        self._builder.store(value.raw, self._slot)


class Lanes:
    """Writes instructions. Addresses are integers, and memory needs no more alignment than its elements.

    Parameters
    ----------
    builder : ir.IRBuilder
        Where instructions are written.
    element : ir.FloatType or ir.DoubleType
        The kind of float.
    """

    def __init__(self, builder: ir.IRBuilder, element: ir.Type) -> None:
        self.builder = builder
        self.element = element
        self.size = 8 if isinstance(element, ir.DoubleType) else 4
        self.bytes = processor.WIDTH
        self.count = processor.LANES[self.size]
        self.type = ir.VectorType(element, self.count)

    # ---- values ----

    def integer(self, number: int | Value) -> Value:
        return number if isinstance(number, Value) else Value(self.builder, ir.Constant(_INTEGER, number))

    def zero(self) -> Value:
        """A vector of zeros."""
        return Value(self.builder, ir.Constant(self.type, None))

    def quotient(self, number: Value, by: int) -> Value:
        """An integer that is not negative, divided by a power of two."""
        return number >> (by.bit_length() - 1)

    def vectors(self, width: Value) -> Value:
        """How many vectors hold so many elements."""
        return self.quotient(width + (self.count - 1), self.count)

    def first(self, count: Value) -> Value:
        """A mask of the first lanes; `count` may be negative, or more than there are."""
        return valid_lanes(count, self.type)

    def transpose(self, vectors: list[Value]) -> list[Value]:
        """The rows of a square matrix transposed: exchanges blocks of one, two, four ... elements between two rows."""
        rows = list(vectors)
        lanes = range(self.count)
        block = 1
        while block < self.count:
            low = [lane + self.count - block if lane & block else lane for lane in lanes]
            high = [lane + self.count if lane & block else lane + block for lane in lanes]
            for i in lanes:
                if not i & block:
                    pair = rows[i], rows[i + block]
                    rows[i], rows[i + block] = self._shuffle(*pair, low), self._shuffle(*pair, high)
            block *= 2
        return rows

    def _shuffle(self, a: Value, b: Value, order: list[int]) -> Value:
        indices = ir.Constant(ir.VectorType(_WORD, self.count), [ir.Constant(_WORD, i) for i in order])
        return Value(self.builder, self.builder.shuffle_vector(a.raw, b.raw, indices))

    # ---- control ----

    @contextmanager
    def loop(self, stop: Value, start: int | Value = 0, step: int = 1) -> Iterator[Value]:
        """What is written inside runs for every number of a range."""
        bounds = self.integer(start).raw, stop.raw, self.integer(step).raw
        with cgutils.for_range_slice(self.builder, *bounds) as (index, _):
            yield Value(self.builder, index)

    def choose(self, condition: Value, then: Callable[[], None], otherwise: Callable[[], None]) -> None:
        """Write both branches."""
        with self.builder.if_else(condition.raw) as (yes, no):
            with yes:
                then()
            with no:
                otherwise()

    def switch(self, number: Value, cases: Mapping[int, Callable[[], None]]) -> None:
        """Write a branch for each number; others do nothing."""
        end = self.builder.append_basic_block("end")
        switch = self.builder.switch(number.raw, end)
        for case, write in cases.items():
            block = self.builder.append_basic_block(f"case_{case}")
            switch.add_case(ir.Constant(_INTEGER, case), block)
            self.builder.position_at_end(block)
            write()
            self.builder.branch(end)
        self.builder.position_at_end(end)

    # ---- memory ----

    def get(self, address: Value) -> Value:
        """One number."""
        return Value(self.builder, self.builder.load(self._pointer(address, self.element), align=self.size))

    def put(self, number: Value, address: Value) -> None:
        """Write one number."""
        self.builder.store(number.raw, self._pointer(address, self.element), align=self.size)

    def load(self, address: Value, mask: Value | None = None) -> Value:
        """A vector; lanes outside the mask are zero, and their memory is not touched."""
        pointer = self._pointer(address, self.type)
        if mask is None:
            return Value(self.builder, self.builder.load(pointer, align=self.size))
        align = ir.Constant(_WORD, self.size)
        return Value(self.builder, self._masked("load", self.type, pointer, align, mask.raw, self.zero().raw))

    def store(self, vector: Value, address: Value, mask: Value | None = None) -> None:
        """Write a vector, or its lanes in the mask."""
        pointer = self._pointer(address, self.type)
        if mask is None:
            self.builder.store(vector.raw, pointer, align=self.size)
        else:
            self._masked("store", _NOTHING, vector.raw, pointer, ir.Constant(_WORD, self.size), mask.raw)

    def repeat(self, address: Value) -> Value:
        """One number of memory in every lane."""
        return splat(self.get(address), self.count)

    def prefetch(self, address: Value) -> None:
        """Ask for the cache line of an address, which need not exist."""
        to_read, keep, data = (ir.Constant(_WORD, flag) for flag in (0, 3, 1))
        self._call("llvm.prefetch.p0", _NOTHING, self._pointer(address, _BYTE), to_read, keep, data)

    def _pointer(self, address: Value, target: ir.Type) -> Any:
        return self.builder.inttoptr(address.raw, target.as_pointer())

    def _masked(self, name: str, result: ir.Type, *arguments: Any) -> Any:
        return self._call(f"llvm.masked.{name}.v{self.count}f{8 * self.size}.p0", result, *arguments)

    def _call(self, name: str, result: ir.Type, *arguments: Any) -> Any:
        signature = ir.FunctionType(result, [argument.type for argument in arguments])
        return self.builder.call(cgutils.get_or_insert_function(self.builder.module, signature, name), arguments)


# ---- numbers that depend on the kind of float -----------------------------------------------------------------------


@intrinsic
def size_of(typing_context, zero):
    """How many bytes a float of this kind has."""
    return types.int64(zero), lambda *_: ir.Constant(_INTEGER, zero.bitwidth // 8)


@intrinsic
def lanes_of(typing_context, zero):
    """How many floats of this kind a vector has."""
    return types.int64(zero), lambda *_: ir.Constant(_INTEGER, processor.LANES[zero.bitwidth // 8])


# ---- routines -------------------------------------------------------------------------------------------------------

Body = Callable[..., None]

bodies: dict[str, Body] = {}  # of all routines


def _parameters(body: Body) -> list[inspect.Parameter]:
    """The routine's own parameters."""
    return list(inspect.signature(body).parameters.values())[1:]


def function_type(body: Body) -> ir.FunctionType:
    """The type of the routine as a function of LLVM's."""
    return ir.FunctionType(_NOTHING, [_INTEGER] * len(_parameters(body)))


def routine(body: Body) -> Any:
    """A function of kernels from one that writes its instructions.

    Parameters
    ----------
    body : callable
        Takes `Lanes` and then the routine's arguments, which are integers.

    Returns
    -------
    intrinsic
        Takes a zero of the wanted kind of float and then the routine's arguments. `routines.load` of that kind must
        have run before code that calls it is loaded.
    """
    name = body.__name__
    bodies[name] = body

    def definition(typing_context, zero, *arguments):
        def generate(context, builder, signature, values):
            builder.call(
                cgutils.get_or_insert_function(builder.module, function_type(body), native.symbol(name, str(zero))),
                values[1:],
            )
            return context.get_dummy_value()

        return types.void(zero, *[types.int64] * len(_parameters(body))), generate

    leading = [inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in ("typing_context", "zero")]
    own = [parameter.replace(annotation=parameter.empty) for parameter in _parameters(body)]
    definition.__signature__ = inspect.Signature([*leading, *own])  # pyright: ignore[reportFunctionMemberAccess]
    definition.__name__ = definition.__qualname__ = name
    definition.__doc__ = body.__doc__
    return intrinsic(definition)
