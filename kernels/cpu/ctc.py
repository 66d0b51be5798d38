"""Connectionist temporal classification: the sum over all alignments of a sequence's labels with its frames.

The states of an alignment are the labels and the blanks before, between and after them. `forward` carries the
probability of every state over the frames, and keeps, for each state and frame, the shares in which it came
from its predecessors. Those are the derivatives: `backward` splits the posterior of the last states by them,
frame by frame, and writes a frame's gradient on its way. No second recursion over probabilities is needed.

Probabilities are pairs (m, k) that stand for ``m * 2**k``, 1 <= m < 2 and k a whole number in a float: they
neither underflow nor lose digits as their logarithms would, and come without an exponential or a logarithm a
state. Shares and posteriors are plain numbers. A state's index is padded to whole vectors, blank and label of
one index are done together: label i follows blank i.

A worker does its sequences one by one, in scratch memory of its own; the same bits for any number of threads.
"""

from functools import cache
from typing import Any, NamedTuple

import numpy as np
from numba import njit, prange

from .. import math
from ..bind import bind
from ..layout import address_of
from ..math import bits, exp, polynomial, select, unbits
from ..spec import INT64, Sequences, bad_label, code_of
from .drive import _gather, _load, _scatter, at_address
from .packing import divisor_or_nan, flat, run_parallel, signed, workers
from .target import LOOP, SCALAR, DistinctArrays, prefer_widest_vectors

LANES = 16  # states are padded to a multiple of this
REBASED = 16  # frames after which exponents are moved back to where all of their digits are whole
SHARES = 5  # of a state's index: see `advance`
NUMBERS = 4  # of a state's index: m and k of the blank, m and k of the label

KERNEL: dict[str, Any] = dict(nogil=True, cache=True, error_model="numpy")
# Pointers that share no memory; nothing may be reassociated, as in SCALAR.
APART: dict[str, Any] = dict(SCALAR, pipeline_class=DistinctArrays)

# Bound by `compile_ctc`; named here for readers and checkers.
split: Any = None
power_of_2: Any = None
normal: Any = None
advance: Any = None
retreat: Any = None
forward: Any = None
backward: Any = None
share_of_sequences: Any = None
LEAST: Any = None

LOG_2 = float(np.log(2.0))

# Posteriors and shares below 2**LEAST count as 0: far below rounding, and no product of two is subnormal.
NEGLIGIBLE = {np.float32: -60, np.float64: -500}


def pairs_in(form):
    """How numbers of a format become pairs (m, k), and back."""
    F, Z = form.float, form.int
    ZERO, ONE, LOG2_E = F(0), F(1), F(1 / np.log(2))
    HIGH, LOW = F(form.log2[0]), F(form.log2[1])
    POLYNOMIAL = tuple(F(c) for c in form.exp)
    MANTISSA, BIAS = Z(form.mantissa), F(form.bias)
    FRACTION, UNIT = Z((1 << form.mantissa) - 1), Z(form.bias << form.mantissa)
    SHIFT = F(1.5 * 2.0**form.mantissa)  # adding it leaves a rounded number in the low bits
    FIELD = F(SHIFT + form.bias)  # the same, as an exponent field
    FAR = F(2.0 ** (form.mantissa - 1))  # beyond it SHIFT does not round, and hardly a fraction is left
    LOWEST = F(NEGLIGIBLE[form.float])

    @njit(**SCALAR)
    def split(x):
        """e**x."""
        t = x * LOG2_E
        near = abs(t) < FAR
        n = t + SHIFT - SHIFT
        r = select(near, x - n * HIGH - n * LOW, ZERO)
        return (polynomial(r, POLYNOMIAL) * r + ONE) * r + ONE, select(near, n, t)

    @njit(**SCALAR)
    def power_of_2(k):
        """2**k of k <= 0; where that is negligible, or k is the difference of two infinities, 0."""
        return select(k > LOWEST, unbits(Z(bits(k + FIELD) << MANTISSA)), ZERO)

    @njit(**SCALAR)
    def normal(m, k):
        """The pair with m in [1, 2)."""
        b = bits(m)
        return unbits(Z((b & FRACTION) | UNIT)), k + (F(np.int32(b >> MANTISSA)) - BIAS)

    return {"split": split, "power_of_2": power_of_2, "normal": normal}


