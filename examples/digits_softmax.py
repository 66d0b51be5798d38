"""A softmax classifier by a loop of one's own: cross entropy on scikit-learn's handwritten digits.

One layer, minibatch gradient descent with momentum, label smoothing. The scores of a minibatch become their
gradient where they lie, so a step allocates nothing for the loss.

    python examples/digits_softmax.py [picture.svg]
"""

import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import train_test_split
from tqdm import trange

import numbaloss as nl

EPOCHS, BATCH, RATE, MOMENTUM, DECAY, CLASSES = 100, 64, 0.2, 0.9, 1e-4, 10


def load() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Pixels in [0, 1] with a constant column for the bias, and labels: training and test set."""
    x, y = load_digits(return_X_y=True)
    x = np.column_stack([x / 16, np.ones(len(x))]).astype(np.float32)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    return x, x_test, y, y_test


def train(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """The weights, shape (features, classes)."""
    rng = np.random.default_rng(0)
    w = np.zeros((x.shape[1], CLASSES), np.float32)
    speed = np.zeros_like(w)
    criterion = nl.CrossEntropyLoss(label_smoothing=0.05)
    for epoch in (bar := trange(EPOCHS, desc="digits", file=sys.stdout, disable=not sys.stdout.isatty())):
        rate = np.float32(RATE * 0.5 * (1 + np.cos(np.pi * epoch / EPOCHS)))
        losses = []
        for rows in np.array_split(rng.permutation(len(y)), len(y) // BATCH):
            scores = x[rows] @ w
            loss, slope = criterion.value_and_grad(scores, y[rows], out=scores)
            speed = MOMENTUM * speed - rate * (x[rows].T @ slope + np.float32(DECAY) * w)
            w += speed
            losses.append(float(loss))
        bar.set_postfix(loss=f"{np.mean(losses):.4f}", refresh=False)
    return w


def draw(named: np.ndarray, y: np.ndarray, path: str) -> None:
    """How many of each digit are named as which."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    counts = np.bincount(CLASSES * y + named, minlength=CLASSES**2).reshape(CLASSES, CLASSES)
    axes.imshow(counts, cmap="Blues", aspect="auto")
    for row, column in np.argwhere(counts):
        colour, weight = ("white", "normal") if row == column else ("#D55E00", "bold")
        axes.text(column, row, counts[row, column], color=colour, weight=weight, ha="center", va="center")
    axes.set(title="Digits of the test set, by what they are and are named", ylabel="digit")
    axes.set(xlabel="named as", xticks=range(CLASSES), yticks=range(CLASSES))
    figure.savefig(path, dpi=120)


def main(path: str | None = None) -> int:
    x, x_test, y, y_test = load()
    scores = x_test @ train(x, y)
    named = scores.argmax(axis=1)
    ours = (named == y_test).mean()
    theirs = LogisticRegression(max_iter=2000).fit(x, y).score(x_test, y_test)
    print("on the test set                     accuracy   log loss")
    print(f"  numbaloss, own loop                 {ours:.4f}     {nl.cross_entropy(scores, y_test):.4f}")
    print(f"  sklearn LogisticRegression          {theirs:.4f}")
    if path:
        draw(named, y_test, path)
        print(f"picture: {path}")
    good = ours >= max(0.95, theirs - 0.01)
    print("as good as scikit-learn's" if good else "WORSE than scikit-learn's, or than 95%")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
