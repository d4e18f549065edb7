"""Series: reading and refusing, splits, scalers, windows, the audit for leaks, accuracy and baselines."""

import importlib.util
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape import data
from tinytape.engine.errors import InputError, ShapeError

floats = st.floats(-1e3, 1e3, allow_nan=False)
vectors = st.lists(floats, min_size=1, max_size=40)


def write(tmp_path, text, name="series.csv"):
    path = tmp_path / name
    path.write_text(text, "utf-8")
    return path


def rows(*pairs, header="date,y"):
    return "\n".join([header, *(f"{a},{b}" for a, b in pairs)]) + "\n"


# ---- reading


@pytest.mark.parametrize(
    ("stamps", "step"),
    [
        (["2020-01-01", "2020-01-02", "2020-01-04"], "1 day"),
        (["2020/1/1", "2020/1/8", "2020/1/22"], "7 days"),
        (["20200101", "20200108", "20200122"], "7 days"),
        (["2020-01-01 00:00", "2020-01-01 01:00", "2020-01-01 03:00"], "1 hour"),
        (["2020-01-01T00:00:00Z", "2020-01-01T00:15:00Z", "2020-01-01T00:45:00Z"], "15 minutes"),
        (["2019-11", "2019-12", "2020-02"], "1 month"),
        (["2019-11-30", "2019-12-31", "2020-02-29"], "1 month"),
        (["2019-01-15", "2019-04-15", "2019-10-15"], "3 months"),
        (["1", "2", "4"], "1"),
        (["1999.9167", "2000", "2000.1667"], "0.0833333"),
    ],
)  # fmt: skip
def test_steps_that_are_left_out_become_missing_values(tmp_path, stamps, step):
    (series,) = data.read_series(write(tmp_path, rows(*zip(stamps, (5, 6, 7), strict=True))))
    assert series.step == step and series.name == "y"
    np.testing.assert_array_equal(series.values, [5, 6, math.nan, 7])
    assert len(series.stamps) == 4 and (np.diff(series.stamps) > np.diff(series.stamps[:1]).sum()).all()
    assert "1 missing (25.0%)" in str(series) and "left out in the file" in str(series)


def test_month_ends_are_put_back_on_month_ends(tmp_path):
    text = rows(("2019-11-30", 1), ("2019-12-31", 2), ("2020-02-29", 3))
    (series,) = data.read_series(write(tmp_path, text))
    assert [str(s)[:10] for s in series.stamps] == ["2019-11-30", "2019-12-31", "2020-01-31", "2020-02-29"]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (rows(("2020-01-01", 1), ("2020-01-03", 2), ("2020-01-02", 3)), {}, r"not sorted: row 3 \(2020-01-02\)"),
        (rows(("2020-01-01", 1), ("2020-01-01", 2), ("2020-01-02", 3)), {}, "2020-01-01 occurs 2 times; 1 stamps"),
        (
            rows(*((f"2020-01-{d:02}", d) for d in (1, 3, 5, 8, 9, 11))),
            {},
            r"irregular: 2 days as a rule, but 3 days from row 3",
        ),
        (rows(("1", 1), ("2", 1), ("3", 1), ("4.4", 1)), {}, "irregular"),
        (rows(("yesterday", 1), ("today", 2)), {}, "row 1 holds 'yesterday', which is no time stamp"),
        (rows(("01/02/2020", 1), ("02/02/2020", 2)), {}, "no time stamp"),
        (rows(("2020-01-01", 1), ("", 2)), {}, "row 2 has no time stamp"),
        (rows(("2020-01-01", "a"), ("2020-01-02", "b")), {}, "no column of numbers"),
        (rows(("2020-01-01", "1"), ("2020-01-02", "b")), {"columns": "y"}, "row 2 holds 'b', a number is needed"),
        (rows(("2020-01-01", ""), ("2020-01-02", "NaN")), {"columns": "y"}, "is empty: all 2 values"),
        (rows(("2020-01-01", 1), ("2020-01-02", "inf")), {"columns": "y"}, "row 2 is infinite"),
        (rows(("2020-01-01", 1), ("2020-01-02", 2)), {"columns": "z"}, "no column 'z'"),
        (rows(("2020-01-01", 1), ("2020-01-02", 2)), {"time": "when"}, "no column 'when'"),
        ("1,2\n3,4\n5,6\n", {}, "first line holds numbers"),
        ("a,a\n3,4\n5,6\n", {}, "2 columns are called 'a'"),
        ("a,b\n3,4\n5\n", {}, "row 2 has 1 fields, the header has 2"),
        ("a,b\n3,4\n", {}, "got 1 rows"),
        ("", {}, "is empty"),
        ("\n\n", {}, "nothing in it"),
        ("y\n1\n\n3\n", {}, "row 2 has 0 fields"),
        ('time,y\n1,"' + "x" * 200_000, {}, "no CSV file"),
        (rows(*((i, "o2" if i == 3 else i) for i in range(9))), {}, "row 4 holds 'o2', a number is needed"),
        (rows(*((f"2020-01-0{d}", d) for d in range(1, 9)), ("2999-01-01", 9)), {}, "357,565 of them from row 8"),
        (rows(("1", 1), ("2", 2), ("3", 3), ("1e15", 4)), {}, "are left out"),
        (
            "year,month,y\n" + "".join(f"{2000 + i // 12},{i % 12},1\n" for i in range(30)),
            {},
            "column .month.. are not sorted",
        ),
        (rows(("2020-01-01", 1), ("2020-01-02", 2)), {"duplicates": "drop"}, "duplicates: got 'drop'"),
    ],
)
def test_refuses(tmp_path, text, options, message):
    with pytest.raises(InputError, match=message):
        data.read_series(write(tmp_path, text), **options)


