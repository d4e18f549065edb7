"""Dtype rules, operators, and what elementwise ops and reductions refuse."""

from __future__ import annotations

import operator

import numpy as np
import pytest

import tinytape as tt

F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)


@pytest.fixture
def x():
    return tt.tensor([1.0, 2.0], requires_grad=True)


# ---- which dtype a result has ---------------------------------------------------------------------------------------

WEAK = [2, 2.5, True, np.float64(2.5), np.int64(2), np.float32(2.5), np.array(2.5)]


@pytest.mark.parametrize("number", WEAK, ids=repr)
@pytest.mark.parametrize("dtype", [F16, F32, F64])
@pytest.mark.parametrize(
    "function",
    [operator.add, operator.sub, operator.mul, operator.truediv, operator.pow, tt.maximum, tt.arctan2, tt.logaddexp],
)
def test_numbers_are_weak(function, dtype, number):
    x = tt.tensor(np.array([1.0, 2.0], dtype), requires_grad=True)
    for y in (function(x, number), function(number, x)):
        assert y.dtype == dtype
        tt.sum(y).backward()
        assert x.grad.dtype == dtype


def test_a_number_beside_float64_keeps_its_digits():
    x = tt.tensor(np.array([1.0]), requires_grad=True)
    assert (x * 0.1).numpy()[0] == 0.1
    assert (0.1**x).numpy()[0] == 0.1
    (grad,) = tt.gradient(tt.sum(3.0**x), [x], create_graph=True)
    (second,) = tt.gradient(tt.sum(grad), [x])
    assert second.numpy()[0] == pytest.approx(3 * np.log(3.0) ** 2, rel=1e-15)
    for tenth in (0.1, np.float64(0.1), np.array(0.1)):
        (grad,) = tt.gradient(tt.sum((x + 1) ** tenth), [x], create_graph=True)
        (second,) = tt.gradient(tt.sum(grad), [x])
        assert second.numpy()[0] == pytest.approx(0.1 * -0.9 * 2**-1.9, rel=1e-15)


UNARY = [tt.sqrt, tt.exp, tt.tanh, tt.sigmoid, tt.gelu, tt.erf, tt.softplus, tt.reciprocal, tt.mean, tt.std, tt.norm]


@pytest.mark.parametrize(
    "function", [*UNARY, tt.logsumexp, tt.var, lambda x: x / 2, lambda x: x * 0.5, lambda x: x / x]
)
@pytest.mark.parametrize("dtype", ["bool", "int8", "uint8", "int16", "int32", "int64"])
def test_integers_in_a_float_function_give_the_default(function, dtype):
    x = tt.tensor(np.array([1, 1], dtype))
    y = function(x)
    assert y.dtype == F32, y.dtype
    expected = np.asarray(function(tt.tensor(np.ones(2))).numpy())
    np.testing.assert_allclose(y.numpy(), expected, rtol=1e-6, atol=1e-6)
    tt.set_default_dtype("float64")
    try:
        if dtype in ("int32", "int64"):
            assert function(x).dtype == F64
    finally:
        tt.set_default_dtype("float32")


def test_integers_beside_floats_take_the_floats_dtype():
    whole = tt.tensor(np.array([1, 2]))
    for dtype in (F16, F32, F64):
        x = tt.tensor(np.array([0.5, 1.5], dtype), requires_grad=True)
        for y in (x + whole, whole * x, x**whole, whole**x, tt.where(np.array([True, False]), x, whole)):
            assert y.dtype == dtype
            tt.sum(y).backward()
            assert x.grad.dtype == dtype


def test_integers_stay_integers():
    x = tt.tensor(np.array([3, -4], np.int32))
    for y in (x + 1, x * x, -x, abs(x), x**2, tt.clip(x, -1), tt.maximum(x, 0), tt.max(x), tt.sign(x), tt.square(x)):
        assert y.dtype == np.int32
    for y in (tt.sum(x), tt.prod(x), tt.cumsum(x), tt.argmax(x), tt.sum(x > 0)):
        assert y.dtype == np.int64
    for y in (x > 0, x == x, tt.isnan(x), tt.logical_not(x), tt.any(x), (x > 0) & (x < 9), ~(x > 0)):
        assert y.dtype == np.bool_


def test_where_with_two_numbers():
    condition = tt.tensor([1.0, -1.0]) > 0
    assert tt.where(condition, 1.0, 0).dtype == F32
    assert tt.where(condition, 1, 0).dtype == np.int64
    assert tt.where(tt.tensor(True), 1.0, 0.0).shape == ()
    assert tt.where(tt.tensor([0, 2]), 1.0, 0.0).tolist() == [0, 1]  # any number is a condition


