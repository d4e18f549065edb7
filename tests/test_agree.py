"""`agree`: that it finds what is wrong, names it, and leaves no trace."""

import numpy as np
import pytest

import tinytape as tt
from tinytape import nn
from tinytape.engine.tape import here
from tinytape.loop.switch import may_compile
from tinytape.nn import functional as F

PAIRS = [
    ("compiled", "eager"), ("compiled", "forward"), ("compiled", "differences"),
    ("eager", "forward"), ("eager", "differences"), ("forward", "differences"),
]  # fmt: skip
RNG = np.random.default_rng(0)
A, B = RNG.normal(size=(2, 3)), RNG.normal(size=(2, 3))


class Tagger(nn.Module):
    """A model with a scan in it, and dropout from a generator of its own and from the default one."""

    def __init__(self, dtype="float32"):
        own = tt.Generator(0)
        self.lstm = nn.LSTM(3, 4, 2, dropout=0.3, bidirectional=True, generator=own, dtype=dtype)
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 2, generator=own, dtype=dtype)

    def forward(self, x, lengths=None):
        return self.head(self.drop(self.lstm(x, lengths=lengths)[0]))


BATCH = RNG.normal(size=(5, 3, 3)).astype("f4"), [5, 0, 2], RNG.normal(size=(5, 3, 2)).astype("f4")


def error(model, x, lengths, y):
    return F.mse_loss(model(x, lengths), y)


# ---- where all is well ----------------------------------------------------------------------------------------------


def test_a_model_with_dropout_lengths_and_kernels():
    model, mode = Tagger(), tt.manual_seed(3)
    before, state, own = model.state_dict(), mode.state(), model.lstm.generator.state()
    found = tt.check.agree(model, BATCH, error, directions=1, eps=(1e-3, 1e-4))
    assert found, found
    assert found.kernels == 4 and [pair[:2] for pair in found.pairs] == PAIRS
    names = [name for name, _ in model.named_parameters()]
    assert list(found.gradients["eager"]) == list(found.slopes["forward"]) == names
    assert all(pair.gradient < 1e-12 for pair in found.pairs if "differences" not in pair)
    assert len({round(loss, 12) for loss in found.losses.values()}) == 1
    for name, value in model.state_dict().items():
        np.testing.assert_array_equal(value, before[name])
        assert value.dtype == np.float32
    assert all(p.grad is None for p in model.parameters()) and here.context.drawn is None
    np.testing.assert_array_equal(mode.state(), state)
    np.testing.assert_array_equal(model.lstm.generator.state(), own)


def test_the_gradients_are_those_of_the_model():
    model = Tagger("float64").eval()
    found = tt.check.agree(model, (A[:, None], None, np.zeros((2, 1, 2))), error, argnums=0, directions=2)
    x = tt.tensor(A[:, None], requires_grad=True)
    error(model, x, None, np.zeros((2, 1, 2))).backward()
    expected = {"batch[0]": x.grad} | {name: p.grad for name, p in model.named_parameters()}
    for way in ("compiled", "eager"):
        assert found.gradients[way].keys() == expected.keys()
        for name, gradient in expected.items():
            np.testing.assert_allclose(found.gradients[way][name], gradient.data, rtol=1e-10, atol=1e-14)
    assert found and found.slopes["differences"]["batch[0]"].shape == (2,)


def test_float32_as_it_is():
    model = nn.Linear(3, 2)
    found = tt.check.agree(model, (A.astype("f4"),), lambda m, x: tt.sin(m(x)).sum(), dtype=None, directions="all")
    assert found, found
    assert found.gradients["eager"]["weight"].dtype == np.float32
    assert max(pair.gradient for pair in found.pairs) > 1e-9  # the differences are those of float32
    assert "float32" in str(found)


def test_functions_of_nests():
    def f(state, scale, k):
        return (tt.tanh(state["h"]) * scale + state["c"][0] * k).sum()

    found = tt.check.agree(f, ({"h": A, "c": (B,)}, 2.0 * np.ones(3), 3))
    assert found and list(found.gradients["eager"]) == ["batch[0]['c'][0]", "batch[0]['h']", "batch[1]"]
    np.testing.assert_array_equal(found.gradients["eager"]["batch[0]['c'][0]"], np.full((2, 3), 3.0))
    assert list(tt.check.agree(f, ({"h": A, "c": (B,)}, np.ones(3), 3), argnums=[1]).slopes["eager"]) == ["batch[1]"]


def test_gradients_that_vanish_agree():
    """Of a shift that softmax takes out again there is rounding only, and of an argument not used nothing at all."""

    def f(x, shift, unused):
        return (tt.softmax(x + shift, axis=-1) * B).sum()

    found = tt.check.agree(f, (A, np.ones((2, 1)), B))
    assert found, found


