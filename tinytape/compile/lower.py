"""Lowering: a trace's calls become values of a program, op by op.

What a call's arguments are decides what it becomes. Calls on what is the same in all rows and steps stay calls, made
once a run, and so do calls on what is summed over rows and steps. The others go through `RULES`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..engine.op import Op
from ..ops.shape import reshape
from .build import Builder
from .program import CONTRACTED, Program, Recipe, Shape, Value, topological
from .rules import RULES
from .trace import Call, Key, Shared, Traced, arrived
from .views import BATCH, NEW, View, whole

__all__ = ["lower"]


_UNFORESEEN = (ArithmeticError, AttributeError, LookupError, TypeError, ValueError)
"""What a rule may raise for an option in a form that it does not know, though the op does."""


class Share(NamedTuple):
    """A gradient's share in each row, to be summed over the rows; the view has no batch axis."""

    view: View


def lower(traced: Traced, dtype: np.dtype[Any], rows: int | None, shared: Shared = Shared()) -> Program:  # noqa: B008
    """The program of a trace.

    Parameters
    ----------
    traced : Traced
    dtype : dtype
        Of all that is computed; bools are numbers.
    rows : int or None
        The length of the batch axis, which is axis 0 of the leaves of carry, x and y. None: all is one row.
    shared : Shared
        Leaves without it.

    Raises
    ------
    NotLowerable
        Naming the op and the line.
    """
    return Lowering(traced, dtype, rows, shared).program()


