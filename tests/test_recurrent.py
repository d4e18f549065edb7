"""Cells and layers over time: against PyTorch, finite differences, plain NumPy loops, and themselves run otherwise."""

import contextlib
import copy
import gc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import nn

LAYERS = {"RNN": nn.RNN, "GRU": nn.GRU, "LSTM": nn.LSTM}
CELLS = {"RNN": nn.RNNCell, "GRU": nn.GRUCell, "LSTM": nn.LSTMCell}
KINDS = ["RNN", "GRU", "GRU before", "LSTM"]

kinds = pytest.mark.parametrize("kind", KINDS)


@pytest.fixture(autouse=True)
def step_by_step():
    """What layers mean is tested on their definition; test_layers_compiled.py holds the kernels against it."""
    with tt.no_compile():
        yield


def make(kind, *sizes, seed=0, **options):
    """A float64 layer; "GRU before" is the GRU with its reset gate before the product."""
    if kind == "GRU before":
        kind, options = "GRU", options | {"reset_after": False}
    return LAYERS[kind](*sizes, generator=tt.Generator(seed), dtype=np.float64, **options)


def make_cell(kind, *sizes, seed=0, **options):
    if kind == "GRU before":
        kind, options = "GRU", options | {"reset_after": False}
    return CELLS[kind](*sizes, generator=tt.Generator(seed), dtype=np.float64, **options)


def parts(state):
    return list(state) if isinstance(state, tuple) else [state]


def weighted(y, state, rng):
    """One number on which every entry of the outputs and of the last state bears differently."""
    return sum((a * rng.normal(size=a.shape)).sum() for a in [y, *parts(state)])


def state_for(layer, rng, *rows):
    runs = layer.num_layers * (1 + layer.bidirectional)
    h = rng.normal(size=(runs, *rows, layer.proj_size or layer.hidden_size))
    return (h, rng.normal(size=(runs, *rows, layer.hidden_size))) if isinstance(layer, nn.LSTM) else h


def leaves(state):
    made = tuple(tt.tensor(part, requires_grad=True) for part in parts(state))
    return made if isinstance(state, tuple) else made[0]


def close(ours, theirs, tolerance=1e-9):
    ours = ours.data if isinstance(ours, tt.Tensor) else ours
    theirs = theirs.data if isinstance(theirs, tt.Tensor) else theirs
    np.testing.assert_allclose(ours, theirs, rtol=tolerance, atol=tolerance)


# ---- against PyTorch ------------------------------------------------------------------------------------------------


@st.composite
def drawn_layers(draw):
    kind = draw(st.sampled_from(["RNN", "GRU", "LSTM"]))
    options = dict(
        num_layers=draw(st.integers(1, 3)),
        bias=draw(st.booleans()),
        batch_first=draw(st.booleans()),
        bidirectional=draw(st.booleans()),
    )
    hidden = draw(st.integers(1, 5))
    if kind == "RNN":
        options["nonlinearity"] = draw(st.sampled_from(["tanh", "relu"]))
    if kind == "LSTM":
        options["proj_size"] = draw(st.integers(0, hidden - 1))
    steps, rows, features = draw(st.integers(1, 5)), draw(st.integers(1, 4)), draw(st.integers(1, 4))
    with_state, seed = draw(st.booleans()), draw(st.integers(0, 999))
    how = draw(st.sampled_from(["plain", "unbatched", "lengths"]))
    lengths = draw(st.lists(st.integers(1, steps), min_size=rows, max_size=rows)) if how == "lengths" else None
    return kind, (features, hidden), options, (steps, rows), how, lengths, with_state, seed


def torch_twin(torch, layer, kind, sizes, options):
    theirs = getattr(torch.nn, kind)(*sizes, **options).double()
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in layer.state_dict().items()})
    assert [n for n, _ in theirs.named_parameters()] == [n for n, _ in layer.named_parameters()]
    return theirs


