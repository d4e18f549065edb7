"""Real-time recurrent learning: the gradient of every loss, carried forward in time."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.tape import Node, enable_grad, walk
from ..engine.tensor import Tensor
from ..engine.tree import Array, flatten, unflatten
from ..ops.elementwise import where

__all__ = ["RTRL", "Cost"]

COLUMNS = 4096  # of the influence matrix that are multiplied at once: what is made in between stays in the cache


class Cost(NamedTuple):
    """What real-time recurrent learning takes.

    Attributes
    ----------
    rows : int
        B, of the batch.
    state : int
        S, the numbers in a row's state.
    parameters : int
        P.
    bytes : int
        Of the influence matrices, of which there are two: 2 B S P numbers.
    flops : int
        Of their product with the Jacobian of a step, 2 B S² P; each step.
    walks : int
        B S, backward walks over the cell; each step.
    """

    rows: int
    state: int
    parameters: int
    bytes: int
    flops: int
    walks: int

    def __str__(self) -> str:
        return (
            f"{self.rows} rows, {self.state} numbers of state, {self.parameters:,} parameters: {self.bytes:,} bytes; "
            f"each step {self.flops:,} flops and {self.walks:,} walks over the cell"
        )


class RTRL:
    """Real-time recurrent learning of a cell (Robinson & Fallside 1987; Williams & Zipser 1989).

    Nothing of the past is stored. Beside the state s_t the learner carries its derivative by the parameters θ, the
    influence matrix P_t = ds_t/dθ, by the chain rule forwards in time, and any loss L_t of the state then has its
    gradient through all steps so far at once::

        s_t = cell(x_t, s_{t-1})
        P_t = J_t P_{t-1} + ∂s_t/∂θ,     J_t = ∂s_t/∂s_{t-1}
        dL_t/dθ = dL_t/ds_t P_t

    J_t and ∂s_t/∂θ come from the tape of one call of the cell, by a backward walk for each number of the state: there
    are fewer of these than parameters, which forward mode would need a pass each for. As long as the parameters stay
    as they are, the gradients are those of backpropagation through time. Where an optimiser changes them on the way,
    P_t is made of steps under older values, and the gradient is that of the online algorithm: close to the true one for
    small learning rates (Williams & Zipser 1989).

    Parameters
    ----------
    cell : Module or callable
        ``cell(x, state) -> state`` as for `nn.Recurrent`: x (B, features), each leaf of the state (B, ...). Rows of the
        batch must not meet.
    loss : callable, optional
        ``loss(y, target)``, a scalar, of the state's first leaf y. Parameters that it takes itself, of a readout, get
        their gradients too. Default: the learner only follows.
    state : nest of Tensors or arrays, optional
        At the start; a constant. Default ``cell.initial_state(rows)``, through which gradients pass.
    rows : int
        B, where no state is given. Default 1.
    parameters : iterable of Tensors, optional
        θ. Default: those of the cell that require gradients.
    limit : int
        Most bytes for the influence matrices. Default 2**30.

    Attributes
    ----------
    state : nest of Tensors
        After the last step.
    influence : array
        P_t, of shape (B, S, P): a row's state by the parameters, both flattened and joined in their order.
    cost : Cost
        What all this takes, to be printed.

    Raises
    ------
    InputError
        If the matrices would be larger than `limit`, if there is nothing to learn, or if rows of the batch meet.
    ShapeError, DTypeError
        If state, x or target do not fit the cell.

    Examples
    --------
    >>> cell, readout = nn.GRUCell(2, 8), nn.Linear(8, 1)
    >>> learner = tt.RTRL(cell, lambda h, target: F.mse_loss(readout(h), target))
    >>> optimizer = optim.Adam([*cell.parameters(), *readout.parameters()], lr=1e-3)
    >>> for x, target in stream:  # (1, 2) and (1, 1)
    ...     loss = learner.step(x, target)
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    """

    def __init__(
        self,
        cell: Callable[..., Any],
        loss: Callable[[Tensor, Any], Any] | None = None,
        state: Any = None,
        *,
        rows: int = 1,
        parameters: Iterable[Tensor] | None = None,
        limit: int = 2**30,
    ) -> None:
        self.cell, self.loss = cell, loss
        self.parameters = _parameters(cell, parameters)
        first = _initial(cell, rows) if state is None else state
        leaves = [x if isinstance(x, Tensor) else Tensor(x) for x in flatten(first)]
        self._form = unflatten(first, [0] * len(leaves))
        shapes = [x.shape for x in leaves]
        if not leaves or any(not shape or shape[0] != shapes[0][0] for shape in shapes):
            raise ShapeError(f"RTRL: the state has leaves of shapes {shapes}.", "every leaf is (batch, ...).")
        self._moving = [k for k, x in enumerate(leaves) if x.dtype.kind == "f"]  # whole numbers have no derivative
        self.cost = self._cost(leaves)
        if self.cost.bytes > limit:
            raise InputError(
                f"RTRL: {self.cost}; the limit is {limit:,} bytes.",
                "use a smaller cell or fewer rows, raise limit, or learn by truncated backpropagation.",
            )
        shape = (self.cost.rows, self.cost.state, self.cost.parameters)
        dtype = np.result_type(np.float32, *(leaves[k].dtype for k in self._moving))
        self.influence, self._spare = np.zeros(shape, dtype), np.zeros(shape, dtype)
        if state is None:
            self._derivatives([], leaves, self.influence)
        self._leaves = [x.detach() for x in leaves]

    @property
    def state(self) -> Any:
        return unflatten(self._form, self._leaves)

    def step(self, x: Any, target: Any = None, reset: Any = None) -> Tensor | None:
        """Take a step and, where there is a target, add dL_t/dθ to the ``.grad`` of the parameters.

        Parameters
        ----------
        x : Tensor or array, shape (B, ...)
        target : optional
            Given on to the loss. None: there is no loss at this step.
        reset : bools, shape (B,), optional
            Rows that start a new sequence: their state, and all influence on it, is zeroed before the step.

        Returns
        -------
        Tensor or None
            The loss, of which nothing is recorded.
        """
        if np.shape(x)[:1] != (self.cost.rows,):
            raise ShapeError(
                f"RTRL: x has shape {np.shape(x)}, the state has {self.cost.rows} rows.", "x is (batch, ...)."
            )
        if target is not None and self.loss is None:
            raise InputError("RTRL: a target is given, but no loss.", "build it with RTRL(cell, loss).")
        if reset is not None:
            self._start_anew(reset)
        before = [Tensor(v.raw, requires_grad=k in self._moving) for k, v in enumerate(self._leaves)]
        with enable_grad():
            after = flatten(self.cell(x, unflatten(self._form, before)))
        self._check_like(before, after)
        jacobian = self._derivatives([before[k] for k in self._moving], after, self._spare)
        self._carry(jacobian)
        self._leaves = [v.detach() for v in after]
        return None if target is None else self._learn(target)

    def _start_anew(self, reset: Any) -> None:
        flags = reset.data if isinstance(reset, Tensor) else np.asarray(reset)
        if flags.dtype != np.bool_ or flags.shape != (self.cost.rows,):
            raise ShapeError(
                f"RTRL: reset is {flags.dtype}{list(flags.shape)}.", f"pass bools of shape ({self.cost.rows},)."
            )
        self.influence[flags] = 0
        self._leaves = [where(flags.reshape(-1, *[1] * (v.ndim - 1)), False, v).detach() for v in self._leaves]

    def _derivatives(self, before: list[Tensor], after: list[Tensor], immediate: Array) -> Array:
        """J_t, and into `immediate` ∂s_t/∂θ, by a walk for each number of every row's state."""
        rows, size = self.cost.rows, self.cost.state
        jacobian = np.zeros((rows, size, size), immediate.dtype)
        immediate.fill(0)
        states, weights = _spans(before, rows), _spans(self.parameters, 1)
        inputs = {node for node, *_ in (*states, *weights)}
        first = 0
        for out in (after[k] for k in self._moving):
            width = out.size // rows
            for i in range(out.size if out.node is not None else 0):
                row, column = divmod(i, width)
                found = _walk(out, i, inputs)
                for node, start, end in states:
                    if node in found:
                        flat = found[node].reshape(rows, -1)
                        jacobian[row, first + column, start:end] = flat[row]
                        if rows > 1:
                            _check_apart(flat, row)
                for node, start, end in weights:
                    if node in found:
                        immediate[row, first + column, start:end] = found[node].ravel()
            first += width
        return jacobian

    def _carry(self, jacobian: Array) -> None:
        """P = J P + ∂s/∂θ, which stands in the spare matrix."""
        for start in range(0, self.cost.parameters, COLUMNS):
            part = np.s_[..., start : start + COLUMNS]
            self._spare[part] += jacobian @ self.influence[part]
        self.influence, self._spare = self._spare, self.influence

    def _learn(self, target: Any) -> Tensor:
        assert self.loss is not None
        y = Tensor(self._leaves[0].raw, requires_grad=True)
        with enable_grad():
            value = self.loss(y, target)
        if not isinstance(value, Tensor) or value.shape != ():
            raise ShapeError(f"RTRL: the loss is {_kind(value)}.", "return a scalar, by sum() or mean().")
        value.backward()
        if y.grad is not None:
            arrived = y.grad.raw.reshape(self.cost.rows, -1)
            total = np.tensordot(arrived, self.influence[:, : arrived.shape[1]], 2)
            for p, (_, start, end) in zip(self.parameters, _spans(self.parameters, 1), strict=True):
                p.backward(total[start:end].reshape(p.shape).astype(p.dtype, copy=False))
        return value.detach()

    def _cost(self, leaves: list[Tensor]) -> Cost:
        rows = leaves[0].shape[0]
        if 0 not in self._moving or rows == 0:
            raise DTypeError(
                f"RTRL: the state's first leaf is {leaves[0].dtype}{list(leaves[0].shape)}; it is what is put out.",
                "pass floats, and at least one row.",
            )
        state = sum(leaves[k].size for k in self._moving) // rows
        count = sum(p.size for p in self.parameters)
        itemsize = max(leaves[k].dtype.itemsize for k in self._moving)
        return Cost(rows, state, count, 2 * rows * state * count * itemsize, 2 * rows * state**2 * count, rows * state)

    def _check_like(self, before: list[Tensor], after: list[Any]) -> None:
        forms = [[_kind(v) for v in leaves] for leaves in (before, after)]
        if forms[0] != forms[1]:
            raise ShapeError(
                f"RTRL: the cell went from a state of {', '.join(forms[0])} to one of {', '.join(forms[1])}.",
                "cell(x, state) returns a state like the one it was given.",
            )

    def __repr__(self) -> str:
        return f"RTRL({self.cost})"


