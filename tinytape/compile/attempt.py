"""A scan as kernels: find or make the kernels for a step, run them, and put the result on the tape as one op."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from itertools import compress
from operator import attrgetter, is_
from typing import Any, NamedTuple, cast

import numpy as np

from ..engine.call import NOT_A_VALUE
from ..engine.errors import DTypeError, InputError, ShapeError, TapeError
from ..engine.op import Op
from ..engine.stand_in import stand_ins, standing_in
from ..engine.tape import Leaf, Node, Part, here, take_number
from ..engine.tensor import Tensor
from ..engine.tree import Array, flatten, unflatten
from ..kernels.compiler import usable
from ..loop.budget import Plan as Budgeted
from ..recompute import keeps_calls, replay
from .cache import announced
from .captures import Captures, look_through
from .checkpointed import Checkpointed, plan_of
from .explain import Explanation, flops
from .leaves import Leaves, readings
from .lower import lower
from .plain import Plain, Rows
from .program import Program, topological
from .recipes import Invariants
from .run import Compiled, Run
from .trace import Drawn, Key, NotLowerable, Traced, name_of, trace

__all__ = ["Plan", "Ready", "attempt", "explain", "plan_for", "price", "refuse", "tell"]

_log = logging.getLogger("tinytape.compile")
MOST = 512  # plans that are kept
AS_ONE_SEQUENCE = 1 << 15  # times that the loops of a step whose batch rows meet may go round
SMALL = 1 << 14  # bytes of a tensor that may be held on to beyond its time
_plans: OrderedDict[Any, Plan | NotLowerable] = OrderedDict()
_told: set[Any] = set()
_BRANCHES = (dict, list, tuple)
_node, _storage, _shape = attrgetter("node"), attrgetter("storage"), attrgetter("shape")


class Plan:
    """The kernels for a step, and where its tensors are found."""

    def __init__(
        self, traced: Traced, program: Program, title: str, captures: Captures, init_tree: Any, xs_tree: Any
    ) -> None:
        self.program = program
        values = traced.tape.values
        self.dtypes = tuple([values[key].dtype for key in (*traced.carry_out, *traced.ys)])
        self.leaves = Leaves(program, self.dtypes, len(traced.xs))
        self.kernels = (Compiled if usable() else Plain)(program, title)
        self.title = title
        self.op = Op(lambda *values: values, f"scan({title})", "general", True, False)
        self.op.rule = _rule
        self.op.takes_none, self.op.sources = True, (NOT_A_VALUE, NOT_A_VALUE)
        self.op.differentiable_rule = _differentiable_rule  # pyright: ignore[reportAttributeAccessIssue]
        self.init_tree, self.xs_tree, self.y_tree = init_tree, xs_tree, _skeleton(traced.y_tree)
        self.tracked = [key is not None for key in (*traced.carry_seeds, *traced.output_seeds)]
        for value in topological(program.roots()):
            if value.kind == "invariant" and (value.recipe.op or value.recipe.captured in traced.captured):
                value.array = None  # from now on what a call brings counts, and the trace's tensors may go
        lifted = {v.index: v.args[0].recipe.captured for v in program.inputs if v.kind == "fixed"}
        self.outside: list[Any] = [*program.captured_gradients, *(lifted[i] for i in program.fixed_gradients)]
        self.ran: set[str] = set()  # kernels that are there
        positions = {id(t): i for i, t in enumerate(captures.tensors)}
        positions.update({id(t.raw): i for i, t in enumerate(captures.tensors) if isinstance(t, Tensor)})
        self.positions: dict[Key, int] = {}
        self.constants: dict[Key, Any] = {}
        for key, tensor in traced.captured.items():
            raw = tensor.raw if isinstance(tensor, Tensor) else tensor
            found = positions.get(id(tensor), positions.get(id(raw)))
            if found is None:
                self.constants[key] = tensor
            else:
                self.positions[key] = found
        tracked = any(isinstance(t, Tensor) and t.node is not None for t in self.constants.values())
        self.reusable = captures.complete and not tracked

    def first(self, which: str, run: Callable[..., Any], *arguments: Any) -> Any:
        """Run the forward or the backward kernel for the first time, and tell if that took a compiler."""
        self.ran.add(which)
        widths = [v.shape[-1] for v in self.program.carries if v.shape]
        with announced(" ".join([self.title, *map(str, widths[:1])])):
            return run(*arguments)

    def captured(self, captures: Captures) -> dict[Key, Any]:
        """The tensors that the step takes from outside, as they are now."""
        found = {key: captures.tensors[i] for key, i in self.positions.items()}
        return {**found, **self.constants}


def _skeleton(tree: Any) -> Any:
    return unflatten(tree, range(len(flatten(tree))))


def attempt(
    f: Callable[[Any, Any], Any],
    init: Any,
    xs: Any,
    carries: list[Tensor],
    inputs: list[Tensor],
    steps: int,
    reverse: bool,
    eager: Callable[..., Any],
    checkpoint: Any = None,
) -> tuple[Any, Any] | NotLowerable | None:
    """The scan by kernels.

    Parameters
    ----------
    f, init, xs, carries, inputs, steps, reverse
        As `scan` has checked them: of init and xs the structure counts, their leaves are `carries` and `inputs`.
    eager : callable
        ``eager(f, init, xs, steps, reverse)``, the definition, for gradients that are themselves differentiated.
    checkpoint : int, str or Plan, optional
        As for `scan`.

    Returns
    -------
    (carry, ys), or why it cannot be compiled, or None where the loop has to be recorded step by step.
    """
    context = here.context
    if context.rule is not None or (context.tape is not None and keeps_calls(context.tape)):
        return None
    plan, captures = plan_for(f, init, xs, carries, inputs)
    if isinstance(plan, NotLowerable):
        return plan
    kernels: Any = plan.kernels
    if checkpoint is not None and plan.program.carry_seeds:
        if not isinstance(kernels, Compiled):
            return None  # the eager loop does the same
        chosen = plan_of(kernels, checkpoint, steps, plan.leaves.rows([x.raw for x in carries]))
        kernels = Checkpointed(kernels, chosen) if chosen.slots else kernels
    ready = Ready(plan, kernels, captures)
    results = ready.run(f, carries, inputs, steps, reverse, eager)
    count = len(carries)
    return unflatten(init, results[:count]), unflatten(plan.y_tree, results[count:])


class Ready:
    """The kernels for a step, and the tensors that they take from outside."""

    def __init__(self, plan: Plan, kernels: Any, captures: Captures) -> None:
        self.plan, self.kernels, self.captures = plan, kernels, captures
        self.captured = captured = plan.captured(captures)
        self.tensors = [t for t in captured.values() if isinstance(t, Tensor)]
        self.outside = [captured[key] for key in plan.outside]  # those with gradients
        self.known: tuple[list[Array], list[int] | None, Invariants | None] = [], None, None

    def invariants(self) -> Invariants:
        """What follows from the tensors from outside, made anew where one has changed since the last call."""
        raws = [t.raw for t in self.tensors]
        written = [-1 if t.storage is None else t.storage.written for t in self.tensors]
        were, then, made = self.known  # at once: another thread may be changing them
        if len(raws) < len(self.captured):  # an array may also change unseen
            return Invariants(self.captured)
        if made is None or written != then or not all(map(is_, raws, were)):
            made = Invariants(self.captured)
            _share(made, self.plan.program, self.tensors, raws, written)
            self.known = raws, written, made
        return made

    def run(
        self,
        f: Callable[[Any, Any], Any],
        carries: Sequence[Tensor],
        inputs: Sequence[Tensor],
        steps: int,
        reverse: bool,
        eager: Callable[..., Any],
    ) -> list[Tensor]:
        """The leaves of the last carry and of ys; `carries` and `inputs` are those of init and xs."""
        plan, leaves, forward = self.plan, self.plan.leaves, self.kernels.forward
        first, others = [x.raw for x in carries], [x.raw for x in inputs]
        rows = leaves.rows(first)
        if not leaves.plain:
            first = leaves.enter(first, rows)
        invariants = self.invariants()
        arguments = first, others, invariants, steps, rows, reverse
        finals, ys, saved = forward(*arguments) if "forward" in plan.ran else plan.first("forward", forward, *arguments)
        arrays = [*finals, *ys] if leaves.plain else leaves.leave(finals, ys)
        if not plan.program.carry_seeds:
            return [Tensor.of(a) for a in arrays]
        return _Scan(self, invariants, f, carries, inputs, steps, reverse, eager).record(arrays, saved)


def _share(
    invariants: Invariants, program: Program, tensors: list[Tensor], raws: list[Array], written: list[int]
) -> None:
    """Use again what the last scan of this program made of the same tensors; it is kept with the first one's storage.

    That keeps their arrays in memory, so only small ones are allowed, or leaves with gradients, which live on anyway.
    """
    if not tensors or any(
        t.storage is None or (t.raw.nbytes > SMALL and t.node.__class__ is not Leaf) for t in tensors
    ):
        return
    storage = tensors[0].storage
    assert storage is not None
    if storage.derived is None:
        storage.derived = {}
    last: _Made | None = storage.derived.get("made")
    if last is not None and last.program is program and last.written == written and all(map(is_, last.raws, raws)):
        invariants.made = last.made
    else:
        storage.derived["made"] = _Made(program, raws, written, invariants.made)


class _Made(NamedTuple):
    """What was made of tensors for a program. It holds none itself: the storage that keeps it would never go."""

    program: Program
    raws: list[Array]
    written: list[int]
    made: dict[Any, Any]


def plan_for(
    f: Callable[[Any, Any], Any], init: Any, xs: Any, carries: Sequence[Tensor], inputs: Sequence[Tensor]
) -> tuple[Plan | NotLowerable, Captures]:
    """The kernels for a step on inputs like these, whose leaves are `carries` and `inputs`: as kept, or made now."""
    captures = look_through(f)
    recording = here.context.recording
    form = (
        _form(init),
        _form(xs),
        tuple([(x.raw.shape, x.raw.dtype.char, x.node is None) for x in carries]),
        tuple([(x.raw.shape[1:], x.raw.dtype.char, x.node is None) for x in inputs]),
        recording,
    )
    plan = _plans.get((captures.key, *form))
    if plan is None or (isinstance(plan, NotLowerable) and not captures.complete):
        for _ in range(2):  # once more if f only fills in, when it first runs, what it looks up from then on
            plan = _make(f, init, xs, carries, inputs, captures, recording)
            before, lasting = captures, isinstance(plan, Plan) and captures.complete
            captures = look_through(f) if lasting else before
            if captures.key == before.key:
                break
        else:
            plan = NotLowerable("it changes what it takes from outside, which a trace sees once: put that in the carry")
        if plan.reusable if isinstance(plan, Plan) else not isinstance(plan, Drawn):
            _plans[captures.key, *form] = plan
            while len(_plans) > MOST:
                _plans.popitem(last=False)
    return plan, captures


def explain(
    f: Callable[[Any, Any], Any], init: Any, xs: Any, carries: list[Tensor], inputs: list[Tensor]
) -> Explanation:
    """What `attempt` would run."""
    plan, _ = plan_for(f, init, xs, carries, inputs)
    if isinstance(plan, NotLowerable):
        return Explanation(_title(f), str(plan))
    return Explanation(plan.title, None, plan.kernels.plan, plan.kernels.dims)


def price(
    f: Callable[[Any, Any], Any],
    init: Any,
    xs: Any,
    carries: list[Tensor],
    inputs: list[Tensor],
    steps: int,
    checkpoint: Any,
) -> Budgeted | None:
    """What `attempt` would keep; None where it would not be kernels that keep it."""
    plan, _ = plan_for(f, init, xs, carries, inputs)
    if isinstance(plan, NotLowerable) or not isinstance(plan.kernels, Compiled) or not plan.program.carry_seeds:
        return None
    return plan_of(plan.kernels, checkpoint, steps, plan.leaves.rows([x.raw for x in carries]))


def _form(tree: Any) -> Any:
    """A nest's structure, to compare."""
    if not isinstance(tree, _BRANCHES):
        return tree is None
    if isinstance(tree, dict):
        return dict, tuple([(k, _form(v)) for k, v in cast("dict[Any, Any]", tree).items()])
    branch = cast("list[Any]", tree)
    return branch.__class__, *[_form(item) for item in branch]


