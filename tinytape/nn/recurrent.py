"""Layers over time: RNN, GRU and LSTM, and `Recurrent` for any cell.

All of them are one loop, `run`, around a cell's step. The state is an argument and a result, never kept in a layer.
"""

from __future__ import annotations

import warnings
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.tape import here
from ..engine.tensor import Tensor
from ..engine.tree import flatten, unflatten
from ..ops.elementwise import where
from ..ops.shape import broadcast_to, concatenate, expand_dims, squeeze, stack, swapaxes, unstack
from ..random import Generator, check_probability
from . import functional as F
from .cells import LSTM_KIND, Kind, Prepare, State, Step, allocate, gru_kind, read_state, rnn_kind, weights_of
from .checks import check_array, check_features, check_sizes
from .module import Module, Parameter

__all__ = ["GRU", "LSTM", "RNN", "Recurrent"]

Flags = npt.NDArray[np.bool_]
Lengths = npt.ArrayLike | Tensor | None


class Marks(NamedTuple):
    """Which steps count and before which a row starts anew, each (T, B) or None for all and none."""

    keep: Flags | None
    cut: Flags | None


def run(
    prepare: Prepare, step: Step, state: State, x: Any, marks: Marks, reverse: bool = False
) -> tuple[Tensor, State]:
    """Take `step` over the time axis 0 of `x`.

    It means::

        for t in range(T):                                  # or backwards
            before = zeros where cut[t], else state
            state = step(prepare(x[t]), before) where keep[t], else before
            y[t] = state[0] where keep[t], else 0
    """
    xs = unstack(prepare(x), axis=0)
    ys: list[Any] = [None] * len(xs)
    keep, cut = marks.keep, _cuts(marks, reverse)
    holes, cuts = _anywhere(None if keep is None else ~keep, len(xs)), _anywhere(cut, len(xs))
    context = here.context
    outer = context.step
    try:
        for t in reversed(range(len(xs))) if reverse else range(len(xs)):
            context.step = t
            if cuts[t]:
                state = tuple(_rows(cut, t, 0.0, s) for s in state)
            after = step(xs[t], state)
            if holes[t]:
                ys[t] = _rows(keep, t, after[0], 0.0)
                after = tuple(_rows(keep, t, new, old) for new, old in zip(after, state, strict=True))
            else:
                ys[t] = after[0]
            state = after
    finally:
        context.step = outer
    return stack(ys), state


def _anywhere(flags: Flags | None, steps: int) -> list[bool]:
    """For each step, whether any row is flagged: where none is, the loop has nothing extra to do."""
    return [False] * steps if flags is None else [bool(row.any()) for row in flags]


def _rows(flags: Any, t: int, yes: Any, no: Any) -> Tensor:
    """`yes` in the rows whose flag is set at step t, `no` in the others."""
    axes = getattr(yes, "ndim", 0) or no.ndim
    return where(flags[t].reshape(-1, *[1] * (axes - 1)), yes, no)


def _cuts(marks: Marks, reverse: bool) -> Flags | None:
    """Before which steps the state is zeroed, in the loop's direction.

    A row is cut between t - 1 and t, so backwards it is zeroed before t - 1; and where that step does not count,
    before the next one that does, so that masked steps leave the state alone.
    """
    keep, cut = marks
    if cut is None:
        return None
    if reverse:
        cut = np.concatenate([cut[1:], np.zeros_like(cut[:1])])
    if keep is None:
        return cut
    due, found = np.zeros_like(cut[0]), np.zeros_like(cut)
    for t in reversed(range(len(cut))) if reverse else range(len(cut)):
        due = due | cut[t]
        found[t] = due & keep[t]
        due = due & ~keep[t]
    return found


class _Sequence(NamedTuple):
    """An input brought to (T, B, ...), and what is needed to bring the output back."""

    x: Any
    marks: Marks
    unbatched: bool
    batch_first: bool

    def back(self, y: Tensor) -> Tensor:
        return squeeze(y, axis=1) if self.unbatched else swapaxes(y, 0, 1) if self.batch_first else y


