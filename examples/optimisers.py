"""One robust regression by four optimisers: Fair's loss on scikit-learn's diabetes data, a tenth spoilt.

The same loss is an objective of `scipy.optimize.minimize` with its exact Hessian, a loss of `least_squares`,
a norm of statsmodels' robust linear model, and a cost function of iminuit. All find the same minimum.

    python examples/optimisers.py [picture.svg]  # statsmodels and iminuit where they are installed
"""

import importlib.util
import sys

import numpy as np
from scipy.optimize import least_squares, minimize
from sklearn.datasets import load_diabetes
from sklearn.linear_model import LinearRegression
from sklearn.model_selection import train_test_split

import numbaloss as nl

SCALE = 40.0  # residuals beyond it count in proportion, not by their square


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features of unit variance with a column of ones, and targets; a tenth of those to fit are too large."""
    x, y = load_diabetes(return_X_y=True)
    x = np.column_stack([x / x.std(axis=0), np.ones(len(y))])
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.25, random_state=0)
    rng = np.random.default_rng(0)
    return x, x_test, np.where(rng.random(len(y)) < 0.1, y + rng.uniform(300, 900, len(y)), y), y_test


def draw(errors: dict[str, float], path: str) -> None:
    """The error of each fit on clean data; the last fit is not robust."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    bars = axes.barh(list(errors), list(errors.values()), color="#0072B2")
    bars[-1].set(facecolor="#D55E00", hatch="//", edgecolor="white")
    axes.bar_label(bars, fmt="%.2f", padding=3)
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.set_xlabel("mean absolute error on clean data")
    figure.suptitle("One minimum by every optimiser of the robust loss")
    figure.savefig(path, dpi=120)


def main(path: str | None = None) -> int:
    x, x_test, y, y_test = load()
    start = np.zeros(x.shape[1])
    start[-1] = np.median(y)
    fair = nl.FairLoss(c=SCALE, reduction="sum")
    cost = nl.optimize.objective(fair, x, y)
    newton = minimize(cost.value_and_grad, start, jac=True, hessp=cost.hessp, method="trust-ncg")
    found = {f"minimize, trust-ncg, {newton.nit} steps": newton.x}
    squares = least_squares(
        lambda w: x @ w - y, start, jac=lambda w: x, loss=nl.optimize.rho(fair), ftol=1e-12, xtol=1e-12
    )
    found[f"least_squares, {squares.nfev} evaluations"] = squares.x
    if importlib.util.find_spec("statsmodels"):
        from statsmodels.robust.robust_linear_model import RLM

        norm = nl.optimize.norm(nl.FairLoss(c=1.0))
        model = RLM(y, x, M=norm).fit(scale_est=fixed_scale, conv="coefs", tol=1e-8, maxiter=500)
        found["statsmodels' RLM"] = model.params
    if importlib.util.find_spec("iminuit"):
        from iminuit import Minuit

        minuit = Minuit(cost.value, start, grad=cost.gradient)
        minuit.errordef, minuit.strategy, minuit.tol = Minuit.LIKELIHOOD, 0, 1e-8
        found["iminuit, migrad"] = np.array(minuit.migrad().values)
    found["least squares, not robust"] = LinearRegression(fit_intercept=False).fit(x, y).coef_

    print(f"{'':32} {'loss':>10} {'from the first':>14} {'error on clean data':>20}")
    errors = {}
    for name, w in found.items():
        away, error = np.abs(w - newton.x).max(), np.abs(x_test @ w - y_test).mean()
        print(f"{name:32} {cost.value(w):10.2f} {away:14.1e} {error:20.2f}")
        errors[name] = error
    if path:
        draw(errors, path)
        print(f"picture: {path}")
    robust = list(found.values())[:-1]
    assert all(cost.value(w) < 1.000001 * cost.value(newton.x) for w in robust)
    return 0


def fixed_scale(residuals: np.ndarray) -> float:
    return SCALE


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
