"""`scan` against the loop that it means, finite differences, and itself run otherwise."""

import contextlib
import gc
import weakref
from collections import namedtuple

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import nn
from tinytape.engine.tape import Node
from tinytape.loop.scan import leaf_names

Pair = namedtuple("Pair", "h c")


def leaf(rng, *shape):
    return tt.tensor(rng.normal(size=shape), requires_grad=True)


def close(a, b, tolerance=1e-12):
    a, b = (x.data if isinstance(x, tt.Tensor) else x for x in (a, b))
    np.testing.assert_allclose(a, b, rtol=tolerance, atol=tolerance)


class Setting:
    """An Elman network of 2 rows whose loss weighs every output and the last carry differently."""

    def __init__(self, steps=6, seed=0):
        rng = np.random.default_rng(seed)
        self.xs, self.init = leaf(rng, steps, 2, 3), leaf(rng, 2, 4)
        self.w, self.u = leaf(rng, 3, 4), leaf(rng, 4, 4)
        self.v_ys, self.v_carry = rng.normal(size=(steps, 2, 4)), rng.normal(size=(2, 4))

    @property
    def leaves(self):
        return [self.xs, self.init, self.w, self.u]

    def f(self, h, x):
        h = tt.tanh(x @ self.w + h @ self.u)
        return h, h * h

    def loss(self, carry, ys):
        return (ys * self.v_ys).sum() + (carry * self.v_carry).sum()

    def gradients(self, **options):
        with tt.Tape() as tape:
            loss = self.loss(*tt.scan(self.f, self.init, self.xs, **options))
            return [loss, *tape.gradient(loss, self.leaves)]

    def by_hand(self, order):
        """The same with a loop written here."""
        with tt.Tape() as tape:
            carry, ys = self.init, {}
            for t in order:
                carry, ys[t] = self.f(carry, self.xs[t])
            loss = self.loss(carry, tt.stack([ys[t] for t in sorted(ys)]))
            return [loss, *tape.gradient(loss, self.leaves)]


# ---- what it means --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("reverse", [False, True])
def test_it_is_the_loop(reverse):
    s = Setting()
    order = range(6)[::-1] if reverse else range(6)
    for a, b in zip(s.gradients(reverse=reverse), s.by_hand(order), strict=True):
        close(a, b)


@pytest.mark.parametrize("reverse", [False, True])
def test_derivatives_agree_with_finite_differences(reverse):
    s = Setting(steps=3)

    def f(xs, init, w, u):
        def step(h, x):
            h = tt.tanh(x @ w + h @ u)
            return h, (h * x.sum(), None)

        return tt.scan(step, init, xs, reverse=reverse)

    tt.check_grads(f, [x.numpy() for x in s.leaves], order=2)


def test_nests():
    """Every kind of branch, as carry, input and output, and None in each."""
    rng = np.random.default_rng(0)
    a, b = leaf(rng, 5, 2), rng.normal(size=(5, 3))
    flags = rng.random((5, 2)) < 0.5
    init = {"p": Pair(np.zeros(2), None), "list": [leaf(rng, 3)], "n": 0}

    def f(carry, x):
        assert isinstance(carry["p"], Pair) and carry["p"].c is None and x["none"] is None
        assert isinstance(carry["list"], list) and x["flags"].dtype == bool and x["flags"].shape == (2,)
        h = tt.where(x["flags"], x["pair"][0], carry["p"].h)
        d = carry["list"][0] + x["pair"][1]
        return {"n": carry["n"] + 1, "list": [d], "p": Pair(h, None)}, [h, {"d": d, "none": None}, Pair(1.5, True)]

    carry, ys = tt.scan(f, init, {"pair": (a, b), "flags": flags, "none": None})
    h, expected = np.zeros(2), []
    for t in range(5):
        h = np.where(flags[t], a.data[t], h)
        expected.append(h)
    assert isinstance(carry["p"], Pair) and isinstance(carry["list"], list) and carry["n"].item() == 5
    close(ys[0], np.array(expected))
    close(carry["p"].h, h)
    close(ys[1]["d"], init["list"][0].data + np.cumsum(b, 0))
    close(carry["list"][0], ys[1]["d"][-1])
    assert ys[1]["none"] is None and isinstance(ys[2], Pair)
    assert ys[2].h.data.tolist() == [1.5] * 5 and ys[2].c.dtype == bool
    (ys[0].sum() + ys[1]["d"].sum()).backward()
    close(init["list"][0].grad, np.full(3, 5.0))


