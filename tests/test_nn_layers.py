"""Linear, Embedding, LayerNorm, Dropout and nonlinearities."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinytape as tt
from tinytape import nn
from tinytape.nn import functional as F

leads = hnp.array_shapes(min_dims=0, max_dims=3, max_side=4)
sizes = st.integers(1, 5)


def compare(ours, theirs, x):
    """A module beside PyTorch's of the same parameters: values, gradients, gradients of squared gradients."""
    torch = pytest.importorskip("torch")
    theirs = theirs.double()
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in ours.state_dict().items()})
    floats = x.dtype.kind == "f"
    a, b = tt.tensor(x, requires_grad=floats), torch.tensor(x, requires_grad=floats)
    y, ty = ours(a), theirs(b)
    assert y.shape == tuple(ty.shape)
    np.testing.assert_allclose(y.data, ty.detach(), rtol=1e-9, atol=1e-9)
    weights = np.random.default_rng(1).normal(size=y.shape)
    sources = [a] * floats + list(ours.parameters())
    tsources = [b] * floats + list(theirs.parameters())
    with tt.Tape() as tape:
        first = tape.gradient((ours(a) ** 2 * weights).sum(), sources, create_graph=True)
        squares = sum((g**2).sum() for g in first)
    tfirst = torch.autograd.grad((theirs(b) ** 2 * torch.from_numpy(weights)).sum(), tsources, create_graph=True)
    squares.backward()
    sum((g**2).sum() for g in tfirst).backward()
    for source, g, tsource, tg in zip(sources, first, tsources, tfirst, strict=True):
        np.testing.assert_allclose(g.data, tg.detach(), rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(source.grad.data, tsource.grad, rtol=1e-6, atol=1e-6)


@pytest.mark.peer
@given(lead=leads, i=sizes, o=sizes, bias=st.booleans(), seed=st.integers(0, 99))
def test_linear_equals_pytorch(lead, i, o, bias, seed):
    torch = pytest.importorskip("torch")
    ours = nn.Linear(i, o, bias, generator=tt.Generator(seed), dtype=np.float64)
    compare(ours, torch.nn.Linear(i, o, bias), np.random.default_rng(seed).normal(size=(*lead, i)))


@pytest.mark.peer
@given(lead=leads, n=sizes, d=sizes, padding=st.booleans(), seed=st.integers(0, 99))
def test_embedding_equals_pytorch(lead, n, d, padding, seed):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(seed)
    padding_idx = int(rng.integers(-n, n)) if padding else None
    ours = nn.Embedding(n, d, padding_idx, generator=tt.Generator(seed), dtype=np.float64)
    compare(ours, torch.nn.Embedding(n, d, padding_idx), rng.integers(0, n, lead))


@pytest.mark.peer
@given(lead=leads, sides=hnp.array_shapes(min_dims=1, max_dims=2, min_side=2, max_side=4), bias=st.booleans())
def test_layer_norm_equals_pytorch(lead, sides, bias):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(len(lead))
    ours = nn.LayerNorm(sides, 1e-2, bias=bias, dtype=np.float64)
    for p in ours.parameters():
        nn.init.normal_(p, 1.0, 0.5, tt.Generator(0))
    compare(ours, torch.nn.LayerNorm(sides, 1e-2, bias=bias), rng.normal(size=(*lead, *sides)))


@pytest.mark.peer
@pytest.mark.parametrize("name", ["Tanh", "Sigmoid", "ReLU", "GELU", "SiLU", "Identity"])
def test_nonlinearities_equal_pytorch(name):
    torch = pytest.importorskip("torch")
    compare(getattr(nn, name)(), getattr(torch.nn, name)(), np.random.default_rng(0).normal(size=(3, 4)))


def test_derivatives_agree_with_finite_differences():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 3, 4))
    for layer in (nn.Linear(4, 2, dtype=np.float64), nn.LayerNorm((3, 4), dtype=np.float64)):
        names, values = zip(*((name, p.numpy()) for name, p in layer.named_parameters()), strict=True)

        def f(x, *values, layer=layer, names=names):
            return nn.functional_call(layer, dict(zip(names, values, strict=True)), x)

        tt.check_grads(f, [x, *values], order=2)
    table, tokens = nn.Embedding(5, 2, padding_idx=1), np.array([[0, 4, 4], [1, 2, 0]])
    tt.check_grads(lambda w: F.embedding(tokens, w), [table.double().weight.numpy()], order=2)


