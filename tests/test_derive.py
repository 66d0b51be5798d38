"""Derivatives of anyone's functions, against mpmath's and worked by hand."""

import math
from functools import cache

import numpy as np
import pytest
from exact_math import POINTS, all_derivatives
from mpmath import mp
from numba import float64, njit, prange, vectorize

import numbaloss as nl

SCALE = 3.0


@njit
def squared(x):
    return x * x


def bell(x, mean=0.5, width=2.0):
    """A probability density, with a function that is compiled already."""
    return nl.math.exp(-0.5 * squared((x - mean) / width)) / (width * math.sqrt(2 * math.pi))


def branches(x, y):
    if x > y:
        return SCALE * x * y
    return x * x / y


def everything(x, y, z):
    power = nl.math.power(x, y) / (1 + nl.math.sqrt(abs(z * x)))
    return power + nl.math.maximum(x, z) * y**3 - nl.math.log(x + z) * nl.math.tanh(y)


def everything_exactly(x, y, z):
    return x**y / (1 + mp.sqrt(abs(z * x))) + max(x, z) * y**3 - mp.log(x + z) * mp.tanh(y)


def bell_exactly(x, mean, width):
    return mp.exp(-(((x - mean) / width) ** 2) / 2) / (width * mp.sqrt(2 * mp.pi))


def derivative(function, point, *orders):
    with mp.workdps(60):
        return float(mp.diff(function, tuple(mp.mpf(p) for p in point), orders))


@pytest.mark.parametrize(
    ("function", "exactly", "point"),
    [
        (bell, bell_exactly, (0.7, 0.2, 1.3)),
        (everything, everything_exactly, (1.3, 0.7, 2.0)),
        (everything, everything_exactly, (2.5, -1.25, 0.75)),
    ],
)
@pytest.mark.thin(3)
def test_gradient_and_hessian(function, exactly, point):
    value, gradient, hessian = nl.derive(function, order=2)(*point)
    assert nl.derive(function)(*point) == (value, gradient)
    np.testing.assert_allclose(value, float(exactly(*map(mp.mpf, point))), rtol=1e-14)
    one = np.eye(3, dtype=int)
    expected = [derivative(exactly, point, *map(int, e)) for e in one]
    np.testing.assert_allclose(gradient, expected, rtol=1e-13, atol=1e-14)
    expected = [[derivative(exactly, point, *map(int, a + b)) for b in one] for a in one]
    np.testing.assert_allclose(hessian, expected, rtol=1e-12, atol=1e-13)


def test_mixed_derivatives_keep_their_digits_beside_large_ones():
    """No difference of second derivatives: those by one variable are 2e30 here, and 6e25."""
    _, gradient, hessian = nl.derive(lambda x, y: 1e30 * x * x + x * y + y**3 * 1e25, order=2)(0.25, 1.0)
    assert hessian[0][1] == hessian[1][0] == 1 and hessian[0][0] == 2e30
    np.testing.assert_allclose(gradient, (5e29, 3e25), rtol=1e-15)


def as_row(found):
    """Value, gradient and the upper half of the Hessian."""
    value, gradient, hessian = found
    return [value, *gradient, *(h for i, row in enumerate(hessian) for h in row[i:])]


@cache
def derived_of(name):
    function = getattr(nl.math, name)
    two = name in ("logaddexp", "arctan2")
    return nl.derive((lambda x, y: function(x, y)) if two else (lambda x: function(x)), order=2)


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", POINTS)
@pytest.mark.thin(6)
def test_functions_of_the_library(name, dtype):
    """Each number to its own last digits, in the tails too."""
    info = np.finfo(dtype)
    for point in POINTS[name]:
        at = tuple(map(dtype, point))
        wanted = np.array(all_derivatives(name, at))
        wanted[np.abs(wanted) < info.smallest_normal] = 0
        found = as_row(derived_of(name)(*at))
        np.testing.assert_allclose(found, wanted, 12 * info.eps, info.smallest_normal, err_msg=f"{at}")


