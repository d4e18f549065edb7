"""The vector functions against NumPy in a wider format, mpmath, and the eager ops."""

import numba
import numpy as np
import pytest
from numba import njit

import tinytape as tt
from vectors import DTYPES, of, over

pytestmark = [
    pytest.mark.skipif(numba.config.DISABLE_JIT, reason="vectors exist in compiled code only"),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, about NaN and infinities in references
]

WIDER = {"float32": np.float64, "float64": np.longdouble}
needs_wider = pytest.mark.skipif(np.finfo(np.longdouble).nmant < 60, reason="long double is no wider than double")
FORMATS = ["float32", pytest.param("float64", marks=needs_wider)]


def sigmoid(x):
    t = np.exp(-np.abs(x))
    return np.where(x < 0, t, 1) / (1 + t)


def softplus(x):
    return np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x)))


# name: (reference, the error that is allowed, in units in the last place)
ONE = {
    "exp": (np.exp, 1.2),
    "exp2": (np.exp2, 1.2),
    "expm1": (np.expm1, 2),
    "log": (np.log, 1),
    "log2": (np.log2, 2),
    "log10": (np.log10, 3),
    "log1p": (np.log1p, 1.6),
    "tanh": (np.tanh, 2.2),
    "sigmoid": (sigmoid, 2.5),
    "sin": (np.sin, 2),
    "cos": (np.cos, 2),
    "tan": (np.tan, 2),
    "arcsin": (np.arcsin, 2),
    "arccos": (np.arccos, 2),
    "arctan": (np.arctan, 2),
    "sinh": (np.sinh, 3),
    "cosh": (np.cosh, 3),
    "arcsinh": (np.arcsinh, 3),
    "arccosh": (np.arccosh, 3),
    "arctanh": (np.arctanh, 3),
    "sqrt": (np.sqrt, 0.5),
    "reciprocal": (np.reciprocal, 0.5),
}


