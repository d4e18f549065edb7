"""Reductions over any axes, and cumulative sums and products.

`axis` is an int, a tuple of ints or None for all axes, and may be negative; with `keepdims` the reduced axes stay,
with length 1. Where a reduction picks elements (`max`, `min`, `norm` with ord inf), equal ones share the gradient
evenly, along an axis as over the whole tensor. Products are differentiated without dividing by their factors, so
that zeros among them are exact in every order of derivative.
"""

from __future__ import annotations

import builtins
import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np

from ..engine.errors import DTypeError, InputError
from ..engine.op import Operand, op
from ..engine.operators import method
from ..engine.tensor import FUNCTIONS, Tensor

__all__ = [
    "all",
    "any",
    "argmax",
    "argmin",
    "cumprod",
    "cumsum",
    "logsumexp",
    "max",
    "mean",
    "min",
    "norm",
    "prod",
    "std",
    "sum",
    "var",
]

Axis = int | tuple[int, ...] | None
Shape = tuple[int, ...]

# The types that NumPy declares for these say too little about arguments of type Any.
_where: Callable[..., Any] = np.where
_zeros: Callable[[Any], Any] = np.zeros_like
_cumulate: Callable[..., Any] = np.cumprod

# ---- what the rules share -------------------------------------------------------------------------------------------


def _axes(shape: Shape, axis: Axis) -> tuple[int, ...]:
    """The reduced axes, counted from the front."""
    if axis is None or not shape:  # NumPy lets a tensor without axes have an axis 0
        return tuple(range(len(shape)))
    return tuple(a % len(shape) for a in (axis if isinstance(axis, tuple) else (axis,)))


def _count(shape: Shape, axis: Axis) -> int:
    """How many elements go into one element of the result."""
    return math.prod(shape) if axis is None else math.prod(shape[a] for a in _axes(shape, axis))


def _kept(values: Any, shape: Shape, axis: Axis, keepdims: bool) -> Any:
    """A result or its gradient with the reduced axes put back, so that it broadcasts against the argument."""
    if keepdims or axis is None:
        return values
    axes = _axes(shape, axis)
    return np.reshape(values, tuple(1 if i in axes else n for i, n in enumerate(shape)))


@op(kind="linear")
def spread(x: Operand, /, shape: Shape) -> Any:
    """`x` broadcast to `shape`, in memory of its own: a view without strides is slow in all that follows."""
    out = np.empty(shape, x.dtype)
    out[...] = x
    return out


@spread.vjp
def _(g: Any) -> Any:
    return g


@op(kind="linear")
def shift(x: Operand, /, by: int, axis: int) -> Any:
    """`x` moved along an axis by `by` places; zeros come in, and what leaves is lost."""
    out = np.zeros_like(x)
    source, target = np.moveaxis(x, axis, 0), np.moveaxis(out, axis, 0)
    if by >= 0:
        target[by:] = source[: len(source) - by]
    else:
        target[:by] = source[-by:]
    return out


@shift.vjp
def _(g: Any, by: int, axis: int) -> Any:
    return shift(g, by=-by, axis=axis)


def _before(products: Any, axis: int) -> Any:
    """Cumulative products without the element itself: 1, then each product but the last."""
    shape = products.shape
    first = np.zeros((*(1,) * axis, shape[axis], *(1,) * (len(shape) - axis - 1)), products.dtype)
    first[(0,) * len(shape) if shape[axis] else ...] = 1
    return shift(products, by=1, axis=axis) + first


@op
def recurrence(a: Operand, b: Operand, /, axis: int, reverse: bool) -> Any:
    """``h[k] = b[k] + a[k] * h[k - 1]`` along an axis, from ``h[-1] = 0``.

    In reverse it is ``h[k] = b[k] + a[k + 1] * h[k + 1]``: each is the adjoint of the other.
    """
    a, b = np.moveaxis(a, axis, 0), np.moveaxis(b, axis, 0)
    h = np.array(b, dtype=np.result_type(a, b))
    if reverse:
        for k in range(len(h) - 2, -1, -1):
            h[k] += a[k + 1] * h[k + 1]
    else:
        for k in range(1, len(h)):
            h[k] += a[k] * h[k - 1]
    return np.moveaxis(h, 0, axis)


@recurrence.vjp
def _(g: Any, a: Any, out: Any, axis: int, reverse: bool) -> Any:
    by_b = recurrence(a, g, axis=axis, reverse=not reverse)
    if reverse:
        return shift(by_b, by=1, axis=axis) * out, by_b
    return by_b * shift(out, by=1, axis=axis), by_b


# ---- sums -----------------------------------------------------------------------------------------------------------


@op(kind="linear")
def sum(x: Operand, /, axis: Axis = None, keepdims: bool = False) -> Any:
    """Sum over axes; 0 over none."""
    return np.add.reduce(x, axis=axis, keepdims=keepdims)


