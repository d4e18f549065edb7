"""Products of vectors, matrices and stacks of matrices: all of them linear in each argument."""

from __future__ import annotations

import math
import sys
from collections import Counter
from functools import lru_cache
from typing import Any

import numpy as np

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.op import Operand, op
from ..engine.operators import method
from ..engine.tensor import FUNCTIONS, UFUNCS, Tensor
from .index import axis_of, integer
from .shape import diagonal

__all__ = ["dot", "einsum", "matmul", "outer", "tensordot", "trace"]

Shape = tuple[int, ...]

LEAST = 1 << 18  # multiply-adds: fewer are cheapest with NumPy, whose BLAS does them on one thread

# ---- matrix products ------------------------------------------------------------------------------------------------


@op(kind="multilinear")
def matmul(a: Operand, b: Operand) -> Any:
    """The matrix product, with NumPy's rules for every number of axes.

    Parameters
    ----------
    a : Tensor, shape (..., n, k) or (k,)
    b : Tensor, shape (..., k, m) or (k,)

    Returns
    -------
    Tensor, shape (..., n, m)
        Leading axes broadcast; the axis that a 1-D argument does not have is left out.

    Raises
    ------
    ShapeError
        If the inner lengths differ, the leading axes do not broadcast, or an argument has no axes.
    """
    try:
        if a.ndim == 2 == b.ndim:
            return _product(a, b)
        if a.ndim > 2 and b.ndim == 2:  # one large product instead of a stack of small ones
            return _product(np.reshape(a, (_rows(a), a.shape[-1])), b).reshape(*a.shape[:-1], b.shape[-1])
        return np.matmul(a, b)
    except (ValueError, AttributeError) as error:
        shape_a, shape_b = np.shape(a), np.shape(b)
        if not shape_a or not shape_b:
            raise ShapeError(f"matmul: a has shape {shape_a}, b has {shape_b}.", "numbers multiply with *.") from error
        inner = shape_b[-2:][0]
        if shape_a[-1] != inner:
            raise ShapeError(
                f"matmul: a has shape {shape_a}, b has {shape_b}; a's last axis, {shape_a[-1]}, must be as long as "
                f"b's {'last but one' if len(shape_b) > 1 else 'only one'}, {inner}.",
                "transpose one of them: x @ weight.T.",
            ) from error
        if isinstance(error, AttributeError):
            return np.matmul(a, b)  # nested lists
        raise ShapeError(
            f"matmul: a has shape {shape_a}, b has {shape_b}; {shape_a[:-2]} and {shape_b[:-2]} do not broadcast.",
            "reshape or expand_dims one of them.",
        ) from error


@matmul.vjp
def _(g: Operand, a: Operand, b: Operand, wants: tuple[bool, bool]) -> Any:
    if a.ndim == 2 == b.ndim:
        return _product(g, b.T) if wants[0] else None, _weighted(a, g, b) if wants[1] else None
    return _left(g, a, b) if wants[0] else None, _right(g, a, b) if wants[1] else None


def _left(g: Any, a: Any, b: Any) -> Any:
    """The gradient of ``a @ b`` for `a`."""
    if b.ndim == 1:
        return g * b if a.ndim == 1 else np.expand_dims(g, -1) * b
    if a.ndim == 1:
        return np.matmul(b, np.expand_dims(g, -1))[..., 0]
    if b.ndim == 2:
        return np.reshape(_product(np.reshape(g, (_rows(g), g.shape[-1])), b.T), (*g.shape[:-1], b.shape[0]))
    return np.matmul(g, b.mT)


def _right(g: Any, a: Any, b: Any) -> Any:
    """The gradient of ``a @ b`` for `b`."""
    if a.ndim == 1:
        return g * a if b.ndim == 1 else np.expand_dims(a, -1) * np.expand_dims(g, -2)
    if b.ndim == 1:
        return np.dot(np.reshape(g, (_rows(a),)), np.reshape(a, (_rows(a), a.shape[-1])))
    if b.ndim == 2:  # a sum over all leading axes, as one product
        return _weighted(np.reshape(a, (_rows(a), a.shape[-1])), np.reshape(g, (_rows(g), g.shape[-1])), b)
    return np.matmul(a.mT, g)


def _rows(x: Any) -> int:
    return math.prod(x.shape[:-1])


def _weighted(a: Any, g: Any, b: Any) -> Any:
    """``a.T @ g``, in memory as `b` is: the gradient of a transposed weight can then be turned back at no cost."""
    if b.__class__ is np.ndarray and b.flags.fnc:
        return _product(g.T, a).T
    return _product(a.T, g)