def _make(
    f: Any,
    init: Any,
    xs: Any,
    carries: Sequence[Tensor],
    inputs: Sequence[Tensor],
    captures: Captures,
    recording: bool,
) -> Plan | NotLowerable:
    floats: list[Any] = [x.dtype for x in carries if x.dtype.kind == "f"]
    odd = any(x.dtype not in (*floats[:1], np.bool_) for x in carries)
    if not floats or odd or floats[0] not in (np.float32, np.float64):
        dtypes = ", ".join(str(x.dtype) for x in carries) or "nothing"
        return NotLowerable(f"the carry is of {dtypes}; a kernel takes float32, or float64, and bools")
    first = unflatten(xs, [Tensor.of(x.raw[0]) for x in inputs])
    wanted = [x.node is not None and recording for x in inputs]
    wanted_carry = [recording and x.dtype.kind == "f" for x in carries]
    likely, *others = readings([x.shape for x in carries], [x.shape[1:] for x in inputs])
    start, shared, generators = unflatten(init, carries), likely[1], captures.generators
    try:
        try:
            traced = trace(f, start, first, wanted_carry, wanted, recording, shared, generators)
        except Drawn:  # by another thread perhaps
            traced = trace(f, start, first, wanted_carry, wanted, recording, shared, generators)
    except NotLowerable as reason:
        return reason
    if (
        not any(wanted)
        and not any(x.node is not None for x in carries)
        and not any(isinstance(t, Tensor) and t.node is not None for t in traced.captured.values())
    ):
        traced = traced._replace(carry_seeds=[], output_seeds=[], gradients={})
    reason: NotLowerable | None = None
    for rows, shared in (likely, *others):
        try:
            program = lower(traced, np.dtype(floats[0]), rows, shared)
            if reason is not None and rows is None and _work(program) > AS_ONE_SEQUENCE:
                break  # rows meet, so products are loops: step by step they are quicker
            return Plan(traced, program, _title(f), captures, _skeleton(init), _skeleton(xs))
        except NotLowerable as error:
            reason = reason or error
    assert reason is not None
    return reason


