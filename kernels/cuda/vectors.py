"""Losses of vectors, contiguous rows of (rows, size): each row of two or three arrays gives one term.

A row's sums over its coordinates make the distances between its vectors, these the term, and all of them the
gradients. Sums that lost terms, or would lose their gradients, are formed again of what is scaled by its
largest magnitude. How threads are dealt to rows follows from :func:`plan`: a part of a warp (TEAM) or a block
(BLOCK) holds a row in registers, so each array is read once; a block (STREAM) reads a longer one again for
its gradients.

The kernel's arguments, `none` where a call does not ask for them:

- the vectors ``x y z`` (`z` with triplets), of one storage;
- labels (with pairs: 1, -1, or any other, which gives 0), weights and upstream gradients of the rows, of the
  arithmetic type;
- the terms and the gradients by ``x y z``, of the storage; a gradient may lie over its vector;
- the number of rows, the size of a vector, the plan's `deal`;
- the norm's p, the eps that is added to each coordinate's difference or under each squared norm, the margin,
  and the gradient's factor;
- a pointer to the gradient's divisor, and one to the partial sums.
"""

from typing import Any, NamedTuple

import numpy as np

from ..layout import InOrder
from ..math import power, sign, sqrt
from ..spec import (
    COSINE,
    FLOAT64,
    LARGEST,
    POWER,
    ROOT_OF_SQUARES,
    SQUARES,
    SUM,
    Vectors,
)
from . import rows
from .arrays import aligned
from .reduce import MOST_BLOCKS, THREADS, add, quotient
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
    optional,
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
    each,
    shared,
    storage,
    tree_sum,
    types,
)

# What else the kernel is bound to, by `kernel`.
MOST: Any = np.finfo(np.float32).max
WIDE: Any = np.float32(2.0**60)  # a sum above it, or below its inverse, is formed again
NOTHING: Any = (np.float32(0),) * 8  # a thread's part of a vector that is not read
FIRST: Any = (0, 0, 1)  # of each distance the first vector,
SECOND: Any = (1, 2, 2)  # the second,
PRODUCT: Any = (3, 4, 5)  # and with cosines the sum of their products
SCALES: Any = (0, 1, 2)  # what is scaled: differences, or with cosines vectors
SUMS: Any = (0, 1, 2, 3, 4, 5)
ONES: Any = (np.float32(1),) * 3
NO_PEAKS: Any = (np.float32(0),) * 3
NO_SUMS: Any = (np.float32(0),) * 6
THREE: Any = True  # vectors, not two
SWAP: Any = True
WRITES: Any = True  # there is a gradient
STREAMED: Any = False  # a row is read twice
COSINES: Any = False
COUNTS: Any = False  # how often the largest difference is there is added up
SCALED: Any = True  # sums are formed again where they lost terms
power_of: Any = None  # by kind of distance: a difference's power,
root_of: Any = None  # the sum's root,
slope_of: Any = None  # the gradient by a difference,
finished: Any = None  # and what ends a distance

MOST_HOLDING = 512  # threads of a block that holds a row; half as many of float64, with twice the registers
DISTANCES = {"euclidean": ROOT_OF_SQUARES, "sqeuclidean": SQUARES, "cosine": COSINE, "manhattan": SUM}


class Request(NamedTuple):
    """What one kernel computes."""

    kind: int  # of distance, as in `kernels.cpu.vectors`
    three: bool = True  # triplets, else pairs
    swap: bool = False
    weighted: bool = False  # rows have weights
    upstream: bool = False
    terms: bool = False
    wrt: tuple[int, ...] = ()  # vectors to differentiate


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


