"""Softmax losses: each row of class scores has its maximum, its sum of exponentials, and one term.

Scores lie as (batch, classes, inner), in C order once the axes are sorted by their strides. Three layouts:

- rows (inner is 1): one row at a time, vectorised along the classes. The exponentials are stored where the
  gradient goes and scaled there, so a row is read once from memory.
- columns (the class axis is strided): vectorised along the inner positions, no transposing copy.
- short rows (inner is 1, few classes): some hundred rows are transposed in cache and done as columns.

A `block` does one tile of rows, which stays in cache; `softmax` cuts the work into tiles, hands contiguous
arrays of the arithmetic dtype to the block as they lie, and gathers and scatters all others a tile at a time.
Tiles depend on the shape alone and their sums are added in order: the same bits for any number of threads.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import carray, njit, prange
from numba.extending import intrinsic

from ..bind import bind
from ..math import bits, exp, log, log1p, select, unbits
from .drive import _transfer, at_address
from .target import LOOP, SCALAR

# The arrays of one call, in the order of `places`, `codes` and `strides`.
INPUT, TARGET, GRAD, TARGET_GRAD, CURVATURE = range(5)
ARRAYS = 5

TILE = 16384  # elements of a tile: what a block visits several times stays in L2
NARROW = 64  # rows of a tile of columns, at least: enough for whole vectors
SHORT = 64  # classes up to which rows are transposed
RUN = 4096  # elements that are summed in the arithmetic dtype, before the sum goes on in float64
GROUP = 64  # the same for a strided class axis, where the sum goes on in the arithmetic dtype
VECTORS = 9  # rows of scratch memory, an element a position, that a block of columns takes


class Numbers(NamedTuple):
    """What all rows share, in the arithmetic dtype."""

    classes: int
    ignore: int
    keep: float  # 1 - label_smoothing
    spread: float  # label_smoothing / classes
    scale: float  # of the gradient
    weight_sum: float  # over all classes


class Wanted(NamedTuple):
    """Which outputs there are, and whether the scores lie where the gradient goes."""

    in_place: bool
    grad: bool
    target_grad: bool
    curvature: bool


@intrinsic
def ordered(context, i):
    """Bits of a float as an integer of the same order, and back: negative floats' bits run backwards."""

    def emit(context, builder, signature, args):
        kind = args[0].type
        sign = builder.ashr(args[0], kind(kind.width - 1))
        return builder.xor(args[0], builder.lshr(sign, kind(1)))

    return i(i), emit


@njit(**SCALAR)
def largest(x):
    """The maximum. As integers, because a maximum of floats does not vectorise; a NaN may be it."""
    m = ordered(bits(x[0]))
    for i in range(x.size):
        m = max(m, ordered(bits(x[i])))
    return unbits(ordered(m))


@njit(**(LOOP | {"forceinline": True}))
def _exponentials(x, g, m, skip):
    T = type(m)
    total = T(0)
    for i in range(x.size):
        e = exp(x[i] - m)
        g[i] = e
        total += select(np.int32(i) == skip, T(0), e)
    return total


@njit(**SCALAR)
def exponentials(x, g, m, skip):
    """Store ``exp(x - m)``; the sum of all but element `skip`."""
    total = 0.0
    for start in range(0, x.size, RUN):
        stop = min(start + RUN, x.size)
        total += _exponentials(x[start:stop], g[start:stop], m, np.int32(skip - start))
    return total


@njit(**(LOOP | {"forceinline": True}))
def _distances(x, weight, m):
    T = type(m)
    total = T(0)
    for i in range(x.size):
        total += select(weight[i] == T(0), T(0), weight[i] * (m - x[i]))
    return total


@njit(**SCALAR)
def distances(x, weight, m):
    """The weighted sum of ``m - x``: what label smoothing adds, but for the logarithm."""
    total = 0.0
    for start in range(0, x.size, RUN):
        stop = min(start + RUN, x.size)
        total += _distances(x[start:stop], weight[start:stop], m)
    return total


@njit(**SCALAR)
def curvatures(g, h, total, factor):
    """Second derivatives from exponentials; never negative, as rounding keeps `total` >= each of them."""
    for i in range(g.size):
        h[i] = factor * g[i] * (total - g[i])


@njit(**SCALAR)
def scale_row(g, weight, r, k):
    """Exponentials to gradients: times `r`, less what label smoothing asks of each class."""
    if k == type(k)(0):
        for i in range(g.size):
            g[i] = r * g[i]
    else:
        for i in range(g.size):
            g[i] = r * g[i] - k * weight[i]


