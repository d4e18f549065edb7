"""Truncated BPTT over streams: against LSTMs written out by hand, plain loops over cells, and full BPTT."""

import contextlib
import copy
import gc
import tracemalloc
import weakref

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import nn

F32 = np.float32


@pytest.fixture(autouse=True)
def step_by_step(request):
    """Kernels are run by the tests that are given `compiled`."""
    given_options = getattr(request.node, "callspec", None)
    with contextlib.nullcontext() if given_options and given_options.params.get("compiled") else tt.no_compile():
        yield


def make(kind, *sizes, **options):
    return getattr(nn, kind)(*sizes, generator=tt.Generator(0), dtype=np.float64, **options)


def gradients(module):
    return {name: None if p.grad is None else p.grad.numpy() for name, p in module.named_parameters()}


def squared(y, targets):
    return 0.5 * ((y - targets) ** 2).sum()


def train(stream, parameters, windows, rate=0.0):
    """The gradients of each window, and plain SGD after it."""
    found = []
    for window in windows:
        squared(window.y, window.targets).backward()
        found.append([p.grad.numpy() for p in parameters])
        with tt.no_grad():
            for p in parameters:
                p.copy_(p.data - rate * p.grad.data)
                p.grad = None
    return found


def same(found, wanted, tolerance=1e-12):
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


# ---- the definition -------------------------------------------------------------------------------------------------


def sigmoid(a):
    return 1 / (1 + np.exp(-a))


def windows_of(calls, k1, k2):
    """The steps (begin, start, first, stop) of each window of calls of so many steps.

    Losses from `first` on are carried back to `start`. A window runs from a stored state at `begin`, which is `start`
    but where a call has too few new steps left for the state at `start` to have been stored.
    """
    start = first = 0
    for end in np.cumsum(calls).tolist():
        while first < end:
            before, stop = start, min(first + k1, end)
            start = max(0, stop - k2) if k1 < k2 else first
            yield before if stop - first < k1 < k2 else start, start, first, stop
            first = stop


def lstm_by_hand(weights, x, targets, calls, k1, k2, rate):
    """BPTT(k2; k1) in NumPy: the gradients of each window, weights changing by SGD in between."""
    w, u, b, d = (part.copy() for part in weights)
    rows, width = x.shape[1], u.shape[1]
    stored = {0: (np.zeros((rows, width)), np.zeros((rows, width)))}  # what state a window may start from
    found = []
    for begin, start, first, stop in windows_of(calls, k1, k2):
        (h, c), tape = stored[begin], []
        for t in range(begin, stop):
            i, f, g, o = np.split(x[t] @ w.T + b + h @ u.T + d, 4, axis=1)
            i, f, g, o = sigmoid(i), sigmoid(f), np.tanh(g), sigmoid(o)
            tape.append((h, c, i, f, g, o))
            c = f * c + i * g
            h = o * np.tanh(c)
            stored[t + 1] = h, c
        dw, du, db = np.zeros_like(w), np.zeros_like(u), np.zeros_like(b)
        dh, dc = np.zeros_like(h), np.zeros_like(c)
        for t in reversed(range(start, stop)):
            before, c0, i, f, g, o = tape[t - begin]
            after, c1 = stored[t + 1]
            dh = dh + (after - targets[t] if t >= first else 0)
            dc = dc + dh * o * (1 - np.tanh(c1) ** 2)
            da = np.concatenate(
                [dc * g * i * (1 - i), dc * c0 * f * (1 - f), dc * i * (1 - g**2), dh * np.tanh(c1) * o * (1 - o)], 1
            )
            dw, du, db = dw + da.T @ x[t], du + da.T @ before, db + da.sum(0)
            dh, dc = da @ u, dc * f
        found.append([dw, du, db, db])
        w, u, b, d = w - rate * dw, u - rate * du, b - rate * db, d - rate * db
    return found


@st.composite
def drawn_lengths(draw):
    k2 = draw(st.integers(1, 9))
    return draw(st.integers(1, 20)), draw(st.integers(1, k2)), k2


def pieces(calls):
    return [slice(end - steps, end) for steps, end in zip(calls, np.cumsum(calls).tolist(), strict=True)]


