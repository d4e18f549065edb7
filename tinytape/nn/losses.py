"""Losses: functions with PyTorch's names and arguments, and thin modules around them.

Predictions and targets must have one shape and one dtype: broadcasting ``(N, 1)`` against ``(N,)`` silently is how
models learn the mean. Classes are on the last axis. `reduction` is "mean", "sum" or "none".

`mask` leaves out padding: bools, of input's shape or of its first axes, (T, B) beside predictions (T, B, F). What it
leaves out does not count, whatever stands there, and gets no gradient; the mean over nothing is 0.
In `nll_loss` and `cross_entropy`, a target of `ignore_index` does the same.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.tensor import Tensor
from ..ops.activation import softplus
from ..ops.elementwise import abs as absolute
from ..ops.elementwise import log, maximum, square, where
from ..ops.index import take_along_axis
from ..ops.reduce import mean
from ..ops.reduce import sum as total
from ..ops.shape import expand_dims, squeeze
from ..ops.softmax import cross_entropy
from .checks import check_array, check_choice, check_dtype
from .module import Buffer, Module

__all__ = [
    "BCEWithLogitsLoss", "CrossEntropyLoss", "GaussianNLLLoss", "HuberLoss", "L1Loss", "MSELoss", "NLLLoss",
    "PinballLoss", "SmoothL1Loss", "binary_cross_entropy_with_logits", "cross_entropy", "gaussian_nll_loss",
    "huber_loss", "l1_loss", "mse_loss", "nll_loss", "pinball_loss", "smooth_l1_loss",
]  # fmt: skip

Reduction = Literal["mean", "sum", "none"]


def mse_loss(input: Any, target: Any, reduction: Reduction = "mean", weight: Any = None, mask: Any = None) -> Tensor:
    """Squared error, ``(input - target)²``.

    Parameters
    ----------
    input, target : Tensor or array of one shape and dtype
    reduction : {"mean", "sum", "none"}
    weight : array of the same shape, optional
        Each element's weight; "mean" divides by their sum, and is 0 where that is 0.
    mask : bools, of the same shape or of its first axes, optional
        Which elements count. Default: all.

    Raises
    ------
    ShapeError, DTypeError
        If shapes or dtypes differ.
    """
    _check_pair("mse_loss", input, target)
    flags, input, target = _counting("mse_loss", mask, input, target)
    return _reduce("mse_loss", square(input - target), reduction, weight, flags)


def l1_loss(input: Any, target: Any, reduction: Reduction = "mean", weight: Any = None, mask: Any = None) -> Tensor:
    """Absolute error, ``|input - target|``. Parameters and errors as for `mse_loss`."""
    _check_pair("l1_loss", input, target)
    flags, input, target = _counting("l1_loss", mask, input, target)
    return _reduce("l1_loss", absolute(input - target), reduction, weight, flags)


def huber_loss(
    input: Any, target: Any, reduction: Reduction = "mean", delta: float = 1.0, weight: Any = None, mask: Any = None
) -> Tensor:
    """``e² / 2`` where ``|e| <= delta``, else ``delta (|e| - delta / 2)`` (Huber 1964).

    Parameters and errors as for `mse_loss`, but "mean" divides by the number of elements that count also where there
    are weights, as PyTorch's does; `delta` is positive.
    """
    _check_pair("huber_loss", input, target)
    if not delta > 0:
        raise InputError(f"huber_loss: delta is {delta}.", "pass a positive number.")
    flags, input, target = _counting("huber_loss", mask, input, target)
    error = input - target
    far = absolute(error)
    loss = where(far <= delta, 0.5 * square(error), delta * (far - 0.5 * delta))
    loss = loss if weight is None else loss * _full_weight("huber_loss", weight, loss)
    return _reduce("huber_loss", loss, reduction, None, flags)


def smooth_l1_loss(
    input: Any, target: Any, reduction: Reduction = "mean", beta: float = 1.0, mask: Any = None
) -> Tensor:
    """`huber_loss` with ``delta = beta``, divided by beta; beta 0 gives `l1_loss`."""
    if beta == 0:
        return l1_loss(input, target, reduction, mask=mask)
    return huber_loss(input, target, reduction, beta, mask=mask) / beta


def pinball_loss(
    input: Any, target: Any, quantile: float | Sequence[float], reduction: Reduction = "mean", mask: Any = None
) -> Tensor:
    """Quantile loss ``max(q e, (q - 1) e)`` with ``e = target - input`` (Koenker & Bassett 1978).

    Parameters
    ----------
    input : Tensor or array
        Of target's shape for one quantile; for several, with one more axis at the end, of their number.
    target : Tensor or array
    quantile : float or sequence of float
        Between 0 and 1.
    reduction : {"mean", "sum", "none"}
        The mean is over all elements that count, the quantiles' axis among them.
    mask : bools, optional
    """
    q: Any = quantile
    if isinstance(quantile, Sequence | np.ndarray):
        _check_input("pinball_loss", input)
        check_dtype("pinball_loss", "target", target, input.dtype, "input is")
        q = np.asarray(quantile, input.dtype)
        target = expand_dims(target, -1)
        if input.shape[:-1] != target.shape[:-1] or input.shape[-1:] != q.shape:
            raise ShapeError(
                f"pinball_loss: input has shape {input.shape} for {len(quantile)} quantiles of a target of shape "
                f"{target.shape[:-1]}.",
                f"input has target's shape and an axis for the quantiles: {(*target.shape[:-1], len(quantile))}.",
            )
    else:
        _check_pair("pinball_loss", input, target)
    if not np.all((np.asarray(q) > 0) & (np.asarray(q) < 1)):
        raise InputError(f"pinball_loss: quantile is {quantile}.", "quantiles lie between 0 and 1.")
    flags, input, target = _counting("pinball_loss", mask, input, target)
    error = target - input
    return _reduce("pinball_loss", where(error >= 0, q * error, (q - 1) * error), reduction, None, flags)


def gaussian_nll_loss(
    input: Any, target: Any, var: Any, full: bool = False, eps: float = 1e-6, reduction: Reduction = "mean",
    mask: Any = None,
) -> Tensor:  # fmt: skip
    """``(log var + (input - target)² / var) / 2``: minus the log density of a normal distribution (Nix & Weigend 1994).

    Parameters
    ----------
    input, target : Tensor or array of one shape and dtype
        Means and observations.
    var : Tensor, array or float
        Variances, 0 or more: of input's shape, or with one axis of 1, or without the last axis.
    full : bool
        Whether to add the constant ``log(2π) / 2``. Default False.
    eps : float
        Variances below are taken as `eps`; their gradient passes as if they were not. Default 1e-6.
    reduction : {"mean", "sum", "none"}
    mask : bools, optional

    Raises
    ------
    ShapeError, DTypeError, InputError
        If shapes or dtypes do not fit, or a variance is negative.
    """
    _check_pair("gaussian_nll_loss", input, target)
    if isinstance(var, float | int):
        var = np.full(input.shape, var, input.dtype)
    check_dtype("gaussian_nll_loss", "var", var, input.dtype, "input is")
    if var.shape == input.shape[:-1] != input.shape:
        var = expand_dims(var, -1)
    if var.ndim != input.ndim or [n for n, m in zip(var.shape, input.shape, strict=True) if n != m] not in ([], [1]):
        raise ShapeError(
            f"gaussian_nll_loss: var has shape {var.shape}, input has {input.shape}.",
            f"var has input's shape, or {input.shape[:-1]}, one for each row.",
        )
    flags, input, target = _counting("gaussian_nll_loss", mask, input, target)
    if flags is not None:
        var = where(flags, var, True)
    values = var.detach() if isinstance(var, Tensor) else var
    if (values < 0).any():
        raise InputError("gaussian_nll_loss: var has negative entries.", "predict log(var) and pass its exp.")
    var = var + (maximum(values, eps) - values)
    loss = 0.5 * (log(var) + square(input - target) / var)
    loss = loss + 0.5 * math.log(2 * math.pi) if full else loss
    return _reduce("gaussian_nll_loss", loss, reduction, None, flags)


def binary_cross_entropy_with_logits(
    input: Any, target: Any, weight: Any = None, reduction: Reduction = "mean", pos_weight: Any = None,
    mask: Any = None,
) -> Tensor:  # fmt: skip
    """``-(p y log σ(x) + (1 - y) log(1 - σ(x)))``, computed without overflow.

    Parameters
    ----------
    input, target : Tensor or array of one shape and dtype
        Logits x, and labels y between 0 and 1.
    weight : array, optional
        Multiplies each element's loss; broadcast. The mean divides by the number of elements that count, as PyTorch's.
    reduction : {"mean", "sum", "none"}
    pos_weight : array, optional
        The factor p of the positive labels; broadcast.
    mask : bools, optional
    """
    what = "binary_cross_entropy_with_logits"
    _check_pair(what, input, target)
    flags, input, target = _counting(what, mask, input, target)
    minus_log_sigma = softplus(-input)
    factor = 1.0 if pos_weight is None else 1 + (_weights(what, "pos_weight", pos_weight, input) - 1) * target
    loss = (1 - target) * input + factor * minus_log_sigma
    loss = loss if weight is None else loss * _weights(what, "weight", weight, input)
    return _reduce(what, loss, reduction, None, flags)


def nll_loss(
    input: Any, target: Any, weight: Any = None, ignore_index: int = -100, reduction: Reduction = "mean"
) -> Tensor:
    """Minus the log-probability of the target class: `cross_entropy` for what went through `log_softmax` already.

    Parameters
    ----------
    input : Tensor or array, shape (..., C)
        Log-probabilities.
    target : integers, shape (...)
        Classes from 0 to C - 1.
    weight : array, shape (C,), optional
        Each class's weight; the mean divides by the sum of the targets' weights.
    ignore_index : int
        A target that does not count. Default -100. If none counts, the mean is 0, where PyTorch gives NaN.
    reduction : {"mean", "sum", "none"}

    Raises
    ------
    ShapeError, DTypeError, InputError
        If the shapes do not fit, targets are no integers, or one is out of range.
    """
    _check_input("nll_loss", input)
    labels = target.data if isinstance(target, Tensor) else np.asarray(target)
    if labels.dtype.kind not in "iu":
        raise DTypeError(f"nll_loss: target is {labels.dtype}.", "targets are integers; use astype('int64').")
    if not input.ndim or labels.shape != input.shape[:-1]:
        raise ShapeError(
            f"nll_loss: target has shape {labels.shape} for an input of shape {input.shape}.",
            f"classes are on input's last axis, so target has shape {input.shape[:-1]}.",
        )
    classes = input.shape[-1]
    counts = labels != ignore_index
    wrong = labels[counts & ((labels < 0) | (labels >= classes))]
    if wrong.size:
        raise InputError(
            f"nll_loss: target {wrong.flat[0]} is out of range for {classes} classes.",
            f"targets are 0 to {classes - 1}, or ignore_index = {ignore_index}.",
        )
    labels = np.where(counts, labels, 0)
    each = counts.astype(input.dtype)
    if weight is not None:
        each *= _class_weights("nll_loss", weight, classes)[labels]
    found = squeeze(take_along_axis(input, labels[..., None], axis=-1), axis=-1)
    loss = where(counts, -found, 0.0) * each
    if reduction != "mean":
        return _reduce("nll_loss", loss, reduction)
    return total(loss) / each.sum() if counts.any() else total(loss)


# ---- what they share ------------------------------------------------------------------------------------------------


def _check_input(what: str, input: Any) -> None:
    check_array(what, "input", input)
    if input.dtype.kind != "f":
        raise DTypeError(f"{what}: input is {input.dtype}.", "predictions are floats.")


def _check_pair(what: str, input: Any, target: Any) -> None:
    _check_input(what, input)
    check_dtype(what, "target", target, input.dtype, "input is")
    if input.shape != target.shape:
        raise ShapeError(
            f"{what}: input has shape {input.shape}, target has {target.shape}; they would broadcast or fail.",
            "reshape one of them, so that each prediction meets its own target.",
        )


def _weights(what: str, name: str, weight: Any, input: Any) -> Any:
    """A weight as constants of input's dtype, which broadcast to its shape and not the other way round."""
    values = weight.data if isinstance(weight, Tensor) else np.asarray(weight)
    if values.ndim > input.ndim or any(
        n not in (1, m) for n, m in zip(values.shape[::-1], input.shape[::-1], strict=False)
    ):
        raise ShapeError(
            f"{what}: {name} has shape {values.shape} for an input of shape {input.shape}.",
            "it must broadcast to the input's shape.",
        )
    return values.astype(input.dtype)


