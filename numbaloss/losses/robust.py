"""Robust losses of the residual: what an outlier costs grows slower than its square, or no further at all.

All are about half the squared residual near zero. Their scale `c` is in units of the residual.
"""

import math as libm

from ..arguments import Interval, length, positive, reduction, within
from ..families.elementwise import ElementwiseLoss
from ..kernels import math


class PseudoHuberLoss(ElementwiseLoss, function="pseudo_huber_loss"):
    r"""Smooth loss between half the squared difference and ``delta`` times the absolute one.

    .. math:: \ell = \delta^2 \left(\sqrt{1 + r^2 / \delta^2} - 1\right), \quad r = x - y

    SciPy's ``soft_l1`` is this loss with its ``f_scale`` for ``delta``.

    Parameters
    ----------
    input, target : array
        Of the same shape.
    delta : float, default 1.0
        The slope far from the target. Above 0.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or ``delta`` is not positive.

    References
    ----------
    SciPy, ``scipy.special.pseudo_huber`` and ``scipy.optimize.least_squares(loss='soft_l1')``. XGBoost,
    ``reg:pseudohubererror`` (``huber_slope``). P. Charbonnier et al., Deterministic edge-preserving
    regularization in computed imaging, IEEE Trans. Image Process. 6 (1997).

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.pseudo_huber_loss(np.array([0.0, 4.0]), np.zeros(2), delta=3.0, reduction="none")
    array([0., 6.])
    """

    delta: float = positive(1.0)
    reduction: str = reduction()
    residual = True

    def value(input, target, delta):
        r = input - target
        size, u = abs(r), r / delta
        w = delta / size
        # Beyond `delta` by its inverse: there the curvature would be a small difference.
        far = delta * (size * math.sqrt(1 + w * w) - delta)
        return math.where(size > delta, far, r * r / (1 + math.sqrt(1 + u * u)))


class LogCoshLoss(ElementwiseLoss, function="log_cosh_loss"):
    r"""Logarithm of the hyperbolic cosine of the difference.

    .. math:: \ell = \log \cosh (x - y)

    Computed without overflow or cancellation.

    Parameters
    ----------
    input, target : array
        Of the same shape.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ.

    References
    ----------
    Keras, ``keras.losses.LogCosh``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.log_cosh_loss.value_and_grad(np.array([1000.0]), np.zeros(1))
    (np.float64(999.3068528194401), array([1.]))
    """

    reduction: str = reduction()
    residual = True

    def value(input, target):
        r = input - target
        minus = math.where(r > 0, -r, r)  # abs has no slope at 0
        t = math.expm1(minus)
        near = math.log1p(t * t / (2 * (1 + t)))  # cosh - 1 in it
        return math.where(minus > -1, near, math.softplus(2 * minus) - minus - 0.6931471805599453)


class CauchyLoss(ElementwiseLoss, function="cauchy_loss"):
    r"""Negative log-likelihood of Cauchy's distribution, or Lorentzian: it grows as a logarithm.

    .. math:: \ell = \frac{c^2}{2} \log\left(1 + \frac{r^2}{c^2}\right), \quad r = x - y

    Parameters
    ----------
    input, target : array
        Of the same shape.
    c : float, default 1.0
        From here on the slope falls (SciPy's ``f_scale``). Above 0; 2.385 standard deviations of the errors
        is usual.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or ``c`` is not positive.

    References
    ----------
    SciPy, ``scipy.optimize.least_squares(loss='cauchy')``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.cauchy_loss.grad(np.array([0.0, 1.0, 3.0]), np.zeros(3), reduction="none")
    array([0. , 0.5, 0.3])
    """

    c: float = length(1.0)
    reduction: str = reduction()
    residual = True

    def value(input, target, c):
        r = input - target
        u = r / c
        # Where the square would overflow, or the ratio itself, the 1 counts nothing.
        far = math.log(abs(r)) - math.log(c)
        return c * (c * math.where(abs(u) > 1e9, far, 0.5 * math.log1p(u * u)))


