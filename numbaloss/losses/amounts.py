"""Losses of amounts and counts: log-likelihoods of a mean's logarithm, and errors relative to the target.

Poisson's is ``poisson_nll_loss``, which takes the logarithm of the mean too.
"""

from ..arguments import (
    Interval,
    amounts,
    away_from_zero,
    non_negative_amounts,
    positive,
    reduction,
    within,
)
from ..families.elementwise import ElementwiseLoss
from ..kernels import math


class GammaNLLLoss(ElementwiseLoss, function="gamma_nll_loss"):
    r"""Negative log-likelihood of amounts under gamma distributions, from the logarithm of the mean.

    .. math:: \ell = x + y e^{-x}

    up to a positive factor, the shape of the distribution, and what depends on the target alone: half the
    gamma deviance is :math:`\ell - 1 - \log y`, and the gradients are the same.

    Parameters
    ----------
    input, target : array
        Of the same shape: logarithms of means, and amounts, at least 0.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or a target is negative.

    References
    ----------
    scikit-learn, ``HistGradientBoostingRegressor(loss='gamma')`` (its ``HalfGammaLoss``). XGBoost,
    ``reg:gamma``. LightGBM, ``objective='gamma'``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.gamma_nll_loss.value_and_grad(np.zeros(2), np.array([1.0, 3.0]), reduction="none")
    (array([1., 3.]), array([ 0., -2.]))
    """

    reduction: str = reduction()
    link = "log"
    domains = {"target": non_negative_amounts()}

    def value(input, target):
        return input + math.where(target == 0, 0, target * math.exp(-input))

    # Stated, because of an exponential that overflows the second derivative is infinity times 0.
    def slope_input(input, target):
        return 1 - math.where(target == 0, 0, target * math.exp(-input))

    # Stated, because a target of 0 hides the exponential from the value, but has a slope.
    def slope_target(input, target):
        return math.exp(-input)


class TweedieNLLLoss(ElementwiseLoss, function="tweedie_nll_loss"):
    r"""Negative log-likelihood of amounts, some of them 0, under compound Poisson-gamma distributions.

    .. math:: \ell = \frac{e^{(2 - p) x}}{2 - p} - y \frac{e^{(1 - p) x}}{1 - p}

    from the logarithm of the mean, up to a positive factor, the inverse of the dispersion, and what depends
    on the target alone: half the Tweedie deviance has the same gradients. At 1 and 2, which are excluded,
    the gradients would be those of ``poisson_nll_loss`` and ``gamma_nll_loss``.

    Parameters
    ----------
    input, target : array
        Of the same shape: logarithms of means, and amounts, at least 0.
    power : float, default 1.5
        The variance is proportional to this power of the mean. Above 1 and below 2.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, a target is negative, or ``power`` is not in (1, 2).

    References
    ----------
    XGBoost, ``reg:tweedie`` (``tweedie_variance_power``). LightGBM, ``objective='tweedie'``. scikit-learn,
    ``TweedieRegressor(link='log')`` (its ``HalfTweedieLoss``).

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.tweedie_nll_loss.value_and_grad(np.zeros(2), np.array([0.0, 3.0]), reduction="none")
    (array([2., 8.]), array([ 1., -2.]))
    """

    power: float = within(1.5, Interval(1.0, 2.0, open_low=True, open_high=True), (1.1, 1.9))
    reduction: str = reduction()
    link = "log"
    domains = {"target": non_negative_amounts()}

    def value(input, target, power):
        p, q = 2 - power, 1 - power
        return math.exp(p * input) / p - math.where(target == 0, 0, target * math.exp(q * input) / q)

    # Stated, because of an exponential that overflows the second derivative is infinity times 0.
    def slope_input(input, target, power):
        p, q = 2 - power, 1 - power
        return math.exp(p * input) - math.where(target == 0, 0, target * math.exp(q * input))

    # Stated, because a target of 0 hides the exponential from the value, but has a slope.
    def slope_target(input, target, power):
        q = 1 - power
        return -math.exp(q * input) / q


class MAPELoss(ElementwiseLoss, function="mape_loss"):
    r"""Absolute difference relative to the target; its mean is the mean absolute percentage error.

    .. math:: \ell = \frac{|x - y|}{\max(|y|, \epsilon)}

    A fraction as in scikit-learn, not times 100 as in Keras. LightGBM's objective is that with ``eps=1``. The
    gradient at a tie is 0.

    Parameters
    ----------
    input, target : array
        Of the same shape.
    eps : float, default 2.220446049250313e-16
        The smallest size of a target that is divided by. Above 0.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or ``eps`` is not positive.

    References
    ----------
    scikit-learn, ``sklearn.metrics.mean_absolute_percentage_error``. Keras,
    ``keras.losses.MeanAbsolutePercentageError``. LightGBM, ``objective='mape'``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.mape_loss(np.array([3.0, 3.0]), np.array([4.0, -1.0]), reduction="none")
    array([0.25, 4.  ])
    """

    eps: float = positive(2.220446049250313e-16)
    reduction: str = reduction()
    domains = {"target": away_from_zero()}

    def value(input, target, eps):
        return abs(input - target) / math.maximum(abs(target), eps)

    # Stated, because the derived one is a difference, of which little is left for small inputs.
    def slope_target(input, target, eps):
        size, s = abs(target), math.sign(input - target)
        return -s * math.where(size < eps, 1 / eps, input / target / size)


class MSLELoss(ElementwiseLoss, function="msle_loss"):
    r"""Squared difference of logarithms, each of 1 more; the root of its mean is the RMSLE.

    .. math:: \ell = \left(\log(1 + x) - \log(1 + y)\right)^2

    At -1 it is infinite.

    Parameters
    ----------
    input, target : array
        Of the same shape: amounts, above -1.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or an element of input or target is below -1.

    References
    ----------
    scikit-learn, ``sklearn.metrics.mean_squared_log_error``. Keras,
    ``keras.losses.MeanSquaredLogarithmicError``, which takes numbers below 1e-7 for that. XGBoost,
    ``reg:squaredlogerror``, which is half of it.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.msle_loss(np.array([np.e - 1, 0.0]), np.array([0.0, 0.0]), reduction="none")
    array([1., 0.])
    """

    reduction: str = reduction()
    domains = {"input": amounts(model=True), "target": amounts()}

    def value(input, target):
        # The logarithm of the ratio, from the difference: of close numbers no digits are lost.
        less = input < target
        ratio = math.where(less, (target - input) / (1 + input), (input - target) / (1 + target))
        d = math.log1p(ratio)
        return d * d


gamma_nll_loss = GammaNLLLoss.function
tweedie_nll_loss = TweedieNLLLoss.function
mape_loss = MAPELoss.function
msle_loss = MSLELoss.function