@pytest.mark.parametrize("xs", [None, (), {"a": None}], ids=str)
def test_length_stands_in_for_xs(xs):
    carry, ys = tt.scan(lambda c, x: (c * 2, (c, x)), 1.0, xs, length=np.int64(4))
    assert carry.item() == 16 and ys[0].tolist() == [1, 2, 4, 8] and ys[1] == xs
    carry, ys = tt.scan(lambda c, x: (c * 2, None), 1.0, xs, length=1, reverse=True)
    assert carry.item() == 2 and ys is None


def test_length_beside_xs():
    assert tt.scan(lambda c, x: (c + x, None), 0.0, np.ones(3, np.float32), 3)[0].item() == 3


def test_modules_are_taken_from_outside():
    cell = nn.LSTMCell(3, 4)
    x = np.random.default_rng(0).normal(size=(5, 2, 3)).astype(np.float32)

    def f(state, x):
        state = cell(x, state)
        return state, state[0]

    (h, _), ys = tt.scan(f, cell.initial_state(2), x)
    expected, (last, _) = nn.Recurrent(cell)(x)
    close(ys, expected, 1e-6)
    close(h, last, 1e-6)
    ys.sum().backward()
    assert all(np.abs(p.grad.data).max() > 0 for p in cell.parameters())


def test_numbers_keep_a_carrys_dtype():
    """A number that f returns takes the carry's dtype as it would in arithmetic, step after step."""
    for init, returned, dtype in [
        (0.0, 2, np.float32), (np.float64(0), 2.5, np.float64), (np.zeros((), np.float64), np.float32(1), np.float64),
        (0, True, np.int64), (False, True, np.bool_), (tt.tensor(np.float16(1)), 3.0, np.float16),
    ]:  # fmt: skip
        seen = []
        carry, _ = tt.scan(lambda c, x: seen.append(c.dtype) or (returned, None), init, None, 3)  # noqa: B023
        assert carry.dtype == dtype and set(seen) == {np.dtype(dtype)} and carry.item() == returned


def test_a_float_carry_of_a_default_dtype():
    tt.set_default_dtype("float64")
    try:
        carry, ys = tt.scan(lambda c, x: (c + x * 0.5, c), 0.0, np.ones(3))
        assert carry.dtype == ys.dtype == np.float64
    finally:
        tt.set_default_dtype("float32")


def test_integers_and_bools_are_carried_but_not_differentiated():
    x = tt.tensor(np.arange(1.0, 5), requires_grad=True)

    def f(carry, x):
        n, odd, total = carry
        return (n + 1, tt.logical_not(odd), total + x * n), (n, odd)

    (n, odd, total), (ns, odds) = tt.scan(f, (np.int32(0), False, np.zeros(())), x)
    assert n.item() == 4 and n.dtype == np.int32 and not odd.item() and not n.requires_grad
    assert ns.tolist() == [0, 1, 2, 3] and odds.tolist() == [False, True, False, True]
    total.backward()
    assert x.grad.tolist() == [0, 1, 2, 3]


def test_nan_passes_through():
    x = np.ones((4, 2), np.float32)
    x[2, 0] = np.nan
    carry, ys = tt.scan(lambda c, x: (c + x, c), np.zeros(2, np.float32), x)
    assert np.isnan(carry.data).tolist() == [True, False] and np.isnan(ys.data).sum() == 1


def test_steps_are_marked():
    s = Setting(steps=3)
    for options in ({}, {"reverse": True}, {"lookback": 1}):
        with tt.no_compile(), tt.Tape() as tape:
            tt.scan(s.f, s.init, s.xs, **options)
        steps = [record.node.step for record in tape.records]
        found = [t for t in dict.fromkeys(steps) if t is not None]
        assert found == ([2, 1, 0] if "reverse" in options else [0, 1, 2])


def test_a_long_scan():
    x = tt.tensor(np.ones(5000), requires_grad=True)
    carry, _ = tt.scan(lambda c, x: (c * 0.999 + x, None), np.zeros(()), x)
    carry.backward()
    close(x.grad, 0.999 ** np.arange(5000)[::-1], 1e-10)


