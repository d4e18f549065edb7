"""models/long_lag: short problems are solved, the table tells it, nothing is trained twice, bad input is refused."""

import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tinytape as tt
from models import lags, long_lag

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--hidden=8", "--batch=4", "--updates=5", "--lengths", "6", "5"]


def weights(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("best.safetensors")}


@pytest.mark.parametrize("name", long_lag.PROBLEMS)
def test_a_perfect_answer_scores_0_and_a_guess_as_stated(name: str) -> None:
    problem = long_lag.PROBLEMS[name]
    x, y = problem.draw(4000, 10, tt.Generator(0))
    assert x.shape[1:] == (4000, problem.inputs) and x.dtype == np.float32
    if name == "adding":
        perfect, guess = y, np.ones_like(y)
    else:
        perfect, guess = np.eye(problem.outputs)[y], np.zeros((*y.shape, problem.outputs))  # argmax: always 0
    assert problem.score(tt.tensor(perfect), y) == 0
    assert problem.score(tt.tensor(guess), y) == pytest.approx(problem.guess, abs=0.02)


@pytest.mark.parametrize("network", long_lag.RATES)
def test_networks_start_as_they_are_named(network: str) -> None:
    layer = lags.layer_of(network, 2, 16, 100, tt.Generator(0))
    w = {name: p.numpy() for name, p in layer.named_parameters()}
    recurrent = w["cell.weight_hh"] if network == "ln-lstm" else w["weight_hh_l0"]
    bias = w["cell.bias_ih"] if network == "ln-lstm" else w["bias_ih_l0"]
    if network.startswith("identity"):
        assert np.allclose(recurrent, np.eye(16) * (1.1 if "1.1" in network else 1)) and not bias.any()
    if network == "ortho":
        assert np.allclose(recurrent @ recurrent.T, np.eye(16), atol=1e-5)
    if network in ("lstm", "ln-lstm"):
        assert (bias[16:32] == 1).all()
    if network == "chrono":
        assert (bias[16:32] == -bias[:16]).all() and (bias[16:32] >= 0).all() and (bias[16:32] <= np.log(99)).all()
    with tt.no_compile():
        y, _ = layer(np.zeros((3, 2, 2), np.float32))
    assert y.shape == (3, 2, 16)


def test_the_gradient_explodes_vanishes_or_stays_as_the_start_says() -> None:
    problem = long_lag.PROBLEMS["adding"]
    x, y = problem.draw(8, 60, tt.Generator(0))
    verdicts = {}
    for network in ("rnn", "identity", "identity-1.1"):
        model = long_lag.Network(network, problem, 16, 60, tt.Generator(1))
        verdicts[network] = long_lag.gradient_flow(model, problem, x, y)["verdict"].split()[0].strip(":")
    assert verdicts == {"rnn": "vanishes", "identity": "steady", "identity-1.1": "explodes"}


def test_short_adding_is_solved(tmp_path: Path) -> None:
    options = long_lag.parse([f"--out={tmp_path}", "--hidden=32", "--batch=32"])
    result = long_lag.train(long_lag.Cell("adding", "gru", 8, 0, 1.0), options)
    assert result.solved is not None and result.score < long_lag.SOLVED and result.largest > 0


def test_the_table_and_the_same_command_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = [*SMALL, f"--out={tmp_path}", "--problems", "copy", "order", "--networks", "gru", "rnn", "--seeds=2"]
    long_lag.main(command)
    first, before = capsys.readouterr(), weights(tmp_path)
    assert "T = 5" in first.out and "0/2" in first.out and "none" in first.out
    assert first.out.count("\nrnn") == 8  # of two problems: success, flow, and clipping with and without
    assert (tmp_path / "long_lag.png").stat().st_size > 10_000
    long_lag.main(command)
    again = capsys.readouterr()
    assert again.out == first.out and again.err == first.err  # with its seconds: nothing was trained
    assert weights(tmp_path) == before


def test_a_training_that_diverges_ends(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    options = long_lag.parse([f"--out={tmp_path}", "--hidden=8", "--batch=4", "--updates=60"])
    monkeypatch.setitem(long_lag.RATES, "identity-1.1", 1e30)
    result = long_lag.train(long_lag.Cell("adding", "identity-1.1", 40, 0, long_lag.FREE), options)
    log = tt.train.read_log(next(tmp_path.iterdir()))
    assert result.solved is None and log[-1]["step"] < 60


def test_killed_and_started_again_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    def command(folder: Path) -> list[str]:
        flags = ["--networks", "gru", "--lengths", "30", "--updates=100", "--hidden=16", f"--out={folder}"]
        return [sys.executable, "-m", "models.long_lag", *flags]

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = subprocess.run(command(whole), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(command(broken), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(broken.rglob("best.safetensors")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command(broken), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert weights(whole) and weights(whole) == weights(broken)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--lengths", "4"], "at least 5 is needed"),
        (["--networks", "transformer"], "invalid choice"),
        (["--problems", "sorting"], "invalid choice"),
        (["--seeds", "0"], "at least 1"),
        (["--clip", "nan"], "is needed"),
        (["--out", __file__], "folder"),
    ],
)
def test_bad_input(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        long_lag.main([*SMALL, *arguments])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error, error


def test_other_settings_are_trained_beside(tmp_path: Path) -> None:
    command = [*SMALL, f"--out={tmp_path}", "--networks", "rnn"]
    long_lag.main(command)
    before = weights(tmp_path)
    long_lag.main([*command, "--hidden=9"])
    after = weights(tmp_path)
    assert len(after) == 2 * len(before) and before.items() <= after.items()