def test_astype(x):
    y = x.astype("float64")
    assert y.dtype == F64
    tt.sum(y * y).backward()
    assert x.grad.dtype == F32 and x.grad.tolist() == [2, 4]
    assert not x.astype(np.int64).requires_grad
    assert tt.astype(tt.tensor([1, 0]), bool).tolist() == [True, False]
    same = x.detach().astype("float32")
    same[0] = 9.0
    assert x.tolist() == [1, 2]


# ---- operators ------------------------------------------------------------------------------------------------------


def test_operators_and_their_reflections(x):
    a = x.numpy()
    for function in (
        operator.add,
        operator.sub,
        operator.mul,
        operator.truediv,
        operator.floordiv,
        operator.mod,
        operator.pow,
    ):
        for other in (3.0, np.array([3.0, 4.0], np.float32), tt.tensor([3.0, 4.0]), [3.0, 4.0]):
            b = other.numpy() if isinstance(other, tt.Tensor) else np.asarray(other, np.float32)
            np.testing.assert_allclose(function(x, other).numpy(), function(a, b), rtol=1e-6)
            np.testing.assert_allclose(function(other, x).numpy(), function(b, a), rtol=1e-6)
    assert (+x) is x and (-x).tolist() == [-1, -2] and abs(-x).tolist() == [1, 2]
    assert (x == 1).tolist() == [True, False] and (x != 1).tolist() == [False, True]
    assert operator.lt(1, x).tolist() == [False, True] and operator.ge(1, x).tolist() == [True, False]
    assert (tt.tensor([6]) & 3).tolist() == [2] and (tt.tensor([6]) | 3).tolist() == [7]
    assert (tt.tensor([True]) ^ tt.tensor([True])).tolist() == [False]
    assert (x == None) is False and (x != "x") is True  # noqa: E711
    assert not (x > 1).requires_grad


def test_in_place_operators_write_plain_tensors_and_record_tracked_ones(x):
    plain = tt.tensor([1.0, 2.0])
    same = plain
    plain += 1
    plain -= 0.5
    plain *= 4
    plain /= 2
    assert plain is same and plain.tolist() == [3, 5]
    y = x * 1
    y += x
    y *= x
    y -= 1
    y /= 2
    tt.sum(y).backward()
    assert x.grad.tolist() == [2, 4]


def test_numpys_functions_on_tensors(x):
    a = x.numpy()
    for found, expected in (
        (np.sum(x), np.sum(a)),
        (np.sum(x, axis=0, keepdims=True), np.sum(a, axis=0, keepdims=True)),
        (np.mean(x, 0), np.mean(a, 0)),
        (np.max(x), np.max(a)),
        (np.amin(x, axis=-1), np.amin(a, axis=-1)),
        (np.prod(x), np.prod(a)),
        (np.var(x, ddof=1), np.var(a, ddof=1)),
        (np.std(x, None, None, None), np.std(a)),
        (np.cumsum(x, 0), np.cumsum(a, 0)),
        (np.cumprod(x), np.cumprod(a)),
        (np.linalg.norm(x), np.linalg.norm(a)),
        (np.linalg.norm(x, 1), np.linalg.norm(a, 1)),
        (np.clip(x, 0, 1), np.clip(a, 0, 1)),
        (np.clip(x, 1.5, None), np.clip(a, 1.5, None)),
        (np.round(x * 0.3, 1), np.round(a * 0.3, 1)),
        (np.where(a > 1, x, 0), np.where(a > 1, a, 0)),
        (np.hypot(x, a), np.hypot(a, a)),
        (np.multiply(a, x), a * a),
        (a + x, a + a),
        (np.float64(2.0) * x, 2 * a),
    ):
        assert isinstance(found, tt.Tensor) and found.requires_grad and found.dtype == F32
        np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    assert np.any(x > 1).item() is True and np.all(x > 1).item() is False and np.argmax(x).item() == 1
    assert np.where(x > 1)[0].tolist() == [1]


def test_plain_arrays_give_plain_arrays():
    a = np.array([0.5, 1.5])
    for y in (
        tt.tanh(a),
        tt.power(a, 2),
        tt.where(a > 1, a, 0.0),
        tt.clip(a, 0, 1),
        tt.norm(a),
        tt.gelu(a),
        tt.add(a, 1),
    ):
        assert not isinstance(y, tt.Tensor)


