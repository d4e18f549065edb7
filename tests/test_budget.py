"""Plans: the best for the bytes, by looking at all of them; and what they predict, counted."""

import math
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape.loop import budget as module
from tinytape.loop.budget import Plan, as_bytes, every, plan, show_bytes
from tinytape.loop.revolve import Advance, Free, Leaf, Restore, Store, extra

sizes = st.integers(1, 40)


def counted(found):
    """Bytes at most and forward steps, by going through the actions."""
    stored, peak, steps, left = set(), 0, 0, found.steps
    for action in found.actions():
        match action:
            case Store(at):
                stored.add(at)
            case Free(at):
                stored.remove(at)
            case Restore(at):
                assert at in stored
            case Advance(start, stop):
                steps += stop - start
            case Leaf(start, stop):
                assert stop == left
                left, steps = start, steps + stop - start
                taken = len(stored) * found.carry_bytes + (stop - start) * found.bytes_per_step
                peak = max(peak, taken + found.fixed_bytes)
    assert left == 0 and not stored
    return peak, steps


@given(st.data(), sizes, sizes, st.integers(1, 300), st.integers(0, 50), st.sampled_from([1, 1, 2, 5]))
def test_the_fewest_steps_within_a_budget(data, b, c, steps, fixed, multiple):
    units = -(-steps // multiple)
    least = fixed + min(steps * b, multiple * b + c)
    budget = data.draw(st.integers(least, fixed + steps * b + 5))
    found = plan(steps, b, c, budget, fixed_bytes=fixed, multiple=multiple)
    assert found.peak_bytes <= budget
    assert all(a.start % multiple == 0 for a in found.actions() if isinstance(a, Leaf))
    peak, forward = counted(found)
    assert forward == found.forward_steps
    assert peak == found.peak_bytes if multiple == 1 else peak <= found.peak_bytes
    if steps * b + fixed <= budget:
        assert found.kind == "full" and found.extra_steps == 0
        return
    pairs = [(n, s) for n in range(1, units + 1) for s in range(1, units + 1)]
    fits = [(n, s) for n, s in pairs if fixed + n * multiple * b + s * c <= budget]
    assert found.extra_steps == min(multiple * extra(units, s, n) for n, s in fits)


@given(st.integers(2, 10**6), st.integers(1, 10**5), st.integers(0, 10**5), st.floats(0, 1), st.sampled_from([1, 16]))
def test_large_plans_keep_to_the_budget(steps, b, c, share, multiple):
    low, high = min(steps * b, multiple * b + c), steps * b
    budget = int(low + (high - low) * share)
    found = plan(steps, b, c, budget, multiple=multiple)
    assert found.peak_bytes <= budget
    assert plan(steps, b, c, min(high, budget * 2), multiple=multiple).extra_steps <= found.extra_steps


@given(st.integers(1, 10**6), st.integers(1, 1000), st.integers(0, 1000), st.integers(1, 10**4))
def test_never_more_steps_than_with_a_state_stored_every_n_steps(steps, b, c, n):
    n = min(n, steps)
    states = -(-steps // n)
    found = plan(steps, b, c, n * b + states * c)
    assert found.forward_steps <= steps + (states - 1) * n
    assert found.forward_steps <= plan(steps, b, c, "sqrt").forward_steps or n * b + states * c < (
        plan(steps, b, c, "sqrt").peak_bytes
    )


@given(steps=st.integers(1, 300), b=sizes, c=sizes)
def test_sqrt_is_the_least_with_which_no_step_is_run_more_than_twice(steps, b, c):
    found = plan(steps, b, c, "sqrt")
    least = min(n * b + (-(-steps // n) - 1) * c for n in range(1, steps + 1))
    assert (found.peak_bytes, found.forward_steps) == counted(found) and found.peak_bytes == least
    runs = [0] * steps
    for action in found.actions():
        if isinstance(action, Advance | Leaf):
            for t in range(action.start, action.stop):
                runs[t] += 1
    assert max(runs) <= 2


@pytest.mark.parametrize("steps", [100, 1000, 10_000, 1_000_000])
def test_sqrt_for_an_lstm(steps):
    """Seven floats a unit on the tape, two in the state: at most 9 H sqrt(T) in all."""
    assert plan(steps, 7 * 128 * 4, 2 * 128 * 4, "sqrt").peak_bytes <= 9 * 128 * 4 * math.sqrt(steps)


@pytest.mark.parametrize("c", [1, 1000, 10**6])
@pytest.mark.parametrize("budget", [1 / 3, 1e-2, 1e-4, 1.1e-6])
def test_a_search_looks_at_few_plans(c, budget):
    with mock.patch.object(module, "extra", wraps=extra) as looked:
        plan(10**6, 1000, c, c + int(budget * 10**9))
    assert looked.call_count < 1000


@given(steps=st.integers(1, 200), n=st.integers(1, 210))
def test_every(steps, n):
    found = every(steps, n)
    assert counted(found)[1] == found.forward_steps
    starts = [a.start for a in found.actions() if isinstance(a, Leaf)]
    assert starts == list(range(0, steps, n))[::-1]


def test_auto_is_a_quarter_of_the_memory():
    with mock.patch.object(module, "_memory", lambda: 4000):
        assert plan(100, 10, 4).kind == "full"
        found = plan(101, 10, 4, "auto")
    assert found.kind == "revolve" and found.budget == 1000 and found == plan(101, 10, 4, 1000)
    assert module._memory() > 2**20


def test_full():
    found = plan(100, 10, 4, "full", fixed_bytes=7)
    assert (found.kind, found.peak_bytes, found.forward_steps, found.time_factor) == ("full", 1007, 100, 1.0)
    assert list(found.actions()) == [Leaf(0, 100)]
    assert plan(100, 0, 4, 1).kind == "full"  # nothing is kept at all


def test_the_table():
    text = str(plan(1_000_000, 3584, 1024, "16 MB"))
    title, header, *rows = text.splitlines()
    assert title == "1,000,000 steps that keep 3.58 kB each, states of 1.02 kB; budget 16.0 MB"
    assert header.split() == ["leaf", "slots", "peak", "forward", "steps", "time"]
    chosen = [row for row in rows if row.startswith(">")]
    assert [row.split() for row in chosen] == [
        [">", "revolve", "4,399", "227", "16.0", "MB", "1,995,601", "1.33x"]
    ]  # fmt: skip
    assert rows[0].split()[0] == "full" and sum(row.split()[0] == "sqrt" for row in rows) == 1
    steps = [int(row.removeprefix(">").split()[5].replace(",", "")) for row in rows]
    assert steps == sorted(steps) and len(rows) > 6
    assert len({len(line) for line in (header, *rows)}) == 1


@pytest.mark.parametrize("chosen", ["full", "sqrt", "auto", 5000, "1 kB"], ids=str)
def test_tables_mark_what_is_chosen(chosen):
    found = plan(1000, 100, 40, chosen)
    marked = [line for line in str(found).splitlines() if line.startswith(">")]
    assert len(marked) == 1 and marked[0].split()[1] == found.kind and f" {found.forward_steps:,} " in marked[0]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("64 MB", 64 * 10**6), ("64MB", 64 * 10**6), (" 1.5 GB ", 1_500_000_000), ("512 KiB", 2**19), ("1 kB", 1000),
        ("1 KB", 1000), ("0.1 MiB", 104857), ("2 TiB", 2**41), ("100 B", 100), (17, 17), ("0.3 GB", 300_000_000),
    ],
)  # fmt: skip
def test_sizes(text, expected):
    assert as_bytes(text) == expected


@pytest.mark.parametrize(
    ("count", "text"),
    [(0, "0 B"), (999, "999 B"), (1000, "1.00 kB"), (12345, "12.3 kB"), (123456, "123 kB"), (10**12 * 5000, "5000 TB")],
)
def test_bytes_are_shown(count, text):
    assert show_bytes(count) == text


BAD_SIZES = [
    "64",
    "64 mb",
    "64 Mb",
    "MB",
    "-1 MB",
    "1e6 B",
    "1,000 B",
    "1. MB",
    "64 MBs",
    "",
    0,
    -5,
    1.5,
    True,
    None,
    b"1 MB",
]


@pytest.mark.parametrize("size", BAD_SIZES, ids=repr)
def test_what_is_no_size(size):
    with pytest.raises(tt.InputError, match=r"(?s)plan: budget is .*help: .*'64 MB'"):
        plan(10, 1, 1, size)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"T": 0}, "T is 0"), ({"T": 1.5}, "T is 1.5"), ({"T": True}, "T is True"),
        ({"bytes_per_step": -1}, "bytes_per_step is -1"), ({"carry_bytes": "1"}, "carry_bytes is '1'"),
        ({"fixed_bytes": -1}, "fixed_bytes is -1"), ({"multiple": 0}, "multiple is 0"),
    ],
)  # fmt: skip
def test_bad_numbers(changed, words):
    with pytest.raises(tt.InputError, match=rf"(?s)plan: {words}.*help: "):
        plan(**{"T": 10, "bytes_per_step": 1, "carry_bytes": 1, **changed})


def test_a_budget_below_the_least_possible():
    least = 50 + 5 * 100 + 40
    assert plan(1000, 100, 40, least, fixed_bytes=50, multiple=5).peak_bytes == least
    words = r"budget of 589 bytes for 1,000 steps; the least possible is 590 bytes, .* 5 steps and 1 stored state\."
    with pytest.raises(tt.InputError, match=words):
        plan(1000, 100, 40, least - 1, fixed_bytes=50, multiple=5)
    with pytest.raises(tt.InputError, match="the least possible is 200 bytes, a tape of 2 steps and 0 stored states"):
        plan(2, 100, 1000, 199)
    with pytest.raises(tt.InputError, match="the least possible is 10 bytes"):
        plan(7, 0, 0, 9, fixed_bytes=10)


def test_plans_are_public():
    assert tt.loop.plan is plan and tt.loop.Plan is Plan
