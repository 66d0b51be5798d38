"""Losses of scikit-learn's histogram-based gradient boosting, by its private ``BaseLoss``."""

from typing import Any

import numpy as np
from sklearn._loss.link import IdentityLink, LogitLink, LogLink, MultinomialLogit
from sklearn._loss.loss import BaseLoss

from .objective import Objective, weighing

LINKS = {"identity": IdentityLink, "log": LogLink, "logit": LogitLink, "softmax": MultinomialLogit}


class HistGradientObjective(Objective):
    host = "hist_gradient"


class HistGradientLoss(BaseLoss):
    """What ``hist_gradient`` makes: all that the estimators call, in terms of raw scores.

    Threads are the library's own: ``n_threads`` is taken, and does nothing.
    """

    def __init__(self, objective: Objective) -> None:
        super().__init__(closs=None, link=LINKS[objective.link](), n_classes=None)
        self.objective = objective
        self.approx_hessian = "curvature" in objective.how
        self.is_multiclass = objective.is_of_classes
        self.transform, self.initial_score = objective.transform, objective.initial_score

    def __repr__(self) -> str:
        return repr(self.objective)

    @property
    def metric(self) -> "Scorer":
        """Minus the weighted mean loss of raw scores."""
        return Scorer(self.objective)

    def fit_intercept_only(self, y_true, sample_weight=None):
        score = np.asarray(self.objective.initial_score(y_true, sample_weight))
        if self.is_multiclass:
            self.n_classes = score.size
            if score.size < 3:
                raise ValueError(
                    f"{self.objective.name}: of two classes there is one score a row; take a loss of "
                    "elements, such as binary_cross_entropy_with_logits"
                )
        return score

    def loss(self, y_true, raw_prediction, sample_weight=None, loss_out=None, n_threads=1):
        raw, target, weight = self.objective.arranged(self._flat(raw_prediction), y_true, sample_weight)
        terms = self.objective.loss(raw, target, reduction="none", **weighing(weight))
        if loss_out is None:
            return terms
        loss_out[...] = terms
        return loss_out

    def loss_gradient(
        self, y_true, raw_prediction, sample_weight=None, loss_out=None, gradient_out=None, n_threads=1
    ):
        terms = self.loss(y_true, raw_prediction, sample_weight, loss_out)
        return terms, self.gradient(y_true, raw_prediction, sample_weight, gradient_out)

    def gradient(self, y_true, raw_prediction, sample_weight=None, gradient_out=None, n_threads=1):
        return self.gradient_hessian(y_true, raw_prediction, sample_weight, gradient_out)[0]

    def gradient_hessian(
        self,
        y_true,
        raw_prediction,
        sample_weight=None,
        gradient_out=None,
        hessian_out=None,
        n_threads=1,
    ):
        like = next((a for a in (gradient_out, hessian_out) if a is not None), raw_prediction)
        both = [np.empty_like(like) if a is None else a for a in (gradient_out, hessian_out)]
        out = self._flat(both[0]), self._flat(both[1])
        self.objective.derivatives(self._flat(raw_prediction), y_true, sample_weight, out)
        return out

    def _flat(self, array: Any) -> Any:
        """Return (N, 1) as (N)."""
        if array.ndim < 2 or self.is_multiclass:
            return array
        if array.shape[1] > 1:
            raise ValueError(
                f"{self.objective.name}: of {array.shape[1]} classes there are as many scores a row; take a "
                "loss of class scores, such as cross_entropy"
            )
        return array[:, 0]


class HistGradientClassLoss(HistGradientLoss):
    """The same, where predictions are probabilities of classes."""

    def predict_proba(self, raw_prediction):
        p = self.objective.transform(self._flat(raw_prediction))
        return p if p.ndim == 2 else np.stack([1 - p, p], axis=1)


def make(loss: Any, curvature: str, floor: float | None, options: dict[str, Any]) -> HistGradientLoss:
    """Return a loss for the estimators."""
    objective = HistGradientObjective(loss, curvature, floor, options)
    of_classes = objective.link in ("logit", "softmax")
    return (HistGradientClassLoss if of_classes else HistGradientLoss)(objective)


class Scorer:
    """Minus the weighted mean loss of an estimator's raw scores: ``scorer(estimator, X, y)``."""

    def __init__(self, objective: Objective) -> None:
        self.objective = objective

    def __call__(self, estimator: Any, X: Any, y: Any, sample_weight: Any = None) -> float:
        raw, y = estimator._raw_predict(X), np.asarray(y)
        if hasattr(estimator, "classes_"):
            y = np.searchsorted(estimator.classes_, y)
        if not self.objective.is_of_classes:
            raw = raw[:, 0]
        return -self.objective.mean(raw, y, sample_weight)
