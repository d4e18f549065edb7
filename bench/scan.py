"""A recurrent layer's training step: forward and backward, gradients for the input and all weights."""

import argparse
import contextlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from bench import ours, peers, report, runner, worker
from bench.cases import BUILT_IN, CELLS, SHAPES, Case, odd
from bench.report import Row

CONTENDERS = ("tinytape", "torch", "torch-loop", "jax")
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}  # of an array's norm
SGEMM = 2048  # side of the square product that tells the machine's peak


def prepare(contender: str, options: dict[str, Any]) -> worker.Step:
    """The step of one contender, in a process of its own."""
    threads = options["threads"]
    if contender == "numpy":
        return sgemm(options["dtype"])
    case = Case(**options["case"])
    if contender.startswith("tinytape"):
        return ours.prepare(case, eager=contender == "tinytape-eager")
    if contender == "jax":
        return peers.jax_scan(case)
    return {"torch": peers.torch_layer, "torch-loop": peers.torch_loop}[contender](case, threads)


def sgemm(dtype: str) -> worker.Step:
    a, b = np.random.default_rng(0).standard_normal((2, SGEMM, SGEMM)).astype(dtype)
    out = np.empty_like(a)

    def step():
        np.matmul(a, b, out=out)
        return dict

    return step


def widest_vectors() -> dict[str, str]:
    """Settings with which NumPy's OpenBLAS uses AVX-512 also on processors it does not know, where it takes AVX2."""
    with contextlib.suppress(OSError):  # Linux only
        if "avx512dq" in Path("/proc/cpuinfo").read_text("utf-8"):
            return {"OPENBLAS_CORETYPE": "SKYLAKEX"}
    return {}


def start(contender: str, case: Case, threads: int) -> worker.Worker:
    more = runner.KEEP_MEMORY if contender.startswith(("torch", "jax")) else {}
    if contender == "jax" and threads == 1:
        more = more | {"XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false"}
    options = {"case": case.options(), "threads": threads}
    return worker.Worker("bench.scan", contender, options, threads, more)


def takes_part(contender: str, case: Case) -> bool:
    return contender != "torch" or case.cell in BUILT_IN


def reference(case: Case, threads: int, folder: Path) -> dict[str, np.ndarray]:
    """The results in float64: PyTorch's where it is installed, else those of the eager loop."""
    name = "torch" if case.cell in BUILT_IN else "torch-loop"
    if not runner.installed([name])[0]:
        name = "tinytape-eager"
    with start(name, replace(case, dtype="float64"), threads) as contender:
        return contender.results(folder)


def judge(row: Row, contender: str, got: dict[str, np.ndarray], wanted: dict[str, np.ndarray], dtype: str) -> bool:
    """Whether the results are right; if they are not, the row says so in place of a time."""
    if wrong := sorted(name for name, value in got.items() if value.dtype != dtype):
        row.errors[contender], row.problems[contender] = float("inf"), f"{wrong[0]} is {got[wrong[0]].dtype}"
        return False
    off, where = worker.error(got, wanted)
    if off <= TOLERANCE[dtype]:
        return True
    row.errors[contender], row.problems[contender] = off, f"{where} is off by {off:.1e} of its norm"
    return False


def measure_case(case: Case, contenders: Sequence[str], threads: int, rounds: int, seconds: float) -> Row:
    """Compare every contender's results, then time those that are right, in turn."""
    row = Row(case.label, case.flops)
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        try:
            wanted = reference(case, threads, folder)
        except runner.ContenderFailed as failure:
            row.problems["reference"] = str(failure)
            return row
        ready: dict[str, worker.Worker] = {}
        for contender in (c for c in contenders if takes_part(c, case)):
            runner.progress(f"{case.cell} {case.label}: preparing {contender}")
            try:
                started = stack.enter_context(start(contender, case, threads))
                if judge(row, contender, started.results(folder), wanted, case.dtype):
                    ready[contender] = started
            except runner.ContenderFailed as failure:
                row.problems[contender] = str(failure)
        for index, contender in runner.turns(list(ready), rounds):
            runner.progress(f"{case.cell} {case.label}: round {index + 1} of {rounds}: {contender}")
            row.times.setdefault(contender, []).append(ready[contender].times(seconds))
        runner.progress("")
    return row


def chosen_cases(args: argparse.Namespace, cell: str) -> list[Case]:
    """The cases of one cell that the options ask for."""
    if args.odd:
        found = odd(cell)
    else:
        shapes = args.shapes or ([(16, 4, 16, 32)] if args.quick else SHAPES)
        found = [Case(cell, *shape) for shape in shapes]
    changes: dict[str, Any] = {"dtype": args.dtype}
    changes |= {"layers": args.layers} if args.layers > 1 else {}
    changes |= {"last": True} if args.loss == "last" else {}
    changes |= {"token": True} if args.mode == "token" else {}
    changes |= {"input_gradient": False} if args.no_input_gradient else {}
    changes |= {name: True for name in ("bidirectional", "lengths") if getattr(args, name)}
    return [replace(case, **changes) for case in found]


