"""Random numbers whose state can be saved, copied and set.

Everything in tinytape that draws (initialisation, dropout, sampling) takes ``generator=`` and without one draws from
`default_generator`. A validation that shall not disturb training simply draws from a generator of its own.
"""

from __future__ import annotations

import math
import operator
import struct
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from .engine.errors import DTypeError, InputError, ShapeError
from .engine.tape import here
from .engine.tensor import default_dtype

__all__ = ["Generator", "default_generator", "manual_seed"]

Shape = int | Sequence[int]
Array = npt.NDArray[Any]

_STATE = struct.Struct("<16s16sII")  # PCG64: state, increment, whether half a draw is left over, that half
_FIELDS = ("state", "inc")
_MANY = 1 << 14  # numbers of 32 bits: for fewer it is not worth looking at the state


class Generator:
    """A stream of random numbers (PCG64, O'Neill 2014).

    Parameters
    ----------
    seed : int, optional
        0 or larger: equal seeds give equal draws on every machine. Default: a seed from the operating system.

    Raises
    ------
    InputError
        If the seed is negative or not an integer.

    Examples
    --------
    >>> generator = tt.Generator(7)
    >>> state = generator.state()
    >>> a = generator.normal((2, 3))
    >>> generator.set_state(state)  # the next draw is `a` again
    """

    def __init__(self, seed: int | None = None) -> None:
        self._seed = seed
        self._stream: np.random.Generator | None = None  # made at the first draw: numpy.random is slow to import
        self.manual_seed(seed)

    def manual_seed(self, seed: int | None) -> Generator:
        """Start over from `seed`; returns the generator itself."""
        if seed is not None:
            try:
                number = operator.index(seed)
            except TypeError:
                number = -1
            if number < 0 or isinstance(seed, bool | np.bool_):
                raise InputError(f"seed: {seed!r} is not an integer of 0 or more.", "pass, say, 0 or 1234.")
            seed = number
        self._seed, self._stream = seed, None
        return self

    # ---- state --------------------------------------------------------------------------------------------------

    def state(self) -> npt.NDArray[np.uint8]:
        """Where the stream stands: 40 bytes, an array so that it can lie in a ``.safetensors`` file."""
        found: Any = self._rng().bit_generator.state
        numbers = (found["state"][name].to_bytes(16, "little") for name in _FIELDS)
        packed = _STATE.pack(*numbers, found["has_uint32"], found["uinteger"])
        return np.frombuffer(packed, np.uint8).copy()

    def set_state(self, state: npt.ArrayLike) -> None:
        """Go on from where `state()` was taken.

        Raises
        ------
        InputError
            If `state` is not such an array. The generator is unchanged then.
        """
        given = np.asarray(state)
        if given.dtype != np.uint8 or given.shape != (_STATE.size,):
            raise InputError(
                f"set_state: state is {given.dtype}{list(given.shape)}; a state is uint8[{_STATE.size}].",
                "pass what state() returned.",
            )
        first, increment, has_half, half = _STATE.unpack(given.tobytes())
        numbers = {name: int.from_bytes(b, "little") for name, b in zip(_FIELDS, (first, increment), strict=True)}
        if numbers["inc"] % 2 == 0 or has_half > 1:
            raise InputError("set_state: these 40 bytes are no state of PCG64.", "pass what state() returned.")
        self._rng().bit_generator.state = {
            "bit_generator": "PCG64", "state": numbers, "has_uint32": has_half, "uinteger": half,
        }  # fmt: skip

    def copy(self) -> Generator:
        """A generator of its own that will draw the same."""
        made = Generator(0)
        made.set_state(self.state())
        return made

    def _rng(self) -> np.random.Generator:
        if self._stream is None:
            self._stream = np.random.Generator(np.random.PCG64(self._seed))
        return self._stream

    def _draw(self) -> Any:
        """The stream, about to be drawn from: a running `checkpoint` notes where it stood, to draw the same again."""
        drawn = here.context.drawn
        if drawn is not None and self not in drawn:
            drawn[self] = self.state()
        return self._stream or self._rng()

    # ---- draws --------------------------------------------------------------------------------------------------

    def uniform(
        self, shape: Shape = (), low: float = 0.0, high: float = 1.0, dtype: npt.DTypeLike | None = None
    ) -> Array:
        """Numbers uniform in [low, high], drawn in `dtype` itself (default: `default_dtype`)."""
        _check_order("uniform", low, high)
        kind = _float(dtype)
        drawn = self._draw().random(_shape(shape), _native(kind))
        drawn *= high - low
        drawn += low
        return drawn.astype(kind, copy=False)

    def normal(
        self, shape: Shape = (), mean: float = 0.0, std: float = 1.0, dtype: npt.DTypeLike | None = None
    ) -> Array:
        """Normal numbers, drawn in `dtype` itself (default: `default_dtype`)."""
        if not std >= 0:
            raise InputError(f"normal: std is {std}.", "a standard deviation is 0 or more.")
        kind = _float(dtype)
        drawn = self._draw().standard_normal(_shape(shape), _native(kind))
        drawn *= std
        drawn += mean
        return drawn.astype(kind, copy=False)

    def bernoulli(self, shape: Shape = (), p: float = 0.5) -> npt.NDArray[np.bool_]:
        """Bools, each True with probability `p`."""
        check_probability("bernoulli", p)
        sides = _shape(shape)
        bound = math.ceil(p * 2.0**24) << 8  # a float32 is made of the upper 24 bits: `uniform` would give the same
        bits = _bits(self._draw(), math.prod(sides)).reshape(sides)
        return np.asarray(bits < bound) if bound < 1 << 32 else np.ones(sides, np.bool_)

    def integers(self, low: int, high: int, shape: Shape = ()) -> npt.NDArray[np.int64]:
        """Integers uniform in low, ..., high - 1."""
        if not low < high:
            raise InputError(f"integers: low = {low}, high = {high}.", "low is less than high, which is left out.")
        return np.asarray(self._draw().integers(low, high, _shape(shape)))

    def permutation(self, n: int) -> npt.NDArray[np.int64]:
        """0, ..., n - 1 in random order."""
        if n < 0:
            raise InputError(f"permutation: n is {n}.", "a number of items is 0 or more.")
        return self._draw().permutation(n)


