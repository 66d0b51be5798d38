"""Losses of vectors: each row of two or three arrays gives one term through a few sums over the row.

A row is read from memory once: its sums first, then, from cache, the gradients to all its vectors, into
scratch and from there to where they go: a gradient may overwrite its own vector. Arrays that are contiguous
and of the arithmetic dtype are used where they lie, all others a tile at a time through scratch. Tiles depend
on the shape alone and their sums are added in order: the same bits for any number of threads.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, prange

from .. import math
from ..bind import bind
from ..math import select
from .drive import _transfer, at_address
from .target import LOOP, SCALAR, prefer_widest_vectors

VECTORS = 3  # at most, a row; their gradients are as many
TILE = 8192  # elements of an array's tile, which stays in the second-level cache
RUN = 4096  # elements that are summed in the arithmetic dtype, before the sum goes on in float64

# Kinds of distance.
POWER, SUM, SQUARES, ROOT_OF_SQUARES, LARGEST, COSINE = range(6)


class Numbers(NamedTuple):
    """What all rows share, the reals in the arithmetic dtype."""

    kind: int  # of distance
    p: float  # of the norm
    eps: float  # added to each coordinate's difference, or under each squared norm
    margin: float
    swap: bool
    scale: float  # of the gradient
    grad: bool
    tiny: float  # a sum below it may have lost terms to underflow


class Measure(NamedTuple):
    """A distance, and what its gradients are made of."""

    value: float
    slope: float  # the gradient's factor: of the other vector, or of the differences' powers
    own: float  # cosine: the factor of the vector itself; else what scales the differences, against overflow
    other: float  # cosine: the same for the second vector


@njit(**(LOOP | {"forceinline": True}))
def _dots(x, y, rx, ry):
    T = type(rx)
    xx = yy = xy = T(0)
    for j in range(x.size):
        a, b = x[j] * rx, y[j] * ry
        xx += a * a
        yy += b * b
        xy += a * b
    return xx, yy, xy


@njit(**SCALAR)
def dots(x, y, rx, ry):
    """Squared norms of ``x rx`` and ``y ry``, and their product."""
    xx = yy = xy = 0.0
    for start in range(0, x.size, RUN):
        stop = min(start + RUN, x.size)
        a, b, c = _dots(x[start:stop], y[start:stop], rx, ry)
        xx += a
        yy += b
        xy += c
    return xx, yy, xy


@njit(**SCALAR)
def power_of_two_below(x):
    """To scale by it is exact."""
    return type(x)(2.0 ** np.floor(np.log2(float(x))))


@njit(**SCALAR)
def inverse_of_largest(x):
    """About 1 over the largest magnitude, if that is a number."""
    T = type(x[0])
    m = T(0)
    for j in range(x.size):
        m = max(m, abs(x[j]))
    return power_of_two_below(T(1) / m) if m > T(0) and m < T(np.inf) else T(1)


@njit(**SCALAR)
def angle(x, y, eps):
    """1 less the cosine of the angle between two vectors."""
    T = type(eps)
    rx = ry = T(1)
    xx, yy, xy = dots(x, y, rx, ry)
    if not (xx < np.inf and yy < np.inf):  # a square overflowed
        rx, ry = inverse_of_largest(x), inverse_of_largest(y)
        xx, yy, xy = dots(x, y, rx, ry)
    ex, ey = float(rx), float(ry)
    xx += float(eps) * ex * ex
    yy += float(eps) * ey * ey
    inverse = 1 / (np.sqrt(xx) * np.sqrt(yy))
    c = xy * inverse
    return Measure(T(1 - c), T(inverse * ex * ey), T(c / xx * ex * ex), T(c / yy * ey * ey))


@njit(**(LOOP | {"forceinline": True}))
def _sum_of_powers(x, y, eps, r, kind, p):
    prefer_widest_vectors()
    T = type(r)
    total = T(0)
    if kind == SUM:
        for j in range(x.size):
            total += abs(x[j] - y[j] + eps)
    elif kind == POWER:
        for j in range(x.size):
            total += math.power(abs(x[j] - y[j] + eps) * r, p)
    else:
        for j in range(x.size):
            u = (x[j] - y[j] + eps) * r
            total += u * u
    return total


@njit(**SCALAR)
def sum_of_powers(x, y, eps, r, kind, p):
    total = 0.0
    for start in range(0, x.size, RUN):
        stop = min(start + RUN, x.size)
        total += _sum_of_powers(x[start:stop], y[start:stop], eps, r, kind, p)
    return total


@njit(**SCALAR)
def largest(x, y, eps):
    """The largest difference, and how many coordinates have it; a NaN is larger than all."""
    T = type(eps)
    m, count = T(0), 0
    for j in range(x.size):
        u = abs(x[j] - y[j] + eps)
        if u > m or u != u:
            m, count = u, 1
        elif u == m:
            count += 1
    return m, count


@njit(**SCALAR)
def distance(x, y, n):
    """How far two vectors are apart."""
    T = type(n.eps)
    zero, one = T(0), T(1)
    if n.kind == COSINE:
        return angle(x, y, n.eps)
    if n.kind == LARGEST:
        m, count = largest(x, y, n.eps)
        return Measure(m, one / T(max(count, 1)), one, zero)
    s = sum_of_powers(x, y, n.eps, one, n.kind, n.p)
    if n.kind == SUM:
        return Measure(T(s), one, one, zero)
    if n.kind == SQUARES:
        return Measure(T(s), T(2), one, zero)
    r = one
    if not (s >= n.tiny and s < np.inf):
        m = largest(x, y, n.eps)[0]
        if m > zero and m < T(np.inf):
            r = power_of_two_below(one / m)
            s = sum_of_powers(x, y, n.eps, r, n.kind, n.p)
    p = float(n.p)
    root = np.sqrt(s) if n.kind == ROOT_OF_SQUARES else s ** (1 / p)
    slope = zero if s == 0 else T(1 / root) if n.kind == ROOT_OF_SQUARES else T(s ** (1 / p - 1))
    return Measure(T(root / float(r)), slope, r, zero)


@njit(**SCALAR)
def add_gradients(x, y, n, d, factor, gx, gy):
    """Add `factor` times the gradients of the distance `d` by both vectors."""
    prefer_widest_vectors()
    T = type(n.eps)
    zero = T(0)
    k, r = factor * d.slope, d.own
    if n.kind == COSINE:
        own, other = factor * d.own, factor * d.other
        for j in range(x.size):
            a, b = x[j], y[j]
            gx[j] += own * a - k * b
            gy[j] += other * b - k * a
    elif n.kind == ROOT_OF_SQUARES or n.kind == SQUARES:
        for j in range(x.size):
            t = k * ((x[j] - y[j] + n.eps) * r)
            gx[j] += t
            gy[j] -= t
    elif n.kind == SUM:
        for j in range(x.size):
            t = k * math.sign(x[j] - y[j] + n.eps)
            gx[j] += t
            gy[j] -= t
    elif n.kind == LARGEST:
        for j in range(x.size):
            u = x[j] - y[j] + n.eps
            t = select(abs(u) < d.value, zero, k * math.sign(u))
            gx[j] += t
            gy[j] -= t
    else:
        q = n.p - T(1)
        for j in range(x.size):
            u = (x[j] - y[j] + n.eps) * r
            t = select(u == zero, zero, k * math.sign(u) * math.power(abs(u), q))
            gx[j] += t
            gy[j] -= t


@njit(**LOOP)
def pair(x, y, z, label, share, upstream, n, gx, gy, gz):
    """The term of cosine embedding; the gradients are added to `gx` and `gy`."""
    T = type(n.eps)
    zero, one = T(0), T(1)
    if abs(label) != one:
        return zero
    d = distance(x, y, n)
    term = d.value if label == one else one - d.value - n.margin
    if label != one and term < zero:
        return zero
    if n.grad:
        add_gradients(x, y, n, d, label * n.scale * upstream * share, gx, gy)
    return share * term


@njit(**LOOP)
def triplet(x, y, z, label, share, upstream, n, gx, gy, gz):
    """The term of a triplet; the gradients are added to `gx`, `gy` and `gz`."""
    T = type(n.eps)
    zero, half, one = T(0), T(0.5), T(1)
    near, far = distance(x, y, n), distance(x, z, n)
    swapped, far_share, least = far, one, far.value
    if n.swap:
        swapped = distance(y, z, n)
        if not (far.value < swapped.value):
            least = swapped.value
            far_share = half if far.value == swapped.value else zero
        if far.value != far.value:  # the minimum is NaN
            least = far.value
    term = n.margin + near.value - least
    if term < zero:
        return zero
    if n.grad:
        factor = n.scale * upstream * share
        add_gradients(x, y, n, near, factor, gx, gy)
        if far_share != zero:
            add_gradients(x, z, n, far, -factor * far_share, gx, gz)
        if far_share != one:
            add_gradients(y, z, n, swapped, -factor * (one - far_share), gy, gz)
    return share * term


# Bound by `compile_vectors` and `compile_plain`.
row: Any = triplet
whole: Any = None


@njit(nogil=True)
def tile_of(direct, address, code, shape, strides, start, count, scratch):
    """A tile of an input: where it lies, or gathered."""
    if direct:
        return carray(at_address(address + start * scratch.itemsize, scratch[0]), (count,))
    tile = scratch[:count]
    _transfer(code, address, shape, strides, start, tile, False)
    return tile


@njit(nogil=True, error_model="numpy")
def put(direct, address, code, shape, strides, start, tile):
    """Store a tile of an output."""
    if direct:
        out = carray(at_address(address + start * tile.itemsize, tile[0]), (tile.size,))
        out[:] = tile
    else:
        _transfer(code, address, shape, strides, start, tile, True)


@njit(nogil=True, error_model="numpy")
def share_of_tiles(
    tiles_from, tiles_to, addresses, codes, shape, strides, direct, extents, labels, weights, upstream, terms,
    height, n, sums,
):  # fmt: skip
    """One worker's tiles: their sums, and the outputs."""
    rows, size = extents
    dtype = terms.dtype
    one = dtype.type(1)
    room = max(height * size, 1)
    scratch = np.empty((VECTORS, room), dtype)
    gradients = np.empty((VECTORS, room if n.grad else 1), dtype)
    present = codes >= 0
    three = present[2]
    for index in range(tiles_from, tiles_to):
        first = index * height
        count = min(height, rows - first)
        start, span = first * size, count * size
        x = tile_of(direct[0], addresses[0], codes[0], shape, strides[0], start, span, scratch[0])
        y = tile_of(direct[1], addresses[1], codes[1], shape, strides[1], start, span, scratch[1])
        z = y
        if three:
            z = tile_of(direct[2], addresses[2], codes[2], shape, strides[2], start, span, scratch[2])
        gx, gy, gz = gradients[0], gradients[1], gradients[2]
        if n.grad:
            gradients[:, :span] = dtype.type(0)
        total = 0.0
        for i in range(count):
            at = first + i
            weight = weights[at] if weights.size else one
            term = dtype.type(0)
            if weight != term:  # else the row is not even read
                low, high = i * size, (i + 1) * size
                top = (low, high) if n.grad else (0, 0)
                term = row(
                    x[low:high], y[low:high], z[low:high],
                    labels[at] if labels.size else one,
                    weight,
                    upstream[at] if upstream.size else one,
                    n,
                    gx[top[0] : top[1]], gy[top[0] : top[1]], gz[top[0] : top[1]],
                )  # fmt: skip
            total += term
            if terms.size:
                terms[at] = term
        sums[index] = total
        for k in range(VECTORS):
            j = VECTORS + k
            if present[j]:
                put(direct[j], addresses[j], codes[j], shape, strides[j], start, gradients[k, :span])


