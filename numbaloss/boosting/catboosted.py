"""CatBoost's objective: an object whose methods CatBoost compiles by Numba.

CatBoost compiles a method that does not name ``self``, and calls it with 0 in its place; a method that reads
``self`` it calls as it is, after a warning, and where there is ``no_jit`` without one. So a loss's compiled
derivatives stand in a closure.
"""

from functools import cache
from typing import Any

import numpy as np

from ..kernels import inside
from ..kernels.spec import EXACT
from .objective import Objective


class CatBoostObjective(Objective):
    """What ``catboost`` makes: ``calc_ders_range`` of elements, or ``calc_ders_multi`` of one row of scores.

    The derivatives are those of minus the loss.
    """

    host = "catboost"

    def __reduce__(self) -> Any:
        return make, (self.loss, self.how.get("curvature", EXACT), self.how.get("floor"), {})

    @property
    def metric(self) -> "Metric":
        """The weighted mean loss of raw scores."""
        return metric_of(self)


def make(loss: Any, curvature: str, floor: float | None, options: dict[str, Any]) -> CatBoostObjective:
    """Return an objective, of a class that has the one method which CatBoost is to call."""
    made = CatBoostObjective(loss, curvature, floor, options)
    compiled = compile_derivatives(made)
    if made.is_of_classes:
        made.__class__ = Rows if compiled is None else compiled_rows(compiled)
    else:
        made.__class__ = Elements if compiled is None else compiled_elements(compiled)
    return made


def compile_derivatives(objective: Objective) -> Any:
    """Return the loss's derivatives for compiled code.

    None where they need more arrays, or are of class scores and another curvature than the exact one.
    """
    loss: Any = objective.loss
    given, policy, floor = loss._options, objective.how.get("curvature", EXACT), objective.how.get("floor")
    values = tuple(v if isinstance(v, bool) else float(v) for v in (given[n] for n in loss._option_names))
    if objective.is_of_classes:
        if policy != EXACT or floor is not None:
            return None
        own = set(loss._option_names)  # an option of the definition's own may have one of these names
        softcap = None if "softcap" in own else given.get("softcap")
        square = 0.0 if "lse_square_scale" in own else given.get("lse_square_scale", 0.0)
        functions, _ = type(loss)._functions(given)
        weight = None if given["weight"] is None else tuple(map(float, given["weight"]))
        more = weight, given["ignore_index"], given["label_smoothing"], softcap, square
        return inside.row_descent(functions, values, *more)
    if any(loss.fields[n].array for n in loss._given):
        return None
    statics = tuple(v if isinstance(v, bool) else None for v in values)
    return inside.descents(type(loss)._scalars(statics, len(loss._required)), values, policy, floor)


@cache
def compiled_elements(descents: Any) -> type:
    class CompiledElements(CatBoostObjective):
        def calc_ders_range(self, approxes, targets, weights):
            return descents(approxes, targets, weights)

    return CompiledElements


@cache
def compiled_rows(descent: Any) -> type:
    class CompiledRows(CatBoostObjective):
        def calc_ders_multi(self, approxes, target, weight):
            return descent(approxes, target, weight)

    return CompiledRows


class Elements(CatBoostObjective):
    no_jit = True

    def calc_ders_range(self, approxes: Any, targets: Any, weights: Any) -> np.ndarray:
        pairs = np.empty((len(approxes), 2))
        self.derivatives(approxes, targets, weights, (pairs[:, 0], pairs[:, 1]))
        return np.negative(pairs, out=pairs)


class Rows(CatBoostObjective):
    no_jit = True

    def calc_ders_multi(self, approxes: Any, target: float, weight: float) -> tuple[np.ndarray, np.ndarray]:
        raw = np.array(approxes)[None]
        out = np.empty_like(raw), np.empty_like(raw)
        self.derivatives(raw, np.array([target]), np.array([weight], np.float64), out)
        return -out[0][0], -np.diag(out[1][0])


class Metric:
    """The weighted mean loss of raw scores: ``evaluate`` gives what CatBoost adds up, and then divides."""

    no_jit = True

    objective: Objective

    def __reduce__(self) -> Any:
        return metric_of, (self.objective,)

    def evaluate(self, approxes: Any, target: Any, weight: Any) -> tuple[float, float]:
        """Return the mean times the sum of the weights, and that sum, of scores by class."""
        raw = np.array(approxes).T if self.objective.is_of_classes else approxes[0]
        return self.objective.sums(raw, target, weight)

    def get_final_error(self, error: float, weight: float) -> float:
        return error / weight if weight else float("nan")

    def is_max_optimal(self) -> bool:
        return False


def metric_of(objective: Objective) -> Metric:
    """Return a metric whose class has the loss's name: CatBoost names it so."""
    made = type(objective.name, (Metric,), {})()
    made.objective = objective
    return made
