"""From values to loops: which products run when, which values share a loop, and where each value lies.

A scan runs in blocks of steps. Forward, what does not depend on the carry is computed for a whole block first, and
then the steps one by one; backward, the steps come first, and then for the block at once what no earlier step waits
for: the products that lead to dx, and the weights' gradients.

Within a step, products divide the work into stages: each stage is some products and then one loop over the batch's
rows, in which values that are read element by element share loops (`Nest`).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from .dims import Dims
from .keep import QUICK, Phases, phases
from .program import INPUTS, Piece, Program, Ref, Shape, Value

__all__ = ["Half", "Nest", "Schedule", "Stage", "Store", "schedule", "settle_roots"]

REPEATED = 3  # operations that take no longer than to read a vector


@dataclass(eq=False)
class Store:
    """A value of a nest goes to `target`: all of it, or one piece of a join; `adding` to what is there."""

    value: Value
    target: Value
    piece: Piece | None = None
    adding: bool = False


@dataclass(eq=False)
class Nest:
    """Loops over one space, the values computed in them, and what of these is stored."""

    reduced: tuple[int, ...] | None = None  # the axes of the reductions in it, if there are any
    values: list[Value] = field(default_factory=list[Value])
    stores: list[Store] = field(default_factory=list[Store])
    again: set[Value] = field(default_factory=set[Value])  # values that an earlier nest has computed too


@dataclass(eq=False)
class Stage:
    """Some products, and then loops over the rows."""

    products: list[Value] = field(default_factory=list[Value])
    nests: list[Nest] = field(default_factory=list[Nest])


@dataclass(eq=False)
class Half:
    """The forward or the backward part of a block of steps.

    Attributes
    ----------
    block, step : list of Stage
        What is done for the whole block at once (before the steps forward, after them backward), and in each step.
    places : dict
        For each value that lies in memory what kind of memory: "history" (all steps), "block", "step", "row" (one row
        at a time), or the name of an array that comes in or goes out. Others stay in registers.
    onto : dict
        Products that are added to what lies in another value's place.
    """

    block: list[Stage]
    step: list[Stage]
    places: dict[Value, str]
    onto: dict[Value, Value]


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

    def copied(value: Value) -> Value:
        index = tuple((0, 1, i) for i in range(len(value.shape)))
        return Value("map", value.shape, (Ref(value, index),), fn="copy", source=value.source)

    def own(value: Value, free: set[Value] = frozenset()) -> Value:  # pyright: ignore[reportArgumentType]
        if value.kind in (*INPUTS, "alias", "invariant") or (value in claimed and value not in free):
            value = copied(value)
        claimed.add(value)
        return value

    program.outputs = [own(v) for v in program.outputs]
    shared = set(program.outputs)
    program.carries = [own(v, shared) for v in program.carries]
    program.carry_gradients = [
        Value("map", seed.shape, (0.0,), fn="copy") if g is None and seed.kind != "none" else g and own(g)
        for g, seed in zip(program.carry_gradients, program.carry_seeds, strict=True)
    ]
    program.input_gradients = {i: own(g) for i, g in program.input_gradients.items()}
    program.fixed_gradients = {i: copied(g) for i, g in program.fixed_gradients.items()}  # each is added up


def schedule(program: Program, dims: Dims) -> Schedule:
    """Order a program whose roots are settled."""
    found = phases(program)
    places = _places(program, found)
    carries = [v for v in program.inputs if v.kind == "carry"]
    early = _closure(_independent(found.forward, carries), set(found.forward))
    steps = [v for v in found.forward if v not in early]
    forward = _Planner(dims, places, [v for v in found.forward if v in early], steps, [])
    half = forward.half(block_first=True)
    if not program.carry_seeds:
        return Schedule(program, found, half, None, [])
    steps, late = _split_adjoint(program, found)
    steps += _copies_for_later(program, [*late, *found.sums], dims)
    backward = _Planner(dims, places, late, [*found.again, *steps], found.sums)
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
    moving = set(carries)
    for value in values:
        if any(v in moving for v in value.reads()):
            moving.add(value)
    return [v for v in values if v.kind == "product" and v not in moving]


def _closure(roots: Iterable[Value], within: set[Value]) -> set[Value]:
    """`roots` and what they are computed from."""
    stack = list(roots)
    found = set(stack)
    while stack:
        for value in stack.pop().reads():
            if value in within and value not in found:
                found.add(value)
                stack.append(value)
    return found


def _split_adjoint(program: Program, found: Phases) -> tuple[list[Value], list[Value]]:
    """The adjoint's values that belong to a step, and those that can wait for the block's end."""
    needed = _closure([g for g in program.carry_gradients if g is not None], set(found.adjoint))
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
            whole = Ref(value, tuple((0, 1, i) for i in range(len(value.shape))))
            copies[value] = Value("map", value.shape, (whole,), fn="copy", source=value.source)
            dims.add(copies[value])
        return copies[value]

    for value in late:
        value.args = tuple(
            a._replace(value=lasting(a.value)) if isinstance(a, Ref) else lasting(a) if isinstance(a, Value) else a
            for a in value.args
        )
        value.pieces = tuple(p._replace(ref=p.ref._replace(value=lasting(p.ref.value))) for p in value.pieces)
    return list(copies.values())


class _Planner:
    """Half of a program on its way to loops."""

    def __init__(
        self, dims: Dims, shared: dict[Value, str], block: list[Value], step: list[Value], sums: list[Value]
    ) -> None:
        self.dims = dims
        self.places = dict(shared)
        self.stored = set(shared)  # values with an array of their own
        self.sums, self.added = sums, set[Value]()
        self.values = {"block": block, "step": step}
        self.users: dict[Value, list[Value]] = {}
        for user in (*block, *step, *sums):
            for value in user.reads():
                self.users.setdefault(value, []).append(user)
        self.onto: dict[Value, Value] = {}
        self.before: dict[Value, Value] = {}  # of a value that a product is added to: what lies there first
        self.where: dict[Value, tuple[str, int, int]] = {}  # phase, stage, and nest or -1
        self.again: dict[Value, list[tuple[str, int, int]]] = {}  # later nests that compute it too
        self.stages: dict[str, list[Stage]] = {}

    def half(self, block_first: bool) -> Half:
        for phase in ("block", "step") if block_first else ("step", "block"):
            self.stages[phase] = self._stages(phase, self.values[phase])
        for phase, at, i in self._nests():
            self._repeat(phase, at, i)
        self._leave_out_unread()
        self._add_sums()
        self._place()
        for stage in itertools.chain.from_iterable(self.stages.values()):
            stage.nests = [nest for nest in stage.nests if nest.values]
        return Half(self.stages["block"], self.stages["step"], self.places, self.onto)

    # ---- stages and nests --------------------------------------------------------------------------------------

    def _stages(self, phase: str, values: list[Value]) -> list[Stage]:
        values = self._with_sums_in_place(values)
        here = set(values)
        level: dict[Value, int] = {}
        for value in values:
            below = max((level[v] for v in value.reads() if v in here), default=0)
            level[value] = below + (value.kind == "product")
        last = max(level.values(), default=0)
        latest = {v: level[v] if v.kind == "product" or v in self.before else last for v in values}
        for value in reversed(values):
            bound = latest[value] - (value.kind == "product" or value in self.before)
            for v in value.reads():
                if v in here and v.kind != "product" and v not in self.before:
                    latest[v] = max(min(latest[v], bound), level[v])
            if value in self.before:
                first = self.before[value]
                latest[first] = max(min(latest[first], bound), level[first])
        stages = [Stage() for _ in range(last + 1)]
        chosen: dict[Value, int] = {}
        for value in values:
            # Next to what it reads from registers; else, if it reads memory alone, next to what reads it.
            beside = [chosen[v] for v in value.reads() if v in chosen and v.kind not in ("product", "alias")]
            at = latest[value] if value.kind == "product" or value in self.before else max(beside, default=-1)
            if at < 0:
                at = latest[value] if self.users.get(value) else level[value]
            ready = max((chosen[v] for v in value.reads() if v in chosen), default=0)
            at = chosen[value] = min(max(at, level[value], ready), latest[value])
            if value.kind == "product":
                stages[at].products.append(value)
            if value.kind == "product" or value in self.before:
                self.where[value] = phase, at, -1
            elif value.kind == "alias":
                self.where[value] = self.where.get(value.args[0], (phase, at, -1))
            elif value.kind == "join":
                self._join(stages[at], value, phase, at)
            else:
                self._into_nest(stages[at], value, phase, at)
        for value in values:
            first = self.before.get(value)
            if first is not None:
                _, at, nest = self.where[first]
                stages[at].nests[nest].stores.append(Store(first, value))
        return stages

    def _with_sums_in_place(self, values: list[Value]) -> list[Value]:
        """Find sums with a product that are stored anyway: the product is then added to the other part in place."""
        here, seen, depths = set(values), set[Value](), _depths(values)
        result: list[Value] = []
        for value in values:
            if value.kind == "map" and value.fn == "add" and value in self.stored:
                for product, rest in (value.args, value.args[::-1]):
                    product = self._alone(product, value, here)
                    other = rest.value if isinstance(rest, Ref) and rest.is_whole(value.shape) else None
                    if product is None or (other is not None and depths.get(other, 0) >= depths[product]):
                        continue
                    if other is None or other.kind != "map" or other not in seen or other in self.before:
                        if any(depths.get(v, 0) >= depths[product] for v in value.reads() if v is not product):
                            continue
                        other = self._copy(value.shape, rest, value)
                        result.append(other)
                        for read in other.reads():
                            self.users.setdefault(read, []).append(other)
                    self.onto[product], self.before[value] = value, other
                    break
            seen.add(value)
            result.append(value)
        return result

    def _alone(self, arg: Any, reader: Value, here: set[Value]) -> Value | None:
        """A product that is read whole by `reader`, and by nothing else."""
        if not (isinstance(arg, Ref) and arg.is_whole(reader.shape) and arg.value.kind == "product"):
            return None
        alone = arg.value in here and self.users.get(arg.value) == [reader] and arg.value not in self.stored
        return arg.value if alone else None

    def _copy(self, shape: Shape, arg: Any, cause: Value) -> Value:
        copy = Value("map", shape, (arg,), fn="copy", source=cause.source)
        self.dims.add(copy)
        return copy

    def _into_nest(self, stage: Stage, value: Value, phase: str, at: int) -> None:
        space = value.loops
        axes = value.axes if value.kind == "reduce" else None
        extent = self.dims.of_space(value)
        first = 0
        for ref in value.refs():
            place = self.where.get(ref.value)
            if place is not None and place[:2] == (phase, at) and place[2] >= 0:
                first = max(first, place[2] + (not (ref.value.kind == "map" and ref.is_whole(space))))
        for i in range(first, len(stage.nests)):
            nest = stage.nests[i]
            if self.dims.of_space(nest.values[0]) == extent and (axes is None or nest.reduced in (None, axes)):
                break
        else:
            stage.nests.append(Nest())
            i, nest = len(stage.nests) - 1, stage.nests[-1]
        nest.reduced = nest.reduced if axes is None else axes
        nest.values.append(value)
        self.where[value] = phase, at, i

    def _join(self, stage: Stage, value: Value, phase: str, at: int) -> None:
        """Each piece is stored where it is computed, or copied."""
        last = 0
        for piece in value.pieces:
            source, place = piece.ref.value, self.where.get(piece.ref.value)
            near = place is not None and place[:2] == (phase, at) and place[2] >= 0
            if not (near and _is_direct(piece)):
                source = self._copy(_extent(piece), piece.ref, value)
                self.users.setdefault(piece.ref.value, []).append(source)
                self._into_nest(stage, source, phase, at)
            nest = self.where[source][2]
            stage.nests[nest].stores.append(Store(source, value, piece))
            last = max(last, nest)
        self.where[value] = phase, at, last

    # ---- values in several nests -------------------------------------------------------------------------------

    def _nests(self) -> list[tuple[str, int, int]]:
        return [
            (phase, at, i)
            for phase, stages in self.stages.items()
            for at, stage in enumerate(stages)
            for i in range(len(stage.nests))
        ]

    def _repeat(self, phase: str, at: int, i: int) -> None:
        """Compute again, in this nest, what it reads and what takes no longer to compute than to read."""
        nest = self.stages[phase][at].nests[i]
        values: dict[Value, None] = {}
        apart = {ref.value for user in nest.values for ref in user.refs() if not ref.is_whole(user.loops)}
        for user in nest.values:
            for value in user.reads():
                made = [] if value in nest.values else self._quickly_made(value, phase)
                if apart.isdisjoint(made):  # else its other elements are read there too
                    values.update(dict.fromkeys(made))
            values[user] = None
        nest.again = set(values).difference(nest.values)
        nest.values = list(values)
        for value in nest.again:
            self.again.setdefault(value, []).append((phase, at, i))

    def _quickly_made(self, value: Value, phase: str) -> list[Value]:
        """What to compute for a value, in order, if that reads one vector, and else single numbers: no more than it."""
        found: dict[Value, None] = {}
        vectors: set[Ref] = set()

        def follow(value: Value) -> None:
            for ref in value.refs():
                if self._is_quick(ref.value, phase) and ref.is_whole(value.shape):
                    follow(ref.value)
                elif any(axis is not None for _, _, axis in ref.index):
                    vectors.add(ref)
            found[value] = None

        if self._is_quick(value, phase):
            follow(value)
        return list(found) if len(vectors) <= 1 and len(found) <= REPEATED else []

    def _is_quick(self, value: Value, phase: str) -> bool:
        """Whether it is an operation of a nest that is as quick as to read its result."""
        there, _, nest = self.where.get(value, ("", 0, -1))
        return value.fn in QUICK and value.kind == "map" and there == phase and nest >= 0 and value not in self.stored

    def _leave_out_unread(self) -> None:
        """Where a nest has no need of a value that others compute as well, leave it to them."""
        for place in reversed(self._nests()):
            phase, at, i = place
            nest = self.stages[phase][at].nests[i]
            read: set[Value] = set()
            for value in reversed(nest.values):
                others = self.again.get(value)
                if others and value not in read and not (self.where[value] == place and self._is_read(value, nest)):
                    nest.values.remove(value)
                    if self.where[value] == place:
                        self.where[value] = phase, at, i = others[0]
                        self.stages[phase][at].nests[i].again.remove(value)
                    others.remove(self.where[value] if value not in nest.again else place)
                    nest.again.discard(value)
                else:
                    read.update(value.reads())

    def _is_read(self, value: Value, nest: Nest) -> bool:
        """Whether anything reads what `nest` computes from where it is stored."""
        if any(store.value is value for store in nest.stores):
            return True
        for user in self.users.get(value, ()):
            if user.kind not in ("map", "reduce"):
                return True
            for phase, at, i in (self.where[user], *self.again.get(user, ())):
                if i < 0 or value not in self.stages[phase][at].nests[i].values:
                    return True
        return False

    # ---- sums --------------------------------------------------------------------------------------------------

    def _add_sums(self) -> None:
        """Sums over rows of what a nest computes are added up there; others wait for the block's end."""
        for value in self.sums:
            if value.kind != "rowsum":
                continue
            source = value.args[0]
            parts = [(p.ref.value, p) for p in source.pieces] if source.kind == "join" else [(source, None)]
            nests = [self._nest_of(v) if p is None or _is_direct(p) else None for v, p in parts]
            if all(nest is not None for nest in nests):
                for (v, piece), nest in zip(parts, nests, strict=True):
                    assert nest is not None
                    nest.stores.append(Store(v, value, piece, adding=True))
                self.added.add(value)
        for value in self.added:
            join = value.args[0]
            if join.kind == "join" and self.added.issuperset(self.users[join]):  # nobody reads it as a whole
                for phase, at, i in self._nests():
                    nest = self.stages[phase][at].nests[i]
                    nest.stores = [store for store in nest.stores if store.target is not join]

    def add_up(self, program: Program) -> None:
        """Gradients of rows from outside are added up where they are computed, and stored nowhere else."""
        gradients = set(program.fixed_gradients.values())
        for stage in itertools.chain.from_iterable(self.stages.values()):
            for store in itertools.chain.from_iterable(nest.stores for nest in stage.nests):
                store.adding = store.adding or store.target in gradients

    def _nest_of(self, value: Value) -> Nest | None:
        phase, at, nest = self.where.get(value, ("", 0, -1))
        found = self.stages[phase][at].nests[nest] if nest >= 0 else None
        return found if found is not None and value in found.values and value.kind == "map" else None

    # ---- places ------------------------------------------------------------------------------------------------

    def _place(self) -> None:
        for phase in self.stages.values():
            for stage in phase:
                joins = [s.target for n in stage.nests for s in n.stores if s.piece is not None and not s.adding]
                for value in (*stage.products, *(v for n in stage.nests for v in n.values), *joins):
                    place = None if value in self.places or value in self.onto else self._memory_for(value)
                    if place is not None:
                        self.places[value] = place
                for nest in stage.nests:
                    nest.stores.extend(Store(v, v) for v in nest.values if v in self.places and v not in nest.again)

    def _memory_for(self, value: Value) -> str | None:
        """What kind of memory a value needs that has no array of its own. None: it stays in registers."""
        phase, *_ = self.where[value]
        kinds = {None if value.kind == "map" else "step" if value.kind == "product" else "row"}
        if value.kind == "product" and phase == "block":
            kinds.add("block")
        aliases = [(value, user) for user in self.users.get(value, ())]
        while aliases:
            read, user = aliases.pop()
            if user.kind == "alias":
                kinds.add("row")
                aliases.extend((user, u) for u in self.users.get(user, ()))
            elif user.kind in ("outer", "rowsum"):
                kinds.add(None if user in self.added else "block")
            else:
                for place in (self.where[user], *self.again.get(user, ())):
                    kinds.add(self._memory_to_read(value, read, user, place))
        return next((kind for kind in ("block", "step", "row") if kind in kinds), None)

    def _memory_to_read(self, value: Value, read: Value, user: Value, place: tuple[str, int, int]) -> str | None:
        """What kind of memory `user`, which is computed at `place`, needs of a value that it reads as `read`."""
        phase, at, _ = self.where[value]
        there, later, _ = place
        if self.before.get(user) is read:  # it is stored where the product will be added to it
            return None
        if user.kind not in ("product", "join") and self._shares_loop(value, read, user, place):
            return None
        if there != phase:
            return "block"
        if user.kind == "product" or later != at:
            return "block" if phase == "block" else "step"
        if user.kind == "join":
            pieces = [p for p in user.pieces if p.ref.value is read]
            return None if read is value and value.kind == "map" and all(map(_is_direct, pieces)) else "row"
        return "row"

    def _shares_loop(self, value: Value, read: Value, user: Value, place: tuple[str, int, int]) -> bool:
        """Whether a value is read only in a loop that computes it, at the element that was just computed."""
        phase, at, nest = place
        inside = self.stages[phase][at].nests[nest].values if nest >= 0 else ()
        refs = [ref for ref in user.refs() if ref.value is read]
        return read is value and value.kind == "map" and value in inside and all(r.is_whole(user.loops) for r in refs)


def _extent(piece: Piece) -> Shape:
    return tuple(n for _, _, n in piece.place)


def _is_direct(piece: Piece) -> bool:
    """Whether it holds all of a map, in order."""
    return piece.ref.value.kind == "map" and piece.ref.is_whole(_extent(piece))


def _depths(values: list[Value]) -> dict[Value, int]:
    """How many products lie on the longest way to each value."""
    depths: dict[Value, int] = {}
    for value in values:
        depths[value] = max((depths.get(v, 0) for v in value.reads()), default=0) + (value.kind == "product")
    return depths
