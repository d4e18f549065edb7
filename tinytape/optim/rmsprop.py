"""RMSprop and Adagrad: steps divided by the root of a running sum of squares."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..engine.tree import Array
from .inputs import within
from .optimizer import Group, Optimizer

__all__ = ["Adagrad", "RMSprop"]


class RMSprop(Optimizer):
    """RMSprop: gradients divided by a running root mean square.

    ::

        v = alpha * v + (1 - alpha) * g**2
        w = w - lr * g / (sqrt(v) + eps)

    Parameters
    ----------
    params : Module, iterable of Tensor or list of dict
        See `Optimizer`.
    lr : float
        At least 0. Default 1e-2.
    alpha : float
        How much of the running average a step keeps, in [0, 1]. Default 0.99.
    eps : float
        At least 0, added outside of the square root. Default 1e-8.
    weight_decay : float
        At least 0; times `w`, it is added to the gradient. Default 0.
    momentum : float
        At least 0. If above, `w` follows ``b = momentum * b + g / (sqrt(v) + eps)``. Default 0.
    centered : bool
        Take the variance, v less the square of a running average of g, in place of v. Default False.
    maximize : bool
        Go up instead of down. Default False.
    clip_norm, clip_value : float, optional
        See `Optimizer`.

    Raises
    ------
    InputError
        If an option is out of its range, or parameters are missing or given twice.

    Notes
    -----
    Rounding can make the variance of `centered` negative. It is taken as 0 then; in PyTorch the parameter becomes
    NaN.

    References
    ----------
    Tieleman and Hinton 2012, lecture 6.5 of "Neural networks for machine learning"; Graves 2013, "Generating
    sequences with recurrent neural networks", arXiv 1308.0850, for the centred form.
    """

    kernel = ("rmsprop", "square_avg", "grad_avg", "momentum_buffer")

    def __init__(
        self, params: Any, lr: float = 1e-2, alpha: float = 0.99, eps: float = 1e-8, weight_decay: float = 0.0,
        momentum: float = 0.0, centered: bool = False, *, maximize: bool = False, clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:  # fmt: skip
        defaults = dict(
            lr=lr, alpha=alpha, eps=eps, weight_decay=weight_decay, momentum=momentum, centered=centered,
            maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, clip_norm, clip_value)

    def check(self, options: Group) -> None:
        for name in ("lr", "eps", "weight_decay", "momentum"):
            within("RMSprop", name, options[name], 0.0)
        within("RMSprop", "alpha", options["alpha"], 0.0, 1.0, ends="[]")

    def slots(self, options: Group) -> tuple[str, ...]:
        more = {"grad_avg": options["centered"], "momentum_buffer": options["momentum"]}
        return ("square_avg", *(slot for slot, wanted in more.items() if wanted))

    def numbers(self, options: Group, step: int) -> tuple[float, ...]:
        alpha = float(options["alpha"])
        return (float(options["lr"]), alpha, 1.0 - alpha, float(options["eps"]), float(options["momentum"]))

    def update(self, w: Array, g: Array, s: dict[str, Array], t: Array, options: Group, step: int) -> None:
        lr, alpha, rate, eps, momentum = self.numbers(options, step)
        v = s["square_avg"]
        v *= alpha
        v += np.multiply(np.multiply(g, rate, out=t), g, out=t)
        if options["centered"]:
            average = s["grad_avg"]
            average += np.multiply(np.subtract(g, average, out=t), rate, out=t)
            np.subtract(v, np.square(average, out=t), out=t)
            v = np.maximum(t, 0.0, out=t)
        np.sqrt(v, out=t)
        t += eps
        np.divide(g, t, out=t)
        if momentum:
            b = s["momentum_buffer"]
            b *= momentum
            b += t
            np.copyto(t, b)
        t *= lr
        w -= t


class Adagrad(Optimizer):
    """Adagrad: rates that fall with the squares of all gradients so far.

    ::

        v = v + g**2
        w = w - lr / (1 + (t - 1) * lr_decay) * g / (sqrt(v) + eps)

    Parameters
    ----------
    params : Module, iterable of Tensor or list of dict
        See `Optimizer`.
    lr : float
        At least 0. Default 1e-2.
    lr_decay, weight_decay : float
        At least 0. Default 0.
    initial_accumulator_value : float
        What `v` starts from, at least 0. Default 0.
    eps : float
        At least 0, added outside of the square root. Default 1e-10.
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
    Duchi, Hazan and Singer 2011, "Adaptive subgradient methods for online learning and stochastic optimization".
    """

    kernel = ("adagrad", "sum")

    def __init__(
        self, params: Any, lr: float = 1e-2, lr_decay: float = 0.0, weight_decay: float = 0.0,
        initial_accumulator_value: float = 0.0, eps: float = 1e-10, *, maximize: bool = False,
        clip_norm: float | None = None, clip_value: float | None = None,
    ) -> None:  # fmt: skip
        defaults = dict(
            lr=lr, lr_decay=lr_decay, weight_decay=weight_decay, initial_accumulator_value=initial_accumulator_value,
            eps=eps, maximize=maximize,
        )  # fmt: skip
        super().__init__(params, defaults, clip_norm, clip_value)

    def check(self, options: Group) -> None:
        for name in ("lr", "lr_decay", "weight_decay", "initial_accumulator_value", "eps"):
            within("Adagrad", name, options[name], 0.0)

    def slots(self, options: Group) -> tuple[str, ...]:
        return ("sum",)

    def start(self, slot: str, options: Group) -> float:
        return options["initial_accumulator_value"]

    def numbers(self, options: Group, step: int) -> tuple[float, ...]:
        return (float(options["lr"]) / (1.0 + (step - 1) * float(options["lr_decay"])), float(options["eps"]))

    def update(self, w: Array, g: Array, s: dict[str, Array], t: Array, options: Group, step: int) -> None:
        lr, eps = self.numbers(options, step)
        v = s["sum"]
        v += np.square(g, out=t)
        np.sqrt(v, out=t)
        t += eps
        np.divide(g, t, out=t)
        w -= np.multiply(t, lr, out=t)
