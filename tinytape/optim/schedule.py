"""Learning rates over time: plain functions from the number of steps taken to a rate, and what applies them.

A schedule is any function ``step -> lr``, such as ``lambda step: 1e-3 * 0.99**step``. Those made here are checked when
they are made, and keep their last value after their last step. All start warm if asked: with ``warmup=n`` the rate
first rises in n equal increments, and what follows is the schedule without the warm-up, n steps later.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from ..engine.errors import DTypeError, InputError
from .inputs import within
from .optimizer import Optimizer

__all__ = ["Scheduler", "constant", "cosine", "exponential", "linear", "one_cycle", "step_decay"]

Schedule = Callable[[int], float]


def constant(lr: float, warmup: int = 0) -> Schedule:
    """Always `lr`."""
    within("constant", "lr", lr, 0.0)
    return _warmed("constant", warmup, lambda step: lr)


def linear(start: float, end: float, steps: int, warmup: int = 0) -> Schedule:
    """A straight line from `start` to `end` in `steps` steps.

    Parameters
    ----------
    start, end : float
        Rates, at least 0.
    steps : int
        At least 1, warm-up not counted.
    warmup : int
        How many steps rise to `start` first. Default 0.
    """
    _check("linear", steps, start=start, end=end)
    return _warmed("linear", warmup, lambda step: start + (end - start) * min(step / steps, 1.0))


def cosine(start: float, end: float, steps: int, warmup: int = 0) -> Schedule:
    """Half a cosine wave from `start` to `end` in `steps` steps; parameters as for `linear`.

    References
    ----------
    Loshchilov and Hutter 2017, "SGDR: stochastic gradient descent with warm restarts" (here without restarts).
    """
    _check("cosine", steps, start=start, end=end)
    return _warmed("cosine", warmup, lambda step: _wave(start, end, step / steps))


def exponential(start: float, gamma: float, warmup: int = 0) -> Schedule:
    """`start` times `gamma` (above 0) to the power of the step."""
    return step_decay(start, gamma, 1, warmup)


def step_decay(start: float, gamma: float, every: int, warmup: int = 0) -> Schedule:
    """`start`, multiplied by `gamma` (above 0) after each `every` steps."""
    _check("step_decay", every, name="every", start=start)
    within("step_decay", "gamma", gamma, 0.0, ends="()")
    return _warmed("step_decay", warmup, lambda step: start * gamma ** (step // every))


def one_cycle(
    peak: float, steps: int, rise: float = 0.3, start: float | None = None, end: float | None = None
) -> Schedule:
    """Up to `peak` and down again, in half cosine waves.

    Parameters
    ----------
    peak : float
        The highest rate, at least 0.
    steps : int
        How many there are in all, at least 2: the last is number ``steps - 1``.
    rise : float
        The fraction of the steps that go up, in (0, 1). Default 0.3.
    start, end : float, optional
        First and last rate. Default ``peak / 25`` and ``peak / 250_000``, as in PyTorch.

    References
    ----------
    Smith and Topin 2018, "Super-convergence: very fast training of neural networks using large learning rates".
    """
    first = peak / 25 if start is None else start
    last = peak / 250_000 if end is None else end
    _check("one_cycle", steps, 2, peak=peak, start=first, end=last)
    within("one_cycle", "rise", rise, 0.0, 1.0, ends="()")
    top = max(rise * steps - 1, 0.0)

    def lr(step: int) -> float:
        if step < top:
            return _wave(first, peak, step / top)
        return _wave(peak, last, (step - top) / (steps - 1 - top))

    return lr


class Scheduler:
    """Sets an optimiser's learning rate from a schedule.

    Parameters
    ----------
    optimizer : Optimizer
        Its rate is set at once, for step 0, and at each `step`.
    fn : callable or list of callable
        ``step -> lr``; a list has one for each group of parameters.

    Attributes
    ----------
    count : int
        The steps taken.

    Raises
    ------
    InputError
        If a list is of another length than the optimiser's groups, or a rate is negative or not finite.

    Examples
    --------
    >>> scheduler = Scheduler(optimizer, schedule.cosine(1e-3, 0.0, steps=10_000, warmup=100))
    >>> loss.backward(); optimizer.step(); scheduler.step()
    """

    def __init__(self, optimizer: Optimizer, fn: Schedule | list[Schedule]) -> None:
        groups = optimizer.param_groups
        given: Any = fn
        self._schedules: list[Schedule] = list(given) if hasattr(given, "__len__") else [given] * len(groups)
        if len(self._schedules) != len(groups):
            raise InputError(
                f"Scheduler: fn has {len(self._schedules)} schedules for {len(groups)} groups of parameters.",
                "pass one function, or a list with one for each group.",
            )
        for schedule in self._schedules:
            if not callable(schedule):
                raise DTypeError(f"Scheduler: fn is {schedule!r}, not a function.", "pass step -> lr.")
        self._optimizer = optimizer
        self.count = 0
        self._apply(0)

    def step(self) -> None:
        """Set the rate for the next step of the optimiser. Call it after `Optimizer.step`."""
        self._apply(self.count + 1)

    def get_last_lr(self) -> list[float]:
        """The rate of each group."""
        return [group["lr"] for group in self._optimizer.param_groups]

    def state_dict(self) -> dict[str, int]:
        """The number of steps taken; the schedule itself is code and is not saved."""
        return {"count": self.count}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take the number of steps over, and set the rate that belongs to it."""
        count = state_dict.get("count")
        if set(state_dict) != {"count"} or not isinstance(count, int) or isinstance(count, bool) or count < 0:
            raise InputError(
                f"Scheduler.load_state_dict: {dict(state_dict)!r:.80} is not {{'count': n}} with n >= 0.",
                "pass what Scheduler.state_dict() gave.",
            )
        self._apply(count)

    def _apply(self, count: int) -> None:
        groups = self._optimizer.param_groups
        if len(groups) != len(self._schedules):
            raise InputError(
                f"Scheduler: it was made for {len(self._schedules)} groups of parameters; now there are {len(groups)}.",
                "add all groups to the optimiser first, or make a Scheduler anew and load its count.",
            )
        rates = [within("Scheduler", f"the rate of step {count}", fn(count), 0.0) for fn in self._schedules]
        for group, rate in zip(groups, rates, strict=True):
            group["lr"] = rate
        self.count = count


def _wave(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * min(part, 1.0))) / 2


def _warmed(what: str, warmup: int, schedule: Schedule) -> Schedule:
    _check(what, warmup, 0, "warmup")
    if warmup == 0:
        return schedule
    peak = schedule(0)
    return lambda step: peak * (step + 1) / (warmup + 1) if step < warmup else schedule(step - warmup)


def _check(what: str, steps: Any, least: int = 1, name: str = "steps", **rates: float) -> None:
    if not isinstance(steps, int) or isinstance(steps, bool):
        raise DTypeError(f"{what}: {name} is {steps!r}, not an int.", "pass a number of whole steps.")
    if steps < least:
        raise InputError(f"{what}: {name} is {steps}; at least {least} is needed.", f"choose another {name}.")
    for key, rate in rates.items():
        within(what, key, rate, 0.0)
