"""A program in the making: its lines, the values and weights they may use, and the choices."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

__all__ = ["Value", "Writer"]


@dataclass
class Value:
    """A name in the program: an array (B, *sides)."""

    name: str
    sides: tuple[int, ...]
    size: float = 1.0  # about how large its entries are
    flags: bool = False  # of bools
    used: bool = False

    def __str__(self) -> str:
        return self.name


class Writer:
    """A random program.

    It is made from a few seeds: one for the whole, and one for each part, stirred in by `stir` before that part is
    written. So Hypothesis can leave out the last parts, and what comes before stays as it is; were every choice a draw
    of its own, most programs would be small and alike.
    """

    def __init__(self, features: frozenset[str], seed: int, steps: int, rows: int, widths: list[int]) -> None:
        self.features, self.steps, self.rows, self.widths = features, steps, rows, widths
        self.random = random.Random(seed)
        self.used: set[str] = set()
        self.header: list[str] = []
        self.body: list[str] = []
        self.values: list[Value] = []
        self.matrices: dict[str, tuple[int, int]] = {}
        self.captured: list[str] = []
        self.dropouts: list[Value] = []  # masks among the inputs
        self.clocks: list[str] = []  # inputs that are one number a step
        self.counter = ""  # an integer in the carry
        self.count = 0

    # ---- choices

    def stir(self, seed: int) -> None:
        """Let the choices from here on depend on the seed too."""
        self.random.seed(f"{self.random.random()} {seed}")

    def one_of(self, *options: Any) -> Any:
        return self.random.choice(options)

    def between(self, low: int, high: int) -> int:
        return self.random.randint(low, high)

    def often(self) -> bool:
        return self.random.random() < 0.75

    def seldom(self) -> bool:
        return self.random.random() < 0.25

    def width(self) -> int:
        return self.one_of(*self.widths)

    def memory(self) -> tuple[int, int]:
        """The sides of a memory: of one that there is, or of a new one."""
        there = [v.sides for v in self.values if len(v.sides) == 2 and not v.flags]
        return self.one_of(*there) if there else (self.one_of(1, 2, 3), self.width())

    def axis(self, axis: int, ndim: int) -> int:
        """The axis, counted from either end."""
        return self.one_of(axis, axis - ndim)

    def one_with(self, *features: str) -> str:
        """What kind a carry or an input is: of plain rows, or what one of these features brings."""
        kind = self.one_of("rows", "rows", *(feature for feature in features if feature in self.features))
        self.used |= {kind} & self.features
        return kind

    def at_hand(self, lines: Iterable[str]) -> list[str]:
        """The features among `lines` that can be written, given what is carried and put in."""
        needs = {"counter": self.counter, "dropout": self.dropouts, "shared inputs": self.clocks}
        return sorted(feature for feature in self.features.intersection(lines) if needs.get(feature, True))

    # ---- lines

    def name(self, prefix: str) -> str:
        self.count += 1
        return f"{prefix}{self.count}"

    def let(self, expression: str, sides: tuple[int, ...], size: float = 1.0, flags: bool = False) -> Value:
        """A line ``v = expression``; what has grown is brought back."""
        if size > 8 and not flags:
            expression, size = f"4 * tt.tanh(({expression}) / 4)", 4.0
        value = Value(self.name("v"), sides, size, flags)
        self.body.append(f"{value} = {expression}")
        self.values.append(value)
        return value

    def weight(self, prefix: str, shape: tuple[int, ...], scale: float = 0.5, about: float = 0.0) -> str:
        """A captured tensor."""
        name, make = self.name(prefix), "constant" if self.seldom() else "leaf"
        centre = f"{about:g} + " if about else ""
        self.header.append(f"{name} = {make}({centre}{scale:.3g} * rng.uniform(-1, 1, {shape}))")
        self.captured.append(name)
        return name

    def matrix(self, rows: int, columns: int) -> str:
        """An expression for a matrix of weights: a captured one, perhaps used before, or a piece of some."""
        how = self.one_of("plain", "plain", "transposed", "inside", "outside")
        if how == "transposed":
            return f"{self.stored(columns, rows, rows)}.T"
        if how == "plain" or "derived weights" not in self.features:
            return self.stored(rows, columns, rows)
        self.used.add("derived weights")
        expression = self.derived(rows, columns)
        if how == "inside":
            return expression
        name = self.name("D")
        self.header.append(f"{name} = {expression}")
        return name

    def stored(self, rows: int, columns: int, fan: int) -> str:
        same = [name for name, shape in self.matrices.items() if shape == (rows, columns)]
        if same and self.one_of(True, False):
            return self.one_of(*same)
        name = self.weight("W", (rows, columns), 1.5 / math.sqrt(fan))
        self.matrices[name] = (rows, columns)
        return name

    def derived(self, rows: int, columns: int) -> str:
        how, axis = self.one_of("slice", "joined", "scaled"), self.one_of(0, 1)
        if how == "slice":
            start, more = self.one_of(0, 1), self.one_of(0, 2)
            shape = [rows, columns]
            shape[axis] += start + more
            index = f"{start}:{start + (rows, columns)[axis]}"
            return f"{self.stored(*shape, rows)}[{index if axis == 0 else f':, {index}'}]"
        parts = (rows, columns)[axis]
        if how == "joined" and parts > 1:
            cut = self.between(1, parts - 1)
            shapes = [(cut, columns), (rows - cut, columns)] if axis == 0 else [(rows, cut), (rows, columns - cut)]
            one, other = (self.stored(*shape, rows) for shape in shapes)
            return f"tt.concatenate([{one}, {other}], axis={axis})"
        return f"({self.stored(rows, columns, rows)} * 0.5)"

    # ---- values

    def some(self, fitting: list[Value]) -> Value:
        """One of these, with a preference for what is not used yet: else most of a program would lead nowhere."""
        loose = [v for v in fitting if not v.used]
        value = self.one_of(*(loose if loose and self.often() else fitting))
        value.used = True
        return value

    def pick(self, *lengths: int) -> Value:
        """Some value of floats whose rows have so many axes."""
        return self.some([v for v in self.values if not v.flags and (not lengths or len(v.sides) in lengths)])

    def of(self, sides: tuple[int, ...]) -> Value:
        """A value of these sides: one that there is, or a new one."""
        fitting = [v for v in self.values if v.sides == sides and not v.flags]
        if fitting and self.often():
            return self.some(fitting)
        row = self.pick(1)
        if sides == ():
            return self.let(f"tt.sum({row}, axis=-1) * {1 / row.sides[0]:.3g}", (), row.size)
        if len(sides) == 1:
            return self.let(f"{row} @ {self.matrix(*row.sides, *sides)}", sides, row.size)
        flat = math.prod(sides)
        shape = self.one_of((-1, *sides), (self.rows, *sides))
        return self.let(f"tt.reshape({row} @ {self.matrix(*row.sides, flat)}, {shape})", sides, row.size)

    def mask(self, sides: tuple[int, ...]) -> str:
        """An expression for bools that broadcast to `sides`."""
        ready = [v for v in self.values if v.flags and v.sides in (sides, (1,) * len(sides), ())]
        if ready and self.often():
            flags = self.some(ready)
            mask = f"{flags}{'[:, None]' * (len(sides) - len(flags.sides))}"
        else:
            a = self.of(sides)
            other = str(self.of(sides)) if self.one_of(True, False) else f"{self.one_of(0.0, 0.25, -0.5)}"
            mask = f"({a} {self.one_of('>', '<=', '<', '>=')} {other})"
        return f"tt.logical_not({mask})" if self.seldom() else mask
