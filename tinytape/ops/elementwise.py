"""Elementwise ops: arithmetic, functions of one and of two numbers, comparisons.

A rule is `g` times the derivative. It costs what its NumPy calls cost, so it is written with as few of them as
possible, and without Python numbers where an array will do: ``g - g * (out * out)`` takes half the time of
``g * (1.0 - out * out)`` on a small array. Masks are products with a comparison; `where` is kept for places where
a factor may be infinite, because zero times infinity is not zero.

At kinks and poles the derivatives are PyTorch's (abs'(0) = 0, sqrt'(0) = inf, ties of maximum share
the gradient), except that a length of zero has derivative zero (`hypot`) and that logaddexp of two equal infinities
shares its gradient, where PyTorch has NaN.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.call import refuse_tracked
from ..engine.errors import DTypeError, InputError
from ..engine.op import Operand, OpFunction, elementwise, op
from ..engine.operators import method
from ..engine.tensor import FUNCTIONS, UFUNCS, Tensor, default_dtype
from .activation import sigmoid

__all__ = [
    "abs",
    "add",
    "arccos",
    "arccosh",
    "arcsin",
    "arcsinh",
    "arctan",
    "arctan2",
    "arctanh",
    "astype",
    "ceil",
    "clip",
    "cos",
    "cosh",
    "divide",
    "equal",
    "exp",
    "exp2",
    "expm1",
    "floor",
    "floor_divide",
    "greater",
    "greater_equal",
    "hypot",
    "isfinite",
    "isinf",
    "isnan",
    "less",
    "less_equal",
    "log",
    "log1p",
    "log2",
    "log10",
    "logaddexp",
    "logical_and",
    "logical_not",
    "logical_or",
    "logical_xor",
    "maximum",
    "minimum",
    "multiply",
    "negative",
    "not_equal",
    "power",
    "reciprocal",
    "remainder",
    "round",
    "sign",
    "sin",
    "sinh",
    "sqrt",
    "square",
    "subtract",
    "tan",
    "tanh",
    "where",
]

# The types that NumPy declares for these say too little about arguments of type Any.
_where_array: Callable[..., Any] = np.where
_round_array: Callable[..., Any] = np.round
_clip_array: Callable[..., Any] = np.clip
_zeros: Callable[[Any], Any] = np.zeros_like

# ---- arithmetic -----------------------------------------------------------------------------------------------------

add = elementwise(np.add, lambda g: (g, g))
subtract = elementwise(np.subtract, lambda g: (g, -g))
multiply: OpFunction[...] = op(name="multiply", kind="multilinear")(np.multiply)
negative = elementwise(np.negative, lambda g: -g)


@multiply.vjp
def _(g: Any, a: Any, b: Any, wants: tuple[bool, bool]) -> Any:
    return g * b if wants[0] else None, g * a if wants[1] else None


def _divide_rule(g: Any, b: Any, out: Any, wants: tuple[bool, bool]) -> Any:
    by_a = g / b
    return by_a, -(by_a * out) if wants[1] else None


divide = elementwise(np.divide, _divide_rule)
floor_divide = elementwise(np.floor_divide, lambda g: (_zeros(g), _zeros(g)))
remainder = elementwise(np.remainder, lambda g, a, b: (g, -g * np.floor_divide(a, b)))


def _power_rule(g: Any, a: Any, b: Any, out: Any, wants: tuple[bool, bool]) -> Any:
    by_a = by_b = None
    if wants[0]:  # 0 ** 0 is 1 for every base, so its derivative by the base is 0 and not 0 * 0 ** -1
        exponent = np.where(np.logical_and(a == 0, b == 0), 1, b)
        by_a = g * (b * np.power(a, exponent - 1))
    if wants[1]:  # 0 ** b is 0 on a neighbourhood of every b > 0
        base = np.where(np.logical_and(a == 0, b >= 0), 1, a)
        by_b = g * (out * np.log(base))
    return by_a, by_b


def _number_as_exponent(x: Operand, /, exponent: Any) -> Any:
    return x**exponent


def _number_as_exponent_rule(g: Any, x: Any, exponent: Any) -> Any:
    if exponent == 0:
        return _zeros(g)
    if exponent == 2:
        return g * (x + x)
    return g if exponent == 1 else g * (exponent * x ** (exponent - 1))


def _number_as_base(x: Operand, /, base: Any) -> Any:
    return np.power(base, x)


def _number_as_base_rule(g: Any, x: Any, out: Any, base: Any) -> Any:
    if base == 0:
        return g * (out * _where_array(x < 0, -math.inf, 0.0))
    return g * (out * (math.log(base) if base > 0 else math.nan))


_power = elementwise(np.power, _power_rule)
_power_of_tensor = elementwise(_number_as_exponent, _number_as_exponent_rule, "power_of_tensor")
_power_of_number = elementwise(_number_as_base, _number_as_base_rule, "power_of_number")


def power(a: Any, b: Any) -> Any:
    """`a` to the power `b`, element by element; the arguments broadcast.

    A base of zero gives a finite gradient wherever there is one: x**2, x**1 and x**0 have 0, 1 and 0 there.

    Raises
    ------
    DTypeError
        If integers are raised to a negative integer.
    """
    a, b = _number(a), _number(b)
    if isinstance(b, int | float) and isinstance(a, Tensor):
        if isinstance(b, int) and b < 0 and a.dtype.kind != "f":
            raise DTypeError(f"power: integers ({a.dtype}) to the power {b}.", "use astype('float32') first.")
        return _power_of_tensor(a, exponent=b)
    if isinstance(a, int | float) and isinstance(b, Tensor):
        return _power_of_number(b, base=a)
    return _power(a, b)


def _number(value: Any) -> Any:
    """NumPy's scalars, and its arrays without axes, as numbers of Python."""
    return value.item() if getattr(value, "ndim", 1) == 0 and not isinstance(value, Tensor) else value


