"""Matrix products on addresses: the functions that kernels call, for either kind of float.

Addresses are in bytes, and need no more alignment than elements; sizes and strides are in elements, and may be zero.
Rows are contiguous unless a column stride is given. `add` says whether a result is added to what is there (not 0) or
written over it (0). Nothing outside a matrix is read or written. Sums are taken in an order that depends on the sizes
alone, so results are the same in every run.

Rows may lie on two levels, as in a batch over time: row i of step t begins at ``base + t * step + i * row``.

Packed matrices and scratch are best kept at multiples of 64 bytes.
"""

# pyright: basic

from __future__ import annotations

from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np

from . import routines
from .compiler import kernel
from .multiply import multiply, multiply_steps
from .outer import multiply_outer, scratch_of_outer
from .packing import pack as pack_panels
from .packing import packed_columns
from .sums import sum_columns

__all__ = ["bind"]


@cache
def bind(dtype: type[np.floating[Any]]) -> SimpleNamespace:
    """The functions for one kind of float, written into the kernels that call them.

    Compiles what they need, or takes it from the cache.

    Parameters
    ----------
    dtype : type
        ``np.float32`` or ``np.float64``. It is all that the functions' closures hold: a function whose closure holds
        another compiled function would not be found in the cache again.
    """
    routines.load(dtype)

    @kernel(inline="always")
    def packed_size(k, n):
        """How many elements the packed form of B[k, n] has."""
        return k * packed_columns(dtype(0), n)

    @kernel(inline="always")
    def pack(k, n, b, b_row, b_column, packed):
        """Pack B[k, n] of any strides for `product`; a transposed view costs no more than a plain matrix."""
        pack_panels(dtype(0), k, n, b, b_row, b_column, packed)

    @kernel(inline="always")
    def product(rows, n, k, a, a_row, packed, c, c_row, add):
        """``C[rows, n] = (C if add else 0) + A[rows, k] @ B`` for a packed B."""
        multiply(dtype(0), rows, n, k, a, a_row, packed, c, c_row, c if add else 0, c_row)

    @kernel(inline="always")
    def product_steps(steps, rows, n, k, a, a_step, a_row, packed, c, c_step, c_row, add):
        """`product` for the rows of all steps, as one where rows follow each other at equal distances."""
        multiply_steps(dtype(0), steps, rows, n, k, a, a_step, a_row, packed, c, c_step, c_row, add)

    @kernel(inline="always")
    def outer_scratch(k, m, n):
        """How many elements of scratch `outer_product` needs for up to k rows in all."""
        return scratch_of_outer(dtype(0), k, m, n)

    @kernel(inline="always")
    def outer_product(steps, rows, m, n, a, a_step, a_row, b, b_step, b_row, c, c_row, add, scratch):
        """``C[m, n] = (C if add else 0) + A.T @ B`` over all rows of A[steps, rows, m] and B[steps, rows, n]."""
        multiply_outer(dtype(0), steps, rows, m, n, a, a_step, a_row, b, b_step, b_row, c, c_row, add, scratch)

    @kernel(inline="always")
    def column_sums(steps, rows, n, a, a_step, a_row, out, add):
        """``out[n] = (out if add else 0)`` plus the sum of all rows of A[steps, rows, n]."""
        sum_columns(dtype(0), steps, rows, n, a, a_step, a_row, out, add)

    functions = (
        packed_size,
        pack,
        product,
        product_steps,
        outer_scratch,
        outer_product,
        column_sums,
    )
    return SimpleNamespace(**{function.__name__: function for function in functions})
