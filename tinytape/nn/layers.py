"""Layers over time: RNN, GRU and LSTM.

All of them are a `scan` of a cell's step, which means::

    for t in range(T):                                      # or backwards
        before = zeros where cut[t], else state
        after = cell(x[t], before)
        state = after where keep[t], else before
        y[t] = after[0] where keep[t], else 0

The state is an argument and a result, never kept in a layer.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from ..compile.captures import Captures
from ..engine.errors import InputError
from ..engine.tape import Node, here, take_number
from ..engine.tensor import Tensor
from ..engine.tree import flatten
from ..loop.budget import Plan, check_checkpoint
from ..loop.probes import watching
from ..loop.scan import by_kernels, eager, scan
from ..ops.shape import broadcast_to, concatenate, expand_dims, reshape, squeeze, stack, unstack
from ..random import Generator, check_probability
from . import functional as F
from .again import Run, again, ready
from .cells import (
    LSTM_KIND,
    Kind,
    Prepare,
    State,
    Step,
    Weights,
    allocate,
    gru_kind,
    names_of,
    read_state,
    rnn_kind,
    weights_of,
)
from .checks import check_features, check_sizes
from .module import Module, Parameter
from .sequences import Inputs, Lengths, Sequence, begin, end, read, watched

__all__ = ["GRU", "LSTM", "RNN"]


Equation: TypeAlias = Callable[[Weights], tuple[Prepare, Step]]
Checkpoint: TypeAlias = int | str | Plan | None


def _over_time(
    name: str,
    equation: Equation,
    weights: Weights,
    state: State,
    inputs: Inputs,
    reverse: bool,
    checkpoint: Checkpoint,
) -> tuple[State, Tensor]:
    """A direction's last state and outputs."""
    steps = len(inputs.x)
    step = _step_of(name, equation, weights)
    watch = watching()
    other = None if watch is None else watch.step(step)
    if other is not None:
        return eager(other, state, inputs, steps, reverse)
    found = by_kernels(step, state, inputs, flatten(state), flatten(inputs), steps, reverse, "auto", checkpoint)
    if found is None and checkpoint is not None:
        return scan(step, state, inputs, reverse=reverse, checkpoint=checkpoint, compiled=False)
    if found is None:
        prepare, go = equation(weights)
        hoisted = _step_of(name, lambda weights: (lambda x: x, go), weights)
        found = eager(hoisted, state, inputs._replace(x=prepare(inputs.x)), steps, reverse)
    return found


def _step_of(name: str, equation: Equation, weights: Weights) -> Any:
    """A direction's step. It binds the weights itself, so that a kernel sees where they come from."""

    def step(state: State, now: Inputs) -> tuple[State, Tensor]:
        prepare, go = equation(weights)
        before = begin(state, now)
        after = go(prepare(now.x), before)
        return end(before, after, after[0], now)

    found: Any = step
    found.__name__ = name
    tensors = [w for w in weights if w is not None]
    if len({id(w.raw) for w in tensors}) == len(tensors):  # to look through it would cost as much as a small kernel
        forms = _forms(weights)

        def matched(same_step: Any) -> list[Any] | None:  # without naming the step, which would keep itself alive
            return tensors if _forms(weights) == forms else None

        found.captures = Captures((equation, forms), tensors, True, matched)
    return found


def _forms(weights: Weights) -> tuple[Any, ...]:
    return tuple([None if w is None else (w.raw.shape, w.raw.dtype.char, w.node is None) for w in weights])


def _apart(part: Tensor) -> tuple[Tensor, ...]:
    """Along axis 0; of a single layer as a view, which is what counts where one token is taken at a time."""
    if len(part.raw) > 1:
        return unstack(part, axis=0)
    if part.node is None and here.context.tape is None:  # an op would only do the same
        return (Tensor.of(part.raw[0], None, part.storage),)
    return (squeeze(part, axis=0),)


def _together(parts: tuple[Tensor, ...]) -> Tensor:
    """The inverse of `_apart`."""
    part = parts[0]
    if len(parts) > 1:
        return stack(parts)
    context, raw = here.context, part.raw
    if context.tape is not None:
        return reshape(part, (1, *raw.shape))
    node = part.node
    if node is not None:  # what the op would record, without the checks of its call
        shape = (1, *raw.shape)
        node = Node(take_number(), reshape.op, (node,), (raw.shape,), shape, raw.dtype, None, context.step)
    return Tensor.of(raw[None], node, part.storage)


