"""The family of vectors: each row of two or three arrays gives one term."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import numpy as np

from .. import arguments
from ..arguments import Interval, Operand, numbers_of_rows, scores
from ..arrays import as_array, floating, is_weak
from ..call import RowLoss, Settings, dtypes_of
from ..kernels import inside
from ..kernels.spec import OF_CURVATURES, Distance, VectorFunctions, Vectors
from ..loss import plain_function

MOST_SUMS, MOST_ROW_ARRAYS, MOST_OPTIONS = 6, 4, 28


class VectorLoss(RowLoss):
    """A loss with one term for each row of two or three arrays of vectors: define ``terms`` and ``finish``.

    ``terms(anchor, positive, negative, <options>)`` takes one coordinate of each vector, and gives the
    numbers that are added up over the row: a tuple, or one number. ``finish(<sums>, <row arrays>,
    <options>)`` turns the sums into the row's value. Its parameters after the sums that are no fields are
    arrays of one number for each row. Both are ordinary arithmetic and the functions of ``numbaloss.math``;
    the derivatives are derived. ``check(<options>)``, where there is one, raises a ValueError for options
    that do not go together.

    Attributes
    ----------
    domains : dict
        Operands by name (see ``numbaloss.arguments``) where the default, any number, does not fit.
    labels : tuple of str
        Row arrays that are not differentiated, and whose dtype the result does not depend on.
    homogeneous : int, optional
        The power of r by which the value grows when the vectors, and the options named in `lengths`, grow by
        r: 0, 1 or 2. Rows whose sums overflow or underflow are then scaled.
    lengths : tuple of str
        Options that scale as the vectors do.
    vectors : tuple of str
        Of a definition that takes distances in place of sums of terms, the vectors' names.
    """

    domains: ClassVar[dict[str, Operand]] = {}
    labels: ClassVar[tuple[str, ...]] = ()
    homogeneous: ClassVar[int | None] = None
    lengths: ClassVar[tuple[str, ...]] = ()
    vectors: ClassVar[tuple[str, ...]] = ()
    terms: ClassVar[Callable[..., Any] | None] = None
    finish: ClassVar[Callable[..., Any]]
    # The distance that stands for terms, see `spec.Distance`; or a function of options that gives it.
    distance: ClassVar[Any] = None
    named_distances: ClassVar[dict[str, Distance]] = {}  # where an option names one, for compiled code
    most_axes: ClassVar[int | None] = None

    _rows: ClassVar[tuple[str, ...]] = ()  # the row arrays
    _functions: ClassVar[VectorFunctions]

    @classmethod
    def _complete(cls) -> bool:
        return hasattr(cls, "finish") and (cls.terms is not None or bool(cls.vectors))

    @classmethod
    def _prepare(cls) -> None:
        if "reduction" not in cls.fields:
            cls.fields = {**cls.fields, "reduction": arguments.reduction()}
        terms, finish = plain_function(cls, "terms"), plain_function(cls, "finish")
        asked: list[str] = []
        if terms is not None:
            names = list(inspect.signature(terms).parameters)
            cls.vectors = tuple(n for n in names if n not in cls.fields)
            asked = names[len(cls.vectors) :]
            if tuple(names[: len(cls.vectors)]) != cls.vectors or not 2 <= len(cls.vectors) <= 3:
                raise TypeError(
                    f"{cls.__name__}.terms must take a coordinate of two or three vectors, then options; got "
                    f"{', '.join(names)}"
                )
        sums = len(cls.vectors) - 1 if terms is None else cls._count_sums(terms, asked)
        names = list(inspect.signature(finish).parameters)
        if len(names) < sums or any(n in cls.fields for n in names[:sums]):
            raise TypeError(
                f"{cls.__name__}.finish must take {sums} sum(s) first, one for each number that terms gives; "
                f"got {', '.join(names)}"
            )
        cls._rows = tuple(n for n in names[sums:] if n not in cls.fields)
        asked += [n for n in names[sums:] if n in cls.fields]
        options = tuple(n for n in cls.fields if n in asked)
        if set(cls._rows) & set(cls.vectors):
            raise TypeError(f"{cls.__name__}.finish takes a vector: {', '.join(names)}")
        for n in options:
            if not isinstance(cls.fields[n].default, bool | int | float):
                raise TypeError(f"{cls.__name__}: {n} must be a number or a bool for terms and finish")
        for what, count, most in (
            ("sums", sums, MOST_SUMS),
            ("row arrays", len(cls._rows), MOST_ROW_ARRAYS),
            ("options", len(options), MOST_OPTIONS),
        ):
            if count > most:
                raise TypeError(f"{cls.__name__} has {count} {what}, at most {most} are possible")
        defaults = {n: scores() for n in cls.vectors} | {n: numbers_of_rows() for n in cls._rows}
        cls.operands = {n: cls.domains.get(n, default) for n, default in defaults.items()}
        cls._required = tuple(cls.operands)
        cls.differentiable = (*cls.vectors, *(n for n in cls._rows if n not in cls.labels))
        cls._functions = VectorFunctions(
            "", len(cls.vectors), terms, finish, sums, cls._rows, options, (), cls.homogeneous, cls.lengths
        )
        cls._stated = ("finish",) if terms is None else ("terms", "finish")
        cls._curved = terms is not None
        shapes = ((3,), (1, 2), (2, 3, 4), (0, 3))
        cls._shapes = tuple(s for s in shapes if cls.most_axes is None or len(s) <= cls.most_axes)

    @classmethod
    def _definition(cls, flags: tuple[bool | None, ...] = ()) -> VectorFunctions:
        """Return the definition as kernels take it, with the options that they are compiled for."""
        stated = {n: cls._function(n) for n in cls._stated}
        return cls._functions._replace(name=cls.function.__name__, flags=flags, **stated)

    @classmethod
    def _count_sums(cls, terms: Callable[..., Any], options: list[str]) -> int:
        """Return how many numbers `terms` gives: it is run once, as plain Python."""
        for n in options:
            if n not in cls.fields:
                raise TypeError(f"{cls.__name__}.terms must take the vectors first, then options; got {n}")
        values = [np.float64(x) for x in (0.5, 0.25, 0.75)[: len(cls.vectors)]]
        try:
            with np.errstate(all="ignore"):
                found = terms(*values, *[cls.fields[n].default for n in options])
        except Exception as error:
            raise TypeError(f"{cls.__name__}.terms fails for plain numbers: {error}") from error
        return len(found) if isinstance(found, tuple) else 1

    @classmethod
    def _settings(cls, mode: str, call: Mapping[str, Any]) -> Settings:
        settings = super()._settings(mode, call)
        if mode in OF_CURVATURES:
            cls._check_curvature(settings.options, settings.wrt)
            if not settings.single:
                raise ValueError(
                    f"{cls.function.__name__}: value_grad_hess takes one name in wrt, got {settings.wrt!r}"
                )
        return settings

    @classmethod
    def _check_curvature(cls, options: dict[str, Any], wrt: tuple[str, ...]) -> None:
        if not cls._curved:
            super()._check_curvature(options, wrt)

    @classmethod
    def _distance(cls, options: dict[str, Any]) -> Distance | None:
        """Return the distance with a call's options; None of a definition by terms."""
        if cls.terms is not None:
            return None
        distance: Any = plain_function(cls, "distance")
        if isinstance(distance, Distance):
            return distance
        return distance(**{n: options[n] for n in inspect.signature(distance).parameters})

    @classmethod
    def _shapes_of_scores(cls, call: dict[str, Any]) -> dict[str, tuple[int, ...]]:
        first, *_ = cls._counted_by()
        shape = np.shape(call[first])
        rows = shape[:-1] if first in cls.vectors else shape
        vectors = shape if first in cls.vectors else (*shape, 1)
        return dict.fromkeys(cls.vectors, vectors) | dict.fromkeys(cls._rows, rows)

    # ---- the call ----------------------------------------------------------------------------------
    @classmethod
    def _problem(cls, settings: Settings, call: dict[str, Any], backend: Any) -> Vectors:
        name = cls.function.__name__
        floats: dict[str, Any] = {}
        for n in cls.vectors:
            floats[n] = floating(name, n, as_array(name, n, call[n]))
            shape = floats[cls.vectors[0]].shape
            if floats[n].shape != shape:
                first = cls.vectors[0]
                raise ValueError(f"{name}: {n} must have {first}'s shape {shape}, got {floats[n].shape}")
        cls._check_shape(shape)
        vectors = tuple(floats.values())
        rows = tuple(cls._row_array(n, shape[:-1], settings, call, floats) for n in cls._rows)
        weighting = cls._weighting(settings, call, shape[:-1], floats)
        values = [settings.options[n] for n in cls._functions.options]
        functions = cls._definition(tuple(v if isinstance(v, bool) else None for v in values))
        numbers = tuple(float(v) for v in values if not isinstance(v, bool))
        distance = cls._distance(settings.options)
        return Vectors(
            name, functions, numbers, vectors, cls.vectors, rows, distance, weighting, *dtypes_of(floats)
        )

    @classmethod
    def _check_shape(cls, shape: tuple[int, ...]) -> None:
        name, first = cls.function.__name__, cls.vectors[0]
        if not shape or not shape[-1]:
            raise ValueError(f"{name}: {first} must have shape (..., D), D at least 1, got {shape}")
        if cls.most_axes is not None and len(shape) > cls.most_axes:
            raise ValueError(f"{name}: {first} must have shape (N, D) or (D), got {shape}")

    @classmethod
    def _row_array(
        cls,
        argument: str,
        shape: tuple[int, ...],
        settings: Settings,
        call: dict[str, Any],
        floats: dict[str, Any],
    ) -> Any:
        """Return an array of one number for each row; it joins `floats`, unless it promotes no float."""
        name = cls.function.__name__
        array = as_array(name, argument, call[argument])
        if array.shape != shape:
            raise ValueError(
                f"{name}: {argument} must have shape {shape}, one for each vector, got {array.shape}"
            )
        if argument in settings.wrt or not (argument in cls.labels or is_weak(array, call[argument])):
            array = floats[argument] = floating(name, argument, array)
            return array
        if array.dtype.kind == "b":
            return array.astype(np.int8)
        if array.dtype.kind not in "iu":
            return floating(name, argument, array)
        if not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        return array if array.flags.aligned else array.copy()

    # ---- inside compiled code ----------------------------------------------------------------------
    @classmethod
    def _jit(cls) -> Any:
        fields = {n: f for n, f in cls.fields.items() if not f.array}
        return inside.of_vectors(
            cls._definition(),
            cls.vectors,
            (*cls._required, *fields, "out"),
            (*(f.default for f in fields.values()), None),
            {n: f.domain for n, f in fields.items() if isinstance(f.domain, Interval)},
            cls._distance({n: f.default for n, f in fields.items()}),
            tuple(cls.named_distances.items()),
            cls.most_axes,
        )
