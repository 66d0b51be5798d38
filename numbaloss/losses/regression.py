"""Losses between real numbers: predictions and targets, rates and counts, means and variances."""

from ..arguments import (
    counts,
    flag,
    like_scores,
    non_negative,
    positive,
    rates,
    real,
    reduction,
    scores,
    signs,
    variances,
    weights,
)
from ..arrays import broadcasts
from ..families.elementwise import ElementwiseLoss
from ..kernels import math


class L1Loss(ElementwiseLoss, function="l1_loss"):
    r"""Absolute difference.

    .. math:: \ell = |x - y|

    The gradient at a tie is 0. With ``weight`` the mean divides by the sum of the weights.

    Parameters
    ----------
    input, target : array
        Of the same shape.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    weight : array, optional
        Multiplies each term; broadcasts to the input's shape.

    Raises
    ------
    ValueError
        If the shapes differ: PyTorch's warning and broadcast of (N, 1) against (N,) is an error here.

    References
    ----------
    PyTorch, ``torch.nn.functional.l1_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.l1_loss(np.array([1.0, 2.0]), np.array([0.0, 4.0]))
    np.float64(1.5)
    """

    reduction: str = reduction()
    weight: object = weights(call_only=True)
    weight_in_divisor = True
    residual = True

    def value(input, target):
        return abs(input - target)


class MSELoss(ElementwiseLoss, function="mse_loss"):
    r"""Squared difference.

    .. math:: \ell = (x - y)^2

    With ``weight`` the mean divides by the sum of the weights.

    Parameters
    ----------
    input, target : array
        Of the same shape.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    weight : array, optional
        Multiplies each term; broadcasts to the input's shape.

    Raises
    ------
    ValueError
        If the shapes differ: PyTorch's warning and broadcast of (N, 1) against (N,) is an error here.

    References
    ----------
    PyTorch, ``torch.nn.functional.mse_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.mse_loss.value_and_grad(np.ones(3), np.zeros(3))
    (np.float64(1.0), array([0.66666667, 0.66666667, 0.66666667]))
    """

    reduction: str = reduction()
    weight: object = weights(call_only=True)
    weight_in_divisor = True
    residual = True

    def value(input, target):
        d = input - target
        return d * d


class SmoothL1Loss(ElementwiseLoss, function="smooth_l1_loss"):
    r"""Quadratic within ``beta`` of the target, linear with slope one beyond.

    .. math:: \ell = \begin{cases} r^2 / (2 \beta) & r < \beta \\ r - \beta / 2 & \text{otherwise}
        \end{cases}, \quad r = |x - y|

    Parameters
    ----------
    input, target : array
        Of the same shape.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    beta : float, default 1.0
        At least 0; at 0 this is ``l1_loss``.

    Raises
    ------
    ValueError
        If the shapes differ, or ``beta`` is negative.

    References
    ----------
    PyTorch, ``torch.nn.functional.smooth_l1_loss``. R. Girshick, Fast R-CNN, ICCV 2015.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.smooth_l1_loss(np.array([0.5, 3.0]), np.zeros(2), reduction="none")
    array([0.125, 2.5  ])
    """

    reduction: str = reduction()
    beta: float = non_negative(1.0)
    residual = True

    def value(input, target, beta):
        d = input - target
        r = abs(d)
        if r < beta:
            return 0.5 * d * d / beta  # of r * r a tie has no curvature
        return r - 0.5 * beta


class HuberLoss(ElementwiseLoss, function="huber_loss"):
    r"""Quadratic within ``delta`` of the target, linear with slope ``delta`` beyond.

    .. math:: \ell = \begin{cases} r^2 / 2 & r \le \delta \\ \delta (r - \delta / 2) & \text{otherwise}
        \end{cases}, \quad r = |x - y|

    Parameters
    ----------
    input, target : array
        Of the same shape.
    reduction : {'none', 'mean', 'sum'}, default 'mean'
    delta : float, default 1.0
        Above 0.
    weight : array, optional
        Multiplies each term; broadcasts to the input's shape. The mean still divides by the number of terms.

    Raises
    ------
    ValueError
        If the shapes differ, or ``delta`` is not positive.

    References
    ----------
    PyTorch, ``torch.nn.functional.huber_loss``. P. J. Huber, Robust estimation of a location parameter,
    Ann. Math. Statist. 35 (1964).

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.huber_loss(np.array([0.5, 3.0]), np.zeros(2), reduction="none", delta=2.0)
    array([0.125, 4.   ])
    """

    reduction: str = reduction()
    delta: float = positive(1.0)
    weight: object = weights(call_only=True)
    residual = True

    def value(input, target, delta):
        d = input - target
        r = abs(d)
        if r <= delta:
            return 0.5 * d * d  # of r * r a tie has no curvature
        return delta * (r - 0.5 * delta)


