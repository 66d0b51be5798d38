"""Losses of vectors: each row of two or three arrays gives one term through a few sums over the row.

A tile of rows is read from memory once, and stays in cache for three visits: the distances between its
vectors, the rows' terms, and the gradients to all vectors, into scratch and from there to where they go: a
gradient may overwrite its own vector. Arrays that are contiguous and of the arithmetic dtype are used where
they lie, all others a tile at a time through scratch. Tiles depend on the shape alone and their sums are
added in order: the same bits for any number of threads.
"""

from functools import cache
from math import prod
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, prange

from .. import math
from ..bind import bind
from ..math import bits, select, unbits
from ..spec import DOUBLE, MISSING, SINGLE, Quick, Vectors
from .drive import _transfer, at_address
from .packing import divisor_or_nan, flat, is_direct, locations, new, run_parallel, workers
from .target import BLOCK, LOOP, SCALAR, prefer_widest_vectors

VECTORS = 3  # at most, a row; their gradients are as many, and so are the distances between them
TILE = 8192  # elements of an array's tile, which stays in the second-level cache
RUN = 4096  # elements that are summed in the arithmetic dtype, before the sum goes on in float64

MOST_SINGLE, MOST_DOUBLE = (float(np.finfo(T).max) for T in (np.float32, np.float64))

# Kinds of distance.
POWER, SUM, SQUARES, ROOT_OF_SQUARES, LARGEST, COSINE = range(6)


class Numbers(NamedTuple):
    """What all rows share, the reals in the arithmetic dtype."""

    size: int  # coordinates of a vector
    kind: int  # of distance
    p: float  # of the norm
    eps: float  # added to each coordinate's difference, or under each squared norm
    margin: float
    swap: bool
    scale: float  # of the gradient
    grad: bool
    wide: float  # a sum above it, or below its inverse, may have lost terms, or lose its gradient
    most: float  # the largest number


# What a tile keeps of each distance. First the sums go where VALUE and the next two are.
(
    VALUE,
    SLOPE,  # the gradient's factor: of the differences' powers, or of the other vector
    OWN,  # cosine: the factor of the first vector itself
    OTHER,  # cosine: the same for the second vector
    FIRST,  # what scales the first vector, or the differences, so that nothing overflows
    SECOND,  # cosine: the same for the second vector
    FACTOR,  # what the loss makes of it: multiplies the gradients
) = range(7)


# Apart from the sums' loops, which may reassociate: eps would vanish in ``x + (eps - y)``, and the squares of
# what is scaled would be ``(x * x) * (r * r)``.
@njit(**SCALAR)
def difference(x, y, eps):
    return x - y + eps


@njit(**SCALAR)
def scaled(x, r):
    return x * r


@njit(**LOOP)
def sums(x, y, size, rx, ry, n, d):
    """Of each row of `size` coordinates the sum of the differences' powers, or squared norms and product.

    Each branch stores its own: where they meet, Numba would count references to the slices, and that costs
    more than a short row.
    """
    prefer_widest_vectors()
    T = type(rx)
    for i in range(d.shape[1]):
        low, high = i * size, (i + 1) * size
        xr, yr = x[low:high], y[low:high]
        total = xx = yy = xy = T(0)
        if n.kind == COSINE:
            for j in range(xr.size):
                a, b = scaled(xr[j], rx), scaled(yr[j], ry)
                xx += a * a
                yy += b * b
                xy += a * b
            d[0, i], d[1, i], d[2, i] = xx, yy, xy
        elif n.kind == SUM:
            for j in range(xr.size):
                total += abs(difference(xr[j], yr[j], n.eps))
            d[0, i] = total
        elif n.kind == POWER:
            for j in range(xr.size):
                total += math.power(scaled(abs(difference(xr[j], yr[j], n.eps)), rx), n.p)
            d[0, i] = total
        else:
            for j in range(xr.size):
                u = scaled(difference(xr[j], yr[j], n.eps), rx)
                total += u * u
            d[0, i] = total


