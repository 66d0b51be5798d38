"""Connectionist temporal classification: the sum over all alignments of a sequence's labels with its frames.

The states of an alignment are the labels and the blanks before, between and after them. `forward` carries the
probability of every state over the frames, and keeps, for each state and frame, the shares in which it came
from its predecessors. Those are the derivatives: `backward` splits the posterior of the last states by them,
frame by frame, and writes a frame's gradient on its way. No second recursion over probabilities is needed.

Probabilities are pairs (m, k) that stand for ``m * 2**k``, 1 <= m < 2 and k a whole number in a float: they
neither underflow nor lose digits as their logarithms would, and come without an exponential or a logarithm a
state. Shares and posteriors are plain numbers. A state's index is padded to whole vectors, blank and label of
one index are done together: label i follows blank i.

Four C functions, called by address:

- `forward` and `backward` do one sequence, of any strides. They are compiled for a dtype of arithmetic and a
  storage of the log-probabilities; `forward` also without the shares, where no gradient is asked for.
- `read` checks and collects lengths, labels and weights; what a call does not need of it is not compiled.
- `sequences` does one worker's sequences, in scratch memory of its own. It is compiled once, as is `drive`.

A sequence's numbers depend on that sequence alone: the same bits for any number of threads.
"""

import math as libm
from functools import cache
from typing import Any

import numba
import numpy as np
from numba import njit, types
from numba.extending import intrinsic

from .. import math
from ..bind import bind
from ..compiler import DistinctArrays
from ..math import bits, multiply_add, polynomial, select, unbits
from ..spec import (
    BFLOAT16,
    FLOAT16,
    FLOAT32,
    FLOAT64,
    SINGLE,
    Sequences,
    bad_label,
    code_of,
    wrong_length,
)
from . import strided
from .disk import kept
from .halves import from_bfloat16, from_float16, to_bfloat16, to_float16
from .launch import INCOMPLETE, OK, TERMS, UNFIT, Launch, New
from .native import (
    HEAD,
    HELPER,
    NO_MEMORY,
    addresses,
    allocate,
    at_address,
    caller,
    compile_drive,
    compile_entry,
    compile_function,
    data_of,
    fill,
    held,
    items_of,
    rank_of,
    release,
    run_drive,
    shape_of,
    stack,
    store,
    store_all,
    strides_of,
    tuple_at,
)
from .parallel import TASK, run_fork, run_task
from .strided import transfer
from .target import plus, prefer_widest_vectors

LANES = 16  # states are padded to a multiple of this
REBASED = 16  # frames after which exponents are moved back to where all of their digits are whole
SHARES = 5  # of a state's index: see `advance`
NUMBERS = 4  # of a state's index: m of the blank and the label, and k of both
PARALLEL_FROM = 8192  # log-probabilities from which two threads beat one

# Of `arrays`.
LOG_PROBS, TARGETS, INPUT_LENGTHS, TARGET_LENGTHS, GRADIENT, SAMPLE_WEIGHT, UPSTREAM, LOSSES = range(8)
# Of a recipe: first the arrays' codes, in their order; of integers those of `strided`. Then the blank;
# whether an infinite loss counts as 0, a loss is divided by its number of labels, and their sum by the number
# of sequences or the sum of their weights; bytes of a number of the arithmetic; how many workers there are;
# whether `backward` takes classes anywhere. Then addresses of functions, those of `strided` 0 where they are
# not needed.
BLANK, ZERO_INFINITY, PER_LABEL, BY_SEQUENCES, ITEM_SIZE, WORKERS, ANYWHERE = range(8, 15)
FORWARD, BACKWARD, READ, GATHER, SCATTER, GATHER_INTEGERS = range(15, 21)
RECIPE = 21
DIVISOR, FACTOR = range(2)  # of `numbers`
WORDS, ABSENT = strided.INTEGERS["q"], -1  # codes: of int64; of an array that is not given
# What a recipe may miss, in the sum that a status tells: `backward` for classes anywhere, and `read` that
# copies integers.
MISSING_ANYWHERE, MISSING_COPIES = 1, 2

# The context of `sequences`, in int64. Three strides are in bytes: to the next frame, sequence and class.
SOURCE, SOURCE_FRAME, SOURCE_SEQUENCE, SOURCE_CLASS = range(4)
SINK, SINK_FRAME, SINK_SEQUENCE, SINK_CLASS = range(4, 8)
LONGEST, BATCH, CLASSES, BLANK_CLASS, INFINITY_COUNTS_AS_0 = range(8, 13)
# Addresses of a number for each sequence: its frames, its labels, the address of those; in float64 the
# gradient's factor, and the loss's, which becomes that times the loss.
FRAMES_AT, COUNTS_AT, LABELS_AT, FACTORS_AT, LOSSES_AT = range(13, 18)
SCRATCH, ROOM, WORKER_COUNT = range(18, 21)  # memory, and bytes of it for a worker
FORWARD_AT, BACKWARD_AT = range(21, 23)  # addresses; 0 where no gradient is asked for
STORED_SIZE = (8, 4, 2, 2)  # bytes of an element, by its code
STORED_TYPES: tuple[Any, ...] = (np.float64, np.float32, np.uint16, np.uint16)
RECORDS = 6  # numbers for each sequence: the five above, and room for halves
run_read, run_forward, run_backward = caller(types.int64, 4), caller(types.float64, 3), caller(types.int64, 5)

