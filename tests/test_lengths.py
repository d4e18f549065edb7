"""Rows of unequal length in one batch: each as if it ran alone, whatever stands in the padding, and the losses too."""

import contextlib
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import nn
from tinytape.nn import functional as F

I, H = 2, 3
TOLERANCE = {"float32": 2e-5, "float64": 1e-10}
MODES = {"compiled": contextlib.nullcontext, "eager": tt.no_compile}


def layer_of(kind, **options):
    return lambda dtype: getattr(nn, kind)(I, H, **options, generator=tt.Generator(0), dtype=dtype)


def cell_of(kind, *sizes, reverse=False, **options):
    made = lambda dtype: getattr(nn, kind)(I, H, *sizes, **options, generator=tt.Generator(0), dtype=dtype)  # noqa: E731
    return lambda dtype: nn.Recurrent(made(dtype), reverse=reverse).eval()


FORMS = {
    "LSTM": layer_of("LSTM"),
    "LSTM, two layers both ways": layer_of("LSTM", num_layers=2, bidirectional=True),
    "GRU both ways": layer_of("GRU", bidirectional=True),
    "minimal": cell_of("MinimalGatedUnitCell", reverse=True),
}
MORE = {
    "LSTM, projected": layer_of("LSTM", proj_size=2, bidirectional=True),
    "GRU before": layer_of("GRU", reset_after=False),
    "RNN": layer_of("RNN", num_layers=2),
    "RNN, relu": layer_of("RNN", nonlinearity="relu", bidirectional=True),
    "LSTM cell": cell_of("LSTMCell", reverse=True),
    "peephole": cell_of("PeepholeLSTMCell"),
    "coupled": cell_of("CoupledLSTMCell"),
    "layer norm": cell_of("LayerNormLSTMCell"),
    "zoneout": cell_of("ZoneoutLSTMCell", reverse=True),
    "memory": cell_of("MemoryAttentionCell", 4, 2),
}
cases = pytest.mark.parametrize(
    ("form", "dtype", "mode"),
    [
        pytest.param(form, dtype, mode, marks=[] if quick else [pytest.mark.slow])
        for form in FORMS | MORE
        for dtype, mode, quick in [
            ("float32", "compiled", form in FORMS),
            ("float64", "compiled", False),
            ("float64", "eager", form in MORE),
            ("float32", "eager", False),
        ]
    ],
)  # fmt: skip


def parts(state):
    return list(state) if isinstance(state, tuple) else [state]


def like(state, made):
    return tuple(made) if isinstance(state, tuple) else made[0]


def begin_of(module, rows, dtype, rng):
    """A random state."""
    if isinstance(module, nn.Recurrent):
        state = module.cell.initial_state(rows)
    else:
        with tt.no_grad():
            state = module(np.zeros((1, rows, I), dtype))[1]
    return like(state, [rng.normal(size=part.shape).astype(dtype) for part in parts(state)])


def axis_of(module):
    """Where rows are in a state."""
    return 0 if isinstance(module, nn.Recurrent) else 1


def rows_of(state, axis, chosen):
    return like(state, [np.take(part, chosen, axis) for part in parts(state)])


class Run:
    """A module on some rows: values, and the gradients of a number on which every entry bears differently."""

    def __init__(self, module, x, state, weights, **marks):
        module.zero_grad()
        x = tt.tensor(x, requires_grad=True)
        start = like(state, [tt.tensor(part, requires_grad=True) for part in parts(state)])
        y, last = module(x, start, **marks)
        self.y, self.last = y.numpy(), [part.numpy() for part in parts(last)]
        sum((a * w).sum() for a, w in zip([y, *parts(last)], weights, strict=True)).backward()
        self.dx, self.dstart = x.grad.numpy(), [part.grad.numpy() for part in parts(start)]
        self.weights = {
            name: np.zeros(p.shape, p.dtype) if p.grad is None else p.grad.numpy()
            for name, p in module.named_parameters()
        }


def weights_for(module, y_shape, state, dtype, rng):
    return [rng.normal(size=shape).astype(dtype) for shape in (y_shape, *(part.shape for part in parts(state)))]


def close(found, expected, tolerance):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    error = np.linalg.norm((found - expected).astype(np.float64))
    assert error <= tolerance * max(1.0, np.linalg.norm(expected.astype(np.float64)))


