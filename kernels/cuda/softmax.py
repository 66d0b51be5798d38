"""Cross entropy of class scores, with class indices or probabilities: terms, gradients, curvature.

A first pass over a row finds its maximum m and its sum of ``exp(x - m)`` together: a running maximum, and a
sum that is rescaled when it grows. What label smoothing or probabilities ask for, the distances ``m - x`` by
weight, runs along: all are sums of what is not negative. A second pass writes the gradient. With class
indices the row's own class stays out of the sums: the loss is ``log1p`` of the others' where it is the
largest, and its gradient is made of theirs, so neither cancels.

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
from ..bind import bind
from ..layout import Axes, class_rows
from ..math import exp, log, log1p
from ..spec import GRAD, INT64, MISSING, Quick, Scores, arithmetic_dtype, code_of
from . import arithmetic, binaries, driver, faults, libraries, reduce, rows
from .arrays import VECTOR_BYTES, DeviceArray, aligned, flat
from .reduce import add, partial_sum, quotient
from .rows import BLOCK, COLUMNS, SPLIT, STREAM, TEAM, look, team_max, team_sum, vector_at, weights_at
from .target import WARP, Binary, compile, cuda, device, each, select, shared, storage, tree_sum, types

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


def slopes(x, w, q, is_own, keep, spread, gq, h, row):
    """The gradients by a score and by a probability, and the curvature."""
    m, r, k, own_slope, own_curvature, total, inverse, log_total = row
    dq = c = T(0)
    e = exp(x - m)
    d = r * e
    if h is not None:
        c = select(is_own, own_curvature, d * ((total - e) * inverse))
    if MASSES is not None:
        d -= k * mass_of(w, q, keep, spread)
    d = select(is_own, own_slope, d)
    if gq is not None:
        f = k * keep if w is None else k * keep * w
        dq = select(f == T(0), T(0), f * ((m - x) + log_total))
    return d, dq, c


def slope(x, w, q, lane, own, keep, spread, gq, h, row):
    return slope_of(x, w, q, own[lane // WIDTH] == lane % WIDTH, keep, spread, gq, h, row)


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


def gathered(x, q, weight, base, first, step, stop, label, keep, spread):
    """The state of what a thread reads of a row: from the vector `first` on, before `stop`."""
    m, s = T(LOWEST), T(0)
    whole = far = None
    if MASSES is not None:
        whole = far = T(0)
    while first < stop:
        at, there, own = each(vector_at, (AHEAD,), (first, step, stop, base, label, WIDTH))
        xs, qs = array.load_vectors(x, at), array.load_vectors(q, at)
        ws = numbers.load_vectors(
            weight, each(weights_at, (PIECES, OFFSETS), (first, step, stop, 0, WIDTH))[0]
        )
        m, s, whole, far = absorb(xs, ws, qs, there, own, keep, spread, m, s, whole, far)
        first += REPEAT * step
    return m, s, whole, far


# ---- what follows from the sums -----------------------------------------------------------------------


def concluded_labels(m, s, whole, far, hit, share, own_weight, factor, keep, spread):
    """What a row's gradient is made of: `slope` takes it."""
    top = max(m, hit)
    own, others = exp(hit - top), s * exp(m - top)
    total = own + others
    inverse = T(1) / total
    t = total_share = keep * own_weight * share
    k = own_slope = T(0)
    if MASSES is not None:
        t += share * spread * own_weight
        total_share = share * whole + t
        k = factor * share
        own_slope = k * whole * own
    r = factor * total_share * inverse
    own_slope = (own_slope - factor * t * others) * inverse
    return top, r, k, own_slope, r * own * (others * inverse), total, inverse, T(0)


def concluded_probabilities(m, s, whole, far, hit, share, own_weight, factor, keep, spread):
    total = s + (m - m)  # NaN where the maximum is infinite
    inverse = T(1) / total
    k = factor * share
    return m, k * whole * inverse, k, T(0), T(0), total, inverse, log(total)