class ArctanLoss(ElementwiseLoss, function="arctan_loss"):
    r"""Inverse tangent of the squared difference: bounded.

    .. math:: \ell = \frac{c^2}{2} \arctan \frac{r^2}{c^2}, \quad r = x - y

    Parameters
    ----------
    input, target : array
        Of the same shape.
    c : float, default 1.0
        The scale of the residuals (SciPy's ``f_scale``). Above 0.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or ``c`` is not positive.

    References
    ----------
    SciPy, ``scipy.optimize.least_squares(loss='arctan')``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.arctan_loss.grad(np.array([0.0, 1.0, 3.0]), np.zeros(3), reduction="none").round(4)
    array([0.    , 0.5   , 0.0366])
    """

    c: float = length(1.0)
    reduction: str = reduction()
    residual = True

    def value(input, target, c):
        u = (input - target) / c
        w, far = 1 / u, abs(u) > 1
        a = math.arctan(math.where(far, w * w, u * u))  # of the inverse, whose square is no overflow
        return c * (c * (0.5 * math.where(far, 1.5707963267948966 - a, a)))


class GemanMcClureLoss(ElementwiseLoss, function="geman_mcclure_loss"):
    r"""Geman and McClure's bounded loss.

    .. math:: \ell = \frac{c^2}{2} \frac{r^2}{c^2 + r^2}, \quad r = x - y

    It is ``general_robust_loss`` with ``alpha=-2`` and half the scale, times the scale's square.

    Parameters
    ----------
    input, target : array
        Of the same shape.
    c : float, default 1.0
        Where the loss is half its bound. Above 0.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or ``c`` is not positive.

    References
    ----------
    S. Geman and D. E. McClure, Bayesian image analysis: an application to single photon emission tomography,
    Proc. Stat. Comp. Sect. ASA (1985). Z. Zhang, Parameter estimation techniques, INRIA RR-2676 (1995).

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.geman_mcclure_loss(np.array([0.0, 1.0, 3.0]), np.zeros(3), reduction="none")
    array([0.  , 0.25, 0.45])
    """

    c: float = length(1.0)
    reduction: str = reduction()
    residual = True

    def value(input, target, c):
        u = (input - target) / c
        w, z = 1 / u, u * u  # the inverse's square is no overflow
        return c * (c * (0.5 * math.where(abs(u) > 1, 1 / (1 + w * w), z / (1 + z))))


class WelschLoss(ElementwiseLoss, function="welsch_loss"):
    r"""Welsch's bounded loss, or Leclerc's: what a Gaussian leaves of one.

    .. math:: \ell = \frac{c^2}{2} \left(1 - e^{-r^2 / c^2}\right), \quad r = x - y

    Parameters
    ----------
    input, target : array
        Of the same shape.
    c : float, default 2.985
        The scale of the residuals. Above 0; of 2.985 standard deviations the estimate of a mean is 95% as
        efficient as the mean.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or ``c`` is not positive.

    References
    ----------
    J. E. Dennis and R. E. Welsch, Techniques for nonlinear least squares and robust regression, Commun.
    Statist. B 7 (1978). MATLAB, ``robustfit(wfun='welsch')``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.welsch_loss(np.array([0.0, 1.0, 100.0]), np.zeros(3), c=2.0, reduction="none").round(4)
    array([0.    , 0.4424, 2.    ])
    """

    c: float = length(2.985)
    reduction: str = reduction()
    residual = True

    def value(input, target, c):
        u = (input - target) / c
        z = math.minimum(u * u, 1000)  # beyond it e**-z is 0, and would meet an infinite square
        return -0.5 * c * (c * math.expm1(-z))


