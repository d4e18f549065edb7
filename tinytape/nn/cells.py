"""The recurrent cells' equations, each written once, and the cells as modules.

An equation binds a direction's weights and returns two functions: `prepare(x)`, which does not depend on the state
and can be done for all time steps at once, and ``step(prepared, state) -> state``, plain Tensor code. The cells here
and the layers in `recurrent` are nothing but these.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError, ShapeError
from ..engine.tensor import Tensor
from ..ops.activation import relu, sigmoid
from ..ops.creation import zeros
from ..ops.elementwise import tanh
from ..ops.shape import split
from ..random import Generator, default_generator
from . import functional as F
from .checks import check_choice, check_dtype, check_features, check_sizes
from .module import Module, Parameter

__all__ = ["GRUCell", "LSTMCell", "RNNCell"]

State: TypeAlias = tuple[Tensor, ...]
"""(h,) or (h, c); the first entry is what a layer puts out."""
Prepare: TypeAlias = Callable[[Any], Tensor]
Step: TypeAlias = Callable[[Any, State], State]


class Weights(NamedTuple):
    """The weights of one layer in one direction; None for what it does without."""

    ih: Parameter
    hh: Parameter
    b_ih: Parameter | None
    b_hh: Parameter | None
    hr: Parameter | None


class Kind(NamedTuple):
    """A kind of cell: its equation, how many gates' rows a weight has, and the names of its states."""

    equation: Callable[[Weights], tuple[Prepare, Step]]
    gates: int
    states: tuple[str, ...]


# ---- the equations --------------------------------------------------------------------------------------------------


def _rnn(w: Weights, nonlinearity: str) -> tuple[Prepare, Step]:
    """Elman 1990: h' = activation(W x + U h + b)."""
    u, activation = w.hh.T, tanh if nonlinearity == "tanh" else relu

    def step(x: Any, state: State) -> State:
        (h,) = state
        return (activation(x + h @ u),)

    return _affine(w), step


def _lstm(w: Weights) -> tuple[Prepare, Step]:
    """Hochreiter & Schmidhuber 1997, with the forget gate of Gers et al. 2000: c' = f c + i g, h' = o tanh(c').

    i, f, o are sigmoid(W x + U h + b) and g is tanh of the same, each with its own quarter of the rows. With a
    projection R (Sak et al. 2014), h' = R (o tanh(c')).
    """
    u, r = w.hh.T, None if w.hr is None else w.hr.T

    def step(x: Any, state: State) -> State:
        h, c = state
        i, f, g, o = split(x + h @ u, 4, axis=-1)
        c = sigmoid(f) * c + sigmoid(i) * tanh(g)
        h = sigmoid(o) * tanh(c)
        return h if r is None else h @ r, c

    return _affine(w), step


def _gru(w: Weights) -> tuple[Prepare, Step]:
    """The form of cuDNN and PyTorch, the reset gate after the product: n = tanh(W x + b + r (U h + b')).

    r, z = sigmoid(W x + U h + b + b') and h' = (1 - z) n + z h.
    """
    u, two = w.hh.T, [2 * w.hh.shape[1]]

    def step(x: Any, state: State) -> State:
        (h,) = state
        a = h @ u if w.b_hh is None else h @ u + w.b_hh
        (x_rz, x_n), (a_rz, a_n) = split(x, two, axis=-1), split(a, two, axis=-1)
        r, z = split(sigmoid(x_rz + a_rz), 2, axis=-1)
        n = tanh(x_n + r * a_n)
        return (n + z * (h - n),)

    return _affine(w._replace(b_hh=None)), step


def _gru_reset_before(w: Weights) -> tuple[Prepare, Step]:
    """Cho et al. 2014, the reset gate before the product: n = tanh(W x + U (r h) + b)."""
    two = [2 * w.hh.shape[1]]
    u_rz, u_n = split(w.hh.T, two, axis=-1)

    def step(x: Any, state: State) -> State:
        (h,) = state
        x_rz, x_n = split(x, two, axis=-1)
        r, z = split(sigmoid(x_rz + h @ u_rz), 2, axis=-1)
        n = tanh(x_n + (r * h) @ u_n)
        return (n + z * (h - n),)

    return _affine(w), step


