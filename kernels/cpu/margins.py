"""Margin losses of class scores: each row's own classes against all its others.

Rows are worked on a tile at a time, in scratch memory that stays in cache: a tile of scores is gathered,
from any strides and any floating dtype, each row is overwritten by its gradient, and the tile is scattered to
where the gradient goes. So the gradient may overwrite its input, and no other layout needs a thought. Tiles
depend on the shape alone and their sums are added in order: the same bits for any number of threads.
"""

from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from ..bind import bind
from ..math import select
from ..spec import FLOAT32, FLOAT64, INT64, MANY, Margins, Quick, bad_index
from .drive import _transfer
from .packing import divisor_or_nan, flat, locations, quick_rows, run_parallel, signed, workers
from .target import BLOCK, LOOP, SCALAR

# The arrays of one call, in the order of `places`, `codes` and `strides`.
INPUT, GRAD, CURVATURE = range(3)

TILE = 4096  # elements of a tile: with its copies it stays in the first-level cache, nearly
RUN = 4096  # elements that are summed in the arithmetic dtype, before the sum goes on in float64


class Numbers(NamedTuple):
    """What all rows share, the reals in the arithmetic dtype."""

    squared: bool  # p is 2
    margin: float
    scale: float  # of the gradient
    grad: bool
    curvature: bool


@njit(**(LOOP | {"forceinline": True}))
def _hinges(x, shift, factor, squared, grad):
    T = type(shift)
    zero, one = T(0), T(1)
    loss = slopes = zero
    for i in range(x.size):
        z = x[i] + shift
        h = select(z <= zero, zero, z)  # a NaN stays, in the slope too
        d = h + h if squared else select(z > zero, one, h)
        loss += h * h if squared else h
        slopes += d
        if grad:
            x[i] = factor * d
    return loss, slopes


@njit(**SCALAR)
def hinges(x, shift, factor, squared, grad):
    """Sums of ``max(0, x + shift) ** p`` and of its slopes; the slopes times `factor` overwrite `x`."""
    loss = slopes = 0.0
    for start in range(0, x.size, RUN):
        run = x[start : min(start + RUN, x.size)]
        if squared:
            a, b = _hinges(run, shift, factor, True, grad)
        else:
            a, b = _hinges(run, shift, factor, False, grad)
        loss += a
        slopes += b
    return loss, slopes


@njit(**SCALAR)
def curvatures(x, h, shift, factor):
    """Second derivatives of the squared hinges, and their sum before `factor`."""
    T = type(shift)
    total = T(0)
    for i in range(x.size):
        z = x[i] + shift
        c = select(z > T(0), T(2), select(z <= T(0), T(0), z))
        total += c
        h[i] = factor * c
    return total


@njit(**BLOCK)
def one_label(x, h, labels, scratch, weight, share, upstream, n):
    """The term of a row with one class; gradient and curvature overwrite `x` and `h`."""
    T = type(n.margin)
    zero = T(0)
    own = labels[0]
    share = (share * weight[own] if weight.size else share) / T(x.size)
    if share == zero:
        x[:] = zero
        h[:] = zero
        return zero
    shift = n.margin - x[own]
    factor = n.scale * upstream * share
    below, above = x[:own], x[own + 1 :]
    if n.curvature:
        total = curvatures(below, h[:own], shift, factor) + curvatures(above, h[own + 1 :], shift, factor)
        h[own] = factor * total
    loss, slopes = hinges(below, shift, factor, n.squared, n.grad)
    more_loss, more_slopes = hinges(above, shift, factor, n.squared, n.grad)
    if n.grad:
        x[own] = -factor * T(slopes + more_slopes)
    return share * T(loss + more_loss)


@njit(**(LOOP | {"forceinline": True}))
def _against(scores, other, slope, shift, grad):
    T = type(shift)
    zero, one = T(0), T(1)
    loss = slopes = zero
    for i in range(scores.size):
        z = select(other[i] == zero, -one, scores[i] + shift)
        h = select(z <= zero, zero, z)
        d = select(z > zero, one, h)
        loss += h
        slopes += d
        if grad:
            slope[i] += d
    return loss, slopes