def value_of_label(m, s, whole, far, hit, share, own_weight, keep, spread):
    zero = T(0)
    top = max(m, hit)
    own, others = exp(hit - top), s * exp(m - top)
    log_total = log1p(others if hit == top else (others - T(1)) + own)
    t = keep * own_weight * share
    v = zero if t == zero else t * ((top - hit) + log_total)
    if MASSES is not None:
        own_mass = spread * own_weight
        far = rescaled(m, s, far, whole, top)[1] + (zero if own_mass == zero else own_mass * (top - hit))
        whole += own_mass
        v += zero if whole == zero else share * (far + whole * log_total)
    return v


def value_of_probabilities(m, s, whole, far, hit, share, own_weight, keep, spread):
    return share * (far + (T(0) if whole == T(0) else whole * log(s + (m - m))))


# ---- a row's gradient ---------------------------------------------------------------------------------


def putting(xs, ws, qs, at, there, own, keep, spread, g, gq, h, row):
    d, dq, c = each(at_slope, (xs, ws, qs, LANES), (own, keep, spread, gq, h, row))
    array.store_vectors(g, at, there, d)
    array.store_vectors(gq, at, there, dq)
    array.store_vectors(h, at, there, c)


def scattered(x, q, weight, g, gq, h, base, first, step, stop, label, keep, spread, row):
    """Write the gradient where `gather` read."""
    while first < stop:
        at, there, own = each(vector_at, (AHEAD,), (first, step, stop, base, label, WIDTH))
        xs, qs = array.load_vectors(x, at), array.load_vectors(q, at)
        ws = numbers.load_vectors(
            weight, each(weights_at, (PIECES, OFFSETS), (first, step, stop, 0, WIDTH))[0]
        )
        put(xs, ws, qs, at, there, own, keep, spread, g, gq, h, row)
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
    spread, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
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
            MASSES is None,
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
            xs, qs = array.load_vectors(x, at), array.load_vectors(q, at)
            pieces = each(weights_at, (PIECES, OFFSETS), (lane, team, vectors, 0, WIDTH))[0]
            ws = numbers.load_vectors(weight, pieces)
            if labels is not None:
                hit = array.load(x, base + label)
            m, s, whole, far = absorb(xs, ws, qs, there, own, keep, spread, m, s, whole, far)
        m, s, whole, far = join(m, s, whole, far, team)
        cuda.syncwarp()  # until all have read their own class's score, which the gradient may overwrite
        if live:
            if WRITES is not None:
                row = conclude(m, s, whole, far, hit, share, own_weight, up, keep, spread)
                put(xs, ws, qs, at, there, own, keep, spread, g, gq, h, row)
        elif i < batch:
            blank(g, gq, h, at, there, fill)
        if lane == 0 and i < batch:
            v = value(m, s, whole, far, hit, share, own_weight, keep, spread) if live else fill
            array.store(terms, i, v)
            if partials is not None:
                hi, lo = add(hi, lo, v)
        first += cuda.gridDim.x * rows_of_block
    if partials is not None:
        store_partial(partials, hi, lo)


def stream(
    x, q, labels, weight, sample_weight, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
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
            MASSES is None,
            lane == 0,
            faults,
        )
        base = i * classes
        v, hit = fill, T(0)
        if live:
            if labels is not None:
                hit = array.load(x, base + label)
            m, s, whole, far = gather(x, q, weight, base, lane, team, vectors, label, keep, spread)
            m, s, whole, far = join(m, s, whole, far, team)
            if WRITES is not None:
                row = conclude(m, s, whole, far, hit, share, own_weight, up, keep, spread)
                scatter(x, q, weight, g, gq, h, base, lane, team, vectors, label, keep, spread, row)
            if lane == 0:
                v = value(m, s, whole, far, hit, share, own_weight, keep, spread)
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
    spread, factor, divisor, partials, faults, scratch,
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
        MASSES is None,
        False,
        faults,
    )
    if live:
        base, vectors = i * classes, classes // WIDTH
        run = (vectors + deal - 1) // deal
        start = (cuda.blockIdx.x - i * deal) * run
        stop = min(start + run, vectors)
        first = start + cuda.threadIdx.x
        m, s, whole, far = gather(x, q, weight, base, first, cuda.blockDim.x, stop, label, keep, spread)
        m, s, whole, far = join(m, s, whole, far, cuda.blockDim.x)
        if cuda.threadIdx.x == 0:
            at = cuda.blockIdx.x * STATE
            scratch[at] = m
            scratch[at + 1] = s
            if MASSES is not None:
                scratch[at + 2] = whole
                scratch[at + 3] = far
            if labels is not None:
                scratch[at + 4] = array.load(x, base + label)