def test_repairs_what_it_is_asked_to_and_says_so(tmp_path):
    text = rows(("2020-01-03", 3), ("2020-01-01", 1), ("2020-01-03", 5), ("2020-01-02", "NA"), ("2020-01-02", 2))
    for how, expected in (("first", [1, math.nan, 3]), ("last", [1, 2, 5]), ("mean", [1, 2, 4])):
        (series,) = data.read_series(write(tmp_path, text), sort=True, duplicates=how)
        np.testing.assert_array_equal(series.values, expected)
        assert "out of order" in str(series) and f"2 duplicate stamps, of which the {how}" in str(series)


def test_many_series_from_columns_and_from_groups(tmp_path):
    wide = write(tmp_path, "ds;a;b;note\n1;1;2;x\n2;3;;y\n3;5;6;z\n")
    assert [(s.name, len(s)) for s in data.read_series(wide)] == [("a", 3), ("b", 3)]
    long = "id,t,y\n" + "".join(f"{g},{t},{10 * i + t}\n" for t in range(3) for i, g in enumerate("uv"))
    found = data.read_series(write(tmp_path, long), "y", "t", by="id")
    assert [s.name for s in found] == ["u", "v"]
    np.testing.assert_array_equal([s.values for s in found], [[0, 1, 2], [10, 11, 12]])


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is None, reason="needs pyarrow")
def test_parquet_reads_as_csv_does(tmp_path):
    import pyarrow
    from pyarrow import parquet

    stamps = np.array(["2020-01-01", "2020-01-02", "2020-01-04"], "datetime64[s]")
    table = pyarrow.table({"time": stamps, "y": pyarrow.array([1.0, None, 3.5])})
    parquet.write_table(table, tmp_path / "y.parquet")
    (series,) = data.read_series(tmp_path / "y.parquet")
    np.testing.assert_array_equal(series.values, [1, math.nan, math.nan, 3.5])
    with pytest.raises(InputError, match="no Parquet file"):
        data.read_series(write(tmp_path, "text", "z.parquet"))


@pytest.mark.skipif(importlib.util.find_spec("pyarrow") is not None, reason="pyarrow is there")
def test_parquet_without_pyarrow_is_refused(tmp_path):
    with pytest.raises(InputError, match="pyarrow is needed"):
        data.read_series(tmp_path / "y.parquet")


# ---- splits, gaps, scalers


def test_split_in_time():
    assert data.split_in_time(100, 0.2, 0.1) == (70, 80, 100)
    assert data.split_in_time(100, 48) == (52, 52, 100)
    for test, valid in ((1.0, 0.999), (0.5, 0.5), (-0.1, 0), (100, 0)):
        if test + valid != 1.999:
            with pytest.raises(InputError, match="leave nothing of 100"):
                data.split_in_time(100, test, valid)


@given(
    values=st.lists(st.one_of(floats, st.just(math.nan)), min_size=1, max_size=40), season=st.integers(1, 6),
    cut=st.integers(1, 40), noise=floats,
)  # fmt: skip
def test_gaps_are_filled_from_the_past_alone(values, season, cut, noise):
    values = np.array([1.0, *values])
    filled = data.fill_gaps(values, season)
    known = ~np.isnan(values)
    np.testing.assert_array_equal(filled[known], values[known])
    assert np.isfinite(filled).all()
    changed = values.copy()
    changed[cut:] = noise
    np.testing.assert_array_equal(data.fill_gaps(changed, season)[:cut], filled[:cut])