class TukeyBiweightLoss(ElementwiseLoss, function="tukey_biweight_loss"):
    r"""Tukey's biweight, or bisquare: constant from ``c`` on.

    .. math:: \ell = \begin{cases} \frac{c^2}{6} \left(1 - (1 - r^2 / c^2)^3\right) & |r| \le c \\
        c^2 / 6 & \text{otherwise} \end{cases}, \quad r = x - y

    Parameters
    ----------
    input, target : array
        Of the same shape.
    c : float, default 4.685
        The largest residual that has a slope. Above 0; of 4.685 standard deviations the estimate of a mean is
        95% as efficient as the mean.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or ``c`` is not positive.

    References
    ----------
    statsmodels, ``statsmodels.robust.norms.TukeyBiweight``. A. E. Beaton and J. W. Tukey, The fitting of
    power series, Technometrics 16 (1974).

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.tukey_biweight_loss(np.array([0.0, 3.0, 100.0]), np.zeros(3), c=6.0, reduction="none")
    array([0.     , 3.46875, 6.     ])
    """

    c: float = length(4.685)
    reduction: str = reduction()
    residual = True

    def value(input, target, c):
        u = (input - target) / c
        z = u * u
        rest = math.maximum((1 - u) * (1 + u), 0)
        # The first has no digits to lose near 0, the other none of its slope near 1.
        share = math.where(z < 0.5, z * (3 - z * (3 - z)), 1 - rest * rest * rest)
        return c * (c * (share / 6))


class FairLoss(ElementwiseLoss, function="fair_loss"):
    r"""Fair's loss: as the absolute difference far off, with a curvature everywhere.

    .. math:: \ell = c^2 \left(\frac{|r|}{c} - \log\left(1 + \frac{|r|}{c}\right)\right), \quad r = x - y

    Parameters
    ----------
    input, target : array
        Of the same shape.
    c : float, default 1.0
        The slope far from the target (LightGBM's ``fair_c``). Above 0; 1.4 standard deviations of the errors
        is usual.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, or ``c`` is not positive.

    References
    ----------
    LightGBM, ``objective='fair'``. R. C. Fair, On the robust estimation of econometric models, Ann. Econ.
    Soc. Meas. 3 (1974).

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> nl.fair_loss.grad(np.array([0.0, 1.0, -3.0]), np.zeros(3), reduction="none")
    array([ 0.  ,  0.5 , -0.75])
    """

    c: float = length(1.0)
    reduction: str = reduction()
    residual = True

    def value(input, target, c):
        r = input - target
        a = abs(r) / c
        # log(1 + a) = 2 artanh(s); the first term of the series is taken from a, and the others are small.
        h = 1 / (2 + a)
        s = a * h
        z = s * s
        p = z * (1 / 15 + z * (1 / 17 + z * (1 / 19 + z * (1 / 21 + z * (1 / 23 + z * (1 / 25))))))
        p = 1 / 3 + z * (1 / 5 + z * (1 / 7 + z * (1 / 9 + z * (1 / 11 + z * (1 / 13 + p)))))
        near = r * r * (h - 2 * s * h * h * p)
        # No logarithm is 1000: where `a` overflows that counts nothing, and infinity would.
        return math.where(a < 0.5, near, c * (abs(r) - c * math.minimum(math.log1p(a), 1000)))

    # Stated, because they are simple and the series is not; beyond the scale by the inverse, as the curvature
    # would be a small difference.
    def slope_input(input, target, c):
        r = input - target
        a = abs(r) / c
        return math.where(a > 1, c * math.sign(r) / (1 + 1 / a), r / (1 + a))

    def slope_target(input, target, c):
        r = target - input
        a = abs(r) / c
        return math.where(a > 1, c * math.sign(r) / (1 + 1 / a), r / (1 + a))


