"""What all benchmarks share: one contender a process, in turn, over several rounds; the machine; the table.

A benchmark is a module with a function ``measure(contender, options)`` that returns something JSON can hold.
It runs in a process of its own, so that no contender warms, slows or configures another.
"""

import contextlib
import importlib
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
THREAD_SETTINGS = (
    "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS", "TINYTAPE_NUM_THREADS",
)  # fmt: skip
# glibc's malloc gives large blocks back to the system at once and asks for them anew in the next step, which costs
# the libraries that allocate every step up to half of their time on long sequences. With this it keeps them.
KEEP_MEMORY = {
    "MALLOC_MMAP_THRESHOLD_": "8589934592", "MALLOC_TRIM_THRESHOLD_": "17179869184", "MALLOC_TOP_PAD_": "268435456",
}  # fmt: skip

BUSY = 0.2  # processors; more than that, and times are not worth keeping


class ContenderFailed(Exception):
    """A contender's process ended with an error, or its results were wrong."""


def installed(contenders: Sequence[str]) -> tuple[list[str], list[str]]:
    """Split contenders, named like the packages they import (``torch`` and ``torch-loop``), into present and absent."""
    there = [name for name in contenders if find_spec(name.split("-")[0])]
    return there, [name for name in contenders if name not in there]


def environment(threads: int, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment with the thread counts pinned."""
    return os.environ | dict.fromkeys(THREAD_SETTINGS, str(threads)) | {"JAX_PLATFORMS": "cpu"} | dict(more or {})


def run(
    module: str, contender: str, options: dict[str, Any], threads: int = 1, more: Mapping[str, str] | None = None
) -> Any:
    """Call ``module.measure(contender, options)`` in a fresh process and return its answer."""
    done = subprocess.run(
        [sys.executable, "-c", "from bench.runner import serve; serve()"],
        input=json.dumps([module, contender, options]),
        env=environment(threads, more),
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise ContenderFailed(f"{contender} failed:\n{done.stderr.strip()}")
    return json.loads(done.stdout)


def serve() -> None:
    """Answer one `run`, in the process it started."""
    module, contender, options = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):  # whatever a contender prints is not the answer
        answer = importlib.import_module(module).measure(contender, options)
    json.dump(answer, sys.stdout)


def in_turn(
    module: str, contenders: Sequence[str], options: dict[str, Any], rounds: int, threads: int = 1
) -> Iterator[tuple[str, Any]]:
    """Run every contender once a round; each round starts with another one. Yields (contender, answer)."""
    for index, contender in turns(contenders, rounds):
        progress(f"round {index + 1} of {rounds}: {contender}")
        yield contender, run(module, contender, options, threads)
    progress("")


def turns(contenders: Sequence[str], rounds: int) -> Iterator[tuple[int, str]]:
    """(round, contender) in the order of their turns: each round starts with another contender."""
    for index in range(rounds):
        first = index % max(1, len(contenders))
        for contender in [*contenders[first:], *contenders[:first]]:
            yield index, contender


def progress(text: str) -> None:
    """Show one line in place of the last, on a terminal only."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


def machine(packages: Sequence[str]) -> dict[str, Any]:
    """Processor, cores, system, date, how busy it is; versions of Python and of the packages that are installed."""
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):  # Linux only
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
        model = models[0] if models else model
    versions = {"python": platform.python_version()}
    for name in packages:
        with contextlib.suppress(PackageNotFoundError):
            versions[name] = version(name)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = {"cpu": model, "cores": cores, "system": platform.platform(), "date": datetime.now(UTC).date().isoformat()}
    return found | {"busy": busy_processors(), "versions": versions}


def busy_processors(seconds: float = 0.5) -> float:
    """How many processors other work keeps busy just now; 0 where the system does not tell."""

    def ticks() -> tuple[int, int]:
        numbers = [int(number) for number in Path("/proc/stat").read_text("utf-8").splitlines()[0].split()[1:9]]
        return sum(numbers), sum(numbers[3:5])  # idle, and idle while a disk is waited for

    try:
        before = ticks()
        time.sleep(seconds)
        whole, idle = (after - start for after, start in zip(ticks(), before, strict=True))
    except OSError:
        return 0.0
    return round((os.cpu_count() or 1) * (whole - idle) / max(1, whole), 2)


def describe(facts: dict[str, Any]) -> str:
    """The answer of `machine`, in one paragraph; it says so if the machine has other work, which spoils times."""
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items())
    busy = f"\nBUSY: other work takes {facts['busy']} processors" if facts["busy"] > BUSY else ""
    return f"{facts['cpu']}, {facts['cores']} cores, {facts['system']}, {facts['date']}\n{versions}{busy}"


def table(head: Sequence[str], rows: Sequence[Sequence[str | float]]) -> str:
    """Text columns, the first to the left, the others to the right, numbers with two places."""
    text = [head, *([cell if isinstance(cell, str) else f"{cell:.2f}" for cell in row] for row in rows)]
    first, *others = (max(map(len, column)) for column in zip(*text, strict=True))
    return "\n".join(
        "  ".join([row[0].ljust(first), *(cell.rjust(w) for cell, w in zip(row[1:], others, strict=True))])
        for row in text
    )
