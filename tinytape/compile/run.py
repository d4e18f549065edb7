"""Running a compiled scan: memory, packed weights, threads."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..engine.tree import Array
from ..kernels import threads, workspace
from .cache import load
from .dims import Dims
from .emit_numba import numba_source
from .layout import ALIGN, Layout, Strides, addresses_of, strides_of
from .packs import packed, products
from .program import Program, Value
from .recipes import Invariants, finish
from .schedule import Half, schedule, settle_roots

__all__ = ["Compiled", "Saved"]

TALL = 48  # rows that a hoisted product has at least, if there are so many
DEEP = 256  # rows that a weight gradient's product has at least
WORTH = 1 << 20  # floating-point operations that are worth a second thread
LARGE = 1 << 18  # bytes: from here on arrays come from the pool
Arrays = Sequence[Array]


class Saved(NamedTuple):
    """What a forward run leaves for its adjoint."""

    steps: int
    rows: int
    threads: int
    history: list[workspace.Block]  # one for each thread
    init: list[Array]
    xs: list[Array]
    fixed: list[Array]
    ys: list[Array]
    invariants: Invariants


class Compiled:
    """A step as kernels, for any number of steps and rows."""

    def __init__(self, program: Program, title: str) -> None:
        settle_roots(program)
        self.program = program
        self.dims = Dims(program)
        self.plan = schedule(program, self.dims)
        self.source, self.forward_kernel, self.backward_kernel = numba_source(self.plan, self.dims, title)
        self.module = load(title, self.source)
        self.dtype = np.dtype(program.dtype)
        self.layouts: dict[Any, list[Layout]] = {}

    # ---- forward -----------------------------------------------------------------------------------------------

    def forward(
        self, init: Arrays, xs: Arrays, captured: dict[Any, Any], steps: int, rows: int, reverse: bool = False
    ) -> tuple[list[Array], list[Array], Saved]:
        """The last carry and the outputs; arrays are (rows, ...) and (steps, rows, ...)."""
        program, dtype = self.program, self.dtype
        invariants = Invariants(captured)
        init = [np.ascontiguousarray(a, dtype) for a in init]
        xs = [_rows(a, dtype, a.ndim - len(v.shape)) for a, v in zip(xs, self.xs, strict=True)]
        fixed = [_rows(invariants[v.args[0]], dtype, 1) for v in self.fixed]
        results = [pooled((steps, rows, *v.shape), dtype) for v in program.outputs]
        ys = results
        if reverse:
            xs, ys = [a[::-1] for a in xs], [y[::-1] for y in results]
        count = self._threads(steps, rows)
        layouts = self._layouts("forward", steps, rows, count, xs, ys, (), ())
        history = [workspace.take(max(layout.history.nbytes, ALIGN)) for layout in layouts]
        pads = [layout.borrow() for layout in layouts]
        saved = Saved(steps, rows, count, history, init, xs, fixed, ys, invariants)
        weights = [packed(v, invariants, dtype) for v in self.forward_matrices]
        read = self._read(invariants)
        common = addresses_of([*init, *xs, *fixed, *ys, *[w.address for w in weights], *read, 0, 0])
        kernel, constants = self.module.forward, self.forward_constants

        def task(i: int) -> None:
            addresses = common if count == 1 else common.copy()
            addresses[-2], addresses[-1] = history[i].address, pads[i].address
            kernel(layouts[i].table(addresses), constants)

        threads.run(task, count) if count > 1 else task(0)
        finals = [np.empty((rows, *v.shape), dtype) for v in program.carries]
        for i, (value, final) in enumerate(zip(program.carries, finals, strict=True)):
            place = self.plan.forward.places[value]
            if place.startswith("ys"):
                final[...] = ys[int(place[2:])][-1]
            else:
                self._final(i, final, layouts, history if program.carry_seeds else [pad.block for pad in pads])
        for layout, pad in zip(layouts, pads, strict=True):
            layout.give_back(pad)
        return finals, results, saved

    def _final(self, i: int, final: Array, layouts: list[Layout], blocks: list[workspace.Block]) -> None:
        """Copy a leaf of the last carry from the memory of each thread."""
        value = self.program.carries[i]
        for layout, block in zip(layouts, blocks, strict=True):
            where = layout.history if layout.training else layout.temporary
            last = layout.steps - 1 if layout.training else layout.steps & 1
            offset = where.offsets[value] + last * layout.rows * value.size * layout.item
            final[layout.start : layout.start + layout.rows] = block.array(
                self.dtype, (layout.rows, *value.shape), offset
            )

    # ---- backward ----------------------------------------------------------------------------------------------

    def backward(
        self, saved: Saved, dcarry: Sequence[Array | None], dys: Sequence[Array | None], reverse: bool = False
    ) -> tuple[list[Array | None], dict[int, Array], dict[int, Array], dict[Any, Array]]:
        """Gradients for init, xs (by leaf), fixed inputs, and captured tensors (by key)."""
        program, dtype, steps, rows = self.program, self.dtype, saved.steps, saved.rows
        results = {i: pooled((steps, rows, *g.shape), dtype) for i, g in program.input_gradients.items()}
        dxs = [a[::-1] for a in results.values()] if reverse else list(results.values())
        dfixed = {i: np.zeros((rows, *g.shape), dtype) for i, g in program.fixed_gradients.items()}
        dinit = [None if g is None else np.empty((rows, *g.shape), dtype) for g in program.carry_gradients]
        given: list[Array | None] = []
        for d, seed in zip(dys, program.output_seeds, strict=True):
            rows_of = None if d is None or seed.kind == "none" else _rows(d, dtype, 2)
            given.append(rows_of[::-1] if reverse and rows_of is not None else rows_of)
        layouts = self._layouts("backward", steps, rows, saved.threads, saved.xs, saved.ys, given, dxs)
        pads = [layout.borrow(self.added) for layout in layouts]
        for layout, pad in zip(layouts, pads, strict=True):
            mine = slice(layout.start, layout.start + layout.rows)
            for ring, d in zip(pad.rings, dcarry, strict=True):
                if ring is not None:
                    ring[0] = 0 if d is None else d[mine]
        sums = [[self._sum(v) for v in self.plan.phases.sums] for _ in layouts]
        weights = [packed(v, saved.invariants, dtype) for v in self.backward_matrices]
        common = [
            *saved.init, *saved.xs, *saved.fixed, *saved.ys, *[w.address for w in weights],
            *self._read(saved.invariants), *[d for d in given if d is not None], *dxs, *dfixed.values(),
        ]  # fmt: skip
        kernel, constants = self.module.backward, self.backward_constants

        def task(i: int) -> None:
            pad = pads[i]
            own = [*sums[i], *pad.parts, saved.history[i].address, pad.address]
            kernel(layouts[i].table(addresses_of([*common, *own])), constants)

        threads.run(task, len(layouts)) if len(layouts) > 1 else task(0)
        for layout, pad in zip(layouts, pads, strict=True):
            for out, ring in zip(dinit, pad.rings, strict=True):
                if out is not None and ring is not None:
                    out[layout.start : layout.start + layout.rows] = ring[steps & 1]
            layout.give_back(pad)
        for others in sums[1:]:
            for total, part in zip(sums[0], others, strict=True):
                np.add(total, part, out=total)
        known = Invariants(saved.invariants.captured)
        known.update(saved.invariants)
        known.update(zip(self.plan.phases.sums, sums[0], strict=True))
        return dinit, results, dfixed, finish(program, self.plan.phases.post, known)

    def _sum(self, value: Value) -> Array:
        if value.kind == "outer":
            return pooled(value.shape, self.dtype)  # the first block writes it
        return np.zeros(value.shape, self.dtype)

    # ---- layouts -----------------------------------------------------------------------------------------------

    def _threads(self, steps: int, rows: int) -> int:
        return max(1, min(threads.get_num_threads(), rows)) if steps * rows * self.work > WORTH else 1

    def _layouts(
        self,
        name: str,
        steps: int,
        rows: int,
        count: int,
        xs: Arrays,
        ys: Arrays,
        dys: Sequence[Array | None],
        dxs: Arrays,
    ) -> list[Layout]:
        """A layout for each thread, kept for the next run of the same form."""
        key = (
            name, steps, rows, count, tuple([a.strides[:2] for a in (*xs, *ys, *dxs)]),
            tuple([None if d is None else d.strides[:2] for d in dys]),
        )  # fmt: skip
        found = self.layouts.get(key)
        if found is None:
            strides: dict[Any, Strides] = {}
            for value, x in zip(self.xs, xs, strict=True):
                strides["x", value.index] = strides_of(x, len(value.shape))
            for i, y in enumerate(ys):
                strides[f"ys{i}"] = strides_of(y, y.ndim - 2)
            for i, d in enumerate(dys):
                if d is not None:
                    strides["seed_y", i] = strides_of(d, d.ndim - 2)
            for i, dx in zip(self.program.input_gradients, dxs, strict=False):
                strides[f"dx{i}"] = strides_of(dx, dx.ndim - 2)
            if len(self.layouts) > 64:
                self.layouts.clear()
            found = self.layouts[key] = self._new_layouts(name, steps, rows, count, strides)
        return found

    def _new_layouts(self, name: str, steps: int, rows: int, count: int, strides: dict[Any, Strides]) -> list[Layout]:
        program, forward = self.program, self.plan.forward
        half = forward if name == "forward" else self.plan.backward
        kernel = self.forward_kernel if name == "forward" else self.backward_kernel
        assert half is not None and kernel is not None
        matrices = self.forward_matrices if name == "forward" else self.backward_matrices
        order: list[Any] = [("carry", i) for i in range(len(program.carries))]
        order += [("x", v.index) for v in self.xs] + [("fixed", v.index) for v in self.fixed]
        order += [f"ys{i}" for i in range(len(program.outputs))] + [("weight", v) for v in matrices]
        order += [("invariant", v) for v in self.read_invariants]
        if name == "backward":
            order += [key for key in strides if key[0] == "seed_y"] + [f"dx{i}" for i in program.input_gradients]
            order += [f"dfixed{i}" for i in program.fixed_gradients] + [("sum", v) for v in self.plan.phases.sums]
            order += [("part", v) for v in self.added]
        bases = {key: i for i, key in enumerate([*order, "history", "temporary"])}
        cuts = [rows * i // count for i in range(count + 1)]
        layouts: list[Layout] = []
        for start, stop in pairwise(cuts):
            least = TALL if name == "forward" else self._deep()
            block = max(1, min(steps, -(-least // (stop - start))))
            scratch = self._scratch(stop - start, block) if name == "backward" else 0
            layouts.append(
                Layout(
                    program, half, forward.places, kernel, steps, stop - start, start, block, bases, strides, rows,
                    scratch,
                )
            )  # fmt: skip
        return layouts

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
                most = max(most, int(kernels.outer_scratch(inner * rows * (block if inner == 1 else 1), *value.shape)))
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
    def forward_matrices(self) -> list[Value]:
        return _matrices(self.plan.forward)

    @cached_property
    def backward_matrices(self) -> list[Value]:
        return _matrices(self.plan.backward)

    @cached_property
    def read_invariants(self) -> list[Value]:
        """Those that loops read element by element."""
        kernels = (self.forward_kernel, self.backward_kernel)
        found = [e.of for k in kernels if k is not None for e in k.entries if e.what == "at"]
        return list(dict.fromkeys(v for v in found if isinstance(v, Value) and v.kind == "invariant"))

    @cached_property
    def forward_constants(self) -> Array:
        return np.array(self.forward_kernel.constants, np.float64)

    @cached_property
    def backward_constants(self) -> Array:
        assert self.backward_kernel is not None
        return np.array(self.backward_kernel.constants, np.float64)

    @cached_property
    def added(self) -> list[Value]:
        """Sums over rows, which are added up for a block first."""
        return [v for v in self.plan.phases.sums if v.kind == "rowsum"]

    def _read(self, invariants: Invariants) -> list[Array]:
        for value in self.read_invariants:
            invariants[value] = np.ascontiguousarray(invariants[value], self.dtype)
        return [invariants[value] for value in self.read_invariants]


def _matrices(half: Half | None) -> list[Value]:
    if half is None:
        return []
    return list(dict.fromkeys(v.args[1] for stage in (*half.block, *half.step) for v in stage.products))


def _rows(array: Array, dtype: np.dtype[Any], outer: int) -> Array:
    """In the program's dtype; the axes within a row in C order."""
    if array.dtype != dtype:
        return np.ascontiguousarray(array, dtype)
    unit = dtype.itemsize
    for n, stride in zip(array.shape[: outer - 1 : -1], array.strides[: outer - 1 : -1], strict=True):
        if n != 1 and stride != unit:
            return np.ascontiguousarray(array)
        unit *= n
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
    return np.empty(shape, dtype) if nbytes < LARGE else np.asarray(_Held(workspace.take(nbytes), shape, dtype))
