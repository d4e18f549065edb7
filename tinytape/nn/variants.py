"""More recurrent cells, each its equations in plain Tensor code; `Recurrent` runs them over time.

A cell with randomness of its own has a method ``draw(steps, *batch)``: a nest of arrays, their first axis the steps,
of what a training run is to use. `Recurrent` draws for all steps at once and gives each step its slice as a third
argument, so that a step is a function of what it is given.
"""

from __future__ import annotations

import math
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.tensor import Tensor
from ..engine.tree import Array
from ..ops.activation import sigmoid
from ..ops.elementwise import tanh, where
from ..ops.linalg import matmul
from ..ops.shape import broadcast_to, expand_dims, split, squeeze
from ..ops.softmax import softmax
from ..random import Generator, check_probability, default_generator
from . import functional as F
from .cells import Cell, State
from .checks import check_array, check_sizes
from .module import Parameter

__all__ = [
    "CoupledLSTMCell", "LayerNormLSTMCell", "MemoryAttentionCell", "MinimalGatedUnitCell", "PeepholeLSTMCell",
    "ZoneoutLSTMCell",
]  # fmt: skip


class PeepholeLSTMCell(Cell):
    """An LSTM whose gates also see the cell (Gers & Schmidhuber 2000).

    With ``z = W x + U h + b`` in quarters for i, f, g, o, and p a vector for each gate::

        i = sigmoid(z_i + p_i c)          c' = f c + i tanh(z_g)
        f = sigmoid(z_f + p_f c)          h' = sigmoid(z_o + p_o c') tanh(c')

    Parameters
    ----------
    input_size, hidden_size : int
    bias : bool
        Default True.
    generator : Generator, optional
        What the weights are drawn with, from U(-1/√hidden_size, 1/√hidden_size).
    dtype : dtype, optional

    Notes
    -----
    ``cell(x, state=None) -> state`` with x (batch, input_size) or (input_size,), and state (h, c), each of
    (batch, hidden_size) or (hidden_size,); None is a state of zeros. Parameters: weight_ih (4 hidden_size,
    input_size), weight_hh (4 hidden_size, hidden_size), bias_ih and bias_hh (4 hidden_size,), and peephole
    (3 hidden_size,), stacked as i, f, o. Shapes and dtypes that do not fit raise a ShapeError or DTypeError.
    """

    gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, generator=generator, dtype=dtype)
        self.peephole = _drawn((3 * hidden_size,), hidden_size, generator, dtype)

    def step(self, x: Any, state: State) -> State:
        h, c = state
        p_i, p_f, p_o = split(self.peephole, 3)
        i, f, g, o = split(self.affine(x) + h @ self.weight_hh.T, 4, axis=-1)
        c = sigmoid(f + p_f * c) * c + sigmoid(i + p_i * c) * tanh(g)
        return sigmoid(o + p_o * c) * tanh(c), c


class CoupledLSTMCell(Cell):
    """An LSTM that forgets as much as it takes in, f = 1 - i (CIFG, Greff et al. 2017).

    With ``z = W x + U h + b`` in thirds for i, g, o::

        i = sigmoid(z_i)    c' = (1 - i) c + i tanh(z_g)    h' = sigmoid(z_o) tanh(c')

    Parameters and use as for `PeepholeLSTMCell`; weights have 3 hidden_size rows, stacked as i, g, o.
    """

    gates = 3

    def step(self, x: Any, state: State) -> State:
        h, c = state
        i, g, o = split(self.affine(x) + h @ self.weight_hh.T, 3, axis=-1)
        c = c + sigmoid(i) * (tanh(g) - c)
        return sigmoid(o) * tanh(c), c


