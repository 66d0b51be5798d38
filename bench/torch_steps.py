"""Steps of training in PyTorch with its losses and with ours, in turn.

    python -m numbaloss.bench.torch_steps [--markdown FILE]

The loss alone is its forward and backward pass; a step is that of a network of two layers, optimiser and all.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import numbaloss.torch as nt

from . import machine
from .report import markdown

ROUNDS = 60
# A loss's name, the shape of scores, options.
CASES: list[tuple[str, tuple[int, ...], dict[str, Any]]] = [
    ("cross_entropy", (128, 10), {}),
    ("cross_entropy", (1024, 1000), {}),
    ("cross_entropy", (1024, 1000), {"label_smoothing": 0.1}),
    ("binary_cross_entropy_with_logits", (1024, 256), {}),
    ("huber_loss", (1024, 256), {}),
    ("mse_loss", (1024, 256), {}),
]


def target_of(name: str, shape: tuple[int, ...]) -> Any:
    return torch.randint(shape[1], shape[:1]) if name == "cross_entropy" else torch.rand(shape)


def alone(loss: Any, shape: tuple[int, ...], target: Any, options: dict[str, Any]) -> Callable[[], Any]:
    scores = torch.randn(shape, requires_grad=True)

    def run() -> None:
        scores.grad = None
        loss(scores, target, **options).backward()

    return run


def step(loss: Any, shape: tuple[int, ...], target: Any, options: dict[str, Any]) -> Callable[[], Any]:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(64, 128), torch.nn.ReLU(), torch.nn.Linear(128, shape[1]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    x = torch.randn(shape[0], 64)

    def run() -> None:
        optimizer.zero_grad()
        loss(model(x), target, **options).backward()
        optimizer.step()

    return run


def medians(sides: list[Callable[[], Any]]) -> list[float]:
    taken: list[list[float]] = [[] for _ in sides]
    for k in range(ROUNDS + 5):
        for run, times in zip(sides, taken, strict=True):
            start = time.perf_counter()
            run()
            if k >= 5:
                times.append(time.perf_counter() - start)
    return [1e3 * statistics.median(t) for t in taken]


def rows() -> list[list[str]]:
    table = []
    for name, shape, options in CASES:
        target = target_of(name, shape)
        pair = [getattr(module, name) for module in (nt, torch.nn.functional)]
        row = [", ".join([f"{name} {'x'.join(map(str, shape))}", *(f"{n} {v}" for n, v in options.items())])]
        for make in (alone, step):
            ours, theirs = medians([make(loss, shape, target, options) for loss in pair])
            row += [f"{ours:.3f}", f"{theirs:.3f}", f"{theirs / ours:.1f}"]
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--markdown", metavar="FILE", type=Path, help="also write the table there")
    options = parser.parse_args()
    torch.set_num_threads(2)
    head = ["milliseconds", "loss alone", "PyTorch's", "ratio", "a step", "PyTorch's", "ratio"]
    text = f"# Steps in PyTorch\n\n{machine.heading('torch')}\n{markdown(head, rows())}"
    print(text)
    if options.markdown:
        options.markdown.write_text(text)


if __name__ == "__main__":
    main()
