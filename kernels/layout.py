"""Where arrays lie: the order of their axes, merged axes, addresses, overlap. Of any device's arrays."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from .spec import is_described


def address_of(array: Any) -> int:
    """Return the address of an array's first element."""
    return array.address if is_described(array) else array.__array_interface__["data"][0]


def is_same_memory(a: Any, b: Any) -> bool:
    """Return whether two arrays are the same elements in the same order."""
    return a is b or (
        a.shape == b.shape
        and a.strides == b.strides
        and a.dtype == b.dtype
        and address_of(a) == address_of(b)
    )


def share_memory(a: Any, b: Any) -> bool:
    """Return whether two arrays have an element in common, or may: a layout too tangled to tell."""
    if not np.may_share_memory(a, b):
        return False
    try:
        return np.shares_memory(a, b, max_work=100_000)  # type: ignore[arg-type]
    except (np.exceptions.TooHardError, OverflowError):
        return True


def overlaps_itself(array: Any) -> bool:
    """Return whether two elements lie at one address (or may: a layout too tangled to tell)."""
    if array.flags.c_contiguous or array.flags.f_contiguous:
        return False
    axes = sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1)
    end = array.itemsize
    for stride, n in axes:
        if stride < end:
            return True
        end = stride * (n - 1) + end
    return False


def axes_in_order(arrays: Sequence[Any]) -> tuple[int, ...]:
    """Return the order of the arrays' axes in which memory is walked in order, where there is one."""
    ndim = arrays[-1].ndim
    if ndim < 2 or all(a.flags.c_contiguous for a in arrays):
        return tuple(range(ndim))
    weight = [sum(abs(a.strides[k]) for a in arrays) for k in range(ndim)]
    return tuple(sorted(range(ndim), key=lambda k: (-weight[k], k)))


def aligned_axes(arrays: list[Any]) -> list[Any]:
    """Return the arrays with their axes permuted alike, so that memory is walked in order where it can be."""
    axes = axes_in_order(arrays)
    return arrays if axes == tuple(range(len(axes))) else [a.transpose(axes) for a in arrays]


def merged_axes(arrays: Sequence[Any]) -> tuple[list[int], list[list[int]]]:
    """Return the common shape and each array's byte strides, axes merged wherever all arrays allow it."""
    shape: list[int] = []
    strides: list[list[int]] = [[] for _ in arrays]
    for axis, extent in enumerate(arrays[0].shape):
        if extent == 1:
            continue
        steps = [a.strides[axis] for a in arrays]
        if shape and all(s[-1] == step * extent for s, step in zip(strides, steps, strict=True)):
            shape[-1] *= extent
            for s, step in zip(strides, steps, strict=True):
                s[-1] = step
        else:
            shape.append(extent)
            for s, step in zip(strides, steps, strict=True):
                s.append(step)
    if not shape:
        return [1], [[a.itemsize] for a in arrays]
    return shape, strides


def index_at(position: int, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """Return the index of the element at a position, in an array whose axes are visited in another order."""
    index = np.unravel_index(position, tuple(shape[k] for k in axes)) if shape else ()
    return tuple(int(index[axes.index(k)]) for k in range(len(shape)))


# ---- class scores -------------------------------------------------------------------------------------


def class_axis(shape: tuple[int, ...]) -> int:
    """Return the axis of the classes: scores are (C), (N, C) or (N, C, d1, ...)."""
    return min(1, len(shape) - 1)


def class_rows(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of the terms: scores are (C), (N, C) or (N, C, d1, ...)."""
    return shape[:1] + shape[2:] if len(shape) > 1 else ()


class Axes:
    """The axes of scores, sorted by their strides: in C order where some order of the axes is.

    Attributes
    ----------
    order : tuple of int
        The axes as they are visited.
    rows : tuple of int
        Those of the rows alone, numbered without the classes' axis.
    position : int
        Where the classes' axis comes in `order`.
    """

    def __init__(self, arrays: Sequence[Any]) -> None:
        self.order = axes_in_order(arrays)
        axis = class_axis(arrays[0].shape)
        self.position = self.order.index(axis)
        self.shape = tuple(arrays[0].shape[k] for k in self.order)
        self.rows = tuple(k - (k > axis) for k in self.order if k != axis)
        self.row_shape = tuple(arrays[0].shape[k] for k in self.order if k != axis)

    @property
    def extents(self) -> tuple[int, int, int]:
        """The batch, the classes and the inner positions."""
        k = self.position
        return math.prod(self.shape[:k]), self.shape[k], math.prod(self.shape[k + 1 :])

    def unflat(self, terms: np.ndarray) -> np.ndarray:
        """Return the terms of the rows as they were visited, at their rows' indices."""
        inverse = np.argsort(self.rows) if self.rows else ()
        return terms.reshape(self.row_shape).transpose(inverse)

    def index_of(self, row: int) -> tuple[int, ...]:
        """Return the index of the row that is visited `row`-th."""
        index = np.unravel_index(row, self.row_shape) if self.row_shape else ()
        return tuple(int(index[self.rows.index(k)]) for k in range(len(self.rows)))


class InOrder:
    """Axes as they are: the last is a row's, or the first `rows` are those of the rows."""

    def __init__(self, ndim: int, rows: int | None = None) -> None:
        self.order, self.rows = tuple(range(ndim)), tuple(range(ndim - 1 if rows is None else rows))