# ---- where something is wrong ---------------------------------------------------------------------------------------


def sine(factor, tangent_factor=1.0):
    """An op whose rules are off by factors, anywhere or in entry (1, 2) alone."""

    @tt.op
    def wrong_sine(x):
        return np.sin(x)

    @wrong_sine.vjp
    def _(g, x):
        return g * np.cos(x) * factor

    @wrong_sine.jvp
    def _(dx, x):
        return dx * np.cos(x) * tangent_factor

    return wrong_sine


ONE_ENTRY = np.ones((2, 3))
ONE_ENTRY[1, 2] = 1 + 1e-5


def verdict(f, *batch, **options):
    found = tt.check.agree(f, batch, **options)
    assert not found and "<- disagree" in str(found) and found.verdict in str(found)
    return found


def test_a_wrong_forward_rule():
    op = sine(1.0, 1 + 1e-6)
    assert verdict(lambda x: op(x).sum(), A).verdict.startswith("'forward' disagrees with all others")


def test_a_wrong_derivative_in_every_mode():
    op = sine(1 + 1e-6, 1 + 1e-6)
    assert verdict(lambda x: op(x).sum(), A).verdict.startswith("'differences' disagrees with all others")


def test_a_wrong_kernel():
    def f(x):
        return (x**2).sum() * (1 + 1e-6 if may_compile() else 1)

    found = verdict(f, A)
    assert found.verdict.startswith("'compiled' disagrees with all others")
    assert found.pairs[0].value == pytest.approx(1e-6, rel=1e-3) and not found.pairs[0].ok and found.pairs[3].ok


def test_the_worst_entry_is_named():
    op = sine(ONE_ENTRY, ONE_ENTRY)
    found = verdict(lambda x, y: (op(x) + y).sum(), A, B, directions="all")
    pair = dict(zip(PAIRS, found.pairs, strict=True))["eager", "differences"]
    assert pair.worst == "batch[0]" and pair.entry.startswith("(1, 2): ")
    assert np.isnan(pair.value) and pair.gradient > pair.allowed


def test_a_small_parameter_is_not_hidden_by_a_large_one():
    op = sine(1 + 1e-4, 1 + 1e-4)
    found = verdict(lambda large, small: 1e4 * large.sum() + op(small).sum(), A, B)
    assert {pair.worst for pair in found.pairs if not pair.ok} == {"batch[1]"}


def test_two_wrongs_are_both_named():
    op = sine(1 + 1e-4, 1 + 1e-5)
    words = verdict(lambda x: op(x).sum(), A).verdict
    assert words.startswith("These disagree") and "eager and forward" in words and "forward and differences" in words
    assert "compiled and eager" not in words


def test_what_is_not_finite_does_not_agree():
    assert not tt.check.agree(lambda x: tt.log(x).sum(), (np.array([1.0, -1.0]),))
    assert not tt.check.agree(lambda x: (x * np.inf).sum(), (A,))


# ---- bad input ------------------------------------------------------------------------------------------------------

MODEL, OTHER = nn.Linear(3, 2), nn.Linear(3, 2)
X = A.astype("f4")
STREAM = np.random.default_rng(0)

BAD = {
    "no batch": (lambda: tt.check.agree(MODEL, X), tt.DTypeError, "batch is a ndarray"),
    "no scalar": (lambda: tt.check.agree(MODEL, (X,)), tt.ShapeError, r"the loss is float64\[2, 2\]"),
    "no tensor": (lambda: tt.check.agree(lambda x: 1.0, (A,)), tt.ShapeError, "the loss is a float"),
    "no floats": (lambda: tt.check.agree(lambda x: x, (3,)), tt.DTypeError, "nothing to differentiate"),
    "another model": (
        lambda: tt.check.agree(MODEL, (X,), lambda _, x: OTHER.to("float64")(x).sum()), tt.InputError,
        "depends on none of weight, bias",
    ),
    "argnums": (lambda: tt.check.agree(lambda x: x.sum(), (A,), argnums=1), tt.InputError, "has 1; batch has 1 arg"),
    "directions": (lambda: tt.check.agree(lambda x: x.sum(), (A,), directions=0), tt.InputError, "directions is 0"),
    "eps": (lambda: tt.check.agree(lambda x: x.sum(), (A,), eps=[1e-3]), tt.InputError, "eps is"),
    "noise": (lambda: tt.check.agree(lambda x: (x * STREAM.normal()).sum(), (A,)), tt.InputError, "in a second"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n  help: " in str(caught.value)
    assert here.context.drawn is None
