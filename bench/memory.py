"""Memory and time of backpropagation through time against the number of steps, or (--layer) what one layer keeps.

An LSTM whose squared error is summed inside the step, so that no output is kept: tinytape exact, exact in less memory
(`checkpoint=`) and truncated, beside PyTorch and JAX with and without their checkpoints. Workspace is by how much
resident memory peaks in one step of training over what it was before it; a step over few time steps goes first.
"""

import argparse
import json
import math
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bench import kept, memory_report, peers, resident, runner, scan, summed, worker
from bench.cases import CELLS, Arrays, Case
from bench.memory_report import CONTENDERS, Row
from bench.summed import Task
from bench.worker import Step

LENGTHS = (100, 1_000, 10_000, 100_000, 1_000_000)
LONG, ROWS = 10_000, 16  # up to so many steps a batch has so many rows, beyond them one
WARM_UP = 16  # time steps
ONCE = 60  # seconds: a step that takes longer is not repeated
TOLERANCE = {True: 1e-4, False: 1e-3}  # of an array's norm: beside float64, and beside tinytape's run in float32


# ---- in a process of its own ----------------------------------------------------------------------------------------


def prepare(contender: str, task: Task, threads: int) -> Step:
    library, _, how = contender.partition("-")
    if library == "tinytape":
        return summed.prepare(contender, task)
    if library == "jax":
        return peers.jax_summed(task, how or "full")
    return peers.torch_summed(task, how or "full", threads)


def measure(contender: str, options: dict[str, Any]) -> dict[str, Any]:
    """Bytes by which memory grew, what tinytape's pool says of them and what it said before, and seconds of steps."""
    threads, task = options["threads"], Task(**options["task"])
    if hasattr(os, "sched_setaffinity"):
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:threads])
    prepare(contender, replace(task, T=min(task.T, WARM_UP)), threads)()()
    step = prepare(contender, task, threads)
    plan = summed.plan(contender, task) if contender.startswith("tinytape") else None
    answer = {} if plan is None else {"plan": plan.peak_bytes, "fixed": plan.fixed_bytes}
    resident.give_back()
    pool = Pool() if contender.startswith("tinytape") else None
    before, start = resident.reset_peak(), perf_counter()
    results = step()
    first = perf_counter() - start
    answer["grown"] = resident.peak() - before
    if pool is not None:
        answer["pool"] = pool.peak()
    np.savez(options["path"], **results())
    return answer | {"times": more_times(step, first, options["seconds"])}


class Pool:
    """What tinytape's pool lends from now on."""

    def __init__(self) -> None:
        from tinytape.kernels import workspace

        self._pool = workspace
        workspace.reset_peak()
        self._before = workspace.usage().in_use

    def peak(self) -> int:
        return self._pool.usage().peak - self._before


def more_times(step: Step, first: float, seconds: float | None) -> list[float]:
    """Times of further steps, for about so long; only that of the first if it was long, or no time is asked for."""
    if first > ONCE or seconds is None:
        return [first]
    times: list[float] = []
    while not times or sum(times) < seconds:
        start = perf_counter()
        step()
        times.append(perf_counter() - start)
    return times


# ---- a row of the table ---------------------------------------------------------------------------------------------


def tasks(lengths: Sequence[int], H: int) -> Iterator[Task]:
    """Short lengths with `ROWS` rows, then long ones with one; before these a thousand steps, to compare with."""
    short, long = ([T for T in sorted(set(lengths)) if (T > LONG) == beyond] for beyond in (False, True))
    yield from (Task(T, ROWS, H) for T in short)
    yield from (Task(T, 1, H) for T in ([1_000, *long] if long else []))


def too_much(contender: str, task: Task, rows: Sequence[Row], gigabytes: float, seconds: float) -> str:
    """Why a contender is left out, going by how it did before: what it would need; empty where it may run."""
    for row in reversed(rows):
        if row.task.B == task.B and (contender in row.left_out or contender in row.problems):
            return row.left_out.get(contender, "failed before")
        if contender in row.right:
            more = task.T / row.task.T
            steps_kept = more if contender in ("tinytape", "torch", "jax") else math.sqrt(more)
            would_grow = row.workspace(contender) * steps_kept * task.B / row.task.B / 1e9
            would_take = row.medians[contender] * more
            if would_grow > gigabytes:
                return f"{would_grow:.0f} GB"
            return f"{would_take:.0f} s" if would_take > seconds else ""
    return ""


