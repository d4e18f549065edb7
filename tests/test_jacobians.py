"""Step Jacobians, their products and Lyapunov exponents, against closed forms and finite differences."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import inspect, nn


def linear(w):
    """h' = w h + x, rows of h being states."""
    w = tt.tensor(w, requires_grad=True)

    def f(h, x):
        h = h @ w.T + x
        return h, h

    return f


@given(st.integers(1, 5), st.integers(1, 9), st.integers(0, 99))
def test_linear_networks(size, steps, seed):
    rng = np.random.default_rng(seed)
    w = rng.normal(size=(size, size))
    xs, init = rng.normal(size=(steps, 3, size)), rng.normal(size=(3, size))
    found = inspect.jacobians(linear(w), xs, init, row=1)
    np.testing.assert_allclose(found.matrices, np.broadcast_to(w, (steps, size, size)), rtol=1e-12)
    np.testing.assert_allclose(found.largest, np.linalg.norm(w, 2), rtol=1e-12)
    powers = [np.linalg.norm(np.linalg.matrix_power(w, lag), 2) for lag in range(steps + 1)]
    np.testing.assert_allclose(found.products(), np.log2(powers), rtol=1e-9, atol=1e-9)
    alone = inspect.jacobians(linear(w), xs[:, 1], init[1], row=None)
    np.testing.assert_allclose(alone.matrices, found.matrices, rtol=1e-12)


def test_lyapunov_exponents_of_a_symmetric_matrix_are_those_of_its_eigenvalues():
    moduli = np.array([1.1, 0.9, 0.5, 0.2])
    q = np.linalg.qr(np.random.default_rng(1).normal(size=(4, 4)))[0]
    f = linear(q @ np.diag(moduli * [1, -1, 1, -1]) @ q.T)
    xs, init = np.zeros((300, 1, 4)), np.zeros((1, 4))
    exponents = inspect.lyapunov(f, xs, init, skip=150)
    np.testing.assert_allclose(exponents, np.log(moduli), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(inspect.jacobians(f, xs, init).lyapunov(150), exponents)
    np.testing.assert_allclose(inspect.lyapunov(f, xs, init, skip=150, count=2), exponents[:2], rtol=1e-9)


def test_the_sum_of_all_exponents_is_the_mean_log_determinant():
    layer = nn.RNN(2, 4, dtype=np.float64, generator=tt.Generator(0))
    found = inspect.jacobians(layer, np.random.default_rng(0).normal(size=(50, 1, 2)))
    determinants = np.linalg.slogdet(found.matrices)[1]
    assert found.lyapunov().sum() == pytest.approx(determinants.mean(), rel=1e-9)


def test_henon():
    """The Hénon map: 0.4192 (Sprott 2003), and the sum is log 0.3 exactly."""

    def henon(state, _):
        x, y = state
        return (1 - 1.4 * x * x + y, 0.3 * x), None

    exponents = inspect.lyapunov(henon, np.zeros((4000, 1)), (np.full((1, 1), 0.1), np.full((1, 1), 0.1)), skip=100)
    assert exponents.sum() == pytest.approx(np.log(0.3), rel=1e-9)
    assert exponents[0] == pytest.approx(0.4192, abs=0.015)


@pytest.mark.parametrize("rho", [0.05, 1.0, 30.0])
def test_products_of_thousands_of_steps_stay_in_range(rho):
    f = linear(rho * np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0])
    found = inspect.jacobians(f, np.zeros((1500, 3)), np.zeros(3), row=None)
    np.testing.assert_allclose(found.products(), np.arange(1501) * np.log2(rho), rtol=1e-9, atol=1e-9)
    verdict = found.verdict()
    assert verdict.kind == ("vanishes" if rho < 1 else "explodes" if rho > 1 else "steady")
    if rho != 1:
        assert verdict.half_life == pytest.approx(-np.log(2) / np.log(rho))