def test_layer_norm_without_parameters():
    x = np.random.default_rng(0).normal(size=(4, 6)).astype(np.float32) * 3 + 5
    y = np.asarray(nn.LayerNorm(6, elementwise_affine=False)(x))
    assert y.dtype == np.float32
    np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    np.testing.assert_allclose(y.std(-1), 1, rtol=1e-4)


def test_a_padding_row_stays():
    table = nn.Embedding(4, 2, padding_idx=-1)
    assert table.weight.data[3].tolist() == [0, 0]
    (table(np.array([3, 0, 3])) + 1).sum().backward()
    assert table.weight.grad.tolist() == [[1, 1], [0, 0], [0, 0], [0, 0]]


# ---- dropout --------------------------------------------------------------------------------------------------------


@given(p=st.sampled_from([0.0, 0.2, 0.5, 0.9, 1.0]), shape=hnp.array_shapes(min_dims=1, max_dims=3, max_side=6))
def test_dropout_keeps_and_scales(p, shape):
    x = tt.tensor(np.full(shape, 3.0), requires_grad=True)
    layer = nn.Dropout(p, generator=tt.Generator(0))
    y = layer(x)
    y.sum().backward()
    kept = y.data != 0
    np.testing.assert_allclose(y.data[kept], 3 / (1 - p) if p < 1 else 0)
    np.testing.assert_allclose(x.grad.data, y.data / 3)
    assert layer.eval()(x) is x


def test_dropout_rate_and_dtype():
    y = nn.Dropout(0.3, generator=tt.Generator(0))(np.ones(10_000, np.float32))
    assert y.dtype == np.float32 and abs((y == 0).mean() - 0.3) < 0.02


@pytest.mark.parametrize("axis", [0, 1, -2])
def test_one_mask_for_a_sequence(axis):
    x = np.ones((5, 6, 7), np.float32)
    y = nn.Dropout(0.5, "sequence", axis, generator=tt.Generator(0))(x)
    first = np.take(y, [0], axis)
    np.testing.assert_array_equal(y, np.broadcast_to(first, x.shape))
    assert 0 < (first == 0).mean() < 1
    free = nn.Dropout(0.5, generator=tt.Generator(0))(x)
    assert not np.array_equal(free, np.broadcast_to(np.take(free, [0], axis), x.shape))


def test_dropout_draws_from_its_generator_alone():
    tt.manual_seed(0)
    before = tt.default_generator.state()
    own = tt.Generator(1)
    layer = nn.Dropout(0.5, generator=own)
    state = own.state()
    layer(np.ones(3))
    np.testing.assert_array_equal(tt.default_generator.state(), before)
    assert not np.array_equal(own.state(), state)
    state = own.state()
    layer.eval()(np.ones(3))
    np.testing.assert_array_equal(own.state(), state)
    nn.Dropout()(np.ones(3))
    assert not np.array_equal(tt.default_generator.state(), before)


# ---- functional_call ------------------------------------------------------------------------------------------------


def test_functional_call_replaces_for_the_call_alone():
    model = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 3))
    model.append(nn.Linear(3, 3))
    model[3].weight = model[2].weight
    before, x = model[2].weight, np.ones((1, 2), np.float32)
    y = nn.functional_call(model, {"2.weight": np.zeros((3, 3), np.float32)}, x)
    expected = model[3].bias.data  # both products with the shared weight are 0
    np.testing.assert_array_equal(y.data[0], expected)
    assert model[2].weight is model[3].weight is before
    gradient = tt.grad(lambda w: nn.functional_call(model, {"0.weight": w}, x).sum())(model[0].weight.numpy())
    model(x).sum().backward()
    np.testing.assert_allclose(gradient, model[0].weight.grad.data, rtol=1e-6)
    with pytest.raises(tt.ShapeError):
        nn.functional_call(model, {"0.weight": before}, x)
    with pytest.raises(tt.ShapeError):
        nn.functional_call(model, {}, np.ones((1, 7), np.float32))
    with pytest.raises(tt.InputError, match=r"no parameter '9\.weight'.*\n.*0\.weight"):
        nn.functional_call(model, {"9.weight": before}, x)
    assert model[2].weight is before and isinstance(model[0].weight, nn.Parameter)


