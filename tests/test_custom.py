"""Losses of the user's own: a function or a class gets all that the built-in ones have."""

import pickle
import re

import numpy as np
import pytest
from numba import njit
from sweeps import sweep

import numbaloss as nl
from numbaloss.testing import check_loss


@nl.elementwise_loss
def log_cosh(input, target, scale=1.0):
    """Logarithm of the hyperbolic cosine."""
    d = abs((input - target) / scale)
    return d + nl.math.log1p(nl.math.exp(-2 * d)) - 0.6931471805599453


@nl.elementwise_loss
def geman_mcclure(input, target, c=nl.arguments.positive(1.5)):  # noqa: B008 - a kind of option
    r = (input - target) / c
    q = r * r
    return 2 * q / (q + 4)


@nl.elementwise_loss
def huber(input, target, delta=1.0):
    r = abs(input - target)
    if r <= delta:
        return 0.5 * r * r
    else:
        return delta * (r - 0.5 * delta)


@nl.elementwise_loss
def capped(input, target, squared=True):
    """Literals in branches, NumPy's names, powers, three-argument max."""
    d = input - target
    if d < -1:
        return 0.0
    y = d**2 if squared else np.abs(d)
    return np.where(y > 1, np.sqrt(y), y) + max(d, 0, 0.25) ** 3


@nl.elementwise_loss
def weighted_gap(input, target, third):
    return third * np.exp(input - target)


class WingLoss(nl.ElementwiseLoss):
    """Feng et al., CVPR 2018."""

    width: float = nl.arguments.positive(10.0)
    curve: float = 2.0

    def check(width, curve):
        if curve > width:
            raise ValueError(f"wing_loss: curve must be <= width, got {curve} and {width}")

    def value(input, target, width, curve):
        d = abs(input - target)
        if d < width:
            return width * nl.math.log(1 + d / curve)
        return d - width + width * nl.math.log(1 + width / curve)


class SquaredError(nl.ElementwiseLoss):
    def value(input, target):
        return (input - target) ** 2

    def slope_input(input, target):
        return 2 * (input - target)


LOSSES = [log_cosh, geman_mcclure, huber, capped, weighted_gap, WingLoss.function, SquaredError.function]


@pytest.mark.parametrize("custom", sweep(LOSSES, huber), ids=lambda f: f.__name__)
@pytest.mark.more
def test_passes_the_general_check(custom):
    # As they stand here, log-cosh's value cancels close to the target, Geman-McClure's slope far from it.
    check_loss(custom, roundings=5000 if custom in (log_cosh, geman_mcclure) else 16)


def data(dtype=np.float64, n=200):
    rng = np.random.default_rng(3)
    return rng.normal(0, 2, n).astype(dtype), rng.normal(0, 2, n).astype(dtype)


def test_equal_to_the_built_in():
    x, t = data()
    for kwargs in ({}, {"delta": 0.5}, {"reduction": "none"}):
        np.testing.assert_array_equal(huber(x, t, **kwargs), nl.huber_loss(x, t, **kwargs))
        np.testing.assert_array_equal(huber.grad(x, t, **kwargs), nl.huber_loss.grad(x, t, **kwargs))
    for ours, theirs in zip(
        SquaredError.function.value_grad_hess(x, t), nl.mse_loss.value_grad_hess(x, t), strict=True
    ):
        np.testing.assert_allclose(ours, theirs, rtol=1e-15)


def test_functions_and_loops_within_a_definition():
    """Numba inlines them before it compiles: a kernel's shorter compilation is not for definitions."""

    def value(input, target, scale=2.0):
        def scaled(x):
            return x * scale

        square = lambda x: x * x
        total = 0.0
        for part in [k * 0.5 for k in range(3)]:
            total = total + part
        return total * square(scaled(input - target))

    def of_rows(cross_entropy, scale: float = 2.0):
        def scaled(x):
            return x * scale

        return scaled(cross_entropy)

    def product(x):
        def times(y):
            return x * y

        return times(x)

    loss, x, t = nl.elementwise_loss(value), np.array([0.5, -1.0, 3.0]), np.array([0.0, 1.0, 3.0])
    found, g = loss.value_and_grad(x, t, reduction="sum")
    assert found == 1.5 * 4 * (0.25 + 4)
    np.testing.assert_array_equal(g, 12 * (x - t))
    scalar = loss.scalar
    assert njit(lambda a, b: scalar(a, b))(0.5, 0.0) == 1.5
    rows = np.array([[1.0, 2.0, 0.5]]), np.array([1])
    assert nl.score_loss(of_rows)(*rows) == pytest.approx(2 * nl.cross_entropy(*rows), rel=1e-15)
    assert nl.derive(product)(3.0) == (9.0, (6.0,))


