"""Compiled scans: what steps may consist of, what is refused and why, and that sizes do not enter the kernels.

Most of it runs by the emitted NumPy source, which needs no compiler. It and the Numba source come from one program.
"""

import os
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest

import tinytape as tt
from tinytape import nn
from tinytape.compile import attempt
from tinytape.compile.cache import compilations
from tinytape.engine.tree import flatten, map_leaves
from tinytape.kernels.compiler import usable

T, B, I, H = 6, 4, 3, 5
needs_numba = pytest.mark.skipif(not usable(), reason="needs Numba")


@contextmanager
def by_numpy():
    """Run the NumPy source in place of kernels."""
    attempt._plans.clear()
    with mock.patch.object(attempt, "usable", lambda: False):
        yield
    attempt._plans.clear()


class Leaves:
    """Random tensors that require gradients, one after the other; those without a batch are weights."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.made = []

    def __call__(self, *shape):
        self.made.append(tt.tensor(self.rng.normal(size=shape), requires_grad=True))
        return self.made[-1]


def outcome(f, init, xs, leaves, **options):
    """All results of a scan, and the gradients of `leaves` and of what was put in."""
    with tt.Tape() as tape:
        results = flatten(tt.scan(f, init, xs, **options))
        rng = np.random.default_rng(7)
        loss = sum((y * rng.normal(size=y.shape)).sum() for y in results if y.dtype.kind == "f")
        sources = [x for x in (*flatten(init), *flatten(xs), *leaves) if getattr(x, "requires_grad", False)]
        gradients = tape.gradient(loss, sources)
    found = [np.zeros(x.shape) if g is None else g.data for x, g in zip(sources, gradients, strict=True)]
    return [y.data for y in results], found


def assert_like_eager(f, init, xs, leaves=(), tolerance=1e-10, **options):
    expected = outcome(f, init, xs, leaves, compiled=False, **options)
    for values, references in zip(outcome(f, init, xs, leaves, compiled=True, **options), expected, strict=True):
        for a, b in zip(values, references, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
            same = (a == b) | np.isnan(b)  # also infinities
            a, b = np.where(same, 0, a), np.where(same, 0, b)
            assert np.linalg.norm(a - b) <= tolerance * max(1.0, np.linalg.norm(np.where(np.isfinite(b), b, 0)))


# ---- what a step may be ---------------------------------------------------------------------------------------------

FORMS = {}


def form(build):
    FORMS[build.__name__] = build
    return build


@form
def weights_in_every_way(leaf):
    w, u, b = leaf(I, H), leaf(H, H), leaf(H)

    def f(h, x):
        joined = tt.concatenate([w[:, :2], w[:, 2:] * 0.5], axis=1)
        h = tt.tanh(x @ joined + h @ u.T + (h * x[:, :1]) @ u + h @ tt.stack([b] * H) + b)
        return h, h

    return f, leaf(B, H), leaf(T, B, I)


@form
def numbers_and_arrays_as_outputs(leaf):
    w = leaf(I, H)
    return lambda h, x: (tt.tanh(x @ w + h), (1.0, 2, h, np.arange(3.0), w)), leaf(B, H), leaf(T, B, I)


@form
def no_batch(leaf):
    w, u, b = leaf(I, H), leaf(H, H), leaf(H)
    return lambda h, x: (tt.tanh(x @ w + h @ u + b), h), leaf(H), leaf(T, I)


@form
def no_batch_and_width_1(leaf):
    w, u = leaf(I, 1), leaf(1, 1)
    return lambda h, x: (tt.tanh(x @ w + h @ u), h), leaf(1), leaf(T, I)


@form
def single_numbers(leaf):
    w = leaf(H)
    return lambda h, x: (tt.sin(h * x) + (w * h).sum() * 0.5, h), leaf(), leaf(T)


@form
def a_number_a_row(leaf):
    return lambda h, x: (tt.sin(h * x) + 0.5 * h, h), leaf(B), leaf(T, B)


@form
def a_carry_that_all_rows_share(leaf):
    w, u, b = leaf(I, H), leaf(H, H), leaf(H)

    def f(carry, x):
        h, scale, shift = carry
        h = tt.tanh(x @ w + h @ u + shift) * scale
        return (h, 0.9 * scale, tt.tanh(shift * b)), (h.sum(axis=-1), scale)

    return f, (leaf(B, H), leaf(), leaf(H)), leaf(T, B, I)


@form
def inputs_that_all_rows_share(leaf):
    w, u, b = leaf(I, H), leaf(H, H), leaf(1, H)

    def f(h, x):
        time, vector, row = x
        return tt.tanh((row * time) @ w + vector @ u + h * vector + b * time), h

    return f, leaf(B, H), (leaf(T), leaf(T, H), leaf(T, B, I))


@form
def a_shared_input_as_long_as_the_batch(leaf):
    w, u = leaf(I, H), leaf(H, H)
    return lambda h, x: (tt.tanh(x @ w + h @ u), h), leaf(I, H), leaf(T, I)


@form
def rows_from_outside(leaf):
    w, u, e, memory = leaf(I, H), leaf(H, H), leaf(B, H), leaf(B, 7, H)

    def f(h, x):
        a = tt.softmax((memory * h.expand_dims(1)).sum(axis=-1))
        read = (a.expand_dims(-1) * memory).sum(axis=1)
        return tt.tanh(x @ w + h * e + (0.5 * e) @ u + read), a

    return f, leaf(B, H), leaf(T, B, I)


@form
def batch_statistics(leaf):
    w, u = leaf(I, H), leaf(H, H)
    return lambda h, x: (tt.tanh(x @ w + (h - h.mean(axis=0)) @ u), h), leaf(B, H), leaf(T, B, I)


@form
def einsum_and_tensordot(leaf):
    a, u, w = leaf(H, I, H), leaf(H, H), leaf(I, H)

    def f(h, x):
        bilinear = tt.einsum("bg,gih,bi->bh", h, a, x)
        return tt.tanh(bilinear + tt.einsum("bh,gh->bg", h, u) + tt.tensordot(x, w, ((1,), (0,)))), h

    return f, leaf(B, H), leaf(T, B, I)


@form
def moving_elements(leaf):
    w = leaf(I, H)

    def f(h, x):
        a = tt.roll(h, 2, axis=-1) + tt.tile(h[:, :1], (1, H)) + tt.repeat(x, 2, axis=1)[:, :H]
        a = a + h[:, [0, 1, 1, 0, 4]] + h[..., np.array([True, False, True, True, True])].sum(axis=-1, keepdims=True)
        return tt.tanh(
            0.1 * (a + tt.cumsum(h, axis=-1) + tt.cumsum(h[:, :, None] * h[:, None], axis=1)[:, 2]) + x @ w
        ), a

    return f, leaf(B, H), leaf(T, B, I)


@form
def elements_over_merged_axes(leaf):
    q = leaf(H, H)

    def f(m, x):
        flat = tt.tanh(tt.reshape(m, (-1, H)) @ q + q[0])
        return tt.reshape(flat, m.shape) * x[:, None], m.max(axis=1)

    return f, leaf(B, 3, H), leaf(T, B, H)


@form
def flags(leaf):
    w = leaf(I, H)

    def f(carry, x):
        h, seen = carry
        value, mask = x
        seen = tt.logical_xor(seen, value.sum(axis=-1) > 0)
        return (tt.where(mask, tt.tanh(value @ w), h) * seen[:, None], seen), (seen, mask)

    rng = leaf.rng
    return f, (leaf(B, H), rng.random(B) < 0.5), (leaf(T, B, I), rng.random((T, B, 1)) < 0.5)


@form
def a_carry_that_is_replaced(leaf):
    return lambda h, x: (x.detach(), tt.swapaxes(tt.reshape(h, (B, 2, 3)), 1, 2)), leaf(B, 6), leaf(T, B, 6)


@form
def in_place_on_results(leaf):
    w = leaf(I, H)

    def f(h, x):
        h = h * 1.0
        h += x @ w
        h *= 0.5
        return h, h

    return f, leaf(B, H), leaf(T, B, I)


@form
def one_row_that_loses_its_axis(leaf):
    w, u = leaf(I, H), leaf(H, H)
    return lambda h, x: (tt.tanh(x @ w + h @ u), (tt.squeeze(h), h[0])), leaf(1, H), leaf(T, 1, I)


@form
def as_many_rows_as_features(leaf):
    w, u, b = leaf(I, H), leaf(H, H), leaf(H)
    return lambda h, x: (tt.tanh(x @ w + h @ u + b * u), h * b), leaf(H, H), leaf(T, H, I)


@pytest.mark.parametrize("name", FORMS)
@pytest.mark.parametrize("reverse", [False, True])
def test_a_step_may_be(name, reverse):
    leaf = Leaves()
    with by_numpy():
        assert_like_eager(*FORMS[name](leaf), leaf.made, reverse=reverse)


@needs_numba
@pytest.mark.slow
@pytest.mark.parametrize("name", FORMS)
def test_a_compiled_step_may_be(name):
    leaf = Leaves()
    assert_like_eager(*FORMS[name](leaf), leaf.made)


# ---- NaN and infinities ---------------------------------------------------------------------------------------------

ODD = {
    "max": lambda x, h: tt.max(x, axis=-1, keepdims=True) + 0.5 * h,
    "min": lambda x, h: tt.min(x, axis=-1, keepdims=True) + 0.5 * h,
    "sum": lambda x, h: tt.sum(x, axis=-1, keepdims=True) + 0.5 * h,
    "softmax": lambda x, h: tt.softmax(x, axis=-1) + 0.5 * h,
    "logsumexp": lambda x, h: tt.logsumexp(x, axis=-1, keepdims=True) + 0.5 * h,
    "cumsum": lambda x, h: tt.cumsum(x, axis=-1) + 0.5 * h,
    "maximum": lambda x, h: tt.maximum(x, h),
    "minimum": lambda x, h: tt.minimum(x, h),
    "clip": lambda x, h: tt.clip(x, -1, 1) + 0.5 * h,
    "relu": lambda x, h: tt.relu(x) + 0.5 * h,
    "elu": lambda x, h: tt.elu(x) + 0.5 * h,
    "gelu": lambda x, h: tt.gelu(x) + 0.5 * h,
    "softplus": lambda x, h: tt.softplus(x) + 0.5 * h,
    "sigmoid": lambda x, h: tt.sigmoid(x) * h,
    "tanh": lambda x, h: tt.tanh(x) + 0.5 * h,
    "sign": lambda x, h: tt.sign(x) * h,
    "abs": lambda x, h: tt.abs(x) + 0.5 * h,
    "where": lambda x, h: tt.where(x > 0, tt.sqrt(tt.abs(x)), h),
    "comparison": lambda x, h: (x < 0.5) * h + tt.where(tt.logical_not(x >= h), 0.5 * h, x),
}


def odd_numbers():
    x = np.random.default_rng(3).normal(size=(T, B, H))
    x[2, 1, 3], x[3, 2, 0], x[4, 3, 1] = np.nan, np.inf, -np.inf
    return tt.tensor(x, requires_grad=True)


@pytest.mark.parametrize("name", ODD)
def test_odd_numbers_come_out_as_in_eager(name):
    with by_numpy():
        assert_like_eager(lambda h, x: (ODD[name](x, h), h), Leaves()(B, H), odd_numbers())


@needs_numba
@pytest.mark.slow
@pytest.mark.parametrize("name", ODD)
def test_odd_numbers_come_out_of_kernels_as_in_eager(name):
    assert_like_eager(lambda h, x: (ODD[name](x, h), h), Leaves()(B, H), odd_numbers())


# ---- what is refused ------------------------------------------------------------------------------------------------

table = tt.tensor(np.zeros(H))


def looks_at_data(h, x):
    return h * float(h.data.mean()), h


def looks_at_a_comparison(h, x):
    return h * (h > 0).data.mean(), h


def looks_at_a_weight(h, x):
    return h * table[0].item(), h


def branches(h, x):
    return (h if h.sum() > 0 else -h), h


def branches_on_a_constant(h, x):
    return (h if table.sum() > 0 else -h), h


def copies(h, x):
    return h.copy(), h


def makes_a_tensor_of_one(h, x):
    return tt.tensor(h), h


def writes(h, x):
    table[0] = 1.0
    return h * table, h


def adds_in_place_to_a_weight(h, x):
    global table
    table += 1.0
    return h * table, h


def counts(h, x):
    return h * tt.argmax(h, axis=-1, keepdims=True), h


def takes_triangles(h, x):
    return tt.tril(h[:, :, None] * h[:, None]).sum(axis=-1), h


@pytest.mark.parametrize(
    ("f", "reason"),
    [
        (looks_at_data, "data: on a Tensor"),
        (looks_at_a_comparison, "data: on a Tensor"),
        (looks_at_a_weight, r"item\(\): on a Tensor"),
        (branches, r"bool\(\): on a Tensor"),
        (branches_on_a_constant, r"bool\(\): on a Tensor"),
        (copies, r"copy\(\): on a Tensor"),
        (makes_a_tensor_of_one, r"tensor\(\): on a Tensor"),
        (writes, r"x\[index\] = values: on a Tensor"),
        (adds_in_place_to_a_weight, r"x \+= y: on a Tensor"),
        (counts, "argmax"),
        (takes_triangles, "there is no rule for tril"),
    ],
)
def test_refused_with_the_line(f, reason, caplog):
    init, xs = np.ones((B, H)), np.ones((T, B, H))
    line = f.__code__.co_firstlineno + 1 + (f is adds_in_place_to_a_weight)
    with pytest.raises(tt.InputError, match=rf"{f.__name__} cannot be compiled: .*{reason}.*test_compile.py:{line}"):
        tt.scan(f, init, xs, compiled=True)
    table.copy_(np.ones(H))
    expected = tt.scan(f, init, xs, compiled=False)
    table.copy_(np.ones(H))
    attempt._told.clear()
    found = tt.scan(f, init, xs)
    assert "runs step by step" in caplog.text and f"test_compile.py:{line}" in caplog.text
    for a, b in zip(flatten(found), flatten(expected), strict=True):
        np.testing.assert_array_equal(a.data, b.data)


@pytest.mark.parametrize(
    ("f", "init", "reason"),
    [
        (lambda n, x: (n + 1, None), 0, "the carry is of int64"),
        (lambda c, x: (c, None), (np.zeros((B, H)), 0), "the carry is of float64, int64"),
        (lambda c, x: (c, None), (np.zeros((B, H)), np.zeros((B, H), np.float32)), "float64, float32"),
        (lambda h, x: (h[:, :2], None), np.zeros((B, H)), r"carry has shape \(4, 5\) in init and \(4, 2\)"),
        (lambda h, x: ({"h": h}, None), np.zeros((B, H)), "carry is"),
        (lambda h, x: h, np.zeros((B, H)), "f returned a Tensor"),
        (lambda h, x: {}["missing"], np.zeros((B, H)), "'missing'"),
        (lambda h, x: (nn.functional.dropout(h, 0.5), None), np.zeros((B, H)), "draws random numbers"),
    ],
)
def test_refused(f, init, reason):
    with pytest.raises(tt.InputError, match=f"cannot be compiled: .*{reason}"):
        tt.scan(f, init, np.ones((T, B, H)), compiled=True)


def test_a_trace_leaves_no_traces():
    """Neither a refused nor a successful one changes what the thread is doing, or a tensor."""
    w = tt.tensor(np.ones((H, H)), requires_grad=True)
    storage, values = w.storage, w.numpy()
    for f in (branches, lambda h, x: (h @ w, h)):
        with tt.Tape() as tape, by_numpy():
            tt.scan(f, np.ones((B, H)), np.ones((T, B, H)))
            assert tt.engine.tape.here.context.tape is tape and tt.engine.tape.here.context.traced is None
    assert w.storage is storage and w.grad is None
    np.testing.assert_array_equal(w.data, values)


def test_a_step_is_traced_once_for_all_runs():
    calls = []
    w = tt.tensor(np.ones((H, H)), requires_grad=True)

    def f(h, x):
        calls.append(1)
        return tt.tanh(h @ w + x), h

    with by_numpy():
        for _ in range(3):
            tt.scan(f, np.ones((B, H)), np.ones((T, B, H)), compiled=True)
    assert len(calls) <= 3  # a list among what it takes from outside: it is traced each time, but runs no more


def test_a_changed_number_from_outside_is_seen():
    w, scale = tt.tensor(np.eye(H), requires_grad=True), 2.0

    def f(h, x):
        return scale * (h @ w), h

    with by_numpy():
        once, _ = tt.scan(f, np.ones((1, H)), np.ones((2, 1, 1)), compiled=True)
        scale = 3.0
        w.detach().copy_(2 * np.eye(H))
        again, _ = tt.scan(f, np.ones((1, H)), np.ones((2, 1, 1)), compiled=True)
    np.testing.assert_allclose((once.data, again.data), (np.full((1, H), 4.0), np.full((1, H), 36.0)))


def test_changed_positions_and_arrays_from_outside_are_seen():
    positions, array = tt.tensor([0, 1, 2, 3, 4]), np.ones(H)

    def f(h, x):
        return h[:, positions] * np.sqrt(array), h

    with by_numpy():
        for order in ([4, 3, 2, 1, 0], [0, 0, 1, 1, 2]):
            positions.copy_(order)
            array += 3.0
            assert_like_eager(f, Leaves()(B, H), np.ones((2, B, 1)))


# ---- sizes ----------------------------------------------------------------------------------------------------------


def lstm(leaf, i, h):
    w, u, b = leaf(4 * h, i), leaf(4 * h, h), leaf(4 * h)

    def f(carry, x):
        i, f, g, o = tt.split(x @ w.T + carry[0] @ u.T + b, 4, axis=-1)
        c = tt.sigmoid(f) * carry[1] + tt.sigmoid(i) * tt.tanh(g)
        return (tt.sigmoid(o) * tt.tanh(c), c), c

    return f, lambda rows: (leaf(rows, h), leaf(rows, h))


def lstm_with_a_row_of_biases(leaf, i, h):
    w, u, b = leaf(i, 4 * h), leaf(h, 4 * h), leaf(1, 4 * h)

    def f(carry, x):
        i, f, g, o = tt.split(x @ w + carry[0] @ u + b, 4, axis=-1)
        c = tt.sigmoid(f) * carry[1] + tt.sigmoid(i) * tt.tanh(g)
        return (tt.sigmoid(o) * tt.tanh(c), c), c

    return f, lambda rows: (leaf(rows, h), leaf(rows, h))


def peephole(leaf, i, h):
    w, u, p = leaf(4 * h, i), leaf(4 * h, h), leaf(3, h)

    def f(carry, x):
        h, c = carry
        i, f, g, o = tt.split(x @ w.T + h @ u.T, 4, axis=-1)
        c = tt.sigmoid(f + p[0] * c) * c + tt.sigmoid(i + p[1] * c) * tt.tanh(g)
        h = tt.sigmoid(o + p[2] * c) * tt.tanh(c)
        return (h, c), h

    return f, lambda rows: (leaf(rows, h), leaf(rows, h))


def rnn(leaf, i, h):
    w, u, b = leaf(i, h), leaf(h, h), leaf(h)

    def f(carry, x):
        after = tt.tanh(x @ w + carry @ u + b)
        return after, after

    return f, lambda rows: leaf(rows, h)


def gru(leaf, i, h):
    w, rz, n = leaf(i, 3 * h), leaf(h, 2 * h), leaf(h, h)

    def f(carry, x):
        to_rz, to_n = tt.split(x @ w, [2 * h], axis=-1)
        r, z = tt.split(tt.sigmoid(to_rz + carry @ rz), 2, axis=-1)
        new = tt.tanh(to_n + (r * carry) @ n)
        return new + z * (carry - new), new

    return f, lambda rows: leaf(rows, h)


def layer_norm_lstm(leaf, i, h):
    w, u, gain, shift = leaf(4 * h, i), leaf(4 * h, h), leaf(4 * h), leaf(4 * h)

    def f(carry, x):
        z = nn.functional.layer_norm(x @ w.T + carry[0] @ u.T, (4 * h,), gain, shift)
        i, f, g, o = tt.split(z, 4, axis=-1)
        c = tt.sigmoid(f) * carry[1] + tt.sigmoid(i) * tt.tanh(g)
        return (tt.sigmoid(o) * tt.tanh(c), c), c

    return f, lambda rows: (leaf(rows, h), leaf(rows, h))


def attention(leaf, i, h):
    q, w = leaf(h, h), leaf(i, h)

    def f(carry, x):
        memory = carry["m"]
        a = tt.softmax((memory * (carry["h"] @ q).expand_dims(1)).sum(axis=-1), axis=-1)
        read = tt.matmul(a.expand_dims(1), memory)[:, 0] + (a.expand_dims(-1) * memory).sum(axis=1)
        new = tt.tanh(x @ w + read)
        return {"h": new, "m": tt.concatenate([memory[:, 1:] @ q, new.expand_dims(1)], axis=1)}, (new, a)

    return f, lambda rows: {"h": leaf(rows, h), "m": leaf(rows, 3, h)}


CELLS = [lstm, lstm_with_a_row_of_biases, peephole, rnn, gru, layer_norm_lstm, attention]
SIZES = [(3, 5), (5, 5), (1, 5), (10, 16), (16, 16), (2, 2), (4, 3)]


def explained(f, init, xs):
    found = tt.scan.explain(f, init, xs)
    assert found.reason is None, found.reason
    return found


@pytest.mark.parametrize("cell", CELLS)
def test_kernels_are_the_same_for_all_sizes(cell):
    attempt._plans.clear()
    leaf, sources = Leaves(), {}
    for i, h in SIZES:
        f, init = cell(leaf, i, h)
        for rows in (1, 2, h, 16):
            found = explained(f, init(rows), leaf(2, rows, i))
            assert found.plan.program.batched
            sources.setdefault(found.numba, (i, h, rows))
    assert len(sources) == 1, list(sources.values())


@pytest.mark.parametrize("cell", [lstm, gru, rnn, peephole])
def test_width_1_is_a_width(cell):
    leaf = Leaves()
    sources = set()
    for i, h, rows in [(1, 1, 1), (1, 1, 3), (3, 5, 2)]:
        f, init = cell(leaf, i, h)
        sources.add(explained(f, init(rows), leaf(2, rows, i)).numba)
    assert len(sources) == 1


@needs_numba
def test_a_new_size_compiles_nothing():
    leaf = Leaves()

    def run(i, h, rows, steps):
        f, init = rnn(leaf, i, h)
        outcome(f, init(rows), leaf(steps, rows, i), (), compiled=True)

    run(3, 5, 4, 6)
    before = compilations()
    for sizes in [(3, 5, 4, 1), (3, 5, 1, 6), (3, 5, 33, 2), (1, 1, 1, 1), (7, 2, 2, 3), (40, 24, 3, 50)]:
        run(*sizes)
    assert compilations() == before


# ---- without a compiler ---------------------------------------------------------------------------------------------


def test_numpy_source_runs_where_numba_is_disabled():
    code = """
import numpy as np, tinytape as tt
w = tt.tensor(np.eye(3), requires_grad=True)
carry, hs = tt.scan(lambda h, x: (tt.tanh(h @ w + x), h), np.ones((2, 3)), np.ones((4, 2, 3)), compiled=True)
carry.sum().backward()
from tinytape.compile import attempt
[plan] = attempt._plans.values()
print(type(plan.kernels).__name__, bool(np.isfinite(w.grad.data).all()))
"""
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    root = Path(__file__).resolve().parent.parent
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=root, env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.split() == ["Plain", "True"]


def test_numpy_source_can_be_read():
    leaf = Leaves()
    f, init = rnn(leaf, 2, 3)
    with by_numpy():
        source = explained(f, init(4), leaf(2, 4, 2)).numpy
    assert "def forward(init, xs, fixed, weights):" in source and "np.tanh(" in source
    assert "def backward(tape, dcarry, dys, xs, fixed, weights):" in source
    assert map_leaves(len, source.splitlines())[0] < 80
