"""What a function takes from outside: found by looking through its closure, so that a trace can be used again.

A trace holds for every call in which all that the function can reach is the same, but for the floats in its tensors.
Integers, which may be positions, and NumPy's arrays, which a function may compute with unseen, are a part of it.
`look_through` describes what can be reached, and lists the tensors among it in a fixed order.
"""

from __future__ import annotations

import dis
import itertools
import types
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache, partial
from operator import is_
from typing import Any, NamedTuple, cast

import numpy as np

from ..engine.op import Op
from ..engine.tensor import Tensor
from ..engine.tree import Array, is_array
from ..random import Generator
from .guards import Guard, Matched

__all__ = ["Captures", "look_through"]

_PLAIN = (type(None), bool, int, float, complex, str, bytes, types.EllipsisType, slice, range, np.dtype, np.generic)
LARGE = 1 << 20  # bytes: larger arrays are not compared; the function is then traced each time
_PACKAGE = __name__.split(".", 1)[0]
MOST, DEEPEST = 1000, 30  # how many objects are looked at, and how far inside others: a trace costs no more


class Captures(NamedTuple):
    """What was found.

    Attributes
    ----------
    key : hashable
        Equal for two functions that do the same with the tensors they take from outside.
    tensors : list of Tensor or array
        Those tensors.
    complete : bool
        Whether everything was understood. If not, the function must be traced each time.
    matched : callable, optional
        The tensors of another function, or of the same one later, if it has the same key; else None. Not there where
        not everything was understood.
    """

    key: Any
    tensors: list[Any]
    complete: bool
    matched: Matched | None = None

    def still_of(self, f: Callable[..., Any]) -> bool:
        """Whether f still reaches what was found, and the very same tensors."""
        if self.matched is None:
            return True
        tensors = self.matched(f)
        return tensors is not None and len(tensors) == len(self.tensors) and all(map(is_, tensors, self.tensors))


def look_through(f: Callable[..., Any]) -> Captures:
    """Describe a function and all that it can reach; one that has an attribute `captures` does so itself."""
    known: Captures | None = getattr(f, "captures", None)
    if known is not None:
        return known
    code = getattr(f, "__code__", f.__class__)
    patterns = _patterns.get(code, ())
    for number, matched in patterns:
        tensors = matched(f)
        if tensors is not None:
            if number != patterns[0][0]:  # the last one first; by another tuple, as other threads may be reading this
                _patterns[code] = (number, matched), *[known for known in patterns if known[0] != number]
            return Captures(number, tensors, True, matched)
    look = _Look()
    key = look.at(f, Guard.given)
    if not look.complete:
        return Captures((key,), look.tensors, False)
    number, matched = _number(key), look.matched()
    if len(_patterns) > MOST:
        _patterns.clear()
    _patterns[code] = ((number, matched), *patterns)[:PATTERNS]
    return Captures(number, look.tensors, True, matched)


# What was found, by code. To describe a function takes several times as long as to see that it is like one described
# before.
_patterns: dict[Any, tuple[tuple[int, Matched], ...]] = {}
PATTERNS = 4  # of each code
_ABSENT = object()


