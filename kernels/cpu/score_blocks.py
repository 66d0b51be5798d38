"""Blocks of class scores: value, gradients and curvature of the rows of one tile.

A block is a C function of a *record*: int64 slots with addresses, pitches and extents, by name below. Each
block is one of four templates, bound to a definition, a request and an arithmetic dtype; what the request
does not ask for is gone when compiled.

With p = softmax(x), own class y, target t_c and W = sum t_c, and the slopes A, B, R of a row's value by log
p_y, by the cross entropy and by logsumexp (see `kernels.lift`), the gradient is

    g_c = A (d_cy - p_c) + B (W p_c - t_c) + R p_c

Rows lie along the classes (`rows_*`: one row at a time, vectorised along the classes; the exponentials are
stored where the gradient goes, and scaled there) or across them (`columns_*`: a class at a time, vectorised
along the rows).

A row's exponentials are relative to a power of two near that of its largest score, not to this score itself:
nothing is rounded before they are taken, and they have the same digits whatever other scores there are. They
are added up in float64. So classes that are shared out (`shards`) have the gradients of all in one place.
"""

import enum
from functools import cache
from typing import Any, NamedTuple

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.extending import intrinsic

from .. import math, powers
from ..bind import bind
from ..compiler import Brief, Rolled
from ..freeze import fingerprint
from ..lift import MIXED, NORM, OWN, is_linear, lift_score_curvature, lift_scores, moves
from ..math import CPU, bits, multiply_add, select, unbits
from ..spec import ScoreFunctions, ScoreRequest
from .lanes import lanes_of, summer
from .native import HELPER, LINKED, at_address, compile_function, smaller
from .target import (
    WIDTH,
    add_lanes,
    derivatives,
    interleave,
    max_of_lanes,
    new_lanes,
    plus,
    prefer_widest_vectors,
    raise_lanes,
    store_lanes,
)

# Of a record. Addresses of the tile's part of each array, in the order of a call's arrays. Labels are int64,
# class weights of all classes, all else is of the arithmetic dtype; `VALUES` receives the rows' values.
INPUT, TARGET, GRAD, TARGET_GRAD, CURVATURE, CLASS_WEIGHT, ROW_WEIGHT, UPSTREAM, VALUES = range(9)
# Of the first five, as columns: elements from one class to the next.
PITCH = 9
# Classes; the ignored label; the tile's rows; the address of the numbers below; scratch memory of `VECTORS`
# vectors of the rows, or of `PAD` elements, and the bytes from one vector to the next; memory for capped
# scores, as large as the tile, and its pitch.
CLASSES, IGNORE, ROWS, NUMBERS, SCRATCH, STEP, CAPPED, CAPPED_PITCH = range(14, 22)
RECORD = 22

# Of the numbers, in float64: what multiplies gradients; 1 - label_smoothing; label_smoothing / classes; the
# sum of the class weights; the cap of scores; what multiplies the squared logsumexp; then the definition's
# options, and the curvature's floor.
SCALE, KEEP, SPREAD, WEIGHT_SUM, CAP, SQUARE, OPTIONS = range(7)

VECTORS = 16
FEW = 8  # classes up to which each is compared with the rows' own
PAD = 16  # elements of memory in which a row's end is filled up to whole lanes, at least
RUN = 1024  # elements whose exponentials are taken and added up before the next ones are
GROUP = 64  # classes of columns of probabilities that are summed before their sum is added to the others'
LONG = 8192  # classes from which the processor does not fetch the next row by itself while it computes
LINE = 64  # bytes that are fetched at once
# One eighth of the next row is fetched while this one is read for its maximum, four while its exponentials
# are taken, three while they are scaled: about as long as each takes. Together more than memory gives would
# stall.

SIGNATURE = types.float64(types.int64)

# Bound by `compile_block`: the arithmetic dtype and the bytes of its elements; functions of a number; the
# definition, and its options from the numbers; what the request asks for; what the definition depends on
# (`HAS_*`), whether its second derivatives are not zero, whether it is zero where the cross entropy is.
T: Any = np.float32
ITEM: Any = 4
WIDE: Any = 64
NARROW: Any = 16
exp: Any = None
reference: Any = None
plain: Any = None
sum_in_lanes: Any = None
log: Any = None
log1p: Any = None
tanh: Any = None
loss: Any = None
options: Any = None
WEIGHTED: Any = False
SMOOTHED: Any = False
FACTORS: Any = False
VALUED: Any = True
HAS_GRAD: Any = True
HAS_TARGET_GRAD: Any = False
BY_WEIGHT: Any = False
HAS_CURVATURE: Any = False
CAPS: Any = False
HAS_OWN: Any = False
HAS_MIXED: Any = True
HAS_NORM: Any = False
CURVED: Any = False
LINEAR: Any = True  # not curved, and without label smoothing
OF_FEW: Any = True  # whether columns may be of few classes, and of more
OF_MANY: Any = True
MULTIPLE: Any = True
# What stands for the curvature, if not that itself; where its floor is.
STANDS_IN: Any = False
FLOORED: Any = False
FLOOR: Any = OPTIONS
stands: Any = None


# ---- helpers of loops --------------------------------------------------------------------------------------


@intrinsic
def prefetch(typingctx, address):
    """Have a line of memory, which need not exist, brought to cache."""

    def codegen(context, builder, sig, args):
        number, place = ir.IntType(32), builder.inttoptr(args[0], ir.IntType(8).as_pointer())
        kind = ir.FunctionType(ir.VoidType(), [place.type, number, number, number])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        builder.call(function, [place, number(0), number(2), number(1)])
        return context.get_dummy_value()

    return types.void(types.int64), codegen


