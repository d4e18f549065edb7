"""What layers over time take: sequences, and which of their steps count or start anew."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.tensor import Tensor
from ..engine.tree import map_leaves
from ..loop.probes import probed, watching
from ..ops.elementwise import where
from ..ops.shape import expand_dims, squeeze, swapaxes

__all__ = ["Flags", "Inputs", "Lengths", "Sequence", "begin", "end", "read", "watched"]

Flags: TypeAlias = npt.NDArray[np.bool_]
Lengths: TypeAlias = npt.ArrayLike | Tensor | None
ZERO = False  # which leaves every dtype as it is, bool too


class Inputs(NamedTuple):
    """What a step takes beside the state; with a leading axis of steps, the xs of a scan.

    Attributes
    ----------
    x : Tensor or array
        (B, ...).
    keep : Flags or None
        (B,): whether the step counts. None: it does for all rows.
    cut : Flags or None
        (B,): whether the state is zeroed before the step. None: for no row.
    drawn : tuple
        What else the cell is called with.
    probes : Probes or None
        Where the backward walk leaves norms of the state's gradients.
    """

    x: Any
    keep: Any
    cut: Any
    drawn: tuple[Any, ...] = ()
    probes: Any = None


def begin(state: Any, now: Inputs) -> Any:
    """The state from which a step starts."""
    return state if now.cut is None else map_leaves(partial(_choose, now.cut, ZERO), state)


def end(before: Any, after: Any, y: Any, now: Inputs) -> tuple[Any, Any]:
    """The state and the output of a step: where it does not count, the state that it started from, and zeros."""
    if now.probes is not None:
        after, y = probed(after, y, now.probes)
    if now.keep is None:
        return after, y
    return map_leaves(partial(_choose, now.keep), after, before), _choose(now.keep, y, ZERO)


def watched(owner: Any, name: str, labels: Iterable[str], state: Any, inputs: Inputs, reverse: bool) -> Inputs:
    """The inputs of a loop that somebody watches, with probes."""
    watch = watching()
    assert watch is not None
    return inputs._replace(probes=watch.probes(owner, name, tuple(labels), state, len(inputs.x), reverse))


def _choose(flags: Any, yes: Any, no: Any) -> Tensor:
    """`yes` in the rows that are flagged, `no` in the others."""
    axes = max(getattr(yes, "ndim", 0), getattr(no, "ndim", 0))
    return where(expand_dims(flags, tuple(range(1, axes))), yes, no)


class Sequence(NamedTuple):
    """An input brought to (T, B, ...), its marks, each (T, B) or None, and the layout it came in."""

    x: Any
    keep: Flags | None
    cut: Flags | None
    unbatched: bool
    batch_first: bool

    def inputs(self, x: Any, reverse: bool, drawn: tuple[Any, ...] = ()) -> Inputs:
        """The xs of a scan over `x`."""
        if self.keep is None and self.cut is None:
            return Inputs(x, None, None, drawn)
        cut = _cuts(self.keep, self.cut, reverse)
        keep, cut = (None if flags is None else Tensor.of(flags) for flags in (self.keep, cut))
        return Inputs(x, keep, cut, drawn)

    def back(self, y: Tensor) -> Tensor:
        """An output in the layout of the input."""
        return squeeze(y, axis=1) if self.unbatched else swapaxes(y, 0, 1) if self.batch_first else y


def _cuts(keep: Flags | None, cut: Flags | None, reverse: bool) -> Flags | None:
    """Before which steps the state is zeroed, in the loop's direction.

    A row is cut between t - 1 and t, so backwards it is zeroed before t - 1; and where that step does not count,
    before the next one that does, so that masked steps leave the state alone.
    """
    if cut is None:
        return None
    if reverse:
        cut = np.concatenate([cut[1:], np.zeros_like(cut[:1])])
    if keep is None:
        return cut
    due, found = np.zeros_like(cut[0]), np.zeros_like(cut)
    for t in reversed(range(len(cut))) if reverse else range(len(cut)):
        due = due | cut[t]
        found[t] = due & keep[t]
        due = due & ~keep[t]
    return found


# ---- reading what a user gives --------------------------------------------------------------------------------------


def read(what: str, x: Any, lengths: Lengths, mask: Any, reset: Any, batch_first: bool) -> Sequence:
    """Check a layer's input and its marks.

    Raises
    ------
    ShapeError, DTypeError, InputError
        If they do not fit each other.
    """
    if x.ndim not in (2, 3):
        layout = "(B, T, features)" if batch_first else "(T, B, features)"
        raise ShapeError(f"{what}: x has shape {x.shape}.", f"pass {layout}, or (T, features) for a single sequence.")
    unbatched = x.ndim == 2
    batch_first = batch_first and not unbatched
    outside = x.shape[:-1]
    x = expand_dims(x, 1) if unbatched else swapaxes(x, 0, 1) if batch_first else x
    steps, rows = x.shape[:2]
    if steps == 0:
        raise ShapeError(f"{what}: x has 0 time steps.", "pass at least one; a row without any has a length of 0.")

    if lengths is None and mask is None and reset is None:
        return Sequence(x, None, None, unbatched, batch_first)

    def flags(name: str, given: Any) -> Flags | None:
        if given is None:
            return None
        found = given.data if isinstance(given, Tensor) else np.asarray(given)
        if found.dtype != np.bool_:
            raise DTypeError(f"{what}: {name} is {found.dtype}.", f"pass bools: {name}.astype(bool).")
        if found.shape != outside:
            raise ShapeError(
                f"{what}: {name} has shape {found.shape}, x has {outside} steps and rows.", f"pass one of {outside}."
            )
        return np.array(found.T if batch_first else found).reshape(steps, rows)  # the tape keeps it

    keep = flags("mask", mask)
    if lengths is not None:
        if keep is not None:
            raise InputError(f"{what}: both lengths and mask are given.", "pass one of them.")
        keep = _within(what, lengths, steps, rows, unbatched)
    cut = flags("reset", reset)
    if keep is not None:
        if keep.all():
            keep = None
        else:
            x = where(keep[:, :, None], x, ZERO)  # what stands in masked steps, even NaN, reaches no weight's gradient
    return Sequence(x, keep, cut if cut is not None and cut.any() else None, unbatched, batch_first)


def _within(what: str, lengths: Any, steps: int, rows: int, unbatched: bool) -> Flags:
    found = lengths.data if isinstance(lengths, Tensor) else np.asarray(lengths)
    if found.dtype.kind not in "iu":
        raise DTypeError(f"{what}: lengths are {found.dtype}.", "pass integers, one for each row.")
    if found.shape != (rows,) and not (unbatched and found.shape == ()):
        raise ShapeError(
            f"{what}: lengths have shape {found.shape}, x has {rows} rows.", f"pass one for each row, shape ({rows},)."
        )
    if found.size and not (found.min() >= 0 and found.max() <= steps):
        worst = found.max() if found.max() > steps else found.min()
        raise InputError(f"{what}: a length is {worst}, x has {steps} time steps.", f"lengths are 0 to {steps}.")
    return np.arange(steps)[:, None] < found.reshape(1, rows)
