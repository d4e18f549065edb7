"""What a layer keeps for exact backpropagation through time: floats a time step and row, as multiples of H.

The peak of the process's resident memory during one step, less what was resident before it and less y and dx, which
the step makes; x, dy and the weights are there before. A step over few time steps goes before, so that libraries are
loaded, kernels compiled and pools started.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import report, resident, runner, scan
from bench.cases import Case

WARM_UP = 64  # time steps


def measure(contender: str, options: dict[str, Any]) -> dict[str, Any]:
    """Bytes by which memory grew, and of what y and dx have of it. Runs in a process of its own."""
    case = Case(**options["case"])
    start = {"threads": options["threads"]}
    scan.prepare(contender, start | {"case": replace(case, T=min(case.T, WARM_UP)).options()})()()
    step = scan.prepare(contender, start | {"case": case.options()})
    resident.give_back()
    before = resident.reset_peak()
    results = step()
    grown = resident.peak() - before
    arrays = results()
    np.savez(options["path"], **arrays)
    return {"grown": grown, "outputs": sum(arrays[name].nbytes for name in ("y", "dx") if name in arrays)}


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
                answer = runner.run("bench.kept", contender, options, threads)
            except runner.ContenderFailed as failure:
                row.problems[contender] = str(failure)
                continue
            with np.load(path) as file:
                if scan.judge(row, contender, dict(file), wanted, case.dtype):
                    found.setdefault(contender, []).append(multiple(answer, case))
        runner.progress("")
    return {name: float(np.median(values)) for name, values in found.items()}, row.problems


def table(
    cases: Sequence[Case], contenders: Sequence[str], threads: int, rounds: int
) -> tuple[str, list[dict[str, Any]], list[str]]:
    """The table as text, what was measured, and complaints."""
    lines, found, complaints = [], [], []
    for case in cases:
        values, problems = measure_case(case, contenders, threads, rounds)
        lines.append([f"{case.cell} {case.label}", *(report.digits(values.get(name)) for name in contenders)])
        found.append({"case": case.options(), "multiples of H": values, "problems": problems})
        complaints += [f"{case.cell} {case.label}: {name}: {text}" for name, text in problems.items()]
    return runner.table(["T,B,I,H", *contenders], lines), found, complaints
