"""Holding out part of a text so that what is measured on it is not memory."""

from __future__ import annotations

import re
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError

__all__ = ["HeldOut", "split_held_out"]


class HeldOut(NamedTuple):
    """What `split_held_out` returns."""

    train: str
    held_out: str
    removed: int
    """Characters that are in neither text: set aside, and found to repeat the training text."""


def split_held_out(text: str, every: int = 8, block: int = 2000, span: int = 40) -> HeldOut:
    """Set aside part of a text, less the paragraphs that repeat the rest.

    The text is cut between paragraphs into blocks, and one block of each `every` is set aside, so that this part
    is spread over the whole text and the same whenever the text is. Manuals, mail and collected works repeat
    themselves, and a model that has learnt a passage by heart should not score by it: a paragraph set aside is
    removed if

    - `span` or more characters in a row, most of them in this paragraph, occur anywhere in the training text, or
    - the whole paragraph, however short, is a paragraph of the training text.

    For the comparison a run of white space is one space, so that a passage that was only wrapped or indented
    differently is found too. What is left shares no `span` characters with the training text, not even across
    the places where paragraphs were taken out.

    Parameters
    ----------
    text : str
        The text. A paragraph ends at an empty line; one longer than `block` is cut at a line end or a space.
    every : int, default 8
        One block of this many is set aside: 8 sets aside an eighth.
    block : int, default 2000
        Length of a block, in characters. A paragraph belongs to the block in which it ends.
    span : int, default 40
        Shortest repetition that counts, in characters. About half a line of print.

    Returns
    -------
    HeldOut
        The named tuple (train, held_out, removed); the three lengths add up to that of `text`.

    Raises
    ------
    InputError
        If an argument is too small, the text has fewer than `every` blocks, or all that is set aside repeats.
    """
    for name, value, least in (("every", every, 2), ("block", block, 1), ("span", span, 1)):
        if value < least:
            raise InputError(f"{name}: got {value}, at least {least} is needed", "the default suits most texts")
    if len(text) < every * block:
        raise InputError(
            f"text: got {len(text)} characters, {every} blocks of {block} need at least {every * block}",
            "give a longer text, or a smaller block",
        )
    paragraphs = _paragraphs(text, block)
    ends = np.cumsum([len(p) for p in paragraphs])
    number = (ends - 1) // block
    aside = (number % every == every // 2).tolist()
    train = "".join([p for p, a in zip(paragraphs, aside, strict=True) if not a])
    candidates = [p for p, a in zip(paragraphs, aside, strict=True) if a]
    held_out = "".join(_without_repeats(candidates, train, block, span))
    if not held_out.strip():
        total = sum(len(p) for p in candidates)
        raise InputError(
            f"text: all {total} characters set aside repeat the training text over {span} or more",
            "give a text that repeats itself less, or a larger span",
        )
    return HeldOut(train, held_out, len(text) - len(train) - len(held_out))


def _paragraphs(text: str, limit: int) -> list[str]:
    """Cut a text after its empty lines, and where that leaves more than `limit`, at a line end or a space."""
    pieces: list[str] = []
    start = 0
    for end in [m.end() for m in re.finditer(r"\n(?:[^\S\n]*\n)+", text)] + [len(text)]:
        while start < end:
            stop = start + limit
            if stop < end:
                stop = text.rfind("\n", start, stop) + 1 or text.rfind(" ", start, stop) + 1 or stop
            pieces.append(text[start : min(stop, end)])
            start = min(stop, end)
    return pieces


def _without_repeats(paragraphs: list[str], train: str, limit: int, span: int) -> list[str]:
    known = {" ".join(p.split()) for p in _paragraphs(train, limit)}
    seen = np.unique(_span_hashes(_collapse(train)[0], span))
    kept = [p for p in paragraphs if " ".join(p.split()) not in known]
    while True:  # taking paragraphs out makes new neighbours, which together may repeat something again
        codes, positions = _collapse("".join(kept))
        repeats = np.flatnonzero(np.isin(_span_hashes(codes, span), seen))
        if not repeats.size:
            return kept
        # A repetition that runs over two paragraphs is laid to the one that holds its middle.
        ends = np.cumsum([len(p) for p in kept])
        guilty = set(np.searchsorted(ends, positions[repeats + span // 2], side="right").tolist())
        kept = [p for i, p in enumerate(kept) if i not in guilty]


def _collapse(text: str) -> tuple[npt.NDArray[np.uint32], npt.NDArray[np.int64]]:
    """Make each run of white space one space. Gives the code points, and where in `text` each stands."""
    spaced = re.sub(r"\s", " ", text)
    codes = np.frombuffer(spaced.encode("utf-32-le", "surrogatepass"), "<u4").astype(np.uint32)
    space = codes == 32
    positions = np.flatnonzero(~(space & np.roll(space, 1)))
    return codes[positions], positions


def _span_hashes(codes: npt.NDArray[np.uint32], span: int) -> npt.NDArray[np.uint64]:
    """Hash every run of `span` codes to 64 bits, all starts at once, by doubling.

    hash(a followed by b) = hash(a) * base ** len(b) + hash(b), modulo 2 ** 64. Should two different runs ever
    share a hash, a paragraph is removed for nothing; a repetition is never missed.
    """
    if len(codes) < span:
        return np.zeros(0, np.uint64)
    base = 0x9E3779B97F4A7C15
    result, done = np.zeros(len(codes), np.uint64), 0  # of runs of `done` codes
    power, width = codes.astype(np.uint64), 1  # of runs of `width` codes, a power of two
    while True:
        factor = np.uint64(base**width % 2**64)
        if span & width:
            size = len(power) - done
            result, done = result[:size] * factor + power[done:], done + width
        if 2 * width > span:
            return result
        power, width = power[:-width] * factor + power[width:], 2 * width
