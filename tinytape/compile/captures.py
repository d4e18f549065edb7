"""What a function takes from outside: found by looking through its closure, so that a trace can be used again.

A trace holds for every call in which all that the function can reach is the same, but for the floats in its tensors.
Integers, which may be positions, and NumPy's arrays, which a function may compute with unseen, are a part of it.
`look_through` describes what can be reached, and lists the tensors among it in a fixed order.
"""

from __future__ import annotations

import itertools
import types
from collections.abc import Callable, Collection, Iterable
from enum import Enum
from functools import cached_property, partial
from operator import is_
from typing import Any, NamedTuple, cast

import numpy as np

from ..engine.op import Op
from ..engine.tensor import Tensor
from ..engine.tree import Array, is_array
from ..random import Generator
from . import kinds
from .draws import is_a_generator
from .guards import Guard, Matched

__all__ = ["Captures", "look_through"]

LARGE = 1 << 20  # bytes: larger arrays are not compared; the function is then traced each time
MOST, DEEPEST = 1000, 30  # how many objects are looked at beside tensors and constants, and how far inside others
REMEMBERED = 1000  # entries of each table of what was found
SEVERAL = 8  # constants that are compared by a loop


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
    generators : tuple
        Those of random numbers among what was not understood: NumPy's and Python's.
    """

    key: Any
    tensors: list[Any]
    complete: bool
    matched: Matched | None = None
    generators: tuple[Any, ...] = ()

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
        return Captures((key,), look.tensors, False, None, tuple(filter(is_a_generator, look.alive)))
    number, matched = _number(key), look.matched()
    if len(_patterns) > REMEMBERED:
        _patterns.clear()
    _patterns[code] = ((number, matched), *patterns)[:PATTERNS]
    return Captures(number, look.tensors, True, matched)


# What was found, by code. To describe a function takes several times as long as to see that it is like one described
# before.
_patterns: dict[Any, tuple[tuple[int, Matched], ...]] = {}
PATTERNS = 4  # of each code
_ABSENT = object()


class _Look:
    """What a function reaches: a key, and a guard for another time. `y` is what the guard calls the object x."""

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
        if kinds.is_a_constant(x):
            return self._plain(x, y)
        if id(x) in self.names:
            return self._met(x, y)
        if kind is types.FunctionType and x.__closure__ is None and self.settling is None:
            settled = _settled(x)
            if settled is not None:
                same, like = f"{y} is {guard.constant(x)}", f"{guard.constant(settled.is_like)}({y})"
                same = f"{same} and {guard.constant(settled.holds)}()" if settled.may_change else same
                guard.require(f"{same} or {like}")
                return "settled", settled.number
        if self.settling is not None and not (kind in _FIXED or isinstance(x, np.ufunc) or kinds.is_a_library(x)):
            raise _Unsettled
        self.names[id(x)] = y
        self.alive.append(x)
        guard.require(f"{y}.__class__ is {guard.constant(kind)}")
        if isinstance(x, Tensor):
            return self._tensor(x, y)
        if is_array(x):
            self.tensors.append(x)
            return "array", *self._form(x, y), self._contents(x, y)
        if len(self.alive) - len(self.tensors) > MOST or self.depth > DEEPEST:
            self.complete = False
            return "more", id(x)
        self.depth += 1
        try:
            return self._inside(x, y, kind)
        finally:
            self.depth -= 1

    def _all(self, found: Collection[Any], y: str) -> tuple[Any, ...]:
        """The items of what the guard knows as `y`, of which there are as many."""
        if len(found) > SEVERAL and all(map(kinds.is_a_constant, found)):
            self.guard.require(f"{self.guard.constant(kinds.are_same)}({y}, {self.guard.constant(tuple(found))})")
            return tuple(map(kinds.constant_key, found))
        return self._each(found, self.guard.unpack(y, len(found)))

    def _each(self, found: Iterable[Any], names: Iterable[str]) -> tuple[Any, ...]:
        return tuple([self.at(x, y) for x, y in zip(found, names, strict=True)])

    def _met(self, x: Any, y: str) -> Any:
        """An object that was met before."""
        self.guard.require(f"{y} is {self.names[id(x)]}")
        return "met", list(self.names).index(id(x))

    def _is(self, x: Any, y: str) -> Any:
        """The very same object."""
        self.guard.require(f"{y} is {self.guard.constant(x)}")
        return "object", kinds.Same(x)

    def _plain(self, x: Any, y: str) -> Any:
        guard = self.guard
        known, like = guard.constant(x), guard.constant(kinds.is_same)
        guard.require(f"{y} is {known} or {like}({y}, {known})")
        return kinds.constant_key(x)

    def _tensor(self, x: Tensor, y: str) -> Any:
        self.tensors.append(x)
        raw = self.guard.let(f"{y}.raw")
        shared = self._met(x.raw, raw) if id(x.raw) in self.names else None  # a plan knows tensors by their memory
        self.names.setdefault(id(x.raw), raw)
        form = self._form(x.raw, raw)
        contents = None if x.raw.dtype.kind == "f" else self._contents(x.raw, raw)
        self.guard.require(f"{y}.node is {'' if x.node is None else 'not '}None")
        return "tensor", *form, x.node is None, contents, shared

    def _form(self, x: Array, y: str) -> tuple[Any, ...]:
        shape, dtype = self.guard.constant(x.shape), self.guard.constant(x.dtype)
        self.guard.require(f"{y}.shape == {shape}", f"{y}.dtype is {dtype} or {y}.dtype == {dtype}")
        return x.shape, x.dtype

    def _contents(self, x: Array, y: str) -> int:
        if x.nbytes > LARGE or x.dtype.hasobject:
            self.complete = False
            return 0
        contents = kinds.hashed(x)
        self.guard.require(f"{self.guard.constant(kinds.hashed)}({y}) == {self.guard.constant(contents)}")
        return contents

    def _inside(self, x: Any, y: str, kind: Any) -> Any:
        guard = self.guard
        if issubclass(kind, tuple | list | dict):
            key = self._container(x, y)
            held = getattr(x, "__dict__", None)
            if held is not None and kind.__flags__ & kinds.HEAP_TYPE:  # of a class that a user derived from these
                key = *key, self._members(held, guard.let(f"{y}.__dict__")), self._class(cast(Any, kind))
            return kind, *key
        if kind is types.FunctionType:
            return self._function(x, y)
        if kind is slice:
            return self._parts(kind, x, y, "start", "stop", "step")
        if kind is types.MethodType:
            return self._parts("method", x, y, "__func__", "__self__")
        if isinstance(x, types.BuiltinFunctionType) and not isinstance(x.__self__, types.ModuleType | type | None):
            return self._parts("method", x, y, "__name__", "__self__")
        if isinstance(x, partial):
            return self._parts("partial", x, y, "func", "args", "keywords")
        if isinstance(x, property):
            return self._parts("property", x, y, "fget")
        if isinstance(x, cached_property):
            return self._parts("property", x, y, "func")
        if isinstance(x, staticmethod | classmethod):
            return self._parts(kind, x, y, "__func__")
        if isinstance(x, type) and not kinds.is_a_library(x):
            return *self._is(x, y), self._class(x)
        if is_a_generator(x):
            self.complete = False
            return "generator", id(x)
        # One of ours is known by itself alone: drawing from it in a step is refused by the trace.
        fixed = isinstance(x, type | types.BuiltinFunctionType | np.ufunc | Generator | Enum)
        if fixed or kind.__module__ == "functools":
            return self._is(x, y)
        if hasattr(x, "__dict__") and kinds.is_plain(kind):  # what it holds, and what its methods reach
            members = self._members(cast("dict[str, Any]", vars(x)), guard.let(f"{y}.__dict__"))
            return kind, members, self._class(kind)
        self.complete = False
        return "unknown", id(x)

    def _container(self, x: Any, y: str) -> tuple[Any, ...]:
        """The items of a list, a tuple or a dict."""
        guard = self.guard
        if not isinstance(x, dict):
            guard.require(f"len({y}) == {len(x)}")
            return (self._all(cast("list[Any]", x), y),)
        held = cast("dict[Any, Any]", x)
        if self.settling is not None:
            self.settling.dicts.append((held, tuple(held)))
            self.settling.look_up(held, held)
        if set(map(type, held)) <= {str}:
            return self._members(held, y)
        guard.require(f"len({y}) == {len(held)}")
        return self._all(held, y), self._all(held.values(), f"{y}.values()")

    def _parts(self, what: Any, x: Any, y: str, *names: str) -> Any:
        """Attributes, of which it is all made."""
        return what, *self._each([getattr(x, name) for name in names], [self.guard.let(f"{y}.{n}") for n in names])

    def _members(self, held: dict[str, Any], y: str) -> tuple[Any, Any]:
        """A dict of names."""
        guard, names = self.guard, tuple(held)
        guard.require(f"tuple({y}) == {guard.constant(names)}")
        return names, self._all(held.values(), f"{y}.values()")

    def _class(self, kind: type) -> Any:
        """What a class that a user wrote has, but for what Python gives it."""
        guard, found = self.guard, list[Any]()
        guard.require(f"{guard.constant(kind)}.__mro__ is {guard.constant(kind.__mro__)}")
        for base in kind.__mro__:
            if kinds.is_a_library(base):
                continue
            members = vars(base)
            y = guard.constant(members)
            guard.require(f"len({y}) == {len(members)}")
            names = kinds.written_in(members)
            found.append((*names, *[self._of_class(members[n], guard.let(f"{y}.get({n!r})")) for n in names]))
        return tuple(found)

    def _of_class(self, x: Any, y: str) -> Any:
        """A member of a class: of kinds that are not known, the very same object."""
        was, key = self.complete, self.at(x, y)
        if key[0] != "unknown":
            return key
        self.complete = was
        return self._is(x, y)

    def _looked_up(self, held: dict[str, Any], y: str, names: Iterable[str], code: types.CodeType) -> tuple[Any, Any]:
        """What names mean in the dict that the guard knows as `y`, of those that mean something there."""
        guard, there = self.guard, [name for name in names if name in held]
        guard.require(*[f"{name!r} not in {y}" for name in names if name not in held])
        absent = guard.constant(_ABSENT)
        values = [guard.let(f"{y}.get({name!r}, {absent})") for name in there]
        return tuple(there), tuple([self._named(held[name], y, code) for name, y in zip(there, values, strict=True)])

    def _function(self, f: types.FunctionType, y: str) -> Any:
        guard = self.guard
        if isinstance(getattr(f, "op", None), Op):  # the code of many ops is the same
            return self._is(f, y)
        if self.settling is not None:
            if f.__closure__ or f.__kwdefaults__ or f.__dict__:
                raise _Unsettled
            self.settling.functions.append((f, f.__code__, f.__defaults__))
        code, held = f.__code__, guard.constant(f.__globals__)
        guard.require(f"{y}.__code__ is {guard.constant(code)}", f"{y}.__globals__ is {held}")
        guard.require(f"{y}.__module__ == {guard.constant(f.__module__)}")
        inside = self._cells(f, y)
        rest = self._parts("function", f, y, "__defaults__", "__kwdefaults__")
        if f.__dict__:
            rest = *rest, self._members(f.__dict__, guard.let(f"{y}.__dict__"))
        else:
            guard.require(f"not {y}.__dict__")
        names = () if kinds.is_ours(f) else kinds.globals_of(code)
        if self.settling is not None:
            self.settling.look_up(f.__globals__, names)
        return code, inside, rest, self._looked_up(f.__globals__, held, names, code)

    def _cells(self, f: types.FunctionType, y: str) -> Any:
        """What the variables of a function that are those of one around it hold, if anything."""
        guard, cells = self.guard, f.__closure__ or ()
        found: list[Any] = []
        for cell, name in zip(cells, guard.unpack(f"{y}.__closure__", len(cells)), strict=True):
            if kinds.is_empty(cell):
                guard.require(f"{guard.constant(kinds.is_empty)}({name})")
                found.append(_ABSENT)
            else:
                found.append(self._named(cell.cell_contents, guard.let(f"{name}.cell_contents"), f.__code__))
        return tuple(found)

    def _named(self, x: Any, y: str, code: types.CodeType) -> Any:
        """A variable from outside of a function; of a module, what the function may take from it."""
        if not isinstance(x, types.ModuleType):
            return self.at(x, y)
        key = self._is(x, y)
        if x.__name__.split(".")[0] in (kinds.PACKAGE, "numpy", "math") or (x, code) in self.modules:
            return key
        self.modules.add((x, code))
        held, names = vars(x), kinds.names_in(code)
        if self.settling is not None:
            self.settling.look_up(held, names)
        return key, self._looked_up(held, self.guard.constant(held), names, code)


# ---- functions that reach only functions and constants --------------------------------------------------------------
#
# Most of what a step reaches are functions that stand in modules, and stay as they are. Where such a function reaches
# no tensor and nothing that can be written into unseen, it is enough to see that its names still mean the same objects.

_FIXED = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, tuple, dict)
_counter = itertools.count()
_numbers: dict[Any, int] = {}


def _number(key: Any) -> int:
    """The same for equal keys, and much quicker to compare."""
    if len(_numbers) > REMEMBERED:
        _numbers.clear()  # what was described then is described anew, by other numbers
    return _numbers.setdefault(key, next(_counter))


class _Unsettled(Exception):
    """The function reaches what may change."""


class _Settled:
    """All that a function without a closure reaches, and how to see that it is still so."""

    def __init__(self) -> None:
        self.number = -1  # the same for functions that do the same
        self.names: list[tuple[Any, Any, Any]] = []  # a dict, a key in it, and what stands there
        self.dicts: list[tuple[Any, tuple[Any, ...]]] = []  # of which all counts, and their keys
        self.functions: list[tuple[types.FunctionType, types.CodeType, Any]] = []

    def look_up(self, held: Any, names: Iterable[Any]) -> None:
        """Note what names mean."""
        self.names += [(held, name, held.get(name, _ABSENT)) for name in names]

    def holds(self) -> bool:
        for held, name, expected in self.names:
            if held.get(name, _ABSENT) is not expected:
                return False
        for held, keys in self.dicts:
            if len(held) != len(keys) or not all(map(is_, held, keys)):
                return False
        for f, code, defaults in self.functions:
            if f.__code__ is not code or f.__defaults__ is not defaults or f.__kwdefaults__ is not None or f.__dict__:
                return False
        return True

    @property
    def may_change(self) -> bool:
        """Whether there is anything to see to: an op is what it is."""
        return bool(self.names or self.dicts or self.functions)

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
    elif len(_settled_functions) > REMEMBERED:
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