class Problem:
    """A module, rows of drawn lengths with NaN behind them, a state, and a weight for every entry of the results."""

    def __init__(self, form, dtype, steps, rows, seed=0):
        rng = np.random.default_rng(seed)
        self.module, self.dtype = (FORMS | MORE)[form](dtype), dtype
        self.tolerance = TOLERANCE[dtype] * (50 if form == "layer norm" else 1)  # it divides by the spread of 3 numbers
        self.axis = axis_of(self.module)
        self.x = rng.normal(size=(steps, rows, I)).astype(dtype)
        self.state = begin_of(self.module, rows, dtype, rng)
        with tt.no_grad():
            y, last = self.module(self.x, self.state)
        self.weights = weights_for(self.module, y.shape, last, dtype, rng)

    def run(self, **marks):
        return Run(self.module, self.x, self.state, self.weights, **marks)

    def alone(self, b, part, state):
        """Row b by itself, over some of its steps, from a given state."""
        wy, *ws = self.weights
        chosen = [wy[part, b : b + 1], *(np.take(w, [b], self.axis) for w in ws)]
        return Run(self.module, self.x[part, b : b + 1], state, chosen)

    def own_state(self, b):
        return rows_of(self.state, self.axis, [b])


lengths_of_rows = st.integers(1, 6).flatmap(
    lambda steps: st.tuples(st.just(steps), st.lists(st.integers(0, steps), min_size=1, max_size=4))
)

# ---- as each row alone ----------------------------------------------------------------------------------------------


@cases
@given(drawn=lengths_of_rows, seed=st.integers(0, 9), as_mask=st.booleans())
def test_every_row_is_as_if_it_ran_alone(form, dtype, mode, drawn, seed, as_mask):
    """Outputs, states, and the gradients of inputs, states and weights; rows of no steps among them."""
    steps, lengths = drawn
    p = Problem(form, dtype, steps, len(lengths), seed)
    for b, n in enumerate(lengths):
        p.x[n:, b] = np.nan
    marks = {"mask": np.arange(steps)[:, None] < lengths} if as_mask else {"lengths": lengths}
    with MODES[mode]():
        found, total = p.run(**marks), {}
        for b, n in enumerate(lengths):
            assert not found.y[n:, b].any() and not found.dx[n:, b].any()
            if n == 0:  # the state is handed on, and so is its gradient, to the last bit
                for values, expected in [(found.last, parts(p.state)), (found.dstart, p.weights[1:])]:
                    for part, same in zip(values, expected, strict=True):
                        np.testing.assert_array_equal(np.take(part, b, p.axis), np.take(same, b, p.axis))
                continue
            own = p.alone(b, np.s_[:n], p.own_state(b))
            close(found.y[:n, b : b + 1], own.y, p.tolerance)
            close(found.dx[:n, b : b + 1], own.dx, p.tolerance)
            for values, expected in [(found.last, own.last), (found.dstart, own.dstart)]:
                for part, one in zip(values, expected, strict=True):
                    close(np.take(part, [b], p.axis), one, p.tolerance)
            for name, gradient in own.weights.items():
                total[name] = total.get(name, 0) + gradient
    for name, gradient in found.weights.items():
        close(gradient, total.get(name, np.zeros_like(gradient)), p.tolerance)


@pytest.mark.peer
@pytest.mark.parametrize("kind", ["RNN", "GRU", "LSTM"])
@pytest.mark.parametrize("dtype", ["float32", pytest.param("float64", marks=pytest.mark.slow)])
@given(
    drawn=st.integers(1, 6).flatmap(
        lambda steps: st.tuples(st.just(steps), st.lists(st.integers(1, steps), min_size=1, max_size=4))
    ),
    layers=st.integers(1, 2),
    both=st.booleans(),
)
def test_kernels_equal_packed_sequences(kind, drawn, layers, both, dtype):
    torch = pytest.importorskip("torch")
    steps, lengths = drawn
    ours = getattr(nn, kind)(I, H, layers, bidirectional=both, generator=tt.Generator(0), dtype=dtype)
    theirs = getattr(torch.nn, kind)(I, H, layers, bidirectional=both).to(getattr(torch, dtype))
    theirs.load_state_dict({name: torch.from_numpy(value) for name, value in ours.state_dict().items()})
    rng = np.random.default_rng(steps)
    x = rng.normal(size=(steps, len(lengths), I)).astype(dtype)
    state = begin_of(ours, len(lengths), dtype, rng)
    weights = weights_for(ours, (steps, len(lengths), H * (1 + both)), state, dtype, rng)
    found = Run(ours, x, state, weights, lengths=lengths)
    tx = torch.tensor(x, requires_grad=True)
    begun = [torch.tensor(part, requires_grad=True) for part in parts(state)]
    packed = torch.nn.utils.rnn.pack_padded_sequence(tx, torch.tensor(lengths), enforce_sorted=False)
    ty, tlast = theirs(packed, like(state, begun))
    ty = torch.nn.utils.rnn.pad_packed_sequence(ty, total_length=steps)[0]
    sum((a * torch.from_numpy(w)).sum() for a, w in zip([ty, *parts(tlast)], weights, strict=True)).backward()
    expected = [ty, *parts(tlast), tx.grad, *(part.grad for part in begun), *(q.grad for q in theirs.parameters())]
    ours_in_order = [found.y, *found.last, found.dx, *found.dstart, *found.weights.values()]
    for a, b in zip(ours_in_order, expected, strict=True):
        close(a, b.detach().numpy(), TOLERANCE[dtype])