@sum.vjp
def _(g: Any, x_shape: Shape, axis: Axis, keepdims: bool) -> Any:
    return spread(_kept(g, x_shape, axis, keepdims), x_shape)


@op(kind="linear")
def mean(x: Operand, /, axis: Axis = None, keepdims: bool = False) -> Any:
    """Mean over axes, of integers and bools a float; NaN over no elements."""
    return np.divide(np.add.reduce(x, axis=axis, keepdims=keepdims), _count(np.shape(x), axis))


@mean.vjp
def _(g: Any, x_shape: Shape, axis: Axis, keepdims: bool) -> Any:
    return spread(_kept(np.divide(g, _count(x_shape, axis)), x_shape, axis, keepdims), x_shape)


def _centred(x: Any, axis: Axis) -> Any:
    return x - mean(x, axis=axis, keepdims=True)


def _variance(x: Any, axis: Axis, ddof: int, keepdims: bool) -> Any:
    centred = _centred(x, axis)
    squares = np.add.reduce(centred * centred, axis=axis, keepdims=keepdims)
    return np.divide(squares, builtins.max(_count(np.shape(x), axis) - ddof, 0))


def _variance_rule(g: Any, x: Any, axis: Axis, ddof: int, keepdims: bool) -> Any:
    scaled = np.divide(g + g, builtins.max(_count(x.shape, axis) - ddof, 0))
    return _kept(scaled, x.shape, axis, keepdims) * _centred(x, axis)


