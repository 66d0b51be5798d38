"""The scalar functions: special values, errors in ulp, dtypes, and that loops over them become SIMD.

`pytest -m exhaustive -s tests/test_math.py` visits every float32 and prints the errors.
"""

import inspect
import math as libm
import re
from concurrent.futures import ThreadPoolExecutor

import mpmath
import numpy as np
import pytest
from exact_math import EXACT
from numba import njit
from scipy import special, stats

import numbaloss as nl
from numbaloss.kernels import math

LOOP = {"nogil": True, "fastmath": {"reassoc", "contract", "nsz"}, "error_model": "numpy"}
F32, F64 = np.float32, np.float64
INF, NAN = np.inf, np.nan

# What is promised, in ulp, by dtype: all inputs for float32, a sample for float64; times `UNFUSED`
# where products and sums are rounded by themselves.
UNFUSED = 1.25
BOUNDS = {
    "exp": (1.0, 1.0),
    "expm1": (1.7, 2.0),
    "log": (1.0, 1.5),
    "log1p": (1.6, 2.0),
    "sigmoid": (2.5, 2.5),
    "softplus": (2.0, 2.0),
    "log_sigmoid": (2.0, 2.0),
    "tanh": (2.6, 3.0),
    "sqrt": (0.5, 0.5),
    "sinh": (2.5, 2.5),
    "cosh": (1.6, 1.6),
    "log1mexp": (2.5, 2.5),
    "arcsin": (2.5, 2.5),
    "arccos": (2.5, 2.5),
    "arcsinh": (3.0, 3.0),
    "arccosh": (3.0, 3.0),
    "arctanh": (3.0, 3.0),
}
INVERSE = "arcsin", "arccos", "arcsinh", "arccosh", "arctanh"
# In float32 against float64's, in float64 against mpmath; so those of two arguments, of which `logaddexp` may
# be so many ulp of the largest of both and the result.
NORMAL = {"erfc": (5.0, 5.0), "log_ndtr": (6.0, 6.0)}
OF_TWO = {"logaddexp": (2.5, 2.5), "arctan2": (1.5, 1.5)}
# Of the gamma functions, by dtype for x > 0; then for x < 0, in ulp of the largest of 1, f(x) and f(1 - x).
GAMMA = {
    "lgamma": (3.0, 3.0, 6.0),
    "digamma": (5.0, 4.0, 8.0),
    "trigamma": (4.0, 4.0, 6.0),
    "tetragamma": (5.0, 5.0, 12.0),
}
# In float64 as truth for float32, in longdouble for float64.
TRUTH = {
    "sigmoid": lambda x: np.exp(np.minimum(x, 0)) / (1 + np.exp(-np.abs(x))),
    "softplus": lambda x: np.maximum(x, 0) + np.log1p(np.exp(-np.abs(x))),
    "log_sigmoid": lambda x: np.minimum(x, 0) - np.log1p(np.exp(-np.abs(x))),
    "log1mexp": lambda x: np.where(x < 0.5, np.log(-np.expm1(-x)), np.log1p(-np.exp(-x))),
    "erfc": special.erfc,
    "log_ndtr": special.log_ndtr,
    **{n: getattr(np, n) for n in ("exp", "expm1", "log", "log1p", "tanh", "sqrt", "sinh", "cosh", *INVERSE)},
}


@pytest.fixture(autouse=True)
def quiet():
    with np.errstate(all="ignore"):
        yield


def unary(function):
    @njit(**LOOP)
    def loop(x, out):
        for i in range(x.size):
            out[i] = function(x[i])

    return loop


def binary(function):
    @njit(**LOOP)
    def loop(x, y, out):
        for i in range(x.size):
            out[i] = function(x[i], y[i])

    return loop


UNARY = {
    name: unary(getattr(math, name))
    for name in (*BOUNDS, *GAMMA, *NORMAL, "sin", "cos", "tan", "arctan", "erf", "sign", "square", "floor")
}
BINARY = {name: binary(getattr(math, name)) for name in ("maximum", "minimum", "power", "xlogy", *OF_TWO)}