def _affine(w: Weights) -> Prepare:
    """The part that does not depend on the state: x -> W x + b_ih + b_hh."""
    bias = w.b_ih if w.b_ih is None or w.b_hh is None else w.b_ih + w.b_hh
    return lambda x: F.linear(x, w.ih, bias)


_RNN = {nonlinearity: partial(_rnn, nonlinearity=nonlinearity) for nonlinearity in ("tanh", "relu")}


def rnn_kind(what: str, nonlinearity: str) -> Kind:
    check_choice(what, "nonlinearity", nonlinearity, ("tanh", "relu"))
    return Kind(_RNN[nonlinearity], 1, ("h",))


def gru_kind(reset_after: bool) -> Kind:
    return Kind(_gru if reset_after else _gru_reset_before, 3, ("h",))


LSTM_KIND = Kind(_lstm, 4, ("h", "c"))


# ---- parameters and states ------------------------------------------------------------------------------------------


def allocate(
    module: Module,
    suffix: str,
    gates: int,
    input_size: int,
    hidden_size: int,
    bias: bool,
    proj_size: int,
    generator: Generator | None,
    dtype: npt.DTypeLike | None,
) -> None:
    """Give `module` the weights of one direction, all drawn from U(-1/√hidden_size, 1/√hidden_size)."""
    rows, bound = gates * hidden_size, 1 / math.sqrt(hidden_size)
    shapes: dict[str, tuple[int, ...] | None] = {
        "weight_ih": (rows, input_size),
        "weight_hh": (rows, proj_size or hidden_size),
        "bias_ih": (rows,) if bias else None,
        "bias_hh": (rows,) if bias else None,
        "weight_hr": (proj_size, hidden_size) if proj_size else None,
    }
    draw = (generator or default_generator).uniform
    for name, shape in shapes.items():
        setattr(module, name + suffix, None if shape is None else Parameter(draw(shape, -bound, bound, dtype)))


def weights_of(module: Module, suffix: str) -> Weights:
    """What `allocate` made."""
    return Weights(*[getattr(module, name) for name in names_of(suffix)])


