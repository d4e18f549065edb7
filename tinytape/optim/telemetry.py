"""`ClipMonitor`: what clipping does over a run, and the steps at which gradients were far too large."""

from __future__ import annotations

import math
import os
import warnings
from array import array
from bisect import bisect_left, insort
from collections import deque
from types import TracebackType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import InputError, TapeError
from ..engine.tape import here
from .inputs import within
from .listening import Clip, listeners, listening
from .spike import Heard, Spike, owners_of

__all__ = ["ClipHistory", "ClipMonitor", "ClipWarning"]

LEAST = 20  # norms: before there are so many, nothing is called a spike
TOP = 5  # parameters in the printed table


class ClipWarning(UserWarning):
    """Clipping that never acts, or always does."""


class ClipHistory(NamedTuple):
    """One entry for each clip, in order.

    Attributes
    ----------
    step : array of int
        Which step of the monitor's.
    norm, after : array of float
        The norm of the gradients before and after.
    clipped : array of bool
        Whether it was brought down.
    """

    step: npt.NDArray[np.int64]
    norm: npt.NDArray[np.float64]
    after: npt.NDArray[np.float64]
    clipped: npt.NDArray[np.bool_]


class ClipMonitor:
    """Watches clipping: how large gradients are, how often they are clipped, which parameters carry them.

    Parameters
    ----------
    owner : Optimizer, Module, or parameters as an optimiser takes them
        Whose clips are watched, by ``clip_norm=`` or ``clip_value=`` of an optimiser or by `clip_grad_norm_` or
        `clip_grad_value_`. Of an optimiser, a spike also keeps the state.
    model : Module, optional
        So that a spike keeps buffers and frozen parameters too.
    spike : float
        A norm above so many times the median of the last `window` is a spike, and so is one that is not finite.
        Above 1; default 8.
    keep : int
        Of how many spikes, the largest, the step is kept: batch, weights, optimiser and random states. Each takes as
        much memory as these. Default 3; 0 keeps none.
    window : int
        Steps that the median and the shares are of, and after which clipping that never or always acted is warned
        of, once. Default 200.

    Attributes
    ----------
    spikes : list of Spike
        Those kept, in the order of their steps.
    spikes_seen : int

    Raises
    ------
    InputError, DTypeError
        If an option is out of its range, or `owner` is nothing of the kind.

    Warns
    -----
    ClipWarning
        At the end of the step that makes it plain.

    Examples
    --------
    >>> optimizer = tt.optim.Adam(model, clip_norm=1.0)
    >>> monitor = tt.optim.ClipMonitor(optimizer)
    >>> def train(x, y):
    ...     optimizer.zero_grad()
    ...     loss_of(model(x), y).backward()
    ...     optimizer.step()
    >>> for x, y in batches:
    ...     with monitor.step(x, y):
    ...         train(x, y)
    >>> print(monitor)
    >>> print(monitor.spikes[0].replay(train, dtype="float64"))
    """

    def __init__(self, owner: Any, model: Any = None, *, spike: float = 8.0, keep: int = 3, window: int = 200) -> None:
        self._owners = owners_of("ClipMonitor", owner, model)
        self._names = {p: name for name, p in self._owners.tensors.items()}
        self.factor = within("ClipMonitor", "spike", spike, 1.0, ends="(]")
        self.keep = int(within("ClipMonitor", "keep", keep, 0.0))
        self.window = int(within("ClipMonitor", "window", window, 1.0))
        self.spikes: list[Spike] = []
        self.spikes_seen = 0
        self.steps = 0
        self._steps, self._norms, self._after = array("q"), array("d"), array("d")
        self._recent: deque[Clip] = deque(maxlen=self.window)
        self._sorted: list[float] = []  # the recent norms that are finite
        self._acted = 0  # how many of the recent clips did
        self._warned: set[str] = set()
        self._running: _Step | None = None

    def step(self, *batch: Any) -> _Step:
        """Around a training step: ``with monitor.step(x, y): ...``.

        All that the step depends on and that changes from step to step, such as a carried state, belongs in `batch`:
        Tensors, arrays, numbers, and nests of them. It is only copied if the step is a spike. In a replay of the
        step it does nothing.
        """
        return _Step(self, batch)

    # ---- what happens in a step -------------------------------------------------------------------------------------

    def clipped(self, clip: Clip) -> None:
        """Take a clip down; clips call it inside `step`."""
        if not any(p in self._names for p in clip.params):
            return  # another optimiser's
        median = self._median()
        self._steps.append(self.steps)
        self._norms.append(clip.norm)
        self._after.append(clip.after)
        finite = math.isfinite(clip.norm)
        if not finite or (len(self._sorted) >= LEAST and clip.norm > self.factor * median > 0):
            self._spike(clip, median)
        if len(self._recent) == self.window:
            oldest = self._recent[0]
            self._acted -= _acted(oldest)
            if math.isfinite(oldest.norm):
                del self._sorted[bisect_left(self._sorted, oldest.norm)]
        self._recent.append(clip)
        self._acted += _acted(clip)
        if finite:
            insort(self._sorted, clip.norm)

    def _median(self) -> float:
        """Of the recent norms; 0 if there are none."""
        found, n = self._sorted, len(self._sorted)
        return (found[(n - 1) // 2] + found[n // 2]) / 2 if n else 0.0

    def _spike(self, clip: Clip, median: float) -> None:
        self.spikes_seen += 1
        running = self._running
        if running is None or not self.keep or any(spike.step == self.steps for spike in self.spikes):
            return
        least = min(self.spikes, key=lambda spike: (_severity(spike), -spike.step), default=None)
        if len(self.spikes) >= self.keep and least is not None:
            if _severity(clip, median) <= _severity(least):
                return
            self.spikes.remove(least)
        self.spikes.append(Spike.keep(self._owners, self.steps, median, clip, running.batch, running.drawn))

    def begun(self, step: _Step) -> None:
        """Called by `step` when it is entered."""
        if self._running is not None:
            raise TapeError("ClipMonitor.step: inside another step of the same monitor.", "leave that one first.")
        self._running = step

    def ended(self) -> str:
        """Called by `step` when it is left; says what there is to warn of."""
        self._running = None
        self.steps += 1
        if len(self._recent) < self.window or not self._recent[-1].bounded or self._acted not in (0, self.window):
            return ""
        kind = "never" if self._acted == 0 else "always"
        if kind in self._warned:
            return ""
        self._warned.add(kind)
        bound, norms = self._recent[-1].bound, [clip.norm for clip in self._recent]
        if kind == "never":
            return (
                f"clipping to {bound} did nothing in {self.window} steps; the largest norm was {max(norms):.3g}. "
                "Lower the bound, or leave it out."
            )
        high = float(np.quantile(norms, 0.9))
        return (
            f"clipping to {bound} acted in each of {self.window} steps; the median norm was {self._median():.3g}. "
            f"Every step then has the same length. Raise the bound, say to {high:.2g}, if that is not meant."
        )

    # ---- what came of it --------------------------------------------------------------------------------------------

    @property
    def history(self) -> ClipHistory:
        """Every clip so far, as arrays."""
        norm, after = np.array(self._norms), np.array(self._after)
        return ClipHistory(np.array(self._steps, np.int64), norm, after, after < norm)

    @property
    def shares(self) -> dict[str, float]:
        """Each parameter's share of the squared norm, the mean over the last `window` clips; the largest first.

        For another p-norm, of its p-th power.
        """
        sums: dict[Any, float] = {}
        clips = [clip for clip in self._recent if 0 < clip.norm < math.inf]
        for clip in clips:
            for p, norm in zip(clip.params, clip.norms, strict=True):
                sums[p] = sums.get(p, 0.0) + (norm / clip.norm) ** clip.order
        order = sorted(sums, key=lambda p: -sums[p])
        return {self._names.get(p, f"shape {p.shape}"): sums[p] / len(clips) for p in order}

    def __str__(self) -> str:
        found = self.history
        if not len(found.norm):
            return f"ClipMonitor: {self.steps} steps, none of them clipped"
        count = int(found.clipped.sum())
        rows = [
            f"{self.steps:,} steps, {count:,} clipped ({count / len(found.norm):.1%}) to {self._recent[-1].bound}",
            f"{'':<12}" + "".join(f"{name:>10}" for name in ("least", "median", "90%", "largest")),
        ]
        for name, norms in (("norm before", found.norm), ("norm after", found.after)):
            finite = norms[np.isfinite(norms)]
            cuts = np.quantile(finite, [0, 0.5, 0.9, 1]) if finite.size else [math.nan] * 4
            rows.append(f"{name:<12}" + "".join(f"{cut:>10.3g}" for cut in cuts))
        if wrong := int((~np.isfinite(found.norm)).sum()):
            rows.append(f"not finite: {wrong}")
        shares = list(self.shares.items())
        wide = max((len(name) for name, _ in shares[:TOP]), default=0)
        rows.append(f"share of the squared norm, last {len(self._recent)} clips")
        rows += [f"  {name:<{wide}}  {share:>6.1%}" for name, share in shares[:TOP]]
        if len(shares) > TOP:
            rest = f"{len(shares) - TOP} more"
            rows.append(f"  {rest:<{wide}}  {sum(share for _, share in shares[TOP:]):>6.1%}")
        rows.append(
            f"spikes, above {self.factor:g} times the median of {self.window}: {self.spikes_seen}, "
            f"kept: {len(self.spikes)}"
        )
        return "\n".join([*rows, *(f"  {spike}" for spike in self.spikes)])

    def plot(self, path: str | os.PathLike[str] | None = None, axes: Any = None) -> Any:
        """Draw the norms before and after, and the spikes, against the step.

        Parameters
        ----------
        path : path, optional
            Where to save the picture.
        axes : Axes of matplotlib, optional
            Where to draw. Default: a new figure.

        Returns
        -------
        matplotlib.figure.Figure

        Raises
        ------
        InputError
            If matplotlib is not installed.
        """
        if axes is None:
            try:
                from matplotlib.figure import Figure
            except ImportError:
                raise InputError("plot: matplotlib is not installed.", "pip install 'tinytape[models]'.") from None
            axes = Figure(figsize=(8, 4), layout="constrained").subplots()
        found = self.history
        axes.semilogy(found.step, found.norm, lw=0.8, label="before")
        axes.semilogy(found.step, found.after, lw=0.8, label="after")
        spikes = [spike for spike in self.spikes if math.isfinite(spike.norm)]
        axes.plot([spike.step for spike in spikes], [spike.norm for spike in spikes], "rx", label="kept spikes")
        axes.set(xlabel="step", ylabel="norm of the gradients")
        axes.legend()
        if path is not None:
            axes.figure.savefig(path, dpi=120)
        return axes.figure


class _Step:
    """A training step that a monitor watches."""

    def __init__(self, monitor: ClipMonitor, batch: tuple[Any, ...]) -> None:
        self.monitor, self.batch = monitor, batch
        self.drawn: dict[Any, Any] = {}
        self._listening = None if any(isinstance(x, Heard) for x in listeners()) else listening(*listeners(), monitor)

    def __enter__(self) -> None:
        if self._listening is None:
            return
        self.monitor.begun(self)
        self._listening.__enter__()
        self._outer, here.context.drawn = here.context.drawn, self.drawn

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listening is None:
            return
        here.context.drawn = self._outer
        for generator, state in self.drawn.items():
            if self._outer is not None:
                self._outer.setdefault(generator, state)
        self._listening.__exit__(None, None, None)
        warning = self.monitor.ended()
        if warning and error is None:
            warnings.warn(warning, ClipWarning, stacklevel=2)


def _acted(clip: Clip) -> bool:
    return clip.after < clip.norm


def _severity(found: Clip | Spike, median: float | None = None) -> float:
    """How many times the median a norm is; infinite if it is not finite."""
    median = found.median if isinstance(found, Spike) else median
    return found.norm / median if median and math.isfinite(found.norm) else math.inf