class _Look:
    """What a function reaches: a key, and a guard for another time. `y` is the guard's name for the object x."""

    def __init__(self, settling: _Settled | None = None) -> None:
        self.settling = settling
        self.guard = Guard()
        self.alive: list[Any] = []  # an id is an object's as long as it lives
        self.names: dict[int, str] = {}  # what has been met on the way, by id: the guard's name for it
        self.tensors: list[Any] = []
        self.complete = True
        self.depth = 0
        self.modules: set[tuple[types.ModuleType, types.CodeType]] = set()

    def matched(self) -> Matched:
        """Whether something is like what was looked at, and its tensors."""
        self.guard.different([*self.names.values()])
        return self.guard.function([self.names[id(x)] for x in self.tensors])

    def at(self, x: Any, y: str) -> Any:
        kind, guard = x.__class__, self.guard
        if kind in _PLAIN or issubclass(kind, np.generic):
            return self._plain(x, y)
        if id(x) in self.names:
            guard.require(f"{y} is {self.names[id(x)]}")
            return "met", list(self.names).index(id(x))
        if kind is types.FunctionType and x.__closure__ is None and self.settling is None:
            settled = _settled(x)
            if settled is not None:
                same, like = f"{y} is {guard.constant(x)}", f"{guard.constant(settled.is_like)}({y})"
                same = f"{same} and {guard.constant(settled.holds)}()" if settled.may_change else same
                guard.require(f"{same} or {like}")
                return "settled", settled.number
        if self.settling is not None and not (kind in _FIXED or isinstance(x, type | np.ufunc)):
            raise _Unsettled
        self.names[id(x)] = y
        self.alive.append(x)
        if len(self.alive) > MOST or self.depth > DEEPEST:
            self.complete = False
            return "more", id(x)
        guard.require(f"{y}.__class__ is {guard.constant(kind)}")
        if isinstance(x, Tensor):
            return self._tensor(x, y)
        if is_array(x):
            self.tensors.append(x)
            return "array", *self._form(x, y), self._contents(x, y)
        self.depth += 1
        try:
            return self._inside(x, y, kind)
        finally:
            self.depth -= 1

    def _all(self, found: Iterable[Any], names: Iterable[str]) -> tuple[Any, ...]:
        return tuple([self.at(x, y) for x, y in zip(found, names, strict=True)])

    def _is(self, x: Any, y: str) -> None:
        self.guard.require(f"{y} is {self.guard.constant(x)}")

    def _plain(self, x: Any, y: str) -> Any:
        guard, kind = self.guard, x.__class__
        same = f"{y} is {guard.constant(x)}"
        if kind is float:  # -0.0 is another number, NaN is the same
            guard.require(f"{same} or {y}.__class__ is float and repr({y}) == {guard.constant(repr(x))}")
            return kind, repr(x)
        guard.require(f"{same} or {y}.__class__ is {guard.constant(kind)} and {y} == {guard.constant(x)}")
        return kind, x

    def _tensor(self, x: Tensor, y: str) -> Any:
        self.tensors.append(x)
        raw = self.guard.let(f"{y}.raw")
        form = self._form(x.raw, raw)
        contents = None if x.raw.dtype.kind == "f" else self._contents(x.raw, raw)
        self.guard.require(f"{y}.node is {'' if x.node is None else 'not '}None")
        return "tensor", *form, x.node is None, contents

    def _form(self, x: Array, y: str) -> tuple[Any, ...]:
        self.guard.require(f"{y}.shape == {self.guard.constant(x.shape)}", f"{y}.dtype.char == {x.dtype.char!r}")
        return x.shape, x.dtype.char

    def _contents(self, x: Array, y: str) -> int:
        if x.nbytes > LARGE:
            self.complete = False
            return 0
        contents = _hashed(x)
        self.guard.require(f"{self.guard.constant(_hashed)}({y}) == {self.guard.constant(contents)}")
        return contents

    def _inside(self, x: Any, y: str, kind: Any) -> Any:
        guard = self.guard
        if isinstance(x, tuple | list):
            items = cast("list[Any]", x)
            guard.require(f"len({y}) == {len(items)}")
            return kind, self._all(items, guard.unpack(y, len(items)))
        if isinstance(x, dict):
            held = cast("dict[Any, Any]", x)
            if self.settling is not None:
                self.settling.sizes.append((held, len(held)))
                self.settling.look_up(held, held)
            if set(map(type, held)) <= {str}:
                return kind, *self._members(held, y)
            guard.require(f"len({y}) == {len(held)}")
            keys = self._all(held, guard.unpack(y, len(held)))
            return kind, keys, self._all(held.values(), guard.unpack(f"{y}.values()", len(held)))
        if kind is types.FunctionType:
            return self._function(x, y)
        if kind is types.MethodType:
            return self._parts("method", x, y, "__func__", "__self__")
        if isinstance(x, partial):
            return self._parts("partial", x, y, "func", "args", "keywords")
        # A generator is known by itself alone: drawing from it in a step is refused by the trace.
        if isinstance(x, type | types.BuiltinFunctionType | np.ufunc | Generator) or kind.__module__ == "functools":
            self._is(x, y)
            return "object", x
        if isinstance(x, property):
            return self._parts("property", x, y, "fget")
        if isinstance(x, staticmethod | classmethod):
            return self._parts(kind, x, y, "__func__")
        if hasattr(x, "__dict__") and _is_plain(kind):  # what it holds, and what its methods reach
            members = self._members(cast("dict[str, Any]", vars(x)), guard.let(f"{y}.__dict__"))
            return kind, members, self._class(kind)
        self.complete = False
        return "unknown", id(x)

    def _parts(self, what: Any, x: Any, y: str, *names: str) -> Any:
        """Attributes, of which it is all made."""
        return what, *self._all([getattr(x, name) for name in names], [self.guard.let(f"{y}.{n}") for n in names])

    def _members(self, held: dict[str, Any], y: str) -> tuple[Any, Any]:
        """A dict of names."""
        guard, names = self.guard, tuple(held)
        guard.require(f"tuple({y}) == {guard.constant(names)}")
        return names, self._all(held.values(), guard.unpack(f"{y}.values()", len(names)))

    def _class(self, kind: type) -> Any:
        """What a class that a user wrote has."""
        guard, found = self.guard, list[Any]()
        for base in kind.__mro__:
            if base is not object and not _is_ours(base):
                members = vars(base)
                y = guard.constant(members)
                guard.require(f"len({y}) == {len(members)}")
                found.append(self._looked_up(members, y, [n for n in members if n == "__call__" or n[:2] != "__"]))
        return tuple(found)

    def _looked_up(
        self, held: Mapping[str, Any], y: str, names: Iterable[str], code: types.CodeType | None = None
    ) -> tuple[Any, Any]:
        """What names mean in the dict that the guard knows as `y`, of those that mean something there."""
        guard, there = self.guard, [name for name in names if name in held]
        guard.require(*[f"{name!r} not in {y}" for name in names if name not in held])
        absent = guard.constant(_ABSENT)
        values = [guard.let(f"{y}.get({name!r}, {absent})") for name in there]
        if code is None:
            return tuple(there), self._all([held[name] for name in there], values)
        return tuple(there), tuple([self._named(held[name], y, code) for name, y in zip(there, values, strict=True)])

    def _function(self, f: types.FunctionType, y: str) -> Any:
        guard = self.guard
        if isinstance(getattr(f, "op", None), Op):  # the code of many ops is the same
            self._is(f, y)
            return "op", f
        if self.settling is not None:
            if f.__closure__ or f.__kwdefaults__:
                raise _Unsettled
            self.settling.functions.append((f, f.__code__, f.__defaults__))
        code, held = f.__code__, guard.constant(f.__globals__)
        guard.require(f"{y}.__code__ is {guard.constant(code)}", f"{y}.__globals__ is {held}")
        guard.require(f"{y}.__module__ == {guard.constant(f.__module__)}")
        inside = self._cells(f, y)
        defaults = self._parts("defaults", f, y, "__defaults__", "__kwdefaults__")
        names = () if _is_ours(f) else _globals_of(code)
        if self.settling is not None:
            self.settling.look_up(f.__globals__, names)
        return code, inside, defaults, self._looked_up(f.__globals__, held, names, code)

    def _cells(self, f: types.FunctionType, y: str) -> Any:
        """What the variables of a function that are those of one around it hold, if anything."""
        guard, cells = self.guard, f.__closure__ or ()
        found: list[Any] = []
        for cell, name in zip(cells, guard.unpack(f"{y}.__closure__", len(cells)), strict=True):
            if _is_empty(cell):
                guard.require(f"{guard.constant(_is_empty)}({name})")
                found.append(_ABSENT)
            else:
                found.append(self._named(cell.cell_contents, guard.let(f"{name}.cell_contents"), f.__code__))
        return tuple(found)

    def _named(self, x: Any, y: str, code: types.CodeType) -> Any:
        """A variable from outside of a function; of a module, what the function may take from it."""
        if not isinstance(x, types.ModuleType):
            return self.at(x, y)
        self._is(x, y)
        if x.__name__.split(".")[0] in (_PACKAGE, "numpy", "math") or (x, code) in self.modules:
            return "module", x.__name__
        self.modules.add((x, code))
        held, names = vars(x), _names_in(code)
        if self.settling is not None:
            self.settling.look_up(held, names)
        return "module", x.__name__, self._looked_up(held, self.guard.constant(held), names, code)


