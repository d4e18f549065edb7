"""The loop over time under a `Plan`: its actions carried out on real steps.

Forward, a leaf's worth of steps at a time is recorded and forgotten, which tells what f takes from outside; the tape of
the last leaf stays. Backward, the walk of each leaf goes on from the sums that later leaves have left. So contributions
are added up in the order in which one walk over all steps would have added them, to the same bits.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .. import random
from ..engine.call import NOT_A_VALUE
from ..engine.op import Op
from ..engine.recording import kept_buffers
from ..engine.stand_in import stand_ins, standing_in
from ..engine.tape import Leaf, Node, Part, enable_grad, here, no_grad, take_number, time_step, walk
from ..engine.tensor import Tensor
from ..engine.tree import Array, flatten, unflatten
from . import revolve
from .budget import Plan

if TYPE_CHECKING:
    from .scan import Loop

__all__ = ["Checkpointed", "Inputs"]

Drawn = dict[random.Generator, Any]
Gradients = Sequence["Array | None"]
AfterStep = Callable[[int, list[Tensor], list[Tensor]], None]


class Checkpointed:
    """A scan under a plan: one record on the tape, whose rule carries out what the plan asks for backwards.

    Parameters
    ----------
    loop : Loop
        Whose inputs are `Inputs`.
    init : list of Tensor
        The leaves of the first carry.
    order : sequence of int
        The steps as they are taken.
    definition : callable
        The plain loop, for a walk that is itself differentiated.
    """

    def __init__(
        self, loop: Loop, init: list[Tensor], order: Sequence[int], definition: Callable[[], tuple[Any, Any]]
    ) -> None:
        self.loop, self.init, self.order, self.definition = loop, init, order, definition
        self.stand_ins = stand_ins()
        self.drawn: Drawn = {}  # where generators stood before f first drew from them
        self.outside: dict[Node, None] = {}  # what f takes from outside, in the order of a set that repeats
        # What leads from one step to the next, after so many steps; the same after those that follow, up to the next.
        self.links = [(0, _Links.between([x.node for x in init], []))]

    # ---- bytes ---------------------------------------------------------------------------------------------------

    def step_bytes(self) -> int:
        """What the tape keeps for a step, found by recording two: of the second, what the first does not keep as well.

        Memory of tensors from outside is there in any case. Python's own objects are not counted.
        """
        done: list[int] = []  # the clock after each step
        with self._noting():
            taped, _ = self._tape(0, min(2, len(self.order)), self.init, lambda t, carry, y: done.append(take_number()))
        self._rewind(self.drawn)
        kept: list[dict[int, int]] = [{} for _ in done]
        for node in taped.nodes()[0]:
            kept[bisect_right(done, node.number)].update(kept_buffers(node))
        *before, buffers = kept
        return sum(nbytes for key, nbytes in buffers.items() if not before or key not in before[0])

    def carry_bytes(self) -> int:
        """What a stored state takes."""
        return sum(x.nbytes for x in self.init)

    # ---- forward -------------------------------------------------------------------------------------------------

    def run(self, plan: Plan) -> tuple[Any, Any]:
        """The last carry and the outputs."""
        self.plan = plan
        self.ys: list[Array] = []
        self.tracked: list[bool] = []
        self._begin()
        with self._noting():
            self.last = self._to_leaf(self._sweep, self._put_out)
            assert self.last is not None
            self._note(self.last)
        arrays = [*(x.raw for x in self.carry), *self.ys]
        tracked = [*(node is not None for node in self.last.carries[-1]), *self.tracked]
        self.carry, self.ys = [], []  # they belong to the user now
        results, count = self._record(arrays, tracked), len(self.init)
        form: Any = self.loop.y
        return unflatten(self.loop.carry.tree, results[:count]), unflatten(form.tree, results[count:])

    def _sweep(self, start: int, stop: int, carry: list[Tensor]) -> list[Tensor]:
        """Advance for the first time, and note what the steps have to do with each other and with the outside.

        A leaf's worth of steps is recorded at a time; the plan has memory for that.
        """
        for i in range(start, stop, self.plan.leaf):
            taped, carry = self._tape(i, min(i + self.plan.leaf, stop), carry, self._put_out)
            self._note(taped)
        return carry

    def _put_out(self, t: int, carry: list[Tensor], y: list[Tensor]) -> None:
        if not self.ys:
            self.ys = [np.empty((len(self.order), *x.shape), x.dtype) for x in y]
            self.tracked = [False] * len(y)
        for i, (whole, x) in enumerate(zip(self.ys, y, strict=True)):
            whole[t] = x.raw
            self.tracked[i] |= x.node is not None

    def _note(self, taped: _Taped) -> None:
        for i, carry, y in zip(range(taped.start, taped.stop), taped.carries, taped.ys, strict=True):
            links = _Links.between(carry, y)
            if links != self.links[-1][1]:
                self.links.append((i + 1, links))
        self.outside.update(dict.fromkeys(taped.nodes()[1]))

    def _record(self, arrays: list[Array], tracked: list[bool]) -> list[Tensor]:
        """The results, on the tape."""
        if not any(tracked):
            self._end()
            return [Tensor.of(a) for a in arrays]
        given = [*self.init, *self.inputs.xs]
        parents = (*(x.node for x in given), *self.outside)
        written = [x.node.storage if isinstance(x.node, Leaf) else x.storage for x in given]
        written += [node.storage for node in self.outside if isinstance(node, Leaf)]
        shapes, dtypes = tuple(a.shape for a in arrays), tuple(a.dtype for a in arrays)
        context = here.context
        node = Node(take_number(), _scan, parents, (self,), shapes, dtypes, tuple(written), context.step)
        parts = [Part(node, i) if is_tracked else None for i, is_tracked in enumerate(tracked)]
        results = [Tensor.of(a, part) for a, part in zip(arrays, parts, strict=True)]
        if context.tape is not None:
            context.tape.append(node, (), {}, tuple(results))
        return results

    # ---- backward ------------------------------------------------------------------------------------------------

    def rule(self, gradients: Gradients) -> tuple[Any, ...]:
        """Gradients for the leaves of init, for those of xs, and for what f takes from outside."""
        with self._again():
            count = len(self.init)
            return self._back(list(gradients[:count]), gradients[count:])

    def _back(self, dcarry: list[Array | None], dys: Gradients) -> tuple[Any, ...]:
        taped, self.last = self.last, None
        if taped is None:  # the records are walked once more
            self._begin()
            self._rewind(self.drawn)
            taped = self._to_leaf(self._advance)
        dxs: list[Array | None] = [None] * len(self.inputs.xs)
        sums: dict[Node, Any] = {}  # for what f takes from outside
        while taped is not None:
            gradients = self._walk(taped, self._seeds(taped, dcarry, dys, sums))
            sums = {node: gradients[node] for node in self.outside if node in gradients}
            dcarry = [gradients.get(taped.places[i]) if i in taped.places else None for i in range(len(dcarry))]
            for place, (i, t) in taped.inputs.items():
                if place in gradients:
                    if (dx := dxs[i]) is None:
                        dx = dxs[i] = np.zeros(self.inputs.xs[i].shape, place.dtype)
                    dx[t] = gradients[place]
            del taped, gradients  # before the next leaf is run
            taped = self._to_leaf(self._advance)
        return (*dcarry, *dxs, *(sums.get(node) for node in self.outside))

    def _seeds(
        self, taped: _Taped, dcarry: list[Array | None], dys: Gradients, sums: dict[Node, Any]
    ) -> dict[Node, Any]:
        """Where the walk of a leaf starts, and with what.

        Where an output is also a part of the carry, one walk over all steps would add the output's gradient first.
        So the gradient that a leaf finds for the carry before it already starts from that of the outputs there.
        """
        seeds = dict(sums)

        def add(node: Node | None, gradient: Any) -> None:
            if node is not None and gradient is not None:
                seeds[node] = np.asarray(seeds[node] + gradient) if node in seeds else gradient

        for node, gradient in zip(taped.carries[-1], dcarry, strict=True):
            add(node, gradient)
        done: set[Node | None] = set() if taped.stop == len(self.order) else {*taped.carries[-1]}
        before = self._links_after(taped.start).y
        for j, dy in reversed(list(enumerate(dys))):
            if dy is None:
                continue
            for i, row in zip(range(taped.start, taped.stop), taped.ys, strict=True):
                if i + 1 < taped.stop or row[j] not in done:
                    add(row[j], dy[self.order[i], ...])
            if taped.start and (same := before[j]) is not None:
                add(taped.places[same], dy[self.order[taped.start - 1], ...])
        return seeds

    def _walk(self, taped: _Taped, seeds: dict[Node, Any]) -> dict[Node, Any]:
        ends: dict[Node, None] = dict.fromkeys((*self.outside, *taped.places.values(), *taped.inputs))
        return walk(seeds, ends.keys(), ends=True)

    def _advance(self, start: int, stop: int, carry: list[Tensor]) -> list[Tensor]:
        with no_grad():
            return self._steps(start, stop, [Tensor.of(x.raw, None, x.storage) for x in carry])

    def differentiable_rule(self, node: Node, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run the loop again as it is defined, and walk that."""
        with self._again():
            self._rewind(self.drawn)
            with enable_grad():
                results = flatten(self.definition())
            seeds: dict[Node, Any] = {}
            for x, g in zip(results, gradients, strict=True):
                if x.node is not None:
                    g = g if isinstance(g, Tensor) else Tensor(g)
                    seeds[x.node] = seeds[x.node] + g if x.node in seeds else g
            parents = node.parents or ()
            ends = {parent for parent in parents if parent is not None}
            found = walk(seeds, ends, free=False, differentiable=True, ends=True)
        return tuple(None if parent is None else found.pop(parent, None) for parent in parents)

    # ---- the plan's actions --------------------------------------------------------------------------------------

    def _begin(self) -> None:
        self.actions: Iterator[revolve.Action] = self.plan.actions()
        self.slots: dict[int, tuple[list[Array], Drawn]] = {}
        self.carry = self.init
        self.last: _Taped | None = None

    def _end(self) -> None:
        self.actions, self.slots, self.carry, self.last = iter(()), {}, [], None

    def _to_leaf(
        self, advance: Callable[[int, int, list[Tensor]], list[Tensor]], after_step: AfterStep | None = None
    ) -> _Taped | None:
        """Carry the actions out up to a leaf, and return its tape; None where there are no more."""
        for action in self.actions:
            match action:
                case revolve.Store(at):
                    self.slots[at] = [_apart(x) for x in self.carry], {g: g.state() for g in self.drawn}
                case revolve.Restore(at):
                    arrays, drawn = self.slots[at]
                    self.carry = [Tensor.of(a) for a in arrays]
                    self._rewind(drawn)
                case revolve.Free(at):
                    del self.slots[at]
                case revolve.Advance(start, stop):
                    self.carry = advance(start, stop, self.carry)
                case revolve.Leaf(start, stop):
                    taped, self.carry = self._tape(start, stop, self.carry, after_step)
                    return taped
        return None

    def _tape(
        self, start: int, stop: int, carry: list[Tensor], after_step: AfterStep | None = None
    ) -> tuple[_Taped, list[Tensor]]:
        """Record some steps, cut off from those before; and the carry after them, as constants."""
        born = take_number()
        places: dict[int, Leaf] = {}
        given: list[Tensor] = []
        for x, link in zip(carry, self._links_after(start).carry, strict=True):
            place = None
            if link is not None:
                place = places.get(link) or places.setdefault(link, Leaf(x.shape, x.dtype, None))
            given.append(Tensor.of(x.raw, place, x.storage))
        carries: list[list[Node | None]] = []
        ys: list[list[Node | None]] = []

        def keep_nodes(t: int, carry: list[Tensor], y: list[Tensor]) -> None:
            carries.append([x.node for x in carry])
            ys.append([x.node for x in y])
            if after_step is not None:
                after_step(t, carry, y)

        with enable_grad():
            after = self._steps(start, stop, given, keep_nodes)
        return _Taped(start, stop, born, places, self.inputs.taken(), carries, ys), [x.detach() for x in after]

    def _steps(self, start: int, stop: int, carry: list[Tensor], after_step: AfterStep | None = None) -> list[Tensor]:
        nest = unflatten(self.loop.carry.tree, carry)
        for i in range(start, stop):
            t = self.order[i]
            with time_step(t):
                nest, y = self.loop.take(nest, t)
            if after_step is not None:
                after_step(t, flatten(nest), y)
        return flatten(nest)

    def _links_after(self, count: int) -> _Links:
        return self.links[bisect_right(self.links, count, key=lambda entry: entry[0]) - 1][1]

    @property
    def inputs(self) -> Inputs:
        inputs = self.loop.inputs
        assert isinstance(inputs, Inputs)
        return inputs

    # ---- surroundings --------------------------------------------------------------------------------------------

    @contextmanager
    def _noting(self) -> Generator[None]:
        """Note from which generators f draws; steps do not go on the user's tape one by one."""
        context = here.context
        drawn, tape = context.drawn, context.tape
        context.drawn, context.tape = self.drawn, None
        try:
            yield
        finally:
            context.drawn, context.tape = drawn, tape
            if drawn is not None:
                for generator, state in self.drawn.items():
                    drawn.setdefault(generator, state)

    @contextmanager
    def _again(self) -> Generator[None]:
        """Run steps again as they ran: with the modules' tensors of then, and leaving generators where they stand."""
        context = here.context
        states = {generator: generator.state() for generator in self.drawn}
        rule, tape, context.rule, context.tape = context.rule, context.tape, None, None
        try:
            with standing_in(self.stand_ins):
                yield
        finally:
            context.rule, context.tape = rule, tape
            for generator, state in states.items():
                generator.set_state(state)

    def _rewind(self, states: Drawn) -> None:
        """Let generators go on from `states`; from one that is not there, nothing had been drawn then."""
        for generator, first in self.drawn.items():
            generator.set_state(states.get(generator, first))


