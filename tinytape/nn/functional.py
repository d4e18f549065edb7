"""Layers and losses as functions of their parameters."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.tape import here
from ..engine.tensor import Tensor
from ..ops import index
from ..ops.activation import elu, gelu, leaky_relu, relu, sigmoid, silu, softplus
from ..ops.elementwise import sqrt, square, tanh, where
from ..ops.linalg import affine, matmul
from ..ops.reduce import mean
from ..ops.softmax import log_softmax, softmax
from ..random import Generator, check_probability, default_generator
from .checks import check_array, check_choice
from .losses import (
    binary_cross_entropy_with_logits,
    cross_entropy,
    gaussian_nll_loss,
    huber_loss,
    l1_loss,
    mse_loss,
    nll_loss,
    pinball_loss,
    smooth_l1_loss,
)

__all__ = [
    "binary_cross_entropy_with_logits", "cross_entropy", "dropout", "elu", "embedding", "gaussian_nll_loss", "gelu",
    "huber_loss", "l1_loss", "layer_norm", "leaky_relu", "linear", "log_softmax", "mse_loss", "nll_loss",
    "pinball_loss", "relu", "sigmoid", "silu", "smooth_l1_loss", "softmax", "softplus", "tanh",
]  # fmt: skip


def linear(x: Any, weight: Any, bias: Any = None) -> Tensor:
    """``x @ weight.T + bias``: x (..., I), weight (O, I), bias (O,) or None, result (..., O)."""
    if bias is None:
        return matmul(x, weight.T)
    if here.context.traced is None and _is_affine(x, weight, bias):  # a compiled step fuses the sum by itself
        return affine(x, weight, bias)
    return matmul(x, weight.T) + bias


def _is_affine(x: Any, weight: Any, bias: Any) -> bool:
    """Whether these are Tensors of one float dtype that fit without broadcasting."""
    if not (isinstance(x, Tensor) and isinstance(weight, Tensor) and isinstance(bias, Tensor)):
        return False
    if not x.dtype == weight.dtype == bias.dtype or x.dtype.kind != "f" or x.ndim < 2:
        return False
    return weight.shape == bias.shape + x.shape[-1:]


def embedding(tokens: Any, weight: Any, padding_idx: int | None = None) -> Tensor:
    """Rows of `weight` by token; the row `padding_idx` gets no gradient from here."""
    rows = index.embedding(weight, tokens)
    if padding_idx is None:
        return rows
    values = tokens.data if isinstance(tokens, Tensor) else np.asarray(tokens)
    padding = values == padding_row(padding_idx, weight.shape[0])
    return where(padding[..., None], rows.detach(), rows)


def padding_row(padding_idx: int, rows: int) -> int:
    if not -rows <= padding_idx < rows:
        raise InputError(f"embedding: padding_idx is {padding_idx}; there are {rows} rows.", "name one of them.")
    return padding_idx % rows


def layer_norm(
    x: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Tensor:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last axes, which have `normalized_shape`."""
    check_array("layer_norm", "x", x)
    sides = tuple(normalized_shape)
    if x.shape[-len(sides) :] != sides:
        raise ShapeError(
            f"layer_norm: x has shape {x.shape}; its last axes must be normalized_shape = {sides}.",
            "normalise over the sizes of x's last axes.",
        )
    axes = tuple(range(-len(sides), 0))
    centred = x - mean(x, axis=axes, keepdims=True)
    y = centred / sqrt(mean(square(centred), axis=axes, keepdims=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def dropout(
    x: Any,
    p: float = 0.5,
    training: bool = True,
    per: Literal["element", "sequence"] = "element",
    axis: int = 0,
    generator: Generator | None = None,
) -> Any:
    """Entries set to 0 with probability `p`, the others divided by 1 - p; see `nn.Dropout`."""
    check_probability("dropout", p)
    check_choice("dropout", "per", per, ("element", "sequence"))
    check_array("dropout", "x", x)
    if x.dtype.kind != "f":
        raise DTypeError(f"dropout: x is {x.dtype}; what is kept is divided by 1 - p.", "pass x.astype('float32').")
    if not training or p == 0:
        return x
    shape = list(x.shape)
    if per == "sequence":
        if not -x.ndim <= axis < x.ndim:
            raise ShapeError(f"dropout: time axis {axis} of x of shape {x.shape}.", "name one of its axes.")
        shape[axis] = 1
    keep = (generator or default_generator).bernoulli(shape, 1 - p)
    return x * Tensor.of(keep * x.dtype.type(1 / (1 - p) if p < 1 else 0))
