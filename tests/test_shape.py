"""Shape ops: what they share, keep and refuse."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tinytape as tt


def tracked(*shape: int) -> tt.Tensor:
    return tt.tensor(np.arange(float(np.prod(shape))).reshape(shape), requires_grad=True)


def refused(error: type[Exception], *pieces: str):
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(piece) for piece in pieces))


def test_views_share_memory_and_copies_do_not():
    x = tt.tensor(np.zeros((3, 4)))
    views = [x.reshape(4, 3), x.ravel(), x.T, x.mT, x.swapaxes(0, 1), x.expand_dims(0), x.broadcast_to((2, 3, 4))]
    views += [*tt.split(x, 2, axis=1), *tt.unstack(x), tt.flip(x), x.diagonal()]
    assert all(np.shares_memory(v.data, x.data) for v in views)
    assert not np.shares_memory(x.flatten().data, x.data)


def test_they_keep_no_values():
    x = tracked(3, 4)
    with tt.Tape() as tape:
        tt.concatenate([x.reshape(4, 3).T, tt.flip(x), tt.tile(x, 2)[:, :4]])
        tt.stack([tt.pad(x, 1)[1:-1, 1:-1], tt.roll(x, 1), *tt.split(tt.repeat(x, 2, 0), 2)])
    kept = [value for record in tape.records for value in record.node.kept or ()]
    assert kept and not any(isinstance(value, np.ndarray) for value in kept)


def test_gradients_of_a_join_are_views_of_one_array():
    """No copy of the gradient for each part."""
    xs = [tracked(3), tracked(3)]
    for join in (tt.concatenate, tt.stack):
        node = join(xs).node
        g = np.ones(node.shape)
        assert all(np.shares_memory(part, g) for part in node.op.rule(g, *node.kept))


def test_method_forms():
    x = tracked(2, 3, 4)
    assert x.reshape(6, 4).shape == x.reshape((6, 4)).shape == x.reshape(-1, 4).shape == (6, 4)
    assert x.reshape(24).shape == x.reshape(-1).shape == (24,)
    assert x.transpose().shape == x.transpose(None).shape == x.T.shape == (4, 3, 2)
    assert x.transpose(0, 2, 1).shape == x.transpose((0, 2, 1)).shape == x.mT.shape == (2, 4, 3)
    assert tt.tensor(1.0).T.shape == () and tracked(3).transpose(0).shape == (3,)
    assert x.split(3, axis=1)[0].shape == (2, 1, 4)


def test_numpy_functions_on_tensors():
    x = tracked(2, 3)
    assert np.shape(x) == (2, 3) and np.ndim(x) == 2 and np.size(x) == 6 and np.size(x, 0) == 2
    for ours in (
        np.reshape(x, (3, 2), order="C"),
        np.ravel(x),
        np.transpose(x),
        np.concatenate([x, x], axis=1),
        np.stack((x, x)),
        np.split(x, 3, axis=1)[0],
        np.pad(x, ((0, 1), (2, 0)), constant_values=1.0),
        np.tile(x, (2, 1)),
        np.repeat(x, 2, axis=0),
        np.tril(x),
        np.matrix_transpose(x),
        np.moveaxis(x, 0, 1),
        np.diagonal(x, offset=1),
    ):
        assert isinstance(ours, tt.Tensor) and ours.requires_grad
    with refused(tt.DTypeError, "order is 'F'"):
        np.reshape(x, (3, 2), order="F")


def test_plain_numbers_take_the_dtype_of_the_rest():
    x = tt.tensor(np.float32(1.5))
    assert tt.stack([x, 2.0, 3]).dtype == np.float32
    assert tt.concatenate([tt.tensor([1, 2]), tt.tensor([0.5])]).dtype == np.float32


def test_padding_with_a_number_is_not_differentiated():
    x = tracked(2)
    value, tangent = tt.jvp(lambda x: tt.pad(x, 1, constant_values=7.0), (x,), (np.ones(2),))
    assert value.tolist() == [7.0, 0.0, 1.0, 7.0] and tangent.tolist() == [0.0, 1.0, 1.0, 0.0]


@pytest.mark.parametrize(
    ("call", "error", "pieces"),
    [
        (lambda x: x.reshape(7), tt.ShapeError, ["reshape", "[2, 3]", "7"]),
        (lambda x: tt.transpose(x, (0, 0)), tt.ShapeError, ["transpose", "repeated"]),
        (lambda x: x.swapaxes(0, 2), tt.ShapeError, ["swapaxes", "2"]),
        (lambda x: x.squeeze(0), tt.ShapeError, ["squeeze"]),
        (lambda x: x.expand_dims(5), tt.ShapeError, ["expand_dims", "5"]),
        (lambda x: x.broadcast_to((3, 3)), tt.ShapeError, ["broadcast", "(3,3)"]),
        (lambda x: tt.concatenate([x, x.T]), tt.ShapeError, ["concatenate", "[2, 3]", "[3, 2]"]),
        (lambda x: tt.concatenate([x, x], axis=2), tt.ShapeError, ["axis 2"]),
        (lambda x: tt.concatenate([]), tt.ShapeError, ["0 tensors"]),
        (lambda x: tt.concatenate(3), tt.DTypeError, ["int"]),
        (lambda x: tt.stack([x, x.T]), tt.ShapeError, ["stack", "[2, 3]", "[3, 2]"]),
        (lambda x: tt.unstack(x, 2), tt.ShapeError, ["unstack"]),
        (lambda x: tt.split(x, 2, axis=1), tt.ShapeError, ["length 3 into 2"]),
        (lambda x: tt.split(x, 0), tt.ShapeError, ["0 equal parts"]),
        (lambda x: tt.split(x, [2, 1], axis=1), tt.InputError, ["[2, 1]", "order"]),
        (lambda x: tt.split(x, 1.5), tt.DTypeError, ["1.5"]),
        (lambda x: tt.split(x, 1, axis=2), tt.ShapeError, ["axis is 2"]),
        (lambda x: tt.pad(x, 1, mode="edge"), tt.InputError, ["'edge'"]),
        (lambda x: tt.pad(x, -1), tt.InputError, ["-1"]),
        (lambda x: tt.pad(x, 0.5), tt.DTypeError, ["float64"]),
        (lambda x: tt.pad(x, ((1, 1),) * 3), tt.ShapeError, ["(3, 2)", "2 axes"]),
        (lambda x: tt.repeat(x, -1, 0), tt.InputError, ["-1"]),
        (lambda x: tt.repeat(x, [1, 2, 3], 0), tt.ShapeError, ["(3,)", "length 2"]),
        (lambda x: tt.repeat(x, 0.5, 0), tt.DTypeError, ["float64"]),
        (lambda x: tt.tile(x, -1), tt.ShapeError, ["tile"]),
        (lambda x: tt.tril(x[0]), tt.ShapeError, ["tril", "(3,)"]),
        (lambda x: x[0].diagonal(), tt.ShapeError, ["diagonal"]),
        (lambda x: x.diagonal(0, 1, 1), tt.ShapeError, ["diagonal"]),
        (lambda x: x[0].mT, tt.ShapeError, ["mT", "(3,)"]),
        (lambda x: tt.flip(x, 2), tt.ShapeError, ["flip", "2"]),
        (lambda x: tt.roll(x, 1, 2), tt.ShapeError, ["roll", "2"]),
        (lambda x: tt.moveaxis(x, 0, 2), tt.ShapeError, ["moveaxis", "2"]),
    ],
)
def test_refused(call, error, pieces):
    with refused(error, *pieces):
        call(tracked(2, 3))