@njit(**SCALAR)
def at(address, T):
    """A pointer: a slice would count references, which takes as long as a frame of short sequences."""
    return at_address(address, T(0))


@njit(nogil=True)
def places(a, b, c, d):
    """Addresses of arrays, which their owner keeps alive."""
    return a.ctypes.data, b.ctypes.data, c.ctypes.data, d.ctypes.data


@njit(**SCALAR)
def larger(a, b):
    return select(a > b, a, b)


def _advance(
    bm, bk, lm, lk, lm_before, lk_before, x, gap, blank,
    bm_new, bk_new, lm_new, lk_new, stay_blank, enter_blank, stay, enter, skip, width,
):  # fmt: skip
    """One frame: blanks and labels from those of the frame before, and the shares of their predecessors.

    A blank comes from itself or the label before. A label comes from itself, the blank before, or, unless
    `gap` is -inf because they are the same, the label before.
    """
    prefer_widest_vectors()
    zero, one = type(blank)(0), type(blank)(1)
    ym, yk = split(blank)
    for j in range(0, width, LANES):
        for i in range(j, j + LANES):
            k = larger(bk[i], lk_before[i])
            a, b = bm[i] * power_of_2(bk[i] - k), lm_before[i] * power_of_2(lk_before[i] - k)
            total = a + b
            inverse = one / select(total > zero, total, one)
            stay_blank[i], enter_blank[i] = a * inverse, b * inverse
            bm_new[i], bk_new[i] = normal(total * ym, k + yk)

            over = lk_before[i] + gap[i]
            k = larger(larger(lk[i], bk[i]), over)
            a, b = lm[i] * power_of_2(lk[i] - k), bm[i] * power_of_2(bk[i] - k)
            c = lm_before[i] * power_of_2(over - k)
            total = a + b + c
            inverse = one / select(total > zero, total, one)
            stay[i], enter[i], skip[i] = a * inverse, b * inverse, c * inverse
            zm, zk = split(x[i])
            lm_new[i], lk_new[i] = normal(total * zm, k + zk)


def _retreat(
    blank, label, blank_after, label_after, stay_blank, enter_blank_after, stay, enter, skip_after,
    blank_new, label_new, width, lowest, whole,
):  # fmt: skip
    """The posteriors of the frame before; they add up to `whole`, but for rounding, and then again to 1."""
    prefer_widest_vectors()
    zero, inverse = type(lowest)(0), type(lowest)(1) / whole
    for j in range(0, width, LANES):
        for i in range(j, j + LANES):
            p = blank[i] * stay_blank[i] + label[i] * enter[i]
            q = label[i] * stay[i] + blank_after[i] * enter_blank_after[i] + label_after[i] * skip_after[i]
            blank_new[i] = select(p > lowest, p * inverse, zero)
            label_new[i] = select(q > lowest, q * inverse, zero)


@njit(**(LOOP | {"forceinline": True}))
def sum_of(x, size):
    prefer_widest_vectors()
    result = x[0] - x[0]
    for i in range(size):
        result += x[i]
    return result


@njit(**SCALAR)
def multiply(x, size, factor):
    prefer_widest_vectors()
    for i in range(size):
        x[i] *= factor


@njit(**SCALAR)
def exponentials(x, size):
    prefer_widest_vectors()
    for j in range(0, size, LANES):
        for i in range(j, j + LANES):
            x[i] = exp(x[i])


class Sequence(NamedTuple):
    """Where a sequence's log-probabilities lie, or their gradients."""

    address: int
    code: int  # of the elements
    frame: int  # bytes to the next frame
    step: int  # bytes to the next class


@njit(nogil=True)
def pick(source, t, labels, low, high, x):
    """The labels' log-probabilities in a frame; whether those of `low` to `high` are NaN or infinite."""
    T = type(x[0])
    base = source.address + t * source.frame
    wrong = False
    for i in range(labels.size):
        v = _load(source.code, base + labels[i] * source.step, x[0])
        number = v < T(np.inf)
        wrong |= not number and low <= i < high
        x[i] = v if number else T(-np.inf)
    return wrong


