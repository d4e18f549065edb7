"""What a function takes from outside: found by looking through its closure, so that a trace can be used again.

A trace holds for every call in which all that the function can reach is the same, but for the floats in its tensors.
Integers, which may be positions, and NumPy's arrays, which a function may compute with unseen, are a part of it.
`look_through` describes what can be reached, and lists the tensors among it in a fixed order.
"""

from __future__ import annotations

import dis
import itertools
import types
from collections.abc import Callable, Iterable
from functools import lru_cache, partial
from typing import Any, NamedTuple, cast

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
    key : tuple
        Equal for two functions that do the same with the tensors they take from outside.
    tensors : list of Tensor or array
        Those tensors.
    complete : bool
        Whether everything was understood. If not, the function must be traced each time.
    """

    key: tuple[Any, ...]
    tensors: list[Any]
    complete: bool


def look_through(f: Callable[..., Any]) -> Captures:
    """Describe a function and all that it can reach; one that has an attribute `captures` does so itself."""
    known: Captures | None = getattr(f, "captures", None)
    if known is not None:
        return known
    seen = _Look()
    key = seen.at(f)
    return Captures((key,), seen.tensors, seen.complete)


class _Look:
    def __init__(self, settling: _Settled | None = None) -> None:
        self.settling = settling
        self.tensors: list[Any] = []
        self.complete = True
        self.depth = 0
        self.met: dict[int, int] = {}
        self.modules: set[tuple[types.ModuleType, types.CodeType]] = set()
        self.alive: list[Any] = []  # an id is an object's as long as it lives

    def at(self, x: Any) -> Any:
        kind = x.__class__
        if kind in _PLAIN or issubclass(kind, np.generic):
            return kind, repr(x) if kind is float else x
        if id(x) in self.met:
            return "met", self.met[id(x)]
        if kind is types.FunctionType and x.__closure__ is None and self.settling is None:
            settled = _settled(x)
            if settled is not None:
                return "settled", settled
        if self.settling is not None and not (kind in _FIXED or isinstance(x, type | np.ufunc)):
            raise _Unsettled
        if isinstance(x, Tensor):
            self._meet(x)
            self.tensors.append(x)
            contents = None if x.raw.dtype.kind == "f" else self._contents(x.raw)
            return "tensor", x.raw.shape, x.raw.dtype.char, x.node is None, contents
        if is_array(x):
            self._meet(x)
            self.tensors.append(x)
            return "array", x.shape, x.dtype.char, self._contents(x)
        self._meet(x)
        if len(self.met) > MOST or self.depth > DEEPEST:
            self.complete = False
            return "more", id(x)
        self.depth += 1
        try:
            return self._inside(x, kind)
        finally:
            self.depth -= 1

    def _inside(self, x: Any, kind: Any) -> Any:
        if isinstance(x, tuple | list):
            return kind, tuple([self.at(item) for item in cast("list[Any]", x)])
        if isinstance(x, dict):
            held = cast("dict[Any, Any]", x)
            if self.settling is not None:
                self.settling.sizes.append((held, len(held)))
                self.settling.look_up(held, held)
            return kind, tuple([(self.at(k), self.at(v)) for k, v in held.items()])
        if kind is types.FunctionType:
            return self._function(x)
        if kind is types.MethodType:
            return "method", self.at(x.__func__), self.at(x.__self__)
        if isinstance(x, partial):
            found = cast("partial[Any]", x)
            return "partial", self.at(found.func), self.at(found.args), self.at(found.keywords)
        # A generator is known by itself alone: drawing from it in a step is refused by the trace.
        if isinstance(x, type | types.BuiltinFunctionType | np.ufunc | Generator) or kind.__module__ == "functools":
            return "object", x
        if isinstance(x, property):
            return "property", self.at(x.fget)
        if isinstance(x, staticmethod | classmethod):
            return kind, self.at(cast("staticmethod[..., Any]", x).__func__)
        if hasattr(x, "__dict__") and _is_plain(kind):  # what it holds, and what its methods reach
            return kind, self._members(x), self._class(kind)
        self.complete = False
        return "unknown", id(x)

    def _contents(self, array: Array) -> int:
        if array.nbytes > LARGE:
            self.complete = False
        return hash(array.tobytes()) if array.nbytes <= LARGE else 0

    def _meet(self, x: Any) -> None:
        self.met[id(x)] = len(self.met)
        self.alive.append(x)

    def _members(self, module: Any) -> Any:
        held = cast("dict[str, Any]", vars(module))
        return tuple([(name, self.at(value)) for name, value in held.items()])

    def _class(self, kind: type) -> Any:
        users = [base for base in kind.__mro__ if base is not object and not _is_ours(base)]
        members = [item for base in users for item in vars(base).items()]
        return tuple([(name, self.at(x)) for name, x in members if name == "__call__" or name[:2] != "__"])

    def _function(self, f: types.FunctionType) -> Any:
        if isinstance(getattr(f, "op", None), Op):  # the code of many ops is the same
            return "op", f
        if self.settling is not None:
            if f.__closure__ or f.__kwdefaults__:
                raise _Unsettled
            self.settling.functions.append((f, f.__code__, f.__defaults__))
        cells = [cell.cell_contents for cell in f.__closure__ or () if _is_filled(cell)]
        inside = tuple([self._named(value, f.__code__) for value in cells])
        defaults = self.at(f.__defaults__), self.at(f.__kwdefaults__)
        if _is_ours(f):
            return f.__code__, inside, defaults
        names = _globals_of(f.__code__)
        if self.settling is not None:
            self.settling.look_up(f.__globals__, names)
        reached = tuple([(n, self._named(f.__globals__[n], f.__code__)) for n in names if n in f.__globals__])
        return f.__code__, inside, defaults, reached

    def _named(self, x: Any, code: types.CodeType) -> Any:
        """A variable from outside of a function; of a module, what the function may take from it."""
        if not isinstance(x, types.ModuleType):
            return self.at(x)
        if x.__name__.split(".")[0] in (_PACKAGE, "numpy", "math"):
            return "module", x.__name__
        if (x, code) in self.modules:
            return "module", x.__name__
        self.modules.add((x, code))
        held = vars(x)
        if self.settling is not None:
            self.settling.look_up(held, _names_in(code))
        return "module", x.__name__, tuple([(n, self._named(held[n], code)) for n in _names_in(code) if n in held])


# ---- functions that reach only functions and constants --------------------------------------------------------------
#
# Most of what a step reaches are functions that stand in modules, and stay as they are. Where such a function reaches
# no tensor and nothing that can be written into unseen, it is enough to see that its names still mean the same objects.

_FIXED = (types.FunctionType, types.BuiltinFunctionType, types.ModuleType, tuple, dict)
_counter = itertools.count()
_numbers: dict[Any, int] = {}


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


def _settled(f: types.FunctionType) -> int | None:
    """A number for all that a function without a closure is and reaches; None if that may change unseen."""
    if f in _settled_functions:
        found = _settled_functions[f]
        if found is None:
            return None
        if found.holds():
            return found.number
    elif len(_settled_functions) > MOST:
        _settled_functions.clear()
    settled = _Settled()
    look = _Look(settled)
    try:
        key = look.at(f)
    except _Unsettled:
        look.complete = False
    else:
        if len(_numbers) > MOST:
            _numbers.clear()  # what was described then is described anew, by other numbers
        settled.number = _numbers.setdefault(key, next(_counter))
    _settled_functions[f] = settled if look.complete else None
    return settled.number if look.complete else None


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


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - asked for its error
    except ValueError:
        return False
    return True
