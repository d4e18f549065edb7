"""Running a compiled scan: memory, packed weights, threads."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import accumulate, pairwise
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from ..engine.tree import Array
from ..kernels import threads, workspace
from ..ops.shape import reshape
from .addresses import bases_of
from .cache import kernel
from .dims import Dims
from .emit_numba import numba_source
from .layout import Layout, Pad, Space, Strides, strides_of
from .packs import Matrix, products
from .program import Program, Value
from .recipes import Invariants, finish
from .schedule import Half, schedule, settle_roots

__all__ = ["Compiled", "Gradients", "Run"]

TALL = 48  # rows that a hoisted product has at least, if there are so many
DEEP = 96  # rows that a weight gradient's product has at least
WORTH = 24_000_000  # floating-point operations of a forward run that are worth a second thread
LARGE = 1 << 20  # bytes: from here on arrays come from the pool, where they begin at whole cache lines
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
    layouts : list of Layout
        For each thread.
    arrays : list of array
        What kernels are told of in both directions, in their order.
    history : list of Block
        For each thread, if there is to be an adjoint.
    """

    __slots__ = (
        "arrays", "fixed", "history", "init", "invariants", "layouts", "rows", "start", "steps", "threads", "xs", "ys",
    )  # fmt: skip

    def __init__(
        self,
        steps: int,
        rows: int,
        threads: int,
        init: list[Array],
        xs: list[Array],
        fixed: list[Array],
        ys: list[Array],
        invariants: Invariants,
        start: int = 0,
    ) -> None:
        self.steps, self.rows, self.threads, self.start = steps, rows, threads, start
        self.init, self.xs, self.fixed, self.ys, self.invariants = init, xs, fixed, ys, invariants
        self.layouts: list[Layout] = []
        self.arrays = [*init, *xs, *fixed, *ys]
        self.history: list[workspace.Block] = []

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
        self, init: Arrays, xs: Arrays, outside: Invariants, steps: int, rows: int, reverse: bool = False
    ) -> tuple[list[Array], list[Array], Run]:
        """The last carry and the outputs; arrays are (rows, ...) and (steps, rows, ...)."""
        run, results = self.begin(init, xs, outside, steps, rows, reverse)
        if self.trains:
            run.history = [workspace.take(layout.history_bytes) for layout in run.layouts]
        return self.go(run), results, run

    def begin(
        self, init: Arrays, xs: Arrays, outside: Invariants, steps: int, rows: int, reverse: bool
    ) -> tuple[Run, list[Array]]:
        """All steps, still to be run, without memory for an adjoint; and the outputs in the order of xs."""
        dtype = self.dtype
        init = [np.ascontiguousarray(a, dtype) for a in init]
        xs = [_rows(a, dtype, rank) for a, rank in zip(xs, self.x_ranks, strict=True)]
        fixed = [_rows(outside[v.args[0]], dtype, len(v.shape)) for v in self.fixed] if self.fixed else []
        results = [pooled((steps, rows, *shape), dtype) for shape in self.output_shapes]
        ys = results
        if reverse:
            xs, ys = [a[::-1] for a in xs], [y[::-1] for y in results]
        run = Run(steps, rows, self.thread_count(steps, rows), init, xs, fixed, ys, outside)
        run.layouts = self._forward_layouts(run)
        return run, results

    def part(self, run: Run, start: int, stop: int, init: list[Array], history: list[workspace.Block]) -> Run:
        """Some steps of a run, from another carry, to be kept in memory that is there."""
        xs, ys = ([a[start:stop] for a in arrays] for arrays in (run.xs, run.ys))
        part = Run(stop - start, run.rows, run.threads, init, xs, run.fixed, ys, run.invariants, start)
        part.layouts, part.history = self._forward_layouts(part), history
        return part

    def go(self, run: Run) -> list[Array]:
        """Run the steps; the last carry."""
        layouts, invariants = run.layouts, run.invariants
        panels = [m.panels(invariants) for m in self.forward_matrices]
        for value in self.read_invariants:
            run.arrays.append(np.ascontiguousarray(invariants[value], self.dtype))
        if run.start:
            self._put_before(run)
        pads = [layout.borrow() for layout in layouts]
        _launch(self.forward_function, layouts, pads, run.arrays, map(_address, panels), run.history)
        blocks = run.history or [pad.memory for pad in pads]
        finals: list[Array] = []
        for value, at in self.finals_in_outputs:
            if at is not None:
                finals.append(np.array(run.ys[at][-1]))
            else:  # it is in the memory of each thread
                parts = [layout.last(block, value) for layout, block in zip(layouts, blocks, strict=True)]
                finals.append(np.array(parts[0]) if len(parts) == 1 else np.concatenate(parts))
        for layout, pad in zip(layouts, pads, strict=True):
            layout.give_back(pad)
        return finals

    def _put_before(self, run: Run) -> None:
        """A carry that lies by itself lies there before the first step too: sums read on from it."""
        for layout, block in zip(run.layouts, run.history, strict=True):
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
    ) -> tuple[list[Array | None], dict[int, Array], dict[int, Array], dict[Any, Array]]:
        """Gradients for init, if they are wanted, xs (by leaf), fixed inputs, and captured tensors (by key)."""
        gradients, dxs = self.begin_back(run, dys, reverse)
        dinit = self.go_back(run, dcarry, gradients, from_init=from_init)
        return dinit, *self.end_back(run, dxs, gradients)

    def begin_back(self, run: Run, dys: Sequence[Array | None], reverse: bool) -> tuple[Gradients, list[Array]]:
        """What all steps back will take and leave; and the gradients of xs in their order."""
        program, dtype = self.program, self.dtype
        results = [pooled((run.steps, run.rows, *shape), dtype) for shape in self.dx_shapes]
        dxs = results
        given = [
            None if d is None or seed.kind == "none" else _rows(d, dtype, len(seed.shape))
            for d, seed in zip(dys, program.output_seeds, strict=True)
        ]
        if reverse:
            dxs, given = [a[::-1] for a in dxs], [None if d is None else d[::-1] for d in given]
        dfixed = [np.zeros((run.rows, *g.shape), dtype) for g in program.fixed_gradients.values()]
        sums: list[list[Array]] = []
        for _ in run.layouts:
            sums.append([(pooled if written else np.zeros)(shape, dtype) for shape, written in self.sum_shapes])
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
        layouts = self._backward_layouts(run, gradients)
        pads = [layout.borrow(self.added) for layout in layouts]
        for layout, pad in zip(layouts, pads, strict=True):
            layout.clear_rings(pad.memory)
            for i in self.rings:
                if (d := dcarry[i]) is not None:
                    layout.ring(pad.memory, i, 0)[...] = d[layout.start : layout.start + layout.rows]
        panels = [m.panels(run.invariants) for m in self.backward_matrices]
        given = [d for d in gradients.ys if d is not None]
        arrays = [*run.arrays, *given, *gradients.xs, *gradients.fixed]
        addresses = [int(run.start > 0), int(later), *map(_address, panels)]
        _launch(self.backward_function, layouts, pads, arrays, addresses, run.history, gradients.sums)
        dinit: list[Array | None] = [None] * len(self.program.carries)
        for i in self.rings if from_init else ():
            if self.program.carry_gradients[i] is not None:
                parts = [x.ring(pad.memory, i, run.steps & 1) for x, pad in zip(layouts, pads, strict=True)]
                dinit[i] = np.array(parts[0]) if len(parts) == 1 else np.concatenate(parts)
        for layout, pad in zip(layouts, pads, strict=True):
            layout.give_back(pad)
        return dinit

    def end_back(
        self, run: Run, dxs: list[Array], gradients: Gradients
    ) -> tuple[dict[int, Array], dict[int, Array], dict[Any, Array]]:
        """The gradients for xs, fixed inputs and captured tensors, when all steps are done."""
        program = self.program
        first, *others = gradients.sums
        if others:
            _add_up(gradients.sums)
        inputs = dict(zip(program.input_gradients, dxs, strict=True))
        fixed = dict(zip(program.fixed_gradients, gradients.fixed, strict=True))
        if self.plain_sums is not None:
            sums = {key: first[i] if shape is None else first[i].reshape(shape) for key, i, shape in self.plain_sums}
            return inputs, fixed, sums
        known = Invariants(run.invariants.captured, run.invariants)
        known.update(zip(self.plan.phases.sums, first, strict=True))
        return inputs, fixed, finish(program, self.plan.phases.post, known)

    # ---- layouts -----------------------------------------------------------------------------------------------

    def thread_count(self, steps: int, rows: int) -> int:
        """How many threads share the rows."""
        if steps * rows * self.work <= WORTH:
            return 1
        return max(1, min(threads.get_num_threads(), rows))

    def _forward_layouts(self, run: Run) -> list[Layout]:
        """A layout for each thread, kept for the next run of the same form."""
        key = run.steps, run.rows, run.threads, *[a.strides for a in (*run.xs, *run.ys)]
        found = self.layouts.get(key)
        if found is None:
            strides: dict[Any, Strides] = {}
            for value, x in zip(self.xs, run.xs, strict=True):
                strides["x", value.index] = strides_of(x, len(value.shape))
            for i, y in enumerate(run.ys):
                strides[f"ys{i}"] = strides_of(y, y.ndim - 2)
            if len(self.layouts) > 64:
                self.layouts.clear()
            found = self.layouts[key] = self._new_layouts("forward", run.steps, run.rows, run.threads, strides)
        return found

    def _backward_layouts(self, run: Run, gradients: Gradients) -> list[Layout]:
        """As `_forward_layouts`; they are kept with those of the run."""
        first = run.layouts[0]
        key = tuple([None if d is None else d.strides for d in gradients.ys])
        found = first.adjoints.get(key)
        if found is None:
            strides = dict(first.strides)
            for i, d in enumerate(gradients.ys):
                if d is not None:
                    strides["seed_y", i] = strides_of(d, d.ndim - 2)
            for i, dx in zip(self.program.input_gradients, gradients.xs, strict=True):
                strides[f"dx{i}"] = strides_of(dx, dx.ndim - 2)
            if len(first.adjoints) > 16:
                first.adjoints.clear()
            found = self._new_layouts("backward", run.steps, run.rows, run.threads, strides)
            first.adjoints[key] = found
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
    def rings(self) -> list[int]:
        """The leaves of the carry through which gradients come back."""
        return [i for i, seed in enumerate(self.program.carry_seeds) if seed.kind != "none"]

    @cached_property
    def trains(self) -> bool:
        """Whether there is an adjoint."""
        return bool(self.program.carry_seeds)

    @cached_property
    def output_shapes(self) -> list[tuple[int, ...]]:
        """Of a row, in a step."""
        return [v.shape for v in self.program.outputs]

    @cached_property
    def dx_shapes(self) -> list[tuple[int, ...]]:
        """Of a row, in a step: the gradients of those inputs that have one."""
        return [v.shape for v in self.program.input_gradients.values()]

    @cached_property
    def sum_shapes(self) -> list[tuple[tuple[int, ...], bool]]:
        """Of the sums over rows and steps, and whether the first block of steps writes it."""
        return [(v.shape, v.kind == "outer") for v in self.plan.phases.sums]

    @cached_property
    def plain_sums(self) -> list[tuple[Any, int, tuple[int, ...] | None]] | None:
        """Of each captured tensor, which sum its gradient is, and its shape if that is another.

        None where there is more to compute.
        """
        found: list[tuple[Any, int, tuple[int, ...] | None]] = []
        for key, value in self.program.captured_gradients.items():
            recipe = value.recipe
            total = recipe.args[0] if recipe is not None and recipe.op is reshape.op else value
            if total not in self.plan.phases.sums:
                return None
            found.append((key, self.plan.phases.sums.index(total), None if total.shape == value.shape else value.shape))
        return found

    @cached_property
    def finals_in_outputs(self) -> list[tuple[Value, int | None]]:
        """The leaves of the carry, and of each the output whose memory it lies in."""
        places = [(v, self.plan.forward.places[v]) for v in self.program.carries]
        return [(v, int(place[2:]) if place.startswith("ys") else None) for v, place in places]

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


_address = attrgetter("address")


def _launch(
    function: Function,
    layouts: list[Layout],
    pads: list[Pad],
    arrays: list[Array],
    addresses: Iterable[int],
    history: list[workspace.Block],
    sums: list[list[Array]] | None = None,
) -> None:
    """Run a kernel once for each layout, on as many threads."""
    shared = [*addresses]

    def task(i: int) -> None:
        pad = pads[i]
        own = [*shared, history[i].address if history else 0, pad.address]
        of_thread = arrays if sums is None else [*arrays, *sums[i], *pad.parts]
        function(layouts[i].address, bases_of(of_thread, own), pad.table)

    if len(layouts) == 1:
        task(0)
    else:
        threads.run(task, len(layouts))


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
