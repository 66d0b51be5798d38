"""Losses as objectives of gradient boosting: XGBoost's, LightGBM's, CatBoost's and scikit-learn's.

>>> import numpy as np, numbaloss as nl
>>> objective = nl.boosting.xgboost(nl.huber_loss, delta=2.0)
>>> gradient, curvature = objective(np.array([0.0, 1.0]), np.array([0.5, 9.0]))  # targets, raw scores
>>> gradient.tolist(), curvature.tolist()
([0.5, 2.0], [1.0, 0.0])
>>> objective.initial_score(np.array([0.0, 1.0, 50.0]))  # the constant that is best
1.5

`xgboost`, `lightgbm`, `catboost` and `hist_gradient` take a loss of elements or of class scores, and give
what the host calls. A raw score is the sum of the trees' leaves; a loss is of raw scores. Gradients and
curvatures are those of the sum of the terms, each multiplied once by its sample weight: a mean would make
them too small for all that hosts compare them with, as ``min_child_weight`` and regularisation. No host is
imported before it is asked for.
"""

from typing import Any

from .called import LightGBMObjective, XGBoostObjective
from .catboosted import CatBoostObjective, make
from .objective import Objective

__all__ = ["Objective", "catboost", "hist_gradient", "lightgbm", "xgboost"]

PARAMETERS = """

Parameters
----------
loss : loss function or criterion
    Of elements (two arrays: raw scores and targets) or of class scores by their softmax; built-in or custom.
    A criterion is taken as it is now.
curvature : str, default 'exact'
    What stands for the second derivative: see ``value_grad_hess``.
floor : float, optional
    The least curvature.
**options
    Those of a loss function.

Returns
-------
object
    It can be pickled. It has ``metric``, the weighted mean loss of raw scores in the host's convention;
    ``initial_score(target, weight=None)``, the constant that minimises the loss; ``transform(raw)``, which
    makes predictions of raw scores by the loss's ``link``.

Raises
------
TypeError
    If the loss is of another family, or an option is none of its own.
ValueError
    If a reduction that divides was asked for by name, if raw scores have to lie in an interval, or an option
    is out of its domain.
"""


def xgboost(
    loss: Any, curvature: str = "exact", floor: float | None = None, **options: Any
) -> XGBoostObjective:
    """Make an objective of XGBoost's.

    It is the ``obj`` of ``xgboost.train``, and the ``objective`` of the scikit-learn estimators; its
    ``metric`` is their ``custom_metric``, and ``eval_metric``. Class scores need ``num_class``, which
    estimators set where there are more than two classes. Trees start at 0.5, or 0: give
    ``initial_score(target)`` as ``base_margin``, to every set of data.
    """
    return XGBoostObjective(loss, curvature, floor, options)


def lightgbm(
    loss: Any, curvature: str = "exact", floor: float | None = None, **options: Any
) -> LightGBMObjective:
    """Make an objective of LightGBM's.

    It is ``params["objective"]`` of ``lightgbm.train``, and the ``objective`` of the scikit-learn estimators;
    its ``metric`` is their ``feval``, and ``eval_metric``. Class scores need ``num_class``; estimators set
    it. Trees start at 0: give ``initial_score(target)`` as ``init_score`` to every set of data, and add it to
    what is predicted, which are raw scores, probabilities too.
    """
    return LightGBMObjective(loss, curvature, floor, options)


def catboost(
    loss: Any, curvature: str = "exact", floor: float | None = None, **options: Any
) -> CatBoostObjective:
    """Make an objective of CatBoost's.

    It is the ``loss_function``; its ``metric`` is the ``eval_metric``, without which CatBoost takes no
    objective. CatBoost compiles it. Rows of class scores have their whole Hessian where the curvature is
    exact; with another, CatBoost calls the loss's kernels row by row, and the Hessian is diagonal. Class
    scores need ``classes_count``. Trees start at 0: give ``initial_score(target)`` as the ``baseline`` of
    every pool, and add it to what is predicted.
    """
    return make(loss, curvature, floor, options)


def hist_gradient(loss: Any, curvature: str = "exact", floor: float | None = None, **options: Any) -> Any:
    """Make a loss of scikit-learn's histogram-based gradient boosting.

    It is the ``loss`` of ``HistGradientBoostingRegressor`` and ``HistGradientBoostingClassifier``: an
    instance of scikit-learn's private ``BaseLoss``, which both take. Its ``metric`` is their ``scoring``.
    Trees start at the best constant. A classifier of two classes has one score a row, and takes a loss of
    elements, such as ``binary_cross_entropy_with_logits``; of more, a loss of class scores.
    """
    from . import histogram  # scikit-learn is imported there

    return histogram.make(loss, curvature, floor, options)


for _function in (xgboost, lightgbm, catboost, hist_gradient):
    _function.__doc__ = (_function.__doc__ or "").rstrip().replace("\n    ", "\n") + PARAMETERS
