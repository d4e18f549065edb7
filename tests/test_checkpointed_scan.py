"""Scans that keep less than everything: the same numbers, in as many steps and bytes as the plan says."""

import gc
import tracemalloc
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import nn
from tinytape.engine.recording import kept_buffers
from tinytape.engine.tape import Node
from tinytape.loop.budget import Plan


def leaf(rng, *shape, dtype=np.float64):
    return tt.tensor(rng.normal(size=shape).astype(dtype) / 2, requires_grad=True)


class Setting:
    """A cell of 3 rows and 5 units with all that its loss depends on; `steps` counts how often a step was run."""

    def __init__(self, cell, steps=9, dtype=np.float64):
        rng = np.random.default_rng(0)
        self.xs, self.dtype, self.calls = leaf(rng, steps, 3, 4, dtype=dtype), dtype, 0
        self.h, self.c = leaf(rng, 3, 5, dtype=dtype), leaf(rng, 3, 5, dtype=dtype)
        self.w, self.u, self.b = (leaf(rng, *s, dtype=dtype) for s in ((20, 4), (20, 5), (20,)))
        self.leaves = [self.xs, self.h, self.c, self.w, self.u, self.b]
        self.cell = getattr(self, cell)

    def f(self, state, x):
        self.calls += 1
        return self.cell(state, x)

    def rnn(self, state, x):
        h = tt.tanh(x @ self.w[:5].T + state[0] @ self.u[:5].T + self.b[:5])
        return (h, state[1]), h

    def lstm(self, state, x):
        h, c = state
        i, f, g, o = tt.split(x @ self.w.T + h @ self.u.T + self.b, 4, axis=-1)
        c = tt.sigmoid(f) * c + tt.sigmoid(i) * tt.tanh(g)
        h = tt.sigmoid(o) * tt.tanh(c)
        return (h, c), h

    def gru(self, state, x):
        h = state[0]
        xr, xz, xn = tt.split(x @ self.w[:15].T, 3, axis=-1)
        hr, hz, hn = tt.split(h @ self.u[:15].T, 3, axis=-1)
        z = tt.sigmoid(xz + hz)
        h = (1 - z) * tt.tanh(xn + tt.sigmoid(xr + hr) * hn) + z * h
        return (h, state[1]), (h, {"again": h, "half": h / 2})

    def twins(self, state, x):
        """The same tensor as both states and all outputs, a state that is a view, and an input handed through."""
        h = tt.sin(state[0] + state[1] * state[0] + x @ self.w[:5].T)
        return (h, h), (h, x, h)

    def borrowed(self, state, x):
        """A tensor from outside as an output."""
        state, _ = self.twins(state, x * self.b[:4])
        return state, self.b

    def delay(self, state, x):
        """A state cut out of something larger, the last input as a state, and one through which nothing flows."""
        both = tt.concatenate([x @ self.w[:5].T * state[1], state[0] * state[1]], axis=-1)
        return (both[:, ::2], tt.sin(x @ self.w[5:10].T)), state[1].detach()

    def cut(self, state, x):
        """The same values in both states, through one of which no gradient passes."""
        h = tt.tanh(x @ self.w[:5].T + state[0] * state[1])
        return (h, h.detach()), None

    def scan(self, **options):
        self.calls = 0
        return tt.scan(self.f, (self.h, self.c), self.xs, compiled=False, **options)

    def outcome(self, **options):
        """Values and gradients, as bytes; and the calls of the step, forward and in all."""
        with tt.Tape() as tape:
            (h, c), ys = self.scan(**options)
            rng, loss = np.random.default_rng(1), (h * h).sum() + (c * h).sum()
            for y in tt.engine.tree.flatten(ys):
                loss = loss + (y * rng.normal(size=y.shape).astype(self.dtype)).sum()
            forward = self.calls
            gradients = tape.gradient(loss, self.leaves)
        found = [h, c, *tt.engine.tree.flatten(ys), loss, *gradients]
        return [None if x is None else (x.shape, x.dtype, (x.data + 0).tobytes()) for x in found], forward, self.calls


CELLS = ["rnn", "lstm", "gru", "twins", "delay", "cut"]


