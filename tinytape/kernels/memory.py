"""What moves vectors and numbers in and out of memory.

Memory is named by a byte address and an index in elements, and needs no more alignment than its elements. The last
argument `m` says how many lanes are valid: the others are not touched, and read as zero. Where `m` is the number of
lanes, and the compiler can see it, this is a plain move.
"""

# pyright: basic, reportArgumentType=false

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic
from numba.np.arrayobj import make_array, populate_array

from .value import Value, splat
from .vector import Vector, named, steps, valid_lanes

__all__ = ["Memory", "array_at"]

_INT8 = ir.IntType(8)
_INT32 = ir.IntType(32)
_INT64 = ir.IntType(64)


def _size(element: ir.Type) -> int:
    return 8 if isinstance(element, ir.DoubleType) else 4


def _pointer(address: Value, j: Value, element: ir.Type, size: int) -> Any:
    return address.builder.inttoptr((address + j * size).raw, element.as_pointer())


def _pointers(address: Value, j: Value, stride: Value, vector: ir.VectorType) -> Any:
    size, lanes = _size(vector.element), vector.count
    apart = address.new(steps(_INT64, lanes)) * splat(stride * size, lanes)
    places = splat(address + j * size, lanes) + apart
    return address.builder.inttoptr(places.raw, ir.VectorType(vector.element.as_pointer(), lanes))


def _masked(builder: ir.IRBuilder, name: str, data: ir.VectorType, result: ir.Type, *arguments: Any) -> Any:
    """Call one of LLVM's masked memory functions; it fills in the pointers' part of the name itself."""
    signature = ir.FunctionType(result, [a.type for a in arguments])
    whole = f"llvm.masked.{name}.v{data.count}{data.element.intrinsic_name}"
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, whole), arguments)


def _read(pointer: ir.Value, mask: Value, data: ir.VectorType, size: int) -> Value:
    align, zeros = ir.Constant(_INT32, size), ir.Constant(data, None)
    return mask.new(_masked(mask.builder, "load", data, data, pointer, align, mask.raw, zeros))


def _write(v: Value, pointer: ir.Value, mask: Value, size: int) -> None:
    align = ir.Constant(_INT32, size)
    _masked(v.builder, "store", v.raw.type, ir.VoidType(), v.raw, pointer, align, mask.raw)


def _values(builder: ir.IRBuilder, raw: list[ir.Value]) -> list[Value]:
    return [Value(builder, r) for r in raw]


# ---- arrays ---------------------------------------------------------------------------------------------------------


