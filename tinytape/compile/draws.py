"""Random numbers that are not tinytape's: a trace would see them once."""

from __future__ import annotations

import pickle
import random
from collections.abc import Generator, Iterable
from contextlib import contextmanager
from typing import Any

import numpy as np

__all__ = ["is_a_generator", "put_back"]


def is_a_generator(x: Any) -> bool:
    """Whether it draws, and can be put back to what it was."""
    return isinstance(x, np.random.Generator | np.random.RandomState | random.Random)


def _state(x: Any) -> Any:
    if isinstance(x, np.random.Generator):
        return x.bit_generator.state
    return x.getstate() if hasattr(x, "getstate") else x.get_state(legacy=False)


def _set_state(x: Any, state: Any) -> None:
    if isinstance(x, np.random.Generator):
        x.bit_generator.state = state
    else:
        (x.setstate if hasattr(x, "setstate") else x.set_state)(state)


@contextmanager
def put_back(generators: Iterable[Any]) -> Generator[list[Any]]:
    """Put generators back at the end, with the global ones of NumPy and Python; give those that were drawn from."""
    drawn: list[Any] = []
    before = [(x, _state(x)) for x in (np.random, random, *generators)]
    pickled = [pickle.dumps(state) for _, state in before]
    try:
        yield drawn
    finally:
        for (x, state), was in zip(before, pickled, strict=True):
            if pickle.dumps(_state(x)) != was:
                drawn.append(x)
                _set_state(x, state)
