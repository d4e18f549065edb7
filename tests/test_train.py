"""`tt.train`: a run that is stopped anywhere goes on with the bits of one that never was."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import killed_run
import tinytape as tt
from killed_run import BATCHES, EPOCHS, outcome
from tinytape.train import progress

ROOT = Path(__file__).parent.parent


class Kill(Exception):
    """Stands for the end of the process."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
    folder = tmp_path_factory.mktemp("unbroken")
    tt.manual_seed(3)
    run = killed_run.train(folder, save_every=1e9)
    assert run.count == run.best.count + 1 == EPOCHS * BATCHES or run.best is not None
    return outcome(folder)


def small(folder, **options):
    model = tt.nn.Linear(2, 1, generator=tt.Generator(0))
    return tt.train.Run(folder, model, tt.optim.SGD(model, lr=0.1), progress=False, **options)


def loss_of(run, scale=1.0):
    return tt.mean(tt.square(run.model(np.ones((3, 2), np.float32)))) * scale


# ---- going on --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def no_waiting_for_the_disk():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.mark.usefixtures("no_waiting_for_the_disk")
@given(stops=st.lists(st.integers(0, BATCHES * EPOCHS), max_size=3))
def test_a_run_that_ends_anywhere_goes_on_with_the_same_bits(stops, unbroken, tmp_path_factory):
    folder = tmp_path_factory.mktemp("broken")
    for stop in stops:
        count = 0

        def end(run, stop=stop):
            nonlocal count
            count += 1
            if count == stop:
                raise Kill  # in the midst of a step: the weights are new, the checkpoint is from before

        tt.manual_seed(3)
        try:
            killed_run.train(folder, end)
        except Kill:
            assert tt.io.load_state(folder / "last.safetensors")["count"] <= BATCHES * EPOCHS
    tt.manual_seed(4)  # the state of the default generator comes from the file
    if not stops:
        tt.manual_seed(3)
    killed_run.train(folder)
    assert outcome(folder) == unbroken


def kill_at_random(folder, kills, seed):
    """Start the run again and again, and kill it at random moments; then let it come to its end."""
    draw = random.Random(seed)
    done = 0
    while done < kills:
        process = subprocess.Popen([sys.executable, ROOT / "tests" / "killed_run.py", folder, "0.005"], cwd=ROOT)
        log, before = folder / "log.jsonl", time.monotonic()
        while process.poll() is None and not log.exists() and time.monotonic() < before + 60:
            time.sleep(0.01)
        time.sleep(draw.uniform(0, 0.4))
        process.kill()
        done += 1
        if process.wait() == 0:  # it was faster
            break
    finished = subprocess.run([sys.executable, ROOT / "tests" / "killed_run.py", folder, "0"], cwd=ROOT)
    assert finished.returncode == 0
    return done


def test_kill_9(tmp_path, unbroken):
    assert kill_at_random(tmp_path / "run", 2, seed=0)
    assert outcome(tmp_path / "run") == unbroken


@pytest.mark.slow
def test_kill_9_twenty_times(tmp_path, unbroken):
    kills = 0
    for seed in range(40):
        kills += kill_at_random(tmp_path / f"run{seed}", 4, seed)
        assert outcome(tmp_path / f"run{seed}") == unbroken
        if kills >= 20:
            return
    pytest.fail(f"only {kills} kills")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_end_saves_and_says_so(kind, tmp_path, unbroken):
    def press(run):
        if run.count == 10:
            os.kill(os.getpid(), kind)
            os.kill(os.getpid(), kind)

    before = signal.getsignal(kind)
    tt.manual_seed(3)
    with pytest.raises(tt.train.Stopped, match=f"{kind.name}: stopped at step 10; saved in"):
        killed_run.train(tmp_path, press, save_every=1e9)
    assert signal.getsignal(kind) is before
    assert tt.io.load_state(tmp_path / "last.safetensors")["count"] == 10
    killed_run.train(tmp_path)
    assert outcome(tmp_path) == unbroken


def test_the_clock_stops_with_the_run_and_goes_on_with_it(tmp_path):
    with small(tmp_path) as run:
        for _ in run.steps(2):
            time.sleep(0.02)
    first = run.seconds
    time.sleep(0.05)
    assert run.seconds == first >= 0.04
    with small(tmp_path, resume=True) as again:
        assert again.seconds == pytest.approx(first, abs=0.04)
        for _ in again.steps(3):
            time.sleep(0.02)
    assert again.seconds >= first + 0.01


