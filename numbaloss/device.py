"""Arrays on CUDA devices: CuPy's, PyTorch's, Numba's, and any other with ``__cuda_array_interface__``.

A loss checks such arrays as it checks NumPy's, as `DeviceArray`: shape, strides and address, but no element.
Kernels are compiled when first asked for, kept on disk, and launched on the caller's stream. Nothing here
waits for the device but :func:`synchronize`. The array libraries are never imported: they are used where the
caller's array is one of theirs.
"""

import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from . import dispatch, launcher

# Whether every call that checks values waits for its kernels and raises at once, as a call on the CPU does.
# It costs a synchronisation a call: for debugging. Set it here, or in the environment.
SYNCHRONOUS = os.environ.get("NUMBALOSS_CUDA_SYNCHRONOUS", "0") not in ("", "0")

VECTOR_BYTES = 16  # to which the arrays of a kernel with vectors are aligned


# ---- libraries ----------------------------------------------------------------------------------------


class Place(NamedTuple):
    """Where an array lies."""

    address: int
    dtype: np.dtype
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # in bytes; None where contiguous
    writeable: bool
    device: int | None  # None where only the driver knows
    stream: int | None  # on which the library says it is ready


class Library:
    """An array library: how its arrays are read, and how new ones are made.

    This one takes what ``__cuda_array_interface__`` says, and makes Numba's device arrays.
    """

    name = "numba"
    # Whether its arrays must be used on its own stream, or after that.
    ordered = False

    def place(self, x: Any) -> Place:
        said = x.__cuda_array_interface__
        if said.get("mask") is not None:
            raise TypeError("has a mask; pass its data, and the mask as sample_weight")
        address, readonly = said["data"]
        shape, strides = tuple(said["shape"]), said.get("strides")
        dtype = np.dtype(said["typestr"])
        return Place(
            address or 0,
            dtype,
            shape,
            None if strides is None else tuple(strides),
            not readonly,
            None,
            said.get("stream"),
        )

    def stream(self, device: int, place: Place | None = None) -> int:
        """The stream that the caller's work is on."""
        return 0 if place is None else place.stream or 0

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype, device: int, axes: tuple[int, ...] | None = None
    ) -> Any:
        """A new array, C-contiguous, or so with its axes in another order; its device is the current one."""
        from numba import cuda

        if dtype.kind == "V":
            raise TypeError(f"Numba has no arrays of {dtype.name}")
        axes = axes or tuple(range(len(shape)))
        strides = _strides([shape[k] for k in axes], dtype.itemsize)
        return cuda.device_array(shape, dtype, strides=tuple(strides[k] for k in np.argsort(axes)))

    # For quick calls: address, dtype, shape, device, and whether it is an ordinary, contiguous array. None
    # where the library does not tell quickly.
    look: Callable[[Any], tuple[int, Any, tuple[int, ...], int, bool]] | None = None

    def address(self, x: Any) -> int:
        return x.__cuda_array_interface__["data"][0]


class CuPy(Library):
    name = "cupy"
    ordered = True

    def place(self, x: Any) -> Place:
        return Place(x.data.ptr, x.dtype, x.shape, x.strides, True, x.data.device_id, None)

    def stream(self, device: int, place: Place | None = None) -> int:
        return sys.modules["cupy"].cuda.get_current_stream(device).ptr

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype, device: int, axes: tuple[int, ...] | None = None
    ) -> Any:
        cupy = sys.modules["cupy"]
        if axes is not None:
            made = self.empty(tuple(shape[k] for k in axes), dtype, device)
            return made.transpose(np.argsort(axes).tolist())
        if cupy.cuda.runtime.getDevice() == device:
            return cupy.empty(shape, dtype)
        with cupy.cuda.Device(device):
            return cupy.empty(shape, dtype)

    def address(self, x: Any) -> int:
        return x.data.ptr

    def look(self, x: Any) -> tuple[int, Any, tuple[int, ...], int, bool]:
        data = x.data
        return data.ptr, x.dtype, x.shape, data.device_id, x.flags.c_contiguous


