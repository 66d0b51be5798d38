"""Losses of embeddings: how far vectors are apart."""

import math
from typing import Any

from ..arguments import (
    Operand,
    distance,
    flag,
    non_negative,
    order,
    positive,
    real,
    reduction,
    scores,
    signs,
)
from ..call import Settings
from ..families import measured
from ..families.vectors import VectorLoss
from ..kernels.spec import (
    COSINE,
    COSINE_EPS,
    DISTANCE_EPS,
    LARGEST,
    POWER,
    ROOT_OF_SQUARES,
    SQUARES,
    SUM,
    Metric,
    Quick,
    Vectors,
    Weighting,
)


class CosineEmbeddingLoss(VectorLoss, function="cosine_embedding_loss"):
    r"""Draws vectors of one label together, and pushes those of another apart, by the angle between them.

    .. math:: \ell = \begin{cases} 1 - \cos(x_1, x_2) & y = 1 \\
        \max(0, \cos(x_1, x_2) - \text{margin}) & y = -1 \end{cases}

    A target that is neither gives 0. As in PyTorch, 1e-12 is added to each squared norm, so that a vector of
    zeros has a finite gradient, and the gradient passes at exactly the clamp. Where a squared norm overflows
    the vectors are scaled first (PyTorch: NaN).

    Parameters
    ----------
    input1, input2 : array, shape (N, D) or (D)
    target : array, shape (N) or ()
        1 or -1, of any integer or floating dtype.
    margin : float, default 0.0
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If shapes do not fit, or an option is out of its domain.

    References
    ----------
    PyTorch, ``torch.nn.functional.cosine_embedding_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> x, y = np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[0.0, 2.0], [3.0, 3.0]])
    >>> nl.cosine_embedding_loss(x, y, np.array([1, -1]), reduction="none").round(4)
    array([1.    , 0.7071])
    """

    margin: float = real(0.0, (0.0, 0.5, -0.3))
    reduction: str = reduction()

    operands = {
        "input1": scores(),
        "input2": scores(),
        "target": Operand(draw=lambda rng, shape: signs().draw(rng, shape[:-1])),
    }
    labelled = True

    @classmethod
    def _metric(cls, options: dict[str, Any]) -> Metric:
        return Metric(COSINE, eps=COSINE_EPS)

    @classmethod
    def _check_shape(cls, shape: tuple[int, ...]) -> None:
        super()._check_shape(shape)
        if len(shape) > 2:
            raise ValueError(f"{cls.function.__name__}: input1 must have shape (N, D) or (D), got {shape}")


class TripletMarginLoss(VectorLoss, function="triplet_margin_loss"):
    r"""Wants the positive nearer to the anchor than the negative, by a margin.

    .. math:: \ell = \max\left(0, \text{margin} + \|a - p + \epsilon\|_p - \|a - n + \epsilon\|_p\right)

    With ``swap`` the second distance is the smaller of those from the negative to the anchor and to the
    positive; at a tie each takes half of the gradient. As in PyTorch, eps is added to each coordinate's
    difference, so identical points are :math:`\sqrt{D}\,\epsilon` apart, and the gradient passes at exactly
    the clamp. Where a power overflows or underflows the differences are scaled first (PyTorch: inf or NaN).

    Parameters
    ----------
    anchor, positive, negative : array, shape (..., D)
    margin : float, default 1.0
        Above 0.
    p : float, default 2.0
        Of the norm: at least 1, or inf.
    eps : float, default 1e-6
    swap : bool, default False
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If shapes differ, or an option is out of its domain.

    References
    ----------
    PyTorch, ``torch.nn.functional.triplet_margin_loss``. V. Balntas et al., Learning shallow convolutional
    feature descriptors with triplet losses, BMVC 2016.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> a, p, n = np.zeros((1, 2)), np.array([[3.0, 4.0]]), np.array([[3.3, 4.4]])
    >>> value, (by_a, by_p, by_n) = nl.triplet_margin_loss.value_and_grad(a, p, n)
    >>> round(float(value), 4), by_p.round(3).tolist(), by_n.round(3).tolist()
    (0.5, [[0.6, 0.8]], [[-0.6, -0.8]])
    """

    margin: float = positive(1.0)
    p: float = order(2.0)
    eps: float = non_negative(DISTANCE_EPS)
    swap: bool = flag(False)
    reduction: str = reduction()

    operands = {n: scores() for n in ("anchor", "positive", "negative")}

    @classmethod
    def _metric(cls, options: dict[str, Any]) -> Metric:
        p = options["p"]
        kinds = {1.0: SUM, 2.0: ROOT_OF_SQUARES, math.inf: LARGEST}
        return Metric(kinds.get(p, POWER), p, options["eps"])


