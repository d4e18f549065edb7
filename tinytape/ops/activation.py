"""Activations: sigmoid, relu and their kin, and the error function.

Rules are written as in `elementwise`; derivatives at kinks are PyTorch's (relu'(0) = 0).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from ..engine.errors import InputError
from ..engine.op import Operand, elementwise
from ..engine.operators import method
from ..engine.tensor import Tensor

__all__ = ["elu", "erf", "gelu", "leaky_relu", "relu", "sigmoid", "silu", "softplus"]

_where_array: Callable[..., Any] = np.where  # NumPy's types say too little about arguments of type Any

# Beyond these, exp(x) + 1 == exp(x): the sigmoid is 1 to the last bit. (No float16 holds exp(40).)
_SATURATED: dict[np.dtype[Any], tuple[Any, Any]] = {
    np.dtype(np.float16): (np.float16(10), np.float16(1)),
    np.dtype(np.float32): (np.float32(40), np.float32(1)),
    np.dtype(np.float64): (np.float64(40), np.float64(1)),
}


def _floats(x: Any) -> Any:
    x = np.asarray(x)
    return x if x.dtype.kind == "f" else x.astype(np.float64)


def _sigmoid(x: Operand) -> Any:
    """The logistic function ``1 / (1 + exp(-x))``, exact in both tails and without overflow."""
    x = _floats(x)
    limit, one = _SATURATED.get(x.dtype, (40.0, 1.0))
    t = np.exp(np.minimum(x, limit))
    return t / (t + one)


def _relu(x: Operand) -> Any:
    """`x` where it is positive, 0 elsewhere; the derivative at 0 is 0."""
    return np.maximum(x, 0)


def _leaky_relu(x: Operand, /, negative_slope: float = 0.01) -> Any:
    """`x` where it is positive, ``negative_slope * x`` elsewhere; the derivative at 0 is the slope."""
    return np.maximum(x, 0) + negative_slope * np.minimum(x, 0)


def _leaky_relu_rule(g: Any, x: Any, negative_slope: float) -> Any:
    positive = x > 0
    return g * positive + (g * negative_slope) * ~positive


def _elu(x: Operand, /, alpha: float = 1.0) -> Any:
    """`x` where it is positive, ``alpha * (exp(x) - 1)`` elsewhere; the derivative at 0 is alpha."""
    return np.maximum(x, 0) + alpha * np.expm1(np.minimum(x, 0))


def _elu_rule(g: Any, x: Any, alpha: float) -> Any:
    return _where_array(x > 0, g, g * (alpha * np.exp(_where_array(x < 0, x, 0))))


def _silu(x: Operand) -> Any:
    """``x * sigmoid(x)``, also called swish."""
    return x * _sigmoid(x)


def _silu_rule(g: Any, x: Any, out: Any) -> Any:
    s = sigmoid(x)
    return g * (s + (out - out * s))


def _softplus(x: Operand, /, beta: float = 1.0, threshold: float = 20.0) -> Any:
    """``log(1 + exp(beta * x)) / beta``, and `x` itself where ``beta * x > threshold``, as in PyTorch."""
    z = _floats(x) * beta
    smooth = (np.maximum(z, 0) + np.log1p(np.exp(-np.absolute(z)))) / beta
    return _where_array(z > threshold, x, smooth)


def _softplus_rule(g: Any, x: Any, beta: float, threshold: float) -> Any:
    z = x * beta
    return _where_array(z > threshold, g, g * sigmoid(z))


sigmoid = elementwise(_sigmoid, lambda g, out: g * (out - out * out))
relu = elementwise(_relu, lambda g, out: g * (out != 0))
leaky_relu = elementwise(_leaky_relu, _leaky_relu_rule)
elu = elementwise(_elu, _elu_rule)
silu = elementwise(_silu, _silu_rule)
softplus = elementwise(_softplus, _softplus_rule)

# ---- the error function ---------------------------------------------------------------------------------------------

# For x >= 0, erfc(x) = exp(-x^2) Q(y) / (x + 3), where y = (x - 3) / (x + 3) maps [0, inf) to [-1, 1) and leaves Q
# smooth at both ends. For |x| < 1, where 1 - erfc(x) has lost digits, erf(x) = x P(x^2). P and Q were fitted at the
# Chebyshev points of their intervals, in 60 digits, with mpmath:
#     chebyfit(lambda u: erf(sqrt(u)) / sqrt(u), [0, 1], n)
#     chebyfit(lambda y: (x + 3) * exp(x * x) * erfc(x) for x = 3 * (1 + y) / (1 - y), [-1, 1], n)
# with n = 12 and 24 for float64 (errors 7e-18 and 3e-17), 7 and 12 for float32 (1e-9 and 6e-9). Highest power first.
# fmt: off
_NEAR_64 = (
    -7.795898827002142e-10, 1.3720064546777686e-08, -1.6208483801871705e-07, 1.6447424703317362e-06,
    -1.492473690741966e-05, 0.00012055294904839707, -0.0008548325975389692, 0.0052239776071164225,
    -0.02686617064323777, 0.11283791670945006, -0.37612638903183543, 1.1283791670955126,
)
_FAR_64 = (
    8.44785278432295e-10, 1.1159123899250384e-11, -8.887844891516947e-09, -3.5913611171610954e-09,
    5.166814761898454e-08, 5.001320184291237e-08, -2.3454670002624263e-07, -4.117597591893759e-07,
    9.994379361081014e-07, 2.7678112255272805e-06, -4.749391032132141e-06, -1.7471605752302332e-05,
    3.03981905221208e-05, 0.00010756178250002073, -0.0002767778482009659, -0.0005483097452477533,
    0.0030340620011959822, -0.0012124166215147798, -0.026827234624480615, 0.11952776128697859,
    -0.31046726190056667, 0.5902283571041085, -0.8833944531698836, 1.0740069070883396,
)
_NEAR_32 = (
    7.875875062685488e-05, -0.000801686428716587, 0.005189087423433974, -0.026854212010626412,
    0.11283594715160218, -0.37612626666720334, 1.1283791658483509,
)
_FAR_32 = (
    2.025413201689923e-05, 6.773367487365605e-05, -0.0002666347703907909, -0.0005076097819249036,
    0.0030290836852934675, -0.0012325827531790546, -0.0268261005191854, 0.11953237679033603,
    -0.3104673577902075, 0.5902279660047566, -0.8833944518416128, 1.0740069125081804,
)
# fmt: on


_BLOCK = 8192  # so many elements at a time stay in the cache through all the steps of a polynomial


def _polynomial(coefficients: tuple[float, ...], t: Any) -> Any:
    total = np.full_like(t, coefficients[0])
    for c in coefficients[1:]:
        total *= t
        total += c
    return total


def _error_function(x: Any, complement: bool) -> Any:
    x = _floats(x)
    flat = x.ravel()
    if x.dtype not in (np.float32, np.float64):
        flat = flat.astype(np.float32 if x.dtype.itemsize < 4 else np.float64)
    out = np.empty_like(flat)
    for start in range(0, flat.size, _BLOCK):
        part = slice(start, start + _BLOCK)
        out[part] = _error_function_of_block(flat[part], complement)
    return out.astype(x.dtype, copy=False).reshape(x.shape)


def _error_function_of_block(x: Any, complement: bool) -> Any:
    near, far = (_NEAR_32, _FAR_32) if x.dtype == np.float32 else (_NEAR_64, _FAR_64)
    size = np.absolute(x)
    beyond = size + 3
    tail = np.exp(-size * size) * _polynomial(far, 1 - 6 / beyond) / beyond
    if complement:
        sign = np.copysign(1, x)
        return sign * tail + (1 - sign)
    small = size < 1
    inner = np.minimum(size, 1)
    inner *= _polynomial(near, inner * inner)
    return np.copysign(inner * small + (1 - tail) * ~small, x)


def _erf(x: Operand) -> Any:
    """The error function ``2 / sqrt(pi)`` times the integral of ``exp(-t * t)`` from 0 to `x`."""
    return _error_function(x, complement=False)


def _erfc(x: Operand) -> Any:
    return _error_function(x, complement=True)


_SLOPE_OF_ERF = 2.0 / math.sqrt(math.pi)

erf = elementwise(_erf, lambda g, x: g * (_SLOPE_OF_ERF * np.exp(-x * x)))
erfc = elementwise(_erfc, lambda g, x: g * (-_SLOPE_OF_ERF * np.exp(-x * x)))

_TO_NORMAL = -1.0 / math.sqrt(2.0)  # the normal distribution function is erfc(_TO_NORMAL * x) / 2
_NORMAL_DENSITY = 1.0 / math.sqrt(2.0 * math.pi)
_GELU_SCALE, _GELU_CUBE = math.sqrt(2.0 / math.pi), 0.044715


def _gelu(x: Operand, /, approximate: str = "none") -> Any:
    """`x` times the standard normal distribution function of `x`.

    Parameters
    ----------
    x : Tensor or array
    approximate : {"none", "tanh"}
        "tanh" is the cheaper approximation ``0.5 * x * (1 + tanh(sqrt(2 / pi) * (x + 0.044715 * x**3)))``.

    Raises
    ------
    InputError
        If `approximate` is neither.
    """
    if approximate == "none":
        return x * (0.5 * _erfc(x * _TO_NORMAL))
    if approximate == "tanh":
        return 0.5 * x * (1.0 + np.tanh(_GELU_SCALE * (x + _GELU_CUBE * (x * x * x))))
    raise InputError(f"gelu: approximate is {approximate!r}.", "use 'none' or 'tanh'.")


def _gelu_rule(g: Any, x: Any, approximate: str) -> Any:
    squared = x * x
    if approximate == "none":
        return g * (0.5 * erfc(x * _TO_NORMAL) + x * (_NORMAL_DENSITY * np.exp(-0.5 * squared)))
    t = np.tanh(_GELU_SCALE * (x + _GELU_CUBE * (x * squared)))
    inner = _GELU_SCALE * (1.0 + 3.0 * _GELU_CUBE * squared)
    return g * (0.5 * (1.0 + t + x * (inner * (1.0 - t * t))))


gelu = elementwise(_gelu, _gelu_rule)


# ---- operators and methods ------------------------------------------------------------------------------------------

Tensor.sigmoid = method(sigmoid)
Tensor.relu = method(relu)
