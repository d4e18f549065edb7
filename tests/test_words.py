"""Words: splitting, vocabularies, and texts that are mapped and not read."""

import re
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tinytape.data import (
    Vocabulary,
    WordVocabulary,
    map_tokens,
    read_lines,
    read_text,
    split_words,
    streams,
    token_file,
    windows,
    words,
)
from tinytape.engine.errors import InputError


def test_split_words():
    text = "He said: “Don't!”\n\n  \nWar_1 &  Peace—42\nÉté"
    assert split_words(text) == "he said : “ don ' t ! ”\nwar_1 & peace — 42\nété\n"


@given(st.text(alphabet="aB1_ .,'\n\té", max_size=60))
def test_split_words_is_the_pattern_line_by_line(text):
    wanted = [re.findall(r"\w+|[^\w\s]", line.lower()) for line in text.split("\n")]
    assert [line.split() for line in split_words(text).splitlines()] == [line for line in wanted if line]
    assert split_words(split_words(text)) == split_words(text)


def test_every_line_has_its_end():
    assert list(words(["a b\n", "\n", "c"])) == ["a", "b", "<eos>", "<eos>", "c", "<eos>"]


corpora = st.lists(st.sampled_from(["a", "b", "c", "d", "<unk>", "é"]), min_size=1, max_size=40)


@given(corpora, st.integers(2, 8))
def test_the_vocabulary_has_the_most_frequent_words(corpus, size):
    vocabulary = WordVocabulary.of(iter(corpus), size)
    counts = Counter(word for word in corpus if word != "<unk>")
    kept = [word for word in vocabulary.words if word != "<unk>"]
    assert len(kept) == min(len(counts), size - 1) and len(vocabulary) == len(kept) + 1
    assert kept == sorted(kept, key=lambda word: (-counts[word], word))
    assert min((counts[word] for word in kept), default=0) >= max(
        (counts[word] for word in counts if word not in kept), default=0
    )
    numbers = vocabulary.encode(corpus)
    assert vocabulary.decode(numbers) == [word if word in vocabulary else "<unk>" for word in corpus]
    frequencies = np.bincount(numbers, minlength=len(vocabulary))
    assert (np.diff(frequencies) <= 0).all()  # numbered by falling frequency, <unk> too
    again = WordVocabulary.from_json(vocabulary.to_json())
    assert again == vocabulary and hash(again) == hash(vocabulary)


def test_without_a_size_every_word_is_kept():
    assert WordVocabulary.of(["b", "a", "b"]).words == ("b", "a", "<unk>")
    assert repr(WordVocabulary.of("abcd")) == "WordVocabulary(['a', 'b', 'c', ...], 5 words)"


def test_vocabularies_of_words_refuse():
    with pytest.raises(InputError, match="'a' occurs 2 times"):
        WordVocabulary(["a", "<unk>", "a"])
    with pytest.raises(InputError, match="'<unk>' is not among the 1"):
        WordVocabulary(["a"])
    with pytest.raises(InputError, match="size: got 1"):
        WordVocabulary.of(["a"], 1)
    with pytest.raises(InputError, match="words: got 0"):
        WordVocabulary.of([])
    with pytest.raises(InputError, match="2 at position 1 is not in 0 to 1"):
        WordVocabulary(["a", "<unk>"]).decode([0, 2])
    for stored in ("{", "3", "[1]"):
        with pytest.raises(InputError, match="stored: not"):
            WordVocabulary.from_json(stored)


def test_characters_that_stand_for_unknown_ones():
    vocabulary = Vocabulary("ab?")
    assert vocabulary.decode(vocabulary.encode("a€b", instead="?")) == "a?b"
    assert vocabulary.decode(vocabulary.encode("a€b", instead="")) == "ab"
    with pytest.raises(InputError, match="'#'"):
        vocabulary.encode("a€b", instead="#")


# ---- files ----------------------------------------------------------------------------------------------------------


