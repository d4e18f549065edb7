"""Values and gradients exactly at ties, zeros, poles and infinities: PyTorch's numbers, written down and live."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

import tinytape as tt

INF, NAN = math.inf, math.nan


@dataclass(frozen=True)
class Kink:
    """One function at one place; `torch` is None where ours differs from PyTorch on purpose."""

    name: str
    function: Callable[..., Any]
    torch: Callable[..., Any] | None
    args: tuple[Any, ...]
    value: Any
    gradients: tuple[Any, ...]  # of the sum of the results
    seconds: tuple[Any, ...] | None = None  # of the sum of the gradients

    def __str__(self) -> str:
        return self.name


def functional(name: str) -> Callable[..., Any]:
    return lambda t, x, **options: getattr(t.nn.functional, name)(x, **options)


def norm(ord: float) -> dict[str, Any]:
    return {
        "name": f"norm {ord}",
        "function": lambda x: tt.norm(x, ord=ord),
        "torch": lambda t, x: t.linalg.vector_norm(x, ord=ord),
    }


X = np.array
KINKS = [
    # corners
    Kink("abs", tt.abs, lambda t, x: t.abs(x), ([0.0, -0.0, -2.0],), [0, 0, 2], ([0, 0, -1],)),
    Kink("sign", tt.sign, lambda t, x: t.sign(x), ([0.0, -3.0],), [0, -1], ([0, 0],)),
    Kink("round", tt.round, lambda t, x: t.round(x), ([0.5, 1.5, 2.5],), [0, 2, 2], ([0, 0, 0],)),
    Kink("floor", tt.floor, lambda t, x: t.floor(x), ([1.0, -1.0],), [1, -1], ([0, 0],)),
    Kink("ceil", tt.ceil, lambda t, x: t.ceil(x), ([1.0, -1.0],), [1, -1], ([0, 0],)),
    Kink("relu", tt.relu, lambda t, x: t.relu(x), ([0.0, -0.0, NAN],), [0, 0, NAN], ([0, 0, 1],), ([0, 0, 0],)),
    Kink("leaky_relu", tt.leaky_relu, functional("leaky_relu"), ([0.0, 1.0, -1.0],), [0, 1, -0.01], ([0.01, 1, 0.01],)),
    Kink(
        "elu", lambda x: tt.elu(x, alpha=2.0), lambda t, x: t.nn.functional.elu(x, 2.0),
        ([0.0, -0.0, 1.0],), [0, 0, 1], ([2, 2, 1],), ([0, 0, 0],),
    ),
    Kink("gelu", tt.gelu, functional("gelu"), ([0.0],), [0], ([0.5],), ([math.sqrt(2 / math.pi)],)),
    Kink("silu", tt.silu, functional("silu"), ([0.0, -800.0, 800.0],), [0, 0, 800], ([0.5, 0, 1],), ([0.5, 0, 0],)),
    Kink("silu far out", tt.silu, functional("silu"), ([1e17, 1e300],), [1e17, 1e300], ([1, 1],), ([0, 0],)),
    Kink(
        "softplus", tt.softplus, functional("softplus"), ([0.0, 25.0, -800.0, 800.0],),
        [math.log(2), 25, 0, 800], ([0.5, 1, 0, 1],), ([0.25, 0, 0, 0],),
    ),
    Kink(
        "softplus with a low threshold", lambda x: tt.softplus(x, beta=2.0, threshold=0.5),
        lambda t, x: t.nn.functional.softplus(x, 2.0, 0.5), ([0.3, 1.0],), [0.3, 1], ([1, 1],), ([0, 0],),
    ),
    Kink(
        "sigmoid", tt.sigmoid, lambda t, x: t.sigmoid(x), ([0.0, -720.0, 720.0, -INF, INF],),
        [0.5, 0, 1, 0, 1], ([0.25, 0, 0, 0, 0],), ([0, 0, 0, 0, 0],),
    ),
    Kink(
        "clip", lambda x: tt.clip(x, -1, 1), lambda t, x: t.clamp(x, -1, 1),
        ([-1.0, 1.0, 0.0, 2.0, NAN],), [-1, 1, 0, 1, NAN], ([1, 1, 1, 0, 0],),
    ),
    Kink(
        "clip between tensors", tt.clip, lambda t, x, a, b: t.clamp(x, a, b),
        ([-1.0, 1.0, 0.0, 2.0, -2.0, 0.0], [-1.0, -1, -1, -1, -1, 2], [1.0, 1, 1, 1, 1, -2]),
        [-1, 1, 0, 1, -1, -2], ([1, 1, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0], [0, 0, 0, 1, 0, 1]),
    ),
    # ties
    Kink("maximum", tt.maximum, lambda t, a, b: t.maximum(a, b), ([1.0, 2.0], [1.0, 3.0]), [1, 3],
         ([0.5, 0], [0.5, 1])),
    Kink("minimum", tt.minimum, lambda t, a, b: t.minimum(a, b), ([1.0, 2.0], [1.0, 3.0]), [1, 2],
         ([0.5, 1], [0.5, 0])),
    Kink("max", tt.max, lambda t, x: t.amax(x), ([1.0, 1.0, 0.0],), 1, ([0.5, 0.5, 0],)),
    Kink("min", tt.min, lambda t, x: t.amin(x), ([1.0, 1.0, 3.0],), 1, ([0.5, 0.5, 0],)),
    Kink(
        "max along an axis", lambda x: tt.max(x, axis=1), lambda t, x: t.amax(x, dim=1),
        ([[3.0, 3.0, 3.0], [0.0, 4.0, 4.0]],), [3, 4], ([[1 / 3, 1 / 3, 1 / 3], [0, 0.5, 0.5]],),
    ),
    Kink(
        "max of NaN", tt.max, lambda t, x: t.amax(x), ([1.0, NAN],), NAN, ([NAN, NAN],),
    ),
    # poles
    Kink("sqrt", tt.sqrt, lambda t, x: t.sqrt(x), ([0.0],), [0], ([INF],), ([-INF],)),
    Kink("reciprocal", tt.reciprocal, lambda t, x: t.reciprocal(x), ([0.0],), [INF], ([-INF],), ([INF],)),
    Kink("log", tt.log, lambda t, x: t.log(x), ([0.0, -1.0],), [-INF, NAN], ([INF, -1],), ([-INF, -1],)),
    Kink("log1p", tt.log1p, lambda t, x: t.log1p(x), ([-1.0, 1e-300],), [-INF, 1e-300], ([INF, 1],)),
    Kink("expm1", tt.expm1, lambda t, x: t.expm1(x), ([-800.0, 800.0, 1e-300],), [-1, INF, 1e-300], ([0, INF, 1],)),
    Kink("divide", tt.divide, lambda t, a, b: a / b, ([0.0, 1.0], [0.0, 0.0]), [NAN, INF], ([INF, INF], [NAN, -INF])),
    Kink("arcsin", tt.arcsin, lambda t, x: t.asin(x), ([1.0, 2.0],), [math.pi / 2, NAN], ([INF, NAN],)),
    Kink("arccos", tt.arccos, lambda t, x: t.acos(x), ([-1.0, 2.0],), [math.pi, NAN], ([-INF, NAN],)),
    Kink("arccosh", tt.arccosh, lambda t, x: t.acosh(x), ([1.0, 0.5],), [0, NAN], ([INF, NAN],)),
    Kink("arctanh", tt.arctanh, lambda t, x: t.atanh(x), ([1.0, -1.0],), [INF, -INF], ([INF, INF],)),
    Kink("arctan2", tt.arctan2, lambda t, a, b: t.atan2(a, b), ([0.0], [0.0]), [0], ([0], [0])),
    Kink("hypot", tt.hypot, None, ([0.0, 3.0], [0.0, 4.0]), [0, 5], ([0, 0.6], [0, 0.8]), None),
    # powers
    Kink("x ** 0", lambda x: x**0, lambda t, x: x**0, ([0.0, 2.0],), [1, 1], ([0, 0],)),
    Kink("x ** 1", lambda x: x**1, lambda t, x: x**1, ([0.0, -2.0],), [0, -2], ([1, 1],), ([0, 0],)),
    Kink("x ** 2", lambda x: x**2, lambda t, x: x**2, ([0.0, -2.0],), [0, 4], ([0, -4],), ([2, 2],)),
    Kink("x ** 3", lambda x: x**3, lambda t, x: x**3, ([0.0, -2.0],), [0, -8], ([0, 12],), ([0, -12],)),
    Kink("x ** 0.5", lambda x: x**0.5, lambda t, x: x**0.5, ([0.0],), [0], ([INF],), ([-INF],)),
    Kink("x ** -1", lambda x: x**-1, lambda t, x: x**-1, ([0.0],), [INF], ([-INF],), ([INF],)),
    Kink("0 ** x", lambda x: 0.0**x, lambda t, x: 0.0**x, ([0.0, 1.0, -1.0],), [1, 0, INF], ([0, 0, -INF],)),
    Kink(
        "power", tt.power, lambda t, a, b: t.pow(a, b),
        ([0.0, 0.0, 0.0, 0.0, 2.0, -2.0, 0.0, -2.0], [0.0, 1.0, 2.0, 3.0, 0.0, 2.0, -1.0, 0.5]),
        [1, 0, 0, 0, 1, 4, INF, NAN],
        ([0, 1, 0, 0, 0, -4, -INF, NAN], [0, 0, 0, 0, math.log(2), NAN, -INF, NAN]),
    ),
    # infinities
    Kink("logaddexp", tt.logaddexp, lambda t, a, b: t.logaddexp(a, b), ([0.0, -INF], [0.0, 1.0]), [math.log(2), 1],
         ([0.5, 0], [0.5, 1])),
    Kink("logaddexp of equal infinities", tt.logaddexp, None, ([-INF, INF], [-INF, INF]), [-INF, INF],
         ([0.5, 0.5], [0.5, 0.5]), ([0, 0], [0, 0])),
    Kink("logsumexp", tt.logsumexp, lambda t, x: t.logsumexp(x, 0), ([-INF, 1.0],), 1, ([0, 1],), ([0, 0],)),
    Kink("logsumexp of nothing but -inf", tt.logsumexp, None, ([-INF, -INF],), -INF, ([0, 0],), ([0, 0],)),
    Kink("logsumexp with inf", tt.logsumexp, None, ([INF, 1.0],), INF, ([1, 0],)),
    Kink("logsumexp of large", tt.logsumexp, lambda t, x: t.logsumexp(x, 0), ([1000.0, 1000.0],), 1000 + math.log(2),
         ([0.5, 0.5],), ([0, 0],)),
    # zeros
    Kink("prod with a zero", tt.prod, lambda t, x: t.prod(x), ([0.0, 2.0, 3.0],), 0, ([6, 0, 0],), ([5, 3, 2],)),
    Kink("prod with two", tt.prod, lambda t, x: t.prod(x), ([0.0, 0.0, 3.0],), 0, ([0, 0, 0],), ([3, 3, 0],)),
    Kink("cumprod with a zero", tt.cumprod, lambda t, x: t.cumprod(x, 0), ([0.0, 2.0, 3.0],), [0, 0, 0],
         ([9, 0, 0],), ([6, 4, 2],)),
    Kink("cumprod with two", tt.cumprod, lambda t, x: t.cumprod(x, 0), ([2.0, 0.0, 3.0, 0.0],), [2, 0, 0, 0],
         ([1, 8, 0, 0],), ([4, 12, 2, 6],)),
    *(Kink(**norm(p), args=([0.0, 0.0],), value=0, gradients=([0, 0],)) for p in (0.5, 1, 1.5, 2, 3, INF, -INF, -1)),
    Kink(**norm(0.5), args=([1.0, -1.0, 0.0],), value=4, gradients=([2, -2, 0],)),
    Kink(  # in PyTorch the second derivative at the zero is NaN
        "norm 1.5 beside a zero", lambda x: tt.norm(x, ord=1.5), None,
        ([1.0, -1.0, 0.0],), 2 ** (2 / 3), ([2 ** (-1 / 3), -(2 ** (-1 / 3)), 0],),
        ([2 ** (-4 / 3), 2 ** (-4 / 3), 0],),
    ),
    Kink(**norm(1), args=([1.0, -1.0, 0.0],), value=2, gradients=([1, -1, 0],)),
    Kink(**norm(2), args=([1.0, -1.0, 0.0],), value=2**0.5, gradients=([0.5**0.5, -(0.5**0.5), 0],),
         seconds=([0.5**0.5, 0.5**0.5, 0.5**0.5],)),
    Kink(**norm(3), args=([1.0, -1.0, 0.0],), value=2 ** (1 / 3), gradients=([2 ** (-2 / 3), -(2 ** (-2 / 3)), 0],)),
    Kink(**norm(INF), args=([1.0, -1.0, 0.0],), value=1, gradients=([0.5, -0.5, 0],)),
    Kink(**norm(-INF), args=([1.0, -1.0, 0.0],), value=0, gradients=([0, 0, 0],)),
    Kink(**norm(-1), args=([1.0, -1.0, 0.0],), value=0, gradients=([0, 0, 0],)),
    Kink("norm 2 of zeros twice", tt.norm, None, ([0.0, 0.0],), 0, ([0, 0],), ([0, 0],)),
    Kink("std of equal values", tt.std, lambda t, x: t.std(x, correction=0), ([1.0, 1.0],), 0, ([0, 0],), ([0, 0],)),
    Kink("std of one", tt.std, lambda t, x: t.std(x, correction=0), ([1.0],), 0, ([0],), ([0],)),
    Kink("var of one", tt.var, lambda t, x: t.var(x, correction=0), ([1.0],), 0, ([0],)),
    Kink("var of one, ddof 1", lambda x: tt.var(x, ddof=1), lambda t, x: t.var(x, correction=1), ([1.0],), NAN,
         ([NAN],)),
    Kink("std of one, ddof 1", lambda x: tt.std(x, ddof=1), lambda t, x: t.std(x, correction=1), ([1.0],), NAN,
         ([NAN],)),
]  # fmt: skip

every = pytest.mark.parametrize("kink", KINKS, ids=str)


def derivatives(kink: Kink) -> tuple[Any, list[Any], list[Any]]:
    xs = [tt.tensor(x, requires_grad=True, dtype="float64") for x in kink.args]
    value = kink.function(*xs)
    firsts = tt.grad(lambda *xs: tt.sum(kink.function(*xs)), argnums=tuple(range(len(xs))))
    second = tt.grad(lambda *xs: sum(tt.sum(g) for g in firsts(*xs)), argnums=tuple(range(len(xs))))
    arrays = [x.numpy() for x in xs]
    return value.numpy(), list(firsts(*arrays)), list(second(*arrays)) if kink.seconds is not None else []


@every
def test_values_and_gradients(kink: Kink) -> None:
    value, gradients, seconds = derivatives(kink)
    np.testing.assert_allclose(value, kink.value, rtol=1e-12, atol=1e-12)
    for found, expected in zip(gradients, kink.gradients, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    for found, expected in zip(seconds, kink.seconds or (), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.peer
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")
@pytest.mark.parametrize("kink", [kink for kink in KINKS if kink.torch is not None], ids=str)
def test_the_numbers_are_torchs(kink: Kink) -> None:
    import torch

    assert kink.torch is not None
    xs = [torch.tensor(x, dtype=torch.float64, requires_grad=True) for x in kink.args]
    value = kink.torch(torch, *xs)
    np.testing.assert_allclose(kink.value, value.detach().numpy(), rtol=1e-7, atol=1e-7)
    gradients = torch.autograd.grad(value.sum(), xs, create_graph=True)
    for expected, found in zip(kink.gradients, gradients, strict=True):
        np.testing.assert_allclose(expected, found.detach().resolve_neg().numpy(), rtol=1e-7, atol=1e-7)
    total = sum(g.sum() for g in gradients)
    if kink.seconds is not None and total.requires_grad:
        for expected, found in zip(kink.seconds, torch.autograd.grad(total, xs), strict=True):
            np.testing.assert_allclose(expected, found.numpy(), rtol=1e-7, atol=1e-7)


@every
def test_forward_mode_gives_the_same(kink: Kink) -> None:
    _, gradients, _ = derivatives(kink)
    primals = [np.array(x, dtype=np.float64) for x in kink.args]
    for i, gradient in enumerate(gradients):
        for place in np.ndindex(primals[i].shape):
            tangents = [np.zeros_like(x) for x in primals]
            tangents[i][place] = 1.0
            _, tangent = tt.jvp(lambda *xs: tt.sum(kink.function(*xs)), tuple(primals), tuple(tangents))
            if np.isfinite(gradient).all():  # else zero times infinity, elsewhere
                np.testing.assert_allclose(tangent, gradient[place], rtol=1e-12, atol=1e-12)


def test_no_gradient_passes_to_what_where_did_not_choose() -> None:
    x = tt.tensor([0.0, 4.0], requires_grad=True)
    y = tt.where(x > 1, tt.sqrt(tt.where(x > 1, x, 1.0)), tt.tensor([NAN, NAN]))
    tt.sum(tt.where(x > 1, y, 0.0)).backward()
    np.testing.assert_array_equal(x.grad.numpy(), [0.0, 0.25])


def test_where_passes_on_nothing_of_a_nan_gradient() -> None:
    x = tt.tensor([1.0, 2.0], requires_grad=True)
    tt.where(np.array([True, False]), x, 0.0).backward(np.array([1.0, NAN]))
    np.testing.assert_array_equal(x.grad.numpy(), [1.0, 0.0])


@pytest.mark.parametrize(("dtype", "relative"), [("float64", 4e-16), ("float32", 3e-7)])
def test_erf(dtype: str, relative: float) -> None:
    x = np.concatenate([np.linspace(-6.5, 6.5, 2001), [0.0, 1e-300, -1e-30, 1.0, -1.0, 30.0]]).astype(dtype)
    expected = np.array([math.erf(v) for v in x.astype(np.float64)])
    found = tt.erf(tt.tensor(x)).numpy()
    assert found.dtype == dtype
    np.testing.assert_allclose(found, expected.astype(dtype), rtol=relative, atol=0)
    np.testing.assert_array_equal(tt.erf(tt.tensor([INF, -INF, NAN])).numpy(), [1, -1, NAN])


def test_gelu_keeps_its_tail() -> None:
    """The usual ``0.5 * (1 + erf(x / sqrt(2)))`` has lost every digit of these."""
    x = np.array([-8.0, -20.0, -37.0])
    expected = [x * math.erfc(-x / math.sqrt(2)) / 2 for x in x]
    np.testing.assert_allclose(tt.gelu(tt.tensor(x)).numpy(), expected, rtol=1e-12)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64"])
def test_sigmoid_is_exact_in_its_tails(dtype: str) -> None:
    info = np.finfo(dtype)
    x = np.linspace(math.log(float(info.tiny)) + 1, 0, 500).astype(dtype)
    wide = x.astype(np.longdouble)
    expected = (np.exp(wide) / (1 + np.exp(wide))).astype(np.float64)
    np.testing.assert_allclose(tt.sigmoid(tt.tensor(x)).numpy(), expected, rtol=4 * float(info.eps))
    np.testing.assert_array_equal(tt.sigmoid(tt.tensor(np.array([60, 1000, INF, -INF], dtype))).numpy(), [1, 1, 1, 0])
    assert np.isnan(tt.sigmoid(tt.tensor(NAN)).item())