@njit(nogil=True)
def rebase(states, blanks, labels, count):
    """Take the largest exponent from all, so that they stay small; it."""
    top = states[blanks]
    for i in range(count):
        top = larger(top, larger(states[blanks + i], states[labels + i]))
    if top > -np.inf:
        for i in range(count):
            states[blanks + i] -= top
            states[labels + i] -= top
    return top


def _forward(source, labels, frames, blank, keep, table, states, x, gaps):
    """The log-probability of the labels; the shares of all frames, or, if they are not kept, of the last."""
    T = x.dtype.type
    impossible = T(-np.inf)
    width, pitch, count = x.size, x.size + 1, labels.size
    # Rows m, k of blanks and m, k of labels, twice; before each row's first stands a label that cannot be.
    for r in range(2 * NUMBERS):
        states[r * pitch : (r + 1) * pitch] = T(1) if r % 2 == 0 else impossible
    new, old = 1, 1 + NUMBERS * pitch
    states[new + pitch] = T(0)  # as if a blank came before the first frame
    x[:] = impossible
    from_table, from_states, from_x, from_gaps = places(table, states, x, gaps)
    size = x.itemsize
    base = 0.0
    for t in range(frames):
        new, old = old, new
        y = _load(source.code, source.address + t * source.frame + blank * source.step, impossible)
        # Labels that the frames so far can reach, and that the frames to come can finish.
        if pick(source, t, labels, count - (frames - t), t + 1, x) or not y < T(np.inf):
            return np.nan
        n, o = from_states + new * size, from_states + old * size
        s = from_table + (t * SHARES * width * size if keep else 0)
        row, share = pitch * size, width * size
        advance(
            at(o, T), at(o + row, T), at(o + 2 * row, T), at(o + 3 * row, T), at(o + 2 * row - size, T),
            at(o + 3 * row - size, T), at(from_x, T), at(from_gaps, T), y,
            at(n, T), at(n + row, T), at(n + 2 * row, T), at(n + 3 * row, T), at(s, T), at(s + share, T),
            at(s + 2 * share, T), at(s + 3 * share, T), at(s + 4 * share, T), width,
        )  # fmt: skip
        if t % REBASED == REBASED - 1:
            top = rebase(states, new + pitch, new + 3 * pitch, count + 1)
            if top == impossible:
                return -np.inf
            base += top
    bk, lk = states[new + pitch + count], states[new + 3 * pitch + count - 1]
    k = larger(bk, lk)
    if k == impossible:
        return -np.inf
    a = states[new + count] * power_of_2(bk - k)
    b = states[new + 2 * pitch + count - 1] * power_of_2(lk - k)
    # The posteriors of the last frame, where `backward` begins; behind each row stands a 0.
    states[:] = T(0)
    states[count], states[pitch + count - 1] = a / (a + b), b / (a + b)
    return (base + float(k)) * LOG_2 + np.log(float(a) + float(b))


def _backward(source, sink, labels, frames, blank, factor, table, states, row, classes, width):
    """The gradient: probabilities less posteriors, times a factor. A frame is read before it is written."""
    T = row.dtype.type
    lowest = T(2.0**LEAST)
    count, pitch = labels.size, width + 1
    from_table, from_states, from_row, _ = places(table, states, row, row)
    size = row.itemsize
    share, after = width * size, pitch * size
    table[frames * SHARES * width] = T(0)  # read as one state's share too many, and multiplied by 0
    now, other = 0, 2 * pitch
    for t in range(frames - 1, -1, -1):
        n, o = from_states + now * size, from_states + other * size
        _gather(source.code, source.address + t * source.frame, source.step, row[:classes])
        exponentials(at(from_row, T), row.size)
        blanks = sum_of(at(n, T), width)
        whole = blanks + sum_of(at(n + after, T), width)
        row[blank] -= blanks
        for i in range(count):
            row[labels[i]] -= states[now + pitch + i]
        multiply(at(from_row, T), row.size, factor)
        _scatter(sink.code, sink.address + t * sink.frame, sink.step, row[:classes])
        if t:
            s = from_table + t * SHARES * share
            retreat(
                at(n, T), at(n + after, T), at(n + size, T), at(n + after + size, T),
                at(s, T), at(s + share + size, T), at(s + 2 * share, T), at(s + 3 * share, T),
                at(s + 4 * share + size, T), at(o, T), at(o + after, T), width, lowest, whole,
            )  # fmt: skip
            now, other = other, now


