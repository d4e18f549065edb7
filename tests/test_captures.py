"""What a step takes from outside: a plan is used again only where that is the same."""

import functools
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


@pytest.mark.parametrize("together", [lambda w: (w, w.detach()), lambda w: (w.detach(), w)])
def test_tensors_that_share_their_memory_do_not_pass_for_others(together):
    """A plan knows tensors by their memory: what one such pair is traced to, two tensors must not be taken for."""
    rng = np.random.default_rng(0)
    x, h = rng.normal(size=(4, 2, 3)), rng.normal(size=(2, 3))

    def gradients(one, other, compiled):
        init = tt.tensor(h, requires_grad=True)
        carry, _ = tt.scan(lambda h, x: (tt.tanh(h @ one + x @ other), None), init, x, compiled=compiled)
        (carry * carry).sum().backward()
        return init.grad.data

    weights = [tt.tensor(rng.normal(size=(3, 3)), requires_grad=True) for _ in range(3)]
    pairs = [together(weights[0]), (weights[0], weights[1]), (weights[2].detach(), weights[1]), together(weights[2])]
    for pair in (*pairs, *pairs):
        np.testing.assert_allclose(gradients(*pair, "auto"), gradients(*pair, False), rtol=1e-9)


class Settings:
    factor = 2.0


class Several(list):
    factor = 2.0

    def __getitem__(self, i):
        return self.factor * HERE["factor"]


class Lazy:
    def __init__(self):
        self.held = HERE["factor"]

    @functools.cached_property
    def factor(self):
        return self.held


HERE = {"factor": 2.0}
ORDERED = {"a": 2.0, "b": 3.0}
NOTHING = None


def by_class(h, x):
    return h * Settings.factor, x


def by_attribute(h, x):
    return h * by_attribute.factor, x


def by_order(h, x):
    for i, key in enumerate(ORDERED):
        h = h * ORDERED[key] ** i
    return h, x


def by_what_is_there(h, x):
    try:
        return h * 2.0 if NOTHING is None else h, x
    except NameError:
        return h, x


by_attribute.factor = 2.0
set_here = lambda patch: patch.setitem(HERE, "factor", 3.0)  # noqa: E731
several, get, lazy = Several([1.0]), {"factor": 2.0}.get, Lazy
CHANGES = {
    "an attribute of a class": (by_class, lambda patch: patch.setattr(Settings, "factor", 3.0)),
    "an attribute of a function": (by_attribute, lambda patch: patch.setattr(by_attribute, "factor", 3.0)),
    "the order of a dict": (by_order, lambda patch: patch.setitem(ORDERED, "a", ORDERED.pop("a"))),
    "the kind of a key": (lambda h, x: (h if 1 in NUMBERED else x, x), lambda patch: swap_key()),
    "a name that is gone": (by_what_is_there, lambda patch: patch.delitem(globals(), "NOTHING")),
    "a method of Python's": (lambda h, x: (h * several[0], x), set_here),
    "an attribute of a list": (lambda h, x: (h * several[0], x), lambda patch: several.__setattr__("factor", 4.0)),
    "the owner of a method": (lambda h, x: (h * get("factor"), x), lambda patch: get.__self__.update(factor=3.0)),
    "what a class is made with": (
        lambda h, x: (h * lazy().factor, x),
        lambda patch: patch.setitem(HERE, "factor", 3.0),
    ),
    "the bases of a class": (lambda h, x: (h * Derived.factor, x), lambda patch: rebase()),
}


class Other(Settings):
    factor = 5.0


class Derived(Settings):
    pass


NUMBERED = {1: 2.0}


def swap_key():
    NUMBERED[True] = NUMBERED.pop(1)


def rebase():
    Derived.__bases__ = (Other,)


@pytest.mark.parametrize("what", CHANGES)
def test_a_change_is_seen(what, monkeypatch):
    f, change = CHANGES[what]
    found = look_through(f)
    assert found.complete and found.still_of(f) and look_through(f).key == found.key
    change(monkeypatch)
    assert not found.still_of(f)
    assert look_through(f).key != found.key


UNEQUAL = [
    (0.0, -0.0), (np.float64(0.0), np.float64(-0.0)), (complex(0, 0.0), complex(0, -0.0)), (slice(0, 3), slice(0, 4)),
    (range(0, 3, 2), range(0, 4, 2)), (np.zeros(2), np.zeros(2, ">f8")), (1, True), ([1.0] * 20, [1.0] * 19 + [1]),
    (np.dtype("f4"), np.dtype("f8")), ({1: 2.0}, {True: 2.0}),
]  # fmt: skip


@pytest.mark.parametrize("pair", UNEQUAL, ids=str)
def test_what_equals_another_is_not_the_same(pair):
    (one, same), other = [look_through(made(pair[0], TENSOR)) for _ in range(2)], look_through(made(pair[1], TENSOR))
    assert one.complete and other.complete
    assert one.key == same.key != other.key and other.matched(made(pair[0], TENSOR)) is None


def test_large_closures_are_described():
    numbers = list(np.arange(3000.0).tolist())
    tensors = [tt.ones(1) for _ in range(1500)]
    first, second = look_through(made(numbers, tensors)), look_through(made([*numbers], [*tensors]))
    assert first.complete and first.key == second.key and len(second.tensors) == 1500
    numbers[2000] = -1.0
    assert look_through(made(numbers, tensors)).key != first.key
    assert not look_through(made(np.array([{}], object), TENSOR)).complete  # what is in it may change unseen


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