def _product(a: Any, b: Any, bias: Any = None) -> Any:
    """``a @ b``, or ``a @ b + bias``, by our own kernels where these are quicker than the BLAS that NumPy came with."""
    if a.size * b.shape[1] >= LEAST and (kernels := _kernels(a, b)) is not None:
        return kernels.matmul(a, b, bias)
    y = np.dot(a, b)
    if bias is not None:
        y += bias
    return y


def _kernels(a: Any, b: Any) -> Any:
    """The module of compiled products, if kernels are in use anyway and they are quicker for these arguments."""
    if "tinytape.kernels.native" not in sys.modules or not (a.__class__ is b.__class__ is np.ndarray):
        return None
    if a.shape[1] != b.shape[0] or a.dtype != b.dtype or a.dtype.char not in "fd" or not a.dtype.isnative:
        return None
    from ..kernels.compiler import usable

    if not usable():
        return None
    from ..kernels import matmul

    return matmul if matmul.is_quicker(a.shape[0], a.shape[1], b.shape[1]) else None


@op
def affine(x: Operand, weight: Operand, bias: Operand) -> Any:
    """``x @ weight.T + bias`` without an array for the product: x (..., I), weight (O, I), bias (O,), one dtype."""
    y = _product(_flat(x), weight.T, bias)
    return y if x.ndim == 2 else y.reshape(*x.shape[:-1], len(weight))


@affine.vjp
def _(g: Operand, x: Operand, weight: Operand, wants: tuple[bool, bool, bool]) -> Any:
    rows = _flat(g)
    left = _product(rows, weight) if wants[0] else None
    return (
        left if x.ndim == 2 or left is None else np.reshape(left, x.shape),
        _product(rows.T, _flat(x)) if wants[1] else None,
        np.sum(rows, axis=0) if wants[2] else None,
    )


def _flat(x: Any) -> Any:
    return x if x.ndim == 2 else np.reshape(x, (_rows(x), x.shape[-1]))


def dot(a: Operand, b: Operand) -> Any:
    """NumPy's dot: over the last axis of `a` and the last but one of `b`, without broadcasting.

    For vectors and matrices it is `matmul`; with a 0-d argument it is a product.

    Raises
    ------
    ShapeError
        If the two axes differ in length.
    """
    if not isinstance(a, Tensor) and not isinstance(b, Tensor):
        return np.dot(a, b)
    a, b = (x if isinstance(x, Tensor) else np.asarray(x) for x in (a, b))
    if a.ndim == 0 or b.ndim == 0:
        return np.multiply(a, b)
    return matmul(a, b) if b.ndim <= 2 else tensordot(a, b, (-1, -2))


@op(kind="multilinear")
def outer(a: Operand, b: Operand) -> Any:
    """All products of an element of `a` and one of `b`, both flattened: a matrix of shape (a.size, b.size)."""
    return np.outer(a, b)


@outer.vjp
def _(g: Operand, a: Operand, b: Operand, a_shape: Shape, b_shape: Shape) -> Any:
    return np.reshape(np.dot(g, np.ravel(b)), a_shape), np.reshape(np.dot(np.ravel(a), g), b_shape)


# ---- contractions ---------------------------------------------------------------------------------------------------


def tensordot(a: Operand, b: Operand, axes: Any = 2) -> Any:
    """The sum of products over pairs of axes.

    Parameters
    ----------
    a, b : Tensor
    axes : int or (axes of a, axes of b)
        A number n: the last n axes of `a` with the first n of `b`, in order.

    Returns
    -------
    Tensor
        The other axes of `a`, then the other axes of `b`.

    Raises
    ------
    ShapeError
        If paired axes differ in length, or there are not as many of one as of the other.
    """
    a, b = (x if isinstance(x, Tensor) else np.asarray(x) for x in (a, b))
    if hasattr(axes, "__len__"):
        first, second = (tuple(x) if hasattr(x, "__len__") else (x,) for x in axes)
    else:
        n = integer(axes, "tensordot: axes")
        if not 0 <= n <= min(a.ndim, b.ndim):
            raise ShapeError(f"tensordot: {n} axes, where a has {a.ndim} and b has {b.ndim}.", "sum over fewer.")
        first, second = tuple(range(a.ndim - n, a.ndim)), tuple(range(n))
    first = tuple(axis_of(i, a.ndim, "tensordot: a") for i in first)
    second = tuple(axis_of(i, b.ndim, "tensordot: b") for i in second)
    lengths = [a.shape[i] for i in first], [b.shape[i] for i in second]
    if lengths[0] != lengths[1] or len(set(first)) < len(first) or len(set(second)) < len(second):
        raise ShapeError(
            f"tensordot: axes {first} of a {a.shape} and {second} of b {b.shape} do not go together.",
            "pair different axes of equal length.",
        )
    return _tensordot(a, b, first, second)