default_generator = Generator()
"""What draws where no ``generator=`` is given."""


def manual_seed(seed: int) -> Generator:
    """Seed `default_generator`, from which everything without a ``generator=`` draws, and return it.

    Raises
    ------
    InputError
        If the seed is negative or not an integer.
    """
    return default_generator.manual_seed(seed)


def check_probability(what: str, p: Any) -> None:
    if not isinstance(p, int | float | np.number) or not 0 <= p <= 1:
        raise InputError(f"{what}: p is {p!r}.", "a probability is a number between 0 and 1.")


def _bits(generator: Any, count: int) -> npt.NDArray[np.uint32]:
    """As many numbers of 32 random bits: halves of PCG64's own, the lower half first."""
    if count < _MANY or sys.byteorder != "little":
        return generator.integers(0, 1 << 32, count, np.uint32)
    left_over = generator.bit_generator.state["has_uint32"]
    pairs, odd = divmod(count - left_over, 2)
    first = generator.integers(0, 1 << 32, left_over, np.uint32)
    middle = generator.bit_generator.random_raw(pairs).view(np.uint32)  # at half the cost
    last = generator.integers(0, 1 << 32, odd, np.uint32)
    return np.concatenate([first, middle, last]) if left_over or odd else middle


def _check_order(what: str, low: float, high: float) -> None:
    if not low <= high:
        raise InputError(f"{what}: low = {low} is not below high = {high}.", "swap them.")


def _shape(shape: Shape) -> tuple[int, ...]:
    """A tuple also for 0-d, so that NumPy gives an array."""
    sides = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    if any(side < 0 for side in sides):
        raise ShapeError(f"shape {sides}: a side is negative.", "pass sides of 0 or more.")
    return sides


def _float(dtype: npt.DTypeLike | None) -> np.dtype[Any]:
    found = default_dtype() if dtype is None else np.dtype(dtype)
    if found.kind != "f":
        raise DTypeError(f"random: dtype is {found}, not a float.", "use 'float32' or 'float64'.")
    return found


def _native(dtype: np.dtype[Any]) -> Any:
    """NumPy draws float32 and float64; the others are rounded from them."""
    return np.float64 if dtype.itemsize > 4 else np.float32
