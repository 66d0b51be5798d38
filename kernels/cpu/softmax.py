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
from math import nan, prod
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import carray, njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic, overload

from .. import class_weights, math
from ..bind import bind
from ..layout import Axes, class_rows
from ..math import bits, log, log1p, select, unbits
from ..spec import INT64, Quick, Scores, bad_index
from . import arithmetic
from .drive import _transfer, at_address
from .packing import (
    divisor_or_nan,
    flat,
    is_direct,
    locations,
    optional_over_rows,
    over_rows,
    quick_rows,
    run_parallel,
    workers,
)
from .target import BLOCK, LOOP, SCALAR, prefer_widest_vectors

# The arrays of one call, in the order of `places`, `codes` and `strides`.
INPUT, TARGET, GRAD, TARGET_GRAD, CURVATURE = range(5)
ARRAYS = 5

TILE = 32768  # bytes of a tile: it stays in cache, and malloc keeps what scratch it takes
NARROW = 64  # rows of a tile of columns, at least: enough for whole vectors
SHORT = 64  # classes up to which rows are transposed
PAD = 64  # elements that an unrolled loop over vectors does at a time, at most
LONG = 8192  # classes from which the processor does not fetch the next row by itself while it computes
LINE = 64  # bytes that are fetched at once
# Eighths of the next row that are fetched while this one is read for its maximum, while its exponentials are
# taken, and while they are scaled: about as long as each takes. Together more than memory gives would stall.
OF_LARGEST, OF_EXPONENTIALS, OF_SCALING = (0, 1), (1, 4), (5, 3)
RUN = 1024  # elements that are summed in the arithmetic dtype, before the sum goes on in float64
GROUP = 64  # the same for a strided class axis, where the sum goes on in the arithmetic dtype
ROWS, COLUMNS, TRANSPOSED = range(3)
VECTORS = 10  # rows of scratch memory, an element a position, that a block of columns takes


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


class Layout(NamedTuple):
    """How scores lie, and how they are cut into tiles."""

    kind: int  # ROWS, COLUMNS or TRANSPOSED
    classes: int
    inner: int  # positions from one class to the next
    height: int  # rows of a tile
    pitch: int  # the same for tiles in scratch
    across: int  # tiles along the inner positions
    itemsize: int  # bytes of an element in the arithmetic dtype


class Tile(NamedTuple):
    """A tile's place."""

    first: int  # its first row
    start: int  # its first element
    rows: int
    span: int  # elements of memory that it lies in


class Place(NamedTuple):
    """One of the arrays."""

    address: int
    code: int  # of its elements
    direct: bool  # contiguous and of the arithmetic dtype
    present: bool


@intrinsic
def ordered(context, i):
    """Bits of a float as an integer of the same order, and back: negative floats' bits run backwards."""

    def emit(context, builder, signature, args):
        kind = args[0].type
        sign = builder.ashr(args[0], kind(kind.width - 1))
        return builder.xor(args[0], builder.lshr(sign, kind(1)))

    return i(i), emit


@intrinsic
def prefetch(context, array, i):
    """Have the memory of element `i`, which may lie beyond the array, brought to cache."""

    def emit(context, builder, signature, args):
        start = context.make_array(signature.args[0])(context, builder, args[0]).data
        place = builder.bitcast(builder.gep(start, [args[1]]), ir.IntType(8).as_pointer())
        number = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(array, types.intp), emit


def exp(x):
    """e**x of numbers that are not positive; 0 where that is subnormal.

    A third quicker than `math.exp`, and subnormal numbers, which cost a hundred times a normal one, never
    enter the sums and products.
    """
    return np.exp(x)


def _exp_in(form):
    F, Z = form.float, form.int
    LOW = F((1 - form.bias) * np.log(2))
    ZERO, ONE, LOG2_E = F(0), F(1), F(1 / np.log(2))
    LOG2_HIGH, LOG2_LOW = F(form.log2[0]), F(form.log2[1])
    POLYNOMIAL = tuple(F(c) for c in form.exp)
    MANTISSA = Z(form.mantissa)
    # Its sum with v has round(v) + bias, an exponent field, in the low bits.
    SHIFT = F(1.5 * 2.0**form.mantissa + form.bias)

    @njit(**math.STRICT)
    def at(x):
        t = x * LOG2_E + SHIFT
        n = t - SHIFT
        r = x - n * LOG2_HIGH - n * LOG2_LOW
        y = (math.polynomial(r, POLYNOMIAL) * r + ONE) * r + ONE
        return select(x < LOW, ZERO, y * unbits(Z(bits(t) << MANTISSA)))

    return at


