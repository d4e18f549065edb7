"""Jacobians of a step along a trajectory: singular values, products over many steps, Lyapunov exponents."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError, ShapeError
from ..engine.tape import Leaf, Node, enable_grad, walk
from ..engine.tensor import Tensor
from ..engine.tree import flatten, map_leaves, unflatten
from ..loop.switch import no_compile
from ..ops.shape import expand_dims
from . import show
from .verdict import Verdict, judge

__all__ = ["Jacobians", "jacobians", "lyapunov"]

Matrix = npt.NDArray[np.float64]
Step = Callable[[Any, Any], Any]
MOST = 1 << 30  # bytes of Jacobians that are kept


class Jacobians(NamedTuple):
    """dh_t/dh_(t - 1) along a trajectory, h the whole state of one row of the batch as a vector.

    Attributes
    ----------
    matrices : array (T, S, S)
        Entry (t, i, j): the derivative of entry i of the state after step t by entry j of the state before it. The
        state is its leaves one after the other: h and then c; of a stack of layers h of all and then c of all.
    """

    matrices: Matrix

    @property
    def largest(self) -> Matrix:
        """(T,): the largest singular value of each step, by which it can stretch at most."""
        return np.linalg.norm(self.matrices, 2, axis=(1, 2))

    def products(self) -> Matrix:
        """(T + 1,): log2 of the largest singular value of the product of the last 0, 1, 2, ... Jacobians.

        That is the norm of dh_T/dh_(T - lag). Products are scaled as they grow, so that any number of steps stays in
        the range of floats. It costs a matrix product and a singular value decomposition for each step.
        """
        found = np.zeros(len(self.matrices) + 1)
        product, scale = np.eye(self.matrices.shape[1]), 0.0
        for lag, matrix in enumerate(self.matrices[::-1], 1):
            product = product @ matrix
            size = float(np.linalg.norm(product, 2)) if np.isfinite(product).all() else np.nan
            scale += float(np.log2(size))
            found[lag] = scale
            if size == 0 or not np.isfinite(size):
                found[lag:] = scale
                break
            product /= size
        return found

    def lyapunov(self, skip: int = 0) -> Matrix:
        """(S,): the Lyapunov exponents, as `lyapunov` gives them."""
        return _exponents(self.matrices, self.matrices.shape[1], skip)

    def verdict(self) -> Verdict:
        """What becomes of the gradient in the direction that is kept best, by the `products`."""
        return judge(self.products())

    def __str__(self) -> str:
        largest, products = self.largest, self.products()
        steps = len(largest)
        rows = [[str(t), largest[t]] for t in show.chosen(steps)]
        by_lag = [[str(lag), _power(products[lag])] for lag in show.chosen(steps + 1)]
        exponents = self.lyapunov()
        return "\n".join(
            [
                f"{steps} Jacobians of {self.matrices.shape[1]} x {self.matrices.shape[1]}",
                *show.table(["step", "largest singular value"], rows),
                "",
                *show.table(["lag", "largest singular value of the product"], by_lag),
                "",
                f"Lyapunov exponents: {exponents[0]:.4g} to {exponents[-1]:.4g} a step",
                f"in the best direction: {self.verdict()}",
            ]
        )

    def plot(self, path: str | os.PathLike[str] | None = None, axes: Sequence[Any] | None = None) -> Any:
        """Draw the largest singular values by step, and those of the products by lag.

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
        left, right = show.panels(2, axes)
        left.plot(self.largest)
        left.axhline(1, color="gray", linewidth=0.8)
        left.set(xlabel="step t", title="largest singular value of a step")
        right.plot(self.products() * np.log10(2))
        right.set(xlabel="lag", title="log10 of that of the last steps' product")
        for panel in (left, right):
            panel.grid(alpha=0.3)
        return show.finished(left, path)


def _power(log2: float) -> str:
    return f"{2.0**log2:.3g}" if abs(log2) < 1000 or log2 == -np.inf else f"2^{log2:.1f}"