@pytest.mark.parametrize("compiled", [False, True])
@given(lengths=drawn_lengths(), more=st.lists(st.integers(1, 12), max_size=3), rate=st.sampled_from([0.0, 0.05]))
def test_gradients_equal_an_lstm_written_out_by_hand(lengths, more, rate, compiled):
    steps, k1, k2 = lengths
    calls = [steps, *more]
    lstm, rng = make("LSTM", 2, 3), np.random.default_rng(steps)
    x, targets = rng.normal(size=(sum(calls), 2, 2)), rng.normal(size=(sum(calls), 2, 3))
    wanted = lstm_by_hand([p.numpy() for p in lstm.parameters()], x, targets, calls, k1, k2, rate)
    stream, found = tt.truncated(lstm, k1, k2), []
    for part in pieces(calls):
        found += train(stream, list(lstm.parameters()), stream(x[part], targets[part]), rate)
    same(found, wanted)


def by_cells(cells, x, targets, reset, k1, k2, rate=0.0):
    """The same definition for a stack of cells, as a loop over steps on the tape."""
    parameters = [p for cell in cells for p in cell.parameters()]
    rows = x.shape[1]
    stored = {0: [cell.initial_state(rows) for cell in cells]}
    found, values = [], []
    for begin, start, first, stop in windows_of([len(x)], k1, k2):
        states, ys = stored[begin], []
        for t in range(begin, stop):
            if t == start:
                states = stored[t]
            y, after = tt.tensor(x[t]), []
            for cell, state in zip(cells, states, strict=True):
                keep = ~reset[t][:, None]
                zeroed = tuple(part * keep for part in state) if isinstance(state, tuple) else state * keep
                after.append(cell(y, zeroed))
                y = after[-1][0] if isinstance(after[-1], tuple) else after[-1]
            states = after
            stored[t + 1] = [tuple(p.detach() for p in s) if isinstance(s, tuple) else s.detach() for s in states]
            ys.append(y)
        y = tt.stack(ys[first - stop :])
        grads = tt.gradient(squared(y, targets[first:stop]), parameters)
        found.append([g.numpy() for g in grads])
        values.append(y.numpy())
        with tt.no_grad():
            for p, g in zip(parameters, grads, strict=True):
                p.copy_(p.data - rate * g.data)
    return found, values


@given(
    lengths=drawn_lengths(),
    kind=st.sampled_from(["RNN", "GRU", "LSTM"]),
    layers=st.integers(1, 2),
    resets=st.sampled_from([0.0, 0.2]),
)
def test_layers_and_resets_equal_a_loop_over_cells(lengths, kind, layers, resets):
    steps, k1, k2 = lengths
    rng = np.random.default_rng(steps + 100 * k1)
    layer = make(kind, 2, 3, layers)
    cells = [make(kind + "Cell", 2 if i == 0 else 3, 3) for i in range(layers)]
    for i, cell in enumerate(cells):
        cell.load_state_dict({n.removesuffix(f"_l{i}"): v for n, v in layer.state_dict().items() if n.endswith(str(i))})
    x, targets = rng.normal(size=(steps, 3, 2)), rng.normal(size=(steps, 3, 3))
    reset = rng.random((steps, 3)) < resets
    wanted, values = by_cells(cells, x, targets, reset, k1, k2, rate=0.02)
    stream, got = tt.truncated(layer, k1, k2), []
    windows = (got.append(w.y.numpy()) or w for w in stream(x, targets, reset=reset))
    found = train(stream, list(layer.parameters()), windows, rate=0.02)
    same(found, wanted)
    same([got], [values])


@pytest.mark.parametrize(
    "cell", [nn.LSTMCell, nn.PeepholeLSTMCell, nn.CoupledLSTMCell, nn.MinimalGatedUnitCell], ids=lambda c: c.__name__
)
def test_cells_run_over_time(cell):
    rng = np.random.default_rng(0)
    ours = cell(2, 3, generator=tt.Generator(0), dtype=np.float64)
    x, targets = rng.normal(size=(11, 2, 2)), rng.normal(size=(11, 2, 3))
    wanted, _ = by_cells([ours], x, targets, np.zeros((11, 2), bool), 3, 5)
    stream = tt.truncated(ours, 3, 5)
    same(train(stream, list(ours.parameters()), stream(x, targets)), wanted)


