"""Losses between scores of classes and class indices or probabilities."""

from ..arguments import (
    Interval,
    class_indices,
    integer,
    log_probabilities,
    non_negative,
    real,
    reduction,
    softcap,
    weights,
    within,
)
from ..families.scores import PickLoss, ScoreLoss
from ..kernels import math


class CrossEntropyLoss(ScoreLoss, function="cross_entropy"):
    r"""Softmax of the scores against class indices or class probabilities.

    .. math:: \ell = -\sum_c w_c\, q_c \log \frac{e^{x_c}}{\sum_k e^{x_k}}, \qquad
        q_c = (1 - \epsilon)\, [c = y] + \epsilon / C

    With class probabilities the target stands for :math:`[c = y]`. What is computed is
    :math:`(m - x_c) + \log \sum_k e^{x_k - m}`, with m the largest score, which loses nothing where scores
    are large; the gradient of the true class is formed from the other classes' terms, so that it does not
    cancel.

    With indices the mean divides by the sum of the weights of the rows' classes, under label smoothing too;
    with probabilities by the number of rows. A row is never read where its index is ``ignore_index`` or its
    sample weight is zero. Its index is checked unless it is ``ignore_index``. Where all rows are ignored the
    mean is NaN and the gradient zero. A product with a class weight or a probability of zero is zero, also
    where a score is -inf (PyTorch: NaN). A row of nothing but -inf is NaN.

    Parameters
    ----------
    input : array, shape (C), (N, C) or (N, C, d1, ...)
        Scores. The class axis is used where it is: nothing is transposed.
    target : array
        Class indices of any integer dtype, of the input's shape without the class axis; or floating
        probabilities of the input's shape, which need not sum to 1. The shape decides.
    weight : array, optional, shape (C)
        Of the classes.
    ignore_index : int, default -100
        Rows with this index count nothing. It may be a class, which stays in the softmax. With probabilities
        it must be left negative.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    label_smoothing : float, default 0.0
        In [0, 1].
    softcap : float, optional
        Above 0: scores are ``softcap * tanh(score / softcap)`` before the softmax.
    lse_square_scale : float, default 0.0
        At least 0: times the squared logarithm of the sum of exponentials, it is added to each row's value
        (z-loss).

    Raises
    ------
    IndexError
        If a class index is out of range; nothing is written then.
    TypeError
        If the target has the input's shape and holds integers, or has not and holds none.
    ValueError
        If shapes do not fit, or an option is out of its domain.

    References
    ----------
    PyTorch, ``torch.nn.functional.cross_entropy``. C. Szegedy et al., Rethinking the Inception Architecture
    for Computer Vision, CVPR 2016 (label smoothing). ``softcap`` and ``lse_square_scale`` are Liger-Kernel's:
    Gemma Team, Gemma 2, 2024; B. Zoph et al., ST-MoE, 2022 (z-loss).

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> value, gradient = nl.cross_entropy.value_and_grad(np.zeros((1, 4)), np.array([2]))
    >>> float(value.round(4)), gradient.tolist()
    (1.3863, [[0.25, 0.25, -0.75, 0.25]])
    """

    softcap: object = softcap()
    lse_square_scale: float = non_negative(0.0)  # type: ignore[misc]

    def value(cross_entropy):
        return cross_entropy


class FocalCrossEntropyLoss(ScoreLoss, function="focal_cross_entropy"):
    r"""Cross entropy that counts less where the target class is already probable.

    .. math:: \ell = (1 - p_y)^\gamma \cdot \text{cross\_entropy}(x, y), \qquad
        p_y = \frac{e^{x_y}}{\sum_k e^{x_k}}

    Class weights are the paper's :math:`\alpha`. They and label smoothing enter the cross entropy; the factor
    is of the target class. :math:`1 - p_y` is the sum of the other classes' probabilities, so that it loses
    nothing where the target class is almost certain. The mean divides as in ``cross_entropy``.

    Parameters
    ----------
    input : array, shape (C), (N, C) or (N, C, d1, ...)
        Scores.
    target : array
        Class indices of any integer dtype, of the input's shape without the class axis.
    weight : array, optional, shape (C)
        Of the classes.
    ignore_index : int, default -100
        Rows with this index count nothing.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    label_smoothing : float, default 0.0
        In [0, 1].
    gamma : float, default 2.0
        At least 0; with 0 it is ``cross_entropy``.

    Raises
    ------
    IndexError
        If a class index is out of range; nothing is written then.
    TypeError
        If the target holds class probabilities: the factor is of one class.
    ValueError
        If shapes do not fit, or an option is out of its domain.

    References
    ----------
    T.-Y. Lin et al., Focal Loss for Dense Object Detection, ICCV 2017.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> scores, labels = np.array([[0.0, 0.0], [4.0, 0.0]]), np.array([0, 0])
    >>> nl.focal_cross_entropy(scores, labels, reduction="none").round(6)
    array([1.73287e-01, 6.00000e-06])
    """

    gamma: float = non_negative(2.0)

    def value(rest, cross_entropy, gamma):
        return rest**gamma * cross_entropy


