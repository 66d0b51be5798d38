"""Losses in SciPy's optimisers, in statsmodels and in iminuit: against these, and against formulas."""

import pickle

import numpy as np
import pytest

import numbaloss as nl

optimize = pytest.importorskip("scipy.optimize")


@nl.elementwise_loss
def soft_l1(input, target):
    r = input - target
    return nl.math.sqrt(1 + r * r) - 1


@nl.elementwise_loss
def cauchy(input, target):
    r = input - target
    return 0.5 * nl.math.log1p(r * r)


@nl.elementwise_loss
def log_cosh(input, target, scale=1.0):
    d = abs((input - target) / scale)
    return d + nl.math.log1p(nl.math.exp(-2 * d)) - 0.6931471805599453


@nl.elementwise_loss
def quantile(input, target, alpha=0.9):
    d = target - input
    return nl.math.maximum(alpha * d, (alpha - 1) * d)


class Counted:
    """A loss of which calls are counted, by what they ask for."""

    def __init__(self, monkeypatch, loss):
        self.loss, self.modes = loss, []
        run = type(loss)._run

        def counted(of, mode, args, kwargs):
            self.modes.append(mode)
            return run(of, mode, args, kwargs)

        monkeypatch.setattr(type(loss), "_run", counted)


def regression(n=80, features=3):
    rng = np.random.default_rng(11)
    X = rng.normal(size=(n, features))
    y = X @ np.arange(1.0, features + 1) + rng.standard_t(2, n)
    return X, y, rng.random(n)


def differences(f, x, step=1e-6):
    """Central differences of a function by each parameter, along the last axis."""
    return np.stack([(f(x + step * e) - f(x - step * e)) / (2 * step) for e in np.eye(x.size)], axis=-1)


LINEAR = [
    (nl.mse_loss, {}),
    (nl.HuberLoss(delta=0.7), {}),
    (0.5 * nl.MSELoss() + log_cosh.Class(), {"reduction": "sum"}),
    (nl.MSELoss(reduction="sum") + log_cosh.Class(), {}),
    (log_cosh, {"scale": 2.0, "normalizer": 7.0}),
]


@pytest.mark.parametrize(("loss", "options"), LINEAR, ids=lambda x: getattr(x, "__name__", ""))
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.thin(5)
def test_derivatives_by_a_linear_models_parameters(loss, options, weighted):
    X, y, w = regression()
    options = {**options, "sample_weight": w} if weighted else options
    o = nl.optimize.objective(loss, X, y, **options)
    x = np.array([0.3, -1.0, 2.0])
    assert o.value(x) == float(loss(X @ x, y, **options)) and isinstance(o.value(x), float)
    np.testing.assert_allclose(o.gradient(x), differences(o.value, x), rtol=1e-6, atol=1e-7)
    hess = o.hess(x)
    np.testing.assert_allclose(hess, differences(o.gradient, x), rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(o.hessp(x, [1.0, 2.0, -1.0]), hess @ [1, 2, -1], rtol=1e-12)
    value, gradient = o.value_and_grad(x)
    assert value == o.value(x) and (gradient == o.gradient(x)).all()


def test_scipys_methods_find_the_minimum_of_least_squares():
    X, y, w = regression()
    wanted = np.linalg.lstsq(X * np.sqrt(w)[:, None], y * np.sqrt(w), rcond=None)[0]
    o = nl.optimize.objective(nl.mse_loss, X, y, sample_weight=w)
    for method, more in (
        ("BFGS", {"jac": o.gradient}),
        ("L-BFGS-B", {"jac": o.gradient}),
        ("Newton-CG", {"jac": o.gradient, "hessp": o.hessp}),
        ("trust-ncg", {"jac": o.gradient, "hess": o.hess}),
        ("trust-exact", {"jac": o.gradient, "hess": o.hess}),
        ("trust-constr", {"jac": o.gradient, "hessp": o.hessp}),
    ):
        found = optimize.minimize(o.value, np.zeros(3), method=method, **more)
        np.testing.assert_allclose(found.x, wanted, rtol=1e-4, err_msg=method)
    found = optimize.minimize(o.value_and_grad, np.zeros(3), jac=True)
    np.testing.assert_allclose(found.x, wanted, rtol=1e-5)


def test_logistic_regression_as_scikit_learn_fits_it():
    linear_model = pytest.importorskip("sklearn.linear_model")
    rng = np.random.default_rng(2)
    X = rng.normal(size=(200, 4))
    y = (X @ [1, -2, 0.5, 0] + rng.logistic(size=200) > 0).astype(float)
    o = nl.optimize.objective(nl.binary_cross_entropy_with_logits, X, y, reduction="sum")
    found = optimize.minimize(o.value_and_grad, np.zeros(4), jac=True, hess=o.hess, method="trust-exact")
    theirs = linear_model.LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10).fit(X, y)
    np.testing.assert_allclose(found.x, theirs.coef_[0], rtol=1e-5)