def _full_weight(what: str, weight: Any, loss: Any) -> Any:
    values = _weights(what, "weight", weight, loss)
    if values.shape != loss.shape:
        raise ShapeError(
            f"{what}: weight has shape {values.shape}, input has {loss.shape}.", "pass one for each element."
        )
    return values


def _class_weights(what: str, weight: Any, classes: int) -> Any:
    values = weight.data if isinstance(weight, Tensor) else np.asarray(weight)
    if values.shape != (classes,):
        raise ShapeError(
            f"{what}: weight has shape {values.shape} for {classes} classes.", f"pass one of shape {(classes,)}."
        )
    return values


def _counting(what: str, mask: Any, input: Any, target: Any) -> tuple[Any, Any, Any]:
    """A mask as flags that broadcast to input's shape, and both arrays with zeros where it is False."""
    if mask is None:
        return None, input, target
    values = mask.data if isinstance(mask, Tensor) else np.asarray(mask)
    if values.dtype != np.bool_:
        raise DTypeError(f"{what}: mask is {values.dtype}.", "pass bools: mask.astype(bool).")
    if values.shape != input.shape[: values.ndim]:
        raise ShapeError(
            f"{what}: mask has shape {values.shape}, input has {input.shape}.",
            "pass one of input's shape, or of its first axes.",
        )
    flags = values.reshape(values.shape + (1,) * (input.ndim - values.ndim)).copy()  # the tape keeps it
    return flags, where(flags, input, False), where(flags, target, False)


