"""Gradient flow: norms of dL/dh_t against loops in which every state is a leaf of its own, verdicts, lags, shares."""

import io
import re
from contextlib import nullcontext, redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import tinytape as tt
from random_cells import cells
from scanning import by_numpy, needs_numba
from tinytape import inspect, nn
from tinytape.engine.tree import flatten, unflatten
from tinytape.inspect.verdict import judge
from tinytape.loop.probes import row_norms, watching
from tinytape.loop.scan import leaf_names

KINDS = {"RNN": (nn.RNN, nn.RNNCell, "h"), "GRU": (nn.GRU, nn.GRUCell, "h"), "LSTM": (nn.LSTM, nn.LSTMCell, "hc")}
HOW = [pytest.param("compiled", marks=needs_numba), "numpy", "eager"]


def running(how):
    """Run loops as kernels, as their NumPy source, or step by step."""
    return {"compiled": nullcontext, "numpy": by_numpy, "eager": tt.no_compile}[how]()


def norms_of(arrays):
    """(T, B) from T arrays (B, ...)."""
    return np.stack([np.sqrt(np.sum(np.square(a, dtype=np.longdouble), axis=tuple(range(1, a.ndim)))) for a in arrays])


def by_leaves(layer, x, loss_of, keep=None):
    """Outputs, and by run and state the norms (T, B) of what a zero leaf gets that is added to each step's state."""
    _, cell_type, states = KINDS[type(layer).__name__]
    steps, rows = x.shape[:2]
    keep = np.ones((steps, rows), bool) if keep is None else keep
    added, y = {}, [tt.tensor(a) for a in np.where(keep[:, :, None], x, 0)]
    for level in range(layer.num_layers):
        sides = []
        for way in ("", "_reverse")[: 1 + layer.bidirectional]:
            cell = cell_type(y[0].shape[-1], layer.hidden_size, dtype=x.dtype)
            for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
                setattr(cell, name, getattr(layer, f"{name}_l{level}{way}"))
            order = range(steps)[:: -1 if way else 1]
            state = tuple(tt.zeros((rows, layer.hidden_size), dtype=x.dtype) for _ in states)
            out = [None] * steps
            for t in order:
                after = cell(y[t], state if len(state) > 1 else state[0])
                after = after if isinstance(after, tuple) else (after,)
                leaves = [tt.zeros(s.shape, dtype=x.dtype, requires_grad=True) for s in after]
                for name, leaf in zip(states, leaves, strict=True):
                    added.setdefault((f"l{level}{way}", name), [None] * steps)[t] = leaf
                after = [s + leaf for s, leaf in zip(after, leaves, strict=True)]
                state = tuple(tt.where(keep[t][:, None], a, b) for a, b in zip(after, state, strict=True))
                out[t] = tt.where(keep[t][:, None], after[0], 0.0)
            sides.append(out)
        y = sides[0] if len(sides) == 1 else [tt.concatenate(pair, axis=-1) for pair in zip(*sides, strict=True)]
    loss_of(tt.stack(y)).backward()
    zeros = np.zeros((rows, layer.hidden_size))
    return {
        name: norms_of([zeros if leaf.grad is None else leaf.grad.data for leaf in leaves])
        for name, leaves in added.items()
    }


def layer_of(kind, inputs, hidden, seed=0, **options):
    return KINDS[kind][0](inputs, hidden, dtype=np.float64, generator=tt.Generator(seed), **options)


def compare(layer, x, loss_of, how, keep=None, **options):
    expected = by_leaves(layer, x, loss_of, keep)
    with running(how), inspect.flow(layer) as flow:
        loss_of(layer(x, **options)[0]).backward()
    assert {(run, leaf) for run, leaves in flow.norms.items() for leaf in leaves} == set(expected)
    for (run, leaf), norms in expected.items():
        np.testing.assert_allclose(flow.rows(run, leaf), norms.astype(float), rtol=1e-9, atol=1e-300)
        np.testing.assert_allclose(flow.norms[run][leaf], np.sqrt(np.sum(norms**2, axis=1)).astype(float), rtol=1e-9)


