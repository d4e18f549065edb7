"""`Spike`: one training step whose gradient was far too large, kept so that it can be taken again."""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..engine.errors import DTypeError, InputError, TinytapeError
from ..engine.tape import Leaf, Storage, here, no_grad
from ..engine.tensor import Tensor, default_dtype, set_default_dtype
from ..engine.tree import Array, flatten, is_array, map_leaves, unflatten
from .clip import norm_of
from .inputs import named
from .listening import Clip, listening

__all__ = ["Heard", "Owners", "Replay", "Spike", "owners_of"]


class Owners(NamedTuple):
    """What a step changes: tensors by name, and the optimiser, if it is known."""

    tensors: dict[str, Tensor]
    optimizer: Any


def owners_of(what: str, given: Any, model: Any) -> Owners:
    """The parameters of an optimiser, or those given as optimisers take them; and all that a model has beside them."""
    optimizer = given if hasattr(given, "param_groups") else None
    pairs = [(name, p) for p, name in optimizer._names.items()] if optimizer is not None else named(given, what)
    known = {p for _, p in pairs}
    for owner in (model, given):
        if hasattr(owner, "named_buffers"):
            pairs += [(name, x) for name, x in (*owner.named_parameters(), *owner.named_buffers()) if x not in known]
            known.update(x for _, x in pairs)
    return Owners(dict(pairs), optimizer)


class Replay(NamedTuple):
    """What came of taking a step again.

    Attributes
    ----------
    norm : float or None
        The norm of the gradients; None if the step left none.
    kept : float
        What it was when the spike was kept.
    norms : dict of float
        By parameter.
    value : object
        What the step returned; the error that it ended with, if it was one of tinytape's.
    dtype : dtype or None
        What the weights and the batch were cast to.
    """

    norm: float | None
    kept: float
    norms: dict[str, float]
    value: Any
    dtype: np.dtype[Any] | None

    @property
    def same(self) -> bool:
        """Whether the norm has the same bits."""
        return self.norm is not None and (self.norm == self.kept or (math.isnan(self.norm) and math.isnan(self.kept)))

    def __str__(self) -> str:
        where = "" if self.dtype is None else f" in {self.dtype}"
        if self.norm is None:
            return f"the step left no gradients{where}; the norm was {self.kept:.9g}"
        if self.same:
            return f"the norm is {self.norm:.9g} again{where}, bit for bit"
        off = f": {abs(self.norm / self.kept - 1):.2g} off" if math.isfinite(self.norm) and self.kept else ""
        return f"the norm is {self.norm:.9g}{where}, it was {self.kept:.9g}{off}"


