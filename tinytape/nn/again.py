"""A layer called as it was before: a short way to the same kernels.

What a call means is the layer's `forward`. What that checks and looks up takes three times as long as a kernel for one
token. So where nobody listens, what was found for a call is remembered for the next one, if it is of the same form.
"""

from __future__ import annotations

from collections.abc import Callable
from operator import is_
from typing import Any, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from ..engine.tape import here
from ..engine.tensor import Tensor
from ..loop.probes import watching
from ..loop.scan import eager
from ..loop.switch import may_compile
from .module import Parameter
from .sequences import Inputs

__all__ = ["Run", "again", "ready"]

State: TypeAlias = tuple[Tensor, ...]


class Run(NamedTuple):
    """A layer's step, the kernels that go along it, and the zeros from which they start where no state is given."""

    step: Any
    ready: Any
    zeros: State

    def __call__(self, x: Tensor, state: State | None) -> tuple[Tensor, State]:
        begun = self.zeros if state is None else state
        *after, y = self.ready.run(self.step, begun, (x,), len(x.raw), False, eager)
        return y, tuple(after)


_Forms: TypeAlias = dict[Any, tuple[list[Any], list[Run] | None]]  # the weights then, and what ran
_known: WeakKeyDictionary[Any, _Forms] = WeakKeyDictionary()
MOST = 16  # forms of a layer


def again(
    layer: Any, weights: list[Any], x: Any, state: Any, find: Callable[[Any, Tensor], list[Run] | None]
) -> tuple[Tensor, list[Tensor], list[Run]] | None:
    """What runs in a call without marks; None where it has to be made in full.

    Parameters
    ----------
    layer : Module
    weights : list of Parameter or None
        Of all its layers.
    x, state
        As a user gave them, not checked.
    find : callable
        Checks them, given the state and x as a Tensor, and tells what runs, if kernels alone do. The number of steps
        is of no matter.

    Returns
    -------
    x : Tensor
    parts : list of Tensor
        Of the state; none if none was given.
    runs : list of Run
        For each layer.
    """
    context = here.context
    if context.tape is not None or context.traced or context.rule or context.depth:
        return None
    if watching() is not None or not may_compile():
        return None
    make = Tensor if context.recording else Tensor.of  # the tape keeps a copy
    tensors: list[Tensor] = []
    given: list[Any] = [x] if state is None else [x, *state] if isinstance(state, tuple) else [x, state]
    for a in given:
        if a.__class__ is np.ndarray:
            a = make(a)
        elif not isinstance(a, Tensor):
            return None
        tensors.append(a)
    x, *parts = tensors
    form = (
        context.recording, state is None, isinstance(state, tuple),
        x.raw.shape[1:], x.raw.dtype, x.node is None, weights[0].raw.dtype,
        *[(a.raw.shape, a.raw.dtype, a.node is None) for a in parts],
        *[w is None or w.node is None for w in weights],
    )  # fmt: skip
    forms = _known.get(layer)
    if forms is None:
        forms = _known[layer] = {}
    was, runs = forms.get(form, ([], None))
    if len(was) != len(weights) or not all(map(is_, was, weights)):
        if not all(w is None or isinstance(w, Parameter) for w in weights):
            return None  # what stands in for one in a single call is not to outlive it
        if len(forms) >= MOST:
            forms.clear()
        runs = find(state, x)
        forms[form] = weights, runs
    return None if runs is None or not len(x.raw) else (x, parts, runs)


def ready(step: Any, x: Tensor, state: State, zeros: State) -> Run | None:
    """What runs a step on such an input and state, if kernels can."""
    from ..compile import attempt  # brings much that eager use does without

    inputs = Inputs(x, None, None)
    plan, captures = attempt.plan_for(step, state, inputs, [*state], [x])
    if isinstance(plan, attempt.NotLowerable) or not plan.reusable:
        return None
    return Run(step, attempt.Ready(plan, plan.kernels, captures), zeros)
