"""Layers without time: Linear, Embedding, LayerNorm, and nonlinearities as modules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.errors import ShapeError
from ..engine.tensor import Tensor, default_dtype
from ..ops.activation import gelu, relu, sigmoid, silu
from ..ops.elementwise import tanh
from ..random import Generator, default_generator
from . import functional as F
from .checks import check_dtype, check_features, check_sizes
from .module import Module, Parameter

__all__ = ["GELU", "Embedding", "Identity", "LayerNorm", "Linear", "ReLU", "SiLU", "Sigmoid", "Tanh"]


class Linear(Module):
    """``x @ weight.T + bias``.

    Parameters
    ----------
    in_features, out_features : int
    bias : bool
        Default True.
    generator : Generator, optional
        What the weights are drawn with; default `tt.default_generator`.
    dtype : dtype, optional
        Default: the default dtype.

    Attributes
    ----------
    weight : Parameter, shape (out_features, in_features)
    bias : Parameter, shape (out_features,), or None
        Both are drawn from U(-1/√in_features, 1/√in_features).

    Notes
    -----
    x has shape (..., in_features) and the parameters' dtype; the result (..., out_features). Otherwise a
    ShapeError or DTypeError.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        check_sizes("Linear", 0, in_features=in_features, out_features=out_features)
        draw = (generator or default_generator).uniform
        bound = 1 / math.sqrt(max(1, in_features))
        self.in_features, self.out_features = in_features, out_features
        self.weight = Parameter(draw((out_features, in_features), -bound, bound, dtype))
        self.bias = Parameter(draw(out_features, -bound, bound, dtype)) if bias else None

    def forward(self, x: Any) -> Tensor:
        check_features("Linear", x, self.in_features, "in_features", self.weight.dtype)
        return F.linear(x, self.weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}{'' if self.bias is not None else ', bias=False'}"


class Embedding(Module):
    """A learned vector for each of `num_embeddings` tokens.

    Parameters
    ----------
    num_embeddings, embedding_dim : int
    padding_idx : int, optional
        A token whose vector starts at 0 and gets no gradient. Negative numbers count from the end.
    generator : Generator, optional
    dtype : dtype, optional

    Attributes
    ----------
    weight : Parameter, shape (num_embeddings, embedding_dim)
        Drawn from N(0, 1).

    Notes
    -----
    Tokens are integers of any shape from 0 to num_embeddings - 1, otherwise a DTypeError or InputError; the result
    has one more axis, of embedding_dim.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        check_sizes("Embedding", 1, num_embeddings=num_embeddings, embedding_dim=embedding_dim)
        values = (generator or default_generator).normal((num_embeddings, embedding_dim), dtype=dtype)
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx = padding_idx
        if padding_idx is not None:
            self.padding_idx = F.padding_row(padding_idx, num_embeddings)
            values[self.padding_idx] = 0
        self.weight = Parameter(values)

    def forward(self, tokens: Any) -> Tensor:
        return F.embedding(tokens, self.weight, self.padding_idx)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


class LayerNorm(Module):
    """Mean 0 and variance 1 over the last axes of every example, then a learned scale and shift (Ba et al. 2016).

    Parameters
    ----------
    normalized_shape : int or sequence of int
        The sizes of the axes to normalise over, which are the last ones.
    eps : float
        Added to the variance. Default 1e-5.
    elementwise_affine : bool
        Whether there is a scale and, with `bias`, a shift. Default True.
    bias : bool
        Default True.
    dtype : dtype, optional

    Attributes
    ----------
    weight, bias : Parameter of shape `normalized_shape`, or None
        1 and 0 at the start.
    """

    def __init__(
        self,
        normalized_shape: int | Sequence[int],
        eps: float = 1e-5,
        elementwise_affine: bool = True,
        bias: bool = True,
        *,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        sides = (normalized_shape,) if isinstance(normalized_shape, int | np.integer) else tuple(normalized_shape)
        if not sides:
            raise ShapeError("LayerNorm: normalized_shape is ().", "name the size of at least one axis.")
        check_sizes("LayerNorm", **{f"normalized_shape[{i}]": side for i, side in enumerate(sides)})
        kind = default_dtype() if dtype is None else dtype
        self.normalized_shape, self.eps = sides, eps
        self.weight = Parameter(np.ones(sides, kind)) if elementwise_affine else None
        self.bias = Parameter(np.zeros(sides, kind)) if elementwise_affine and bias else None

    def forward(self, x: Any) -> Tensor:
        if self.weight is not None:
            check_dtype("LayerNorm", "x", x, self.weight.dtype)
        return F.layer_norm(x, self.normalized_shape, self.weight, self.bias, self.eps)

    def extra_repr(self) -> str:
        return ", ".join(map(str, self.normalized_shape))


class Identity(Module):
    """What comes in."""

    def forward(self, x: Any) -> Any:
        return x


class Tanh(Module):
    """`tt.tanh` as a module, for `Sequential`."""

    def forward(self, x: Any) -> Any:
        return tanh(x)


class Sigmoid(Module):
    """`tt.sigmoid` as a module."""

    def forward(self, x: Any) -> Any:
        return sigmoid(x)


class ReLU(Module):
    """`tt.relu` as a module."""

    def forward(self, x: Any) -> Any:
        return relu(x)


class GELU(Module):
    """`tt.gelu` as a module."""

    def forward(self, x: Any) -> Any:
        return gelu(x)


class SiLU(Module):
    """`tt.silu` as a module."""

    def forward(self, x: Any) -> Any:
        return silu(x)
