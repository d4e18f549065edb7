"""Indexing, embedding, sorting: edge cases, errors, and who owns the index."""

from __future__ import annotations

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape.ops.index import sum_rows


def tracked(*shape: int) -> tt.Tensor:
    return tt.tensor(np.arange(float(np.prod(shape))).reshape(shape), requires_grad=True)


def refused(error: type[Exception], *pieces: str):
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(piece) for piece in pieces))


# ---- sums over equal positions --------------------------------------------------------------------------------------


@given(
    st.integers(0, 2**31),
    st.sampled_from([1, 2, 7, 300]),
    st.integers(0, 200),
    st.sampled_from([0, 1, 3]),
    st.sampled_from(["uniform", "skewed", "one"]),
)
def test_sum_rows_equals_adding_one_by_one(seed, n, m, width, kind):
    rng = np.random.default_rng(seed)
    skewed = np.minimum(rng.zipf(1.5, m), n) - 1
    ids = {"uniform": rng.integers(0, n, m), "skewed": skewed, "one": np.full(m, n - 1)}[kind]
    values = rng.normal(size=(m, width))
    before = values.copy()
    expected = np.zeros((n, width))
    np.add.at(expected, ids, values)
    np.testing.assert_allclose(sum_rows(ids, values, n), expected, atol=1e-12)
    np.testing.assert_array_equal(values, before)


def test_sum_rows_with_more_rows_than_16_bits_count():
    ids = np.array([70000, 3, 70000, 65536 + 3])
    sums = sum_rows(ids, np.ones((4, 2)), 70001)
    assert sums[70000, 0] == 2 and sums[3, 0] == 1 and sums[65539, 0] == 1 and sums.sum() == 8


def test_sums_of_many_float32_do_not_drift():
    """A million equal ids: a running float32 sum of 0.1 is 1% off."""
    for width in (1, 2):
        found = sum_rows(np.zeros(10**6, np.intp), np.full((10**6, width), 0.1, np.float32), 1)
        np.testing.assert_allclose(found, 1e5, rtol=1e-6)


# ---- what x[index] gives --------------------------------------------------------------------------------------------


def test_repeated_positions_get_the_sum():
    x = tracked(3)
    x[[0, 0, 2, 0]].backward(np.array([1.0, 2.0, 4.0, 8.0]))
    assert x.grad.tolist() == [11.0, 0.0, 4.0]


def test_integers_of_every_kind_are_the_same_index():
    x = tracked(4, 3)
    for i in (2, np.int32(2), np.array(2), tt.tensor(2), np.uint8(2), tt.tensor(np.uint64(2)), -2, np.array(-2)):
        assert x[i].tolist() == [6.0, 7.0, 8.0], repr(i)
    for dtype in ("int8", "uint8", "uint16", "int32", "uint64"):
        y = x[np.array([2, 3, 2], dtype)]
        assert y.tolist()[0] == [6.0, 7.0, 8.0]
        assert tt.gradient(y.sum(), [x])[0].tolist() == [[0.0] * 3, [0.0] * 3, [2.0] * 3, [1.0] * 3]
    assert x[tt.tensor(1) : np.int64(3)].shape == (2, 3)


def test_a_basic_index_gives_a_view_and_an_array_a_copy():
    x = tt.tensor(np.zeros((3, 4)))
    assert np.shares_memory(x[1:].data, x.data)
    assert np.shares_memory(x[..., 0].data, x.data)
    assert not np.shares_memory(x[[1, 2]].data, x.data)


def test_iterating_goes_along_the_first_axis():
    x = tracked(3, 2)
    total = sum((i + 1.0) * row.sum() for i, row in enumerate(x))
    total.backward()
    assert x.grad.tolist() == [[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]]


def test_indexing_a_number():
    x = tt.tensor(3.0, requires_grad=True)
    assert x[()].shape == () and x[None].shape == (1,) and x[...].shape == ()
    assert x[np.array(True)].shape == (1,) and x[np.array(False)].shape == (0,)
    x[np.array(True)].sum().backward()
    assert x.grad.item() == 1.0


def test_indexing_nothing():
    x = tracked(0, 3)
    assert x[:, [0, 0]].shape == (0, 2)
    assert x[np.zeros(0, bool)].shape == (0, 3)
    x[[]].sum().backward()
    assert x.grad.shape == (0, 3)


