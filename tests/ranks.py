"""Losses on ranks that are processes, against one of all rows and classes. Run it as

    mpiexec -n 4 python tests/ranks.py                      # by mpi4py
    python tests/ranks.py torch RANK SIZE FILE              # by torch.distributed, a process for each rank

Each rank prints that all is well, or fails.
"""

import sys

import numpy as np

import numbaloss as nl


def check(comm):
    """Compute on each rank's part of the rows, and of the classes, and compare with the whole."""
    ranks = nl.distributed.communicator(comm)
    rank, size = ranks.rank, ranks.size
    rng = np.random.default_rng(0)
    rows, classes = 37, 50
    x, y = rng.normal(0, 2, (rows, classes)).astype(np.float32), rng.integers(0, classes, rows)
    y[5] = -100
    weight, weights = (rng.uniform(0.2, 2, n).astype(np.float32) for n in (classes, rows))
    options = {"weight": weight, "label_smoothing": 0.1}
    loss = nl.cross_entropy
    value, slopes = loss.value_and_grad(x, y, sample_weight=weights, **options)
    cuts = [0, *sorted(rng.integers(0, rows, size - 1)), rows]
    own = slice(cuts[rank], cuts[rank + 1])
    found, gradient = loss.value_and_grad(x[own], y[own], sample_weight=weights[own], comm=comm, **options)
    np.testing.assert_array_max_ulp(found, value, 1)
    np.testing.assert_array_max_ulp(gradient, slopes[own], 1)
    cuts = [0, *sorted(rng.integers(0, classes, size - 1)), classes]
    own = slice(cuts[rank], cuts[rank + 1])
    shard = x[:, own].copy()
    found, gradient = loss.value_and_grad(
        shard, y, sample_weight=weights, classes=(cuts[rank], classes), comm=comm, out=shard, **options
    )
    np.testing.assert_array_max_ulp(found, value, 1)
    np.testing.assert_allclose(gradient, slopes[:, own], rtol=1e-6, atol=2e-7 * np.abs(slopes).max())
    # What is wrong on one rank raises on all, and none waits.
    wrong = y + classes if rank == size - 1 else y
    try:
        loss(x, wrong, comm=comm)
    except (IndexError, RuntimeError) as error:
        assert isinstance(error, IndexError) == (rank == size - 1)
    else:
        raise AssertionError("nothing was raised")
    print(f"rank {rank} of {size}: equal", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["torch"]:
        import torch.distributed as dist

        rank, size, file = sys.argv[2:]
        dist.init_process_group("gloo", f"file://{file}", rank=int(rank), world_size=int(size))
        check(dist.group.WORLD)
        dist.destroy_process_group()
    else:
        from mpi4py import MPI

        check(MPI.COMM_WORLD)
