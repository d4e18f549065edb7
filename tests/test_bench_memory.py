"""The benchmark of memory over time: what is computed, who is left out, what the tables and the aims say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from bench import kept, memory, memory_report, resident, summed, worker
from bench.cases import Case
from bench.memory_report import CONTENDERS, Row
from bench.summed import WINDOW, Task
from scanning import needs_numba

SMALL = Task(2 * WINDOW + 7, 3, 5, "float64")


# ---- what is computed -----------------------------------------------------------------------------------------------


def summed_error(w, x, target, state):
    """The squared error over some steps, and the state after them, by plain NumPy."""
    h, c = state
    total = 0.0
    for now, wanted in zip(x, target, strict=True):
        a = now @ w["weight_ih_l0"].T + w["bias_ih_l0"] + h @ w["weight_hh_l0"].T + w["bias_hh_l0"]
        i, f, g, o = np.split(a, 4, axis=-1)
        i, f, o = (1 / (1 + np.exp(-gate)) for gate in (i, f, o))
        c = f * c + i * np.tanh(g)
        h = o * np.tanh(c)
        total += ((h @ w["readout"] - wanted) ** 2).sum()
    return total, (h, c)


def slope(task, direction, steps):
    """How the mean error changes along a direction, each stretch of `steps` starting from a state that is given."""
    w, (x, target) = summed.weights(task), summed.data(task)
    state, found, eps = tuple(np.zeros((2, task.B, task.H))), 0.0, 1e-6
    for start in range(0, task.T, steps):
        part = x[start : start + steps], target[start : start + steps], state
        ways = [{name: w[name] + sign * eps * direction[name] for name in w} for sign in (1, -1)]
        found += (summed_error(ways[0], *part)[0] - summed_error(ways[1], *part)[0]) / (2 * eps)
        state = summed_error(w, *part)[1]
    return found / (task.T * task.B)


@pytest.mark.parametrize("contender", ["tinytape", "tinytape-sqrt", "tinytape-sqrt-eager", "tinytape-truncated"])
def test_gradients_are_those_of_the_mean_error(contender):
    rng = np.random.default_rng(0)
    direction = {name: rng.standard_normal(value.shape) for name, value in summed.weights(SMALL).items()}
    got = summed.prepare(contender, SMALL)()()
    along = sum((got["d" + name] * value).sum() for name, value in direction.items())
    steps = WINDOW if contender == "tinytape-truncated" else SMALL.T
    assert along == pytest.approx(slope(SMALL, direction, steps), rel=1e-6)


def test_the_cut_is_seen():
    whole, cut = (summed.prepare(name, SMALL)()() for name in ("tinytape-sqrt-eager", "tinytape-truncated-eager"))
    assert worker.error(cut, whole)[0] > 1e-9


@pytest.mark.peer
@pytest.mark.parametrize("T", [1, 9, SMALL.T])
@pytest.mark.parametrize("how", ["full", "checkpoint", "truncated"])
def test_torch_computes_the_same(how, T):
    pytest.importorskip("torch")
    from bench import peers

    task = replace(SMALL, T=T)
    ours = "tinytape-truncated-eager" if how == "truncated" else "tinytape-sqrt-eager"
    off, where = worker.error(peers.torch_summed(task, how, 1)()(), summed.prepare(ours, task)()())
    assert off < 1e-10, where


@needs_numba
def test_a_budget_has_a_plan_and_a_cut_has_none():
    full = summed.plan("tinytape", SMALL)
    assert full.kind == "full" and full.peak_bytes > summed.plan("tinytape-sqrt", SMALL).peak_bytes
    assert summed.plan("tinytape-truncated", SMALL) is None


# ---- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_a_peak_that_is_gone_is_seen():
    before = resident.reset_peak()
    np.ones(8_000_000)  # 64 MB, freed at once
    assert 60e6 < resident.peak() - before < 90e6


def test_floats_a_step_and_row():
    case = Case("lstm", 10, 2, 3, 4)
    outputs = 4 * 10 * 2 * (3 + 4)
    assert kept.multiple({"grown": outputs + 4 * 10 * 2 * 4 * 6.5, "outputs": outputs}, case) == 6.5


def test_steps_are_repeated_unless_they_are_long():
    calls = []
    assert memory.more_times(lambda: calls.append(None), memory.ONCE + 1, 9.0) == [memory.ONCE + 1] and not calls
    assert memory.more_times(lambda: calls.append(None), 0.1, None) == [0.1] and not calls
    assert len(memory.more_times(lambda: calls.append(None), 0.1, 0.0)) == len(calls) == 1
    assert sum(memory.more_times(lambda: calls.append(None), 0.1, 1e-3)) >= 1e-3


# ---- rows -----------------------------------------------------------------------------------------------------------


def row(T, B, seconds, grown, H=128, **figures):
    """A row with a time and a workspace for each of some contenders."""
    found = Row(f"T={T:,} B={B}", task=Task(T, B, H))
    for name, value in seconds.items():
        found.add(name, {"times": [value], "grown": grown[name]} | figures.get(name.replace("-", "_"), {}))
        found.compared[name] = 1e-7
    return found


def test_long_sequences_have_one_row_and_one_to_compare_with():
    assert [(t.T, t.B) for t in memory.tasks([300, 100, 100], 8)] == [(100, 16), (300, 16)]
    assert [(t.T, t.B) for t in memory.tasks([10_000, 10_001], 8)] == [(10_000, 16), (1_000, 1), (10_001, 1)]


def test_who_would_need_too_much_is_left_out():
    names = ("torch", "torch-checkpoint")
    rows = [row(1_000, 1, dict.fromkeys(names, 0.1), dict.fromkeys(names, int(20e6)))]
    task = Task(1_000_000, 1)
    assert memory.too_much("torch", task, rows, 12, 180) == "20 GB"
    assert memory.too_much("torch", task, rows, 30, 180) == ""
    assert memory.too_much("torch", task, rows, 30, 99) == "100 s"
    assert memory.too_much("torch-checkpoint", task, rows, 12, 180) == ""  # keeps sqrt(1,000) times as much
    assert memory.too_much("jax", task, rows, 12, 180) == ""  # nothing is known of it
    assert memory.too_much("torch", Task(1_000_000, 2), rows, 30, 180) == "40 GB"


def test_who_was_left_out_or_failed_is_not_tried_with_more_steps():
    left, failed = Row("", task=Task(100, 16)), Row("", task=Task(100, 16), problems={"torch": "killed"})
    left.left_out["torch"] = "20 GB"
    assert memory.too_much("torch", Task(200, 16), [left], 12, 180) == "20 GB"
    assert memory.too_much("torch", Task(200, 16), [failed], 12, 180) == "failed before"
    assert memory.too_much("torch", Task(1_000, 1), [left, failed], 12, 180) == ""


GRADIENTS = {"da": np.float32([3, 4]), "db": np.float32([1])}


@pytest.mark.parametrize(
    "name, changed, complaint",
    [
        ("torch", {}, ""),
        ("torch", {"da": np.float32([3, 4.001])}, "da is off by 2.0e-04"),
        ("torch", {"da": np.float32([3, np.nan])}, "not finite"),
        ("torch", {"da": np.float64([3, 4])}, "not float32"),
        ("torch", {"db": np.float32([1, 1])}, "db of shape (2,)"),
        ("tinytape-sqrt", {"da": np.float32([3, np.nextafter(np.float32(4), 5)])}, "not the bits"),
    ],
)
def test_wrong_gradients_are_no_figures(name, changed, complaint):
    found, exact = Row("", task=SMALL), GRADIENTS if name.startswith("tinytape") else {}
    right = memory.judge(found, name, GRADIENTS | changed, GRADIENTS, 1e-4, exact)
    assert right is not bool(complaint) and complaint in found.problems.get(name, "")
    json.dumps(found.facts(), allow_nan=False)


def test_without_a_reference_only_what_cannot_be_right_is_wrong():
    found = Row("", task=SMALL)
    assert memory.judge(found, "torch", GRADIENTS, None, 1e-4, {}) and found.compared["torch"] is None
    assert not memory.judge(found, "jax", {"da": np.float32([np.inf])}, None, 1e-4, {})


# ---- aims and tables ------------------------------------------------------------------------------------------------


def two_rows(sqrt_seconds=1.2, long_seconds=1.0):
    """1,000 steps of one row, then 1,000,000; a hundred megabytes or more, so that resident memory tells."""
    rows = []
    for T, seconds in ((1_000, 1e-3), (1_000_000, long_seconds)):
        pool = {
            name: {"pool": int(200e6), "plan": int(200e6), "fixed": int(100e6)}
            for name in ("tinytape", "tinytape_sqrt")
        }
        times = {"tinytape": seconds, "tinytape-sqrt": seconds * sqrt_seconds, "torch": seconds * 2}
        grown = {"tinytape": int(204e6), "tinytape-sqrt": int(204e6), "torch": int(510e6)}
        rows.append(row(T, 1, times, grown, **pool))
    return rows


def measured(rows):
    """The worst figure of each aim, and its row."""
    found = {aim.text: list(aim.figures(rows)) for aim in memory_report.aims()}
    return {text: max(figures, key=lambda pair: pair[1]) for text, figures in found.items() if figures}


def test_figures_of_the_aims():
    found = measured(two_rows(long_seconds=1.07))
    assert found["full: workspace by torch's"][1] == pytest.approx(0.4)
    where, floats = found["sqrt: floats a row by H sqrt(T)"]
    assert where == "T=1,000 B=1" and floats == pytest.approx(200e6 / 4 / 128 / 1_000**0.5)
    assert found["the same less fixed bytes"][1] == pytest.approx(floats / 2)
    assert found["sqrt: time by full's"][1] == pytest.approx(1.2)
    assert found["tinytape: time a step by that at T=1,000"] == ("T=1,000,000 B=1", pytest.approx(1.07))
    assert found["sqrt: bytes of pool and plan apart"][1] == 0
    assert found["tinytape: workspace off the plan"][1] == pytest.approx(0.02)


def test_an_aim_is_met_or_missed():
    lines = memory_report.aims_table(two_rows(sqrt_seconds=1.4)).splitlines()
    verdicts = {line.split("  ")[0].strip(): line.split()[-1] for line in lines[1:]}
    assert verdicts["sqrt: time by full's"] == "missed" and verdicts["full: workspace by torch's"] == "met"
    assert "16 MB: the pool's MB" not in verdicts  # was not measured


def test_small_workspaces_and_wrong_contenders_tell_nothing_of_aims():
    pool = {"pool": 5, "plan": 5, "fixed": 1}
    small = row(100, 16, {"tinytape": 1.0, "torch": 1.0}, {"tinytape": 9, "torch": 10}, tinytape=pool)
    assert "full: workspace by torch's" not in measured([small])
    wrong = two_rows()
    for each in wrong:
        each.problems["torch"] = "off"
    assert "full: workspace by torch's" not in measured(wrong)


def test_tables_say_who_is_missing_and_why():
    rows = two_rows()
    rows[1].left_out["torch"] = "510 GB"
    rows[0].problems["tinytape-sqrt"] = "off"
    rows[0].problems["jax"] = "no luck"
    text = memory_report.text(rows, ["tinytape", "tinytape-sqrt", "torch", "jax"]).splitlines()
    assert [" ".join(line.split()) for line in text[:7]] == [
        "workspace, MB tinytape sqrt torch jax",
        "T=1,000 B=1 204 wrong 510 failed",
        "T=1,000,000 B=1 204 204 (510 GB) -",
        "",
        "microseconds a step tinytape sqrt torch jax",
        "T=1,000 B=1 1.00 wrong 2.00 failed",
        "T=1,000,000 B=1 1.00 1.20 (510 GB) -",
    ]


@pytest.mark.parametrize(
    "options, complaint",
    [
        ("--lengths 0", "at least 1"),
        ("--lengths ten", "--lengths"),
        ("--hidden 0", "at least 1"),
        ("--contenders numpy", "numpy"),
        ("--layer --contenders jax-checkpoint", "--layer goes with tinytape, torch, jax"),
        ("--layer --shapes 1,2,3", "a shape is T,B,I,H"),
    ],
)
def test_refused_options(options, complaint, capsys):
    with pytest.raises(SystemExit):
        memory.parse(options.split())
    assert complaint in capsys.readouterr().err


def test_contenders_of_both_parts():
    assert memory.parse([]).contenders == list(CONTENDERS)
    assert memory.parse(["--contenders", "torch", "tinytape"]).contenders == ["tinytape", "torch"]
    assert memory.parse(["--layer"]).contenders == ["tinytape", "torch", "jax"]


@pytest.mark.slow
@needs_numba
def test_quick_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    files = [str(tmp_path / name) for name in ("out.json", "out.png")]
    options = [
        "--quick",
        "--lengths",
        "150",
        "--hidden",
        "16",
        "--threads",
        "1",
        "--json",
        files[0],
        "--picture",
        files[1],
    ]
    assert memory.main(options) == 0
    assert "aims" in capsys.readouterr().out
    for found in json.loads(Path(files[0]).read_text())["rows"]:
        assert found["pool"].keys() == {name for name in CONTENDERS if name.startswith("tinytape")}
        assert all(found["pool"][name] == planned for name, planned in found["plan"].items())
        assert all(off < 1e-4 for off in found["errors"].values()) and not found["problems"]
    assert Path(files[1]).read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
@needs_numba
def test_what_a_layer_keeps(capsys):
    options = ["--layer", "--shapes", "2000,16,8,32", "--contenders", "tinytape", "--threads", "1"]
    assert memory.main(options) == 0
    floats = float(capsys.readouterr().out.split()[-1])
    assert 4 < floats < 8  # four gates and the cell, and what is there for a block of steps