INF, NAN = np.inf, np.nan
HALF = [0.5, 0.5, 0.25, -0.25, 0.25]
EDGES = {
    "exp": [((100.0,), [INF, INF, INF]), ((-INF,), [0, 0, 0])],
    "expm1": [((100.0,), [INF, INF, INF]), ((-INF,), [-1, 0, 0])],
    "erf": [((INF,), [1, 0, 0]), ((-INF,), [-1, 0, 0])],
    "arctan": [((INF,), [math.pi / 2, 0, 0]), ((-1e30,), [-math.pi / 2, 0, 0])],
    "erfc": [
        ((INF,), [0, 0, 0]),
        ((-INF,), [2, 0, 0]),
        ((1e30,), [0, 0, 0]),
    ],
    "log_ndtr": [
        ((INF,), [0, 0, 0]),
        ((-INF,), [-INF, INF, -1]),
        ((-1e15,), [-5e29, 1e15, -1]),
    ],
    "log1mexp": [
        ((INF,), [0, 0, 0]),
        ((1e30,), [0, 0, 0]),
        ((0.0,), [-INF, INF, -INF]),
        ((1e-36,), [math.log(1e-36), 1e36, -INF]),  # of float32
    ],
    "sinh": [
        ((INF,), [INF, INF, INF]),
    ],
    "cosh": [
        ((-INF,), [INF, -INF, INF]),
    ],
    "arcsin": [((1.0,), [math.pi / 2, INF, INF])],
    "arcsinh": [((-INF,), [-INF, 0, 0]), ((3e25,), [math.log(6e25), 1 / 3e25, 0])],
    "arccosh": [((INF,), [INF, 0, 0]), ((1.0,), [0, INF, -INF])],
    "arctanh": [((-1.0,), [-INF, INF, -INF])],
    "logaddexp": [
        ((INF, INF), [INF, *HALF]),
        ((-INF, -INF), [-INF, *HALF]),
        ((INF, -INF), [INF, 1, 0, 0, 0, 0]),
        ((-INF, 3.0), [3, 0, 1, 0, 0, 0]),
        ((NAN, 3.0), [NAN] * 6),
    ],
    "arctan2": [
        ((0.0, 0.0), [0, 0, 0, 0, 0, 0]),
        ((-0.0, -0.0), [-math.pi, 0, 0, 0, 0, 0]),
        ((INF, INF), [math.pi / 4, 0, 0, 0, 0, 0]),
        ((1.0, -INF), [math.pi, 0, 0, 0, 0, 0]),
        ((1.0, NAN), [NAN] * 6),
        ((3e30, 3e30), [math.pi / 4, 1 / 6e30, -1 / 6e30, 0, 0, 0]),  # of float32: squares overflow
        ((3e-30, 3e-30), [math.pi / 4, 1 / 6e-30, -1 / 6e-30, -INF, 0, INF]),
    ],
    "floor": [
        ((-2.5,), [-3, 0, 0]),
        ((INF,), [INF, 0, 0]),
    ],
    "stop_gradient": [
        ((-2.5,), [-2.5, 0, 0]),
    ],
}


@pytest.mark.parametrize("name", EDGES)
@pytest.mark.thin(6)
def test_functions_of_the_library_at_edges(name):
    """No NaN of infinity times 0, or of infinity less infinity."""
    for point, wanted in EDGES[name]:
        found = as_row(derived_of(name)(*map(np.float32, point)))
        np.testing.assert_allclose(found, wanted, rtol=1e-6, atol=1e-37, err_msg=f"{point}")


@pytest.mark.more
def test_functions_by_the_names_of_numpy_and_python():
    def ours(x, y):
        a = nl.math.logaddexp(x, y) + nl.math.arctan2(y, x) * nl.math.erfc(x) + nl.math.floor(y)
        return a + nl.math.sinh(x) * nl.math.cosh(y) + nl.math.arctan2(x, 2.0) + nl.math.logaddexp(1, y)

    def theirs(x, y):
        a = np.logaddexp(x, y) + math.atan2(y, x) * math.erfc(x) + math.floor(y)
        return a + np.sinh(x) * math.cosh(y) + np.arctan2(x, 2.0) + np.logaddexp(1, y)

    found = as_row(nl.derive(theirs, order=2)(0.3, 1.7))
    assert found == as_row(nl.derive(ours, order=2)(0.3, 1.7))
    assert found[0] == pytest.approx(theirs(0.3, 1.7), rel=1e-14)


def test_what_is_stopped_is_a_constant():
    derived = nl.derive(lambda x, y: x * nl.math.stop_gradient(x * y) + nl.math.floor(x) * y, order=2)
    assert derived(2.5, 3.0) == (24.75, (7.5, 2.0), ((0.0, 0.0), (0.0, 0.0)))


def censored(y, mean, scale, limit=2.0):
    """The log-likelihood of a normal distribution, of which all beyond a limit is seen as the limit."""
    if y >= limit:
        return nl.math.log_ndtr((mean - limit) / scale)
    z = (y - mean) / scale
    return -0.5 * z * z - math.log(scale) - 0.5 * math.log(2 * math.pi)


def censored_exactly(y, mean, scale):
    if y >= 2:
        return mp.log(mp.erfc((2 - mean) / scale / mp.sqrt(2)) / 2)
    return -(((y - mean) / scale) ** 2) / 2 - mp.log(scale) - mp.log(2 * mp.pi) / 2


