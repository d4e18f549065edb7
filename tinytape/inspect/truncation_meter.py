"""`truncation`: what a truncated gradient has left of the full one, so that k2 can be chosen with reason."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError, ShapeError
from ..engine.tape import Node, enable_grad, no_grad, walk
from ..engine.tensor import Tensor, gradient
from ..engine.tree import Array, flatten, map_leaves, unflatten
from ..loop.stretch import Flags, Stretch, stretch
from ..loop.switch import no_compile
from ..loop.truncated import check_takes_reset, name_of, over_time, truncated
from .show import finished, panels, table

__all__ = ["Truncation", "truncation"]

Floats = npt.NDArray[np.float64]
Gradients = dict[str, Array]


def truncation(
    layer: Any,
    loss: Callable[[Tensor], Tensor],
    x: Any,
    k2: Sequence[int] | None = None,
    *,
    k1: int | None = 1,
    state: Any = None,
    reset: Any = None,
) -> Truncation:
    """Compare truncated gradients with the full one, on a batch and with the weights as they are.

    Parameters
    ----------
    layer : Module
        As for `tt.truncated`. The gradients are those of its parameters; what `loss` has of its own, such as a
        readout, has the same gradient however far back the losses are carried.
    loss : callable
        ``loss(y) -> number`` for the outputs y of all steps, (T, B, ...) as the layer gives them.
    x : array or dict of arrays
        (T, B, ...), or (B, T, ...) for a layer with batch_first.
    k2 : sequence of int, optional
        The depths to look at, each 1 or more and at least k1. Default: 1, 2, 4, ... and the smaller of
        T and 128.
    k1 : int or None
        How losses are truncated. 1, the default: each is carried back exactly k2 steps, as `lookback` in `tt.scan`.
        A number: as `tt.truncated` does it, k2 - k1 + 1 to k2 steps. None: in plain chunks, k1 = k2.
    state : nest of arrays, optional
        The state at the start.
    reset : bools, optional
        As for the layer.

    Returns
    -------
    Truncation
        Arrays over k2, to be printed and plotted.

    Raises
    ------
    InputError, ShapeError
        If k2 does not fit k1, the layer has nothing to learn, or x is a single sequence.

    Notes
    -----
    In steps of the batch, run forwards and backwards: T times k2 / k1 for each k2, if k1 is not 1. With k1 = 1 all
    depths are had together, from T steps forwards and T · max(k2) backwards: what a loss does to the state j steps
    before is carried one step back for all losses at once, as one batch of T · B rows. That is the memory of a
    recorded run over T steps. Layers are in evaluation mode meanwhile: dropout would change every run.

    Examples
    --------
    >>> found = tt.inspect.truncation(lstm, lambda y: F.cross_entropy(readout(y), targets), x)
    >>> print(found)
    >>> found.plot("truncation.png")
    """
    run = over_time(layer)
    whole = stretch(x, None, reset, bool(getattr(run, "batch_first", False)))
    if whole.layout.rows is None:
        raise ShapeError("truncation: x is a single sequence.", "give it a batch axis: x[:, None].")
    if whole.reset is not None:
        check_takes_reset(run)
    depths = _depths(k2, k1, whole.steps)
    named: dict[str, Tensor] = dict(layer.named_parameters()) if hasattr(layer, "named_parameters") else {}
    parameters = {name: p for name, p in named.items() if p.requires_grad}
    if not parameters:
        raise InputError("truncation: the layer has no parameters that require gradients.", "pass a Module.")
    with _evaluating(run), enable_grad():
        y = _run(run, whole, state)[0]
        if not isinstance(y, Tensor):
            raise InputError(
                f"truncation: the layer puts out a {type(y).__name__}.", "pass one that puts out a Tensor."
            )
        outputs = Tensor(y.raw, requires_grad=True)
        (pull,) = gradient(loss(outputs), [outputs])
        if pull is None:
            raise InputError("truncation: the loss does not depend on y.", "compute it from the outputs it is given.")
        full = _gradients(parameters, gradient(y, list(parameters.values()), pull))
        del y
        if k1 == 1:
            found = _exactly(run, whole, pull.raw, parameters, state, depths)
        else:
            found = [_in_windows(run, x, pull.raw, parameters, state, reset, k1 or k, k) for k in depths]
    return _compare(name_of(layer), whole, k1, depths, full, found)


@dataclass(frozen=True, eq=False)
class Truncation:
    """Truncated gradients against the full one.

    Attributes
    ----------
    k2 : array of int
        The depths, rising.
    cosine : array
        Between the truncated and the full gradient of all parameters together; NaN where one of them is zero.
    ratio : array
        Norm of the truncated over norm of the full gradient.
    error : array
        Norm of their difference over norm of the full gradient.
    cosines, ratios : dict of array
        The same by parameter.
    norm : float
        Of the full gradient.
    title : str
        What was measured.
    """

    k2: npt.NDArray[np.int64]
    cosine: Floats
    ratio: Floats
    error: Floats
    cosines: dict[str, Floats]
    ratios: dict[str, Floats]
    norm: float
    title: str

    def least(self, cosine: float = 0.99) -> int | None:
        """The smallest k2 from which on the cosine is at least so much; None if there is none among those measured."""
        below = np.flatnonzero(~(self.cosine >= cosine))
        first = below[-1] + 1 if len(below) else 0
        return int(self.k2[first]) if first < len(self.k2) else None

    def __str__(self) -> str:
        heads, rows = ("k2", "cosine", "norm ratio", "error", "lowest cosine of a parameter"), list[tuple[str, ...]]()
        for i, k in enumerate(self.k2):
            lowest = min(self.cosines, key=lambda name: (not np.isnan(self.cosines[name][i]), self.cosines[name][i]))
            told = f"{self.cosines[lowest][i]:.4f}  {lowest}"
            rows.append((f"{k}", f"{self.cosine[i]:.4f}", f"{self.ratio[i]:.4f}", f"{self.error[i]:.2e}", told))
        return "\n".join([self.title, *table(heads, rows), f"norm of the full gradient: {self.norm:.4g}"])

    def plot(self, path: str | PathLike[str] | None = None, axes: Sequence[Any] | None = None) -> Any:
        """Draw cosine and norm ratio against k2, for all parameters together and for each.

        Parameters
        ----------
        path : path, optional
            Where to save the picture.
        axes : two Axes of matplotlib, optional
            Where to draw. Default: a new figure.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        InputError
            If matplotlib is not installed.
        """
        both = panels(2, axes)
        told = ("cosine with the full gradient", "norm over the full gradient's")
        drawn = ((self.cosine, self.cosines), (self.ratio, self.ratios))
        for ax, (whole, parts), label in zip(both, drawn, told, strict=True):
            for name, values in parts.items():
                ax.plot(self.k2, values, linewidth=1, alpha=0.6, label=name)
            ax.plot(self.k2, whole, color="black", linewidth=2, marker="o", markersize=3, label="all")
            ax.axhline(1, color="grey", linewidth=0.5)
            ax.set_xscale("log", base=2)
            ax.set_xlabel("k2, steps")
            ax.set_ylabel(label)
        both[0].legend(fontsize="small")
        both[0].figure.suptitle(self.title, fontsize="medium")
        return finished(both[0], path)


# ---- the gradients --------------------------------------------------------------------------------------------------


def _exactly(
    run: Any, whole: Stretch, pull: Array, parameters: dict[str, Tensor], state: Any, depths: list[int]
) -> list[Gradients]:
    """Gradients with each loss carried back exactly k2 steps, for all k2.

    One step is recorded for all times at once: for t = 0 from the state at the start, and for t = 1, ..., T - 1, as
    rows of one batch, from the states before. Walking back through it carries every loss one step; what arrives at
    the state before t is then what the state after t - 1 begins the next walk with.
    """
    pull = np.moveaxis(pull, whole.layout.axis, 0)  # (T, B, ...)
    first, later = _steps_apart(run, whole, state)
    steps = [first, later] if later else [first]
    for step, gradients in zip(steps, (pull[:1], pull[1:]), strict=False):
        step.begin([gradients.reshape(step.y.shape)], [step.y])
    total = {p.node: np.zeros(p.shape) for p in parameters.values()}
    found: dict[int, Gradients] = {}
    most = min(depths[-1], whole.steps)  # a loss has no more steps behind it
    for depth in range(1, most + 1):
        carried = [step.back(total) for step in steps][-1]
        if later:
            split = [
                _earlier(g, cast(int, whole.layout.rows), axis) for g, axis in zip(carried, later.axes, strict=True)
            ]
            first.begin([of_first for of_first, _ in split], first.after)
            later.begin([of_later for _, of_later in split], later.after)
        if depth == most or depth in depths:
            found[depth] = {name: total[p.node].copy() for name, p in parameters.items()}
    return [found[min(k, most)] for k in depths]


def _earlier(g: Array, rows: int, axis: int) -> tuple[Array, Array]:
    """Gradients of the states before t = 1, ..., T - 1 as those of the states after 0 and after 1, ..., T - 1.

    Nothing comes from beyond the last step.
    """
    of_first, rest = cast("list[Array]", np.split(g, [rows], axis))
    return of_first, np.concatenate([rest, np.zeros_like(of_first)], axis)


class _Step:
    """A step on the tape: the states before as leaves, outputs and states after, and the axes of their rows."""

    def __init__(self, before: list[Tensor], y: Tensor, after: list[Tensor], axes: list[int]) -> None:
        self.before, self.y, self.after, self.axes = before, y, after, axes
        self._seeds: dict[Node, Array] = {}

    def begin(self, gradients: list[Array], results: list[Tensor]) -> None:
        """What the next walk starts with."""
        self._seeds = {}
        for g, x in zip(gradients, results, strict=True):
            if x.node is not None:
                self._seeds[x.node] = self._seeds[x.node] + g if x.node in self._seeds else g

    def back(self, total: dict[Any, Array]) -> list[Array]:
        """Walk: what arrives at the parameters is added to `total`, what arrives at the states is returned."""
        leaves = {x.node for x in self.before if x.node is not None}
        arrived = walk(self._seeds, leaves | total.keys(), free=False)
        for node, sum_ in total.items():
            sum_ += arrived.get(node, 0)
        return [np.zeros(x.shape, x.dtype) if x.node not in arrived else arrived[x.node] for x in self.before]


def _steps_apart(run: Any, whole: Stretch, state: Any) -> tuple[_Step, _Step | None]:
    """The first step, and all later ones as rows of one batch; None if there is only one."""
    with no_compile():
        y, after = _run(run, whole.cut(0, 1), state)
        axes = _axes_of_rows(run, whole, flatten(after))
        first = _Step([], y, flatten(after), axes)
        if whole.steps == 1:
            return first, None
        states = [map_leaves(Tensor.detach, after)]
        with no_grad():
            for t in range(1, whole.steps - 1):
                states.append(_run(run, whole.cut(t, t + 1), states[-1])[1])
        columns = zip(*map(flatten, states), strict=True)
        joined = [np.concatenate([x.raw for x in column], axis) for column, axis in zip(columns, axes, strict=True)]
        before = [Tensor(x, requires_grad=x.dtype.kind == "f") for x in joined]
        y, after = _run(run, _as_rows(whole.cut(1, whole.steps)), unflatten(after, before))
    return first, _Step(before, y, flatten(after), axes)


def _as_rows(some: Stretch) -> Stretch:
    """Its steps as rows of a batch of one step, step by step."""
    axis, rows = some.layout.axis, cast(int, some.layout.rows)
    count = some.steps * rows

    def together(part: Array) -> Array:
        flat = np.moveaxis(part, axis, 0).reshape(count, *part.shape[2:])
        return np.expand_dims(flat, axis)

    reset: Flags | None = None if some.reset is None else some.reset.reshape(1, count)
    return Stretch(map_leaves(together, some.x), None, reset, 1, some.layout._replace(rows=count))


def _axes_of_rows(run: Any, whole: Stretch, after: list[Tensor]) -> list[int]:
    """The batch axis of each leaf of the state: the one that is as long, or else that which differs for other rows."""
    candidates = [[i for i, n in enumerate(part.shape) if n == whole.layout.rows] for part in after]
    if all(len(axes) == 1 for axes in candidates):
        return [axes[0] for axes in candidates]
    shapes: list[list[tuple[int, ...]]] = []
    with no_grad():
        for rows in ([0], [0, 0]):
            few = [np.take(part, rows, 1 - whole.layout.axis) for part in flatten(whole.cut(0, 1).x)]
            shapes.append([part.shape for part in flatten(run(unflatten(whole.x, few), None)[1])])
    return [next(i for i, n in enumerate(one) if n != two[i]) for one, two in zip(*shapes, strict=True)]


def _in_windows(
    run: Any, x: Any, pull: Array, parameters: dict[str, Tensor], state: Any, reset: Any, k1: int, k2: int
) -> Gradients:
    """The sum of the windows' gradients."""
    leaves, total = list(parameters.values()), {name: np.zeros(p.shape) for name, p in parameters.items()}
    for window in truncated(run, k1, k2)(x, pull, reset=reset, state=state):
        found = _gradients(parameters, gradient(window.y, leaves, window.targets))
        for name, g in found.items():
            total[name] += g
    return total