def test_a_numpy_number_as_an_option_is_weak_too(x):
    for y in (tt.elu(x, alpha=np.float64(0.3)), tt.leaky_relu(x, negative_slope=np.float64(0.3)), tt.outer(x, 2.5)):
        assert y.dtype == np.float32


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "error", "text"),
    [
        (lambda x: tt.add(x, np.ones(3)), tt.ShapeError, r"add\(a: float32\[2\], b: float64\[3\]\)"),
        (lambda x: x + "text", tt.DTypeError, "add: an argument is a str"),
        (lambda x: x + None, tt.DTypeError, "NoneType"),
        (lambda x: x + 1j, tt.DTypeError, "complex"),
        (lambda x: x & x, tt.DTypeError, "bitwise_and"),
        (lambda x: -tt.tensor([True]), tt.DTypeError, "negative"),
        (lambda x: tt.tensor([2]) ** -1, tt.DTypeError, "power: integers"),
        (lambda x: tt.sum(x, axis=1), tt.ShapeError, r"sum\(x: float32\[2\]\): axis 1 is out of bounds"),
        (lambda x: tt.sum(x, axis=(0, 0)), tt.ShapeError, "duplicate"),
        (lambda x: tt.sum(x, axis="0"), tt.DTypeError, "sum"),
        (lambda x: tt.mean(x, axis=-2), tt.ShapeError, "mean.*axis -2"),
        (lambda x: tt.var(x, axis=3), tt.ShapeError, "var.*axis 3"),
        (lambda x: tt.logsumexp(x, axis=1), tt.ShapeError, "logsumexp.*axis 1"),
        (lambda x: tt.norm(x, axis=1), tt.ShapeError, "norm.*axis 1"),
        (lambda x: tt.cumsum(x, axis=1), tt.ShapeError, "cumsum.*axis 1"),
        (lambda x: tt.cumprod(x, axis=1), tt.ShapeError, "cumprod.*axis 1"),
        (lambda x: tt.argmax(x, axis=1), tt.ShapeError, "argmax.*axis 1"),
        (lambda x: tt.max(tt.zeros((0, 2))), tt.ShapeError, r"max\(x: float32\[0, 2\]\): zero-size"),
        (lambda x: tt.min(tt.zeros((2, 0)), axis=1), tt.ShapeError, "min.*zero-size"),
        (lambda x: tt.argmin(tt.zeros(0)), tt.ShapeError, "argmin"),
        (lambda x: tt.norm(x, ord="nuc"), tt.InputError, "ord is 'nuc'"),
        (lambda x: tt.clip(x), tt.InputError, "both None"),
        (lambda x: tt.gelu(x, approximate="erf"), tt.InputError, "approximate is 'erf'"),
        (lambda x: x.astype("complex64"), tt.DTypeError, "complex64"),
        (lambda x: x.astype("number"), tt.DTypeError, "number"),
        (lambda x: np.sum(x, dtype="float64"), tt.DTypeError, "np.sum"),
        (lambda x: np.mean(x, out=np.zeros(())), tt.DTypeError, "np.mean"),
        (lambda x: np.linalg.norm(x[:, None], 2), tt.DTypeError, "matrix norm"),
        (lambda x: np.add.reduce(x), tt.DTypeError, "np.add.reduce"),
        (lambda x: np.tanh(x, out=np.zeros(2)), tt.DTypeError, "np.tanh with out"),
        (lambda x: np.cbrt(x), tt.DTypeError, "np.cbrt"),
        (lambda x: tt.tensor([1.0], dtype="real"), tt.DTypeError, "real"),
        (lambda x: tt.set_default_dtype("real"), tt.DTypeError, "real"),
        (lambda x: tt.set_default_dtype(None), tt.DTypeError, "not a float"),
    ],
)
def test_refused(call, error, text, x):
    with pytest.raises(error, match=text):
        call(x)


def test_empty_reductions():
    empty = tt.zeros((0, 3), requires_grad=True)
    assert tt.sum(empty).item() == 0 and tt.prod(empty, axis=0).tolist() == [1, 1, 1]
    assert np.isnan(tt.mean(empty).item()) and np.isnan(tt.var(empty, axis=0).numpy()).all()
    assert tt.logsumexp(empty, axis=0).tolist() == [-np.inf] * 3
    assert tt.any(empty).item() is False and tt.all(empty).item() is True
    for y in (tt.sum(empty, axis=0), tt.prod(empty, axis=0), tt.mean(empty, axis=0), tt.std(empty, axis=0)):
        tt.sum(y).backward()
        assert empty.grad.shape == (0, 3)


def test_a_condition_written_later_does_not_change_the_gradient(x):
    condition = np.array([True, False])
    y = tt.where(condition, x, 0.0)
    condition[:] = [False, True]
    tt.sum(y).backward()
    assert x.grad.tolist() == [1, 0]
