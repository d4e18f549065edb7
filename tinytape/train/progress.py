"""How far a run is: a bar where something can be drawn over, a line now and then where it cannot."""

from __future__ import annotations

import importlib
import sys
import time
import warnings
from typing import Any

__all__ = ["Progress"]

PAUSE = 30.0  # seconds between lines where there is no bar


class Progress:
    """Shows loops over batches, on stderr.

    Attributes
    ----------
    label : str
        What the next loop is called.
    told : str
        What stands behind the bar.
    """

    def __init__(self, shown: bool) -> None:
        self.label = self.told = ""
        self._shown = shown
        self._bar: Any = None
        self._done, self._total = 0, None
        self._line = (time.perf_counter(), 0)  # when the last line was printed, and what was done by then

    def begin(self, done: int, total: int | None) -> None:
        """A loop begins, `done` of whose batches were done before."""
        self._done, self._total = done, total
        self._line = (time.perf_counter(), done)
        bars = _bars() if self._shown else None
        if bars is not None:
            self._bar = bars(total=total, initial=done, desc=self.label or None, unit="step", leave=False)

    def advance(self) -> None:
        """A batch is done."""
        self._done += 1
        if self._bar is not None:
            self._bar.set_postfix_str(self.told, refresh=False)
            self._bar.update()
        elif self._shown and time.perf_counter() - self._line[0] >= PAUSE:
            self.say(self._status())

    def _status(self) -> str:
        now = time.perf_counter()
        rate = (self._done - self._line[1]) / max(now - self._line[0], 1e-9)
        self._line = (now, self._done)
        of = "" if self._total is None else f"/{self._total:,}"
        left = "" if self._total is None or not rate else f", {_clock((self._total - self._done) / rate)} left"
        parts = [self.label, f"{self._done:,}{of} steps", self.told, f"{rate:.3g} steps/s{left}"]
        return "  ".join(part for part in parts if part)

    def say(self, line: str) -> None:
        """Print a line above the bar."""
        if not self._shown:
            return
        if self._bar is None:
            print(line, file=sys.stderr, flush=True)
        else:
            self._bar.write(line, file=sys.stderr)

    def end(self) -> None:
        """The loop is over."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _bars() -> Any:
    """What makes bars here: tqdm's own choice in a notebook or a terminal, None where a bar cannot be redrawn."""
    if "ipykernel" not in sys.modules and not sys.stderr.isatty():
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a notebook without widgets, where tqdm draws with characters
            return importlib.import_module("tqdm.auto").tqdm
    except ImportError:
        return None


def _clock(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
