"""Tracing: run a step once on Tensors, walk its tape once, and keep every call of both in one list."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, cast

import numpy as np

from ..engine.call import ALL_ARGUMENTS, OUT
from ..engine.errors import TinytapeError
from ..engine.op import Op, Operand, op
from ..engine.recording import Tape, users_line
from ..engine.tape import Leaf, Node, enable_grad, here, walk
from ..engine.tensor import Tensor
from ..engine.tree import Array, flatten, is_array, unflatten
from ..loop.scan import Loop
from .draws import put_back

Function = Callable[[Any, Any], Any]

__all__ = ["Call", "Key", "NotLowerable", "Shared", "Trace", "Traced", "arrived", "name_of", "trace"]


class NotLowerable(Exception):
    """Why a step cannot be compiled, the user's line that is the cause, and what the step raised, if it did."""

    def __init__(self, reason: str, source: str = "", raised: Exception | None = None) -> None:
        super().__init__(f"{reason} ({source})" if source else reason)
        self.reason, self.source, self.raised = reason, source, raised and type(raised)


class Drawn(NotLowerable):
    """NumPy's or Python's random numbers were drawn in a trace, by the step or by another thread meanwhile."""


_DRAWS = "it draws random numbers in each step: draw them before, and pass them in xs"


class Call(NamedTuple):
    """One call of an op. Arguments and results are keys of values, numbers, or arrays."""

    op: Op
    args: tuple[Any, ...]
    options: dict[str, Any]
    outs: tuple[int, ...]
    source: str


@op(kind="linear")
def arrived(g: Operand, /) -> Any:
    """Marks the gradient of what is the same in all rows, where it comes from rows: it is summed over them there.

    The walk does that where shapes differ. A batch of one row has the shape of what is the same in all rows, and
    is to give the same program as any other.
    """
    return g.view()


@op(kind="linear")
def _entering(x: Operand, /) -> Any:
    return x.view()


@_entering.vjp
def _(g: Operand) -> Any:
    return arrived(g)


class Trace(Tape):
    """A tape that notes constants too, and knows every value by a number, however often a Tensor is made of it.

    A tracked Tensor is known by its node, another by its array: where the walk hangs a kept array back on the
    graph, that is the same node or the same array.
    """

    def __init__(self) -> None:
        super().__init__(keep_calls=True)
        self.forward = True  # until the walk begins
        self.in_rows: set[int] = set()  # what has rows of the batch
        self.calls: list[Call] = []
        self.values: list[Array] = []
        self.tensors: dict[int, Tensor | Array] = {}  # those that were not made by a call
        self._by_node: dict[Node, int] = {}
        self._by_array: dict[int, int] = {}
        self._alive: list[Any] = []  # an id is an array's as long as it lives

    def append(self, node: Node, args: tuple[Any, ...], params: dict[str, Any], out: Any) -> None:
        op = node.op
        assert op is not None
        keys = tuple(self.key(x) for x in args)
        self._call(op, keys, params, out)
        if self.forward and self._has_rows(keys):
            node.parents = tuple(self._marked(node, *each) for each in zip(node.parents or (), keys, strict=True))
        for source, kept in zip(op.sources, node.kept or (), strict=False):
            if source >= 0 and is_array(kept) and isinstance(keys[source], int):
                self._know(kept, keys[source])  # an array of the user's was copied
            elif source == OUT and is_array(kept):
                self._know(kept, self.key(out))
            elif source == ALL_ARGUMENTS:
                for array, key in zip(kept, keys, strict=True):
                    if is_array(array):
                        self._know(array, key)

    def _has_rows(self, keys: tuple[Any, ...]) -> bool:
        return any(isinstance(key, Key) and key in self.in_rows for key in keys)

    def _marked(self, node: Node, parent: Node | None, key: Any) -> Node | None:
        """A node in between where what is the same in all rows meets rows, for the gradient to pass."""
        if parent is None or key in self.in_rows:
            return parent
        between: Any = node.number - 0.5  # in the order of numbers, too
        made = Node(between, _entering.op, (parent,), (), parent.shape, parent.dtype, None, node.step)
        self._by_node[made] = key
        return made

    def note(self, op: Op, args: tuple[Any, ...], params: dict[str, Any], out: Any) -> None:
        self._call(op, tuple(self.key(x) for x in args), params, out)

    def _call(self, op: Op, keys: tuple[Any, ...], params: dict[str, Any], out: Any) -> None:
        made = tuple(self._new(x) for x in (out if op.several else (out,)))
        if self._has_rows(keys):
            self.in_rows.update(made)
        file, line = users_line()
        source = f"{file}:{line}" if here.context.rule is None else f"adjoint of {here.context.rule}"
        self.calls.append(Call(op, keys, params, made, source))

    def key(self, value: Any) -> Any:
        """The number of a Tensor's or array's value; a Python number is itself, as a float."""
        if isinstance(value, Tensor):
            if value.node is not None and value.node in self._by_node:
                return self._by_node[value.node]
            found = self._by_array.get(id(value.raw)) if value.node is None else None
            if found is None:
                found = self._new(value)
                self.tensors[found] = value
            return Key(found)
        if is_array(value) and value.ndim:
            found = self._by_array.get(id(value))
            if found is None:
                found = len(self.values)
                self.values.append(value)
                self.tensors[found] = value
                self._know(value, found)
            return Key(found)
        if isinstance(value, list | tuple):
            return self.key(np.asarray(cast(Any, value)))
        return cast(Any, value).item() if is_array(value) or isinstance(value, np.generic) else value

    def _new(self, tensor: Tensor) -> int:
        number = Key(len(self.values))
        self.values.append(tensor.raw)
        if tensor.node is not None:
            self._by_node[tensor.node] = number
        self._know(tensor.raw, number)
        return number

    def _know(self, array: Array, number: int) -> None:
        self._alive.append(array)
        self._by_array[id(array)] = Key(number)


