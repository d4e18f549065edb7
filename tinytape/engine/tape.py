"""The tape: what one recorded op is, and the one walk that turns records into gradients.

A `Node` is a plain record: which op, from which parents, with which kept values. Its number is taken when it is
made, so going through the nodes by falling number is going backwards in topological order: the walk needs no
recursion, and a chain of a million ops is no different from a chain of ten. Nodes point at their parents only, so
a graph is freed by reference count alone as soon as its last result goes out of scope.

Nothing here knows about Tensors. A gradient that passes through the walk is a NumPy array, or, where the walk
itself is to be differentiated, a Tensor: the rules are written so that the same text serves both.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable, Collection, Generator
from contextlib import AbstractContextManager, contextmanager
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from .errors import TapeError

if TYPE_CHECKING:
    from .op import Op
    from .recording import Tape

__all__ = ["Context", "Leaf", "Node", "Part", "Storage", "enable_grad", "here", "no_grad", "time_step", "walk"]

take_number: Callable[[], int] = itertools.count(1).__next__
"""The clock of the engine: nodes and writes are numbered from it, so "written after" is a comparison."""


class Storage:
    """The memory that a leaf owns.

    Attributes
    ----------
    written : int
        When it was last written (see `Tensor.copy_`).
    derived : dict or None
        What others have made of the values, such as weights packed for a kernel, with the `written` of that time.
    """

    __slots__ = ("written", "derived", "__weakref__")

    def __init__(self) -> None:
        self.written = take_number()
        self.derived: dict[Any, Any] | None = None


class Node:
    """One recorded op.

    Attributes
    ----------
    number : int
        When it was made; larger than the number of every parent.
    op : Op or None
        The op; None for a `Leaf` and for a `Part`.
    parents : tuple of (Node or None), or None
        A node per differentiable argument, None where the argument is a constant. None as a whole once freed.
    kept : tuple
        The values that the op's rule asks for, in the rule's order.
    shape, dtype
        Of the result. Gradients that arrive are brought to these. (Tuples of them for an op with several results.)
    watched : tuple of (Storage or None), or None
        Memory that `kept` shares with leaves: writing there before the walk is an error.
    step : int or None
        The time step in which it was made.
    hooks : list or None
        Functions that see, and may replace, the gradient of the result.
    """

    __slots__ = ("number", "op", "parents", "kept", "shape", "dtype", "watched", "step", "hooks", "__weakref__")

    def __init__(
        self,
        number: int,
        op: Op | None,
        parents: tuple[Node | None, ...] | None,
        kept: Any,
        shape: Any,
        dtype: Any,
        watched: tuple[Storage | None, ...] | None,
        step: int | None,
    ) -> None:
        self.number = number
        self.op = op
        self.parents = parents
        self.kept = kept
        self.shape = shape
        self.dtype = dtype
        self.watched = watched
        self.step = step
        self.hooks: list[Callable[[Any], Any]] | None = None

    @property
    def name(self) -> str:
        return "leaf" if self.op is None else self.op.name

    def __repr__(self) -> str:
        step = "" if self.step is None else f", time step {self.step}"
        return f"{self.name} (record {self.number}, shape {self.shape}{step})"


class Leaf(Node):
    """Where a walk ends: the place of a tensor that the user asked gradients for.

    Attributes
    ----------
    grad : Tensor, array or None
        What has arrived: an array until somebody asks for it, and a Tensor from then on.
    """

    __slots__ = ("grad", "storage")

    def __init__(self, shape: tuple[int, ...], dtype: Any, storage: Storage | None) -> None:
        super().__init__(take_number(), None, (), (), shape, dtype, None, None)
        self.grad: Any = None
        self.storage = storage


class Part(Node):
    """One of the results of an op that has several; its only parent is that op's node."""

    __slots__ = ("index",)

    def __init__(self, whole: Node, index: int) -> None:
        self.number, self.op, self.parents, self.kept = take_number(), None, (whole,), ()
        self.shape, self.dtype, self.watched = whole.shape[index], whole.dtype[index], None
        self.step, self.hooks, self.index = whole.step, None, index

    @property
    def name(self) -> str:
        return f"part {self.index}"


class Context:
    """What the current thread is doing; every op looks here once."""

    __slots__ = ("recording", "tape", "step", "rule", "traced", "depth", "drawn")

    def __init__(self) -> None:
        self.recording = True  # False inside no_grad
        self.tape: Tape | None = None  # the innermost `with Tape()`
        self.step: int | None = None  # the time step, set by loops over time
        self.rule: str | None = None  # the op whose rule is running on Tensors
        self.traced: str | None = None  # the function whose ops are being noted, to be run on other values later
        self.depth = 0  # how many functions of functions (grad, jvp, ...) are running
        self.drawn: dict[Any, Any] | None = None  # states of generators before checkpoint() drew from them


