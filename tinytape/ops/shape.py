"""Ops that move elements about: all of them linear."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from ..engine.call import call
from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.op import Operand, op
from ..engine.operators import method
from ..engine.tensor import FUNCTIONS, Tensor
from ..engine.tree import Array
from .index import axis_of, getitem, integer, take

__all__ = [
    "broadcast_to",
    "concatenate",
    "diagonal",
    "expand_dims",
    "flatten",
    "flip",
    "moveaxis",
    "pad",
    "ravel",
    "repeat",
    "reshape",
    "roll",
    "split",
    "squeeze",
    "stack",
    "swapaxes",
    "tile",
    "transpose",
    "tril",
    "triu",
    "unstack",
]

Shape = tuple[int, ...]
Axes = int | tuple[int, ...]

# ---- the same elements in another shape -----------------------------------------------------------------------------


@op(kind="linear")
def reshape(x: Operand, /, shape: Axes) -> Any:
    """The same elements, in C order, in another shape; one entry may be -1 and is worked out."""
    return np.reshape(x, shape)


@reshape.vjp
def _(g: Operand, x_shape: Shape) -> Any:
    return np.reshape(g, x_shape)


@op(kind="linear")
def ravel(x: Operand, /) -> Any:
    """The elements in one axis, in C order: a view where possible."""
    return np.ravel(x)


@ravel.vjp
def _(g: Operand, x_shape: Shape) -> Any:
    return np.reshape(g, x_shape)


@op(kind="linear")
def flatten(x: Operand, /) -> Any:
    """The elements in one axis, in C order: a copy."""
    return np.array(x).flatten()


@flatten.vjp
def _(g: Operand, x_shape: Shape) -> Any:
    return np.reshape(g, x_shape)


@op(kind="linear")
def expand_dims(x: Operand, /, axis: Axes) -> Any:
    """`x` with new axes of length 1, at the positions that `axis` names in the result."""
    return np.expand_dims(x, axis)


@expand_dims.vjp
def _(g: Operand, x_shape: Shape) -> Any:
    return np.reshape(g, x_shape)


@op(kind="linear")
def squeeze(x: Operand, /, axis: Axes | None = None) -> Any:
    """`x` without the axes of length 1, or without those named. Naming a longer one is a `ShapeError`."""
    return np.squeeze(x, axis)


@squeeze.vjp
def _(g: Operand, x_shape: Shape) -> Any:
    return np.reshape(g, x_shape)


@op(kind="linear")
def broadcast_to(x: Operand, /, shape: Axes) -> Any:
    """`x` repeated along new axes in front and along axes of length 1, without copying."""
    return np.broadcast_to(x, shape)


@broadcast_to.vjp
def _(g: Operand) -> Any:
    return g  # the walk sums over what was broadcast


# ---- axes in another order ------------------------------------------------------------------------------------------


@op(kind="linear")
def transpose(x: Operand, /, axes: Sequence[int] | None = None) -> Any:
    """`x` with its axes in the order `axes`; by default in reverse."""
    return np.transpose(x, axes)


@transpose.vjp
def _(g: Operand, axes: Sequence[int] | None) -> Any:
    if axes is None:
        return np.transpose(g)
    order = [a % len(axes) for a in axes]
    return np.transpose(g, tuple(order.index(i) for i in range(len(order))))


@op(kind="linear")
def swapaxes(x: Operand, /, axis1: int, axis2: int) -> Any:
    """`x` with two axes exchanged."""
    return np.swapaxes(x, axis1, axis2)


@swapaxes.vjp
def _(g: Operand, axis1: int, axis2: int) -> Any:
    return np.swapaxes(g, axis1, axis2)


@op(kind="linear")
def moveaxis(x: Operand, /, source: Axes, destination: Axes) -> Any:
    """`x` with axes moved from `source` to `destination`; the others keep their order."""
    return np.moveaxis(x, source, destination)


@moveaxis.vjp
def _(g: Operand, source: Axes, destination: Axes) -> Any:
    return np.moveaxis(g, destination, source)


@op(kind="linear")
def flip(x: Operand, /, axis: Axes | None = None) -> Any:
    """`x` with the order of elements reversed along `axis`; by default along every axis."""
    return np.flip(x, axis)


@flip.vjp
def _(g: Operand, axis: Axes | None) -> Any:
    return np.flip(g, axis)


@op(kind="linear")
def roll(x: Operand, /, shift: Axes, axis: Axes | None = None) -> Any:
    """`x` moved on by `shift` along `axis`, what falls off the end coming in at the front. None: flattened."""
    return np.roll(x, shift, axis)


@roll.vjp
def _(g: Operand, shift: Axes, axis: Axes | None) -> Any:
    back = tuple(-s for s in shift) if isinstance(shift, Sequence) else -shift
    return np.roll(g, back, axis)


# ---- joining and parting --------------------------------------------------------------------------------------------


def concatenate(arrays: Sequence[Operand], axis: int | None = 0) -> Any:
    """Tensors joined along an axis.

    Parameters
    ----------
    arrays : sequence of Tensor
        Of equal shapes but for `axis`.
    axis : int or None
        Default 0. None: flattened first.

    Raises
    ------
    ShapeError
        If there are none, or their shapes differ elsewhere.
    """
    parts = _sequence(arrays, "concatenate")
    if axis is None:
        parts, axis = tuple(np.ravel(x) for x in parts), 0
    return _concatenate(*parts, axis=axis)


def _sequence(arrays: Any, what: str) -> tuple[Any, ...]:
    try:
        parts = tuple(arrays)
    except TypeError as error:
        raise DTypeError(f"{what}: arrays is a {type(arrays).__name__}.", f"{what}([a, b, ...]).") from error
    if not parts:
        raise ShapeError(f"{what}: 0 tensors were passed, at least 1 is needed.", f"{what}([a, b, ...]).")
    return parts


@op(kind="linear")
def _concatenate(*arrays: Operand, axis: int) -> Any:
    return np.concatenate(_of_one_dtype(arrays), axis)


@_concatenate.vjp
def _(g: Operand, arrays_shape: tuple[Shape, ...], axis: int) -> Any:
    return _pieces(g, tuple(accumulate(shape[axis] for shape in arrays_shape[:-1])), axis)


def stack(arrays: Sequence[Operand], axis: int = 0) -> Any:
    """Tensors of one shape, side by side along a new axis.

    Raises
    ------
    ShapeError
        If there are none, or their shapes differ.
    """
    return _stack(*_sequence(arrays, "stack"), axis=axis)


@op(kind="linear")
def _stack(*arrays: Operand, axis: int) -> Any:
    return np.stack(_of_one_dtype(arrays), axis)


@_stack.vjp
def _(g: Operand, axis: int) -> Any:
    return unstack(g, axis)


def _of_one_dtype(arrays: tuple[Any, ...]) -> list[Array]:
    """Arrays as they are; plain numbers among them take the others' dtype."""
    if all(isinstance(x, np.ndarray) for x in arrays):
        return list(arrays)
    dtype = np.result_type(*arrays)
    return [x if isinstance(x, np.ndarray) else np.asarray(x, dtype) for x in arrays]


