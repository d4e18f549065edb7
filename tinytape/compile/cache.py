"""The functions of generated source, and saying so when that took a compiler."""

from __future__ import annotations

import hashlib
import logging
import os
import re
import sys
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

from ..kernels import folder, native
from ..kernels.fingerprint import fingerprint
from ..kernels.native import compilations

__all__ = ["announced", "compilations", "kernel", "load"]

_log = logging.getLogger("tinytape.compile")
_modules: dict[str, ModuleType] = {}
_told = 0  # how many compilations have been announced


def kernel(name: str, source: str, function: str, parameters: int) -> Callable[..., int]:
    """A function of integers in generated source, as `kernels.native.functions` gives it.

    Parameters
    ----------
    name, source : str
        As for `load`.
    function : str
        The function's name.
    parameters : int
        How many integers it takes.
    """
    stem = _stem(name, source)

    def origin() -> dict[str, Any]:
        return vars(load(name, source))

    return native.functions(f"{stem}.{function}", {function: parameters}, origin)[function]


def _stem(name: str, source: str) -> str:
    digest = hashlib.sha256(f"{fingerprint()}\0{source}".encode()).hexdigest()[:16]
    return f"{re.sub(r'[^0-9A-Za-z]+', '_', name)[:80]}_{digest}"  # file systems take names of 255 bytes


def place(name: str, source: str) -> Path:
    """Where generated source lies for reading; `name` is what a person may look for there."""
    stem = _stem(name, source)
    try:
        return folder.place(fingerprint(), f"{stem}.py", source.encode())
    except OSError:  # no folder at all can be written
        return Path(f"<{stem}>")


def load(name: str, source: str) -> ModuleType:
    """The module that generated source makes; its ``@njit`` functions are compiled once for this machine.

    Parameters
    ----------
    name : str
        What a person may look for in the cache folder, where the source lies for reading and for tracebacks.
    source : str
        Python. It is this text that runs, whatever the file holds.
    """
    from ..kernels.store import keep

    stem = _stem(name, source)
    if stem in _modules:
        return _modules[stem]
    path = place(name, source)
    module = ModuleType(f"tinytape.compile.generated.{stem}")
    module.__file__ = str(path)
    sys.modules[module.__name__] = module  # where Numba looks for the globals of a function that was kept
    try:
        exec(compile(source, path, "exec"), module.__dict__)
    except BaseException:
        del sys.modules[module.__name__]
        raise
    for value in vars(module).values():
        keep(value)
    return _modules.setdefault(stem, module)


@contextmanager
def announced(label: str) -> Generator[None]:
    """Say what was compiled, and how long it took, if anything is compiled inside.

    The line goes to the logger ``tinytape.compile`` as INFO, and where no logging is set up, to standard error.
    ``TINYTAPE_QUIET=1`` or a higher level of that logger silences it.

    Parameters
    ----------
    label : str
        What is compiled, such as ``"LSTMCell 256"``.
    """
    global _told
    before, start = compilations(), time.perf_counter()
    yield
    if compilations() > max(before, _told):
        _told = compilations()
        _say(f"tinytape: compiling {label}, once for this machine: {time.perf_counter() - start:.1f} s")


def _say(line: str) -> None:
    if os.environ.get("TINYTAPE_QUIET", "0") not in ("", "0"):
        return
    if _log.hasHandlers():
        _log.info(line)
    elif _log.level <= logging.INFO:
        print(line, file=sys.stderr)
