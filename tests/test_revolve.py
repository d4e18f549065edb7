"""Schedules of Revolve: counted on a cell, against the closed formula and dynamic programming."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytape.loop.revolve import Advance, Free, Leaf, Restore, Store, extra, schedule


class Runner:
    """A cell of one number, h <- sin(h) + 0.1, taken forward and back by a schedule."""

    def __init__(self, steps, slots, leaf=1):
        self.calls = self.most_stored = self.longest = self.leaves = self.peak = 0
        stored, h, here, self.gradient, left = {}, 0.5, 0, 1.0, steps
        runs = [0] * steps
        for action in schedule(steps, slots, leaf):
            match action:
                case Store(at):
                    assert at == here and at not in stored
                    stored[at] = h
                    self.most_stored = max(self.most_stored, len(stored))
                case Restore(at):
                    h, here = stored[at], at
                case Free(at):
                    del stored[at]
                case Advance(start, stop):
                    assert start == here < stop < left
                    for t in range(start, stop):
                        h = self.cell(h)
                        runs[t] += 1
                    here = stop
                case Leaf(start, stop):
                    assert start == here < stop == left
                    tape = []
                    for t in range(start, stop):
                        tape.append(math.cos(h))
                        h = self.cell(h)
                        runs[t] += 1
                    for slope in reversed(tape):
                        self.gradient *= slope
                    self.leaves, self.longest, left, here = self.leaves + 1, max(self.longest, len(tape)), start, None
                    self.peak = max(self.peak, len(stored) * 1000 + len(tape))
        assert left == 0 and not stored
        self.runs = runs

    def cell(self, h):
        self.calls += 1
        return math.sin(h) + 0.1


def derivative(steps):
    h, slope = 0.5, []
    for _ in range(steps):
        slope.append(math.cos(h))
        h = math.sin(h) + 0.1
    gradient = 1.0
    for s in reversed(slope):
        gradient *= s
    return gradient


def closed_formula(steps, slots):
    r = next(r for r in range(steps + 1) if math.comb(slots + r, slots) >= steps)
    return r * steps - (math.comb(slots + r, r - 1) if r else 0)


def test_forward_steps_are_the_closed_formula():
    for steps in range(1, 201):
        expected = derivative(steps)
        for slots in range(1, 21):
            run = Runner(steps, slots)
            assert run.calls == closed_formula(steps, slots) + steps == extra(steps, slots) + steps, (steps, slots)
            assert run.gradient == expected and run.most_stored <= slots


@pytest.mark.parametrize(
    ("steps", "slots", "expected"),
    [(100, 3, 490), (100, 10, 222), (1000, 3, 12155), (1000, 10, 3636), (1000, 50, 1948)],
)
def test_known_figures(steps, slots, expected):
    assert extra(steps, slots) == expected


@pytest.mark.parametrize("leaf", [1, 2, 3, 7])
def test_no_schedule_runs_fewer_steps(leaf):
    """Dynamic programming over where to store the next state."""
    least = {}
    for slots in range(1, 7):
        for steps in range(1, 61):
            if steps <= leaf:
                least[steps, slots] = 0
                continue
            cuts = [k for k in range(1, steps) if slots > 1 or steps - k <= leaf]
            least[steps, slots] = min(k + least[k, slots] + least.get((steps - k, slots - 1), 0) for k in cuts)
            run = Runner(steps, slots, leaf)
            assert run.calls - steps == least[steps, slots] == extra(steps, slots, leaf), (steps, slots)
            assert run.longest <= leaf and run.leaves == -(-steps // leaf)


@given(steps=st.integers(1, 300), slots=st.integers(1, 40), leaf=st.integers(1, 50))
def test_any_schedule(steps, slots, leaf):
    run = Runner(steps, slots, leaf)
    assert run.calls == steps + extra(steps, slots, leaf)
    assert run.gradient == derivative(steps)
    assert run.longest == min(leaf, steps) and run.leaves == -(-steps // leaf)
    if steps > leaf:  # all memory is in use at one moment, but for slots that are never needed
        assert run.peak == min(slots, -(-steps // leaf) - 1) * 1000 + leaf


@given(leaf=st.integers(1, 20), leaves=st.integers(1, 40), more=st.integers(-1, 2))
def test_where_all_leaves_begin_at_stored_states_steps_run_twice(leaf, leaves, more):
    steps, slots = leaf * leaves, max(1, leaves + more)
    assert max(Runner(steps, slots, leaf).runs) <= 2 and extra(steps, slots, leaf) == steps - leaf


def test_long_schedules_are_made_as_they_are_needed():
    actions = schedule(10**12, 30, 1000)
    assert next(actions) == Store(0) and isinstance(next(actions), Advance)
    assert extra(10**12, 1, 1) == (10**12 - 1) * 10**12 // 2
