"""Whose memory a leaf's gradient is: taken over from a rule that made it, copied from everybody who still holds it."""

import numpy as np
import pytest

import tinytape as tt


def leaf(*shape):
    return tt.tensor(np.zeros(shape), requires_grad=True)


def rule_that_returns(make):
    """An op on one argument whose gradient is what `make` says."""

    @tt.op
    def opaque(x):
        return x * 1.0

    @opaque.vjp
    def _(g, x):
        return make(g, x)

    return opaque


def test_an_array_that_a_rule_made_is_taken_over():
    addresses = []

    def make(g, x):
        made = np.ones(x.shape)
        addresses.append(made.ctypes.data)
        return made

    x = leaf(50, 50)
    rule_that_returns(make)(x).sum().backward()
    assert x.grad.raw.ctypes.data == addresses[0]
    x.grad += 1.0
    assert x.grad.raw.ctypes.data == addresses[0] and (x.grad.data == 2.0).all()


def test_an_array_that_its_maker_keeps_is_copied():
    kept = np.ones((5, 5))
    x = leaf(5, 5)
    rule_that_returns(lambda g, x: kept)(x).sum().backward()
    x.grad += 1.0
    assert (kept == 1.0).all()


def test_what_the_graph_keeps_is_copied():
    x = leaf(5, 5)
    out = rule_that_returns(lambda g, x: x)(x).sum()
    out.backward(retain_graph=True)
    x.grad += 1.0
    assert not x.data.any()


@pytest.mark.parametrize(
    "view", [lambda a: a.T, lambda a: a[::-1], lambda a: np.broadcast_to(a[0], a.shape), lambda a: a.reshape(5, 5)]
)
def test_a_view_is_copied_into_c_order(view):
    kept = np.arange(25.0).reshape(5, 5)
    x = leaf(5, 5)
    rule_that_returns(lambda g, x: view(kept))(x).sum().backward()
    assert np.array_equal(x.grad.data, view(kept)) and x.grad.raw.flags.carray
    assert not np.shares_memory(x.grad.raw, kept)


def test_a_gradient_from_outside_is_copied():
    x, seed = leaf(3, 3), np.ones((3, 3))
    for given in (seed, tt.tensor(seed)):
        x.grad = None
        (x * 1.0).backward(given)
        x.grad += 1.0
        assert (np.asarray(given) == 1.0).all()
    x.grad = None
    x.backward(seed)
    x.grad += 1.0
    assert (seed == 1.0).all()


def test_two_leaves_share_nothing():
    @tt.op
    def both(a, b):
        return a + b

    @both.vjp
    def _(g):
        made = g * 2.0
        return made, made

    a, b = leaf(4, 4), leaf(4, 4)
    both(a, b).sum().backward()
    assert not np.shares_memory(a.grad.raw, b.grad.raw)
    (a + b).sum().backward()
    assert not np.shares_memory(a.grad.raw, b.grad.raw)


def test_a_leaf_within_the_graph_shares_nothing_with_those_behind_it():
    a = leaf(4, 4)
    h = a * 1.0
    first, second, third = tt.gradient((h + 0.0).sum(), [h, a, h])
    for x, y in ((first, second), (first, third), (second, third)):
        assert not np.shares_memory(x.raw, y.raw)


def test_a_hook_may_hold_what_it_saw():
    x, seen = leaf(3, 3), []
    x.register_hook(seen.append)
    rule_that_returns(lambda g, x: np.ones(x.shape))(x).sum().backward()
    x.grad += 1.0
    assert (seen[0].data == 1.0).all()


def test_a_hook_may_give_what_it_holds():
    x, held = leaf(3, 3), tt.tensor(np.ones((3, 3)))
    x.register_hook(lambda g: held)
    (x * 2.0).sum().backward()
    x.grad += 1.0
    assert (held.data == 1.0).all()


def test_gradients_accumulate_in_place():
    x = leaf(3, 3)
    (x * 2.0).sum().backward()
    address = x.grad.raw.ctypes.data
    (x * 3.0).sum().backward()
    assert (x.grad.data == 5.0).all() and x.grad.raw.ctypes.data == address


def test_rows_of_a_table_give_their_gradient_over():
    """The gradient of an embedding is as large as its table: it is made once and not copied."""
    table = leaf(2000, 50)
    table[np.array([[3, 3], [7, 1999]])].sum().backward()
    assert table.grad.raw.base is None
    assert table.grad.data.sum() == 4 * 50 and (table.grad.data[3] == 2.0).all()
