"""Losses between scores of classes and class indices or probabilities."""

from ..arguments import class_indices, integer, log_probabilities, non_negative, reduction, softcap, weights
from ..families.scores import PickLoss, ScoreLoss


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
nll_loss = NLLLoss.function
