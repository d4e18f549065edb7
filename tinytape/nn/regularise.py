"""Dropout, per element or with one mask for a whole sequence."""

from __future__ import annotations

from typing import Any, Literal

from ..random import Generator, check_probability
from . import functional as F
from .checks import check_choice
from .module import Module

__all__ = ["Dropout"]


class Dropout(Module):
    """While training, set entries to 0 with probability `p` and divide the others by 1 - p (Srivastava et al. 2014).

    Parameters
    ----------
    p : float
        Default 0.5.
    per : {"element", "sequence"}
        "sequence": one mask, shared by all time steps (variational dropout, Gal & Ghahramani 2016).
    axis : int
        The time axis, for "sequence". Default 0.
    generator : Generator, optional
        What masks are drawn with; default `tt.default_generator`.

    Raises
    ------
    InputError
        If `p` is not in [0, 1] or `per` is neither.
    """

    def __init__(
        self,
        p: float = 0.5,
        per: Literal["element", "sequence"] = "element",
        axis: int = 0,
        *,
        generator: Generator | None = None,
    ) -> None:
        check_probability("Dropout", p)
        check_choice("Dropout", "per", per, ("element", "sequence"))
        self.p, self.axis, self.generator = p, axis, generator
        self.per: Literal["element", "sequence"] = per

    def forward(self, x: Any) -> Any:
        return F.dropout(x, self.p, self.training, self.per, self.axis, self.generator)

    def extra_repr(self) -> str:
        return f"{self.p}" + (f", per={self.per!r}" if self.per != "element" else "")
