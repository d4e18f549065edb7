"""Between a scan's leaves and a kernel's arrays, which all have an axis for the batch rows and one dtype."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from ..engine.tree import Array
from .program import Program
from .trace import Shared

__all__ = ["Leaves", "readings"]

Shape = tuple[int, ...]


def readings(carries: Sequence[Shape], inputs: Sequence[Shape]) -> Iterator[tuple[int | None, Shared]]:
    """How shapes can be understood: the number of batch rows, and which leaves have no axis for them.

    The likely ones come first; None rows, which takes all for one row, comes last and fits always. A vector as long as
    the batch may be one number a row, or the same in all rows.
    """
    rank = max(map(len, carries), default=0)
    rows = next((shape[0] for shape in carries if len(shape) == rank > 0), None)
    if rows is not None and (rank > 1 or any(len(shape) > 1 for shape in inputs)):
        plain = [{i for i, shape in enumerate(group) if shape[:1] != (rows,)} for group in (carries, inputs)]
        vectors = [(0, i) for i, shape in enumerate(carries) if shape == (rows,)]
        vectors += [(1, i) for i, shape in enumerate(inputs) if shape == (rows,)]
        for some in [[], *([one] for one in vectors), *([vectors] if len(vectors) > 1 else [])]:
            found = [group | {i for at, i in some if at == which} for which, group in enumerate(plain)]
            yield rows, Shared(frozenset(found[0]), frozenset(found[1]))
    yield None, Shared()


class Leaves:
    """The leaves of a program's carry and outputs as a user knows them.

    Parameters
    ----------
    program : Program
    dtypes : sequence of dtype
        Of the carry's leaves and then of the outputs.
    inputs : int
        How many there are.
    """

    def __init__(self, program: Program, dtypes: Sequence[np.dtype[Any]], inputs: int) -> None:
        self.program, self.dtypes = program, list(dtypes)
        self.count = len(program.carries)
        shared = program.shared_carries or program.shared_outputs or program.shared_inputs
        self.plain = not shared and all(dtype == program.dtype for dtype in self.dtypes)
        """Whether a user knows them as kernels do."""
        self.places: list[int | None] = [None] * inputs  # of each input's gradient among those that there are
        for at, i in enumerate(program.input_gradients):
            self.places[i] = at

    def rows(self, carries: Sequence[Array]) -> int:
        """The number of batch rows."""
        if self.plain:
            return carries[0].shape[0]
        shared = self.program.shared_carries
        return next((a.shape[0] for i, a in enumerate(carries) if i not in shared), 1)

    def enter(self, carries: list[Array], rows: int) -> list[Array]:
        """The first carry, in each row."""
        shared = self.program.shared_carries
        if not shared:
            return carries
        return [np.broadcast_to(a, (rows, *a.shape)) if i in shared else a for i, a in enumerate(carries)]

    def leave(self, finals: list[Array], ys: list[Array]) -> list[Array]:
        """The last carry and the outputs; of what is the same in all rows, the first row's."""
        program, found = self.program, [*finals, *ys]
        if program.shared_carries or program.shared_outputs:
            found = [a[0, ...] if i in program.shared_carries else a for i, a in enumerate(finals)]
            found += [a[:, 0] if i in program.shared_outputs else a for i, a in enumerate(ys)]
        return [a if a.dtype == dtype else a.astype(dtype) for a, dtype in zip(found, self.dtypes, strict=True)]

    def enter_gradients(
        self, carries: Sequence[Array | None], ys: Sequence[Array | None], rows: int
    ) -> tuple[list[Array | None], list[Array | None]]:
        """What comes back for the last carry and for the outputs, in each row; None: nothing."""
        program, carries, ys = self.program, list(carries), list(ys)
        for i in program.shared_carries:
            carries[i] = _in_first_row(carries[i], 0, rows)
        for i in program.shared_outputs:
            ys[i] = _in_first_row(ys[i], 1, rows)
        return carries, ys

    def leave_gradients(self, carries: list[Array | None], given: list[Array]) -> list[Array | None]:
        """The gradients of the first carry and of all inputs, None for those that have none."""
        inputs = [None if at is None else given[at] for at in self.places]
        if self.plain:
            return [*carries, *inputs]
        program = self.program
        found: list[Array | None] = list(carries)
        for i in program.shared_carries:
            a = carries[i]
            found[i] = None if a is None else np.asarray(a.sum(0))
        for i, a in enumerate(inputs):
            found.append(a.sum(1) if a is not None and i in program.shared_inputs else a)
        return found


def _in_first_row(array: Array | None, axis: int, rows: int) -> Array | None:
    """An array with an axis for the rows; zeros in all but the first."""
    if array is None:
        return None
    if rows == 1:
        return np.expand_dims(array, axis)
    wide = np.zeros((*array.shape[:axis], rows, *array.shape[axis:]), array.dtype)
    wide[(slice(None),) * axis + (0,)] = array
    return wide
