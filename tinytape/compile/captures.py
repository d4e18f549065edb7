"""What a function takes from outside: found by looking through its closure, so that a trace can be used again.

A trace holds for every call in which all that the function can reach is the same, but for the floats in its tensors.
Integers, which may be positions, and NumPy's arrays, which a function may compute with unseen, are a part of it.
`look_through` describes what can be reached, and lists the tensors among it in a fixed order.
"""

from __future__ import annotations

import dis
import itertools
import types
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from operator import is_
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np

from ..engine.op import Op
from ..engine.tensor import Tensor
from ..engine.tree import Array, is_array
from ..random import Generator

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
    alike : callable, optional
        Whether another function, or the same one later, has the same key. None where not everything was understood.
    """

    key: Any
    tensors: list[Any]
    complete: bool
    alike: _Alike | None = None

    def still_of(self, f: Callable[..., Any]) -> bool:
        """Whether f still reaches what was found, and the very same tensors."""
        met = _Met()
        if self.alike is None:
            return True
        return self.alike(f, met) and len(met.tensors) == len(self.tensors) and all(map(is_, met.tensors, self.tensors))


def look_through(f: Callable[..., Any]) -> Captures:
    """Describe a function and all that it can reach; one that has an attribute `captures` does so itself."""
    known: Captures | None = getattr(f, "captures", None)
    if known is not None:
        return known
    code = getattr(f, "__code__", f.__class__)
    patterns = _patterns.get(code, ())
    for number, alike in patterns:
        met = _Met()
        if alike(f, met):
            if number != patterns[0][0]:  # the last one first; by another tuple, as other threads may be reading this
                _patterns[code] = (number, alike), *[known for known in patterns if known[0] != number]
            return Captures(number, met.tensors, True, alike)
    seen = _Look()
    key, alike = seen.at(f)
    if not seen.complete:
        return Captures((key,), seen.tensors, False)
    number = _number(key)
    if len(_patterns) > MOST:
        _patterns.clear()
    _patterns[code] = ((number, alike), *patterns)[:PATTERNS]
    return Captures(number, seen.tensors, True, alike)


class _Met:
    """What has been met on the way, in order."""

    __slots__ = ("numbers", "tensors")

    def __init__(self) -> None:
        self.numbers: dict[int, int] = {}  # by id
        self.tensors: list[Any] = []

    def first(self, x: Any) -> bool:
        """Whether an object is met for the first time."""
        numbers = self.numbers
        if id(x) in numbers:
            return False
        numbers[id(x)] = len(numbers)
        return True


# Whether something is like what was looked at, by whoever looked. To describe a function takes several times as long
# as to see that it is like one described before.
_Alike: TypeAlias = Callable[[Any, _Met], bool]
_Seen: TypeAlias = tuple[Any, _Alike]  # a part of the key, and what to look for another time
_patterns: dict[Any, tuple[tuple[int, _Alike], ...]] = {}  # by code
PATTERNS = 4  # of each code
_ABSENT = object()


def _is(x: Any) -> _Alike:
    return lambda y, met: y is x


def _settles(x: types.FunctionType, settled: _Settled, y: Any, met: _Met) -> bool:
    if y is x and settled.holds():
        return True
    if y.__class__ is not types.FunctionType or y.__closure__ is not None:
        return False
    found = _settled(y)
    return found is not None and found.number == settled.number


def _all_alike(checks: Sequence[_Alike], found: Iterable[Any], met: _Met) -> bool:
    for alike, y in zip(checks, found):  # noqa: B905, SIM110 - of equal lengths; a generator takes twice as long
        if not alike(y, met):
            return False
    return True


def _apart(seen: Iterable[_Seen]) -> tuple[tuple[Any, ...], list[_Alike]]:
    """The keys and the checks of several."""
    pairs = list(seen)
    return tuple([key for key, _ in pairs]), [alike for _, alike in pairs]


class _Look(_Met):
    def __init__(self, settling: _Settled | None = None) -> None:
        super().__init__()
        self.settling = settling
        self.alive: list[Any] = []  # an id is an object's as long as it lives
        self.complete = True
        self.depth = 0
        self.modules: set[tuple[types.ModuleType, types.CodeType]] = set()

    def at(self, x: Any) -> _Seen:
        kind = x.__class__
        if kind in _PLAIN or issubclass(kind, np.generic):
            if kind is float:  # -0.0 is another number, NaN is the same
                text = repr(x)
                return (kind, text), lambda y, met: y is x or (y.__class__ is float and repr(y) == text)
            return (kind, x), lambda y, met: y is x or (y.__class__ is kind and bool(y == x))
        if id(x) in self.numbers:
            number = self.numbers[id(x)]
            return ("met", number), lambda y, met: met.numbers.get(id(y)) == number
        if kind is types.FunctionType and x.__closure__ is None and self.settling is None:
            settled = _settled(x)
            if settled is not None:
                return ("settled", settled.number), partial(_settles, x, settled)
        if self.settling is not None and not (kind in _FIXED or isinstance(x, type | np.ufunc)):
            raise _Unsettled
        self.first(x)
        self.alive.append(x)
        if isinstance(x, Tensor):
            return self._tensor(x)
        if is_array(x):
            return self._array(x)
        if len(self.alive) > MOST or self.depth > DEEPEST:
            self.complete = False
            return ("more", id(x)), _is(x)
        self.depth += 1
        try:
            key, inside = self._inside(x, kind)
        finally:
            self.depth -= 1

        def alike(y: Any, met: _Met) -> bool:
            numbers = met.numbers  # `first`, written out here and for tensors: they are most of what is met
            if y.__class__ is not kind or id(y) in numbers:
                return False
            numbers[id(y)] = len(numbers)
            return inside(y, met)

        return key, alike

    def _tensor(self, x: Tensor) -> _Seen:
        self.tensors.append(x)
        kind, contents = x.__class__, None if x.raw.dtype.kind == "f" else self._contents(x.raw)
        form = shape, char, constant = x.raw.shape, x.raw.dtype.char, x.node is None

        def alike(y: Any, met: _Met) -> bool:
            numbers = met.numbers
            if y.__class__ is not kind or id(y) in numbers:
                return False
            numbers[id(y)] = len(numbers)
            met.tensors.append(y)
            raw = y.raw
            if raw.shape != shape or raw.dtype.char != char or (y.node is None) is not constant:
                return False
            return contents is None or _hashed(raw) == contents

        return ("tensor", *form, contents), alike

    def _array(self, x: Array) -> _Seen:
        self.tensors.append(x)
        kind, shape, char, contents = x.__class__, x.shape, x.dtype.char, self._contents(x)

        def alike(y: Any, met: _Met) -> bool:
            if y.__class__ is not kind or not met.first(y):
                return False
            met.tensors.append(y)
            return y.shape == shape and y.dtype.char == char and _hashed(y) == contents

        return ("array", shape, char, contents), alike

    def _inside(self, x: Any, kind: Any) -> _Seen:
        if isinstance(x, tuple | list):
            keys, checks = _apart(self.at(item) for item in cast("list[Any]", x))
            return (kind, keys), lambda y, met: len(y) == len(checks) and _all_alike(checks, y, met)
        if isinstance(x, dict):
            held = cast("dict[Any, Any]", x)
            if self.settling is not None:
                self.settling.sizes.append((held, len(held)))
                self.settling.look_up(held, held)
            if set(map(type, held)) <= {str}:
                names = tuple(held)
                keys, checks = _apart(map(self.at, held.values()))
                return (kind, names, keys), lambda y, met: tuple(y) == names and _all_alike(checks, y.values(), met)
            keys, checks = _apart(self.at(item) for pair in held.items() for item in pair)

            def alike(y: Any, met: _Met) -> bool:
                return 2 * len(y) == len(checks) and _all_alike(checks, itertools.chain.from_iterable(y.items()), met)

            return (kind, keys), alike
        if kind is types.FunctionType:
            return self._function(x)
        if kind is types.MethodType:
            return self._parts("method", x, "__func__", "__self__")
        if isinstance(x, partial):
            return self._parts("partial", x, "func", "args", "keywords")
        # A generator is known by itself alone: drawing from it in a step is refused by the trace.
        if isinstance(x, type | types.BuiltinFunctionType | np.ufunc | Generator) or kind.__module__ == "functools":
            return ("object", x), _is(x)
        if isinstance(x, property):
            return self._parts("property", x, "fget")
        if isinstance(x, staticmethod | classmethod):
            return self._parts(kind, x, "__func__")
        if hasattr(x, "__dict__") and _is_plain(kind):  # what it holds, and what its methods reach
            members, methods = self._members(x), self._class(kind)
            return (kind, members[0], methods[0]), lambda y, met: members[1](y, met) and methods[1](y, met)
        self.complete = False
        return ("unknown", id(x)), _is(x)

    def _parts(self, what: Any, x: Any, *names: str) -> _Seen:
        """Attributes, of which it is all made."""
        keys, checks = _apart(self.at(getattr(x, name)) for name in names)
        return (what, *keys), lambda y, met: _all_alike(checks, [getattr(y, name) for name in names], met)

    def _contents(self, array: Array) -> int:
        if array.nbytes > LARGE:
            self.complete = False
            return 0
        return _hashed(array)

    def _members(self, x: Any) -> _Seen:
        held = cast("dict[str, Any]", vars(x))
        names = tuple(held)
        keys, checks = _apart(self.at(value) for value in held.values())

        def alike(y: Any, met: _Met) -> bool:
            found = cast("dict[str, Any]", vars(y))
            return tuple(found) == names and _all_alike(checks, found.values(), met)

        return (names, keys), alike

    def _class(self, kind: type) -> _Seen:
        """What a class that a user wrote has."""
        held = [vars(base) for base in kind.__mro__ if base is not object and not _is_ours(base)]
        sizes = [len(members) for members in held]
        places = [(m, name) for m in held for name in m if name == "__call__" or name[:2] != "__"]
        keys, checks = _apart(self.at(members[name]) for members, name in places)

        def alike(y: Any, met: _Met) -> bool:
            found = [members.get(name, _ABSENT) for members, name in places]
            return [len(members) for members in held] == sizes and _all_alike(checks, found, met)

        return (tuple([name for _, name in places]), keys), alike

    def _function(self, f: types.FunctionType) -> _Seen:
        if isinstance(getattr(f, "op", None), Op):  # the code of many ops is the same
            return ("op", f), _is(f)
        if self.settling is not None:
            if f.__closure__ or f.__kwdefaults__:
                raise _Unsettled
            self.settling.functions.append((f, f.__code__, f.__defaults__))
        code, module, held = f.__code__, f.__module__, f.__globals__
        inside = _apart(self._named(value, code) for value in _cells_of(f))
        defaults = _apart([self.at(f.__defaults__), self.at(f.__kwdefaults__)])
        names = () if _is_ours(f) else _globals_of(code)
        if self.settling is not None:
            self.settling.look_up(held, names)
        there = [name for name in names if name in held]
        reached = _apart(self._named(held[name], code) for name in there)

        def alike(y: Any, met: _Met) -> bool:
            if y.__code__ is not code or y.__globals__ is not held or y.__module__ != module:
                return False
            cells = _cells_of(y)
            return (
                len(cells) == len(inside[1])
                and _all_alike(inside[1], cells, met)
                and _all_alike(defaults[1], (y.__defaults__, y.__kwdefaults__), met)
                and [name for name in names if name in held] == there
                and _all_alike(reached[1], [held[name] for name in there], met)
            )

        return (code, inside[0], defaults[0], tuple(there), reached[0]), alike

    def _named(self, x: Any, code: types.CodeType) -> _Seen:
        """A variable from outside of a function; of a module, what the function may take from it."""
        if not isinstance(x, types.ModuleType):
            return self.at(x)
        if x.__name__.split(".")[0] in (_PACKAGE, "numpy", "math") or (x, code) in self.modules:
            return ("module", x.__name__), _is(x)
        self.modules.add((x, code))
        held, names = vars(x), _names_in(code)
        if self.settling is not None:
            self.settling.look_up(held, names)
        there = [name for name in names if name in held]
        keys, checks = _apart(self._named(held[name], code) for name in there)

        def alike(y: Any, met: _Met) -> bool:
            if y is not x or [name for name in names if name in held] != there:
                return False
            return _all_alike(checks, [held[name] for name in there], met)

        return ("module", x.__name__, tuple(there), keys), alike


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
        key, _ = look.at(f)
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


def _cells_of(f: Any) -> list[Any]:
    """What the variables of a function that are those of one around it hold, if anything."""
    found: list[Any] = []
    for cell in f.__closure__ or ():
        try:  # noqa: SIM105 - a context manager takes five times as long
            found.append(cell.cell_contents)
        except ValueError:  # not assigned yet
            pass
    return found
