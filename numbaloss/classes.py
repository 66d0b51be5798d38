"""The families of class scores: each row of scores, with its class or classes, gives one term."""

import math
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import numpy as np

from . import dispatch, memory
from .arguments import class_rows
from .dispatch import FLOAT32, FLOAT64
from .elementwise import LARGE
from .kernels.cpu import threads
from .loss import GRAD, MISSING, VALUE, VALUE_GRAD_HESS, Recipe, call_arguments, resolve_wrt
from .rows import RowLoss, Terms, workers

INT64 = np.dtype(np.int64)


class Quick(NamedTuple):
    """What a quick call's options come to."""

    settings: tuple[int, float, float, float]  # as the kernel takes them
    gradient: bool


class Problem(NamedTuple):
    """A checked call."""

    input: np.ndarray
    target: np.ndarray
    probable: bool  # the target holds probabilities, not indices
    weight: np.ndarray | None
    terms: Terms
    dtype: np.dtype  # that the arrays promote to
    arithmetic: np.dtype


class ClassLoss(RowLoss):
    """A loss with one term for each row of class scores.

    Scores are (C), (N, C) or (N, C, d1, ...); a class index, or a distribution, belongs to each row.
    """

    takes_probabilities: ClassVar[bool] = False

    # ---- what a loss states ------------------------------------------------------------------------
    # Scores from which two threads beat one.
    _parallel_from: ClassVar[int]

    @classmethod
    def _kernel(cls, plain: bool, dtype: np.dtype, parallel: bool) -> Any:
        """The kernel with arithmetic in one dtype: of all calls, or of the `plain` ones that are quick."""
        raise NotImplementedError

    @classmethod
    def _extents(cls, shape: tuple[int, ...], target: tuple[int, ...]) -> tuple[int, ...] | None:
        """Batch, classes and inner positions as the plain kernel takes them; None where it does not serve."""
        if len(shape) < 2 or target != shape[:1] + shape[2:]:
            return None
        return shape[0], shape[1], math.prod(shape[2:])

    @classmethod
    def _settings(cls, options: dict[str, Any], factor: float, divisor: float) -> Any:
        """Options, the gradient's factor and what the mean divides by, as the kernels take them."""
        raise NotImplementedError

    @classmethod
    def _evaluate_quick(cls, mode: str, recipe: Recipe, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Contiguous scores, int64 indices, no weights, a reduced value."""
        settings = (*args[2:], *[kwargs[k] for k in recipe.keys]) if recipe.keys else args[2:]
        try:
            plan = recipe.plans.get(settings, MISSING)
        except TypeError:  # not hashable, so not right
            return MISSING
        if plan is MISSING:
            plan = recipe.plans[settings] = cls._plan_quick(mode, call_arguments(recipe, args, kwargs))
        x, y = args[:2]
        if plan is not None and x.__class__ is not np.ndarray and dispatch.is_device_array(x):
            from . import device_classes  # on the first call with an array on a device

            return device_classes.quick(cls, mode, plan, x, y, kwargs.get("out"))
        if plan is None or x.__class__ is not np.ndarray or y.__class__ is not np.ndarray:
            return MISSING
        dtype, shape, size = x.dtype, x.shape, x.size
        extents = cls._extents(shape, y.shape)
        if (
            extents is None
            or (dtype is not FLOAT32 and dtype is not FLOAT64)
            or y.dtype is not INT64
            or not size
            or not x.flags.carray
            or not y.flags.carray
        ):
            return MISSING
        out = None
        if plan.gradient:
            out = kwargs.get("out")
            if out is None:
                out = np.empty(shape, dtype) if size < LARGE else memory.empty(shape, dtype)
            elif out is not x and (
                out.__class__ is not np.ndarray
                or out.dtype is not dtype
                or out.shape != shape
                or not out.flags.carray
                or np.may_share_memory(out, x)
                or np.may_share_memory(out, y)
            ):
                return MISSING
        flat = x.reshape(-1)
        into = flat[:0] if out is None else flat if out is x else out.reshape(-1)
        arguments = (flat, y.reshape(-1), into, extents, plan.settings, workers())
        value, wrong = cls._run_kernel(True, dtype, size, arguments)
        if wrong >= 0:
            return MISSING
        if mode == VALUE:
            return dtype.type(value)
        return out if mode == GRAD else (dtype.type(value), out)

    @classmethod
    def _plan_quick(cls, mode: str, call: dict[str, Any]) -> Quick | None:
        """What the options come to; None where a quick call does not serve."""
        if mode == VALUE_GRAD_HESS:
            return None
        options = cls._options_of(call)
        if options["reduction"] == "none":
            return None
        if mode != VALUE and resolve_wrt(cls, call.get("wrt")) != (("input",), True):
            return None
        divisor = math.nan if options["reduction"] == "mean" else 1.0
        return Quick(cls._settings(options, 1.0, divisor), mode != VALUE)

    @classmethod
    def _run_kernel(cls, plain: bool, dtype: np.dtype, size: int, arguments: tuple[Any, ...]) -> Any:
        def kernel(parallel: bool) -> Callable[[], Any]:
            return lambda: cls._kernel(plain, dtype, parallel)

        if size < cls._parallel_from:
            return cls._kernel(plain, dtype, False)(*arguments)
        return threads.run(kernel(False), kernel(True), arguments)

    @classmethod
    def _check(cls, call: dict[str, Any], options: dict[str, Any], wrt: tuple[str, ...]) -> Problem:
        """A call's arrays: libraries, dtypes, shapes, and what the mean divides by."""
        name = cls.function.__name__
        x = dispatch.floating(name, "input", dispatch.as_array(name, "input", call["input"]))
        target = dispatch.as_array(name, "target", call["target"])
        if not x.ndim:
            raise ValueError(f"{name}: input must have shape (C), (N, C) or (N, C, d1, ...), got ()")
        classes, rows = x.shape[min(1, x.ndim - 1)], class_rows(x.shape)
        if not classes:
            raise ValueError(f"{name}: input must have at least one class, got shape {x.shape}")
        probable = cls.takes_probabilities and target.shape == x.shape
        if probable:
            if target.dtype.kind in "iub":
                raise TypeError(
                    f"{name}: target has the input's shape {x.shape}, so it holds class probabilities and "
                    f"must be floating, got {target.dtype.name}"
                )
            target = dispatch.floating(name, "target", target)
            if options["ignore_index"] >= 0:
                raise ValueError(
                    f"{name}: ignore_index must not be given with class probabilities, "
                    f"got {options['ignore_index']}"
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
            if n != "input" and not probable:
                raise ValueError(f"{name}: wrt may hold {n!r} only where target holds class probabilities")
        if "weight" in wrt and call.get("weight") is None:
            raise ValueError(f"{name}: wrt names 'weight', which is not given")

        floats = {"input": x} | ({"target": target} if probable else {})
        weight = cls._weak("weight", call, floats, wrt)
        if weight is not None and weight.shape != (classes,):
            raise ValueError(
                f"{name}: weight must have shape ({classes},), one per class, got {weight.shape}"
            )
        terms = cls._terms(call, options, rows, floats)
        dtype = dispatch.common_dtype([a.dtype for a in floats.values()])
        arithmetic = dispatch.arithmetic_dtype(dtype)
        return Problem(x, target, probable, weight, terms, dtype, arithmetic)

    @classmethod
    def _check_curvature(cls, options: dict[str, Any], wrt: tuple[str, ...]) -> None:
        if wrt != ("input",):
            got = wrt[0] if len(wrt) == 1 else wrt
            raise ValueError(f"{cls.function.__name__}: value_grad_hess takes wrt='input', got {got!r}")

    @classmethod
    def _refuse_index(cls, p: Problem, position: tuple[int, ...]) -> None:
        at = f"[{', '.join(map(str, position))}]" if position else ""
        raise IndexError(
            f"{cls.function.__name__}: target{at} is {p.target[position]}, but input has "
            f"{p.input.shape[min(1, p.input.ndim - 1)]} classes"
        )


class Axes:
    """The axes of scores, sorted by their strides: in C order where some order of the axes is."""

    def __init__(self, arrays: list[np.ndarray]) -> None:
        ndim = arrays[0].ndim
        self.order = tuple(range(ndim))
        if ndim > 1 and not all(a.flags.c_contiguous for a in arrays):
            size = [sum(abs(a.strides[k]) for a in arrays) for k in range(ndim)]
            self.order = tuple(sorted(range(ndim), key=lambda k: (-size[k], k)))
        axis = min(1, ndim - 1)
        self.position = self.order.index(axis)
        self.shape = tuple(arrays[0].shape[k] for k in self.order)
        self.rows = tuple(k - (k > axis) for k in self.order if k != axis)
        self.row_shape = tuple(arrays[0].shape[k] for k in self.order if k != axis)

    @property
    def extents(self) -> tuple[int, int, int]:
        k = self.position
        return math.prod(self.shape[:k]), self.shape[k], math.prod(self.shape[k + 1 :])

    def flat(self, rows: np.ndarray, dtype: np.dtype) -> np.ndarray:
        """An array over rows, in the order in which they are visited."""
        if rows.dtype.kind == "u" and dtype == INT64 and rows.dtype.itemsize == 8:
            rows = np.minimum(rows, np.uint64(2**63 - 1))  # no class has that index, nor is it ignored
        flat = rows.transpose(self.rows).reshape(-1)
        return dispatch._writeable(np.ascontiguousarray(flat, dtype))

    def unflat(self, terms: np.ndarray) -> np.ndarray:
        """The terms by their row's place."""
        inverse = np.argsort(self.rows) if self.rows else ()
        return terms.reshape(self.row_shape).transpose(inverse)

    def place(self, row: int) -> tuple[int, ...]:
        """Where a row is, that was visited so late."""
        index = np.unravel_index(row, self.row_shape) if self.row_shape else ()
        return tuple(int(index[self.rows.index(k)]) for k in range(len(self.rows)))

    def optional(self, rows: np.ndarray | None, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """An array that broadcasts to the rows; empty for none."""
        return np.empty(0, dtype) if rows is None else self.flat(np.broadcast_to(rows, shape), dtype)