# Bound by `scope_of`; named here for readers and checkers.
T: Any = np.float32
ITEM: Any = 4
STORED: Any = np.float32(0)  # of the type that a log-probability is stored as
WRITTEN: Any = np.float32(0)  # of the type that a gradient is stored as
GRAD: Any = True
CONTIGUOUS: Any = True  # of `backward`: classes are in one piece
ZERO: Any = np.float32(0)
ONE: Any = np.float32(1)
INFINITY: Any = np.float32(np.inf)
NAN: Any = np.float32(np.nan)
LOWEST: Any = None
split: Any = None
power_of_2: Any = None
normal: Any = None
decode: Any = None
encode: Any = None
exp: Any = None
advance: Any = None
retreat: Any = None
widen: Any = None
narrow: Any = None
STORED_TYPE: Any = np.float32
CODE: Any = FLOAT32
# Bound by `reader`.
COPIED: Any = False  # labels and lengths are gathered: they are not all int64, or labels not contiguous
WEIGHTED: Any = False  # there may be weights or an upstream gradient

LOG_2 = float(np.log(2.0))

# Posteriors and shares below 2**LEAST count as 0: far below rounding, and no product of two is subnormal.
LEAST = {np.float32: -60, np.float64: -500}

# Pointers that share no memory; nothing may be reassociated.
APART: dict[str, Any] = HELPER | {"pipeline_class": DistinctArrays}


def pairs_in(form):
    """How numbers of a format become pairs (m, k), and back."""
    F, Z = form.float, form.int
    ZERO, ONE, LOG2_E = F(0), F(1), F(1 / np.log(2))
    HIGH, LOW = F(form.log2[0]), F(form.log2[1])
    POLYNOMIAL = (ONE, ONE, *(F(c) for c in form.exp))
    MANTISSA, BIAS = Z(form.mantissa), F(form.bias)
    FRACTION, UNIT = Z((1 << form.mantissa) - 1), Z(form.bias << form.mantissa)
    SHIFT = F(1.5 * 2.0**form.mantissa)  # adding it leaves a rounded number in the low bits
    FIELD = F(SHIFT + form.bias)  # the same, as an exponent field
    FAR = F(2.0 ** (form.mantissa - 1))  # beyond it SHIFT does not round, and hardly a fraction is left
    NEGLIGIBLE = F(LEAST[form.float])

    @njit(**HELPER)
    def split(x):
        """e**x. Where products are not fused, multiples of `HIGH` are exact up to 2**15 in float32."""
        t = x * LOG2_E
        near = abs(t) < FAR
        n = t + SHIFT - SHIFT
        r = select(near, multiply_add(n, -LOW, multiply_add(n, -HIGH, x)), ZERO)
        return polynomial(r, POLYNOMIAL), select(near, n, t)

    @njit(**HELPER)
    def power_of_2(k):
        """2**k of k <= 0; where that is negligible, or k is the difference of two infinities, 0."""
        return select(k > NEGLIGIBLE, unbits(Z(bits(k + FIELD) << MANTISSA)), ZERO)

    @njit(**HELPER)
    def normal(m, k):
        """The pair with m in [1, 2)."""
        b = bits(m)
        return unbits(Z((b & FRACTION) | UNIT)), k + (F(np.int32(b >> MANTISSA)) - BIAS)

    return {"split": split, "power_of_2": power_of_2, "normal": normal}


@intrinsic(prefer_literal=True)
def rows_at(typingctx, address, stride, like, count):
    """Pointers to rows of the type of `like`, so many bytes apart; `count` is a literal."""
    if not isinstance(count, types.IntegerLiteral):
        return None
    rows = types.UniTuple(types.CPointer(like), count.literal_value)

    def codegen(context, builder, sig, args):
        made = []
        for _ in range(rows.count):
            made.append(builder.inttoptr(args[0], context.get_value_type(rows.dtype)))
            args = builder.add(args[0], args[1]), args[1]
        return context.make_tuple(builder, sig.return_type, made)

    return rows(types.int64, types.int64, like, count), codegen


def _advance(old, before, new, shares, x, gap, blank, width):
    """One frame: blanks and labels from those of the frame before, and the shares of their predecessors.

    A blank comes from itself or the label before. A label comes from itself, the blank before, or, unless
    `gap` is -inf because they are the same, the label before. Without a gradient no share is stored.
    """
    prefer_widest_vectors()
    bm, lm, bk, lk = old
    lm_before, lk_before = before
    bm_new, lm_new, bk_new, lk_new = new
    stay_blank, enter_blank, stay, enter, skip = shares
    ym, yk = split(blank)
    for j in range(0, width, LANES):
        for i in range(j, j + LANES):
            k = select(bk[i] > lk_before[i], bk[i], lk_before[i])
            a, b = bm[i] * power_of_2(bk[i] - k), lm_before[i] * power_of_2(lk_before[i] - k)
            total = a + b
            if GRAD:
                inverse = ONE / select(total > ZERO, total, ONE)
                stay_blank[i], enter_blank[i] = a * inverse, b * inverse
            bm_new[i], bk_new[i] = normal(total * ym, k + yk)

            over = lk_before[i] + gap[i]
            k = select(lk[i] > bk[i], lk[i], bk[i])
            k = select(k > over, k, over)
            a, b = lm[i] * power_of_2(lk[i] - k), bm[i] * power_of_2(bk[i] - k)
            c = lm_before[i] * power_of_2(over - k)
            total = a + b + c
            if GRAD:
                inverse = ONE / select(total > ZERO, total, ONE)
                stay[i], enter[i], skip[i] = a * inverse, b * inverse, c * inverse
            zm, zk = split(x[i])
            lm_new[i], lk_new[i] = normal(total * zm, k + zk)