def _run(run: Any, some: Stretch, state: Any) -> tuple[Any, Any]:
    if some.reset is None or not some.reset.any():
        return run(some.x, state)
    return run(some.x, state, reset=some.reset.T if some.layout.axis else some.reset)


def _gradients(parameters: dict[str, Tensor], found: Sequence[Tensor | None]) -> Gradients:
    return {
        name: np.zeros(p.shape) if g is None else g.raw for (name, p), g in zip(parameters.items(), found, strict=True)
    }


# ---- the rest -------------------------------------------------------------------------------------------------------


def _compare(
    name: str, whole: Stretch, k1: int | None, depths: list[int], full: Gradients, found: list[Gradients]
) -> Truncation:
    cosine, ratio, error = np.array([_figures(list(g.values()), list(full.values())) for g in found]).T
    parts = {n: np.array([_figures([g[n]], [full[n]]) for g in found]).T for n in full}
    norm = float(np.sqrt(sum(_dot(g, g) for g in full.values())))
    how = {1: "each loss carried back k2 steps", None: "in chunks of k2 steps"}.get(k1, f"a window every {k1} steps")
    title = f"{name}, T = {whole.steps}, B = {whole.layout.rows}: {how}"
    cosines, ratios = {n: part[0] for n, part in parts.items()}, {n: part[1] for n, part in parts.items()}
    return Truncation(np.array(depths), cosine, ratio, error, cosines, ratios, norm, title)


