"""Robust linear regression by a loop of one's own: Huber loss on scikit-learn's diabetes data.

Trains on data with gross errors in a tenth of the targets, by gradient descent with momentum, and compares
the error on clean test data with scikit-learn's HuberRegressor and with least squares.

    python examples/huber_regression.py [picture.svg]
"""

import sys

import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.linear_model import HuberRegressor, LinearRegression
from sklearn.metrics import mean_absolute_error
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from tqdm import trange

import numbaloss as nl

EPOCHS, RATE, MOMENTUM = 2000, 0.1, 0.9


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y = load_diabetes(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.25, random_state=0)
    rng = np.random.default_rng(0)
    spoilt = rng.random(len(y)) < 0.1
    y = np.where(spoilt, y + rng.uniform(300, 900, len(y)), y)
    scale = StandardScaler().fit(x)
    return scale.transform(x), scale.transform(x_test), y, y_test


def train(x: np.ndarray, y: np.ndarray, delta: float) -> tuple[np.ndarray, float]:
    """Weights and bias that minimise the mean Huber loss."""
    w, b = np.zeros(x.shape[1]), float(np.median(y))
    speed_w, speed_b = np.zeros_like(w), 0.0
    slope = np.empty_like(y)  # the gradient by the predictions, in the same memory every time
    for _ in (bar := trange(EPOCHS, desc="huber", file=sys.stdout, disable=not sys.stdout.isatty())):
        loss, _ = nl.huber_loss.value_and_grad(x @ w + b, y, delta=delta, out=slope)
        speed_w = MOMENTUM * speed_w - RATE * (x.T @ slope)
        speed_b = MOMENTUM * speed_b - RATE * slope.sum()
        w, b = w + speed_w, b + speed_b
        bar.set_postfix(loss=f"{loss:.1f}", refresh=False)
    return w, b


def draw(target: np.ndarray, predictions: dict[str, np.ndarray], path: str) -> None:
    """What each fit predicts, against what is true."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    styles = dict(color="#0072B2", marker="o"), dict(color="#D55E00", marker="x")
    for (name, prediction), style in zip(predictions.items(), styles, strict=True):
        axes.scatter(target, prediction, s=22, alpha=0.8, label=name, **style)
    axes.axline((150, 150), slope=1, color="black", linestyle="--", linewidth=1, label="exact")
    axes.set(title="Predictions for clean data, after training with 10% gross errors", ylabel="predicted")
    axes.set(xlabel="true measure of the disease's progression")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(path: str | None = None) -> int:
    x, x_test, y, y_test = load()
    peer = HuberRegressor(epsilon=1.35, alpha=0.0, max_iter=1000).fit(x, y)
    # The same knee as the peer's: it estimates the scale of the noise along with the weights.
    w, b = train(x, y, delta=peer.epsilon * peer.scale_)
    huber, linear = x_test @ w + b, LinearRegression().fit(x, y).predict(x_test)
    ours = mean_absolute_error(y_test, huber)
    theirs = mean_absolute_error(y_test, peer.predict(x_test))
    squares = mean_absolute_error(y_test, linear)
    print("mean absolute error on the test set, trained with 10% gross errors:")
    print(f"  numbaloss.huber_loss, own loop   {ours:6.2f}")
    print(f"  sklearn HuberRegressor           {theirs:6.2f}")
    print(f"  sklearn LinearRegression         {squares:6.2f}")
    if path:
        draw(y_test, {"Huber loss": huber, "least squares": linear}, path)
        print(f"picture: {path}")
    good = ours <= 1.01 * theirs
    print("as good as scikit-learn's" if good else "WORSE than scikit-learn's by more than 1%")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
