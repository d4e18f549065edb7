"""`first_nonfinite`: which op first made a NaN or an infinity, found by running the computation again.

Normal runs pay nothing. The search runs the function once without recording, step by step, and looks at every result;
nothing but the results of the last few steps is kept, however long the sequence. Where forward all is finite, it runs
the function once more as it is trained, compiled scans and all, and looks at what every derivative rule returns. A
compiled scan or a checkpoint whose rule is to blame is taken apart: its steps are run again in blocks, as they are
defined, from carries that are kept every sqrt(T) steps.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from ..engine.errors import DTypeError, InputError
from ..engine.tape import here
from .finding import Finding
from .first_backward import backward
from .first_forward import forward
from .search import Known, Layout, Search

__all__ = ["first_nonfinite"]


def first_nonfinite(
    f: Callable[..., Any],
    *args: Any,
    model: Any = None,
    axes: str = "TB",
    ignore: Collection[str] = (),
    before: int = 5,
) -> Finding | None:
    """Run ``f(*args)`` again, forward and backward, and find what first left the finite numbers.

    Parameters
    ----------
    f : callable
        Computes the loss: what it returns, or the first tensor of it. It is called with the weights as they are, up to
        twice, and must compute the same thing each time; draws from generators of tinytape are repeated.
    *args
        What it is called with: the batch.
    model : Module, dict of Tensor, or iterable of Tensor, optional
        For the names of parameters and layers. Default: f, if it is a Module.
    axes : {"TB", "BT", "T", "B", ""}
        What the first axes of the args are, time steps (T) and batch rows (B), so that both can be named.
    ignore : collection of str
        Names of ops that make infinities on purpose, such as "log". What they make counts as intended, until it
        becomes a NaN.
    before : int
        For how many steps before the norm of the same value is told. Default 5.

    Returns
    -------
    Finding or None
        None if the result is finite, and all gradients are. An infinity that is masked away before it reaches the
        result, or a gradient before it reaches a leaf, is not reported.

    Raises
    ------
    DTypeError, InputError
        If f is not callable, returns no Tensor, or an option is out of its range.

    Notes
    -----
    ``.grad``, generators and the weights are left as they were. It takes as long as a training step without
    compilation, and memory for one training step and for about 2 sqrt(T) steps of one scan.

    Examples
    --------
    >>> print(tt.inspect.first_nonfinite(loss_of, x, y, model=model))
    forward, step 37, row 3: exp gave infinity
      ...
    """
    _check(f, axes, before)
    known = Known(f if model is None and hasattr(f, "named_parameters") else model, args)
    layout = Layout(axes, [x for x in known.inputs.values() if x.ndim])
    search = Search(known, layout, frozenset(ignore), before)
    with _same_draws() as draw_again:
        found, masked = forward(search, f, args)
        if found is None:
            draw_again()
            found = backward(search, f, args)
            if found is not None and masked is not None:
                found = replace(found, masked=f"{masked.title}, {masked.place.line or masked.place.inner}")
    return found


def _check(f: Any, axes: Any, before: Any) -> None:
    if not callable(f):
        raise DTypeError(
            f"first_nonfinite: f is a {type(f).__name__}, not a function.", "pass what computes the loss, and its args."
        )
    if axes not in ("TB", "BT", "T", "B", ""):
        raise InputError(f"first_nonfinite: axes is {axes!r}.", 'pass "TB", "BT", "T", "B" or "".')
    if not isinstance(before, int) or before < 0:
        raise InputError(f"first_nonfinite: before is {before!r}.", "pass a number of steps, 0 or more.")


@contextmanager
def _same_draws() -> Generator[Callable[[], None]]:
    """Note where generators stand before they are drawn from; gives a function that puts them back there."""
    context = here.context
    was, drawn = context.drawn, _Draws(context.drawn)

    def again() -> None:
        for generator, state in drawn.items():
            generator.set_state(state)

    context.drawn = drawn
    try:
        yield again
    finally:
        context.drawn = was
        again()


class _Draws(dict[Any, Any]):
    """States of generators before they were drawn from, of which whoever noted them outside is told first."""

    def __init__(self, outside: dict[Any, Any] | None) -> None:
        super().__init__()
        self.outside = outside

    def __setitem__(self, generator: Any, state: Any) -> None:
        if self.outside is not None and generator not in self.outside:
            self.outside[generator] = state
            state = generator.state()  # a replay may have set it
        super().__setitem__(generator, state)
