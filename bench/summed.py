"""A long sequence of which nothing is kept: an LSTM with the squared error summed inside its step.

Input and target are one number a row and step. The readout and its error belong to the step, so what is left after
the last one is a sum, and whatever memory grows by is what the way back needs.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from math import isqrt
from typing import Any

import numpy as np

from bench import cases, cells, ours
from bench.cases import Arrays, Case
from bench.worker import Step

BUDGET = "16 MB"
WINDOW = 100  # steps of a truncated run


@dataclass(frozen=True)
class Task:
    """One row of the table: T steps of B rows."""

    T: int
    B: int
    H: int = 128
    dtype: str = "float32"

    def options(self) -> dict[str, Any]:
        """What JSON can hold, and `Task(**options)` reads."""
        return asdict(self)

    @property
    def label(self) -> str:
        return f"T={self.T:,} B={self.B}"

    @property
    def case(self) -> Case:
        return Case("lstm", self.T, self.B, 1, self.H, dtype=self.dtype)

    @property
    def stretch(self) -> int:
        """About sqrt(T) steps, after which a peer that checkpoints keeps the state."""
        return isqrt(self.T)

    @property
    def share(self) -> float:
        """What turns the summed error into its mean."""
        return 1 / (self.T * self.B)


def weights(task: Task) -> Arrays:
    """The layer's, by PyTorch's names, and the readout's."""
    found = cases.weights(task.case)
    drawn = np.random.default_rng(4).uniform(-1, 1, (task.H, 1)) / np.sqrt(task.H)
    return found | {"readout": drawn.astype(np.float32).astype(task.dtype)}


def data(task: Task) -> tuple[np.ndarray, np.ndarray]:
    """x and the target, which is to say again what came two steps before; both (T, B, 1)."""
    x = np.random.default_rng(5).standard_normal((task.T, task.B, 1), np.float32).astype(task.dtype)
    return x, np.roll(x, 2, axis=0)


def zeros(task: Task) -> tuple[np.ndarray, ...]:
    """h, c and the sum, before the first step."""
    return tuple(np.zeros((task.B, size), task.dtype) for size in (task.H, task.H, 1))


def of_step(weights: cells.Weights) -> cells.Weights:
    """By the names that the cells' text has."""
    return {name.removesuffix("_l0"): value for name, value in weights.items()}


def advance(lib: cells.Library, w: cells.Weights, state: cells.State, now: tuple[Any, Any]) -> tuple[cells.State, None]:
    """One step, for every library that has `lib`."""
    (h, c, total), (x, target) = state, now
    h, c = cells.lstm(lib, w, cells.from_input("lstm", lib, w, x), (h, c))
    error = h @ w["readout"] - target
    return (h, c, total + error * error), None


def training(leaves: cells.Weights, backward: Callable[[], None]) -> Step:
    """``backward()`` leaves gradients with the leaves; tinytape and PyTorch share these names."""

    def step():
        for leaf in leaves.values():
            leaf.grad = None
        backward()
        return lambda: {"d" + name: leaf.grad.numpy() for name, leaf in leaves.items()}

    return step


# ---- tinytape -------------------------------------------------------------------------------------------------------

CHECKPOINTS = {"tinytape": None, "tinytape-sqrt": "sqrt", "tinytape-budget": BUDGET}


def prepare(contender: str, task: Task) -> Step:
    """One of `CHECKPOINTS`, or ``tinytape-truncated``; with ``-eager`` behind it, step by step."""
    import tinytape as tt

    kind = contender.removesuffix("-eager")
    step = truncated(task) if kind == "tinytape-truncated" else whole(task, CHECKPOINTS[kind])
    if kind == contender:
        return step

    def eager():
        with tt.no_compile():
            return step()

    return eager


def plan(contender: str, task: Task) -> Any:
    """What tinytape says beforehand that it will keep; None where it makes no plan."""
    if contender not in CHECKPOINTS:
        return None
    import tinytape as tt

    _, step = leaves_and_step(task)
    return tt.scan.plan(step, zeros(task), data(task), budget=CHECKPOINTS[contender] or "full")


def whole(task: Task, checkpoint: str | None) -> Step:
    """Exact, over the whole sequence."""
    import tinytape as tt

    leaves, step = leaves_and_step(task)
    inputs = tuple(map(tt.tensor, data(task)))

    def backward():
        (*_, total), _ = tt.scan(step, zeros(task), inputs, checkpoint=checkpoint)
        (total.sum() * task.share).backward()

    return training(leaves, backward)


def leaves_and_step(task: Task) -> tuple[cells.Weights, Any]:
    import tinytape as tt

    leaves = {name: tt.tensor(value, requires_grad=True) for name, value in weights(task).items()}
    lib, w = ours.library(), of_step(leaves)

    def step(state: cells.State, now: tuple[Any, Any]) -> tuple[cells.State, None]:
        return advance(lib, w, state, now)

    return leaves, step


def truncated(task: Task) -> Step:
    """Gradients end where windows do."""
    import tinytape as tt

    model, (x, target) = ours.built_in_layer(task.case), data(task)
    readout = tt.tensor(weights(task)["readout"], requires_grad=True)

    def backward():
        for window in tt.truncated(model, k1=WINDOW)(x, target):
            error = window.y @ readout - window.targets
            ((error * error).sum() * task.share).backward()

    return training(dict(model.named_parameters()) | {"readout": readout}, backward)