class Power(nn.Module):
    """x' = w x."""

    def __init__(self, w):
        self.w = nn.Parameter(np.array(w))

    def initial_state(self, rows):
        return tt.zeros((rows, 1), dtype=np.float64)

    def forward(self, x, state):
        return self.w * state


@pytest.mark.parametrize("k1, k2", [(k1, k2) for k2 in range(3, 8) for k1 in range(1, k2 + 1)])
def test_the_derivative_of_a_cube(k1, k2):
    """X3 = w^3 x0: 3 w^2 x0 = 0.108, which a recipe that loses a factor on the way does not give."""
    cell = Power(0.3)
    for window in tt.truncated(cell, k1, k2)(np.zeros((3, 1, 1)), state=np.array([[0.4]])):
        if window.stop == 3:
            window.y[-1].sum().backward()
    assert abs(float(cell.w.grad) - 0.108) <= 1e-15


@pytest.mark.parametrize("k2", [1, 2])
def test_a_cube_cut_short(k2):
    """With fewer steps the state before them is a constant: d/dw of w^k2 x(3 - k2)."""
    cell = Power(0.3)
    for window in tt.truncated(cell, 1, k2)(np.zeros((3, 1, 1)), state=np.array([[0.4]])):
        if window.stop == 3:
            window.y[-1].sum().backward()
    assert abs(float(cell.w.grad) - k2 * 0.3**2 * 0.4) <= 1e-15


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("compiled", [False, True])
def test_one_window_over_all_is_full_bptt_bit_for_bit(kind, dtype, compiled):
    layer = getattr(nn, kind)(3, 8, 2, generator=tt.Generator(0), dtype=dtype)
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(40, 4, 3)).astype(dtype), rng.normal(size=(40, 4, 8)).astype(dtype)

    squared(layer(x)[0], targets).backward()
    full = gradients(layer)
    layer.zero_grad()
    (window,) = tt.truncated(layer, 40, 40)(x, targets)
    squared(window.y, window.targets).backward()
    ours = gradients(layer)
    assert all(np.array_equal(full[name], ours[name]) for name in full)


@given(steps=st.integers(1, 12), k2=st.integers(1, 6))
def test_a_window_a_step_is_lookback(steps, k2):
    """With k1 = 1, loss t's gradient is that of `scan(lookback=k2)`."""
    cell, rng = make("LSTMCell", 2, 3), np.random.default_rng(steps)
    x, targets = rng.normal(size=(steps, 2, 2)), rng.normal(size=(steps, 2, 3))
    parameters = list(cell.parameters())

    def step(state, x_t):
        h, c = cell(x_t, state)
        return (h, c), h

    _, ys = tt.scan(step, cell.initial_state(2), x, lookback=k2)
    wanted = [
        [g.numpy() for g in tt.gradient(squared(ys[t], targets[t]), parameters, retain_graph=True)]
        for t in range(steps)
    ]
    stream = tt.truncated(cell, 1, k2)
    same(train(stream, parameters, stream(x, targets)), wanted)


def test_windows_grow_at_the_start_and_the_last_has_fewer_new_steps():
    stream = tt.truncated(nn.GRU(1, 2), 3, 8)

    def windows(steps):
        return [(w.start, w.stop, w.steps, len(w.y)) for w in stream(np.zeros((steps, 1, 1), F32))]

    assert windows(14) == [(0, 3, 3, 3), (0, 6, 3, 3), (1, 9, 3, 3), (4, 12, 3, 3), (6, 14, 2, 2)]
    assert windows(4) == [(9, 17, 3, 3), (10, 18, 1, 1)]
    assert windows(1) == [(11, 19, 1, 1)]
    stream.reset_state()
    assert windows(5) == [(19, 22, 3, 3), (19, 24, 2, 2)]
    assert stream.position == 24


def test_the_last_of_plain_chunks_starts_where_the_one_before_ended():
    stream = tt.truncated(nn.GRU(1, 2), 4)
    x = np.zeros((6, 1, 1), F32)
    assert [(w.start, w.stop) for w in [*stream(x), *stream(x[:1])]] == [(0, 4), (4, 6), (6, 7)]


