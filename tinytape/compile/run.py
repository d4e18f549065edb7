"""Running a compiled scan: memory, packed weights, threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import numpy as np

from ..engine.tree import Array
from ..kernels import threads, workspace
from .addresses import bases_of
from .cache import kernel
from .dims import Dims
from .emit_numba import numba_source
from .layout import ALIGN, Layout, Pad, Space, Strides, strides_of
from .packs import Matrix, products
from .program import Program, Value
from .recipes import Invariants, finish
from .schedule import Half, schedule, settle_roots

__all__ = ["Compiled", "Gradients", "Run"]

TALL = 48  # rows that a hoisted product has at least, if there are so many
DEEP = 96  # rows that a weight gradient's product has at least
WORTH = 24_000_000  # floating-point operations of a forward run that are worth a second thread
LARGE = 1 << 18  # bytes: from here on arrays come from the pool
ARGUMENTS = 3  # of a kernel: numbers, bases, room for a table
Arrays = Sequence[Array]
Function = Callable[..., int]


class Run(NamedTuple):
    """A forward run over some steps: what it takes, and what it leaves for its adjoint."""

    steps: int
    rows: int
    threads: int
    init: list[Array]
    xs: list[Array]
    fixed: list[Array]
    ys: list[Array]
    invariants: Invariants
    history: list[workspace.Block] = []  # noqa: RUF012 - one for each thread, if there is to be an adjoint
    start: int = 0  # the number of its first step, of all steps

    def kept_buffers(self) -> dict[int, int]:
        """The memory that waits for the adjoint, for `engine.recording.kept_buffers`."""
        return {id(block): block.nbytes for block in self.history}


class Gradients(NamedTuple):
    """What an adjoint run takes and leaves, beside the gradient of the carry."""

    ys: list[Array | None]
    xs: list[Array]
    fixed: list[Array]
    sums: list[list[Array]]  # over rows and steps, for each thread


class Compiled:
    """A step as kernels, for any number of steps and rows."""

    def __init__(self, program: Program, title: str) -> None:
        settle_roots(program)
        self.program = program
        self.dims = Dims(program)
        self.plan = schedule(program, self.dims)
        self.source, self.forward_kernel, self.backward_kernel = numba_source(self.plan, self.dims, title)
        self.title = title
        self.dtype = np.dtype(program.dtype)
        self.layouts: dict[Any, list[Layout]] = {}

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(
        self, init: Arrays, xs: Arrays, captured: dict[Any, Any], steps: int, rows: int, reverse: bool = False
    ) -> tuple[list[Array], list[Array], Run]:
        """The last carry and the outputs; arrays are (rows, ...) and (steps, rows, ...)."""
        run, results = self.begin(init, xs, captured, steps, rows, reverse)
        if self.program.carry_seeds:
            layouts = self._layouts("forward", run)
            run = run._replace(history=[workspace.take(layout.history.nbytes or ALIGN) for layout in layouts])
        return self.go(run), results, run

    def begin(
        self, init: Arrays, xs: Arrays, captured: dict[Any, Any], steps: int, rows: int, reverse: bool
    ) -> tuple[Run, list[Array]]:
        """All steps, still to be run, without memory for an adjoint; and the outputs in the order of xs."""
        dtype, invariants = self.dtype, Invariants(captured)
        init = [np.ascontiguousarray(a, dtype) for a in init]
        xs = [_rows(a, dtype, rank) for a, rank in zip(xs, self.x_ranks, strict=True)]
        fixed = [_rows(invariants[v.args[0]], dtype, len(v.shape)) for v in self.fixed]
        results = [pooled((steps, rows, *v.shape), dtype) for v in self.program.outputs]
        ys = results
        if reverse:
            xs, ys = [a[::-1] for a in xs], [y[::-1] for y in results]
        return Run(steps, rows, self.thread_count(steps, rows), init, xs, fixed, ys, invariants), results

    def go(self, run: Run) -> list[Array]:
        """Run the steps; the last carry."""
        layouts = self._layouts("forward", run)
        pads = [layout.borrow() for layout in layouts]
        arrays = [*run.init, *run.xs, *run.fixed, *run.ys, *self._read(run.invariants)]
        panels = [m.panels(run.invariants) for m in self.forward_matrices]
        addresses = [p.address for p in panels]

        def bases(i: int) -> bytes:
            return bases_of(arrays, [*addresses, run.history[i].address if run.history else 0, pads[i].address])

        if run.start:
            self._put_before(run, layouts)
        _launch(self.forward_function, layouts, pads, bases)
        blocks = run.history or [pad.block for pad in pads]
        finals = [
            np.array(run.ys[at][-1]) if at is not None else self._final(i, run.rows, layouts, blocks)
            for i, at in enumerate(self.finals_in_outputs)
        ]
        for layout, pad in zip(layouts, pads, strict=True):
            layout.give_back(pad)
        return finals

    def _put_before(self, run: Run, layouts: list[Layout]) -> None:
        """A carry that lies by itself lies there before the first step too: sums read on from it."""
        for layout, block in zip(layouts, run.history, strict=True):
            for value, first in zip(self.program.carries, run.init, strict=True):
                if value in layout.carried:
                    layout.row_before(block, value)[...] = first[layout.start : layout.start + layout.rows]

    def _final(self, i: int, rows: int, layouts: list[Layout], blocks: list[workspace.Block]) -> Array:
        """A leaf of the last carry, from the memory of each thread."""
        value = self.program.carries[i]
        final = np.empty((rows, *value.shape), self.dtype)
        for layout, block in zip(layouts, blocks, strict=True):
            where = layout.history if layout.training else layout.temporary
            last = layout.steps - 1 if layout.training else layout.steps & 1
            offset = where.offsets[value] + last * layout.rows * value.size * layout.item
            mine = block.view(self.dtype, (layout.rows, *value.shape), offset)
            final[layout.start : layout.start + layout.rows] = mine
        return final

    # ---- backward ----------------------------------------------------------------------------------------------

    def backward(
        self, run: Run, dcarry: Sequence[Array | None], dys: Sequence[Array | None], reverse: bool = False
    ) -> tuple[list[Array | None], dict[int, Array], dict[int, Array], dict[Any, Array]]:
        """Gradients for init, xs (by leaf), fixed inputs, and captured tensors (by key)."""
        gradients, dxs = self.begin_back(run, dys, reverse)
        dinit = self.go_back(run, dcarry, gradients)
        return dinit, *self.end_back(run, dxs, gradients)

    def begin_back(self, run: Run, dys: Sequence[Array | None], reverse: bool) -> tuple[Gradients, list[Array]]:
        """What all steps back will take and leave; and the gradients of xs in their order."""
        program, dtype = self.program, self.dtype
        results = [pooled((run.steps, run.rows, *g.shape), dtype) for g in program.input_gradients.values()]
        dxs = results
        given = [
            None if d is None or seed.kind == "none" else _rows(d, dtype, len(seed.shape))
            for d, seed in zip(dys, program.output_seeds, strict=True)
        ]
        if reverse:
            dxs, given = [a[::-1] for a in dxs], [None if d is None else d[::-1] for d in given]
        dfixed = [np.zeros((run.rows, *g.shape), dtype) for g in program.fixed_gradients.values()]
        sums = [[self._sum(v) for v in self.plan.phases.sums] for _ in range(run.threads)]
        return Gradients(given, dxs, dfixed, sums), results

    def go_back(
        self, run: Run, dcarry: Sequence[Array | None], gradients: Gradients, later: bool = False
    ) -> list[Array | None]:
        """Run the steps backwards, whether or not `later` ones have been; the gradient of the carry before them."""
        layouts = self._layouts("backward", run, gradients)
        pads = [layout.borrow(self.added) for layout in layouts]
        for layout, pad in zip(layouts, pads, strict=True):
            for ring, d in zip(pad.rings, dcarry, strict=True):
                if ring is not None:
                    ring[0] = 0 if d is None else d[layout.start : layout.start + layout.rows]
        panels = [m.panels(run.invariants) for m in self.backward_matrices]
        arrays = [
            *run.init, *run.xs, *run.fixed, *run.ys, *self._read(run.invariants),
            *[d for d in gradients.ys if d is not None], *gradients.xs, *gradients.fixed,
        ]  # fmt: skip
        addresses = [int(run.start > 0), int(later), *[p.address for p in panels]]

        def bases(i: int) -> bytes:
            own = [*addresses, run.history[i].address, pads[i].address]
            return bases_of([*arrays, *gradients.sums[i], *pads[i].parts], own)

        _launch(self.backward_function, layouts, pads, bases)
        dinit = [
            None if g is None else np.empty((run.rows, *g.shape), self.dtype) for g in self.program.carry_gradients
        ]
        for layout, pad in zip(layouts, pads, strict=True):
            for out, ring in zip(dinit, pad.rings, strict=True):
                if out is not None and ring is not None:
                    out[layout.start : layout.start + layout.rows] = ring[run.steps & 1]
            layout.give_back(pad)
        return dinit

    def end_back(
        self, run: Run, dxs: list[Array], gradients: Gradients
    ) -> tuple[dict[int, Array], dict[int, Array], dict[Any, Array]]:
        """The gradients for xs, fixed inputs and captured tensors, when all steps are done."""
        program = self.program
        first, *others = gradients.sums
        for sums in others:
            for total, part in zip(first, sums, strict=True):
                np.add(total, part, out=total)
        known = Invariants(run.invariants.captured)
        known.update(run.invariants)
        known.update(zip(self.plan.phases.sums, first, strict=True))
        inputs = dict(zip(program.input_gradients, dxs, strict=True))
        fixed = dict(zip(program.fixed_gradients, gradients.fixed, strict=True))
        return inputs, fixed, finish(program, self.plan.phases.post, known)

    def _sum(self, value: Value) -> Array:
        if value.kind == "outer":
            return pooled(value.shape, self.dtype)  # the first block writes it
        return np.zeros(value.shape, self.dtype)

    # ---- layouts -----------------------------------------------------------------------------------------------

    def thread_count(self, steps: int, rows: int) -> int:
        """How many threads share the rows."""
        return max(1, min(threads.get_num_threads(), rows)) if steps * rows * self.work > WORTH else 1

    def _layouts(self, name: str, run: Run, gradients: Gradients | None = None) -> list[Layout]:
        """A layout for each thread, kept for the next run of the same form."""
        dys, dxs = ((), ()) if gradients is None else (gradients.ys, gradients.xs)
        key = (
            name, run.steps, run.rows, run.threads, tuple([a.strides for a in (*run.xs, *run.ys, *dxs)]),
            tuple([None if d is None else d.strides for d in dys]),
        )  # fmt: skip
        found = self.layouts.get(key)
        if found is None:
            strides: dict[Any, Strides] = {}
            for value, x in zip(self.xs, run.xs, strict=True):
                strides["x", value.index] = strides_of(x, len(value.shape))
            for i, y in enumerate(run.ys):
                strides[f"ys{i}"] = strides_of(y, y.ndim - 2)
            for i, d in enumerate(dys):
                if d is not None:
                    strides["seed_y", i] = strides_of(d, d.ndim - 2)
            for i, dx in zip(self.program.input_gradients, dxs, strict=False):
                strides[f"dx{i}"] = strides_of(dx, dx.ndim - 2)
            if len(self.layouts) > 64:
                self.layouts.clear()
            found = self.layouts[key] = self._new_layouts(name, run.steps, run.rows, run.threads, strides)
        return found

    def _new_layouts(self, name: str, steps: int, rows: int, count: int, strides: dict[Any, Strides]) -> list[Layout]:
        program = self.program
        kernel = self.forward_kernel if name == "forward" else self.backward_kernel
        assert kernel is not None
        matrices = [m.value for m in (self.forward_matrices if name == "forward" else self.backward_matrices)]
        order: list[Any] = [("carry", i) for i in range(len(program.carries))]
        order += [("x", v.index) for v in self.xs] + [("fixed", v.index) for v in self.fixed]
        order += [f"ys{i}" for i in range(len(program.outputs))] + [("invariant", v) for v in self.read_invariants]
        if name == "backward":
            order += [key for key in strides if key[0] == "seed_y"] + [f"dx{i}" for i in program.input_gradients]
            order += [f"dfixed{i}" for i in program.fixed_gradients] + [("sum", v) for v in self.plan.phases.sums]
            order += [("part", v) for v in self.added]
            order += ["earlier", "later"]
        order += [("weight", v) for v in matrices]
        bases = {key: i for i, key in enumerate([*order, "history", "temporary"])}
        spaces = self.spaces(name, steps, rows, count)
        starts = accumulate([space.rows for space in spaces], initial=0)
        return [
            Layout(space, kernel, start, rows, bases, strides) for space, start in zip(spaces, starts, strict=False)
        ]

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

    # ---- what does not change over time ------------------------------------------------------------------------

    @cached_property
    def work(self) -> int:
        """Roughly the floating-point operations of a step and row."""
        values = self.plan.phases.forward
        return sum(2 * v.size * v.args[0].shape[-1] if v.kind == "product" else 8 * v.size for v in values)

    @cached_property
    def xs(self) -> list[Value]:
        return [v for v in self.program.inputs if v.kind == "x"]

    @cached_property
    def fixed(self) -> list[Value]:
        return [v for v in self.program.inputs if v.kind == "fixed"]

    @cached_property
    def x_ranks(self) -> list[int]:
        """How many axes a row of each input has."""
        return [len(v.shape) for v in self.xs]

    @cached_property
    def finals_in_outputs(self) -> list[int | None]:
        """Of each leaf of the carry, the output whose memory it lies in."""
        places = [self.plan.forward.places[v] for v in self.program.carries]
        return [int(place[2:]) if place.startswith("ys") else None for place in places]

    @cached_property
    def forward_matrices(self) -> list[Matrix]:
        return self._matrices(self.plan.forward)

    @cached_property
    def backward_matrices(self) -> list[Matrix]:
        return self._matrices(self.plan.backward)

    def _matrices(self, half: Half | None) -> list[Matrix]:
        if half is None:
            return []
        found = dict.fromkeys(v.args[1] for stage in (*half.block, *half.step) for v in stage.products)
        return [Matrix(value, self.dtype) for value in found]

    @cached_property
    def read_invariants(self) -> list[Value]:
        """Those that loops read element by element."""
        kernels = (self.forward_kernel, self.backward_kernel)
        found = [e.of for k in kernels if k is not None for e in k.entries if e.what == "at"]
        return list(dict.fromkeys(v for v in found if isinstance(v, Value) and v.kind == "invariant"))

    @cached_property
    def forward_function(self) -> Function:
        return kernel(self.title, self.source, "forward", ARGUMENTS)

    @cached_property
    def backward_function(self) -> Function:
        return kernel(self.title, self.source, "backward", ARGUMENTS)

    @cached_property
    def added(self) -> list[Value]:
        """Sums over rows, which are added up for a block first."""
        return [v for v in self.plan.phases.sums if v.kind == "rowsum"]

    def _read(self, invariants: Invariants) -> list[Array]:
        for value in self.read_invariants:
            invariants[value] = np.ascontiguousarray(invariants[value], self.dtype)
        return [invariants[value] for value in self.read_invariants]


def _launch(function: Function, layouts: list[Layout], pads: list[Pad], bases: Callable[[int], bytes]) -> None:
    """Run a kernel once for each layout, on as many threads."""

    def task(i: int) -> None:
        function(layouts[i].address, bases(i), pads[i].table)

    if len(layouts) == 1:
        task(0)
    else:
        threads.run(task, len(layouts))


def _rows(array: Array, dtype: np.dtype[Any], rank: int) -> Array:
    """In the program's dtype; the last `rank` axes, which are within a row, in C order."""
    if array.dtype != dtype:
        return np.ascontiguousarray(array, dtype)
    if array.flags.c_contiguous:
        return array
    unit = dtype.itemsize
    for i in range(array.ndim - 1, array.ndim - 1 - rank, -1):
        if array.shape[i] != 1 and array.strides[i] != unit:
            return np.ascontiguousarray(array)
        unit *= array.shape[i]
    return array


class _Held:
    """Memory of the pool in the form of an array, which keeps it: no view of another array, so a leaf may take it."""

    __slots__ = ("__array_interface__", "block")

    def __init__(self, block: workspace.Block, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self.block = block
        self.__array_interface__ = {
            "version": 3, "typestr": dtype.str, "shape": shape, "data": (block.address, False),
        }  # fmt: skip


def pooled(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """An array that is not cleared; a large one goes back to the pool when nobody has it any more."""
    nbytes = dtype.itemsize
    for n in shape:
        nbytes *= n
    if nbytes < LARGE:
        return np.empty(shape, dtype)
    return np.asarray(_Held(workspace.take(nbytes, counted=False), shape, dtype))
