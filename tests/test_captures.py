"""What a step takes from outside: a plan is used again only where that is the same."""

import types
from functools import partial

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import nn
from tinytape.compile import captures
from tinytape.compile.captures import look_through

FACTOR = 2.0
TENSOR = tt.tensor([1.0, 2.0], requires_grad=True)


class Scale(nn.Module):
    def __init__(self, by):
        self.by = by
        self.weight = nn.Parameter(np.ones(3, np.float32))

    def forward(self, x):
        return x * self.by * self.weight


def by_global(h, x):
    return h * FACTOR + x * TENSOR, None


def made(number, tensor):
    def step(h, x):
        return h * number + x * tensor, None

    return step


def helper(x):
    return x * FACTOR


def by_helper(h, x):
    return helper(h) + x, None


def test_equal_closures_have_equal_keys_and_their_own_tensors():
    one, two = tt.ones(3), tt.zeros(3)
    first, second = look_through(made(2.0, one)), look_through(made(2.0, two))
    assert first.key == second.key
    assert first.complete and second.complete
    assert [t for t in first.tensors if t is one] == [one] and [t for t in second.tensors if t is two] == [two]


@pytest.mark.parametrize("other", [
    made(3.0, tt.ones(3)),  # another number
    made(2, tt.ones(3)),  # of another kind
    made(2.0, tt.ones(4)),  # another shape
    made(2.0, tt.ones(3).astype("float64")),  # another dtype
    made(2.0, tt.tensor(np.ones(3, np.float32), requires_grad=True)),
    made(-0.0, tt.ones(3)),
    made(True, tt.ones(3)),
])  # fmt: skip
def test_what_differs_has_another_key(other):
    assert look_through(other).key != look_through(made(2.0, tt.ones(3))).key
    assert look_through(other).key != look_through(made(0.0, tt.ones(3))).key


def test_globals_and_the_functions_they_name_are_looked_through(monkeypatch):
    before, through = look_through(by_global), look_through(by_helper)
    assert before.complete and any(t is TENSOR for t in before.tensors)
    monkeypatch.setitem(globals(), "FACTOR", 3.0)
    assert look_through(by_global).key != before.key
    assert look_through(by_helper).key != through.key


def test_names_of_attributes_are_not_globals():
    assert look_through(lambda h, x: (h.TENSOR, None)).tensors == []


def test_modules_are_their_contents():
    model = Scale(2.0)

    def step(h, x):
        return model(h) + x, None

    found = look_through(step)
    assert found.complete and any(t is model.weight for t in found.tensors)
    model.by = 3.0
    assert look_through(step).key != found.key
    model.by = 2.0
    assert look_through(step).key == found.key
    model.eval()
    assert look_through(step).key != found.key


def test_partials_methods_and_a_tensor_met_twice():
    weight = tt.ones(3)
    bound = partial(lambda w, v, h, x: (h * w + v * x, None), weight, weight)
    found = look_through(bound)
    assert found.complete and sum(t is weight for t in found.tensors) == 1
    two = look_through(partial(bound.func, weight, tt.ones(3)))
    assert two.key != found.key  # two tensors are not one tensor twice
    assert two.matched(bound) is None  # nor the other way round


def test_a_variable_that_is_not_assigned_yet():
    def around():
        def step(h, x):
            return h * later, None

        def assign(value):
            nonlocal later
            later = value

        if False:
            later = 0
        return step, assign

    (first, assign), (second, _) = around(), around()
    empty = look_through(first)
    assert empty.complete and look_through(second).key == empty.key
    assign(2.0)
    assert not empty.still_of(first)
    assert look_through(first).key != empty.key == look_through(second).key


class Holder:
    def __init__(self, held):
        self.held = held

    def method(self, h):
        return h


