"""Robust, one-sided, relative and margin losses: value, slope, curvature against mpmath and their homes."""

import math
import re

import numpy as np
import pytest
from mpmath import mp
from numba import njit
from sweeps import apart, some, sweep

import numbaloss as nl
from numbaloss import reference
from numbaloss.bench import exact

INF = math.inf
NAMES = [n for n, f in nl.registry.items() if apart(f)]
SCALED = [{}, {"c": 1.0}, {"c": 0.25}, {"c": 1e4}]
# About every limit, and at some of the shapes between.
SHAPES = [1.0, 2.0, 2 - 2**-20, 2 + 2**-20, 0.0, 2.0**-40, -(2.0**-12), 0.999, 1.5, -2.0, -20.0, -1e6, -1e25]
SHAPES += [-INF, 3.0, INF]
OPTIONS = {
    "quantile_loss": [{"quantile": q} for q in (0.5, 0.0, 0.9)],
    "expectile_loss": [{"expectile": e} for e in (0.5, 1.0, 0.1)],
    "pseudo_huber_loss": [{"delta": d} for d in (1.0, 0.25, 1e4)],
    **{
        f"{n}_loss": SCALED for n in ("cauchy", "arctan", "geman_mcclure", "fair", "welsch", "tukey_biweight")
    },
    "general_robust_loss": [*({"alpha": a} for a in SHAPES), {"alpha": -0.5, "c": 0.25}],
    "tweedie_nll_loss": [{"power": p} for p in (1.5, 1.001, 1.999)],
    "mape_loss": [{}, {"eps": 1.0}],
    "sigmoid_focal_loss": [{}, {"alpha": -1.0, "gamma": 0.25}, {"alpha": 0.75, "gamma": 0.0}, {"gamma": 1.0}],
}
SIZES = [1e-30, 1e-10, 1e-4, 0.1, 0.24, 0.3, 0.49, 0.6, 0.73, 0.9, 1 - 2e-7, 1, 1 + 2e-7, 1.4, 2, 3, 4.68]
SIZES += [10, 80, 700, 9999, 1e4, 1e7, 1e12, 1e18, 1e30]
REAL = [0.0, *(s * x for x in SIZES for s in (1, -1))]
POSITIVE = [0.0, 1e-10, 0.5, 1.0, 3.0, 1e4]
TARGETS = {
    **{f"{n}_loss": POSITIVE for n in ("gamma_nll", "tweedie_nll", "msle")},
    **{f"{n}_loss": [-1.0, 1.0] for n in ("squared_hinge", "exponential")},
    "mape_loss": [-0.5, 3.0, 1e4, 0.0],
    "sigmoid_focal_loss": [0.0, 1.0, 0.3, 1e-9, 1 - 1e-7],
}


DIGITS, STEP = 220, mp.mpf(10) ** -20
# Of one-sided differences of four steps: slope, second and third derivative.
STENCILS = (
    ([-25, 48, -36, 16, -3], 12),
    ([35, -104, 114, -56, 11], 12),
    ([-5, 18, -24, 14, -3], 2),
)


def derivatives(f, x):
    """The first three at a number; NaN where both sides differ: at a kink, or where digits do not suffice."""
    step = STEP * min(1, abs(x) or 1)
    sides = [(s * step, [f(x + s * j * step) for j in range(5)]) for s in (1, -1)]
    for order, (weights, divisor) in enumerate(STENCILS, start=1):
        a, b = (
            sum(w * v for w, v in zip(weights, values, strict=True)) / (divisor * h**order)
            for h, values in sides
        )
        yield a if abs(a - b) <= mp.mpf(10) ** -20 * (abs(a) + abs(b)) + mp.mpf(10) ** -100 else mp.nan


