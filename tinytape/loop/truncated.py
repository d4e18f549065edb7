"""`truncated`: training over a long stream, the gradient of each loss cut off some steps back.

BPTT(h; h') of Williams & Peng (1990), with k1 for their h' and k2 for their h: every k1 steps the last k2 inputs are
run again with the current weights, from a state that was stored when it was last passed, and the losses of the last
k1 steps are carried back to where that run began::

    inputs   ──────────┬──────────────────────────┬────────────▶ time
                     start                      stop
    window             ├─ cut ────────────┬───────┤
    losses                                 ├─ k1 ─┤
    next window              ├────────────────────┼───────┤

The run is made in two pieces, start to cut and cut to stop: the state between them, computed with the current weights
and cut off, is the one from which the next window starts. A last window for which fewer than k1 steps are left starts
before that, k2 steps from the end: what lies between the start of the window before and there is run without recording.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from inspect import Parameter, signature
from operator import itemgetter
from typing import Any, cast

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, ShapeError
from ..engine.tape import no_grad
from ..engine.tensor import Tensor
from ..engine.tree import flatten, map_leaves
from ..ops.shape import concatenate
from ..random import Generator, default_generator
from .carried import check_finite, row_flags
from .scan import leaf_names
from .stretch import Flags, Held, Layout, Stretch, stretch
from .windows import Reach, Report, Start, Window, deviation, lengths, new_steps

__all__ = ["Truncated", "check_takes_reset", "name_of", "over_time", "truncated"]


def truncated(
    layer: Any,
    k1: int,
    k2: int | None = None,
    *,
    jitter: float = 0.0,
    generator: Generator | None = None,
    check_state: bool = True,
) -> Truncated:
    """Truncated backpropagation through time over a stream: a window of losses every `k1` steps, each `k2` steps deep.

    Parameters
    ----------
    layer : Module or callable
        ``layer(x, state) -> (y, state)`` over time: `nn.RNN`, `nn.GRU`, `nn.LSTM`, `nn.Recurrent` or a model of your
        own with one inside. It is called with None for the state at the very start, and with ``reset=`` where rows
        are reset. A cell, that is a module with ``initial_state``, is put in `nn.Recurrent`.
    k1 : int
        New steps in a window, 1 or more: how often losses are handed out.
    k2 : int, optional
        Steps that are run in a window, `k1` or more: the most that a loss is carried back. Default: `k1`, plain
        chunks, in which nothing is run twice. A step is run k2 / k1 times in all. The losses of a window are carried
        back k2 - k1 + 1 to k2 steps, the input of their own step counted; all of them k2 steps if k1 is 1. If k2 is
        greater than k1, the last window of a call runs k2 steps too, however few of them are new.
    jitter : float
        Draw the number of new steps of each window, as in AWD-LSTM (Merity et al. 2018), from a normal distribution
        with this standard deviation around k1, or in one window of twenty around k1 / 2; it is at least min(5, k1)
        and at most k1 + 4 `jitter`. The k2 - k1 steps before them stay. Default 0: always k1.
    generator : Generator, optional
        What `jitter` draws with.
    check_state : bool
        Refuse to carry a state with NaN or infinity on. Default True.

    Returns
    -------
    Truncated
        To be called with a stream; it carries the state.

    Raises
    ------
    InputError
        If k2 < k1, or a layer goes backwards in time, which a stream cannot.

    Examples
    --------
    >>> stream = tt.truncated(lstm, k1=20, k2=60)
    >>> for window in stream(x, targets):  # x (T, B, I), targets (T, B)
    ...     loss = F.cross_entropy(readout(window.y), window.targets)
    ...     loss.backward()
    ...     optimizer.step()
    ...     optimizer.zero_grad()
    """
    return Truncated(layer, k1, k2, jitter, generator, check_state)


class Truncated:
    """A layer, the state that it carries along a stream, and the inputs that the next window will look back on.

    See `truncated` for the parameters. Calls go on with one stream until `reset_state`.

    Attributes
    ----------
    layer
        What is run over time.
    position : int
        Steps so far. Windows count from 0 on, whatever is reset.
    """

    def __init__(
        self,
        layer: Any,
        k1: int,
        k2: int | None,
        jitter: float,
        generator: Generator | None,
        check_state: bool,
    ) -> None:
        self.layer, self._name = over_time(layer), name_of(layer)
        self.k1, self.k2 = lengths(k1, k2)
        self.jitter, self.generator, self.check_state = deviation(jitter), generator, check_state
        self._report = Report(repr(self))
        self.position = self._call = 0
        self._held = Held()
        self._starts = [Start(0, None)]  # in order; the next window's is the last, unless it is short
        self._due: Flags | None = None

    def __repr__(self) -> str:
        jitter = f", jitter={self.jitter:g}" if self.jitter else ""
        return f"truncated({self._name}, k1={self.k1}, k2={self.k2}{jitter})"

    # ---- the loop -----------------------------------------------------------------------------------------------

    def __call__(self, x: Any, targets: Any = None, *, reset: Any = None, state: Any = None) -> Iterator[Window]:
        """The windows of a stretch of the stream, each computed when it is asked for.

        Parameters
        ----------
        x : array, dict of arrays, or iterable of chunks
            (T, B, ...), or laid out as the layer takes it: (B, T, ...) with batch_first, (T, features) for a single
            sequence. Of an iterable, chunks of any lengths are joined as they come: each is an x, or a tuple
            ``(x, targets)`` or ``(x, targets, reset)``.
        targets : array or nest of arrays, optional
            One for each step, laid out as x. They are only cut up.
        reset : bools, optional
            (T, B), laid out as x: the row starts a new document at that step, so its state is zeroed before it, and
            no gradient passes. At the very first step it zeroes the state too, and has no other effect.
        state : nest of arrays, optional
            Start a new stream from here, as if after `reset_state`. It is a constant. Default: go on where the last
            window ended, or, at the beginning, from the layer's own initial state.

        Yields
        ------
        Window
            Every k1 steps. While the stream is younger than k2, a window starts at its beginning. The last window of
            a call has the steps that are left, 1 or more, and runs the last k2 inputs all the same, unless k1 = k2.
            A further call goes on behind it, with k1 new steps again and the k2 - k1 before them. What was taken
            from an iterable and not used when the loop is left is dropped.

        Raises
        ------
        ShapeError, DTypeError, InputError
            If arguments do not fit each other, there are no steps, the number of rows is not that of the state, or
            the state becomes non-finite. The stream then stands where it stood; if a `state` was given, at that.
        """
        self._call += 1  # a loop that was left without being closed has no further say
        self._held.keep(self._starts[0].step, self.position)
        if isinstance(x, np.ndarray | Tensor | dict):
            pieces = iter([self._stretch(x, targets, reset, anew=state is not None)])
        elif not isinstance(x, Iterable):
            raise DTypeError(f"truncated: x is a {type(x).__name__}.", "pass an array, or an iterable of chunks.")
        elif not (targets is None and reset is None):
            raise InputError(
                "truncated: x is an iterable, and targets or reset are given beside it.",
                "let it give tuples (x, targets) or (x, targets, reset).",
            )
        else:
            pieces = self._chunks(cast("Iterable[Any]", x))
        if state is not None:
            began = map_leaves(Tensor, state)
            self._check("given", began, self.position)
            self.reset_state()
            self._starts = [Start(self.position, began)]
        return self._windows(pieces, self._call)

    def _windows(self, pieces: Iterator[Stretch], call: int) -> Iterator[Window]:
        try:
            while True:
                if call != self._call:
                    raise InputError(
                        "truncated: this loop goes on after a newer call.", "run one loop over a stream at a time."
                    )
                wanted = self.position + self._draw()
                stop = self._held.fill(pieces, wanted)
                if stop == self.position:
                    return
                # without a name here, or it would outlive the next window's forward pass
                yield self._window(stop, short=stop < wanted)
        finally:
            if call == self._call:
                self._held.keep(self._starts[0].step, self.position)

    def _window(self, stop: int, short: bool) -> Window:
        """Run the window that ends before `stop`, and move on."""
        first = self.position
        if self._due is not None:
            self._held.mark(first, self._due)
        begun = self._further_back(stop) if short else self._starts[-1]
        start, cut = begun.step, max(begun.step, stop - (self.k2 - self.k1))
        state = between = begun.state
        outputs: list[Any] = []
        for begin, end in ((start, cut), (cut, stop)):
            if begin < end:
                y, state = self._run(begin, end, state)
                if end > first:
                    outputs.append(self._last(y, end - begin, end - max(begin, first)))
            if end == cut and start < cut:
                between = map_leaves(Tensor, state)
        state = between if cut == stop else map_leaves(Tensor, state)
        self._check(f"after step {stop - 1}", state, start)
        if cut < stop:
            self._check(f"after step {cut - 1}", between, start)
        y = outputs[0] if len(outputs) == 1 else map_leaves(self._join, *outputs)
        reach = Reach(start, first, stop, self._held.layout.rows, self._held.flags(start, stop))
        window = Window(y, self._held.targets(first, stop), start, stop, stop - first, state, reach)
        passed = [*(s for s in self._starts if s.step < start), begun, *([Start(cut, between)] if start < cut else [])]
        self._starts, self.position, self._due = self._of_use(passed, stop), stop, None
        self._held.drop(self._starts[0].step)
        self._report.add(reach)
        return window

    def _further_back(self, stop: int) -> Start:
        """Where a window starts that has fewer new steps than were asked for: k2 steps before `stop`, or earlier."""
        step = max(self._starts[0].step, stop - self.k2)
        if self._starts[-1].step <= step:
            return self._starts[-1]
        before = next(s for s in reversed(self._starts) if s.step <= step)
        if before.step == step:
            return before
        with no_grad():
            _, state = self._run(before.step, step, before.state)
        state = map_leaves(Tensor, state)
        self._check(f"after step {step - 1}", state, before.step)
        return Start(step, state)

    def _of_use(self, starts: list[Start], stop: int) -> list[Start]:
        """Those that it takes for any window that ends behind `stop`, be it of one new step."""
        earliest = stop + 1 - self.k2 if self.k1 < self.k2 else stop
        behind = sum(s.step <= earliest for s in starts)
        return starts[max(behind - 1, 0) :]

    def _run(self, begin: int, end: int, state: Any) -> tuple[Any, Any]:
        """The layer's outputs and state over a part of the stream."""
        flags = self._held.flags(begin, end)
        layout = self._held.layout
        options = {} if flags is None else {"reset": flags.T if layout.axis else flags}
        found = self.layer(self._held.inputs(begin, end), state, **options)
        if not (isinstance(found, tuple) and len(cast(Any, found)) == 2):
            raise InputError(
                f"truncated: the layer returned a {type(cast(Any, found)).__name__}, not a pair (y, state).",
                "write forward(x, state) so that it returns its outputs and the state after the last step.",
            )
        return cast("tuple[Any, Any]", found)

    def _last(self, y: Any, steps: int, count: int) -> Any:
        """The last `count` of a run's outputs."""
        axis = self._held.layout.axis
        for i, part in enumerate(flatten(y)):
            if part.shape[axis : axis + 1] != (steps,):
                raise ShapeError(
                    f"truncated: {leaf_names('y', y)[i]} has shape {part.shape} after {steps} steps.",
                    f"outputs have one entry for each step on axis {axis}, as x has.",
                )
        return y if count == steps else map_leaves(itemgetter((slice(None),) * axis + (slice(-count, None),)), y)

    def _join(self, *parts: Tensor) -> Tensor:
        return concatenate(parts, axis=self._held.layout.axis)

    def _draw(self) -> int:
        """How many new steps the next window has."""
        return new_steps(self.k1, self.jitter, self.generator or default_generator) if self.jitter else self.k1

    # ---- what comes in ------------------------------------------------------------------------------------------

    def _chunks(self, chunks: Iterable[Any]) -> Iterator[Stretch]:
        """What an iterable gives, with memory of its own: a reader may fill the same buffer again."""
        count = 0
        for count, chunk in enumerate(chunks, 1):  # noqa: B007 - how many there were
            parts: tuple[Any, ...] = cast(Any, chunk) if isinstance(chunk, tuple) else (chunk,)
            if not 1 <= len(parts) <= 3:
                raise InputError(
                    f"truncated: a chunk is a tuple of {len(parts)}.", "give x, (x, targets) or (x, targets, reset)."
                )
            yield self._stretch(*parts).copied()
        if not count:
            raise InputError("truncated: x gave no chunk.", "an iterator that was used up gives nothing: make it anew.")

    def _stretch(self, x: Any, targets: Any = None, reset: Any = None, anew: bool = False) -> Stretch:
        """A part of the stream, checked by itself and against what is carried."""
        found = stretch(x, targets, reset, bool(getattr(self.layer, "batch_first", False)))
        if found.reset is not None:
            check_takes_reset(self.layer)
        if not anew:
            self._held.check(found, self._carries)
        return found

    # ---- the state ----------------------------------------------------------------------------------------------

    @property
    def state(self) -> Any:
        """The state from which the next window starts, k2 - k1 steps before `position`; None: the layer's own.

        That at `position` itself is the last window's ``state``. A short last window starts before, if k1 < k2.
        """
        return self._starts[-1].state

    @property
    def _carries(self) -> bool:
        """Whether there is something to go on from."""
        return self.state is not None or self._starts[-1].step < self.position

    def reset_state(self, rows: npt.ArrayLike | None = None) -> None:
        """Start a new stream, in all rows or in some.

        Parameters
        ----------
        rows : sequence of int, or bools of shape (B,), optional
            Zero the state of these rows before the next step, like `reset` there; the others go on. Default: forget
            the state of all and what lies behind, so that the next step starts from the layer's own initial state.

        Raises
        ------
        InputError, ShapeError
            If there is no such row.
        """
        if rows is not None:
            self._due = self._rows(rows) if self._due is None else self._due | self._rows(rows)
            return
        self._starts, self._due = [Start(self.position, None)], None
        self._held.drop(self.position)

    def _rows(self, rows: npt.ArrayLike) -> Flags:
        count = self._held.layout.rows
        if count is None or not self._carries:
            found = "one sequence and no rows" if self._carries else "no state yet"
            raise InputError(f"reset_state: rows are given, and the stream has {found}.", "leave out rows.")
        check_takes_reset(self.layer)
        return row_flags(rows, count)

    def _check(self, when: str, state: Any, since: int) -> None:
        if self.check_state:
            check_finite(when, state, self._held.layout.rows, since)

    def state_dict(self) -> dict[str, Any]:
        """What it takes to go on exactly, from the next window: arrays and numbers, which ``tt.io.save_state`` takes.

        Returns
        -------
        dict
            "states" that windows may start from, the next one's last; "starts", the steps at which they stand;
            "position"; "rows"; "x" and "reset", the inputs from the first start to position; "due", rows to be reset
            next; "generator", if one draws. Arrays are copies.
        """
        kept = self._held.part(self._starts[0].step, self.position)
        return {
            "states": [map_leaves(Tensor.numpy, s.state) for s in self._starts],
            "starts": [s.step for s in self._starts],
            "position": self.position,
            "rows": self._held.layout.rows,
            "axis": self._held.layout.axis,
            "x": None if kept is None else kept.copied().x,
            "reset": None if kept is None or kept.reset is None else kept.reset.copy(),
            "due": None if self._due is None else self._due.copy(),
            "generator": self.generator.state() if self.jitter and self.generator else None,
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave, here or in another process. Arrays are copied.

        Raises
        ------
        InputError
            If it is not of `state_dict`, or its numbers do not fit each other. Nothing is changed then.
        """
        saved = dict(state_dict)
        wanted = self.state_dict().keys()
        if saved.keys() != wanted:
            raise InputError(
                f"load_state_dict: keys {sorted(saved)}, wanted {sorted(wanted)}.", "pass what state_dict() returned."
            )
        steps, states, position = [*saved["starts"]], map_leaves(Tensor, [*saved["states"]]), saved["position"]
        held = Held(steps[0] if steps else position, Layout(saved["axis"], saved["rows"]))
        if saved["x"] is not None:
            count = flatten(saved["x"])[0].shape[saved["axis"]]
            held.append(Stretch(saved["x"], None, saved["reset"], count, held.layout).copied())
        numbers = [0, *steps, position]
        if not steps or len(states) != len(steps) or numbers != sorted(numbers) or held.end != position:
            raise InputError(
                f"load_state_dict: starts are {steps}, position {position}, with {len(states)} states and inputs to "
                f"step {held.end}.",
                "pass what state_dict() returned.",
            )
        self._check("in the state dict", states, steps[0])
        if self.generator is not None and saved["generator"] is not None:
            self.generator.set_state(saved["generator"])
        self._call += 1
        self._starts = [Start(step, state) for step, state in zip(steps, states, strict=True)]
        self.position, self._held = position, held
        self._due = None if saved["due"] is None else np.array(saved["due"], np.bool_)

    def report(self) -> Report:
        """How many steps back the losses of all windows so far have reached."""
        return self._report.copy()


def over_time(layer: Any) -> Any:
    """What runs over time, forwards."""
    if not hasattr(layer, "__call__"):  # noqa: B004 - `callable` would narrow the type
        raise DTypeError(f"truncated: layer is a {type(layer).__name__}.", "pass a layer, a cell or a model.")
    inside = dict(layer.named_modules()) if hasattr(layer, "named_modules") else {}
    for name, module in inside.items():
        if getattr(module, "bidirectional", False) is True or getattr(module, "reverse", False) is True:
            where = f"{name}, a {type(module).__name__}," if name else f"{type(module).__name__}"
            raise InputError(
                f"truncated: {where} goes backwards in time, from the end of a stream that has not come yet.",
                "use layers in the forward direction, or run the bidirectional layer on whole sequences.",
            )
    if not hasattr(layer, "initial_state"):
        return layer
    from ..nn.recurrent import Recurrent  # nn is made from this package

    return Recurrent(layer)


def check_takes_reset(layer: Any) -> None:
    """The layer can be told to reset rows."""
    taken = signature(getattr(layer, "forward", layer)).parameters
    if "reset" not in taken and all(p.kind is not Parameter.VAR_KEYWORD for p in taken.values()):
        raise InputError(
            f"truncated: rows are to be reset, and {name_of(layer)} does not take reset.",
            "give its forward an argument reset=None, and pass it on to the recurrent layer.",
        )


def name_of(layer: Any) -> str:
    """A layer in a line."""
    options = layer.extra_repr() if hasattr(layer, "extra_repr") else ""
    return f"{type(layer).__name__}({options})" if options else getattr(layer, "__name__", type(layer).__name__)
