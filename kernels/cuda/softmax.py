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

- `one_pass` (TEAM, BLOCK): a row is in the registers of a part of a warp, or of a block, and read once.
- `stream` (STREAM): a block reads a row twice.
- `part`, then `rest` (SPLIT): several blocks share a row. The first kernel leaves each block's sums in
  `scratch`, `STATE` numbers of the arithmetic type; in the second every block joins those of its row, and
  writes its part of the gradient. The partial sums are one a row.
- `columns` (COLUMNS): a thread has a vector of rows, whose classes are `inner` apart.
"""

from typing import Any, NamedTuple

import numpy as np

from .. import class_weights
from ..class_weights import DISTANCES
from ..freeze import fingerprint
from ..layout import Axes, class_rows
from ..lift import MIXED, NORM, OWN, is_linear, lift_score_curvature, lift_scores, moves
from ..math import exp, log, log1p, tanh
from ..spec import EXACT, FLOAT32, INT64, ScoreFunctions, Scores, arithmetic_dtype, code_of
from . import arithmetic, faults, rows
from .arrays import DeviceArray, aligned, flat
from .reduce import add, quotient
from .rows import (
    AHEAD,
    BLOCK,
    COLUMNS,
    LANES,
    REPEAT,
    SPLIT,
    STREAM,
    TEAM,
    WIDTH,
    T,
    array,
    fill_row,
    fill_vectors,
    held_at,
    lanes,
    load_weights,
    numbers,
    row_state,
    row_team,
    store_partial,
    team_max,
    team_sum,
    vector_at,
)
from .target import (
    WARP,
    Binary,
    as_kernels,
    compile,
    cuda,
    derivatives,
    each,
    floor_of,
    select,
    shared,
    storage,
    tree_sum,
    types,
)
from .target import options as unpack_options

# What else these kernels are bound to, by `kernels`.
LOWEST: Any = np.finfo(np.float32).min
PROBABILITIES: Any = False  # the target holds these
MASSES: Any = True  # all classes have targets
CAPS: Any = False  # scores are capped
WRITES: Any = True  # there is a gradient
HAS_TARGET_GRAD: Any = False
HAS_CURVATURE: Any = False
HAS_OWN: Any = False  # the definition depends on the own class's probability,
HAS_MIXED: Any = True  # on the cross entropy,
HAS_NORM: Any = False  # or on logsumexp
CURVED: Any = False  # its second derivatives are wanted, and not zero
MULTIPLE: Any = True  # it scales with the target
OWN_ONLY: Any = False  # so that a row counts nothing without its own class's weight
LATER: Any = True  # the value is computed apart from the gradient
BY_WEIGHT: Any = False  # the gradient by probabilities is for the class weights
LANES_OF_BLOCK: Any = 1024  # rows that a block's threads have, if each had its own
SLICED: Any = True  # threads share columns
loss: Any = None  # the definition and its derivatives, of `lift_scores`
unpack: Any = None  # gives its options as it takes them
stands: Any = None  # gives what stands for the curvature, if not that itself
last_if_floored: Any = None  # gives the number that it is not below, or None
join: Any = None  # joins the states of the threads that share a row

HALF = 64  # registers a thread, with which half of a multiprocessor's threads are at work
STATE = 5  # maximum, sum of exponentials, of masses, of distances; and the own class's score


class Request(NamedTuple):
    """What one kernel computes."""

    has_probabilities: bool = False  # the target holds these
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
    policy: str = EXACT  # what stands for the curvature
    floored: bool = False  # it is at least a number, the last of the options


# ---- kernels ------------------------------------------------------------------------------------------

# In what follows a row's state is `m`, its maximum; `s`, the sum of the others' exponentials from there;
# `mass`, the sum of their targets, and `distances`, that of their distances from `m` by target; the last two
# are None where only the own class has a target. `settings` are `keep` and `spread`, which smooth the target;
# the cap of scores, or None; what multiplies the squared logsumexp, or None; the definition's options; and
# the curvature's floor, or None.
# `outputs` are the gradients by scores and by probabilities, and the curvature.


def one_pass(
    x, q, labels, weight, row_weights, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, cap, square, options, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
    settings = keep, spread, cap, square, unpack(options, factor), last_if_floored(options)
    outputs = g, gq, h
    hi = lo = T(0)
    team, height, of_block, lane = row_team(deal)
    vectors = classes // WIDTH
    first = cuda.blockIdx.x * height
    while first < batch:
        i = first + of_block
        live, fill, label, row_weight, own_weight, up = row_state(
            labels, weight, row_weights, upstream, i, batch, classes, ignore, scale, OWN_ONLY, lane == 0,
            faults,
        )  # fmt: skip
        base = i * classes
        m, s, mass, distances = empty_state(T(0))
        own_score = T(0)
        at, there, own = each(held_at, (AHEAD,), (lane, team, vectors, base, label, WIDTH))
        if live:
            xs, qs = load_scores(x, at, cap), array.load_vectors(q, at)
            ws = load_weights(weight, lane, team, vectors, 0)
            if labels is not None:
                own_score = load_score(x, base + label, cap)
            m, s, mass, distances = absorb(xs, ws, qs, there, own, settings, m, s, mass, distances)
        m, s, mass, distances = join(m, s, mass, distances, team)
        cuda.syncwarp()  # until all have read their own class's score, which the gradient may overwrite
        v = fill
        if live:
            if WRITES:
                row = conclude(m, s, mass, distances, own_score, row_weight, own_weight, up, settings)
                store_gradients(xs, ws, qs, at, there, own, settings, outputs, row)
                if not LATER:
                    v = row[-1]
        elif i < batch:
            fill_vectors(outputs, at, there, fill)
        if lane == 0 and i < batch:
            if LATER:
                v = fill
                if live:
                    v = value(m, s, mass, distances, own_score, row_weight, own_weight, settings)
            array.store(terms, i, v)
            if partials is not None:
                hi, lo = add(hi, lo, v)
        first += cuda.gridDim.x * height
    if partials is not None:
        store_partial(partials, hi, lo)


def stream(
    x, q, labels, weight, row_weights, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, cap, square, options, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
    settings = keep, spread, cap, square, unpack(options, factor), last_if_floored(options)
    outputs = g, gq, h
    hi = lo = T(0)
    team, lane = cuda.blockDim.x, cuda.threadIdx.x
    vectors = classes // WIDTH
    i = cuda.blockIdx.x
    while i < batch:
        live, fill, label, row_weight, own_weight, up = row_state(
            labels, weight, row_weights, upstream, i, batch, classes, ignore, scale, OWN_ONLY, lane == 0,
            faults,
        )  # fmt: skip
        base = i * classes
        v, own_score = fill, T(0)
        if live:
            if labels is not None:
                own_score = load_score(x, base + label, cap)
            m, s, mass, distances = read_row(x, q, weight, base, lane, team, vectors, label, settings)
            m, s, mass, distances = join(m, s, mass, distances, team)
            if WRITES:
                row = conclude(m, s, mass, distances, own_score, row_weight, own_weight, up, settings)
                write_row(x, q, weight, outputs, base, lane, team, vectors, label, settings, row)
                if not LATER:
                    v = row[-1]
            if LATER and lane == 0:
                v = value(m, s, mass, distances, own_score, row_weight, own_weight, settings)
        else:
            fill_row(outputs, base, lane, team, vectors, fill)
        if lane == 0:
            array.store(terms, i, v)
            if partials is not None:
                hi, lo = add(hi, lo, v)
        i += cuda.gridDim.x
    if partials is not None:
        store_partial(partials, hi, lo)


def part(
    x, q, labels, weight, row_weights, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, cap, square, options, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    settings = keep, spread, cap, square, unpack(options, factor), last_if_floored(options)
    i = cuda.blockIdx.x // deal
    live, _, label, _, _, _ = row_state(
        labels, weight, row_weights, upstream, i, batch, classes, ignore, factor, OWN_ONLY, False, faults
    )
    if live:
        base, vectors = i * classes, classes // WIDTH
        run = (vectors + deal - 1) // deal
        start = (cuda.blockIdx.x - i * deal) * run
        stop = min(start + run, vectors)
        first = start + cuda.threadIdx.x
        m, s, mass, distances = read_row(x, q, weight, base, first, cuda.blockDim.x, stop, label, settings)
        m, s, mass, distances = join(m, s, mass, distances, cuda.blockDim.x)
        if cuda.threadIdx.x == 0:
            at = cuda.blockIdx.x * STATE
            scratch[at] = m
            scratch[at + 1] = s
            if MASSES:
                scratch[at + 2] = mass
                scratch[at + 3] = distances
            if labels is not None:
                scratch[at + 4] = load_score(x, base + label, cap)


def rest(
    x, q, labels, weight, row_weights, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, cap, square, options, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
    settings = keep, spread, cap, square, unpack(options, factor), last_if_floored(options)
    outputs = g, gq, h
    i = cuda.blockIdx.x // deal
    leads = cuda.blockIdx.x == i * deal and cuda.threadIdx.x == 0
    live, fill, label, row_weight, own_weight, up = row_state(
        labels, weight, row_weights, upstream, i, batch, classes, ignore, scale, OWN_ONLY, leads, faults
    )
    base, vectors = i * classes, classes // WIDTH
    run = (vectors + deal - 1) // deal
    start = (cuda.blockIdx.x - i * deal) * run
    stop = min(start + run, vectors)
    first = start + cuda.threadIdx.x
    v, own_score = fill, T(0)
    if live:
        m, s, mass, distances = empty_state(T(0))
        k = cuda.threadIdx.x & 31
        while k < deal:
            at = (i * deal + k) * STATE
            other = away = None
            if MASSES:
                other, away = scratch[at + 2], scratch[at + 3]
            m, s, mass, distances = joined(m, s, mass, distances, scratch[at], scratch[at + 1], other, away)
            k += 32
        m, s, mass, distances = join_team(m, s, mass, distances, WARP)
        if labels is not None:
            own_score = scratch[i * deal * STATE + 4]
        if WRITES:
            row = conclude(m, s, mass, distances, own_score, row_weight, own_weight, up, settings)
            write_row(x, q, weight, outputs, base, first, cuda.blockDim.x, stop, label, settings, row)
            if not LATER:
                v = row[-1]
        if LATER and leads:
            v = value(m, s, mass, distances, own_score, row_weight, own_weight, settings)
    else:
        fill_row(outputs, base, first, cuda.blockDim.x, stop, fill)
    if leads:
        array.store(terms, i, v)
        if partials is not None:
            partials[2 * i] = v
            partials[2 * i + 1] = T(0)


def columns(
    x, q, labels, weight, row_weights, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, cap, square, options, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
    settings = keep, spread, cap, square, unpack(options, factor), last_if_floored(options)
    outputs = g, gq, h
    hi = lo = T(0)
    n = batch * inner
    across = cuda.blockDim.x >> deal
    part = cuda.threadIdx.x // across
    column = cuda.threadIdx.x - part * across
    step = (1 << deal) * inner
    first = cuda.blockIdx.x * across
    while first * WIDTH < n:
        i = (first + column) * WIDTH
        live, fill, label, row_weight, own_weight, up = each(
            column_state,
            (LANES,),
            (i, labels, weight, row_weights, upstream, n, classes, ignore, scale, part == 0, faults),
        )
        some = False
        for alive in live:
            some = some or alive
        base = (i // inner * classes) * inner + i % inner
        end = base + classes * inner
        m, s, mass, distances = each(empty_state, (fill,), ())
        own_score = s
        if some:
            if labels is not None:
                own_score = each(column_score, (label, live, LANES), (x, base, inner, cap))[0]
            c, at = part, base + part * inner
            while at < end:
                there = at + step < end
                also = at + step if there else at
                xs, qs = load_scores(x, (at,), cap), array.load_vectors(q, (at,))
                ys, ps = load_scores(x, (also,), cap), array.load_vectors(q, (also,))
                w, v = numbers.load(weight, c), numbers.load(weight, c + (1 << deal) if there else c)
                m, s, mass, distances = each(
                    absorb_column, (xs, qs, m, s, mass, distances, label), (w, c, True, settings)
                )
                c += 1 << deal
                m, s, mass, distances = each(
                    absorb_column, (ys, ps, m, s, mass, distances, label), (v, c, there, settings)
                )
                c += 1 << deal
                at += 2 * step
        if SLICED:
            m, s, mass, distances = join(m, s, mass, distances, across)
        sums = m, s, mass, distances, own_score, row_weight, own_weight
        if not LATER:
            row = each(conclude, (*sums, up), (settings,))
        if part == 0 and i < n:
            if LATER:
                vs = each(column_value, (*sums, live, fill), (settings,))[0]
            else:
                vs = each(column_kept, (row[-1], live, fill), ())[0]
            array.store_vectors(terms, (i,), (True,), vs)
            if partials is not None:
                hi, lo = add(hi, lo, tree_sum(vs))
        if WRITES and i < n:
            if LATER:
                row = each(conclude, (*sums, up), (settings,))
            c, at = part, base + part * inner
            while at < end:
                there = at + step < end
                also = at + step if there else at
                xs, qs = load_scores(x, (at,), cap), array.load_vectors(q, (at,))
                ys, ps = load_scores(x, (also,), cap), array.load_vectors(q, (also,))
                w, v = numbers.load(weight, c), numbers.load(weight, c + (1 << deal) if there else c)
                store_column(xs, qs, label, live, fill, row, w, c, settings, outputs, at, True)
                c += 1 << deal
                store_column(ys, ps, label, live, fill, row, v, c, settings, outputs, also, there)
                c += 1 << deal
                at += 2 * step
        first += cuda.gridDim.x * across
    if partials is not None:
        store_partial(partials, hi, lo)


# ---- scores -------------------------------------------------------------------------------------------


def load_score(x, i, cap):
    """One score, capped where a cap is given."""
    return array.load(x, i) if cap is None else capped(array.load(x, i), cap)[0]


def load_scores(x, at, cap):
    """Some vectors of scores, capped where a cap is given."""
    xs = array.load_vectors(x, at)
    if cap is None:
        return xs
    else:
        return each(capped, (xs,), (cap,))[0]


def capped(x, cap):
    return (cap * tanh(x / cap),)


# ---- a row's state ------------------------------------------------------------------------------------


def empty_state(like):
    """The state of a row of which nothing has been read."""
    return T(LOWEST), T(0), T(0) if MASSES else None, T(0) if MASSES else None


def read_row(x, q, weight, base, first, step, stop, label, settings):
    """The state of what a thread reads of a row: from the vector `first` on, before `stop`."""
    _, _, cap, _, _, _ = settings
    m, s, mass, distances = empty_state(T(0))
    while first < stop:
        at, there, own = each(vector_at, (AHEAD,), (first, step, stop, base, label, WIDTH))
        xs, qs = load_scores(x, at, cap), array.load_vectors(q, at)
        ws = load_weights(weight, first, step, stop, 0)
        m, s, mass, distances = absorb(xs, ws, qs, there, own, settings, m, s, mass, distances)
        first += REPEAT * step
    return m, s, mass, distances


def absorb(xs, ws, qs, there, own, settings, m, s, mass, distances):
    """The state of a row with some vectors more."""
    keep, spread, _, _, _, _ = settings
    shown = each(shown_score, (xs, LANES), (there, own))[0]
    top = m
    for x in shown:
        top = max(top, x)
    s, distances = rescaled(m, s, distances, mass, top)
    s += tree_sum(each(power, (shown,), (top,))[0])
    if MASSES:
        ts = each(shown_mass, (ws, qs, LANES), (there, own, keep, spread))[0]
        distances += tree_sum(each(distance, (shown, ts), (top,))[0])
        mass += tree_sum(ts)
    return top, s, mass, distances


def shown_score(x, lane, there, own):
    """A score, or -inf: past the end of a row, and for its own class."""
    return (select(there[lane // WIDTH] & (own[lane // WIDTH] != lane % WIDTH), x, T(-np.inf)),)


def shown_mass(w, q, lane, there, own, keep, spread):
    t = mass_of(w, q, keep, spread)
    return (select(there[lane // WIDTH] & (own[lane // WIDTH] != lane % WIDTH), t, T(0)),)


def mass_of(w, q, keep, spread):
    """A class's target, without the own class's: a part of the smoothing, or a probability; weighted."""
    t = spread if q is None else keep * q + spread
    return t if w is None else t * w


def power(x, m):
    return (exp(x - m),)


def distance(x, t, m):
    return (select(t == T(0), T(0), t * (m - x)),)


def rescaled(m, s, distances, mass, top):
    """A sum of exponentials, and one of distances from `m` with masses of sum `mass`, now from `top`."""
    s = s * exp(m - top)
    if mass is not None:
        distances = select(mass == T(0), distances, distances + (top - m) * mass)
    return s, distances


def joined(m, s, mass, distances, other_m, other_s, other_mass, other_distances):
    """Two states as one."""
    top = max(m, other_m)
    s, distances = rescaled(m, s, distances, mass, top)
    more, away = rescaled(other_m, other_s, other_distances, other_mass, top)
    if MASSES:
        distances += away
        mass += other_mass
    return top, s + more, mass, distances


def join_team(m, s, mass, distances, team):
    """The states of a team's threads as one, in each of them."""
    top = team_max(m, team)
    s, distances = rescaled(m, s, distances, mass, top)
    s = team_sum(s, team)
    if mass is not None:
        mass = team_sum(mass, team)
        distances = team_sum(distances, team)
    return top, s, mass, distances


