"""Where the values of a run lie: tables of addresses for kernels, worked out once for each number of steps and rows.

An entry of a kernel's table is a number that never changes for a layout, or an address: the address of one of the
arrays or blocks of memory that a run uses (a *base*), and a distance from it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from ..engine.tree import Array
from ..kernels import workspace
from ..kernels.address import address_of
from .emit_numba import Entry, Kernel
from .loops import Half
from .program import Program, Value

__all__ = ["ALIGN", "Layout", "Memory", "Pad", "Strides", "strides_of"]

ALIGN = 64  # bytes
SMALL = 1 << 19  # bytes of a thread's working memory: up to here it is kept for the next run, and not counted
VECTOR = 16  # elements


class Strides(NamedTuple):
    """How far the next step and the next row of an array lie, in elements."""

    step: int
    row: int


class Memory:
    """Values side by side in one block of memory."""

    def __init__(self, item: int) -> None:
        self.item = item
        self.offsets: dict[Any, int] = {}
        self.nbytes = 0

    def add(self, key: Any, size: int) -> None:
        self.offsets[key] = self.nbytes
        self.nbytes += -(-size * self.item // ALIGN) * ALIGN


class Space:
    """The memory that one thread needs for a run: what lasts from a forward run to its adjoint, and what does not.

    Parameters
    ----------
    history : dict
        Where a forward run puts its values.
    steps, rows, block : int
        Of the thread; `block` steps are done at once outside of the loop over steps.
    scratch : int
        Elements that products work in.
    """

    def __init__(
        self, program: Program, half: Half, history: dict[Value, str], steps: int, rows: int, block: int, scratch: int
    ) -> None:
        self.program, self.half, self.dtype = program, half, np.dtype(program.dtype)
        self.item = self.dtype.itemsize
        self.steps, self.rows, self.block = steps, rows, block
        self.training = bool(program.carry_seeds)
        self.kept: dict[Value, int] = {}  # where in a row's record a value is kept
        self.record = 0
        for value in sorted((v for v, place in history.items() if place == "history"), key=_is_ragged):
            self.kept[value] = self.record
            self.record += value.size
        if not all(map(_is_ragged, self.kept)):
            self.record = _padded(self.record)
        self.carried = [v for i, v in enumerate(program.carries) if half.places[v] == f"carry{i}"]  # by themselves
        self.history = self._history()
        self.temporary = self._temporary(scratch)
        self.keeps_pads = self.temporary.nbytes <= SMALL

    @property
    def bytes_per_step(self) -> int:
        """What `history` has for each step."""
        return self.rows * (self.record + sum(v.size for v in self.carried)) * self.item

    def _history(self) -> Memory:
        memory = Memory(self.item)
        if self.training:
            memory.add("kept", self.steps * self.rows * self.record)
            for value in self.carried:  # after each step, and before the first one
                memory.add(("before", value), self.rows * value.size)
                memory.add(value, self.steps * self.rows * value.size)
        return memory

    def _temporary(self, scratch: int) -> Memory:
        memory = Memory(self.item)
        for value, place in self.half.places.items():
            if value.kind != "alias" and place in ("block", "step", "row"):
                count = {"block": self.block * self.rows, "step": self.rows, "row": 1}[place]
                memory.add(value, count * _padded(value.size))
        begin = memory.nbytes
        for i, seed in enumerate(self.program.carry_seeds):
            if seed.kind != "none":
                memory.add(("ring", i), 2 * self.rows * seed.size)
        self.rings = begin, memory.nbytes - begin  # where they lie, and how many bytes
        if not self.training:
            for value in self.carried:
                memory.add(value, 2 * self.rows * value.size)
        zeros = max((s.size for s in self.program.output_seeds if s.kind != "none"), default=0)
        self.nbytes_of_zeros = zeros * self.item
        memory.add("zeros", zeros)
        memory.add("scratch", scratch)
        return memory

    def row_before(self, block: workspace.Block | workspace.Chunk, value: Value) -> Array:
        """Where in its history a leaf of the carry lies before the first step."""
        size = self.rows * value.size * self.item
        return block.view(self.program.dtype, (self.rows, *value.shape), self.history.offsets[value] - size)


class Layout(Space):
    """One thread's table for one kernel, beside its memory.

    Parameters
    ----------
    start, total_rows : int
        Which is the thread's first row, and how many rows there are for all threads.
    bases : dict
        The number of each base.
    strides : dict
        Of the arrays that come in: by ("x", i), ("seed_y", i).
    """

    def __init__(
        self,
        space: Space,
        kernel: Kernel,
        start: int,
        total_rows: int,
        bases: dict[Any, int],
        strides: dict[Any, Strides],
    ) -> None:
        vars(self).update(vars(space))
        self.start, self.total_rows, self.bases, self.strides = start, total_rows, bases, strides
        self.history_bytes = self.history.nbytes or ALIGN
        entries = [self._entry(entry) for entry in kernel.entries]
        bases_of_entries = [(i, base) for i, (base, _) in enumerate(entries) if base is not None]
        parts: list[Sequence[int] | Array] = [
            [len(entries), len(bases_of_entries)],
            np.array(kernel.constants, np.float64).view(np.int64),
            [number for _, number in entries],
            [i for i, _ in bases_of_entries],
            [base for _, base in bases_of_entries],
        ]
        self.entries = len(entries)
        self.numbers = np.concatenate([np.asarray(part, np.int64) for part in parts])  # for `kernels.table.addressed`
        self.address = address_of(self.numbers)

    def last(self, block: workspace.Block | workspace.Chunk, value: Value) -> Array:
        """A leaf of the carry that lies by itself, after the last step, for a moment."""
        where, step = (self.history, self.steps - 1) if self.training else (self.temporary, self.steps & 1)
        offset = where.offsets[value] + step * self.rows * value.size * self.item
        return block.view(self.dtype, (self.rows, *value.shape), offset)

    def clear_rings(self, pad: Pad) -> None:
        """No gradient comes back through the carry."""
        offset, nbytes = self.rings
        ctypes.memset(pad.address + offset, 0, nbytes)

    def ring(self, block: workspace.Block, i: int, step: int) -> Array:
        """The gradient of a leaf of the carry, one of two halves for two steps, for a moment."""
        value = self.program.carry_seeds[i]
        offset = self.temporary.offsets["ring", i] + step * self.rows * value.size * self.item
        return block.view(self.dtype, (self.rows, *value.shape), offset)

    # ---- entries -----------------------------------------------------------------------------------------------

    def _entry(self, entry: Entry) -> tuple[int | None, int]:
        """The base of an address, and the number to be added to it."""
        what, of = entry.what, entry.of
        if what == "number":
            return None, entry.number
        if what == "run":
            if of == "scratch":
                return self.bases["temporary"], self.temporary.offsets["scratch"]
            if of in ("earlier", "later"):
                return self.bases[of], 0
            return None, {"steps": self.steps, "rows": self.rows, "block": self.block}[of]
        if what == "weight":
            return self.bases["weight", of[0]], 0
        if what in ("sum", "part"):
            return self.bases[what, of], 0
        if what == "at":
            return self._at(of)
        if what == "kept":
            return None, self.kept[of]
        if what == "step":
            return None, self._strides(of).step
        if what == "row":
            return None, self._strides(of).row
        return None, self.rows * of.size  # the other half of a ring

    def _array(self, value: Any) -> Any:
        """The array from outside that a value lies in."""
        if value.kind in ("carry", "x", "fixed", "seed_y"):
            return value.kind, value.index
        place = self.half.places.get(value, "")
        return place if place.startswith(("ys", "dx", "dfixed")) else None

    def _at(self, value: Any) -> tuple[int, int]:
        if value == "kept":
            return self.bases["history"], self.history.offsets["kept"]
        if value.kind == "invariant":
            return self.bases["invariant", value], 0
        place = self.half.places.get(value, "")
        if value.kind == "seed_carry" or place.startswith("dcarry"):
            index = value.index if value.kind == "seed_carry" else int(place[6:])
            return self.bases["temporary"], self.temporary.offsets["ring", index]
        array = self._array(value)
        if array in self.bases:
            return self.bases[array], self.start * self._strides(value).row * self.item
        if value.kind == "seed_y":
            return self.bases["temporary"], self.temporary.offsets["zeros"]
        if value in self.kept:
            return self.bases["history"], self.history.offsets["kept"] + self.kept[value] * self.item
        if value in self.history.offsets:
            return self.bases["history"], self.history.offsets[value]
        return self.bases["temporary"], self.temporary.offsets[value]

    def _strides(self, value: Any) -> Strides:
        if value == "kept" or value in self.kept:
            return Strides(self.rows * self.record, self.record)
        array = self._array(value)
        if array in self.strides:
            return self.strides[array]
        if value.kind == "seed_y":
            return Strides(0, 0)
        size = value.size
        if array in self.bases:
            return Strides(self.total_rows * size, size)
        place = self.half.places.get(value)
        if place == "row":
            return Strides(0, 0)
        if place in ("block", "step"):
            size = _padded(value.size)
        return Strides(self.rows * size, size)


class Pad:
    """Memory for one run of a kernel that nothing needs afterwards, and what is beside it."""

    __slots__ = ("address", "block", "parts", "table", "words")

    def __init__(self, layout: Layout, parts: Sequence[Value]) -> None:
        self.parts = [np.zeros(v.shape, layout.dtype) for v in parts]  # kernels leave them zeroed
        self.words = np.empty(layout.entries, np.int64)
        self.table = address_of(self.words)
        self.block: workspace.Block | None = None
        self.address = 0

    def fill(self, layout: Layout) -> None:
        """Take the memory."""
        block = workspace.take(layout.temporary.nbytes or ALIGN, counted=not layout.keeps_pads)
        block.view(np.uint8, (layout.nbytes_of_zeros,), layout.temporary.offsets["zeros"])[:] = 0
        self.block, self.address = block, block.address

    @property
    def memory(self) -> workspace.Block:
        """The memory, of a pad that is lent."""
        assert self.block is not None
        return self.block

    def empty(self) -> None:
        """Let it go."""
        block, self.block = self.block, None
        if block is not None:
            block.release()


def _padded(size: int) -> int:
    """The length of a row after which another begins at a whole vector."""
    return -(-size // VECTOR) * VECTOR


def _is_ragged(value: Value) -> bool:
    """Whether what lies behind it does not begin at a whole vector."""
    return value.size % VECTOR != 0


def strides_of(array: Array, rank: int) -> Strides:
    """Of an array whose rows have `rank` axes; a row that all share is 0 away."""
    row = 0 if array.ndim - 1 == rank else array.strides[1] // array.itemsize
    return Strides(array.strides[0] // array.itemsize, row)