class Lowering(Builder):
    """A trace on its way to a program."""

    def __init__(self, traced: Traced, dtype: np.dtype[Any], rows: int | None, shared: Shared) -> None:
        super().__init__(dtype, rows)
        self.traced, self.shared = traced, shared
        self.arrays = traced.tape.values
        self.known: dict[int, Any] = {}  # View; Share; or a Value that is invariant or contracted
        self.inputs: list[Value] = []

    def program(self) -> Program:
        t = self.traced
        for i, key in enumerate(t.carry):
            self._input("carry", i, key, i in self.shared.carries)
        for i, key in enumerate(t.xs):
            self._input("x", i, key, i in self.shared.inputs)
        for key in t.captured:
            self.known[key] = self._outside(key)
        self._calls(t.tape.calls[: t.forward_calls])
        self.source = ""
        program = Program(self.dtype, self.rows is not None, self.inputs, [], [])
        for i, key in enumerate(t.carry_out):
            value, in_rows = self._result(key)
            if self.rows is not None and in_rows == (i in self.shared.carries):
                when = "after" if in_rows else "before"
                raise self.cannot(f"leaf {i} of the carry has a batch axis {when} the step only")
            program.carries.append(value)
        results = [self._result(key) for key in t.ys]
        program.outputs = [value for value, _ in results]
        program.shared_carries, program.shared_inputs = self.shared
        program.shared_outputs = frozenset(i for i, (_, in_rows) in enumerate(results) if not in_rows)
        if self.rows is None:
            program.shared_carries, program.shared_inputs = frozenset(range(len(t.carry))), frozenset(range(len(t.xs)))
        if t.gradients:
            self._adjoint(program)
        program.inputs.extend(self.fixed.values())
        program.invariants = [v for v in topological(self._all_invariants(program)) if v.kind == "invariant"]
        return program

    def _adjoint(self, program: Program) -> None:
        t = self.traced
        self.adjoint = True
        for kind, keys, seeds, shared in (
            ("seed_carry", t.carry_seeds, program.carry_seeds, program.shared_carries),
            ("seed_y", t.output_seeds, program.output_seeds, program.shared_outputs),
        ):
            for i, key in enumerate(keys):
                if key is not None:
                    seeds.append(self._input(kind, i, key, i in shared))
                elif kind == "seed_carry" and t.carry[i] in t.gradients:  # only the step itself sends something back
                    seeds.append(Value(kind, program.carries[i].shape, index=i))
                else:
                    seeds.append(Value("none", ()))
                if key is not None and self.rows is not None and i in shared:
                    self.known[key] = Share(self.known[key])
        for key in t.tape.tensors:  # constants that rules made
            if key not in self.known:
                self.known[key] = self._outside(Key(key), constant=True)
        self._calls(t.tape.calls[t.forward_calls :])
        self.source = ""
        program.carry_gradients = [
            self._row_gradient(key, i in program.shared_carries) if key in t.gradients else None
            for i, key in enumerate(t.carry)
        ]
        for i, key in enumerate(t.xs):
            if key in t.gradients:
                program.input_gradients[i] = self._row_gradient(key, i in program.shared_inputs)
        for key in t.captured:
            if key in t.gradients:
                self._captured_gradient(program, key)

    def _captured_gradient(self, program: Program, key: Key) -> None:
        found = self._summed(self.known[self.traced.gradients[key]])
        if isinstance(found, View) and self.rows is not None and found.batch is not None:
            program.fixed_gradients[self.fixed_of(self.known[key]).index] = self._in_rows(found)
        else:
            program.captured_gradients[key] = self._contracted(found)

    def _all_invariants(self, program: Program) -> list[Value]:
        """Those that are read, or that a captured tensor's rows or gradient are computed from."""
        roots = list(self.fixed)
        for value in topological(program.roots()):
            roots.extend(v for v in value.reads() if v.kind == "invariant")
        return roots

    # ---- what comes in -----------------------------------------------------------------------------------------

    def _input(self, kind: str, index: int, key: Key, shared: bool) -> Value:
        array = self.arrays[key]
        shape, of = array.shape, "xs" if kind == "x" else kind
        if array.dtype not in (self.dtype, np.bool_):
            raise self.cannot(f"leaf {index} of {of} is {array.dtype} where the carry is {self.dtype}")
        batch = None if self.rows is None or shared else 0
        if batch == 0 and shape[:1] != (self.rows,):
            raise self.cannot(f"leaf {index} of {of} has shape {shape}, and no batch axis of {self.rows}")
        value = Value(kind, shape if batch is None else shape[1:], index=index)
        self.known[key] = whole(value, shape, batch)
        if kind in ("carry", "x"):
            self.inputs.append(value)
        return value

    def _outside(self, key: Key, constant: bool = False) -> Any:
        """A captured tensor, or a constant. One that is the same number throughout is that number, of any shape."""
        array = self.arrays[key]
        if constant and array.ndim and array.size and array.dtype.kind in "fb" and (array == array.flat[0]).all():
            scalar = self.constant(np.asarray(array.flat[0]))
            return View(scalar, array.shape, (NEW,) * array.ndim, (), ())
        return Value("invariant", array.shape, recipe=Recipe(None, captured=key), array=array)

    # ---- calls -------------------------------------------------------------------------------------------------

    def _calls(self, calls: Sequence[Call]) -> None:
        for call in calls:
            self.source = call.source
            args = [self.known[a] if isinstance(a, Key) else a for a in call.args]
            self.known.update(zip(call.outs, self._results(call, args), strict=True))

    def _results(self, call: Call, args: list[Any]) -> tuple[Any, ...]:
        if all(_is_invariant(a) for a in args):
            return self._recorded("invariant", call, [self._as_invariant(a) for a in args])
        if call.op is arrived.op:
            return (self._summed(args[0]),)
        pending = [isinstance(a, Share) or _is_contracted(a) for a in args]
        if not any(pending):
            return self._lowered(call, args)
        if all(_is_contracted(a) or _is_invariant(a) for a in args):
            if call.op.name == "transpose" and args[0].kind == "outer" and call.options.get("axes") is None:
                return (self.make("outer", args[0].shape[::-1], args[0].args[::-1]),)
            return self._recorded("post", call, [self._as_invariant(a) for a in args])
        if any(isinstance(a, View) and a.batch is not None for a in args):
            raise self.cannot(f"{call.op.name} mixes what is summed over the batch with single rows")
        views = [self._shares(a) if is_pending else a for a, is_pending in zip(args, pending, strict=True)]
        return tuple(Share(self.view(result)) for result in self._lowered(call, views))

    def _recorded(self, kind: str, call: Call, args: list[Any]) -> tuple[Value, ...]:
        """A call that stays one."""
        given = tuple(args)
        return tuple(
            Value(
                kind, self.arrays[out].shape, tuple(a for a in given if isinstance(a, Value)), source=call.source,
                recipe=Recipe(call.op, given, call.options, i), array=self.arrays[out] if kind == "invariant" else None,
            )
            for i, out in enumerate(call.outs)
        )  # fmt: skip

    def _as_invariant(self, arg: Any) -> Any:
        if not isinstance(arg, View):
            return arg
        return self.constant(np.broadcast_to(arg.value.array, arg.shape))

    def _lowered(self, call: Call, args: list[Any]) -> tuple[Any, ...]:
        for out in call.outs:
            if self.arrays[out].dtype not in (self.dtype, np.bool_):
                raise self.cannot(f"{call.op.name} gives {self.arrays[out].dtype}, where the carry is {self.dtype}")
        results = self._by_rule(call.op, args, call.options)
        in_rows = any(isinstance(a, View) and a.batch is not None for a in args)
        found: list[Any] = []
        for out, result in zip(call.outs, results, strict=True):
            shape = self.arrays[out].shape
            if in_rows and isinstance(result, View) and result.batch is None:
                raise self.cannot(f"{call.op.name} drops the batch axis")
            if result.shape != shape:
                raise self.cannot(f"{call.op.name} was lowered to shape {result.shape}, not {shape}")
            found.append(result)
        return tuple(found)

    def _by_rule(self, op: Op, args: list[Any], options: dict[str, Any]) -> tuple[Any, ...]:
        """The results of an op, as its rule makes them."""
        rule = RULES.get(op.name)
        if rule is None:
            raise self.cannot(f"there is no rule for {op.name}")
        try:
            results = rule(self, *args, **options)
        except _UNFORESEEN as error:
            raise self.cannot(f"{op.name} in this form: {error}") from error
        return results if op.several else (results,)

    # ---- sums over the batch -----------------------------------------------------------------------------------

    def _summed(self, arg: Any) -> Any:
        """The gradient of what is the same in all rows: summed over these, unless it has an axis for them itself."""
        if isinstance(arg, Share):
            return self._contracted(arg)
        if not isinstance(arg, View) or self.rows != 1 or arg.batch is None:
            return arg
        view = self.unmerge(arg) if arg.merged else arg
        kept = [i for i, axis in enumerate(view.axes) if axis != BATCH and not (axis == NEW and view.shape[i] == 1)]
        return self._reshaped(self.sum_of_rows(view.with_axes(kept)), arg.shape)

    def _reshaped(self, total: Value, shape: Shape) -> Value:
        recipe = Recipe(reshape.op, (total,), {"shape": shape})
        return Value("post", shape, (total,), recipe=recipe, source=self.source)

    def _contracted(self, arg: Any) -> Value:
        """What is to be summed over rows and steps; of a product as a product."""
        if _is_contracted(arg):
            return arg
        value = self.realise(self.view(arg.view if isinstance(arg, Share) else arg))
        refs = list(value.refs())
        if value.kind == "map" and value.fn == "multiply" and len(value.shape) == 2 and len(refs) == 2:
            one, two = refs
            for a, b in ((one, two), (two, one)):
                moving = "invariant" not in (a.value.kind, b.value.kind)
                if moving and (a.index, b.index) == (((0, 1, 0),), ((0, 1, 1),)):
                    return self.make("outer", value.shape, (a.value, b.value))
        return self.make("rowsum", value.shape, (value,))

    def _shares(self, arg: Any) -> View:
        """What is summed over rows and steps, as what it is in each row: ops on gradients are linear."""
        if isinstance(arg, Share):
            return arg.view
        if arg.kind == "rowsum":
            return whole(arg.args[0], arg.shape, None)
        if arg.kind == "outer":
            a, b = (whole(v, v.shape, None) for v in arg.args)
            rank = len(a.shape)
            columns, lines = a.with_axes((*range(rank), -1)), b.with_axes((*range(rank - 1), -1, rank - 1))
            return self.reduce("sum", self.map("multiply", columns, lines), range(rank - 1))
        recipe = arg.recipe
        args = [self._shares(a) if _is_contracted(a) else a for a in recipe.args]
        return self.view(self._by_rule(recipe.op, args, recipe.options)[recipe.out])

    # ---- what comes out ----------------------------------------------------------------------------------------

    def _result(self, key: Key) -> tuple[Value, bool]:
        """A result of the step, and whether it has the batch in front."""
        view = self.view(self.known[key])
        if self.rows is None or (view.batch is None and view.shape[:1] != (self.rows,)):
            return self.realise(view, always=view.value.kind == "invariant"), False
        if view.batch is None and view.value.kind not in ("invariant", "fixed"):
            return self.realise(view), False
        return self._in_rows(view), True

    def _in_rows(self, view: View) -> Value:
        """A value with the batch in front."""
        if view.batch is None and self.rows is not None:
            view = self.lift(view, 0)
        if self.rows is not None and view.batch != 0:
            raise self.cannot(f"a result of shape {view.shape} has the batch in axis {view.batch}")
        return self.realise(view, always=view.value.kind == "invariant")

    def _row_gradient(self, key: Key, shared: bool) -> Value:
        """The gradient of a leaf of the carry or of x, in each row."""
        found = self.known[self.traced.gradients[key]]
        if self.rows is None:
            return self._in_rows(self.view(found))
        if _is_contracted(found) or isinstance(found, Share):
            if not shared:
                raise self.cannot("a gradient is summed over the batch")
            return self.realise(self._shares(found))
        view = self.view(found)
        if shared:
            if view.value.kind != "invariant":
                raise self.cannot("a gradient has rows where its tensor has none")
            return self.make("map", view.shape, (0.0,), fn="copy")
        return self._in_rows(view)


def _is_invariant(arg: Any) -> bool:
    if isinstance(arg, View):
        return arg.value.kind == "invariant"
    return not isinstance(arg, Value | Share) or (isinstance(arg, Value) and arg.kind == "invariant")


def _is_contracted(arg: Any) -> bool:
    return isinstance(arg, Value) and arg.kind in CONTRACTED
