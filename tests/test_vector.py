"""The vector type: memory, lanes, operators, the code that comes of it, the cache, and the machine's features."""

import operator
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numba
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numba import njit

from tinytape.kernels import processor
from vectors import DTYPES, of, over

ROOT = Path(__file__).resolve().parent.parent
HASWELL = {
    "NUMBA_CPU_NAME": "haswell",
    "NUMBA_CPU_FEATURES": "+avx2,+fma,+avx,+sse4.2,+sse4.1,+ssse3,+sse3,+popcnt,+bmi,+bmi2,+f16c,+lzcnt,+movbe,"
    "-avx512f,-avx512vl,-avx512dq,-avx512bw,-avx512cd",
}
NEHALEM = {"NUMBA_CPU_NAME": "nehalem", "NUMBA_CPU_FEATURES": "+sse4.2,+sse4.1,+ssse3,+sse3,+popcnt,-avx"}

both = pytest.mark.parametrize("dtype", DTYPES)
compiled = pytest.mark.skipif(numba.config.DISABLE_JIT, reason="vectors exist in compiled code only")


def fresh(code, **environment):
    """What a fresh interpreter prints for a program."""
    command = [sys.executable, "-c", code]
    settings = {**os.environ, **environment}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, env=settings)
    return done.stdout.strip()


# ---- memory ---------------------------------------------------------------------------------------------------------


def kernels(dtype):
    """Each function of memory, as a function on addresses."""
    m = of(dtype)
    load, store, strided, store_strided = m.load, m.store, m.strided, m.store_strided
    get, put = m.get, m.put

    @njit
    def copy(source, j, out, k, n):
        store(out, k, load(source, j, n), n)

    @njit
    def copy_strided(source, j, stride, out, k, out_stride, n):
        store_strided(out, k, out_stride, strided(source, j, stride, n), n)

    @njit
    def load_all(source, j, out, n):
        store(out, 0, load(source, j, n), m_lanes)

    @njit
    def numbers(source, j, out, k):
        put(out, k, get(source, j))

    m_lanes = m.LANES
    return copy, copy_strided, load_all, numbers


@compiled
@both
def test_memory(dtype):
    copy, copy_strided, load_all, numbers = kernels(dtype)
    lanes = of(dtype).LANES
    source = np.arange(1, 501, dtype=dtype)

    @given(st.integers(1, lanes), st.integers(0, 20), st.integers(0, 20), st.integers(-9, 9), st.integers(1, 9))
    def check(n, j, k, stride, out_stride):
        out = np.zeros(300, dtype)
        copy(source.ctypes.data, j, out.ctypes.data, k, n)
        expected = np.zeros(300, dtype)
        expected[k : k + n] = source[j : j + n]
        np.testing.assert_array_equal(out, expected)

        out[:], expected[:] = 0, 0
        copy_strided(source.ctypes.data, j + 200, stride, out.ctypes.data, k, out_stride, n)
        expected[k : k + n * out_stride : out_stride] = source[j + 200 + stride * np.arange(n)]
        np.testing.assert_array_equal(out, expected)

        out[:] = -1
        load_all(source.ctypes.data, j, out.ctypes.data, n)
        np.testing.assert_array_equal(out[:lanes], np.where(np.arange(lanes) < n, source[j : j + lanes], 0))

        out[:] = 0
        numbers(source.ctypes.data, j, out.ctypes.data, k)
        assert out[k] == source[j] and np.count_nonzero(out) == 1

    check()