def _retreat(now, after, other, shares, shares_after, width, whole):
    """The posteriors of the frame before; they add up to `whole`, but for rounding, and then again to 1."""
    prefer_widest_vectors()
    blank, label = now
    blank_after, label_after = after
    blank_new, label_new = other
    stay_blank, _, stay, enter, _ = shares
    _, enter_blank_after, _, _, skip_after = shares_after
    inverse = ONE / whole
    for j in range(0, width, LANES):
        for i in range(j, j + LANES):
            p = blank[i] * stay_blank[i] + label[i] * enter[i]
            q = label[i] * stay[i] + blank_after[i] * enter_blank_after[i] + label_after[i] * skip_after[i]
            blank_new[i] = select(p > LOWEST, p * inverse, ZERO)
            label_new[i] = select(q > LOWEST, q * inverse, ZERO)


@njit(**HELPER)
def sum_of(x, start, size):
    prefer_widest_vectors()
    result = x[start] - x[start]
    for i in range(start, start + size):
        result = plus(result, x[i])
    return result


@njit(**HELPER)
def padded(size):
    return (size + LANES - 1) // LANES * LANES


# A worker's memory, in numbers, for a sequence whose states have a width: `2 * NUMBERS` rows, m of blanks and
# of labels, k of blanks and of labels, twice; each row has `LANES` numbers before it, and the last of them
# stands for a label that cannot be. A row of the labels' log-probabilities, one of gaps. For the gradient,
# a row of classes and the table of shares, `SHARES` rows a frame, and a number more. `backward` has its
# posteriors in the first rows, of blanks and labels, twice, each with a 0 behind it.


def forward(context, n, memory):
    """The negative log-probability of a sequence's labels; the memory then holds what `backward` takes."""
    prefer_widest_vectors()
    c = at_address(context, 0)
    frames, count = at_address(c[FRAMES_AT], 0)[n], at_address(c[COUNTS_AT], 0)[n]
    labels = at_address(at_address(c[LABELS_AT], 0)[n], 0)
    source, step = c[SOURCE] + n * c[SOURCE_SEQUENCE], c[SOURCE_CLASS]
    width = padded(count + 1)
    row = width + LANES
    m = at_address(memory, ZERO)
    new, old = LANES, LANES + NUMBERS * row
    x = 2 * NUMBERS * row
    gaps = x + width
    # Each m is 1; each k, and behind those each log-probability, -inf.
    fill(memory, ONE, 2 * NUMBERS * row)
    fill(memory + 2 * row * ITEM, -INFINITY, 2 * row)
    fill(memory + 6 * row * ITEM, -INFINITY, 2 * row + width)
    fill(memory + gaps * ITEM, ZERO, width)
    m[new + 2 * row] = ZERO  # as if a blank came before the first frame
    for i in range(1, count):
        if labels[i] == labels[i - 1]:
            m[gaps + i] = -INFINITY
    shares = memory + (gaps + width) * ITEM
    if GRAD:
        shares += padded(c[CLASSES]) * ITEM
    base = 0.0
    for t in range(frames):
        new, old = old, new
        blank = decode(at_address(source + c[BLANK_CLASS] * step, STORED)[0])
        wrong = not blank < INFINITY
        # Labels that the frames so far can reach, and that the frames to come can finish.
        low = count - (frames - t)
        for i in range(count):
            v = decode(at_address(source + labels[i] * step, STORED)[0])
            known = v < INFINITY
            wrong |= not known and low <= i <= t
            m[x + i] = v if known else -INFINITY
        if wrong:
            return np.nan
        o = memory + old * ITEM
        advance(
            rows_at(o, row * ITEM, ZERO, 4), rows_at(o + (row - 1) * ITEM, 2 * row * ITEM, ZERO, 2),
            rows_at(memory + new * ITEM, row * ITEM, ZERO, 4), rows_at(shares, width * ITEM, ZERO, 5),
            at_address(memory + x * ITEM, ZERO), at_address(memory + gaps * ITEM, ZERO), blank, width,
        )  # fmt: skip
        source += c[SOURCE_FRAME]
        if GRAD:
            shares += SHARES * width * ITEM
        if t % REBASED == REBASED - 1:
            # Take the largest exponent from all, so that they stay small.
            k, top = at_address(memory + (new - LANES + 2 * row) * ITEM, ZERO), -INFINITY
            for i in range(2 * row):
                top = select(k[i] > top, k[i], top)
            if top == -INFINITY:
                return np.inf
            for i in range(2 * row):
                k[i] -= top
            base += top
    # An alignment ends with the last blank or the final label.
    last, final = new + count, new + row + count - 1
    top = select(m[last + 2 * row] > m[final + 2 * row], m[last + 2 * row], m[final + 2 * row])
    if top == -INFINITY:
        return np.inf
    a, b = m[last] * power_of_2(m[last + 2 * row] - top), m[final] * power_of_2(m[final + 2 * row] - top)
    if GRAD:
        fill(memory, ZERO, LANES + NUMBERS * row)
        m[LANES + count] = a / (a + b)
        if count:
            m[LANES + row + count - 1] = b / (a + b)
    return -((base + float(top)) * LOG_2 + libm.log(float(a) + float(b)))


