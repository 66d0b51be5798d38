"""Arrays as CPU kernels take them: addresses and strides, flat copies over rows, numbers of workers."""

import math
from typing import Any, NamedTuple

import numba
import numpy as np

from ..layout import Axes, address_of, merged_axes
from ..spec import DOUBLE, INT64, MISSING, SINGLE, code_of
from . import memory, threads

# Elements from which even float64 is worth `memory`.
LARGE = memory.FROM_BYTES // 8


def workers() -> int:
    """Return into how many parts the tiles are cut; the result does not depend on it."""
    return 4 * numba.config.NUMBA_NUM_THREADS


def new(shape: tuple[int, ...], dtype: np.dtype, size: int) -> np.ndarray:
    """Return a new array for a gradient of a quick call."""
    return np.empty(shape, dtype) if size < LARGE else memory.empty(shape, dtype)


def writeable(array: np.ndarray) -> np.ndarray:
    """Return the same memory under a type that kernels are compiled for; they never write an input."""
    return array if array.flags.writeable else np.asarray(_Memory(array))


class _Memory:
    """An array's memory, said to be writeable."""

    def __init__(self, array: np.ndarray) -> None:
        self.array = array  # keeps it alive
        self.__array_interface__ = {**array.__array_interface__, "data": (address_of(array), False)}


def flat(array: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return an optional array over rows as kernels take it: broadcast, contiguous, empty for none."""
    if array is None:
        return np.empty(0, dtype)
    return writeable(np.ascontiguousarray(np.broadcast_to(array, shape), dtype).reshape(-1))


def signed(labels: np.ndarray) -> np.ndarray:
    """Return labels that an int64 holds; one that it cannot hold becomes the largest, which is no class."""
    if labels.dtype.kind == "u" and labels.dtype.itemsize == 8:
        return np.minimum(labels, np.uint64(2**63 - 1))
    return labels


def over_rows(array: np.ndarray, axes: Axes, dtype: np.dtype) -> np.ndarray:
    """Return an array over rows of scores, flat, in the order in which they are visited."""
    if dtype == INT64:
        array = signed(array)
    return writeable(np.ascontiguousarray(array.transpose(axes.rows).reshape(-1), dtype))


def optional_over_rows(
    array: np.ndarray | None, axes: Axes, shape: tuple[int, ...], dtype: np.dtype
) -> np.ndarray:
    """Return an array that broadcasts to the rows, as `over_rows`; empty for none."""
    return np.empty(0, dtype) if array is None else over_rows(np.broadcast_to(array, shape), axes, dtype)


class Locations(NamedTuple):
    """Where a call's arrays lie, as kernels take it."""

    addresses: np.ndarray
    codes: np.ndarray  # of the elements; -1 for an absent array
    shape: np.ndarray  # common, axes merged
    strides: np.ndarray  # in bytes, a row an array


def locations(arrays: list[np.ndarray | None]) -> Locations:
    """Return where arrays of one shape lie, some of them absent."""
    shape, merged = merged_axes([a for a in arrays if a is not None])
    strides = np.zeros((len(arrays), len(shape)), np.int64)
    strides[[a is not None for a in arrays]] = merged
    return Locations(
        np.array([0 if a is None else address_of(a) for a in arrays], np.int64),
        np.array([-1 if a is None else code_of(a.dtype) for a in arrays], np.int64),
        np.array(shape, np.int64),
        strides,
    )


def is_direct(array: np.ndarray | None, dtype: np.dtype) -> bool:
    """Return whether kernels work on an array as it lies."""
    return array is not None and array.dtype == dtype and array.flags.c_contiguous


def divisor_or_nan(divisor: float | None) -> float:
    """Return a divisor as row kernels take it: NaN stands for what the rows count for."""
    return math.nan if divisor is None else divisor


def run_parallel(kernel: Any, size: int, parallel_from: int, arguments: tuple[Any, ...]) -> Any:
    """Call ``kernel(parallel)``, on all threads if the problem is worth them."""
    if size < parallel_from:
        return kernel(False)(*arguments)
    return threads.run(lambda: kernel(False), lambda: kernel(True), arguments)


def quick_rows(
    quick: Any, arrays: Any, out: Any, extents: Any, settings: Any, kernel: Any, parallel_from: int
) -> Any:
    """Serve a quick call on rows of scores: contiguous, int64 labels, no weights, a reduced value.

    Parameters
    ----------
    extents : callable
        ``extents(shape, target's shape)``: batch, classes and so on as the kernel takes them, or None.
    settings : tuple
        Options, the gradient's factor and the divisor, as the kernel takes them.
    kernel : callable
        ``kernel(dtype, parallel)``.
    """
    x, y = arrays
    if x.__class__ is not np.ndarray or y.__class__ is not np.ndarray:
        return MISSING
    dtype, shape, size = x.dtype, x.shape, x.size
    found = extents(shape, y.shape)
    if (
        found is None
        or (dtype is not SINGLE and dtype is not DOUBLE)
        or y.dtype is not INT64
        or not size
        or not x.flags.carray
        or not y.flags.carray
    ):
        return MISSING
    if not quick.wrt:
        out = None
    elif out is None:
        out = new(shape, dtype, size)
    elif out is not x and (
        out.__class__ is not np.ndarray
        or out.dtype is not dtype
        or out.shape != shape
        or not out.flags.carray
        or np.may_share_memory(out, x)
        or np.may_share_memory(out, y)
    ):
        return MISSING
    scores = x.reshape(-1)
    into = scores[:0] if out is None else scores if out is x else out.reshape(-1)
    arguments = (scores, y.reshape(-1), into, found, settings, workers())
    if size < parallel_from:
        value, wrong = kernel(dtype, False)(*arguments)
    else:
        value, wrong = threads.run(lambda: kernel(dtype, False), lambda: kernel(dtype, True), arguments)
    if wrong >= 0:
        return MISSING
    return quick.result(dtype.type(value), (out,))
