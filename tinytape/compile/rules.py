"""What each op is in the program form: elementwise ops are maps, the rest is built from few others."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from .build import Builder
from .products import matmul_labels, product
from .rules_shape import SHAPES, declaring
from .views import View

__all__ = ["RULES"]

RULES: dict[str, Callable[..., Any]] = dict(SHAPES)
"""By the op's name: a function of the builder, the arguments (views, values, numbers) and the options."""

rule = declaring(RULES)


# ---- elementwise ----------------------------------------------------------------------------------------------------

_NAMES = """
    add subtract multiply divide negative square sqrt exp exp2 expm1 log log2 log10 log1p sin cos tan arcsin arccos
    arctan sinh cosh tanh arcsinh arccosh arctanh reciprocal sign floor ceil sigmoid relu silu erf erfc maximum minimum
    arctan2 hypot logaddexp equal not_equal less less_equal greater greater_equal power abs where
"""


def _mapped(fn: str) -> Callable[..., Any]:
    def mapped(low: Builder, *args: Any) -> Any:
        return low.map(fn, *args)

    return mapped


RULES.update({name: _mapped(name) for name in _NAMES.split()})
RULES["absolute"] = RULES["abs"]


@rule("add")
def _(low: Builder, a: Any, b: Any) -> View:
    for one, other in ((a, b), (b, a)):
        if isinstance(one, float | int) and one == 0 and isinstance(other, View) and other.value.kind == "product":
            return other  # a sum that starts from 0 is never -0, so this changes no bit
    return low.map("add", a, b)


@rule("divide")
def _(low: Builder, a: Any, b: Any) -> View:
    if not (isinstance(a, View) and isinstance(b, View)) or (b.value.kind, b.value.fn) != ("map", "sqrt"):
        return low.map("divide", a, b)
    if math.prod(a.row_shape) <= math.prod(b.row_shape) or math.prod(b.row_shape) > 1:
        return low.map("divide", a, b)
    # As in a normalisation: a product is quicker, and the reciprocal of a root is always in range.
    return low.map("multiply", a, low.map("divide", 1.0, b))


def _unchanged(low: Builder, value: Any, probe: Any) -> View:
    """What a probe does to a value: nothing. Its gradient is then taken in the kernel (see `loop.probes`)."""
    return low.view(value)


RULES.update(measured=_unchanged, entering=_unchanged, added=_unchanged)


@rule("power_of_tensor")
def _(low: Builder, x: View, exponent: Any) -> View:
    if exponent == 2:
        return low.map("square", x)
    if exponent == 1:
        return low.map("copy", x)
    if exponent == 0.5:
        return low.map("sqrt", x)
    if exponent == -1:
        return low.map("reciprocal", x)
    return low.map("power", x, float(exponent))


@rule("power_of_number")
def _(low: Builder, x: View, base: Any) -> View:
    return low.map("power", float(base), x)


@rule("clip")
def _(low: Builder, x: View, a_min: Any, a_max: Any) -> View:
    return low.map("minimum", low.map("maximum", x, a_min), a_max)


@rule("leaky_relu")
def _(low: Builder, x: View, negative_slope: float) -> View:
    return low.map("where", low.map("greater", x, 0.0), x, low.map("multiply", x, negative_slope))


@rule("elu")
def _(low: Builder, x: View, alpha: float) -> View:
    bent = low.map("multiply", low.map("expm1", low.map("minimum", x, 0.0)), alpha)
    return low.map("where", low.map("greater", x, 0.0), x, bent)


@rule("softplus")
def _(low: Builder, x: View, beta: float, threshold: float) -> View:
    return low.map("softplus", x, float(beta), float(threshold))


