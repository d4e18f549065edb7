"""What the recurrent benchmarks compute: shapes, weights, inputs, operations counted."""

from dataclasses import asdict, dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np

Arrays = dict[str, np.ndarray]


class CellFacts(NamedTuple):
    """What a kind of cell has: gates, carried arrays, and its vectors, their lengths counted in H's."""

    gates: int
    states: int
    vectors: dict[str, int]


CELLS = {
    "lstm": CellFacts(4, 2, {"bias_ih": 4, "bias_hh": 4}),
    "gru": CellFacts(3, 1, {"bias_ih": 3, "bias_hh": 3}),
    "rnn": CellFacts(1, 1, {"bias_ih": 1, "bias_hh": 1}),
    "peephole": CellFacts(4, 2, {"bias": 4, "peep_i": 1, "peep_f": 1, "peep_o": 1}),
    "layernorm": CellFacts(4, 2, {"gain_ih": 4, "gain_hh": 4, "bias": 4, "gain_c": 1, "bias_c": 1}),
}
# A recurrent gain of 1 makes the layer-norm cell chaotic from the start: after 1,000 steps no two ways of rounding
# agree on a gradient, so nothing could be compared. 0.1 is what Cooijmans et al. 2017 start from.
GAINS = {"gain_ih": 1.0, "gain_hh": 0.1, "gain_c": 1.0}
BUILT_IN = ("lstm", "gru", "rnn")  # those that torch.nn has


@dataclass(frozen=True)
class Case:
    """One row of a benchmark."""

    cell: str
    T: int
    B: int
    I: int
    H: int
    layers: int = 1
    bidirectional: bool = False
    lengths: bool = False  # rows end at different steps
    last: bool = False  # the loss is on the last step only
    token: bool = False  # inference, one step a call, with the state carried by the caller
    input_gradient: bool = True
    dtype: str = "float32"

    def options(self) -> dict[str, Any]:
        """What JSON can hold, and `Case(**options)` reads."""
        return asdict(self)

    @property
    def facts(self) -> CellFacts:
        return CELLS[self.cell]

    @property
    def shape(self) -> tuple[int, int, int, int]:
        return self.T, self.B, self.I, self.H

    @property
    def suffixes(self) -> list[list[str]]:
        """How the weights of each layer and direction are called: `_l0`, `_l0_reverse`, ..."""
        ways = ("", "_reverse")[: 1 + self.bidirectional]
        return [[f"_l{layer}{way}" for way in ways] for layer in range(self.layers)]

    def features(self, layer: int) -> int:
        return self.I if layer == 0 else self.H * (1 + self.bidirectional)

    @property
    def label(self) -> str:
        """The shape, and what is not as usual."""
        usual = Case(self.cell, *self.shape)
        words = {
            "layers": f"{self.layers} layers", "bidirectional": "both ways", "lengths": "lengths", "last": "last step",
            "token": "by token", "input_gradient": "no dx", "dtype": self.dtype,
        }  # fmt: skip
        differs = [f.name for f in fields(self) if getattr(self, f.name) != getattr(usual, f.name)]
        return " ".join([",".join(map(str, self.shape)), *(words[name] for name in differs)])

    @property
    def flops(self) -> float:
        """Multiplications and additions of the products in a step that trains: forward, dx and dW, each once."""
        steps = int(row_lengths(self).sum())
        total = 0
        for layer, ways in enumerate(self.suffixes):
            one = 2 * steps * self.facts.gates * self.H * len(ways)
            products = 1 if self.token else 3
            total += one * products * (self.features(layer) + self.H)
            if layer == 0 and not self.input_gradient and not self.token:
                total -= one * self.I
        return total


def row_lengths(case: Case) -> np.ndarray:
    """How many steps of each row count: all, or from half to all of them, the longest first row reaching the end."""
    if not case.lengths:
        return np.full(case.B, case.T)
    found = np.random.default_rng(1).integers((case.T + 1) // 2, case.T + 1, case.B)
    found[0] = case.T
    return found


def weights(case: Case) -> Arrays:
    """Weights by PyTorch's names, drawn as it draws them, the gains about `GAINS`; every contender draws the same."""
    rng, H, facts = np.random.default_rng(2), case.H, case.facts
    bound = 1 / np.sqrt(H)
    found: Arrays = {}
    for layer, ways in enumerate(case.suffixes):
        for suffix in ways:
            shapes = {"weight_ih": (facts.gates * H, case.features(layer)), "weight_hh": (facts.gates * H, H)}
            shapes |= {name: (size * H,) for name, size in facts.vectors.items()}
            for name, shape in shapes.items():
                value = rng.uniform(-bound, bound, shape)
                value = GAINS[name] * (1 + value) if name in GAINS else value
                found[name + suffix] = value.astype(np.float32).astype(case.dtype)
    return found


def inputs(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """x (T, B, I) and dy, the gradient of the loss for y: (T, B, H of each direction), or its last step's."""
    rng = np.random.default_rng(3)
    x = rng.standard_normal((case.T, case.B, case.I), np.float32)
    shape = (case.B, case.features(1))
    dy = 0.1 * rng.standard_normal(shape if case.last else (case.T, *shape), np.float32)
    return x.astype(case.dtype), dy.astype(case.dtype)


def keep_flags(case: Case) -> np.ndarray | None:
    """(T, B, 1) bools: which steps of which rows count; None where all do."""
    return np.arange(case.T)[:, None, None] < row_lengths(case)[:, None] if case.lengths else None


SHAPES = (
    (32, 1, 64, 64), (64, 16, 64, 128), (64, 32, 128, 256), (100, 32, 64, 512), (35, 20, 200, 200),
    (1000, 16, 32, 128), (64, 64, 256, 1024),
)  # fmt: skip
ODD_SHAPES = (
    (35, 7, 10, 50), (64, 33, 64, 77), (50, 1, 1, 50), (50, 3, 10, 77), (64, 33, 1, 200), (35, 1, 200, 200),
    (1, 16, 64, 128), (1, 1, 10, 50), (5000, 4, 32, 64),
)  # fmt: skip


def odd(cell: str) -> list[Case]:
    """Sizes that fit no tile, one step and very many, and every variant of a layer on one usual shape."""
    usual = Case(cell, 64, 16, 64, 128)
    variants: list[dict[str, Any]] = [
        {"layers": 2}, {"bidirectional": True}, {"lengths": True}, {"last": True}, {"input_gradient": False},
        {"last": True, "T": 1000}, {"token": True}, {"token": True, "B": 1}, {"layers": 2, "bidirectional": True},
    ]  # fmt: skip
    return [Case(cell, *shape) for shape in ODD_SHAPES] + [replace(usual, **changes) for changes in variants]