@op(kind="multilinear")
def _tensordot(a: Operand, b: Operand, /, first: Shape, second: Shape) -> Any:
    return np.tensordot(a, b, (first, second))


@_tensordot.vjp
def _(g: Operand, a: Operand, b: Operand, first: Shape, second: Shape, wants: tuple[bool, bool]) -> Any:
    rest_a = tuple(i for i in range(a.ndim) if i not in first)
    rest_b = tuple(i for i in range(b.ndim) if i not in second)
    n = len(rest_a)
    return (
        _put_back(np.tensordot(g, b, (tuple(range(n, g.ndim)), rest_b)), rest_a, first, second) if wants[0] else None,
        _put_back(np.tensordot(g, a, (tuple(range(n)), rest_a)), rest_b, second, first) if wants[1] else None,
    )


def _put_back(product: Any, rest: Shape, ours: Shape, theirs: Shape) -> Any:
    """Bring a gradient's axes (our other ones, then the contracted ones in the order of theirs) to our order."""
    order = [*rest, *(ours[theirs.index(i)] for i in sorted(theirs))]
    return np.transpose(product, tuple(order.index(i) for i in range(len(order))))


def einsum(subscripts: str, *operands: Operand) -> Any:
    """The sum of products in Einstein's notation: ``einsum("bij,bjk->bik", a, b)``.

    Parameters
    ----------
    subscripts : str
        A letter for each axis of each operand, and after ``->`` those of the result. What is not in the result is
        summed over. Without ``->`` the result has, in alphabetical order, the letters that occur once. ``...``
        stands for axes that broadcast. A letter twice in one operand takes its diagonal.
    *operands : Tensor

    Raises
    ------
    InputError
        If the subscripts cannot be read.
    ShapeError
        If operands have other numbers of axes than letters, or a letter stands for different lengths.
    """
    if subscripts.__class__ is not str:
        raise DTypeError(f"einsum: the first argument is a {type(subscripts).__name__}.", 'einsum("ij,jk->ik", a, b).')
    arrays: list[Any] = [x if isinstance(x, Tensor) else np.asarray(x) for x in operands]
    steps, plain = _plan(subscripts, tuple(x.shape for x in arrays))
    for i, (diagonals, narrow, alone) in enumerate(steps):
        for one, two in diagonals:
            arrays[i] = diagonal(arrays[i], 0, one, two)
        if narrow:
            arrays[i] = np.squeeze(arrays[i], narrow)
        if alone:
            arrays[i] = np.sum(arrays[i], axis=alone)
    return _einsum(*arrays, subscripts=plain)


Step = tuple[tuple[tuple[int, int], ...], Shape, Shape]


@lru_cache(maxsize=1024)
def _plan(subscripts: str, shapes: tuple[Shape, ...]) -> tuple[tuple[Step, ...], str]:
    """For each operand the diagonals to take, axes to squeeze and axes to sum; and the subscripts after that.

    Those have no letter twice in one operand, none of length 1 where others have more, and every letter also in the
    result or in another operand. So each gradient is an einsum of the same kind.
    """
    inputs, output = _read(subscripts, shapes)
    lengths: dict[str, int] = {}
    for letters, shape in zip(inputs, shapes, strict=True):
        for letter, n in zip(letters, shape, strict=True):
            known = lengths.setdefault(letter, n)
            if 1 not in (n, known) and n != known:
                raise ShapeError(f"einsum: {letter!r} in {subscripts!r} is {known} and {n} long.", "make them equal.")
            lengths[letter] = n if known == 1 else known

    diagonals: list[tuple[tuple[int, int], ...]] = []
    narrow: list[Shape] = []
    for i, letters in enumerate(inputs):
        sides, pairs = list(shapes[i]), list[tuple[int, int]]()
        while len(set(letters)) < len(letters):
            letter = Counter(letters).most_common(1)[0][0]
            one = letters.index(letter)
            two = letters.index(letter, one + 1)
            if sides[one] != sides[two]:
                raise ShapeError(
                    f"einsum: {letter!r} in {subscripts!r} is {sides[one]} and {sides[two]} long.",
                    "a diagonal needs axes of equal length.",
                )
            pairs.append((one, two))
            letters = _without(letters, (one, two)) + letter
            sides = [n for k, n in enumerate(sides) if k not in (one, two)] + [sides[one]]
        diagonals.append(tuple(pairs))
        narrow.append(tuple(k for k, letter in enumerate(letters) if sides[k] != lengths[letter]))
        inputs[i] = _without(letters, narrow[i])

    alone: list[Shape] = []
    for i, letters in enumerate(inputs):
        others = set(output).union(*inputs[:i], *inputs[i + 1 :])
        alone.append(tuple(k for k, letter in enumerate(letters) if letter not in others))
        inputs[i] = _without(letters, alone[i])
    return tuple(zip(diagonals, narrow, alone, strict=True)), f"{','.join(inputs)}->{output}"


