"""Losses of rows of class scores by definition: terms, gradients, curvature.

A row's value is a function of its statistics (see `kernels.lift`). With p = softmax(x), own class y, targets
t_c, W = sum t_c, and the value's slopes A, B, R by log p_y, by the cross entropy and by logsumexp, the
gradient is

    g_c = A (d_cy - p_c) + B (W p_c - t_c) + R p_c

so a kernel needs three numbers of a row, and some more for the curvature. Of cross entropy A and R are zero
and B is one when compiled.

A first pass over a row finds its maximum m and its sum of ``exp(x - m)`` together: a running maximum, and a
sum that is rescaled when it grows. What label smoothing or probabilities ask for, the distances ``m - x`` by
weight, runs along: all are sums of what is not negative. A second pass writes the gradient. With class
indices the row's own class stays out of the sums: its cross entropy is ``log1p`` of the others' where it is
the largest, and its gradient is made of theirs, so neither cancels.

The kernels, by the variant that `rows.plan` chooses. All take the arguments of :func:`signature`.

- `hold` (TEAM, BLOCK): a row is in the registers of a part of a warp, or of a block, and read once.
- `stream` (STREAM): a block reads a row twice.
- `part`, then `rest` (SPLIT): several blocks share a row. The first kernel leaves each block's sums in
  `scratch`, `STATE` numbers of the arithmetic type; in the second every block joins those of its row, and
  writes its part of the gradient. The partial sums are one a row.
- `columns` (COLUMNS): a thread has a vector of rows, whose classes are `inner` apart.
"""

import math
from typing import Any, NamedTuple

import numpy as np

from .. import class_weights
from ..bind import bind, fingerprint
from ..class_weights import DISTANCES
from ..layout import Axes, class_rows
from ..lift import MIXED, NORM, OWN, is_linear, lift_scores, moves
from ..math import exp, log, log1p, tanh
from ..spec import FLOAT32, GRAD, INT64, MISSING, Quick, ScoreFunctions, Scores, arithmetic_dtype, code_of
from . import arithmetic, binaries, driver, faults, libraries, reduce, rows
from .arrays import VECTOR_BYTES, DeviceArray, aligned, flat
from .reduce import add, partial_sum, quotient
from .rows import BLOCK, COLUMNS, SPLIT, STREAM, TEAM, look, team_max, team_sum, vector_at, weights_at
from .target import (
    WARP,
    Binary,
    compile,
    cuda,
    derivatives,
    device,
    each,
    options,
    select,
    shared,
    storage,
    tree_sum,
    types,
)

# Bound by `kernel`; named here for readers and checkers.
array: Any = None
numbers: Any = None
T: Any = np.float32
LOWEST: Any = np.finfo(np.float32).min
WIDTH: Any = 4
REPEAT: Any = 2
AHEAD: Any = (0, 1)
LANES: Any = (0, 1, 2, 3, 4, 5, 6, 7)
PIECES: Any = (0, 1)
OFFSETS: Any = (0, 0)
TOGETHER: Any = True
MASSES: Any = True
WRITES: Any = True
HAS_OWN: Any = None
HAS_MIXED: Any = True
HAS_NORM: Any = None
CURVED: Any = None
MULTIPLE: Any = True
OWN_ONLY: Any = False
LATER: Any = True
BY_WEIGHT: Any = None
loss: Any = None
unpack: Any = None
at_cap: Any = None
score_at: Any = None
scores_at: Any = None
sides: Any = None
judge: Any = None
at_hide: Any = None
at_power: Any = None
at_mass: Any = None
at_distance: Any = None
at_slope: Any = None
slope_of: Any = None
at_fill: Any = None
at_look_column: Any = None
at_start_column: Any = None
at_hit_column: Any = None
at_absorb_column: Any = None
at_join_column: Any = None
at_leave_column: Any = None
at_value_column: Any = None
at_slope_column: Any = None
at_kept: Any = None
put_column: Any = None
LANES_OF_BLOCK: Any = 1024
SLICED: Any = True
absorb: Any = None
gather: Any = None
join: Any = None
put: Any = None
scatter: Any = None
blank: Any = None
erase: Any = None
conclude: Any = None
value: Any = None
store_partial: Any = None

HALF = 64  # registers a thread, with which half of a multiprocessor's threads are at work
STATE = 5  # maximum, sum of exponentials, of masses, of distances; and the own class's score


class Request(NamedTuple):
    """What one kernel computes."""

    probable: bool = False  # the target holds probabilities
    smoothed: bool = False  # labels are smoothed; probabilities always may be
    weighted: bool = False  # classes have weights
    sample_weighted: bool = False  # rows have
    upstream: bool = False
    terms: bool = False
    grad: bool = False
    target_grad: bool = False
    curvature: bool = False
    by_weight: bool = False  # `target_grad` is for the class weights: neither they nor the target are in it
    softcap: bool = False  # scores are capped first
    lse_square: bool = False  # the squared logsumexp is added to the value


# ---- one score ----------------------------------------------------------------------------------------


