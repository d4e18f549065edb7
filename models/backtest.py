"""Forecasts held against what came: baselines, a table of scores, a picture, and what lies ahead."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

import tinytape as tt
from models import command
from models.forecaster import LEVELS, MEDIAN, Forecaster, Task, forecast

LOW, HIGH = 0, len(LEVELS) - 1


def baselines(task: Task, batch: tt.data.WindowBatch) -> dict[str, np.ndarray]:
    """Quantiles (B, horizon, levels) of forecasts without a network; intervals are those of errors in training."""
    season, found = task.seasons[0], {}
    for i, (values, split) in enumerate(zip(task.values, task.splits, strict=True)):
        filled = tt.data.fill_gaps(values, season)
        past = filled[: split.valid]
        methods = {
            "naive": tt.data.naive, "seasonal naive": lambda x, h: tt.data.seasonal_naive(x, h, season),
            "drift": tt.data.drift, "linear AR": tt.data.LinearAR(past, 2 * max(task.seasons)),
        }  # fmt: skip
        for name, method in methods.items():
            around = tt.data.error_quantiles(method, past, task.horizon, LEVELS, max(2 * season, task.context), 50)
            around -= around[:, MEDIAN, None]  # the point forecast is the method's own
            for row in np.flatnonzero(batch.series == i):
                quantiles = found.setdefault(name, np.empty((len(batch.series), task.horizon, len(LEVELS))))
                quantiles[row] = method(filled[: batch.origins[row]], task.horizon)[:, None] + around
    return found


def table(task: Task, batch: tt.data.WindowBatch, found: dict[str, np.ndarray]) -> str:
    rows: dict[str, list[float]] = {}
    lines = [f"{'':22}{'MASE':>9}{'sMAPE':>9}{'RMSE':>11}{'pinball':>9}{'in 90%':>8}{'in 50%':>8}"]
    scale, y, data = task.scales[batch.series][:, None], batch.targets, tt.data
    for name, q in found.items():
        point = q[:, :, MEDIAN]
        points = [data.mase(y, point, scale), data.smape(y, point), data.rmse(y, point)]
        inside = [data.coverage(y, q[:, :, i], q[:, :, HIGH - i]) for i in (LOW, 2)]
        rows[name] = scores = [*points, data.pinball(y, q, LEVELS, scale), *inside]
        lines.append(f"{name:22}" + "{:9.3f}{:9.3f}{:11.4g}{:9.4f}{:8.1%}{:8.1%}".format(*scores))
    best = [min(rows, key=lambda name: rows[name][column]) for column in range(4)]
    lowest = (f"{measure} {name}" for measure, name in zip(("MASE", "sMAPE", "RMSE", "pinball"), best, strict=True))
    return "\n".join([*lines, f"lowest: {', '.join(lowest)}"])


def draw(task: Task, batch: tt.data.WindowBatch, found: dict[str, np.ndarray], path: Path) -> None:
    """Forecasts with intervals from four origins, and the error against how far ahead."""
    figure, axes = command.figure(5, 1, (7.5, 11))
    best = found[list(found)[-1]]
    for ax, row in zip(axes, np.linspace(0, len(batch.series) - 1, 4).astype(int), strict=False):
        x = batch.origins[row] + np.arange(task.horizon)
        before = np.arange(batch.origins[row] - min(task.context, 3 * task.horizon), batch.origins[row])
        values = task.values[batch.series[row]]
        ax.plot(before, values[before], "k", lw=0.8)
        ax.plot(x, batch.targets[row], "k", lw=0.8, label="what came")
        ax.fill_between(x, best[row, :, LOW], best[row, :, HIGH], alpha=0.2, lw=0, label="90%")
        ax.fill_between(x, best[row, :, 2], best[row, :, HIGH - 2], alpha=0.3, lw=0, color="C0", label="50%")
        ax.plot(x, best[row, :, MEDIAN], "C0", label=list(found)[-1])
        ax.plot(x, found["seasonal naive"][row, :, MEDIAN], "C1", lw=0.8, label="seasonal naive")
        ax.set_title(f"{task.names[batch.series[row]]}, from step {batch.origins[row]}", fontsize=9)
    axes[0].legend(fontsize=7, ncols=5)
    for name, q in found.items():
        errors = np.abs(batch.targets - q[:, :, MEDIAN]) / task.scales[batch.series][:, None]
        axes[4].plot(1 + np.arange(task.horizon), [np.mean(e[~np.isnan(e)]) for e in errors.T], label=name)
    axes[4].set(xlabel="steps ahead", ylabel="MASE", ylim=(0, None))
    axes[4].legend(fontsize=7, ncols=5)
    figure.savefig(path, dpi=80)


def ahead(task: Task, models: list[Forecaster], path: Path) -> None:
    """Forecast beyond the end of each series, into a CSV file."""
    context = np.stack([tt.data.fill_gaps(v, task.seasons[0])[-task.context :] for v in task.values])
    ends = np.array([len(v) for v in task.values])
    batch = tt.data.WindowBatch(np.arange(len(ends)), ends, context, np.empty((len(ends), 0)))
    quantiles = forecast(task, models, batch)
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["series", "steps ahead", *(f"{level:.0%}" for level in LEVELS)])
        for name, rows in zip(task.names, quantiles, strict=True):
            writer.writerows([name, k, *(f"{x:.6g}" for x in row)] for k, row in enumerate(rows, 1))
