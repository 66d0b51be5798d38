"""One element of each row of class scores: the negative log-likelihood, of log-probabilities that are given.

Only the elements that the class indices name are touched, where they lie: any strides, any floating dtype.
"""

import sys
from functools import cache
from math import inf
from typing import Any

import numpy as np
from numba import njit

from ..bind import bind
from ..layout import Axes, address_of, class_rows
from ..spec import INT64, Picks, Quick, bad_index, code_of
from .drive import _load, _locate, _store
from .packing import divisor_or_nan, flat, optional_over_rows, over_rows, quick_rows
from .softmax import extents_of, read, survey


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


# ---- launching ----------------------------------------------------------------------------------------


def run(p: Picks, outputs: dict[str, np.ndarray]) -> Any:
    """Write the gradient by ``"input"`` and the curvature, which is zero; return the value."""
    w, rows, numbers = p.weighting, class_rows(p.input.shape), p.arithmetic
    gradient = outputs.get("input")
    axes = Axes([p.input] if gradient is None else [p.input, gradient])
    classes = axes.extents[1]
    terms = np.empty(int(np.prod(rows)), numbers)
    labels = over_rows(p.target, axes, INT64)
    weight = flat(p.weight, (classes,), numbers)
    sample_weight = optional_over_rows(w.sample_weight, axes, rows, numbers)
    value, divisor, wrong = compile_pick(numbers)(
        *_over_rows(p.input, axes),
        classes,
        labels,
        weight,
        sample_weight,
        terms,
        p.ignore_index,
        divisor_or_nan(w.divisor),
    )
    if wrong >= 0:
        index = axes.index_of(wrong)
        raise bad_index(p.name, index, p.target[index], classes)
    if "curvature" in outputs:
        outputs["curvature"][...] = 0
    if gradient is not None:
        gradient[...] = 0
        compile_put(numbers)(
            *_over_rows(gradient, axes),
            labels,
            weight,
            sample_weight,
            optional_over_rows(w.upstream, axes, rows, numbers),
            p.ignore_index,
            w.factor / divisor if divisor else inf,
        )
    if w.reduction == "none":
        return axes.unflat(terms).astype(p.dtype, copy=False)
    return p.dtype.type(value)


def _over_rows(array: np.ndarray, axes: Axes) -> tuple[int, int, np.ndarray, np.ndarray, int]:
    """Return where scores lie: address, code, shape and strides of the rows, stride of the classes."""
    a = array.transpose(axes.order)
    k = axes.position
    shape, strides = axes.row_shape or (1,), (*a.strides[:k], *a.strides[k + 1 :]) or (0,)
    code = code_of(a.dtype)
    assert code is not None
    return address_of(a), code, np.array(shape, np.int64), np.array(strides, np.int64), a.strides[k]


def quick(prepared: Quick, arrays: tuple[Any, ...], out: Any) -> Any:
    """Serve contiguous scores, int64 indices, no weights, a reduced value."""
    p = prepared.problem
    settings = p.ignore_index, 0.0, p.weighting.factor, divisor_or_nan(p.weighting.divisor)
    # One thread: it touches one element of a row.
    kernel = lambda dtype, parallel: compile_plain(dtype)
    return quick_rows(prepared, arrays, out, extents_of, settings, kernel, sys.maxsize)