def run(contender: str, task: Task, threads: int, seconds: float, path: Path) -> tuple[dict[str, Any], Arrays]:
    """The answer of `measure`, and the gradients.

    A peer's memory is that with malloc as it is, its time that with the malloc of `scan`, which keeps its memory: in
    long loops the first is slow, the second takes up to ten times the space.
    """
    module, options = (
        "bench.memory",
        {"task": task.options(), "threads": threads, "seconds": seconds, "path": str(path)},
    )
    if contender.startswith("tinytape"):
        answer = runner.run(module, contender, options, threads)
    else:
        one = {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"} if threads == 1 else {}
        timed = runner.run(module, contender, options, threads, runner.KEEP_MEMORY | one)
        answer = timed | {"grown": runner.run(module, contender, options | {"seconds": None}, threads, one)["grown"]}
    with np.load(path) as file:
        return answer, dict(file)


def references(task: Task, contenders: Sequence[str], threads: int, path: Path) -> dict[bool, Arrays]:
    """Gradients in float64, exact and (True) truncated, as they are needed."""
    wide = replace(task, dtype="float64")
    names = {False: "torch-checkpoint", True: "torch-truncated"}
    if not runner.installed(["torch"])[0]:
        names = {False: "tinytape-sqrt-eager", True: "tinytape-truncated-eager"}
    needed = {name.endswith("truncated") for name in contenders}
    return {cut: run(names[cut], wide, threads, 0.0, path)[1] for cut in sorted(needed)}


def measure_task(
    task: Task, contenders: Sequence[str], earlier: Sequence[Row], args: argparse.Namespace, path: Path
) -> Row:
    """Every contender that may run, in turn; its figures count if its gradients, which come by `path`, are right."""
    row = Row(task.label, task=task)
    row.left_out = {
        name: why for name in contenders if (why := too_much(name, task, earlier, args.gigabytes, args.limit))
    }
    present = [name for name in contenders if name not in row.left_out]
    wanted: dict[bool, Arrays] = {}
    if args.compare_up_to >= task.T:
        runner.progress(f"{task.label}: reference")
        try:
            wanted = references(task, present, args.threads, path)
        except runner.ContenderFailed as failure:
            row.problems["reference"] = str(failure)
            return row
    tolerance, exact = TOLERANCE[bool(wanted)], Arrays()
    for index, name in runner.turns(present, args.rounds):
        runner.progress(f"{task.label}: round {index + 1} of {args.rounds}: {name}")
        try:
            answer, got = run(name, task, args.threads, args.seconds, path)
        except runner.ContenderFailed as failure:
            row.problems[name] = str(failure)
            continue
        bits = exact if name in summed.CHECKPOINTS else {}
        if judge(row, name, got, wanted.get(name.endswith("truncated")), tolerance, bits):
            row.add(name, answer)
            if name == "tinytape":
                exact = exact or got
                wanted.setdefault(False, exact)
    runner.progress("")
    return row


def judge(row: Row, name: str, got: Arrays, wanted: Arrays | None, tolerance: float, exact: Arrays) -> bool:
    """Whether gradients are right, and `exact` to the last bit; if not, the row says so in place of figures."""
    off, where = (0.0, "") if wanted is None else worker.error(got, wanted)
    row.compared[name] = None if wanted is None else off
    differs = [key for key, value in exact.items() if not np.array_equal(got.get(key), value)]
    if any(value.dtype != np.float32 for value in got.values()):
        row.problems[name] = "a gradient is not float32"
    elif not all(np.isfinite(value).all() for value in got.values()):
        row.problems[name] = "a gradient is not finite"
    elif off > tolerance:
        row.problems[name] = f"{where} is off by {off:.1e} of its norm"
    elif differs:
        row.problems[name] = f"{differs[0]} has not the bits of the full run"
    return name not in row.problems


# ---- the command ----------------------------------------------------------------------------------------------------


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench memory", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--lengths", nargs="+", type=int, metavar="T", help=f"default {LENGTHS}; beyond {LONG:,} with one batch row")
    add("--hidden", type=int, default=128)
    add("--quick", action="store_true", help="two short lengths, to see that all works")
    add("--contenders", nargs="+", choices=list(CONTENDERS), metavar="NAME", help=str(list(CONTENDERS)))
    add("--threads", type=int, default=2, help="for every contender (default 2)")
    add("--rounds", type=int, default=1, help="processes for each contender (default 1)")
    add("--seconds", type=float, help="for which steps are repeated (default 2; 0.05 if quick)")
    add("--gigabytes", type=float, default=12, help="leave out who would need more (default 12)")
    add("--limit", type=float, default=180, help="leave out whose step would take more seconds (default 180)")
    add("--compare-up-to", type=int, default=10_000, metavar="T", help="compare with float64 so far (default 10000)")
    add("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    add("--picture", type=Path, metavar="FILE", help="draw workspace and time against T (needs matplotlib)")
    layer = parser.add_argument_group("what one layer keeps, a time step and row").add_argument
    layer("--layer", action="store_true", help="measure this in place of long sequences")
    layer("--cells", nargs="+", choices=list(CELLS), default=["lstm"], metavar="CELL", help=f"of {', '.join(CELLS)}")
    layer("--shapes", nargs="+", type=scan.read_shape, default=[(10_000, 16, 64, 128)], metavar="T,B,I,H")
    layer("--loss", choices=("every", "last"), default="every", help="on which steps the loss is (default every)")
    args = parser.parse_args(argv)
    known = scan.CONTENDERS if args.layer else CONTENDERS
    args.contenders = args.contenders or (["tinytape", "torch", "jax"] if args.layer else list(known))
    if not args.layer:  # tinytape first: beyond float64's reach the others are compared with it
        args.contenders.sort(key=list(CONTENDERS).index)
    args.lengths = args.lengths or ((64, 256) if args.quick else LENGTHS)
    args.seconds = args.seconds if args.seconds is not None else 0.05 if args.quick else 2.0
    if min(args.rounds, args.threads, args.hidden, *args.lengths) < 1:
        parser.error("rounds, threads, hidden and lengths are at least 1")
    if unknown := [name for name in args.contenders if name not in known]:
        parser.error(f"--layer goes with {', '.join(c for c in CONTENDERS if c in known)}, not {unknown[0]}")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    contenders, absent = runner.installed(args.contenders)
    facts = runner.machine(("tinytape", "torch", "jax", "numba", "numpy"))
    layer, lengths = (
        "floats kept a time step and row, as multiples of H",
        f"LSTM of {args.hidden}, loss summed in the step",
    )
    print(f"{layer if args.layer else lengths}, float32, threads: {args.threads}, results equal")
    print(runner.describe(facts))
    if absent:
        print(f"absent (not installed): {', '.join(absent)}")
    whole = {"benchmark": "memory", "threads": args.threads, "machine": facts, "absent": absent}
    text, complaints = (of_layer if args.layer else of_lengths)(args, contenders, whole)
    print("\n" + text)
    if complaints:
        print("\n" + "\n".join(complaints), file=sys.stderr)
    return 1 if complaints else 0


def of_layer(args: argparse.Namespace, contenders: Sequence[str], facts: dict[str, Any]) -> tuple[str, list[str]]:
    """The table of what layers keep, and complaints."""
    cases = [Case(cell, *shape, last=args.loss == "last") for cell in args.cells for shape in args.shapes]
    text, found, complaints = kept.table(cases, contenders, args.threads, args.rounds)
    save(args.json, facts, found)
    return text, complaints


def of_lengths(args: argparse.Namespace, contenders: Sequence[str], facts: dict[str, Any]) -> tuple[str, list[str]]:
    """The tables against T, and complaints. It takes long, so what is there is saved after every row."""
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as folder:
        for task in tasks(args.lengths, args.hidden):
            rows.append(measure_task(task, contenders, rows, args, Path(folder, "gradients.npz")))
            save(args.json, facts, [row.facts() for row in rows])
    if args.picture:
        memory_report.picture(args.picture, rows, contenders, runner.describe(facts["machine"]))
    complaints = [f"{row.label}: {name}: {what}" for row in rows for name, what in row.problems.items()]
    return memory_report.text(rows, contenders), complaints


def save(path: Path | None, facts: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    if path is not None:
        path.write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n", "utf-8")