def backward(context, n, memory, written, invalid):
    """A sequence's gradient: probabilities less posteriors, times a factor.

    It has as many frames as `written`. Others get NaN, up to frame `invalid`, and then 0. A frame is read
    before it is written.
    """
    prefer_widest_vectors()
    c = at_address(context, 0)
    count, classes = at_address(c[COUNTS_AT], 0)[n], c[CLASSES]
    labels = at_address(at_address(c[LABELS_AT], 0)[n], 0)
    factor = T(at_address(c[FACTORS_AT], 0.0)[n])
    source, sink = c[SOURCE] + n * c[SOURCE_SEQUENCE], c[SINK] + n * c[SINK_SEQUENCE]
    step, into = c[SOURCE_CLASS], c[SINK_CLASS]
    for t in range(written, c[LONGEST]):
        there = sink + t * c[SINK_FRAME]
        same = encode(NAN if t < invalid else ZERO)
        if CONTIGUOUS:
            fill(there, same, classes)
        else:
            for i in range(classes):
                at_address(there + i * into, WRITTEN)[0] = same
    width, size = padded(count + 1), padded(classes)
    row, share = width + LANES, width * ITEM
    m = at_address(memory, ZERO)
    p_at = memory + (2 * NUMBERS * row + 2 * width) * ITEM
    p = at_address(p_at, ZERO)
    fill(p_at + classes * ITEM, ZERO, size - classes)
    shares = p_at + size * ITEM + written * SHARES * share
    at_address(shares, ZERO)[0] = ZERO  # read as one state's share too many, and multiplied by 0
    now, other = LANES, LANES + 2 * row
    for back in range(written):
        t = written - 1 - back
        here, there = source + t * c[SOURCE_FRAME], sink + t * c[SINK_FRAME]
        if CONTIGUOUS:
            for i in range(classes):
                p[i] = decode(at_address(here, STORED)[i])
        else:
            for i in range(classes):
                p[i] = decode(at_address(here + i * step, STORED)[0])
        for j in range(0, size, LANES):
            for i in range(j, j + LANES):
                p[i] = exp(p[i])
        blanks = sum_of(m, now, width)
        whole = blanks + sum_of(m, now + row, width)
        p[c[BLANK_CLASS]] -= blanks
        for i in range(count):
            p[labels[i]] -= m[now + row + i]
        if CONTIGUOUS:
            for i in range(classes):
                at_address(there, WRITTEN)[i] = encode(p[i] * factor)
        else:
            for i in range(classes):
                at_address(there + i * into, WRITTEN)[0] = encode(p[i] * factor)
        shares -= SHARES * share
        if t:
            a = memory + now * ITEM
            retreat(
                rows_at(a, row * ITEM, ZERO, 2), rows_at(a + ITEM, row * ITEM, ZERO, 2),
                rows_at(memory + other * ITEM, row * ITEM, ZERO, 2), rows_at(shares, share, ZERO, 5),
                rows_at(shares + ITEM, share, ZERO, 5), width, whole,
            )  # fmt: skip
            now, other = other, now
    return 0


def sequences(context, worker):
    """The task: one worker's sequences, their losses and, if it is asked for, the gradient."""
    c = at_address(context, 0)
    losses = at_address(c[LOSSES_AT], 0.0)
    memory = c[SCRATCH] + worker * c[ROOM]
    for n in range(worker, c[BATCH], c[WORKER_COUNT]):
        frames, loss = at_address(c[FRAMES_AT], 0)[n], 0.0
        if losses[n] == 0:
            frames = 0  # the sequence is not even read
        elif frames:
            loss = run_forward(c[FORWARD_AT], (context, n, memory))
        elif at_address(c[COUNTS_AT], 0)[n]:
            loss = np.inf
        found = loss < np.inf
        if loss == np.inf and c[INFINITY_COUNTS_AS_0]:
            loss = 0.0
        losses[n] *= loss
        if c[BACKWARD_AT]:
            written, invalid = frames if found else 0, 0 if loss == 0 else frames
            run_backward(c[BACKWARD_AT], (context, n, memory, written, invalid))
    return 0