# ---- functions of one number ----------------------------------------------------------------------------------------

abs = elementwise(np.absolute, lambda g, x: g * np.sign(x), "abs")
sign = elementwise(np.sign, lambda g: _zeros(g))
floor = elementwise(np.floor, lambda g: _zeros(g))
ceil = elementwise(np.ceil, lambda g: _zeros(g))
square = elementwise(np.square, lambda g, x: g * (x + x))
sqrt = elementwise(np.sqrt, lambda g, out: g / (out + out))
exp = elementwise(np.exp, lambda g, out: g * out)
exp2 = elementwise(np.exp2, lambda g, out: g * out * _LOG_2)
expm1 = elementwise(np.expm1, lambda g, x: g * np.exp(x))
log = elementwise(np.log, lambda g, x: g / x)
log2 = elementwise(np.log2, lambda g, x: g / (x * _LOG_2))
log10 = elementwise(np.log10, lambda g, x: g / (x * _LOG_10))
log1p = elementwise(np.log1p, lambda g, x: g / (x + 1.0))
sin = elementwise(np.sin, lambda g, x: g * np.cos(x))
cos = elementwise(np.cos, lambda g, x: -g * np.sin(x))
tan = elementwise(np.tan, lambda g, out: g + g * (out * out))
arcsin = elementwise(np.arcsin, lambda g, x: g / np.sqrt((1.0 - x) * (1.0 + x)))
arccos = elementwise(np.arccos, lambda g, x: -g / np.sqrt((1.0 - x) * (1.0 + x)))
arctan = elementwise(np.arctan, lambda g, x: g / (x * x + 1.0))
sinh = elementwise(np.sinh, lambda g, x: g * np.cosh(x))
cosh = elementwise(np.cosh, lambda g, x: g * np.sinh(x))
tanh = elementwise(np.tanh, lambda g, out: g - g * (out * out))
arcsinh = elementwise(np.arcsinh, lambda g, x: g / np.sqrt(x * x + 1.0))
arccosh = elementwise(np.arccosh, lambda g, x: g / np.sqrt((x - 1.0) * (x + 1.0)))
arctanh = elementwise(np.arctanh, lambda g, x: g / ((1.0 - x) * (1.0 + x)))

_LOG_2, _LOG_10 = math.log(2.0), math.log(10.0)


def _reciprocal(x: Operand) -> Any:
    """One over `x`; of integers too it is a float."""
    return 1.0 / x


def _round(x: Operand, /, decimals: int = 0) -> Any:
    """`x` rounded to `decimals` places, halves to the even neighbour. Its derivative is 0, as in PyTorch."""
    return _round_array(x, decimals)


reciprocal = elementwise(_reciprocal, lambda g, out: -g * (out * out))
round = elementwise(_round, lambda g: _zeros(g))

# ---- functions of two numbers ---------------------------------------------------------------------------------------


def _share_larger(g: Any, a: Any, b: Any) -> Any:
    half = g * 0.5
    by_a = half * (a >= b) + half * (a > b)
    return by_a, g - by_a


