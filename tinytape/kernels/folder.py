"""The folder in which compiled kernels are kept from one run to the next.

Files lie in a folder that is named by a hash of all that compiled code depends on (`fingerprint`), and are written
whole, by renaming, so processes that start together may write the same file and each reader sees one or the other.
Where the folder cannot be written, what is there is still read, and new files go to a temporary folder of this process.

Compiled code is *checked*: the file begins with a checksum over the rest and over its own name.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import os
import re
import shutil
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator
from pathlib import Path

__all__ = ["holds", "location", "place", "prune", "read", "read_checked", "size", "writable", "write", "write_checked"]

LIMIT = 200 * 2**20
"""Bytes that the folder may hold; the files that have not been used for longest go first."""

UNUSED = 60 * 86400.0
"""Seconds after which a file that nobody used goes."""

_DAY = 86400.0
_HOUR = 3600.0
_GROUP = re.compile(r"[0-9a-f]{16}")  # the folders that are ours, and the files in them: all others are left alone
_FILE = re.compile(r".*\.(py|kernel|native|writing)")

_DIGEST = hashlib.sha256().digest_size

_temporary: Path | None = None
_pruned = False


def location() -> Path:
    """Where kernels are kept.

    ``TINYTAPE_CACHE_DIR``, else ``tinytape`` in the folder that ``NUMBA_CACHE_DIR`` or ``XDG_CACHE_HOME`` names or,
    without these, that the platform has for caches. Code from it is run, so nobody else should be able to write there.
    """
    if own := os.environ.get("TINYTAPE_CACHE_DIR"):
        return Path(own).expanduser().absolute()
    shared = os.environ.get("NUMBA_CACHE_DIR") or os.environ.get("XDG_CACHE_HOME")
    if not shared:
        on_windows = os.environ.get("LOCALAPPDATA") if os.name == "nt" else None
        shared = on_windows or os.path.expanduser("~/Library/Caches" if sys.platform == "darwin" else "~/.cache")
    return Path(shared).absolute() / "tinytape"


def _found(group: str, name: str) -> Iterator[tuple[Path, bytes]]:
    """The files of this name that can be read."""
    for folder in (location(), _temporary):
        if folder is None:
            continue
        path = folder / group / name
        try:
            data = path.read_bytes()
        except OSError:
            continue
        with contextlib.suppress(OSError):  # the time says when it was last used; a read-only folder keeps no account
            if time.time() - path.stat().st_mtime > _DAY:
                os.utime(path)
        yield path, data


def read(group: str, name: str) -> bytes | None:
    """What a file holds, or None where there is none that can be read."""
    return next((data for _, data in _found(group, name)), None)


def holds(group: str, pattern: str) -> bool:
    """Whether there is a file whose name matches."""
    try:
        return next((location() / group).glob(pattern), None) is not None
    except OSError:  # no folder that can be read
        return False


def read_checked(group: str, name: str) -> bytes | None:
    """What `write_checked` wrote, or None where that is not what the file holds."""
    for _, data in _found(group, name):
        if data[:_DIGEST] == _checksum(group, name, data[_DIGEST:]):
            return data[_DIGEST:]
    return None


def write_checked(group: str, name: str, data: bytes) -> None:
    """Write a file for `read_checked`. Where nothing can be written at all, the next process does without."""
    with contextlib.suppress(OSError):
        write(group, name, _checksum(group, name, data) + data)


def _checksum(group: str, name: str, data: bytes) -> bytes:
    return hashlib.sha256(f"{group}/{name}\0".encode() + data).digest()


def place(group: str, name: str, data: bytes) -> Path:
    """The path of a file that holds `data`, which is written unless it is there.

    Raises
    ------
    OSError
        As `write` does.
    """
    return next((path for path, found in _found(group, name) if found == data), None) or write(group, name, data)


def write(group: str, name: str, data: bytes) -> Path:
    """Write a file in one piece and return its path.

    Raises
    ------
    OSError
        If not even a temporary folder can be written.
    """
    global _pruned
    try:
        path = _write(location() / group / name, data)
    except OSError as error:
        return _write(_fallback(error) / group / name, data)
    if not _pruned:
        _pruned = True
        prune()
    return path


def _write(path: Path, data: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.stem}-{os.urandom(16).hex()}.writing")
    try:
        part.write_bytes(data)
        part.replace(path)
    except BaseException:
        with contextlib.suppress(OSError):
            part.unlink()
        raise
    return path


def _fallback(error: OSError) -> Path:
    """The temporary folder, made with a warning where there is none yet."""
    global _temporary
    if _temporary is None:
        _temporary = Path(tempfile.mkdtemp(prefix="tinytape-"))
        atexit.register(_remove, _temporary, os.getpid())
        warnings.warn(
            f"tinytape: compiled kernels cannot be kept in {location()} ({error.strerror}): this process keeps them in "
            f"{_temporary}, and the next compiles anew. Set TINYTAPE_CACHE_DIR to a folder that can be written.",
            RuntimeWarning,
            stacklevel=2,
        )
    return _temporary


def _remove(folder: Path, owner: int) -> None:
    if os.getpid() == owner:  # a forked child leaves its parent's folder alone
        shutil.rmtree(folder, ignore_errors=True)


def writable() -> bool:
    """Whether a file can be written at `location` now."""
    try:
        location().mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=location()).close()
    except OSError:
        return False
    return True


def _files() -> Iterator[tuple[Path, os.stat_result]]:
    with contextlib.suppress(OSError):
        for group in os.scandir(location()):
            if not _GROUP.fullmatch(group.name):
                continue
            for entry in os.scandir(group):
                if _FILE.fullmatch(entry.name):
                    with contextlib.suppress(OSError):  # another process may have pruned it just now
                        yield Path(entry.path), entry.stat()


def size() -> int:
    """Bytes of all files that are kept."""
    return sum(status.st_size for _, status in _files())


def prune(limit: int = LIMIT, unused: float = UNUSED) -> None:
    """Drop what was not used for long, and of the rest the oldest until at most `limit` bytes are left."""
    now = time.time()
    left = limit
    for path, status in sorted(_files(), key=lambda found: -found[1].st_mtime):
        abandoned = path.suffix == ".writing"
        age = now - status.st_mtime
        left -= status.st_size
        if left < 0 or age > (_HOUR if abandoned else unused):
            left += status.st_size
            with contextlib.suppress(OSError):
                path.unlink()
                path.parent.rmdir()  # which succeeds only once it is empty
