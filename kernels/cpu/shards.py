"""Class scores of which other ranks have other classes: each row's statistics, and the gradient by them.

A rank reads its part of a row once and keeps four numbers: the largest score m, the sum of exp(x - m) of the
classes that are not the row's own, the own class's score where it is among these classes (else 0), and under
label smoothing the sum of w (m - x). All ranks exchange them and merge them, in the ranks' order and in
float64. The gradient of a class is then a multiple of exp(x - M), with M the largest score of all, less its
part of the smoothed target; the own class's is known before. Nothing as large as the scores is kept.

Scores are (rows, classes), contiguous, of the arithmetic dtype. The row's sums begin anew every `RUN`
classes, so that none of them loses digits, and go on in float64.
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
from ..math import CPU, multiply_add, select
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
wide_exp: Any = None
log1p: Any = None
tanh: Any = None
largest: Any = None
sum_in_lanes: Any = None
exponential: Any = None
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
COPIED = 4 << 20  # bytes of scores that are converted at a time


def ready_scores(x, run, count, size, cap):
    """Copy a run of scores, capped where that is asked for, and fill it up with -inf."""
    for i in range(count):
        x[i] = cap * tanh(run[i] / cap) if CAPS else run[i]
    for i in range(count, size):
        x[i] = T(-np.inf)


def statistics(context, k):
    """The task that reads one share of the rows."""
    prefer_widest_vectors()
    c = at_address(context, 0)
    zero, low = T(0), T(-np.inf)
    classes, rows = c[CLASSES], c[ROWS]
    labels, cap = at_address(c[LABELS], 0), T(at_address(c[CAP], 0.0)[0])
    scores, room = stack(8192), stack(8192)  # of `RUN` scores, where they are made ready, and exponentials
    x, e = at_address(scores, zero), at_address(room, zero)
    for row in range(k * rows // c[SHARES], (k + 1) * rows // c[SHARES]):
        found = at_address(c[ROW_STATISTICS] + 8 * NUMBERS_OF_ROW * row, 0.0)
        label, at = labels[row], c[SCORES] + row * classes * ITEM
        m, others, hit, far, passed = low, 0.0, 0.0, 0.0, 0.0
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
                    # What came before was relative to a smaller score.
                    if others != 0.0:
                        others *= wide_exp(np.float64(m) - np.float64(top))
                    if passed != 0.0:
                        far += passed * (np.float64(top) - np.float64(m))
                    m = top
                if m == low:  # nothing yet but -inf, or NaN
                    lost = sum_in_lanes(run_at, size)
                    others += 0.0 if lost == low else np.float64(lost)
                else:
                    interleave(exponential, size, (run, e, m))
                    if start <= label < start + count:
                        e[label - start] = zero
                    others += np.float64(sum_in_lanes(room, size))
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
        found[MAXIMUM], found[OTHERS], found[HIT], found[FAR] = np.float64(m), others, hit, far
    return 0


def merge(context, k):
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
    keep, spread, weight_sum = numbers[KEEP], numbers[SPREAD], numbers[WEIGHT_SUM]
    o = options(numbers, 0.0)
    step = 8 * NUMBERS_OF_ROW * (rows + 1)  # from rank to rank, whose first numbers are of no row
    for row in range(k * rows // c[SHARES], (k + 1) * rows // c[SHARES]):
        made = at_address(c[MADE] + 8 * FACTORS_OF_ROW * row, 0.0)
        own_weight, row_weight = own_weights[row], row_weights[row]
        own_mass = keep * own_weight
        mass = own_mass + spread * weight_sum
        live = labels[row] != DEAD
        if MULTIPLE:
            live = live & ((own_mass != 0) | (mass != 0))
        if not live:
            values[row] = made[TOP] = made[SLOPE] = made[ASKED] = made[OWN_SLOPE] = 0.0
            continue
        first = c[GATHERED] + 8 * NUMBERS_OF_ROW * (row + 1)
        top, others, hit, far = -np.inf, 0.0, 0.0, 0.0
        for q in range(ranks):
            m = at_address(first + q * step, 0.0)[MAXIMUM]
            if m > top:
                top = m
        for q in range(ranks):
            part = at_address(first + q * step, 0.0)
            m, more = part[MAXIMUM], part[OTHERS]
            if m != top and more != 0:
                more *= wide_exp(m - top)
            others += more
            hit += part[HIT]
            far += part[FAR]
            if m != top and of_ranks[q] != 0:
                far += of_ranks[q] * (top - m)
        own = wide_exp(hit - top)
        total = own + others
        log_total = log1p(others if hit == top else (others - 1) + own)
        inverse = 1 / total
        entropy = mass * log_total
        if spread != 0:
            entropy += spread * far
        if own_mass != 0:
            entropy += own_mass * (top - hit)
        p, rest = own * inverse, others * inverse
        d = loss(
            -((top - hit) + log_total), rest, p, own_weight, entropy, top + log_total, numbers[SQUARE], o
        )
        values[row] = row_weight * d[0]
        up = numbers[SCALE] * ups[row] * row_weight
        slope = own_slope = asked = 0.0
        if HAS_MIXED:
            slope = d[2] * mass
            asked = up * d[2] * spread
            t = own_mass + spread * own_weight
            own_slope = d[2] * (spread * (weight_sum - own_weight) * own - t * others)
        if HAS_NORM:
            slope += d[3]
            own_slope += d[3] * own
        if HAS_OWN:
            slope -= d[1]
            own_slope += d[1] * others
        made[TOP], made[SLOPE], made[ASKED] = top, up * slope * inverse, asked
        made[OWN_SLOPE] = up * own_slope * inverse
    return 0


def gradient(context, k):
    """The task that writes the gradient of one share of the rows, which may be where the scores are."""
    prefer_widest_vectors()
    c = at_address(context, 0)
    zero, one = T(0), T(1)
    classes, rows = c[CLASSES], c[ROWS]
    labels, cap = at_address(c[LABELS], 0), T(at_address(c[CAP], 0.0)[0])
    scores, room = stack(8192), stack(8192)
    x, e = at_address(scores, zero), at_address(room, zero)
    for row in range(k * rows // c[SHARES], (k + 1) * rows // c[SHARES]):
        factors = at_address(c[FACTORS] + 8 * FACTORS_OF_ROW * row, 0.0)
        m, slope, asked = T(factors[TOP]), T(factors[SLOPE]), T(factors[ASKED])
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
            interleave(exponential, size, (run, e, m))
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
def compile_pass(template: Any, dtype: np.dtype, smoothed: bool, capped: bool) -> int:
    """Return the address of `statistics` or `gradient` for a dtype."""
    number = types.float32 if dtype == np.float32 else types.float64
    more = dict(wide_exp=CPU[types.float64]["exp"], tanh=CPU[number]["tanh"], SMOOTHED=smoothed, CAPS=capped)
    identity, scope = (template.__name__, dtype.name, smoothed, capped), row_scope(dtype) | more
    scope["make_ready"] = bind(ready_scores, scope, "shards", identity, njit(**LINKED))
    return compile_function(template, scope, "shards", identity, TASK)


@cache
def compile_merge(functions: ScoreFunctions, lse_square: bool) -> int:
    """Return the address of `merge` for a definition; an error in it leads to its line."""
    jets, groups = derivatives(), moves(functions) | ({NORM} if lse_square else set())
    scope = dict(
        wide_exp=CPU[types.float64]["exp"],
        log1p=CPU[types.float64]["log1p"],
        loss=lift_scores(functions, jets, False, lse_square),
        options=jets.options(functions.options, start=OPTIONS),
        HAS_OWN=OWN in groups,
        HAS_MIXED=MIXED in groups,
        HAS_NORM=NORM in groups,
        MULTIPLE=is_linear(functions)[1] and not lse_square,
    )
    identity = fingerprint(functions.value), functions.statistics, functions.options, lse_square
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
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows' values and factors of all ranks' numbers, (ranks, 1 + R, `NUMBERS_OF_ROW`)."""
    rows = len(labels)
    values, factors = np.empty(rows), np.empty((rows, FACTORS_OF_ROW))
    slots = {
        GATHERED: gathered, RANKS: len(gathered), ROWS: rows, LABELS: labels, RANK_WEIGHTS: of_ranks,
        OWN_WEIGHTS: own_weights, ROW_WEIGHTS: row_weights, UPS: ups, NUMBERS: numbers, VALUES: values,
        MADE: factors,
    }  # fmt: skip
    run(compile_merge(functions, lse_square), slots, rows, rows * MERGING)
    return values, factors
