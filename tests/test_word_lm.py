"""The word language model as a user runs it, and its presets against the published recipe."""

from __future__ import annotations

import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tinytape as tt
from models import word_lm

ROOT = Path(__file__).parent.parent
SMALL = {"hidden": 12, "batch": 4, "window": 5, "epochs": 2, "vocabulary": 12}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with three files of sentences, made by the program itself."""
    draw = random.Random(0)
    lines = [
        f"The {draw.choice(['tape', 'gate', 'cell'])} {draw.choice(['walks', 'sees'])}, {i % 7}." for i in range(500)
    ]
    folder = tmp_path_factory.mktemp("words")
    (folder / "text.txt").write_text("\n\n".join(lines), "utf-8")
    run("prepare", folder / "text.txt", folder / "corpus")
    return folder / "corpus"


def run(*arguments: Any) -> None:
    word_lm.main([str(argument) for argument in arguments])


def flags(corpus: Path, **changed: Any) -> list[str]:
    given = SMALL | {name: corpus / f"{name}.txt" for name in word_lm.FILES} | changed
    return [f"--{name}={value}" for name, value in given.items()]


@pytest.fixture(scope="module")
def trained(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run, and what it printed."""
    out = tmp_path_factory.mktemp("runs") / "lm"
    arguments = [sys.executable, "-m", "models.word_lm", *flags(corpus, epochs=4), f"--out={out}"]
    done = subprocess.run(arguments, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return out, done.stdout


def test_prepared_files_are_the_text_in_parts(corpus: Path) -> None:
    parts = [(corpus / f"{name}.txt").read_text("utf-8") for name in word_lm.FILES]
    whole = tt.data.split_words((corpus.parent / "text.txt").read_text("utf-8"))
    assert "".join(parts) == whole
    counts = np.array([len(list(tt.data.words(part.splitlines()))) for part in parts])
    np.testing.assert_allclose(counts / counts.sum(), [0.8, 0.1, 0.1], atol=0.005)


def test_training_learns_and_the_table_has_the_baselines(trained: tuple[Path, str], corpus: Path) -> None:
    out, printed = trained
    rows = re.findall(r"^(uniform|Kneser-Ney 5-gram|LSTM, epoch \d) +([\d.]+) +([\d.]+)$", printed, re.MULTILINE)
    uniform, kneser_ney, lstm, at_the_end = ([float(x) for x in row[1:]] for row in rows)
    assert uniform == [12, 12] and max(lstm) < 8 and max(kneser_ney) < 4 and lstm[0] <= at_the_end[0] * 1.01
    model, vocabulary = word_lm.load(str(out))
    for name, shown in zip(("valid", "test"), lstm, strict=True):
        tokens = vocabulary.encode(tt.data.words(tt.data.read_lines(corpus / f"{name}.txt")))
        assert math.exp(tt.generate.nats(model, tokens)) == pytest.approx(shown, abs=0.006)


def test_the_kneser_ney_model_is_tuned_on_the_validation_text_alone(trained: tuple[Path, str], corpus: Path) -> None:
    """Its perplexity on the test text does not change when more of that is known."""
    lines = {name: (corpus / f"{name}.txt").read_text("utf-8").splitlines() for name in word_lm.FILES}
    vocabulary = word_lm.load(str(trained[0]))[1]
    tokens = {name: vocabulary.encode(tt.data.words(found)) for name, found in lines.items()}
    ngrams = tt.data.Ngrams(tokens["train"], 5, len(vocabulary))
    first = tt.data.Smoothing("modified Kneser-Ney", np.tile([0.5, 1.0, 1.5, 0.5, 0.0], (5, 1)))
    tuned = ngrams.tune(tokens["valid"], first).smoothing
    shown = float(re.search(r"^Kneser-Ney 5-gram +[\d.]+ +([\d.]+)$", trained[1], re.MULTILINE)[1])
    chances = ngrams.probabilities(tokens["test"], tuned)[1:]
    assert math.exp(-np.log(chances).mean()) == pytest.approx(shown, abs=0.006)


def test_a_killed_run_ends_with_the_bits_of_an_unbroken_one(corpus: Path, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(*flags(corpus), f"--out={whole}")
    arguments = [sys.executable, "-m", "models.word_lm", *flags(corpus), f"--out={broken}"]
    process = subprocess.Popen(arguments, cwd=ROOT)
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


def test_samples_and_scores(trained: tuple[Path, str], corpus: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run("sample", trained[0], "--prompt", "the unheard", "--length", "20", "--top-p", "0.9")
    shown = capsys.readouterr().out
    assert shown.startswith("the unheard ") and len(shown.split()) <= 22
    run("score", trained[0], corpus / "test.txt")
    found = re.fullmatch(r"perplexity ([\d.]+) on ([\d,]+) words, [\d.]+% of them unknown\n", capsys.readouterr().out)
    assert found and re.search(rf"LSTM, epoch \d +[\d.]+ +{re.escape(found[1])}$", trained[1], re.MULTILINE)


# ---- the recipe -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("preset", "parameters", "kept", "decay", "epochs"),
    [("small", 4_653_200, 5, 2.0, 13), ("medium", 19_780_400, 7, 1.2, 39), ("large", 66_034_000, 15, 1.15, 55)],
)
def test_presets(preset: str, parameters: int, kept: int, decay: float, epochs: int) -> None:
    """Sizes with 10,000 words; an LSTM of two biases, as in the authors' code, has 8 hidden more a layer than one."""
    options = word_lm.SHARED | word_lm.PRESETS[preset]
    hidden, words = options["hidden"], options["vocabulary"]
    assert 2 * words * hidden + words + 2 * (8 * hidden**2 + 8 * hidden) == parameters
    rates = [word_lm.rate(options, step, 100) for step in range(100 * epochs)]
    assert epochs == options["epochs"] and rates[: 100 * kept] == [1.0] * 100 * kept
    np.testing.assert_allclose(rates[100 * kept :: 100], decay ** -np.arange(1.0, epochs - kept + 1), rtol=1e-12)


def test_all_weights_start_uniform() -> None:
    model = word_lm.build(word_lm.SHARED | word_lm.PRESETS["small"] | {"hidden": 30}, 50)
    for name, p in model.named_parameters():
        values = p.numpy()
        assert abs(values).max() <= 0.1 and (values.size < 100 or abs(values).max() > 0.09), name
    assert abs(np.mean([p.numpy().mean() for p in model.parameters()])) < 0.01  # no bias of the forget gate


# ---- what is refused ------------------------------------------------------------------------------------------------


def test_bad_input(trained: tuple[Path, str], corpus: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty.txt").write_text("")
    (tmp_path / "short.txt").write_text("a b")
    (tmp_path / "blank.txt").write_text(" \n" * 1000)
    (tmp_path / "line.txt").write_text("a b " * 1000)
    (tmp_path / "one.txt").write_text("a a a\n" * 1000)
    before = {path.name: path.read_bytes() for path in corpus.iterdir()}
    out = f"--out={tmp_path / 'out'}"
    cases = [
        ([f"--train={corpus / 'train.txt'}", out], "not all are given"),
        ([*flags(corpus, valid=tmp_path / "none"), out], "no file"),
        ([*flags(corpus, train=tmp_path / "empty.txt"), out], "words: got 0"),
        ([*flags(corpus, test=tmp_path / "short.txt"), out], "--test: 3 words"),
        ([*flags(corpus, train=tmp_path / "one.txt"), out], "--train: it has but one word"),
        ([*flags(corpus, dropout=2), out], "Dropout: p is 2"),
        ([*flags(corpus, preset="tiny"), out], "--preset"),
        ([*flags(corpus, vocabulary=1), out], "--vocabulary"),
        ([*flags(corpus), f"--out={corpus}"], "not empty"),
        (["--resume", trained[0], "--hidden", "9"], "as it was started"),
        (["--resume", tmp_path / "none"], "no such file"),
        (["prepare", corpus / "train.txt", corpus], "not empty"),
        (["prepare", tmp_path / "short.txt", tmp_path / "new"], "3 characters"),
        (["prepare", tmp_path / "blank.txt", tmp_path / "new"], "0 lines with words"),
        (["prepare", tmp_path / "line.txt", tmp_path / "new"], "1 lines with words"),
        (["score", trained[0], tmp_path / "empty.txt"], "0 words"),
        (["score", trained[0], tmp_path / "none"], "no file"),
        (["sample", corpus], "holds no run"),
    ]
    for arguments, words in cases:
        capsys.readouterr()
        with pytest.raises(SystemExit) as stopped:
            run(*arguments)
        error = capsys.readouterr().err
        assert stopped.value.code == 2 and words in error, (arguments, error)
    assert {path.name: path.read_bytes() for path in corpus.iterdir()} == before
    assert not (tmp_path / "out").exists() and not (tmp_path / "new").exists()