@given(lengths=drawn_lengths(), jitter=st.sampled_from([0.0, 1.0, 4.0]), seed=st.integers(0, 99))
@example(lengths=(18, 9, 11), jitter=4.0, seed=1)  # the last window starts before the one before it
def test_the_last_window_is_a_run_of_its_own_from_where_it_starts(lengths, jitter, seed):
    """With weights that stay, stored states are those of a run from the beginning, wherever windows are cut."""
    steps, k1, k2 = lengths
    lstm, rng = make("LSTM", 2, 3), np.random.default_rng(seed)
    x, targets = rng.normal(size=(steps, 2, 2)), rng.normal(size=(steps, 2, 3))
    parameters = list(lstm.parameters())

    def stream():
        return tt.truncated(lstm, k1, k2, jitter=jitter, generator=tt.Generator(seed))

    with tt.no_grad():
        asked = [w.steps for w in stream()(np.zeros((100, 2, 2)))]
    ours = stream()
    *_, window = ours(x, targets)
    first = steps - window.steps
    start = first - (k2 - k1)
    if window.steps < asked[ours.report().windows - 1] and k1 < k2:
        start = min(start, steps - k2)
    assert window.start == max(start, 0)
    with tt.no_grad():
        state = lstm(x[: window.start])[1] if window.start else None
    y = lstm(x[window.start :], state)[0][-window.steps :]
    wanted = tt.gradient(squared(y, targets[first:]), parameters)
    found = tt.gradient(squared(window.y, window.targets), parameters)
    same([[g.numpy() for g in found]], [[g.numpy() for g in wanted]])
    kept = ours.state_dict()["x"]
    if jitter:
        assert kept is None if k1 == k2 else len(kept) <= k1 + k2 + 4 * jitter
    else:
        assert kept is None if k1 == k2 else len(kept) == min(steps, k2 if k1 > 1 else k2 - 1)


@pytest.mark.parametrize("k2", [4, 6, 9, 20])
def test_losses_go_back_at_least_k2_less_k1_plus_one_steps(k2):
    for window in tt.truncated(nn.GRU(1, 2), 4, k2)(np.zeros((50, 2, 1), F32)):
        depths = np.arange(window.stop - window.steps, window.stop)[:, None] - window.reach + 1
        assert window.reach.shape == (window.steps, 2)
        assert depths.max() <= k2
        assert np.all((depths > k2 - 4) | (window.reach == 0))


def test_plain_chunks_run_every_step_once():
    layer = nn.GRU(1, 2)
    taken, recorded = [], []

    def counting(x, state, reset=None):
        y, state = layer(x, state, reset=reset)
        taken.append(len(x))
        recorded.append(len(y) * y.requires_grad)
        return y, state

    x = np.zeros((30, 1, 1), F32)
    list(tt.truncated(counting, 7)(x))
    assert taken == [7, 7, 7, 7, 2]
    taken.clear()
    list(tt.truncated(counting, 5, 15)(x))
    assert sum(taken) == 5 + 10 + 4 * 15
    taken.clear(), recorded.clear()
    list(tt.truncated(counting, 5, 15)(x[:27]))
    assert sum(recorded) == 5 + 10 + 4 * 15
    assert sum(taken) == sum(recorded) + 2  # from the start of the window before to that of the last


# ---- resets ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_a_reset_is_a_document_by_itself(kind):
    """Where windows reach far enough, a stream of documents has the gradients of the documents run separately."""
    layer, rng = make(kind, 2, 3), np.random.default_rng(0)
    x, targets = rng.normal(size=(12, 1, 2)), rng.normal(size=(12, 1, 3))
    reset = np.zeros((12, 1), bool)
    reset[[0, 5, 9]] = True
    for window in tt.truncated(layer, 1, 12)(x, targets, reset=reset):
        squared(window.y, window.targets).backward()
    together = gradients(layer)
    layer.zero_grad()
    for a, b in ((0, 5), (5, 9), (9, 12)):
        squared(layer(x[a:b])[0], targets[a:b]).backward()
    for name, g in gradients(layer).items():
        np.testing.assert_allclose(together[name], g, rtol=1e-12, atol=1e-12)