@pytest.mark.peer
@given(drawn=drawn_layers())
def test_layers_equal_pytorch(drawn):
    """Values and gradients of x, states and parameters, over every option; lengths against packed sequences."""
    torch = pytest.importorskip("torch")
    kind, sizes, options, (steps, rows), how, lengths, with_state, seed = drawn
    rng = np.random.default_rng(seed)
    ours = LAYERS[kind](*sizes, **options, generator=tt.Generator(seed), dtype=np.float64)
    theirs = torch_twin(torch, ours, kind, sizes, options)
    batch_first = options["batch_first"]
    outside = (steps,) if how == "unbatched" else (rows, steps) if batch_first else (steps, rows)
    values = rng.normal(size=(*outside, sizes[0]))
    x, tx = tt.tensor(values, requires_grad=True), torch.tensor(values, requires_grad=True)
    state = tstate = None
    if with_state:
        given_state = state_for(ours, rng, *(() if how == "unbatched" else (rows,)))
        state = leaves(given_state)
        tstate = tuple(torch.tensor(p, requires_grad=True) for p in parts(given_state))
        tstate = tstate if kind == "LSTM" else tstate[0]
    y, last = ours(x, state, lengths=lengths)
    if how == "lengths":
        pack, unpack = torch.nn.utils.rnn.pack_padded_sequence, torch.nn.utils.rnn.pad_packed_sequence
        ty, tlast = theirs(pack(tx, torch.tensor(lengths), batch_first, enforce_sorted=False), tstate)
        ty = unpack(ty, batch_first, total_length=steps)[0]
    else:
        ty, tlast = theirs(tx, tstate)
    for a, b in zip([y, *parts(last)], [ty, *parts(tlast)], strict=True):
        assert a.shape == tuple(b.shape)
        close(a, b.detach())
    weighted(y, last, np.random.default_rng(1)).backward()
    wrng = np.random.default_rng(1)
    sum((b * torch.from_numpy(wrng.normal(size=b.shape))).sum() for b in [ty, *parts(tlast)]).backward()
    close(x.grad, tx.grad)
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        np.testing.assert_allclose(p.grad.data, q.grad, rtol=1e-9, atol=1e-9, err_msg=name)
    if with_state:
        for a, b in zip(parts(state), parts(tstate), strict=True):
            close(a.grad, b.grad)


@pytest.mark.peer
@given(
    kind=st.sampled_from(["RNN", "GRU", "LSTM"]),
    bias=st.booleans(),
    rows=st.none() | st.integers(1, 4),
    sizes=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    nonlinearity=st.sampled_from(["tanh", "relu"]),
    with_state=st.booleans(),
)
def test_cells_equal_pytorch(kind, bias, rows, sizes, nonlinearity, with_state):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(sum(sizes))
    options = dict(bias=bias) | (dict(nonlinearity=nonlinearity) if kind == "RNN" else {})
    ours = make_cell(kind, *sizes, **options)
    theirs = getattr(torch.nn, kind + "Cell")(*sizes, **options).double()
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in ours.state_dict().items()})
    batch = () if rows is None else (rows,)
    values = rng.normal(size=(*batch, sizes[0]))
    count = 2 if kind == "LSTM" else 1
    given_state = tuple(rng.normal(size=(*batch, sizes[1])) for _ in range(count))
    x, tx = tt.tensor(values, requires_grad=True), torch.tensor(values, requires_grad=True)
    state, tstate = leaves(given_state), tuple(torch.tensor(p, requires_grad=True) for p in given_state)
    passed = (state, tstate) if kind == "LSTM" else (state[0], tstate[0])
    out = parts(ours(x, passed[0] if with_state else None))
    tout = parts(theirs(tx, passed[1] if with_state else None))
    wrng, trng = np.random.default_rng(1), np.random.default_rng(1)
    for a, b in zip(out, tout, strict=True):
        close(a, b.detach())
    sum((a * wrng.normal(size=a.shape)).sum() for a in out).backward()
    sum((b * torch.from_numpy(trng.normal(size=b.shape))).sum() for b in tout).backward()
    close(x.grad, tx.grad)
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        close(p.grad, q.grad)
    if with_state:
        for a, b in zip(state, tstate, strict=True):
            close(a.grad, b.grad)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("options", [{}, {"bidirectional": True, "num_layers": 2}], ids=["one layer", "two, both ways"])
