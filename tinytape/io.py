"""One file for a whole run: weights, optimiser, random state, step and vocabulary in one ``.safetensors`` file.

`save_state` and `load_state` take a nested dict of arrays and plain values. Below them are `save` and `load`, for named
arrays and strings. The files are safetensors, which other programs read too, and never pickle, which runs code.

A file is written beside its place, flushed to the disk and then renamed: at every moment there is either the old file
or the new one, whole. The same content gives the same bytes.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import stat
import struct
import zlib
from collections.abc import Mapping
from typing import Any, cast

import numpy as np

from .engine.errors import DTypeError, InputError

__all__ = ["flatten_state", "load", "load_state", "save", "save_state", "unflatten_state"]

Array = np.ndarray[Any, np.dtype[Any]]
Path = str | os.PathLike[str]

FORMAT = "tinytape.state"
VERSION = "1"
CHECKSUM = "tinytape.checksum"

CODES = {
    "float64": "F64", "float32": "F32", "float16": "F16", "int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8",
    "uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8", "bool": "BOOL",
}  # fmt: skip
"""What safetensors calls the dtypes."""


# ---- named arrays and strings ---------------------------------------------------------------------------------------


def save(path: Path, arrays: Mapping[str, Any], metadata: Mapping[str, str] | None = None) -> None:
    """Write named arrays and strings to a safetensors file, whole or not at all.

    Parameters
    ----------
    path : path
        Where to. A file that is there is replaced only when the new one is safely on the disk. A killed process may
        leave an unfinished ``<path>.<...>.tmp`` behind, which can be deleted.
    arrays : dict of array
        Floats, integers or bools of any shape; Tensors will do.
    metadata : dict of str, optional
        A checksum of everything is added to it under "tinytape.checksum".

    Raises
    ------
    InputError
        If the file cannot be written (no such folder, no permission, a full disk). The old file is as it was.
    DTypeError
        If an array has a dtype that the format lacks, or a name or the metadata are not Unicode strings.
    """
    plain = {name: _plain(name, array) for name, array in arrays.items()}
    # Wide numbers first, so that all are aligned in the file.
    plain = dict(sorted(plain.items(), key=lambda item: (-item[1].itemsize, item[0])))
    header = _header(plain, metadata or {})
    target = os.path.realpath(path)
    beside = f"{target}.{os.getpid()}.{secrets.token_hex(4)}.tmp"
    try:
        mode = os.stat(target).st_mode if os.path.exists(target) else None
        if mode is not None and not stat.S_ISREG(mode):
            raise OSError("it is not a regular file")  # but a folder, or a device that the rename would remove
        try:
            with open(beside, "xb") as file:
                file.write(header)
                for array in plain.values():
                    file.write(_bytes(array))
                file.flush()
                os.fsync(file.fileno())
            if mode is not None:
                with contextlib.suppress(OSError):  # some file systems have no modes
                    os.chmod(beside, stat.S_IMODE(mode))
            os.replace(beside, target)
        except BaseException:  # Ctrl-C too
            with contextlib.suppress(OSError):
                os.remove(beside)
            raise
    except OSError as error:
        size = len(header) + sum(array.nbytes for array in plain.values())
        raise InputError(
            f"save: path {os.fspath(path)!r} cannot be written ({size:,} bytes): {error.strerror or error}.",
            "free space, make the folder, or give another path; what was there before is as it was.",
        ) from error
    _flush_folder(os.path.dirname(target))


def load(path: Path) -> tuple[dict[str, Array], dict[str, str]]:
    """Read a safetensors file, of ours or of another program.

    Returns
    -------
    arrays : dict of array
    metadata : dict of str

    Raises
    ------
    InputError
        If there is no such file, or it is damaged, cut short or of another format.
    """
    from safetensors import SafetensorError, safe_open  # not needed before the first file

    shown = repr(os.fspath(path))
    try:
        if os.path.isdir(path):
            raise OSError("it is a folder")
        with cast(Any, safe_open)(os.fspath(path), framework="np") as file:
            arrays: dict[str, Array] = {name: file.get_tensor(name) for name in sorted(file.keys())}
            metadata: dict[str, str] = file.metadata() or {}
    except OSError as error:
        what = "there is no such file" if isinstance(error, FileNotFoundError) else error.strerror or str(error)
        raise InputError(f"load: path {shown} cannot be read: {what}.", "check the path.") from error
    except SafetensorError as error:
        raise InputError(
            f"load: {shown} ({os.path.getsize(path):,} bytes) is not a whole safetensors file: {error}.",
            "it is damaged, cut short or of another format; use a copy.",
        ) from error
    except (TypeError, AttributeError) as error:  # bfloat16 and float8
        raise InputError(f"load: {shown} has an array that NumPy cannot hold: {error}.", "convert it first.") from error
    noted = metadata.pop(CHECKSUM, None)
    if noted is not None and noted != (found := _checksum(arrays, metadata)):
        raise InputError(f"load: {shown} is damaged: its checksum is {found} and should be {noted}.", "use a copy.")
    return arrays, metadata


def _plain(name: Any, value: Any) -> Array:
    """An array in C order and little-endian."""
    array = np.asarray(value)
    if array.dtype.name not in CODES or not isinstance(name, str):
        raise DTypeError(f"save: array {name!r} has dtype {array.dtype}.", f"names are str, dtypes {', '.join(CODES)}.")
    return np.array(array, dtype=array.dtype.newbyteorder("<"), order="C", copy=None)


def _bytes(array: Array) -> bytes | memoryview:
    return array.data if array.size else b""


def _header(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> bytes:
    """The start of the file: how long the JSON text is, and the text, which says what the numbers after it are.

    The safetensors package would write it too, but with the metadata in an order that changes from run to run.
    """
    for key, value in metadata.items():
        if not isinstance(key, str) or not isinstance(value, str):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise DTypeError(f"save: metadata[{key!r}] is {value!r:.60}, not a string.", "see save_state for values.")
    strings = dict(sorted(metadata.items()))
    entries: dict[str, Any] = {"__metadata__": {**strings, CHECKSUM: _checksum(arrays, strings)}}
    end = 0
    for name, array in arrays.items():
        if name in entries:
            raise DTypeError(f"save: array {name!r} has the name of the metadata.", "choose another name.")
        start, end = end, end + array.nbytes
        entries[name] = {"dtype": CODES[array.dtype.name], "shape": array.shape, "data_offsets": (start, end)}
    try:
        text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        raise DTypeError(f"save: a name or the metadata are not Unicode: {error}.", "leave surrogates out.") from error
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _checksum(arrays: Mapping[str, Array], metadata: Mapping[str, str]) -> str:
    """CRC-32 of names, dtypes, shapes, numbers and strings: proof against accidents, not against malice."""
    described = [(name, arrays[name].dtype.name, arrays[name].shape) for name in sorted(arrays)]
    crc = zlib.crc32(json.dumps([described, sorted(metadata.items())]).encode())
    for name, *_ in described:
        crc = zlib.crc32(_bytes(arrays[name]), crc)
    return f"{crc:08x}"


def _flush_folder(folder: str) -> None:
    """Make the rename itself last. Some systems cannot open folders, and do without."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---- nested dicts of arrays and values ------------------------------------------------------------------------------