@njit(**BLOCK)
def many_labels(x, h, labels, scratch, weight, share, upstream, n):
    """The term of a row whose classes end at the first -1; the gradient overwrites `x`."""
    T = type(n.margin)
    zero = T(0)
    share = share / T(x.size)
    count = 0
    while count < labels.size and labels[count] >= 0:
        count += 1
    if share == zero or count == 0:
        x[:] = zero
        return zero
    scores, other = scratch[0], scratch[1]
    scores[:] = x
    other[:] = T(1)
    for k in range(count):
        other[labels[k]] = zero
    x[:] = zero
    total = 0.0
    for k in range(count):
        own = labels[k]
        shift = n.margin - scores[own]
        slopes = 0.0
        for start in range(0, x.size, RUN):
            stop = min(start + RUN, x.size)
            a, b = _against(scores[start:stop], other[start:stop], x[start:stop], shift, n.grad)
            total += a
            slopes += b
        x[own] -= T(slopes)
    factor = n.scale * upstream * share
    for i in range(x.size):
        x[i] *= factor
    return share * T(total)


# Bound by `compile_margins` and `compile_plain`.
row: Any = one_label
LOWEST: Any = 0  # the lowest label that is right
whole: Any = None


@njit(nogil=True)
def survey(labels, lowest, classes):
    """The position of the first label outside of [lowest, classes), or -1."""
    wrong = 0
    for i in range(labels.size):
        wrong += (labels[i] < lowest) | (labels[i] >= classes)
    if wrong:
        for i in range(labels.size):
            if labels[i] < lowest or labels[i] >= classes:
                return i
    return -1


