"""Views: how a Tensor of a trace looks at a value of the program.

Slices, transposes, new axes and broadcasting make another view of the same value, and cost nothing.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple, cast

from .program import Piece, Ref, Shape, Value

__all__ = ["BATCH", "NEW", "View", "cuts", "entries_of", "inside", "merged", "unmerged", "whole"]

BATCH, NEW = -1, -2


class View(NamedTuple):
    """For each axis of a Tensor BATCH, NEW or the value's axis.

    `starts` and `steps` say for each axis of the value where it is entered and how it is gone along. Of a `merged`
    view the first axis is the batch together with so many first axes of the value.
    """

    value: Value
    shape: Shape
    axes: tuple[int, ...]
    starts: tuple[int, ...]
    steps: tuple[int, ...]
    merged: int = 0

    @property
    def batch(self) -> int | None:
        """Which axis is the batch."""
        return self.axes.index(BATCH) if BATCH in self.axes else None

    @property
    def row_shape(self) -> Shape:
        return tuple(n for n, axis in zip(self.shape, self.axes, strict=True) if axis != BATCH)

    @property
    def is_whole(self) -> bool:
        """Whether it is the value as it is, without a batch."""
        return self == whole(self.value, self.value.shape, None)

    @property
    def sizes(self) -> dict[int, int]:
        """How much is seen of each of the value's axes that is gone along."""
        return {axis: n for axis, n in zip(self.axes, self.shape, strict=True) if axis >= 0}

    def ref(self, loop: Sequence[int | None]) -> Ref:
        """As a loop reads it, whose axis ``loop[i]`` goes along axis i of the view."""
        places = {axis: loop[i] for i, axis in enumerate(self.axes) if axis >= 0}
        return Ref(
            self.value,
            tuple((s, k, places.get(v)) for v, (s, k) in enumerate(zip(self.starts, self.steps, strict=True))),
        )

    def with_axes(self, order: Sequence[int]) -> View:
        """With axes in another order; -1 stands for a new one of length 1."""
        return self._replace(
            shape=tuple(1 if i < 0 else self.shape[i] for i in order),
            axes=tuple(NEW if i < 0 else self.axes[i] for i in order),
        )

    def with_new(self, places: Collection[int]) -> View:
        """With new axes of length 1, which then are at these places."""
        old = iter(range(len(self.shape)))
        return self.with_axes([-1 if i in places else next(old) for i in range(len(self.shape) + len(places))])

    def without(self, new: Collection[int]) -> View:
        """Without new axes, given by negative indices; those that it does not reach are passed over."""
        rank = len(self.shape)
        return self.with_axes([i for i in range(rank) if i - rank not in new])

    def with_batch(self, at: int) -> View:
        """The same in all rows: the axis `at` is new, and now the batch."""
        return self._replace(axes=tuple(BATCH if i == at else axis for i, axis in enumerate(self.axes)))


def whole(value: Value, shape: Shape, batch: int | None) -> View:
    """All of a value; `shape` is with the batch."""
    axes, count = list[int](), 0
    for i in range(len(shape)):
        axes.append(BATCH if i == batch else count)
        count += i != batch
    return View(value, shape, tuple(axes), (0,) * count, (1,) * count)


def merged(view: View, count: int) -> View:
    """The batch, in front of a whole value, as one axis with the first `count` axes of the value."""
    rows, *rest = view.shape
    shape = (rows * math.prod(rest[:count]), *rest[count:])
    return view._replace(shape=shape, axes=(BATCH, *view.axes[1 + count :]), merged=count)


def unmerged(view: View, rows: int) -> View | None:
    """The whole value with the batch in front; None if the view's other axes are not in order."""
    value = view.value
    found = whole(value, (rows, *value.shape), 0)
    return found if merged(found, view.merged) == view else None


def entries_of(index: Any, rank: int) -> list[Any]:
    """A basic index written out: ``...`` and what is left out at the end as slices."""
    entries: list[Any] = list(cast("tuple[Any, ...]", index)) if isinstance(index, tuple) else [index]
    taken = sum(entry is not None and entry is not Ellipsis for entry in entries)
    missing = [slice(None)] * (rank - taken)
    if Ellipsis in entries:
        at = entries.index(Ellipsis)
        return [*entries[:at], *missing, *entries[at + 1 :]]
    return [*entries, *missing]


def cuts(view: View) -> tuple[int, set[int]] | None:
    """The axis along which the pieces of a join follow each other without holes, and where they begin."""
    value = view.value
    if view.merged or view.sizes != dict(enumerate(value.shape)) or any(view.starts) or set(view.steps) - {1}:
        return None
    split = {v for p in value.pieces for v, place in enumerate(p.place) if place != (0, 1, value.shape[v])}
    if len(split) != 1:
        return None
    v = split.pop()
    places = sorted(p.place[v] for p in value.pieces)
    ends = [first + n for first, _, n in places]
    if [(first, step) for first, step, _ in places] != [(end, 1) for end in (0, *ends[:-1])]:
        return None
    return (view.axes.index(v), {first for first, _, _ in places}) if ends[-1] == value.shape[v] else None


def inside(view: View) -> View | None:
    """A view of a join that lies within one piece, as a view of what the piece holds. None: it does not."""
    for piece in view.value.pieces:
        if all(_covers(view, v, place) for v, place in enumerate(piece.place)):
            return _of_piece(view, piece)
    return None


def _covers(view: View, v: int, place: tuple[int, int, int]) -> bool:
    first, step, n = place
    start = view.starts[v]
    end = start + view.steps[v] * (view.sizes.get(v, 1) - 1)
    return step == 1 and all(first <= i < first + n for i in (start, end))


def _of_piece(view: View, piece: Piece) -> View:
    follows = {axis: v for v, (_, _, axis) in enumerate(piece.ref.index) if axis is not None}
    starts, steps = [0] * len(piece.ref.index), [1] * len(piece.ref.index)
    for v, (s, k, axis) in enumerate(piece.ref.index):
        if axis is None:
            starts[v] = s
        else:
            starts[v], steps[v] = s + k * (view.starts[axis] - piece.place[axis][0]), k * view.steps[axis]
    axes = tuple(follows.get(a, NEW) if a >= 0 else a for a in view.axes)
    return View(piece.ref.value, view.shape, axes, tuple(starts), tuple(steps))
