"""Kinds of objects that a function may reach, and when two of a kind are the same."""

from __future__ import annotations

import dis
import sys
import types
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from ..engine.tree import Array

__all__ = [
    "HEAP_TYPE", "PACKAGE", "Same", "are_same", "constant_key", "globals_of", "hashed", "is_a_constant",
    "is_a_library", "is_empty", "is_ours", "is_plain", "is_same", "names_in", "written_in",
]  # fmt: skip

PACKAGE = __name__.split(".", 1)[0]
PLAIN = (type(None), bool, int, float, complex, str, bytes, types.EllipsisType, range)
INEXACT = (float, complex, np.inexact)  # -0.0 equals 0.0 and is another number, NaN equals nothing


HEAP_TYPE = 1 << 9  # of a type's flags: it was made while running, as by a class statement

# ---- values ---------------------------------------------------------------------------------------------------------


def hashed(array: Array) -> int:
    """What arrays of the same bytes have in common."""
    return hash(array.tobytes())


class Same:
    """A key that only the same object has, whatever that says of itself."""

    __slots__ = ("held",)

    def __init__(self, held: Any) -> None:
        self.held = held

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Same) and other.held is self.held

    def __hash__(self) -> int:
        return id(self.held)


def is_a_constant(x: Any) -> bool:
    """Whether it is a value that nobody can write into."""
    return x.__class__ in PLAIN or isinstance(x, np.generic | np.dtype)


def constant_key(x: Any) -> Any:
    """Equal for constants that are the same."""
    kind: Any = x.__class__
    if issubclass(kind, INEXACT):
        return kind, repr(x)
    return (kind, x.start, x.stop, x.step) if kind is range else (kind, x)


def is_same(y: Any, x: Any) -> bool:
    """Whether `y` is the constant that `x` is."""
    return y.__class__ is x.__class__ and constant_key(y) == constant_key(x)


def are_same(found: Iterable[Any], constants: Sequence[Any]) -> bool:
    """Whether those found, which are as many, are these constants."""
    return all(y is x or is_same(y, x) for y, x in zip(found, constants, strict=True))


# ---- classes --------------------------------------------------------------------------------------------------------


def is_ours(x: Any) -> bool:
    """Whether a class or a function is of this package."""
    module = x.__module__ or ""
    return module == PACKAGE or module.startswith(PACKAGE + ".")


def is_a_library(x: Any) -> bool:
    """Whether it is a class of Python's, of NumPy's or of ours: these stay as they are."""
    if not isinstance(x, type):
        return False
    module = str(x.__module__).split(".", 1)[0]
    of_python = module in sys.stdlib_module_names and module != "__main__"
    return of_python or module in (PACKAGE, "numpy") or not x.__flags__ & HEAP_TYPE


_FUNCTIONS: tuple[type, ...] = (types.FunctionType, staticmethod, classmethod, property)
_MAKERS = {"__dataclass_fields__", "__attrs_attrs__", "_fields"}  # of classes whose usual methods were made for them
_MADE = {
    "__init__", "__new__", "__repr__", "__eq__", "__ne__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__",
    "__replace__", "__getnewargs__", "__setattr__", "__delattr__", "__getstate__", "__setstate__",
}  # fmt: skip


def written_in(members: Mapping[str, Any]) -> list[str]:
    """The names of a class's members, but for what Python or a decorator adds to a class."""
    made = _MADE if _MAKERS.intersection(members) else ()
    return [n for n, x in members.items() if n[:2] != "__" or (isinstance(x, _FUNCTIONS) and n not in made)]


@lru_cache(maxsize=1024)
def is_plain(kind: type) -> bool:
    """Whether a class is written in Python and keeps what it holds in ``__dict__``: then that is all there is."""
    bases = [base for base in kind.__mro__ if base is not object]
    written = all(base.__flags__ & HEAP_TYPE and not vars(base).get("__slots__") for base in bases)
    looked_up = any(name in vars(base) for base in bases for name in ("__getattr__", "__getattribute__"))
    return written and not looked_up


# ---- code -----------------------------------------------------------------------------------------------------------


@lru_cache(maxsize=4096)
def names_in(code: types.CodeType) -> tuple[str, ...]:
    """All names, of attributes too, that the code or a function inside it uses."""
    names = dict.fromkeys(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(names_in(constant)))
    return tuple(names)


@lru_cache(maxsize=4096)
def globals_of(code: types.CodeType) -> tuple[str, ...]:
    """Names of global variables that the code, or a function inside it, looks up."""
    names = dict.fromkeys(i.argval for i in dis.get_instructions(code) if i.opname in ("LOAD_GLOBAL", "LOAD_NAME"))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names.update(dict.fromkeys(globals_of(constant)))
    return tuple(names)


def is_empty(cell: types.CellType) -> bool:
    """Whether a variable is not assigned yet."""
    try:
        cell.cell_contents  # noqa: B018 - it raises
    except ValueError:
        return True
    return False