def _work(program: Program) -> int:
    """How many times the loops of a step go round."""
    return sum(flops(v) for v in topological(program.roots()) if v.kind in ("map", "reduce"))


def _title(f: Any) -> str:
    owner = getattr(f, "__self__", None)
    name = name_of(f)
    return type(owner).__name__ if owner is not None else name


def tell(f: Any, reason: NotLowerable) -> None:
    """Say once that a function runs step by step, unless that is sure to raise as well."""
    if reason.raised in (InputError, ShapeError, DTypeError):
        return
    code: Any = getattr(f, "__code__", f.__class__)
    told: Any = code, name_of(f), reason.reason  # the steps of all layers have the same code
    if told not in _told:
        _told.add(told)
        _log.warning("tinytape: scan of %s runs step by step, not compiled: %s", name_of(f), reason)


def refuse(f: Any, reason: NotLowerable) -> None:
    """Raise, where a kernel was asked for."""
    raise InputError(
        f"scan: {name_of(f)} cannot be compiled: {reason}.",
        'change that line, or pass compiled="auto" to run it step by step.',
    )


def _rule(gradients: tuple[Any, ...], run: _Scan, saved: Any) -> tuple[Any, ...]:
    return run.rule(gradients, saved)


def _differentiable_rule(node: Node, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
    run: _Scan = node.kept[0]
    return run.differentiable_rule(node, gradients)


class _Scan:
    """One compiled run, as an op with a result for each leaf of the carry and of ys."""

    __slots__ = (
        "carries", "eager", "f", "from_init", "inputs", "invariants", "ready", "reverse", "stand_ins", "steps",
    )  # fmt: skip

    def __init__(
        self,
        ready: Ready,
        invariants: Invariants,
        f: Any,
        carries: Sequence[Tensor],
        inputs: Sequence[Tensor],
        steps: int,
        reverse: bool,
        eager: Callable[..., Any],
    ) -> None:
        self.ready, self.invariants, self.f, self.carries, self.inputs = ready, invariants, f, carries, inputs
        self.steps, self.reverse = steps, reverse
        self.eager, self.stand_ins = eager, stand_ins()

    @property
    def init(self) -> Any:
        """The carry before the first step, as the function takes it."""
        return unflatten(self.ready.plan.init_tree, self.carries)

    @property
    def xs(self) -> Any:
        """All inputs, as the function takes one of them."""
        return unflatten(self.ready.plan.xs_tree, self.inputs)

    def record(self, arrays: list[Array], saved: Run | Rows) -> list[Tensor]:
        context, ready, carries, inputs = here.context, self.ready, self.carries, self.inputs
        plan = ready.plan
        parents = tuple(map(_node, (*carries, *inputs, *ready.outside)))
        self.from_init = any(parents[: len(carries)])  # whether a gradient of init is wanted
        watched = tuple(map(_storage, (*carries, *inputs, *ready.tensors)))
        shapes = tuple(map(_shape, arrays))
        node = Node(take_number(), plan.op, parents, (self, saved), shapes, plan.dtypes, watched, context.step)
        results = [Tensor.of(a, Part(node, i) if plan.tracked[i] else None) for i, a in enumerate(arrays)]
        if context.tape is not None:
            context.tape.append(node, (), {}, tuple(results))
        return results

    def kept_buffers(self) -> dict[int, int]:
        """What a checkpointed run keeps; the others' is kept beside this."""
        kernels = self.ready.kernels
        return kernels.kept_buffers() if isinstance(kernels, Checkpointed) else {}

    def rule(self, gradients: tuple[Any, ...], saved: Any) -> tuple[Any, ...]:
        plan, backward = self.ready.plan, self.ready.kernels.backward
        leaves = plan.leaves
        carries, ys = gradients[: leaves.count], gradients[leaves.count :]
        if not leaves.plain:
            carries, ys = leaves.enter_gradients(carries, ys, saved.rows)
        arguments = saved, carries, ys, self.reverse, self.from_init
        found = backward(*arguments) if "backward" in plan.ran else plan.first("backward", backward, *arguments)
        dinit, dxs, sums, dfixed = found
        return (*leaves.leave_gradients(dinit, dxs), *sums, *dfixed)

    def differentiable_rule(self, node: Node, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        """Run the loop again as it is defined, and walk that."""
        definition = partial(self.eager, self.f, self.init, self.xs, self.steps, self.reverse)
        tracked = self.ready.plan.tracked

        def again() -> list[Any]:
            return [*compress(flatten(definition()), tracked)]

        with standing_in(self.stand_ins):
            self._refuse_changes()
            return replay(again, node.parents or (), [*compress(gradients, tracked)], all_results=True)

    def _refuse_changes(self) -> None:
        """The step that is run again must be the one that ran, on the same memory."""
        ready, sources = self.ready, self.invariants.sources
        moved = any(isinstance(x, Tensor) and x.raw is not sources[key][0] for key, x in ready.captured.items())
        if moved or not ready.captures.still_of(self.f):
            raise TapeError(
                f"backward(create_graph=True): {name_of(self.f)}, which scan ran, is to run again, and it or what it "
                "takes from outside is not what it was.",
                "walk before you change modes, attributes, dtypes, requires_grad or closures, or call scan again.",
            )
