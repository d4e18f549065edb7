"""Averages of weights over training."""

from __future__ import annotations

import contextlib
from collections.abc import Generator, Mapping
from typing import Any

import numpy as np

from ..engine.errors import InputError
from ..engine.tape import no_grad
from ..nn.module import Module

__all__ = ["Average"]


class Average:
    """The average of a model's weights over steps, which is often better than the last weights.

    Parameters
    ----------
    model : Module
    decay : float, optional
        Exponential: how much of the average a step keeps, in (0, 1); less in the first steps, so that the start is
        soon forgotten. Default None: the plain mean of all steps, as in averaged SGD (Polyak & Juditsky 1992).

    Examples
    --------
    >>> average = tt.train.Average(model, decay=0.999)
    >>> with tt.train.Run(folder, model, optimizer, parts={"average": average}) as run:
    ...     for x, y in run.batches(data):
    ...         run.step(loss_of(model(x), y))
    ...         average.update()
    ...     with average.applied():
    ...         run.validate(score)
    """

    def __init__(self, model: Module, decay: float | None = None) -> None:
        if decay is not None and not 0 < decay < 1:
            raise InputError(f"Average: decay is {decay!r}.", "pass a number between 0 and 1, say 0.999, or None.")
        self.model, self.decay, self.count = model, decay, 0
        self._mean = self._weights()

    def _weights(self) -> dict[str, Any]:
        return {name: p.numpy() for name, p in self.model.named_parameters()}

    def update(self) -> None:
        """Take the weights of this step in."""
        self.count += 1
        keep = 1 - 1 / self.count if self.decay is None else min(self.decay, self.count / (self.count + 10))
        for name, p in self.model.named_parameters():
            mean = self._mean[name]
            mean += (p.raw - mean) * mean.dtype.type(1 - keep)

    @contextlib.contextmanager
    def applied(self) -> Generator[None]:
        """Inside, the model has the average as its weights; before the first `update`, its own."""
        own = self._weights()
        try:
            if self.count:
                self._write(self._mean)
            yield
        finally:
            self._write(own)

    def _write(self, weights: Mapping[str, Any]) -> None:
        with no_grad():
            for name, p in self.model.named_parameters():
                p.copy_(weights[name])

    def state_dict(self) -> dict[str, Any]:
        """Copies of the averages, and of how many steps they are."""
        return {"count": self.count, "mean": {name: mean.copy() for name, mean in self._mean.items()}}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave.

        Raises
        ------
        InputError
            If it is of another model. Nothing is changed then.
        """
        mean: dict[str, Any] = state_dict.get("mean", {})
        if {name: x.shape for name, x in mean.items()} != {name: x.shape for name, x in self._mean.items()}:
            raise InputError("Average.load_state_dict: the weights are not of this model.", "use the same model.")
        self.count = state_dict["count"]
        self._mean = {name: np.array(x) for name, x in mean.items()}
