"""Memory for what a kernel keeps or computes on the way, taken from a pool.

Memory that is allocated anew must be cleared by the system, page by page, when it is first touched; a training step
would pay for that each time. Here blocks come back when nothing refers to them, and the next step of the same size
allocates nothing.
"""

from __future__ import annotations

import os
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = ["Block", "Usage", "reset_peak", "set_workspace_limit", "take", "usage"]

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""

Memory = npt.NDArray[np.uint8]


def _default_limit() -> int:
    """A quarter of the machine's memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, OSError, ValueError):  # not on this platform
        return 2**30


def _capacity(nbytes: int) -> int:
    """The size class: `nbytes` rounded up to one of four sizes between powers of two, so at most 25% above."""
    least = max(nbytes, 1)
    step = max(ALIGNMENT, 1 << max(0, (least - 1).bit_length() - 3))
    return -(-least // step) * step


def _allocate(capacity: int) -> Memory:
    whole = np.empty(capacity + ALIGNMENT, np.uint8)
    skip = -whole.ctypes.data % ALIGNMENT
    return whole[skip : skip + capacity]


@dataclass(frozen=True)
class Usage:
    """What the pool holds, in bytes.

    Attributes
    ----------
    in_use : int
        What live blocks were asked for, each rounded up to 64 bytes.
    idle : int
        What is held for later.
    peak : int
        The most that was in use since `reset_peak`.
    """

    in_use: int
    idle: int
    peak: int


class _Pool:
    """Idle memory by size class, least recently used class first, and the account of it.

    A block may come back at any moment, also while this thread holds the lock, when a collection of garbage strikes.
    So what comes back is put on a deque, which needs no lock, and is settled by whoever can have the lock at once.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self._returned: deque[tuple[Memory, int]] = deque()
        self._idle: dict[int, list[Memory]] = {}
        self._idle_bytes = self._in_use = self._peak = 0
        self._limit = _default_limit()

    def take(self, asked: int) -> Memory:
        capacity = _capacity(asked)
        with self.lock:
            self._settle()
            memory = self._reuse(capacity)
            self._in_use += asked
            self._peak = max(self._peak, self._in_use)
        self._settle_if_free()
        if memory is not None:
            return memory
        try:
            try:
                return _allocate(capacity)
            except MemoryError:  # what lies idle may be just what is missing
                self.locked(lambda: self._shrink(0))
                return _allocate(capacity)
        except BaseException:
            self.locked(lambda: self._give_up(asked))
            raise

    def put(self, memory: Memory, asked: int) -> None:
        self._returned.append((memory, asked))
        self._settle_if_free()

    def usage(self) -> Usage:
        return self.locked(lambda: Usage(self._in_use, self._idle_bytes, self._peak))

    def reset_peak(self) -> None:
        def reset() -> None:
            self._peak = self._in_use

        self.locked(reset)

    def set_limit(self, nbytes: int) -> None:
        def change() -> None:
            self._limit = nbytes
            self._shrink(nbytes)

        self.locked(change)

    def locked(self, action: Callable[[], Any]) -> Any:
        with self.lock:
            self._settle()
            result = action()
        self._settle_if_free()
        return result

    # ---- with the lock held ----

    def _settle(self) -> None:
        while self._returned:
            memory, asked = self._returned.popleft()
            self._in_use -= asked
            alike = self._idle.pop(memory.size, [])
            alike.append(memory)
            self._idle[memory.size] = alike
            self._idle_bytes += memory.size
            self._shrink(self._limit)

    def _reuse(self, capacity: int) -> Memory | None:
        """Idle memory of this class, or, so that shorter batches do with that of longer ones, up to twice as large."""
        size = capacity
        while size not in self._idle:
            size = _capacity(size + 1)
            if size > 2 * capacity:
                return None
        alike = self._idle.pop(size)
        memory = alike.pop()
        if alike:
            self._idle[size] = alike
        self._idle_bytes -= size
        return memory

    def _shrink(self, limit: int) -> None:
        while self._idle_bytes > limit:
            oldest = next(iter(self._idle))
            self._idle[oldest].pop()
            self._idle_bytes -= oldest
            if not self._idle[oldest]:
                del self._idle[oldest]

    def _give_up(self, asked: int) -> None:
        self._in_use -= asked

    def _settle_if_free(self) -> None:
        """Settle, unless someone holds the lock: they look again when they let go of it."""
        while self._returned and self.lock.acquire(blocking=False):
            try:
                self._settle()
            finally:
                self.lock.release()


_pool = _Pool()
if hasattr(os, "register_at_fork"):  # a child finds the account in order and the lock free
    os.register_at_fork(
        before=_pool.lock.acquire, after_in_parent=_pool.lock.release, after_in_child=_pool.lock.release
    )


class Block:
    """Memory from the pool, not cleared; it goes back when neither the block nor an array in it is left.

    Attributes
    ----------
    address : int
        A multiple of 64.
    nbytes : int
        What was asked for.
    """

    __slots__ = ("address", "nbytes", "_memory", "__weakref__")

    def __init__(self, nbytes: int) -> None:
        self._memory: Memory | None = None
        self.nbytes = nbytes
        self._memory = _pool.take(_rounded(nbytes))
        self.address: int = self._memory.ctypes.data

    @property
    def __array_interface__(self) -> dict[str, Any]:
        # NumPy makes the block the base of the array, so that an array keeps its block.
        return {"version": 3, "typestr": "|u1", "shape": (self.nbytes,), "data": (self.address, False)}

    def array(self, dtype: npt.DTypeLike, shape: Sequence[int], offset: int = 0) -> npt.NDArray[Any]:
        """An array in this memory, in C order.

        Parameters
        ----------
        dtype : dtype
        shape : sequence of int
        offset : int
            Bytes from the block's beginning. Default 0.
        """
        return np.ndarray(tuple(shape), dtype, np.asarray(self), offset)

    def release(self) -> None:
        """Give the memory back now. Arrays in it must not be used any more; a second release does nothing."""
        memory, self._memory = self._memory, None
        if memory is not None:
            _pool.put(memory, _rounded(self.nbytes))

    def __del__(self) -> None:
        self.release()


def _rounded(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def take(nbytes: int) -> Block:
    """A block of at least `nbytes` bytes, not cleared.

    Raises
    ------
    MemoryError
        If there is not so much, even after all idle memory was freed.
    """
    return Block(nbytes)


def set_workspace_limit(nbytes: int) -> None:
    """Hold at most `nbytes` of idle memory; what was not used for longest is freed first."""
    _pool.set_limit(nbytes)


def usage() -> Usage:
    """What is in use and idle now, and the peak."""
    return _pool.usage()


def reset_peak() -> None:
    """Let the peak start again from what is in use."""
    _pool.reset_peak()