def test_a_gap_goes_on_with_the_season_and_the_trend():
    season = np.array([0.0, 3, 1, 2])
    whole = np.tile(season, 4) + 0.5 * np.arange(16)
    holed = whole.copy()
    holed[9:14] = math.nan
    shifted = 4 * 0.5  # changes of the season before have the trend in them, so only the season's own length matters
    filled = data.fill_gaps(holed, 4)
    np.testing.assert_allclose(filled, whole, atol=shifted * 1e-12)
    with pytest.raises(InputError, match="all 3 values"):
        data.fill_gaps([math.nan] * 3)


@given(values=st.lists(floats, min_size=8, max_size=40).filter(lambda v: np.ptp(v) > 1e-3))
def test_scalers_go_there_and_back(values):
    for kind in ("standard", "robust"):
        if kind == "robust" and np.ptp(np.percentile(values, [25, 75])) == 0:
            continue
        scaler = data.Scaler.fit(values, kind)
        np.testing.assert_allclose(scaler.inverse(scaler.transform(values)), values, atol=1e-6)
        assert data.Scaler.from_state_dict(scaler.state_dict()) == scaler
    standard = data.Scaler.fit([*values, math.nan]).transform(values)
    assert standard.mean() == pytest.approx(0, abs=1e-6) and standard.std() == pytest.approx(1, abs=1e-6)


