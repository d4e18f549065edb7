"""Forward mode: going along recorded calls, oldest first, with the tangent of every value.

What an op declares of itself is enough (see `Op.kind`); the tape must have been recorded with ``keep_calls``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from .op import Op
from .recording import Record
from .tape import Node, enable_grad, walk
from .tensor import Tensor

__all__ = ["push_forward"]


def push_forward(records: list[Record], tangents: dict[Node, Any], differentiable: bool) -> None:
    """Go along recorded calls and add the tangent of every result that depends on those in `tangents`."""
    for record in records:
        moving = [tangents.get(x.node) if isinstance(x, Tensor) and x.node is not None else None for x in record.args]
        if all(t is None for t in moving):
            continue
        declared = record.node.op
        assert declared is not None
        outs: tuple[Tensor, ...] = record.out if declared.several else (record.out,)
        if differentiable:
            args, values = record.args, outs
        else:
            args = tuple(x.raw if isinstance(x, Tensor) else x for x in record.args)
            values = tuple(x.raw for x in outs)
        found = _tangent(declared, args, record.params, values, moving)
        for out, tangent in zip(outs, found if declared.several else (found,), strict=True):
            if out.node is not None:
                tangents[out.node] = tangent


def _tangent(
    declared: Op, args: tuple[Any, ...], options: dict[str, Any], outs: tuple[Any, ...], moving: list[Any]
) -> Any:
    """The tangent of one op's result, from what its declaration says of it."""

    def values_of(names: tuple[str, ...]) -> list[Any]:
        known = {"out": outs[0], "wants": tuple(t is not None for t in moving), **options}
        if declared.variadic:
            known[declared.arguments[0]] = args
            known[f"{declared.arguments[0]}_shape"] = tuple(np.shape(x) for x in args)
        else:
            known.update(zip(declared.arguments, args, strict=True))
            known.update({f"{name}_shape": np.shape(x) for name, x in zip(declared.arguments, args, strict=True)})
        return [known[name] for name in names]

    def evaluate(arguments: Sequence[Any]) -> Any:
        return declared.function(*arguments, **options)

    terms: list[Any] = []
    if declared.tangent_rule is not None:
        filled = [np.zeros_like(x) if t is None else t for x, t in zip(args, moving, strict=True)]
        return declared.tangent_rule(*filled, *values_of(declared.tangent_needs))
    if declared.kind == "elementwise":
        needed = values_of(declared.needs)
        for i, tangent in enumerate(moving):
            if tangent is not None:
                if tangent.shape != outs[0].shape:
                    tangent = np.broadcast_to(tangent, outs[0].shape)
                term = declared.rule(tangent, *needed)
                terms.append(term[i] if isinstance(term, tuple) else term)
        return sum(terms[1:], terms[0])
    if declared.kind == "linear":
        return evaluate([np.zeros_like(x) if t is None else t for x, t in zip(args, moving, strict=True)])
    if declared.kind == "multilinear":
        terms = [evaluate([*args[:i], t, *args[i + 1 :]]) for i, t in enumerate(moving) if t is not None]
        return sum(terms[1:], terms[0])
    return _transposed(declared, values_of(declared.needs), outs, moving)


def _transposed(declared: Op, needed: list[Any], outs: tuple[Any, ...], moving: list[Any]) -> Any:
    """Forward mode of an op that declares only its vjp.

    The vjp is linear in g, and its transpose is the jvp: with L(g) = sum of <vjp(g), tangent>, the tangent of the
    result is dL/dg, wherever g is.
    """
    with enable_grad():
        seeds = [Tensor(np.zeros(x.shape, x.dtype), requires_grad=x.dtype.kind == "f") for x in outs]
        gradients: Any = declared.rule(tuple(seeds) if declared.several else seeds[0], *needed)
        if gradients.__class__ is not tuple:
            gradients = (gradients,)
        outer = any(isinstance(x, Tensor) for x in (*needed, *moving, *outs))
        starts: dict[Node, Any] = {}
        for g, tangent in zip(gradients, moving, strict=True):
            if isinstance(g, Tensor) and g.node is not None and tangent is not None:
                along = np.sum(g * tangent)
                one = np.ones((), along.dtype)
                starts[along.node] = Tensor.of(one) if outer else one
        wanted = {seed.node for seed in seeds if seed.node is not None}
        found = walk(starts, wanted, free=False, differentiable=outer)
    results = [found.get(s.node, np.zeros(s.shape, s.dtype)) if s.node is not None else None for s in seeds]
    return results if declared.several else results[0]
