"""Building values from views: maps, reductions, joins, and the same elements in another shape."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np

from ..engine.op import Op
from ..engine.tree import Array
from ..ops.shape import moveaxis, transpose
from .program import CONTRACTED, Piece, Recipe, Ref, Shape, Value
from .trace import NotLowerable
from .views import BATCH, NEW, View, cuts, entries_of, inside, merged, unmerged, whole

__all__ = ["Builder"]

Place = tuple[int, int, int]  # first index, step, length


class Builder:
    """Makes the values of a program, equal ones once.

    Attributes
    ----------
    rows : int or None
        The length of the batch axis. None: there is none.
    adjoint : bool
        Whether sums over the batch may be taken.
    source : str
        The user's line that values are made for.
    fixed : dict
        By invariant that has a row for each batch row: the input that it is.
    """

    def __init__(self, dtype: np.dtype[Any], rows: int | None) -> None:
        self.dtype, self.rows = np.dtype(dtype), rows
        self.fixed: dict[Value, Value] = {}
        self.adjoint = False
        self.source = ""
        self._made: dict[Any, Value] = {}

    def cannot(self, reason: str) -> NotLowerable:
        return NotLowerable(reason, self.source)

    # ---- values and views --------------------------------------------------------------------------------------

    def make(self, kind: str, shape: Shape, args: tuple[Any, ...] = (), **others: Any) -> Value:
        """A value; one that was made before, if it is the same."""
        key = (kind, shape, args, tuple(sorted((k, v) for k, v in others.items())))
        found = self._made.get(key)
        if found is None:
            found = self._made[key] = Value(kind, shape, args, source=self.source, **others)
        return found

    def constant(self, array: Array) -> Value:
        """An invariant of these numbers."""
        return Value("invariant", array.shape, recipe=Recipe(None), array=array)

    def transposed(self, matrix: Value) -> Value:
        """An invariant matrix, transposed."""
        return self._derived(matrix, transpose.op, {"axes": None}, matrix.array.T)

    def view(self, arg: Any) -> View:
        """An argument of an op as a view."""
        if isinstance(arg, View):
            return arg
        if isinstance(arg, Value):
            if arg.kind in CONTRACTED:
                raise self.cannot("what is summed over the batch is mixed with single rows")
            return whole(arg, arg.shape, None)
        if not isinstance(arg, bool | int | float):
            raise self.cannot(f"an argument is a {type(arg).__name__}")
        return View(self.constant(np.asarray(arg, self.dtype)), (), (), (), ())

    def lift(self, view: View, axis: int) -> View:
        """A view of an invariant whose `axis` runs along the batch, as a view of an input that has rows."""
        invariant, along = view.value, view.axes[axis]
        if along == NEW:
            return view.with_batch(axis)
        if invariant.kind != "invariant" or view.starts[along] or view.steps[along] != 1:
            raise self.cannot("an axis runs along the batch and is not that of a tensor from outside")
        if invariant.shape[along] != self.rows or view.shape[axis] != self.rows:
            raise self.cannot(f"an axis of {view.shape[axis]} runs along the batch of {self.rows}")
        axes = tuple(BATCH if a == along else a - (a > along) for a in view.axes)
        starts, steps = (items[:along] + items[along + 1 :] for items in (view.starts, view.steps))
        return View(self.fixed_of(self._rows_first(invariant, along)), view.shape, axes, starts, steps)

    def _rows_first(self, invariant: Value, axis: int) -> Value:
        if axis == 0:
            return invariant
        options = {"source": axis, "destination": 0}
        return self._derived(invariant, moveaxis.op, options, np.moveaxis(invariant.array, axis, 0))

    def _derived(self, invariant: Value, op: Op, options: dict[str, Any], array: Array) -> Value:
        """What an op makes of an invariant."""
        key = (op.name, invariant, *options.items())
        if key not in self._made:
            recipe = Recipe(op, (invariant,), options)
            self._made[key] = Value(
                "invariant", array.shape, recipe.args, recipe=recipe, array=array, source=self.source
            )
        return self._made[key]

    def fixed_of(self, invariant: Value) -> Value:
        """The input that has the rows of an invariant."""
        if invariant not in self.fixed:
            self.fixed[invariant] = Value("fixed", invariant.shape[1:], (invariant,), index=len(self.fixed))
        return self.fixed[invariant]

    def realise(self, view: View, always: bool = False) -> Value:
        """A value that holds just what is viewed, the batch in front, in C order."""
        if view.batch not in (None, 0) or view.merged:
            raise self.cannot("the batch axis is not in front")
        shape = view.row_shape
        lead = len(view.shape) - len(shape)
        ref = view.ref([None if i < lead else i - lead for i in range(len(view.shape))])
        if not always and ref.is_whole(shape) and view.value.kind != "invariant":
            return view.value
        return self.make("map", shape, (ref,), fn="copy")

    # ---- element by element ------------------------------------------------------------------------------------

    def map(self, fn: str, *operands: Any) -> View:
        """An elementwise function of views and numbers, which broadcast as NumPy's do."""
        views = [x if isinstance(x, float | int) else self.view(x) for x in operands]
        arrays = [x for x in views if isinstance(x, View)]
        if any(x.merged for x in arrays):
            return self._map_merged(fn, views)
        shape = np.broadcast_shapes(*(x.shape for x in arrays))
        new = [
            i for i in range(-len(shape), 0)
            if shape[i] == 1 and all(x.axes[i] == NEW for x in arrays if -i <= len(x.shape))
        ]  # fmt: skip
        if new:  # as after a reduction that keeps its axes: a number is to stay one
            kept = [x.without(new) if isinstance(x, View) else x for x in views]
            return self.map(fn, *kept).with_new([len(shape) + i for i in new])
        batches = {x.batch - len(x.shape) for x in arrays if x.batch is not None}
        if len(batches) > 1:
            raise self.cannot(f"{fn} has the batch in different axes of its arguments")
        batch = next(iter(batches)) + len(shape) if batches else None
        if batch is not None and shape[batch] != self.rows:
            raise self.cannot(f"{fn} spreads the batch of {self.rows} over an axis of {shape[batch]}")
        if any(x.value.kind == "join" for x in arrays):
            joined = self._over_pieces(fn, views, shape)
            if joined is not None:
                return joined
        loop = _row_axes(len(shape), batch)
        args = [float(x) if not isinstance(x, View) else self._argument(x, shape, batch, loop) for x in views]
        value = self.make("map", tuple(n for i, n in enumerate(shape) if i != batch), tuple(args), fn=fn)
        return whole(value, shape, batch)

    def _argument(self, x: View, shape: Shape, batch: int | None, loop: list[int | None]) -> Ref:
        lead = len(shape) - len(x.shape)
        if batch is not None and x.batch is None and batch >= lead and x.shape[batch - lead] != 1:
            x = self.lift(x, batch - lead)
        return x.ref([None if n == 1 and shape[i + lead] != 1 else loop[i + lead] for i, n in enumerate(x.shape)])

    def _map_merged(self, fn: str, views: list[Any]) -> View:
        """Of views whose first axis is the batch with others: with these apart."""
        counts = {x.merged for x in views if isinstance(x, View) and x.merged}
        rank = max(len(x.shape) for x in views if isinstance(x, View))
        count = counts.pop()
        apart: list[Any] = []
        for x in views:
            if isinstance(x, View) and x.merged and len(x.shape) == rank:
                x = self.unmerge(x)
            elif isinstance(x, View) and len(x.shape) == rank and x.shape[0] == 1:
                x = x.with_axes((*[-1] * count, *range(rank)))
            elif isinstance(x, View) and (x.merged or len(x.shape) == rank):
                counts.add(0)
            apart.append(x)
        if counts:
            raise self.cannot(f"{fn} has the batch merged with other axes in one argument and not in another")
        return merged(self.map(fn, *apart), count)

    def unmerge(self, view: View) -> View:
        found = unmerged(view, self.rows or 0)
        if found is None:
            raise self.cannot("axes that are merged with the batch are not in order")
        return found

    def _over_pieces(self, fn: str, views: list[Any], shape: Shape) -> View | None:
        """A map whose arguments are joins along one axis, as a join of maps. None: they are not."""
        bounds, along = {0}, set[int]()
        for x in views:
            if isinstance(x, View) and x.value.kind == "join":
                found = cuts(x)
                if found is None or x.shape[found[0]] != shape[found[0] - len(x.shape)]:
                    return None
                along.add(found[0] + len(shape) - len(x.shape))
                bounds.update(found[1])
        if len(along) != 1 or len(bounds) == 1:
            return None
        axis = along.pop()
        ends = sorted({*bounds, shape[axis]})
        pieces: list[tuple[View, list[Place]]] = []
        for first, last in pairwise(ends):
            parts: list[Any] = []
            for x in views:
                at = axis - len(shape) + len(x.shape) if isinstance(x, View) else -1
                if isinstance(x, View) and at >= 0 and x.shape[at] != 1:
                    x = self.sliced(x, (*(slice(None),) * at, slice(first, last)))
                parts.append(x)
            part = self.map(fn, *parts)
            if part.shape != (*shape[:axis], last - first, *shape[axis + 1 :]):
                return None
            pieces.append((part, [(first if i == axis else 0, 1, n) for i, n in enumerate(part.shape)]))
        batch = next((part.batch for part, _ in pieces if part.batch is not None), None)
        return self.join(shape, batch, pieces)

    # ---- over axes ---------------------------------------------------------------------------------------------

    def reduce(self, fn: str, operand: Any, axes: Sequence[int]) -> Any:
        """Sum, max or min over axes, which are left out. A sum over the batch is contracted."""
        view = self.view(operand)
        axes = sorted(a % len(view.shape) for a in axes)
        if not axes:
            return view
        if view.merged:
            if 0 not in axes:
                return merged(self.reduce(fn, self.unmerge(view), [a + view.merged for a in axes]), view.merged)
            axes = [*range(view.merged), *(a + view.merged for a in axes)]
            view = self.unmerge(view)
        batch = view.batch
        if batch in axes:
            if fn != "sum" or not self.adjoint:
                raise self.cannot(f"{fn} over the batch axis mixes the rows")
            return self.sum_of_rows(self.reduce(fn, self._row(view), [a - (a > batch) for a in axes if a != batch]))
        kept = [i for i in range(len(view.shape)) if i not in axes]
        loop = _row_axes(len(view.shape), batch)
        space = tuple(n for i, n in enumerate(view.shape) if i != batch)
        shape = tuple(view.shape[i] for i in kept)
        value = self.make(
            "reduce", tuple(view.shape[i] for i in kept if i != batch), (view.ref(loop),),
            fn=fn, space=space, axes=tuple(a - (batch is not None and a > batch) for a in axes),
        )  # fmt: skip
        return whole(value, shape, None if batch is None else kept.index(batch))

    def sum_of_rows(self, view: View) -> Value:
        """The sum over rows and steps of a view whose batch is left out."""
        value = self.realise(view)
        return self.make("rowsum", value.shape, (value,))

    # ---- the same elements -------------------------------------------------------------------------------------

    def reshape(self, view: View, shape: Shape) -> View:
        """The same elements in another shape; the batch may be merged with axes behind it."""
        if shape == view.shape:
            return view
        if view.merged:
            view = self.unmerge(view)
        if view.batch == 0 and shape[:1] == view.shape[:1]:
            return self._in_front(self._row_reshaped(self._row(view), shape[1:]))
        moved = self._with_ones(view, shape)
        if moved is not None or view.batch is None:
            return moved or self._row_reshaped(view, shape)
        value = self.realise(view)
        for count in range(1, len(value.shape) + 1):
            found = merged(whole(value, (view.shape[0], *value.shape), 0), count)
            if found.shape == shape:
                return found
        raise self.cannot(f"reshape of {view.shape} to {shape} mixes the rows")

    def _with_ones(self, view: View, shape: Shape) -> View | None:
        """If only axes of length 1 come and go: the others keep their order. None: there is more to it."""
        axes = [a for a, n in zip(view.axes, view.shape, strict=True) if n != 1]
        if [n for n in view.shape if n != 1] != [n for n in shape if n != 1]:
            return None
        queue = iter(axes)
        found = view._replace(shape=shape, axes=tuple(NEW if n == 1 else next(queue) for n in shape))
        batch = view.batch
        if batch is None or view.shape[batch] != 1:
            return found
        before = sum(n != 1 for n in view.shape[:batch])  # one row: the batch goes between the same axes
        places = [i for i, n in enumerate(shape) if n == 1 and sum(m != 1 for m in shape[:i]) == before]
        if len(places) > 1:
            raise self.cannot(f"reshape of {view.shape} to {shape}: which axis is the batch of 1")
        return found.with_batch(places[0]) if places else None

    def _row(self, view: View) -> View:
        return view._replace(shape=view.row_shape, axes=tuple(a for a in view.axes if a != BATCH))

    def _in_front(self, view: View) -> View:
        assert self.rows is not None
        return view._replace(shape=(self.rows, *view.shape), axes=(BATCH, *view.axes))

    def _row_reshaped(self, view: View, shape: Shape) -> View:
        moved = self._with_ones(view, shape)
        if moved is not None:
            return moved
        return whole(self.make("alias", shape, (self.realise(view),)), shape, None)

    # ---- parts -------------------------------------------------------------------------------------------------

    def sliced(self, view: View, index: Any) -> View:
        """A basic index: integers, slices, None and ``...``."""
        if view.merged:
            raise self.cannot("an index into an axis that was merged with the batch")
        starts, steps = list(view.starts), list(view.steps)
        shape, axes, i = list[int](), list[int](), 0
        for entry in entries_of(index, len(view.shape)):
            if entry is None:
                shape.append(1)
                axes.append(NEW)
                continue
            n, axis = view.shape[i], view.axes[i]
            i += 1
            first, stop, step = entry.indices(n) if isinstance(entry, slice) else (entry % n, entry % n + 1, 1)
            length = len(range(first, stop, step))
            if axis == BATCH and (not isinstance(entry, slice) or (first, length, step) != (0, n, 1)):
                raise self.cannot("only a part of the batch is taken")
            if axis >= 0:
                starts[axis] += steps[axis] * first if length else 0
                steps[axis] *= step if length > 1 else 1
            if isinstance(entry, slice):
                shape.append(length)
                axes.append(axis)
        return self.narrowed(View(view.value, tuple(shape), tuple(axes), tuple(starts), tuple(steps)))

    def narrowed(self, view: View) -> View:
        """A part of a map is a map of parts, and a part of a join that lies in one piece is a part of that piece."""
        value, sizes = view.value, view.sizes
        if view.merged or (sizes == dict(enumerate(value.shape)) and not any(view.starts) and set(view.steps) <= {1}):
            return view
        if value.kind == "map":
            kept = [v for v in range(len(value.shape)) if v in sizes]
            items = enumerate(zip(view.starts, view.steps, strict=True))
            outer = tuple((s, k, kept.index(v) if v in kept else None) for v, (s, k) in items)
            extent = tuple(sizes[v] for v in kept)
            refs = (a.within(outer) if isinstance(a, Ref) else a for a in value.args)
            args = tuple(self._narrowed_ref(a, extent) if isinstance(a, Ref) else a for a in refs)
            part = self.make("map", extent, args, fn=value.fn)
            axes = tuple(kept.index(a) if a >= 0 else a for a in view.axes)
            return View(part, view.shape, axes, (0,) * len(kept), (1,) * len(kept))
        piece = inside(view) if value.kind == "join" else None
        return view if piece is None else self.narrowed(piece)

    def _narrowed_ref(self, ref: Ref, extent: Shape) -> Ref:
        """The same for what a loop over `extent` reads."""
        followed = [(v, axis) for v, (_, _, axis) in enumerate(ref.index) if axis is not None]
        view = View(
            ref.value, tuple(extent[axis] for _, axis in followed), tuple(v for v, _ in followed),
            tuple(s for s, _, _ in ref.index), tuple(k for _, k, _ in ref.index),
        )  # fmt: skip
        return self.narrowed(view).ref([axis for _, axis in followed])

    # ---- side by side ------------------------------------------------------------------------------------------

    def join(self, shape: Shape, batch: int | None, pieces: Sequence[tuple[View, Sequence[Place]]]) -> View:
        """Pieces put into zeros of `shape`; a place is for each axis of the shape."""
        made: list[Piece] = []
        loop = _row_axes(len(shape), batch)
        for view, place in pieces:
            if batch is not None and view.batch is None:
                view = self.lift(view, batch)
            if view.batch != batch or view.merged:
                raise self.cannot("pieces have the batch in different axes")
            if batch is not None and place[batch] != (0, 1, self.rows):
                raise self.cannot("only a part of the batch is taken")
            rows = tuple((first, step if n > 1 else 1, n) for i, (first, step, n) in enumerate(place) if i != batch)
            if all(n for _, _, n in rows):
                made.append(Piece(view.ref(loop), rows))
        row_shape = tuple(n for i, n in enumerate(shape) if i != batch)
        return whole(self._filled(row_shape, made), shape, batch)

    def _filled(self, shape: Shape, pieces: list[Piece]) -> Value:
        """A join without holes: zeros are pieces too."""
        flat = [part for piece in pieces for part in _flat(piece)]
        if sum(math.prod(n for _, _, n in p.place) for p in flat) == math.prod(shape):
            return self.make("join", shape, pieces=tuple(flat))
        partial = {v for p in pieces for v, place in enumerate(p.place) if place != (0, 1, shape[v])}
        if len(partial) > 1 and len(pieces) == 1:  # first along the last of them, then along the others
            piece, last = pieces[0], max(partial)
            inner = tuple(n if v != last else shape[v] for v, (_, _, n) in enumerate(piece.place))
            place = tuple(item if v == last else (0, 1, inner[v]) for v, item in enumerate(piece.place))
            strip = self._filled(inner, [Piece(piece.ref, place)])
            place = tuple((0, 1, shape[v]) if v == last else item for v, item in enumerate(piece.place))
            return self._filled(shape, [Piece(Ref.whole(strip), place)])
        if len(partial) > 1:
            raise self.cannot("several pieces with holes in several axes")
        if not pieces:
            return self.make("join", shape, pieces=(self._zeros(shape, 0, 0, 1, shape[0]),))
        v = partial.pop()
        taken = sorted(p.place[v] for p in pieces)
        holes = [self._zeros(shape, v, *hole) for hole in _holes(taken, shape[v])]
        inner = {w for p in flat for w, place in enumerate(p.place) if place != (0, 1, shape[w])}
        return self.make("join", shape, pieces=(*(flat if inner == {v} else pieces), *holes))

    def _zeros(self, shape: Shape, v: int, first: int, step: int, n: int) -> Piece:
        extent = tuple(n if i == v else length for i, length in enumerate(shape))
        zeros = self.make("map", extent, (0.0,), fn="copy")
        place = tuple((first, step, n) if i == v else (0, 1, length) for i, length in enumerate(shape))
        return Piece(Ref.whole(zeros), place)