@cache
def names_of(suffix: str) -> list[str]:
    return [name + suffix for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")]


def read_state(
    what: str, names: tuple[str, ...], state: Any, shapes: list[tuple[int, ...]], axes: str, dtype: np.dtype[Any]
) -> State:
    """A user's state as a tuple of Tensors of `shapes`; None stands for zeros.

    Raises
    ------
    InputError, ShapeError, DTypeError
        If a part is missing, or of another shape or dtype.
    """
    if state is None:
        return tuple(zeros(shape, dtype=dtype) for shape in shapes)
    parts: Any = state if len(names) > 1 else (state,)
    if len(names) > 1 and not (isinstance(state, tuple | list) and len(parts) == len(names)):
        found = f"{len(parts)} parts" if isinstance(state, tuple | list) else f"a {type(state).__name__}"
        raise InputError(
            f"{what}: the state is {found}; it has {len(names)}, ({', '.join(names)}).",
            "carry all of it from call to call, and detach each part.",
        )
    for name, part, shape in zip(names, parts, shapes, strict=True):
        check_dtype(what, name, part, dtype)
        if part.shape != shape:
            advice = f"pass a state of shape {shape}, or None for zeros."
            if len(shape) > 1 and (*part.shape[:-2], shape[-2], *part.shape[-1:]) == shape:  # the rows alone differ
                advice = (
                    f"the state is of {part.shape[-2]} rows and x of {shape[-2]}: drop a short last batch, or carry "
                    "the rows that go on."
                )
            raise ShapeError(f"{what}: {name} has shape {part.shape}, expected {axes} = {shape}.", advice)
    return tuple(part if isinstance(part, Tensor) else Tensor(part) for part in parts)


# ---- the cells ------------------------------------------------------------------------------------------------------


class Cell(Module):
    """One time step: a kind of cell says how many gates its weights have, names its states, and writes `step`."""

    gates: int
    states: tuple[str, ...] = ("h", "c")

    weight_ih: Parameter
    weight_hh: Parameter
    bias_ih: Parameter | None
    bias_hh: Parameter | None

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        check_sizes(type(self).__name__, 1, input_size=input_size, hidden_size=hidden_size)
        self.input_size, self.hidden_size, self.bias = input_size, hidden_size, bias
        allocate(self, "", self.gates, input_size, hidden_size, bias, 0, generator, dtype)

    def initial_state(self, *batch: int) -> Any:
        """Zeros: a state for `batch` rows."""
        return self._outside(read_state("", self.states, None, self._shapes(batch), "", self.weight_ih.dtype))

    def forward(self, x: Any, state: Any = None) -> Any:
        return self._outside(self.step(x, self._read(x, state)))

    def step(self, x: Any, state: State) -> State:
        """The equations."""
        raise NotImplementedError

    def _read(self, x: Any, state: Any) -> State:
        """The state as Tensors, once it and x are seen to fit; None is the initial one."""
        what, dtype = type(self).__name__, self.weight_ih.dtype
        check_features(what, x, self.input_size, "input_size", dtype)
        if x.ndim > 2:
            raise ShapeError(f"{what}: x has shape {x.shape}.", "a cell takes one time step, (batch, input_size).")
        batch = x.shape[:-1]
        axes = "(batch, features)" if batch else "(features,)"
        if state is None:
            state = self.initial_state(*batch)
        return read_state(what, self.states, state, self._shapes(batch), axes, dtype)

    def _shapes(self, batch: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [(*batch, self.hidden_size)] * len(self.states)

    def _outside(self, state: State) -> Any:
        return state[0] if len(state) == 1 else state

    def affine(self, x: Any) -> Any:
        """``W x + b``: the part of the gates that does not depend on the state."""
        return F.linear(x, self.weight_ih, self.shift())

    def shift(self) -> Any:
        """``b``, if there is one."""
        return None if self.bias_ih is None or self.bias_hh is None else self.bias_ih + self.bias_hh

    def extra_repr(self) -> str:
        return f"{self.input_size}, {self.hidden_size}{'' if self.bias else ', bias=False'}"


class _OfKind(Cell):
    """A cell whose equation layers run too."""

    def __init__(
        self,
        kind: Kind,
        input_size: int,
        hidden_size: int,
        bias: bool,
        generator: Generator | None,
        dtype: npt.DTypeLike | None,
    ) -> None:
        self.gates, self.states, self._equation = kind.gates, kind.states, kind.equation
        super().__init__(input_size, hidden_size, bias, generator=generator, dtype=dtype)

    def step(self, x: Any, state: State) -> State:
        prepare, go = self._equation(weights_of(self, ""))
        return go(prepare(x), state)


class RNNCell(_OfKind):
    """``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)``.

    Parameters
    ----------
    input_size, hidden_size : int
    bias : bool
        Default True.
    nonlinearity : {"tanh", "relu"}
    generator : Generator, optional
        What the weights are drawn with, from U(-1/√hidden_size, 1/√hidden_size).
    dtype : dtype, optional

    Notes
    -----
    ``cell(x, h=None) -> h`` with x (batch, input_size) or (input_size,), h (batch, hidden_size) or (hidden_size,);
    None is a state of zeros. Parameters: weight_ih (hidden_size, input_size), weight_hh (hidden_size, hidden_size),
    bias_ih and bias_hh (hidden_size,). Shapes and dtypes that do not fit raise a ShapeError or DTypeError.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        *,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(rnn_kind("RNNCell", nonlinearity), input_size, hidden_size, bias, generator, dtype)


class GRUCell(_OfKind):
    """``h' = (1 - z) n + z h`` (Cho et al. 2014); parameters and use as for `RNNCell`, weights stacked as r, z, n.

    Parameters
    ----------
    reset_after : bool
        True, the default and PyTorch's form: ``n = tanh(W x + b_ih + r (U h + b_hh))``. False, the paper's:
        ``n = tanh(W x + b_ih + U (r h) + b_hh)``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        reset_after: bool = True,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(gru_kind(reset_after), input_size, hidden_size, bias, generator, dtype)


class LSTMCell(_OfKind):
    """``c' = f c + i g, h' = o tanh(c')`` (Hochreiter & Schmidhuber 1997, Gers et al. 2000).

    Parameters as for `RNNCell`, weights stacked as i, f, g, o; ``cell(x, (h, c)) -> (h, c)``.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        bias: bool = True,
        *,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(LSTM_KIND, input_size, hidden_size, bias, generator, dtype)