def test_function_has_a_class_and_class_a_function():
    x, t = data()
    criterion = log_cosh.Class(scale=0.5)
    assert repr(criterion) == "LogCosh(scale=0.5, reduction='mean')"
    assert criterion(x, t) == log_cosh(x, t, scale=0.5)
    assert WingLoss(width=5.0)(x, t) == WingLoss.function(x, t, width=5.0)
    assert WingLoss.function.__name__ == "wing_loss"


def test_pickle():
    assert pickle.loads(pickle.dumps(log_cosh)) is log_cosh
    assert pickle.loads(pickle.dumps(WingLoss.function)) is WingLoss.function
    for criterion in (log_cosh.Class(scale=2.0), WingLoss(3.0)):
        again = pickle.loads(pickle.dumps(criterion))
        assert repr(again) == repr(criterion)


def test_options_are_checked():
    x, t = data()
    with pytest.raises(ValueError, match=re.escape("geman_mcclure: c must be > 0, got -1.0")):
        geman_mcclure(x, t, c=-1.0)
    for attempt in (lambda: WingLoss(width=1.0), lambda: WingLoss.function(x, t, width=1.0)):
        with pytest.raises(ValueError, match="curve must be <= width"):
            attempt()
    with pytest.raises(TypeError, match="capped: squared must be True or False"):
        capped(x, t, squared="yes")


def test_float32_stays_float32():
    x, t = data(np.float32)
    value, gradient, curvature = log_cosh.value_grad_hess(x, t)
    assert {value.dtype, gradient.dtype, curvature.dtype} == {np.dtype(np.float32)}


@pytest.mark.parametrize("wrt", ["input", "target", "third"])
@pytest.mark.thin(3)
def test_three_operands(wrt):
    x, t = data()
    u = np.abs(t) + 0.5
    e = np.exp(x - t)
    expected = {"input": u * e, "target": -u * e, "third": e}[wrt]
    np.testing.assert_allclose(weighted_gap.grad(x, t, u, reduction="sum", wrt=wrt), expected, rtol=1e-13)


def broken_call(input, target):
    d = input - target
    return np.fft.fft(d)


def unknown_attribute(input, target):
    d = input - target
    return d.size + 1


def broken_cast(input, target):
    d = input - target
    steps = int(d)
    return steps * d


def two_results(input, target):
    return input, target


@pytest.mark.parametrize(
    ("value", "line", "reason"),
    [
        (broken_call, "return np.fft.fft(d)", "Unknown attribute 'fft'"),
        (unknown_attribute, "return d.size + 1", "Unknown attribute 'size'"),
        (broken_cast, "steps = int(d)", "int"),
        (two_results, "two_results", "one number"),
    ],
)
def test_an_error_leads_to_the_users_line(value, line, reason):
    loss = nl.elementwise_loss(value)
    with pytest.raises(TypeError) as caught:
        loss.value_and_grad(*data())
    text = str(caught.value)
    assert text.startswith(f"{value.__name__}: cannot be compiled")
    assert "test_custom.py" in text and line in text and reason in text
    assert "interleave" not in text  # our own loop, of which users know nothing


def test_malformed_definitions_are_refused():
    with pytest.raises(TypeError, match="two or three arrays"):
        nl.elementwise_loss(lambda input: input)
    with pytest.raises(TypeError, match="ordinary parameter"):
        nl.elementwise_loss(lambda *arrays: arrays[0])
    with pytest.raises(TypeError, match="wants a function"):
        nl.elementwise_loss(3)
    with pytest.raises(TypeError, match="a number, a bool or a kind"):

        class Wrong(nl.ElementwiseLoss):
            name: str = "x"

            def value(input, target, name):
                return input


def test_a_user_loss_is_not_listed_as_built_in():
    assert "log_cosh" not in nl.registry
