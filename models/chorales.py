"""Pieces for `models.music`, read from a file or made up, and how well they are guessed without a network.

A file is .mat with traindata, validdata and testdata (cells of frames by 88 keys; needs SciPy), or .json with train,
valid and test: lists of pieces, a piece a list of frames, a frame the list of its MIDI pitches, 21 to 108.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

import tinytape as tt

KEYS, LOWEST = 88, 21  # a piano's, and the MIDI pitch of the first
PARTS = ("train", "valid", "test")
Piece = np.ndarray  # (frames, 88), 1 where a key sounds


def read(path: str) -> dict[str, list[Piece]]:
    """The pieces of a file, for training, choosing and testing."""
    try:
        found = read_json(path) if Path(path).suffix == ".json" else read_mat(path)
    except OSError as error:
        advice = "give the path of a .mat or .json file, or none for pieces made up by the program."
        raise tt.InputError(f"--data: {path} cannot be read ({error.strerror}).", advice) from None
    for part, pieces in found.items():
        for i, piece in enumerate(pieces):
            if piece.ndim != 2 or piece.shape[1] != KEYS or len(piece) < 2 or not np.isin(piece, (0, 1)).all():
                raise tt.InputError(
                    f"--data: piece {i} of {part} has shape {piece.shape}, or numbers that are not 0 or 1.",
                    f"pieces are (frames, {KEYS}), of 2 frames or more.",
                )
        if not pieces:
            raise tt.InputError(f"--data: {path} has no pieces to {part}.", "give a file with all three parts.")
    return {part: [piece.astype(np.float32) for piece in pieces] for part, pieces in found.items()}


def read_mat(path: str) -> dict[str, list[Piece]]:
    try:
        from scipy.io import loadmat
    except ImportError:
        raise tt.InputError("--data: SciPy is missing.", "pip install scipy, or give a .json file.") from None
    with open(path, "rb") as file:
        try:
            tree = loadmat(file)
            return {part: [np.asarray(piece) for piece in tree[f"{part}data"].ravel()] for part in PARTS}
        except Exception as error:  # of a damaged file SciPy raises whatever it stumbles over
            advice = "it is to be a .mat file of version 5 with traindata, validdata and testdata, or a .json file."
            raise tt.InputError(f"--data: {path} cannot be read ({error}).", advice) from None


def read_json(path: str) -> dict[str, list[Piece]]:
    try:
        tree = json.loads(Path(path).read_text("utf-8"))
        return {part: [roll(piece) for piece in tree[part]] for part in PARTS}
    except (ValueError, TypeError, KeyError, IndexError) as error:
        advice = "it is to have train, valid and test: lists of pieces, which are lists of frames of MIDI pitches."
        raise tt.InputError(f"--data: {path} cannot be read ({error!r}).", advice) from None


def roll(frames: Sequence[Sequence[int]]) -> Piece:
    """A piece as ones and zeros. Pitches below 0 stand for a voice that is silent."""
    found = np.zeros((len(frames), KEYS), np.uint8)
    for t, frame in enumerate(frames):
        keys = [int(pitch) - LOWEST for pitch in frame if pitch >= 0]
        if any(not 0 <= key < KEYS for key in keys):
            raise ValueError(f"a pitch of frame {t} is not on the keyboard")
        found[t, keys] = 1
    return found


CHORDS = {0: (3, 4, 5, 1), 1: (4,), 3: (0, 4, 1), 4: (0, 5, 0), 5: (3, 1)}  # degrees, and what may follow each
SCALE = np.array([0, 2, 4, 5, 7, 9, 11])


def invented(count: int, generator: tt.Generator) -> list[Piece]:
    """Pieces in a key of their own: chords that follow a rule, the bass on the root, the other voices moving little."""
    pieces = []
    for _ in range(count):
        tonic, chord, frames = 48 + int(generator.integers(-5, 6)), 0, []
        home = tonic + np.array([0, 7, 12, 16])
        voices = home
        for _ in range(int(generator.integers(12, 30))):
            tones = tonic + SCALE[[chord % 7, (chord + 2) % 7, (chord + 4) % 7]]
            near, chosen = np.concatenate([tones + octave for octave in (0, 12, 24)]), [tones[0]]
            for wish in (0.7 * voices + 0.3 * home)[1:] + generator.uniform((3,), -1.0, 1.0):
                above = near[near > chosen[-1]]
                chosen.append(above[np.abs(above - wish).argmin()])
            voices = np.array(chosen)
            frames += [voices] * int(generator.integers(1, 4))
            chord = CHORDS[chord][int(generator.integers(0, len(CHORDS[chord])))]
        pieces.append(roll(frames).astype(np.float32))
    return pieces


# ---- what needs no network ------------------------------------------------------------------------------------------


def baselines(data: dict[str, list[Piece]]) -> dict[str, dict[str, float]]:
    """Each key by itself: how often it sounds, and how often after a frame with or without it."""
    before = np.concatenate([piece[:-1] for piece in data["train"]])
    after = np.concatenate([piece[1:] for piece in data["train"]])

    def chance(counted: np.ndarray) -> np.ndarray:
        return ((after * counted).sum(0) + 0.5) / (counted.sum(0) + 1.0)

    always, on, off = chance(np.ones_like(after)), chance(before), chance(1 - before)
    return {
        "each key by itself": {p: nats(data[p], lambda x: np.broadcast_to(always, x.shape)) for p in PARTS},
        "each key given itself": {p: nats(data[p], lambda x: np.where(x == 1, on, off)) for p in PARTS},
    }


def nats(pieces: list[Piece], chance: Any) -> float:
    """Minus the log-likelihood a frame, of frames 2 to the last, given chances of each key from the frame before."""
    total = 0.0
    for piece in pieces:
        p = chance(piece[:-1])
        total -= np.log(np.where(piece[1:] == 1, p, 1 - p)).sum()
    return total / sum(len(piece) - 1 for piece in pieces)