@njit(nogil=True)
def fill(sink, start, frames, longest, row, value):
    """The gradients that are one number a frame: `value`, and 0 beyond the sequence."""
    T = row.dtype.type
    for t in range(start, longest):
        row[:] = value if t < frames else T(0)
        _scatter(sink.code, sink.address + t * sink.frame, sink.step, row)


def _share_of_sequences(
    first, step, addresses, codes, strides, extents, blank, zero_infinity, labels, starts, label_counts,
    frame_counts, factors, losses,
):  # fmt: skip
    """One worker's sequences: their losses, each times what stands in `losses`, and the gradients."""
    T = factors.dtype.type
    longest, batch, classes = extents
    grad = codes.size > 1
    most, rows = 0, 1
    for n in range(first, batch, step):
        most = max(most, label_counts[n])
        rows = max(rows, frame_counts[n] if grad else 1)
    width = padded(most + 1)
    table = np.empty(rows * SHARES * width + 1, T)
    states = np.empty(2 * NUMBERS * (width + 1), T)
    x, gaps, row = np.empty(width, T), np.empty(width, T), np.zeros(padded(classes), T)
    for n in range(first, batch, step):
        source = Sequence(addresses[0] + n * strides[0, 1], codes[0], strides[0, 0], strides[0, 2])
        own = labels[starts[n] : starts[n] + label_counts[n]]
        width = padded(own.size + 1)
        frames, loss = frame_counts[n], 0.0
        if losses[n] == 0:
            frames = 0  # the sequence is not even read
        elif frames:
            gaps[:] = T(0)
            for i in range(1, own.size):
                if own[i] == own[i - 1]:
                    gaps[i] = T(-np.inf)
            loss = -forward(source, own, frames, blank, grad, table, states, x[:width], gaps)
        elif own.size:
            loss = np.inf
        found = loss < np.inf
        if loss == np.inf and zero_infinity:
            loss = 0.0
        losses[n] *= loss
        if grad:
            k = strides[1]
            sink = Sequence(addresses[1] + n * k[1], codes[1], k[0], k[2])
            if found:
                backward(source, sink, own, frames, blank, factors[n], table, states, row, classes, width)
            value = T(0) if loss == 0 else T(np.nan)
            fill(sink, frames if found else 0, frames, longest, row[:classes], value)


@njit(**SCALAR)
def padded(size):
    return (size + LANES - 1) // LANES * LANES


@njit(**SCALAR)
def read(array, i):
    """An element of an optional array, 1 where it is not given (empty)."""
    return array[i] if array.size else array.dtype.type(1)