def hide(x, lane, there, own):
    """A score, or -inf: past the end of a row, and for its own class."""
    return (select(there[lane // WIDTH] & (own[lane // WIDTH] != lane % WIDTH), x, T(-np.inf)),)


def power(x, m):
    return (exp(x - m),)


@device
def mass_of(w, q, keep, spread):
    """What the row's share is multiplied by: a part of the smoothing, or a probability; weighted."""
    t = spread if q is None else keep * q + spread
    return t if w is None else t * w


def mass(w, q, lane, there, own, keep, spread):
    t = mass_of(w, q, keep, spread)
    return (select(there[lane // WIDTH] & (own[lane // WIDTH] != lane % WIDTH), t, T(0)),)


def distance(x, t, m):
    return (select(t == T(0), T(0), t * (m - x)),)


def capped(x, cap):
    return (cap * tanh(x / cap),)


def score(x, i, cap):
    """One score, capped where a cap is given."""
    if cap is None:
        return array.load(x, i)
    else:
        return cap * tanh(array.load(x, i) / cap)


def scores(x, at, cap):
    """Some vectors of scores, capped where a cap is given."""
    xs = array.load_vectors(x, at)
    if cap is None:
        return xs
    else:
        return each(at_cap, (xs,), (cap,))[0]


def slopes(x, w, q, is_own, keep, spread, cap, gq, h, row):
    """The gradients by a score and by a probability, and the curvature."""
    m, r, k, own_slope, own_curvature, total, inverse, log_total, mass, of_p, of_both, of_t, _ = row
    dq = c = T(0)
    e = exp(x - m)
    d = r * e
    if h is not None:
        c = d * ((total - e) * inverse)
        if CURVED is not None:
            p = e * inverse
            bend = of_p * p * p
            if MASSES is not None:
                u = mass * p - mass_of(w, q, keep, spread)
                bend += u * (of_both * p + of_t * u)
            c += bend
        c = select(is_own, own_curvature, c)
    if MASSES is not None and HAS_MIXED is not None:
        d -= k * mass_of(w, q, keep, spread)
    d = select(is_own, own_slope, d)
    if gq is not None:
        f = k
        if BY_WEIGHT is None:
            f = k * keep if w is None else k * keep * w
        dq = select(f == T(0), T(0), f * ((m - x) + log_total))
    if cap is not None:
        t = x / cap
        by = T(1) - t * t
        if h is not None:
            c = c * by * by - d * (t + t) * by / cap
        d = d * by
    return d, dq, c


def slope(x, w, q, lane, own, keep, spread, cap, gq, h, row):
    return slope_of(x, w, q, own[lane // WIDTH] == lane % WIDTH, keep, spread, cap, gq, h, row)


def filled(lane, x):
    return (x,)


# ---- sums over a row ----------------------------------------------------------------------------------


@device
def rescaled(m, s, far, whole, top):
    """A sum of exponentials, and one of distances from `m` with masses of sum `whole`, now from `top`."""
    s = s * exp(m - top)
    if whole is not None:
        far = select(whole == type(m)(0), far, far + (top - m) * whole)
    return s, far


def absorbed(xs, ws, qs, there, own, keep, spread, m, s, whole, far):
    """The state of a row with some vectors more."""
    shown = each(at_hide, (xs, LANES), (there, own))[0]
    top = m
    for x in shown:
        top = max(top, x)
    s, far = rescaled(m, s, far, whole, top)
    s += tree_sum(each(at_power, (shown,), (top,))[0])
    if MASSES is not None:
        ts = each(at_mass, (ws, qs, LANES), (there, own, keep, spread))[0]
        far += tree_sum(each(at_distance, (shown, ts), (top,))[0])
        whole += tree_sum(ts)
    return top, s, whole, far


@device
def join_team(m, s, whole, far, team):
    """The states of a team's threads as one, in each of them."""
    top = team_max(m, team)
    s, far = rescaled(m, s, far, whole, top)
    s = team_sum(s, team)
    if whole is not None:
        whole = team_sum(whole, team)
        far = team_sum(far, team)
    return top, s, whole, far


@device
def join_block(m, s, whole, far, team):
    """The states of a block's threads as one, in each of them."""
    zero = type(m)(0)
    ms, ss = shared(32, zero), shared(32, zero)
    if whole is not None:
        wholes, fars = shared(32, zero), shared(32, zero)
    top, total, mass, distance = join_team(m, s, whole, far, WARP)
    warp, lane = cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
    cuda.syncthreads()  # until all have read what an earlier call left
    if lane == 0:
        ms[warp] = top
        ss[warp] = total
        if whole is not None:
            wholes[warp] = mass
            fars[warp] = distance
    cuda.syncthreads()
    there = lane < cuda.blockDim.x >> 5
    top = ms[lane if there else 0]
    total = ss[lane] if there else zero
    if whole is None:
        return join_team(top, total, None, None, WARP)
    else:
        mass = wholes[lane] if there else zero
        distance = fars[lane] if there else zero
        return join_team(top, total, mass, distance, WARP)


def gathered(x, q, weight, base, first, step, stop, label, keep, spread, cap):
    """The state of what a thread reads of a row: from the vector `first` on, before `stop`."""
    m, s = T(LOWEST), T(0)
    whole = far = None
    if MASSES is not None:
        whole = far = T(0)
    while first < stop:
        at, there, own = each(vector_at, (AHEAD,), (first, step, stop, base, label, WIDTH))
        xs, qs = scores_at(x, at, cap), array.load_vectors(q, at)
        ws = numbers.load_vectors(
            weight, each(weights_at, (PIECES, OFFSETS), (first, step, stop, 0, WIDTH))[0]
        )
        m, s, whole, far = absorb(xs, ws, qs, there, own, keep, spread, m, s, whole, far)
        first += REPEAT * step
    return m, s, whole, far


# ---- what follows from the sums -----------------------------------------------------------------------


def judged_label(top, own, others, hit, own_mass, inside, own_weight, m, s, whole, far, spread, square, o):
    """A row's value and its derivatives, as `lift_scores` gives them; `inside` is in the masses."""
    zero, one = T(0), T(1)
    inverse = one / (own + others)
    log_total = log1p(others if hit == top else (others - one) + own)
    distance = (top - hit) + log_total
    entropy = zero if own_mass == zero else own_mass * distance
    if MASSES is not None:
        smoothed = spread * own_weight
        far = rescaled(m, s, far, whole, top)[1] + (zero if smoothed == zero else smoothed * (top - hit))
        whole += smoothed
        entropy += zero if whole == zero else inside * (far + whole * log_total)
    return loss(
        -distance, others * inverse, own * inverse, own_weight, entropy, top + log_total, square, o
    )  # fmt: skip


def judged_probabilities(m, total, log_total, inside, whole, far, square, o):
    """The same where all classes have masses."""
    zero = T(0)
    entropy = inside * (far + (zero if whole == zero else whole * log_total))
    return loss(zero, zero, zero, T(1), entropy, m + log_total, square, o)


def shared_out(share):
    """What multiplies a row's masses, and its value: what scales with the masses is weighed there."""
    return (share, T(1)) if MULTIPLE is not None else (T(1), share)


def concluded_labels(m, s, whole, far, hit, share, own_weight, factor, keep, spread, square, o):
    """What a row's gradient is made of: `slopes` takes it. The row's value is last."""
    inside, outside = sides(share)
    factor = factor * outside
    top = max(m, hit)
    own, others = exp(hit - top), s * exp(m - top)
    total = own + others
    inverse = T(1) / total
    t = total_share = keep * own_weight * inside
    d = judge(top, own, others, hit, t, inside, own_weight, m, s, whole, far, spread, square, o)
    k = own_slope = r = T(0)
    if MASSES is not None:
        t += inside * spread * own_weight
        total_share = inside * whole + t
    if HAS_MIXED is not None:
        b = factor * d[2]
        if MASSES is not None:
            k = b * inside
            own_slope = k * whole * own
        r = b * total_share
        own_slope = own_slope - b * t * others
    if HAS_NORM is not None:
        r += factor * d[3]
        own_slope += factor * d[3] * own
    if HAS_OWN is not None:
        r -= factor * d[1]
        own_slope += factor * d[1] * others
    r = r * inverse
    own_slope = own_slope * inverse
    own_curvature = r * own * (others * inverse)
    mass = of_p = of_both = of_t = None
    if CURVED is not None:
        rest, p = others * inverse, own * inverse
        u = -t * rest
        of_p, of_both, of_t = d[4] + d[6] - d[8], d[9] - d[7], d[5]
        if MASSES is not None:
            mass, u = total_share, (whole * own - t * others) * inverse
        else:
            of_p += t * (t * of_t + of_both)
        bend = d[4] * rest * rest + d[5] * u * u + d[6] * p * p
        bend += d[7] * rest * u + d[8] * rest * p + d[9] * u * p
        own_curvature += factor * bend
        of_p, of_both, of_t = factor * of_p, factor * of_both, factor * of_t
    v = outside * d[0]
    return top, r, k, own_slope, own_curvature, total, inverse, T(0), mass, of_p, of_both, of_t, v


def concluded_probabilities(m, s, whole, far, hit, share, own_weight, factor, keep, spread, square, o):
    inside, outside = sides(share)
    factor = factor * outside
    total = s + (m - m)  # NaN where the maximum is infinite
    inverse = T(1) / total
    log_total = log(total)
    d = judge(m, total, log_total, inside, whole, far, square, o)
    k = r = T(0)
    if HAS_MIXED is not None:
        k = factor * d[2] * inside
        r = k * whole
    if HAS_NORM is not None:
        r += factor * d[3]
    mass = of_p = of_both = of_t = None
    if CURVED is not None:
        mass, of_p, of_both, of_t = whole, factor * d[6], factor * d[9], factor * d[5]
    v = outside * d[0]
    return m, r * inverse, k, T(0), T(0), total, inverse, log_total, mass, of_p, of_both, of_t, v


def value_of_label(m, s, whole, far, hit, share, own_weight, keep, spread, square, o):
    inside, outside = sides(share)
    top = max(m, hit)
    own, others = exp(hit - top), s * exp(m - top)
    t = keep * own_weight * inside
    return (
        outside * judge(top, own, others, hit, t, inside, own_weight, m, s, whole, far, spread, square, o)[0]
    )


def value_of_probabilities(m, s, whole, far, hit, share, own_weight, keep, spread, square, o):
    inside, outside = sides(share)
    total = s + (m - m)
    return outside * judge(m, total, log(total), inside, whole, far, square, o)[0]


# ---- a row's gradient ---------------------------------------------------------------------------------


def putting(xs, ws, qs, at, there, own, keep, spread, cap, g, gq, h, row):
    d, dq, c = each(at_slope, (xs, ws, qs, LANES), (own, keep, spread, cap, gq, h, row))
    array.store_vectors(g, at, there, d)
    array.store_vectors(gq, at, there, dq)
    array.store_vectors(h, at, there, c)


def scattered(x, q, weight, g, gq, h, base, first, step, stop, label, keep, spread, cap, row):
    """Write the gradient where `gather` read."""
    while first < stop:
        at, there, own = each(vector_at, (AHEAD,), (first, step, stop, base, label, WIDTH))
        xs, qs = scores_at(x, at, cap), array.load_vectors(q, at)
        ws = numbers.load_vectors(
            weight, each(weights_at, (PIECES, OFFSETS), (first, step, stop, 0, WIDTH))[0]
        )
        put(xs, ws, qs, at, there, own, keep, spread, cap, g, gq, h, row)
        first += REPEAT * step


def blanked(g, gq, h, at, there, fill):
    """Write one number instead."""
    xs = each(at_fill, (LANES,), (fill,))[0]
    array.store_vectors(g, at, there, xs)
    array.store_vectors(gq, at, there, xs)
    array.store_vectors(h, at, there, xs)


def erased(g, gq, h, base, first, step, stop, fill):
    """Write one number where `scatter` would write the gradient."""
    while first < stop:
        at, there, _ = each(vector_at, (AHEAD,), (first, step, stop, base, -1, WIDTH))
        blank(g, gq, h, at, there, fill)
        first += REPEAT * step


# ---- kernels ------------------------------------------------------------------------------------------


def hold(
    x, q, labels, weight, sample_weight, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, cap, square, options, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
    o = unpack(options, factor)
    hi = lo = T(0)
    team = cuda.blockDim.x if TOGETHER is None else 1 << deal
    rows_of_block = 1 if TOGETHER is None else cuda.blockDim.x >> deal
    lane = cuda.threadIdx.x & (team - 1)
    vectors = classes // WIDTH
    first = cuda.blockIdx.x * rows_of_block
    while first < batch:
        i = first + (0 if TOGETHER is None else cuda.threadIdx.x >> deal)
        live, fill, label, share, own_weight, up = look(
            labels,
            weight,
            sample_weight,
            upstream,
            i,
            batch,
            classes,
            ignore,
            scale,
            OWN_ONLY,
            lane == 0,
            faults,
        )
        base = i * classes
        m, s, hit = T(LOWEST), T(0), T(0)
        whole = far = None
        if MASSES is not None:
            whole = far = T(0)
        at, there, own = each(vector_at, (AHEAD,), (lane, team, vectors, base, label, WIDTH))
        if live:
            xs, qs = scores_at(x, at, cap), array.load_vectors(q, at)
            pieces = each(weights_at, (PIECES, OFFSETS), (lane, team, vectors, 0, WIDTH))[0]
            ws = numbers.load_vectors(weight, pieces)
            if labels is not None:
                hit = score_at(x, base + label, cap)
            m, s, whole, far = absorb(xs, ws, qs, there, own, keep, spread, m, s, whole, far)
        m, s, whole, far = join(m, s, whole, far, team)
        cuda.syncwarp()  # until all have read their own class's score, which the gradient may overwrite
        v = fill
        if live:
            if WRITES is not None:
                row = conclude(m, s, whole, far, hit, share, own_weight, up, keep, spread, square, o)
                put(xs, ws, qs, at, there, own, keep, spread, cap, g, gq, h, row)
                if LATER is None:
                    v = row[-1]
        elif i < batch:
            blank(g, gq, h, at, there, fill)
        if lane == 0 and i < batch:
            if LATER is not None:
                v = fill
                if live:
                    v = value(m, s, whole, far, hit, share, own_weight, keep, spread, square, o)
            array.store(terms, i, v)
            if partials is not None:
                hi, lo = add(hi, lo, v)
        first += cuda.gridDim.x * rows_of_block
    if partials is not None:
        store_partial(partials, hi, lo)


def stream(
    x, q, labels, weight, sample_weight, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, cap, square, options, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
    o = unpack(options, factor)
    hi = lo = T(0)
    team, lane = cuda.blockDim.x, cuda.threadIdx.x
    vectors = classes // WIDTH
    i = cuda.blockIdx.x
    while i < batch:
        live, fill, label, share, own_weight, up = look(
            labels,
            weight,
            sample_weight,
            upstream,
            i,
            batch,
            classes,
            ignore,
            scale,
            OWN_ONLY,
            lane == 0,
            faults,
        )
        base = i * classes
        v, hit = fill, T(0)
        if live:
            if labels is not None:
                hit = score_at(x, base + label, cap)
            m, s, whole, far = gather(x, q, weight, base, lane, team, vectors, label, keep, spread, cap)
            m, s, whole, far = join(m, s, whole, far, team)
            if WRITES is not None:
                row = conclude(m, s, whole, far, hit, share, own_weight, up, keep, spread, square, o)
                scatter(x, q, weight, g, gq, h, base, lane, team, vectors, label, keep, spread, cap, row)
                if LATER is None:
                    v = row[-1]
            if LATER is not None and lane == 0:
                v = value(m, s, whole, far, hit, share, own_weight, keep, spread, square, o)
        else:
            erase(g, gq, h, base, lane, team, vectors, fill)
        if lane == 0:
            array.store(terms, i, v)
            if partials is not None:
                hi, lo = add(hi, lo, v)
        i += cuda.gridDim.x
    if partials is not None:
        store_partial(partials, hi, lo)


def part(
    x, q, labels, weight, sample_weight, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, cap, square, options, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    i = cuda.blockIdx.x // deal
    live, _, label, _, _, _ = look(
        labels,
        weight,
        sample_weight,
        upstream,
        i,
        batch,
        classes,
        ignore,
        factor,
        OWN_ONLY,
        False,
        faults,
    )
    if live:
        base, vectors = i * classes, classes // WIDTH
        run = (vectors + deal - 1) // deal
        start = (cuda.blockIdx.x - i * deal) * run
        stop = min(start + run, vectors)
        first = start + cuda.threadIdx.x
        m, s, whole, far = gather(x, q, weight, base, first, cuda.blockDim.x, stop, label, keep, spread, cap)
        m, s, whole, far = join(m, s, whole, far, cuda.blockDim.x)
        if cuda.threadIdx.x == 0:
            at = cuda.blockIdx.x * STATE
            scratch[at] = m
            scratch[at + 1] = s
            if MASSES is not None:
                scratch[at + 2] = whole
                scratch[at + 3] = far
            if labels is not None:
                scratch[at + 4] = score_at(x, base + label, cap)


def rest(
    x, q, labels, weight, sample_weight, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, cap, square, options, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
    o = unpack(options, factor)
    i = cuda.blockIdx.x // deal
    leads = cuda.blockIdx.x == i * deal and cuda.threadIdx.x == 0
    live, fill, label, share, own_weight, up = look(
        labels,
        weight,
        sample_weight,
        upstream,
        i,
        batch,
        classes,
        ignore,
        scale,
        OWN_ONLY,
        leads,
        faults,
    )
    base, vectors = i * classes, classes // WIDTH
    run = (vectors + deal - 1) // deal
    start = (cuda.blockIdx.x - i * deal) * run
    stop = min(start + run, vectors)
    first = start + cuda.threadIdx.x
    v, hit = fill, T(0)
    if live:
        m, s = T(LOWEST), T(0)
        whole = far = other = away = None
        if MASSES is not None:
            whole = far = T(0)
        k = cuda.threadIdx.x & 31
        while k < deal:
            at = (i * deal + k) * STATE
            top = max(m, scratch[at])
            s, far = rescaled(m, s, far, whole, top)
            if MASSES is not None:
                other, away = scratch[at + 2], scratch[at + 3]
            more, away = rescaled(scratch[at], scratch[at + 1], away, other, top)
            s += more
            if MASSES is not None:
                whole += other
                far += away
            m = top
            k += 32
        m, s, whole, far = join_team(m, s, whole, far, WARP)
        if labels is not None:
            hit = scratch[i * deal * STATE + 4]
        if WRITES is not None:
            row = conclude(m, s, whole, far, hit, share, own_weight, up, keep, spread, square, o)
            scatter(x, q, weight, g, gq, h, base, first, cuda.blockDim.x, stop, label, keep, spread, cap, row)
            if LATER is None:
                v = row[-1]
        if LATER is not None and leads:
            v = value(m, s, whole, far, hit, share, own_weight, keep, spread, square, o)
    else:
        erase(g, gq, h, base, first, cuda.blockDim.x, stop, fill)
    if leads:
        array.store(terms, i, v)
        if partials is not None:
            partials[2 * i] = v
            partials[2 * i + 1] = T(0)


# ---- strided classes ----------------------------------------------------------------------------------


def look_column(lane, i, labels, weight, sample_weight, upstream, n, classes, ignore, scale, reports, faults):
    return look(
        labels, weight, sample_weight, upstream, i + lane, n, classes, ignore, scale, OWN_ONLY, reports,
        faults,
    )  # fmt: skip


def start_column(lane):
    """The state of a row of which nothing has been read."""
    return T(LOWEST), T(0), None if MASSES is None else T(0), None if MASSES is None else T(0)


def hit_column(label, live, lane, x, base, inner, cap):
    return (score_at(x, base + label * inner + lane, cap) if live else T(0),)


def absorb_column(x, q, m, s, whole, far, label, w, c, there, keep, spread):
    """The state of a row with one class more: of both exponentials, one is 1."""
    zero = T(0)
    shown = there & (c != label)
    d = select(shown, x, T(-np.inf)) - m
    grows = d > zero
    e = exp(-abs(d))
    top = select(grows, x, m)
    s = select(grows, s * e + T(1), s + e)
    if MASSES is not None:
        far = select(grows & (whole != zero), far + d * whole, far)
        t = select(shown, mass_of(w, q, keep, spread), zero)
        far += select(t == zero, zero, t * (top - x))
        whole += t
    return top, s, whole, far


def join_column(m, s, whole, far, lane, ms, ss, wholes, fars, at):
    """The state of a row with that of another thread."""
    top = max(m, ms[at + lane])
    s, far = rescaled(m, s, far, whole, top)
    if MASSES is not None:
        more, away = rescaled(ms[at + lane], ss[at + lane], fars[at + lane], wholes[at + lane], top)
        far += away
        whole += wholes[at + lane]
    else:
        more, _ = rescaled(ms[at + lane], ss[at + lane], None, None, top)
    return top, s + more, whole, far


def leave_column(m, s, whole, far, lane, ms, ss, wholes, fars, at):
    ms[at + lane] = m
    ss[at + lane] = s
    if MASSES is not None:
        wholes[at + lane] = whole
        fars[at + lane] = far
    return ()


def join_slices(m, s, whole, far, across):
    """The states of the threads that share rows, in their order, in each of them."""
    ms, ss = shared(LANES_OF_BLOCK, T(0)), shared(LANES_OF_BLOCK, T(0))
    wholes = fars = None
    if MASSES is not None:
        wholes, fars = shared(LANES_OF_BLOCK, T(0)), shared(LANES_OF_BLOCK, T(0))
    cuda.syncthreads()  # until all have read what an earlier call left
    each(at_leave_column, (m, s, whole, far, LANES), (ms, ss, wholes, fars, cuda.threadIdx.x * WIDTH))
    cuda.syncthreads()
    m, s, whole, far = each(at_start_column, (LANES,), ())
    at = cuda.threadIdx.x % across
    while at < cuda.blockDim.x:
        m, s, whole, far = each(at_join_column, (m, s, whole, far, LANES), (ms, ss, wholes, fars, at * WIDTH))
        at += across
    return m, s, whole, far


def value_column(m, s, whole, far, hit, live, fill, share, own_weight, keep, spread, square, o):
    return (value(m, s, whole, far, hit, share, own_weight, keep, spread, square, o) if live else fill,)


def kept(v, live, fill):
    return (select(live, v, fill),)


def slope_column(
    x, q, label, live, fill, m, r, k, own_slope, own_curvature, total, inverse, log_total, mass, of_p,
    of_both, of_t, v, w, c, keep, spread, cap, gq, h,
):  # fmt: skip
    row = m, r, k, own_slope, own_curvature, total, inverse, log_total, mass, of_p, of_both, of_t, v
    d, dq, b = slope_of(x, w, q, c == label, keep, spread, cap, gq, h, row)
    return select(live, d, fill), select(live, dq, fill), select(live, b, fill)


def putting_column(xs, qs, label, live, fill, r, w, c, keep, spread, cap, g, gq, h, at, there):
    d, dq, b = each(at_slope_column, (xs, qs, label, live, fill, *r), (w, c, keep, spread, cap, gq, h))
    array.store_vectors(g, (at,), (there,), d)
    array.store_vectors(gq, (at,), (there,), dq)
    array.store_vectors(h, (at,), (there,), b)


def columns(
    x, q, labels, weight, sample_weight, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, cap, square, options, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
    o = unpack(options, factor)
    hi = lo = T(0)
    n = batch * inner
    across = cuda.blockDim.x >> deal
    part = cuda.threadIdx.x // across
    column = cuda.threadIdx.x - part * across
    step = (1 << deal) * inner
    first = cuda.blockIdx.x * across
    while first * WIDTH < n:
        i = (first + column) * WIDTH
        live, fill, label, share, own_weight, up = each(
            at_look_column,
            (LANES,),
            (i, labels, weight, sample_weight, upstream, n, classes, ignore, scale, part == 0, faults),
        )
        some = False
        for alive in live:
            some = some or alive
        base = (i // inner * classes) * inner + i % inner
        end = base + classes * inner
        m, s, whole, far = each(at_start_column, (LANES,), ())
        hit = s
        if some:
            if labels is not None:
                hit = each(at_hit_column, (label, live, LANES), (x, base, inner, cap))[0]
            c, at = part, base + part * inner
            while at < end:
                there = at + step < end
                also = at + step if there else at
                xs, qs = scores_at(x, (at,), cap), array.load_vectors(q, (at,))
                ys, ps = scores_at(x, (also,), cap), array.load_vectors(q, (also,))
                w, v = numbers.load(weight, c), numbers.load(weight, c + (1 << deal) if there else c)
                m, s, whole, far = each(
                    at_absorb_column, (xs, qs, m, s, whole, far, label), (w, c, True, keep, spread)
                )
                c += 1 << deal
                m, s, whole, far = each(
                    at_absorb_column, (ys, ps, m, s, whole, far, label), (v, c, there, keep, spread)
                )
                c += 1 << deal
                at += 2 * step
        if SLICED is not None:
            m, s, whole, far = join(m, s, whole, far, across)
        if LATER is None:
            r = each(conclude, (m, s, whole, far, hit, share, own_weight, up), (keep, spread, square, o))
        if part == 0 and i < n:
            if LATER is not None:
                vs = each(
                    at_value_column,
                    (m, s, whole, far, hit, live, fill, share, own_weight),
                    (keep, spread, square, o),
                )[0]
            else:
                vs = each(at_kept, (r[-1], live, fill), ())[0]
            array.store_vectors(terms, (i,), (True,), vs)
            if partials is not None:
                hi, lo = add(hi, lo, tree_sum(vs))
        if WRITES is not None and i < n:
            if LATER is not None:
                r = each(conclude, (m, s, whole, far, hit, share, own_weight, up), (keep, spread, square, o))
            c, at = part, base + part * inner
            while at < end:
                there = at + step < end
                also = at + step if there else at
                xs, qs = scores_at(x, (at,), cap), array.load_vectors(q, (at,))
                ys, ps = scores_at(x, (also,), cap), array.load_vectors(q, (also,))
                w, v = numbers.load(weight, c), numbers.load(weight, c + (1 << deal) if there else c)
                put_column(xs, qs, label, live, fill, r, w, c, keep, spread, cap, g, gq, h, at, True)
                c += 1 << deal
                put_column(ys, ps, label, live, fill, r, v, c, keep, spread, cap, g, gq, h, also, there)
                c += 1 << deal
                at += 2 * step
        first += cuda.gridDim.x * across
    if partials is not None:
        store_partial(partials, hi, lo)


KERNELS = {TEAM: (hold,), BLOCK: (hold,), STREAM: (stream,), SPLIT: (part, rest), COLUMNS: (columns,)}


def kernels(
    functions: ScoreFunctions, request: Request, code: int, plan: rows.Plan, vectors: bool = True
) -> tuple[Any, ...]:
    """The kernels of a definition and a plan's variant, to be launched in order, in plain Python."""
    storage_, numbers_ = storage(code, vectors), rows.weights(code, vectors)
    width, variant = storage_.width, plan.variant
    repeat = 1 if variant == COLUMNS else rows.repeat(code, vectors, variant)
    pieces = [(k, j) for k in range(repeat) for j in range(0, width, numbers_.width)]
    sliced = variant == COLUMNS and plan.deal > 0
    affine, multiple = is_linear(functions)
    multiple = multiple and not request.lse_square
    groups = moves(functions) | ({NORM} if request.lse_square else set())
    masses, writes = request.probable or request.smoothed, request.grad or request.target_grad
    writes = writes or request.curvature
    scope: dict[str, Any] = dict(
        array=storage_,
        numbers=numbers_,
        T=storage_.T,
        LOWEST=np.finfo(storage_.T).min,
        WIDTH=width,
        REPEAT=repeat,
        AHEAD=tuple(range(repeat)),
        LANES=tuple(range(repeat * width)),
        PIECES=tuple(k for k, _ in pieces),
        OFFSETS=tuple(j for _, j in pieces),
        LANES_OF_BLOCK=plan.threads * width,
        TOGETHER=True if variant == TEAM else None,
        SLICED=True if sliced else None,
        MASSES=masses or None,
        WRITES=writes or None,
        HAS_OWN=OWN in groups or None,
        HAS_MIXED=MIXED in groups or None,
        HAS_NORM=NORM in groups or None,
        CURVED=(request.curvature and not (affine and not request.lse_square)) or None,
        MULTIPLE=multiple or None,
        OWN_ONLY=multiple and not masses,
        LATER=multiple or not writes or None,
        BY_WEIGHT=request.by_weight or None,
        loss=lift_scores(functions, derivatives(), request.curvature, request.lse_square),
        unpack=options(functions.options),
        store_partial=device(partial_sum) if variant in (TEAM, COLUMNS) else rows.store_own_partial,
    )
    definition = fingerprint(functions.value), functions.statistics, functions.options
    identity = (definition, tuple(request), code, variant, sliced, vectors)

    def made(template: Any, decorate: Any = device) -> Any:
        return bind(template, scope, "softmax", identity, decorate)

    layers: tuple[dict[str, Any], ...] = (
        dict(
            at_hide=hide,
            at_power=power,
            at_mass=mass,
            at_distance=distance,
            at_fill=filled,
            at_cap=capped,
            score_at=score,
            sides=shared_out,
            judge=judged_probabilities if request.probable else judged_label,
            at_start_column=start_column,
            at_kept=kept,
            at_absorb_column=absorb_column,
            at_join_column=join_column,
            at_leave_column=leave_column,
            slope_of=slopes,
        ),
        dict(
            absorb=absorbed,
            scores_at=scores,
            conclude=concluded_probabilities if request.probable else concluded_labels,
            value=value_of_probabilities if request.probable else value_of_label,
            at_hit_column=hit_column,
            at_slope=slope,
            at_slope_column=slope_column,
            blank=blanked,
            at_look_column=look_column,
            join=join_slices,
        ),
        dict(gather=gathered, put=putting, put_column=putting_column, at_value_column=value_column),
        dict(scatter=scattered, erase=erased),
    )
    for layer in layers:
        scope.update({name: made(template) for name, template in layer.items()})
    if variant != COLUMNS:
        scope["join"] = join_team if variant == TEAM else join_block
    return tuple(made(template, lambda f: f) for template in KERNELS[variant])


def signature(
    functions: ScoreFunctions, request: Request, code: int, summed: bool, divided: bool, variant: str
) -> tuple[Any, ...]:
    """The types of every kernel's arguments; ``none`` is passed as a null pointer."""
    arithmetic, pointer = storage(code).arithmetic, storage(code).pointer
    numbers = types.CPointer(arithmetic)

    def given(present: Any, kind: Any = pointer) -> Any:
        return kind if present else types.none

    r = request
    return (
        pointer,  # scores
        given(r.probable),
        given(not r.probable, rows.INTEGERS),  # class indices
        given(r.weighted, numbers),
        given(r.sample_weighted, numbers),
        given(r.upstream, numbers),
        given(r.terms),
        given(r.grad),
        given(r.target_grad),
        given(r.curvature),
        *[types.int64] * 5,  # batch, classes, inner, the plan's `deal`, ignored index
        arithmetic,  # 1 - label_smoothing
        given(r.probable or r.smoothed, arithmetic),  # label_smoothing / classes
        given(r.softcap, arithmetic),
        given(r.lse_square, arithmetic),  # what multiplies the squared logsumexp
        types.UniTuple(arithmetic, functions.options.count(None)),
        arithmetic,  # factor of the gradient
        given(divided, numbers),  # divisor of the gradient
        given(summed, numbers),  # partial sums of the terms
        given(not r.probable, rows.INTEGERS),  # faults
        given(variant == SPLIT, numbers),  # scratch
    )


def compile_kernels(
    functions: ScoreFunctions,
    request: Request,
    code: int,
    cc: tuple[int, int],
    plan: rows.Plan,
    summed: bool = True,
    divided: bool = False,
    vectors: bool = True,
) -> tuple[Binary, ...]:
    """Compile the kernels of a definition and a plan's variant."""
    arguments = signature(functions, request, code, summed, divided, plan.variant)
    made = kernels(functions, request, code, plan, vectors)
    fast = code == FLOAT32 and plan.variant != COLUMNS and not (request.probable or request.smoothed)
    return tuple(compile(kernel, arguments, cc, plan.threads, HALF if fast else None) for kernel in made)


# ---- launching ----------------------------------------------------------------------------------------


def run(p: Scores, outputs: dict[str, Any]) -> Any:
    """Write gradients by ``"input"``, ``"target"`` and ``"weight"``, and the curvature; return the value."""
    if "weight" in outputs:
        return class_weights.run(p, outputs, run, arithmetic)
    target = p.target if p.has_probabilities else None
    gradients = [
        outputs.get("input"),
        outputs.get("target", outputs.get(DISTANCES)),
        outputs.get("curvature"),
    ]
    arrays = [a for a in (p.input, target, *gradients) if a is not None]
    axes = Axes(arrays)
    these = rows.Rows(p, arrays, class_rows(p.input.shape), axes)
    terms, queue = these.terms(), these.queue
    if not these.count:
        return these.finish(None, 1.0, None) if terms is None else terms
    classes = axes.extents[1]
    weight = None if p.weight is None else flat(p.weight, (classes,), p.arithmetic, queue)
    labels = None if p.has_probabilities else these.over_rows(p.target, INT64)

    def counted() -> DeviceArray:
        return rows.count_rows(these, labels, weight, classes, p.ignore_index)

    divisor, by = these.divisors(None if p.has_probabilities else counted)
    gradients_by = these.gradients_by(by) if any(a is not None for a in gradients) else None
    slot = None
    if not p.has_probabilities:
        slot = faults.faults(queue.device).slot(*rows.index_fault(p.name, p.input.shape, axes.order))
    x, q = these.as_kernel_input(p.input), these.as_kernel_input(target)
    written = [these.output_buffer(a) for a in gradients]
    partial_sums = launch(
        p,
        x,
        q,
        labels,
        weight,
        these.sample_weight,
        these.upstream,
        terms,
        written,
        axes.extents,
        these.factor / divisor,
        gradients_by,
        slot,
        terms is None,
        by_weight=DISTANCES in outputs,
    )
    for array, w in zip(gradients, written, strict=True):
        these.copy_back(array, w)
    if slot is not None:
        faults.check_now(queue.device)
    return these.finish(partial_sums, divisor, by) if terms is None else terms


def launch(
    p: Any,
    x: DeviceArray,
    q: DeviceArray | None,
    labels: DeviceArray | None,
    weight: DeviceArray | None,
    sample_weight: DeviceArray | None,
    upstream: DeviceArray | None,
    terms: DeviceArray | None,
    gradients: list[Any],
    extents: tuple[int, int, int],
    factor: float,
    divisor: DeviceArray | None,
    slot: int | None,
    summed: bool,
    by_weight: bool = False,
) -> DeviceArray | None:
    """Launch the kernels over contiguous arrays of one storage; return the terms' partial sums, if `summed`.

    Parameters
    ----------
    p : Scores or Linear
        The definition and its options.
    gradients : list
        By the scores, by the probabilities, and the curvature: arrays or None.
    by_weight : bool
        Whether the second of them is what the gradient by the class weights is made of.
    """
    queue, (batch, classes, inner), code = x.queue, extents, code_of(x.dtype)
    vectors = rows.whole_vectors(classes, inner, x.dtype) and aligned([x, q, terms, weight, *gradients])
    plan = rows.plan(batch, classes, inner, code, vectors)
    request = Request(
        probable=q is not None,
        smoothed=p.label_smoothing > 0,
        weighted=weight is not None,
        sample_weighted=sample_weight is not None,
        upstream=upstream is not None,
        terms=terms is not None,
        grad=gradients[0] is not None,
        target_grad=gradients[1] is not None,
        curvature=gradients[2] is not None,
        by_weight=by_weight,
        softcap=p.softcap is not None,
        lse_square=p.lse_square_scale != 0,
    )
    numbers = arithmetic_dtype(x.dtype)
    partials = queue.empty((2 * plan.partials,), numbers) if summed else None
    scratch = queue.empty((plan.blocks * STATE,), numbers) if plan.variant == SPLIT else None
    queue.launch(
        (plan.blocks, plan.threads),
        compile_kernels,
        (
            *(x, q, labels, weight, sample_weight, upstream, terms, *gradients),
            *(batch, classes, inner, plan.deal, p.ignore_index),
            *numbers_of(p, classes, q is not None),
            *(factor, divisor, partials, slot, scratch),
        ),
        functions=p.functions,
        request=request,
        code=code,
        plan=rows.shape_free(plan),
        summed=summed,
        divided=divisor is not None,
        vectors=vectors,
    )
    return partials


def numbers_of(p: Any, classes: int, has_probabilities: bool) -> tuple[float, ...]:
    """Return the options as kernels take them: from ``1 - label_smoothing`` to those of the definition."""
    smoothing = p.label_smoothing
    spread = smoothing / classes if has_probabilities or smoothing else 0
    cap = 0 if p.softcap is None else p.softcap
    return 1 - smoothing, spread, cap, p.lse_square_scale or 0, *p.numbers


# ---- quick calls --------------------------------------------------------------------------------------


class Prepared(NamedTuple):
    """The kernels of quick calls on arrays of one shape and dtype."""

    counts: tuple[binaries.Kernel, Any] | None  # of the divisor, with its grid
    number: binaries.Kernel  # the sum of its partial sums
    kernels: tuple[binaries.Kernel, ...]
    plan: Any
    finish: binaries.Kernel
    finish_threads: int
    fault: tuple[Any, Any]
    numbers: tuple[float, ...]  # from the batch to the gradient's factor, as the kernels take them
    scratch: int  # numbers of the arithmetic dtype


def quick(prepared: Quick, arrays: tuple[Any, ...], out: Any) -> Any:
    """Serve the commonest calls: contiguous scores, int64 indices, no weights, a reduced value."""
    x, y = arrays
    library = libraries.library_of(x.__class__)
    if library.look is None or y.__class__ is not x.__class__:
        return MISSING
    address, dtype, shape, on, plain = library.look(x)
    labels, *rest = library.look(y)
    if not plain or rest[0] != INT64 or rest[2:] != [on, True] or dtype is None:
        return MISSING
    extents = extents_of(shape, rest[1])
    if extents is None or not math.prod(shape) or code_of(dtype) is None:
        return MISSING
    if address % dtype.itemsize or labels % INT64.itemsize:
        return MISSING
    api = driver.driver()
    entered = api.enter(on)
    try:
        gradient = 0
        if prepared.wrt:
            if out is None:
                out = library.empty(shape, dtype, on)
                gradient = library.address(out)
            elif out is x:
                gradient = address
            else:
                return MISSING
        vectors = not (address | gradient) % VECTOR_BYTES
        key = prepared, dtype, shape, extents, on, vectors
        made = binaries.prepared.get(key)
        if made is None:
            made = binaries.prepared[key] = _prepare(*key)
        blocks, threads, size = made.plan.blocks, made.plan.threads, arithmetic_dtype(dtype)
        counting = 0 if made.counts is None else 2 * made.counts[1].blocks
        partials = 0 if prepared.mode == GRAD else made.plan.partials
        scratch = library.empty((4 + counting + 2 * partials + made.scratch,), size, on)
        divisor = start = library.address(scratch)
        start += 4 * size.itemsize
        slot = faults.faults(on).slot(*made.fault)
        stream = library.stream(on)
        batch, classes, inner, deal, ignore, *numbers = made.numbers
        if made.counts is None:
            divisor = 0
        else:
            kernel, grid = made.counts
            counted = labels, 0, 0, batch * inner, classes, ignore, start
            api.launch(kernel, *grid, stream, counted)
            summed = start, grid.blocks, 1.0, 0, divisor
            api.launch(made.number, 1, made.finish_threads, stream, summed)
            start += counting * size.itemsize
        sums = start if partials else 0
        room = start + 2 * partials * size.itemsize if made.scratch else 0
        arguments = (
            *(address, 0, labels, 0, 0, 0, 0, gradient, 0, 0),
            *(batch, classes, inner, deal, ignore, *numbers, divisor if gradient else 0, sums, slot, room),
        )
        for kernel in made.kernels:
            api.launch(kernel, blocks, threads, stream, arguments)
        value = None
        if partials:
            value = library.empty((), dtype, on)
            finished = sums, partials, 1.0, divisor, library.address(value)
            api.launch(made.finish, 1, made.finish_threads, stream, finished)
        faults.check_now(on)
    finally:
        if entered:
            api.leave()
    return prepared.result(value, (out,))


def extents_of(shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return batch, classes and inner positions for a quick call; None where it does not serve."""
    if len(shape) < 2 or target != shape[:1] + shape[2:]:
        return None
    return shape[0], shape[1], math.prod(shape[2:])


def _prepare(
    prepared: Quick, dtype: np.dtype, shape: tuple[int, ...], extents: tuple[int, ...], on: int, vectors: bool
) -> Prepared:
    """Return the kernels of quick calls on such arrays."""
    p = prepared.problem
    factor, divisor = p.weighting.factor, p.weighting.divisor
    batch, classes, inner = extents
    code, of_numbers = code_of(dtype), code_of(arithmetic_dtype(dtype))
    vectors = vectors and rows.whole_vectors(classes, inner, dtype)
    dealt = rows.plan(batch, classes, inner, code, vectors)
    mean = divisor is None
    counts = None
    if mean:
        (count,) = binaries.kernels(
            on, rows.compile_counts, code=of_numbers, weighted=False, sample_weighted=False
        )
        counts = count, rows.counts_launch(batch * inner)
    (number,) = binaries.kernels(on, reduce.compile_finish, code=of_numbers, divided=False)
    (finish,) = binaries.kernels(on, reduce.compile_finish, code=code, divided=mean)
    kernels = binaries.kernels(
        on,
        compile_kernels,
        functions=p.functions,
        request=Request(
            smoothed=p.label_smoothing > 0,
            grad=bool(prepared.wrt),
            softcap=p.softcap is not None,
            lse_square=p.lse_square_scale != 0,
        ),
        code=code,
        plan=rows.shape_free(dealt),
        summed=prepared.mode != GRAD,
        divided=mean and bool(prepared.wrt),
        vectors=vectors,
    )
    numbers = batch, classes, inner, dealt.deal, p.ignore_index, *numbers_of(p, classes, False), factor
    scratch = dealt.blocks * STATE if dealt.variant == SPLIT else 0
    fault = rows.index_fault(p.name, shape, tuple(range(len(shape))))
    return Prepared(
        counts, number, kernels, dealt, finish, reduce.FINISH_THREADS, fault, numbers, scratch
    )  # fmt: skip