def _without(letters: str, positions: Shape) -> str:
    return "".join(letter for k, letter in enumerate(letters) if k not in positions)


def _read(subscripts: str, shapes: tuple[Shape, ...]) -> tuple[list[str], str]:
    """The letters of each operand and of the result, with ``...`` written out."""
    left, arrow, output = subscripts.replace(" ", "").partition("->")
    inputs = left.split(",")
    letters = subscripts.replace("->", "").replace("...", "").replace(",", "").replace(" ", "")
    odd = any(part.count("...") > 1 for part in (*inputs, output)) or "," in output
    if odd or not all(letter.isascii() and letter.isalpha() for letter in letters):
        raise InputError(f"einsum: {subscripts!r} cannot be read.", 'write letters, commas, "..." and one "->".')
    if len(inputs) != len(shapes):
        raise InputError(
            f"einsum: {subscripts!r} is for {len(inputs)} operands, {len(shapes)} were passed.", "one for each comma."
        )
    spare = [c for c in "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ" if c not in letters]
    most = 0
    for i, (found, shape) in enumerate(zip(inputs, shapes, strict=True)):
        named = found.replace("...", "")
        extra = len(shape) - len(named) if "..." in found else 0
        if extra < 0 or len(named) + extra != len(shape) or extra > len(spare):
            raise ShapeError(
                f"einsum: operand {i} has shape {shape}, so {len(shape)} axes, for {found!r}.", "one letter an axis."
            )
        most = max(most, extra)
        inputs[i] = found.replace("...", "".join(spare[:extra][::-1]))  # broadcasting starts at the last axis
    dots = "".join(spare[:most][::-1])
    if not arrow:
        counts = Counter("".join(inputs))
        output = dots + "".join(sorted(c for c, n in counts.items() if n == 1 and c not in dots))
    output = output.replace("...", dots)
    if len(set(output)) < len(output) or not set(output) <= set("".join(inputs)):
        raise InputError(
            f"einsum: the result of {subscripts!r} cannot be read.",
            "name each letter once, and only those on the left.",
        )
    return inputs, output


@op(kind="multilinear")
def _einsum(*operands: Operand, subscripts: str) -> Any:
    dtype = np.result_type(*operands)  # a plain number takes the others' dtype
    return np.einsum(subscripts, *(np.asarray(x, dtype) for x in operands), optimize=len(operands) > 1)


@_einsum.vjp
def _(g: Operand, operands: tuple[Operand, ...], subscripts: str, wants: tuple[bool, ...]) -> Any:
    left, _, output = subscripts.partition("->")
    inputs = left.split(",")
    gradients: list[Any] = [None] * len(operands)
    for i, wanted in enumerate(wants):
        if wanted:  # the same contraction, with g and this operand in each other's place
            letters = ",".join([*inputs[:i], output, *inputs[i + 1 :]])
            gradients[i] = _einsum(*operands[:i], g, *operands[i + 1 :], subscripts=f"{letters}->{inputs[i]}")
    return tuple(gradients)


def trace(x: Operand, offset: int = 0, axis1: int = 0, axis2: int = 1) -> Any:
    """The sum of the elements x[i, i + offset] of the matrices along two axes."""
    return np.sum(diagonal(x, offset, axis1, axis2), axis=-1)


# ---- binding --------------------------------------------------------------------------------------------------------


def _rmatmul(b: Tensor, a: Any) -> Any:
    return matmul(a, b)


def _numpy_einsum(subscripts: str, *operands: Any, optimize: Any = False) -> Any:
    return einsum(subscripts, *operands)


UFUNCS[np.matmul] = matmul
FUNCTIONS[np.dot] = dot
FUNCTIONS[np.outer] = outer
FUNCTIONS[np.tensordot] = tensordot
FUNCTIONS[np.einsum] = _numpy_einsum
FUNCTIONS[np.trace] = trace

Tensor.__matmul__ = method(matmul)
Tensor.__rmatmul__ = method(_rmatmul)
Tensor.dot = method(dot)
Tensor.trace = method(trace)
