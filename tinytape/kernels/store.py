"""Keeping compiled kernels on disk, in place of Numba's own files.

Numba's cache notices a change in the file of a function, but not in the functions that it calls, and takes whatever
its files hold. Here the folder's name is a hash over the text of all kernels, the versions of all that takes part in
compiling and the processor, a file's name one over the function, its types and Numba's settings; the file begins with a
checksum. What fails any of these is compiled anew.
"""

# pyright: basic, reportAttributeAccessIssue=false

from __future__ import annotations

import hashlib
import pickle
from typing import Any

from numba.core import config
from numba.core.caching import _Cache
from numba.core.compiler import CompileResult
from numba.core.dispatcher import Dispatcher
from numba.core.serialize import dumps

from . import folder, native
from .fingerprint import fingerprint

__all__ = ["Store", "keep"]

_SETTINGS = "OPT", "LOOP_VECTORIZE", "SLP_VECTORIZE", "BOUNDSCHECK", "FULL_TRACEBACKS", "DEBUGINFO_DEFAULT"


class Store(_Cache):
    """The kept code of one function, as Numba's dispatchers ask for it.

    Parameters
    ----------
    function : callable
        The Python function.
    """

    def __init__(self, function: Any) -> None:
        self._function = function
        self._enabled = True

    @property
    def cache_path(self) -> str:
        return str(folder.location() / fingerprint())

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        target_context.refresh()
        if not self._enabled:
            return None
        name = self._name(sig, target_context.codegen())
        data = folder.read_checked(fingerprint(), name)
        if data is None:
            return None
        try:
            types, payload = pickle.loads(data)
            return CompileResult._rebuild(target_context, *payload) if types == sig else None
        except (AttributeError, ImportError, KeyError, TypeError, ValueError):  # it names what is no longer there
            return None

    def save_overload(self, sig: Any, data: Any) -> None:
        native.count()
        # Code with the addresses of this process in it is of no use to another.
        if not self._enabled or data.lifted or data.library.has_dynamic_globals:
            return
        name = self._name(sig, data.codegen)
        folder.write_checked(fingerprint(), name, dumps((sig, data._reduce())))

    def enable(self) -> None:
        self._enabled = True

    def disable(self) -> None:
        self._enabled = False

    def flush(self) -> None:
        """Nothing: a file that was right stays right."""

    def _name(self, sig: Any, codegen: Any) -> str:
        settings = [getattr(config, name, None) for name in _SETTINGS]  # which a program may set at any time
        found = hashlib.sha256(repr((str(sig), codegen.magic_tuple(), settings)).encode() + _identity(self._function))
        return f"{self._function.__name__}-{found.hexdigest()[:32]}.kernel"


def _identity(function: Any) -> bytes:
    """What tells a function from others; functions in its closure count by theirs, not by where they lie in memory."""
    code = function.__code__
    found = hashlib.sha256(repr((function.__module__, function.__qualname__, code.co_firstlineno)).encode())
    found.update(code.co_code)
    for cell in function.__closure__ or ():
        value = cell.cell_contents
        found.update(_identity(value.py_func) if isinstance(value, Dispatcher) else dumps(value))
    return found.digest()


def keep(dispatcher: Any) -> Any:
    """Have the compiled code of a ``@njit`` function kept here, and return the function.

    Parameters
    ----------
    dispatcher : callable
        A function of this package, or of a module whose name changes with its text. Anything that is not Numba's,
        such as what ``@njit`` gives under ``NUMBA_DISABLE_JIT=1``, is returned as it is.
    """
    if isinstance(dispatcher, Dispatcher) and not isinstance(dispatcher._cache, Store):
        dispatcher._cache = Store(dispatcher.py_func)
    return dispatcher
