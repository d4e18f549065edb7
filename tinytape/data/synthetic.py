"""Problems with a known lag, drawn at random: what a recurrent network can learn from is only how far back it looks.

Every function draws from the generator that it is given, so equal seeds give equal data, and lays time first.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError

if TYPE_CHECKING:
    from ..random import Generator

__all__ = ["REBER_SYMBOLS", "adding", "copy_memory", "reber", "reber_allowed", "temporal_order"]

Floats = npt.NDArray[np.float32]
Integers = npt.NDArray[np.int64]
Flags = npt.NDArray[np.bool_]


def adding(count: int, steps: int, generator: Generator) -> tuple[Floats, Floats]:
    """Draw adding problems: two numbers of a long sequence are marked, their sum is asked for at the end.

    The form of Le, Jaitly and Hinton 2015 (arXiv:1504.00941), after Hochreiter and Schmidhuber 1997: numbers are
    uniform in [0, 1], one mark is in the first half of the steps and one in the second. Always to say 1, the mean, has
    a mean squared error of 1/6.

    Parameters
    ----------
    count : int
        Sequences, B.
    steps : int
        Steps of each, T; at least 2.
    generator : Generator

    Returns
    -------
    x : float32 array of shape (T, B, 2)
        The numbers, and 1 where a number is marked, else 0.
    y : float32 array of shape (B, 1)

    Raises
    ------
    InputError
        If `count` or `steps` is too small.
    """
    _check("adding", count, steps, 2)
    x = np.zeros((steps, count, 2), np.float32)
    x[..., 0] = generator.uniform((steps, count), dtype=np.float32)
    rows = np.arange(count)
    first, second = (generator.integers(*half, (count,)) for half in ((0, steps // 2), (steps // 2, steps)))
    x[first, rows, 1] = x[second, rows, 1] = 1
    return x, (x[first, rows, :1] + x[second, rows, :1])


def copy_memory(
    count: int, steps: int, generator: Generator, symbols: int = 8, length: int = 10
) -> tuple[Integers, Integers]:
    """Draw copy problems: symbols are shown, and are to be repeated after a pause.

    The form of Arjovsky, Shah and Bengio 2016 (arXiv:1511.06464), after Hochreiter and Schmidhuber 1997. The input is
    `length` symbols out of 0 to ``symbols - 1``, then blanks (the number `symbols`) with the sign to begin
    (``symbols + 1``) as the last of `steps`, then `length` blanks more. The target is blank until the sign is over,
    and then the symbols. To know the time and guess the symbols has a cross-entropy of ``length · ln(symbols) /
    (steps + 2 · length)`` nats a step.

    Parameters
    ----------
    count : int
        Sequences, B.
    steps : int
        Steps between the last symbol and the first answer, T; at least 1.
    generator : Generator
    symbols : int
        How many kinds of symbols there are. Default 8.
    length : int
        How many symbols are to be remembered. Default 10.

    Returns
    -------
    x, y : int64 arrays of shape (T + 2 length, B)
        There are ``symbols + 2`` kinds of inputs, and ``symbols + 1`` kinds of targets.

    Raises
    ------
    InputError
        If a number is below 1.
    """
    _check("copy_memory", count, steps, 1)
    if symbols < 1 or length < 1:
        raise InputError(f"copy_memory: symbols = {symbols}, length = {length}.", "both are 1 or more.")
    shown = generator.integers(0, symbols, (length, count))
    x = np.full((steps + 2 * length, count), symbols, np.int64)
    y = x.copy()
    x[:length] = y[-length:] = shown
    x[length + steps - 1] = symbols + 1
    return x, y


def temporal_order(count: int, steps: int, generator: Generator) -> tuple[Integers, Integers]:
    """Draw temporal order problems: which of two symbols came, early and then halfway, is asked for at the end.

    The form of Pascanu, Mikolov and Bengio 2013 (arXiv:1211.5063), after Hochreiter and Schmidhuber 1997: symbols 0
    and 1 matter, 2 to 5 do not. One of the former is at a random place in [T/10, 2T/10], one in [4T/10, 5T/10].

    Parameters
    ----------
    count : int
        Sequences, B.
    steps : int
        Steps of each, T; at least 5.
    generator : Generator

    Returns
    -------
    x : int64 array of shape (T, B)
        Symbols 0 to 5.
    y : int64 array of shape (B,)
        The class, twice the early symbol plus the late one: 0 to 3.

    Raises
    ------
    InputError
        If `count` or `steps` is too small.
    """
    _check("temporal_order", count, steps, 5)
    x = generator.integers(2, 6, (steps, count))
    early, late = generator.integers(0, 2, (2, count))
    rows = np.arange(count)
    for symbols, tenth in ((early, 1), (late, 4)):
        first, last = tenth * steps // 10, (tenth + 1) * steps // 10
        x[generator.integers(first, last + 1, (count,)), rows] = symbols
    return x, 2 * early + late


# ---- Reber's grammar ------------------------------------------------------------------------------------------------

REBER_SYMBOLS = "BTPSXVE"
"""The symbols of Reber's grammar, in the order in which `reber` numbers them."""

