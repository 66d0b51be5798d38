"""The family of sequences: labels that are not aligned with their frames."""

import math
from typing import Any

import numpy as np

from ..arrays import as_array, floating
from ..call import RowLoss, Settings, dtypes_of
from ..kernels.spec import INT64, Sequences

LENGTHS = "input_lengths", "target_lengths"


class SequenceLoss(RowLoss):
    """A loss with one term for each sequence of frames, log_probs (T, N, C) or (T, C)."""

    differentiable = ("log_probs",)
    _may_be_on_host = LENGTHS

    @classmethod
    def _integers(cls, argument: str, value: Any) -> Any:
        name = cls.function.__name__
        array = as_array(name, argument, value)
        if not array.size and isinstance(value, list | tuple):
            array = array.astype(INT64)  # of no elements NumPy makes floats
        if array.dtype.kind not in "iu":
            raise TypeError(f"{name}: {argument} must hold integers, got {array.dtype.name}")
        return array

    @classmethod
    def _lengths(cls, argument: str, call: dict[str, Any], rows: tuple[int, ...]) -> Any:
        """Return a length for each sequence; kernels find those that cannot be."""
        name = cls.function.__name__
        array = cls._integers(argument, call[argument])
        if array.shape != rows and (rows or array.shape != (1,)):
            wanted = f"{rows}, one for each sequence" if rows else "() or (1,)"
            raise ValueError(f"{name}: {argument} must have shape {wanted}, got {array.shape}")
        return array

    @classmethod
    def _shapes_of_scores(cls, call: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        return {"log_probs": (1, *np.shape(call["input_lengths"]), call.get("blank", 0) + 1)}

    @classmethod
    def _problem(cls, settings: Settings, call: dict[str, Any], backend: Any) -> Sequences:
        name, blank = cls.function.__name__, settings.options["blank"]
        x = floating(name, "log_probs", as_array(name, "log_probs", call["log_probs"]))
        if x.ndim not in (2, 3) or not x.shape[-1]:
            raise ValueError(
                f"{name}: log_probs must have shape (T, N, C) or (T, C), C at least 1, got {x.shape}"
            )
        rows, classes = x.shape[1:-1], x.shape[-1]
        if not 0 <= blank < classes:
            raise ValueError(f"{name}: blank must be a class, in [0, {classes}), got {blank}")
        targets = cls._integers("targets", call["targets"])
        batch = math.prod(rows)
        if targets.ndim not in (1, 2) or (targets.ndim == 2 and targets.shape[0] != batch):
            wanted = f"({batch}, S), or one axis with all sequences' labels" if rows else "(S) or (1, S)"
            raise ValueError(f"{name}: targets must have shape {wanted}, got {targets.shape}")
        frames, labels = (cls._lengths(n, call, rows) for n in LENGTHS)
        floats = {"log_probs": x}
        weighting = cls._weighting(settings, call, rows, floats)
        return Sequences(
            name,
            x,
            targets,
            frames,
            labels,
            blank,
            settings.options["zero_infinity"],
            weighting,
            rows,
            *dtypes_of(floats),
        )