def _read(what: str, x: Any, lengths: Lengths, mask: Any, reset: Any, batch_first: bool) -> _Sequence:
    if x.ndim not in (2, 3):
        layout = "(B, T, features)" if batch_first else "(T, B, features)"
        raise ShapeError(f"{what}: x has shape {x.shape}.", f"pass {layout}, or (T, features) for a single sequence.")
    unbatched = x.ndim == 2
    batch_first = batch_first and not unbatched
    outside = x.shape[:-1]
    x = expand_dims(x, 1) if unbatched else swapaxes(x, 0, 1) if batch_first else x
    steps, rows = x.shape[:2]
    if steps == 0:
        raise ShapeError(f"{what}: x has 0 time steps.", "pass at least one; a row without any has a length of 0.")

    def flags(name: str, given: Any) -> Flags | None:
        if given is None:
            return None
        found = given.data if isinstance(given, Tensor) else np.asarray(given)
        if found.dtype != np.bool_:
            raise DTypeError(f"{what}: {name} is {found.dtype}.", f"pass bools: {name}.astype(bool).")
        if found.shape != outside:
            raise ShapeError(
                f"{what}: {name} has shape {found.shape}, x has {outside} steps and rows.", f"pass one of {outside}."
            )
        return (found.T if batch_first else found).reshape(steps, rows)

    keep = flags("mask", mask)
    if lengths is not None:
        if keep is not None:
            raise InputError(f"{what}: both lengths and mask are given.", "pass one of them.")
        keep = _within(what, lengths, steps, rows, unbatched)
    if keep is not None:
        if keep.all():
            keep = None
        else:
            x = where(keep[:, :, None], x, 0.0)  # what stands in masked steps, even NaN, reaches no weight's gradient
    return _Sequence(x, Marks(keep, flags("reset", reset)), unbatched, batch_first)


def _within(what: str, lengths: Any, steps: int, rows: int, unbatched: bool) -> Flags:
    found = lengths.data if isinstance(lengths, Tensor) else np.asarray(lengths)
    if found.dtype.kind not in "iu":
        raise DTypeError(f"{what}: lengths are {found.dtype}.", "pass integers, one for each row.")
    if found.shape != (rows,) and not (unbatched and found.shape == ()):
        raise ShapeError(
            f"{what}: lengths have shape {found.shape}, x has {rows} rows.", f"pass one for each row, shape ({rows},)."
        )
    if found.size and not (found.min() >= 0 and found.max() <= steps):
        worst = found.max() if found.max() > steps else found.min()
        raise InputError(f"{what}: a length is {worst}, x has {steps} time steps.", f"lengths are 0 to {steps}.")
    return np.arange(steps)[:, None] < found.reshape(1, rows)