class GeneralRobustLoss(ElementwiseLoss, function="general_robust_loss"):
    r"""Barron's general loss, whose shape goes from squared differences to bounded ones.

    .. math:: \ell = \frac{|\alpha - 2|}{\alpha}
        \left(\left(\frac{(r / c)^2}{|\alpha - 2|} + 1\right)^{\alpha / 2} - 1\right), \quad r = x - y

    and its limits :math:`(r / c)^2 / 2` for :math:`\alpha = 2`, :math:`\log(1 + (r / c)^2 / 2)` for 0,
    :math:`1 - e^{-(r / c)^2 / 2}` for :math:`-\infty` and :math:`e^{(r / c)^2 / 2} - 1` for :math:`\infty`.
    It is smooth in :math:`\alpha`, and computed without cancellation close to the limits too.

    Parameters
    ----------
    input, target : array
        Of the same shape.
    alpha : float, default 1.0
        The shape: 2 is half the squared difference, 1 Charbonnier's (``pseudo_huber_loss``), 0 Cauchy's, -2
        Geman and McClure's, minus infinity Welsch's.
    c : float, default 1.0
        The scale of the residuals, near which the loss is quadratic. Above 0.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If the shapes differ, ``alpha`` is NaN, or ``c`` is not positive.

    References
    ----------
    J. T. Barron, A general and adaptive robust loss function, CVPR 2019, equations 1, 8 and 13.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> x, y = np.array([0.0, 1.0, 100.0]), np.zeros(3)
    >>> [float(nl.general_robust_loss(x, y, alpha=a).round(3)) for a in (2, 1, 0, -2, -np.inf)]
    [1666.833, 33.14, 2.974, 0.8, 0.464]
    """

    alpha: float = within(1.0, Interval(), (2.0, 0.0, -2.0, -libm.inf))
    c: float = length(1.0)
    reduction: str = reduction()
    residual = True

    def value(input, target, alpha, c):
        r = (input - target) / c
        z = r * r
        b = abs(alpha - 2)
        # Two of the limits have no power in them: loss = expm1(k * m / 2) / k for a square m, and m / 2 for
        # k = 0. Elsewhere m = b * log(1 + q * q).
        limit = (b == 0) | (b > 1e20)
        k = math.where(limit, math.where(b == 0, 0, math.sign(alpha)), alpha / b)
        q = math.where(limit, 0, r / math.sqrt(b))
        size = abs(q)
        w, far = 1 / size, size > 1
        root = math.sqrt(1 + w * w)  # times `size` it is that of 1 + q * q, whose square may overflow
        log = math.log1p(math.where(far, size * root - 1, q * q))
        m = math.where(limit, z, b * math.where(far, 2 * log, log))
        # Below -1000 e**t is 0, and would meet an infinite square.
        t = math.where(k == 0, 0, math.maximum(0.5 * k * m, -1000))
        near = math.where(abs(t) < 1e-17, 0.5 * m, math.expm1(t) / k)
        # Close to 2 both the power and k are huge: the power is of r's multiple, not of q's.
        close = b < 1
        power = math.power(math.where(close, abs(r), size) * root, alpha)
        factor = math.where(close, math.power(b, 0.5 * (2 - alpha)) / alpha, 1 / k)
        return math.where(far & (abs(t) > 0.7), factor * power - 1 / k, near)

    @classmethod
    def _check_policy(cls, settings):
        if settings.policy == "majorizer" and settings.options["alpha"] > 2:
            raise ValueError(
                f"{cls.function.__name__}: there is no curvature 'majorizer' with alpha above 2, where the "
                f"loss grows faster than the square, got {settings.options['alpha']}"
            )
        super()._check_policy(settings)


pseudo_huber_loss = PseudoHuberLoss.function
log_cosh_loss = LogCoshLoss.function
cauchy_loss = CauchyLoss.function
arctan_loss = ArctanLoss.function
geman_mcclure_loss = GemanMcClureLoss.function
welsch_loss = WelschLoss.function
tukey_biweight_loss = TukeyBiweightLoss.function
fair_loss = FairLoss.function
general_robust_loss = GeneralRobustLoss.function
