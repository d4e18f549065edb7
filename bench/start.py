"""How long from a fresh process to the first gradient of an LSTM: start, import, build, forward, backward.

Each contender is a script as a user would write it, run by a new interpreter. The first run of all has empty caches
for compiled code; the others find there what it left. Files have been read before, so the disk is not measured.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from time import monotonic
from typing import Any

from bench import report, runner

T, B, I, H = 32, 4, 32, 32
TOLERANCE = 1e-4

PROBLEM = f"""
imported = monotonic()
import numpy as np
rng = np.random.default_rng(0)
x = rng.standard_normal(({T}, {B}, {I}), np.float32)
shapes = dict(weight_ih_l0=({4 * H}, {I}), weight_hh_l0=({4 * H}, {H}), bias_ih_l0=({4 * H},), bias_hh_l0=({4 * H},))
weights = {{name: rng.uniform(-0.1, 0.1, shape).astype(np.float32) for name, shape in shapes.items()}}
"""
FINISH = """
ended = monotonic()
import json
sizes = [float((np.asarray(grad, np.float64) ** 2).sum()) for grad in grads]
print(json.dumps({"begun": begun, "imported": imported, "ended": ended, "gradients": sizes}))
"""
SCRIPTS = {
    "tinytape": """
from time import monotonic
begun = monotonic()
import tinytape as tt
{problem}
lstm = tt.nn.LSTM({I}, {H})
lstm.load_state_dict(weights)
x = tt.tensor(x, requires_grad=True)
lstm(x)[0].sum().backward()
grads = [leaf.grad.numpy() for leaf in (x, *lstm.parameters())]
{finish}
""",
    "torch": """
from time import monotonic
begun = monotonic()
import torch
{problem}
torch.set_num_threads({threads})
lstm = torch.nn.LSTM({I}, {H})
lstm.load_state_dict({{name: torch.from_numpy(value) for name, value in weights.items()}})
x = torch.from_numpy(x).requires_grad_()
lstm(x)[0].sum().backward()
grads = [leaf.grad.numpy() for leaf in (x, *lstm.parameters())]
{finish}
""",
    "jax": """
from time import monotonic
begun = monotonic()
import jax
import jax.numpy as jnp
{problem}
def total(x, w):
    a = x @ w["weight_ih_l0"].T + w["bias_ih_l0"] + w["bias_hh_l0"]
    def step(state, a):
        h, c = state
        i, f, g, o = jnp.split(a + h @ w["weight_hh_l0"].T, 4, axis=-1)
        c = jax.nn.sigmoid(f) * c + jax.nn.sigmoid(i) * jnp.tanh(g)
        h = jax.nn.sigmoid(o) * jnp.tanh(c)
        return (h, c), h
    zeros = jnp.zeros(({B}, {H}), x.dtype)
    return jax.lax.scan(step, (zeros, zeros), a)[1].sum()
dx, dw = jax.block_until_ready(jax.jit(jax.grad(total, (0, 1)))(x, weights))
grads = [dx, *(dw[name] for name in weights)]
{finish}
""",
}


def script(contender: str, threads: int) -> str:
    sizes = {"I": I, "B": B, "H": H, "threads": threads}
    return SCRIPTS[contender].format(problem=PROBLEM, finish=FINISH, **sizes)


def caches(folder: str) -> dict[str, str]:
    """Settings that put all compiled code into `folder`, however quickly it was compiled."""
    return {
        "TINYTAPE_CACHE_DIR": os.path.join(folder, "tinytape"), "NUMBA_CACHE_DIR": os.path.join(folder, "numba"),
        "JAX_COMPILATION_CACHE_DIR": os.path.join(folder, "jax"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }  # fmt: skip


def run(contender: str, threads: int, settings: Mapping[str, str]) -> dict[str, Any]:
    """Seconds to the import's end and to the gradient, from the moment the process was asked for; and the gradients."""
    begun = monotonic()
    done = subprocess.run(
        [sys.executable, "-c", script(contender, threads)],
        env=runner.environment(threads, settings),
        cwd=runner.ROOT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise runner.ContenderFailed(f"{contender} failed:\n{done.stderr.strip()}")
    told = json.loads(done.stdout.splitlines()[-1])
    times = {"import": told["imported"] - told["begun"], "gradient": told["ended"] - begun}
    return times | {"gradients": told["gradients"]}


def check(contender: str, answer: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Raise unless all gradients have the size of the other's."""
    for got, want in zip(answer["gradients"], wanted["gradients"], strict=True):
        if not math.isclose(got, want, rel_tol=TOLERANCE):
            raise runner.ContenderFailed(f"{contender}: a gradient's squares sum to {got}, not {want}")


def measure(contenders: Sequence[str], threads: int, rounds: int) -> dict[str, dict[str, list[float]]]:
    """Times by contender: of the import and to the gradient in each round, and to the very first gradient."""
    found = {name: {"import": [], "gradient": [], "first": []} for name in contenders}
    with tempfile.TemporaryDirectory() as folder:
        settings = caches(folder)
        answers = {name: run(name, threads, settings) for name in contenders}
        wanted = answers.get("torch", answers[contenders[0]])
        for name, answer in answers.items():
            check(name, answer, wanted)
            found[name]["first"].append(answer["gradient"])
        for index, name in runner.turns(contenders, rounds):
            runner.progress(f"round {index + 1} of {rounds}: {name}")
            answer = run(name, threads, settings)
            check(name, answer, wanted)
            for kind in ("import", "gradient"):
                found[name][kind].append(answer[kind])
        runner.progress("")
    return found


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m bench start", description=__doc__.splitlines()[0])
    add, names = parser.add_argument, list(SCRIPTS)
    add("--threads", type=int, default=2, help="for every contender (default 2)")
    add("--rounds", type=int, default=9, help="processes for each contender (default 9)")
    add("--contenders", nargs="+", choices=names, default=names, metavar="NAME", help=str(names))
    add("--json", type=Path, metavar="FILE", help="write everything measured to FILE")
    args = parser.parse_args(argv)
    if min(args.rounds, args.threads) < 1:
        parser.error("rounds and threads are at least 1")
    return args


def main(argv: list[str]) -> int:
    args = parse(argv)
    contenders, absent = runner.installed(args.contenders)
    facts = runner.machine(("tinytape", "torch", "jax", "numba", "numpy"))
    try:
        found = measure(contenders, args.threads, args.rounds)
    except runner.ContenderFailed as failure:
        print(failure, file=sys.stderr)
        return 1
    print(f"seconds to the first gradient of an LSTM, ({T},{B},{I},{H}), threads: {args.threads}, results equal")
    print(runner.describe(facts))
    if absent:
        print(f"absent (not installed): {', '.join(absent)}")
    medians = {name: {kind: statistics.median(times) for kind, times in found[name].items()} for name in contenders}
    ours = medians.get(report.OURS, {}).get("gradient")
    rows = []
    for name, row in medians.items():
        ratio = report.digits(row["gradient"] / ours if ours else None)
        rows.append([name, *(report.digits(row[kind]) for kind in ("import", "gradient", "first")), ratio])
    print("\n" + runner.table(["", "import alone", "first gradient", "with empty caches", "by tinytape's"], rows))
    if args.json:
        whole = {"benchmark": "start", "unit": "seconds", "threads": args.threads, "machine": facts, "absent": absent}
        args.json.write_text(json.dumps(whole | {"times": found}, indent=1) + "\n", "utf-8")
    return 0