class Torch(Library):
    name = "torch"
    ordered = True

    def __init__(self) -> None:
        torch = sys.modules["torch"]
        names = ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool")
        self.dtypes = {getattr(torch, n): np.dtype(n) for n in names}
        for n in ("uint16", "uint32", "uint64"):
            if hasattr(torch, n):
                self.dtypes[getattr(torch, n)] = np.dtype(n)
        self.bfloat16 = torch.bfloat16
        self.kinds = {v: k for k, v in self.dtypes.items()}

    def dtype(self, kind: Any) -> np.dtype:
        """A NumPy dtype for one of PyTorch's; bfloat16 is one of ml_dtypes."""
        if kind not in self.dtypes and kind is self.bfloat16:
            try:
                import ml_dtypes
            except ImportError:
                raise TypeError("is bfloat16, which needs ml_dtypes: pip install ml_dtypes") from None
            self.dtypes[kind] = np.dtype(ml_dtypes.bfloat16)
            self.kinds[self.dtypes[kind]] = kind
        if kind not in self.dtypes:
            raise TypeError(f"must be float64, float32, float16 or bfloat16, got {kind}")
        return self.dtypes[kind]

    def place(self, x: Any) -> Place:
        if x.requires_grad:
            raise TypeError("requires grad, which numbaloss does not record; pass tensor.detach()")
        if x.layout != sys.modules["torch"].strided or x.is_neg():
            raise TypeError("must be a dense tensor; pass tensor.to_dense() or tensor.resolve_neg()")
        dtype = self.dtype(x.dtype)
        strides = tuple(dtype.itemsize * s for s in x.stride())
        return Place(x.data_ptr(), dtype, tuple(x.shape), strides, True, x.device.index, None)

    def stream(self, device: int, place: Place | None = None) -> int:
        return sys.modules["torch"].cuda.current_stream(device).cuda_stream

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype, device: int, axes: tuple[int, ...] | None = None
    ) -> Any:
        torch = sys.modules["torch"]
        if axes is not None:
            made = self.empty(tuple(shape[k] for k in axes), dtype, device)
            return made.permute(np.argsort(axes).tolist())
        return torch.empty(shape, dtype=self.kinds[dtype], device=torch.device("cuda", device))

    def address(self, x: Any) -> int:
        return x.data_ptr()

    def look(self, x: Any) -> tuple[int, Any, tuple[int, ...], int, bool]:
        plain = x.is_contiguous() and not x.requires_grad and not x.is_neg()
        return x.data_ptr(), self.dtypes.get(x.dtype), tuple(x.shape), x.get_device(), plain


LIBRARIES: dict[str, type[Library]] = {"cupy": CuPy, "torch": Torch}


@cache
def library_of(kind: type) -> Library:
    """The library of a type of arrays, by the module that it or a base of it is from."""
    modules = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return library(next((m for m in modules if m in LIBRARIES), ""))


@cache
def library(module: str) -> Library:
    return LIBRARIES.get(module, Library)()


# ---- queues and arrays --------------------------------------------------------------------------------


class Queue:
    """A stream on a device, and the library that makes arrays there: what one call works with."""

    __slots__ = ("device", "library", "others", "stream")

    def __init__(self, device: int, stream: int, library: Library) -> None:
        self.device, self.stream, self.library = device, stream, library
        self.others: set[int] = set()  # streams of which the call takes arrays

    @contextmanager
    def current(self) -> Iterator[None]:
        """While the device is the current one. What other streams were given comes before, or after."""
        driver = launcher.driver()
        entered = driver.enter(self.device)
        try:
            for other in self.others:
                driver.wait(self.stream, other)
            yield
            for other in self.others:
                driver.wait(other, self.stream)
        finally:
            if entered:
                driver.leave()

    def launch(self, grid: tuple[int, int], make: Callable[..., Any], arguments: Any, **request: Any) -> None:
        """Launch the kernels that ``make(cc=..., **request)`` compiles, in order; null stands for None."""
        values = [0 if a is None else a.address if isinstance(a, DeviceArray) else a for a in arguments]
        for kernel in launcher.kernels(self.device, make, **request):
            launcher.driver().launch(kernel, *grid, self.stream, values)

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
            place = Place(library.address(made), dtype, shape, None, True, self.device, None)
        else:
            place = library.place(made)
        return DeviceArray(place, made, library, self)

    def number(self, x: Any, dtype: Any) -> "DeviceArray":
        """A new 0-d array of a number that the host has."""
        made = self.empty((), dtype)
        self.fill(made, x)
        return made

    def array(self, values: np.ndarray) -> "DeviceArray":
        """A new array of what the host has."""
        made = self.empty(values.shape, values.dtype)
        if made.size:
            launcher.driver().store(made.address, np.ascontiguousarray(values), self.stream)
        return made

    def fill(self, array: "DeviceArray", x: Any) -> None:
        """Store a number in an array of one element."""
        launcher.driver().fill(array.address, np.asarray(x).astype(array.dtype).tobytes(), self.stream)


