"""Forecasts as a user asks for them: the command, what it says, going on after a kill, and what it refuses."""

from __future__ import annotations

import csv
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tinytape as tt
from models import backtest, forecast, forecaster

ROOT = Path(__file__).parent.parent
DATA = os.environ.get("TINYTAPE_DATA")
QUICK = ["--steps", "60", "--members", "1", "--hidden", "8", "--batch", "16"]


@pytest.fixture
def waves(tmp_path: Path) -> Path:
    """A season of 6 with a trend and noise, monthly, with two gaps."""
    rng = np.random.default_rng(0)
    t = np.arange(160)
    y = 10 + 0.05 * t + 3 * np.sin(2 * np.pi * t / 6) + rng.normal(0, 0.3, 160)
    lines = [f"{2000 + i // 12}-{i % 12 + 1:02},{'' if i in (40, 41) else f'{v:.3f}'}" for i, v in enumerate(y)]
    path = tmp_path / "waves.csv"
    path.write_text("month,y\n" + "\n".join(lines) + "\n")
    return path


def asked(path: Path, tmp_path: Path, *more: str) -> list[str]:
    given = ["--csv", str(path), "--season", "6", "--horizon", "6", "--out", str(tmp_path / "out"), *QUICK]
    return [*given, *more]


def task_of(values: list[np.ndarray], **changed) -> forecaster.Task:
    n = len(values)
    given = {
        "names": [f"s{i}" for i in range(n)], "values": values, "stamps": [None] * n,
        "splits": [tt.data.split_in_time(len(v), 0.2, 0.1) for v in values], "seasons": [6], "horizon": 6,
        "context": 12, "patch": 3,
    }  # fmt: skip
    return forecaster.Task(**given | changed)


def scores(out: str) -> dict[str, list[float]]:
    lines = [line for line in out.splitlines() if line.count("%") == 2 and "MASE" not in line]
    return {line[:22].strip(): [float(x.rstrip("%")) for x in line[22:].split()] for line in lines}


# ---- the command


def test_the_command_reports_backtests_draws_and_looks_ahead(waves, tmp_path, capsys):
    forecast.program(asked(waves, tmp_path))
    out = capsys.readouterr().out
    assert "y: 160 values from 2000-01-01 to 2013-04-01, every 1 month; 2 missing (1.2%), at most 2 in a row" in out
    assert "no leak" in out
    found = scores(out)
    assert list(found) == ["naive", "seasonal naive", "drift", "linear AR", "LSTM direct"]
    assert found["seasonal naive"][0] < found["naive"][0]
    winner = min(found, key=lambda name: found[name][3])
    assert re.search(f"lowest: .*pinball {winner}$", out, re.MULTILINE)
    with open(tmp_path / "out" / "forecast.csv") as file:
        rows = list(csv.DictReader(file))
    assert [row["steps ahead"] for row in rows] == [str(k) for k in range(1, 7)]
    for row in rows:
        quantiles = [float(row[f"{level:.0%}"]) for level in forecaster.LEVELS]
        assert quantiles == sorted(quantiles)
    assert (tmp_path / "out" / "forecast.png").read_bytes().startswith(b"\x89PNG")


def test_recursive_forecasts_with_a_gru_of_several_columns(waves, tmp_path, capsys):
    text = waves.read_text().splitlines()
    wider = [f"{line},{i % 7 + 1}" for i, line in enumerate(text[1:])]
    waves.write_text("\n".join([text[0] + ",z", *wider]) + "\n")
    forecast.program(
        asked(waves, tmp_path, "--steps", "20", "--cell", "gru", "--strategy", "recursive", "--valid", "0")
    )
    out = capsys.readouterr().out
    assert "GRU recursive" in scores(out) and "\nz: 160 values" in out


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "models.forecast", *arguments]


