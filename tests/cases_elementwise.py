"""Rows for the ops of `tinytape/ops/elementwise.py`; kinks, ties and poles are in `test_kinks.py`."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from hypothesis import strategies as st

import tinytape as tt
from cases import Case, binary, unary, values

every, positive = values(), values(0.2, 3.0)
off_zero = values(avoid=(0.0,))
inside, above_one = values(-0.9, 0.9), values(1.1, 4.0)


def optional(inputs: st.SearchStrategy[Any], **options: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """The same arrays with options drawn."""
    return st.tuples(inputs, st.fixed_dictionaries(options)).map(lambda drawn: (drawn[0][0], drawn[1]))


def distinct(offset: float) -> Any:
    """A maker of values a quarter around whole numbers plus `offset`: two makers half apart never meet."""

    def make(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
        def build(seed: int) -> np.ndarray:
            rng = np.random.default_rng(seed)
            return np.asarray(rng.integers(-2, 3, shape) + offset + rng.uniform(-0.2, 0.2, shape))

        return st.integers(0, 2**31).map(build)

    return make


def whole(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Whole numbers with ties among them."""
    return st.integers(0, 2**31).map(lambda seed: np.asarray(np.random.default_rng(seed).integers(-2, 3, shape), float))


def truths(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    return st.integers(0, 2**31).map(lambda seed: np.asarray(np.random.default_rng(seed).random(shape) < 0.5))


def strange(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
    """Numbers with infinities and NaN among them."""
    few = np.array([0.0, 1.5, -2.0, np.inf, -np.inf, np.nan])
    return st.integers(0, 2**31).map(lambda seed: np.asarray(np.random.default_rng(seed).choice(few, shape)))


def one(name: str, maker: Any, torch: str | None = "", **more: Any) -> Case:
    """A function of one number, of the same name in torch unless another is given."""
    called = None if torch is None else lambda t, x: getattr(t, torch or name)(x)
    return Case(name, unary(maker), torch=called, **more)


def two(name: str, first: Any, second: Any, torch: str | None = "", **more: Any) -> Case:
    called = None if torch is None else lambda t, a, b: getattr(t, torch or name)(a, b)
    return Case(name, binary(first, second), torch=called, **more)


def compared(name: str, torch: str, maker: Any = whole) -> Case:
    return two(name, maker, maker, torch, differentiable=False)


def logistic(x: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-x))


def error_function(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf, otypes=[float])(x)


def softplus_reference(x: np.ndarray, beta: float, threshold: float) -> np.ndarray:
    return np.where(x * beta > threshold, x, np.logaddexp(0.0, x * beta) / beta)


def gelu_reference(x: np.ndarray, approximate: str = "none") -> np.ndarray:
    if approximate == "tanh":
        return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    return 0.5 * x * (1 + error_function(x / math.sqrt(2)))


clipped = optional(unary(values(avoid=(-0.7, 0.5))), a_min=st.just(-0.7), a_max=st.just(0.5))
from_below = optional(unary(values(avoid=(-0.7,))), a_min=st.just(-0.7))
from_above = optional(unary(values(avoid=(0.5,))), a_max=st.just(0.5))
slopes, alphas = st.sampled_from([0.01, 0.3, -0.2]), st.sampled_from([1.0, 0.3, 2.0])


def torch_clip(t: Any, x: Any, a_min: Any = None, a_max: Any = None) -> Any:
    return t.clamp(x, min=a_min, max=a_max)


def torch_clip_between(t: Any, x: Any, a_min: Any, a_max: Any) -> Any:
    return t.clamp(*t.broadcast_tensors(x, a_min, a_max))  # its gradient fails where x itself is broadcast


def torch_cast(t: Any, x: Any, dtype: str) -> Any:
    return x.to(getattr(t, dtype))


def between(maker: Any) -> st.SearchStrategy[Any]:
    """A tensor and its two bounds, which broadcast; the bounds may be the wrong way round."""
    pairs = binary(maker, distinct(0.33))
    return st.tuples(pairs, st.floats(-2, 2)).map(
        lambda drawn: ((*drawn[0][0], np.asarray(round(drawn[1]) + 0.67)), {})
    )


CASES = [
    two("add", every, every),
    two("subtract", every, every),
    two("multiply", every, every),
    two("divide", every, off_zero),
    two("floor_divide", distinct(0.5), values(1.0, 1.0), None),
    two("remainder", distinct(0.5), whole, None, call=lambda a, b: tt.remainder(a, b * b + 1.0)),
    Case(
        "remainder",
        binary(distinct(0.5), values(1.0, 1.0)),
        torch=lambda t, a, b: t.remainder(a, b),
    ),
    # powers: of tensors by tensors, by numbers, of numbers
    two("power", positive, every, "pow"),
    Case(
        "power",
        optional(unary(positive), b=st.sampled_from([-2, -1, 0, 1, 2, 3, 0.5, 2.5])),
        call=lambda x, b: tt.power(x, b),
        numpy=lambda x, b: x ** float(b),
        torch=lambda t, x, b: x**b,
    ),
    Case(
        "power",
        optional(unary(off_zero), b=st.sampled_from([-2, 0, 1, 2, 3])),
        call=lambda x, b: tt.power(x, b),
        numpy=lambda x, b: x ** float(b),
        torch=lambda t, x, b: x**b,
    ),
    Case(
        "power",
        optional(unary(), a=st.sampled_from([0.5, 1, 3.0])),
        call=lambda x, a: tt.power(a, x),
        torch=lambda t, x, a: a**x,
    ),
    one("negative", every),
    one("abs", off_zero, order=1),
    one("abs", off_zero, None),
    one("sign", off_zero),
    one("floor", distinct(0.5)),
    one("ceil", distinct(0.5)),
    one("round", distinct(0.0)),
    Case(
        "round",
        optional(unary(values(-1.0, 1.0)), decimals=st.just(20)),
        numpy=lambda x, decimals: x.copy(),
        order=1,
        differentiable=False,
    ),
    one("exp", every),
    one("exp2", every),
    one("expm1", every),
    one("log", positive),
    one("log2", positive),
    one("log10", positive),
    one("log1p", values(-0.8, 3.0)),
    one("sqrt", positive),
    one("square", every),
    one("reciprocal", off_zero),
    one("sin", every),
    one("cos", every),
    one("tan", values(-1.2, 1.2)),
    one("arcsin", inside),
    one("arccos", inside),
    one("arctan", every),
    one("sinh", every),
    one("cosh", every),
    one("tanh", every),
    one("arcsinh", every),
    one("arccosh", above_one),
    one("arctanh", inside),
    two("arctan2", values(0.5, 3.0), every),  # near (0, 0) it bends sharply
    two("arctan2", every, values(0.5, 3.0)),
    two("hypot", off_zero, off_zero),
    two("logaddexp", every, every),
    two("logaddexp", values(-400.0, -100.0), values(100.0, 400.0), order=1),  # torch has NaN for the second derivative
    two("maximum", distinct(0.0), distinct(0.5)),
    two("minimum", distinct(0.0), distinct(0.5)),
    # bounds
    Case("clip", clipped, torch=torch_clip),
    Case("clip", from_below, torch=torch_clip),
    Case("clip", from_above, torch=torch_clip),
    Case("clip", between(distinct(0.0)), torch=torch_clip_between),
    # a condition from a comparison, from a tensor of bools, from a broadcast array
    Case(
        "where",
        binary(distinct(0.0), distinct(0.5)),
        call=lambda a, b: tt.where(a > b, a * b, a),
        numpy=lambda a, b: np.where(a > b, a * b, np.broadcast_to(a, np.broadcast(a, b).shape)),
        torch=lambda t, a, b: t.where(a > b, a * b, a),
    ),
    Case(
        "where",
        st.tuples(binary(), truths((4, 1, 1, 1))).map(lambda drawn: (drawn[0][0], {"c": drawn[1]})),
        call=lambda a, b, c: tt.where(tt.tensor(c), a, b) if isinstance(a, tt.Tensor) else np.where(c, a, b),
        torch=lambda t, a, b, c: t.where(t.from_numpy(c.copy()), a, b),
    ),
    Case(
        "where",
        optional(unary(), c=truths(()), b=st.sampled_from([0, 1.5])),
        call=lambda x, c, b: tt.where(c, x, b),
        torch=lambda t, x, c, b: t.where(t.tensor(bool(c)), x, b),
    ),
    # activations
    one("sigmoid", values(-6.0, 6.0), numpy=logistic),
    one("relu", off_zero, numpy=lambda x: np.maximum(x, 0)),
    Case(
        "leaky_relu",
        optional(unary(off_zero), negative_slope=slopes),
        numpy=lambda x, negative_slope: np.where(x > 0, x, negative_slope * x),
        torch=lambda t, x, negative_slope: t.nn.functional.leaky_relu(x, negative_slope),
    ),
    Case(
        "elu",
        optional(unary(off_zero), alpha=alphas),
        numpy=lambda x, alpha: np.where(x > 0, x, alpha * (np.exp(x) - 1)),
        torch=lambda t, x, alpha: t.nn.functional.elu(x, alpha),
    ),
    Case("gelu", unary(values(-6.0, 6.0)), numpy=gelu_reference, torch=lambda t, x: t.nn.functional.gelu(x)),
    Case(
        "gelu",
        optional(unary(values(-6.0, 6.0)), approximate=st.sampled_from(["none", "tanh"])),
        numpy=gelu_reference,
        torch=lambda t, x, approximate: t.nn.functional.gelu(x, approximate=approximate),
    ),
    one("silu", values(-6.0, 6.0), None, numpy=lambda x: x * logistic(x)),
    Case("silu", unary(values(-6.0, 6.0)), torch=lambda t, x: t.nn.functional.silu(x)),
    Case(
        "softplus",
        optional(unary(values(avoid=(1.0,))), beta=st.sampled_from([1.0, 3.0]), threshold=st.just(20.0)),
        numpy=softplus_reference,
        torch=lambda t, x, beta, threshold: t.nn.functional.softplus(x, beta, threshold),
    ),
    Case(
        "softplus",
        optional(unary(values(-400.0, 400.0, avoid=(10.0,))), beta=st.just(2.0), threshold=st.just(20.0)),
        numpy=softplus_reference,
        torch=lambda t, x, beta, threshold: t.nn.functional.softplus(x, beta, threshold),
    ),
    one("erf", values(-4.0, 4.0), "erf", numpy=error_function),
    # constants
    compared("equal", "eq"),
    compared("not_equal", "ne"),
    compared("less", "lt"),
    compared("less_equal", "le"),
    compared("greater", "gt"),
    compared("greater_equal", "ge"),
    compared("logical_and", "logical_and", truths),
    compared("logical_or", "logical_or", truths),
    compared("logical_xor", "logical_xor", truths),
    one("logical_not", truths, differentiable=False),
    one("isnan", strange, differentiable=False),
    one("isfinite", strange, differentiable=False),
    one("isinf", strange, differentiable=False),
    Case("astype", unary(), call=lambda x: tt.astype(x, x.dtype), torch=lambda t, x: x.to(x.dtype)),
    Case("astype", optional(unary(), dtype=st.sampled_from(["int32", "bool"])), torch=torch_cast, differentiable=False),
]
