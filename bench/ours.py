"""tinytape as a contender over time: the built-in layers, and any cell through `scan`."""

from typing import Any

import numpy as np

from bench import cells
from bench.cases import BUILT_IN, Case, inputs, keep_flags, row_lengths, weights
from bench.worker import Step


def library() -> cells.Library:
    import tinytape as tt

    def normalise(x: Any) -> Any:
        centred = x - x.mean(axis=-1, keepdims=True)
        return centred / tt.sqrt((centred * centred).mean(axis=-1, keepdims=True) + cells.EPS)

    return cells.Library(
        tanh=tt.tanh,
        sigmoid=tt.sigmoid,
        split=lambda x, parts: tt.split(x, parts, axis=-1),
        recur=lambda a, h, weight: a + h @ weight.T,
        normalise=normalise,
        where=tt.where,
    )


def prepare(case: Case, eager: bool = False) -> Step:
    """`tinytape.nn` where it has the cell, else `tinytape.scan`; `eager` is always the latter, step by step."""
    built_in = case.cell in BUILT_IN and not eager
    if case.token:
        return layer_by_token(case) if built_in else scan_by_token(case, eager)
    return layer(case) if built_in else scan(case, eager)


def built_in_layer(case: Case) -> Any:
    import tinytape as tt

    make = {"lstm": tt.nn.LSTM, "gru": tt.nn.GRU, "rnn": tt.nn.RNN}[case.cell]
    options = {"num_layers": case.layers, "bidirectional": case.bidirectional, "dtype": case.dtype}
    found = make(case.I, case.H, **options)
    found.load_state_dict(weights(case))
    return found


def layer(case: Case) -> Step:
    import tinytape as tt

    model, x = built_in_layer(case), tt.tensor(inputs(case)[0], requires_grad=case.input_gradient)
    lengths = row_lengths(case) if case.lengths else None
    leaves, dy = dict(model.named_parameters()), inputs(case)[1]
    return cells.training(case, leaves, x, dy, lambda: model(x, lengths=lengths)[0])


def scan(case: Case, eager: bool) -> Step:
    import tinytape as tt

    lib, compiled, cell = library(), False if eager else "auto", case.cell
    leaves = {name: tt.tensor(value, requires_grad=True) for name, value in weights(case).items()}
    x, keep = tt.tensor(inputs(case)[0], requires_grad=case.input_gradient), keep_flags(case)
    zeros = (np.zeros((case.B, case.H), case.dtype),) * case.facts.states

    def over_time(w: cells.Weights, x: Any, reverse: bool) -> Any:
        def step(state: Any, now: Any) -> Any:
            x, keep = now
            return cells.advance(cell, lib, w, cells.from_input(cell, lib, w, x), keep, state)

        return tt.scan(step, zeros, (x, keep), reverse=reverse, compiled=compiled)[1]

    def forward() -> Any:
        return cells.through_layers(case, leaves, x, over_time, lambda ys: tt.concatenate(ys, axis=-1))

    return cells.training(case, leaves, x, inputs(case)[1], forward)


def layer_by_token(case: Case) -> Step:
    import tinytape as tt

    model, x = built_in_layer(case), tt.tensor(inputs(case)[0])

    def step():
        state, ys = None, []
        with tt.no_grad():
            for t in range(case.T):
                y, state = model(x[t : t + 1], state)
                ys.append(y)
        return lambda: {"y": np.concatenate([y.numpy() for y in ys])}

    return step


def scan_by_token(case: Case, eager: bool) -> Step:
    import tinytape as tt

    lib, compiled = library(), False if eager else "auto"
    captured = {name: tt.tensor(value) for name, value in weights(case).items()}
    layers = [cells.of_direction(case, captured, suffix) for (suffix,) in case.suffixes]
    x = tt.tensor(inputs(case)[0])
    zeros = (np.zeros((case.B, case.H), case.dtype),) * case.facts.states

    def one(states: Any, now: Any) -> Any:
        y, after = cells.one_token(case, lib, layers, now, states)
        return after, y

    def step():
        states, ys = [zeros] * case.layers, []
        with tt.no_grad():
            for t in range(case.T):
                states, y = tt.scan(one, states, x[t : t + 1], compiled=compiled)
                ys.append(y)
        return lambda: {"y": np.concatenate([y.numpy() for y in ys])}

    return step
