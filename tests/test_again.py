"""Calls of a layer that are like earlier ones take a short way: the same results, errors and derivatives."""

import copy
import pickle
import weakref

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import nn

LAYERS = {
    "RNN": lambda **o: nn.RNN(3, 4, **o),
    "GRU": lambda **o: nn.GRU(3, 4, **o),
    "LSTM": lambda **o: nn.LSTM(3, 4, **o),
    "projected": lambda **o: nn.LSTM(3, 4, proj_size=2, **o),
    "learned": lambda **o: nn.LSTM(3, 4, learn_initial_state=True, **o),
}


def made(kind, layers=1):
    return LAYERS[kind](num_layers=layers, generator=tt.Generator(0))


def drawn(rng, *shape):
    return rng.standard_normal(shape).astype(np.float32)


def parts(state):
    return [part.numpy() for part in (state if isinstance(state, tuple) else (state,))]


def same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_array_equal(a, b)


@given(
    kind=st.sampled_from(list(LAYERS)),
    layers=st.sampled_from([1, 2]),
    calls=st.lists(st.tuples(st.integers(1, 4), st.sampled_from([1, 3]), st.booleans(), st.booleans()), max_size=8),
)
def test_any_row_of_calls_gives_what_a_new_layer_gives(kind, layers, calls):
    """Forms of calls, with and without a tape and a state, come in any order; weights change between them."""
    layer, rng = made(kind, layers), np.random.default_rng(0)
    for steps, rows, recording, given_state in calls:
        twin = copy.deepcopy(layer)
        x, state = drawn(rng, steps, rows, 3), None
        if given_state:
            with tt.no_grad():
                state = copy.deepcopy(layer)(x)[1]
        outcome = []
        for each in (layer, twin):
            inside = tt.tensor(x, requires_grad=True)
            if recording:
                y, after = each(inside, state)
                tt.sum(tt.square(y)).backward()
                grads = [inside.grad.numpy(), *[p.grad.numpy() for p in each.parameters() if p.grad is not None]]
            else:
                with tt.no_grad():
                    (y, after), grads = each(x, state), []
            outcome.append([y.numpy(), *parts(after), *grads])
        same(*outcome)
        with tt.no_grad():
            for p in layer.parameters():
                p += 0.01
                p.grad = None


