"""Losses of sequences: labels that are fewer than the frames they belong to, and not aligned with them."""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from . import dispatch
from .arguments import Operand, flag, integer, log_probabilities, reduction
from .classes import INT64
from .kernels.cpu import threads
from .rows import RowLoss, Terms, flat, workers

# Log-probabilities from which two threads beat one.
PARALLEL_FROM = 8192


@cache
def kernel(dtype: np.dtype, parallel: bool) -> Any:
    from .kernels.cpu import ctc  # on the first call, so that importing the library stays quick

    return ctc.compile_ctc(dtype, parallel)


class Problem(NamedTuple):
    """A checked call. A single sequence is a batch of one."""

    log_probs: np.ndarray  # (T, N, C)
    targets: np.ndarray  # (N, S), or all labels joined
    frames: np.ndarray  # of each sequence
    labels: np.ndarray  # how many each sequence has
    rows: tuple[int, ...]  # the terms' shape: (N), or () of a single sequence
    terms: Terms
    dtype: np.dtype  # that the arrays promote to
    arithmetic: np.dtype


def _labels_drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(1, shape[-1], (*shape[1:-1], shape[0] // 4))


def _counts_drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Of labels: of a single sequence all, since its labels are not padded."""
    most = shape[0] // 4
    return rng.integers(0, most, shape[1:-1], endpoint=True) if len(shape) > 2 else np.array(most)


def _frames_drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Enough for any labels: twice as many."""
    return rng.integers((shape[0] + 1) // 2, shape[0], shape[1:-1], endpoint=True)


class CTCLoss(RowLoss, function="ctc_loss"):
    r"""How improbable labels are whose places among the frames are not known.

    .. math:: \ell = -\log \sum_{\pi \in A(y)} \prod_t p_t(\pi_t)

    The sum is over all alignments: a class for each frame, that give the labels :math:`y` when repeated
    classes are merged and then blanks are left out. The mean divides each loss by its number of labels (or 1)
    and then by the number of sequences, or the sum of their weights.

    As in PyTorch the gradient takes ``log_probs`` for the result of a log-softmax, and is that of its input:
    ``exp(log_probs)`` less the probability that an alignment has that class there. Frames beyond an input
    length have none. Labels that their frames cannot hold have an infinite loss and a NaN gradient, both 0
    with ``zero_infinity``. Where a class is impossible (-inf) its gradient is 0 (PyTorch: NaN), and where a
    label is the blank itself the gradient is that of the value (PyTorch: another). A sequence whose weight is
    zero is not read, yet its labels are checked; what pads the labels is never read.

    Parameters
    ----------
    log_probs : array, shape (T, N, C) or (T, C)
        Logarithms of the classes' probabilities in T frames of N sequences.
    targets : array, shape (N, S), or (S) with all sequences' labels joined
        Labels of any integer dtype.
    input_lengths, target_lengths : array or tuple, shape (N), or () or (1) without a batch
        Each sequence's frames and labels, of any integer dtype.
    blank : int, default 0
        The class that stands for no label.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    zero_infinity : bool, default False

    Raises
    ------
    IndexError
        If a label is no class; nothing is written then.
    TypeError
        If labels or lengths are no integers.
    ValueError
        If shapes or lengths do not fit, or the blank is no class.

    References
    ----------
    PyTorch, ``torch.nn.functional.ctc_loss``. A. Graves et al., Connectionist temporal classification, ICML
    2006.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> even = np.full((2, 1, 2), np.log(0.5))  # of four alignments three give the label
    >>> value, gradient = nl.ctc_loss.value_and_grad(even, np.array([[1]]), [2], [1])
    >>> round(float(np.exp(-value)), 4), gradient[:, 0].round(4).tolist()
    (0.75, [[0.1667, -0.1667], [0.1667, -0.1667]])
    """

    blank: int = integer(0)
    reduction: str = reduction()
    zero_infinity: bool = flag(False)

    @classmethod
    def _complete(cls) -> bool:
        return True

    @classmethod
    def _prepare(cls) -> None:
        cls.operands = {
            "log_probs": log_probabilities(),
            "targets": Operand(draw=_labels_drawn),
            "input_lengths": Operand(draw=_frames_drawn),
            "target_lengths": Operand(draw=_counts_drawn),
        }
        cls._required = tuple(cls.operands)

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        return ("log_probs",)

    @classmethod
    def _integers(cls, argument: str, value: Any) -> np.ndarray:
        name = cls.function.__name__
        array = dispatch.as_array(name, argument, value)
        if not array.size and isinstance(value, list | tuple):
            array = array.astype(INT64)  # of no elements NumPy makes floats
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name}: {argument} must hold integers, got {array.dtype.name}")
        return array

    @classmethod
    def _lengths(
        cls, argument: str, call: dict[str, Any], rows: tuple[int, ...], most: int, what: str
    ) -> np.ndarray:
        """A length for each sequence, none above `most`."""
        name = cls.function.__name__
        array = cls._integers(argument, call[argument])
        if array.shape != rows and (rows or array.shape != (1,)):
            wanted = f"{rows}, one for each sequence" if rows else "() or (1,)"
            raise ValueError(f"{name}: {argument} must have shape {wanted}, got {array.shape}")
        lengths = array.reshape(-1)
        wrong = (lengths < 0) | (lengths > most)
        if wrong.any():
            place = int(wrong.argmax())
            at = f"[{place}]" if array.ndim else ""
            raise ValueError(
                f"{name}: {argument}{at} must be in [0, {most}], the {what}, got {lengths[place]}"
            )
        return lengths.astype(INT64)

    @classmethod
    def _check(cls, call: dict[str, Any], options: dict[str, Any], wrt: tuple[str, ...]) -> Problem:
        name = cls.function.__name__
        x = dispatch.floating(name, "log_probs", dispatch.as_array(name, "log_probs", call["log_probs"]))
        if x.ndim not in (2, 3) or not x.shape[-1]:
            raise ValueError(
                f"{name}: log_probs must have shape (T, N, C) or (T, C), C at least 1, got {x.shape}"
            )
        rows, classes = x.shape[1:-1], x.shape[-1]
        if not 0 <= options["blank"] < classes:
            raise ValueError(f"{name}: blank must be a class, in [0, {classes}), got {options['blank']}")
        targets = cls._integers("targets", call["targets"])
        if not rows and targets.ndim == 1:
            targets = targets[np.newaxis]
        batch = math.prod(rows)
        if targets.ndim not in (1, 2) or (targets.ndim == 2 and len(targets) != batch):
            wanted = f"({batch}, S), or one axis with all sequences' labels" if rows else "(S) or (1, S)"
            raise ValueError(f"{name}: targets must have shape {wanted}, got {targets.shape}")
        frames = cls._lengths("input_lengths", call, rows, len(x), "frames of log_probs")
        labels = cls._lengths("target_lengths", call, rows, targets.shape[-1], "labels of targets")
        if targets.ndim == 1 and labels.sum() != targets.size:
            raise ValueError(
                f"{name}: target_lengths must sum to the {targets.size} labels of targets, got {labels.sum()}"
            )
        floats = {"log_probs": x}
        terms = cls._terms(call, options, rows, floats)
        dtype = dispatch.common_dtype([a.dtype for a in floats.values()])
        x = x if rows else x[:, np.newaxis]
        return Problem(x, targets, frames, labels, rows, terms, dtype, dispatch.arithmetic_dtype(dtype))

    @classmethod
    def _compute(cls, p: Problem, options: dict[str, Any], outputs: dict[str, np.ndarray]) -> Any:
        longest, batch, classes = p.log_probs.shape
        arrays = [p.log_probs]
        for gradient in outputs.values():
            arrays.append(gradient if p.rows else gradient[:, np.newaxis])
        joined = p.targets.ndim == 1
        starts = np.cumsum(p.labels) - p.labels if joined else np.arange(batch) * p.targets.shape[1]
        targets = p.targets
        if targets.dtype.kind == "u" and targets.dtype.itemsize == 8:
            targets = np.minimum(targets, np.uint64(2**63 - 1))  # no class has that index
        how = options["reduction"]
        losses = np.empty(batch)
        arguments = (
            np.array([dispatch.address_of(a) for a in arrays], np.int64),
            np.array([dispatch.code_of(a.dtype) for a in arrays], np.int64),
            np.array([a.strides for a in arrays], np.int64),
            (longest, batch, classes),
            flat(targets, targets.shape, INT64),
            starts,
            p.labels,
            p.frames,
            flat(p.terms.sample_weight, (batch,), p.arithmetic),
            flat(p.terms.upstream, (batch,), p.arithmetic),
            losses,
            (options["blank"], options["zero_infinity"], how == "mean", p.terms.factor, p.terms.divisor),
            workers(),
        )
        if batch == 1 or p.log_probs.size < PARALLEL_FROM:
            value, sequence, label = kernel(p.arithmetic, False)(*arguments)
        else:
            value, sequence, label = threads.run(
                lambda: kernel(p.arithmetic, False), lambda: kernel(p.arithmetic, True), arguments
            )
        if sequence >= 0:
            cls._refuse_label(p, sequence, label, starts[sequence] + label)
        if how == "none":
            return losses.reshape(p.rows).astype(p.dtype)
        return p.dtype.type(value)

    @classmethod
    def _refuse_label(cls, p: Problem, sequence: int, label: int, index: int) -> None:
        at = f"{sequence}, {label}" if p.targets.ndim == 2 else f"{index}"
        if not p.rows:
            at = f"{label}"
        where = f" (label {label} of sequence {sequence})" if p.targets.ndim == 1 else ""
        raise IndexError(
            f"{cls.function.__name__}: targets[{at}] is {p.targets.reshape(-1)[index]}, but log_probs has "
            f"{p.log_probs.shape[-1]} classes{where}"
        )


ctc_loss = CTCLoss.function
