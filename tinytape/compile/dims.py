"""Which lengths in a program are the same length, whatever it is.

A kernel serves every width, so loops may only be joined where their lengths are equal by construction: the two carries
of an LSTM are equally wide, while an input that happens to be as wide as they are is not.
"""

from __future__ import annotations

from typing import Any, TypeAlias

from .program import Program, Ref, Value, topological

__all__ = ["Dims"]

Axis: TypeAlias = tuple[Value, int, bool]  # the third: of a reduction's loop rather than of its result


class Dims:
    """Classes of axes of equal length."""

    def __init__(self, program: Program) -> None:
        self._parent: dict[Axis, Axis] = {}
        for value in topological([*program.roots(), *program.inputs]):
            self.add(value)
        carries = [v for v in program.inputs if v.kind == "carry"]
        pairs: list[tuple[Any, Any]] = list(zip(program.carries, carries, strict=True))
        pairs += zip(program.carry_seeds, program.carries, strict=False)
        pairs += zip(program.output_seeds, program.outputs, strict=False)
        pairs += zip(program.carry_gradients, carries, strict=False)
        inputs = {v.index: v for v in program.inputs if v.kind == "x"}
        pairs += [(gradient, inputs[i]) for i, gradient in program.input_gradients.items()]
        fixed = {v.index: v for v in program.inputs if v.kind == "fixed"}
        pairs += [(gradient, fixed[i]) for i, gradient in program.fixed_gradients.items()]
        for one, two in pairs:
            if one is not None and one.kind != "none":
                for i in range(len(one.shape)):
                    self._join((one, i, False), (two, i, False))

    def of(self, value: Value, axis: int) -> Axis:
        """The class of a value's axis, named by one of its members."""
        return self._find((value, axis, False))

    def of_space(self, value: Value) -> tuple[Axis, ...]:
        """The classes of the axes of the loop that computes a value."""
        if value.kind == "reduce":
            return tuple(self._find((value, i, True)) for i in range(len(value.space)))
        return tuple(self._find((value, i, False)) for i in range(len(value.shape)))

    @staticmethod
    def length(axis: Axis) -> int:
        value, i, of_loop = axis
        return value.space[i] if of_loop else value.shape[i]

    def add(self, value: Value) -> None:
        """Note what a value says about the lengths of what it reads."""
        space = value.loops
        for arg in value.args:
            if isinstance(arg, Ref):
                self._follow(arg, [(value, i, value.kind == "reduce") for i in range(len(space))])
        if value.kind == "reduce":
            kept = [i for i in range(len(space)) if i not in value.axes]
            for i, axis in enumerate(kept):
                self._join((value, i, False), (value, axis, True))
        elif value.kind == "product":
            a, matrix = value.args
            for i in range(len(value.shape) - 1):
                self._join((value, i, False), (a, i, False))
            self._join((a, len(a.shape) - 1, False), (matrix, 0, False))
            self._join((value, len(value.shape) - 1, False), (matrix, 1, False))
        elif value.kind == "outer":
            for i, a in enumerate(value.args):
                self._join((value, i, False), (a, len(a.shape) - 1, False))
        elif value.kind == "rowsum":
            for i in range(len(value.shape)):
                self._join((value, i, False), (value.args[0], i, False))
        elif value.kind == "invariant" and value.recipe.op is not None and value.recipe.op.name == "transpose":
            source = value.recipe.args[0]
            if isinstance(source, Value) and value.recipe.options.get("axes") is None:
                for i in range(len(value.shape)):
                    self._join((value, i, False), (source, len(value.shape) - 1 - i, False))
        for piece in value.pieces:
            for i, (first, step, n) in enumerate(piece.place):
                if (first, step, n) == (0, 1, value.shape[i]):
                    for v, (start, stride, axis) in enumerate(piece.ref.index):
                        if axis == i and (start, stride) == (0, 1) and piece.ref.value.shape[v] == n:
                            self._join((value, i, False), (piece.ref.value, v, False))

    def _follow(self, ref: Ref, loop: list[Axis]) -> None:
        for v, (start, step, axis) in enumerate(ref.index):
            if axis is not None and (start, step) == (0, 1) and ref.value.shape[v] == self.length(loop[axis]):
                self._join((ref.value, v, False), loop[axis])

    def _find(self, axis: Axis) -> Axis:
        parent = self._parent.setdefault(axis, axis)
        while parent != axis:
            axis, parent = parent, self._parent.setdefault(parent, parent)
        return axis

    def _join(self, one: Axis, two: Axis) -> None:
        one, two = self._find(one), self._find(two)
        if one != two:
            self._parent[one] = two
