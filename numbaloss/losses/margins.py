"""Losses of one score for two classes: of margins, and focal."""

from ..arguments import between, non_negative, probabilities, reduction, signs
from ..families.elementwise import ElementwiseLoss
from ..kernels import math


class SquaredHingeLoss(ElementwiseLoss, function="squared_hinge_loss"):
    r"""Square of how far scores miss a margin of 1, against labels -1 and 1.

    .. math:: \ell = \max(0, 1 - y x)^2

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
    scikit-learn, ``LinearSVC(loss='squared_hinge')``. Keras, ``keras.losses.SquaredHinge``, which takes
    labels 0 and 1 too.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.squared_hinge_loss(np.array([0.5, 0.5, 2.0]), np.array([1.0, -1.0, 1.0]), reduction="none")
    array([0.25, 2.25, 0.  ])
    """

    reduction: str = reduction()
    domains = {"target": signs()}

    def value(input, target):
        miss = math.maximum(1 - target * input, 0)
        return miss * miss


class ExponentialLoss(ElementwiseLoss, function="exponential_loss"):
    r"""Exponential loss of scores against labels -1 and 1, AdaBoost's.

    .. math:: \ell = e^{-y x}

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
    scikit-learn, ``GradientBoostingClassifier(loss='exponential')``, with labels 0 and 1. J. Friedman, T.
    Hastie and R. Tibshirani, Additive logistic regression, Ann. Statist. 28 (2000).

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.exponential_loss.grad(np.zeros(2), np.array([1.0, -1.0]), reduction="none")
    array([-1.,  1.])
    """

    reduction: str = reduction()
    domains = {"target": signs()}

    def value(input, target):
        return math.exp(-target * input)

    # Stated, because of an exponential that overflows the second derivative is infinity times 0.
    def slope_input(input, target):
        return -target * math.exp(-target * input)


class SigmoidFocalLoss(ElementwiseLoss, function="sigmoid_focal_loss"):
    r"""Binary cross entropy of logits, less where the label is likely already.

    .. math:: \ell = \alpha_t (1 - p_t)^\gamma\, \text{bce}(x, y), \quad p_t = y \sigma(x) +
        (1 - y)(1 - \sigma(x)), \quad \alpha_t = \alpha y + (1 - \alpha)(1 - y)

    The power is that of a logarithm: no digits are lost of a probability close to 1. With ``gamma=0`` and
    ``alpha=-1`` this is ``binary_cross_entropy_with_logits``. The default reduction is the mean, as
    everywhere here (torchvision: ``'none'``).

    Parameters
    ----------
    input, target : array
        Of the same shape: logits, and targets in [0, 1], usually 0 or 1.
    alpha : float, default 0.25
        The weight of positive examples, in [0, 1]; that of the others is the rest. Below 0, down to -1, all
        have weight 1.
    gamma : float, default 2.0
        The power, at least 0.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, a target is outside [0, 1] or NaN, ``alpha`` is not in [-1, 1], or ``gamma`` is
        negative.

    References
    ----------
    torchvision, ``torchvision.ops.sigmoid_focal_loss``. T.-Y. Lin et al., Focal loss for dense object
    detection, ICCV 2017.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.sigmoid_focal_loss(np.array([0.0, 2.0]), np.ones(2), reduction="none").round(4)
    array([0.0433, 0.0005])
    """

    alpha: float = between(0.25, -1.0, 1.0)
    gamma: float = non_negative(2.0)
    reduction: str = reduction()
    link = "logit"
    domains = {"target": probabilities()}

    def value(input, target, alpha, gamma):
        bce = target * math.softplus(-input) + (1 - target) * math.softplus(input)
        # 1 - p_t is (wrong + right * e**-size) / (1 + e**-size).
        above = input > 0
        size = math.where(above, input, -input)  # abs has no slope at 0
        wrong, right = math.where(above, 1 - target, target), math.where(above, target, 1 - target)
        certain = wrong == 0
        top = math.log(math.where(certain, right, wrong + right * math.exp(-size)))
        rest = top - math.where(certain, size, 0) - math.softplus(-size)
        balance = math.where(alpha < 0, 1, alpha * target + (1 - alpha) * (1 - target))
        return balance * bce * math.exp(gamma * rest)

    # Stated, because what stands for certain labels above has no slope by them, and bce's is -x.
    def slope_target(input, target, alpha, gamma):
        bce = target * math.softplus(-input) + (1 - target) * math.softplus(input)
        above, size = input > 0, abs(input)
        wrong, right = math.where(above, 1 - target, target), math.where(above, target, 1 - target)
        certain = wrong == 0
        top = math.log(math.where(certain, right, wrong + right * math.exp(-size)))
        rest = top - math.where(certain, size, 0) - math.softplus(-size)
        focus = math.exp(gamma * rest)
        balance = math.where(alpha < 0, 1, alpha * target + (1 - alpha) * (1 - target))
        slope = math.where(alpha < 0, 0, 2 * alpha - 1) * bce - balance * input
        # bce / (1 - p_t), which is 1 where both are too small.
        ratio = math.where(certain & (size > 40), 1, bce * math.exp(-rest))
        return focus * (slope + balance * gamma * ratio * -math.tanh(0.5 * input))


squared_hinge_loss = SquaredHingeLoss.function
exponential_loss = ExponentialLoss.function
sigmoid_focal_loss = SigmoidFocalLoss.function
