"""Losses of sequences whose alignment with the frames is not known."""

import math
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from . import dispatch
from .arguments import Operand, flag, integer, log_probabilities, reduction
from .kernels.cpu import threads
from .rows import RowLoss, Terms, workers

SAMPLE_LABELS = 2

# Symbols times frames from which two threads beat one.
PARALLEL_FROM = 2048


@cache
def ctc_kernel(dtype: np.dtype, parallel: bool) -> Any:
    from .kernels.cpu import alignment  # on the first call, so that importing the library stays quick

    return alignment.compile_ctc(dtype, parallel)


class Problem(NamedTuple):
    """A checked call, as if it had a batch: without one, it is of one sequence."""

    log_probs: np.ndarray  # (T, N, C)
    labels: np.ndarray  # of all sequences, one after the other, in int64
    frames: np.ndarray  # int64 (N)
    lengths: np.ndarray  # int64 (N): of the labels
    terms: Terms
    shape: tuple[int, ...]  # of the terms
    dtype: np.dtype
    arithmetic: np.dtype


class CTCLoss(RowLoss, function="ctc_loss"):
    r"""Connectionist temporal classification: labels in order, wherever they stand among the frames.

    .. math:: \ell = -\log \sum_{\pi \in \mathcal{B}^{-1}(y)} \prod_t p_t(\pi_t)

    The sum is over all alignments: sequences of labels and blanks, one for each frame, that give the labels
    when repetitions are merged and blanks taken away. ``'mean'`` divides each loss by the number of its
    labels, at least 1, and then by the batch.

    As in PyTorch the gradient is that by scores whose log-softmax ``log_probs`` are: ``exp(log_probs)`` minus
    the probability that an alignment has the class there. That of frames beyond an input length is zero.
    Where no alignment exists, because there are fewer frames than the labels take, the loss is infinite and
    its gradient NaN, or both zero with ``zero_infinity``. By a class of probability zero the gradient is zero
    (PyTorch: NaN). A sequence whose sample weight is zero is not read.

    The recursion is in float64 for all dtypes.

    Parameters
    ----------
    log_probs : array, shape (T, N, C) or (T, C)
        Logarithms of the classes' probabilities: T frames, N sequences.
    targets : array of integers, shape (N, S), (S), or the sum of ``target_lengths``
        Labels, padded to S or joined end to end; what is beyond a target length is not read.
    input_lengths, target_lengths : arrays or tuples of integers, shape (N), or () or (1) without a batch
        Frames, at most T, and labels, at most S.
    blank : int, default 0
        The class that stands for no label.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    zero_infinity : bool, default False

    Raises
    ------
    IndexError
        If a label is out of range; nothing is written then.
    TypeError
        If labels or lengths are no integers.
    ValueError
        If shapes or lengths do not fit, or `blank` is no class.

    References
    ----------
    PyTorch, ``torch.nn.functional.ctc_loss``. A. Graves et al., Connectionist Temporal Classification, ICML
    2006.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> log_probs = np.log(np.full((2, 1, 3), 1 / 3))
    >>> value, gradient = nl.ctc_loss.value_and_grad(log_probs, np.array([[1]]), (2,), (1,))
    >>> float(value.round(4)), gradient[0, 0].round(3).tolist()  # three of the nine alignments: 11, 1-, -1
    (1.0986, [0.0, -0.333, 0.333])
    """

    blank: int = integer(0)
    reduction: str = reduction()
    zero_infinity: bool = flag(False)

    @classmethod
    def _complete(cls) -> bool:
        return True

    @classmethod
    def _prepare(cls) -> None:
        # A sample of shape (T, N, C), or (T, C), has a label or two a sequence, and all of its frames.
        cls.operands = {
            "log_probs": log_probabilities(),
            "targets": Operand(
                draw=lambda rng, shape: rng.integers(1, shape[-1], (*shape[1:-1], SAMPLE_LABELS))
            ),
            "input_lengths": Operand(draw=lambda rng, shape: np.full(shape[1:-1], shape[0])),
            "target_lengths": Operand(draw=lambda rng, shape: np.full(shape[1:-1], SAMPLE_LABELS)),
        }
        cls._required = tuple(cls.operands)

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        return ("log_probs",)

    # ---- the call ----------------------------------------------------------------------------------
    @classmethod
    def _check(cls, call: dict[str, Any], options: dict[str, Any], wrt: tuple[str, ...]) -> Problem:
        name = cls.function.__name__
        x = dispatch.floating(name, "log_probs", dispatch.as_array(name, "log_probs", call["log_probs"]))
        if x.ndim not in (2, 3) or not x.shape[-1]:
            raise ValueError(
                f"{name}: log_probs must have shape (T, N, C) or (T, C), C at least 1, got {x.shape}"
            )
        rows, blank = x.shape[1:-1], options["blank"]
        if not 0 <= blank < x.shape[-1]:
            raise ValueError(f"{name}: blank must be a class, in [0, {x.shape[-1]}), got {blank}")
        batched = x.reshape(len(x), math.prod(rows), x.shape[-1])
        frames = cls._lengths("input_lengths", call, rows, len(x), "frames of log_probs")
        labels, lengths = cls._labels(call, rows, x.shape[-1])
        floats = {"log_probs": x}
        terms = cls._terms(call, options, rows, floats)
        dtype = dispatch.common_dtype([a.dtype for a in floats.values()])
        return Problem(batched, labels, frames, lengths, terms, rows, dtype, dispatch.arithmetic_dtype(dtype))

    @classmethod
    def _integers(cls, argument: str, given: Any) -> np.ndarray:
        name = cls.function.__name__
        array = dispatch.as_array(name, argument, given)
        if array.dtype.kind not in "iu" and not (array.size == 0 and isinstance(given, tuple | list)):
            raise TypeError(f"{name}: {argument} must hold integers, got {array.dtype.name}")
        return array

    @classmethod
    def _lengths(
        cls, argument: str, call: dict[str, Any], rows: tuple[int, ...], most: int, what: str
    ) -> np.ndarray:
        """One length for each sequence, in [0, most]."""
        name = cls.function.__name__
        array = cls._integers(argument, call[argument])
        if array.shape != rows and (rows or array.shape != (1,)):
            wanted = f"{rows}, one for each sequence" if rows else "() or (1,)"
            raise ValueError(f"{name}: {argument} must have shape {wanted}, got {array.shape}")
        array = array.reshape(math.prod(rows))
        wrong = (array < 0) | (array > most)
        if wrong.any():
            at = int(wrong.argmax())
            place = f"[{at}]" if rows else ""
            raise ValueError(f"{name}: {argument}{place} must be in [0, {most}], the {what}, got {array[at]}")
        return array.astype(np.int64)

    @classmethod
    def _labels(
        cls, call: dict[str, Any], rows: tuple[int, ...], classes: int
    ) -> tuple[np.ndarray, np.ndarray]:
        """The labels of all sequences, one after the other, and their numbers."""
        name = cls.function.__name__
        targets = cls._integers("targets", call["targets"])
        count = math.prod(rows)
        padded = targets.ndim == 2 or (not rows and targets.ndim == 1)
        if targets.ndim not in (1, 2) or (targets.ndim == 2 and len(targets) != count):
            wanted = f"({count}, S)" + (", or one axis with all labels" if rows else " or (S)")
            raise ValueError(f"{name}: targets must have shape {wanted}, got {targets.shape}")
        most = targets.shape[-1]
        lengths = cls._lengths("target_lengths", call, rows, most, "labels of targets")
        if padded:
            own = np.arange(most) < lengths[:, None]
            labels = targets.reshape(count, most)[own]
        else:
            labels = targets
            if lengths.sum() != most:
                raise ValueError(
                    f"{name}: target_lengths must sum to the {most} labels of targets, got {lengths.sum()}"
                )
        wrong = (labels < 0) | (labels >= classes)
        if wrong.any():
            first = int(wrong.argmax())
            starts = np.cumsum(lengths) - lengths
            n = int(np.searchsorted(starts + lengths, first, "right"))  # its sequence
            at = f"{n}, {first - starts[n]}" if targets.ndim == 2 else first
            raise IndexError(f"{name}: targets[{at}] is {labels[first]}, but log_probs has {classes} classes")
        return np.ascontiguousarray(labels, np.int64), lengths

    @classmethod
    def _compute(cls, p: Problem, options: dict[str, Any], outputs: dict[str, np.ndarray]) -> Any:
        count, mean = p.lengths.size, options["reduction"] == "mean"

        def of_rows(array: np.ndarray | None) -> Any:
            if array is None:
                return 1.0
            return np.broadcast_to(array, p.shape).reshape(count).astype(np.float64)

        weights = of_rows(p.terms.sample_weight) * np.ones(count)
        shares = weights / np.maximum(p.lengths, 1) if mean else weights
        divisor = p.terms.divisor
        if divisor != divisor:
            divisor = float(weights.sum()) if count else math.nan
        with np.errstate(all="ignore"):
            scales = shares * of_rows(p.terms.upstream) * (p.terms.factor / np.float64(divisor))
        gradient = outputs.get("log_probs")
        x = dispatch._writeable(np.ascontiguousarray(p.log_probs, p.arithmetic))
        into = np.empty((0, 0, 0), p.arithmetic)
        if gradient is not None:
            direct = gradient.dtype == p.arithmetic and gradient.flags.c_contiguous
            into = gradient.reshape(x.shape) if direct else np.empty(x.shape, p.arithmetic)
        losses = np.empty(count)
        starts = np.concatenate([np.zeros(1, np.int64), np.cumsum(p.lengths)])
        blank, zero_infinity = options["blank"], options["zero_infinity"]
        arguments = (
            x, into, p.labels, starts, p.frames, weights != 0, scales, losses, blank, zero_infinity, workers()
        )  # fmt: skip
        if count < 2 or np.sum(p.frames * (2 * p.lengths + 1)) < PARALLEL_FROM:
            ctc_kernel(p.arithmetic, False)(*arguments)
        else:
            threads.run(
                lambda: ctc_kernel(p.arithmetic, False), lambda: ctc_kernel(p.arithmetic, True), arguments
            )
        if gradient is not None and not np.may_share_memory(into, gradient):
            gradient[...] = into.reshape(gradient.shape)
        with np.errstate(all="ignore"):
            losses = np.where(weights != 0, losses * shares, 0.0)
            if options["reduction"] == "none":
                return losses.reshape(p.shape).astype(p.dtype)
            return p.dtype.type(losses.sum() / np.float64(divisor))


ctc_loss = CTCLoss.function
