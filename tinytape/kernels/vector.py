"""An explicit vector type for Numba.

``Vector(float32)`` is a register of as many elements as the machine adds at once. Inside ``@njit`` functions it has
the operators of a number; a number beside it stands for a vector of that number. Every function here writes its
instructions straight into the caller, so kernels made of them are vector code whatever LLVM thinks of their loops.
"""

# pyright: basic, reportArgumentType=false

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic, lower_builtin, models, register_model, type_callable

from . import processor
from .value import Value, select, splat

__all__ = [
    "Vector",
    "elementwise",
    "larger",
    "largest",
    "named",
    "only",
    "reduction",
    "smaller",
    "smallest",
    "total",
    "valid_lanes",
]

_INT32 = ir.IntType(32)
_INT64 = ir.IntType(64)


class Vector(types.Type):
    """Numba's type of a vector of floats.

    Parameters
    ----------
    dtype : types.Float
        The type of its elements, ``types.float32`` or ``types.float64``.
    """

    def __init__(self, dtype: types.Float) -> None:
        self.dtype = dtype
        self.lanes = processor.LANES[dtype.bitwidth // 8]
        super().__init__(name=f"Vector({dtype})")


@register_model(Vector)
class _VectorModel(models.PrimitiveModel):
    def __init__(self, manager: Any, front: Vector) -> None:
        element = ir.FloatType() if front.dtype == types.float32 else ir.DoubleType()
        super().__init__(manager, front, ir.VectorType(element, front.lanes))


# ---- formulas as functions of kernels -------------------------------------------------------------------------------


def _common(arguments: tuple[types.Type, ...]) -> types.Type | None:
    """The type of an elementwise function's result, or None where the arguments do not fit together.

    One vector makes it a vector. Of plain floats the narrowest wins, as literals have 64 bits.
    """
    if any(not isinstance(a, Vector | types.Number | types.Boolean) for a in arguments):
        return None
    vectors = {a for a in arguments if isinstance(a, Vector)}
    if vectors:
        return vectors.pop() if len(vectors) == 1 else None
    return types.float32 if types.float32 in arguments else types.float64


def _as(context: Any, builder: ir.IRBuilder, raw: ir.Value, given: types.Type, wanted: types.Type) -> Value:
    """An argument as the formula wants it: numbers cast to the vector's element and put in every lane."""
    if given == wanted:
        return Value(builder, raw)
    if not isinstance(wanted, Vector):
        return Value(builder, context.cast(builder, raw, given, wanted))
    return splat(Value(builder, context.cast(builder, raw, given, wanted.dtype)), wanted.lanes)


def _writer(formula: Callable[..., Value]) -> Callable[..., ir.Value]:
    def generate(context, builder, signature, raw):
        wanted = signature.return_type
        values = (_as(context, builder, r, given, wanted) for r, given in zip(raw, signature.args, strict=True))
        return formula(*values).raw

    return generate


def elementwise(formula: Callable[..., Value]) -> Any:
    """A function of kernels from a formula on values: of vectors, of plain floats, and of both together.

    Parameters
    ----------
    formula : callable
        Takes and gives `Value`; it runs while the kernel is compiled, and what it writes is the caller's code.
    """
    generate = _writer(formula)

    def definition(typing_context, *arguments):
        result = _common(arguments)
        return None if result is None else (result(*arguments), generate)

    return named(definition, formula)


def named(definition: Callable[..., Any], like: Callable[..., Any]) -> Any:
    """An intrinsic from its definition, with the name, text and parameters of `like`.

    Numba matches arguments to the parameters that the signature shows, and a definition takes any number.
    """
    typing_context = inspect.Parameter("typing_context", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    definition.__name__ = like.__name__
    definition.__qualname__ = like.__qualname__
    definition.__module__ = like.__module__
    definition.__doc__ = like.__doc__
    parameters = [p.replace(annotation=p.empty) for p in inspect.signature(like).parameters.values()]
    definition.__signature__ = inspect.Signature([typing_context, *parameters])  # pyright: ignore[reportFunctionMemberAccess]
    return intrinsic(definition)


def _operator(symbol: Any, formula: Callable[..., Value], arity: int) -> None:
    def typer_of_two(context):
        def typer(a, b):
            return _common((a, b)) if isinstance(a, Vector) or isinstance(b, Vector) else None

        return typer

    def typer_of_one(context):
        def typer(a):
            return a if isinstance(a, Vector) else None

        return typer

    type_callable(symbol)(typer_of_one if arity == 1 else typer_of_two)
    kinds = [(Vector,)] if arity == 1 else [(Vector, Vector), (Vector, types.Number), (types.Number, Vector)]
    for kind in kinds:
        lower_builtin(symbol, *kind)(_writer(formula))


for _name in ("add", "sub", "mul", "truediv"):
    _operator(getattr(operator, _name), getattr(operator, _name), 2)
    _operator(getattr(operator, f"i{_name}"), getattr(operator, _name), 2)
_operator(operator.neg, operator.neg, 1)

# ---- lanes ----------------------------------------------------------------------------------------------------------


def steps(element: ir.Type, lanes: int) -> ir.Constant:
    """0, 1, 2, ... as integers."""
    return ir.Constant(ir.VectorType(element, lanes), [ir.Constant(element, i) for i in range(lanes)])


def valid_lanes(m: Value, vector: ir.VectorType) -> Value:
    """Bits that are set in the first `m` lanes. Integers of the elements' width spare the machine a conversion."""
    width = ir.IntType(64 if isinstance(vector.element, ir.DoubleType) else 32)
    bound = m if width == _INT64 else m.new(m.builder.trunc(m.raw, width))
    return m.new(steps(width, vector.count)) < splat(bound, vector.count)


def _halves(v: Value, combine: Callable[[Value, Value], Value]) -> Value:
    """All lanes combined, always in the same order: lane i with lane i + L/2, then i + L/4, and so on."""
    while v.lanes > 1:
        half = v.lanes // 2
        parts = []
        for start in (0, half):
            order = ir.Constant(ir.VectorType(_INT32, half), [ir.Constant(_INT32, start + i) for i in range(half)])
            parts.append(v.new(v.builder.shuffle_vector(v.raw, ir.Constant(v.raw.type, ir.Undefined), order)))
        v = combine(*parts)
    return v.new(v.builder.extract_element(v.raw, ir.Constant(_INT32, 0)))


def larger(a: Value, b: Value) -> Value:
    """The larger of both, and NaN where either is NaN, as in NumPy."""
    return select(a.is_nan(), a, select(a > b, a, b))


def smaller(a: Value, b: Value) -> Value:
    """The smaller of both, and NaN where either is NaN, as in NumPy."""
    return select(a.is_nan(), a, select(a < b, a, b))


def reduction(name: str, combine: Callable[[Value, Value], Value], text: str) -> Any:
    """A function of kernels that combines a vector's lanes to one number, always in the same order.

    Parameters
    ----------
    name, text : str
        The function's name, and what it says of itself.
    combine : callable
        Combines two values; it runs while the kernel is compiled.
    """

    def definition(typing_context, v):
        if not isinstance(v, Vector):
            return None

        def generate(context, builder, signature, raw):
            return _halves(Value(builder, raw[0]), combine).raw

        return v.dtype(v), generate

    def like(v): ...

    like.__name__ = like.__qualname__ = name
    like.__doc__ = text
    return named(definition, like)


total = reduction("total", operator.add, "The sum of a vector's lanes, always added in the same order.")
largest = reduction("largest", larger, "The largest of a vector's lanes; NaN if there is one.")
smallest = reduction("smallest", smaller, "The smallest of a vector's lanes; NaN if there is one.")


@intrinsic
def only(typing_context, v, m, other):
    """`v` with the number `other` in all lanes from `m` on."""

    def generate(context, builder, signature, raw):
        vector, count, number = (Value(builder, r) for r in raw)
        return select(valid_lanes(count, vector.raw.type), vector, splat(number, vector.lanes)).raw

    return (v(v, types.int64, v.dtype), generate) if isinstance(v, Vector) else None
