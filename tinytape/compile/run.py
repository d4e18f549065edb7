"""Running a compiled scan: memory, packed weights, threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cached_property
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from ..engine.tree import Array
from ..kernels import threads, workspace
from .addresses import bases_of
from .cache import load
from .dims import Dims
from .emit_numba import numba_source
from .layout import ALIGN, Layout, Pad, Strides, strides_of
from .packs import Matrix, products
from .program import Program, Value
from .recipes import Invariants, finish
from .schedule import Half, schedule, settle_roots

__all__ = ["Compiled", "Saved"]

TALL = 48  # rows that a hoisted product has at least, if there are so many
DEEP = 256  # rows that a weight gradient's product has at least
WORTH = 24_000_000  # floating-point operations of a forward run that are worth a second thread
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
        dtype, invariants = self.dtype, Invariants(captured)
        init = [np.ascontiguousarray(a, dtype) for a in init]
        xs = [_rows(a, dtype, rank) for a, rank in zip(xs, self.x_ranks, strict=True)]
        fixed = [_rows(invariants[v.args[0]], dtype, len(v.shape)) for v in self.fixed]
        results = [pooled((steps, rows, *v.shape), dtype) for v in self.program.outputs]
        ys = results
        if reverse:
            xs, ys = [a[::-1] for a in xs], [y[::-1] for y in results]
        count = self._threads(steps, rows)
        layouts = self._layouts("forward", steps, rows, count, xs, ys)
        pads = [layout.borrow() for layout in layouts]
        training = bool(self.program.carry_seeds)
        history = [workspace.take(layout.history.nbytes or ALIGN) for layout in layouts] if training else []
        arrays = [*init, *xs, *fixed, *ys, *self._read(invariants)]
        panels = [m.panels(invariants) for m in self.forward_matrices]
        addresses = [p.address for p in panels]

        def bases(i: int) -> Array:
            return bases_of(arrays, [*addresses, history[i].address if training else 0, pads[i].address])

        _launch(self.module.forward, self.forward_constants, layouts, bases)
        blocks = history or [pad.block for pad in pads]
        finals = [
            np.array(ys[at][-1]) if at is not None else self._final(i, rows, layouts, blocks)
            for i, at in enumerate(self.finals_in_outputs)
        ]
        for layout, pad in zip(layouts, pads, strict=True):
            layout.give_back(pad)
        return finals, results, Saved(steps, rows, count, history, init, xs, fixed, ys, invariants)

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
        self, saved: Saved, dcarry: Sequence[Array | None], dys: Sequence[Array | None], reverse: bool = False
    ) -> tuple[list[Array | None], dict[int, Array], dict[int, Array], dict[Any, Array]]:
        """Gradients for init, xs (by leaf), fixed inputs, and captured tensors (by key)."""
        program, dtype, steps, rows = self.program, self.dtype, saved.steps, saved.rows
        results = {i: pooled((steps, rows, *g.shape), dtype) for i, g in program.input_gradients.items()}
        dxs = list(results.values())
        given = [
            None if d is None or seed.kind == "none" else _rows(d, dtype, len(seed.shape))
            for d, seed in zip(dys, program.output_seeds, strict=True)
        ]
        if reverse:
            dxs, given = [a[::-1] for a in dxs], [None if d is None else d[::-1] for d in given]
        dfixed = {i: np.zeros((rows, *g.shape), dtype) for i, g in program.fixed_gradients.items()}
        dinit = [None if g is None else np.empty((rows, *g.shape), dtype) for g in program.carry_gradients]
        layouts = self._layouts("backward", steps, rows, saved.threads, saved.xs, saved.ys, given, dxs)
        pads = [layout.borrow(self.added) for layout in layouts]
        for layout, pad in zip(layouts, pads, strict=True):
            for ring, d in zip(pad.rings, dcarry, strict=True):
                if ring is not None:
                    ring[0] = 0 if d is None else d[layout.start : layout.start + layout.rows]
        sums = [[self._sum(v) for v in self.plan.phases.sums] for _ in layouts]
        arrays = [
            *saved.init, *saved.xs, *saved.fixed, *saved.ys, *self._read(saved.invariants),
            *[d for d in given if d is not None], *dxs, *dfixed.values(),
        ]  # fmt: skip
        panels = [m.panels(saved.invariants) for m in self.backward_matrices]
        addresses = [p.address for p in panels]

        def bases(i: int) -> Array:
            own = [*addresses, saved.history[i].address, pads[i].address]
            return bases_of([*arrays, *sums[i], *pads[i].parts], own)

        _launch(self.module.backward, self.backward_constants, layouts, bases)
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
        dys: Sequence[Array | None] = (),
        dxs: Arrays = (),
    ) -> list[Layout]:
        """A layout for each thread, kept for the next run of the same form."""
        key = (
            name, steps, rows, count, tuple([a.strides for a in (*xs, *ys, *dxs)]),
            tuple([None if d is None else d.strides for d in dys]),
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
        matrices = [m.value for m in (self.forward_matrices if name == "forward" else self.backward_matrices)]
        order: list[Any] = [("carry", i) for i in range(len(program.carries))]
        order += [("x", v.index) for v in self.xs] + [("fixed", v.index) for v in self.fixed]
        order += [f"ys{i}" for i in range(len(program.outputs))] + [("invariant", v) for v in self.read_invariants]
        if name == "backward":
            order += [key for key in strides if key[0] == "seed_y"] + [f"dx{i}" for i in program.input_gradients]
            order += [f"dfixed{i}" for i in program.fixed_gradients] + [("sum", v) for v in self.plan.phases.sums]
            order += [("part", v) for v in self.added]
        order += [("weight", v) for v in matrices]
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


def _launch(kernel: Any, constants: Array, layouts: list[Layout], bases: Callable[[int], Array]) -> None:
    """Run a kernel once for each layout, on as many threads."""

    def task(i: int) -> None:
        layout = layouts[i]
        kernel(layout.template, layout.positions, layout.sources, bases(i), constants)

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
    return np.empty(shape, dtype) if nbytes < LARGE else np.asarray(_Held(workspace.take(nbytes), shape, dtype))
