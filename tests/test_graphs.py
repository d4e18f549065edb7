"""Graphs as graphs: very long, very wide, and random ones against a naive reference."""

import gc
import weakref
from collections import deque
from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import settings
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    precondition,
    rule,
)

import tinytape as tt

MANY = 100_000


# ---- long and wide --------------------------------------------------------------------------------------------------


def chain(x, n):
    y = x
    for _ in range(n):
        y = y * 1.0
    return y


def test_a_chain_of_100_000_ops():
    x = tt.tensor([1.0, 2.0], requires_grad=True)
    y = chain(x, MANY)
    y.sum().backward()
    assert x.grad.tolist() == [1, 1]


def test_a_chain_that_is_only_dropped():
    x = tt.tensor(1.0, requires_grad=True)
    y = chain(x, MANY)
    oldest = weakref.ref(y.node.parents[0])
    gc.disable()
    try:
        del y
        assert oldest() is None
    finally:
        gc.enable()


def test_the_gradient_of_a_chain_is_a_chain_that_works_too():
    x = tt.tensor(np.array(1.0), requires_grad=True)
    y = x
    for _ in range(3000):
        y = tt.sin(y)
    y.backward(create_graph=True)
    (g, x.grad) = (x.grad, None)
    g.backward()
    value, first, second = 1.0, 1.0, 0.0
    for _ in range(3000):  # the chain rule, forwards
        value, first, second = (
            np.sin(value),
            np.cos(value) * first,
            np.cos(value) * second - np.sin(value) * first * first,
        )
    assert g.item() == pytest.approx(first) and x.grad.item() == pytest.approx(second)


def test_a_wide_comb():
    x = tt.tensor(np.array([1.0, 2.0]), requires_grad=True)
    tt.stack([x * 2.0 for _ in range(MANY)]).sum().backward()
    assert x.grad.tolist() == [2 * MANY] * 2


def test_one_leaf_used_all_along_a_chain():
    x = tt.tensor(np.array(0.5), requires_grad=True)
    y = tt.tensor(np.array(0.0))
    for _ in range(MANY):
        y = y + x
    y.backward()
    assert x.grad.item() == MANY


def test_very_many_leaves():
    leaves = [tt.tensor(np.array(float(i)), requires_grad=True) for i in range(MANY)]
    total = leaves[0]
    for leaf in leaves[1:]:
        total = total + leaf
    (total * total).backward()
    assert {leaf.grad.item() for leaf in leaves} == {float(MANY) * (MANY - 1)}


# ---- random graphs --------------------------------------------------------------------------------------------------

N = 5  # how many numbers all leaves have together


class Jet:
    """A value with its Jacobian and Hessian with respect to the N numbers of all leaves: slow, and plainly right."""

    def __init__(self, value, first, second):
        self.value, self.first, self.second = value, first, second

    @staticmethod
    def constant(value):
        zero = np.zeros_like(value)
        return Jet(value, [zero] * N, [[zero] * N] * N)

    def linear(self, f):
        return Jet(f(self.value), [f(d) for d in self.first], [[f(h) for h in row] for row in self.second])

    def plus(self, other, sign=1.0):
        first = [a + sign * b for a, b in zip(self.first, other.first, strict=True)]
        second = [[self.second[i][j] + sign * other.second[i][j] for j in range(N)] for i in range(N)]
        return Jet(self.value + sign * other.value, first, second)

    def product(self, other, f):
        a, b, da, db, ha, hb = self.value, other.value, self.first, other.first, self.second, other.second
        first = [f(da[i], b) + f(a, db[i]) for i in range(N)]
        second = [
            [f(ha[i][j], b) + f(da[i], db[j]) + f(da[j], db[i]) + f(a, hb[i][j]) for j in range(N)] for i in range(N)
        ]
        return Jet(f(a, b), first, second)

    def function(self, value, slope, curvature):
        first = [slope * d for d in self.first]
        second = [
            [slope * self.second[i][j] + curvature * self.first[i] * self.first[j] for j in range(N)] for i in range(N)
        ]
        return Jet(value, first, second)


def tanh(x):
    t = np.tanh(x.value)
    return x.function(t, 1 - t * t, -2 * t * (1 - t * t))


