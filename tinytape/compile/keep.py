"""Which values of a step are kept for its adjoint, and which are computed again.

Products are never computed again, nor is the number that a row is summed up to; every other value may be, from kept
ones. The kept values are then a cut between these and what the adjoint reads, and the cut of fewest floats is
found as a maximum flow (Ford & Fulkerson 1956; the same idea serves reverse mode in general, cf. Naumann 2008). Of
several such cuts the one nearest to the adjoint is taken, which leaves least to compute again.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Collection, Iterable
from typing import NamedTuple

from .program import CONTRACTED, Program, Value, topological

__all__ = ["QUICK", "Phases", "closure", "depending", "phases"]

FEW = 16  # elements: shorter axes count as longer, all by the same factor, lest small widths have other kernels
SEEDS = ("seed_carry", "seed_y")
SOURCE, SINK = "source", "sink"
QUICK = {"add", "subtract", "multiply", "negative", "copy"}


class Phases(NamedTuple):
    """The program's values by when they are computed, each in an order in which they can be."""

    forward: list[Value]
    kept: list[Value]
    again: list[Value]  # computed in the backward loop from kept values and inputs
    adjoint: list[Value]  # what depends on the gradients that come in
    sums: list[Value]  # outer, rowsum: added up
    post: list[Value]


def phases(program: Program) -> Phases:
    """Sort a program's values, and decide what to keep."""
    everything = topological(program.roots())
    gradients = (*program.carry_gradients, *program.input_gradients.values(), *program.fixed_gradients.values())
    moving = depending(everything, {g for g in gradients if g is not None})
    adjoint = [v for v in everything if v in moving and v.kind not in CONTRACTED]
    sums = [v for v in everything if v.kind in ("outer", "rowsum")]
    post = [v for v in everything if v.kind == "post"]
    steady = [v for v in everything if v not in moving and v.kind not in ("invariant", *CONTRACTED)]
    read = {v for user in (*adjoint, *sums) for v in user.reads()}.intersection(steady)
    free = {*program.carries, *program.outputs, *(v for v in steady if v.kind in ("carry", "x", "fixed"))}
    cut = _cut(steady, read, free)
    kept = [v for v in steady if v in cut]
    there = free | cut
    needed = closure(read - there, set(steady) - there)
    again = [v for v in steady if v in needed]
    forward = topological([*program.carries, *program.outputs, *kept])
    return Phases(
        [v for v in forward if v.kind not in ("invariant", "carry", "x", "fixed")],
        kept,
        again,
        [v for v in adjoint if v.kind not in SEEDS],
        sums,
        post,
    )


def depending(values: Iterable[Value], others: Collection[Value] = ()) -> set[Value]:
    """Of values in order, those that depend on gradients that come in, or are or depend on one of `others`."""
    found: set[Value] = set()
    for value in values:
        if value.kind in SEEDS or value in others or any(v in found for v in value.reads()):
            found.add(value)
    return found


def closure(roots: Iterable[Value], within: set[Value]) -> set[Value]:
    """`roots` and what they are computed from, as far as that is in `within`."""
    stack = list(roots)
    found = set(stack)
    while stack:
        for value in stack.pop().reads():
            if value in within and value not in found:
                found.add(value)
                stack.append(value)
    return found


def _cut(steady: list[Value], read: set[Value], free: set[Value]) -> set[Value]:
    """The cheapest values to keep: a minimum cut, each value a pair of nodes (value, 0) -> (value, 1)."""
    room: dict[object, dict[object, float]] = {}

    def edge(a: object, b: object, capacity: float) -> None:
        room.setdefault(a, {})
        room.setdefault(b, {}).setdefault(a, 0.0)
        room[a][b] = room[a].get(b, 0.0) + capacity

    endless = float("inf")
    shortest = min((n for v in steady for n in v.shape if n > 1), default=FEW)
    scale = -(-FEW // shortest)
    for value in steady:
        if value in free:
            continue
        edge((value, 0), (value, 1), _price(value, scale))
        if value.kind == "product" or (value.kind == "reduce" and value.size == 1):
            edge(SOURCE, (value, 0), endless)
        else:
            for source in value.reads():
                if source.kind != "invariant" and source not in free:
                    edge((source, 1), (value, 0), endless)
        if value in read:
            edge((value, 1), SINK, endless)
    if SOURCE not in room or SINK not in room:
        return set()
    while (path := _path(room, SOURCE, SINK)) is not None:
        width = min(room[a][b] for a, b in path)
        for a, b in path:
            room[a][b] -= width
            room[b][a] += width
    beyond = _reaching(room, SINK)
    return {v for v in steady if (v, 1) in beyond and (v, 0) in room and (v, 0) not in beyond}


def _price(value: Value, scale: int) -> float:
    """What it costs to keep a value: its size and, where that decides nothing, what it takes to store or to make it.

    A product lies where it is kept from the start, and sums and differences are made again as quickly as they are read.
    """
    if value.kind == "alias":
        return float("inf")  # it has no memory
    quick = value.kind == "map" and value.fn in QUICK
    size = math.prod(n * scale if n > 1 else n for n in value.shape)
    return max(size, 1) * (1.02 if quick else 1.0 if value.kind == "product" else 0.99)


def _path(room: dict[object, dict[object, float]], start: object, goal: object) -> list[tuple[object, object]] | None:
    """A shortest path with room left (Edmonds & Karp 1972)."""
    came: dict[object, object] = {start: start}
    queue = deque([start])
    while queue:
        at = queue.popleft()
        if at == goal:
            path: list[tuple[object, object]] = []
            while at != start:
                path.append((came[at], at))
                at = came[at]
            return path
        for to, left in room[at].items():
            if left > 0 and to not in came:
                came[to] = at
                queue.append(to)
    return None


def _reaching(room: dict[object, dict[object, float]], goal: object) -> set[object]:
    """The nodes from which the goal can still be reached."""
    into: dict[object, list[object]] = {}
    for a, edges in room.items():
        for b, left in edges.items():
            if left > 0:
                into.setdefault(b, []).append(a)
    found, stack = {goal}, [goal]
    while stack:
        for a in into.get(stack.pop(), ()):
            if a not in found:
                found.add(a)
                stack.append(a)
    return found