def read_shape(text: str) -> tuple[int, ...]:
    sizes = tuple(int(size) for size in text.split(","))
    if len(sizes) != 4 or min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a shape is T,B,I,H, each at least 1")
    return sizes


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench scan", description=__doc__)
    add = parser.add_argument
    add("--cells", nargs="+", choices=list(CELLS), default=list(CELLS), metavar="CELL", help=f"of {', '.join(CELLS)}")
    add("--shapes", nargs="+", type=read_shape, metavar="T,B,I,H", help="default: seven usual ones")
    add("--odd", action="store_true", help="odd sizes, one step and 5,000, layers, directions, lengths, by token")
    add("--loss", choices=("every", "last"), default="every", help="on which steps the loss is (default every)")
    add("--mode", choices=("train", "token"), default="train", help="token: inference, one step a call, state carried")
    add("--layers", type=int, default=1)
    add("--bidirectional", action="store_true")
    add("--lengths", action="store_true", help="rows end at different steps")
    add("--no-input-gradient", action="store_true", help="as for a first layer")
    add("--dtype", choices=tuple(TOLERANCE), default="float32")
    add("--threads", type=int, default=2, help="for every contender (default 2)")
    add("--rounds", type=int, help="turns for each contender (default 5; 2 if quick)")
    add("--seconds", type=float, help="length of a turn (default 0.3; 0.05 if quick)")
    add("--quick", action="store_true", help="one small shape and few rounds, to see that all works")
    add("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), metavar="NAME", help=str(CONTENDERS))
    add("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    add("--picture", type=Path, metavar="FILE", help="draw the ratios (needs matplotlib)")
    args = parser.parse_args(argv)
    args.rounds = args.rounds if args.rounds is not None else 2 if args.quick else 5
    args.seconds = args.seconds if args.seconds is not None else 0.05 if args.quick else 0.3
    if min(args.rounds, args.threads, args.layers) < 1 or not args.seconds > 0:
        parser.error("rounds, threads and layers are at least 1, seconds more than 0")
    if args.odd and args.shapes:
        parser.error("--odd has shapes of its own")
    if args.mode == "token" and (args.bidirectional or args.lengths or args.loss == "last" or args.odd):
        parser.error("--mode token goes with --shapes, --layers and --dtype only")
    return args


def title(cell: str, args: argparse.Namespace) -> str:
    name = {"peephole": "peephole LSTM", "layernorm": "layer-norm LSTM"}.get(cell, cell.upper())
    return f"{name}: ms, T,B,I,H"


def main(argv: list[str]) -> int:
    args = parse(argv)
    contenders, absent = runner.installed(args.contenders)
    facts = runner.machine(("tinytape", "torch", "jax", "numba", "numpy"))
    print(f"forward and backward over time, {args.dtype}, threads: {args.threads}, results equal")
    print(runner.describe(facts))
    if absent:
        print(f"absent (not installed): {', '.join(absent)}")
    tables: dict[str, list[Row]] = {}
    peak = 0.0
    options = {"dtype": args.dtype, "threads": args.threads}
    with worker.Worker("bench.scan", "numpy", options, args.threads, widest_vectors()) as product:
        for cell in args.cells:
            rows = tables[title(cell, args)] = []
            for case in chosen_cases(args, cell):
                rows.append(measure_case(case, contenders, args.threads, args.rounds, args.seconds))
                peak = max(peak, 2 * SGEMM**3 / min(product.times(0.3)) / 1e9)
            shown = [name for name in contenders if takes_part(name, Case(cell, 1, 1, 1, 1))]
            print("\n" + report.table(title(cell, args), rows, shown, peak), flush=True)
    print(f"\nNumPy's product of {SGEMM}x{SGEMM} matrices: {peak:.0f} GFLOP/s")
    complaints = [line for rows in tables.values() for line in report.problems(rows)]
    if complaints:
        print("\n" + "\n".join(complaints), file=sys.stderr)
    if args.json:
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in vars(args).items()}
        found = {name: [row.facts() for row in rows] for name, rows in tables.items()}
        whole = {"benchmark": "scan", "unit": "seconds a step", "options": plain, "machine": facts, "absent": absent}
        args.json.write_text(json.dumps(whole | {"sgemm_gflops": peak, "tables": found}, indent=1) + "\n", "utf-8")
    if args.picture:
        report.picture(args.picture, tables, contenders, runner.describe(facts))
    return 1 if complaints else 0
