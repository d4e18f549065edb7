"""Functions of functions: `grad`, `value_and_grad`, `vjp`, `jvp`, Jacobians, Hessians and `hvp`.

They take functions of arrays, of Tensors, and of nested dicts, lists and tuples of them. What was given as arrays
comes back as arrays, what was given as Tensors comes back as Tensors that are themselves differentiable. They nest.

Reverse mode records the function and walks the tape backwards. Forward mode records it, keeping every call, and
goes along the tape forwards: each op's tangent comes from the same declaration as its gradient (see `Op.kind`).
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any, cast

import numpy as np

from .engine.errors import DTypeError, InputError, ShapeError
from .engine.forward import push_forward
from .engine.op import Operand, op
from .engine.recording import Tape
from .engine.tape import Node, enable_grad, here, no_grad, reachable, take_number, walk
from .engine.tensor import Tensor
from .engine.tree import flatten, map_leaves, unflatten

__all__ = ["grad", "hessian", "hvp", "jacfwd", "jacrev", "jvp", "value_and_grad", "vjp"]

Function = Callable[..., Any]


@op(kind="linear")
def boundary(x: Operand) -> Any:
    """The same values; marks where an inner function begins, so that it is differentiated up to here."""
    return x


@boundary.vjp
def _(g: Any) -> Any:
    return g


# ---- reverse mode -------------------------------------------------------------------------------------------------


def vjp(f: Function, *primals: Any) -> tuple[Any, Callable[[Any], tuple[Any, ...]]]:
    """The value of ``f(*primals)`` and its pullback.

    Parameters
    ----------
    f : callable
        Returns an array, a Tensor, or a nest of them.
    *primals : array, Tensor or nest of them

    Returns
    -------
    value
        ``f(*primals)``.
    pullback : callable
        Takes dL/dvalue, of value's structure, and returns a tuple with dL/dprimal for each primal; zeros where f
        does not depend on one. May be called any number of times.
    """
    inner = _enter(primals, "vjp")
    start = take_number()
    with _inside():
        value = f(*inner)
    outputs = flatten(value)
    sources = [x.node for x in flatten(inner)]
    differentiable = _is_inner(primals, outputs, start)

    def pullback(gradient: Any) -> tuple[Any, ...]:
        seeds: dict[Node, Any] = {}
        given = flatten(gradient)
        if len(given) != len(outputs):
            raise ShapeError(
                f"pullback: {len(given)} gradients for {len(outputs)} results.", "pass one for each, in its structure."
            )
        for i, (out, g) in enumerate(zip(outputs, given, strict=True)):
            if np.shape(g) != np.shape(out):
                raise ShapeError(
                    f"pullback: gradient {i} has shape {np.shape(g)}, the result has {np.shape(out)}.",
                    "a gradient has its result's own shape.",
                )
            if isinstance(out, Tensor) and out.node is not None:
                seed = _lift(g, out.dtype) if differentiable else _bare(g, out.dtype)
                seeds[out.node] = seeds[out.node] + seed if out.node in seeds else seed
        with enable_grad() if differentiable else no_grad():
            found = walk(seeds, set(sources), free=False, differentiable=differentiable)
        filled = [found.get(node, np.zeros(x.shape, x.dtype)) for node, x in zip(sources, flatten(inner), strict=True)]
        return unflatten(primals, [_leave(g, x) for g, x in zip(filled, flatten(primals), strict=True)])

    return _leave_all(value, primals, differentiable), pullback


def value_and_grad(f: Function, argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Function:
    """A function that returns ``(value, gradient)`` of the scalar function `f`.

    Parameters
    ----------
    f : callable
        Returns a scalar; with `has_aux`, a pair of a scalar and anything else.
    argnums : int or sequence of int
        Which positional arguments to differentiate. A sequence gives a tuple of gradients.
    has_aux : bool
        Whether f returns ``(value, aux)``. The result is then ``((value, aux), gradient)``.

    Raises
    ------
    ShapeError
        If f does not return a scalar.
    InputError
        If `argnums` names an argument that is not given.
    DTypeError
        If such an argument is not of floats.
    """

    @wraps(f)
    def differentiated(*args: Any, **options: Any) -> Any:
        positions = _positions(args, argnums, "grad")
        aux: list[Any] = []

        def scalar(*chosen: Any) -> Any:
            returned: Any = f(*_replace(args, positions, chosen), **options)
            if has_aux:
                try:
                    returned, extra = returned
                except (TypeError, ValueError):
                    raise InputError(
                        "grad: has_aux=True, but f did not return a pair.", "return (value, aux)."
                    ) from None
                aux.append(extra)
            if returned is None:
                raise InputError("grad: f returned None, not a scalar.", "return the loss.")
            if np.shape(returned) != ():
                raise ShapeError(
                    f"grad: f returned shape {np.shape(returned)}, not a scalar.",
                    "reduce it with sum() or mean(), or use vjp or jacrev.",
                )
            return returned

        chosen = [args[i] for i in positions]
        value, pullback = vjp(scalar, *chosen)
        one = np.ones((), getattr(value, "dtype", None))
        gradients = pullback(one)
        gradient = gradients[0] if isinstance(argnums, int) else gradients
        return ((value, _leave_all(aux[0], chosen, False)), gradient) if has_aux else (value, gradient)

    return differentiated


def grad(f: Function, argnums: int | Sequence[int] = 0, has_aux: bool = False) -> Function:
    """A function that returns the gradient of the scalar function `f`; ``(gradient, aux)`` with `has_aux`.

    Parameters and errors as for `value_and_grad`.
    """
    with_value = value_and_grad(f, argnums, has_aux)

    @wraps(f)
    def differentiated(*args: Any, **options: Any) -> Any:
        value, gradient = with_value(*args, **options)
        return (gradient, value[1]) if has_aux else gradient

    return differentiated


# ---- forward mode -------------------------------------------------------------------------------------------------


def jvp(f: Function, primals: Sequence[Any], tangents: Sequence[Any]) -> tuple[Any, Any]:
    """The value of ``f(*primals)`` and its derivative along `tangents`, by going forwards along the tape.

    Parameters
    ----------
    f : callable
    primals, tangents : sequence
        Arguments, and directions of the same structure and shapes.

    Returns
    -------
    value, tangent
        Of the same structure.
    """
    _check_sequences("jvp", primals, tangents)
    value, push = linearize(f, *primals)
    return value, push(*tangents)


def linearize(f: Function, *primals: Any) -> tuple[Any, Callable[..., Any]]:
    """The value of ``f(*primals)`` and the function ``push(*tangents)``, its derivative there as a linear map."""
    inner = _enter(primals, "jvp")
    start = take_number()
    with _inside(), Tape(keep_calls=True) as tape:
        value = f(*inner)
    differentiable = _is_inner(primals, flatten(value), start)

    def push(*tangents: Any) -> Any:
        given = flatten(tangents)
        tracked = flatten(inner)
        if len(given) != len(tracked):
            raise ShapeError(f"jvp: {len(given)} tangents for {len(tracked)} primals.", "pass one for each.")
        known: dict[Node, Any] = {}
        for i, (x, t) in enumerate(zip(tracked, given, strict=True)):
            if np.shape(t) != x.shape:
                raise ShapeError(
                    f"jvp: tangent {i} has shape {np.shape(t)}, its primal has {x.shape}.",
                    "a tangent has its primal's own shape.",
                )
            known[x.node] = _lift(t, x.dtype) if differentiable else _bare(t, x.dtype)
        with enable_grad() if differentiable else no_grad():
            push_forward(tape.records, known, differentiable)

        def tangent_of(out: Any) -> Any:
            node = out.node if isinstance(out, Tensor) else None
            found = known.get(node) if node is not None else None
            return np.zeros(np.shape(out), getattr(out, "dtype", None)) if found is None else found

        return _leave_all(map_leaves(tangent_of, value), primals, differentiable)

    return _leave_all(value, primals, differentiable), push


# ---- Jacobians and Hessians ---------------------------------------------------------------------------------------


def jacrev(f: Function, argnums: int | Sequence[int] = 0) -> Function:
    """The Jacobian by reverse mode: one backward walk for every element of the result.

    Parameters
    ----------
    f : callable
        Takes and returns arrays or Tensors.
    argnums : int or sequence of int
        Which arguments to differentiate; a sequence gives a tuple of Jacobians.

    Returns
    -------
    callable
        Gives an array of shape ``value.shape + argument.shape``.
    """

    @wraps(f)
    def jacobian(*args: Any, **options: Any) -> Any:
        positions = _positions(args, argnums, "jacrev")
        chosen = [args[i] for i in positions]
        _each_an_array(chosen, "jacrev")
        value, pullback = vjp(lambda *xs: f(*_replace(args, positions, xs), **options), *chosen)
        _one_array(value, "jacrev")
        rows = [pullback(basis) for basis in _basis(value)]
        columns = [_assemble([row[k] for row in rows], np.shape(value), x, True) for k, x in enumerate(chosen)]
        return columns[0] if isinstance(argnums, int) else tuple(columns)

    return jacobian


def jacfwd(f: Function, argnums: int | Sequence[int] = 0) -> Function:
    """The Jacobian by forward mode: the function is recorded once and pushed forward for every element of the input.

    Parameters and result as for `jacrev`.
    """

    @wraps(f)
    def jacobian(*args: Any, **options: Any) -> Any:
        positions = _positions(args, argnums, "jacfwd")
        chosen = [args[i] for i in positions]
        _each_an_array(chosen, "jacfwd")
        value, push = linearize(lambda *xs: f(*_replace(args, positions, xs), **options), *chosen)
        _one_array(value, "jacfwd")
        zeros = [np.zeros(np.shape(x), getattr(x, "dtype", None)) for x in chosen]
        columns: list[Any] = []
        for k, x in enumerate(chosen):
            pushed = [push(*_replace(tuple(zeros), [k], [basis])) for basis in _basis(x)]
            columns.append(_assemble(pushed, np.shape(value), x, False))
        return columns[0] if isinstance(argnums, int) else tuple(columns)

    return jacobian


def hessian(f: Function, argnums: int = 0) -> Function:
    """The matrix of second derivatives of a scalar function, of shape ``argument.shape * 2``: `jacrev` of `grad`."""
    return jacrev(grad(f, argnums), argnums)


def hvp(f: Function, primals: Sequence[Any], tangents: Sequence[Any]) -> Any:
    """The Hessian of the scalar function `f` times a vector, at the cost of a few gradients (Pearlmutter 1994).

    Forward mode over reverse mode: the derivative of the gradient along `tangents`.

    Parameters
    ----------
    f : callable
    primals, tangents : sequence
        Arguments, and directions of the same shapes.

    Returns
    -------
    array, or tuple of arrays if there are several primals
    """
    _check_sequences("hvp", primals, tangents)
    argnums = 0 if len(primals) == 1 else tuple(range(len(primals)))
    return jvp(grad(f, argnums), primals, tangents)[1]


# ---- shared -------------------------------------------------------------------------------------------------------


@contextmanager
def _inside() -> Generator[None]:
    context = here.context
    context.depth += 1
    try:
        with enable_grad():
            yield
    finally:
        context.depth -= 1


def _enter(primals: Any, what: str) -> Any:
    """The arguments as tracked Tensors of the inner function's own."""

    def enter(x: Any) -> Tensor:
        if isinstance(x, Tensor) and x.node is not None:
            with enable_grad():
                return boundary(x)
        made = Tensor(x)
        if made.dtype.kind != "f":
            raise DTypeError(
                f"{what}: an argument to be differentiated has dtype {made.dtype}.", "only floats have gradients."
            )
        made.requires_grad = True
        return made

    return map_leaves(enter, primals)


