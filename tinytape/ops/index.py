"""Indexing and embeddings, and their adjoints: gradients go back to where the values were taken from.

A position that was taken twice gets the sum of both gradients. Sums over equal positions are made by sorting
(`sum_rows`), never one element at a time.

An index is taken apart into its basic parts and its integer or boolean array. The array is an argument of the op,
so that the tape knows it; the basic parts are an option, with `ARRAY` standing where the array goes.
"""

from __future__ import annotations

import math
import operator
from typing import Any, cast

import numpy as np

from ..engine.errors import DTypeError, InputError, ShapeError, TinytapeError
from ..engine.op import Operand, op
from ..engine.operators import method
from ..engine.tensor import FUNCTIONS, Tensor
from ..engine.tree import Array, is_array

__all__ = [
    "embedding",
    "index_put",
    "scatter_add",
    "take",
    "take_along_axis",
]

ARRAY = "array"

Template = tuple[Any, ...]


# ---- basic indices: integers, slices, None, ... ---------------------------------------------------------------------


@op(kind="linear")
def getitem(x: Operand, /, index: Any) -> Any:
    """``x[index]`` for a basic index: a view."""
    try:
        return x[index]
    except IndexError as error:
        raise refused("x[index]", x, error) from error


@getitem.vjp
def _(g: Operand, x_shape: tuple[int, ...], index: Any) -> Any:
    return scatter_into(g, index, x_shape)


@op(kind="linear")
def scatter_into(g: Operand, /, index: Any, shape: tuple[int, ...]) -> Any:
    """Zeros of `shape` with `g` at a basic index."""
    values = np.asarray(g)
    out = np.zeros(shape, values.dtype)
    out[index] = values
    return out


@scatter_into.vjp
def _(g: Operand, index: Any) -> Any:
    return getitem(g, index)


# ---- integer and boolean arrays -------------------------------------------------------------------------------------


@op(kind="multilinear")
def gather(x: Operand, index: Operand, /, template: Template) -> Any:
    """``x[...]`` with an array in the index: a copy."""
    try:
        # On rows, np.take is several times quicker than x[index]; but it copies an x that is not contiguous.
        axis, index = len(template) - 1, _plain(index)
        if template == (slice(None),) * axis + (ARRAY,) and x.flags.c_contiguous and index.dtype != np.bool_:
            return np.take(x, index, axis)
        return x[_filled(template, index)]
    except IndexError as error:
        raise refused("x[index]", x, error) from error


@gather.vjp
def _(g: Operand, index: Operand, x_shape: tuple[int, ...], template: Template) -> Any:
    return scatter(g, index, template, x_shape), None


@op(kind="multilinear")
def scatter(g: Operand, index: Operand, /, template: Template, shape: tuple[int, ...]) -> Any:
    """Zeros of `shape` with the elements of `g` added where `gather` takes them from."""
    values, index = np.asarray(g), _plain(index)
    if _at_most_once(index, template):
        out = np.zeros(shape, values.dtype)
        out[_filled(template, index)] = values
        return out
    count = template.count(ARRAY)
    lead = len(template) - count
    if template != (slice(None),) * lead + (ARRAY,) * count:
        places = _places(index, template, shape)
        return _sum_at(places, np.broadcast_to(values, places.shape), shape)
    # The arrays index whole rows of x, counted along its axes from `lead` on: sum whole rows.
    sides, rest = shape[lead : lead + count], shape[lead + count :]
    rows = math.prod(sides)
    ids: Array = np.zeros((), np.intp)
    for i, n in zip(index if count > 1 else (index,), sides, strict=True):
        ids = ids * n + _from_start(i, n)
    values = np.broadcast_to(values, shape[:lead] + ids.shape + rest)
    before, after = math.prod(shape[:lead]), math.prod(rest)
    values = np.moveaxis(values.reshape(before, ids.size, after), 1, 0).reshape(ids.size, before * after)
    sums = sum_rows(ids.ravel(), values, rows)
    if not lead and sums.shape == shape:
        return sums  # as it is, and no view of it: a leaf can take over what nobody else holds
    return np.ascontiguousarray(np.moveaxis(sums.reshape(rows, before, after), 0, 1)).reshape(shape)


@scatter.vjp
def _(g: Operand, index: Operand, template: Template) -> Any:
    return gather(g, index, template), None


