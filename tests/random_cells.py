"""Random recurrent cells, each a short program: what `cells` draws is source text that can be read and run.

A cell has carries, inputs and outputs of several widths in nests of any structure, and its step consists of lines from
`random_lines`: products with captured weights, elementwise functions, reductions, reshaping and indexing, masks, a
small memory, in any order and on any value at hand.
"""

from __future__ import annotations

import linecache
from functools import partial
from typing import Any

import numpy as np
from hypothesis import strategies as st

import tinytape as tt
from random_lines import LINES
from random_writer import Value, Writer
from tinytape.engine.tree import flatten
from tinytape.loop.scan import leaf_names

__all__ = ["FEATURES", "Cell", "assert_agree", "cells", "is_steady", "run_and_grad"]

PREFIX = """\
import numpy as np
import tinytape as tt
from tinytape import nn

rng = np.random.default_rng({seed})
constant = lambda a: tt.tensor(a, dtype="{dtype}")
leaf = lambda a: tt.tensor(a{noise}, True, dtype="{dtype}")
"""


class Cell:
    """A program that defines ``f``, ``init``, ``xs``, ``length`` and ``reverse``, and the tensors it makes.

    Attributes
    ----------
    text : str
        What is the same in every dtype.
    names : tuple of str
        Of the captured tensors.
    features : frozenset of str
        Those it makes use of.
    dtype : str
    seed : int
    noise : float
        Relative, of every number that is differentiated.
    """

    def __init__(
        self, text: str, names: tuple[str, ...], features: frozenset[str], dtype: str, seed: int, noise: float = 0.0
    ) -> None:
        self.text, self.names, self.features = text, names, features
        self.dtype, self.seed, self.noise = dtype, seed, noise
        self.namespace: dict[str, Any] = {}
        name = f"<random cell {abs(hash(self.source))}>"
        linecache.cache[name] = (len(self.source), None, self.source.splitlines(True), name)  # for tracebacks
        exec(compile(self.source, name, "exec"), self.namespace)

    @property
    def source(self) -> str:
        noise = f" * (1 + {self.noise:g} * np.sin(9e3 * a))" if self.noise else ""
        return PREFIX.format(seed=self.seed, dtype=self.dtype, noise=noise) + self.text

    def again(self, dtype: str | None = None, noise: float = 0.0) -> Cell:
        """The same program with tensors of its own."""
        return Cell(self.text, self.names, self.features, dtype or self.dtype, self.seed, noise)

    @property
    def captured(self) -> dict[str, tt.Tensor]:
        return {name: self.namespace[name] for name in self.names}

    def __getattr__(self, name: str) -> Any:
        if name in ("f", "init", "xs", "length", "reverse"):
            return self.namespace[name]
        raise AttributeError(name)

    def __repr__(self) -> str:
        return f"\n\n{self.source}\n"


# ---- running one ----------------------------------------------------------------------------------------------------


def run_and_grad(cell: Cell, compiled: bool | str = False, scan: Any = None) -> dict[str, np.ndarray]:
    """The carry, ys, and the gradients with respect to all that has one, by name, from random cotangents."""
    cell = cell.again(noise=cell.noise)
    scan = scan or partial(tt.scan, compiled=compiled)
    with tt.Tape() as tape:
        carry, ys = scan(cell.f, cell.init, cell.xs, cell.length, cell.reverse)
        names = leaf_names("carry", carry) + leaf_names("ys", ys)
        values = dict(zip(names, flatten((carry, ys)), strict=True))
        rng = np.random.default_rng(cell.seed + 1)
        cotangents = {n: rng.normal(size=v.shape).astype(v.dtype) for n, v in values.items() if v.dtype.kind == "f"}
        loss = sum((values[n] * cotangent).sum() for n, cotangent in cotangents.items())
        sources = dict(zip(leaf_names("init", cell.init), flatten(cell.init), strict=True)) | cell.captured
        sources |= dict(zip(leaf_names("xs", cell.xs), flatten(cell.xs), strict=True))
        sources = {n: x for n, x in sources.items() if isinstance(x, tt.Tensor) and x.requires_grad}
        tracked = isinstance(loss, tt.Tensor) and loss.requires_grad
        gradients = tape.gradient(loss, list(sources.values())) if tracked else [None] * len(sources)
    found = {n: v.numpy() for n, v in values.items()}
    for (name, x), g in zip(sources.items(), gradients, strict=True):
        found[f"gradient of {name}"] = np.zeros(x.shape, x.dtype) if g is None else g.numpy()
    return found