@njit(**SCALAR)
def read(array, i, one):
    """An element of an optional array, 1 where it is not given (empty)."""
    return array[i] if array.size else one


@njit(**LOOP)
def rows_of_labels(x, g, h, wanted, labels, weight, sample_weight, upstream, terms, n):
    T = type(n.scale)
    zero, one = T(0), T(1)
    for row in range(labels.size):
        low, high = row * n.classes, (row + 1) * n.classes
        gr, hr = g[low:high], h[low:high] if wanted.curvature else h[:0]
        label = labels[row]
        terms[row] = zero
        own_share = rest_share = own_weight = zero
        if label != n.ignore:
            own_weight = read(weight, label, one)
            share = read(sample_weight, row, one)
            own_share, rest_share = n.keep * own_weight * share, n.spread * share
        whole = own_share + rest_share * n.weight_sum
        if own_share == zero and whole == zero:  # the row is not even read
            if wanted.grad:
                gr[:] = zero
            hr[:] = zero
            continue
        xr = gr if wanted.in_place else x[low:high]
        m = largest(xr)
        hit = xr[label]
        far = zero if rest_share == zero else T(distances(xr, weight, m))
        if wanted.in_place:
            others = T(exponentials(gr, gr, m, label))
        else:
            others = T(exponentials(xr, gr, m, label))
        own = exp(hit - m)
        total = own + others
        log_total = log1p(others if hit == m else (others - one) + own)
        terms[row] = whole * log_total + rest_share * far
        if own_share != zero:
            terms[row] += own_share * (m - hit)
        if not wanted.grad:
            continue
        up = n.scale * read(upstream, row, one)
        inverse = one / total
        r = up * whole * inverse
        if wanted.curvature:
            curvatures(gr, hr, total, r * inverse)
            hr[label] = r * own * (others * inverse)
        scale_row(gr, weight, r, up * rest_share)
        # Of its own class's gradient p W - t, all that cancels is left out.
        t = own_share + rest_share * own_weight
        gr[label] = up * (rest_share * (n.weight_sum - own_weight) * own - t * others) * inverse


@njit(**LOOP)
def rows_of_probabilities(x, q, g, gq, h, wanted, weight, sample_weight, upstream, terms, n):
    T = type(n.scale)
    zero, one = T(0), T(1)
    for row in range(terms.size):
        low, high = row * n.classes, (row + 1) * n.classes
        gr, qr = g[low:high], q[low:high]
        gqr = gq[low:high] if wanted.target_grad else gq[:0]
        hr = h[low:high] if wanted.curvature else h[:0]
        share = read(sample_weight, row, one)
        terms[row] = zero
        if share == zero:
            if wanted.grad:
                gr[:] = zero
            gqr[:] = zero
            hr[:] = zero
            continue
        if not wanted.in_place:
            gr[:] = x[low:high]
        m = largest(gr)
        total, whole, far = mixture(gr, qr, weight, m, n.keep, n.spread, not wanted.target_grad)
        log_total = log(T(total))
        terms[row] = share * (T(far) + (T(whole) * log_total if whole != 0 else zero))
        up = n.scale * share * read(upstream, row, one)
        inverse = one / T(total)
        if wanted.target_grad:
            for i in range(gqr.size):
                d = gr[i]
                gr[i] = exp(-d)
                t = up * weight[i] * (n.keep * qr[i] + n.spread)
                gqr[i] = select(weight[i] == zero, zero, up * n.keep * weight[i] * (d + log_total))
                gr[i] = up * T(whole) * inverse * gr[i] - t
        elif wanted.grad:
            r = up * T(whole) * inverse
            if wanted.curvature:
                curvatures(gr, hr, T(total), r * inverse)
            for i in range(gr.size):
                gr[i] = r * gr[i] - up * weight[i] * (n.keep * qr[i] + n.spread)


@njit(**(LOOP | {"forceinline": True}))
def _mixture(g, q, weight, m, keep, spread, final):
    T = type(m)
    total = whole = far = T(0)
    for i in range(g.size):
        d = m - g[i]
        e = exp(-d)
        g[i] = e if final else d
        t = weight[i] * (keep * q[i] + spread)
        total += e
        whole += t
        far += select(t == T(0), T(0), t * d)
    return total, whole, far


