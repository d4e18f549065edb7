"""Numba source for a scheduled program, and the table of numbers that its kernels take.

A kernel works from a table of integers (addresses, lengths, strides), which it makes from what it is given, and from
the program's constants. Each entry of the table has a name in the source; `Entry` remembers what it stands for.
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np

from .dims import Axis, Dims
from .emit_loops import Body, loops
from .emit_numpy import names_of
from .loops import Half, Nest, Stage
from .program import Program, Value
from .schedule import Schedule

__all__ = ["Entry", "Kernel", "Writer", "numba_source"]


Pointers: TypeAlias = "dict[str, tuple[Value, str]]"
"""By name, a value and the step in which it is wanted."""


class Entry(NamedTuple):
    """What an integer of the table stands for.

    ========= ==============================================================================
    what      of
    ========= ==============================================================================
    number    itself: ``number``
    run       "steps", "rows", "block", "scratch": how much is done at once, and where to work; "earlier", "later":
              whether these are a part of all steps, and others come before and after them
    at, step, a place: its address; how far the next step, the next row lies, in elements; for a ring, the other half
    row, ring
    weight    a product's matrix, packed: its address
    sum, part a sum over rows and steps: the address of the whole, of a block's part
    kept      a kept value: where it lies in a row's record, in elements
    ========= ==============================================================================
    """

    what: str
    of: Any = None
    number: int = 0


class Kernel(NamedTuple):
    """The source of one function, and what its arguments are."""

    name: str
    source: str
    entries: list[Entry]
    constants: list[float]


def numba_source(plan: Schedule, dims: Dims, title: str) -> tuple[str, Kernel, Kernel | None]:
    """The module's source and its kernels."""
    dtype = np.dtype(plan.program.dtype).name
    names = names_of(plan.program, plan.phases)
    forward = Writer(plan, dims, names, plan.forward, "forward").kernel()
    backward = None
    if plan.backward is not None:
        backward = Writer(plan, dims, names, plan.backward, "backward").kernel()
    head = f'''"""{title}, over time. Made by tinytape from the tape of one step."""

import numpy as np
from numba import njit
from tinytape.kernels.{dtype} import *
from tinytape.kernels.processor import flush_denormals, restore_denormals
from tinytape.kernels.product import bind
from tinytape.kernels.table import addressed, real, word

ITEM = {np.dtype(dtype).itemsize}  # bytes
inf = np.inf
number = np.{dtype}
products = bind(number)
column_sums, outer_product = products.column_sums, products.outer_product
product, product_steps = products.product, products.product_steps
inlined = njit(forceinline=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
compiled = njit(nogil=True, error_model="numpy")
inner = njit(nogil=True, error_model="numpy", no_cpython_wrapper=True, no_cfunc_wrapper=True)
'''
    return (
        "\n\n".join([head.rstrip(), *(k.source for k in (forward, backward) if k is not None)]) + "\n",
        forward,
        backward,
    )