def read(recipe, objects, call, records):
    """Read and check lengths, labels and weights; `OK`, `UNFIT`, or where a label is that is no class.

    Parameters
    ----------
    recipe, objects : address
        Of the recipe's numbers, and of the arrays' addresses.
    call : address
        Of frames, sequences and classes; how many labels a sequence has at most, or all have if they are
        joined; whether they are joined, and whether it is a single sequence. Behind these the sum of the
        sequences' weights is stored, a float64.
    records : address
        Of as many rows of a number for each sequence as `RECORDS` says, and then of room for copied labels.
    """
    r, arrays, c = at_address(recipe, 0), at_address(objects, 0), at_address(call, 0)
    longest, batch, classes, most, joined, single = c[0], c[1], c[2], c[3], c[4], c[5]
    counts, places = at_address(records + 8 * batch, 0), at_address(records + 16 * batch, 0)
    losses = at_address(records + 32 * batch, 0.0)
    fill(records + 24 * batch, 1.0, 2 * batch)
    total = 0
    for k in range(2):
        array, into = arrays[INPUT_LENGTHS + k], records + 8 * batch * k
        rank, lengths, step = rank_of(array), at_address(into, 0), 0
        if rank:
            if rank > 1 or at_address(shape_of(array), 0)[0] != batch:
                return UNFIT
            step = at_address(strides_of(array), 0)[0]
        elif not single:
            return UNFIT
        if COPIED and batch:
            store(call + 48, step)
            code = r[INPUT_LENGTHS + k]
            transfer(r[GATHER_INTEGERS], (code, data_of(array), call + 8, call + 48, 1, 0, into, batch))
        limit, total = most if k else longest, 0
        for n in range(batch):
            if not COPIED:
                lengths[n] = at_address(data_of(array) + n * step, 0)[0]
            if not 0 <= lengths[n] <= limit:
                return UNFIT
            total += lengths[n]
    if joined and total != most:
        return UNFIT
    if WEIGHTED:
        for k in range(2):
            code = r[SAMPLE_WEIGHT + k]
            if code != ABSENT:
                array = arrays[SAMPLE_WEIGHT + k]
                address, rank, step = data_of(array), rank_of(array), 0
                if rank:
                    extent = at_address(shape_of(array), 0)[0]
                    if rank > 1 or single or (extent != batch and extent != 1):
                        return UNFIT
                    if extent == batch:
                        step = at_address(strides_of(array), 0)[0]
                if code >= FLOAT16:
                    row = records + 40 * batch
                    if batch:
                        # As many as there are; a number for all has a stride of 0.
                        store(call + 48, step)
                        transfer(r[GATHER], (code, address, call + 8, call + 48, 1, 0, row, batch))
                    code, address, step = FLOAT32, row, 4
                into = at_address(records + (24 if k else 32) * batch, 0.0)
                for n in range(batch):
                    if code == FLOAT32:
                        into[n] = at_address(address + n * step, np.float32(0))[0]
                    else:
                        x = at_address(address + n * step, 0.0)[0]
                        into[n] = np.float64(np.float32(x)) if r[ITEM_SIZE] == 4 else x
    targets = arrays[TARGETS]
    strides = at_address(strides_of(targets), 0)
    start, copy, weight = 0, records + 8 * RECORDS * batch, 0.0
    for n in range(batch):
        first = start if joined else n * most
        start += counts[n]
        weight += losses[n]
        if COPIED:
            place = copy + 8 * first
            if counts[n]:
                code, shape = r[TARGETS], shape_of(targets)
                axes = rank_of(targets)
                transfer(
                    r[GATHER_INTEGERS],
                    (code, data_of(targets), shape, strides_of(targets), axes, first, place, counts[n]),
                )
        else:
            place = data_of(targets) + (8 * first if joined else n * strides[0])
        places[n] = place
        labels = at_address(place, 0)
        for i in range(counts[n]):
            if not 0 <= labels[i] < classes:
                return first + i
    store(call + 48, weight)
    return OK


