"""The families of class scores: each row of scores, with its class or classes, gives one term."""

from typing import Any, ClassVar, NamedTuple

import numpy as np

from ..arrays import as_array, floating
from ..call import RowLoss, Settings, dtypes_of
from ..kernels.layout import class_axis, class_rows
from ..kernels.spec import MANY, Margins, Quick, Weighting


class Rows(NamedTuple):
    """The checked arrays of a call."""

    input: Any
    target: Any
    has_probabilities: bool  # the target holds probabilities, not indices
    weight: Any  # of the classes, or None
    weighting: Weighting
    dtype: Any  # that the arrays promote to; None of a quick call
    arithmetic: Any


class ClassLoss(RowLoss):
    """A loss with one term for each row of class scores.

    Scores are (C), (N, C) or (N, C, d1, ...); a class index, or a distribution, belongs to each row.
    """

    takes_probabilities: ClassVar[bool] = False
    differentiable: ClassVar[tuple[str, ...]] = ("input",)

    @classmethod
    def _record(cls, options: dict[str, Any], rows: Rows) -> Any:
        """Return the problem of checked arrays: what a loss states."""
        raise NotImplementedError

    @classmethod
    def _quick(cls, settings: Settings, weighting: Weighting) -> Quick | None:
        if settings.wrt and (settings.wrt, settings.single) != (("input",), True):
            return None
        problem = cls._record(settings.options, Rows(None, None, False, None, weighting, None, None))
        return Quick(problem, settings.mode, (0,) if settings.wrt else (), settings.single)

    @classmethod
    def _problem(cls, settings: Settings, call: dict[str, Any], backend: Any) -> Any:
        return cls._record(settings.options, cls._check(settings, call))

    @classmethod
    def _check(cls, settings: Settings, call: dict[str, Any]) -> Rows:
        """Check a call's arrays: libraries, dtypes, shapes, and what the mean divides by."""
        name, wrt = cls.function.__name__, settings.wrt
        x = floating(name, "input", as_array(name, "input", call["input"]))
        target = as_array(name, "target", call["target"])
        if not x.ndim:
            raise ValueError(f"{name}: input must have shape (C), (N, C) or (N, C, d1, ...), got ()")
        classes, rows = x.shape[class_axis(x.shape)], class_rows(x.shape)
        if not classes:
            raise ValueError(f"{name}: input must have at least one class, got shape {x.shape}")
        has_probabilities = cls.takes_probabilities and target.shape == x.shape
        if has_probabilities:
            if target.dtype.kind in "iub":
                raise TypeError(
                    f"{name}: target has the input's shape {x.shape}, so it holds class probabilities and "
                    f"must be floating, got {target.dtype.name}"
                )
            target = floating(name, "target", target)
            if settings.options["ignore_index"] >= 0:
                raise ValueError(
                    f"{name}: ignore_index must not be given with class probabilities, "
                    f"got {settings.options['ignore_index']}"
                )
        else:
            if target.shape != rows:
                wanted = f"{rows}, one class index for each row of the input {x.shape}"
                if cls.takes_probabilities:
                    wanted += ", or the input's shape, for class probabilities"
                raise ValueError(f"{name}: target must have shape {wanted}; got {target.shape}")
            if target.dtype.kind not in "iu":
                raise TypeError(f"{name}: target must hold integers, got {target.dtype.name}")
        for n in wrt:
            if n != "input" and not has_probabilities:
                raise ValueError(f"{name}: wrt may hold {n!r} only where target holds class probabilities")
        if "weight" in wrt and call.get("weight") is None:
            raise ValueError(f"{name}: wrt names 'weight', which is not given")

        floats = {"input": x} | ({"target": target} if has_probabilities else {})
        weight = cls._weak("weight", call, floats, wrt)
        if weight is not None and weight.shape != (classes,):
            raise ValueError(
                f"{name}: weight must have shape ({classes},), one per class, got {weight.shape}"
            )
        weighting = cls._weighting(settings, call, rows, floats)
        return Rows(x, target, has_probabilities, weight, weighting, *dtypes_of(floats))

    @classmethod
    def _check_curvature(cls, options: dict[str, Any], wrt: tuple[str, ...]) -> None:
        if wrt != ("input",):
            got = wrt[0] if len(wrt) == 1 else wrt
            raise ValueError(f"{cls.function.__name__}: value_grad_hess takes wrt='input', got {got!r}")


class MarginLoss(ClassLoss):
    """A loss of each row's own classes against all its others: scores are (C) or (N, C)."""

    kind: ClassVar[str]  # ONE class a row, or MANY, ended by -1

    @classmethod
    def _record(cls, options: dict[str, Any], rows: Rows) -> Margins:
        return Margins(
            cls.function.__name__,
            cls.kind,
            rows.input,
            rows.target,
            rows.weight,
            options.get("p", 1),
            options.get("margin", 1.0),
            rows.weighting,
            rows.dtype,
            rows.arithmetic,
        )

    @classmethod
    def _check(cls, settings: Settings, call: dict[str, Any]) -> Rows:
        name, shape = cls.function.__name__, np.shape(call["input"])
        if cls.kind == MANY:
            x = as_array(name, "input", call["input"])
            target = as_array(name, "target", call["target"])
            if target.shape != x.shape:
                raise ValueError(f"{name}: target must have input's shape {x.shape}, got {target.shape}")
            # All but the target is as with one label a row.
            call = {**call, "target": np.zeros(x.shape[:-1], target.dtype)}
        if len(shape) not in (1, 2):
            raise ValueError(f"{name}: input must have shape (C) or (N, C), got {shape}")
        rows = super()._check(settings, call)
        return rows._replace(target=target) if cls.kind == MANY else rows
