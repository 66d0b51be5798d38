"""Arithmetic with whole arrays that gradients are made of. `kernels.cpu.arithmetic` is its twin."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from ..math import where
from ..spec import Elements, Request, Scalars, Weighting, arithmetic_dtype
from . import arrays, driver
from .arrays import DeviceArray, current_queue, flat
from .elementwise import EXCESS, RATIO, SUM, combined, divisor_of, inverse, launch
from .elementwise import over as over_scaled
from .fold import fold
from .rows import counted

__all__ = [
    "add",
    "as_float",
    "assign",
    "constant",
    "divisor",
    "empty",
    "empty_like",
    "excess",
    "fold",
    "from_host",
    "masked_product",
    "mean_of_rows",
    "number",
    "over",
    "sum_dtype",
    "sum_of_products",
    "to_host",
    "total",
]


def _masked(a, b, scale, shift):
    factor = scale * a + shift
    return where(factor == 0, 0, factor * b)


MASKED = Scalars("masked_product", 2, _masked, options=(None, None))


def empty(shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
    """Return a new array, C-contiguous."""
    return current_queue().empty(shape, dtype)


def empty_like(array: DeviceArray, dtype: Any = None, shape: tuple[int, ...] | None = None) -> DeviceArray:
    """Return a new array: of another's order of axes, where it is of its shape."""
    return array.empty_like(dtype, shape=shape)


def assign(target: DeviceArray, source: DeviceArray) -> None:
    """Copy an array to another."""
    target.assign(source)


def add(target: DeviceArray, source: DeviceArray) -> None:
    """Add an array to another, which may be narrower: in the source's dtype, rounded once."""
    target.assign(combined(SUM, target, source, source.dtype))


def sum_dtype(arithmetic: np.dtype) -> np.dtype:
    """Return the dtype of arrays that will be added up: sums have more digits than it."""
    return arithmetic


def masked_product(a: Any, b: Any, dtype: np.dtype, scale: float = 1.0, shift: float = 0.0) -> DeviceArray:
    """Return ``(scale * a + shift) * b``; zero where the first factor is, whatever `b` holds."""
    return combined(MASKED, a, b, dtype, (scale, shift))


def sum_of_products(pairs: Sequence[tuple[Any, Any]], dtype: np.dtype) -> DeviceArray:
    """Return the sum of the masked products of some pairs."""
    found, *others = [masked_product(a, b, dtype) for a, b in pairs]
    for other in others:
        found = combined(SUM, found, other, dtype)
    return found


def mean_of_rows(array: DeviceArray) -> DeviceArray:
    """Return the mean over the last axis."""
    sums = empty(array.shape[:-1], arithmetic_dtype(array.dtype))
    fold(array, sums, range(array.ndim - 1))
    count = np.asarray(float(array.shape[-1]))
    return combined(RATIO, sums, count, sums.dtype).astype(array.dtype, copy=False)


def over(factor: float, divisor: Any) -> tuple[float, Any]:
    """Return ``factor / divisor`` as a number, and a divisor that is left."""
    if isinstance(divisor, DeviceArray):
        return factor, divisor
    return (factor / divisor if divisor else math.nan), 1.0


def total(array: Any, factor: float, arithmetic: np.dtype, divisor: Any = 1.0) -> Any:
    """Return ``sum(array) * factor / divisor``: 0-d, but for an array that the host has."""
    if not isinstance(array, DeviceArray):
        return float(array.sum(dtype=np.float64)) * factor
    factor, left = over(factor, divisor)
    return arrays.total(array, factor, arithmetic, left if isinstance(left, DeviceArray) else None)


def number(x: DeviceArray, dtype: np.dtype) -> DeviceArray:
    """Return a 0-d array in a dtype."""
    return x.astype(dtype, copy=False)


def constant(x: float, dtype: np.dtype) -> DeviceArray:
    """Return a number that the host has as a 0-d array of a dtype."""
    return current_queue().number(x, dtype)


def to_host(array: Any) -> np.ndarray:
    """Return an array as NumPy's, of float64 or int64, when it is there."""
    if not isinstance(array, DeviceArray):
        return np.asarray(array)
    dtype = np.dtype(np.int64 if array.dtype.kind in "iu" else np.float64)
    if not array.size:
        return np.empty(array.shape, dtype)
    read = driver.driver().read(array.astype(dtype, copy=False).address, array.size)
    return read.view(dtype).reshape(array.shape)


def from_host(array: np.ndarray, dtype: np.dtype) -> DeviceArray:
    """Return NumPy's array as one of the device's, of a dtype."""
    with np.errstate(all="ignore"):
        return current_queue().array(array.astype(dtype))


def as_float(x: Any) -> float:
    """Return a number as Python's; of a device's array it waits until it is there."""
    return float(to_host(x))


def divisor(p: Any) -> Any:
    """Return what divides a problem's sum: a number, or a 0-d array where the data makes it."""
    if p.weighting.divisor is not None:
        return p.weighting.divisor
    return divisor_of(p) if isinstance(p, Elements) else counted(p)


def excess(terms: Any, less: Any, weighting: Weighting, dtype: np.dtype) -> DeviceArray:
    """Return ``(terms - less) * sample_weight * upstream * factor / divisor``.

    What a weight of zero multiplies does not count. `less` is a 0-d array, or None.
    """
    queue, shape, w = current_queue(), terms.shape, weighting
    divisor = w.divisor if isinstance(w.divisor, DeviceArray) else None
    factor = w.factor * (1.0 if divisor is not None else inverse(w.divisor))
    upstream, scaled_by = w.upstream, None
    if upstream is not None and not upstream.ndim:
        upstream, scaled_by = None, upstream
    given = [terms, np.zeros(()) if less is None else less]
    given += [a for a in (w.sample_weight, upstream) if a is not None]
    inputs = [flat(a, shape, dtype, queue) for a in given]
    full = queue.empty(shape, dtype)
    request = Request(weighted=w.sample_weight is not None, upstream=upstream is not None, wrt=(0,))
    if full.size:
        launch(
            EXCESS, request, inputs, [full], factor, over_scaled(divisor, scaled_by, dtype), (), None, None
        )
    return full
