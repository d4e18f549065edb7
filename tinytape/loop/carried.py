"""A state that is carried along a stream: whether it is finite, and which of its rows are meant."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.tree import flatten
from .scan import leaf_names

__all__ = ["check_finite", "row_flags"]


def check_finite(when: str, state: Any, rows: int | None, start: int) -> None:
    """Refuse a state with NaN or infinity.

    Parameters
    ----------
    when : str
        Which state it is.
    rows : int or None
        How many the batch has.
    start : int
        The first step that led to it.

    Raises
    ------
    InputError
        It names the first leaf, row and entry.
    """
    for i, part in enumerate(flatten(state)):
        finite = np.isfinite(part.raw)
        if finite.all():
            continue
        name = leaf_names("state", state)[i]
        at = tuple(int(n) for n in np.argwhere(~finite)[0])
        axis = 1 if part.ndim == 3 else 0  # (layers, B, features) of layers, (B, features) of cells
        row = f"row {at[axis]}, " if part.ndim > 1 and part.shape[axis] == rows else ""
        raise InputError(
            f"truncated: {name} is {part.raw[at]} {when}, in {row}entry {list(at)}; "
            f"{np.count_nonzero(~finite)} of {part.size} entries are not finite.",
            f"look for the input or weight that is not, from step {start} on; check_state=False lets it be carried.",
        )


def row_flags(rows: npt.ArrayLike, count: int) -> npt.NDArray[np.bool_]:
    """Which of `count` rows are meant by indices, or by bools.

    Raises
    ------
    ShapeError, DTypeError, InputError
        If there are no such rows.
    """
    chosen, flags = np.asarray(rows), np.zeros(count, np.bool_)
    if chosen.dtype == np.bool_:
        if chosen.shape != (count,):
            raise ShapeError(f"reset_state: rows are bools of shape {chosen.shape}.", f"pass one for each of {count}.")
    elif chosen.size == 0:
        return flags
    elif chosen.dtype.kind not in "iu":
        raise DTypeError(f"reset_state: rows are {chosen.dtype}.", "pass integers or bools.")
    elif not (chosen.min() >= 0 and chosen.max() < count):
        raise InputError(f"reset_state: rows are {chosen.tolist()}.", f"there are {count}, from 0 on.")
    flags[chosen] = True
    return flags
