"""What a scan is compiled to: what is kept, hoisted and refused, as `explain` tells it."""

import numpy as np
import pytest

import tinytape as tt
from tinytape import nn

ROWS, INPUTS, HIDDEN, STEPS = 3, 4, 5, 6


def explained(cell, carries=1, dtype=np.float32):
    def step(state, x):
        after = cell(x, state)
        return after, after[0] if carries > 1 else after

    init = [np.zeros((ROWS, HIDDEN), dtype) for _ in range(carries)]
    return tt.scan.explain(step, tuple(init) if carries > 1 else init[0], np.zeros((STEPS, ROWS, INPUTS), dtype))


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(
    "make, carries, floats",
    [
        (nn.RNNCell, 1, 0),  # tanh' is told from the output
        (nn.GRUCell, 1, 4),  # r, z, n and the product that r acts on
        (nn.LSTMCell, 2, 5),  # the four activations and the cell; h is the output
    ],
)
def test_what_is_kept_is_the_least_there_is(make, carries, floats, dtype):
    found = explained(make(INPUTS, HIDDEN, dtype=dtype), carries, dtype)
    assert found.reason is None
    assert found.kept_bytes == floats * HIDDEN * np.dtype(dtype).itemsize


def test_what_a_row_is_summed_up_to_is_kept():
    wide, scale = 32, tt.tensor(np.ones(32, np.float32), requires_grad=True)

    def step(h, x):
        centred = x + h - (x + h).mean(axis=-1, keepdims=True)
        h = tt.tanh(scale * centred / tt.sqrt((centred * centred).mean(axis=-1, keepdims=True)))
        return h, h

    found = tt.scan.explain(step, np.zeros((ROWS, wide), np.float32), np.zeros((STEPS, ROWS, wide), np.float32))
    assert 0 < found.kept_bytes <= 4 * 4  # the carry and x are there, and it takes two numbers more
    assert " sum" not in str(found).partition("computed again")[2]


def test_flops_are_those_of_the_products_and_little_more():
    found = explained(nn.LSTMCell(INPUTS, HIDDEN), 2)
    products = 2 * 4 * HIDDEN * (INPUTS + HIDDEN)
    elementwise = found.forward_flops - products
    assert 0 < elementwise <= 20 * HIDDEN
    # dh and both weights; dx is not asked for
    assert found.backward_flops - products - 2 * 4 * HIDDEN * HIDDEN <= 60 * HIDDEN


def test_the_page_names_loops_products_and_lines():
    text = str(explained(nn.LSTMCell(INPUTS, HIDDEN), 2))
    for part in ("for a block of steps at once", f"product, {HIDDEN} x {4 * HIDDEN}", f"one loop over {HIDDEN}:",
                 "sigmoid", "adjoint of tanh", "kept for the adjoint", "bytes a step and row", "flops",
                 "test_explain.py"):  # fmt: skip
        assert part in text, part


def test_both_sources_can_be_had():
    found = explained(nn.GRUCell(INPUTS, HIDDEN))
    assert "def forward(init, xs, fixed, weights):" in found.numpy and "def backward(" in found.numpy
    assert "def forward(numbers, bases, table):" in found.numba and "product(" in found.numba
    compile(found.numpy, "numpy", "exec")
    compile(found.numba, "numba", "exec")


def test_no_adjoint_without_anything_to_differentiate():
    with tt.no_grad():
        found = explained(nn.LSTMCell(INPUTS, HIDDEN), 2)
    assert found.reason is None and found.kept_bytes == 0 and found.backward_flops == 0
    assert "backward" not in str(found)


def branching(h, x):
    if (h > 0).any():
        h = h * 2
    return h + x, None


def mixing(h, x):
    return tt.sort(h, axis=0) + x, None


@pytest.mark.parametrize("step, words", [(branching, "bool()"), (mixing, "sort")])
def test_the_reason_names_the_op_and_the_line(step, words):
    init, xs = np.zeros((ROWS, 4), np.float32), np.ones((STEPS, ROWS, 4), np.float32)
    found = tt.scan.explain(step, init, xs)
    assert words in found.reason and "test_explain.py:" in found.reason
    assert str(found.reason) in str(found)
    with pytest.raises(tt.InputError, match=words.replace("(", r"\(").replace(")", r"\)")):
        tt.scan(step, init, xs, compiled=True)


def test_auto_runs_what_cannot_be_compiled_and_says_so_once(caplog):
    def odd(h, x):
        return tt.sort(h, axis=-1) + x, None

    init, xs = np.zeros((ROWS, 4), np.float32), np.ones((STEPS, ROWS, 4), np.float32)
    with caplog.at_level("WARNING", "tinytape.compile"):
        first, _ = tt.scan(odd, init, xs)
        tt.scan(odd, init, xs)
    np.testing.assert_array_equal(first.data, STEPS)
    assert len([r for r in caplog.records if "step by step" in r.getMessage()]) == 1