def jacobians(model: Any, xs: Any, init: Any = None, row: int | None = 0) -> Jacobians:
    """The Jacobian of every step, along the trajectory of one row of the batch.

    Parameters
    ----------
    model : Module or callable
        A recurrent layer in one direction, a stack of them (the state is then that of all layers together), a cell, or
        a step ``f(carry, x) -> (carry, y)`` as `scan` takes it.
    xs : nest of arrays
        As the layer takes them, or (T, B, ...) as `scan` does. A layer in reverse goes from the last to the first, and
        that is then the order of the Jacobians.
    init : nest of arrays, optional
        The first state. Default for modules: the one they begin with.
    row : int or None
        Which row of the batch. None: a step without a batch axis. Default 0; a single sequence has no rows.

    Returns
    -------
    Jacobians
        (T, S, S) float64 for a state of S numbers.

    Raises
    ------
    InputError
        If they take more than 1 GiB, if a layer runs in both directions, or if the row is not there.

    Notes
    -----
    It costs one step forward and backward on a batch of S rows for each of the T steps, all of which are the one row:
    walking back from the unit vectors gives the rows of the Jacobian. The rows of a batch must not depend on each
    other. Dropout and other randomness inside the step should be off: call ``model.eval()``.
    """
    way = _Way(model, xs, init, row)
    if (bytes_needed := way.steps * way.size**2 * 8) > MOST:
        raise InputError(
            f"jacobians: {way.steps} of {way.size} x {way.size} take {bytes_needed / 2**20:.0f} MiB, at most "
            f"{MOST >> 20} are kept.",
            "pass fewer steps, or use lyapunov, which keeps none of them.",
        )
    return Jacobians(np.stack(list(way)))


def lyapunov(
    model: Any, xs: Any, init: Any = None, row: int | None = 0, skip: int = 0, count: int | None = None
) -> Matrix:
    """The Lyapunov exponents of a recurrent network driven by a sequence: by what factor directions stretch in a step.

    Parameters
    ----------
    model, xs, init, row
        As for `jacobians`.
    skip : int
        Leave out so many steps at the beginning, in which directions settle. Default 0.
    count : int, optional
        How many exponents, of the largest. Default: all.

    Returns
    -------
    array (count,)
        Natural logarithms a step, in falling order. If the largest is below 0, gradients vanish over long lags; above
        0, they explode. -inf stands for a direction that is lost altogether.

    Notes
    -----
    By repeated QR decomposition (Benettin, Galgani, Giorgilli & Strelcyn 1980; for recurrent networks Engelken, Wolf
    & Abbott 2020 and Vogt et al. 2022). It costs what `jacobians` does and keeps none of the matrices.
    """
    way = _Way(model, xs, init, row)
    count = way.size if count is None else count
    if not 1 <= count <= way.size:
        raise InputError(f"lyapunov: count is {count}; the state has {way.size} numbers.", "pass 1 to that many.")
    if not 0 <= skip < way.steps:
        raise InputError(f"lyapunov: skip is {skip} of {way.steps} steps.", "leave at least one step.")
    return _exponents(way, count, skip)


def _exponents(matrices: Iterable[Matrix], count: int, skip: int) -> Matrix:
    directions: Matrix | None = None
    total, steps = np.zeros(count), 0
    for t, matrix in enumerate(matrices):
        if directions is None:
            directions = np.linalg.qr(np.random.default_rng(0).standard_normal((len(matrix), count)))[0]
        directions, stretched = np.linalg.qr(matrix @ directions)
        if t >= skip:
            total, steps = total + np.log(np.abs(np.diagonal(stretched))), steps + 1
    return np.sort(total / max(steps, 1))[::-1]