@njit(**BLOCK)
def sums_of_row(x, y, rx, ry, n, d):
    """The same for one row of any length, in runs."""
    a = b = c = 0.0
    for start in range(0, x.size, RUN):
        stop = min(start + RUN, x.size)
        sums(x[start:stop], y[start:stop], stop - start, rx, ry, n, d)
        a += d[0, 0]
        b += d[1, 0]
        c += d[2, 0]
    d[0, 0], d[1, 0], d[2, 0] = a, b, c


@njit(**LOOP)
def peaks(x, y, n, d):
    """The largest difference of each row, and how often it is there: never, if it is NaN."""
    prefer_widest_vectors()
    zero, one = type(n.eps)(0), type(n.eps)(1)
    for i in range(d.shape[1]):
        low, high = i * n.size, (i + 1) * n.size
        xr, yr = x[low:high], y[low:high]
        m = bits(zero)  # a maximum of floats does not vectorise; as integers a NaN is above all
        for j in range(xr.size):
            m = max(m, bits(abs(difference(xr[j], yr[j], n.eps))))
        d[0, i], count = unbits(m), zero
        for j in range(xr.size):
            count += select(abs(difference(xr[j], yr[j], n.eps)) == unbits(m), one, zero)
        d[1, i] = count


@njit(**SCALAR)
def inverse(m, n):
    """1 over the largest of some magnitudes, if that is a number."""
    T = type(m)
    return T(min(1 / np.float64(m), np.float64(n.most))) if m > T(0) and m <= n.most else T(1)


@njit(**SCALAR)
def largest(x):
    m = bits(type(x[0])(0))
    for j in range(x.size):
        m = max(m, bits(abs(x[j])))
    return unbits(m)


@njit(**BLOCK)
def rescale(x, y, n, d):
    """Form again, of scaled vectors, the sums that lost terms or would lose their gradients."""
    T = type(n.eps)
    one = T(1)
    for i in range(d.shape[1]):
        if n.kind == COSINE:
            fits, other_fits = d[0, i] <= n.wide, d[1, i] <= n.wide
        else:
            fits, other_fits = d[0, i] <= n.wide and d[0, i] * n.wide >= one, True
        if fits and other_fits:
            continue
        low, high = i * n.size, (i + 1) * n.size
        xr, yr = x[low:high], y[low:high]
        di = d[:, i : i + 1]
        if n.kind == COSINE:
            d[FIRST, i] = one if fits else inverse(largest(xr), n)
            d[SECOND, i] = one if other_fits else inverse(largest(yr), n)
        else:
            peaks(xr, yr, n, di)
            d[FIRST, i] = inverse(d[0, i], n)
        sums_of_row(xr, yr, d[FIRST, i], d[SECOND, i], n, di)


@njit(**SCALAR)
def finish_cosine(n, d):
    """1 less the cosine of the angle; in float64, for where it is near 0."""
    T = type(n.eps)
    for i in range(d.shape[1]):
        rx, ry = np.float64(d[FIRST, i]), np.float64(d[SECOND, i])
        xx = np.float64(d[0, i]) + np.float64(n.eps) * rx * rx
        yy = np.float64(d[1, i]) + np.float64(n.eps) * ry * ry
        slope = 1 / (math.square_root(xx) * math.square_root(yy))
        c = np.float64(d[2, i]) * slope
        d[VALUE, i], d[SLOPE, i], d[OWN, i], d[OTHER, i] = T(1 - c), T(slope), T(c / xx), T(c / yy)


@njit(**SCALAR)
def finish_norm(n, d):
    """From the sum of powers to the norm, and the power of it that its derivative has."""
    T = type(n.eps)
    zero, one = T(0), T(1)
    for i in range(d.shape[1]):
        s = d[0, i]
        root = math.square_root(s) if n.kind == ROOT_OF_SQUARES else math.power(s, one / n.p)
        d[VALUE, i], d[SLOPE, i] = root / d[FIRST, i], select(s == zero, zero, root / s)


