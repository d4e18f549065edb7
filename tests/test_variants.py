"""Further cells against their equations written out in NumPy, finite differences, and their limits."""

import copy

import numpy as np
import pytest

import tinytape as tt
from tinytape import nn

KINDS = {
    "peephole": nn.PeepholeLSTMCell,
    "coupled": nn.CoupledLSTMCell,
    "layer norm": nn.LayerNormLSTMCell,
    "zoneout": nn.ZoneoutLSTMCell,
    "minimal": nn.MinimalGatedUnitCell,
    "memory": nn.MemoryAttentionCell,
}
SIZES = {"memory": (3, 4, 5, 2)}  # input_size, hidden_size, slots, width

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def step_by_step():
    """The equations are tested on the cells' definition; test_layers_compiled.py holds the kernels against it."""
    with tt.no_compile():
        yield


def make(kind, seed=0, dtype=np.float64, **options):
    """A cell of 3 inputs and 4 units, with no parameter at a special value."""
    cell = KINDS[kind](*SIZES.get(kind, (3, 4)), generator=tt.Generator(seed), dtype=dtype, **options)
    rng = np.random.default_rng(seed)
    with tt.no_grad():
        for p in cell.parameters():
            p.copy_(p.data + rng.normal(size=p.shape) * 0.3)
    return cell


def parts(state):
    return list(state) if isinstance(state, tuple) else [state]


def state_for(cell, rng, *batch):
    made = tuple(rng.normal(size=part.shape) for part in parts(cell.initial_state(*batch)))
    return made if len(made) > 1 else made[0]