POOL = [
    *[tt.tensor(np.ones(3), requires_grad=wanted) for wanted in (False, False, True)],
    tt.ones(4), tt.tensor([1, 2]), tt.tensor([1, 3]), np.ones(3), np.ones(3), np.zeros(3), TENSOR,
]  # fmt: skip
holds = st.recursive(
    st.sampled_from(
        [None, True, 1, 0, 1.0, 0.0, -0.0, float("nan"), "a", "b", np.float32(1), helper, tt.tanh, np.tanh, *POOL]
    ),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.sampled_from("ab"), inner, max_size=2),
        st.dictionaries(st.sampled_from(["a", 1, None]), inner, max_size=2),
        inner.map(lambda held: [held, held]),
        inner.map(lambda held: partial(helper, held)),
        inner.map(Holder),
        inner.map(lambda held: Holder(held).method),
        inner.map(lambda held: lambda h, x: (held, None)),
        inner.map(lambda held: made(2.0, held)),
        inner.map(lambda held: lambda h, x=held: (h, x)),
    ),
    max_leaves=6,
)


@given(st.lists(holds, min_size=2, max_size=6))
def test_what_is_like_something_known_is_described_alike(held):
    """By whatever way the description is found: functions that differ have other keys, those that do not have one."""
    steps = [made(2.0, content) for content in held]
    for known in (captures._patterns, captures._numbers, captures._settled_functions):
        known.clear()  # now, and not on the way because it is full
    short = [look_through(f) for _ in range(2) for f in steps]
    full = []
    for f in 2 * steps:
        captures._patterns.clear()
        full.append(look_through(f))
    same = [[a.key == b.key for b in short] for a in short]
    assert same == [[a.key == b.key for b in full] for a in full]
    for a, b in zip(short, full, strict=True):
        assert a.complete == b.complete
        assert [id(t) for t in a.tensors] == [id(t) for t in b.tensors]


def test_objects_are_what_they_hold():
    class Box:
        shared = 2.0

        def __init__(self):
            self.factor = 3.0

        def times(self, h):
            return h * self.factor * self.shared

    box = Box()

    def step(h, x):
        return box.times(h), None

    found = look_through(step)
    assert found.complete
    box.factor = 4.0
    changed = look_through(step)
    assert changed.key != found.key
    Box.shared = 5.0
    assert look_through(step).key != changed.key


def test_modules_are_what_is_taken_from_them():
    module = types.ModuleType("settings_of_a_user")
    module.factor, module.other, module.inner = 2.0, 1.0, types.ModuleType("deeper")
    module.inner.power = 2
    namespace = {"settings": module}
    exec("def step(h, x): return h * settings.factor ** settings.inner.power, None", namespace)
    found = look_through(namespace["step"])
    assert found.complete
    module.other = 5.0
    assert look_through(namespace["step"]).key == found.key
    module.factor = 3.0
    changed = look_through(namespace["step"])
    assert changed.key != found.key
    module.inner.power = 3
    assert look_through(namespace["step"]).key != changed.key


def test_a_module_may_be_imported_inside_a_function():
    def made_here():
        import tinytape as inner

        return lambda h, x: (inner.tanh(h), None)

    assert look_through(made_here()).complete


def test_what_has_no_end_is_admitted_to_be_unknown():
    class Link:
        def __init__(self, following):
            self.following = following

    ring = Link(None)
    ring.following = Link(ring)
    assert look_through(lambda h, x: (h if ring else x, None)).complete
    loop = []
    loop.append(loop)
    assert look_through(lambda h, x: (h if loop else x, None)).complete
    chain = None
    for _ in range(5000):
        chain = Link(chain)
    assert not look_through(lambda h, x: (h if chain else x, None)).complete


def test_objects_of_unknown_kinds_are_admitted_to_be_unknown():
    stream = np.random.default_rng(0)
    assert not look_through(lambda h, x: (h * stream.random(), None)).complete

    class Elsewhere:
        def __getattr__(self, name):
            return 2.0

    box = Elsewhere()
    assert not look_through(lambda h, x: (h * box.factor, None)).complete


def test_a_plan_sees_what_changed_in_a_closure():
    """Values, and not only keys: the second call must not use the first one's number."""
    x = np.ones((3, 2, 4), np.float32)
    init = np.zeros((2, 4), np.float32)
    results = []
    for number in (0.5, 0.25):
        for compiled in (True, False):
            carry, _ = tt.scan(made(number, tt.ones(4)), init, x, compiled=compiled)
            results.append(carry.data)
    np.testing.assert_allclose(results[0], results[1])
    np.testing.assert_allclose(results[2], results[3])
    assert not np.allclose(results[0], results[2])
