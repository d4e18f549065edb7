"""Real-time recurrent learning: equal to backpropagation through time, at the cost it says, and able to learn."""

import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import nn, optim
from tinytape.engine.tree import flatten
from tinytape.loop import rtrl
from tinytape.nn import functional as F

I, H = 2, 3
CELLS = {
    "RNN": nn.RNNCell,
    "GRU": nn.GRUCell,
    "GRU before": lambda *sizes, **options: nn.GRUCell(*sizes, reset_after=False, **options),
    "LSTM": nn.LSTMCell,
    "peephole": nn.PeepholeLSTMCell,
    "coupled": nn.CoupledLSTMCell,
    "layer norm": nn.LayerNormLSTMCell,
    "zoneout": nn.ZoneoutLSTMCell,
    "minimal": nn.MinimalGatedUnitCell,
    "memory": lambda i, h, **options: nn.MemoryAttentionCell(i, h, 3, 2, **options),
}


class Readout(nn.Module):
    """A readout with its loss."""

    def __init__(self, dtype="float64"):
        self.linear = nn.Linear(H, 1, generator=tt.Generator(1), dtype=dtype)

    def forward(self, h, target):
        return F.mse_loss(self.linear(h), target, "sum")


def make(kind, dtype="float64"):
    return CELLS[kind](I, H, generator=tt.Generator(0), dtype=dtype), Readout(dtype)


def data(steps, rows, seed=0, dtype="float64"):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(steps, rows, I)).astype(dtype), rng.normal(size=(steps, rows, 1)).astype(dtype)


def through_time(cell, loss, xs, targets, state=None):
    """The sum of the losses by a plain loop and one backward walk; None stands for a step without a target."""
    state, total = cell.initial_state(xs.shape[1]) if state is None else state, 0.0
    for x, target in zip(xs, targets, strict=True):
        state = cell(x, state)
        if target is not None:
            total = total + loss(flatten(state)[0], target)
    total.backward()
    return total.item()


def gradients(*modules):
    parameters = [p for module in modules for p in module.parameters()]
    found = [np.zeros(p.shape, p.dtype) if p.grad is None else p.grad.numpy() for p in parameters]
    for module in modules:
        module.zero_grad()
    return found


def close(found, expected, tolerance=1e-10):
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# ---- the same gradient ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", CELLS)
@given(steps=st.integers(1, 6), rows=st.integers(1, 3), seed=st.integers(0, 99), marks=st.integers(0, 31))
def test_it_equals_backpropagation_through_time(kind, steps, rows, seed, marks):
    """Also where only some steps have a target, the last always; and for zones, drawn alike in both."""
    (cell, loss), (xs, targets) = make(kind), data(steps, rows, seed)
    targets = [y if t == steps - 1 or marks >> t & 1 else None for t, y in enumerate(targets)]
    learner = tt.RTRL(cell, loss, rows=rows)
    cell.generator = tt.Generator(seed)
    total = sum(v.item() for x, y in zip(xs, targets, strict=True) if (v := learner.step(x, y)) is not None)
    found = gradients(cell, loss)
    cell.generator = tt.Generator(seed)
    assert through_time(cell, loss, xs, targets) == pytest.approx(total, rel=1e-12)
    close(found, gradients(cell, loss))


def test_the_influence_matrix_is_the_jacobian_of_the_state():
    (cell, _), (xs, _) = make("LSTM"), data(4, 2)
    learner = tt.RTRL(cell, rows=2)
    for x in xs:
        learner.step(x)

    def state(w):
        carried = None
        for x in xs:
            carried = nn.functional_call(cell, {"weight_hh": w}, x, carried)
        return tt.concatenate(carried, axis=-1)

    start = cell.weight_ih.size
    part = learner.influence[:, :, start : start + cell.weight_hh.size]
    expected = tt.jacfwd(state)(cell.weight_hh.numpy()).reshape(part.shape)
    np.testing.assert_allclose(part, expected, rtol=1e-10, atol=1e-12)


class Learned(nn.Module):
    """A state of a vector and a count, in a dict, that starts from a parameter."""

    def __init__(self):
        self.start, self.weight = nn.Parameter(np.array([0.3, -0.2])), nn.Parameter(np.array([[0.5, 0.1], [0.2, -0.7]]))

    def initial_state(self, rows):
        return {"h": tt.broadcast_to(self.start, (rows, 2)), "steps": np.zeros(rows, np.int64)}

    def forward(self, x, state):
        return {"h": tt.tanh(state["h"] @ self.weight + x), "steps": state["steps"] + 1}


