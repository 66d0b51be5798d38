"""One call of a driver: compiled code and the arrays it is given; and the same for later calls of its shape.

A call is worked out once, by Python that checks and words errors. The launch that comes of it depends on no
extent and no element, so calls with other arrays of the same dtypes and layouts repeat it: they make new
outputs, and leave the rest to the compiled driver, which refuses arrays that do not fit together.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from . import parallel, threads

# What a driver gives beside the value: that all is well; that the arrays do not fit together; or, not
# negative, the position of the first wrong number.
OK, UNFIT = -1, -2

# Elements from which a new array may be of memory that is used again.
LARGE = (4 << 20) // 8


class New(NamedTuple):
    """An output that a call makes."""

    slot: int  # among the launch's arrays
    like: int  # the slot of the array whose shape, or that of whose rows, it has
    shape: Callable[[tuple[int, ...]], tuple[int, ...]] | None = None  # from that of `like`, where it differs


class Launch(NamedTuple):
    """A call of a driver."""

    entry: Callable[..., tuple[float, int]]  # ``entry(recipe, numbers, arrays, task, fork)``
    recipe: np.ndarray  # int64
    numbers: np.ndarray  # float64
    arrays: tuple[Any, ...]  # in the driver's order; None for one that is absent
    task: int  # the address of the driver's task
    parallel_from: int  # elements of the first array from which all threads are used
    new: tuple[New, ...] = ()  # the arrays that were made for the call


def run(launch: Launch) -> tuple[float, int]:
    """Give the value and the status."""
    if launch.arrays[0].size < launch.parallel_from:
        return alone(launch)
    return threads.run(lambda: alone, lambda: together, (launch,))


def alone(launch: Launch) -> tuple[float, int]:
    """Run on the calling thread."""
    return launch.entry(launch.recipe, launch.numbers, launch.arrays, launch.task, 0)


def together(launch: Launch) -> tuple[float, int]:
    """Run on all threads."""
    return launch.entry(launch.recipe, launch.numbers, launch.arrays, launch.task, parallel.forker())


def empty_like(array: np.ndarray) -> np.ndarray:
    """A new array for a gradient: laid out as its argument, where no element shares its memory."""
    if array.flags.c_contiguous and array.dtype.isnative:
        return memory.empty(array.shape, array.dtype)
    made = np.empty_like(array, subok=False)
    if not made.flags.forc and overlaps_itself(made):
        made = np.empty(array.shape, array.dtype.newbyteorder("="))
    return made


Repeat = Callable[[tuple[Any, ...]], tuple[float, int, tuple[Any, ...]]]


def repeat(launch: Launch, values: tuple[Any, ...]) -> Repeat | None:
    """A function that runs the launch on other values of the same kinds.

    Parameters
    ----------
    launch : Launch
    values : tuple
        What the caller gave: the launch's arrays are among them, or are its new ones.

    Returns
    -------
    callable or None
        ``run(values)`` gives the value, the status and the new arrays. None where an array of the launch was
        made from the caller's, by a conversion: then the call has to be worked out each time.
    """
    sources: list[int] = []
    made = {n.slot: k for k, n in enumerate(launch.new)}
    none = len(values)
    for slot, array in enumerate(launch.arrays):
        if array is None:
            sources.append(none)
        elif slot in made:
            sources.append(none + 1 + made[slot])
        else:
            found = [k for k, v in enumerate(values) if v is array]
            if not found:
                return None
            sources.append(found[0])
    pick, first = itemgetter(*sources), sources[0]
    entry, recipe, numbers, _, task, parallel_from, new = launch
    makers = tuple((sources[n.like], maker(launch.arrays[n.slot], n.shape)) for n in new)

    def run_arrays(arrays: tuple[Any, ...]) -> tuple[float, int]:
        if arrays[0].size < parallel_from:
            return entry(recipe, numbers, arrays, task, 0)
        return run(launch._replace(arrays=arrays))

    if not makers:

        def without_new(values):
            value, status = run_arrays(pick((*values, None)))
            return value, status, ()

        return without_new

    if len(makers) == 1:
        ((like, make),) = makers

        def with_new(values):
            array = make(values[like])
            arrays = pick((*values, None, array))
            if values[first].size < parallel_from:
                value, status = entry(recipe, numbers, arrays, task, 0)
            else:
                value, status = run(launch._replace(arrays=arrays))
            return value, status, (array,)

        return with_new

    def with_many(values):
        arrays = tuple([make(values[like]) for like, make in makers])
        value, status = run_arrays(pick((*values, None, *arrays)))
        return value, status, arrays

    return with_many
