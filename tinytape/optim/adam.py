"""Adam and AdamW."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from ..engine.errors import InputError
from ..engine.tree import Array
from .inputs import within
from .optimizer import Group, Optimizer

__all__ = ["Adam", "AdamW"]


class Adam(Optimizer):
    """Adam: steps of about `lr`, whatever the gradient's scale.

    ::

        m = m + (1 - beta1) * (g - m)
        v = beta2 * v + (1 - beta2) * g**2
        w = w - lr * (m / (1 - beta1**t)) / (sqrt(v / (1 - beta2**t)) + eps)

    Parameters
    ----------
    params : Module, iterable of Tensor or list of dict
        See `Optimizer`.
    lr : float
        At least 0. Default 1e-3.
    betas : tuple of two floats
        How much of the running averages of g and of g**2 a step keeps, each in [0, 1). Default (0.9, 0.999).
    eps : float
        At least 0, added outside of the square root. Default 1e-8.
    weight_decay : float
        At least 0; times `w`, it is added to the gradient. Default 0.
    amsgrad : bool
        Divide by the largest `v` so far. Default False.
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
    Kingma and Ba 2015, "Adam: a method for stochastic optimization", arXiv 1412.6980; Reddi, Kale and Kumar 2018,
    "On the convergence of Adam and beyond", for AMSGrad.
    """

    kernel = ("adam", "exp_avg", "exp_avg_sq", "max_exp_avg_sq")

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 0.0, amsgrad: bool = False, *, maximize: bool = False, clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:  # fmt: skip
        defaults = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize)
        super().__init__(params, defaults, clip_norm, clip_value)

    def check(self, options: Group) -> None:
        what = type(self).__name__
        for name in ("lr", "eps", "weight_decay"):
            within(what, name, options[name], 0.0)
        betas: Any = options["betas"]
        if not hasattr(betas, "__len__") or len(betas) != 2:
            raise InputError(f"{what}: betas is {betas!r}, not two numbers.", "pass betas=(0.9, 0.999).")
        for i, beta in enumerate(betas):
            within(what, f"betas[{i}]", beta, 0.0, 1.0, ends="[)")

    def slots(self, options: Group) -> tuple[str, ...]:
        return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[: 2 + bool(options["amsgrad"])]

    def numbers(self, options: Group, step: int) -> tuple[float, ...]:
        lr = float(options["lr"])
        beta1, beta2 = (float(beta) for beta in options["betas"])
        shrink = 1.0 - lr * float(options["weight_decay"]) if self.decoupled else 1.0
        root = math.sqrt(1.0 - beta2**step)
        return (lr / (1.0 - beta1**step), shrink, 1.0 - beta1, beta2, 1.0 - beta2, root, float(options["eps"]))

    def update(self, w: Array, g: Array, s: dict[str, Array], t: Array, options: Group, step: int) -> None:
        lr, shrink, rate1, beta2, rate2, root, eps = self.numbers(options, step)
        if shrink != 1.0:
            w *= shrink
        m, v = s["exp_avg"], s["exp_avg_sq"]
        m += np.multiply(np.subtract(g, m, out=t), rate1, out=t)
        v *= beta2
        v += np.multiply(np.multiply(g, rate2, out=t), g, out=t)
        if options["amsgrad"]:
            v = np.maximum(s["max_exp_avg_sq"], v, out=s["max_exp_avg_sq"])
        np.sqrt(v, out=t)
        t /= root
        t += eps
        np.divide(m, t, out=t)
        w -= np.multiply(t, lr, out=t)


class AdamW(Adam):
    """Adam with decoupled weight decay: each step first takes ``w = w - lr * weight_decay * w``.

    Parameters as for `Adam`; `weight_decay` is 1e-2 by default.

    References
    ----------
    Loshchilov and Hutter 2019, "Decoupled weight decay regularization", arXiv 1711.05101.
    """

    decoupled = True

    def __init__(
        self, params: Any, lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8,
        weight_decay: float = 1e-2, amsgrad: bool = False, *, maximize: bool = False, clip_norm: float | None = None,
        clip_value: float | None = None,
    ) -> None:  # fmt: skip
        super().__init__(
            params, lr, betas, eps, weight_decay, amsgrad, maximize=maximize, clip_norm=clip_norm, clip_value=clip_value
        )