def test_a_signal_after_the_last_batch_is_not_lost(tmp_path):
    def batches():
        yield from range(2)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(tt.train.Stopped, match="step 2"), small(tmp_path / "end") as run:
        for _ in run.batches(batches()):
            run.step(loss_of(run))
    with pytest.raises(tt.train.Stopped, match="step 1"), small(tmp_path / "break") as run:
        for _ in run.steps(2):
            run.step(loss_of(run))
            os.kill(os.getpid(), signal.SIGINT)
            break
    for name, count in (("end", 2), ("break", 1)):
        assert tt.io.load_state(tmp_path / name / "last.safetensors")["count"] == count


def test_after_an_error_signals_are_as_before(tmp_path):
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(Kill), small(tmp_path) as run:
        for _ in run.steps(3):
            raise Kill
    assert signal.getsignal(signal.SIGINT) is before


def test_a_finished_run_does_nothing_more(tmp_path, unbroken):
    tt.manual_seed(3)
    for _ in range(2):
        killed_run.train(tmp_path)
        assert outcome(tmp_path) == unbroken


class Counted(Sequence):
    """A sequence that is read from where it is gone on with."""

    def __init__(self, items):
        self.items, self.first = items, None

    def __len__(self):
        return len(self.items)

    def __getitem__(self, i):
        self.first = i if self.first is None else self.first
        assert self.first in (0, 4)
        return self.items[i]


@pytest.mark.parametrize("made", [iter, Counted, list], ids=["iterator", "own sequence", "list"])
def test_batches_that_were_done_are_passed_over(made, tmp_path):
    seen = []

    def train(resume, stop=None):
        with small(tmp_path, resume=resume, save_every=0) as run:
            for i in run.batches(made(list(range(6)))):
                if i == stop:
                    raise Kill
                seen.append(i)
                run.step(loss_of(run))

    with pytest.raises(Kill):
        train(False, 4)
    train(True)
    assert seen == [0, 1, 2, 3, 4, 5]


def test_what_draws_for_an_epoch_draws_the_same_again(tmp_path):
    seen = []

    def train(stop, resume):
        generator = tt.Generator(7)
        with small(tmp_path, parts={"g": generator}, resume=resume, save_every=0) as run:
            for _ in run.epochs(3):
                for i in run.batches(generator.permutation(5).tolist()):
                    if run.count == stop:
                        raise Kill
                    seen.append((i, float(generator.uniform())))
                    run.step(loss_of(run))

    with pytest.raises(Kill):
        train(8, False)
    train(None, True)
    generator, expected = tt.Generator(7), []
    for _ in range(3):
        expected += [(i, float(generator.uniform())) for i in generator.permutation(5).tolist()]
    assert seen == expected


def test_a_validation_before_the_batches_of_an_epoch_is_not_done_again_with_later_weights(tmp_path):
    def train(folder, scores, stop=None, resume=False):
        left = iter(scores)
        with small(folder, resume=resume, save_every=0) as run:
            for _ in run.epochs(3):
                run.validate(lambda: next(left))
                for _ in run.batches(range(4)):
                    if run.count == stop:
                        raise Kill
                    run.step(loss_of(run))
            run.load_best()
        return run

    whole = train(tmp_path / "whole", [3.0, 2.0, 2.5])
    with pytest.raises(Kill):
        train(tmp_path / "cut", [3.0, 2.0], stop=6)
    run = train(tmp_path / "cut", [2.5], resume=True)
    assert run.best == whole.best == tt.train.Best(2.0, 4, 1)
    assert np.array_equal(run.model.weight.numpy(), whole.model.weight.numpy())
    lines = [[line.get("valid") for line in tt.train.read_log(tmp_path / name)] for name in ("whole", "cut")]
    assert lines[0] == lines[1]


def test_leaving_the_loop_by_break_counts_its_batch(tmp_path):
    with small(tmp_path) as run:
        for i in run.batches(range(9)):
            run.step(loss_of(run))
            if i == 3:
                break
    with small(tmp_path, resume=True) as run:
        assert run.count == 4
        assert list(run.batches(range(9))) == [4, 5, 6, 7, 8]


