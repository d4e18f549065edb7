"""Cross-entropy and softmax: masks, padding, extreme logits, errors."""

from __future__ import annotations

import re

import numpy as np
import pytest

import tinytape as tt

rng = np.random.default_rng(0)
INF, NAN = np.inf, np.nan


def logits_of(*shape: int, dtype: str = "float64") -> tt.Tensor:
    return tt.tensor(np.random.default_rng(0).normal(size=shape).astype(dtype), requires_grad=True)


def refused(error: type[Exception], *pieces: str):
    return pytest.raises(error, match="(?s)" + ".*".join(re.escape(piece) for piece in pieces))


# ---- what counts ----------------------------------------------------------------------------------------------------


def test_padding_does_not_count():
    """The mean over real positions, whatever stands in the padded ones."""
    logits, target = logits_of(2, 3, 5), np.array([[1, 2, -100], [4, -100, -100]])
    loss = tt.cross_entropy(logits, target)
    loss.backward()
    alone = tt.cross_entropy(logits.detach()[[0, 0, 1], [0, 1, 0]], np.array([1, 2, 4]))
    assert loss.item() == pytest.approx(alone.item())
    assert not logits.grad.numpy()[target == -100].any() and logits.grad.numpy()[target != -100].all()


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_ignored_rows_may_hold_anything(reduction):
    x = np.array([[1.0, 2.0], [NAN, INF], [-INF, -INF]])
    logits = tt.tensor(x, requires_grad=True)
    loss = tt.cross_entropy(logits, np.array([1, -100, -100]), reduction=reduction, label_smoothing=0.1)
    assert np.isfinite(loss.numpy()).all()
    loss.sum().backward()
    assert np.isfinite(logits.grad.numpy()).all() and not logits.grad.numpy()[1:].any()


@pytest.mark.parametrize("options", [{}, {"weight": np.ones(5)}, {"label_smoothing": 0.1}])
def test_nothing_but_padding_costs_nothing(options):
    """PyTorch gives NaN."""
    logits = logits_of(3, 5)
    loss = tt.cross_entropy(logits, np.full(3, -100), **options)
    loss.backward()
    assert loss.item() == 0.0 and not logits.grad.numpy().any()
    assert tt.cross_entropy(logits_of(0, 5), np.zeros(0, int), **options).item() == 0.0
    assert tt.cross_entropy(logits_of(3, 5), np.zeros(3, int), weight=np.zeros(5)).item() == 0.0


def test_an_ignored_class_within_range():
    logits = logits_of(4, 3)
    found = tt.cross_entropy(logits, np.array([0, 1, 2, 0]), ignore_index=0)
    expected = tt.cross_entropy(logits[1:3], np.array([1, 2]))
    assert found.item() == pytest.approx(expected.item())


# ---- extreme logits -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("size", [1.0, 50.0, 1e4, 1e30])
def test_large_logits_do_not_overflow(dtype, size):
    x = tt.tensor(np.array([[0, -1], [1, 0]], dtype) * size, requires_grad=True)
    loss = tt.cross_entropy(x, np.array([0, 1]), reduction="none")
    small = np.log1p(np.exp(-size))
    np.testing.assert_allclose(loss.numpy(), [small, size + small], rtol=1e-6, atol=1e-15)
    loss.sum().backward()
    p = np.exp(-size) / (1 + np.exp(-size))
    np.testing.assert_allclose(x.grad.numpy(), [[-p, p], [1 - p, p - 1]], rtol=1e-5, atol=1e-15)
    assert x.grad.dtype == dtype


