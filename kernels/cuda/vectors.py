"""Losses of vectors by definition: contiguous rows of (rows, size), two or three arrays; each gives one term.

A row's sums over its coordinates, or the distances that they make, are what its definition's `finish` takes;
its value, and the slopes by the sums and by arrays of one number a row, are derived from that (see
`kernels.lift`). The gradients by the vectors are those of the sums, times these slopes. Sums that lost
terms, or would lose their gradients, are formed again of what is scaled: by its largest magnitude, or of a
definition that is homogeneous by a power of two.

How threads are dealt to rows follows from :func:`plan`: a part of a warp (TEAM) or a block (BLOCK) holds a
row in registers, so each array is read once; a block (STREAM) reads a longer one again for its gradients.

The kernel's arguments, `none` where a call does not ask for them:

- the vectors ``x y z`` (`z` with triplets), of one storage;
- a tuple of arrays of one number a row, then weights and upstream gradients of the rows, all of the
  arithmetic type;
- the terms, the gradients by ``x y z`` and the curvature by one of them, of the storage; a gradient may lie
  over its vector;
- a tuple of the gradients by arrays of one number a row, and the curvature by one, of the arithmetic type;
- the number of rows, the size of a vector, the plan's `deal`;
- a norm's p, the eps that is added to each coordinate's difference or under each squared norm, a tuple of the
  definition's options, and the gradient's factor;
- a pointer to the gradient's divisor, and one to the partial sums.
"""

from typing import Any, NamedTuple

import numpy as np

from ..freeze import fingerprint
from ..layout import InOrder
from ..lift import lift_bend, lift_finish, lift_row_bend, lift_terms
from ..math import power, sign, sqrt
from ..spec import (
    COSINE,
    FLOAT64,
    LARGEST,
    POWER,
    ROOT_OF_SQUARES,
    SQUARES,
    SUM,
    VectorFunctions,
    Vectors,
)
from . import rows
from .arrays import aligned
from .reduce import SUMMING_BLOCKS, THREADS, add, quotient
from .rows import (
    AHEAD,
    BLOCK,
    LANES,
    REPEAT,
    STREAM,
    TEAM,
    TOGETHER,
    WIDTH,
    Plan,
    T,
    array,
    fill_row,
    lanes,
    row_state,
    row_team,
    store_partial,
    vector_at,
)
from .target import (
    EVERY_LANE,
    WARP,
    Binary,
    as_kernel,
    compile,
    cuda,
    derivatives,
    each,
    power_of_two,
    select,
    shared,
    storage,
    tree_sum,
    types,
)
from .target import options as unpack_options

# What else the kernel is bound to, by `kernel`.
MOST: Any = np.finfo(np.float32).max
WIDE: Any = np.float32(2.0**60)  # a sum above it, or below its inverse, is formed again
NOTHING: Any = (np.float32(0),) * 8  # a thread's part of a vector that is not read
FIRST: Any = (0, 0, 1)  # of each distance the first vector,
SECOND: Any = (1, 2, 2)  # the second,
PRODUCT: Any = (3, 4, 5)  # and with cosines the sum of their products
SCALES: Any = (0, 1, 2)  # what is scaled: differences, or with cosines vectors, or all of a row
SUMS: Any = (0, 1, 2, 3, 4, 5)
ONES: Any = (np.float32(1),) * 3
NO_PEAKS: Any = (np.float32(0),) * 3
NO_SUMS: Any = (np.float32(0),) * 6
THREE: Any = True  # vectors, not two
SWAP: Any = True
WRITES: Any = True  # there is a gradient by a vector
STREAMED: Any = False  # a row is read twice
BY_TERMS: Any = False  # the definition has terms, and no distance
COSINES: Any = False
COUNTS: Any = False  # how often the largest difference is there is added up
SCALED: Any = True  # sums are formed again where they lost terms
power_of: Any = None  # by kind of distance: a difference's power,
root_of: Any = None  # the sum's root,
slope_of: Any = None  # the gradient by a difference,
finished: Any = None  # and what ends a distance
BY0: Any = True  # the gradient by this vector is asked for
BY1: Any = True
BY2: Any = False
DEGREE: Any = 0  # the value goes with this power of the scale
CURVED: Any = False  # the second derivative by a vector is asked for,
ROW_CURVED: Any = False  # or by an array of one number a row
ROW_ARRAYS: Any = False  # there are such arrays
ROW_WRT: Any = False  # gradients by them are asked for
terms_at: Any = None  # the definition's terms, and their derivatives by each vector
at0: Any = None
at1: Any = None
at2: Any = None
finish: Any = None  # its value, and the slopes by sums and by arrays of one number a row
bend: Any = None  # its second derivative by a coordinate,
row_bend: Any = None  # or by such an array
of_sums: Any = None  # of those slopes the sums',
of_rows: Any = None  # and the arrays'
unpack: Any = None  # gives the options as the definition takes them
stretch: Any = None  # and those that scale with the vectors, scaled
STRETCHES: Any = False  # there are such options:
LENGTHS: Any = (0,)  # their places among those that are numbers

