"""Sequences of labels, inside the caller's own compiled code."""

from functools import cache
from typing import Any

import numpy as np
from numba import types
from numba.core.errors import TypingError
from numba.extending import overload

from . import ctc
from .inside import apart
from .inside_arrays import (
    by_dtype,
    divisor_of,
    entry,
    flat,
    gradient,
    is_float,
    is_label,
    may_write,
    same_shape,
)


def lengths_fit(lengths, batch, most):
    """Whether there is a length for each sequence, none above `most`."""


@overload(lengths_fit)
def lengths_fit_sequences(lengths, batch, most):
    if not is_label(lengths) or getattr(lengths, "ndim", 0) > 1:
        raise TypingError(f"lengths must be integers, one for each sequence, got {lengths}")

    def impl(lengths, batch, most):
        own = flat(lengths, np.int64)
        return own.size == batch and np.all((own >= 0) & (own <= most))

    return impl


def sequences_of(log_probs):
    """Frames, sequences and classes of log-probabilities."""


@overload(sequences_of)
def sequences_of_log_probs(log_probs):
    if not is_float(log_probs) or log_probs.ndim not in (2, 3):
        raise TypingError(
            f"log_probs must be an array of float32 or float64, (T, N, C) or (T, C), got {log_probs}"
        )
    if log_probs.ndim == 3:
        return lambda log_probs: log_probs.shape
    return lambda log_probs: (log_probs.shape[0], 1, log_probs.shape[1])


def width_of(targets, log_probs):
    """How many labels a row of targets has; 0 of joined ones; -1 where there are too few or many rows."""


@overload(width_of)
def width_of_targets(targets, log_probs):
    if not isinstance(targets, types.Array) or not is_label(targets) or targets.ndim not in (1, 2):
        raise TypingError(f"targets must be an array of integers with one or two axes, got {targets}")
    if targets.ndim == 2:
        return lambda targets, log_probs: (
            targets.shape[1] if targets.shape[0] == sequences_of(log_probs)[1] else -1
        )
    return lambda targets, log_probs: 0


ctc_of = by_dtype(ctc.compile_inside)


def sequences(
    log_probs,
    targets,
    input_lengths,
    target_lengths,
    blank=0,
    reduction="mean",
    zero_infinity=False,
    out=None,
):
    divisor = divisor_of(reduction)
    longest, batch, classes = sequences_of(log_probs)
    if classes == 0:
        raise ValueError("{loss}: log_probs must have shape (T, N, C) or (T, C), C at least 1")
    if not 0 <= blank < classes:
        raise ValueError("{loss}: blank must be a class")
    width = width_of(targets, log_probs)
    if width < 0:
        raise ValueError("{loss}: targets must have shape (N, S), or one axis with all sequences' labels")
    if not lengths_fit(input_lengths, batch, longest):
        raise ValueError("{loss}: input_lengths must be one for each sequence, at most the frames")
    if not lengths_fit(target_lengths, batch, targets.shape[targets.ndim - 1]):
        raise ValueError("{loss}: target_lengths must be one for each sequence, at most the labels")
    if not same_shape(out, log_probs):
        raise ValueError("{loss}: out must have log_probs's shape")
    T = log_probs.dtype.type
    x, g, labels = flat(log_probs, T), gradient(out, log_probs), flat(targets, np.int64)
    frame_counts, label_counts = flat(input_lengths, np.int64), flat(target_lengths, np.int64)
    if targets.ndim == 1 and log_probs.ndim == 3 and label_counts.sum() != labels.size:
        raise ValueError("{loss}: target_lengths must sum to the number of labels")
    if not (may_write((g,), (x,)) and apart(g, labels) and apart(g, frame_counts) and apart(g, label_counts)):
        raise ValueError("{loss}: out overlaps an argument; it may be log_probs itself")
    settings = np.int64(blank), bool(zero_infinity), reduction == "mean", 1.0, divisor
    value, status = ctc_of(
        x, (labels, label_counts, frame_counts, g, width, (longest, batch, classes), settings)
    )
    if status >= 0:
        raise IndexError("{loss}: targets holds a class index that is out of range")
    if status != ctc.OK:
        raise ValueError("{loss}: arrays do not fit together")
    return T(value)


@cache
def compile_sequences(name: str) -> Any:
    """Return a function of sequences of labels."""
    return entry(sequences, name, name)
