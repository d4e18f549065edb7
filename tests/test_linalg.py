"""Matrix products and contractions: how they are computed, and what they refuse."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tinytape as tt


def tracked(*shape: int, dtype: str = "float64") -> tt.Tensor:
    return tt.tensor(np.random.default_rng(0).normal(size=shape).astype(dtype), requires_grad=True)


def refused(error: type[Exception], *pieces: str):
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(piece) for piece in pieces))


def test_a_layer_over_a_sequence_is_one_product_each_way(monkeypatch):
    x, w = tracked(7, 3, 4), tracked(4, 5)
    calls = []
    dot = np.dot

    def counting(a, b):
        calls.append((a.shape, b.shape))
        return dot(a, b)

    monkeypatch.setattr(np, "dot", counting)
    (x @ w).sum().backward()
    assert calls == [((21, 4), (4, 5)), ((21, 5), (5, 4)), ((4, 21), (21, 5))]
    calls.clear()
    (x.detach() @ w).sum().backward()
    assert len(calls) == 2, "the gradient of the input was computed though nobody asked for it"


def test_arrays_on_either_side():
    a, b = np.ones((2, 3)), tracked(3, 4)
    assert isinstance(a @ b, tt.Tensor) and isinstance(b.T @ a.T, tt.Tensor)
    assert (a @ b).tolist() == (a @ b.data).tolist()
    assert isinstance(np.matmul(a, b), tt.Tensor) and isinstance(np.dot(a, b), tt.Tensor)
    assert tt.matmul([[1.0, 2.0]], tt.tensor([[3.0], [4.0]])).tolist() == [[11.0]]
    assert tt.matmul([[1, 2]], [[3], [4]]).tolist() == [[11]]


def test_dtypes():
    a = tracked(2, 3, dtype="float32")
    i = tt.tensor([[1], [2], [3]])
    for y in (a @ i, tt.einsum("ij,jk->ik", a, i), tt.tensordot(a, i, 1), tt.outer(a, i), tt.einsum("ij,->ij", a, 2.0)):
        assert y.dtype == np.float32
    assert (a @ np.ones((3, 1))).dtype == np.float64
    assert (i.T @ i).dtype == np.int64
    (a @ i).sum().backward()
    assert a.grad.dtype == np.float32


def test_dot_of_numbers_and_stacks():
    x = tracked(2, 3)
    assert tt.dot(x, 2.0).tolist() == (x.data * 2).tolist() and x.dot(tt.tensor(2.0)).shape == (2, 3)
    y = tracked(4, 3, 5)
    np.testing.assert_allclose(tt.dot(x, y).data, np.dot(x.data, y.data))


def test_einsum_without_letters_in_common_sums_before_it_multiplies():
    a, b = tracked(50, 3), tracked(60, 4)
    with tt.Tape() as tape:
        tt.einsum("ai,bj->ij", a, b)
    assert [str(r.node.name) for r in tape.records] == ["sum", "sum", "einsum"]


@pytest.mark.parametrize(
    ("shape_a", "shape_b", "pieces"),
    [
        ((2, 3), (4, 5), ["(2, 3)", "(4, 5)", "last axis, 3", "4"]),
        ((3,), (4,), ["last axis, 3", "only one, 4"]),
        ((7, 2, 3), (4, 5), ["last axis, 3", "4"]),
        ((2, 2, 3), (3, 3, 5), ["(2,) and (3,) do not broadcast"]),
        ((), (3,), ["()", "multiply with *"]),
        ((2, 3), (), ["()", "multiply with *"]),
    ],
)
def test_products_that_are_refused(shape_a, shape_b, pieces):
    with refused(tt.ShapeError, *pieces):
        tracked(*shape_a) @ tracked(*shape_b)
    with refused(tt.ShapeError, *pieces):
        np.zeros(shape_a) @ tracked(*shape_b)


@pytest.mark.parametrize(
    ("subscripts", "shapes", "error", "pieces"),
    [
        ("ij,jk->ik", [(2, 3), (4, 5)], tt.ShapeError, ["'j'", "3 and 4"]),
        ("ii->i", [(2, 3)], tt.ShapeError, ["'i'", "2 and 3"]),
        ("ii->i", [(1, 3)], tt.ShapeError, ["'i'", "1 and 3"]),
        ("ij->i", [(2,)], tt.ShapeError, ["operand 0", "(2,)", "'ij'"]),
        ("...ij->i", [(2,)], tt.ShapeError, ["operand 0"]),
        ("ij,jk->ik", [(2, 3)], tt.InputError, ["2 operands, 1"]),
        ("ij->ik", [(2, 3)], tt.InputError, ["result"]),
        ("ij->ii", [(2, 3)], tt.InputError, ["result", "once"]),
        ("i1->i", [(2, 3)], tt.InputError, ["cannot be read"]),
        ("i.j->i", [(2, 3)], tt.InputError, ["cannot be read"]),
        ("ij->i->j", [(2, 3)], tt.InputError, ["cannot be read"]),
        ("...i...", [(2, 3)], tt.InputError, ["cannot be read"]),
    ],
)
def test_einsums_that_are_refused(subscripts, shapes, error, pieces):
    with refused(error, *pieces):
        tt.einsum(subscripts, *(tracked(*s) for s in shapes))


def test_other_refusals():
    x = tracked(2, 3)
    with refused(tt.DTypeError, "einsum", "Tensor"):
        tt.einsum(x, [0, 1])
    with refused(tt.ShapeError, "tensordot: 3 axes", "2"):
        tt.tensordot(x, x, 3)
    with refused(tt.ShapeError, "(1,)", "(0,)", "equal length"):
        tt.tensordot(x, x, (1, 0))
    with refused(tt.ShapeError, "axis is 2"):
        tt.tensordot(x, x, (2, 0))
    with refused(tt.ShapeError, "diagonal"):
        tt.trace(x[0])
    with refused(tt.ShapeError, "matmul"):
        tt.dot(x, x)