def test_second_order_equals_pytorch(kind, options):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    ours = make(kind, 2, 3, **options)
    theirs = torch_twin(torch, ours, kind, (2, 3), options)
    values = rng.normal(size=(4, 2, 2))
    x, tx = tt.tensor(values, requires_grad=True), torch.tensor(values, requires_grad=True)
    sources = [x, *ours.parameters()]
    with tt.Tape() as tape:
        loss = (ours(x)[0] ** 2).sum()
        first = tape.gradient(loss, sources, create_graph=True)
        penalty = sum((g**2).sum() for g in first)
    penalty.backward()
    tsources = [tx, *theirs.parameters()]
    tfirst = torch.autograd.grad((theirs(tx)[0] ** 2).sum(), tsources, create_graph=True)
    sum((g**2).sum() for g in tfirst).backward()
    for source, g, tsource, tg in zip(sources, first, tsources, tfirst, strict=True):
        close(g, tg.detach())
        close(source.grad, tsource.grad, 1e-8)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
def test_float32_equals_pytorch(kind):
    torch = pytest.importorskip("torch")
    ours, theirs = LAYERS[kind](8, 16, 2), getattr(torch.nn, kind)(8, 16, 2)
    ours.load_state_dict(theirs.state_dict())
    x = np.random.default_rng(0).normal(size=(20, 3, 8)).astype(np.float32)
    y, last = ours(x)
    assert y.dtype == np.float32 and all(part.dtype == np.float32 for part in parts(last))
    close(y, theirs(torch.from_numpy(x))[0].detach(), 1e-5)


# ---- without a peer -------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}, {"masked": True}], ids=str)
def test_derivatives_agree_with_finite_differences(kind, options):
    options = dict(options)
    masked = options.pop("masked", False)
    if kind == "LSTM" and "num_layers" in options:
        options["proj_size"] = 1
    layer, rng = make(kind, 2, 2, **options), np.random.default_rng(0)
    names = [name for name, _ in layer.named_parameters()]
    x, state = rng.normal(size=(3, 2, 2)), state_for(layer, rng, 2)
    marks = dict(lengths=[1, 3], reset=np.array([[0, 0], [0, 0], [0, 1]], bool)) if masked else {}

    def f(x, h, *values):
        return nn.functional_call(layer, dict(zip(names, values, strict=True)), x, h, **marks)

    tt.check_grads(f, [x, state, *(p.numpy() for p in layer.parameters())], order=2)


def numpy_gru(layer, x, h, before):
    """Both forms of the GRU, written out step by step."""
    w, u, b, d = (p.numpy() for p in layer.parameters())
    sigmoid = lambda a: 1 / (1 + np.exp(-a))  # noqa: E731
    H = h.shape[-1]
    for x_t in x:
        a, c = x_t @ w.T + b, h @ u.T + d
        r, z = sigmoid(a[:, :H] + c[:, :H]), sigmoid(a[:, H : 2 * H] + c[:, H : 2 * H])
        inner = (r * h) @ u[2 * H :].T + d[2 * H :] if before else r * c[:, 2 * H :]
        h = (1 - z) * np.tanh(a[:, 2 * H :] + inner) + z * h
    return h


