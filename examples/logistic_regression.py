"""Logistic regression by a loop of one's own: binary cross entropy on scikit-learn's breast cancer data.

Minibatch gradient descent with momentum and L2 regularisation, compared with scikit-learn's
LogisticRegression on the same split. A last, smaller batch still counts fairly: ``normalizer`` divides every
minibatch by the same number.

    python examples/logistic_regression.py [picture.svg]
"""

import sys

import numpy as np
from sklearn.datasets import load_breast_cancer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler
from tqdm import trange

import numbaloss as nl

EPOCHS, BATCH, RATE, MOMENTUM, C = 300, 64, 0.3, 0.9, 1.0


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    x, y = load_breast_cancer(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    scale = StandardScaler().fit(x)
    x, x_test = (scale.transform(a).astype(np.float32) for a in (x, x_test))
    return x, x_test, y.astype(np.float32), y_test.astype(np.float32)


def train(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.float32]:
    """Weights and bias that minimise the mean loss + |w|^2 / (2 C n)."""
    rng = np.random.default_rng(0)
    n = len(y)
    w, b = np.zeros(x.shape[1], np.float32), np.float32(0)
    speed_w, speed_b = np.zeros_like(w), np.float32(0)
    criterion = nl.BCEWithLogitsLoss()
    for epoch in (bar := trange(EPOCHS, desc="logistic", file=sys.stdout, disable=not sys.stdout.isatty())):
        rate = np.float32(RATE * 0.5 * (1 + np.cos(np.pi * epoch / EPOCHS)))
        total = 0.0
        for rows in np.array_split(rng.permutation(n), n // BATCH):
            logits = x[rows] @ w + b
            loss, slope = criterion.value_and_grad(logits, y[rows], normalizer=BATCH, out=logits)
            total += float(loss) * BATCH / n
            speed_w = MOMENTUM * speed_w - rate * (x[rows].T @ slope + w / np.float32(C * n))
            speed_b = MOMENTUM * speed_b - rate * slope.sum()
            w, b = w + speed_w, b + speed_b
        bar.set_postfix(loss=f"{total:.4f}", refresh=False)
    return w, b


def draw(logits: np.ndarray, benign: np.ndarray, path: str) -> None:
    """How far to either side the two kinds lie."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    bins = np.arange(np.floor(logits.min()), logits.max() + 1)
    style = dict(color=["#D55E00", "#0072B2"], edgecolor="white", label=["malignant", "benign"])
    _, _, bars = axes.hist([logits[benign == 0], logits[benign == 1]], bins, stacked=True, **style)
    plt.setp(bars[0], hatch="//")
    axes.axvline(0, color="black", linestyle="--", linewidth=1, label="decision")
    axes.set(title="Tumours of the test set, as the model tells them apart", ylabel="tumours")
    axes.set(xlabel="logit: log-odds of being benign")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(path: str | None = None) -> int:
    x, x_test, y, y_test = load()
    w, b = train(x, y)
    peer = LogisticRegression(C=C, max_iter=1000).fit(x, y)
    logits = x_test @ w + b
    ours, theirs = ((logits > 0) == y_test).mean(), peer.score(x_test, y_test)
    loss = nl.binary_cross_entropy_with_logits(logits, y_test)
    peer_loss = log_loss(y_test, peer.predict_proba(x_test))
    print("on the test set                     accuracy   log loss")
    print(f"  numbaloss, own loop                 {ours:.4f}     {loss:.4f}")
    print(f"  sklearn LogisticRegression          {theirs:.4f}     {peer_loss:.4f}")
    if path:
        draw(logits, y_test, path)
        print(f"picture: {path}")
    good = ours >= theirs - 0.01
    print("as good as scikit-learn's" if good else "WORSE than scikit-learn's by more than a point")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
