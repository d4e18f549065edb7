"""Where the gradient goes: norms of dL/dh_t for every step and layer, from the backward walk of a training step."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError, ShapeError, TapeError
from ..engine.op import Op
from ..engine.tape import Node, here, take_number, walk
from ..engine.tensor import Tensor
from ..engine.tree import Array, flatten
from ..loop.probes import Probes, rows_of, watched_by
from ..recompute import keeps_calls
from . import show
from .lags import LagMatrix
from .verdict import Verdict, judge

__all__ = ["Flow", "Run", "flow"]

Norms = npt.NDArray[np.float64]


class Run(NamedTuple):
    """One loop over time that was watched: one direction of a layer, or a scan.

    Attributes
    ----------
    name : str
        ``"encoder.l0"``, ``"l1_reverse"``: the module's path and which of its loops it is.
    steps : int
    reverse : bool
        Whether the loop goes from the last step to the first.
    sinks : dict of str to Sink
        By the name of a leaf of the state.
    out : Sink or None
        At what the loop puts out: whether gradients enter there.
    """

    name: str
    steps: int
    reverse: bool
    sinks: dict[str, Sink]
    out: Sink | None

    def __repr__(self) -> str:
        return f"<run {self.name}: {self.steps} steps, {', '.join(self.sinks)}>"


class Sink:
    """Where a probe's gradient ends up."""

    def __init__(self, shape: tuple[int, ...], dtype: Any, has_rows: bool) -> None:
        self.has_rows = has_rows
        self.arrived: Array | None = None
        self.node = Node(take_number(), _sink, (), (self,), shape, dtype, None, None)

    def probe(self) -> Tensor:
        """The zeros that the loop takes."""
        return Tensor.of(np.zeros(self.node.shape, self.node.dtype), self.node)

    def norms(self, arrived: Array | None = None) -> Norms:
        """(steps, rows): the norm in each row, or of all where there are no rows."""
        found = self.arrived if arrived is None else arrived
        shape = self.node.shape
        if found is None:
            return np.zeros((shape[0], shape[1] if self.has_rows else 1))
        flat = np.abs(found.astype(np.float64))
        if self.has_rows:
            return flat
        return np.hypot.reduce(flat.reshape(shape[0], -1), axis=1, keepdims=True)


def _take(gradient: Any, sink: Sink) -> tuple[()]:
    sink.arrived = gradient.raw if isinstance(gradient, Tensor) else gradient
    return ()


def _zeros(probe: Any) -> Any:
    return probe


_sink = Op(_zeros, "probe", "general", False, False)
_sink.rule = _take
_sink.differentiable_rule = lambda node, gradient: _take(gradient, *node.kept)


