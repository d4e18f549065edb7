"""The first value that is not finite: drawn places, forward and backward, in compiled loops and in others."""

import math
import weakref
from contextlib import nullcontext
from unittest import mock

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from scanning import by_numpy
from tinytape import nn
from tinytape.inspect import first_backward, first_nonfinite
from tinytape.kernels.compiler import usable

H = 3

FORWARD = {  # from a value v and a mark m, 1 where it is to happen and 0 elsewhere
    "log": lambda v, m: v + tt.log(1 - m),
    "divide": lambda v, m: v * (1 / (1 - m)),
    "sqrt": lambda v, m: v + tt.sqrt(1 - 2 * m),
    "exp": lambda v, m: v * tt.exp(1000 * m),
    "power": lambda v, m: v + (-1.5 * m) ** 0.5,
}

BACKWARD = {  # finite, and its derivative is not
    "sqrt": lambda v, m: tt.sqrt(tt.square(v * (1 - m))),
    "power": lambda v, m: (tt.abs(v) * (1 - m)) ** 0.5,
    "log": lambda v, m: tt.where(m > 0, 0.0, tt.log((1 + v * v) * (1 - m))),
    "divide": lambda v, m: tt.where(m > 0, 0.0, 1 / ((1 + v * v) * (1 - m))),
}


class Rnn(nn.Module):
    """A cell with a line where it happens."""

    def __init__(self, bomb, rng):
        self.bomb = bomb
        self.u = nn.Parameter(0.3 * rng.normal(size=(H, H)))

    def forward(self, x, state):
        given, mark = x[:, :H], x[:, H:]
        return self.bomb(tt.tanh(given + state @ self.u), mark)

    def initial_state(self, rows):
        return np.zeros((rows, H))


class Lstm(Rnn):
    def __init__(self, bomb, rng):
        super().__init__(bomb, rng)
        self.u = nn.Parameter(0.3 * rng.normal(size=(H, 4 * H)))

    def forward(self, x, state):
        h, c = state
        given, mark = x[:, :H], x[:, H:]
        i, f, o, g = tt.split(tt.concatenate([given] * 4, axis=-1) + h @ self.u, 4, axis=-1)
        c = tt.sigmoid(f) * c + tt.sigmoid(i) * tt.tanh(g)
        return self.bomb(tt.sigmoid(o) * tt.tanh(c), mark), c

    def initial_state(self, rows):
        return np.zeros((rows, H)), np.zeros((rows, H))


class Model(nn.Module):
    def __init__(self, cell, reverse=False):
        self.loop = nn.Recurrent(cell, reverse=reverse)

    def forward(self, x):
        return self.loop(x)[0]


places = st.integers(1, 9).flatmap(
    lambda steps: st.tuples(st.just(steps), st.integers(1, 4), st.integers(0, steps - 1))
)
ways = {"by kernels": by_numpy, "step by step": tt.no_compile}  # the source of kernels, not waiting for a compiler


def marked(rng, steps, rows, step, row):
    x = np.concatenate([rng.normal(size=(steps, rows, H)), np.zeros((steps, rows, 1))], axis=-1)
    x[step, row, H] = 1.0
    return x


def assert_found(finding, phase, op, step, row, steps, reverse, what):
    assert (finding.phase, finding.kind, finding.step, finding.row) == (phase, "op", step, row)
    assert finding.op.removesuffix("_of_tensor") == op
    assert "test_nonfinite.py:" in finding.place.line and what in finding.place.line
    assert finding.place.layer == "loop.cell"
    assert all(found.nans == found.infinities == 0 for found in finding.inputs if found.name != "out")
    forwards = (phase == "forward") != reverse
    before = list(range(max(0, step - 5), step)) if forwards else list(range(min(steps - 1, step + 5), step, -1))
    assert [t for t, _ in finding.before] == before
    assert f"step {step}, row {row}" in str(finding)


@pytest.mark.parametrize("way", ways)
@pytest.mark.parametrize("cell", [Rnn, Lstm])
@pytest.mark.parametrize("op", FORWARD)
@given(place=places, row=st.integers(0, 3), reverse=st.booleans(), seed=st.integers(0, 99))
def test_forward(way, cell, op, place, row, reverse, seed):
    steps, rows, step = place
    rng, row = np.random.default_rng(seed), row % rows
    model = Model(cell(FORWARD[op], rng), reverse)
    x = marked(rng, steps, rows, step, row)
    with ways[way]():
        finding = first_nonfinite(lambda x: model(x).sum(), x, model=model)
    assert_found(finding, "forward", op, step, row, steps, reverse, f'"{op}"')