def sum_rows(ids: Array, values: Array, n: int) -> Array:
    """An (n, d) array whose row i is the sum of the rows of `values` whose id is i.

    Rows of equal id are added in pairs, then the sums in pairs, and so on: as many rounds as the most frequent id
    has binary digits, each a few array operations; and rounding grows as in pairwise summation. One element a row
    is summed in float64.
    """
    width = values.shape[1]
    if width == 1 and values.dtype.kind == "f":
        return np.bincount(ids, values[:, 0], n).astype(values.dtype).reshape(n, 1)
    out = np.zeros((n, width), values.dtype)
    if not len(ids):
        return out
    if n <= 2**16:
        ids = ids.astype(np.uint16)  # NumPy sorts 16 bits by radix, in linear time
    order = np.argsort(ids, kind="stable")
    ids = ids[order]
    first = np.concatenate(([True], ids[1:] != ids[:-1]))
    starts = np.flatnonzero(first)
    heads = order[starts]
    if len(starts) < len(order):
        values = values.copy()
        rank = np.arange(len(order)) - starts[np.cumsum(first) - 1]  # of a row among those of its id
        while len(order) > len(starts):
            odd = np.flatnonzero(rank & 1)
            values[order[odd - 1]] += values[order[odd]]
            even = np.flatnonzero(~rank & 1)
            order, rank = order[even], rank[even] >> 1
    out[ids[starts]] = values[heads]
    return out


def _sum_at(places: Array, values: Array, shape: tuple[int, ...]) -> Array:
    """Zeros of `shape` with `values` added at flat positions."""
    return sum_rows(places.ravel(), values.reshape(values.size, 1), math.prod(shape)).reshape(shape)


def _places(index: Array, template: Template, shape: tuple[int, ...]) -> Array:
    """For each element that an index takes, its position in the flattened array."""
    return np.arange(math.prod(shape)).reshape(shape)[_filled(template, index)]


def _filled(template: Template, index: Any) -> Template:
    """The index that NumPy takes. Several arrays come stacked in one."""
    arrays = iter(index) if template.count(ARRAY) > 1 else iter((index,))
    return tuple(next(arrays) if part == ARRAY else part for part in template)


def _at_most_once(index: Array, template: Template) -> bool:
    """Whether it can be seen at a glance that no position is indexed twice."""
    count = template.count(ARRAY)
    return count == 0 or index.dtype == np.bool_ or index.size <= count


def _plain(index: Any) -> Array:
    """An index array in which a size can be added to a position: of signed integers, or bools."""
    index = np.asarray(index)
    return index if index.dtype == np.bool_ else index.astype(np.intp, copy=False)


def _from_start(index: Array, n: int) -> Array:
    """Positions that count from the end, as such that count from the start."""
    return np.where(index < 0, index + n, index)


def refused(what: str, x: Any, error: IndexError) -> TinytapeError:
    """NumPy's IndexError as one of ours."""
    text = f"{what}: {error}; x has shape {x.shape}."
    if "out of bounds" in str(error):
        return InputError(text, "the positions along an axis of size n are 0 to n - 1, or -n to -1 from its end.")
    return ShapeError(text, "at most one index for each axis; a mask has the shape of the axes that it indexes.")


# ---- taking an index apart ------------------------------------------------------------------------------------------


def parse(index: Any, shape: tuple[int, ...]) -> tuple[Template, Any]:
    """The template of an index into an array of `shape`, and its array: None if it is basic.

    Several arrays are broadcast against each other and stacked; masks among them become positions first, as NumPy
    does it.

    Raises
    ------
    DTypeError
        If a part is of a kind that cannot index.
    ShapeError
        If arrays do not broadcast, or a mask does not fit.
    """
    template: list[Any] = []
    arrays: list[Any] = []
    for part in cast("tuple[Any, ...]", index) if isinstance(index, tuple) else (index,):
        if isinstance(part, slice):
            part = cast(Any, part)
            template.append(slice(_bound(part.start), _bound(part.stop), _bound(part.step)))
        elif part is None or part is Ellipsis:
            template.append(part)
        else:
            part = _position(part)
            template.append(part if part.__class__ is int else ARRAY)
            if part.__class__ is not int:
                arrays.append(part)
    if not arrays:
        return tuple(template), None
    if len(arrays) == 1:
        return tuple(template), arrays[0]
    return _stacked(template, [np.asarray(a) for a in arrays], shape)


def _bound(bound: Any) -> int | None:
    return None if bound is None else integer(bound, "x[a:b:c]: a bound")