def rest(
    x, q, labels, weight, sample_weight, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
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
        MASSES is None,
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
            row = conclude(m, s, whole, far, hit, share, own_weight, up, keep, spread)
            scatter(x, q, weight, g, gq, h, base, first, cuda.blockDim.x, stop, label, keep, spread, row)
        if leads:
            v = value(m, s, whole, far, hit, share, own_weight, keep, spread)
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
        labels, weight, sample_weight, upstream, i + lane, n, classes, ignore, scale, MASSES is None, reports,
        faults,
    )  # fmt: skip


def start_column(lane):
    """The state of a row of which nothing has been read."""
    return T(LOWEST), T(0), None if MASSES is None else T(0), None if MASSES is None else T(0)


def hit_column(label, live, lane, x, base, inner):
    return (array.load(x, base + label * inner + lane) if live else T(0),)


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


def value_column(m, s, whole, far, hit, live, fill, share, own_weight, keep, spread):
    return (value(m, s, whole, far, hit, share, own_weight, keep, spread) if live else fill,)


def slope_column(
    x, q, label, live, fill, m, r, k, own_slope, own_curvature, total, inverse, log_total, w, c, keep, spread,
    gq, h,
):  # fmt: skip
    row = m, r, k, own_slope, own_curvature, total, inverse, log_total
    d, dq, b = slope_of(x, w, q, c == label, keep, spread, gq, h, row)
    return select(live, d, fill), select(live, dq, fill), select(live, b, fill)


def putting_column(xs, qs, label, live, fill, r, w, c, keep, spread, g, gq, h, at, there):
    d, dq, b = each(at_slope_column, (xs, qs, label, live, fill, *r), (w, c, keep, spread, gq, h))
    array.store_vectors(g, (at,), (there,), d)
    array.store_vectors(gq, (at,), (there,), dq)
    array.store_vectors(h, (at,), (there,), b)


def columns(
    x, q, labels, weight, sample_weight, upstream, terms, g, gq, h, batch, classes, inner, deal, ignore, keep,
    spread, factor, divisor, partials, faults, scratch,
):  # fmt: skip
    scale = factor if divisor is None else quotient(factor, divisor[0])
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
                hit = each(at_hit_column, (label, live, LANES), (x, base, inner))[0]
            c, at = part, base + part * inner
            while at < end:
                there = at + step < end
                also = at + step if there else at
                xs, qs = array.load_vectors(x, (at,)), array.load_vectors(q, (at,))
                ys, ps = array.load_vectors(x, (also,)), array.load_vectors(q, (also,))
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
        if part == 0 and i < n:
            vs = each(
                at_value_column, (m, s, whole, far, hit, live, fill, share, own_weight), (keep, spread)
            )[0]
            array.store_vectors(terms, (i,), (True,), vs)
            if partials is not None:
                hi, lo = add(hi, lo, tree_sum(vs))
        if WRITES is not None and i < n:
            r = each(conclude, (m, s, whole, far, hit, share, own_weight, up), (keep, spread))
            c, at = part, base + part * inner
            while at < end:
                there = at + step < end
                also = at + step if there else at
                xs, qs = array.load_vectors(x, (at,)), array.load_vectors(q, (at,))
                ys, ps = array.load_vectors(x, (also,)), array.load_vectors(q, (also,))
                w, v = numbers.load(weight, c), numbers.load(weight, c + (1 << deal) if there else c)
                put_column(xs, qs, label, live, fill, r, w, c, keep, spread, g, gq, h, at, True)
                c += 1 << deal
                put_column(ys, ps, label, live, fill, r, v, c, keep, spread, g, gq, h, also, there)
                c += 1 << deal
                at += 2 * step
        first += cuda.gridDim.x * across
    if partials is not None:
        store_partial(partials, hi, lo)