class _Way:
    """A trajectory of one row, to be gone along once: each step's Jacobian in turn."""

    def __init__(self, model: Any, xs: Any, init: Any, row: int | None) -> None:
        xs = map_leaves(_array, xs)
        if hasattr(model, "named_parameters") and _is_single(xs):
            row = None
        self.step, self.axis, xs, init = _as_step(model, xs, init)
        self.batched = row is not None
        inputs, leaves = flatten(xs), [_array(x) for x in flatten(init)]
        if not any(leaf.dtype.kind == "f" for leaf in leaves):
            raise InputError("jacobians: the state has no floats.", "pass init, the first state.")
        self.steps = len(inputs[0])
        self.xs, self.init = xs, unflatten(init, leaves)
        if row is not None:
            self._only(row, leaves, inputs)
        self.size = sum(leaf.size for leaf in flatten(self.init) if leaf.dtype.kind == "f")

    def _only(self, row: int, leaves: list[Any], inputs: list[Any]) -> None:
        """Leave one row of the batch."""
        short = next((leaf for leaf in leaves if leaf.ndim <= self.axis), None)
        if short is not None:
            raise ShapeError(
                f"jacobians: a leaf of the state has shape {short.shape}, without a batch axis.",
                "pass row=None if there is none.",
            )
        rows = leaves[0].shape[self.axis]
        if not -rows <= row < rows:
            raise InputError(f"jacobians: row is {row}, the batch has {rows}.", f"pass 0 to {rows - 1}, or None.")
        row %= rows
        self.init = unflatten(self.init, [np.take(leaf, [row], self.axis) for leaf in leaves])
        self.xs = unflatten(self.xs, [x[:, row : row + 1] if x.shape[1:2] == (rows,) else x for x in inputs])

    def __iter__(self) -> Iterator[Matrix]:
        rows = f"a batch of {self.size:,} rows" if self.batched else f"one row, walked {self.size:,} times"
        show.tell(f"jacobians: {self.steps:,} steps forward and backward on {rows}")
        carry = self.init
        for t in range(self.steps):
            now = [x[t] for x in flatten(self.xs)]
            carry, matrix = self._one(carry, unflatten(self.xs, now))
            yield matrix

    def _one(self, carry: Any, x: Any) -> tuple[Any, Matrix]:
        """The state after a step, and the step's Jacobian."""
        before = [Tensor.of(self._copies(leaf, self.axis)) for leaf in flatten(carry)]
        for leaf in before:
            if leaf.dtype.kind == "f":
                leaf.node = Leaf(leaf.shape, leaf.dtype, None)
        given = [
            Tensor.of(self._copies(leaf, 0) if leaf.shape[:1] == (1,) else np.asarray(leaf)) for leaf in flatten(x)
        ]
        with enable_grad(), no_compile():
            after: list[Tensor] = flatten(self.step(unflatten(carry, before), unflatten(x, given)))
        if [leaf.shape for leaf in after] != [leaf.shape for leaf in before]:
            raise ShapeError(
                f"jacobians: the state went from shapes {[leaf.shape for leaf in before]} to "
                f"{[leaf.shape for leaf in after]}.",
                "a step returns a state like the one it was given; pass row=None for one without a batch axis.",
            )
        sources = [leaf for leaf in before if leaf.node is not None]
        results = [leaf for leaf, source in zip(after, before, strict=True) if source.node is not None]
        matrix = self._backwards(sources, results)
        kept = [np.take(leaf.raw, [0], self.axis) if self.batched else leaf.raw for leaf in after]
        return unflatten(carry, kept), matrix

    def _backwards(self, sources: list[Tensor], results: list[Tensor]) -> Matrix:
        """Walk back from the unit vectors: one in each row of the batch, or one after the other."""
        units = np.eye(self.size)
        if self.batched:
            return self._walk(sources, results, units)
        return np.concatenate([self._walk(sources, results, unit[None]) for unit in units])

    def _walk(self, sources: list[Tensor], results: list[Tensor], units: Matrix) -> Matrix:
        """The gradients (rows, S) of the sources for gradients `units` of the results."""
        seeds: dict[Node, Any] = {}
        start = 0
        for result in results:
            width = result.size // len(units)
            part = units[:, start : start + width]
            start += width
            if result.node is not None:
                seed = self._from_rows(part, result.shape).astype(result.dtype)
                seeds[result.node] = seeds[result.node] + seed if result.node in seeds else seed
        nodes = [source.node for source in sources]
        found = walk(seeds, {node for node in nodes if node is not None}, free=False)
        parts = [self._to_rows(found.get(s.node, np.zeros(s.shape)), len(units)) for s in sources if s.node is not None]
        return np.concatenate(parts, axis=1).astype(np.float64)

    def _copies(self, leaf: Any, axis: int) -> Any:
        return np.repeat(leaf, self.size, axis) if self.batched else np.array(leaf)

    def _from_rows(self, part: Matrix, shape: tuple[int, ...]) -> Matrix:
        if not self.batched:
            return part.reshape(shape)
        inner = (*shape[: self.axis], *shape[self.axis + 1 :])
        return np.moveaxis(part.reshape(len(part), *inner), 0, self.axis)

    def _to_rows(self, gradient: Any, rows: int) -> Any:
        return (np.moveaxis(gradient, self.axis, 0) if self.batched else gradient).reshape(rows, -1)


