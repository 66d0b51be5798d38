"""A softmax classifier whose classes are shared out among ranks of MPI: digits from scikit-learn.

Each rank has the weights of some classes, computes their scores, and exchanges four numbers a row with the
others. Nothing as large as the scores is sent, and label smoothing is exact. Alone it is one rank:

    python examples/mpi_softmax.py [picture.svg]
    mpiexec -n 4 python examples/mpi_softmax.py [picture.svg]  # needs MPI: pip install mpi4py mpich
"""

import sys
import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import numbaloss as nl

try:
    from mpi4py import MPI
except ImportError:
    comm = nl.distributed.threads(1)[0]
else:
    comm = MPI.COMM_WORLD if MPI.COMM_WORLD.Get_size() > 1 else nl.distributed.threads(1)[0]

STEPS, RATE, CLASSES = 200, 0.5, 10
OPTIONS = {"label_smoothing": 0.05}


class Counted:
    """A communicator that counts the bytes this rank sends."""

    def __init__(self, comm):
        self.comm = nl.distributed.communicator(comm)
        self.rank, self.size, self.sent = self.comm.rank, self.comm.size, 0

    def all_reduce(self, buffer, op="sum", stream=None):
        self.sent += buffer.nbytes
        self.comm.all_reduce(buffer, op, stream)

    def all_gather(self, buffer, out, stream=None):
        self.sent += buffer.nbytes
        self.comm.all_gather(buffer, out, stream)


def train(x, y, own, comm):
    """Return the weights of some of the classes, and the losses of all steps."""
    w, losses = np.zeros((x.shape[1], own.stop - own.start)), []
    more = {} if comm is None else {"classes": (own.start, CLASSES), "comm": comm}
    for _ in range(STEPS):
        scores = x @ w
        value, gradient = nl.cross_entropy.value_and_grad(scores, y, out=scores, **more, **OPTIONS)
        w -= RATE * (x.T @ gradient)
        losses.append(float(value))
    return w, losses


def draw(losses: list[float], alone: list[float], ranks: int, path: str) -> None:
    """The loss by step, with the classes shared out and in one place."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.plot(alone, color="#56B4E9", linewidth=5, label="classes in one place")
    axes.plot(losses, color="#D55E00", linestyle="--", label=f"classes shared out, ranks: {ranks}")
    axes.set(title="Loss with all classes in one place and shared out", xlabel="step", ylabel="loss")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(path: str | None = None) -> int:
    x, y = load_digits(return_X_y=True)
    x, x_test, y, y_test = train_test_split(x / 16, y, test_size=0.25, random_state=0, stratify=y)
    ranks = Counted(comm)
    cuts = [CLASSES * k // ranks.size for k in range(ranks.size + 1)]
    own = slice(cuts[ranks.rank], cuts[ranks.rank + 1])
    train(x, y, own, ranks)  # compiles
    ranks.sent, start = 0, time.perf_counter()
    w, losses = train(x, y, own, ranks)
    seconds, sent = (time.perf_counter() - start) / STEPS, ranks.sent / STEPS
    whole, alone = train(x, y, slice(0, CLASSES), None)
    apart = np.abs(w - whole[:, own]).max()
    if ranks.rank == 0:
        right = ((x_test @ whole).argmax(axis=1) == y_test).mean()
        print(
            f"ranks {ranks.size}, rows {len(x)}, classes {CLASSES}, accuracy of held-out digits {right:.4f}"
        )
        print(f"last loss {losses[-1]:.10f}, of one rank {alone[-1]:.10f}, weights apart {apart:.1e} at most")
        print(f"{1e3 * seconds:.2f} ms a step, {sent / 1e3:.1f} kB sent by each rank")
        if path:
            draw(losses, alone, ranks.size, path)
            print(f"picture: {path}")
    return int(apart > 1e-9)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:2]))