LAYERS = {
    "rnn": lambda: nn.RNN(3, 4, dtype=np.float64),
    "gru": lambda: nn.GRU(3, 4, batch_first=True, dtype=np.float64),
    "stack": lambda: nn.LSTM(3, 4, num_layers=2, dtype=np.float64),
    "projected": lambda: nn.LSTM(3, 4, proj_size=2, dtype=np.float64),
    "learnt": lambda: nn.GRU(3, 4, learn_initial_state=True, dtype=np.float64),
    "cell": lambda: nn.LSTMCell(3, 4, dtype=np.float64),
    "recurrent": lambda: nn.Recurrent(nn.GRUCell(3, 4, dtype=np.float64)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_layers_against_finite_differences(name):
    """The first Jacobian entry by entry; the others by the trajectory that they are taken along."""
    model = LAYERS[name]()
    x = np.random.default_rng(0).normal(size=(5, 2, 3))
    is_cell = name == "cell"
    batch_first = getattr(model, "batch_first", False)

    def after(state, now):
        with tt.no_grad(), tt.no_compile():
            if is_cell:
                return model(tt.tensor(now), state)
            return model(now[:, None] if batch_first else now[None], state)[1]

    def vector(state):
        parts = state if isinstance(state, tuple) else (state,)
        return np.concatenate([np.asarray(p.data)[..., 1:2, :].ravel() for p in parts])

    def moved(state, j, by):
        parts = [np.array(p.data) for p in (state if isinstance(state, tuple) else (state,))]
        for part in parts:
            rows = part[..., 1:2, :]
            if j < rows.size:
                rows[np.unravel_index(j, rows.shape)] += by
                break
            j -= rows.size
        made = tuple(tt.tensor(p) for p in parts)
        return made if isinstance(state, tuple) else made[0]

    found = inspect.jacobians(model, np.swapaxes(x, 0, 1) if batch_first else x, row=1).matrices
    state = after(None, x[0])
    for t in range(1, 5):
        size = len(vector(state))
        columns = [
            (vector(after(moved(state, j, 1e-6), x[t])) - vector(after(moved(state, j, -1e-6), x[t]))) / 2e-6
            for j in range(size)
        ]
        np.testing.assert_allclose(found[t], np.stack(columns, axis=1), rtol=1e-6, atol=1e-9)
        state = after(state, x[t])


def test_leaves_without_floats_and_inputs_without_rows():
    def f(carry, x):
        h = tt.tanh(carry["h"] * x["scale"] + x["x"])
        return {"h": h, "n": carry["n"] + 1}, h

    xs = {"x": np.ones((4, 3, 2)), "scale": np.array([0.5, 1.0, 1.5, 2.0])}
    found = inspect.jacobians(f, xs, {"h": np.zeros((3, 2)), "n": np.zeros((3, 1), int)}, row=2)
    h = np.zeros(2)
    for t in range(4):
        h = np.tanh(h * xs["scale"][t] + 1)
        np.testing.assert_allclose(found.matrices[t], np.diag((1 - h * h) * xs["scale"][t]))


def test_gradients_of_the_model_are_left_alone():
    layer = nn.LSTM(3, 4)
    inspect.jacobians(layer, np.ones((3, 2, 3), np.float32))
    assert all(p.grad is None for p in layer.parameters())


def test_a_layer_in_reverse_is_gone_through_from_its_last_step():
    cell, x = nn.GRUCell(2, 3), np.random.default_rng(0).standard_normal((5, 2, 2)).astype(np.float32)
    for batch_first in False, True:
        layer = nn.Recurrent(cell, batch_first=batch_first, reverse=True)
        found = inspect.jacobians(layer, np.swapaxes(x, 0, 1) if batch_first else x).matrices
        np.testing.assert_array_equal(found, inspect.jacobians(cell, x[::-1]).matrices)


@pytest.mark.parametrize(
    "model", [nn.LSTM(2, 3, 2), nn.RNN(2, 3, batch_first=True), nn.LSTMCell(2, 3), nn.Recurrent(nn.GRUCell(2, 3))]
)
def test_a_single_sequence_is_a_batch_of_one_row(model):
    x = np.random.default_rng(0).standard_normal((5, 2)).astype(np.float32)
    batch = x[None] if getattr(model, "batch_first", False) else x[:, None]
    np.testing.assert_allclose(
        inspect.jacobians(model, x).matrices, inspect.jacobians(model, batch).matrices, rtol=1e-5, atol=1e-6
    )


def test_text_and_picture(tmp_path):
    found = inspect.jacobians(linear(0.5 * np.eye(2)), np.zeros((20, 2)), np.zeros(2), row=None)
    assert "in the best direction: vanishes: halves every 1.0 steps; 1% left beyond 6 steps" in str(found)
    assert "Lyapunov exponents: -0.6931 to -0.6931 a step" in str(found)
    pytest.importorskip("matplotlib")
    found.plot(tmp_path / "jacobians.png")
    assert (tmp_path / "jacobians.png").stat().st_size > 5000


def test_errors():
    f, xs, init = linear(np.eye(2)), np.zeros((3, 2, 2)), np.zeros((2, 2))
    for error, match, call in [
        (tt.InputError, "needs init", lambda: inspect.jacobians(f, xs)),
        (tt.InputError, "model is a int", lambda: inspect.jacobians(3, xs, init)),
        (tt.InputError, "row is 2, the batch has 2", lambda: inspect.jacobians(f, xs, init, row=2)),
        (tt.ShapeError, "no steps", lambda: inspect.jacobians(f, xs[:0], init)),
        (tt.ShapeError, "no steps", lambda: inspect.jacobians(nn.GRU(2, 2), xs[:0])),
        (tt.ShapeError, "no steps", lambda: inspect.jacobians(nn.GRU(2, 2, batch_first=True), xs[:, :0])),
        (tt.ShapeError, "no steps", lambda: inspect.lyapunov(nn.GRUCell(2, 2), None)),
        (tt.ShapeError, "without a batch axis", lambda: inspect.jacobians(f, xs, (init, np.zeros(())))),
        (tt.InputError, "no floats", lambda: inspect.jacobians(f, xs, np.zeros((2, 2), int))),
        (tt.InputError, "both directions", lambda: inspect.jacobians(nn.GRU(2, 2, bidirectional=True), xs)),
        (tt.InputError, "at most 1024 are kept", lambda: inspect.jacobians(f, xs[:1], np.zeros((1, 12000)))),
        (tt.InputError, "count is 3", lambda: inspect.lyapunov(f, xs, init, count=3)),
        (tt.InputError, "skip is 3 of 3", lambda: inspect.lyapunov(f, xs, init, skip=3)),
        (
            tt.ShapeError,
            "the state went from shapes",
            lambda: inspect.jacobians(lambda h, x: (h[:, :1], None), xs, init),
        ),
    ]:
        with pytest.raises(error, match=match):
            call()