class Inputs(Sequence[tuple[Tensor, ...]]):
    """xs, a step at a time; recorded steps have places of their own for gradients."""

    def __init__(self, xs: list[Tensor], steps: int) -> None:
        self.xs, self.steps = xs, steps
        self._places: dict[Leaf, tuple[int, int]] = {}

    def __len__(self) -> int:
        return self.steps

    def __getitem__(self, t: Any) -> Any:
        return tuple([self._part(i, x, t) for i, x in enumerate(self.xs)])

    def _part(self, i: int, x: Tensor, t: int) -> Tensor:
        part, place = x.raw[t, ...], None
        if x.node is not None and here.context.recording:
            place = Leaf(part.shape, part.dtype, None)
            self._places[place] = i, t
        return Tensor.of(part, place, x.storage)

    def taken(self) -> dict[Leaf, tuple[int, int]]:
        """The places made since this was last asked: of which input, and which step."""
        places, self._places = self._places, {}
        return places


class _Links(NamedTuple):
    """What of a step's results is one value: for each leaf, the first leaf of the carry that has the same node.

    A leaf of the carry has None where it is a constant; one of y, where it is no part of the carry.
    """

    carry: tuple[int | None, ...]
    y: tuple[int | None, ...]

    @staticmethod
    def between(carry: Sequence[Node | None], y: Sequence[Node | None]) -> _Links:
        first: dict[Node | None, int] = {}
        for i, node in enumerate(carry):
            if node is not None:
                first.setdefault(node, i)
        return _Links(tuple([first.get(node) for node in carry]), tuple([first.get(node) for node in y]))


