"""Each step's share of dL/dW."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, ShapeError, TapeError
from ..engine.tape import Node, Part, enable_grad, here, take_number, time_step, walk
from ..engine.tensor import Tensor
from ..engine.tree import flatten
from ..loop.probes import watched_by
from ..loop.switch import no_compile
from ..recompute import checkpoint
from . import show

__all__ = ["Shares", "shares"]

Numbers = npt.NDArray[np.float64]
Name = tuple[str, str]


class Shares(NamedTuple):
    """What each step contributes to the gradient of each weight.

    All are by (run, weight), such as ``("l0", "weight_hh_l0")``.

    Attributes
    ----------
    norms : dict of array (T,)
        Norms of the contributions g_t; their sum over t is G.
    cosines : dict of array (T,)
        Between g_t and G; 0 where one of them is 0.
    totals : dict of float
        Norms of G.
    """

    norms: dict[Name, Numbers]
    cosines: dict[Name, Numbers]
    totals: dict[Name, float]

    @property
    def shares(self) -> dict[Name, Numbers]:
        """``<g_t, G> / <G, G>``, which sum to 1: the part of G that step t makes up, below 0 where it opposes G."""
        return {name: norms * self.cosines[name] / (self.totals[name] or 1.0) for name, norms in self.norms.items()}

    def __str__(self) -> str:
        found = self.shares
        lines: list[str] = []
        for run in dict.fromkeys(run for run, _ in found):
            columns = [name for name in found if name[0] == run]
            rows = [
                [str(t), *(f"{round(100 * found[name][t], 2) + 0.0:.2f}%" for name in columns)]
                for t in show.chosen(len(found[columns[0]]))
            ]
            norms = ["norm", *(self.totals[name] for name in columns)]
            heads = ["step", *(weight for _, weight in columns)]
            lines += [
                f"{run}: the steps' shares of dL/dW, and the norm of dL/dW",
                *show.table(heads, [*rows, norms]),
                "",
            ]
        return "\n".join(lines).rstrip()

    def plot(self, path: str | os.PathLike[str] | None = None, axes: Any = None) -> Any:
        """Draw the shares by step.

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
        (axes,) = show.panels(1, axes)
        for name, found in self.shares.items():
            axes.plot(found, label=" ".join(name), linewidth=1.4)
        axes.set(xlabel="step t", title="share of step t in dL/dW")
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
        return show.finished(axes, path)


def shares(compute: Callable[[], Tensor], model: Any = None) -> Shares:
    """What each time step contributes to the gradients of the weights, of every recurrent layer and scan.

    Parameters
    ----------
    compute : callable
        Computes the loss, a Tensor with one element: ``lambda: loss_of(model(x))``.
    model : Module, optional
        Names layers and weights by their paths in it.

    Returns
    -------
    Shares

    Notes
    -----
    Loops run step by step, not as kernels, and each step's gradient is computed by itself, twice: once to add them up,
    once more to compare each with the sum. So it costs two to three times a training step taken step by step, and of
    memory the states, two gradients of each weight and one step's records. No ``.grad`` is touched. A loop inside a
    step counts as a part of it.

    Raises
    ------
    DTypeError
        If `compute` is no function.
    ShapeError
        If the loss has several elements.
    TapeError
        If it was not recorded.
    InputError
        If no loop over time ran.
    """
    if not callable(compute):
        raise DTypeError(
            f"shares: compute is a {type(compute).__name__}, not a function.", "pass lambda: loss_of(model(x))."
        )
    account = _Account(model)
    with watched_by(account), no_compile(), enable_grad():
        loss: Any = compute()
    if not isinstance(loss, Tensor) or loss.node is None:
        raise TapeError("shares: the loss was not recorded.", "return a Tensor that depends on the weights.")
    if loss.size != 1:
        raise ShapeError(f"shares: the loss has shape {loss.shape}.", "return a single number: loss.sum().")
    if not account.entries:
        raise InputError("shares: no loop over time ran.", "compute the loss by a recurrent layer or a scan.")
    show.tell(f"shares: {account.work:,} steps run again and walked, twice")
    nodes = {entry.node for entry in account.entries.values()}
    for account.adding in (True, False):
        walk({loss.node: np.ones(loss.shape, loss.dtype)}, nodes, free=False)
    return account.shares()