class PoissonNLLLoss(ElementwiseLoss, function="poisson_nll_loss"):
    r"""Negative log-likelihood of counts under Poisson distributions.

    .. math:: \ell = e^x - y x \quad\text{(log\_input)}, \qquad \ell = x - y \log(x + \epsilon)

    Parameters
    ----------
    input, target : array
        Of the same shape: log-rates (or rates) and counts.
    log_input : bool, default True
        Whether the input is the logarithm of the rate.
    full : bool, default False
        Add Stirling's approximation of :math:`\log y!`, where the count is above 1.
    eps : float, default 1e-8
        Added to a rate before its logarithm.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or ``eps`` is negative.

    References
    ----------
    PyTorch, ``torch.nn.functional.poisson_nll_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.poisson_nll_loss(np.zeros(2), np.array([1.0, 2.0]))
    np.float64(1.0)
    """

    log_input: bool = flag(True)
    full: bool = flag(False)
    eps: float = non_negative(1e-8)
    reduction: str = reduction()
    domains = {"input": rates(), "target": counts()}
    link = property(lambda self: "log" if self.log_input else "identity")

    def value(input, target, log_input, full, eps):
        if log_input:
            y = math.exp(input) - target * input
        else:
            y = input - target * math.log(input + eps)
        if full:
            stirling = target * math.log(target) - target + 0.5 * math.log(6.283185307179586 * target)
            y = y + math.where(target > 1, stirling, 0)
        return y

    def fisher_input(input, target, log_input, full, eps):
        if log_input:
            return math.exp(input)
        return input / (input + eps) ** 2


class GaussianNLLLoss(ElementwiseLoss, function="gaussian_nll_loss", keyword_only=True):
    r"""Negative log-likelihood under Gaussian distributions with given variances.

    .. math:: \ell = \tfrac12 \left(\log v + \frac{(x - y)^2}{v}\right), \quad v = \max(\text{var}, \epsilon)

    The clamp is not differentiated: the gradient by ``var`` flows where the variance is clamped too.

    Parameters
    ----------
    input : array
        Expectations.
    target : array
        Observations: of the input's shape, of that shape with axes of 1, or one number.
    var : array or float
        Variances, at least 0: of the input's shape, of that shape with one axis of 1 or without the last
        axis, or one number. A gradient has the shape of the argument that it is by.
    full : bool, default False
        Add the constant :math:`\tfrac12 \log 2\pi`.
    eps : float, default 1e-6
        The smallest variance used. Above 0.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If shapes do not fit, a variance is negative, or ``eps`` is not positive.

    References
    ----------
    PyTorch, ``torch.nn.functional.gaussian_nll_loss``. D. A. Nix and A. S. Weigend, Estimating the mean and
    variance of the target probability distribution, ICNN 1994.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.gaussian_nll_loss(np.zeros(2), np.ones(2), np.ones(2))
    np.float64(0.5)
    """

    full: bool = flag(False)
    eps: float = positive(1e-6)
    reduction: str = reduction()
    domains = {"target": like_scores(broadcast=True), "var": variances()}
    residual = True

    def value(input, target, var, full, eps):
        v = math.maximum(var, eps)
        d = input - target
        y = 0.5 * (math.log(v) + d * (d / v))  # the square may be infinite
        if full:
            y = y + 0.9189385332046727
        return y

    # Stated, because the clamp lets the gradient pass.
    def slope_var(input, target, var, full, eps):
        v = math.maximum(var, eps)
        d = (input - target) / v
        return 0.5 * (1 / v - d * d)

    def fisher_input(input, target, var, full, eps):
        return 1 / math.maximum(var, eps)

    def fisher_var(input, target, var, full, eps):
        v = math.maximum(var, eps)
        return 0.5 / (v * v)

    @classmethod
    def _broadcast(cls, name, argument, array, shape):
        of_var = argument == "var"
        if of_var and array.ndim == len(shape) - 1 and array.shape == shape[:-1]:
            return array[..., None]
        ones = [n for n, m in zip(array.shape, shape, strict=False) if n == 1 != m]
        fits = array.ndim == len(shape) and broadcasts(array.shape, shape) and not (of_var and len(ones) > 1)
        if array.ndim and not fits:
            raise ValueError(f"{name}: {argument} of shape {array.shape} does not fit input's shape {shape}")
        return array


class MarginRankingLoss(ElementwiseLoss, function="margin_ranking_loss"):
    r"""How far two inputs are from being ranked as the target says, by a margin.

    .. math:: \ell = \max(0, -y (x_1 - x_2) + \text{margin})

    At exactly the clamp the gradient passes, as in PyTorch.

    Parameters
    ----------
    input1, input2, target : array
        Of the same shape; a target of 1 wants the first input higher, -1 the second.
    margin : float, default 0.0
        By how much the one should be higher.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ.

    References
    ----------
    PyTorch, ``torch.nn.functional.margin_ranking_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.margin_ranking_loss(np.array([1.0, 0.0]), np.array([0.0, 1.0]), np.ones(2), margin=0.5)
    np.float64(0.75)
    """

    margin: float = real(0.0)
    reduction: str = reduction()
    domains = {"input1": scores(), "input2": scores(), "target": signs()}

    def value(input1, input2, target, margin):
        return math.maximum(margin - target * (input1 - input2), 0)


l1_loss = L1Loss.function
mse_loss = MSELoss.function
smooth_l1_loss = SmoothL1Loss.function
huber_loss = HuberLoss.function
poisson_nll_loss = PoissonNLLLoss.function
gaussian_nll_loss = GaussianNLLLoss.function
margin_ranking_loss = MarginRankingLoss.function
