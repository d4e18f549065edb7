"""The innermost part of emitted loops: what is read, computed and stored for one vector of elements."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from .loops import Nest, Store
from .program import Ref, Value

if TYPE_CHECKING:
    from .emit_numba import Writer

__all__ = ["Body", "loops"]

_INFIX = {"add": "+", "subtract": "-", "multiply": "*", "divide": "/"}
_RENAMED = {"abs": "absolute"}
_REDUCTIONS = {
    "sum": ("+", "total", "0.0"),
    "max": ("maximum", "largest", "-inf"),
    "min": ("minimum", "smallest", "inf"),
}


def loops(body: list[str], axes: Iterable[tuple[int, str]]) -> list[str]:
    """`body` inside a loop for each axis, given with the name of its length."""
    for a, n in reversed(list(axes)):
        body = [f"for i{a} in range({n}):", *(f"    {line}" for line in body)]
    return body


class Body:
    """The innermost body of a nest: lines that compute its values for one vector of elements, or for one number."""

    def __init__(self, writer: Writer, nest: Nest, rank: int, pointers: dict[str, Value]) -> None:
        self.writer, self.nest, self.rank, self.pointers = writer, nest, rank, pointers
        self.used: set[str] = set()
        self.loaded: dict[Any, str] = {}
        self.totals: list[str] = []
        self.starts: list[str] = []  # before the summed loops
        self.ends: list[str] = []  # after them
        self.lines: list[str] = []

    def body(self) -> list[str]:
        writer = self.writer
        inside = set(self.nest.values)
        stores: dict[Value, list[Store]] = {}
        for store in self.nest.stores:
            stores.setdefault(store.value, []).append(store)
        folded = self.folded(set(stores))
        for value in self.nest.values:
            if value in folded:
                continue
            if value.kind == "reduce":
                self.reduction(value, stores.get(value, []), inside)
                continue
            name = writer.name_of(value)
            self.lines.append(f"{name} = {self.expression(value, inside, folded)}")
        for value, found in stores.items():
            if value.kind != "reduce":
                for store in found:
                    self.store(store)
        return self.lines or ["pass"]

    def folded(self, stored: set[Value]) -> set[Value]:
        """Products that are read once, by a sum: the two are one instruction."""
        readers: dict[Value, list[Value]] = {}
        for value in self.nest.values:
            for ref in value.refs():
                readers.setdefault(ref.value, []).append(value)
        found: set[Value] = set()
        for value in self.nest.values:
            users = readers.get(value, [])
            if value.kind == "map" and value.fn == "multiply" and value not in stored and len(users) == 1:
                user = users[0]
                others = [a.value for a in user.args if isinstance(a, Ref) and a.value is not value]
                if user.kind == "map" and user.fn in ("add", "subtract") and not found.intersection(others):
                    found.add(value)
        return found

    def expression(self, value: Value, inside: set[Value], folded: set[Value]) -> str:
        def read(a: Any) -> str:
            return self.read(a, inside) if isinstance(a, Ref) else self.use(self.writer.constant(a))

        for i, arg in enumerate(value.args):
            if isinstance(arg, Ref) and arg.value in folded:
                a, b = map(read, arg.value.args)
                c = read(value.args[1 - i])
                if value.fn == "add":
                    return f"fma({a}, {b}, {c})"
                return f"fma({a}, {b}, -{c})" if i == 0 else f"fma(-{a}, {b}, {c})"
        args = [read(a) for a in value.args]
        if value.fn == "copy" and self.rank and not isinstance(value.args[0], Ref):
            return f"fill({args[0]})"
        return _expression(value.fn, args)

    def use(self, name: str) -> str:
        if not name.startswith("number("):
            self.used.add(name)
        return name

    def read(self, ref: Ref, inside: set[Value]) -> str:
        """What a ref reads at the loop's element."""
        writer = self.writer
        if ref.value in inside and ref.value.kind == "map":
            assert ref.is_whole(self.nest.values[0].loops), "a register holds the element in hand"
            return writer.name_of(ref.value)
        if ref in self.loaded:
            return self.loaded[ref]
        at, stride = self.address(ref.value, ref.index)
        pointer = self.pointer(ref.value)
        if stride == "0":
            text = f"get({pointer}, {at})" if self.rank == 0 else f"fill(get({pointer}, {at}))"
        elif stride == "1":
            text = f"load({pointer}, {_plus(at, 'j')}, m)"
        else:
            text = f"strided({pointer}, {_plus(at, f'j * {stride}')}, {stride}, m)"
        following = writer.following(pointer, ref.value, at) if stride == "1" else None
        if following is not None:
            self.lines.append(f"prefetch({self.use(following)}, {_plus(at, 'j')})")
        name = f"{writer.name_of(ref.value)}_{len(self.loaded)}"
        self.loaded[ref] = name
        self.lines.append(f"{name} = {text}")
        return name

    def pointer(self, value: Value) -> str:
        writer = self.writer
        base = writer.base(value)
        name = f"{writer.name_of(base)}_at" if base.kind == "invariant" else writer.pointer(base)
        if base.kind == "invariant":
            writer.entry(name, "at", base)
        else:
            self.pointers.setdefault(name, base)
        return self.use(name)

    def address(self, value: Value, index: Any) -> tuple[str, str]:
        """The offset of the loop's element, less what the vector's axis adds, and that axis' stride, in elements."""
        writer = self.writer
        terms: list[str] = []
        vector = "0"
        offset, unit, started = 0, 1, False
        last = len(value.shape) - 1
        for v in range(last, -1, -1):
            start, step, axis = index[v]
            started = started or start != 0
            offset += start * unit
            if axis is not None:
                if v == last and step == 1:
                    stride = "1"
                elif step == 1:
                    stride = " * ".join(writer.length(writer.dims.of(value, w)) for w in range(v + 1, last + 1))
                    self.used.update(writer.length(writer.dims.of(value, w)) for w in range(v + 1, last + 1))
                else:
                    stride = self.use(writer.number("s", step * unit))
                if axis == self.rank - 1:
                    vector = stride if " " not in stride else f"({stride})"
                else:
                    terms.append(f"i{axis}" if stride == "1" else f"i{axis} * {stride}")
                    self.use(f"i{axis}")
            unit *= value.shape[v]
        if started:
            key = tuple((writer.dims.of(value, v), item[0]) for v, item in enumerate(index))
            if key not in writer.offsets:
                writer.offsets[key] = writer.number("o", offset)
            terms.insert(0, self.use(writer.offsets[key]))
        base = writer.base(value)
        if writer.is_kept(base):
            terms.insert(0, self.use(writer.entry(f"kept_{writer.name_of(base)}", "kept", base)))
        return " + ".join(terms) or "0", vector

    def store(self, store: Store) -> None:
        writer = self.writer
        target = store.target
        if store.piece is None:
            index = tuple((0, 1, i) for i in range(len(target.shape)))
        else:
            index = tuple((first, step, i) for i, (first, step, _) in enumerate(store.piece.place))
        at, stride = self.address(target, index)
        if target.kind == "rowsum":
            pointer = self.use(writer.entry(f"{writer.name_of(target)}_part", "part", target))
            if target not in writer.added:
                writer.added.append(target)
        else:
            pointer = self.pointer(target)
        value = writer.name_of(store.value)
        if self.rank == 0:  # what reads it soon would wait for a masked store until all stores before it are done
            old = f"get({pointer}, {at}) + " if store.adding else ""
            self.lines.append(f"put({pointer}, {at}, {old}{value})")
        elif stride in ("0", "1"):
            where = _plus(at, "j")
            old = f"load({pointer}, {where}, m) + " if store.adding else ""
            self.lines.append(f"store({pointer}, {where}, {old}{value}, m)")
        else:
            where = _plus(at, f"j * {stride}")
            old = f"strided({pointer}, {where}, {stride}, m) + " if store.adding else ""
            self.lines.append(f"store_strided({pointer}, {where}, {stride}, {old}{value}, m)")

    def reduction(self, value: Value, stores: list[Store], inside: set[Value]) -> None:
        writer = self.writer
        argument = self.read(value.args[0], inside)
        symbol, ending, start = _REDUCTIONS[value.fn]
        name = f"{writer.name_of(value)}_all"
        self.totals.append(name)
        self.starts.append(f"{name} = fill(number({start}))")
        along = self.rank - 1 in value.axes
        if along:
            argument = f"only({argument}, m, number({start}))"
        self.lines.append(
            f"{name} = {name} + {argument}" if symbol == "+" else f"{name} = {symbol}({name}, {argument})"
        )
        kept = [a for a in range(self.rank) if a not in value.axes]
        for store in stores:
            if store.piece is not None or store.adding:
                raise AssertionError("reductions are stored whole")
            outer = Body(writer, self.nest, self.rank, self.pointers)
            at, _ = outer.address(store.target, tuple((0, 1, a) for a in kept))
            pointer = outer.pointer(store.target)
            writer.used.update(outer.used - set(self.pointers) - {f"i{a}" for a in range(self.rank)})
            if along:
                self.ends.append(f"put({pointer}, {at}, {ending}({name}))")
            else:
                self.ends.append(f"store({pointer}, {_plus(at, 'j')}, {name}, {{m}})")


def _plus(at: str, j: str) -> str:
    return j if at == "0" else f"{at} + {j}"


def _expression(fn: str, args: list[str]) -> str:
    if fn in _INFIX:
        return f"{args[0]} {_INFIX[fn]} {args[1]}"
    if fn == "negative":
        return f"-{args[0]}"
    if fn == "copy":
        return args[0]
    return f"{_RENAMED.get(fn, fn)}({', '.join(args)})"
