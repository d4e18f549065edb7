"""What ops that move elements about are in the program form: views, and values that join pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np

from ..ops.index import ARRAY
from .build import Builder
from .program import Value
from .views import NEW, View, entries_of, whole

__all__ = ["SHAPES", "declaring"]

SHAPES: dict[str, Callable[..., Any]] = {}


def declaring(table: dict[str, Callable[..., Any]]) -> Callable[..., Any]:
    """A decorator that enters a rule into a table, by the names of ops."""

    def rule(*names: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
        def declare(function: Callable[..., Any]) -> Callable[..., Any]:
            table.update(dict.fromkeys(names, function))
            return function

        return declare

    return rule


rule = declaring(SHAPES)


# ---- the same elements ----------------------------------------------------------------------------------------------


@rule("reshape")
def _(low: Builder, x: View, shape: Any) -> View:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    size, known = math.prod(x.shape), math.prod(n for n in shape if n != -1)
    return low.reshape(x, tuple(size // max(known, 1) if n == -1 else n for n in shape))


@rule("ravel", "flatten")
def _(low: Builder, x: View) -> View:
    return low.reshape(x, (math.prod(x.shape),))


@rule("tile")
def _(low: Builder, x: View, reps: Any) -> View:
    times = (reps,) if isinstance(reps, int) else tuple(reps)
    x = x.with_axes((*[-1] * (len(times) - len(x.shape)), *range(len(x.shape))))
    for axis, n in enumerate((1,) * (len(x.shape) - len(times)) + times):
        if n != 1:
            x = SHAPES["concatenate"](low, *[x] * n, axis=axis)
    return x


@rule("repeat")
def _(low: Builder, x: View, repeats: int, axis: int) -> View:
    axis %= len(x.shape)
    if axis == x.batch:
        raise low.cannot("repeat of the batch's rows")
    wide = x.with_axes((*range(axis + 1), -1, *range(axis + 1, len(x.shape))))
    shape = (*x.shape[: axis + 1], repeats, *x.shape[axis + 1 :])
    long = tuple(n * repeats if i == axis else n for i, n in enumerate(x.shape))
    return low.reshape(wide._replace(shape=shape), long)


@rule("roll")
def _(low: Builder, x: View, shift: Any, axis: Any) -> View:
    if axis is None:
        raise low.cannot("roll of the flattened tensor")
    for by, at in cast("Iterable[tuple[int, int]]", np.broadcast(shift, axis)):
        n, lead = x.shape[at], (slice(None),) * (at % len(x.shape))
        by %= max(n, 1)
        if by:
            parts = [low.sliced(x, (*lead, part)) for part in (slice(n - by, n), slice(0, n - by))]
            x = SHAPES["concatenate"](low, *parts, axis=at)
    return x


@rule("expand_dims")
def _(low: Builder, x: View, axis: Any) -> View:
    axes = (axis,) if isinstance(axis, int) else tuple(axis)
    rank = len(x.shape) + len(axes)
    return x.with_new({a % rank for a in axes})


@rule("squeeze")
def _(low: Builder, x: View, axis: Any) -> View:
    rank = len(x.shape)
    if axis is None:
        gone = {i for i in range(rank) if x.shape[i] == 1 and i != x.batch}
    else:
        gone = {a % rank for a in ((axis,) if isinstance(axis, int) else axis)}
    return x.with_axes([i for i in range(rank) if i not in gone])


@rule("transpose")
def _(low: Builder, x: View, axes: Sequence[int] | None) -> View:
    rank = len(x.shape)
    return x.with_axes([a % rank for a in axes] if axes is not None else range(rank)[::-1])


@rule("swapaxes")
def _(low: Builder, x: View, axis1: int, axis2: int) -> View:
    order = list(range(len(x.shape)))
    order[axis1], order[axis2] = order[axis2], order[axis1]
    return x.with_axes(order)


@rule("moveaxis")
def _(low: Builder, x: View, source: Any, destination: Any) -> View:
    numbered = np.empty(range(len(x.shape)))  # each axis is as long as its number says
    return x.with_axes(np.moveaxis(numbered, source, destination).shape)


@rule("broadcast_to", "spread")
def _(low: Builder, x: View, shape: Any) -> View:
    shape = (shape,) if isinstance(shape, int) else tuple(shape)
    lead = len(shape) - len(x.shape)
    axes = tuple(
        NEW if i < lead or (x.shape[i - lead] == 1 and n != 1) else x.axes[i - lead] for i, n in enumerate(shape)
    )
    return x._replace(shape=shape, axes=axes)


@rule("flip")
def _(low: Builder, x: View, axis: Any) -> View:
    rank = len(x.shape)
    axes = range(rank) if axis is None else [a % rank for a in ((axis,) if isinstance(axis, int) else axis)]
    return low.sliced(x, tuple(slice(None, None, -1) if i in axes else slice(None) for i in range(rank)))


@rule("getitem")
def _(low: Builder, x: View, index: Any) -> View:
    return low.sliced(x, index)


@rule("split")
def _(low: Builder, x: View, offsets: Sequence[int], axis: int) -> tuple[View, ...]:
    lead = (slice(None),) * (axis % len(x.shape))
    return tuple(low.sliced(x, (*lead, slice(a, b))) for a, b in pairwise((0, *offsets, x.shape[axis])))


@rule("unstack")
def _(low: Builder, x: View, axis: int) -> tuple[View, ...]:
    lead = (slice(None),) * (axis % len(x.shape))
    return tuple(low.sliced(x, (*lead, i)) for i in range(x.shape[axis]))


# ---- side by side ---------------------------------------------------------------------------------------------------


def _batch_of(low: Builder, views: Sequence[View]) -> int | None:
    found = {v.batch for v in views if v.batch is not None}
    if len(found) > 1:
        raise low.cannot("pieces have the batch in different axes")
    return next(iter(found), None)


@rule("concatenate")
def _(low: Builder, *arrays: Any, axis: int) -> View:
    views = [low.view(x) for x in arrays]
    axis %= len(views[0].shape)
    ends = list(accumulate(v.shape[axis] for v in views))
    shape = tuple(ends[-1] if i == axis else n for i, n in enumerate(views[0].shape))
    pieces = [
        (v, [(end - v.shape[axis] if i == axis else 0, 1, n) for i, n in enumerate(v.shape)])
        for v, end in zip(views, ends, strict=True)
    ]
    return low.join(shape, _batch_of(low, views), pieces)


@rule("stack")
def _(low: Builder, *arrays: Any, axis: int) -> View:
    views = [low.view(x) for x in arrays]
    axis %= len(views[0].shape) + 1
    wide = [v.with_axes([*range(axis), -1, *range(axis, len(v.shape))]) for v in views]
    shape = tuple(len(wide) if i == axis else n for i, n in enumerate(wide[0].shape))
    pieces = [(v, [(k if i == axis else 0, 1, n) for i, n in enumerate(v.shape)]) for k, v in enumerate(wide)]
    return low.join(shape, _batch_of(low, wide), pieces)


@rule("scatter_into")
def _(low: Builder, g: View, index: Any, shape: tuple[int, ...]) -> View:
    target = low.sliced(_probe(shape), index)
    wide = g.with_axes([target.axes.index(v) if v in target.axes else -1 for v in range(len(shape))])
    place = [
        (start, step, target.shape[target.axes.index(v)] if v in target.axes else 1)
        for v, (start, step) in enumerate(zip(target.starts, target.steps, strict=True))
    ]
    return low.join(shape, wide.batch, [(wide, place)])


def _probe(shape: tuple[int, ...]) -> View:
    """A view of nothing: what an index does to it, it does to an array of that shape."""
    return whole(Value("probe", shape), shape, None)


def _positions(low: Builder, x: View, index: Any, template: Any) -> tuple[int, list[int]]:
    """The axis that an index of one constant array goes along, and its positions."""
    known = getattr(index, "kind", "") == "invariant" and index.recipe.op is None
    array = np.asarray(index.array) if known else None
    if array is None or array.ndim != 1 or template.count(ARRAY) != 1:
        raise low.cannot("only indexing with one constant vector along one axis is compiled")
    parts = entries_of(template, len(x.shape))
    if any(part not in (ARRAY, slice(None)) for part in parts):
        raise low.cannot("indexing with a vector and slices at once is not compiled")
    axis = parts.index(ARRAY)
    if array.dtype == np.bool_:
        array = np.flatnonzero(array)
    n = x.shape[axis]
    return axis, [int(i) % n for i in array]


@rule("gather")
def _(low: Builder, x: View, index: Any, template: Any) -> View:
    x = low.view(x)
    axis, positions = _positions(low, x, index, template)
    lead = (slice(None),) * axis
    parts = [low.sliced(x, (*lead, _range(*run))) for run in _runs(positions)]
    return SHAPES["concatenate"](low, *parts, axis=axis)


def _runs(positions: Sequence[int]) -> list[tuple[int, int, int]]:
    """Positions as few ranges: (first, step, length)."""
    runs: list[tuple[int, int, int]] = []
    for p in positions:
        first, step, n = runs[-1] if runs else (0, 0, 0)
        if n == 1 and p != first:
            runs[-1] = (first, p - first, 2)
        elif n > 1 and p == first + n * step:
            runs[-1] = (first, step, n + 1)
        else:
            runs.append((p, 1, 1))
    return runs


def _range(first: int, step: int, n: int) -> slice:
    stop = first + step * n
    return slice(first, stop if stop >= 0 else None, step)


@rule("scatter")
def _(low: Builder, g: View, index: Any, template: Any, shape: tuple[int, ...]) -> View:
    axis, positions = _positions(low, _probe(shape), index, template)
    lead = (slice(None),) * axis
    pieces: list[tuple[View, list[tuple[int, int, int]]]] = []
    for p in sorted(set(positions)):
        parts = [low.sliced(g, (*lead, slice(i, i + 1))) for i, q in enumerate(positions) if p == q]
        total = parts[0]
        for part in parts[1:]:
            total = low.map("add", total, part)
        pieces.append((total, [(p if i == axis else 0, 1, 1 if i == axis else n) for i, n in enumerate(shape)]))
    return low.join(shape, g.batch, pieces)


@rule("pad")
def _(low: Builder, x: View, widths: Any, fill: Any) -> View:
    if fill != 0:
        raise low.cannot("pad with other values than 0")
    shape = tuple(a + n + b for (a, b), n in zip(widths, x.shape, strict=True))
    return low.join(shape, x.batch, [(x, [(a, 1, n) for (a, _), n in zip(widths, x.shape, strict=True)])])
