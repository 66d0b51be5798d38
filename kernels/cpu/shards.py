"""Class scores of which other ranks have other classes: each row's statistics, and the gradient by them.

A rank reads its part of a row once and keeps four numbers: the largest score m, the sum of the exponentials
of the classes that are not the row's own (see `kernels.powers`), the own class's score where it is among
these classes (else 0), and under label smoothing the sum of w (m - x). All ranks exchange them and add them
up, in the ranks' order and in float64. From there on a row is computed as `score_blocks` computes it, in the
arithmetic dtype. The gradient of a class is a multiple of its exponential, less its part of the smoothed
target; the own class's is known before. Nothing as large as the scores is kept.

Exponentials are those of `score_blocks`, relative to a power of two, so that a rank's have the digits that
they have where all classes are in one place: there they are the same numbers, added up in another order, and
float64 hides that.

Scores are (rows, classes), contiguous, of the arithmetic dtype.
"""

from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import numba
import numpy as np
from numba import njit, types
from numba.core.errors import NumbaError

from ..bind import bind
from ..errors import at_users_line
from ..freeze import fingerprint
from ..lift import MIXED, NORM, OWN, is_linear, lift_scores, moves
from ..math import CPU, multiply_add, select, unbits
from ..powers import LARGE, LOG2_E, LOG_2_PARTS
from ..spec import (
    ASKED,
    DEAD,
    FACTORS_OF_ROW,
    FAR,
    HIT,
    MAXIMUM,
    NUMBERS_OF_ROW,
    OTHERS,
    OWN_SLOPE,
    SLOPE,
    TOP,
    ScoreFunctions,
)
from . import parallel
from .native import LINKED, at_address, compile_entry, compile_function, smaller, stack
from .parallel import TASK, run_fork, run_task
from .score_blocks import RUN, row_scope
from .target import derivatives, interleave, plus, prefer_widest_vectors

# Of a record, in int64: extents, and addresses; of how many tasks the call is; what only `merge` reads: how
# many ranks there are, of each the sum of its classes' weights, and for each row its class's weight, its own
# and what multiplies its gradient.
ROWS, CLASSES, SHARES, SCORES, LABELS, WEIGHT, CAP, ROW_STATISTICS, GRADIENT, FACTORS = range(10)
RANKS, GATHERED, RANK_WEIGHTS, OWN_WEIGHTS, ROW_WEIGHTS, UPS, NUMBERS, VALUES, MADE = range(10, 19)
RECORD = 19
# Of a merge's numbers: what multiplies gradients; 1 - label_smoothing; label_smoothing / classes; the sum of
# all class weights; what multiplies the squared logsumexp; then the definition's options.
SCALE, KEEP, SPREAD, WEIGHT_SUM, SQUARE, OPTIONS = range(6)

# Bound by `compile_pass` and `compile_merge`.
T: Any = np.float32
ITEM: Any = 4
WIDE: Any = 64
NARROW: Any = 16
exp: Any = None
reference: Any = None
exponent: Any = None
wide_exp: Any = None
log1p: Any = None
tanh: Any = None
largest: Any = None
sum_in_lanes: Any = None
make_ready: Any = None
loss: Any = None
options: Any = None
SMOOTHED: Any = False
CAPS: Any = False
HAS_MIXED: Any = True
HAS_NORM: Any = False
HAS_OWN: Any = False
MULTIPLE: Any = True

PARALLEL_FROM = 16384  # scores from which two threads beat one
MERGING = 64  # scores that take as long as one row's numbers
ROUND = 1.5 * 2.0**52  # a sum with it is of a whole number
LOG_2_HIGH, LOG_2_LOW = LOG_2_PARTS
COPIED = 4 << 20  # bytes of scores that are converted at a time


def scale_of(m):
    """What a sum by the largest score m is divided by, e**base and 2**k: as in `kernels.powers`."""
    base = select(abs(m) <= LARGE, 0.0, m)
    return base, ((m - base) * LOG2_E + ROUND) - ROUND


