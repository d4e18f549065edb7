"""`agree`: one gradient computed in four ways, and what lies between them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import combinations
from typing import Any, Literal, NamedTuple, cast

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.forward import push_forward
from ..engine.recording import Tape
from ..engine.tape import enable_grad, here, no_grad
from ..engine.tensor import Tensor
from ..engine.tree import Array, flatten, map_leaves, unflatten
from ..loop.scan import leaf_names
from ..loop.switch import no_compile

__all__ = ["Agreement", "Pair", "agree"]

WALKS = ("compiled", "eager")
WAYS = (*WALKS, "forward", "differences")


class Pair(NamedTuple):
    """Two ways to a gradient.

    Attributes
    ----------
    first, second : str
        Of "compiled", "eager", "forward" and "differences".
    value : float
        The relative difference of the two losses; NaN beside "differences", which have none of their own.
    gradient : float
        The relative difference, in norm, of the gradient of the parameter where it is largest beside what is allowed:
        over all entries where both ways give these, else over the directions.
    worst : str
        That parameter.
    entry : str
        The entry or the direction in which that one differs most, with both numbers.
    allowed : float
        What `gradient` may be.
    """

    first: str
    second: str
    value: float
    gradient: float
    worst: str
    entry: str
    allowed: float

    @property
    def ok(self) -> bool:
        """Whether the two agree."""
        return self.gradient <= self.allowed and not self.value > self.allowed


class Agreement:
    """What `agree` found: true where all pairs agree; printed, a table and a verdict.

    Attributes
    ----------
    pairs : list of Pair
    losses : dict of str to float
        By way.
    gradients : dict of str to dict of str to array
        Of the two walks, by name.
    slopes : dict of str to dict of str to array
        By way and name: the derivative along each direction.
    uncertainty : dict of str to float
        By name: how far the best finite differences are from the second best, in norm over the directions.
    kernels : int
        How many scans ran as kernels in the compiled walk; where there are none, it is the eager walk.
    """

    def __init__(self, problem: _Problem, rtol: float, kernels: int) -> None:
        self.kernels, self._rtol = kernels, rtol
        self._about = (
            f"{len(problem.names)} arrays of {sum(x.size for x in problem.leaves):,} numbers, {problem.dtype}; "
            f"{kernels} scans ran as kernels"
        )
        self.losses: dict[str, float] = {}
        self.gradients: dict[str, dict[str, Array]] = {}
        self.slopes: dict[str, dict[str, Array]] = {}
        self.uncertainty: dict[str, float] = {}
        self.pairs: list[Pair] = []

    def compare(self, whole: bool) -> None:
        """Fill `pairs`; `whole`: directions are entries."""
        self.pairs = [self._pair(a, b, whole) for a, b in combinations(WAYS, 2)]

    def _pair(self, first: str, second: str, whole: bool) -> Pair:
        exact = first in WALKS and second in WALKS
        by_name = self.gradients if exact else self.slopes
        a, b = by_name[first], by_name[second]
        largest = max((_norm(x) for x in (*a.values(), *b.values())), default=0.0)
        compared: list[tuple[float, float, str]] = []
        for name in a:
            scale = max(_norm(a[name]), _norm(b[name]), self._rtol * largest)
            doubt = _ratio(10 * self.uncertainty[name], scale) if second == "differences" else 0.0
            allowed = self._rtol + (doubt if np.isfinite(doubt) else 0.0)
            compared.append((_ratio(_norm(a[name] - b[name]), scale), allowed, name))
        found, allowed, worst = max(compared, key=lambda row: row[0] / row[1])
        shape = self.gradients["eager"][worst].shape
        entry = _entry(a[worst], b[worst], shape if exact or whole else None)
        value = np.nan
        if second in self.losses:
            x, y = self.losses[first], self.losses[second]
            value = _ratio(abs(x - y), max(abs(x), abs(y)))
        return Pair(first, second, value, found, worst, entry, allowed)

    def __bool__(self) -> bool:
        return all(pair.ok for pair in self.pairs)

    @property
    def verdict(self) -> str:
        """One line: that all agree, or who does not."""
        if self:
            return f"All agree to {self._rtol:.2g}, beyond the uncertainty of the differences."
        for way in WAYS:
            others = [pair for pair in self.pairs if way not in pair[:2]]
            if all(pair.ok for pair in others) and not any(pair.ok for pair in self.pairs if way in pair[:2]):
                return f"{way!r} disagrees with all others, which agree with each other."
        wrong = ", ".join(f"{pair.first} and {pair.second}" for pair in self.pairs if not pair.ok)
        return f"These disagree by more than {self._rtol:.2g}: {wrong}."

    def __str__(self) -> str:
        rows = [("", "", "loss", "gradient", "allowed", "worst in", "where")]
        for p in self.pairs:
            value = "" if np.isnan(p.value) and p.second not in self.losses else f"{p.value:.1e}"
            mark = "" if p.ok else "   <- disagree"
            rows.append(
                (p.first, p.second, value, f"{p.gradient:.1e}", f"{p.allowed:.1e}", p.worst, f"{p.entry}{mark}")
            )
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = [
            "  ".join([*(cell.ljust(n) for cell, n in zip(row[:6], widths, strict=True)), row[6]]).rstrip()
            for row in rows
        ]
        return "\n".join([self._about, *lines, self.verdict])

    def __repr__(self) -> str:
        return f"Agreement({self.verdict})"


def agree(
    f: Any,
    batch: Sequence[Any],
    loss: Callable[..., Any] | None = None,
    *,
    argnums: int | Sequence[int] | None = None,
    dtype: npt.DTypeLike | None = "float64",
    directions: int | Literal["all"] = 4,
    eps: Sequence[float] | None = None,
    rtol: float | None = None,
    seed: int = 0,
) -> Agreement:
    """Compute a loss and its gradients in four ways that share little, and compare each with each.

    The ways are the walk over the tape with scans as kernels, the walk with scans step by step, forward mode, and
    central finite differences of the loss. The walks give whole gradients; the others are taken along directions,
    drawn for each parameter apart, so that none hides behind a larger one.

    Parameters
    ----------
    f : Module or callable
        A model, of which a copy is taken and `f` is left as it is; or a function of arrays.
    batch : sequence
        Its arguments.
    loss : callable, optional
        ``loss(f, *batch)``, a scalar. It has to call the model that it is given. Default ``f(*batch)``.
    argnums : int or sequence of int, optional
        Which arguments are differentiated too, nests of arrays as they may be. Default: of a Module none, of a function
        every one with floats in it.
    dtype : dtype or None
        What parameters and float arguments are cast to. Default float64; None: as they are.
    directions : int or "all"
        For each parameter; "all": along every entry, which costs as many passes as there are numbers.
    eps : sequence of float, optional
        Steps to try, for directions of the parameter's own norm or 1. Of each two neighbours' central differences, the
        two that are closest count; their distance is taken for the uncertainty. Default: four, 1.2e-3 to 1.2e-6 in
        float64.
    rtol : float, optional
        Allowed relative difference. Default the square root of the dtype's epsilon: 1.5e-8 in float64. Ten times their
        uncertainty is added for differences.
    seed : int
        Of the directions.

    Returns
    -------
    Agreement
        ``assert result, result`` in a test; ``print(result)`` for the table.

    Raises
    ------
    InputError
        If the loss depends on nothing that is differentiated, or is another number in a second run. Draws from
        `tinytape.random`, as in dropout, are repeated; the generators are left as they were.
    ShapeError, DTypeError
        If the loss is no scalar, or there is nothing to differentiate.

    Notes
    -----
    It costs a walk each, a forward pass for each direction, and ``2 len(eps)`` evaluations of the loss, step by step,
    for each direction.

    Examples
    --------
    >>> print(tt.check.agree(model, (x, target), lambda model, x, target: F.mse_loss(model(x)[0], target)))
    """
    if directions != "all" and (not isinstance(cast(Any, directions), int) or directions < 1):
        raise InputError(f"agree: directions is {directions!r}.", 'pass a positive integer, or "all".')
    problem = _Problem(f, batch, loss, argnums, dtype)
    step = float(np.finfo(problem.dtype).eps)
    steps = [step**0.25 * factor for factor in (10, 1, 0.1, 0.01)] if eps is None else list(eps)
    if len(steps) < 2 or not all(e > 0 for e in steps):
        raise InputError(f"agree: eps is {steps}.", "pass two or more positive numbers.")
    try:
        problem.settle(step**0.5)
        compiled = problem.walk()
        with no_compile():
            eager = problem.walk()
            found = Agreement(problem, step**0.5 if rtol is None else rtol, compiled.kernels)
            for way, walked in zip(WALKS, (compiled, eager), strict=True):
                found.losses[way], found.gradients[way] = walked.loss, walked.gradients
                found.slopes[way] = {
                    name: np.array([float(np.sum(g * v)) for v in problem.directions(i, directions, seed)])
                    for i, (name, g) in enumerate(walked.gradients.items())
                }
            found.losses["forward"], found.slopes["forward"] = problem.forward(directions, seed)
            found.slopes["differences"], found.uncertainty = problem.differences(directions, seed, steps)
    finally:
        problem.rewind()
    found.compare(directions == "all")
    return found


class _Walked(NamedTuple):
    """How many scans ran as kernels, the loss, and its gradients by name."""

    kernels: int
    loss: float
    gradients: dict[str, Array]


class _Problem:
    """A scalar as a function of named leaves, which draws the same random numbers every time."""

    def __init__(self, f: Any, batch: Any, loss: Any, argnums: Any, dtype: npt.DTypeLike | None) -> None:
        if not isinstance(batch, list | tuple):
            raise DTypeError(f"agree: batch is a {type(batch).__name__}, not a sequence.", "agree(f, (x, ...)).")
        args = list(cast("list[Any]", batch))
        module = hasattr(f, "named_parameters")
        if module:
            f = copy.deepcopy(f)
            f = f if dtype is None else f.to(dtype)
        named: Mapping[str, Tensor] = dict(f.named_parameters()) if module else {}
        self.sources = {name: p for name, p in named.items() if p.requires_grad}
        self.args = [map_leaves(partial(_cast, dtype=dtype), arg) for arg in args]
        if argnums is None:
            chosen = [] if module else [i for i, arg in enumerate(self.args) if any(map(_is_float, flatten(arg)))]
        else:
            chosen = [argnums] if isinstance(argnums, int) else list(argnums)
        for i in chosen:
            self._differentiate(i)
        if not self.sources:
            raise DTypeError(
                "agree: there is nothing to differentiate.", "pass a module with parameters, or float arguments."
            )
        self.names, self.leaves = list(self.sources), list(self.sources.values())
        self.dtype = max((x.dtype for x in self.leaves), key=lambda kind: np.finfo(kind).eps)
        self.f: Callable[..., Any] = f if loss is None else partial(loss, f)
        self.drawn: dict[Any, Any] = {}

    def _differentiate(self, i: Any) -> None:
        """Make the floats of an argument leaves."""
        if not isinstance(i, int) or not -len(self.args) <= i < len(self.args):
            raise InputError(f"agree: argnums has {i!r}; batch has {len(self.args)} arguments.", "name one of them.")
        i %= len(self.args)
        arg = self.args[i]
        made = [Tensor(x, requires_grad=True) if _is_float(x) else x for x in flatten(arg)]
        self.args[i] = unflatten(arg, made)
        names = leaf_names(f"batch[{i}]", arg)
        self.sources.update((n, x) for n, x in zip(names, made, strict=True) if isinstance(x, Tensor) and _is_float(x))

    def __call__(self) -> Tensor:
        self.rewind()
        value = self.f(*self.args)
        if not isinstance(value, Tensor) or value.size != 1 or value.dtype.kind != "f":
            kind = f"{value.dtype}{list(value.shape)}" if isinstance(value, Tensor) else f"a {type(value).__name__}"
            raise ShapeError(f"agree: the loss is {kind}.", "return a float scalar, by sum() or mean().")
        return value

    def rewind(self) -> None:
        """Put the generators back to where they stood before the first run."""
        for generator, state in self.drawn.items():
            generator.set_state(state)

    def settle(self, rtol: float) -> None:
        """Note where generators stand, and see that the loss is the same twice."""
        outer, here.context.drawn = here.context.drawn, self.drawn
        try:
            with no_compile(), no_grad():
                first = self().item()
        finally:
            here.context.drawn = outer
        with no_compile(), no_grad():
            second = self().item()
        if not np.isclose(first, second, rtol, 0, equal_nan=True):
            raise InputError(
                f"agree: the loss is {first!r} in a first run and {second!r} in a second.",
                "it must be a function of its arguments; draw random numbers from generators of tinytape.",
            )

    def walk(self) -> _Walked:
        with enable_grad(), Tape() as tape:
            value = self()
        kernels = sum(record.node.name.startswith("scan(") for record in tape.records)
        one = np.ones(value.shape, value.dtype)
        gradients = [None] if value.node is None else tape.gradient(value, self.leaves, one)
        if all(g is None for g in gradients):
            raise InputError(
                f"agree: the loss depends on none of {', '.join(self.names)}.",
                "loss(f, ...) has to use the f that it is given, which is a copy.",
            )
        found = [np.zeros(x.shape) if g is None else g.numpy() for g, x in zip(gradients, self.leaves, strict=True)]
        return _Walked(kernels, value.item(), dict(zip(self.names, found, strict=True)))

    def forward(self, count: int | Literal["all"], seed: int) -> tuple[float, dict[str, Array]]:
        """The loss, and its derivatives along directions, from one record gone along forwards for each."""
        with enable_grad(), Tape(keep_calls=True) as tape:
            value = self()

        def slope(x: Tensor, v: Array) -> float:
            tangents: dict[Any, Any] = {x.node: v.astype(x.dtype)}
            with no_grad():
                push_forward(tape.records, tangents, False)
            return float(np.sum(tangents.get(value.node, 0.0)))

        found = {
            name: np.array([slope(x, v) for v in self.directions(i, count, seed)])
            for i, (name, x) in enumerate(self.sources.items())
        }
        return value.item(), found

    def differences(
        self, count: int | Literal["all"], seed: int, steps: list[float]
    ) -> tuple[dict[str, Array], dict[str, float]]:
        """Derivatives along directions from values of the loss alone, and the uncertainty of each parameter's."""
        slopes: dict[str, Array] = {}
        doubts: dict[str, float] = {}
        with no_grad():
            for i, (name, x) in enumerate(self.sources.items()):
                found = [self._slope(x, v, steps) for v in self.directions(i, count, seed)]
                slopes[name] = np.array([slope for slope, _ in found])
                doubts[name] = _norm(np.array([doubt for _, doubt in found]))
        return slopes, doubts

    def _slope(self, x: Tensor, v: Array, steps: list[float]) -> tuple[float, float]:
        """The derivative along v, and how far the two estimates lie apart that it is the mean of."""
        values = x.numpy()

        def moved(by: float) -> float:
            x.copy_((values + by * v).astype(x.dtype))
            return self().item()

        estimates = np.array([(moved(e) - moved(-e)) / (2 * e) for e in steps])
        x.copy_(values)
        apart = np.abs(np.diff(estimates))
        best = int(np.argmin(apart))
        return float(estimates[best : best + 2].mean()), float(apart[best])

    def directions(self, i: int, count: int | Literal["all"], seed: int) -> Iterator[Array]:
        """The directions of the i-th leaf, the same at every call: of its own norm or 1, or its entries."""
        x = self.leaves[i]
        if count == "all":
            for entry in range(x.size):
                unit = np.zeros(x.shape)
                unit.flat[entry] = 1
                yield unit
            return
        rng = np.random.default_rng([seed, i])
        for _ in range(count):
            v = rng.standard_normal(x.shape)
            yield v * (max(1.0, _norm(x.raw)) / max(_norm(v), 1e-300))