MOST_HOLDING = 512  # threads of a block that holds a row; half as many of float64, with twice the registers
DISTANCES = {"euclidean": ROOT_OF_SQUARES, "sqeuclidean": SQUARES, "cosine": COSINE, "manhattan": SUM}


class Request(NamedTuple):
    """What one kernel computes."""

    kind: int | None  # of distance, as in `kernels.spec`; None: the definition has terms
    swap: bool = False
    weighted: bool = False  # rows have weights
    upstream: bool = False
    terms: bool = False
    wrt: tuple[int, ...] = ()  # vectors to differentiate
    row_wrt: tuple[int, ...] = ()  # arrays of one number a row to differentiate
    curvature: bool = False  # by the one vector, or array, that is differentiated


# ---- one coordinate -----------------------------------------------------------------------------------


def together(x, y, z):
    return (x, y, z) if THREE else (x, y)


def power_between(first, second, r, vs, there, eps, p):
    return (power_of(abs(vs[first] - vs[second] + eps) * r, p) if there else T(0),)


def square(v, r, there):
    v = v * r
    return (v * v if there else T(0),)


def product(first, second, vs, rs, there):
    return (vs[first] * rs[first] * (vs[second] * rs[second]) if there else T(0),)


def magnitude(v, there):
    return (abs(v) if there else T(0),)


def apart(first, second, vs, there, eps):
    return (abs(vs[first] - vs[second] + eps) if there else T(0),)


def hit(first, second, top, vs, there, eps):
    """Whether a difference is the largest; NaN makes the count NaN."""
    u = abs(vs[first] - vs[second] + eps)
    return (T(0) if u < top or not there else T(1) if u == top else u,)