KERNELS = {TEAM: (hold,), BLOCK: (hold,), STREAM: (stream,), SPLIT: (part, rest), COLUMNS: (columns,)}


def kernels(request: Request, code: int, plan: rows.Plan, vectors: bool = True) -> tuple[Any, ...]:
    """The kernels of a plan's variant, to be launched in order, in plain Python."""
    storage_, numbers_ = storage(code, vectors), rows.weights(code, vectors)
    width, variant = storage_.width, plan.variant
    repeat = 1 if variant == COLUMNS else rows.repeat(code, vectors, variant)
    pieces = [(k, j) for k in range(repeat) for j in range(0, width, numbers_.width)]
    sliced = variant == COLUMNS and plan.deal > 0
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
        MASSES=True if request.probable or request.smoothed else None,
        WRITES=True if request.grad or request.target_grad or request.curvature else None,
        store_partial=device(partial_sum) if variant in (TEAM, COLUMNS) else rows.store_own_partial,
    )
    identity = (tuple(request), code, variant, sliced, vectors)

    def made(template: Any, decorate: Any = device) -> Any:
        return bind(template, scope, "softmax", identity, decorate)

    layers: tuple[dict[str, Any], ...] = (
        dict(
            at_hide=hide,
            at_power=power,
            at_mass=mass,
            at_distance=distance,
            at_fill=filled,
            at_start_column=start_column,
            at_hit_column=hit_column,
            at_absorb_column=absorb_column,
            at_join_column=join_column,
            at_leave_column=leave_column,
            slope_of=slopes,
            conclude=concluded_probabilities if request.probable else concluded_labels,
            value=value_of_probabilities if request.probable else value_of_label,
        ),
        dict(
            absorb=absorbed,
            at_slope=slope,
            at_slope_column=slope_column,
            blank=blanked,
            at_look_column=look_column,
            at_value_column=value_column,
            join=join_slices,
        ),
        dict(gather=gathered, put=putting, put_column=putting_column),
        dict(scatter=scattered, erase=erased),
    )
    for layer in layers:
        scope.update({name: made(template) for name, template in layer.items()})
    if variant != COLUMNS:
        scope["join"] = join_team if variant == TEAM else join_block
    return tuple(made(template, lambda f: f) for template in KERNELS[variant])


def signature(request: Request, code: int, summed: bool, divided: bool, variant: str) -> tuple[Any, ...]:
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
        arithmetic,  # factor of the gradient
        given(divided, numbers),  # divisor of the gradient
        given(summed, numbers),  # partial sums of the terms
        given(not r.probable, rows.INTEGERS),  # faults
        given(variant == SPLIT, numbers),  # scratch
    )


def compile_kernels(
    request: Request,
    code: int,
    cc: tuple[int, int],
    plan: rows.Plan,
    summed: bool = True,
    divided: bool = False,
    vectors: bool = True,
) -> tuple[Binary, ...]:
    """Compile the kernels of a plan's variant."""
    arguments = signature(request, code, summed, divided, plan.variant)
    made = kernels(request, code, plan, vectors)
    return tuple(compile(kernel, arguments, cc, plan.threads) for kernel in made)


# ---- launching ----------------------------------------------------------------------------------------


