"""Arrays on CUDA devices as checks and kernels take them, and the queue that a call works with.

A loss checks such arrays as it checks NumPy's, as `DeviceArray`: shape, strides and address, but no element.
Nothing here waits for the device.
"""

import math
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from ..spec import OnDevice, arithmetic_dtype, code_of
from . import binaries, copy, driver, faults, reduce
from .libraries import Library, Location
from .record import VECTOR_BYTES, Recording, Slot

_active = threading.local()


def current_queue() -> "Queue":
    """Return the queue of the call that this thread is in."""
    return _active.queue


class Queue:
    """A stream on a device, and the library that makes arrays there: what one call works with."""

    __slots__ = ("device", "library", "others", "record", "stream")

    def __init__(self, device: int, stream: int, library: Library) -> None:
        self.device, self.stream, self.library = device, stream, library
        self.others: set[int] = set()  # streams of which the call takes arrays
        # What the call does, to be repeated; None of one that cannot be.
        self.record = None if library.look is None else Recording()

    @contextmanager
    def current(self) -> Iterator[None]:
        """Make the device, and this queue, the current one. Other streams' work comes before, or after."""
        api = driver.driver()
        entered = api.enter(self.device)
        before, _active.queue = getattr(_active, "queue", None), self
        try:
            for other in self.others:
                api.wait(self.stream, other)
            yield
            for other in self.others:
                api.wait(other, self.stream)
        finally:
            _active.queue = before
            if entered:
                api.leave()

    def launch(self, grid: tuple[int, int], make: Callable[..., Any], arguments: Any, **request: Any) -> None:
        """Launch the kernels that ``make(cc=..., **request)`` compiles, in order; null stands for None."""
        values = [0 if a is None else a.address if isinstance(a, DeviceArray) else a for a in arguments]
        for kernel in binaries.kernels(self.device, make, **request):
            driver.driver().launch(kernel, *grid, self.stream, values)
            if self.record is not None:
                self.record.steps.append((kernel, *grid, arguments))

    def empty(
        self,
        shape: tuple[int, ...],
        dtype: Any,
        library: Library | None = None,
        axes: tuple[int, ...] | None = None,
    ) -> "DeviceArray":
        """A new array, C-contiguous, or so with its axes in another order."""
        library = library or self.library
        if axes == tuple(range(len(shape))):
            axes = None
        dtype = np.dtype(dtype)
        made = library.empty(shape, dtype, self.device, axes)
        if axes is None:
            location = Location(library.address(made), dtype, shape, None, True, self.device, None)
        else:
            location = library.locate(made)
        array = DeviceArray(location, made, library, self)
        if self.record is not None:
            self.record.made.append(array)
        return array

    def number(self, x: Any, dtype: Any) -> "DeviceArray":
        """A new 0-d array of a number that the host has."""
        made = self.empty((), dtype)
        self.fill(made, x)
        return made

    def array(self, values: np.ndarray) -> "DeviceArray":
        """A new array of what the host has: it is not looked at again, so the call is not repeated."""
        self.record = None
        made = self.empty(values.shape, values.dtype)
        if made.size:
            driver.driver().store(made.address, np.ascontiguousarray(values), self.stream)
        return made

    def fill(self, array: "DeviceArray", x: Any) -> None:
        """Store a number in an array of one element."""
        pattern = np.asarray(x).astype(array.dtype).tobytes()
        driver.driver().fill(array.address, pattern, self.stream)
        if self.record is not None:
            self.record.steps.append((None, pattern, None, (array, None)))

    def slot(self, kind: Any, error: Callable[[int, int], Exception]) -> Slot:
        """Return where a kind of call records its faults: see `Faults.slot`."""
        slot = Slot(faults.faults(self.device).slot(kind, error))
        slot.kind = kind, error
        return slot


class _Interface:
    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