@rule("gelu")
def _(low: Builder, x: View, approximate: str) -> View:
    if approximate == "none":
        half = low.map("multiply", low.map("erfc", low.map("multiply", x, -1.0 / math.sqrt(2.0))), 0.5)
        return low.map("multiply", x, half)
    cube = low.map("multiply", low.map("multiply", low.map("multiply", x, x), x), 0.044715)
    t = low.map("tanh", low.map("multiply", low.map("add", x, cube), math.sqrt(2.0 / math.pi)))
    return low.map("multiply", low.map("multiply", x, 0.5), low.map("add", t, 1.0))


@rule("logical_and", "bitwise_and")
def _(low: Builder, a: Any, b: Any) -> View:
    return low.map("where", a, low.map("not_equal", b, 0.0), 0.0)


@rule("logical_or", "bitwise_or")
def _(low: Builder, a: Any, b: Any) -> View:
    return low.map("where", a, 1.0, low.map("not_equal", b, 0.0))


@rule("logical_xor", "bitwise_xor")
def _(low: Builder, a: Any, b: Any) -> View:
    return low.map("not_equal", low.map("not_equal", a, 0.0), low.map("not_equal", b, 0.0))


@rule("logical_not", "invert")
def _(low: Builder, x: View) -> View:
    return low.map("equal", x, 0.0)


@rule("isnan")
def _(low: Builder, x: View) -> View:
    return low.map("not_equal", x, x)


@rule("isinf")
def _(low: Builder, x: View) -> View:
    return low.map("equal", low.map("abs", x), math.inf)


@rule("isfinite")
def _(low: Builder, x: View) -> View:
    return low.map("less", low.map("abs", x), math.inf)


@rule("astype")
def _(low: Builder, x: View, dtype: Any) -> View:
    if np.dtype(dtype) == np.bool_:
        return low.map("not_equal", x, 0.0)
    return x  # the lowering has refused every other dtype but the program's own


# ---- products -------------------------------------------------------------------------------------------------------


@rule("matmul")
def _(low: Builder, a: Any, b: Any) -> Any:
    a, b = low.view(a), low.view(b)
    return product(low, a, b, *matmul_labels(a, b))


@rule("tensordot")
def _(low: Builder, a: Any, b: Any, first: tuple[int, ...], second: tuple[int, ...]) -> Any:
    a, b = low.view(a), low.view(b)
    one: list[Any] = [("a", i) for i in range(len(a.shape))]
    two: list[Any] = [("b", i) for i in range(len(b.shape))]
    for k, (i, j) in enumerate(zip(first, second, strict=True)):
        one[i] = two[j] = k
    out = tuple([label for label in (*one, *two) if not isinstance(label, int)])
    return product(low, a, b, tuple(one), tuple(two), out)


@rule("outer")
def _(low: Builder, a: Any, b: Any) -> Any:
    a, b = (low.reshape(x, (math.prod(x.shape),)) for x in (low.view(a), low.view(b)))
    return product(low, a, b, ("a",), ("b",), ("a", "b"))


@rule("einsum")
def _(low: Builder, *operands: Any, subscripts: str) -> Any:
    left, _, output = subscripts.partition("->")
    found, labels = low.view(operands[0]), tuple(left.split(",")[0])
    rest = [(low.view(x), tuple(letters)) for x, letters in zip(operands[1:], left.split(",")[1:], strict=True)]
    while rest:
        other, letters = rest.pop(0)
        needed = set(output).union(*(more for _, more in rest))
        kept = tuple(letter for letter in dict.fromkeys(labels + letters) if letter in needed)
        kept = kept if rest else tuple(output)
        found, labels = product(low, found, other, labels, letters, kept), kept
    return found if labels == tuple(output) else low.view(found).with_axes([labels.index(x) for x in output])


# ---- over axes ------------------------------------------------------------------------------------------------------


def _axes(x: View, axis: Any) -> list[int]:
    rank = len(x.shape)
    if axis is None or not rank:  # NumPy lets a number have an axis
        return list(range(rank))
    return sorted(a % rank for a in ((axis,) if isinstance(axis, int) else axis))