def test_nothing_is_recorded_where_nothing_is_asked():
    s = Setting()
    with tt.no_grad():
        carry, ys = tt.scan(s.f, s.init, s.xs, lookback=2)
        assert not carry.requires_grad and not ys.requires_grad
        carry, ys = tt.scan(s.f, s.init, s.xs, checkpoint=2)
        assert not carry.requires_grad and not ys.requires_grad


@pytest.mark.parametrize("options", [{}, {"checkpoint": 2}, {"lookback": 2}], ids=str)
def test_a_graph_is_freed_without_the_collector(options):
    s = Setting()
    gc.collect()
    gc.disable()
    try:
        carry, ys = tt.scan(s.f, s.init, s.xs, **options)
        nodes = [weakref.ref(carry.node), weakref.ref(ys.node)]
        del carry, ys
        assert [node() for node in nodes] == [None, None]
    finally:
        gc.enable()


# ---- checkpoint and lookback ----------------------------------------------------------------------------------------


@given(steps=st.integers(1, 7), size=st.integers(1, 9), reverse=st.booleans())
def test_checkpoint_changes_no_number(steps, size, reverse):
    s = Setting(steps)
    for a, b in zip(s.gradients(checkpoint=size, reverse=reverse), s.gradients(reverse=reverse), strict=True):
        close(a, b)


def test_checkpoint_keeps_carries_only_and_runs_steps_twice_but_those_of_the_last_block():
    s, calls = Setting(steps=12), []

    def f(h, x):
        calls.append(1)
        return s.f(h, x)

    sizes = {}
    for size in (None, 3):
        with tt.no_compile(), tt.Tape() as tape:
            loss = s.loss(*tt.scan(f, s.init, s.xs, checkpoint=size))
            sizes[size] = sum(len(record.node.kept or ()) for record in tape.records)
            assert len(calls) == 12
            tape.gradient(loss, s.leaves)
        assert len(calls) == (12 if size is None else 12 + 9)
        calls.clear()
    assert sizes[3] < sizes[None] / 5


def test_nothing_of_a_checkpoints_first_run_stays_alive():
    x, before = tt.tensor(np.ones(8), requires_grad=True), live_nodes()

    def f(c, x):
        y = x
        for _ in range(50):
            y = tt.tanh(y)
        return c + y, y

    result = tt.scan(f, np.zeros(()), x, checkpoint=1)
    assert live_nodes() - before < 70  # of more than 400 that were recorded; 50 are those of the last step
    del result


def live_nodes():
    gc.collect()
    return sum(issubclass(type(thing), Node) for thing in gc.get_objects())  # isinstance asks dead weak proxies


def test_checkpoint_repeats_what_was_drawn():
    s, generator = Setting(), tt.Generator(0)

    def f(h, x):
        h = nn.functional.dropout(tt.tanh(x @ s.w + h @ s.u), 0.5, generator=generator)
        return h, h

    def gradients(**options):
        generator.manual_seed(1)
        with tt.Tape() as tape:
            loss = s.loss(*tt.scan(f, s.init, s.xs, **options))
            return tape.gradient(loss, s.leaves)

    for a, b in zip(gradients(checkpoint=4), gradients(), strict=True):
        close(a, b)


@given(steps=st.integers(1, 7), lookback=st.integers(1, 9), reverse=st.booleans())
def test_lookback_is_a_window_for_every_output(steps, lookback, reverse):
    """Its gradient is the sum over outputs of the gradient through the last steps alone."""
    s = Setting(steps)
    with tt.no_grad():
        carries = [s.init]
        for t in range(steps)[::-1] if reverse else range(steps):
            carries.append(s.f(carries[-1], s.xs[t])[0])
    with tt.Tape() as tape:
        total = 0.0
        for i in range(steps):
            first = max(0, i + 1 - lookback)
            carry = s.init if first == 0 else carries[first].detach()
            for j in range(first, i + 1):
                carry, y = s.f(carry, s.xs[steps - 1 - j if reverse else j])
            total = total + (y * s.v_ys[steps - 1 - i if reverse else i]).sum()
        total = total + (carry * s.v_carry).sum()
        expected = [total, *tape.gradient(total, s.leaves)]
    found = s.gradients(lookback=lookback, reverse=reverse)
    for a, b in zip(found, expected, strict=True):
        if b is None:
            assert a is None
        else:
            close(a, b)
    close(found[0], s.gradients(reverse=reverse)[0])
    if lookback >= steps:
        for a, b in zip(found, s.gradients(reverse=reverse), strict=True):
            close(a, b)


