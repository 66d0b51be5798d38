"""What the losses with a term for each row share on CUDA devices."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import device, dispatch, launcher
from .device import DeviceArray, Queue
from .device_elementwise import over, owner

# ``compute(cls, checked call, options, outputs, queue)`` writes the outputs and gives the value.
Compute = Callable[[Any, Any, dict[str, Any], dict[str, Any], Queue], Any]


def run(cls: Any, mode: str, call: dict[str, Any], compute: Compute) -> Any:
    """A call with arrays on a device."""
    described, queue = device.begin(cls.function.__name__, call)
    with queue.current():
        result = cls._evaluate_call(
            mode, described, lambda p, options, outputs: compute(cls, p, options, outputs, queue)
        )
    return owner(result)


class Rows:
    """The rows of a call: their order, and what multiplies and divides their terms.

    `arrays` are those that have the rows' elements, the first operand first; `shape` is the terms'.
    """

    def __init__(
        self,
        p: Any,
        options: dict[str, Any],
        arrays: list[Any],
        shape: tuple[int, ...],
        axes: Any,
        queue: Queue,
    ) -> None:
        self.queue, self.axes, self.arithmetic, self.dtype = queue, axes, p.arithmetic, p.dtype
        self.reduction, self.shape, self.count = options["reduction"], shape, math.prod(shape)
        # Elements of one dtype are computed on as they are, if their arithmetic is the call's.
        storage = arrays[0].dtype
        if (
            any(a.dtype != storage for a in arrays)
            or dispatch.arithmetic_dtype(storage) != p.arithmetic
            or (self.reduction == "none" and storage != p.dtype)
        ):
            storage = p.arithmetic
        self.storage, self.code = storage, dispatch.code_of(storage)
        self.sample_weight = self.over_rows(p.terms.sample_weight, p.arithmetic)
        up = p.terms.upstream
        self.scaled_by = up if up is not None and not up.ndim else None
        self.upstream = self.over_rows(up if self.scaled_by is None else None, p.arithmetic)
        self.factor, self.normalizer = p.terms.factor, p.terms.normalizer

    def over_rows(self, array: Any, dtype: np.dtype) -> DeviceArray | None:
        """An optional array over rows, flat, in the order in which they are visited."""
        if isinstance(array, DeviceArray):
            array = np.broadcast_to(array, self.shape).transpose(self.axes.rows)
            return device.flat(array, array.shape, dtype, self.queue).reshape(-1)
        return None if array is None else device.flat(array, (self.count,), dtype, self.queue)

    def straight(self, array: Any) -> Any:
        """An array of scores, or None, C-contiguous in the order of axes and of the storage."""
        if array is None:
            return None
        array = array.transpose(self.axes.order)
        return device.flat(array, array.shape, self.storage, self.queue)

    def written(self, array: Any) -> Any:
        """What a kernel writes for an output, or None: the output itself where it can be."""
        if array is None:
            return None
        array = array.transpose(self.axes.order)
        if array.dtype == self.storage and array.flags.c_contiguous:
            return array
        return self.queue.empty(array.shape, self.storage)

    def deliver(self, array: Any, written: Any) -> None:
        """Copy what a kernel wrote to the output that it is for."""
        if array is not None:
            array = array.transpose(self.axes.order)
            if array.address != written.address:
                array.assign(written)

    def terms(self) -> DeviceArray | None:
        """An array for the terms, where they are asked for."""
        if self.reduction != "none":
            return None
        return self.queue.empty(self.shape, self.dtype, axes=self.axes.rows)

    def divisors(self, counted: Callable[[], DeviceArray] | None = None) -> tuple[float, DeviceArray | None]:
        """What the mean divides by: a number, times what the data make it, if anything.

        That is what `counted` gives, or without it the number of rows, each of its sample weight.
        """
        if self.reduction != "mean":
            return 1.0, None
        if self.normalizer is not None:
            return self.normalizer, None
        if counted is not None:
            return 1.0, counted()
        if self.sample_weight is None:
            return float(self.count), None
        return 1.0, self.sample_weight.total(1.0, self.arithmetic)

    def finish(self, partials: DeviceArray | None, divisor: float, by: DeviceArray | None) -> DeviceArray:
        """The value, from the terms' partial sums (None: there is no row)."""
        value = self.queue.empty((), self.dtype)
        if partials is None:
            self.queue.fill(value, math.nan if self.reduction == "mean" and self.normalizer is None else 0.0)
        else:
            device.finish(self.queue, partials, 1.0 / divisor, by, value)
        return value

    def gradients_by(self, by: DeviceArray | None) -> DeviceArray | None:
        """What gradients are divided by, beside a number."""
        return over(by, self.scaled_by, self.arithmetic, self.queue)


def shape_free(plan: Any) -> Any:
    """A plan without what no kernel is compiled for: the number of rows."""
    return plan._replace(blocks=0, partials=0, deal=min(plan.deal, 1))


class InOrder:
    """Axes as they are, of which the last is a row's, or so many are those of the rows."""

    def __init__(self, ndim: int, rows: int | None = None) -> None:
        self.order, self.rows = tuple(range(ndim)), tuple(range(ndim - 1 if rows is None else rows))


def whole_vectors(classes: int, inner: int, dtype: np.dtype) -> bool:
    """Whether every row, or row of inner positions, starts where a vector may if the first does."""
    return (inner if inner > 1 else classes) * dtype.itemsize % device.VECTOR_BYTES == 0


def index_error(name: str, index: tuple[int, ...], label: int, classes: int, of: str = "input") -> IndexError:
    most = launcher.templates("target").FAULT_MOST
    at = f"[{', '.join(map(str, index))}]" if index else ""
    said = f"{label}" if abs(label) < most else f"{label} or {'above' if label > 0 else 'below'}"
    return IndexError(f"{name}: target{at} is {said}, but {of} has {classes} classes")
