"""``python -m tinytape doctor``: what tinytape found on this machine, and whether its kernels are right and fast."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from . import nn
from .check import check_grads
from .compile.cache import announced, load
from .kernels import compiler, folder, processor, product, threads, workspace
from .random import Generator

__all__ = ["run"]

ROWS, DEPTH, COLUMNS = (
    768,
    512,
    2048,
)  # of the product that is timed: a batch over time, by the weights of a large layer
SECONDS = 0.7  # for each timing
ULPS = 4.0  # units in the last place by which a function of float32 may be wrong

_FUNCTIONS = """\
from tinytape.kernels.compiler import kernel
from tinytape.kernels.float32 import LANES, exp, load, sigmoid, store, tanh

@kernel
def apply(n, x, y_exp, y_sigmoid, y_tanh):
    for j in range(0, n, LANES):
        m = min(LANES, n - j)
        v = load(x, j, m)
        store(y_exp, j, exp(v), m)
        store(y_sigmoid, j, sigmoid(v), m)
        store(y_tanh, j, tanh(v), m)
"""

_MATMUL = f"""\
import time, numpy as np
a = np.ones(({ROWS}, {DEPTH}), np.float32)
b = np.ones(({DEPTH}, {COLUMNS}), np.float32)
best, end = float("inf"), time.perf_counter() + {SECONDS}
while time.perf_counter() < end:
    start = time.perf_counter()
    a @ b
    best = min(best, time.perf_counter() - start)