def test_no_gradient_goes_further_than_lookback():
    s = Setting(steps=6)
    for t in range(6):
        xs = tt.tensor(s.xs.data, requires_grad=True)
        tt.scan(s.f, s.init, xs, lookback=3)[1][t].sum().backward()
        reached = np.abs(xs.grad.data).sum((1, 2)) > 0
        assert reached.tolist() == [t - 3 < i <= t for i in range(6)]


# ---- names and bad input --------------------------------------------------------------------------------------------


def test_leaf_names():
    tree = {"b": [1, None, (2, {3: 4})], "a": Pair(5, 6)}
    assert leaf_names("t", tree) == ["t['a'].h", "t['a'].c", "t['b'][0]", "t['b'][2][0]", "t['b'][2][1][3]"]
    assert leaf_names("t", 1) == ["t"] and leaf_names("t", None) == []


X = np.zeros((4, 2, 3), np.float32)
H = np.zeros((2, 3), np.float32)


def then(step, carry, y=None, at=2):
    """A cell of a plain dict that returns something else from a step on."""
    count = []

    def f(c, x):
        count.append(1)
        return (carry(c), c["h"] if y is None else y(c)) if len(count) > at else (c, c["h"])

    return lambda: tt.scan(f, {"h": H, "n": (0,)}, X, **step)