def call(name, *args):
    out = np.empty_like(args[0])
    (UNARY | BINARY)[name](*args, out)
    return out


def same(got, expected):
    """Equal in value, sign of zero and NaN."""
    return np.array_equal(got, expected, equal_nan=True) and np.array_equal(
        np.signbit(got) & ~np.isnan(got), np.signbit(expected) & ~np.isnan(expected)
    )


@njit(nogil=True, error_model="numpy")
def worst_single(got, truth):
    """Largest error of float32 results in units of the last place; inf where the kind of value is wrong."""
    worst, at = 0.0, 0
    for i in range(got.size):
        g, t = F64(got[i]), truth[i]
        if np.isnan(t) or np.isinf(t):
            e = 0.0 if g == t or (np.isnan(g) and np.isnan(t)) else INF
        elif np.isnan(g):
            e = INF
        else:
            # Infinity stands for the next number after the largest, on both sides.
            g, t = min(max(g, -(2.0**128)), 2.0**128), min(max(t, -(2.0**128)), 2.0**128)
            exponent = max(((math.bits(t) >> 52) & 0x7FF) - 1023, -126)
            e = abs(g - t) * math.unbits((1023 + 23 - exponent) << 52)
        if e > worst:
            worst, at = e, i
    return worst, at


def worst_double(got, truth):
    """The same for float64 against longdouble."""
    with np.errstate(all="ignore"):
        rounded = truth.astype(F64)
        special = ~np.isfinite(rounded) | ~np.isfinite(got)
        error = np.abs(got - truth) / np.spacing(np.abs(rounded)).astype(np.longdouble)
        error[special] = np.where((got == rounded) | (np.isnan(got) & np.isnan(rounded)), 0, INF)[special]
    at = int(np.argmax(error))
    return float(error[at]), at


THRESHOLDS = (
    *(0.0, 1e-45, 2.0**-126, 2.0**-25, 2.0**-24, 1 / 3, 0.5, 2 / 3, 0.75, 1.0, 4 / 3, 1.5, 2.0, 3.0),
    *(
        0.34657359,
        1.0397208,
        9.01,
        9.1,
        16.6,
        17.3,
        18.0,
        87.33,
        88.0,
        88.376,
        88.7228,
        89.0,
        103.97,
        104.0,
        3.4e38,
    ),
)


def stratified(dtype, mantissas):
    """Every exponent and both signs with random mantissas, and the neighbours of every threshold."""
    integer, bits = (np.int32, 23) if dtype is F32 else (np.int64, 52)
    rng = np.random.default_rng(0)
    fields = np.arange(2 ** (8 if dtype is F32 else 11), dtype=integer)[:, None] << integer(bits)
    x = (fields | rng.integers(0, 2**bits, (fields.size, mantissas), dtype=integer)).ravel().view(dtype)
    near = np.array(THRESHOLDS, dtype).view(integer)[:, None] + np.arange(-2000, 2000, dtype=integer)
    x = np.concatenate([x, np.abs(near.view(dtype)).ravel(), np.array([0, INF, NAN, 745.1, 709.78], dtype)])
    return np.concatenate([x, -x])


@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.thin(4)
def test_float32_error(name, fused):
    x = stratified(F32, 4000)
    error, at = worst_single(call(name, x), TRUTH[name](x.astype(F64)))
    assert error <= BOUNDS[name][0] * (1 if fused else UNFUSED), f"{name}({x[at]!r}): {error} ulp"


@pytest.mark.skipif(np.finfo(np.longdouble).nmant < 63, reason="longdouble is no wider than float64")
@pytest.mark.parametrize("name", BOUNDS)
@pytest.mark.thin(4)
def test_float64_error(name, fused):
    rng = np.random.default_rng(1)
    x = np.concatenate([stratified(F64, 8), rng.normal(0, 1, 30_000), rng.normal(0, 100, 20_000)])
    error, at = worst_double(call(name, x), TRUTH[name](x.astype(np.longdouble)))
    assert error <= BOUNDS[name][1] * (1 if fused else UNFUSED), f"{name}({x[at]!r}): {error} ulp"


