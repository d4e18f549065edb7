"""Scoring and writing with language models."""

import math
from itertools import islice, pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape.generate import distribution, nats, sample


class Markov(tt.nn.Module):
    """A model that is known exactly: the next token depends on the one before. Its state counts the calls."""

    def __init__(self, table):
        self.logits = tt.nn.Embedding(*table.shape, dtype="float64")
        with tt.no_grad():
            self.logits.weight.copy_(np.log(table))

    def forward(self, tokens, state=None):
        assert not self.training
        logits = self.logits(tokens)
        assert logits.is_leaf
        return logits, (state or 0) + 1


TABLE = np.random.default_rng(0).dirichlet(np.ones(5), 5)


@given(st.lists(st.integers(0, 4), min_size=2, max_size=50), st.integers(1, 9))
def test_nats_are_those_of_the_definition(tokens, window):
    model = Markov(TABLE)
    found = nats(model, np.array(tokens), window=window)
    wanted = -np.mean([math.log(TABLE[a, b]) for a, b in pairwise(tokens)])
    assert found == pytest.approx(wanted, rel=1e-9)
    assert model.training


def test_nats_of_streams_leave_out_what_streams_do():
    tokens = np.random.default_rng(1).integers(0, 5, 101)
    columns = tt.data.streams(tokens, 4)
    wanted = -np.log(TABLE[columns[:-1], columns[1:]]).mean()
    assert nats(Markov(TABLE), tokens, 4, 7) == pytest.approx(wanted, rel=1e-9)
    with pytest.raises(tt.InputError, match="tokens: got 1"):
        nats(Markov(TABLE), tokens[:1])


scores = st.lists(st.floats(-20, 20), min_size=1, max_size=8)


@given(scores, st.floats(0.05, 5))
def test_the_distribution_is_a_softmax(logits, temperature):
    wanted = np.exp(np.array(logits) / temperature - max(logits) / temperature)
    np.testing.assert_allclose(distribution(logits, temperature), wanted / wanted.sum(), rtol=1e-9, atol=1e-300)


@given(scores, st.floats(0.1, 3), st.none() | st.integers(1, 9), st.none() | st.floats(0.01, 1))
def test_what_is_left_is_the_likeliest_in_proportion(logits, temperature, top_k, top_p):
    whole, found = distribution(logits, temperature), distribution(logits, temperature, top_k, top_p)
    kept = found > 0
    assert found.sum() == pytest.approx(1, abs=1e-12) and 1 <= kept.sum() <= (top_k or 9)
    np.testing.assert_allclose(found[kept], whole[kept] / whole[kept].sum(), rtol=1e-6)
    assert whole[kept].min() >= whole[~kept].max(initial=0.0)
    if top_k is None and top_p is not None:
        assert whole[kept].sum() >= top_p - 1e-9  # enough,
        assert kept.sum() == 1 or whole[kept].sum() - whole[kept].min() < top_p + 1e-9  # and no more


def test_of_equal_logits_the_first_is_the_greedy_one():
    assert distribution([1.0, 3.0, 3.0], temperature=0).tolist() == [0, 1, 0]
    assert distribution([3.0, 3.0, 3.0], top_k=2).tolist() == [0.5, 0.5, 0]
    assert distribution([-math.inf, 0.0, 1e4], temperature=1e-3).tolist() == [0, 0, 1]


def test_samples_have_the_chances_of_the_model():
    drawn = list(islice(sample(Markov(TABLE), np.array([2]), generator=tt.Generator(0)), 4000))
    pairs = np.zeros((5, 5))
    np.add.at(pairs, ([2, *drawn[:-1]], drawn), 1)
    rows = pairs.sum(1, keepdims=True)
    chi2 = ((pairs - rows * TABLE) ** 2 / (rows * TABLE)).sum()
    assert chi2 < 45  # 20 degrees of freedom: one seed in a thousand is above


def test_samples_follow_the_whole_prompt_and_carry_the_state():
    calls = []

    def model(tokens, state):
        calls.append((tokens[:, 0].tolist(), state))
        return tt.tensor(np.eye(4)[(tokens + 1) % 4] * 50.0), len(calls)

    assert list(islice(sample(model, np.array([3, 0, 1]), temperature=0), 3)) == [2, 3, 0]
    assert calls == [([3, 0, 1], None), ([2], 1), ([3], 2)]


def test_sampling_depends_on_its_generator_alone():
    def drawn(seed):
        return list(islice(sample(Markov(TABLE), np.array([0]), top_p=0.9, generator=tt.Generator(seed)), 30))

    assert drawn(1) == drawn(1) != drawn(2)


def test_a_model_in_training_is_in_training_between_two_tokens():
    model = Markov(TABLE)
    tokens = sample(model, np.array([0]))
    next(tokens)
    assert model.training


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature": -1}, "temperature"), ({"temperature": math.nan}, "temperature"), ({"top_k": 0}, "top_k"),
        ({"top_p": 0.0}, "top_p"), ({"top_p": 1.1}, "top_p"),
    ],
)  # fmt: skip
def test_options_out_of_range(options, words):
    with pytest.raises(tt.InputError, match=words):
        sample(Markov(TABLE), np.array([0]), **options)
    with pytest.raises(tt.InputError, match=words):
        distribution([0.0], **options)


def test_what_cannot_be_drawn_from():
    with pytest.raises(tt.InputError, match="prompt: got 0"):
        sample(Markov(TABLE), np.array([], int))
    for logits in ([0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]):
        with pytest.raises(tt.InputError, match="no chances"):
            distribution(logits)