def assert_agree(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], tolerance: float) -> None:
    """Equal shapes and dtypes, and a small difference in norm; gradients are measured against the largest, too."""
    assert list(found) == list(expected)
    for name, b in expected.items():
        a = found[name]
        assert (a.shape, a.dtype) == (b.shape, b.dtype), (name, a.shape, a.dtype, b.shape, b.dtype)
    off = {n: e for n, e in disagreements(found, expected).items() if not e <= tolerance}
    assert not off, off


def disagreements(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> dict[str, float]:
    """``|a - b| / |b|`` of each, with no |b| below a hundredth of the largest of its kind (nor of 1)."""
    norms = {n: float(np.linalg.norm(b.astype(np.float64))) for n, b in expected.items()}
    largest = {kind: max([1.0, *(v for n, v in norms.items() if ("gradient" in n) is kind)]) for kind in (True, False)}
    return {
        n: float(np.linalg.norm(found[n].astype(np.float64) - b)) / max(norms[n], largest["gradient" in n] / 100)
        for n, b in expected.items()
    }


def is_steady(cell: Cell, noise: float = 1e-6, change: float = 1e-5) -> bool:
    """Whether noise as of float32's rounding changes little: no kink or step lies within its reach."""
    exact = run_and_grad(cell.again("float64"))
    moved = [run_and_grad(cell.again("float64", sign * noise)) for sign in (1, -1)]
    return all(error <= change for other in moved for error in disagreements(other, exact).values())


# ---- drawing one ----------------------------------------------------------------------------------------------------

FEATURES = frozenset(LINES) | {"derived weights", "carried flags"}
"""What a cell may make use of; `cells` takes any selection that has "products".

"counter" carries an integer beside the floats and "carried flags" bools, "vectors" are values of one number a row,
"shared inputs" one number a step, "captured rows" tensors from outside that have rows of the batch, and "derived
weights" slices, joins and multiples of captured ones, made inside the step or outside.
"""


@st.composite
def cells(draw: Any, features: frozenset[str] = FEATURES, dtypes: tuple[str, ...] = ("float64",)) -> Cell:
    """Cells that use some of `features`."""
    seeds, width = st.integers(0, 2**32), st.integers(1, 9) | st.integers(1, 9) | st.integers(10, 40)
    widths = draw(st.lists(width, min_size=1, max_size=3))
    w = Writer(features, draw(seeds), draw(st.integers(1, 6)), draw(st.integers(1, 5)), widths)
    carry, xs = _carry(w), _inputs(w)
    inits = {v.name: _array(w, v, (w.rows,)) for v in carry}
    inputs = {v.name: _array(w, v, (w.steps, w.rows)) for v in xs}
    inits |= {w.counter: "0"} if w.counter else {}
    inputs |= dict.fromkeys(w.clocks, f"constant(rng.uniform(0.5, 1, {w.steps}))")
    nest, x_nest = _nest(w, list(inits)), _nest(w, list(inputs)) if inputs else None
    opening = _unpack("carry", nest) + _unpack("x", x_nest)
    kinds = w.at_hand(LINES) + [kind for kind in ("products", "elementwise", "shapes") if kind in features] * 2
    for seed in draw(st.lists(seeds, min_size=1, max_size=16)):
        w.stir(seed)
        kind = w.one_of(*kinds)
        w.used.add(kind)
        w.one_of(*LINES[kind])(w)
    w.stir(draw(seeds))
    after = {v.name: _next(w, v, carry) for v in carry}
    after |= {w.counter: f"{w.counter} + 1"} if w.counter else {}
    y = _output(w)
    text = [
        *w.header,
        f"init = {_render(nest, inits)}",
        f"xs = {_render(x_nest, inputs)}",
        f"length, reverse = {None if inputs else w.steps}, {w.one_of(False, True)}",
        "\n\ndef f(carry, x):",
        *(f"    {line}" for line in (*opening, *w.body, f"return {_render(nest, after)}, {y}")),
    ]
    dtype, seed = draw(st.sampled_from(dtypes)), draw(st.integers(0, 99))
    return Cell("\n".join(text) + "\n", tuple(w.captured), frozenset(w.used), dtype, seed)


def _carry(w: Writer) -> list[Value]:
    found = [Value(w.name("h"), (w.width(),), 2.0)]
    for _ in range(w.one_of(0, 0, 1, 2)):
        kind = w.one_with("vectors", "memory", "carried flags", "counter")
        if kind == "counter":
            w.counter = w.counter or w.name("n")
        else:
            sides = {"vectors": (), "memory": w.memory()}.get(kind, (w.width(),))
            found.append(Value(w.name("h"), sides, 2.0, kind == "carried flags"))
    w.values += found
    return found


def _inputs(w: Writer) -> list[Value]:
    found: list[Value] = []
    for _ in range(w.one_of(1, 1, 0, 2, 3)):
        kind = w.one_with("vectors", "memory", "masks", "dropout", "shared inputs")
        if kind == "shared inputs":
            w.clocks.append(w.name("x"))
            continue
        sides = {"vectors": (), "memory": w.memory(), "masks": w.one_of((w.width(),), (1,), ())}.get(kind, (w.width(),))
        found.append(Value(w.name("x"), sides, 2.0, kind == "masks"))
        w.dropouts += found[-1:] if kind == "dropout" else []
    w.values += found
    return found


def _array(w: Writer, value: Value, lead: tuple[int, ...]) -> str:
    """An expression for an initial carry or an input."""
    shape = (*lead, *value.sides)
    if value.flags:
        return f"tt.tensor(rng.random({shape}) < 0.5)"
    if value in w.dropouts:
        return f"constant(rng.integers(0, 2, {shape}) * 2.0)"
    if len(lead) == 1 and w.seldom():
        return f"constant(np.zeros({shape}))"
    return f"{w.one_of('leaf', 'leaf', 'constant')}(rng.uniform(-1.5, 1.5, {shape}))"


def _next(w: Writer, old: Value, carry: list[Value]) -> str:
    """A carry after the step: bounded, whatever was computed."""
    if old.flags:
        return w.one_of("tt.logical_or({}, {})", "tt.logical_xor({}, {})").format(old, w.mask(old.sides))
    how = w.one_of("mixed", "new", "mixed", "new", "new", "old")
    if how == "old":  # its own, or another's
        return str(w.one_of(*(v for v in carry if v.sides == old.sides and not v.flags)))
    new = w.of(old.sides)
    bounded = str(new) if new.size <= 2 else f"tt.tanh({new})"
    return bounded if how == "new" else f"0.5 * {old} + 0.5 * {bounded}"


def _output(w: Writer) -> str:
    some = [w.some(w.values) for _ in range(w.one_of(1, 1, 0, 2, 3))]
    if w.counter and w.seldom():
        return _render(_nest(w, [*map(str, some), w.counter]))
    return _render(_nest(w, [str(v) for v in some]) if some else None)


def _nest(w: Writer, names: list[str]) -> Any:
    """The names in dicts, lists and tuples."""
    how = w.one_of("tuple", "list", "dict", "split")
    if len(names) == 1 and w.often():
        return names[0]
    if how == "split" and len(names) > 1:
        return {"one": _nest(w, names[:1]), "more": _nest(w, names[1:]), "none": None}
    if how == "dict":
        return {f"k{i}": name for i, name in enumerate(names)}
    return list(names) if how == "list" else (*names, None) if w.seldom() else tuple(names)


def _render(nest: Any, expressions: dict[str, str] | None = None) -> str:
    """The nest as Python text, each name replaced by its expression."""
    if isinstance(nest, dict):
        return "{" + ", ".join(f"{key!r}: {_render(child, expressions)}" for key, child in nest.items()) + "}"
    if isinstance(nest, list | tuple):
        inner = ", ".join(_render(child, expressions) for child in nest)
        return f"[{inner}]" if isinstance(nest, list) else f"({inner}{',' * (len(nest) == 1)})"
    return str(nest if expressions is None or nest is None else expressions[nest])


def _unpack(what: str, nest: Any) -> list[str]:
    """Lines that give every leaf its name."""
    return [f"{name} = {path}" for path, name in zip(leaf_names(what, nest), flatten(nest), strict=True)]
