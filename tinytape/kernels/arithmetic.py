"""Functions of vectors that take an instruction or a few: comparisons, selection, rounding, arithmetic.

They mean what NumPy's of the same name mean. There are no vectors of bools: what is true is 1.0, what is false 0.0,
and any number but zero (NaN too) counts as true.
"""

# pyright: basic

from __future__ import annotations

from .value import Value, call, select
from .value import fma as fused
from .vector import elementwise, larger, smaller

__all__ = [
    "absolute",
    "ceil",
    "equal",
    "floor",
    "fma",
    "greater",
    "greater_equal",
    "less",
    "less_equal",
    "maximum",
    "minimum",
    "negative",
    "not_equal",
    "reciprocal",
    "relu",
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
def where(condition: Value, a: Value, b: Value) -> Value:
    """`a` where `condition` is not zero, `b` elsewhere."""
    return select(condition.differs(0.0), a, b)


@elementwise
def relu(x: Value) -> Value:
    """`x` where it is positive, 0 elsewhere."""
    return select(x <= 0.0, 0.0, x)


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