def test_reach_stops_at_resets():
    reset = np.zeros((9, 2), bool)
    reset[4, 0] = reset[6, 1] = True
    *_, window = tt.truncated(nn.GRU(1, 2), 3, 6)(np.zeros((9, 2, 1), F32), reset=reset)
    assert window.reach.tolist() == [[4, 6], [4, 6], [4, 6]]
    x = tt.tensor(np.random.default_rng(0).normal(size=(6, 2, 1)), requires_grad=True, dtype=F32)
    nn.GRU(1, 2)(x, reset=reset[3:])[0][-1].sum().backward()
    reached = np.argmax(x.grad.data[:, :, 0] != 0, axis=0) + 3
    assert reached.tolist() == [4, 6]


def test_a_reset_at_the_first_step_zeroes_and_no_more():
    layer, rng = make("LSTM", 2, 3), np.random.default_rng(0)
    x, reset = rng.normal(size=(4, 2, 2)), np.zeros((4, 2), bool)
    reset[0, 1] = True
    plain, marked = (next(tt.truncated(layer, 4)(x, reset=r)) for r in (None, reset))
    assert np.array_equal(plain.y.data, marked.y.data)
    given_state = tuple(rng.normal(size=(1, 2, 3)) for _ in range(2))
    marked = next(tt.truncated(layer, 4)(x, reset=reset, state=given_state))
    assert np.array_equal(marked.y.data[:, 1], plain.y.data[:, 1])
    assert not np.array_equal(marked.y.data[:, 0], plain.y.data[:, 0])


@pytest.mark.parametrize("rows", [[1], np.array([False, True])], ids=["indices", "bools"])
@pytest.mark.parametrize("k2", [3, 5, 9])
def test_rows_reset_between_windows_are_as_marked_in_the_stream(rows, k2):
    layer, rng = make("LSTM", 2, 3), np.random.default_rng(0)
    x, targets = rng.normal(size=(13, 2, 2)), rng.normal(size=(13, 2, 3))
    reset = np.zeros((13, 2), bool)
    reset[6, 1] = True
    stream = tt.truncated(layer, 3, k2)
    wanted = train(stream, list(layer.parameters()), stream(x, targets, reset=reset))
    stream = tt.truncated(layer, 3, k2)

    def windows():
        for window in stream(x, targets):
            yield window
            if window.stop == 6:
                stream.reset_state(rows)

    same(train(stream, list(layer.parameters()), windows()), wanted, 0)


def test_resetting_all_starts_anew_inside_the_loop_and_between():
    layer = make("GRU", 2, 3)
    x = np.random.default_rng(0).normal(size=(9, 2, 2))
    stream, found = tt.truncated(layer, 3, 5), []
    for window in stream(x):
        found.append(window.y.numpy())
        stream.reset_state()
        assert stream.state is None and window.start == window.stop - 3
    same([found], [[layer(x[t : t + 3])[0].numpy() for t in (0, 3, 6)]])
    assert next(stream(np.zeros((2, 5, 2)))).y.shape == (2, 5, 3)  # of other rows


# ---- streams --------------------------------------------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 7), min_size=1, max_size=8),
    lengths=drawn_lengths(),
    resets=st.booleans(),
)
def test_chunks_are_joined_as_they_come(sizes, lengths, resets):
    _, k1, k2 = lengths
    layer, rng = make("GRU", 2, 3), np.random.default_rng(0)
    steps = sum(sizes)
    x, targets = rng.normal(size=(steps, 2, 2)), rng.normal(size=(steps, 2, 3))
    reset = rng.random((steps, 2)) < 0.2

    def chunks():
        """Into the same buffer, again and again."""
        buffer, at = np.empty((7, 2, 2)), 0
        for size in sizes:
            buffer[:] = np.nan
            buffer[:size] = x[at : at + size]
            yield (buffer[:size], targets[at : at + size], *([reset[at : at + size]] if resets else []))
            at += size

    stream, joined = tt.truncated(layer, k1, k2), tt.truncated(layer, k1, k2)
    wanted = train(stream, list(layer.parameters()), stream(x, targets, reset=reset if resets else None))
    same(train(joined, list(layer.parameters()), joined(chunks())), wanted, 0)


