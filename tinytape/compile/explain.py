"""What a scan is compiled to, as text: loops, products, what is kept, what it costs."""

from __future__ import annotations

import linecache
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..engine.errors import InputError
from .dims import Dims
from .emit_numba import numba_source
from .emit_numpy import inputs_of, names_of, numpy_source
from .keep import phases
from .loops import Half, Nest, Stage
from .program import Ref, Value
from .schedule import Schedule

__all__ = ["Explanation", "flops"]


@dataclass(eq=False)
class Explanation:
    """What becomes of a scan's step; print it.

    Attributes
    ----------
    reason : str or None
        Why the step cannot be compiled, with the op and the line; None if it can.
    kept_bytes : int
        What is kept of each step and batch row for the adjoint, in bytes; outputs are not counted.
    forward_flops, backward_flops : int
        Floating-point operations for each step and batch row; a product of n by k counts 2 n k, every other element
        of a loop 1 for each function.
    numpy, numba : str
        The program as source. An InputError where the step cannot be compiled.
    """

    title: str
    reason: str | None
    plan: Schedule | None = None
    dims: Dims | None = None

    @property
    def kept_bytes(self) -> int:
        if self.plan is None:
            return 0
        return sum(v.size for v in _kept(self.plan)) * np.dtype(self.plan.program.dtype).itemsize

    @property
    def forward_flops(self) -> int:
        return 0 if self.plan is None else sum(map(flops, self.plan.phases.forward))

    @property
    def backward_flops(self) -> int:
        if self.plan is None:
            return 0
        phases = self.plan.phases
        return sum(map(flops, (*phases.again, *phases.adjoint, *phases.sums)))

    @property
    def numpy(self) -> str:
        program = self._compiled()[0].program  # to which the schedule has added copies
        return numpy_source(program, phases(program), self.title)

    @property
    def numba(self) -> str:
        return numba_source(*self._compiled(), self.title)[0]

    def _compiled(self) -> tuple[Schedule, Dims]:
        if self.plan is None or self.dims is None:
            raise InputError(
                f"explain: {self.title} has no source: {self.reason}.", "change that line; explain names the reason."
            )
        return self.plan, self.dims

    def __str__(self) -> str:
        if self.plan is None:
            return f"{self.title}: runs step by step, not compiled: {self.reason}"
        return "\n".join(_Page(self.plan, self.title).lines(self))

    __repr__ = __str__


def _kept(plan: Schedule) -> list[Value]:
    """What of each step waits for the adjoint: kept values, and carries that lie in memory of their own."""
    if plan.backward is None:
        return []
    histories = [v for v in plan.program.carries if plan.forward.places[v].startswith("carry")]
    return list(dict.fromkeys([*plan.phases.kept, *histories]))


