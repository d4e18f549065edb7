"""Creation functions: values, dtypes, ownership, refusals."""

from __future__ import annotations

import numpy as np
import pytest

import tinytape as tt


@pytest.fixture
def float64_by_default():
    tt.set_default_dtype("float64")
    yield
    tt.set_default_dtype("float32")


MADE = [
    (lambda **o: tt.zeros((2, 3), **o), np.zeros((2, 3))),
    (lambda **o: tt.zeros(3, **o), np.zeros(3)),
    (lambda **o: tt.zeros((), **o), np.zeros(())),
    (lambda **o: tt.ones((0, 2), **o), np.ones((0, 2))),
    (lambda **o: tt.full((2,), 1.5, **o), np.full(2, 1.5)),
    (lambda **o: tt.arange(0, 1, 0.25, **o), np.arange(0, 1, 0.25)),
    (lambda **o: tt.arange(3.0, **o), np.arange(3.0)),
    (lambda **o: tt.linspace(-1, 1, 5, **o), np.linspace(-1, 1, 5)),
    (lambda **o: tt.linspace(0, 1, 4, endpoint=False, **o), np.arange(4) / 4),
    (lambda **o: tt.eye(3, **o), np.eye(3)),
    (lambda **o: tt.eye(2, 3, k=-1, **o), np.eye(2, 3, -1)),
]


@pytest.mark.parametrize(("make", "expected"), MADE)
def test_values_dtypes_and_gradients(make, expected):
    plain = make()
    np.testing.assert_array_equal(plain.numpy(), expected)
    assert plain.dtype == np.float32 and plain.is_leaf and not plain.requires_grad
    assert make(dtype="float64").dtype == np.float64
    assert make(dtype=np.int32).dtype == np.int32
    leaf = make(requires_grad=True)
    tt.sum(leaf * leaf).backward()
    np.testing.assert_array_equal(leaf.grad.numpy(), 2 * expected.astype(np.float32))
    with pytest.raises(tt.DTypeError, match="only floats have gradients"):
        make(dtype="int64", requires_grad=True)


@pytest.mark.parametrize(("make", "expected"), MADE)
def test_the_default_dtype_is_used(make, expected, float64_by_default):
    assert make().dtype == np.float64


def test_integers_stay_integers():
    assert tt.arange(4).dtype == np.int64 and tt.arange(4).tolist() == [0, 1, 2, 3]
    assert tt.arange(5, 1, -2).tolist() == [5, 3]
    assert tt.arange(tt.tensor(3)).tolist() == [0, 1, 2]
    assert tt.full((2,), 7).dtype == np.int64
    assert tt.full((2,), True).dtype == np.bool_
    assert tt.full((2,), np.float64(0.5)).dtype == np.float64
    assert tt.full((2,), tt.tensor(0.5)).dtype == np.float32


def test_float32_ranges_are_not_counted_in_float32():
    np.testing.assert_array_equal(tt.arange(0, 1000, 0.1).numpy(), np.arange(0, 1000, 0.1).astype(np.float32))


def test_tensors_like_others():
    x = tt.tensor(np.arange(6.0).reshape(2, 3), requires_grad=True)
    for made, value in ((tt.zeros_like(x), 0), (tt.ones_like(x), 1), (tt.full_like(x, 2.5), 2.5)):
        assert made.dtype == np.float64 and not made.requires_grad
        np.testing.assert_array_equal(made.numpy(), np.full((2, 3), value))
    assert tt.zeros_like(x, dtype="float32", requires_grad=True).requires_grad
    assert tt.ones_like(np.zeros(2, np.int32)).dtype == np.int32
    assert tt.zeros_like([1.0, 2.0]).dtype == np.float32
    for made in (np.zeros_like(x), np.ones_like(x), np.full_like(x, 3.0)):
        assert isinstance(made, tt.Tensor) and made.dtype == np.float64 and made.shape == (2, 3)


def test_each_owns_its_memory():
    for x in (tt.zeros(3), tt.arange(3.0), tt.zeros_like(tt.ones(3)), tt.one_hot([0, 1, 2], 3)):
        y = x + 0
        x[0] = 5.0
        assert x.numpy().ravel()[0] == 5 and y.numpy().ravel()[0] != 5


def test_one_hot():
    hot = tt.one_hot(tt.tensor([[0, 2], [1, 1]]), 3)
    assert hot.dtype == np.float32 and hot.shape == (2, 2, 3)
    np.testing.assert_array_equal(hot.numpy(), np.eye(3)[[[0, 2], [1, 1]]])
    assert tt.one_hot(1, 3).tolist() == [0, 1, 0]
    assert tt.one_hot(np.zeros((0, 2), np.int64), 3).shape == (0, 2, 3)
    assert tt.one_hot([0], 2, dtype="int64").dtype == np.int64


def test_as_tensor_and_dlpack():
    x = tt.tensor([1.0, 2.0])
    assert tt.as_tensor(x) is x
    assert tt.as_tensor([1, 2]).dtype == np.int64
    array = np.arange(3.0)
    copied = tt.from_dlpack(array)
    array[0] = 7
    assert copied.tolist() == [0, 1, 2] and copied.dtype == np.float64
    assert np.from_dlpack(tt.from_dlpack(x)).tolist() == [1, 2]


@pytest.mark.peer
def test_dlpack_from_torch():
    import torch

    assert tt.from_dlpack(torch.arange(3, dtype=torch.float32)).tolist() == [0, 1, 2]
    assert torch.from_dlpack(tt.tensor([1.0, 2.0])).tolist() == [1, 2]
    with pytest.raises(tt.DTypeError, match="from_dlpack: x is a Tensor"):
        tt.from_dlpack(torch.ones(2, requires_grad=True))


@pytest.mark.parametrize(
    ("make", "error", "text"),
    [
        (lambda: tt.zeros((2, -1)), tt.ShapeError, "zeros"),
        (lambda: tt.zeros("ab"), tt.ShapeError, "zeros"),
        (lambda: tt.zeros(2.5), tt.ShapeError, "zeros"),
        (lambda: tt.eye(-1), tt.ShapeError, "eye"),
        (lambda: tt.linspace(0, 1, -3), tt.ShapeError, "linspace"),
        (lambda: tt.ones(2, dtype="complex128"), tt.DTypeError, "complex128"),
        (lambda: tt.ones(2, dtype="float99"), tt.DTypeError, "float99"),
        (lambda: tt.arange(0, 1, 0), tt.InputError, "step is 0"),
        (lambda: tt.one_hot([0, 3], 3), tt.InputError, "index 3 .* n = 3"),
        (lambda: tt.one_hot([0, -1], 3), tt.InputError, "index -1 .* n = 3"),
        (lambda: tt.one_hot([0.0], 3), tt.DTypeError, "float32"),
        (lambda: tt.from_dlpack("text"), tt.DTypeError, "str"),
    ],
)
def test_refused(make, error, text):
    with pytest.raises(error, match=text):
        make()
