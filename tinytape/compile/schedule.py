"""When values are computed: for a block of steps at once, in each step, or when all steps are done.

A scan runs in blocks of steps. Forward, what does not depend on the carry is computed for a whole block first, and
then the steps one by one; backward, the steps come first, and then for the block at once what no earlier step waits
for: the products that lead to dx, and the weights' gradients.

What is computed together becomes loops in `planner`.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .dims import Dims
from .keep import Phases, closure, depending, phases
from .loops import Half
from .planner import Planner
from .program import INPUTS, Program, Ref, Value, topological

__all__ = ["Schedule", "schedule", "settle_roots"]


@dataclass(eq=False)
class Schedule:
    """A program in order. `sums` are the gradients that are computed at a block's end: outer products, column sums."""

    program: Program
    phases: Phases
    forward: Half
    backward: Half | None
    sums: list[Value]


def settle_roots(program: Program) -> None:
    """Give each result a value of its own, so that it can lie in memory of its own.

    A carry may lie where an output lies: then the outputs are the history of the carry.
    """
    claimed: set[Value] = set()
    moving = depending(topological(program.roots()))

    def own(value: Value, free: Collection[Value] = ()) -> Value:
        if value.kind in (*INPUTS, "alias", "invariant") or (value in claimed and value not in free):
            value = _copied(value)
        claimed.add(value)
        return value

    program.outputs = [own(v) for v in program.outputs]
    shared = set(program.outputs)
    program.carries = [own(v, shared) for v in program.carries]

    def own_gradient(value: Value) -> Value:
        """One that no gradient comes into, as behind a sign, may be kept from the forward run: a copy of that."""
        return own(value if value in moving else _copied(value))

    def of_carry(gradient: Value | None, seed: Value) -> Value | None:
        """Zeros where the steps before wait for a gradient and none comes."""
        if gradient is not None:
            return own_gradient(gradient)
        return None if seed.kind == "none" else Value("map", seed.shape, (0.0,), fn="copy")

    pairs = zip(program.carry_gradients, program.carry_seeds, strict=True)
    program.carry_gradients = [of_carry(gradient, seed) for gradient, seed in pairs]
    program.input_gradients = {i: own_gradient(g) for i, g in program.input_gradients.items()}
    program.fixed_gradients = {i: _copied(g) for i, g in program.fixed_gradients.items()}  # each is added up


def _copied(value: Value) -> Value:
    return Value("map", value.shape, (Ref.whole(value),), fn="copy", source=value.source)


def schedule(program: Program, dims: Dims) -> Schedule:
    """Order a program whose roots are settled."""
    found = phases(program)
    places = _places(program, found)
    carries = [v for v in program.inputs if v.kind == "carry"]
    early = closure(_independent(found.forward, carries), set(found.forward))
    steps = [v for v in found.forward if v not in early]
    forward = Planner(dims, places, [v for v in found.forward if v in early], steps, [])
    half = forward.half(block_first=True)
    if not program.carry_seeds:
        return Schedule(program, found, half, None, [])
    steps, late = _split_adjoint(program, found)
    steps += _copies_for_later(program, [*late, *found.sums], dims)
    backward = Planner(dims, places, late, [*found.again, *steps], found.sums)
    other = backward.half(block_first=False)
    backward.add_up(program)
    return Schedule(program, found, half, other, [v for v in found.sums if v not in backward.added])


def _places(program: Program, found: Phases) -> dict[Value, str]:
    """The arrays that a program's results and kept values lie in."""
    places: dict[Value, str] = {}
    for name, values in (("ys", program.outputs), ("carry", program.carries)):
        for i, value in enumerate(values):
            places.setdefault(value, f"{name}{i}")
    gradients = dict(enumerate(program.carry_gradients))
    for name, found_at in (
        ("dcarry", gradients), ("dx", program.input_gradients), ("dfixed", program.fixed_gradients)
    ):  # fmt: skip
        for i, value in found_at.items():
            if value is not None:
                places[value] = f"{name}{i}"
    for value in found.kept:
        places.setdefault(value, "history")
    return places


def _independent(values: list[Value], carries: list[Value]) -> list[Value]:
    """Products that do not depend on the carry."""
    moving = depending([*carries, *values], carries)
    return [v for v in values if v.kind == "product" and v not in moving]


def _split_adjoint(program: Program, found: Phases) -> tuple[list[Value], list[Value]]:
    """The adjoint's values that belong to a step, and those that can wait for the block's end."""
    needed = closure([g for g in program.carry_gradients if g is not None], set(found.adjoint))
    late: set[Value] = set()
    for value in found.adjoint:
        if value not in needed and (value.kind == "product" or any(v in late for v in value.reads())):
            late.add(value)
    return [v for v in found.adjoint if v not in late], [v for v in found.adjoint if v in late]


def _copies_for_later(program: Program, late: list[Value], dims: Dims) -> list[Value]:
    """The gradient of the carry is overwritten in the next step but one: what waits for the block's end has a copy."""
    fleeting = {*program.carry_gradients, *(v for v in program.carry_seeds if v.kind == "seed_carry")}
    copies: dict[Value, Value] = {}

    def lasting(value: Value) -> Value:
        if value not in fleeting:
            return value
        if value not in copies:
            copies[value] = _copied(value)
            dims.add(copies[value])
        return copies[value]

    for value in late:
        value.args = tuple(
            a._replace(value=lasting(a.value)) if isinstance(a, Ref) else lasting(a) if isinstance(a, Value) else a
            for a in value.args
        )
        value.pieces = tuple(p._replace(ref=p.ref._replace(value=lasting(p.ref.value))) for p in value.pieces)
    return list(copies.values())