def drive(recipe, numbers, arrays, task, fork):
    """The divided sum of the losses, and a status: `OK`, `UNFIT`, or where a label is that is no class.

    A label's place is its index among the targets, in C order.
    """
    r = at_address(data_of(recipe), 0)
    objects, call = items_of(arrays), stack(8 * 7)
    array = at_address(objects, 0)
    log_probs, gradient, targets = array[LOG_PROBS], array[GRADIENT], array[TARGETS]
    rank, axes, grad = rank_of(log_probs), rank_of(targets), r[GRADIENT] != ABSENT
    if rank < 2 or rank > 3 or axes < 1 or axes > 2:
        return 0.0, UNFIT
    shape, of_targets = at_address(shape_of(log_probs), 0), at_address(shape_of(targets), 0)
    longest, batch, classes = shape[0], shape[1], shape[rank - 1]
    if rank == 2:
        batch = 1
    if not 0 <= r[BLANK] < classes or (axes == 2 and of_targets[0] != batch):
        return 0.0, UNFIT
    most, missing = of_targets[axes - 1], 0
    if grad:
        if rank_of(gradient) != rank:
            return 0.0, UNFIT
        for axis in range(rank):
            if at_address(shape_of(gradient), 0)[axis] != shape[axis]:
                return 0.0, UNFIT
        step = at_address(strides_of(log_probs), 0)[rank - 1]
        into = at_address(strides_of(gradient), 0)[rank - 1]
        straight = step == STORED_SIZE[r[LOG_PROBS]] and into == STORED_SIZE[r[GRADIENT]]
        if not r[ANYWHERE] and classes > 1 and not straight:
            missing = MISSING_ANYWHERE
    if not r[GATHER_INTEGERS] and at_address(strides_of(targets), 0)[axes - 1] != 8 and most > 1:
        missing |= MISSING_COPIES
    if missing:
        return 0.0, INCOMPLETE - missing
    store_all(call, (longest, batch, classes, most, axes == 1 and rank == 3, rank == 2))
    size = 8 * RECORDS * batch + 8
    if r[GATHER_INTEGERS]:
        size += 8 * most * (batch if axes == 2 else 1)
    records = allocate(size)
    if not records:
        return 0.0, NO_MEMORY
    status = run_read(r[READ], (data_of(recipe), objects, call, records))
    if status != OK:
        release(records)
        return 0.0, status

    frames, counts = at_address(records, 0), at_address(records + 8 * batch, 0)
    factors, losses = at_address(records + 24 * batch, 0.0), at_address(records + 32 * batch, 0.0)
    f = at_address(data_of(numbers), 0.0)
    divisor = at_address(call + 48, 0.0)[0] if r[BY_SEQUENCES] else f[DIVISOR]
    # A worker's scratch memory, for the widest states of its sequences and the largest table of shares.
    widest = table = 0
    for n in range(batch):
        if r[PER_LABEL] and counts[n]:
            losses[n] /= counts[n]
        factors[n] = f[FACTOR] / divisor * losses[n] * factors[n]
        width = padded(counts[n] + 1)
        widest = width if width > widest else widest
        table = frames[n] * width if frames[n] * width > table else table
    room = 2 * NUMBERS * (widest + LANES) + 2 * widest
    if grad:
        room += padded(classes) + SHARES * table + LANES
    room *= r[ITEM_SIZE]
    workers = 1
    if fork and batch:
        workers = batch if batch < r[WORKERS] else r[WORKERS]
    scratch = allocate(workers * room + 64)
    if not scratch:
        release(records)
        return 0.0, NO_MEMORY
    context, source = stack(8 * 23), at_address(strides_of(log_probs), 0)
    store_all(context, (data_of(log_probs), source[0], source[1], source[rank - 1]))
    if grad:
        sink = at_address(strides_of(gradient), 0)
        store_all(context + 8 * SINK, (data_of(gradient), sink[0], sink[1], sink[rank - 1]))
    store_all(context + 8 * LONGEST, (longest, batch, classes, r[BLANK], r[ZERO_INFINITY]))
    a, b, d, e = records + 8 * batch, records + 16 * batch, records + 24 * batch, records + 32 * batch
    store_all(context + 8 * FRAMES_AT, (records, a, b, d, e))
    at = (scratch + 63) // 64 * 64
    store_all(context + 8 * SCRATCH, (at, room, workers, r[FORWARD], r[BACKWARD]))
    if workers > 1:
        run_fork(fork, (task, context, workers))
    else:
        run_task(task, (context, 0))
    value, code = 0.0, r[LOSSES]
    terms = data_of(array[LOSSES]) if code != ABSENT else 0
    row = terms if code == FLOAT32 else records + 40 * batch
    for n in range(batch):
        value += losses[n]
        if code == FLOAT64:
            at_address(terms, 0.0)[n] = losses[n]
        elif code != ABSENT:
            at_address(row, np.float32(0))[n] = np.float32(losses[n])
    if r[SCATTER] and batch:
        store_all(call, (batch, STORED_SIZE[code]))
        transfer(r[SCATTER], (code, terms, call, call + 8, 1, 0, row, batch))
    release(scratch)
    release(records)
    return value / divisor, OK


ENTRY = types.Tuple((types.float64, types.int64))(held, held, held, types.int64, types.int64)


@cache
def entry() -> Any:
    """`drive`, compiled."""
    return compile_entry(drive, {}, "sequences", "sequences", ENTRY)


# ---- compiling ---------------------------------------------------------------------------------------------


def wide(x):
    return T(x)


def from_bits(x):
    return T(widen(x))


def as_stored(x):
    return STORED_TYPE(x)


def to_bits(x):
    return narrow(np.float32(x))


HALVES = {FLOAT16: (from_float16, to_float16), BFLOAT16: (from_bfloat16, to_bfloat16)}


