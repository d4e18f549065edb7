"""`checkpoint`: a function that keeps none of its intermediate values and computes them again when they are needed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial, wraps
from typing import Any

from .engine.call import own
from .engine.errors import TapeError
from .engine.op import Op
from .engine.recording import Tape
from .engine.stand_in import stand_ins, standing_in
from .engine.tape import Leaf, Node, Part, enable_grad, here, take_number, walk
from .engine.tensor import Tensor
from .engine.tree import flatten, map_leaves, unflatten

__all__ = ["checkpoint", "keeps_calls", "replay"]

Function = Callable[..., Any]


def checkpoint(f: Function) -> Function:
    """`f` that keeps none of its intermediate values: they are computed again during the backward walk.

    Gradients reach the arguments and every tensor that f takes from outside (a module's parameters). Draws from
    generators of `tinytape.random`, as in dropout, are repeated exactly. f must otherwise compute the same thing
    twice (Griewank 1992; Chen et al. 2016). On a tape that keeps every call, as forward mode does, f is recorded
    as it is.

    Examples
    --------
    >>> y = tt.checkpoint(model)(x)  # keeps x alone; one more forward pass in backward()
    """

    @wraps(f)
    def checkpointed(*args: Any, **options: Any) -> Any:
        context = here.context
        if not context.recording or keeps_calls(context.tape):
            return f(*args, **options)
        start = take_number()
        was_drawn, was_tape = context.drawn, context.tape
        drawn: dict[Any, Any] = {}
        context.drawn, context.tape = drawn, None
        try:
            value = f(*args, **options)
        finally:
            context.drawn, context.tape = was_drawn, was_tape
            if was_drawn is not None:
                for generator, state in drawn.items():
                    was_drawn.setdefault(generator, state)
        leaves = flatten(value)
        heads = [_made_since(start, x) for x in leaves]
        made = [node for node in heads if node is not None]
        if not made:
            return value
        frontier = sorted(_frontier(made, start), key=lambda node: node.number)
        replay = _Replay(f, args, options, drawn, frontier)
        results = iter(replay.record([x.raw for x, node in zip(leaves, heads, strict=True) if node is not None]))
        return unflatten(value, [x if node is None else next(results) for x, node in zip(leaves, heads, strict=True)])

    return checkpointed


class _Replay:
    """One call of a checkpointed function, as an op whose rule runs the function again."""

    def __init__(
        self, f: Function, args: tuple[Any, ...], options: dict[str, Any], drawn: dict[Any, Any], frontier: list[Node]
    ) -> None:
        self.f, self.drawn, self.frontier, self.stand_ins = f, drawn, frontier, stand_ins()
        self.args, self.options = map_leaves(own, args), map_leaves(own, options)

    def record(self, values: list[Any]) -> list[Tensor]:
        """Results with the given values whose gradients go straight to the frontier."""
        context = here.context
        declared = Op(lambda *xs: xs, f"checkpoint({getattr(self.f, '__name__', type(self.f).__name__)})", "general",
                      True, False)  # fmt: skip
        declared.rule = self.rule
        declared.differentiable_rule = lambda node, gradient: self.rule(gradient)
        shapes, dtypes = tuple(v.shape for v in values), tuple(v.dtype for v in values)
        given = flatten((self.args, self.options))
        storages = tuple(x.storage for x in (*given, *self.frontier) if isinstance(x, Tensor | Leaf))
        number = take_number()
        node = Node(number, declared, tuple(self.frontier), (), shapes, dtypes, storages or None, context.step)
        results = [Tensor.of(v, Part(node, i)) for i, v in enumerate(values)]
        if context.tape is not None:
            context.tape.append(node, (), {}, tuple(results))
        return results

    def rule(self, gradients: tuple[Any, ...]) -> tuple[Any, ...]:
        states = {generator: generator.state() for generator in self.drawn}
        for generator, state in self.drawn.items():
            generator.set_state(state)
        try:
            with standing_in(self.stand_ins):
                return replay(partial(self.f, *self.args, **self.options), self.frontier, gradients)
        finally:
            for generator, state in states.items():
                generator.set_state(state)


def replay(
    f: Callable[[], Any], frontier: Sequence[Node | None], gradients: Sequence[Any], all_results: bool = False
) -> tuple[Any, ...]:
    """Run `f` again, and walk from its results, which have `gradients`, to the nodes of `frontier`.

    Results that were there before have none; with `all_results` they have one too.

    Returns the gradient of each; of a node that stands there twice, the first time. Where gradients are Tensors, the
    walk is itself recorded.
    """
    differentiable = any(isinstance(g, Tensor) for g in gradients)
    ends = {node for node in frontier if node is not None}
    context = here.context
    was_rule, was_tape, context.rule, context.tape = context.rule, context.tape, None, None
    try:
        start = take_number()
        with enable_grad():
            value = f()
        heads = [x.node if all_results else _made_since(start, x) for x in flatten(value)]
        heads = heads if all_results else [node for node in heads if node is not None]
        if len(heads) != len(gradients):
            raise TapeError(
                f"checkpoint: the second run gave {len(heads)} results that need gradients, the first "
                f"{len(gradients)}.",
                "the function must compute the same thing twice.",
            )
        seeds: dict[Node, Any] = {}
        for head, g in zip(heads, gradients, strict=True):
            if head is None:
                continue  # it depends on nothing
            seed = Tensor(g) if differentiable and not isinstance(g, Tensor) else g
            seeds[head] = seeds[head] + seed if head in seeds else seed
        found = walk(seeds, ends, free=not differentiable, differentiable=differentiable, ends=True)
    finally:
        context.rule, context.tape = was_rule, was_tape
    return tuple(None if node is None else found.pop(node, None) for node in frontier)


def keeps_calls(tape: Tape | None) -> bool:
    """Whether a tape, or one around it, is to be run forward again: then every step has to be on it."""
    while tape is not None and not tape.keep_calls:
        tape = tape.outer
    return tape is not None


def _made_since(start: int, value: Any) -> Node | None:
    """The node of a result that was recorded after `start`."""
    node = value.node if isinstance(value, Tensor) else None
    return node if node is not None and node.number > start else None


def _frontier(heads: list[Node], start: int) -> set[Node]:
    """The nodes made before `start` that those made after it depend on."""
    nodes = list(dict.fromkeys(heads))
    seen = set(nodes)
    for node in nodes:  # grows while it is walked
        for parent in node.parents or ():
            if parent is not None and parent not in seen:
                seen.add(parent)
                if parent.number > start:
                    nodes.append(parent)
    return {node for node in seen if node.number < start}
