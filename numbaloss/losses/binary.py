"""Losses of probabilities, of scores for two classes, and of distributions."""

from ..arguments import (
    flag,
    log_probabilities,
    positive_weights,
    probabilities,
    real,
    reduction,
    signs,
    soft_labels,
    weights,
)
from ..families.elementwise import ElementwiseLoss
from ..kernels import math


class BCELoss(ElementwiseLoss, function="binary_cross_entropy"):
    r"""Binary cross entropy of probabilities.

    .. math:: \ell = -\left(y \log x + (1 - y) \log(1 - x)\right)

    The logarithms are clamped at -100, and the denominator of the input's gradient at 1e-12; the gradient by
    the target is not clamped. All as in PyTorch.
    Prefer ``binary_cross_entropy_with_logits`` where the scores are at hand: it loses no digits.

    Parameters
    ----------
    input, target : array
        Of the same shape, all elements in [0, 1].
    weight : array, optional
        Multiplies each term; broadcasts to the input's shape. The mean still divides by the number of terms.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or an element of input or target is outside [0, 1] or NaN.

    References
    ----------
    PyTorch, ``torch.nn.functional.binary_cross_entropy``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> round(float(nl.binary_cross_entropy(np.array([0.5, 0.5]), np.array([0.0, 1.0]))), 6)
    0.693147
    """

    weight: object = weights()
    reduction: str = reduction()
    domains = {"input": probabilities(model=True), "target": probabilities()}

    def value(input, target):
        log_p = math.maximum(math.log(input), -100)
        log_q = math.maximum(math.log1p(-input), -100)
        return -(target * log_p + (1 - target) * log_q)

    # Stated, because PyTorch bounds the denominator and not the logarithms: at 0 and 1 it is finite.
    def slope_input(input, target):
        return (input - target) / math.maximum((1 - input) * input, 1e-12)

    def slope_target(input, target):
        return math.log1p(-input) - math.log(input)

    def fisher_input(input, target):
        return 1 / math.maximum((1 - input) * input, 1e-12)


class BCEWithLogitsLoss(ElementwiseLoss, function="binary_cross_entropy_with_logits"):
    r"""Binary cross entropy of logits.

    .. math:: \ell = -\left(p\, y \log \sigma(x) + (1 - y) \log(1 - \sigma(x))\right)

    computed from ``softplus``, without overflow or cancellation.

    Parameters
    ----------
    input, target : array
        Of the same shape: logits, and targets usually in [0, 1].
    weight : array, optional
        Multiplies each term; broadcasts to the input's shape. The mean still divides by the number of terms.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    pos_weight : array, optional
        The factor :math:`p` of positive examples; broadcasts to the input's shape, usually one a class.

    Raises
    ------
    ValueError
        If shapes do not fit.

    References
    ----------
    PyTorch, ``torch.nn.functional.binary_cross_entropy_with_logits``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> round(float(nl.binary_cross_entropy_with_logits(np.zeros(2), np.array([0.0, 1.0]))), 6)
    0.693147
    """

    weight: object = weights()
    reduction: str = reduction()
    pos_weight: object = weights()
    link = "logit"
    domains = {"target": soft_labels(), "pos_weight": positive_weights()}

    def value(input, target, pos_weight):
        return pos_weight * target * math.softplus(-input) + (1 - target) * math.softplus(input)

    # Stated, because the difference of the two logarithms cancels: without pos_weight it is -x.
    def slope_target(input, target, pos_weight):
        positive, negative = math.maximum(input, 0), math.maximum(-input, 0)
        return (pos_weight - 1) * math.softplus(-positive - negative) + pos_weight * negative - positive

    # Of softplus it is tanh(x / 2) / (2 x): Jaakkola and Jordan, Statistics and Computing 10, 2000.
    def majorizer_input(input, target, pos_weight):
        x = math.maximum(abs(input), 1e-30)
        return (pos_weight * target + (1 - target)) * math.tanh(0.5 * x) / (2 * x)

    def fisher_input(input, target, pos_weight):
        p, q = math.sigmoid(input), math.sigmoid(-input)
        return (pos_weight * p + q) * p * q


