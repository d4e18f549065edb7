"""Calling compiled kernels without Numba, which takes longer to import than most of them run.

A kernel whose arguments are all integers (addresses, lengths, strides) can be a plain C function. Its object code,
with everything in it that it calls, is kept in the folder; the next process hands that to LLVM's loader and calls it
by `ctypes`, without the GIL. Numba is imported only where something has to be compiled, and calls the kernel itself
where anything about this is not as expected.
"""

# pyright: basic

from __future__ import annotations

import ctypes
import importlib
import json
import os
import threading
from collections.abc import Callable, Iterable, Mapping
from functools import cache, partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import llvmlite.binding as llvm
import numpy as np

from . import folder
from .fingerprint import fingerprint

__all__ = ["Code", "Functions", "compilations", "count", "function", "functions", "module", "share", "symbol"]

Functions = dict[str, Callable[..., int]]

_compiled = 0
_engines: list[Any] = []  # machine code goes with its engine
_found: dict[str, Any] = {}
_making = threading.RLock()  # held by whoever loads or compiles


def compilations() -> int:
    """How many kernels this process has compiled; those that were found on disk do not count."""
    return _compiled


def count() -> None:
    """Note that one was compiled."""
    global _compiled
    _compiled += 1


class Code(NamedTuple):
    """Object code.

    Attributes
    ----------
    symbols : dict
        Of each function, the symbol.
    needs : list of str
        Symbols that the code takes from elsewhere. LLVM ends the process at one that it does not find.
    text : bytes
        The object file.
    lasting : bool
        Whether other processes may use it.
    """

    symbols: dict[str, str]
    needs: list[str]
    text: bytes
    lasting: bool = True

    def packed(self) -> bytes:
        """As a file."""
        return json.dumps([self.symbols, self.needs]).encode() + b"\n" + self.text

    @staticmethod
    def unpacked(data: bytes) -> Code:
        """What `packed` made."""
        head, _, text = data.partition(b"\n")
        symbols, needs = json.loads(head)
        return Code(symbols, needs, text)


def module(name: str, **parameters: int) -> SimpleNamespace:
    """Functions of a module of this package, which is imported only to compile them.

    Parameters
    ----------
    name : str
        The module.
    **parameters
        Of each function, how many integers it takes.
    """
    return SimpleNamespace(**functions(name, parameters, partial(_names_of, name)))


def function(module: str, name: str, parameters: int, kind: str) -> Callable[..., int]:
    """One function of a module of this package, for a kind of float, of which it takes a zero first."""
    return functions(f"{module}.{name}.{kind}", {name: parameters}, partial(_names_of, module), kind)[name]


def _names_of(module: str) -> Mapping[str, Any]:
    return vars(importlib.import_module(f"{__package__}.{module}"))


def functions(
    name: str, parameters: Mapping[str, int], origin: Callable[[], Mapping[str, Any]], kind: str = ""
) -> Functions:
    """Kernels as C functions: from the folder, or compiled.

    They take integers or, for an address, bytes, and return an integer: 0 if they return nothing. They must not raise:
    nobody would hear of it.

    Parameters
    ----------
    name : str
        Names them and, with `fingerprint`, their text.
    parameters : mapping
        Of each function, how many it takes.
    origin : callable
        Gives the functions as Numba's dispatchers.
    kind : str, optional
        "float32" or "float64", if the dispatchers take a zero of that kind before the integers.
    """

    def compiled() -> Code:
        from .objects import of_functions

        return of_functions(origin(), parameters, kind)

    def bound() -> Functions:
        found = _addresses(name, compiled, parameters)
        if found is None:
            dispatchers, zero = origin(), [np.dtype(kind).type(0)] if kind else []
            return {function: partial(_dispatched, dispatchers[function], *zero) for function in parameters}
        return {function: _prototype(n)(found[function]) for function, n in parameters.items()}

    return _once(name, bound)


