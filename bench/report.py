"""What the benchmarks over time have in common: rows of times, their ratios, the picture."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench import runner
from bench.worker import median_of_medians

OURS = "tinytape"


@dataclass
class Row:
    """What was measured of one case: blocks of seconds by contender, errors, and why a contender has no times."""

    label: str
    flops: float = 0.0
    times: dict[str, list[list[float]]] = field(default_factory=dict)
    errors: dict[str, float] = field(default_factory=dict)
    problems: dict[str, str] = field(default_factory=dict)

    @property
    def medians(self) -> dict[str, float]:
        return {name: median_of_medians(blocks) for name, blocks in self.times.items() if blocks}

    @property
    def ratios(self) -> dict[str, float]:
        """Each peer's time by ours, and "best", the quickest peer's; empty where we have none."""
        medians = self.medians
        if OURS not in medians:
            return {}
        ours = medians.pop(OURS)
        found = {name: seconds / ours for name, seconds in medians.items()}
        return found | ({"best": min(found.values())} if found else {})

    @property
    def gflops(self) -> float | None:
        ours = self.medians.get(OURS)
        return self.flops / ours / 1e9 if ours and self.flops else None

    def facts(self) -> dict[str, Any]:
        """For JSON, which has no infinity."""
        errors = {name: error if math.isfinite(error) else None for name, error in self.errors.items()}
        return {
            "label": self.label, "flops": self.flops, "seconds": self.medians, "ratios": self.ratios,
            "gflops": self.gflops, "errors": errors, "problems": self.problems, "times": self.times,
        }  # fmt: skip


def digits(value: float | None, places: int = 3) -> str:
    """A positive number with so many significant digits; a dash for None."""
    if value is None:
        return "-"
    if value <= 0 or not math.isfinite(value):
        return str(value)
    power = int(f"{value:.{places - 1}e}".split("e")[1])  # of what is left after rounding
    return f"{value:.{max(0, places - 1 - power)}f}"


def geometric_mean(values: Sequence[float]) -> float | None:
    return statistics.geometric_mean(values) if values else None


def table(title: str, rows: Sequence[Row], contenders: Sequence[str], peak: float | None = None) -> str:
    """Milliseconds, each peer's time by ours, and where operations are counted, our speed and share of the peak."""
    peers = [name for name in contenders if name != OURS]
    compared = [*peers, "best"] if OURS in contenders and peers else []
    counted = OURS in contenders and any(row.flops for row in rows)
    head = [title, *contenders, *(f"{name}/ours" for name in compared)]
    head += ["GFLOP/s"] * counted + ["of sgemm"] * (counted and peak is not None)
    lines: list[list[str | float]] = []
    for row in rows:
        medians, ratios = row.medians, row.ratios
        line = [row.label]
        for name in contenders:
            missing = "wrong" if name in row.errors else "failed" if name in row.problems else "-"
            line.append(digits(medians[name] * 1e3) if name in medians else missing)
        line += [digits(ratios.get(name)) for name in compared]
        if counted:
            line.append(digits(row.gflops))
            line += [] if peak is None else [digits(row.gflops and row.gflops / peak, 2)]
        lines.append(line)
    if compared and len(rows) > 1:
        means = [geometric_mean([row.ratios[name] for row in rows if name in row.ratios]) for name in compared]
        mean_line = ["geometric mean", *[""] * len(contenders), *map(digits, means)]
        lines.append(mean_line + [""] * (len(head) - len(mean_line)))
    return runner.table(head, lines)


def problems(rows: Sequence[Row]) -> list[str]:
    return [f"{row.label}: {name}: {text}" for row in rows for name, text in row.problems.items()]


def picture(path: Path, tables: dict[str, Sequence[Row]], contenders: Sequence[str], caption: str) -> None:
    """Each peer's time by ours, as bars to the right or left of 1, a panel for each title."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter

    peers = [name for name in contenders if name != OURS]
    height = 1.2 + sum(0.6 + 0.2 * len(rows) * (1 + len(peers)) * 0.6 for rows in tables.values())
    figure, panels = plt.subplots(len(tables), 1, figsize=(8, height), layout="constrained", squeeze=False)
    for (title, rows), axes in zip(tables.items(), panels[:, 0], strict=True):
        width = 0.8 / max(1, len(peers))
        for index, name in enumerate(peers):
            found = [(at, row.ratios[name]) for at, row in enumerate(rows) if name in row.ratios]
            places = [at + (index - (len(peers) - 1) / 2) * width for at, _ in found]
            bars = axes.barh(places, [ratio - 1 for _, ratio in found], width, left=1, label=name, color=f"C{index}")
            axes.bar_label(bars, [digits(ratio) for _, ratio in found], padding=3, fontsize=7)
        axes.axvline(1.0, color="black", lw=1)
        name, _, what = title.partition(": ms, ")
        axes.set(title=name, ylabel=what, xscale="log", xlabel="time by tinytape's (over 1: tinytape is faster)")
        axes.margins(x=0.12)
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.xaxis.set_minor_locator(NullLocator())
        axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
    if peers:
        panels[0, 0].legend()
    figure.suptitle(caption, fontsize=8)
    figure.savefig(path, dpi=130)
    plt.close(figure)
