"""Tensors from nothing: zeros, ranges, and tensors like other tensors. Each owns its memory.

Without a dtype, floats get `default_dtype` and integers int64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.tape import Storage, here
from ..engine.tensor import FUNCTIONS, Tensor, default_dtype
from ..engine.tree import Array

__all__ = [
    "arange",
    "as_tensor",
    "eye",
    "from_dlpack",
    "full",
    "full_like",
    "linspace",
    "one_hot",
    "ones",
    "ones_like",
    "zeros",
    "zeros_like",
]

DType = npt.DTypeLike | None


def _leaf(name: str, requires_grad: bool, make: Callable[..., Any], *args: Any) -> Tensor:
    """A tensor around the array that ``make(*args)`` has just allocated."""
    try:
        array: Array = make(*args)
    except (TypeError, ValueError, OverflowError) as error:
        given = ", ".join(repr(a) for a in args)
        raise ShapeError(
            f"{name}({given}): {error}.", "lengths are integers, not negative; values are numbers."
        ) from error
    made = Tensor.of(array, None, Storage())
    if requires_grad:
        made.requires_grad = True
    return made


def _dtype(name: str, dtype: DType, default: Any = None) -> Any:
    if dtype is None:
        return default or default_dtype()
    try:
        found = np.dtype(dtype)
    except TypeError as error:
        raise DTypeError(f"{name}: {error}.", "pass a dtype such as 'float32' or np.int64.") from error
    if found.kind not in "fiub":
        raise DTypeError(f"{name}: dtype is {found}.", "tensors are of floats, integers or bools.")
    return found


def _dtype_of(value: Any) -> Any:
    """The dtype that a tensor of one number has: that of `value` if it has one, else what Python's type stands for."""
    if isinstance(value, bool):
        return np.dtype(np.bool_)
    if isinstance(value, int):
        return np.dtype(np.int64)
    return getattr(value, "dtype", default_dtype())


def _number(value: Any) -> Any:
    if isinstance(value, Tensor) and value.node is not None and here.context.recording:
        raise DTypeError(
            "a tensor from nothing cannot hold a number that requires gradients.",
            "use broadcast_to, or zeros(...) + x; or pass x.item().",
        )
    return value.item() if getattr(value, "size", 0) == 1 else value


def _arange(start: Any, stop: Any, step: Any, dtype: Any) -> Any:
    return cast(Array, np.arange(start, stop, step)).astype(dtype, copy=False)  # float32 is no dtype to count in


def _linspace(start: Any, stop: Any, num: int, endpoint: bool, dtype: Any) -> Any:
    return cast(Array, np.linspace(start, stop, num, endpoint)).astype(dtype, copy=False)


def zeros(shape: Any, dtype: DType = None, requires_grad: bool = False) -> Tensor:
    """A tensor of zeros; `shape` is an int or a tuple of ints."""
    return _leaf("zeros", requires_grad, np.zeros, shape, _dtype("zeros", dtype))


def ones(shape: Any, dtype: DType = None, requires_grad: bool = False) -> Tensor:
    """A tensor of ones; `shape` is an int or a tuple of ints."""
    return _leaf("ones", requires_grad, np.ones, shape, _dtype("ones", dtype))


def full(shape: Any, fill_value: Any, dtype: DType = None, requires_grad: bool = False) -> Tensor:
    """A tensor of one number throughout; without a dtype, of the number's own kind."""
    wanted = _dtype("full", dtype, _dtype_of(fill_value))
    return _leaf("full", requires_grad, np.full, shape, _number(fill_value), wanted)


def arange(start: Any, stop: Any = None, step: Any = 1, dtype: DType = None, requires_grad: bool = False) -> Tensor:
    """Numbers from `start` up to but without `stop`, `step` apart; ``arange(n)`` counts from 0 to n - 1.

    Raises
    ------
    InputError
        If `step` is 0.
    """
    if stop is None:
        start, stop = 0, start
    start, stop, step = _number(start), _number(stop), _number(step)
    if step == 0:
        raise InputError("arange: step is 0.", "pass a step that leads from start to stop.")
    whole = isinstance(start, int) and isinstance(stop, int) and isinstance(step, int)
    wanted = _dtype("arange", dtype, np.dtype(np.int64) if whole else None)
    return _leaf("arange", requires_grad, _arange, start, stop, step, wanted)