@cache
def scope_of(dtype: np.dtype, code: int, to: int | None = None) -> tuple[dict[str, Any], str]:
    """What `sequences` is bound to, and a name for it: `to` is the code of a gradient that is asked for."""
    single, grad = dtype == np.float32, to is not None
    form, real = (math.SINGLE, types.float32) if single else (math.DOUBLE, types.float64)
    name = f"{dtype.name}_{code}_{f'gradient_{to}' if grad else 'value'}"

    def bound(template: Any, scope: dict[str, Any], options: dict[str, Any] = HELPER) -> Any:
        return bind(template, scope, name, name, njit(**options))

    T = dtype.type
    number = dict(T=T, GRAD=grad, ZERO=T(0), ONE=T(1), INFINITY=T(np.inf), NAN=T(np.nan))
    scope = number | pairs_in(form) | dict(LOWEST=dtype.type(2.0 ** LEAST[dtype.type]))
    advancing, retreating = bound(_advance, scope, APART), bound(_retreat, scope, APART) if grad else None
    decode = bound(from_bits, number | dict(widen=HALVES[code][0])) if code in HALVES else bound(wide, number)
    encode = None
    if to in HALVES:
        encode = bound(to_bits, dict(narrow=HALVES[to][1]))
    elif to is not None:
        encode = bound(as_stored, dict(STORED_TYPE=STORED_TYPES[to]))
    scope |= dict(
        ITEM=dtype.itemsize,
        STORED=STORED_TYPES[code](0),
        WRITTEN=STORED_TYPES[code if to is None else to](0),
        decode=decode,
        encode=encode,
        exp=math.CPU[real]["exp"],
        advance=advancing,
        retreat=retreating,
    )
    return scope, name


@cache
def forward_address(dtype: np.dtype, code: int, grad: bool) -> int:
    """The address of `forward` for arithmetic in a dtype and a code of storage, with shares or without."""
    scope, name = scope_of(dtype, code, code if grad else None)
    return compile_function(forward, scope, name, name, types.float64(*[types.int64] * 3))


@cache
def backward_address(dtype: np.dtype, code: int, to: int, anywhere: bool) -> int:
    """The address of `backward`; a frame's classes are in one piece, or anywhere."""
    scope, name = scope_of(dtype, code, to)
    name = f"{name}_strided" if anywhere else name
    scope = scope | {"CONTIGUOUS": not anywhere}
    return compile_function(backward, scope, name, name, types.int64(*[types.int64] * 5))


@cache
def task_address() -> int:
    """The address of `sequences`."""
    return compile_function(sequences, {}, "sequences", "sequences", TASK)


@cache
def reader(copied: bool, weighted: bool) -> int:
    """The address of `read`."""
    name = f"{'copied' if copied else 'direct'}_{'weighted' if weighted else 'plain'}"
    signature = types.int64(*[types.int64] * 4)
    return compile_function(read, dict(COPIED=copied, WEIGHTED=weighted), name, name, signature)


# ---- launching ----------------------------------------------------------------------------------------

INTEGER_CODES = {(np.dtype(c).kind, np.dtype(c).itemsize): k for c, k in strided.INTEGERS.items()}


def readable(array: np.ndarray) -> np.ndarray:
    """Return an array of native byte order, aligned."""
    kept = array.dtype.isnative and array.flags.aligned
    return array if kept else array.astype(array.dtype.newbyteorder("="))


def new_terms(p: Sequences) -> Any:
    """Return an array for the terms; None where they are reduced."""
    return np.empty(p.shape, p.dtype) if p.weighting.reduction == "none" else None


def terms_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the terms' shape, from that of the log-probabilities."""
    return shape[1:-1]


NEW = {
    "log_probs": New(GRADIENT, LOG_PROBS),
    TERMS: New(LOSSES, LOG_PROBS, terms_shape),
}


def pack(p: Sequences, outputs: dict[str, Any], made: tuple[str, ...]) -> Launch:
    """Return a launch of `drive`."""
    w, dtype, code = p.weighting, p.arithmetic, code_of(p.log_probs.dtype)
    grad, terms = outputs.get("log_probs"), outputs.get(TERMS)
    to = None if grad is None else code_of(grad.dtype)
    integers = [readable(a) for a in (p.targets, p.input_lengths, p.target_lengths)]
    weights = [
        a.astype(dtype) if a is not None and code_of(a.dtype) is None else a
        for a in (w.sample_weight, w.upstream)
    ]
    kinds = [INTEGER_CODES[a.dtype.kind, a.dtype.itemsize] for a in integers]
    floats = [ABSENT if a is None else code_of(a.dtype) for a in (*weights, terms)]
    copied = kinds != [WORDS] * 3 or integers[0].strides[-1] != 8
    anywhere = any(a is not None and a.strides[-1] != a.itemsize for a in (p.log_probs, grad))
    mean, weighted = w.reduction == "mean", floats[:2] != [ABSENT] * 2
    recipe = (
        *(code, *kinds, ABSENT if to is None else to, *floats),
        *(p.blank, p.zero_infinity, mean, mean and w.divisor is None, dtype.itemsize),
        *(numba.config.NUMBA_NUM_THREADS, anywhere),
        forward_address(dtype, code, grad is not None),
        0 if to is None else backward_address(dtype, code, to, anywhere),
        reader(copied, weighted),
        strided.gatherer(SINGLE) if HALVES.keys() & set(floats[:2]) else 0,
        strided.scatterer(SINGLE) if floats[2] in HALVES else 0,
        strided.integer_gatherer() if copied else 0,
    )
    numbers = np.array((1.0 if w.divisor is None else w.divisor, w.factor))
    arrays = (p.log_probs, *integers, grad, *weights, terms)
    new = tuple(NEW[n] for n in made)
    return Launch(
        entry(), np.array(recipe, np.int64), numbers, arrays, task_address(), PARALLEL_FROM, new,
        complete(dtype, code, to, weighted),
    )  # fmt: skip