class _Entry:
    """What is known of one weight in one loop."""

    def __init__(self, node: Node, steps: int) -> None:
        self.node = node
        self.total = np.zeros(node.shape)
        self.norms, self.products = np.zeros(steps), np.zeros(steps)


class _Account:
    """Watches loops: every step becomes one record, whose rule gives the step's own gradient of each weight."""

    def __init__(self, model: Any) -> None:
        named = [] if model is None else list(model.named_modules())
        self.modules = {id(module): name for name, module in named}
        self.weights: dict[Node, str] = {}
        self.model = model
        self.entries: dict[Name, _Entry] = {}
        self.adding = True
        self.run, self.steps, self.work = "", 0, 0
        self.runs: list[str] = []

    def probes(self, owner: Any, name: str, labels: Sequence[str], state: Any, steps: int, reverse: bool) -> None:
        """No probes; but this loop is the next to run."""
        if here.context.step is not None:
            return
        is_module = hasattr(owner, "named_parameters")
        path = self.modules.get(id(owner), "" if self.modules else type(owner).__name__) if is_module else ""
        full = ".".join(part for part in (path, name) if part) or type(owner).__name__
        self.runs.append(full)
        count = self.runs.count(full)
        self.run, self.steps = f"{full} ({count})" if count > 1 else full, steps
        self.work += steps
        module = self.model if self.model is not None else owner if is_module else None
        if module is not None:
            self.weights.update({p.node: key for key, p in module.named_parameters() if p.node is not None})

    def step(self, step: Any) -> Any:
        if here.context.step is not None:
            return None
        run, steps = self.run, self.steps

        def apart(carry: Any, x: Any) -> Any:
            t = here.context.step
            assert t is not None
            outside = {leaf.node for leaf in flatten((carry, x)) if isinstance(leaf, Tensor)}
            start = take_number()
            result = checkpoint(step)(carry, x)
            wholes = (leaf.node.parents[0] for leaf in flatten(result) if isinstance(getattr(leaf, "node", None), Part))
            whole = next((node for node in wholes if node.number > start), None)  # what is passed on is older
            if whole is not None:
                self._listen(whole, run, steps, t, outside)
            return result

        apart.__name__ = getattr(step, "__name__", "step")
        return apart

    def _listen(self, whole: Node, run: str, steps: int, t: int, outside: set[Any]) -> None:
        """Note what the rule of a step's record gives for what the step takes from outside."""
        op, parents = whole.op, whole.parents or ()
        assert op is not None
        rule = op.rule
        places = [(i, self._entry(run, node, steps)) for i, node in enumerate(parents) if node not in outside and node]

        def listening(gradients: Any, *kept: Any) -> Any:
            with time_step(t):
                results = rule(gradients, *kept)
            for i, entry in places:
                if results[i] is not None:
                    self._note(entry, t, np.asarray(results[i], np.float64))
            return results

        op.rule = listening

    def _entry(self, run: str, node: Node, steps: int) -> _Entry:
        for (of, _), entry in self.entries.items():
            if of == run and entry.node is node:
                return entry
        name = self.weights.get(node) or f"{node.name} {list(node.shape)}"
        while (run, name) in self.entries:
            name += "'"
        entry = self.entries[run, name] = _Entry(node, steps)
        return entry

    def _note(self, entry: _Entry, t: int, gradient: Numbers) -> None:
        if self.adding:
            entry.total += gradient
            entry.norms[t] = np.linalg.norm(gradient)
        else:
            entry.products[t] = np.vdot(gradient, entry.total)

    def shares(self) -> Shares:
        totals = {name: float(np.linalg.norm(entry.total)) for name, entry in self.entries.items()}
        cosines: dict[Name, Numbers] = {}
        for name, entry in self.entries.items():
            size = entry.norms * totals[name]
            cosines[name] = np.divide(entry.products, size, out=np.zeros_like(size), where=size > 0)
        return Shares({name: entry.norms for name, entry in self.entries.items()}, cosines, totals)