@njit(**SCALAR)
def mixture(g, q, weight, m, keep, spread, final):
    """Sums of exponentials, of the target's weights, and of the scores' distances from the maximum by them.

    In place of the scores it leaves the exponentials, or the distances where it is not `final`.
    """
    total = whole = far = 0.0
    for start in range(0, g.size, RUN):
        stop = min(start + RUN, g.size)
        gr, qr, wr = g[start:stop], q[start:stop], weight[start:stop]
        if final:
            a, b, c = _mixture(gr, qr, wr, m, keep, spread, True)
        else:
            a, b, c = _mixture(gr, qr, wr, m, keep, spread, False)
        total += a
        whole += b
        far += c
    return total, whole, far


@njit(**SCALAR)
def class_of(array, pitch, c, count):
    """The tile's positions of one class."""
    return array[c * pitch : c * pitch + count]


@njit(**LOOP)
def column_maxima(x, pitch, classes, m):
    m[:] = x[: m.size]
    for c in range(1, classes):
        xc = class_of(x, pitch, c, m.size)
        for i in range(m.size):
            m[i] = select(xc[i] > m[i], xc[i], m[i])


@njit(**(LOOP | {"forceinline": True}))
def column_exponentials(x, g, m, part, own, c):
    T = type(m[0])
    for i in range(x.size):
        e = exp(x[i] - m[i])
        g[i] = e
        part[i] += select(own[i] == c, T(0), e)


@njit(**LOOP)
def columns_of_labels(
    x, xp, g, gp, h, hp, wanted, labels, weight, sample_weight, upstream, terms, vectors, own, n
):
    T = type(n.scale)
    zero, one = T(0), T(1)
    count = terms.size
    m, s, hit = vectors[0, :count], vectors[1, :count], vectors[2, :count]
    share, rest, part = vectors[3, :count], vectors[4, :count], vectors[5, :count]
    r, k, total = vectors[6, :count], vectors[7, :count], vectors[8, :count]
    own = own[:count]
    for i in range(count):
        live = labels[i] != n.ignore
        label = labels[i] if live else 0
        f = read(sample_weight, i, one) if live else zero
        own_weight = read(weight, label, one)
        share[i] = n.keep * own_weight * f
        rest[i] = n.spread * f
        k[i] = own_weight
        if share[i] == zero and rest[i] * n.weight_sum == zero:
            live = False
        own[i] = label if live else -1
        hit[i] = x[label * xp + i]
    column_maxima(x, xp, n.classes, m)
    total[:] = zero
    if n.spread != zero:
        for c in range(n.classes):
            w = weight[c]
            xc = class_of(x, xp, c, count)
            if w != zero:
                for i in range(count):
                    total[i] += w * (m[i] - xc[i])
    s[:] = zero
    for start in range(0, n.classes, GROUP):
        part[:] = zero
        for c in range(start, min(start + GROUP, n.classes)):
            gc = class_of(g, gp, c, count)
            if wanted.in_place:
                column_exponentials(gc, gc, m, part, own, np.int32(c))
            else:
                column_exponentials(class_of(x, xp, c, count), gc, m, part, own, np.int32(c))
        for i in range(count):
            s[i] += part[i]
    # From here on: `hit` is the own class's exponential, `part` its gradient, `total` the sum of all.
    for i in range(count):
        live = own[i] >= 0
        e = exp(hit[i] - m[i])
        whole = share[i] + rest[i] * n.weight_sum
        log_total = log1p(select(hit[i] == m[i], s[i], (s[i] - one) + e))
        v = whole * log_total + rest[i] * total[i]
        v += select(share[i] == zero, zero, share[i] * (m[i] - hit[i]))
        terms[i] = select(live, v, zero)
        up = n.scale * (upstream[i] if upstream.size else one)
        total[i] = s[i] + e
        inverse = one / total[i]
        t = share[i] + rest[i] * k[i]
        part[i] = up * (rest[i] * (n.weight_sum - k[i]) * e - t * s[i]) * inverse
        hit[i] = e
        r[i] = select(live, up * whole * inverse, zero)
        k[i] = select(live, up * rest[i], zero)
    if not wanted.grad:
        return
    for c in range(n.classes):
        gc = class_of(g, gp, c, count)
        if wanted.curvature:
            hc = class_of(h, hp, c, count)
            for i in range(count):
                e = gc[i]
                hc[i] = select(r[i] == zero, zero, r[i] * e * ((total[i] - e) / total[i]))
        if n.spread == zero:
            for i in range(count):
                gc[i] = select(r[i] == zero, zero, r[i] * gc[i])
        else:
            w = weight[c]
            for i in range(count):
                gc[i] = select(r[i] == zero, zero, r[i] * gc[i]) - k[i] * w
    for i in range(count):
        if own[i] >= 0:
            g[own[i] * gp + i] = part[i]
            if wanted.curvature:
                h[own[i] * hp + i] = r[i] * hit[i] * (s[i] / total[i])