_EXP = {types.float32: _exp_in(math.SINGLE), types.float64: _exp_in(math.DOUBLE)}


@overload(exp, jit_options=math.STRICT)
def _overload_exp(x):
    at = _EXP[x]
    return lambda x: at(x)


@njit(**SCALAR)
def fetch_next(x, start, stop, eighths):
    """Have what goes with some elements of a long row brought to cache, of the next row."""
    if x.size >= LONG:
        first, count = eighths
        skipped = x.size + x.size // 8 * first
        for i in range(start // 8 * count, stop // 8 * count, LINE // x.itemsize):
            prefetch(x, skipped + i)


@njit(**SCALAR)
def _largest(x):
    prefer_widest_vectors()
    m = ordered(bits(x[0]))
    for i in range(x.size):
        m = max(m, ordered(bits(x[i])))
    return m


@njit(**SCALAR)
def largest(x):
    """The maximum. As integers, because a maximum of floats does not vectorise; a NaN may be it."""
    m = ordered(bits(x[0]))
    for start in range(0, x.size, 4 * RUN):
        stop = min(start + 4 * RUN, x.size)
        m = max(m, _largest(x[start:stop]))
        fetch_next(x, start, stop, OF_LARGEST)
    return unbits(ordered(m))


@njit(**SCALAR)
def copy(a, b):
    """A slice assignment would not become a memory copy."""
    prefer_widest_vectors()
    for i in range(a.size):
        b[i] = a[i]


@njit(**(LOOP | {"forceinline": True}))
def _exponentials(g, m, skip):
    prefer_widest_vectors()
    T = type(m)
    total = T(0)
    for i in range(g.size):
        e = exp(g[i] - m)
        g[i] = e
        total += select(np.int32(i) == skip, T(0), e)
    return total


@njit(**SCALAR)
def exponentials(x, g, in_place, m, skip, pad):
    """Store ``exp(x - m)`` in g; the sum of all but element `skip`.

    A run is copied first, in cache: LLVM vectorises a loop over one array, and not one over two that may be
    the same. The row's end is done in `pad`: scalar exponentials, up to that many, would cost as much as a
    thousand in vectors.
    """
    total = 0.0
    whole = g.size - g.size % pad.size
    for start in range(0, whole, RUN):
        run = g[start : min(start + RUN, whole)]
        if not in_place:
            copy(x[start : start + run.size], run)
        total += _exponentials(run, m, np.int32(skip - start))
        fetch_next(x, start, start + run.size, OF_EXPONENTIALS)
    pad[:] = -np.inf
    copy(x[whole:], pad[: g.size - whole])
    total += _exponentials(pad, m, np.int32(skip - whole))
    copy(pad[: g.size - whole], g[whole:])
    return total


@njit(**(LOOP | {"forceinline": True}))
def _distances(x, weight, m):
    prefer_widest_vectors()
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
    prefer_widest_vectors()
    for i in range(g.size):
        h[i] = factor * g[i] * (total - g[i])


@njit(**SCALAR)
def scale_row(x, g, weight, r, k):
    """Exponentials to gradients: times `r`, less what label smoothing asks of each class."""
    prefer_widest_vectors()
    for start in range(0, g.size, RUN):
        stop = min(start + RUN, g.size)
        run = g[start:stop]
        if k == type(k)(0):
            for i in range(run.size):
                run[i] = r * run[i]
        else:
            for i in range(run.size):
                run[i] = r * run[i] - k * weight[start + i]
        fetch_next(x, start, stop, OF_SCALING)


@njit(**SCALAR)
def read(array, i, one):
    """An element of an optional array, 1 where it is not given (empty)."""
    return array[i] if array.size else one


@njit(**SCALAR)
def spread(source, into):
    """Copy an optional array, or ones.

    A loop over vectors must not name an array that may be empty: whether LLVM's check finds it apart from the
    others is up to where it lies, and its scalar loop rounds differently.
    """
    if source.size:
        copy(source, into)
    else:
        into[:] = type(into[0])(1)


@njit(**BLOCK)
def rows_of_labels(x, g, h, wanted, labels, weight, sample_weight, upstream, terms, pad, n):
    prefer_widest_vectors()
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
        others = T(exponentials(xr, gr, wanted.in_place, m, label, pad))
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
        scale_row(xr, gr, weight, r, up * rest_share)
        # Of its own class's gradient p W - t, all that cancels is left out.
        t = own_share + rest_share * own_weight
        gr[label] = up * (rest_share * (n.weight_sum - own_weight) * own - t * others) * inverse


@njit(**BLOCK)
def rows_of_probabilities(x, q, g, gq, h, wanted, weight, sample_weight, upstream, terms, n):
    prefer_widest_vectors()
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
            copy(x[low:high], gr)
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
    prefer_widest_vectors()
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


@njit(**SCALAR)
def column_maxima(x, pitch, classes, m):
    prefer_widest_vectors()
    copy(x[: m.size], m)
    for c in range(1, classes):
        xc = class_of(x, pitch, c, m.size)
        for i in range(m.size):
            m[i] = select(xc[i] > m[i], xc[i], m[i])


@njit(**(LOOP | {"forceinline": True}))
def column_exponentials(g, m, part, own, c):
    prefer_widest_vectors()
    T = type(m[0])
    for i in range(g.size):
        e = exp(g[i] - m[i])
        g[i] = e
        part[i] += select(own[i] == c, T(0), e)


@njit(**BLOCK)
def columns_of_labels(
    x, xp, g, gp, h, hp, wanted, labels, weight, sample_weight, upstream, terms, vectors, own, n
):
    prefer_widest_vectors()
    T = type(n.scale)
    zero, one = T(0), T(1)
    count = terms.size
    m, s, hit = vectors[0, :count], vectors[1, :count], vectors[2, :count]
    share, rest, part = vectors[3, :count], vectors[4, :count], vectors[5, :count]
    r, k, total, up = vectors[6, :count], vectors[7, :count], vectors[8, :count], vectors[9, :count]
    own = own[:count]
    spread(sample_weight, share)
    spread(upstream, up)
    for i in range(count):
        live = labels[i] != n.ignore
        label = labels[i] if live else 0
        f = share[i] if live else zero
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
            if not wanted.in_place:
                copy(class_of(x, xp, c, count), gc)
            column_exponentials(gc, m, part, own, np.int32(c))
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
        factor = n.scale * up[i]
        total[i] = s[i] + e
        inverse = one / total[i]
        t = share[i] + rest[i] * k[i]
        part[i] = factor * (rest[i] * (n.weight_sum - k[i]) * e - t * s[i]) * inverse
        hit[i] = e
        r[i] = select(live, factor * whole * inverse, zero)
        k[i] = select(live, factor * rest[i], zero)
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


@njit(**BLOCK)
def columns_of_probabilities(
    x, xp, q, qp, g, gp, gq, gqp, h, hp, wanted, weight, sample_weight, upstream, terms, vectors, n
):
    prefer_widest_vectors()
    T = type(n.scale)
    zero = T(0)
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
                copy(class_of(x, xp, c, count), gc)
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
    spread(upstream, up)
    spread(sample_weight, r)
    # From here on `part` is the logarithm of the sum.
    for i in range(count):
        share = r[i]
        part[i] = log(total[i])
        v = far[i] + select(whole[i] == zero, zero, whole[i] * part[i])
        terms[i] = select(share == zero, zero, share * v)
        up[i] *= n.scale * share
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
def transpose(rows, classes, pitch, columns):
    """Rows of few classes, to columns that are `pitch` apart."""
    for c in range(classes):
        column = columns[c * pitch : c * pitch + rows.size // classes]
        for r in range(column.size):
            column[r] = rows[r * classes + c]


@njit(nogil=True)
def transpose_back(columns, pitch, classes, rows):
    for r in range(rows.size // classes):
        for c in range(classes):
            rows[r * classes + c] = columns[c * pitch + r]


@njit(nogil=True)
def view(address, count, like):
    """Contiguous memory as an array."""
    return carray(at_address(address, like), (count,))


@njit(nogil=True)
def put_there(tile, layout, a, scratch, like):
    """Where a block finds array `a`: in the memory it lies in, else in scratch; and the classes' distance."""
    if a.present and a.direct and layout.kind != TRANSPOSED:
        return view(a.address + tile.start * layout.itemsize, tile.span, like), layout.inner
    return scratch, layout.pitch


@njit(nogil=True)
def load(tile, layout, a, shape, strides, into, pitch, flat):
    """Copy array `a`'s tile to where a block wants it."""
    if layout.kind == COLUMNS:
        for c in range(layout.classes):
            column = class_of(into, pitch, c, tile.rows)
            _transfer(a.code, a.address, shape, strides, tile.start + c * layout.inner, column, False)
    elif layout.kind == ROWS:
        _transfer(a.code, a.address, shape, strides, tile.start, into[: tile.span], False)
    elif a.direct:
        rows = view(a.address + tile.start * layout.itemsize, tile.span, into[0])
        transpose(rows, layout.classes, pitch, into)
    else:
        _transfer(a.code, a.address, shape, strides, tile.start, flat[: tile.span], False)
        transpose(flat[: tile.span], layout.classes, pitch, into)


@njit(nogil=True)
def store(tile, layout, a, shape, strides, out, pitch, flat):
    """Copy a block's output to array `a`, if it does not lie there."""
    if a.code < 0 or (a.direct and layout.kind != TRANSPOSED):
        return
    if layout.kind == COLUMNS:
        for c in range(layout.classes):
            column = class_of(out, pitch, c, tile.rows)
            _transfer(a.code, a.address, shape, strides, tile.start + c * layout.inner, column, True)
    elif layout.kind == ROWS:
        _transfer(a.code, a.address, shape, strides, tile.start, out[: tile.span], True)
    elif a.direct:
        rows = view(a.address + tile.start * layout.itemsize, tile.span, out[0])
        transpose_back(out, pitch, layout.classes, rows)
    else:
        transpose_back(out, pitch, layout.classes, flat[: tile.span])
        _transfer(a.code, a.address, shape, strides, tile.start, flat[: tile.span], True)


@njit(nogil=True)
def plan(batch, classes, inner, itemsize):
    """How the rows are cut into tiles, and how many there are."""
    most = TILE // itemsize // classes
    if inner == 1 and classes > SHORT:
        height = max(1, min(batch, most))
        return Layout(ROWS, classes, 1, height, 1, 1, itemsize), (batch + height - 1) // height
    height = max(NARROW, min(most, batch if inner == 1 else inner) // 16 * 16)
    # Columns an odd number of cache lines apart do not fall on the same places in cache.
    pitch = (height // 16 | 1) * 16
    if inner == 1:
        return Layout(TRANSPOSED, classes, 1, height, pitch, 1, itemsize), (batch + height - 1) // height
    across = (inner + height - 1) // height
    return Layout(COLUMNS, classes, inner, height, pitch, across, itemsize), batch * across


@njit(nogil=True)
def tile_at(index, layout, batch):
    """The tile's place: its first row, its first element, how many rows, and how many elements it spans."""
    if layout.kind != COLUMNS:
        first = index * layout.height
        rows = min(layout.height, batch - first)
        return Tile(first, first * layout.classes, rows, rows * layout.classes)
    n, s = index // layout.across, index % layout.across * layout.height
    rows = min(layout.height, layout.inner - s)
    start = n * layout.classes * layout.inner + s
    return Tile(n * layout.inner + s, start, rows, (layout.classes - 1) * layout.inner + rows)


@njit(nogil=True)
def some(array, tile):
    """The tile's part of an array over rows, which may be empty."""
    return array[tile.first : tile.first + tile.rows] if array.size else array


@njit(nogil=True, error_model="numpy")
def share(
    tiles_from, tiles_to, places, codes, direct, shape, strides, extents, labels, weight, weights, upstream,
    terms, ignore, scalars, sums,
):  # fmt: skip
    """One worker's tiles: their sums, and the outputs."""
    batch, classes, inner = extents
    T = terms.dtype.type
    like = T(0)
    numbers = Numbers(classes, ignore, T(scalars[0]), T(scalars[1]), T(scalars[2]), T(scalars[3]))
    layout, _ = plan(batch, classes, inner, terms.itemsize)
    size = classes * max(layout.height, layout.pitch)
    arrays = [Place(places[j], codes[j], direct[j] != 0, codes[j] >= 0) for j in range(ARRAYS)]
    apart = [a.present and (layout.kind == TRANSPOSED or not a.direct) for a in arrays]
    apart[GRAD] = apart[GRAD] or not arrays[GRAD].present
    g_scratch = np.empty(size if apart[GRAD] else 0, terms.dtype)
    q_scratch = np.empty(size if apart[TARGET] else 0, terms.dtype)
    gq_scratch = np.empty(size if apart[TARGET_GRAD] else 0, terms.dtype)
    h_scratch = np.empty(size if apart[CURVATURE] else 0, terms.dtype)
    copied = False
    for a in arrays:
        copied |= a.present and not a.direct
    flat = np.empty(size if layout.kind == TRANSPOSED and copied else 0, terms.dtype)
    vectors = np.empty((VECTORS, layout.height if layout.kind != ROWS else 0), terms.dtype)
    own = np.empty(layout.height if layout.kind != ROWS else 0, np.int32)
    losses = np.empty(layout.height, terms.dtype)
    pad = np.empty(PAD, terms.dtype)
    wanted = Wanted(
        apart[INPUT] or places[INPUT] == places[GRAD],
        arrays[GRAD].present,
        arrays[TARGET_GRAD].present,
        arrays[CURVATURE].present,
    )
    for index in range(tiles_from, tiles_to):
        tile = tile_at(index, layout, batch)
        g, gp = put_there(tile, layout, arrays[GRAD], g_scratch, like)
        x, xp = g, gp
        if apart[INPUT]:
            load(tile, layout, arrays[INPUT], shape, strides[INPUT], g, gp, flat)
        else:
            x, xp = put_there(tile, layout, arrays[INPUT], g_scratch, like)
        h, hp = put_there(tile, layout, arrays[CURVATURE], h_scratch, like)
        loss = losses[: tile.rows]
        sample_weight, up = some(weights, tile), some(upstream, tile)
        if labels.size == 0:
            q, qp = put_there(tile, layout, arrays[TARGET], q_scratch, like)
            gq, gqp = put_there(tile, layout, arrays[TARGET_GRAD], gq_scratch, like)
            if apart[TARGET]:
                load(tile, layout, arrays[TARGET], shape, strides[TARGET], q, qp, flat)
            if layout.kind == ROWS:
                rows_of_probabilities(x, q, g, gq, h, wanted, weight, sample_weight, up, loss, numbers)
            else:
                columns_of_probabilities(
                    x, xp, q, qp, g, gp, gq, gqp, h, hp, wanted, weight, sample_weight, up, loss,
                    vectors, numbers,
                )  # fmt: skip
            store(tile, layout, arrays[TARGET_GRAD], shape, strides[TARGET_GRAD], gq, gqp, flat)
        else:
            y = some(labels, tile)
            if layout.kind == ROWS:
                rows_of_labels(x, g, h, wanted, y, weight, sample_weight, up, loss, pad, numbers)
            else:
                columns_of_labels(
                    x, xp, g, gp, h, hp, wanted, y, weight, sample_weight, up, loss, vectors, own,
                    numbers,
                )  # fmt: skip
        store(tile, layout, arrays[GRAD], shape, strides[GRAD], g, gp, flat)
        store(tile, layout, arrays[CURVATURE], shape, strides[CURVATURE], h, hp, flat)
        total = 0.0
        for i in range(tile.rows):
            total += loss[i]
        sums[index] = total
        if terms.size:
            terms[tile.first : tile.first + tile.rows] = loss


def softmax(
    places,
    codes,
    direct,
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
    scalars = np.array([1 - smoothing, smoothing / classes, scale / divisor, weight_sum])
    _, tiles = plan(batch, classes, inner, terms.itemsize)
    sums = np.empty(tiles, np.float64)
    workers = min(tiles, workers)
    for worker in prange(workers):
        share(
            worker * tiles // workers, (worker + 1) * tiles // workers, places, codes, direct, shape, strides,
            extents, labels, weight, weights, upstream, terms, ignore, scalars, sums,
        )  # fmt: skip
    total = 0.0
    for index in range(tiles):
        total += sums[index]
    return total / divisor, -1


# Bound by `compile_plain`.
whole: Any = softmax


def plain(x, labels, g, extents, settings, workers):
    """`softmax` for the commonest call: contiguous scores and class indices, and no weights."""
    classes = extents[1]
    places, codes, direct = np.zeros(ARRAYS, np.int64), np.full(ARRAYS, -1), np.ones(ARRAYS, np.int64)
    places[INPUT], codes[INPUT] = x.ctypes.data, 0
    if g.size:
        places[GRAD], codes[GRAD] = g.ctypes.data, 0
    none = np.empty(0, x.dtype)
    smoothing = settings[1]
    weight = np.ones(classes if smoothing else 0, x.dtype)
    shape, strides = np.empty(0, np.int64), np.empty((ARRAYS, 0), np.int64)
    return whole(
        places, codes, direct, shape, strides, extents, labels, weight, none, none, none, settings, workers
    )


@cache
def compile_softmax(dtype: np.dtype, parallel: bool) -> Any:
    """`softmax` with arithmetic in one dtype: the dtype of its arrays of weights and terms."""
    name = f"{dtype.name}_{'parallel' if parallel else 'serial'}"
    return bind(softmax, {}, name, name, njit(nogil=True, parallel=parallel, cache=True, error_model="numpy"))


@cache
def compile_plain(dtype: np.dtype, parallel: bool) -> Any:
    name = f"{dtype.name}_{'parallel' if parallel else 'serial'}"
    scope = {"whole": compile_softmax(dtype, parallel)}
    return bind(plain, scope, name, name, njit(nogil=True, cache=True))


# ---- launching ----------------------------------------------------------------------------------------

PARALLEL_FROM = 8192  # scores from which two threads beat one


def run(p: Scores, outputs: dict[str, np.ndarray]) -> Any:
    """Write gradients by ``"input"``, ``"target"`` and ``"weight"``, and the curvature; return the value."""
    if "weight" in outputs:
        return class_weights.run(p, outputs, run, arithmetic)
    w, rows, numbers = p.weighting, class_rows(p.input.shape), p.arithmetic
    arrays: list[np.ndarray | None] = [p.input, p.target if p.has_probabilities else None]
    arrays += [outputs.get(n) for n in ("input", "target", "curvature")]
    axes = Axes([a for a in arrays if a is not None])
    reduced = w.reduction != "none"
    terms = np.empty(0 if reduced else prod(rows), numbers)
    if not prod(rows):
        if not reduced:
            return terms.reshape(rows).astype(p.dtype)
        return p.dtype.type(np.float64(0) / (nan if w.divisor is None else w.divisor))
    classes = axes.extents[1]
    weight = flat(p.weight, (classes,), numbers)
    if p.weight is None and (p.has_probabilities or p.label_smoothing):
        weight = np.ones(classes, numbers)
    ordered = [None if a is None else a.transpose(axes.order) for a in arrays]
    where = locations(ordered)
    arguments = (
        where.addresses,
        where.codes,
        np.array([is_direct(a, numbers) for a in ordered], np.int64),
        where.shape,
        where.strides,
        axes.extents,
        np.empty(0, np.int64) if p.has_probabilities else over_rows(p.target, axes, INT64),
        weight,
        optional_over_rows(w.sample_weight, axes, rows, numbers),
        optional_over_rows(w.upstream, axes, rows, numbers),
        terms,
        (p.ignore_index, p.label_smoothing, w.factor, divisor_or_nan(w.divisor)),
        workers(),
    )
    value, wrong = run_parallel(
        lambda parallel: compile_softmax(numbers, parallel), p.input.size, PARALLEL_FROM, arguments
    )
    if wrong >= 0:
        index = axes.index_of(wrong)
        raise bad_index(p.name, index, p.target[index], classes)
    if reduced:
        return p.dtype.type(value)
    return axes.unflat(terms).astype(p.dtype, copy=False)


def extents_of(shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return batch, classes and inner positions for a quick call; None where it does not serve."""
    if len(shape) < 2 or target != shape[:1] + shape[2:]:
        return None
    return shape[0], shape[1], prod(shape[2:])


def quick(prepared: Quick, arrays: tuple[Any, ...], out: Any) -> Any:
    """Serve contiguous scores, int64 indices, no weights, a reduced value."""
    p = prepared.problem
    w = p.weighting
    settings = p.ignore_index, p.label_smoothing, w.factor, divisor_or_nan(w.divisor)
    return quick_rows(prepared, arrays, out, extents_of, settings, compile_plain, PARALLEL_FROM)