@pytest.mark.parametrize("way", ways)
@pytest.mark.parametrize("cell", [Rnn, Lstm])
@pytest.mark.parametrize("op", BACKWARD)
@given(place=places, row=st.integers(0, 3), reverse=st.booleans(), seed=st.integers(0, 99))
def test_backward(way, cell, op, place, row, reverse, seed):
    steps, rows, step = place
    rng, row = np.random.default_rng(seed), row % rows
    model = Model(cell(BACKWARD[op], rng), reverse)
    x = marked(rng, steps, rows, step, row)
    with ways[way]():
        finding = first_nonfinite(lambda x: model(x).mean(), x, model=model)
    assert_found(finding, "backward", op, step, row, steps, reverse, f'"{op}"')
    assert finding.reached == ("loop.cell.u",)
    assert (f"{op} gave infinity" in finding.masked) == (op in ("log", "divide"))


@pytest.mark.parametrize("way", [nullcontext, tt.no_compile])
@given(seed=st.integers(0, 99))
def test_a_clean_run_has_nothing_and_is_left_as_it_was(way, seed):
    model = nn.Sequential(nn.LSTM(4, 5, 2, dropout=0.5), First(), nn.Dropout(0.3), nn.Linear(5, 2))
    x = np.random.default_rng(seed).normal(size=(6, 3, 4)).astype(np.float32)
    tt.manual_seed(seed)
    with way():
        model(x).sum().backward()
        state, grads = tt.default_generator.state(), {n: p.grad for n, p in model.named_parameters()}
        before = model.state_dict()
        assert first_nonfinite(lambda: model(x).sum(), model=model) is None
    np.testing.assert_array_equal(tt.default_generator.state(), state)
    assert all(p.grad is grads[name] for name, p in model.named_parameters())
    for name, values in model.state_dict().items():
        np.testing.assert_array_equal(values, before[name])


class First(nn.Module):
    def forward(self, pair):
        return pair[0]


# ---- layers ---------------------------------------------------------------------------------------------------------


def relu_rnn(batch_first=False):
    rnn = nn.RNN(2, 4, nonlinearity="relu", batch_first=batch_first)
    with tt.no_grad():
        rnn.weight_hh_l0.copy_(1e6 * np.eye(4))
        for name in ("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"):
            getattr(rnn, name).copy_(np.full(getattr(rnn, name).shape, 0.5 if "weight" in name else 0.0))
    return rnn


@pytest.mark.parametrize("batch_first", [False, True])
@given(start=st.integers(0, 5), row=st.integers(0, 2))
def test_an_explosion_forward(batch_first, start, row):
    """h grows a million times a step, from a single 1 on: NumPy says when float32 ends."""
    rnn, steps = relu_rnn(batch_first), 15
    x = np.zeros((steps, 3, 2), np.float32)
    x[start, row, 0] = 1.0
    h, norms = np.float32(0), []
    with np.errstate(over="ignore"):
        for t in range(steps):
            h = np.float32(1e6) * h + np.float32(0.5) * x[t, row, 0]
            norms.append(2 * float(h))
    step = int(np.argmax(np.isinf(norms)))
    given = np.swapaxes(x, 0, 1) if batch_first else x
    finding = first_nonfinite(lambda x: rnn(x)[1].sum(), given, model=rnn, axes="BT" if batch_first else "TB", before=3)
    assert (finding.phase, finding.kind, finding.step, finding.row) == ("forward", "op", step, row)
    assert finding.place.layer == "RNN" and "weight_hh_l0" in finding.parameters
    assert finding.place.inner.startswith(("cells.py", "functional.py"))
    assert finding.before == [(t, pytest.approx(norms[t], rel=1e-5)) for t in range(step - 3, step)]


@pytest.mark.parametrize("axes", ["TB", "BT", "T", "B", ""])
def test_before_a_loop_steps_are_told_by_the_layout(axes):
    """What is computed for all steps at once, too, has its step and its row."""
    W = tt.tensor(np.full((2, 3), 1e20, np.float32), requires_grad=True)
    x = np.zeros((7, 4, 2), np.float32)
    x[5, 2] = 1e20
    told = {"TB": (5, 2), "BT": (2, 5), "T": (5, None), "B": (None, 5), "": (None, None)}[axes]
    finding = first_nonfinite(lambda x: tt.tanh(x @ W).sum() / 0.0, x, model={"W": W}, axes=axes)
    assert finding.op == "divide" and finding.step is finding.row is None  # the infinity before it was masked
    finding = first_nonfinite(lambda x: (x @ W).mean(), x, model={"W": W}, axes=axes)
    assert (finding.op, finding.step, finding.row, finding.index) == ("matmul", *told, (5, 2, 0))
    assert finding.parameters == ("W",)
    if axes == "TB":
        flat = first_nonfinite(lambda x: (tt.reshape(x, (28, 2)) @ W).mean(), x, model={"W": W}, axes=axes)
        assert (flat.step, flat.row, flat.index) == (5, 2, (22, 0))