def points(name, dtype):
    x, y = np.array(REAL), np.array([0.0, 0.25])
    if name == "msle_loss":
        x = np.array([*SIZES, 0.0, -0.5, -0.999])
    targets = TARGETS.get(name)
    if targets is not None:
        y = np.array(targets)
    with np.errstate(over="ignore"):
        x, y = (a.ravel().astype(dtype) for a in np.meshgrid(x, y))
    if targets is None:  # close to the target, too
        near = np.array([s * d for d in (1e-6, 0.01, 0.5, 1, 5) for s in (1, -1)])
        x = np.concatenate([x, 3 + near.astype(dtype)]).astype(dtype)
        y = np.concatenate([y, np.full(near.size, 3, dtype)])
    return x, y


@pytest.mark.parametrize(
    ("dtype", "every"),
    some([(np.float64, 5), (np.float64, 1), (np.float32, 1)]),
    ids=["some", "float64", "float32"],
)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.thin(6)
def test_value_slope_and_curvature_are_the_mathematics(name, dtype, every):
    """Apart by a few roundings of a result, and by what a rounding of the residual, or input, moves it."""
    loss, definition, info = nl.registry[name], getattr(exact, name), np.finfo(dtype)
    x, y = points(name, dtype)
    compared = 0
    for number, options in enumerate(OPTIONS.get(name, [{}])):
        fields = {n: f.default for n, f in loss.Class.fields.items() if isinstance(f.default, float)}
        options = {n: float(dtype(v)) for n, v in (fields | options).items()}
        results = loss.value_grad_hess(x, y, **options, reduction="none")
        exactly = {n: mp.mpf(v) for n, v in options.items()}
        for k in range(number % every, x.size, every):
            with mp.workdps(DIGITS):
                a, b = mp.mpf(float(x[k])), mp.mpf(float(y[k]))
                orders = [definition(a, b, **exactly)]
                orders += derivatives(lambda at: definition(at, b, **exactly), a)  # noqa: B023
                size = abs(a - b) if loss.Class.residual else abs(a) + 1
                if (
                    name == "general_robust_loss"
                ):  # a rounding of the shape moves a power by that of the logarithm
                    size *= 1 + mp.log(1 + size)
            for what, got, wanted, moves in zip(
                ("value", "slope", "curvature"), results, orders, orders[1:], strict=False
            ):
                if mp.isnan(wanted):
                    continue
                said = f"{what} {options} at {x[k]!r}, {y[k]!r}: {got[k]!r}, exactly {mp.nstr(wanted, 17)}"
                if abs(wanted) > info.max:
                    assert np.isinf(got[k]), said
                    continue
                room = abs(wanted) + (0 if mp.isnan(moves) else size * abs(moves))
                bound = 16 * float(info.eps) * room + float(info.tiny) + mp.mpf(10) ** -100
                bound += 4 * size * float(info.smallest_subnormal)  # a factor may underflow
                assert abs(mp.mpf(float(got[k])) - wanted) <= bound, said
                compared += 1
    assert compared > 40


def test_which_losses_are_of_the_residual(rng):
    """Those that say so are even functions of the difference, which do not change when both move."""
    x, y = rng.integers(1, 40, (2, 50)) / 8
    for name, loss in nl.registry.items():
        if not issubclass(loss.Class, nl.ElementwiseLoss) or len(loss.Class._required) != 2:
            continue
        if name in ("binary_cross_entropy", "kl_div"):  # of probabilities
            assert not loss.Class.residual
            continue
        oracle = getattr(reference, name)
        options = {n: 0.3 for n in ("quantile", "expectile") if n in loss.Class.fields}
        here, there = (oracle(x + s, y + s, reduction="none", **options) for s in (0.0, 1.0))
        mirrored = oracle(y, x, reduction="none", **options)
        same = np.allclose(here, there, rtol=1e-12) and np.allclose(here, mirrored, rtol=1e-12)
        assert same == loss.Class.residual, name


# ---- quantiles -------------------------------------------------------------------------------------


