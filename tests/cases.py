"""The table of op cases: one row an op (or one way of calling it), from which many tests are made.

Rows live beside this file, by the module that declares the ops: `cases_elementwise.py`, `cases_reduce.py` and so on,
each with a list ``CASES``. `test_ops.py` makes of every row: value against NumPy, gradient and second gradient
against finite differences, forward mode against reverse mode, non-contiguous and read-only inputs, float32 stays
float32, and, where torch is installed, value and both gradients against torch. An op without a row fails.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import tinytape as tt


@dataclass(frozen=True)
class Case:
    """One way of calling an op.

    Attributes
    ----------
    name : str
        The op, as ``tt.<name>``.
    inputs : strategy
        Draws ``(args, options)``: a tuple of float64 arrays, which are differentiated, and a dict.
    call : callable, optional
        ``call(*args, **options)`` on Tensors or arrays; default ``tt.<name>``.
    numpy : callable, optional
        The value's reference, on arrays. Give it wherever the op is not simply NumPy's own function.
    torch : callable, optional
        ``torch(t, *tensors, **options)`` with ``t`` the torch module; None where torch has no such function.
    differentiable : bool
        Whether there is a gradient to test.
    order : int
        Up to which order gradients are tested.
    """

    name: str
    inputs: st.SearchStrategy[tuple[tuple[np.ndarray, ...], dict[str, Any]]]
    call: Callable[..., Any] | None = None
    numpy: Callable[..., Any] | None = None
    torch: Callable[..., Any] | None = None
    differentiable: bool = True
    order: int = 2

    def __str__(self) -> str:
        return self.name

    @property
    def function(self) -> Callable[..., Any]:
        return self.call or getattr(tt, self.name)


def values(
    low: float = -2.0, high: float = 2.0, apart: float = 0.0, avoid: tuple[float, ...] = ()
) -> Callable[..., Any]:
    """A maker of drawn float64 arrays of a given shape, uniform in [low, high], at least 0.05 from each of `avoid`.

    With `apart`, any two elements differ by at least that much (for max, sort, ... whose ties are kinks).
    """

    def make(shape: tuple[int, ...]) -> st.SearchStrategy[np.ndarray]:
        def build(seed: int) -> np.ndarray:
            rng = np.random.default_rng(seed)
            size = int(np.prod(shape))
            if apart:
                steps = rng.permutation(size) + rng.uniform(0.0, 0.3, size)
                x = low + steps * max(apart, (high - low) / max(size, 1))
            else:
                x = rng.uniform(low, high, size)
            for a in avoid:
                x = np.where(np.abs(x - a) < 0.05, a + np.where(x >= a, 0.05, -0.05) + (x - a), x)
            return x.reshape(shape)

        return st.integers(0, 2**31).map(build)

    return make


def shapes(
    min_dims: int = 0, max_dims: int = 3, min_side: int = 0, max_side: int = 4
) -> st.SearchStrategy[tuple[int, ...]]:
    """Shapes with empty and single axes among them."""
    return hnp.array_shapes(min_dims=min_dims, max_dims=max_dims, min_side=min_side, max_side=max_side)


def unary(maker: Callable[..., Any] | None = None, **shape: int) -> st.SearchStrategy[Any]:
    """One array of any shape, no options."""
    make = maker or values()
    return shapes(**shape).flatmap(make).map(lambda x: ((x,), {}))


def binary(first: Callable[..., Any] | None = None, second: Callable[..., Any] | None = None) -> st.SearchStrategy[Any]:
    """Two arrays whose shapes broadcast."""
    a, b = first or values(), second or values()
    both = hnp.mutually_broadcastable_shapes(num_shapes=2, min_dims=0, max_dims=3, min_side=0, max_side=4)
    return both.flatmap(lambda s: st.tuples(a(s.input_shapes[0]), b(s.input_shapes[1]))).map(lambda xs: (xs, {}))
