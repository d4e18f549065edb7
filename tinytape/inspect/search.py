"""What both directions of the search for a non-finite value need: names, layout of time and batch, the last steps."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from ..engine.errors import DTypeError
from ..engine.tape import Node
from ..engine.tensor import Tensor
from ..engine.tree import Array, flatten, is_array
from ..loop.scan import leaf_names

__all__ = ["Call", "Known", "Layout", "Search", "Steps", "run"]


def run(f: Callable[..., Any], args: tuple[Any, ...]) -> Tensor:
    """Call the user's function; the first tensor that it returns. To `place_of_call`, what is above is the user's."""
    value = f(*args)
    leaves = [x for x in flatten(value) if isinstance(x, Tensor)]
    if not leaves:
        raise DTypeError(
            f"first_nonfinite: f returned a {type(value).__name__}, not a Tensor.", "return the loss from it."
        )
    return leaves[0]


class Known:
    """Names: of parameters, of inputs, of modules."""

    def __init__(self, model: Any, args: tuple[Any, ...]) -> None:
        self.parameters: dict[str, Tensor] = {}
        self.modules: dict[int, str] = {}
        if hasattr(model, "named_parameters"):
            self.parameters = dict(model.named_parameters())
            self.modules = {id(module): name for name, module in model.named_modules()}
        elif isinstance(model, dict):
            self.parameters = dict(cast("dict[str, Tensor]", model))
        elif model is not None:
            self.parameters = {f"parameters[{i}]": p for i, p in enumerate(model)}
        names = [name for i, arg in enumerate(args) for name in leaf_names(f"args[{i}]", arg)]
        leaves = zip(names, flatten(args), strict=True)
        self.inputs = {name: raw for name, x in leaves if (raw := _array_of(x)) is not None}

    def parameters_in(self, args: Sequence[Any]) -> tuple[str, ...]:
        """The parameters that some arguments are, or are views of."""
        raws = [x.raw for x in args if isinstance(x, Tensor)]
        found = (name for name, p in self.parameters.items() if any(np.may_share_memory(x, p.raw) for x in raws))
        return tuple(found)

    def owner_of(self, raw: Array) -> tuple[Literal["parameter", "input", "constant"], str]:
        """Whose array it is. An input may have been copied."""
        for name, p in self.parameters.items():
            if np.may_share_memory(raw, p.raw):
                return "parameter", name
        for name, x in self.inputs.items():
            if np.may_share_memory(raw, x) or (raw.shape == x.shape and np.array_equal(raw, x, equal_nan=True)):
                return "input", name
        return "constant", ""

    def of_leaf(self, node: Node) -> str:
        return next((name for name, p in self.parameters.items() if p.node is node), "")


def _array_of(value: Any) -> Array | None:
    return value.raw if isinstance(value, Tensor) else value if is_array(value) else None


class Layout:
    """Which entry of a value belongs to which time step and batch row.

    Parameters
    ----------
    axes : str
        What the first axes of the inputs are: "TB", "BT", "T", "B" or "".
    inputs : iterable of array
        The first that has so many axes says how long they are.
    """

    def __init__(self, axes: str, inputs: Iterable[Array]) -> None:
        self.axes = axes
        shape = next((x.shape for x in inputs if x.ndim >= len(axes)), ())
        self.sizes = dict(zip(axes, shape, strict=False))

    def find(self, raw: Array, step: int | None) -> tuple[tuple[int, ...], int | None, int | None]:
        """The first entry that is not finite, its time step and its row, where they are known."""
        index = tuple(int(i) for i in np.argwhere(~np.isfinite(raw))[0])
        T, B = self.sizes.get("T"), self.sizes.get("B")
        if step is not None:  # inside a loop over time values are (B, ...)
            return index, step, index[0] if B is not None and raw.shape[:1] == (B,) else None
        orders = (self.axes, self.axes[::-1]) if len(self.axes) == 2 else (self.axes,)
        for order in orders:
            if order and raw.shape[: len(order)] == tuple(self.sizes.get(letter) for letter in order):
                found = dict(zip(order, index, strict=False))
                return index, found.get("T"), found.get("B")
        if T is not None and B is not None and raw.shape[:1] == (T * B,):  # steps and rows in one axis
            found = dict(zip(self.axes, divmod(index[0], self.sizes[self.axes[1]]), strict=True))
            return index, found["T"], found["B"]
        return index, None, index[0] if B is not None and raw.shape[:1] == (B,) else None


class Search(NamedTuple):
    """What is looked for, and what is known."""

    known: Known
    layout: Layout
    ignore: frozenset[str]
    before: int


class Call(NamedTuple):
    """An op that ran, or the rule of one, with what it made, or was given."""

    op: str
    args: tuple[Any, ...]
    value: Array


class Steps:
    """What ran in the last few time steps, so that a value can be compared with the same one of the steps before."""

    def __init__(self, count: int) -> None:
        self.steps: deque[tuple[int | None, list[Call]]] = deque(maxlen=count + 1)

    def add(self, step: int | None, call: Call) -> None:
        if not self.steps or self.steps[-1][0] != step:
            self.steps.append((step, []))
        calls = self.steps[-1][1]
        calls.append(call)
        if step is None:
            del calls[:-64]  # what is not in a loop may be long, and has no steps before

    def norms(self) -> list[tuple[int, float]]:
        """The norms of the same call's value in the steps before the last."""
        last = self.steps[-1][1]
        i = len(last) - 1
        return [
            (step, float(np.linalg.norm(calls[i].value.astype(np.float64, copy=False).reshape(-1))))
            for step, calls in list(self.steps)[:-1]
            if step is not None and i < len(calls) and calls[i].op == last[i].op
        ]

    def parameters(self, known: Known) -> tuple[str, ...]:
        """Those that were read last."""
        return next((names for call in reversed(self.steps[-1][1]) if (names := known.parameters_in(call.args))), ())
