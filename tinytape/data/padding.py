"""Sequences of unequal length as batches: padding, masks, and batches of sequences that are about equally long."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, ShapeError

if TYPE_CHECKING:
    from ..random import Generator

__all__ = ["bucket_batches", "length_mask", "pad_sequences"]

Array = npt.NDArray[Any]
Integers = npt.NDArray[np.int64]


def pad_sequences(
    sequences: Sequence[npt.ArrayLike], value: float = 0.0, batch_first: bool = False
) -> tuple[Array, Integers]:
    """Lay sequences side by side, each filled up at its end to the length of the longest.

    Parameters
    ----------
    sequences : sequence of arrays (T_b, ...)
        Of one dtype, and equal in all axes but the first. A length of 0 is allowed.
    value : number
        What stands behind the end of a sequence. Recurrent layers given `lengths` never look at it. Default 0.
    batch_first : bool
        Default False.

    Returns
    -------
    x : array of shape (T, B, ...), or (B, T, ...) if `batch_first`
        T is the longest sequence's length.
    lengths : int64 array of shape (B,)

    Raises
    ------
    InputError, ShapeError, DTypeError
        If there are no sequences, `value` does not fit the dtype, or the sequences do not fit together; the first that
        differs is named.
    """
    arrays = [np.asarray(sequence) for sequence in sequences]
    if not arrays:
        raise InputError("pad_sequences: there are no sequences.", "pass one at least.")
    first = arrays[0]
    for i, array in enumerate(arrays):
        if array.ndim == 0 or array.shape[1:] != first.shape[1:]:
            raise ShapeError(
                f"pad_sequences: sequence {i} has shape {array.shape}, the first has {first.shape}.",
                "sequences are (time, ...) and may differ in their first axis only.",
            )
        if array.dtype != first.dtype:
            raise DTypeError(
                f"pad_sequences: sequence {i} is {array.dtype}, the first is {first.dtype}.",
                "cast them to one dtype: their batch has one.",
            )
    lengths = np.array([len(array) for array in arrays], np.int64)
    padded = np.full((int(lengths.max()), len(arrays), *first.shape[1:]), _filling(value, first.dtype), first.dtype)
    for b, array in enumerate(arrays):
        padded[: len(array), b] = array
    return (padded.swapaxes(0, 1).copy() if batch_first else padded), lengths


def _filling(value: float, dtype: np.dtype[Any]) -> Any:
    """`value` in a dtype, if that can hold it."""
    try:
        held = np.array(value, dtype)
    except (OverflowError, ValueError, TypeError):
        held = None
    if held is None or (dtype.kind in "iub" and held != value):
        raise InputError(
            f"pad_sequences: value is {value}, the sequences are {dtype}.", "pass one that the dtype can hold."
        )
    return held


def length_mask(lengths: npt.ArrayLike, steps: int | None = None, batch_first: bool = False) -> npt.NDArray[np.bool_]:
    """Give a mask of the steps that are real: what losses take as ``mask=``.

    Parameters
    ----------
    lengths : integers of shape (B,)
    steps : int, optional
        T, at least the largest length, which is the default.
    batch_first : bool
        Default False.

    Returns
    -------
    bool array of shape (T, B), or (B, T) if `batch_first`

    Raises
    ------
    InputError
        If a length is negative or above `steps`, or they are no vector of integers.
    """
    counts = _lengths("length_mask", lengths)
    longest = int(counts.max(initial=0))
    steps = longest if steps is None else steps
    if longest > steps:
        raise InputError(f"length_mask: a length is {longest}, steps is {steps}.", "pass steps of the padded array.")
    mask = np.arange(steps)[:, None] < counts
    return mask.T.copy() if batch_first else mask


def bucket_batches(
    lengths: npt.ArrayLike, batch_size: int, generator: Generator | None = None, pool: int | None = None
) -> list[Integers]:
    """Cut sequences into batches of about equal length, so that there is little padding to compute.

    Sequences are taken in random order, `pool` batches at a time; these are sorted by length and cut into batches, and
    in the end the batches are shuffled. So batches are made up anew in every call, all the more so the smaller the pool
    is, and padding is the less the larger it is. Without a generator: sorted by length, longest first, nothing random.

    Parameters
    ----------
    lengths : integers of shape (n,)
    batch_size : int
        The last batch of the last pool may be smaller.
    generator : Generator, optional
        What shuffles; call once an epoch.
    pool : int, optional
        How many batches' sequences are sorted together; 1 is plain shuffling. Default: all.

    Returns
    -------
    list of int64 arrays
        Indices into `lengths`; each occurs once.

    Raises
    ------
    InputError
        If `batch_size` or `pool` is below 1, or `lengths` is no vector of integers of 0 or more.
    """
    counts = _lengths("bucket_batches", lengths)
    if batch_size < 1 or (pool is not None and pool < 1):
        raise InputError(f"bucket_batches: batch_size = {batch_size}, pool = {pool}.", "both are 1 or more.")
    n = len(counts)
    size = n if pool is None else pool * batch_size
    order = np.arange(n) if generator is None else generator.permutation(n)
    batches: list[Integers] = []
    for start in range(0, n, max(size, 1)):
        taken = order[start : start + size]
        taken = taken[np.argsort(-counts[taken], kind="stable")]  # of equal length in random order still
        batches += [taken[i : i + batch_size] for i in range(0, len(taken), batch_size)]
    return batches if generator is None else [batches[i] for i in generator.permutation(len(batches))]


def _lengths(what: str, lengths: npt.ArrayLike) -> Integers:
    counts = np.asarray(lengths)
    if counts.ndim != 1 or (counts.size and counts.dtype.kind not in "iu"):
        raise InputError(
            f"{what}: lengths has shape {counts.shape} and dtype {counts.dtype}.", "pass a vector of integers."
        )
    counts = counts.astype(np.int64)
    if counts.size and counts.min() < 0:
        raise InputError(f"{what}: a length is {counts.min()}.", "lengths are 0 or more.")
    return counts