def sin(x):
    return x.function(np.sin(x.value), np.cos(x.value), -np.sin(x.value))


def square(x):
    return x.function(x.value**2, 2 * x.value, np.full_like(x.value, 2.0))


def softplus(x):
    s = 1 / (1 + np.exp(-x.value))
    return x.function(np.log1p(np.exp(x.value)), s, s * (1 - s))


@dataclass
class Entry:
    """A Tensor, its Jet, and how many writes to leaves there had been when it was made."""

    tensor: tt.Tensor
    jet: Jet
    made: int


class Graphs(RuleBasedStateMachine):
    """Builds graphs of Tensors and of Jets side by side, and compares values, gradients and second derivatives.

    Leaves are written in between: an older graph may then refuse to be walked, but may never give a wrong gradient.
    """

    entries = Bundle("entries")

    def __init__(self):
        super().__init__()
        self.leaves = []  # entries, and their places among the N numbers
        self.used = 0
        self.writes = 0
        self.accumulated = np.zeros(N)  # what .grad of all leaves must be
        self.last = deque(maxlen=6)

    def teardown(self):
        for seed, entry in enumerate(self.last):
            self.gradients_are_right(entry, seed)

    def entry(self, tensor, jet, *parents):
        if np.any(np.abs(jet.value) > 1e3) or any(parent.made < self.writes for parent in parents):
            return multiple()
        self.last.append(Entry(tensor, jet, self.writes))
        return self.last[-1]

    # leaves and constants

    def leaf(self, shape, seed):
        value = np.random.default_rng(seed).uniform(-1, 1, shape)
        place = slice(self.used, self.used + value.size)
        jet = Jet.constant(value)
        jet.first = list(np.eye(N)[:, place].reshape(N, *shape))
        made = Entry(tt.tensor(value, requires_grad=True), jet, self.writes)
        self.leaves.append((made, place))
        self.used = place.stop
        return made

    def constant(self, shape, seed):
        value = np.random.default_rng(seed).uniform(-1, 1, shape)
        return self.entry(tt.tensor(value), Jet.constant(value))

    @precondition(lambda self: self.used < N)
    @rule(target=entries, seed=st.integers(0, 99))
    def another_leaf(self, seed):
        return self.leaf((N - self.used, 1), seed)

    @rule(target=entries, shape=st.sampled_from([(), (2,), (0,)]), seed=st.integers(0, 99))
    def another_constant(self, shape, seed):
        return self.constant(shape, seed)

    @rule(target=entries, x=entries)
    def detached(self, x):
        return self.entry(x.tensor.detach(), Jet.constant(x.jet.value), x)

    @initialize(target=entries)
    def start(self):
        return multiple(self.leaf((2,), 0), self.leaf((), 1), self.constant((2, 2), 2))

    # ops

    @rule(target=entries, x=entries, f=st.sampled_from([tanh, sin, square, softplus]))
    def function(self, x, f):
        return self.entry(getattr(tt, f.__name__)(x.tensor), f(x.jet), x)

    @rule(target=entries, x=entries, y=entries, op=st.sampled_from(["multiply", "matmul"]))
    def product(self, x, y, op):
        try:
            getattr(np, op)(x.jet.value, y.jet.value)
        except ValueError:
            with pytest.raises(tt.ShapeError):
                getattr(tt, op)(x.tensor, y.tensor)
            return multiple()
        return self.entry(getattr(tt, op)(x.tensor, y.tensor), x.jet.product(y.jet, getattr(np, op)), x, y)

    @rule(target=entries, x=entries, y=entries, sign=st.sampled_from([1.0, -1.0]))
    def sum_or_difference(self, x, y, sign):
        try:
            np.broadcast_shapes(x.tensor.shape, y.tensor.shape)
        except ValueError:
            return multiple()
        tensor = x.tensor + y.tensor if sign > 0 else x.tensor - y.tensor
        return self.entry(tensor, x.jet.plus(y.jet, sign), x, y)

    @rule(
        target=entries, x=entries,
        f=st.sampled_from([
            lambda v: v.sum(),
            lambda v: v.sum(axis=-1, keepdims=True) if v.ndim else v,
            lambda v: v.T,
            lambda v: v.reshape(-1),
            lambda v: v[0] if v.size and v.ndim else v[None],
            lambda v: v[::-1] if v.ndim else v,
            lambda v: v[[0, 0, -1]] if v.size and v.ndim else v,
        ]),
    )  # fmt: skip
    def linear(self, x, f):
        return self.entry(f(x.tensor), x.jet.linear(f), x)

    @rule(target=entries, x=entries, y=entries)
    def joined(self, x, y):
        a, b = (z.jet.linear(np.ravel) for z in (x, y))
        first = [np.concatenate(pair) for pair in zip(a.first, b.first, strict=True)]
        second = [[np.concatenate([a.second[i][j], b.second[i][j]]) for j in range(N)] for i in range(N)]
        tensor = tt.concatenate([x.tensor.ravel(), y.tensor.ravel()])
        return self.entry(tensor, Jet(np.concatenate([a.value, b.value]), first, second), x, y)

    @rule(target=entries, x=entries, y=entries)
    def added_in_place(self, x, y):
        """On a recorded tensor ``+=`` makes a new one: the old value may be in use elsewhere."""
        if not x.tensor.requires_grad or x.tensor.is_leaf or y.tensor.ndim:
            return multiple()
        tensor = x.tensor
        tensor += y.tensor
        assert tensor is not x.tensor
        return self.entry(tensor, x.jet.plus(y.jet), x, y)

    # what happens in between

    @rule(x=consumes(entries))
    def dropped(self, x):
        pass

    @rule(which=st.integers(0, 9))
    def leaf_written(self, which):
        leaf, _ = self.leaves[which % len(self.leaves)]
        with tt.no_grad():
            leaf.tensor += 0.125
        leaf.jet.value = leaf.jet.value + 0.125
        self.writes += 1
        for other, _ in self.leaves:
            other.made = self.writes

    # what must hold

    def refused_rightly(self, error, x):
        return "was written in place" in str(error) and x.made < self.writes

    def gradients_are_right(self, x, seed):
        if x.made == self.writes:
            np.testing.assert_allclose(x.tensor.data, x.jet.value, rtol=1e-9, atol=1e-9)
        if not x.tensor.requires_grad:
            assert not any(np.any(d) for d in x.jet.first)
            return
        rng = np.random.default_rng(seed)
        weights, direction = rng.uniform(-1, 1, x.tensor.shape), rng.uniform(-1, 1, N)
        first = np.array([np.sum(weights * d) for d in x.jet.first])
        second = np.array([[np.sum(weights * h) for h in row] for row in x.jet.second]) @ direction
        sources = [leaf.tensor for leaf, _ in self.leaves]
        try:
            found = tt.Tape().gradient(x.tensor, sources, weights, create_graph=True)
            self.compare(found, first)
            total = tt.tensor(np.zeros(()))
            for g, (_, place) in zip(found, self.leaves, strict=True):
                if g is not None:
                    total = total + (g.reshape(-1) * direction[place]).sum()
            again = [None] * len(sources)
            if total.requires_grad:
                again = tt.Tape().gradient(total, sources, retain_graph=True)
            self.compare(again, second)
        except tt.TapeError as error:
            assert self.refused_rightly(error, x)

    @rule(x=entries)
    def backward_adds_up(self, x):
        if x.tensor.requires_grad:
            try:
                x.tensor.backward(np.ones(x.tensor.shape), retain_graph=True)
            except tt.TapeError as error:
                assert self.refused_rightly(error, x)
            else:
                self.accumulated += [np.sum(d) for d in x.jet.first]

    @invariant()
    def grad_is_what_was_accumulated(self):
        self.compare([leaf.tensor.grad for leaf, _ in self.leaves], self.accumulated)

    def compare(self, gradients, expected):
        for g, (leaf, place) in zip(gradients, self.leaves, strict=True):
            found = np.zeros(leaf.tensor.shape) if g is None else g.data
            np.testing.assert_allclose(found.ravel(), expected[place], rtol=1e-7, atol=1e-7)


TestGraphs = Graphs.TestCase
TestGraphs.settings = settings(max_examples=max(100, settings.default.max_examples), stateful_step_count=30)
