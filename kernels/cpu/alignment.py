"""Connectionist temporal classification: the probability of all alignments of labels with frames.

The symbols of a sequence are its labels with a blank before, between and after them; an alignment visits them
in order. ``alpha[t]`` holds, for each symbol, the logarithm of the probability of the frames up to `t` that
end in it, and ``beta[t]`` that of the frames after `t` (A. Graves et al., ICML 2006). Blanks and labels are
kept apart, in rows: the recursion then runs along contiguous arrays and vectorises.

The recursion is in float64 whatever the arrays' dtype, because it adds the logarithms of hundreds of frames,
whose rounding errors the exponentials of the gradient would multiply. In logarithms nothing underflows.
"""

from functools import cache
from typing import Any

import numpy as np
from numba import njit, prange

from ..bind import bind
from ..math import exp, log, select
from .target import LOOP, SCALAR, prefer_widest_vectors

IMPOSSIBLE = -np.inf  # as the logarithm of a probability

# Bound by `compile_ctc`.
sequence: Any = None
share: Any = None


@njit(**SCALAR)
def either(a, b):
    """log(exp(a) + exp(b))."""
    m = select(a > b, a, b)
    total = m + log(exp(a - m) + exp(b - m))
    # Of twice -inf the difference is NaN; of a NaN the sum is one too.
    return select(m == IMPOSSIBLE, a + b, total)


@njit(**SCALAR)
def any_of(a, b, c):
    """log(exp(a) + exp(b) + exp(c))."""
    m = select(a > b, a, b)
    m = select(m > c, m, c)
    total = m + log(exp(a - m) + exp(b - m) + exp(c - m))
    return select(m == IMPOSSIBLE, a + b + c, total)


@njit(**SCALAR)
def forward(blanks, labels, skips, at_blank, at_labels, new_blanks, new_labels):
    """From one frame to the next. Of `labels` the first stands before them and is impossible."""
    prefer_widest_vectors()
    size = at_labels.size
    before, own, out = labels[:size], labels[1:], new_labels[1:]
    for i in range(size + 1):
        new_blanks[i] = either(blanks[i], labels[i]) + at_blank
    for i in range(size):
        out[i] = any_of(own[i], blanks[i], before[i] + skips[i]) + at_labels[i]


@njit(**SCALAR)
def backward(blanks, labels, skips, new_blanks, new_labels):
    """From one frame to the one before. Of `labels` the last stands behind them and is impossible."""
    prefer_widest_vectors()
    size = new_labels.size
    following, own, skip = labels[1:], blanks[1:], skips[1:]
    for i in range(size + 1):
        new_blanks[i] = either(blanks[i], labels[i])
    for i in range(size):
        new_labels[i] = any_of(labels[i], own[i], following[i] + skip[i])


@njit(**(LOOP | {"forceinline": True}))
def posterior(alpha, beta, loss, out):
    """Store the probability of each symbol; their sum."""
    prefer_widest_vectors()
    total = 0.0
    for i in range(out.size):
        p = exp(alpha[i] + beta[i] + loss)
        out[i] = p
        total += p
    return total


@njit(**SCALAR)
def write(x, expected, scale, g):
    """The gradient by a frame's log-probabilities, as if they came of a softmax."""
    prefer_widest_vectors()
    T = g.dtype.type
    for k in range(g.size):
        g[k] = T((exp(x[k]) - expected[k]) * scale)


@njit(**SCALAR)
def emit(x, labels, out):
    """A frame's log-probabilities of the labels."""
    for i in range(labels.size):
        out[i] = x[labels[i]]