def summands(x, y, z, lane, there, rs, settings):
    """What a coordinate adds to the sums; with distances by these, with cosines by vector before."""
    eps, p, o, _ = settings
    vs, here = together(x, y, z), there[lane // WIDTH]
    if BY_TERMS:
        a, b, c = scaled(x, y, z, rs[0])
        return each(if_here, (terms_at(a, b, c, stretched(o, rs[0])),), (here,))[0]
    elif COSINES:
        return each(square, (vs, rs), (here,))[0] + each(product, (FIRST, SECOND), (vs, rs, here))[0]
    elif COUNTS:
        return each(hit, (FIRST, SECOND, rs), (vs, here, eps))[0]
    else:
        return each(power_between, (FIRST, SECOND, rs), (vs, here, eps, p))[0]


def scaled(x, y, z, r):
    """The three numbers that terms take, of two vectors the last stands for none."""
    return (x * r, y * r, z * r) if THREE else (x * r, y * r, x * r)


def stretched(o, r):
    """The options, those that are lengths scaled."""
    return stretch(o, r) if SCALED and BY_TERMS else o


def if_here(v, there):
    return (v if there else T(0),)


def magnitudes(x, y, z, lane, there, rs, settings):
    """The magnitudes of what is scaled."""
    eps, _, _, _ = settings
    vs, here = together(x, y, z), there[lane // WIDTH]
    if BY_TERMS:
        return largest(each(magnitude, (vs,), (here,))[0])
    elif COSINES:
        return each(magnitude, (vs,), (here,))[0]
    else:
        return each(apart, (FIRST, SECOND), (vs, here, eps))[0]


# By kind of norm: a difference's power, the sum's root, and the gradient by a difference.


def absolute(u, p):
    return u


def squared(u, p):
    return u * u


def raised(u, p):
    return power(u, p)


def square_root(s, p):
    return sqrt(s)


def root(s, p):
    return power(s, T(1) / p)


def slope_of_squares(u, k, r, value, p):
    return k * (u * r)


def slope_of_sum(u, k, r, value, p):
    return k * sign(u)


def slope_of_largest(u, k, r, value, p):
    return T(0) if abs(u) < value else k * sign(u)


def slope_of_powers(u, k, r, value, p):
    u = u * r
    return T(0) if u == T(0) else k * sign(u) * power(abs(u), p - T(1))


# A distance's gradients by both of its vectors; of factor 0 they are 0, whatever there is.


def pushed_by_norm(first, second, factor, slope, value, r, vs, eps, p):
    t = slope_of(vs[first] - vs[second] + eps, factor * slope, r, value, p)
    t = t if factor != T(0) else T(0)
    return t, -t


def pushed_by_cosine(first, second, factor, slope, own, other, vs, rs):
    counts, k = factor != T(0), factor * slope
    a, b = vs[first] * rs[first], vs[second] * rs[second]
    by_first = (factor * own * a - k * b) * rs[first]
    by_second = (factor * other * b - k * a) * rs[second]
    return by_first if counts else T(0), by_second if counts else T(0)


def push(vs, factors, slopes, owns, others, values, rs, eps, p):
    """Each distance's gradients by its first vector, and by its second."""
    if COSINES:
        return each(pushed_by_cosine, (FIRST, SECOND, factors, slopes, owns, others), (vs, rs))
    else:
        return each(pushed_by_norm, (FIRST, SECOND, factors, slopes, values, rs), (vs, eps, p))


def slopes_of_distances(x, y, z, factors, slopes, owns, others, values, rs, eps, p):
    """The gradients by the vectors."""
    t, o = push(together(x, y, z), factors, slopes, owns, others, values, rs, eps, p)
    if not THREE:
        return t[0], o[0], None
    elif not SWAP:
        return t[0] + t[1], o[0], o[1]
    else:
        return t[0] + t[1], o[0] + t[2], o[1] + o[2]


def slopes_of_terms(x, y, z, factors, curve, sums, given, r, o):
    """The gradients by the vectors, and the second derivative by the one that is differentiated."""
    a, b, c = scaled(x, y, z, r)
    dx = dy = dz = h = T(0)
    if BY0:
        d, curvatures = at0(a, b, c, o)
        dx = weighed(factors, d)
    if BY1:
        d, curvatures = at1(a, b, c, o)
        dy = weighed(factors, d)
    if BY2:
        d, curvatures = at2(a, b, c, o)
        dz = weighed(factors, d)
    if CURVED:
        h = select(curve == T(0), T(0), curve * bend(sums, d, curvatures, given, o))
    return dx, dy, dz, h


def weighed(factors, slopes):
    """The sum of slopes times their factors; nothing where either is zero, be the other infinite."""
    return tree_sum(each(product_or_zero, (factors, slopes), ())[0])


def product_or_zero(x, y):
    """A product that is zero where a factor is, whatever the other."""
    return (select((x == T(0)) | (y == T(0)), T(0), x * y),)


# ---- sums over a row ----------------------------------------------------------------------------------


def total(xs):
    return (tree_sum(xs),)


def largest(xs):
    top = xs[0]
    for x in xs:
        top = max(top, x)
    return (top,)


def plus(x, y):
    return (x + y,)


def larger(x, y):
    return (max(x, y),)


def across(x, step):
    return (cuda.shfl_xor_sync(EVERY_LANE, x, step),)


def join_team(xs, numbers, pairwise, team):
    """The numbers of a part of a warp joined two by two, in each of its threads."""
    step = team >> 1
    while step > 0:
        xs = each(pairwise, (xs, each(across, (xs,), (step,))[0]), ())[0]
        step >>= 1
    return xs


def leave(x, k, memory, warp):
    memory[WARP * k + warp] = x
    return ()


def found(k, memory, lane, warps, zero):
    return (memory[WARP * k + lane] if lane < warps else zero,)


def join_block(xs, numbers, pairwise, team):
    """The same for a block; of `xs` the `numbers` are 0, 1, ..."""
    memory = shared(192, xs[0])  # for a warp's, six at most
    warp, lane = cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
    xs = join_team(xs, numbers, pairwise, WARP)
    cuda.syncthreads()  # until all have read what an earlier call left
    if lane == 0:
        each(leave, (xs, numbers), (memory, warp))
    cuda.syncthreads()
    xs = each(found, (numbers,), (memory, lane, cuda.blockDim.x >> 5, type(xs[0])(0)))[0]
    return join_team(xs, numbers, pairwise, WARP)


def join(xs, numbers, pairwise, team):
    """The numbers of the threads that share a row joined, in each of them."""
    return join_team(xs, numbers, pairwise, team) if TOGETHER else join_block(xs, numbers, pairwise, team)


def in_registers(p, at, there):
    """A thread's part of a vector; zeros of one that is not there, which another thread may be writing to."""
    xs = NOTHING
    if there:
        xs = array.load_vectors(p, at)
    return xs


def take(x, y, z, row):
    """What a thread has of a row: its part of each vector, its place and what is there; or the arrays."""
    if STREAMED:
        return x, y, z
    else:
        base, first, step, stop = row
        at, there, _ = each(vector_at, (AHEAD,), (first, step, stop, base, -1, WIDTH))
        third = in_registers(z, at, there[0]) if THREE else None
        return in_registers(x, at, there[0]), in_registers(y, at, there[0]), third, at, there


def fold_row(at, fold, pairwise, start, own, row, rs, settings):
    """A thread's part of some sums over a row, or of some maxima."""
    if STREAMED:
        x, y, z = own
        base, v, step, stop = row
        sums = start
        while v < stop:
            i, there, _ = each(vector_at, (AHEAD,), (v, step, stop, base, -1, WIDTH))
            a, b, c = array.load_vectors(x, i), array.load_vectors(y, i), array.load_vectors(z, i)
            more = each(fold, (each(at, (a, b, c, LANES), (there, rs, settings)),), ())[0]
            sums = each(pairwise, (sums, more), ())[0]
            v += REPEAT * step
        return sums
    else:
        x, y, z, _, there = own
        return each(fold, (each(at, (x, y, z, LANES), (there, rs, settings)),), ())[0]


def store_gradients(outputs, own, row, found):
    """Write the gradients of what a thread has read, or reads again."""
    if STREAMED:
        x, y, z = own
        base, v, step, stop = row
        while v < stop:
            i, there, _ = each(vector_at, (AHEAD,), (v, step, stop, base, -1, WIDTH))
            a, b, c = array.load_vectors(x, i), array.load_vectors(y, i), array.load_vectors(z, i)
            store_slopes(outputs, i, there, a, b, c, found)
            v += REPEAT * step
    else:
        x, y, z, at, there = own
        store_slopes(outputs, at, there, x, y, z, found)


def store_slopes(outputs, at, there, x, y, z, found):
    gx, gy, gz, h = outputs
    if BY_TERMS:
        dx, dy, dz, c = each(slopes_of_terms, (x, y, z), found)
        array.store_vectors(h, at, there, c)
    else:
        dx, dy, dz = each(slopes_of_distances, (x, y, z), found)
    array.store_vectors(gx, at, there, dx)
    array.store_vectors(gy, at, there, dy)
    array.store_vectors(gz, at, there, dz)


# ---- a row's distances --------------------------------------------------------------------------------


def lost(k, sums):
    """Whether a sum of powers lost terms, or would lose its gradients; that of NaN, too."""
    if BY_TERMS:
        some = False
        for one in sums:
            some = some or not (abs(one) <= WIDE and abs(one) * WIDE >= T(1))
        return (some,)
    elif COSINES:
        return (not sums[k] <= WIDE,)
    else:
        return (not (sums[k] <= WIDE and sums[k] * WIDE >= T(1)),)


def inverse(m, wanted, least):
    """1 over the largest of some magnitudes, or about that, if it is a number; of terms at most 1 / least."""
    if BY_TERMS:
        return (power_of_two(max(m, least)) if wanted else T(1),)
    else:
        return (min(T(1) / m, MOST) if wanted and m > T(0) and m <= MOST else T(1),)


def least_peak(options):
    """The least magnitude to scale by: of options that are much longer even the squares stay finite."""
    least = T(0)
    if STRETCHES:
        for x in each(length, (LENGTHS,), (options,))[0]:
            least = max(least, abs(x) / WIDE)
    return least


def length(k, options):
    return (options[k],)


def summed(own, row, rs, settings):
    return join(fold_row(summands, total, plus, NO_SUMS, own, row, rs, settings), SUMS, plus, row[2])


def peaks(own, row, settings):
    tops = fold_row(magnitudes, largest, larger, NO_PEAKS, own, row, ONES, settings)
    return join(tops, SCALES, larger, row[2])


def measure(own, row, live, settings):
    """A row's sums, and what its vectors or differences were scaled by, or the largest of them."""
    if COUNTS:
        tops = peaks(own, row, settings)
        return summed(own, row, tops, settings), tops
    else:
        sums, rs = summed(own, row, ONES, settings), ONES
        if SCALED:
            wanted = each(lost, (SCALES,), (sums,))[0]
            some = False
            for one in wanted:
                some = some or (one and live)
            if cuda.any_sync(EVERY_LANE, some):
                rs = each(inverse, (peaks(own, row, settings), wanted), (settings[3],))[0]
                again = summed(own, row, rs, settings)
                if some:
                    sums = again
        return sums, rs


# Of each distance its value, and what its gradients are made of: a factor of the differences' powers, or of
# the other vector; with cosines those of the first vector itself and of the second.


def sum_finished(s, r, p):
    return s, T(1), None, None


def squares_finished(s, r, p):
    return s, T(2), None, None


def norm_finished(s, r, p):
    root = root_of(s, p)
    return root / r, T(0) if s == T(0) else root / s, None, None


def largest_finished(count, top, p):
    return top if count == count else count, T(1) / count, None, None


def cosine_finished(first, second, product, sums, rs, eps):
    xx, yy = sums[first] + eps * rs[first] * rs[first], sums[second] + eps * rs[second] * rs[second]
    n, xy = sqrt(xx * yy), sums[product]
    c = xy / n
    return (n - xy) / n, T(1) / n, c / xx, c / yy


def distances_of(sums, rs, eps, p):
    """The distances, and what their gradients are made of."""
    if COSINES:
        return each(cosine_finished, (FIRST, SECOND, PRODUCT), (sums, rs, eps))
    else:
        return each(finished, (sums, rs), (p,))


# ---- a row's term, and what its gradients are made of --------------------------------------------------


def conclude(values, given, r, o, row_weight, factor):
    """What follows from a row's sums, or distances, and its numbers in arrays.

    Returns
    -------
    term : float
    factors : tuple
        Of the gradients of each sum, or distance.
    curve : float
        Of the second derivative by a coordinate.
    by_rows, row_curve : tuple, float
        The gradients by arrays of one number a row, and the second derivative by one.
    """
    one = T(1)
    kept = one
    if SWAP:
        far, other = values[1], values[2]
        kept = one if far < other else T(0.5) if far == other else T(0)
        least = far if far < other or far != far else other
        # Numba joins tuples, but unpacks none whose types differ.
        arguments = (values[0], least) + given  # noqa: RUF005
    else:
        arguments = values + given
    v, slopes = finish(arguments, o)
    term = row_weight * rescaled(v, r, -DEGREE)
    factors = by_rows = ()
    row_curve = T(0)
    if WRITES:
        factors = each(product_or_zero, (of_sums(slopes),), (rescaled(factor, r, 1 - DEGREE),))[0]
        if SWAP:
            factors = factors[0], factors[1] * kept, factors[1] * (one - kept)
    if ROW_WRT:
        of_row = rescaled(factor, r, -DEGREE)
        by_rows = each(product_or_zero, (of_rows(slopes),), (of_row,))[0]
        if ROW_CURVED:
            row_curve = product_or_zero(of_row, row_bend(arguments, o))[0]
    return term, factors, rescaled(factor, r, 2 - DEGREE), by_rows, row_curve


def rescaled(x, r, power):
    """``x * r**power`` of a definition's scale, for a power of -2 to 2."""
    if SCALED and BY_TERMS:
        by = T(1) / r if power < 0 else r
        x = x * by if power != 0 else x
        x = x * by if power * power == 4 else x
    return x


def number_of_row(array, i):
    return (array[i],)


def store_number(array, x, i, live):
    array[i] = x if live else T(0)
    return ()


# ---- the kernel ---------------------------------------------------------------------------------------


def loop(
    x, y, z, row_arrays, weights, upstream, terms, gx, gy, gz, h, row_gradients, row_curvature, count, size,
    deal, p, eps, options, factor, divisor, partials,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
    settings = eps, p, unpack(options, factor), least_peak(options)
    outputs = gx, gy, gz, h
    hi = lo = T(0)
    team, height, of_block, lane = row_team(deal)
    vectors = size // WIDTH
    first = cuda.blockIdx.x * height
    while first < count:
        i = first + of_block
        live, fill, _, row_weight, _, up = row_state(
            None, None, weights, upstream, i, count, 0, None, scale, False, False, None
        )
        row = i * size, lane, team, vectors if live else 0
        own = take(x, y, z, row)
        sums, rs = measure(own, row, live, settings)
        given = ()
        if ROW_ARRAYS:
            given = each(number_of_row, (row_arrays,), (i if live else 0,))[0]
        up = up * row_weight
        if BY_TERMS:
            o = stretched(settings[2], rs[0])
            term, factors, curve, by_rows, row_curve = conclude(sums, given, rs[0], o, row_weight, up)
            found = factors, curve, sums, given, rs[0], o
        else:
            values, slopes, owns, others = distances_of(sums, rs, eps, p)
            term, factors, _, by_rows, row_curve = conclude(values, given, T(1), settings[2], row_weight, up)
            found = factors, slopes, owns, others, values, rs, eps, p
        if WRITES:
            if live:
                store_gradients(outputs, own, row, found)
            elif i < count:
                fill_row((gx, gy, gz), i * size, lane, team, vectors, fill)
                if CURVED:
                    fill_row((h, None, None), i * size, lane, team, vectors, fill)
        if lane == 0 and i < count:
            if ROW_WRT:
                each(store_number, (row_gradients, by_rows), (i, live))
            if ROW_CURVED:
                row_curvature[i] = row_curve if live else T(0)
            term = term if live else fill
            array.store(terms, i, term)
            hi, lo = add(hi, lo, term)
        first += cuda.gridDim.x * height
    if partials is not None:
        store_partial(partials, hi, lo)


# ---- launching ----------------------------------------------------------------------------------------


def kind_of(kind: int, p: float, code: int) -> int:
    """The kind that a distance is computed as: of a large p to the last bit the largest difference."""
    return LARGEST if p > (2.0**59 if code == FLOAT64 else 2.0**30) else kind


def repeat(code: int, vectors: bool) -> int:
    """The 16 bytes, or the elements, of each vector that a thread holds or has in flight.

    Three vectors and their gradients leave room for no more.
    """
    return 1 if vectors else 2 if code == FLOAT64 else 4


def plan(count: int, size: int, code: int, vectors: bool) -> Plan:
    """The variant and the launch for `count` rows of `size` coordinates.

    With `vectors` all arrays start at multiples of 16 bytes, and `size` is a multiple of the storage's width.
    """
    deal = max(0, -(-size // (storage(code, vectors).width * repeat(code, vectors))) - 1).bit_length()
    if 1 << deal <= WARP:
        blocks = max(1, min(SUMMING_BLOCKS, -(-(count << deal) // THREADS)))
        return Plan(TEAM, blocks, THREADS, deal, blocks)
    blocks = max(1, min(SUMMING_BLOCKS, count))
    if 1 << deal <= MOST_HOLDING >> (code == FLOAT64):
        return Plan(BLOCK, blocks, 1 << deal, 0, blocks)
    return Plan(STREAM, blocks, THREADS, 0, blocks)


# By kind of distance: power, sum's root, the gradient by a difference, and what ends a distance.
NORMS: dict[int, tuple[Any, ...]] = {
    POWER: (raised, root, slope_of_powers, norm_finished),
    SUM: (absolute, None, slope_of_sum, sum_finished),
    SQUARES: (squared, None, slope_of_squares, squares_finished),
    ROOT_OF_SQUARES: (squared, square_root, slope_of_squares, norm_finished),
    LARGEST: (absolute, None, slope_of_largest, largest_finished),
}


def kernel(
    functions: VectorFunctions, request: Request, code: int, variant: str, vectors: bool = True
) -> Any:
    """The kernel of a definition, in plain Python."""
    f, r, jets = functions, request, derivatives()
    by_terms, cosine = r.kind is None, r.kind == COSINE
    numbers = [n for n, flag in zip(f.options, flags_of(f), strict=True) if flag is None]
    lengths = tuple(k for k, n in enumerate(numbers) if n in f.lengths and f.homogeneous is not None)
    bound = lanes(code, vectors, repeat(code, vectors), variant == TEAM)
    T, count = bound["T"], f.arity
    distances = ((0, 1), (0, 2), (1, 2))[: (2 + r.swap) if count == 3 else 1]
    scales = 1 if by_terms else count if cosine else len(distances)
    sums = f.sums if by_terms else count * cosine + len(distances)
    power, root, slope, finished = NORMS.get(-1 if r.kind is None else r.kind, (None,) * 4)
    at = {k: lift_terms(f, jets, k) for k in r.wrt if by_terms}
    slopes = (*range(f.sums), *(f.sums + k for k in r.row_wrt)) if r.wrt or r.row_wrt else ()
    scope = dict(
        bound,
        MOST=np.finfo(T).max,
        WIDE=T(2.0**60 if T is np.float32 else 2.0**500),
        NOTHING=(T(0),) * len(bound["LANES"]),
        FIRST=tuple(a for a, _ in distances),
        SECOND=tuple(b for _, b in distances),
        PRODUCT=tuple(range(count, sums)),
        SCALES=tuple(range(scales)),
        SUMS=tuple(range(sums)),
        ONES=(T(1),) * scales,
        NO_PEAKS=(T(0),) * scales,
        NO_SUMS=(T(0),) * sums,
        THREE=count == 3,
        SWAP=r.swap,
        WRITES=bool(r.wrt),
        STREAMED=variant == STREAM,
        BY_TERMS=by_terms,
        COSINES=cosine,
        COUNTS=r.kind == LARGEST,
        SCALED=f.homogeneous is not None if by_terms else r.kind in (POWER, ROOT_OF_SQUARES, COSINE),
        power_of=power,
        root_of=root,
        slope_of=slope,
        finished=finished,
        BY0=0 in r.wrt,
        BY1=1 in r.wrt,
        BY2=2 in r.wrt,
        DEGREE=f.homogeneous or 0,
        CURVED=r.curvature and bool(r.wrt),
        ROW_CURVED=r.curvature and bool(r.row_wrt),
        ROW_ARRAYS=bool(f.row_arrays),
        ROW_WRT=bool(r.row_wrt),
        terms_at=lift_terms(f, jets, None) if by_terms else None,
        at0=at.get(0),
        at1=at.get(1),
        at2=at.get(2),
        finish=lift_finish(f, jets, slopes),
        bend=lift_bend(f, jets) if r.curvature and r.wrt else None,
        row_bend=lift_row_bend(f, jets, r.row_wrt[0]) if r.curvature and r.row_wrt else None,
        of_sums=jets.pick(tuple(range(f.sums))),
        of_rows=jets.pick(tuple(range(f.sums, f.sums + len(r.row_wrt)))),
        unpack=unpack_options(flags_of(f)),
        stretch=jets.stretch(tuple(n in f.lengths for n in f.options)),
        STRETCHES=bool(lengths),
        LENGTHS=lengths,
    )
    definition = f.terms and fingerprint(f.terms), fingerprint(f.finish), f[4:]
    return as_kernel(loop, scope, "vectors", (f.arity, definition, tuple(r), code, vectors))


def flags_of(f: VectorFunctions) -> tuple[bool | None, ...]:
    """Return for each option the bool that it is compiled with, or None for a number."""
    return f.flags or (None,) * len(f.options)


def signature(
    functions: VectorFunctions, request: Request, code: int, summed: bool, divided: bool
) -> tuple[Any, ...]:
    """The types of the kernel's arguments; ``none`` is passed as a null pointer."""
    arithmetic, pointer = storage(code).arithmetic, storage(code).pointer
    numbers = types.CPointer(arithmetic)

    def given(present: Any, kind: Any = pointer) -> Any:
        return kind if present else types.none

    f, r = functions, request
    return (
        pointer,
        pointer,
        given(f.arity == 3),
        types.UniTuple(numbers, len(f.row_arrays)),
        given(r.weighted, numbers),
        given(r.upstream, numbers),
        given(r.terms),
        *[given(k in r.wrt) for k in range(3)],
        given(r.curvature and r.wrt),
        types.UniTuple(numbers, len(r.row_wrt)),
        given(r.curvature and r.row_wrt, numbers),
        *[types.int64] * 3,
        *[arithmetic] * 2,
        types.UniTuple(arithmetic, flags_of(f).count(None)),
        arithmetic,
        given(divided, numbers),
        given(summed, numbers),
    )


def compile_kernel(
    functions: VectorFunctions,
    request: Request,
    code: int,
    cc: tuple[int, int],
    plan: Plan,
    summed: bool = True,
    divided: bool = False,
    vectors: bool = True,
) -> Binary:
    """Compile the kernel of a definition, request, storage, plan and compute capability."""
    arguments = signature(functions, request, code, summed, divided)
    return compile(kernel(functions, request, code, plan.variant, vectors), arguments, cc, plan.threads)


# ---- launching ----------------------------------------------------------------------------------------


def run(p: Vectors, outputs: dict[str, Any]) -> Any:
    """Write the gradients by their arguments' names, and the curvature; return the value."""
    f, distance, shape = p.functions, p.distance, p.vectors[0].shape
    outs, by_rows = [outputs.get(n) for n in p.names], [outputs.get(n) for n in f.row_arrays]
    row_wrt = tuple(k for k, a in enumerate(by_rows) if a is not None)
    row_outs = [a for a in by_rows if a is not None]
    curvature = outputs.get("curvature")
    if row_wrt and curvature is not None:
        row_outs.append(curvature)
    elif not row_wrt:
        outs.append(curvature)
    arrays = [*p.vectors, *(a for a in outs if a is not None)]
    these = rows.Rows(p, arrays, shape[:-1], InOrder(len(shape)))
    terms, queue = these.terms(), these.queue
    if not these.count:
        return these.finish(None, 1.0, None) if terms is None else terms
    divisor, by = these.divisors()
    gradients_by = these.gradients_by(by) if outputs else None
    given, written = [these.as_kernel_input(v) for v in p.vectors], [these.output_buffer(a) for a in outs]
    vectors = rows.whole_vectors(shape[-1], 1, these.storage) and aligned([*given, *written])
    launch = plan(these.count, shape[-1], these.code, vectors)
    count = len(given)
    request = Request(
        None if distance is None else kind_of(distance.kind, distance.p, these.code),
        swap=distance is not None and distance.swap,
        weighted=these.sample_weight is not None,
        upstream=these.upstream is not None,
        terms=terms is not None,
        wrt=tuple(k for k, a in enumerate(outs[:count]) if a is not None),
        row_wrt=row_wrt,
        curvature=curvature is not None,
    )
    partials = None if terms is not None else queue.empty((2 * launch.partials,), p.arithmetic)
    absent = [None] * (3 - count)
    row_written = [queue.empty((these.count,), p.arithmetic) for _ in row_outs]
    row_absent = [None] * (len(row_wrt) + 1 - len(row_outs))
    queue.launch(
        (launch.blocks, launch.threads),
        compile_kernel,
        (
            *(*given, *absent, *(these.over_rows(a, p.arithmetic) for a in p.row_arrays)),
            *(these.sample_weight, these.upstream, terms, *written[:count], *absent),
            *(None if row_wrt else written[count], *row_written, *row_absent),
            *(these.count, shape[-1], launch.deal),
            *((2.0, 0.0) if distance is None else (distance.p, distance.eps)),
            *(*p.numbers, these.factor / divisor, gradients_by, partials),
        ),
        functions=f,
        request=request,
        code=these.code,
        plan=rows.shape_free(launch),
        summed=partials is not None,
        divided=gradients_by is not None,
        vectors=vectors,
    )
    for output, w in zip(outs, written, strict=True):
        these.copy_back(output, w)
    for output, w in zip(row_outs, row_written, strict=True):
        output.assign(w.reshape(shape[:-1]))
    return these.finish(partials, divisor, by) if terms is None else terms
