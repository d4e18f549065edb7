"""Problems whose answer lies far back, and the networks that `models.long_lag` tries on them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

import tinytape as tt

F, init = tt.nn.functional, tt.nn.init
RATES = {  # the networks, and the learning rate that each stands
    "rnn": 1e-3, "identity": 1e-3, "identity-1.1": 1e-3, "ortho": 1e-3, "gru": 1e-2, "lstm": 1e-2, "chrono": 1e-2,
    "ln-lstm": 1e-2,
}  # fmt: skip


class Problem(NamedTuple):
    """Inputs (T, B, inputs), and targets (A, B, ...) for the last A steps."""

    inputs: int
    outputs: int
    draw: Callable[[int, int, tt.Generator], tuple[np.ndarray, np.ndarray]]
    loss: Callable[[Any, np.ndarray], tt.Tensor]
    asked: int  # of how many steps, at the end, the score is
    guess: float  # the score of who knows all but what is to be remembered

    def score(self, outputs: tt.Tensor, targets: np.ndarray) -> float:
        """The mean squared error, or the share of wrong answers."""
        outputs, targets = outputs[-self.asked :], targets[-self.asked :]
        if self.loss is F.mse_loss:
            return self.loss(outputs, targets).item()
        return float((outputs.numpy().argmax(-1) != targets).mean())


def draw_adding(count: int, steps: int, generator: tt.Generator) -> tuple[np.ndarray, np.ndarray]:
    x, y = tt.data.adding(count, steps, generator)
    return x, y[None]


def draw_copy(count: int, steps: int, generator: tt.Generator) -> tuple[np.ndarray, np.ndarray]:
    x, y = tt.data.copy_memory(count, steps, generator)
    return np.eye(10, dtype=np.float32)[x], y


def draw_order(count: int, steps: int, generator: tt.Generator) -> tuple[np.ndarray, np.ndarray]:
    x, y = tt.data.temporal_order(count, steps, generator)
    return np.eye(6, dtype=np.float32)[x], y[None]


PROBLEMS = {
    "adding": Problem(2, 1, draw_adding, F.mse_loss, 1, 1 / 6),
    "copy": Problem(10, 9, draw_copy, F.cross_entropy, 10, 7 / 8),
    "order": Problem(6, 4, draw_order, F.cross_entropy, 1, 3 / 4),
}


def layer_of(network: str, inputs: int, hidden: int, steps: int, generator: tt.Generator) -> tt.nn.Module:
    if network == "gru":
        return tt.nn.GRU(inputs, hidden, generator=generator)
    if network == "lstm":
        return init.forget_gate_bias_(tt.nn.LSTM(inputs, hidden, generator=generator), 1.0)
    if network == "chrono":  # units that at first keep what they hold for 1 to T steps (Tallec & Ollivier 2018)
        lstm = init.forget_gate_bias_(tt.nn.LSTM(inputs, hidden, generator=generator), 0.0)
        keep = np.log(generator.uniform((hidden,), 1.0, max(steps - 1.0, 2.0)))
        with tt.no_grad():
            lstm.bias_ih_l0[:hidden], lstm.bias_ih_l0[hidden : 2 * hidden] = -keep, keep  # of the gates i, f, g, o
        return lstm
    if network == "ln-lstm":
        cell = tt.nn.LayerNormLSTMCell(inputs, hidden, generator=generator)
        with tt.no_grad():
            cell.bias_ih[hidden : 2 * hidden] = 1.0
        return tt.nn.Recurrent(cell)
    nonlinearity = "relu" if network.startswith("identity") else "tanh"
    rnn = tt.nn.RNN(inputs, hidden, nonlinearity=nonlinearity, generator=generator)
    if network == "ortho":
        init.orthogonal_(rnn.weight_hh_l0, generator=generator)
    if network.startswith("identity"):  # units that at first only add up (Le, Jaitly & Hinton 2015), or with 1.1, grow
        init.identity_(rnn.weight_hh_l0, float(network.partition("-")[2] or 1))
        init.normal_(rnn.weight_ih_l0, 0.0, 0.001, generator)
        for bias in (rnn.bias_ih_l0, rnn.bias_hh_l0):
            init.zeros_(bias)
    return rnn


class Network(tt.nn.Module):
    """A layer, and a linear read-out of the last answers."""

    def __init__(self, network: str, problem: Problem, hidden: int, steps: int, generator: tt.Generator) -> None:
        self.layer = layer_of(network, problem.inputs, hidden, steps, generator)
        self.head = tt.nn.Linear(hidden, problem.outputs, generator=generator)

    def forward(self, x: np.ndarray, answers: int) -> tt.Tensor:
        y, _ = self.layer(x)
        return self.head(y[-answers:])