def test_float32_error_of_the_normal_distribution(fused):
    x = stratified(F32, 2000)
    for name, (bound, _) in NORMAL.items():
        error, at = worst_single(call(name, x), TRUTH[name](x.astype(F64)))
        assert error <= bound * (1 if fused else UNFUSED), f"{name}({x[at]!r}): {error} ulp"


@pytest.mark.parametrize("name", NORMAL)
def test_float64_error_of_the_normal_distribution(name, fused):
    rng = np.random.default_rng(6)
    x = np.concatenate([rng.uniform(-3, 3, 1000), rng.uniform(-40, 40, 1000)])
    x = np.concatenate(
        [x, 10 ** rng.uniform(-9, 1, 200), -(10 ** rng.uniform(-9, 9, 400)), [-1e150, 26.6, 38.5]]
    )

    with mpmath.workdps(60):
        got = call(name, x)
        errors = np.array([ulp(g, EXACT[name](mpmath.mpf(v))) for g, v in zip(got, x, strict=True)])
    wrong = errors > NORMAL[name][1] * (1 if fused else UNFUSED)
    assert not wrong.any(), (x[wrong], errors[wrong])


def ulp(got, exact, *units):
    """The error in units in the last place of the largest of the exact number and some others."""
    if abs(exact) > 2**1023:
        return 0.0 if abs(got) > 1e308 else INF
    size = max(abs(float(exact)), *map(abs, map(float, units)), 0.0)
    return float(abs(mpmath.mpf(float(got)) - exact)) / float(np.spacing(type(got)(size)))


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", OF_TWO)
def test_error_of_functions_of_two(name, dtype, fused):
    rng = np.random.default_rng(7)
    if name == "arctan2":  # of all sizes and quarters, and those of little slope
        x = rng.choice([-1, 1], 1000) * 10 ** rng.uniform(-30, 30, 1000)
        y = x * rng.choice([-1, 1], 1000) * 10 ** rng.uniform(-4, 4, 1000)
    else:  # of all gaps, and those whose result is nearly 0
        x = rng.normal(0, 1, 1000) * 10 ** rng.uniform(-3, 3, 1000)
        y = x + rng.normal(0, 1, 1000) * 10 ** rng.uniform(-6, 2, 1000)
        near = -rng.uniform(0, 3, 1000)
        x, y = np.concatenate([x, near]), np.concatenate([y, np.log(-np.expm1(near))])
    x, y = x.astype(dtype), y.astype(dtype)
    beside = np.zeros((2, x.size)) if name == "arctan2" else (x, y)
    with mpmath.workdps(60):
        exact = [EXACT[name](mpmath.mpf(float(a)), mpmath.mpf(float(b))) for a, b in zip(x, y, strict=True)]
        rows = zip(call(name, x, y), exact, *beside, strict=True)
        errors = np.array([ulp(*row) for row in rows])
    wrong = errors > OF_TWO[name][dtype is F64] * (1 if fused else UNFUSED)
    assert not wrong.any(), (x[wrong], y[wrong], errors[wrong])


def exact_gamma(name, x):
    if name == "lgamma":
        return mpmath.re(mpmath.loggamma(x))
    return mpmath.polygamma(("digamma", "trigamma", "tetragamma").index(name), x)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", GAMMA)
@pytest.mark.thin(4)
def test_gamma_error(name, dtype, fused):
    rng = np.random.default_rng(4)
    # Zeros, and where the ways to compute change; poles on the other side.
    near = np.array([0, 1, 1.4616321449683622, 2, 2.5, 3.5, 5.5, 9, 16])[:, None]
    smallest = np.log10(np.finfo(dtype).eps)
    near = near + rng.choice([-1, 1], (9, 16)) * 10 ** rng.uniform(smallest, -0.5, (9, 16))
    x = np.concatenate([near.ravel(), -near.ravel(), rng.uniform(0, 20, 100), rng.uniform(-30, 0, 100)])
    x = np.concatenate([x, 10 ** rng.uniform(-9, 9, 100)]).astype(dtype)
    x = x[(x > 0) | (x != np.floor(x))]

    def error(x, got):
        exact = exact_gamma(name, mpmath.mpf(float(x)))
        unit = max(1, abs(exact), abs(exact_gamma(name, 1 - mpmath.mpf(float(x))))) if x < 0 else abs(exact)
        return float(abs(mpmath.mpf(float(got)) - exact)) / float(np.spacing(dtype(float(unit))))

    with mpmath.workdps(40):
        errors = np.array([error(*pair) for pair in zip(x, call(name, x), strict=True)])
    positive = GAMMA[name][0 if dtype is F32 else 1]
    wrong = errors > np.where(x > 0, positive, GAMMA[name][2]) * (1 if fused else UNFUSED)
    assert not wrong.any(), (x[wrong], errors[wrong])