@njit(**BLOCK)
def measure(x, y, n, d):
    """How far each row of `x` is from that of `y`."""
    T = type(n.eps)
    zero, one = T(0), T(1)
    d[:] = one
    if n.kind == LARGEST:
        peaks(x, y, n, d)
    elif n.size <= RUN:
        sums(x, y, n.size, one, one, n, d)
    else:
        for i in range(d.shape[1]):
            low, high = i * n.size, (i + 1) * n.size
            sums_of_row(x[low:high], y[low:high], one, one, n, d[:, i : i + 1])
    if n.kind == COSINE:
        rescale(x, y, n, d)
        finish_cosine(n, d)
    elif n.kind == POWER or n.kind == ROOT_OF_SQUARES:
        rescale(x, y, n, d)
        finish_norm(n, d)
    else:
        for i in range(d.shape[1]):
            many = d[1, i]  # none where the largest is NaN
            d[SLOPE, i] = T(2) if n.kind == SQUARES else one if n.kind == SUM else one / many
            if n.kind == LARGEST and many == zero:
                d[SLOPE, i] = d[VALUE, i]


# Not to reassociate: ``factor * r`` overflows where ``factor * (x * r)`` does not.
@njit(**BLOCK)
def add_gradients(x, y, n, d, gx, gy):
    """Add the gradients of the distances by both vectors, each times its factor."""
    prefer_widest_vectors()
    T = type(n.eps)
    zero = T(0)
    for i in range(d.shape[1]):
        factor, m, r, ry = d[FACTOR, i], d[VALUE, i], d[FIRST, i], d[SECOND, i]
        if factor == zero:
            continue
        k, own, other = factor * d[SLOPE, i], factor * d[OWN, i], factor * d[OTHER, i]
        low, high = i * n.size, (i + 1) * n.size
        xr, yr, gxr, gyr = x[low:high], y[low:high], gx[low:high], gy[low:high]
        if n.kind == COSINE:
            for j in range(xr.size):
                a, b = xr[j] * r, yr[j] * ry
                gxr[j] += (own * a - k * b) * r
                gyr[j] += (other * b - k * a) * ry
        elif n.kind == ROOT_OF_SQUARES or n.kind == SQUARES:
            for j in range(xr.size):
                t = k * (difference(xr[j], yr[j], n.eps) * r)
                gxr[j] += t
                gyr[j] -= t
        elif n.kind == SUM:
            for j in range(xr.size):
                t = k * math.sign(difference(xr[j], yr[j], n.eps))
                gxr[j] += t
                gyr[j] -= t
        elif n.kind == LARGEST:
            for j in range(xr.size):
                u = difference(xr[j], yr[j], n.eps)
                t = select(abs(u) < m, zero, k * math.sign(u))
                gxr[j] += t
                gyr[j] -= t
        else:
            q = n.p - T(1)
            for j in range(xr.size):
                u = difference(xr[j], yr[j], n.eps) * r
                t = select(u == zero, zero, k * math.sign(u) * math.power(abs(u), q))
                gxr[j] += t
                gyr[j] -= t


@njit(**SCALAR)
def read(array, i):
    """An element of an optional array, 1 where it is not given (empty)."""
    return array[i] if array.size else array.dtype.type(1)


@njit(**BLOCK)
def pairs(x, y, z, labels, weights, upstream, terms, n, distances, gx, gy, gz):
    """The sum of a tile's terms of cosine embedding; the gradients are added to `gx` and `gy`."""
    T = type(n.eps)
    zero, one = T(0), T(1)
    d = distances[0]
    measure(x, y, n, d)
    total = 0.0
    for i in range(labels.size):
        label, weight = labels[i], read(weights, i)
        term = d[VALUE, i] if label == one else one - d[VALUE, i] - n.margin
        counts = weight != zero and (label == one or (label == -one and not term < zero))
        term = weight * term if counts else zero
        d[FACTOR, i] = label * n.scale * read(upstream, i) * weight if counts else zero
        total += term
        if terms.size:
            terms[i] = term
    if n.grad:
        add_gradients(x, y, n, d, gx, gy)
    return total