class TripletMarginWithDistanceLoss(
    VectorLoss, function="triplet_margin_with_distance_loss", keyword_only=True
):
    r"""Wants the positive nearer to the anchor than the negative, by a margin, in a distance of one's own.

    .. math:: \ell = \max\left(0, \text{margin} + d(a, p) - d(a, n)\right)

    With ``swap`` the second distance is the smaller of those from the negative to the anchor and to the
    positive; at a tie each takes half of the gradient.

    Parameters
    ----------
    anchor, positive, negative : array, shape (..., D)
    distance_function : str or callable, optional
        ``'euclidean'`` (the default: the length of the difference, 1e-6 added to each coordinate, as in
        PyTorch's ``PairwiseDistance``), ``'sqeuclidean'``, ``'cosine'`` (1 less the cosine, 1e-12 under each
        squared norm), ``'manhattan'``: these are computed in the fused pass. Or a function over rows,
        ``d(x, y)`` with x and y of shape (..., D), that gives the distances, of shape (...). For gradients it
        must have an attribute ``value_and_grad``, a function of the same arguments that gives
        ``(distances, (by_x, by_y))``: each row's derivative by its x and its y, both (..., D). On a GPU it
        is given and gives arrays of the caller's library.
    margin : float, default 1.0
        Above 0.
    swap : bool, default False
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    TypeError
        If gradients are asked for, and the function has no ``value_and_grad``.
    ValueError
        If shapes differ, an option is out of its domain, or the function returns another shape.

    References
    ----------
    PyTorch, ``torch.nn.functional.triplet_margin_with_distance_loss``.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> a, p, n = np.zeros((1, 2)), np.array([[1.0, 1.0]]), np.array([[0.0, 2.0]])
    >>> float(nl.triplet_margin_with_distance_loss(a, p, n, distance_function="manhattan"))
    1.0
    >>> def largest(x, y):
    ...     return abs(x - y).max(axis=-1)
    >>> float(nl.triplet_margin_with_distance_loss(a, p, n, distance_function=largest, margin=1.5))
    0.5
    """

    distance_function: object = distance()
    margin: float = positive(1.0)
    swap: bool = flag(False)
    reduction: str = reduction()

    operands = {n: scores() for n in ("anchor", "positive", "negative")}

    _function_keyword_only = True

    @classmethod
    def _metric(cls, options: dict[str, Any]) -> Metric:
        name = options["distance_function"]
        return DISTANCES["euclidean" if callable(name) else name or "euclidean"]

    @classmethod
    def _quick(cls, settings: Settings, weighting: Weighting) -> Quick | None:
        return (
            None if callable(settings.options["distance_function"]) else super()._quick(settings, weighting)
        )

    @classmethod
    def _run_problem(
        cls, settings: Settings, problem: Vectors, outputs: dict[str, Any], call: dict[str, Any], backend: Any
    ) -> Any:
        function = settings.options["distance_function"]
        if callable(function):
            return measured.run(problem, function, outputs, backend)
        return backend.run(problem, outputs)


DISTANCES = {
    "euclidean": Metric(ROOT_OF_SQUARES, eps=DISTANCE_EPS),
    "sqeuclidean": Metric(SQUARES),
    "cosine": Metric(COSINE, eps=COSINE_EPS),
    "manhattan": Metric(SUM),
}

cosine_embedding_loss = CosineEmbeddingLoss.function
triplet_margin_loss = TripletMarginLoss.function
triplet_margin_with_distance_loss = TripletMarginWithDistanceLoss.function
