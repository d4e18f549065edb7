"""Matrix products of kernels: against NumPy in long double, at every edge, and at the edge of mapped memory."""

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from tinytape.kernels import processor
from tinytape.kernels.product import bind
from tinytape.kernels.tiles import VECTORS

ROOT = Path(__file__).resolve().parent.parent
pytestmark = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="there are no products without compiled code")
both = pytest.mark.parametrize("dtype", ["float32", "float64"])

# Around multiples of a vector, a panel and a tile of every machine, and beyond the depths that products are cut in.
EDGES = [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 15, 16, 17, 24, 25, 31, 32, 33, 50, 63, 64, 65, 77, 128, 129, 200]
sizes = st.sampled_from(EDGES) | st.integers(0, 80)
depths = sizes | st.sampled_from([255, 256, 257, 300, 513, 600])
gaps = st.integers(0, 3)
flags = st.sampled_from([0, 1])
seeds = st.integers(0, 2**32 - 1)


class Sheet(NamedTuple):
    """A matrix of steps x rows x columns in a larger block of memory."""

    block: np.ndarray
    values: np.ndarray

    @property
    def address(self):
        return self.values.__array_interface__["data"][0]

    @property
    def strides(self):
        return [stride // self.values.itemsize for stride in self.values.strides]

    def rest(self):
        """What lies around the matrix."""
        around = self.block.copy()
        inside = np.lib.stride_tricks.as_strided(around[self.start() :], self.values.shape, self.values.strides)
        inside[...] = 0
        return around

    def start(self):
        return (self.address - self.block.ctypes.data) // self.block.itemsize


def sheet(values, dtype, draw=lambda strategy: 0, fill=np.nan):
    """The values with drawn gaps before them and after every row and step, filled with NaN."""
    steps, rows, columns = values.shape
    row = columns + draw(gaps)
    step = rows * row + draw(gaps)
    start = draw(gaps)
    block = np.full(start + steps * step + 3, fill, dtype)
    strides = [stride * block.itemsize for stride in (step, row, 1)]
    inside = np.lib.stride_tricks.as_strided(block[start:], values.shape, strides)
    inside[...] = values
    return Sheet(block, inside)


def numbers(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape)


def assert_sums(found, start, a, b):
    """``start + a @ b`` within the rounding error that any order of summation keeps."""
    assert found.shape == start.shape
    unit = np.finfo(found.dtype).eps
    start, a, b = (x.astype(np.float64 if found.dtype == np.float32 else np.longdouble) for x in (start, a, b))
    bound = (a.shape[-1] + 3) * unit * (abs(start) + abs(a) @ abs(b))
    assert np.all(abs(found - (start + a @ b)) <= bound)


def packed(kernels, b, dtype, guard=4):
    """The packed form of a matrix of any strides, which must not be written beyond its size."""
    size = kernels.packed_size(*b.shape)
    out = np.full(size + guard, 7, dtype)
    kernels.pack(*b.shape, b.ctypes.data, *(stride // b.itemsize for stride in b.strides), out.ctypes.data)
    assert np.all(out[size:] == 7)
    return out[:size]


# ---- packing --------------------------------------------------------------------------------------------------------


def orders(b):
    """One matrix with contiguous rows, with contiguous columns, and with neither."""
    k, n = b.shape
    rows, columns = np.full((k, n + 3), np.nan, b.dtype), np.full((n, k + 3), np.nan, b.dtype)
    neither = np.full((k + 1, n + 1, 2), np.nan, b.dtype)
    views = rows[:, :n], columns[:, :k].T, neither[:k, :n, 1]
    for view in views:
        view[...] = b
    return views


def panels_of(b, dtype):
    """What packing means, in NumPy."""
    lanes = processor.LANES[np.dtype(dtype).itemsize]
    k, n = b.shape
    padded = np.zeros((k, -(-n // lanes) * lanes), dtype)
    padded[:, :n] = b
    cuts = range(VECTORS * lanes, padded.shape[1], VECTORS * lanes)
    return np.concatenate([panel.ravel() for panel in np.split(padded, cuts, axis=1)])


@both
@given(k=depths, n=sizes, seed=seeds)
def test_packing(dtype, k, n, seed):
    kernels = bind(np.dtype(dtype).type)
    b = numbers(seed, k, n).astype(dtype)
    for view in orders(b):
        np.testing.assert_array_equal(packed(kernels, view, dtype), panels_of(b, dtype))


# ---- products -------------------------------------------------------------------------------------------------------


def multiplied(kernels, a, b, c, add):
    """What `product_steps` leaves in a copy of `c`."""
    steps, rows, k = a.values.shape
    n = b.shape[1]
    block = c.block.copy()
    out = Sheet(block, np.lib.stride_tricks.as_strided(block[c.start() :], c.values.shape, c.values.strides))
    panels = packed(kernels, b, c.values.dtype)
    kernels.product_steps(
        steps, rows, n, k, a.address, *a.strides[:2], panels.ctypes.data, out.address, *out.strides[:2], add
    )
    np.testing.assert_array_equal(out.rest(), c.rest())
    return out.values


@both
@given(steps=st.integers(0, 3), rows=sizes, n=sizes, k=depths, add=flags, seed=seeds, data=st.data())
def test_product(dtype, steps, rows, n, k, add, seed, data):
    kernels = bind(np.dtype(dtype).type)
    a = sheet(numbers(seed, steps, rows, k), dtype, data.draw)
    b = numbers(seed + 1, k, n).astype(dtype)
    c = sheet(numbers(seed + 2, steps, rows, n), dtype, data.draw)
    assert_sums(multiplied(kernels, a, b, c, add), c.values * add, a.values, b)


@both
@pytest.mark.parametrize("rows", range(26))
def test_every_tile(dtype, rows):
    kernels = bind(np.dtype(dtype).type)
    for n in range(VECTORS * processor.WIDTH // 4 + 2):
        a, b = sheet(numbers(n, 1, rows, 11), dtype), numbers(n + 1, 11, n).astype(dtype)
        c = sheet(numbers(n + 2, 1, rows, n), dtype)
        for add in (0, 1):
            assert_sums(multiplied(kernels, a, b, c, add), c.values * add, a.values, b)


@both
@pytest.mark.parametrize(("rows", "n", "k"), [(300, 70, 1000), (37, 133, 4200), (1, 140, 9000), (700, 5, 3)])
def test_product_cut_into_blocks(dtype, rows, n, k):
    kernels = bind(np.dtype(dtype).type)
    a, b = sheet(numbers(0, 1, rows, k), dtype), numbers(1, k, n).astype(dtype)
    c = sheet(numbers(2, 1, rows, n), dtype)
    assert_sums(multiplied(kernels, a, b, c, 1), c.values, a.values, b)


@both
def test_product_over_nothing_writes_zeros_or_adds_none(dtype):
    kernels = bind(np.dtype(dtype).type)
    a, b = sheet(np.zeros((2, 5, 0)), dtype), np.zeros((0, 37), dtype)
    c = sheet(numbers(0, 2, 5, 37), dtype)
    np.testing.assert_array_equal(multiplied(kernels, a, b, c, 0), 0)
    np.testing.assert_array_equal(multiplied(kernels, a, b, c, 1), c.values)


@both
@given(rows=st.integers(1, 30), n=st.integers(1, 70), k=st.integers(1, 40), seed=seeds, data=st.data())
def test_nan_and_infinity_go_where_they_belong(dtype, rows, n, k, seed, data):
    kernels = bind(np.dtype(dtype).type)
    special = st.sampled_from([np.nan, np.inf, -np.inf])
    a, b, c = numbers(seed, 1, rows, k), numbers(seed + 1, k, n).astype(dtype), numbers(seed + 2, 1, rows, n)
    a[0, data.draw(st.integers(0, rows - 1)), data.draw(st.integers(0, k - 1))] = data.draw(special)
    b[data.draw(st.integers(0, k - 1)), data.draw(st.integers(0, n - 1))] = data.draw(special)
    found = multiplied(kernels, sheet(a, dtype), b, sheet(c, dtype), 0)
    wanted = a.astype("d") @ b.astype("d")
    finite = np.isfinite(wanted)
    np.testing.assert_array_equal(found[~finite], wanted[~finite])
    assert np.isfinite(found[finite]).all()


@both
@given(rows=st.integers(1, 40), n=sizes, k=depths, seed=seeds, data=st.data())
def test_results_depend_on_nothing_but_values_and_sizes(dtype, rows, n, k, seed, data):
    kernels = bind(np.dtype(dtype).type)
    a, c, b = numbers(seed, 1, rows, k), numbers(seed + 1, 1, rows, n), numbers(seed + 2, k, n).astype(dtype)
    plain = multiplied(kernels, sheet(a, dtype), b, sheet(c, dtype), 1)
    moved = multiplied(kernels, sheet(a, dtype, data.draw), b, sheet(c, dtype, data.draw), 1)
    np.testing.assert_array_equal(moved, plain)


# ---- outer products and sums ----------------------------------------------------------------------------------------


def multiplied_outer(kernels, a, b, c, add):
    steps, rows, m = a.values.shape
    n = b.values.shape[2]
    block = c.block.copy()
    out = Sheet(block, np.lib.stride_tricks.as_strided(block[c.start() :], c.values.shape, c.values.strides))
    size = kernels.outer_scratch(steps * rows, m, n)
    scratch = np.full(size + 4, 7, c.values.dtype)
    operands = [a.address, *a.strides[:2], b.address, *b.strides[:2], out.address, out.strides[1]]
    kernels.outer_product(steps, rows, m, n, *operands, add, scratch.ctypes.data)
    assert np.all(scratch[size:] == 7)
    np.testing.assert_array_equal(out.rest(), c.rest())
    return out.values[0]


def rows_of(x):
    """All rows of all steps."""
    steps, rows, columns = x.values.shape
    return x.values.reshape(steps * rows, columns)


@both
@given(steps=st.integers(0, 4), rows=sizes, m=sizes, n=sizes, add=flags, seed=seeds, data=st.data())
def test_outer_product(dtype, steps, rows, m, n, add, seed, data):
    kernels = bind(np.dtype(dtype).type)
    a = sheet(numbers(seed, steps, rows, m), dtype, data.draw)
    b = sheet(numbers(seed + 1, steps, rows, n), dtype, data.draw)
    c = sheet(numbers(seed + 2, 1, m, n), dtype, data.draw)
    assert_sums(multiplied_outer(kernels, a, b, c, add), c.values[0] * add, rows_of(a).T, rows_of(b))


@both
@given(k=st.integers(1, 700), m=st.integers(1, 700), n=sizes, data=st.data())
@example(k=96, m=256, n=64, data=93)
@example(k=94, m=416, n=104, data=93)
def test_scratch_is_enough_for_fewer_rows(dtype, k, m, n, data):
    kernels = bind(np.dtype(dtype).type)
    fewer = data if isinstance(data, int) else data.draw(st.integers(1, k))
    size = kernels.outer_scratch(k, m, n)
    scratch = np.full(size + 3000, 7, dtype)
    a, b, c = np.ones((fewer, m), dtype), np.ones((fewer, n), dtype), np.empty((m, n), dtype)
    at = [x.ctypes.data for x in (a, b, c, scratch)]
    kernels.outer_product(1, fewer, m, n, at[0], 0, m, at[1], 0, n, at[2], n, 0, at[3])
    assert np.all(scratch[size:] == 7)
    np.testing.assert_array_equal(c, fewer)


@both
@pytest.mark.parametrize("steps, rows, m, n", [(3, 600, 70, 40), (90, 20, 300, 150), (999, 1, 20, 33), (2, 1500, 5, 3)])
@pytest.mark.parametrize("add", [0, 1])
def test_outer_product_cut_into_blocks(dtype, steps, rows, m, n, add):
    kernels = bind(np.dtype(dtype).type)
    apart = iter([1, 2, 0, 3, 1, 2, 0, 2, 1])
    a = sheet(numbers(0, steps, rows, m), dtype, lambda _: next(apart))
    b = sheet(numbers(1, steps, rows, n), dtype, lambda _: next(apart))
    c = sheet(numbers(2, 1, m, n), dtype, lambda _: next(apart))
    assert_sums(multiplied_outer(kernels, a, b, c, add), c.values[0] * add, rows_of(a).T, rows_of(b))


@both
@given(steps=st.integers(0, 4), rows=sizes, n=sizes, add=flags, seed=seeds, data=st.data())
def test_column_sums(dtype, steps, rows, n, add, seed, data):
    kernels = bind(np.dtype(dtype).type)
    a = sheet(numbers(seed, steps, rows, n), dtype, data.draw)
    out = sheet(numbers(seed + 1, 1, 1, n), dtype, data.draw)
    start, around = out.values[0].copy(), out.rest()
    kernels.column_sums(steps, rows, n, a.address, *a.strides[:2], out.address, add)
    np.testing.assert_array_equal(out.rest(), around)
    assert_sums(out.values[0], start * add, np.ones((1, steps * rows)), rows_of(a))


@both
def test_column_sums_of_infinities(dtype):
    a = sheet(np.where(np.arange(40) % 2, np.inf, 1.0) * np.ones((2, 3, 1)), dtype)
    a.values[1, 2, 1] = -np.inf
    out = np.zeros(40, dtype)
    bind(np.dtype(dtype).type).column_sums(2, 3, 40, a.address, *a.strides[:2], out.ctypes.data, 0)
    np.testing.assert_array_equal(out, a.values.sum((0, 1)))


# ---- other processes ------------------------------------------------------------------------------------------------


def fresh(code, **environment):
    """What a fresh interpreter prints for a program."""
    settings = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, f"exit status {done.returncode}\n{done.stderr}"
    return done.stdout.strip()


# Every matrix ends where its page ends or begins where it begins, with pages around it that must not be touched.
GUARDED = """
import ctypes, mmap, sys
import numpy as np
from tinytape.kernels.product import bind

libc = ctypes.CDLL(None, use_errno=True)
page = mmap.PAGESIZE
held = []

def guarded(values, at_end):
    nbytes = -(-max(1, values.nbytes) // page) * page
    block = mmap.mmap(-1, nbytes + 2 * page)
    held.append(block)
    base = ctypes.addressof(ctypes.c_char.from_buffer(block))
    start = base + page + (nbytes - values.nbytes if at_end else 0)
    ctypes.memmove(start, values.ctypes.data, values.nbytes)
    for wall in (base, base + page + nbytes):
        assert libc.mprotect(ctypes.c_void_p(wall), ctypes.c_size_t(page), 0) == 0
    return start

def back(address, like):
    out = np.empty_like(like)
    ctypes.memmove(out.ctypes.data, address, out.nbytes)
    return out

rng = np.random.default_rng(0)
for dtype in (np.float32, np.float64):
    kernels = bind(dtype)
    for m, n, k in [(1, 1, 1), (3, 5, 7), (13, 17, 19), (12, 33, 50), (25, 77, 31), (5, 16, 260)]:
        a, b = rng.standard_normal((m, k)).astype(dtype), rng.standard_normal((k, n)).astype(dtype)
        d, c = rng.standard_normal((m, n)).astype(dtype), np.zeros((m, n), dtype)
        for at_end in (True, False):
            at = lambda x: guarded(np.ascontiguousarray(x), at_end)
            spread = np.stack([b, b], 2)
            for source, strides in [(b, (n, 1)), (b.T, (1, k)), (spread, (2 * n, 2))]:
                panels = at(np.zeros(kernels.packed_size(k, n), dtype))
                kernels.pack(k, n, at(source), *strides, panels)
                for add in (0, 1):
                    out = at(c)
                    kernels.product(m, n, k, at(a), k, panels, out, n, add)
                    assert np.allclose(back(out, c), a @ b, atol=1e-3)
            scratch = at(np.zeros(kernels.outer_scratch(m, k, n), dtype))
            for add in (0, 1):
                out = at(np.zeros((k, n), dtype))
                kernels.outer_product(1, m, k, n, at(a), 0, k, at(d), 0, n, out, n, add, scratch)
                assert np.allclose(back(out, b), a.T @ d, atol=1e-3)
                out = at(np.zeros(n, dtype))
                kernels.column_sums(1, m, n, at(d), 0, n, out, add)
                assert np.allclose(back(out, d[0]), d.sum(0), atol=1e-3)
print("untouched")
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="protects pages by a call of Linux")
def test_no_memory_outside_is_touched():
    assert fresh(GUARDED) == "untouched"


CALLER = """
import numpy as np
from numba import njit
from tinytape.kernels.product import bind

products = bind(np.float32)
pack, packed_size, product = products.pack, products.packed_size, products.product

@njit(cache=True)
def kernel(m, n, k, a, b, scratch, c):
    pack(k, n, b, n, 1, scratch)
    product(m, n, k, a, k, scratch, c, n, 0)
    return packed_size(k, n)
"""

USE = """
import sys, numpy as np
sys.path.insert(0, {folder!r})
import caller
a, b, c = np.ones((5, 9), "f"), np.ones((9, 20), "f"), np.zeros((5, 20), "f")
scratch = np.zeros(9 * 64, "f")
caller.kernel(5, 20, 9, *(x.ctypes.data for x in (a, b, scratch, c)))
print((c == 9).all(), *(sum(x.values()) for x in (caller.kernel.stats.cache_hits, caller.kernel.stats.cache_misses)))
"""


def test_kernels_that_call_products_are_cached(tmp_path):
    (tmp_path / "caller.py").write_text(CALLER)
    program = USE.format(folder=str(tmp_path))
    settings = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert fresh(program, **settings) == "True 0 1"
    assert fresh(program, **settings) == "True 1 0"


def test_import_without_the_compiler():
    assert fresh("from tinytape.kernels import product; print('ok')", NUMBA_DISABLE_JIT="1") == "ok"


NARROWER = {
    "avx2": {
        "NUMBA_CPU_NAME": "haswell",
        "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx,+sse4.2,+sse4.1,+ssse3,+sse3,+popcnt,+bmi,+bmi2,+f16c,+lzcnt,+movbe,"
        "-avx512f,-avx512vl,-avx512dq,-avx512bw,-avx512cd",
    },
    "sse": {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse4.2,+sse4.1,+ssse3,+sse3,+popcnt,-avx"},
}


@pytest.mark.slow
@pytest.mark.parametrize("vectors", NARROWER)
def test_narrower_vectors(vectors, tmp_path):
    """This whole file, with code for processors of less width."""
    if platform.machine() not in ("x86_64", "AMD64") or {"avx2": 32, "sse": 16}[vectors] > processor.WIDTH:
        pytest.skip("this processor has no such vectors")
    settings = {**os.environ, **NARROWER[vectors], "NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=settings)
    assert done.returncode == 0, done.stdout
