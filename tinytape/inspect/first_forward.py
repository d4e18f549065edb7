"""Which op of a forward pass first made what is not finite in the result. Nothing is recorded."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from ..engine.errors import InputError
from ..engine.op import Op
from ..engine.recording import Tape
from ..engine.tape import Node, here, no_grad
from ..engine.tree import Array, flatten
from .finding import NOWHERE, Finding, is_finite, place_of_call, raw_of, summary
from .search import Call, Search, Steps, run

__all__ = ["forward"]


def forward(search: Search, f: Callable[..., Any], args: tuple[Any, ...]) -> tuple[Finding | None, Finding | None]:
    """Who is to blame for the result of ``f(*args)``, None if that is finite; and what did not reach it."""
    tape = _Watch(search)
    try:
        with no_grad(), tape:
            result = run(f, args)
    except InputError:
        if tape.first is None:
            raise
        return tape.first.finding, None  # it may be what was refused
    if is_finite(result):
        return None, tape.first and tape.first.finding
    event = tape.origins.find(result.raw) or tape.first
    if event is None:
        return Finding("forward", "result", "", summary("", result), search.layout.find(result.raw, None)[0]), None
    return event.finding, None


class _Event:
    """A value that was the first not to be finite, and whether that is as it was meant."""

    def __init__(self, finding: Finding, meant: bool) -> None:
        self.finding, self.meant = finding, meant


class _Origins:
    """Which event an array owes its NaN or infinity to. Arrays are known as long as they live."""

    def __init__(self) -> None:
        self._events: dict[int, tuple[weakref.ref[Array], _Event]] = {}

    def find(self, raw: Array) -> _Event | None:
        found = self._events.get(id(raw))
        return None if found is None else found[1]

    def put(self, raw: Array, event: _Event) -> None:
        key = id(raw)
        self._events[key] = weakref.ref(raw, lambda _: self._events.pop(key, None)), event


class _Watch(Tape):
    """Looks at every op's result and keeps none. A tape that keeps calls has loops run step by step."""

    def __init__(self, search: Search) -> None:
        super().__init__(keep_calls=True)
        self.search = search
        self.steps = Steps(search.before)
        self.origins = _Origins()
        self.first: _Event | None = None

    def append(self, node: Node, args: tuple[Any, ...], params: dict[str, Any], out: Any) -> None:
        if node.op is not None:  # where a function records in spite of no_grad
            self.note(node.op, args, params, out)

    def note(self, op: Op, args: tuple[Any, ...], params: dict[str, Any], out: Any) -> None:
        outs: tuple[Any, ...] = out if op.several else (out,)
        self.steps.add(here.context.step, Call(op.name, args, outs[0].raw))
        wrong = [x.raw for x in outs if not is_finite(x)]
        if wrong:
            event = self._event(op, args, wrong[0])
            for raw in wrong:
                self.origins.put(raw, event)

    def _event(self, op: Op, args: tuple[Any, ...], made: Array) -> _Event:
        """What a result owes it to: an argument's, or else the op."""
        given = [x for arg in flatten(args) if (x := raw_of(arg)) is not None and not is_finite(x)]
        with_nan = [x for x in given if _has_nan(x)]
        events = [self._event_of(x, op) for x in with_nan or given]
        event = next((event for event in events if not event.meant), None)
        if event is not None:
            if _has_nan(made) and not with_nan and not event.finding.turned:
                event.finding = replace(event.finding, turned=self._turned(op))
            return event
        if events and not _has_nan(made):
            return events[0]
        return self._new("op", op, args, made, meant=op.name in self.search.ignore and not _has_nan(made))

    def _event_of(self, raw: Array, op: Op) -> _Event:
        """The event behind an argument; one that no op made was there before."""
        event = self.origins.find(raw)
        if event is None:
            kind, name = self.search.known.owner_of(raw)
            meant = kind == "constant" and not _has_nan(raw)  # as in where(mask, scores, -inf)
            event = self._new(kind, op, (), raw, name, meant)
            self.origins.put(raw, event)
        return event

    def _new(
        self,
        kind: Literal["op", "parameter", "input", "constant"],
        op: Op,
        args: tuple[Any, ...],
        raw: Array,
        name: str = "",
        meant: bool = False,
    ) -> _Event:
        known, context = self.search.known, here.context
        index, step, row = self.search.layout.find(raw, context.step if kind == "op" else None)
        finding = Finding(
            phase="forward",
            kind=kind,
            op=op.name,
            value=summary("", raw),
            index=index,
            name=name,
            step=step if kind != "parameter" else None,
            row=row if kind != "parameter" else None,
            place=place_of_call(known.modules, run.__code__, NOWHERE),
        )
        if kind == "op":
            finding = replace(
                finding,
                parameters=self.steps.parameters(known),
                inputs=[summary(_name(op, i), x) for i, x in enumerate(flatten(args)) if raw_of(x) is not None],
                before=self.steps.norms(),
            )
        event = _Event(finding, meant)
        if not meant:
            self.first = self.first or event
        return event

    def _turned(self, op: Op) -> str:
        step, place = here.context.step, place_of_call(self.search.known.modules, run.__code__, NOWHERE)
        return f"{op.name} made NaN of it{'' if step is None else f' in step {step}'}" + (
            f": {place.line}" if place.line else ""
        )


def _has_nan(raw: Array) -> bool:
    return bool(np.isnan(raw).any())


def _name(op: Op, i: int) -> str:
    """An argument's name."""
    return f"{op.arguments[0]}[{i}]" if op.variadic else op.arguments[i]
