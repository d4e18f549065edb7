"""Padding, masks and buckets against plain loops."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt

LENGTHS = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@given(LENGTHS, st.booleans(), st.sampled_from([(), (2,), (2, 3)]))
def test_pad_sequences(lengths, batch_first, features):
    rng = np.random.default_rng(0)
    sequences = [rng.standard_normal((n, *features)) for n in lengths]
    x, found = tt.data.pad_sequences(sequences, value=-7.5, batch_first=batch_first)
    assert found.tolist() == lengths and found.dtype == np.int64
    x = np.moveaxis(x, 0, 1) if batch_first else x
    assert x.shape == (max(lengths), len(lengths), *features)
    for b, sequence in enumerate(sequences):
        assert (x[: len(sequence), b] == sequence).all() and (x[len(sequence) :, b] == -7.5).all()
    mask = tt.data.length_mask(found, batch_first=batch_first)
    mask = mask.T if batch_first else mask
    assert mask.tolist() == [[t < n for n in lengths] for t in range(max(lengths))]
    assert (x[~mask] == -7.5).all() and not (x[mask] == -7.5).any()


@pytest.mark.parametrize("dtype", ["float32", "int64", "uint8", "bool"])
def test_the_dtype_stays(dtype):
    x, _ = tt.data.pad_sequences([np.ones(3, dtype), np.ones(1, dtype)])
    assert x.dtype == dtype and x.sum() == 4


def test_layers_take_what_comes_out():
    """Every row of a padded batch is computed as if alone."""
    rng = np.random.default_rng(1)
    sequences = [rng.standard_normal((n, 3)).astype(np.float32) for n in (4, 1, 6)]
    gru = tt.nn.GRU(3, 5, generator=tt.Generator(0))
    x, lengths = tt.data.pad_sequences(sequences, value=np.nan)
    _, last = gru(x, lengths=lengths)
    for b, sequence in enumerate(sequences):
        assert np.allclose(gru(sequence)[1].numpy()[0], last.numpy()[0, b], atol=1e-6)


def test_a_mask_may_be_longer_than_the_lengths():
    assert tt.data.length_mask([2, 0], steps=3).tolist() == [[True, False], [True, False], [False, False]]
    assert tt.data.length_mask([]).shape == (0, 0)


@given(
    st.lists(st.integers(0, 30), max_size=60), st.integers(1, 9), st.none() | st.integers(1, 5), st.integers(0, 2**32)
)
def test_buckets_hold_each_sequence_once(lengths, batch_size, pool, seed):
    batches = tt.data.bucket_batches(lengths, batch_size, tt.Generator(seed), pool)
    assert sorted(i for batch in batches for i in batch.tolist()) == list(range(len(lengths)))
    assert all(1 <= len(batch) <= batch_size for batch in batches)
    assert len(batches) == -(-len(lengths) // batch_size)
    again = tt.data.bucket_batches(lengths, batch_size, tt.Generator(seed), pool)
    assert [batch.tolist() for batch in batches] == [batch.tolist() for batch in again]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=60), st.integers(1, 9), st.integers(0, 2**32))
def test_buckets_of_all_have_the_least_padding_there_can_be(lengths, batch_size, seed):
    """Neighbours in sorted order, longest first, is optimal for full batches."""

    def padding(batches):
        return sum(max(lengths[i] for i in batch) * len(batch) - sum(lengths[i] for i in batch) for batch in batches)

    ordered = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    least = padding([ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)])
    assert padding(tt.data.bucket_batches(lengths, batch_size, tt.Generator(seed))) == least
    assert padding(tt.data.bucket_batches(lengths, batch_size)) == least


def test_buckets_are_shuffled():
    lengths = np.arange(100) // 4
    generator = tt.Generator(0)
    batches = tt.data.bucket_batches(lengths, 4, generator)
    heads = [int(lengths[batch[0]]) for batch in batches]
    assert heads != sorted(heads) and heads != sorted(heads, reverse=True)
    epochs = {tuple(map(tuple, tt.data.bucket_batches(np.ones(20, int), 4, generator))) for _ in range(5)}
    assert len(epochs) == 5  # what is equally long meets others in each epoch
    assert [batch.tolist() for batch in tt.data.bucket_batches([1, 3, 2], 2)] == [[1, 2], [0]]


def test_a_pool_of_one_is_plain_shuffling():
    lengths = np.arange(1000)
    whole = tt.data.bucket_batches(lengths, 10, tt.Generator(0))
    plain = tt.data.bucket_batches(lengths, 10, tt.Generator(0), pool=1)
    assert np.mean([np.ptp(lengths[batch]) for batch in whole]) == 9
    assert np.mean([np.ptp(lengths[batch]) for batch in plain]) > 500


@pytest.mark.parametrize(
    ("make", "kind", "words"),
    [
        (lambda: tt.data.pad_sequences([]), tt.InputError, "no sequences"),
        (lambda: tt.data.pad_sequences([np.ones((2, 3)), np.ones((2, 4))]), tt.ShapeError, "shape (2, 4)"),
        (lambda: tt.data.pad_sequences([np.float64(1)]), tt.ShapeError, "sequence 0"),
        (lambda: tt.data.pad_sequences([np.ones(2), np.ones(2, int)]), tt.DTypeError, "sequence 1 is int64"),
        (lambda: tt.data.pad_sequences([np.ones(2, int)], value=0.5), tt.InputError, "value is 0.5"),
        (lambda: tt.data.pad_sequences([np.ones(2, int)], value=np.nan), tt.InputError, "value is nan"),
        (lambda: tt.data.pad_sequences([np.ones(2, np.uint8)], value=-1), tt.InputError, "value is -1"),
        (lambda: tt.data.length_mask([3, 4], steps=3), tt.InputError, "a length is 4"),
        (lambda: tt.data.length_mask([-1]), tt.InputError, "a length is -1"),
        (lambda: tt.data.length_mask([1.5]), tt.InputError, "float64"),
        (lambda: tt.data.length_mask(3), tt.InputError, "shape ()"),
        (lambda: tt.data.bucket_batches([1], 0), tt.InputError, "batch_size = 0"),
        (lambda: tt.data.bucket_batches([1], 1, pool=0), tt.InputError, "pool = 0"),
    ],
)  # fmt: skip
def test_errors(make, kind, words):
    with pytest.raises(kind) as caught:
        make()
    assert words in str(caught.value), caught.value