@pytest.mark.parametrize("k1, k2", [(2, 2), (3, 7), (1, 4)])
def test_calls_go_on_with_the_stream(k1, k2):
    layer, rng = make("LSTM", 2, 3), np.random.default_rng(0)
    x, targets = rng.normal(size=(24, 2, 2)), rng.normal(size=(24, 2, 3))
    stream = tt.truncated(layer, k1, k2)
    wanted = train(stream, list(layer.parameters()), stream(x, targets))
    stream, found = tt.truncated(layer, k1, k2), []
    for part in (slice(0, 6), slice(6, 18), slice(18, 24)):
        mine = x[part].copy()
        found += train(stream, list(layer.parameters()), stream(mine, targets[part]))
        mine[:] = np.nan  # what is kept of it is a copy
    same(found, wanted, 0)


def test_a_call_takes_over_from_a_loop_that_was_left():
    layer, x = make("GRU", 2, 3), np.random.default_rng(0).normal(size=(12, 2, 2))
    wanted = [w.y.numpy() for w in tt.truncated(layer, 3, 5)(x)]
    stream = tt.truncated(layer, 3, 5)
    left = stream(x)
    next(left)
    same([[w.y.numpy() for w in stream(x[3:])]], [wanted[1:]], 0)
    left.close()
    assert stream.position == 12 and len(stream.state_dict()["x"]) == 5


def run_on(layer, stream, optimizer, x, targets, windows):
    loop = stream(x[stream.position :], targets[stream.position :])
    for _, window in zip(range(windows), loop, strict=False):
        squared(window.y, window.targets).backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("options", [{}, {"k2": 9}, {"k2": 7, "jitter": 1.5}], ids=str)
@pytest.mark.parametrize("compiled", [False, True])
def test_a_run_is_resumed_bit_for_bit(options, compiled, tmp_path):
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(60, 2, 2)), rng.normal(size=(60, 2, 3))

    def start():
        layer = make("LSTM", 2, 3)
        stream = tt.truncated(layer, k1=4, generator=tt.Generator(1), **options)
        return layer, stream, tt.optim.Adam(layer.parameters(), 0.01)

    layer, stream, optimizer = start()
    run_on(layer, stream, optimizer, x, targets, 5)
    stream.reset_state([1])
    whole = {"layer": layer.state_dict(), "stream": stream.state_dict(), "optimizer": optimizer.state_dict()}
    tt.io.save_state(tmp_path / "run", whole)
    run_on(layer, stream, optimizer, x, targets, 100)
    again, resumed, optimizer = start()
    saved = tt.io.load_state(tmp_path / "run")
    again.load_state_dict(saved["layer"])
    resumed.load_state_dict(saved["stream"])
    optimizer.load_state_dict(saved["optimizer"])
    run_on(again, resumed, optimizer, x, targets, 100)
    assert stream.position == resumed.position == 60
    for name, value in layer.state_dict().items():
        assert np.array_equal(value, again.state_dict()[name])


@pytest.mark.parametrize("windows", [2, 3], ids=["before", "after"])
@pytest.mark.parametrize("options", [{"k2": 9}, {"k2": 5}, {"k2": 7, "jitter": 1.5}], ids=str)
def test_a_run_is_resumed_around_a_last_window_of_few_steps(options, windows):
    rng = np.random.default_rng(0)
    x, targets = rng.normal(size=(23, 2, 2)), rng.normal(size=(23, 2, 3))
    layer, again = make("LSTM", 2, 3), make("LSTM", 2, 3)
    stream, resumed = (tt.truncated(m, 4, generator=tt.Generator(1), **options) for m in (layer, again))
    run_on(layer, stream, tt.optim.SGD(layer.parameters(), 0.05), x[:10], targets[:10], windows)
    again.load_state_dict(layer.state_dict())
    resumed.load_state_dict(stream.state_dict())
    for model, going in (layer, stream), (again, resumed):
        optimizer = tt.optim.SGD(model.parameters(), 0.05)
        for end in (10, 23) if going.position < 10 else (23,):
            run_on(model, going, optimizer, x[:end], targets[:end], 100)
        assert going.position == 23
    for name, value in layer.state_dict().items():
        assert np.array_equal(value, again.state_dict()[name])


