"""The character language model as a user runs it: training, stopping, going on, sampling, and what is refused."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytape as tt
from models import char_lm

ROOT = Path(__file__).parent.parent
SMALL = {"hidden": 12, "embedding": 8, "batch": 4, "window": 8, "steps": 24, "validate": 10, "dropout": 0.2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences drawn from a few words: small, learnable, and without long repeats."""
    draw = random.Random(0)
    words = ["tape", "walk", "leaf", "node", "gate", "cell", "state", "step", "time", "loss"]
    lines = [" ".join(draw.choice(words) for _ in range(draw.randint(6, 14))) + "." for _ in range(700)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(lines), "utf-8")
    return path


def options(text: Path, **changed: Any) -> dict[str, Any]:
    return char_lm.DEFAULTS | SMALL | {"text": str(text)} | changed


def flags(text: Path, **changed: Any) -> list[str]:
    given = SMALL | {"text": str(text)} | changed
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "models.char_lm", *map(str, arguments)]


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return bool(np.array_equal(a, b)) and np.asarray(a).dtype == np.asarray(b).dtype


def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(text: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole.safetensors", tmp_path / "broken.safetensors"
    training = char_lm.Training(options(text))
    char_lm.run(training, str(whole))
    first = char_lm.Training(options(text))
    for _ in range(10):
        first.one_step()
    first.validate()
    tt.io.save_state(broken, first.tree())
    char_lm.main(["--resume", str(broken)])
    assert same(tt.io.load_state(whole), tt.io.load_state(broken))


def test_how_often_one_validates_does_not_change_training(text: Path) -> None:
    weights = []
    for every in (3, 1000):
        training = char_lm.Training(options(text, validate=every, steps=9))
        for step in range(1, 10):
            training.one_step()
            if step % every == 0:
                training.validate()
        weights.append(training.model.state_dict())
    assert same(*weights)


def test_training_learns_and_the_table_sets_it_beside_the_baselines(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lm.safetensors"
    char_lm.main([*flags(text, steps=150, validate=75, hidden=32, lr=0.02), f"--out={out}"])
    printed = capsys.readouterr().out
    names = [line.split()[0] for line in printed.splitlines() if line[:1].isdigit() and "-gram" in line]
    assert names == [f"{n}-gram" for n in range(1, 7)], printed
    bits = next(float(line.split()[2]) for line in printed.splitlines() if line.startswith("LSTM"))
    unigram = next(float(line.split()[1]) for line in printed.splitlines() if line.startswith("1-gram"))
    assert bits < unigram
    assert out.with_suffix(".png").stat().st_size > 1000
    saved = tt.io.load_state(out)
    assert saved["step"] == 150 and set(saved["vocabulary"]) == set(text.read_text("utf-8"))


def test_sampling_depends_on_the_seed_alone(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lm.safetensors"
    training = char_lm.Training(options(text, steps=3))
    char_lm.run(training, str(out))

    def written(*more: str) -> str:
        capsys.readouterr()
        char_lm.main(["sample", str(out), "--prompt", "tape ", "--length", "40", *more])
        return capsys.readouterr().out

    assert written("--seed", "1") == written("--seed", "1") != written("--seed", "2")
    assert written().startswith("tape ")
    assert written("--temperature", "1e-4", "--seed", "1") == written("--temperature", "1e-4", "--seed", "2")


@pytest.mark.parametrize("stops", [[signal.SIGINT], [signal.SIGINT] * 3, [signal.SIGTERM]], ids=repr)
def test_ctrl_c_saves_says_where_and_the_run_can_go_on(stops: list[Any], text: Path, tmp_path: Path) -> None:
    out = tmp_path / "lm.safetensors"
    process = subprocess.Popen(
        command(*flags(text, steps=100_000), f"--out={out}"), cwd=ROOT, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 60
    while not out.exists() and time.monotonic() < deadline:  # the first validation has saved
        time.sleep(0.05)
    for wanted in stops:
        process.send_signal(wanted)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert f"--resume {out}" in errors
    stopped = tt.io.load_state(out)["step"]
    assert stopped >= 10 and f"stopped at step {stopped}" in errors


def test_a_file_size_limit_leaves_the_old_file(text: Path, tmp_path: Path) -> None:
    """A full disk, played by a limit on the size of files."""
    out = tmp_path / "lm.safetensors"
    training = char_lm.Training(options(text, steps=1))
    char_lm.run(training, str(out))
    before = out.read_bytes()
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from models import char_lm; char_lm.main(sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", program, *flags(text, steps=2), f"--out={out}"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be written" in done.stderr
    assert out.read_bytes() == before
    assert os.listdir(tmp_path) == [out.name]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file"),
        (b"", "is empty"),
        (b"abc\0def" * 500, "is binary"),
        (b"\xff\xfe\xff" * 500, "not UTF-8"),
        (b"too short", "9 characters"),
    ],
)
def test_bad_texts(content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        char_lm.main([f"--text={path}", f"--out={tmp_path / 'runs' / 'x.safetensors'}"])
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch", 0), ("batch", 1_000_000), ("window", 0), ("validate", 0), ("steps", -1), ("hidden", -1),
        ("lr", "nan"), ("dropout", 2), ("clip", 0), ("seed", -1), ("hidden", 1.5),
        ("temperature", 0), ("temperature", "nan"),
    ],
)  # fmt: skip
def test_bad_options(option: str, value: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        char_lm.main([*flags(text, **{option: value}), f"--out={tmp_path / 'runs' / 'x.safetensors'}"])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert "error: " in error and error.count("\n") == 2, error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["text.txt", "lm.png", "", "folder.safetensors", "text.txt/lm.safetensors"])
def test_bad_places_are_refused_before_training(
    name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "text.txt").write_bytes(text.read_bytes())
    with pytest.raises(SystemExit) as stopped:
        char_lm.main([*flags(tmp_path / "text.txt", steps=10**9), f"--out={name and tmp_path / name}"])
    assert stopped.value.code == 2 and "error: --out: " in capsys.readouterr().err
    assert (tmp_path / "text.txt").read_bytes() == text.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["folder.safetensors", "text.txt"]


def test_a_terminal_that_lacks_the_characters(tmp_path: Path) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "lm.safetensors"
    draw = random.Random(0)
    path.write_text("".join(draw.choice("\U0001f600é\n") for _ in range(20_000)), "utf-8")
    char_lm.run(char_lm.Training(options(path, steps=1)), str(out))
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    done = subprocess.run(command("sample", out), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("?") > 100, done.stderr


def test_a_text_without_a_newline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "lm.safetensors"
    draw = random.Random(0)
    path.write_text("".join(draw.choice("ab") for _ in range(20_000)), "utf-8")
    char_lm.main([*flags(path, steps=2), f"--out={out}"])
    capsys.readouterr()
    char_lm.main(["sample", str(out), "--length=9"])
    assert set(capsys.readouterr().out.strip()) <= set("ab")


def test_a_run_stopped_before_its_first_validation_samples_what_it_has_learnt(
    text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lm.safetensors"
    training = char_lm.Training(options(text, lr=0.05))
    for _ in range(20):
        training.one_step()
    tt.io.save_state(out, training.tree())
    char_lm.main(["sample", str(out), "--length=50", "--prompt=t"])
    expected = char_lm.sample(training.model, training.vocabulary, "t", 50, 0.7, tt.Generator(0))
    assert capsys.readouterr().out == expected + "\n"


def test_a_resumed_run_can_be_saved_elsewhere(text: Path, tmp_path: Path) -> None:
    out, other = tmp_path / "lm.safetensors", tmp_path / "other.safetensors"
    char_lm.run(char_lm.Training(options(text, steps=2)), str(out))
    before = out.read_bytes()
    char_lm.main(["--resume", str(out), "--out", str(other)])
    assert out.read_bytes() == before and tt.io.load_state(other)["step"] == 2


def test_bad_checkpoints(text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "lm.safetensors"
    training = char_lm.Training(options(text, steps=1))
    char_lm.run(training, str(out))
    whole = out.read_bytes()
    other = tmp_path / "other.txt"
    other.write_text(text.read_text("utf-8").replace("tape", "TAPE"), "utf-8")
    foreign = tmp_path / "foreign.safetensors"
    tt.io.save_state(foreign, {"kind": "something else"})
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(whole[: len(whole) // 2])
    lacking = tmp_path / "lacking.safetensors"
    tt.io.save_state(lacking, {k: v for k, v in tt.io.load_state(out).items() if k != "generator"})
    cases = [
        (["--resume", lacking], "no character language model"),
        (["--resume", tmp_path / "folder" / "none"], "no such file"),
        (["--resume", ""], "cannot be read"),
        (["sample", out, "--length", "-1"], "--length"),
        (["--resume", foreign], "no character language model"),
        (["--resume", damaged], "damaged"),
        (["--resume", tmp_path / "none"], "none"),
        (["--resume", out, "--text", other], "another text"),
        (["--resume", out, "--hidden", "99"], "hidden cannot be changed"),
        (["sample", text], "text.txt"),
        (["sample", out, "--prompt", "tape €"], "'€'"),
        (["sample", out, "--temperature", "0"], "--temperature"),
    ]
    for arguments, words in cases:
        with pytest.raises(SystemExit) as stopped:
            char_lm.main([str(a) for a in arguments])
        error = capsys.readouterr().err
        assert stopped.value.code == 2, arguments
        assert words in error, error
    assert out.read_bytes() == whole
    assert not (tmp_path / "folder").exists()