def save_state(path: Path, tree: Mapping[str, Any]) -> None:
    """Write a nested dict of arrays and plain values to one file.

    Parameters
    ----------
    path : path
        As for `save`.
    tree : dict
        Of dicts with string keys, lists, tuples, arrays, str, float, int of any size, bool and None. `load_state`
        gives the same back, to the last bit; Tensors and NumPy's scalars come back as arrays.

    Raises
    ------
    DTypeError
        If there is anything else in it; its place is named.
    InputError
        If the file cannot be written; the old file is as it was.

    Examples
    --------
    >>> save_state("run.safetensors", {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": 70})
    """
    arrays, text = flatten_state(tree)
    save(path, arrays, {"format": FORMAT, "version": VERSION, "tree": text})


def load_state(path: Path) -> dict[str, Any]:
    """Read what `save_state` wrote.

    Raises
    ------
    InputError
        If the file is missing or damaged, of another program, or of another version of the format.
    """
    arrays, metadata = load(path)
    shown = repr(os.fspath(path))
    if metadata.get("format") != FORMAT:
        names = ", ".join([*arrays][:3]) + ", ..." * (len(arrays) > 3)
        raise InputError(
            f"load_state: {shown} is a safetensors file, but not one of save_state: it has format "
            f"{metadata.get('format')!r}, not {FORMAT!r}, and {len(arrays)} arrays ({names}).",
            "for weights from elsewhere use load(path), then load_state_dict.",
        )
    if metadata.get("version") != VERSION:
        raise InputError(
            f"load_state: {shown} has version {metadata.get('version')!r} of the format; here it is {VERSION!r}.",
            "use the version of tinytape that wrote it.",
        )
    return unflatten_state(arrays, metadata.get("tree", ""))