@njit(**BLOCK)
def triplets(x, y, z, labels, weights, upstream, terms, n, distances, gx, gy, gz):
    """The sum of a tile's terms of triplets; the gradients are added to `gx`, `gy` and `gz`."""
    T = type(n.eps)
    zero, half, one = T(0), T(0.5), T(1)
    near, far, swapped = distances[0], distances[1], distances[2]
    measure(x, y, n, near)
    measure(x, z, n, far)
    if n.swap:
        measure(y, z, n, swapped)
    total = 0.0
    for i in range(near.shape[1]):
        weight = read(weights, i)
        least, share = far[VALUE, i], one
        if n.swap:
            other = swapped[VALUE, i]
            share = one if least < other else half if least == other else zero
            least = math.minimum(least, other)
        term = n.margin + near[VALUE, i] - least
        counts = weight != zero and not term < zero
        term = weight * term if counts else zero
        factor = n.scale * read(upstream, i) * weight if counts else zero
        near[FACTOR, i] = factor
        far[FACTOR, i] = -factor * share
        swapped[FACTOR, i] = -factor * (one - share)
        total += term
        if terms.size:
            terms[i] = term
    if n.grad:
        add_gradients(x, y, n, near, gx, gy)
        add_gradients(x, z, n, far, gx, gz)
        if n.swap:
            add_gradients(y, z, n, swapped, gy, gz)
    return total


# Bound by `compile_vectors` and `compile_plain`.
block: Any = triplets
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


