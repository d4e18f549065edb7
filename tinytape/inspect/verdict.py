"""What becomes of a gradient on its way back in time, in a sentence."""

from __future__ import annotations

from typing import Literal, NamedTuple

import numpy as np
import numpy.typing as npt

__all__ = ["Verdict", "judge", "number"]

Kind = Literal["vanishes", "explodes", "steady", "nothing", "not finite", "mixed"]
Logs = npt.NDArray[np.float64]
BAND = 2.0  # powers of two within which a norm is called steady
LEFT = 0.01  # of what entered: below this it is called lost


class Verdict(NamedTuple):
    """What becomes of a gradient with the lag, the number of steps that it went back.

    Attributes
    ----------
    kind : {"vanishes", "explodes", "steady", "nothing", "not finite", "mixed"}
        "steady": after all lags within a factor of four of what entered. "mixed": gradients enter at many steps, so
        that a step's norm says nothing about single lags.
    rate : float
        By what power of two the norm changes with each step back, by the median slope between lags (Theil 1950;
        Sen 1968) up to the horizon, or for what explodes up to the largest norm; NaN where there is none.
    half_life : float
        In how many steps the norm halves (or doubles, if negative); infinity for no change.
    horizon : int or None
        The last lag at which 1% was left of what the fall began with; None: it never fell below.
    text : str
    """

    kind: Kind
    rate: float
    half_life: float
    horizon: int | None
    text: str

    def __str__(self) -> str:
        return self.text


def judge(log2_norms: npt.ArrayLike) -> Verdict:
    """The verdict on norms by lag.

    Parameters
    ----------
    log2_norms : array_like
        The base-2 logarithm of the norm at lag 0, 1, 2, and so on; -inf for a norm of zero. Logarithms, since
        products of a thousand Jacobians leave the range of floats. Lags count from the first that is not zero.
    """
    y = np.asarray(log2_norms, np.float64)
    y = y[int(np.argmax(y != -np.inf)) :]  # where something arrives; NaN counts too
    broken = np.flatnonzero(np.isnan(y) | (y == np.inf))
    if broken.size:
        text = f"not finite: infinity or NaN from {_steps(int(broken[0]))} back on"
        return Verdict("not finite", np.nan, np.nan, None, text)
    if not y.size or y[0] == -np.inf:
        return Verdict("nothing", np.nan, np.nan, None, "nothing: no gradient arrives")
    if len(y) == 1:
        return Verdict("steady", np.nan, np.inf, None, "reaches one step only, so there are no lags")
    zero = next((int(lag) for lag in np.flatnonzero(y == -np.inf)), len(y))  # the first lag with nothing left
    peak = int(np.argmax(y))
    if zero == len(y) and y[-1] > y[0] + BAND:
        return _explodes(y, peak)
    humped = y[peak] > y[0] + BAND and y[-1] < y[peak] - BAND
    if zero == len(y) and y[-1] >= y[0] - BAND and not humped:
        return _steady(y)
    start = peak if humped else 0
    grown = f"grows {_times(y[start] - y[0])} times in {_steps(start)}, then " if start else ""
    level = _level(y[start:]) if zero == len(y) else None
    found = _vanishes(y[start:], zero - start) if level is None else _levels_off(y[start:], level)
    return found._replace(text=grown + found.text, horizon=_later(found.horizon, start))


def _explodes(y: Logs, peak: int) -> Verdict:
    rate = _slope(y[: peak + 1])
    times = _times(y[peak] - y[0])
    text = f"explodes: doubles every {number(1 / rate)} steps; {times} times as large after {_steps(peak)}"
    return Verdict("explodes", rate, -1 / rate, None, text)


def _steady(y: Logs) -> Verdict:
    least, most = _times(y.min() - y[0]), _times(y.max() - y[0])
    rate = _slope(y)
    text = f"steady: between {least} and {most} times its size over {_steps(len(y) - 1)}"
    return Verdict("steady", rate, _half(rate), None, text)


def _vanishes(y: Logs, zero: int) -> Verdict:
    """The norm falls to less than a quarter; it is exactly zero from lag `zero` on."""
    last = len(y) - 1
    if zero == 1:
        return Verdict("vanishes", -np.inf, 0.0, 0, "vanishes at once: exactly zero from 1 step back on")
    left = int(np.flatnonzero(y >= y[0] + np.log2(LEFT))[-1])
    horizon = left if left < last else None
    rate = _slope(y[: min(max(left, 1), zero - 1) + 1])
    parts = [f"vanishes: halves every {number(-1 / rate)} steps"]
    parts.append(_left(y[last] - y[0], last) if horizon is None else f"1% left beyond {_steps(horizon)}")
    tail = y[left + 1 :]
    if zero < len(y):
        parts.append(f"exactly zero beyond {_steps(zero - 1)}")
    elif len(tail) > 4 and abs(_slope(tail)) * 4 < -rate:
        parts.append(f"levels off at about {_percent(np.median(tail) - y[0])}")
    return Verdict("vanishes", rate, _half(rate), horizon, "; ".join(parts))


def _level(y: Logs) -> int | None:
    """The lag from which the norm keeps to a line, where it is not one line that it falls along."""
    last, middle = len(y) - 1, np.median(y)
    if last < 6 or middle < y[0] + np.log2(LEFT) or -_slope(y) * last > (y[0] - y[-1]) / 2:
        return None
    lag = int(np.flatnonzero(y <= middle + 0.5)[0])
    return lag if 0 < lag <= last // 3 else None


def _levels_off(y: Logs, lag: int) -> Verdict:
    """A fall at the beginning, and then what the rest does; it is the rest that long lags depend on."""
    rest = judge(y[lag:])
    text = f"falls to {_percent(y[lag] - y[0])} in {_steps(lag)}, then {rest.text}"
    return rest._replace(text=text, horizon=_later(rest.horizon, lag))


def _later(lag: int | None, by: int) -> int | None:
    return None if lag is None else lag + by


def _left(power: float, lag: int) -> str:
    return f"{_percent(power)} left after {_steps(lag)}"


def _percent(power: float) -> str:
    return f"{100 * 2.0**power:.2g}%"


def _half(rate: float) -> float:
    return -1 / rate if rate else np.inf


def _slope(y: Logs) -> float:
    """The median slope between points of `y`, which no plateau at one end and no single outlier can tilt."""
    at = np.unique(np.linspace(0, len(y) - 1, min(len(y), 200)).round().astype(int))
    i, j = np.triu_indices(len(at), 1)
    return float(np.median((y[at[j]] - y[at[i]]) / (at[j] - at[i])))


def _times(power: float) -> str:
    """2 to a power, which may be too large for a float."""
    return number(2.0**power) if abs(power) < 1000 else f"2^{power:.0f}"


def number(value: float) -> str:
    """Two or three digits, for a sentence."""
    if not np.isfinite(value) or value == 0:
        return f"{value:g}"
    return f"{value:.1f}" if 0.95 <= abs(value) < 99.95 else f"{value:.2g}" if abs(value) < 1 else f"{value:.3g}"


def _steps(n: int) -> str:
    return f"{n} step" if n == 1 else f"{n} steps"