def _figures(short: list[Array], full: list[Array]) -> tuple[float, float, float]:
    """Cosine, ratio of norms, and relative error."""
    pairs = list(zip(short, full, strict=True))
    a, b = (np.sqrt(sum(_dot(g, g) for g in gradients)) for gradients in (short, full))
    apart = np.sqrt(sum(_dot(d, d) for d in (np.subtract(g, f, dtype=np.float64) for g, f in pairs)))
    return float(sum(_dot(g, f) for g, f in pairs) / (a * b)), float(a / b), float(apart / b)


def _dot(a: Array, b: Array) -> np.float64:
    return np.float64(np.sum(np.multiply(a, b, dtype=np.float64)))


def _depths(k2: Any, k1: Any, steps: int) -> list[int]:
    if k1 is not None and not _is_count(k1):
        raise InputError(f"truncation: k1 is {k1!r}.", "pass a number of steps, 1 or more, or None for chunks.")
    least = k1 or 1
    if k2 is None:
        most = max(min(steps, 128), least)
        return sorted({most} | {2**i for i in range(8) if least <= 2**i <= most})
    depths: list[Any] = list(k2) if hasattr(k2, "__iter__") else []
    if not depths or any(not _is_count(k) or k < least for k in depths):
        raise InputError(
            f"truncation: k2 is {depths or k2!r}, k1 is {k1}.",
            f"pass a list of numbers of steps, each {least} or more.",
        )
    return sorted({int(k) for k in depths})


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 1)


@contextmanager
def _evaluating(run: Any) -> Generator[None]:
    """Modules in evaluation mode, and afterwards as they were."""
    modules: list[Any] = list(run.modules()) if hasattr(run, "modules") else []
    were = [module.training for module in modules]
    try:
        for module in modules:
            module.training = False
        yield
    finally:
        for module, was in zip(modules, were, strict=True):
            module.training = was