@njit(**LOOP)
def columns_of_probabilities(
    x, xp, q, qp, g, gp, gq, gqp, h, hp, wanted, weight, sample_weight, upstream, terms, vectors, n
):
    T = type(n.scale)
    zero, one = T(0), T(1)
    count = terms.size
    m, total, whole = vectors[0, :count], vectors[1, :count], vectors[2, :count]
    far, part, up, r = vectors[3, :count], vectors[4, :count], vectors[5, :count], vectors[6, :count]
    column_maxima(x, xp, n.classes, m)
    total[:] = zero
    whole[:] = zero
    far[:] = zero
    for start in range(0, n.classes, GROUP):
        part[:] = zero
        for c in range(start, min(start + GROUP, n.classes)):
            w = weight[c]
            gc, qc = class_of(g, gp, c, count), class_of(q, qp, c, count)
            if not wanted.in_place:
                gc[:] = class_of(x, xp, c, count)
            for i in range(count):
                d = m[i] - gc[i]
                e = exp(-d)
                gc[i] = d if wanted.target_grad else e
                t = w * (n.keep * qc[i] + n.spread)
                part[i] += e
                whole[i] += t
                far[i] += select(t == zero, zero, t * d)
        for i in range(count):
            total[i] += part[i]
    # From here on `part` is the logarithm of the sum.
    for i in range(count):
        share = sample_weight[i] if sample_weight.size else one
        part[i] = log(total[i])
        v = far[i] + select(whole[i] == zero, zero, whole[i] * part[i])
        terms[i] = select(share == zero, zero, share * v)
        up[i] = n.scale * share * (upstream[i] if upstream.size else one)
        r[i] = up[i] * whole[i] / total[i]
        # A row that counts nothing stays zero, whatever it holds.
        if share == zero:
            r[i] = up[i] = zero
    if not wanted.grad and not wanted.target_grad:
        return
    for c in range(n.classes):
        w = weight[c]
        gc, qc = class_of(g, gp, c, count), class_of(q, qp, c, count)
        if wanted.target_grad:
            gqc = class_of(gq, gqp, c, count)
            for i in range(count):
                d = gc[i]
                t = up[i] * w
                gc[i] = select(up[i] == zero, zero, r[i] * exp(-d) - t * (n.keep * qc[i] + n.spread))
                gqc[i] = select(t == zero, zero, n.keep * t * (d + part[i]))
        else:
            if wanted.curvature:
                hc = class_of(h, hp, c, count)
                for i in range(count):
                    e = gc[i]
                    hc[i] = select(r[i] == zero, zero, r[i] * e * ((total[i] - e) / total[i]))
            for i in range(count):
                t = up[i] * w * (n.keep * qc[i] + n.spread)
                gc[i] = select(up[i] == zero, zero, r[i] * gc[i] - t)


@njit(nogil=True)
def survey(labels, ignore, classes, weight, sample_weight):
    """What the rows with class indices count for, and the first row whose index is none, or -1."""
    wrong = rows = 0
    for i in range(labels.size):
        label = labels[i]
        counted = label != ignore
        rows += counted
        wrong += counted & (np.uint64(label) >= np.uint64(classes))
    if wrong:
        for i in range(labels.size):
            if labels[i] != ignore and (labels[i] < 0 or labels[i] >= classes):
                return 0.0, i
    if weight.size == 0 and sample_weight.size == 0:
        return float(rows), -1
    count = 0.0
    for i in range(labels.size):
        if labels[i] != ignore:
            w = float(weight[labels[i]]) if weight.size else 1.0
            count += w * float(sample_weight[i]) if sample_weight.size else w
    return count, -1


@njit(nogil=True)
def transpose(a, rows, columns, pitch, b):
    """A matrix of short rows to columns that are `pitch` apart."""
    for c in range(columns):
        bc = b[c * pitch : c * pitch + rows]
        for r in range(rows):
            bc[r] = a[r * columns + c]