class KLDivLoss(ElementwiseLoss, function="kl_div"):
    r"""Kullback-Leibler divergence, from log-probabilities.

    .. math:: \ell = y (\log y - x), \qquad \ell = e^y (y - x) \quad\text{(log\_target)}

    A target probability of zero gives zero, whatever the input (PyTorch: NaN for an input of -inf, and for a
    log-target of -inf).

    Parameters
    ----------
    input, target : array
        Of the same shape: log-probabilities, and probabilities (or their logarithms).
    reduction : {'none', 'mean', 'sum', 'batchmean'}, default 'mean'
        ``'batchmean'`` divides by the first axis' length, and not where there is no axis: the divergence in
        its mathematical sense.
    log_target : bool, default False
        Whether the target is given as logarithms.

    Raises
    ------
    ValueError
        If the shapes differ.

    References
    ----------
    PyTorch, ``torch.nn.functional.kl_div``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.kl_div(np.log([[0.5, 0.5]]), np.array([[1.0, 0.0]]), reduction="batchmean")
    np.float64(0.6931471805599453)
    """

    reduction: str = reduction("batchmean")
    log_target: bool = flag(False)
    domains = {"input": log_probabilities(), "target": soft_labels()}

    def value(input, target, log_target):
        if log_target:
            p = math.exp(target)
            return math.where(p == 0, 0, p * (target - input))
        return math.where(target == 0, 0, target * (math.log(target) - input))

    # Stated, because the derived one divides by the target, and its inverse may be infinite.
    def slope_target(input, target, log_target):
        if log_target:
            p = math.exp(target)
            return math.where(p == 0, 0, p * (target - input + 1))
        return math.where(target == 0, 0, math.log(target) - input + 1)


class SoftMarginLoss(ElementwiseLoss, function="soft_margin_loss"):
    r"""Logistic loss of scores against labels -1 and 1.

    .. math:: \ell = \log(1 + e^{-y x})

    Computed without overflow (PyTorch: infinite from about 88 in float32).

    Parameters
    ----------
    input, target : array
        Of the same shape: scores, and labels -1 or 1.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ.

    References
    ----------
    PyTorch, ``torch.nn.functional.soft_margin_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> round(float(nl.soft_margin_loss(np.zeros(2), np.array([-1.0, 1.0]))), 6)
    0.693147
    """

    reduction: str = reduction()
    link = "logit"
    domains = {"target": signs()}

    def value(input, target):
        return math.softplus(-target * input)

    def majorizer_input(input, target):
        x = math.maximum(abs(target * input), 1e-30)
        return target * target * math.tanh(0.5 * x) / (2 * x)

    def fisher_input(input, target):
        return math.sigmoid(input) * math.sigmoid(-input)


class HingeEmbeddingLoss(ElementwiseLoss, function="hinge_embedding_loss"):
    r"""The input itself for similar pairs, its hinge under a margin for dissimilar ones.

    .. math:: \ell = \begin{cases} x & y = 1 \\ \max(0, \text{margin} - x) & y = -1 \end{cases}

    A target that is neither 1 nor -1 adds both branches, and at exactly the clamp the gradient passes, as in
    PyTorch.

    Parameters
    ----------
    input, target : array
        Of the same shape: distances, and labels -1 or 1.
    margin : float, default 1.0
        The distance beyond which those labelled -1 cost nothing.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ.

    References
    ----------
    PyTorch, ``torch.nn.functional.hinge_embedding_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.hinge_embedding_loss(np.array([0.3, 0.3]), np.array([1.0, -1.0]), reduction="none")
    array([0.3, 0.7])
    """

    margin: float = real(1.0)
    reduction: str = reduction()
    domains = {"target": signs()}

    def value(input, target, margin):
        apart = math.where(target != 1, math.maximum(margin - input, 0), 0)
        return apart + math.where(target != -1, input, 0)


binary_cross_entropy = BCELoss.function
binary_cross_entropy_with_logits = BCEWithLogitsLoss.function
kl_div = KLDivLoss.function
soft_margin_loss = SoftMarginLoss.function
hinge_embedding_loss = HingeEmbeddingLoss.function