@op
def var(x: Operand, /, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Any:
    """Variance over axes: the squares' sum divided by their number less `ddof`.

    With `ddof` 1, PyTorch's default, one element alone has the variance NaN.
    """
    return _variance(x, axis, ddof, keepdims)


@var.vjp
def _(g: Any, x: Any, axis: Axis, ddof: int, keepdims: bool) -> Any:
    return _variance_rule(g, x, axis, ddof, keepdims)


@op
def std(x: Operand, /, axis: Axis = None, ddof: int = 0, keepdims: bool = False) -> Any:
    """Standard deviation over axes, the root of `var`. Where it is 0 its gradient is 0."""
    return np.sqrt(_variance(x, axis, ddof, keepdims))


@std.vjp
def _(g: Any, x: Any, out: Any, axis: Axis, ddof: int, keepdims: bool) -> Any:
    by_variance = g / _where(out == 0, math.inf, out + out)
    return _variance_rule(by_variance, x, axis, ddof, keepdims)


@op
def logsumexp(x: Operand, /, axis: Axis = None, keepdims: bool = False) -> Any:
    """The logarithm of the sum of ``exp(x)`` over axes, without overflow.

    Where all of `x` is -inf the gradient is 0, so that a row that is masked throughout gives no NaN.
    """
    x = np.asarray(x)
    x = x if x.dtype.kind == "f" else x.astype(np.float64)
    largest = np.maximum.reduce(x, axis=axis, keepdims=True, initial=-math.inf)
    largest = _where(np.isinf(largest), 0, largest)
    total = np.log(np.add.reduce(np.exp(x - largest), axis=axis, keepdims=True)) + largest
    return total if keepdims else np.squeeze(total, axis=_axes(x.shape, axis))


@logsumexp.vjp
def _(g: Any, x: Any, out: Any, axis: Axis, keepdims: bool) -> Any:
    total = _kept(_where(out == -math.inf, 0, out), x.shape, axis, keepdims)
    distance = _where(x == math.inf, 0, x - total)  # infinity less infinity
    return _kept(g, x.shape, axis, keepdims) * np.exp(distance)


# ---- largest and smallest -------------------------------------------------------------------------------------------


def _share(g: Any, x: Any, out: Any, axis: Axis, keepdims: bool) -> Any:
    """The gradient, shared by all elements of `x` that are equal to the result."""
    hit = (x == _kept(out, x.shape, axis, keepdims)).astype(g.dtype)
    return hit * (_kept(g, x.shape, axis, keepdims) / sum(hit, axis=axis, keepdims=True))


@op
def max(x: Operand, /, axis: Axis = None, keepdims: bool = False) -> Any:
    """Largest element over axes; of an empty axis there is none. Equal ones share the gradient."""
    return np.maximum.reduce(x, axis=axis, keepdims=keepdims)


@max.vjp
def _(g: Any, x: Any, out: Any, axis: Axis, keepdims: bool) -> Any:
    return _share(g, x, out, axis, keepdims)


@op
def min(x: Operand, /, axis: Axis = None, keepdims: bool = False) -> Any:
    """Smallest element over axes; of an empty axis there is none. Equal ones share the gradient."""
    return np.minimum.reduce(x, axis=axis, keepdims=keepdims)


@min.vjp
def _(g: Any, x: Any, out: Any, axis: Axis, keepdims: bool) -> Any:
    return _share(g, x, out, axis, keepdims)


@op(kind="constant")
def argmax(x: Operand, /, axis: int | None = None, keepdims: bool = False) -> Any:
    """Index of the largest element, the first of equal ones; over all axes it counts in C order."""
    return np.argmax(x, axis=axis, keepdims=keepdims)


@op(kind="constant")
def argmin(x: Operand, /, axis: int | None = None, keepdims: bool = False) -> Any:
    """Index of the smallest element, the first of equal ones; over all axes it counts in C order."""
    return np.argmin(x, axis=axis, keepdims=keepdims)


@op(kind="constant")
def any(x: Operand, /, axis: Axis = None, keepdims: bool = False) -> Any:
    """Whether any element over axes is not zero."""
    return np.logical_or.reduce(x, axis=axis, keepdims=keepdims)


@op(kind="constant")
def all(x: Operand, /, axis: Axis = None, keepdims: bool = False) -> Any:
    """Whether all elements over axes are not zero."""
    return np.logical_and.reduce(x, axis=axis, keepdims=keepdims)


# ---- norms ----------------------------------------------------------------------------------------------------------


@op
def norm(x: Operand, /, ord: Any = 2, axis: Axis = None, keepdims: bool = False) -> Any:
    """The length of `x` over axes, taken as one vector: ``sum(abs(x) ** ord) ** (1 / ord)``.

    Parameters
    ----------
    x : Tensor or array
    ord : float or "fro"
        inf and -inf give the largest and smallest absolute value, 0 the number of elements that are not zero,
        "fro" is 2.
    axis : int, tuple of int, optional
    keepdims : bool

    Raises
    ------
    InputError
        If `ord` is another string, or no number.

    Notes
    -----
    The gradient of a norm of 0 is 0.
    """
    x = np.asarray(x)
    ord = _order(ord)
    size = np.absolute(x if x.dtype.kind == "f" else x.astype(np.float64))
    if ord == math.inf:
        return np.maximum.reduce(size, axis=axis, keepdims=keepdims)
    if ord == -math.inf:
        return np.minimum.reduce(size, axis=axis, keepdims=keepdims)
    if ord == 0:
        return np.add.reduce((size != 0).astype(size.dtype), axis=axis, keepdims=keepdims)
    if ord == 1:
        return np.add.reduce(size, axis=axis, keepdims=keepdims)
    if ord == 2:
        return np.sqrt(np.add.reduce(size * size, axis=axis, keepdims=keepdims))
    return np.add.reduce(size**ord, axis=axis, keepdims=keepdims) ** (1 / ord)


def _order(ord: Any) -> float:
    if ord == "fro" or ord is None:
        return 2
    if isinstance(ord, np.generic):
        ord = cast(Any, ord).item()
    if not isinstance(ord, int | float) or math.isnan(ord):
        raise InputError(f"norm: ord is {ord!r}.", "use a number, math.inf, -math.inf or 'fro'.")
    return ord


@norm.vjp
def _(g: Any, x: Any, out: Any, ord: Any, axis: Axis, keepdims: bool) -> Any:
    ord = _order(ord)
    g, out = _kept(g, x.shape, axis, keepdims), _kept(out, x.shape, axis, keepdims)
    if ord == 0:
        return _zeros(x)
    if ord == 1:
        return g * np.sign(x)
    length = _where(out == 0, math.inf, out)
    if ord == 2:
        return x * (g / length)
    size = np.absolute(x)
    if math.isinf(ord):
        hit = (size == out).astype(g.dtype)
        return hit * np.sign(x) * (g / sum(hit, axis=axis, keepdims=True))
    ratio = size / length
    if ord < 1:  # ratio ** (ord - 1) has a pole at 0
        ratio = _where(ratio == 0, math.inf, ratio)
    elif ord < 2:  # its derivative has
        ratio = _where(x == 0, 1, ratio)
    return g * (np.sign(x) * ratio ** (ord - 1))


# ---- products -------------------------------------------------------------------------------------------------------


@op
def prod(x: Operand, /, axis: Axis = None, keepdims: bool = False) -> Any:
    """Product over axes; 1 over none."""
    return np.multiply.reduce(x, axis=axis, keepdims=keepdims)


@prod.vjp
def _(g: Any, x: Any, axis: Axis, keepdims: bool) -> Any:
    """Each factor's derivative is the product of all before it and all behind it."""
    shape = x.shape
    reduced = _axes(shape, axis)
    order = (*(i for i in range(len(shape)) if i not in reduced), *reduced)
    moved = np.transpose(x, order)
    rows = np.reshape(moved, (*moved.shape[: len(shape) - len(reduced)], _count(shape, axis)))
    last = len(rows.shape) - 1
    before = _before(cumprod(rows, axis=last), last)
    behind = np.flip(_before(cumprod(np.flip(rows, last), axis=last), last), last)
    others = np.transpose(np.reshape(before * behind, moved.shape), tuple(map(order.index, range(len(shape)))))
    return _kept(g, shape, axis, keepdims) * others


@op(kind="linear")
def cumsum(x: Operand, /, axis: int | None = None) -> Any:
    """Sums of the elements so far along an axis; along None, of the flattened tensor."""
    return np.cumsum(x, axis=axis)


@cumsum.vjp
def _(g: Any, x_shape: Shape, axis: int | None) -> Any:
    along = 0 if axis is None else axis
    return np.reshape(np.flip(cumsum(np.flip(g, along), axis=along), along), x_shape)


@op
def cumprod(x: Operand, /, axis: int | None = None) -> Any:
    """Products of the elements so far along an axis; along None, of the flattened tensor."""
    return _cumulate(x, axis=axis)


@cumprod.vjp
def _(g: Any, x: Any, out: Any, axis: int | None) -> Any:
    """Element j is in every product from j on: what stands before it, times the later ones' gradients."""
    along = 0 if axis is None else axis % len(out.shape)
    later = recurrence(np.reshape(x, out.shape), g, axis=along, reverse=True)
    return np.reshape(later * _before(out, along), x.shape)


# ---- methods --------------------------------------------------------------------------------------------------------

Tensor.sum = method(sum)
Tensor.mean = method(mean)
Tensor.prod = method(prod)
Tensor.max = method(max)
Tensor.min = method(min)
Tensor.var = method(var)
Tensor.std = method(std)
Tensor.logsumexp = method(logsumexp)
Tensor.norm = method(norm)
Tensor.cumsum = method(cumsum)
Tensor.cumprod = method(cumprod)
Tensor.argmax = method(argmax)
Tensor.argmin = method(argmin)
Tensor.any = method(any)
Tensor.all = method(all)

# ---- NumPy's functions on Tensors -----------------------------------------------------------------------------------


def _as_numpys(ours: Callable[..., Any], *options: str) -> Callable[..., Any]:
    """Our function as it is called in NumPy's way: refuse ``dtype=``, ``out=`` and the like unless they are None."""

    def called(a: Any, axis: Axis = None, *others: Any, **named: Any) -> Any:
        for value in (*others, *(value for name, value in named.items() if name not in options)):
            if value is not None:
                name = ours.__name__
                raise DTypeError(
                    f"np.{name} of a Tensor takes axis{''.join(f', {option}' for option in options)}; got {value!r}.",
                    f"use tt.{name} with these by name, or pass x.data for plain NumPy.",
                )
        return ours(a, axis=axis, **{name: value for name, value in named.items() if name in options})

    return called


def _numpys_norm(x: Any, ord: Any = None, axis: Axis = None, keepdims: bool = False) -> Any:
    """NumPy's norm of two axes is a matrix norm, of which only the one that is also a vector norm is ours."""
    axes = len(_axes(x.shape, axis))
    if ord not in (None, "fro") and axes != 1:
        raise DTypeError(
            f"np.linalg.norm of a Tensor: ord={ord!r} over {axes} axes is a matrix norm.",
            "use tt.norm, which takes all axes as one vector, or name one axis.",
        )
    return norm(x, ord=ord, axis=axis, keepdims=keepdims)


FUNCTIONS[np.sum] = _as_numpys(sum, "keepdims")
FUNCTIONS[np.mean] = _as_numpys(mean, "keepdims")
FUNCTIONS[np.prod] = _as_numpys(prod, "keepdims")
FUNCTIONS[np.max] = _as_numpys(max, "keepdims")
FUNCTIONS[np.amax] = _as_numpys(max, "keepdims")
FUNCTIONS[np.min] = _as_numpys(min, "keepdims")
FUNCTIONS[np.amin] = _as_numpys(min, "keepdims")
FUNCTIONS[np.var] = _as_numpys(var, "ddof", "keepdims")
FUNCTIONS[np.std] = _as_numpys(std, "ddof", "keepdims")
FUNCTIONS[np.cumsum] = _as_numpys(cumsum)
FUNCTIONS[np.cumprod] = _as_numpys(cumprod)
FUNCTIONS[np.argmax] = _as_numpys(argmax, "keepdims")
FUNCTIONS[np.argmin] = _as_numpys(argmin, "keepdims")
FUNCTIONS[np.any] = _as_numpys(any, "keepdims")
FUNCTIONS[np.all] = _as_numpys(all, "keepdims")
FUNCTIONS[np.linalg.norm] = _numpys_norm
