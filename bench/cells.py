"""The cells as a user would write them, one text for every library that has tensors and these few functions."""

from collections.abc import Callable
from typing import Any, NamedTuple

from bench.cases import Case
from bench.worker import Step

EPS = 1e-5  # under the root of layer normalisation

Weights = dict[str, Any]  # of one direction, by name without a suffix
State = tuple[Any, ...]


class Library(NamedTuple):
    """What the texts below take from a library."""

    tanh: Callable[[Any], Any]
    sigmoid: Callable[[Any], Any]
    split: Callable[[Any, int], Any]  # in equal parts along the features
    recur: Callable[[Any, Any, Any], Any]  # a, h, weight_hh -> a + the product of h with it
    normalise: Callable[[Any], Any]  # to mean 0 and variance 1 over the features
    where: Callable[[Any, Any, Any], Any]


def from_input(cell: str, lib: Library, w: Weights, x: Any) -> Any:
    """The part that does not depend on the state, for one step or for all at once."""
    a = x @ w["weight_ih"].T
    if cell in ("lstm", "rnn"):
        return a + (w["bias_ih"] + w["bias_hh"])
    if cell == "gru":
        return a + w["bias_ih"]
    if cell == "layernorm":
        a = lib.normalise(a) * w["gain_ih"]
    return a + w["bias"]


def rnn(lib: Library, w: Weights, a: Any, state: State) -> State:
    return (lib.tanh(lib.recur(a, state[0], w["weight_hh"])),)


def gru(lib: Library, w: Weights, a: Any, state: State) -> State:
    (h,) = state
    a_r, a_z, a_n = lib.split(a, 3)
    u_r, u_z, u_n = lib.split(lib.recur(w["bias_hh"], h, w["weight_hh"]), 3)
    r, z = lib.sigmoid(a_r + u_r), lib.sigmoid(a_z + u_z)
    n = lib.tanh(a_n + r * u_n)
    return (n + z * (h - n),)


def lstm(lib: Library, w: Weights, a: Any, state: State) -> State:
    h, c = state
    i, f, g, o = lib.split(lib.recur(a, h, w["weight_hh"]), 4)
    c = lib.sigmoid(f) * c + lib.sigmoid(i) * lib.tanh(g)
    return lib.sigmoid(o) * lib.tanh(c), c


def peephole(lib: Library, w: Weights, a: Any, state: State) -> State:
    """Gers & Schmidhuber 2000: the gates see the cell, the output gate the new one."""
    h, c = state
    i, f, g, o = lib.split(lib.recur(a, h, w["weight_hh"]), 4)
    i, f = lib.sigmoid(i + w["peep_i"] * c), lib.sigmoid(f + w["peep_f"] * c)
    c = f * c + i * lib.tanh(g)
    return lib.sigmoid(o + w["peep_o"] * c) * lib.tanh(c), c


def layernorm(lib: Library, w: Weights, a: Any, state: State) -> State:
    """Ba, Kiros & Hinton 2016: both products are normalised over all gates, and the cell before the output."""
    h, c = state
    u = lib.normalise(lib.recur(0.0, h, w["weight_hh"])) * w["gain_hh"]
    i, f, g, o = lib.split(a + u, 4)
    c = lib.sigmoid(f) * c + lib.sigmoid(i) * lib.tanh(g)
    return lib.sigmoid(o) * lib.tanh(lib.normalise(c) * w["gain_c"] + w["bias_c"]), c


STEPS = {"rnn": rnn, "gru": gru, "lstm": lstm, "peephole": peephole, "layernorm": layernorm}


def advance(cell: str, lib: Library, w: Weights, a: Any, keep: Any, state: State) -> tuple[State, Any]:
    """One step, and its output: rows that `keep` leaves out keep their state and put out 0."""
    after = STEPS[cell](lib, w, a, state)
    if keep is None:
        return after, after[0]
    kept = tuple(lib.where(keep, new, old) for new, old in zip(after, state, strict=True))
    return kept, lib.where(keep, after[0], 0.0)


def of_direction(case: Case, weights: Weights, suffix: str) -> Weights:
    names = ("weight_ih", "weight_hh", *case.facts.vectors)
    return {name: weights[name + suffix] for name in names}


def through_layers(
    case: Case, weights: Weights, x: Any, over_time: Callable[..., Any], concatenate: Callable[[list[Any]], Any]
) -> Any:
    """All layers and directions; ``over_time(w, x, reverse)`` runs one of them."""
    for ways in case.suffixes:
        ys = [over_time(of_direction(case, weights, suffix), x, way == 1) for way, suffix in enumerate(ways)]
        x = ys[0] if len(ys) == 1 else concatenate(ys)
    return x


def one_token(case: Case, lib: Library, layers: list[Weights], x: Any, states: list[State]) -> tuple[Any, list[State]]:
    """One step through all layers, without gradients: the output and the states to carry."""
    after = []
    for w, state in zip(layers, states, strict=True):
        after.append(STEPS[case.cell](lib, w, from_input(case.cell, lib, w, x), state))
        x = after[-1][0]
    return x, after


def training(case: Case, leaves: Weights, x: Any, dy: Any, forward: Callable[[], Any]) -> Step:
    """``forward()`` gives y, and ``backward`` the gradients; tinytape and PyTorch share these names."""

    def step():
        for leaf in (x, *leaves.values()):
            leaf.grad = None
        y = forward()
        (y[-1] if case.last else y).backward(dy)

        def results():
            found = {"d" + name: leaf.grad.numpy() for name, leaf in leaves.items()}
            return {"y": y.detach().numpy()} | ({"dx": x.grad.numpy()} if case.input_gradient else {}) | found

        return results

    return step
