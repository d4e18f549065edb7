"""A compiled scan that keeps less than everything: the actions of a plan, carried out by kernels.

A stretch of steps is run as a scan by itself, on the same kernels and on slices of the same arrays; only the first of
all steps starts from what the user gave. Stretches begin where blocks of steps do in a run over all steps (see
`Forms.block`), and sums over steps go on from what later stretches have left. So every number is made by the same
operations in the same order, and is the same to the last bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ..engine.tree import Array
from ..kernels import workspace
from ..loop import revolve
from ..loop.budget import Plan, as_plan
from .layout import ALIGN
from .recipes import Invariants
from .run import Compiled, Gradients, Run

__all__ = ["Checkpointed", "plan_of"]


def plan_of(kernels: Compiled, checkpoint: Any, steps: int, rows: int) -> Plan:
    """What `scan` keeps where it is asked for `checkpoint`, with the bytes that it will take from the pool.

    Raises
    ------
    InputError
        If that is a plan for another number of steps, or a budget that is too small.
    """
    count = kernels.forms.thread_count(steps, rows)
    multiple = min(steps, kernels.forms.block("backward", rows, count))
    per_step = sum(space.bytes_per_step for space in kernels.forms.spaces("forward", 1, rows, count))

    def beside(leaf: int) -> int:
        """Bytes of working memory that are neither for each step nor for stored states."""
        forward, backward = (kernels.forms.spaces(name, leaf, rows, count) for name in ("forward", "backward"))
        pads = [sum(0 if s.keeps_pads else _whole(s.temporary.nbytes) for s in half) for half in (forward, backward)]
        return sum(_whole(s.history.nbytes) for s in forward) - leaf * per_step + max(pads)

    # Cutting to whole cache lines makes a difference of a few bytes between leaves: none needs more than this.
    most = beside(multiple) + ALIGN * count * (1 + len(kernels.program.carries))
    chosen = as_plan(checkpoint, steps, per_step, _state_bytes(kernels, rows), fixed_bytes=most, multiple=multiple)
    return replace(chosen, fixed_bytes=beside(chosen.leaf))


class Checkpointed:
    """One scan under a plan.

    Parameters
    ----------
    kernels : Compiled
    plan : Plan
        With at least one slot.
    """

    def __init__(self, kernels: Compiled, plan: Plan) -> None:
        self.kernels, self.plan = kernels, plan

    def forward(
        self, init: Sequence[Array], xs: Sequence[Array], outside: Invariants, steps: int, rows: int, reverse: bool
    ) -> tuple[list[Array], list[Array], Run]:
        """As `Compiled.forward`."""
        run, results = self.kernels.begin(init, xs, outside, steps, rows, reverse)
        self._begin(run)
        self.last = self._to_leaf(run)
        return self.carry, results, run

    def backward(
        self,
        run: Run,
        dcarry: Sequence[Array | None],
        dys: Sequence[Array | None],
        reverse: bool = False,
        from_init: bool = True,
    ) -> tuple[list[Array | None], list[Array], list[Array], list[Array]]:
        """As `Compiled.backward`."""
        if self.last is None:  # the records are walked once more
            self._begin(run)
            self.last = self._to_leaf(run)
        gradients, dxs = self.kernels.begin_back(run, dys, reverse)
        found = list(dcarry)
        while self.last is not None:
            later = self.last.start + self.last.steps < run.steps
            found = self.kernels.go_back(self.last, found, _between(gradients, self.last), later)
            self.last = None  # with the state that it began from
            self.last = self._to_leaf(run)
        self._end()
        return found, dxs, self.kernels.end_back(run, gradients), gradients.fixed

    def kept_buffers(self) -> dict[int, int]:
        """As `Run.kept_buffers`."""
        blocks = [*self.history, *(block for block, _ in self.slots.values())]
        return {id(block): block.nbytes for block in blocks}

    # ---- the plan's actions ------------------------------------------------------------------------------------

    def _begin(self, run: Run) -> None:
        self.actions: Iterator[revolve.Action] = self.plan.actions()
        self.slots: dict[int, tuple[workspace.Block, list[Array]]] = {}
        self.carry: list[Array] = run.init
        spaces = self.kernels.forms.spaces("forward", self.plan.leaf, run.rows, len(run.form.shares.layouts))
        self.history = [workspace.take(space.history.nbytes or ALIGN) for space in spaces]

    def _end(self) -> None:
        self.actions, self.slots, self.carry, self.history = iter(()), {}, [], []

    def _to_leaf(self, run: Run) -> Run | None:
        """Carry the actions out up to a leaf, and run its steps; None where there are no more."""
        for action in self.actions:
            match action:
                case revolve.Store(at):
                    self.slots[at] = self._stored(run.rows)
                case revolve.Restore(at):
                    self.carry = self.slots[at][1]
                case revolve.Free(at):
                    del self.slots[at]
                case revolve.Advance(start, stop):
                    for first in range(start, stop, self.plan.leaf):
                        self._go(run, first, min(first + self.plan.leaf, stop))
                case revolve.Leaf(start, stop):
                    return self._go(run, start, stop)
        return None

    def _go(self, run: Run, start: int, stop: int) -> Run:
        """Run some steps from the current state, and make the one after them current."""
        part = self.kernels.part(run, start, stop, self.carry, self.history)
        self.carry = self.kernels.go(part)
        return part

    def _stored(self, rows: int) -> tuple[workspace.Block, list[Array]]:
        """The current state in memory of the pool."""
        block = workspace.take(_state_bytes(self.kernels, rows))
        arrays: list[Array] = []
        offset = 0
        for a in self.carry:
            array = block.array(a.dtype, a.shape, offset)
            array[...] = a
            arrays.append(array)
            offset += _whole(a.nbytes)
        return block, arrays


def _between(gradients: Gradients, leaf: Run) -> Gradients:
    """Those of a leaf's steps."""
    steps = slice(leaf.start, leaf.start + leaf.steps)
    ys = [None if d is None else d[steps] for d in gradients.ys]
    return gradients._replace(ys=ys, xs=[d[steps] for d in gradients.xs])


def _state_bytes(kernels: Compiled, rows: int) -> int:
    item = np.dtype(kernels.dtype).itemsize
    return sum(_whole(rows * value.size * item) for value in kernels.program.carries)


def _whole(nbytes: int) -> int:
    """In whole cache lines, as the pool counts."""
    return -(-nbytes // ALIGN) * ALIGN