def _joined(final: list[State], unbatched: bool = False) -> Any:
    """The last states of all layers and directions as a user is given them."""
    states = [_together(parts) for parts in zip(*final, strict=True)]
    if unbatched:
        states = [squeeze(part, axis=1) for part in states]
    return states[0] if len(states) == 1 else tuple(states)


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
        checkpoint: Checkpoint,
        generator: Generator | None,
        dtype: npt.DTypeLike | None,
    ) -> None:
        what = type(self).__name__
        check_checkpoint(what, checkpoint)
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
        self.checkpoint: Checkpoint = checkpoint
        self._suffixes = [
            [f"_l{layer}{way}" for way in ("", "_reverse")[: 1 + bidirectional]] for layer in range(num_layers)
        ]
        self._weight_names = tuple([name for ways in self._suffixes for suffix in ways for name in names_of(suffix)])
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
        return getattr(self, "weight_ih_l0").dtype  # noqa: B009 - a name that only `allocate` knows

    def forward(
        self, x: Any, state: Any = None, lengths: Lengths = None, mask: Any = None, reset: Any = None
    ) -> tuple[Tensor, Any]:
        if lengths is mask is reset is None and self._is_one_way():
            held = vars(self)
            known = again(self, [held[name] for name in self._weight_names], x, state, self._runs)
            if known is not None:
                return self._run_again(*known)
        what = type(self).__name__
        check_features(what, x, self.input_size, "input_size", self._dtype)
        sequence = read(what, x, lengths, mask, reset, self.batch_first)
        y = sequence.x if isinstance(sequence.x, Tensor) else Tensor(sequence.x)
        initial = self._initial(state, sequence)
        final: list[State] = []
        for layer, ways in enumerate(self._suffixes):
            if layer > 0:
                y = F.dropout(y, self.dropout, self.training, generator=self.generator)
            outputs: list[Tensor] = []
            for way, suffix in enumerate(ways):
                reverse, weights = way == 1, weights_of(self, suffix)
                inputs, begun = sequence.inputs(y, reverse), initial[len(final)]
                if watching() is not None:
                    inputs = watched(self, suffix[1:], self._kind.states, begun, inputs, reverse)
                last, output = _over_time(what, self._kind.equation, weights, begun, inputs, reverse, self.checkpoint)
                outputs.append(output)
                final.append(last)
            y = outputs[0] if len(outputs) == 1 else concatenate(outputs, axis=-1)
        return sequence.back(y), _joined(final, sequence.unbatched)

    def _is_one_way(self) -> bool:
        """Whether a call without marks is one scan after the other."""
        aside = self.batch_first or self.bidirectional or (self.training and self.dropout)
        return not aside and self.checkpoint is None

    def _runs(self, state: Any, x: Tensor) -> list[Run] | None:
        """For `again`: for each layer, what runs its step."""
        what = type(self).__name__
        check_features(what, x, self.input_size, "input_size", self._dtype)
        sequence = read(what, x, None, None, None, self.batch_first)
        initial = self._initial(state, sequence)
        if sequence.unbatched or (state is None and hasattr(self, "initial_h")):
            return None
        found: list[Run] = []
        zeros = self._zeros(x.raw.shape[1])
        for (suffix,), begun, nothing in zip(self._suffixes, initial, zeros, strict=True):
            if found:
                x, _ = found[-1](x, begun)
            run = ready(_step_of(what, self._kind.equation, weights_of(self, suffix)), x, begun, nothing)
            if run is None:
                return None
            found.append(run)
        return found

    def _run_again(self, x: Tensor, parts: list[Tensor], runs: list[Run]) -> tuple[Tensor, Any]:
        initial = zip(*map(_apart, parts), strict=True) if parts else [None] * len(runs)
        final: list[State] = []
        for run, begun in zip(runs, initial, strict=True):
            x, last = run(x, begun)
            final.append(last)
        return x, _joined(final)

    def _zeros(self, rows: int) -> list[State]:
        """The state from which each layer starts where none is given."""
        widths, dtype = [self._widths[name] for name in self._kind.states], self._dtype
        count = self.num_layers * (1 + self.bidirectional)
        return [tuple([Tensor.of(np.zeros((rows, n), dtype)) for n in widths]) for _ in range(count)]

    def _initial(self, state: Any, sequence: Sequence) -> list[State]:
        """A state for each layer and direction."""
        if state is None and not hasattr(self, "initial_h"):
            return self._zeros(sequence.x.shape[1])
        rows = () if sequence.unbatched else sequence.x.shape[1:2]
        names, runs = self._kind.states, self.num_layers * (1 + self.bidirectional)
        if state is None:
            shapes = [(runs, sequence.x.shape[1], self._widths[name]) for name in names]
            parts = tuple(broadcast_to(getattr(self, f"initial_{n}"), s) for n, s in zip(names, shapes, strict=True))
        else:
            axes = "(num_layers × directions, batch, features)" if rows else "(num_layers × directions, features)"
            shapes = [(runs, *rows, self._widths[name]) for name in names]
            parts = read_state(type(self).__name__, names, state, shapes, axes, self._dtype)
            if sequence.unbatched:
                parts = tuple(expand_dims(part, 1) for part in parts)
        return list(zip(*map(_apart, parts), strict=True))

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
    checkpoint : int, str or Plan, optional
        What each layer and direction keeps for the backward walk, as for `scan`. Default None: everything.
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

    The loop over time is a `scan`: a kernel, compiled when it is first needed and kept on disk, whatever the sizes.
    Inside `no_compile`, in forward mode and in float16 it runs step by step.

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
        checkpoint: Checkpoint = None,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(
            rnn_kind("RNN", nonlinearity), input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, learn_initial_state, checkpoint, generator, dtype,
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
        checkpoint: Checkpoint = None,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(
            gru_kind(reset_after), input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, 0, learn_initial_state, checkpoint, generator, dtype,
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
        checkpoint: Checkpoint = None,
        generator: Generator | None = None,
        dtype: npt.DTypeLike | None = None,
    ) -> None:
        super().__init__(
            LSTM_KIND, input_size, hidden_size, num_layers, bias, batch_first, dropout,
            bidirectional, proj_size, learn_initial_state, checkpoint, generator, dtype,
        )  # fmt: skip