class Key(int):
    """The number of a value, so that it cannot be taken for a Python number among arguments."""


class Shared(NamedTuple):
    """Leaves of the carry and of x that have no axis for the batch rows."""

    carries: frozenset[int] = frozenset()
    inputs: frozenset[int] = frozenset()


class Traced(NamedTuple):
    """What `trace` found; values are named by their keys in `tape`."""

    tape: Trace
    carry: list[Key]
    xs: list[Key]
    carry_out: list[Key]
    ys: list[Key]
    y_tree: Any
    captured: dict[Key, Tensor | Array]
    forward_calls: int  # how many of the tape's calls belong to the step itself
    carry_seeds: list[Key | None]
    output_seeds: list[Key | None]
    gradients: dict[Key, Key]  # of an input's or captured tensor's key: the key of its gradient


def trace(
    f: Function,
    carry: Any,
    x: Any,
    wanted_carry: list[bool],
    wanted_x: list[bool],
    adjoint: bool,
    shared: Shared = Shared(),  # noqa: B008
    generators: Sequence[Any] = (),
) -> Traced:
    """Run ``f(carry, x)`` on Tensors of these values and, with `adjoint`, walk back from all that it returned.

    Parameters
    ----------
    wanted_carry, wanted_x : list of bool
        For which leaves gradients are wanted.
    shared : Shared
        Leaves that are the same in all rows of the batch.
    generators : sequence
        NumPy's and Python's that f reaches, of random numbers. They are put back, as the global ones are.

    Raises
    ------
    NotLowerable
        If f does what a trace cannot follow: looks at values, draws random numbers, writes.
    """
    tape = Trace()
    carry_in = [_input(leaf, wanted) for leaf, wanted in zip(flatten(carry), wanted_carry, strict=True)]
    x_in = [_input(leaf, wanted) for leaf, wanted in zip(flatten(x), wanted_x, strict=True)]
    carry_keys, x_keys = [tape.key(t) for t in carry_in], [tape.key(t) for t in x_in]
    tape.in_rows.update(key for i, key in enumerate(carry_keys) if i not in shared.carries)
    tape.in_rows.update(key for i, key in enumerate(x_keys) if i not in shared.inputs)
    with _tracing(tape, generators):
        carry_out, y = _results(f, unflatten(carry, carry_in), x, x_in)
        forward_calls = len(tape.calls)
        outs, ys = flatten(carry_out), flatten(y)
        keys, y_keys = [tape.key(t) for t in outs], [tape.key(t) for t in ys]
        captured = {Key(k): t for k, t in tape.tensors.items() if k not in carry_keys and k not in x_keys}
        tape.forward = False
        seeds: tuple[list[Key | None], list[Key | None]] = ([], [])
        gradients: dict[Key, Key] = {}
        if adjoint:
            seeds, gradients = _adjoint(tape, carry_in, x_in, captured, outs, ys)
    return Traced(tape, carry_keys, x_keys, keys, y_keys, y, captured, forward_calls, seeds[0], seeds[1], gradients)