@pytest.mark.exhaustive
def test_every_float32(capsys):
    chunk = 1 << 22
    names = [name for name in (*BOUNDS, *NORMAL) if name != "sqrt"]

    def visit(start):
        with np.errstate(all="ignore"):
            x = np.arange(start, start + chunk, dtype=np.uint32).view(F32)
            wide = x.astype(F64)
            found = {}
            for name in names:
                error, at = worst_single(call(name, x), TRUTH[name](wide))
                found[name] = error, x[at]
            return found

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(visit, range(0, 1 << 32, chunk)))
    worst = {name: max((f[name] for f in found), key=lambda pair: pair[0]) for name in names}
    with capsys.disabled():
        print()
        for name, (error, x) in worst.items():
            print(f"{name:12} {error:.3f} ulp at {x!r}")
    assert all(error <= (BOUNDS | NORMAL)[name][0] for name, (error, _) in worst.items())


SPECIAL = {
    "exp": [(0, 1), (-0.0, 1), (INF, INF), (-INF, 0), (800, INF), (-800, 0)],
    "expm1": [(0, 0), (-0.0, -0.0), (INF, INF), (-INF, -1), (800, INF), (-800, -1), (-1e30, -1), (1e30, INF)],
    "log": [
        (0, -INF),
        (-0.0, -INF),
        (1, 0),
        (INF, INF),
        (-INF, NAN),
        (-1, NAN),
        (-1e-40, NAN),
        (-1e-310, NAN),
    ],
    "log1p": [(0, 0), (-0.0, -0.0), (-1, -INF), (INF, INF), (-INF, NAN), (-1.5, NAN), (-1e30, NAN)],
    "sigmoid": [(0, 0.5), (-0.0, 0.5), (INF, 1), (-INF, 0), (800, 1), (-800, 0)],
    "softplus": [(INF, INF), (-INF, 0), (800, 800), (-800, 0), (1e30, 1e30)],
    "log_sigmoid": [(INF, 0), (-INF, -INF), (800, 0), (-800, -800), (-1e30, -1e30)],
    "tanh": [(0, 0), (-0.0, -0.0), (INF, 1), (-INF, -1), (30, 1), (-30, -1)],
    "sqrt": [(0, 0), (-0.0, -0.0), (4, 2), (INF, INF), (-1, NAN), (-INF, NAN)],
    "tan": [(0, 0), (-0.0, -0.0), (INF, NAN), (-INF, NAN)],
    "arcsin": [(0, 0), (-0.0, -0.0), (1, np.pi / 2), (-1, -np.pi / 2), (1.5, NAN), (-INF, NAN)],
    "arccos": [(0, np.pi / 2), (1, 0), (-1, np.pi), (1.5, NAN), (-INF, NAN), (INF, NAN)],
    "arcsinh": [(0, 0), (-0.0, -0.0), (INF, INF), (-INF, -INF)],
    "arccosh": [(1, 0), (INF, INF), (0.5, NAN), (-1, NAN), (-1e30, NAN), (-INF, NAN)],
    "arctanh": [(0, 0), (-0.0, -0.0), (1, INF), (-1, -INF), (1.5, NAN), (-INF, NAN), (1e30, NAN)],
    "sinh": [(0, 0), (-0.0, -0.0), (INF, INF), (-INF, -INF), (800, INF), (-800, -INF), (1e30, INF)],
    "cosh": [(0, 1), (-0.0, 1), (INF, INF), (-INF, INF), (-800, INF), (1e30, INF)],
    "log1mexp": [(0, -INF), (-0.0, -INF), (INF, -0.0), (800, -0.0), (1e30, -0.0), (-1, NAN), (-INF, NAN)],
    "erfc": [(0, 1), (-0.0, 1), (INF, 0), (-INF, 2), (30, 0), (-30, 2), (1e30, 0), (1e-310, 1), (-1e-45, 1)],
    "log_ndtr": [(INF, -0.0), (-INF, -INF), (1e30, -0.0), (-(2.0**63), -(2.0**125))],
    "floor": [(0, 0), (-0.0, -0.0), (-0.5, -1), (2.5, 2), (-3, -3), (INF, INF), (-INF, -INF), (1e30, 1e30)],
    "sin": [(0, 0), (-0.0, -0.0), (INF, NAN), (-INF, NAN)],
    "cos": [(0, 1), (-0.0, 1), (INF, NAN), (-INF, NAN)],
    "arctan": [(0, 0), (-0.0, -0.0), (INF, np.pi / 2), (-INF, -np.pi / 2)],
    "erf": [(0, 0), (-0.0, -0.0), (INF, 1), (-INF, -1)],
    "lgamma": [(0, INF), (-0.0, INF), (1, 0), (2, 0), (INF, INF), (-INF, INF), (-3, INF), (-1e30, INF)],
    "digamma": [(0, -INF), (-0.0, INF), (INF, INF), (-INF, NAN), (-3, NAN), (-1e30, NAN)],
    "trigamma": [(0, INF), (-0.0, INF), (INF, 0), (-3, INF)],
    "tetragamma": [(0, -INF), (-0.0, INF), (INF, -0.0)],
    "sign": [(0, 0), (3, 1), (-3, -1), (INF, 1), (-INF, -1), (1e-310, F64(1)), (1e-45, 1)],
    "square": [(0, 0), (-0.0, 0), (-3, 9), (-INF, INF)],
}
ITSELF = ("expm1", "log1p", "tanh", "sin", "arctan", "sinh", "tan", "arcsin", "arcsinh", "arctanh")


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", SPECIAL)
@pytest.mark.thin(4)
def test_special_values(name, dtype):
    # A literal below the dtype's range is another value in it.
    pairs = [(a, b) for a, b in [*SPECIAL[name], (NAN, NAN)] if a == 0 or dtype(a) != 0]
    x, expected = (np.array(column, dtype) for column in zip(*pairs, strict=True))
    assert same(call(name, x), expected)
    assert name not in (*GAMMA, *NORMAL, "log1mexp") or same(getattr(math, name)(x), expected)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", ITSELF)