@pytest.mark.parametrize(
    ("kind", "how"),
    [
        *[(kind, how) for kind in KINDS for how in ("numpy", "eager")],
        pytest.param("LSTM", "compiled", marks=needs_numba),
    ],
)
def test_norms_are_those_of_states_as_leaves(kind, how):
    x = np.random.default_rng(1).normal(size=(7, 3, 4))
    layer = layer_of(kind, 4, 5, num_layers=2, bidirectional=True)
    compare(layer, x, lambda y: (y * y).sum() + tt.tanh(y[2]).sum(), how)


@given(st.data())
def test_norms_of_drawn_layers(data):
    draw = data.draw
    kind, how = draw(st.sampled_from(sorted(KINDS))), draw(st.sampled_from(["numpy", "eager"]))
    steps, rows, inputs, hidden, layers = (draw(st.integers(1, most)) for most in (6, 4, 4, 5, 2))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    lengths = draw(st.none() | st.lists(st.integers(0, steps), min_size=rows, max_size=rows))
    layer = layer_of(kind, inputs, hidden, num_layers=layers, bidirectional=draw(st.booleans()))
    weight = rng.normal(size=(steps, 1, 1)) * rng.integers(0, 2, (steps, 1, 1))
    keep = None if lengths is None else np.arange(steps)[:, None] < np.array(lengths)
    loss_of = lambda y: (weight * y * y).sum()  # noqa: E731
    compare(layer, rng.normal(size=(steps, rows, inputs)), loss_of, how, keep, lengths=lengths)


@given(cells())
def test_drawn_cells(cell):
    """Compiled and step by step alike; and as zeros that are added to what the step returns."""
    found = {}
    for how in ("numpy", "eager"):
        cell = cell.again()
        with running(how), inspect.flow() as flow:
            loss = total(tt.scan(cell.f, cell.init, cell.xs, cell.length, cell.reverse))
            if not isinstance(loss, tt.Tensor) or not loss.requires_grad:
                return
            loss.backward()
        found[how] = flow.norms["f"]
    expected = scan_by_leaves(cell.again())
    for leaf, norms in expected.items():
        size = max(1.0, np.max(norms, initial=0.0))
        np.testing.assert_allclose(found["eager"][leaf], norms, rtol=1e-9, atol=1e-12 * size)
        np.testing.assert_allclose(found["numpy"][leaf], norms, rtol=1e-6, atol=1e-9 * size)


def total(results):
    leaves = [y for y in flatten(results) if y.dtype.kind == "f"]
    return sum((tt.sin(y) * (i + 1)).sum() for i, y in enumerate(leaves))


def scan_by_leaves(cell):
    added = {}

    def f(carry, given):
        x, zeros = given
        after, y = cell.f(carry, x)
        leaves, outputs = flatten(after), flatten(y)
        moved = [leaf + zero if leaf.dtype.kind == "f" else leaf for leaf, zero in zip(leaves, zeros, strict=True)]
        where = {id(leaf): new for leaf, new in zip(leaves, moved, strict=True)}
        return unflatten(after, moved), unflatten(y, [where.get(id(out), out) for out in outputs])

    steps = cell.length or len(flatten(cell.xs)[0])
    leaves = [np.asarray(x.data if isinstance(x, tt.Tensor) else x) for x in flatten(cell.init)]
    zeros = [tt.tensor(np.zeros((steps, *x.shape)), requires_grad=True) for x in leaves]
    loss = total(tt.scan(f, cell.init, (cell.xs, zeros), steps, cell.reverse, compiled=False))
    loss.backward()
    for name, x, zero in zip(leaf_names("carry", cell.init), leaves, zeros, strict=True):
        if x.dtype.kind == "f":
            grad = np.zeros(zero.shape) if zero.grad is None else zero.grad.data
            added[name] = np.sqrt((grad.reshape(steps, -1) ** 2).sum(axis=1))
    return added


