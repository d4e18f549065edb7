"""Forecasts of one series or many, with intervals, beside the forecasts that a model has to beat.

python -m models.forecast                                              weekly CO2 at Mauna Loa, a year ahead
python -m models.forecast --csv FILE --column NAME --season 12 --horizon 12
python -m models.forecast --m4 DIR                                     the M4 competition's 414 hourly series
python -m models.forecast --resume FOLDER                              go on, bit for bit as if never stopped
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tinytape as tt
from models import backtest, command
from models.command import number
from models.forecaster import Task, forecast, look, train

CO2 = Path(__file__).parent / "data" / "mauna_loa_co2.csv"
DEFAULTS = {
    "csv": "", "m4": "", "column": "", "time": "", "by": "", "sort": False, "duplicates": "refuse", "season": "52",
    "horizon": 52, "test": 0.2, "valid": 0.1, "every": 0, "cell": "lstm", "strategy": "direct", "context": 0,
    "hidden": 48, "dropout": 0.2, "batch": 64, "steps": 800, "lr": 3e-3, "members": 3, "relative": 0.0, "seed": 1,
}  # fmt: skip
M4 = {
    "season": "24,168", "horizon": 48, "test": 48.0, "valid": 0.0, "context": 2, "hidden": 96, "dropout": 0.1,
    "batch": 128, "steps": 5000, "members": 5, "relative": 10.0,
}  # fmt: skip


def read(options: dict) -> Task:
    """The series as they are to be forecast; what was found in the file is printed."""
    seasons = sorted(seasons_of(options["season"]))
    if options["m4"]:
        series = read_m4(Path(options["m4"]))
    else:
        series = tt.data.read_series(
            options["csv"] or CO2, options["column"].split(",") if options["column"] else None, options["time"] or None,
            options["by"] or None, sort=options["sort"], duplicates=options["duplicates"],
        )  # fmt: skip
        print("\n".join(map(str, series)))
    horizon = options["horizon"]
    context, patch = sizes(options, seasons, min(map(len, series)))
    splits = [tt.data.split_in_time(len(one), options["test"], options["valid"]) for one in series]
    for one, split in zip(series, splits, strict=True):
        parts = {"training": (0, split.train, max(context, 2 * seasons[0]) + horizon)}
        parts["test"] = (split.valid, split.end, horizon)
        if options["valid"]:
            parts["validation"] = (split.train, split.valid, horizon)
        for part, (start, end, least) in parts.items():
            if end - start < least:
                raise tt.InputError(
                    f"series {one.name} has {len(one)} values, {end - start} of them in the {part} part; a context of "
                    f"{context}, a season of {seasons[0]} and a horizon of {horizon} need {least} there.",
                    "give a smaller --horizon, --context or --season, or a longer series.",
                )
            if np.isnan(one.values[start:end]).all():
                raise tt.InputError(
                    f"series {one.name}: all {end - start} values of the {part} part are missing.",
                    "give another --test and --valid, or cut the series where it ends.",
                )
    stamps = [one.stamps if one.stamps is None or one.stamps.dtype.kind == "M" else None for one in series]
    if len(series) == 1 and stamps[0] is None:
        stamps = [np.arange(len(series[0]), dtype=float)]  # of many, steps with equal numbers need not be equal times
    if any(s is None for s in stamps):
        stamps = [None] * len(series)
    return Task([s.name for s in series], [s.values for s in series], stamps, splits, seasons, horizon, context, patch)


def seasons_of(text: str) -> list[int]:
    try:
        seasons = [int(part) for part in text.split(",")]
    except ValueError:
        raise tt.InputError(f"--season: {text!r} is not a number.", "give steps, such as 12, or 24,168.") from None
    if min(seasons) < 2 or any(max(seasons) % s for s in seasons):
        raise tt.InputError(
            f"--season: got {text}; a season has 2 steps or more, and the longest is a multiple of the others.",
            "give the steps after which the pattern comes again: 12 for months, 24,168 for hours.",
        )
    return seasons


def sizes(options: dict, seasons: list[int], shortest: int) -> tuple[int, int]:
    """How much the network sees, and how much of it it reads at a step: a whole season if there is a longer one."""
    longest = max(seasons)
    usual = max(1, min(max(3, round(120 / longest)), shortest // (5 * longest)))
    context = (options["context"] or usual) * longest
    patch = seasons[0] if longest > seasons[0] else max(1, context // 24)
    return -(-context // patch) * patch, patch


def read_m4(folder: Path) -> list[tt.data.Series]:
    """The hourly files of the M4 competition: a series in each row, and what was to be forecast in another file."""
    found: list[dict[str, np.ndarray]] = []
    for name in ("Hourly-train.csv", "Hourly-test.csv"):
        rows = list(csv.reader(tt.data.read_text(folder / name, 1).splitlines()))[1:]
        try:
            found.append({row[0]: np.array([float(x) for x in row[1:] if x]) for row in rows if row})
        except ValueError as error:
            raise tt.InputError(f"{folder / name}: {error}.", "give the folder of the competition's files.") from None
    if not found[0] or found[0].keys() != found[1].keys() or any(len(x) != 48 for x in found[1].values()):
        raise tt.InputError(f"--m4: the files in {folder} do not fit together.", "give the competition's own files.")
    return [tt.data.Series(name, np.concatenate([x, found[1][name]]), None, "hour") for name, x in found[0].items()]


def audit(task: Task) -> tt.data.LeakReport:
    """Whether the training windows depend on the test part, or what the network sees on what comes after the origin."""
    first = [0, len(task.values) // 2, len(task.values) - 1][: len(task.values)]
    splits = [task.splits[i] for i in first]

    def parts(values: list[np.ndarray]) -> dict[str, Any]:
        some = Task(
            ["a"] * len(first), values, [task.stamps[i] for i in first], splits,
            task.seasons, task.horizon, task.context, task.patch,
        )  # fmt: skip
        drawn = some.windows(task.context, task.horizon, "train").draw(64, tt.Generator(0))
        tests = some.windows(task.context, task.horizon, "test")
        batch = tests.take(np.arange(len(first)), tests.first)
        inputs = look(some, batch.series, batch.origins, batch.context)
        return {"scales": some.scales, "targets": drawn.targets, "context": drawn.context, **inputs._asdict()}

    return tt.data.audit_leaks(parts, [task.values[i] for i in first], [split.valid for split in splits])


def options_of(arguments: Sequence[str]) -> tuple[dict, str | None, bool]:
    """What to do, where to, and whether it is gone on with."""
    parser = argparse.ArgumentParser("python -m models.forecast", description="Forecast time series.")
    parser.add_argument("--resume", metavar="FOLDER", help="go on with a run")
    parser.add_argument("--out", metavar="FOLDER", help="default runs/forecast")
    choices = {"cell": ("lstm", "gru"), "strategy": ("direct", "recursive")}
    choices["duplicates"] = ("refuse", "first", "last", "mean")
    for name, usual in DEFAULTS.items():
        if isinstance(usual, bool):
            parser.add_argument("--" + name, action="store_true", default=None)
            continue
        low = 0 if name in ("seed", "every", "context") or isinstance(usual, float) else 1
        kind = str if isinstance(usual, str) else number(type(usual), low)
        parser.add_argument("--" + name, type=kind, choices=choices.get(name), help=f"default {usual}")
    given = {name: value for name, value in vars(parser.parse_args(arguments)).items() if value is not None}
    out, resume = given.pop("out", None), given.pop("resume", None)
    if resume is not None:
        if given or out:
            raise tt.InputError("--resume: it goes on as it began, without other options.", "leave them out.")
        about = tt.train.load(Path(resume) / "member-1", "last")["about"]
        if not about.keys() >= {*DEFAULTS, "digest"}:
            raise tt.InputError(f"--resume: {resume} holds no forecast.", "give a folder of models.forecast.")
        return {name: about[name] for name in (*DEFAULTS, "digest")}, resume, True
    if {"csv", "m4"} <= given.keys():
        raise tt.InputError("--csv, --m4: both are given.", "give one of them.")
    if "csv" in given and not {"season", "horizon"} <= given.keys():
        raise tt.InputError("--csv: --season and --horizon are needed with it.", "such as --season 12 --horizon 12.")
    places = {name: str(Path(given[name]).resolve()) for name in ("csv", "m4") if name in given}
    return DEFAULTS | (M4 if "m4" in given else {}) | given | places, out, False


def program(arguments: Sequence[str]) -> None:
    options, place, resume = options_of(arguments)
    task = read(options)
    digest = hashlib.sha256(b"".join(values.tobytes() for values in task.values)).hexdigest()
    if options.setdefault("digest", digest) != digest:
        raise tt.InputError(f"--resume: the data are not those that {place} was trained on.", "restore them.")
    report = audit(task)
    print(f"audit of the windows: {report}")
    report.check()
    folder = Path(place if resume else command.free_folder("--out", place, "runs/forecast"))
    every = options["every"] or max(1, task.horizon // 4)
    batch = task.windows(task.context, task.horizon, "test").walk(every)
    print(f"backtest: {len(batch.origins)} forecasts of {task.horizon} steps; MASE in seasons of {task.seasons[0]}")
    members = [folder / f"member-{i + 1}" for i in range(options["members"])]
    models = [train(task, m, options, options["seed"] + i, resume) for i, m in enumerate(members)]
    found = backtest.baselines(task, batch)
    found[f"{options['cell'].upper()} {options['strategy']}"] = forecast(task, models, batch)
    print(f"\n{backtest.table(task, batch, found)}\n")
    backtest.ahead(task, models, folder / "forecast.csv")
    backtest.draw(task, batch, found, folder / "forecast.png")
    print(f"forecast beyond the end: {folder / 'forecast.csv'}, picture: {folder / 'forecast.png'}")


def main(arguments: Sequence[str]) -> None:
    command.run(program, arguments, again=lambda member: ["--resume", str(Path(member).parent)])


if __name__ == "__main__":
    main(sys.argv[1:])
