"""`Finding`: what the search for the first non-finite value found, as data and as a few printed lines."""

from __future__ import annotations

import linecache
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import CodeType
from typing import Any, Literal, NamedTuple, cast

import numpy as np

from ..engine.tensor import Tensor
from ..engine.tree import Array, is_array

__all__ = ["NOWHERE", "Finding", "Place", "Range", "is_finite", "place_of_call", "raw_of", "summary"]


class Place(NamedTuple):
    """Where an op was called.

    Attributes
    ----------
    line : str
        The user's own line, as ``train.py:31  z = tt.exp(a)``.
    inner : str
        The line of a layer of tinytape's that this went through, or "".
    layer : str
        The module's path in the model, or the name of its class where the model is not known, or "".
    """

    line: str
    inner: str
    layer: str


NOWHERE = Place("", "", "")


class Range(NamedTuple):
    """What an array holds: its finite entries' least and largest, and how many are not finite."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    least: float
    largest: float
    nans: int
    infinities: int

    def __str__(self) -> str:
        text = f"{self.dtype}{list(self.shape)}"
        if self.least <= self.largest:
            text += f" in [{self.least:.6g}, {self.largest:.6g}]"
        more = [f"{self.nans} NaN"] * bool(self.nans) + [f"{self.infinities} infinite"] * bool(self.infinities)
        return text + (f", {' and '.join(more)}" if more else "")


@dataclass(frozen=True)
class Finding:
    """The first value that was not finite and that mattered. Printed, it is a few lines.

    Attributes
    ----------
    phase : {"forward", "backward"}
    kind : str
        Who is to blame: "op" (the op, or its derivative rule, made it of finite numbers), "sum" (finite gradients
        were added up to it), "parameter", "input" or "constant" (it was there before any op ran), "result" (the
        function returned it, and no op made it).
    op : str
        The op's name; for what is no op's work, the op that read it first.
    name : str
        Of the parameter or input to blame, or "".
    value : Range
        The value itself.
    step, row : int or None
        The time step and the batch row of its first entry that is not finite, where these are known.
    index : tuple of int
        That entry's place.
    place : Place
        Where the op was called: the user's line, the layer.
    parameters : tuple of str
        The parameters that the op read, or that were read last before it in the same time step.
    inputs : list of Range
        What the op, or the rule, was given.
    before : list of (int, float)
        The norms of the same value (backward: of the gradient that the rule was given) at the steps before, in the
        order in which they ran.
    turned : str
        Where an infinity first became a NaN, or "".
    reached : tuple of str
        Parameters whose gradients are not finite (backward).
    masked : str
        What was not finite in the forward pass and did not reach the result, though its derivative may (backward).
    """

    phase: Literal["forward", "backward"]
    kind: Literal["op", "sum", "parameter", "input", "constant", "result"]
    op: str
    value: Range
    index: tuple[int, ...] = ()
    name: str = ""
    step: int | None = None
    row: int | None = None
    place: Place = NOWHERE
    parameters: tuple[str, ...] = ()
    inputs: list[Range] = field(default_factory=lambda: [])
    before: list[tuple[int, float]] = field(default_factory=lambda: [])
    turned: str = ""
    reached: tuple[str, ...] = ()
    masked: str = ""

    def __str__(self) -> str:
        rows = [
            ("value", str(self.value) + (f", first at {list(self.index)}" if self.index else "")),
            ("layer", self.place.layer),
            ("weights", ", ".join(self.parameters)),
            ("line", self.place.line),
            ("inside", self.place.inner),
            *((found.name, str(found)) for found in self.inputs),
            ("before", "; ".join(f"step {step}: {norm:.4g}" for step, norm in self.before)),
            ("then", self.turned),
            ("reached", _several(self.reached)),
            ("earlier", self.masked),
        ]
        wide = max(len(name) for name, text in rows if text)
        return "\n".join([self.title, *(f"  {name:<{wide}}  {text}" for name, text in rows if text)])

    @property
    def title(self) -> str:
        """The first line."""
        kind = _kind(self.value)
        who = {
            "op": f"{self.op} gave {kind}" if self.phase == "forward" else f"the derivative of {self.op} gave {kind}",
            "sum": f"adding up gradients gave {kind}" + (f", on the way into {self.op}" if self.op else ""),
            "parameter": f"parameter {self.name} has {kind}",
            "input": f"{self.name} has {kind} already",
            "constant": f"a constant that {self.op} was given has {kind}",
            "result": f"the result has {kind}, and no op made it",
        }[self.kind]
        if self.kind == "sum" and self.name:
            who += f" in the gradient of {self.name}"
        where = [f"step {self.step}"] * (self.step is not None) + [f"row {self.row}"] * (self.row is not None)
        return f"{', '.join([self.phase, *where])}: {who}"


def _kind(value: Range) -> str:
    return "NaN and infinity" if value.nans and value.infinities else "NaN" if value.nans else "infinity"


def _several(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"gradients of {shown}" + (f" and {len(names) - 4} more" if len(names) > 4 else "") if names else ""


def raw_of(value: Any) -> Array | None:
    """The floats of a Tensor, an array or a number; None for anything else."""
    if isinstance(value, Tensor):
        value = value.raw
    elif isinstance(value, float | np.floating):
        value = np.asarray(cast(Any, value))
    return value if is_array(value) and value.dtype.kind == "f" else None


def is_finite(value: Any) -> bool:
    """Whether it has no NaN and no infinity; what is not of floats has none."""
    raw = raw_of(value)
    return raw is None or bool(np.isfinite(raw).all())


def summary(name: str, value: Any) -> Range:
    """The `Range` of a Tensor, an array or a number."""
    raw = np.asarray(value.raw if isinstance(value, Tensor) else value)
    floats = raw.dtype.kind == "f"
    finite = raw[np.isfinite(raw)] if floats else raw.reshape(-1)
    least, largest = (float(finite.min()), float(finite.max())) if finite.size else (np.inf, -np.inf)
    nans, infinities = (int(np.isnan(raw).sum()), int(np.isinf(raw).sum())) if floats else (0, 0)
    return Range(name, raw.shape, raw.dtype, least, largest, nans, infinities)


_PACKAGE = __name__.split(".", 1)[0] + "."
_LAYERS = _PACKAGE + "nn."


def place_of_call(modules: Mapping[int, str], end: CodeType, beyond: Place) -> Place:
    """The lines and the layer from which an op is being called.

    Parameters
    ----------
    modules : mapping
        The paths of modules by their ids.
    end : code
        A function of ours that calls the user's: what called it is not the user's function.
    beyond : Place
        What is said of what is not found before that.
    """
    frame = sys._getframe(1)  # pyright: ignore[reportPrivateUsage]
    line = inner = layer = ""
    while frame is not None and frame.f_code is not end and not (line and layer):
        name = frame.f_globals.get("__name__", "")
        if not line and not name.startswith(_PACKAGE):
            line = _told(frame.f_code.co_filename, frame.f_lineno)
        elif not line and not inner and name.startswith(_LAYERS):
            inner = _told(frame.f_code.co_filename, frame.f_lineno)
        owner = frame.f_locals.get("self")
        if not layer and hasattr(owner, "named_parameters"):
            layer = modules.get(id(owner)) or type(owner).__name__
        frame = frame.f_back
    if not line:
        line, inner = beyond.line, inner or beyond.inner
    return Place(line, inner, layer or beyond.layer)


def _told(file: str, line: int) -> str:
    return f"{os.path.basename(file)}:{line}  {linecache.getline(file, line).strip()}".rstrip()