class Spike:
    """A step as it was before the optimiser changed anything: batch, weights, its state, and random states.

    Made by `ClipMonitor`, or from a file by `from_state_dict`.

    Attributes
    ----------
    step : int
        Which step of the monitor's it was, from 0.
    norm, median : float
        Of the gradients, and of those of the steps before.
    norms : dict of float
        By parameter.
    batch : tuple
        What the monitor was given, copied.
    weights : dict of array
        By name, as they were before the step.
    optimizer : dict or None
        The optimiser's state likewise.
    draws : list of array
        Where generators stood at the start of the step, in the order in which it first drew from them.
    """

    def __init__(
        self,
        owners: Owners,
        step: int,
        norm: float,
        median: float,
        norms: Mapping[str, float],
        batch: Any,
        weights: Mapping[str, Array],
        optimizer: dict[str, Any] | None,
        draws: Sequence[Array],
        generators: Sequence[Any],
    ) -> None:
        self._owners, self._generators = owners, list(generators)
        self.step, self.norm, self.median, self.norms = step, norm, median, dict(norms)
        self.batch, self.weights, self.optimizer, self.draws = batch, dict(weights), optimizer, list(draws)

    @staticmethod
    def keep(owners: Owners, step: int, median: float, clip: Clip, batch: Any, drawn: Mapping[Any, Array]) -> Spike:
        """Copy what it takes to take the running step again."""
        names = {p: name for name, p in owners.tensors.items()}
        return Spike(
            owners, step, clip.norm, median,
            {names.get(p, f"shape {p.shape}"): norm for p, norm in zip(clip.params, clip.norms, strict=True)},
            map_leaves(_copy, batch),
            {name: x.numpy() for name, x in owners.tensors.items()},
            owners.optimizer and owners.optimizer.state_dict(),
            list(drawn.values()), list(drawn),
        )  # fmt: skip

    def __str__(self) -> str:
        told = self.median and math.isfinite(self.norm)
        times = f", {self.norm / self.median:.3g} times the median" if told else ""
        squares = {name: norm * norm for name, norm in self.norms.items()}
        total = sum(squares.values())
        top = max(squares, key=lambda name: squares[name]) if 0 < total < math.inf else ""
        carried = f"; {top} carries {squares[top] / total:.0%} of its square" if top else ""
        return f"step {self.step}: norm {self.norm:.4g}{times}{carried}"

    # ---- taking it again --------------------------------------------------------------------------------------------

    def restore(self) -> None:
        """Put weights, the optimiser's state and generators where they stood before the step, to go on from there.

        Raises
        ------
        InputError
            If the spike was loaded without the generators that its step draws from.
        """
        if len(self._generators) < len(self.draws):
            raise InputError(
                f"restore: the step draws from {len(self.draws)} generators, of which {len(self._generators)} are "
                "known.",
                "pass them to Spike.from_state_dict(..., generators=[...]), in the order of their first draws.",
            )
        with no_grad():
            for name, x in self._owners.tensors.items():
                x.copy_(self.weights[name])
        if self._owners.optimizer is not None and self.optimizer is not None:
            self._owners.optimizer.load_state_dict(self.optimizer)
        for generator, state in zip(self._generators, self.draws, strict=True):
            generator.set_state(state)

    def replay(self, step: Callable[..., Any], dtype: npt.DTypeLike | None = None) -> Replay:
        """Call ``step(*batch)`` as it was called then, and see which norm comes out.

        Parameters
        ----------
        step : callable
            The body of the training step: forward, backward, and clipping or the optimiser's step if you like.
            Gradients are dropped before it.
        dtype : dtype, optional
            Cast weights and batch to it, say to "float64", to see whether rounding made the spike.

        Returns
        -------
        Replay
            With the same code, threads and dtype, ``replay.same`` is True: the norm has the same bits. Afterwards
            weights, gradients, the optimiser and generators are as they were before the call, so that it may stand
            in the middle of a run.

        Raises
        ------
        DTypeError
            If `dtype` is not a float dtype.
        InputError
            If the spike was loaded from a file and not all of its random states were used: see `from_state_dict`.
        """
        kind = None if dtype is None else np.dtype(dtype)
        if kind is not None and kind.kind != "f":
            raise DTypeError(f"replay: dtype is {kind}, not a float.", "pass 'float64'.")
        batch = unflatten(self.batch, [_cast(_copy(x), kind) for x in flatten(self.batch)])
        heard = Heard()
        with self._as_it_was(kind), self._drawing(), listening(heard):
            try:
                value = step(*batch)
            except TinytapeError as error:
                if heard.clip is None:
                    raise
                value = error  # an optimiser refuses gradients that are not finite
            norm, norms = self._norms(heard.clip)
        return Replay(norm, self.norm, norms, value, kind)

    def _norms(self, clip: Clip | None) -> tuple[float | None, dict[str, float]]:
        names = {p: name for name, p in self._owners.tensors.items()}
        if clip is not None:
            norms = zip(clip.params, clip.norms, strict=True)
            return clip.norm, {names.get(p, f"shape {p.shape}"): norm for p, norm in norms}
        found = {name: p.grad.raw for name, p in self._owners.tensors.items() if p.grad is not None}
        return norm_of(found.values()) if found else None, {name: norm_of([g]) for name, g in found.items()}

    @contextmanager
    def _as_it_was(self, dtype: np.dtype[Any] | None) -> Generator[None]:
        """The weights and the optimiser of the step; the present ones return untouched."""
        tensors, optimizer = self._owners.tensors, self._owners.optimizer
        was = {x: (x.raw, x.storage, x.node) for x in tensors.values()}
        attributes = ("state", "param_groups", "clip_norm", "clip_value")
        present = {} if optimizer is None else {name: getattr(optimizer, name) for name in attributes}
        was_default = default_dtype()
        try:
            if optimizer is not None and self.optimizer is not None:
                optimizer.load_state_dict(self.optimizer)
            for name, x in tensors.items():
                _place(x, _cast(self.weights[name].copy(), dtype))
            if dtype is not None:
                set_default_dtype(dtype)
            yield
        finally:
            set_default_dtype(was_default)
            for x, (raw, storage, node) in was.items():
                x.raw, x.storage, x.node = raw, storage, node
            for name, value in present.items():
                setattr(optimizer, name, value)

    @contextmanager
    def _drawing(self) -> Generator[None]:
        """Generators stand where they stood; the present states return."""
        context = here.context
        was, context.drawn = context.drawn, _Draws(self._generators, self.draws)
        drawn = context.drawn
        try:
            yield
            if drawn.used < len(self.draws):
                raise InputError(
                    f"replay: {drawn.used} of {len(self.draws)} random states were used; others are drawn from inside "
                    "tt.checkpoint, or no more.",
                    "pass the generators to Spike.from_state_dict(..., generators=[...]).",
                )
        finally:
            context.drawn = was
            for generator, state in drawn.items():
                generator.set_state(state)

    # ---- files ------------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """All of it, for ``tt.io.save_state(path, spike.state_dict())``."""
        return {
            "step": self.step, "norm": self.norm, "median": self.median, "norms": self.norms,
            "batch": self.batch, "tensors": [isinstance(x, Tensor) for x in flatten(self.batch)],
            "weights": self.weights, "optimizer": self.optimizer, "draws": self.draws,
        }  # fmt: skip

    @staticmethod
    def from_state_dict(
        state_dict: Mapping[str, Any], owner: Any, model: Any = None, generators: Iterable[Any] = ()
    ) -> Spike:
        """A spike that was saved, for an optimiser, or parameters, like those it was of.

        Parameters
        ----------
        state_dict : dict
            From ``tt.io.load_state(path)``.
        owner, model
            As for `ClipMonitor`.
        generators : iterable of Generator
            Those that the step draws from, in the order of their first draws: ``[tt.default_generator]`` if there
            is only dropout. `replay` finds them by itself where they are not drawn from inside `tt.checkpoint`.

        Raises
        ------
        InputError
            If names or shapes differ, or it is no spike.
        """
        owners = owners_of("Spike.from_state_dict", owner, model)
        keys = ("step", "norm", "median", "norms", "weights", "optimizer", "draws", "batch", "tensors")
        if missing := [key for key in keys if key not in state_dict]:
            raise InputError(
                f"Spike.from_state_dict: {', '.join(missing)} missing.", "pass what spike.state_dict() gave."
            )
        saved = dict(state_dict)
        weights: dict[str, Array] = saved["weights"]
        wrong = list(weights.keys() ^ owners.tensors.keys())
        wrong += [name for name, x in owners.tensors.items() if name in weights and weights[name].shape != x.shape]
        if wrong:
            raise InputError(
                f"Spike.from_state_dict: {', '.join(sorted(wrong))} are missing, not known here or of another shape.",
                "pass the optimiser and the model that the monitor was given.",
            )
        leaves = zip(saved.pop("tensors"), flatten(saved["batch"]), strict=True)
        saved["batch"] = unflatten(saved["batch"], [Tensor(x) if tensor else x for tensor, x in leaves])
        return Spike(owners, **saved, generators=list(generators))