def join_block(m, s, mass, distances, team):
    """The states of a block's threads as one, in each of them."""
    zero = T(0)
    ms, ss = shared(32, zero), shared(32, zero)
    if mass is not None:
        masses, fars = shared(32, zero), shared(32, zero)
    top, total, all_mass, far = join_team(m, s, mass, distances, WARP)
    warp, lane = cuda.threadIdx.x >> 5, cuda.threadIdx.x & 31
    cuda.syncthreads()  # until all have read what an earlier call left
    if lane == 0:
        ms[warp] = top
        ss[warp] = total
        if mass is not None:
            masses[warp] = all_mass
            fars[warp] = far
    cuda.syncthreads()
    there = lane < cuda.blockDim.x >> 5
    top = ms[lane if there else 0]
    total = ss[lane] if there else zero
    if mass is None:
        return join_team(top, total, None, None, WARP)
    else:
        all_mass = masses[lane] if there else zero
        far = fars[lane] if there else zero
        return join_team(top, total, all_mass, far, WARP)


# ---- what follows from a row's state ------------------------------------------------------------------


def conclude(m, s, mass, distances, own_score, row_weight, own_weight, factor, settings):
    """What a row's gradient is made of: `slopes` takes it. The row's value is last."""
    inside, outside = sides(row_weight)
    up = factor * row_weight if stands is not None else T(0)
    factor = factor * outside
    if PROBABILITIES:
        row = conclude_probabilities(m, s, mass, distances, inside, outside, factor, settings)
    else:
        row = conclude_label(m, s, mass, distances, own_score, inside, outside, own_weight, factor, settings)
    return (up, *row)


