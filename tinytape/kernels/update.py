"""The optimisers' updates in one pass over memory, and the sums of squares that clipping wants.

All arrays are flat. A kernel takes a parameter `w`, its gradient `g`, the optimiser's slots and `c`: numbers in the
parameter's dtype, of which the first three say how the gradient is prepared and the others belong to the optimiser.
A slot that the options do not need is an empty array. The operations and their order are those of the NumPy updates
in `optim`, so that the results are the same to the last bit.
"""

# pyright: basic

from __future__ import annotations

import math

import numpy as np
from numba.extending import register_jitable

from .compiler import kernel

__all__ = ["BLOCK", "adagrad", "adam", "rmsprop", "sgd", "squares"]

BLOCK = 1 << 12
"""How many numbers a partial sum of squares covers: fixed, so that sums do not depend on the number of threads."""


@register_jitable
def _prepared(g, w, c):
    """One entry of the gradient: clipped to [-c[0], c[0]], times c[1], plus c[2] times the weight."""
    if g < -c[0]:
        g = -c[0]
    elif g > c[0]:
        g = c[0]
    g *= c[1]
    return g + w * c[2] if c[2] != 0 else g


@kernel
def sgd(w, g, momentum_buffer, c):
    """Gradient descent; c[3:]: the rate, what velocity keeps, what it takes of g, Nesterov's momentum or 0."""
    lr, keep, fresh, ahead = c[3], c[4], c[5], c[6]
    for i in range(w.size):
        x = _prepared(g[i], w[i], c)
        if momentum_buffer.size:
            b = momentum_buffer[i] * keep + x * fresh
            momentum_buffer[i] = b
            x = b * ahead + x if ahead != 0 else b
        w[i] -= x * lr


@kernel
def adam(w, g, exp_avg, exp_avg_sq, max_exp_avg_sq, c):
    """Adam; c[3:]: the rate, what decay leaves of w, 1 - beta1, beta2, 1 - beta2, the root of 1 - beta2**t, eps."""
    lr, shrink, rate1, beta2, rate2, root, eps = c[3], c[4], c[5], c[6], c[7], c[8], c[9]
    for i in range(w.size):
        x = _prepared(g[i], w[i], c)
        m = exp_avg[i] + (x - exp_avg[i]) * rate1
        v = exp_avg_sq[i] * beta2 + x * rate2 * x
        exp_avg[i], exp_avg_sq[i] = m, v
        if max_exp_avg_sq.size:
            v = max_exp_avg_sq[i] if max_exp_avg_sq[i] > v else v
            max_exp_avg_sq[i] = v
        w[i] = w[i] * shrink - m / (math.sqrt(v) / root + eps) * lr


@kernel
def rmsprop(w, g, square_avg, grad_avg, momentum_buffer, c):
    """RMSprop; c[3:]: the rate, alpha, 1 - alpha, eps, momentum."""
    lr, alpha, rate, eps, momentum = c[3], c[4], c[5], c[6], c[7]
    for i in range(w.size):
        x = _prepared(g[i], w[i], c)
        v = square_avg[i] * alpha + x * rate * x
        square_avg[i] = v
        if grad_avg.size:
            average = grad_avg[i] + (x - grad_avg[i]) * rate
            grad_avg[i] = average
            v -= average * average
            v = v - v if v < 0 else v  # 0 in v's own dtype
        x /= math.sqrt(v) + eps
        if momentum_buffer.size:
            x += momentum_buffer[i] * momentum
            momentum_buffer[i] = x
        w[i] -= x * lr


@kernel
def adagrad(w, g, total, c):
    """Adagrad; c[3:]: the rate and eps."""
    lr, eps = c[3], c[4]
    for i in range(w.size):
        x = _prepared(g[i], w[i], c)
        v = total[i] + x * x
        total[i] = v
        w[i] -= x / (math.sqrt(v) + eps) * lr


@kernel(fastmath={"reassoc", "contract"})
def squares(x, sums):
    """Write the sum of squares of each `BLOCK` of `x` to `sums`, in float64."""
    for k in range(sums.size):
        block = x[k * BLOCK : (k + 1) * BLOCK]
        total = 0.0
        for i in range(block.size):
            entry = np.float64(block[i])
            total += entry * entry
        sums[k] = total
