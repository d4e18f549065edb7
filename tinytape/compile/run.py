"""Running a compiled scan: memory, packed weights, threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from ..engine.tree import Array
from ..kernels import threads, workspace
from ..ops.shape import reshape
from .cache import kernel
from .dims import Dims
from .emit_numba import numba_source
from .form import Form, Forms, History
from .program import Program, Value
from .recipes import Invariants, finish
from .results import maker, whole_rows
from .schedule import schedule, settle_roots

__all__ = ["Compiled", "Gradients", "Run"]

SHARED = 1 << 21  # bytes: from here on threads add up their sums together
ARGUMENTS = 3  # of a kernel: numbers, bases, room for a table
Arrays = Sequence[Array]
Function = Callable[..., int]


class Run:
    """A forward run over some steps: what it takes, and what it leaves for its adjoint.

    Attributes
    ----------
    start : int
        The number of its first step, of all steps.
    arrays : list of array
        What kernels are told of in both directions, in their order.
    history : list
        Memory for each thread, if there is to be an adjoint.
    """

    __slots__ = ("arrays", "fixed", "form", "history", "init", "invariants", "start", "xs", "ys")

    def __init__(
        self,
        form: Form,
        init: list[Array],
        xs: list[Array],
        fixed: list[Array],
        ys: list[Array],
        invariants: Invariants,
        start: int = 0,
    ) -> None:
        self.form, self.start = form, start
        self.init, self.xs, self.fixed, self.ys, self.invariants = init, xs, fixed, ys, invariants
        self.arrays: list[Array] = []
        self.history: History = ()

    @property
    def steps(self) -> int:
        return self.form.steps

    @property
    def rows(self) -> int:
        return self.form.rows

    def kept_buffers(self) -> dict[int, int]:
        """The memory that waits for the adjoint, for `engine.recording.kept_buffers`."""
        return {id(block): block.nbytes for block in self.history}


class Gradients(NamedTuple):
    """What an adjoint run takes and leaves, beside the gradient of the carry."""

    ys: list[Array | None]
    xs: list[Array]
    fixed: list[Array]
    sums: list[list[Array]]  # over rows and steps, for each thread


class Weights(NamedTuple):
    """What a kernel reads that is the same in all rows and steps."""

    addresses: list[int]  # of packed matrices, which `panels` keeps
    arrays: list[Array]
    panels: list[workspace.Chunk]


class Compiled:
    """A step as kernels, for any number of steps and rows."""

    def __init__(self, program: Program, title: str) -> None:
        settle_roots(program)
        self.program = program
        self.dims = Dims(program)
        self.plan = schedule(program, self.dims)
        self.source, forward, backward = numba_source(self.plan, self.dims, title)
        self.forms = Forms(program, self.plan, {"forward": forward, "backward": backward})
        self.title = title
        self.dtype = np.dtype(program.dtype)
        self.trains = bool(program.carry_seeds)  # whether there is an adjoint

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(
        self, init: Arrays, xs: Arrays, outside: Invariants, steps: int, rows: int, reverse: bool = False
    ) -> tuple[list[Array], list[Array], Run]:
        """The last carry and the outputs; arrays are (rows, ...) and (steps, rows, ...)."""
        run, results = self.begin(init, xs, outside, steps, rows, reverse)
        if self.trains:
            run.history = [workspace.take_any(layout.history_bytes) for layout in run.form.shares.layouts]
        return self.go(run), results, run

    def begin(
        self, init: Arrays, xs: Arrays, outside: Invariants, steps: int, rows: int, reverse: bool
    ) -> tuple[Run, list[Array]]:
        """All steps, still to be run, without memory for an adjoint; and the outputs in the order of xs."""
        dtype, forms = self.dtype, self.forms
        init = [a if a.dtype is dtype and a.flags.c_contiguous else np.ascontiguousarray(a, dtype) for a in init]
        xs = [whole_rows(a, dtype, rank) for a, rank in zip(xs, self.x_ranks, strict=True)]
        fixed = [np.ascontiguousarray(outside[v.args[0]], dtype) for v in forms.fixed]
        if reverse:
            xs = [a[::-1] for a in xs]
        form = forms.of(steps, rows, reverse, xs)
        results = [make() for make in form.ys]
        return Run(form, init, xs, fixed, [y[::-1] for y in results] if reverse else results, outside), results

    def part(self, run: Run, start: int, stop: int, init: list[Array], history: History) -> Run:
        """Some steps of a run, from another carry, to be kept in memory that is there."""
        xs, ys = ([a[start:stop] for a in arrays] for arrays in (run.xs, run.ys))
        form = self.forms.of(stop - start, run.rows, run.form.reverse, xs, len(run.form.shares.layouts))
        part = Run(form, init, xs, run.fixed, ys, run.invariants, start)
        part.history = history
        return part

    def go(self, run: Run) -> list[Array]:
        """Run the steps; the last carry."""
        shares, history = run.form.shares, run.history
        weights = self._weights("forward", run.invariants)
        run.arrays = [*run.init, *run.xs, *run.fixed, *run.ys, *weights.arrays]
        if run.start:
            self._put_before(run)
        pads = shares.borrow()
        shares.launch(self.forward_function, pads, run.arrays, weights.addresses, history)
        finals = [
            shares.last(pads, history, value) if at is None else run.ys[at][-1].copy()
            for value, at in self.finals_in_outputs
        ]
        shares.give_back(pads)
        return finals

    def _weights(self, name: str, invariants: Invariants) -> Weights:
        """What a kernel reads of them, made once until they are written."""
        found: Weights | None = invariants.made.get(name)
        if found is None:
            panels = [matrix.panels(invariants) for matrix in self.forms.matrices[name]]
            arrays = [np.ascontiguousarray(invariants[value], self.dtype) for value in self.forms.invariants]
            found = invariants.made[name] = Weights([p.address for p in panels], arrays, panels)
        return found

    def _put_before(self, run: Run) -> None:
        """A carry that lies by itself lies there before the first step too: sums read on from it."""
        for layout, block in zip(run.form.shares.layouts, run.history, strict=True):
            for value, first in zip(self.program.carries, run.init, strict=True):
                if value in layout.carried:
                    layout.row_before(block, value)[...] = first[layout.start : layout.start + layout.rows]

    # ---- backward ----------------------------------------------------------------------------------------------

    def backward(
        self,
        run: Run,
        dcarry: Sequence[Array | None],
        dys: Sequence[Array | None],
        reverse: bool = False,
        from_init: bool = True,
    ) -> tuple[list[Array | None], list[Array], list[Array], list[Array]]:
        """Gradients for init, if wanted, and for those of xs, captured tensors and fixed inputs that have one."""
        gradients, dxs = self.begin_back(run, dys, reverse)
        dinit = self.go_back(run, dcarry, gradients, from_init=from_init)
        return dinit, dxs, self.end_back(run, gradients), gradients.fixed

    def begin_back(self, run: Run, dys: Sequence[Array | None], reverse: bool) -> tuple[Gradients, list[Array]]:
        """What all steps back will take and leave; and the gradients of xs in their order."""
        dtype, form = self.dtype, run.form
        dxs = results = [make() for make in form.dxs]
        given = [
            None if d is None or rank is None else whole_rows(d, dtype, rank)
            for d, rank in zip(dys, self.seed_ranks, strict=True)
        ]
        if reverse:
            dxs, given = [a[::-1] for a in dxs], [None if d is None else d[::-1] for d in given]
        dfixed = [np.zeros((run.rows, *g.shape), dtype) for g in self.program.fixed_gradients.values()]
        sums = [[make() for make in self.sum_makers] for _ in form.shares.layouts]
        return Gradients(given, dxs, dfixed, sums), results

    def go_back(
        self,
        run: Run,
        dcarry: Sequence[Array | None],
        gradients: Gradients,
        later: bool = False,
        from_init: bool = True,
    ) -> list[Array | None]:
        """Run the steps backwards, whether or not `later` ones have been; the gradient of the carry before them."""
        shares = self.forms.adjoint(run.form, gradients.ys)
        pads = shares.borrow()
        for layout, pad in zip(shares.layouts, pads, strict=True):
            layout.clear_rings(pad)
            for i in self.rings:
                if (d := dcarry[i]) is not None:
                    layout.ring(pad.memory, i, 0)[...] = d[layout.start : layout.start + layout.rows]
        weights = self._weights("backward", run.invariants)
        given = [d for d in gradients.ys if d is not None]
        arrays = [*run.arrays, *given, *gradients.xs, *gradients.fixed]
        addresses = [int(run.start > 0), int(later), *weights.addresses]
        shares.launch(self.backward_function, pads, arrays, addresses, run.history, gradients.sums)
        dinit: list[Array | None] = [None] * len(self.program.carries)
        for i in self.rings if from_init else ():
            if self.program.carry_gradients[i] is not None:
                dinit[i] = shares.ring(pads, i, run.steps & 1)
        shares.give_back(pads)
        return dinit

    def end_back(self, run: Run, gradients: Gradients) -> list[Array]:
        """The gradients of captured tensors, when all steps are done."""
        first = gradients.sums[0]
        if len(gradients.sums) > 1:
            _add_up(gradients.sums)
        if self.plain_sums is not None:
            return [first[i] if shape is None else first[i].reshape(shape) for i, shape in self.plain_sums]
        known = run.invariants.extended(dict(zip(self.forms.sums, first, strict=True)))
        return finish(self.program, self.plan.phases.post, known)

    # ---- what does not change over time ------------------------------------------------------------------------

    @cached_property
    def x_ranks(self) -> list[int]:
        """How many axes a row of each input has."""
        return [len(v.shape) for v in self.forms.xs]

    @cached_property
    def seed_ranks(self) -> list[int | None]:
        """How many axes a row of each output's gradient has; None where it has none."""
        return [None if seed.kind == "none" else len(seed.shape) for seed in self.program.output_seeds]

    @cached_property
    def rings(self) -> list[int]:
        """The leaves of the carry through which gradients come back."""
        return [i for i, seed in enumerate(self.program.carry_seeds) if seed.kind != "none"]

    @cached_property
    def sum_makers(self) -> list[Callable[[], Array]]:
        """What makes room for the sums over rows and steps: zeros, unless the first block of steps writes it."""
        zeroed = {v: partial(np.zeros, v.shape, self.dtype) for v in self.forms.sums if v.kind != "outer"}
        return [zeroed.get(v) or maker(v.shape, self.dtype) for v in self.forms.sums]

    @cached_property
    def plain_sums(self) -> list[tuple[int, tuple[int, ...] | None]] | None:
        """Of each captured tensor, which sum its gradient is, and its shape if that is another.

        None where there is more to compute.
        """
        found: list[tuple[int, tuple[int, ...] | None]] = []
        for value in self.program.captured_gradients.values():
            recipe = value.recipe
            total = recipe.args[0] if recipe is not None and recipe.op is reshape.op else value
            if total not in self.forms.sums:
                return None
            found.append((self.forms.sums.index(total), None if total.shape == value.shape else value.shape))
        return found

    @cached_property
    def finals_in_outputs(self) -> list[tuple[Value, int | None]]:
        """The leaves of the carry, and of each the output whose memory it lies in."""
        places = [(v, self.plan.forward.places[v]) for v in self.program.carries]
        return [(v, int(place[2:]) if place.startswith("ys") else None) for v, place in places]

    @cached_property
    def forward_function(self) -> Function:
        return kernel(self.title, self.source, "forward", ARGUMENTS)

    @cached_property
    def backward_function(self) -> Function:
        return kernel(self.title, self.source, "backward", ARGUMENTS)


def _add_up(sums: list[list[Array]]) -> None:
    """Add the sums of all threads to those of the first; large ones on as many threads, each a part of every array."""
    count = len(sums) if sum(a.nbytes for a in sums[0]) > SHARED else 1

    def task(i: int) -> None:
        for each in zip(*sums, strict=True):
            n = each[0].size
            total, *parts = [a.reshape(n)[n * i // count : n * (i + 1) // count] for a in each]
            for part in parts:
                np.add(total, part, out=total)

    threads.run(task, count)
