"""A checkpointed scan by kernels: the bits of the unchecked one, and the bytes that the plan says."""

import gc

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

import tinytape as tt
from scanning import needs_numba
from tinytape import nn
from tinytape.compile.checkpointed import Checkpointed
from tinytape.kernels import workspace

pytestmark = needs_numba
H, I = 5, 3


def weights(dtype, *shapes):
    rng = np.random.default_rng(1)
    return [tt.tensor((0.4 * rng.standard_normal(s)).astype(dtype), requires_grad=True) for s in shapes]


def rnn(dtype):
    w, u, b = weights(dtype, (I, H), (H, H), (H,))

    def step(h, x):
        h = tt.tanh(x @ w + h @ u + b)
        return h, h

    return step, (H,), [w, u, b]


def gated_without_outputs(dtype):
    """Two leaves, products of values of a step, and the loss carried along."""
    w, u, v = weights(dtype, (I, 2 * H), (H, 2 * H), (H, H))

    def step(carry, x):
        h, total = carry
        z, r = tt.split(tt.sigmoid(x @ w + h @ u), 2, axis=-1)
        h = (1 - z) * h + z * tt.tanh((r * h) @ v)
        return (h, total + (h * h).sum(axis=-1, keepdims=True)), None

    return step, ((H,), (1,)), [w, u, v]


def peephole(dtype):
    w, u, p = weights(dtype, (I, 4 * H), (H, 4 * H), (H,))

    def step(carry, x):
        h, c = carry
        i, f, g, o = tt.split(x @ w + h @ u, 4, axis=-1)
        c = tt.sigmoid(f + c * p) * c + tt.sigmoid(i) * tt.tanh(g)
        h = tt.sigmoid(o + c * p) * tt.tanh(c)
        return (h, c), h

    return step, ((H,), (H,)), [w, u, p]


CELLS = [rnn, gated_without_outputs, peephole]


def gradients(cell, dtype, T, B, reverse=False, **options):
    step, shapes, leaves = cell(dtype)
    rng = np.random.default_rng(T * 100 + B)
    shapes = shapes if isinstance(shapes[0], tuple) else (shapes,)
    init = [tt.tensor(rng.standard_normal((B, *s)).astype(dtype), requires_grad=True) for s in shapes]
    xs = tt.tensor(rng.standard_normal((T, B, I)).astype(dtype), requires_grad=True)
    first = init[0] if len(init) == 1 else tuple(init)
    carry, ys = tt.scan(step, first, xs, reverse=reverse, compiled=True, **options)
    parts = [*(carry if isinstance(carry, tuple) else [carry]), *([] if ys is None else [ys])]
    loss = sum((p * tt.tensor(rng.standard_normal(p.shape).astype(dtype))).sum() for p in parts)
    loss.backward()
    return [p.numpy() for p in parts] + [x.grad.numpy() for x in (*init, xs, *leaves)]