@pytest.mark.parametrize("mode", MODES)
def test_masked_steps_hand_the_state_on_to_the_last_bit(mode):
    p = Problem("LSTM", "float32", 6, 3)
    mask = np.array([[1, 1, 0, 1, 0, 0], [0, 1, 1, 0, 0, 1], [1, 0, 0, 0, 0, 0]], bool).T
    p.x[~mask] = np.nan
    p.weights[0][~mask] = np.inf  # not even the gradient of what is put out there
    with MODES[mode]():
        found = p.run(mask=mask)
    for b in range(3):
        last = np.flatnonzero(mask[:, b])[-1]
        np.testing.assert_array_equal(found.last[0][0, b], found.y[last, b])
    assert not found.y[~mask].any() and not found.dx[~mask].any()
    assert all(np.isfinite(g).all() for g in (*found.dstart, *found.weights.values()))


# ---- documents in one row -------------------------------------------------------------------------------------------


def documents(length, reset):
    """The ranges between the resets of a row."""
    cuts = [0, *(t for t in range(1, length) if reset[t]), length]
    return [np.s_[a:b] for a, b in pairwise(cuts)]


@cases
@given(data=st.data(), seed=st.integers(0, 9))
def test_resets_are_as_documents_run_apart(form, dtype, mode, data, seed):
    """In every layer, with gradients: the given state belongs to the first document, backwards to the last."""
    steps = data.draw(st.integers(1, 6))
    lengths = data.draw(st.lists(st.integers(1, steps), min_size=1, max_size=3))
    reset = np.random.default_rng(seed).random((steps, len(lengths))) < 0.4
    p = Problem(form, dtype, steps, len(lengths), seed)
    if getattr(p.module, "bidirectional", False):  # a state each way, so that the first and the last document have one
        p.state = like(p.state, [np.zeros_like(part) for part in parts(p.state)])
    backwards = isinstance(p.module, nn.Recurrent) and p.module.reverse
    both = getattr(p.module, "bidirectional", False)
    none = [np.zeros_like(w) for w in p.weights[1:]]
    with MODES[mode]():
        found, total = p.run(lengths=lengths, reset=reset), {}
        for b, n in enumerate(lengths):
            pieces = documents(n, reset[:, b])
            for k, piece in enumerate(pieces):
                first, final = (k == len(pieces) - 1, k == 0) if backwards else (k == 0, k == len(pieces) - 1)
                cut = reset[n:, b].any() if backwards else reset[0, b]  # also the state that was given
                state = p.own_state(b)
                if not first or cut:
                    state = like(state, [np.zeros_like(part) for part in parts(state)])
                kept = p.weights[1:]
                p.weights[1:] = [ends(w, k, len(pieces)) for w in kept] if both else kept if final else none
                own = p.alone(b, piece, state)
                p.weights[1:] = kept
                close(found.y[piece, b : b + 1], own.y, p.tolerance)
                close(found.dx[piece, b : b + 1], own.dx, p.tolerance)
                if first and not both:
                    for part, one in zip(found.dstart, own.dstart, strict=True):
                        close(np.take(part, [b], p.axis), one * (not cut), p.tolerance)
                if final and not both:
                    for part, one in zip(found.last, own.last, strict=True):
                        close(np.take(part, [b], p.axis), one, p.tolerance)
                for name, gradient in own.weights.items():
                    total[name] = total.get(name, 0) + gradient
    for name, gradient in found.weights.items():
        close(gradient, total[name], p.tolerance)


def ends(weight, k, count):
    """What bears on the last states of a document, of a layer that goes both ways: forwards of the last, else first."""
    weight = weight.copy()
    if k != count - 1:
        weight[0::2] = 0
    if k != 0:
        weight[1::2] = 0
    return weight


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("form", ["LSTM", "GRU both ways", "minimal"])
def test_a_reset_at_the_first_step_drops_the_given_state(form, mode):
    """Even one that is not finite, and its gradient is 0; backwards nothing lies before the first step to be cut."""
    p = Problem(form, "float32", 4, 3)
    forwards = np.s_[0] if form == "GRU both ways" else np.s_[:]
    rows = [np.moveaxis(part, p.axis, 0) for part in parts(p.state)]
    for row in rows:
        row[1][forwards] = np.nan
    reset = np.zeros((4, 3), bool)
    reset[0, 1] = True
    with MODES[mode]():
        if form == "minimal":
            assert np.isnan(p.run(reset=reset).y[:, 1]).all()
            return
        found = p.run(reset=reset)
        for row in rows:
            row[1][forwards] = 0
        expected = p.run()
    close(found.y, expected.y, p.tolerance)
    for name, gradient in expected.weights.items():
        close(found.weights[name], gradient, p.tolerance)
    for part, other in zip(found.dstart, expected.dstart, strict=True):
        assert not part[:, 1][forwards].any()
        other[:, 1][forwards] = 0
        close(part, other, p.tolerance)


