"""The n-gram models: against plain Python, and as probabilities."""

import math
from collections import Counter, defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytape.data import Ngrams, Smoothing, best_ngrams
from tinytape.engine.errors import InputError

NAMES = ("modified Kneser-Ney", "absolute discounting", "Witten-Bell")


@st.composite
def smoothings(draw, max_order=5):
    order = draw(st.integers(1, max_order))
    unit = st.floats(0, 1)
    positive = st.floats(0.01, 5)
    rows = [(draw(unit), 2 * draw(unit), 3 * draw(unit), draw(positive), draw(positive)) for _ in range(order)]
    return Smoothing(draw(st.sampled_from(NAMES)), np.array(rows))


def symbols(least=0):
    return st.lists(st.integers(0, 3), min_size=least, max_size=60)


def reference(train, smoothing, context, symbol, vocabulary_size):
    """The formula of the module's docstring, one symbol at a time."""
    order = len(smoothing.numbers)
    probability = 1 / vocabulary_size
    for length in range(1, min(order, len(context) + 1) + 1):
        grams = [tuple(train[i : i + length]) for i in range(len(train) - length + 1)]
        if smoothing.name == "modified Kneser-Ney" and length < order:
            before = defaultdict(set)
            for i in range(1, len(grams)):
                before[grams[i]].add(train[i - 1])
            count = Counter({gram: len(found) for gram, found in before.items()})
        else:
            count = Counter(grams)
        past = tuple(context[len(context) - length + 1 :])
        counts = [count[(*past, w)] for w in range(vocabulary_size)]
        if sum(counts):
            *discounts, constant, each = smoothing.numbers[length - 1].tolist()
            discount = [0, *discounts]
            a = constant + each * sum(c > 0 for c in counts)
            f = a + sum(discount[min(c, 3)] for c in counts)
            c = counts[symbol]
            probability = (c - discount[min(c, 3)] + f * probability) / (sum(counts) + a)
    return probability


@given(symbols(5), symbols(1), smoothings())
def test_probabilities_match_plain_python(train, scored, smoothing):
    ngrams = Ngrams(np.array(train), 5, 5)
    found = ngrams.probabilities(np.array(scored), smoothing)
    expected = [reference(train, smoothing, scored[:i], w, 5) for i, w in enumerate(scored)]
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@given(symbols(5), symbols(), smoothings())
def test_probabilities_sum_to_one(train, context, smoothing):
    size = 6  # symbols 4 and 5 never occur
    ngrams = Ngrams(np.array(train), 5, size)
    each = [ngrams.probabilities(np.array([*context, w]), smoothing)[-1] for w in range(size)]
    assert min(each) > 0
    assert sum(each) == pytest.approx(1, abs=1e-12)


@given(symbols(5), symbols(2), st.sampled_from(NAMES), st.integers(1, 4))
def test_tune_reports_the_bits_of_the_numbers_it_gives(train, scored, name, order):
    train, scored = np.array(train), np.array(scored)
    ngrams = Ngrams(train, 4, 5)
    row = (0, 0, 0, 0, 1) if name == "Witten-Bell" else (0.5, 1, 1.5, 0.5, 0)
    start = Smoothing(name, np.tile(np.array(row, float), (order, 1)))
    result = ngrams.tune(scored, start)
    assert result.order == order and result.smoothing.name == name
    assert result.bits <= bits(ngrams, scored, start) + 1e-12
    assert result.bits == pytest.approx(bits(ngrams, scored, result.smoothing), rel=1e-9)
    numbers = result.smoothing.numbers
    assert (numbers >= 0).all() and (numbers[:, :3] <= [1, 2, 3]).all() and numbers[:, 3:].any(1).all()


def bits(ngrams, scored, smoothing):
    return -np.log2(ngrams.probabilities(scored, smoothing)[1:]).mean()


