"""Rows of `python -m bench memory`: tables, aims and the picture."""

import math
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from bench import report, runner
from bench.summed import BUDGET, WINDOW, Task

CONTENDERS = {  # by the name of the option, the name in tables
    "tinytape": "tinytape",
    "tinytape-sqrt": "sqrt",
    "tinytape-budget": BUDGET,
    "tinytape-truncated": f"cut at {WINDOW}",
    "torch": "torch",
    "torch-checkpoint": "torch ckpt",
    "jax": "jax",
    "jax-checkpoint": "jax ckpt",
}
PLANNED = ("tinytape", "tinytape-sqrt", "tinytape-budget")
LARGE = 64e6  # bytes: from here on resident memory tells a workspace to some per cent
SQRT_FLOATS = 1.2 * 9  # a batch row, by H * sqrt(T)


@dataclass
class Row(report.Row):
    """What was measured of one task, by contender; a block of times for each round."""

    task: Task = field(kw_only=True)
    grown: dict[str, list[int]] = field(default_factory=dict)
    pool: dict[str, int] = field(default_factory=dict)
    plan: dict[str, int] = field(default_factory=dict)
    fixed: dict[str, int] = field(default_factory=dict)
    compared: dict[str, float | None] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, contender: str, answer: dict[str, Any]) -> None:
        """Take a right contender's answer."""
        self.times.setdefault(contender, []).append(answer["times"])
        self.grown.setdefault(contender, []).append(answer["grown"])
        for name, figures in (("pool", self.pool), ("plan", self.plan), ("fixed", self.fixed)):
            if name in answer:
                figures[contender] = answer[name]

    @property
    def right(self) -> list[str]:
        """Contenders with figures, and nothing against them in any round."""
        return [name for name in self.grown if name not in self.problems]

    def workspace(self, contender: str) -> float:
        """Bytes by which resident memory grew."""
        return statistics.median(self.grown[contender])

    def floats(self, contender: str, fixed: bool = True) -> float:
        """What the pool lent, in floats a batch row, by H * sqrt(T); without what is there however many steps."""
        nbytes = self.pool[contender] - (0 if fixed else self.fixed[contender])
        return nbytes / 4 / self.task.B / self.task.H / math.sqrt(self.task.T)

    def microseconds(self, contender: str) -> float:
        return self.medians[contender] / self.task.T * 1e6

    def facts(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        compared = {k: v if v is None or math.isfinite(v) else None for k, v in self.compared.items()}
        return {
            "task": self.task.options(), "grown": self.grown, "pool": self.pool, "plan": self.plan, "fixed": self.fixed,
            "times": self.times, "errors": compared, "problems": self.problems, "left_out": self.left_out,
        }  # fmt: skip


# ---- aims -----------------------------------------------------------------------------------------------------------

Figures = Iterator[tuple[str, float]]  # where it was measured, and the figure


class Aim(NamedTuple):
    """The worst of some figures, and how large it may be."""

    text: str
    most: float
    figures: Callable[[Sequence[Row]], Figures]


def of_rows(figure: Callable[[Row], float], *needed: str, large: str = "") -> Callable[[Sequence[Row]], Figures]:
    """A figure of every row in which the contenders are right, and `large` is large enough for its memory to tell."""

    def figures(rows: Sequence[Row]) -> Figures:
        for row in rows:
            if all(name in row.right for name in needed) and (not large or row.workspace(large) >= LARGE):
                yield row.label, figure(row)

    return figures


def long_by_short(contender: str) -> Callable[[Sequence[Row]], Figures]:
    """Time a step of the longest sequence by that of the shortest with as many rows."""

    def figures(rows: Sequence[Row]) -> Figures:
        alike = [row for row in rows if row.task.B == 1 and contender in row.right]
        if len(alike) > 1:
            yield alike[-1].label, alike[-1].microseconds(contender) / alike[0].microseconds(contender)

    return figures


def aims() -> list[Aim]:
    full, sqrt, budget = PLANNED
    by_torch = of_rows(lambda row: row.workspace(full) / row.workspace("torch"), full, "torch", large="torch")
    by_full = of_rows(lambda row: row.medians[sqrt] / row.medians[full], sqrt, full)
    found = [
        Aim("full: workspace by torch's", 0.5, by_torch),
        Aim("sqrt: floats a row by H sqrt(T)", SQRT_FLOATS, of_rows(lambda row: row.floats(sqrt), sqrt)),
        Aim("the same less fixed bytes", SQRT_FLOATS, of_rows(lambda row: row.floats(sqrt, fixed=False), sqrt)),
        Aim("sqrt: time by full's", 1.3, by_full),
        Aim(f"{BUDGET}: the pool's MB", 16.0, of_rows(lambda row: row.pool[budget] / 1e6, budget)),
    ]
    return found + [aim for name in PLANNED for aim in of_each(name, CONTENDERS[name])]


def of_each(name: str, shown: str) -> list[Aim]:
    """Aims of every variant that makes a plan."""
    apart = of_rows(lambda row: abs(row.pool[name] - row.plan[name]), name)
    off = of_rows(lambda row: abs(row.workspace(name) / row.plan[name] - 1), name, large=name)
    return [
        Aim(f"{shown}: time a step by that at T=1,000", 1.1, long_by_short(name)),
        Aim(f"{shown}: bytes of pool and plan apart", 0, apart),
        Aim(f"{shown}: workspace off the plan", 0.05, off),
    ]


# ---- text -----------------------------------------------------------------------------------------------------------


def text(rows: Sequence[Row], contenders: Sequence[str]) -> str:
    shown = [CONTENDERS[name] for name in contenders]
    planned = [name for name in PLANNED if name in contenders]

    def table(title: str, figure: Callable[[Row, str], float]) -> str:
        return runner.table(
            [title, *shown], [[row.label, *(cell(row, name, figure) for name in contenders)] for row in rows]
        )

    parts = [
        table("workspace, MB", lambda row, name: row.workspace(name) / 1e6),
        table("microseconds a step", lambda row, name: row.microseconds(name)),
        table("error in norm", lambda row, name: row.compared[name]),
    ]
    if planned:
        head = ["tinytape's pool, MB", *(f"{CONTENDERS[n]} {what}" for n in planned for what in ("plan", "pool"))]
        lines = [
            [row.label, *(cell(row, n, f) for n in planned for f in (planned_megabytes, pool_megabytes))]
            for row in rows
        ]
        parts.append(runner.table(head, lines))
    return "\n\n".join([*parts, aims_table(rows)])


def planned_megabytes(row: Row, name: str) -> float:
    return row.plan[name] / 1e6


def pool_megabytes(row: Row, name: str) -> float:
    return row.pool[name] / 1e6


def cell(row: Row, name: str, figure: Callable[[Row, str], float | None]) -> str:
    if name in row.left_out:
        return f"({row.left_out[name]})"
    if name in row.problems:
        return "wrong" if name in row.compared else "failed"
    value = figure(row, name) if name in row.grown else None
    return f"{value:.0e}" if value and value < 1e-3 else report.digits(value)


def aims_table(rows: Sequence[Row]) -> str:
    """The worst figure for each aim that was measured, and whether it is met."""
    lines = []
    for aim in aims():
        measured = list(aim.figures(rows))
        if measured:
            where, worst = max(measured, key=lambda pair: pair[1])
            digits = "0" if worst == 0 else report.digits(worst)
            lines.append([aim.text, digits, f"{aim.most:g}", where, "met" if worst <= aim.most else "missed"])
    return runner.table(["aims: the worst of all rows", "figure", "at most", "at", ""], lines)


# ---- picture --------------------------------------------------------------------------------------------------------

COLOURS = {"tinytape": "C0", "torch": "C1", "jax": "C2"}
STYLES = {"": "o-", "sqrt": "s--", "checkpoint": "s--", "budget": "^:", "truncated": "v-."}


def picture(path: Path, rows: Sequence[Row], contenders: Sequence[str], caption: str) -> None:
    """Workspace and time a step against T, a column for each number of batch rows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    batches = sorted({row.task.B for row in rows}, reverse=True)
    size = {"figsize": (1 + 4.5 * len(batches), 7.5), "layout": "constrained", "squeeze": False, "sharex": "col"}
    figure, panels = plt.subplots(2, len(batches), **size)
    quantities = {"workspace, MB": lambda row, name: row.workspace(name) / 1e6, "µs a step": Row.microseconds}
    for (title, quantity), line in zip(quantities.items(), panels, strict=True):
        for B, axes in zip(batches, line, strict=True):
            for name in contenders:
                there = [row for row in rows if row.task.B == B and name in row.right]
                library, _, how = name.partition("-")
                values = [max(quantity(row, name), 1e-3) for row in there]
                style = {"color": COLOURS[library], "label": CONTENDERS[name]}
                axes.plot([row.task.T for row in there], values, STYLES[how], **style)
            axes.set(xscale="log", yscale="log", title=f"B = {B}", xlabel="steps T", ylabel=title)
            axes.grid(which="both", alpha=0.3)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8)
    figure.suptitle(caption, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
