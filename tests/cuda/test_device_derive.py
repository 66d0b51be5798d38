"""Derivatives of a function inside a CUDA kernel, whose PTX is executed."""

import numpy as np
import pytest
from exact_math import POINTS, all_derivatives
from ptx.device import MACHINE, Plain, host, put

import numbaloss as nl
from numbaloss.kernels.cuda.target import compile, cuda, device, types

pytestmark = pytest.mark.usefixtures("gpu")


def surface(x, y):
    if x > y:
        return x**y + nl.math.exp(x * y)
    return nl.math.sqrt(x * x) * nl.math.log1p(y) / y


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 5e-6), ("float64", 1e-14)])
@pytest.mark.more
def test_value_gradient_and_hessian(dtype, digits):
    derived = nl.derive(surface, order=2)

    def kernel(x, y, out):
        i = cuda.threadIdx.x
        value, gradient, hessian = derived(x[i], y[i])
        out[6 * i], out[6 * i + 1], out[6 * i + 2] = value, gradient[0], gradient[1]
        out[6 * i + 3], out[6 * i + 4], out[6 * i + 5] = hessian[0][0], hessian[0][1], hessian[1][1]

    pointer = types.CPointer(getattr(types, dtype))
    binary = compile(kernel, (pointer,) * 3, (9, 0), 32)
    assert binary.local_bytes == 0
    x, y = np.random.default_rng(0).uniform(0.1, 2, (2, 32)).astype(dtype)
    given = [put(Plain, a) for a in (x, y, np.zeros(6 * 32, dtype))]
    addresses = [int(a.address).to_bytes(8, "little") for a in given]
    MACHINE.launch(MACHINE.program(binary.ptx), 1, 32, addresses)
    found = host(given[2]).reshape(32, 6)
    for row, point in zip(found, zip(x, y, strict=True), strict=True):
        value, gradient, (first, second) = derived(*map(np.float64, point))
        expected = [value, *gradient, *first, second[1]]
        np.testing.assert_allclose(row, expected, rtol=digits, atol=digits)


erfc = nl.derive(lambda x: nl.math.erfc(x), order=2)
log_ndtr = nl.derive(lambda x: nl.math.log_ndtr(x), order=2)
log1mexp = nl.derive(lambda x: nl.math.log1mexp(x), order=2)
sinh = nl.derive(lambda x: nl.math.sinh(x), order=2)
cosh = nl.derive(lambda x: nl.math.cosh(x), order=2)
arcsin = nl.derive(lambda x: nl.math.arcsin(x), order=2)
arccos = nl.derive(lambda x: nl.math.arccos(x), order=2)
arcsinh = nl.derive(lambda x: nl.math.arcsinh(x), order=2)
arccosh = nl.derive(lambda x: nl.math.arccosh(x), order=2)
arctanh = nl.derive(lambda x: nl.math.arctanh(x), order=2)
tan = nl.derive(lambda x: nl.math.tan(x), order=2)
held = nl.derive(lambda x: x * (nl.math.floor(x) + nl.math.stop_gradient(x)), order=2)
logaddexp = nl.derive(lambda x, y: nl.math.logaddexp(x, y), order=2)
arctan2 = nl.derive(lambda x, y: nl.math.arctan2(x, y), order=2)
INF = np.inf
EDGES = {
    "erfc": ((INF,), [0, 0, 0]),
    "log_ndtr": ((-INF,), [-INF, INF, -1]),
    "log1mexp": ((0.0,), [-INF, INF, -INF]),
    "sinh": ((-INF,), [-INF, INF, -INF]),
    "cosh": ((-INF,), [INF, -INF, INF]),
    "held": ((-0.5,), [0.75, -1.5, 0]),
    "arcsin": ((1.0,), [np.pi / 2, INF, INF]),
    "arccos": ((0.0,), [np.pi / 2, -1, 0]),
    "arcsinh": ((-INF,), [-INF, 0, 0]),
    "arccosh": ((INF,), [INF, 0, 0]),
    "arctanh": ((-1.0,), [-INF, INF, -INF]),
    "tan": ((0.0,), [0, 1, 0]),
    "logaddexp": ((-INF, -INF), [-INF, 0.5, 0.5, 0.25, -0.25, 0.25]),
    "arctan2": ((-0.0, -0.0), [-np.pi, 0, 0, 0, 0, 0]),
}


@device
def store(out, at, found):
    out[at], out[at + 1], out[at + 2] = found[0], found[1][0], found[2][0][0]


@device
def store_two(out, at, found):
    value, slopes, bends = found
    out[at], out[at + 1], out[at + 2] = value, slopes[0], slopes[1]
    out[at + 3], out[at + 4], out[at + 5] = bends[0][0], bends[0][1], bends[1][1]


def every_function(x, out):
    i, at = 16 * cuda.threadIdx.x, 48 * cuda.threadIdx.x
    store(out, at, erfc(x[i]))
    store(out, at + 3, log_ndtr(x[i + 1]))
    store(out, at + 6, log1mexp(x[i + 2]))
    store(out, at + 9, sinh(x[i + 3]))
    store(out, at + 12, cosh(x[i + 4]))
    store(out, at + 15, held(x[i + 5]))
    store(out, at + 18, arcsin(x[i + 6]))
    store(out, at + 21, arccos(x[i + 7]))
    store(out, at + 24, arcsinh(x[i + 8]))
    store(out, at + 27, arccosh(x[i + 9]))
    store(out, at + 30, arctanh(x[i + 10]))
    store(out, at + 33, tan(x[i + 11]))
    store_two(out, at + 36, logaddexp(x[i + 12], x[i + 13]))
    store_two(out, at + 42, arctan2(x[i + 14], x[i + 15]))


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 2e-6), ("float64", 3e-15)])
@pytest.mark.more
def test_functions_of_the_library(dtype, digits):
    """Where the CPU's are compared with mpmath, and at an edge of each."""
    T, smallest = np.dtype(dtype).type, np.finfo(dtype).smallest_normal
    numbers, expected = np.empty((32, 16), T), np.empty((32, 48))
    column, place = 0, 0
    for name, (edge, row) in EDGES.items():
        points = [tuple(map(T, p)) for p in POINTS.get(name, [])]
        rows = [row, *(all_derivatives(name, p) for p in points)]
        for k in range(32):
            at = k % len(rows)
            numbers[k, column : column + len(edge)] = (edge, *points)[at]
            expected[k, place : place + len(row)] = rows[at]
        column, place = column + len(edge), place + len(row)
    expected[np.abs(expected) < smallest] = 0
    with np.errstate(over="ignore"):
        expected = expected.astype(T)
    pointer = types.CPointer(getattr(types, dtype))
    binary = compile(every_function, (pointer,) * 2, (9, 0), 32)
    given = [put(Plain, a) for a in (numbers, np.zeros((32, 48), T))]
    addresses = [int(a.address).to_bytes(8, "little") for a in given]
    MACHINE.launch(MACHINE.program(binary.ptx), 1, 32, addresses)
    np.testing.assert_allclose(host(given[1]), expected, digits, smallest)
