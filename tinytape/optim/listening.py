"""Who listens to clips: whatever clips gradients tells those that a ``with`` block around it has put up."""

from __future__ import annotations

from collections.abc import Callable, Generator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Protocol

from ..engine.tensor import Tensor

__all__ = ["Clip", "Listener", "listeners", "listening"]


class Clip:
    """What one clip found and did.

    Attributes
    ----------
    params : list of Tensor
        Those that have gradients.
    norm, after : float
        The norm of all gradients together, before and after.
    order : float
        Which p-norm.
    bound : str
        What the gradients are brought to, in words.
    bounded : bool
        False where the norm is only measured.
    """

    __slots__ = ("params", "norm", "after", "order", "bound", "bounded", "_norms")

    def __init__(
        self,
        params: list[Tensor],
        norm: float,
        norms: Callable[[], list[float]],
        after: float,
        order: float,
        bound: str,
        bounded: bool,
    ) -> None:
        self.params, self.norm, self.after, self.order = params, norm, after, order
        self.bound, self.bounded, self._norms = bound, bounded, norms

    @property
    def norms(self) -> list[float]:
        """The norm of each parameter's gradient, before. They are computed when they are asked for."""
        return self._norms()


class Listener(Protocol):
    """What is told of clips."""

    def clipped(self, clip: Clip) -> None:
        """Called by a clip, when norms are known and nothing has been written yet."""
        ...


_listeners: ContextVar[tuple[Listener, ...]] = ContextVar("tinytape_clip_listeners", default=())

listeners = _listeners.get
"""Those who listen now, in this thread."""


@contextmanager
def listening(*those: Listener) -> Generator[None]:
    """These, and nobody else, listen inside."""
    token = _listeners.set(those)
    try:
        yield
    finally:
        _listeners.reset(token)
