"""The truncation meter: against `scan(lookback=)`, streams, full BPTT, and a recurrence known in closed form."""

import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import nn
from tinytape.nn import functional as F


@pytest.fixture(autouse=True)
def step_by_step():
    with tt.no_compile():
        yield


def make(kind, *sizes, **options):
    return getattr(nn, kind)(*sizes, generator=tt.Generator(0), dtype=np.float64, **options)


def figures(short, full):
    """Cosine, ratio of norms and relative error of gradients by name."""
    a, b = (np.concatenate([g.ravel() for g in x]) for x in (short, full))
    norm = np.linalg.norm
    return a @ b / (norm(a) * norm(b)), norm(a) / norm(b), norm(a - b) / norm(b)


@given(
    kind=st.sampled_from(["RNNCell", "GRUCell", "LSTMCell"]),
    steps=st.integers(1, 9),
    depths=st.lists(st.integers(1, 10), min_size=1, max_size=4),
    with_state=st.booleans(),
)
def test_exact_depths_are_lookback(kind, steps, depths, with_state):
    cell, rng = make(kind, 2, 3), np.random.default_rng(steps)
    x, goal = rng.normal(size=(steps, 2, 2)), rng.normal(size=(steps, 2, 3))
    count = 2 if kind == "LSTMCell" else 1
    state = tuple(rng.normal(size=(2, 3)) for _ in range(count))
    state = (state if count == 2 else state[0]) if with_state else None
    parameters = list(cell.parameters())

    def loss(y):  # not a sum over steps
        return ((y * goal).sum() ** 2 + (y - goal).sum()) / 3

    def step(carry, x_t):
        after = cell(x_t, carry)
        return after, after[0] if count == 2 else after

    def by_scan(lookback):
        start = cell.initial_state(2) if state is None else state
        ys = tt.scan(step, start, x, lookback=lookback)[1]
        return [g.numpy() for g in tt.gradient(loss(ys), parameters)]

    found = tt.inspect.truncation(cell, loss, x, depths, state=state)
    assert found.k2.tolist() == sorted(set(depths))
    full = by_scan(None)
    for i, k in enumerate(found.k2):
        short = by_scan(int(k))
        wanted = figures(short, full)
        np.testing.assert_allclose((found.cosine[i], found.ratio[i]), wanted[:2], rtol=1e-9)
        np.testing.assert_allclose(found.error[i], wanted[2], rtol=1e-9, atol=1e-12)
        for name, a, b in zip(found.cosines, short, full, strict=True):
            if np.linalg.norm(a) > 1e-12:  # weights of a state of zeros may have none
                np.testing.assert_allclose((found.cosines[name][i], found.ratios[name][i]), figures([a], [b])[:2])
    assert found.norm == pytest.approx(np.sqrt(sum((g**2).sum() for g in full)))


