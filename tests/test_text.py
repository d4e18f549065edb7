"""Text: reading, vocabulary, held-out passages, streams and windows."""

import itertools
import re

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tinytape.data import Vocabulary, default_text, read_text, split_held_out, streams, windows
from tinytape.engine.errors import InputError

# ---- reading


def write(tmp_path, raw):
    path = tmp_path / "text.txt"
    path.write_bytes(raw)
    return path


def test_read_text_normalises_line_ends_and_drops_the_byte_order_mark(tmp_path):
    path = write(tmp_path, b"\xef\xbb\xbfone\r\ntwo\rthree\n" + "é\u2028".encode())
    assert read_text(path, minimum=1) == read_text(str(path), minimum=1) == "one\ntwo\nthree\né\u2028"


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", r"is empty, at least 1000 characters"),
        (b"text\0" * 500, r"binary \(byte 4 is NUL\)"),
        (b"caf\xe9 " * 500, r"not UTF-8 text \(byte 3 is 0xe9\)[^¶]*iconv"),
        (b"x" * 999, r"holds 999 characters, at least 1000 are needed"),
        ("é".encode() * 600, r"holds 600 characters, at least 1000"),
    ],
    ids=["empty", "binary", "latin-1", "short", "short in characters"],
)
def test_read_text_refuses(tmp_path, raw, message):
    with pytest.raises(InputError, match=message) as caught:
        read_text(write(tmp_path, raw))
    assert "text.txt" in str(caught.value)


def test_read_text_refuses_what_is_no_file(tmp_path):
    with pytest.raises(InputError, match=r"there is no file .*nothing\.txt"):
        read_text(tmp_path / "nothing.txt")
    with pytest.raises(InputError, match="is a directory"):
        read_text(tmp_path)


def test_read_text_says_why_a_file_cannot_be_read(tmp_path, monkeypatch):
    path = write(tmp_path, b"x" * 2000)  # not chmod: root may read anything

    def refuse(self):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(type(path), "read_bytes", refuse)
    with pytest.raises(InputError, match=r"cannot be read \(Permission denied\)"):
        read_text(path)


def test_default_text_is_long_and_the_same_each_time():
    text = default_text()
    assert len(text) > 400_000
    assert text == default_text()
    assert "\n\n" in text and "\r" not in text and "\0" not in text


# ---- vocabulary


@given(text=st.text(min_size=1))
def test_vocabulary_round_trips(text):
    vocabulary = Vocabulary.of(text)
    numbers = vocabulary.encode(text)
    assert numbers.dtype == np.int64 and numbers.shape == (len(text),)
    assert numbers.tolist() == [vocabulary.symbols.index(symbol) for symbol in text]
    assert vocabulary.decode(numbers) == vocabulary.decode(numbers.tolist()) == text
    assert len(vocabulary) == len(set(text)) == numbers.max() + 1
    stored = vocabulary.to_json()
    assert stored.isascii()
    again = Vocabulary.from_json(stored)
    assert again == vocabulary and hash(again) == hash(vocabulary) and again.symbols == vocabulary.symbols


@given(symbols=st.lists(st.characters(codec="utf-8"), min_size=1, unique=True))
def test_vocabulary_keeps_the_order_it_is_given(symbols):
    vocabulary = Vocabulary("".join(symbols))
    assert vocabulary.encode("".join(symbols)).tolist() == list(range(len(symbols)))


def test_vocabulary_is_equal_by_its_symbols():
    assert Vocabulary("ab") != Vocabulary("ba")
    assert Vocabulary("ab") != "ab"
    assert repr(Vocabulary("ab")) == "Vocabulary('ab')"


def test_vocabulary_of_nothing_to_encode_or_decode():
    assert Vocabulary("ab").encode("").shape == (0,)
    assert Vocabulary("ab").decode([]) == ""