def linspace(
    start: float, stop: float, num: int = 50, endpoint: bool = True, dtype: DType = None, requires_grad: bool = False
) -> Tensor:
    """`num` numbers evenly spaced from `start` to `stop`, the latter included unless `endpoint` is False."""
    wanted = _dtype("linspace", dtype)
    return _leaf("linspace", requires_grad, _linspace, _number(start), _number(stop), num, endpoint, wanted)


def eye(n: int, m: int | None = None, k: int = 0, dtype: DType = None, requires_grad: bool = False) -> Tensor:
    """An (n, m) matrix, by default square, with ones on its `k`-th diagonal and zeros elsewhere."""
    return _leaf("eye", requires_grad, np.eye, n, m, k, _dtype("eye", dtype))


def zeros_like(x: Any, dtype: DType = None, requires_grad: bool = False) -> Tensor:
    """Zeros of the shape and, by default, the dtype of `x`."""
    x = as_tensor(x)
    return _leaf("zeros_like", requires_grad, np.zeros, x.shape, _dtype("zeros_like", dtype, x.dtype))


def ones_like(x: Any, dtype: DType = None, requires_grad: bool = False) -> Tensor:
    """Ones of the shape and, by default, the dtype of `x`."""
    x = as_tensor(x)
    return _leaf("ones_like", requires_grad, np.ones, x.shape, _dtype("ones_like", dtype, x.dtype))


def full_like(x: Any, fill_value: Any, dtype: DType = None, requires_grad: bool = False) -> Tensor:
    """One number throughout, in the shape and, by default, the dtype of `x`."""
    x = as_tensor(x)
    wanted = _dtype("full_like", dtype, x.dtype)
    return _leaf("full_like", requires_grad, np.full, x.shape, _number(fill_value), wanted)


def one_hot(indices: Any, n: int, dtype: DType = None) -> Tensor:
    """Rows of zeros with a one at each index: shape ``(*indices.shape, n)``.

    Parameters
    ----------
    indices : Tensor or array_like of integers
        From 0 to n - 1.
    n : int
        Length of the rows.
    dtype : dtype, optional
        Default `default_dtype`.

    Raises
    ------
    DTypeError
        If the indices are not integers.
    InputError
        If one of them is out of range.
    """
    at = as_tensor(indices).raw
    if at.dtype.kind not in "iu":
        raise DTypeError(f"one_hot: indices have dtype {at.dtype}.", "indices are integers: use astype('int64').")
    lowest, highest = (at.min(), at.max()) if at.size else (0, -1)
    if lowest < 0 or highest >= n:
        wrong = lowest if lowest < 0 else highest
        raise InputError(f"one_hot: index {wrong} is out of range for n = {n}.", "indices go from 0 to n - 1.")
    made = zeros((*at.shape, n), _dtype("one_hot", dtype))
    np.put_along_axis(made.raw, np.expand_dims(at, -1), 1, axis=-1)
    return made


def as_tensor(x: Any) -> Tensor:
    """`x` itself if it is a Tensor, else a tensor of its values."""
    return x if isinstance(x, Tensor) else Tensor(x)


def from_dlpack(x: Any) -> Tensor:
    """A copy of another library's CPU array, through the DLPack protocol.

    Raises
    ------
    DTypeError
        If `x` does not speak DLPack, lies on another device, or has a dtype that NumPy has not.
    """
    try:
        array = np.from_dlpack(x)
    except (AttributeError, TypeError, ValueError, BufferError, RuntimeError) as error:
        raise DTypeError(
            f"from_dlpack: x is a {type(x).__name__}: {error}.",
            "pass a CPU array or tensor without gradients (detach()).",
        ) from error
    return Tensor(array)


def _numpys_zeros_like(a: Any, dtype: DType = None, order: str = "K", subok: bool = True) -> Tensor:
    return zeros_like(a, dtype)


def _numpys_ones_like(a: Any, dtype: DType = None, order: str = "K", subok: bool = True) -> Tensor:
    return ones_like(a, dtype)


def _numpys_full_like(a: Any, fill_value: Any, dtype: DType = None, order: str = "K", subok: bool = True) -> Tensor:
    return full_like(a, fill_value, dtype)


FUNCTIONS[np.zeros_like] = _numpys_zeros_like
FUNCTIONS[np.ones_like] = _numpys_ones_like
FUNCTIONS[np.full_like] = _numpys_full_like