def _input(leaf: Tensor, wanted: bool) -> Tensor:
    made = Tensor.of(np.array(leaf.raw))
    if wanted:
        made.node = Leaf(made.shape, made.dtype, None)
    return made


@contextmanager
def _tracing(tape: Trace, generators: Sequence[Any]) -> Generator[None]:
    context = here.context
    was = context.tape, context.drawn, context.step
    drawn: dict[Any, Any] = {}
    context.tape, context.drawn, context.step = tape, drawn, None
    try:
        with enable_grad(), put_back(generators) as others:
            yield
        if drawn:
            raise NotLowerable(_DRAWS)
        if others:
            raise Drawn(_DRAWS)
    finally:  # the loop that runs instead draws what it would have drawn
        context.tape, context.drawn, context.step = was
        for generator, state in drawn.items():
            generator.set_state(state)


def name_of(f: Any) -> str:
    """What a user calls a function."""
    return getattr(f, "__name__", type(f).__name__)


def _results(f: Function, carry: Any, x_tree: Any, x_in: list[Tensor]) -> tuple[Any, Any]:
    """What a step returns, as the eager loop takes it: numbers and arrays as Tensors, the carry like the one before."""

    def step(*args: Any) -> Any:
        here.context.traced = name_of(f)
        try:
            return f(*args)
        except Exception as error:  # whatever a user's function may raise: the eager loop shows it in full
            first = (str(error) or type(error).__name__).splitlines()[0]
            raise NotLowerable(first.rstrip("."), _line_in(error), error) from error
        finally:
            here.context.traced = None

    loop = Loop(step, carry, x_tree, [tuple(x_in)])
    try:
        carry_out, ys = loop.take(carry, 0)
    except TinytapeError as error:
        raise NotLowerable(str(error).splitlines()[0].rstrip("."), raised=error) from error
    assert loop.y is not None
    return carry_out, unflatten(loop.y.tree, ys)


def _line_in(error: BaseException) -> str:
    """The user's innermost line that an error went through."""
    found, entry = "", error.__traceback__
    package = __name__.split(".", 1)[0] + "."
    while entry is not None:
        if not entry.tb_frame.f_globals.get("__name__", "").startswith(package):
            found = f"{entry.tb_frame.f_code.co_filename}:{entry.tb_lineno}"
        entry = entry.tb_next
    return found


def _adjoint(
    tape: Trace,
    carry_in: list[Tensor],
    x_in: list[Tensor],
    captured: dict[Key, Any],
    outs: list[Tensor],
    ys: list[Tensor],
) -> tuple[tuple[list[Key | None], list[Key | None]], dict[Key, Key]]:
    """Walk back from all results, recording. Returns the seeds' keys and, for each input, its gradient's key."""
    seeds: dict[Node, Any] = {}
    keys: tuple[list[Key | None], list[Key | None]] = ([], [])
    for group, results in zip(keys, (outs, ys), strict=True):
        for result in results:
            if result.node is None:
                group.append(None)
                continue
            seed = _input(result, True)
            group.append(tape.key(seed))
            seeds[result.node] = seeds[result.node] + seed if result.node in seeds else seed
    inputs: dict[Node, Key] = {}
    for tensor in (*carry_in, *x_in, *(t for t in captured.values() if isinstance(t, Tensor))):
        if tensor.node is not None:
            inputs[tensor.node] = tape.key(tensor)
    found = walk(seeds, set(inputs), free=False, differentiable=True, ends=True)
    return keys, {inputs[node]: tape.key(gradient) for node, gradient in found.items()}