@pytest.mark.parametrize("before", [False, True])
def test_both_forms_of_the_gru(before):
    layer, rng = make("GRU before" if before else "GRU", 3, 4), np.random.default_rng(0)
    x, h = rng.normal(size=(5, 2, 3)), rng.normal(size=(1, 2, 4))
    close(layer(x, h)[1][0], numpy_gru(layer, x, h[0], before))


@kinds
def test_a_layer_is_its_cell_step_by_step(kind):
    layer, cell, rng = make(kind, 3, 4), make_cell(kind, 3, 4), np.random.default_rng(0)
    x, state = rng.normal(size=(5, 2, 3)), state_for(layer, rng, 2)
    y, last = layer(x, state)
    carried = (state[0][0], state[1][0]) if kind == "LSTM" else state[0]
    for t in range(5):
        carried = cell(x[t], carried)
        close(parts(carried)[0], y[t])
    for a, b in zip(parts(carried), parts(last), strict=True):
        close(a, b[0])


@kinds
@given(data=st.data())
def test_lengths_equal_every_row_run_alone(kind, data):
    steps = data.draw(st.integers(1, 5))
    lengths = data.draw(st.lists(st.integers(0, steps), min_size=1, max_size=4))
    rng, rows = np.random.default_rng(0), len(lengths)
    layer = make(kind, 2, 3, num_layers=2, bidirectional=data.draw(st.booleans()))
    x, state = rng.normal(size=(steps, rows, 2)), state_for(layer, rng, rows)
    for b, n in enumerate(lengths):
        x[n:, b] = np.nan  # what stands in masked steps must not matter, not even to a gradient
    tx, tstate = tt.tensor(x, requires_grad=True), leaves(state)
    y, last = layer(tx, tstate, lengths=lengths)
    (y.sum() + sum(part.sum() for part in parts(last))).backward()
    assert all(np.isfinite(p.grad.data).all() for p in layer.parameters())
    together = {name: p.grad.numpy() for name, p in layer.named_parameters()}
    layer.zero_grad()
    total = 0.0
    for b, n in enumerate(lengths):
        own = [part[:, b : b + 1] for part in parts(tstate)]
        alone_state = tuple(own) if kind == "LSTM" else own[0]
        assert np.all(y.data[n:, b] == 0) and np.all(tx.grad.data[n:, b] == 0)
        if n == 0:
            for part, given_part in zip(parts(last), own, strict=True):
                close(part.data[:, b : b + 1], given_part)
            continue
        ya, alone = layer(x[:n, b : b + 1], alone_state)
        close(y.data[:n, b], ya.data[:, 0])
        for part, expected in zip(parts(last), parts(alone), strict=True):
            close(part.data[:, b : b + 1], expected)
        total = total + ya.sum() + sum(part.sum() for part in parts(alone))
    if any(lengths):
        total.backward()
        for name, p in layer.named_parameters():
            close(p.grad, together[name])


@kinds
@pytest.mark.parametrize("bidirectional", [False, True])
def test_a_mask_with_holes_equals_the_sequence_without_them(kind, bidirectional):
    layer, rng = make(kind, 2, 3, bidirectional=bidirectional), np.random.default_rng(0)
    x, state = rng.normal(size=(6, 1, 2)), state_for(layer, rng, 1)
    mask = np.array([[0], [1], [1], [0], [1], [0]], bool)
    y, last = layer(x, state, mask=mask)
    yc, expected = layer(x[mask[:, 0]], state)
    close(y.data[mask[:, 0]], yc)
    assert np.all(y.data[~mask[:, 0]] == 0)
    for a, b in zip(parts(last), parts(expected), strict=True):
        close(a, b)