class LayerNormLSTMCell(Cell):
    """An LSTM with layer normalisation (Ba, Kiros & Hinton 2016).

    With N(a) = (a - mean(a)) / sqrt(var(a) + eps) over the features of a row::

        z = s_x N(W x) + s_h N(U h) + b           in quarters for i, f, g, o
        c' = sigmoid(z_f) c + sigmoid(z_i) tanh(z_g)
        h' = sigmoid(z_o) tanh(s_c N(c') + b_c)

    The norms are where the paper has them: over all four gates of each product together, and over the cell on its
    way to h only; c itself is carried as it is. The paper's three shifts of z are one here.

    Parameters
    ----------
    input_size, hidden_size, bias, generator, dtype
        As for `PeepholeLSTMCell`.
    eps : float
        Default 1e-5.

    Notes
    -----
    Use as for `PeepholeLSTMCell`. Parameters: weight_ih, weight_hh, bias_ih and bias_hh as there (b is the sum of
    the two), gain_ih and gain_hh (4 hidden_size,), gain_c and, with bias, bias_c (hidden_size,): 1 and 0 at first.
    """

    gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        eps: float = 1e-5,
        *,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(input_size, hidden_size, bias, generator=generator, dtype=dtype)
        self.eps, kind = eps, self.weight_ih.dtype
        self.gain_ih = Parameter(np.ones(4 * hidden_size, kind))
        self.gain_hh = Parameter(np.ones(4 * hidden_size, kind))
        self.gain_c = Parameter(np.ones(hidden_size, kind))
        self.bias_c = Parameter(np.zeros(hidden_size, kind)) if bias else None

    def step(self, x: Any, state: State) -> State:
        h, c = state
        z = self.norm(x @ self.weight_ih.T, self.gain_ih, self.shift())
        z = z + self.norm(h @ self.weight_hh.T, self.gain_hh)
        i, f, g, o = split(z, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(self.norm(c, self.gain_c, self.bias_c)), c

    def norm(self, a: Any, gain: Any, shift: Any = None) -> Tensor:
        """``gain N(a) + shift``."""
        return F.layer_norm(a, a.shape[-1:], gain, shift, self.eps)


class ZoneoutLSTMCell(Cell):
    """An LSTM some of whose units keep their last value, at random (Krueger et al. 2017).

    With h~ and c~ what an LSTM would go on to::

        training:     h' = h where d_h, else h~                 P(d_h) = zoneout_h, for every unit and step
        otherwise:    h' = zoneout_h h + (1 - zoneout_h) h~     the expectation

    and c' likewise.

    Parameters
    ----------
    input_size, hidden_size, bias, dtype
        As for `PeepholeLSTMCell`.
    zoneout_h, zoneout_c : float
        Probabilities of keeping. Defaults 0.05 and 0.5, the paper's for characters.
    generator : Generator, optional
        What weights and masks are drawn with.

    Notes
    -----
    ``cell(x, state=None, zones=None) -> state``, parameters and states as for `LSTMCell`. zones are bools
    (d_h, d_c), one step of what `draw` returns, and are used whatever the mode; None: drawn here in training, the
    expectation otherwise.
    """

    gates = 4

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        zoneout_h: float = 0.05,
        zoneout_c: float = 0.5,
        bias: bool = True,
        *,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        check_probability("ZoneoutLSTMCell, zoneout_h", zoneout_h)
        check_probability("ZoneoutLSTMCell, zoneout_c", zoneout_c)
        super().__init__(input_size, hidden_size, bias, generator=generator, dtype=dtype)
        self.zoneout_h, self.zoneout_c, self.generator = zoneout_h, zoneout_c, generator

    def draw(self, steps: int, *batch: int) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Zones for `steps` steps, each (steps, *batch, hidden_size): where h and c keep their last value."""
        bernoulli, shape = (self.generator or default_generator).bernoulli, (steps, *batch, self.hidden_size)
        return bernoulli(shape, self.zoneout_h), bernoulli(shape, self.zoneout_c)

    def forward(self, x: Any, state: Any = None, zones: Any = None) -> Any:
        old = self._read(x, state)
        new = self.step(x, old)
        if zones is None and not self.training:
            keep = self.zoneout_h, self.zoneout_c
            return tuple(b + p * (a - b) for a, b, p in zip(old, new, keep, strict=True))
        if zones is None:
            zones = tuple(d[0] for d in self.draw(1, *x.shape[:-1]))
        return tuple(where(d, a, b) for a, b, d in zip(old, new, _read_zones(zones, old), strict=True))

    def step(self, x: Any, state: State) -> State:
        h, c = state
        i, f, g, o = split(self.affine(x) + h @ self.weight_hh.T, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        return sigmoid(o) * tanh(c), c

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, zoneout_h={self.zoneout_h}, zoneout_c={self.zoneout_c}"


def _read_zones(zones: Any, state: State) -> tuple[Any, ...]:
    if not (isinstance(zones, tuple | list) and len(cast(Any, zones)) == 2):
        raise InputError(
            f"ZoneoutLSTMCell: zones are a {type(cast(Any, zones)).__name__}, not a pair (d_h, d_c).",
            "pass one step of what draw() returned.",
        )
    for name, zone, part in zip(("d_h", "d_c"), cast(Any, zones), state, strict=True):
        check_array("ZoneoutLSTMCell", name, zone)
        if zone.dtype != np.bool_:
            raise DTypeError(f"ZoneoutLSTMCell: {name} is {zone.dtype}.", f"pass bools: {name}.astype(bool).")
        if zone.shape != part.shape:
            raise ShapeError(
                f"ZoneoutLSTMCell: {name} has shape {zone.shape}, the state {part.shape}.",
                "pass one step of what draw(steps, batch) returned, for as many rows as x has.",
            )
    return tuple(cast(Any, zones))


class MinimalGatedUnitCell(Cell):
    """The minimal gated unit: a GRU with one gate for both of its jobs (Zhou et al. 2016).

    ::

        f = sigmoid(W_f x + U_f h + b_f)
        h' = (1 - f) h + f tanh(W_n x + U_n (f h) + b_n)

    Parameters and use as for `PeepholeLSTMCell`, but that the state is h alone; weights have 2 hidden_size rows,
    stacked as f, n.
    """

    gates, states = 2, ("h",)

    def step(self, x: Any, state: State) -> State:
        (h,) = state
        u_f, u_n = split(self.weight_hh.T, 2, axis=-1)
        x_f, x_n = split(self.affine(x), 2, axis=-1)
        f = sigmoid(x_f + h @ u_f)
        return (h + f * (tanh(x_n + (f * h) @ u_n) - h),)


class MemoryAttentionCell(Cell):
    """A recurrent network that reads from and writes to a small memory by content (after Graves et al. 2014).

    The memory M has `slots` rows of `width` numbers for each sequence. With <M, k> = softmax(M k / √width), the
    weights with which a key k picks rows::

        read        r  = <M, K h>ᵀ M
        update      h' = tanh(W x + U h + R r + b)
        write       k, e, v = V h' + b_v
                    M' = M + w sigmoid(e)ᵀ (tanh(v) - M)      row by row, w = <M, k>

    so that a row is overwritten by tanh(v) as far as it is picked and the gate e is open. The Neural Turing
    Machine compares by cosine and adds addressing by place; this keeps the scaled product of Vaswani et al. 2017.

    Parameters
    ----------
    input_size, hidden_size, bias, generator, dtype
        As for `PeepholeLSTMCell`.
    slots, width : int

    Notes
    -----
    ``cell(x, state=None) -> state`` with state (h, M) of (batch, hidden_size) and (batch, slots, width), or both
    without batch. The state that None stands for is zeros and `memory`, a Parameter (slots, width): rows that are
    equal would be picked alike and stay equal for ever.

    Other parameters: weight_ih (hidden_size, input_size), weight_hh (hidden_size, hidden_size), bias_ih and bias_hh
    (hidden_size,), weight_read (width, hidden_size) for K, weight_mh (hidden_size, width) for R, weight_write
    (3 width, hidden_size) and bias_write (3 width,) for V and b_v, stacked as k, e, v.
    """

    gates, states = 1, ("h", "memory")

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        slots: int,
        width: int,
        bias: bool = True,
        *,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        check_sizes("MemoryAttentionCell", 1, slots=slots, width=width)
        super().__init__(input_size, hidden_size, bias, generator=generator, dtype=dtype)
        self.slots, self.width = slots, width
        self.weight_read = _drawn((width, hidden_size), hidden_size, generator, dtype)
        self.weight_mh = _drawn((hidden_size, width), width, generator, dtype)
        self.weight_write = _drawn((3 * width, hidden_size), hidden_size, generator, dtype)
        self.bias_write = _drawn((3 * width,), hidden_size, generator, dtype) if bias else None
        self.memory = _drawn((slots, width), 1, generator, dtype)

    def initial_state(self, *batch: int) -> Any:
        """Zeros, and the memory that is learned, for `batch` rows."""
        h = np.zeros((*batch, self.hidden_size), self.weight_ih.dtype)
        return Tensor(h), broadcast_to(self.memory, (*batch, self.slots, self.width))

    def _shapes(self, batch: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(*batch, self.hidden_size), (*batch, self.slots, self.width)]

    def step(self, x: Any, state: State) -> State:
        h, memory = state
        weights = self.pick(memory, h @ self.weight_read.T)
        read = squeeze(matmul(expand_dims(weights, -2), memory), axis=-2)
        h = tanh(self.affine(x) + h @ self.weight_hh.T + read @ self.weight_mh.T)
        key, gate, value = split(F.linear(h, self.weight_write, self.bias_write), 3, axis=-1)
        strength = expand_dims(self.pick(memory, key), -1) * expand_dims(sigmoid(gate), -2)
        return h, memory + strength * (expand_dims(tanh(value), -2) - memory)

    def pick(self, memory: Any, key: Any) -> Tensor:
        """How much of each row a key picks: (batch, slots)."""
        scores = squeeze(matmul(memory, expand_dims(key, -1)), axis=-1)
        return softmax(scores / math.sqrt(self.width), axis=-1)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, slots={self.slots}, width={self.width}"


def _drawn(shape: tuple[int, ...], fan: int, generator: Generator | None, dtype: npt.DTypeLike | None) -> Parameter:
    """A parameter from U(-1/√fan, 1/√fan)."""
    bound = 1 / math.sqrt(fan)
    values: Array = (generator or default_generator).uniform(shape, -bound, bound, dtype)
    return Parameter(values)
