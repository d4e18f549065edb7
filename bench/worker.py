"""A contender that stays alive between its turns: blocks of times, and the arrays to compare before they count.

The module that a worker runs has a function ``prepare(contender, options)`` that returns a `Step`.
"""

import contextlib
import importlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bench import runner

Arrays = dict[str, np.ndarray]
Step = Callable[[], Callable[[], Arrays]]  # does the work to be timed; what it returns gives the results as arrays


class Worker:
    """A contender that stays alive between its turns, in a process of its own, stopped while others have theirs.

    The process calls ``module.prepare(contender, options)`` and keeps the step it returns. It may run on as many
    processors as it has threads, which is how the pools that have no setting of their own are bounded.

    Parameters
    ----------
    module, contender, options
        What to prepare.
    threads : int
    more : mapping of str to str, optional
        Environment variables of this contender alone.
    """

    def __init__(
        self,
        module: str,
        contender: str,
        options: dict[str, Any],
        threads: int = 1,
        more: Mapping[str, str] | None = None,
    ) -> None:
        self.contender = contender
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed with the process
        self._process = subprocess.Popen(
            [sys.executable, "-c", "from bench.worker import serve_turns; serve_turns()"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            env=runner.environment(threads, more),
            cwd=runner.ROOT,
            text=True,
        )
        try:
            self._ask([module, contender, options, threads])
        except BaseException:
            self.close()
            raise

    def results(self, folder: Path) -> dict[str, np.ndarray]:
        """What one step computes, by name; written to and read from `folder`."""
        path = folder / f"{self.contender}.npz"
        self._ask(["results", str(path)])
        with np.load(path) as file:
            found = dict(file)
        path.unlink()
        return found

    def times(self, seconds: float) -> list[float]:
        """Seconds of each step, one after another for about that long, at least three."""
        return self._ask(["times", seconds])

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        for file in (self._process.stdin, self._process.stdout, self._errors):
            with contextlib.suppress(OSError):
                file.close()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _ask(self, request: list[Any]) -> Any:
        self._signal("SIGCONT")
        with contextlib.suppress(BrokenPipeError):  # it has failed: the answer will be missing
            print(json.dumps(request), file=self._process.stdin, flush=True)
        answer = self._process.stdout.readline()
        if not answer:
            status = self._process.wait()
            self._errors.seek(0)
            raise runner.ContenderFailed(f"{self.contender} failed ({status}):\n{self._errors.read().strip()}")
        self._signal("SIGSTOP")  # no thread of it may spin while another contender is being timed
        return json.loads(answer)

    def _signal(self, name: str) -> None:
        if hasattr(signal, name):
            self._process.send_signal(getattr(signal, name))


def serve_turns() -> None:
    """Be a `Worker`'s process: read requests, one a line, and answer each with a line."""
    out = sys.stdout
    module, contender, options, threads = json.loads(sys.stdin.readline())
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    with contextlib.redirect_stdout(sys.stderr):
        step: Step = importlib.import_module(module).prepare(contender, options)
        print("null", file=out, flush=True)
        for line in sys.stdin:
            kind, argument = json.loads(line)
            if kind == "results":
                np.savez(argument, **step()())
                answer = None
            else:
                answer = timed(step, argument)
            print(json.dumps(answer), file=out, flush=True)


def timed(step: Step, seconds: float) -> list[float]:
    """Times of `step`, called for about that long and at least three times, after one call to warm the caches."""
    step()
    times: list[float] = []
    while len(times) < 3 or sum(times) < seconds:
        start = perf_counter()
        step()
        times.append(perf_counter() - start)
    return times


def error(got: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest error in norm, relative to the wanted array's norm, and where it is; infinite where names differ."""
    if got.keys() != wanted.keys():
        return np.inf, f"results {sorted(got)} in place of {sorted(wanted)}"
    worst = (0.0, "")
    for name, want in wanted.items():
        if got[name].shape != want.shape:
            return np.inf, f"{name} of shape {got[name].shape} in place of {want.shape}"
        size = np.linalg.norm(want.astype(np.float64).ravel())
        off = np.linalg.norm((got[name].astype(np.float64) - want).ravel()) / (size or 1.0)
        if not off <= worst[0]:  # also where it is NaN
            worst = (float(off) if off == off else np.inf, name)
    return worst


def median_of_medians(blocks: Sequence[Sequence[float]]) -> float:
    """The median over the turns of the median in a turn."""
    return statistics.median(statistics.median(block) for block in blocks)
