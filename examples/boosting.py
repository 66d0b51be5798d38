"""Gradient boosting of a loss that no booster has, on the diabetes data: too low a prediction costs more.

The loss is a function of two lines. Each booster that is installed is trained with it, and with its own
squared error, for the same number of rounds.

    python examples/boosting.py [picture.svg]
"""

import importlib.util
import sys
from collections.abc import Callable

import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.model_selection import train_test_split

import numbaloss as nl

ROUNDS, RATE, DEPTH, LEAST = 60, 0.1, 3, 10


@nl.elementwise_loss
def cost(prediction, target, low=5.0):
    """Squares, `low` times as dear where the prediction is too low."""
    d = prediction - target
    return d * d if d > 0 else low * d * d


def hist_gradient(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, ours: bool) -> np.ndarray:
    model = HistGradientBoostingRegressor(
        loss=nl.boosting.hist_gradient(cost) if ours else "squared_error",
        max_iter=ROUNDS,
        learning_rate=RATE,
        max_depth=DEPTH,
        min_samples_leaf=LEAST,
    )
    return model.fit(x, y).predict(x_test)


def xgboost(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, ours: bool) -> np.ndarray:
    import xgboost as xgb

    objective = nl.boosting.xgboost(cost)
    start = objective.initial_score(y) if ours else y.mean()
    data = xgb.DMatrix(x, label=y, base_margin=np.full(len(y), start))
    params = {"eta": RATE, "max_depth": DEPTH, "min_child_weight": LEAST, "nthread": 2}
    model = xgb.train(params, data, ROUNDS, obj=objective if ours else None)
    return model.predict(xgb.DMatrix(x_test, base_margin=np.full(len(x_test), start)))


def lightgbm(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, ours: bool) -> np.ndarray:
    import lightgbm as lgb

    objective = nl.boosting.lightgbm(cost)
    start = objective.initial_score(y) if ours else y.mean()
    data = lgb.Dataset(x, label=y, init_score=np.full(len(y), start))
    params = {"learning_rate": RATE, "num_leaves": 2**DEPTH, "min_data_in_leaf": LEAST, "verbose": -1}
    params |= {
        "num_threads": 2,
        "objective": objective if ours else "regression",
        "boost_from_average": False,
    }
    return lgb.train(params, data, ROUNDS).predict(x_test) + start


def catboost(x: np.ndarray, y: np.ndarray, x_test: np.ndarray, ours: bool) -> np.ndarray:
    import catboost as cb

    objective = nl.boosting.catboost(cost)
    start = objective.initial_score(y) if ours else y.mean()
    params = dict(iterations=ROUNDS, learning_rate=RATE, depth=DEPTH, thread_count=2, verbose=0)
    if ours:
        params |= dict(loss_function=objective, eval_metric=objective.metric)
    model = cb.CatBoostRegressor(**params, random_seed=0, allow_writing_files=False)
    model.fit(cb.Pool(x, y, baseline=np.full(len(y), start)))
    return model.predict(x_test) + start


def draw(costs: dict[str, tuple[float, float]], path: str) -> None:
    """Each booster's cost, with its own loss and with ours."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    places, (before, after) = np.arange(len(costs)), zip(*costs.values(), strict=True)
    theirs = axes.bar(places - 0.2, before, 0.38, color="#D55E00", hatch="//", edgecolor="white")
    ours = axes.bar(places + 0.2, after, 0.38, color="#0072B2")
    for bars in (theirs, ours):
        axes.bar_label(bars, fmt="%.0f")
    axes.set_xticks(places, list(costs))
    axes.set(title="Cost of the test set where too low a prediction costs more")
    axes.set_ylabel("root of the mean cost")
    axes.margins(y=0.1)
    names = ["trained with its own squared error", "with the cost, by numbaloss"]
    figure.legend([theirs, ours], names, loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)


def main(path: str | None = None) -> int:
    x, x_test, y, y_test = train_test_split(*load_diabetes(return_X_y=True), test_size=0.25, random_state=0)
    boosters: dict[str, Callable[..., np.ndarray]] = {"sklearn": hist_gradient}
    boosters |= {"xgboost": xgboost, "lightgbm": lightgbm, "catboost": catboost}
    print("cost of the test set, root of the mean     its squared error   numbaloss    too low")
    good, costs = True, {}
    for name, fit in boosters.items():
        if importlib.util.find_spec(name) is None:
            print(f"  {name:38} is not installed")
            continue
        theirs, ours = (fit(x, y, x_test, own) for own in (False, True))
        before, after = (float(np.sqrt(cost(p.astype(float), y_test))) for p in (theirs, ours))
        costs[name] = before, after
        shares = f"{(theirs < y_test).mean():.0%} -> {(ours < y_test).mean():.0%}"
        print(f"  {name:38} {before:12.1f} {after:19.1f}   {shares:>12}")
        good = good and after < before
    if path:
        draw(costs, path)
        print(f"picture: {path}")
    print("all are better off with the loss that counts" if good else "WORSE with the loss that counts")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
