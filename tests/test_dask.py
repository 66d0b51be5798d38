"""Objectives over Dask's blocks: the same as of all rows at once."""

import numpy as np
import pytest
import scipy.optimize

pytest.importorskip("distributed")

import dask.array as da
from distributed import Client, LocalCluster

import numbaloss as nl

pytestmark = pytest.mark.filterwarnings("ignore")  # of Dask's own, of ports and of workers that are ended


@pytest.fixture(scope="module")
def client():
    with (
        LocalCluster(
            n_workers=2, threads_per_worker=2, processes=False, dashboard_address=None, memory_limit=0
        ) as cluster,
        Client(cluster) as client,
    ):
        yield client


def problem(rng, classes=None):
    X = rng.normal(size=(300, 4))
    w = rng.normal(size=(4, classes or 1))
    scores = X @ w + rng.normal(0, 0.5, (300, classes or 1))
    y = scores.argmax(axis=1) if classes else scores[:, 0] * (1 + 10 * (rng.random(300) < 0.05))
    return X, y, rng.uniform(0, 2, 300)


def blocks(*arrays):
    rows = (100, 1, 150, 49)
    return [da.from_array(a, chunks=(rows, *a.shape[1:])) for a in arrays]


@pytest.mark.parametrize(
    ("loss", "classes", "options"),
    [
        (nl.HuberLoss(delta=0.7), None, {}),
        (nl.huber_loss, None, {"reduction": "sum"}),
        (nl.cross_entropy, 3, {"label_smoothing": 0.1}),
        (0.5 * nl.MSELoss() + nl.L1Loss(), None, {}),
    ],
    ids=["criterion", "sum", "classes", "sum of losses"],
)
def test_equal_to_one_block(client, loss, classes, options, rng):
    X, y, weights = problem(rng, classes)
    one = nl.optimize.objective(loss, X, y, sample_weight=weights, outputs=classes, **options)
    dX, dy, dw = blocks(X, y, weights)
    many = nl.distributed.dask.objective(
        loss, dX, dy, sample_weight=dw, outputs=classes, client=client, **options
    )
    x, v = rng.normal(size=(2, 4 * (classes or 1)))
    for got, want in zip(many.value_and_grad(x), one.value_and_grad(x), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-12, atol=1e-14)
    assert many.value(x) == many.value_and_grad(x)[0]
    np.testing.assert_allclose(many.gradient(x), one.gradient(x), rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(many.hessp(x, v), one.hessp(x, v), rtol=1e-11, atol=1e-13)
    np.testing.assert_allclose(many.hess(x), one.hess(x), rtol=1e-11, atol=1e-13)


def test_the_same_parameters_as_on_one_machine(client, rng):
    X, y, _ = problem(rng)
    one = nl.optimize.objective(nl.huber_loss, X, y)
    many = nl.distributed.dask.objective(nl.huber_loss, *blocks(X, y), client=client)
    found = [
        scipy.optimize.minimize(f.value_and_grad, np.zeros(4), jac=True, hessp=f.hessp, method="trust-ncg").x
        for f in (one, many)
    ]
    np.testing.assert_allclose(found[1], found[0], rtol=1e-9)


def test_what_does_not_fit(client, rng):
    X, y, _ = problem(rng)
    dX, dy = blocks(X, y)
    make = nl.distributed.dask.objective
    with pytest.raises(TypeError, match="must be Dask's, got ndarray"):
        make(nl.mse_loss, dX, y, client=client)
    with pytest.raises(ValueError, match="blocks of the same whole rows"):
        make(nl.mse_loss, dX, dy.rechunk(100), client=client)
    with pytest.raises(ValueError, match="blocks of the same whole rows"):
        make(nl.mse_loss, dX.rechunk((-1, 2)), dy, client=client)
    with pytest.raises(ValueError, match="got 'none'"):
        make(nl.mse_loss, dX, dy, reduction="none", client=client)
    with pytest.raises(ValueError, match="huber_loss: delta must be"):
        make(nl.huber_loss, dX, dy, delta=-1.0, client=client).value(np.zeros(4))


PROGRAM = """
import os, signal
import dask.array as da, numpy as np, numbaloss as nl
from distributed import Client, LocalCluster

@nl.elementwise_loss
def own(input, target, scale=2.0):  # of __main__
    return (input - target) ** 2 / scale

if __name__ == "__main__":
    rng = np.random.default_rng(0)
    X, y = rng.normal(size=(400, 3)), rng.normal(size=400)
    one, w = nl.optimize.objective(own, X, y), np.ones(3)
    cluster = LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None)
    with cluster, Client(cluster) as client:
        dX, dy = da.from_array(X, chunks=(50, 3)), da.from_array(y, chunks=50)
        many = nl.distributed.dask.objective(own, dX, dy, client=client)
        np.testing.assert_allclose(many.value(w), one.value(w), rtol=1e-13)
        os.kill(next(iter(client.run(os.getpid).values())), signal.SIGKILL)
        np.testing.assert_allclose(many.value(w + 1), one.value(w + 1), rtol=1e-13)
        np.testing.assert_allclose(many.gradient(w + 1), one.gradient(w + 1), rtol=1e-12, atol=1e-15)
    print("equal")
"""


def test_processes_of_which_one_is_killed(python):
    """A definition of ``__main__`` travels to the workers; blocks that are lost are made again."""
    assert python(PROGRAM, PYTHONWARNINGS="ignore")[-1] == "equal"