@pytest.mark.parametrize("how", HOW)
def test_watching_changes_no_gradient(how):
    layer = layer_of("LSTM", 3, 4)
    x = np.random.default_rng(0).normal(size=(5, 2, 3))

    def gradients(context):
        layer.zero_grad()
        with context:
            y, _ = layer(x)
            (y * y).sum().backward()
        return [y.data, *(p.grad.data.copy() for p in layer.parameters())]

    with running(how):
        for a, b in zip(gradients(nullcontext()), gradients(inspect.flow()), strict=True):
            np.testing.assert_array_equal(a, b)


def test_checkpointed_scans_and_steps_of_any_number_of_rows():
    w = tt.tensor(np.random.default_rng(0).normal(size=(3, 3)), requires_grad=True)

    def f(h, x):
        h = tt.tanh(h @ w + x)
        return h, h

    for shape in [(4, 3), (3,)]:
        xs, init = np.ones((6, *shape)), np.zeros(shape)
        found = []
        for options in ({}, {"checkpoint": 2}, {"compiled": False}):
            with by_numpy(), inspect.flow() as flow:
                (tt.scan(f, init, xs, **options)[1] ** 2).sum().backward()
            found.append(flow.norms["f"]["carry"])
        np.testing.assert_allclose(found[1], found[0], rtol=1e-12)
        np.testing.assert_allclose(found[2], found[0], rtol=1e-12)
        assert (found[0] > 0).all()


def test_the_last_walk_counts_and_only_norms_are_kept():
    layer = layer_of("RNN", 2, 50)
    with tt.no_compile(), inspect.flow(layer) as flow:
        y, _ = layer(np.ones((8, 3, 2)))
        y.sum().backward(retain_graph=True)
        once = flow.norms["l0"]["h"]
        (3 * y).sum().backward(retain_graph=True)
    np.testing.assert_allclose(flow.norms["l0"]["h"], 3 * once)
    assert flow.rows("l0", "h").shape == (8, 3)
    assert flow.runs[0].sinks["h"].arrived.nbytes == 8 * 3 * 8


def test_create_graph_leaves_the_norms_of_its_walk():
    layer = layer_of("RNN", 2, 3)
    with by_numpy(), inspect.flow(layer) as flow:
        layer(np.ones((4, 2, 2)))[0].sum().backward(create_graph=True)
    with tt.no_compile(), inspect.flow(layer) as plain:
        layer(np.ones((4, 2, 2)))[0].sum().backward()
    np.testing.assert_allclose(flow.norms["l0"]["h"], plain.norms["l0"]["h"], rtol=1e-12)


def test_names():
    class Model(nn.Module):
        def __init__(self):
            self.encoder = nn.GRU(2, 3, num_layers=2, dtype=np.float64)
            self.own = nn.Recurrent(nn.LSTMCell(3, 3, dtype=np.float64))

        def forward(self, x):
            return self.own(self.encoder(x)[0])[0]

    model, x = Model(), np.ones((4, 2, 2))
    with tt.no_compile(), inspect.flow(model) as flow:
        (model(x) + model(x)).sum().backward()
    assert [run.name for run in flow.runs] == [
        "encoder.l0", "encoder.l1", "own", "encoder.l0 (2)", "encoder.l1 (2)", "own (2)",
    ]  # fmt: skip
    assert list(flow.norms["own"]) == ["state[0]", "state[1]"]
    np.testing.assert_allclose(flow.norms["own"]["state[0]"], flow.norms["own (2)"]["state[0]"])
    with tt.no_compile(), inspect.flow() as flow:
        model(x).sum().backward()
    assert [run.name for run in flow.runs] == ["GRU.l0", "GRU.l1", "Recurrent"]
    text = str(flow)
    assert "GRU.l0 h: " in text and "norms of dL/dh_t" in text


def test_what_is_not_watched():
    layer = layer_of("RNN", 2, 3)
    x = np.ones((4, 2, 2))
    inner = nn.RNN(3, 3, dtype=np.float64)

    def f(h, x):
        y, h = inner(tt.stack([h, h]))
        return h[0], y

    with by_numpy(), inspect.flow() as flow:
        with tt.no_grad():
            layer(x)
        tt.jvp(lambda a: layer(a)[0], [x], [x])
        assert flow.runs == []
        tt.scan(f, np.zeros((2, 3)), length=2, xs=None, compiled=False)
        assert [run.name for run in flow.runs] == ["f"]
    assert watching() is None
    with tt.no_compile():
        layer(x)
    assert len(flow.runs) == 1