@intrinsic
def array_at(typing_context, zero, address, n):
    """The array of n numbers at an address, or an empty one where that is 0."""
    kind = types.Array(zero, 1, "C")

    def generate(context, builder, signature, raw):
        array = make_array(kind)(context, builder)
        integer = raw[1].type
        nothing = ir.Constant(integer, 0)
        length = builder.select(builder.icmp_signed("==", raw[1], nothing), nothing, raw[2])
        data = builder.inttoptr(raw[1], context.get_data_type(zero).as_pointer())
        size = ir.Constant(integer, zero.bitwidth // 8)
        populate_array(array, data=data, shape=[length], strides=[size], itemsize=size, meminfo=None)
        return array._getvalue()

    return kind(zero, types.int64, types.int64), generate


# ---- writing, by the type of what is written ------------------------------------------------------------------------


@intrinsic
def store(typing_context, address, j, v, m):
    """Write the first `m` lanes of `v` to elements `j`, `j` + 1, ..."""

    def generate(context, builder, signature, raw):
        where, index, vector, count = _values(builder, raw)
        data = vector.raw.type
        pointer = _pointer(where, index, data, _size(data.element))
        _write(vector, pointer, valid_lanes(count, data), _size(data.element))
        return context.get_dummy_value()

    return (types.void(types.int64, types.int64, v, types.int64), generate) if isinstance(v, Vector) else None


@intrinsic
def store_strided(typing_context, address, j, stride, v, m):
    """Write the first `m` lanes of `v` to elements `j`, `j` + `stride`, ..."""

    def generate(context, builder, signature, raw):
        where, index, apart, vector, count = _values(builder, raw)
        data = vector.raw.type
        places, align = _pointers(where, index, apart, data), ir.Constant(_INT32, _size(data.element))
        mask = valid_lanes(count, data).raw
        _masked(builder, "scatter", data, ir.VoidType(), vector.raw, places, align, mask)
        return context.get_dummy_value()

    return (types.void(*[types.int64] * 3, v, types.int64), generate) if isinstance(v, Vector) else None


# ---- reading, by dtype ----------------------------------------------------------------------------------------------


class Memory:
    """The functions that make vectors of one dtype out of memory or numbers.

    Parameters
    ----------
    dtype : types.Float
        The dtype, ``types.float32`` or ``types.float64``.
    """

    def __init__(self, dtype: types.Float) -> None:
        self.vector = Vector(dtype)
        self.element = ir.FloatType() if dtype == types.float32 else ir.DoubleType()
        self.data = ir.VectorType(self.element, self.vector.lanes)
        self.size = _size(self.element)

    def _function(self, like: Any, signature: Any, write: Any) -> Any:
        def generate(context, builder, _, raw):
            result = write(*_values(builder, raw))
            return context.get_dummy_value() if result is None else result.raw

        def definition(typing_context, *arguments):
            return signature, generate

        return named(definition, like)

    def load(self) -> Any:
        """A function that reads neighbours."""

        def load(address, j, m):
            """Elements `j`, `j` + 1, ..., as many as `m`; zero in the other lanes."""

        def write(address: Value, j: Value, m: Value) -> Value:
            mask = valid_lanes(m, self.data)
            return _read(_pointer(address, j, self.data, self.size), mask, self.data, self.size)

        return self._function(load, self.vector(*[types.int64] * 3), write)

    def strided(self) -> Any:
        """A function that reads elements that lie apart."""

        def strided(address, j, stride, m):
            """Elements `j`, `j` + `stride`, ..., as many as `m`; zero in the other lanes."""

        def write(address: Value, j: Value, stride: Value, m: Value) -> Value:
            places, align = _pointers(address, j, stride, self.data), ir.Constant(_INT32, self.size)
            mask, zeros = valid_lanes(m, self.data).raw, ir.Constant(self.data, None)
            return address.new(_masked(address.builder, "gather", self.data, self.data, places, align, mask, zeros))

        return self._function(strided, self.vector(*[types.int64] * 4), write)

    def get(self) -> Any:
        """A function that reads one element."""

        def get(address, j):
            """Element `j`."""

        def write(address: Value, j: Value) -> Value:
            return address.new(address.builder.load(_pointer(address, j, self.element, self.size), align=self.size))

        return self._function(get, self.vector.dtype(types.int64, types.int64), write)

    def put(self) -> Any:
        """A function that writes one element."""

        def put(address, j, x):
            """Write the number `x` to element `j`."""

        def write(address: Value, j: Value, x: Value) -> None:
            pointer = _pointer(address, j, self.element, self.size)
            address.builder.store(x.raw, pointer, align=self.size)

        return self._function(put, types.void(types.int64, types.int64, self.vector.dtype), write)

    def fill(self) -> Any:
        """A function that repeats a number."""

        def fill(x):
            """A vector with the number `x` in every lane."""

        return self._function(fill, self.vector(self.vector.dtype), lambda x: splat(x, self.vector.lanes))

    def prefetch(self) -> Any:
        """A function that asks for memory which will soon be read."""

        def prefetch(address, j):
            """Have the cache line of element `j`, which need not exist, on its way."""

        def write(address: Value, j: Value) -> None:
            data = ir.FunctionType(ir.VoidType(), [_INT8.as_pointer(), *[_INT32] * 3])
            to_read, keep = ir.Constant(_INT32, 0), ir.Constant(_INT32, 3)
            function = cgutils.get_or_insert_function(address.builder.module, data, "llvm.prefetch.p0")
            pointer = _pointer(address, j, _INT8, self.size)
            address.builder.call(function, [pointer, to_read, keep, ir.Constant(_INT32, 1)])

        return self._function(prefetch, types.void(types.int64, types.int64), write)