@given(
    kind=st.sampled_from(["RNN", "GRU", "LSTM"]),
    layers=st.integers(1, 2),
    steps=st.integers(2, 8),
    k2=st.integers(1, 6),
    batch_first=st.booleans(),
    learned=st.booleans(),
    resets=st.booleans(),
)
def test_exact_depths_are_streams_with_a_window_a_step(kind, layers, steps, k2, batch_first, learned, resets):
    """For layers, both layouts, resets, and initial states that are learned."""
    layer = make(kind, 2, 3, layers, batch_first=batch_first, learn_initial_state=learned)
    rng = np.random.default_rng(steps)
    outside = (2, steps) if batch_first else (steps, 2)
    x, goal = rng.normal(size=(*outside, 2)), rng.normal(size=(*outside, 3))
    reset = rng.random(outside) < 0.3 if resets else None
    found = tt.inspect.truncation(layer, lambda y: (y * goal).sum(), x, [k2], reset=reset)
    parameters = list(layer.parameters())

    def total(k1, k2):
        for window in tt.truncated(layer, k1, k2)(x, goal, reset=reset):
            (window.y * window.targets).sum().backward()
        grads = [np.zeros(p.shape) if p.grad is None else p.grad.numpy() for p in parameters]
        layer.zero_grad()
        return grads

    wanted = figures(total(1, k2), total(steps, steps))
    np.testing.assert_allclose((found.cosine[0], found.ratio[0]), wanted[:2], rtol=1e-9)
    np.testing.assert_allclose(found.error[0], wanted[2], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("k1", [None, 2, 3])
def test_windows_are_those_of_a_stream(k1):
    layer, rng = make("LSTM", 2, 3), np.random.default_rng(0)
    x, goal = rng.normal(size=(13, 2, 2)), rng.normal(size=(13, 2, 3))
    found = tt.inspect.truncation(layer, lambda y: (y * goal).sum(), x, [3, 5, 20], k1=k1)
    (layer(x)[0] * goal).sum().backward()
    full = [p.grad.numpy() for p in layer.parameters()]
    for i, k2 in enumerate((3, 5, 20)):
        layer.zero_grad()
        for window in tt.truncated(layer, k1 or k2, k2)(x, goal):
            (window.y * window.targets).sum().backward()
        wanted = figures([p.grad.numpy() for p in layer.parameters()], full)
        np.testing.assert_allclose((found.cosine[i], found.ratio[i]), wanted[:2], rtol=1e-9)
        np.testing.assert_allclose(found.error[i], wanted[2], rtol=1e-9, atol=1e-12)


class Scale(nn.Module):
    """h' = w h + x."""

    def __init__(self, w):
        self.w = nn.Parameter(np.array(w))

    def initial_state(self, rows):
        return tt.zeros((rows, 1), dtype=np.float64)

    def forward(self, x, state):
        return self.w * state + x


def test_a_cell_that_has_to_be_given_a_state():
    class Bare(nn.Module):
        def __init__(self):
            self.inner = make("GRUCell", 2, 3)

        def forward(self, x, state):
            return self.inner(x, state)

    bare, rng = Bare(), np.random.default_rng(0)
    x, state = rng.normal(size=(6, 5, 2)), rng.normal(size=(5, 3))
    found = tt.inspect.truncation(nn.Recurrent(bare), lambda y: y.sum(), x, [2], state=state)
    wanted = tt.inspect.truncation(bare.inner, lambda y: y.sum(), x, [2], state=state)
    np.testing.assert_allclose(found.error, wanted.error, rtol=1e-12)
    assert list(found.cosines) == [f"cell.inner.{name}" for name in wanted.cosines]


def test_a_linear_recurrence_in_closed_form():
    """From x = 1 at the first step only, h at step t is w^t, and k2 of the t equal terms of its derivative are left."""
    w, steps = 0.9, 12
    x = np.zeros((steps, 1, 1))
    x[0] = 1
    k2 = np.arange(1, steps + 1)
    found = tt.inspect.truncation(Scale(w), lambda y: y[-1].sum(), x, k2)
    np.testing.assert_allclose(found.ratio, np.minimum(k2, steps - 1) / (steps - 1), rtol=1e-12)
    np.testing.assert_allclose(found.cosine, 1, rtol=1e-12)
    np.testing.assert_allclose(found.norm, (steps - 1) * w ** (steps - 2), rtol=1e-12)


def test_dropout_is_off_meanwhile_and_gradients_are_left_alone():
    layer = make("LSTM", 2, 3, 2, dropout=0.5)
    readout = nn.Linear(3, 2, generator=tt.Generator(0), dtype=np.float64)
    x, labels = np.random.default_rng(0).normal(size=(6, 2, 2)), np.zeros((6, 2), int)
    found = tt.inspect.truncation(layer, lambda y: F.cross_entropy(readout(y), labels), x, [6])
    np.testing.assert_allclose(found.error, 0, atol=1e-12)
    assert layer.training and all(p.grad is None for p in (*layer.parameters(), *readout.parameters()))


def test_frozen_parameters_are_left_out():
    layer = make("GRU", 2, 3)
    layer.bias_ih_l0.requires_grad = False
    found = tt.inspect.truncation(layer, lambda y: y.sum(), np.ones((4, 1, 2)), [2])
    assert list(found.cosines) == ["weight_ih_l0", "weight_hh_l0", "bias_hh_l0"]


@pytest.mark.parametrize(
    "steps, k1, wanted",
    [(10, 1, [1, 2, 4, 8, 10]), (300, 16, [16, 32, 64, 128]), (5, None, [1, 2, 4, 5]), (3, 4, [4])],
)
def test_depths_by_default(steps, k1, wanted):
    found = tt.inspect.truncation(Scale(0.5), lambda y: y.sum(), np.ones((steps, 1, 1)), k1=k1)
    assert found.k2.tolist() == wanted


def test_the_least_depth():
    found = tt.inspect.truncation(Scale(0.5), lambda y: y.sum(), np.ones((9, 1, 1)), [1, 2, 3, 9])
    for values, wanted in (([0.1, 0.99, 0.5, 1.0], 9), ([1.0] * 4, 1), ([1, 1, 1, 0.2], None), ([np.nan, 1, 1, 1], 2)):
        found.cosine[:] = values
        assert found.least(0.95) == wanted


def test_a_zero_gradient_is_nan_and_no_warning():
    found = tt.inspect.truncation(Scale(0.5), lambda y: 0 * y.sum(), np.ones((3, 1, 1)), [1])
    assert np.isnan(found.cosine[0]) and "nan" in str(found)


def test_the_table():
    layer = make("GRU", 2, 3)
    found = tt.inspect.truncation(layer, lambda y: y.sum(), np.ones((5, 2, 2)), [1, 5])
    lines = str(found).splitlines()
    assert lines[0] == "GRU(2, 3), T = 5, B = 2: each loss carried back k2 steps"
    assert lines[1].split() == ["k2", "cosine", "norm", "ratio", "error", "lowest", "cosine", "of", "a", "parameter"]
    assert lines[3].split()[:3] == ["5", "1.0000", "1.0000"] and lines[4].startswith("norm of the full gradient: ")


def test_the_picture(tmp_path):
    pytest.importorskip("matplotlib")
    found = tt.inspect.truncation(make("GRU", 2, 3), lambda y: y.sum(), np.ones((5, 2, 2)), [1, 2, 5])
    figure = found.plot(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").read_bytes()[:4] == b"\x89PNG"
    lines = figure.axes[0].get_lines()
    np.testing.assert_array_equal(lines[4].get_ydata(), found.cosine)
    assert [line.get_label() for line in lines[:5]] == [*found.cosines, "all"]
    assert found.plot(axes=figure.axes) is figure and len(figure.axes[1].get_lines()) == 12


def test_a_picture_without_matplotlib(monkeypatch):
    found = tt.inspect.truncation(Scale(0.5), lambda y: y.sum(), np.ones((3, 1, 1)), [1])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(tt.InputError, match="matplotlib is not installed"):
        found.plot()


GRU = nn.GRU(2, 3)
X = np.zeros((5, 2, 2), np.float32)


def total(y):
    return y.sum()


BAD = {
    "no depth": (lambda: tt.inspect.truncation(GRU, total, X, []), tt.InputError, r"k2 is \[\]"),
    "a depth of 0": (lambda: tt.inspect.truncation(GRU, total, X, [0, 2]), tt.InputError, r"k2 is \[0, 2\]"),
    "a number": (lambda: tt.inspect.truncation(GRU, total, X, 5), tt.InputError, "k2 is 5, k1 is 1"),
    "below k1": (lambda: tt.inspect.truncation(GRU, total, X, [2], k1=3), tt.InputError, r"k2 is \[2\], k1 is 3"),
    "k1": (lambda: tt.inspect.truncation(GRU, total, X, k1=0), tt.InputError, "k1 is 0"),
    "a single sequence": (lambda: tt.inspect.truncation(GRU, total, X[:, 0]), tt.ShapeError, "a single sequence"),
    "no steps": (lambda: tt.inspect.truncation(GRU, total, X[:0]), tt.ShapeError, "0 steps"),
    "backwards": (
        lambda: tt.inspect.truncation(nn.GRU(2, 3, bidirectional=True), total, X), tt.InputError, "goes backwards"
    ),
    "nothing to learn": (
        lambda: tt.inspect.truncation(lambda x, s: (tt.tensor(x), s), total, X), tt.InputError, "no parameters"
    ),
    "a loss of nothing": (lambda: tt.inspect.truncation(GRU, lambda y: tt.tensor(1.0), X), tt.TapeError, "depend on"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n  help: " in str(caught.value)