class Writer:
    """One of the two kernels on its way to source."""

    def __init__(self, plan: Schedule, dims: Dims, names: dict[Value, str], half: Half, name: str) -> None:
        self.plan, self.dims, self.half, self.name = plan, dims, half, name
        self.program: Program = plan.program
        self.names = dict(names)
        self.entries: dict[str, Entry] = {}
        self.constants: list[float] = []
        self.functions: list[str] = []
        self.lengths: dict[Axis, str] = {}
        self.used: set[str] = set()  # names that the function in hand takes
        self.calls: dict[str, Pointers] = {}  # of a function of rows: the pointers that it takes
        self.offsets: dict[Any, str] = {}
        self.met: set[tuple[str, str]] = set()  # pairs of pointer and offset that are prefetched already
        self.far: dict[str, str] = {}  # a pointer to the row to come, and the one that is to be there
        self.added: list[Value] = []  # sums that are added up in nests

    # ---- the table ---------------------------------------------------------------------------------------------

    def entry(self, name: str, what: str, of: Any = None, number: int = 0) -> str:
        self.entries.setdefault(name, Entry(what, of, number))
        self.used.add(name)
        return name

    def length(self, axis: Axis) -> str:
        name = self.lengths.setdefault(axis, f"n{len(self.lengths)}")
        return self.entry(name, "number", number=Dims.length(axis))

    def number(self, prefix: str, number: int) -> str:
        """An integer that depends on widths: each use has a name of its own, lest equal widths make other source."""
        return self.entry(f"{prefix}{len(self.entries)}", "number", number=number)

    def constant(self, number: float) -> str:
        if number == np.inf or number == 0.0:
            return f"number({number!r})"
        self.constants.append(number)
        self.used.add(f"k{len(self.constants) - 1}")
        return f"k{len(self.constants) - 1}"

    def name_of(self, value: Value) -> str:
        return self.names.setdefault(value, f"u{len(self.names)}")

    # ---- places ------------------------------------------------------------------------------------------------

    def base(self, value: Value) -> Value:
        while value.kind == "alias":
            value = value.args[0]
        return value

    def is_kept(self, value: Value) -> bool:
        """Whether it lies in the record of what is kept of a row."""
        return self.half.places.get(value) == "history"

    def pointer(self, value: Value) -> str:
        """Where the rows of a value's step begin, inside the loops over steps."""
        return "kept_now" if self.is_kept(value) else f"{self.name_of(value)}_now"

    def row(self, value: Value) -> str:
        """How far a value's next row lies."""
        if self.is_kept(self.base(value)):
            return self.entry("kept_row", "row", "kept")
        return self.entry(f"{self.name_of(self.base(value))}_row", "row", self.base(value))

    def located(self, value: Value, step: str) -> str:
        """The address of a value in a step, as the driver computes it."""
        value = self.base(value)
        name = self.name_of(value)
        at = self.entry(f"{name}_at", "at", value)
        place = self.half.places.get(value, value.kind)
        if value.kind == "carry":
            history = self.located(self.program.carries[value.index], f"({step} - 1)")
            return f"{at} if {step} == 0 else {history}"
        if value.kind == "seed_carry" or place.startswith("dcarry"):
            ring = self.entry(f"{name}_ring", "ring", value)
            done = "steps - 1" if value.kind == "seed_carry" else "steps"
            return f"{at} + ITEM * (({done} - {step}) & 1) * {ring}"
        if place in ("step", "row") or value.kind == "fixed" or place.startswith("dfixed"):
            return at
        if place == "block":
            return f"{at} + ITEM * ({step} - first) * {self.entry(f'{name}_step', 'step', value)}"
        if place.startswith("carry") and not self.program.carry_seeds:
            ring = self.entry(f"{name}_ring", "ring", value)
            return f"{at} + ITEM * (({step} + 1) & 1) * {ring}"
        return f"{at} + ITEM * {step} * {self.entry(f'{name}_step', 'step', value)}"

    def followed(self, value: Value, step: str) -> str:
        """As `located`, where the values of the next steps follow; of a carry that is not so from the first step on."""
        if value.kind == "carry":
            return self.located(self.program.carries[value.index], f"({step} - 1)")
        return self.located(value, step)

    def following(self, pointer: str, value: Value, at: str) -> str | None:
        """The pointer to the next row, to prefetch it; None unless the value was written long ago and not read yet."""
        base = self.base(value)
        place = self.half.places.get(base, base.kind)
        is_far = place in ("seed_y", "x", "history") or place.startswith(("ys", "carry"))
        if self.name == "forward" or not is_far or (pointer, at) in self.met:
            return None
        self.met.add((pointer, at))
        name = pointer.replace("_now", "_next")
        self.far[name] = pointer
        return name

    # ---- rows --------------------------------------------------------------------------------------------------

    def rows_function(self, stage: Stage, label: str) -> str:
        """A function that runs a stage's loops over the rows; returns the call."""
        self.used, self.met, self.far = set(), set(), {}
        pointers: dict[str, Value] = {}
        body: list[str] = []
        for i, nest in enumerate(stage.nests):
            body += self.nest(nest, f"{label}_{i}", pointers)
        for name, pointer in self.far.items():  # after the last row come those of the step before
            row = self.row(pointers[pointer])
            body.insert(0, f"{name} = {pointer} + ITEM * {row} if row + 1 < rows else {pointer}_before")
        for name, value in pointers.items():
            base = self.base(value)
            if base.kind != "invariant" and self.half.places.get(base) != "row":
                body.append(f"{name} += ITEM * {self.row(base)}")
        before = [f"{pointer}_before" for pointer in self.far.values()]
        head = f"{label}(rows, {', '.join([*pointers, *before, *sorted(self.used)])})"
        lines = [f"def {head}:", "    for row in range(rows):", *(f"        {line}" for line in body)]
        self.functions.append("@inner\n" + "\n".join(lines))
        self.calls[label] = {name: (value, "t") for name, value in pointers.items()}
        self.calls[label] |= {f"{pointer}_before": (pointers[pointer], "(t - 1)") for pointer in self.far.values()}
        return head

    def nest(self, nest: Nest, label: str, pointers: dict[str, Value]) -> list[str]:
        """The loops of a nest; its innermost body is a function, called for whole vectors and for the rest, or once."""
        space = self.dims.of_space(nest.values[0])
        rank = len(space)
        reduced = nest.reduced
        inner = Body(self, nest, rank, pointers)
        text = inner.body()
        arguments = sorted({*inner.used, *(f"i{a}" for a in range(rank - 1))})
        results = inner.totals
        lines = [f"def {label}(j, m, {', '.join([*arguments, *results])}):", *(f"    {line}" for line in text)]
        if results:
            lines.append(f"    return {', '.join(results)}")
        self.functions.append("@inlined\n" + "\n".join(lines))
        self.used.update(inner.used - {*pointers, *self.far} - {f"i{a}" for a in range(rank)})
        call = f"{label}({{j}}, {{m}}, {', '.join([*arguments, *results])})"
        call = f"{', '.join(results)} = {call}" if results else call
        if rank == 0:
            return [*inner.starts, call.format(j=0, m=1), *inner.ends]
        n = self.length(space[-1])
        vector = [
            f"for j in range(0, {n} - LANES + 1, LANES):",
            f"    {call.format(j='j', m='LANES')}",
            f"if {n} % LANES:",
            f"    {call.format(j=f'{n} - {n} % LANES', m=f'{n} % LANES')}",
        ]
        if reduced is None:
            return loops(vector, [(a, self.length(space[a])) for a in range(rank - 1)])
        outer = [(a, self.length(space[a])) for a in range(rank - 1) if a not in reduced]
        summed = [(a, self.length(space[a])) for a in range(rank - 1) if a in reduced]
        if rank - 1 in reduced:
            return loops([*inner.starts, *loops(vector, summed), *inner.ends], outer)
        lines: list[str] = []  # the sums are vectors along the last axis
        for condition, j, m in (
            (f"for j in range(0, {n} - LANES + 1, LANES):", "j", "LANES"),
            (f"if {n} % LANES:", "j", f"{n} % LANES"),
        ):
            part = [f"j = {n} - {n} % LANES"] if condition.startswith("if") else []
            part += [*inner.starts, *loops([call.format(j=j, m=m)], summed)]
            part += [line.replace("{m}", m) for line in inner.ends]
            lines += [condition, *(f"    {line}" for line in part)]
        return loops(lines, outer)

    # ---- the driver --------------------------------------------------------------------------------------------

    def kernel(self) -> Kernel:
        driver = self.forward() if self.name == "forward" else self.backward()
        driver = [f"    {line}" for line in driver]
        head = ["@compiled", f"def {self.name}(numbers, bases, table):"]
        head += [f"    addressed(numbers, {len(self.constants)}, bases, table)"]
        head += [f"    {name} = word(table, {i})" for i, name in enumerate(self.entries)]
        head += [f"    k{i} = number(real(numbers, {2 + i}))" for i in range(len(self.constants))]
        head += ["    before = flush_denormals()"]
        source = "\n\n\n".join([*self.functions, "\n".join([*head, *driver, "    restore_denormals(before)"])])
        return Kernel(self.name, source, list(self.entries.values()), self.constants)

    def forward(self) -> list[str]:
        for name in ("steps", "rows", "block"):
            self.entry(name, "run", name)
        block = self.phase(self.half.block, "block", "f_block")
        steps = self.phase(self.half.step, "step", "f_step")
        return [
            "for first in range(0, steps, block):",
            "    last = min(first + block, steps)",
            *(f"    {line}" for line in block),
            *(["    for t in range(first, last):", *(f"        {line}" for line in steps)] if steps else []),
        ]

    def backward(self) -> list[str]:
        for name in ("steps", "rows", "block", "scratch", "earlier", "later"):
            self.entry(name, "run", name)
        steps = self.phase(self.half.step, "step", "b_step")
        block = self.phase(self.half.block, "block", "b_block")
        for value in self.plan.sums:
            block += self.sum(value)
        for value in self.added:
            name = self.name_of(value)
            size = self.entry(f"{name}_size", "number", number=value.size)
            block.append(f"gather({size}, {name}_part, {self.entry(f'{name}_at', 'sum', value)})")
        if self.added:
            self.functions.append(_GATHER)
        return [
            "first = (steps - 1) // block * block",
            "last = steps",
            "while first >= 0:",
            *(
                ["    for t in range(last - 1, first - 1, -1):", *(f"        {line}" for line in steps)]
                if steps
                else []
            ),
            "    again = (last < steps) | (later != 0)  # sums are added to those of what comes later",
            *(f"    {line}" for line in block),
            "    last = first",
            "    first -= block",
        ]

    def phase(self, stages: list[Stage], kind: str, label: str) -> list[str]:
        lines: list[str] = []
        for i, stage in enumerate(stages):
            for value in stage.products:
                lines += self.product_of_block(value) if kind == "block" else self.product(value, "t")
            if stage.nests:
                call = self.rows_function(stage, f"{label}_{i}")
                rows = self.locations(self.calls[f"{label}_{i}"], call)
                lines += rows if kind == "step" else ["for t in range(first, last):", *(f"    {r}" for r in rows)]
        return lines

    def locations(self, pointers: Pointers, call: str) -> list[str]:
        return [*(f"{name} = {self.placed(value, step)}" for name, (value, step) in pointers.items()), call]

    def placed(self, value: Value, step: str) -> str:
        if not self.is_kept(self.base(value)):
            return self.located(value, step)
        at, distance = self.entry("kept_at", "at", "kept"), self.entry("kept_step", "step", "kept")
        return f"{at} + ITEM * {step} * {distance}"

    def product(self, value: Value, step: str) -> list[str]:
        operand, matrix = value.args
        target = self.half.onto.get(value, value)
        add = int(value in self.half.onto)
        n = self.length(self.dims.of(value, len(value.shape) - 1))
        k = self.length(self.dims.of(operand, len(operand.shape) - 1))
        weight = self.entry(f"{self.name_of(value)}_weight", "weight", (matrix, value))
        a, c = self.located(operand, step), self.located(target, step)
        lines = [f"{self.name_of(value)}_a = {a}", f"{self.name_of(value)}_c = {c}"]
        a, c = f"{self.name_of(value)}_a", f"{self.name_of(value)}_c"
        if len(value.shape) == 1:
            call = f"product(rows, {n}, {k}, {a}, {self.row(operand)}, {weight}, {c}, {self.row(target)}, {add})"
        else:
            inner = " * ".join(self.length(self.dims.of(value, i)) for i in range(len(value.shape) - 1))
            call = (
                f"product_steps(rows, {inner}, {n}, {k}, {a}, {self.row(operand)}, {k}, {weight}, "
                f"{c}, {self.row(target)}, {n}, {add})"
            )
        return [*lines, call]

    def product_of_block(self, value: Value) -> list[str]:
        operand, matrix = value.args
        target = self.half.onto.get(value, value)
        plain = len(value.shape) == 1 and self.steps_of(operand) and self.steps_of(target)
        if not plain:
            return ["for t in range(first, last):", *(f"    {line}" for line in self.product(value, "t"))]
        add = int(value in self.half.onto)
        n = self.length(self.dims.of(value, 0))
        k = self.length(self.dims.of(operand, 0))
        weight = self.entry(f"{self.name_of(value)}_weight", "weight", (matrix, value))
        a, c = self.located(operand, "first"), self.located(target, "first")
        return [
            f"product_steps(last - first, rows, {n}, {k}, {a}, {self.steps_of(operand)}, {self.row(operand)}, "
            f"{weight}, {c}, {self.steps_of(target)}, {self.row(target)}, {add})"
        ]

    def steps_of(self, value: Value) -> str:
        """How far a value's next step lies; nothing if steps are not evenly spaced."""
        value = self.base(value)
        place = self.half.places.get(value, value.kind)
        if value.kind in ("carry", "seed_carry", "fixed") or place in ("step", "row") or place.startswith("dcarry"):
            return ""
        return self.entry(f"{self.name_of(value)}_step", "step", value)

    def sum(self, value: Value) -> list[str]:
        """A gradient that is computed for a block at once."""
        name = self.name_of(value)
        out = self.entry(f"{name}_at", "sum", value)
        if value.kind == "rowsum":
            a = value.args[0]
            n = " * ".join(self.length(self.dims.of(a, v)) for v in range(len(a.shape))) or "1"
            return [f"column_sums(last - first, rows, {n}, {self.located(a, 'first')}, {self.steps_of(a)}, "
                    f"{self.row(a)}, {out}, again)"]  # fmt: skip
        a, b = value.args
        lines: list[str] = []
        bases = [self.base(v) for v in (a, b)]
        m, n = (self.length(self.dims.of(v, len(v.shape) - 1)) for v in (a, b))
        if len(a.shape) > 1:
            inner = " * ".join(self.length(self.dims.of(a, v)) for v in range(len(a.shape) - 1))
            lines += ["for t in range(first, last):"]
            lines += [f"    {name}_{x} = {self.located(v, 't')}" for x, v in zip("ab", bases, strict=True)]
            return [*lines, f"    outer_product(rows, {inner}, {m}, {n}, {name}_a, {self.row(a)}, {m}, {name}_b, "
                            f"{self.row(b)}, {n}, {out}, {n}, again | (t > first), scratch)"]  # fmt: skip
        spaced = all(self.steps_of(v) or v.kind in ("carry", "fixed") for v in bases)
        if not spaced:
            lines += ["for t in range(first, last):"]
            lines += [f"    {name}_{x} = {self.located(v, 't')}" for x, v in zip("ab", bases, strict=True)]
            return [*lines, f"    outer_product(1, rows, {m}, {n}, {name}_a, 0, {self.row(a)}, {name}_b, 0, "
                            f"{self.row(b)}, {out}, {n}, again | (t > first), scratch)"]  # fmt: skip
        start, again = "first", "again"
        if any(v.kind == "carry" for v in bases):  # before the very first step the carry lies elsewhere
            start = f"{name}_first"
            ab = [self.located(v, "first") for v in bases]
            lines += ["if first + earlier == 0:", *(f"    {name}_{x} = {at}" for x, at in zip("ab", ab, strict=True))]
            lines += [f"    outer_product(1, rows, {m}, {n}, {name}_a, 0, {self.row(a)}, {name}_b, 0, {self.row(b)}, "
                      f"{out}, {n}, again, scratch)"]  # fmt: skip
            again = "again | (first + earlier == 0)"
            lines += [f"{name}_first = max(first, 1 - earlier)", f"if {name}_first < last:"]
        indent = "    " if len(lines) else ""
        steps = [self.steps_of(self.program.carries[v.index] if v.kind == "carry" else v) or "0" for v in bases]
        lines += [f"{indent}{name}_{x} = {self.followed(v, start)}" for x, v in zip("ab", bases, strict=True)]
        lines.append(
            f"{indent}outer_product(last - {start}, rows, {m}, {n}, {name}_a, {steps[0]}, {self.row(a)}, {name}_b, "
            f"{steps[1]}, {self.row(b)}, {out}, {n}, {again}, scratch)"
        )
        return lines


_GATHER = '''@inner
def gather(n, part, whole):
    """Add a block's sums to those of all blocks, and start anew."""
    for j in range(0, n, LANES):
        m = min(n - j, LANES)
        store(whole, j, load(whole, j, m) + load(part, j, m), m)
        store(part, j, fill(number(0.0)), m)'''