def _array(x: Any) -> Any:
    return x.raw if isinstance(x, Tensor) else np.asarray(x)


def _is_single(xs: Any) -> bool:
    """Whether a module takes it for a single sequence, (T, features)."""
    return getattr(xs, "ndim", 0) == 2 and xs.dtype.kind == "f"


def _time_first(x: Any) -> Any:
    return np.swapaxes(x, 0, 1)


def _checked(xs: Any) -> Any:
    """Inputs by steps, of which there are some."""
    inputs = flatten(xs)
    if not inputs or any(not x.ndim or not len(x) for x in inputs):
        raise ShapeError("jacobians: xs has no steps.", "pass arrays with a leading axis of steps.")
    return xs


def _as_step(model: Any, xs: Any, init: Any) -> tuple[Step, int, Any, Any]:
    """A function of the carry and an input, the batch axis of the carry, inputs by steps, and the first state."""
    cell = getattr(model, "cell", model)
    batch_first = getattr(model, "batch_first", False) and not _is_single(xs)
    if not hasattr(cell, "named_parameters"):
        if not callable(cell):
            raise InputError(f"jacobians: model is a {type(model).__name__}.", "pass a layer, a cell or a step.")
        if init is None:
            raise InputError("jacobians: a step function needs init, the first state.", "pass init=.")
        f: Any = cell

        def of_scan(carry: Any, x: Any) -> Any:
            return f(carry, x)[0]

        return of_scan, 0, _checked(xs), init
    xs = _checked(map_leaves(_time_first, xs) if batch_first else xs)
    if getattr(model, "reverse", False):
        xs = map_leaves(np.flipud, xs)
    if not hasattr(cell, "num_layers"):
        if init is None:
            init = _first_of_cell(cell, xs)

        def of_cell(carry: Any, x: Any) -> Any:
            return cell(x, carry)

        return of_cell, 0, xs, init
    if cell.bidirectional:
        raise InputError(
            "jacobians: the layer runs in both directions, so it has no step.", "pass a layer in one direction."
        )
    time = 1 if batch_first else 0

    def of_layers(carry: Any, x: Any) -> Any:
        return cell(expand_dims(x, time), carry)[1]

    if init is None:
        init = _first_of_layers(cell, np.expand_dims(xs[0], time))
    return of_layers, 1, xs, init


def _first_of_cell(cell: Any, xs: Any) -> Any:
    make = getattr(cell, "initial_state", None)
    if make is not None:
        return map_leaves(itemgetter(0), make(1)) if _is_single(xs) else make(flatten(xs)[0].shape[1])
    state = cell(Tensor(xs[0]), None)
    return unflatten(state, [np.zeros_like(leaf.raw) for leaf in flatten(state)])


def _first_of_layers(layers: Any, x: Any) -> Any:
    """Zeros, or the state that the layers have learnt to begin with."""
    with no_compile():
        state = layers(x)[1]
    first: list[Any] = []
    for name, leaf in zip(("initial_h", "initial_c"), flatten(state), strict=False):
        learnt = getattr(layers, name, None)
        first.append(np.zeros_like(leaf.raw) + (0 if learnt is None else learnt.raw))
    return unflatten(state, first)
