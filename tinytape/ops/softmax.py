"""Softmax and cross-entropy, stable for logits of any size."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.op import Operand, op
from ..engine.operators import method
from ..engine.tensor import Tensor
from ..engine.tree import Array

__all__ = ["cross_entropy", "log_softmax", "softmax"]

Axis = int | tuple[int, ...]

LEAST = 1 << 17  # logits: with fewer, NumPy does it in a millisecond


@op
def softmax(x: Operand, /, axis: Axis = -1) -> Any:
    """exp(x) divided by its sum along `axis`.

    An entry of -inf gets 0; a row of nothing but -inf gives NaN, as in PyTorch.
    """
    axis = _along(axis, x)
    e = _exponentials(np.asarray(x), axis)
    return e / np.sum(e, axis, keepdims=True)


@softmax.vjp
def _(g: Operand, out: Operand, axis: Axis) -> Any:
    moved = g * out
    return moved - out * np.sum(moved, axis=_along(axis, out), keepdims=True)


@softmax.jvp
def _(x: Operand, out: Operand, axis: Axis) -> Any:
    moved = x * out
    return moved - out * np.sum(moved, axis=_along(axis, out), keepdims=True)


@op
def log_softmax(x: Operand, /, axis: Axis = -1) -> Any:
    """``log(softmax(x))``, computed without overflow and without log(0).

    An entry of -inf stays -inf; a row of nothing but -inf gives NaN, as in PyTorch.
    """
    axis = _along(axis, x)
    x = np.asarray(x)
    if x.size:
        x = x - np.max(x, axis, keepdims=True)
    return x - np.log(np.sum(np.exp(x), axis, keepdims=True))


@log_softmax.vjp
def _(g: Operand, out: Operand, axis: Axis) -> Any:
    return g - np.exp(out) * np.sum(g, axis=_along(axis, out), keepdims=True)


@log_softmax.jvp
def _(x: Operand, out: Operand, axis: Axis) -> Any:
    return x - np.sum(np.exp(out) * x, axis=_along(axis, out), keepdims=True)


def _along(axis: Axis, x: Any) -> Axis:
    """A number is a row of one."""
    return () if np.ndim(x) == 0 and axis in (0, -1) else axis


def _exponentials(x: Array, axis: Axis) -> Array:
    """A new array exp(x), up to a factor for each row along `axis`: only ratios within a row mean something.

    Only very large logits need to be brought nearer to 0. That they are not can be seen in a fraction of the time
    that the maximum of each row takes.
    """
    if not x.size or (x.itemsize >= 4 and x.min() > -60 and x.max() < 60):
        return np.exp(x)
    return np.exp(x - np.max(x, axis, keepdims=True))


# ---- cross-entropy --------------------------------------------------------------------------------------------------


def cross_entropy(
    logits: Operand,
    target: Operand,
    weight: Operand | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Cross-entropy in nats between targets and ``softmax(logits)``, whose classes are the last axis.

    Parameters
    ----------
    logits : Tensor, shape (..., classes)
    target : integer array_like, shape (...); or floats, shape (..., classes)
        Class numbers; or probabilities of the classes, which are not checked to sum to 1.
    weight : Tensor, shape (classes,), optional
        A factor for each class.
    ignore_index : int
        Positions with this class number cost nothing and get no gradient. Default -100.
    reduction : {"mean", "sum", "none"}
        "mean" divides by the number of positions that count (with class numbers and `weight`: by the sum of their
        weights); if none counts, the loss is 0 with a gradient of 0, where PyTorch gives NaN.
    label_smoothing : float
        How much of the target, 0 to 1, is spread evenly over all classes.

    Returns
    -------
    Tensor
        A number, or of shape (...) with "none".

    Raises
    ------
    ShapeError
        If the target's or the weight's shape does not fit.
    DTypeError
        If the logits are not floats, or the target is neither class numbers nor probabilities.
    InputError
        If a class number is out of range (the message says which and where), or an option is.
    """
    logits, target = (x if isinstance(x, Tensor) else np.asarray(x) for x in (logits, target))
    weight = _check(logits, target, weight, ignore_index, reduction, label_smoothing)
    if target.dtype.kind == "f":
        return _soft(logits, target, weight, ignore_index, reduction, label_smoothing)
    count = _check_classes(target, logits.shape[-1], weight, ignore_index)
    losses = _cross_entropy(logits, target, weight, ignore_index, float(label_smoothing))
    if reduction == "none":
        return losses
    total = np.sum(losses)
    return total if reduction == "sum" or not count else total / count


