"""Which derivative rule first made what is not finite in a leaf's gradient.

The function is run as it is trained, and each record gets a rule that looks at what it returns. What ran as a whole, a
compiled scan or a checkpoint, is taken apart if it is to blame: its steps are run again as they are defined, those of a
scan in blocks, from carries that are kept every sqrt(T) steps.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from types import CodeType
from typing import Any, NamedTuple, cast

import numpy as np

from ..engine.op import Op
from ..engine.recording import Tape
from ..engine.stand_in import standing_in
from ..engine.tape import Leaf, Node, enable_grad, no_grad, walk
from ..engine.tensor import Tensor
from ..engine.tree import Array, flatten, map_leaves, unflatten
from ..loop.checkpointed import Checkpointed
from ..loop.scan import Loop
from ..loop.switch import no_compile
from .finding import NOWHERE, Finding, Place, is_finite, place_of_call, raw_of, summary
from .search import Call, Search, Steps, run

__all__ = ["backward"]


def backward(search: Search, f: Callable[..., Any], args: tuple[Any, ...]) -> Finding | None:
    """Who is to blame for the gradients of ``f(*args)``; None if those that arrive at leaves are finite."""
    tape = _Adjoint(search, run.__code__, NOWHERE)
    with enable_grad(), tape:
        result = run(f, args)
    if not is_finite(result):  # of kernels, whose loop gave finite numbers
        return tape.by_kernels or Finding("forward", "result", "", summary("", result))
    if result.node is None:
        return None
    with no_grad():
        gradients = walk({result.node: np.ones(result.shape, result.dtype)})
    wrong = {node: g for node, g in gradients.items() if not is_finite(g)}
    if not wrong:
        return None
    reached = tuple([name for node in wrong if (name := search.known.of_leaf(node))])
    found = tape.taken_apart() or _of_leaf(search, *next(iter(wrong.items())))
    return replace(found, reached=reached)


def _of_leaf(search: Search, leaf: Node, gradient: Array) -> Finding:
    """Every contribution to the leaf's gradient was finite."""
    name = search.known.of_leaf(leaf) or f"a leaf of shape {leaf.shape}"
    return Finding("backward", "sum", "", summary("", gradient), search.layout.find(gradient, None)[0], name)


class _Blame(NamedTuple):
    """What is to blame, and how it was run."""

    finding: Finding
    rule: Any
    kept: tuple[Any, ...]
    gradient: Any
    parents: tuple[Node | None, ...]


class _Recorded(NamedTuple):
    """A record, before its rule was watched."""

    op: Op
    parents: tuple[Node | None, ...]
    step: int | None
    place: Place
    parameters: tuple[str, ...]