def test_masks_from_comparisons():
    x = tt.tensor([-1.0, 2.0, 3.0], requires_grad=True)
    x[x > 0].square().sum().backward()
    assert x.grad.tolist() == [0.0, 4.0, 6.0]


def test_non_contiguous_arrays():
    x = tracked(3, 4)
    x.T[[1, 1, 3]][:, ::-1].sum(0).backward(np.array([1.0, 10.0, 100.0]))
    assert x.grad.tolist() == [[0.0, 200.0, 0.0, 100.0], [0.0, 20.0, 0.0, 10.0], [0.0, 2.0, 0.0, 1.0]]


# ---- who owns the index ---------------------------------------------------------------------------------------------


def test_an_index_array_can_be_reused_by_its_owner():
    x, i = tracked(3), np.array([0, 1])
    taken = [x[i], tt.take(x, i), tt.take_along_axis(x, i), tt.scatter_add(x, i, 1.0), tt.index_put(x, i, x[1:])]
    total = sum(y.sum() for y in taken)
    i[:] = 2
    total.backward()
    assert x.grad.tolist() == [4.0, 5.0, 3.0]


def test_an_index_tensor_written_before_backward_is_an_error():
    x, i = tracked(3), tt.tensor([0, 1])
    y = x[i].sum()
    i.copy_([2, 2])
    with refused(tt.TapeError, "gather", "written in place"):
        y.backward()


def test_what_indexing_keeps():
    """No values of x: a slice keeps nothing, an array index only itself."""
    with tt.Tape() as tape:
        x = tracked(1000)
        y = x * 1.0
        y[10:20].sum()
        y[[1, 2, 3]].sum()
    by_name = {record.node.name: record.node for record in tape.records}
    assert not any(isinstance(k, np.ndarray) for k in by_name["getitem"].kept)
    assert [k.nbytes for k in by_name["gather"].kept if isinstance(k, np.ndarray)] == [24]


# ---- refused indices ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [5, -6, [0, 5], (slice(None), 9), np.array([[7]]), (Ellipsis, [3, -9])])
def test_positions_out_of_range(index):
    with refused(tt.InputError, "out of bounds", "help: the positions"):
        tracked(5, 4)[index]


@pytest.mark.parametrize("index", [1.5, "a", [0.5], np.array([1.0]), {}, 1j, slice(0.5), slice("a", None), object()])
def test_indices_of_the_wrong_kind(index):
    with pytest.raises(tt.DTypeError, match="help:"):
        tracked(5, 4)[index]
    with pytest.raises(tt.DTypeError, match="help:"):
        tracked(5, 4)[0, index]


def test_float_tensors_do_not_index():
    with refused(tt.DTypeError, "float64"):
        tracked(5)[tracked(2)]


def test_too_many_indices():
    with refused(tt.ShapeError, "too many indices", "(5, 4)"):
        tracked(5, 4)[0, 0, 0]


@pytest.mark.parametrize(
    "index",
    [
        np.ones(4, bool),
        (slice(None), np.ones(5, bool)),
        np.ones((4, 5), bool),
        (np.ones(4, bool), np.arange(4)),
        (0, np.ones(3, bool)),
        (np.arange(2), np.array(True)),
    ],
)
def test_masks_of_the_wrong_shape(index):
    with pytest.raises(tt.ShapeError, match="mask"):
        tracked(5, 4)[index]


def test_index_arrays_that_do_not_broadcast():
    with refused(tt.ShapeError, "(2,), (3,)", "x[rows[:, None], columns]"):
        tracked(5, 4)[[0, 1], [0, 1, 2]]


# ---- take, take_along_axis ------------------------------------------------------------------------------------------


def test_take_refuses():
    x = tracked(5, 4)
    with refused(tt.InputError, "index 5 is out of bounds for axis 0 with size 5"):
        tt.take(x, [0, 5], axis=0)
    with refused(tt.DTypeError, "take", "bool"):
        tt.take(x, [True, False], axis=0)
    with refused(tt.DTypeError, "take", "float64"):
        x.take([0.5])
    with refused(tt.ShapeError, "take: axis is 2", "2 axes"):
        x.take([0], axis=2)
    with refused(tt.DTypeError, "axis is 1.0"):
        x.take([0], axis=1.0)