@pytest.mark.more
def test_several_quantiles_at_once(rng):
    x, y, levels = rng.normal(size=(30, 3)), rng.normal(size=(30, 1)), np.array([0.1, 0.5, 0.9])
    value, gradient = nl.quantile_loss.value_and_grad(x, y, quantiles=levels, reduction="none")
    for k, level in enumerate(levels):
        one = nl.quantile_loss.value_and_grad(x[:, k], y[:, 0], quantile=level, reduction="none")
        np.testing.assert_array_equal((value[:, k], gradient[:, k]), one)
    np.testing.assert_allclose(value, reference.quantile_loss(x, y, quantiles=levels, reduction="none"))
    by = nl.QuantileLoss(quantiles=levels).grad(x, y, wrt="quantiles")
    wanted = reference.gradient(
        reference.quantile_loss, {"input": x, "target": y, "quantiles": levels}, "quantiles"
    )
    np.testing.assert_allclose(by, wanted, rtol=1e-6, atol=1e-9)
    total = nl.quantile_loss.grad(x, y, quantiles=levels, wrt="target", reduction="sum")
    np.testing.assert_allclose(total, -gradient.sum(axis=1, keepdims=True), rtol=1e-14)


def test_the_minimum_is_the_quantile_and_the_expectile(rng):
    y = rng.gamma(2.0, size=2001)
    at = np.quantile(y, 0.9)
    assert nl.quantile_loss.grad(
        np.full_like(y, at), y, quantile=0.9, reduction="sum"
    ).sum() == pytest.approx(0, abs=1)
    expectile = pytest.importorskip("scipy.stats").expectile(y, 0.9)
    slopes = nl.expectile_loss.grad(np.full_like(y, expectile), y, expectile=0.9, reduction="none")
    assert abs(slopes.sum()) < 1e-9 * abs(slopes).sum()


def test_a_tie_has_no_slope():
    x = np.ones(2)
    for options in ({"quantile": 0.9}, {"quantiles": 0.9}):
        np.testing.assert_array_equal(nl.quantile_loss.grad(x, x, **options), 0)
    assert np.isnan(nl.quantile_loss.grad(np.array([np.nan]), x[:1])).all()


def test_what_quantiles_refuse():
    x, y = np.ones((4, 4)), np.ones((4, 1))
    for target in (np.ones(4), np.ones((1, 4, 1)), np.ones((4, 3))):
        with pytest.raises(ValueError, match="^quantile_loss: target of shape .* does not fit input's shape"):
            nl.quantile_loss(x, target)
    with pytest.raises(ValueError, match=r"^quantile_loss: quantiles of shape \(3,\) does not fit"):
        nl.quantile_loss(x, y, quantiles=np.full(3, 0.5))
    for bad in (-0.1, 1.5, np.nan):
        with pytest.raises(ValueError, match=r"^quantile_loss: quantile must be in \[0, 1\], got"):
            nl.quantile_loss(x, y, quantile=bad)
        with pytest.raises(ValueError, match=r"^quantile_loss: quantiles must be in \[0, 1\], got"):
            nl.quantile_loss(x, y, quantiles=[0.5, 0.5, bad, 0.5])


# ---- domains ---------------------------------------------------------------------------------------


DOMAINS = [
    ("gamma_nll_loss", "target", -0.25, ">= 0"),
    ("tweedie_nll_loss", "target", -0.25, ">= 0"),
    ("msle_loss", "input", -1.25, ">= -1"),
    ("msle_loss", "target", -1.25, ">= -1"),
    ("sigmoid_focal_loss", "target", 1.25, "in [0, 1]"),
]


@pytest.mark.parametrize(("name", "argument", "value", "wanted"), DOMAINS)
@pytest.mark.thin(5)
def test_elements_out_of_the_domain(name, argument, value, wanted):
    arrays = {"input": np.ones(3), "target": np.ones(3)}
    arrays[argument][1] = value
    message = re.escape(f"{name}: {argument} must be {wanted}, got {argument}[1] = {value:g}")
    with pytest.raises(ValueError, match=f"^{message}"):
        nl.registry[name](**arrays)


# ---- the general loss ------------------------------------------------------------------------------