class Flow(AbstractContextManager["Flow"]):
    """What `flow` gives: the loops that ran, and the norms that the last walk left.

    Attributes
    ----------
    runs : list of Run
        In the order in which they ran.
    """

    def __init__(self, names: dict[int, str]) -> None:
        self.runs: list[Run] = []
        self._names = names
        self._watching: list[AbstractContextManager[None]] = []

    # ---- as a context ----------------------------------------------------------------------------------------------

    def __enter__(self) -> Self:
        self._watching.append(watched_by(self))
        self._watching[-1].__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._watching.pop().__exit__(kind, error, trace)

    def probes(self, owner: Any, name: str, labels: Sequence[str], state: Any, steps: int, reverse: bool) -> Any:
        """The probes of a loop that is about to run; None inside a step, where nothing is recorded, in forward mode."""
        context = here.context
        inside = context.step is not None or context.traced is not None
        if inside or not context.recording or keeps_calls(context.tape):
            return None
        leaves: list[Tensor] = flatten(state)
        rows = rows_of([leaf.shape for leaf in leaves])
        sinks: dict[str, Sink] = {}
        made: list[Tensor | None] = []
        for label, leaf in zip(labels, leaves, strict=True):
            if leaf.dtype.kind != "f" or not leaf.size:
                made.append(None)
                continue
            has_rows = rows is not None and leaf.shape[:1] == (rows,)
            shape = leaf.shape[:1] if has_rows else leaf.shape
            sinks[label] = Sink((steps, *shape), np.result_type(leaf.dtype, np.float32), has_rows)
            made.append(sinks[label].probe())
        if not sinks:
            return None
        dtype = next(iter(sinks.values())).node.dtype
        out = None if rows is None else Sink((steps, rows), dtype, True)
        self.runs.append(Run(self._name(owner, name), steps, reverse, sinks, out))
        return Probes(tuple(made), None if out is None else out.probe())

    def step(self, step: Any) -> None:
        """The loop runs as ever."""

    def _name(self, owner: Any, name: str) -> str:
        path = self._names.get(id(owner), "" if self._names else type(owner).__name__)
        if not hasattr(owner, "named_parameters"):
            path = ""
        full = ".".join(part for part in (path, name) if part) or type(owner).__name__
        count = sum(run.name == full or run.name.startswith(f"{full} (") for run in self.runs)
        return f"{full} ({count + 1})" if count else full

    # ---- what was found ---------------------------------------------------------------------------------------------

    @property
    def norms(self) -> dict[str, dict[str, Norms]]:
        """``norms["l0"]["h"][t]``: the norm of dL/dh_t over all rows; ``h_t`` is the state after step t."""
        return {
            run.name: {leaf: np.hypot.reduce(sink.norms(), axis=1) for leaf, sink in run.sinks.items()}
            for run in self._walked()
        }

    def rows(self, run: str, leaf: str) -> Norms:
        """The norms (steps, rows) of a leaf of a run's state, row by row; (steps, 1) where it has no rows."""
        return self._sink(run, leaf)[1].norms()

    def verdict(self, run: str | None = None, leaf: str | None = None) -> Verdict:
        """What becomes of the gradient on its way back, in words and numbers.

        Parameters
        ----------
        run, leaf : str, optional
            Default: the first run, and the first leaf of its state.
        """
        of, sink = self._sink(run, leaf)
        norms = sink.norms()[:: 1 if of.reverse else -1]
        entering = None if of.out is None else of.out.norms()[:: 1 if of.reverse else -1]
        return _verdict(norms, entering)

    def _walked(self) -> list[Run]:
        if not self.runs:
            raise InputError(
                "flow: no loop over time ran.",
                "compute the loss inside `with tt.inspect.flow() as flow:`, by a recurrent layer or scan.",
            )
        if all(sink.arrived is None for run in self.runs for sink in run.sinks.values()):
            raise TapeError("flow: no gradient has arrived.", "call loss.backward() first; tt.grad is not seen.")
        return self.runs

    def _sink(self, run: str | None, leaf: str | None) -> tuple[Run, Sink]:
        runs = {found.name: found for found in self._walked()}
        of = runs.get(run) if run is not None else self.runs[0]
        if of is None:
            raise InputError(f"flow: there is no run {run!r}.", f"there are {', '.join(runs)}.")
        sink = of.sinks.get(leaf) if leaf is not None else next(iter(of.sinks.values()))
        if sink is None:
            raise InputError(f"flow: {of.name} has no state {leaf!r}.", f"it has {', '.join(of.sinks)}.")
        return of, sink

    def lag_matrix(self, losses: Any, every: int = 1) -> LagMatrix:
        """Norms of dL_t/dh_k for the loss of each step, one backward walk for each.

        Parameters
        ----------
        losses : Tensor
            (T, ...): what is left after the first axis is summed. Computed inside the context, and not yet walked.
            No ``.grad`` is touched.
        every : int
            Take every so many steps' losses only, counted from the last. Default 1. The cost is ``T / every`` backward
            walks over all steps.
        """
        if not isinstance(losses, Tensor) or losses.node is None:
            raise TapeError(
                "lag_matrix: losses were not recorded.", "pass a Tensor (T, ...) computed inside the context."
            )
        if losses.ndim == 0:
            raise ShapeError("lag_matrix: losses is a single number.", "pass one for each step, not their sum.")
        if not _is_count(every):
            raise InputError(f"lag_matrix: every is {every!r}.", "pass a number of steps, 1 or more.")
        if not self.runs:
            raise InputError("lag_matrix: no loop over time ran.", "compute the losses inside the context.")
        count = len(losses)
        steps = list(range(count - 1, -1, -every))[::-1]
        sinks = {(run.name, leaf): sink for run in self.runs for leaf, sink in run.sinks.items()}
        norms = {key: np.zeros((len(steps), sink.node.shape[0])) for key, sink in sinks.items()}
        nodes = {sink.node for sink in sinks.values()}
        show.tell(f"lag_matrix: {len(steps):,} backward walks over {sum(run.steps for run in self.runs):,} steps")
        for i, t in enumerate(steps):
            seed = np.zeros(losses.shape, losses.dtype)
            seed[t] = 1
            found = walk({losses.node: seed}, nodes, free=False)
            for key, sink in sinks.items():
                if sink.node in found:
                    norms[key][i] = np.hypot.reduce(sink.norms(found[sink.node]), axis=1)
        directions = {run.name: run.reverse for run in self.runs}
        return LagMatrix(np.array(steps), norms, directions)

    def __str__(self) -> str:
        runs = self._walked()
        lines: list[str] = []
        for steps in dict.fromkeys(run.steps for run in runs):
            norms = {(r, leaf): n for r, leaves in self.norms.items() for leaf, n in leaves.items()}
            columns = [(run.name, leaf) for run in runs if run.steps == steps for leaf in run.sinks]
            heads = ["step", *(f"{run} {leaf}" for run, leaf in columns)]
            rows = [[str(t), *(norms[column][t] for column in columns)] for t in show.chosen(steps)]
            lines += [f"norms of dL/dh_t, h_t the state after step t, of {steps} steps", *show.table(heads, rows), ""]
        lines += [f"{run.name} {leaf}: {self.verdict(run.name, leaf)}" for run in runs for leaf in run.sinks]
        return "\n".join(lines)

    def plot(self, path: str | os.PathLike[str] | None = None, axes: Any = None) -> Any:
        """Draw the norms by step.

        Parameters
        ----------
        path : path, optional
            Where to save the picture.
        axes : Axes of matplotlib, optional
            Where to draw. Default: a new figure.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        InputError
            If matplotlib is not installed.
        """
        found = self.norms
        (axes,) = show.panels(1, axes)
        for run, leaves in found.items():
            for leaf, norms in leaves.items():
                axes.plot(np.where(norms > 0, norms, np.nan), label=f"{run} {leaf}", linewidth=1.4)
        axes.set(yscale="log", xlabel="step t", ylabel="norm of dL/dh_t", title="Gradient flow")
        axes.grid(alpha=0.3)
        axes.legend()
        return show.finished(axes, path)


