"""Derivatives of a function inside a CUDA kernel, whose PTX is executed."""

import numpy as np
import pytest
from exact_math import POINTS, all_derivatives
from ptx.device import MACHINE, Plain, host, put

import numbaloss as nl
from numbaloss.kernels.cuda.target import compile, cuda, types

pytestmark = pytest.mark.usefixtures("gpu")


def surface(x, y):
    if x > y:
        return x**y + nl.math.exp(x * y)
    return nl.math.sqrt(x * x) * nl.math.log1p(y) / y


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 5e-6), ("float64", 1e-14)])
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
logaddexp = nl.derive(lambda x, y: nl.math.logaddexp(x, y), order=2)
arctan2 = nl.derive(lambda x, y: nl.math.arctan2(x, y), order=2)
held = nl.derive(lambda x: x * (nl.math.floor(x) + nl.math.stop_gradient(x)), order=2)


@pytest.mark.parametrize(("dtype", "digits"), [("float32", 2e-6), ("float64", 3e-15)])
def test_functions_of_the_library(dtype, digits):
    """Each in one kernel, at the points where the CPU's are compared, and at edges."""

    def store(out, at, found):
        out[at], out[at + 1], out[at + 2] = found[0], found[1][0], found[2][0][0]

    store = cuda.jit(device=True)(store)

    def kernel(x, out):
        i = cuda.threadIdx.x
        row = 36 * i
        store(out, row, erfc(x[9 * i]))
        store(out, row + 3, log_ndtr(x[9 * i + 1]))
        store(out, row + 6, log1mexp(x[9 * i + 2]))
        store(out, row + 9, sinh(x[9 * i + 3]))
        store(out, row + 12, cosh(x[9 * i + 4]))
        store(out, row + 15, held(x[9 * i + 1]))
        for k in range(2):
            a, b = x[9 * i + 5 + 2 * k], x[9 * i + 6 + 2 * k]
            value, gradient, hessian = logaddexp(a, b) if k == 0 else arctan2(a, b)
            at = row + 18 + 6 * k
            out[at], out[at + 1], out[at + 2] = value, gradient[0], gradient[1]
            out[at + 3], out[at + 4], out[at + 5] = hessian[0][0], hessian[0][1], hessian[1][1]

    T = getattr(np, dtype)
    info = np.finfo(T)
    inf, pi = np.inf, np.pi
    edges = {
        "erfc": ((inf,), [0, 0, 0]),
        "log_ndtr": ((-inf,), [-inf, inf, -1]),
        "log1mexp": ((0.0,), [-inf, inf, -inf]),
        "sinh": ((-inf,), [-inf, inf, -inf]),
        "cosh": ((-inf,), [inf, -inf, inf]),
        "logaddexp": ((-inf, -inf), [-inf, 0.5, 0.5, 0.25, -0.25, 0.25]),
        "arctan2": ((-0.0, -0.0), [-pi, 0, 0, 0, 0, 0]),
    }
    count = 1 + max(map(len, POINTS.values()))
    points, wanted = [], []
    for name, (edge, row) in edges.items():
        at = [tuple(map(T, p)) for p in POINTS[name]]
        rows = [all_derivatives(name, p) for p in at]
        points.append([(edge, *at)[k % (1 + len(at))] for k in range(count)])
        wanted.append([(row, *rows)[k % (1 + len(at))] for k in range(count)])
    numbers = [[float(v) for of in points for v in of[k]] for k in range(count)]
    expected = [[v for of in wanted for v in of[k]] for k in range(count)]
    for row, given in zip(expected, numbers, strict=True):
        v = given[1]
        row[15:15] = [v * (np.floor(v) + v), np.floor(v) + v, 0]
    pointer = types.CPointer(getattr(types, dtype))
    binary = compile(kernel, (pointer,) * 2, (9, 0), 32)
    assert binary.local_bytes == 0
    given = [put(Plain, a) for a in (np.array(numbers, T), np.zeros(36 * count, T))]
    addresses = [int(a.address).to_bytes(8, "little") for a in given]
    MACHINE.launch(MACHINE.program(binary.ptx), 1, count, addresses)
    found = host(given[1]).reshape(count, 36)
    with np.errstate(over="ignore"):
        expected = np.array(expected).astype(T)
    expected[np.abs(expected) < info.smallest_normal] = 0
    np.testing.assert_allclose(found, expected, digits, info.smallest_normal)