def margins(
    places,
    codes,
    shape,
    strides,
    extents,
    labels,
    weight,
    weights,
    upstream,
    terms,
    settings,
    workers,
):
    """The losses of all rows, and what else is asked for.

    Parameters
    ----------
    places, codes : arrays of int64
        Per array (`INPUT`, `GRAD`, `CURVATURE`): its address, and element code (-1: absent).
    shape, strides : arrays of int64
        The common shape, and each array's strides in bytes.
    extents : (int, int)
        Rows and classes.
    labels : array of int64
        The same number for each row.
    weight, weights, upstream : arrays
        Of classes, of rows, and of rows' gradients; each may be empty, for ones.
    terms : array
        Receives the rows' losses; may be empty.
    settings : (int, float, float, float)
        p, the margin, the gradient's scale, and what that and the value are divided by: NaN for what the rows
        count for.
    workers : int
        Into how many shares the tiles are cut.

    Returns
    -------
    value, wrong : float, int
        The divided sum, and the position of the first bad label or -1; then nothing was written.
    """
    rows, classes = extents
    p, margin, scale, divisor = settings
    wrong = survey(labels, LOWEST, classes)
    if wrong >= 0:
        return 0.0, wrong
    T = terms.dtype.type
    if divisor != divisor:
        divisor = float(rows)
        if weights.size:
            divisor = 0.0
            for i in range(rows):
                divisor += float(weights[i])
    grad, curvature = codes[GRAD] >= 0, codes[CURVATURE] >= 0
    n = Numbers(p == 2, T(margin), T(scale / divisor), grad, curvature)
    each = labels.size // max(rows, 1)
    height = max(1, min(rows, TILE // classes))
    tiles = (rows + height - 1) // height
    sums = np.empty(tiles, np.float64)
    workers = min(tiles, workers)
    for worker in prange(workers):
        scores = np.empty(height * classes, terms.dtype)
        second = np.empty(height * classes if curvature else 0, terms.dtype)
        scratch = np.empty((2, classes), terms.dtype)
        for tile in range(worker * tiles // workers, (worker + 1) * tiles // workers):
            first = tile * height
            count = min(height, rows - first)
            start, x, h = first * classes, scores[: count * classes], second[: count * classes]
            _transfer(codes[INPUT], places[INPUT], shape, strides[INPUT], start, x, False)
            total = 0.0
            for r in range(count):
                i = first + r
                term = row(
                    x[r * classes : (r + 1) * classes],
                    h[r * classes : (r + 1) * classes] if curvature else h,
                    labels[i * each : (i + 1) * each],
                    scratch,
                    weight,
                    weights[i] if weights.size else T(1),
                    upstream[i] if upstream.size else T(1),
                    n,
                )
                total += term
                if terms.size:
                    terms[i] = term
            sums[tile] = total
            if grad:
                _transfer(codes[GRAD], places[GRAD], shape, strides[GRAD], start, x, True)
            if curvature:
                _transfer(codes[CURVATURE], places[CURVATURE], shape, strides[CURVATURE], start, h, True)
    total = 0.0
    for tile in range(tiles):
        total += sums[tile]
    return total / divisor, -1


def plain(x, labels, g, extents, settings, workers):
    """`margins` for the commonest call: contiguous arrays of the arithmetic dtype, and no weights."""
    places, codes = np.zeros(3, np.int64), np.full(3, -1)
    code = FLOAT32 if x.itemsize == 4 else FLOAT64
    places[INPUT], codes[INPUT] = x.ctypes.data, code
    if g.size:
        places[GRAD], codes[GRAD] = g.ctypes.data, code
    none = np.empty(0, x.dtype)
    shape, strides = np.full(1, x.size), np.full((3, 1), x.itemsize)
    return whole(places, codes, shape, strides, extents, labels, none, none, none, none, settings, workers)


@cache
def compile_margins(many: bool, dtype: np.dtype, parallel: bool) -> Any:
    """`margins` of rows with one label or many, with arithmetic in one dtype."""
    function = many_labels if many else one_label
    name = f"{function.__name__}_{dtype.name}_{'parallel' if parallel else 'serial'}"
    decorate = njit(nogil=True, parallel=parallel, cache=True, error_model="numpy")
    return bind(margins, {"row": function, "LOWEST": -1 if many else 0}, name, name, decorate)


@cache
def compile_plain(many: bool, dtype: np.dtype, parallel: bool) -> Any:
    name = f"{many}_{dtype.name}_{'parallel' if parallel else 'serial'}"
    return bind(
        plain, {"whole": compile_margins(many, dtype, parallel)}, name, name, njit(nogil=True, cache=True)
    )


# ---- launching ----------------------------------------------------------------------------------------

PARALLEL_FROM = 32768  # hinges from which two threads beat one: starting them costs about 6 us


def run(p: Margins, outputs: dict[str, np.ndarray]) -> Any:
    """Write the gradient by ``"input"`` and the curvature; return the value. Of ONE or MANY labels a row."""
    w, shape, numbers = p.weighting, p.input.shape, p.arithmetic
    rows, classes = shape[:-1], shape[-1]
    reduced = w.reduction != "none"
    terms = np.empty(0 if reduced else prod(rows), numbers)
    arguments = (
        *locations([p.input, outputs.get("input"), outputs.get("curvature")]),
        (prod(rows), classes),
        flat(signed(p.target), p.target.shape, INT64),
        flat(p.weight, (classes,), numbers),
        flat(w.sample_weight, rows, numbers),
        flat(w.upstream, rows, numbers),
        terms,
        (p.p, p.margin, w.factor, divisor_or_nan(w.divisor)),
        workers(),
    )
    value, wrong = run_parallel(
        lambda parallel: compile_margins(p.kind == MANY, numbers, parallel),
        p.input.size,
        PARALLEL_FROM,
        arguments,
    )
    if wrong >= 0:
        index = tuple(map(int, np.unravel_index(wrong, p.target.shape)))
        raise bad_index(p.name, index, p.target[index], classes)
    if reduced:
        return p.dtype.type(value)
    return terms.reshape(rows).astype(p.dtype, copy=False)


def quick(prepared: Quick, arrays: tuple[Any, ...], out: Any) -> Any:
    """Serve contiguous scores, int64 labels, no weights, a reduced value."""
    p = prepared.problem
    many = p.kind == MANY

    def extents(shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...] | None:
        return shape if len(shape) == 2 and target == (shape if many else shape[:1]) else None

    def kernel(dtype: np.dtype, parallel: bool) -> Any:
        return compile_plain(many, dtype, parallel)

    settings = p.p, p.margin, p.weighting.factor, divisor_or_nan(p.weighting.divisor)
    return quick_rows(prepared, arrays, out, extents, settings, kernel, PARALLEL_FROM)
