"""Objectives that are called: XGBoost's and LightGBM's."""

import ctypes
import json
import sys
from functools import lru_cache
from typing import Any

import numpy as np

from .objective import Objective


class Called(Objective):
    """An objective that is called with raw scores and a set of data, or with targets, raw scores and weights.

    Both hosts look at the number, or the names, of the parameters that it has.
    """

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> tuple[Any, Any]:
        """Return gradient and curvature: of ``(raw, data)``, or of ``(target, raw, sample_weight)``."""
        return self.derivatives(*arguments(y_true, y_pred, sample_weight))

    @property
    def metric(self) -> "Metric":
        """The weighted mean loss of raw scores."""
        return Metric(self)


def arguments(first: Any, second: Any, weight: Any) -> tuple[Any, Any, Any]:
    """Return raw scores, target and weight, whichever way they were given."""
    if hasattr(second, "get_label"):  # a DMatrix or a Dataset
        return first, field(second, "label"), field(second, "weight")
    return second, first, weight


def field(data: Any, name: str) -> Any:
    """Return labels or weights of a host's data: of XGBoost's where they lie, as its getters copy them."""
    core, getter = sys.modules.get("xgboost.core"), f"get_{name}"
    if core is not None and getattr(type(data), getter, None) is getattr(core.DMatrix, getter):
        told = ctypes.c_char_p()
        try:
            call = core._LIB.XGDMatrixGetInfoRef(data.handle, name.encode(), ctypes.byref(told))
            core._check_call(call)
            interface, array = lying(told.value or b"")
            return core.from_array_interface(interface, zero_copy=True) if array is None else array
        except (AttributeError, TypeError, ValueError):
            pass  # of another version
    return getattr(data, getter)()


class Interface:
    """Has what NumPy asks of an array."""

    def __init__(self, **told: Any) -> None:
        self.__array_interface__ = told


@lru_cache(maxsize=16)
def lying(told: bytes) -> tuple[dict[str, Any], np.ndarray | None]:
    """Return what an interface tells, and its array, where that lies: of an address that was just told.

    Rounds tell the same. On a device the array is None.
    """
    said = json.loads(told)
    interface = {n: tuple(v) if isinstance(v, list) else v for n, v in said.items()}
    if "stream" in interface:
        return interface, None
    if not all(interface["shape"]):  # its address may be 0
        return interface, np.empty(interface["shape"], np.dtype(interface["typestr"]))
    return interface, np.asarray(Interface(**interface))


class XGBoostObjective(Called):
    """What ``xgboost`` makes: ``objective(predt, data)``, ``objective(y_true, y_pred, sample_weight)``."""

    host = "xgboost"


class LightGBMObjective(Called):
    """What ``lightgbm`` makes: ``objective(preds, data)``, ``objective(y_true, y_pred, weight)``."""

    host = "lightgbm"


class Metric:
    """The weighted mean loss of raw scores.

    LightGBM gets ``(name, value, False)``, as lower is better; ``xgboost.train`` gets ``(name, value)``, and
    XGBoost's estimators the value alone.
    """

    def __init__(self, objective: Objective) -> None:
        self.objective, self.__name__ = objective, objective.name

    def __call__(self, y_true: Any, y_pred: Any, sample_weight: Any = None) -> Any:
        total, weight = self.objective.sums(*arguments(y_true, y_pred, sample_weight))
        if self.objective.host == "lightgbm":
            return self.__name__, total / weight if weight else float("nan"), False
        total, weight = of_all_workers(total, weight)
        value = total / weight if weight else float("nan")
        return (self.__name__, value) if hasattr(y_pred, "get_label") else value


def of_all_workers(*numbers: float) -> Any:
    """Add up numbers of XGBoost's workers, which it takes the plain mean of, whatever rows each has."""
    collective = sys.modules.get("xgboost.collective")
    if collective is None or collective.get_world_size() == 1:
        return numbers
    return collective.allreduce(np.array(numbers), collective.Op.SUM).tolist()