def _is_float(x: Any) -> bool:
    return isinstance(x, Tensor | np.ndarray) and cast(Any, x).dtype.kind == "f"


def _cast(x: Any, dtype: npt.DTypeLike | None) -> Any:
    """A copy: floats cast, Tensors without their past."""
    if isinstance(x, Tensor):
        return Tensor(x.raw.astype(dtype) if dtype is not None and _is_float(x) else x.raw)
    return x.astype(dtype) if dtype is not None and _is_float(x) else x


def _norm(x: Array) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64)))


def _ratio(difference: float, scale: float) -> float:
    """Relative; what is not finite is infinitely far from everything."""
    if difference == 0:
        return 0.0
    return float(difference / scale) if np.isfinite(difference) and scale > 0 else np.inf


def _entry(a: Array, b: Array, shape: tuple[int, ...] | None) -> str:
    """Where two arrays differ most, with both numbers; without a shape they are along directions."""
    a, b = a.ravel(), b.ravel()
    if not a.size:
        return ""
    with np.errstate(invalid="ignore"):
        worst = int(np.argmax(np.nan_to_num(np.abs(a - b), nan=np.inf)))
    where = f"direction {worst}"
    if shape is not None:
        where = "(" + ", ".join(str(int(i)) for i in np.unravel_index(worst, shape)) + ")"
    return f"{where}: {a[worst]:.10g} and {b[worst]:.10g}"
