"""What is computed once a run with the ops themselves: what follows from weights alone, and what follows from sums."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.tape import Storage
from ..engine.tensor import Tensor
from ..engine.tree import Array
from ..ops.shape import reshape
from .program import Program, Value

__all__ = ["Invariants", "finish"]


class Invariants(dict[Value, Array]):
    """The values that are the same in all rows and steps, computed when they are asked for.

    Parameters
    ----------
    captured : dict
        The tensors and arrays from outside, by key. What they hold now is what counts, also if it is asked for in the
        adjoint: a tensor may be given other memory until then, and an array be written.
    known : dict, optional
        What has been computed.

    Attributes
    ----------
    sources : dict
        By key, the array and the storage of each; None for what has none.
    made : dict
        What else follows from them, by whoever made it.
    """

    def __init__(self, captured: dict[Any, Any], known: dict[Value, Array] | tuple[()] = ()) -> None:
        super().__init__(known)
        self.sources: dict[Any, tuple[Array, Storage | None]] = {
            key: (x.raw, x.storage) if isinstance(x, Tensor) else (np.array(x), None) for key, x in captured.items()
        }
        self.made: dict[Any, Any] = {}

    def extended(self, known: dict[Value, Array]) -> Invariants:
        """These and others."""
        found = Invariants({}, self)
        found.sources = self.sources
        found.update(known)
        return found

    def __missing__(self, value: Value) -> Array:
        recipe = value.recipe
        if recipe.op is None:
            source = self.sources.get(recipe.captured)
            found = value.array if source is None else source[0]
        else:
            found = _computed(value, self)
        self[value] = found
        return found


def finish(program: Program, post: list[Value], known: dict[Value, Array]) -> list[Array]:
    """The gradients of captured tensors.

    Parameters
    ----------
    post : list of Value
        What is computed after the last step, in order.
    known : dict
        The invariants and the sums over rows and steps. The rest is added to it.
    """
    for value in post:
        known[value] = _computed(value, known)
    return [known[value] for value in program.captured_gradients.values()]


def _computed(value: Value, known: dict[Value, Array]) -> Array:
    recipe = value.recipe
    if recipe.op is reshape.op:  # of every bias's gradient
        found = known[recipe.args[0]]
        return found if found.shape == value.shape else found.reshape(value.shape)
    out = recipe.op.forward(*[known[a] if isinstance(a, Value) else a for a in recipe.args], **recipe.options)
    return np.asarray(out[recipe.out] if recipe.op.several else out)