def vectors(
    addresses, codes, shape, strides, direct, extents, labels, weights, upstream, terms, settings, workers
):
    """The losses of all rows, and the gradients that are asked for.

    Parameters
    ----------
    addresses, codes, direct : arrays of int64
        Per array, three vectors and then their gradients: its address, element code (-1: absent) and whether
        it is contiguous and of the arithmetic dtype.
    shape, strides : arrays of int64
        The common shape, and each array's strides in bytes.
    extents : (int, int)
        Rows, and coordinates of each.
    labels : array
        Of the rows, in the arithmetic dtype; may be empty.
    weights, upstream : arrays
        Of rows, and of their gradients; each may be empty, for ones.
    terms : array
        Receives the rows' losses; may be empty.
    settings : (int, float, float, float, bool, float, float)
        Kind of distance, p, eps, margin, swap, the gradient's scale, and what that and the value are divided
        by: NaN for what the rows count for.
    workers : int
        Into how many shares the tiles are cut.

    Returns
    -------
    value : float
        The divided sum.
    """
    rows, size = extents
    kind, p, eps, margin, swap, scale, divisor = settings
    T = terms.dtype.type
    if divisor != divisor:
        divisor = float(rows)
        if weights.size:
            divisor = 0.0
            for i in range(rows):
                divisor += float(weights[i])
    grad = False
    for k in range(VECTORS):
        grad = grad or codes[VECTORS + k] >= 0
    tiny = T(2.0**-100 if terms.itemsize == 4 else 2.0**-960)
    n = Numbers(kind, T(p), T(eps), T(margin), swap, T(scale / divisor), grad, tiny)
    height = max(1, min(rows, TILE // size))
    tiles = (rows + height - 1) // height
    sums = np.empty(tiles, np.float64)
    workers = min(tiles, workers)
    for worker in prange(workers):
        share_of_tiles(
            worker * tiles // workers, (worker + 1) * tiles // workers, addresses, codes, shape, strides,
            direct, extents, labels, weights, upstream, terms, height, n, sums,
        )  # fmt: skip
    total = 0.0
    for tile in range(tiles):
        total += sums[tile]
    return total / divisor


def plain(x, y, z, gx, gy, gz, labels, extents, settings, workers):
    """`vectors` for the commonest call: contiguous arrays of the arithmetic dtype, and no weights."""
    addresses, codes = np.zeros(2 * VECTORS, np.int64), np.full(2 * VECTORS, -1)
    if x.size:
        addresses[0], codes[0] = x.ctypes.data, 0
    if y.size:
        addresses[1], codes[1] = y.ctypes.data, 0
    if z.size:
        addresses[2], codes[2] = z.ctypes.data, 0
    if gx.size:
        addresses[3], codes[3] = gx.ctypes.data, 0
    if gy.size:
        addresses[4], codes[4] = gy.ctypes.data, 0
    if gz.size:
        addresses[5], codes[5] = gz.ctypes.data, 0
    none = np.empty(0, x.dtype)
    return whole(
        addresses,
        codes,
        np.empty(0, np.int64),
        np.empty((2 * VECTORS, 0), np.int64),
        np.ones(2 * VECTORS, np.int64),
        extents,
        labels,
        none,
        none,
        none,
        settings,
        workers,
    )


@cache
def compile_vectors(three: bool, dtype: np.dtype, parallel: bool) -> Any:
    """`vectors` of pairs or of triplets, with arithmetic in one dtype."""
    function = triplet if three else pair
    name = f"{function.__name__}_{dtype.name}_{'parallel' if parallel else 'serial'}"
    decorate = njit(nogil=True, parallel=parallel, cache=True, error_model="numpy")
    shares = bind(
        share_of_tiles.py_func, {"row": function}, name, name, njit(nogil=True, error_model="numpy")
    )
    return bind(vectors, {"share_of_tiles": shares}, name, name, decorate)


@cache
def compile_plain(three: bool, dtype: np.dtype, parallel: bool) -> Any:
    name = f"{three}_{dtype.name}_{'parallel' if parallel else 'serial'}"
    return bind(
        plain, {"whole": compile_vectors(three, dtype, parallel)}, name, name, njit(nogil=True, cache=True)
    )