@settings(max_examples=60)
@given(st.sampled_from([np.float32, np.float64]), st.integers(-320, 320), st.integers(0, 99))
def test_row_norms_have_the_range_of_floats(dtype, power, seed):
    info = np.finfo(dtype)
    size = 10.0 ** np.clip(power, np.log10(info.tiny) + 3, np.log10(info.max) - 3)
    g = (np.random.default_rng(seed).uniform(0.1, 1, (3, 4, 5)) * size).astype(dtype)
    exact = np.sqrt(np.sum(np.square(g.astype(np.longdouble)), axis=(1, 2)))
    np.testing.assert_allclose(row_norms(g), exact, rtol=4 * info.eps)
    assert row_norms(g).dtype == dtype
    g[0], g[1, 0, 0], g[2, 0, 0] = 0, np.inf, np.nan
    np.testing.assert_array_equal(row_norms(g), [0, np.inf, np.nan])


# ---- verdicts -------------------------------------------------------------------------------------------------------


def linear(rho, size=6, seed=0):
    """h' = rho Q h + x with Q orthogonal."""
    q = np.linalg.qr(np.random.default_rng(seed).normal(size=(size, size)))[0]
    w = tt.tensor(rho * q, requires_grad=True)

    def f(h, x):
        h = h @ w + x
        return h, h

    return f


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("rho", [0.5, 0.8, 0.99, 1.0, 1.02, 1.3])
def test_linear_networks(rho, how):
    steps = 200
    xs = np.random.default_rng(1).normal(size=(steps, 3, 6))
    with running(how), inspect.flow() as flow:
        tt.scan(linear(rho), np.zeros((3, 6)), xs, compiled=how != "eager")[0].sum().backward()
    norms = flow.norms["f"]["carry"]
    lags = np.arange(steps)[::-1]
    np.testing.assert_allclose(np.log(norms), np.log(np.sqrt(18)) + lags * np.log(rho), rtol=1e-10, atol=1e-10)
    verdict = flow.verdict()
    if rho == 1:
        assert verdict.kind == "steady" and "steady: between 1.0 and 1.0 times its size over 199 steps" in str(flow)
        return
    half = -np.log(2) / np.log(rho)
    assert verdict.half_life == pytest.approx(half, rel=1e-9)
    if rho < 1:
        assert verdict.kind == "vanishes"
        assert verdict.horizon == (int(np.log(0.01) / np.log(rho)) if rho**199 < 0.01 else None)
    else:
        assert verdict.kind == "explodes" and verdict.horizon is None


def test_words():
    lags = np.arange(64.0)
    assert str(judge(-lags / 3.1)) == "vanishes: halves every 3.1 steps; 1% left beyond 20 steps"
    assert str(judge(lags[:41] / 2)) == "explodes: doubles every 2.0 steps; 1.05e+06 times as large after 40 steps"
    assert str(judge(-lags / 200)) == "steady: between 0.8 and 1.0 times its size over 63 steps"
    assert str(judge(-lags / 20)) == "vanishes: halves every 20.0 steps; 11% left after 63 steps"
    assert str(judge([-np.inf, -np.inf])) == "nothing: no gradient arrives"
    assert str(judge([0.0, 1.0, np.nan])) == "not finite: infinity or NaN from 2 steps back on"
    assert str(judge([0.0])) == "reaches one step only, so there are no lags"
    assert str(judge([0.0, -np.inf])) == "vanishes at once: exactly zero from 1 step back on"
    assert str(judge(2000 * lags[:3])) == "explodes: doubles every 0.0005 steps; 2^4000 times as large after 2 steps"