class _Here(threading.local):
    def __init__(self) -> None:
        # Infinities and NaN are values here. Once a thread, and not around every op: `np.errstate` costs as much as
        # a small op.
        np.seterr(all="ignore")
        self.context = Context()


here = _Here()


@contextmanager
def _recording(on: bool) -> Generator[None]:
    context = here.context
    was, context.recording = context.recording, on
    try:
        yield
    finally:
        context.recording = was


def no_grad() -> AbstractContextManager[None]:
    """Record nothing inside: ``with tt.no_grad(): ...``. It holds for the current thread."""
    return _recording(False)


def enable_grad() -> AbstractContextManager[None]:
    """Record again inside a `no_grad`."""
    return _recording(True)


@contextmanager
def time_step(step: int | None) -> Generator[None]:
    """Mark what is recorded inside as time step `step`: for `print(tape)` and for error messages."""
    context = here.context
    was, context.step = context.step, step
    try:
        yield
    finally:
        context.step = was


def unbroadcast(gradient: Any, shape: tuple[int, ...]) -> Any:
    """Sum `gradient` over the axes along which an argument of `shape` was broadcast (the adjoint of that)."""
    lead = gradient.ndim - len(shape)
    axes = tuple(range(lead)) + tuple(i + lead for i, n in enumerate(shape) if n == 1 and gradient.shape[i + lead] != 1)
    return np.reshape(np.sum(gradient, axis=axes), shape)


_by_number = attrgetter("number")


def reachable(
    roots: Collection[Node], inputs: Collection[Node] | None = None, ends: bool = False, leaves: bool = True
) -> list[Node]:
    """The nodes that `roots` were computed from, oldest first; of those, only what leads to `inputs`.

    With `ends`, what lies behind an input is not looked at. Without `leaves`, those are left out.

    Raises
    ------
    TapeError
        If a node was freed by an earlier walk, or memory that its rule needs was written since.
    """
    ended = set(inputs or ()) if ends else set[Node]()
    left_out = None if leaves else Leaf
    nodes = [root for root in roots if root not in ended and root.__class__ is not left_out]
    seen = ended.union(nodes)
    for node in nodes:  # grows while it is walked
        parents = node.parents
        if parents is None:
            raise TapeError(*_freed(node))
        if node.watched is not None:
            for storage in node.watched:
                if storage is not None and storage.written > node.number:
                    raise TapeError(*_overwritten(node, storage))
        for parent in parents:
            if parent is not None and parent.__class__ is not left_out and parent not in seen:
                seen.add(parent)
                nodes.append(parent)
    nodes.extend(ended)
    nodes.sort(key=_by_number)
    if inputs is not None:
        leading = set(inputs)
        for node in nodes:
            if any(parent in leading for parent in node.parents or ()):
                leading.add(node)
        nodes = [node for node in nodes if node in leading]
    return nodes


def _count_of_one() -> int:
    alone = object()
    return sys.getrefcount(alone)


_ALONE = _count_of_one()
"""What `sys.getrefcount` says of an object that one variable holds and nothing else."""


def _own(gradient: Any, alone: bool) -> Any:
    """A gradient as the caller's own: it, if nobody else has it, it is in C order and it is no view of another array.

    What lies in a block of memory of ours is no view.
    """
    plain = gradient.__class__ is np.ndarray and not isinstance(gradient.base, np.ndarray)
    if alone and plain and gradient.ndim and gradient.flags.carray:
        return gradient
    return np.array(gradient, order="C")


