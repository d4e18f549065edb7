"""The program form: what a step of a scan and its adjoint are made of, once everything about Tensors is gone.

A `Value` belongs to one batch row; the batch axis is not part of its shape, because all rows are treated alike. There
are few kinds of values, and few ways to look at one: a `Ref` says how the axes of a loop run over a value's axes.
Slices, transposes, new axes and broadcasting are Refs and cost nothing.

========== =============================================================================================
kind       what it is
========== =============================================================================================
carry, x   leaf `index` of the carry that came in, of the step's inputs
fixed      an array from outside that has a row for each batch row, the same in all steps
seed_carry the gradient that comes back for leaf `index` of the carry, of the outputs y
seed_y
invariant  an array that is the same in all rows and steps: a weight, or what was computed from weights alone
map        `fn` element by element
reduce     `fn` (sum, max, min) over some axes of a loop
product    a row's matrix times an invariant matrix
join       pieces side by side; zeros where there is no piece
alias      the same elements in C order, in another shape
outer      summed over rows and steps: the products of one vector's elements with another's (gradient of a product)
rowsum     summed over rows and steps: the value itself (gradient of a bias)
post       an op on such sums, after the last step
none       in place of a seed: no gradient comes back for this leaf
probe      stands for an array of some shape, to see what an index does to it; never part of a program
========== =============================================================================================
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

__all__ = ["CONTRACTED", "INPUTS", "Piece", "Program", "Recipe", "Ref", "Shape", "Value", "topological"]

Shape = tuple[int, ...]
INPUTS = ("carry", "x", "fixed", "seed_carry", "seed_y")
CONTRACTED = ("outer", "rowsum", "post")


class Recipe(NamedTuple):
    """How an invariant, or what comes after the last step, is computed: a call of an op on others."""

    op: Any  # None: from outside, or a constant
    args: tuple[Any, ...] = ()  # Values and numbers
    options: dict[str, Any] = {}  # noqa: RUF012 - never written
    out: int = 0  # which of the op's results
    captured: Any = None  # the key of the tensor from outside


@dataclass(eq=False, slots=True)
class Value:
    """One value of the program; see the table above. `source` names the user's line that made it."""

    kind: str
    shape: Shape
    args: tuple[Any, ...] = ()
    fn: str = ""
    index: int = 0
    space: Shape = ()  # reduce: the loop's lengths
    axes: tuple[int, ...] = ()  # reduce: which of them are summed over
    pieces: tuple[Piece, ...] = ()
    recipe: Any = None  # invariant, post: a Recipe
    array: Any = None  # invariant: its value in the trace
    source: str = ""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def loops(self) -> Shape:
        """The lengths of the loops that compute it."""
        return self.space if self.kind == "reduce" else self.shape

    def refs(self) -> Iterable[Ref]:
        """Everything that it reads element by element."""
        for arg in self.args:
            if isinstance(arg, Ref):
                yield arg
        for piece in self.pieces:
            yield piece.ref

    def reads(self) -> list[Value]:
        """The values that it is computed from."""
        found = [ref.value for ref in self.refs()]
        found.extend(arg for arg in self.args if isinstance(arg, Value))
        return found

    def __repr__(self) -> str:
        return f"<{self.kind} {self.fn or self.index} {self.shape}>"


class Ref(NamedTuple):
    """How a loop reads a value: for each axis of the value its first index, its step, and the loop's axis (or None).

    An axis without a loop's axis stays at its first index. A loop's axis that no axis follows is broadcast over.
    """

    value: Value
    index: tuple[tuple[int, int, int | None], ...]  # pyright: ignore[reportIncompatibleMethodOverride]

    def is_whole(self, extent: Shape) -> bool:
        """Whether it reads all elements in order."""
        return self.value.shape == extent and all(item == (0, 1, i) for i, item in enumerate(self.index))

    @staticmethod
    def whole(value: Value) -> Ref:
        """All elements in order."""
        return Ref(value, tuple((0, 1, i) for i in range(len(value.shape))))

    def within(self, outer: tuple[tuple[int, int, int | None], ...]) -> Ref:
        """What `self`, a ref of a loop over some value, reads where that value is itself read by `outer`."""
        index: list[tuple[int, int, int | None]] = []
        for start, step, axis in self.index:
            if axis is None:
                index.append((start, step, None))
            else:
                first, stride, outer_axis = outer[axis]
                index.append((start + step * first, step * stride, outer_axis))
        return Ref(self.value, tuple(index))


class Piece(NamedTuple):
    """A part of a join: what it holds, and where it goes (first index, step and length along each axis)."""

    ref: Ref
    place: tuple[tuple[int, int, int], ...]


@dataclass(eq=False)
class Program:
    """A step of a scan and, where gradients are wanted, its adjoint.

    A leaf of the carry or of y that is the same in all rows is computed in every row all the same. What comes back
    for it comes back in the first row, and the gradient with respect to it, or to such an input, is the sum over rows.
    Where there is no batch, all leaves are of that kind, and there is one row.
    """

    dtype: Any
    batched: bool
    inputs: list[Value]  # carry and x leaves and fixed rows
    carries: list[Value]  # the carry that goes out
    outputs: list[Value]
    carry_seeds: list[Value] = field(default_factory=list[Value])
    output_seeds: list[Value] = field(default_factory=list[Value])
    carry_gradients: list[Value | None] = field(default_factory=list[Value | None])  # to the step before
    input_gradients: dict[int, Value] = field(default_factory=dict[int, Value])  # by x leaf
    fixed_gradients: dict[int, Value] = field(
        default_factory=dict[int, Value]
    )  # by index of a fixed value, a step's share
    captured_gradients: dict[int, Value] = field(
        default_factory=dict[int, Value]
    )  # by captured invariant: contracted values
    invariants: list[Value] = field(default_factory=list[Value])  # in order of computation
    shared_carries: frozenset[int] = frozenset()  # leaves that are the same in all rows, and have no axis for these
    shared_inputs: frozenset[int] = frozenset()
    shared_outputs: frozenset[int] = frozenset()

    def roots(self) -> list[Value]:
        """Everything that has to be computed."""
        gradients = [g for g in self.carry_gradients if g is not None]
        shares = [*self.input_gradients.values(), *self.fixed_gradients.values(), *self.captured_gradients.values()]
        return [*self.carries, *self.outputs, *gradients, *shares]


def topological(roots: Iterable[Value]) -> list[Value]:
    """All values that `roots` depend on, each behind what it reads. No recursion: a cell may be long."""
    order: list[Value] = []
    state: dict[Value, bool] = {}  # False: being looked at, True: done
    stack = list(roots)[::-1]
    while stack:
        value = stack[-1]
        if value in state:
            stack.pop()
            if not state[value]:
                state[value] = True
                order.append(value)
            continue
        state[value] = False
        stack.extend(read for read in reversed(value.reads()) if read not in state)
    return order
