"""Sizes do not enter the kernels: steps, rows and widths compile nothing anew. And what runs without a compiler."""

import os
import re
import subprocess
import sys
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import tinytape as tt
from scanning import Leaves, by_numpy, needs_numba, outcome
from tinytape import nn
from tinytape.compile import attempt
from tinytape.compile.cache import compilations
from tinytape.kernels import workspace

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


@pytest.mark.parametrize("kind", [nn.LayerNormLSTMCell, nn.MemoryAttentionCell])
def test_kernels_of_a_cell_with_short_axes_are_the_same_for_all_sizes(kind):
    leaf, sources = Leaves(), {}
    for h, slots, width in [(2, 2, 2), (5, 2, 8), (12, 3, 2), (13, 5, 40), (64, 64, 3), (300, 2, 100)]:
        attends = kind is nn.MemoryAttentionCell
        cell = kind(4, h, *((slots, width) if attends else ()), dtype="float64")
        state = leaf(3, h), leaf(3, slots, width) if attends else leaf(3, h)
        found = explained(lambda state, x, cell=cell: (cell(x, state), None), state, leaf(2, 3, 4))
        sources.setdefault(found.numba, (h, slots, width))
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


# ---- memory ---------------------------------------------------------------------------------------------------------


@contextmanager
def guarded():
    """Let kernels work in memory with a guard behind it, which must be as it was afterwards."""
    size, mark, lent = 1 << 16, 0xA5, []

    def with_guard(take):
        def taken(nbytes, *args, **options):
            block = take(nbytes + size, *args, **options)
            guard = block.view(np.uint8, (size,), nbytes)
            guard[:] = mark
            lent.append((block, guard))
            return block

        return taken

    attempt._plans.clear()
    with ExitStack() as stack:
        for name in ("take", "take_any"):
            stack.enter_context(mock.patch.object(workspace, name, with_guard(getattr(workspace, name))))
        stack.enter_context(mock.patch.object(workspace.Block, "release", lambda block: None))
        yield lent
    attempt._plans.clear()
    assert all((guard == mark).all() for _, guard in lent)


@needs_numba
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("cell", CELLS)
@given(steps=st.integers(1, 120), rows=st.integers(1, 40), i=st.integers(1, 40), h=st.integers(1, 150))
@example(steps=40, rows=3, i=32, h=64)
@example(steps=94, rows=1, i=17, h=104)
def test_kernels_keep_to_their_memory(cell, dtype, steps, rows, i, h):
    rng = np.random.default_rng(0)

    def leaf(*shape):
        return tt.tensor(rng.normal(size=shape).astype(dtype), requires_grad=True)

    f, init = cell(leaf, i, h)
    with guarded() as lent:
        outcome(f, init(rows), leaf(steps, rows, i), (), compiled=True)
        assert lent


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
    assert max(map(len, source.splitlines())) < 120


def test_numpy_source_runs_by_itself():
    """As a file would, given what its head names."""
    rng, leaf = np.random.default_rng(0), Leaves()
    w, u = leaf(3, 5), leaf(5, 5)

    def f(h, x):
        h = tt.silu(x @ w) * tt.sigmoid(h @ u) + tt.where(h > 0.0, h, tt.erf(h))
        return h, h

    init, xs, dys = rng.normal(size=(2, 5)), rng.normal(size=(4, 2, 3)), rng.normal(size=(4, 2, 5))
    source = tt.scan.explain(f, init, xs).numpy
    module = {}
    exec(source, module)
    named = {}
    for name, size, text in re.findall(r"^    (w\d+) +\[(.*?)\] (.*)", source.split("import numpy")[0], re.MULTILINE):
        named[name] = {"3, 5": w, "5, 5": u}[size].numpy() if text == "from outside" else named[text[10:12]].T
    weights = tuple(named.values())
    steps = [(x,) for x in xs]
    last, ys, tape = module["forward"]((init,), steps, (), weights)
    h, hs = tt.scan(f, init, xs, compiled=False)
    np.testing.assert_allclose(last[0], h.numpy(), rtol=1e-12)
    np.testing.assert_allclose([y for (y,) in ys], hs.numpy(), rtol=1e-12)
    (hs * dys).sum().backward()
    *_, sums = module["backward"](tape, (np.zeros((2, 5)),), [(dy,) for dy in dys], steps, (), weights)
    for found, wanted in zip(sorted(sums, key=np.size), (w.grad, u.grad), strict=True):
        np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-10)
