"""Large products of arrays: against NumPy in a wider type, in every order of memory, and as `matmul` uses them."""

import os
import subprocess
import sys
import tracemalloc
from contextlib import contextmanager
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

import tinytape as tt
from tinytape.kernels import matmul as kernels
from tinytape.kernels import threads
from tinytape.ops import linalg

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="there are no kernels without compiled code")
both = pytest.mark.parametrize("dtype", ["float32", "float64"])
sides = st.sampled_from([1, 2, 5, 12, 13, 31, 32, 33, 64, 130, 255, 300]) | st.integers(1, 300)
depths = sides | st.sampled_from([256, 257, 511, 700, 1500, 5000])
ORDERS = ["plain", "transposed", "gaps", "reversed", "every second", "broadcast rows", "broadcast columns", "unaligned"]
orders = st.sampled_from(ORDERS)


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def laid_out(x, order):
    """A matrix of x's values (or, broadcast, of its first row or column) that lies in memory in a certain way."""
    m, n = x.shape
    match order:
        case "plain":
            return x.copy()
        case "transposed":
            return x.T.copy().T
        case "gaps":
            view = np.full((m, n + 3), np.nan, x.dtype)[:, 1 : n + 1]
        case "reversed":
            return x[::-1, ::-1].copy()[::-1, ::-1]
        case "every second":
            view = np.full((m, 2 * n), np.nan, x.dtype)[:, ::2]
        case "broadcast rows":
            return np.broadcast_to(x[:1].copy(), (m, n))
        case "broadcast columns":
            return np.broadcast_to(x[:, :1].copy(), (m, n))
        case "unaligned":
            view = np.zeros(x.nbytes + 1, np.uint8)[1:].view(x.dtype).reshape(m, n)
    view[...] = x
    return view


def assert_product(found, a, b, bias=0.0):
    """``a @ b + bias`` within the rounding error that any order of summation keeps."""
    wide = np.float64 if found.dtype == np.float32 else np.longdouble
    a, b, bias = a.astype(wide), b.astype(wide), np.asarray(bias, wide)
    assert found.shape == (len(a), b.shape[1])
    bound = (len(b) + 4) * np.finfo(found.dtype).eps * (abs(a) @ abs(b) + abs(bias))
    assert np.all(abs(found - (a @ b + bias)) <= bound)


@contextmanager
def cut_small(count):
    """Cut small products into parts too, for so many threads."""
    before = threads.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kernels, "_WORK", 1 << 12)
        patch.setattr(kernels, "_SIDE", 8)
        threads.set_num_threads(count)
        try:
            yield
        finally:
            threads.set_num_threads(before)


@both
@given(m=sides, k=depths, n=sides, order_a=orders, order_b=orders, seed=st.integers(0, 2**32 - 1))
def test_product(dtype, m, k, n, order_a, order_b, seed):
    a = laid_out(numbers(seed, m, k).astype(dtype), order_a)
    b = laid_out(numbers(seed + 1, k, n).astype(dtype), order_b)
    kept = a.copy(), b.copy()
    with cut_small(3):
        found, again = kernels.matmul(a, b), kernels.matmul(a, b)
    assert found.dtype == dtype
    assert found.base is None and found.flags.c_contiguous and found.flags.writeable
    assert_product(found, a, b)
    np.testing.assert_array_equal(again, found)
    np.testing.assert_array_equal(a, kept[0])
    np.testing.assert_array_equal(b, kept[1])


@both
@given(
    m=sides,
    k=depths,
    n=sides,
    order_a=orders,
    order_b=orders,
    apart=st.sampled_from([1, 2, -1, 0]),
    count=st.sampled_from([1, 3]),
    seed=st.integers(0, 2**32 - 1),
)
def test_product_with_a_bias(dtype, m, k, n, order_a, order_b, apart, count, seed):
    a = laid_out(numbers(seed, m, k).astype(dtype), order_a)
    b = laid_out(numbers(seed + 1, k, n).astype(dtype), order_b)
    line = numbers(seed + 2, 2 * n).astype(dtype)
    bias = np.lib.stride_tricks.as_strided(line[n:] if apart < 0 else line, (n,), (apart * line.itemsize,))
    kept = bias.copy()
    with cut_small(count):
        found, again, plain = kernels.matmul(a, b, bias), kernels.matmul(a, b, bias), kernels.matmul(a, b)
    assert_product(found, a, b, bias)
    np.testing.assert_array_equal(again, found)
    np.testing.assert_array_equal(bias, kept)
    if k <= 128 and count == 1:  # the sums are taken at a stretch, and not in parts with the bias in the first
        np.testing.assert_array_equal(found, plain + bias)