def share(name: str, symbols: Iterable[str], compiled: Callable[[], Code]) -> None:
    """Make functions known to all code by their symbols. Where object code cannot be loaded, only Numba's knows them.

    Parameters
    ----------
    name : str
        The last part of the symbols too: see `symbol`.
    symbols : list of str
        All of them: LLVM ends the process where code is loaded that calls one it does not know.
    compiled : callable
        Compiles them.
    """

    def bound() -> None:
        if _able():
            _shared(name, _addresses(f"shared.{name}", compiled, symbols))
        else:
            compiled()

    _once(f"shared.{name}", bound)


def symbol(function: str, name: str) -> str:
    """The symbol of a function that is shared under a name."""
    return f"tinytape_{function}_{name}"


def _shared(name: str, found: dict[str, int] | None) -> bool:
    for its_symbol, address in (found or {}).items():
        llvm.add_symbol(its_symbol, address)
    return found is not None


@cache
def _prototype(parameters: int) -> Callable[[int], Callable[..., int]]:
    return ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_void_p] * parameters)


def _dispatched(dispatcher: Any, *arguments: Any) -> int:
    """Call a kernel by way of Numba."""
    numbers = [ctypes.cast(ctypes.c_char_p(a), ctypes.c_void_p).value if a.__class__ is bytes else a for a in arguments]
    return dispatcher(*numbers) or 0


def _once(name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, asked for once in this process."""
    if name not in _found:
        with _making:
            if name not in _found:
                _found[name] = make()
    return _found[name]


def _addresses(name: str, compiled: Callable[[], Code], wanted: Iterable[str] = ()) -> dict[str, int] | None:
    """Where functions lie, at least the wanted ones; None where object code cannot be loaded."""
    if not _able():
        return None
    if (found := _kept(name)) is not None and found.keys() >= set(wanted):
        return found
    try:
        code = compiled()
    except (AttributeError, ImportError, TypeError):  # Numba is not the one that this was written for
        return None
    found = _loaded(code)
    if found is not None and code.lasting:
        folder.write_checked(fingerprint(), f"{name}.native", code.packed())
    return found


def _kept(name: str) -> dict[str, int] | None:
    """As `_addresses`, of what is in the folder."""
    data = folder.read_checked(fingerprint(), f"{name}.native")
    return None if data is None else _loaded(Code.unpacked(data))


@cache
def _able() -> bool:
    """Whether object code can be loaded here: addresses are as long as integers, and the C library is found.

    It can on Linux and macOS. Windows hides the C library's names from LLVM, so there Numba loads the code.
    """
    try:
        _engine()  # which makes the symbols of this process known
    except RuntimeError:
        return False
    return ctypes.sizeof(ctypes.c_void_p) == 8 and bool(llvm.address_of_symbol("memset"))


def _engine() -> Any:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    machine = llvm.Target.from_triple(llvm.get_process_triple()).create_target_machine(jit=True)
    return llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)


def _loaded(code: Code) -> dict[str, int] | None:
    """Where the functions lie in this process; None if one is not found, or something that they need."""
    if not all(map(_is_here, code.needs)):
        return None
    try:
        engine = _engine()
        engine.add_object_file(llvm.ObjectFileRef.from_data(code.text))
    except RuntimeError:
        return None
    engine.finalize_object()
    _engines.append(engine)
    found = {name: engine.get_function_address(its_symbol) for name, its_symbol in code.symbols.items()}
    return found if all(found.values()) else None


def _is_here(needed: str) -> bool:
    """Whether this process has a symbol; if it is a shared one, it is fetched from the folder."""
    if llvm.address_of_symbol(needed):
        return True
    head, _, name = needed.rpartition("_")
    return head.startswith("tinytape_") and _shared(name, _kept(f"shared.{name}"))


if hasattr(os, "register_at_fork"):  # LLVM's and Numba's own locks would stay shut in a child if one were held
    os.register_at_fork(before=_making.acquire, after_in_parent=_making.release, after_in_child=_making.release)
