"""What the programs in models/ share on the command line."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import tinytape as tt
from models import command, forecast, long_lag, music

WAVE = "y\n" + "".join(f"{i % 6 + i % 5 / 10}\n" for i in range(160))
STOPPED = {
    "forecast": (forecast, ["--season=6", "--horizon=6", "--members=2", "--steps=60", "--hidden=4"]),
    "music": (music, ["--networks", "gru", "--hidden=4", "--epochs=1", "--batch=100"]),
    "long_lag": (long_lag, ["--networks", "gru", "--lengths", "5", "--updates=60", "--hidden=4", "--batch=4"]),
}


@pytest.mark.parametrize("name", STOPPED)
def test_what_a_stopped_program_says_makes_it_go_on(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module, options = STOPPED[name]
    if name == "forecast":
        (tmp_path / "wave.csv").write_text(WAVE)
        options = [*options, f"--csv={tmp_path / 'wave.csv'}"]
    step, out = tt.train.Run.step, tmp_path / "a folder"

    def stopping_step(run: Any, *given: Any, **told: Any) -> float:
        os.kill(os.getpid(), signal.SIGINT)
        return step(run, *given, **told)

    monkeypatch.setattr(tt.train.Run, "step", stopping_step)
    with pytest.raises(SystemExit) as stopped:
        module.main([*options, "--out", str(out)])
    said = str(stopped.value.code)
    assert "SIGINT: stopped at step 1" in said
    again = shlex.split(said.partition("Go on with: ")[2])
    assert again[:3] == ["python", "-m", f"models.{name}"]
    monkeypatch.setattr(tt.train.Run, "step", step)
    module.main(again[3:])
    assert str(out) in capsys.readouterr().out
    assert list(out.glob("*.png"))


def test_too_little_memory_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    def program(_: Any) -> None:
        raise MemoryError("Unable to allocate 1.42 PiB")

    with pytest.raises(SystemExit) as stopped:
        command.run(program, [])
    assert stopped.value.code == 2
    assert capsys.readouterr().err.startswith("error: out of memory: Unable to allocate 1.42 PiB\n  help: ")


def test_without_matplotlib_one_line_says_what_to_install() -> None:
    program = (
        "import sys; sys.modules['matplotlib.figure'] = None; from models import command\n"
        "command.run(lambda _: command.figure(1, 1, (2, 2)), [])"
    )
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: matplotlib is not installed."), done.stderr