# ---- validation ------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights_after(tmp_path):
    """The weights after some steps with a validation every so often."""
    x, y = killed_run.data()
    h = np.zeros((5, 6), np.float32)

    def train(every):
        generator = tt.Generator(0)
        net = killed_run.Net(generator)

        def score():
            assert not net.drop.training and net(x[0], h)[0].is_leaf
            tt.default_generator.uniform()
            return float(generator.uniform())

        with tt.train.Run(tmp_path / str(every), net, tt.optim.Adam(net, lr=0.01), progress=False) as run:
            for i in run.steps(BATCHES):
                run.step(tt.nn.functional.mse_loss(net(x[i], h)[0], y[i]))
                run.validate(score, every)
        return net.state_dict()

    return train


def test_how_often_one_validates_does_not_change_training(weights_after):
    often, never = weights_after(1), weights_after(1000)
    assert all(np.array_equal(often[name], never[name]) for name in often)


def test_modes_are_put_back_one_by_one(tmp_path):
    model = tt.nn.Sequential(tt.nn.Linear(2, 2), tt.nn.Dropout(0.5), tt.nn.Dropout(0.5))
    model[2].eval()
    with tt.train.Run(tmp_path, model, tt.optim.SGD(model, lr=0.1), progress=False) as run:
        with run.evaluating():
            assert not any(module.training for module in model.modules())
        assert [module.training for module in model] == [True, True, False] and model.training


@pytest.mark.parametrize(("better", "best"), [("lower", 1), ("higher", 4)])
def test_the_best_weights_are_kept_and_patience_ends_the_loops(better, best, tmp_path):
    results = iter([1.0, 2.0, math.nan, 3.0, 5.0, 4.0, 4.5] if better == "higher" else [2.0, 1.0, math.nan, 3.0, 0.0])
    kept, epochs = [], []
    with small(tmp_path, better=better, patience=2) as run:
        for epoch in run.epochs(20):
            for _ in run.steps(2):
                run.step(loss_of(run))
            kept.append(run.model.state_dict())
            epochs.append(epoch)
            run.validate(lambda: next(results))
        assert run.finished and run.best.epoch == best and run.best.count == 2 * best + 2
        assert epochs == list(range(best + 3))
        run.load_best()
        assert np.array_equal(run.model.weight.numpy(), kept[best]["weight"])
    saved = tt.train.load(tmp_path)
    assert np.array_equal(saved["model"]["weight"], kept[best]["weight"])
    assert saved["best"] == {"value": run.best.value, "count": run.best.count, "epoch": best}
    assert np.array_equal(tt.train.load(tmp_path, "last")["model"]["weight"], kept[-1]["weight"])


def test_validating_twice_at_one_step_is_once(tmp_path):
    with small(tmp_path) as run:
        for _ in run.steps(2):
            run.step(loss_of(run))
            assert run.validate(lambda: 1.0, every=2) == (None if run.count == 1 else 1.0)
        assert run.validate(lambda: 7.0) == 1.0
    assert [line["valid"] for line in tt.train.read_log(tmp_path)] == [1.0]


def test_a_run_without_a_validation_is_loaded_as_it_was_last(tmp_path):
    with small(tmp_path, about={"sizes": (2, 1)}) as run:
        for _ in run.steps(3):
            run.step(loss_of(run))
        with pytest.raises(tt.InputError, match="nothing was validated"):
            run.load_best()
    saved = tt.train.load(tmp_path)
    assert saved["about"] == {"sizes": (2, 1)} and saved["count"] == 3 and saved["best"] is None
    assert np.array_equal(saved["model"]["weight"], run.model.weight.numpy())


# ---- the log ---------------------------------------------------------------------------------------------------------