@pytest.mark.parametrize("way", ["kernels", *ways])
def test_an_explosion_backward(way):
    """dL/dh grows a million times a step backwards, in one row."""
    if way == "kernels":
        usable() or pytest.skip("needs Numba")
    rnn, steps = nn.RNN(2, 4), 15
    with tt.no_grad():
        for name, p in rnn.named_parameters():
            p.copy_(1e6 * np.eye(4) if name == "weight_hh_l0" else np.zeros(p.shape))
    x = np.zeros((steps, 3, 2), np.float32)
    g, t = np.float32(1.0), steps - 1
    while np.isfinite(g):  # what arrives at h before step t
        with np.errstate(over="ignore"):
            g, t = g * np.float32(1e6), t - 1
    with (ways.get(way) or nullcontext)():
        finding = first_nonfinite(lambda x: rnn(x)[0][-1, 1].sum(), x, model=rnn)
    assert (finding.phase, finding.kind, finding.step, finding.row) == ("backward", "op", t + 1, 1)
    assert finding.place.layer == "RNN"
    assert [k for k, _ in finding.before] == list(range(min(steps - 1, t + 6), t + 1, -1))


def test_parts_of_the_walk_are_kept_for_about_the_root_of_the_steps():
    """A compiled scan is taken apart in blocks: its records are never there all at once."""
    steps, alive, most = 400, weakref.WeakSet(), 0
    append = first_backward._Adjoint.append

    def counting(self, node, args, params, out):
        nonlocal most
        append(self, node, args, params, out)
        alive.add(node)
        most = max(most, len(alive))

    rng = np.random.default_rng(0)
    model = Model(Rnn(BACKWARD["sqrt"], rng))
    x = marked(rng, steps, 1, 10, 0)
    with by_numpy(), mock.patch.object(first_backward._Adjoint, "append", counting):
        finding = first_nonfinite(lambda x: model(x).mean(), x, model=model)
    assert (finding.op, finding.step) == ("sqrt", 10)
    assert most < 15 * 2 * math.isqrt(steps)


@pytest.mark.slow
def test_a_hundred_thousand_steps():
    rng = np.random.default_rng(0)
    model = Model(Rnn(BACKWARD["sqrt"], rng))
    finding = first_nonfinite(lambda x: model(x).mean(), marked(rng, 100_000, 1, 31_415, 0), model=model)
    assert (finding.op, finding.step) == ("sqrt", 31_415)


# ---- what is run again ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpoint", [1, 4, "sqrt", "1 kB"])
@pytest.mark.parametrize("reverse", [False, True])
def test_a_scan_under_a_plan_that_draws_random_numbers(checkpoint, reverse):
    u = tt.tensor(np.eye(H), requires_grad=True)
    places = []

    def step(h, x):
        noise = tt.default_generator.uniform((2, H), dtype=np.float64)
        wrong = noise < 0.02
        places.extend((int(x[0, 0].item()), int(i)) for i in np.argwhere(wrong)[:, 0])
        h = tt.sqrt(tt.square((h @ u + 1) * ~wrong))
        return h, h

    x = np.broadcast_to(np.arange(20.0)[:, None, None], (20, 2, H))
    tt.manual_seed(3)
    finding = first_nonfinite(
        lambda x: tt.scan(step, np.zeros((2, H)), x, reverse=reverse, checkpoint=checkpoint)[1].sum(), x, model={"u": u}
    )
    once = dict.fromkeys(places)
    step_found = min(once)[0] if reverse else max(once)[0]
    assert (finding.phase, finding.op, finding.step) == ("backward", "sqrt", step_found)
    assert finding.row == min(row for t, row in once if t == step_found)
    assert "tt.sqrt(tt.square((h" in finding.place.line


@pytest.mark.parametrize("way", [nullcontext, tt.no_compile])
def test_a_checkpoint_in_a_checkpoint(way):
    w = tt.tensor(np.array([1.0, 0.0, 2.0]), requires_grad=True)

    def inner(v):
        return tt.sqrt(v * v)

    def outer(v):
        return tt.checkpoint(inner)(v * 2).sum()

    with way():
        finding = first_nonfinite(lambda: tt.checkpoint(outer)(w), model={"w": w})
    assert (finding.phase, finding.op, finding.index) == ("backward", "sqrt", (1,))
    assert "tt.sqrt(v * v)" in finding.place.line and finding.reached == ("w",)


