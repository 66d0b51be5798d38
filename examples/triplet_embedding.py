"""An embedding learnt with the triplet loss: handwritten digits in the plane, neighbours of one kind.

A small network, 64 pixels to 256 hidden units to two coordinates, its gradients written out by hand;
``triplet_margin_loss`` gives those by anchor, positive and negative in one pass. Pixels are trained on with
some noise. Digits that were never seen are then named by their nearest neighbours among the training set, in
the plane and in pixels.

    python examples/triplet_embedding.py [picture.svg]
"""

import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neighbors import KNeighborsClassifier
from tqdm import trange

import numbaloss as nl

HIDDEN, DIMENSIONS, STEPS, BATCH, RATE, NOISE = 256, 2, 3000, 256, 3e-3, 0.2


class Network:
    """Pixels to coordinates: one hidden layer, trained by Adam."""

    def __init__(self, features: int, rng: np.random.Generator) -> None:
        def normal(*shape: int) -> np.ndarray:
            return rng.normal(size=shape).astype(np.float32) * np.float32(np.sqrt(2 / shape[0]))

        zeros = np.zeros
        self.parameters = [
            normal(features, HIDDEN),
            zeros(HIDDEN, np.float32),
            normal(HIDDEN, DIMENSIONS),
            zeros(DIMENSIONS, np.float32),
        ]
        self.means = [np.zeros_like(p) for p in self.parameters]
        self.squares = [np.zeros_like(p) for p in self.parameters]
        self.steps = 0

    def __call__(self, x: np.ndarray) -> np.ndarray:
        w1, b1, w2, b2 = self.parameters
        return np.maximum(x @ w1 + b1, 0) @ w2 + b2

    def gradients(self, x: np.ndarray, by_output: np.ndarray) -> list[np.ndarray]:
        """The chain rule, from the gradient by the coordinates to those by the parameters."""
        w1, b1, w2, _ = self.parameters
        hidden = np.maximum(x @ w1 + b1, 0)
        by_hidden = by_output @ w2.T * (hidden > 0)
        return [x.T @ by_hidden, by_hidden.sum(axis=0), hidden.T @ by_output, by_output.sum(axis=0)]

    def step(self, gradients: list[np.ndarray], rate: float) -> None:
        self.steps += 1
        for p, g, m, s in zip(self.parameters, gradients, self.means, self.squares, strict=True):
            m += 0.1 * (g - m)
            s += 0.001 * (g * g - s)
            p -= rate * (m / (1 - 0.9**self.steps)) / (np.sqrt(s / (1 - 0.999**self.steps)) + 1e-8)


def triplets(labels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Rows of anchors, of others of the same digit, and of other digits; shape (3, BATCH)."""
    order = np.argsort(labels, kind="stable")
    counts = np.bincount(labels)
    starts = np.cumsum(counts) - counts
    anchor = rng.integers(0, len(labels), BATCH)
    digit = labels[anchor]
    other = (digit + rng.integers(1, len(counts), BATCH)) % len(counts)
    positive, negative = (
        order[starts[d] + (rng.random(BATCH) * counts[d]).astype(int)] for d in (digit, other)
    )
    return np.stack([anchor, positive, negative])


def train(x: np.ndarray, y: np.ndarray) -> Network:
    rng = np.random.default_rng(0)
    network = Network(x.shape[1], rng)
    criterion = nl.TripletMarginLoss(margin=1.0, swap=True)
    gradients = np.empty((3, BATCH, DIMENSIONS), np.float32)
    for step in (bar := trange(STEPS, desc="triplets", file=sys.stdout, disable=not sys.stdout.isatty())):
        rows = triplets(y, rng).reshape(-1)
        noisy = x[rows] + NOISE * rng.standard_normal((len(rows), x.shape[1]), np.float32)
        points = network(noisy).reshape(3, BATCH, DIMENSIONS)
        loss, _ = criterion.value_and_grad(*points, out=tuple(gradients))
        by_parameters = network.gradients(noisy, gradients.reshape(-1, DIMENSIONS))
        network.step(by_parameters, RATE * 0.5 * (1 + np.cos(np.pi * step / STEPS)))
        if step % 100 == 0:
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
    return network


def draw(points: np.ndarray, labels: np.ndarray, path: str) -> None:
    """The digits where the network puts them."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 6), layout="constrained")
    colours = plt.get_cmap("tab10")
    axes.scatter(*points.T, s=1, alpha=0)
    for (a, b), digit in zip(points, labels, strict=True):
        axes.text(a, b, str(digit), color=colours(digit), fontsize=8, ha="center", va="center")
    axes.set(title="Digits of the test set, as the triplet loss places them", xticks=[], yticks=[])
    axes.set_aspect("equal")
    figure.savefig(path, dpi=120)


def main(path: str | None = None) -> int:
    x, y = load_digits(return_X_y=True)
    x = (x / 16).astype(np.float32)
    x, x_test, y, y_test = train_test_split(x, y, test_size=0.25, random_state=0, stratify=y)
    network = train(x, y)
    points, points_test = network(x), network(x_test)
    plane = KNeighborsClassifier(5).fit(points, y).score(points_test, y_test)
    pixels = KNeighborsClassifier(5).fit(x, y).score(x_test, y_test)
    print("five nearest neighbours, test set   accuracy")
    print(f"  in the plane, by triplet loss       {plane:.4f}")
    print(f"  in 64 pixels                        {pixels:.4f}")
    if path:
        draw(points_test, y_test, path)
        print(f"picture: {path}")
    good = plane >= 0.95
    print("two numbers a digit tell 95% of them apart" if good else "WORSE than 95%")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