def summands(x, y, z, lane, there, rs, eps, p):
    """What a coordinate adds to the sums, by distance; with cosines by vector, and then by distance."""
    vs, here = together(x, y, z), there[lane // WIDTH]
    if COSINES:
        return each(square, (vs, rs), (here,))[0] + each(product, (FIRST, SECOND), (vs, rs, here))[0]
    elif COUNTS:
        return each(hit, (FIRST, SECOND, rs), (vs, here, eps))[0]
    else:
        return each(power_between, (FIRST, SECOND, rs), (vs, here, eps, p))[0]


def magnitudes(x, y, z, lane, there, rs, eps, p):
    """The magnitudes of what is scaled."""
    vs, here = together(x, y, z), there[lane // WIDTH]
    if COSINES:
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


def slopes(x, y, z, factors, slopes, owns, others, values, rs, eps, p):
    """The gradients by the vectors."""
    t, o = push(together(x, y, z), factors, slopes, owns, others, values, rs, eps, p)
    if not THREE:
        return t[0], o[0], None
    elif not SWAP:
        return t[0] + t[1], o[0], o[1]
    else:
        return t[0] + t[1], o[0] + t[2], o[1] + o[2]


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


def in_registers(p, at, live):
    """A thread's part of a vector; zeros of one that is not to be read."""
    xs = NOTHING
    if live:
        xs = array.load_vectors(p, at)
    return xs


def take(x, y, z, row, live):
    """What a thread has of a row: its part of each vector, its place and what is there; or the arrays."""
    if STREAMED:
        return x, y, z
    else:
        base, first, step, stop = row
        at, there, _ = each(vector_at, (AHEAD,), (first, step, stop, base, -1, WIDTH))
        third = in_registers(z, at, live) if THREE else None
        return in_registers(x, at, live), in_registers(y, at, live), third, at, there


def fold_row(at, fold, pairwise, start, own, row, rs, eps, p):
    """A thread's part of some sums over a row, or of some maxima."""
    if STREAMED:
        x, y, z = own
        base, v, step, stop = row
        sums = start
        while v < stop:
            i, there, _ = each(vector_at, (AHEAD,), (v, step, stop, base, -1, WIDTH))
            a, b, c = array.load_vectors(x, i), array.load_vectors(y, i), array.load_vectors(z, i)
            more = each(fold, (each(at, (a, b, c, LANES), (there, rs, eps, p)),), ())[0]
            sums = each(pairwise, (sums, more), ())[0]
            v += REPEAT * step
        return sums
    else:
        x, y, z, _, there = own
        return each(fold, (each(at, (x, y, z, LANES), (there, rs, eps, p)),), ())[0]


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
    gx, gy, gz = outputs
    dx, dy, dz = each(slopes, (x, y, z), found)
    array.store_vectors(gx, at, there, dx)
    array.store_vectors(gy, at, there, dy)
    array.store_vectors(gz, at, there, dz)


# ---- a row's distances --------------------------------------------------------------------------------


def lost(k, sums):
    """Whether a sum of powers lost terms, or would lose its gradients; that of NaN, too."""
    if COSINES:
        return (not sums[k] <= WIDE,)
    else:
        return (not (sums[k] <= WIDE and sums[k] * WIDE >= T(1)),)


def inverse(m, wanted):
    """1 over the largest of some magnitudes, if that is a number."""
    return (min(T(1) / m, MOST) if wanted and m > T(0) and m <= MOST else T(1),)


def summed(own, row, rs, eps, p):
    return join(fold_row(summands, total, plus, NO_SUMS, own, row, rs, eps, p), SUMS, plus, row[2])


def peaks(own, row, eps, p):
    return join(
        fold_row(magnitudes, largest, larger, NO_PEAKS, own, row, ONES, eps, p), SCALES, larger, row[2]
    )


def measure(own, row, live, eps, p):
    """A row's sums, and what its vectors or differences were scaled by, or the largest of them."""
    if COUNTS:
        tops = peaks(own, row, eps, p)
        return summed(own, row, tops, eps, p), tops
    else:
        sums, rs = summed(own, row, ONES, eps, p), ONES
        if SCALED:
            wanted = each(lost, (SCALES,), (sums,))[0]
            some = False
            for one in wanted:
                some = some or (one and live)
            if cuda.any_sync(EVERY_LANE, some):
                rs = each(inverse, (peaks(own, row, eps, p), wanted), ())[0]
                again = summed(own, row, rs, eps, p)
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


def finish(sums, rs, eps, p):
    """The distances, and what their gradients are made of."""
    if COSINES:
        return each(cosine_finished, (FIRST, SECOND, PRODUCT), (sums, rs, eps))
    else:
        return each(finished, (sums, rs), (p,))


# ---- a row's term, and the factors of its distances' gradients ----------------------------------------


def pair_term(values, label, row_weight, factor, margin):
    zero, one = T(0), T(1)
    term = values[0] if label == one else one - values[0] - margin
    counts = label == one or (label == -one and not term < zero)
    return row_weight * term if counts else zero, (label * factor if counts else zero,)


def triplet_term(values, row_weight, factor, margin):
    zero, half, one = T(0), T(0.5), T(1)
    least, kept = values[1], one
    if SWAP:
        other = values[2]
        kept = one if least < other else half if least == other else zero
        least = least if least < other or least != least else other
    term = margin + values[0] - least
    counts = not term < zero
    factor = factor if counts else zero
    term = row_weight * term if counts else zero
    if not SWAP:
        return term, (factor, -factor)
    else:
        return term, (factor, -factor * kept, -factor * (one - kept))


def term_and_factors(values, label, row_weight, factor, margin):
    """A row's term, and the factors of its distances' gradients."""
    if THREE:
        return triplet_term(values, row_weight, factor, margin)
    else:
        return pair_term(values, label, row_weight, factor, margin)


# ---- the kernel ---------------------------------------------------------------------------------------


def loop(
    x, y, z, labels, weights, upstream, terms, gx, gy, gz, count, size, deal, p, eps, margin, factor, divisor,
    partials,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
    outputs = gx, gy, gz
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
        own = take(x, y, z, row, live)
        sums, rs = measure(own, row, live, eps, p)
        values, slopes, owns, others = finish(sums, rs, eps, p)
        label = optional(labels, i if live else 0, T(1))
        term, factors = term_and_factors(values, label, row_weight, up * row_weight, margin)
        if WRITES:
            if live:
                store_gradients(outputs, own, row, (factors, slopes, owns, others, values, rs, eps, p))
            elif i < count:
                fill_row(outputs, i * size, lane, team, vectors, fill)
        if lane == 0 and i < count:
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
        blocks = max(1, min(MOST_BLOCKS, -(-(count << deal) // THREADS)))
        return Plan(TEAM, blocks, THREADS, deal, blocks)
    blocks = max(1, min(MOST_BLOCKS, count))
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


def kernel(request: Request, code: int, variant: str, vectors: bool = True) -> Any:
    """The kernel, in plain Python."""
    cosine, together = request.kind == COSINE, variant == TEAM
    bound = lanes(code, vectors, repeat(code, vectors), together)
    T, count = bound["T"], 3 if request.three else 2
    distances = ((0, 1), (0, 2), (1, 2))[: (2 + request.swap) if request.three else 1]
    scales = count if cosine else len(distances)
    sums = count * cosine + len(distances)
    power, root, slope, finished = NORMS.get(request.kind, (None,) * 4)
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
        THREE=request.three,
        SWAP=request.swap,
        WRITES=bool(request.wrt),
        STREAMED=variant == STREAM,
        COSINES=cosine,
        COUNTS=request.kind == LARGEST,
        SCALED=request.kind in (POWER, ROOT_OF_SQUARES, COSINE),
        power_of=power,
        root_of=root,
        slope_of=slope,
        finished=finished,
    )
    return as_kernel(loop, scope, "vectors", (tuple(request), code, vectors))


def signature(request: Request, code: int, summed: bool, divided: bool) -> tuple[Any, ...]:
    """The types of the kernel's arguments; ``none`` is passed as a null pointer."""
    arithmetic, pointer = storage(code).arithmetic, storage(code).pointer
    numbers = types.CPointer(arithmetic)

    def given(present: Any, kind: Any = pointer) -> Any:
        return kind if present else types.none

    r = request
    return (
        pointer,
        pointer,
        given(r.three),
        given(not r.three, numbers),
        given(r.weighted, numbers),
        given(r.upstream, numbers),
        given(r.terms),
        *[given(k in r.wrt) for k in range(3)],
        *[types.int64] * 3,
        *[arithmetic] * 4,
        given(divided, numbers),
        given(summed, numbers),
    )


def compile_kernel(
    request: Request,
    code: int,
    cc: tuple[int, int],
    plan: Plan,
    summed: bool = True,
    divided: bool = False,
    vectors: bool = True,
) -> Binary:
    """Compile the kernel of a request, storage, plan and compute capability."""
    arguments = signature(request, code, summed, divided)
    return compile(kernel(request, code, plan.variant, vectors), arguments, cc, plan.threads)


# ---- launching ----------------------------------------------------------------------------------------


def run(p: Vectors, outputs: dict[str, Any]) -> Any:
    """Write the gradients by the vectors' names; return the value."""
    distance, margin = p.distance, p.numbers[0]
    assert distance is not None and p.functions.options == ("margin",), "the family refuses all others"
    shape = p.vectors[0].shape
    outs = [outputs.get(n) for n in p.names]
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
    request = Request(
        kind_of(distance.kind, distance.p, these.code),
        three=len(given) == 3,
        swap=distance.swap,
        weighted=these.sample_weight is not None,
        upstream=these.upstream is not None,
        terms=terms is not None,
        wrt=tuple(k for k, a in enumerate(outs) if a is not None),
    )
    partials = None if terms is not None else queue.empty((2 * launch.partials,), p.arithmetic)
    absent = [None] * (3 - len(given))
    labels = these.over_rows(p.row_arrays[0] if p.row_arrays else None, p.arithmetic)
    queue.launch(
        (launch.blocks, launch.threads),
        compile_kernel,
        (
            *(*given, *absent, labels, these.sample_weight, these.upstream, terms, *written, *absent),
            *(these.count, shape[-1], launch.deal, distance.p, distance.eps, margin),
            *(these.factor / divisor, gradients_by, partials),
        ),
        request=request,
        code=these.code,
        plan=rows.shape_free(launch),
        summed=partials is not None,
        divided=gradients_by is not None,
        vectors=vectors,
    )
    for output, w in zip(outs, written, strict=True):
        these.copy_back(output, w)
    return these.finish(partials, divisor, by) if terms is None else terms