def test_layouts():
    """batch_first, a single sequence, and a model of one's own on tokens all give what (T, B, I) gives."""
    layer = make("GRU", 2, 3)
    x = np.random.default_rng(0).normal(size=(10, 4, 2))
    reset = np.zeros((10, 4), bool)
    reset[5, 2] = True
    wanted = [w.y.numpy() for w in tt.truncated(layer, 3, 5)(x, reset=reset)]
    turned = copy.deepcopy(layer)
    turned.batch_first = True
    found = [
        w.y.numpy().swapaxes(0, 1)
        for w in tt.truncated(turned, 3, 5)(x.swapaxes(0, 1), x.swapaxes(0, 1), reset=reset.T)
        if w.targets.shape[:2] == w.y.shape[:2]
    ]
    same([found], [wanted], 0)
    singly = [w.y.numpy() for w in tt.truncated(turned, 3, 5)(x[:, 2], reset=reset[:, 2])]
    same([singly], [[y[:, 2] for y in wanted]])


class Model(nn.Module):
    """Two inputs by name, a nest of outputs, a dict for a state."""

    def __init__(self):
        self.table = nn.Embedding(5, 2, generator=tt.Generator(0))
        self.gru = nn.GRU(3, 4, generator=tt.Generator(0))

    def forward(self, x, state):
        h = None if state is None else state["h"]
        y, h = self.gru(tt.concatenate([self.table(x["tokens"]), x["more"]], axis=-1), h)
        return {"y": y, "twice": 2 * y}, {"h": h}


def test_nests():
    model, rng = Model(), np.random.default_rng(0)
    x = {"tokens": rng.integers(0, 5, (9, 3)), "more": rng.normal(size=(9, 3, 1)).astype(F32)}
    stream = tt.truncated(model, 2, 4)
    windows = list(stream(x, {"goal": (np.arange(9), np.arange(9))}))
    y = model(x, None)[0]
    np.testing.assert_allclose(np.concatenate([w.y["twice"].data for w in windows]), y["twice"].data, rtol=1e-5)
    assert [w.targets["goal"][1].tolist() for w in windows] == [[0, 1], [2, 3], [4, 5], [6, 7], [8]]
    np.testing.assert_array_equal(windows[-1].state["h"].data[0], windows[-1].y["y"].data[-1])
    with pytest.raises(tt.InputError, match=r"Model.* does not take reset"):
        stream(x, reset=np.zeros((9, 3), bool))
    with pytest.raises(tt.InputError, match=r"Model.* does not take reset"):
        stream.reset_state([0])


def test_a_learned_initial_state_learns_while_windows_start_there():
    layer = make("GRU", 2, 3, learn_initial_state=True)
    with_gradient = []
    for window in tt.truncated(layer, 2, 6)(np.ones((12, 1, 2))):
        window.y.sum().backward()
        with_gradient.append(layer.initial_h.grad is not None)
        layer.zero_grad()
    assert with_gradient == [True, True, True, False, False, False]
    *_, window = tt.truncated(layer, 5, 6)(np.ones((6, 1, 2)))
    window.y.sum().backward()
    assert layer.initial_h.grad is not None
    layer.zero_grad()
    *_, window = tt.truncated(layer, 5, 6)(np.ones((7, 1, 2)))  # from the step after
    window.y.sum().backward()
    assert layer.initial_h.grad is None


def test_jitter():
    x = np.zeros((4000, 1, 1), F32)

    def layer(x, state):
        return tt.tensor(x), state

    def sizes(seed):
        stream = tt.truncated(layer, 20, 30, jitter=2.0, generator=tt.Generator(seed))
        return [(window.steps, window.stop - window.start) for window in stream(x)]

    found = sizes(0)
    assert found == sizes(0) != sizes(1)
    new = np.array([n for n, _ in found])
    assert new.sum() == 4000 and new[:-1].min() >= 5 and new.max() <= 28
    assert all(total == n + 10 for n, total in found[1:-1]) and found[-1][1] >= 30
    assert 0.01 < np.mean(new < 14) < 0.12  # one in twenty is half as long
    assert abs(new[new >= 14].mean() - 20) < 0.6 and 1.5 < new[new >= 14].std() < 2.5