def plans(steps):
    return st.builds(lambda leaf, slots: Plan("revolve", steps, leaf, slots), st.integers(1, steps), st.integers(1, 6))


# ---- the same numbers -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cell", CELLS)
@given(data=st.data(), steps=st.integers(1, 12), reverse=st.booleans(), dtype=st.sampled_from([np.float32, np.float64]))
def test_it_is_the_plain_loop_to_the_last_bit(cell, data, steps, reverse, dtype):
    s = Setting(cell, steps, dtype)
    plan = data.draw(st.integers(1, steps + 1) | plans(steps))
    expected, *_ = s.outcome(reverse=reverse)
    found, forward, calls = s.outcome(reverse=reverse, checkpoint=plan)
    assert found == expected and forward == steps
    assert isinstance(plan, int) or calls == plan.forward_steps


@pytest.mark.parametrize("checkpoint", ["sqrt", "auto", "full", "20 kB", "3 kB", "2 KiB", np.int64(4)], ids=str)
@pytest.mark.parametrize("cell", ["lstm", "gru"])
def test_every_kind_of_plan(cell, checkpoint):
    s = Setting(cell, 25)
    if checkpoint in ("3 kB", "2 KiB"):
        assert s.outcome(checkpoint=checkpoint)[2] > 40
    assert s.outcome(checkpoint=checkpoint)[0] == s.outcome()[0]


