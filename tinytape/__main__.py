"""``python -m tinytape``: look at this installation, and compile what the layers need ahead of time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

import numpy as np

from . import nn
from .engine.errors import InputError, TinytapeError
from .prepare import warmup

__all__ = ["main"]

STANDARD = "RNN", "GRU", "LSTM"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m tinytape", description="Look at this installation.")
    commands = parser.add_subparsers(dest="command", metavar="command")
    commands.add_parser("doctor", help="what was found on this machine, and a self-test of about ten seconds")
    warm = commands.add_parser("warmup", help="compile the kernels of layers ahead of time")
    warm.add_argument("cells", nargs="*", default=STANDARD, help=f"of nn, by name. Default: {' '.join(STANDARD)}")
    warm.add_argument("--hidden", type=int, default=128, metavar="N", help="hidden size. Default: 128; any will do")
    warm.add_argument("--dtype", choices=("float32", "float64"), default="float32", help="default: float32")
    given = parser.parse_args(arguments)
    try:
        if given.command == "doctor":
            from . import doctor

            return doctor.run()
        if given.command == "warmup":
            return _warm(given.cells, given.hidden, given.dtype)
    except TinytapeError as error:
        print(f"{parser.prog} {given.command}: {error}", file=sys.stderr)
        return 1
    parser.print_help()
    return 0


def _warm(cells: Sequence[str], hidden: int, dtype: str) -> int:
    from .compile.cache import announced, compilations
    from .kernels.compiler import usable

    if not usable():
        raise InputError("warmup: NUMBA_DISABLE_JIT is set, so nothing is compiled.", "unset it.")
    models = [(f"{name} {hidden} {dtype}", _layer(name, hidden, dtype)) for name in cells]
    for label, model in models:
        before = compilations()
        with announced(label):
            seconds = warmup(model, (2, 1, hidden))
        count = compilations() - before
        print(f"{label}: {f'{count} compiled' if count else 'nothing to compile'}, {seconds:.1f} s", flush=True)
    return 0


def _layer(name: str, hidden: int, dtype: str) -> nn.Module:
    """The layer of a name, or the cell of a name, over time."""
    by_name = {known.lower(): getattr(nn, known) for known in nn.__all__}
    kind = by_name.get(name.lower())
    is_cell = name.lower().endswith("cell")
    if kind is None or not (is_cell or kind.__name__ in STANDARD):
        cells = [known for known in nn.__all__ if known.endswith("Cell")]
        raise InputError(f"warmup: there is no cell {name!r}.", f"use {', '.join((*STANDARD, *cells))}.")
    made = kind(hidden, hidden, dtype=np.dtype(dtype))
    return nn.Recurrent(made) if is_cell else made


if __name__ == "__main__":
    sys.exit(main())
