"""Initialisation, in place on parameters: ``nn.init.orthogonal_(lstm.weight_hh_l0)``.

Every function returns the tensor it wrote, takes ``generator=`` where it draws, and is not recorded.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np

from ..engine.errors import InputError, ShapeError
from ..engine.tape import no_grad
from ..engine.tensor import Tensor
from ..engine.tree import Array
from ..random import Generator, default_generator
from .checks import check_choice
from .module import Module, Parameter

__all__ = [
    "calculate_gain", "constant_", "forget_gate_bias_", "identity_", "kaiming_normal_", "kaiming_uniform_", "normal_",
    "ones_", "orthogonal_", "uniform_", "xavier_normal_", "xavier_uniform_", "zeros_",
]  # fmt: skip

Mode = Literal["fan_in", "fan_out"]


def _write(tensor: Tensor, values: Any) -> Tensor:
    with no_grad():
        return tensor.copy_(values)


def uniform_(tensor: Tensor, a: float = 0.0, b: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Uniform in [a, b]."""
    return _write(tensor, (generator or default_generator).uniform(tensor.shape, a, b, tensor.dtype))


def normal_(tensor: Tensor, mean: float = 0.0, std: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Normal of this mean and standard deviation."""
    return _write(tensor, (generator or default_generator).normal(tensor.shape, mean, std, tensor.dtype))


def constant_(tensor: Tensor, value: float) -> Tensor:
    """One value everywhere."""
    return _write(tensor, value)


def zeros_(tensor: Tensor) -> Tensor:
    """All 0."""
    return _write(tensor, 0.0)


def ones_(tensor: Tensor) -> Tensor:
    """All 1."""
    return _write(tensor, 1.0)


def calculate_gain(nonlinearity: str, param: float = 0.01) -> float:
    """What a nonlinearity's weights are scaled by, so that variance is kept from layer to layer.

    Parameters
    ----------
    nonlinearity : {"linear", "identity", "sigmoid", "tanh", "relu", "leaky_relu", "selu"}
    param : float
        The negative slope of "leaky_relu".
    """
    gains = {
        "linear": 1.0, "identity": 1.0, "sigmoid": 1.0, "tanh": 5 / 3, "relu": math.sqrt(2), "selu": 0.75,
        "leaky_relu": math.sqrt(2 / (1 + param * param)),
    }  # fmt: skip
    check_choice("calculate_gain", "nonlinearity", nonlinearity, tuple(gains))
    return gains[nonlinearity]


def xavier_uniform_(tensor: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Uniform with variance ``gain² · 2 / (fan_in + fan_out)`` (Glorot & Bengio 2010)."""
    bound = gain * math.sqrt(6 / sum(_fans("xavier_uniform_", tensor)))
    return uniform_(tensor, -bound, bound, generator)


def xavier_normal_(tensor: Tensor, gain: float = 1.0, generator: Generator | None = None) -> Tensor:
    """Normal with variance ``gain² · 2 / (fan_in + fan_out)`` (Glorot & Bengio 2010)."""
    return normal_(tensor, 0.0, gain * math.sqrt(2 / sum(_fans("xavier_normal_", tensor))), generator)


def kaiming_uniform_(
    tensor: Tensor,
    a: float = 0.0,
    mode: Mode = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Tensor:
    """Uniform with variance ``gain² / fan`` (He et al. 2015); `a` is the slope of "leaky_relu"."""
    bound = math.sqrt(3) * _kaiming_std("kaiming_uniform_", tensor, a, mode, nonlinearity)
    return uniform_(tensor, -bound, bound, generator)


def kaiming_normal_(
    tensor: Tensor,
    a: float = 0.0,
    mode: Mode = "fan_in",
    nonlinearity: str = "leaky_relu",
    generator: Generator | None = None,
) -> Tensor:
    """Normal with variance ``gain² / fan`` (He et al. 2015); `a` is the slope of "leaky_relu"."""
    return normal_(tensor, 0.0, _kaiming_std("kaiming_normal_", tensor, a, mode, nonlinearity), generator)


def orthogonal_(tensor: Tensor, gain: float = 1.0, generator: Generator | None = None, *, gates: int = 1) -> Tensor:
    """`gain` times a random matrix with orthonormal rows or columns, whichever are fewer (Saxe et al. 2014).

    A tensor of more than two axes is taken as the matrix ``(shape[0], everything else)``.

    Parameters
    ----------
    tensor : Tensor
    gain : float
        Default 1.
    generator : Generator, optional
    gates : int
        As how many matrices, one under the other, to draw it: the ``weight_hh`` of an LSTM is 4. Default 1.

    Raises
    ------
    ShapeError
        If the tensor has fewer than two axes, or its rows cannot be divided by `gates`.
    """
    _fans("orthogonal_", tensor)
    if gates < 1 or tensor.shape[0] % gates:
        raise ShapeError(
            f"orthogonal_: {tensor.shape[0]} rows cannot be divided into {gates} gates.", "an LSTM has 4, a GRU 3."
        )
    rows = tensor.shape[0] // gates
    columns = tensor.size // max(tensor.shape[0], 1)
    drawn = [_orthogonal(rows, columns, generator or default_generator) for _ in range(gates)]
    return _write(tensor, gain * np.concatenate(drawn).reshape(tensor.shape))


def _orthogonal(rows: int, columns: int, generator: Generator) -> Array:
    tall = generator.normal((max(rows, columns), min(rows, columns)), dtype=np.float64)
    q, r = np.linalg.qr(tall)
    q *= np.sign(np.diagonal(r))  # without this the matrices are not uniformly distributed (Mezzadri 2007)
    return q if rows >= columns else q.T


def identity_(tensor: Tensor, scale: float = 1.0) -> Tensor:
    """`scale` times the identity matrix: for the recurrent weight of a ReLU network (Le, Jaitly & Hinton 2015)."""
    if tensor.ndim != 2:
        raise ShapeError(f"identity_: the tensor has shape {tensor.shape}.", "pass a matrix.")
    return _write(tensor, scale * np.eye(tensor.shape[0], tensor.shape[1]))


def forget_gate_bias_(lstm: Module, value: float = 1.0) -> Module:
    """Set the forget gates' bias, so that an untrained LSTM remembers (Gers et al. 2000, Jozefowicz et al. 2015).

    The bias is a sum of two: that of the input is set to `value`, that of the state to 0.

    Parameters
    ----------
    lstm : LSTM or LSTMCell
    value : float
        Default 1. Chrono initialisation (Tallec & Ollivier 2018) would use log(T).

    Returns
    -------
    Module
        `lstm` itself.

    Raises
    ------
    InputError
        If the module is no LSTM, or has no bias.
    """
    found = vars(lstm).items()
    biases = [(n, p) for n, p in found if n.startswith(("bias_ih", "bias_hh")) and isinstance(p, Parameter)]
    size = getattr(lstm, "hidden_size", 0)
    if not biases or any(bias.shape != (4 * size,) for _, bias in biases):
        raise InputError(
            f"forget_gate_bias_: {type(lstm).__name__} has no LSTM biases.", "pass an LSTM or LSTMCell with bias=True."
        )
    with no_grad():
        for name, bias in biases:  # gates in the order i, f, g, o
            bias[size : 2 * size] = value if name.startswith("bias_ih") else 0.0
    return lstm


def _fans(what: str, tensor: Tensor) -> tuple[int, int]:
    """How many inputs one output has, and how many outputs one input has; 1 for an empty tensor."""
    if tensor.ndim < 2:
        raise ShapeError(f"{what}: the tensor has shape {tensor.shape}, so no fan.", "pass one of two or more axes.")
    inner = math.prod(tensor.shape[2:])
    return max(1, tensor.shape[1] * inner), max(1, tensor.shape[0] * inner)


def _kaiming_std(what: str, tensor: Tensor, a: float, mode: str, nonlinearity: str) -> float:
    check_choice(what, "mode", mode, ("fan_in", "fan_out"))
    fan = _fans(what, tensor)[mode == "fan_out"]
    return calculate_gain(nonlinearity, a) / math.sqrt(fan)