class Poly1CrossEntropyLoss(ScoreLoss, function="poly1_cross_entropy"):
    r"""Cross entropy with another coefficient of its leading term.

    .. math:: \ell = \text{cross\_entropy}(x, y) + \epsilon\, w_y (1 - p_y), \qquad
        p_y = \frac{e^{x_y}}{\sum_k e^{x_k}}

    The series :math:`-\log p_y = (1 - p_y) + (1 - p_y)^2 / 2 + \dots` is cross entropy; here its first
    coefficient is :math:`1 + \epsilon`. The paper has no class weights: they multiply the whole series, as
    they multiply cross entropy, so that a class of weight zero counts nothing. Label smoothing enters the
    cross entropy alone. The mean divides as in ``cross_entropy``.

    Parameters
    ----------
    input : array, shape (C), (N, C) or (N, C, d1, ...)
        Scores.
    target : array
        Class indices of any integer dtype, of the input's shape without the class axis.
    weight : array, optional, shape (C)
        Of the classes.
    ignore_index : int, default -100
        Rows with this index count nothing.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    label_smoothing : float, default 0.0
        In [0, 1].
    epsilon : float, default 1.0
        Added to the leading coefficient; the paper takes -1 and above.

    Raises
    ------
    IndexError
        If a class index is out of range; nothing is written then.
    TypeError
        If the target holds class probabilities: the second term is of one class.
    ValueError
        If shapes do not fit, or an option is out of its domain.

    References
    ----------
    Z. Leng et al., PolyLoss: A Polynomial Expansion Perspective of Classification Loss Functions, ICLR 2022.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> float(nl.poly1_cross_entropy(np.zeros((1, 4)), np.array([2])).round(4))  # log(4) + 3 / 4
    2.1363
    """

    epsilon: float = real(1.0, (0.0, -1.0, 2.5))

    def value(cross_entropy, rest, class_weight, epsilon):
        return cross_entropy + epsilon * class_weight * rest


class GeneralizedCrossEntropyLoss(ScoreLoss, function="generalized_cross_entropy"):
    r"""Between cross entropy and the mean absolute error of the probabilities: wrong labels count for less.

    .. math:: \ell = w_y\, \frac{1 - p_y^q}{q}, \qquad p_y = \frac{e^{x_y}}{\sum_k e^{x_k}}

    With q near 0 it is cross entropy, with 1 it is :math:`1 - p_y`. It is computed from :math:`\log p_y` by
    ``expm1``, without cancellation. The paper truncates it in training; that is left to the caller. Label
    smoothing is of cross entropy, and has no part in it. The mean divides as in ``cross_entropy``.

    Parameters
    ----------
    input : array, shape (C), (N, C) or (N, C, d1, ...)
        Scores.
    target : array
        Class indices of any integer dtype, of the input's shape without the class axis.
    weight : array, optional, shape (C)
        Of the classes.
    ignore_index : int, default -100
        Rows with this index count nothing.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    label_smoothing : float, default 0.0
        In [0, 1]; changes nothing here.
    q : float, default 0.7
        In (0, 1].

    Raises
    ------
    IndexError
        If a class index is out of range; nothing is written then.
    TypeError
        If the target holds class probabilities: the loss is of one class.
    ValueError
        If shapes do not fit, or an option is out of its domain.

    References
    ----------
    Z. Zhang and M. R. Sabuncu, Generalized Cross Entropy Loss for Training Deep Neural Networks with Noisy
    Labels, NeurIPS 2018.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> float(nl.generalized_cross_entropy(np.zeros((1, 4)), np.array([2]), q=0.5))  # 2 * (1 - 1 / 2)
    1.0
    """

    q: float = within(0.7, Interval(0.0, 1.0, open_low=True), (0.25, 1.0))

    def value(log_prob, class_weight, q):
        return -class_weight * math.expm1(q * log_prob) / q


class NLLLoss(PickLoss, function="nll_loss"):
    r"""Negative log-likelihood of class indices, of log-probabilities that are given.

    .. math:: \ell = -w_y\, x_y

    The mean divides by the sum of the weights of the rows' classes. A row is never read where its index is
    ``ignore_index``, or its weight is zero. Its index is checked unless it is ``ignore_index``.

    Parameters
    ----------
    input : array, shape (C), (N, C) or (N, C, d1, ...)
        Logarithms of probabilities.
    target : array
        Class indices of any integer dtype, of the input's shape without the class axis.
    weight : array, optional, shape (C)
        Of the classes.
    ignore_index : int, default -100
        Rows with this index count nothing.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    IndexError
        If a class index is out of range; nothing is written then.
    ValueError
        If shapes do not fit.

    References
    ----------
    PyTorch, ``torch.nn.functional.nll_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.nll_loss(np.log([[0.25, 0.75], [0.5, 0.5]]), np.array([1, 0]), reduction="none").round(4)
    array([0.2877, 0.6931])
    """

    weight: object = weights()
    ignore_index: int = integer(-100)
    reduction: str = reduction()

    operands = {"input": log_probabilities(), "target": class_indices()}

    def value(score, class_weight):
        return -class_weight * score


cross_entropy = CrossEntropyLoss.function
focal_cross_entropy = FocalCrossEntropyLoss.function
poly1_cross_entropy = Poly1CrossEntropyLoss.function
generalized_cross_entropy = GeneralizedCrossEntropyLoss.function
nll_loss = NLLLoss.function
