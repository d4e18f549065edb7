"""Gradients checked against finite differences, along random directions."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from ..engine.errors import DTypeError, InputError, TapeError
from ..engine.tensor import Tensor
from ..engine.tree import flatten, unflatten
from ..transforms import jvp, vjp

__all__ = ["check_grads"]

Array = np.ndarray[Any, np.dtype[np.float64]]


def check_grads(
    f: Callable[..., Any],
    args: Sequence[Any],
    order: int = 1,
    modes: Sequence[str] = ("rev", "fwd"),
    *,
    rtol: float = 1e-5,
    atol: float = 1e-6,
    eps: float = 1e-5,
    projections: int = 2,
    seed: int = 0,
) -> None:
    """Compare derivatives of `f` with finite differences; return if they agree, and raise if not.

    Each derivative is compared along random directions, so the cost does not grow with the size of the arguments:
    for directions u and v, reverse mode gives <u J, v>, forward mode <u, J v>, and central differences
    <u, f(x + eps v) - f(x - eps v)> / (2 eps). Second and higher orders check the gradient of <u, f> in the same
    way. Only when a check fails are entries compared one by one, to name the worst.

    Parameters
    ----------
    f : callable
        Takes and returns float arrays, Tensors, or nests of them. Results that are not floats are left out.
    args : sequence
        Where to check, in float64.
    order : int
        Highest order of derivative. Default 1.
    modes : sequence of {"rev", "fwd"}
        Which modes to check.
    rtol, atol : float
        Allowed difference, relative to the size of the derivative along the direction, and absolute.
    eps : float
        Step of the differences, relative to ``max(1, |x|)``.
    projections : int
        How many random directions for each derivative.
    seed : int
        Of the directions.

    Raises
    ------
    TapeError
        If a derivative differs, naming the worst entry; or if the one-sided differences differ from each other,
        which means a kink (a tie in max, the corner of abs) lies within `eps` of the arguments.
    DTypeError
        If an argument is not float64.
    InputError
        If `order` is below 1 or a mode is unknown.
    """
    if order < 1:
        raise InputError(f"check_grads: order is {order}; the least is 1.", "pass order=1 or 2.")
    if not isinstance(args, list | tuple):
        raise DTypeError(
            f"check_grads: args is a {type(args).__name__}, not a sequence of arguments.", "check_grads(f, [x])."
        )
    unknown = set(modes) - {"rev", "fwd"}
    if unknown:
        raise InputError(f"check_grads: modes has {sorted(unknown)}.", 'modes are "rev" and "fwd".')
    flat = [x.raw if isinstance(x, Tensor) else np.asarray(x) for x in flatten(list(args))]
    for i, x in enumerate(flat):
        if x.dtype != np.float64:
            raise DTypeError(
                f"check_grads: args[{i}] has dtype {x.dtype}; differences need float64.", "pass float64 arrays."
            )
    rng = np.random.default_rng(seed)
    check = _Check(f, list(args), rtol, atol, eps, projections, rng)
    check.run(order, tuple(modes), "")


class _Check:
    def __init__(
        self,
        f: Callable[..., Any],
        args: list[Any],
        rtol: float,
        atol: float,
        eps: float,
        projections: int,
        rng: np.random.Generator,
    ) -> None:
        self.f, self.args, self.rtol, self.atol, self.eps = f, args, rtol, atol, eps
        self.projections, self.rng = projections, rng
        self.flat = _values(args)

    def direction(self, like: list[Array]) -> list[Array]:
        return [self.rng.standard_normal(x.shape) for x in like]

    def values(self, flat: list[Array]) -> list[Array]:
        return [y for y in _values(self.f(*unflatten(self.args, [x.copy() for x in flat]))) if y.dtype.kind == "f"]

    def moved(self, direction: list[Array], by: float) -> list[Array]:
        return self.values([x + by * self.eps * v for x, v in zip(self.flat, direction, strict=True)])

    def run(self, order: int, modes: tuple[str, ...], of: str) -> None:
        middle = self.values(self.flat)
        scale: list[Array] = [np.maximum(1.0, np.abs(x)) for x in self.flat]
        for _ in range(self.projections):
            u = self.direction(middle)
            v = [x * s for x, s in zip(self.direction(self.flat), scale, strict=True)]
            right, left = self.moved(v, 1.0), self.moved(v, -1.0)
            self.kink(of, middle, left, right)
            numeric = _inner(u, [(r - q) / (2 * self.eps) for r, q in zip(right, left, strict=True)])
            size = self.atol + self.rtol * max(abs(numeric), _norm(u) * _norm(_differences(right, left, self.eps)))
            if "rev" in modes:
                gradients = self.reverse(u)
                if not abs(_inner(gradients, v) - numeric) <= size:
                    self.fail(of, gradients, u)
            if "fwd" in modes:
                tangents = self.forward(v)
                if not abs(_inner(u, tangents) - numeric) <= size:
                    self.fail_forward(of, tangents, left, right)
        if order > 1:
            u = self.direction(middle)

            def gradient(*args: Any) -> Any:
                value, pullback = vjp(self.f, *args)
                floats = iter(u)
                seeds = [next(floats) if _is_float(y) else np.zeros(np.shape(y)) for y in flatten(value)]
                return pullback(unflatten(value, seeds))

            next_order = _Check(
                gradient, self.args, self.rtol * 10, self.atol * 10, self.eps, self.projections, self.rng
            )
            next_order.run(order - 1, modes, f"{of}the gradient of ")

    def reverse(self, u: list[Array]) -> list[Array]:
        value, pullback = vjp(self.f, *self.args)
        floats = iter(u)
        seeds = [next(floats) if _is_float(y) else np.zeros(np.shape(y)) for y in flatten(value)]
        return _values(list(pullback(unflatten(value, seeds))))

    def forward(self, v: list[Array]) -> list[Array]:
        _, tangents = jvp(self.f, self.args, unflatten(self.args, v))
        return [t for t in _values(tangents) if t.dtype.kind == "f"]

    def kink(self, of: str, middle: list[Array], left: list[Array], right: list[Array]) -> None:
        """Raise if the function bends sharply here: then no difference quotient can be right."""
        for r, m, q in zip(right, middle, left, strict=True):
            ahead, behind = (r - m) / self.eps, (m - q) / self.eps
            bend = np.abs(ahead - behind)
            # A smooth function bends by about eps |f''|; a kink by as much as the slope itself.
            sharp = bend > 1e-2 * (1.0 + np.maximum(np.abs(ahead), np.abs(behind)))
            if np.any(sharp):
                where = np.unravel_index(int(np.argmax(np.where(sharp, bend, 0))), bend.shape)
                raise TapeError(
                    f"check_grads: {of}f has a kink here: at result {_index(where)} the slope is {behind[where]:.6g} "
                    f"on one side and {ahead[where]:.6g} on the other.",
                    "check at arguments at a distance from ties and corners.",
                )

    def fail(self, of: str, gradients: list[Array], u: list[Array]) -> None:
        worst: tuple[float, str] = (-1.0, "")
        for k, (x, g) in enumerate(zip(self.flat, gradients, strict=True)):
            for where in np.ndindex(x.shape):
                direction = [np.zeros_like(y) for y in self.flat]
                direction[k][where] = 1.0
                numeric = _inner(u, _differences(self.moved(direction, 1.0), self.moved(direction, -1.0), self.eps))
                difference = abs(numeric - float(g[where]))
                if difference > worst[0] or np.isnan(difference):
                    found = f"{g[where]:.9g}, differences {numeric:.9g}"
                    worst = (difference, f"argument {k}, entry {_index(where)}: {found}")
        raise TapeError(
            f"check_grads: {of}f: reverse mode disagrees with finite differences; worst at {worst[1]}.",
            "the rule of an op in f is wrong, or f is not a function of its arguments alone.",
        )

    def fail_forward(self, of: str, tangents: list[Array], left: list[Array], right: list[Array]) -> None:
        worst: tuple[float, str] = (-1.0, "")
        for k, (t, numeric) in enumerate(zip(tangents, _differences(right, left, self.eps), strict=True)):
            difference: Array = np.abs(t - numeric)
            if difference.size and not np.max(difference) <= worst[0]:
                where = np.unravel_index(np.argmax(difference), difference.shape)
                worst = (
                    float(difference[where]),
                    f"result {k}, entry {_index(where)}: {t[where]:.9g}, differences {numeric[where]:.9g}",
                )
        raise TapeError(
            f"check_grads: {of}f: forward mode disagrees with finite differences; worst at {worst[1]}.",
            "the forward rule of an op in f is wrong.",
        )


def _values(tree: Any) -> list[Array]:
    return [x.raw if isinstance(x, Tensor) else np.asarray(x) for x in flatten(tree)]


def _is_float(x: Any) -> bool:
    return (x.dtype if isinstance(x, Tensor) else np.asarray(x).dtype).kind == "f"


def _differences(right: list[Array], left: list[Array], eps: float) -> list[Array]:
    return [(r - q) / (2 * eps) for r, q in zip(right, left, strict=True)]


def _inner(a: list[Array], b: list[Array]) -> float:
    return float(sum(np.sum(x * y) for x, y in zip(a, b, strict=True)))


def _norm(a: list[Array]) -> float:
    return float(np.sqrt(sum(np.sum(x * x) for x in a)))


def _index(where: Iterator[Any] | tuple[Any, ...]) -> str:
    return "(" + ", ".join(str(int(i)) for i in where) + ")"