def test_plateaus_humps_and_underflow():
    lags = np.arange(100.0)
    levels = judge(np.maximum(-lags, -10.0))
    assert levels.half_life == pytest.approx(1.0) and levels.horizon == 6
    assert levels.text.endswith("1% left beyond 6 steps; levels off at about 0.098%")
    keeps = judge(np.where(lags < 3, -lags, -3 + 0.5 * np.sin(lags)))
    assert keeps.kind == "steady" and keeps.horizon is None
    assert keeps.text.startswith("falls to 13% in 3 steps, then steady: between ")
    hump = judge(np.minimum(lags, 20 - lags / 2))
    assert hump.kind == "vanishes" and hump.text.startswith("grows ")
    assert hump.half_life == pytest.approx(2.0, rel=0.1)
    assert hump.horizon == 27 and hump.text.endswith("1% left beyond 14 steps")
    assert str(judge([-np.inf, -np.inf, *-lags[:20]])) == str(judge(-lags[:20]))
    under = -3 * lags
    under[40:] = -np.inf
    assert (
        judge(under).text == "vanishes: halves every 0.33 steps; 1% left beyond 2 steps; exactly zero beyond 39 steps"
    )
    noisy = judge(-lags / 5 + np.where(lags == 4, 9.0, 0.0))
    assert noisy.kind == "vanishes"


@given(st.floats(-2, 2).filter(lambda r: abs(r) > 0.03), st.integers(100, 1500), st.integers(0, 99))
def test_rates_of_noisy_lines(rate, count, seed):
    noise = np.random.default_rng(seed).normal(size=count) * 0.05 * abs(rate)
    found = judge(rate * np.arange(count) + noise)
    assert found.kind == ("vanishes" if rate < 0 else "explodes")
    assert found.rate == pytest.approx(rate, rel=0.2)


def test_the_verdict_counts_lags_from_each_rows_own_end():
    lengths = [10, 30, 60, 0]  # the last row has no gradient at all
    layer = nn.RNN(6, 6, nonlinearity="relu", bias=False, dtype=np.float64)
    with tt.no_grad():
        layer.weight_hh_l0.copy_(0.7 * np.eye(6))
        layer.weight_ih_l0.copy_(np.eye(6))
    with tt.no_compile(), inspect.flow(layer) as flow:
        layer(np.ones((60, 4, 6)), lengths=lengths)[1].sum().backward()
    assert flow.verdict().half_life == pytest.approx(-np.log(2) / np.log(0.7), rel=1e-9)
    rows = flow.rows("l0", "h")
    for row, length in enumerate(lengths):
        assert (rows[:length, row] > 0).all() and (rows[length:, row] == 0).all()


def test_losses_at_every_step_are_called_mixed():
    xs = np.random.default_rng(1).normal(size=(50, 3, 6))
    for rho, kind in ((0.8, "mixed"), (1.0, "mixed"), (1.3, "explodes")):
        with tt.no_compile(), inspect.flow() as flow:
            tt.scan(linear(rho), np.zeros((3, 6)), xs)[1].sum().backward()
        assert flow.verdict().kind == kind
        assert "enter at 50 steps" in str(flow)


# ---- lags -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("reverse", [False, True])  # kernels serve both
def test_lag_matrix_is_one_walk_for_each_loss(how, reverse):
    layer = layer_of("LSTM", 3, 4, bidirectional=reverse)
    x = np.random.default_rng(0).normal(size=(6, 2, 3))
    run = "l0_reverse" if reverse else "l0"
    with running(how):
        with inspect.flow(layer) as flow:
            losses = (layer(x)[0] ** 2).sum(axis=(1, 2))
            matrix = flow.lag_matrix(losses)
            some = flow.lag_matrix(losses, every=4)
        assert all(p.grad is None for p in layer.parameters())
        for t in range(6):
            with inspect.flow(layer) as single:
                (layer(x)[0] ** 2).sum(axis=(1, 2))[t].backward()
            for leaf in "hc":
                np.testing.assert_allclose(matrix.norms[run, leaf][t], single.norms[run][leaf], rtol=1e-9)
    lower = np.tril(np.ones((6, 6)), -1 if reverse else 0)
    found = matrix.norms[run, "h"]
    assert (found[(lower > 0) != reverse] > 0).all() and (found[(lower > 0) == reverse] == 0).all()
    np.testing.assert_array_equal(some.steps, [1, 5])
    np.testing.assert_array_equal(some.norms[run, "h"], found[[1, 5]])
    diagonals = [np.sqrt(np.mean(np.diagonal(found, lag if reverse else -lag) ** 2)) for lag in range(6)]
    np.testing.assert_allclose(matrix.by_lag(run, "h"), diagonals)