class _Adjoint(Tape):
    """Has the rule of every record looked at when it runs.

    Parameters
    ----------
    search : Search
    end : code
        The function that calls the user's.
    beyond : Place
        From where, if that is known.
    """

    def __init__(self, search: Search, end: CodeType, beyond: Place) -> None:
        super().__init__()
        self.search, self.end, self.beyond = search, end, beyond
        self.steps = Steps(search.before)
        self.blame: _Blame | None = None
        self.by_kernels: Finding | None = None

    def append(self, node: Node, args: tuple[Any, ...], params: dict[str, Any], out: Any) -> None:
        known, op = self.search.known, cast(Op, node.op)
        place = place_of_call(known.modules, self.end, self.beyond)
        recorded = _Recorded(op, node.parents or (), node.step, place, known.parameters_in(args))
        node.op = copy.copy(op)
        node.op.rule = partial(self._rule, recorded)
        if _scan_of(node.kept) is not None and self.by_kernels is None and not all(map(is_finite, out)):
            raw = next(x.raw for x in out if not is_finite(x))
            index, step, row = self.search.layout.find(raw, None)
            self.by_kernels = Finding("forward", "op", op.name, summary("", raw), index, "", step, row, place)

    def _rule(self, recorded: _Recorded, gradient: Any, *kept: Any) -> Any:
        op = recorded.op
        results = op.rule(gradient, *kept)
        if self.blame is None:
            arrived = [g for g in _tuple_of(gradient) if g is not None]
            self.steps.add(recorded.step, Call(op.name, (), arrived[0]))
            wrong = [x for x in (*arrived, *_tuple_of(results)) if not is_finite(x)]
            if wrong:
                finding = self._finding(recorded, arrived, kept, wrong[0])
                self.blame = _Blame(finding, op.rule, kept, gradient, recorded.parents)
        return results

    def _finding(self, recorded: _Recorded, arrived: list[Any], kept: tuple[Any, ...], raw: Array) -> Finding:
        op = recorded.op
        by_rule = all(map(is_finite, arrived))
        index, step, row = self.search.layout.find(raw, recorded.step)
        names = ["gradient"] if len(arrived) == 1 else [f"gradient[{i}]" for i in range(len(arrived))]
        given = list(zip(names, arrived, strict=True))
        if by_rule:
            given += [(name, x) for name, x in zip(op.needs, kept, strict=False) if raw_of(x) is not None]
        return Finding(
            phase="backward",
            kind="op" if by_rule else "sum",
            op=op.name,
            value=summary("", raw),
            index=index,
            step=step,
            row=row,
            place=recorded.place,
            parameters=recorded.parameters,
            inputs=[summary(name, x) for name, x in given],
            before=self.steps.norms(),
        )

    def taken_apart(self) -> Finding | None:
        """Who is to blame; within what ran as a whole, where it is seen there."""
        if self.blame is None:
            return None
        finding, rule, kept, gradient, parents = self.blame
        again: Any = getattr(rule, "__self__", None)
        inner: Finding | None = None
        if finding.kind == "op" and (scan := _scan_of(kept)) is not None:
            inner = _in_scan(self.search, finding.place, scan, gradient, parents)
        elif finding.kind == "op" and hasattr(again, "frontier"):
            inner = _in_checkpoint(self.search, finding.place, again, gradient)
        return inner or finding


def _tuple_of(value: Any) -> tuple[Any, ...]:
    return cast("tuple[Any, ...]", value) if isinstance(value, tuple) else (value,)


class _Scan(NamedTuple):
    """A loop over time that ran as one record."""

    f: Callable[..., Any]
    init: Any
    xs: Any
    order: Sequence[int]
    drawn: dict[Any, Any]
    stand_ins: Sequence[Any]


def _scan_of(kept: Any) -> _Scan | None:
    """The loop that a record stands for, which a compiled scan and one under a plan keep with it."""
    run: Any = kept[0] if kept else None
    if isinstance(run, Checkpointed):
        init, xs = unflatten(run.loop.carry.tree, run.init), unflatten(run.loop.xs, run.inputs.xs)
        return _Scan(run.loop.f, init, xs, run.order, dict(run.drawn), run.stand_ins)
    if hasattr(run, "eager"):
        return _Scan(run.f, run.init, run.xs, range(run.steps)[:: -1 if run.reverse else 1], {}, run.stand_ins)
    return None


def _sum_of_seeds(pairs: Iterable[tuple[Node | None, Any]]) -> dict[Node, Any]:
    seeds: dict[Node, Any] = {}
    for node, gradient in pairs:
        if node is not None and gradient is not None:
            seeds[node] = seeds[node] + gradient if node in seeds else gradient
    return seeds


def _in_checkpoint(search: Search, place: Place, again: Any, gradients: tuple[Any, ...]) -> Finding | None:
    """Who is to blame in a checkpointed function, which is run again."""
    _rewind(again.drawn)
    tape = _Adjoint(search, _call_again.__code__, place)
    with enable_grad(), standing_in(again.stand_ins), tape:
        results = _call_again(again)
    heads = [x.node for x in results if isinstance(x, Tensor) and x.node is not None]
    with no_grad():
        walk(_sum_of_seeds(zip(heads, gradients, strict=False)), set(again.frontier), ends=True)
    return tape.taken_apart()


