"""The command line, the self-test, and compiling ahead of time."""

import os
import subprocess
import sys

import numpy as np
import pytest

import tinytape as tt
from tinytape import nn
from tinytape.__main__ import main
from tinytape.kernels import compiler
from tinytape.prepare import warmup

needs_compiler = pytest.mark.skipif(not compiler.usable(), reason="needs Numba's compiler")


# ---- warmup ---------------------------------------------------------------------------------------------------------


class Noisy(nn.Module):
    """Draws, counts in a buffer, holds a gradient, and has one part in evaluation mode."""

    def __init__(self):
        self.generator = tt.Generator(3)
        self.embedding = nn.Embedding(5, 4, generator=self.generator)
        self.lstm = nn.LSTM(4, 6, generator=self.generator)
        self.dropout = nn.Dropout(0.5, generator=self.generator)
        self.calls = nn.Buffer(np.zeros(1))
        self.lstm.eval()

    def forward(self, x):
        self.calls.copy_(self.calls.data + 1)
        y, state = self.lstm(self.dropout(self.embedding(x)))
        return {"y": y, "state": state, "noise": tt.default_generator.normal((2,))}


def state_of(model):
    return {
        **model.state_dict(),
        **{f"grad of {name}": np.array(weight.grad) for name, weight in model.named_parameters()},
        "generator": model.generator.state(),
        "default": tt.default_generator.state(),
        "training": np.array([module.training for module in model.modules()]),
        "own": np.array(["training" in vars(module) for module in model.modules()]),
    }


