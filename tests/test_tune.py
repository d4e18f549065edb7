"""The search for settings as a user runs it: one study, several processes, kills, going on, and what is refused."""

from __future__ import annotations

import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytape as tt

optuna = pytest.importorskip("optuna", reason="the extra `study` is not installed")
pytest.importorskip("sklearn", reason="the extra `study` is not installed")

from models import shared_study, tune  # noqa: E402 - they end the program where optuna is absent
from models.shared_study import TrialState  # noqa: E402

ROOT = Path(__file__).parent.parent
RANGES = {"lr": [1e-3, 1e-1], "hidden": [4, 8], "window": [8, 16], "dropout": [0.0, 0.2], "clip": [0.1, 1.0]}
START = {"lr": 1e-2, "hidden": 8, "window": 16, "dropout": 0.1, "clip": 1.0}
MADE_WITH = {"--lr": "0.001 0.1"}
BEATS = "SELECT 1 FROM trial_user_attributes WHERE \"key\" = 'beat'"


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences drawn from a few words: small, learnable, and without long repeats."""
    draw = random.Random(0)
    words = ["tape", "walk", "leaf", "node", "gate", "cell", "state", "step", "time", "loss"]
    lines = [" ".join(draw.choice(words) for _ in range(draw.randint(6, 14))) + "." for _ in range(500)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def corpus(text: Path) -> tune.Corpus:
    return tune.Corpus.of(tt.data.read_text(text))


@pytest.fixture(scope="module")
def compiled(corpus: tune.Corpus) -> None:
    """Kernels are on disk, so that processes need not wait for the compiler."""
    tune.Objective(corpus, RANGES, 1.0).prepare()


def command(study: Path, text: Path, *more: Any) -> list[str]:
    small = ["--hidden", 4, 8, "--window", 8, 16, "--seconds", 0.5, "--text", text, "--study", study, *more]
    return [sys.executable, "-m", "models.tune", *map(str, small)]  # what comes later wins


def begin(study: Path, text: Path, *more: Any) -> subprocess.Popen[str]:
    """The command in a group of its own, so that all its processes can be killed at once."""
    return subprocess.Popen(
        command(study, text, *more), cwd=ROOT, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def rows(path: Path, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(path, timeout=60)
    try:
        found = connection.execute(query).fetchall()
        connection.commit()
        return found
    finally:
        connection.close()


def wait_for(what: Any) -> None:
    deadline = time.monotonic() + 120
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.02)


def states(study: Any) -> list[TrialState]:
    return [trial.state for trial in study.get_trials(deepcopy=False)]


def new_study(folder: Path) -> Any:
    return shared_study.prepare_study(str(folder / "study.db"), START, MADE_WITH)


def silence(study: Any, trial: Any) -> None:
    """Make it seem that a trial gave its last sign of life long ago."""
    study._storage.set_trial_user_attr(trial._trial_id, "beat", time.time() - 10 * shared_study.GRACE)


# ---- killing and going on --------------------------------------------------------------------------------------------


def test_a_study_survives_kill_9_and_two_commands_go_on_with_it(text: Path, compiled: None, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    first = begin(path, text, "--trials", 1000, "--workers", 1)
    wait_for(lambda: path.exists() and rows(path, "SELECT 1 FROM trial_params"))
    os.killpg(first.pid, signal.SIGKILL)
    first.communicate()
    ((dead,),) = rows(path, "SELECT number FROM trials WHERE state = 'RUNNING'")
    # That nothing was heard of it is dated back, which saves the test the waiting.
    rows(path, "UPDATE trials SET datetime_start = '2001-01-01 00:00:00.000000' WHERE state = 'RUNNING'")
    rows(path, "UPDATE trial_user_attributes SET value_json = '1.0' WHERE \"key\" = 'beat'")
    wanted = dead + 3
    both = [begin(path, text, "--trials", wanted, "--workers", 1) for _ in range(2)]
    for process in both:
        printed, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert "start, " in printed and "frequencies" in printed
    trials = shared_study.open_study(str(path)).trials
    assert [t.number for t in trials] == list(range(len(trials)))
    assert {t.number for t in trials if t.state == TrialState.FAIL} == {dead}
    assert {t.state for t in trials} <= {TrialState.COMPLETE, TrialState.PRUNED, TrialState.FAIL}
    assert wanted <= len(trials) - 1 <= wanted + 1  # two that ask for the last one in the same moment both get one
    again = [t for t in trials if t.user_attrs.get("deaths") == 1]
    assert len(again) == 1 and trials[dead].params.items() <= again[0].params.items()
    assert sorted(os.listdir(tmp_path)) == ["study.db", "study.png"]


@pytest.mark.parametrize("stop", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)])
def test_stopped_by_hand_it_says_how_to_go_on(stop: Any, text: Path, compiled: None, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    process = begin(path, text, "--trials", 1000, "--workers", 1, "--seconds", 600)
    wait_for(lambda: path.exists() and rows(path, BEATS))
    os.killpg(process.pid, stop) if stop == signal.SIGINT else process.send_signal(stop)
    printed, errors = process.communicate(timeout=120)
    assert process.returncode == 1 and "Traceback" not in errors, errors
    assert "stopped; the study is kept. Go on with: python -m models.tune --hidden 4 8" in errors
    assert "0 trials" in printed
    study = shared_study.open_study(str(path))
    assert states(study) == [TrialState.FAIL, TrialState.WAITING]
    stopped, again = study.trials
    assert again.system_attrs["fixed_params"] == stopped.params and again.user_attrs["deaths"] == 0


@pytest.mark.slow
def test_processes_end_when_the_command_alone_is_killed(text: Path, compiled: None, tmp_path: Path) -> None:
    path = tmp_path / "study.db"
    process = begin(path, text, "--trials", 1000, "--workers", 1, "--seconds", 600)
    wait_for(lambda: path.exists() and rows(path, BEATS))
    process.kill()
    wait_for(lambda: not rows(path, "SELECT 1 FROM trials WHERE state = 'RUNNING'"))
    process.communicate(timeout=60)  # its pipes are closed when the last process has ended
    assert states(shared_study.open_study(str(path))) == [TrialState.FAIL, TrialState.WAITING]


@pytest.mark.slow
def test_twenty_kills_at_random_moments(text: Path, compiled: None, tmp_path: Path) -> None:
    path, draw = tmp_path / "study.db", random.Random(1)
    for kill in range(20):
        process = begin(path, text, "--trials", 1000)
        if kill % 2:  # while trials run; the others come at any moment, also while the study is made
            wait_for(lambda: path.exists() and rows(path, "SELECT 1 FROM trials WHERE state = 'RUNNING'"))
        time.sleep(draw.uniform(0.0, 4.0))
        os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        if path.exists():
            assert rows(path, "PRAGMA integrity_check") == [("ok",)]
    before = len(shared_study.finished(shared_study.open_study(str(path))))
    time.sleep(shared_study.GRACE)
    last = begin(path, text, "--trials", before + 3)
    _, errors = last.communicate(timeout=300)
    assert last.returncode == 0, errors
    study = shared_study.open_study(str(path))
    assert TrialState.RUNNING not in states(study) and TrialState.FAIL in states(study)
    assert len(shared_study.finished(study)) >= before + 3


# ---- trials that die -------------------------------------------------------------------------------------------------


def test_a_silent_trial_is_tried_again_but_not_for_ever(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    for death in range(1, shared_study.TRIES + 1):
        trial = study.ask()
        settings = tune.Objective(None, RANGES, 1.0).draw(trial)
        assert settings == pytest.approx(START) and trial.user_attrs["start"]
        assert trial.user_attrs.get("deaths", 0) == death - 1
        silence(study, trial)
        assert shared_study.is_wanted(study, 1, math.inf)
    assert states(study) == [TrialState.FAIL] * shared_study.TRIES


def test_a_trial_that_never_gave_a_sign_of_life_is_found_too(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    study.ask()  # and its process is killed in this moment
    assert not shared_study.is_wanted(study, 1, time.time() + 0.5)
    assert states(study) == [TrialState.RUNNING]
    rows(tmp_path / "study.db", "UPDATE trials SET datetime_start = '2001-01-01 00:00:00.000000'")
    study = shared_study.open_study(str(tmp_path / "study.db"))
    assert shared_study.is_wanted(study, 1, math.inf)
    assert states(study) == [TrialState.FAIL, TrialState.WAITING]
    assert study.trials[1].system_attrs["fixed_params"] == START


def test_a_living_trial_is_left_alone(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    pulse = shared_study.Pulse(study.ask())
    rows(tmp_path / "study.db", "UPDATE trials SET datetime_start = '2001-01-01 00:00:00.000000'")
    pulse.beat()
    study = shared_study.open_study(str(tmp_path / "study.db"))
    assert not shared_study.is_wanted(study, 1, time.time() + 0.5)
    assert states(study) == [TrialState.RUNNING]


def test_a_process_that_was_wrongly_taken_for_dead_goes_on(
    corpus: tune.Corpus, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    study, calls = new_study(tmp_path), []

    class Sleepy:
        def prepare(self) -> None:
            pass

        def __call__(self, trial: Any) -> float:
            calls.append(trial.number)
            if len(calls) == 1:  # while it sleeps, another process finds it
                shared_study.requeue(study, study.trials[0], died=True)
                trial.report(1.0, 0)
            return 1.0

    before = [(number, signal.getsignal(number)) for number in (signal.SIGINT, signal.SIGTERM)]
    monkeypatch.setattr(tt, "set_num_threads", lambda n: None)
    try:
        shared_study.work(str(tmp_path / "study.db"), Sleepy(), 2, math.inf)
    finally:
        for number, handler in before:
            signal.signal(number, handler)
    assert states(study) == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]


# ---- a trial ---------------------------------------------------------------------------------------------------------


def test_a_trial_learns_within_its_seconds(corpus: tune.Corpus, compiled: None) -> None:
    study = optuna.create_study()
    study.enqueue_trial(START | {"lr": 0.03, "dropout": 0.0})
    objective = tune.Objective(corpus, RANGES, 1.0)
    began = time.process_time()
    study.optimize(objective, n_trials=1)
    used = time.process_time() - began
    trial = study.trials[0]
    counts = np.bincount(corpus.train, minlength=corpus.symbols) + 1
    frequencies = -np.log2(counts / counts.sum())[corpus.choosing].mean()
    assert trial.value < frequencies - 0.5
    assert trial.value == trial.intermediate_values[tune.STAGES - 1] < trial.intermediate_values[0]
    assert abs(trial.user_attrs["test"] - trial.value) < 0.2
    assert used >= 1.0


@pytest.mark.parametrize("lr", [1e10, 3e38])
def test_what_diverges_is_stopped_and_no_worse_than_guessing(lr: float, corpus: tune.Corpus) -> None:
    study = optuna.create_study(pruner=optuna.pruners.NopPruner())
    study.enqueue_trial(START | {"lr": lr})
    study.optimize(tune.Objective(corpus, RANGES | {"lr": [1e-3, 3e38]}, 0.2), n_trials=1)
    assert study.trials[0].state in (TrialState.PRUNED, TrialState.COMPLETE)
    assert study.trials[0].value == pytest.approx(math.log2(corpus.symbols))


def test_scoring_is_the_mean_over_all_targets(corpus: tune.Corpus) -> None:
    """Against the logits of each stream, gone through one character at a time."""
    model = tune.network(corpus.symbols, 6, 0.5, tt.Generator(3))
    tokens = corpus.test[: 32 * 40 + 5]
    columns = tt.data.streams(tokens, tune.BATCH)
    state, nats = None, []
    model.eval()
    for now, then in pairwise(columns):
        logits, state = model(now[None], state)
        values = logits.numpy()[0].astype(np.float64)
        nats.append(np.log(np.exp(values).sum(1)) - values[np.arange(len(then)), then])
    expected = np.mean(nats) / math.log(2)
    assert tune.bits_per_character(model, tokens, corpus.symbols) == pytest.approx(expected, rel=1e-5)


# ---- what is said at the end -----------------------------------------------------------------------------------------


def made_up(value: Any, count: int = 60) -> list[Any]:
    """Trials of a study in which the bits are a known function of the settings, some of them stopped early."""
    study = optuna.create_study(
        sampler=optuna.samplers.RandomSampler(seed=0), pruner=optuna.pruners.MedianPruner(n_startup_trials=10)
    )
    objective = tune.Objective(None, RANGES, 1.0)

    def run(trial: Any) -> float:
        bits = value(objective.draw(trial))
        for stage in range(tune.STAGES):
            trial.report(bits + tune.STAGES - 1 - stage, stage)
            if stage < tune.STAGES - 1 and trial.should_prune():
                raise optuna.TrialPruned
        trial.set_user_attr("test", bits)
        return bits

    study.optimize(run, n_trials=count)
    return study.trials


def test_what_mattered_is_found_also_where_bad_trials_were_stopped(corpus: tune.Corpus, tmp_path: Path) -> None:
    trials = made_up(lambda s: 2 + abs(math.log10(s["lr"] / 1e-2)) + 0.01 * s["dropout"])
    assert sum(t.state == TrialState.PRUNED for t in trials) > 10
    shares = tune.importances(trials, RANGES)
    assert set(shares) == set(RANGES) and sum(shares.values()) == pytest.approx(1)
    assert shares["lr"] > 0.8
    printed = tune.table(trials, shares, corpus, RANGES)
    best = min((t for t in trials if t.state == TrialState.COMPLETE), key=lambda t: t.value)
    assert printed.splitlines()[2].split()[:2] == [str(best.number), f"{best.value:.3f}"]
    tune.draw(trials, shares, RANGES, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 1000


def test_what_a_stopped_trial_would_have_come_to(corpus: tune.Corpus) -> None:
    value = lambda s: 2 + s["lr"]  # noqa: E731 - all lose one bit a stage, so the estimate is exact
    trials = made_up(value)
    ends = tune.at_the_end(trials)
    assert any(t.state == TrialState.PRUNED for t in trials)
    assert [ends[t.number] for t in trials] == pytest.approx([value(t.params) for t in trials])


def test_few_trials_or_equal_ones_say_nothing_of_what_mattered(corpus: tune.Corpus) -> None:
    few, equal = made_up(lambda s: s["lr"], 4), made_up(lambda s: 3.0)
    assert tune.importances(few, RANGES) == tune.importances(equal, RANGES) == {}
    assert "too few trials to say" in tune.table(few, {}, corpus, RANGES)
    assert "frequencies" in tune.table([], {}, corpus, RANGES)


# ---- what is refused -------------------------------------------------------------------------------------------------


def refused(arguments: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as caught:
        tune.main([str(a) for a in arguments])
    assert caught.value.code == 2
    errors = capsys.readouterr().err.strip()
    assert "Traceback" not in errors
    return errors.splitlines()[-1]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lr", "0.1", "0.01"], "--lr: 0.1 to 0.01 is no range"),
        (["--dropout", "0", "1"], "--dropout: 0.0 to 1.0 is no range"),
        (["--lr", "0", "0.1"], "at least 1e-09 is needed"),
        (["--clip", "nan", "1"], "nan given"),
        (["--clip", "1", "inf"], "inf given"),
        (["--hidden", "4.5", "8"], "invalid int value"),
        (["--trials", "0"], "at least 1"),
        (["--workers", "0"], "at least 1"),
        (["--seconds", "0"], "at least 0.1"),
        (["--text", "no/such/file"], "there is no file"),
        (["--study", "tune.sqlite"], "is not the name of a .db file"),
        (["--study", "/dev/null/tune.db"], "cannot be written"),
    ],
)
def test_bad_options(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    given = arguments if "--study" in arguments else [*arguments, "--study", tmp_path / "study.db"]
    assert words in refused(given, capsys)
    assert not os.listdir(tmp_path)


def test_a_text_of_one_symbol(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.txt").write_text("a" * 20_000)
    assert "one symbol only" in refused(["--text", tmp_path / "a.txt", "--study", tmp_path / "study.db"], capsys)
    assert os.listdir(tmp_path) == ["a.txt"]


def other_database(path: Path) -> None:
    rows(path, "CREATE TABLE poems (line TEXT)")


def other_study(path: Path) -> None:
    storage = optuna.storages.RDBStorage("sqlite://", shared_study.engine(str(path)))
    optuna.create_study(study_name="other", storage=storage)


def cut_short(path: Path) -> None:
    shared_study.prepare_study(str(path), START, MADE_WITH)
    path.write_bytes(path.read_bytes()[:5000])


@pytest.mark.parametrize(
    "write", [lambda p: p.write_bytes(b""), lambda p: p.write_text("notes"), other_database, other_study, cut_short]
)
def test_a_file_that_is_no_study_is_not_touched(
    write: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "study.db"
    write(path)
    before = path.read_bytes()
    assert "holds no study of this program" in refused(["--text", text, "--study", path], capsys)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["study.db"]


def test_a_folder_instead_of_a_study(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "study.db").mkdir()
    assert "cannot be written" in refused(["--text", text, "--study", tmp_path / "study.db"], capsys)


def test_a_study_of_another_search_is_not_touched(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune, "search", lambda *_: "")
    path, other = tmp_path / "study.db", tmp_path / "other.txt"
    shutil.copy(text, other)
    with other.open("a") as file:
        file.write("\n\none more line\n")
    base = ["--text", text, "--study", path]
    tune.main([str(a) for a in base])
    capsys.readouterr()
    before = path.read_bytes()
    assert "was made with 0.0005 0.1, now it is 0.001 0.03" in refused([*base, "--lr", 1e-3, 3e-2], capsys)
    assert "--seconds: " in refused([*base, "--seconds", 9], capsys)
    assert "--text: " in refused([*base[2:], "--text", other], capsys)
    assert path.read_bytes() == before


def test_who_makes_the_study_second_leaves_the_first(tmp_path: Path) -> None:
    study = new_study(tmp_path)
    study.ask()
    shared_study.make_study(str(tmp_path / "study.db"), START | {"lr": 0.1}, {"--lr": "other"})
    assert shared_study.open_study(str(tmp_path / "study.db")).user_attrs["made with"] == MADE_WITH
    assert states(study) == [TrialState.RUNNING] and os.listdir(tmp_path) == ["study.db"]


def test_any_name_of_a_file_will_do(tmp_path: Path) -> None:
    path = str(tmp_path / "100% {odd}?#&.db")
    shared_study.prepare_study(path, START, MADE_WITH)
    assert os.listdir(tmp_path) == ["100% {odd}?#&.db"]
    assert len(shared_study.open_study(path).trials) == 1


def test_without_optuna_one_line_says_what_to_install() -> None:
    program = "import sys; sys.modules['optuna'] = None; import models.tune"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and not done.stdout
    assert done.stderr.strip() == "error: optuna is missing: pip install 'tinytape[models,study]'."