@njit(nogil=True)
def transpose_back(b, rows, columns, pitch, a):
    for r in range(rows):
        for c in range(columns):
            a[r * columns + c] = b[c * pitch + r]


@njit(nogil=True)
def view(address, count, like):
    return carray(at_address(address, like), (count,))


@njit(nogil=True)
def transfer_columns(code, address, shape, strides, start, step, pitch, count, classes, tile, outward):
    """Move a tile of columns between memory of any layout and scratch."""
    for c in range(classes):
        row = tile[c * pitch : c * pitch + count]
        _transfer(code, address, shape, strides, start + c * step, row, outward)


def softmax(
    places, codes, direct, shape, strides, extents, labels, weight, weights, upstream, terms, settings, workers
):
    """The losses of all rows, and what else is asked for.

    Parameters
    ----------
    places, codes, direct : arrays of int64
        Per array (`INPUT` to `CURVATURE`): its address, element code (-1: absent) and whether it is
        contiguous and of the arithmetic dtype.
    shape, strides : arrays of int64
        The common shape, and each array's strides in bytes.
    extents : (int, int, int)
        Batch, classes and inner positions: the shape, with axes merged.
    labels : array of int64
        Class indices, a row each; empty where `TARGET` holds probabilities.
    weight, weights, upstream : arrays
        Of classes, of rows, and of rows' gradients; each may be empty, for ones. Probabilities and smoothing
        need `weight`.
    terms : array
        Receives the rows' losses; may be empty.
    settings : (int, float, float, float)
        Ignored index, label smoothing, the gradient's scale, and what that and the value are divided by:
        NaN for what the rows count for.
    workers : int
        Into how many shares the tiles are cut.

    Returns
    -------
    value, wrong : float, int
        The divided sum, and the first row with a bad class index or -1; then nothing was written.
    """
    batch, classes, inner = extents
    ignore, smoothing, scale, divisor = settings
    T = terms.dtype.type
    probable = labels.size == 0
    rows_total = batch * inner
    if not probable:
        count, wrong = survey(labels, ignore, classes, weight, weights)
        if wrong >= 0:
            return 0.0, wrong
        if divisor != divisor:
            divisor = count
    elif divisor != divisor:
        divisor = float(rows_total)
        if weights.size:
            divisor = 0.0
            for i in range(rows_total):
                divisor += float(weights[i])
    weight_sum = 0.0
    for c in range(weight.size):
        weight_sum += float(weight[c])
    if weight.size == 0:
        weight_sum = float(classes)
    numbers = Numbers(
        classes, ignore, T(1 - smoothing), T(smoothing / classes), T(scale / divisor), T(weight_sum)
    )

    short = inner == 1 and classes <= SHORT
    if short:
        height = min(batch, max(NARROW, TILE // classes))
    elif inner == 1:
        height = max(1, TILE // classes)
    else:
        height = min(inner, max(NARROW, TILE // classes))
    across = 1 if inner == 1 else (inner + height - 1) // height
    tiles = (batch + height - 1) // height if inner == 1 else batch * across
    sums = np.empty(tiles, np.float64)
    workers = min(tiles, workers)
    columns = short or inner > 1
    like = T(0)
    size = classes * height
    for worker in prange(workers):
        need = np.zeros(ARRAYS, np.int64)
        for j in range(ARRAYS):
            if codes[j] >= 0 and (short or direct[j] == 0):
                need[j] = size
        need[INPUT] = 0
        if codes[GRAD] < 0:
            need[GRAD] = size
        x_scratch = np.empty(need[GRAD], terms.dtype)
        q_scratch = np.empty(need[TARGET], terms.dtype)
        gq_scratch = np.empty(need[TARGET_GRAD], terms.dtype)
        h_scratch = np.empty(need[CURVATURE], terms.dtype)
        flat = np.empty(size if short else 0, terms.dtype)
        vectors = np.empty((VECTORS, height if columns else 0), terms.dtype)
        own = np.empty(height if columns else 0, np.int32)
        some = np.empty(height, terms.dtype)
        for tile in range(worker * tiles // workers, (worker + 1) * tiles // workers):
            if inner == 1:
                first = tile * height
                n = min(height, batch - first)
                start, step = first * classes, 1
                extent = n * classes
            else:
                s0 = tile % across * height
                n = min(height, inner - s0)
                first = tile // across * inner + s0
                start, step = tile // across * classes * inner + s0, inner
                extent = (classes - 1) * inner + n
            width = inner if inner > 1 else height
            x = g = x_scratch