def _reduce(what: str, loss: Any, reduction: str, weight: Any = None, flags: Any = None) -> Tensor:
    check_choice(what, "reduction", reduction, ("mean", "sum", "none"))
    count = None
    if weight is not None:
        values = _full_weight(what, weight, loss)
        loss = loss * values
        count = np.sum(values, where=True if flags is None else flags)
    if flags is not None:
        loss = where(flags, loss, False)
        count = np.count_nonzero(np.broadcast_to(flags, loss.shape)) if count is None else count
    if reduction != "mean":
        return loss if reduction == "none" else total(loss)
    return mean(loss) if count is None else total(loss) / (count if count else 1)


# ---- modules --------------------------------------------------------------------------------------------------------


class MSELoss(Module):
    """`mse_loss` as a module."""

    def __init__(self, reduction: Reduction = "mean") -> None:
        self.reduction: Reduction = reduction

    def forward(self, input: Any, target: Any, mask: Any = None) -> Tensor:
        return mse_loss(input, target, self.reduction, mask=mask)


class L1Loss(Module):
    """`l1_loss` as a module."""

    def __init__(self, reduction: Reduction = "mean") -> None:
        self.reduction: Reduction = reduction

    def forward(self, input: Any, target: Any, mask: Any = None) -> Tensor:
        return l1_loss(input, target, self.reduction, mask=mask)


