"""Synthetic problems against their definitions, counted out step by step."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt

COUNTS, SEEDS = st.integers(1, 20), st.integers(0, 2**32)


@given(COUNTS, st.integers(2, 60), SEEDS)
def test_adding(count, steps, seed):
    x, y = tt.data.adding(count, steps, tt.Generator(seed))
    assert x.shape == (steps, count, 2) and y.shape == (count, 1) and x.dtype == y.dtype == np.float32
    assert ((x[..., 0] >= 0) & (x[..., 0] <= 1)).all()
    for b in range(count):
        first, second = np.flatnonzero(x[:, b, 1])
        assert first < steps // 2 <= second and x[[first, second], b, 1].tolist() == [1, 1]
        assert y[b, 0] == np.float32(x[first, b, 0] + x[second, b, 0])


def test_adding_guessed_has_a_squared_error_of_a_sixth():
    x, y = tt.data.adding(200_000, 4, tt.Generator(0))
    error = ((y - 1) ** 2).astype(np.float64)
    assert abs(error.mean() - 1 / 6) < 5 * error.std() / math.sqrt(len(y))
    places = x[:, :, 1].mean(axis=1)
    assert np.allclose(places, 0.5, atol=0.01)  # each of two steps, in both halves


@given(COUNTS, st.integers(1, 60), SEEDS, st.integers(1, 9), st.integers(1, 12))
def test_copy_memory(count, steps, seed, symbols, length):
    x, y = tt.data.copy_memory(count, steps, tt.Generator(seed), symbols, length)
    assert x.shape == y.shape == (steps + 2 * length, count)
    blank, sign = symbols, symbols + 1
    for b in range(count):
        shown = x[:length, b].tolist()
        assert all(0 <= s < symbols for s in shown)
        assert x[length:, b].tolist() == [blank] * (steps - 1) + [sign] + [blank] * length
        assert y[:, b].tolist() == [blank] * (steps + length) + shown


def test_copy_memory_shows_every_symbol_equally_often():
    x, _ = tt.data.copy_memory(10_000, 5, tt.Generator(1))
    counts = np.bincount(x[:10].reshape(-1), minlength=8)
    expected = 100_000 / 8
    assert len(counts) == 8 and ((counts - expected) ** 2 / expected).sum() < 30  # chi², 7 degrees of freedom


@given(COUNTS, st.integers(5, 100), SEEDS)
def test_temporal_order(count, steps, seed):
    x, y = tt.data.temporal_order(count, steps, tt.Generator(seed))
    assert x.shape == (steps, count) and y.shape == (count,)
    for b in range(count):
        early, late = np.flatnonzero(x[:, b] < 2)
        assert steps // 10 <= early <= 2 * steps // 10 and 4 * steps // 10 <= late <= 5 * steps // 10
        assert y[b] == 2 * x[early, b] + x[late, b]
        assert set(x[:, b]) <= set(range(6))


def test_temporal_order_classes_are_equally_frequent():
    _, y = tt.data.temporal_order(40_000, 5, tt.Generator(2))
    assert np.abs(np.bincount(y, minlength=4) / 40_000 - 0.25).max() < 0.01


# Reber's graph once more, as edges: from, symbol, to (Cleeremans, Servan-Schreiber & McClelland 1989, figure 2).
EDGES = ["0B1", "1T2", "2S2", "2X4", "1P3", "3T3", "3V5", "4X3", "4S6", "5P4", "5V6", "6E7"]


def words(string):
    return "".join(tt.data.REBER_SYMBOLS[i] for i in string)


def places(word, start=0):
    """The states that a word goes through; None if it is no beginning of a string of the grammar."""
    state, found = start, []
    for symbol in word:
        ways = {edge[1]: int(edge[2]) for edge in EDGES if int(edge[0]) == state}
        if symbol not in ways:
            return None
        state = ways[symbol]
        found.append(state)
    return found


@given(SEEDS)
def test_reber(seed):
    (string,) = tt.data.reber(1, tt.Generator(seed))
    states = places(words(string))
    assert states is not None and states[-1] == 7 and len(string) >= 5
    allowed = tt.data.reber_allowed(string)
    for state, row in zip(states, allowed, strict=True):
        assert {tt.data.REBER_SYMBOLS[i] for i in np.flatnonzero(row)} == {e[1] for e in EDGES if int(e[0]) == state}


@given(SEEDS)
def test_embedded_reber(seed):
    (string,) = tt.data.reber(1, tt.Generator(seed), embedded=True)
    word = words(string)
    assert word[0] == "B" and word[-1] == "E" and word[1] == word[-2] and word[1] in "TP"
    inner = string[2:-2]
    assert places(words(inner))[-1] == 7
    allowed = tt.data.reber_allowed(string, embedded=True)
    assert (allowed[2:-3] == tt.data.reber_allowed(inner)[:-1]).all()
    assert words(np.flatnonzero(allowed[-3])) == word[1] and words(np.flatnonzero(allowed[-2])) == "E"
    assert not allowed[-1].any() and sorted(words(np.flatnonzero(allowed[0]))) == ["P", "T"]


def test_reber_strings_end_as_often_as_they_should():
    """The expected length, from the linear equations of the chain, beside the mean of many."""
    ways = {s: [int(e[2]) for e in EDGES if int(e[0]) == s] for s in range(7)}
    matrix, ones = np.eye(7), np.ones(7)
    for state, targets in ways.items():
        for target in targets:
            if target < 7:
                matrix[state, target] -= 1 / len(targets)
    expected = np.linalg.solve(matrix, ones)[0]
    lengths = np.array([len(s) for s in tt.data.reber(5000, tt.Generator(3))])
    assert abs(lengths.mean() - expected) < 5 * lengths.std() / math.sqrt(len(lengths))


@pytest.mark.parametrize("name", ["adding", "copy_memory", "temporal_order", "reber"])
def test_equal_seeds_give_equal_data(name):
    def drawn(seed):
        generator = tt.Generator(seed)
        made = getattr(tt.data, name)(7, *(() if name == "reber" else (20,)), generator)
        return [np.asarray(a).tobytes() for a in made]

    assert drawn(5) == drawn(5) != drawn(6)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda g: tt.data.adding(0, 10, g), "count = 0"),
        (lambda g: tt.data.adding(1, 1, g), "steps 2 or more"),
        (lambda g: tt.data.copy_memory(1, 0, g), "steps = 0"),
        (lambda g: tt.data.copy_memory(1, 1, g, symbols=0), "symbols = 0"),
        (lambda g: tt.data.copy_memory(1, 1, g, length=0), "length = 0"),
        (lambda g: tt.data.temporal_order(1, 4, g), "steps 5 or more"),
        (lambda g: tt.data.reber(0, g), "count = 0"),
        (lambda g: tt.data.reber_allowed([0, 3]), "S at position 1; T or P"),
        (lambda g: tt.data.reber_allowed([0, 9]), "9 at position 1"),
        (lambda g: tt.data.reber_allowed([0, 1, 3, 4, 3, 6, 6]), "nothing may come"),
    ],
)
def test_errors(make, words):
    with pytest.raises(tt.InputError) as caught:
        make(tt.Generator(0))
    assert words in str(caught.value), caught.value