def _hashed(array: Array) -> int:
    return hash(array.tobytes())


# ---- functions that reach only functions and constants --------------------------------------------------------------
#
# Most of what a step reaches are functions that stand in modules, and stay as they are. Where such a function reaches
# no tensor and nothing that can be written into unseen, it is enough to see that its names still mean the same objects.

_FIXED = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, tuple, dict)
_counter = itertools.count()
_numbers: dict[Any, int] = {}


def _number(key: Any) -> int:
    """The same for equal keys, and much quicker to compare."""
    if len(_numbers) > MOST:
        _numbers.clear()  # what was described then is described anew, by other numbers
    return _numbers.setdefault(key, next(_counter))


class _Unsettled(Exception):
    """The function reaches what may change."""


class _Settled:
    """All that a function without a closure reaches, and how to see that it is still so."""

    def __init__(self) -> None:
        self.number = -1  # the same for functions that do the same
        self.names: list[tuple[Any, Any, Any]] = []  # a dict, a key in it, and what stands there
        self.sizes: list[tuple[Any, int]] = []  # of dicts of which all counts
        self.functions: list[tuple[types.FunctionType, types.CodeType, Any]] = []

    def look_up(self, held: Any, names: Iterable[Any]) -> None:
        """Note what names mean."""
        self.names += [(held, name, held.get(name)) for name in names]

    def holds(self) -> bool:
        for held, name, expected in self.names:
            if held.get(name) is not expected:
                return False
        for held, size in self.sizes:
            if len(held) != size:
                return False
        for f, code, defaults in self.functions:
            if f.__code__ is not code or f.__defaults__ is not defaults or f.__kwdefaults__ is not None:
                return False
        return True

    @property
    def may_change(self) -> bool:
        """Whether there is anything to see to: an op is what it is."""
        return bool(self.names or self.sizes or self.functions)

    def is_like(self, f: Any) -> bool:
        """Whether another function does the same."""
        if f.__class__ is not types.FunctionType or f.__closure__ is not None:
            return False
        found = _settled(f)
        return found is not None and found.number == self.number