def _initial(cell: Any, rows: int) -> Any:
    make = getattr(cell, "initial_state", None)
    if make is None:
        raise InputError(
            f"RTRL: {type(cell).__name__} has no initial_state(batch), and no state is given.",
            "pass one, or give the cell that method.",
        )
    with enable_grad():
        return make(rows)


def _parameters(cell: Any, given: Iterable[Tensor] | None) -> list[Tensor]:
    everything = getattr(cell, "parameters", tuple)() if given is None else list(given)
    found = [p for p in everything if p.requires_grad]
    if not found:
        raise InputError(
            f"RTRL: {type(cell).__name__} has no parameters that require gradients.",
            "pass a module, or parameters=[...] beside a function.",
        )
    return found


def _spans(tensors: Iterable[Tensor], rows: int) -> list[tuple[Node, int, int]]:
    """The tensors' nodes, and where each stands when all are flattened, row by row, and joined."""
    spans: list[tuple[Node, int, int]] = []
    start = 0
    for x in tensors:
        assert x.node is not None
        width = math.prod(x.shape) // rows
        spans.append((x.node, start, start + width))
        start += width
    return spans


def _walk(out: Tensor, i: int, inputs: set[Node]) -> dict[Node, npt.NDArray[Any]]:
    """The gradients of the i-th number of `out`."""
    assert out.node is not None
    seed = np.zeros(out.shape, out.dtype)
    seed.flat[i] = 1
    return walk({out.node: seed}, inputs, free=False, ends=True)


def _check_apart(gradient: Array, row: int) -> None:
    others = np.abs(gradient) > 0
    others[row] = False
    if others.any():
        raise InputError(
            f"RTRL: row {row} of the state depends on row {int(np.argmax(others.any(1)))} before the step.",
            "rows of the batch must not meet, as in a mean over the batch.",
        )


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype}{list(value.shape)}"
    return f"a {type(value).__name__}"
