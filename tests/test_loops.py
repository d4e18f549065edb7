"""The loops of a compiled step: what they read has been written, and what they write is read. Nothing is compiled."""

import pytest
from hypothesis import HealthCheck, given, settings

import tinytape as tt
from random_cells import FEATURES, cells
from scanning import Leaves, assert_like_eager, needs_numba
from tinytape import nn
from tinytape.compile import attempt

LASTING = ("history", "ys", "carry")
GRADIENTS = ("dcarry", "dx", "dfixed")
FLEETING = ("row", "step", "block")


def base(value):
    while value.kind == "alias":
        value = value.args[0]
    return value


class Memory:
    """What has been written on the way through a half, and what is read from there."""

    def __init__(self, half, phases, there=(), results=LASTING):
        self.half, self.written, self.read = half, set(there), set()
        self.pieces = {}
        for stages in phases:
            for stage in stages:
                self.go_through(stage)
        assert all(v in self.written for v, place in half.places.items() if place.startswith(results))

    def take(self, value):
        value = base(value)
        is_given = value.kind in ("carry", "x", "fixed", "seed_carry", "seed_y", "invariant")
        assert is_given or value in self.written, f"{value} of {value.source} is read before it is written"
        self.read.add(value)

    def go_through(self, stage):
        for value in stage.products:
            self.take(value.args[0])
            self.written.add(self.half.onto.get(value, value))
        for nest in stage.nests:
            inside = set()
            for value in nest.values:
                assert value not in inside
                for ref in value.refs():
                    if ref.value.kind == "map" and ref.value in nest.values:
                        assert ref.value in inside and ref.is_whole(value.loops), "a register holds one element"
                    else:
                        self.take(ref.value)
                inside.add(value)
            for store in nest.stores:
                assert store.value in inside
                self.put(store)

    def put(self, store):
        if store.piece is None:
            assert store.target not in self.written or store.adding, f"{store.target} is written twice"
            self.written.add(store.target)
        elif not store.adding:
            pieces = self.pieces.setdefault(store.target, set())
            assert store.piece not in pieces
            pieces.add(store.piece)
            if len(pieces) == len(store.target.pieces):
                self.written.add(store.target)


def fleeting(half):
    return {value for value, place in half.places.items() if place in FLEETING and value.kind != "alias"}


def check(plan):
    """Go through both halves; values that are stored for nobody."""
    forward = Memory(plan.forward, (plan.forward.block, plan.forward.step))
    unread = fleeting(plan.forward) - forward.read
    if plan.backward is not None:
        lasting = {v for v in forward.written if plan.forward.places.get(v, "").startswith(LASTING)}
        backward = Memory(plan.backward, (plan.backward.step, plan.backward.block), lasting, GRADIENTS)
        for value in plan.sums:
            for operand in value.args:
                backward.take(operand)
        unread |= fleeting(plan.backward) - backward.read
    return unread


@settings(suppress_health_check=list(HealthCheck))
@given(cell=cells(features=FEATURES - {"counter"}))
def test_what_is_read_was_written(cell):
    try:
        found = tt.scan.explain(cell.f, cell.init, cell.xs, cell.length)
        assert found.reason is None
        check(found.plan)
    finally:
        attempt._plans.clear()


def whole_and_transposed(leaf):
    def step(h, x):
        c = x * 2.0
        u, w = c + 1.0, tt.swapaxes(c, 1, 2) * 3.0
        return tt.tanh(h + u * w - tt.max(u * w, axis=(1, 2), keepdims=True)), None

    return step, leaf(2, 5, 5), leaf(3, 2, 5, 5)


def gates_without_a_product(leaf):
    b = leaf(10)

    def step(h, x):
        a, g = tt.split(x + b, 2, axis=1)
        return tt.sigmoid(a) * h + tt.tanh(g), None

    return step, leaf(2, 5), leaf(3, 2, 10)


def a_gradient_that_is_always_zero(leaf):
    w, u = leaf(5, 5), leaf(5, 5)
    return lambda h, x: (tt.sign(tt.tanh(h @ w) @ u), tt.sign(tt.tanh(x @ w) @ u)), leaf(2, 5), leaf(4, 2, 5)


def negative_zero(leaf):
    return lambda h, x: (1.0 / (tt.where(x > 9.0, x, -0.0) * tt.abs(h)), None), leaf(2, 5), leaf(1, 2, 5)


def nothing_from_step_to_step(leaf):
    w = leaf(3, 5)
    return lambda h, x: (x @ w, None), leaf(2, 5), leaf(4, 2, 3)


STEPS = [
    nothing_from_step_to_step,
    whole_and_transposed,
    gates_without_a_product,
    a_gradient_that_is_always_zero,
    negative_zero,
]


@needs_numba
@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_kernels_and_plans_of(step):
    leaf = Leaves()
    arguments = step(leaf)
    assert not check(tt.scan.explain(*arguments).plan)
    assert_like_eager(*arguments, leaf.made)


CELLS = [nn.RNNCell, nn.GRUCell, nn.LSTMCell, nn.PeepholeLSTMCell, nn.LayerNormLSTMCell, nn.MinimalGatedUnitCell]


@pytest.mark.parametrize("kind", CELLS, ids=lambda kind: kind.__name__)
def test_what_is_written_is_read(kind):
    cell, h = kind(3, 5), tt.zeros((4, 5), requires_grad=True)

    def step(state, x):
        state = cell(x, state)
        return state, state[0] if isinstance(state, tuple) else state

    found = tt.scan.explain(step, (h, tt.zeros((4, 5))) if "LSTM" in kind.__name__ else h, tt.zeros((2, 4, 3)))
    assert found.reason is None and not check(found.plan)