def test_rows_of_the_lag_matrix_add_up_where_all_gradients_point_one_way():
    w = tt.tensor(0.9, requires_grad=True, dtype=np.float64)

    def f(h, x):
        h = w * h + x
        return h, h

    with tt.no_compile(), inspect.flow() as flow:
        losses = tt.scan(f, np.zeros((1, 1)), np.ones((20, 1, 1)))[1].sum(axis=(1, 2))
        matrix = flow.lag_matrix(losses)
        losses.sum().backward()
    np.testing.assert_allclose(matrix.norms["f", "carry"].sum(axis=0), flow.norms["f"]["carry"])
    assert matrix.verdict().half_life == pytest.approx(-np.log(2) / np.log(0.9))
    assert "f carry: vanishes: halves every 6.6 steps" in str(matrix)


# ---- shares ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_shares_are_of_the_gradient(kind):
    layer = layer_of(kind, 3, 4, num_layers=2, bidirectional=True)
    x = np.random.default_rng(0).normal(size=(5, 3, 3))
    compute = lambda: (layer(x, lengths=[5, 2, 0])[0] ** 2).sum()  # noqa: E731
    found = inspect.shares(compute, layer)
    assert all(p.grad is None for p in layer.parameters())
    with tt.no_compile():
        compute().backward()
    assert {weight for _, weight in found.norms} == {name for name, _ in layer.named_parameters()}
    for run, weight in found.norms:
        grad = getattr(layer, weight).grad.data
        assert found.totals[run, weight] == pytest.approx(np.linalg.norm(grad), rel=1e-9)
        assert weight.endswith(run.removeprefix("LSTM."))
        assert found.shares[run, weight].sum() == pytest.approx(1.0)


@given(st.integers(1, 8), st.integers(1, 3), st.integers(1, 4), st.booleans(), st.integers(0, 99))
def test_shares_against_a_weight_for_each_step(steps, rows, size, reverse, seed):
    rng = np.random.default_rng(seed)
    value = rng.normal(size=(size, size))
    xs = rng.normal(size=(steps, rows, size))
    w = tt.tensor(value, requires_grad=True)
    many = tt.tensor(np.broadcast_to(value, (steps, size, size)), requires_grad=True)

    def f(h, x):
        h = tt.tanh(h @ w + x)
        return h, h * h

    def apart(h, given):
        x, own = given
        h = tt.tanh(h @ own + x)
        return h, h * h

    init = rng.normal(size=(rows, size))
    found = inspect.shares(lambda: tt.scan(f, init, xs, reverse=reverse)[1].sum())
    tt.scan(apart, init, (xs, many), reverse=reverse, compiled=False)[1].sum().backward()
    ((name, norms),) = found.norms.items()
    each = many.grad.data
    np.testing.assert_allclose(norms, norms_of(each[:, None].reshape(steps, 1, -1))[:, 0].astype(float), rtol=1e-9)
    whole = each.sum(axis=0)
    parts = np.tensordot(each, whole, axes=2) / np.sum(whole**2)
    np.testing.assert_allclose(found.shares[name], parts, rtol=1e-7, atol=1e-9)
    assert "share" in str(found)


# ---- errors and pictures --------------------------------------------------------------------------------------------