def one_sequence(x, g, n, labels, frames, blank, zero_infinity, scale, alphas, scratch, expected):
    """The loss of sequence `n`, and its gradient.

    `x` and `g` are (T, N, C), `g` without elements where it is not asked for. Scratch memory: `alphas` (T, or
    2 without a gradient, times 2, S + 1), `scratch` (6, S + 1), `expected` (C).
    """
    size = labels.size
    grad = g.size > 0
    if grad:
        g[frames:, n] = 0
    if frames == 0:
        return np.inf if size and not zero_infinity else 0.0
    skips, at_labels = scratch[0], scratch[1, :size]
    # What it costs to leave out the blank before a label: nothing, if it differs from the label before.
    skips[:] = IMPOSSIBLE
    for i in range(1, size):
        if labels[i] != labels[i - 1]:
            skips[i] = 0.0

    alphas[:2] = IMPOSSIBLE
    alphas[0, 0] = x[0, n, blank]
    if size:
        alphas[1, 1] = x[0, n, labels[0]]
    step = 2 if grad else 0
    now = 0
    for t in range(1, frames):
        old = now
        now = now + 2 if grad else 2 - now
        emit(x[t, n], labels, at_labels)
        alphas[now + 1, 0] = IMPOSSIBLE
        forward(
            alphas[old], alphas[old + 1], skips, np.float64(x[t, n, blank]), at_labels,
            alphas[now], alphas[now + 1],
        )  # fmt: skip
    loss = -either(alphas[now, size], alphas[now + 1, size])
    infinite = loss == np.inf
    if infinite and zero_infinity:
        loss = 0.0
    if not grad:
        return loss
    if infinite:
        g[:frames, n] = 0 if zero_infinity else np.nan
        return loss

    blanks, after = scratch[2], scratch[3, :size]
    next_blanks, next_labels = scratch[4], scratch[5]
    blanks[:] = IMPOSSIBLE
    after[:] = IMPOSSIBLE
    blanks[size] = 0.0
    if size:
        after[size - 1] = 0.0
    next_labels[size] = IMPOSSIBLE
    for t in range(frames - 1, -1, -1):
        frame = x[t, n]
        expected[:] = 0
        # The next frame's memory is free until the recursion goes on.
        expected[blank] = posterior(alphas[now], blanks, loss, next_blanks)
        posterior(alphas[now + 1, 1:], after, loss, at_labels)
        for i in range(size):
            expected[labels[i]] += at_labels[i]
        if t:
            emit(frame, labels, at_labels)
            for i in range(size):
                next_labels[i] = after[i] + at_labels[i]
            for i in range(size + 1):
                next_blanks[i] = blanks[i] + frame[blank]
            backward(next_blanks, next_labels, skips, blanks, after)
        write(frame, expected, scale, g[t, n])
        now -= step
    return loss


def share_of_sequences(
    first, last, x, g, labels, starts, frames, read, scales, losses, blank, zero_infinity, width, longest
):  # fmt: skip
    """One worker's sequences."""
    rows = 2 * longest if g.size else 4
    alphas, scratch = np.empty(rows * width, np.float64), np.empty(6 * width, np.float64)
    expected = np.empty(x.shape[2], np.float64)
    for n in range(first, last):
        if read[n]:
            own = labels[starts[n] : starts[n + 1]]
            symbols = own.size + 1
            losses[n] = sequence(
                x, g, n, own, frames[n], blank, zero_infinity, scales[n],
                alphas[: rows * symbols].reshape((rows, symbols)),
                scratch[: 6 * symbols].reshape((6, symbols)), expected,
            )  # fmt: skip
        else:
            losses[n] = 0.0
            if g.size:
                g[:, n] = 0


def ctc(x, g, labels, starts, frames, read, scales, losses, blank, zero_infinity, workers):
    """The losses of all sequences, and their gradients.

    Parameters
    ----------
    x, g : arrays (T, N, C)
        Log-probabilities, and what receives their gradient: contiguous, perhaps the same memory. `g` has no
        elements where it is not asked for.
    labels : array of int64
        Of all sequences, one after the other; all of them classes.
    starts : array of int64 (N + 1)
        Where those of each begin.
    frames : array of int64 (N)
        At most T.
    read : array of bool (N)
        Of the others loss and gradient are zero.
    scales : array of float64 (N)
        Of the gradients.
    losses : array of float64 (N)
        Receives the losses.
    blank : int
    zero_infinity : bool
    workers : int
        Into how many shares the sequences are cut.
    """
    count = losses.size
    width = longest = 1
    for n in range(count):
        width = max(width, starts[n + 1] - starts[n] + 1)
        longest = max(longest, frames[n])
    workers = min(count, workers)
    for worker in prange(workers):
        share(
            worker * count // workers, (worker + 1) * count // workers, x, g, labels, starts, frames, read,
            scales, losses, blank, zero_infinity, width, longest,
        )  # fmt: skip


@cache
def compile_ctc(dtype: np.dtype, parallel: bool) -> Any:
    """`ctc` of arrays of one dtype."""
    plain = njit(nogil=True, cache=True, error_model="numpy")
    one = bind(one_sequence, {}, dtype.name, dtype.name, plain)
    shares = bind(share_of_sequences, {"sequence": one}, dtype.name, dtype.name, plain)
    name = f"{dtype.name}_{'parallel' if parallel else 'serial'}"
    decorate = njit(nogil=True, parallel=parallel, cache=True, error_model="numpy")
    return bind(ctc, {"share": shares}, name, name, decorate)
