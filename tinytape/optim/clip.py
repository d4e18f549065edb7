"""Clipping gradients: by their norm over all parameters together, or value by value.

Clipping bounds a single exploding step of a recurrent network (Pascanu, Mikolov and Bengio 2013, "On the difficulty
of training recurrent neural networks"). It belongs between ``backward()`` and ``step()``; anywhere else it does
nothing. An optimiser made with ``clip_norm=`` or ``clip_value=`` does it in the right place by itself.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from ..engine.errors import InputError
from ..engine.tape import no_grad
from ..engine.tensor import Tensor
from ..engine.tree import Array
from .fused import block_squares
from .inputs import named, within
from .listening import Clip, listeners

__all__ = ["clip_grad_norm_", "clip_grad_value_"]

Leaf = tuple[str, Tensor, Array]
"""A parameter's name, the parameter, and its gradient."""

Norms = tuple[float, Callable[[], list[float]]]
"""The norm of arrays together, and what gives those of each."""


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
    norm, scale = measure("clip_grad_norm_", [(name, p, g.data) for name, p, g in leaves], max_norm, norm_type)
    if scale < 1.0:
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
    if listeners():
        norms = _norms_of([g.data for _, _, g in leaves], 2.0)
        _tell([(name, p, g.data) for name, p, g in leaves], norms, None, 2.0, clip_value)
    if any(bool(np.isnan(g.data).any()) for _, _, g in leaves):
        raise not_finite("clip_grad_value_", [(name, g.data) for name, _, g in leaves])
    for _, p, _ in leaves:
        array = _writable_gradient(p)
        np.clip(array, -clip_value, clip_value, out=array)


def measure(
    what: str,
    leaves: Sequence[Leaf],
    max_norm: float | None,
    norm_type: float = 2.0,
    clip_value: float | None = None,
) -> tuple[float, float]:
    """The norm of gradients, and what they are to be multiplied by, for one of two kinds of clip.

    Raises
    ------
    InputError
        If the norm is NaN, or infinite where it is to be clipped. Those who listen are told before.
    """
    norms = _norms_of([g for _, _, g in leaves], norm_type)
    if listeners():
        _tell(leaves, norms, max_norm, norm_type, clip_value)
    norm, _ = norms
    if math.isnan(norm) or (math.isinf(norm) and max_norm is not None):
        raise not_finite(what, [(name, g) for name, _, g in leaves])
    return norm, 1.0 if max_norm is None else scale_to(norm, max_norm)


def _tell(
    leaves: Sequence[Leaf], norms: Norms, max_norm: float | None, norm_type: float, clip_value: float | None
) -> None:
    """Let those who listen know of a clip."""
    norm, each = norms
    if max_norm is not None:
        after, bound = norm * scale_to(norm, max_norm), f"a norm of at most {max_norm:g}"
    else:
        assert clip_value is not None
        after = norm_of([np.clip(g, -clip_value, clip_value) for _, _, g in leaves], norm_type)
        bound = f"entries of at most {clip_value:g}"
    clip = Clip([p for _, p, _ in leaves], norm, each, after, norm_type, bound, max_norm != math.inf)
    for listener in listeners():
        listener.clipped(clip)


def norm_of(arrays: Iterable[Array], norm_type: float = 2.0) -> float:
    """The p-norm of all entries of all arrays together."""
    return _norms_of(list(arrays), norm_type)[0]


def _norms_of(arrays: Sequence[Array], norm_type: float) -> Norms:
    """The p-norm of all entries of all arrays together, and what gives that of each array."""
    blocks = block_squares(arrays) if norm_type == 2.0 else None
    if blocks is not None:
        sums, first = blocks
        squares = float(np.sum(sums))
        if 1e-280 < squares < 1e280:  # elsewhere squares overflow or vanish
            return math.sqrt(squares), lambda: _roots(sums, first)
    norms = [_norm(x, norm_type) if x.size else 0.0 for x in arrays]
    filled = [norm for x, norm in zip(arrays, norms, strict=True) if x.size]
    return _norm(np.array(filled), norm_type) if filled else 0.0, lambda: norms


def _roots(sums: Array, first: Sequence[int]) -> list[float]:
    """The square roots of sums of pieces, which begin at `first`."""
    totals = np.add.reduceat(np.append(sums, 0.0), first)[:-1]
    return np.sqrt(np.where(np.diff(first) > 0, totals, 0.0)).tolist()


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
