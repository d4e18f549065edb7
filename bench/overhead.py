"""What one op costs: a chain of ops on arrays so small that the arithmetic is nearly free."""

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np

from bench import runner

CONTENDERS = ("tinytape", "torch", "autograd", "numpy")
OPS = ("add", "mul", "tanh", "matmul")
PHASES = {"both": "forward and backward", "forward": "forward alone"}
SIZE = 8
LENGTH = 1000
TOLERANCE = 1e-3  # of the largest entry: a thousand float32 ops in a row round to about 1e-4


def inputs(op: str) -> tuple[np.ndarray, np.ndarray]:
    """The start h and the other operand W of a chain, float32, scaled so that all values stay finite."""
    rng = np.random.default_rng(0)
    h, W = rng.standard_normal((2, SIZE, SIZE))
    if op == "mul":
        W = 1 + 1e-3 * W
    elif op == "matmul":
        W = np.linalg.qr(W).Q  # a rotation keeps lengths
    return h.astype(np.float32), W.astype(np.float32)


def apply(op: str, tanh: Callable[[Any], Any], h: Any, W: Any) -> Any:
    """The chain. The four loops are spelt out so that no dispatch of ours is timed."""
    if op == "add":
        for _ in range(LENGTH):
            h = h + W
    elif op == "mul":
        for _ in range(LENGTH):
            h = h * W
    elif op == "tanh":
        for _ in range(LENGTH):
            h = tanh(h)
    else:
        for _ in range(LENGTH):
            h = h @ W
    return h


def reference(op: str) -> list[np.ndarray]:
    """Final value, gradient for h and for W (no W for tanh) of the chain's sum, by hand in float64."""
    h, W = (x.astype(np.float64) for x in inputs(op))
    states = [h]
    for _ in range(LENGTH):
        h = {"add": np.add, "mul": np.multiply, "matmul": np.matmul}[op](h, W) if op != "tanh" else np.tanh(h)
        states.append(h)
    dh, dW = np.ones_like(h), np.zeros_like(W)
    for before, after in zip(states[-2::-1], states[:0:-1], strict=True):
        if op == "add":
            dW = dW + dh
        elif op == "mul":
            dh, dW = dh * W, dW + dh * before
        elif op == "tanh":
            dh = dh * (1 - after * after)
        else:
            dh, dW = dh @ W.T, dW + before.T @ dh
    return [h, dh] if op == "tanh" else [h, dh, dW]


# Each contender: op -> (forward, both). `forward` records the chain and lets it go again; `both` also walks
# back from the sum, starting from no gradients, and returns a function that gives the results as arrays, so
# that conversion is not timed. NumPy has no `both`; its `forward` returns that function.


def with_leaves(op: str, library: Any):
    """The same text for tinytape and PyTorch, which share these names."""
    h0, W = (library.tensor(x, requires_grad=True) for x in inputs(op))
    leaves = [h0] if op == "tanh" else [h0, W]

    def forward():
        apply(op, library.tanh, h0, W)

    def both():
        for leaf in leaves:
            leaf.grad = None
        h = apply(op, library.tanh, h0, W)
        h.sum().backward()
        return lambda: [h.detach().numpy(), *(leaf.grad.numpy() for leaf in leaves)]

    return forward, both


def tinytape(op: str):
    import tinytape as tt

    return with_leaves(op, tt)


def torch(op: str):
    import torch

    torch.set_num_threads(1)
    return with_leaves(op, torch)


def autograd(op: str):
    import autograd.numpy as anp
    from autograd import make_vjp
    from autograd.tracer import getval

    h0, W = inputs(op)
    leaves = (h0,) if op == "tanh" else (h0, W)
    end = None

    def total(h, W=W):
        nonlocal end
        h = apply(op, anp.tanh, h, W)
        end = getval(h)
        return anp.sum(h)

    record = make_vjp(total, tuple(range(len(leaves))))

    def forward():
        record(*leaves)

    def both():
        vjp, _ = record(*leaves)
        grads = vjp(np.float32(1))
        return lambda: [end, *grads]

    return forward, both


def numpy(op: str):
    h0, W = inputs(op)

    def forward():
        h = apply(op, np.tanh, h0, W)
        return lambda: [h]

    return forward, None


