"""Losses of sequences: labels that are fewer than the frames they belong to, and not aligned with them."""

import numpy as np

from ..arguments import Operand, flag, integer, log_probabilities, reduction
from ..families.sequences import SequenceLoss


def _labels_drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    return rng.integers(1, shape[-1], (*shape[1:-1], shape[0] // 4))


def _counts_drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Of labels: of a single sequence all, since its labels are not padded."""
    most = shape[0] // 4
    return rng.integers(0, most, shape[1:-1], endpoint=True) if len(shape) > 2 else np.array(most)


def _frames_drawn(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    """Enough for any labels: twice as many."""
    return rng.integers((shape[0] + 1) // 2, shape[0], shape[1:-1], endpoint=True)


class CTCLoss(SequenceLoss, function="ctc_loss"):
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
        Whether labels that no alignment gives have loss and gradient zero, and not infinity and NaN.

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

    operands = {
        "log_probs": log_probabilities(),
        "targets": Operand(draw=_labels_drawn),
        "input_lengths": Operand(draw=_frames_drawn),
        "target_lengths": Operand(draw=_counts_drawn),
    }


ctc_loss = CTCLoss.function