def markov(n, seed):
    """A chain in which a symbol depends on the two before it, so that order 3 is the true one."""
    rng = np.random.default_rng(seed)
    table = np.random.default_rng(7).dirichlet(np.full(8, 0.3), size=(8, 8))
    tokens = [0, 1]
    entropy = 0.0
    for _ in range(n):
        p = table[tokens[-2], tokens[-1]]
        tokens.append(int(rng.choice(8, p=p)))
        entropy -= math.log2(p[tokens[-1]])
    return np.array(tokens), entropy / n


def test_best_ngrams_find_the_order_of_a_markov_chain():
    train, _ = markov(20_000, seed=1)
    scored, entropy = markov(3_000, seed=2)
    results = best_ngrams(train, scored, 8, order=4)
    assert [r.order for r in results] == [r.smoothing.numbers.shape[0] for r in results] == [1, 2, 3, 4]
    found = [r.bits for r in results]
    assert found[0] > found[1] > found[2]
    assert entropy < found[2] < entropy + 0.03
    assert found[3] > found[2] - 0.01  # nothing more to be found


def test_best_ngrams_are_the_best_of_each_smoothing_and_of_finer_numbers():
    train, _ = markov(3_000, seed=3)
    scored, _ = markov(1_000, seed=4)
    ngrams = Ngrams(train, 3, 8)
    rng = np.random.default_rng(0)
    for result in best_ngrams(train, scored, 8, order=3):
        name, numbers = result.smoothing
        for other in NAMES:
            assert bits(ngrams, scored, Smoothing(other, numbers)) > result.bits - 1e-3
        for _ in range(200):
            near = numbers * rng.uniform(0.8, 1.2, numbers.shape)
            near[:, :3] = np.minimum(near[:, :3], [1, 2, 3])
            assert bits(ngrams, scored, Smoothing(name, near)) > result.bits - 1e-3


def test_order_one_on_its_own_text_reaches_the_entropy():
    tokens = np.random.default_rng(0).choice(5, 4000, p=[0.5, 0.2, 0.15, 0.1, 0.05])
    share = np.bincount(tokens) / len(tokens)
    entropy = -(share * np.log2(share)).sum()
    assert best_ngrams(tokens, tokens, 5, order=1)[0].bits == pytest.approx(entropy, abs=1e-3)


def test_a_large_vocabulary_does_not_overflow():
    tokens = np.random.default_rng(0).integers(0, 1_000_000, 500)
    results = best_ngrams(tokens, tokens, 1_114_112)
    assert results[5].bits < 1


def test_ngrams_refuse():
    tokens = np.array([0, 1, 2, 0, 1])
    with pytest.raises(InputError, match="order: got 0, at least 1"):
        Ngrams(tokens, 0, 3)
    with pytest.raises(InputError, match="tokens: got 5 symbols, at least 6"):
        Ngrams(tokens, 6, 3)
    with pytest.raises(InputError, match="numbers from 0 to 2, vocabulary_size = 2 allows 0 to 1"):
        Ngrams(tokens, 2, 2)
    with pytest.raises(InputError, match="dtype float64"):
        Ngrams(tokens / 2, 2, 3)
    with pytest.raises(InputError, match=r"shape \(1, 5\)"):
        Ngrams(tokens[None], 2, 3)
    ngrams = Ngrams(tokens, 2, 3)
    one = np.array([[0.5, 1, 1.5, 0.5, 0]])
    with pytest.raises(InputError, match="order 3, n-grams are counted up to 2"):
        ngrams.probabilities(tokens, Smoothing("Witten-Bell", np.tile(one, (3, 1))))
    with pytest.raises(InputError, match="'Laplace' of order 1"):
        ngrams.probabilities(tokens, Smoothing("Laplace", one))
    with pytest.raises(InputError, match="numbers from -1 to 2"):
        ngrams.probabilities(np.array([2, -1]), Smoothing("Witten-Bell", one))
    with pytest.raises(InputError, match="scored: got 1 symbols, at least 2"):
        best_ngrams(tokens, tokens[:1], 3, order=2)
