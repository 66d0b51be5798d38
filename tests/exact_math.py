"""Functions of numbers in mpmath, and their derivatives by its differences of sixty digits and more."""

from mpmath import mp


def log_ndtr(x):
    tail = mp.erfc(abs(x) / mp.sqrt(2)) / 2
    return mp.log(tail) if x < 0 else mp.log1p(-tail)


EXACT = {
    "erfc": mp.erfc,
    "log_ndtr": log_ndtr,
    "log1mexp": lambda x: mp.log(-mp.expm1(-x)),
    "sinh": mp.sinh,
    "cosh": mp.cosh,
    "tan": mp.tan,
    "arcsin": mp.asin,
    "arccos": mp.acos,
    "arcsinh": mp.asinh,
    "arccosh": mp.acosh,
    "arctanh": mp.atanh,
    "logaddexp": lambda x, y: mp.log(mp.exp(x) + mp.exp(y)),
    "arctan2": mp.atan2,
}
# Where they are hard: near 0 and zeros, in both tails.
POINTS = {
    "erfc": [(0.0,), (1e-9,), (-0.3,), (0.5,), (2.0,), (-4.0,), (8.5,)],
    "log_ndtr": [(0.0,), (-1e-7,), (0.7,), (-0.8,), (5.0,), (12.5,), (-6.0,), (-37.5,), (-3000.0,), (-1e5,)],
    "log1mexp": [(1e-12,), (1e-3,), (0.69314,), (0.6932,), (3.0,), (80.0,)],
    "sinh": [(1e-9,), (-0.3,), (2.0,), (-30.0,), (85.0,)],
    "cosh": [(1e-9,), (-0.3,), (2.0,), (-30.0,), (85.0,)],
    "tan": [(1e-9,), (0.8,), (-1.5,)],
    "arcsin": [(1e-9,), (-0.3,), (0.75,), (-0.999,)],
    "arccos": [(1e-9,), (-0.3,), (0.75,), (-0.999,)],
    "arcsinh": [(1e-9,), (-0.3,), (0.75,), (-30.0,), (1e12,)],
    "arccosh": [(1.001,), (1.5,), (30.0,), (1e12,)],
    "arctanh": [(1e-9,), (-0.3,), (0.75,), (-0.999,)],
    "logaddexp": [(0.0, 0.0), (3.0, -2.0), (-50.0, -10.0), (1e4, 1e4 + 1), (0.25, 20.0)],
    "arctan2": [(1.0, 2.0), (-3.0, 0.5), (0.25, -8.0), (-1e-3, -1e3), (0.0, 2.0), (5.0, 0.0), (2e9, 1e9)],
}


def all_derivatives(name, point):
    """The value, the gradient and the upper half of the Hessian, as floats."""
    function, count = EXACT[name], len(point)
    with mp.workdps(100):
        at = tuple(map(mp.mpf, map(float, point)))

        def by(*variables):
            orders = tuple(variables.count(k) for k in range(count))
            return float(mp.diff(function, at, orders) if count > 1 else mp.diff(function, at[0], orders[0]))

        first = [by(k) for k in range(count)]
        second = [by(i, k) for i in range(count) for k in range(i, count)]
        # Of a derivative that is 0 the differences leave their own error.
        return [float(function(*at)), *(d if abs(d) > 1e-100 else 0.0 for d in first + second)]