def _position(part: Any, what: str = "x[index]", masks: bool = True) -> Any:
    """One entry of an index: an int, a Tensor, or an integer or boolean array."""
    if part.__class__ is int:
        return part
    kinds = "integers or bools" if masks else "integers"
    try:
        found = part if isinstance(part, Tensor) else np.asarray(part)
    except ValueError as error:
        raise ShapeError(
            f"{what}: no array can be made of {part!r}.", f"use {kinds} in lists of equal length."
        ) from error
    if isinstance(part, list | tuple) and not found.size:
        found = found.astype(np.intp)
    if found.dtype.kind not in ("iub" if masks else "iu"):
        raise DTypeError(f"{what}: an index of dtype {found.dtype}.", f"index with {kinds}: i.astype('int64').")
    if found.ndim == 0 and found.dtype.kind in "iu" and not isinstance(found, Tensor):
        return int(found)
    return found


def _stacked(template: list[Any], arrays: list[Array], shape: tuple[int, ...]) -> tuple[Template, Any]:
    """Several index arrays as one, stacked; masks among them as positions."""
    taken = sum(part is not None and part is not Ellipsis and part != ARRAY for part in template)
    taken += sum(a.ndim if a.dtype == np.bool_ else 1 for a in arrays)
    pending = iter(arrays)
    parts: list[Any] = []
    positions: list[Array] = []
    axis = 0
    for part in template:
        if part == ARRAY:
            array = next(pending)
            if array.dtype != np.bool_:
                found: tuple[Array, ...] = (array,)
            elif array.ndim == 0 or array.shape != shape[axis : axis + array.ndim]:
                raise ShapeError(
                    f"x[index]: a mask of shape {array.shape} at axis {axis}, where x has {shape[axis:]}.",
                    "a mask has the shape of the axes that it indexes.",
                )
            else:
                found = np.nonzero(array)
            positions.extend(found)
            parts.extend([ARRAY] * len(found))
            axis += len(found)
        else:
            parts.append(part)
            axis += max(len(shape) - taken, 0) if part is Ellipsis else part is not None
    try:
        return tuple(parts), np.stack(np.broadcast_arrays(*positions))
    except ValueError as error:
        shapes = ", ".join(str(p.shape) for p in positions)
        raise ShapeError(
            f"x[index]: index arrays of shapes {shapes} do not broadcast.",
            "for a grid of rows and columns use x[rows[:, None], columns].",
        ) from error


def index_by(x: Any, index: Any) -> Any:
    """``x[index]`` for a Tensor: integers, slices, None, ``...``, integer and boolean arrays, and any mixture.

    A basic index (no arrays) gives a view, an index with arrays a copy; both have NumPy's shapes.

    Raises
    ------
    InputError
        If a position is out of range.
    ShapeError
        If there are too many indices, or arrays or masks that do not fit.
    DTypeError
        If an index is neither an integer nor a bool.
    """
    if index.__class__ is int:
        return getitem(x, index)
    template, array = parse(index, x.shape)
    return getitem(x, template) if array is None else gather(x, array, template)


# ---- taking rows and elements ---------------------------------------------------------------------------------------


def take(x: Operand, indices: Any, axis: int | None = None) -> Any:
    """Elements, rows, ... of `x` at positions along `axis`.

    Parameters
    ----------
    x : Tensor
    indices : integer array_like
        Of any shape, which takes the axis' place in the result. Negative ones count from the end.
    axis : int, optional
        Default: the flattened `x`.

    Raises
    ------
    InputError
        If an index is out of range.
    DTypeError
        If the indices are not integers.
    """
    x = x if isinstance(x, Tensor) else np.asarray(x)
    if axis is None:
        x, axis = np.ravel(x), 0
    lead = axis_of(axis, x.ndim, "take")
    return gather(x, _position(indices, "take", masks=False), (slice(None),) * lead + (ARRAY,))


def axis_of(axis: Any, ndim: int, what: str) -> int:
    axis = integer(axis, f"{what}: axis")
    if not -ndim <= axis < ndim:
        raise ShapeError(f"{what}: axis is {axis}, x has {ndim} axes.", f"an axis goes from {-ndim} to {ndim - 1}.")
    return axis % ndim


def integer(value: Any, what: str) -> int:
    try:
        return operator.index(value)
    except TypeError as error:
        raise DTypeError(f"{what} is {value!r}, a {type(value).__name__}.", "use an integer.") from error


