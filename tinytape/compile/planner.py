"""From values to loops: which values share a loop, and where each value lies.

Products divide the work into stages: each stage is some products and then one loop over the batch's rows, in which
values that are read element by element share loops (`Nest`). What is read only where it was computed stays in
registers.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable
from typing import Any, TypeAlias

from .dims import Dims
from .keep import QUICK
from .loops import Half, Nest, Stage, Store
from .program import Piece, Program, Ref, Shape, Value

__all__ = ["Planner"]

REPEATED = 3  # operations that take no longer than to read a vector

Place: TypeAlias = tuple[str, int, int]
"""Where a value is computed: phase, stage, and nest, or -1 if it is in none."""


class Planner:
    """Half of a program on its way to loops.

    Parameters
    ----------
    dims : Dims
    shared : dict
        The values that have arrays of their own, and which.
    block, step : list of Value
        What is computed for a block of steps at once, and in each step, in an order in which it can be.
    sums : list of Value
        What is summed over steps and rows.
    """

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
        self.where: dict[Value, Place] = {}
        self.again: dict[Value, list[Place]] = {}  # later nests that compute it too
        self.stages: dict[str, list[Stage]] = {}

    def half(self, block_first: bool) -> Half:
        for phase in ("block", "step") if block_first else ("step", "block"):
            self.stages[phase] = self._stages(phase, self.values[phase])
        for place in self._nests():
            self._repeat(place)
        self._leave_out_unread()
        self._add_sums()
        self._place()
        for stage in itertools.chain.from_iterable(self.stages.values()):
            stage.nests = [nest for nest in stage.nests if nest.values]
        return Half(self.stages["block"], self.stages["step"], self.places, self.onto)

    # ---- stages and nests --------------------------------------------------------------------------------------

    def _stages(self, phase: str, values: list[Value]) -> list[Stage]:
        values = self._with_sums_in_place(values)
        level, latest = self._bounds(values)
        stages = [Stage() for _ in range(max(level.values(), default=0) + 1)]
        chosen: dict[Value, int] = {}
        for value in values:
            at = chosen[value] = self._stage_of(value, level, latest, chosen)
            if value.kind == "product":
                stages[at].products.append(value)
            if self._is_pinned(value):
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

    def _is_pinned(self, value: Value) -> bool:
        """Whether it is a product or what one is added to: then it is computed in the first stage it can be in."""
        return value.kind == "product" or value in self.before

    def _bounds(self, values: list[Value]) -> tuple[dict[Value, int], dict[Value, int]]:
        """The first and the last stage that each value can be computed in."""
        level = _depths(values)
        last = max(level.values(), default=0)
        latest = {v: level[v] if self._is_pinned(v) else last for v in values}
        for value in reversed(values):
            read = [v for v in value.reads() if v in level and not self._is_pinned(v)]
            if value in self.before:
                read.append(self.before[value])
            for v in read:
                latest[v] = max(min(latest[v], latest[value] - self._is_pinned(value)), level[v])
        return level, latest

    def _stage_of(
        self, value: Value, level: dict[Value, int], latest: dict[Value, int], chosen: dict[Value, int]
    ) -> int:
        """Next to what it reads from registers; else, if it reads memory alone, next to what reads it."""
        if self._is_pinned(value):
            return latest[value]
        read = [v for v in value.reads() if v in chosen]
        beside = [chosen[v] for v in read if v.kind not in ("product", "alias")]
        at = max(beside) if beside else latest[value] if self.users.get(value) else level[value]
        return min(max(at, level[value], *(chosen[v] for v in read)), latest[value])

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

    def _nests(self) -> list[Place]:
        return [
            (phase, at, i)
            for phase, stages in self.stages.items()
            for at, stage in enumerate(stages)
            for i in range(len(stage.nests))
        ]

    def _nest_at(self, place: Place) -> Nest:
        phase, at, i = place
        return self.stages[phase][at].nests[i]

    def _repeat(self, place: Place) -> None:
        """Compute again, in this nest, what it reads and what takes no longer to compute than to read."""
        nest = self._nest_at(place)
        values: dict[Value, None] = {}
        in_part = _read_in_part(nest.values)
        for user in nest.values:
            for value in user.reads():
                made = [] if value in nest.values else self._quickly_made(value, place[0])
                others = _read_in_part(made)
                # What is computed here is read at the element in hand, and so by all that is computed here.
                if in_part.isdisjoint(made) and others.isdisjoint({*values, *nest.values, *made}):
                    in_part |= others
                    values.update(dict.fromkeys(made))
            values[user] = None
        nest.again = set(values).difference(nest.values)
        nest.values = list(values)
        for value in nest.again:
            self.again.setdefault(value, []).append(place)

    def _quickly_made(self, value: Value, phase: str) -> list[Value]:
        """What to compute for a value, in order. Nothing, if that reads more than one vector beside single numbers."""
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
            nest = self._nest_at(place)
            read: set[Value] = set()
            for value in reversed(nest.values):
                others, is_first = self.again.get(value), self.where[value] == place
                if value in read or not others or (is_first and self._is_read(value, nest)):
                    read.update(value.reads())
                    continue
                nest.values.remove(value)
                if is_first:
                    self.where[value] = others.pop(0)
                    self._nest_at(self.where[value]).again.remove(value)
                else:
                    others.remove(place)
                    nest.again.remove(value)

    def _is_read(self, value: Value, nest: Nest) -> bool:
        """Whether anything reads what `nest` computes from where it is stored."""
        if any(store.value is value for store in nest.stores):
            return True
        for user in self.users.get(value, ()):
            if user.kind not in ("map", "reduce"):
                return True
            for place in (self.where[user], *self.again.get(user, ())):
                if place[2] < 0 or value not in self._nest_at(place).values:
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
            if join.kind == "join" and join not in self.stored and self.added.issuperset(self.users[join]):
                for nest in map(self._nest_at, self._nests()):
                    nest.stores = [store for store in nest.stores if store.target is not join]

    def add_up(self, program: Program) -> None:
        """Gradients of rows from outside are added up where they are computed, and stored nowhere else."""
        gradients = set(program.fixed_gradients.values())
        for nest in map(self._nest_at, self._nests()):
            for store in nest.stores:
                store.adding = store.adding or store.target in gradients

    def _nest_of(self, value: Value) -> Nest | None:
        place = self.where.get(value, ("", 0, -1))
        found = self._nest_at(place) if place[2] >= 0 else None
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

    def _memory_to_read(self, value: Value, read: Value, user: Value, place: Place) -> str | None:
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

    def _shares_loop(self, value: Value, read: Value, user: Value, place: Place) -> bool:
        """Whether a value is read only in a loop that computes it, at the element that was just computed."""
        inside = self._nest_at(place).values if place[2] >= 0 else ()
        refs = [ref for ref in user.refs() if ref.value is read]
        return read is value and value.kind == "map" and value in inside and all(r.is_whole(user.loops) for r in refs)


def _read_in_part(users: Iterable[Value]) -> set[Value]:
    """What they read otherwise than whole and in order."""
    return {ref.value for user in users for ref in user.refs() if not ref.is_whole(user.loops)}


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