@pytest.mark.more
def test_the_general_loss_has_the_others_at_its_shapes(rng):
    x, y = rng.normal(0, 3, (2, 200))
    for c in (1.0, 0.25, 4.0):
        for alpha, wanted in {
            2.0: nl.mse_loss(x, y, reduction="none") / (2 * c * c),
            1.0: nl.pseudo_huber_loss(x, y, delta=c, reduction="none") / (c * c),
            0.0: nl.cauchy_loss(x, y, c=c * 2**0.5, reduction="none") / (c * c),
            -2.0: nl.geman_mcclure_loss(x, y, c=2 * c, reduction="none") / (c * c),
            -INF: nl.welsch_loss(x, y, c=c * 2**0.5, reduction="none") / (c * c),
        }.items():
            got = nl.general_robust_loss(x, y, alpha=alpha, c=c, reduction="none")
            np.testing.assert_allclose(got, wanted, rtol=4e-15)


def test_the_general_loss_is_smooth_in_its_shape():
    x = np.array([-1e4, -1.0, 1e-3, 2.0, 50.0])
    zero = np.zeros_like(x)
    for limit in (2.0, 0.0, 1.0):
        at = nl.general_robust_loss.value_grad_hess(x, zero, alpha=limit, reduction="none")
        for alpha in (np.nextafter(limit, -9), np.nextafter(limit, 9), limit - 1e-13, limit + 1e-13):
            near = nl.general_robust_loss.value_grad_hess(x, zero, alpha=alpha, reduction="none")
            for a, b in zip(at, near, strict=True):
                np.testing.assert_allclose(a, b, rtol=1e-11, atol=1e-14)
    at = nl.general_robust_loss.value_grad_hess(x, zero, alpha=-INF, reduction="none")
    near = nl.general_robust_loss.value_grad_hess(x, zero, alpha=-1e17, reduction="none")
    np.testing.assert_allclose(near[:2], at[:2], rtol=1e-14, atol=1e-20)
    # Where the slope is steepest the curvature is what is left of two terms of about 0.6.
    np.testing.assert_allclose(near[2], at[2], rtol=1e-14, atol=3e-16)


# ---- the focal loss --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", sweep([np.float32, np.float64], np.float64))
@pytest.mark.more
def test_focal_without_focus_is_binary_cross_entropy(dtype, rng):
    x = np.concatenate([rng.normal(0, 30, 500), [0, 1e4, -1e4, 90, -90, 800]]).astype(dtype)
    for y in (rng.integers(0, 2, x.size).astype(dtype), rng.random(x.size).astype(dtype)):
        got = nl.sigmoid_focal_loss.value_and_grad(x, y, gamma=0.0, alpha=-1.0, reduction="none")
        wanted = nl.binary_cross_entropy_with_logits.value_and_grad(x, y, reduction="none")
        np.testing.assert_allclose(got, wanted, rtol=2 * np.finfo(dtype).eps)


def test_focal_is_torchvisions(torch, rng):
    """Its text, in float64: it is not installed here."""
    x = rng.normal(0, 4, 300)
    for y in (rng.integers(0, 2, 300).astype(float), rng.random(300)):
        for alpha, gamma in [(0.25, 2.0), (-1.0, 2.0), (0.75, 0.5), (0.25, 0.0), (1.0, 1.0)]:
            inputs, targets = torch.tensor(x, requires_grad=True), torch.tensor(y, requires_grad=True)
            p = torch.sigmoid(inputs)
            entropy = torch.nn.functional.binary_cross_entropy_with_logits(inputs, targets, reduction="none")
            loss = entropy * (1 - (p * targets + (1 - p) * (1 - targets))) ** gamma
            if alpha >= 0:
                loss = (alpha * targets + (1 - alpha) * (1 - targets)) * loss
            loss.sum().backward()
            value, slopes = nl.sigmoid_focal_loss.value_and_grad(
                x, y, alpha=alpha, gamma=gamma, reduction="none", wrt=("input", "target")
            )
            np.testing.assert_allclose(value, loss.detach().numpy(), rtol=1e-9, atol=1e-15)
            for got, wanted in zip(slopes, (inputs.grad.numpy(), targets.grad.numpy()), strict=True):
                np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-12)


