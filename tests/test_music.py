"""models/music: files, baselines against their definitions, learning, resuming, bad input."""

import hashlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import tinytape as tt
from models import chorales, music

ROOT = Path(__file__).resolve().parent.parent
SMALL = ["--networks", "gru", "--hidden=4", "--epochs=1", "--batch=100"]


def pieces(count: int, seed: int) -> list[np.ndarray]:
    return chorales.invented(count, tt.Generator(seed))


def data(count: int = 6) -> dict[str, list[np.ndarray]]:
    return {part: pieces(count, i) for i, part in enumerate(chorales.PARTS)}


def as_json(path: Path, found: dict[str, list[np.ndarray]]) -> Path:
    def frames(piece: np.ndarray) -> list[list[int]]:
        return [(np.flatnonzero(frame) + chorales.LOWEST).tolist() for frame in piece]

    path.write_text(json.dumps({part: [frames(piece) for piece in found[part]] for part in found}), "utf-8")
    return path


def test_pieces_are_made_up_as_described() -> None:
    for piece in pieces(50, 0):
        assert piece.shape[1] == 88 and piece.dtype == np.float32 and set(np.unique(piece)) == {0, 1}
        assert (piece.sum(1) == 4).all() and 12 <= len(piece) <= 29 * 3
    assert all((a == b).all() for a, b in zip(pieces(5, 1), pieces(5, 1), strict=True))


def test_json_and_mat_say_the_same(tmp_path: Path) -> None:
    found = data()
    sources = [as_json(tmp_path / "a.json", found)]
    scipy_io = pytest.importorskip("scipy.io")
    cells = {f"{part}data": np.empty((1, len(found[part])), object) for part in found}
    for part in found:
        cells[f"{part}data"][0] = [piece.astype(np.uint8) for piece in found[part]]
    scipy_io.savemat(tmp_path / "a.mat", cells)
    sources.append(tmp_path / "a.mat")
    for path in sources:
        again = chorales.read(str(path))
        for part in chorales.PARTS:
            assert all((a == b).all() for a, b in zip(again[part], found[part], strict=True))
            assert all(piece.dtype == np.float32 for piece in again[part])


def test_the_baselines_are_what_their_counts_say() -> None:
    found = data(3)
    rows = music.baselines(found)
    alone = given = 0.0
    for key in range(88):
        pairs = [(p[t, key], p[t + 1, key]) for p in found["train"] for t in range(len(p) - 1)]
        counts = {(a, b): sum(pair == (a, b) for pair in pairs) for a in (0, 1) for b in (0, 1)}
        for piece in found["test"]:
            for a, b in zip(piece[:-1, key], piece[1:, key], strict=True):
                alone -= math.log((counts[0, b] + counts[1, b] + 0.5) / (len(pairs) + 1))
                given -= math.log((counts[a, b] + 0.5) / (counts[a, 0] + counts[a, 1] + 1))
    frames = sum(len(piece) - 1 for piece in found["test"])
    assert rows["each key by itself"]["test"] == pytest.approx(alone / frames, rel=1e-6)
    assert rows["each key given itself"]["test"] == pytest.approx(given / frames, rel=1e-6)


def test_the_score_is_that_of_pieces_read_one_by_one() -> None:
    found = pieces(5, 3)
    model = music.Music("lstm", 6, music.parse([]), tt.Generator(0)).eval()
    total = 0.0
    for piece in found:
        with tt.no_grad():
            logits = model(piece[:-1, None], np.array([len(piece) - 1])).numpy()[:, 0].astype(np.float64)
        total += (np.logaddexp(0, logits) - piece[1:] * logits).sum()
    assert music.score(model, found) == pytest.approx(total / sum(len(p) - 1 for p in found), rel=1e-5)


def test_about_20_000_parameters() -> None:
    for network, hidden in music.HIDDEN.items():
        model = music.Music(network, hidden, music.parse([]), tt.Generator(0))
        assert 20_000 < sum(p.size for p in model.parameters()) < 23_000


def test_it_learns_more_than_the_baselines(tmp_path: Path) -> None:
    found = {part: pieces(count, i) for i, (part, count) in enumerate(zip(chorales.PARTS, (60, 20, 20), strict=True))}
    options = music.parse(["--epochs=20", "--batch=4", "--dropout=0", "--dropout-in=0", f"--out={tmp_path}"])
    model, _ = music.train("gru", found, options, "")
    assert music.score(model, found["test"]) < 0.95 * music.baselines(found)["each key given itself"]["test"]


