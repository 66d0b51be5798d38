"""A network in PyTorch with a loss of one's own: scikit-learn's digits, a fifth of their labels wrong.

The loss is written as one function of a row's statistics; numbaloss derives its gradient, compiles both into
one pass, and PyTorch takes it as an operator with autograd. It is bounded, so wrong labels pull less than
with cross entropy.

    python examples/torch_training.py [picture.svg]  # needs PyTorch: pip install torch
"""

import sys

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import numbaloss as nl

try:
    import torch
except ImportError:
    print("PyTorch is not installed: pip install torch")
    sys.exit(0)

import numbaloss.torch as nt

EPOCHS, BATCH, RATE, WRONG, CLASSES = 12, 128, 0.3, 0.2, 10


@nl.score_loss
def bounded_entropy(log_prob, bound=0.3):
    """Like cross entropy where the class is probable, at most 1 / bound where it is not."""
    return -nl.math.expm1(bound * log_prob) / bound


def load() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Pixels in [0, 1], and labels: a fifth of those for training are drawn anew."""
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x / 16, y, test_size=0.25, random_state=0, stratify=y)
    rng = np.random.default_rng(0)
    y = np.where(rng.random(len(y)) < WRONG, rng.integers(0, CLASSES, len(y)), y)
    return torch.tensor(x).float(), torch.tensor(x_test).float(), torch.tensor(y), torch.tensor(y_test)


def train(
    criterion: torch.nn.Module, x: torch.Tensor, y: torch.Tensor
) -> tuple[torch.nn.Module, list[float]]:
    """The network, and the loss of each step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, CLASSES))
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    losses = []
    for _ in range(EPOCHS):
        for rows in torch.randperm(len(y)).split(BATCH):
            optimizer.zero_grad()
            loss = criterion(model(x[rows]), y[rows])
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    return model, losses


def draw(curves: dict[str, list[float]], accuracies: list[float], path: str) -> None:
    """The loss in training, and how well the test set is named then."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    looks = ("-", "#56B4E9", 5), ("--", "#0072B2", 2), ("o-", "#D55E00", 2)
    for name, right, (style, colour, width) in zip(curves, accuracies, looks, strict=True):
        means, label = np.reshape(curves[name], (EPOCHS, -1)).mean(axis=1), f"{name}: {right:.1%} right"
        axes.plot(range(1, EPOCHS + 1), means, style, color=colour, linewidth=width, label=label)
    axes.set(title="Training with a fifth of the labels wrong", xlabel="epoch")
    axes.set_ylabel("loss, mean of the epoch's steps")
    axes.legend(title="on the test set")
    figure.savefig(path, dpi=120)


def main(path: str | None = None) -> int:
    x, x_test, y, y_test = load()
    criteria = {
        "PyTorch's cross entropy": torch.nn.CrossEntropyLoss(),
        "numbaloss, cross entropy": nt.CrossEntropyLoss(),
        "numbaloss, a bounded loss": nt.Module(bounded_entropy.Class()),
    }
    print("on the test set                     accuracy")
    accuracies, curves = [], {}
    for name, criterion in criteria.items():
        model, curves[name] = train(criterion, x, y)
        with torch.no_grad():
            accuracies.append(float((model(x_test).argmax(1) == y_test).double().mean()))
        print(f"  {name:<34}{accuracies[-1]:.4f}")
    theirs, same, bounded = accuracies
    if path:
        draw(curves, accuracies, path)
        print(f"picture: {path}")
    good = abs(same - theirs) <= 0.01 and bounded >= theirs
    print("the same as PyTorch, and better with the loss of one's own" if good else "NOT as it should be")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