def test_tiny_arguments_return_themselves(name, dtype):
    info = np.finfo(dtype)
    x = info.smallest_subnormal * np.array([1, 2, 3, 5, 1001], dtype)
    x = np.concatenate([x, info.tiny * np.array([1, 3, 1e5], dtype)])
    x = np.concatenate([x, -x])
    assert same(call(name, x), x)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", ["exp", "sigmoid", "softplus"])
def test_subnormal_results(name, dtype):
    x = np.linspace(-103.9, -88, 1000) if dtype is F32 else np.linspace(-745, -709, 1000)
    x = x.astype(dtype)
    expected = np.exp(x.astype(np.longdouble))
    assert np.max(np.abs(call(name, x) - expected)) < 1.01 * np.finfo(dtype).smallest_subnormal


SPREAD = np.array(
    [NAN, INF, -INF, 0.0, -0.0, 1, -1, 2, -2, 3, -3, 0.5, -0.5, 2.5, -7.25, 1e30, -1e30, 1e-30, 127]
)


def grid(dtype):
    x, y = np.meshgrid(SPREAD.astype(dtype), SPREAD.astype(dtype))
    return x.ravel(), y.ravel()


@pytest.mark.parametrize("dtype", [F32, F64])
def test_power(dtype):
    x, y = grid(dtype)
    got, expected = call("power", x, y), np.power(x, y)
    exact = ~np.isfinite(expected) | (expected == 0) | (np.abs(expected) == 1)
    assert same(got[exact], expected[exact])
    np.testing.assert_allclose(got[~exact], expected[~exact], rtol=np.finfo(dtype).eps)


