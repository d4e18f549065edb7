"""What the programs in this folder share on the command line."""

from __future__ import annotations

import argparse
import itertools
import math
import shlex
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import tinytape as tt

Arguments = Sequence[str]


def run(
    program: Callable[[Arguments], None],
    arguments: Arguments,
    again: Callable[[str], Arguments] = lambda folder: ["--resume", folder],
) -> None:
    """Run a program; what a user did wrong ends it with a line that says what to do, and exit code 2.

    `again` says with which arguments a run that was stopped goes on, from the folder that it is saved in.
    """
    if hasattr(sys.stdout, "reconfigure"):
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack some of a text's characters
    try:
        program(arguments)
    except (tt.TinytapeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(2) from None
    except MemoryError as error:
        print(f"error: out of memory: {error}\n  help: give smaller sizes.", file=sys.stderr)
        raise SystemExit(2) from None
    except tt.train.Stopped as stopped:
        name = program.__module__
        if name == "__main__":
            name = sys.modules[name].__spec__.name
        command = shlex.join(["python", "-m", name, *again(stopped.folder)])
        raise SystemExit(f"{stopped}\nGo on with: {command}") from None
    except KeyboardInterrupt:  # outside of training itself, which saves
        raise SystemExit("stopped.") from None


def number(kind: type, low: float, high: float = math.inf):
    """What argparse reads an option with: a finite number from `low` to `high`."""

    def read(text: str):
        value = kind(text)
        if not low <= value <= high or value in (math.inf, -math.inf):
            limits = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} given, {limits} is needed")
        return value

    read.__name__ = kind.__name__  # for argparse's message where `kind` itself refuses the text
    return read


def add_settings(
    parser: argparse.ArgumentParser, usual: dict, least: dict | None = None, choices: dict | None = None
) -> None:
    """An option for each setting of a preset; those not given are None."""
    for name, value in usual.items():
        option = "--" + name.replace("_", "-")
        if choices and name in choices:
            parser.add_argument(option, choices=choices[name], help=f"default {value}, or the preset's")
        else:
            low = (least or {}).get(name, 0 if isinstance(value, float) or name == "seed" else 1)
            kind = number(type(value), low)
            parser.add_argument(option, type=kind, metavar="N", help=f"default {value}, or the preset's")


def free_folder(option: str, given: str | None, usual: str) -> str:
    """The folder for a new run: the one given, or else the usual one, numbered where it is taken.

    What could not be written after training, or would hide something that is there, is refused before.
    """
    folder = usual if given is None else given
    for count in itertools.count(2):
        if given is not None or not Path(folder).exists():
            break
        folder = f"{usual}-{count}"
    place = Path(folder)
    if not folder or (place.exists() and not place.is_dir()):
        raise tt.InputError(f"{option}: {folder!r} is not a folder.", "give another, or the name of a new one.")
    if place.exists() and any(place.iterdir()):
        raise tt.InputError(f"{option}: {folder!r} is not empty.", "give another, or the name of a new one.")
    try:
        place.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=place).close()
    except OSError as error:
        raise tt.InputError(
            f"{option}: nothing can be written in {folder!r} ({error.strerror}).", "give another."
        ) from None
    return folder


def figure(rows: int, columns: int, size: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure of `size` inches, to be saved in a file, and its axes; `options` are those of `Figure.subplots`."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise tt.InputError("matplotlib is not installed.", "pip install 'tinytape[models]'.") from None
    made = Figure(figsize=size, layout="constrained")
    return made, made.subplots(rows, columns, **options)
