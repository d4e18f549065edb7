"""Functions that kernels seldom need: sine and cosine as vectors, the rest lane by lane through the C library."""

# pyright: basic

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba.core import cgutils

from .maths import constants, polynomial
from .processor import FUSED
from .value import Value, call, fma, select
from .vector import elementwise

__all__ = [
    "arccos",
    "arccosh",
    "arcsin",
    "arcsinh",
    "arctan",
    "arctan2",
    "arctanh",
    "cos",
    "cosh",
    "hypot",
    "power",
    "sin",
    "sinh",
    "tan",
]


def _in_c(name: str, *arguments: Value) -> Value:
    """The function `name` of the C library in every lane; float32 has names that end in f."""
    first = arguments[0]
    builder = first.builder
    signature = ir.FunctionType(first.element, [first.element] * len(arguments))
    function = cgutils.get_or_insert_function(builder.module, signature, name if first.is_double else f"{name}f")
    if not first.lanes:
        return first.new(builder.call(function, [a.raw for a in arguments]))
    result: ir.Value = ir.Constant(first.raw.type, ir.Undefined)
    for i in range(first.lanes):
        lane = ir.Constant(ir.IntType(32), i)
        number = builder.call(function, [builder.extract_element(a.raw, lane) for a in arguments])
        result = builder.insert_element(result, number, lane)
    return first.new(result)


def _of_one(name: str, of_c: str, text: str) -> Any:
    def formula(x: Value) -> Value:
        return _in_c(of_c, x)

    formula.__name__ = formula.__qualname__ = name
    formula.__doc__ = text
    return elementwise(formula)


def _of_two(name: str, of_c: str, text: str) -> Any:
    def formula(a: Value, b: Value) -> Value:
        return _in_c(of_c, a, b)

    formula.__name__ = formula.__qualname__ = name
    formula.__doc__ = text
    return elementwise(formula)


tan = _of_one("tan", "tan", "The tangent.")
arcsin = _of_one("arcsin", "asin", "The angle with sine `x`.")
arccos = _of_one("arccos", "acos", "The angle with cosine `x`.")
arctan = _of_one("arctan", "atan", "The angle with tangent `x`.")
sinh = _of_one("sinh", "sinh", "The hyperbolic sine.")
cosh = _of_one("cosh", "cosh", "The hyperbolic cosine.")
arcsinh = _of_one("arcsinh", "asinh", "The inverse of the hyperbolic sine.")
arccosh = _of_one("arccosh", "acosh", "The inverse of the hyperbolic cosine.")
arctanh = _of_one("arctanh", "atanh", "The inverse of the hyperbolic tangent.")
arctan2 = _of_two("arctan2", "atan2", "The angle of the point with height `a` and width `b`.")
hypot = _of_two("hypot", "hypot", "The length of (`a`, `b`).")
power = _of_two("power", "pow", "`a` to the power `b`.")

# ---- sine and cosine ------------------------------------------------------------------------------------------------


def _quarter_turns(x: Value) -> tuple[Value, Value]:
    """`x` less whole multiples of pi / 2, and how many, in the lowest bits of integers."""
    c = constants(x)
    rounded = fma(x, 2.0 / math.pi, c.round)
    n = rounded - c.round
    for part in c.half_pi:
        x = fma(n, -part, x)
    return x, rounded.bits


def _wave(x: Value, quarters: int) -> Value:
    """The sine of ``x + quarters * pi / 2``, where `x` is not too large."""
    c = constants(x)
    r, n = _quarter_turns(x)
    u = r * r
    n = n + quarters
    sine = fma(r * u, polynomial(c.sin, u), r)
    cosine = fma(u * u, polynomial(c.cos, u), fma(u, -0.5, 1.0))
    y = select((n & 1).compare("==", 1), cosine, sine)
    flip = (n & 2) << (62 if x.is_double else 30)
    return (y.bits ^ flip).floats


def _any(bits: Value) -> Value:
    """Whether a bit is set in any lane."""
    if not bits.lanes:
        return bits
    packed = ir.IntType(bits.lanes)
    return bits.new(bits.builder.icmp_signed("!=", bits.builder.bitcast(bits.raw, packed), ir.Constant(packed, 0)))


def _unless_large(x: Value, formula: Callable[[Value], Value], of_c: str) -> Value:
    """`formula`, but by the C library if any angle is too large for it."""
    if not FUSED:
        return _in_c(of_c, x)
    builder = x.builder
    large = _any(call("fabs", x) > constants(x).turns)
    with builder.if_else(large.raw, likely=False) as (then, otherwise):
        with then:
            slow, from_slow = _in_c(of_c, x).raw, builder.block
        with otherwise:
            fast, from_fast = formula(x).raw, builder.block
    joined = builder.phi(x.raw.type)
    joined.add_incoming(slow, from_slow)
    joined.add_incoming(fast, from_fast)
    return x.new(joined)


@elementwise
def sin(x: Value) -> Value:
    """The sine."""
    return _unless_large(x, lambda angle: _wave(angle, 0), "sin")


@elementwise
def cos(x: Value) -> Value:
    """The cosine."""
    return _unless_large(x, lambda angle: _wave(angle, 1), "cos")
