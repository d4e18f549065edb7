"""What the loops of a compiled step are: nests of loops in stages, and where what they compute goes."""

from __future__ import annotations

from dataclasses import dataclass, field

from .program import Piece, Value

__all__ = ["Half", "Nest", "Stage", "Store"]


@dataclass(eq=False)
class Store:
    """A value of a nest goes to `target`: all of it, or one piece of a join; `adding` to what is there."""

    value: Value
    target: Value
    piece: Piece | None = None
    adding: bool = False


@dataclass(eq=False)
class Nest:
    """Loops over one space, the values computed in them, and what of these is stored."""

    reduced: tuple[int, ...] | None = None  # the axes of the reductions in it, if there are any
    values: list[Value] = field(default_factory=list[Value])
    stores: list[Store] = field(default_factory=list[Store])
    again: set[Value] = field(default_factory=set[Value])  # values that an earlier nest has computed too


@dataclass(eq=False)
class Stage:
    """Some products, and then loops over the rows."""

    products: list[Value] = field(default_factory=list[Value])
    nests: list[Nest] = field(default_factory=list[Nest])


@dataclass(eq=False)
class Half:
    """The forward or the backward part of a block of steps.

    Attributes
    ----------
    block, step : list of Stage
        What is done for the whole block at once (before the steps forward, after them backward), and in each step.
    places : dict
        For each value that lies in memory what kind of memory: "history" (all steps), "block", "step", "row" (one row
        at a time), or the name of an array that comes in or goes out. Others stay in registers.
    onto : dict
        Products that are added to what lies in another value's place.
    """

    block: list[Stage]
    step: list[Stage]
    places: dict[Value, str]
    onto: dict[Value, Value]