def test_errors():
    layer = layer_of("RNN", 2, 3)
    x = np.ones((4, 2, 2))
    with pytest.raises(tt.InputError, match="model is a int"):
        inspect.flow(3)
    with tt.no_compile(), inspect.flow(layer) as flow:
        with pytest.raises(tt.InputError, match="no loop over time ran"):
            print(flow)
        losses = layer(x)[0].sum(axis=(1, 2))
        with pytest.raises(tt.TapeError, match="no gradient has arrived"):
            print(flow)
        with pytest.raises(tt.ShapeError, match="single number"):
            flow.lag_matrix(losses.sum())
        with pytest.raises(tt.TapeError, match="not recorded"):
            flow.lag_matrix(np.ones(4))
        for every in 0, 2.5:
            with pytest.raises(tt.InputError, match=f"every is {every}"):
                flow.lag_matrix(losses, every=every)
        matrix = flow.lag_matrix(losses)
        losses.sum().backward()
        with pytest.raises(tt.InputError, match="no run 'l9'"):
            flow.verdict("l9")
        with pytest.raises(tt.InputError, match="no state 'c'"):
            flow.rows("l0", "c")
        with pytest.raises(tt.InputError, match="there is no 'l9'"):
            matrix.by_lag("l9")
        with pytest.raises(tt.TapeError, match="freed"):
            flow.lag_matrix(losses)
    with pytest.raises(tt.TapeError, match="not recorded"):
        inspect.shares(lambda: 3.0)
    with pytest.raises(tt.DTypeError, match="compute is a float"):
        inspect.shares(3.0)
    with pytest.raises(tt.ShapeError, match="shape"):
        inspect.shares(lambda: layer(x)[0])
    with pytest.raises(tt.InputError, match="no loop over time ran"):
        inspect.shares(lambda: layer.weight_hh_l0.sum())


def test_what_is_made_on_demand_says_first_what_it_costs(caplog):
    layer = layer_of("RNN", 2, 3)
    x = np.ones((4, 2, 2))
    with caplog.at_level("INFO", "tinytape.inspect"), tt.no_compile(), inspect.flow(layer) as flow:
        flow.lag_matrix(layer(x)[0].sum(axis=(1, 2)), every=2)
        inspect.shares(lambda: layer(x)[0].sum())
        inspect.jacobians(layer, x)
    assert [record.getMessage() for record in caplog.records] == [
        "tinytape: lag_matrix: 2 backward walks over 4 steps",
        "tinytape: shares: 4 steps run again and walked, twice",
        "tinytape: jacobians: 4 steps forward and backward on a batch of 3 rows",
    ]


def test_the_page_prints_what_it_says(tmp_path, monkeypatch):
    """The code of the documentation runs, and its output is as printed there but for digits."""
    pytest.importorskip("matplotlib")
    page = (Path(__file__).parent.parent / "docs" / "gradient_flow.md").read_text("utf-8")
    (tmp_path / "docs" / "pictures").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    space = {}
    for code, printed in re.findall(r"```python\n(.*?)```(?:\n\n```\n(.*?)```)?", page, re.DOTALL):
        out = io.StringIO()
        with tt.no_compile(), redirect_stdout(out):
            exec(code, space)
        shapes = [re.sub(r"[-\d.e+]+", "#", re.sub(r"[ \t]+", " ", text)).split() for text in (out.getvalue(), printed)]
        assert shapes[0] == shapes[1]
    assert (tmp_path / "docs" / "pictures" / "gradient_flow.png").exists()


def test_pictures(tmp_path):
    pytest.importorskip("matplotlib")
    layer = layer_of("LSTM", 2, 3)
    x = np.ones((4, 2, 2))
    with tt.no_compile(), inspect.flow(layer) as flow:
        losses = layer(x)[0].sum(axis=(1, 2))
        matrix = flow.lag_matrix(losses)
        losses.sum().backward()
    shares = inspect.shares(lambda: layer(x)[0].sum(), layer)
    matrix.plot(tmp_path / "lags.png")
    flow.plot(tmp_path / "flow.png")
    shares.plot(tmp_path / "shares.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("lags.png", "flow.png", "shares.png"))
    for found, count in (flow, 2), (shares, len(shares.norms)):
        figure = found.plot()
        assert len(figure.axes) == 1 and len(figure.axes[0].get_lines()) == count
        assert found.plot(axes=figure.axes[0]) is figure and len(figure.axes[0].get_lines()) == 2 * count
    figure = matrix.plot(run="l0", leaf="c")
    assert figure.axes[0].get_images()[0].get_array().shape == (4, 4)
    with pytest.raises(tt.ShapeError, match="2 axes are given; it takes 1"):
        flow.plot(axes=figure.axes)
