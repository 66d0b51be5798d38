"""Bad input gets a clear error, and nothing is lost."""

import re

import numpy as np
import pytest

import numbaloss as nl
from numbaloss.loss import registry
from numbaloss.testing import samples


def test_every_declared_bad_option_by_message(loss, rng):
    arrays = samples(loss, rng)
    for name, option in loss.Class.fields.items():
        for value, error, part in option.bad:
            pattern = rf"{name} must be .*{re.escape(part)}|{name} must be one of"
            with pytest.raises(error, match=f"^{loss.__name__}: ({pattern})"):
                loss.value_and_grad(**arrays, **{name: value})
            if not option.call_only:
                with pytest.raises(error, match=pattern):
                    loss.Class(**{name: value})


def test_an_option_names_what_it_got_and_wanted(rng):
    x = np.ones(3)
    with pytest.raises(ValueError, match=r"^smooth_l1_loss: beta must be >= 0, got -1.0$"):
        nl.smooth_l1_loss(x, x, beta=-1.0)
    with pytest.raises(
        ValueError, match="mse_loss: reduction must be one of 'none', 'mean', 'sum', got 'avg'"
    ):
        nl.mse_loss(x, x, reduction="avg")


def test_shapes_must_match_exactly(loss, rng):
    arrays = samples(loss, rng, (6, 4))
    for name in loss.Class._required[1:]:
        if loss.Class.operands[name].broadcast:
            continue
        for shape in ((4,), (6, 1), (1, 4), (24,), ()):
            with pytest.raises(ValueError, match=rf"{loss.__name__}: {name} must have .* shape \(6, 4\)"):
                loss.value_and_grad(**{**arrays, name: np.ones(shape)})


@pytest.mark.parametrize("name", ["sample_weight", "weight"])
def test_weights_that_do_not_broadcast(name):
    x = np.ones((6, 4))
    with pytest.raises(ValueError, match=rf"{name} of shape \(6,\) does not broadcast to \(6, 4\)"):
        nl.mse_loss(x, x, **{name: np.ones(6)})


@pytest.mark.parametrize("shape", [(4,), (1, 1), (1,), (6, 4, 1)])
def test_variances_that_do_not_fit(shape):
    x = np.ones((6, 4))
    with pytest.raises(ValueError, match="var of shape"):
        nl.gaussian_nll_loss(x, x, np.ones(shape))


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda x: nl.mse_loss(x), TypeError, r"mse_loss\(\) missing required argument: target"),
        (lambda x: nl.mse_loss(x, x, "mean", None, 3), TypeError, "at most 4 positional arguments"),
        (lambda x: nl.mse_loss(x, x, redaction="sum"), TypeError, "unexpected keyword argument 'redaction'"),
        (lambda x: nl.mse_loss(x, x, out=x), TypeError, "'out' .it is for the gradient."),
        (lambda x: nl.mse_loss(x, x, target=x), TypeError, "multiple values for argument 'target'"),
        (lambda x: nl.MSELoss()(x, x, "sum"), TypeError, "options go to the constructor"),
        (lambda x: nl.MSELoss(delta=1), TypeError, "unexpected keyword argument 'delta'"),
        (lambda x: nl.GaussianNLLLoss(True), TypeError, "got 1 positional"),
        (lambda x: nl.mse_loss(x, None), TypeError, "mse_loss: target must be an array, got None"),
        (lambda x: nl.mse_loss("abc", x), TypeError, "input must be a NumPy or CuPy array, got str"),
        (lambda x: nl.mse_loss(np.ma.array(x), x), TypeError, "masked array"),
        (lambda x: nl.mse_loss(x.astype(int), x), TypeError, "input must be float64, .* got int64"),
        (lambda x: nl.mse_loss(x.astype(complex), x), TypeError, "input must be float64, .* got complex128"),
        (lambda x: nl.mse_loss(x, x.astype("M8[s]")), TypeError, "target must be float64"),
        (lambda x: nl.mse_loss(x, x.astype(object)), TypeError, "target must be float64"),
        (lambda x: nl.mse_loss.grad(x, x, wrt="beta"), ValueError, "wrt must be among 'input', 'target'"),
        (lambda x: nl.mse_loss.grad(x, x, wrt=()), TypeError, "wrt must be a name"),
        (lambda x: nl.mse_loss.grad(x, x, wrt=["input", "input"]), ValueError, "an argument twice"),
        (lambda x: nl.mse_loss.grad(x, x, wrt="weight"), ValueError, "'weight', which is not given"),
        (lambda x: nl.mse_loss.value_grad_hess(x, x, wrt=("input",)), ValueError, "takes one name in wrt"),
        (lambda x: nl.mse_loss(x, x, normalizer=0), ValueError, "normalizer must be > 0, got 0.0"),
        (lambda x: nl.mse_loss(x, x, normalizer="3"), TypeError, "normalizer must be a number"),
        (lambda x: nl.mse_loss.grad(x, x, grad_output=x), ValueError, "grad_output must be a number"),
        (
            lambda x: nl.mse_loss.grad(x, x, reduction="none", grad_output=np.ones(3)),
            ValueError,
            "grad_output must have the value's shape",
        ),
    ],
)
def test_calls_that_are_wrong(call, error, message):
    with pytest.raises(error, match=message):
        call(np.ones((5, 2)))


@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.float16])
@pytest.mark.parametrize("bad", [-0.25, 1.5, np.nan, np.inf])
@pytest.mark.parametrize("name", ["input", "target"])
def test_bce_outside_of_its_domain(name, bad, dtype):
    arrays = {"input": np.full((40, 50), 0.5, dtype), "target": np.full((40, 50), 0.5, dtype)}
    arrays[name][31, 7] = bad
    with pytest.raises(ValueError, match=rf"{name} must be in \[0, 1\], got {name}\[31, 7\] = {bad:g}"):
        nl.binary_cross_entropy.value_and_grad(**arrays)
    before = arrays["input"].copy()
    for layout in (lambda a: a, lambda a: a[:, ::-1]):
        with pytest.raises(ValueError, match=f"{name} must be in"):
            x = layout(arrays["input"])
            nl.binary_cross_entropy.value_and_grad(x, layout(arrays["target"]), out=x)
    np.testing.assert_array_equal(arrays["input"], before)  # nothing was overwritten


def test_bad_elements_without_weight_are_not_looked_at():
    x, t = np.array([0.5, 1.5, np.nan]), np.array([1.0, -3.0, 0.0])
    value, gradient = nl.binary_cross_entropy.value_and_grad(x, t, sample_weight=np.array([1.0, 0, 0]))
    assert value == pytest.approx(np.log(2)) and (gradient[1:] == 0).all()


def test_negative_variance():
    x = np.zeros(5)
    with pytest.raises(ValueError, match=r"var must be >= 0, got var\[3\] = -0.1"):
        nl.gaussian_nll_loss(x, x, np.array([1, 1, 0, -0.1, np.nan]))


def test_names_of_the_registry_are_public():
    for name, function in registry.items():
        assert getattr(nl, name) is function
        assert getattr(nl, function.Class.__name__) is function.Class