def test_float32_power_is_correctly_rounded_but_for_ties():
    rng = np.random.default_rng(2)
    x = np.exp(rng.normal(0, 3, 200_000)).astype(F32)
    y = rng.normal(0, 8, x.size).astype(F32)
    error, at = worst_single(call("power", x, y), np.power(x.astype(F64), y.astype(F64)))
    assert error < 0.5001, (x[at], y[at])


@pytest.mark.parametrize("dtype", [F32, F64])
def test_extremes_propagate_nan(dtype):
    x, y = grid(dtype)
    assert np.array_equal(call("maximum", x, y), np.maximum(x, y), equal_nan=True)
    assert np.array_equal(call("minimum", x, y), np.minimum(x, y), equal_nan=True)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", OF_TWO)
def test_special_values_of_two(name, dtype):
    """As NumPy's at zeros, infinities and NaN: in value and sign, elsewhere to a few digits."""
    x, y = grid(dtype)
    got, expected = call(name, x, y), getattr(np, name)(x, y)
    np.testing.assert_allclose(got, expected, rtol=4 * np.finfo(dtype).eps)
    assert same(np.sign(got), np.sign(expected))


@pytest.mark.parametrize("dtype", [F32, F64])
def test_xlogy(dtype):
    x, y = grid(dtype)
    expected = np.where((x == 0) & ~np.isnan(y), 0, x.astype(F64) * np.log(y.astype(F64)))
    for got in (call("xlogy", x, y), math.xlogy(x, y)):
        np.testing.assert_allclose(got, expected, rtol=2 * np.finfo(dtype).eps)


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", [*UNARY, *BINARY])
@pytest.mark.thin(6)
def test_plain_python_agrees_and_keeps_the_dtype(name, dtype):
    rng = np.random.default_rng(3)
    function = getattr(math, name)
    args = [np.abs(rng.normal(0, 3, 50)).astype(dtype) for _ in range(1 + (name in BINARY))]
    plain = function(*args)
    assert plain.dtype == dtype
    np.testing.assert_allclose(call(name, *args), plain, rtol=50 * np.finfo(dtype).eps)
    scalar = function(*(a[0] for a in args))
    assert scalar.dtype == dtype
    np.testing.assert_allclose(scalar, plain[0], rtol=5 * np.finfo(dtype).eps)
    compiled = njit(lambda *args: function(*args))
    compiled(*(a[0] for a in args))
    assert str(compiled.nopython_signatures[0].return_type) == np.dtype(dtype).name


@njit
def mixed(x, k, flag):
    return math.exp(k), math.maximum(x, k), math.where(flag, x, k), math.isnan(x), math.where(flag, k, k)


def test_integers_and_booleans():
    assert mixed(F32(1), 3, False) == pytest.approx((np.e**3, 3, 3, False, 3))
    kinds = [str(t) for t in mixed.nopython_signatures[0].return_type]
    assert kinds == ["float64", "float32", "float32", "bool", "float64"]
    assert mixed(F32(NAN), 3, True)[3] and np.isnan(mixed(F32(NAN), 3, True)[1])
    assert math.where(True, F32(1), F32(2)) == 1 and math.isnan(F32(NAN))


VECTORISED = [*BOUNDS, *GAMMA, *NORMAL, *OF_TWO, "sign", "square", "maximum", "minimum", "power", "xlogy"]
VECTORISED += ["floor"]
LIBM = r"@(?:\w*(?:exp|log|sinh|cosh|tan|pow|sqrt|gamma|floor|erf|copysign)\w*f?)\("


