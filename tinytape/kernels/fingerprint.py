"""What compiled code depends on, other than its own source: told without importing Numba."""

# pyright: basic

from __future__ import annotations

import hashlib
import os
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm
import numpy as np

from .address import HEAD

__all__ = ["SETTINGS_FILE", "fingerprint", "settings"]

SETTINGS_FILE = Path(".numba_config.yaml")
"""Where Numba looks for settings beside the environment: in the current folder."""

_ELSEWHERE = {
    "NUMBA_CACHE_DIR", "NUMBA_COLOR_SCHEME", "NUMBA_DISABLE_PERFORMANCE_WARNINGS", "NUMBA_NUM_THREADS",
    "NUMBA_SHOW_HELP", "NUMBA_THREADING_LAYER",
}  # fmt: skip


@cache
def fingerprint() -> str:
    """16 hexadecimal digits that change with anything that compiled code depends on, other than its own text."""
    found = hashlib.sha256()
    for path in sorted(Path(__file__).parent.glob("*.py")):
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    versions = sys.version, np.__version__, _numba(), llvmlite.__version__
    found.update(repr((versions, HEAD, _machine(), settings())).encode())
    return found.hexdigest()[:16]


def settings() -> list[tuple[str, str | bytes]]:
    """All that Numba is told from outside and that may change the code it makes."""
    found: list[tuple[str, str | bytes]] = [
        (name, value)
        for name, value in sorted(os.environ.items())
        if name.startswith("NUMBA_") and name not in _ELSEWHERE
    ]
    if SETTINGS_FILE.is_file():
        found.append((SETTINGS_FILE.name, SETTINGS_FILE.read_bytes()))
    return found


def _numba() -> str | bytes:
    """Numba's version: the file that its releases keep it in, or nothing where Numba is not installed."""
    spec = find_spec("numba")
    if spec is None or spec.origin is None:
        return ""
    try:
        text = Path(spec.origin).with_name("_version.py").read_bytes()
    except OSError:
        text = b""
    if b"version_json" in text:
        return text
    import numba  # no release: it has to be asked

    return numba.__version__


def _machine() -> tuple[str, str, str]:
    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM cannot tell them on this platform
        features = ""
    return llvm.get_process_triple(), llvm.get_host_cpu_name(), features
