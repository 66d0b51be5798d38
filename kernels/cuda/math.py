"""The functions of `kernels.math` in CUDA kernels, under the same public names; float32 stays float32.

Most are libdevice's, whose float32 ``exp`` is one instruction and a few for its range. Its ``log1p``
branches, so ``softplus`` takes the CPU's polynomial. By NVIDIA's tables the float32 functions err by at most
1 ulp (``exp``, ``expm1``, ``log``, ``log1p``), 2 (``tanh``, ``sin``, ``cos``, ``arctan``, ``erf``, ``cosh``,
``arcsin``, ``arccos``), 3 (``sinh``, ``arctan2``, ``arcsinh``, ``arctanh``) or 4 (``power``, ``tan``,
``arccosh``); ``sigmoid`` is within 3, ``softplus`` within 2. ``lgamma``, ``erfc``, ``log_ndtr``, their
derivatives and ``log1mexp`` are the CPU's. ``sin``, ``cos`` and ``tan`` of huge numbers use local memory.
"""

from types import SimpleNamespace
from typing import Any

import numpy as np

from .. import math as nm
from .target import device, libdevice, overload, polynomial, reciprocal, select, types

NAMES = ("exp", "expm1", "log", "log1p", "tanh", "sqrt", "sin", "cos", "tan", "erf", "sinh", "cosh", "floor")
INVERSES = ("sin", "cos", "tan", "sinh", "cosh", "tanh", "tan2")
LIBRARY_NAMES = {n: n for n in NAMES} | {f"arc{n}": f"a{n}" for n in INVERSES} | {"power": "pow"}
LIBDEVICE = {
    types.float32: {n: getattr(libdevice, f"{at}f") for n, at in LIBRARY_NAMES.items()},
    types.float64: {n: getattr(libdevice, at) for n, at in LIBRARY_NAMES.items()},
}


def implement(T: Any, library: Any) -> dict[str, Any]:
    """The functions that libdevice does not have, of one type, by public name."""
    ZERO, ONE = T(0), T(1)
    UNIT = tuple(map(T, nm.SINGLE.log1p_unit))
    exp, expm1, log, log1p = library.exp, library.expm1, library.log, library.log1p

    @device
    def log1p_exp_minus_abs(x):
        return log1p(exp(-abs(x)))

    @device
    def short_log1p_exp_minus_abs(x):
        z = exp(-abs(x))
        return polynomial(z, UNIT) * (z * z) + z

    rest = short_log1p_exp_minus_abs if np.float32 == T else log1p_exp_minus_abs

    @device
    def sigmoid(x):
        z = exp(-abs(x))
        return select(x < ZERO, z, ONE) * reciprocal(ONE + z)

    @device
    def softplus(x):
        return select(x < ZERO, ZERO, x) + rest(x)

    @device
    def log_sigmoid(x):
        return select(x > ZERO, ZERO, x) - rest(x)

    @device
    def xlogy(x, y):
        return select(x == ZERO, select(y == y, ZERO, y), x * log(y))

    @device
    def logaddexp(x, y):
        return select(x > y, x, y) + rest(select(x == y, ZERO, x - y))

    @device
    def maximum(x, y):
        return select(x != x, x, select(x > y, x, y))

    @device
    def minimum(x, y):
        return select(x != x, x, select(x < y, x, y))

    @device
    def sign(x):
        return select(x > ZERO, ONE, select(x < ZERO, -ONE, select(x == ZERO, ZERO, x)))

    @device
    def square(x):
        return x * x

    @device
    def isnan(x):
        return x != x

    @device
    def stop_gradient(x):
        return x

    own = (sigmoid, softplus, log_sigmoid, xlogy, logaddexp, maximum, minimum, sign, square, isnan)
    format = nm.SINGLE if np.float32 == T else nm.DOUBLE
    normal = nm.normal_functions(format, device, exp, expm1, log, log1p, select, polynomial)
    gamma = nm.gamma_functions(format, device, log, library.floor, select, polynomial)
    return {f.py_func.__name__: f for f in (*own, stop_gradient)} | normal | gamma


CUDA = {
    kind: {**table, **implement(T, SimpleNamespace(**table))}
    for (kind, table), T in zip(LIBDEVICE.items(), (np.float32, np.float64), strict=True)
}


def register(function: Any) -> None:
    """Let a kernel that calls a public function find its implementation."""
    name = function.__name__

    def unary(x):
        kind = nm.common_float(x)
        if kind is None:
            return None
        at = CUDA[kind][name]
        return lambda x: at(kind(x))

    def binary(x, y):
        kind = nm.common_float(x, y)
        if kind is None:
            return None
        at = CUDA[kind][name]
        return lambda x, y: at(kind(x), kind(y))

    overload(function)(unary if function.__code__.co_argcount == 1 else binary)


for _name in CUDA[types.float32]:
    register(getattr(nm, _name))


@overload(nm.where)
def _where(c, a, b):
    kind = nm.common_float(a, b)
    if kind is None or not isinstance(c, types.Boolean):
        return None
    return lambda c, a, b: select(c, kind(a), kind(b))
