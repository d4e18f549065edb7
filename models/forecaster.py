"""A network that forecasts quantiles of one series or many: what it sees, how it is trained, how it looks ahead."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import tinytape as tt

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
MEDIAN = LEVELS.index(0.5)


@dataclass
class Task:
    """Series, and how they are cut and looked at. Everything fitted is fitted before `splits[i].valid`."""

    names: list[str]
    values: list[np.ndarray]  # NaN where missing
    stamps: list[Any]  # datetime64[s] or numbers of steps, for each series; None: no calendar
    splits: list[tt.data.Split]
    seasons: list[int]
    horizon: int
    context: int
    patch: int  # how many values the network reads at a step

    def __post_init__(self) -> None:
        cuts = zip(self.names, self.values, self.splits, strict=True)
        self.scales = np.array([_scale(name, v[: s.train], self.seasons[0]) for name, v, s in cuts])
        calendars = [self._calendar(v, s) for v, s in zip(self.values, self.stamps, strict=True)]
        self.calendar = np.concatenate(calendars)  # of all series, one behind the other
        self.starts = np.cumsum([0, *map(len, calendars[:-1])])

    def _calendar(self, values: np.ndarray, stamps: Any) -> np.ndarray:
        """What the calendar says about each step of a series, and of a horizon beyond it."""
        if stamps is None:
            return np.zeros((len(values) + self.horizon, 0))
        later = stamps[-1] + (stamps[-1] - stamps[-2]) * np.arange(1, self.horizon + 1)
        return tt.data.calendar_features(np.concatenate([stamps, later]), self.seasons)

    def windows(self, context: int, horizon: int, part: str) -> tt.data.SeriesWindows:
        """Windows whose targets lie in the training, validation or test part; contexts may reach back before it."""
        index = ("train", "valid", "test").index(part)
        start = None if index == 0 else [s[index - 1] for s in self.splits]
        stop = [s[index] for s in self.splits]
        return tt.data.SeriesWindows(self.values, context, horizon, start, stop, self.seasons[0])


class Inputs(NamedTuple):
    patches: np.ndarray  # (T, B, features): values, the spread, and the calendar at the end of each patch
    values: np.ndarray  # (B, context): the values alone, for the linear part
    level: np.ndarray  # (B, 1): what was subtracted, in the units of the series
    spread: np.ndarray  # (B, 1): what was divided by


def look(task: Task, series: np.ndarray, origins: np.ndarray, context: np.ndarray) -> Inputs:
    """What the network sees before an origin: every window is measured by the level and spread of its last season."""
    season, scale = max(task.seasons), task.scales[series][:, None]
    last = context[:, -season:]
    level = last.mean(1, keepdims=True)
    spread = np.maximum(last.std(1, keepdims=True), 0.3 * scale)
    scaled = np.clip((context - level) / spread, -10, 10)
    steps = context.shape[1] // task.patch
    ends = np.arange(1, steps + 1) * task.patch - context.shape[1] - 1
    moments = task.calendar[(task.starts[series] + origins)[:, None] + ends]
    told = np.broadcast_to(np.log(spread / scale)[:, None], (len(series), steps, 1))
    patches = np.concatenate([scaled.reshape(len(series), steps, task.patch), told, moments], axis=2)
    return Inputs(patches.transpose(1, 0, 2).astype("f4"), scaled.astype("f4"), level, spread)


class Forecaster(tt.nn.Module):
    """A recurrent layer over patches, and beside it a linear autoregression, as in LSTNet (Lai et al. 2018)."""

    def __init__(self, task: Task, cell: str, block: int, hidden: int, dropout: float, seed: int) -> None:
        super().__init__()
        self.generator = generator = tt.Generator(seed)
        layer = {"lstm": tt.nn.LSTM, "gru": tt.nn.GRU}[cell]
        self.rnn = layer(task.patch + 1 + task.calendar.shape[1], hidden, generator=generator)
        self.dropout = tt.nn.Dropout(dropout, generator=generator)
        self.head = tt.nn.Linear(hidden, block * len(LEVELS), generator=generator)
        self.linear = tt.nn.Linear(task.context, block, bias=False, generator=generator)
        tt.nn.init.zeros_(self.linear.weight)
        self.block = block

    def forward(self, inputs: Inputs):
        """Quantiles of the next `block` values, (B, block, levels), in units of the window's level and spread."""
        outputs, _ = self.rnn(inputs.patches)
        around = self.head(self.dropout(outputs[-1])).reshape(-1, self.block, len(LEVELS))
        return around + self.linear(inputs.values).reshape(-1, self.block, 1)


