"""Kernels in Numba: explicit vectors, matrix products, threads and memory for generated code.

Nothing here knows of Tensors or tapes. Arguments are taken as already checked, arrays as addresses and strides.
Importing this package imports Numba, so the rest of tinytape does it inside functions only.
"""