def test_vocabulary_refuses():
    vocabulary = Vocabulary.of("hello")
    with pytest.raises(InputError, match=r"character '!' at position 2 is not among the 4 .*\n  help: remove"):
        vocabulary.encode("he!l?")
    with pytest.raises(InputError, match="character '\\\\U0010ffff' at position 0"):
        vocabulary.encode("\U0010ffff")
    with pytest.raises(InputError, match=r"4 at position 1 is not in 0 to 3"):
        vocabulary.decode([0, 4])
    with pytest.raises(InputError, match=r"-1 at position 0"):
        vocabulary.decode(np.array([-1]))
    with pytest.raises(InputError, match="dtype float64"):
        vocabulary.decode([0.5])
    with pytest.raises(InputError, match=r"shape \(1, 1\)"):
        vocabulary.decode([[0]])
    with pytest.raises(InputError, match="'a' occurs 2 times"):
        Vocabulary("aba")
    with pytest.raises(InputError, match="got 0 characters, at least 1"):
        Vocabulary.of("")


@pytest.mark.parametrize(
    ("stored", "message"),
    [("abc", "not JSON"), ('["a", "b"]', "holds a list, a string is needed"), ('"aa"', "occurs 2 times")],
)
def test_vocabulary_from_json_refuses(stored, message):
    with pytest.raises(InputError, match=message):
        Vocabulary.from_json(stored)


# ---- holding out


def collapse(text):
    return re.sub(r"\s+", " ", text)


def runs(text, span):
    return {text[i : i + span] for i in range(len(text) - span + 1)}


def paragraphs(text):
    return {" ".join(p.split()) for p in re.split(r"\n\s*\n", text)} - {""}


UNIQUE = "".join(chr(0x5000 + i) for i in range(150))  # ends a text, so that something of it is always new


@st.composite
def babble(draw):
    """A text of many short paragraphs, of which some return, whole or wrapped in another way."""
    random = draw(st.randoms(use_true_random=False))
    symbols = "abcdefgh" * draw(st.integers(1, 3)) + " \n\t\u2003é"
    found: list[str] = []
    for _ in range(60):
        if found and random.random() < 0.3:
            found.append(re.sub(r"\s", random.choice([" ", "\n", "\t  "]), random.choice(found)))
        else:
            found.append("".join(random.choices(symbols, k=random.randrange(1, 30))))
    return "".join(p + random.choice(["\n\n", "\n \n\n", " ", "\n\t\n"]) for p in found) + UNIQUE


@given(text=babble(), every=st.integers(2, 4), block=st.integers(4, 40), span=st.integers(4, 20))
def test_held_out_shares_nothing_long_with_training(text, every, block, span):
    train, held_out, removed = split_held_out(text, every, block, span)
    assert held_out.strip() and train and removed >= 0
    assert len(train) + len(held_out) + removed == len(text)
    assert not runs(collapse(train), span) & runs(collapse(held_out), span)


@given(st.lists(st.text("abcd", min_size=1, max_size=30), min_size=30, max_size=60), st.integers(3, 20))
def test_held_out_removes_what_repeats_and_nothing_else(words, span):
    """Against the definition, on paragraphs that cannot be hurt by what repeats across a join."""
    # Each paragraph stands between marks of its own: no run over two paragraphs occurs twice.
    marked = [f"{chr(0x4E00 + i)}{word}{chr(0x4E00 + i)}" for i, word in enumerate(words)]
    text = "\n\n".join([*marked, UNIQUE])
    train, held_out, _ = split_held_out(text, every=3, block=50, span=span)
    known = runs(collapse(train), span)
    rest = [p for p in marked if p not in train]
    assert paragraphs(held_out) & {*marked} == {p for p in rest if not runs(p, span) & known}