def value(m, s, mass, distances, own_score, row_weight, own_weight, settings):
    """A row's value."""
    inside, outside = sides(row_weight)
    if PROBABILITIES:
        total = s + (m - m)
        return outside * judge_probabilities(m, total, log(total), inside, mass, distances, settings)[0]
    else:
        top = max(m, own_score)
        own, others = exp(own_score - top), s * exp(m - top)
        t = settings[0] * own_weight * inside
        state = m, s, mass, distances
        return outside * judge_label(top, own, others, own_score, t, inside, own_weight, state, settings)[0]


def sides(row_weight):
    """What multiplies a row's masses, and its value: what scales with the masses is weighed there."""
    return (row_weight, T(1)) if MULTIPLE else (T(1), row_weight)


def conclude_label(m, s, mass, distances, own_score, inside, outside, own_weight, factor, settings):
    keep, spread, _, _, _, _ = settings
    top = max(m, own_score)
    own, others = exp(own_score - top), s * exp(m - top)
    total = own + others
    inverse = T(1) / total
    t = all_mass = keep * own_weight * inside
    d = judge_label(top, own, others, own_score, t, inside, own_weight, (m, s, mass, distances), settings)
    k = own_slope = r = T(0)
    if MASSES:
        t += inside * spread * own_weight
        all_mass = inside * mass + t
    if HAS_MIXED:
        b = factor * d[2]
        if MASSES:
            k = b * inside
            own_slope = k * mass * own
        r = b * all_mass
        own_slope = own_slope - b * t * others
    if HAS_NORM:
        r += factor * d[3]
        own_slope += factor * d[3] * own
    if HAS_OWN:
        r -= factor * d[1]
        own_slope += factor * d[1] * others
    most = r
    r = r * inverse
    own_slope = own_slope * inverse
    own_curvature = r * own * (others * inverse)
    of_p = of_both = of_t = T(0)
    if CURVED:
        rest, p = others * inverse, own * inverse
        u = -t * rest
        of_p, of_both, of_t = d[4] + d[6] - d[8], d[9] - d[7], d[5]
        if MASSES:
            u = (mass * own - t * others) * inverse
        else:
            of_p += t * (t * of_t + of_both)
        bend = d[4] * rest * rest + d[5] * u * u + d[6] * p * p
        bend += d[7] * rest * u + d[8] * rest * p + d[9] * u * p
        own_curvature += factor * bend
        of_p, of_both, of_t = factor * of_p, factor * of_both, factor * of_t
    v = outside * d[0]
    return (
        top, r, k, own_slope, own_curvature, total, inverse, T(0), all_mass, of_p, of_both, of_t, most, v
    )  # fmt: skip