def _call_again(again: Any) -> list[Any]:
    return flatten(again.f(*again.args, **again.options))


def _in_scan(
    search: Search, place: Place, scan: _Scan, gradients: tuple[Any, ...], parents: tuple[Node | None, ...]
) -> Finding | None:
    """The step and the rule to blame in a loop, which is run again in blocks of sqrt(T) steps."""
    steps = len(scan.order)
    size = math.isqrt(steps - 1) + 1
    blocks = [scan.order[i : i + size] for i in range(0, steps, size)]
    loop = _Blocks(search, place, scan, {node for node in parents if node is not None})
    with no_compile(), standing_in(scan.stand_ins):
        starts = [(scan.init, scan.drawn)]
        for block in blocks[:-1]:
            starts.append(loop.ahead(*starts[-1], block))
        count = len(flatten(scan.init))
        back, ys = list(gradients[:count]), gradients[count:]
        for start, block in zip(reversed(starts), reversed(blocks), strict=True):
            back = loop.back(*start, block, back, ys)
            found = loop.tape.taken_apart()
            if found is not None:
                return found
    return None


class _Blocks:
    """A loop over time in blocks of steps. Walks in it end at `ends`."""

    def __init__(self, search: Search, place: Place, scan: _Scan, ends: set[Node]) -> None:
        self.xs: list[Tensor] = flatten(scan.xs)
        self.inputs: dict[int, tuple[Tensor, ...]] = {}
        self.loop = Loop(scan.f, scan.init, scan.xs, cast(Any, self.inputs))
        self.ends = ends
        self.tape = _Adjoint(search, Loop.take.__code__, place)

    def ahead(self, carry: Any, drawn: dict[Any, Any], block: Sequence[int]) -> tuple[Any, dict[Any, Any]]:
        """The carry after a block, and where generators stand then."""
        _rewind(drawn)
        self.inputs.clear()
        self.inputs.update({t: tuple([Tensor.of(x.raw[t]) for x in self.xs]) for t in block})
        with no_grad():
            carry, _ = self.loop.steps(carry, block)
        return map_leaves(Tensor.detach, carry), {generator: generator.state() for generator in drawn}

    def back(
        self,
        carry: Any,
        drawn: dict[Any, Any],
        block: Sequence[int],
        gradients: Sequence[Array | None],
        ys: Sequence[Array | None],
    ) -> list[Array | None]:
        """The gradients of the carry before a block, from those of the carry after it and of all ys."""
        _rewind(drawn)
        begun = [_leaf(x.raw) for x in flatten(carry)]
        self.inputs.clear()
        self.inputs.update({
            t: tuple([Tensor.of(x.raw[t]) if x.node is None else _leaf(x.raw[t]) for x in self.xs]) for t in block
        })  # fmt: skip
        with enable_grad(), self.tape:
            after, outputs = self.loop.steps(unflatten(carry, begun), block)
        pairs = [
            (y.node, g[t])
            for t, step in zip(block, outputs, strict=True)
            for y, g in zip(step, ys, strict=True)
            if g is not None
        ]
        pairs += [(x.node, g) for x, g in zip(flatten(after), gradients, strict=True)]
        starts = [x.node for x in (*begun, *(x for step in self.inputs.values() for x in step)) if x.node is not None]
        with no_grad():
            found = walk(_sum_of_seeds(pairs), {*starts, *self.ends}, ends=True)
        zeros = [np.zeros(x.shape, x.dtype) for x in begun]
        return [zero if x.node is None else found.get(x.node, zero) for x, zero in zip(begun, zeros, strict=True)]


def _rewind(states: dict[Any, Any]) -> None:
    for generator, state in states.items():
        generator.set_state(state)


def _leaf(raw: Array) -> Tensor:
    """A tensor that a walk can end at, if it is of floats."""
    return Tensor.of(raw, Leaf(raw.shape, raw.dtype, None) if raw.dtype.kind == "f" else None)
