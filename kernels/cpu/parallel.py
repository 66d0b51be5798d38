"""Tasks on all threads: one parallel function for everything that is done in parallel.

Numba compiles a ``prange`` anew for each function that has one, at half a second each. Here a task is a C
function of a context and a number, called by address.
"""

from functools import cache

from numba import njit, prange, types

from ..bind import bind
from .native import c_address, caller

# A task ``f(context, k)``; ``fork(task, context, count)`` runs it for each k below `count`.
TASK = types.int64(types.int64, types.int64)
FORK = types.int64(types.int64, types.int64, types.int64)
run_task = caller(types.int64, 2)
run_fork = caller(types.int64, 3)


def fork(task, context, count):
    """Run a task for each number below `count`, on Numba's threads."""
    for k in prange(count):
        run_task(task, (context, k))
    return 0


@cache
def forker() -> int:
    """The address of `fork`."""
    decorate = njit(FORK, cache=True, nogil=True, parallel=True, error_model="numpy")
    return c_address(bind(fork, {}, "tasks", "tasks", decorate), FORK)