def test_a_confident_float32_row_keeps_its_small_loss():
    x = np.zeros((1, 2), np.float32)
    x[0, 0] = 15
    found = tt.cross_entropy(x, np.array([0]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, np.log1p(np.exp(-15.0)), rtol=0.2)
    assert found >= 0


def test_masked_classes():
    """-inf is a class that cannot be: probability 0, no gradient, no NaN."""
    x = np.array([[1.0, -INF, 2.0], [0.0, 3.0, -INF]])
    logits = tt.tensor(x, requires_grad=True)
    tt.cross_entropy(logits, np.array([0, 1]), reduction="sum").backward()
    grad = logits.grad.numpy()
    assert grad[0, 1] == grad[1, 2] == 0.0 and np.isfinite(grad).all()
    expected = np.log1p(np.exp(1.0)) + np.log1p(np.exp(-3.0))
    assert tt.cross_entropy(x, np.array([0, 1]), reduction="sum") == pytest.approx(expected)
    for f in (tt.softmax, tt.log_softmax):
        y = tt.tensor(x, requires_grad=True)
        f(y)[:, 0].sum().backward()
        assert np.isfinite(y.grad.numpy()).all()


def test_a_target_that_cannot_be():
    logits = tt.tensor([[0.0, -INF]], requires_grad=True)
    loss = tt.cross_entropy(logits, np.array([1]))
    loss.backward()
    assert loss.item() == INF and logits.grad.tolist() == [[1.0, -1.0]]


def test_a_row_without_any_class_is_nan_as_in_pytorch():
    x = np.full((1, 3), -INF)
    assert np.isnan(tt.softmax(x)).all() and np.isnan(tt.log_softmax(x)).all()
    assert np.isnan(tt.cross_entropy(x, np.array([0])))


# ---- kinds of target ------------------------------------------------------------------------------------------------


def test_one_row_and_every_kind_of_class_number():
    x = logits_of(4)
    expected = -tt.log_softmax(x)[2].item()
    for target in (2, np.int32(2), np.array(2, np.uint8), tt.tensor(2)):
        assert tt.cross_entropy(x, target).item() == pytest.approx(expected)
    assert tt.cross_entropy(logits_of(3, 4), [0, 1, 2]).shape == ()


def test_targets_of_the_callers_own():
    x, target = logits_of(2, 3), np.array([0, 1])
    loss = tt.cross_entropy(x, target)
    target[:] = 2
    loss.backward()
    assert x.grad.numpy()[0, 0] < 0 and x.grad.numpy()[1, 1] < 0


def test_probabilities_of_one_are_class_numbers():
    x = logits_of(4, 3)
    target = np.array([0, 2, 1, 1])
    hot = np.eye(3)[target]
    for options in ({}, {"label_smoothing": 0.3}, {"reduction": "sum", "weight": np.array([1.0, 2.0, 3.0])}):
        found = [tt.gradient(tt.cross_entropy(x, t, **options), [x])[0].numpy() for t in (target, hot)]
        np.testing.assert_allclose(found[0], found[1], rtol=1e-12)


def test_weights_in_another_dtype():
    x = logits_of(4, 3, dtype="float32")
    loss = tt.cross_entropy(x, np.array([0, 2, 1, 1]), weight=np.array([1.0, 2.0, 3.0]))
    assert loss.dtype == np.float32
    assert tt.cross_entropy(x, np.array([0, 2, 1, 1]), weight=[1, 2, 3]).dtype == np.float32
    weight = tt.tensor([1.0, 2.0, 3.0])
    assert tt.cross_entropy(x, np.array([0, 2, 1, 1]), weight=weight).item() == pytest.approx(loss.item())


# ---- refused --------------------------------------------------------------------------------------------------------


def test_targets_out_of_range_are_named_with_their_place():
    target = np.zeros((2, 3), int)
    target[1, 2] = 7
    with refused(tt.InputError, "target 7 at position (1, 2) is out of range for 5 classes", "0 to 4", "-100"):
        tt.cross_entropy(logits_of(2, 3, 5), target)
    with refused(tt.InputError, "target -1 at position (0,)"):
        tt.cross_entropy(logits_of(1, 5), np.array([-1]))
    with refused(tt.InputError, "target 5 is out of range"):
        tt.cross_entropy(logits_of(5), 5)


@pytest.mark.parametrize(
    ("target", "error", "pieces"),
    [
        (np.zeros(3, int), tt.ShapeError, ["target has shape (3,)", "(2, 3)"]),
        (np.zeros((2, 5), int), tt.ShapeError, ["(2, 5)", "moveaxis"]),
        (np.zeros((2, 3, 5), int), tt.ShapeError, ["(2, 3, 5)"]),
        (np.zeros((2, 3)), tt.DTypeError, ["float64[2, 3]", "astype"]),
        (np.zeros((2, 5)), tt.ShapeError, ["float64[2, 5]", "logits' shape"]),
        (np.zeros((2, 3), bool), tt.DTypeError, ["bool"]),
    ],
)
def test_targets_that_do_not_fit(target, error, pieces):
    with refused(error, *pieces):
        tt.cross_entropy(logits_of(2, 3, 5), target)


@pytest.mark.parametrize(
    ("options", "error", "pieces"),
    [
        ({"weight": np.ones(3)}, tt.ShapeError, ["weight has shape (3,)", "5 classes"]),
        ({"weight": tt.tensor(np.ones(5), requires_grad=True)}, tt.InputError, ["weight.detach()"]),
        ({"label_smoothing": 1.1}, tt.InputError, ["label_smoothing is 1.1"]),
        ({"label_smoothing": -0.1}, tt.InputError, ["label_smoothing is -0.1"]),
        ({"label_smoothing": NAN}, tt.InputError, ["label_smoothing is nan"]),
        ({"reduction": "average"}, tt.InputError, ["'average'"]),
        ({"ignore_index": 0.5}, tt.DTypeError, ["ignore_index is 0.5"]),
        ({"ignore_index": None}, tt.DTypeError, ["ignore_index is None"]),
    ],
)
def test_options_that_are_refused(options, error, pieces):
    with refused(error, *pieces):
        tt.cross_entropy(logits_of(2, 5), np.array([0, 1]), **options)


def test_logits_that_are_refused():
    with refused(tt.DTypeError, "logits have dtype int64"):
        tt.cross_entropy(np.zeros((2, 3), int), np.zeros(2, int))
    with refused(tt.ShapeError, "logits have shape ()"):
        tt.cross_entropy(np.zeros(()), 0)
    with refused(tt.ShapeError, "logits have shape (2, 0)"):
        tt.cross_entropy(np.zeros((2, 0)), np.zeros(2, int))
    with refused(tt.InputError, "ignore_index is 1", "probabilities"):
        tt.cross_entropy(np.zeros((2, 3)), np.zeros((2, 3)), ignore_index=1)
    with pytest.raises(tt.ShapeError):
        tt.softmax(logits_of(2, 3), axis=2)


# ---- what the tape holds --------------------------------------------------------------------------------------------


def test_the_tape_keeps_the_logits_and_no_other_array_of_their_size():
    x = logits_of(64, 50)
    with tt.Tape() as tape:
        tt.cross_entropy(x * 1.0, np.zeros(64, int))
    assert [r.node.name for r in tape.records] == ["multiply", "cross_entropy", "sum", "divide"]
    kept = [k for k in tape.records[1].node.kept if isinstance(k, np.ndarray)]
    assert sum(k.nbytes for k in kept) <= x.nbytes + 64 * 8


def test_third_derivatives():
    x = tt.tensor(rng.normal(size=(3, 4)))
    target = np.array([0, 3, -100])
    f = lambda x: tt.cross_entropy(x, target, label_smoothing=0.1)  # noqa: E731
    g = lambda x: -tt.sum(tt.log_softmax(x)[[0, 1]] * (np.eye(4)[[0, 3]] * 0.9 + 0.025)) / 2  # noqa: E731

    def third(f):
        second = tt.grad(lambda x: tt.sum(tt.grad(f)(x) ** 3))
        return tt.grad(lambda x: tt.sum(second(x) ** 2))(x).numpy()

    np.testing.assert_allclose(third(f), third(g), rtol=1e-8, atol=1e-12)
