"""The character language model as a user runs it: training, stopping, going on, sampling, and what is refused."""

from __future__ import annotations

import json
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
from models.language import LanguageModel

ROOT = Path(__file__).parent.parent
SMALL = {"hidden": 12, "embedding": 8, "batch": 16, "window": 20, "epochs": 2, "dropout": 0.2}


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sentences drawn from a few words: small, learnable, and without long repeats."""
    draw = random.Random(0)
    words = ["tape", "walk", "leaf", "node", "gate", "cell", "state", "step", "time", "loss"]
    lines = [" ".join(draw.choice(words) for _ in range(draw.randint(6, 14))) + "." for _ in range(420)]
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text("\n\n".join(lines), "utf-8")
    return path


def flags(text: Path, **changed: Any) -> list[str]:
    given = SMALL | {"text": text} | changed
    return [f"--{name.replace('_', '-')}={value}" for name, value in given.items()]


def command(*arguments: Any) -> list[str]:
    return [sys.executable, "-m", "models.char_lm", *map(str, arguments)]


def run(*arguments: Any) -> None:
    char_lm.main([str(argument) for argument in arguments])


@pytest.fixture(scope="module")
def trained(text: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run with all that the network can do, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "lm"
    more = {"layers": 2, "embedding": 12, "tied": 1, "weight_drop": 0.1, "per": "sequence", "average": 0.9}
    arguments = command(*flags(text, **more, epochs=6, lr=0.02), f"--out={out}")
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def refused(*arguments: Any, capsys: pytest.CaptureFixture[str]) -> str:
    """What a user reads who asks for something impossible; nothing may have been printed before."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run(*arguments)
    shown = capsys.readouterr()
    assert stopped.value.code == 2 and shown.err.count("error: ") == 1 and not shown.out, shown
    return shown.err


def test_training_learns_and_the_table_sets_it_beside_the_baselines(trained: tuple[Path, str]) -> None:
    out, printed = trained
    rows = {
        line.split()[0]: float(line.split()[1])
        for line in printed.splitlines()
        if " bits " not in line and line[:1].isalnum() and ("-gram" in line or line.startswith("LSTM"))
    }
    assert list(rows) == [*(f"{n}-gram" for n in range(1, 7)), "LSTM"]
    assert rows["LSTM"] < rows["1-gram"]
    assert (out / "curves.png").stat().st_size > 1000
    held_out = [line["bits"] for line in tt.train.read_log(out) if "bits" in line]
    assert len(held_out) == 6 and min(held_out) == tt.train.load(out)["best"]["value"]