def test_take_along_axis_refuses():
    with pytest.raises(tt.ShapeError, match="axis is 7, x has 2 axes"):
        tt.take_along_axis(tt.zeros((2, 3)), np.zeros((1, 3), int), axis=7)
    x = tracked(5, 4)
    with refused(tt.ShapeError, "(2,)", "(5, 4)"):
        tt.take_along_axis(x, np.array([0, 1]), axis=0)
    with refused(tt.InputError, "out of bounds"):
        tt.take_along_axis(x, np.full((1, 4), 5), axis=0)
    with refused(tt.DTypeError, "float64"):
        tt.take_along_axis(x, np.zeros((1, 4)), axis=0)


def test_numpy_functions_on_tensors():
    x = tracked(3, 2)
    i = np.array([1, 0, 1])
    for ours, numpys in [
        (np.take(x, i, axis=0), np.take(x.data, i, axis=0)),
        (np.sort(x, axis=0), np.sort(x.data, axis=0)),
        (np.argsort(x), np.argsort(x.data)),
        (np.take_along_axis(x, i[:, None], axis=1), np.take_along_axis(x.data, i[:, None], axis=1)),
    ]:
        assert isinstance(ours, tt.Tensor)
        np.testing.assert_array_equal(ours.data, numpys)
    with refused(tt.DTypeError, "mode"):
        np.take(x, i, mode="wrap")


# ---- embedding ------------------------------------------------------------------------------------------------------


def test_a_token_out_of_range_is_named_with_its_place():
    tokens = np.zeros((4, 9), int)
    tokens[3, 7] = 103
    with refused(tt.InputError, "embedding: token 103 at position (3, 7) is out of range for 100 rows"):
        tt.embedding(tracked(100, 2), tokens)
    with refused(tt.InputError, "token -1 at position (0,) is out of range", "0 to 99"):
        tt.embedding(tracked(100, 2), [-1])
    with refused(tt.InputError, "token 5 is out of range for 5 rows"):
        tt.embedding(tracked(5, 2), 5)
    with refused(tt.InputError, "0 rows", "empty"):
        tt.embedding(tracked(0, 2), [0])


def test_embedding_refuses():
    with refused(tt.DTypeError, "tokens have dtype float64", "astype"):
        tt.embedding(tracked(5, 2), np.array([1.0]))
    with refused(tt.DTypeError, "bool"):
        tt.embedding(tracked(5, 2), [True])
    with refused(tt.ShapeError, "(5,)"):
        tt.embedding(tracked(5), [1])


def test_embedding_takes_every_integer_dtype_and_tensors():
    weight = tracked(300, 2)
    for dtype in ("uint8", "int8", "int16", "uint16", "int32", "uint32", "int64", "uint64"):
        weight.grad = None
        tokens = np.array([[7, 7], [100, 7]], dtype)
        tt.embedding(weight, tt.tensor(tokens) if dtype == "int16" else tokens).sum().backward()
        assert weight.grad[7].tolist() == [3.0, 3.0] and weight.grad[100].tolist() == [1.0, 1.0], dtype


def test_embedding_of_one_token_of_none_and_of_a_transposed_matrix():
    weight = tracked(3, 4)
    assert tt.embedding(weight, 1).shape == (4,)
    assert tt.embedding(weight, np.zeros((2, 0), int)).shape == (2, 0, 4)
    y = tt.embedding(weight.T, np.array([0, 3, 0]))
    assert y.tolist() == weight.data.T[[0, 3, 0]].tolist()
    y.sum().backward()
    assert weight.grad.tolist() == [[2.0, 0.0, 0.0, 1.0]] * 3


# ---- new tensors with other values ----------------------------------------------------------------------------------


def test_index_put_leaves_x_as_it_was_and_the_last_value_stays():
    x, v = tracked(3), tt.tensor([10.0, 20.0, 30.0], dtype="float64", requires_grad=True)
    y = tt.index_put(x, [1, 1, 0], v)
    assert x.tolist() == [0.0, 1.0, 2.0] and y.tolist() == [30.0, 20.0, 2.0]
    y.backward(np.array([1.0, 2.0, 4.0]))
    assert x.grad.tolist() == [0.0, 0.0, 4.0]
    assert v.grad.tolist() == [0.0, 2.0, 1.0]


def test_the_last_of_very_many_stays():
    rng = np.random.default_rng(0)
    i, j = rng.integers(0, 50, (2, 20, 300))
    v = np.arange(6000.0).reshape(20, 300)
    expected = np.zeros((50, 50))
    for a, b, c in zip(i.ravel(), j.ravel(), v.ravel(), strict=True):
        expected[a, b] = c
    for order in "CF":
        index = np.array(i, order=order), np.array(j, order=order)
        np.testing.assert_array_equal(tt.index_put(np.zeros((50, 50)), index, np.array(v, order=order)), expected)