def take_along_axis(x: Operand, indices: Operand, axis: int | None = -1) -> Any:
    """For each position outside of `axis`, the elements at its own `indices` along `axis`.

    Parameters
    ----------
    x : Tensor
    indices : integer array_like
        With as many axes as `x`; those other than `axis` broadcast against x's.
    axis : int or None
        Default -1. None: the flattened `x`, with 1-D indices.

    Raises
    ------
    InputError
        If an index is out of range.
    ShapeError
        If the shapes do not fit.
    DTypeError
        If the indices are not integers.
    """
    if axis is not None:
        axis = axis_of(axis, np.ndim(x), "take_along_axis")
    return _take_along_axis(x, indices, axis)


@op(kind="multilinear")
def _take_along_axis(x: Operand, indices: Operand, /, axis: int | None) -> Any:
    x, indices = np.asarray(x), np.asarray(indices)
    if indices.dtype.kind not in "iu":
        raise DTypeError(f"take_along_axis: indices have dtype {indices.dtype}.", "use integers.")
    if indices.ndim != (1 if axis is None else x.ndim):
        raise ShapeError(
            f"take_along_axis: indices have shape {indices.shape}, x has shape {x.shape}.",
            "give indices as many axes as x (1 for axis=None).",
        )
    try:
        return np.take_along_axis(x, indices, axis)
    except IndexError as error:
        raise refused("take_along_axis", x, error) from error


@_take_along_axis.vjp
def _(g: Operand, indices: Operand, x_shape: tuple[int, ...], axis: int | None) -> Any:
    return add_along_axis(g, indices, axis, x_shape), None


@op(kind="multilinear")
def add_along_axis(g: Operand, indices: Operand, /, axis: int | None, shape: tuple[int, ...]) -> Any:
    """Zeros of `shape` with the elements of `g` added where `take_along_axis` takes them from."""
    sides = shape if axis is not None else (math.prod(shape),)
    along = (axis or 0) % len(sides)
    indices = _plain(indices)
    places: Array = np.zeros((), np.intp)
    for i, n in enumerate(sides):
        if i == along:
            places = places * n + _from_start(indices, n)
        else:
            places = places * n + np.arange(n).reshape([n if j == i else 1 for j in range(len(sides))])
    return _sum_at(places, np.broadcast_to(np.asarray(g), places.shape), shape)


@add_along_axis.vjp
def _(g: Operand, indices: Operand, axis: int | None) -> Any:
    return _take_along_axis(g, indices, axis), None


@op(kind="multilinear")
def embedding(weight: Operand, tokens: Operand) -> Any:
    """The rows of a matrix that belong to tokens.

    Parameters
    ----------
    weight : Tensor, shape (rows, width)
    tokens : integer array_like, any shape
        0 to rows - 1; unlike in indexing, negative ones are refused.

    Returns
    -------
    Tensor, shape (*tokens.shape, width)

    Raises
    ------
    InputError
        If a token is out of range; the message names it and its position.
    DTypeError
        If the tokens are not integers.
    ShapeError
        If `weight` is not a matrix.
    """
    weight, tokens = np.asarray(weight), np.asarray(tokens)
    if tokens.dtype.kind not in "iu":
        raise DTypeError(
            f"embedding: tokens have dtype {tokens.dtype}.", "tokens are integers: tokens.astype('int64')."
        )
    if weight.ndim != 2:
        raise ShapeError(f"embedding: weight has shape {weight.shape}.", "pass one row for each token: (rows, width).")
    rows = len(weight)
    if tokens.size and (tokens.min() < 0 or tokens.max() >= rows):
        where = np.unravel_index(np.argmax((tokens < 0) | (tokens >= rows)), tokens.shape)
        position = tuple(int(i) for i in where)
        raise InputError(
            f"embedding: token {tokens[position]}{f' at position {position}' if position else ''} is out of range "
            f"for {rows} rows.",
            f"tokens go from 0 to {rows - 1}." if rows else "the matrix is empty.",
        )
    tokens = tokens.astype(np.intp, copy=False)
    return np.take(weight, tokens, 0) if weight.flags.c_contiguous else weight[tokens]


@embedding.vjp
def _(g: Operand, tokens: Operand, weight_shape: tuple[int, ...]) -> Any:
    return scatter(g, tokens, (ARRAY,), weight_shape), None


# ---- writing, as a new tensor ---------------------------------------------------------------------------------------


