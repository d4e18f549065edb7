"""An Optuna study in one SQLite file: several processes work on it at once, and it survives their deaths.

A study is made with a description of what is searched, and is gone on with under the same description only. A process
gives signs of life while it works on a trial; when it falls silent, another one takes up the same settings.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import multiprocessing
import os
import signal
import sqlite3
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, Protocol

from tqdm import tqdm

import tinytape as tt


def fail(error: object) -> NoReturn:
    print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
    raise SystemExit(2) from None


try:
    import optuna
    from optuna.trial import TrialState
    from sqlalchemy.exc import SQLAlchemyError
    from sqlalchemy.pool import NullPool
except ImportError as error:
    fail(f"{error.name} is missing: pip install 'tinytape[models,study]'.")
if importlib.util.find_spec("sklearn") is None:  # Optuna's fANOVA needs it, and would say so only after the search
    fail("scikit-learn is missing: pip install 'tinytape[models,study]'.")

NAME = "tune"  # of the study in its file
BEAT, GRACE, TRIES = 2.0, 20.0, 3  # seconds between signs of life; of silence that mean death; lives of a trial
stopping = threading.Event()  # a signal is only noted: an exception could come up anywhere, even in a transaction


class Stopped(Exception):
    """The search is to end before the trial does."""


def note_signals(*kinds: signal.Signals) -> None:
    for kind in kinds:
        signal.signal(kind, lambda *_: stopping.set())


class Objective(Protocol):
    """What is minimised. It must pickle, since it is sent to each process."""

    def __call__(self, trial: optuna.Trial) -> float: ...

    def prepare(self) -> None:
        """Do what takes long the first time, such as compiling, while no trial waits for it."""
        ...


class Pulse:
    """Signs of life of a trial, for `beat` to give between any two steps."""

    def __init__(self, trial: optuna.Trial) -> None:
        self.trial, self.last = trial, -math.inf

    def beat(self) -> None:
        if stopping.is_set():
            raise Stopped
        if time.monotonic() - self.last < BEAT:
            return
        self.trial.set_user_attr("beat", time.time())
        self.last = time.monotonic()
        parent = multiprocessing.parent_process()
        if parent is not None and not parent.is_alive():  # killed: nobody wants the result, nor could end this
            raise Stopped


def requeue(study: optuna.Study, trial: optuna.trial.FrozenTrial, died: bool) -> None:
    """Give up a trial that will not end, and have its settings tried again, unless they kill every process."""
    try:
        study.tell(trial.number, state=TrialState.FAIL)
    except (ValueError, optuna.exceptions.UpdateFinishedTrialError):
        return  # another process was quicker
    deaths = trial.user_attrs.get("deaths", 0) + died
    settings = trial.system_attrs.get("fixed_params", {}) | trial.params  # what it was to have, and what it drew
    if settings and deaths < TRIES:
        study.enqueue_trial(settings, user_attrs={"deaths": deaths, "start": trial.user_attrs.get("start", False)})


def is_dead(trial: optuna.trial.FrozenTrial) -> bool:
    """Whether a trial fell silent. Its start counts as a sign of life: it may have died before it could give another.

    Optuna's own heartbeat overlooks just those, which then seem to run for ever.
    """
    seen = trial.user_attrs.get("beat", trial.datetime_start.timestamp())
    return time.time() - seen > GRACE


def finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))


def is_wanted(study: optuna.Study, limit: float, deadline: float) -> bool:
    """Whether another trial should begin; waits while those that run would be enough, for they may yet die."""
    while time.time() < deadline and not stopping.is_set():
        running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
        for trial in filter(is_dead, running):
            requeue(study, trial, died=True)
        done = len(finished(study))
        if done >= limit or done + len(running) < limit:
            return done < limit
        time.sleep(0.2)
    return False


def work(path: str, objective: Objective, limit: float, deadline: float) -> None:
    """What each process does."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the parent passes it on
    note_signals(signal.SIGTERM)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        tt.set_num_threads(1)
        objective.prepare()
        study = open_study(path)
        while is_wanted(study, limit, deadline):
            trial = study.ask()
            try:
                study.tell(trial, objective(trial), skip_if_finished=True)
            except optuna.TrialPruned:
                study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
            except Stopped:
                requeue(study, study.trials[trial.number], died=False)
                break
            except optuna.exceptions.UpdateFinishedTrialError:
                pass  # this machine slept: others took the trial for dead and see to it
    except (tt.TinytapeError, SQLAlchemyError, optuna.exceptions.OptunaError) as error:
        fail(error)