def _share_smaller(g: Any, a: Any, b: Any) -> Any:
    half = g * 0.5
    by_a = half * (a <= b) + half * (a < b)
    return by_a, g - by_a


def _arctan2_rule(g: Any, a: Any, b: Any) -> Any:
    squared = a * a + b * b
    scaled = g / _where_array(squared == 0, math.inf, squared)
    return scaled * b, -scaled * a


def _hypot_rule(g: Any, a: Any, b: Any, out: Any) -> Any:
    length = _where_array(out == 0, math.inf, out)
    return g * (a / length), g * (b / length)


def _logaddexp_rule(g: Any, a: Any, b: Any) -> Any:
    difference = _where_array(np.logical_and(a == b, np.isinf(a)), 0, a - b)
    by_a = g * sigmoid(difference)
    return by_a, g * sigmoid(-difference)


maximum = elementwise(np.maximum, _share_larger)
maximum.__doc__ = "The larger of `a` and `b`, element by element. Where they are equal each has half the gradient."
minimum = elementwise(np.minimum, _share_smaller)
minimum.__doc__ = "The smaller of `a` and `b`, element by element. Where they are equal each has half the gradient."
arctan2 = elementwise(np.arctan2, _arctan2_rule)
arctan2.__doc__ = (
    "The angle of the point with height `a` and width `b`, from -pi to pi. At the origin its gradient is 0."
)
hypot = elementwise(np.hypot, _hypot_rule)
hypot.__doc__ = "The length of (`a`, `b`). Its gradient at length 0 is 0."
logaddexp = elementwise(np.logaddexp, _logaddexp_rule)
logaddexp.__doc__ = "The logarithm of ``exp(a) + exp(b)``, without overflow."


def _clip(x: Operand, a_min: Operand, a_max: Operand) -> Any:
    return _clip_array(x, a_min, a_max)


def _clip_rule(g: Any, x: Any, a_min: Any, a_max: Any, wants: tuple[bool, bool, bool]) -> Any:
    by_x = g * np.logical_and(x >= a_min, x <= a_max) if wants[0] else None
    by_min = g * np.logical_and(x < a_min, a_min < a_max) if wants[1] else None
    by_max = g * np.logical_or(x > a_max, a_min > a_max) if wants[2] else None
    return by_x, by_min, by_max


_clip_between = elementwise(_clip, _clip_rule)


def clip(x: Any, a_min: Any = None, a_max: Any = None) -> Any:
    """`x` held between `a_min` and `a_max`, numbers or tensors that broadcast; None is no bound.

    At a bound itself the gradient goes to `x`; beyond it, to the bound.

    Raises
    ------
    InputError
        If both bounds are None.
    """
    if a_min is None and a_max is None:
        raise InputError("clip: a_min and a_max are both None.", "give at least one of them.")
    lowest, highest = -math.inf, math.inf
    dtype: Any = getattr(x, "dtype", None)
    if dtype is not None and dtype.kind in "iu":
        lowest, highest = int(np.iinfo(dtype).min), int(np.iinfo(dtype).max)
    return _clip_between(x, lowest if a_min is None else a_min, highest if a_max is None else a_max)


def _where(condition: Operand, a: Operand, b: Operand) -> Any:
    return _where_array(condition, a, b)


# The condition is an argument and no option, so that the tape watches its memory and a trace sees where it comes from.
_select = elementwise(_where, lambda g, condition: (None, _where_array(condition, g, 0), _where_array(condition, 0, g)))


def where(condition: Any, a: Any, b: Any) -> Any:
    """`a` where `condition` holds, `b` elsewhere; all three broadcast.

    No gradient passes to the side that was not chosen, whatever its value. Numbers that are not bools hold where
    they are not zero; nothing is differentiated with respect to them.
    """
    for side in (a, b):
        if isinstance(side, list | tuple):
            refuse_tracked(side, _select.op)
    if isinstance(condition, Tensor):
        if condition.dtype != np.bool_:
            condition = not_equal(condition, 0)
        if isinstance(a, float | int) and isinstance(b, float | int):
            floats = isinstance(a, float) or isinstance(b, float)
            a = np.full((1,) * condition.ndim, a, default_dtype() if floats else None)
    else:
        condition = np.asarray(condition, dtype=bool)
    return _select(condition, a, b)


# ---- comparisons and other constants --------------------------------------------------------------------------------