def scatter_add(x: Operand, index: Any, values: Operand) -> Any:
    """A new tensor: `x` with `values` added at ``x[index]``; where a position is repeated, all of its values.

    Parameters
    ----------
    x : Tensor
    index : any index that ``x[index]`` takes
    values : Tensor or number
        Of a shape that broadcasts to that of ``x[index]``.

    Raises
    ------
    InputError, ShapeError, DTypeError
        As for ``x[index]``, and if the values do not broadcast.
    """
    x = x if isinstance(x, Tensor) else np.asarray(x)
    template, array = parse(index, x.shape)
    if not isinstance(values, Tensor) and not (is_array(values) and values.ndim):  # a number: it takes x's dtype
        dtype = x.dtype if x.dtype.kind == "f" else None
        values = Tensor(values, dtype=dtype) if isinstance(x, Tensor) else np.asarray(values, dtype)
    _check_values("scatter_add", x.shape, template, array, values)
    if array is None:
        return np.add(x, scatter_into(values, template, x.shape))
    return np.add(x, scatter(values, array, template, x.shape))


def index_put(x: Operand, index: Any, values: Operand) -> Any:
    """A new tensor: `x` with ``x[index] = values``; where a position is repeated, the last value stays.

    The gradient of `x` is zero where it was overwritten, and so is that of values which did not stay.

    Parameters
    ----------
    x : Tensor
    index : any index that ``x[index]`` takes
    values : Tensor or number
        Of a shape that broadcasts to that of ``x[index]``. They are cast to x's dtype.

    Raises
    ------
    InputError, ShapeError, DTypeError
        As for ``x[index]``, and if the values do not broadcast, or are floats for an integer `x`.
    """
    x = x if isinstance(x, Tensor) else np.asarray(x)
    template, array = parse(index, x.shape)
    _check_values("index_put", x.shape, template, array, values)
    return put(x, values, 0 if array is None else array, template)


def _check_values(what: str, shape: tuple[int, ...], template: Template, array: Any, values: Any) -> None:
    """Refuse positions that are not there, and values that do not broadcast to what is indexed."""
    model = np.broadcast_to(np.False_, shape)  # takes no memory
    try:
        wanted = model[_filled(template, None if array is None else np.asarray(array))].shape
    except IndexError as error:
        raise refused(what, model, error) from error
    found = np.shape(values)
    try:
        fits = np.broadcast_shapes(found, wanted) == wanted
    except ValueError:
        fits = False
    if not fits:
        raise ShapeError(
            f"{what}: values have shape {found}, x[index] has {wanted}.", "pass values that broadcast to it."
        )


@op(name="index_put")
def put(x: Operand, values: Operand, index: Operand, /, template: Template) -> Any:
    """`index_put` with the index taken apart; `index` is not used if the template is basic."""
    out, values, index = np.array(x, order="C"), np.asarray(values), _plain(index)
    if not np.can_cast(values.dtype, out.dtype, "same_kind"):
        raise DTypeError(f"index_put: values of dtype {values.dtype} into x of dtype {out.dtype}.", "use x.astype.")
    if _at_most_once(index, template):
        out[_filled(template, index)] = values
    else:
        places = _places(index, template, out.shape)
        # In one flat row of positions the last write is the one that stays.
        out.reshape(out.size)[places.ravel()] = np.broadcast_to(values, places.shape).ravel()
    return out


@put.vjp
def _(g: Operand, index: Operand, x_shape: tuple[int, ...], template: Template) -> Any:
    if ARRAY not in template:
        return put(g, 0, index, template), getitem(g, template), None
    stays = stays_written(index, template, x_shape)
    return put(g, 0, index, template), np.where(stays, gather(g, index, template), 0), None


@put.jvp
def _(x: Operand, values: Operand, _: Operand, index: Operand, template: Template) -> Any:
    return put(x, values, index, template)


@op(kind="constant")
def stays_written(index: Operand, /, template: Template, shape: tuple[int, ...]) -> Any:
    """For each element that an index takes, whether no later one is at the same position."""
    index = _plain(index)
    if _at_most_once(index, template):
        return np.asarray(True)
    places = _places(index, template, shape)
    numbers = np.arange(int(places.size))
    last: Array = np.zeros(math.prod(shape), np.intp)
    last[places.ravel()] = numbers
    return cast(Array, last[places]) == cast(Array, numbers.reshape(places.shape))


# ---- binding --------------------------------------------------------------------------------------------------------


def _numpy_take(a: Any, indices: Any, axis: int | None = None, out: None = None, mode: str = "raise") -> Any:
    if out is not None or mode != "raise":
        raise DTypeError("np.take with out or mode has no derivative rule for a Tensor.", "leave them out.")
    return take(a, indices, axis)


FUNCTIONS[np.take] = _numpy_take
FUNCTIONS[np.take_along_axis] = take_along_axis

Tensor.__getitem__ = method(index_by)
Tensor.take = method(take)
