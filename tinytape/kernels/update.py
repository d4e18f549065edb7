"""The optimisers' updates in one pass over memory, and the sums of squares that clipping wants.

A kernel takes a zero of the dtype, a length `n`, and addresses: of a parameter `w`, its gradient `g`, the optimiser's
slots and `c`, numbers of which the first three say how the gradient is prepared and the others belong to the
optimiser. The address of a slot that the options do not need is 0. The operations and their order are those of the
NumPy updates in `optim`, so that the results are the same to the last bit.

Nothing is allocated, so Numba need not count references, which it could not do where it is not loaded.
"""

# pyright: basic, reportCallIssue=false

from __future__ import annotations

import math

import numpy as np
from numba.extending import register_jitable

from .compiler import kernel
from .memory import array_at

__all__ = ["adagrad", "adam", "rmsprop", "sgd", "squares"]

NUMBERS = 16  # at least as many as `c` has


@register_jitable
def _prepared(g, w, c):
    """One entry of the gradient: clipped to [-c[0], c[0]], times c[1], plus c[2] times the weight."""
    if g < -c[0]:
        g = -c[0]
    elif g > c[0]:
        g = c[0]
    g *= c[1]
    return g + w * c[2] if c[2] != 0 else g


@kernel(_nrt=False)
def sgd(zero, n, w, g, momentum_buffer, c):
    """Gradient descent; c[3:]: the rate, what velocity keeps, what it takes of g, Nesterov's momentum or 0."""
    w = array_at(zero, w, n)
    g = array_at(zero, g, n)
    momentum_buffer = array_at(zero, momentum_buffer, n)
    c = array_at(zero, c, NUMBERS)
    lr, keep, fresh, ahead = c[3], c[4], c[5], c[6]
    for i in range(w.size):
        x = _prepared(g[i], w[i], c)
        if momentum_buffer.size:
            b = momentum_buffer[i] * keep + x * fresh
            momentum_buffer[i] = b
            x = b * ahead + x if ahead != 0 else b
        w[i] -= x * lr


@kernel(_nrt=False)
def adam(zero, n, w, g, exp_avg, exp_avg_sq, max_exp_avg_sq, c):
    """Adam; c[3:]: the rate, what decay leaves of w, 1 - beta1, beta2, 1 - beta2, the root of 1 - beta2**t, eps."""
    w = array_at(zero, w, n)
    g = array_at(zero, g, n)
    exp_avg = array_at(zero, exp_avg, n)
    exp_avg_sq = array_at(zero, exp_avg_sq, n)
    max_exp_avg_sq = array_at(zero, max_exp_avg_sq, n)
    c = array_at(zero, c, NUMBERS)
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


@kernel(_nrt=False)
def rmsprop(zero, n, w, g, square_avg, grad_avg, momentum_buffer, c):
    """RMSprop; c[3:]: the rate, alpha, 1 - alpha, eps, momentum."""
    w = array_at(zero, w, n)
    g = array_at(zero, g, n)
    square_avg = array_at(zero, square_avg, n)
    grad_avg = array_at(zero, grad_avg, n)
    momentum_buffer = array_at(zero, momentum_buffer, n)
    c = array_at(zero, c, NUMBERS)
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


@kernel(_nrt=False)
def adagrad(zero, n, w, g, total, c):
    """Adagrad; c[3:]: the rate and eps."""
    w = array_at(zero, w, n)
    g = array_at(zero, g, n)
    total = array_at(zero, total, n)
    c = array_at(zero, c, NUMBERS)
    lr, eps = c[3], c[4]
    for i in range(w.size):
        x = _prepared(g[i], w[i], c)
        v = total[i] + x * x
        total[i] = v
        w[i] -= x / (math.sqrt(v) + eps) * lr


@kernel(_nrt=False, fastmath={"reassoc", "contract"})
def squares(zero, n, x, size, sums):
    """Write the sums of squares of each `size` of the n numbers at `x` to `sums`, in float64."""
    x, sums = array_at(zero, x, n), array_at(np.float64(0), sums, (n + size - 1) // size)
    for k in range(sums.size):
        block = x[k * size : (k + 1) * size]
        total = 0.0
        for i in range(block.size):
            entry = np.float64(block[i])
            total += entry * entry
        sums[k] = total
