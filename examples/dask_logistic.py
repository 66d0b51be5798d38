"""Logistic regression over Dask's blocks, by worker processes: breast cancer data from scikit-learn.

Blocks stay on their workers; each evaluation sends the parameters and brings back one value and gradient,
added up on the way. The parameters found are those of one machine.

    python examples/dask_logistic.py [picture.svg]  # needs Dask: pip install 'dask[array]' distributed
"""

import sys
import time
import warnings

import numpy as np
from scipy.optimize import minimize
from sklearn.datasets import load_breast_cancer

import numbaloss as nl

try:
    import dask.array as da
    from distributed import Client, LocalCluster
except ImportError:
    print("Dask is not installed: pip install 'dask[array]' distributed")
    sys.exit(0)

COPIES = 100  # of the data, so that there is something to share out
BLOCK = 5690  # rows
PENALTY = 1e-3


def fit(objective, size):
    """Return the parameters, so many, the seconds of an evaluation, and how many there were."""
    started, calls = time.perf_counter(), 0

    def penalised(w):
        nonlocal calls
        calls += 1
        value, gradient = objective.value_and_grad(w)
        return value + 0.5 * PENALTY * w @ w, gradient + PENALTY * w

    found = minimize(penalised, np.zeros(size), jac=True, method="L-BFGS-B", options={"gtol": 1e-8})
    return found.x, (time.perf_counter() - started) / calls, calls


def draw(one: np.ndarray, many: np.ndarray, path: str) -> None:
    """The parameters of one machine against those of Dask's workers."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    axes.axline((0, 0), slope=1, color="black", linestyle="--", linewidth=1, label="equal")
    axes.plot(one, many, "o", color="#0072B2", markersize=7, alpha=0.7, label="a parameter")
    axes.set(title="Parameters of one regression, by one machine and by Dask")
    axes.set(xlabel="by one machine", ylabel="by Dask")
    axes.legend()
    figure.savefig(path, dpi=120)


def main(path: str | None = None) -> int:
    x, y = load_breast_cancer(return_X_y=True)
    x = np.column_stack([(x - x.mean(axis=0)) / x.std(axis=0), np.ones(len(x))])
    X, y = np.tile(x, (COPIES, 1)), np.tile(y.astype(float), COPIES)
    loss = nl.binary_cross_entropy_with_logits
    one, seconds, calls = fit(nl.optimize.objective(loss, X, y), X.shape[1])
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, Client(cluster) as client:
        blocks = da.from_array(X, chunks=(BLOCK, X.shape[1])), da.from_array(y, chunks=BLOCK)
        blocks = client.persist(blocks)
        many, seconds_of_many, calls_of_many = fit(nl.distributed.dask.objective(loss, *blocks), X.shape[1])
        count = blocks[1].numblocks[0]
    sent = count * (2 * X.shape[1] + 1) * 8  # parameters to each block; from each a value and a gradient
    print(f"rows {len(X)}, features {X.shape[1]}, blocks {count}, 2 worker processes")
    print(f"{'':24}evaluations   ms each")
    print(f"{'one machine':24}{calls:11d}{1e3 * seconds:10.1f}")
    print(f"{'Dask':24}{calls_of_many:11d}{1e3 * seconds_of_many:10.1f}   about {sent / 1e3:.1f} kB each")
    apart = np.abs(many - one).max()
    print(f"parameters apart by {apart:.1e} at most, of {np.abs(one).max():.1f}")
    if path:
        draw(one, many, path)
        print(f"picture: {path}")
    return int(apart > 1e-5)


if __name__ == "__main__":
    warnings.filterwarnings("ignore", module="distributed")
    sys.exit(main(*sys.argv[1:2]))