def between(base, k, then_base, then_k):
    """What a sum by e**base and 2**k is multiplied by, to be one by others."""
    n = k - then_k
    if base != then_base:
        return wide_exp(base - then_base + n * LOG_2_HIGH + n * LOG_2_LOW)
    return unbits(np.int64(n + 1023.0) << np.int64(52)) if n > -1023.0 else 0.0


def exponential_less(k, x, e, base, shift, low):
    """Store an element's exponential by a row's `reference`."""
    e[k] = exp(x[k] - base, shift, low)


def ready_scores(x, run, count, size, cap):
    """Copy a run of scores, capped where that is asked for, and fill it up with -inf."""
    for i in range(count):
        x[i] = cap * tanh(run[i] / cap) if CAPS else run[i]
    for i in range(count, size):
        x[i] = T(-np.inf)


def statistics(context, share):
    """The task that reads one share of the rows."""
    prefer_widest_vectors()
    c = at_address(context, 0)
    zero, low = T(0), T(-np.inf)
    classes, rows = c[CLASSES], c[ROWS]
    labels, cap = at_address(c[LABELS], 0), T(at_address(c[CAP], 0.0)[0])
    scores, room = stack(8192), stack(8192)  # of `RUN` scores, where they are made ready, and exponentials
    x, e = at_address(scores, zero), at_address(room, zero)
    for row in range(share * rows // c[SHARES], (share + 1) * rows // c[SHARES]):
        found = at_address(c[ROW_STATISTICS] + 8 * NUMBERS_OF_ROW * row, 0.0)
        label, at = labels[row], c[SCORES] + row * classes * ITEM
        m, others, hit, far, passed, by_base, by_k = low, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
        if label != DEAD:
            for start in range(0, classes, RUN):
                count = smaller(RUN, classes - start)
                size, run_at = (count + WIDE - 1) // WIDE * WIDE, at + start * ITEM
                run = at_address(run_at, zero)
                if CAPS or size != count:
                    make_ready(x, run, count, size, cap)
                    run_at = scores
                    run = at_address(run_at, zero)
                top = largest(run_at, size)
                if start <= label < start + count:
                    hit = np.float64(run[label - start])
                if top > m:
                    if passed != 0.0:
                        far += passed * (np.float64(top) - np.float64(m))
                    m = top
                if m == low:  # nothing yet but -inf, or NaN
                    lost = sum_in_lanes(run_at, size)
                    others += 0.0 if lost == low else lost
                else:
                    base, shift, least = reference(m)
                    interleave(exponential_less, size, (run, e, base, shift, least))
                    then_base, then_k = np.float64(base), exponent(shift)
                    if others != 0.0:  # it may be by a smaller score
                        others *= between(by_base, by_k, then_base, then_k)
                    by_base, by_k = then_base, then_k
                    if start <= label < start + count:
                        e[label - start] = zero
                    others += sum_in_lanes(room, size)
                if SMOOTHED:
                    part = of_weights = zero
                    ws = at_address(c[WEIGHT] + start * ITEM, zero)
                    reach = T(np.inf) if m == low else m
                    for i in range(count):
                        w = ws[i]
                        part = plus(part, select(w == zero, zero, w * (reach - run[i])))
                        of_weights = plus(of_weights, w)
                    far += np.float64(part)
                    passed += np.float64(of_weights)
        if others != 0.0:
            base, k = scale_of(np.float64(m))
            others *= between(by_base, by_k, base, k)
        found[MAXIMUM], found[OTHERS], found[HIT], found[FAR] = np.float64(m), others, hit, far
    return 0


def merge(context, share):
    """The task that merges the numbers of one share of the rows, and finds their values and factors."""
    c = at_address(context, 0)
    rows, ranks = c[ROWS], c[RANKS]
    numbers, labels = at_address(c[NUMBERS], 0.0), at_address(c[LABELS], 0)
    of_ranks, own_weights = at_address(c[RANK_WEIGHTS], 0.0), at_address(c[OWN_WEIGHTS], 0.0)
    row_weights, ups, values = (
        at_address(c[ROW_WEIGHTS], 0.0),
        at_address(c[UPS], 0.0),
        at_address(c[VALUES], 0.0),
    )
    zero, one, square = T(0), T(1), T(numbers[SQUARE])
    scale, keep, spread = T(numbers[SCALE]), T(numbers[KEEP]), T(numbers[SPREAD])
    weight_sum, o = T(numbers[WEIGHT_SUM]), options(numbers, zero)
    step = 8 * NUMBERS_OF_ROW * (rows + 1)  # from rank to rank, whose first numbers are of no row
    for row in range(share * rows // c[SHARES], (share + 1) * rows // c[SHARES]):
        made = at_address(c[MADE] + 8 * FACTORS_OF_ROW * row, 0.0)
        own_weight, row_weight = T(own_weights[row]), T(row_weights[row])
        own_mass = mass = own_weight
        if spread != zero:
            own_mass = keep * own_weight
            mass = multiply_add(spread, weight_sum, own_mass)
        live = labels[row] != DEAD
        if MULTIPLE:
            live = live & ((own_mass != zero) | (mass != zero))
        if not live:
            values[row] = made[TOP] = made[SLOPE] = made[ASKED] = made[OWN_SLOPE] = 0.0
            continue
        first = c[GATHERED] + 8 * NUMBERS_OF_ROW * (row + 1)
        largest_score, sum_of_others, hit_score, distances = -np.inf, 0.0, 0.0, 0.0
        for q in range(ranks):
            of_rank = at_address(first + q * step, 0.0)[MAXIMUM]
            if of_rank > largest_score:
                largest_score = of_rank
        m = T(largest_score)
        base, shift, least = reference(m)
        then_base, then_k = np.float64(base), exponent(shift)
        for q in range(ranks):
            part = at_address(first + q * step, 0.0)
            of_rank, more = part[MAXIMUM], part[OTHERS]
            if more != 0:
                rank_base, rank_k = scale_of(of_rank)
                more *= between(rank_base, rank_k, then_base, then_k)
            sum_of_others += more
            hit_score += part[HIT]
            distances += part[FAR]
            if of_rank != largest_score and of_ranks[q] != 0:
                distances += of_ranks[q] * (largest_score - of_rank)
        hit, far, others = T(hit_score), T(distances), T(sum_of_others)
        own, top = exp(hit - base, shift, least), exp(m - base, shift, least)
        total = own + others
        log_total = log1p(select(hit == m, others, (others - top) + own) / top)
        inverse = one / total
        entropy = mass * log_total
        if spread != zero:
            entropy = multiply_add(mass, log_total, spread * far)
        entropy += select(own_mass == zero, zero, own_mass * (m - hit))
        p, rest = own * inverse, others * inverse
        d = loss(-((m - hit) + log_total), rest, p, own_weight, entropy, m + log_total, square, o)
        values[row] = np.float64(row_weight * d[0])
        up = scale * T(ups[row]) * row_weight
        slope = own_slope = asked = zero
        if HAS_MIXED:
            slope = d[2] * mass
            asked = up * d[2] * spread
            t = own_mass + spread * own_weight
            own_slope = d[2] * (spread * (weight_sum - own_weight) * own - t * others)
        if HAS_NORM:
            slope = slope + d[3] if HAS_MIXED else d[3]
            own_slope += d[3] * own
        if HAS_OWN:
            slope = slope - d[1]
            own_slope += d[1] * others
        by = wide_exp(then_base - largest_score + then_k * LOG_2_HIGH + then_k * LOG_2_LOW)  # of e**(x - m)
        made[TOP], made[SLOPE] = largest_score, np.float64(up * slope * inverse) / by
        made[ASKED], made[OWN_SLOPE] = np.float64(asked), np.float64(up * own_slope * inverse)
    return 0


def gradient(context, share):
    """The task that writes the gradient of one share of the rows, which may be where the scores are."""
    prefer_widest_vectors()
    c = at_address(context, 0)
    zero, one = T(0), T(1)
    classes, rows = c[CLASSES], c[ROWS]
    labels, cap = at_address(c[LABELS], 0), T(at_address(c[CAP], 0.0)[0])
    scores, room = stack(8192), stack(8192)
    x, e = at_address(scores, zero), at_address(room, zero)
    for row in range(share * rows // c[SHARES], (share + 1) * rows // c[SHARES]):
        factors = at_address(c[FACTORS] + 8 * FACTORS_OF_ROW * row, 0.0)
        m, asked = T(factors[TOP]), T(factors[ASKED])
        base, shift, least = reference(m)
        k = exponent(shift)
        slope = T(factors[SLOPE] * wide_exp(np.float64(base - m) + k * LOG_2_HIGH + k * LOG_2_LOW))
        label, from_row = labels[row], row * classes * ITEM
        for start in range(0, classes, RUN):
            count = smaller(RUN, classes - start)
            size = (count + NARROW - 1) // NARROW * NARROW
            run = at_address(c[SCORES] + from_row + start * ITEM, zero)
            g = at_address(c[GRADIENT] + from_row + start * ITEM, zero)
            if label == DEAD:
                for i in range(count):
                    g[i] = zero
                continue
            if CAPS or size != count:
                make_ready(x, run, count, size, cap)
                run = x
            interleave(exponential_less, size, (run, e, base, shift, least))
            if SMOOTHED:
                ws = at_address(c[WEIGHT] + start * ITEM, zero)
                for i in range(count):
                    g[i] = multiply_add(slope, e[i], -(asked * ws[i]))
            else:
                for i in range(count):
                    g[i] = slope * e[i]
            if start <= label < start + count:
                g[label - start] = T(factors[OWN_SLOPE])
            if CAPS:
                for i in range(count):
                    t = x[i] / cap
                    g[i] = g[i] * (one - t * t)
    return 0


def launch(task, context, shares, fork):
    """Do a task on all threads, or on this one."""
    if fork:
        run_fork(fork, (task, context, shares))
    else:
        run_task(task, (context, 0))
    return 0


# ---- from Python -------------------------------------------------------------------------------------------


@cache
def launcher() -> Any:
    """Return `launch`, compiled."""
    return compile_entry(launch, {}, "shards", "shards", types.int64(*[types.int64] * 4))


@cache
def shared_scope(dtype: np.dtype) -> dict[str, Any]:
    """Return what is bound in all kernels of a dtype."""
    scope = row_scope(dtype) | dict(wide_exp=CPU[types.float64]["exp"])
    how = njit(forceinline=True, **LINKED)
    inlined = exponential_less, scale_of, between
    return scope | {f.__name__: bind(f, scope, "shards", dtype.name, how) for f in inlined}


@cache
def compile_pass(template: Any, dtype: np.dtype, smoothed: bool, capped: bool) -> int:
    """Return the address of `statistics` or `gradient` for a dtype."""
    number = types.float32 if dtype == np.float32 else types.float64
    more = dict(tanh=CPU[number]["tanh"], SMOOTHED=smoothed, CAPS=capped)
    identity, scope = (template.__name__, dtype.name, smoothed, capped), shared_scope(dtype) | more
    scope["make_ready"] = bind(ready_scores, scope, "shards", identity, njit(**LINKED))
    return compile_function(template, scope, "shards", identity, TASK)


@cache
def compile_merge(functions: ScoreFunctions, lse_square: bool, dtype: np.dtype) -> int:
    """Return the address of `merge` for a definition and a dtype; an error in it leads to its line."""
    jets, groups = derivatives(), moves(functions) | ({NORM} if lse_square else set())
    number = types.float32 if dtype == np.float32 else types.float64
    scope = shared_scope(dtype) | dict(
        log1p=CPU[number]["log1p"],
        loss=lift_scores(functions, jets, False, lse_square),
        options=jets.options(functions.options, start=OPTIONS),
        HAS_OWN=OWN in groups,
        HAS_MIXED=MIXED in groups,
        HAS_NORM=NORM in groups,
        MULTIPLE=is_linear(functions)[1] and not lse_square,
    )
    identity = fingerprint(functions.value), functions.statistics, functions.options, lse_square, dtype.name
    try:
        return compile_function(merge, scope, functions.name, identity, TASK)
    except NumbaError as error:
        raise at_users_line(functions.name, (functions.value,), error) from error


def run(task: int, slots: dict[int, Any], count: int, scores: int) -> None:
    """Do a task: arrays among the slots stand for their addresses. `scores` says how much there is to do."""
    shares = min(count, 4 * numba.config.NUMBA_NUM_THREADS)
    fork = parallel.forker() if scores >= PARALLEL_FROM and shares > 1 else 0
    record = np.zeros(RECORD, np.int64)
    for slot, value in slots.items():
        record[slot] = value.ctypes.data if isinstance(value, np.ndarray) else value
    record[SHARES] = shares if fork else 1
    launcher()(task, record.ctypes.data, int(record[SHARES]), fork)


class Shard(NamedTuple):
    """The scores of some classes, as (rows, classes).

    Attributes
    ----------
    scores : array, (R, C), of any floating dtype
    labels : array, (R), int64
        Among these classes, `ELSEWHERE` or `DEAD`.
    weight : array, (C), or None
        Of these classes, where there is label smoothing.
    softcap : float or None
    arithmetic : dtype
    """

    scores: np.ndarray
    labels: np.ndarray
    weight: np.ndarray | None
    softcap: float | None
    arithmetic: np.dtype

    def parts(self) -> Iterator[tuple[slice, np.ndarray, dict[int, Any]]]:
        """Yield rows, their scores as kernels read them, and the slots of a record."""
        rows, classes = self.scores.shape
        if not classes:
            return
        plain = self.scores.dtype == self.arithmetic and self.scores.flags.c_contiguous
        height = rows if plain else max(1, COPIED // (classes * self.arithmetic.itemsize))
        cap = np.array([1.0 if self.softcap is None else self.softcap])
        for first in range(0, rows, max(height, 1)):
            some = slice(first, min(rows, first + height))
            scores = self.scores[some] if plain else np.ascontiguousarray(self.scores[some], self.arithmetic)
            yield some, scores, {
                SCORES: scores, CLASSES: classes, ROWS: len(scores), LABELS: self.labels[some],
                WEIGHT: 0 if self.weight is None else self.weight, CAP: cap,
            }  # fmt: skip

    def compiled(self, template: Any) -> int:
        return compile_pass(template, self.arithmetic, self.weight is not None, self.softcap is not None)

    def statistics(self, out: np.ndarray) -> None:
        """Store each row's numbers, (R, `NUMBERS_OF_ROW`)."""
        out[:] = -np.inf, 0, 0, 0  # of no classes
        for some, scores, slots in self.parts():
            run(self.compiled(statistics), {**slots, ROW_STATISTICS: out[some]}, len(scores), scores.size)

    def gradient(self, factors: np.ndarray, out: np.ndarray) -> None:
        """Write the gradient of factors (R, `FACTORS_OF_ROW`) into an array like the scores, or these."""
        for some, scores, slots in self.parts():
            into = out[some]
            plain = into.dtype == self.arithmetic and into.flags.c_contiguous
            made = into if plain else np.empty(scores.shape, self.arithmetic)
            slots |= {GRADIENT: made, FACTORS: factors[some]}
            run(self.compiled(gradient), slots, len(scores), scores.size)
            if not plain:
                into[...] = made


def merged(
    functions: ScoreFunctions,
    numbers: np.ndarray,
    gathered: np.ndarray,
    of_ranks: np.ndarray,
    labels: np.ndarray,
    own_weights: np.ndarray,
    row_weights: np.ndarray,
    ups: np.ndarray,
    lse_square: bool,
    arithmetic: np.dtype,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows' values and factors of all ranks' numbers, (ranks, 1 + R, `NUMBERS_OF_ROW`)."""
    rows = len(labels)
    values, factors = np.empty(rows), np.empty((rows, FACTORS_OF_ROW))
    slots = {
        GATHERED: gathered, RANKS: len(gathered), ROWS: rows, LABELS: labels, RANK_WEIGHTS: of_ranks,
        OWN_WEIGHTS: own_weights, ROW_WEIGHTS: row_weights, UPS: ups, NUMBERS: numbers, VALUES: values,
        MADE: factors,
    }  # fmt: skip
    run(compile_merge(functions, lse_square, arithmetic), slots, rows, rows * MERGING)
    return values, factors