def test_a_killed_run_goes_on_to_the_table_of_an_unbroken_one(waves, tmp_path):
    given = asked(waves, tmp_path, "--steps", "400", "--members", "2")
    killed = subprocess.Popen(command(*given), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    best = tmp_path / "out" / "member-1" / "best.safetensors"
    deadline = time.time() + 60
    while not best.exists() and time.time() < deadline:
        time.sleep(0.05)
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    assert best.exists() and not (tmp_path / "out" / "forecast.csv").exists()
    for arguments in (["--resume", str(tmp_path / "out")], [*given, "--out", str(tmp_path / "whole")]):
        subprocess.run(command(*arguments), cwd=ROOT, capture_output=True, check=True)
    ahead = [(tmp_path / name / "forecast.csv").read_bytes() for name in ("out", "whole")]
    assert ahead[0] == ahead[1]


# ---- what is refused


REFUSED = {
    "missing file": (["--csv", "nowhere.csv", "--season", "6", "--horizon", "6"], "there is no file"),
    "no season": (["--csv", "{csv}", "--horizon", "6"], "--season and --horizon are needed"),
    "season of 1": (["--csv", "{csv}", "--season", "1", "--horizon", "6"], "a season has 2 steps or more"),
    "season in words": (["--csv", "{csv}", "--season", "year", "--horizon", "6"], "'year' is not a number"),
    "odd seasons": (["--csv", "{csv}", "--season", "4,6", "--horizon", "6"], "a multiple of the others"),
    "unknown column": (["--csv", "{csv}", "--column", "z", "--season", "6", "--horizon", "6"], "no column 'z'"),
    "long horizon": (["--csv", "{csv}", "--season", "6", "--horizon", "200"], "160 values, 112 of them in the tra"),
    "horizon beyond the test part": (["--csv", "{csv}", "--season", "6", "--horizon", "33"], "32 of them in the test"),
    "nothing to train on": (["--csv", "{csv}", "--season", "6", "--horizon", "6", "--test", "160"], "leave nothing"),
    "constant": (["--csv", "{constant}", "--season", "6", "--horizon", "6"], "series y: .* is constant"),
    "text": (["--csv", "{text}", "--column", "y", "--season", "6", "--horizon", "6"], "row 2 holds 'many'"),
    "empty column": (["--csv", "{empty}", "--column", "y", "--season", "6", "--horizon", "6"], "is empty: all"),
    "duplicates": (["--csv", "{twice}", "--season", "6", "--horizon", "6"], "occurs 2 times"),
    "unsorted": (["--csv", "{back}", "--season", "6", "--horizon", "6"], "not sorted"),
    "nothing to test on": (["--csv", "{ends}", "--season", "6", "--horizon", "6"], "all 32 values of the test part"),
    "short history": (["--csv", "{csv}", "--season", "54", "--horizon", "6", "--context", "1"], "need 114 there"),
    "m4": (["--m4", "{folder}"], "there is no file"),
    "both": (["--m4", "{folder}", "--csv", "{csv}", "--season", "6", "--horizon", "6"], "both are given"),
    "resume of nothing": (["--resume", "{folder}"], "cannot be read|holds no run|no such"),
    "resume with options": (["--resume", "{folder}", "--steps", "5"], "without other options"),
    "out in use": (["--csv", "{csv}", "--season", "6", "--horizon", "6", "--out", "{folder}"], "is not empty"),
}


@pytest.mark.parametrize(("arguments", "message"), REFUSED.values(), ids=REFUSED)
def test_refuses_with_one_line_and_code_2_and_leaves_no_trace(waves, tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    body = waves.read_text().splitlines()
    files = {
        "csv": body,
        "constant": [body[0], *(line.split(",")[0] + ",3" for line in body[1:])],
        "text": [body[0], body[1], body[2].split(",")[0] + ",many", *body[3:]],
        "empty": [body[0], *(line.split(",")[0] + "," for line in body[1:])],
        "ends": [*body[:-32], *(line.split(",")[0] + "," for line in body[-32:])],
        "twice": [*body[:9], body[8], *body[9:]],
        "back": [*body[:9], body[10], body[9], *body[11:]],
    }
    place = tmp_path / "files"
    place.mkdir()
    for name, lines in files.items():
        (place / f"{name}.csv").write_text("\n".join(lines) + "\n")
    before = sorted(tmp_path.rglob("*"))
    names = {name: place / f"{name}.csv" for name in files} | {"folder": place}
    with pytest.raises(SystemExit) as caught:
        forecast.main([a.format(**names) for a in arguments])
    assert caught.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") <= 2  # what was wrong, and what to do
    assert re.search(message, error), error
    assert sorted(tmp_path.rglob("*")) == before


def test_other_data_are_not_gone_on_with(waves, tmp_path, capsys):
    forecast.program(asked(waves, tmp_path))
    waves.write_text(waves.read_text().replace("2013-04,", "2013-04,1"))
    with pytest.raises(tt.InputError, match="are not those"):
        forecast.program(["--resume", str(tmp_path / "out")])


# ---- the parts


@pytest.mark.parametrize("leaky", [False, True])
def test_the_programs_own_audit_finds_a_planted_leak(monkeypatch, leaky):
    task = task_of([np.sin(np.arange(90) / 3) + 0.1 * np.arange(90)] * 2)
    if leaky:
        monkeypatch.setattr(forecaster, "_scale", lambda name, train, season: float(np.std(train.base)))
    assert bool(forecast.audit(task)) is not leaky


def test_baselines_know_nothing_of_the_test_part():
    values = np.sin(np.arange(90) / 3) + 0.1 * np.arange(90)
    task = task_of([values])
    first = task.windows(12, 6, "test").first

    def quantiles(series: list[np.ndarray]) -> dict[str, np.ndarray]:
        other = task_of(series)
        return backtest.baselines(other, other.windows(12, 6, "test").take([0], first))

    report = tt.data.audit_leaks(quantiles, [values], [int(first[0])])
    report.check()
    assert report.numbers == 4 * 6 * len(forecaster.LEVELS)


def test_a_forecast_moves_and_stretches_with_its_series():
    """Windows are measured by their own level and spread, so units do not matter."""
    values = np.random.default_rng(1).normal(size=90).cumsum() + 50
    plain, other = task_of([values]), task_of([300 * values - 7000])
    model = forecaster.Forecaster(plain, "lstm", 6, 8, 0.0, 0)
    model.eval()
    found = [
        forecaster.forecast(task, [model], task.windows(task.context, 6, "test").walk()) for task in (plain, other)
    ]
    np.testing.assert_allclose(found[1], 300 * found[0] - 7000, rtol=1e-4)


def test_paths_are_drawn_from_the_quantiles():
    levels = np.array(forecaster.LEVELS)
    quantiles = np.tile(levels * 10 - 5, (4000, 1))  # those of a uniform distribution
    chances = tt.Generator(0).uniform((4000,), dtype="float64")
    np.testing.assert_allclose(forecaster._drawn(quantiles, chances), chances * 10 - 5, atol=1e-9)


def test_missing_targets_do_not_count():
    values = np.sin(np.arange(90) / 3)
    task = task_of([values])
    model = forecaster.Forecaster(task, "lstm", 6, 8, 0.0, 0)
    batch = task.windows(12, 6, "train").walk(10)
    targets = batch.targets.copy()
    targets[:, 3:] = np.nan
    half = forecaster.loss_of(task, model, batch._replace(targets=targets), 0.0)
    quantiles = unsorted_quantiles(task, model, batch)[:, :3]
    expected = tt.data.pinball(batch.targets[:, :3], quantiles, forecaster.LEVELS, task.scales[0])
    assert half.item() == pytest.approx(expected, rel=1e-4)
    half.backward()
    assert all(np.isfinite(p.grad.numpy()).all() for p in model.parameters())


def unsorted_quantiles(task, model, batch):
    inputs = forecaster.look(task, batch.series, batch.origins, batch.context)
    with tt.no_grad():
        return model(inputs).numpy() * inputs.spread[:, :, None] + inputs.level[:, :, None]


# ---- real series


@pytest.mark.skipif(DATA is None, reason="TINYTAPE_DATA is not set")
def test_the_seasonal_naive_forecast_of_m4_hourly_has_its_published_scores():
    series = forecast.read_m4(Path(DATA) / "m4")
    assert len(series) == 414
    split = [one.values[:-48] for one in series]
    targets = np.stack([one.values[-48:] for one in series])
    scale = np.array([tt.data.Scaler.fit(x, "seasonal", 24).scale for x in split])[:, None]
    for method, published in ((lambda x, h: tt.data.seasonal_naive(x, h, 24), (13.912, 1.193)),
                              (tt.data.naive, (43.003, 11.608))):  # fmt: skip
        found = np.stack([method(x, 48) for x in split])
        assert tt.data.smape(targets, found) == pytest.approx(published[0], abs=5e-4)
        assert tt.data.mase(targets, found, scale) == pytest.approx(published[1], abs=5e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["co2", "sunspots"])
def test_beats_the_baselines(name, tmp_path, capsys):
    if name == "co2":
        given = []
    elif DATA is None:
        pytest.skip("TINYTAPE_DATA is not set")
    else:
        given = ["--csv", f"{DATA}/series/sunspot.month.csv", "--season", "132", "--horizon", "24"]
    forecast.program([*given, "--out", str(tmp_path / "out")])
    found = scores(capsys.readouterr().out)
    ours, linear, season = found["LSTM direct"], found["linear AR"], found["seasonal naive"]
    assert ours[3] < min(linear[3], season[3]) and 80 <= ours[4] <= 97  # pinball, and how much the 90% interval holds
    assert ours[0] < season[0] and ours[0] < linear[0] * (1.05 if name == "co2" else 1.0)