def judge_label(top, own, others, own_score, own_mass, inside, own_weight, state, settings):
    """A row's value and its derivatives, as `lift_scores` gives them; `inside` is in the masses."""
    _, spread, _, square, o, _ = settings
    m, s, mass, distances = state
    zero, one = T(0), T(1)
    inverse = one / (own + others)
    log_total = log1p(others if own_score == top else (others - one) + own)
    away = (top - own_score) + log_total
    entropy = zero if own_mass == zero else own_mass * away
    if MASSES:
        t = spread * own_weight
        far = rescaled(m, s, distances, mass, top)[1] + (zero if t == zero else t * (top - own_score))
        t += mass
        entropy += zero if t == zero else inside * (far + t * log_total)
    return loss(-away, others * inverse, own * inverse, own_weight, entropy, top + log_total, square, o)


def conclude_probabilities(m, s, mass, distances, inside, outside, factor, settings):
    total = s + (m - m)  # NaN where the maximum is infinite
    inverse = T(1) / total
    log_total = log(total)
    d = judge_probabilities(m, total, log_total, inside, mass, distances, settings)
    k = r = T(0)
    if HAS_MIXED:
        k = factor * d[2] * inside
        r = k * mass
    if HAS_NORM:
        r += factor * d[3]
    of_p = of_both = of_t = T(0)
    if CURVED:
        of_p, of_both, of_t = factor * d[6], factor * d[9], factor * d[5]
    v = outside * d[0]
    return m, r * inverse, k, T(0), T(0), total, inverse, log_total, mass, of_p, of_both, of_t, r, v