@pytest.mark.more
def test_focal_far_off_is_finite_by_every_argument():
    x = np.array([1e4, -1e4, 110.0, -110.0, 0.0] * 2, np.float32)
    for y in (np.arange(10) // 5, np.full(10, 0.5)):
        for gamma in (0.0, 0.1, 0.5, 2.0):
            for alpha in (-1.0, 0.25):
                value, slopes = nl.sigmoid_focal_loss.value_and_grad(
                    x, y.astype("f4"), alpha=alpha, gamma=gamma, reduction="none", wrt=("input", "target")
                )
                assert np.isfinite(value).all() and np.isfinite(slopes).all()


# ---- hosts -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["arctan_loss", "geman_mcclure_loss", "fair_loss", "cauchy_loss"])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.more
def test_residuals_that_overflow_give_limits(name, dtype):
    """Bounded losses are at their bound, without slope; Fair's is linear, Cauchy's a logarithm."""
    loss, big = nl.registry[name], np.finfo(dtype).max
    x = np.array([big, -big, np.inf, big / 4], dtype)
    c = 0.25
    value, slope, curvature = loss.value_grad_hess(x, np.zeros_like(x), c=c, reduction="none")
    if name == "cauchy_loss":
        size = np.abs(x.astype(float))
        np.testing.assert_allclose(value, c * c * (np.log(size) - np.log(c)), rtol=1e-6)
        assert np.all(np.abs(slope) <= 1e-30)
    elif name == "fair_loss":
        np.testing.assert_allclose(value, c * np.abs(x.astype(float)), rtol=1e-6)
        np.testing.assert_array_equal(slope, np.sign(x) * dtype(c))
    else:
        bound = c * c / 2 * (math.pi / 2 if name == "arctan_loss" else 1)
        np.testing.assert_allclose(value, bound, rtol=1e-6)
        assert not slope.any()
    assert not curvature.any()


def test_shapes_close_to_2_do_not_overflow_before_the_square():
    """There the loss is a huge power over a huge number: the power alone would be infinite."""
    x, alpha = np.array([1e15, 1e18], np.float32), float(np.nextafter(np.float32(2), np.float32(0)))
    value, slope = nl.general_robust_loss.value_and_grad(x, np.zeros_like(x), alpha=alpha, reduction="none")
    np.testing.assert_allclose(value, 0.5 * x.astype(float) ** 2, rtol=1e-4)
    np.testing.assert_allclose(slope, x, rtol=1e-4)


def test_tiny_scales_have_curvature():
    """A power's second derivative is 0, and was multiplied by the square of a slope that overflows."""
    x = np.array([1.0, 3.0], np.float32)
    for alpha in (1.0, 0.5, -2.0):
        made = nl.general_robust_loss.value_grad_hess(x, 0 * x, alpha=alpha, c=1e-30, reduction="none")
        assert np.isfinite(made).all()
        assert (abs(made[2]) <= 1e-28).all()


def test_tukeys_reference_of_a_large_scale():
    """Half a square, but for one part in 1e13: 1 less a cube would lose nine digits."""
    assert abs(reference.tukey_biweight_loss(np.float64(3), 0.0, c=1e7, reduction="none") / 4.5 - 1) < 1e-12


def test_the_reference_of_a_large_norm_does_not_overflow():
    d = np.array([[3.0, 4.0, -7.0]])
    np.testing.assert_allclose(reference.p_norm(d, 4096), [7], rtol=1e-15)
    np.testing.assert_allclose(reference.p_norm(d, 3), [434 ** (1 / 3)], rtol=1e-15)
    np.testing.assert_array_equal(
        reference.p_norm(np.array([[0.0], [np.inf], [np.nan]]), 2), [0, np.inf, np.nan]
    )


def test_they_are_scikit_learns(rng):
    """Its losses of the raw predictions, up to what depends on the target alone; slopes are the same."""
    losses = pytest.importorskip("sklearn._loss.loss")
    x, y = rng.normal(0, 1.5, 200), rng.gamma(1.5, 1.5, 200)
    both = rng.integers(0, 2, 200).astype(float)
    for ours, options, target, theirs, labels in [
        (nl.quantile_loss, {"quantile": 0.8}, y, losses.PinballLoss(quantile=0.8), y),
        (nl.gamma_nll_loss, {}, y, losses.HalfGammaLoss(), y),
        (nl.tweedie_nll_loss, {"power": 1.3}, y, losses.HalfTweedieLoss(power=1.3), y),
        (nl.exponential_loss, {}, 2 * both - 1, losses.ExponentialLoss(), both),
    ]:
        terms, gradient = theirs.loss_gradient(labels, x)
        value, slope, curvature = ours.value_grad_hess(x, target, **options, reduction="none")
        np.testing.assert_allclose(slope, gradient, rtol=1e-12, atol=1e-14)
        np.testing.assert_allclose(value, terms, rtol=1e-12, atol=1e-13)
        if ours is not nl.quantile_loss:  # its curvature is said to be 1
            np.testing.assert_allclose(curvature, theirs.gradient_hessian(labels, x)[1], rtol=1e-12)
    metrics = pytest.importorskip("sklearn.metrics")
    assert nl.mape_loss(x, y) == pytest.approx(metrics.mean_absolute_percentage_error(y, x), rel=1e-12)
    assert nl.msle_loss(abs(x), y) == pytest.approx(metrics.mean_squared_log_error(y, abs(x)), rel=1e-12)


def test_tukeys_is_statsmodels(rng):
    norm = pytest.importorskip("statsmodels.robust.norms").TukeyBiweight(c=2.5)
    r = rng.normal(0, 2, 200)
    terms, slope, curvature = nl.tukey_biweight_loss.value_grad_hess(r, 0 * r, c=2.5, reduction="none")
    np.testing.assert_allclose(slope, norm.psi(r), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(curvature, norm.psi_deriv(r), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(np.diff(terms), np.diff(norm.rho(r)), rtol=1e-10, atol=1e-12)
    np.testing.assert_allclose(nl.TukeyBiweightLoss().c, type(norm)().c)


@pytest.mark.parametrize("name", ["cauchy", "arctan", "soft_l1"])
def test_they_are_scipys(name):
    """Its cost and its gradient."""
    optimize = pytest.importorskip("scipy.optimize")
    rng = np.random.default_rng(5)
    t = np.linspace(0, 1, 60)
    y = 2 * t + 1 + rng.normal(0, 0.1, 60) + 4 * (rng.random(60) < 0.1)

    def residuals(w):
        return w[0] * t + w[1] - y

    fit = optimize.least_squares(
        residuals, [1.5, 1.2], lambda w: np.stack([t, np.ones(60)], axis=1), loss=name, f_scale=0.3
    )
    loss = nl.PseudoHuberLoss(delta=0.3) if name == "soft_l1" else nl.registry[f"{name}_loss"].Class(c=0.3)
    loss.reduction = "sum"
    value, slope = loss.value_and_grad(residuals(fit.x), np.zeros(60))
    assert value == pytest.approx(fit.cost, rel=1e-12)
    np.testing.assert_allclose([slope @ t, slope.sum()], fit.grad, atol=1e-12)


# ---- inside compiled code --------------------------------------------------------------------------


@pytest.mark.more
def test_options_inside_compiled_code(rng):
    quantile, general = nl.quantile_loss.jit, nl.general_robust_loss.scalar

    @njit
    def both(x, y, out):
        return quantile(x, y, quantile=0.9, out=out), general(x[0], y[0], alpha=-2.0)

    x, y = rng.normal(size=(2, 40))
    out = np.empty(40)
    value, one = both(x, y, out)
    wanted, slope = nl.quantile_loss.value_and_grad(x, y, quantile=0.9)
    assert value == pytest.approx(wanted, rel=1e-14)
    np.testing.assert_allclose(out, slope, rtol=1e-14)
    assert one == pytest.approx(reference.general_robust_loss(x[:1], y[:1], alpha=-2.0), rel=1e-13)
