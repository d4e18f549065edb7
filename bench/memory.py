"""What exact backpropagation through time keeps: peak memory of one step, less the arrays that go in and come out.

The peak of the process's resident memory during one step, less what was resident before it and less y and dx, which
the step makes; x, dy and the weights are there before. A step over few time steps goes before, so that libraries are
loaded, kernels compiled and pools started. In floats for each time step and row, as multiples of the hidden size.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import re
import resource
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import report, runner, scan
from bench.cases import CELLS, Case

WARM_UP = 64  # time steps


def measure(contender: str, options: dict[str, Any]) -> dict[str, Any]:
    """Bytes by which memory grew, and of what y and dx have of it. Runs in a process of its own."""
    case = Case(**options["case"])
    start = {"threads": options["threads"]}
    scan.prepare(contender, start | {"case": replace(case, T=min(case.T, WARM_UP)).options()})()()
    step = scan.prepare(contender, start | {"case": case.options()})
    give_back()
    before = reset_peak()
    results = step()
    grown = peak() - before
    arrays = results()
    np.savez(options["path"], **arrays)
    return {"grown": grown, "outputs": sum(arrays[name].nbytes for name in ("y", "dx") if name in arrays)}


def give_back() -> None:
    """Free what nobody holds, and what malloc holds for later (where it is glibc's)."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def reset_peak() -> int:
    """Let the peak start from what is resident now, in bytes; where this is not permitted, from the peak so far."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return resident("VmRSS")
    except OSError:
        return peak()


def peak() -> int:
    try:
        return resident("VmHWM")
    except OSError:
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def resident(name: str) -> int:
    """One of Linux's figures of this process, in bytes."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path("/proc/self/status").read_text(), re.MULTILINE)
    if found is None:
        raise OSError(f"/proc/self/status has no {name}")
    return int(found[1]) * 1024


def multiple(answer: dict[str, Any], case: Case) -> float:
    """Floats a step and row, by H."""
    size = np.dtype(case.dtype).itemsize
    return (answer["grown"] - answer["outputs"]) / (size * case.T * case.B * case.H)


def measure_case(
    case: Case, contenders: Sequence[str], threads: int, rounds: int
) -> tuple[dict[str, float], dict[str, str]]:
    """The median multiple of H of every contender whose results are right, and what is wrong with the others."""
    row, found = report.Row(case.label), dict[str, list[float]]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            wanted = scan.reference(case, threads, Path(folder))
        except runner.ContenderFailed as failure:
            return {}, {"reference": str(failure)}
        path = Path(folder, "results.npz")
        for index, contender in runner.turns([c for c in contenders if scan.takes_part(c, case)], rounds):
            runner.progress(f"{case.cell} {case.label}: round {index + 1} of {rounds}: {contender}")
            options = {"case": case.options(), "threads": threads, "path": str(path)}
            try:
                answer = runner.run("bench.memory", contender, options, threads)
            except runner.ContenderFailed as failure:
                row.problems[contender] = str(failure)
                continue
            with np.load(path) as file:
                if scan.judge(row, contender, dict(file), wanted, case.dtype):
                    found.setdefault(contender, []).append(multiple(answer, case))
        runner.progress("")
    return {name: float(np.median(values)) for name, values in found.items()}, row.problems


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = scan.CONTENDERS
    add("--cells", nargs="+", choices=list(CELLS), default=["lstm"], metavar="CELL", help=f"of {', '.join(CELLS)}")
    add("--shapes", nargs="+", type=scan.read_shape, default=[(10_000, 16, 64, 128)], metavar="T,B,I,H")
    add("--loss", choices=("every", "last"), default="every", help="on which steps the loss is (default every)")
    add("--threads", type=int, default=2, help="for every contender (default 2)")
    add("--rounds", type=int, default=1, help="processes for each contender (default 1)")
    add("--contenders", nargs="+", choices=names, default=["tinytape", "torch", "jax"], metavar="NAME", help=str(names))
    add("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads) < 1:
        parser.error("rounds and threads are at least 1")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    contenders, absent = runner.installed(args.contenders)
    facts = runner.machine(("tinytape", "torch", "jax", "numba", "numpy"))
    print(f"floats kept a time step and row, as multiples of H, float32, threads: {args.threads}, results equal")
    print(runner.describe(facts))
    if absent:
        print(f"absent (not installed): {', '.join(absent)}")
    rows, found, complaints = [], [], []
    for cell in args.cells:
        for shape in args.shapes:
            case = Case(cell, *shape, last=args.loss == "last")
            values, problems = measure_case(case, contenders, args.threads, args.rounds)
            rows.append([f"{cell} {case.label}", *(report.digits(values.get(name)) for name in contenders)])
            found.append({"case": case.options(), "multiples of H": values, "problems": problems})
            complaints += [f"{cell} {case.label}: {name}: {text}" for name, text in problems.items()]
    print("\n" + runner.table(["T,B,I,H", *contenders], rows))
    if complaints:
        print("\n" + "\n".join(complaints), file=sys.stderr)
    if args.json:
        whole = {"benchmark": "memory", "threads": args.threads, "machine": facts, "absent": absent, "rows": found}
        args.json.write_text(json.dumps(whole, indent=1) + "\n", "utf-8")
    return 1 if complaints else 0
