"""The family of a linear layer's scores, which are never in memory as a whole."""

from typing import Any

import numpy as np

from .. import class_shards
from ..arrays import as_array, floating
from ..call import RowLoss, Settings, compiled_options, dtypes_of
from ..kernels import inside
from ..kernels.spec import Chunking, Linear, ScoreFunctions


class LinearLoss(RowLoss):
    """A loss of the scores that a layer gives to rows (F) or (N, F), by a weight (C, d1, ..., F)."""

    differentiable = ("input", "linear_weight", "linear_bias", "target", "weight")
    _stated = ("value",)

    _shares_classes = True

    @classmethod
    def _evaluate_classes(cls, mode: str, call: dict[str, Any]) -> Any:
        return class_shards.evaluate(class_shards.LinearPart, cls, mode, call)

    @classmethod
    def _definition(cls) -> ScoreFunctions:
        # By the statistic's name: the kernels are those of the loss that is nothing else.
        return ScoreFunctions("cross_entropy", cls._function("value"), ("cross_entropy",))

    @classmethod
    def _jit(cls) -> Any:
        name, options = cls.function.__name__, compiled_options(cls.fields)
        return inside.of_product(name, cls._definition(), options)

    @classmethod
    def _shapes_of_scores(cls, call: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        target, weight = call["target"], call.get("weight")
        rows, classes = np.shape(target), 1 if weight is None else (*np.shape(weight), 1)[0]
        if as_array(cls.function.__name__, "target", target).dtype.kind not in "iu":
            at = len(rows) > 1  # probabilities
            classes, rows = rows[at], (*rows[:at], *rows[at + 1 :])
        return {"input": (*rows[:1], 1), "linear_weight": (classes, *rows[1:], 1)}

    @classmethod
    def _problem(cls, settings: Settings, call: dict[str, Any], backend: Any) -> Linear:
        name, options, wrt = cls.function.__name__, settings.options, settings.wrt
        for n in wrt:
            if call.get(n) is None:
                raise ValueError(f"{name}: wrt names {n!r}, which is not given")
        x, w = (floating(name, n, as_array(name, n, call[n])) for n in ("input", "linear_weight"))
        if x.ndim not in (1, 2):
            raise ValueError(f"{name}: input must have shape (F) or (N, F), got {x.shape}")
        if w.ndim < 2 or not w.shape[0]:
            wanted = "(C, F) or (C, d1, ..., F), C at least 1"
            raise ValueError(f"{name}: linear_weight must have shape {wanted}, got {w.shape}")
        if x.shape[-1] != w.shape[-1] or (x.ndim == 1 and w.ndim > 2):
            wanted = f"(N, {w.shape[-1]})" if w.ndim > 2 else f"({w.shape[-1]}) or (N, {w.shape[-1]})"
            raise ValueError(
                f"{name}: input must have shape {wanted} with a linear_weight of {w.shape}, got {x.shape}"
            )
        floats = {"input": x, "linear_weight": w}
        rows = (*x.shape[:-1], *w.shape[1:-1])
        bias = cls._weak("linear_bias", call, floats, wrt)
        if bias is not None and bias.shape != w.shape[:-1]:
            raise ValueError(f"{name}: linear_bias must have shape {w.shape[:-1]}, got {bias.shape}")
        target = cls._check_target(call, x, w, options, wrt)
        has_probabilities = target.dtype.kind not in "iu"
        if has_probabilities:
            floats["target"] = target
        weight = cls._weak("weight", call, floats, wrt)
        if weight is not None and weight.shape != w.shape[:1]:
            raise ValueError(
                f"{name}: weight must have shape {w.shape[:1]}, one per class, got {weight.shape}"
            )
        weighting = cls._weighting(settings, call, rows, floats)
        return Linear(
            name,
            cls._definition(),
            x,
            w,
            bias,
            target,
            has_probabilities,
            weight,
            -100 if options["ignore_index"] is None else options["ignore_index"],
            options["label_smoothing"],
            options["softcap"],
            options["lse_square_scale"],
            Chunking() if options["options"] is None else options["options"].chunking,
            weighting,
            rows,
            *dtypes_of(floats),
        )

    @classmethod
    def _check_target(
        cls,
        call: dict[str, Any],
        x: Any,
        w: Any,
        options: dict[str, Any],
        wrt: tuple[str, ...],
    ) -> Any:
        """Return class indices, or probabilities."""
        name = cls.function.__name__
        target = as_array(name, "target", call["target"])
        rows, scored = (*x.shape[:-1], *w.shape[1:-1]), (*x.shape[:-1], *w.shape[:-1])
        if target.shape == scored:
            if target.dtype.kind in "iub":
                raise TypeError(
                    f"{name}: target has the scores' shape {scored}, so it holds class probabilities and "
                    f"must be floating, got {target.dtype.name}"
                )
            if options["ignore_index"] is not None:
                raise ValueError(
                    f"{name}: ignore_index must not be given with class probabilities, "
                    f"got {options['ignore_index']}"
                )
            return floating(name, "target", target)
        if target.shape != rows:
            raise ValueError(
                f"{name}: target must have shape {rows}, one class index for each row of scores, or the "
                f"scores' {scored}, for class probabilities; got {target.shape}"
            )
        if target.dtype.kind not in "iu":
            raise TypeError(f"{name}: target must hold integers, got {target.dtype.name}")
        for n in wrt:
            if n in ("target", "weight"):
                raise ValueError(f"{name}: wrt may hold {n!r} only where target holds class probabilities")
        return target
