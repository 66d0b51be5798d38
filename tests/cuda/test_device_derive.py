"""Derivatives of a function inside a CUDA kernel, whose PTX is executed."""

import numpy as np
import pytest
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