@kinds
@pytest.mark.parametrize("holes", [False, True])
def test_a_reset_cuts_the_row_in_both_directions(kind, holes):
    """Two sequences in one row are as two rows; also where the step that cuts is itself masked."""
    layer, rng = make(kind, 2, 3, num_layers=2, bidirectional=True), np.random.default_rng(0)
    x = rng.normal(size=(5, 2, 2))
    reset, mask = np.zeros((5, 2), bool), np.ones((5, 2), bool)
    reset[2, 0] = True
    if holes:
        mask[2, 0] = mask[1, 0] = False
    y, last = layer(x, mask=mask, reset=reset)
    first, second = layer(x[:2, :1], mask=mask[:2, :1]), layer(x[2:, :1], mask=mask[2:, :1])
    close(y[:2, :1], first[0])
    close(y[2:, :1], second[0])
    close(y[:, 1:], layer(x[:, 1:])[0])
    for part, a, b in zip(parts(last), parts(first[1]), parts(second[1]), strict=True):
        close(part[::2, :1], b[::2])  # forwards the second sequence is the last one run, backwards the first
        close(part[1::2, :1], a[1::2])


@kinds
def test_a_reset_in_padding_leaves_the_last_state(kind):
    layer, x = make(kind, 2, 3), np.random.default_rng(0).normal(size=(4, 1, 2))
    reset = np.array([[0], [0], [0], [1]], bool)
    for a, b in zip(parts(layer(x, lengths=[2], reset=reset)[1]), parts(layer(x[:2])[1]), strict=True):
        close(a, b)


@kinds
def test_no_gradient_passes_a_reset(kind):
    layer, rng = make(kind, 2, 3), np.random.default_rng(0)
    x = tt.tensor(rng.normal(size=(4, 2, 2)), requires_grad=True)
    reset = np.zeros((4, 2), bool)
    reset[2, 0] = True
    y, _ = layer(x, reset=reset)
    y[3].sum().backward()
    touched = np.abs(x.grad.data).sum(-1) > 0
    assert touched.tolist() == [[False, True], [False, True], [True, True], [True, True]]


@kinds
def test_windows_with_a_carried_state_equal_one_run(kind):
    layer, rng = make(kind, 2, 3, num_layers=2), np.random.default_rng(0)
    x, state = rng.normal(size=(7, 2, 2)), None
    whole, last = layer(x)
    pieces = []
    for window in (x[:3], x[3:4], x[4:]):
        y, state = layer(window, state)
        pieces.append(y.data)
    close(np.concatenate(pieces), whole)
    for a, b in zip(parts(state), parts(last), strict=True):
        close(a, b)


@kinds
def test_layouts(kind):
    """batch_first, a single sequence, arrays and Tensors are the same numbers in another order."""
    layer, rng = make(kind, 2, 3, num_layers=2, bidirectional=True), np.random.default_rng(0)
    x, lengths, reset = rng.normal(size=(4, 3, 2)), np.array([4, 2, 3]), np.zeros((4, 3), bool)
    reset[1, 0] = True
    y, last = layer(x, lengths=lengths, reset=reset)
    first = copy.deepcopy(layer)
    first.batch_first = True
    yb, lastb = first(x.swapaxes(0, 1), lengths=tt.tensor(lengths), reset=reset.T)
    close(yb.data.swapaxes(0, 1), y)
    mask = np.arange(4)[:, None] < lengths
    ym, _ = first(tt.tensor(x.swapaxes(0, 1)), mask=tt.tensor(mask.T), reset=tt.tensor(reset.T))
    close(ym, yb)
    for b in range(3):
        yu, lastu = layer(x[:, b], lengths=lengths[b], reset=reset[:, b])
        close(yu, y[:, b])
        for u, a, other in zip(parts(lastu), parts(last), parts(lastb), strict=True):
            close(u, a[:, b])
            close(other, a)


