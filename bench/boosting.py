"""What stands for the curvature in gradient boosting, and what an objective costs.

    python -m numbaloss.bench.boosting [--markdown FILE]

First table: losses by curvature policies, trained by XGBoost on data that scikit-learn carries: the loss of
rows that were held out, in five folds, over that of the best constant. Second: the objective's own time in a
round of 200,000 rows of 20 features, beside the usual objective in NumPy, in turn.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xgboost
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, make_regression
from sklearn.model_selection import KFold

import numbaloss as nl

from . import machine
from .report import markdown

POLICIES = "exact", "majorizer", "absolute", "gradient", "fisher", "gershgorin"
FLOOR = 1e-6  # under which XGBoost takes a curvature for none
ROUNDS, FOLDS = 100, 5
PARAMETERS: dict[str, Any] = {"eta": 0.1, "max_depth": 3, "nthread": 2, "seed": 0}


def diabetes(scale: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    x, y = load_diabetes(return_X_y=True)
    return x, y * scale


def counts() -> tuple[np.ndarray, np.ndarray]:
    x, y = load_diabetes(return_X_y=True)
    return x, np.round(y / 25)


# Each with data of its kind: targets in units of about the losses' scale.
CASES: list[tuple[str, Any, Callable[[], Any]]] = [
    ("huber_loss", nl.HuberLoss(delta=0.5), lambda: diabetes(0.01)),
    ("pseudo_huber_loss", nl.PseudoHuberLoss(delta=0.5), lambda: diabetes(0.01)),
    ("cauchy_loss", nl.CauchyLoss(c=0.5), lambda: diabetes(0.01)),
    ("expectile_loss 0.8", nl.ExpectileLoss(expectile=0.8), lambda: diabetes(0.01)),
    ("quantile_loss 0.8", nl.QuantileLoss(quantile=0.8), lambda: diabetes(0.01)),
    ("poisson_nll_loss", nl.PoissonNLLLoss(full=True), counts),
    ("gamma_nll_loss", nl.GammaNLLLoss(), lambda: diabetes(0.01)),
    ("binary_cross_entropy_with_logits", nl.BCEWithLogitsLoss(), lambda: load_breast_cancer(return_X_y=True)),
    ("cross_entropy", nl.CrossEntropyLoss(), lambda: load_digits(return_X_y=True)),
]


def held_out(loss: Any, x: np.ndarray, y: np.ndarray, policy: str) -> float | None:
    """Return the loss of held-out rows over that of the best constant; None where there is no such policy."""
    try:
        objective = nl.boosting.xgboost(loss, curvature=policy, floor=FLOOR)
    except ValueError:
        return None
    classes = int(y.max()) + 1 if objective.is_of_classes else 1
    more = {"num_class": classes} if objective.is_of_classes else {}
    ours = constant = 0.0
    for train, test in KFold(FOLDS, shuffle=True, random_state=0).split(x):
        start = objective.initial_score(y[train])

        def margin(rows: np.ndarray, start: Any = start) -> np.ndarray:
            return np.tile(start, (len(rows), 1)) if objective.is_of_classes else np.full(len(rows), start)

        data = xgboost.DMatrix(x[train], label=y[train], base_margin=margin(train))
        trees = xgboost.train({**PARAMETERS, **more}, data, ROUNDS, obj=objective)
        raw = trees.predict(xgboost.DMatrix(x[test], base_margin=margin(test)), output_margin=True)
        ours += objective.sums(raw.astype(np.float64), y[test])[0]
        constant += objective.sums(margin(test), y[test])[0]
    return ours / constant


def policies() -> list[list[str]]:
    rows = []
    for name, loss, data in CASES:
        x, y = data()
        found = [held_out(loss, x, y, policy) for policy in POLICIES]
        best = min(f for f in found if f is not None)
        rows.append([name, *("-" if f is None else f"{f:.4f}" + " *" * (f == best) for f in found)])
    return rows


# ---- time -------------------------------------------------------------------------------------------------


def numpy_logistic(raw: np.ndarray, data: Any) -> tuple[np.ndarray, np.ndarray]:
    p = 1 / (1 + np.exp(-raw))
    return p - data.get_label(), p * (1 - p)


def numpy_squares(raw: np.ndarray, data: Any) -> tuple[np.ndarray, np.ndarray]:
    d = raw - data.get_label()
    return 2 * d, np.full_like(d, 2)


def numpy_huber(raw: np.ndarray, data: Any) -> tuple[np.ndarray, np.ndarray]:
    d = raw - data.get_label()
    small = np.abs(d) <= 1
    return np.where(small, d, np.sign(d)), np.where(small, 1.0, 0.0) + FLOOR


def numpy_softmax(raw: np.ndarray, data: Any) -> tuple[np.ndarray, np.ndarray]:
    e = np.exp(raw - raw.max(axis=1, keepdims=True))
    p = e / e.sum(axis=1, keepdims=True)
    g = p.copy()
    g[np.arange(len(p)), data.get_label().astype(int)] -= 1
    return g, p * (1 - p)


TIMED: list[tuple[str, Any, Any, int]] = [
    ("mse_loss", nl.mse_loss, numpy_squares, 1),
    ("binary_cross_entropy_with_logits", nl.binary_cross_entropy_with_logits, numpy_logistic, 2),
    ("huber_loss", nl.huber_loss, numpy_huber, 1),
    ("cross_entropy, 5 classes", nl.cross_entropy, numpy_softmax, 5),
]


class Clock:
    """A function, and the seconds of each of its calls."""

    def __init__(self, objective: Any) -> None:
        self.objective, self.seconds = objective, []  # type: Any, list[float]

    def __call__(self, *arguments: Any) -> Any:
        start = time.perf_counter()
        found = self.objective(*arguments)
        self.seconds.append(time.perf_counter() - start)
        return found


def times(rows: int, features: int, rounds: int = 10, repeats: int = 3) -> list[list[str]]:
    table = []
    for name, loss, usual, classes in TIMED:
        x, y = make_regression(rows, features, noise=1.0, random_state=0)
        y = (y - y.mean()) / y.std()
        if classes > 1:
            y = np.searchsorted(np.quantile(y, np.linspace(0, 1, classes + 1)[1:-1]), y)
        params = {"max_depth": 6, "nthread": 2} | ({"num_class": classes} if classes > 2 else {})
        data = xgboost.DMatrix(x.astype(np.float32), label=y)
        objective: Any = nl.boosting.xgboost(loss)
        sides = [Clock(objective), Clock(usual)]
        each: list[float] = []
        xgboost.train(params, data, 1, obj=sides[0])  # compiles
        sides[0].seconds.clear()
        for _ in range(repeats):
            for side in sides:
                start = time.perf_counter()
                xgboost.train(params, data, rounds, obj=side)
                if side is sides[0]:
                    each.append((time.perf_counter() - start) / rounds)
        ours, theirs = (statistics.median(side.seconds) for side in sides)
        a_round = statistics.median(each)
        table.append(
            [
                name,
                f"{a_round * 1e3:.0f} ms",
                f"{ours * 1e3:.2f} ms",
                f"{ours / a_round:.1%}",
                f"{theirs * 1e3:.2f} ms",
                f"{theirs / ours:.1f}",
            ]
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--markdown", type=Path)
    parser.add_argument("--rows", type=int, default=200_000)
    options = parser.parse_args()
    text = "\n".join(
        [
            "# Gradient boosting",
            "",
            machine.heading("xgboost"),
            "",
            f"## {len(CASES)} losses by what stands for the curvature",
            "",
            "The loss of held-out rows over that of the best constant; a star is at the best of a row.",
            f"{FOLDS} folds, {ROUNDS} trees of depth {PARAMETERS['max_depth']}, `eta` {PARAMETERS['eta']},",
            f"a floor of {FLOOR:g}. Diabetes (targets over 100, or counts), breast cancer, digits.",
            "",
            markdown(["loss", *POLICIES], policies()),
            "",
            f"## A round of {options.rows:,} rows of 20 features",
            "",
            "Medians; our objective and the usual one in NumPy in turn, 2 threads. The usual one gets its",
            "copy of the targets from XGBoost; ours reads them where they lie.",
            "",
            markdown(
                [
                    "loss",
                    "round",
                    "objective",
                    "of it (3%)",
                    "NumPy's",
                    "NumPy's / ours",
                ],
                times(options.rows, 20),
            ),
            "",
        ]
    )
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
