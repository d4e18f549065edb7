"""Lines of random programs: what a step of a drawn cell may compute.

Each function here takes values at hand, or has them made, and adds one or a few. Rows of the batch never meet; entries
stay near 1, and a function is used where it is smooth or has a kink, never where it has a pole.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from random_writer import Value, Writer

__all__ = ["LINES"]

Line = Callable[[Writer], None]
LINES: dict[str, list[Line]] = {}
"""By feature, functions that write a line or a few."""


def line(feature: str) -> Callable[[Line], Line]:
    def enter(write: Line) -> Line:
        LINES.setdefault(feature, []).append(write)
        return write

    return enter


@line("products")
def affine(w: Writer) -> None:
    width, row = w.width(), w.pick(1)
    if w.seldom():
        row = w.let(f"{row} * {w.of(row.sides)}", row.sides, 2 * row.size)
    terms = [f"{row} @ {w.matrix(*row.sides, width)}"]
    if w.one_of(True, False):
        other = w.pick(1)
        terms.append(f"tt.matmul({other}, {w.matrix(*other.sides, width)})")
    if w.one_of(True, False):
        terms.append(w.weight("b", w.one_of((width,), (1, width))))
    w.let(" + ".join(terms), (width,), 1.5 * row.size)


@line("products")
def gates(w: Writer) -> None:
    """One product cut into gates, which is what cells are made of."""
    width, row = w.width(), w.pick(1)
    z = w.let(f"{row} @ {w.matrix(*row.sides, 3 * width)} + {w.of((3 * width,))}", (3 * width,), 2 * row.size)
    i, f, g = (w.name("v") for _ in range(3))
    w.body.append(f"{i}, {f}, {g} = tt.split({z}, {w.one_of(3, [width, 2 * width])}, axis={w.axis(1, 2)})")
    old = w.of((width,))
    w.let(f"tt.sigmoid({f}) * {old} + tt.sigmoid({i}) * tt.tanh({g})", (width,), 1 + old.size)


@line("vectors")
def vector_product(w: Writer) -> None:
    row = w.pick(1)
    (width,) = row.sides
    w.let(f"{row} @ {w.weight('p', (width,), 1 / math.sqrt(width))}", (), row.size)


UNARY = {
    "tt.tanh({})": 1, "tt.sigmoid({})": 1, "tt.relu({})": 0, "tt.leaky_relu({})": 0, "tt.elu({})": 0, "tt.gelu({})": 0,
    "tt.silu({})": 0, "tt.softplus({})": 0, "tt.erf({})": 1, "tt.sin({})": 1, "tt.cos({})": 1, "tt.arctan({})": 1,
    "tt.arcsinh({})": 0, "tt.abs({})": 0, "-{}": 0, "tt.square(tt.tanh({}))": 1, "tt.exp(-tt.square({}))": 1,
    "tt.exp(tt.tanh({}))": 3, "tt.expm1(tt.sin({}))": 2, "tt.exp2(tt.tanh({}))": 2, "tt.log({} * {} + 0.5)": 2,
    "tt.log1p(tt.abs({}))": 0, "tt.sqrt({} * {} + 0.1)": 0, "1 / (1.5 + {} ** 2)": 1, "1 - {}": 0,
    "tt.reciprocal(2 + tt.sin({}))": 1,
    "(0.5 + {} * {}) ** 0.75": 2, "tt.tanh({}) ** 3": 1, "tt.clip({}, -0.5, 0.75)": 1, "tt.sinh(tt.sin({}))": 1,
    "tt.sign({})": 1, "{} * 0.5": 0, "{} + 1": 0, "2 - {} / 3": 0, "{} - 0.25": 0, "-0.5 * {}": 0,
}  # fmt: skip
"""Elementwise functions and how large the result is, 0 for about as large as the argument."""

BINARY = {
    "{} + {}": 2, "{} - {}": 2, "{} * {}": 2, "{} / (1.5 + tt.square({}))": 1, "tt.maximum({}, {})": 1,
    "tt.minimum({}, {})": 1, "tt.logaddexp({}, {})": 1, "tt.hypot({} + 0.5, {})": 2, "tt.sigmoid({}) * {}": 1,
    "tt.arctan2({}, 1.5 + tt.sin({}))": 1, "(1.5 + tt.sin({})) ** tt.tanh({})": 2, "tt.tanh({}) * {}": 1,
    "tt.multiply({}, {})": 2, "tt.add({}, {})": 2,
}  # fmt: skip


@line("elementwise")
def unary(w: Writer) -> None:
    a = w.pick()
    for _ in range(w.between(1, 5)):
        formula, size = w.one_of(*UNARY.items())
        a.used = True
        a = w.let(formula.replace("{}", str(a)), a.sides, size or a.size + 0.5)


@line("elementwise")
def binary(w: Writer) -> None:
    a = w.pick()
    b = w.of(a.sides)
    formula, factor = w.one_of(*BINARY.items())
    w.let(formula.format(a, b), a.sides, factor * max(a.size, b.size, 1))


@line("elementwise")
def interpolate(w: Writer) -> None:
    a = w.pick()
    b, z = w.of(a.sides), w.let(f"tt.sigmoid({w.of(a.sides)})", a.sides)
    formula = w.one_of("{z} * {a} + (1 - {z}) * {b}", "{b} + {z} * ({a} - {b})")
    w.let(formula.format(z=z, a=a, b=b), a.sides, max(a.size, b.size))


@line("elementwise")
def with_weight(w: Writer) -> None:
    """A captured vector or number beside a value."""
    a = w.pick(1, 2)
    shape = w.one_of(a.sides[-1:], (1,) * len(a.sides) + a.sides[-1:], ())
    formula, about = w.one_of(("{} * {}", 1.0), ("{1} + {0}", 0.0), ("{} / {}", 1.5))
    w.let(formula.format(a, w.weight("g", shape, about=about)), a.sides, a.size + 1)


@line("elementwise")
def across(w: Writer) -> None:
    """One number a row beside the features."""
    a, b = w.pick(1), w.of(w.one_of((), (1,)))
    column = b if b.sides else w.one_of("tt.expand_dims({}, 1)", "{}[:, None]", "tt.reshape({}, (-1, 1))").format(b)
    w.let(f"{a} {w.one_of('*', '+', '-')} {column}", a.sides, 2 * max(a.size, b.size))


@line("reductions")
def reduction(w: Writer) -> None:
    a, keep = w.pick(1, 2), w.one_of(True, False)
    formula = w.one_of("tt.mean", "tt.var", "tt.sum", "tt.max", "tt.min", "tt.logsumexp")
    at = w.between(0, len(a.sides) - 1)
    axis: Any = w.axis(at + 1, len(a.sides) + 1)
    sides = a.sides[:at] + ((1,) if keep else ()) + a.sides[at + 1 :]
    count = a.sides[at]
    if len(a.sides) == 2 and w.seldom():
        axis, count, sides = w.one_of((1, 2), (-2, -1)), math.prod(a.sides), (1, 1) if keep else ()
    scale = f" / {count}" if formula == "tt.sum" else ""
    size = a.size**2 if formula == "tt.var" else a.size + math.log(count) * (formula == "tt.logsumexp")
    w.let(f"{formula}({a}, axis={axis}{', keepdims=True' if keep else ''}){scale}", sides, size)


@line("reductions")
def normalised(w: Writer) -> None:
    a = w.pick(1, 2)
    width = a.sides[-1]
    how = w.one_of("softmax", "log_softmax", "layer_norm", "written out")
    if how == "layer_norm":
        gain, shift = w.weight("g", (width,), about=1.0), w.weight("b", (width,))
        w.let(f"nn.functional.layer_norm({a}, ({width},), {gain}, {shift}, 0.1)", a.sides, 2)
    elif how == "written out":
        m = w.let(f"{a} - tt.mean({a}, axis=-1, keepdims=True)", a.sides, a.size)
        w.let(f"{m} / tt.sqrt(tt.mean({m} * {m}, axis=-1, keepdims=True) + 0.1)", a.sides, 2)
    else:
        axis = w.axis(w.between(1, len(a.sides)), len(a.sides) + 1)
        w.let(f"tt.{how}({a}, axis={axis})", a.sides, 1 if how == "softmax" else a.size + math.log(math.prod(a.sides)))


@line("shapes")
def cut(w: Writer) -> None:
    a = w.pick(1, 2)
    width = a.sides[-1]
    start = w.between(0, width - 1)
    stop = w.between(start + 1, width)
    bounds = w.one_of((start, stop), (start - width, None), (None, None, -1), (None, None, 2))
    index = ":".join("" if bound is None else str(bound) for bound in bounds)
    lead = w.one_of("...", ", ".join(":" * len(a.sides)))
    w.let(f"{a}[{lead}, {index}]", (*a.sides[:-1], len(range(width)[slice(*bounds)])), a.size)


@line("shapes")
def pieces(w: Writer) -> None:
    a = w.pick(1, 2)
    width = a.sides[-1]
    if width % 2 == 0 and w.often():
        where, widths = "2", [width // 2] * 2
    else:
        at = w.between(0, width)
        where, widths = f"[{at}]", [at, width - at]
    one, other = w.name("v"), w.name("v")
    w.body.append(f"{one}, {other} = tt.split({a}, {where}, axis={w.axis(len(a.sides), len(a.sides) + 1)})")
    w.values += [Value(n, (*a.sides[:-1], k), a.size) for n, k in zip((one, other), widths, strict=True) if k]


@line("shapes")
def joined(w: Writer) -> None:
    a, b = w.pick(1), w.pick(1)
    parts, width = w.one_of(((a, b), a.sides[0] + b.sides[0]), ((a, b, a), 2 * a.sides[0] + b.sides[0]))
    if width <= 80:
        w.let(f"tt.concatenate([{', '.join(map(str, parts))}], axis={w.axis(1, 2)})", (width,), max(a.size, b.size))


@line("shapes")
def stacked(w: Writer) -> None:
    a = w.pick(0, 1)
    b, at = w.of(a.sides), w.between(0, len(a.sides))
    sides = (*a.sides[:at], 2, *a.sides[at:])
    both = w.let(f"tt.stack([{a}, {b}], axis={w.axis(at + 1, len(sides) + 1)})", sides, max(a.size, b.size))
    if w.one_of(True, False):
        one, other = w.name("v"), w.name("v")
        w.body.append(f"{one}, {other} = tt.unstack({both} * 0.5, axis={at + 1})")
        w.values += [Value(one, a.sides, both.size), Value(other, a.sides, both.size)]


@line("shapes")
def indexed(w: Writer) -> None:
    """Indexing with constants."""
    a = w.pick(1, 2)
    lead, width = ":, " * len(a.sides), a.sides[-1]
    at = w.between(-width, width - 1)
    some = [w.between(0, width - 1) for _ in range(w.between(1, 5))]
    how = w.one_of("one", "list", "array", "take")
    if how == "one":
        w.let(f"{a}[{lead}{at}]", a.sides[:-1], a.size)
        return
    text = {
        "list": f"{a}[{lead}{some}]",
        "array": f"{a}[{lead}np.array({some})]",
        "take": f"tt.take({a}, {some}, axis=-1)",
    }
    w.let(text[how], (*a.sides[:-1], len(some)), a.size)


@line("shapes")
def folded(w: Writer) -> None:
    """The features as a matrix, turned, and flat again."""
    a = w.pick(1)
    (width,) = a.sides
    n = w.one_of(*(k for k in range(1, width + 1) if width % k == 0))
    square = w.let(
        f"tt.reshape({a}, {w.one_of((-1, n, width // n), (w.rows, n, width // n))})", (n, width // n), a.size
    )
    how = w.one_of("tt.swapaxes({}, 1, 2)", "tt.transpose({}, (0, 2, 1))", "tt.swapaxes({}, -1, -2)")
    turned = w.let(how.format(square), (width // n, n), a.size)
    if w.one_of(True, False):
        w.let(f"tt.reshape({turned}, (-1, {width}))", (width,), a.size)


@line("shapes")
def arranged(w: Writer) -> None:
    a = w.pick(1)
    (width,) = a.sides
    formulas = {
        "tt.flip({}, axis=-1)": width, "tt.roll({}, 1, axis=1)": width, "tt.pad({}, ((0, 0), (1, 2)))": width + 3,
        "tt.squeeze(tt.expand_dims({}, 1), axis=1)": width, "tt.expand_dims({}, -1)[..., 0]": width,
        "tt.reshape({}, {}.shape)": width, "tt.repeat({}, 2, axis=1)": 2 * width, "tt.tile({}, (1, 2))": 2 * width,
    }  # fmt: skip
    formula, width = w.one_of(*((f, n) for f, n in formulas.items() if n <= max(80, width)))
    w.let(formula.replace("{}", str(a)), (width,), a.size)


@line("shapes")
def widened(w: Writer) -> None:
    column, width = w.of((1,)), w.width()
    w.let(f"tt.broadcast_to({column}, ({w.rows}, {width}))", (width,), column.size)
    w.let(f"tt.squeeze({column}, axis={w.axis(1, 2)})", (), column.size)


@line("masks")
def chosen(w: Writer) -> None:
    a = w.pick()
    other = w.of(a.sides) if w.often() else w.one_of(0.0, -0.5)
    w.let(f"tt.where({w.mask(a.sides)}, {a}, {other})", a.sides, max(a.size, getattr(other, "size", 1)))


@line("masks")
def mask(w: Writer) -> None:
    a = w.pick(0, 1)
    how = w.one_of("tt.logical_and({}, {})", "tt.logical_or({}, {})")
    w.let(how.format(w.mask(a.sides), f"({a} > 0.125)"), a.sides, flags=True)


@line("masks")
def counted(w: Writer) -> None:
    a = w.pick(1)
    w.let(f"{a} * ({w.of(a.sides)} > 0)", a.sides, a.size)


@line("memory")
def read(w: Writer) -> None:
    """Attention over the rows of a memory."""
    memory = w.of(w.memory())
    slots, width = memory.sides
    key = w.of((width,))
    scores = w.one_of(
        "tt.sum({m} * tt.expand_dims({k}, 1), axis=-1)", "tt.squeeze(tt.matmul({m}, tt.expand_dims({k}, -1)), axis=-1)",
        "({m} @ {k}[:, :, None])[..., 0]",
    ).format(m=memory, k=key)  # fmt: skip
    weights = w.let(f"tt.softmax({scores} * 0.5, axis=-1)", (slots,))
    formula = w.one_of(
        "tt.sum(tt.expand_dims({a}, 2) * {m}, axis=1)", "tt.squeeze(tt.expand_dims({a}, 1) @ {m}, axis=1)",
        "({a}[:, None, :] @ {m})[:, 0]",
    )  # fmt: skip
    w.let(formula.format(a=weights, m=memory), (width,), memory.size)


@line("memory")
def written(w: Writer) -> None:
    memory = w.of(w.memory())
    slots, width = memory.sides
    weights, value = w.let(f"tt.softmax({w.of((slots,))}, axis=1)", (slots,)), w.of((width,))
    formula = w.one_of("{m} + {a} * ({v} - {m})", "{m} * (1 - {a}) + {a} * {v}", "{m} * 0.5 + {a} * {v}")
    where, what = f"tt.expand_dims({weights}, -1)", f"tt.expand_dims({value}, 1)"
    w.let(formula.format(m=memory, a=where, v=what), memory.sides, max(memory.size, value.size))


@line("memory")
def outer(w: Writer) -> None:
    a, b = w.of((w.one_of(1, 2, 3),)), w.of((w.width(),))
    formula = w.one_of("tt.expand_dims({}, 2) * tt.expand_dims({}, 1)", "{}[:, :, None] @ {}[:, None, :]")
    w.let(formula.format(a, b), (*a.sides, *b.sides), 2 * max(a.size, b.size))


@line("memory")
def memory_products(w: Writer) -> None:
    memory = w.of(w.memory())
    slots, width = memory.sides
    if w.one_of(True, False):
        w.let(f"{memory} @ {w.matrix(width, out := w.width())}", (slots, out), memory.size)
    else:
        w.let(f"{memory} @ tt.swapaxes({memory}, 1, 2) * {1 / width:.3g}", (slots, slots), 2 * memory.size)


@line("captured rows")
def from_outside(w: Writer) -> None:
    """What has rows of the batch too, but stays the same over time, as an encoder's states do."""
    a = w.pick(1, 2)
    w.let(f"{a} {w.one_of('+', '*')} {w.weight('e', (w.rows, *a.sides), 1.0)}", a.sides, a.size + 1)


@line("dropout")
def dropped(w: Writer) -> None:
    """A mask among the inputs."""
    keep = w.one_of(*w.dropouts)
    a = w.of(keep.sides)
    w.let(f"{a} * {keep}", a.sides, 2 * a.size)


@line("counter")
def averaged(w: Writer) -> None:
    a = w.pick()
    w.let(f"{a} / ({w.counter} + 1)", a.sides, a.size)


@line("shared inputs")
def scaled_by_time(w: Writer) -> None:
    a = w.pick()
    w.let(f"{a} * {w.one_of(*w.clocks)}", a.sides, a.size)