def _reduced(low: Builder, fn: str, x: View, axis: Any, keepdims: bool) -> Any:
    axes = _axes(x, axis)
    result = low.reduce(fn, x, axes)
    if not keepdims:
        return result
    if not hasattr(result, "with_axes"):
        raise low.cannot("a sum over the batch that keeps the axis")
    return result.with_new(axes)


def _count(x: View, axis: Any) -> float:
    return float(math.prod(x.shape[a] for a in _axes(x, axis)))


@rule("sum")
def _(low: Builder, x: View, axis: Any, keepdims: bool) -> Any:
    return _reduced(low, "sum", x, axis, keepdims)


@rule("cumsum")
def _(low: Builder, x: View, axis: int | None) -> Any:
    """Each entry sums those before it: a loop over all pairs, where the others count as zeros, also if they are NaN."""
    if axis is None:
        raise low.cannot("cumsum of the flattened tensor")
    rank, n = len(x.shape), x.shape[axis]
    axis %= rank
    before = low.view(low.constant(np.tri(n, dtype=low.dtype)))
    order = [i for i in range(rank) if i != axis]
    pairs = low.map("where", before, x.with_axes([*order, -1, axis]), 0.0)
    total = low.reduce("sum", pairs, (-1,))
    return total.with_axes([*range(axis), rank - 1, *range(axis, rank - 1)])


@rule("max")
def _(low: Builder, x: View, axis: Any, keepdims: bool) -> Any:
    return _reduced(low, "max", x, axis, keepdims)


@rule("min")
def _(low: Builder, x: View, axis: Any, keepdims: bool) -> Any:
    return _reduced(low, "min", x, axis, keepdims)


@rule("mean")
def _(low: Builder, x: View, axis: Any, keepdims: bool) -> Any:
    return low.map("divide", _reduced(low, "sum", x, axis, keepdims), _count(x, axis))


@rule("var")
def _(low: Builder, x: View, axis: Any, ddof: int, keepdims: bool) -> Any:
    mean = low.map("divide", _reduced(low, "sum", x, axis, True), _count(x, axis))
    centred = low.map("subtract", x, mean)
    squares = low.map("multiply", centred, centred)
    return low.map("divide", _reduced(low, "sum", squares, axis, keepdims), max(_count(x, axis) - ddof, 0.0))


@rule("std")
def _(low: Builder, x: View, axis: Any, ddof: int, keepdims: bool) -> Any:
    return low.map("sqrt", RULES["var"](low, x, axis, ddof, keepdims))


@rule("norm")
def _(low: Builder, x: View, ord: Any, axis: Any, keepdims: bool) -> Any:
    if ord not in (2, "fro", None):
        raise low.cannot(f"norm of order {ord}")
    return low.map("sqrt", _reduced(low, "sum", low.map("multiply", x, x), axis, keepdims))


@rule("logsumexp")
def _(low: Builder, x: View, axis: Any, keepdims: bool) -> Any:
    largest = _reduced(low, "max", x, axis, True)
    infinite = low.map("equal", low.map("abs", largest), math.inf)
    largest = low.map("where", infinite, 0.0, largest)
    total = _reduced(low, "sum", low.map("exp", low.map("subtract", x, largest)), axis, True)
    result = low.map("add", low.map("log", total), largest)
    if keepdims:
        return result
    axes = _axes(x, axis)
    return result.with_axes([i for i in range(len(x.shape)) if i not in axes])


@rule("softmax")
def _(low: Builder, x: View, axis: Any) -> Any:
    e = low.map("exp", low.map("subtract", x, _reduced(low, "max", x, axis, True)))
    return low.map("divide", e, _reduced(low, "sum", e, axis, True))


@rule("log_softmax")
def _(low: Builder, x: View, axis: Any) -> Any:
    moved = low.map("subtract", x, _reduced(low, "max", x, axis, True))
    total = _reduced(low, "sum", low.map("exp", moved), axis, True)
    return low.map("subtract", moved, low.map("log", total))