class Heard:
    """Hears the first clip of a replay."""

    def __init__(self) -> None:
        self.clip: Clip | None = None

    def clipped(self, clip: Clip) -> None:
        self.clip = self.clip or clip


class _Draws(dict[Any, Any]):
    """States of generators before the replay drew from them, which puts each where it stood in the step.

    Generators that are not known are met in the order of their first draws.
    """

    def __init__(self, generators: Sequence[Any], states: Sequence[Array]) -> None:
        super().__init__()
        self.states = list(states)
        self.used = 0
        for generator in generators:
            self[generator] = generator.state()

    def __setitem__(self, generator: Any, state: Any) -> None:
        super().__setitem__(generator, state)
        if self.used < len(self.states):
            generator.set_state(self.states[self.used])
            self.used += 1


def _place(x: Tensor, raw: Array) -> None:
    """Give a tensor other memory, and a place of its own for a gradient."""
    x.raw, x.storage = raw, Storage()
    if isinstance(x.node, Leaf):
        hooks, x.node = x.node.hooks, Leaf(raw.shape, raw.dtype, x.storage)
        x.node.hooks = hooks


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Tensor(value.raw)
    return value.copy() if is_array(value) else value


def _cast(value: Any, dtype: np.dtype[Any] | None) -> Any:
    """An array or a constant Tensor of floats in another dtype."""
    raw = value.raw if isinstance(value, Tensor) else value if is_array(value) else None
    if dtype is None or raw is None or raw.dtype.kind != "f":
        return value
    return Tensor(raw, dtype=dtype) if isinstance(value, Tensor) else raw.astype(dtype)