class _Interface:
    def __init__(self, interface: dict[str, Any]) -> None:
        self.__array_interface__ = interface


def _strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Of a C-contiguous array."""
    return tuple(itemsize * math.prod(shape[k + 1 :]) for k in range(len(shape)))


class DeviceArray(dispatch.OnDevice):
    """An array on a device as a loss's checks see it: what NumPy says of arrays, but their elements.

    What needs those is done on the device, or refused: nothing here reads memory.

    Attributes
    ----------
    owner : object
        The array in the caller's library, if this is no view of it.
    """

    __slots__ = ("_view", "address", "dtype", "library", "owner", "place", "queue", "shape", "size")
    __array_ufunc__ = None
    __iter__ = None

    def __init__(self, place: Place, owner: Any, library: Library, queue: Queue) -> None:
        self.place, self.owner, self.library, self.queue = place, owner, library, queue
        self.dtype, self.shape, self.size = place.dtype, place.shape, math.prod(place.shape)
        self.address = place.address if self.size else 0
        self._view: np.ndarray | None = None

    @property
    def view(self) -> np.ndarray:
        """A NumPy array over the device's memory, of which nothing but shape and strides may be used."""
        if self._view is None:
            p = self.place
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
        p = self.place._replace(address=address, shape=view.shape, strides=view.strides)
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

    def __mul__(self, other: Any) -> "DeviceArray":
        from .device_elementwise import multiplied

        return multiplied(self, other, self.dtype, self.queue)

    __rmul__ = __mul__

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

    def as_upstream(self, loss: str, shape: tuple[int, ...], reduction: str) -> "DeviceArray":
        """This array as `grad_output`: of the terms' shape, or 0-d."""
        if not self.ndim:
            return self
        if reduction != "none":
            raise ValueError(
                f"{loss}: grad_output must be a number with reduction={reduction!r}, got an array"
            )
        if self.shape != shape:
            raise ValueError(f"{loss}: grad_output must have the value's shape {shape}, got {self.shape}")
        return self

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
        copies = launcher.templates("copy")
        elements = ([s // a.itemsize for s in a.strides] for a in (source, self))
        shape, of_source, of_self = copies.collapse(self.shape, *elements)
        arguments = (source, self, self.size, *shape, *of_source, *of_self)
        self.queue.launch(
            copies.launch(self.size),
            copies.compile_copy,
            arguments,
            dtype=source.dtype,
            to=self.dtype,
            axes=len(shape),
            wide=self.size >= copies.WIDE,
        )

    def total(self, factor: float, arithmetic: np.dtype) -> "DeviceArray":
        """`factor` times the sum of the elements, in an arithmetic dtype that is no narrower than theirs."""
        same = dispatch.arithmetic_dtype(self.dtype) == arithmetic
        flat = self.astype(self.dtype if same else arithmetic, copy=False)
        result = self.queue.empty((), arithmetic)
        reduce = launcher.templates("reduce")
        grid = reduce.launch(self.size, arithmetic)
        partials = self.queue.empty((2 * grid.blocks,), arithmetic)
        self.queue.launch(
            grid,
            reduce.compile_sums,
            (flat, self.size, partials),
            code=dispatch.code_of(flat.dtype),
            vectors=flat.address % VECTOR_BYTES == 0,
        )
        finish(self.queue, partials, factor, None, result)
        return result


def finish(queue: Queue, partials: DeviceArray, factor: float, divisor: Any, result: DeviceArray) -> None:
    """Store ``(sum of the partial sums) * factor / divisor``, the divisor a 0-d array or None."""
    reduce = launcher.templates("reduce")
    queue.launch(
        (1, reduce.FINISH_THREADS),
        reduce.compile_finish,
        (partials, partials.size // 2, factor, divisor, result),
        code=dispatch.code_of(result.dtype),
        divided=divisor is not None,
    )


def flat(array: Any, shape: tuple[int, ...], dtype: np.dtype, queue: Queue) -> DeviceArray:
    """An array or a host's number as a C-contiguous array of a shape and dtype."""
    if not isinstance(array, DeviceArray):  # a 0-d array, at most broadcast
        array = queue.number(array.flat[0], dtype)
    if array.shape != shape:
        array = array.broadcast_to(shape)
    return array.astype(dtype, copy=False)


def fold(full: DeviceArray, result: DeviceArray, axes: Sequence[int] | None = None) -> None:
    """Store a C-contiguous array, summed over all axes but some, which are the result's.

    Without `axes`, it is summed over those along which `result` was broadcast to its shape.
    """
    if not result.size:
        return
    queue, folds = full.queue, launcher.templates("fold")
    if axes is None:
        extra = full.ndim - result.ndim
        axes = [k for k in range(extra, full.ndim) if full.shape[k] == result.shape[k - extra]]
    strides = _strides(full.shape, 1)
    kept = [(full.shape[k], strides[k]) for k in axes] or [(1, 0)]
    summed = [(full.shape[k], strides[k]) for k in range(full.ndim) if k not in axes] or [(1, 0)]
    count = math.prod(n for n, _ in summed)
    whole = result if result.flags.c_contiguous else queue.empty(result.shape, result.dtype)
    queue.launch(
        folds.launch(result.size, count),
        folds.compile_fold,
        (full, whole, result.size, *_transposed(kept), count, *_transposed(summed)),
        code=dispatch.code_of(full.dtype),
        to=dispatch.code_of(result.dtype),
        axes=len(kept),
        summed_axes=len(summed),
    )
    if whole is not result:
        result.assign(whole)


def _transposed(pairs: list[tuple[int, int]]) -> list[int]:
    return [a for a, _ in pairs] + [b for _, b in pairs]


def wrap(value: Any, queue: Queue) -> DeviceArray:
    """An array that a loss has made, as `DeviceArray`."""
    library = library_of(value.__class__)
    return DeviceArray(library.place(value), value, library, queue)


def aligned(arrays: Sequence[Any]) -> bool:
    """Whether all arrays start where vectors may."""
    return not any(a is not None and a.address % VECTOR_BYTES for a in arrays)


# ---- calls --------------------------------------------------------------------------------------------


def described(loss: str, name: str, value: Any) -> tuple[Library, Place]:
    """Where a caller's array lies; a TypeError for one that cannot be used."""
    library = library_of(value.__class__)
    try:
        place = library.place(value)
    except TypeError as error:
        raise TypeError(f"{loss}: {name} {error}") from None
    except KeyError as error:
        raise TypeError(f"{loss}: {name} has a __cuda_array_interface__ without {error}") from None
    size = place.dtype.itemsize
    if place.dtype.kind not in "fiub" and dispatch.code_of(place.dtype) is None:
        raise TypeError(
            f"{loss}: {name} must be float64, float32, float16 or bfloat16, got {place.dtype.name}"
        )
    if not place.dtype.isnative:
        raise TypeError(f"{loss}: {name} must be in native byte order, got {place.dtype.str}")
    if place.address % size or any(s % size for s in place.strides or ()):
        raise TypeError(f"{loss}: {name} is not aligned to its dtype {place.dtype.name}")
    return library, place


def begin(loss: str, call: dict[str, Any]) -> tuple[dict[str, Any], Queue]:
    """A call with its device's arrays as `DeviceArray`; a TypeError unless all are on one device.

    The first one's library makes new arrays, and says on which stream.
    """
    given: list[tuple[str, Any]] = []
    for name, value in call.items():
        if name == "out" and isinstance(value, tuple | list):
            given += [(name, v) for v in value]
        elif name != "wrt":
            given.append((name, value))
    arrays = [(n, v) for n, v in given if dispatch.is_device_array(v)]
    first = arrays[0][0]
    for name, value in given:
        if isinstance(value, np.ndarray | list | tuple) and np.ndim(value):
            raise TypeError(
                f"{loss}: all arrays must be on one device, but {first} is on a CUDA device and {name} on "
                "the host"
            )
    queue: Queue | None = None
    found: dict[int, DeviceArray] = {}
    for name, value in arrays:
        if isinstance(value, DeviceArray):  # a loss calls another
            queue = queue or Queue(value.queue.device, value.queue.stream, value.library)
            found[id(value)] = value
        if id(value) in found:
            continue
        library, place = described(loss, name, value)
        device = launcher.driver().device_of(place.address) if place.device is None else place.device
        if queue is None:
            queue = Queue(device, library.stream(device, place), library)
        elif device != queue.device:
            raise TypeError(
                f"{loss}: all arrays must be on one device, but {first} is on CUDA device {queue.device} and "
                f"{name} on CUDA device {device}"
            )
        elif library.ordered or place.stream is not None:
            stream = library.stream(device, place)
            if stream != queue.stream:
                queue.others.add(stream)
        found[id(value)] = DeviceArray(place, value, library, queue)
    assert queue is not None

    def seen(name: str, value: Any) -> Any:
        if name == "out" and isinstance(value, tuple | list):
            return tuple(found.get(id(v), v) for v in value)
        return found.get(id(value), value)

    return {name: seen(name, value) for name, value in call.items()}, queue


# ---- faults -------------------------------------------------------------------------------------------


class Faults:
    """What kernels found wrong in the data of one device.

    Each kind of call, the same loss on arrays of the same shape, has an int64 of its own there, in which the
    kernels record the first position (`kernels.cuda.target.record`).
    """

    COUNT = 4096

    def __init__(self, device: int) -> None:
        self.device = device
        self.address = launcher.driver().zeros(self.COUNT)
        self.kinds: dict[Any, int] = {}
        self.errors: list[Callable[[int, int], Exception]] = []
        self.lock = threading.Lock()

    def place(self, kind: Any, error: Callable[[int, int], Exception]) -> int:
        """The address for a kind of call, and how what is found there, a position and a number, is said."""
        with self.lock:
            if kind not in self.kinds:
                if len(self.errors) == self.COUNT:
                    self._raise()  # waits for the device: once in so many kinds
                    self.kinds.clear()
                    self.errors.clear()
                self.kinds[kind] = len(self.errors)
                self.errors.append(error)
            return self.address + 8 * self.kinds[kind]

    def check(self) -> None:
        """Wait for the device; raise what was found since the last time."""
        with self.lock:
            self._raise()

    def _raise(self) -> None:
        count = len(self.errors)
        found = launcher.driver().read(self.address, count)
        (wrong,) = np.nonzero(found)
        if wrong.size:
            launcher.driver().clear(self.address, count)
            record = launcher.templates("target").recorded(int(found[wrong[0]]))
            assert record is not None
            raise self.errors[wrong[0]](*record)


_faults: dict[int, Faults] = {}


def faults(device: int) -> Faults:
    """A device's faults; it is the current one."""
    if device not in _faults:
        _faults[device] = Faults(device)
    return _faults[device]


def synchronize() -> None:
    """Wait for the CUDA devices that losses were computed on, and raise what was wrong with their data.

    On a GPU a class index out of range, or a number out of a loss's domain, gives NaN, and a record of the
    first position; the call itself returns before the kernel has run. This function raises the error that
    the call would have raised on the CPU. With ``NUMBALOSS_CUDA_SYNCHRONOUS=1`` in the environment each call
    does so itself.

    Raises
    ------
    IndexError
        If a class index was out of range.
    ValueError
        If a number was out of its domain.
    """
    for device, found in list(_faults.items()):
        entered = launcher.driver().enter(device)
        try:
            found.check()
        finally:
            if entered:
                launcher.driver().leave()


def place_of(position: int, shape: tuple[int, ...], axes: tuple[int, ...]) -> tuple[int, ...]:
    """The index of the element at a position, in an array whose axes were visited in another order."""
    index = np.unravel_index(position, tuple(shape[k] for k in axes)) if shape else ()
    return tuple(int(index[axes.index(k)]) for k in range(len(shape)))