# ---- who is to blame ------------------------------------------------------------------------------------------------


def test_a_parameter_and_an_input_that_were_so_before():
    lstm = nn.LSTM(2, 3, 2)
    x = np.zeros((5, 4, 2), np.float32)
    with tt.no_grad():
        lstm.weight_hh_l1[2, 1] = np.nan
    finding = first_nonfinite(lambda x: lstm(x)[0].sum(), x, model=lstm)
    assert (finding.kind, finding.name, finding.index) == ("parameter", "weight_hh_l1", (2, 1))
    assert finding.step is finding.row is None and "parameter weight_hh_l1 has NaN" in str(finding)
    x[3, 1, 0] = np.inf
    finding = first_nonfinite(lambda batch: nn.Linear(2, 1)(batch["x"]).sum(), {"x": x})
    assert (finding.kind, finding.name, finding.step, finding.row) == ("input", "args[0]['x']", 3, 1)


def test_masked_infinities_are_not_to_blame():
    w = tt.tensor([0.0, 1.0], requires_grad=True)
    mask = np.array([True, False])

    def attention():  # an infinite constant, and a row that is all masked
        return tt.softmax(tt.where(mask, -np.inf, w), axis=-1)[1]

    assert first_nonfinite(attention, model={"w": w}) is None
    assert first_nonfinite(lambda: tt.where(mask, 0.0, tt.log(w.detach())).sum() * w.sum(), model={"w": w}) is None
    finding = first_nonfinite(lambda: tt.softmax(tt.where([True, True], -np.inf, w), axis=-1).sum(), model={"w": w})
    assert (finding.phase, finding.kind, finding.op) == ("forward", "op", "softmax")
    both = first_nonfinite(lambda: (tt.where(mask, 0.0, tt.log(w)) + tt.exp(w * 1e3)).sum(), model={"w": w})
    assert (both.phase, both.op) == ("forward", "exp")  # the first that reaches the result


def test_where_an_infinity_becomes_nan_and_what_is_ignored():
    w = tt.tensor([0.0, 1.0], requires_grad=True)

    def f():
        return (tt.log(w) * (w * 0.0)).sum()

    finding = first_nonfinite(f, model=[w])
    assert (finding.op, finding.turned.partition(":")[0]) == ("log", "multiply made NaN of it")
    assert first_nonfinite(f, model=[w], ignore=["log"]).op == "multiply"
    assert first_nonfinite(lambda: tt.log(w - 1).sum(), model=[w], ignore=["log"]).value.nans == 1  # NaN is never meant


def test_gradients_that_overflow_where_they_are_added_up():
    w = tt.tensor(np.float32(1e-30), requires_grad=True)
    finding = first_nonfinite(lambda: tt.stack([w * np.float32(3e38), w * np.float32(3e38)]).sum(), model={"w": w})
    assert (finding.phase, finding.kind, finding.name) == ("backward", "sum", "w")
    finding = first_nonfinite(lambda: (lambda v: v * np.float32(3e38) + v * np.float32(3e38))(w * 1.0), model={"w": w})
    assert (finding.phase, finding.kind, finding.op) == ("backward", "sum", "multiply")


def test_a_result_that_no_op_made_and_an_error_on_the_way():
    w = tt.tensor(1.0, requires_grad=True)
    assert first_nonfinite(lambda: tt.tensor(np.inf)).kind == "result"

    def refused():
        values = tt.log(w - 2)
        raise tt.InputError("not finite", "...") if np.isnan(values.item()) else values

    assert first_nonfinite(refused).op == "log"
    assert first_nonfinite(lambda: w.detach() * 2) is None  # nothing to differentiate

    def broken():
        raise tt.InputError("what is wrong", "...")

    with pytest.raises(tt.InputError, match="what is wrong"):
        first_nonfinite(broken)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: first_nonfinite(3), tt.DTypeError, "f is a int"),
        (lambda: first_nonfinite(lambda: 1.0), tt.DTypeError, "f returned a float"),
        (lambda: first_nonfinite(lambda: tt.tensor(1.0), axes="BTX"), tt.InputError, "axes is 'BTX'"),
        (lambda: first_nonfinite(lambda: tt.tensor(1.0), before=-1), tt.InputError, "before is -1"),
    ],
)
def test_bad_input(call, error, match):
    with pytest.raises(error, match=match):
        call()