def test_nan_that_was_overwritten_is_gone():
    x = tt.tensor([np.nan, 1.0], requires_grad=True)
    y = tt.index_put(x, 0, 0.0)
    (y * y).sum().backward()
    assert x.grad.tolist() == [0.0, 2.0]


def test_numbers_take_the_dtype_of_x():
    x = tt.tensor(np.zeros(3, np.float32))
    for value in (0.5, np.float64(0.5), [0.5], 1):
        assert tt.scatter_add(x, [0, 0], value).dtype == np.float32
        assert tt.index_put(x, [0, 0], value).dtype == np.float32
        assert tt.scatter_add(x, tt.tensor(0), value if np.ndim(value) == 0 else 1.0).dtype == np.float32
    wide = tt.tensor(np.zeros(3))
    assert tt.scatter_add(wide, [0, 0], 0.1).tolist() == [0.2, 0.0, 0.0]
    assert tt.scatter_add(tt.tensor([1, 2]), [0, 0], 1).tolist() == [3, 2]


@pytest.mark.parametrize("write", [tt.scatter_add, tt.index_put])
def test_writes_that_are_refused(write):
    x = tracked(5, 4)
    with refused(tt.ShapeError, "values have shape (3,)", "x[index] has (2, 4)"):
        write(x, [0, 1], np.zeros(3))
    with refused(tt.ShapeError, "values have shape (1, 4)", "x[index] has (4,)"):
        write(x, 0, np.zeros((1, 4)))
    with refused(tt.InputError, "out of bounds"):
        write(x, [0, 5], 1.0)
    with refused(tt.InputError, "out of bounds"):
        write(x, 5, 1.0)
    with refused(tt.ShapeError, "too many"):
        write(x, (0, 0, 0), 1.0)
    with pytest.raises(tt.DTypeError):
        write(x, 0.5, 1.0)


def test_floats_do_not_go_into_integers():
    with refused(tt.DTypeError, "float64", "int64"):
        tt.index_put(tt.tensor([1, 2]), 0, np.array(0.5))


# ---- sorting --------------------------------------------------------------------------------------------------------


def test_topk_of_ties_and_nan():
    x = tt.tensor([1.0, 3.0, np.nan, 3.0, 3.0], requires_grad=True)
    values, indices = tt.topk(x, 3)
    assert indices.tolist() == [2, 1, 3] and values.tolist()[1:] == [3.0, 3.0]
    assert not indices.requires_grad and values.requires_grad
    values[1:].sum().backward()
    assert x.grad.tolist() == [0.0, 1.0, 0.0, 1.0, 0.0]


def test_topk_refuses():
    with refused(tt.InputError, "k is 6", "5 elements"):
        tt.topk(tracked(5), 6)
    with refused(tt.InputError, "k is -1"):
        tt.topk(tracked(5), -1)
    with refused(tt.DTypeError, "k is 1.5"):
        tt.topk(tracked(5), 1.5)
    with refused(tt.ShapeError, "axis is 1"):
        tt.topk(tracked(5), 2, axis=1)


def test_sorting_keeps_the_order_of_equal_elements():
    x = tt.tensor([2.0, 1.0, 2.0, 1.0], requires_grad=True)
    assert tt.argsort(x).tolist() == [1, 3, 0, 2]
    tt.sort(x).backward(np.array([1.0, 2.0, 3.0, 4.0], np.float32))
    assert x.grad.tolist() == [3.0, 1.0, 4.0, 2.0]


def test_integers_and_bools_can_be_indexed_and_sorted():
    x = tt.tensor([[3, 1], [2, 2]])
    assert tt.sort(x).tolist() == [[1, 3], [2, 2]] and tt.sort(x, axis=None).dtype == np.int64
    assert x[:, [0, 0]].tolist() == [[3, 3], [2, 2]]
    assert tt.topk(x, 1)[0].tolist() == [[3], [2]]
    assert tt.tensor([True, False])[[1, 1]].dtype == np.bool_


def test_positions_taken_twice_along_the_last_axis_of_a_square():
    x = tt.tensor(np.eye(2), requires_grad=True)
    tt.take(x, [0, 0, 1], axis=-1).backward(np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]))
    assert x.grad.tolist() == [[3.0, 3.0], [9.0, 6.0]]