def test_a_learned_initial_state():
    plain, layer = nn.LSTM(2, 3, 2), nn.LSTM(2, 3, 2, proj_size=1, learn_initial_state=True)
    assert set(layer.state_dict()) - set(plain.state_dict()) == {
        "initial_h", "initial_c", "weight_hr_l0", "weight_hr_l1",
    }  # fmt: skip
    assert layer.initial_h.shape == (2, 1, 1) and layer.initial_c.shape == (2, 1, 3)
    x = np.ones((4, 5, 2), np.float32)
    zeros = np.zeros((2, 5, 1), np.float32), np.zeros((2, 5, 3), np.float32)
    close(layer(x)[0], layer(x, zeros)[0])
    layer(x)[0].sum().backward()
    assert np.all(layer.initial_h.grad.data != 0) and np.all(layer.initial_c.grad.data != 0)
    assert layer(x[:, 0])[0].shape == (4, 1)
    layer.zero_grad()
    layer(x, zeros)[0].sum().backward()
    assert layer.initial_h.grad is None


def test_dropout_between_layers():
    x = np.ones((3, 2, 2), np.float32)
    layer = nn.GRU(2, 8, 2, dropout=0.5, generator=tt.Generator(0))
    twin = copy.deepcopy(layer)
    a, b = layer(x)[0], layer(x)[0]
    assert not np.array_equal(a.data, b.data)
    np.testing.assert_array_equal(twin(x)[0].data, a.data)
    layer.eval()
    np.testing.assert_array_equal(layer(x)[0].data, layer(x)[0].data)
    all_dropped = nn.GRU(2, 8, 2, dropout=1.0)
    y, h = all_dropped(x)
    bottom = nn.GRU(2, 8)
    bottom.load_state_dict({n: v for n, v in all_dropped.state_dict().items() if n.endswith("l0")})
    close(h[0], bottom(x)[1][0], 1e-6)  # the states are not dropped
    top = nn.GRU(8, 8)
    names = {n.replace("l1", "l0"): v for n, v in all_dropped.state_dict().items() if n.endswith("l1")}
    top.load_state_dict(names)
    close(y, top(np.zeros((3, 2, 8), np.float32))[0], 1e-6)
    with pytest.warns(UserWarning, match="acts between layers, and there is one"):
        nn.LSTM(2, 3, dropout=0.1)


# ---- Recurrent ------------------------------------------------------------------------------------------------------


@kinds
@pytest.mark.parametrize("reverse", [False, True])
def test_recurrent_of_a_cell_is_the_layer(kind, reverse):
    cell, layer = make_cell(kind, 2, 3), make(kind, 2, 3, bidirectional=True)
    suffix = "_l0_reverse" if reverse else "_l0"
    with tt.no_grad():
        for name, p in cell.named_parameters():
            p.copy_(getattr(layer, name + suffix))
    rng = np.random.default_rng(0)
    x, reset = rng.normal(size=(4, 3, 2)), rng.random((4, 3)) < 0.3
    y, last = nn.Recurrent(cell, reverse=reverse)(x, lengths=[4, 0, 2], reset=reset)
    expected, states = layer(x, lengths=[4, 0, 2], reset=reset)
    close(y, expected[..., 3:] if reverse else expected[..., :3])
    for a, b in zip(parts(last), parts(states), strict=True):
        close(a, b[int(reverse)])
    single, last = nn.Recurrent(cell, batch_first=True)(x[:, 0], parts(last)[0][0] if kind != "LSTM" else None)
    assert single.shape == (4, 3) and parts(last)[0].shape == (3,)


class Memory(nn.Module):
    """A cell of another kind: its state is a dict of a matrix and a number a row."""

    def forward(self, x, state):
        m = state["m"] * 0.5 + tt.expand_dims(x, 1) * tt.expand_dims(x, 2)
        return {"m": m, "n": state["n"] + 1}


