"""Memory for what a kernel keeps or computes on the way, taken from a pool.

Memory that is allocated anew must be cleared by the system, page by page, when it is first touched; a training step
would pay for that each time. Here blocks come back when nothing refers to them, and the next step of the same size
allocates nothing.
"""

from __future__ import annotations

import os
import sys
import threading
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from .address import address_of

__all__ = ["Block", "Chunk", "Usage", "reset_peak", "set_workspace_limit", "take", "take_any", "usage"]

ALIGNMENT = 64
"""Bytes: a cache line, and the widest vector."""

LEAST = 1 << 17
"""Bytes: less than that is as soon had from malloc."""

_SMALL, _MANY = 1 << 20, 8  # bytes, blocks


def _default_limit() -> int:
    """A quarter of the machine's memory."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    except (AttributeError, OSError, ValueError):  # not on this platform
        return 2**30


@lru_cache(maxsize=4096)
def _capacity(nbytes: int) -> int:
    """The size class: `nbytes` rounded up to one of four sizes between powers of two, so at most 25% above."""
    least = max(nbytes, 1)
    step = max(ALIGNMENT, 1 << max(0, (least - 1).bit_length() - 3))
    return -(-least // step) * step


class Chunk:
    """Memory that begins at a cache line."""

    __slots__ = ("address", "memory", "nbytes", "skip")

    def __init__(self, nbytes: int) -> None:
        self.memory, self.nbytes = np.empty(nbytes + ALIGNMENT, np.uint8), nbytes
        start = address_of(self.memory)
        self.skip = -start % ALIGNMENT
        self.address = start + self.skip

    def view(self, dtype: npt.DTypeLike, shape: Sequence[int], offset: int = 0) -> npt.NDArray[Any]:
        """An array in this memory, in C order, which begins at an offset of so many bytes."""
        return np.ndarray(shape, dtype, self.memory, self.skip + offset)


@dataclass(frozen=True)
class Usage:
    """What the pool holds, in bytes.

    Attributes
    ----------
    in_use : int
        What live blocks were asked for, each rounded up to 64 bytes. Those that hold results do not count, nor does
        what `take_any` takes elsewhere.
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
        self._returned: deque[tuple[Chunk, int]] = deque()
        self._idle: dict[int, list[Chunk]] = {}
        self._idle_bytes = self._in_use = self._peak = 0
        self._limit = _default_limit()

    def take(self, nbytes: int, asked: int) -> Chunk:
        """Memory of at least `nbytes`, of which `asked` count."""
        capacity = _capacity(nbytes)
        with self.lock:
            if self._returned:
                self._settle()
            chunk = self._reuse(capacity)
            self._in_use += asked
            if self._in_use > self._peak:
                self._peak = self._in_use
        if self._returned:
            self._settle_if_free()
        if chunk is not None:
            return chunk
        try:
            try:
                return Chunk(capacity)
            except MemoryError:  # what lies idle may be just what is missing
                self.locked(lambda: self._shrink(0))
                return Chunk(capacity)
        except BaseException:
            self.locked(lambda: self._give_up(asked))
            raise

    def put(self, chunk: Chunk, asked: int) -> None:
        self._returned.append((chunk, asked))
        if chunk.nbytes > _SMALL or len(self._returned) > _MANY:  # a few small ones may wait for the next who comes
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
            chunk, asked = self._returned.popleft()
            self._in_use -= asked
            alike = self._idle.pop(chunk.nbytes, None) or []
            alike.append(chunk)
            self._idle[chunk.nbytes] = alike
            self._idle_bytes += chunk.nbytes
            if self._idle_bytes > self._limit:
                self._shrink(self._limit)

    def _reuse(self, capacity: int) -> Chunk | None:
        """Idle memory of this class, or, so that shorter batches do with that of longer ones, up to twice as large."""
        size = capacity
        while size not in self._idle:
            size = _capacity(size + 1)
            if size > 2 * capacity:
                return None
        alike = self._idle.pop(size)
        chunk = alike.pop()
        if alike:
            self._idle[size] = alike
        self._idle_bytes -= size
        return chunk

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

# Other arrays come from malloc. glibc's gives idle memory back to the system once it is more than twice the largest
# array ever freed, and each page costs a microsecond when it is wanted again: up to a quarter of a small step.
# One array that goes untouched, of nearly the 32 MB beyond which it takes no notice, makes it keep up to 64 MB.
np.empty(31 << 20, np.uint8)
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

    __slots__ = ("address", "nbytes", "_asked", "_chunk", "__weakref__")

    def __init__(self, nbytes: int, counted: bool = True) -> None:
        self._chunk: Chunk | None = None
        self.nbytes, self._asked = nbytes, nbytes + -nbytes % ALIGNMENT if counted else 0
        self._chunk = _pool.take(nbytes, self._asked)
        self.address: int = self._chunk.address

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

    def view(self, dtype: npt.DTypeLike, shape: Sequence[int], offset: int = 0) -> npt.NDArray[Any]:
        """As `array`, for a moment: it does not keep the block."""
        assert self._chunk is not None
        return self._chunk.view(dtype, shape, offset)

    def release(self) -> None:
        """Give the memory back now. Arrays in it must not be used any more; a second release does nothing."""
        chunk, self._chunk = self._chunk, None
        if chunk is not None:
            _pool.put(chunk, self._asked)

    def __del__(self, ending: Callable[[], bool] = sys.is_finalizing) -> None:
        if not ending():  # names of this module may be gone by then
            self.release()


def take(nbytes: int, counted: bool = True) -> Block:
    """A block of at least `nbytes` bytes, not cleared.

    Parameters
    ----------
    nbytes : int
    counted : bool
        Whether it is working memory, which `usage` tells; False for results. Default True.

    Raises
    ------
    MemoryError
        If there is not so much, even after all idle memory was freed.
    """
    return Block(nbytes, counted)


def take_any(nbytes: int) -> Block | Chunk:
    """As `take`; little memory is not of the pool, which takes longer than a small kernel."""
    return Block(nbytes) if nbytes >= LEAST else Chunk(nbytes)


def set_workspace_limit(nbytes: int) -> None:
    """Hold at most `nbytes` of idle memory; what was not used for longest is freed first."""
    _pool.set_limit(nbytes)


def usage() -> Usage:
    """What is in use and idle now, and the peak."""
    return _pool.usage()


def reset_peak() -> None:
    """Let the peak start again from what is in use."""
    _pool.reset_peak()