Graph = tuple[dict[str, int], ...]
"""For each state the symbols that may come, and the state that each leads to; nothing may come in the last state."""

_PLAIN: Graph = (
    {"B": 1},
    {"T": 2, "P": 3},
    {"S": 2, "X": 4},
    {"T": 3, "V": 5},
    {"X": 3, "S": 6},
    {"P": 4, "V": 6},
    {"E": 7},
    {},
)


def _embedded() -> Graph:
    """B, then T or P, a whole string of the plain grammar, the same T or P again, and E.

    There are two copies of the plain grammar: the state says which of the two symbols is to be repeated.
    """
    size = len(_PLAIN)
    starts, last = {"T": 2, "P": 2 + size}, 2 + 2 * size
    copies: list[dict[str, int]] = []
    for symbol, start in starts.items():
        copy = [{s: start + target for s, target in ways.items()} for ways in _PLAIN]
        copy[-1] = {symbol: last}
        copies += copy
    return ({"B": 1}, starts, *copies, {"E": last + 1}, {})


_GRAPHS: dict[bool, Graph] = {False: _PLAIN, True: _embedded()}


def reber(count: int, generator: Generator, embedded: bool = False) -> list[Integers]:
    """Draw strings of Reber's grammar, or of the embedded one, whose second symbol comes again as the last but one.

    Reber 1967; embedded: Smith and Zipser 1989, Hochreiter and Schmidhuber 1997. Where two symbols may come, each has
    probability 1/2. A string of the plain grammar has 5 symbols at least, of the embedded one 9.

    Parameters
    ----------
    count : int
    generator : Generator
    embedded : bool
        Default False.

    Returns
    -------
    list of int64 arrays of unequal lengths
        Numbers of symbols in `REBER_SYMBOLS`. `pad_sequences` makes a batch of them.

    Raises
    ------
    InputError
        If `count` is below 1.
    """
    _check("reber", count, 1, 1)
    return [_string(_GRAPHS[embedded], generator) for _ in range(count)]


def _string(graph: Graph, generator: Generator) -> Integers:
    symbols: list[int] = []
    state = 0
    while ways := graph[state]:
        symbol = list(ways)[int(generator.integers(0, len(ways)))]
        symbols.append(REBER_SYMBOLS.index(symbol))
        state = ways[symbol]
    return np.array(symbols, np.int64)


def reber_allowed(string: npt.ArrayLike, embedded: bool = False) -> Flags:
    """Which symbols the grammar allows after each symbol of a string: what a network is to predict.

    Parameters
    ----------
    string : integers of shape (n,)
        As `reber` draws them; a part from the beginning will do.
    embedded : bool

    Returns
    -------
    bool array of shape (n, 7)
        All False after a whole string.

    Raises
    ------
    InputError
        If the string is none of the grammar; the message says where it leaves it.
    """
    graph, state = _GRAPHS[embedded], 0
    symbols = np.asarray(string)
    allowed = np.zeros((len(symbols), len(REBER_SYMBOLS)), np.bool_)
    for t, number in enumerate(symbols.tolist()):
        symbol = REBER_SYMBOLS[number] if 0 <= number < len(REBER_SYMBOLS) else repr(number)
        if symbol not in graph[state]:
            ways = " or ".join(graph[state]) or "nothing"
            raise InputError(f"reber_allowed: {symbol} at position {t}; {ways} may come there.", "see `reber`.")
        state = graph[state][symbol]
        allowed[t, [REBER_SYMBOLS.index(s) for s in graph[state]]] = True
    return allowed


def _check(what: str, count: int, steps: int, least: int) -> None:
    if count < 1 or steps < least:
        raise InputError(
            f"{what}: count = {count}, steps = {steps}.", f"count is 1 or more, and steps {least} or more."
        )