def judge_probabilities(m, total, log_total, inside, mass, distances, settings):
    """As `judge_label`, where all classes have masses."""
    _, _, _, square, o, _ = settings
    zero = T(0)
    entropy = inside * (distances + (zero if mass == zero else mass * log_total))
    return loss(zero, zero, zero, T(1), entropy, m + log_total, square, o)


# ---- a row's gradient ---------------------------------------------------------------------------------


def write_row(x, q, weight, outputs, base, first, step, stop, label, settings, row):
    """Write the gradient where `read_row` read."""
    _, _, cap, _, _, _ = settings
    while first < stop:
        at, there, own = each(vector_at, (AHEAD,), (first, step, stop, base, label, WIDTH))
        xs, qs = load_scores(x, at, cap), array.load_vectors(q, at)
        ws = load_weights(weight, first, step, stop, 0)
        store_gradients(xs, ws, qs, at, there, own, settings, outputs, row)
        first += REPEAT * step


def store_gradients(xs, ws, qs, at, there, own, settings, outputs, row):
    g, gq, h = outputs
    d, dq, c = each(lane_slopes, (xs, ws, qs, LANES), (own, settings, row))
    array.store_vectors(g, at, there, d)
    array.store_vectors(gq, at, there, dq)
    array.store_vectors(h, at, there, c)