@pytest.mark.more
def test_jacobian_and_hessian_of_a_distribution_in_compiled_code():
    """As https://github.com/numba/numba/issues/8565 asks: of functions from `math`, through an ``if``."""
    derived = nl.derive(censored, order=2)

    @njit
    def summed(y, mean, scale):
        value, slopes, bends = 0.0, np.zeros(2), np.zeros((2, 2))
        for i in range(y.size):
            v, g, h = derived(y[i], mean, scale)
            value += v
            for j in range(2):
                slopes[j] += g[j + 1]
            bends[0, 0] += h[1][1]
            bends[0, 1] += h[1][2]
            bends[1, 0] += h[2][1]
            bends[1, 1] += h[2][2]
        return value, slopes, bends

    y = np.array([-1.0, 0.25, 1.9, 2.0, 3.0])
    for point in ((0.3, 1.2), (-20.0, 0.5)):  # the second lies 44 deviations from the limit
        value, slopes, bends = summed(y, *point)

        def total(mean, scale):
            return sum(censored_exactly(mp.mpf(v), mean, scale) for v in y)

        assert value == pytest.approx(derivative(total, point, 0, 0), rel=1e-14)
        wanted = [derivative(total, point, 1, 0), derivative(total, point, 0, 1)]
        np.testing.assert_allclose(slopes, wanted, rtol=1e-13)
        mixed = derivative(total, point, 1, 1)
        wanted = [[derivative(total, point, 2, 0), mixed], [mixed, derivative(total, point, 0, 2)]]
        np.testing.assert_allclose(bends, wanted, rtol=1e-12)


def test_branches_and_constants():
    derived = nl.derive(branches, order=2)
    assert derived(2.0, 1.0) == (6.0, (3.0, 6.0), ((0.0, 3.0), (3.0, 0.0)))
    assert derived(1.0, 2.0) == (0.5, (1.0, -0.25), ((1.0, -0.5), (-0.5, 0.25)))
    assert nl.derive(lambda x, y: 5.0)(1.0, 2.0) == (5.0, (0.0, 0.0))
    assert nl.derive(lambda x: x**3)(2) == (8.0, (12.0,))
    assert nl.derive(lambda x: x**3, order=2)(2) == (8.0, (12.0,), ((12.0,),))


def test_roots_of_squares_have_no_slope_at_zero():
    value, gradient, hessian = nl.derive(lambda x, y: nl.math.sqrt(x * x) + y, order=2)(0.0, 1.0)
    assert (value, gradient) == (1.0, (0.0, 1.0)) and hessian[1] == (0.0, 0.0)


@pytest.mark.more
def test_float32_stays_float32():
    derived = nl.derive(everything)
    single, double = (derived(*map(t, (1.3, 0.7, 2.0)))[1] for t in (np.float32, np.float64))
    np.testing.assert_allclose(single, double, rtol=1e-5)
    assert single != double
    assert [s for s in derived.signatures if str(s[0]) == "float32"]


def test_defaults_and_names():
    derived = nl.derive(bell)
    assert derived(0.7) == derived(0.7, 0.5, 2.0) == derived(0.7, width=2.0, mean=0.5)


def test_in_compiled_code():
    derived = nl.derive(branches)
    density = nl.derive(njit(bell))

    @njit(parallel=True)
    def slopes(x, y):
        out = np.empty_like(x)
        for i in prange(x.size):
            out[i] = derived(x[i], y)[1][0]
        return out

    @vectorize([float64(float64)])
    def slope(x):
        return density(x)[1][0]

    np.testing.assert_array_equal(slopes(np.array([0.5, 1.0, 2.0]), 1.0), [1.0, 2.0, 3.0])
    x = np.linspace(-3, 3, 7)
    expected = [derivative(bell_exactly, (v, 0.5, 2.0), 1, 0, 0) for v in x]
    np.testing.assert_allclose(slope(x), expected, rtol=1e-13)


def test_newton_finds_a_minimum():
    derived = nl.derive(lambda x, y: (1 - x) ** 2 + 100 * (y - x * x) ** 2, order=2)

    @njit
    def minimum(x, y):
        for _ in range(20):
            _, g, h = derived(x, y)
            d = h[0][0] * h[1][1] - h[0][1] * h[1][0]
            x, y = x - (h[1][1] * g[0] - h[0][1] * g[1]) / d, y - (h[0][0] * g[1] - h[1][0] * g[0]) / d
        return x, y

    assert minimum(-1.2, 1.0) == (1.0, 1.0)


def test_errors():
    with pytest.raises(ValueError, match="^derive: order must be 1 or 2, got 3"):
        nl.derive(bell, order=3)
    with pytest.raises(TypeError, match="^derive: function must be a Python function, got int"):
        nl.derive(3)
    with pytest.raises(TypeError, match="^derive: function must be a Python function, got builtin"):
        nl.derive(math.exp)
    with pytest.raises(TypeError, match="^derive: function must take at least one number"):
        nl.derive(lambda: 1.0)
    with pytest.raises(TypeError, match="^derive: function must take its arguments by position, got rest"):
        nl.derive(lambda x, *rest: x)
    with pytest.raises(TypeError, match="takes at most 10 arguments"):
        nl.derive(lambda a, b, c, d, e, f, g, h, i, j, k: a)
    with pytest.raises(Exception, match="takes numbers, not array"):
        nl.derive(branches)(np.zeros(3), 1.0)
