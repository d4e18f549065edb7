"""What a stream is made of: stretches of inputs, targets and resets, joined as they come and cut into windows."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.tensor import Tensor
from ..engine.tree import flatten, is_array, map_leaves, unflatten
from .scan import leaf_names

__all__ = ["Flags", "Held", "Layout", "Stretch", "stretch"]

Flags = npt.NDArray[np.bool_]


class Layout(NamedTuple):
    """Which axis of inputs, targets and outputs is time, and how many rows there are; None: a single sequence."""

    axis: int = 0
    rows: int | None = None


@dataclass(frozen=True)
class Stretch:
    """Some steps of a stream: arrays laid out as they were given, but for `reset`, which is (T, B) or (T,)."""

    x: Any
    targets: Any
    reset: Flags | None
    steps: int
    layout: Layout

    def cut(self, start: int, stop: int) -> Stretch:
        """The steps start, ..., stop - 1, as views."""
        x, targets = (self.of(nest, start, stop) for nest in (self.x, self.targets))
        reset = None if self.reset is None else self.reset[start:stop]
        return replace(self, x=x, targets=targets, reset=reset, steps=stop - start)

    def of(self, nest: Any, start: int, stop: int) -> Any:
        """These steps of `x` or of `targets`."""
        return map_leaves(itemgetter((slice(None),) * self.layout.axis + (slice(start, stop),)), nest)

    def copied(self) -> Stretch:
        """The same with memory of its own."""
        return replace(self, x=map_leaves(np.array, self.x), targets=map_leaves(np.array, self.targets))

    @property
    def form(self) -> list[tuple[tuple[int, ...], np.dtype[Any]]]:
        """What has to be the same all along a stream: shapes but for the steps, and dtypes."""
        axis = self.layout.axis
        return [((*part.shape[:axis], *part.shape[axis + 1 :]), part.dtype) for part in flatten(self.x)]


class Held:
    """The part of a stream that is at hand: what the next window looks back on, and what was read beyond."""

    def __init__(self, begin: int = 0, layout: Layout | None = None) -> None:
        self.layout = layout or Layout()
        self.end = begin
        self._pieces: list[tuple[int, Stretch]] = []  # each with the step that it begins at

    def append(self, piece: Stretch) -> None:
        self._pieces.append((self.end, piece))
        self.layout = piece.layout
        self.end += piece.steps

    def fill(self, pieces: Iterator[Stretch], stop: int) -> int:
        """Read on until the steps before `stop` are at hand; returns where they end."""
        while self.end < stop and (piece := next(pieces, None)) is not None:
            self.append(piece)
        return min(self.end, stop)

    def check(self, found: Stretch, carried: bool) -> None:
        """What comes next fits what is at hand, and the state that is carried.

        Raises
        ------
        ShapeError
        """
        if (carried or self._pieces) and found.layout.rows != self.layout.rows:
            was, now = ("no rows" if n is None else f"{n} rows" for n in (self.layout.rows, found.layout.rows))
            raise ShapeError(
                f"truncated: the carried state is of {was}, x has {now}.",
                "drop a short last batch, or start a new stream with reset_state().",
            )
        if self._pieces and found.form != (wanted := self._pieces[-1][1].form):
            raise ShapeError(
                f"truncated: from step {self.end} on x is {_told(found.form)}, before it was {_told(wanted)}.",
                "a stream keeps its features and its dtype; reset_state() starts a new one.",
            )

    def drop(self, before: int) -> None:
        """Let go of what lies wholly before a step."""
        self._pieces = [(begin, piece) for begin, piece in self._pieces if begin + piece.steps > before]

    def keep(self, start: int, stop: int) -> None:
        """Let go of everything but some steps, which are copied: the arrays of a call are its caller's."""
        kept = self.part(start, stop)
        self._pieces, self.end = [], start
        if kept is not None:
            self.append(kept.copied())
        self.end = stop

    def mark(self, step: int, rows: Flags) -> None:
        """Reset some rows before a step, too."""
        for i, (begin, piece) in enumerate(self._pieces):
            if begin <= step < begin + piece.steps:
                flags = np.zeros((piece.steps, len(rows)), np.bool_) if piece.reset is None else piece.reset.copy()
                flags[step - begin] |= rows
                self._pieces[i] = begin, replace(piece, reset=flags)

    def part(self, start: int, stop: int) -> Stretch | None:
        """The steps start, ..., stop - 1 in one, without targets; None if there are none."""
        if start == stop:
            return None
        return Stretch(self.inputs(start, stop), None, self.flags(start, stop), stop - start, self.layout)

    def inputs(self, start: int, stop: int) -> Any:
        """The x of some steps."""
        return self._joined([piece.of(piece.x, a, b) for piece, a, b in self._within(start, stop)])

    def targets(self, start: int, stop: int) -> Any:
        """The targets of some steps; None if there are none."""
        within = self._within(start, stop)
        missing = [piece.targets is None for piece, *_ in within]
        if any(missing) and not all(missing):
            raise InputError(
                f"truncated: of the steps {start} to {stop - 1} some have targets and some have none.",
                "give targets with every chunk, or with none.",
            )
        return None if missing[0] else self._joined([piece.of(piece.targets, a, b) for piece, a, b in within])

    def flags(self, start: int, stop: int) -> Flags | None:
        """Which rows are reset before which of some steps; None if none is."""
        within = self._within(start, stop)
        if all(piece.reset is None for piece, *_ in within):
            return None
        rows = () if self.layout.rows is None else (self.layout.rows,)
        parts = [
            np.zeros((b - a, *rows), np.bool_) if piece.reset is None else piece.reset[a:b] for piece, a, b in within
        ]
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        return found if found.any() else None

    def _within(self, start: int, stop: int) -> list[tuple[Stretch, int, int]]:
        """The pieces that have some of these steps, and which of theirs."""
        return [
            (piece, max(start - begin, 0), min(stop - begin, piece.steps))
            for begin, piece in self._pieces
            if begin < stop and start < begin + piece.steps
        ]

    def _joined(self, nests: list[Any]) -> Any:
        if len(nests) == 1:
            return nests[0]
        return map_leaves(lambda *parts: np.concatenate(parts, axis=self.layout.axis), *nests)