def test_a_model_is_as_it_was():
    model = Noisy()
    model.lstm.weight_hh_l0.grad = np.ones((24, 6), np.float32)
    before = state_of(model)
    seconds = warmup(model, (3, 2), "int64")
    assert seconds > 0
    after = state_of(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


class Failing(nn.Module):
    def forward(self, x):
        raise tt.InputError("no.")


def test_a_model_that_fails_is_as_it_was():
    model = Noisy()
    before = state_of(model)
    with pytest.raises(tt.InputError):
        warmup(nn.Sequential(model, Failing()), (3, 2), "int64")
    after = state_of(model)
    for name, value in before.items():
        np.testing.assert_array_equal(after[name], value, err_msg=name)


class Recorder(nn.Module):
    """Keeps what it is called with, and whether its gradient was asked for."""

    def __init__(self):
        self.weight = nn.Parameter(np.ones(2))
        self.seen = []
        self.walked = 0

        def count(gradient):
            self.walked += 1

        self.weight.register_hook(count)

    def forward(self, x):
        self.seen.append((x.shape, x.dtype.name, float(abs(x.data).sum())))
        return (x * self.weight, [x.detach(), None, 3])


@pytest.mark.parametrize(
    ("shapes", "dtypes", "expected"),
    [
        ((3, 2), None, [((3, 2), "float64", 0.0)]),
        (2, "float32", [((2,), "float32", 0.0)]),
        ([(3, 2), [1, 2]], None, [((3, 2), "float64", 0.0), ((1, 2), "float64", 0.0)]),
        ([(3, 2), (1, 2)], ["int64", bool], [((3, 2), "int64", 0.0), ((1, 2), "bool", 0.0)]),
        ([4, 2], np.float32, [((4, 2), "float32", 0.0)]),
    ],
)
def test_forward_and_backward_once_for_each_shape(shapes, dtypes, expected):
    model = Recorder()
    with tt.no_grad():
        warmup(model, shapes, dtypes)
    assert model.seen == expected
    assert model.walked == len(expected)
    assert model.weight.grad is None


def test_a_model_with_nothing_to_learn_is_run_forwards():
    warmup(nn.Sequential(nn.Tanh()), (2, 3))
    warmup(nn.Linear(3, 2).requires_grad_(False), (2, 3))


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((abs, (2, 3)), tt.DTypeError, "model is a builtin"),
        ((nn.Linear(3, 2), (2, 4)), tt.ShapeError, "in_features = 3, got 4"),
        ((nn.Linear(3, 2), (2, -3)), tt.ShapeError, "not a shape"),
        ((nn.Linear(3, 2), 2.5), tt.ShapeError, "2.5 is not a shape"),
        ((nn.Linear(3, 2), []), tt.ShapeError, "not a shape"),
        ((nn.Linear(3, 2), [(2, 3), "x"]), tt.ShapeError, "'x' is not a shape"),
        ((nn.Linear(3, 2), (2, 3), "float99"), tt.DTypeError, "float99"),
        ((nn.Linear(3, 2), (2, 3), ["float32", "float32"]), tt.InputError, "2 dtypes for 1 shapes"),
        ((nn.Linear(3, 2), (2, 3), "float64"), tt.DTypeError, "float64"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        warmup(*arguments)


# ---- the command line -----------------------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "tinytape", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=os.environ | environment)


def test_help():
    done = run()
    assert done.returncode == 0 and done.stderr == ""
    assert "doctor" in done.stdout and "warmup" in done.stdout
    assert "numba" not in run("--help").stderr


@needs_compiler
@pytest.mark.parametrize("cells", [[], ["gru"], ["PeepholeLSTMCell", "lstm"]])
def test_warmup_names_what_it_prepared(capsys, cells):
    assert main(["warmup", "--hidden", "6", "--dtype", "float64", *cells]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" ")[:3] for line in lines] == [
        [cell, "6", "float64:"] for cell in cells or ["RNN", "GRU", "LSTM"]
    ]


@needs_compiler
@pytest.mark.parametrize(
    ("arguments", "said"), [(["LSTN"], "no cell 'LSTN'"), (["Linear"], "no cell 'Linear'"), (["--hidden", "0"], "is 0")]
)
def test_warmup_refuses(capsys, arguments, said):
    assert main(["warmup", *arguments]) == 1
    assert said in capsys.readouterr().err


def test_warmup_without_a_compiler():
    done = run("warmup", "lstm", NUMBA_DISABLE_JIT="1")
    assert done.returncode == 1
    assert "NUMBA_DISABLE_JIT" in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def doctor(monkeypatch):
    """The doctor in a hurry: products are timed for no time at all, and what takes long to compile is left out."""
    from tinytape import doctor

    monkeypatch.setattr(doctor, "_check_products", lambda: (False, "left out"))
    monkeypatch.setattr(doctor, "_speeds", lambda: iter(["speeds left out"]))
    return doctor


@needs_compiler
def test_a_machine_that_is_well(doctor, capsys):
    assert main(["doctor"]) == 0
    out = capsys.readouterr().out
    for word in (
        "processor",
        "vectors",
        "tile",
        "threads",
        "cache",
        "numba",
        "llvmlite",
        "safetensors",
        np.__version__,
    ):
        assert word in out
    assert "WRONG" not in out and out.count("right ") >= 3


@needs_compiler
def test_a_wrong_function_is_found(doctor, monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_FUNCTIONS", doctor._FUNCTIONS.replace("sigmoid(v)", "sigmoid(v) * (1 + 1e-6)"))
    assert main(["doctor"]) == 1
    out = capsys.readouterr().out
    assert [line.split(":")[0] for line in out.splitlines() if line.startswith("WRONG")] == ["WRONG functions"]


@needs_compiler
def test_a_check_that_cannot_be_made_is_told(doctor, monkeypatch, capsys):
    def broken(task, n):
        raise RuntimeError("no threads today")

    monkeypatch.setattr(doctor.threads, "run", broken)
    assert main(["doctor"]) == 1
    assert "WRONG threads: RuntimeError: no threads today" in capsys.readouterr().out


@needs_compiler
def test_lost_tasks_are_found(doctor, monkeypatch, capsys):
    def forgetful(task, n):
        for index in range(n - 1):
            task(index)

    monkeypatch.setattr(doctor.threads, "run", forgetful)
    assert main(["doctor"]) == 1
    assert "1 tasks not run just once" in capsys.readouterr().out


def test_the_doctor_without_a_compiler():
    done = run("doctor", NUMBA_DISABLE_JIT="1")
    assert done.returncode == 0, done.stderr
    assert "no kernels are compiled" in done.stdout


@needs_compiler
@pytest.mark.slow
def test_the_whole_self_test():
    done = run("doctor")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "GFLOP/s" in done.stdout and "ratio" in done.stdout and "WRONG" not in done.stdout
