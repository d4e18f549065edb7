"""Rows for the ops of `tinytape/ops/reduce.py`; ties, zeros and infinities are in `test_kinks.py`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

from cases import Case, shapes, values

every, apart = values(), values(apart=0.2)
off_zero, positive = values(avoid=(0.0,)), values(0.2, 3.0)


@st.composite
def reduced(draw: Any, maker: Any, min_side: int = 0, several: bool = True, min_axes: int = 0, **more: Any) -> Any:
    """An array with an axis, several of them or None, and keepdims; `more` are further options."""
    shape = draw(shapes(min_dims=min_axes, min_side=min_side))
    ndim = len(shape)
    axis: Any = None
    if ndim:
        one = st.integers(-ndim, ndim - 1)
        many = st.lists(st.integers(0, ndim - 1), unique=True, min_size=min_axes).map(
            lambda axes: tuple(a - ndim if a % 2 else a for a in axes)
        )
        axis = draw(st.one_of(st.none(), one, many) if several else st.one_of(st.none(), one))
    options = {name: draw(strategy) for name, strategy in more.items()}
    return (draw(maker(shape)),), {"axis": axis, "keepdims": draw(st.booleans()), **options}


@st.composite
def along(draw: Any, maker: Any) -> Any:
    shape = draw(shapes(min_dims=1))
    axis = draw(st.one_of(st.none(), st.integers(-len(shape), len(shape) - 1)))
    return (draw(maker(shape)),), {"axis": axis}


def zeroed(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Values of which a third are exactly zero."""

    def build(seed: int) -> np.ndarray:
        rng = np.random.default_rng(seed)
        return np.asarray(rng.uniform(-2, 2, shape) * (rng.random(shape) < 0.67))

    return st.integers(0, 2**31).map(build)


def dims(x: Any, axis: Any) -> tuple[int, ...]:
    """The axes as torch's reductions want them."""
    if axis is None:
        return tuple(range(x.ndim))
    return axis if isinstance(axis, tuple) else (axis,)


def by_dims(function: str) -> Any:
    """Torch's function with ``dim=`` over those axes; over none of them it would take all."""

    def call(t: Any, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
        if not dims(x, axis):
            return getattr(t, function)(x.unsqueeze(0), dim=0)
        return getattr(t, function)(x, dim=dims(x, axis), keepdim=keepdims)

    return call


def torch_prod(t: Any, x: Any, axis: Any = None, keepdims: bool = False) -> Any:
    for a in sorted((a % x.ndim for a in dims(x, axis)), reverse=True):
        x = x.prod(dim=a, keepdim=keepdims)
    return x


def torch_var(t: Any, x: Any, axis: Any, keepdims: bool, ddof: int) -> Any:
    if not dims(x, axis):
        return t.var(x.unsqueeze(0), dim=0, correction=ddof)
    return t.var(x, dim=dims(x, axis), keepdim=keepdims, correction=ddof)


def torch_std(t: Any, x: Any, axis: Any, keepdims: bool, ddof: int) -> Any:
    if not dims(x, axis):
        return t.std(x.unsqueeze(0), dim=0, correction=ddof)
    return t.std(x, dim=dims(x, axis), keepdim=keepdims, correction=ddof)


def torch_norm(t: Any, x: Any, ord: Any, axis: Any, keepdims: bool) -> Any:
    if not dims(x, axis):
        return t.linalg.vector_norm(x.unsqueeze(0), ord=2 if ord == "fro" else ord, dim=0)
    return t.linalg.vector_norm(x, ord=2 if ord == "fro" else ord, dim=dims(x, axis), keepdim=keepdims)


def norm_reference(x: np.ndarray, ord: Any, axis: Any, keepdims: bool) -> np.ndarray:
    size = np.abs(x)
    if math.isinf(2 if ord == "fro" else ord):
        return (np.max if ord > 0 else np.min)(size, axis=axis, keepdims=keepdims)
    if ord == 0:
        return np.sum(x != 0, axis=axis, keepdims=keepdims).astype(float)
    p = 2.0 if ord == "fro" else float(ord)
    return np.sum(size**p, axis=axis, keepdims=keepdims) ** (1 / p)


def logsumexp_reference(x: np.ndarray, axis: Any, keepdims: bool) -> np.ndarray:
    return (
        np.logaddexp.reduce(x, axis=axis, keepdims=keepdims)
        if not isinstance(axis, tuple)
        else np.log(np.sum(np.exp(x), axis=axis, keepdims=keepdims))
    )


def cumulative(function: str) -> Any:
    def call(t: Any, x: Any, axis: Any) -> Any:
        return getattr(t, function)(x.reshape(-1) if axis is None else x, dim=0 if axis is None else axis)

    return call


def torch_index(function: str) -> Any:
    def call(t: Any, x: Any, axis: Any, keepdims: bool) -> Any:
        return getattr(t, function)(x, dim=axis, keepdim=keepdims)

    return call


ddof = st.sampled_from([0, 1])

CASES = [
    Case("sum", reduced(every), numpy=np.sum, torch=by_dims("sum")),
    Case("mean", reduced(every, min_side=1), numpy=np.mean, torch=by_dims("mean")),
    Case("prod", reduced(every), numpy=np.prod, torch=torch_prod),
    Case("prod", reduced(zeroed), numpy=np.prod, torch=torch_prod),
    Case("max", reduced(apart, min_side=1), numpy=np.max, torch=by_dims("amax")),
    Case("min", reduced(apart, min_side=1), numpy=np.min, torch=by_dims("amin")),
    Case("var", reduced(every, min_side=2, min_axes=1, ddof=ddof), numpy=np.var, torch=torch_var),
    Case("std", reduced(apart, min_side=2, min_axes=1, ddof=ddof), numpy=np.std, torch=torch_std),
    Case("logsumexp", reduced(every, min_side=1), numpy=logsumexp_reference, torch=by_dims("logsumexp")),
    Case(
        "logsumexp", reduced(values(-400.0, 400.0, apart=30.0), min_side=1, several=False), numpy=logsumexp_reference,
        torch=by_dims("logsumexp"), order=1,
    ),
    Case(
        "norm", reduced(off_zero, min_side=1, ord=st.sampled_from([2, "fro", 3, 1.5, 0.5, -1, 4.0])),
        numpy=norm_reference, torch=torch_norm,
    ),
    Case(
        "norm", reduced(values(0.3, 2.0, apart=0.2), min_side=1, ord=st.sampled_from([1, math.inf, -math.inf, 0])),
        numpy=norm_reference,
    ),
    Case(
        "norm", reduced(values(0.3, 2.0, apart=0.2), min_side=1, ord=st.sampled_from([1, math.inf, -math.inf])),
        numpy=norm_reference, torch=torch_norm, order=1,
    ),
    Case("cumsum", along(every), numpy=np.cumsum, torch=cumulative("cumsum")),
    Case("cumprod", along(every), numpy=np.cumprod, torch=cumulative("cumprod")),
    Case("cumprod", along(zeroed), numpy=np.cumprod, torch=cumulative("cumprod")),
    Case(
        "argmax", reduced(apart, min_side=1, several=False), numpy=np.argmax, torch=torch_index("argmax"),
        differentiable=False,
    ),
    Case(
        "argmin", reduced(apart, min_side=1, several=False), numpy=np.argmin, torch=torch_index("argmin"),
        differentiable=False,
    ),
    Case("any", reduced(zeroed), numpy=np.any, torch=by_dims("any"), differentiable=False),
    Case("all", reduced(zeroed), numpy=np.all, torch=by_dims("all"), differentiable=False),
]  # fmt: skip
