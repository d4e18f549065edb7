"""What is the same in every run over so many steps and rows: tables of addresses, memory, threads, results' shapes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ..engine.tree import Array
from ..kernels import threads, workspace
from .addresses import bases_of
from .emit_numba import Kernel
from .layout import Layout, Pad, Space, Strides, strides_of
from .loops import Half
from .packs import Matrix, products
from .program import Program, Value
from .results import maker
from .schedule import Schedule

__all__ = ["Form", "Forms", "History", "Shares"]

TALL = 48  # rows that a hoisted product has at least, if there are so many
DEEP = 96  # rows that a weight gradient's product has at least
WORTH = 24_000_000  # floating-point operations of a forward run that are worth a second thread
MOST = 64  # forms of a step
ADJOINTS = 16  # of a form, for gradients that lie in other ways
IDLE = 2  # runs at once whose memory is kept

Makers = list[Callable[[], Array]]
History = Sequence[workspace.Block | workspace.Chunk]  # for each thread


class Shares:
    """How the rows of a run are shared out: a layout for each thread, and the memory that they work in.

    Parameters
    ----------
    layouts : list of Layout
    parts : list of Value
        Sums that every thread has room for.
    """

    def __init__(self, layouts: list[Layout], parts: list[Value]) -> None:
        self.layouts, self.parts = layouts, parts
        self.keeps = all(layout.keeps_pads for layout in layouts)
        self._idle: list[list[Pad]] = []

    def borrow(self) -> list[Pad]:
        """Memory for a run, to be given back."""
        try:
            pads = self._idle.pop()
        except IndexError:
            pads = [Pad(layout, self.parts) for layout in self.layouts]
        if pads[0].block is None:
            for pad, layout in zip(pads, self.layouts, strict=True):
                pad.fill(layout)
        return pads

    def give_back(self, pads: list[Pad]) -> None:
        """Little memory is kept here, more goes to the pool."""
        keeps = len(self._idle) < IDLE
        if not (keeps and self.keeps):
            for pad in pads:
                pad.empty()
        if keeps:
            self._idle.append(pads)

    def launch(
        self,
        function: Callable[..., int],
        pads: list[Pad],
        arrays: list[Array],
        addresses: list[int],
        history: History,
        sums: list[list[Array]] | None = None,
    ) -> None:
        """Run a kernel for each layout, on as many threads."""
        layouts = self.layouts

        def task(i: int) -> None:
            pad = pads[i]
            own = [*addresses, history[i].address if history else 0, pad.address]
            of_thread = arrays if sums is None else [*arrays, *sums[i], *pad.parts]
            function(layouts[i].address, bases_of(of_thread, own), pad.table)

        if len(layouts) == 1:
            task(0)
        else:
            threads.run(task, len(layouts))

    def last(self, pads: list[Pad], history: History, value: Value) -> Array:
        """A leaf of the carry that lies by itself, after the last step."""
        blocks = history or [pad.memory for pad in pads]
        if len(blocks) == 1:
            return self.layouts[0].last(blocks[0], value).copy()
        return np.concatenate([layout.last(block, value) for layout, block in zip(self.layouts, blocks, strict=True)])

    def ring(self, pads: list[Pad], i: int, step: int) -> Array:
        """The gradient of a leaf of the carry, one of two halves for two steps."""
        if len(pads) == 1:
            return self.layouts[0].ring(pads[0].memory, i, step).copy()
        return np.concatenate([x.ring(pad.memory, i, step) for x, pad in zip(self.layouts, pads, strict=True)])


@dataclass(eq=False, slots=True)
class Form:
    """Runs over some steps and rows, on arrays that lie in one way.

    Attributes
    ----------
    reverse : bool
        Whether outputs, and the gradients of inputs, begin at their last step.
    shares : Shares
        Of the forward kernel.
    strides : dict
        Of the arrays of both kernels.
    ys, dxs : list of callable
        What makes the outputs, and the gradients of the inputs, in the order of xs.
    adjoints : dict
        The shares of the backward kernel, by how the gradients that come in lie.
    """

    steps: int
    rows: int
    reverse: bool
    shares: Shares
    strides: dict[Any, Strides]
    ys: Makers
    dxs: Makers
    adjoints: dict[Any, Shares] = field(default_factory=dict[Any, Shares])


class Forms:
    """All forms of a step that were met, and what they have in common.

    Parameters
    ----------
    program : Program
    plan : Schedule
    kernels : dict
        By "forward" and "backward".
    """

    def __init__(self, program: Program, plan: Schedule, kernels: dict[str, Kernel | None]) -> None:
        self.program, self.plan, self.kernels = program, plan, kernels
        self.dtype = np.dtype(program.dtype)
        self.xs = [v for v in program.inputs if v.kind == "x"]
        self.fixed = [v for v in program.inputs if v.kind == "fixed"]
        self.sums = plan.phases.sums
        self.added = [v for v in self.sums if v.kind == "rowsum"]  # over rows, which are added up for a block first
        self.matrices = {"forward": self._matrices(plan.forward), "backward": self._matrices(plan.backward)}
        found = [e.of for k in kernels.values() if k is not None for e in k.entries if e.what == "at"]
        self.invariants: list[Value] = list(  # those that loops read element by element
            dict.fromkeys(v for v in found if isinstance(v, Value) and v.kind == "invariant")
        )
        self._known: dict[Any, Form] = {}

    def _matrices(self, half: Half | None) -> list[Matrix]:
        if half is None:
            return []
        found = dict.fromkeys(v.args[1] for stage in (*half.block, *half.step) for v in stage.products)
        return [Matrix(value, self.dtype) for value in found]

    # ---- forms -------------------------------------------------------------------------------------------------

    def of(self, steps: int, rows: int, reverse: bool, xs: list[Array], count: int | None = None) -> Form:
        """The form of a run whose inputs, in the order of its steps, are `xs`; it goes backwards if `reverse`.

        On `count` threads, or as many as are worth it.
        """
        count = count or self.thread_count(steps, rows)
        key = steps, rows, count, reverse, *[x.strides for x in xs]
        found = self._known.get(key)
        if found is None:
            if len(self._known) >= MOST:
                self._known.clear()
            found = self._known[key] = self._new(steps, rows, count, reverse, xs)
        return found

    def _new(self, steps: int, rows: int, count: int, reverse: bool, xs: list[Array]) -> Form:
        strides: dict[Any, Strides] = {}
        for value, x in zip(self.xs, xs, strict=True):
            strides["x", value.index] = strides_of(x, len(value.shape))
        way = -1 if reverse else 1
        for i, value in enumerate(self.program.outputs):
            strides[f"ys{i}"] = Strides(way * rows * value.size, value.size)
        for i, value in self.program.input_gradients.items():
            strides[f"dx{i}"] = Strides(way * rows * value.size, value.size)
        ys, dxs = (
            [maker((steps, rows, *value.shape), self.dtype) for value in values]
            for values in (self.program.outputs, self.program.input_gradients.values())
        )
        shares = self._shares("forward", steps, rows, count, strides)
        return Form(steps, rows, reverse, shares, strides, ys, dxs)

    def adjoint(self, form: Form, dys: Sequence[Array | None]) -> Shares:
        """The backward kernel's shares for such gradients of the outputs, in the order of steps."""
        key = tuple([None if d is None else d.strides for d in dys])
        found = form.adjoints.get(key)
        if found is None:
            strides = dict(form.strides)
            for i, d in enumerate(dys):
                if d is not None:
                    strides["seed_y", i] = strides_of(d, d.ndim - 2)
            if len(form.adjoints) >= ADJOINTS:
                form.adjoints.clear()
            found = self._shares("backward", form.steps, form.rows, len(form.shares.layouts), strides)
            form.adjoints[key] = found
        return found

    def _shares(self, name: str, steps: int, rows: int, count: int, strides: dict[Any, Strides]) -> Shares:
        program, kernel = self.program, self.kernels[name]
        assert kernel is not None
        order: list[Any] = [("carry", i) for i in range(len(program.carries))]
        order += [("x", v.index) for v in self.xs] + [("fixed", v.index) for v in self.fixed]
        order += [f"ys{i}" for i in range(len(program.outputs))] + [("invariant", v) for v in self.invariants]
        if name == "backward":
            order += [key for key in strides if key[0] == "seed_y"] + [f"dx{i}" for i in program.input_gradients]
            order += [f"dfixed{i}" for i in program.fixed_gradients] + [("sum", v) for v in self.sums]
            order += [("part", v) for v in self.added]
            order += ["earlier", "later"]
        order += [("weight", m.value) for m in self.matrices[name]]
        bases = {key: i for i, key in enumerate([*order, "history", "temporary"])}
        spaces = self.spaces(name, steps, rows, count)
        starts = accumulate([space.rows for space in spaces], initial=0)
        layouts = [
            Layout(space, kernel, start, rows, bases, strides) for space, start in zip(spaces, starts, strict=False)
        ]
        return Shares(layouts, self.added if name == "backward" else [])

    # ---- threads and memory ------------------------------------------------------------------------------------

    def thread_count(self, steps: int, rows: int) -> int:
        """How many threads share the rows."""
        if steps * rows * self.work <= WORTH:
            return 1
        return max(1, min(threads.get_num_threads(), rows))

    def spaces(self, name: str, steps: int, rows: int, count: int) -> list[Space]:
        """The memory of each thread, whose rows lie one after the other."""
        forward = self.plan.forward
        half = forward if name == "forward" else self.plan.backward
        assert half is not None
        block = min(steps, self.block(name, rows, count))
        found: list[Space] = []
        for start, stop in pairwise(rows * i // count for i in range(count + 1)):
            scratch = self._scratch(stop - start, block) if name == "backward" else 0
            found.append(Space(self.program, half, forward.places, steps, stop - start, block, scratch))
        return found

    def block(self, name: str, rows: int, count: int) -> int:
        """How many steps are done at once outside of the loop over steps; backward it is a multiple of forward's.

        Cuts between blocks lie at multiples of it, wherever a run begins, so that sums are added up in the same order.
        """
        most = max(1, -(-rows // count) * self.inner)  # of a thread
        block = -(-TALL // most)
        return block if name == "forward" else block * -(-self._deep() // (most * block))

    @cached_property
    def work(self) -> int:
        """Roughly the floating-point operations of a step and row."""
        values = self.plan.phases.forward
        return sum(2 * v.size * v.args[0].shape[-1] if v.kind == "product" else 8 * v.size for v in values)

    @cached_property
    def inner(self) -> int:
        """How many rows a batch row has in every product: one, but where rows meet, so that all are taken for one."""
        operands = [v.args[0] for v in (*self.plan.phases.forward, *self.plan.sums) if v.kind in ("product", "outer")]
        return min((v.size // v.shape[-1] for v in operands), default=1)

    def _deep(self) -> int:
        """How many rows a weight gradient's product sums over at a time: more where the gradient leaves the cache."""
        outers = [v for v in self.plan.sums if v.kind == "outer"]
        return DEEP * 4 if sum(v.size for v in outers) * self.dtype.itemsize > 2 << 20 else DEEP

    def _scratch(self, rows: int, block: int) -> int:
        kernels = products(self.dtype)
        most = 0
        for value in self.plan.sums:
            if value.kind == "outer":
                inner = value.args[0].size // value.args[0].shape[-1]
                most = max(most, kernels.outer_scratch(inner * rows * (block if inner == 1 else 1), *value.shape))
        return most
