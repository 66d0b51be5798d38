"""Array libraries on CUDA devices: CuPy, PyTorch, Numba, and any other with ``__cuda_array_interface__``.

They are never imported: they are used where the caller's array is one of theirs.
"""

import math
import sys
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import numpy as np

from . import driver


def strides_of(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    """Return the strides of a C-contiguous array."""
    return tuple(itemsize * math.prod(shape[k + 1 :]) for k in range(len(shape)))


def inverse(axes: Sequence[int]) -> list[int]:
    """Return the order of axes that undoes another."""
    return sorted(range(len(axes)), key=axes.__getitem__)


class Location(NamedTuple):
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

    def locate(self, x: Any) -> Location:
        said = x.__cuda_array_interface__
        if said.get("mask") is not None:
            raise TypeError("has a mask; pass its data, and the mask as sample_weight")
        address, readonly = said["data"]
        shape, strides = tuple(said["shape"]), said.get("strides")
        dtype = np.dtype(said["typestr"])
        return Location(
            address or 0,
            dtype,
            shape,
            None if strides is None else tuple(strides),
            not readonly,
            None,
            said.get("stream"),
        )

    def stream(self, device: int, location: Location | None = None) -> int:
        """The stream that the caller's work is on."""
        return 0 if location is None else location.stream or 0

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype, device: int, axes: tuple[int, ...] | None = None
    ) -> Any:
        """A new array, C-contiguous, or so with its axes in another order; its device is the current one."""
        from numba import cuda

        if dtype.kind == "V":
            raise TypeError(f"Numba has no arrays of {dtype.name}")
        axes = axes or tuple(range(len(shape)))
        strides = strides_of([shape[k] for k in axes], dtype.itemsize)
        return cuda.device_array(shape, dtype, strides=tuple(strides[k] for k in inverse(axes)))

    # The address of an array that kernels can take, and how it lies; None of another. Calls with a library
    # that does not tell quickly are not repeated.
    look: Callable[[Any], tuple[int, Any] | None] | None = None

    def address(self, x: Any) -> int:
        return x.__cuda_array_interface__["data"][0]


class CuPy(Library):
    name = "cupy"
    ordered = True

    def locate(self, x: Any) -> Location:
        return Location(x.data.ptr, x.dtype, x.shape, x.strides, True, x.data.device_id, None)

    def stream(self, device: int, location: Location | None = None) -> int:
        return sys.modules["cupy"].cuda.get_current_stream(device).ptr

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype, device: int, axes: tuple[int, ...] | None = None
    ) -> Any:
        cupy = sys.modules["cupy"]
        if axes is not None:
            made = self.empty(tuple(shape[k] for k in axes), dtype, device)
            return made.transpose(inverse(axes))
        if cupy.cuda.runtime.getDevice() == device:
            return cupy.empty(shape, dtype)
        with cupy.cuda.Device(device):
            return cupy.empty(shape, dtype)

    def address(self, x: Any) -> int:
        return x.data.ptr

    def look(self, x: Any) -> tuple[int, Any]:
        data = x.data
        return data.ptr, (x.dtype, x.shape, x.strides, data.device_id)


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
        self.bfloat16, self.strided = torch.bfloat16, torch.strided
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

    def locate(self, x: Any) -> Location:
        if x.requires_grad:
            raise TypeError("requires grad, which numbaloss does not record; pass tensor.detach()")
        if x.layout != self.strided or x.is_neg():
            raise TypeError("must be a dense tensor; pass tensor.to_dense() or tensor.resolve_neg()")
        dtype = self.dtype(x.dtype)
        strides = tuple(dtype.itemsize * s for s in x.stride())
        return Location(x.data_ptr(), dtype, tuple(x.shape), strides, True, x.device.index, None)

    def stream(self, device: int, location: Location | None = None) -> int:
        return sys.modules["torch"].cuda.current_stream(device).cuda_stream

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype, device: int, axes: tuple[int, ...] | None = None
    ) -> Any:
        torch = sys.modules["torch"]
        if axes is not None:
            made = self.empty(tuple(shape[k] for k in axes), dtype, device)
            return made.permute(inverse(axes))
        return torch.empty(shape, dtype=self.kinds[dtype], device=torch.device("cuda", device))

    def address(self, x: Any) -> int:
        return x.data_ptr()

    def look(self, x: Any) -> tuple[int, Any] | None:
        device = x.get_device()
        if device < 0 or x.requires_grad or x.layout != self.strided or x.is_neg():
            return None
        return x.data_ptr(), (x.dtype, tuple(x.shape), x.stride(), device)


class Memory:
    """A C-contiguous array of a program that calls this library from within, such as JAX's.

    Parameters
    ----------
    address : int
    dtype : numpy.dtype
    shape : tuple of int
    stream : int
        On which the program uses it.
    owner : object
        What holds the memory.
    """

    def __init__(
        self, address: int, dtype: np.dtype, shape: tuple[int, ...], stream: int, owner: Any
    ) -> None:
        self.address, self.dtype, self.shape, self.stream, self.owner = address, dtype, shape, stream, owner

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        said = {"shape": self.shape, "typestr": self.dtype.str, "data": (self.address, False)}
        return {"version": 3, **said, "stream": self.stream}

    def __setitem__(self, key: Any, array: "Memory") -> None:
        """Copy another array here, on the stream."""
        assert key is Ellipsis and (array.shape, array.dtype) == (self.shape, self.dtype)
        api = driver.driver()
        entered = api.enter(api.device_of(self.address))
        try:
            nbytes = math.prod(self.shape) * self.dtype.itemsize
            api.copy(self.address, array.address, nbytes, self.stream)
        finally:
            if entered:
                api.leave()


class Program(Library):
    """What makes arrays for a call from within a program, on its stream: of Numba's memory."""

    name = "program"

    def locate(self, x: Memory) -> Location:
        return Location(x.address, x.dtype, x.shape, None, True, None, x.stream)

    def empty(
        self, shape: tuple[int, ...], dtype: np.dtype, device: int, axes: tuple[int, ...] | None = None
    ) -> Memory:
        assert axes is None, "the program's arrays are C-contiguous"
        nbytes = max(1, math.prod(shape) * dtype.itemsize)
        owner = super().empty((nbytes,), np.dtype(np.uint8), device)
        return Memory(super().address(owner), dtype, shape, 0, owner)

    def address(self, x: Memory) -> int:
        return x.address


LIBRARIES: dict[str, type[Library]] = {"cupy": CuPy, "torch": Torch, "numbaloss": Program}


@cache
def library_of(kind: type) -> Library:
    """The library of a type of arrays, by the module that it or a base of it is from."""
    modules = [base.__module__.partition(".")[0] for base in kind.__mro__]
    return library(next((m for m in modules if m in LIBRARIES), ""))


@cache
def library(module: str) -> Library:
    return LIBRARIES.get(module, Library)()