def classes():
    rng = np.random.default_rng(4)
    X, y = rng.normal(size=(60, 3)), rng.integers(0, 4, 60)
    y[::9] = -100
    q = rng.dirichlet(np.ones(4), 60)
    return X, y, q, rng.random(60), np.linspace(0.5, 2, 4)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize(
    "options", ["", "weight", "sample_weight", "label_smoothing", "normalizer", "probabilities"]
)
@pytest.mark.thin(4)
def test_the_softmaxs_hessian(options, reduction):
    X, y, q, w, of_classes = classes()
    given = {"weight": of_classes, "sample_weight": w, "label_smoothing": 0.2, "normalizer": 9.0}
    target = q if options == "probabilities" else y
    given = {options: given[options]} if options in given else {}
    o = nl.optimize.objective(nl.cross_entropy, X, target, outputs=4, reduction=reduction, **given)
    x = np.random.default_rng(5).normal(size=12)
    np.testing.assert_allclose(o.gradient(x), differences(o.value, x), rtol=1e-5, atol=1e-6)
    hess = o.hess(x)
    np.testing.assert_allclose(hess, differences(o.gradient, x), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(hess, hess.T, rtol=1e-12, atol=1e-16)
    v = np.random.default_rng(6).normal(size=12)
    np.testing.assert_allclose(o.hessp(x, v), hess @ v, rtol=1e-11, atol=1e-13)


def test_rows_of_outputs_of_losses_of_elements():
    X = regression()[0]
    y = np.random.default_rng(7).normal(size=(80, 2))
    o = nl.optimize.objective(log_cosh, X, y, outputs=2)
    x = np.arange(6.0) / 3
    np.testing.assert_allclose(o.gradient(x), differences(o.value, x), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(o.hess(x), differences(o.gradient, x), rtol=1e-6, atol=1e-8)
    np.testing.assert_allclose(o.hessp(x, x[::-1]), o.hess(x) @ x[::-1], rtol=1e-12)


def test_one_class():
    X = regression()[0]
    o = nl.optimize.objective(nl.cross_entropy, X, np.zeros(80, int), outputs=1)
    assert o.value(np.ones(3)) == 0 and not o.hess(np.ones(3)).any()


def test_sparse_matrices():
    sparse = pytest.importorskip("scipy.sparse")
    X, y, _ = regression()
    X = np.where(X > 0.5, X, 0)
    labels = classes()[1].repeat(2)[:80]
    for loss, target, outputs, x in (
        (log_cosh, y, None, np.ones(3)),
        (nl.cross_entropy, labels, 4, np.linspace(-1, 1, 12)),
    ):
        dense = nl.optimize.objective(loss, X, target, outputs=outputs)
        for kind in (sparse.csr_matrix, sparse.csc_array, sparse.coo_array):
            o = nl.optimize.objective(loss, kind(X), target, outputs=outputs)
            np.testing.assert_allclose(o.value(x), dense.value(x), rtol=1e-13)
            np.testing.assert_allclose(o.gradient(x), dense.gradient(x), rtol=1e-12)
            np.testing.assert_allclose(o.hess(x), dense.hess(x), rtol=1e-12, atol=1e-16)
            np.testing.assert_allclose(o.hessp(x, x), dense.hessp(x, x), rtol=1e-12, atol=1e-16)


@pytest.mark.more
def test_other_softmaxes_have_no_hessian():
    X, y = classes()[:2]
    x = np.random.default_rng(5).normal(size=12)
    for loss, options in (
        (nl.focal_cross_entropy, {}),
        (nl.cross_entropy, {"softcap": 3.0}),
        (nl.CrossEntropyLoss(lse_square_scale=0.1), {}),
        (nl.CrossEntropyLoss() + nl.FocalCrossEntropyLoss(), {}),
        (nl.multi_margin_loss, {}),
    ):
        y = np.maximum(y, 0)
        o = nl.optimize.objective(loss, X, y, outputs=4, **options)
        np.testing.assert_allclose(o.gradient(x), differences(o.value, x), rtol=1e-5, atol=1e-6)
        for name in ("hess", "hessp"):
            with pytest.raises(AttributeError, match="is not known exactly"):
                getattr(o, name)
    assert not hasattr(nl.optimize.Objective(nl.mse_loss, np.exp, np.dot, x), "hess")


def test_each_point_is_computed_once(monkeypatch):
    X, y, _ = regression()
    counted = Counted(monkeypatch, nl.huber_loss)
    o = nl.optimize.objective(nl.huber_loss, X, y)
    x = np.ones(3)
    for _ in range(2):
        o.value(x), o.gradient(x.copy()), o.value_and_grad(list(x))
    assert counted.modes == ["value_and_grad"]
    o.hess(x), o.hessp(x, x), o.value(x)
    assert counted.modes == ["value_and_grad", "value_grad_hess"]
    before = o.value(x)
    x[0] = 5.0  # the optimiser's own array
    assert o.value(x) != before
    o.gradient(x), o.hessp(x, np.ones(3)), o.hess(x)
    assert counted.modes[2:] == ["value_grad_hess"]
    gradient = o.gradient(x)
    gradient[:] = 0
    assert o.gradient(x).all()


def test_a_model_of_the_callers():
    t = np.linspace(0, 2, 40)
    y = 2 * np.exp(-1.5 * t) + 0.1
    y[::8] += 3
    calls = []

    def model(x):
        calls.append(x)
        return x[0] * np.exp(-x[1] * t) + x[2]

    def vjp(x, d):
        e = np.exp(-x[1] * t)
        return [d @ e, d @ (-x[0] * t * e), d.sum()]

    o = nl.optimize.Objective(nl.L1Loss() + 0.01 * nl.MSELoss(), model, vjp, y)
    x = np.array([1.0, 0.5, 0.3])
    np.testing.assert_allclose(o.gradient(x), differences(o.value, x), rtol=1e-6)
    o = nl.optimize.Objective(log_cosh, model, vjp, y, scale=0.01)
    calls.clear()
    found = optimize.minimize(o.value, x, jac=o.gradient, method="BFGS")
    np.testing.assert_allclose(found.x, [2, 1.5, 0.1], atol=0.01)
    assert len(calls) == len({tuple(x) for x in calls}) <= found.nfev


def test_an_error_leaves_nothing_behind():
    o = nl.optimize.Objective(nl.mse_loss, lambda x: x[:1] / (x[0] > 0), lambda x, d: d, np.ones(1))
    assert o.value([2.0]) == 1.0
    with np.errstate(invalid="raise", divide="raise"):
        for _ in range(2):
            with pytest.raises(FloatingPointError):
                o.value([-2.0])
    assert o.value([2.0]) == 1.0


def test_wrong_arguments_are_refused():
    X, y, _ = regression()
    with pytest.raises(TypeError, match="objective: loss must be a loss"):
        nl.optimize.objective(np.square, X, y)
    for loss, options in (
        (nl.mse_loss, {"reduction": "none"}),
        (nl.MSELoss(reduction="none"), {}),
        (nl.BCELoss(reduction="none") + nl.MSELoss(reduction="none"), {}),
    ):
        with pytest.raises(ValueError, match="reduction must be 'mean' or 'sum', got 'none'"):
            nl.optimize.objective(loss, X, y, **options)
    assert nl.optimize.objective(nl.MSELoss(reduction="none"), X, y, reduction="sum").value(np.zeros(3)) > 0
    with pytest.raises(ValueError, match=r"X must have shape \(N, F\), got \(80,\)"):
        nl.optimize.objective(nl.mse_loss, y, y)
    with pytest.raises(ValueError, match=r"x must hold 3 parameters, got shape \(4,\)"):
        nl.optimize.objective(nl.mse_loss, X, y).value(np.zeros(4))
    with pytest.raises(ValueError, match=r"x must hold 5 x 3 parameters, got shape \(3,\)"):
        nl.optimize.objective(nl.cross_entropy, X, y, outputs=5).value(np.zeros(3))
    with pytest.raises(ValueError, match="mse_loss: target must have input's shape"):
        nl.optimize.objective(nl.mse_loss, X, y[1:]).value(np.zeros(3))


# ---- least_squares --------------------------------------------------------------------------------------

THEIRS = {"huber": nl.huber_loss, "soft_l1": soft_l1, "cauchy": cauchy, "linear": 0.5 * nl.MSELoss()}


@pytest.mark.parametrize("name", THEIRS)
@pytest.mark.thin(4)
def test_least_squares_with_scipys_losses(name):
    rng = np.random.default_rng(8)
    t = np.linspace(0, 3, 60)
    y = 3 * np.exp(-0.8 * t) + rng.normal(0, 0.05, 60)
    y[::10] += 5

    def residuals(x):
        return x[0] * np.exp(-x[1] * t) - y

    for method, scale in (("trf", 0.1), ("dogbox", 0.3)):
        ours, theirs = (
            optimize.least_squares(residuals, [1.0, 0.1], loss=loss, f_scale=scale, method=method)
            for loss in (nl.optimize.rho(THEIRS[name]), name)
        )
        np.testing.assert_allclose(ours.x, theirs.x, rtol=1e-7)
        np.testing.assert_allclose(ours.cost, theirs.cost, rtol=1e-10)
        assert ours.nfev == theirs.nfev


FORMULAS = {
    "huber": lambda z: (
        np.where(z <= 1, z, 2 * np.sqrt(z) - 1),
        np.where(z <= 1, 1, 1 / np.sqrt(np.maximum(z, 1))),
        np.where(z <= 1, 0, -0.5 * np.maximum(z, 1) ** -1.5),
    ),
    "soft_l1": lambda z: (2 * z / (np.sqrt(1 + z) + 1), (1 + z) ** -0.5, -0.5 * (1 + z) ** -1.5),
    "cauchy": lambda z: (np.log1p(z), 1 / (1 + z), -1 / (1 + z) ** 2),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_rho_down_to_zero(name):
    z = np.concatenate([[0.0], np.logspace(-30, 6, 145)])
    value, first, second = nl.optimize.rho(THEIRS[name])(z)
    wanted = FORMULAS[name](z)
    np.testing.assert_allclose(value, wanted[0], rtol=1e-12, atol=1e-15)
    np.testing.assert_allclose(first, wanted[1], rtol=1e-7 if name == "soft_l1" else 1e-10)
    # Below 1e-6 the second is the one there: it changes by 2e-6 of Cauchy's.
    np.testing.assert_allclose(second, wanted[2], rtol=3e-6, atol=1e-7)
    # What SciPy makes of the two is right to rounding.
    np.testing.assert_allclose(first + 2 * second * z, wanted[1] + 2 * wanted[2] * z, rtol=1e-7, atol=1e-12)


def test_rho_of_a_kink_and_of_log_cosh():
    value, first, second = nl.optimize.rho(nl.L1Loss())(np.array([0.0, 1e-40, 0.25]))
    np.testing.assert_allclose(value, [0, 2e-20, 1])
    np.testing.assert_allclose(first, [1e7, 1e7, 2])
    np.testing.assert_allclose(second[2], -4)
    assert np.isfinite(second).all()
    z = np.array([0.0, 1e-18, 1e-12, 1e-7, 1e-3, 1.0])
    r = np.sqrt(z)
    first, second = nl.optimize.rho(log_cosh)(z)[1:]
    np.testing.assert_allclose(first[1:], np.tanh(r[1:]) / r[1:], rtol=1e-7)
    np.testing.assert_allclose(first[0], 1, rtol=1e-7)
    np.testing.assert_allclose(second[:4], -1 / 3, rtol=1e-5)


@pytest.mark.more
def test_what_is_no_loss_of_residuals_is_refused():
    with pytest.raises(
        ValueError, match="rho: loss must be the same for a residual and its negative, and quan"
    ):
        nl.optimize.rho(quantile)
    for loss in (nl.poisson_nll_loss, nl.SoftMarginLoss(), nl.MSELoss() + nl.SoftMarginLoss()):
        for make in (nl.optimize.rho, nl.optimize.norm):
            with pytest.raises(ValueError, match="must depend on input - target alone"):
                make(loss)
    with pytest.raises(ValueError, match="must take two arrays, got one of input, target, var"):
        nl.optimize.norm(nl.gaussian_nll_loss)
    with pytest.raises(TypeError, match="rho: loss must be a loss"):
        nl.optimize.rho("huber")
    with pytest.raises(ValueError, match="huber_loss: delta must be > 0"):
        nl.optimize.rho(nl.huber_loss, delta=-1.0)


def test_pickles():
    z = np.array([0.5, 4.0])
    for made in (nl.optimize.rho(nl.huber_loss, delta=0.5), nl.optimize.norm(soft_l1.Class())):
        again = pickle.loads(pickle.dumps(made))
        assert repr(again) == repr(made)
        np.testing.assert_array_equal(again(z), made(z))
    assert repr(nl.optimize.rho(nl.huber_loss, delta=0.5)) == "rho(huber_loss, delta=0.5)"
    X, y, _ = regression()
    o = nl.optimize.objective(nl.huber_loss, X, y)
    with pytest.raises(AttributeError):
        o.nothing  # noqa: B018 - it raises
    again = pickle.loads(pickle.dumps(o))
    assert again.value(np.ones(3)) == o.value(np.ones(3))


# ---- statsmodels and iminuit ----------------------------------------------------------------------------


def test_norm_is_statsmodels_huber():
    sm = pytest.importorskip("statsmodels.api")
    theirs, ours = sm.robust.norms.HuberT(), nl.optimize.norm(nl.HuberLoss(delta=1.345))
    z = np.array([-5.0, -1.345, -1.0, -1e-9, 0.0, 1e-300, 0.5, 1.345, 20.0])
    for name in ("rho", "psi", "weights", "psi_deriv", "__call__"):
        np.testing.assert_allclose(getattr(ours, name)(z), getattr(theirs, name)(z), rtol=1e-14, err_msg=name)
    assert ours.rho(0.5) == 0.125
    X, y, _ = regression()
    for cov in ("H1", "H2", "H3"):
        a, b = (sm.RLM(y, sm.add_constant(X), M=norm).fit(cov=cov) for norm in (ours, theirs))
        np.testing.assert_allclose(a.params, b.params, rtol=1e-10)
        np.testing.assert_allclose(a.bse, b.bse, rtol=1e-10)
        np.testing.assert_allclose(a.weights, b.weights, rtol=1e-9)
    assert "Norm" in a.summary().as_text()


def test_norms_of_other_losses():
    """Of an uneven loss too, by the expectile's formula."""
    sm = pytest.importorskip("statsmodels.api")

    @nl.elementwise_loss
    def expectile(input, target):
        d = input - target
        return d * d * nl.math.where(d > 0, 0.9, 0.1)

    z = np.array([-2.0, 0.5, 3.0])
    ours = nl.optimize.norm(expectile)
    np.testing.assert_allclose(ours.weights(z), [0.2, 1.8, 1.8])
    X, y, _ = regression()
    fit = sm.RLM(y, X, M=nl.optimize.norm(cauchy)).fit(tol=1e-12, maxiter=200)
    r = (y - X @ fit.params) / fit.scale
    np.testing.assert_allclose(X.T @ (r / (1 + r * r)), 0, atol=1e-6)


def test_minuit():
    iminuit = pytest.importorskip("iminuit")
    rng = np.random.default_rng(9)
    X = np.column_stack([np.ones(200), rng.normal(size=200)])
    y = rng.poisson(np.exp(X @ [0.5, 0.8])).astype(float)
    cost = nl.optimize.objective(nl.poisson_nll_loss, X, y, reduction="sum")
    minuit = iminuit.Minuit(cost.value, np.zeros(2), grad=cost.gradient)
    minuit.errordef = iminuit.Minuit.LIKELIHOOD
    minuit.tol = 1e-4
    minuit.migrad()
    minuit.hesse()
    assert minuit.valid and minuit.ngrad
    rate = np.exp(X @ np.array(minuit.values))
    np.testing.assert_allclose(X.T @ (rate - y), 0, atol=0.01)
    fisher = np.linalg.inv(X.T @ (rate[:, None] * X))
    np.testing.assert_allclose(np.array(minuit.covariance), fisher, rtol=1e-3, atol=1e-6)