def _row_axes(rank: int, batch: int | None) -> list[int | None]:
    """The axis within a row that each axis is, None for the batch."""
    return [None if i == batch else i - (batch is not None and i > batch) for i in range(rank)]


def _holes(taken: list[Place], length: int) -> list[Place]:
    """What `taken` leaves free of an axis."""
    if len(taken) == 1 and abs(taken[0][1]) > 1:
        first, step, n = taken[0]
        first, step = (first, step) if step > 0 else (first + step * (n - 1), -step)
        between = [(first + k, step, len(range(first + k, length, step))) for k in range(1, step)]
        return [hole for hole in ((0, 1, first), *between) if hole[2] > 0]
    free = set(range(length)) - {first + step * i for first, step, n in taken for i in range(n)}
    holes: list[Place] = []
    for i in sorted(free):
        if holes and holes[-1][0] + holes[-1][2] == i:
            holes[-1] = (holes[-1][0], 1, holes[-1][2] + 1)
        else:
            holes.append((i, 1, 1))
    return holes


def _flat(piece: Piece) -> list[Piece]:
    """The pieces of a piece that is itself a whole join."""
    inner = piece.ref.value
    extent = tuple(n for _, _, n in piece.place)
    if inner.kind != "join" or not piece.ref.is_whole(extent) or any(step != 1 for _, step, _ in piece.place):
        return [piece]
    return [
        Piece(p.ref, tuple((a + b, step, n) for (a, _, _), (b, step, n) in zip(piece.place, p.place, strict=True)))
        for p in inner.pieces
    ]
