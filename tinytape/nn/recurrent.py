"""`Recurrent`: any cell over time."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.errors import InputError, ShapeError
from ..engine.tensor import Tensor
from ..engine.tree import flatten, unflatten
from ..loop.budget import check_checkpoint
from ..loop.probes import watching
from ..loop.scan import leaf_names, scan
from ..ops.shape import expand_dims, squeeze
from .checks import check_array
from .layers import Checkpoint
from .module import Module
from .sequences import Inputs, Lengths, begin, end, read, watched

__all__ = ["Recurrent"]


class Recurrent(Module):
    """Any cell over time: ``nn.Recurrent(cell)`` does for your cell what `LSTM` does for `LSTMCell`.

    Parameters
    ----------
    cell : Module
        ``cell(x, state) -> state`` for x (B, features). A state is a Tensor (B, ...), or a tuple, list or dict of
        them, whose first is put out. Without a given state, ``cell.initial_state(B)`` is asked for one.
    batch_first : bool
        x and y are (batch, time, features). Default False.
    reverse : bool
        Go backwards in time. Default False.
    checkpoint : int, str or Plan, optional
        What is kept for the backward walk, as for `scan`. Default None: everything.

    Notes
    -----
    ``y, state = recurrent(x, state, lengths=None, mask=None, reset=None)``, as for `RNN`; states as the cell's own.

    A cell with randomness of its own may have a method ``draw(steps, B)``, which gives a nest of arrays whose first
    axis is the steps. In training it is called once, and the cell with each step's slices: ``cell(x, state, drawn)``.

    A cell that cannot be compiled, because it looks at values or draws random numbers itself, runs step by step, and a
    line of the logger ``tinytape.compile`` says why.
    """

    def __init__(
        self, cell: Module, batch_first: bool = False, reverse: bool = False, *, checkpoint: Checkpoint = None
    ) -> None:
        if not callable(cell):
            raise InputError(f"Recurrent: cell is {cell!r}.", "pass a module, cell(x, state) -> state.")
        check_checkpoint("Recurrent", checkpoint)
        self.cell, self.batch_first, self.reverse = cell, batch_first, reverse
        self.checkpoint: Checkpoint = checkpoint

    def forward(
        self, x: Any, state: Any = None, lengths: Lengths = None, mask: Any = None, reset: Any = None
    ) -> tuple[Tensor, Any]:
        check_array("Recurrent", "x", x)
        sequence = read("Recurrent", x, lengths, mask, reset, self.batch_first)
        steps, rows = sequence.x.shape[:2]
        if state is None:
            make = getattr(self.cell, "initial_state", None)
            if make is None:
                raise InputError(
                    f"Recurrent: {type(self.cell).__name__} has no initial_state(batch), and no state is given.",
                    "pass one, or give the cell that method.",
                )
            state = make(rows)
        elif sequence.unbatched:
            state = unflatten(state, [expand_dims(part, 0) for part in flatten(state)])
        for name, part in zip(leaf_names("state", state), flatten(state), strict=True):
            check_array("Recurrent", name, part)
        if any(part.shape[:1] != (rows,) for part in flatten(state)):
            found = [part.shape for part in flatten(state)]
            raise ShapeError(f"Recurrent: x has {rows} rows, the state has shapes {found}.", "states are (B, ...).")
        inputs = sequence.inputs(sequence.x, self.reverse, self._draws(steps, rows))
        if watching() is not None:
            inputs = watched(self, "", leaf_names("state", state), state, inputs, self.reverse)
        last, y = scan(_step_of_cell(self.cell), state, inputs, reverse=self.reverse, checkpoint=self.checkpoint)
        if sequence.unbatched:
            last = unflatten(last, [squeeze(part, axis=0) for part in flatten(last)])
        return sequence.back(y), last

    def _draws(self, steps: int, rows: int) -> tuple[Any, ...]:
        """What the cell takes beside x and state, for all steps: nothing, or what it drew."""
        draw = getattr(self.cell, "draw", None)
        if draw is None or not self.cell.training:
            return ()
        drawn = draw(steps, rows)
        parts = flatten(drawn)
        if any(np.shape(part)[:1] != (steps,) for part in parts):
            raise ShapeError(
                f"Recurrent: draw({steps}, {rows}) gave shapes {[np.shape(part) for part in parts]}.",
                f"the first axis is that of the {steps} steps.",
            )
        return (drawn,)


def _step_of_cell(cell: Module) -> Any:
    """Any cell's step."""
    name = type(cell).__name__

    def step(state: Any, now: Inputs) -> tuple[Any, Tensor]:
        before = begin(state, now)
        leaves, wanted = flatten(cell(now.x, before, *now.drawn)), len(flatten(before))
        if len(leaves) != wanted:
            raise InputError(
                f"Recurrent: {name} went from a state of {wanted} tensors to one of {len(leaves)}.",
                "forward returns a state like the one it was given.",
            )
        return end(before, unflatten(before, leaves), leaves[0], now)

    found: Any = step
    found.__name__, found.has_probes = name, True
    return found