@pytest.mark.parametrize("size", [1, 2, 4])
def test_a_tensor_from_outside_as_an_output(size):
    """One walk over all steps adds up in another order: it is the same to rounding."""
    s = Setting("borrowed")
    (expected, *_), (found, *_) = s.outcome(), s.outcome(checkpoint=size)
    del expected[-2], found[-2]  # u takes no part
    for a, b in zip(expected, found, strict=True):
        np.testing.assert_allclose(np.frombuffer(a[2]), np.frombuffer(b[2]), rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("outside", ["before", "after"])
def test_weights_that_are_used_outside_of_the_loop_too(outside):
    s = Setting("lstm")

    def gradients(**options):
        with tt.Tape() as tape:
            init = (s.h, s.c + tt.sum(s.w)) if outside == "before" else (s.h, s.c)
            (h, _), ys = tt.scan(s.f, init, s.xs, compiled=False, **options)
            loss = (h * h).sum() + (ys * ys).sum()
            loss = loss + (s.w * s.w).sum() * loss if outside == "after" else loss
            return tape.gradient(loss, s.leaves)

    for a, b in zip(gradients(), gradients(checkpoint=2), strict=True):
        np.testing.assert_allclose(a.data, b.data, rtol=1e-12, atol=1e-13)


def test_what_a_step_takes_from_outside_may_change_from_step_to_step():
    rng = np.random.default_rng(0)
    xs, init, weights = leaf(rng, 7, 3), leaf(rng, 3), [leaf(rng, 3) for _ in range(7)]
    t = tt.tensor(np.arange(7))

    def f(h, given):
        x, t = given
        return tt.sin(h * weights[int(t.item())] + x), None

    found = []
    for checkpoint in (None, 1, 3, Plan("revolve", 7, 1, 2)):
        with tt.Tape() as tape:
            h, _ = tt.scan(f, init, (xs, t), checkpoint=checkpoint, compiled=False)
            found.append([g.data.tobytes() for g in tape.gradient(h.sum(), [xs, init, *weights])])
    assert found[0] == found[1] == found[2] == found[3]


@given(plan=plans(12), first=st.integers(0, 12), last=st.integers(0, 12))
def test_a_state_may_be_a_constant_at_times(plan, first, last):
    """From none, up to step `first`, after which gradients flow, and again from step `last` on."""
    w = tt.tensor(np.array([0.5, 0.75]), requires_grad=True)

    def f(h, t):
        if t.item() == last:
            h = h.detach()
        h = tt.sin(h * w + t) if t.item() >= first else h + 1
        return h, (h if t.item() % 2 else h * w)

    found = []
    for checkpoint in (None, plan):
        h, ys = tt.scan(f, np.ones(2), np.arange(12.0), checkpoint=checkpoint, compiled=False)
        (h.sum() + (ys * ys).sum()).backward()
        found.append(w.grad.data.tobytes())
        w.grad = None
    assert found[0] == found[1]


def test_an_output_that_nothing_depends_on_leaves_no_nan():
    """Zeros for its gradient would meet an infinite derivative."""
    x = tt.tensor(np.zeros((6, 2)), requires_grad=True)

    def f(c, x):
        return c + x, tt.sqrt(x)

    for checkpoint in (None, 2):
        c, _ = tt.scan(f, np.zeros(2), x, checkpoint=checkpoint, compiled=False)
        c.sum().backward()
        assert (x.grad.data == 1).all()
        x.grad = None


def test_what_does_not_depend_on_anything_is_not_on_the_tape():
    w = tt.tensor(2.0, requires_grad=True)

    def f(carry, x):
        return {"n": carry["n"] + 1, "h": carry["h"] * w, "k": carry["k"] * 2}, (carry["k"], x * w)

    init = {"n": 0, "h": 1.0, "k": 1.0}
    carry, (k, y) = tt.scan(f, init, np.ones(5, np.float32), checkpoint=2)
    assert [carry[name].requires_grad for name in "nhk"] == [False, True, False]
    assert (k.requires_grad, y.requires_grad) == (False, True) and carry["n"].item() == 5 and k.tolist()[-1] == 16
    with tt.Tape() as tape:
        carry, ys = tt.scan(lambda c, x: (c * x, c), 1.0, np.ones(5, np.float32), checkpoint=2)
    assert not carry.requires_grad and not ys.requires_grad and len(tape) == 0


def test_an_output_of_some_steps_alone():
    x, w = np.arange(5.0), tt.tensor(np.array(3.0), requires_grad=True)

    def f(c, t):
        return c, t * w if t.item() in (1, 2) else t

    _, ys = tt.scan(f, 0.0, x, checkpoint=1, compiled=False)
    ys.sum().backward()
    assert ys.tolist() == [0, 3, 6, 3, 4] and w.grad.item() == 3


def test_inputs_that_a_loss_does_not_reach_have_no_gradient():
    s = Setting("cut")
    with tt.Tape() as tape:
        (h, _), _ = s.scan(checkpoint=2)
        assert [g is None for g in tape.gradient(h.sum(), s.leaves)] == [False, False, False, False, True, True]


def test_draws_are_repeated_and_go_on_where_they_stood():
    s, generator, late = Setting("lstm", 12), tt.Generator(0), tt.Generator(5)

    def f(state, given):
        x, t = given
        (h, c), y = s.lstm(state, nn.functional.dropout(x, 0.5, generator=generator))
        return (h * tt.tensor(late.uniform((), dtype=np.float64)) if t.item() > 5 else h, c), y

    found = []
    for checkpoint in (None, 1, 5, Plan("revolve", 12, 2, 2), "3 kB"):
        generator.manual_seed(1)
        late.manual_seed(2)
        with tt.Tape() as tape:
            (h, _), ys = tt.scan(f, (s.h, s.c), (s.xs, np.arange(12)), checkpoint=checkpoint, compiled=False)
            drawn = [generator.uniform(), late.uniform()]
            gradients = tape.gradient(h.sum() + (ys * ys).sum(), s.leaves)
        values = [x.data.tobytes() for x in (h, ys, *gradients)]
        found.append([*values, *drawn, generator.uniform(), late.uniform()])
    assert all(x == found[0] for x in found[1:])


# ---- steps and bytes ------------------------------------------------------------------------------------------------


@given(steps=st.integers(1, 40), slots=st.integers(1, 8))
def test_forward_steps_of_a_real_cell(steps, slots):
    s = Setting("lstm", steps)
    plan = Plan("revolve", steps, 1, slots)
    assert s.outcome(checkpoint=plan)[1:] == (steps, plan.forward_steps)


def test_a_budget_costs_two_steps_more_to_see_what_a_step_keeps():
    s = Setting("lstm", 30)
    plan = tt.loop.plan(30, *bytes_of(s), "3 kB")
    assert plan.kind == "revolve" and s.outcome(checkpoint="3 kB")[1:] == (32, plan.forward_steps + 2)


def bytes_of(s):
    with tt.no_compile():
        plan = tt.scan.plan(s.f, (s.h, s.c), s.xs)
    return plan.bytes_per_step, plan.carry_bytes


def test_a_plan_made_for_a_step():
    s = Setting("lstm", 30)
    with tt.no_compile():
        plan = tt.scan.plan(s.f, (s.h, s.c), s.xs, budget="3 kB")
    assert s.calls == 2 and plan.steps == 30 and plan == tt.loop.plan(30, 840, 240, 3000)
    assert s.outcome(checkpoint=plan)[1:] == (30, plan.forward_steps)
    assert tt.scan.plan(lambda h, x: (h + 1, None), s.h, None, 5).steps == 5


@pytest.mark.parametrize("cell", ["rnn", "lstm", "gru"])
def test_bytes_of_a_step_are_what_a_longer_tape_keeps_more(cell):
    kept = []
    for steps in (4, 5):
        s = Setting(cell, steps)
        with tt.Tape() as tape:
            results = s.scan()
        buffers = {}
        for record in tape.records:
            buffers.update(kept_buffers(record.node))
        kept.append(sum(buffers.values()))
        del results
    assert bytes_of(s) == (kept[1] - kept[0], 2 * s.h.nbytes)


def test_an_lstm_keeps_seven_values_a_unit():
    s = Setting("lstm")
    assert bytes_of(s) == (7 * s.h.nbytes, 2 * s.h.nbytes)


@pytest.mark.parametrize("cell", ["a state of its own", "a state cut out"])
@pytest.mark.parametrize("budget", ["full", "6 MB", "sqrt", "1 MB"])
def test_memory_is_what_the_plan_says(cell, budget):
    """Counted by Python's own account, less what the same takes with numbers in place of matrices: that is objects."""

    def peak(rows, units, plan):
        w, h = tt.tensor(np.eye(units) / 2, requires_grad=True), tt.tensor(np.ones((rows, units)), requires_grad=True)

        def whole(h, x):
            return tt.tanh(h @ w), None

        def cut(h, x):
            return tt.tanh(tt.concatenate([h @ w] * 4, axis=-1))[:, :units], None

        f = whole if cell == "a state of its own" else cut
        tracemalloc.start()
        tt.scan(f, h, None, plan.steps, checkpoint=plan, compiled=False)[0].sum().backward()
        taken = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return taken

    carry = 64 * 64 * 8
    step = carry if cell == "a state of its own" else 4 * carry
    plan = tt.loop.plan(200, step, carry, budget)
    peak(1, 1, plan)  # what is made once
    arrays = peak(64, 64, plan) - peak(1, 1, plan)
    assert plan.peak_bytes - step <= arrays <= plan.peak_bytes + 5 * step + 3 * 64 * 64 * 8


# ---- walks ----------------------------------------------------------------------------------------------------------


def test_records_may_be_walked_twice():
    s = Setting("lstm")
    (h, c), ys = s.scan(checkpoint=2)
    loss = (h * c * ys[3]).sum()
    found = []
    for retain in (True, True, False):
        loss.backward(retain_graph=retain)
        found.append([x.grad.data.tobytes() for x in s.leaves])
        for x in s.leaves:
            x.grad = None
    assert found[0] == found[1] == found[2] and s.calls == 9 + 8 + 2 * (9 + 8)
    with pytest.raises(tt.TapeError, match="freed by an earlier backward"):
        loss.backward()


@pytest.mark.parametrize("checkpoint", [2, "sqrt", Plan("revolve", 5, 1, 2)], ids=["2", "sqrt", "plan"])
def test_derivatives_of_every_kind(checkpoint):
    s = Setting("gru", 5)

    def f(xs, h, c, w, u):
        def step(state, x):
            h = tt.tanh(x @ w + state[0] @ u)
            return (h, state[1]), (h * state[1], None)

        return tt.scan(step, (h, c), xs, checkpoint=checkpoint, compiled=False)

    rng = np.random.default_rng(0)
    tt.check_grads(
        f, [s.xs.numpy(), s.h.numpy(), s.c.numpy(), rng.normal(size=(4, 5)), rng.normal(size=(5, 5))], order=2
    )


def test_higher_derivatives_repeat_draws():
    generator, x = tt.Generator(0), tt.tensor(np.array([0.5, 0.25]), requires_grad=True)

    def f(h, _):
        return tt.sin(h * generator.uniform((2,), dtype=np.float64)), None

    found = []
    for checkpoint in (None, 2):
        generator.manual_seed(3)
        h, _ = tt.scan(f, x, None, 6, checkpoint=checkpoint, compiled=False)
        h.sum().backward(create_graph=True)
        gradient, x.grad = x.grad, None
        gradient.sum().backward()
        found.append((x.grad.data.tobytes(), generator.uniform()))
        x.grad = None
    assert found[0] == found[1]


def test_what_was_written_since_is_noticed():
    for name in ("w", "xs", "h"):
        s = Setting("lstm")
        (h, _), _ = s.scan(checkpoint=2)
        with tt.no_grad():
            getattr(s, name).copy_(0)
        with pytest.raises(tt.TapeError, match="written in place"):
            h.sum().backward()
    early = tt.tensor(np.array(2.0), requires_grad=True)  # nothing in the last leaf depends on it
    h, _ = tt.scan(lambda h, t: (h * early if t.item() < 2 else h * 3, None), np.array(1.0), np.arange(6), checkpoint=2)
    with tt.no_grad():
        early.copy_(5)
    with pytest.raises(tt.TapeError, match=r"scan.*written in place"):
        h.backward()
    assert early.grad is None


def test_hooks_outside_run_once():
    s, seen = Setting("lstm"), []
    s.w = s.w * 1
    s.w.register_hook(lambda g: seen.append(g.shape))
    (h, _), _ = s.scan(checkpoint=2)
    h.sum().backward()
    assert seen == [(20, 4)]


def test_loops_in_loops():
    rng = np.random.default_rng(0)
    x, h, w = leaf(rng, 4, 3, 2), leaf(rng, 2), leaf(rng, 2)

    def gradients(outer, inner):
        def f(h, row):
            return tt.scan(lambda h, x: (tt.sin(h * w + x), h), h, row, checkpoint=inner, compiled=False)

        with tt.Tape() as tape:
            last, ys = tt.scan(f, h, x, checkpoint=outer, compiled=False)
            return [g.data.tobytes() for g in tape.gradient(last.sum() + (ys * ys).sum(), [x, h, w])]

    assert gradients(2, None) == gradients(None, None)
    assert gradients(2, 1) == gradients(None, 1) == gradients(1, "sqrt")


def test_nothing_is_left_after_the_walk():
    s = Setting("lstm", 30)
    gc.collect()
    gc.disable()
    try:
        before = sum(issubclass(type(thing), Node) for thing in gc.get_objects())
        result = s.scan(checkpoint=Plan("revolve", 30, 4, 3))
        node = weakref.ref(result[1].node)
        result[1].sum().backward()
        live = sum(issubclass(type(thing), Node) for thing in gc.get_objects())
        assert live - before < 10  # each step records more than ten
        del result
        assert node() is None
    finally:
        gc.enable()


def test_an_error_leaves_nothing_changed():
    s, generator = Setting("lstm"), tt.Generator(0)

    def f(state, x):
        s.calls += 1
        if s.calls == 12:
            raise ZeroDivisionError
        return s.lstm(state, x * generator.uniform((), dtype=np.float64))

    (h, _), _ = tt.scan(f, (s.h, s.c), s.xs, checkpoint=2, compiled=False)
    before = generator.state().tolist()
    with pytest.raises(ZeroDivisionError):
        h.sum().backward()
    assert generator.state().tolist() == before  # conftest looks after the rest


# ---- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("checkpoint", "words"),
    [
        ("64 mb", "scan: checkpoint is '64 mb'.*'512 KiB'"),
        (1.5, "scan: checkpoint is 1.5.*a number of steps"),
        (-1, "checkpoint is -1"),
        (False, "checkpoint is False"),
        (Plan("revolve", 8, 1, 2), "a plan for 8 steps, there are 9"),
        ("1 kB", r"a budget of 1,000 bytes for 9 steps; the least possible is 1,080 bytes"),
    ],
)
def test_bad_checkpoints(checkpoint, words):
    with pytest.raises(tt.InputError, match=f"(?s){words}"):
        Setting("lstm").scan(checkpoint=checkpoint)
