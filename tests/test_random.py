"""Generators: seeds, states, copies, what they draw, and what they refuse."""

import copy
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape.engine.tape import here

DRAWS = {
    "uniform": lambda g: g.uniform((3, 2)),
    "uniform64": lambda g: g.uniform(3, -2, 5, np.float64),
    "normal": lambda g: g.normal((2, 3), 1.0, 2.0),
    "bernoulli": lambda g: g.bernoulli((4, 4), 0.3),
    "integers": lambda g: g.integers(2, 9, (5,)),
    "permutation": lambda g: g.permutation(7),
}


@given(seed=st.integers(0, 2**70), names=st.lists(st.sampled_from(sorted(DRAWS)), min_size=1, max_size=5))
def test_a_seed_and_a_state_determine_every_draw(seed, names):
    a, b = tt.Generator(seed), tt.Generator(seed)
    for name in names:
        np.testing.assert_array_equal(DRAWS[name](a), DRAWS[name](b))
    state, twin = a.state(), a.copy()
    assert state.dtype == np.uint8
    first = [DRAWS[name](a) for name in names]
    np.testing.assert_equal([DRAWS[name](twin) for name in names], first)
    a.set_state(state)
    np.testing.assert_equal([DRAWS[name](a) for name in names], first)


def test_a_state_holds_half_a_draw():
    """PCG64 makes two float32 of one 64-bit number; the other half belongs to the state."""
    a = tt.Generator(0)
    a.uniform(1)
    b = a.copy()
    np.testing.assert_array_equal(a.uniform(3), b.uniform(3))


def test_the_stream_is_pcg64s_own():
    expected = np.random.Generator(np.random.PCG64(5)).standard_normal(4, np.float32)
    np.testing.assert_array_equal(tt.Generator(5).normal(4), expected)


def test_kinds_and_ranges():
    g = tt.Generator(1)
    u = g.uniform((1000,), -3, 2)
    assert u.dtype == np.float32 and u.min() >= -3 and u.max() <= 2 and abs(u.mean() + 0.5) < 0.2
    assert g.uniform((), dtype="float64").shape == ()
    n = g.normal((4000,), 3.0, 0.5, np.float64)
    assert n.dtype == np.float64 and abs(n.mean() - 3) < 0.05 and abs(n.std() - 0.5) < 0.05
    assert abs(g.bernoulli(4000, 0.2).mean() - 0.2) < 0.04
    assert not g.bernoulli(100, 0.0).any() and g.bernoulli(100, 1.0).all()
    assert set(g.integers(3, 6, 200).tolist()) == {3, 4, 5}
    assert sorted(g.permutation(6).tolist()) == list(range(6))


def test_manual_seed():
    assert tt.manual_seed(3) is tt.default_generator
    a = tt.default_generator.uniform(4)
    tt.manual_seed(3)
    np.testing.assert_array_equal(tt.default_generator.uniform(4), a)
    assert not np.array_equal(tt.Generator().uniform(4), tt.Generator().uniform(4))


def test_deepcopy_is_a_generator_of_its_own():
    a = tt.Generator(2)
    a.uniform(3)
    b = copy.deepcopy(a)
    np.testing.assert_array_equal(a.uniform(3), b.uniform(3))


def test_a_draw_is_noted_before_it_is_made():
    """What `checkpoint` builds on: the first draw in its block notes the state from which to draw again."""
    g, quiet = tt.Generator(4), tt.Generator(5)
    here.context.drawn = noted = {}
    try:
        first = g.bernoulli(5), g.uniform(3)
    finally:
        here.context.drawn = None
    assert list(noted) == [g] and quiet not in noted
    g.set_state(noted[g])
    np.testing.assert_equal((g.bernoulli(5), g.uniform(3)), first)


@pytest.mark.parametrize("seed", [-1, 1.5, "7", True])
def test_bad_seeds(seed):
    with pytest.raises(tt.InputError, match="seed"):
        tt.manual_seed(seed)
    with pytest.raises(tt.InputError, match="seed"):
        tt.Generator(seed)


@pytest.mark.parametrize(
    "state",
    [np.zeros(39, np.uint8), np.zeros(40, np.int64), np.zeros((40, 1), np.uint8), np.zeros(40, np.uint8), "x", None],
    ids=["short", "int64", "matrix", "no state", "text", "None"],
)
def test_bad_states_change_nothing(state):
    g = tt.Generator(0)
    before = g.state()
    with pytest.raises(tt.InputError, match="set_state"):
        g.set_state(state)
    np.testing.assert_array_equal(g.state(), before)


@pytest.mark.parametrize(
    ("draw", "error", "words"),
    [
        (lambda g: g.uniform(3, 2.0, 1.0), tt.InputError, "low = 2.0.*high = 1.0"),
        (lambda g: g.normal(3, 0.0, -1.0), tt.InputError, "std is -1.0"),
        (lambda g: g.bernoulli(3, 1.2), tt.InputError, "p is 1.2"),
        (lambda g: g.bernoulli(3, float("nan")), tt.InputError, "p is nan"),
        (lambda g: g.integers(3, 3), tt.InputError, "low = 3, high = 3"),
        (lambda g: g.permutation(-1), tt.InputError, "n is -1"),
        (lambda g: g.uniform((2, -1)), tt.ShapeError, "negative"),
        (lambda g: g.normal(3, dtype=np.int64), tt.DTypeError, "int64"),
    ],
)
def test_bad_draws_draw_nothing(draw, error, words):
    g = tt.Generator(0)
    before = g.state()
    with pytest.raises(error, match=words):
        draw(g)
    np.testing.assert_array_equal(g.state(), before)


def test_numpy_random_is_not_imported_before_the_first_draw():
    code = "import sys, tinytape; print('numpy.random' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize("before", [0, 1])
@pytest.mark.parametrize("count", [1, 7, 1 << 14, (1 << 14) + 1, (1 << 14) + 2])
@pytest.mark.parametrize("p", [0.0, 2.0**-24, 0.1, 1 / 3, 0.5, 1 - 2.0**-25, 1.0])
def test_bernoulli_compares_uniform_numbers_with_p(before, count, p):
    ours, theirs = tt.Generator(3), tt.Generator(3)
    for generator in (ours, theirs):
        generator.uniform((before,), dtype=np.float32)  # may leave half a draw over
    found = ours.bernoulli(count, p)
    np.testing.assert_array_equal(found, theirs.uniform(count, dtype=np.float32) < np.float64(p))
    np.testing.assert_array_equal(ours.uniform(3, dtype=np.float32), theirs.uniform(3, dtype=np.float32))
