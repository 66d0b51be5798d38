"""Losses whose minimum is no mean or median, but a quantile or expectile."""

from ..arguments import Operand, between, like_scores, reduction, weights
from ..arrays import broadcasts
from ..families.elementwise import ElementwiseLoss
from ..kernels import math


class QuantileLoss(ElementwiseLoss, function="quantile_loss"):
    r"""Pinball loss: differences weighted so that a quantile of the targets has the smallest loss.

    .. math:: \ell = \begin{cases} q\, (y - x) & y \ge x \\ (1 - q)\, (x - y) & \text{otherwise} \end{cases}

    The gradient at a tie is 0, as that of ``l1_loss``, which is twice the loss of the median.

    Parameters
    ----------
    input : array
        Estimates of the quantile.
    target : array
        Of the input's shape, or of that shape with axes of 1.
    quantile : float, default 0.5
        In [0, 1].
    quantiles : array, optional
        Quantiles in place of ``quantile``, in [0, 1], that broadcast to the input's shape: K of them against
        inputs (N, K) and targets (N, 1), say.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If shapes do not fit, or a quantile is outside [0, 1].

    References
    ----------
    scikit-learn, ``sklearn.metrics.mean_pinball_loss`` and
    ``HistGradientBoostingRegressor(loss='quantile')``. XGBoost, ``reg:quantileerror`` (``quantile_alpha``).
    R. Koenker and G. Bassett, Regression quantiles, Econometrica 46 (1978).

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.quantile_loss(np.array([0.0, 2.0]), np.ones(2), quantile=0.75, reduction="none")
    array([0.75, 0.25])
    >>> x, y = np.zeros((4, 3)), np.ones((4, 1))
    >>> nl.quantile_loss.grad(x, y, quantiles=[0.25, 0.5, 0.75], reduction="sum")[0]
    array([-0.25, -0.5 , -0.75])
    """

    quantile: float = between(0.5, 0.0, 1.0)
    quantiles: object = weights()
    reduction: str = reduction()
    domains = {
        "target": like_scores(broadcast=True),
        # -1 says that there are none.
        "quantiles": Operand(
            0.0, 1.0, nan=False, broadcast=True, absent=-1.0, draw=lambda rng, shape: rng.random(shape)
        ),
    }

    def value(input, target, quantiles, quantile):
        r = input - target
        q = math.where(quantiles < 0, quantile, quantiles)
        return math.where(r < 0, q, 1 - q) * abs(r)

    # It is abs(r) / 2 and a line: D. R. Hunter and K. Lange, J. Comp. Graph. Stat. 9, 2000. At 0 none is.
    def majorizer_input(input, target, quantiles, quantile):
        r = abs(input - target)
        return math.where(r == 0, 0, 0.5 / r)

    @classmethod
    def _broadcast(cls, name, argument, array, shape):
        # A target (N,) would be taken for a row of inputs (N, N).
        fits = broadcasts(array.shape, shape) and (argument != "target" or array.ndim in (0, len(shape)))
        if not fits:
            raise ValueError(f"{name}: {argument} of shape {array.shape} does not fit input's shape {shape}")
        return array


class ExpectileLoss(ElementwiseLoss, function="expectile_loss"):
    r"""Squared differences weighted so that an expectile of the targets has the smallest loss.

    .. math:: \ell = \begin{cases} \tau\, (y - x)^2 & y > x \\ (1 - \tau)\, (x - y)^2 & \text{otherwise}
        \end{cases}

    The expectile 0.5 is the mean. The curvature at a tie is that of the second case.

    Parameters
    ----------
    input, target : array
        Of the same shape.
    expectile : float, default 0.5
        In [0, 1].
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or ``expectile`` is outside [0, 1].

    References
    ----------
    CatBoost, ``Expectile``. W. K. Newey and J. L. Powell, Asymmetric least squares estimation and testing,
    Econometrica 55 (1987).

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.expectile_loss(np.array([0.0, 4.0]), np.full(2, 2.0), expectile=0.75, reduction="none")
    array([3., 1.])
    """

    expectile: float = between(0.5, 0.0, 1.0)
    reduction: str = reduction()

    def value(input, target, expectile):
        r = input - target
        return math.where(r < 0, expectile, 1 - expectile) * r * r  # the square may be infinite

    def majorizer_input(input, target, expectile):
        return 0 * input + 2 * math.maximum(expectile, 1 - expectile)


quantile_loss = QuantileLoss.function
expectile_loss = ExpectileLoss.function