@pytest.mark.parametrize("shape", [(400, 200, 1000), (40, 9000, 20), (1000, 40, 20), (300, 300, 300), (1, 1, 1)])
@pytest.mark.parametrize("count", [1, 2, 3, 8])
def test_cuts_cover_the_product_once(shape, count):
    m, k, n = shape
    with cut_small(count):
        rows, columns, sums = kernels._cuts(m, n, k)
    for cuts, length in ((rows, m), (columns, n), (sums, k)):
        assert [i for cut in cuts for i in range(length)[cut]] == list(range(length))
        assert all(cut.start < cut.stop for cut in cuts)
    parts = len(rows) * len(columns) * len(sums)
    assert parts == 1 if count == 1 else parts <= kernels._SHARES * count
    if count == 8:
        assert parts > 8 or m * n * k == 1
        assert (len(sums) > 1) == (k > 4 * max(m, n)), "sums are cut where they are far longer than the result"


def test_not_a_number_and_infinity():
    a, b = np.ones((40, 300), np.float32), np.ones((300, 40), np.float32)
    a[3, 7], b[5, 9], b[8, 11] = np.nan, np.inf, 3e38
    b[9, 11] = 3e38
    found = kernels.matmul(a, b)
    assert np.isnan(found[3]).all()
    rest = np.delete(found, 3, axis=0)
    assert np.all(rest[:, 9] == np.inf) and np.all(rest[:, 11] == np.inf)
    assert np.all(np.delete(rest, [9, 11], axis=1) == 300)


# ---- as an op -------------------------------------------------------------------------------------------------------


@pytest.fixture
def asked(monkeypatch):
    """The shapes that the kernels are asked to multiply, with a threshold that small ones pass."""
    shapes, real = [], kernels.matmul

    def matmul(a, b, bias=None):
        shapes.append((a.shape, b.shape))
        return real(a, b, bias)

    monkeypatch.setattr(kernels, "matmul", matmul)
    monkeypatch.setattr(kernels, "is_quicker", lambda m, k, n: True)
    monkeypatch.setattr(linalg, "LEAST", 1)
    return shapes


@both
def test_matmul_and_its_gradients(asked, dtype):
    x, w = numbers(0, 3, 20, 30).astype(dtype), numbers(1, 50, 30).astype(dtype)
    left, right = tt.tensor(x, requires_grad=True), tt.tensor(w, requires_grad=True)
    y = left @ right.T
    g = numbers(2, *y.shape).astype(dtype)
    y.backward(g)
    assert asked == [((60, 30), (30, 50)), ((60, 50), (50, 30)), ((50, 60), (60, 30))]
    assert_product(y.data.reshape(60, 50), x.reshape(60, 30), w.T)
    assert_product(left.grad.data.reshape(60, 30), g.reshape(60, 50), w)
    assert_product(right.grad.data, g.reshape(60, 50).T, x.reshape(60, 30))
    assert right.grad.data.flags.c_contiguous


def test_second_order(asked):
    x, w = tt.tensor(numbers(0, 4, 5), requires_grad=True), tt.tensor(numbers(1, 6, 5), requires_grad=True)
    tt.check_grads(lambda x, w: tt.tanh(x @ w.T), (x, w), order=2)
    assert asked


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (np.ones((4, 5), "f4"), np.ones((5, 3), "f8")),
        (np.ones((4, 5), "i8"), np.ones((5, 3), "i8")),
        (np.ones((4, 5), "f2"), np.ones((5, 3), "f2")),
        (np.ones((4, 5), ">f4"), np.ones((5, 3), ">f4")),
    ],
)
def test_other_dtypes_are_left_to_numpy(asked, a, b):
    assert np.all(tt.matmul(a, b) == 5)
    assert not asked


@pytest.mark.parametrize("shape", [(0, 5, 3), (4, 0, 3), (4, 5, 0)])
def test_empty_products_are_left_to_numpy(asked, shape):
    m, k, n = shape
    np.testing.assert_array_equal(tt.matmul(np.ones((m, k)), np.ones((k, n))), np.zeros((m, n)))
    assert not asked


def test_shapes_that_do_not_fit_are_refused(asked):
    with pytest.raises(tt.ShapeError, match="last axis, 5, must be as long as"):
        tt.tensor(np.ones((4, 5))) @ np.ones((6, 3))
    assert not asked


def test_where_kernels_are_quicker():
    assert kernels.is_quicker(512, 512, 512)
    assert not kernels.is_quicker(1, 1 << 14, 1 << 14), "packing a matrix for one row takes longer than multiplying"
    assert not kernels.is_quicker(64, 64, 64)


def fresh(code, **environment):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True)
    return done.stdout.strip()


LARGE = "import sys, numpy as np, tinytape as tt; x = tt.ones((600, 600)); assert float((x @ x).sum()) == 600.0**3; "


