"""Losses: against PyTorch, closed forms and finite differences, and what they refuse."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinytape as tt
from tinytape import nn
from tinytape.nn import functional as F

reductions = st.sampled_from(["mean", "sum", "none"])
shapes = hnp.array_shapes(min_dims=0, max_dims=3, max_side=4)


def draw_pair(shape, seed):
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape)


def total(x):
    return x.sum() if x.ndim else x


def compare(ours, theirs, arrays):
    """Values, gradients and the gradients of the squared gradients, for all of `arrays`."""
    torch = pytest.importorskip("torch")
    a = [tt.tensor(x, requires_grad=True) for x in arrays]
    b = [torch.tensor(x, requires_grad=True) for x in arrays]
    x, y = ours(*a), theirs(*b)
    assert x.shape == tuple(y.shape)
    np.testing.assert_allclose(x.data, y.detach(), rtol=1e-9, atol=1e-12)
    with tt.Tape() as tape:
        first = [g for g in tape.gradient(total(ours(*a)), a, create_graph=True) if g is not None]
        squares = sum((g**2).sum() for g in first)
    tfirst = torch.autograd.grad(total(theirs(*b)), b, create_graph=True)
    for g, tg in zip(first, tfirst, strict=True):
        np.testing.assert_allclose(g.data, tg.numpy(force=True), rtol=1e-9, atol=1e-12)
    if squares.requires_grad:
        squares.backward()
        sum((g**2).sum() for g in tfirst).backward()
        for x, y in zip(a, b, strict=True):
            found = np.zeros(x.shape) if x.grad is None else x.grad.data
            np.testing.assert_allclose(
                found, np.zeros(x.shape) if y.grad is None else y.grad.numpy(force=True), rtol=1e-8, atol=1e-11
            )


# ---- against PyTorch ------------------------------------------------------------------------------------------------


@pytest.mark.peer
@given(shape=shapes, seed=st.integers(0, 99), reduction=reductions, scale=st.floats(0.1, 3), weighted=st.booleans())
@pytest.mark.parametrize("name", ["mse_loss", "l1_loss", "huber_loss", "smooth_l1_loss"])
def test_regression_losses_equal_pytorch(name, shape, seed, reduction, scale, weighted):
    torch = pytest.importorskip("torch")
    options, toptions = {"reduction": reduction}, {"reduction": reduction}
    if name in ("huber_loss", "smooth_l1_loss"):
        options["delta" if name == "huber_loss" else "beta"] = scale
        toptions.update(options)
    if weighted and name != "smooth_l1_loss":
        weight = np.random.default_rng(seed).uniform(0.1, 1, shape)
        options["weight"], toptions["weight"] = weight, torch.tensor(weight)
    compare(
        lambda a, b: getattr(F, name)(a, b, **options),
        lambda a, b: getattr(torch.nn.functional, name)(a, b, **toptions),
        draw_pair(shape, seed),
    )


@pytest.mark.peer
@given(
    shape=hnp.array_shapes(min_dims=1, max_dims=3, max_side=4),
    seed=st.integers(0, 99),
    reduction=reductions,
    full=st.booleans(),
    form=st.sampled_from(["same", "one", "first", "none", "float"]),
    small=st.booleans(),
)
def test_gaussian_nll_equals_pytorch(shape, seed, reduction, full, form, small):
    torch = pytest.importorskip("torch")
    options = {"full": full, "reduction": reduction}
    if small:
        options["eps"] = 1.5
    forms = {"one": (*shape[:-1], 1), "first": (1, *shape[1:]), "none": shape[:-1]}
    var = np.random.default_rng(seed).uniform(0.5, 2.5, forms.get(form, shape))
    theirs = torch.nn.functional.gaussian_nll_loss
    if form == "float":
        compare(
            lambda a, b: F.gaussian_nll_loss(a, b, 1.2, **options),
            lambda a, b: theirs(a, b, 1.2, **options),
            draw_pair(shape, seed),
        )
        return
    compare(
        lambda a, b, v: F.gaussian_nll_loss(a, b, v, **options),
        lambda a, b, v: theirs(a, b, v, **options),
        (*draw_pair(shape, seed), var),
    )


@pytest.mark.peer
@given(shape=shapes, seed=st.integers(0, 99), reduction=reductions, weighted=st.booleans(), positive=st.booleans())
def test_binary_cross_entropy_equals_pytorch(shape, seed, reduction, weighted, positive):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=shape) * 4, rng.uniform(0, 1, shape)
    weight = rng.uniform(0.5, 2, shape[-1:]) if weighted else None
    pos_weight = rng.uniform(0.5, 2, shape[-1:]) if positive else None
    as_torch = lambda v: None if v is None else torch.tensor(v)  # noqa: E731
    compare(
        lambda a: F.binary_cross_entropy_with_logits(a, y, weight, reduction, pos_weight),
        lambda a: torch.nn.functional.binary_cross_entropy_with_logits(
            a, torch.tensor(y), as_torch(weight), reduction=reduction, pos_weight=as_torch(pos_weight)
        ),
        (x,),
    )


@pytest.mark.peer
@given(
    lead=hnp.array_shapes(min_dims=0, max_dims=2, max_side=4),
    classes=st.integers(1, 5),
    seed=st.integers(0, 99),
    reduction=reductions,
    weighted=st.booleans(),
    ignored=st.booleans(),
)
@pytest.mark.parametrize("name", ["nll_loss", "cross_entropy"])
def test_class_losses_equal_pytorch(name, lead, classes, seed, reduction, weighted, ignored):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    x, target = rng.normal(size=(*lead, classes)), rng.integers(0, classes, lead)
    if ignored:
        target = np.where(rng.random(lead) < 0.3, -100, target)
    if not (target != -100).any():  # PyTorch's mean of nothing is NaN
        return
    weight = rng.uniform(0.5, 2, classes) if weighted else None
    tweight = None if weight is None else torch.tensor(weight)

    def theirs(a):
        flat, t = a.reshape(-1, classes), torch.tensor(target).reshape(-1)
        loss = getattr(torch.nn.functional, name)(flat, t, tweight, reduction=reduction)
        return loss.reshape(lead) if reduction == "none" else loss

    compare(lambda a: getattr(F, name)(a, target, weight, reduction=reduction), theirs, (x,))


# ---- without a peer -------------------------------------------------------------------------------------------------


def test_closed_forms():
    x, y = np.array([1.0, 2.0, -3.0]), np.array([0.0, 2.5, 1.0])
    e = x - y
    assert F.mse_loss(x, y).item() == pytest.approx((e**2).mean())
    assert F.l1_loss(x, y, "sum").item() == pytest.approx(np.abs(e).sum())
    np.testing.assert_allclose(F.huber_loss(x, y, "none", 0.75).data, [0.75 * (1 - 0.375), 0.125, 0.75 * (4 - 0.375)])
    np.testing.assert_allclose(F.smooth_l1_loss(x, y, "none", 0.5).data, [0.75, 0.25, 3.75])
    np.testing.assert_allclose(F.smooth_l1_loss(x, y, "none", 0).data, np.abs(e))
    assert F.mse_loss(x, y, weight=np.array([1.0, 3.0, 0.0])).item() == pytest.approx((1 + 3 * 0.25) / 4)
    assert F.gaussian_nll_loss(x, y, 4.0, full=True, reduction="sum").item() == pytest.approx(
        -sum(-np.log(2 * np.sqrt(2 * np.pi)) - e**2 / 8)
    )
    assert F.binary_cross_entropy_with_logits(x, np.array([1.0, 0.0, 0.5]), reduction="none").tolist() == pytest.approx(
        [np.log1p(np.exp(-1)), np.log1p(np.exp(2)), np.log1p(np.exp(-3)) + 1.5]
    )


def test_pinball_loss():
    x, y = tt.tensor(np.array([1.0, 2.0, 3.0]), requires_grad=True), np.array([2.0, 2.0, 1.0])
    loss = F.pinball_loss(x, y, 0.9, "none")
    np.testing.assert_allclose(loss.data, [0.9, 0.0, 0.2])
    loss.sum().backward()
    np.testing.assert_allclose(x.grad.data, [-0.9, -0.9, 0.1])  # at a tie the target counts as not below
    several = tt.stack([x, x], axis=-1)
    both = F.pinball_loss(several, y, [0.9, 0.5], "none")
    np.testing.assert_allclose(both.data, np.stack([loss.data, [0.5, 0, 1]], -1))
    assert F.pinball_loss(several, y, [0.9, 0.5]).item() == pytest.approx(both.data.mean())


def test_the_minimum_of_the_pinball_loss_is_the_quantile():
    y = np.random.default_rng(0).normal(size=1001)
    values = np.linspace(-2, 2, 401)
    losses = [F.pinball_loss(np.full(1001, v), y, 0.2, "sum").item() for v in values]
    assert abs(values[np.argmin(losses)] - np.quantile(y, 0.2)) < 0.02


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_derivatives_agree_with_finite_differences(reduction):
    rng = np.random.default_rng(0)
    x, y, v = rng.normal(size=(3, 4)), rng.normal(size=(3, 4)), rng.uniform(0.5, 2, (3, 4))
    for loss in (F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss):
        tt.check_grads(lambda a, b, loss=loss: loss(a, b, reduction=reduction), [x, y], order=2)
    tt.check_grads(lambda a, b: F.pinball_loss(a, b, 0.3, reduction), [x, y], order=2)
    tt.check_grads(lambda a, b, c: F.gaussian_nll_loss(a, b, c, reduction=reduction), [x, y, v], order=2)
    tt.check_grads(lambda a, b: F.binary_cross_entropy_with_logits(a, b, reduction=reduction), [x, v], order=2)
    tt.check_grads(lambda a: F.nll_loss(tt.log_softmax(a), [0, 3, 1], reduction=reduction), [x], order=2)


@pytest.mark.parametrize("big", [-1e4, 1e4])
def test_binary_cross_entropy_of_large_logits(big):
    x = tt.tensor(np.full(2, big, np.float32), requires_grad=True)
    loss = F.binary_cross_entropy_with_logits(x, np.array([0, 1], np.float32), reduction="sum")
    loss.backward()
    assert loss.item() == pytest.approx(1e4) and np.isfinite(x.grad.data).all()


def test_ignored_targets_have_no_gradient_whatever_stands_there():
    x = tt.tensor(np.log([[0.5, 0.5], [0.9, 0.1], [1e-300, 1.0]]), requires_grad=True)
    with tt.no_grad():
        x[2] = -np.inf
    loss = F.nll_loss(x, np.array([1, 0, -100]))
    assert loss.item() == pytest.approx(-(np.log(0.5) + np.log(0.9)) / 2)
    loss.backward()
    np.testing.assert_allclose(x.grad.data, [[0, -0.5], [-0.5, 0], [0, 0]])
    assert F.nll_loss(x, np.array([7, 7, 7]), ignore_index=7).item() == 0


def test_float32_stays_float32():
    x, y = np.ones((2, 3), np.float32), np.zeros((2, 3), np.float32)
    for loss in (F.mse_loss, F.l1_loss, F.huber_loss, F.smooth_l1_loss, F.binary_cross_entropy_with_logits):
        assert loss(tt.tensor(x), y).dtype == np.float32
    assert F.mse_loss(tt.tensor(x), y, weight=np.ones((2, 3))).dtype == np.float32
    assert F.pinball_loss(tt.tensor(x), y, 0.1).dtype == np.float32
    assert F.pinball_loss(tt.tensor(x), y[:, 0], [0.1, 0.2, 0.3]).dtype == np.float32
    assert F.gaussian_nll_loss(tt.tensor(x), y, 1.0, full=True).dtype == np.float32
    assert F.nll_loss(tt.tensor(x), [0, 1], np.ones(3)).dtype == np.float32


def test_modules_are_the_functions():
    x, y = (tt.tensor(a) for a in draw_pair((3, 4), 0))
    pairs = [
        (nn.MSELoss("sum"), F.mse_loss(x, y, "sum")),
        (nn.L1Loss(), F.l1_loss(x, y)),
        (nn.HuberLoss("mean", 0.3), F.huber_loss(x, y, delta=0.3)),
        (nn.SmoothL1Loss(beta=0.3), F.smooth_l1_loss(x, y, beta=0.3)),
        (nn.PinballLoss(0.3), F.pinball_loss(x, y, 0.3)),
        (nn.BCEWithLogitsLoss(pos_weight=np.full(4, 2.0)), F.binary_cross_entropy_with_logits(x, y, pos_weight=[2.0])),
    ]
    for module, expected in pairs:
        assert module(x, y).item() == expected.item()
    variances = np.full((3, 4), 0.7)
    gaussian = nn.GaussianNLLLoss(full=True)(x, y, variances)
    assert gaussian.item() == F.gaussian_nll_loss(x, y, variances, True).item()
    classes, weight = np.array([0, 3, 1]), np.array([1.0, 2.0, 3.0, 4.0])
    smooth = nn.CrossEntropyLoss(weight, label_smoothing=0.1)
    assert smooth(x, classes).item() == F.cross_entropy(x, classes, weight, label_smoothing=0.1).item()
    assert nn.NLLLoss(weight)(x, classes).item() == F.nll_loss(x, classes, weight).item()
    assert list(smooth.state_dict()) == ["weight"] and not list(smooth.parameters())
    assert smooth.to("float32").weight.dtype == np.float32


# ---- bad input ------------------------------------------------------------------------------------------------------

X, Y, C = np.zeros((2, 3), np.float32), np.zeros((2, 3), np.float32), np.array([0, 2])

BAD = {
    "broadcast": (lambda: F.mse_loss(X[:, :1], X[:, 0]), tt.ShapeError, r"\(2, 1\), target has \(2,\)"),
    "other shape": (lambda: F.l1_loss(X, X[0]), tt.ShapeError, r"\(2, 3\), target has \(3,\)"),
    "float64 target": (lambda: F.huber_loss(X, Y.astype(float)), tt.DTypeError, "target is float64, input is float32"),
    "list": (lambda: F.mse_loss([1.0], X), tt.DTypeError, "input is a list"),
    "target a list": (lambda: F.mse_loss(X, [1.0]), tt.DTypeError, "target is a list"),
    "reduction": (lambda: F.mse_loss(X, Y, "avg"), tt.InputError, "reduction is 'avg'"),
    "delta": (lambda: F.huber_loss(X, Y, delta=0), tt.InputError, "delta is 0"),
    "weight's shape": (lambda: F.mse_loss(X, Y, weight=X[0]), tt.ShapeError, r"weight has shape \(3,\)"),
    "weight's axes": (lambda: F.mse_loss(X, Y, weight=X[None]), tt.ShapeError, r"weight has shape \(1, 2, 3\)"),
    "quantile": (lambda: F.pinball_loss(X, Y, 1.0), tt.InputError, "quantile is 1.0"),
    "quantiles": (lambda: F.pinball_loss(X, Y, [0.5]), tt.ShapeError, r"\(2, 3\) for 1 quantiles"),
    "negative var": (lambda: F.gaussian_nll_loss(X, Y, X - 1), tt.InputError, "negative"),
    "var's shape": (lambda: F.gaussian_nll_loss(X, Y, X[0]), tt.ShapeError, r"var has shape \(3,\)"),
    "var's axes": (lambda: F.gaussian_nll_loss(X, Y, X[:1, :1]), tt.ShapeError, r"var has shape \(1, 1\)"),
    "integers": (lambda: F.mse_loss(X.astype(int), Y.astype(int)), tt.DTypeError, "input is int64"),
    "quantiles of a list": (lambda: F.pinball_loss([1.0], Y, [0.5]), tt.DTypeError, "input is a list"),
    "log-probabilities": (lambda: F.nll_loss(X.astype(int), C), tt.DTypeError, "input is int64"),
    "pos_weight": (
        lambda: F.binary_cross_entropy_with_logits(X, Y, pos_weight=[1.0, 2.0]), tt.ShapeError, "pos_weight"
    ),
    "class out of range": (lambda: F.nll_loss(X, np.array([0, 3])), tt.InputError, "target 3 .* 3 classes"),
    "negative class": (lambda: F.nll_loss(X, np.array([0, -1])), tt.InputError, "target -1"),
    "target's shape": (lambda: F.nll_loss(X, np.array([[0], [1]])), tt.ShapeError, r"\(2, 1\)"),
    "target's dtype": (lambda: F.nll_loss(X, np.array([0.0, 1.0])), tt.DTypeError, "float64"),
    "class weights": (lambda: F.nll_loss(X, C, np.ones(2)), tt.ShapeError, r"\(2,\) for 3 classes"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n  help: " in str(caught.value)