def flops(value: Value) -> int:
    """Floating-point operations of a value, for a step and row."""
    if value.kind == "product":
        return 2 * value.size * value.args[0].shape[-1]
    if value.kind == "outer":
        return 2 * value.size * (value.args[0].size // max(value.args[0].shape[-1], 1))
    if value.kind == "reduce":
        return int(np.prod(value.space))
    if value.kind == "rowsum":
        return value.size
    return value.size if value.kind == "map" and value.fn != "copy" else 0


class _Page:
    def __init__(self, plan: Schedule, title: str) -> None:
        self.plan, self.title = plan, title
        self.names = names_of(plan.program, plan.phases)

    def lines(self, about: Explanation) -> list[str]:
        plan, program = self.plan, self.plan.program
        what = "each batch row" if program.batched else "one sequence"
        lines = [f"{self.title}: compiled for {np.dtype(program.dtype).name}, the step of {what}", ""]
        lines += [f"  {name:<6}{text}" for name, text in inputs_of(program, self.names)]
        lines += ["", "forward", *self.half(plan.forward, block_first=True)]
        if plan.backward is not None:
            lines += ["", "backward", *self.half(plan.backward, block_first=False)]
            for value in plan.sums:
                lines.append(f"    {self.names[value]} += {self.sum(value)}    summed over each block of steps")
            lines += ["", *self.kept(about)]
        lines += ["", f"flops a step and row: {about.forward_flops:,} forward"
                  + (f", {about.backward_flops:,} backward" if plan.backward is not None else "")]  # fmt: skip
        return lines

    def half(self, half: Half, block_first: bool) -> list[str]:
        parts = [("for a block of steps at once", half.block), ("each step", half.step)]
        lines: list[str] = []
        for title, stages in parts if block_first else parts[::-1]:
            found = [line for stage in stages for line in self.stage(stage, half)]
            if found:
                lines += [f"  {title}", *(f"    {line}" for line in found)]
        return lines

    def stage(self, stage: Stage, half: Half) -> Iterable[str]:
        for value in stage.products:
            a, matrix = value.args
            onto = half.onto.get(value)
            sign = f"{self.name(onto)} +=" if onto is not None else f"{self.name(value)} ="
            shape = f"{matrix.shape[0]} x {matrix.shape[1]}"
            yield self.told(f"{sign} {self.name(a)} @ {self.name(matrix)}", f"product, {shape}", value)
        for nest in stage.nests:
            yield from self.nest(nest)

    def nest(self, nest: Nest) -> Iterable[str]:
        yield f"one loop over {' x '.join(map(str, nest.values[0].loops)) or 'a number'}: {len(nest.values)} values"
        stored: dict[Value, list[str]] = {}
        for store in nest.stores:
            target = self.name(store.target) + (" (a part)" if store.piece is not None else "")
            if store.target is not store.value or store.adding:
                stored.setdefault(store.value, []).append(f"{'+> ' if store.adding else '-> '}{target}")
            elif store.value in self.plan.phases.kept:
                stored.setdefault(store.value, []).append("kept")
        stored.update({value: ["made here too"] for value in nest.again})
        for value in nest.values:
            args = ", ".join(self.argument(a) for a in value.args)
            yield "  " + self.told(f"{self.name(value)} = {value.fn}({args})", " ".join(stored.get(value, [])), value)

    def told(self, text: str, note: str, value: Value) -> str:
        file, _, line = value.source.rpartition(":")
        code = linecache.getline(file, int(line)).strip() if line.isdecimal() else ""
        where = f"{file.rsplit('/', 1)[-1]}:{line} {code}" if file else value.source
        return f"{text:<44}{note:<24}{where[:60]}".rstrip()

    def sum(self, value: Value) -> str:
        if value.kind == "outer":
            a, b = value.args
            return f"{self.name(a)}.T @ {self.name(b)}"
        return self.name(value.args[0])

    def kept(self, about: Explanation) -> Iterable[str]:
        plan = self.plan
        names = [f"{self.name(v)} {list(v.shape)}" for v in _kept(plan)]
        yield f"kept for the adjoint: {', '.join(names) or 'nothing'}: {about.kept_bytes:,} bytes a step and row"
        again = ", ".join(f"{self.name(v)} {v.fn}" for v in plan.phases.again if v.kind in ("map", "reduce"))
        yield f"computed again: {again or 'nothing'}"

    def argument(self, arg: Any) -> str:
        if not isinstance(arg, Ref):
            return f"{arg:g}"
        extent = tuple(n for n, (_, _, axis) in zip(arg.value.shape, arg.index, strict=True) if axis is not None)
        parts = [(start, step) for start, step, _ in arg.index]
        if all(part == (0, 1) for part in parts) or not extent:
            return self.name(arg.value)
        return f"{self.name(arg.value)}[{', '.join(f'{s}:' if k == 1 else f'{s}::{k}' for s, k in parts)}]"

    def name(self, value: Value) -> str:
        return self.names.setdefault(value, f"u{len(self.names)}")