def unstack(x: Operand, axis: int = 0) -> tuple[Any, ...]:
    """The slices of `x` along an axis, as a tuple of views: what `stack` would put together again.

    Cheaper than indexing each one: the gradients are stacked, instead of each being written into zeros.
    """
    if isinstance(x, Tensor):
        return call(_unstack.op, (x,), {"axis": axis})
    return _unstack.op.forward(x, axis)


@op(kind="linear", several=True)
def _unstack(x: Operand, /, axis: int) -> Any:
    return tuple(np.moveaxis(x, axis, 0))


@_unstack.vjp
def _(g: tuple[Operand, ...], axis: int) -> Any:
    return _stack(*g, axis=axis)


def split(x: Operand, sections: int | Sequence[int], axis: int = 0) -> tuple[Any, ...]:
    """Consecutive parts of `x` along an axis, as a tuple of views.

    Parameters
    ----------
    x : Tensor
    sections : int or sequence of int
        A number of equal parts, or the positions where the second and later parts begin.
    axis : int
        Default 0.

    Raises
    ------
    ShapeError
        If equal parts are not possible.
    InputError
        If the positions are not in order.
    """
    x = x if isinstance(x, Tensor) else np.asarray(x)
    axis = axis_of(axis, x.ndim, "split")
    n = x.shape[axis]
    if isinstance(sections, Sequence | np.ndarray):
        found = [integer(s, "split: a position") for s in sections]
        offsets = tuple(min(max(s + n if s < 0 else s, 0), n) for s in found)
        if any(a > b for a, b in pairwise(offsets)):
            raise InputError(f"split: positions {found} along an axis of {n} are not in order.", "sort them.")
    else:
        parts = integer(sections, "split: sections")
        if parts < 1 or n % parts:
            raise ShapeError(
                f"split: an axis of length {n} into {parts} equal parts.", "pass a divisor, or a list of positions."
            )
        offsets = tuple(i * (n // parts) for i in range(1, parts))
    return _pieces(x, offsets, axis)


def _pieces(x: Any, offsets: Shape, axis: int) -> tuple[Any, ...]:
    """`split`, quick for plain arrays."""
    if isinstance(x, Tensor):
        return call(_split.op, (x,), {"offsets": offsets, "axis": axis})
    return _split.op.forward(x, offsets, axis)


@op(kind="linear", several=True)
def _split(x: Operand, /, offsets: Shape, axis: int) -> Any:
    lead = (slice(None),) * (axis % x.ndim)
    return tuple(x[(*lead, slice(a, b))] for a, b in pairwise((0, *offsets, x.shape[axis])))


@_split.vjp
def _(g: tuple[Operand, ...], axis: int) -> Any:
    return _concatenate(*g, axis=axis)


# ---- more of the same -----------------------------------------------------------------------------------------------


def pad(x: Operand, pad_width: Any, mode: str = "constant", constant_values: Any = 0) -> Any:
    """`x` with a border.

    Parameters
    ----------
    x : Tensor
    pad_width : int, (before, after), or one such pair for each axis
        How many elements to add before and after.
    mode : {"constant"}
    constant_values : number, or in the forms of `pad_width`
        What the border is filled with. Default 0.

    Raises
    ------
    InputError
        If the mode is another one, or a width is negative.
    ShapeError
        If there are not as many pairs as axes.
    """
    if mode != "constant":
        raise InputError(f"pad: mode is {mode!r}.", 'only mode="constant" is there; build others with concatenate.')
    if isinstance(constant_values, Tensor) and constant_values.requires_grad:
        raise DTypeError("pad: constant_values requires gradients, and has none.", "build it with concatenate.")
    x = x if isinstance(x, Tensor) else np.asarray(x)
    widths = np.asarray(pad_width)
    if widths.dtype.kind not in "iu":
        raise DTypeError(f"pad: pad_width has dtype {widths.dtype}.", "use integers: one, a pair, or a pair an axis.")
    if widths.size and widths.min() < 0:
        raise InputError(
            f"pad: pad_width has {widths.min()} in it.", "widths are at least 0; index x to make it smaller."
        )
    try:
        pairs = np.broadcast_to(widths, (x.ndim, 2)).tolist()
    except ValueError as error:
        raise ShapeError(
            f"pad: pad_width has shape {widths.shape}, x has {x.ndim} axes.", "pass one pair, or a pair for each axis."
        ) from error
    return _pad(x, tuple((a, b) for a, b in pairs), constant_values)


@op
def _pad(x: Operand, /, widths: tuple[tuple[int, int], ...], fill: Any = 0) -> Any:
    return np.pad(x, widths, constant_values=fill) if x.ndim else x.copy()


@_pad.vjp
def _(g: Operand, x_shape: Shape, widths: tuple[tuple[int, int], ...]) -> Any:
    return getitem(g, tuple(slice(a, a + n) for (a, _), n in zip(widths, x_shape, strict=True)))


@_pad.jvp
def _(x: Operand, widths: tuple[tuple[int, int], ...]) -> Any:
    return _pad(x, widths)


@op(kind="linear")
def tile(x: Operand, /, reps: Axes) -> Any:
    """`x` laid out `reps` times along each axis; new axes in front if there are more `reps` than axes."""
    return np.tile(x, reps)


@tile.vjp
def _(g: Operand, x_shape: Shape, reps: Axes) -> Any:
    times = tuple(np.atleast_1d(reps).tolist())
    n = max(len(times), len(x_shape))
    times, sides = (1,) * (n - len(times)) + times, (1,) * (n - len(x_shape)) + x_shape
    lengths, copies = list[int](), list[int]()
    for count, side in zip(times, sides, strict=True):
        if count != 1:
            copies.append(len(lengths))
            lengths.append(count)
        lengths.append(side)
    return np.reshape(np.sum(np.reshape(g, tuple(lengths)), axis=tuple(copies)), x_shape)


def repeat(x: Operand, repeats: Any, axis: int | None = None) -> Any:
    """Every element (row, ...) of `x` several times, one after the other.

    Parameters
    ----------
    x : Tensor
    repeats : int or 1-D sequence of int
        For all, or for each position along the axis.
    axis : int, optional
        Default: the flattened `x`.

    Raises
    ------
    ShapeError
        If there are not as many `repeats` as positions.
    InputError
        If one is negative.
    """
    x = x if isinstance(x, Tensor) else np.asarray(x)
    if axis is None:
        x, axis = np.ravel(x), 0
    axis = axis_of(axis, x.ndim, "repeat")
    counts, n = np.asarray(repeats), x.shape[axis]
    if counts.dtype.kind not in "iu" and counts.size:
        raise DTypeError(f"repeat: repeats have dtype {counts.dtype}.", "use integers.")
    if counts.size and counts.min() < 0:
        raise InputError(f"repeat: repeats have {counts.min()} among them.", "each is at least 0.")
    if counts.size == 1:
        return _repeat(x, counts.item(), axis)
    if counts.shape != (n,):
        raise ShapeError(
            f"repeat: repeats have shape {counts.shape}, the axis has length {n}.", f"pass one number, or {n}."
        )
    return take(x, np.repeat(np.arange(int(n)), counts.astype(np.intp)), axis)


@op(kind="linear")
def _repeat(x: Operand, /, repeats: int, axis: int) -> Any:
    return np.repeat(x, repeats, axis)


@_repeat.vjp
def _(g: Operand, x_shape: Shape, repeats: int, axis: int) -> Any:
    copies = np.reshape(g, (*x_shape[: axis + 1], repeats, *x_shape[axis + 1 :]))
    return np.sum(copies, axis=axis + 1)


# ---- parts of matrices ----------------------------------------------------------------------------------------------


@op(kind="linear")
def tril(x: Operand, /, k: int = 0) -> Any:
    """The lower triangle of matrices, of shape (..., M, N), up to the k-th diagonal; zeros elsewhere."""
    return np.tril(_matrix(x, "tril"), k)


@tril.vjp
def _(g: Operand, k: int) -> Any:
    return np.tril(g, k)


@op(kind="linear")
def triu(x: Operand, /, k: int = 0) -> Any:
    """The upper triangle of matrices, of shape (..., M, N), from the k-th diagonal on; zeros elsewhere."""
    return np.triu(_matrix(x, "triu"), k)


@triu.vjp
def _(g: Operand, k: int) -> Any:
    return np.triu(g, k)


def _matrix(x: Any, what: str) -> Array:
    found = np.asarray(x)
    if found.ndim < 2:
        raise ShapeError(f"{what}: x has shape {found.shape}, so {found.ndim} axes.", "pass at least 2 axes.")
    return found


@op(kind="linear")
def diagonal(x: Operand, /, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    """The elements x[i, i + offset] of the matrices along two axes, as a new last axis: a view."""
    return np.diagonal(x, offset, axis1, axis2)


@diagonal.vjp
def _(g: Operand, x_shape: Shape, offset: int, axis1: int, axis2: int) -> Any:
    return diagonal_into(g, offset, axis1, axis2, x_shape)


@op(kind="linear")
def diagonal_into(g: Operand, /, offset: int, axis1: int, axis2: int, shape: Shape) -> Any:
    """Zeros of `shape` with `g` on the diagonal that `diagonal` takes."""
    out = np.zeros(shape, g.dtype)
    i = np.arange(int(g.shape[-1]))
    np.moveaxis(out, (axis1, axis2), (-2, -1))[..., i + max(-offset, 0), i + max(offset, 0)] = g
    return out


@diagonal_into.vjp
def _(g: Operand, offset: int, axis1: int, axis2: int) -> Any:
    return np.diagonal(g, offset, axis1, axis2)


# ---- binding --------------------------------------------------------------------------------------------------------


def _iterate(self: Tensor) -> Iterator[Any]:
    len(self)  # refuses a tensor without axes
    return iter(unstack(self))


def _reshape_method(x: Tensor, *shape: Any) -> Any:
    return reshape(x, shape[0] if len(shape) == 1 else shape)


def _transpose_method(x: Tensor, *axes: Any) -> Any:
    if not axes:
        return transpose(x)
    return transpose(x, axes[0] if len(axes) == 1 and not isinstance(axes[0], int) else axes)


def _matrix_transpose(x: Operand) -> Any:
    if x.ndim < 2:
        raise ShapeError(f"mT: x has shape {x.shape}, so {x.ndim} axes.", "a matrix has at least 2.")
    return swapaxes(x, -1, -2)


def _numpy_reshape(a: Any, shape: Any = None, order: str = "C", *, newshape: Any = None, copy: None = None) -> Any:
    return reshape(_c_order(a, order), newshape if shape is None else shape)


def _numpy_ravel(a: Any, order: str = "C") -> Any:
    return ravel(_c_order(a, order))


def _c_order(a: Any, order: str) -> Any:
    if order != "C":
        raise DTypeError(f"np.reshape and np.ravel of a Tensor: order is {order!r}.", "only 'C'; transpose first.")
    return a


def _shape(a: Any) -> Shape:
    return a.shape


def _ndim(a: Any) -> int:
    return a.ndim


def _size(a: Any, axis: int | None = None) -> int:
    return a.size if axis is None else a.shape[axis]


FUNCTIONS[np.shape] = _shape
FUNCTIONS[np.ndim] = _ndim
FUNCTIONS[np.size] = _size
FUNCTIONS[np.reshape] = _numpy_reshape
FUNCTIONS[np.ravel] = _numpy_ravel
FUNCTIONS[np.expand_dims] = expand_dims
FUNCTIONS[np.squeeze] = squeeze
FUNCTIONS[np.broadcast_to] = broadcast_to
FUNCTIONS[np.transpose] = transpose
FUNCTIONS[np.matrix_transpose] = _matrix_transpose
FUNCTIONS[np.swapaxes] = swapaxes
FUNCTIONS[np.moveaxis] = moveaxis
FUNCTIONS[np.flip] = flip
FUNCTIONS[np.roll] = roll
FUNCTIONS[np.concatenate] = concatenate
FUNCTIONS[np.stack] = stack
FUNCTIONS[np.split] = split
FUNCTIONS[np.pad] = pad
FUNCTIONS[np.tile] = tile
FUNCTIONS[np.repeat] = repeat
FUNCTIONS[np.tril] = tril
FUNCTIONS[np.triu] = triu
FUNCTIONS[np.diagonal] = diagonal

Tensor.__iter__ = method(_iterate)
Tensor.reshape = method(_reshape_method)
Tensor.ravel = method(ravel)
Tensor.flatten = method(flatten)
Tensor.transpose = method(_transpose_method)
Tensor.T = method(property(transpose))  # pyright: ignore[reportAttributeAccessIssue]
Tensor.mT = method(property(_matrix_transpose))  # pyright: ignore[reportAttributeAccessIssue]
Tensor.swapaxes = method(swapaxes)
Tensor.squeeze = method(squeeze)
Tensor.expand_dims = method(expand_dims)
Tensor.broadcast_to = method(broadcast_to)
Tensor.split = method(split)
Tensor.repeat = method(repeat)
Tensor.diagonal = method(diagonal)
