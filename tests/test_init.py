"""Initialisation: ranges and moments, orthogonality, identity, forget gates, seeds, and what is refused."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import nn
from tinytape.nn import init

DRAWN = {
    "uniform_": lambda p, g: init.uniform_(p, -0.5, 1.5, g),
    "normal_": lambda p, g: init.normal_(p, 1.0, 0.2, g),
    "xavier_uniform_": lambda p, g: init.xavier_uniform_(p, 2.0, g),
    "xavier_normal_": lambda p, g: init.xavier_normal_(p, 2.0, g),
    "kaiming_uniform_": lambda p, g: init.kaiming_uniform_(p, nonlinearity="relu", generator=g),
    "kaiming_normal_": lambda p, g: init.kaiming_normal_(p, mode="fan_out", nonlinearity="tanh", generator=g),
    "orthogonal_": lambda p, g: init.orthogonal_(p, 1.5, g),
}


@pytest.mark.parametrize("name", DRAWN)
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_seed_determines_what_is_drawn(name, dtype):
    a, b, c = (nn.Parameter(np.zeros((6, 5), dtype)) for _ in range(3))
    assert DRAWN[name](a, tt.Generator(3)) is a and a.requires_grad and a.dtype == dtype
    DRAWN[name](b, tt.Generator(3))
    np.testing.assert_array_equal(a.data, b.data)
    tt.manual_seed(3)
    DRAWN[name](c, None)
    np.testing.assert_array_equal(a.data, c.data)


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("uniform_", 0.5, 2 / np.sqrt(12)),
        ("normal_", 1.0, 0.2),
        ("xavier_uniform_", 0.0, 2 * np.sqrt(2 / 500)),
        ("xavier_normal_", 0.0, 2 * np.sqrt(2 / 500)),
        ("kaiming_uniform_", 0.0, np.sqrt(2 / 200)),
        ("kaiming_normal_", 0.0, 5 / 3 / np.sqrt(300)),
    ],
)
def test_moments(name, mean, std):
    values = DRAWN[name](nn.Parameter(np.zeros((300, 200))), tt.Generator(0)).numpy()
    assert abs(values.mean() - mean) < 4 * std / np.sqrt(values.size)
    assert values.std() == pytest.approx(std, rel=0.02)
    if "uniform" in name:
        assert np.abs(values - mean).max() <= std * np.sqrt(3)


@pytest.mark.peer
def test_gains_and_fans_are_pytorchs():
    torch = pytest.importorskip("torch")
    for name in ("linear", "sigmoid", "tanh", "relu", "leaky_relu", "selu"):
        assert init.calculate_gain(name) == pytest.approx(torch.nn.init.calculate_gain(name))
    assert init.calculate_gain("leaky_relu", 0.3) == pytest.approx(torch.nn.init.calculate_gain("leaky_relu", 0.3))
    for name in ("xavier_uniform_", "kaiming_uniform_"):  # the largest of many uniform draws shows the bound
        ours = getattr(init, name)(nn.Parameter(np.zeros((40, 30, 20)))).numpy()
        theirs = getattr(torch.nn.init, name)(torch.zeros(40, 30, 20, dtype=torch.float64))
        assert np.abs(ours).max() == pytest.approx(theirs.abs().max().item(), rel=1e-3)


@given(rows=st.integers(1, 7), columns=st.integers(1, 7), gain=st.floats(0.5, 2))
def test_orthogonal(rows, columns, gain):
    w = init.orthogonal_(nn.Parameter(np.zeros((rows, columns))), gain).numpy() / gain
    short = w @ w.T if rows <= columns else w.T @ w
    np.testing.assert_allclose(short, np.eye(min(rows, columns)), atol=1e-12)


def test_orthogonal_of_more_axes():
    w = init.orthogonal_(nn.Parameter(np.zeros((4, 3, 2), np.float32))).numpy().reshape(4, 6)
    np.testing.assert_allclose(w @ w.T, np.eye(4), atol=1e-6)


def test_constants():
    p = nn.Parameter(np.empty((2, 3), np.float32))
    assert init.ones_(p).tolist() == [[1] * 3] * 2
    assert init.zeros_(p).tolist() == [[0] * 3] * 2
    assert init.constant_(p, 2.5).tolist() == [[2.5] * 3] * 2
    assert init.identity_(p, 0.5).tolist() == [[0.5, 0, 0], [0, 0.5, 0]]
    assert init.constant_(tt.zeros((2,)), 3).tolist() == [3, 3]  # plain tensors too


@pytest.mark.parametrize("make", [lambda: nn.LSTM(2, 3, 2, bidirectional=True), lambda: nn.LSTMCell(2, 3)])
def test_forget_gate_bias(make):
    lstm = make()
    before = lstm.state_dict()
    assert init.forget_gate_bias_(lstm, 1.5) is lstm
    for name, p in lstm.named_parameters():
        if not name.startswith("bias"):
            np.testing.assert_array_equal(p.data, before[name])
            continue
        assert p.tolist()[3:6] == [1.5 if "ih" in name else 0.0] * 3
        np.testing.assert_array_equal(np.delete(p.data, [3, 4, 5]), np.delete(before[name], [3, 4, 5]))


def test_default_initialisation_is_pytorchs():
    big = nn.Linear(400, 50)
    assert big.weight.data.max() <= 0.05 and big.weight.data.std() == pytest.approx(0.05 / np.sqrt(3), rel=0.03)
    assert np.abs(big.bias.data).max() <= 0.05
    lstm = nn.LSTM(10, 25, 2, proj_size=4)
    for p in lstm.parameters():
        assert 0.15 < np.abs(p.data).max() <= 0.2
    table = nn.Embedding(500, 20).weight.data
    assert abs(table.mean()) < 0.05 and table.std() == pytest.approx(1, rel=0.05)
    norm = nn.LayerNorm(5)
    assert norm.weight.tolist() == [1] * 5 and norm.bias.tolist() == [0] * 5


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda p: init.xavier_uniform_(p), tt.ShapeError, r"\(3,\), so no fan"),
        (lambda p: init.kaiming_normal_(p), tt.ShapeError, r"\(3,\), so no fan"),
        (lambda p: init.orthogonal_(p), tt.ShapeError, r"\(3,\)"),
        (lambda p: init.identity_(p), tt.ShapeError, r"\(3,\)"),
        (lambda p: init.uniform_(p, 1.0, 0.0), tt.InputError, "low = 1.0"),
        (lambda p: init.normal_(p, 0.0, -1.0), tt.InputError, "std is -1.0"),
        (lambda p: init.calculate_gain("sine"), tt.InputError, "nonlinearity is 'sine'"),
        (lambda p: init.kaiming_uniform_(nn.Parameter(np.ones((2, 2))), mode="fan"), tt.InputError, "mode is 'fan'"),
        (lambda p: init.forget_gate_bias_(nn.GRU(2, 3)), tt.InputError, "GRU has no LSTM biases"),
        (lambda p: init.forget_gate_bias_(nn.LSTM(2, 3, bias=False)), tt.InputError, "LSTM has no LSTM biases"),
    ],
)
def test_bad_input_changes_nothing(call, error, words):
    p = nn.Parameter(np.ones(3))
    with pytest.raises(error, match=words):
        call(p)
    assert p.tolist() == [1, 1, 1]


def test_orthogonal_gates_are_each_orthogonal_and_differ() -> None:
    w = tt.nn.init.orthogonal_(tt.zeros((12, 3), dtype="float64"), gates=4, generator=tt.Generator(0)).numpy()
    blocks = w.reshape(4, 3, 3)
    for block in blocks:
        np.testing.assert_allclose(block @ block.T, np.eye(3), atol=1e-12)
    assert not np.allclose(blocks[0], blocks[1])
    with pytest.raises(tt.ShapeError, match=r"12 rows.*5 gates"):
        tt.nn.init.orthogonal_(tt.zeros((12, 3)), gates=5)
