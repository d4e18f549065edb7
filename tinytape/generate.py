"""Language models at work: scoring a text, and writing one.

A model here is any callable ``model(tokens, state) -> (logits, state)`` with tokens (T, B), logits (T, B, V), and None
for the state at the start. Nothing is recorded, and a `Module` is put into eval mode meanwhile.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from .data.text import streams, windows
from .engine.errors import InputError
from .nn.functional import cross_entropy
from .nn.module import evaluating
from .random import Generator as Random
from .random import default_generator

__all__ = ["distribution", "nats", "sample"]

Model = Callable[[Any, Any], tuple[Any, Any]]
Integers = npt.NDArray[np.integer]
Floats = npt.NDArray[np.float64]


def nats(model: Model, tokens: Integers, batch_size: int = 1, window: int = 128) -> float:
    """The mean of -log p over a text: ``exp`` of it is the perplexity, divided by log 2 it is bits.

    Parameters
    ----------
    model : callable
        See the module.
    tokens : integer array of shape (n,)
    batch_size : int
        Streams that the text is cut into, each read from the state at the start. One, the default, is exact; many are
        faster, and a little worse.
    window : int
        Steps at a time: a matter of memory only.

    Returns
    -------
    float
        In nats a token. The first token of each stream is not scored.

    Raises
    ------
    InputError
        If there are fewer than two tokens in a stream.
    """
    total, count, state = 0.0, 0, None
    with evaluating(model):
        for inputs, targets in windows(streams(tokens, batch_size), window):
            logits, state = model(inputs, state)
            total += cross_entropy(logits, targets, reduction="sum").item()
            count += targets.size
    return total / count


def distribution(
    logits: npt.ArrayLike, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Floats:
    """The chances that a token is drawn with.

    Parameters
    ----------
    logits : array_like of shape (V,)
    temperature : float
        The logits are divided by it: below 1 is more careful, above 1 more surprising; at 0 the likeliest token has
        all. Default 1.
    top_k : int, optional
        Only the `top_k` likeliest, 1 or more.
    top_p : float, optional
        Only the likeliest that together have this chance, in (0, 1]; at least one (nucleus sampling, Holtzman et al.
        2020). It is measured among what `top_k` leaves, at the temperature given.

    Returns
    -------
    float64 array of shape (V,)
        Sums to 1. Of equal logits those with the lower number are kept first.

    Raises
    ------
    InputError
        If an option is out of its range, or logits are NaN, or the largest is infinite; -infinity is a chance of 0.
    """
    _check(temperature, top_k, top_p)
    scores = np.array(logits, np.float64)
    if not math.isfinite(scores.max()):  # NaN is the maximum of whatever holds it
        raise InputError("logits: no chances come of NaN or infinity", "are the model's weights finite?")
    order = np.argsort(-scores, kind="stable")
    if temperature == 0:
        top_k = 1
    chances = np.exp((scores[order] - scores[order[0]]) / (temperature or 1.0))[:top_k]
    chances /= chances.sum()
    if top_p is not None:
        before = np.cumsum(chances) - chances
        chances = chances[: max(1, int(np.sum(before < top_p)))]
        chances /= chances.sum()
    found = np.zeros(len(scores))
    found[order[: len(chances)]] = chances
    return found


def sample(
    model: Model,
    prompt: Integers,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    generator: Random | None = None,
) -> Iterator[int]:
    """Tokens that go on from a prompt, without end: each is drawn from what the model says after those before it.

    Parameters
    ----------
    model : callable
        See the module.
    prompt : integer array of shape (n,)
        At least one token.
    temperature, top_k, top_p
        As for `distribution`.
    generator : Generator, optional
        What draws. Default: `tt.default_generator`.

    Raises
    ------
    InputError
        If the prompt is empty, or an option is out of its range.

    Examples
    --------
    >>> tokens = tt.generate.sample(model, vocabulary.encode("The "), top_p=0.9)
    >>> "".join(vocabulary.decode([token]) for token in itertools.islice(tokens, 200))
    """
    _check(temperature, top_k, top_p)
    if not len(prompt):
        raise InputError("prompt: got 0 tokens, at least 1 is needed", "start with a newline, or with <eos>")
    return _drawn(model, np.asarray(prompt), temperature, top_k, top_p, generator or default_generator)


def _drawn(
    model: Model, tokens: Integers, temperature: float, top_k: int | None, top_p: float | None, generator: Random
) -> Iterator[int]:
    state: Any = None
    while True:
        with evaluating(model):
            logits, state = model(tokens[:, None], state)
        edges = np.cumsum(distribution(logits.numpy()[-1, 0], temperature, top_k, top_p))
        drawn = float(generator.uniform(dtype=np.float64)) * edges[-1]
        token = int(cast(Any, np.searchsorted(edges, drawn, side="right")))
        tokens = np.array([token])
        yield token


def _check(temperature: float, top_k: int | None, top_p: float | None) -> None:
    if not 0 <= temperature < math.inf:
        raise InputError(f"temperature: got {temperature}, 0 or more is needed", "0.7 to 1 is usual")
    if top_k is not None and top_k < 1:
        raise InputError(f"top_k: got {top_k}, at least 1 is needed", "1 is greedy")
    if top_p is not None and not 0 < top_p <= 1:
        raise InputError(f"top_p: got {top_p}, between 0 and 1 is needed", "0.9 is usual")