def lane_slopes(x, w, q, lane, own, settings, row):
    return slopes(x, w, q, own[lane // WIDTH] == lane % WIDTH, settings, row)


def slopes(x, w, q, is_own, settings, row):
    """The gradients by a score and by a probability, and the curvature."""
    keep, spread, cap, _, _, _ = settings
    (
        up, m, r, k, own_slope, own_curvature, total, inverse, log_total, all_mass, of_p, of_both, of_t, most,
        _,
    ) = row  # fmt: skip
    dq = c = T(0)
    e = exp(x - m)
    d = r * e
    if HAS_CURVATURE:
        c = d * ((total - e) * inverse)
        if CURVED:
            p = e * inverse
            bend = of_p * p * p
            if MASSES:
                u = all_mass * p - mass_of(w, q, keep, spread)
                bend += u * (of_both * p + of_t * u)
            c += bend
        c = select(is_own, own_curvature, c)
    if MASSES and HAS_MIXED:
        d -= k * mass_of(w, q, keep, spread)
    d = select(is_own, own_slope, d)
    if HAS_TARGET_GRAD:
        f = k
        if not BY_WEIGHT:
            f = k * keep if w is None else k * keep * w
        dq = select(f == T(0), T(0), f * ((m - x) + log_total))
    if CAPS:
        t = x / cap
        by = T(1) - t * t
        if HAS_CURVATURE:
            c = c * by * by - d * (t + t) * by / cap
        d = d * by
    if stands is not None:
        c = stands(d, c, up, most, settings[-1])
    return d, dq, c


# ---- columns: the same, a lane of a vector being a row ------------------------------------------------


def column_state(lane, i, labels, weight, row_weights, upstream, n, classes, ignore, scale, reports, faults):
    return row_state(
        labels, weight, row_weights, upstream, i + lane, n, classes, ignore, scale, OWN_ONLY, reports, faults
    )


def column_score(label, live, lane, x, base, inner, cap):
    return (load_score(x, base + label * inner + lane, cap) if live else T(0),)


def absorb_column(x, q, m, s, mass, distances, label, w, c, there, settings):
    """The state of a row with one class more: of both exponentials, one is 1."""
    keep, spread, _, _, _, _ = settings
    zero = T(0)
    shown = there & (c != label)
    d = select(shown, x, T(-np.inf)) - m
    grows = d > zero
    e = exp(-abs(d))
    top = select(grows, x, m)
    s = select(grows, s * e + T(1), s + e)
    if MASSES:
        distances = select(grows & (mass != zero), distances + d * mass, distances)
        t = select(shown, mass_of(w, q, keep, spread), zero)
        distances += select(t == zero, zero, t * (top - x))
        mass += t
    return top, s, mass, distances


def join_slices(m, s, mass, distances, across):
    """The states of the threads that share rows, in their order, in each of them."""
    zero = T(0)
    ms, ss = shared(LANES_OF_BLOCK, zero), shared(LANES_OF_BLOCK, zero)
    masses = fars = None
    if MASSES:
        masses, fars = shared(LANES_OF_BLOCK, zero), shared(LANES_OF_BLOCK, zero)
    cuda.syncthreads()  # until all have read what an earlier call left
    each(leave_column, (m, s, mass, distances, LANES), (ms, ss, masses, fars, cuda.threadIdx.x * WIDTH))
    cuda.syncthreads()
    m, s, mass, distances = each(empty_state, (m,), ())
    at = cuda.threadIdx.x % across
    while at < cuda.blockDim.x:
        m, s, mass, distances = each(
            join_column, (m, s, mass, distances, LANES), (ms, ss, masses, fars, at * WIDTH)
        )
        at += across
    return m, s, mass, distances


def leave_column(m, s, mass, distances, lane, ms, ss, masses, fars, at):
    ms[at + lane] = m
    ss[at + lane] = s
    if MASSES:
        masses[at + lane] = mass
        fars[at + lane] = distances
    return ()


def join_column(m, s, mass, distances, lane, ms, ss, masses, fars, at):
    other = away = None
    if MASSES:
        other, away = masses[at + lane], fars[at + lane]
    return joined(m, s, mass, distances, ms[at + lane], ss[at + lane], other, away)


def column_value(m, s, mass, distances, own_score, row_weight, own_weight, live, fill, settings):
    return (value(m, s, mass, distances, own_score, row_weight, own_weight, settings) if live else fill,)


def column_kept(v, live, fill):
    return (select(live, v, fill),)


def store_column(xs, qs, label, live, fill, row, w, c, settings, outputs, at, there):
    g, gq, h = outputs
    d, dq, b = each(column_slopes, (xs, qs, label, live, fill, *row), (w, c, settings))
    array.store_vectors(g, (at,), (there,), d)
    array.store_vectors(gq, (at,), (there,), dq)
    array.store_vectors(h, (at,), (there,), b)


def column_slopes(
    x, q, label, live, fill, up, m, r, k, own_slope, own_curvature, total, inverse, log_total, all_mass, of_p,
    of_both, of_t, most, v, w, c, settings,
):  # fmt: skip
    row = (
        up, m, r, k, own_slope, own_curvature, total, inverse, log_total, all_mass, of_p, of_both, of_t, most,
        v,
    )  # fmt: skip
    d, dq, b = slopes(x, w, q, c == label, settings, row)
    return select(live, d, fill), select(live, dq, fill), select(live, b, fill)


# ---- compiling ----------------------------------------------------------------------------------------

KERNELS = {TEAM: (one_pass,), BLOCK: (one_pass,), STREAM: (stream,), SPLIT: (part, rest), COLUMNS: (columns,)}


def kernels(
    functions: ScoreFunctions, request: Request, code: int, plan: rows.Plan, vectors: bool = True
) -> tuple[Any, ...]:
    """The kernels of a definition and a plan's variant, to be launched in order, in plain Python."""
    variant, r = plan.variant, request
    repeat = 1 if variant == COLUMNS else rows.repeat(code, vectors, variant)
    affine, multiple = is_linear(functions)
    multiple = multiple and not r.lse_square
    groups = moves(functions) | ({NORM} if r.lse_square else set())
    masses, writes = r.has_probabilities or r.smoothed, r.grad or r.target_grad or r.curvature
    bound = lanes(code, vectors, repeat, variant in (TEAM, COLUMNS))
    scope = dict(
        bound,
        LOWEST=np.finfo(bound["T"]).min,
        PROBABILITIES=r.has_probabilities,
        MASSES=masses,
        WRITES=writes,
        HAS_OWN=OWN in groups,
        HAS_MIXED=MIXED in groups,
        HAS_NORM=NORM in groups,
        HAS_TARGET_GRAD=r.target_grad,
        HAS_CURVATURE=r.curvature,
        CAPS=r.softcap,
        CURVED=r.curvature and (r.lse_square or not affine),
        MULTIPLE=multiple,
        OWN_ONLY=multiple and not masses,
        LATER=multiple or not writes,
        BY_WEIGHT=r.by_weight,
        LANES_OF_BLOCK=plan.threads * bound["WIDTH"],
        SLICED=variant == COLUMNS and plan.deal > 0,
        loss=lift_scores(functions, derivatives(), r.curvature, r.lse_square),
        unpack=unpack_options(functions.options),
        stands=lift_score_curvature(r.policy, r.floored, derivatives()) if r.curvature else None,
        last_if_floored=floor_of(r.floored),
        join=join_team if variant == TEAM else join_slices if variant == COLUMNS else join_block,
    )
    definition = fingerprint(functions.value), functions.statistics, functions.options
    return as_kernels(KERNELS[variant], scope, "softmax", (definition, tuple(r), code, vectors))


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
        given(r.has_probabilities),
        given(not r.has_probabilities, rows.INTEGERS),  # class indices
        given(r.weighted, numbers),
        given(r.sample_weighted, numbers),
        given(r.upstream, numbers),
        given(r.terms),
        given(r.grad),
        given(r.target_grad),
        given(r.curvature),
        *[types.int64] * 5,  # batch, classes, inner, the plan's `deal`, ignored index
        arithmetic,  # 1 - label_smoothing
        given(r.has_probabilities or r.smoothed, arithmetic),  # label_smoothing / classes
        given(r.softcap, arithmetic),
        given(r.lse_square, arithmetic),  # what multiplies the squared logsumexp
        types.UniTuple(arithmetic, functions.options.count(None) + r.floored),
        arithmetic,  # factor of the gradient
        given(divided, numbers),  # divisor of the gradient
        given(summed, numbers),  # partial sums of the terms
        given(not r.has_probabilities, rows.INTEGERS),  # faults
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
    fast = code == FLOAT32 and plan.variant != COLUMNS and not (request.has_probabilities or request.smoothed)
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
        slot = queue.slot(*rows.index_fault(p.name, p.input.shape, axes.order))
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
    for output, w in zip(gradients, written, strict=True):
        these.copy_back(output, w)
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
        has_probabilities=q is not None,
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
        policy=p.curvature if gradients[2] is not None else EXACT,
        floored=gradients[2] is not None and p.floor is not None,
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
            *((p.floor,) if request.floored else ()),
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