def test_scaler_of_a_season_is_what_mase_is_measured_in_and_refusals():
    train = np.array([1.0, 5, 2, 7, 0, 5])
    assert data.Scaler.fit(train, "seasonal", 2).scale == np.mean([1, 2, 2, 2])
    for bad, kind, season, message in (
        ([3.0] * 9, "standard", 1, "is constant"), ([1.0, 2] * 5, "seasonal", 2, "without any seasonal"),
        ([math.nan] * 4, "standard", 1, "no values"), ([1.0, 2], "seasonal", 5, "no two"), (train, "z", 1, "kind"),
        (train, "seasonal", 0, "season is 0"),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            data.Scaler.fit(bad, kind, season)


# ---- windows


@given(
    lengths=st.lists(st.integers(12, 30), min_size=1, max_size=4), context=st.integers(1, 6), horizon=st.integers(1, 4)
)
def test_windows_are_what_lies_before_and_behind_an_origin(lengths, context, horizon):
    series = [1000.0 * i + np.arange(n) for i, n in enumerate(lengths)]
    cuts = [n - 2 for n in lengths]
    windows = data.SeriesWindows(series, context, horizon, stop=cuts)
    for batch in (windows.walk(), windows.walk(3), windows.draw(20, tt.Generator(1))):
        for s, o, before, after in zip(*batch, strict=True):
            np.testing.assert_array_equal(before, series[s][o - context : o])
            np.testing.assert_array_equal(after, series[s][o : o + horizon])
            assert o + horizon <= cuts[s]
    assert len(windows) == len(windows.walk().origins) == sum(c - horizon - context + 1 for c in cuts)
    later = data.SeriesWindows(series, context, min(horizon, 2), start=cuts)
    assert (later.first == cuts).all() and (later.walk().origins == np.repeat(cuts, later.last - later.first + 1)).sum()


def test_windows_keep_missing_targets_and_fill_contexts():
    windows = data.SeriesWindows([[1, 2, math.nan, 4, 5, math.nan]], 3, 2)
    batch = windows.walk()
    np.testing.assert_array_equal(batch.context, [[1, 2, 3], [2, 3, 4]])
    np.testing.assert_array_equal(batch.targets, [[4, 5], [5, math.nan]])


def test_windows_refuse():
    with pytest.raises(InputError, match="series 1 has 4 values"):
        data.SeriesWindows([np.arange(9), np.arange(4)], 3, 2)
    windows = data.SeriesWindows([np.arange(9)], 3, 2)
    for call in (lambda: windows.take(0, 8), lambda: windows.take(0, 2), lambda: windows.walk(0)):
        with pytest.raises(InputError):
            call()


# ---- the audit


def honest(cut):
    """Everything from before the cut: the scale, the training windows, and what is seen at the cut."""

    def prepare(series):
        scaler = data.Scaler.fit(series[0][:cut])
        windows = data.SeriesWindows(series, 6, 3, stop=[cut]).walk()
        seen = data.fill_gaps(series[0])[cut - 6 : cut]
        return {"x": scaler.transform(windows.context), "y": scaler.transform(windows.targets), "seen": seen}

    return prepare


def windows_past_the_cut(series):
    return {"y": data.SeriesWindows(series, 6, 3, stop=[43]).walk().targets}


def scaled_on_everything(series):
    return {"x": data.Scaler.fit(series[0]).transform(series[0][:40])}


def interpolated(series):
    known = np.flatnonzero(~np.isnan(series[0]))
    return {"x": np.interp(np.arange(40), known, series[0][known])}


def smoothed(series):
    return {"x": np.convolve(series[0], np.ones(5) / 5, "same")[:40]}


def highest(series):
    return {"top": series[0].max()}


def fewer_rows_where_missing(series):
    return {"x": series[0][:40][: 40 - int(np.isnan(series[0]).sum())]}


PLANTED = [
    (windows_past_the_cut, 42), (scaled_on_everything, 59), (interpolated, 44), (smoothed, 41), (highest, 59),
    (fewer_rows_where_missing, 59),
]  # fmt: skip


@pytest.fixture
def wave():
    values = np.sin(np.arange(60) / 3) + 0.01 * np.arange(60)
    values[[7, 36, 37, 38, 39, 40, 41, 42, 43]] = math.nan
    return values


def test_an_honest_preparation_has_no_leak(wave):
    report = data.audit_leaks(honest(40), [wave], [40])
    assert report and "no leak" in str(report) and report.numbers > 100
    report.check()


@pytest.mark.parametrize(("prepare", "last"), PLANTED, ids=[p.__name__ for p, _ in PLANTED])
def test_planted_leaks_are_found_and_traced_to_their_last_step(wave, prepare, last):
    if prepare in (smoothed, highest):
        wave = np.sin(np.arange(60) / 3) + 0.01 * np.arange(60)
    report = data.audit_leaks(prepare, [wave], [40])
    assert not report
    (leak,) = report.leaks
    assert leak.step == last and leak.late == last - 40
    with pytest.raises(InputError, match=f"depends on step {last} of series 0"):
        report.check()


def test_a_leak_from_another_series_is_found():
    series = [np.arange(20.0), np.arange(20.0) ** 2]
    report = data.audit_leaks(lambda s: {"mean": np.mean(s, axis=0)[:12]}, series, [10, 12])
    assert [(leak.series, leak.step) for leak in report.leaks] == [(0, 11)]


def test_the_audit_refuses_what_it_cannot_judge():
    draw = tt.Generator(0)
    with pytest.raises(InputError, match="other numbers when it is called again"):
        data.audit_leaks(lambda s: {"x": draw.normal(3)}, [np.arange(9.0)], [5])
    with pytest.raises(InputError, match="known is"):
        data.audit_leaks(lambda s: {}, [np.arange(9.0)], [9])


# ---- accuracy


@given(pairs=st.lists(st.tuples(floats, floats), min_size=1, max_size=30), scale=st.floats(0.1, 10))
def test_accuracy_is_its_definition(pairs, scale):
    y, f = np.array(pairs).T
    errors = [abs(a - b) for a, b in pairs]
    assert data.mase(y, f, scale) == pytest.approx(sum(errors) / len(errors) / scale)
    assert data.rmse(y, f) == pytest.approx(math.sqrt(sum(e * e for e in errors) / len(errors)))
    terms = [200 * abs(a - b) / (abs(a) + abs(b)) if a or b else 0 for a, b in pairs]
    assert data.smape(y, f) == pytest.approx(sum(terms) / len(terms))
    half = data.pinball(y, np.stack([f, f], -1), [0.25, 0.75])
    assert half == pytest.approx(sum(errors) / len(errors) / 2)  # the two slopes sum to 1
    holed, other = np.append(y, math.nan), np.append(f, 7.0)
    assert data.mase(holed, other, scale) == pytest.approx(data.mase(y, f, scale))
    assert data.coverage(y, np.minimum(y, f), np.maximum(y, f)) == 1
    assert data.coverage(holed, other + 2001, other + 2002) == 0


@given(sample=st.lists(floats, min_size=1, max_size=30), level=st.floats(0.05, 0.95), other=floats)
def test_the_pinball_loss_is_least_at_the_quantile(sample, level, other):
    y = np.array(sample)
    best = np.quantile(y, level, method="inverted_cdf")

    def loss(q):
        return data.pinball(y, np.full((len(y), 1), q), [level])

    assert loss(best) <= loss(other) + 1e-9


def test_accuracy_refuses():
    with pytest.raises(ShapeError, match=r"forecasts have shape \(2,\), targets \(3,\)"):
        data.rmse([1, 2, 3], [1, 2])
    with pytest.raises(InputError, match="all 2 targets are missing"):
        data.coverage([math.nan] * 2, [0, 0], [1, 1])


# ---- baselines


def test_simple_baselines():
    history = [1.0, 4, 2, 7]
    assert data.naive(history, 3).tolist() == [7, 7, 7]
    assert data.seasonal_naive(history, 5, 3).tolist() == [4, 2, 7, 4, 2]
    assert data.drift(history, 2).tolist() == [9, 11]
    for call in (lambda: data.seasonal_naive(history, 2, 5), lambda: data.naive([1, math.nan], 2)):
        with pytest.raises(InputError, match="history has shape"):
            call()
    for call in (lambda: data.seasonal_naive(history, 2, 0), lambda: data.fill_gaps(history, 0)):
        with pytest.raises(InputError, match="season is 0"):
            call()


@given(
    roots=st.lists(st.floats(-0.95, 0.95).filter(lambda r: abs(r) > 0.3), min_size=1, max_size=3),
    mean=st.floats(-100, 100), seed=st.integers(0, 1000),
)  # fmt: skip
def test_linear_autoregression_finds_the_coefficients_of_its_kind(roots, mean, seed):
    weights = -np.poly(roots)[1:]
    noise = np.random.default_rng(seed).normal(size=4000)
    x = np.zeros(4000)
    for t in range(len(weights), 4000):
        x[t] = weights @ x[t - len(weights) : t][::-1] + noise[t]
    fitted = data.LinearAR(x + mean, 8)
    assert len(fitted.weights) == fitted.order <= 8
    near = np.zeros(8)
    near[: fitted.order] = fitted.weights
    truth = np.zeros(8)
    truth[: len(weights)] = weights
    np.testing.assert_allclose(near, truth, atol=0.15)
    far = fitted(x + mean, 400)[-1]
    assert abs(far - mean) < 3 + 0.2 * x.std()  # a stationary one returns to its mean


def test_linear_autoregression_is_least_squares():
    x = np.random.default_rng(0).normal(size=200).cumsum()
    fitted = data.LinearAR(x, 6)
    p, rows = fitted.order, range(6, 200)
    design = np.array([[1, *x[t - p : t][::-1]] for t in rows])
    expected = np.linalg.lstsq(design, x[6:], rcond=None)[0]
    np.testing.assert_allclose([fitted.intercept, *fitted.weights], expected, rtol=1e-7, atol=1e-9)
    one = fitted(x, 2)
    np.testing.assert_allclose(one[0], expected[0] + expected[1:] @ x[-p:][::-1])


def test_linear_autoregression_of_what_is_exactly_linear_and_of_a_constant():
    line = np.arange(60.0)
    np.testing.assert_allclose(data.LinearAR(line, 5)(line, 4), [60, 61, 62, 63], rtol=1e-6)
    np.testing.assert_allclose(data.LinearAR(np.full(40, 3.0), 5)(np.full(40, 3.0), 2), 3)


def test_error_quantiles_are_those_of_the_errors():
    train = np.random.default_rng(1).normal(size=3000).cumsum()
    found = data.error_quantiles(data.naive, train, 4, [0.05, 0.5, 0.95], 1, count=2000)
    steps = np.sqrt(np.arange(1, 5))
    np.testing.assert_allclose(found[:, 2] / steps, 1.645, rtol=0.2)  # a random walk's errors are known
    np.testing.assert_allclose(found[:, 0] / steps, -1.645, rtol=0.2)


# ---- the calendar


def test_calendar_features_come_again_when_the_calendar_does():
    stamps = np.datetime64("2021-03-01T00:00:00") + np.arange(24 * 15) * np.timedelta64(3600, "s")
    found = data.calendar_features(stamps, [24])
    assert found.shape == (360, 6)
    day, week, year = found[:, [0, 3]], found[:, [1, 4]], found[:, [2, 5]]
    np.testing.assert_allclose(day[24:], day[:-24], atol=1e-6)
    np.testing.assert_allclose(week[168:], week[:-168], atol=1e-6)
    assert np.abs(day[12:] - day[:-12]).max() > 1.9 and np.abs(week[84:] - week[:-84]).max() > 1.9
    assert np.abs(np.diff(year, axis=0)).max() < 0.01
    yearly = np.array(["2019-07-01", "2020-07-01", "2021-07-01"], "datetime64[s]")
    assert data.calendar_features(yearly, [1]).shape == (3, 0)
    numbers = data.calendar_features(np.arange(20.0), [5, 10])
    np.testing.assert_allclose(numbers[10:], numbers[:-10], atol=1e-12)