def train(task: Task, folder: Path, options: dict, seed: int, resume: bool) -> Forecaster:
    """One network; where there is a validation part, with the weights that are best on it."""
    block = task.horizon if options["strategy"] == "direct" else 1
    model = Forecaster(task, options["cell"], block, options["hidden"], options["dropout"], seed)
    windows = task.windows(task.context, block, "train")
    validating = task.splits[0].valid > task.splits[0].train
    optimizer = tt.optim.AdamW(model, lr=options["lr"], weight_decay=0.01, clip_norm=1.0)
    rate = tt.optim.schedule.cosine(options["lr"], options["lr"] / 100, options["steps"], warmup=50)
    scheduler = tt.optim.schedule.Scheduler(optimizer, rate)
    about = options | {"member": seed}
    with tt.train.Run(folder, model, optimizer, scheduler, about=about, resume=resume) as run:
        for _ in run.steps(options["steps"]):
            batch = windows.draw(options["batch"], model.generator)
            run.step(loss_of(task, model, batch, options["relative"]))
            if validating:
                run.validate(lambda: validation(task, model), every=max(50, options["steps"] // 16))
        if validating:
            run.validate(lambda: validation(task, model))
            run.load_best()
    model.eval()
    return model


def loss_of(task: Task, model: Forecaster, batch: tt.data.WindowBatch, relative: float):
    """Pinball loss in the units of MASE; plus, times `relative`, in units of the level, as sMAPE has them."""
    inputs = look(task, batch.series, batch.origins, batch.context)
    target = (batch.targets - inputs.level) / inputs.spread
    known = np.repeat(~np.isnan(target)[:, :, None], len(LEVELS), axis=2)
    weight = inputs.spread / task.scales[batch.series][:, None]
    if relative:
        weight = weight + relative * inputs.spread / np.maximum(np.abs(inputs.level), 0.1 * inputs.spread)
    loss = tt.nn.functional.pinball_loss(model(inputs), np.nan_to_num(target).astype("f4"), LEVELS, reduction="none")
    weights = np.where(known, np.minimum(weight, 20.0)[:, :, None], 0.0).astype("f4")
    return (loss * weights).sum() / max(int(known.sum()), 1)


def validation(task: Task, model: Forecaster) -> float:
    """Pinball loss on windows from the validation part, at most about 256 of them."""
    windows = task.windows(task.context, model.block, "valid")
    return loss_of(task, model, windows.walk(max(1, len(windows) // 256)), 0.0).item()


def forecast(task: Task, models: list[Forecaster], batch: tt.data.WindowBatch, paths: int = 100) -> np.ndarray:
    """Quantiles (B, horizon, levels) in the units of the series: the mean of what the networks say.

    Direct: all steps at once. Recursive: one step, drawn from the quantiles, is put behind the context for the next;
    the quantiles are those of many such paths.
    """
    found = []
    for model in models:
        if model.block == task.horizon:
            found.append(_quantiles(task, model, batch.series, batch.origins, batch.context))
            continue
        draw, steps = tt.Generator(0), np.arange(task.horizon)
        series, origins = np.repeat(batch.series, paths), np.repeat(batch.origins, paths)
        seen = np.concatenate([np.repeat(batch.context, paths, axis=0), np.zeros((len(series), task.horizon))], axis=1)
        for step in steps:
            quantiles = _quantiles(task, model, series, origins + step, seen[:, step : step + task.context])[:, 0]
            seen[:, task.context + step] = _drawn(quantiles, draw.uniform((len(series),), dtype="float64"))
        drawn = seen[:, task.context :].reshape(len(batch.series), paths, task.horizon)
        found.append(np.moveaxis(np.quantile(drawn, LEVELS, axis=1), 0, -1))
    return np.mean(found, axis=0)


def _quantiles(task: Task, model: Forecaster, series: Any, origins: Any, context: np.ndarray) -> np.ndarray:
    inputs = look(task, series, origins, context)
    with tt.no_grad():
        raw = model(inputs).numpy().astype(float)
    return np.sort(raw, axis=-1) * inputs.spread[:, :, None] + inputs.level[:, :, None]  # sorted: they must not cross


def _drawn(quantiles: np.ndarray, chances: np.ndarray) -> np.ndarray:
    """Values at the chances given, on lines through the quantiles (rows, levels) that go on beyond the outermost."""
    levels = np.array(LEVELS)
    left = np.clip(np.searchsorted(levels, chances) - 1, 0, len(levels) - 2)
    rows = np.arange(len(quantiles))
    part = (chances - levels[left]) / (levels[left + 1] - levels[left])
    return quantiles[rows, left] + part * (quantiles[rows, left + 1] - quantiles[rows, left])


def _scale(name: str, train: np.ndarray, season: int) -> float:
    try:
        return tt.data.Scaler.fit(train, "seasonal", season).scale
    except tt.InputError as error:
        raise tt.InputError(f"series {name}: {error.what}", error.advice) from None
