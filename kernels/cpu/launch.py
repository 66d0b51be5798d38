"""One call of a driver: compiled code and the arrays it is given; and the same for later calls of its shape.

A call is worked out once, by Python that checks and words errors. The launch that comes of it depends on no
extent and no element, so calls with other arrays of the same dtypes and layouts repeat it: they make new
outputs, and leave the rest to the compiled driver, which refuses arrays that do not fit together.
"""

from collections.abc import Callable
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np

from . import memory, parallel, threads

# What a driver gives beside the value: that all is well; that the arrays do not fit together; or, not
# negative, the position of the first wrong number.
OK, UNFIT = -1, -2

LARGE = memory.FROM_BYTES  # of a new array, which may then be of memory that is used again


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


# ``again(values)`` gives the value, the status and the new arrays.
Again = Callable[[tuple[Any, ...]], tuple[float, int, tuple[Any, ...]]]


def maker(new: New, made: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """Return a function that makes an output as `made` was made, for another array like that of `new`."""
    shape, dtype = new.shape, made.dtype
    if shape is not None:
        return lambda like: np.empty(shape(like.shape), dtype)
    order: Any = "C" if made.flags.c_contiguous else "F" if made.flags.f_contiguous else None
    if order == "C":
        small = LARGE // dtype.itemsize

        def make(like: np.ndarray) -> np.ndarray:
            if like.size < small:
                return np.empty(like.shape, dtype)
            return memory.empty(like.shape, dtype)

        return make
    if order == "F":
        return lambda like: np.empty(like.shape, dtype, "F")
    return lambda like: np.empty_like(like, dtype, subok=False)


def repeat(launch: Launch, values: tuple[Any, ...], written: tuple[Any, ...]) -> Again | None:
    """Return a function that runs a launch on other values of the same kinds.

    Parameters
    ----------
    launch : Launch
    values : tuple
        What the caller gave: the launch's arrays are among them, or are its new ones.
    written : tuple
        The arrays among them that are written: one may lie over an array of the call only if it is that array.

    Returns
    -------
    callable or None
        None where an array of the launch was made from the caller's, by a conversion, or a written one overlaps
        others: then each call has to be worked out.
    """
    made = {n.slot: k for k, n in enumerate(launch.new)}
    none = len(values)
    sources: list[int] = []
    for slot, array in enumerate(launch.arrays):
        if array is None:
            sources.append(none)
        elif slot in made:
            sources.append(none + 1 + made[slot])
        else:
            found = next((k for k, v in enumerate(values) if v is array), -1)
            if found < 0:
                return None
            sources.append(found)
    arrays = [k for k, v in enumerate(values) if isinstance(v, np.ndarray)]
    apart: list[tuple[int, int]] = []  # pairs of values that must not share memory
    for w in written:
        at = [k for k in arrays if values[k] is w]
        others = [k for k in arrays if values[k] is not w]
        if not at or any(np.may_share_memory(w, values[k]) for k in others):
            return None
        apart += [(at[0], k) for k in others]
    entry, recipe, numbers, _, task, parallel_from, _ = launch
    pick, first = itemgetter(*sources), sources[0]
    makers = tuple((sources[n.like], maker(n, launch.arrays[n.slot])) for n in launch.new)

    def again(values: tuple[Any, ...]) -> tuple[float, int, tuple[Any, ...]]:
        for i, k in apart:
            if np.may_share_memory(values[i], values[k]):
                return 0.0, UNFIT, ()
        new = tuple([make(values[like]) for like, make in makers])
        arrays = pick((*values, None, *new))
        if values[first].size < parallel_from:
            return *entry(recipe, numbers, arrays, task, 0), new
        return *run(launch._replace(arrays=arrays)), new

    if apart or len(makers) != 1:
        return again
    ((like, make),) = makers

    def again_with_one(values: tuple[Any, ...]) -> tuple[float, int, tuple[Any, ...]]:
        """The commonest kind of call."""
        array = make(values[like])
        arrays = pick((*values, None, array))
        if values[first].size < parallel_from:
            value, status = entry(recipe, numbers, arrays, task, 0)
        else:
            value, status = run(launch._replace(arrays=arrays))
        return value, status, (array,)

    return again_with_one