print(best)
"""
_BLAS_THREADS = "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "VECLIB_MAXIMUM_THREADS"


def run() -> int:
    """Print the report and the self-test; 0 if all is well, 1 if not."""
    for name, text in _facts():
        print(f"{name:<10} {text}")
    if not compiler.usable():
        print("\nNUMBA_DISABLE_JIT is set: no kernels are compiled, and everything runs on NumPy.")
        return 0
    print("\nself-test", flush=True)
    well = True
    for check in (_check_functions, _check_threads, _check_products, _check_layer):
        name = check.__name__.removeprefix("_check_")
        try:
            with announced(f"the self-test of {name}"):
                problem, text = check()
        except Exception as error:  # whatever is broken is what a report is for
            problem, text = True, f"{type(error).__name__}: {error}"
        print(f"{'WRONG' if problem else 'right':<5} {name}: {text}", flush=True)
        well = well and not problem
    for line in _speeds():
        print(line, flush=True)
    return 0 if well else 1


# ---- facts ----------------------------------------------------------------------------------------------------------


def _facts() -> Iterator[tuple[str, str]]:
    found = processor.features()
    named = ("avx512f", "avx512bf16", "avx2", "avx", "fma", "neon", "sse4.2")
    yield "processor", f"{processor.name()} ({' '.join(f for f in named if f in found) or 'no vector features'})"
    yield "vectors", f"{processor.WIDTH} bytes: {processor.LANES[4]} of float32, {processor.LANES[8]} of float64"
    yield "tile", _tile()
    yield "threads", f"{threads.get_num_threads()}, with {threads.processors()} processors to use"
    state = "can be written" if folder.writable() else "CANNOT be written: kernels are compiled anew in every process"
    yield "cache", f"{folder.location()}, {folder.size() / 2**20:.1f} MiB, {state}"
    usage = workspace.usage()
    yield "workspace", f"{usage.in_use / 2**20:.1f} MiB in use, {usage.idle / 2**20:.1f} MiB idle"
    yield "python", f"{platform.python_version()} on {platform.system()} {platform.machine()}"
    versions = [f"{name} {_version(name)}" for name in ("tinytape", "numpy", "numba", "llvmlite", "safetensors")]
    yield "packages", ", ".join(versions)
    yield "BLAS", f"{_blas()} (NumPy's; kernels do not use it)"


def _tile() -> str:
    from .kernels.tiles import ROWS, VECTORS

    return f"{ROWS} x {VECTORS * processor.LANES[4]} of float32, {ROWS} x {VECTORS * processor.LANES[8]} of float64"


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # such as a checkout that was not installed
        return "(not installed as a package)"


def _blas() -> str:
    config: Any = np.show_config(mode="dicts")
    blas = config.get("Build Dependencies", {}).get("blas", {})
    return f"{blas.get('name', 'unknown')} {blas.get('version', '')}".strip()


# ---- right ----------------------------------------------------------------------------------------------------------

Verdict = tuple[bool, str]
"""Whether there is a problem, and the line that tells what was found."""


def _check_functions() -> Verdict:
    functions: dict[str, Callable[[Any], Any]] = {
        "exp": np.exp,
        "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
        "tanh": np.tanh,
    }
    x = np.concatenate([np.linspace(-80, 80, 100_003), np.geomspace(1e-30, 1, 10_007)]).astype(np.float32)
    results = [np.empty_like(x) for _ in functions]
    load("self_test_functions", _FUNCTIONS).apply(x.size, *(array.ctypes.data for array in (x, *results)))
    worst: dict[str, float] = {}
    for (name, function), result in zip(functions.items(), results, strict=True):
        true = function(x.astype(np.float64))
        worst[name] = float(np.max(np.abs(result - true) / np.spacing(np.abs(true).astype(np.float32))))
    said = ", ".join(f"{name} {error:.1f}" for name, error in worst.items())
    return not max(worst.values()) <= ULPS, f"at most {ULPS:g} units in the last place wanted; found {said}"


def _check_threads() -> Verdict:
    n, count = 1000, 4 * threads.get_num_threads()
    calls = np.zeros(count, np.int64)

    def task(index: int) -> None:
        calls[index] += 1

    start = time.perf_counter()
    for _ in range(n):
        threads.run(task, count)
    took = (time.perf_counter() - start) / n
    wrong = int(np.count_nonzero(calls != n))
    return wrong > 0, f"{count} empty tasks in {took * 1e6:.0f} us" if not wrong else f"{wrong} tasks not run just once"


def _check_products() -> Verdict:
    worst = 0.0
    generator = Generator(0)
    for dtype in (np.float32, np.float64):
        for rows, depth, columns in ((1, 1, 1), (3, 77, 50), (33, 200, 200), (128, 513, 259)):
            a, b = (generator.normal(shape, dtype=dtype) for shape in ((rows, depth), (depth, columns)))
            c = np.full((rows, columns), np.nan, dtype)
            multiply = _multiplication(a, b, c)
            multiply(threads.get_num_threads())
            bound = depth * np.finfo(dtype).eps * (np.abs(a).astype(np.float64) @ np.abs(b))
            error = np.abs(c - a.astype(np.float64) @ b.astype(np.float64)) / bound
            worst = max(worst, float(np.max(np.where(np.isnan(error), np.inf, error))))
    return worst > 1, f"largest error is {worst:.2f} of what rounding allows"


def _check_layer() -> Verdict:
    generator = Generator(0)
    layer = nn.LSTM(5, 7, generator=generator, dtype=np.float64)
    check_grads(layer, [generator.normal((6, 3, 5), dtype=np.float64)], modes=("rev",))  # raises where they differ
    return False, "the gradients of an LSTM agree with finite differences"


# ---- fast -----------------------------------------------------------------------------------------------------------


def _multiplication(a: Any, b: Any, c: Any) -> Callable[[int], None]:
    """A function that computes ``c = a @ b`` by our product on so many threads."""
    kernels = product.bind(a.dtype.type)
    (rows, depth), columns, size = a.shape, b.shape[1], a.itemsize
    block = workspace.take(kernels.packed_size(depth, columns) * size)
    kernels.pack(depth, columns, b.ctypes.data, columns, 1, block.address)

    def multiply(parts: int) -> None:
        def task(i: int) -> None:
            first, last = rows * i // parts, rows * (i + 1) // parts
            from_, to = a.ctypes.data + first * depth * size, c.ctypes.data + first * columns * size
            kernels.product(last - first, columns, depth, from_, depth, block.address, to, columns, 0)

        threads.run(task, parts)

    return multiply


def _speeds() -> Iterator[str]:
    a, b = np.ones((ROWS, DEPTH), np.float32), np.ones((DEPTH, COLUMNS), np.float32)
    c = np.empty((ROWS, COLUMNS), np.float32)
    try:
        multiply = _multiplication(a, b, c)
    except Exception as error:
        yield f"speed of products: not measured, {type(error).__name__}: {error}"
        return
    yield f"products of float32, {ROWS} x {DEPTH} x {COLUMNS}, GFLOP/s"
    for count in sorted({1, threads.get_num_threads()}):
        ours, numpys = _rate(_best(lambda n=count: multiply(n))), _matmul(count)
        share = f", np.matmul {numpys:.0f}, ratio {ours / numpys:.2f}" if numpys else ", np.matmul not measured"
        yield f"  {count} thread{'s' if count > 1 else ' '}  tinytape {ours:.0f}{share}"


def _best(function: Callable[[], Any]) -> float:
    """The shortest time of a call, in seconds."""
    best, end = float("inf"), time.perf_counter() + SECONDS
    while (start := time.perf_counter()) < end:
        function()
        best = min(best, time.perf_counter() - start)
    return best


def _rate(seconds: float) -> float:
    return 2e-9 * ROWS * DEPTH * COLUMNS / seconds


def _matmul(count: int) -> float:
    """GFLOP/s of np.matmul in a process of its own, as a BLAS reads its number of threads when it is loaded; or 0."""
    environment = os.environ | dict.fromkeys(_BLAS_THREADS, str(count))
    if "avx512dq" in processor.features():  # on processors that it does not know OpenBLAS would take AVX2
        environment = {"OPENBLAS_CORETYPE": "SKYLAKEX"} | environment
    try:
        command = [sys.executable, "-c", _MATMUL]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, timeout=60)
        return _rate(float(done.stdout))
    except (OSError, ValueError, subprocess.SubprocessError):
        return 0.0