@cache
def complete(dtype: np.dtype, code: int, to: int | None, weighted: bool) -> Any:
    """Return a function that compiles what a recipe misses."""

    def with_missing(recipe: np.ndarray, status: int) -> None:
        missing = INCOMPLETE - status
        if missing & MISSING_ANYWHERE and to is not None:
            recipe[BACKWARD], recipe[ANYWHERE] = backward_address(dtype, code, to, True), 1
        if missing & MISSING_COPIES:
            recipe[READ], recipe[GATHER_INTEGERS] = reader(True, weighted), strided.integer_gatherer()

    return with_missing


def refuse(p: Sequences, status: int) -> Exception:
    """Return the error for a call that the driver refused; a status that is not negative tells a label."""
    if status == UNFIT:
        shapes = f"{p.log_probs.shape} and {p.targets.shape}"
        return wrong_length(p) or ValueError(f"{p.name}: arrays of shapes {shapes} do not fit together")
    label, classes = p.targets.reshape(-1)[status], p.log_probs.shape[-1]
    if not p.shape:
        return bad_label(p.name, 0, label, classes, (status,))
    if p.targets.ndim == 2:
        sequence, place = divmod(status, p.targets.shape[1])
        return bad_label(p.name, sequence, label, classes, (sequence, place))
    ends = np.cumsum(p.target_lengths)
    sequence = int(np.searchsorted(ends, status, "right"))
    place = status - int(ends[sequence] - p.target_lengths[sequence])
    return bad_label(p.name, sequence, label, classes, (status,), place)


# ---- inside compiled code ----------------------------------------------------------------------------------

# Bound by `compile_inside`: what `compile_functions` gives.
function_address: Any = None

DESCRIPTION = 10  # int64 that `describe` takes


@njit(**HELPER)
def describe(memory, data, rank, first, second, third, item):
    """Lay out what drivers read of a contiguous array's object; its address."""
    store_all(memory, (data, rank, memory + 32, memory + 56))
    store_all(memory + 32, (first, second, third, second * third * item, third * item, item))
    return memory - HEAD


def inside(x, labels, label_counts, frame_counts, g, width, extents, settings):
    """`drive` of contiguous arrays; a sequence has `width` places for labels, 0 of joined ones."""
    longest, batch, classes = extents
    blank, zero_infinity, mean, scale, divisor = settings
    objects, memory = stack(8 * 8), stack(8 * 70)
    recipe, numbers = stack(8 * 21), stack(8 * 2)
    if batch == 1 and width == 0:
        width = labels.size
    store(objects, describe(memory, x.ctypes.data, 3, longest, batch, classes, x.itemsize))
    if width:
        store(objects + 8, describe(memory + 80, labels.ctypes.data, 2, batch, width, 1, 8))
    else:
        store(objects + 8, describe(memory + 80, labels.ctypes.data, 1, labels.size, 1, 1, 8))
    store(objects + 16, describe(memory + 160, frame_counts.ctypes.data, 1, batch, 1, 1, 8))
    store(objects + 24, describe(memory + 240, label_counts.ctypes.data, 1, batch, 1, 1, 8))
    store(objects + 32, describe(memory + 320, g.ctypes.data, 3, longest, batch, classes, x.itemsize))
    r = at_address(recipe, 0)
    for k in range(RECIPE):
        r[k] = ABSENT if k < BLANK else 0
    for k in range(TARGETS, GRADIENT):
        r[k] = WORDS
    r[LOG_PROBS], r[GRADIENT] = CODE, CODE if g.size else ABSENT
    r[BLANK], r[ZERO_INFINITY], r[PER_LABEL], r[BY_SEQUENCES] = blank, zero_infinity, mean, divisor != divisor
    r[ITEM_SIZE], r[READ] = x.itemsize, function_address(2)
    r[FORWARD], r[BACKWARD] = function_address(3), 0
    if g.size:
        r[FORWARD], r[BACKWARD] = function_address(4), function_address(5)
    store(numbers + 8 * DIVISOR, divisor)
    store(numbers + 8 * FACTOR, scale)
    of_recipe = describe(memory + 400, recipe, 1, RECIPE, 1, 1, 8)
    of_numbers = describe(memory + 480, numbers, 1, 2, 1, 1, 8)
    return run_drive(function_address(0), of_recipe, of_numbers, tuple_at(objects), function_address(1))


def compile_functions(dtype: np.dtype) -> tuple[int, ...]:
    """Return the addresses of the driver, its task, and the functions that it calls."""
    code = code_of(dtype)
    return (
        compile_drive(drive),
        task_address(),
        reader(False, False),
        forward_address(dtype, code, False),
        forward_address(dtype, code, True),
        backward_address(dtype, code, code, False),
    )


@cache
def compile_inside(dtype: np.dtype) -> Any:
    """`inside` for a dtype: ``inside(...) -> (value, status)``."""
    scope = dict(function_address=addresses(compile_functions, dtype), CODE=code_of(dtype))
    return bind(inside, scope, dtype.name, dtype.name, kept(nogil=True, error_model="numpy"))
