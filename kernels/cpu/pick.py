"""One element of each row of class scores: the negative log-likelihood, of log-probabilities that are given.

Only the elements that the class indices name are touched, where they lie: any strides, any floating dtype.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import njit

from ..bind import bind
from .drive import _load, _locate, _store
from .softmax import read, survey


def pick(address, code, shape, strides, step, classes, labels, weight, weights, terms, ignore, divisor):
    """The rows' losses, into `terms`.

    Parameters
    ----------
    address, code : int
        Where the scores lie, and as what.
    shape, strides : arrays of int64
        Of the rows, without the class axis; strides in bytes.
    step : int
        Bytes from one class to the next.
    labels, weight, weights, terms : arrays
        Class indices; weights of classes and of rows, each may be empty; the losses.
    ignore : int
    divisor : float
        Of the value; NaN for what the rows count for.

    Returns
    -------
    value, divisor, wrong : float, float, int
        `wrong` is the first row with a bad class index, or -1.
    """
    zero, one = terms.dtype.type(0), terms.dtype.type(1)
    count, wrong = survey(labels, ignore, classes, weight, weights)
    if wrong >= 0:
        return 0.0, 0.0, wrong
    if divisor != divisor:
        divisor = count
    total = 0.0
    run = shape[-1]
    for start in range(0, labels.size, max(run, 1)):
        base = address + _locate(shape, strides, start)[0]
        for row in range(start, start + run):
            label = labels[row]
            loss = zero
            if label != ignore:
                w = read(weight, label, one) * read(weights, row, one)
                if w != zero:
                    loss = -w * _load(code, base + (row - start) * strides[-1] + label * step, zero)
            terms[row] = loss
            total += loss
    return total / divisor, divisor, -1


def put(address, code, shape, strides, step, labels, weight, weights, upstream, ignore, scale):
    """The gradients, into zeros."""
    one = weight.dtype.type(1)
    run = shape[-1]
    for start in range(0, labels.size, max(run, 1)):
        base = address + _locate(shape, strides, start)[0]
        for row in range(start, start + run):
            label = labels[row]
            if label != ignore:
                w = read(weight, label, one) * read(weights, row, one)
                if w != 0:
                    slope = -w * read(upstream, row, one) * weight.dtype.type(scale)
                    _store(code, base + (row - start) * strides[-1] + label * step, slope)


def plain(x, labels, g, extents, settings, workers):
    """Value and gradient of the commonest call: contiguous scores, and no weights.

    Shapes and settings are those of `softmax.plain`.
    """
    classes, inner = extents[1:]
    ignore, _, scale, divisor = settings
    none = x[:0]
    count, wrong = survey(labels, ignore, classes, none, none)
    if wrong >= 0:
        return 0.0, wrong
    if divisor != divisor:
        divisor = count
    slope = x.dtype.type(-scale / divisor)
    total = 0.0
    for row in range(labels.size):
        if labels[row] != ignore:
            total -= x[(row // inner * classes + labels[row]) * inner + row % inner]
    if g.size:  # which may be x
        g[:] = x.dtype.type(0)
        for row in range(labels.size):
            if labels[row] != ignore:
                g[(row // inner * classes + labels[row]) * inner + row % inner] = slope
    return total / divisor, -1


@cache
def compile_pick(dtype: np.dtype) -> Any:
    """`pick` with arithmetic in one dtype: that of its arrays of weights."""
    decorate = njit(nogil=True, cache=True, error_model="numpy")
    return bind(pick, {}, dtype.name, dtype.name, decorate)


@cache
def compile_plain(dtype: np.dtype) -> Any:
    decorate = njit(nogil=True, cache=True, error_model="numpy")
    return bind(plain, {}, dtype.name, dtype.name, decorate)


@cache
def compile_put(dtype: np.dtype) -> Any:
    decorate = njit(nogil=True, cache=True, error_model="numpy")
    return bind(put, {}, dtype.name, dtype.name, decorate)
