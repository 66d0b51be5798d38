"""Losses of arrays that are shared out among threads, processes or devices.

A call with ``comm=`` is one of all ranks at once. Of a batch each rank has some rows: the value, and what a
mean divides by, are of all rows on every rank, and the gradient is of the own ones. Of ``classes=`` each rank
has some classes of every row.

>>> import numpy as np, numbaloss as nl
>>> from concurrent.futures import ThreadPoolExecutor
>>> x, y = np.array([0.0, 1.0, 5.0]), np.zeros(3)
>>> def of_rank(comm):
...     own = slice(0, 1) if comm.rank == 0 else slice(1, 3)
...     return float(nl.mse_loss(x[own], y[own], comm=comm).round(4))
>>> with ThreadPoolExecutor(2) as threads:
...     list(threads.map(of_rank, nl.distributed.threads(2)))
[8.6667, 8.6667]

`comm` is a communicator of mpi4py, of NCCL (CuPy's or nccl4py's), a process group of ``torch.distributed``, a
`Ray` group, one of `threads`, or any object with the four names of `Communicator`. ``dask`` has objectives of
rows in Dask's blocks.
"""

import importlib
from typing import Any

from .communicators import Communicator, Ray, communicator
from .in_process import threads
from .partial import Partial, partial

__all__ = ["Communicator", "Partial", "Ray", "communicator", "dask", "partial", "threads"]


def __getattr__(name: str) -> Any:
    if name == "dask":  # which is imported when asked for
        return importlib.import_module(f"{__name__}.dask")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