@given(
    cell=st.sampled_from(CELLS), T=st.integers(1, 130), B=st.sampled_from([1, 3, 16, 40]), reverse=st.booleans(),
    checkpoint=st.one_of(st.integers(1, 60), st.sampled_from(["sqrt", "full"])),
)  # fmt: skip
def test_bits_are_those_of_the_unchecked_run(cell, T, B, reverse, checkpoint):
    wanted = gradients(cell, np.float32, T, B, reverse)
    for a, b in zip(gradients(cell, np.float32, T, B, reverse, checkpoint=checkpoint), wanted, strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_bits_with_threads_and_a_budget(threads, dtype, monkeypatch):
    from tinytape.compile import form

    monkeypatch.setattr(form, "WORTH", 0)
    was = tt.get_num_threads()
    tt.set_num_threads(threads)
    try:
        wanted = gradients(peephole, dtype, 400, 3)
        for budget in ("120 kB", "200 kB", "sqrt"):
            for a, b in zip(gradients(peephole, dtype, 400, 3, checkpoint=budget), wanted, strict=True):
                np.testing.assert_array_equal(a, b)
    finally:
        tt.set_num_threads(was)


def planned(monkeypatch):
    """The plans that runs are made with."""
    made, init = [], Checkpointed.__init__

    def noted(self, kernels, plan):
        made.append(plan)
        init(self, kernels, plan)

    monkeypatch.setattr(Checkpointed, "__init__", noted)
    return made


@given(
    cell=st.sampled_from(CELLS[1:]), T=st.integers(300, 2000), B=st.sampled_from([1, 3, 16]), share=st.floats(0.05, 0.8)
)
def test_peak_of_the_pool_is_the_plans(cell, T, B, share):
    with pytest.MonkeyPatch.context() as patch:
        made = planned(patch)
        step, shapes, _ = cell(np.float32)
        least = tt.scan.plan(step, *inputs(shapes, T, B), budget="sqrt").peak_bytes
        full = tt.scan.plan(step, *inputs(shapes, T, B), budget="full").peak_bytes
        budget = int(least + share * (full - least))
        gc.collect()
        workspace.reset_peak()
        before = workspace.usage().in_use
        gradients(cell, np.float32, T, B, checkpoint=budget)
        peak = workspace.usage().peak - before
        if made:
            assert peak == made[0].peak_bytes <= budget


def inputs(shapes, T, B):
    shapes = shapes if isinstance(shapes[0], tuple) else (shapes,)
    init = tuple(np.zeros((B, *s), np.float32) for s in shapes)
    return init if len(init) > 1 else init[0], np.zeros((T, B, I), np.float32)


def test_steps_run_are_those_of_the_plan(monkeypatch):
    made = planned(monkeypatch)
    from tinytape.compile.run import Compiled

    ran, go = [], Compiled.go
    monkeypatch.setattr(Compiled, "go", lambda self, run: (ran.append(run.steps), go(self, run))[1])
    gradients(gated_without_outputs, np.float32, 3000, 1, checkpoint="60 kB")
    assert sum(ran) == made[0].forward_steps > 3000 + 2000


def test_walked_twice():
    step, _, leaves = peephole(np.float64)
    _, ys = tt.scan(step, tuple(np.zeros((2, H)) for _ in range(2)), np.ones((200, 2, I)), checkpoint=64)
    ys.sum().backward(retain_graph=True)
    once = [x.grad.numpy() for x in leaves]
    ys.sum().backward()
    for a, x in zip(once, leaves, strict=True):
        np.testing.assert_array_equal(2 * a, x.grad.data)


def test_gradients_of_gradients_come_from_the_definition():
    step, _, leaves = rnn(np.float64)
    xs = np.random.default_rng(0).standard_normal((70, 2, I))

    def second(**options):
        ys = tt.scan(step, np.zeros((2, H)), xs, **options)[1]
        ys.sum().backward(create_graph=True)
        total = sum((x.grad * x.grad).sum() for x in leaves)
        for x in leaves:
            x.grad = None
        total.backward()
        found = [x.grad.numpy() for x in leaves]
        for x in leaves:
            x.grad = None
        return found

    for a, b in zip(second(checkpoint=32), second(compiled=False), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-12)


def test_a_budget_below_the_least_is_refused():
    step, shapes, _ = gated_without_outputs(np.float32)
    with pytest.raises(tt.InputError, match="least possible"):
        tt.scan(step, *inputs(shapes, 10_000, 1), checkpoint="1 kB")


def test_nothing_is_kept_where_nothing_is_tracked():
    lstm = nn.LSTM(I, H)
    with tt.no_grad():
        y, _ = lstm(np.zeros((9, 1, I), np.float32))
        assert y.node is None


@pytest.mark.parametrize("options", [{}, {"num_layers": 2, "bidirectional": True}])
def test_layers_take_a_checkpoint(options):
    rng = np.random.default_rng(0)
    x = rng.standard_normal((130, 2, I)).astype(np.float32)
    lengths = np.array([130, 77])

    def found(**more):
        lstm = nn.LSTM(I, H, generator=tt.Generator(1), **options, **more)
        y, _ = lstm(x, lengths=lengths)
        (y * y).sum().backward()
        return [y.numpy(), *(p.grad.numpy() for p in lstm.parameters())]

    wanted = found()
    for checkpoint in (10, "sqrt"):
        for a, b in zip(found(checkpoint=checkpoint), wanted, strict=True):
            np.testing.assert_array_equal(a, b)
    with tt.no_compile():
        for a, b in zip(found(checkpoint=10), wanted, strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)
    with pytest.raises(tt.InputError, match="LSTM: checkpoint is 0"):
        nn.LSTM(I, H, checkpoint=0)


def test_a_tape_prices_what_kernels_keep():
    step, shapes, _ = gated_without_outputs(np.float32)
    priced = {}
    for checkpoint in (None, "sqrt"):
        with tt.Tape() as tape:
            tt.scan(step, *inputs(shapes, 2000, 1), checkpoint=checkpoint, compiled=True)
        priced[checkpoint] = tape.nbytes
        assert "scan(step)" in str(tape)
    assert priced[None] >= 2000 * tt.scan.plan(step, *inputs(shapes, 2000, 1)).bytes_per_step
    assert priced["sqrt"] < priced[None] / 2