def test_the_log_has_means_and_is_json(tmp_path):
    losses = []
    with small(tmp_path, log_every=2) as run:
        for i in run.steps(5):
            losses.append(run.step(loss_of(run), index=i))
        run.log(odd=math.inf, word="yes", nothing=None)
        steps, values = run.history("loss")
    assert steps.tolist() == [2, 4] == run.history("loss")[0].tolist()
    np.testing.assert_allclose(values, np.reshape(losses[:4], (2, 2)).mean(1), rtol=1e-12)
    lines = [json.loads(line, parse_constant=pytest.fail) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert [line.get("index") for line in lines] == [0.5, 2.5, None]
    assert lines[-1].items() >= {"odd": None, "word": "yes", "nothing": None, "step": 5}.items()


def test_a_line_that_was_cut_short_is_passed_over(tmp_path):
    (tmp_path / "log.jsonl").write_text('{"step": 1}\n{"step": 2, "lo')
    assert tt.train.read_log(tmp_path) == [{"step": 1}]
    for damaged in (b'{"step": 1}\n{"st\n', b'{"step": "\xff"}\n'):
        (tmp_path / "log.jsonl").write_bytes(damaged)
        with pytest.raises(tt.InputError, match="is damaged"):
            tt.train.read_log(tmp_path)


class Board:
    """Stands for tensorboardX."""

    def __init__(self, folder, purge_step):
        self.told = boards.append(self) or [("from", purge_step)]

    def add_scalar(self, name, value, step):
        self.told.append((name, step))

    def flush(self):
        pass

    def close(self):
        self.told.append("closed")


boards: list[Board] = []


def test_tensorboard_goes_on_where_the_log_does(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", type(sys)("tensorboardX"))
    sys.modules["tensorboardX"].SummaryWriter = Board
    for steps, resume in ((2, False), (3, True)):
        with small(tmp_path, log_every=1, tensorboard=True, resume=resume) as run:
            for _ in run.steps(steps):
                run.step(loss_of(run))
    first, second = boards
    assert first.told[0] == ("from", 0) and ("loss", 2) in first.told and first.told[-1] == "closed"
    assert second.told[0] == ("from", 3) and ("loss", 3) in second.told and ("loss", 2) not in second.told


def test_tensorboard_may_be_absent(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorboardX", None)
    with pytest.raises(tt.InputError, match="tensorboardX is not installed"):
        small(tmp_path, tensorboard=True)


def test_progress_in_a_file_is_a_line_now_and_then(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(progress, "PAUSE", 0.0)
    with small(tmp_path, log_every=1) as run:
        run._progress = progress.Progress(True)
        for _ in run.epochs(1):
            for _ in run.steps(3):
                run.step(loss_of(run))
            run.validate(lambda: 0.5)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 4 and lines[1].startswith("epoch 1/1  2/3 steps  loss ") and lines[1].endswith(" left")
    assert lines[3] == "epoch 1/1, step 3: valid 0.5 (best)"
    with small(tmp_path, resume=True) as run:
        run.say("nothing")
    assert capsys.readouterr().err == ""


def test_progress_in_a_terminal_is_a_bar(tmp_path, monkeypatch, capsys):
    pytest.importorskip("tqdm")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with small(tmp_path, log_every=1) as run:
        run._progress = progress.Progress(True)
        for _ in run.steps(3):
            run.step(loss_of(run))
            run.say("a line")
    shown = capsys.readouterr().err
    assert "3/3" in shown.replace(" ", "") or "0/3" in shown
    assert shown.count("a line\n") == 3


# ---- averages --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [None, 0.5, 0.999])
def test_averages_against_numpy(decay):
    model = tt.nn.Linear(3, 2, dtype="float64")
    average, seen = tt.train.Average(model, decay), []
    mean = model.weight.numpy()
    for step in range(1, 40):
        with tt.no_grad():
            model.weight.copy_(np.random.default_rng(step).standard_normal((2, 3)))
        average.update()
        seen.append(model.weight.numpy())
        keep = 0.0 if decay is None else min(decay, step / (step + 10))
        mean = np.mean(seen, 0) if decay is None else keep * mean + (1 - keep) * seen[-1]
    with average.applied():
        found = model.weight.numpy()
    assert np.array_equal(model.weight.numpy(), seen[-1])
    np.testing.assert_allclose(found, mean, rtol=1e-12)
    again = tt.train.Average(model, decay)
    again.load_state_dict(average.state_dict())
    with again.applied():
        assert np.array_equal(model.weight.numpy(), found)


def test_averages_refuse():
    model = tt.nn.Linear(3, 2)
    with pytest.raises(tt.InputError, match="decay is 1"):
        tt.train.Average(model, 1)
    other = tt.train.Average(tt.nn.Linear(2, 2)).state_dict()
    with pytest.raises(tt.InputError, match="not of this model"):
        tt.train.Average(model).load_state_dict(other)


# ---- what is refused -------------------------------------------------------------------------------------------------


def test_nothing_is_overwritten(tmp_path):
    with small(tmp_path) as run:
        for _ in run.steps(2):
            run.step(loss_of(run))
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(tt.InputError, match="holds a run already"):
        small(tmp_path)
    with pytest.raises(tt.InputError, match="about something else: seed is nothing there, 2 here"):
        small(tmp_path, about={"seed": 2}, resume=True)
    model = tt.nn.Linear(3, 1)
    with pytest.raises(tt.InputError, match="weight"):
        tt.train.Run(tmp_path, model, tt.optim.SGD(model, lr=0.1), resume=True)
    with pytest.raises(tt.InputError, match="the generators default; here they are g, default"):
        small(tmp_path, parts={"g": tt.Generator(0)}, resume=True)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_without_its_last_checkpoint_is_not_taken_for_empty(tmp_path):
    with small(tmp_path) as run:
        for _ in run.steps(25):
            run.step(loss_of(run))
        run.validate(lambda: 1.0)
    (tmp_path / "last.safetensors").unlink()
    with pytest.raises(tt.InputError, match="holds a run already"):
        small(tmp_path)
    (tmp_path / "best.safetensors").unlink()
    with pytest.raises(tt.InputError, match="holds a run already"):
        small(tmp_path)
    with small(tmp_path, resume=True) as run:  # starts anew, and so does the log
        for _ in run.steps(25):
            run.step(loss_of(run))
    assert [line["step"] for line in tt.train.read_log(tmp_path)] == [25]


def test_bad_folders(tmp_path):
    file = tmp_path / "file"
    file.write_text("text")
    with pytest.raises(tt.InputError, match="cannot be made"):
        small(file / "below")
    with pytest.raises(tt.InputError, match="holds no run"):
        tt.train.load(tmp_path)
    with pytest.raises(tt.InputError, match="not a whole safetensors file"):
        tt.train.load(file)
    with pytest.raises(tt.InputError, match="cannot be read"):
        tt.train.read_log(tmp_path)
    tt.io.save_state(tmp_path / "last.safetensors", {"kind": "other"})
    with pytest.raises(tt.InputError, match="not a checkpoint of a run"):
        small(tmp_path, resume=True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"better": "best"}, "better is 'best'"),
        ({"patience": 0}, "patience is 0"),
        ({"log_every": 1.5}, "log_every is 1.5"),
        ({"save_every": -1}, "save_every is -1"),
        ({"parts": {"model": tt.Generator(0)}}, "which is taken"),
    ],
)
def test_bad_options(options, words, tmp_path):
    with pytest.raises(tt.InputError, match=words):
        small(tmp_path / "run", **options)
    assert not (tmp_path / "run").exists()


def test_a_part_without_a_state_is_refused(tmp_path):
    with pytest.raises(tt.DTypeError, match=r"parts\['x'\] is a int"):
        small(tmp_path, parts={"x": 3})


def test_loops_in_the_wrong_place(tmp_path):
    run = small(tmp_path)
    with pytest.raises(tt.InputError, match="outside of `with`"):
        next(iter(run.epochs(1)))
    with run:
        for _ in run.epochs(1):
            with pytest.raises(tt.InputError, match="inside a loop"):
                next(iter(run.epochs(1)))
            list(run.steps(2))
            with pytest.raises(tt.InputError, match="a second loop"):
                list(run.steps(2))
            run.step(loss_of(run))
            run.validate(lambda: 1.0)
        run.load_best()
        with pytest.raises(tt.InputError, match="after load_best"):
            run.step(loss_of(run))


def test_a_loss_that_is_not_finite_changes_nothing(tmp_path):
    with pytest.raises(tt.InputError, match="the loss is inf at step 1"), small(tmp_path, save_every=0) as run:
        for i in run.steps(3):
            before = run.model.weight.numpy()
            run.step(loss_of(run, math.inf if i else 1.0))
    assert np.array_equal(run.model.weight.numpy(), before)
    assert tt.train.load(tmp_path)["count"] == 1