_settled_functions: dict[types.FunctionType, _Settled | None] = {}


def _settled(f: types.FunctionType) -> _Settled | None:
    """All that a function without a closure is and reaches, as it is now; None if that may change unseen."""
    if f in _settled_functions:
        found = _settled_functions[f]
        if found is None or found.holds():
            return found
    elif len(_settled_functions) > MOST:
        _settled_functions.clear()
    settled = _Settled()
    look, key = _Look(settled), None
    try:
        key = look.at(f, Guard.given)
    except _Unsettled:
        look.complete = False
    else:
        settled.number = _number(key)
    found = _settled_functions[f] = settled if look.complete else None
    return found


def _is_ours(x: Any) -> bool:
    module = x.__module__ or ""
    return module == _PACKAGE or module.startswith(_PACKAGE + ".")


@lru_cache(maxsize=1024)
def _is_plain(kind: type) -> bool:
    """Whether a class is written in Python and keeps what it holds in ``__dict__``: then that is all there is."""
    bases = [base for base in kind.__mro__ if base is not object]
    written = all(base.__flags__ & _HEAP_TYPE and not vars(base).get("__slots__") for base in bases)
    looked_up = any(name in vars(base) for base in bases for name in ("__getattr__", "__getattribute__"))
    return written and (not looked_up or hasattr(kind, "named_parameters"))


_HEAP_TYPE = 1 << 9  # of a type's flags: it was made while running, as by a class statement


@lru_cache(maxsize=4096)
def _names_in(code: types.CodeType) -> tuple[str, ...]:
    """All names, of attributes too, that the code or a function inside it uses."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_names_in(constant)))
    return tuple(names)


@lru_cache(maxsize=4096)
def _globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Names of global variables that the code, or a function inside it, looks up."""
    names = dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(_globals_of(constant)))
    return tuple(names)


def _is_empty(cell: types.CellType) -> bool:
    """Whether a variable is not assigned yet."""
    try:
        return cell.cell_contents is _ABSENT
    except ValueError:
        return True
