"""Functions of vectors that take an instruction or a few: comparisons, selection, rounding, arithmetic.

They mean what NumPy's of the same name mean. There are no vectors of bools: what is true is 1.0, what is false 0.0,
and any number but zero (NaN too) counts as true.
"""

# pyright: basic

from __future__ import annotations

import math

from .value import Value, call, select
from .value import fma as fused
from .vector import elementwise, larger, smaller

__all__ = [
    "absolute",
    "ceil",
    "clip",
    "equal",
    "floor",
    "floor_divide",
    "fma",
    "greater",
    "greater_equal",
    "isfinite",
    "isinf",
    "isnan",
    "leaky_relu",
    "less",
    "less_equal",
    "logical_and",
    "logical_not",
    "logical_or",
    "logical_xor",
    "maximum",
    "minimum",
    "negative",
    "not_equal",
    "reciprocal",
    "relu",
    "remainder",
    "rint",
    "sign",
    "sqrt",
    "square",
    "where",
]


def _truth(bits: Value, like: Value) -> Value:
    return select(bits, like.constant(1.0), 0.0)


# ---- arithmetic -----------------------------------------------------------------------------------------------------


@elementwise
def fma(a: Value, b: Value, c: Value) -> Value:
    """``a * b + c``, rounded once on machines that can."""
    return fused(a, b, c)


@elementwise
def negative(x: Value) -> Value:
    """Minus `x`."""
    return -x


@elementwise
def square(x: Value) -> Value:
    """`x` times itself."""
    return x * x


@elementwise
def reciprocal(x: Value) -> Value:
    """One over `x`."""
    return 1.0 / x


@elementwise
def sqrt(x: Value) -> Value:
    """The square root."""
    return call("sqrt", x)


@elementwise
def absolute(x: Value) -> Value:
    """`x` without its sign."""
    return call("fabs", x)


@elementwise
def sign(x: Value) -> Value:
    """1 where `x` is positive, -1 where it is negative; zeros and NaN stay."""
    return select(x > 0.0, 1.0, select(x < 0.0, -1.0, x))


@elementwise
def floor(x: Value) -> Value:
    """The next whole number below."""
    return call("floor", x)


@elementwise
def ceil(x: Value) -> Value:
    """The next whole number above."""
    return call("ceil", x)


@elementwise
def rint(x: Value) -> Value:
    """The nearest whole number, and of two the even one."""
    return call("rint", x)


def _needs_step(left: Value, b: Value) -> Value:
    """Where C's remainder has the other sign than `b`, so that one more multiple goes into it."""
    return ((left < 0.0) ^ (b < 0.0)) & left.differs(0.0)


@elementwise
def remainder(a: Value, b: Value) -> Value:
    """What is left of `a` after whole multiples of `b`, with the sign of `b`."""
    left = a % b
    moved = select(_needs_step(left, b), left + b, left)
    return select(left.equals(0.0), call("copysign", left, b), moved)


@elementwise
def floor_divide(a: Value, b: Value) -> Value:
    """The whole number of times that `b` goes into `a`, rounded down."""
    left = a % b
    quotient = (a - left) / b
    quotient = select(_needs_step(left, b), quotient - 1.0, quotient)
    whole = call("floor", quotient)
    whole = select((quotient - whole) > 0.5, whole + 1.0, whole)  # the division above is rounded
    whole = select(whole.equals(0.0), call("copysign", whole, a / b), whole)
    return select(b.equals(0.0), a / b, whole)


# ---- of two, and choices --------------------------------------------------------------------------------------------


@elementwise
def maximum(a: Value, b: Value) -> Value:
    """The larger of both; NaN where either is."""
    return larger(a, b)


@elementwise
def minimum(a: Value, b: Value) -> Value:
    """The smaller of both; NaN where either is."""
    return smaller(a, b)


@elementwise
def clip(x: Value, low: Value, high: Value) -> Value:
    """`x` held between `low` and `high`; `high` wins where they cross."""
    return smaller(larger(x, low), high)


@elementwise
def where(condition: Value, a: Value, b: Value) -> Value:
    """`a` where `condition` is not zero, `b` elsewhere."""
    return select(condition.differs(0.0), a, b)


@elementwise
def relu(x: Value) -> Value:
    """`x` where it is positive, 0 elsewhere."""
    return select(x <= 0.0, 0.0, x)


@elementwise
def leaky_relu(x: Value, negative_slope: Value) -> Value:
    """`x` where it is positive, ``negative_slope * x`` elsewhere."""
    return select(x > 0.0, x, negative_slope * x)


# ---- comparisons and truth ------------------------------------------------------------------------------------------


@elementwise
def less(a: Value, b: Value) -> Value:
    """Whether `a` is less than `b`."""
    return _truth(a < b, a)


@elementwise
def less_equal(a: Value, b: Value) -> Value:
    """Whether `a` is at most `b`."""
    return _truth(a <= b, a)


@elementwise
def greater(a: Value, b: Value) -> Value:
    """Whether `a` is greater than `b`."""
    return _truth(a > b, a)


@elementwise
def greater_equal(a: Value, b: Value) -> Value:
    """Whether `a` is at least `b`."""
    return _truth(a >= b, a)


@elementwise
def equal(a: Value, b: Value) -> Value:
    """Whether both are equal."""
    return _truth(a.equals(b), a)


@elementwise
def not_equal(a: Value, b: Value) -> Value:
    """Whether both differ, as NaN does from everything."""
    return _truth(a.differs(b), a)


@elementwise
def isnan(x: Value) -> Value:
    """Whether `x` is NaN."""
    return _truth(x.is_nan(), x)


@elementwise
def isinf(x: Value) -> Value:
    """Whether `x` is infinite."""
    return _truth(call("fabs", x).equals(math.inf), x)


@elementwise
def isfinite(x: Value) -> Value:
    """Whether `x` is neither infinite nor NaN."""
    return _truth(call("fabs", x) < math.inf, x)


@elementwise
def logical_not(a: Value) -> Value:
    """Whether `a` is zero."""
    return _truth(a.equals(0.0), a)


@elementwise
def logical_and(a: Value, b: Value) -> Value:
    """Whether neither is zero."""
    return _truth(a.differs(0.0) & b.differs(0.0), a)


@elementwise
def logical_or(a: Value, b: Value) -> Value:
    """Whether not both are zero."""
    return _truth(a.differs(0.0) | b.differs(0.0), a)


@elementwise
def logical_xor(a: Value, b: Value) -> Value:
    """Whether one is zero and the other is not."""
    return _truth(a.differs(0.0) ^ b.differs(0.0), a)
