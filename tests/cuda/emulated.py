"""A GPU that is not there: libraries whose arrays the host cannot read, and a driver that interprets kernels.

:func:`install` puts both in place of CuPy, PyTorch, Numba's arrays and the CUDA driver. The devices' memory
is one mapping that may be read and written only while a kernel runs, or through :func:`host`: any other
access ends the process. A kernel is not compiled: `interpreter.launch` runs its own Python.
"""

import bisect
import ctypes
import itertools
import mmap
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
from interpreter import At, launch

from numbaloss.kernels.cuda import (
    binaries,
    copy,
    ctc,
    driver,
    elementwise,
    faults,
    fold,
    libraries,
    linear,
    margins,
    nll,
    reduce,
    rows,
    softmax,
    target,
    vectors,
)
from numbaloss.kernels.cuda.target import types
from numbaloss.loss import Loss
from numbaloss.quick import never

SIZE = 1 << 26
TEMPLATES = copy, ctc, elementwise, fold, linear, margins, nll, reduce, rows, softmax, vectors
LIBC = ctypes.CDLL(None, use_errno=True)


# ---- memory -------------------------------------------------------------------------------------------


class Memory:
    """The memory of all devices; a block starts at a multiple of 256 bytes, some way after the last."""

    def __init__(self) -> None:
        self.map = mmap.mmap(-1, SIZE)
        self.start = ctypes.addressof(ctypes.c_char.from_buffer(self.map))
        self.open = 0
        self.clear()
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE if self.open else 0)

    def clear(self) -> None:
        self.used = 256
        self.addresses: list[int] = []
        self.blocks: list[tuple[np.ndarray, int]] = []  # each with its device

    def _protect(self, how: int) -> None:
        if LIBC.mprotect(ctypes.c_void_p(self.start), ctypes.c_size_t(SIZE), how):
            raise OSError(ctypes.get_errno(), "mprotect")

    @contextmanager
    def accessible(self) -> Iterator[None]:
        self.open += 1
        self._protect(mmap.PROT_READ | mmap.PROT_WRITE)
        try:
            yield
        finally:
            self.open -= 1
            if not self.open:
                self._protect(0)

    def allocate(self, count: int, dtype: Any, on: int) -> np.ndarray:
        """A flat array of which every byte is 0xff: NaN."""
        dtype = np.dtype(dtype)
        block = np.frombuffer(self.map, np.uint8, max(count, 1) * dtype.itemsize, self.used)
        flat = block.view(dtype)[:count]
        self.addresses.append(self.start + self.used)
        self.blocks.append((flat, on))
        self.used += -(-max(block.size, 1) // 256) * 256 + 256
        assert self.used <= SIZE, "out of memory"
        with self.accessible():
            block[:] = 0xFF
        return flat

    def find(self, address: int) -> tuple[np.ndarray, int, int]:
        """The block that an address is in, the element there, and the device."""
        k = bisect.bisect_right(self.addresses, address) - 1
        flat, on = self.blocks[k]
        offset, rest = divmod(address - self.addresses[k], flat.itemsize)
        assert not rest and offset <= flat.size, "an address in no array"
        return flat, offset, on


MEMORY = Memory()


# ---- libraries ----------------------------------------------------------------------------------------


class Flags(NamedTuple):
    c_contiguous: bool


class Array:
    """What the libraries' arrays have in common: a view of memory that is not to be read."""

    def __init__(self, view: np.ndarray, on: int) -> None:
        self.view, self.on = view, on

    @property
    def address(self) -> int:
        return self.view.__array_interface__["data"][0]

    def __getitem__(self, key: Any) -> Any:
        return type(self)(self.view[key], self.on)

    def _interface(self) -> dict[str, Any]:
        contiguous = self.view.flags.c_contiguous
        return {
            "version": 3,
            "shape": self.view.shape,
            "typestr": self.view.dtype.str,
            "data": (self.address, False),
            "strides": None if contiguous else self.view.strides,
            "stream": None,
        }


class CuPyArray(Array):
    __module__ = "cupy"

    data = property(lambda self: SimpleNamespace(ptr=self.address, device_id=self.on))
    flags = property(lambda self: Flags(self.view.flags.c_contiguous))
    shape = property(lambda self: self.view.shape)
    dtype = property(lambda self: self.view.dtype)
    strides = property(lambda self: self.view.strides)
    ndim = property(lambda self: self.view.ndim)
    size = property(lambda self: self.view.size)
    __cuda_array_interface__ = property(Array._interface)

    def transpose(self, axes: Any) -> Any:
        return CuPyArray(self.view.transpose(axes), self.on)


class Tensor(Array):
    __module__ = "torch"
    requires_grad = False
    is_cuda = True
    layout = "strided"

    shape = property(lambda self: list(self.view.shape))
    dtype = property(lambda self: TORCH.kinds[self.view.dtype.name])
    device = property(lambda self: SimpleNamespace(index=self.on))

    @property
    def __cuda_array_interface__(self) -> Any:
        raise TypeError("torch.bfloat16 has no type string")

    def data_ptr(self) -> int:
        return self.address

    def get_device(self) -> int:
        return self.on

    def stride(self) -> tuple[int, ...]:
        return tuple(s // self.view.itemsize for s in self.view.strides)

    def is_contiguous(self) -> bool:
        return self.view.flags.c_contiguous

    def is_neg(self) -> bool:
        return False

    def permute(self, axes: Any) -> Any:
        return Tensor(self.view.transpose(axes), self.on)


class Plain(Array):
    """An array of no library in particular."""

    stream: int | None = None

    @property
    def __cuda_array_interface__(self) -> Any:
        return {**self._interface(), "stream": self.stream}


def host(x: Any) -> np.ndarray:
    """A copy of a device's array."""
    with MEMORY.accessible():
        return x.view.copy()


def put(kind: type, a: Any, on: int = 0) -> Any:
    """An array on a device with the values and the strides of one on the host."""
    a = np.asarray(a)
    owner = a
    while isinstance(owner.base, np.ndarray):
        owner = owner.base
    start, first = (x.__array_interface__["data"][0] for x in (a, owner))
    low = min(first, start + sum(min(0, s * (n - 1)) for s, n in zip(a.strides, a.shape, strict=True)))
    high = start + sum(max(0, s * (n - 1)) for s, n in zip(a.strides, a.shape, strict=True)) + a.itemsize
    count = max(high - low, a.itemsize) // a.itemsize if a.size else 0
    flat = MEMORY.allocate(count, a.dtype, on)
    view = np.lib.stride_tricks.as_strided(flat[(start - low) // a.itemsize :], a.shape, a.strides)
    with MEMORY.accessible():
        view[...] = a
    return kind(view, on)


def _empty(kind: type, shape: Any, dtype: Any, on: int) -> Any:
    flat = MEMORY.allocate(int(np.prod(shape)), dtype, on)
    return kind(flat.reshape(shape), on)


def _cupy(current: Any) -> ModuleType:
    module = ModuleType("cupy")
    module.ndarray = CuPyArray
    module.empty = lambda shape, dtype: _empty(CuPyArray, shape, dtype, current.device)

    class Device:
        def __init__(self, on: int) -> None:
            self.on = on

        def __enter__(self) -> None:
            self.before, current.device = current.device, self.on

        def __exit__(self, *_: Any) -> None:
            current.device = self.before

    module.cuda = SimpleNamespace(
        get_current_stream=lambda on: SimpleNamespace(ptr=current.stream),
        runtime=SimpleNamespace(getDevice=lambda: current.device),
        Device=Device,
    )
    return module


def _torch(current: Any) -> ModuleType:
    import ml_dtypes

    module = ModuleType("torch")
    names = (
        "float64",
        "float32",
        "float16",
        "int64",
        "int32",
        "int16",
        "int8",
        "uint8",
        "uint64",
        "bool",
        "bfloat16",
    )
    module.kinds = {}
    for n in names:
        kind = SimpleNamespace(name=n)
        kind = type("dtype", (), {"__repr__": lambda self, n=n: f"torch.{n}", "name": n})()
        setattr(module, n, kind)
        module.kinds[n] = kind
    module.strided = "strided"
    module.device = lambda kind, index: SimpleNamespace(index=index)

    def empty(shape: Any, dtype: Any, device: Any) -> Any:
        own = np.dtype(ml_dtypes.bfloat16) if dtype.name == "bfloat16" else np.dtype(dtype.name)
        return _empty(Tensor, shape, own, device.index)

    module.empty = empty
    module.cuda = SimpleNamespace(current_stream=lambda on: SimpleNamespace(cuda_stream=current.stream))
    return module


# ---- the driver ---------------------------------------------------------------------------------------

# What `compile` was given, by the number that stands for the image.
COMPILED: dict[int, tuple[Any, tuple[Any, ...]]] = {}
_numbers = itertools.count()


def compile(
    function: Any, signature: tuple[Any, ...], cc: Any, threads: int, registers: int | None = None
) -> Any:
    """In place of `target.compile`."""
    number = next(_numbers)
    COMPILED[number] = function, signature
    kinds = {types.float32: "f32", types.float64: "f64", types.int32: "u32"}
    parameters: list[str] = []
    for t in signature:
        parts = [t.dtype] * t.count if isinstance(t, types.UniTuple) else [t]
        parameters += [kinds.get(p, "u64") for p in parts]
    return target.Binary(str(number), tuple(parameters), b"", "", 0, 0, 0)


class Driver:
    """In place of `driver.Driver`."""

    def __init__(self, current: Any) -> None:
        self.current = current
        self.launched: list[str] = []
        self.streams: list[int] = []
        self.waits: list[tuple[int, int]] = []
        self.cc = (9, 0)

    def enter(self, on: int) -> bool:
        if self.current.device == on:
            return False
        self.before, self.current.device = self.current.device, on
        return True

    def leave(self) -> None:
        self.current.device = self.before

    def device_of(self, address: int) -> int:
        return MEMORY.find(address)[2]

    def capability(self, on: int) -> tuple[int, int]:
        return self.cc

    def load(self, image: bytes, name: str) -> Any:
        return COMPILED[int(name)]

    def launch(self, kernel: Any, blocks: int, threads: int, stream: int, values: Any) -> None:
        kernel.pack(bytearray(8 * len(values)), 0, *values)  # as many, and of the kinds that it takes
        function, signature = kernel.function
        self.launched.append(function.__name__)
        self.streams.append(stream)
        # Fewer threads do for a kernel that works with any number of them.
        threads = 64 if function.__name__ == "finish" else threads
        with MEMORY.accessible():
            launch(function, blocks, threads, *self._arguments(signature, iter(values)))

    def _arguments(self, signature: tuple[Any, ...], values: Iterator[Any]) -> Iterator[Any]:
        for t in signature:
            if isinstance(t, types.UniTuple):
                yield tuple(self._arguments((t.dtype,) * t.count, values))
            elif isinstance(t, types.CPointer):
                yield self._pointer(t, next(values))
            elif isinstance(t, types.NoneType):
                assert next(values) == 0
                yield None
            else:
                x = next(values)
                yield {types.float32: np.float32, types.float64: np.float64}.get(t, int)(x)

    def _pointer(self, kind: Any, address: int) -> Any:
        if not address:  # of an array without elements
            return np.empty(0, kind.dtype.name)
        flat, offset, on = MEMORY.find(address)
        assert on == self.current.device, "memory of another device"
        return At(flat, offset)

    def fill(self, address: int, pattern: bytes, stream: int) -> None:
        flat, offset, on = MEMORY.find(address)
        assert on == self.current.device, "memory of another device"
        with MEMORY.accessible():
            flat.view(np.uint8)[offset * flat.itemsize :][: len(pattern)] = np.frombuffer(pattern, np.uint8)

    def store(self, address: int, values: np.ndarray, stream: int) -> None:
        flat, offset, on = MEMORY.find(address)
        assert on == self.current.device, "memory of another device"
        with MEMORY.accessible():
            flat[offset : offset + values.size] = values.ravel()

    def wait(self, stream: int, other: int) -> None:
        self.waits.append((stream, other))

    def zeros(self, count: int) -> int:
        flat = MEMORY.allocate(count, np.int64, self.current.device)
        with MEMORY.accessible():
            flat[:] = 0
        return flat.__array_interface__["data"][0]

    def clear(self, address: int, count: int) -> None:
        with MEMORY.accessible():
            MEMORY.find(address)[0][:count] = 0

    def read(self, address: int, count: int) -> np.ndarray:
        with MEMORY.accessible():
            return MEMORY.find(address)[0][:count].copy()


TORCH: Any = None


def losses(of: type = Loss) -> Iterator[Any]:
    """All losses, the tests' own included."""
    if "function" in of.__dict__:
        yield of.function
    for more in of.__subclasses__():
        yield from losses(more)


def prepared_calls() -> list[Any]:
    """What was prepared since `install`."""
    memos = [b.prepared for loss in losses() for b in loss._bindings.values()]
    return [made for memo in memos for made in memo.values() if made is not never]


def install(monkeypatch: Any, compiled: bool = False) -> Driver:
    """Put all of it in place, until the test ends; with `compiled`, kernels are compiled nevertheless."""
    global TORCH
    MEMORY.clear()
    current = SimpleNamespace(device=0, stream=7)
    found = Driver(current)
    TORCH = _torch(current)
    monkeypatch.setitem(sys.modules, "cupy", _cupy(current))
    monkeypatch.setitem(sys.modules, "torch", TORCH)
    from numba import cuda

    def device_array(shape: Any, dtype: Any, strides: Any) -> Any:
        flat = MEMORY.allocate(int(np.prod(shape)), dtype, current.device)
        return Plain(np.lib.stride_tricks.as_strided(flat, shape, strides), current.device)

    monkeypatch.setattr(cuda, "device_array", device_array, raising=False)
    for module in TEMPLATES:
        if not compiled:
            monkeypatch.setattr(module, "compile", compile)

    monkeypatch.setattr(binaries, "kept", binaries.compiled)
    monkeypatch.setattr(driver, "driver", lambda: found)
    monkeypatch.setattr(driver, "capability", found.capability)
    monkeypatch.setattr(binaries, "_kernels", {} if compiled else KERNELS)
    for loss in losses():
        loss._bindings.clear()  # what was prepared is of another driver's kernels
    monkeypatch.setattr(faults, "_faults", {})
    for name in ("library", "library_of"):
        monkeypatch.setattr(libraries, name, cache(getattr(libraries, name).__wrapped__))
    return found


# Kept from test to test: what was bound for one is used by the next.
KERNELS: dict[Any, Any] = {}
