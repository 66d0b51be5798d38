"""The family of vectors: each row of two or three arrays gives one term."""

from typing import Any, ClassVar

from ..arrays import as_array, floating
from ..call import RowLoss, Settings, dtypes_of
from ..kernels.spec import Metric, Quick, Vectors, Weighting


class VectorLoss(RowLoss):
    """A loss with one term for each row of two or three arrays of vectors, shape (..., D)."""

    labelled: ClassVar[bool] = False  # whether the last operand holds a label for each row

    @classmethod
    def _metric(cls, options: dict[str, Any]) -> Metric:
        """Return the distance that the kernels compute: what a loss states."""
        raise NotImplementedError

    @classmethod
    def _vector_names(cls) -> tuple[str, ...]:
        return cls._required[: len(cls._required) - cls.labelled]

    @classmethod
    def _differentiable(cls) -> tuple[str, ...]:
        return cls._vector_names()

    @classmethod
    def _record(
        cls, options: dict[str, Any], vectors: Any, labels: Any, weighting: Weighting, *dtypes: Any
    ) -> Vectors:
        return Vectors(
            cls.function.__name__,
            cls._vector_names(),
            vectors,
            labels,
            cls._metric(options),
            options["margin"],
            options.get("swap", False),
            weighting,
            *dtypes,
        )

    @classmethod
    def _quick(cls, settings: Settings, weighting: Weighting) -> Quick | None:
        problem = cls._record(settings.options, (), None, weighting, None, None)
        wrt = tuple(map(problem.names.index, settings.wrt))
        return Quick(problem, settings.mode, wrt, settings.single)

    @classmethod
    def _problem(cls, settings: Settings, call: dict[str, Any], backend: Any) -> Vectors:
        name = cls.function.__name__
        floats: dict[str, Any] = {}
        names = cls._vector_names()
        for n in names:
            floats[n] = floating(name, n, as_array(name, n, call[n]))
            shape = floats[names[0]].shape
            if floats[n].shape != shape:
                raise ValueError(f"{name}: {n} must have {names[0]}'s shape {shape}, got {floats[n].shape}")
        cls._check_shape(shape)
        vectors = tuple(floats.values())
        labels = None
        if cls.labelled:
            label = cls._required[-1]
            labels = as_array(name, label, call[label])
            if labels.shape != shape[:-1]:
                raise ValueError(
                    f"{name}: {label} must have shape {shape[:-1]}, one for each vector, got {labels.shape}"
                )
            if labels.dtype.kind not in "iu":
                labels = floating(name, label, labels)
        weighting = cls._weighting(settings, call, shape[:-1], floats)
        return cls._record(settings.options, vectors, labels, weighting, *dtypes_of(floats))

    @classmethod
    def _check_shape(cls, shape: tuple[int, ...]) -> None:
        if not shape or not shape[-1]:
            first = cls._required[0]
            raise ValueError(
                f"{cls.function.__name__}: {first} must have shape (..., D), D at least 1, got {shape}"
            )