def close(a, b, tolerance=1e-12):
    a, b = (x.data if isinstance(x, tt.Tensor) else x for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# ---- the equations, one row at a time, each gate with matrices of its own -------------------------------------------


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def softmax(a):
    return np.exp(a) / np.exp(a).sum()


def normal(a):
    return (a - a.mean()) / np.sqrt(a.var() + 1e-5)


def gates_of(w, count, x, h):
    """``W x + U h + b`` of each gate."""
    bias = w["bias_ih"] + w["bias_hh"] if "bias_ih" in w else np.zeros(len(w["weight_ih"]))
    blocks = [np.split(a, count) for a in (w["weight_ih"], w["weight_hh"], bias)]
    return [W @ x + U @ h + b for W, U, b in zip(*blocks, strict=True)]


def peephole(w, x, h, c):
    p_i, p_f, p_o = np.split(w["peephole"], 3)
    i, f, g, o = gates_of(w, 4, x, h)
    c = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * np.tanh(g)
    return sigmoid(o + p_o * c) * np.tanh(c), c


def coupled(w, x, h, c):
    i, g, o = gates_of(w, 3, x, h)
    c = (1 - sigmoid(i)) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def layer_norm(w, x, h, c):
    b = w["bias_ih"] + w["bias_hh"] if "bias_ih" in w else 0.0
    z = w["gain_ih"] * normal(w["weight_ih"] @ x) + w["gain_hh"] * normal(w["weight_hh"] @ h) + b
    i, f, g, o = np.split(z, 4)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(w["gain_c"] * normal(c) + w.get("bias_c", 0.0)), c


def lstm(w, x, h, c):
    i, f, g, o = gates_of(w, 4, x, h)
    c = sigmoid(f) * c + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def zoneout(w, x, h, c):
    new_h, new_c = lstm(w, x, h, c)
    return 0.05 * h + 0.95 * new_h, 0.5 * c + 0.5 * new_c


def minimal(w, x, h):
    u_f, u_n = np.split(w["weight_hh"], 2)
    x_f, x_n = gates_of(w, 2, x, np.zeros_like(h))
    f = sigmoid(x_f + u_f @ h)
    return (1 - f) * h + f * np.tanh(x_n + u_n @ (f * h))


def memory(w, x, h, m):
    width = m.shape[1]
    pick = lambda key: softmax(m @ key / np.sqrt(width))  # noqa: E731
    (z,) = gates_of(w, 1, x, h)
    h = np.tanh(z + w["weight_mh"] @ (m.T @ pick(w["weight_read"] @ h)))
    k, e, v = np.split(w["weight_write"] @ h + w.get("bias_write", 0.0), 3)
    return h, np.array([row + p * sigmoid(e) * (np.tanh(v) - row) for row, p in zip(m, pick(k), strict=True)])


EQUATIONS = {
    "peephole": peephole, "coupled": coupled, "layer norm": layer_norm, "zoneout": zoneout, "minimal": minimal,
    "memory": memory,
}  # fmt: skip


@kinds
@pytest.mark.parametrize("bias", [True, False])
def test_values_are_those_of_the_equations(kind, bias):
    cell, rng = make(kind, bias=bias).eval(), np.random.default_rng(1)
    x, state = rng.normal(size=(5, 2, 3)), state_for(cell, rng, 2)
    y, last = nn.Recurrent(cell)(x, state)
    w = cell.state_dict()
    assert any(name.startswith("bias") for name in w) is bias
    for row in range(2):
        carried = [part[row] for part in parts(state)]
        for t in range(5):
            carried = EQUATIONS[kind](w, x[t, row], *carried)
            carried = list(carried) if isinstance(carried, tuple) else [carried]
            close(y[t, row], carried[0])
        for a, b in zip(parts(last), carried, strict=True):
            close(a[row], b)


@kinds
@pytest.mark.parametrize("start", ["given", "its own"])
def test_derivatives_agree_with_finite_differences(kind, start):
    cell, rng = make(kind).eval(), np.random.default_rng(2)
    names = [name for name, _ in cell.named_parameters()]
    x, state = rng.normal(size=(2, 2, 3)), state_for(cell, rng, 2) if start == "given" else None

    def f(x, state, *values):
        layer = nn.Recurrent(cell)
        named = {f"cell.{name}": value for name, value in zip(names, values, strict=True)}
        return nn.functional_call(layer, named, x, state)

    if kind == "layer norm" and start == "its own":
        state = parts(state_for(cell, rng, 2))  # N(0) = 0 has a derivative of 1/√eps, too steep for differences
        state = tuple(state)
    tt.check_grads(f, [x, state, *(p.numpy() for p in cell.parameters())], order=2)


@kinds
def test_scan_takes_the_cell(kind):
    cell, rng = make(kind).eval(), np.random.default_rng(3)
    x = rng.normal(size=(4, 2, 3))

    def f(state, x):
        state = cell(x, state)
        return state, parts(state)[0]

    last, ys = tt.scan(f, cell.initial_state(2), x)
    y, expected = nn.Recurrent(cell)(x)
    close(ys, y)
    for a, b in zip(parts(last), parts(expected), strict=True):
        close(a, b)


@kinds
def test_a_single_sequence_and_none_for_a_state(kind):
    cell, rng = make(kind).eval(), np.random.default_rng(4)
    x = rng.normal(size=(2, 3))
    for a, b, c in zip(parts(cell(x[0])), parts(cell(x)), parts(cell(x, cell.initial_state(2))), strict=True):
        close(a, b[0])
        close(b, c)
    assert [part.shape for part in parts(cell.initial_state())] == [part.shape for part in parts(cell(x[0]))]


@kinds
def test_float32_stays(kind):
    cell = make(kind, dtype=None)
    y, last = nn.Recurrent(cell)(np.ones((3, 2, 3), np.float32))
    assert {a.dtype for a in [y, *parts(last), *cell.parameters()]} == {np.dtype(np.float32)}
    y.sum().backward()
    assert all(p.grad is not None and np.abs(p.grad.data).max() > 0 for p in cell.parameters())


@kinds
def test_equal_seeds_draw_equal_cells(kind):
    a, b, other = make(kind, seed=1), make(kind, seed=1), make(kind, seed=2)
    assert repr(a).startswith(type(a).__name__ + "(3, 4")
    for name, value in a.state_dict().items():
        np.testing.assert_array_equal(value, b.state_dict()[name])
        assert not np.array_equal(value, other.state_dict()[name])


# ---- what each is for -----------------------------------------------------------------------------------------------


def weights_of(cell, other):
    """Give `other` the parameters that it has in common with `cell`."""
    other.load_state_dict({n: v for n, v in cell.state_dict().items() if n in other.state_dict()})
    return other


def test_a_peephole_cell_without_peepholes_is_an_lstm():
    cell, rng = make("peephole"), np.random.default_rng(5)
    with tt.no_grad():
        cell.peephole.copy_(0.0)
    x, state = rng.normal(size=(2, 3)), state_for(cell, rng, 2)
    for a, b in zip(cell(x, state), weights_of(cell, nn.LSTMCell(3, 4, dtype=np.float64))(x, state), strict=True):
        close(a, b)


def test_layer_norm_makes_the_gates_blind_to_scale():
    cell, rng = make("layer norm"), np.random.default_rng(6)
    with tt.no_grad():
        cell.weight_ih.copy_(cell.weight_ih.data * 100)
        cell.weight_hh.copy_(cell.weight_hh.data * 100)
    x, state = rng.normal(size=(2, 3)), state_for(cell, rng, 2)
    h, _ = cell(x, state)
    with tt.no_grad():
        cell.weight_ih.copy_(cell.weight_ih.data * 100)
    close(cell(x, state)[0], h, 1e-6)  # eps is still there


def test_what_a_memory_cell_wrote_long_ago_reaches_its_output():
    cell = make("memory")
    x = tt.tensor(np.random.default_rng(7).normal(size=(12, 1, 3)), requires_grad=True)
    y, (_, m) = nn.Recurrent(cell)(x)
    y[-1].sum().backward()
    assert np.abs(x.grad.data[0]).max() > 0 and m.shape == (1, 5, 2)


def test_equal_rows_of_a_memory_stay_equal_and_the_learned_ones_do_not():
    cell, x = make("memory"), np.random.default_rng(8).normal(size=(6, 1, 3))
    h, m = cell.initial_state(1)
    _, (_, equal) = nn.Recurrent(cell)(x, (h, np.zeros(m.shape)))
    close(equal[:, 0], equal[:, 1])
    _, (_, apart) = nn.Recurrent(cell)(x)
    assert np.abs((apart[:, 0] - apart[:, 1]).data).max() > 1e-3


# ---- zoneout --------------------------------------------------------------------------------------------------------


def test_zones_keep_the_last_value():
    cell, rng = make("zoneout"), np.random.default_rng(9)
    x, (h, c) = rng.normal(size=(2, 3)), state_for(cell, rng, 2)
    zones = rng.random((2, 4)) < 0.5, rng.random((2, 4)) < 0.5
    new = weights_of(cell, nn.LSTMCell(3, 4, dtype=np.float64))(x, (h, c))
    for mode in (cell.train(), cell.eval()):
        for found, d, old, fresh in zip(mode(x, (h, c), zones), zones, (h, c), new, strict=True):
            close(found, np.where(d, old, fresh.data))


def test_recurrent_draws_zones_for_every_step_and_row():
    cell = make("zoneout", zoneout_h=0.3)
    cell.generator = tt.Generator(3)
    twin, x = copy.deepcopy(cell), np.random.default_rng(10).normal(size=(6, 5, 3))
    y, last = nn.Recurrent(cell)(x)
    d_h, d_c = twin.draw(6, 5)
    assert d_h.shape == d_c.shape == (6, 5, 4) and d_h.dtype == d_c.dtype == bool
    state = twin.initial_state(5)
    for t in range(6):
        state = twin(x[t], state, (d_h[t], d_c[t]))
        close(y[t], state[0])
    for a, b in zip(last, state, strict=True):
        close(a, b)
    assert not np.array_equal(nn.Recurrent(cell)(x)[0].data, y.data)
    cell.eval()
    close(nn.Recurrent(cell)(x)[0], nn.Recurrent(cell)(x)[0], 0)


def test_zones_in_xs_are_those_of_recurrent():
    cell = make("zoneout")
    cell.generator = tt.Generator(3)
    twin, x = copy.deepcopy(cell), np.random.default_rng(11).normal(size=(6, 5, 3))
    y, _ = nn.Recurrent(cell)(x)

    def f(state, inputs):
        state = twin(inputs[0], state, inputs[1])
        return state, state[0]

    _, ys = tt.scan(f, twin.initial_state(5), (x, twin.draw(6, 5)))
    close(ys, y)


def test_zones_are_drawn_with_their_probabilities_and_average_to_the_expectation():
    n = 20_000
    cell, rng = make("zoneout", zoneout_h=0.2, zoneout_c=0.7), np.random.default_rng(12)
    cell.generator = tt.Generator(0)
    x, state = np.repeat(rng.normal(size=(1, 3)), n, 0), tuple(np.repeat(rng.normal(size=(1, 4)), n, 0) for _ in "hc")
    drawn, expected = cell.train()(x, state), cell.eval()(x[:1], tuple(part[:1] for part in state))
    new = weights_of(cell, nn.LSTMCell(3, 4, dtype=np.float64))(x[:1], tuple(part[:1] for part in state))
    for found, mean, p, old, fresh in zip(drawn, expected, (0.2, 0.7), state, new, strict=True):
        kept = np.isclose(found.data, old)
        assert np.all(kept | np.isclose(found.data, fresh.data)) and np.abs(kept.mean() - p) < 0.02
        deviation = np.abs(old[0] - fresh.data[0]) * np.sqrt(p * (1 - p) / n)  # of the mean of n draws
        assert np.all(np.abs(found.data.mean(0) - mean.data[0]) < 6 * deviation + 1e-12)


def test_backwards_and_with_lengths():
    cell = make("zoneout", zoneout_h=1.0, zoneout_c=1.0)
    x, rng = np.ones((4, 2, 3)), np.random.default_rng(13)
    state = state_for(cell, rng, 2)
    y, last = nn.Recurrent(cell, reverse=True)(x, state, lengths=[4, 1])
    for a, b in zip(last, state, strict=True):
        close(a, b)
    close(y[:, 0], np.repeat(state[0][:1], 4, 0))
    assert not y.data[1:, 1].any()


# ---- bad input ------------------------------------------------------------------------------------------------------

X, H = np.zeros((2, 3), np.float32), np.zeros((2, 4), np.float32)


def of(kind, *args, **options):
    return lambda: make(kind, dtype=np.float32, **options)(*args)


class Short(nn.Module):
    """A cell that draws for too few steps."""

    def draw(self, steps, rows):
        return np.zeros((steps - 1, rows))

    def forward(self, x, state, drawn):
        return state


D = np.zeros((2, 4), bool)
BAD = {
    "features": (of("peephole", X[:, :2]), tt.ShapeError, "input_size = 3, got 2"),
    "dtype": (of("coupled", X.astype(float)), tt.DTypeError, "x is float64"),
    "axes": (of("minimal", X[None]), tt.ShapeError, "one time step"),
    "a list": (of("layer norm", [1.0, 2.0, 3.0]), tt.DTypeError, "x is a list"),
    "no c": (of("coupled", X, H), tt.InputError, r"it has 2, \(h, c\)"),
    "state's shape": (of("layer norm", X, (H, H[:, :3])), tt.ShapeError, r"c has shape \(2, 3\).*= \(2, 4\)"),
    "state's rows": (of("minimal", X, H[:1]), tt.ShapeError, r"h has shape \(1, 4\)"),
    "state's dtype": (of("peephole", X, (H.astype(float), H)), tt.DTypeError, "h is float64"),
    "memory's shape": (of("memory", X, (H, np.zeros((2, 2, 5), np.float32))), tt.ShapeError,
                       r"memory has shape \(2, 2, 5\).*= \(2, 5, 2\)"),
    "sizes": (lambda: nn.CoupledLSTMCell(3, 0), tt.InputError, "hidden_size is 0"),
    "slots": (lambda: nn.MemoryAttentionCell(3, 4, 0, 2), tt.InputError, "slots is 0"),
    "width": (lambda: nn.MemoryAttentionCell(3, 4, 2, 1.5), tt.InputError, "width is 1.5"),
    "zoneout_h": (lambda: nn.ZoneoutLSTMCell(3, 4, 1.5), tt.InputError, "zoneout_h: p is 1.5"),
    "zoneout_c": (lambda: nn.ZoneoutLSTMCell(3, 4, 0.1, -1), tt.InputError, "zoneout_c: p is -1"),
    "zones": (of("zoneout", X, None, D), tt.InputError, "zones are a ndarray, not a pair"),
    "zones' shape": (of("zoneout", X, None, (D, D[:1])), tt.ShapeError, r"d_c has shape \(1, 4\), the state \(2, 4\)"),
    "zones' dtype": (of("zoneout", X, None, (H, D)), tt.DTypeError, "d_h is float32"),
    "zones' kind": (of("zoneout", X, None, (0.1, D)), tt.DTypeError, "d_h is a float"),
    "too few draws": (lambda: nn.Recurrent(Short())(np.zeros((4, 2, 3)), H), tt.ShapeError, r"draw\(4, 2\).*4 steps"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=r"(?s)" + words) as caught:
        call()
    assert "\n  help: " in str(caught.value)
