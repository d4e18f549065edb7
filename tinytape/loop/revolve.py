"""Schedules that go backwards over many steps with the memory of a few: Revolve, with leaves.

Going backwards over a step needs what the step computed. A *leaf* is a stretch of steps that is run with everything
kept and gone back through at once; a *slot* holds the state before some step, from which one can run again. With
leaves of one step this is Revolve (Griewank & Walther 2000), which is optimal: no schedule with as many slots runs
fewer steps. Leaves of n steps trade a tape of n steps for slots (cf. Gruslys et al. 2016).

The state before step 0 takes a slot. In a best schedule with s slots, at most n * C(s - 1 + j, j) steps are run just
j times before their leaf is; taken for j = 0, 1, ... until there are l of them, that makes

    r * l - n * C(s + r, r - 1),    r the least integer with n * C(s + r, s) >= l,

steps beside the l that are run in leaves.
"""

from __future__ import annotations

from collections.abc import Iterator
from math import comb
from typing import NamedTuple, TypeAlias

__all__ = ["Action", "Advance", "Free", "Leaf", "Restore", "Store", "extra", "schedule"]


class Store(NamedTuple):
    """Keep the current state, the one before step `at`."""

    at: int


class Restore(NamedTuple):
    """Make the stored state before step `at` the current one."""

    at: int


class Advance(NamedTuple):
    """Run from the current state, before step `start`, to the one before step `stop`; keep nothing on the way."""

    start: int
    stop: int


class Leaf(NamedTuple):
    """Run steps start, ..., stop - 1 from the current state, keep everything, and go back through them at once."""

    start: int
    stop: int


class Free(NamedTuple):
    """Forget the stored state before step `at`."""

    at: int


Action: TypeAlias = Store | Restore | Advance | Leaf | Free


def extra(steps: int, slots: int, leaf: int = 1) -> int:
    """How many steps a best schedule runs beside the `steps` that are run in leaves.

    Parameters
    ----------
    steps : int
        All steps, 1 or more.
    slots : int
        States that can be stored at a time, that before step 0 included; 1 or more.
    leaf : int
        The most steps of a leaf, 1 or more.
    """
    r = _repeats(steps, slots, leaf)
    return r * steps - leaf * comb(slots + r, r - 1) if r else 0


def schedule(steps: int, slots: int, leaf: int = 1) -> Iterator[Action]:
    """The actions of a best schedule; the current state is at first the one before step 0.

    All of them up to the first `Leaf`, that one included, are a sweep forward over all steps. Then leaves come by
    falling steps. There are as few leaves as can be; parameters are those of `extra`.
    """
    yield Store(0)
    stored, here = [0], 0
    while steps:  # these are still to be gone back through
        if here != stored[-1]:
            here = stored[-1]
            yield Restore(here)
        while steps - here > leaf:
            free = slots - len(stored) + 1  # slots, that of the current state included
            stop = here + _first_part(steps - here, free, leaf)
            yield Advance(here, stop)
            here = stop
            if steps - here > leaf:
                stored.append(here)
                yield Store(here)
        yield Leaf(here, steps)
        steps = here
        if stored[-1] == here:
            yield Free(stored.pop())
        here = -1  # the current state was used up by the leaf


def _first_part(steps: int, slots: int, leaf: int) -> int:
    """Where to cut: how many steps to advance over before the next state is stored, or the last leaf begins.

    A first part that gets all slots and a second part that gets one less are both best used if neither has more
    steps than with r - 1 and r repeats, nor fewer than with one repeat less. Of the cuts which that allows, this is
    the last.
    """
    r = _repeats(steps, slots, leaf)
    return min(leaf * comb(slots + r - 1, slots), steps - leaf * comb(slots + r - 2, slots - 1))


def _repeats(steps: int, slots: int, leaf: int) -> int:
    """The least r with ``leaf * C(slots + r, slots) >= steps``: how often, at most, a step is advanced over."""
    low, high = -1, 0  # too few; enough
    while leaf * comb(slots + high, slots) < steps:
        low, high = high, 2 * high + 1
    while high - low > 1:
        middle = (low + high) // 2
        if leaf * comb(slots + middle, slots) < steps:
            low = middle
        else:
            high = middle
    return high