def _constant(forward: np.ufunc) -> OpFunction[...]:
    return op(name=forward.__name__, kind="constant")(forward)


equal = _constant(np.equal)
not_equal = _constant(np.not_equal)
less = _constant(np.less)
less_equal = _constant(np.less_equal)
greater = _constant(np.greater)
greater_equal = _constant(np.greater_equal)
logical_and = _constant(np.logical_and)
logical_or = _constant(np.logical_or)
logical_xor = _constant(np.logical_xor)
logical_not = _constant(np.logical_not)
isnan = _constant(np.isnan)
isfinite = _constant(np.isfinite)
isinf = _constant(np.isinf)
bitwise_and = _constant(np.bitwise_and)  # of bools, what & and its like mean; of integers, bit by bit
bitwise_or = _constant(np.bitwise_or)
bitwise_xor = _constant(np.bitwise_xor)
invert = _constant(np.invert)

# ---- dtype ----------------------------------------------------------------------------------------------------------


@op(name="astype", kind="linear", promotes=False)
def _to_floats(x: Operand, /, dtype: np.dtype[Any]) -> Any:
    return np.asarray(x).astype(dtype)


@_to_floats.vjp
def _(g: Any) -> Any:
    return g


@op(name="astype", kind="constant", promotes=False)
def _to_integers(x: Operand, /, dtype: np.dtype[Any]) -> Any:
    return np.asarray(x).astype(dtype)


def astype(x: Any, dtype: npt.DTypeLike) -> Any:
    """A copy of `x` with another dtype; gradients pass between floats, and come back in the dtype of `x`.

    Raises
    ------
    DTypeError
        If `dtype` is not one of floats, integers or bools.
    """
    try:
        wanted = np.dtype(dtype)
    except TypeError as error:
        raise DTypeError(f"astype: {error}.", "pass a dtype such as 'float32' or np.int64.") from error
    if wanted.kind not in "fiub":
        raise DTypeError(f"astype: dtype is {wanted}.", "tensors are of floats, integers or bools.")
    return (_to_floats if wanted.kind == "f" else _to_integers)(x, dtype=wanted)


# ---- operators and methods ------------------------------------------------------------------------------------------


def _equal(self: Tensor, other: Any) -> Any:
    return NotImplemented if other is None or isinstance(other, str) else equal(self, other)


def _not_equal(self: Tensor, other: Any) -> Any:
    return NotImplemented if other is None or isinstance(other, str) else not_equal(self, other)


def _reflected_subtract(self: Tensor, other: Any) -> Any:
    return subtract(other, self)


def _reflected_divide(self: Tensor, other: Any) -> Any:
    return divide(other, self)


def _reflected_floor_divide(self: Tensor, other: Any) -> Any:
    return floor_divide(other, self)


def _reflected_remainder(self: Tensor, other: Any) -> Any:
    return remainder(other, self)


def _reflected_power(self: Tensor, other: Any) -> Any:
    return power(other, self)


def _add_in_place(self: Tensor, other: Any) -> Tensor:
    return self.in_place(other, add, "x += y")


def _subtract_in_place(self: Tensor, other: Any) -> Tensor:
    return self.in_place(other, subtract, "x -= y")


def _multiply_in_place(self: Tensor, other: Any) -> Tensor:
    return self.in_place(other, multiply, "x *= y")


def _divide_in_place(self: Tensor, other: Any) -> Tensor:
    return self.in_place(other, divide, "x /= y")


def _itself(self: Tensor) -> Tensor:
    return self