def ctc(
    addresses, codes, strides, extents, labels, starts, label_counts, frame_counts, weights, upstream, losses,
    settings, workers,
):  # fmt: skip
    """The losses of all sequences, and the gradient if it is asked for.

    Parameters
    ----------
    addresses, codes : arrays of int64
        Of the log-probabilities and, if it is asked for, their gradient: the address, and the element code.
    strides : array of int64, three columns
        In bytes: to the next frame, sequence and class.
    extents : (int, int, int)
        Frames, sequences and classes.
    labels : array of int64
        Of all sequences.
    starts, label_counts, frame_counts : arrays of int64
        A sequence's first label, how many it has, and how many frames.
    weights, upstream : arrays
        Of sequences, and of their gradients; each may be empty, for ones.
    losses : array of float64
        Receives the sequences' losses.
    settings : (int, bool, bool, float, float)
        The blank; whether an infinite loss counts as 0; whether a loss is divided by its number of labels;
        the gradient's scale; what that and the value are divided by: NaN for what the sequences count for.
    workers : int
        Into how many shares the sequences are cut.

    Returns
    -------
    value : float
        The divided sum.
    wrong, place : int, int
        The first sequence with a label that is no class, or -1, and which of its labels that is.
    """
    _, batch, classes = extents
    blank, zero_infinity, mean, scale, divisor = settings
    for n in range(batch):
        for i in range(label_counts[n]):
            if not 0 <= labels[starts[n] + i] < classes:
                return 0.0, n, i
    if divisor != divisor:
        divisor = float(batch)
        if weights.size:
            divisor = 0.0
            for n in range(batch):
                divisor += float(weights[n])
    factors = np.empty(batch, weights.dtype)
    for n in range(batch):
        losses[n] = read(weights, n)
        if mean:
            losses[n] /= max(label_counts[n], 1)
        factors[n] = scale / divisor * losses[n] * read(upstream, n)
    workers = min(batch, workers)
    for worker in prange(workers):
        share_of_sequences(
            np.int64(worker), workers, addresses, codes, strides, extents, blank, zero_infinity, labels,
            starts, label_counts, frame_counts, factors, losses,
        )  # fmt: skip
    total = 0.0
    for n in range(batch):
        total += losses[n]
    return total / divisor, -1, -1


@cache
def compile_ctc(dtype: np.dtype, parallel: bool) -> Any:
    """`ctc` with arithmetic in one dtype."""

    def bound(template: Any, scope: dict[str, Any], options: dict[str, Any], name: str = dtype.name) -> Any:
        return bind(template, scope, name, name, njit(**options))

    form = math.SINGLE if dtype == np.float32 else math.DOUBLE
    scalars = pairs_in(form) | {"LEAST": NEGLIGIBLE[dtype.type]}
    forwards = bound(_forward, scalars | {"advance": bound(_advance, scalars, APART)}, KERNEL)
    backwards = bound(_backward, scalars | {"retreat": bound(_retreat, scalars, APART)}, KERNEL)
    shares = bound(_share_of_sequences, {"forward": forwards, "backward": backwards}, KERNEL)
    name = f"{dtype.name}_{'parallel' if parallel else 'serial'}"
    return bound(ctc, {"share_of_sequences": shares}, KERNEL | {"parallel": parallel}, name)


# ---- launching ----------------------------------------------------------------------------------------

PARALLEL_FROM = 8192  # log-probabilities from which two threads beat one


def run(p: Sequences, outputs: dict[str, np.ndarray]) -> Any:
    """Write the gradient by ``"log_probs"``; return the value."""
    w = p.weighting
    arrays = [p.log_probs, *outputs.values()]
    if not p.shape:  # a single sequence is a batch of one
        arrays = [a[:, np.newaxis] for a in arrays]
    longest, batch, classes = arrays[0].shape
    starts = np.arange(batch) * p.targets.shape[-1]
    if not p.padded:
        starts = np.cumsum(p.target_lengths) - p.target_lengths
    losses = np.empty(batch)
    arguments = (
        np.array([address_of(a) for a in arrays], np.int64),
        np.array([code_of(a.dtype) for a in arrays], np.int64),
        np.array([a.strides for a in arrays], np.int64),
        (longest, batch, classes),
        flat(signed(p.targets), p.targets.shape, INT64),
        starts,
        p.target_lengths,
        p.input_lengths,
        flat(w.sample_weight, (batch,), p.arithmetic),
        flat(w.upstream, (batch,), p.arithmetic),
        losses,
        (p.blank, p.zero_infinity, w.reduction == "mean", w.factor, divisor_or_nan(w.divisor)),
        workers(),
    )
    size = p.log_probs.size if batch > 1 else 0
    value, sequence, place = run_parallel(
        lambda parallel: compile_ctc(p.arithmetic, parallel), size, PARALLEL_FROM, arguments
    )
    if sequence >= 0:
        position = int(starts[sequence] + place)
        index = (sequence, place) if p.padded else (position,)
        label = p.targets.reshape(-1)[position]
        raise bad_label(
            p.name, sequence, label, classes, index if p.shape else (place,), None if p.padded else place
        )
    if w.reduction == "none":
        return losses.reshape(p.shape).astype(p.dtype)
    return p.dtype.type(value)