def test_a_learned_start_and_a_state_with_a_count():
    cell, (xs, _) = Learned(), data(3, 2)
    learner = tt.RTRL(cell, lambda h, y: (h * y).sum(), rows=2)
    assert learner.cost.state == 2
    for x in xs:
        learner.step(x, 2.0)
    assert learner.state["steps"].data.tolist() == [3, 3]
    found = gradients(cell)
    through_time(cell, lambda h, y: (h * y).sum(), xs, [2.0, 2.0, 2.0])
    close(found, gradients(cell))


def test_a_function_with_its_parameters():
    w = tt.tensor(np.array([[0.5, 0.1], [0.2, -0.7]]), requires_grad=True)
    learner = tt.RTRL(
        lambda x, h: tt.tanh(h @ w + x), lambda h, y: (h - y).square().sum(), np.ones((1, 2)), parameters=[w]
    )
    xs, _ = data(3, 1)
    for x in xs:
        learner.step(x, 0.5)
    h, total = tt.tensor(np.ones((1, 2))), 0.0
    for x in xs:
        h = tt.tanh(h @ w + x)
        total = total + (h - 0.5).square().sum()
    found, w.grad = w.grad.numpy(), None
    total.backward()
    close([found], [w.grad.numpy()])


def test_a_reset_starts_a_row_anew():
    (cell, loss), (xs, targets) = make("LSTM"), data(5, 2)
    learner = tt.RTRL(cell, loss, rows=2)
    for t in range(5):
        learner.step(xs[t], targets[t], reset=np.array([t == 2, False]))
    found = gradients(cell, loss)
    for part, row in [(np.s_[:2], 0), (np.s_[2:], 0), (np.s_[:], 1)]:
        through_time(cell, loss, xs[part, row : row + 1], targets[part, row : row + 1])
    close(found, gradients(cell, loss))


def test_frozen_and_shared_parameters():
    (cell, loss), (xs, targets) = make("GRU"), data(4, 1)
    cell.weight_ih.requires_grad = False
    cell.bias_ih = cell.bias_hh
    learner = tt.RTRL(cell, loss)
    assert learner.cost.parameters == cell.weight_hh.size + cell.bias_hh.size
    for x, y in zip(xs, targets, strict=True):
        learner.step(x, y)
    found = [p.grad.numpy() for p in (cell.weight_hh, cell.bias_hh)]
    cell.zero_grad()
    through_time(cell, loss, xs, targets)
    close(found, [p.grad.numpy() for p in (cell.weight_hh, cell.bias_hh)])
    assert cell.weight_ih.grad is None


def test_a_loss_that_uses_the_cells_own_parameters():
    cell, (xs, targets) = nn.RNNCell(I, H, dtype="float64"), data(4, 1)

    def loss(h, target):
        return (h @ cell.weight_ih - target).square().sum()

    learner = tt.RTRL(cell, loss)
    for x, y in zip(xs, targets, strict=True):
        learner.step(x, y)
    found = gradients(cell)
    through_time(cell, loss, xs, targets)
    close(found, gradients(cell))


def test_hooks_see_gradients_and_no_derivatives_of_states():
    (cell, loss), (xs, targets) = make("GRU"), data(4, 1)
    remove = cell.weight_hh.register_hook(lambda g: 2 * g)
    learner = tt.RTRL(cell, loss)
    for x, y in zip(xs, targets, strict=True):
        learner.step(x, y)
    remove()
    found = gradients(cell, loss)
    through_time(cell, loss, xs, targets)
    expected = gradients(cell, loss)
    expected[1] *= 2
    close(found, expected)


def test_float32_and_no_grad_outside():
    (cell, loss), (xs, targets) = make("GRU", "float32"), data(6, 2, dtype="float32")
    learner = tt.RTRL(cell, loss, rows=2)
    assert learner.influence.dtype == np.float32
    with tt.no_grad():
        for x, y in zip(xs, targets, strict=True):
            learner.step(x, y)
    found = gradients(cell, loss)
    through_time(cell, loss, xs, targets)
    close(found, gradients(cell, loss), 1e-4)


# ---- what it costs --------------------------------------------------------------------------------------------------