@njit(**HELPER)
def fetch_next(row, classes, item, start, stop, first, count):
    """Prefetch the part of the next row that goes with elements start..stop of a long one.

    In all that is `count` eighths of the row, from the eighth numbered `first`.
    """
    if classes >= LONG:
        base = row + (classes + classes // 8 * first) * item
        at, end = base + start // 8 * count * item, base + stop // 8 * count * item
        while at < end:
            prefetch(at)
            at += LINE


@njit(**HELPER)
def fetch_next_tile(column, step, size):
    """Prefetch what follows a tile's part of a column, as many bytes; `step` is from a column to the next."""
    if step >= 2 * size:
        for k in range(size, 2 * size, LINE):
            prefetch(column + k)


def largest(at, count):
    """Return the largest of a row of at least `WIDE` elements; a NaN may be left out."""
    tops = new_lanes(WIDE, T(0))
    for k in range(WIDE):
        tops[k] = at_address(at, T(0))[k]
    for start in range(0, count, 4 * RUN):
        stop = smaller(start + 4 * RUN, count)
        for i in range(start, stop, WIDE):  # the row's last ones overlap those before
            raise_lanes(tops, at_address(at + smaller(i, count - WIDE) * ITEM, T(0)), WIDE)
        fetch_next(at, count, ITEM, start, stop, 0, 1)
    return max_of_lanes(tops, WIDE)


def exponential(k, x, g, shift, low):
    """Store an element's exponential by the row's `reference`, whose base is 0."""
    g[k] = exp(x[k], shift, low)


def exponential_of_column(i, x, g, shifts, lows):
    """The same in a column: each row has a reference."""
    g[i] = exp(x[i], shifts[i], lows[i])


def exponential_but_own(i, x, g, shifts, lows, own, powers, c):
    """The same, but of a row of class c: 0 there, and the exponential is added to its power.

    A select between two results: one between a result and the number that is there would be a masked store,
    which some processors do at a tenth of the speed.
    """
    e, mine = exp(x[i], shifts[i], lows[i]), own[i] == c
    g[i] = select(mine, T(0), e)
    powers[i] += select(mine, e, T(0))


def gradient_of_column(i, g, slopes, own, grad_own, c):
    """Store a row's gradient by class c where its exponential is."""
    of_other = select(slopes[i] == T(0), T(0), slopes[i] * g[i])
    g[i] = select(own[i] == c, grad_own[i], of_other)


def curvature_of_column(i, g, h, slopes, factors, totals, own, hess_own, c):
    """Store a row's curvature by class c, of its exponential."""
    e = g[i]
    of_other = select(slopes[i] == T(0), T(0), factors[i] * e * (totals[i] - e))
    h[i] = select(own[i] == c, hess_own[i], of_other)


def sum_columns(at, step, classes, rows, sums):
    """Store the rows' sums at an address, of columns `step` bytes apart; they are added up in float64."""
    if rows < NARROW:
        for i in range(rows):
            total = 0.0
            for c in range(classes):
                total += at_address(at + c * step, T(0))[i]
            at_address(sums, T(0))[i] = T(total)
        return
    for start in range(0, rows, NARROW):  # the last ones overlap those before
        first = smaller(start, rows - NARROW)
        lanes = new_lanes(NARROW, 0.0)
        for c in range(classes):
            add_lanes(lanes, at_address(at + c * step + first * ITEM, T(0)), NARROW)
        store_lanes(at_address(sums + first * ITEM, T(0)), lanes, NARROW)


class Exponential(NamedTuple):
    """Exponentials of a row's scores, in one format: all but the subnormal ones, which are 0.

    A third quicker than `math.exp`; and subnormal numbers, which cost a hundred times a normal one, hardly
    ever enter the sums and products.

    Attributes
    ----------
    exp : function
        ``exp(x - base, shift, low)``: e**x relative to a row's reference.
    reference : function
        ``base, shift, low = reference(m)`` of a row's largest score. The base is 0, and e**x is divided by
        2**k, with k the nearest to m / log(2); or, where m is so large that a score less m is exact, the base
        is m.
    plain : function
        ``plain(x)``: e**x of a number that is not positive.
    exponent : function
        ``exponent(shift)``: that k, in float64.
    """

    exp: Any
    reference: Any
    plain: Any
    exponent: Any


def exponential_in(form: math.Format) -> Exponential:
    """Compile the exponentials of a format."""
    F, Z = form.float, form.int
    ZERO, ONE, LOG2_E, LOG_2 = F(0), F(1), F(powers.LOG2_E), F(powers.LOG_2)
    LOG2_HIGH, LOG2_LOW = F(form.log2[0]), F(form.log2[1])
    POLYNOMIAL = (ONE, ONE, *(F(c) for c in form.exp))
    MANTISSA, LARGE = Z(form.mantissa), F(powers.LARGE)
    # Its sum with v has round(v) in the low bits; with the bias added, that is an exponent field.
    ROUND, BIAS = F(1.5 * 2.0**form.mantissa), F(form.bias)
    SHIFT, LOW = F(ROUND + BIAS), F(-BIAS * LOG_2)

    @njit(**math.STRICT)
    def exp(x, shift, low):
        x = select(x < low, low, x)  # the exponent field is 0 there, and so is that power of two
        t = multiply_add(x, LOG2_E, shift)
        n = t - shift
        r = multiply_add(n, -LOG2_LOW, multiply_add(n, -LOG2_HIGH, x))
        return math.polynomial(r, POLYNOMIAL) * unbits(Z(bits(t) << MANTISSA))

    @njit(**math.STRICT)
    def reference(m):
        base = select(abs(m) <= LARGE, ZERO, m)
        k = multiply_add(m - base, LOG2_E, ROUND) - ROUND
        return base, SHIFT - k, (k - BIAS) * LOG_2

    @njit(**math.STRICT)
    def plain(x):
        return exp(x, SHIFT, LOW)

    @njit(**math.STRICT)
    def exponent(shift):
        return np.float64(SHIFT - shift)

    return Exponential(exp, reference, plain, exponent)


EXPONENTIAL = {types.float32: exponential_in(math.SINGLE), types.float64: exponential_in(math.DOUBLE)}


# ---- rows --------------------------------------------------------------------------------------------------


def rows_of_labels(record):
    """Rows of labels; gives the sum of their values."""
    prefer_widest_vectors()
    a = at_address(record, 0)
    numbers = at_address(a[NUMBERS], 0.0)
    zero, one, nothing = T(0), T(1), T(-np.inf)
    scale, keep, spread = T(numbers[SCALE]), T(numbers[KEEP]), T(numbers[SPREAD])
    weight_sum, cap, square = T(numbers[WEIGHT_SUM]), T(numbers[CAP]), T(numbers[SQUARE])
    o, floor = options(numbers, zero), zero
    if FLOORED:
        floor = T(numbers[FLOOR])
    classes, ignore, pad = a[CLASSES], a[IGNORE], a[SCRATCH]
    labels, values = at_address(a[TARGET], 0), at_address(a[VALUES], zero)
    weight = at_address(a[CLASS_WEIGHT], zero)
    row_weights, upstream = at_address(a[ROW_WEIGHT], zero), at_address(a[UPSTREAM], zero)
    whole = classes - classes % NARROW
    total_value = 0.0
    for row in range(a[ROWS]):
        row_bytes = row * classes * ITEM
        x_at, g_at, h_at = a[INPUT] + row_bytes, a[GRAD] + row_bytes, a[CURVATURE] + row_bytes
        g, h = at_address(g_at, zero), at_address(h_at, zero)
        label = labels[row]
        live = label != ignore
        own_weight = row_weight = one
        if live:
            if WEIGHTED:
                own_weight = weight[label]
            if FACTORS:
                row_weight = row_weights[row]
                live = row_weight != zero
        # The target's mass at the row's class, but for smoothing; and over all classes.
        own_mass = mass = own_weight
        if SMOOTHED:
            own_mass = keep * own_weight
            mass = multiply_add(spread, weight_sum, own_mass)
        if MULTIPLE:
            live = live & ((own_mass != zero) | (mass != zero))
        if not live:  # the row is not even read
            values[row] = zero
            if HAS_GRAD:
                for i in range(classes):
                    g[i] = zero
            if HAS_CURVATURE:
                for i in range(classes):
                    h[i] = zero
            continue
        if CAPS:
            scores, x_at = at_address(x_at, zero), a[CAPPED]
            capped = at_address(x_at, zero)
            for i in range(classes):
                capped[i] = cap * tanh(scores[i] / cap)
        x = at_address(x_at, zero)
        hit = x[label]
        m = largest(x_at, classes)
        base, shift, low = reference(m)
        far = zero
        if SMOOTHED:
            distances = 0.0
            for start in range(0, classes, RUN):
                part = zero
                xs, ws = (
                    at_address(x_at + start * ITEM, zero),
                    at_address(a[CLASS_WEIGHT] + start * ITEM, zero),
                )
                for i in range(smaller(RUN, classes - start)):
                    part = plus(part, select(ws[i] == zero, zero, ws[i] * (m - xs[i])))
                distances += part
            far = zero if spread == zero else T(distances)
        # Exponentials, where the gradient goes. The row's end is done in scratch memory, filled up to whole
        # lanes: a few scalar exponentials would cost as much as hundreds in vectors. The one of the row's own
        # class is not summed.
        sum_of_others, start, source_at = 0.0, 0, x_at
        if base != zero:
            source_at = g_at
            for i in range(classes):
                g[i] = x[i] - base
        source = at_address(source_at, zero)
        while start < classes:
            end = start >= whole
            size = NARROW if end else smaller(whole - start, RUN)
            count = classes - start if end else size
            scores_at, run_at = (pad, pad) if end else (source_at + start * ITEM, g_at + start * ITEM)
            run = at_address(run_at, zero)
            if end:
                for i in range(NARROW):
                    run[i] = nothing
                for i in range(count):
                    run[i] = source[start + i]
            interleave(exponential, size, (at_address(scores_at, zero), run, shift, low))
            if start <= label < start + count:
                run[label - start] = zero
            sum_of_others += sum_in_lanes(run_at, size)
            if end:
                for i in range(count):
                    g[start + i] = run[i]
            else:
                fetch_next(x_at, classes, ITEM, start, start + size, 1, 4)
            start += size
        others, own, top = T(sum_of_others), exp(hit - base, shift, low), exp(m - base, shift, low)
        total = own + others
        log_total = log1p(select(hit == m, others, (others - top) + own) / top)
        inverse = one / total
        entropy = mass * log_total
        if SMOOTHED:
            entropy = multiply_add(mass, log_total, spread * far)
        entropy += select(own_mass == zero, zero, own_mass * (m - hit))
        p, rest = own * inverse, others * inverse
        d = loss(-((m - hit) + log_total), rest, p, own_weight, entropy, m + log_total, square, o)
        value = d[0]
        if FACTORS:
            value = row_weight * value
        values[row] = value
        total_value += value
        if HAS_GRAD:
            up = scale
            if FACTORS:
                up = scale * upstream[row] * row_weight
            slope = zero  # what multiplies p_c
            if HAS_MIXED:
                slope = d[2] * mass
            if HAS_NORM:
                slope = slope + d[3] if HAS_MIXED else d[3]
            if HAS_OWN:
                slope = slope - d[1]
            r = up * slope * inverse
            if HAS_CURVATURE:
                # The exponentials' sum is not below any of them, so this is not negative by rounding.
                factor = r * inverse
                for i in range(classes):
                    h[i] = factor * g[i] * (total - g[i])
                h_own = r * own * (others * inverse)
                if CURVED:
                    u1, u2, u3 = rest, -own_mass * rest, p
                    if SMOOTHED:
                        u2 = (
                            spread * (weight_sum - own_weight) * own
                            - (own_mass + spread * own_weight) * others
                        )
                        u2 = u2 * inverse
                    quadratic = d[4] * u1 * u1 + d[5] * u2 * u2 + d[6] * u3 * u3
                    quadratic += d[7] * u1 * u2 + d[8] * u1 * u3 + d[9] * u2 * u3
                    h_own += up * quadratic
                    if SMOOTHED:
                        of_p, of_both, of_t = d[4] + d[6] - d[8], d[9] - d[7], d[5]
                        for i in range(classes):
                            pi = g[i] * inverse
                            u = mass * pi - spread * weight[i]
                            h[i] += up * (of_p * pi * pi + u * (of_both * pi + of_t * u))
                    else:
                        of_p = d[4] + d[6] - d[8] + mass * (mass * d[5] + d[9] - d[7])
                        factor = up * of_p * inverse * inverse
                        for i in range(classes):
                            h[i] += factor * g[i] * g[i]
                h[label] = h_own
            for start in range(0, classes, RUN):
                run = at_address(g_at + start * ITEM, zero)
                count = smaller(RUN, classes - start)
                if SMOOTHED and HAS_MIXED:
                    asked = up * d[2] * spread  # by label smoothing, of each class
                    ws = at_address(a[CLASS_WEIGHT] + start * ITEM, zero)
                    for i in range(count):
                        run[i] = multiply_add(r, run[i], -(asked * ws[i]))
                else:
                    for i in range(count):
                        run[i] = r * run[i]
                fetch_next(x_at, classes, ITEM, start, start + count, 5, 3)
            # Of its own class's gradient all that cancels is left out.
            slope = zero
            if HAS_MIXED:
                if SMOOTHED:
                    t = own_mass + spread * own_weight
                    slope = d[2] * (spread * (weight_sum - own_weight) * own - t * others)
                else:
                    slope = d[2] * (-own_mass * others)
            if HAS_NORM:
                slope += d[3] * own
            if HAS_OWN:
                slope += d[1] * others
            g[label] = up * slope * inverse
            if CAPS:
                for i in range(classes):
                    t = x[i] / cap
                    by = one - t * t
                    if HAS_CURVATURE:
                        h[i] = h[i] * by * by - g[i] * (t + t) * by / cap
                    g[i] = g[i] * by
            if STANDS_IN:
                for i in range(classes):
                    h[i] = stands(g[i], h[i], up, r * total, floor)
    return total_value


def rows_of_probabilities(record):
    """Rows of probabilities; gives the sum of their values."""
    prefer_widest_vectors()
    a = at_address(record, 0)
    numbers = at_address(a[NUMBERS], 0.0)
    zero, one = T(0), T(1)
    scale, keep, spread = T(numbers[SCALE]), T(numbers[KEEP]), T(numbers[SPREAD])
    cap, square = T(numbers[CAP]), T(numbers[SQUARE])
    o, floor = options(numbers, zero), zero
    if FLOORED:
        floor = T(numbers[FLOOR])
    classes, values = a[CLASSES], at_address(a[VALUES], zero)
    weight = at_address(a[CLASS_WEIGHT], zero)
    row_weights, upstream = at_address(a[ROW_WEIGHT], zero), at_address(a[UPSTREAM], zero)
    total_value = 0.0
    for row in range(a[ROWS]):
        row_bytes = row * classes * ITEM
        x_at, g_at, h_at = a[INPUT] + row_bytes, a[GRAD] + row_bytes, a[CURVATURE] + row_bytes
        q_at, gq_at = a[TARGET] + row_bytes, a[TARGET_GRAD] + row_bytes
        g, h = at_address(g_at, zero), at_address(h_at, zero)
        q, gq = at_address(q_at, zero), at_address(gq_at, zero)
        row_weight = one
        if FACTORS:
            row_weight = row_weights[row]
            if row_weight == zero:
                values[row] = zero
                for i in range(classes):
                    if HAS_GRAD:
                        g[i] = zero
                    if HAS_TARGET_GRAD:
                        gq[i] = zero
                    if HAS_CURVATURE:
                        h[i] = zero
                continue
        if CAPS:
            scores, x_at = at_address(x_at, zero), a[CAPPED]
            capped = at_address(x_at, zero)
            for i in range(classes):
                capped[i] = cap * tanh(scores[i] / cap)
        x = at_address(x_at, zero)
        if x_at != g_at:
            for i in range(classes):
                g[i] = x[i]
        m = largest(g_at, classes)
        # Sums of exponentials, of the target's mass, and of the scores' distances from the maximum by it. In
        # place of the scores come exponentials, or distances where the target's gradient needs them.
        sum_e = sum_t = sum_far = 0.0
        for start in range(0, classes, RUN):
            run, qs = at_address(g_at + start * ITEM, zero), at_address(q_at + start * ITEM, zero)
            ws = at_address(a[CLASS_WEIGHT] + start * ITEM, zero)
            part_e = part_t = part_far = zero
            for i in range(smaller(RUN, classes - start)):
                d = m - run[i]
                e = plain(-d)
                run[i] = d if HAS_TARGET_GRAD else e
                t = ws[i] * (keep * qs[i] + spread)
                part_e = plus(part_e, e)
                part_t = plus(part_t, t)
                part_far = plus(part_far, select(t == zero, zero, t * d))
            sum_e += part_e
            sum_t += part_t
            sum_far += part_far
        total, mass = T(sum_e), T(sum_t)
        log_total = log(total)
        entropy = T(sum_far) + (mass * log_total if mass != zero else zero)
        d_ = loss(zero, zero, zero, one, entropy, m + log_total, square, o)
        value = d_[0]
        if FACTORS:
            value = row_weight * value
        values[row] = value
        total_value += value
        if not HAS_GRAD and not HAS_TARGET_GRAD:
            continue
        up = scale
        if FACTORS:
            up = scale * row_weight * upstream[row]
        inverse = one / total
        slope = zero
        if HAS_MIXED:
            slope = d_[2] * mass
        if HAS_NORM:
            slope = slope + d_[3] if HAS_MIXED else d_[3]
        r = up * slope * inverse
        by_target = zero
        if HAS_MIXED:
            by_target = up * d_[2]
        if HAS_TARGET_GRAD:
            for i in range(classes):
                distance = g[i]
                if HAS_GRAD:
                    t = by_target * weight[i] * (keep * q[i] + spread)
                    g[i] = r * plain(-distance) - t
                if BY_WEIGHT:
                    gq[i] = by_target * (distance + log_total)
                else:
                    by = by_target * keep * weight[i]
                    gq[i] = select(weight[i] == zero, zero, by * (distance + log_total))
        else:
            if HAS_CURVATURE:
                factor = r * inverse
                for i in range(classes):
                    h[i] = factor * g[i] * (total - g[i])
                if CURVED:
                    for i in range(classes):
                        pi = g[i] * inverse
                        u = mass * pi - weight[i] * (keep * q[i] + spread)
                        h[i] += up * (d_[6] * pi * pi + u * (d_[9] * pi + d_[5] * u))
            for i in range(classes):
                g[i] = r * g[i] - by_target * weight[i] * (keep * q[i] + spread)
        if CAPS and HAS_GRAD:
            for i in range(classes):
                t = x[i] / cap
                by = one - t * t
                if HAS_CURVATURE:
                    h[i] = h[i] * by * by - g[i] * (t + t) * by / cap
                g[i] = g[i] * by
        if STANDS_IN:
            for i in range(classes):
                h[i] = stands(g[i], h[i], up, r * total, floor)
    return total_value


# ---- columns -----------------------------------------------------------------------------------------------


def columns_of_labels(record):
    """Rows of labels, that lie across; gives the sum of their values."""
    prefer_widest_vectors()
    a = at_address(record, 0)
    numbers = at_address(a[NUMBERS], 0.0)
    zero, one = T(0), T(1)
    scale, keep, spread = T(numbers[SCALE]), T(numbers[KEEP]), T(numbers[SPREAD])
    weight_sum, cap, square = T(numbers[WEIGHT_SUM]), T(numbers[CAP]), T(numbers[SQUARE])
    o, floor = options(numbers, zero), zero
    if FLOORED:
        floor = T(numbers[FLOOR])
    classes, ignore, rows = a[CLASSES], a[IGNORE], a[ROWS]
    labels, weight = at_address(a[TARGET], 0), at_address(a[CLASS_WEIGHT], zero)
    row_weights, upstream = at_address(a[ROW_WEIGHT], zero), at_address(a[UPSTREAM], zero)
    x_at, x_step = a[INPUT], a[PITCH + INPUT] * ITEM
    g_at, g_step = a[GRAD], a[PITCH + GRAD] * ITEM
    h_at, h_step = a[CURVATURE], a[PITCH + CURVATURE] * ITEM
    scratch, step = a[SCRATCH], a[STEP]
    m, others, hit = (
        at_address(scratch, zero),
        at_address(scratch + step, zero),
        at_address(scratch + 2 * step, zero),
    )
    own, factors = at_address(scratch + 3 * step, np.int32(0)), at_address(scratch + 4 * step, zero)
    own_weights, far = at_address(scratch + 5 * step, zero), at_address(scratch + 6 * step, zero)
    totals, masses = at_address(scratch + 7 * step, zero), at_address(scratch + 8 * step, zero)
    of_p, of_both = at_address(scratch + 9 * step, zero), at_address(scratch + 10 * step, zero)
    of_t, hess_own = at_address(scratch + 11 * step, zero), at_address(scratch + 12 * step, zero)
    ups, most = at_address(scratch + 13 * step, zero), at_address(scratch + 14 * step, zero)
    own_powers = at_address(scratch + 15 * step, zero)
    if CAPS:
        for c in range(classes):
            scores, capped = (
                at_address(x_at + c * x_step, zero),
                at_address(a[CAPPED] + c * a[CAPPED_PITCH] * ITEM, zero),
            )
            for i in range(rows):
                capped[i] = cap * tanh(scores[i] / cap)
        x_at, x_step = a[CAPPED], a[CAPPED_PITCH] * ITEM
    for i in range(rows):
        label = labels[i]
        live = label != ignore
        if FACTORS:
            live = live & (row_weights[i] != zero)
        label = label if live else 0
        if WEIGHTED:
            w = weight[label]
            own_weights[i] = w
            if MULTIPLE:
                if SMOOTHED:
                    live = live & ((keep * w != zero) | (keep * w + spread * weight_sum != zero))
                else:
                    live = live & (w != zero)
        own[i] = np.int32(label) if live else np.int32(-1)
        if VALUED or CURVED:
            hit[i] = at_address(x_at + label * x_step, zero)[i]
    first = at_address(x_at, zero)
    for i in range(rows):
        m[i] = first[i]
    # Three at once: LLVM makes one alone a masked store, which some processors do at a tenth of the speed.
    for c in range(1, classes, 3):
        x = at_address(x_at + c * x_step, zero)
        y = at_address(x_at + smaller(c + 1, classes - 1) * x_step, zero)
        z = at_address(x_at + smaller(c + 2, classes - 1) * x_step, zero)
        for i in range(rows):
            top = select(x[i] > m[i], x[i], m[i])
            then = select(y[i] > z[i], y[i], z[i])
            m[i] = select(then > top, then, top)
    if SMOOTHED:
        for i in range(rows):
            far[i] = zero
        if spread != zero:
            for c in range(classes):
                w, x = weight[c], at_address(x_at + c * x_step, zero)
                if w != zero:
                    for i in range(rows):
                        far[i] += w * (m[i] - x[i])
    bases, shifts, lows, moved = totals, masses, factors, 0
    for i in range(rows):
        bases[i], shifts[i], lows[i] = reference(m[i])
        moved += bases[i] != zero
    source_at, source_step = x_at, x_step
    if moved:
        source_at, source_step = g_at, g_step
        for c in range(classes):
            x, g = at_address(x_at + c * x_step, zero), at_address(g_at + c * g_step, zero)
            for i in range(rows):
                g[i] = x[i] - bases[i]
    # That of the row's own class is not summed.
    few = OF_FEW
    if OF_FEW and OF_MANY:
        few = classes <= FEW
    if OF_FEW and few:
        for i in range(rows):
            own_powers[i] = zero
    for c in range(classes):
        x, g = at_address(source_at + c * source_step, zero), at_address(g_at + c * g_step, zero)
        fetch_next_tile(source_at + c * source_step, source_step, rows * ITEM)
        if OF_FEW and few:
            interleave(exponential_but_own, rows, (x, g, shifts, lows, own, own_powers, np.int32(c)))
        if OF_MANY and not few:
            interleave(exponential_of_column, rows, (x, g, shifts, lows))
    if OF_MANY and not few:
        for i in range(rows):
            live = own[i] >= 0
            power = at_address(g_at + (own[i] if live else np.int32(0)) * g_step, zero)
            own_powers[i] = power[i]
            power[i] = zero if live else power[i]
    sum_columns(g_at, g_step, classes, rows, scratch + step)  # the others
    # Results take the place of vectors that are done with: LLVM has fewer pointers to tell apart.
    slopes, grad_own, values, asked = m, others, hit, far
    for i in range(rows):
        live = own[i] >= 0
        base, shift, low, largest_score = bases[i], shifts[i], lows[i], m[i]
        s, e, top = others[i], own_powers[i], exp(largest_score - base, shift, low)
        distance = largest_score - hit[i]
        log_total = log1p(select(hit[i] == largest_score, s, (s - top) + e) / top)
        total = s + e
        inverse = one / total
        own_weight = one
        if WEIGHTED:
            own_weight = own_weights[i]
        own_mass = mass = own_weight
        if SMOOTHED:
            own_mass = keep * own_weight
            mass = multiply_add(spread, weight_sum, own_mass)
            entropy = multiply_add(mass, log_total, spread * far[i])
        else:
            entropy = mass * log_total
        entropy += select(own_mass == zero, zero, own_mass * distance)
        p, rest = e * inverse, s * inverse
        d = loss(-(distance + log_total), rest, p, own_weight, entropy, largest_score + log_total, square, o)
        if VALUED:
            value = d[0]
            if FACTORS:
                value = row_weights[i] * value
            values[i] = select(live, value, zero)
        if HAS_GRAD:
            up = scale
            if FACTORS:
                up = scale * upstream[i] * row_weights[i]
            slope = zero
            if HAS_MIXED:
                slope = d[2] * mass
            if HAS_NORM:
                slope = slope + d[3] if HAS_MIXED else d[3]
            if HAS_OWN:
                slope = slope - d[1]
            r = up * slope * inverse
            slope = zero
            if HAS_MIXED:
                if SMOOTHED:
                    t = own_mass + spread * own_weight
                    slope = d[2] * (spread * (weight_sum - own_weight) * e - t * s)
                else:
                    slope = d[2] * (-own_mass * s)
            if HAS_NORM:
                slope += d[3] * e
            if HAS_OWN:
                slope += d[1] * s
            grad_own[i] = up * slope * inverse
            slopes[i] = select(live, r, zero)
            if STANDS_IN:
                ups[i], most[i] = select(live, up, zero), select(live, r * total, zero)
            if SMOOTHED and HAS_MIXED:
                asked[i] = select(live, up * d[2] * spread, zero)
            if HAS_CURVATURE:
                totals[i], factors[i] = total, r * inverse
                h_own = r * e * (s * inverse)
                if CURVED:
                    u1, u2, u3 = rest, -own_mass * rest, p
                    if SMOOTHED:
                        u2 = (
                            spread * (weight_sum - own_weight) * e - (own_mass + spread * own_weight) * s
                        ) * inverse
                    quadratic = d[4] * u1 * u1 + d[5] * u2 * u2 + d[6] * u3 * u3
                    quadratic += d[7] * u1 * u2 + d[8] * u1 * u3 + d[9] * u2 * u3
                    h_own += up * quadratic
                    of_own_and_norm = d[4] + d[6] - d[8]
                    if SMOOTHED:
                        masses[i] = select(live, mass, zero)
                        of_p[i] = select(live, up * of_own_and_norm, zero)
                        of_both[i] = select(live, up * (d[9] - d[7]), zero)
                        of_t[i] = select(live, up * d[5], zero)
                    else:
                        q = up * (of_own_and_norm + mass * (mass * d[5] + d[9] - d[7]))
                        of_p[i] = select(live, q, zero)
                hess_own[i] = h_own
    if HAS_GRAD:
        done = 0
        if LINEAR and OF_FEW:
            done = classes if few else 0
            for c in range(done):
                g, k = at_address(g_at + c * g_step, zero), np.int32(c)
                if HAS_CURVATURE:
                    h = at_address(h_at + c * h_step, zero)
                    interleave(curvature_of_column, rows, (g, h, slopes, factors, totals, own, hess_own, k))
                interleave(gradient_of_column, rows, (g, slopes, own, grad_own, k))
        for c in range(done, classes):
            g = at_address(g_at + c * g_step, zero)
            w = zero
            if SMOOTHED:
                w = weight[c]
            if HAS_CURVATURE:
                h = at_address(h_at + c * h_step, zero)
                for i in range(rows):
                    e = g[i]
                    h[i] = select(slopes[i] == zero, zero, factors[i] * e * (totals[i] - e))
                if CURVED:
                    for i in range(rows):
                        p = g[i] / totals[i]
                        quadratic = of_p[i] * p * p
                        if SMOOTHED:
                            u = masses[i] * p - spread * w
                            quadratic += u * (of_both[i] * p + of_t[i] * u)
                        h[i] += select(own[i] < np.int32(0), zero, quadratic)
            if SMOOTHED and HAS_MIXED:
                for i in range(rows):
                    e = select(slopes[i] == zero, zero, g[i])
                    g[i] = multiply_add(slopes[i], e, -(asked[i] * w))
            else:
                for i in range(rows):
                    g[i] = select(slopes[i] == zero, zero, slopes[i] * g[i])
        for i in range(0 if done else rows):
            c = own[i]
            if c >= 0:
                at_address(g_at + c * g_step, zero)[i] = grad_own[i]
                if HAS_CURVATURE:
                    at_address(h_at + c * h_step, zero)[i] = hess_own[i]
        if CAPS:
            for c in range(classes):
                g, h = at_address(g_at + c * g_step, zero), at_address(h_at + c * h_step, zero)
                x = at_address(x_at + c * x_step, zero)
                for i in range(rows):
                    t = x[i] / cap
                    by = one - t * t
                    live = own[i] >= 0
                    if HAS_CURVATURE:
                        h[i] = select(live, h[i] * by * by - g[i] * (t + t) * by / cap, zero)
                    g[i] = select(live, g[i] * by, zero)
        if STANDS_IN:
            for c in range(classes):
                g, h = at_address(g_at + c * g_step, zero), at_address(h_at + c * h_step, zero)
                for i in range(rows):
                    h[i] = stands(g[i], h[i], ups[i], most[i], floor)
    if not VALUED:
        return 0.0
    out = at_address(a[VALUES], zero)
    for i in range(rows):
        out[i] = values[i]
    return sum_in_lanes(a[VALUES], rows)


def columns_of_probabilities(record):
    """Rows of probabilities, that lie across; gives the sum of their values."""
    prefer_widest_vectors()
    a = at_address(record, 0)
    numbers = at_address(a[NUMBERS], 0.0)
    zero, one = T(0), T(1)
    scale, keep, spread = T(numbers[SCALE]), T(numbers[KEEP]), T(numbers[SPREAD])
    cap, square = T(numbers[CAP]), T(numbers[SQUARE])
    o, floor = options(numbers, zero), zero
    if FLOORED:
        floor = T(numbers[FLOOR])
    classes, rows = a[CLASSES], a[ROWS]
    weight = at_address(a[CLASS_WEIGHT], zero)
    row_weights, upstream = at_address(a[ROW_WEIGHT], zero), at_address(a[UPSTREAM], zero)
    x_at, x_step = a[INPUT], a[PITCH + INPUT] * ITEM
    q_at, q_step = a[TARGET], a[PITCH + TARGET] * ITEM
    g_at, g_step = a[GRAD], a[PITCH + GRAD] * ITEM
    gq_at, gq_step = a[TARGET_GRAD], a[PITCH + TARGET_GRAD] * ITEM
    h_at, h_step = a[CURVATURE], a[PITCH + CURVATURE] * ITEM
    scratch, step = a[SCRATCH], a[STEP]
    m, total, mass = (
        at_address(scratch, zero),
        at_address(scratch + step, zero),
        at_address(scratch + 2 * step, zero),
    )
    far, part = at_address(scratch + 3 * step, zero), at_address(scratch + 4 * step, zero)
    of_p, of_both = at_address(scratch + 5 * step, zero), at_address(scratch + 6 * step, zero)
    of_t, by_target = at_address(scratch + 7 * step, zero), at_address(scratch + 8 * step, zero)
    ups, most = at_address(scratch + 9 * step, zero), at_address(scratch + 10 * step, zero)
    if CAPS:
        for c in range(classes):
            scores, capped = (
                at_address(x_at + c * x_step, zero),
                at_address(a[CAPPED] + c * a[CAPPED_PITCH] * ITEM, zero),
            )
            for i in range(rows):
                capped[i] = cap * tanh(scores[i] / cap)
        x_at, x_step = a[CAPPED], a[CAPPED_PITCH] * ITEM
    first = at_address(x_at, zero)
    for i in range(rows):
        m[i] = first[i]
    # Three at once: LLVM makes one alone a masked store, which some processors do at a tenth of the speed.
    for c in range(1, classes, 3):
        x = at_address(x_at + c * x_step, zero)
        y = at_address(x_at + smaller(c + 1, classes - 1) * x_step, zero)
        z = at_address(x_at + smaller(c + 2, classes - 1) * x_step, zero)
        for i in range(rows):
            top = select(x[i] > m[i], x[i], m[i])
            then = select(y[i] > z[i], y[i], z[i])
            m[i] = select(then > top, then, top)
    for i in range(rows):
        total[i] = zero
    for i in range(rows):
        mass[i] = zero
    for i in range(rows):
        far[i] = zero
    for start in range(0, classes, GROUP):
        for i in range(rows):
            part[i] = zero
        for c in range(start, smaller(start + GROUP, classes)):
            w, g, q = weight[c], at_address(g_at + c * g_step, zero), at_address(q_at + c * q_step, zero)
            if x_at != g_at:
                x = at_address(x_at + c * x_step, zero)
                for i in range(rows):
                    g[i] = x[i]
            for i in range(rows):
                d = m[i] - g[i]
                e = plain(-d)
                g[i] = d if HAS_TARGET_GRAD else e
                t = w * (keep * q[i] + spread)
                part[i] += e
                mass[i] += t
                far[i] += select(t == zero, zero, t * d)
        for i in range(rows):
            total[i] += part[i]
    # Results take the place of vectors that are done with.
    slopes, values, log_totals = m, far, part
    for i in range(rows):
        log_total = log(total[i])
        entropy = far[i] + select(mass[i] == zero, zero, mass[i] * log_total)
        d_ = loss(zero, zero, zero, one, entropy, m[i] + log_total, square, o)
        value, up, live = d_[0], scale, True
        if FACTORS:
            live = row_weights[i] != zero
            value = select(live, row_weights[i] * value, zero)
            up = upstream[i] * (scale * row_weights[i])
        values[i] = value
        slope = zero
        if HAS_MIXED:
            slope = d_[2] * mass[i]
            by_target[i] = select(live, up * d_[2], zero)
        else:
            by_target[i] = zero
        if HAS_NORM:
            slope = slope + d_[3] if HAS_MIXED else d_[3]
        slopes[i] = select(live, up * slope / total[i], zero)
        if STANDS_IN:
            ups[i], most[i] = select(live, up, zero), select(live, up * slope, zero)
        log_totals[i] = log_total
        if CURVED and HAS_CURVATURE:
            of_p[i] = select(live, up * d_[6], zero)
            of_both[i] = select(live, up * d_[9], zero)
            of_t[i] = select(live, up * d_[5], zero)
    if HAS_GRAD or HAS_TARGET_GRAD:
        for c in range(classes):
            w, g, q = weight[c], at_address(g_at + c * g_step, zero), at_address(q_at + c * q_step, zero)
            if HAS_TARGET_GRAD:
                gq = at_address(gq_at + c * gq_step, zero)
                for i in range(rows):
                    d, by = g[i], by_target[i]
                    t = by * w
                    if HAS_GRAD:
                        x_slope = slopes[i] * plain(-d) - t * (keep * q[i] + spread)
                        g[i] = select((by == zero) & (slopes[i] == zero), zero, x_slope)
                    if BY_WEIGHT:
                        gq[i] = select(by == zero, zero, by * (d + log_totals[i]))
                    else:
                        gq[i] = select(t == zero, zero, keep * t * (d + log_totals[i]))
            else:
                if HAS_CURVATURE:
                    h = at_address(h_at + c * h_step, zero)
                    for i in range(rows):
                        e = g[i]
                        h[i] = select(slopes[i] == zero, zero, slopes[i] * e * ((total[i] - e) / total[i]))
                    if CURVED:
                        for i in range(rows):
                            p = g[i] / total[i]
                            u = mass[i] * p - w * (keep * q[i] + spread)
                            quadratic = of_p[i] * p * p + u * (of_both[i] * p + of_t[i] * u)
                            nothing = (of_p[i] == zero) & (of_both[i] == zero) & (of_t[i] == zero)
                            h[i] += select(nothing, zero, quadratic)
                for i in range(rows):
                    t = by_target[i] * w * (keep * q[i] + spread)
                    g[i] = select((by_target[i] == zero) & (slopes[i] == zero), zero, slopes[i] * g[i] - t)
    if CAPS and HAS_GRAD:
        for c in range(classes):
            g, h = at_address(g_at + c * g_step, zero), at_address(h_at + c * h_step, zero)
            x = at_address(x_at + c * x_step, zero)
            for i in range(rows):
                t = x[i] / cap
                by = one - t * t
                dead = (by_target[i] == zero) & (slopes[i] == zero)
                if HAS_CURVATURE:
                    h[i] = select(dead, h[i], h[i] * by * by - g[i] * (t + t) * by / cap)
                g[i] = select(dead, zero, g[i] * by)
    if STANDS_IN:
        for c in range(classes):
            g, h = at_address(g_at + c * g_step, zero), at_address(h_at + c * h_step, zero)
            for i in range(rows):
                h[i] = stands(g[i], h[i], ups[i], most[i], floor)
    out = at_address(a[VALUES], zero)
    for i in range(rows):
        out[i] = values[i]
    return sum_in_lanes(a[VALUES], rows)


@cache
def row_scope(dtype: np.dtype) -> dict[str, Any]:
    """Return what is bound in all blocks of a dtype."""
    size, name = dtype.itemsize, dtype.name
    scope = dict(
        T=dtype.type, ITEM=size, WIDE=WIDTH // size, NARROW=lanes_of(dtype), sum_in_lanes=summer(dtype)
    )
    compiled = njit(**LINKED)
    number = types.float32 if dtype == np.float32 else types.float64
    scope |= EXPONENTIAL[number]._asdict()
    of_columns = exponential_of_column, exponential_but_own, gradient_of_column, curvature_of_column
    for f in (exponential, *of_columns):
        scope[f.__name__] = bind(f, scope, name, name, njit(forceinline=True, **LINKED))
    return scope | {f.__name__: bind(f, scope, name, name, compiled) for f in (largest, sum_columns)}


class Form(enum.Enum):
    """How a tile lies: in rows; in columns, of many classes, of at most `FEW`, or of any number."""

    ROWS = enum.auto()
    COLUMNS = enum.auto()
    FEW_COLUMNS = enum.auto()
    ANY_COLUMNS = enum.auto()


def bound_block(
    functions: ScoreFunctions, request: ScoreRequest, form: Form, dtype: np.dtype
) -> tuple[Any, dict[str, Any], object]:
    """The template of one definition's block, what is bound in it, and its identity."""
    if request.probabilities:
        template = rows_of_probabilities if form is Form.ROWS else columns_of_probabilities
    else:
        template = rows_of_labels if form is Form.ROWS else columns_of_labels
    affine, multiple = is_linear(functions)
    groups = moves(functions) | ({NORM} if request.lse_square else set())
    number = types.float32 if dtype == np.float32 else types.float64
    jets = derivatives()
    stands = lift_score_curvature(request.policy, request.floored, jets) if request.curvature else None
    scope = row_scope(dtype) | dict(
        log=CPU[number]["log"],
        log1p=CPU[number]["log1p"],
        tanh=CPU[number]["tanh"],
        loss=lift_scores(functions, jets, request.curvature, request.lse_square),
        options=jets.options(functions.options, start=OPTIONS),
        WEIGHTED=request.weighted,
        SMOOTHED=request.smoothed,
        FACTORS=request.row_factors,
        VALUED=request.valued,
        HAS_GRAD=request.grad,
        HAS_TARGET_GRAD=request.target_grad,
        BY_WEIGHT=request.by_weight,
        HAS_CURVATURE=request.curvature,
        CAPS=request.softcap,
        HAS_OWN=OWN in groups,
        HAS_MIXED=MIXED in groups,
        HAS_NORM=NORM in groups,
        CURVED=not affine or request.lse_square,
        LINEAR=affine and not request.lse_square and not request.smoothed,
        OF_FEW=form in (Form.FEW_COLUMNS, Form.ANY_COLUMNS),
        OF_MANY=form in (Form.COLUMNS, Form.ANY_COLUMNS),
        MULTIPLE=multiple and not request.lse_square,
        STANDS_IN=stands is not None,
        FLOORED=request.floored,
        FLOOR=OPTIONS + functions.options.count(None),
        stands=stands,
    )
    identity = (
        fingerprint(functions.value), functions.statistics, functions.options, tuple(request), form.name,
        dtype.name,
    )  # fmt: skip
    return template, scope, identity


@cache
def compile_block(functions: ScoreFunctions, request: ScoreRequest, form: Form, dtype: np.dtype) -> int:
    """The address of one definition's block for one request, form and arithmetic dtype."""
    template, scope, identity = bound_block(functions, request, form, dtype)
    # Of rows, some loops are over lanes, which LLVM has to do all at once; of columns none is.
    compiler = Brief if form is Form.ROWS else Rolled
    return compile_function(template, scope, functions.name, identity, SIGNATURE, pipeline_class=compiler)