def walk(
    seeds: dict[Node, Any],
    inputs: Collection[Node] | None = None,
    *,
    free: bool = True,
    differentiable: bool = False,
    ends: bool = False,
) -> dict[Node, Any]:
    """Carry gradients backwards from `seeds` and return those that arrive.

    Parameters
    ----------
    seeds : dict of Node to gradient
        Where to start, and with what: arrays, or Tensors if `differentiable`.
    inputs : collection of Node, optional
        Where gradients are wanted; nothing that does not lead there is computed. Default: every leaf.
    free : bool
        Release each record once it is passed.
    differentiable : bool
        Run the rules on Tensors, so that the walk is itself recorded.
    ends : bool
        The walk ends at `inputs`: it does not go on to those that lie behind others, and leaves their hooks to
        the walk that it is a part of.

    Returns
    -------
    dict of Node to gradient
        Arrays are the caller's own: shared with nobody, in C order.

    Notes
    -----
    Hooks run in the order of the walk; without `inputs`, those of leaves come after all others.
    """
    nodes = reachable(seeds, inputs, ends, leaves=inputs is not None)
    leading: set[Node] | None = None if inputs is None else set(nodes)
    gradients: dict[Node, Any] = dict(seeds)
    owned: set[Node] = set()  # whose gradient is a sum that this walk allocated, and may add to in place
    found: dict[Node, Any] = {}
    take, get = gradients.pop, gradients.get
    while nodes:
        node = nodes.pop()
        gradient = take(node, None)
        if gradient is None:
            continue
        if node.hooks is not None and not (ends and inputs is not None and node in inputs):
            gradient = run_hooks(node, gradient)
        if inputs is not None and node in inputs:
            alone = sys.getrefcount(gradient) <= _ALONE or (node in owned and node.hooks is None)
            found[node] = gradient if differentiable else _own(gradient, alone)
            if ends or leading is None or leading.isdisjoint(node.parents or ()):
                continue  # nothing that is wanted lies behind it
        op = node.op
        parents: Any = node.parents
        if op is None:
            if type(node) is Part:
                whole = parents[0]
                gradients.setdefault(whole, [None] * len(whole.shape))[node.index] = gradient
            continue
        if gradient.__class__ is list:
            gradient = tuple(gradient) if op.takes_none and not differentiable else _fill(gradient, node)
        results: Any
        if differentiable:
            results = op.differentiable_rule(node, gradient)
        else:
            results = op.rule(gradient, *node.kept)
        if free:
            node.parents = node.kept = node.watched = None
        if results.__class__ is not tuple:
            results = (results,)
        if len(results) != len(parents):
            raise TapeError(
                f"the rule of {op.name} returned {len(results)} gradients; {op.name} has {len(parents)} "
                "differentiable arguments.",
                "return one gradient for each, in order, and None for what has none.",
            )
        for parent, result in zip(parents, results):  # noqa: B905 - their lengths were compared
            if parent is None or result is None or (leading is not None and parent not in leading):
                continue
            try:
                fits = result.shape == parent.shape
            except AttributeError:
                raise TapeError(
                    f"the rule of {op.name} returned a {type(result).__name__}, not an array.",
                    "return an array for each differentiable argument, and None for what has no gradient.",
                ) from None
            if not fits:
                result = _fit(result, parent.shape, op)
            if result.dtype is not parent.dtype:
                result = result.astype(parent.dtype)
            before = get(parent)
            if before is None:
                gradients[parent] = result  # by reference: most nodes have one consumer
            elif parent in owned:
                before += result
                gradients[parent] = before
            else:
                gradients[parent] = before + result
                if not differentiable:
                    owned.add(parent)
        results = result = None  # what a rule made then belongs to `gradients` alone
    while gradients and inputs is None:  # what is left has arrived at leaves
        node, gradient = gradients.popitem()
        if node.hooks is not None:
            gradient = run_hooks(node, gradient)
        alone = sys.getrefcount(gradient) <= _ALONE or (node in owned and node.hooks is None)
        found[node] = gradient if differentiable else _own(gradient, alone)
    return found


def run_hooks(node: Node, gradient: Any) -> Any:
    for hook in node.hooks or ():
        replaced = hook(gradient)
        gradient = gradient if replaced is None else replaced
    return gradient


def _fill(gradients: list[Any], node: Node) -> tuple[Any, ...]:
    """Zeros for the results of a many-result op that nothing depends on."""
    return tuple(
        np.zeros(shape, dtype) if g is None else g
        for g, shape, dtype in zip(gradients, node.shape, node.dtype, strict=True)
    )


def _fit(gradient: Any, shape: tuple[int, ...], op: Op) -> Any:
    lead = gradient.ndim - len(shape)
    if lead >= 0 and all(n in (1, m) for n, m in zip(shape, gradient.shape[lead:], strict=True)):
        return unbroadcast(gradient, shape)
    raise TapeError(
        f"the rule of {op.name} returned a gradient of shape {gradient.shape} for an argument of shape {shape}.",
        "return one of the argument's own shape, or one that summing over broadcast axes brings to it.",
    )


def _freed(node: Node) -> tuple[str, str]:
    return (
        f"backward: {node!r} was freed by an earlier backward().",
        "a state carried from one window to the next must be cut between them, h = h.detach(); only to walk the "
        "same records twice on purpose, pass retain_graph=True the first time.",
    )


def _overwritten(node: Node, storage: Storage) -> tuple[str, str]:
    return (
        f"backward: a value that {node!r} kept for its derivative was written in place afterwards "
        f"(at {storage.written}, recorded at {node.number}).",
        "call backward() before the write (an optimiser's step, +=, copy_), or compute with x.copy().",
    )