@compiled
@both
def test_partial_vectors_at_the_end_of_a_page(dtype):
    """What lies beyond the valid lanes is not touched: here it would be a segmentation fault."""
    mmap = pytest.importorskip("mmap")
    if not hasattr(mmap, "PROT_READ") or sys.platform != "linux":
        pytest.skip("protects a page through the C library of Linux")
    import ctypes

    page = mmap.PAGESIZE
    memory = mmap.mmap(-1, 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    libc = ctypes.CDLL(None, use_errno=True)
    second = ctypes.c_void_p(start + page)
    assert libc.mprotect(second, ctypes.c_size_t(page), 0) == 0
    try:
        size = np.dtype(dtype).itemsize
        copy, copy_strided, *_ = kernels(dtype)
        for n in range(1, of(dtype).LANES + 1):
            copy(start + page - n * size, 0, start + page - n * size, 0, n)
            copy_strided(start + page - (3 * n - 2) * size, 0, 3, start + page - (3 * n - 2) * size, 0, 3, n)
    finally:
        libc.mprotect(second, ctypes.c_size_t(page), mmap.PROT_READ | mmap.PROT_WRITE)


# ---- lanes ----------------------------------------------------------------------------------------------------------


def tree(values, combine):
    """Lane i with lane i + L/2, and so on."""
    while values.size > 1:
        values = combine(values[: values.size // 2], values[values.size // 2 :])
    return values[0]


@compiled
@both
def test_reductions(dtype):
    m = of(dtype)
    load, only, total, largest, smallest = m.load, m.only, m.total, m.largest, m.smallest

    @njit
    def reduce(a, n):
        v = load(a, 0, n)
        return total(v), largest(only(v, n, -np.inf)), smallest(only(v, n, np.inf))

    rng = np.random.default_rng(1)
    for n in [*range(1, m.LANES + 1), m.LANES]:
        values = (rng.normal(size=n) * 10.0 ** rng.integers(-4, 5, n)).astype(dtype)
        padded = np.zeros(m.LANES, dtype)
        padded[:n] = values
        got = reduce(values.ctypes.data, n)
        assert got == (tree(padded, np.add), values.max(), values.min())
    values[n // 2] = np.nan
    assert np.isnan(reduce(values.ctypes.data, n)).all()


@compiled
@both
def test_fill(dtype):
    m = of(dtype)
    fill, store, lanes = m.fill, m.store, m.LANES

    @njit
    def make(out, x):
        store(out, 0, fill(x), lanes)

    out = np.empty(lanes, dtype)
    make(out.ctypes.data, 0.1)
    np.testing.assert_array_equal(out, np.full(lanes, 0.1, dtype))


@compiled
@both
@pytest.mark.parametrize("symbol", [operator.add, operator.sub, operator.mul, operator.truediv])
def test_operators(symbol, dtype):
    a, b = np.random.default_rng(2).normal(size=(2, 37)).astype(dtype)
    number = np.dtype(dtype).type(0.1)

    np.testing.assert_array_equal(over(njit(lambda x, y: symbol(x, y)), dtype, 2)(a, b), symbol(a, b))
    np.testing.assert_array_equal(over(njit(lambda x: symbol(x, 0.1)), dtype)(a), symbol(a, number))
    np.testing.assert_array_equal(over(njit(lambda x: symbol(3, x)), dtype)(a), symbol(np.dtype(dtype).type(3), a))


@compiled
@both
def test_minus_and_in_place(dtype):
    @njit
    def function(x):
        y = -x
        y += x
        y -= 2.0 * x
        y *= x
        y /= 4.0
        return y

    a = np.random.default_rng(2).normal(size=37).astype(dtype)
    np.testing.assert_array_equal(over(function, dtype)(a), -(a * a) / 2)


@compiled
def test_functions_of_plain_numbers():
    m = of("float32")
    tanh, maximum, where = m.tanh, m.maximum, m.where

    @njit
    def function(x, y):
        return tanh(x), maximum(x, 0.5), where(x > y, x, 2.0)

    single = np.float32(0.3)
    got = function(single, np.float32(0.1))
    assert function.nopython_signatures[0].return_type == numba.types.UniTuple(numba.float32, 3)
    np.testing.assert_allclose(got, [np.tanh(0.3), 0.5, 0.3], rtol=3e-7)
    np.testing.assert_allclose(function(-0.3, 0.1), [np.tanh(-0.3), 0.5, 2.0], rtol=4e-16)


@compiled
def test_vectors_of_two_dtypes_do_not_mix():
    one, other = of("float32").fill, of("float64").fill

    @njit
    def function():
        return one(1.0) + other(1.0)

    with pytest.raises(numba.TypingError):
        function()


# ---- the code ------------------------------------------------------------------------------------------------------


@compiled
@both
def test_full_vectors_are_plain_moves_without_calls(dtype):
    m = of(dtype)
    load, store, tanh, sigmoid, lanes = m.load, m.store, m.tanh, m.sigmoid, m.LANES

    @njit
    def read(a, j, n):
        return load(a, j, n)

    @njit
    def kernel(out, n, a, b):
        for j in range(0, n, lanes):
            store(out, j, tanh(read(a, j, lanes)) * sigmoid(read(b, j, lanes)), lanes)

    x = np.zeros(4 * lanes, dtype)
    kernel(*[x.ctypes.data, x.size, x.ctypes.data, x.ctypes.data])
    (signature,) = kernel.signatures
    body = kernel.inspect_llvm(signature)
    element = {"float32": "float", "float64": "double"}[dtype]
    size = np.dtype(dtype).itemsize
    assert re.search(rf"load <{lanes} x {element}>, ptr %\S+ align {size}\b", body)
    assert re.search(rf"store <{lanes} x {element}> %\S+ ptr %\S+ align {size}\b", body)
    assert "@llvm.masked" not in body
    assert not re.search(r"call .*@(tanhf?|expf?|llvm\.exp)\b", body)


CACHED = """
import numba
from numba import njit
from tinytape.kernels.float32 import LANES, fill, load, store, tanh, total

@njit
def twice(v):
    return tanh(v) + tanh(v)

@njit(cache=True)
def kernel(a, n):
    sum_ = fill(0.0)
    for j in range(0, n, LANES):
        sum_ += twice(load(a, j, min(LANES, n - j)))
    return total(sum_)
"""

USE = """
import sys, numpy as np
sys.path.insert(0, {folder!r})
import cached
x = np.linspace(-3, 4, 45, dtype="f")
total = cached.kernel(x.ctypes.data, x.size)
print(abs(total - 2 * np.tanh(x.astype("d")).sum()) < 1e-5, sum(cached.kernel.stats.cache_hits.values()),
      sum(cached.kernel.stats.cache_misses.values()))
"""


@compiled
def test_kernels_in_other_files_are_cached(tmp_path):
    (tmp_path / "cached.py").write_text(CACHED)
    program = USE.format(folder=str(tmp_path))
    settings = {"NUMBA_CACHE_DIR": str(tmp_path / "cache")}
    assert fresh(program, **settings) == "True 0 1"
    assert fresh(program, **settings) == "True 1 0"


# ---- the machine ---------------------------------------------------------------------------------------------------

SHOW = """
from tinytape.kernels import processor
from numba.core.registry import cpu_target
used = cpu_target.target_context.codegen()._tm_features.split(",")
assert {word[1:] for word in used if word.startswith("+")} == processor.features()
print(processor.name(), processor.WIDTH, processor.FUSED, processor.LANES[4], processor.LANES[8])
"""


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (HASWELL, "haswell 32 True 8 4"),
        (NEHALEM, "nehalem 16 False 4 2"),
        ({"NUMBA_ENABLE_AVX": "0"}, None),
        ({}, None),
    ],
)
def test_features_are_those_that_numba_uses(settings, expected):
    if expected and platform.machine() not in ("x86_64", "AMD64"):
        pytest.skip("names a processor of another family")
    shown = fresh(SHOW, **settings)
    assert expected is None or shown == expected


def test_import_without_the_compiler():
    program = "from tinytape.kernels import float32, float64; print(float32.LANES)"
    assert int(fresh(program, NUMBA_DISABLE_JIT="1")) == processor.LANES[4]


@compiled
def test_denormals_are_flushed_and_come_back():
    flush, restore = processor.flush_denormals, processor.restore_denormals

    @njit
    def halves(a):
        before = flush()
        flushed = a[0] * a[1]
        inner = flush()
        restore(inner)
        still = a[0] * a[1]
        restore(before)
        return flushed, still, a[0] * a[1]

    a = np.array([np.finfo("f").tiny, 0.5], "f")
    flushed, still, after = halves(a)
    assert after == a[0] / 2 > 0
    if processor.features() & {"sse", "sse2"}:
        assert flushed == still == 0
    assert a[0] * a[1] > 0  # NumPy in this thread is as before


@pytest.mark.slow
@pytest.mark.parametrize("settings", [HASWELL, NEHALEM], ids=["haswell", "nehalem"])
def test_other_machines(settings):
    """The tests of vectors and maths on processors with fewer features than this one has."""
    if not {"avx2", "fma"} <= processor.features():
        pytest.skip("needs a processor with AVX2")
    command = [sys.executable, "-m", "pytest", "-q", "tests/test_vector.py", "tests/test_maths.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env={**os.environ, **settings})
    assert done.returncode == 0, done.stdout[-3000:]
