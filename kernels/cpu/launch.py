"""One call of a driver: compiled code, and what it is given."""

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from . import parallel, threads

# What a driver gives beside the value: that all is well, that the arrays do not fit together, or (not negative)
# where the first wrong number is.
OK, UNFIT = -1, -2


class Launch(NamedTuple):
    """A call of a driver.

    Its recipe and numbers depend on no extent and no element: another call, with arrays of the same dtypes and
    layouts and the same options, takes the same.
    """

    entry: Callable[..., tuple[float, int]]  # ``entry(recipe, numbers, arrays, task, fork)``
    recipe: np.ndarray  # int64
    numbers: np.ndarray  # float64
    arrays: tuple[Any, ...]  # in the driver's order; None for one that is absent
    task: int  # the address of the driver's task
    parallel_from: int  # elements of the first array from which all threads are used


def run(launch: Launch) -> tuple[float, int]:
    """The value and the status."""
    entry, recipe, numbers, arrays, task, parallel_from = launch
    if arrays[0].size < parallel_from:
        return entry(recipe, numbers, arrays, task, 0)
    return threads.run(lambda: alone, lambda: together, (launch,))


def alone(launch: Launch) -> tuple[float, int]:
    """Run on the calling thread."""
    return launch.entry(launch.recipe, launch.numbers, launch.arrays, launch.task, 0)


def together(launch: Launch) -> tuple[float, int]:
    """Run on all threads."""
    return launch.entry(launch.recipe, launch.numbers, launch.arrays, launch.task, parallel.forker())