def flatten_state(tree: Mapping[str, Any]) -> tuple[dict[str, Array], str]:
    """Take a nested dict apart: arrays by path, such as "model/lstm.weight_ih_l0", and the rest as JSON.

    Keys are written as in JSON pointers (RFC 6901), ``~0`` for ``~`` and ``~1`` for ``/``. What JSON lacks has a key
    that begins with another ``~``: ``{"~array": path}``, ``{"~tuple": [...]}``, ``{"~int": hex}`` from 64 bits on, and
    ``{"~float": bits}`` for NaN and infinity.
    """
    if not isinstance(tree, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise DTypeError(f"save_state: tree is a {type(tree).__name__}, not a dict.", "give its parts names in a dict.")
    arrays: dict[str, Array] = {}
    return arrays, json.dumps(_take_apart(tree, None, arrays), separators=(",", ":"), allow_nan=False)


def unflatten_state(arrays: Mapping[str, Array], text: str) -> dict[str, Any]:
    """Put together what `flatten_state` took apart.

    Raises
    ------
    InputError
        If the text is not of `flatten_state`, or names other arrays than there are.
    """
    left = dict(arrays)
    try:
        tree = _put_together(json.loads(text), left)
    except (ValueError, KeyError, TypeError, struct.error) as error:
        raise InputError(f"load_state: the description does not fit the arrays: {error!r}.", "use a copy.") from error
    if left or not isinstance(tree, dict):
        raise InputError(f"load_state: {len(left)} arrays have no place: {', '.join(left)}.", "use a copy.")
    return cast("dict[str, Any]", tree)


def _take_apart(value: Any, path: str | None, arrays: dict[str, Array]) -> Any:
    if isinstance(value, Mapping):
        parts: dict[str, Any] = {}
        for key, item in cast("Mapping[Any, Any]", value).items():
            if not isinstance(key, str):
                raise DTypeError(f"save_state: {path or 'tree'} has the key {key!r}, not a string.", "use str(key).")
            escaped = key.replace("~", "~0").replace("/", "~1")
            parts[escaped] = _take_apart(item, escaped if path is None else f"{path}/{escaped}", arrays)
        return parts
    if isinstance(value, list | tuple):
        items = [_take_apart(x, f"{path}/{i}", arrays) for i, x in enumerate(cast("list[Any]", value))]
        return {"~tuple": items} if isinstance(value, tuple) else items
    if value is None or isinstance(value, str | bool):
        return value
    if isinstance(value, int):
        return int(value) if -(2**63) <= value < 2**64 else {"~int": hex(value)}
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"~float": struct.pack(">d", value).hex()}
    if not hasattr(value, "__array__"):
        raise DTypeError(
            f"save_state: {path} is a {type(value).__name__}: {value!r:.60}.",
            "a state has dicts, lists, tuples, arrays, numbers, strings and None.",
        )
    assert path is not None  # the tree itself is a dict
    arrays[path] = _plain(path, value)
    return {"~array": path}


def _put_together(value: Any, arrays: dict[str, Array]) -> Any:
    if isinstance(value, list):
        return [_put_together(x, arrays) for x in cast("list[Any]", value)]
    if not isinstance(value, dict):
        return value
    parts = cast("dict[str, Any]", value)
    if "~array" in parts:
        return arrays.pop(parts["~array"])
    if "~tuple" in parts:
        return tuple(_put_together(x, arrays) for x in parts["~tuple"])
    if "~int" in parts:
        return int(parts["~int"], 16)
    if "~float" in parts:
        return struct.unpack(">d", bytes.fromhex(parts["~float"]))[0]
    return {key.replace("~1", "/").replace("~0", "~"): _put_together(x, arrays) for key, x in parts.items()}
