"""Threads that run kernels side by side.

Kernels run without the GIL, so plain Python threads do: they start at the first use, stay, and wait for work. The
caller works too. A task that no thread has taken up is done by the caller, so a busy machine, several callers at once
or a task that itself calls `run` cost time at worst: nobody ever waits for work that has not begun.
"""

from __future__ import annotations

import itertools
import os
import sys
import threading
import warnings
from collections.abc import Callable, Iterator
from queue import SimpleQueue
from typing import Any

import numpy as np

from .compiler import usable

__all__ = ["get_num_threads", "processors", "run", "set_num_threads"]


def processors() -> int:
    """How many processors this process may use: those it is bound to, within its control group's quota."""
    try:
        bound = len(os.sched_getaffinity(0))
    except AttributeError:  # not on this platform
        bound = os.cpu_count() or 1
    return max(1, min(bound, _quota()))


def _quota(path: str = "/sys/fs/cgroup/cpu.max") -> int:
    """The whole processors that the control group grants: a container's limit, say."""
    try:
        with open(path) as file:
            quota, period = file.read().split()
        return int(quota) // int(period)
    except (OSError, ValueError):  # no such file, or "max"
        return os.cpu_count() or 1


_threads: int | None = None  # None until asked for
_jobs: SimpleQueue[_Job] = SimpleQueue()
_workers = 0
_starting = threading.Lock()

# To sleep and be woken costs two dozen microseconds, so a caller first looks, without the GIL, whether a worker leaves.
_departures = np.zeros(1, np.int64)
_departures_at = _departures.ctypes.data
_clock = itertools.count(1)
_PATIENCE = 1000  # looks: some 50 microseconds
_spin: Callable[[int, int, int], int] | None = None  # compiled when the first workers start


_SHARES: bool = getattr(sys, "_is_gil_enabled", lambda: True)()
"""Whether tasks can be shared out: without the GIL, two threads might take up the same one."""


class _Job:
    """The tasks of one call of `run`.

    A worker enters, which the caller can see, before it takes a task. When the caller finds no task left, everyone
    who has one has entered, so it waits for those who entered and for nobody else.
    """

    __slots__ = ("task", "left", "errors", "entered")

    def __init__(self, task: Callable[[int], Any], n: int) -> None:
        self.task: Callable[[int], Any] | None = task
        self.left: Iterator[int] = iter(range(1, n))  # shared: next() is atomic under the GIL
        self.errors: list[tuple[int, BaseException]] = []
        self.entered: list[Any] = []

    def help(self) -> None:
        """What a worker does."""
        present = threading.Lock()
        with present:
            self.entered.append(present)
            task = self.task
            if task is not None:
                self.work(task, self.left)
        _departures[0] = next(_clock)

    def work(self, task: Callable[[int], Any], indices: Iterator[int]) -> None:
        for index in indices:
            try:
                if not self.errors:
                    task(index)
            except BaseException as error:
                self.errors.append((index, error))

    def wait(self) -> None:
        for present in self.entered:
            departures = int(_departures[0])
            if _spin is not None and present.locked():  # the worker had not left when `departures` was read
                _spin(_departures_at, departures, _PATIENCE)
            with present:
                pass


def get_num_threads() -> int:
    """How many threads `run` may use."""
    global _threads
    if _threads is None:
        _threads = _asked() or processors()
    return _threads


def _asked() -> int:
    """What the environment asks for; 0 if nothing."""
    text = os.environ.get("TINYTAPE_NUM_THREADS", "").strip()
    number = int(text) if text.isdecimal() else 0
    if text and number == 0:
        warnings.warn(
            f"TINYTAPE_NUM_THREADS is {text!r}, not an integer of 1 or more: left out of account.",
            RuntimeWarning,
            stacklevel=2,
        )
    return number


def set_num_threads(n: int) -> None:
    """Let `run` use `n` threads, the caller's included."""
    global _threads
    _threads = n


def run(task: Callable[[int], Any], n: int) -> None:
    """Call ``task(0)``, ..., ``task(n - 1)``, each once, on up to `get_num_threads()` threads.

    Returns when all calls have. ``task(0)`` runs on the calling thread. If a call raises, those that have not begun are
    left out, and the error of the lowest index is raised.

    Parameters
    ----------
    task : callable
        Takes the index. Side by side only while it runs kernels that are compiled with ``nogil=True``.
    n : int
        How many calls.
    """
    helpers = min(n, get_num_threads()) - 1 if _SHARES else 0
    if helpers < 1:
        for index in range(n):
            task(index)
        return
    if _workers < helpers:
        _start(helpers)
    job = _Job(task, n)
    stopped: BaseException | None = None
    mine = itertools.chain((0,), job.left)
    while True:  # whatever the caller is interrupted by, it must not leave while others write into its arrays
        try:
            while helpers:
                helpers -= 1
                _jobs.put(job)
            job.work(task, mine)
            job.task = None
            job.wait()
            break
        except BaseException as error:
            stopped = error
            job.errors.append((0, error))
    if job.errors:
        try:
            raise stopped or min(job.errors, key=lambda found: found[0])[1]
        finally:  # the error's traceback leads to this frame: no cycle shall keep the task's arrays
            job.errors.clear()
            del job, stopped


def _work(jobs: SimpleQueue[_Job]) -> None:
    while True:
        jobs.get().help()


def _start(wanted: int) -> None:
    global _spin, _workers
    with _starting:
        if _spin is None and usable():
            from .native import module

            _spin = module("spin", wait_for_change=3).wait_for_change
        while _workers < wanted:
            worker = threading.Thread(target=_work, args=(_jobs,), name=f"tinytape-{_workers + 1}", daemon=True)
            try:
                worker.start()
            except RuntimeError:  # no more threads to be had, or the interpreter is ending: the caller does the work
                return
            _workers += 1


def _forget_workers() -> None:
    global _jobs, _workers, _starting
    _jobs, _workers, _starting = SimpleQueue[_Job](), 0, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget_workers)
