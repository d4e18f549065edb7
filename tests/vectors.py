"""Running functions of vectors over arrays, for the tests of the kernels' vectors and maths."""

import importlib

import numba
import numpy as np

DTYPES = ("float32", "float64")


def of(dtype):
    """The module with the vector functions of a dtype."""
    return importlib.import_module(f"tinytape.kernels.{np.dtype(dtype).name}")


def over(function, dtype, arity=1):
    """A function of vectors as a function of arrays; the last vector of an array is a partial one."""
    module = of(dtype)
    load, store, lanes = module.load, module.store, module.LANES
    if arity == 1:

        @numba.njit
        def kernel(out, n, a):
            for j in range(0, n, lanes):
                m = min(lanes, n - j)
                store(out, j, function(load(a, j, m)), m)

    else:

        @numba.njit
        def kernel(out, n, a, b):
            for j in range(0, n, lanes):
                m = min(lanes, n - j)
                store(out, j, function(load(a, j, m), load(b, j, m)), m)

    def run(*arrays):
        arrays = [np.ascontiguousarray(a, dtype) for a in arrays]
        out = np.empty_like(arrays[0])
        kernel(out.ctypes.data, out.size, *(a.ctypes.data for a in arrays))
        return out

    return run
