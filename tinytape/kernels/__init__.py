"""Kernels in Numba: explicit vectors, matrix products, threads and memory for generated code.

Nothing here knows of Tensors or tapes. Arguments are taken as already checked, arrays as addresses and strides.
Most modules import Numba, so the rest of tinytape imports them inside functions only. Kernels that were compiled
before are loaded and called without it: see `native`.
"""