def samples(dtype, count=200_000):
    """Bit patterns at random, so all exponents; numbers of ordinary size; and the special ones."""
    rng = np.random.default_rng(7)
    info = np.finfo(dtype)
    bits = np.frombuffer(rng.bytes(count * info.dtype.itemsize), info.dtype)
    ordinary = [rng.normal(size=count // 4) * scale for scale in (0.3, 1, 10, 100)]
    near_one = 1 + rng.normal(size=count // 4) * 0.01
    return np.concatenate([bits, *ordinary, near_one, special(dtype), -special(dtype)]).astype(dtype)


def special(dtype):
    info = np.finfo(dtype)
    numbers = [0, 0.5, 1, 1.5, 2, 3, np.pi / 2, np.pi, 10, 88, 89, 104, 127.5, 128, 709, 710, 745, 1024, 1e4, 1e6, 1e10]
    numbers += [info.tiny, info.tiny / 2, info.smallest_subnormal, info.eps, info.max, np.inf, np.nan]
    numbers += list(np.arange(1, 41) * np.log(2) / 2)  # where exponents change
    return np.array(numbers, dtype)


def check(got, expected, allowed):
    """Equal NaN and infinities; elsewhere so near; zero is right for what is no normal number."""
    dtype = got.dtype
    rounded = expected.astype(dtype)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    infinite = np.isinf(rounded)
    np.testing.assert_array_equal(got[infinite], rounded[infinite])
    fine = ~np.isnan(expected) & ~infinite
    if not fine.any():
        return
    got, expected, rounded = got[fine], expected[fine], rounded[fine]
    flushed = (np.abs(expected) < np.finfo(dtype).tiny) & (got == 0)
    error = np.abs(got - expected) / np.spacing(np.abs(rounded)).astype(expected.dtype)
    error[flushed] = 0
    worst = int(np.argmax(error))
    assert error[worst] <= allowed, f"{error[worst]} units: {got[worst]!r}, not {expected[worst]!r}"


@pytest.mark.parametrize("dtype", FORMATS)
@pytest.mark.parametrize("name", ONE)
def test_accuracy(name, dtype):
    reference, allowed = ONE[name]
    x = samples(dtype)
    if name in ("sin", "cos", "tan"):
        x = np.concatenate([x, np.random.default_rng(8).uniform(-1e4, 1e4, 40_000).astype(dtype)])
    check(over(getattr(of(dtype), name), dtype)(x), reference(x.astype(WIDER[dtype])), allowed)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["exp", "expm1", "log", "log1p", "tanh", "sigmoid", "softplus", "sin", "cos"])
def test_accuracy_over_all_of_float32(name):
    reference, allowed = (softplus, 2) if name == "softplus" else ONE[name]
    function = smooth_softplus("float32") if name == "softplus" else getattr(of("float32"), name)
    run = over(function, "float32")
    for start in range(0, 2**32, 2**28):
        bits = np.arange(start, start + 2**28, 97, dtype=np.uint64).astype(np.uint32)
        x = bits.view(np.float32)
        check(run(x), reference(x.astype(np.float64)), allowed)


def smooth_softplus(dtype):
    vector_softplus = of(dtype).softplus

    @njit
    def function(x):
        return vector_softplus(x, 1.0, np.inf)

    return function


@pytest.mark.parametrize("dtype", FORMATS)
def test_accuracy_of_softplus(dtype):
    x = samples(dtype)
    check(over(smooth_softplus(dtype), dtype)(x), softplus(x.astype(WIDER[dtype])), 2)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ["erf", "erfc"])
def test_accuracy_of_the_error_function(name, dtype):
    mpmath = pytest.importorskip("mpmath")
    reference, allowed = getattr(mpmath, name), 5 if name == "erfc" else 3
    rng = np.random.default_rng(3)
    x = np.concatenate([rng.uniform(-6, 6, 1500), 10.0 ** rng.uniform(-37, 1.4, 500)]).astype(dtype)
    with mpmath.workprec(200):
        exact = [reference(mpmath.mpf(float(v))) for v in x]
        got = over(getattr(of(dtype), name), dtype)(x)
        tiny = np.finfo(dtype).tiny
        for value, true, at in zip(got, exact, x, strict=True):
            if abs(true) >= tiny or value != 0:
                unit = float(np.spacing(np.abs(value)))
                assert abs(mpmath.mpf(float(value)) - true) <= allowed * unit, (at, value, true)
    ends = over(getattr(of(dtype), name), dtype)(np.array([-np.inf, np.inf, np.nan, -100, 1e30]))
    np.testing.assert_array_equal(ends, [-1, 1, np.nan, -1, 1] if name == "erf" else [2, 0, np.nan, 2, 0])


@pytest.mark.parametrize("name", ["exp", "expm1", "log", "log1p", "tanh", "sigmoid", "log2", "sin", "cos"])
def test_float64_against_mpmath(name):
    mpmath = pytest.importorskip("mpmath")
    exact = (lambda v: 1 / (1 + mpmath.exp(-v))) if name == "sigmoid" else getattr(mpmath, name, None)
    exact = exact or (lambda v: mpmath.log(v, 2))
    rng = np.random.default_rng(11)
    x = np.concatenate([2.0 ** rng.uniform(-300, 9, 1000), rng.uniform(0, 40, 500)])
    if not name.startswith("log"):
        x = x * rng.choice([-1, 1], x.size)
    got = over(getattr(of("float64"), name), "float64")(x)
    with mpmath.workprec(700):
        for value, at in zip(got, x, strict=True):
            error = abs(mpmath.mpf(float(value)) - exact(mpmath.mpf(float(at)))) / float(np.spacing(np.abs(value)))
            assert error <= ONE[name][1], (at, value)


# ---- the same meaning as the eager ops ------------------------------------------------------------------------------

# Exact functions, to be equal to the last bit; signs of zero too.
EXACT_OF_ONE = [
    *("abs", "sign", "floor", "ceil", "square", "negative", "sqrt", "reciprocal", "relu"),
]
EXACT_OF_TWO = [
    *("maximum", "minimum", "less", "less_equal", "greater", "greater_equal", "equal", "not_equal"),
]
NEAR_OF_TWO = ["power", "arctan2", "hypot", "logaddexp"]
HERE = {"abs": "absolute"}


def numbers(dtype, seed):
    """Special numbers in all pairs (by a shift that differs by seed), and ordinary ones, whole ones among them."""
    rng = np.random.default_rng(seed)
    edges = np.concatenate([special(dtype), -special(dtype)])
    pairs = np.tile(edges, edges.size) if seed % 2 else np.repeat(edges, edges.size)
    whole = rng.integers(-9, 10, 3000)
    return np.concatenate([pairs, rng.normal(size=5000) * 5, whole]).astype(dtype)


def eager(name, *arrays):
    result = getattr(tt, name)(*map(tt.tensor, arrays)).data
    return result.astype(arrays[0].dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT_OF_ONE)
def test_exact_functions_of_one(name, dtype):
    x = numbers(dtype, 0)
    got = over(getattr(of(dtype), HERE.get(name, name)), dtype)(x)
    np.testing.assert_array_equal(got, eager(name, x))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", EXACT_OF_TWO)
def test_exact_functions_of_two(name, dtype):
    a, b = numbers(dtype, 1), numbers(dtype, 2)
    got = over(getattr(of(dtype), name), dtype, 2)(a, b)
    np.testing.assert_array_equal(got, eager(name, a, b))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NEAR_OF_TWO)
def test_functions_of_two(name, dtype):
    a, b = numbers(dtype, 1), numbers(dtype, 2)
    got = over(getattr(of(dtype), name), dtype, 2)(a, b)
    expected = eager(name, a, b)
    info = np.finfo(dtype)
    smallest = info.eps if name == "logaddexp" else 2 * info.tiny  # its sum cancels
    np.testing.assert_allclose(got, expected, rtol=8 * info.eps, atol=smallest)


def with_options(dtype):
    m = of(dtype)
    softplus, where = m.softplus, m.where
    return {
        "softplus": (lambda x: softplus(x, 2.0, 5.0), lambda x: tt.softplus(x, beta=2.0, threshold=5.0)),
        "where": (lambda x: where(x, x, -2.0), lambda x: tt.where(x != 0, x, -2.0)),
        "silu": (m.silu, tt.silu),
        "erf": (m.erf, tt.erf),
    }


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", with_options("float32"))
def test_functions_with_options(name, dtype):
    function, op = with_options(dtype)[name]
    function = function if hasattr(function, "_defn") else njit(function)
    x = np.random.default_rng(5).normal(size=5001).astype(dtype) * 4
    x = np.concatenate([x, np.array([0, np.nan, 1e-30, 30, -30], dtype)])
    expected = op(tt.tensor(x.astype(np.float64))).data
    eps = np.finfo(dtype).eps
    np.testing.assert_allclose(over(function, dtype)(x), expected, rtol=40 * eps, atol=4 * eps)