def test_the_cost_is_what_it_says(monkeypatch):
    cell, loss = make("LSTM")
    learner, walks = tt.RTRL(cell, loss, rows=2), []
    size = sum(p.size for p in cell.parameters())
    assert learner.cost == (2, 2 * H, size, 2 * learner.influence.nbytes, 2 * 2 * (2 * H) ** 2 * size, 2 * 2 * H)
    assert learner.influence.shape == (2, 2 * H, size)
    walk = rtrl.walk
    monkeypatch.setattr(rtrl, "walk", lambda *args, **options: walks.append(1) or walk(*args, **options))
    learner.step(np.zeros((2, I)))
    assert len(walks) == learner.cost.walks
    assert str(learner.cost) in repr(learner) and f"{size} parameters" in repr(learner)


def test_nothing_of_the_past_is_kept():
    cell, loss = make("LSTM")
    nodes = []

    def watched(x, state):
        after = cell(x, state)
        nodes.append(weakref.ref(after[0].node))
        return after

    learner = tt.RTRL(watched, loss, cell.initial_state(1), parameters=cell.parameters())
    gc.collect()
    gc.disable()
    try:
        for x, y in zip(*data(3, 1), strict=True):
            value = learner.step(x, y)
        assert [node() for node in nodes] == [None] * 3
    finally:
        gc.enable()
    assert not value.requires_grad and not any(part.requires_grad for part in learner.state)


def test_it_learns_online():
    """To put out the input of two steps before, which no feedforward net can; its weights change at every step."""
    rng = np.random.default_rng(0)
    cell, readout = nn.GRUCell(1, 8, generator=tt.Generator(0)), nn.Linear(8, 1, generator=tt.Generator(1))
    learner = tt.RTRL(cell, lambda h, y: F.mse_loss(readout(h), y))
    optimizer = optim.Adam([*cell.parameters(), *readout.parameters()], lr=1e-2)
    stream, losses = rng.choice([-1.0, 1.0], size=(1500, 1, 1)).astype(np.float32), []
    for t in range(2, len(stream)):
        losses.append(learner.step(stream[t], stream[t - 2]).item())
        optimizer.step()
        optimizer.zero_grad()
    assert np.mean(losses[:100]) > 0.7 and np.mean(losses[-100:]) < 0.1


# ---- bad input ------------------------------------------------------------------------------------------------------

CELL, LOSS = make("GRU")
X, Y = np.zeros((1, I)), np.zeros((1, 1))


def mixing(x, h):
    return h - h.mean(axis=0, keepdims=True) + CELL.weight_hh.sum()


BAD = {
    "too large": (
        lambda: tt.RTRL(CELL, LOSS, rows=9, limit=1000), tt.InputError, "63 parameters: 27,216 bytes.*limit is 1,000"
    ),
    "rows of x": (lambda: tt.RTRL(CELL, LOSS).step(np.zeros((2, I))), tt.ShapeError, r"\(2, 2\), the state has 1 rows"),
    "reset": (lambda: tt.RTRL(CELL, LOSS).step(X, Y, reset=[1]), tt.ShapeError, r"reset is int64\[1\]"),
    "no loss": (lambda: tt.RTRL(CELL).step(X, Y), tt.InputError, "but no loss"),
    "no scalar": (lambda: tt.RTRL(CELL, lambda h, y: h).step(X, Y), tt.ShapeError, r"the loss is float64\[1, 3\]"),
    "no parameters": (lambda: tt.RTRL(lambda x, h: h, state=X), tt.InputError, "function has no parameters"),
    "no state": (lambda: tt.RTRL(lambda x, h: h, parameters=[LOSS.linear.weight]), tt.InputError, "no initial_state"),
    "state's shapes": (lambda: tt.RTRL(CELL, state=(X, np.zeros((2, 2)))), tt.ShapeError, r"\(1, 2\), \(2, 2\)"),
    "state of integers": (lambda: tt.RTRL(CELL, state=np.zeros((1, H), int)), tt.DTypeError, "first leaf is int64"),
    "no rows": (lambda: tt.RTRL(CELL, rows=0), tt.DTypeError, r"float64\[0, 3\]"),
    "other state": (
        lambda: tt.RTRL(lambda x, h: h[:, :2], state=np.zeros((1, H)), parameters=[CELL.weight_hh]).step(X),
        tt.ShapeError, r"float64\[1, 3\] to one of float64\[1, 2\]",
    ),
    "rows that meet": (
        lambda: tt.RTRL(mixing, state=np.ones((2, H)), parameters=[CELL.weight_hh]).step(np.zeros((2, I))),
        tt.InputError, "row 0 of the state depends on row 1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=r"(?s)" + words) as caught:
        call()
    assert "\n  help: " in str(caught.value)