BAD = {
    "shape": (then({}, lambda c: c | {"h": c["h"][:, :2]}), tt.ShapeError,
              r"carry\['h'\] has shape \(2, 3\) in init and \(2, 2\) after step 2"),
    "shape, backwards": (then({"reverse": True}, lambda c: c | {"h": c["h"][:1]}), tt.ShapeError,
                         r"carry\['h'\].*\(1, 3\) after step 1"),
    "shape, in a block": (then({"checkpoint": 2}, lambda c: c | {"h": c["h"][:1]}), tt.ShapeError, "after step 2"),
    "dtype": (then({}, lambda c: c | {"h": c["h"].astype("float64")}), tt.DTypeError,
              r"carry\['h'\] is float32 in init and float64 after step 2.*astype\('float32'\).*init of float64"),
    "a number's dtype": (then({}, lambda c: c | {"n": (0.5,)}), tt.DTypeError,
                         r"carry\['n'\]\[0\] is int64 in init and float32 after step 2"),
    "a key more": (then({}, lambda c: c | {"m": c["h"]}), tt.InputError,
                   r"carry is {'h': \*, 'n': \(\*,\)} in init and {'h': \*, 'n': \(\*,\), 'm': \*} after step 2"),
    "a key less": (then({}, lambda c: {"h": c["h"]}), tt.InputError, r"and {'h': \*} after step 2"),
    "a list for a tuple": (then({}, lambda c: c | {"n": [0]}), tt.InputError, r"'n': \[\*\]} after step 2"),
    "a leaf for a nest": (then({}, lambda c: c["h"]), tt.InputError, r"and \* after step 2"),
    "None for a leaf": (then({}, lambda c: c | {"h": None}), tt.InputError, r"{'h': None, 'n': \(\*,\)} after step 2"),
    "a string": (then({}, lambda c: c | {"h": "no"}), tt.DTypeError, r"carry\['h'\] is a str"),
    "y's shape": (then({}, dict, lambda c: c["h"][0]), tt.ShapeError,
                  r"y has shape \(2, 3\) after step 0 and \(3,\) after step 2"),
    "y's dtype": (then({}, dict, lambda c: c["h"].astype("float64")), tt.DTypeError, "y is float32 after step 0"),
    "y's structure": (then({}, dict, lambda c: (c["h"], c["h"])), tt.InputError, r"y is \* after step 0 and \(\*, \*"),
    "y is a string": (lambda: tt.scan(lambda c, x: (c, {"a": "no"}), H, X), tt.DTypeError, r"y\['a'\] is a str"),
    "no pair": (lambda: tt.scan(lambda c, x: c, H, X), tt.InputError, "returned a Tensor at step 0, not a pair"),
    "nothing": (lambda: tt.scan(lambda c, x: None, H, X, reverse=True), tt.InputError, "returned None at step 3"),
    "three": (lambda: tt.scan(lambda c, x: (c, c, c), H, X), tt.InputError, "a tuple of 3"),
    "a cell's own state": (lambda: tt.scan(lambda c, x: c, (H, H), X), tt.InputError, r"carry is \(\*, \*\) in init"),
    "unequal": (lambda: tt.scan(min, H, {"a": X, "b": (X, X[:3])}), tt.ShapeError,
                r"xs\['a'\] has 4 steps and xs\['b'\]\[1\] has 3"),
    "no steps": (lambda: tt.scan(min, H, X[:0]), tt.ShapeError, "xs has 0 steps"),
    "length 0": (lambda: tt.scan(min, H, None, 0), tt.ShapeError, r"length is 0\."),
    "length and xs": (lambda: tt.scan(min, H, (None, X), 3), tt.ShapeError, r"length is 3, xs\[1\] has 4 steps"),
    "length 0 and xs": (lambda: tt.scan(min, H, X, 0), tt.ShapeError, "length is 0, xs has 4"),
    "neither": (lambda: tt.scan(min, H, None), tt.InputError, "no xs, and no length"),
    "length's kind": (lambda: tt.scan(min, H, X, 4.0), tt.InputError, "length is 4.0"),
    "an array for a length": (lambda: tt.scan(min, H, X, np.array([4, 4])), tt.InputError, "length is array"),
    "negative length": (lambda: tt.scan(min, H, None, -1), tt.InputError, "length is -1"),
    "a list of numbers": (lambda: tt.scan(min, H, [1.0, 2.0]), tt.ShapeError, r"xs\[0\] is a single number.*np.array"),
    "xs of strings": (lambda: tt.scan(min, H, {"a": "text"}), tt.DTypeError, r"xs\['a'\] is a str"),
    "xs of objects": (lambda: tt.scan(min, H, np.array([None])), tt.DTypeError, "object"),
    "init of strings": (lambda: tt.scan(min, (H, "h"), X), tt.DTypeError, r"init\[1\] is a str"),
    "complex": (lambda: tt.scan(min, H * 1j, X), tt.DTypeError, "complex"),
    "f": (lambda: tt.scan(H, H, X), tt.InputError, "f is a ndarray"),
    "f is a pair": (lambda: tt.scan((min, max), H, X), tt.InputError, "f is a tuple of 2"),
    "compiled": (lambda: tt.scan(min, H, X, compiled="yes"), tt.InputError, "compiled is 'yes'"),
    "compiled by number": (lambda: tt.scan(min, H, X, compiled=1), tt.InputError, "compiled is 1"),
    "checkpoint": (lambda: tt.scan(min, H, X, checkpoint="64"), tt.InputError, "checkpoint is '64'.*'64 MB'"),
    "checkpoint 0": (lambda: tt.scan(min, H, X, checkpoint=0), tt.InputError, "checkpoint is 0"),
    "checkpoint True": (lambda: tt.scan(min, H, X, checkpoint=True), tt.InputError, "checkpoint is True"),
    "lookback": (lambda: tt.scan(min, H, X, lookback=0), tt.InputError, "lookback is 0"),
    "lookback's kind": (lambda: tt.scan(min, H, X, lookback=1.5), tt.InputError, "lookback is 1.5"),
    "both": (lambda: tt.scan(min, H, X, checkpoint=2, lookback=2), tt.InputError, "both checkpoint and lookback"),
    "compiled lookback": (lambda: tt.scan(min, H, X, lookback=2, compiled=True), tt.InputError, "with lookback"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, words = BAD[case]
    with pytest.raises(error, match=r"(?s)" + words) as caught:
        call()
    assert "\n  help: " in str(caught.value)


def test_an_error_of_fs_own_passes_and_leaves_no_time_step_behind():
    def broken(c, x):
        raise ZeroDivisionError

    with contextlib.suppress(ZeroDivisionError):
        tt.scan(broken, H, X)
    assert (tt.tensor([1.0], requires_grad=True) * 2).node.step is None