class _Layers(Module):
    """Layers of cells of one kind, in one direction or both."""

    def __init__(
        self,
        kind: Kind,
        input_size: int,
        hidden_size: int,
        num_layers: int,
        bias: bool,
        batch_first: bool,
        dropout: float,
        bidirectional: bool,
        proj_size: int,
        learn_initial_state: bool,
        generator: Generator | None,
        dtype: npt.DTypeLike | None,
    ) -> None:
        what = type(self).__name__
        check_sizes(what, 1, input_size=input_size, hidden_size=hidden_size, num_layers=num_layers)
        check_sizes(what, 0, proj_size=proj_size)
        check_probability(f"{what}, dropout", dropout)
        if proj_size >= hidden_size:
            raise InputError(
                f"{what}: proj_size is {proj_size}, hidden_size is {hidden_size}.",
                "a projection is smaller than the state; 0 is none.",
            )
        if dropout and num_layers == 1:
            warnings.warn(
                f"{what}: dropout = {dropout} acts between layers, and there is one.", UserWarning, stacklevel=3
            )
        self.input_size, self.hidden_size, self.num_layers, self.bias = input_size, hidden_size, num_layers, bias
        self.batch_first, self.dropout, self.bidirectional = batch_first, dropout, bidirectional
        self.proj_size, self.generator, self._kind = proj_size, generator, kind
        self._suffixes = [
            [f"_l{layer}{way}" for way in ("", "_reverse")[: 1 + bidirectional]] for layer in range(num_layers)
        ]
        width = self._widths["h"]
        for layer, ways in enumerate(self._suffixes):
            features = input_size if layer == 0 else width * len(ways)
            for suffix in ways:
                allocate(self, suffix, kind.gates, features, hidden_size, bias, proj_size, generator, dtype)
        if learn_initial_state:
            for name in kind.states:
                shape = (num_layers * (1 + bidirectional), 1, self._widths[name])
                setattr(self, f"initial_{name}", Parameter(np.zeros(shape, self._dtype)))

    @property
    def _widths(self) -> dict[str, int]:
        return {"h": self.proj_size or self.hidden_size, "c": self.hidden_size}

    @property
    def _dtype(self) -> np.dtype[Any]:
        return weights_of(self, "_l0").ih.dtype

    def forward(
        self, x: Any, state: Any = None, lengths: Lengths = None, mask: Any = None, reset: Any = None
    ) -> tuple[Tensor, Any]:
        what = type(self).__name__
        check_features(what, x, self.input_size, "input_size", self._dtype)
        sequence = _read(what, x, lengths, mask, reset, self.batch_first)
        y, initial = sequence.x, self._initial(state, sequence)
        final: list[State] = []
        for layer, ways in enumerate(self._suffixes):
            if layer > 0:
                y = F.dropout(y, self.dropout, self.training, generator=self.generator)
            outputs: list[Tensor] = []
            for way, suffix in enumerate(ways):
                prepare, step = self._kind.equation(weights_of(self, suffix))
                output, last = run(prepare, step, initial[len(final)], y, sequence.marks, reverse=way == 1)
                outputs.append(output)
                final.append(last)
            y = outputs[0] if len(outputs) == 1 else concatenate(outputs, axis=-1)
        states = tuple(stack(parts) for parts in zip(*final, strict=True))
        if sequence.unbatched:
            states = tuple(squeeze(part, axis=1) for part in states)
        return sequence.back(y), states[0] if len(states) == 1 else states

    def _initial(self, state: Any, sequence: _Sequence) -> list[State]:
        """A state for each layer and direction."""
        rows: tuple[int, ...] = () if sequence.unbatched else sequence.x.shape[1:2]
        names, runs = self._kind.states, self.num_layers * (1 + self.bidirectional)
        if state is None and hasattr(self, "initial_h"):
            shapes = [(runs, sequence.x.shape[1], self._widths[name]) for name in names]
            parts = tuple(broadcast_to(getattr(self, f"initial_{n}"), s) for n, s in zip(names, shapes, strict=True))
        else:
            axes = f"(num_layers × directions, {'batch, ' if rows else ''}features)"
            shapes = [(runs, *rows, self._widths[name]) for name in names]
            parts = read_state(type(self).__name__, names, state, shapes, axes, self._dtype)
            if sequence.unbatched:
                parts = tuple(expand_dims(part, 1) for part in parts)
        return list(zip(*(unstack(part, axis=0) for part in parts), strict=True))

    def extra_repr(self) -> str:
        options = {
            "num_layers": 1, "bias": True, "batch_first": False, "dropout": 0, "bidirectional": False, "proj_size": 0,
        }  # fmt: skip
        told = (f", {name}={getattr(self, name)}" for name, usual in options.items() if getattr(self, name) != usual)
        return f"{self.input_size}, {self.hidden_size}{''.join(told)}"


class RNN(_Layers):
    """``h' = tanh(W_ih x + b_ih + W_hh h + b_hh)`` over time (Elman 1990), as in PyTorch.

    Parameters
    ----------
    input_size, hidden_size : int
    num_layers : int
        Each layer above the first takes the outputs of the one below. Default 1.
    nonlinearity : {"tanh", "relu"}
    bias : bool
        Default True.
    batch_first : bool
        x and y are (batch, time, features); states are as ever. Default False.
    dropout : float
        Probability of dropout on the outputs of every layer but the last, while training. Default 0.
    bidirectional : bool
        Also run backwards in time, with weights of its own; outputs are joined on the last axis. Default False.
    learn_initial_state : bool
        Start from Parameters ``initial_h`` (and ``initial_c``), zeros at first, where no state is given.
    generator : Generator, optional
        What weights, from U(-1/√hidden_size, 1/√hidden_size), and dropout masks are drawn with.
    dtype : dtype, optional

    Notes
    -----
    ``y, h_n = rnn(x, h_0=None, lengths=None, mask=None, reset=None)``:

    - x is (T, B, input_size), or (T, input_size) for a single sequence; y is (T, B, directions · hidden_size).
    - h_0 and h_n are (num_layers · directions, B, hidden_size), without B for a single sequence. None: zeros.
    - lengths, (B,) integers from 0 to T, or mask, (T, B) bools, say which steps count. The others leave state and
      gradients untouched, y is zero there, and h_n is the state after a row's last step that counts; backwards, a
      row starts at its own last step. Nothing is sorted.
    - reset, (T, B) bools: the row starts a new sequence at step t, so its state is zeroed before t (going
      backwards, after t).
    - mask and reset are laid out as x is: (B, T) with batch_first, (T,) for a single sequence.

    Parameters are ``weight_ih_l0`` (hidden_size, features), ``weight_hh_l0``, ``bias_ih_l0``, ``bias_hh_l0``, then
    ``_l1`` and so on, each with the suffix ``_reverse`` for the other direction: PyTorch's names, shapes and order.

    Raises
    ------
    ShapeError, DTypeError, InputError
        If x, a state, lengths, mask or reset do not fit, before anything is computed.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        nonlinearity: Literal["tanh", "relu"] = "tanh",
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        learn_initial_state: bool = False,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(
            rnn_kind("RNN", nonlinearity), input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, learn_initial_state, generator, dtype,
        )  # fmt: skip


class GRU(_Layers):
    """Gated recurrent units over time (Cho et al. 2014); parameters and use as for `RNN`, equations as for `GRUCell`.

    Parameters
    ----------
    reset_after : bool
        True, the default and PyTorch's form: the reset gate acts after the recurrent product. False: before it.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        *,
        reset_after: bool = True,
        learn_initial_state: bool = False,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(
            gru_kind(reset_after), input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, learn_initial_state, generator, dtype,
        )  # fmt: skip
        self.reset_after = reset_after