def test_recurrent_takes_states_of_any_structure():
    rng = np.random.default_rng(0)
    x, state = rng.normal(size=(3, 2, 4)), {"m": np.zeros((2, 4, 4)), "n": np.zeros(2)}
    y, last = nn.Recurrent(Memory())(x, state, lengths=[3, 1])
    assert last["n"].tolist() == [3, 1] and y.shape == (3, 2, 4, 4)
    close(last["m"][1], np.outer(x[0, 1], x[0, 1]))
    with pytest.raises(tt.InputError, match="Memory has no initial_state"):
        nn.Recurrent(Memory())(x)
    with pytest.raises(tt.ShapeError, match="x has 2 rows"):
        nn.Recurrent(Memory())(x, {"m": np.zeros((3, 4, 4)), "n": np.zeros(2)})
    with pytest.raises(tt.DTypeError, match=r"state\['n'\] is a str"):
        nn.Recurrent(Memory())(x, {"m": np.zeros((2, 4, 4)), "n": "a"})


# ---- the tape -------------------------------------------------------------------------------------------------------


def test_what_a_loop_records_is_marked_by_time_step():
    layer, x = nn.LSTM(2, 3), np.ones((4, 2, 2), np.float32)
    with tt.Tape() as tape:
        layer(x)
    steps = [record.node.step for record in tape.records]
    assert sorted(set(steps) - {None}) == [0, 1, 2, 3]
    per_step = [steps.count(t) for t in range(4)]
    assert len(set(per_step)) == 1 and per_step[0] <= 12
    assert steps.count(None) <= 10


@kinds
def test_a_graph_is_freed_without_the_collector(kind):
    layer, x = make(kind, 2, 3, bidirectional=True), np.ones((4, 2, 2))
    gc.collect()
    gc.disable()
    try:
        y, state = layer(x, lengths=[4, 2])
        nodes = [weakref.ref(y.node), weakref.ref(parts(state)[0].node)]
        y.sum().backward()
        del y, state
        assert [node() for node in nodes] == [None, None]
    finally:
        gc.enable()


def test_nothing_is_recorded_where_nothing_is_asked():
    layer = nn.GRU(2, 3)
    with tt.no_grad():
        y, h = layer(np.ones((4, 2, 2), np.float32))
    assert not y.requires_grad and not h.requires_grad


# ---- bad input ------------------------------------------------------------------------------------------------------

F32 = np.float32
X = np.zeros((4, 2, 3), F32)
LSTM = nn.LSTM(3, 5, 2)
H, C = np.zeros((2, 2, 5), F32), np.zeros((2, 2, 5), F32)