Tensor.__add__ = method(add)
Tensor.__radd__ = method(add)
Tensor.__sub__ = method(subtract)
Tensor.__rsub__ = method(_reflected_subtract)
Tensor.__mul__ = method(multiply)
Tensor.__rmul__ = method(multiply)
Tensor.__truediv__ = method(divide)
Tensor.__rtruediv__ = method(_reflected_divide)
Tensor.__floordiv__ = method(floor_divide)
Tensor.__rfloordiv__ = method(_reflected_floor_divide)
Tensor.__mod__ = method(remainder)
Tensor.__rmod__ = method(_reflected_remainder)
Tensor.__pow__ = method(power)
Tensor.__rpow__ = method(_reflected_power)
Tensor.__neg__ = method(negative)
Tensor.__pos__ = method(_itself)
Tensor.__abs__ = method(abs)
Tensor.__iadd__ = method(_add_in_place)
Tensor.__isub__ = method(_subtract_in_place)
Tensor.__imul__ = method(_multiply_in_place)
Tensor.__itruediv__ = method(_divide_in_place)
Tensor.__eq__ = method(_equal)
Tensor.__ne__ = method(_not_equal)
Tensor.__lt__ = method(less)
Tensor.__le__ = method(less_equal)
Tensor.__gt__ = method(greater)
Tensor.__ge__ = method(greater_equal)
Tensor.__and__ = method(bitwise_and)
Tensor.__or__ = method(bitwise_or)
Tensor.__xor__ = method(bitwise_xor)
Tensor.__invert__ = method(invert)
Tensor.exp = method(exp)
Tensor.log = method(log)
Tensor.sqrt = method(sqrt)
Tensor.square = method(square)
Tensor.abs = method(abs)
Tensor.tanh = method(tanh)
Tensor.sin = method(sin)
Tensor.cos = method(cos)
Tensor.clip = method(clip)
Tensor.round = method(round)
Tensor.astype = method(astype)

# ---- NumPy's functions on Tensors -----------------------------------------------------------------------------------


def _numpys_clip(a: Any, a_min: Any = None, a_max: Any = None, *, min: Any = None, max: Any = None) -> Any:
    return clip(a, min if a_min is None else a_min, max if a_max is None else a_max)


def _numpys_where(condition: Any, *sides: Any) -> Any:
    return where(condition, *sides) if sides else np.nonzero(np.asarray(condition))


def _numpys_round(a: Any, decimals: int = 0) -> Any:
    return round(a, decimals=decimals)


FUNCTIONS[np.clip] = _numpys_clip
FUNCTIONS[np.where] = _numpys_where
FUNCTIONS[np.round] = _numpys_round
FUNCTIONS[np.around] = _numpys_round

UFUNCS[np.add] = add
UFUNCS[np.subtract] = subtract
UFUNCS[np.multiply] = multiply
UFUNCS[np.divide] = divide
UFUNCS[np.floor_divide] = floor_divide
UFUNCS[np.remainder] = remainder
UFUNCS[np.power] = power
UFUNCS[np.negative] = negative
UFUNCS[np.positive] = _itself
UFUNCS[np.absolute] = abs
UFUNCS[np.sign] = sign
UFUNCS[np.floor] = floor
UFUNCS[np.ceil] = ceil
UFUNCS[np.rint] = round
UFUNCS[np.square] = square
UFUNCS[np.sqrt] = sqrt
UFUNCS[np.reciprocal] = reciprocal
UFUNCS[np.exp] = exp
UFUNCS[np.exp2] = exp2
UFUNCS[np.expm1] = expm1
UFUNCS[np.log] = log
UFUNCS[np.log2] = log2
UFUNCS[np.log10] = log10
UFUNCS[np.log1p] = log1p
UFUNCS[np.sin] = sin
UFUNCS[np.cos] = cos
UFUNCS[np.tan] = tan
UFUNCS[np.arcsin] = arcsin
UFUNCS[np.arccos] = arccos
UFUNCS[np.arctan] = arctan
UFUNCS[np.sinh] = sinh
UFUNCS[np.cosh] = cosh
UFUNCS[np.tanh] = tanh
UFUNCS[np.arcsinh] = arcsinh
UFUNCS[np.arccosh] = arccosh
UFUNCS[np.arctanh] = arctanh
UFUNCS[np.arctan2] = arctan2
UFUNCS[np.hypot] = hypot
UFUNCS[np.logaddexp] = logaddexp
UFUNCS[np.maximum] = maximum
UFUNCS[np.minimum] = minimum
UFUNCS[np.equal] = equal
UFUNCS[np.not_equal] = not_equal
UFUNCS[np.less] = less
UFUNCS[np.less_equal] = less_equal
UFUNCS[np.greater] = greater
UFUNCS[np.greater_equal] = greater_equal
UFUNCS[np.logical_and] = logical_and
UFUNCS[np.logical_or] = logical_or
UFUNCS[np.logical_xor] = logical_xor
UFUNCS[np.logical_not] = logical_not
UFUNCS[np.bitwise_and] = bitwise_and
UFUNCS[np.bitwise_or] = bitwise_or
UFUNCS[np.bitwise_xor] = bitwise_xor
UFUNCS[np.invert] = invert
UFUNCS[np.isnan] = isnan
UFUNCS[np.isfinite] = isfinite
UFUNCS[np.isinf] = isinf