def microseconds(f: Callable[[], object], repetitions: int) -> float:
    """The median time of a call, for each op of the chain, after two calls to warm up."""
    times = []
    for _ in range(repetitions + 2):
        start = perf_counter()
        f()
        times.append(perf_counter() - start)
    return statistics.median(times[2:]) / LENGTH * 1e6


def measure(contender: str, options: dict[str, Any]) -> dict[str, Any]:
    """Results and times of one contender, for every op. Runs in a process of its own."""
    answer = {}
    prepare = {"tinytape": tinytape, "torch": torch, "autograd": autograd, "numpy": numpy}[contender]
    for op in options["ops"]:
        forward, both = prepare(op)
        results = (both or forward)()()
        answer[op] = {
            "results": [np.asarray(x).tolist() for x in results],
            "dtypes": [str(np.asarray(x).dtype) for x in results],
            "both": both and microseconds(both, options["repetitions"]),
            "forward": microseconds(forward, options["repetitions"]),
        }
    return answer


def check(contender: str, op: str, answer: dict[str, Any], wanted: list[np.ndarray]) -> None:
    """Raise unless every result is float32 and near the reference. No time counts before this."""
    names = ["value"] if contender == "numpy" else ["value", "gradient of h", "gradient of W"][: len(wanted)]
    if len(answer["results"]) != len(names):
        raise runner.ContenderFailed(f"{contender}, {op}: {len(answer['results'])} results, not {names}")
    for name, got, dtype, want in zip(names, answer["results"], answer["dtypes"], wanted, strict=False):
        if np.shape(got) != want.shape or dtype != "float32":
            raise runner.ContenderFailed(f"{contender}, {op}: {name} is {dtype} of shape {np.shape(got)}")
        error = np.abs(got - want).max() / np.abs(want).max()
        if not error <= TOLERANCE:
            raise runner.ContenderFailed(f"{contender}, {op}: {name} is off by {error:.1e} of the largest")


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench overhead", description=__doc__)
    parser.add_argument("--rounds", type=int, default=5, help="processes for each contender (default 5)")
    parser.add_argument("--repetitions", type=int, default=20, help="timed calls in each (default 20)")
    parser.add_argument("--ops", nargs="+", choices=OPS, default=list(OPS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    args = parser.parse_args(argv)
    if args.rounds < 1 or args.repetitions < 1:
        parser.error("rounds and repetitions are at least 1")

    contenders, absent = runner.installed(args.contenders)
    options = {"ops": args.ops, "repetitions": args.repetitions}
    wanted = {op: reference(op) for op in args.ops}
    times = {c: {op: {phase: [] for phase in PHASES} for op in args.ops} for c in contenders}
    try:
        for contender, answer in runner.in_turn("bench.overhead", contenders, options, args.rounds):
            for op in args.ops:
                check(contender, op, answer[op], wanted[op])
                for phase in PHASES:
                    if answer[op][phase] is not None:
                        times[contender][op][phase].append(answer[op][phase])
    except runner.ContenderFailed as failure:
        print(failure, file=sys.stderr)
        return 1

    machine = runner.machine(CONTENDERS)
    print(f"microseconds an op: {SIZE}x{SIZE} float32, chain of {LENGTH:,}, one thread, results equal")
    print(runner.describe(machine))
    if absent:
        print(f"absent (not installed): {', '.join(absent)}")
    for phase, title in PHASES.items():
        shown = [c for c in contenders if times[c][args.ops[0]][phase]]  # NumPy has no backward
        rivals = [c for c in shown if c != "torch" and "torch" in shown]
        rows = []
        for op in args.ops:
            row = {c: statistics.median(times[c][op][phase]) for c in shown}
            rows.append([op, *row.values(), *(row[c] / row["torch"] for c in rivals)])
        print("\n" + runner.table([title, *shown, *(f"{c}/torch" for c in rivals)], rows))

    if args.json:
        facts = {"benchmark": "overhead", "unit": "microseconds an op", "dtype": "float32", "threads": 1}
        facts |= {"size": SIZE, "length": LENGTH, "rounds": args.rounds, "repetitions": args.repetitions}
        facts |= {"machine": machine, "absent": absent, "times": times}
        args.json.write_text(json.dumps(facts, indent=1) + "\n", "utf-8")
    return 0