class _Taped(NamedTuple):
    """The tape of some steps, by its ends. It holds on to no values but those that the tape itself keeps."""

    start: int
    stop: int
    born: int  # its nodes have higher numbers, those outside lower ones
    places: dict[int, Leaf]  # where gradients for the carry before it arrive, by leaf of the carry
    inputs: dict[Leaf, tuple[int, int]]  # and for inputs
    carries: list[list[Node | None]]  # after each step
    ys: list[list[Node | None]]

    def nodes(self) -> tuple[list[Node], list[Node]]:
        """Its nodes, and those outside that they were computed from."""
        heads = [node for row in (*self.carries, *self.ys) for node in row if node is not None]
        inside: list[Node] = []
        outside: list[Node] = []
        seen = set(heads)
        for node in heads:  # grows while it is walked
            if node.number < self.born:
                outside.append(node)
                continue
            inside.append(node)
            for parent in node.parents or ():
                if parent is not None and parent not in seen:
                    seen.add(parent)
                    heads.append(parent)
        return inside, outside


def _apart(x: Tensor) -> Array:
    """The values in memory of their own: a view would keep all of what it is a part of, and a leaf may be written."""
    shared = x.storage is not None or isinstance(x.raw.base, np.ndarray)
    return x.raw.copy(order="K") if shared else x.raw


def _rule(gradients: tuple[Any, ...], run: Checkpointed) -> tuple[Any, ...]:
    return run.rule(gradients)


def _differentiable_rule(node: Node, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    run: Checkpointed = node.kept[0]
    return run.differentiable_rule(node, gradients)


_scan = Op(lambda *values: values, "scan", "general", True, False)
_scan.rule, _scan.sources, _scan.takes_none = _rule, (NOT_A_VALUE,), True
_scan.differentiable_rule = _differentiable_rule  # pyright: ignore[reportAttributeAccessIssue]
