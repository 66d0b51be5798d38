"""Losses of embeddings: how far vectors are apart."""

from math import inf
from typing import Any

from ..arguments import Operand, flag, non_negative, order, positive, real, reduction, signs
from ..arguments import distance as distance_option
from ..call import Settings
from ..families import measured
from ..families.vectors import VectorLoss
from ..kernels.math import maximum, where
from ..kernels.spec import (
    COSINE,
    COSINE_EPS,
    DISTANCE_EPS,
    LARGEST,
    POWER,
    ROOT_OF_SQUARES,
    SQUARES,
    SUM,
    Distance,
    Vectors,
)

# In ``maximum(x, 0.0)`` the gradient passes at exactly the clamp, as PyTorch's does.


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
        The vectors of each pair.
    target : array, shape (N) or ()
        1 or -1, of any integer or floating dtype.
    margin : float, default 0.0
        The cosine that vectors to be pushed apart may have.
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

    vectors = "input1", "input2"
    domains = {"target": Operand(draw=lambda rng, shape: signs().draw(rng, shape[:-1]))}
    labels = ("target",)
    most_axes = 2

    distance = Distance(COSINE, eps=COSINE_EPS)

    def finish(distance, target, margin):
        apart = maximum(1 - distance - margin, 0.0)
        return where(target == 1, distance, where(target == -1, apart, 0.0))


class ContrastiveLoss(VectorLoss, function="contrastive_loss"):
    r"""Draws similar vectors together, and pushes others apart until their distance is the margin.

    .. math:: \ell = \tfrac{1}{2} \left( y d^2 + (1 - y) \max(0, \text{margin} - d)^2 \right),
        \quad d = \|x_1 - x_2\|_2

    The paper's labels are the other way round: there 0 is similar. A target between 0 and 1 weighs both
    parts. Where a square overflows or underflows the differences are scaled first; equal vectors that are
    not similar have the gradient zero.

    Parameters
    ----------
    input1, input2 : array, shape (..., D)
        The vectors of each pair.
    target : array, shape (...)
        1 of similar vectors, 0 of others; of any integer, floating or boolean dtype.
    margin : float, default 1.0
        Above 0.
    reduction : {'none', 'mean', 'sum'}, default 'mean'

    Raises
    ------
    ValueError
        If shapes do not fit, or an option is out of its domain.

    References
    ----------
    R. Hadsell, S. Chopra, Y. LeCun, Dimensionality reduction by learning an invariant mapping, CVPR 2006,
    equation 4. sentence-transformers, ``losses.ContrastiveLoss``, has these labels and halves.

    Examples
    --------
    >>> import numpy as np, numbaloss as nl
    >>> x, y = np.zeros((2, 2)), np.array([[3.0, 4.0], [0.3, 0.4]])
    >>> nl.contrastive_loss(x, y, np.array([1, 0]), reduction="none")
    array([12.5  ,  0.125])
    """

    margin: float = positive(1.0)
    reduction: str = reduction()

    vectors = "input1", "input2"
    domains = {"target": Operand(draw=lambda rng, shape: rng.integers(0, 2, shape[:-1]).astype(float))}
    labels = ("target",)

    distance = Distance(ROOT_OF_SQUARES)

    def finish(distance, target, margin):
        together = where(target == 0, 0.0, target * distance**2)  # a square may be infinite
        return 0.5 * (together + (1 - target) * maximum(margin - distance, 0.0) ** 2)


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
        A vector, one that should be near to it, one that should be far.
    margin : float, default 1.0
        Above 0.
    p : float, default 2.0
        Of the norm: at least 1, or inf.
    eps : float, default 1e-6
        Added to each coordinate's difference.
    swap : bool, default False
        Whether the negative's distance to the positive counts if it is the smaller one.
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

    vectors = "anchor", "positive", "negative"

    def distance(p, eps, swap):
        kind = {1.0: SUM, 2.0: ROOT_OF_SQUARES, inf: LARGEST}.get(p, POWER)
        return Distance(kind, p, eps, swap)

    def finish(near, far, margin):
        return maximum(margin + (near - far), 0.0)


DISTANCES = {
    "euclidean": Distance(ROOT_OF_SQUARES, eps=DISTANCE_EPS),
    "sqeuclidean": Distance(SQUARES),
    "cosine": Distance(COSINE, eps=COSINE_EPS),
    "manhattan": Distance(SUM),
}


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
        A vector, one that should be near to it, one that should be far.
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
        Whether the negative's distance to the positive counts if it is the smaller one.
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

    distance_function: object = distance_option()
    margin: float = positive(1.0)
    swap: bool = flag(False)
    reduction: str = reduction()

    vectors = "anchor", "positive", "negative"
    named_distances = DISTANCES

    _function_keyword_only = True

    def distance(distance_function, swap):
        if callable(distance_function):
            return None  # it is measured by the caller's function
        return DISTANCES[distance_function or "euclidean"]._replace(swap=swap)

    def finish(near, far, margin):
        return maximum(margin + (near - far), 0.0)

    @classmethod
    def _run_problem(
        cls, settings: Settings, problem: Vectors, outputs: dict[str, Any], call: dict[str, Any], backend: Any
    ) -> Any:
        function, swap = settings.options["distance_function"], settings.options["swap"]
        if callable(function):
            return measured.run(problem, function, swap, outputs, backend)
        return backend.run(problem, outputs)

    @classmethod
    def _runs_once(cls, problem: Vectors, outputs: dict[str, Any]) -> bool:
        return problem.distance is not None


cosine_embedding_loss = CosineEmbeddingLoss.function
contrastive_loss = ContrastiveLoss.function
triplet_margin_loss = TripletMarginLoss.function
triplet_margin_with_distance_loss = TripletMarginWithDistanceLoss.function