def test_a_resumed_run_ends_with_the_bits_of_an_unbroken_one(text: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(*flags(text, average=0.9), f"--out={whole}")
    process = subprocess.Popen(command(*flags(text, average=0.9), f"--out={broken}"), cwd=ROOT)
    while process.poll() is None and not (broken / "last.safetensors").exists():
        time.sleep(0.01)
    time.sleep(0.3)
    process.kill()
    process.wait()
    run("--resume", broken)
    for which in ("last", "best"):
        a, b = tt.train.load(whole, which), tt.train.load(broken, which)
        assert a["best"] == b["best"] and a["count"] == b["count"]
        assert all(np.array_equal(a["model"][name], b["model"][name]) for name in a["model"])


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_saves_and_says_how_to_go_on(kind: int, text: Path, tmp_path: Path) -> None:
    out = tmp_path / "lm"
    arguments = command(*flags(text, epochs=10_000), f"--out={out}")
    process = subprocess.Popen(arguments, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and not (out / "best.safetensors").exists():
        time.sleep(0.05)
    for _ in range(3):
        process.send_signal(kind)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 1 and "Traceback" not in errors
    assert f"Go on with: python -m models.char_lm --resume {out}" in errors
    assert f"stopped at step {tt.train.load(out, 'last')['count']};" in errors


def test_a_file_size_limit_leaves_the_old_files(text: Path, tmp_path: Path) -> None:
    """A full disk, played by a limit on the size of files."""
    out = tmp_path / "lm"
    run(*flags(text), f"--out={out}")
    before = (out / "last.safetensors").read_bytes()
    program = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096));"
        "from models import char_lm; char_lm.main(sys.argv[1:])"
    )
    arguments = [sys.executable, "-c", program, f"--resume={out}"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "cannot be written" in done.stderr
    assert (out / "last.safetensors").read_bytes() == before and not list(out.glob("*.tmp"))


# ---- writing and scoring --------------------------------------------------------------------------------------------


def test_sampling_depends_on_the_seed_alone(trained: tuple[Path, str], capsys: pytest.CaptureFixture[str]) -> None:
    def written(*more: str) -> str:
        capsys.readouterr()
        run("sample", trained[0], "--prompt", "tape ", "--length", "40", *more)
        return capsys.readouterr().out

    assert written("--seed", "1") == written("--seed", "1") != written("--seed", "2")
    assert written().startswith("tape ") and len(written()) == 46
    greedy = written("--temperature", "0")
    assert greedy == written("--top-k", "1", "--seed", "5") == written("--top-p", "1e-6", "--seed", "7")
    assert written("--prompt", "tape€ ", "--instead", "") == written()


def test_the_score_of_a_file_is_that_of_its_characters(
    trained: tuple[Path, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, content = tmp_path / "text.txt", "tape walk step.\nnode\n" * 9
    path.write_text(content, "utf-8")
    run("score", trained[0], path)
    bits = float(capsys.readouterr().out.split()[0])
    model, vocabulary = char_lm.load(str(trained[0]))
    model.eval()
    tokens = vocabulary.encode(content)[:, None]
    with tt.no_grad():
        chances = tt.log_softmax(model(tokens[:-1])[0], axis=-1).numpy()[:, 0]
    assert bits == pytest.approx(-np.mean(chances[np.arange(len(tokens) - 1), tokens[1:, 0]]) / np.log(2), abs=1e-3)


def test_a_terminal_that_lacks_the_characters(tmp_path: Path) -> None:
    path, out = tmp_path / "text.txt", tmp_path / "lm"
    draw = random.Random(0)
    path.write_text("".join(draw.choice("\U0001f600é\n") for _ in range(16_500)), "utf-8")
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    arguments = command(*flags(path, epochs=1), f"--out={out}")
    done = subprocess.run(arguments, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.count("?") > 100, done.stderr


# ---- the network ----------------------------------------------------------------------------------------------------


def test_tied_weights_are_one_parameter() -> None:
    model = LanguageModel(7, 5, 5, tied=True)
    assert model.head.weight is model.embedding.weight
    with pytest.raises(tt.InputError, match="embedding is 4, hidden is 5"):
        LanguageModel(7, 4, 5, tied=True)


def test_without_dropout_the_layers_are_those_of_a_deep_lstm() -> None:
    model = LanguageModel(7, 4, 5, layers=2, dropout=0.5, weight_drop=0.5).eval()
    deep = tt.nn.LSTM(4, 5, 2)
    for layer, lstm in enumerate(model.layers):
        for name, p in lstm.named_parameters():
            with tt.no_grad():
                getattr(deep, name.replace("_l0", f"_l{layer}")).copy_(p)
    tokens = np.random.default_rng(0).integers(0, 7, (6, 3))
    logits, state = model(tokens)
    y, (_, c) = deep(model.embedding(tokens))
    np.testing.assert_allclose(logits.numpy(), model.head(y).numpy(), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(np.concatenate([c.numpy() for _, c in state]), c.numpy(), rtol=1e-5, atol=1e-6)


def test_dropped_weights_are_drawn_anew_for_each_window_and_only_in_training() -> None:
    model = LanguageModel(7, 4, 5, weight_drop=0.5, generator=tt.Generator(0))
    tokens, kept = np.zeros((3, 2), int), model.layers[0].weight_hh_l0.numpy()
    first, second = (model(tokens)[0].numpy() for _ in range(2))
    assert not np.array_equal(first, second)
    model(tokens)[0].sum().backward()
    gradient = model.layers[0].weight_hh_l0.grad.numpy()
    assert 0.2 < np.mean(gradient == 0) < 0.8  # a dropped weight gets none
    assert np.array_equal(model.layers[0].weight_hh_l0.numpy(), kept)
    model.eval()
    assert np.array_equal(model(tokens)[0].numpy(), model(tokens)[0].numpy())


def test_the_rate_of_the_shakespeare_preset() -> None:
    rate = char_lm.schedule(char_lm.SHAKESPEARE, 400)
    epochs = [rate(400 * epoch) for epoch in range(50)]
    assert epochs[:10] == [2e-3] * 10 and rate(400 * 10 - 1) == 2e-3
    np.testing.assert_allclose(np.array(epochs[10:]) / epochs[9:-1], 0.97, rtol=1e-12)


# ---- what is refused ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "no file"),
        (b"", "is empty"),
        (b"abc\0def" * 500, "is binary"),
        (b"\xff\xfe\xff" * 500, "not UTF-8"),
        (b"too short", "9 characters"),
        (b"a" * 20_000, "all 20,000 characters are 'a'"),
    ],
)
def test_bad_texts(content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    assert words in refused(f"--text={path}", f"--out={tmp_path / 'runs' / 'x'}", capsys=capsys)
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("batch", 0), ("batch", 1_000_000), ("window", 0), ("epochs", -1), ("hidden", -1), ("lr", "nan"), ("lr", "inf"),
        ("dropout", 2), ("clip", 0), ("seed", -1), ("hidden", 1.5), ("tied", 1), ("preset", "none"), ("split", "none"),
        ("temperature", -1), ("temperature", "nan"), ("top-k", 0), ("top-p", 2),
    ],
)  # fmt: skip
def test_bad_options(option: str, value: Any, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    error = refused(*flags(text, **{option: value}), f"--out={tmp_path / 'runs' / 'x'}", capsys=capsys)
    assert error.count("\n") == 2, error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["text.txt", "", "full", "text.txt/lm"])
def test_bad_places_are_refused_before_training(
    name: str, text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("mine")
    (tmp_path / "text.txt").write_bytes(text.read_bytes())
    error = refused(*flags(tmp_path / "text.txt"), f"--out={name and tmp_path / name}", capsys=capsys)
    assert error.startswith("error: --out: ")
    assert (tmp_path / "text.txt").read_bytes() == text.read_bytes()
    assert sorted(os.listdir(tmp_path)) == ["full", "text.txt"]


def test_without_a_name_each_run_gets_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for folder in ("runs/lm", "runs/lm-2", "runs/lm-3"):
        assert char_lm.command.free_folder("--out", None, "runs/lm") == folder
        assert (tmp_path / folder).is_dir()


def test_bad_runs(trained: tuple[Path, str], text: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = trained[0]
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    foreign, damaged, moved = tmp_path / "foreign", tmp_path / "damaged", tmp_path / "moved"
    net = tt.nn.Linear(2, 2)
    with tt.train.Run(foreign, net, tt.optim.SGD(net, lr=0.1), about={"kind": "other"}) as other:
        list(other.steps(1))
    damaged.mkdir()
    (damaged / "last.safetensors").write_bytes(before["last.safetensors"][:1000])
    moved.mkdir()
    tree = tt.io.load_state(out / "last.safetensors")
    tree["about"]["options"]["text"] = str(tmp_path / "other.txt")
    tt.io.save_state(moved / "last.safetensors", tree)
    (tmp_path / "other.txt").write_text(text.read_text("utf-8").replace("tape", "TAPE"), "utf-8")
    cases = [
        (["--resume", tmp_path / "none"], "no such file"),
        (["--resume", ""], "holds no run"),
        (["--resume", tmp_path], "holds no run"),
        (["--resume", foreign], "no run of models.char_lm"),
        (["--resume", damaged], "damaged"),
        (["--resume", moved], "something else"),
        (["--resume", out, "--hidden", "99"], "as it was started"),
        (["--resume", out, "--text", text], "as it was started"),
        (["sample", text], "text.txt"),
        (["sample", out, "--length", "-1"], "--length"),
        (["sample", out, "--prompt", "tape €"], "'€'"),
        (["sample", out, "--prompt", "tape €", "--instead", "¶"], "'¶'"),
        (["score", out, tmp_path / "none"], "no file"),
    ]
    for arguments, words in cases:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and words in error, (arguments, error)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    assert json.loads((out / "log.jsonl").read_text().splitlines()[0])["step"] > 0