def _is_count(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool) and bool(value >= 1)


def _verdict(norms: Norms, entering: Norms | None) -> Verdict:
    """The verdict on norms (lags, rows): by lag from each row's own last step that a gradient reaches."""
    reached = norms != 0  # NaN counts as something
    lags = np.arange(len(norms))[:, None] + np.argmax(reached, axis=0)
    inside = (lags < len(norms)) & reached.any(axis=0)
    if not inside.any():
        return judge([-np.inf])
    lags = np.minimum(lags, len(norms) - 1)
    aligned = np.where(inside, np.take_along_axis(norms, lags, axis=0), 0.0)
    counts = inside.sum(axis=1)
    known = counts > 0
    curve = np.log2(np.hypot.reduce(aligned, axis=1)[known] / np.sqrt(counts[known]))  # a short row ends before others
    found = judge(curve)
    if entering is None:
        return found
    later = np.where(inside, np.take_along_axis(entering, lags, axis=0), 0.0)[1:]
    enters = int(np.count_nonzero(np.any(later != 0, axis=1)))
    if not enters or found.kind in ("not finite", "nothing"):
        return found
    return _mixed(found, curve, enters, len(curve))


def _mixed(found: Verdict, curve: Norms, enters: int, steps: int) -> Verdict:
    """Gradients enter on the way too, from losses or from the layer above: what can be said all the same."""
    gain = curve.max() - curve[0]
    if found.kind == "explodes" and gain > np.log2(8 * steps):  # more than all steps' gradients added up
        return found._replace(text=f"{found.text} (gradients enter at {enters + 1} steps)")
    text = f"mixed: gradients enter at {enters + 1} steps, which a norm adds up; "
    if found.kind == "vanishes" and found.horizon is not None:
        text += f"1% of the last step's is left beyond {found.horizon} steps"
    else:
        least, most = (2.0 ** (x - curve[0]) for x in (curve.min(), curve.max()))
        text += f"between {least:.2g} and {most:.2g} times the last step's; lag_matrix tells the lags apart"
    return Verdict("mixed", np.nan, np.nan, found.horizon, text)


def flow(model: Any = None) -> Flow:
    """Watch where the gradient goes in an ordinary training step.

    Recurrent layers and scans that run inside the context note, while the backward walk passes, the norm of dL/dh_t
    (and dL/dc_t: of each leaf of the state) after every step, in every row. Nothing else changes: the loops run as
    kernels where they do so otherwise, gradients are the same, and it costs some hundredths of the step.

    Parameters
    ----------
    model : Module, optional
        Names the layers by their paths in it.

    Returns
    -------
    Flow
        A context manager. After ``backward()``, print it; ``norms`` are the arrays, ``verdict()`` the words, ``plot``
        makes a picture, and ``lag_matrix`` walks once for each step's loss.

    Notes
    -----
    h_t is the state that step t hands on and puts out; dL/dc_t is taken with h_t held fixed, as it is for the state
    (h, c) as a vector. Of a scan's ys, what is the very tensor that is carried counts as the state; what f computes
    from it inside the step, as in ``y = h @ V``, does not reach the norm of the same step but that of the step before.
    Steps that do not count (lengths, masks) have norms of zero. Loops inside a step, scans with `lookback`, functions
    of functions (`tt.grad`) and forward mode are not watched. If several walks pass, the last one's norms stand.

    Examples
    --------
    >>> with tt.inspect.flow(model) as flow:
    ...     loss = loss_of(model(x))
    ...     loss.backward()
    >>> print(flow)
    """
    if model is not None and not hasattr(model, "named_modules"):
        raise InputError(f"flow: model is a {type(model).__name__}.", "pass a Module, or nothing.")
    return Flow({} if model is None else {id(m): name for name, m in model.named_modules()})