class LSTM(_Layers):
    """Long short-term memory over time (Hochreiter & Schmidhuber 1997); parameters as for `RNN`, and one more.

    Parameters
    ----------
    proj_size : int
        Project the output, and with it the carried h, to this many features by ``weight_hr_l0`` (proj_size,
        hidden_size) (Sak et al. 2014). Default 0: no projection.

    Notes
    -----
    ``y, (h_n, c_n) = lstm(x, (h_0, c_0), lengths=None, mask=None, reset=None)``, as for `RNN`. h_0 and h_n have
    proj_size features if there is a projection, c_0 and c_n always hidden_size.
    """

    def __init__(
        self,
        input_size: int,
        hidden_size: int,
        num_layers: int = 1,
        bias: bool = True,
        batch_first: bool = False,
        dropout: float = 0.0,
        bidirectional: bool = False,
        proj_size: int = 0,
        *,
        learn_initial_state: bool = False,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(
            LSTM_KIND, input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, learn_initial_state, generator, dtype,
        )  # fmt: skip


class Recurrent(Module):
    """Any cell over time: ``nn.Recurrent(cell)`` does for your cell what `LSTM` does for `LSTMCell`.

    Parameters
    ----------
    cell : Module
        ``cell(x, state) -> state`` for x (B, features). A state is a Tensor (B, ...), or a tuple, list or dict of
        them, whose first is put out. Without a given state, ``cell.initial_state(B)`` is asked for one.
    batch_first : bool
        x and y are (batch, time, features). Default False.
    reverse : bool
        Go backwards in time. Default False.

    Notes
    -----
    ``y, state = recurrent(x, state, lengths=None, mask=None, reset=None)``, as for `RNN`; states as the cell's own.
    """

    def __init__(self, cell: Module, batch_first: bool = False, reverse: bool = False) -> None:
        self.cell, self.batch_first, self.reverse = cell, batch_first, reverse

    def forward(
        self, x: Any, state: Any = None, lengths: Lengths = None, mask: Any = None, reset: Any = None
    ) -> tuple[Tensor, Any]:
        check_array("Recurrent", "x", x)
        sequence = _read("Recurrent", x, lengths, mask, reset, self.batch_first)
        rows = sequence.x.shape[1]
        if state is None:
            make = getattr(self.cell, "initial_state", None)
            if make is None:
                raise InputError(
                    f"Recurrent: {type(self.cell).__name__} has no initial_state(batch), and no state is given.",
                    "pass one, or give the cell that method.",
                )
            state = make(rows)
        elif sequence.unbatched:
            state = unflatten(state, [expand_dims(part, 0) for part in flatten(state)])
        if any(part.shape[:1] != (rows,) for part in flatten(state)):
            found = [part.shape for part in flatten(state)]
            raise ShapeError(f"Recurrent: x has {rows} rows, the state has shapes {found}.", "states are (B, ...).")

        def step(x: Any, parts: State) -> State:
            return tuple(flatten(self.cell(x, unflatten(state, parts))))

        y, last = run(lambda x: x, step, tuple(flatten(state)), sequence.x, sequence.marks, self.reverse)
        if sequence.unbatched:
            last = [squeeze(part, axis=0) for part in last]
        return sequence.back(y), unflatten(state, last)
