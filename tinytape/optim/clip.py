"""Clipping gradients: by their norm over all parameters together, or value by value.

Clipping bounds a single exploding step of a recurrent network (Pascanu, Mikolov and Bengio 2013, "On the difficulty
of training recurrent neural networks"). It belongs between ``backward()`` and ``step()``; anywhere else it does
nothing. An optimiser made with ``clip_norm=`` or ``clip_value=`` does it in the right place by itself.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from ..engine.errors import InputError
from ..engine.tape import no_grad
from ..engine.tensor import Tensor
from ..engine.tree import Array
from .fused import sum_of_squares
from .inputs import named, within

__all__ = ["clip_grad_norm_", "clip_grad_value_"]


def clip_grad_norm_(params: Any, max_norm: float, norm_type: float = 2.0) -> float:
    """Scale all gradients by one factor, so that their norm, taken together, is at most `max_norm`. In place.

    Parameters
    ----------
    params : iterable of Tensor, Tensor, dict or Module
        Those without a gradient are passed over; one that is given twice counts once.
    max_norm : float
        Above 0; ``math.inf`` only measures.
    norm_type : float
        Which p-norm, above 0; ``math.inf`` is the largest absolute value. Default 2.

    Returns
    -------
    float
        The norm before clipping; 0.0 if there are no gradients.

    Raises
    ------
    InputError
        If `max_norm` or `norm_type` is not above 0, or if the norm is NaN or infinite: then the gradients at fault
        are named and nothing is changed (PyTorch would make every gradient NaN or 0).
    """
    within("clip_grad_norm_", "max_norm", max_norm, 0.0, ends="(]")
    within("clip_grad_norm_", "norm_type", norm_type, 0.0, ends="(]")
    leaves = _with_gradient(params, "clip_grad_norm_")
    gradients = [(name, g.data) for name, _, g in leaves]
    norm = norm_of([g for _, g in gradients], norm_type)
    if not math.isfinite(norm):
        raise not_finite("clip_grad_norm_", gradients)
    if (scale := scale_to(norm, max_norm)) < 1.0:
        for _, p, _ in leaves:
            array = _writable_gradient(p)
            np.multiply(array, scale, out=array)
    return norm


def clip_grad_value_(params: Any, clip_value: float) -> None:
    """Bring every entry of every gradient into [-clip_value, clip_value], infinite ones too. In place.

    Parameters
    ----------
    params : iterable of Tensor, Tensor, dict or Module
        Those without a gradient are passed over.
    clip_value : float
        Above 0.

    Raises
    ------
    InputError
        If `clip_value` is not above 0, or if a gradient has a NaN: then the gradients at fault are named and nothing
        is changed.
    """
    within("clip_grad_value_", "clip_value", clip_value, 0.0, ends="(]")
    leaves = _with_gradient(params, "clip_grad_value_")
    if any(bool(np.isnan(g.data).any()) for _, _, g in leaves):
        raise not_finite("clip_grad_value_", [(name, g.data) for name, _, g in leaves])
    for _, p, _ in leaves:
        array = _writable_gradient(p)
        np.clip(array, -clip_value, clip_value, out=array)


def norm_of(arrays: Iterable[Array], norm_type: float = 2.0) -> float:
    """The p-norm of all entries of all arrays together."""
    arrays = [x for x in arrays if x.size]
    squares = sum_of_squares(arrays) if norm_type == 2.0 else None
    if squares is not None and 1e-280 < squares < 1e280:  # elsewhere squares overflow or vanish
        return math.sqrt(squares)
    norms = [_norm(x, norm_type) for x in arrays]
    return _norm(np.array(norms), norm_type) if norms else 0.0


def _norm(x: Array, p: float) -> float:
    if p == 2.0:
        flat = x.reshape(-1)
        squares = float(np.dot(flat, flat))
        if 1e-30 < squares < 1e30:  # elsewhere squares of float32 numbers overflow or vanish
            return math.sqrt(squares)
    sizes = np.abs(x, dtype=np.float64)
    top = float(np.max(sizes))
    if p == math.inf or top == 0.0 or not math.isfinite(top):
        return top
    return top * float(np.sum((sizes / top) ** p)) ** (1.0 / p)


def scale_to(norm: float, max_norm: float) -> float:
    """What gradients of this norm are multiplied by: PyTorch's formula, safe at a norm of 0."""
    return min(1.0, max_norm / (norm + 1e-6))


def not_finite(what: str, gradients: Iterable[tuple[str, Array]]) -> InputError:
    """The error that names the gradients which cannot be clipped."""
    rows: list[str] = []
    for name, g in gradients:
        nans, infinities = int(np.isnan(g).sum()), int(np.isinf(g).sum())
        if nans or infinities:
            rows.append(f"{name} (shape {g.shape}) has {nans} NaN and {infinities} infinite of {g.size} entries")
    found = "; ".join(rows) or "the entries are finite, but their norm exceeds the largest float"
    return InputError(
        f"{what}: the gradients to be clipped are not finite: {found}. Nothing was changed.",
        "drop them with zero_grad() and go on, or find what first left the finite numbers in the forward pass.",
    )


def _with_gradient(params: Any, what: str) -> list[tuple[str, Tensor, Tensor]]:
    """Name, tensor and gradient of what has a gradient, each tensor once."""
    pairs = named([params] if isinstance(params, Tensor) else params, what)
    once = {p: name for name, p in reversed(pairs)}
    return [(once.pop(p), p, p.grad) for _, p in pairs if p in once and p.grad is not None]


def _writable_gradient(p: Tensor) -> Array:
    """The gradient's memory; a gradient that was itself recorded becomes a constant first."""
    assert p.grad is not None
    if p.grad.requires_grad:
        p.grad = p.grad.copy()
    with no_grad():
        return p.grad.writable("clip")