def stretch(x: Any, targets: Any, reset: Any, batch_first: bool) -> Stretch:
    """What a user gives as a part of a stream, checked by itself.

    A single array of floats with two axes is a single sequence, as for layers, and so is a vector.

    Raises
    ------
    ShapeError, DTypeError, InputError
    """
    inputs = _arrays("x", x)
    parts: list[Any] = flatten(inputs)
    if not parts or any(part.ndim == 0 for part in parts):
        raise ShapeError("truncated: x has no axis of steps.", "pass (T, B, ...), or (T, features).")
    single = len(parts) == 1 and (parts[0].ndim == 1 or (parts[0].ndim == 2 and parts[0].dtype.kind == "f"))
    axis = int(batch_first and not single)
    layout = Layout(axis, None if single or parts[0].ndim == 1 else parts[0].shape[1 - axis])
    steps = parts[0].shape[axis]
    if steps == 0:
        raise ShapeError(f"truncated: x has shape {parts[0].shape}, 0 steps.", "pass at least one step.")
    goals = _arrays("targets", targets)
    for name, nest in (("x", inputs), ("targets", goals)):
        for part, leaf in zip(flatten(nest), leaf_names(name, nest), strict=True):
            if part.shape[axis : axis + 1] != (steps,):
                raise ShapeError(
                    f"truncated: {leaf} has shape {part.shape}, x has {steps} steps on axis {axis}.",
                    "give one for each step, laid out as x.",
                )
    return Stretch(inputs, goals, None if reset is None else _flags(reset, steps, layout), steps, layout)


def _arrays(name: str, nest: Any) -> Any:
    """A nest of arrays or Tensors as plain arrays."""
    found: list[Any] = []
    for part, leaf in zip(flatten(nest), leaf_names(name, nest), strict=True):
        if isinstance(part, Tensor) and part.requires_grad:
            raise InputError(
                f"truncated: {leaf} requires gradients; a window's backward() would free what it was computed by.",
                f"pass {leaf}.detach(), or put what computes it into the model that runs over time.",
            )
        if not (isinstance(part, Tensor) or is_array(part)):
            raise DTypeError(f"truncated: {leaf} is a {type(part).__name__}.", "pass arrays or Tensors.")
        found.append(part.data if isinstance(part, Tensor) else part)
    return unflatten(nest, found)


def _flags(reset: Any, steps: int, layout: Layout) -> Flags:
    found = reset.data if isinstance(reset, Tensor) else np.asarray(reset)
    if found.dtype != np.bool_:
        raise DTypeError(f"truncated: reset is {found.dtype}.", "pass bools: reset.astype(bool).")
    wanted = (steps,) if layout.rows is None else (steps, layout.rows)[:: -1 if layout.axis else 1]
    if found.shape != wanted:
        raise ShapeError(
            f"truncated: reset has shape {found.shape}, x has {wanted} steps and rows.", f"pass one of {wanted}."
        )
    return np.array(found.T if layout.axis else found)


def _told(form: list[tuple[tuple[int, ...], np.dtype[Any]]]) -> str:
    return ", ".join(f"{dtype}{list(shape)}" for shape, dtype in form) + " a step"
