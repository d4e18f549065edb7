"""Exponentials, logarithms and what is made of them, for vectors of float32 and float64.

Each formula serves both formats; only its constants differ (`coefficients`). Signs of zero are not kept, and results
too small for a normal number may be 0. Errors over the whole range, which the tests check, are below 3 units in the
last place, those of erfc below 5. silu is a product: where its small factor is 0, so is it.
"""

# pyright: basic

from __future__ import annotations

import math
from functools import reduce

from .coefficients import DOUBLE, SINGLE, Format
from .value import Value, call, fma, select
from .vector import elementwise, larger

__all__ = [
    "erf",
    "erfc",
    "exp",
    "exp2",
    "expm1",
    "log",
    "log1p",
    "log2",
    "log10",
    "logaddexp",
    "sigmoid",
    "silu",
    "softplus",
    "tanh",
]


def constants(x: Value) -> Format:
    """What is known of the format of `x`."""
    return DOUBLE if x.is_double else SINGLE


def polynomial(coefficients: tuple[float, ...], x: Value) -> Value:
    """A polynomial by Horner's rule, highest power first."""
    first, *others = coefficients
    return reduce(lambda sum_, c: fma(sum_, x, c), others, x.constant(first))


# ---- exponentials ---------------------------------------------------------------------------------------------------


def _above(x: Value, bound: float) -> Value:
    """`x`, but at least `bound`; NaN stays."""
    return select(x < bound, bound, x)


def _remainder_expm1(r: Value) -> Value:
    """``exp(r) - 1`` for what is left when whole multiples of log(2) are taken away, up to half of it."""
    return fma(r * r, polynomial(constants(r).exp, r), r)


def _split(x: Value) -> tuple[Value, Value]:
    """Write exp(x) as ``2**n * (1 + p)``: gives `p`, and integers that hold `n` in their lowest bits."""
    c = constants(x)
    rounded = fma(x, 1.0 / math.log(2.0), c.round)
    n = rounded - c.round
    r = fma(n, -c.ln2[1], fma(n, -c.ln2[0], x))
    return _remainder_expm1(r), rounded.bits


def _power_of_two(n: Value, like: Value) -> Value:
    """``2**n`` for an integer `n` in the range of normal exponents."""
    c = constants(like)
    return ((n + c.bias) << c.mantissa).floats


def _times_power_of_two(y: Value, n: Value) -> Value:
    """``y * 2**n`` where the result is a normal number."""
    return (y.bits + (n << constants(y).mantissa)).floats


def _exp(x: Value) -> Value:
    c = constants(x)
    p, n = _split(x)
    y = select(x < c.underflow, 0.0, _times_power_of_two(1.0 + p, n))
    # x + inf is infinite for all numbers, and NaN for NaN.
    return select(x.compare(">", c.overflow, or_nan=True), x + math.inf, y)


@elementwise
def exp(x: Value) -> Value:
    """The exponential function; results too small for a normal number are 0."""
    return _exp(x)


@elementwise
def expm1(x: Value) -> Value:
    """``exp(x) - 1``, exact near 0 too."""
    c = constants(x)
    p, n = _split(_above(x, -4.0 * c.unit))
    half = _power_of_two(n - 1, x)  # 2**n itself may overflow where the result does not
    y = 2.0 * fma(half, p, half - 0.5)
    return select(x.compare(">", c.overflow, or_nan=True), x + math.inf, y)


@elementwise
def exp2(x: Value) -> Value:
    """2 to the power `x`; results too small for a normal number are 0."""
    c = constants(x)
    rounded = x + c.round
    r = (x - (rounded - c.round)) * math.log(2.0)
    y = _times_power_of_two(1.0 + _remainder_expm1(r), rounded.bits)
    y = select(x < 1.0 - c.bias, 0.0, y)
    return select(x.compare(">=", c.bias + 1.0, or_nan=True), x + math.inf, y)


@elementwise
def tanh(x: Value) -> Value:
    """The hyperbolic tangent."""
    # (1 - exp(-2x)) / (1 + exp(-2x)) for x >= 0, with exp(-2x) = s (1 + p): each side is rounded once.
    p, n = _split(_above(-2.0 * call("fabs", x), -2.0 * constants(x).unit))
    s = _power_of_two(n, x)
    return call("copysign", fma(s, p, s - 1.0), x) / fma(s, p, s + 1.0)


def _sigmoid(x: Value) -> Value:
    return 1.0 / (1.0 + _exp(-x))


@elementwise
def sigmoid(x: Value) -> Value:
    """``1 / (1 + exp(-x))``, exact in both tails."""
    return _sigmoid(x)


@elementwise
def silu(x: Value) -> Value:
    """``x * sigmoid(x)``."""
    return x * _sigmoid(x)


# ---- logarithms -----------------------------------------------------------------------------------------------------


def _exponent(x: Value) -> tuple[Value, Value]:
    """Write a positive normal `x` as ``2**k * m`` with `m` between sqrt(1/2) and sqrt(2).

    Gives `m`, and the bits of `k` plus the exponent's bias.
    """
    c = constants(x)
    one = x.constant(1.0).bits
    lowest = x.constant(math.sqrt(0.5)).bits
    moved = x.bits + (one - lowest)
    m = ((moved & ((1 << c.mantissa) - 1)) + lowest).floats
    return m, moved >> c.mantissa


