"""Stochastic gradient descent."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.errors import InputError
from ..engine.tree import Array
from .inputs import within
from .optimizer import Group, Optimizer

__all__ = ["SGD"]


class SGD(Optimizer):
    """Stochastic gradient descent, with momentum if wanted.

    ::

        b = momentum * b + (1 - dampening) * g        (at the first step b = g)
        w = w - lr * b                                (Nesterov: w - lr * (g + momentum * b))

    Parameters
    ----------
    params : Module, iterable of Tensor or list of dict
        See `Optimizer`.
    lr : float
        At least 0. Default 1e-3.
    momentum, weight_decay : float
        At least 0. Default 0.
    dampening : float
        Default 0.
    nesterov : bool
        Look ahead; wants momentum, and no dampening. Default False.
    maximize : bool
        Go up instead of down. Default False.
    clip_norm, clip_value : float, optional
        See `Optimizer`.

    Raises
    ------
    InputError
        If an option is out of its range, or parameters are missing or given twice.

    References
    ----------
    Sutskever, Martens, Dahl and Hinton 2013, "On the importance of initialization and momentum in deep learning",
    for Nesterov's form; as in PyTorch, the rate multiplies the velocity and is not inside it.
    """

    kernel = ("sgd", "momentum_buffer")

    def __init__(
        self, params: Any, lr: float = 1e-3, momentum: float = 0.0, dampening: float = 0.0, weight_decay: float = 0.0,
        nesterov: bool = False, *, maximize: bool = False, clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:  # fmt: skip
        defaults = dict(
            lr=lr, momentum=momentum, dampening=dampening, weight_decay=weight_decay, nesterov=nesterov,
            maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, clip_norm, clip_value)

    def check(self, options: Group) -> None:
        for name in ("lr", "momentum", "weight_decay"):
            within("SGD", name, options[name], 0.0)
        within("SGD", "dampening", options["dampening"], ends="()")
        if options["nesterov"] and (options["momentum"] == 0 or options["dampening"] != 0):
            raise InputError(
                f"SGD: nesterov with momentum {options['momentum']} and dampening {options['dampening']}.",
                "Nesterov's form needs momentum > 0 and dampening = 0.",
            )

    def slots(self, options: Group) -> tuple[str, ...]:
        return ("momentum_buffer",) if options["momentum"] else ()

    def numbers(self, options: Group, step: int) -> tuple[float, ...]:
        lr, momentum = float(options["lr"]), float(options["momentum"])
        ahead = momentum if options["nesterov"] else 0.0
        return (lr, 0.0, 1.0, ahead) if step == 1 else (lr, momentum, 1.0 - float(options["dampening"]), ahead)

    def update(self, w: Array, g: Array, s: dict[str, Array], t: Array, options: Group, step: int) -> None:
        lr, keep, fresh, ahead = self.numbers(options, step)
        direction = g
        if s:
            b = s["momentum_buffer"]
            b *= keep
            b += np.multiply(g, fresh, out=t)
            direction = np.add(np.multiply(b, ahead, out=t), g, out=t) if ahead else b
        w -= np.multiply(direction, lr, out=t)