def share_of_tiles(
    tiles_from, tiles_to, addresses, codes, shape, strides, direct, rows, labels, weights, upstream, terms,
    height, n, totals,
):  # fmt: skip
    """One worker's tiles: their sums, and the outputs."""
    room = height * n.size
    copied = False
    for k in range(VECTORS):
        copied |= codes[k] >= 0 and not direct[k]
    scratch = np.empty((VECTORS, room if copied else 1), terms.dtype)
    gradients = np.empty((VECTORS, room if n.grad else 1), terms.dtype)
    distances = np.empty((VECTORS, FACTOR + 1, height), terms.dtype)
    for tile in range(tiles_from, tiles_to):
        first = tile * height
        last = min(first + height, rows)
        start, span = first * n.size, (last - first) * n.size
        x = tile_of(direct[0], addresses[0], codes[0], shape, strides[0], start, span, scratch[0])
        y = tile_of(direct[1], addresses[1], codes[1], shape, strides[1], start, span, scratch[1])
        z = y
        if codes[2] >= 0:
            z = tile_of(direct[2], addresses[2], codes[2], shape, strides[2], start, span, scratch[2])
        if n.grad:
            gradients[:, :span] = 0
        totals[tile] = block(
            x, y, z, labels[first:last], weights[first:last], upstream[first:last], terms[first:last], n,
            distances[:, :, : last - first], gradients[0], gradients[1], gradients[2],
        )  # fmt: skip
        for k in range(VECTORS):
            j = VECTORS + k
            if codes[j] >= 0:
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
    single = terms.itemsize == 4
    if p > (2.0**30 if single else 2.0**59):
        kind = LARGEST  # to the last bit, and no power underflows
    wide, most = (T(2.0**60), T(MOST_SINGLE)) if single else (T(2.0**900), T(MOST_DOUBLE))
    n = Numbers(size, kind, T(p), T(eps), T(margin), swap, T(scale / divisor), grad, wide, most)
    height = max(1, min(rows, TILE // size))
    tiles = (rows + height - 1) // height
    totals = np.empty(tiles, np.float64)
    workers = min(tiles, workers)
    for worker in prange(workers):
        share_of_tiles(
            worker * tiles // workers, (worker + 1) * tiles // workers, addresses, codes, shape, strides,
            direct, rows, labels, weights, upstream, terms, height, n, totals,
        )  # fmt: skip
    total = 0.0
    for tile in range(tiles):
        total += totals[tile]
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
    function = triplets if three else pairs
    name = f"{function.__name__}_{dtype.name}"
    shares = bind(
        share_of_tiles,
        {"block": function},
        name,
        name,
        njit(nogil=True, cache=True, error_model="numpy"),
    )
    name += "_parallel" if parallel else "_serial"
    decorate = njit(nogil=True, parallel=parallel, cache=True, error_model="numpy")
    return bind(vectors, {"share_of_tiles": shares}, name, name, decorate)


@cache
def compile_plain(three: bool, dtype: np.dtype, parallel: bool) -> Any:
    name = f"{three}_{dtype.name}_{'parallel' if parallel else 'serial'}"
    return bind(
        plain, {"whole": compile_vectors(three, dtype, parallel)}, name, name, njit(nogil=True, cache=True)
    )


# ---- launching ----------------------------------------------------------------------------------------

PARALLEL_FROM = 16384  # coordinates from which two threads beat one


def _settings(p: Vectors) -> tuple[Any, ...]:
    """Return the distance, the options, the gradient's factor and the divisor, as the kernels take them."""
    return *p.metric, p.margin, p.swap, p.weighting.factor, divisor_or_nan(p.weighting.divisor)


def run(p: Vectors, outputs: dict[str, np.ndarray]) -> Any:
    """Write the gradients by the vectors' names; return the value."""
    w, shape, numbers = p.weighting, p.vectors[0].shape, p.arithmetic
    rows, count = shape[:-1], len(p.vectors)
    arrays: list[np.ndarray | None] = [None] * (2 * VECTORS)
    arrays[:count] = p.vectors
    arrays[VECTORS : VECTORS + count] = [outputs.get(n) for n in p.names]
    reduced = w.reduction != "none"
    terms = np.empty(0 if reduced else prod(rows), numbers)
    arguments = (
        *locations(arrays),
        np.array([is_direct(a, numbers) for a in arrays], np.int64),
        (prod(rows), shape[-1]),
        flat(p.labels, rows, numbers),
        flat(w.sample_weight, rows, numbers),
        flat(w.upstream, rows, numbers),
        terms,
        _settings(p),
        workers(),
    )
    three, size = count == 3, p.vectors[0].size
    value = run_parallel(
        lambda parallel: compile_vectors(three, numbers, parallel), size, PARALLEL_FROM, arguments
    )
    if reduced:
        return p.dtype.type(value)
    return terms.reshape(rows).astype(p.dtype, copy=False)


def quick(prepared: Quick, operands: tuple[Any, ...], out: Any) -> Any:
    """Serve contiguous vectors of one dtype, no weights, a reduced value."""
    p, x = prepared.problem, operands[0]
    dtype, shape, size, count = x.dtype, x.shape, x.size, len(p.names)
    if (dtype is not SINGLE and dtype is not DOUBLE) or len(shape) != 2 or not size:
        return MISSING
    given = operands[:count]
    for a in given:
        if a.__class__ is not np.ndarray or a.dtype is not dtype or a.shape != shape or not a.flags.carray:
            return MISSING
    none = np.empty(0, dtype)
    labels = none
    if len(operands) > count:
        labels = operands[count]
        if labels.__class__ is not np.ndarray or labels.shape != shape[:1]:
            return MISSING
        if labels.dtype is not dtype or not labels.flags.carray:
            if labels.dtype.kind not in "iuf":
                return MISSING
            labels = labels.astype(dtype)
    gradients: Any = (
        [new(shape, dtype, size) for _ in prepared.wrt] if out is None else (out,) if prepared.single else out
    )
    if prepared.wrt and out is not None and not _may_write(gradients, prepared.wrt, operands):
        return MISSING
    outs = [none] * VECTORS
    for k, g in zip(prepared.wrt, gradients, strict=True):
        outs[k] = g.reshape(-1)
    ins = [a.reshape(-1) for a in given] + [none] * (VECTORS - count)
    arguments = (*ins, *outs, labels, shape, _settings(p), workers())
    three = count == 3
    value = run_parallel(
        lambda parallel: compile_plain(three, dtype, parallel), size, PARALLEL_FROM, arguments
    )
    return prepared.result(dtype.type(value), gradients)


def _may_write(outputs: Any, wrt: tuple[int, ...], operands: tuple[np.ndarray, ...]) -> bool:
    """Return whether each output is plainly its vector, or memory of its own."""
    if outputs.__class__ is not tuple or len(outputs) != len(wrt):
        return False
    x = operands[0]
    for o in outputs:
        if o.__class__ is not np.ndarray or o.dtype is not x.dtype or o.shape != x.shape:
            return False
        if not o.flags.carray:
            return False
    # Two arrays that own their memory do not share it.
    apart = all(a.flags.owndata for a in (*operands, *outputs))
    for i, (k, o) in enumerate(zip(wrt, outputs, strict=True)):
        for j, a in enumerate((*operands, *outputs[:i])):
            if a is o:
                if j != k:
                    return False
            elif not apart and np.may_share_memory(a, o):
                return False
    return True