def _to_float(biased: Value, like: Value) -> Value:
    """The exponent as a float, made from its bits: few machines convert 64-bit integers."""
    c = constants(like)
    return (biased | like.constant(2.0**c.mantissa).bits).floats - (2.0**c.mantissa + c.bias)


def _log_sum(k: Value, f: Value) -> Value:
    """``k * log(2) + log(1 + f)`` for `f` between sqrt(1/2) - 1 and sqrt(2) - 1.

    log(1 + f) is 2 atanh(s), written so that `f` itself is added last (after FreeBSD's e_log.c).
    """
    c = constants(f)
    s = f / (2.0 + f)
    z = s * s
    half = 0.5 * f * f
    small = fma(s, half + z * polynomial(c.log, z), k * c.ln2[1])
    return fma(k, c.ln2[0], f - (half - small))


def _only_positive(x: Value, y: Value) -> Value:
    """`y` for finite positive `x`, and what a logarithm is elsewhere."""
    y = select(x > 0.0, y, select(x.equals(0.0), -math.inf, x.constant(math.nan)))
    return select(x.equals(math.inf), math.inf, y)


def _log(x: Value) -> tuple[Value, Value]:
    """`k` and `f` with ``log(x) = k * log(2) + log(1 + f)``; denormal numbers are scaled to normal ones."""
    c = constants(x)
    scale = c.mantissa + 2
    denormal = x < 2.0 ** (1 - c.bias)
    m, biased = _exponent(select(denormal, x * 2.0**scale, x))
    k = _to_float(biased, x)
    return select(denormal, k - scale, k), m - 1.0


def _log1p(x: Value) -> Value:
    """log(1 + x) for x > -1: 1 + x gives the exponent only, so that what its rounding loses is not lost."""
    c = constants(x)
    m, biased = _exponent(1.0 + x)
    scale = _inverse_power(biased, x)
    f = select(x > 2.0 ** (c.mantissa + 2), m - 1.0, fma(x, scale, scale - 1.0))
    return _log_sum(_to_float(biased, x), f)


def _inverse_power(biased: Value, like: Value) -> Value:
    """``2**-k`` from the bits of `k` plus the bias."""
    c = constants(like)
    return ((2 * c.bias - biased) << c.mantissa).floats


@elementwise
def log(x: Value) -> Value:
    """The natural logarithm."""
    return _only_positive(x, _log_sum(*_log(x)))


@elementwise
def log2(x: Value) -> Value:
    """The logarithm to base 2, exact for powers of 2."""
    k, f = _log(x)
    return _only_positive(x, fma(_log_sum(k.constant(0.0), f), 1.0 / math.log(2.0), k))


@elementwise
def log10(x: Value) -> Value:
    """The logarithm to base 10."""
    return _only_positive(x, _log_sum(*_log(x)) * (1.0 / math.log(10.0)))


@elementwise
def log1p(x: Value) -> Value:
    """``log(1 + x)``, exact near 0 too."""
    y = select(x > -1.0, _log1p(x), select(x.equals(-1.0), -math.inf, x.constant(math.nan)))
    return select(x.equals(math.inf), math.inf, y)


@elementwise
def softplus(x: Value, beta: Value, threshold: Value) -> Value:
    """``log(1 + exp(beta * x)) / beta``, and `x` itself where ``beta * x > threshold``."""
    z = x * beta
    smooth = (_above(z, 0.0) + _log1p(_exp(-call("fabs", z)))) / beta
    return select(z > threshold, x, smooth)


@elementwise
def logaddexp(a: Value, b: Value) -> Value:
    """``log(exp(a) + exp(b))``, without overflow."""
    apart = select(a.equals(b), 0.0, call("fabs", a - b))  # equal infinities have no difference
    return larger(a, b) + _log1p(_exp(-apart))


# ---- the error function ---------------------------------------------------------------------------------------------


def _exp_of_minus_square(x: Value) -> Value:
    """exp(-x * x), with what x * x loses in rounding put back: it is a relative error of the result."""
    square = x * x
    high = (x.bits & -(1 << (constants(x).mantissa // 2 + 1))).floats  # half of the digits: its square is exact
    low = x - high
    lost = fma(low, low, fma(2.0 * high, low, high * high - square))
    e = _exp(-square)
    return fma(e, -lost, e)


def _near(x: Value) -> Value:
    """erf(x) for -1 < x < 1."""
    return x * polynomial(constants(x).near, x * x)


def _tail(size: Value) -> Value:
    """erfc(x) for x >= 0, as exp(-x * x) / (x + 3) times a polynomial in y = (x - 3) / (x + 3)."""
    x = select(size > 30.0, 30.0, size)  # from there on it is 0
    beyond = x + 3.0
    return _exp_of_minus_square(x) * polynomial(constants(x).far, (x - 3.0) / beyond) / beyond


@elementwise
def erf(x: Value) -> Value:
    """The error function."""
    size = call("fabs", x)
    return select(size < 1.0, _near(x), call("copysign", 1.0 - _tail(size), x))


@elementwise
def erfc(x: Value) -> Value:
    """One minus the error function, exact where that is small."""
    tail = _tail(call("fabs", x))
    return select(call("fabs", x) < 0.5, 1.0 - _near(x), select(x < 0.0, 2.0 - tail, tail))
