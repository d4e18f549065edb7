"""The table of addresses, lengths and strides that a generated kernel works from.

A kernel is given addresses only, so that it can be called without Numba: of `numbers`, which never change for a
layout; of `bases`, the arrays and the memory of one run; and of room for the table that these two make.
"""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

from .address import HEAD

__all__ = ["addressed", "real", "word"]

_WORD = ir.IntType(64)


def _slot(builder, address, index, kind):
    """The `index`-th 8 bytes behind an address."""
    return builder.gep(builder.inttoptr(address, kind.as_pointer()), [index])


@intrinsic
def word(typing_context, address, index):
    """The `index`-th 8 bytes behind an address, as an integer."""
    return types.int64(types.int64, types.int64), lambda context, builder, signature, raw: builder.load(
        _slot(builder, *raw, _WORD)
    )


@intrinsic
def real(typing_context, address, index):
    """The `index`-th 8 bytes behind an address, as a float64."""
    return types.float64(types.int64, types.int64), lambda context, builder, signature, raw: builder.load(
        _slot(builder, *raw, ir.DoubleType())
    )


@intrinsic
def _put(typing_context, address, index, value):
    """Write the `index`-th 8 bytes behind an address."""

    def generate(context, builder, signature, raw):
        builder.store(raw[2], _slot(builder, raw[0], raw[1], _WORD))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@njit(nogil=True)
def addressed(numbers, constants, bases, table):
    """Write the table of a run.

    Parameters
    ----------
    numbers : int
        Of n and m; the kernel's constants; the n entries of the table as they are without addresses; the m places of
        those that are addresses; and for each of these the number of its base, from which the entry is the distance.
    constants : int
        How many constants there are.
    bases : int
        Of how many of the bases are given as the array objects of Python; and of these and the addresses of the rest.
    table : int
        Where the table is to be.
    """
    n, m = word(numbers, 0), word(numbers, 1)
    entries = numbers + 8 * (2 + constants)
    places = entries + 8 * n
    sources = places + 8 * m
    objects = word(bases, 0)
    for i in range(n):
        _put(table, i, word(entries, i))
    for i in range(m):
        place, source = word(places, i), word(sources, i)
        base = word(bases, 1 + source)
        if source < objects:
            base = word(base + HEAD, 0)
        _put(table, place, word(table, place) + base)
