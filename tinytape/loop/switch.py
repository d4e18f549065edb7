"""Whether loops over time may run as kernels."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from contextvars import ContextVar

__all__ = ["may_compile", "no_compile"]

_allowed = ContextVar("tinytape_may_compile", default=True)


@contextmanager
def no_compile() -> Generator[None]:
    """Run recurrent layers and `scan` step by step inside, as they are defined: ``with tt.no_compile(): ...``.

    Every op of every step is then on the tape, to be printed, priced or stepped through in a debugger, and nothing
    waits for a compiler. Numbers differ in the last bits. It holds for the current thread; ``scan(...,
    compiled=True)`` compiles all the same.
    """
    was = _allowed.set(False)
    try:
        yield
    finally:
        _allowed.reset(was)


def may_compile() -> bool:
    """Whether no `no_compile` is around."""
    return _allowed.get()
