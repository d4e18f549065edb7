"""Polynomials and constants of the functions in `maths`, for float32 and float64.

The polynomials were fitted at the Chebyshev points of their intervals, in 100 digits, with mpmath, and stand with
their highest power first. Errors are those of the exact polynomial.

    EXP   chebyfit(lambda r: (expm1(r) - r) / r**2, [-0.3475, 0.3475], n)           7e-8 and 1e-18 of 0.5
    LOG   chebyfit(lambda z: (2 * atanh(s) - 2 * s) / s**3, [0, 0.02946], n)        2e-7 and 3e-16, s = sqrt(z)
    SIN   chebyfit(lambda u: (sin(r) - r) / r**3, [0, 0.6181], n)                   2e-8 and 2e-17, r = sqrt(u)
    COS   chebyfit(lambda u: (cos(r) - 1 + u / 2) / u**2, [0, 0.6181], n)           2e-9 and 1e-18
    NEAR  chebyfit(lambda u: erf(sqrt(u)) / sqrt(u), [0, 1], n)                     1e-9 and 7e-18
    FAR   chebyfit(lambda y: (x + 3) * exp(x * x) * erfc(x), [-1, 1], n)            6e-9 and 3e-17,
          x = 3 * (1 + y) / (1 - y)
"""

from __future__ import annotations

from typing import NamedTuple

__all__ = ["DOUBLE", "SINGLE", "Format"]


class Format(NamedTuple):
    """What the formulas need to know of one floating-point format."""

    mantissa: int  # bits of it that are stored
    bias: int  # of the exponent
    overflow: float  # the largest x with a finite exp(x)
    underflow: float  # the smallest x with a normal exp(x)
    unit: float  # tanh is 1 to the last bit from here on, and exp(-4 * unit) is nothing beside 1
    ln2: tuple[float, float]  # log(2) in two parts, the first short enough for exact products with exponents
    half_pi: tuple[float, float, float]  # pi / 2 in three parts
    turns: float  # beyond so large an angle those three parts are too few
    exp: tuple[float, ...]
    log: tuple[float, ...]
    sin: tuple[float, ...]
    cos: tuple[float, ...]
    near: tuple[float, ...]
    far: tuple[float, ...]

    @property
    def round(self) -> float:
        """Adding this to a number that is not too large leaves its nearest whole number in the lowest bits."""
        return 1.5 * 2.0**self.mantissa


# fmt: off
SINGLE = Format(
    mantissa=23, bias=127, overflow=88.72283935546875, underflow=-87.33654022216797, unit=10.0,
    ln2=(0.693145751953125, 1.428606765330187e-06),
    half_pi=(1.5707963705062866, -4.371138828673793e-08, -1.7151245100058819e-15), turns=2.0**14,
    exp=(0.001392637599580353, 0.008363333082182943, 0.04166655345865175, 0.16666576062275124, 0.5),
    log=(0.2958075040128507, 0.3998876291059419, 0.6666668508272797),
    sin=(-0.00019587387068464455, 0.008332745936380422, -0.16666664650292082),
    cos=(2.45474372101932e-05, -0.00138883006969039, 0.04166666464745738),
    near=(
        7.875875062685488e-05, -0.000801686428716587, 0.005189087423433974, -0.026854212010626412,
        0.11283594715160218, -0.37612626666720334, 1.1283791658483509,
    ),
    far=(
        2.025413201689923e-05, 6.773367487365605e-05, -0.0002666347703907909, -0.0005076097819249036,
        0.0030290836852934675, -0.0012325827531790546, -0.0268261005191854, 0.11953237679033603,
        -0.3104673577902075, 0.5902279660047566, -0.8833944518416128, 1.0740069125081804,
    ),
)

DOUBLE = Format(
    mantissa=52, bias=1023, overflow=709.782712893384, underflow=-708.3964185322641, unit=20.0,
    ln2=(0.693147180559663, 2.8235290563031577e-13),
    half_pi=(1.5707963267948966, 6.123233995736766e-17, -1.4973849048591698e-33), turns=2.0**20,
    exp=(
        2.091488256348507e-09, 2.5105490906986696e-08, 2.7557273171941026e-07, 2.7557254740405416e-06,
        2.4801587325920163e-05, 0.00019841269875342141, 0.0013888888888883642, 0.008333333333325985,
        0.04166666666666667, 0.1666666666666667, 0.5,
    ),
    log=(
        0.1461749869387011, 0.15331636699545695, 0.18182891680439733, 0.22222211099711295,
        0.28571428626190487, 0.39999999999899033, 0.666666666666667,
    ),
    sin=(
        1.5917848524808262e-10, -2.5051127944014188e-08, 2.755731608381636e-06, -0.00019841269836722418,
        0.008333333333330925, -0.16666666666666666,
    ),
    cos=(
        -1.1382456778061306e-11, 2.0876143827993133e-09, -2.7557317260008837e-07, 2.480158729874307e-05,
        -0.0013888888888887382, 0.041666666666666664,
    ),
    near=(
        -7.795898827002142e-10, 1.3720064546777686e-08, -1.6208483801871705e-07, 1.6447424703317362e-06,
        -1.492473690741966e-05, 0.00012055294904839707, -0.0008548325975389692, 0.0052239776071164225,
        -0.02686617064323777, 0.11283791670945006, -0.37612638903183543, 1.1283791670955126,
    ),
    far=(
        8.44785278432295e-10, 1.1159123899250384e-11, -8.887844891516947e-09, -3.5913611171610954e-09,
        5.166814761898454e-08, 5.001320184291237e-08, -2.3454670002624263e-07, -4.117597591893759e-07,
        9.994379361081014e-07, 2.7678112255272805e-06, -4.749391032132141e-06, -1.7471605752302332e-05,
        3.03981905221208e-05, 0.00010756178250002073, -0.0002767778482009659, -0.0005483097452477533,
        0.0030340620011959822, -0.0012124166215147798, -0.026827234624480615, 0.11952776128697859,
        -0.31046726190056667, 0.5902283571041085, -0.8833944531698836, 1.0740069070883396,
    ),
)
# fmt: on
