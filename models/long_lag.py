"""How far back can a recurrent network learn to look? Adding, copying and temporal order against sequence length.

python -m models.long_lag                                    the adding problem, short lengths, two minutes
python -m models.long_lag --lengths 400 --networks lstm chrono
python -m models.long_lag --full                             all problems, longer, three seeds: hours

Each training is a run in a folder of its own: the same command again goes on with what is not finished.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

import tinytape as tt
from models import command
from models.lags import PROBLEMS, RATES, Network, Problem

number = command.number
SOLVED = 0.01  # what the score of a problem is to fall below
EVERY = 50  # steps from one validation to the next
FREE = float("inf")  # a clip that never acts


class Cell(NamedTuple):
    """One training of the table."""

    problem: str
    network: str
    length: int
    seed: int
    clip: float

    def __str__(self) -> str:
        return f"{self.problem}-{self.network}-{self.length}-seed{self.seed}-clip{self.clip:g}"


class Result(NamedTuple):
    score: float
    solved: int | None  # after how many steps
    seconds: float
    clipped: float  # share of the steps
    largest: float  # norm of a gradient
    flow: dict[str, dict]  # "before" and "after" training

    def __str__(self) -> str:
        return f"{self.score:.3f}" if self.solved is None else f"{self.solved:,} steps"


def train(cell: Cell, options: argparse.Namespace) -> Result:
    problem, generator = PROBLEMS[cell.problem], tt.Generator(cell.seed)
    model = Network(cell.network, problem, options.hidden, cell.length, generator)
    optimizer = tt.optim.Adam(model, lr=RATES[cell.network], clip_norm=cell.clip)
    x_held, y_held = problem.draw(1000, cell.length, tt.Generator(10**6))
    sizes = f"{options.hidden}units-batch{options.batch}-{options.updates}updates"
    folder, parts = Path(options.out) / f"{cell}-{sizes}", {"data": generator}

    def score() -> float:
        return problem.score(model(x_held, len(y_held)), y_held)

    with tt.train.Run(folder, model, optimizer, parts=parts, resume=True, log_every=1, progress=False) as run:
        flow = run.notes.setdefault("flow", {})
        if "before" not in flow:
            flow["before"] = gradient_flow(model, problem, x_held[:, :100], y_held[:, :100])
        for _ in run.steps(options.updates):
            x, y = problem.draw(options.batch, cell.length, generator)
            try:
                run.step(problem.loss(model(x, len(y)), y))
            except tt.InputError:  # the loss or the gradient is not finite
                run.finished = True
                break
            error = run.validate(score, EVERY)
            run.finished = error is not None and error < SOLVED
        run.validate(score)
        if "after" not in run.notes["flow"]:
            run.notes["flow"]["after"] = gradient_flow(model, problem, x_held[:, :100], y_held[:, :100])
        seconds = run.notes.setdefault("seconds", run.seconds)
        norms = run.history("norm")[1]
        best = float("nan") if run.best is None else run.best.value
        return Result(
            best, run.best.count if best < SOLVED else None, seconds,
            float(np.mean(norms > cell.clip)) if len(norms) else 0.0, float(np.max(norms, initial=0.0)),
            run.notes["flow"],
        )  # fmt: skip


def gradient_flow(model: Network, problem: Problem, x: np.ndarray, y: np.ndarray) -> dict:
    """What becomes of the gradient of the last answer: its norm by step, and the verdict."""
    with tt.inspect.flow(model) as flow:
        problem.loss(model(x, len(y))[-1:], y[-1:]).backward()
    run = flow.runs[0]
    leaf = list(run.sinks)[-1]  # h, or the cell of an LSTM
    return {"norms": flow.norms[run.name][leaf], "verdict": str(flow.verdict(run.name, leaf))}


# ---- what is shown --------------------------------------------------------------------------------------------------

Found = dict[Cell, Result]


def at(found: Found, problem: str, network: str, length: int, clip: float) -> list[Result]:
    """The results of all seeds."""
    return [r for c, r in found.items() if (c.problem, c.network, c.length, c.clip) == (problem, network, length, clip)]


def told(results: list[Result]) -> str:
    """Of how many seeds it was solved, and after how many steps; or how near the best came."""
    solved = [r.solved for r in results if r.solved is not None]
    median = f"{np.median(solved):,.0f} steps" if solved else f"{min(r.score for r in results):.3f}"
    return f"{len(solved)}/{len(results)}  {median}" if len(results) > 1 else median


def grid(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def table(found: Found, name: str, options: argparse.Namespace) -> str:
    score, longest = "mean squared error" if name == "adding" else "share of wrong answers", options.lengths[-1]
    success = [["", *(f"T = {length}" for length in options.lengths)]]
    flows, clips = [], [["", "clip", "steps clipped", "largest norm", "result"]]
    for network in options.networks:
        success.append([network, *(told(at(found, name, network, n, options.clip)) for n in options.lengths)])
        flow = at(found, name, network, longest, options.clip)[0].flow
        flows += [[network, "before", flow["before"]["verdict"]], ["", "after", flow["after"]["verdict"]]]
        for clip in (options.clip, FREE):
            result = at(found, name, network, longest, clip)[0]
            shown = "none" if clip == FREE else f"{clip:g}"
            clips.append([network, shown, f"{result.clipped:.0%}", f"{result.largest:.3g}", str(result)])
    return (
        f"{name}: steps until the {score} is below {SOLVED}; where it never was, the least there was "
        f"(who guesses: {PROBLEMS[name].guess:.4f})\n{grid(success)}\n\n"
        f"the gradient of the last answer on its way back, before and after training, T = {longest}\n{grid(flows)}\n\n"
        f"the effect of clipping the gradient's norm, T = {longest}\n{grid(clips)}\n"
    )


def draw(found: Found, options: argparse.Namespace, path: Path) -> None:
    count = len(options.problems)
    figure, rows = command.figure(count, 3, (13, 3.6 * count), squeeze=False)
    for name, (left, *others) in zip(options.problems, rows, strict=True):
        for i, network in enumerate(options.networks):
            results = [at(found, name, network, length, options.clip) for length in options.lengths]
            left.plot(options.lengths, [np.median([r.score for r in each]) for each in results], "o-", label=network)
            for axes, when in zip(others, ("before", "after"), strict=True):
                norms = results[-1][0].flow[when]["norms"][::-1]
                lags = np.flatnonzero(norms > 0)  # an LSTM's last cell, its output held, has no gradient
                axes.plot(lags, norms[lags] / norms[lags[:1]], color=f"C{i}")
                axes.set(yscale="log", xlabel="steps back", title=f"norm of the gradient, {when} training")
        for axes in others:
            axes.set_ylim(max(axes.get_ylim()[0], 1e-12), min(axes.get_ylim()[1], 1e12))
        for level, style in ((PROBLEMS[name].guess, ":"), (SOLVED, "--")):
            left.axhline(level, color="black", ls=style, lw=1)
        left.set(yscale="log", xlabel="T", title=f"{name}: error (dotted: guessing, dashed: solved)")
    figure.legend(*rows[0, 0].get_legend_handles_labels(), loc="outside right center")
    figure.savefig(path, dpi=90)


# ---- the command ----------------------------------------------------------------------------------------------------


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m models.long_lag", description=(__doc__ or "").partition("\n")[0])
    add = parser.add_argument
    add("--full", action="store_true", help="all problems, T = 50 to 400, three seeds, 5,000 updates")
    add("--problems", nargs="+", choices=PROBLEMS, help="default adding")
    add("--networks", nargs="+", choices=RATES, default=list(RATES), help="default all")
    add("--lengths", nargs="+", type=number(int, 5), metavar="T", help="default 25 50 100")
    add("--seeds", type=number(int, 1), metavar="N", help="how many, default 1")
    add("--updates", type=number(int, 1), metavar="N", help="steps of training at most, default 2500")
    add("--hidden", type=number(int, 1), default=64, metavar="N", help="units, default %(default)s")
    add("--batch", type=number(int, 1), default=64, metavar="N", help="sequences a step, default %(default)s")
    add("--clip", type=number(float, 1e-9), default=1.0, metavar="N", help="largest norm, default %(default)s")
    add("--out", default="runs/long_lag", metavar="FOLDER", help="default %(default)s")
    options = parser.parse_args(arguments)
    small, full = (["adding"], [25, 50, 100], 1, 2500), (list(PROBLEMS), [50, 100, 200, 400], 3, 5000)
    for name, value in zip(("problems", "lengths", "seeds", "updates"), full if options.full else small, strict=True):
        if getattr(options, name) is None:
            setattr(options, name, value)
    for name in ("problems", "networks", "lengths"):
        setattr(options, name, list(dict.fromkeys(getattr(options, name))))
    options.lengths.sort()
    return options


def program(arguments: Sequence[str]) -> None:
    options, found = parse(arguments), {}
    cells = [
        Cell(problem, network, length, seed, clip)
        for problem in options.problems
        for length in options.lengths
        for network in options.networks
        for seed in range(options.seeds)
        for clip in (options.clip, FREE)
        if clip == options.clip or (seed == 0 and length == options.lengths[-1])
    ]
    for i, cell in enumerate(cells, 1):
        found[cell] = train(cell, options)
        print(f"{i}/{len(cells)}  {cell}: {found[cell]}, {found[cell].seconds:.1f} s", file=sys.stderr, flush=True)
    for problem in options.problems:
        print(table(found, problem, options))
    picture = Path(options.out) / "long_lag.png"
    draw(found, options, picture)
    print(f"picture: {picture}")


def main(arguments: Sequence[str]) -> None:
    command.run(program, arguments, again=lambda _: arguments)


if __name__ == "__main__":
    main(sys.argv[1:])