def test_a_product_alone_does_not_import_numba():
    assert fresh(LARGE + "print('numba' in sys.modules)") == "False"


def test_without_the_compiler():
    assert fresh("import numba; " + LARGE + "print('ok')", NUMBA_DISABLE_JIT="1") == "ok"


# ---- a linear layer -------------------------------------------------------------------------------------------------


def composed(x, w, b):
    return x @ w.T + b


@pytest.mark.parametrize("lead", [(4,), (2, 3), (0,), (2, 1, 3)])
def test_linear_is_a_product_and_a_sum(lead):
    arguments = numbers(0, *lead, 5), numbers(1, 6, 5), numbers(2, 6)
    g = numbers(3, *lead, 6)
    found = []
    for f in (tt.nn.functional.linear, composed):
        x, w, b = (tt.tensor(value, requires_grad=True) for value in arguments)
        y = f(x, w, b)
        y.backward(g)
        found.append([y.data, x.grad.data, w.grad.data, b.grad.data])
    for ours, plain in zip(*found, strict=True):
        np.testing.assert_allclose(ours, plain, rtol=1e-13, atol=1e-13)


@both
@pytest.mark.parametrize("lead", [(40,), (2, 30), (3, 1, 20)])
def test_linear_by_kernels_has_the_bits_of_a_product_and_a_sum(asked, dtype, lead):
    values = [numbers(i, *shape).astype(dtype) for i, shape in enumerate([(*lead, 50), (60, 50), (60,)])]
    g, found = numbers(3, *lead, 60).astype(dtype), []
    for f in (tt.nn.functional.linear, composed):
        x, w, b = (tt.tensor(value, requires_grad=True) for value in values)
        y = f(x, w, b)
        y.backward(g)
        found.append([y.data, x.grad.data, w.grad.data, b.grad.data])
    assert len(asked) == 6
    for ours, plain in zip(*(arrays[:3] for arrays in found), strict=True):
        np.testing.assert_array_equal(ours, plain)
    rows = np.prod(lead)
    assert_product(found[0][3][None], np.ones((1, rows), dtype), g.reshape(rows, 60))


def test_linear_by_kernels_has_all_derivatives(asked):
    f = lambda x, w, b: tt.tanh(tt.nn.functional.linear(x, w, b))  # noqa: E731
    tt.check_grads(f, (numbers(0, 2, 3, 4), numbers(1, 5, 4), numbers(2, 5)), order=2)
    assert asked


@pytest.mark.parametrize("count", [1, 2])
def test_a_large_layer_gives_the_same_bits_in_every_run(count):
    before, found = threads.get_num_threads(), []
    x, w, b = (tt.tensor(numbers(i, *s).astype("f4"), requires_grad=True) for i, s in enumerate(LAYER))
    g = numbers(3, LAYER[0][0], LAYER[1][0]).astype("f4")
    try:
        threads.set_num_threads(count)
        for _ in range(3):
            y = tt.nn.functional.linear(x, w, b)
            y.backward(g)
            found.append([y.data, x.grad.data, w.grad.data, b.grad.data])
            x.grad = w.grad = b.grad = None
    finally:
        threads.set_num_threads(before)
    for again in found[1:]:
        for one, other in zip(found[0], again, strict=True):
            np.testing.assert_array_equal(one, other)


LAYER = [(300, 100), (7000, 100), (7000,)]


def test_linear_has_all_derivatives():
    f = lambda x, w, b: tt.tanh(tt.nn.functional.linear(x, w, b))  # noqa: E731
    tt.check_grads(f, (numbers(0, 2, 3, 4), numbers(1, 5, 4), numbers(2, 5)), order=2)


@pytest.mark.parametrize("shape", [(6,), (1,), ()])
@pytest.mark.parametrize("dtypes", [("f4", "f4", "f4"), ("f4", "f4", "f8"), ("f4", "f8", "f4"), ("i8", "f4", "f4")])
def test_linear_broadcasts_and_promotes_as_its_parts_do(shape, dtypes):
    values = np.ones((3, 5)), np.ones((6, 5)), np.ones(shape)
    x, w, b = (tt.tensor(value.astype(dtype)) for value, dtype in zip(values, dtypes, strict=True))
    found, plain = tt.nn.functional.linear(x, w, b), composed(x, w, b)
    assert found.dtype == plain.dtype and found.tolist() == plain.tolist()


def test_a_layers_gradients_are_taken_over_without_a_copy():
    """Beyond the product itself, the backward pass of a layer makes no second array as large as its weight."""
    layer = tt.nn.Linear(500, 400)
    y = layer(tt.ones((8, 500)))
    g = np.ones(y.shape, y.dtype)
    tracemalloc.start()
    try:
        y.backward(g)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert layer.weight.grad.data.nbytes <= peak < 1.5 * layer.weight.data.nbytes
