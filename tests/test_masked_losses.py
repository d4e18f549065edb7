"""Losses over the elements that count: equal to those of the elements alone, whatever stands in the others."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import nn
from tinytape.nn import functional as F

LOSSES = {
    "mse": lambda a, b, **o: F.mse_loss(a, b, **o),
    "mse, weighted": lambda a, b, **o: F.mse_loss(a, b, weight=0.5 + (b.data if isinstance(b, tt.Tensor) else b), **o),
    "l1": F.l1_loss,
    "huber": lambda a, b, **o: F.huber_loss(a, b, delta=0.3, **o),
    "huber, weighted": lambda a, b, **o: F.huber_loss(a, b, weight=np.full(a.shape, 2.0), **o),
    "smooth l1": lambda a, b, **o: F.smooth_l1_loss(a, b, beta=0.3, **o),
    "smooth l1 of 0": lambda a, b, **o: F.smooth_l1_loss(a, b, beta=0, **o),
    "pinball": lambda a, b, **o: F.pinball_loss(a, b, 0.3, **o),
    "gaussian": lambda a, b, **o: F.gaussian_nll_loss(a, b, b, **o),
    "gaussian, a variance a step": lambda a, b, **o: F.gaussian_nll_loss(a, b, b[..., 0], **o),
    "binary": lambda a, b, **o: F.binary_cross_entropy_with_logits(a, b, pos_weight=[2.0], **o),
}


@pytest.mark.parametrize("loss", LOSSES)
@given(flags=st.lists(st.booleans(), min_size=6, max_size=6), full=st.booleans(), seed=st.integers(0, 9))
def test_a_masked_loss_is_that_of_the_real_steps(loss, flags, full, seed):
    """Values and gradients, by every reduction; what stands in the padding, NaN, reaches neither."""
    f, rng = LOSSES[loss], np.random.default_rng(seed)
    mask = np.array(flags).reshape(3, 2)
    a, b = rng.uniform(0.1, 1, size=(2, 3, 2, 4))
    x, real = tt.tensor(a, requires_grad=True), tt.tensor(a[mask], requires_grad=True)
    with tt.no_grad():
        x[~mask] = np.nan
    target = tt.tensor(b, requires_grad=True)
    if loss != "mse, weighted":  # a weight has to be a number
        with tt.no_grad():
            target[~mask] = np.nan
    given_mask = np.repeat(mask[..., None], 4, -1) if full else mask
    for reduction in ("mean", "sum"):
        x.grad = target.grad = real.grad = None
        found = f(x, target, mask=given_mask, reduction=reduction)
        found.backward()
        assert not x.grad.data[~mask].any() and not target.grad.data[~mask].any()
        if mask.any():
            expected = f(real, b[mask], reduction=reduction)
            expected.backward()
            np.testing.assert_allclose(found.item(), expected.item(), rtol=1e-12)
            np.testing.assert_allclose(x.grad.data[mask], real.grad.data, rtol=1e-12, atol=1e-15)
        else:
            assert found.item() == 0
    each = f(x, target, mask=given_mask, reduction="none").data
    np.testing.assert_allclose(each[mask], f(real, b[mask], reduction="none").data, rtol=1e-12)
    assert not each[~mask].any()


def test_masked_quantiles_and_modules():
    rng, mask = np.random.default_rng(0), np.array([[True, False], [True, True]])
    x, y = rng.normal(size=(2, 2, 3)), rng.normal(size=(2, 2))
    found = F.pinball_loss(tt.tensor(x), y, [0.1, 0.5, 0.9], mask=mask).item()
    assert found == pytest.approx(F.pinball_loss(tt.tensor(x[mask]), y[mask], [0.1, 0.5, 0.9]).item(), rel=1e-12)
    a, b = rng.uniform(size=(2, 2, 2))
    modules = [
        nn.MSELoss(),
        nn.L1Loss(),
        nn.HuberLoss(),
        nn.SmoothL1Loss(),
        nn.PinballLoss(0.3),
        nn.BCEWithLogitsLoss(),
    ]
    for module in modules:
        assert module(tt.tensor(a), b, mask=mask).item() == pytest.approx(module(tt.tensor(a[mask]), b[mask]).item())
    found = nn.GaussianNLLLoss()(tt.tensor(a), b, 0.5, mask=tt.tensor(mask)).item()
    assert found == pytest.approx(nn.GaussianNLLLoss()(tt.tensor(a[mask]), b[mask], 0.5).item())


def test_weights_that_are_all_zero_give_zero():
    x = tt.tensor(np.ones((2, 3), np.float32), requires_grad=True)
    loss = F.mse_loss(x, np.zeros((2, 3), np.float32), weight=np.zeros((2, 3)))
    loss.backward()
    assert loss.item() == 0 and loss.dtype == np.float32 and not x.grad.data.any()


def test_a_mask_that_was_passed_in_may_be_written():
    x, mask = tt.tensor(np.ones((2, 3)), requires_grad=True), np.array([True, False])
    loss = F.mse_loss(x, np.zeros((2, 3)), mask=mask)
    mask[:] = True
    loss.backward()
    assert not x.grad.data[1].any()


Z, M = np.zeros((4, 2, 3)), np.ones((4, 2), bool)

BAD = {
    "a loss's mask": (lambda: F.mse_loss(Z, Z, mask=M.T), tt.ShapeError, r"shape \(2, 4\), input has \(4, 2, 3\)"),
    "a mask that broadcasts": (lambda: F.l1_loss(Z, Z, mask=M[..., None]), tt.ShapeError, r"\(4, 2, 1\)"),
    "a mask of floats": (lambda: F.mse_loss(Z, Z, mask=Z), tt.DTypeError, "mask is float64"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n  help: " in str(caught.value)
