"""A step run by its NumPy source: the kernels' meaning, and what runs in their place where Numba is switched off."""

from __future__ import annotations

import linecache
from collections.abc import Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..engine.tree import Array
from .dims import Dims
from .emit_numpy import numpy_source
from .keep import phases
from .program import Program, Value
from .recipes import Invariants, finish
from .schedule import Schedule, schedule, settle_roots

__all__ = ["Plain", "Rows"]


class Rows(NamedTuple):
    """What a forward run leaves for its adjoint."""

    steps: int
    rows: int
    xs: list[tuple[Array, ...]]
    fixed: list[Array]
    tape: list[Any]
    invariants: dict[Value, Array]


class Plain:
    """A step as NumPy functions, for any number of steps and rows; to be used as `run.Compiled` is."""

    def __init__(self, program: Program, title: str) -> None:
        settle_roots(program)
        self.program, self.phases = program, phases(program)
        self.dtype = np.dtype(program.dtype)
        self.source = numpy_source(program, self.phases, title)
        name = f"<{title} in NumPy {id(self)}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)  # for tracebacks
        self.module: dict[str, Any] = {}
        exec(compile(self.source, name, "exec"), self.module)

    @cached_property
    def dims(self) -> Dims:
        """The program's lengths."""
        return Dims(self.program)

    @cached_property
    def plan(self) -> Schedule:
        """How kernels would go about it."""
        return schedule(self.program, self.dims)

    def forward(
        self,
        init: Sequence[Array],
        xs: Sequence[Array],
        outside: Invariants,
        steps: int,
        rows: int,
        reverse: bool = False,
    ) -> tuple[list[Array], list[Array], Rows]:
        """The last carry and the outputs; arrays are (rows, ...) and (steps, rows, ...)."""
        invariants = {value: outside[value] for value in self.program.invariants}
        inputs = self.program.inputs
        shapes = {v.index: v.shape for v in inputs if v.kind == "x"}
        columns = [np.broadcast_to(self._row_axis(x, shapes[i]), (steps, rows, *shapes[i])) for i, x in enumerate(xs)]
        order = range(steps)[:: -1 if reverse else 1]
        each = [tuple(x[t].astype(self.dtype, copy=False) for x in columns) for t in order]
        fixed = [invariants[v.args[0]].astype(self.dtype, copy=False) for v in inputs if v.kind == "fixed"]
        first = tuple(a.astype(self.dtype, copy=False) for a in init)
        finals, ys, tape = self.module["forward"](first, each, fixed, self._weights(invariants))
        results = [np.empty((steps, rows, *v.shape), self.dtype) for v in self.program.outputs]
        for t, row in zip(order, ys, strict=True):
            for result, y in zip(results, row, strict=True):
                result[t] = y
        return [np.array(a) for a in finals], results, Rows(steps, rows, each, fixed, tape, invariants)

    def backward(
        self,
        saved: Rows,
        dcarry: Sequence[Array | None],
        dys: Sequence[Array | None],
        reverse: bool = False,
        from_init: bool = True,
    ) -> tuple[list[Array | None], list[Array], list[Array], list[Array]]:
        """Gradients for init, and for those of xs, captured tensors and fixed inputs that have one."""
        program, weights = self.program, self._weights(saved.invariants)
        order = range(saved.steps)[:: -1 if reverse else 1]
        outputs = [
            np.zeros((saved.steps, saved.rows, *v.shape), self.dtype) if g is None else g
            for g, v in zip(dys, program.outputs, strict=True)
        ]
        last = [
            np.zeros((saved.rows, *v.shape), self.dtype) if g is None else g
            for g, v in zip(dcarry, program.carries, strict=True)
        ]
        each = [tuple(g[t] for g in outputs) for t in order]
        run = self.module["backward"]
        dinit, dxs, dfixed, sums = run(saved.tape, last, each, saved.xs, saved.fixed, weights)
        results = [np.empty((saved.steps, saved.rows, *v.shape), self.dtype) for v in program.input_gradients.values()]
        for t, row in zip(order, dxs, strict=True):
            for result, dx in zip(results, row, strict=True):
                result[t] = dx
        known = {**saved.invariants, **dict(zip(self.phases.sums, sums, strict=True))}
        return list(dinit), results, finish(program, self.phases.post, known), list(dfixed)

    def _weights(self, invariants: dict[Value, Array]) -> list[Array]:
        return [a.astype(self.dtype, copy=False) for a in invariants.values()]

    @staticmethod
    def _row_axis(x: Array, shape: tuple[int, ...]) -> Array:
        """An input with an axis for the rows, where it has none."""
        return x[:, None] if x.ndim == 1 + len(shape) else x