@given(lengths=drawn_lengths(), rows=st.none() | st.integers(1, 3), seed=st.integers(0, 99))
def test_the_report_counts_every_loss(lengths, rows, seed):
    steps, k1, k2 = lengths
    rng = np.random.default_rng(seed)
    x = np.zeros((steps, *([] if rows is None else [rows]), 1), F32)
    reset = rng.random(x.shape[:-1]) < 0.3
    stream, depths = tt.truncated(nn.RNN(1, 1), k1, k2), []
    with tt.no_grad():
        for window in stream(x, reset=reset if seed % 2 else None):
            assert window.reach.shape == (window.steps, *x.shape[1:-1])
            for t, reached in zip(range(window.stop - window.steps, window.stop), window.reach, strict=True):
                depths.extend((t - reached + 1).ravel().tolist() if rows else [int(t - reached + 1)])
    report = stream.report()
    assert report.counts.tolist() == np.bincount(depths).tolist()
    assert (report.windows, report.steps) == (-(-steps // k1), steps)
    assert report.mean == pytest.approx(np.mean(depths))
    assert f"least {min(depths)}, mean {np.mean(depths):.1f}, most {max(depths)}" in str(report)


def test_a_report_is_a_table():
    stream = tt.truncated(nn.LSTM(2, 3), 20, 60)
    assert str(stream.report()) == "truncated(LSTM(2, 3), k1=20, k2=60): 0 windows, 0 steps, 0 losses"
    list(stream(np.zeros((200, 4, 2), F32)))
    lines = str(stream.report()).splitlines()
    assert lines[0] == "truncated(LSTM(2, 3), k1=20, k2=60): 10 windows, 200 steps, 800 losses"
    assert lines[1].split("  ")[0] == "inputs reached" and lines[-1] == "least 1, mean 44.5, most 60"
    assert len(lines) <= 15


# ---- memory ---------------------------------------------------------------------------------------------------------


def test_no_graph_hangs_on_what_is_carried():
    layer, x = make("LSTM", 2, 3), np.ones((40, 2, 2))
    stream = tt.truncated(layer, 3, 7)
    gc.collect()
    gc.disable()
    try:
        for window in stream(x):
            node = weakref.ref(window.y.node)
            assert all(part.node is None for part in (*window.state, *(stream.state or ())))
            del window
            assert node() is None
    finally:
        gc.enable()


def grown(steps, warm, k1, k2):
    """Bytes by which a stream of one-step chunks grows, on Python's side and in the pool of the kernels."""
    from tinytape.kernels import workspace

    layer = nn.GRU(1, 4, generator=tt.Generator(0))
    optimizer = tt.optim.SGD(layer.parameters(), 1e-3)
    stream = tt.truncated(layer, k1, k2)
    chunk = np.ones((100, 1, 1), F32)
    memory = {}

    def chunks():
        for _ in range(steps // 100):
            yield chunk, chunk

    tracemalloc.start()
    try:
        for window in stream(chunks()):
            ((window.y - window.targets) ** 2).mean().backward()
            optimizer.step()
            optimizer.zero_grad()
            del window
            if stream.position == warm or stream.position == steps:
                gc.collect()
                usage = workspace.usage()
                memory[stream.position] = tracemalloc.get_traced_memory()[0], usage.in_use + usage.idle
    finally:
        tracemalloc.stop()
    return np.subtract(memory[steps], memory[warm])


@pytest.mark.parametrize("k2", [50, 75])
@pytest.mark.parametrize("compiled", [True])
def test_memory_stays_flat(k2, compiled):
    assert np.all(np.abs(grown(4000, 1000, 50, k2)) < 10_000)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [True])
def test_memory_stays_flat_over_a_million_steps(compiled):
    grows = grown(1_000_000, 10_000, 100, 150)  # some 18,000, most of it in the first 100,000: Python's free lists
    assert np.all(np.abs(grows) < 50_000)  # a byte a step would be 990,000