def _check(logits: Any, target: Any, weight: Any, ignore_index: Any, reduction: Any, label_smoothing: Any) -> Any:
    """The weight in the logits' dtype, or 1.0 for none; everything but the class numbers is checked."""
    if logits.dtype.kind != "f":
        raise DTypeError(f"cross_entropy: logits have dtype {logits.dtype}.", "logits are floats.")
    if logits.ndim == 0 or logits.shape[-1] == 0:
        raise ShapeError(f"cross_entropy: logits have shape {logits.shape}.", "the last axis is that of the classes.")
    classes = logits.shape[-1]
    if target.dtype.kind == "f":
        if target.shape != logits.shape:
            same = target.shape == logits.shape[:-1]
            raise (DTypeError if same else ShapeError)(
                f"cross_entropy: target is {target.dtype}{list(target.shape)}, logits have shape {logits.shape}.",
                "class numbers are integers: target.astype('int64')." if same else "probabilities have logits' shape.",
            )
    elif target.dtype.kind not in "iu":
        raise DTypeError(f"cross_entropy: target has dtype {target.dtype}.", "class numbers are integers.")
    elif target.shape != logits.shape[:-1]:
        raise ShapeError(
            f"cross_entropy: target has shape {target.shape}, logits have {logits.shape}, so {logits.shape[:-1]} is "
            "wanted.",
            "the classes are the logits' last axis (in PyTorch the second: move it with moveaxis(logits, 1, -1)).",
        )
    if reduction not in ("mean", "sum", "none"):
        raise InputError(f"cross_entropy: reduction is {reduction!r}.", 'use "mean", "sum" or "none".')
    if not 0.0 <= label_smoothing <= 1.0:
        raise InputError(f"cross_entropy: label_smoothing is {label_smoothing}.", "it lies between 0 and 1.")
    if ignore_index.__class__ is bool or not isinstance(ignore_index, int | np.integer):
        raise DTypeError(f"cross_entropy: ignore_index is {ignore_index!r}.", "it is an integer.")
    if weight is None:
        return 1.0
    if isinstance(weight, Tensor) and weight.requires_grad:
        raise InputError("cross_entropy: weight requires gradients, and has none.", "pass weight.detach().")
    weight = weight if isinstance(weight, Tensor) else np.asarray(weight)
    if weight.shape != (classes,):
        raise ShapeError(
            f"cross_entropy: weight has shape {weight.shape}, there are {classes} classes.", f"pass ({classes},)."
        )
    return weight if weight.dtype == logits.dtype else weight.astype(logits.dtype)


def _check_classes(target: Any, classes: int, weight: Any, ignore_index: int) -> float:
    """Refuse class numbers out of range; return how much the others weigh."""
    found = np.asarray(target)
    if not found.size:
        return 0.0
    ignored = None
    if found.min() < 0 or found.max() >= classes or 0 <= ignore_index < classes:
        ignored = found == ignore_index
        wrong = ~ignored & ((found < 0) | (found >= classes))
        if wrong.any():
            position = tuple(int(i) for i in np.unravel_index(np.argmax(wrong), found.shape))
            raise InputError(
                f"cross_entropy: target {found[position]}{f' at position {position}' if position else ''} is out of "
                f"range for {classes} classes.",
                f"classes go from 0 to {classes - 1}; positions with ignore_index = {ignore_index} do not count.",
            )
    if isinstance(weight, float):
        return float(found.size if ignored is None else found.size - np.count_nonzero(ignored))
    return float(np.sum(np.asarray(weight)[found if ignored is None else found[~ignored]]))


def _soft(logits: Any, target: Any, weight: Any, ignore_index: int, reduction: str, label_smoothing: float) -> Any:
    """With probabilities as target: differentiable in these too."""
    if ignore_index >= 0:
        raise InputError(
            f"cross_entropy: ignore_index is {ignore_index}, but the target holds probabilities.",
            "give the positions to be ignored probabilities of 0.",
        )
    if label_smoothing:
        target = target * (1.0 - label_smoothing) + label_smoothing / logits.shape[-1]
    losses = -np.sum(log_softmax(logits) * target * weight, axis=-1)
    if reduction == "none":
        return losses
    total = np.sum(losses)
    return total if reduction == "sum" or not losses.size else total / float(losses.size)


@op
def _cross_entropy(
    logits: Operand, target: Operand, weight: Operand, /, ignore_index: int, label_smoothing: float
) -> Any:
    """The loss of each position; `weight` is 1.0 if there is none."""
    x, classes, valid = _rows(logits, target, ignore_index)
    if (kernels := _kernels(x)) is not None:
        arguments = _for_kernels(x, classes, valid, weight, label_smoothing)
        return kernels.losses(x, *arguments).reshape(np.shape(target))
    rows = np.arange(len(x))
    top = x[rows, np.argmax(x, -1)]  # twice as quick as np.max on short rows
    x = x - top[:, None]
    log_sum = np.log(_sum_rows(np.exp(x)))
    losses = (log_sum - x[rows, classes]) * _weights_of(weight, classes) * (1.0 - label_smoothing)
    spread = _spread(weight, x, label_smoothing)
    if spread is not None:
        losses = losses + (log_sum * spread.sum() - x @ spread)
    if valid is not None:
        losses = np.where(valid, losses, 0)
    return losses.reshape(np.shape(target))


@_cross_entropy.vjp
def _(g: Operand, logits: Operand, target: Operand, weight: Operand, ignore_index: int, label_smoothing: float) -> Any:
    return cross_entropy_gradient(g, logits, target, weight, ignore_index, label_smoothing), None, None