def write(path, raw):
    path.write_bytes(raw)
    return path


def test_lines_are_those_of_the_text_read_whole(tmp_path):
    path = write(tmp_path / "text.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n\n" + "é\u2028".encode())
    assert "".join(read_lines(path)) == read_text(path, 1)
    assert list(read_lines(path)) == ["one\n", "two\n", "three\n", "\n", "é\u2028"]


@pytest.mark.parametrize(
    ("raw", "message"), [(b"a\nb\0", r"line 2 has a NUL"), (b"caf\xe9", r"not UTF-8 text"), (None, "there is no file")]
)
def test_lines_refuse(raw, message, tmp_path):
    path = tmp_path / "text.txt"
    if raw is not None:
        path.write_bytes(raw)
    with pytest.raises(InputError, match=message):
        list(read_lines(path))


@pytest.mark.parametrize("kind", ["characters", "words"])
def test_mapped_tokens_are_those_of_the_text(kind, tmp_path, monkeypatch):
    monkeypatch.setattr(token_file, "LINES", 3)  # several pieces
    text = "".join(f"line {i} of é\n" for i in range(20))
    path = write(tmp_path / "text.txt", text.encode())
    if kind == "characters":
        vocabulary, wanted = Vocabulary.of(text), Vocabulary.of(text).encode(text)
    else:
        vocabulary = WordVocabulary.of(words(read_lines(path)), 10)
        wanted = vocabulary.encode(words(text.splitlines()))
    tokens = map_tokens(path, vocabulary, tmp_path / "cache")
    assert isinstance(tokens, np.memmap) and tokens.dtype == np.uint16 and not tokens.flags.writeable
    assert np.array_equal(tokens, wanted)
    columns = streams(tokens, 3)
    assert np.shares_memory(columns, tokens) and np.array_equal(columns, streams(wanted, 3))
    assert all(np.array_equal(a, b) for a, b in zip(windows(columns, 4), windows(streams(wanted, 3), 4), strict=True))


def test_the_cache_is_used_again_and_never_stale(tmp_path):
    path, cache = write(tmp_path / "text.txt", b"abab"), tmp_path / "cache"
    assert map_tokens(path, Vocabulary("ab"), cache).tolist() == [0, 1, 0, 1]
    (made,) = cache.iterdir()
    made.write_bytes(bytes(made.stat().st_size))
    assert map_tokens(path, Vocabulary("ab"), cache).tolist() == [0, 0, 0, 0]
    assert map_tokens(path, Vocabulary("ba"), cache).tolist() == [1, 0, 1, 0]
    write(path, b"bbbba")
    assert map_tokens(path, Vocabulary("ab"), cache).tolist() == [1, 1, 1, 1, 0]
    assert not list(cache.glob("*.tmp"))


def test_a_large_vocabulary_needs_wider_numbers(tmp_path):
    path = write(tmp_path / "text.txt", "\n".join(str(i) for i in range(66_000)).encode())
    vocabulary = WordVocabulary.of(words(read_lines(path)))
    tokens = map_tokens(path, vocabulary, tmp_path)
    assert tokens.dtype == np.uint32 and vocabulary.decode(tokens[-2:]) == ["65999", "<eos>"]


def test_mapped_tokens_refuse(tmp_path):
    with pytest.raises(InputError, match="there is no file"):
        map_tokens(tmp_path / "none", Vocabulary("a"), tmp_path)
    with pytest.raises(InputError, match="is empty"):
        map_tokens(write(tmp_path / "empty", b""), Vocabulary("a"), tmp_path / "cache")
    path = write(tmp_path / "text.txt", b"ab")
    with pytest.raises(InputError, match="'b' at position 1"):
        map_tokens(path, Vocabulary("a"), tmp_path / "cache")
    with pytest.raises(InputError, match="cannot be written"):
        map_tokens(path, Vocabulary("ab"), path)
    assert [place.name for place in (tmp_path / "cache").iterdir() if place.stat().st_size] == []