def test_the_table_and_the_same_command_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = as_json(tmp_path / "a.json", data())
    command = [*SMALL, f"--data={path}", f"--out={tmp_path / 'runs'}"]
    music.main(command)
    first = capsys.readouterr().out
    assert "each key given itself" in first and "GRU 4" in first and "8.54" in first
    assert (tmp_path / "runs" / "music.png").stat().st_size > 10_000
    music.main(command)
    assert capsys.readouterr().out == first


def test_a_test_piece_of_silence_is_drawn(tmp_path: Path) -> None:
    found = data() | {"test": [np.zeros((3, chorales.KEYS), np.float32)]}
    music.main([*SMALL, f"--data={as_json(tmp_path / 'a.json', found)}", f"--out={tmp_path / 'runs'}"])
    assert (tmp_path / "runs" / "music.png").exists()


def test_killed_and_started_again_it_ends_with_the_same_bits(tmp_path: Path) -> None:
    def command(folder: Path) -> list[str]:
        flags = ["--networks=gru", "--hidden=8", "--epochs=10", "--batch=50", f"--out={folder}"]
        return [sys.executable, "-m", "models.music", *flags]

    def bits(folder: Path) -> str:
        return hashlib.sha256((folder / "gru" / "best.safetensors").read_bytes()).hexdigest()

    whole, broken = tmp_path / "whole", tmp_path / "broken"
    done = subprocess.run(command(whole), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    process = subprocess.Popen(command(broken), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not (broken / "gru" / "best.safetensors").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = subprocess.run(command(broken), cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert bits(whole) == bits(broken)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("none.json", None, "No such file"),
        ("a.json", b"{", "cannot be read"),
        ("a.json", b"[]", "cannot be read"),
        ("a.json", b"\xff\xfe", "cannot be read"),
        ("a.json", b'{"train": [[[60]]], "valid": [], "test": []}', "train has"),
        ("a.json", b'{"train": [[[60], [60]]], "valid": [], "test": []}', "no pieces"),
        ("a.json", b'{"train": [[["c"], [60]]], "valid": [], "test": []}', "cannot be read"),
        ("a.json", b'{"train": [[[60], [200]]], "valid": [], "test": []}', "not on the keyboard"),
        ("a.mat", b"no matrix", "cannot be read"),
        ("a.mat", b"", "cannot be read"),
    ],
)
def test_bad_files(
    name: str, content: bytes | None, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if name.endswith("mat"):
        pytest.importorskip("scipy")
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(SystemExit) as stopped:
        music.main([*SMALL, f"--data={tmp_path / name}", f"--out={tmp_path / 'runs'}"])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and words in error, error
    assert not (tmp_path / "runs").exists()


def test_missing_scipy_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(tt.InputError, match="SciPy"):
        chorales.read(str(tmp_path / "a.mat"))


def test_other_data_does_not_overwrite_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = f"--out={tmp_path / 'runs'}"
    music.main([*SMALL, f"--data={as_json(tmp_path / 'a.json', data())}", out])
    before = (tmp_path / "runs" / "gru" / "last.safetensors").read_bytes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        music.main([*SMALL, f"--data={as_json(tmp_path / 'b.json', data(7))}", out])
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and "error: " in error, error
    assert (tmp_path / "runs" / "gru" / "last.safetensors").read_bytes() == before


@pytest.mark.slow
def test_chorales_of_bach(tmp_path: Path) -> None:
    """About what torch was measured at with a network of this size, 8.58, or better."""
    pytest.importorskip("scipy")
    path = Path(os.environ.get("TINYTAPE_DATA", "")) / "jsb" / "JSB_Chorales.mat"
    if "TINYTAPE_DATA" not in os.environ or not path.exists():
        pytest.skip("TINYTAPE_DATA names no folder with jsb/JSB_Chorales.mat")
    found = chorales.read(str(path))
    rows = music.baselines(found)
    assert rows["each key by itself"]["test"] == pytest.approx(11.09, abs=0.005)
    assert rows["each key given itself"]["test"] == pytest.approx(10.49, abs=0.005)
    for network in music.HIDDEN:
        model, _ = music.train(network, found, music.parse([f"--out={tmp_path}"]), "")
        assert music.score(model, found["test"]) <= 8.6