def test_held_out_of_the_default_text():
    text = default_text()
    train, held_out, removed = split_held_out(text)
    assert (train, held_out, removed) == split_held_out(text)
    assert len(train) + len(held_out) + removed == len(text)
    assert 0.8 < len(train) / len(text) < 0.95
    assert len(held_out) > 20_000
    assert removed > 10_000  # these topics do quote each other
    assert not runs(collapse(train), 40) & runs(collapse(held_out), 40)
    assert not paragraphs(train) & paragraphs(held_out)
    # Spread over the text: every quarter of it gave something.
    first_lines = [p.split("\n")[0] for p in held_out.split("\n\n") if len(p) > 60]
    assert {4 * text.index(line) // len(text) for line in first_lines} == {0, 1, 2, 3}


def test_held_out_knows_a_passage_however_it_is_wrapped():
    words = [f"word{i}" for i in range(4000)]
    lines = ["\n" + " ".join(words[i : i + 8]) + "\n" for i in range(0, 4000, 8)]
    assert split_held_out("".join(lines)).removed == 0
    wrapped = "\n" + "\n".join(words) + "\n"  # the same again as one narrow column
    with pytest.raises(InputError, match=r"all \d+ characters set aside repeat the training text over 40 or more"):
        split_held_out("".join(lines) + wrapped)


def test_held_out_removes_a_short_paragraph_only_if_it_is_a_paragraph_of_training():
    body = [f"{i} is the number {i * i} less {i * i - i}." for i in range(3000)]
    text = "\n\n".join(itertools.chain.from_iterable((line, "Note") for line in body))
    train, held_out, removed = split_held_out(text)
    assert "Note" in train and "Note" not in held_out and removed > 0


def test_held_out_cuts_a_text_without_paragraphs():
    words = " ".join(map(str, range(20_000)))
    lines = "\n".join(map(str, range(20_000)))
    solid = "".join(chr(0x4E00 + i) for i in range(20_000))
    for text in (words, lines, solid):
        train, held_out, _ = split_held_out(text, span=50)
        assert len(held_out) > len(text) / 16
        if text is not solid:  # no number was cut in two
            assert {*train.split(), *held_out.split()} <= {*text.split()}


def test_split_held_out_refuses():
    with pytest.raises(InputError, match="got 15999 characters, 8 blocks of 2000 need at least 16000"):
        split_held_out("x" * 15_999)
    with pytest.raises(InputError, match="every: got 1, at least 2"):
        split_held_out("x", every=1)
    with pytest.raises(InputError, match="block: got 0, at least 1"):
        split_held_out("x", block=0)
    with pytest.raises(InputError, match="span: got 0, at least 1"):
        split_held_out("x", span=0)
    with pytest.raises(InputError, match="all 2000 characters set aside repeat"):
        split_held_out("x" * 16_000)


# ---- streams and windows


@given(n=st.integers(2, 300), batch=st.integers(1, 20), length=st.integers(1, 50))
def test_streams_and_windows_cover_the_text_once(n, batch, length):
    assume(n > batch)
    tokens = np.arange(n)
    columns = streams(tokens, batch)
    assert columns.shape == (1 + (n - 1) // batch, batch)
    parts = list(windows(columns, length))
    assert all(x.shape == y.shape == (length, batch) for x, y in parts[:-1])
    assert 1 <= len(parts[-1][0]) <= length and parts[-1][1].shape == parts[-1][0].shape
    inputs = np.concatenate([x for x, _ in parts])
    targets = np.concatenate([y for _, y in parts])
    assert (targets == inputs + 1).all()  # tokens are their own positions
    used = batch * ((n - 1) // batch)
    assert inputs.T.ravel().tolist() == list(range(used))
    assert targets.T.ravel().tolist() == list(range(1, used + 1))
    assert n - 1 - used < batch


def test_streams_keep_the_dtype_and_windows_do_not_copy():
    columns = streams(np.arange(20, dtype=np.uint16), 3)
    assert columns.dtype == np.uint16 and columns.flags.c_contiguous
    assert all(np.shares_memory(columns, part) for pair in windows(columns, 4) for part in pair)


def test_streams_and_windows_refuse():
    with pytest.raises(InputError, match="got 8, at least 9 are needed for batch_size = 8"):
        streams(np.arange(8), 8)
    with pytest.raises(InputError, match="batch_size: got 0, at least 1"):
        streams(np.arange(8), 0)
    with pytest.raises(InputError, match=r"shape \(4, 2\) and dtype"):
        streams(np.arange(8).reshape(4, 2), 2)
    with pytest.raises(InputError, match="dtype float64"):
        streams(np.ones(8), 2)
    with pytest.raises(InputError, match="length: got 0, at least 1"):
        windows(np.zeros((5, 2), int), 0)  # at the call: nobody asks for the first window here
    with pytest.raises(InputError, match=r"got shape \(1, 2\), \(2 or more steps, batch\)"):
        windows(np.zeros((1, 2), int), 4)
    with pytest.raises(InputError, match=r"got shape \(5,\)"):
        windows(np.zeros(5, int), 4)