def engine(path: str) -> dict:
    """SQLAlchemy's options. A connector of our own, because not every file name can stand in an URL."""
    return {"creator": partial(sqlite3.connect, path, timeout=60), "poolclass": NullPool}


def open_study(path: str) -> optuna.Study:
    storage = optuna.storages.RDBStorage("sqlite://", engine(path), skip_table_creation=True)
    return optuna.load_study(
        study_name=NAME, storage=storage, pruner=optuna.pruners.MedianPruner(n_startup_trials=6),
        sampler=optuna.samplers.TPESampler(n_startup_trials=12, constant_liar=True),
    )  # fmt: skip


def make_study(path: str, start: Mapping[str, Any], made_with: Mapping[str, Any]) -> None:
    """Make the file complete under another name first: whoever kills this, or does it too, leaves a whole study."""
    with tempfile.TemporaryDirectory(prefix=".study-", dir=Path(path).parent) as folder:
        new = str(Path(folder) / "new.db")
        study = optuna.create_study(study_name=NAME, storage=optuna.storages.RDBStorage("sqlite://", engine(new)))
        study.set_user_attr("made with", dict(made_with))
        study.enqueue_trial(dict(start), user_attrs={"start": True})
        with contextlib.suppress(FileExistsError):
            os.link(new, path)


def prepare_study(path: str, start: Mapping[str, Any], made_with: Mapping[str, Any]) -> optuna.Study:
    """Open the study, made now if there is none. Nothing is written into a file that holds something else.

    `start` is what the first trial tries; `made_with` maps options of the command to what they must stay.
    """
    place = Path(path)
    if place.suffix != ".db":
        raise tt.InputError(f"--study: {path} is not the name of a .db file.", "end it in .db.")
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place.parent).close()  # SQLite, too, writes beside the file
        if not place.exists():
            make_study(path, start, made_with)
        with place.open("r+b") as file:
            is_database = file.read(16) == b"SQLite format 3\0"
    except OSError as error:
        raise tt.InputError(f"--study: {path} cannot be written ({error.strerror}).", "give another path.") from None
    try:
        study = open_study(path) if is_database else None
    except (KeyError, RuntimeError, SQLAlchemyError, optuna.exceptions.OptunaError):
        study = None
    if study is None or "made with" not in study.user_attrs:
        raise tt.InputError(f"--study: {path} holds no study of this program.", "give the name of a new file.")
    before = study.user_attrs["made with"]
    for option, value in made_with.items():
        if value != before.get(option):
            raise tt.InputError(
                f"{option}: {path} was made with {before.get(option)}, now it is {value}.",
                "give the same, or another --study.",
            )
    return study


def search(path: str, study: optuna.Study, objective: Objective, workers: int, limit: float, deadline: float) -> str:
    """Let processes work on the study, and show how far they are. Returns what ended it early, if anything."""
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # NumPy's threads, in the processes
    processes = [
        multiprocessing.get_context("spawn").Process(target=work, args=(path, objective, limit, deadline))
        for _ in range(workers)
    ]
    note_signals(signal.SIGINT, signal.SIGTERM)
    total = limit if math.isfinite(limit) else None
    pause = 0.5 if sys.stderr.isatty() else 10  # a log file is not flooded
    try:
        for process in processes:
            process.start()
        with tqdm(total=total, initial=len(finished(study)), unit="trial", mininterval=pause) as bar:
            while any(process.is_alive() for process in processes) and not stopping.is_set():
                time.sleep(0.5)
                trials = finished(study)
                best = min((trial.value for trial in trials), default=math.nan)
                left = f", {max(deadline - time.time(), 0):.0f} s left" if math.isfinite(deadline) else ""
                bar.set_postfix_str(f"best {best:.3f}{left}", refresh=False)
                bar.update(len(trials) - bar.n)
    finally:
        for process in processes:
            if process.is_alive():
                process.terminate()
        for process in processes:
            if process.pid:
                process.join()
    codes = [process.exitcode for process in processes if process.exitcode]
    ended = f"{len(codes)} of {workers} processes ended with code {codes[0]}" if codes else ""
    return "stopped" if stopping.is_set() else ended