class DeviceArray(OnDevice):
    """An array on a device as a loss's checks see it: what NumPy says of arrays, but their elements.

    What needs those is done on the device, or refused: nothing here reads memory.

    Attributes
    ----------
    owner : object
        The array in the caller's library, if this is no view of it.
    """

    __slots__ = ("_view", "address", "dtype", "library", "location", "owner", "queue", "shape", "size")
    __array_ufunc__ = None
    __iter__ = None

    def __init__(self, location: Location, owner: Any, library: Library, queue: Queue) -> None:
        self.location, self.owner, self.library, self.queue = location, owner, library, queue
        self.dtype, self.shape, self.size = location.dtype, location.shape, math.prod(location.shape)
        self.address = location.address if self.size else 0
        self._view: np.ndarray | None = None

    @property
    def view(self) -> np.ndarray:
        """A NumPy array over the device's memory, of which nothing but shape and strides may be used."""
        if self._view is None:
            p = self.location
            interface = {
                "version": 3,
                "shape": p.shape,
                "typestr": f"|V{p.dtype.itemsize}",
                "data": (p.address or p.dtype.itemsize, not p.writeable),
                "strides": p.strides,
            }
            self._view = np.asarray(_Interface(interface)).view(p.dtype)
        return self._view

    def _viewed(self, view: np.ndarray) -> "DeviceArray":
        address = view.__array_interface__["data"][0]
        p = self.location._replace(address=address, shape=view.shape, strides=view.strides)
        made = DeviceArray(p, self.owner, self.library, self.queue)
        made._view = view
        return made

    ndim = property(lambda self: len(self.shape))
    strides = property(lambda self: self.view.strides)
    itemsize = property(lambda self: self.dtype.itemsize)
    flags = property(lambda self: self.view.flags)

    def __repr__(self) -> str:
        return f"<{self.library.name} array, shape {self.shape}, {self.dtype.name}>"

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise TypeError(f"numbaloss: an element of {self!r} is asked for on the host")

    __array__ = __bool__ = __float__ = __int__ = __len__ = item = tolist = copy = sum = _refuse

    def __getitem__(self, key: Any) -> "DeviceArray":
        keys = key if isinstance(key, tuple) else (key,)
        if not all(k is None or k is Ellipsis or isinstance(k, slice) for k in keys):
            self._refuse()
        return self._viewed(self.view[key])

    def transpose(self, *axes: Any) -> "DeviceArray":
        return self._viewed(self.view.transpose(*axes))

    def reshape(self, *shape: Any) -> "DeviceArray":
        if not self.flags.c_contiguous:
            self._refuse()  # it would be a copy
        return self._viewed(self.view.reshape(*shape))

    def broadcast_to(self, shape: tuple[int, ...]) -> "DeviceArray":
        return self._viewed(np.broadcast_to(self.view, shape))

    def __array_function__(self, function: Any, types: Any, args: Any, kwargs: Any) -> Any:
        if function is np.broadcast_to:
            return self.broadcast_to(args[1])
        if function is np.empty_like:
            return self.empty_like(*args[1:], **kwargs)
        if function in (np.may_share_memory, np.shares_memory, np.ndim, np.shape):
            return function(*(a.view if isinstance(a, DeviceArray) else a for a in args), **kwargs)
        self._refuse()

    def empty_like(
        self, dtype: Any = None, subok: bool = False, shape: tuple[int, ...] | None = None
    ) -> "DeviceArray":
        """A new array: of this one's order of axes, where it is of its shape."""
        axes = None
        if shape is None and not self.flags.c_contiguous:
            axes = tuple(sorted(range(self.ndim), key=lambda k: (-abs(self.strides[k]), k)))
        shape, dtype = self.shape if shape is None else shape, self.dtype if dtype is None else dtype
        return self.queue.empty(shape, dtype, self.library, axes)

    # ---- on the device
    def astype(self, dtype: Any, copy: bool = True) -> "DeviceArray":
        """A C-contiguous copy, or this array where `copy` is false and it is that already."""
        dtype = np.dtype(dtype)
        if not copy and self.dtype == dtype and self.flags.c_contiguous:
            return self
        made = self.queue.empty(self.shape, dtype)
        made.assign(self)
        return made

    def assign(self, source: "DeviceArray") -> None:
        """Copy another array of the same shape here."""
        if not self.size:
            return
        elements = ([s // a.itemsize for s in a.strides] for a in (source, self))
        shape, of_source, of_self = copy.collapse(self.shape, *elements)
        arguments = (source, self, self.size, *shape, *of_source, *of_self)
        self.queue.launch(
            copy.launch(self.size),
            copy.compile_copy,
            arguments,
            dtype=source.dtype,
            to=self.dtype,
            axes=len(shape),
            wide=self.size >= copy.WIDE,
        )


def flat(array: Any, shape: tuple[int, ...], dtype: np.dtype, queue: Queue) -> DeviceArray:
    """An array or a host's number as a C-contiguous array of a shape and dtype."""
    if not isinstance(array, DeviceArray):  # a 0-d array, at most broadcast
        array = queue.number(array.flat[0], dtype)
    if array.shape != shape:
        array = array.broadcast_to(shape)
    return array.astype(dtype, copy=False)


def aligned(arrays: Sequence[Any]) -> bool:
    """Whether all arrays start where vectors may."""
    return not any(a is not None and a.address % VECTOR_BYTES for a in arrays)


def store_sum(queue: Queue, partials: DeviceArray, factor: float, divisor: Any, result: DeviceArray) -> None:
    """Store ``(sum of the partial sums) * factor / divisor``, the divisor a 0-d array or None."""
    widened = {"widened": True} if partials.dtype != arithmetic_dtype(result.dtype) else {}
    queue.launch(
        (1, reduce.FINISH_THREADS),
        reduce.compile_finish,
        (partials, partials.size // 2, factor, divisor, result),
        code=code_of(result.dtype),
        divided=divisor is not None,
        **widened,
    )


def total(
    array: DeviceArray, factor: float, arithmetic: np.dtype, divisor: Any = None, dtype: Any = None
) -> DeviceArray:
    """Return ``sum(array) * factor / divisor``, in an arithmetic dtype no narrower than the array's."""
    queue, same = array.queue, arithmetic_dtype(array.dtype) == arithmetic
    flat = array.astype(array.dtype if same else arithmetic, copy=False)
    result = queue.empty((), arithmetic if dtype is None else dtype)
    grid = reduce.launch(flat.size, arithmetic)
    partials = queue.empty((2 * grid.blocks,), arithmetic)
    queue.launch(
        grid,
        reduce.compile_sums,
        (flat, flat.size, partials),
        code=code_of(flat.dtype),
        vectors=flat.address % VECTOR_BYTES == 0,
    )
    store_sum(queue, partials, factor, divisor, result)
    return result