def run(p: Scores, outputs: dict[str, Any]) -> Any:
    """Write gradients by ``"input"``, ``"target"`` and ``"weight"``, and the curvature; return the value."""
    if "weight" in outputs:
        return class_weights.run(p, outputs, run, arithmetic)
    target = p.target if p.has_probabilities else None
    gradients = [outputs.get(n) for n in ("input", "target", "curvature")]
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
        x,
        q,
        labels,
        weight,
        these.sample_weight,
        these.upstream,
        terms,
        written,
        axes.extents,
        p.ignore_index,
        p.label_smoothing,
        these.factor / divisor,
        gradients_by,
        slot,
        terms is None,
    )
    for array, w in zip(gradients, written, strict=True):
        these.copy_back(array, w)
    if slot is not None:
        faults.check_now(queue.device)
    return these.finish(partial_sums, divisor, by) if terms is None else terms


def launch(
    x: DeviceArray,
    q: DeviceArray | None,
    labels: DeviceArray | None,
    weight: DeviceArray | None,
    sample_weight: DeviceArray | None,
    upstream: DeviceArray | None,
    terms: DeviceArray | None,
    gradients: list[Any],
    extents: tuple[int, int, int],
    ignore: int,
    smoothing: float,
    factor: float,
    divisor: DeviceArray | None,
    slot: int | None,
    summed: bool,
) -> DeviceArray | None:
    """Launch the kernels over contiguous arrays of one storage; return the terms' partial sums, if `summed`.

    Parameters
    ----------
    gradients : list
        By the scores, by the probabilities, and the curvature: arrays or None.
    """
    queue, (batch, classes, inner), code = x.queue, extents, code_of(x.dtype)
    vectors = rows.whole_vectors(classes, inner, x.dtype) and aligned([x, q, terms, weight, *gradients])
    plan = rows.plan(batch, classes, inner, code, vectors)
    request = Request(
        probable=q is not None,
        smoothed=smoothing > 0,
        weighted=weight is not None,
        sample_weighted=sample_weight is not None,
        upstream=upstream is not None,
        terms=terms is not None,
        grad=gradients[0] is not None,
        target_grad=gradients[1] is not None,
        curvature=gradients[2] is not None,
    )
    numbers = arithmetic_dtype(x.dtype)
    partials = queue.empty((2 * plan.partials,), numbers) if summed else None
    scratch = queue.empty((plan.blocks * STATE,), numbers) if plan.variant == SPLIT else None
    queue.launch(
        (plan.blocks, plan.threads),
        compile_kernels,
        (
            *(x, q, labels, weight, sample_weight, upstream, terms, *gradients),
            *(batch, classes, inner, plan.deal, ignore),
            *(1 - smoothing, smoothing / classes if q is not None or smoothing else 0),
            *(factor, divisor, partials, slot, scratch),
        ),
        request=request,
        code=code,
        plan=rows.shape_free(plan),
        summed=summed,
        divided=divisor is not None,
        vectors=vectors,
    )
    return partials


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
    """Serve the commonest call: contiguous scores, int64 indices, no weights, a reduced value."""
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
    ignore, smoothing, factor, divisor = (
        p.ignore_index,
        p.label_smoothing,
        p.weighting.factor,
        p.weighting.divisor,
    )
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
        request=Request(smoothed=smoothing > 0, grad=bool(prepared.wrt)),
        code=code,
        plan=rows.shape_free(dealt),
        summed=prepared.mode != GRAD,
        divided=mean and bool(prepared.wrt),
        vectors=vectors,
    )
    spread = smoothing / classes if smoothing else 0
    numbers = batch, classes, inner, dealt.deal, ignore, 1 - smoothing, spread, factor
    scratch = dealt.blocks * STATE if dealt.variant == SPLIT else 0
    fault = rows.index_fault(p.name, shape, tuple(range(len(shape))))
    return Prepared(
        counts, number, kernels, dealt, finish, reduce.FINISH_THREADS, fault, numbers, scratch
    )  # fmt: skip