# ---- bad input ------------------------------------------------------------------------------------------------------

X = np.zeros((2, 3), np.float32)

BAD = {
    "features": (lambda: nn.Linear(4, 2)(X), tt.ShapeError, r"x has shape \(2, 3\).*in_features = 4, got 3"),
    "no axes": (lambda: nn.Linear(4, 2)(np.float32(1)), tt.DTypeError, "x is a float32"),
    "0-d": (lambda: nn.Linear(4, 2)(np.array(1, np.float32)), tt.ShapeError, r"x has shape \(\)"),
    "float64": (lambda: nn.Linear(3, 2)(X.astype(float)), tt.DTypeError, "x is float64, the parameters are float32"),
    "float32": (lambda: nn.Linear(3, 2).double()(X), tt.DTypeError, "x is float32, the parameters are float64"),
    "list": (lambda: nn.Linear(3, 2)([1.0, 2.0, 3.0]), tt.DTypeError, "x is a list"),
    "negative size": (lambda: nn.Linear(-1, 2), tt.InputError, "in_features is -1"),
    "size": (lambda: nn.Linear(2, 2.0), tt.InputError, "out_features is 2.0"),
    "dtype": (lambda: nn.Linear(2, 2, dtype=np.int64), tt.DTypeError, "int64"),
    "token": (lambda: nn.Embedding(3, 2)(np.array([[0, 3]])), tt.InputError, r"token 3 at position \(0, 1\).* 3 rows"),
    "negative token": (lambda: nn.Embedding(3, 2)(np.array([-1])), tt.InputError, "token -1"),
    "float tokens": (lambda: nn.Embedding(3, 2)(np.array([1.0])), tt.DTypeError, "float64"),
    "padding": (lambda: nn.Embedding(3, 2, 3), tt.InputError, "padding_idx is 3; there are 3"),
    "no rows": (lambda: nn.Embedding(0, 2), tt.InputError, "num_embeddings is 0"),
    "norm shape": (lambda: nn.LayerNorm(4)(X), tt.ShapeError, r"x has shape \(2, 3\).*\(4,\)"),
    "norm axes": (lambda: nn.LayerNorm((1, 2, 3))(X), tt.ShapeError, r"\(1, 2, 3\)"),
    "norm dtype": (lambda: nn.LayerNorm(3)(X.astype(float)), tt.DTypeError, "x is float64"),
    "norm of none": (lambda: nn.LayerNorm(()), tt.ShapeError, "normalized_shape"),
    "norm of 0": (lambda: nn.LayerNorm((2, 0)), tt.InputError, r"normalized_shape\[1\] is 0"),
    "p": (lambda: nn.Dropout(1.1), tt.InputError, "p is 1.1"),
    "p of another kind": (lambda: nn.Dropout(None), tt.InputError, "p is None"),
    "dropout of integers": (lambda: nn.Dropout(0.3)(np.ones(3, int)), tt.DTypeError, "x is int"),
    "dropout of a list": (lambda: nn.Dropout(0.3)([1.0, 2.0]), tt.DTypeError, "x is a list"),
    "layer norm of a list": (lambda: nn.LayerNorm(2, elementwise_affine=False)([1.0, 2.0]), tt.DTypeError, "a list"),
    "per": (lambda: nn.Dropout(0.1, per="batch"), tt.InputError, "per is 'batch'"),
    "time axis": (lambda: nn.Dropout(0.1, "sequence", 2)(X), tt.ShapeError, r"axis 2 of x of shape \(2, 3\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=r"(?s)" + words) as caught:
        call()
    assert "\n  help: " in str(caught.value)
