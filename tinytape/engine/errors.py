"""The exceptions that a user can meet.

Each is raised with what was wrong (both numbers, the argument's name) and one line of advice::

    ShapeError: Linear: x has shape (4, 7); its last axis must be in_features = 3, got 7.
      help: pass x of shape (..., 3), or build Linear(7, ...).
"""

from __future__ import annotations

__all__ = ["DTypeError", "InputError", "ShapeError", "TapeError", "TinytapeError"]


class TinytapeError(Exception):
    """The base of all four: ``except tt.TinytapeError`` catches whatever tinytape refuses.

    Parameters
    ----------
    what : str
        What was wrong: the argument's name, what was found and what was expected.
    advice : str, optional
        One line that says what to do about it.
    """

    def __init__(self, what: str, advice: str = "") -> None:
        self.what = what
        self.advice = advice
        super().__init__(f"{what}\n  help: {advice}" if advice else what)


class ShapeError(TinytapeError, ValueError):
    """A shape, an axis or a length that does not fit."""


class DTypeError(TinytapeError, TypeError):
    """A dtype or a kind of object that an operation does not take."""


class InputError(TinytapeError, ValueError):
    """Any other value out of its range: an option, an index, a file, a state to be loaded."""


class TapeError(TinytapeError, RuntimeError):
    """A walk that cannot be done: freed records, changed values, a broken rule, nothing to differentiate."""