BAD = {
    "features": (lambda: LSTM(X[..., :2]), tt.ShapeError, r"\(4, 2, 2\).*input_size = 3, got 2"),
    "float64": (lambda: LSTM(X.astype(float)), tt.DTypeError, "x is float64, the parameters are float32"),
    "integers": (lambda: LSTM(X.astype(int)), tt.DTypeError, "int64"),
    "list": (lambda: LSTM([1.0]), tt.DTypeError, "x is a list"),
    "axes": (lambda: LSTM(np.zeros((1, 1, 1, 3), F32)), tt.ShapeError, r"\(1, 1, 1, 3\)"),
    "vector": (lambda: LSTM(np.zeros(3, F32)), tt.ShapeError, r"\(3,\)"),
    "no steps": (lambda: LSTM(X[:0]), tt.ShapeError, "0 time steps"),
    "batch": (lambda: LSTM(X[:, :1], (H, C)), tt.ShapeError, r"h has shape \(2, 2, 5\).*= \(2, 1, 5\).*\n.*last batch"),
    "layers": (lambda: LSTM(X, (H[:1], C)), tt.ShapeError, r"h has shape \(1, 2, 5\).*= \(2, 2, 5\)"),
    "cell state": (lambda: LSTM(X, (H, C[..., :4])), tt.ShapeError, r"c has shape \(2, 2, 4\)"),
    "state dtype": (lambda: LSTM(X, (H, C.astype(float))), tt.DTypeError, "c is float64"),
    "dropped cell": (lambda: LSTM(X, tt.tensor(H)), tt.InputError, r"the state is a Tensor; it has 2, \(h, c\)"),
    "three states": (lambda: LSTM(X, (H, C, C)), tt.InputError, "3 parts"),
    "state of a GRU": (lambda: nn.GRU(3, 5, 2)(X, (H, C)), tt.DTypeError, "h is a tuple"),
    "unbatched state": (lambda: LSTM(X[:, 0], (H, C)), tt.ShapeError, r"= \(2, 5\)"),
    "lengths and mask": (
        lambda: LSTM(X, lengths=[4, 4], mask=np.ones((4, 2), bool)), tt.InputError, "both lengths and mask"
    ),
    "too long": (lambda: LSTM(X, lengths=[4, 5]), tt.InputError, "a length is 5, x has 4"),
    "negative": (lambda: LSTM(X, lengths=[4, -1]), tt.InputError, "a length is -1"),
    "lengths' number": (lambda: LSTM(X, lengths=[4, 4, 4]), tt.ShapeError, r"\(3,\), x has 2 rows"),
    "lengths' dtype": (lambda: LSTM(X, lengths=[4.0, 2.0]), tt.DTypeError, "float64"),
    "mask's shape": (lambda: LSTM(X, mask=np.ones((2, 4), bool)), tt.ShapeError, r"mask has shape \(2, 4\)"),
    "mask's dtype": (lambda: LSTM(X, mask=np.ones((4, 2))), tt.DTypeError, "mask is float64"),
    "reset's shape": (lambda: LSTM(X, reset=np.ones(4, bool)), tt.ShapeError, r"reset has shape \(4,\)"),
    "reset's dtype": (lambda: LSTM(X, reset=np.ones((4, 2), int)), tt.DTypeError, "reset is int64"),
    "hidden_size": (lambda: nn.LSTM(3, 0), tt.InputError, "hidden_size is 0"),
    "input_size": (lambda: nn.GRU(2.5, 3), tt.InputError, "input_size is 2.5"),
    "num_layers": (lambda: nn.RNN(3, 3, 0), tt.InputError, "num_layers is 0"),
    "proj_size": (lambda: nn.LSTM(3, 4, proj_size=4), tt.InputError, "proj_size is 4, hidden_size is 4"),
    "negative proj_size": (lambda: nn.LSTM(3, 4, proj_size=-1), tt.InputError, "proj_size is -1"),
    "dropout": (lambda: nn.LSTM(3, 4, 2, dropout=1.5), tt.InputError, "LSTM, dropout: p is 1.5"),
    "nonlinearity": (lambda: nn.RNN(3, 4, nonlinearity="sin"), tt.InputError, "nonlinearity is 'sin'"),
    "cell features": (lambda: nn.LSTMCell(3, 4)(X[0, :, :2]), tt.ShapeError, "input_size = 3, got 2"),
    "cell axes": (lambda: nn.GRUCell(3, 4)(X), tt.ShapeError, "one time step"),
    "state of a cell": (lambda: nn.GRUCell(3, 4)(X[0], H[0]), tt.ShapeError, r"h has shape \(2, 5\).*= \(2, 4\)"),
    "cell batch": (lambda: nn.GRUCell(3, 4)(X[0], np.zeros((3, 4), F32)), tt.ShapeError, "3 rows and x of 2"),
    "cell's dropped c": (lambda: nn.LSTMCell(3, 5)(X[0], H[0]), tt.InputError, "the state is a ndarray"),
    "cell nonlinearity": (lambda: nn.RNNCell(3, 4, nonlinearity="x"), tt.InputError, "nonlinearity is 'x'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=r"(?s)" + words) as caught:
        call()
    assert "\n  help: " in str(caught.value)


def test_an_error_inside_a_step_leaves_no_time_step_behind():
    class Broken(nn.Module):
        def forward(self, x, state):
            raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        nn.Recurrent(Broken())(X, H[0])
    p = nn.Parameter(np.ones(1))
    assert (p * 2).node.step is None