@pytest.mark.parametrize("mode", MODES)
def test_a_state_that_is_not_finite_stays_in_its_row(mode):
    """Nothing is hidden: its outputs are not finite, nor are the weights' gradients; the other rows are as ever."""
    p = Problem("LSTM", "float32", 4, 3)
    with MODES[mode]():
        clean = p.run(lengths=[4, 2, 0])
        p.state[1][0, 1] = np.inf
        p.state[0][0, 1] = np.nan
        found = p.run(lengths=[4, 2, 0])
        p.state[0][0, 2] = np.nan
        empty = p.run(lengths=[4, 2, 0])
    assert np.isnan(found.y[:2, 1]).all() and not found.y[2:, 1].any()
    assert all(np.isnan(gradient).any() for gradient in found.weights.values())
    np.testing.assert_array_equal(found.y[:, [0, 2]], clean.y[:, [0, 2]])
    np.testing.assert_array_equal(found.dx[:, [0, 2]], clean.dx[:, [0, 2]])
    assert np.isnan(empty.last[0][0, 2]).all()


# ---- training on padding --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("lengths", [[0, 0], [0, 3]])
def test_training_with_rows_of_padding_only(lengths, mode):
    """No NaN in outputs, loss or gradients, though padding is nothing else; a loss of 0 where no row counts."""
    layer, head = nn.LSTM(I, H, 2, bidirectional=True, generator=tt.Generator(0)), nn.Linear(2 * H, 1)
    rng, mask = np.random.default_rng(0), np.arange(4)[:, None] < lengths
    x, target = rng.normal(size=(4, 2, I)).astype("f4"), rng.normal(size=(4, 2, 1)).astype("f4")
    x[~mask] = target[~mask] = np.nan
    classes = np.where(mask, 1, -100)
    with MODES[mode]():
        y, _ = layer(x, lengths=lengths)
        logits = tt.concatenate([head(y), -head(y)], axis=-1)
        loss = F.mse_loss(head(y), target, mask=mask) + F.cross_entropy(logits, classes)
        loss.backward()
    assert not y.data[~mask].any() and np.isfinite(loss.item()) and (loss.item() == 0) == (not mask.any())
    for name, p in [*layer.named_parameters(), *head.named_parameters()]:
        assert np.isfinite(p.grad.data).all(), name
        assert p.grad.data.any() == mask.any(), name


# ---- bad input ------------------------------------------------------------------------------------------------------

X = np.zeros((4, 2, I), np.float32)
LSTM, CELL = nn.LSTM(I, H), nn.Recurrent(nn.GRUCell(I, H))
FIRST = nn.GRU(I, H, batch_first=True)
M = np.ones((4, 2), bool)

BAD = {
    "lengths of bools": (lambda: CELL(X, lengths=[True, False]), tt.DTypeError, "lengths are bool"),
    "lengths of floats": (lambda: CELL(X, lengths=tt.tensor([4.0, 2.0])), tt.DTypeError, "lengths are float32"),
    "one length": (lambda: CELL(X, lengths=3), tt.ShapeError, r"lengths have shape \(\), x has 2 rows"),
    "a column of lengths": (lambda: CELL(X, lengths=[[1], [2]]), tt.ShapeError, r"shape \(2, 1\)"),
    "too long": (lambda: CELL(X, lengths=[4, 5]), tt.InputError, "a length is 5, x has 4 time steps"),
    "negative": (lambda: CELL(X, lengths=[-1, 2]), tt.InputError, "a length is -1"),
    "no steps": (lambda: CELL(X[:0]), tt.ShapeError, "0 time steps"),
    "mask's layout": (lambda: FIRST(X.swapaxes(0, 1), mask=M), tt.ShapeError, r"shape \(4, 2\), x has \(2, 4\)"),
    "mask of integers": (lambda: CELL(X, mask=M.astype(int)), tt.DTypeError, "mask is int64"),
    "mask and lengths": (lambda: CELL(X, lengths=[1, 1], mask=M), tt.InputError, "both lengths and mask"),
    "reset of integers": (lambda: CELL(X, reset=M.astype(int)), tt.DTypeError, "reset is int64"),
    "reset's shape": (lambda: CELL(X, reset=M[0]), tt.ShapeError, r"reset has shape \(2,\)"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=words) as caught:
        call()
    assert "\n  help: " in str(caught.value)