@pytest.mark.parametrize("kind", LAYERS)
def test_token_by_token_is_all_at_once(kind):
    layer, x = made(kind, 2), drawn(np.random.default_rng(1), 6, 2, 3)
    with tt.no_grad():
        whole, last = layer(x)
        state, ys = None, []
        for t in range(6):
            y, state = layer(x[t : t + 1], state)
            ys.append(y.numpy())
    np.testing.assert_allclose(np.concatenate(ys), whole.numpy(), rtol=1e-5, atol=1e-6)
    for a, b in zip(parts(state), parts(last), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def twice(layer, *args):
    for _ in range(2):
        layer(*args)


def test_what_has_changed_is_seen():
    layer, x = made("GRU"), drawn(np.random.default_rng(2), 1, 2, 3)
    twice(layer, x)
    layer.weight_hh_l0 = nn.Parameter(np.zeros((12, 4), np.float32))
    same([layer(x)[0].numpy()], [copy.deepcopy(layer)(x)[0].numpy()])
    layer.weight_ih_l0.requires_grad = False
    y, _ = layer(x)
    tt.sum(y).backward()
    assert layer.weight_ih_l0.grad is None and layer.bias_ih_l0.grad is not None
    with tt.no_compile():
        np.testing.assert_allclose(layer(x)[0].numpy(), y.numpy(), rtol=1e-5, atol=1e-6)
    layer.to(np.float64)
    with pytest.raises(tt.DTypeError, match="x is float32"):
        layer(x)


def test_what_stands_in_for_a_weight_is_let_go():
    layer, x = made("RNN"), drawn(np.random.default_rng(7), 2, 1, 3)
    weight = layer.weight_hh_l0 * 2.0
    gone = weakref.ref(weight)
    y, _ = tt.nn.functional_call(layer, {"weight_hh_l0": weight}, x)
    tt.sum(y).backward()
    assert layer.weight_hh_l0.grad is not None
    del weight, y
    assert gone() is None


def test_dropout_between_layers_still_acts():
    layer = nn.LSTM(3, 4, num_layers=2, dropout=0.5, generator=tt.Generator(0))
    x = drawn(np.random.default_rng(3), 5, 2, 3)
    layer.eval()
    twice(layer, x)
    plain = layer(x)[0].numpy()
    layer.train()
    assert any(not np.array_equal(layer(x)[0].numpy(), plain) for _ in range(3))


@pytest.mark.parametrize(
    ("x", "state", "complaint"),
    [
        (np.zeros((1, 2, 4), np.float32), None, "input_size = 3"),
        (np.zeros((0, 2, 3), np.float32), None, "0 time steps"),
        (np.zeros((1, 2, 3)), None, "x is float64"),
        (np.zeros((1, 2, 3), np.float32), np.zeros((1, 2, 4), np.float32), "the state is"),
        (np.zeros((1, 2, 3), np.float32), (np.zeros((1, 3, 4), np.float32),) * 2, r"\(1, 2, 4\)"),
        (np.zeros((1, 2, 3), np.float32), (np.zeros((1, 2, 4)),) * 2, "is float64"),
    ],
)
def test_a_wrong_call_is_refused_each_time(x, state, complaint):
    layer = made("LSTM")
    twice(layer, np.zeros((1, 2, 3), np.float32), (np.zeros((1, 2, 4), np.float32),) * 2)
    for _ in range(2):
        with pytest.raises(tt.TinytapeError, match=complaint):
            layer(x, state)


def test_what_the_caller_writes_later_is_not_what_the_tape_keeps():
    layer, x = made("RNN"), drawn(np.random.default_rng(4), 2, 1, 3)
    twice(layer, x)
    gradients = []
    for write in (False, True):
        mine = x.copy()
        y, _ = layer(mine)
        mine[...] = mine + write
        layer.weight_ih_l0.grad = None
        tt.sum(y).backward()
        gradients.append(layer.weight_ih_l0.grad.numpy())
    np.testing.assert_array_equal(*gradients)


def test_higher_derivatives():
    layer, x = made("LSTM"), drawn(np.random.default_rng(5), 3, 2, 3).astype(np.float64)
    layer.to(np.float64)
    twice(layer, tt.tensor(x, requires_grad=True))
    tt.check_grads(lambda a: tt.sum(tt.square(layer(a)[0])), [x], order=2)


def test_copies_and_pickles_do_without_what_is_remembered():
    layer, x = made("LSTM"), drawn(np.random.default_rng(6), 3, 2, 3)
    twice(layer, x)
    for twin in (pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer)):
        same([twin(x)[0].numpy()], [layer(x)[0].numpy()])


@pytest.mark.parametrize("kind", LAYERS)
def test_no_rows(kind):
    layer, x = made(kind, 2), tt.zeros((5, 0, 3), requires_grad=True)
    for _ in range(2):
        y, after = layer(x)
        assert y.shape[:2] == (5, 0) and all(part.shape[:2] == (2, 0) for part in parts(after))
        tt.sum(y).backward()
        assert x.grad.shape == x.shape and not layer.weight_hh_l0.grad.numpy().any()


@pytest.mark.parametrize("state", [(), (np.zeros((1, 2, 5), np.float32),)])
def test_a_nest_in_place_of_a_state_is_refused_also_after_calls_that_fit(state):
    layer, x = nn.GRU(3, 5), np.zeros((2, 2, 3), np.float32)
    for fits in (None, np.zeros((1, 2, 5), np.float32)):
        layer(x, fits)
        with pytest.raises(tt.DTypeError, match="h is a tuple"):
            layer(x, state)
