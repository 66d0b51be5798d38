"""`scalar` and `jit`: losses inside the caller's own compiled code."""

import numpy as np
import pytest
from numba import njit, prange
from numba.core.errors import TypingError
from sweeps import sweep

import numbaloss as nl

RNG = np.random.default_rng(11)


def samples(loss, shape, dtype):
    return [loss.Class.operands[n].draw(RNG, shape).astype(dtype) for n in loss.Class._required]


ELEMENTWISE = [f for f in nl.registry.values() if issubclass(f.Class, nl.ElementwiseLoss)]


@pytest.mark.parametrize("function", sweep(ELEMENTWISE, nl.gaussian_nll_loss), ids=lambda f: f.__name__)
def test_scalar_and_jit_agree_with_the_loss(function):
    loss = function
    arrays = samples(loss, (60,), np.float64)
    scalar, jit = loss.scalar, loss.jit

    if len(arrays) == 2:

        @njit
        def terms(x, t, out):
            for i in range(x.size):
                out[i] = scalar(x[i], t[i])

        @njit
        def value_and_grad(x, t, out):
            return jit(x, t, out=out)

    else:

        @njit
        def terms(x, t, u, out):
            for i in range(x.size):
                out[i] = scalar(x[i], t[i], u[i])

        @njit
        def value_and_grad(x, t, u, out):
            return jit(x, t, u, out=out)

    out = np.empty(60)
    terms(*arrays, out)
    np.testing.assert_allclose(out, loss(*arrays, reduction="none"), rtol=1e-14)
    value = value_and_grad(*arrays, out)
    first = loss.Class._required[0]
    expected, gradient = loss.value_and_grad(*arrays, wrt=first)
    np.testing.assert_allclose(value, expected, rtol=1e-14)
    np.testing.assert_allclose(out, gradient, rtol=1e-14)


def test_options_by_position_and_keyword_in_float32():
    scalar = nl.poisson_nll_loss.scalar

    @njit
    def f(x, t):
        return scalar(x, t, False, full=True)

    x, t = np.float32(2.0), np.float32(3.0)
    expected = nl.poisson_nll_loss(np.array([x]), np.array([t]), log_input=False, full=True)
    assert f(x, t) == expected
    assert f.nopython_signatures[0].return_type.name == "float32"


def test_jit_in_a_prange_over_rows():
    jit = nl.huber_loss.jit

    @njit(parallel=True)
    def rows(x, t, g):
        values = np.empty(x.shape[0], x.dtype)
        for k in prange(x.shape[0]):
            values[k] = jit(x[k], t[k], delta=0.5, reduction="sum", out=g[k])
        return values

    x, t = samples(nl.huber_loss, (7, 3000), np.float32)
    g = np.empty_like(x)
    values = rows(x, t, g)
    for k in range(7):
        value, gradient = nl.huber_loss.value_and_grad(x[k], t[k], delta=0.5, reduction="sum")
        np.testing.assert_allclose(values[k], value, rtol=1e-6)
        np.testing.assert_array_equal(g[k], gradient)


@pytest.mark.more
def test_jit_in_place_and_on_any_layout():
    jit = nl.mse_loss.jit

    @njit
    def f(x, t):
        return jit(x, t)

    @njit
    def overwrite(x, t):
        return jit(x, t, out=x)

    x, t = samples(nl.mse_loss, (40, 6), np.float64)
    assert f(x.T, t.T) == pytest.approx(nl.mse_loss(x, t), rel=1e-14)
    assert f(x[::2, ::-1], t[::2, ::-1]) == pytest.approx(nl.mse_loss(x[::2], t[::2]), rel=1e-14)
    gradient = nl.mse_loss.grad(x, t)
    overwrite(x, t)
    np.testing.assert_allclose(x, gradient, rtol=1e-14)


def test_errors_inside_compiled_code():
    jit, bce = nl.mse_loss.jit, nl.binary_cross_entropy.jit

    @njit
    def f(x, t):
        return jit(x, t)

    @njit
    def g(x, t):
        return bce(x, t)

    with pytest.raises(ValueError, match="one shape"):
        f(np.ones(3), np.ones(4))
    for out in (np.ones(3, np.float32), (np.ones(3), np.ones(3)), np.ones(6)[::2]):
        with pytest.raises(TypingError, match="out must be a C-contiguous array"):
            jit(np.ones(3), np.ones(3), out=out)
    with pytest.raises(ValueError, match="out of its domain"):
        g(np.array([0.5, 1.5]), np.zeros(2))
    assert np.isnan(f(np.ones(0), np.ones(0)))
