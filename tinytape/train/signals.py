"""Signals that ask a program to stop, noted until there is a good moment."""

from __future__ import annotations

import signal
import threading
from pathlib import Path
from typing import Any

__all__ = ["Signals", "Stopped"]


class Stopped(SystemExit):
    """Ctrl-C or SIGTERM came while a run was looping, and it is saved. Nobody need catch it: the program ends."""

    def __init__(self, signal: str, count: int, folder: Path) -> None:
        self.folder = str(folder)
        super().__init__(f"{signal}: stopped at step {count}; saved in {folder}, from where it can go on.")


class Signals:
    """Notes Ctrl-C and SIGTERM between `catch` and `release`, instead of raising in the midst of something."""

    def __init__(self) -> None:
        self._noted: list[int] = []
        self._before: list[tuple[int, Any]] = []

    def catch(self) -> None:
        """Begin to note. Does nothing outside of the main thread, where Python allows no handlers."""
        self._noted.clear()
        if threading.current_thread() is threading.main_thread():
            kinds = (signal.SIGINT, signal.SIGTERM)
            self._before = [(kind, signal.signal(kind, lambda got, _: self._noted.append(got))) for kind in kinds]

    @property
    def name(self) -> str:
        """The first signal that was noted; "" if there was none."""
        return signal.Signals(self._noted[0]).name if self._noted else ""

    def release(self) -> None:
        """Put back what was there before."""
        while self._before:
            signal.signal(*self._before.pop())
