"""`plan`: how to go backwards over many steps within a number of bytes, and what that costs in steps run again.

A leaf of n steps keeps their tape and s slots hold a state each, so a schedule of `revolve` has a peak of n * (bytes a
step) + s * (bytes of a carry). The fewest extra steps for the bytes are found exactly: extra steps fall with n and with
s, which gives a lower bound for any range of s, and the search looks into the range with the least bound first.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from heapq import heappop, heappush
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..engine.errors import InputError
from .revolve import Action, Advance, Free, Leaf, Restore, Store, extra, schedule

__all__ = ["Plan", "as_bytes", "as_plan", "check_checkpoint", "every", "plan", "show_bytes"]

Kind = Literal["full", "sqrt", "revolve", "every"]


@dataclass(frozen=True)
class Plan:
    """A schedule over the steps of a scan: what it keeps and what it runs. ``print(plan)`` shows others beside it.

    Attributes
    ----------
    kind : {"full", "sqrt", "revolve", "every"}
        Everything kept; the least memory with which no step is run more than twice; the fewest extra steps for a
        budget; the state before every `leaf` steps kept.
    steps : int
        All steps.
    leaf : int
        The most steps whose tape is kept at a time.
    slots : int
        The most states that are stored at a time, that before the first step included; 0 if everything is kept.
    bytes_per_step, carry_bytes, fixed_bytes : int
        What a step's tape keeps, what a stored state takes, and what is there in any case.
    multiple : int
        Leaves begin at multiples of so many steps.
    budget : int, optional
        The bytes that were allowed.
    """

    kind: Kind
    steps: int
    leaf: int
    slots: int
    bytes_per_step: int = 0
    carry_bytes: int = 0
    fixed_bytes: int = 0
    multiple: int = 1
    budget: int | None = None

    @property
    def peak_bytes(self) -> int:
        """The most bytes that are in use at a time."""
        return self.fixed_bytes + self.leaf * self.bytes_per_step + self.slots * self.carry_bytes

    @cached_property
    def extra_steps(self) -> int:
        """Forward steps beside the `steps` that a run which keeps everything takes."""
        if not self.slots:
            return 0
        return self.multiple * extra(_units(self.steps, self.multiple), self.slots, self.leaf // self.multiple)

    @property
    def forward_steps(self) -> int:
        """All forward steps of a gradient."""
        return self.steps + self.extra_steps

    @property
    def time_factor(self) -> float:
        """Time beside that of keeping everything, if going back through a step takes as long as two steps forward."""
        return 1 + self.extra_steps / (3 * self.steps)

    def actions(self) -> Iterator[Action]:
        """What to do, in order, in steps; see `revolve`. Up to the first `Leaf` it is a sweep over all steps."""
        if not self.slots:
            yield Leaf(0, self.steps)
            return
        m, last = self.multiple, self.steps
        for action in schedule(_units(last, m), self.slots, self.leaf // m):
            match action:
                case Store(at) | Restore(at) | Free(at):
                    yield type(action)(at * m)
                case Advance(start, stop) | Leaf(start, stop):
                    yield type(action)(start * m, min(stop * m, last))

    def __str__(self) -> str:
        return _table(self)


def plan(
    T: int,
    bytes_per_step: int,
    carry_bytes: int,
    budget: int | str = "auto",
    *,
    fixed_bytes: int = 0,
    multiple: int = 1,
) -> Plan:
    """The schedule with the fewest extra forward steps within a budget of memory.

    Parameters
    ----------
    T : int
        Steps.
    bytes_per_step : int
        What the tape of a step keeps.
    carry_bytes : int
        What the state between two steps takes.
    budget : int or str
        Bytes, or a size such as "64 MB", "1.5 GB" or "512 KiB" (MB are 10**6 bytes, MiB 2**20). "auto": a quarter of
        the machine's memory. "sqrt": the least with which no step is run more than twice, about
        ``2 * sqrt(T * bytes_per_step * carry_bytes)``. "full": whatever it takes to keep everything.
    fixed_bytes : int
        What is needed in any case.
    multiple : int
        Leaves begin at multiples of so many steps.

    Returns
    -------
    Plan

    Raises
    ------
    InputError
        If the budget is below the least possible, which the message says, or no size.

    Examples
    --------
    >>> print(tt.loop.plan(1_000_000, bytes_per_step=3584, carry_bytes=1024, budget="16 MB"))
    """
    for name, value, least in (
        ("T", T, 1), ("bytes_per_step", bytes_per_step, 0), ("carry_bytes", carry_bytes, 0),
        ("fixed_bytes", fixed_bytes, 0), ("multiple", multiple, 1),
    ):  # fmt: skip
        if not _is_integer(value) or value < least:
            raise InputError(f"plan: {name} is {value!r}.", f"pass an integer of {least} or more.")
    full = Plan("full", int(T), int(T), 0, int(bytes_per_step), int(carry_bytes), int(fixed_bytes), int(multiple))
    if isinstance(budget, str) and budget == "full":
        return full
    if isinstance(budget, str) and budget == "sqrt":
        return _sqrt(full)
    if isinstance(budget, str) and budget == "auto":
        return _within(full, _memory() // 4)
    return _within(full, as_bytes(budget, "plan: budget"))


def every(T: int, n: int) -> Plan:
    """The state before every `n` steps is stored; what that takes in bytes is not known."""
    if n >= T:
        return Plan("full", T, T, 0)
    return Plan("every", T, n, _units(T, n) - 1, multiple=n)


def check_checkpoint(what: str, checkpoint: Any) -> None:
    """Refuse what `as_plan` cannot take; `what` is for the message."""
    if isinstance(checkpoint, str):
        if checkpoint not in ("auto", "sqrt", "full"):
            as_bytes(checkpoint, f"{what}: checkpoint")
    elif not (checkpoint is None or isinstance(checkpoint, Plan) or (_is_integer(checkpoint) and checkpoint >= 1)):
        raise InputError(
            f"{what}: checkpoint is {checkpoint!r}.",
            "pass a size such as '64 MB', 'auto', 'sqrt', a number of steps, 1 or more, or a plan of tt.loop.plan.",
        )


def as_plan(
    checkpoint: Any, steps: int, bytes_per_step: int, carry_bytes: int, *, fixed_bytes: int = 0, multiple: int = 1
) -> Plan:
    """What `scan` means by ``checkpoint=``: a plan, a budget, or after how many steps a state is kept.

    Raises
    ------
    InputError
        If it is a plan for another number of steps, or a budget that is too small.
    """
    if isinstance(checkpoint, Plan):
        if checkpoint.steps != steps:
            raise InputError(
                f"scan: checkpoint is a plan for {checkpoint.steps:,} steps, there are {steps:,}.",
                "make one for as many.",
            )
        found = checkpoint
    elif isinstance(checkpoint, str):
        return plan(steps, bytes_per_step, carry_bytes, checkpoint, fixed_bytes=fixed_bytes, multiple=multiple)
    else:
        found = every(steps, multiple * _units(int(checkpoint), multiple))
    return replace(found, bytes_per_step=bytes_per_step, carry_bytes=carry_bytes, fixed_bytes=fixed_bytes)


# ---- the search -----------------------------------------------------------------------------------------------------


def _within(full: Plan, budget: int) -> Plan:
    """The fewest extra steps within a budget."""
    full = replace(full, budget=budget)
    if full.peak_bytes <= budget:
        return full
    least = _least(full)
    if budget < least.peak_bytes:
        kept = f"a tape of {least.leaf} step{'s' * (least.leaf > 1)}"
        raise InputError(
            f"plan: a budget of {budget:,} bytes for {full.steps:,} steps; the least possible is "
            f"{least.peak_bytes:,} bytes, {kept} and {least.slots} stored state{'s' * (least.slots != 1)}.",
            f"allow {show_bytes(least.peak_bytes)} or more (more for fewer steps run again; print(plan) shows "
            "several), or take fewer rows at a time.",
        )
    block, carry = full.multiple * full.bytes_per_step, full.carry_bytes
    free, units = budget - full.fixed_bytes, _units(full.steps, full.multiple)

    def leaf(slots: int) -> int:
        return (free - slots * carry) // block

    most = min(units, (free - block) // carry) if carry else units
    slots = _argmin(lambda low, high: extra(units, high, leaf(low)), 1, most)
    return _planned(full, "revolve", leaf(slots), slots)


def _sqrt(full: Plan) -> Plan:
    """The fewest bytes with which every step is run at most twice: all states are stored at which leaves begin."""
    block, carry = full.multiple * full.bytes_per_step, full.carry_bytes
    units = _units(full.steps, full.multiple)
    slots = _argmin(lambda low, high: _units(units, high + 1) * block + low * carry, 0, units - 1)
    return _planned(full, "sqrt", _units(units, slots + 1), slots) if slots else full


def _least(full: Plan) -> Plan:
    """The fewest bytes of all."""
    one = replace(full, kind="revolve", leaf=full.multiple, slots=1)
    return min(full, one, key=lambda p: p.peak_bytes) if full.steps > full.multiple else full


def _planned(full: Plan, kind: Kind, leaf: int, slots: int) -> Plan:
    """A plan with leaves of so many units; of slots, only as many as are ever used."""
    used = min(slots, _units(_units(full.steps, full.multiple), leaf) - 1)
    return replace(full, kind=kind, leaf=leaf * full.multiple, slots=used)


def _argmin(bound: Callable[[int, int], int], low: int, high: int) -> int:
    """The i in low, ..., high with the least ``bound(i, i)``; ``bound(a, b)`` is no more than any in a, ..., b."""
    heap = [(bound(low, high), high - low, low)]
    while True:
        _, width, a = heappop(heap)
        if not width:
            return a
        middle = a + width // 2
        for start, stop in ((a, middle), (middle + 1, a + width)):
            heappush(heap, (bound(start, stop), stop - start, start))


def _units(count: int, size: int) -> int:
    """How many units of a size hold so many."""
    return -(-count // size)


# ---- sizes ----------------------------------------------------------------------------------------------------------

_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([kKMGT]i?)?B\s*", re.ASCII)
_POWERS = ["", "K", "M", "G", "T"]


def as_bytes(size: Any, name: str = "size") -> int:
    """The bytes of a size, ``"64 MB"``, ``"1.5 GiB"`` or a number of bytes; `name` is for the message."""
    if _is_integer(size) and size >= 1:
        return int(size)
    found = _SIZE.fullmatch(size) if isinstance(size, str) else None
    if found is None:
        raise InputError(
            f"{name} is {size!r}.", "pass a size such as '64 MB', '1.5 GB' or '512 KiB', 'auto', 'sqrt', or an integer."
        )
    number, unit = found[1], found[2] or ""
    whole, _, part = number.partition(".")
    scale = (1024 if unit.endswith("i") else 1000) ** _POWERS.index(unit[:1].upper())
    return int(whole + part) * scale // 10 ** len(part)


def show_bytes(count: int) -> str:
    """A number of bytes in three digits."""
    power = min(max(0, (len(str(count)) - 1) // 3), len(_POWERS) - 1)
    if not power:
        return f"{count} B"
    value = count / 1000**power
    return f"{value:.{max(0, 2 - (value >= 10) - (value >= 100))}f} {_POWERS[power].replace('K', 'k')}B"


def _memory() -> int:
    """The bytes of memory that the process may use, as far as the system tells."""
    found: list[int] = []
    try:
        found.append(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, OSError, ValueError):  # not on this platform
        found.append(4 * 2**30)
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            found.append(int(Path(path).read_text("ascii")))
        except (OSError, ValueError):  # there is none, or it says "max"
            continue
    return min(found)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)


# ---- the table ------------------------------------------------------------------------------------------------------

_TOO_SLOW = 20
"""Plans that take more than so many times the time of keeping everything are not offered."""


def _table(chosen: Plan) -> str:
    rows = [("", "", "leaf", "slots", "peak", "forward steps", "time")]
    for plan in _choices(chosen):
        rows.append((
            ">" if plan == chosen else "", plan.kind, f"{plan.leaf:,}", f"{plan.slots:,}", show_bytes(plan.peak_bytes),
            f"{plan.forward_steps:,}", f"{plan.time_factor:.2f}x",
        ))  # fmt: skip
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([f"{row[0]:1} {row[1]:7}", *map(str.rjust, row[2:], widths[2:])]) for row in rows]
    budget = "" if chosen.budget is None else f"; budget {show_bytes(chosen.budget)}"
    title = (
        f"{chosen.steps:,} steps that keep {show_bytes(chosen.bytes_per_step)} each, "
        f"states of {show_bytes(chosen.carry_bytes)}{budget}"
    )
    return "\n".join([title, *lines])


def _choices(chosen: Plan) -> list[Plan]:
    """What to choose from, by falling peak: all kept, half of that, an eighth and so on, sqrt, and what is chosen."""
    if not chosen.bytes_per_step:
        return [chosen]
    full = replace(chosen, kind="full", leaf=chosen.steps, slots=0, budget=None)
    found = {(plan.leaf, plan.slots): plan for plan in (full, _sqrt(full))}
    least, budget = _least(full).peak_bytes, full.peak_bytes // 2
    while budget >= least and (plan := _within(full, budget)).time_factor <= _TOO_SLOW:
        found.setdefault((plan.leaf, plan.slots), plan)
        budget //= 4
    found[chosen.leaf, chosen.slots] = chosen
    return sorted(found.values(), key=lambda plan: -plan.peak_bytes)
