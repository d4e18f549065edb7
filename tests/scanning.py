"""What tests of compiled scans share: running one by its NumPy source, random tensors, compiled against eager."""

from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest

import tinytape as tt
from tinytape.compile import attempt
from tinytape.engine.tree import flatten
from tinytape.kernels.compiler import usable

__all__ = ["Leaves", "assert_like_eager", "by_numpy", "needs_numba", "outcome"]

needs_numba = pytest.mark.skipif(not usable(), reason="needs Numba")


@contextmanager
def by_numpy():
    """Run the NumPy source in place of kernels."""
    attempt._plans.clear()
    with mock.patch.object(attempt, "usable", lambda: False):
        yield
    attempt._plans.clear()


class Leaves:
    """Random tensors that require gradients, one after the other; those without a batch are weights."""

    def __init__(self, seed=0):
        self.rng = np.random.default_rng(seed)
        self.made = []

    def __call__(self, *shape):
        self.made.append(tt.tensor(self.rng.normal(size=shape), requires_grad=True))
        return self.made[-1]


def outcome(f, init, xs, leaves, **options):
    """All results of a scan, and the gradients of `leaves` and of what was put in."""
    with tt.Tape() as tape:
        results = flatten(tt.scan(f, init, xs, **options))
        rng = np.random.default_rng(7)
        loss = sum((y * rng.normal(size=y.shape)).sum() for y in results if y.dtype.kind == "f")
        sources = [x for x in (*flatten(init), *flatten(xs), *leaves) if getattr(x, "requires_grad", False)]
        gradients = tape.gradient(loss, sources)
    found = [np.zeros(x.shape) if g is None else g.data for x, g in zip(sources, gradients, strict=True)]
    return [y.data for y in results], found


def assert_like_eager(f, init, xs, leaves=(), tolerance=1e-10, **options):
    expected = outcome(f, init, xs, leaves, compiled=False, **options)
    for values, references in zip(outcome(f, init, xs, leaves, compiled=True, **options), expected, strict=True):
        for a, b in zip(values, references, strict=True):
            assert (a.shape, a.dtype) == (b.shape, b.dtype)
            np.testing.assert_array_equal(np.isnan(a), np.isnan(b))
            same = (a == b) | np.isnan(b)  # also infinities
            a, b = np.where(same, 0, a), np.where(same, 0, b)
            assert np.linalg.norm(a - b) <= tolerance * max(1.0, np.linalg.norm(np.where(np.isfinite(b), b, 0)))