def _is_inner(primals: Any, outputs: list[Any], start: int) -> bool:
    """Whether the derivative may itself be differentiated: inside another transform, or on Tensors."""
    if not here.context.recording:
        return False
    if not here.context.depth and not any(isinstance(x, Tensor) for x in flatten(primals)):
        return False
    if any(isinstance(x, Tensor) and x.node is not None for x in flatten(primals)):
        return True
    heads = [x.node for x in outputs if isinstance(x, Tensor) and x.node is not None]
    inputs = {node for node in reachable(heads) if node.number < start}
    return len(inputs) > len(flatten(primals)) or here.context.depth > 0


def _lift(x: Any, dtype: Any) -> Tensor:
    return x if isinstance(x, Tensor) else Tensor(np.asarray(x, dtype))


def _bare(x: Any, dtype: Any) -> Any:
    return np.array(x.raw if isinstance(x, Tensor) else x, dtype)


def _leave(x: Any, like: Any) -> Any:
    """A result as what was given: an array for an array, unless that would cut an outer tape."""
    if isinstance(x, Tensor):
        return x if x.node is not None or isinstance(like, Tensor) else x.raw
    return Tensor(x) if isinstance(like, Tensor) else np.array(x)


def _leave_all(value: Any, primals: Any, differentiable: bool) -> Any:
    """Results of the inner function as its caller sees them."""
    as_tensors = any(isinstance(x, Tensor) for x in flatten(primals))

    def leave(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x if differentiable else x.detach() if as_tensors else x.numpy()
        return Tensor(x) if as_tensors and isinstance(x, np.ndarray) else x

    return map_leaves(leave, value)


def _check_sequences(what: str, primals: Any, tangents: Any) -> None:
    for name, given in (("primals", primals), ("tangents", tangents)):
        if not isinstance(given, list | tuple):
            raise DTypeError(
                f"{what}: {name} is a {type(given).__name__}, not a tuple of arguments.", f"{what}(f, (x,), (v,))."
            )


def _positions(args: tuple[Any, ...], argnums: int | Sequence[int], what: str) -> list[int]:
    positions = [argnums] if isinstance(argnums, int) else list(argnums)
    for i in positions:
        if not isinstance(cast(Any, i), int):
            raise DTypeError(f"{what}: argnums has {i!r}, a {type(i).__name__}.", "use integers.")
        if not -len(args) <= i < len(args):
            raise InputError(
                f"{what}: argnums has {i}, but {len(args)} positional arguments were given.",
                "pass what is to be differentiated by position.",
            )
    positions = [i % len(args) for i in positions]
    if len(set(positions)) < len(positions):
        raise InputError(f"{what}: argnums is {argnums}, so one argument twice.", "name each once.")
    return positions


def _replace(args: tuple[Any, ...], positions: Sequence[int], values: Sequence[Any]) -> list[Any]:
    replaced = list(args)
    for i, value in zip(positions, values, strict=True):
        replaced[i] = value
    return replaced


def _one_array(value: Any, what: str) -> None:
    if value is None or len(flatten(value)) != 1 or flatten(value)[0] is not value:
        raise InputError(f"{what}: f returned a {value.__class__.__name__}, not one array.", "return one array.")


def _each_an_array(arguments: list[Any], what: str) -> None:
    for x in arguments:
        if x is None or isinstance(x, dict | list | tuple):
            raise DTypeError(
                f"{what}: an argument to be differentiated is a {type(cast(Any, x)).__name__}, not one array.",
                "pass its parts as arguments of their own, with argnums.",
            )


def _basis(like: Any) -> Iterator[Any]:
    """The unit arrays of a shape."""
    shape, size = np.shape(like), int(np.prod(np.shape(like)))
    for i in range(size):
        unit = np.zeros(size, getattr(like, "dtype", None))
        unit[i] = 1
        yield unit.reshape(shape)


def _assemble(slices: list[Any], value_shape: tuple[int, ...], argument: Any, rows: bool) -> Any:
    """Rows dvalue[i]/dargument, or columns dvalue/dargument[j], as one array: value.shape + argument.shape."""
    shape = (*value_shape, *np.shape(argument))
    if not slices:
        empty = np.zeros(shape, getattr(argument, "dtype", None))
        return Tensor(empty) if isinstance(argument, Tensor) else empty
    flat = np.stack([np.reshape(x, (-1,)) for x in slices], axis=0 if rows else 1)
    return np.reshape(flat, shape)
