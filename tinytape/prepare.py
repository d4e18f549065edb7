"""Compiling a model's kernels before they are needed."""

from __future__ import annotations

import time
from collections.abc import Generator as Steps
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from .engine.errors import DTypeError, InputError, ShapeError
from .engine.tape import enable_grad, no_grad
from .engine.tensor import Tensor, gradient
from .engine.tree import flatten
from .nn.module import Module
from .ops.elementwise import add
from .ops.reduce import sum as total
from .random import Generator, default_generator

__all__ = ["warmup"]

Shape = Sequence[int]


def warmup(
    model: Module,
    shapes: Shape | Sequence[Shape],
    dtypes: npt.DTypeLike | Sequence[npt.DTypeLike] | None = None,
) -> float:
    """Compile what training a model will need, by a forward and a backward pass over zeros.

    Kernels are generic in all sizes, so one small shape is enough. The model is as before when this returns:
    gradients, buffers, and the states of its random generators and of the default one.

    Parameters
    ----------
    model : Module
        Called with one input.
    shapes : tuple of int, or list of them
        The input's shape; with a list, the model is run once for each.
    dtypes : dtype or list of dtypes, optional
        The inputs' dtype, or one for each shape. Default: that of the first parameter of floats. Integers, as
        embeddings take them, have to be named.

    Returns
    -------
    float
        Seconds it took.

    Raises
    ------
    DTypeError, InputError, ShapeError
        If the arguments are not these, or the model refuses such an input.

    Examples
    --------
    >>> model = nn.LSTM(64, 256)
    >>> seconds = tt.warmup(model, (2, 1, 64))
    """
    if not isinstance(model, Module):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DTypeError(f"warmup: model is a {type(model).__name__}, not a Module.", "pass an nn.Module.")
    inputs = _inputs(model, shapes, dtypes)
    start = time.perf_counter()
    with _unchanged(model), enable_grad():
        for x in inputs:
            _run(model, x)
    return time.perf_counter() - start


def _run(model: Module, x: Tensor) -> None:
    results = [y for y in flatten(model(x)) if isinstance(y, Tensor) and y.requires_grad]
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    if results and weights:
        loss = total(results[0])
        for result in results[1:]:
            loss = add(loss, total(result))
        gradient(loss, weights)  # unlike backward(), it leaves the gradients that the weights hold alone


def _inputs(model: Module, shapes: Any, dtypes: Any) -> list[Tensor]:
    listed = _items(shapes)
    alone = listed is None or all(isinstance(side, int | np.integer) for side in listed)
    wanted = [_shape(shape) for shape in ([shapes] if alone or listed is None else listed)]
    if dtypes is None:
        dtypes = next((weight.dtype for weight in model.parameters() if weight.dtype.kind == "f"), None)
    kinds = _items(dtypes) or [dtypes] * len(wanted)
    if len(kinds) != len(wanted):
        raise InputError(
            f"warmup: {len(kinds)} dtypes for {len(wanted)} shapes.", "pass one dtype, or one for each shape."
        )
    try:
        return [Tensor(np.zeros(shape, kind)) for shape, kind in zip(wanted, kinds, strict=True)]
    except TypeError as error:
        raise DTypeError(f"warmup: dtypes: {error}.", "pass, say, 'float32' or 'int64'.") from None


def _items(value: Any) -> list[Any] | None:
    """The items of a list or tuple; None for anything else."""
    return list(cast("list[Any]", value)) if isinstance(value, list | tuple) else None


def _shape(shape: Any) -> tuple[int, ...]:
    sides = _items(shape) or [shape]
    if any(not isinstance(side, int | np.integer) or side < 0 for side in sides):
        raise ShapeError(f"warmup: {shape!r} is not a shape.", "pass a tuple such as (2, 1, 64), or a list of them.")
    return tuple(sides)


@contextmanager
def _unchanged(model: Module) -> Steps[None]:
    """Put back what a forward pass changes: buffers, training flags, and where generators stand."""
    found = [value for module in model.modules() for value in vars(module).values() if isinstance(value, Generator)]
    generators = [(g, g.state()) for g in {id(g): g for g in (default_generator, *found)}.values()]
    buffers = [(buffer, buffer.numpy()) for buffer in model.buffers()]
    flags = [(module, vars(module).get("training")) for module in model.modules()]
    try:
        yield
    finally:
        for generator, state in generators:
            generator.set_state(state)
        with no_grad():
            for buffer, values in buffers:
                if not np.array_equal(buffer.data, values, equal_nan=True):
                    buffer.copy_(values)
        for module, flag in flags:
            if vars(module).get("training") is not flag:
                module.training = bool(flag)