@pytest.mark.parametrize("dtype", [F32, F64])
@pytest.mark.parametrize("name", VECTORISED)
@pytest.mark.thin(4)
def test_loops_become_simd_and_float32_stays_float32(name, dtype):
    if name == "power" and dtype is F64:
        pytest.skip("libm's")
    args = [np.ones(4, dtype)] * (1 + (name in BINARY))
    call(name, *args)
    loop = (UNARY | BINARY)[name]
    ir = next(
        text for types, text in loop.inspect_llvm().items() if types[0].dtype.name == np.dtype(dtype).name
    )
    assert re.search(rf"<\d+ x {'double' if dtype is F64 else 'float'}>", ir)
    assert not [call for call in re.findall(LIBM, ir) if not call.startswith("@llvm.")]
    if dtype is F32 and name != "power":
        assert "double" not in ir


class NegativeBinomial(nl.ElementwiseLoss):
    """Of counts, by the parameter that tells how they spread."""

    domains = {"input": nl.arguments.rates(), "target": nl.arguments.counts()}
    mean: float = nl.arguments.positive(3.0)

    def value(input, target, mean):
        ways = libm.lgamma(target + 1) + libm.lgamma(input) - nl.math.lgamma(input + target)
        return ways + target * nl.math.log1p(input / mean) + input * nl.math.log1p(mean / input)


@nl.elementwise_loss
def squared_digamma(input, target):
    return (nl.math.digamma(input) - target) ** 2


@nl.elementwise_loss
def in_the_tails(input, target):
    """Of most functions whose kernels call no libm."""
    a = nl.math.log_ndtr(input) + nl.math.erfc(target - input) + nl.math.log1mexp(abs(input) + 0.1)
    b = nl.math.logaddexp(input, target) + nl.math.arctan2(input, target * target + 0.1)
    c = nl.math.arcsinh(input) + nl.math.arctanh(0.9 * nl.math.tanh(target)) + nl.math.floor(target)
    return a + b * c + nl.math.sinh(0.1 * input) * nl.math.cosh(0.1 * target) + nl.math.stop_gradient(2.0)


LOSSES = NegativeBinomial.function, squared_digamma, in_the_tails


@pytest.mark.sweep
@pytest.mark.parametrize("loss", LOSSES, ids=lambda f: f.__name__)
def test_losses_of_these_functions_pass_the_general_check(loss):
    nl.testing.check_loss(loss, roundings=100)  # what the slopes of the parts cancel to


@pytest.mark.more
def test_negative_binomial_against_scipy():
    rng = np.random.default_rng(5)
    r, k, mean = rng.uniform(0.05, 40, 300), rng.poisson(3, 300), 3.0
    terms, slopes, bends = NegativeBinomial.function.value_grad_hess(r, k.astype(float), reduction="none")
    np.testing.assert_allclose(terms, -stats.nbinom.logpmf(k, r, r / (r + mean)), rtol=1e-10)
    slope = special.psi(r) - special.psi(r + k) + k / (r + mean) + np.log1p(mean / r) - mean / (r + mean)
    np.testing.assert_allclose(slopes, slope, rtol=1e-9, atol=1e-13)
    bend = special.polygamma(1, r) - special.polygamma(1, r + k) - k / (r + mean) ** 2
    np.testing.assert_allclose(bends, bend - mean**2 / (r * (r + mean) ** 2), rtol=1e-9, atol=1e-13)


READ = """
import math as libm
import numpy as np
import numbaloss as nl
from numbaloss.bench import widths

{definition}

def calls():
    x, loss = np.ones(8), {name}
    yield "", lambda: loss.value_and_grad(x.astype(np.float32), x.astype(np.float32))
    yield "", lambda: loss.value_grad_hess(x, x)

found = [widths.verdict(assembly, widths.full_width()) for _, _, assembly in widths.compiled(calls())]
print([v.complaint for v in found if v.widest])
"""


@pytest.mark.sweep
@pytest.mark.parametrize(
    ("definition", "name"),
    [(NegativeBinomial, "NegativeBinomial.function"), (in_the_tails.Class.value, "in_the_tails")],
    ids=("lgamma", "tails"),
)
def test_losses_of_these_functions_work_in_full_vectors(definition, name, python, tmp_path):
    """What the disk holds has no assembly, so that nothing may be there."""
    script = READ.format(definition=inspect.getsource(definition), name=name)
    assert python(script, NUMBA_CACHE_DIR=str(tmp_path)) == ["['', '']"]
