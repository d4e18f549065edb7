"""Probes: zeros that a step over time is given, at which the backward walk leaves the norms of what passes.

A probe takes no part in any value. Its "gradient" is by declaration the norm of the gradient that passes, in each row
of the batch, so the norms of dL/dh_t for all t are the gradient of one input of the scan, (T, B). A kernel computes
them where the gradient lies in registers, and writes nothing else.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from ..engine.op import Operand, op
from ..engine.tensor import Tensor
from ..engine.tree import flatten, unflatten

__all__ = [
    "Probes",
    "Watch",
    "added",
    "entering",
    "measured",
    "probed",
    "row_norms",
    "rows_of",
    "watched_by",
    "watching",
]

Shape = tuple[int, ...]

# Squares leave the range of floats long before norms do, so small and large ones are scaled, all in one pass over the
# gradient (Blue 1978). By the bytes of a float: below which norm, above which, and by which power of two.
_SCALES = {4: (1e-12, 1e15, 72), 8: (1e-100, 1e100, 540)}


@op
def measured(value: Operand, probe: Operand) -> Any:
    """`value`, (B, ...); the gradient of `probe`, (B,), is the norm of the gradient in each row."""
    return value


@measured.vjp
def _(g: Any) -> Any:
    return g, row_norms(g)


@op
def added(value: Operand, probe: Operand) -> Any:
    """`value`; the gradient of `probe`, of the same shape, is that of `value`."""
    return value


@added.vjp
def _(g: Any) -> Any:
    return g, g


@op
def entering(value: Operand, probe: Operand) -> Any:
    """`value`, (B, ...); the gradient of `probe`, (B,), is the sum of absolute values of the gradient in each row."""
    return value


@entering.vjp
def _(g: Any) -> Any:
    size = np.abs(g)
    return g, size if g.ndim == 1 else np.sum(size, axis=tuple(range(1, g.ndim)))


def row_norms(g: Any) -> Any:
    """The Euclidean norm over all axes but the first, from the smallest normal float to the largest."""
    if g.ndim == 1:
        return np.abs(g)
    if g.dtype == np.float16:
        g = g.astype(np.float32)
    small, large, power = _SCALES[g.dtype.itemsize]
    axes = tuple(range(1, g.ndim))

    def norm(factor: float) -> Any:
        part = g * factor
        return np.sqrt(np.sum(part * part, axis=axes)) / factor

    usual = norm(1.0)
    extreme = cast(Any, np.where(usual < small, norm(2.0**power), norm(2.0**-power)))
    return cast(Any, np.where((usual >= small) & (usual <= large), usual, extreme))


class Probes(NamedTuple):
    """The probes of a step; with a leading axis of steps, xs of a scan.

    Attributes
    ----------
    state : tuple of (Tensor or None)
        One for each leaf of the carry after the step: (B,) for a leaf with rows, else of the leaf's shape. None for
        a leaf without gradients.
    out : Tensor or None
        For what is put out, (B,): only whether a gradient enters there, which is cheaper than a norm.
    """

    state: tuple[Any, ...]
    out: Any = None


def probed(after: Any, y: Any, probes: Probes) -> tuple[Any, Any]:
    """A step's carry and y, watched. Where y is itself a leaf of the carry, both are what is then watched."""
    before, outputs = flatten(after), flatten(y)
    if len(before) != len(probes.state):
        return after, y  # the loop refuses it, and says why
    leaves = [_watched(leaf, probe) for leaf, probe in zip(before, probes.state, strict=True)]
    places = {id(leaf): i for i, leaf in enumerate(before)}
    outputs = [leaves[places[id(out)]] if id(out) in places else out for out in outputs]
    if probes.out is not None:
        outputs = [_entering(out, probes.out) for out in outputs]
    return unflatten(after, leaves), unflatten(y, outputs)


def _watched(leaf: Any, probe: Any) -> Any:
    if probe is None or not isinstance(leaf, Tensor) or leaf.dtype.kind != "f":
        return leaf
    if leaf.shape == probe.shape:
        return added(leaf, probe)
    return measured(leaf, probe) if leaf.shape[:1] == probe.shape else leaf


def _entering(out: Any, probe: Any) -> Any:
    has_rows = isinstance(out, Tensor) and out.dtype.kind == "f" and out.shape[:1] == probe.shape and out.size
    return entering(out, probe) if has_rows else out


def rows_of(shapes: Sequence[Shape]) -> int | None:
    """How many rows a carry with leaves of these shapes has; None where there is no axis for them."""
    rank = max(map(len, shapes), default=0)
    return next(shape[0] for shape in shapes if len(shape) == rank) if rank > 1 else None


# ---- who watches ----------------------------------------------------------------------------------------------------


class Watch(Protocol):
    """Somebody who looks at the loops over time that run meanwhile."""

    def probes(self, owner: Any, name: str, labels: Sequence[str], state: Any, steps: int, reverse: bool) -> Any:
        """The `Probes` for a loop that begins with `state`; None for none.

        `owner` is the layer or the step function, `name` which of its loops this is, `labels` name the state's leaves.
        """
        ...

    def step(self, step: Any) -> Any:
        """What is to be run in its place, step by step, in the loop last asked for; None: the loop runs as ever."""
        ...


_watch: ContextVar[Watch | None] = ContextVar("tinytape_watch", default=None)


def watching() -> Watch | None:
    """Who watches in this thread."""
    return _watch.get()


@contextmanager
def watched_by(watch: Watch) -> Generator[None]:
    """Let `watch` look at every loop inside."""
    token = _watch.set(watch)
    try:
        yield
    finally:
        _watch.reset(token)