@_cross_entropy.jvp
def _(
    x: Operand,
    _: Operand,
    __: Operand,
    logits: Operand,
    target: Operand,
    weight: Operand,
    ignore_index: int,
    label_smoothing: float,
) -> Any:
    ones = np.ones(x.shape[:-1], x.dtype)
    return np.sum(x * cross_entropy_gradient(ones, logits, target, weight, ignore_index, label_smoothing), axis=-1)


@op
def cross_entropy_gradient(
    g: Operand, logits: Operand, target: Operand, weight: Operand, /, ignore_index: int, label_smoothing: float
) -> Any:
    """`g` times the derivative of each position's loss: total * softmax(logits) - (the target's distribution)."""
    x, classes, valid = _rows(logits, target, ignore_index)
    scale = np.reshape(g, (len(x),))
    if (kernels := _kernels(x)) is not None:
        arguments = _for_kernels(x, classes, valid, weight, label_smoothing)
        out = np.empty(logits.shape, x.dtype)
        kernels.gradient(x, *arguments, np.ascontiguousarray(scale, x.dtype), out.reshape(x.shape))
        return out
    total = own = scale * _weights_of(weight, classes) * (1.0 - label_smoothing)
    spread = _spread(weight, x, label_smoothing)
    if spread is not None:
        total = own + scale * spread.sum()
    e = _exponentials(x, -1)
    e *= (total / _sum_rows(e))[:, None]
    e[np.arange(len(x)), classes] -= own
    if spread is not None:
        e -= scale[:, None] * spread
    if valid is not None:
        e[~valid] = 0  # whatever the logits were
    return e.reshape(logits.shape)


@cross_entropy_gradient.vjp
def _(
    h: Operand,
    g: Operand,
    logits: Operand,
    target: Operand,
    weight: Operand,
    ignore_index: int,
    label_smoothing: float,
) -> Any:
    ones = np.ones(g.shape, g.dtype)
    slope = cross_entropy_gradient(ones, logits, target, weight, ignore_index, label_smoothing)
    total = total_weight(target, weight, ignore_index, label_smoothing, logits.shape[-1])
    p = softmax(logits)
    moved = p * h
    curved = moved - p * np.sum(moved, axis=-1, keepdims=True)
    return np.sum(h * slope, axis=-1), np.expand_dims(g * total, -1) * curved, None, None


@op(kind="constant")
def total_weight(target: Operand, weight: Operand, /, ignore_index: int, label_smoothing: float, classes: int) -> Any:
    """The sum of each position's target distribution times the weights: 1 without weights, 0 where ignored."""
    found = np.asarray(target)
    valid = found != ignore_index
    weights = np.asarray(weight)
    own = weights if weights.ndim == 0 else weights[np.where(valid, found, 0)]
    spread = np.mean(np.broadcast_to(weights, (classes,)))
    return np.where(valid, (1.0 - label_smoothing) * own + label_smoothing * spread, 0)


def _rows(logits: Any, target: Any, ignore_index: int) -> tuple[Array, Array, Array | None]:
    """Logits as (rows, classes), the class of each row (0 where ignored), and which rows count (None: all)."""
    x = np.reshape(logits, (-1, logits.shape[-1]))
    classes = np.reshape(target, -1)
    valid = classes != ignore_index
    return (x, classes, None) if valid.all() else (x, np.where(valid, classes, 0), valid)


def _weights_of(weight: Any, classes: Array) -> Any:
    return weight if isinstance(weight, float) else weight[classes]


def _spread(weight: Any, x: Array, label_smoothing: float) -> Array | None:
    """What label smoothing gives to every class, times the weights."""
    if not label_smoothing:
        return None
    return np.broadcast_to(np.asarray(weight, x.dtype), x.shape[-1:]) * (label_smoothing / x.shape[-1])


def _kernels(x: Array) -> Any:
    """The module of compiled kernels, if they take these rows and there is enough to do."""
    if x.size < LEAST or x.dtype.char not in "fd" or not x.dtype.isnative or not x.flags.c_contiguous:
        return None
    from ..kernels.compiler import usable

    if not usable():
        return None
    from ..kernels import softmax

    return softmax


def _for_kernels(x: Array, classes: Array, valid: Array | None, weight: Any, label_smoothing: float) -> tuple[Any, ...]:
    """The class of each row, negative where it does not count; what it has of the target; what all classes have."""
    own = np.full(len(x), 1.0 - label_smoothing, x.dtype) * _weights_of(weight, classes)
    spread = _spread(weight, x, label_smoothing)
    marked = classes.astype(np.int64) if valid is None else np.where(valid, classes, -1).astype(np.int64)
    return marked, own, np.ascontiguousarray(x[0, :0] if spread is None else spread)


def _sum_rows(e: Array) -> Array:
    return np.einsum("ij->i", e)  # four times quicker than np.sum on short rows


Tensor.softmax = method(softmax)
Tensor.log_softmax = method(log_softmax)
