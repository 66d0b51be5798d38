"""Arithmetic with whole arrays that gradients are made of. `kernels.cuda.arithmetic` is its twin.

NumPy would warn of numbers that are infinite or none. As results they are right, and kernels say nothing of
theirs.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numba import types

from ..counts import rows_of
from ..layout import overlaps_itself
from ..spec import BY_TERMS, BY_WEIGHTS, DOUBLE, Elements, Weighting, bad_index
from . import memory
from .lanes import summer
from .native import at_address, compile_entry, data_of, held, rank_of, shape_of

# Bound by `means_of`: a dtype's type and its bytes; the sum of numbers at an address.
T: Any = np.float32
ITEM: Any = 4
sum_in_lanes: Any = None


def empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Return a new array, C-contiguous."""
    return np.empty(shape, dtype)


def empty_like(array: np.ndarray, dtype: Any = None, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Return a new array: laid out as another, where no element of that shares its memory."""
    if dtype is not None or shape is not None:
        return np.empty_like(array, dtype, subok=False, shape=shape)
    if array.flags.c_contiguous and array.dtype.isnative:
        return memory.empty(array.shape, array.dtype)
    made = np.empty_like(array, subok=False)
    if overlaps_itself(made) or not made.dtype.isnative:
        made = np.empty(array.shape, array.dtype.newbyteorder("="))
    return made


@np.errstate(all="ignore")
def assign(target: np.ndarray, source: Any) -> None:
    """Copy an array, or a number, to another."""
    target[...] = source


@np.errstate(all="ignore")
def add(target: np.ndarray, source: np.ndarray) -> None:
    """Add an array to another, which may be narrower: in the source's dtype, rounded once."""
    np.add(target, source, out=target, casting="unsafe")


def sum_dtype(arithmetic: np.dtype) -> np.dtype:
    """Return the dtype of arrays that will be added up."""
    return DOUBLE


def inverse(divisor: float) -> float:
    """Return 1 / divisor, as IEEE has it: a mean of nothing is NaN."""
    return 1.0 / divisor if divisor else math.nan


@np.errstate(all="ignore")
def divisor(p: Any) -> float:
    """Return the number that divides a problem's sum."""
    given = p.weighting.divisor
    if given is not None:
        return given
    if not isinstance(p, Elements):
        return counted_rows(p)
    size = math.prod(p.shape)
    if p.counts == BY_WEIGHTS:
        weights = p.weighting.sample_weight
        return float(np.broadcast_to(weights, p.shape).sum(dtype=DOUBLE))
    return float(size if p.counts == BY_TERMS else (*p.shape, 1)[0])


def counted_rows(p: Any) -> float:
    """Return the sum of the weights of a problem's rows: sample weights, and those of the rows' classes."""
    rows = rows_of(p)
    weights: Any = p.weighting.sample_weight
    if weights is not None:
        weights = np.broadcast_to(weights, rows.shape).astype(DOUBLE)
    if rows.labels is not None:
        live = rows.labels != p.ignore_index
        if rows.class_weight is not None:
            wrong = live & ((rows.labels < 0) | (rows.labels >= rows.classes))
            if wrong.any():
                index = tuple(map(int, np.unravel_index(wrong.argmax(), rows.shape)))
                raise bad_index(p.name, index, rows.labels[index], rows.classes)
            own = rows.class_weight.astype(DOUBLE)[np.where(live, rows.labels, 0)]
            weights = own if weights is None else own * weights
        if weights is None:
            return float(np.count_nonzero(live))
        weights = np.where(live, weights, 0)
    return float(math.prod(rows.shape)) if weights is None else float(weights.sum())


@np.errstate(all="ignore")
def masked_product(a: Any, b: Any, dtype: np.dtype, scale: float = 1.0, shift: float = 0.0) -> np.ndarray:
    """Return ``(scale * a + shift) * b``; zero where the first factor is, whatever `b` holds."""
    factor = a.astype(dtype)
    if scale != 1 or shift != 0:
        factor = scale * factor + shift
    shape = np.broadcast_shapes(factor.shape, b.shape)
    return np.multiply(factor, b, where=factor != 0, out=np.zeros(shape, dtype))


@np.errstate(all="ignore")
def sum_of_products(pairs: Sequence[tuple[Any, Any]], dtype: np.dtype) -> np.ndarray:
    """Return the sum of the masked products of some pairs."""
    total = np.zeros(np.broadcast_shapes(*(a.shape for pair in pairs for a in pair)), dtype)
    for a, b in pairs:
        total += masked_product(a, b, dtype)
    return total


def mean_of_rows(array: np.ndarray) -> np.ndarray:
    """Return the mean over the last axis."""
    if array.dtype.char not in "fd" or not array.dtype.isnative or not array.flags.carray:
        with np.errstate(all="ignore"):
            return (np.add.reduce(array, axis=-1, dtype=DOUBLE) / array.shape[-1]).astype(array.dtype)
    means = np.empty(array.shape[:-1], array.dtype)
    means_of(array.dtype)(array, means)
    return means[()]


def fill_means(array, means):
    """Store the means of the rows of an array in C order."""
    rank, shape, rows = rank_of(array), at_address(shape_of(array), 0), 1
    for k in range(rank - 1):
        rows *= shape[k]
    columns, into = shape[rank - 1], at_address(data_of(means), T(0))
    for i in range(rows):
        into[i] = T(sum_in_lanes(data_of(array) + i * columns * ITEM, columns) / columns)
    return 0


@cache
def means_of(dtype: np.dtype) -> Any:
    """Return `fill_means`, compiled for a dtype."""
    scope = dict(T=dtype.type, ITEM=dtype.itemsize, sum_in_lanes=summer(dtype))
    return compile_entry(fill_means, scope, "rows", dtype.name, types.int64(held, held))


@np.errstate(all="ignore")
def over(factor: float, divisor: Any) -> tuple[float, Any]:
    """Return ``factor / divisor`` as a number, and a divisor that is left."""
    return float(factor / np.float64(divisor)), 1.0


@np.errstate(all="ignore")
def total(array: Any, factor: float, arithmetic: np.dtype, divisor: Any = 1.0) -> float:
    """Return ``sum(array) * factor / divisor``."""
    found = float(array.sum(dtype=DOUBLE)) * factor
    return over(found, divisor)[0]


@np.errstate(all="ignore")
def number(x: Any, dtype: np.dtype) -> Any:
    """Return a number as a value of a dtype: infinite where it is beyond."""
    return dtype.type(x)


constant = number  # of one that the host has


def to_host(array: Any) -> np.ndarray:
    """Return an array as NumPy's."""
    return array


@np.errstate(all="ignore")
def from_host(array: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Return NumPy's array as one of a dtype."""
    return array.astype(dtype, copy=False)


def as_float(x: Any) -> float:
    """Return a number as Python's."""
    return float(x)


@np.errstate(all="ignore")
def fold(full: np.ndarray, result: np.ndarray, axes: Sequence[int] | None = None) -> None:
    """Store an array, summed over all axes but some, which are the result's.

    Without `axes`, it is summed over those along which `result` was broadcast to its shape.
    """
    if axes is None:
        extra = full.ndim - result.ndim
        axes = [k for k in range(extra, full.ndim) if full.shape[k] == result.shape[k - extra]]
    summed = tuple(k for k in range(full.ndim) if k not in axes)
    if result.dtype == DOUBLE and len(axes) == result.ndim:
        np.add.reduce(full, axis=summed, dtype=DOUBLE, out=result)
    else:
        result[...] = full.sum(axis=summed, dtype=DOUBLE).reshape(result.shape)


@np.errstate(all="ignore")
def excess(terms: Any, less: Any, weighting: Weighting, dtype: np.dtype) -> np.ndarray:
    """Return ``(terms - less) * sample_weight * upstream * factor / divisor``.

    What a weight of zero multiplies does not count. `less` is a number, or None.
    """
    terms, weight = terms.astype(dtype), np.ones((), dtype)
    shape = np.shape(terms)
    if weighting.sample_weight is not None:
        weight = weighting.sample_weight.astype(dtype)
        terms = np.where(weight == 0, 0, terms * weight)
    if less is not None:
        terms = terms - np.broadcast_to(weight, shape) * dtype.type(less)
    full = terms * dtype.type(inverse(weighting.divisor) * weighting.factor)
    return full if weighting.upstream is None else full * weighting.upstream.astype(dtype)