class HuberLoss(Module):
    """`huber_loss` as a module."""

    def __init__(self, reduction: Reduction = "mean", delta: float = 1.0) -> None:
        self.reduction: Reduction = reduction
        self.delta = delta

    def forward(self, input: Any, target: Any, mask: Any = None) -> Tensor:
        return huber_loss(input, target, self.reduction, self.delta, mask=mask)


class SmoothL1Loss(Module):
    """`smooth_l1_loss` as a module."""

    def __init__(self, reduction: Reduction = "mean", beta: float = 1.0) -> None:
        self.reduction: Reduction = reduction
        self.beta = beta

    def forward(self, input: Any, target: Any, mask: Any = None) -> Tensor:
        return smooth_l1_loss(input, target, self.reduction, self.beta, mask=mask)


class PinballLoss(Module):
    """`pinball_loss` as a module."""

    def __init__(self, quantile: float | Sequence[float], reduction: Reduction = "mean") -> None:
        self.quantile = quantile
        self.reduction: Reduction = reduction

    def forward(self, input: Any, target: Any, mask: Any = None) -> Tensor:
        return pinball_loss(input, target, self.quantile, self.reduction, mask=mask)


class GaussianNLLLoss(Module):
    """`gaussian_nll_loss` as a module."""

    def __init__(self, *, full: bool = False, eps: float = 1e-6, reduction: Reduction = "mean") -> None:
        self.full, self.eps = full, eps
        self.reduction: Reduction = reduction

    def forward(self, input: Any, target: Any, var: Any, mask: Any = None) -> Tensor:
        return gaussian_nll_loss(input, target, var, self.full, self.eps, self.reduction, mask=mask)


class BCEWithLogitsLoss(Module):
    """`binary_cross_entropy_with_logits` as a module; the weights are buffers."""

    weight: Buffer | None
    pos_weight: Buffer | None

    def __init__(self, weight: Any = None, reduction: Reduction = "mean", pos_weight: Any = None) -> None:
        self.register_buffer("weight", weight)
        self.register_buffer("pos_weight", pos_weight)
        self.reduction: Reduction = reduction

    def forward(self, input: Any, target: Any, mask: Any = None) -> Tensor:
        return binary_cross_entropy_with_logits(input, target, self.weight, self.reduction, self.pos_weight, mask)


class NLLLoss(Module):
    """`nll_loss` as a module; the weights are a buffer."""

    weight: Buffer | None

    def __init__(self, weight: Any = None, ignore_index: int = -100, reduction: Reduction = "mean") -> None:
        self.register_buffer("weight", weight)
        self.ignore_index = ignore_index
        self.reduction: Reduction = reduction

    def forward(self, input: Any, target: Any) -> Tensor:
        return nll_loss(input, target, self.weight, self.ignore_index, self.reduction)


class CrossEntropyLoss(Module):
    """`cross_entropy` as a module; the weights are a buffer."""

    weight: Buffer | None

    def __init__(
        self, weight: Any = None, ignore_index: int = -100, reduction: Reduction = "mean", label_smoothing: float = 0.0
    ) -> None:
        self.register_buffer("weight", weight)
        self.ignore_index, self.label_smoothing = ignore_index, label_smoothing
        self.reduction: Reduction = reduction

    def forward(self, input: Any, target: Any) -> Tensor:
        return cross_entropy(input, target, self.weight, self.ignore_index, self.reduction, self.label_smoothing)
