"""Clipping: values against the formula and against PyTorch, and what cannot be clipped."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape.optim import clip_grad_norm_, clip_grad_value_

SHAPES = [(3,), (2, 4), (), (0, 5)]
orders = st.sampled_from([0.5, 1.0, 2.0, 2, 3.5, math.inf])
seeds = st.integers(0, 2**31)


def gradients(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return [np.asarray(rng.normal(size=shape) * scale) for shape in SHAPES]


def leaves(arrays, dtype=np.float64):
    params = [tt.tensor(np.zeros(g.shape, dtype), requires_grad=True) for g in arrays]
    for p, g in zip(params, arrays, strict=True):
        p.grad = g.astype(dtype)
    return params


def grads(params):
    return [None if p.grad is None else p.grad.numpy() for p in params]


@given(seed=seeds, order=orders, max_norm=st.floats(1e-3, 1e3))
def test_norm(seed, order, max_norm):
    given = gradients(seed)
    params = leaves(given)
    flat = np.concatenate([g.ravel() for g in given])
    norm = np.abs(flat).max() if order == math.inf else (np.abs(flat) ** order).sum() ** (1 / order)
    assert clip_grad_norm_(params, max_norm, order) == pytest.approx(norm, rel=1e-12)
    scale = min(1.0, max_norm / (norm + 1e-6))
    for g, p in zip(given, grads(params), strict=True):
        np.testing.assert_allclose(p, g * scale, rtol=1e-12)


@pytest.mark.peer
@given(seed=seeds, order=orders, bound=st.floats(1e-3, 1e3))
def test_both_are_pytorchs(seed, order, bound):
    torch = pytest.importorskip("torch")
    given = [g for g in gradients(seed) if g.size]  # PyTorch has no largest value of nothing
    for which in ("norm", "value"):
        ours, theirs = leaves(given), []
        for g in given:
            theirs.append(torch.zeros(g.shape, dtype=torch.float64, requires_grad=True))
            theirs[-1].grad = torch.tensor(g)
        if which == "norm":
            norm = torch.nn.utils.clip_grad_norm_(theirs, bound, order)
            assert clip_grad_norm_(ours, bound, order) == pytest.approx(float(norm), rel=1e-9)
        else:
            torch.nn.utils.clip_grad_value_(theirs, bound)
            clip_grad_value_(ours, bound)
        for p, g in zip(theirs, grads(ours), strict=True):
            np.testing.assert_allclose(g, p.grad.numpy(), rtol=1e-9)


@given(seed=seeds, bound=st.floats(1e-3, 3))
def test_value(seed, bound):
    given = gradients(seed)
    params = leaves(given)
    clip_grad_value_(params, bound)
    for g, p in zip(given, grads(params), strict=True):
        assert np.array_equal(p, np.maximum(np.minimum(g, bound), -bound))


def test_value_clips_infinity():
    (p,) = leaves([np.array([np.inf, 0.5, -np.inf])])
    clip_grad_value_(p, 2.0)
    assert p.grad.tolist() == [2.0, 0.5, -2.0]


@pytest.mark.parametrize("scale", [1e-25, 1e-10, 1.0, 1e18, 1e25, 1e37])
def test_float32_norms_neither_overflow_nor_vanish(scale):
    given = gradients(1, scale)
    norm = math.sqrt(sum(float((g / scale * (g / scale)).sum()) for g in given)) * scale
    params = leaves(given, np.float32)
    assert clip_grad_norm_(params, math.inf) == pytest.approx(norm, rel=1e-5)
    assert all(g.dtype == np.float32 for g in grads(params))


def test_below_the_bound_nothing_is_touched():
    params = leaves(gradients(0))
    before = [p.grad for p in params]
    clip_grad_norm_(params, 1e9)
    assert all(p.grad is g for p, g in zip(params, before, strict=True))
    for p, g in zip(params, gradients(0), strict=True):
        assert np.array_equal(p.grad.data, g)


def test_how_parameters_may_be_given():
    class Module:
        def named_parameters(self):
            return iter([("w", p)])

    for wrap in (lambda p: p, lambda p: [p], lambda p: iter([p]), lambda p: {"w": p}, lambda p: Module()):
        (p,) = leaves([np.array([3.0, 4.0])])
        assert clip_grad_norm_(wrap(p), 1.0) == 5.0
        np.testing.assert_allclose(p.grad.data, [0.6, 0.8], rtol=1e-6)


def test_no_gradients_and_shared_parameters():
    bare = tt.tensor(np.ones(3), requires_grad=True)
    assert clip_grad_norm_([bare, tt.tensor(1.0)], 1.0) == 0.0 and clip_grad_norm_([], 1.0) == 0.0
    clip_grad_value_([bare], 1.0)
    (p,) = leaves([np.array([3.0, 4.0])])
    assert clip_grad_norm_([p, bare, p], 1.0) == 5.0  # a shared parameter counts once and is scaled once
    np.testing.assert_allclose(p.grad.data, [0.6, 0.8], rtol=1e-6)


def test_a_recorded_gradient_becomes_a_constant():
    x = tt.tensor(np.array([3.0, 4.0]), requires_grad=True)
    (x * x * x).sum().backward(create_graph=True)
    assert x.grad.requires_grad
    clip_grad_norm_(x, 1.0)
    assert not x.grad.requires_grad and np.linalg.norm(x.grad.data) == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("order", [1.0, 2.0, math.inf])
def test_a_norm_that_is_not_finite_is_refused_and_nothing_changed(bad, order):
    good, broken = leaves([np.ones(4), np.array([1.0, bad, 2.0])])
    with pytest.raises(tt.InputError) as caught:
        clip_grad_norm_({"cell.weight": good, "head.bias": broken}, 1.0, order)
    text = str(caught.value)
    assert "head.bias (shape (3,)) has" in text and "1 " in text and "of 3" in text and "cell.weight" not in text
    assert "Nothing was changed" in text and "help:" in text
    assert good.grad.tolist() == [1.0] * 4 and broken.grad.tolist()[0::2] == [1.0, 2.0]


def test_a_nan_is_no_value_to_clip():
    good, broken = leaves([np.full(4, 9.0), np.array([9.0, np.nan])])
    with pytest.raises(tt.InputError, match=r"1 \(shape \(2,\)\) has 1 NaN and 0 infinite of 2 entries"):
        clip_grad_value_([good, broken], 1.0)
    assert good.grad.tolist() == [9.0] * 4 and broken.grad.tolist()[0] == 9.0


@pytest.mark.parametrize("bad", [0, 0.0, -1.0, math.nan])
def test_bounds_out_of_range(bad):
    params = leaves([np.ones(2)])
    for call, name in (
        (lambda: clip_grad_norm_(params, bad), "max_norm"),
        (lambda: clip_grad_norm_(params, 1.0, bad), "norm_type"),
        (lambda: clip_grad_value_(params, bad), "clip_value"),
    ):
        with pytest.raises(tt.InputError, match=rf"{name} is {bad}; it must be in \(0, inf\].*"):
            call()
    assert params[0].grad.tolist() == [1.0, 1.0]


@pytest.mark.parametrize("bad", ["1", None, True, [1.0]])
def test_bounds_that_are_not_numbers(bad):
    with pytest.raises(tt.DTypeError, match="max_norm is"):
        clip_grad_norm_(leaves([np.ones(2)]), bad)


@pytest.mark.parametrize("bad", [3, None, "w", [np.zeros(2)], {1: 2}])
def test_what_is_not_parameters(bad):
    for clip in (clip_grad_norm_, clip_grad_value_):
        with pytest.raises(tt.DTypeError, match=rf"{clip.__name__}: params"):
            clip(bad, 1.0)
